"""The one place that makes torchvision importable, tried in processes of their own."""

import subprocess
import sys
import textwrap

import pytest
import torch

from mergekit_lite.suites.vision import build_backbone, pick_device


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_needs_torch_alone():
    run("""
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                wanted = {"timm", "torchvision", "matplotlib", "ipywidgets", "pandas", "joblib", "typer", "safetensors"}
                if name.split(".")[0] in wanted:
                    raise ImportError(f"{name} is not needed to import mergekit_lite")
        sys.meta_path.insert(0, Refuse())
        import mergekit_lite as mkl, torch
        tv = mkl.TaskVectors({"w": torch.zeros(2)}, [{"w": torch.ones(2)}])
        assert mkl.average(tv)["w"].tolist() == [1, 1]
    """)


def test_timm_works_beside_this_torch():
    out = run("""
        from mergekit_lite.suites.vision import import_timm
        import_timm().create_model("tf_efficientnet_lite0", num_classes=0)
        import torchvision.transforms
        print("ok")
    """)
    assert out == "ok\n"


def test_a_torchvision_without_its_operators_is_repaired(tmp_path):
    """A stand-in fails exactly as torchvision does beside a CPU-only torch, until the operators are declared."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("from torchvision import ops\n")
    (tmp_path / "torchvision" / "ops.py").write_text(
        "import torch\n"
        "if not hasattr(torch.ops.torchvision, 'nms') or not hasattr(torch.ops.torchvision, 'qnms'):\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    run(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from mergekit_lite.suites import vision
        assert vision.import_torchvision().__file__.startswith({str(tmp_path)!r})
        assert len(vision._declared) == 1
        assert vision.import_torchvision() is sys.modules["torchvision"]
        assert len(vision._declared) == 1
    """)


def test_a_healthy_torchvision_is_left_alone(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    run(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from mergekit_lite.suites import vision
        vision.import_torchvision()
        assert vision._declared == []
    """)


def test_other_faults_of_torchvision_are_not_hidden(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('the disk is on fire')\n")
    run(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        try:
            from mergekit_lite.suites import vision
        except RuntimeError as problem:
            assert "on fire" in str(problem)
        else:
            raise AssertionError("no error")
    """)


def test_backbones_give_pooled_features():
    images = torch.zeros(2, 3, 32, 32)
    assert build_backbone("resnet10t")(images).shape == (2, 512)
    assert build_backbone("tf_efficientnet_lite0", stages=5)(images).shape == (2, 112)


def test_a_backbone_can_only_be_cut_where_it_has_stages():
    with pytest.raises(ValueError, match="'resnet10t' cannot be cut"):
        build_backbone("resnet10t", stages=2)
    with pytest.raises(ValueError, match="cannot be cut to 99"):
        build_backbone("tf_efficientnet_lite0", stages=99)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in {"cpu", "cuda", "mps"}
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available"):
            pick_device("cuda")

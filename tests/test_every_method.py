"""What must hold for every method that needs nothing but the weights, whatever the tensors of a model are.

Models here have all that real checkpoints have been seen to hold: tensors without axes or entries, convolutions,
depthwise kernels, tables, tied names, all precisions, running statistics, constants with infinities; experts that
changed nothing, froze a layer, or are copies of each other.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekit_lite as mkl

State = dict[str, Tensor]

SHAPES = {
    "logit_scale": (),
    "empty": (0,),
    "blocks.0.no_rows": (0, 5),
    "blocks.1.no_columns": (3, 0),
    "cls_token": (1, 1, 6),
    "pos_embed": (1, 5, 6),
    "blocks.0.w": (4, 6),
    "blocks.1.w": (6, 3),
    "blocks.2.wide": (2, 40),
    "blocks.2.one_output": (1, 7),
    "blocks.2.conv.weight": (4, 3, 2, 2),
    "blocks.2.dw.weight": (4, 1, 3, 3),
    "blocks.1.bias": (5,),
    "blocks.1.half": (5, 3),
    "blocks.1.brain": (3, 4),
    "blocks.1.double": (4, 5),
    "norm.running_mean": (4,),
    "norm.running_var": (4,),
    "embed.weight": (5, 6),
}
DTYPES = {"half": torch.float16, "brain": torch.bfloat16, "double": torch.float64}
ODD = ["logit_scale", "empty", "blocks.0.no_rows", "blocks.1.no_columns", "cls_token"]
MASK = torch.full((3, 3), float("-inf")).triu(1)


@dataclass
class Models:
    """A base and its experts, as state dicts."""

    base: State
    experts: list[State]

    def task_vectors(self) -> mkl.TaskVectors:
        return mkl.TaskVectors(self.base, self.experts)


def state(names: list[str], seed: int, near: State | None = None) -> State:
    """Random weights, near those of another model if there is one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        values = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
        if name.endswith("var"):
            values = values.square()
        elif near is not None:
            values = near[name].double() + 0.1 * values
        made[name] = values.to(DTYPES.get(name.rpartition(".")[2], torch.float32))
    return made


@st.composite
def models(draw: st.DrawFn, tasks: int) -> Models:
    """A base and `tasks` experts with some of the tensors above."""
    odd = draw(st.booleans()) and draw(st.booleans())
    names = ODD if odd else draw(st.lists(st.sampled_from(list(SHAPES)), min_size=6, unique=True))
    seed = draw(st.integers(0, 10**6))
    base = state(names, seed)
    experts = [state(names, seed + k + 1, base) for k in range(tasks)]
    kind = draw(st.sampled_from(["moved", "one expert is the base", "all are equal", "all are the base", "opposite"]))
    if kind == "one expert is the base":
        experts[draw(st.integers(0, tasks - 1))] = {name: t.clone() for name, t in base.items()}
    elif kind == "all are equal":
        experts = [{name: t.clone() for name, t in experts[0].items()} for _ in experts]
    elif kind == "all are the base":
        experts = [{name: t.clone() for name, t in base.items()} for _ in experts]
    elif kind == "opposite":
        experts[1] = {n: t if n.endswith("var") else 2 * base[n] - t for n, t in experts[0].items()}
    for frozen in draw(st.lists(st.sampled_from(names), max_size=2)):
        for expert in experts[: draw(st.sampled_from([1, tasks]))]:
            expert[frozen] = base[frozen].clone()
    for model in (base, *experts):
        if draw(st.just(not odd)):
            model["norm.num_batches_tracked"] = torch.tensor(len(model))
            model["mask"] = MASK.clone()
        if "embed.weight" in model:
            model["head.weight"] = model["embed.weight"]
    return Models(base, experts)


ALL: dict[str, tuple[str, dict[str, object]]] = {
    f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})": (name, options)
    for name, options in [
        ("average", {}),
        ("average", {"weights": [1, 2, 0]}),
        ("task_arithmetic", {}),
        ("task_arithmetic", {"scale": [0.3, -0.5, 1.0]}),
        ("negation", {"forget": 1}),
        ("analogy", {"a": 0, "b": 1, "c": 2}),
        ("linear_interpolation", {"t": 0.3}),
        ("slerp", {"t": 0.3}),
        ("ties", {}),
        ("ties", {"granularity": "layer", "combine": "sum"}),
        ("pcb", {}),
        ("pcb", {"density": 1.0, "clip": 0.1}),
        ("dare", {"drop": 0.5}),
        ("dare", {"combine": "ties"}),
        ("della", {}),
        ("breadcrumbs", {}),
        ("breadcrumbs", {"granularity": "row", "density": 0.5}),
        ("consensus", {}),
        ("lines", {}),
        ("metagpt", {}),
        ("metagpt", {"granularity": "layer"}),
        ("model_stock", {}),
        ("model_stock", {"granularity": "row"}),
        ("model_stock", {"granularity": "whole", "clip": False}),
        ("tsv", {}),
        ("iso_c", {}),
        ("iso_cts", {}),
        ("karcher", {}),
        ("karcher", {"granularity": "layer"}),
        ("wudi", {"steps": 5}),
        ("wudi", {"solver": "exact", "others": "average"}),
        ("wudi", {"solver": "exact", "ridge": 0.1}),
        ("awd", {"iterations": 20}),
        ("awd", {"iterations": 20, "granularity": "layer", "relative": True}),
        ("awd", {"iterations": 20, "granularity": "row", "row_mean": True, "squared": True}),
        ("awd", {"solver": "exact", "granularity": "layer"}),
        ("emr", {}),
        ("emr", {"by_tensor": True}),
        ("tall_masks", {}),
    ]
}
PAIRS = {"linear_interpolation", "slerp"}
# The order of the experts makes no difference to these, up to rounding. (AWD's descents cross kinks, where rounding
# decides on which side they go on, and its exact solver starts from shares that are drawn in the experts' order.)
SYMMETRIC = {
    name
    for name, (method, options) in ALL.items()
    if method not in {*PAIRS, "negation", "analogy", "awd", "dare", "della", "emr", "tall_masks"}
    and not isinstance(options.get("weights", options.get("scale")), list)
}


def test_every_method_is_here():
    assert {name for name, _ in ALL.values()} == set(mkl.methods(mkl.Need.WEIGHTS))


def for_each(entries):
    """Run a test for these entries, and for some models each."""

    def decorate(test):
        @pytest.mark.parametrize("entry", entries)
        @settings(max_examples=10, deadline=None, derandomize=True)
        @given(st.data())
        def run(entry, data):
            name, options = ALL[entry]
            given_models = data.draw(models(2 if name in PAIRS else 3))
            test(mkl.methods()[name], options, given_models)

        return run

    return decorate


def attempt(merge):
    """The merge, or None where it says in a sentence why there is none."""
    try:
        return merge()
    except (ValueError, KeyError, TypeError) as problem:
        if len(str(problem).split()) <= 4:  # such as the bare key of a KeyError
            raise
        return None


def states_of(method, merged):
    return list(merged.values()) if method.per_task else [merged]


@for_each(sorted(ALL))
def test_merges_are_finite_and_fit_the_base(method, options, given_models):
    base = given_models.base
    before = [{n: t.clone() for n, t in model.items()} for model in (base, *given_models.experts)]
    merged = attempt(lambda: method.function(given_models.task_vectors(), **options))
    for model, old in zip((base, *given_models.experts), before, strict=True):
        assert list(model) == list(old)
        assert all(torch.equal(model[name], old[name]) for name in old), "inputs are not changed"
    if merged is None:
        return
    for found in states_of(method, merged):
        assert list(found) == list(base)
        for name, tensor in found.items():
            assert (tensor.shape, tensor.dtype) == (base[name].shape, base[name].dtype), name
            if name == "mask":
                assert torch.equal(tensor, MASK)
            else:
                assert torch.isfinite(tensor).all(), name
            if name.endswith("running_var"):
                assert (tensor >= 0).all()
        if "head.weight" in found:
            assert torch.equal(found["head.weight"], found["embed.weight"])


@for_each(sorted(entry for entry, (name, _) in ALL.items() if not mkl.methods()[name].per_task))
def test_files_are_merged_as_models_are(method, options, given_models):
    merged = attempt(lambda: method.function(given_models.task_vectors(), **options))
    with tempfile.TemporaryDirectory() as folder:
        states = {"base": given_models.base, **{f"e{k}": e for k, e in enumerate(given_models.experts)}}
        paths = [mkl.save(state, Path(folder) / f"{name}.safetensors") for name, state in states.items()]
        out = Path(folder) / "merged.safetensors"
        written = attempt(lambda: mkl.merge_files(method.function, paths[0], paths[1:], out, **options))
        assert (written is None) == (merged is None)
        if merged is None:
            return
        loaded = mkl.load(out)
        assert set(loaded) == set(merged)
        for name, tensor in merged.items():
            torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-7)


@for_each(sorted(SYMMETRIC))
def test_the_order_of_the_experts_does_not_matter(method, options, given_models):
    merged = attempt(lambda: method.function(given_models.task_vectors(), **options))
    turned = Models(given_models.base, given_models.experts[1:] + given_models.experts[:1])
    again = attempt(lambda: method.function(turned.task_vectors(), **options))
    assert (again is None) == (merged is None)
    if merged is None:
        return
    for name, tensor in merged.items():
        coarse = tensor.is_floating_point() and tensor.dtype.itemsize == 2
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if coarse else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(again[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# ---------------------------------------------------------------- for models that are fixed


def run(entry: str, experts: mkl.TaskVectors):
    name, options = ALL[entry]
    return mkl.methods()[name].function(experts[:2] if name in PAIRS else experts, **options)


@pytest.mark.parametrize("kind", ["no weights", "no floating-point numbers", "only statistics", "one number"])
@pytest.mark.parametrize("entry", sorted(ALL))
def test_models_with_hardly_anything(entry, kind):
    """The base comes back, or an error says what is missing."""
    base = {
        "no weights": {"a": torch.zeros(0), "blocks.0.b": torch.zeros(0, 3), "blocks.1.b": torch.zeros(3, 0)},
        "no floating-point numbers": {"steps": torch.tensor(3)},
        "only statistics": {"norm.running_mean": torch.ones(2), "norm.running_var": torch.ones(2)},
        "one number": {"logit_scale": torch.tensor(1.0)},
    }[kind]
    experts = [{n: t + k if t.is_floating_point() else t for n, t in base.items()} for k in (1, 2, 4)]
    merged = attempt(lambda: run(entry, mkl.TaskVectors(base, experts)))
    for found in [] if merged is None else states_of(mkl.methods()[ALL[entry][0]], merged):
        assert list(found) == list(base)
        assert all(torch.isfinite(t).all() and t.shape == base[name].shape for name, t in found.items())


@pytest.mark.parametrize("entry", sorted(ALL))
def test_how_tensors_lie_in_memory_does_not_matter(entry):
    """Transposed and channels-last weights, and task vectors that a transformation has laid out so."""

    def turned(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t

    names = [name for name in SHAPES if name.startswith(("blocks.0.w", "blocks.1.w", "blocks.2", "cls", "pos"))]
    base = state(names, 0)
    experts = [state(names, k, base) for k in (1, 2, 3)]
    plain = mkl.TaskVectors(base, experts)
    layouts = [{n: turned(t) for n, t in model.items()} for model in (base, *experts)]
    laid_out = mkl.TaskVectors(layouts[0], layouts[1:])
    expected, method = run(entry, plain), mkl.methods()[ALL[entry][0]]
    for other in (laid_out, plain.transform(lambda name, taus: turned(taus))):
        for found, wanted in zip(states_of(method, run(entry, other)), states_of(method, expected), strict=True):
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)

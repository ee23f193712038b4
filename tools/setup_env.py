"""Make a virtual environment: `setup_env.py FOLDER [WHAT PIP SHALL INSTALL ...]`.

By default the one that `make book`, `make test` and `make lab` run in: this package with all its extras.
Run by any Python 3, even one that is too old, so that it can say what is missing.
"""

import os
import platform
import re
import shutil
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED = (3, 11)
THIS_PACKAGE = ("--editable", ".[book,test]")


def stop(message):
    sys.exit("\nmergekit_lite could not be set up: " + message + "\n")


def check_python():
    if sys.version_info < NEEDED:
        stop(
            "it needs Python {}.{} or newer, and this is Python {} ({}).\n"
            "Install a newer one and name it: make PYTHON=python3.12 book".format(
                NEEDED[0], NEEDED[1], platform.python_version(), sys.executable
            )
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop(
            "this Python has no venv module ({}).\nOn Debian and Ubuntu: sudo apt install python{}.{}-venv".format(
                sys.executable, *sys.version_info[:2]
            )
        )


def pinned(package):
    """The line of constraints.txt for one package, such as torch==2.13.0."""
    with open("constraints.txt") as file:
        found = re.search(r"^{}==\S+".format(re.escape(package)), file.read(), re.MULTILINE)
    if not found:
        stop("constraints.txt does not pin " + package)
    return found.group()


def wants_cpu_torch():
    """On Linux the default build of torch brings gigabytes of CUDA; without a GPU they are of no use."""
    choice = os.environ.get("TORCH", "auto")
    if choice not in ("auto", "cpu", "default"):
        stop("TORCH must be auto, cpu or default (the index's own build, with CUDA on Linux); got " + choice)
    gpu = shutil.which("nvidia-smi") is not None
    return sys.platform == "linux" and (choice == "cpu" or (choice == "auto" and not gpu))


def main(folder, *wanted):
    check_python()
    if not os.path.exists("constraints.txt"):
        stop("run it in the repository's root, where constraints.txt is.")
    print("Setting up {} (once; a few minutes) ...".format(folder), flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [os.path.join(folder, "bin", "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", "constraints.txt"]
    if wants_cpu_torch():
        # A version that ends in +cpu exists as a CPU build only, wherever pip may look: CUDA can't slip in.
        cpu_build = [pinned("torch") + "+cpu"] + ([] if wanted else [pinned("torchvision")])
        index = ["--extra-index-url", os.environ.get("TORCH_INDEX", CPU_INDEX), "--retries", "1"]
        if subprocess.run([*pip, "--quiet", *index, *cpu_build]).returncode:
            stop(
                "the CPU build of torch ({}) was not found at {}.\n"
                "Check the network, or accept the default build (several GB with CUDA): make TORCH=default book".format(
                    cpu_build[0], index[1]
                )
            )
    if subprocess.run([*pip, *(wanted or THIS_PACKAGE)]).returncode:
        stop("pip failed; its message is above.")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [".venv"]))

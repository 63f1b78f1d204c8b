"""What is installed, under which names, and what importing it does."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from launch.config import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"megatron", "deepspeed", "mpi", "wandb", "huggingface", "dev", "launch"}
USE = """
import importlib.util, sys
from pathlib import Path
import torch
import muse_dist, launch
from muse_dist.kernels import reference
root = Path(sys.argv[1]).resolve()
for module in (muse_dist, launch, reference):
    assert root in Path(module.__file__).resolve().parents, module.__file__
spec = importlib.util.find_spec("kernels")
assert spec is None or root not in Path(spec.origin).resolve().parents, spec
x = torch.randn(1, 2, 40, 16)
y = muse_dist.muse_attention(x, x, x, config=muse_dist.MuseConfig(block=8, leaf=4, group=4, anchors=2, remote_leaf=4))
assert y.shape == x.shape and y.isfinite().all()
print(muse_dist.__version__)
"""
# What the extras bring, by import name.
OPTIONAL = ("transformers", "tensorboard", "matplotlib", "tqdm", "safetensors", "wandb", "deepspeed", "megatron",
            "mpi4py", "hypothesis", "pytest")


def python(*arguments, cwd, without_site=False, path=()):
    """Run an interpreter that sees this environment's packages, but no editable install if `without_site`."""
    paths = [*map(str, path), *([sysconfig.get_path("purelib")] if without_site else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    flags = ["-S"] if without_site else []
    result = subprocess.run([sys.executable, *flags, *map(str, arguments)], cwd=cwd, env=environment, text=True,
                            capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def source(tmp_path):
    """A copy of what is packaged, so that building leaves nothing in the working tree."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("muse_dist", "kernels", "megatron_patch", "launch"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    assert all((folder / "muse_dist" / link).is_symlink() for link in ("kernels", "megatron_patch"))
    return folder


def build(source, kind):
    """Build a wheel or an editable wheel with setuptools and unpack it. Returns the folder and the names in it."""
    made = source.parent / "made"
    made.mkdir()
    python("-c", f"from setuptools import build_meta; build_meta.build_{kind}({str(made)!r})", cwd=source)
    (wheel,) = made.glob("*.whl")
    unpacked = source.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
        return unpacked, set(archive.namelist())


def test_wheel_holds_every_module_under_its_import_name(source):
    unpacked, names = build(source, "wheel")
    for folder in ("muse_dist", "muse_dist/kernels", "muse_dist/megatron_patch", "launch"):
        expected = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert expected
        assert expected <= names
    assert {name.split("/")[0] for name in names} == {"muse_dist", "launch", f"muse_dist-{version()}.dist-info"}
    assert f"muse_dist-{version()}.dist-info/licenses/LICENSE" in names
    assert python("-c", USE, unpacked, cwd=unpacked.parent, without_site=True, path=[unpacked]).strip() == version()


def test_editable_install_finds_the_working_tree(source):
    unpacked, names = build(source, "editable")
    assert not any(name.startswith(("muse_dist/", "kernels/")) for name in names)
    add = f"import site; site.addsitedir({str(unpacked)!r})\n"
    out = python("-c", add + USE, source, cwd=unpacked.parent, without_site=True, path=[unpacked])
    assert out.strip() == version()


def test_import_needs_no_extra_and_changes_nothing(tmp_path):
    python("-c", f"""
import os, sys, threading, warnings
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import torch
before = (dict(os.environ), torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(),
          torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), threading.active_count())
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import muse_dist
    from muse_dist.kernels import reference
after = (dict(os.environ), torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(),
         torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), threading.active_count())
assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2:] == after[2:]
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
""", cwd=tmp_path, path=[ROOT])


def test_core_needs_torch_and_numpy_only_and_the_extras_exist():
    core = {name(requirement) for requirement in PROJECT["dependencies"]}
    assert core == {"torch", "numpy", "tomli"}
    assert set(PROJECT["optional-dependencies"]) == EXTRAS
    assert PROJECT["requires-python"] == ">=3.10"


def test_make_installs_every_extra():
    """A test of one that is missing would be skipped in a fresh environment."""
    extras, = re.findall(r"--editable '\.\[(.+)\]'", (ROOT / "Makefile").read_text())
    assert sorted(extras.split(",")) == sorted(EXTRAS)


def test_constraints_pin_what_make_installs_within_the_ranges():
    from packaging.requirements import Requirement

    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    installed = PROJECT["dependencies"] + [r for extra in EXTRAS for r in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, installed):
        for python_version in ("3.10", "3.11", "3.12"):
            found = [pin for pin in pins if name(pin.name) == name(requirement.name)
                     and (pin.marker is None or pin.marker.evaluate({"python_version": python_version}))]
            assert len(found) == 1, f"{requirement} has {len(found)} pins for Python {python_version}"
            (pin,) = found[0].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{found[0]} is outside {requirement}"
    assert "torch==2.13.0" in map(str, pins)


def test_make_installs_once_and_again_when_the_requirements_change(tmp_path):
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)
    assert "--constraint constraints.txt" in plan(tmp_path, "run")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    run = plan(tmp_path, "run")
    assert run.strip().endswith("-m launch.train --config configs/tiny.toml --fresh") and "pip install" not in run
    test = plan(tmp_path, "test")
    assert "ruff check" in test and "mypy" in test and "-m pytest" in test and "pip install" not in test
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert "pip install" in plan(tmp_path, "test")


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make test$", script.read_text(), re.MULTILINE)


def plan(folder, target):
    """The commands `make` would run."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    return subprocess.run(["make", "--dry-run", "--no-print-directory", target], cwd=folder, env=environment, text=True,
                          capture_output=True, check=True).stdout


def name(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def version():
    return re.search(r'__version__ = "(.+)"', (ROOT / "muse_dist" / "__init__.py").read_text()).group(1)

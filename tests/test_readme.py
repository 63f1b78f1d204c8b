"""The README: its commands exist, its code runs, its order is what a newcomer needs."""
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Values for what a command leaves to the reader.
PLACEHOLDERS = {"DIR": "runs/tiny/model", "FILE": "README.md"}


def commands():
    """Every `python -m launch...` and `torchrun ... -m launch...` of the README, as its words."""
    lines = [line for _, block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`]*)`", re.sub(r"\s+", " ", text))
    for line in lines:
        found = re.search(r"(?:python|torchrun.*?) -m (launch\.\w+ .*)", line)
        if found:
            yield [PLACEHOLDERS.get(word, word) for word in shlex.split(found[1], comments=True) if word != "..."]


def test_it_opens_with_five_lines_and_two_commands():
    head = README[:README.index("```")].strip().splitlines()
    assert head[0] == "# muse_dist"
    assert len([line for line in head[1:] if line]) == 5
    language, first = BLOCKS[0]
    assert language == "sh"
    assert [line.split("#")[0].split() for line in first.strip().splitlines()] == [["make", "run"], ["make", "test"]]


@pytest.mark.parametrize("target", ["run", "test", "sanitize"])
def test_make_knows_the_commands(target):
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_sanitize_says_what_it_needs():
    command = ["make", "--assume-old=.venv/.installed", f"BIN={Path(sys.executable).parent}", "sanitize"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert result.returncode and "needs an NVIDIA GPU" in result.stderr and "pytest" not in result.stdout


def test_python_blocks_run_one_after_the_other(tmp_path):
    # A block on several ranks needs the process group that the reader brings: here one of a single process.
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    assert code.count("import") >= 3
    if "group=group" in code:
        head = ("import torch.distributed as dist\n"
                f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
                "group = dist.group.WORLD\n")
        code = head + code
    code += ("\nassert y.shape == q.shape and q.grad is not None and q.grad.isfinite().all()"
             "\nassert model(torch.zeros(1, 16, dtype=torch.long)).logits.isfinite().all()"
             "\nassert model.config._attn_implementation == 'muse'\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_commands_take_the_options_shown():
    found = list(commands())
    assert len(found) > 10
    for module, *words in found:
        if module == "launch.megatron_bench":  # cannot be imported without megatron-core
            continue
        if module == "launch.mpi":  # starts another
            module, *words = words
        importlib.import_module(module)._parser().parse_args(words)


def test_names_and_links_exist():
    import muse_dist

    for name in re.findall(r"`MuseConfig\.(\w+)\(", README):
        assert hasattr(muse_dist.MuseConfig, name), name
    for name in re.findall(r"`muse_dist\.((?:\w+\.)*\w+)`", README):
        target = muse_dist
        for part in name.split("."):
            target = getattr(target, part, None) or importlib.import_module(f"{target.__name__}.{part}")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_paper_is_cited_and_the_licence_named():
    citation = next(block for language, block in BLOCKS if language == "bibtex")
    assert "arXiv" in citation and "2509.10406" in citation and "Mitchell" in citation and "Kersting" in citation
    assert "Apache-2.0" in README
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and len(licence) > 10_000

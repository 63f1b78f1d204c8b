"""A rank of the other engines is killed, and the same command goes on as if nothing was."""
import signal

import pytest

from tests.launched import Case, Launcher, assert_same, write_pattern

STEPS = 30


@pytest.mark.parametrize("engine, package", [("deepspeed", "deepspeed"), ("megatron", "megatron.core")])
def test_a_killed_rank_loses_and_repeats_nothing(engine, package, tmp_path):
    """Megatron runs on CPUs as in its own tests."""
    pytest.importorskip(package)
    folders = [tmp_path / name for name in ("data", "calm", "hit")]
    for folder in folders:
        folder.mkdir()
    write_pattern(folders[0])
    with Launcher(engine) as launcher:
        calm, hit = (Case(launcher, folders[0], folder, STEPS) for folder in folders[1:])
        calm.finish(2, "--engine", engine)
        run = hit.start(2, "--engine", engine)
        hit.wait_for_steps(run, 7)
        run.kill(1)
        codes = run.wait()
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), run.output()
        assert 7 <= len(hit.rows()) < STEPS
        assert "going on after step" in hit.finish(2, "--engine", engine)
    assert_same(hit, calm)

"""Runs that go on with other settings than they began with, in one process."""
import dataclasses
import json

import pytest
import torch

from launch import train as command
from launch.checkpoint import Checkpoints
from launch.config import LogConfig
from launch.corpus import load_corpus
from launch.monitor import Silent
from launch.trainer import Trainer
from tests.launched import small_run, write_pattern
from tests.test_launch_guard import ALONE, SMALL, Spoiled

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def start(tmp_path):
    """A function that runs launch.train with more arguments and returns the rows of its metrics."""
    write_pattern(tmp_path)
    (tmp_path / "run.toml").write_text(small_run(4, tmp_path))

    def run(*arguments):
        assert command.main(["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path), "--device", "cpu",
                             *arguments]) == 0
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return run


def attentions(rows):
    return "".join(row["attention"][0] for row in rows)


def test_a_warm_up_that_is_over_does_not_come_back(start):
    half = ("--set", "train.exact_first=0.5")
    assert attentions(start(*half)) == "eemm"
    assert attentions(start(*half, "--steps", "12")) == "eemm" + 8 * "m"
    assert attentions(start(*half, "--steps", "40", "--attention", "exact"))[12:] == 28 * "e"


def test_a_warm_up_that_goes_on_has_the_length_of_the_new_run(start):
    assert attentions(start("--set", "train.exact_first=1.0", "--steps", "2")) == "ee"
    assert attentions(start("--set", "train.exact_first=0.5", "--steps", "8")) == "eeeemmmm"


def test_another_batch_goes_on_at_the_very_sequence(start):
    start()
    rows = start("--steps", "7", "--set", "train.batch=3", "train.micro_batch=2")
    assert [row["first_sequence"] for row in rows] == [0, 2, 4, 6, 8, 11, 14]


def test_fresh_empties_a_folder_of_checkpoints_on_another_disk(start, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    start("--steps", "2")
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["step-000000002"]
    assert len(start("--fresh")) == 4, "it began again"
    assert (tmp_path / "run" / "checkpoints").is_symlink()
    assert (tmp_path / "scratch" / "step-000000004").is_dir()


def test_a_spike_right_after_a_restart_is_told_by_the_losses_before(tmp_path):
    config = dataclasses.replace(SMALL, train=dataclasses.replace(
        SMALL.train, steps=36, spike=3.0, bad_step="skip"), log=LogConfig(checkpoint_every=0))
    rows = []
    for last, spoiled in ((33, {}), (36, {2: 3.0})):
        trainer = Trainer(Spoiled(spoiled, config), load_corpus(config.data), config, ALONE, Silent(rows),
                          Checkpoints(tmp_path / "checkpoints", ALONE, 2))
        if rows:
            trainer.resume(33)
        trainer.run(last)
    assert [row["step"] for row in rows if row["skipped"]] == [35]
    assert trainer.guard.skipped == 0 and torch.isfinite(trainer.engine.model.lm_head.weight).all()

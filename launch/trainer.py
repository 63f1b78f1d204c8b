"""The training loop: steps, what is logged of them, checkpoints, and how it ends and goes on."""
from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.checkpoint import Checkpoints
from launch.config import RunConfig
from launch.corpus import Corpus
from launch.engine import Engine
from launch.flops import peak_flops, step_flops
from launch.guard import LossGuard, StopSignal, Watchdog
from launch.metrics import strict_json
from launch.monitor import Monitor, Silent
from launch.optimizer import learning_rate
from launch.probe import probe_layers, sampled_layers
from launch.ranks import Ranks
from launch.timing import Stopwatch
from muse_dist import ByteCounter


class Trainer:
    """One run on one rank. The batches depend on `train.seed` and their number alone: the same seed, the same curve.

    Args:
        engine: the model and its optimizer.
        corpus: the tokens.
        monitor: takes a row of metrics a step.
        checkpoints: where to save; None for a run that leaves nothing.
        counter: what the attention received is read from it.
        folder: for what is known of a bad step, on all ranks or none; None for a run that leaves nothing.
    """

    def __init__(
        self, engine: Engine, corpus: Corpus, config: RunConfig, ranks: Ranks, monitor: Monitor | Silent,
        checkpoints: Checkpoints | None = None, counter: ByteCounter | None = None, folder: Path | None = None,
    ) -> None:
        self.engine, self.corpus, self.config, self.ranks = engine, corpus, config, ranks
        self.monitor, self.checkpoints, self.folder = monitor, checkpoints, folder
        self.counter = counter or ByteCounter()
        self.guard = LossGuard(config.train)
        self.watch = Stopwatch(ranks.device)
        self.step = 0  # steps behind
        self.sequences = 0  # sequences read, of all ranks: the position in the data
        self.saved: int | None = None  # step of the last checkpoint asked for
        self.exact_steps = config.train.exact_steps
        self._received = 0

    def resume(self, step: int) -> None:
        """Go on from the checkpoint of a step.

        Raises:
            ValueError: it is of another model, of other data, or of another seed.
        """
        assert self.checkpoints is not None
        state = self.checkpoints.state(step)
        for what, here in (("data", self.corpus.fingerprint()), ("seed", self.config.train.seed)):
            if state[what] != here:
                raise ValueError(f"the checkpoint of step {step} was made with {what} {state[what]}, and here it is "
                                 f"{here}: sequences would be lost or repeated. Take another --name, or --fresh")
        self.checkpoints.load(step, self.engine.tensors())
        self.engine.go_on(state["updates"])
        self.guard = LossGuard(self.config.train, **state["guard"])
        self.step, self.sequences, self.saved = step, state["sequences"], step
        warmed_up = state.get("exact_steps", self.exact_steps)
        if self.config.train.attention == "muse" and step > warmed_up:
            self.exact_steps = min(self.exact_steps, warmed_up)  # more steps do not bring the warm-up back
        self.checkpoints.discard_after(step)

    def run(self, until: int | None = None, stop: StopSignal | None = None) -> bool:
        """Train up to step `until`, or to the end. Returns False if `stop` came before; a checkpoint is saved then.

        Raises:
            FloatingPointError: a bad step, where `train.bad_step` says so.
            OSError: data that cannot be read; what was learned is saved first.
            RuntimeError: another rank had that error, or the last checkpoint cannot be written.
        """
        stop, last = stop or StopSignal(), self.config.train.steps if until is None else until
        dog = Watchdog(self.config.train.timeout, self.ranks.world_rank)
        every = self.config.log.checkpoint_every
        try:
            dog.feed("the first sequences")
            batch = self._read(last)
            _, asked, broken = self._agree(torch.zeros((), device=self.ranks.device), stop, batch)
            while self.step < last and not asked and not broken:
                assert isinstance(batch, Tensor)
                dog.feed(f"step {self.step + 1}")
                batch, asked, broken = self._step(batch, last, stop)
                if self.checkpoints is not None:
                    self._warn(self.checkpoints.poll())
                    if every and self.step % every == 0:
                        self.save()
            dog.feed("the last checkpoint")
            self.finish_checkpoint()
        finally:
            dog.stop()
        if broken:
            if isinstance(batch, OSError):
                raise batch
            raise RuntimeError(f"another rank could not read its sequences of step {self.step + 1}")
        return self.step >= last

    def save(self) -> None:
        """Start writing a checkpoint of the state after the last step."""
        if self.checkpoints is None or self.saved == self.step:
            return
        self.monitor.sync()
        state = {"step": self.step, "sequences": self.sequences, "updates": self.engine.updates,
                 "data": self.corpus.fingerprint(), "seed": self.config.train.seed, "guard": self.guard.state(),
                 "exact_steps": self.exact_steps, "ranks": self.ranks.world, "context_parallel": self.ranks.size}
        start = time.perf_counter()
        self._warn(self.checkpoints.save(self.step, self.engine.tensors(), state))
        self.watch.add("checkpoint", time.perf_counter() - start)
        self.saved = self.step

    def finish_checkpoint(self) -> None:
        """Save the state after the last step and wait until it is on the disk."""
        if self.checkpoints is None:
            return
        self.save()
        troubles = self.checkpoints.wait()
        if troubles:
            raise RuntimeError(troubles[0])

    def _step(self, batch: Tensor, last: int, stop: StopSignal) -> tuple[Tensor | OSError, bool, bool]:
        """One step. Returns the next batch, and whether any rank was asked to stop or could not read."""
        start = time.perf_counter()
        number = self.step + 1
        self.engine.read_with("exact" if number <= self.exact_steps else "muse")
        share = self.engine.gradients(batch, self.watch)
        with self.watch("data"):  # while a GPU works on this step
            following = self._read(last, 1)
        loss, asked, broken = self._agree(share, stop, following)
        norm = self.engine.clip().item()
        problem = self.guard.problem(loss, norm)
        rate = learning_rate(self.config.train, number)
        if problem is not None:
            self._bad_step(number, problem, batch)
        else:
            with self.watch("optimizer"):
                self.engine.update(rate)
        self.engine.forget()
        self.step, self.sequences = number, self.sequences + self.config.train.batch
        row = {"loss": loss, "lr": rate, "gradient_norm": norm, "skipped": int(problem is not None),
               **self._probed(batch)}
        self.monitor.step(number, {**row, **self._measured(time.perf_counter() - start)})
        return following, asked, broken

    def _agree(self, share: Tensor, stop: StopSignal, batch: Tensor | OSError) -> tuple[float, bool, bool]:
        """The loss of all ranks, whether any was asked to stop, and whether any could not read. One exchange."""
        flags = torch.tensor([stop.asked, isinstance(batch, OSError)], dtype=torch.float32, device=self.ranks.device)
        loss, asked, broken = self.ranks.sum(torch.cat([share.float()[None], flags])).tolist()
        return loss, asked > 0, broken > 0

    def _read(self, last: int, ahead: int = 0) -> Tensor | OSError:
        """This rank's sequences of the step after `ahead` more: int64 [B, context + 1]; or why it has none."""
        if self.step + ahead >= last:
            return torch.empty(0, dtype=torch.int64)
        settings = self.config.train
        mine = settings.batch // self.ranks.replicas
        first = self.sequences + ahead * settings.batch + self.ranks.replica * mine
        try:
            return self.corpus.sequences(first, mine, settings.seed)
        except OSError as error:
            return error

    def _measured(self, seconds: float) -> dict[str, Any]:
        """What a step cost."""
        config, device = self.config, self.ranks.device
        tokens = config.train.batch * config.data.context
        exact = self.step <= self.exact_steps
        received, self._received = self.counter.total() - self._received, self.counter.total()
        found = {"seconds": seconds, "tokens_per_second": tokens / seconds,
                 "first_sequence": self.sequences - config.train.batch,
                 "memory_bytes": used_memory(device), "received_bytes": received,
                 "attention": "exact" if exact else "muse", "stages": self.watch.read()}
        peak = peak_flops(device)
        if peak is not None:
            needed = step_flops(config.model, self.engine.model.config.vocab_size, tokens, config.data.context,
                                None if exact else config.muse)
            found["flop_utilisation"] = needed / (seconds * peak * self.ranks.world)
        return found

    def _probed(self, batch: Tensor) -> dict[str, Any]:
        """The attention probe, where it is due."""
        every = self.config.log.probe_every
        if not every or self.step % every:
            return {}
        layers = sampled_layers(self.config.model.layers, self.config.log.probe_layers)
        with self.watch("probe"):
            return {"probe": self._probe(batch, layers)}

    def _probe(self, batch: Tensor, layers: list[int]) -> dict[str, dict[str, float | None]]:
        """Statistics of the attention of some layers, whose bytes do not count to the step's."""
        received = dict(self.counter.received)
        found = probe_layers(self.engine, batch, self.config, self.ranks, layers)
        self.counter.received = received
        return found

    def _bad_step(self, step: int, problem: str, batch: Tensor) -> None:
        """Write down what is known of a bad step, if there is a place for it; stop if that is the policy."""
        text = f"step {step} is bad: {problem}"
        if self.folder is not None:
            text += f"; {self._write_bad_step(self.folder, step, problem, batch)}"
        if self.guard.gives_up:
            if self.checkpoints is not None:  # all ranks are here: one that is being written gets whole
                self._warn(self.checkpoints.wait())
            raise FloatingPointError(f"{text}. Try a smaller train.lr, or train.bad_step=skip")
        self.monitor.say(f"{text}. It is left out")

    def _write_bad_step(self, folder: Path, step: int, problem: str, batch: Tensor) -> str:
        """Where its sequences come from and what the attention did: all ranks look at it, one writes and says so."""
        settings, name = self.config.train, f"bad-step-{step:09}.json"
        statistics = self._probe(batch, list(range(self.config.model.layers)))
        if self.ranks.first:
            numbers = range(self.sequences, self.sequences + settings.batch)
            about = {"step": step, "problem": problem, "learning_rate": learning_rate(settings, step),
                     "sequences": [self.corpus.describe(n, settings.seed) for n in numbers], "attention": statistics}
            try:
                (folder / name).write_text(strict_json(about, indent=1) + "\n")
            except OSError as error:  # no reason to end a run that is to leave the step out
                return f"{name} cannot be written: {error.strerror}"
        return f"{name} has its sequences and the attention of each layer"

    def _warn(self, troubles: list[str]) -> None:
        for trouble in troubles:
            self.monitor.say(f"warning: {trouble}")


def used_memory(device: torch.device) -> int:
    """The most bytes this process has had: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""Starts ranks of the training command in a fraction of a second: a process that has imported it forks them.

`Launcher` is the tests' side. Each rank is a process of its own, with the environment torchrun would give it and its
output in a file, and can be killed like one.
"""
from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from launch.indexed import write_index

ROOT = Path(__file__).resolve().parents[1]
DAY = 86_400  # seconds
# A run of four steps that probes its layer.
PROBED_RUN = """
[model]
layers = 1
width = 32
heads = 2
kv_heads = 1
mlp = 64
[train]
steps = 4
warmup = 1
threads = 1
[data]
context = 256
held_out_sequences = 2
[log]
probe_every = 2
probe_layers = 1
[muse]
block = 32
leaf = 8
group = 16
anchors = 2
remote_leaf = 8
opened = 2
"""


def small_run(steps, data, timeout=100):
    """Settings of a run of so many steps on token files, a checkpoint every other step."""
    return f"""
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
mlp = 32
[train]
steps = {steps}
warmup = 2
batch = 2
threads = 1
timeout = {timeout}
[data]
path = "{data}"
context = 128
held_out_sequences = 1
[log]
checkpoint_every = 2
keep = 2
[muse]
block = 16
leaf = 8
group = 8
anchors = 1
remote_leaf = 8
opened = 1
"""


def write_pattern(folder):
    """Token files in `folder` that start in no time: a learnable pattern with noise."""
    rng, about = np.random.default_rng(0), {"vocabulary": 64, "digest": "pattern"}
    for name, tokens in (("train", 20_000), ("held_out", 1_000)):
        values = (np.arange(tokens) % 37 + rng.integers(0, 3, tokens)).astype(np.uint16)
        values.tofile(folder / f"{name}.bin")
        write_index(folder / f"{name}.idx", [tokens // 10] * 10, values.dtype)
        about[name] = {"tokens": tokens}
    (folder / "data.json").write_text(json.dumps(about))


class Launcher:
    """A context manager; leaving it kills what is left. Runs of another engine than PyTorch's start faster with it."""

    def __init__(self, engine="torch"):
        self._engine = engine

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self._server = subprocess.Popen([sys.executable, __file__, self._engine], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        return self

    def __exit__(self, *_):
        self._server.stdin.close()  # the server kills its children and ends
        self._server.wait(30)

    def start(self, arguments, ranks, folder, limit=None, environment=None, early=None):
        """`python -m launch.train ARGUMENTS` on so many ranks; no file may grow beyond `limit` bytes.

        With `early` = (file, lines) the clock of every rank goes back by a day once the file has so many lines, and
        runs backwards from then on.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        outputs, pids = [], []
        for rank in range(ranks):
            outputs.append(folder / f"output-{rank}.txt")
            pids.append(self._ask({
                "arguments": list(map(str, arguments)), "output": str(outputs[-1]), "limit": limit,
                "early": early and [str(early[0]), early[1]],
                "environment": {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}}))
        return Run(self, pids, outputs)

    def poll(self, pid):
        return self._ask({"poll": pid})

    def _ask(self, request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


class Run:
    """The ranks of one start."""

    def __init__(self, launcher, pids, outputs):
        self._launcher, self.pids, self.outputs = launcher, pids, outputs
        self.codes = [None] * len(pids)

    def poll(self):
        """Exit status of every rank, negative for a signal; None where it runs."""
        for i, pid in enumerate(self.pids):
            if self.codes[i] is None:
                self.codes[i] = self._launcher.poll(pid)
        return self.codes

    def kill(self, rank, number=signal.SIGKILL):
        if self.poll()[rank] is None:
            os.kill(self.pids[rank], number)

    def wait(self, seconds=120):
        """Wait for all ranks. Returns their exit statuses; AssertionError with their output if one is late."""
        deadline = time.monotonic() + seconds
        while None in self.poll():
            if time.monotonic() > deadline:
                for rank in range(len(self.pids)):
                    self.kill(rank)
                raise AssertionError(f"late: {self.codes}\n{self.output()}")
            time.sleep(0.02)
        return self.codes

    def output(self):
        return "\n".join(path.read_text() for path in self.outputs)


class Case:
    """One run's folder, and the ways to start it."""

    def __init__(self, launcher, data, folder, steps=12):
        self.launcher, self.folder, self.run_folder = launcher, folder, folder / "run"
        (folder / "run.toml").write_text(small_run(steps, data))

    def start(self, ranks=2, *more, **options):
        arguments = ["--config", self.folder / "run.toml", "--out", self.folder, "--device", "cpu", *more]
        return self.launcher.start(arguments, ranks, self.folder, **options)

    def finish(self, ranks=2, *more, **options):
        run = self.start(ranks, *more, **options)
        assert run.wait() == [0] * ranks, run.output()
        return run.output()

    def rows(self):
        path = self.run_folder / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # being written
                break
        return rows

    def checkpoints(self):
        return sorted((self.run_folder / "checkpoints").glob("step-*"))

    def weights(self):
        from safetensors import safe_open

        with safe_open(self.run_folder / "model" / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def wait_for_steps(self, run, steps):
        """Until so many more steps are logged, or the run ends."""
        start, deadline = len(self.rows()), time.monotonic() + 120
        while len(self.rows()) < start + steps and None in run.poll() and time.monotonic() < deadline:
            time.sleep(0.005)


def assert_same(case, other):
    """Every step once, with the same loss to the last bit, and the same weights at the end."""
    rows, wanted = case.rows(), other.rows()
    assert [row["step"] for row in rows] == list(range(1, len(wanted) + 1))
    assert [row["first_sequence"] for row in rows] == [2 * i for i in range(len(wanted))]
    assert [row["loss"] for row in rows] == [row["loss"] for row in wanted]
    weights, expected = case.weights(), other.weights()
    assert all(weights[name].equal(expected[name]) for name in expected)


def serve(engine):
    from launch import train  # what takes long, once
    from matplotlib.figure import Figure  # noqa: F401
    from torch.distributed import checkpoint  # noqa: F401

    main = train.main
    if engine == "deepspeed":
        import deepspeed  # noqa: F401
    elif engine == "megatron":
        from tests.test_train_megatron import megatron_on_cpu

        def main(arguments):
            with megatron_on_cpu():
                return train.main(arguments)

    children = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            children.discard(pid)
        else:
            answer = os.fork()
            if not answer:
                run(main, request)
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def turn_back_clock(file, lines):
    """Have this process's clock go back by a day once `file` has so many lines, and run backwards from then on."""
    path, right, turned = Path(file), time.time_ns, []

    def early():
        now = right()
        if not turned and path.exists() and path.read_bytes().count(b"\n") >= lines:
            turned.append(now)
        return 2 * turned[0] - now - DAY * 10 ** 9 if turned else now

    time.time, time.time_ns = lambda: early() / 1e9, early


def run(main, request):
    """A rank, in the forked process."""
    status = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, output), (2, output)):
            os.dup2(source, target)
        os.environ.update(request["environment"])
        if request["limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
        if request["early"] is not None:
            turn_back_clock(*request["early"])
        status = main(request["arguments"])
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])

"""The exchanges of comm.py alone: what arrives, what is counted, what is agreed, and what a failure says."""
import ast
import datetime
import gc
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from queue import SimpleQueue
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from muse_dist import ByteCounter
from muse_dist.comm import Communicator
from tests.ranks import outcomes, run_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]
PACKAGE = Path(__file__).parents[1] / "muse_dist"


def numbers(shape, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(shape, generator=random)).to(dtype)


def pieces(source, target):
    """What `source` sends `target`: tensors of odd sizes and all dtypes, none to itself, none from 2 to 1."""
    if source == target or (source, target) == (2, 1):
        return []
    shapes = [(source + 1, 3), (target + 1,), (2, 1, 1 + source), (0, 4), ()]
    return [numbers(shape, dtype, 100 * source + 10 * target + i)
            for i, (shape, dtype) in enumerate((s, d) for d in DTYPES for s in shapes)]


def several_of(rank):
    """Tensors to gather at once: rows of longer ones, whole and not, and one whose bytes are padded."""
    long = numbers((2, 8, 12), torch.float16, rank)
    return [long[:, 2:5], long[..., 1:4], numbers((7,), torch.float32, rank), numbers((4, 4), torch.float64, rank)]


def exchange_everything():
    """All-to-all and all-gather of tensors of every dtype, two at a time in flight; what arrived, what was counted."""
    counter, world = ByteCounter(), dist.group.WORLD
    comm = Communicator(world, counter)
    assert (comm.rank, comm.size) == (world.rank(), world.size())
    rank, others = comm.rank, range(comm.size)
    specs = [[(x.shape, x.dtype) for x in pieces(source, rank)] for source in others]
    first = comm.all_to_all("pieces", [pieces(rank, target) for target in others], specs, torch.device("cpu"))
    gathers = [comm.all_gather("gathered", numbers((3, 5), dtype, rank).t()) for dtype in DTYPES]
    several = comm.all_gather("several", *several_of(rank))
    arrived = [x.clone() for x in first.wait()]  # views of one buffer, which files do not take
    gathered = [gather.wait() for gather in gathers]
    return arrived, gathered, [x.clone() for x in several.wait()], counter.received, counter.total()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_is_sent_arrives(ranks):
    """Bitwise, in rank order, whatever the dtype and size; strided tensors too."""
    for rank, (arrived, gathered, several, received, total) in enumerate(run_ranks(ranks, exchange_everything)):
        want = [x for source in range(ranks) for x in pieces(source, rank)]
        assert [(x.dtype, x.shape) for x in arrived] == [(x.dtype, x.shape) for x in want]
        assert all(torch.equal(a, b) for a, b in zip(arrived, want))
        for dtype, parts in zip(DTYPES, gathered, strict=True):
            assert len(parts) == ranks
            assert all(torch.equal(part, numbers((3, 5), dtype, r).t()) for r, part in enumerate(parts))
        wanted = [x for r in range(ranks) for x in several_of(r)]
        assert len(several) == len(wanted) and all(torch.equal(a, b) for a, b in zip(several, wanted))
        size = sum(-(-x.numel() * x.element_size() // 16) * 16 for x in want)  # in steps of 16 bytes
        at_once = (ranks - 1) * sum(-(-x.nbytes // 16) * 16 for x in several_of(0))
        gathers = (ranks - 1) * sum(-(-15 * dtype.itemsize // 16) * 16 for dtype in DTYPES)
        assert received == {"pieces": size, "gathered": gathers, "several": at_once}
        assert total == size + gathers + at_once


def send_nothing():
    comm = Communicator(dist.group.WORLD)
    nothing = [[] for _ in range(comm.size)]
    return comm.all_to_all("nothing", nothing, nothing, torch.device("cpu")).wait()


def test_an_empty_exchange():
    assert run_ranks(3, send_nothing) == [[], [], []]


def send_a_temporary():
    """Senders may drop or overwrite their tensors once an exchange is posted."""
    comm, found = Communicator(dist.group.WORLD), []
    for size in (1, 7, 65536):
        x = torch.full((size,), float(comm.rank))
        spec = [(x.shape, x.dtype)]
        waiting = [comm.all_gather("a", x), comm.all_to_all(
            "b", [[x] if r != comm.rank else [] for r in range(comm.size)],
            [spec if r != comm.rank else [] for r in range(comm.size)], x.device)]
        x.fill_(-1.0)
        del x
        junk = [torch.full((size,), -2.0) for _ in range(10)]
        del junk
        found.append([[part.unique().tolist() for part in w.wait()] for w in waiting])
    return found


def test_buffers_outlive_their_senders():
    for rank, found in enumerate(run_ranks(3, send_a_temporary)):
        others = [[float(r)] for r in range(3) if r != rank]
        assert found == [[[[0.0], [1.0], [2.0]], others]] * 3


def agreements():
    """Every rank's answers to calls of `agree`, and how many collectives these took."""
    comm, answers, calls = Communicator(dist.group.WORLD), [], []
    gather = dist.all_gather_object

    def counted(*args, **kwargs):
        calls.append(1)
        return gather(*args, **kwargs)

    dist.all_gather_object = counted
    for key, problem in [("a", None), ("a", None), (f"b{comm.rank % 2}", None),
                         ("c", "q: too short" if comm.rank == 1 else None), ("a", None), ("c", None)]:
        try:
            comm.agree(key, problem)
            answers.append(None)
        except ValueError as error:
            answers.append(str(error))
    later = Communicator(dist.group.WORLD)  # another call on the same group
    later.agree("a", None)
    return answers, len(calls)


def test_ranks_agree_once_a_key():
    for answers, calls in run_ranks(3, agreements):
        same, again, different, trouble, known, after = answers
        assert same is again is known is after is None
        assert all(word in different for word in ("rank 0: b0", "rank 1: b1", "rank 2: b0", "same"))
        assert "rank 1: q: too short" in trouble and "rank 0" not in trouble
        assert calls == 4


def forget_a_group():
    group = dist.new_group()
    Communicator(group).agree("a", None)
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return gone() is None


def test_agreements_do_not_keep_a_group_alive():
    assert run_ranks(2, forget_a_group) == [True, True]


def lose_a_rank(how):
    """Rank 1 leaves before the third exchange; what the others are told, and after how many seconds."""
    comm = Communicator(dist.new_group(timeout=datetime.timedelta(seconds=5)))
    x = torch.ones(1000)
    comm.all_gather("first", x).wait()
    if comm.rank == 1:
        os._exit(1) if how == "dies" else time.sleep(120)
    start = time.monotonic()
    try:
        comm.all_gather("second", x).wait()
    except RuntimeError as error:
        return str(error), error.__cause__ is not None, time.monotonic() - start
    return "", False, 0.0


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_failure_names_the_exchange(how):
    found = outcomes(3, lose_a_rank, how, limit=40, lost=1)
    for rank in (0, 2):
        message, chained, seconds = found[rank].value
        assert message.startswith("exchange 'second'") and f"rank {rank} of 3" in message and "another rank" in message
        assert chained and seconds < 20


class NcclWork:
    """What NCCL returns for an exchange: `wait` makes the GPU wait, not the host, and raises nothing."""

    def __init__(self, result):
        self.result = result

    def wait(self):
        return True

    def get_future_result(self):
        return self.result


def fail_without_an_exception():
    """Exchanges of a group that seems to be NCCL's: one is done, one fails, one is captured, one fails later.

    What is logged before and after the failures, and whether the thread and the group end.
    """
    results = [torch.futures.Future() for _ in range(4)]
    works, logged = map(NcclWork, results), SimpleQueue()
    handler = logging.Handler()
    handler.emit = lambda record: logged.put(record.getMessage())
    logging.getLogger("muse_dist").addHandler(handler)
    group = dist.new_group()
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with mock.patch.object(dist, "get_backend_config", lambda group: "cpu:nccl"), \
            mock.patch.object(dist, gather, lambda *args, **options: next(works)), \
            mock.patch.object(torch.cuda, "is_current_stream_capturing", side_effect=[False, False, True, False]):
        for name in ("done", "failed", "captured", "late"):
            Communicator(group).all_gather(name, torch.ones(3)).wait()
    watching = [thread for thread in threading.enumerate() if thread.name == "muse_dist exchanges"]
    results[0].set_result(0)
    time.sleep(0.1)
    early = logged.empty()
    results[1].set_result(1)
    said = [logged.get(timeout=20)]
    results[3].set_result(2)
    said.append(logged.get(timeout=20))
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    for thread in watching:
        thread.join(timeout=20)
    return early, said, logged.empty(), len(watching), gone() is None, [thread.is_alive() for thread in watching]


def test_a_failure_on_nccl_is_logged_with_the_exchange():
    for rank, found in enumerate(run_ranks(2, fail_without_an_exception)):
        early, said, quiet, threads, gone, alive = found
        assert early and quiet and threads == 1 and gone and alive == [False]
        for name, text in zip(("failed", "late"), said, strict=True):
            assert text.startswith(f"exchange '{name}' was pending on rank {rank} of 2 and failed"), text
            assert "another rank died, hung or left: see the message of PyTorch's NCCL watchdog" in text


def hang_on_nccl(folder):
    """Rank 1 leaves rank 0 alone with an exchange. PyTorch then ends rank 0, which waits for its GPU."""
    rank = dist.get_rank()
    logging.getLogger("muse_dist").addHandler(logging.FileHandler(Path(folder, f"{rank}.log")))
    torch.cuda.set_device(rank)
    comm = Communicator(dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=5)))
    x = torch.ones(1000, device="cuda")
    comm.all_gather("first", x).wait()
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(120)
    start = time.monotonic()
    comm.all_gather("second", x).wait()
    Path(folder, "posted").write_text(str(time.monotonic() - start))
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_failure_on_gpus_is_logged_with_the_exchange(tmp_path):
    found = outcomes(2, hang_on_nccl, str(tmp_path), limit=60, lost=1)
    assert float(Path(tmp_path, "posted").read_text()) < 1  # the host does not wait
    assert found[0].died, found[0].trace
    assert "exchange 'second' was pending on rank 0 of 2 and failed" in Path(tmp_path, "0.log").read_text()


def threads_after_an_exchange():
    Communicator(dist.group.WORLD).all_gather("a", torch.ones(3)).wait()
    return [thread.name for thread in threading.enumerate() if "muse_dist" in thread.name]


def test_gloo_needs_no_thread():
    assert run_ranks(2, threads_after_an_exchange) == [[], []]


def test_counter_adds_up():
    counter = ByteCounter()
    assert counter.total() == 0
    for name, count in (("a", 3), ("b", 4), ("a", 5)):
        counter.add(name, count)
    assert counter.received == {"a": 8, "b": 4} and counter.total() == 12


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_no_other_module_of_the_package_imports_torch_distributed():
    users = {path.name for path in PACKAGE.rglob("*.py")
             if any(name.startswith("torch.distributed") for name in imports_of(path))}
    assert users == {"comm.py", "deepspeed_ranks.py"}  # DeepSpeed asks for process groups
    users = {path.name for path in PACKAGE.rglob("*.py") if "os.environ" in path.read_text()}
    assert users == {"deepspeed_ranks.py"}  # where launchers put the ranks

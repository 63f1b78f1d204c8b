"""The parts the benchmarks are made of: exact rows, windows, times, inputs of a trained model, traces."""
import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tests.ranks import run_ranks
from torch import Tensor

from launch.bench_exact import Rows, Window, choose_rows, cosines, exact_rows, only_rows, squared_errors
from launch.bench_inputs import Shape, TrainedHeads, make_inputs
from launch.bench_rivals import Unavailable, window_mask
from launch.bench_timing import Replays, _on_all, measure, spread, timed
from launch.bench_traces import overlap, read, record, stages
from launch.options import changed, setting
from launch.ranks import Ranks
from muse_dist import MuseConfig, muse_attention

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, "contiguous")


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(q, k, v, causal, window=None):
    """Softmax attention with a mask made token by token."""
    tokens = q.shape[2]
    seen = torch.tensor([[(not causal or j <= i) and
                          (window is None or abs(i // window.block - j // window.block) <= window.halo)
                          for j in range(tokens)] for i in range(tokens)])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------ exact rows


@pytest.mark.parametrize("window", [None, Window(8, 1), Window(4, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [9, 100])
def test_exact_rows_are_autograds(causal, window, count):
    q, dout = normal(2, 4, 37, 8, seed=1), normal(2, 4, 37, 8, seed=2)
    k, v = normal(2, 2, 37, 8, seed=3), normal(2, 2, 37, 8, seed=4)
    rows = choose_rows(37, count, CPU)
    assert len(rows) == min(count, 37) == len(rows.unique())
    found = exact_rows(q, k, v, dout, rows, causal, window)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dense(*leaves, causal, window)
    dq, dk, dv = torch.autograd.grad((out * dout).index_select(2, rows).sum(), leaves)
    wanted = Rows(out.detach()[:, :, rows], dq[:, :, rows], dk, dv)
    assert max(squared_errors(found, wanted).values()) < 1e-24
    assert min(cosines(found, wanted).values()) > 1 - 1e-12


def test_a_gradient_of_the_rows_alone_is_what_exact_rows_take():
    dout, rows = normal(1, 2, 20, 4, seed=1), torch.tensor([3, 17])
    sparse = only_rows(dout, rows)
    assert torch.equal(sparse[:, :, rows], dout[:, :, rows])
    assert sparse.count_nonzero() == dout[:, :, rows].numel()


def test_errors_and_cosines_say_how_far_and_in_which_direction():
    wanted = Rows(*(normal(1, 1, 5, 4, seed=s) for s in range(4)))
    found = Rows(*(1.1 * x for x in wanted))
    assert squared_errors(found, wanted) == pytest.approx(dict.fromkeys(Rows._fields, 0.01))
    assert cosines(found, wanted) == pytest.approx(dict.fromkeys(Rows._fields, 1.0))
    broken = found._replace(dk=torch.full_like(found.dk, torch.nan))
    assert math.isnan(squared_errors(broken, wanted)["dk"])


# --------------------------------------------------------------------------------------------------------- windows


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_in_the_window_is_the_near_field(causal):
    from torch.nn.attention.flex_attention import flex_attention

    window = Window(256, 1)
    mask = window_mask(window, 1024, causal, CPU)
    q, k, v = (normal(1, heads, 1024, 8, seed=heads).float() for heads in (4, 2, 2))
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)  # uncompiled it reads the mask of single tokens
    wanted = exact_rows(q, k, v, torch.zeros_like(q), torch.arange(1024), causal, window).out
    assert (out - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("causal", [True, False])
def test_the_windows_tiles_are_those_with_a_token_in_sight(causal):
    token = torch.arange(1024)
    seen = (token[:, None] // 256 - token // 256).abs() <= 1
    if causal:
        seen &= token[:, None] >= token
    tiles = seen.reshape(8, 128, 8, 128)
    mask = window_mask(Window(256, 1), 1024, causal, CPU)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(3).any(1))
    whole = torch.zeros(8, 8, dtype=torch.bool)  # compiled kernels ask the mask of single tokens in no other tile
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0]):
        whole[row, mask.full_kv_indices[0, 0, row, :count]] = True
    assert torch.equal(whole, tiles.all(3).all(1))


@pytest.mark.parametrize(("block", "tokens"), [(96, 1024), (256, 1000)])
def test_windows_that_are_no_whole_tiles_are_refused(block, tokens):
    with pytest.raises(Unavailable, match="multiple of 128"):
        window_mask(Window(block, 1), tokens, True, CPU)


# ----------------------------------------------------------------------------------------------------------- times


def test_spread_is_the_median_and_the_outer_tenths():
    assert spread([float(x) for x in range(11)]) == (5.0, 1.0, 9.0, 11)


@pytest.mark.parametrize(("factor", "fails"), [(1.001, False), (1.1, True), (math.nan, True)])
def test_graphs_must_replay_what_was_checked(factor, fails):
    right = [normal(3, 4, seed=i) for i in range(4)]
    replays = Replays(None, None, [*right[:2], factor * right[2], right[3]])
    with pytest.raises(RuntimeError, match="graph's dk differs") if fails else nullcontext():
        replays.compare(right)


def fails_on_the_second_rank():
    import torch.distributed as dist

    group = dist.group.WORLD
    ranks = Ranks(dist.get_rank(), 2, CPU, "zigzag", group, group, group)
    assert _on_all(ranks, dist.get_rank) == dist.get_rank()
    try:
        _on_all(ranks, lambda: 1 // (1 - dist.get_rank()))
    except ValueError as error:
        return str(error)


def test_what_one_rank_cannot_capture_no_rank_replays():
    assert run_ranks(2, fails_on_the_second_rank) == ["ZeroDivisionError: integer division or modulo by zero"] * 2


def test_timed_gives_the_seconds_between_marks():
    marks = iter([[1.0, 3.0, 7.0], [2.0, 2.5, 3.5]])
    assert timed(lambda: next(marks), ALONE, 2) == [[2.0, 4.0], [0.5, 1.0]]


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0, (3,)), (0.2, range(3, 101))])
def test_measure_repeats_for_a_time_and_three_times_at_least(seconds, wanted):
    calls = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return F.scaled_dot_product_attention(q, k, v)

    leaves = [normal(1, 1, 32, 8, seed=s).requires_grad_() for s in range(3)]
    times, peak = measure(attention, leaves, normal(1, 1, 32, 8, seed=3), ALONE, seconds)
    assert peak is None and times.forward.repeats == times.backward.repeats == len(calls) - 1
    assert times.both.repeats in wanted and all(calls)
    assert 0 < times.forward.low <= times.forward.median <= times.forward.high
    assert times.both.median >= max(times.forward.median, times.backward.median)
    assert [leaf.grad for leaf in leaves] == [None] * 3


# ---------------------------------------------------------------------------------------------------------- inputs


MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def model(**config):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **config)).eval()

def tokens(n, at=0):
    return (torch.arange(at, at + n)[None] * 31 + 7) % 89
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "load.py").write_text(MODEL)
    return TrainedHeads(folder, CPU, torch.float32)


def layer_outputs(heads: TrainedHeads, ids: Tensor) -> list[Tensor]:
    """What every layer's attention block returns inside the model with exact attention."""
    found: list[Tensor] = []
    hooks = [layer.self_attn.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
             for layer in heads.model.model.layers]
    heads.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        heads.model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_captured_heads_are_those_of_the_layers(trained):
    shape = Shape(8, 4, 50, 8)
    made = make_inputs(shape, trained, CPU, torch.float32)
    assert made.source == "trained (layers 0,2)" and made.q.shape == (1, 8, 50, 8) and made.v.shape == (1, 4, 50, 8)
    wanted = layer_outputs(trained, trained.tokens(50, 0))
    for place, layer in enumerate((0, 2)):
        q, k, v = (x[:, count * place:count * (place + 1)] for x, count in ((made.q, 4), (made.k, 2), (made.v, 2)))
        out = dense(q, k, v, causal=True).transpose(1, 2).flatten(2)
        with torch.no_grad():
            out = trained.model.model.layers[layer].self_attn.o_proj(out)
        assert (out - wanted[layer]).norm() < 1e-5 * wanted[layer].norm()


def test_sequences_longer_than_the_context_are_windows_side_by_side(trained):
    long = make_inputs(Shape(4, 2, 150, 8), trained, CPU, torch.float32)
    first = make_inputs(Shape(4, 2, 64, 8), trained, CPU, torch.float32)
    assert long.source == "trained (layers 1; 3 windows)" and long.k.shape == (1, 2, 150, 8)
    assert torch.equal(long.q[:, :, :64], first.q) and torch.equal(long.v[:, :, :64], first.v)
    assert not torch.equal(long.q[:, :, 64:128], first.q)


@pytest.mark.parametrize("shape", [Shape(4, 2, 40, 16), Shape(4, 4, 40, 8)])
def test_other_shapes_get_noise_and_say_so(trained, shape):
    made = make_inputs(shape, trained, CPU, torch.float32)
    again = make_inputs(shape, None, CPU, torch.float32)
    assert made.source == "gaussian" and made.k.shape == (1, shape.kv_heads, 40, shape.dim)
    assert torch.equal(made.q, again.q) and torch.equal(made.dout, again.dout)
    assert abs(made.q.std() - 1) < 0.1 and not torch.equal(made.k[:, :2], made.v[:, :2])


def test_settings_are_read_as_values_of_their_kind():
    assert [setting(text) for text in ("opened=8", "trace=false", "exchange=kv")] == [
        ("opened", 8), ("trace", False), ("exchange", "kv")]
    assert changed("fast", ["opened=3"]) == MuseConfig.fast(opened=3)
    with pytest.raises(ValueError, match="NAME=VALUE"):
        setting("opened")


# ---------------------------------------------------------------------------------------------------------- traces


def event(name, kind, start, duration, thread=1, correlation=None):
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": duration, "tid": thread, "args": arguments}


@pytest.fixture
def trace(tmp_path):
    """Two threads that launch kernels in nested ranges; NCCL overlaps compute for 4 of its 10 + 5 microseconds."""
    events = [
        event("bench::forward", "user_annotation", 0, 100), event("bench::backward", "user_annotation", 100, 100),
        event("muse_dist::attend", "cpu_op", 0, 50), event("muse_dist::near", "user_annotation", 10, 10),
        event("muse_dist::attend_backward", "cpu_op", 0, 200, thread=2),
        event("cudaLaunchKernel", "cuda_runtime", 12, 1, correlation=1),
        event("cuLaunchKernelEx", "cuda_driver", 30, 1, correlation=2),
        event("cudaLaunchKernel", "cuda_runtime", 120, 1, thread=2, correlation=3),
        event("cudaLaunchKernel", "cuda_runtime", 60, 1, correlation=4),
        event("cudaLaunchKernel", "cuda_runtime", 125, 1, thread=2, correlation=5),
        event("near_kernel", "kernel", 20, 10, thread="gpu", correlation=1),
        event("far_kernel", "kernel", 40, 6, thread="gpu", correlation=2),
        event("grad_kernel", "kernel", 130, 20, thread="gpu", correlation=3),
        event("ncclDevKernel_SendRecv", "kernel", 26, 10, thread="nccl", correlation=4),
        event("ncclDevKernel_AllGather", "kernel", 160, 5, thread="nccl", correlation=5),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return read(path)


def test_kernels_count_to_the_innermost_range_around_their_launch(trace):
    found = {stage.name: stage for stage in stages(trace)}
    assert {name: round(1e6 * stage.seconds) for name, stage in found.items()} == {
        "attend_backward": 25, "near": 10, "elsewhere": 10, "attend": 6}
    assert found["attend_backward"].kernels == [("grad_kernel", 20e-6), ("ncclDevKernel_AllGather", 5e-6)]


def test_overlap_is_the_time_in_which_both_run(trace):
    assert overlap(trace, "bench::forward") == pytest.approx((10e-6, 4e-6))
    assert overlap(trace, "bench::backward") == pytest.approx((5e-6, 0.0))


def test_stages_of_a_real_run_on_the_cpu(tmp_path):
    config = MuseConfig(block=32, leaf=8, group=8, remote_leaf=8, anchors=2, opened=2)
    q, k, v = (normal(1, 2, 160, 16, seed=s).float().requires_grad_() for s in range(3))
    path = tmp_path / "kept.json"
    events = record(lambda: muse_attention(q, k, v, config=config).sum().backward(), CPU, path)
    found = stages(events)
    assert path.exists() and {"plan", "attend", "attend_backward"} <= {stage.name for stage in found}
    assert all(stage.seconds > 0 and stage.kernels == [] for stage in found)
    whole = max(e.end for e in events) - min(e.start for e in events)
    assert sum(stage.seconds for stage in found) * 1e6 <= whole

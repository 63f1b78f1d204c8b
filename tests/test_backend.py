"""The two backends: which runs when, that they are twins, and that the GPU kernels together give the attention.

On a GPU the kernels run there, else through Triton's interpreter at small sizes.
"""
import dataclasses
import functools
import inspect
import logging

import pytest
import torch
import torch.nn.functional as F

from muse_dist import MuseConfig, muse_attention
from muse_dist.attention import attend
from muse_dist.backend import backend_for, triton_problem
from muse_dist.kernels import plain_blocks, triton_blocks
from muse_dist.tree import make_plan

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FUNCTIONS = [name for name in triton_blocks.__all__ if inspect.isfunction(getattr(triton_blocks, name))]
CONFIGS = {
    "causal": MuseConfig(block=64, halo=1, leaf=16, group=16, anchors=2, opened=3, remote_leaf=16),
    "acausal": MuseConfig(block=64, halo=0, leaf=16, group=32, anchors=1, opened=2, sinks=2, causal=False,
                          remote_leaf=16),
    "nothing opened": MuseConfig(block=64, halo=2, leaf=8, group=16, anchors=4, opened=0, sinks=0, trace=False,
                                 remote_leaf=16),
}

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # numpy's log2(0)


def inputs(dtype, tokens=304, heads=2, kv_heads=1, dim=16, batch=1):
    """q, k, v and the gradient of the output; keys in a few clusters, as real ones are."""
    generator = torch.Generator().manual_seed(heads * dim + tokens)
    q, k, v, dout = (torch.randn(batch, h, tokens, dim, generator=generator)
                     for h in (heads, kv_heads, kv_heads, heads))
    centres = torch.randn(6, dim, generator=generator)
    k = k + 2 * centres[torch.randint(6, (batch, kv_heads, tokens), generator=generator)]
    return [x.to(device=DEVICE, dtype=dtype) for x in (q + 0.3, k, v, dout)]


def step(function, tensors, dtype):
    """Output and gradients of a function of q, k, v in some dtype."""
    *leaves, dout = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def rms_error(got, want):
    assert got.shape == want.shape and not got.isnan().any()
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def exact_errors(tensors, dtype):
    """Errors of exact attention in some dtype against fp64: of the output and the gradients."""
    def exact(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return [rms_error(a, b) for a, b in zip(step(exact, tensors, dtype), step(exact, tensors, torch.float64))]


def plan_of(tensors, config):
    q, k = (x.double() for x in tensors[:2])
    return make_plan(q.unflatten(1, (k.shape[1], -1)), k, config, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_twins_have_equal_signatures(name):
    """A kernel may take more, by keyword only and for experts: launch shapes."""
    kernel, twin = (inspect.signature(getattr(module, name)) for module in (triton_blocks, plain_blocks))
    taken = [p for p in kernel.parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert taken == list(twin.parameters.values()) and kernel.return_annotation == twin.return_annotation
    extra = [p for p in kernel.parameters.values() if p.kind == p.KEYWORD_ONLY]
    assert all(p.default is None for p in extra)


def test_backends_have_the_same_functions():
    assert set(triton_blocks.__all__) == set(plain_blocks.__all__)
    assert len(FUNCTIONS) == 20


# Head dim, key/value heads of two, tokens.
SIZES = [(16, 1, 304)] + [(dim, kv_heads, 301) for dim in (32, 64, 96, 128, 256) for kv_heads in (1, 2) if GPU]


@pytest.mark.parametrize("dim, kv_heads, tokens", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *[torch.bfloat16] * GPU], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_give_the_attention_of_the_plain_twins(name, dtype, dim, kv_heads, tokens):
    """Of the same structure; at most twice the error of exact attention in that dtype."""
    tensors = inputs(dtype, tokens, 2, kv_heads, dim)
    config = dataclasses.replace(CONFIGS[name], backend="triton")
    wide = dataclasses.replace(config, backend="torch")
    plan = plan_of(tensors, wide)
    assert (plan.opened >= 0).any() or not config.opened + config.sinks
    narrow = plan._replace(anchors=plan.anchors.to(dtype))
    scale = tensors[0].shape[-1] ** -0.5
    got = step(lambda q, k, v: attend(q, k, v, narrow, config, scale), tensors, dtype)
    want = step(lambda q, k, v: attend(q, k, v, narrow._replace(anchors=narrow.anchors.double()), wide, scale), tensors,
                torch.float64)
    limits = [1e-5] * 4 if dtype == torch.float32 else [2 * e for e in exact_errors(tensors, dtype)]
    for part, a, b, limit in zip(("out", "dq", "dk", "dv"), got, want, limits, strict=True):
        assert rms_error(a, b) <= limit, part


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_attention_is_as_close_to_exact_as_the_plain_one(name):
    """Each backend finds its own structure; clusters may differ by ties, the quality may not."""
    tensors = inputs(torch.float32, heads=2, kv_heads=2)
    causal = CONFIGS[name].causal
    exact = F.scaled_dot_product_attention(*(x.double() for x in tensors[:3]), is_causal=causal)
    errors = {}
    for backend in ("torch", "triton"):
        config = dataclasses.replace(CONFIGS[name], backend=backend)
        out, *_ = step(functools.partial(muse_attention, config=config), tensors, torch.float32)
        errors[backend] = rms_error(out, exact)
    assert errors["triton"] <= 1.1 * errors["torch"] + 1e-6, errors


@pytest.mark.parametrize("change", [{"opened": 100}, {"leaf": 1, "group": 1, "remote_leaf": 1}, {"block": 512}],
                         ids=["all leaves opened", "leaves of one key", "one block"])
def test_what_leaves_nothing_out_is_exact(change):
    tensors = inputs(torch.float32, tokens=176, heads=2, kv_heads=2)
    config = dataclasses.replace(CONFIGS["causal"], backend="triton", trace=False, **change)
    got = step(lambda q, k, v: muse_attention(q, k, v, config=config), tensors, torch.float32)
    want = step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tensors, torch.float64)
    assert max(rms_error(a, b) for a, b in zip(got, want)) <= 1e-5


def test_bitwise_repeatable():
    tensors = inputs(torch.float16)
    config = dataclasses.replace(CONFIGS["causal"], backend="triton")
    first, again = (step(lambda q, k, v: muse_attention(q, k, v, config=config), tensors, torch.float16)
                    for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_auto_takes_kernels_on_gpus_and_says_so(caplog):
    q = inputs(torch.float32)[0]
    assert backend_for(MuseConfig(), q) == ("triton" if GPU else "torch")
    assert backend_for(MuseConfig(), q.double()) == "torch"
    assert backend_for(MuseConfig(backend="torch"), q) == "torch"
    assert backend_for(MuseConfig(backend="triton"), q) == "triton"


@pytest.mark.parametrize("change, dtype, dim, message", [
    ({}, torch.float64, 16, "float64; cast"),
    ({}, torch.float32, 320, "head dims up to 256, not 320"),
    ({"leaf": 512, "block": 2048}, torch.float32, 64, "leaf=512 with head dim 64 in torch.float32"),
])
def test_what_the_kernels_cannot_run_is_refused_before_anything_runs(change, dtype, dim, message):
    config = MuseConfig(**{"backend": "triton", "group": 16, **change})
    x = torch.zeros(1, 1, 64, dim, dtype=dtype, device=DEVICE)
    assert message in triton_problem(config, x)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        muse_attention(x, x, x, config=config)


@pytest.mark.parametrize("capability, dim, dtype, most", [
    ((9, 0), 128, torch.bfloat16, 256), ((8, 0), 128, torch.bfloat16, 128), ((8, 6), 128, torch.bfloat16, 64),
    ((8, 9), 64, torch.float32, 64), ((12, 0), 256, torch.bfloat16, 0), ((8, 6), 128, torch.float32, 0)], ids=str)
def test_leaves_fit_on_the_chip(capability, dim, dtype, most, monkeypatch):
    from muse_dist.kernels.limits import largest_leaf

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert largest_leaf.__wrapped__(dim, dtype, torch.device("cuda")) == most


def test_the_choice_is_logged(caplog):
    from muse_dist import backend

    backend._say_backend.cache_clear()
    x = torch.zeros(1, 1, 64, 16, device=DEVICE)
    with caplog.at_level(logging.INFO, "muse_dist"):
        for _ in range(2):
            muse_attention(x, x, x, config=CONFIGS["causal"])
    name = "triton" if GPU else "torch"
    assert caplog.messages == [f"backend 'auto' takes '{name}' on {DEVICE.type}"]


def test_plain_pytorch_on_a_gpu_is_warned_of_once_with_the_reason(caplog, monkeypatch):
    from types import SimpleNamespace

    from muse_dist import backend

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend._say_backend.cache_clear()
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 63), dtype=torch.bfloat16, shape=(1, 2, 64, 320))
    with caplog.at_level(logging.INFO, "muse_dist"):
        assert {backend.kernels_for(MuseConfig(), q) for _ in range(3)} == {plain_blocks}
        assert backend.kernels_for(MuseConfig(backend="torch"), q) is plain_blocks
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "head dims up to 256, not 320" in record.getMessage()


@pytest.mark.parametrize("autocast", [True, False])
def test_what_fits_on_the_chip_is_asked_of_the_dtype_under_autocast(autocast):
    config = MuseConfig(backend="triton", leaf=512, block=2048, remote_leaf=16, group=16)
    x = torch.zeros(1, 1, 64, 64, device=DEVICE)
    assert "does not fit" in triton_problem(config, x) and triton_problem(config, x, torch.bfloat16) is None
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        if autocast:
            assert muse_attention(x, x, x, config=config).dtype == torch.bfloat16
        else:
            with pytest.raises(ValueError, match="does not fit"):
                muse_attention(x, x, x, config=config)


on_a_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@on_a_gpu
def test_nothing_waits_for_the_gpu():
    """Forward and backward of a whole layer, once its kernels are compiled."""
    tensors = inputs(torch.bfloat16, tokens=1024, heads=4, kv_heads=2, dim=64)
    attention = functools.partial(muse_attention, config=MuseConfig(block=128, leaf=32, group=32, opened=2))
    step(attention, tensors, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(attention, tensors, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_memory_does_not_grow_over_steps():
    tensors = inputs(torch.bfloat16, tokens=4096, heads=4, kv_heads=4, dim=64)
    attention = functools.partial(muse_attention, config=MuseConfig(block=512, opened=4))
    held = []
    for _ in range(4):
        step(attention, tensors, torch.bfloat16)
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
    assert len(set(held[1:])) == 1, held


@on_a_gpu
def test_more_than_two_to_the_31_elements():
    """The last head of 64 of 256k tokens and 128 dims is what it is alone: offsets are of 64 bits."""
    if torch.cuda.mem_get_info()[1] < 100 * 2 ** 30:
        pytest.skip("needs a GPU of 100 GiB")
    generator = torch.Generator(DEVICE).manual_seed(0)
    tensors = [torch.randn(1, 64, 2 ** 18, 128, generator=generator, dtype=torch.bfloat16, device=DEVICE)
               for _ in range(4)]
    attention = functools.partial(muse_attention, config=MuseConfig.fast(backend="triton"))
    got = [x[:, -1:].clone() for x in step(attention, tensors, torch.bfloat16)]
    alone = step(attention, [x[:, -1:].clone() for x in tensors], torch.bfloat16)
    for x, y in zip(got, alone, strict=True):  # one head is taken in other slabs, sums of which are rounded elsewhere
        assert rms_error(x, y.double()) < torch.finfo(torch.bfloat16).eps / 2

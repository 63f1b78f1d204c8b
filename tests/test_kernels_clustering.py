"""Clustering kernels against their plain twins: on the GPU where there is one, else through Triton's interpreter."""
import inspect
import itertools
import math

import pytest
import torch

from muse_dist.kernels import clustering, triton_bisection, triton_clustering
from muse_dist.kernels.triton_bisection import BisectTile
from muse_dist.kernels.triton_clustering import RowTile

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter's tl.dot is wrong in bf16
KERNELS = {
    "principal_axes": triton_clustering, "project": triton_clustering, "bisect": triton_bisection,
}


def normal(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device=DEVICE, dtype=dtype)


def assert_near(got, want, tolerance):
    """A relative RMS error of at most `tolerance`."""
    assert got.shape == want.shape and got.dtype == torch.float32 and got.isfinite().all()
    size = want.double().square().mean().sqrt().item()
    error = (got.double() - want).square().mean().sqrt().item()
    assert error <= tolerance * size, f"relative error {error / size} above {tolerance}"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_what_its_twin_takes(name):
    kernel = inspect.signature(getattr(KERNELS[name], name))
    twin = inspect.signature(getattr(clustering, name))
    shared = [x for x in kernel.parameters.values() if x.kind != x.KEYWORD_ONLY]
    extra = [x for x in kernel.parameters.values() if x.kind == x.KEYWORD_ONLY]
    assert shared == list(twin.parameters.values()) and kernel.return_annotation == twin.return_annotation
    assert all(x.name == "tile" and x.default is None for x in extra)


# Principal axes

def stretched(*shape, dtype, seed=0):
    """Points far from the origin whose extent falls from coordinate to coordinate: every axis is well determined."""
    extent = 0.9 ** torch.arange(shape[-1], device=DEVICE)
    return (normal(*shape, seed=seed) * extent + 3 * normal(shape[-1], seed=seed + 1)).to(dtype)


def wide(*tensors):
    return [x.double() for x in tensors]


AXES_CASES = [(torch.float32, 24, 70, 8), (torch.float16, 24, 70, 8), (torch.float32, 200, 40, 3)]
if GPU:
    AXES_CASES += [(dtype, dim, 1000, 8) for dtype in DTYPES for dim in (16, 32, 64, 96, 128, 256)]


@pytest.mark.parametrize("dtype, dim, points, count", AXES_CASES, ids=str)
def test_principal_axes(dtype, dim, points, count):
    x = stretched(1, 2, points, dim, dtype=dtype)
    valid = torch.ones(2, points, dtype=torch.bool, device=DEVICE)
    valid[1, points // 2:] = False
    x[0, 0, 3, 1] = math.inf
    x[0, 1, 5] = math.nan
    want = clustering.principal_axes(x.double(), valid, count)
    x[0, 1, points // 2:] = math.nan  # what does not count cannot matter
    axes, spread = triton_clustering.principal_axes(x, valid, count)
    tolerance = torch.finfo(dtype).eps * (100 if dtype == torch.float32 else 4)  # half precision rounds the points
    assert_near(axes, want[0], tolerance)
    assert_near(spread, want[1], tolerance)
    for got, same in zip((axes, spread), triton_clustering.principal_axes(x, valid, count), strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize("dtype", [torch.float32] + [torch.bfloat16] * GPU)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_axes_do_not_depend_on_the_unit_of_the_points(dtype, size):
    x = stretched(1, 64, 16, dtype=dtype)
    valid = torch.ones(64, dtype=torch.bool, device=DEVICE)
    want = clustering.principal_axes((x * size).double(), valid, 4)
    for got, twin in zip(triton_clustering.principal_axes(x * size, valid, 4), want, strict=True):
        assert_near(got, twin, 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("implementation", [clustering, triton_clustering])
@pytest.mark.parametrize("dtype", DTYPES)
def test_points_without_extent_have_no_axes(implementation, dtype):
    valid = torch.ones(32, dtype=torch.bool, device=DEVICE)
    for x in (torch.zeros(1, 32, 16), torch.full((1, 32, 16), 1.5)):
        for result in implementation.principal_axes(x.to(DEVICE, dtype), valid, 3):
            assert not result.any()
    flat = torch.zeros(1, 32, 16, device=DEVICE, dtype=dtype)
    flat[..., 4:6] = normal(1, 32, 2, dtype=dtype)
    axes, spread = implementation.principal_axes(flat, valid, 4)
    assert not axes[..., 2:].any() and not spread[..., 2:].any()
    torch.testing.assert_close(axes[0, :, :2].T @ axes[0, :, :2], torch.eye(2, device=DEVICE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [0, 56])
def test_axes_are_well_determined_where_a_few_neighbouring_coordinates_vary(first):
    """The start must not look the same from there: else fp32 gives other axes than fp64."""
    x = 1e-3 * normal(1, 256, 64, dtype=torch.float64)
    x[..., first:first + 8] = stretched(1, 256, 8, dtype=torch.float64)
    valid = torch.ones(256, dtype=torch.bool, device=DEVICE)
    want, _ = clustering.principal_axes(x, valid, 8)
    assert_near(clustering.principal_axes(x.float(), valid, 8)[0], want, 1e-5)


# Coordinates

@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype, dim, points", [(torch.float32, 24, 70), (torch.float16, 96, 20)] + [
    (dtype, dim, 1000) for dtype in DTYPES for dim in (16, 32, 64, 96, 128, 256) if GPU], ids=str)
def test_project(dtype, dim, points, weighted):
    x = stretched(2, 3, points, dim, dtype=dtype)
    axes = normal(2, 3, dim, 8, seed=3) / math.sqrt(dim)
    weight = normal(2, 3, 8, seed=4).abs() if weighted else None
    x[0, 1, 2] = math.nan
    x[1, 2, 4, 5], x[1, 2, 4, 6] = math.inf, -math.inf
    want = clustering.project(x.double(), axes.double(), weight if weight is None else weight.double())
    got = triton_clustering.project(x, axes, weight)
    assert_near(got, want, 2e-6 if dtype == torch.float32 else 2e-5)
    assert not got[0, 1, 2].any()
    one_tile = triton_clustering.project(x, axes, weight, tile=RowTile(16, 4, 1))
    assert_near(one_tile, got.double(), 1e-6)


@pytest.mark.parametrize("implementation", [clustering, triton_clustering])
def test_weighted_coordinates_have_unit_length_whatever_the_size_of_the_point(implementation):
    x = stretched(1, 20, 16, dtype=torch.float32)
    want = clustering.project(x, torch.eye(16, 5, device=DEVICE)[None], torch.ones(1, 5, device=DEVICE))
    x[0, 4:8] *= 1e30
    x[0, 8:12] *= 1e-30
    x[0, 12] = 0.0
    got = implementation.project(x, torch.eye(16, 5, device=DEVICE)[None], torch.ones(1, 5, device=DEVICE))
    assert not got[0, 12].any()
    got[0, 12] = want[0, 12]
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(1, 20, device=DEVICE))
    torch.testing.assert_close(got, want)


# Bisection

def settings(n, part, axes=3, pinned=0, missing=None, kind="normal", tile=None):
    return pytest.param(n, part, axes, pinned, missing, kind, tile, id=f"{n}-{part}-{axes}-{pinned}-{missing}-{kind}"
                        f"{'-' + '-'.join(map(str, tile)) if tile else ''}")


def points_of(kind, n, axes):
    x = normal(2, n, axes, seed=n)
    if kind == "ties":  # few values along every axis, but no two axes of one variance
        x = x.round() * 1.37 ** torch.arange(axes, device=DEVICE)
        x[:, ::5] *= -0.0
    elif kind == "huge":
        x = 1e30 * x
        assert x.square().isinf().any()
    elif kind == "tiny":
        x = 1e-30 * x
    elif kind == "mixed":
        x[:, n // 3] = 1e30
    elif kind == "poisoned":
        x[:, 1, 0], x[:, 7], x[0, 11, 1] = math.inf, math.nan, -math.inf
    return x


def existing(missing, n):
    """None, or bool [n] or [2, n]."""
    if missing == "tail":
        return torch.arange(n, device=DEVICE) < n - n // 5
    if missing == "two tails":  # the pooled heads of a short block
        return (torch.arange(n, device=DEVICE) % (n // 2)) < n // 3
    if missing == "anywhere":
        return normal(2, n, seed=5) > -0.5
    return None


BISECT_CASES = [
    settings(64, 8), settings(64, 8, kind="ties"), settings(32, 1, axes=1, kind="ties"),
    settings(48, 8, axes=5, pinned=5, missing="tail"), settings(40, 8, missing="two tails", pinned=8),
    settings(96, 12, axes=8, missing="anywhere", pinned=3), settings(24, 24, missing="anywhere"),
    settings(56, 8, kind="poisoned"), settings(32, 4, kind="huge"), settings(32, 4, kind="tiny"),
    settings(32, 4, kind="mixed"), settings(60, 4, tile=BisectTile(16384, 8, 1, 1)),
    settings(96, 4, tile=BisectTile(24, 8, 4, 2), pinned=5, missing="tail"),
    settings(96, 4, tile=BisectTile(4, 8, 4, 2), missing="anywhere"), settings(8200, 4100, axes=2, missing="anywhere"),
]
if GPU:
    BISECT_CASES += [
        settings(n, 64, axes=8, pinned=pinned, missing=missing, kind=kind)
        for n, (pinned, missing), kind in itertools.product(
            (1024, 2048, 4096, 6144, 8192, 16384, 32768), ((0, None), (64, "tail"), (64, "two tails")),
            ("normal", "ties"))]


@pytest.mark.parametrize("n, part, axes, pinned, missing, kind, tile", BISECT_CASES)
def test_bisect(n, part, axes, pinned, missing, kind, tile):
    x, valid = points_of(kind, n, axes), existing(missing, n)
    want = clustering.bisect(x.double(), part, pinned, valid)
    if valid is not None:
        x = x.masked_fill(~valid[..., None], 1e38)  # what does not exist cannot matter
    got = triton_bisection.bisect(x, part, pinned, valid, tile=tile)
    assert got.dtype == torch.int64 and torch.equal(got, want)


def test_bisect_takes_half_precision_and_leading_dimensions():
    x = normal(2, 1, 2, 32, 3, dtype=torch.float16)
    assert torch.equal(triton_bisection.bisect(x, 8), clustering.bisect(x.double(), 8))


@pytest.mark.parametrize("valid", [None, torch.tensor([True, False, True, True, False, True, True, True])])
def test_existing_points_of_a_cluster_keep_their_order_and_come_first(valid):
    """What leaves rely on, whose last places are those of missing keys."""
    x = normal(5, 8, 2).cpu()
    exists = torch.ones(8, dtype=torch.bool) if valid is None else valid
    for run in clustering.bisect(x, 4, 0, valid).view(-1, 4).tolist():
        here = [p for p in run if exists[p]]
        assert run == sorted(here) + sorted(p for p in run if not exists[p])


def test_what_the_kernels_cannot_run_is_refused():
    valid = torch.ones(4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="x is torch.float64"):
        triton_clustering.principal_axes(normal(4, 16, dtype=torch.float64), valid, 2)
    with pytest.raises(ValueError, match="points of 257 coordinates"):
        triton_clustering.project(normal(4, 257), normal(257, 2))
    with pytest.raises(ValueError, match="part=3"):
        triton_bisection.bisect(normal(4, 2), 3)


@pytest.mark.skipif(not GPU, reason="synchronisation happens on a GPU only")
def test_nothing_waits_for_the_gpu():
    x, valid = stretched(2, 40960, 64, dtype=torch.bfloat16), torch.ones(40960, dtype=torch.bool, device=DEVICE)

    def step():
        axes, spread = triton_clustering.principal_axes(x, valid, 8)
        points = triton_clustering.project(x, axes, spread)
        triton_bisection.bisect(points, 64, 64, valid)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="needs the memory of a GPU")
def test_more_than_2_to_the_31_elements():
    x = torch.zeros(33, 1 << 20, 64, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = stretched(1 << 20, 64, dtype=torch.bfloat16)
    axes = normal(33, 64, 8)
    assert_near(triton_clustering.project(x, axes)[-1], x[-1].double() @ axes[-1].double(), 2e-5)

"""Principal axes of blocks, and coordinates of points along them."""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_dist.kernels.limits import ceil_div
from muse_dist.kernels.triton_common import PRECISION, load_rows, padded, store_rows


class RowTile(NamedTuple):
    """Launch shape of a kernel that goes through rows alone."""

    rows: int  # rows in a tile, a power of two, at least 16 and at least 4 * warps
    warps: int
    stages: int  # tiles in flight


def principal_axes(
    x: Tensor, valid: Tensor, count: int, iterations: int = 4, *, tile: RowTile | None = None
) -> tuple[Tensor, Tensor]:
    """Leading principal axes of point sets, by orthogonal iteration from a fixed start.

    The covariance is added up in fp32 from centred points that are rounded to the dtype of x.

    Args:
        x: points [..., n, D], D at most 256; coordinates that are not finite count as 0.
        valid: bool, broadcastable to [..., n], which points count.
        count: number of axes c, at most D.
        tile: launch shape of the covariance; pinned by head dim and dtype if None.
    Returns:
        axes fp32 [..., D, c], orthonormal columns (zero columns where the points have no extent left), and the
        standard deviations of the points along them, fp32 [..., c], in units of the set's largest coordinate.
    """
    points, dim = x.shape[-2:]
    check_points(x, dim)
    sets = x.shape[:-2].numel()
    flags, periods = flags_of(valid, x.shape[:-1])
    tile = _covariance_tile(dim, x.dtype) if tile is None else tile
    width = min(padded(dim), 128)
    parts = padded(dim) // width
    covariance = torch.empty((sets, dim, dim), dtype=torch.float32, device=x.device)
    _covariance[(sets * parts * parts,)](
        x.contiguous(), flags, covariance, points, periods, DIM=dim, WIDTH=width, PARTS=parts, ROWS=tile.rows,
        num_warps=tile.warps, num_stages=tile.stages)
    axes = torch.empty((*x.shape[:-2], dim, count), dtype=torch.float32, device=x.device)
    spread = torch.empty((*x.shape[:-2], count), dtype=torch.float32, device=x.device)
    _orthogonal_iteration[(sets,)](
        covariance, axes, spread, iterations, DIM=dim, DIM_PAD=padded(dim), STEP=min(padded(dim), 32), COUNT=count,
        COUNT_PAD=padded(count), num_warps=_iteration_warps(dim))
    return axes, spread


def project(x: Tensor, axes: Tensor, weight: Tensor | None = None, *, tile: RowTile | None = None) -> Tensor:
    """Coordinates of points along axes, fp32 [..., n, c].

    Args:
        x: points [..., n, D], D at most 256; coordinates that are not finite count as 0.
        axes: fp32 [..., D, c].
        weight: fp32 [..., c]; if given, coordinates are multiplied by it and each point is scaled to unit length. A
            point at the origin stays there.
        tile: launch shape; pinned by head dim and dtype if None.
    """
    points, dim = x.shape[-2:]
    check_points(x, dim)
    count = axes.shape[-1]
    sets = x.shape[:-2].numel()
    tile = _project_tile(dim, x.dtype) if tile is None else tile
    turns = min(4, ceil_div(points, tile.rows))  # tiles of a program, which reads the axes once
    programs = ceil_div(points, turns * tile.rows)
    out = torch.empty((*x.shape[:-1], count), dtype=torch.float32, device=x.device)
    _project[(sets * programs,)](
        x.contiguous(), axes.contiguous(), None if weight is None else weight.contiguous(), out, points, programs,
        turns, DIM=dim, DIM_PAD=padded(dim), COUNT=count, COUNT_PAD=padded(count), ROWS=tile.rows,
        num_warps=tile.warps, num_stages=tile.stages)
    return out


def check_points(x: Tensor, dim: int) -> None:
    """Raise ValueError for points that the kernels cannot read: their dtype, or more than 256 coordinates."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype}: the Triton kernels take bfloat16, float16 and float32; cast it or take "
                         "backend='torch'")
    if dim > 256:
        raise ValueError(f"points of {dim} coordinates: the Triton kernels take at most 256; take backend='torch'")


def flags_of(valid: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """bool `valid`, broadcastable to `shape` [..., n], as uint8 [periods, n]: set i reads row i % periods."""
    while valid.dim() > 1 and valid.shape[0] == 1:
        valid = valid[0]
    if valid.shape != shape[-valid.dim():]:
        valid = valid.expand(shape)
    return valid.contiguous().view(torch.uint8), valid.numel() // shape[-1]


def _covariance_tile(dim: int, dtype: torch.dtype) -> RowTile:
    if dtype == torch.float32:
        return RowTile(64, 4, 2) if dim <= 64 else RowTile(32, 8, 2)
    return RowTile(128, 4, 3) if dim <= 64 else RowTile(64, 8, 3)


def _iteration_warps(dim: int) -> int:
    return 1 if dim <= 32 else 4


def _project_tile(dim: int, dtype: torch.dtype) -> RowTile:
    row_bytes = padded(dim) * dtype.itemsize
    if row_bytes <= 128:
        return RowTile(128, 4, 3)
    return RowTile(64, 4, 3) if row_bytes <= 256 else RowTile(64 if row_bytes <= 512 else 32, 4, 2)


@triton.jit
def finite(x):
    """x in fp32, 0 where it is not finite."""
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _load_part(x, valid, row, points, part, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Columns part * WIDTH and following of points [len(row), WIDTH] in fp32, 0 where they do not count."""
    exists = tl.load(valid + row, mask=row < points, other=0) != 0
    column = part * WIDTH + tl.arange(0, WIDTH)
    ok = exists[:, None] & (column < DIM)[None, :]
    return finite(tl.load(x + row[:, None] * DIM + column[None, :], mask=ok, other=0.0)), ok


@triton.jit
def _covariance(x, valid, covariance, points, periods, DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
                ROWS: tl.constexpr):
    """One program for PARTS * PARTS tiles of a set's covariance, of the points in units of their largest coordinate."""
    at = tl.program_id(0) // (PARTS * PARTS)
    left = tl.program_id(0) // PARTS % PARTS
    right = tl.program_id(0) % PARTS
    x += at.to(tl.int64) * points * DIM
    valid += (at % periods).to(tl.int64) * points
    row = tl.arange(0, ROWS)

    # The mean of all columns of the tile, and of the other half where there is one: the peak is that of all columns.
    total = tl.zeros((WIDTH,), tl.float32)
    total_other = tl.zeros((WIDTH,), tl.float32)
    peaks = tl.zeros((ROWS, WIDTH), tl.float32)
    present = tl.zeros((ROWS,), tl.int32)
    share = 1.0 / points  # sums of what is multiplied by it are finite
    for start in range(0, points, ROWS):
        tile, ok = _load_part(x, valid, start + row, points, left, DIM, WIDTH)
        total += tl.sum(tile * share, 0)
        peaks = tl.maximum(peaks, tl.abs(tile))
        present += tl.load(valid + start + row, mask=start + row < points, other=0).to(tl.int32)
        if PARTS > 1:
            other, ok = _load_part(x, valid, start + row, points, 1 - left, DIM, WIDTH)
            total_other += tl.sum(other * share, 0)
            peaks = tl.maximum(peaks, tl.abs(other))
    scale = 1.0 / tl.maximum(tl.max(tl.max(peaks, 1), 0), 1.1754944e-38)
    count = tl.maximum(tl.sum(present, 0), 1).to(tl.float32)
    mean = total * (points / count)
    mean_other = tl.where(left == right, mean, total_other * (points / count))

    out = tl.zeros((WIDTH, WIDTH), tl.float32)
    for start in range(0, points, ROWS):
        tile, ok = _load_part(x, valid, start + row, points, left, DIM, WIDTH)
        tile = tl.where(ok, (tile - mean[None, :]) * scale, 0.0).to(x.dtype.element_ty)
        if PARTS > 1:
            other, ok = _load_part(x, valid, start + row, points, right, DIM, WIDTH)
            other = tl.where(ok, (other - mean_other[None, :]) * scale, 0.0).to(x.dtype.element_ty)
            out = tl.dot(tl.trans(tile), other, out, input_precision=PRECISION)
        else:
            out = tl.dot(tl.trans(tile), tile, out, input_precision=PRECISION)
    line = left * WIDTH + tl.arange(0, WIDTH)
    column = right * WIDTH + tl.arange(0, WIDTH)
    tl.store(covariance + at.to(tl.int64) * DIM * DIM + line[:, None] * DIM + column[None, :], out / count,
             mask=(line < DIM)[:, None] & (column < DIM)[None, :])


@triton.jit
def _multiply(matrix, axes, DIM: tl.constexpr, DIM_PAD: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr,
              COUNT_PAD: tl.constexpr):
    """A symmetric matrix [DIM, DIM] times axes [DIM, COUNT], both in memory: [DIM_PAD, COUNT_PAD]."""
    line = tl.arange(0, DIM_PAD)
    out = tl.zeros((DIM_PAD, COUNT_PAD), tl.float32)
    for start in range(0, DIM, STEP):
        step = start + tl.arange(0, STEP)
        ok = step < DIM
        rows = tl.load(matrix + line[:, None] * DIM + step[None, :], mask=(line < DIM)[:, None] & ok[None, :],
                       other=0.0)
        out = tl.dot(rows, load_rows(axes, step, ok, COUNT, COUNT_PAD), out, input_precision=PRECISION)
    return out


@triton.jit
def _orthonormal(columns, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr):
    """Gram-Schmidt on the columns of [DIM_PAD, COUNT_PAD]; a column that depends on the ones before it becomes zero."""
    place = tl.arange(0, COUNT_PAD)[None, :]
    done = tl.zeros_like(columns)
    for j in range(COUNT):
        column = tl.sum(tl.where(place == j, columns, 0.0), 1)
        length = tl.sqrt(tl.sum(column * column, 0))
        for _ in range(2):  # twice is enough for orthogonality to rounding
            share = tl.sum(done * column[:, None], 0)
            column -= tl.sum(done * share[None, :], 1)
        rest = tl.sqrt(tl.sum(column * column, 0))
        independent = rest > length * 1.1920929e-5  # 100 roundings of fp32
        column = tl.where(independent, column / tl.maximum(rest, 1.1754944e-38), 0.0)
        done = tl.where(place == j, column[:, None], done)
    return done


@triton.jit
def _orthogonal_iteration(covariance, axes, spread, iterations, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
                          STEP: tl.constexpr, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr):
    """One program a set. The axes pass through memory, where the products read them in pieces."""
    at = tl.program_id(0).to(tl.int64)
    covariance += at * DIM * DIM
    axes += at * DIM * COUNT
    line = tl.arange(0, DIM_PAD)
    column = tl.arange(0, COUNT_PAD)
    wave = column * ((DIM - 1) // max(COUNT - 1, 1)) * 2 + 1  # as in clustering._start
    found = tl.cos(((2 * line[:, None] + 1) * wave[None, :] % (8 * DIM)).to(tl.float32) * (0.7853981633974483 / DIM))
    for _ in range(iterations):
        store_rows(axes, line, line < DIM, found, COUNT, COUNT_PAD)
        tl.debug_barrier()
        product = _multiply(covariance, axes, DIM, DIM_PAD, STEP, COUNT, COUNT_PAD)
        tl.debug_barrier()
        found = _orthonormal(product, COUNT, COUNT_PAD)
    store_rows(axes, line, line < DIM, found, COUNT, COUNT_PAD)
    tl.debug_barrier()
    product = _multiply(covariance, axes, DIM, DIM_PAD, STEP, COUNT, COUNT_PAD)
    found = load_rows(axes, line, line < DIM, COUNT, COUNT_PAD)
    variance = tl.sum(found * product, 0)
    tl.store(spread + at * COUNT + column, tl.sqrt(tl.maximum(variance, 0.0)), mask=column < COUNT)


@triton.jit
def _project(x, axes, weight, out, points, programs, turns, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
             COUNT: tl.constexpr, COUNT_PAD: tl.constexpr, ROWS: tl.constexpr):
    at = (tl.program_id(0) // programs).to(tl.int64)
    line = tl.arange(0, DIM_PAD)
    column = tl.arange(0, COUNT_PAD)
    directions = load_rows(axes + at * DIM * COUNT, line, line < DIM, COUNT, COUNT_PAD)
    if weight is not None:
        factor = tl.load(weight + at * COUNT + column, mask=column < COUNT, other=0.0)
        directions = directions * factor[None, :]
    # In half precision the axes are sums of two numbers: x is multiplied as it came and 16 bits of the axes count.
    coarse = directions.to(x.dtype.element_ty)
    fine = (directions - coarse.to(tl.float32)).to(x.dtype.element_ty)
    first = tl.program_id(0) % programs * turns * ROWS
    for start in range(first, min(first + turns * ROWS, points), ROWS):
        row = start + tl.arange(0, ROWS)
        ok = row < points
        rows = finite(load_rows(x + at * points * DIM, row, ok, DIM, DIM_PAD)).to(x.dtype.element_ty)
        result = tl.dot(rows, coarse, input_precision=PRECISION)
        if x.dtype.element_ty != tl.float32:
            result = tl.dot(rows, fine, result)
        if weight is not None:
            result = result / tl.maximum(tl.max(tl.abs(result), 1), 1.1754944e-38)[:, None]
            result = result / tl.maximum(tl.sqrt(tl.sum(result * result, 1)), 0.5)[:, None]
        store_rows(out + at * points * COUNT, row, ok, result, COUNT, COUNT_PAD)

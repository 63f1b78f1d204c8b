"""Clusters of equal size in plain PyTorch: principal axes of a block and a balanced k-d tree along them."""
from __future__ import annotations

import torch
from torch import Tensor


def principal_axes(x: Tensor, valid: Tensor, count: int, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """Leading principal axes of point sets, by orthogonal iteration from a fixed start (no randomness, no host sync).

    Args:
        x: points [..., n, D]; coordinates that are not finite count as 0.
        valid: bool, broadcastable to [..., n], which points count.
        count: number of axes c, at most D.
    Returns:
        axes [..., D, c], orthonormal columns (zero columns where the points have no extent left), and the standard
        deviations of the points along them [..., c], in units of the set's largest coordinate. Both are fp32, or fp64
        if x is.
    """
    x = finite(x)
    x = scaled(torch.where(valid[..., None], x, 0.0), (-2, -1))
    weight = valid.to(x.dtype)[..., None]
    total = weight.sum(-2, keepdim=True).clamp(min=1)
    centred = (x - x.sum(-2, keepdim=True) / total) * weight
    covariance = centred.mT @ centred / total
    axes = _start(x.shape[-1], count, x).expand(*x.shape[:-2], -1, -1)
    for _ in range(iterations):
        axes = _orthonormal(covariance @ axes)
    spread = (axes * (covariance @ axes)).sum(-2).clamp(min=0).sqrt()
    return axes, spread


def _start(size: int, count: int, like: Tensor) -> Tensor:
    """`count` columns of the cosine transform's matrix [size, size], from slow to fast: low ones alone look alike on
    the first coordinates, where some models' keys vary most. Angles are reduced as integers, so that they are exact."""
    line = torch.arange(1, 2 * size, 2, device=like.device)
    wave = torch.arange(count, device=like.device) * ((size - 1) // max(count - 1, 1)) * 2 + 1
    return torch.cos((line[:, None] * wave % (8 * size)).to(like.dtype) * (torch.pi / (4 * size)))


def _orthonormal(columns: Tensor) -> Tensor:
    """Gram-Schmidt on the columns of [..., D, c]; a column that depends on the ones before it becomes zero."""
    done: list[Tensor] = []
    for column in columns.unbind(-1):
        length = column.norm(dim=-1, keepdim=True)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            for axis in done:
                column = column - (axis * column).sum(-1, keepdim=True) * axis
        rest = column.norm(dim=-1, keepdim=True)
        independent = rest > length * (100 * torch.finfo(column.dtype).eps)
        done.append(torch.where(independent, column / rest.clamp(min=torch.finfo(column.dtype).tiny), 0.0))
    return torch.stack(done, -1)


def project(x: Tensor, axes: Tensor, weight: Tensor | None = None) -> Tensor:
    """Coordinates of points along axes: fp32 [..., n, c], or fp64 if the axes are.

    Args:
        x: points [..., n, D]; coordinates that are not finite count as 0.
        axes: [..., D, c].
        weight: [..., c]; if given, coordinates are multiplied by it and each point is scaled to unit length. A point
            at the origin stays there.
    """
    points = finite(x).to(axes.dtype) @ axes
    if weight is None:
        return points
    points = scaled(points * weight[..., None, :], (-1,))
    return points / points.norm(dim=-1, keepdim=True).clamp(min=0.5)  # at least 1 unless the point is 0


def finite(x: Tensor) -> Tensor:
    """x in at least fp32, 0 where it is not finite."""
    return torch.where(x.isfinite(), x, 0.0).to(torch.promote_types(x.dtype, torch.float32))


def scaled(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x in units of its largest magnitude along `dims`, so that sums and squares are finite."""
    return x / x.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def bisect(x: Tensor, part: int, pinned: int = 0, valid: Tensor | None = None) -> Tensor:
    """Order points so that consecutive runs of `part` points are clusters: a balanced k-d tree.

    Every run is split at the median along its axis of largest variance, again and again, until runs hold `part` points.
    If n / part is an odd number times a power of two, the last split cuts that odd number of runs at once. Of equal
    points the earlier ones go first, and the points of a run keep their order.

    Args:
        x: points [..., n, c]; coordinates that are not finite count as 0.
        part: points in a cluster; n must be a multiple.
        pinned: the first `pinned` points stay first, in their order (attention sinks).
        valid: bool, broadcastable to [..., n]; points that do not exist go last. All exist if None.
    Returns:
        int64 [..., n]: the point at each place of the new order.
    """
    return bisect_down_to(part, x, part, pinned, valid)[0]


def bisect_down_to(
    most: int, x: Tensor, part: int, pinned: int, valid: Tensor | None
) -> tuple[Tensor, int]:
    """The upper levels of `bisect`, until runs hold at most `most` points: the order and the points in a run."""
    n = x.shape[-2]
    check_part(n, part)
    exists = torch.ones(n, dtype=torch.bool, device=x.device) if valid is None else valid
    x = torch.where(exists[..., None], finite(x), 0.0)
    exists = exists.expand(x.shape[:-1])
    order = existing_first(exists)
    # Fixed points get a place below or above all others on every axis, and no say in the choice of the axis.
    first = torch.arange(n, device=x.device) < pinned
    place = torch.where(exists, torch.where(first, float("-inf"), 0.0), float("inf")).to(x.dtype)
    size = n
    while size > max(part, most):
        pieces = 2 if size // part % 2 == 0 else size // part
        order = _split_runs(x, place, order, size, pieces)
        size //= pieces
    return order, size


def existing_first(exists: Tensor) -> Tensor:
    """The order before any split: points [..., n] that do not exist are behind all others."""
    return (~exists).byte().sort(dim=-1, stable=True).indices


def check_part(n: int, part: int) -> None:
    """Raise ValueError unless n points make whole clusters of `part`."""
    if part < 1 or n % part:
        raise ValueError(f"part={part}: must be positive and divide the number of points {n}")


def _split_runs(x: Tensor, place: Tensor, order: Tensor, size: int, pieces: int) -> Tensor:
    """Cut every run of `size` points into equal pieces along the axis on which its free points vary most."""
    runs = order.unflatten(-1, (-1, size))  # [..., runs, size]
    points = gather_rows(x, order).unflatten(-2, (-1, size))
    place = place.gather(-1, order).unflatten(-1, (-1, size))
    free = (place == 0)[..., None]
    relative = scaled(points * free, (-2, -1))
    mean = relative.sum(-2, keepdim=True) / free.sum(-2, keepdim=True).clamp(min=1)
    axis = ((relative - mean).square() * free).sum(-2).argmax(-1)[..., None, None].expand(*runs.shape, 1)
    along = points.gather(-1, axis)[..., 0] + place
    member = along.sort(dim=-1, stable=True).indices.unflatten(-1, (pieces, -1))
    return runs.gather(-1, member.sort(-1).values.flatten(-2)).flatten(-2)


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [..., n, D] in the order [..., n]."""
    return x.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))


def scatter_rows(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `gather_rows`: row p of x [..., n, D] goes to place order[p], order [..., n] a permutation."""
    return torch.empty_like(x).scatter_(-2, order[..., None].expand_as(x), x)

"""Clusters of equal size in plain PyTorch: principal axes of a block and a balanced k-d tree along them."""
from __future__ import annotations

import torch
from torch import Tensor


def principal_axes(x: Tensor, valid: Tensor, count: int, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """Leading principal axes of point sets, by orthogonal iteration from a fixed start (no randomness, no host sync).

    Args:
        x: points [..., n, D], finite.
        valid: bool [..., n], which points count.
        count: number of axes c, at most D.
    Returns:
        axes [..., D, c], orthonormal columns (zero columns where the points have no extent left), and the standard
        deviations of the points along them [..., c].
    """
    weight = valid.to(x.dtype)[..., None]
    total = weight.sum(-2, keepdim=True).clamp(min=1)
    centred = (x - (x * weight).sum(-2, keepdim=True) / total) * weight
    centred = centred / centred.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    covariance = centred.mT @ centred / total
    size = x.shape[-1]
    grid = torch.arange(size, device=x.device, dtype=x.dtype)
    axes = torch.cos((grid[:, None] + 0.5) * (grid[:count] + 0.5) * (torch.pi / size)).expand(*x.shape[:-2], -1, -1)
    for _ in range(iterations):
        axes = _orthonormal(covariance @ axes)
    spread = (axes * (covariance @ axes)).sum(-2).clamp(min=0).sqrt()
    return axes, spread


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


def bisect(x: Tensor, part: int, pinned: int = 0, valid: Tensor | None = None) -> Tensor:
    """Order points so that consecutive runs of `part` points are clusters: a balanced k-d tree.

    Every run is split at the median along its axis of largest variance, again and again, until runs hold `part` points.
    If n / part is an odd number times a power of two, the last split cuts that odd number of runs at once. Ties keep
    their order.

    Args:
        x: points [..., n, c]; non-finite coordinates count as 0.
        part: points in a cluster; n must be a multiple.
        pinned: the first `pinned` points stay first, in their order (attention sinks).
        valid: bool [..., n]; points that do not exist go last. All exist if None.
    Returns:
        int64 [..., n]: the point at each place of the new order.
    """
    n = x.shape[-2]
    if part < 1 or n % part:
        raise ValueError(f"part={part}: must be positive and divide the number of points {n}")
    exists = torch.ones(n, dtype=torch.bool, device=x.device) if valid is None else valid
    x = torch.where(x.isfinite() & exists[..., None], x, 0.0)
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # so that squares are finite
    order = torch.arange(n, device=x.device).expand(x.shape[:-1])
    # Fixed points get a place below or above all others on every axis, and no say in the choice of the axis.
    place = torch.where(exists, torch.where(order < pinned, float("-inf"), 0.0), float("inf"))
    size = n
    while size > part:
        pieces = 2 if size // part % 2 == 0 else size // part
        order = _sort_runs(x, place, order, size)
        size //= pieces
    return order


def _sort_runs(x: Tensor, place: Tensor, order: Tensor, size: int) -> Tensor:
    """Sort every run of `size` points along the axis on which its free points vary most."""
    runs = order.unflatten(-1, (-1, size))  # [..., runs, size]
    points = x.gather(-2, order[..., None].expand_as(x)).unflatten(-2, (-1, size))
    place = place.gather(-1, order).unflatten(-1, (-1, size))
    free = (place == 0)[..., None]
    mean = (points * free).sum(-2, keepdim=True) / free.sum(-2, keepdim=True).clamp(min=1)
    axis = ((points - mean).square() * free).sum(-2).argmax(-1)[..., None, None].expand(*runs.shape, 1)
    along = points.gather(-1, axis)[..., 0] + place
    return runs.gather(-1, along.sort(dim=-1, stable=True).indices).flatten(-2)

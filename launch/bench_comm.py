"""Communicators that measure: one remembers its exchanges, to repeat them alone; one exchanges nothing at all."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muse_dist.comm import Communicator, Pending, packed


class Recorder(Communicator):
    """Remembers what it posts, so that the same collectives can run again on the same buffers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.posted: list[tuple[str, Callable[[], Any]]] = []

    def _post(self, name: str, *what: Any) -> Any:
        post = partial(super()._post, name, *what)
        self.posted.append((name, post))
        return post()

    def repeat(self, name: str) -> None:
        """Run the exchanges posted under `name` once more, one after the other."""
        for posted, post in self.posted:
            if posted == name:
                post().wait()

    @property
    def names(self) -> list[str]:
        """Of the exchanges, in the order first posted."""
        return list(dict.fromkeys(name for name, _ in self.posted))


class _Done(dist.Work):
    """Work that has nothing to do."""

    def wait(self, timeout: Any = None) -> bool:  # type: ignore[override]
        return True


class Silent(Communicator):
    """Gives local data of the right shapes at once: the same arithmetic and packing, no traffic. Results are wrong."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._made: dict[Any, list[Tensor]] = {}

    def all_gather(self, name: str, *tensors: Tensor) -> Pending:
        """This rank's tensors for those of every rank."""
        sent = packed(tensors, tensors[0].device)
        return Pending(name, _Done(), self._where(), sent, lambda: [x.detach() for x in tensors] * self.size)

    def all_to_all(
        self, name: str, send: Sequence[Sequence[Tensor]],
        receive: Sequence[Sequence[tuple[Sequence[int], torch.dtype]]], device: torch.device,
    ) -> Pending:
        """Noise for what other ranks would send, the same at every call."""
        sent = packed([x for tensors in send for x in tensors], device)
        specs = [(tuple(shape), dtype) for part in receive for shape, dtype in part]
        key = (name, *specs)
        if key not in self._made:
            self._made[key] = [torch.randn(shape, device=device).to(dtype) for shape, dtype in specs]
        return Pending(name, _Done(), self._where(), sent, lambda: self._made[key])

    def agree(self, key: str, problem: str | None) -> None:
        """Nothing to agree on: the ranks have, with the communicator that is real."""

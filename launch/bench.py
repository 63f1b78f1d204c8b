"""Benchmarks that run side by side what is to be compared.

    python -m launch.bench attention --model DIR
    torchrun --standalone --nproc-per-node 4 -m launch.bench attention --tokens 65536 262144
    torchrun --standalone --nproc-per-node 4 -m launch.bench exchange --tokens 65536 262144

Each command first checks, in the same processes, that what it times is right, and prints no speed-up where it is not.
"""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from launch import bench_attention, bench_exchange
from launch.options import pick_device
from launch.ranks import join_ranks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for module in (bench_attention, bench_exchange):
        module.add_command(commands)
    return parser


@contextmanager
def _said(first: bool) -> Iterator[None]:
    """Print what the package has to say, such as which backend "auto" took, on the first rank."""
    logger, handler = logging.getLogger("muse_dist"), logging.StreamHandler(sys.stdout)
    before = logger.level
    if first:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the head of this file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with join_ranks(pick_device(options.device), options.layout) as ranks, _said(ranks.first):
            options.run(ranks, options)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

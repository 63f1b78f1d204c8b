"""Benchmarks that run side by side what is to be compared.

    python -m launch.bench attention --model DIR
    torchrun --standalone --nproc-per-node 4 -m launch.bench attention --tokens 65536 262144
    torchrun --standalone --nproc-per-node 4 -m launch.bench exchange --tokens 65536 262144
    python -m launch.bench step --config configs/1b.toml --stage 1
    python -m launch.bench tiles --dim 128 --set tolerance=0 --set opened=4 --out tiles.json

Each command first checks, in the same processes, that what it times is right, and prints no speed-up where it is not.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from launch import bench_attention, bench_exchange, bench_step, bench_tiles


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for module in (bench_attention, bench_exchange, bench_step, bench_tiles):
        module.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the head of this file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

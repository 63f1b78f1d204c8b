"""Check an allocation before a long run: what is wrong with it, and how to mend it.

    python -m launch.doctor --config configs/125m.toml
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500 \\
        -m launch.doctor --config configs/1b.toml --inter 50

Started as the run will be, on the same nodes, with the run's options of launch.train. It looks at versions, limits,
GPUs, the links between all pairs of ranks, clocks, the folder of the checkpoints, the settings and the data, and
predicts memory and step time. The exit status is 1 if there is a problem; warnings do not change it.
"""
from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from launch.config import RunConfig
from launch.doctor_checks import (
    Finding, check_data, check_disk, check_host, check_prediction, check_settings, check_versions, problem,
)
from launch.doctor_links import check_clocks, check_devices, check_links, check_sums
from launch.options import add_run_options, pick_device, positive, run_changes, whole_number
from launch.ranks import Ranks, join_ranks

WORDS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the head of this file. Returns the exit status, the same on all ranks."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = RunConfig.from_toml(options.config, name=options.name, changes=run_changes(options))
        device = pick_device(options.device)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        with join_ranks(device, config.layout, timeout=options.timeout) as ranks:
            findings = examine(config, ranks, options)
            if ranks.first:
                print(report(findings, ranks), flush=True)
    except RuntimeError as error:  # of torch.distributed; what else goes wrong is a finding
        print(f"{WORDS['problem']} ranks: they did not come together, or lost each other: {error}\n        Every rank "
              "must reach the first one's address and port: check the rendezvous address, name resolution and "
              "firewalls; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network", file=sys.stderr)
        return 1
    return int(any(finding.level == "problem" for finding in findings))


def examine(config: RunConfig, ranks: Ranks, options: argparse.Namespace) -> list[Finding]:
    """All findings, on every rank. Checks that exchange something come in the same order everywhere."""
    folder = options.out / config.name / "checkpoints"
    alone: list[Callable[[], list[Finding]]] = [
        lambda: check_host(ranks), lambda: check_settings(config, ranks), lambda: check_data(config)]
    found = [finding for check in alone for finding in _guarded(check)]
    together: list[Callable[[], list[Finding]]] = [
        lambda: check_versions(ranks, config.train.engine), lambda: check_devices(ranks), lambda: check_sums(ranks),
        lambda: check_links(ranks, options.intra, options.inter), lambda: check_clocks(ranks),
        lambda: check_disk(config, folder, ranks, options.megabytes),
        lambda: check_prediction(config, ranks, options.per_node)]
    everyone = _merged(ranks.collect(found))
    for check in together:  # these give every rank the same findings
        everyone += check()
    return everyone


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check of one rank alone must not keep it from the checks of all."""
    try:
        return check()
    except Exception as error:
        return [problem("doctor", f"a check ended with {type(error).__name__}: {error}", "this should not happen: "
                        "report it with this line")]


def _merged(found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Findings of all ranks, each once, with the number of ranks where it is not all."""
    counts = Counter(finding for one in found for finding in one)
    return [finding if count == len(found) else finding.on(
        [rank for rank, one in enumerate(found) if finding in one]) for finding, count in counts.items()]


def report(findings: Sequence[Finding], ranks: Ranks) -> str:
    """Findings as text, problems last, where they are read."""
    order = {"ok": 0, "warning": 1, "problem": 2}
    lines = []
    for finding in sorted(findings, key=lambda finding: order[finding.level]):
        lines.append(f"{WORDS[finding.level]} {finding.check}: {finding.text}")
        if finding.mend:
            lines.append(f"        {finding.mend}")
    counts = Counter(finding.level for finding in findings)
    verdict = "not ready" if counts["problem"] else "ready"
    return "\n".join([*lines, f"{verdict}: {ranks.world} rank(s) on {ranks.device.type}, "
                              f"{counts['problem']} problem(s), {counts['warning']} warning(s)"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--per-node", type=whole_number, metavar="GPUS", help="GPUs a node (default: of this node)")
    parser.add_argument("--intra", type=positive, metavar="GB/S", help="expected between two ranks of a node (default: "
                        "NVLink's nominal speed, where it is known)")
    parser.add_argument("--inter", type=positive, metavar="GB/S", help="expected between ranks of two nodes (default: "
                        "only compared with each other)")
    parser.add_argument("--megabytes", type=whole_number, default=256, help="a rank writes to try the disk (default: "
                        "%(default)s)")
    parser.add_argument("--timeout", type=whole_number, default=120, metavar="SECONDS", help="to wait for other ranks "
                        "(default: %(default)s)")
    return parser


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

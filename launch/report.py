"""What a training run leaves behind: a table for the terminal, results.json and two plots."""
from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from launch.metrics import averages, strict_json
from launch.storage import sync

NAMES = {"muse": "MuSe", "exact": "exact attention", "near": "near field only"}
COLOURS = {"muse": "tab:blue", "exact": "black", "near": "tab:orange"}


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write loss.png (loss by step), positions.png (held-out loss by position in the context) and results.json.

    That comes last, and whole or not at all: with it a run has its report.
    """
    plot_loss(results).savefig(folder / "loss.png", dpi=150)
    plot_positions(results).savefig(folder / "positions.png", dpi=150)
    partial = folder / "results.partial"
    partial.write_text(strict_json(results, indent=1) + "\n")
    sync(partial)
    partial.replace(folder / "results.json")


def table(results: dict[str, Any]) -> str:
    """The results in a dozen lines of text. Losses are in nats a token, times in seconds."""
    train, data, history = results["config"]["train"], results["config"]["data"], results["history"]
    steps, total = len(history["seconds"]), sum(history["seconds"])
    pace = "" if not steps else (f" in {total:.0f} s: {total / steps:.3f} s a step, "
                                 f"{steps * train['batch'] * data['context'] / total:,.0f} tokens/s")
    rows = [("", "loss", "far loss", "step")]
    for name, label in _labels(results).items():
        far = results["far_loss"][name]
        rows.append((label, f"{results['loss'][name]:.4f}", "-" if far is None else f"{far:.4f}",
                     f"{results['step_seconds'][name]:.3f} s"))
    rows.append(("no context: unigram entropy", f"{results['unigram_entropy']:.4f}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [row[0].ljust(widths[0]) + "".join(cell.rjust(width + 3) for cell, width in zip(row[1:], widths[1:]))
             for row in rows]
    return "\n".join([
        f"{results['parameters']:,} parameters, {train['steps']} steps of {train['batch']} x {data['context']} tokens"
        f"{pace} on {results['ranks']} x {results['device']}",
        f"held-out text, {data['held_out_sequences']} sequences, nats a token"
        f"{'' if data['path'] else ' (one byte each)'}:", *(
            line.rstrip() for line in lines),
        f"far loss: tokens from position {results['near_reach']} on, which have a far field; "
        "step: forward and backward of one batch"
        + (f"; as trained on {results['ranks']} ranks" + (", the others on one" if len(results["loss"]) > 1 else "")
           if results["ranks"] > 1 else ""),
        *_rank_lines(results)])


def _labels(results: dict[str, Any]) -> dict[str, str]:
    """What to call each attention that was measured."""
    trained = results["config"]["train"]["attention"]
    return {name: f"{text}, as trained" if name == trained else f"same weights, {text}"
            for name, text in NAMES.items() if name in results["loss"]}


def _rank_lines(results: dict[str, Any]) -> list[str]:
    """What the ranks exchange, and how the first steps compare with one rank's."""
    if not results["first_steps"]:
        return []
    traffic = {name: sum(parts.values()) for name, parts in results["first_steps"]["traffic"].items()}
    lines = ["", "received by a rank a step:"]
    if "moments" in traffic:
        halo = sum(count for name, count in results["first_steps"]["traffic"]["moments"].items() if "halo" in name)
        lines.append(f"  moments         {traffic['moments']:>12,} bytes, of which halo and sinks {halo:,}")
    lines += [f"  kv              {traffic['kv']:>12,} bytes",
             f"  ring attention  {traffic['ring']:>12,} bytes (predicted)",
             "loss of the first steps from the same seed:"]
    return lines + [f"  {name:<16}" + "".join(f"{loss:>14.9f}" for loss in losses)
                    for name, losses in results["first_steps"]["loss"].items()]


def plot_loss(results: dict[str, Any]) -> Figure:
    """Training loss by step, raw and averaged, with the held-out loss and the unigram entropy as lines."""
    loss = np.asarray(results["history"]["loss"])
    window, means = averages(loss)
    figure, axes = _axes("step", "loss (nats a token)", f"{results['name']}: training loss")
    axes.plot(np.arange(1, len(loss) + 1), loss, color=COLOURS["muse"], alpha=0.3, label="every step")
    if means:
        axes.plot(np.arange(window, len(loss) + 1), means, color=COLOURS["muse"], label=f"mean of {window} steps")
    axes.axhline(results["loss"][results["config"]["train"]["attention"]], color="tab:green", linestyle="--",
                 label="held-out text, at the end")
    axes.axhline(results["unigram_entropy"], color="grey", linestyle=":", label="unigram entropy")
    axes.legend()
    return figure


def plot_positions(results: dict[str, Any]) -> Figure:
    """Held-out loss by position in the context, averaged over ever longer stretches."""
    figure, axes = _axes("position in the context (tokens)", "loss (nats a token)",
                         f"{results['name']}: held-out loss by position")
    for name, label in _labels(results).items():
        centres, means = by_position(results["position_loss"][name])
        axes.plot(centres, means, color=COLOURS[name], marker=".", label=label)
    axes.axvline(results["near_reach"], color="grey", linestyle=":", label="the far field begins")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")  # powers are set in fonts that not every installation has
    axes.legend()
    return figure


def by_position(losses: list[float], per_octave: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Means over stretches whose lengths grow with the position: (their middle positions, the mean losses)."""
    octaves = int(np.log2(len(losses)))
    edges = np.unique(np.append(2 ** (np.arange(octaves * per_octave + 1) / per_octave), len(losses)).astype(int) - 1)
    edges[-1] = len(losses)
    means = np.array([np.mean(losses[low:high]) for low, high in pairwise(edges)])
    return (edges[:-1] + edges[1:] + 1) / 2, means


def _axes(x: str, y: str, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    return figure, axes

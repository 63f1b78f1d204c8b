"""Figures of the attention benchmark."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write time.png, time against tokens, and error.png, error against time; rows without times are left out."""
    measured = [row for row in rows if "both" in row]
    if not measured:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(measured, folder / "time.png", _times), _write(measured, folder / "error.png", _errors)]


def _write(rows: Sequence[Row], path: Path, draw: Any) -> Path:
    """A panel for each head dim and number of key/value heads, with a line a variant in the same colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(row["dim"], row["kv_heads"]) for row in rows})
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        here = [row for row in rows if (row["dim"], row["kv_heads"]) == panel]
        for number, name in enumerate(names):
            points = sorted((row for row in here if row["variant"] == name), key=lambda row: row["tokens"])
            if points:
                draw(axes, points, label=name, color=f"C{number % 10}", marker="os^vD*"[number // 10 % 6])
        axes.set_title(_title(here[0]))
        axes.grid(True, which="both", alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _title(row: Row) -> str:
    ranks = f", {row['ranks']} ranks" if row["ranks"] > 1 else ""
    return (f"{row['heads']} heads of {row['dim']}, {row['kv_heads']} key/value heads, {row['dtype']}, "
            f"{'causal' if row['causal'] else 'acausal'}{ranks}\n{row['device']}")


def _times(axes: Any, points: Sequence[Row], **style: Any) -> None:
    middle = [1e3 * row["both"]["median"] for row in points]
    reach = [[abs(1e3 * row["both"][end] - value) for row, value in zip(points, middle)] for end in ("low", "high")]
    axes.errorbar([row["tokens"] for row in points], middle, yerr=reach, capsize=2, **style)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="tokens", ylabel="forward + backward, ms (median, 10th to 90th percentile)")
    _label(axes.xaxis, lambda tokens, _: f"{tokens / 1024:g}k")
    _label(axes.yaxis, lambda value, _: f"{value:g}")


def _errors(axes: Any, points: Sequence[Row], **style: Any) -> None:
    points = [row for row in points if row.get("error")]
    axes.plot([1e3 * row["both"]["median"] for row in points], [row["error"]["out"] for row in points],
              linestyle=":", **style)
    for row in points:
        axes.annotate(f"{row['tokens'] / 1024:g}k", (1e3 * row["both"]["median"], row["error"]["out"]),
                      fontsize="x-small", textcoords="offset points", xytext=(4, 3))
    axes.set(xscale="log", yscale="log", xlabel="forward + backward, ms", ylabel="relative squared error of the output")
    for axis in (axes.xaxis, axes.yaxis):
        _label(axis, lambda value, _: f"{value:g}")


def _label(axis: Any, text: Any) -> None:
    """Plain numbers at the major ticks: powers of ten are set in fonts that not every installation has."""
    axis.set_major_formatter(text)
    axis.set_minor_formatter("")

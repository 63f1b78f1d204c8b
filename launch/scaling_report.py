"""Tables and plots of a scaling sweep."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.metrics import AVERAGED, averages, strict_json

Row = dict[str, Any]
POINTS_APART = 5.0  # an axis whose largest value is more than so many times its smallest is logarithmic


class Line(NamedTuple):
    """What a line of a plot is of: one colour a group, drawn through for MuSe and dashed for exact attention."""

    group: str
    attention: str
    width: float = 1.8


Series = dict[Line, list[tuple[float, float]]]  # points (x, y)


class Plot(NamedTuple):
    """What a plot shows."""

    title: str
    x: str
    y: str
    series: Callable[[Sequence[Row]], Series]
    dotted: str = ""  # what a dotted line stands for: "ideal" of ranks that lose nothing, "exact" of no difference


def write_report(rows: Sequence[Row], page: Path) -> str:
    """Write the page, and beside it the plots it shows and the rows as JSON lines; the text is returned too.

    PAGE-strong.png: speed-up by ranks at the same context; PAGE-weak.png: tokens/s a rank by ranks at the same tokens
    a rank; PAGE-speed.png: tokens/s a rank by context; PAGE-loss.png: loss by tokens read; PAGE-difference.png: how far
    it is from that of exact attention on the same tokens.
    """
    rows = sorted(rows, key=_place)
    good = [row for row in rows if "failed" not in row]
    bad = [row for row in rows if "failed" in row]
    page.parent.mkdir(parents=True, exist_ok=True)
    plots = [draw(page.with_name(f"{page.stem}-{name}.png"), one, series) for name, one in PLOTS.items()
             if (series := one.series(good))]
    parts = ["# Scaling", "", about(good), "", main_table(good), "",
             "## Strong scaling: the same sequences on more ranks", "", scaling_table(good, strong), "",
             "## Weak scaling: the same tokens a rank", "", scaling_table(good, weak)]
    if bad:
        parts += ["", "## Failed", "", _markdown(["run", "reason"], [[_label(row), row["failed"]] for row in bad])]
    text = "\n".join(parts) + "\n"
    page.write_text(text + "".join(f"\n![{path.stem}]({path.name})\n" for path in plots))
    page.with_suffix(".jsonl").write_text("".join(strict_json(row) + "\n" for row in rows))
    return text


def _place(row: Row) -> tuple[Any, ...]:
    """Where a row stands: small models, short contexts and few ranks first."""
    return row.get("parameters", 0), row["model"], row["context"], row["attention"], row["ranks"]


def about(rows: Sequence[Row]) -> str:
    """What all runs have in common."""
    if not rows:
        return "No run was finished."
    kinds = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
    batches = sorted({row["config"]["train"]["batch"] for row in rows})
    together = max(row["side_by_side"] for row in rows)
    words = [set(row["asked"]["changes"]) for row in rows if "asked" in row]
    common = sorted(word for word in set.intersection(*words) if not word.startswith("data.context=")) if words else []
    counts = sorted({(row["asked"]["steps"], row["asked"]["skip"]) for row in rows if "asked" in row})
    return (f"Measured on {'; '.join(kinds)}. A step reads {' or '.join(map(str, batches))} sequence(s) of `context` "
            "tokens, which all ranks share; its time is the median of the steps after the first ones"
            + "".join(f" ({steps} steps, of which {skip} do not count)" for steps, skip in counts)
            + ". MFU counts the operations the model needs, not those that activation checkpointing repeats. `exact` "
            "is PyTorch's own attention on one rank, and the same kernels on gathered keys and values on several."
            + (f" Besides the files' settings: `{' '.join(common)}`." if common else "")
            + (f" Up to {together} runs stood side by side on one node, on GPUs of their own." if together > 1 else ""))


def log_report(wandb: Any, rows: Sequence[Row], page: Path, folder: Path, mode: str) -> None:
    """The table and the plots of a page that `write_report` wrote, as a run of wandb, which keeps its files in folder.

    Args:
        wandb: the module; mode: "offline" or "online".
    """
    good = [row for row in rows if "failed" not in row]
    head, lines = _main_cells(sorted(good, key=_place))
    with wandb.init(project="muse_dist", name=page.stem, mode=mode, dir=str(folder), job_type="scaling") as run:
        run.log({"runs": wandb.Table(columns=head, data=lines), **{
            name: wandb.Image(str(page.with_name(f"{page.stem}-{name}.png"))) for name, one in PLOTS.items()
            if one.series(good)}})


def main_table(rows: Sequence[Row]) -> str:
    """All runs."""
    return _markdown(*_main_cells(rows))


def _main_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of all runs."""
    lines = []
    for row in rows:
        use, memory = row.get("flop_utilisation"), row["memory_bytes"]
        lines.append([row["model"], f"{row['context']}", f"{row['ranks']}", row["attention"], f"{row['seconds']:.3f}",
                      f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / row['ranks']:,.0f}",
                      "-" if use is None else f"{use:.1%}", "-" if memory is None else f"{memory / 2**30:.2f}",
                      f"{row['received_bytes'] / 2**20:,.1f}", f"{row['losses'][-1]:.3f}" if row["losses"] else "-",
                      "-" if row["held_out"] is None else f"{row['held_out']:.4f}"])
    return ["model", "context", "ranks", "attention", "step s", "tokens/s", "a rank", "MFU", "GiB a rank",
            "MiB received", "last loss", "held out"], lines


def strong(row: Row) -> tuple[Any, ...]:
    """Runs with this in common do the same work on different ranks."""
    return row["model"], row["attention"], row["context"]


def weak(row: Row) -> tuple[Any, ...]:
    """Runs with this in common give each rank the same tokens of a sequence."""
    return row["model"], row["attention"], row["context"] / row["ranks"]


def groups(rows: Sequence[Row], key: Callable[[Row], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by what they have in common, by ranks; only groups of several numbers of ranks."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["ranks"]):
        found.setdefault(key(row), []).append(row)
    return {name: group for name, group in found.items() if len({row["ranks"] for row in group}) > 1}


def speedup(row: Row, first: Row) -> float:
    """Tokens/s over those of the run on the fewest ranks."""
    return row["tokens_per_second"] / first["tokens_per_second"]  # type: ignore[no-any-return]


def scaling_table(rows: Sequence[Row], key: Callable[[Row], tuple[Any, ...]]) -> str:
    """Speed-up and efficiency over the fewest ranks of each group."""
    lines = []
    for (model, attention, _), group in sorted(groups(rows, key).items()):
        for row in group:
            gain = speedup(row, group[0])
            share = gain * group[0]["ranks"] / row["ranks"]
            lines.append([model, attention, f"{row['context']}", f"{row['ranks']}", f"{row['seconds']:.3f}",
                          f"{gain:.2f}x", f"{share:.0%}"])
    if not lines:
        return "No runs to compare: they need several --ranks."
    return _markdown(["model", "attention", "context", "ranks", "step s", "speed-up", "efficiency"], lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(head), ["---"] * len(head), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
                     for line in table)


def _group(row: Row) -> str:
    return f"{row['model']}, {row['context']} tokens, {row['ranks']} rank(s)"


def _label(row: Row) -> str:
    return f"{_group(row)}, {row['attention']}"


def _strong_series(rows: Sequence[Row]) -> Series:
    return {Line(f"{model}, {context} tokens", attention): [(row["ranks"], speedup(row, group[0])) for row in group]
            for (model, attention, context), group in groups(rows, strong).items()}


def _weak_series(rows: Sequence[Row]) -> Series:
    return {Line(f"{model}, {local:g} tokens a rank", attention): [
        (row["ranks"], row["tokens_per_second"] / row["ranks"]) for row in group]
        for (model, attention, local), group in groups(rows, weak).items()}


def _speed_series(rows: Sequence[Row]) -> Series:
    found: Series = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        found.setdefault(Line(f"{row['model']}, {row['ranks']} rank(s)", row["attention"]), []).append(
            (row["context"], row["tokens_per_second"] / row["ranks"]))
    return found


def _loss_series(rows: Sequence[Row]) -> Series:
    """Lines of more ranks, which should be the same, are thinner and lie upon the others."""
    return {_loss_line(row): _averages(row["losses"], row["tokens"]) for row in rows if row["losses"]}


def _difference_series(rows: Sequence[Row]) -> Series:
    """Of runs beside one with exact attention that read the same tokens in the same steps."""
    exact = {_batches(row): row["losses"] for row in rows if row["attention"] == "exact"}
    return {_loss_line(row): _averages([a - b for a, b in zip(row["losses"], exact[_batches(row)])], row["tokens"])
            for row in rows if row["losses"] and row["attention"] != "exact" and _batches(row) in exact}


def _batches(row: Row) -> tuple[Any, ...]:
    """Runs with this in common read the same tokens in the same steps, at the same learning rates."""
    train, data = row["config"]["train"], row["config"]["data"]
    return (row["parameters"], row["context"], row["ranks"], row["tokens"], len(row["losses"]), data["path"],
            *(train.get(name) for name in ("seed", "lr", "warmup")))


def _loss_line(row: Row) -> Line:
    return Line(_group(row), row["attention"], 1 + 2.5 / row["ranks"])


def _averages(values: Sequence[float], tokens: int) -> list[tuple[float, float]]:
    """(tokens read, mean of the last steps), `tokens` a step."""
    window, means = averages(values)
    return [(step * tokens, mean) for step, mean in enumerate(means, window)]


PLOTS = {
    "strong": Plot("Strong scaling: the same sequences on more ranks", "ranks", "speed-up over the fewest ranks",
                   _strong_series, "ideal"),
    "weak": Plot("Weak scaling: the same tokens a rank", "ranks", "tokens/s a rank", _weak_series),
    "speed": Plot("Speed by the length of sequences", "context (tokens)", "tokens/s a rank", _speed_series),
    "loss": Plot(f"Loss by tokens read, mean of 1/{AVERAGED} of the steps", "tokens read", "loss (nats a token)",
                 _loss_series),
    "difference": Plot(f"Loss less that of exact attention on the same tokens, mean of 1/{AVERAGED} of the steps",
                       "tokens read", "difference (nats a token)", _difference_series, "exact"),
}


def draw(path: Path, plot: Plot, series: Series) -> Path:
    """A plot as a PNG, its legend beside it. Steps of a training run are a plain line, everything else has marks."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    order = list(dict.fromkeys(line.group for line in series))
    colours = {group: f"C{i}" if len(order) <= 10 else colormaps["turbo"](i / (len(order) - 1))
               for i, group in enumerate(order)}
    figure = Figure(figsize=(11, max(5.0, 1 + 0.2 * len(series))), layout="constrained")
    axes = figure.subplots()
    steps = plot.x == "tokens read"
    for line, points in sorted(series.items(), key=lambda item: (item[0].attention == "exact", -item[0].width)):
        muse = line.attention != "exact"
        axes.plot(*zip(*points), label=f"{line.group}, {line.attention}", color=colours[line.group],
                  linewidth=line.width, linestyle="-" if muse else "--",
                  marker="" if steps else "o" if muse else "s")
    if not steps:
        _scales(axes, series, plot.dotted)
    elif plot.dotted:
        axes.axhline(0.0, color="black", linewidth=1, linestyle=":", label=plot.dotted)
    axes.set(xlabel=plot.x, ylabel=plot.y, title=plot.title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small", handlelength=4)
    figure.savefig(path, dpi=130)
    return path


def _scales(axes: Any, series: Series, ideal: str) -> None:
    """Powers of two along x; y from zero, or logarithmic; `ideal` labels a line of ranks that lose nothing."""
    from matplotlib.ticker import LogLocator

    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    if ideal and len({points[0][0] for points in series.values()}) == 1:
        axes.plot(xs, [x / xs[0] for x in xs], color="black", linewidth=1, linestyle=":", label=ideal)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.set_xticks([], minor=True)
    if max(ys) > POINTS_APART * min(ys):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter("")
    elif not ideal:
        axes.set_ylim(bottom=0)

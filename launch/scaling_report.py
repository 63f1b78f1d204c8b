"""Tables and plots of a scaling sweep."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]  # points (x, y) by label


def write_report(rows: Sequence[Row], page: Path) -> str:
    """Write the page, and beside it the plots it shows and the rows as JSON lines; the text is returned too.

    PAGE-strong.png: speed-up by ranks at the same context; PAGE-weak.png: tokens/s a rank by ranks at the same tokens
    a rank; PAGE-speed.png: tokens/s a rank by context; PAGE-loss.png: loss by tokens read.
    """
    rows = sorted(rows, key=_place)
    good = [row for row in rows if "failed" not in row]
    bad = [row for row in rows if "failed" in row]
    page.parent.mkdir(parents=True, exist_ok=True)
    series = {name: make(good) for name, make in PLOTS.items()}
    plots = [plot(page.with_name(f"{page.stem}-{name}.png"), *found) for name, found in series.items() if found[0]]
    parts = ["# Scaling", "", about(good), "", main_table(good), "",
             "## Strong scaling: the same sequences on more ranks", "", scaling_table(good, strong), "",
             "## Weak scaling: the same tokens a rank", "", scaling_table(good, weak)]
    if bad:
        parts += ["", "## Failed", "", _markdown(["run", "reason"], [[_label(row), row["failed"]] for row in bad])]
    text = "\n".join(parts) + "\n"
    page.write_text(text + "".join(f"\n![{path.stem}]({path.name})\n" for path in plots))
    page.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
            name: wandb.Image(str(page.with_name(f"{page.stem}-{name}.png"))) for name, make in PLOTS.items()
            if make(good)[0]}})


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
                      f"{row['received_bytes'] / 2**20:,.1f}", f"{row['losses'][-1]:.3f}" if row["losses"] else "-"])
    return ["model", "context", "ranks", "attention", "step s", "tokens/s", "a rank", "MFU", "GiB a rank",
            "MiB received", "last loss"], lines


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
    return _markdown(["model", "attention", "context", "ranks", "step s", "tokens/s", "efficiency"], lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(head), ["---"] * len(head), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
                     for line in table)


def _label(row: Row) -> str:
    return f"{row['model']}, {row['context']} tokens, {row['ranks']} rank(s), {row['attention']}"


def _strong_series(rows: Sequence[Row]) -> tuple[Series, str, str]:
    return {f"{model}, {attention}, {context} tokens": [(row["ranks"], speedup(row, group[0])) for row in group]
            for (model, attention, context), group in groups(rows, strong).items()}, "ranks", "speed-up"


def _weak_series(rows: Sequence[Row]) -> tuple[Series, str, str]:
    return {f"{model}, {attention}, {local:g} tokens a rank": [
        (row["ranks"], row["tokens_per_second"] / row["ranks"]) for row in group]
        for (model, attention, local), group in groups(rows, weak).items()}, "ranks", "tokens/s a rank"


def _speed_series(rows: Sequence[Row]) -> tuple[Series, str, str]:
    found: Series = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        found.setdefault(f"{row['model']}, {row['attention']}, {row['ranks']} rank(s)", []).append(
            (row["context"], row["tokens_per_second"] / row["ranks"]))
    return found, "context (tokens)", "tokens/s a rank"


def _loss_series(rows: Sequence[Row]) -> tuple[Series, str, str]:
    return {_label(row): [((step + 1) * row["tokens"], loss) for step, loss in enumerate(row["losses"])]
            for row in rows if row["losses"]}, "tokens read", "loss (nats a token)"


PLOTS = {"strong": _strong_series, "weak": _weak_series, "speed": _speed_series, "loss": _loss_series}


def plot(path: Path, series: Series, x: str, y: str) -> Path:
    """Lines by label into a PNG. Steps of a training run are a plain line, everything else has marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(series.items()):
        axes.plot(*zip(*points), label=label, color=f"C{number % 10}", linestyle=("-", "--", ":")[number // 10 % 3],
                  marker="" if x == "tokens read" else ("o", "s", "^")[number // 10 % 3])
    if x != "tokens read":
        axes.set_xscale("log", base=2)
        ticks = sorted({point[0] for points in series.values() for point in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize="x-small", handlelength=4)
    figure.savefig(path, dpi=130)
    return path

"""What one run of a scaling sweep has measured."""
from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.config import ModelConfig
from launch.metrics import read_metrics
from launch.plan_model import Shape

Row = dict[str, Any]


def measured(folder: Path, skip: int) -> Row:
    """A finished run of launch.train; arguments and errors as `speed_row`."""
    results = json.loads((folder / "results.json").read_text())
    config, rows = results["config"], read_metrics(folder / "metrics.jsonl")
    return {**speed_row(rows, skip, config, results["parameters"]), "losses": [row["loss"] for row in rows],
            "held_out": results["loss"].get(config["train"]["attention"]), "torch": results["torch"]}


def speed_row(rows: Sequence[Row], skip: int, config: Row, parameters: int) -> Row:
    """What the metrics of a run's steps say: medians over the steps after the first `skip`, and the most memory.

    Raises:
        ValueError: there are no steps after these.
    """
    counted = [row for row in rows if row["step"] > skip]
    if not counted:
        raise ValueError(f"--skip {skip} leaves none of the {len(rows)} steps; take more --steps")
    seconds = sorted(row["seconds"] for row in counted)
    tokens, middle = config["train"]["batch"] * config["data"]["context"], statistics.median(seconds)
    return {"steps": len(rows), "tokens": tokens, "seconds": middle, "fastest": seconds[0], "slowest": seconds[-1],
            "first_step": rows[0]["seconds"], "tokens_per_second": tokens / middle,
            "memory_bytes": max(row["memory_bytes"] for row in rows),
            "received_bytes": counted[-1]["received_bytes"], "stages": _medians([row["stages"] for row in counted]),
            "flop_utilisation": _median([row.get("flop_utilisation") for row in counted]),
            "losses": [], "held_out": None, "torch": torch.__version__, "parameters": parameters,
            "vocabulary": _vocabulary(ModelConfig(**config["model"]), parameters), "config": config}


def _vocabulary(model: ModelConfig, parameters: int) -> int:
    """Tokens of the embedding, which may be the data's: what is left of the parameters without the layers."""
    rest = Shape(model.layers, model.width, model.heads, model.kv_heads, model.mlp, 0).parameters
    return (parameters - rest) // model.width


def _medians(tables: list[dict[str, float]]) -> dict[str, float]:
    names = {name for table in tables for name in table}
    return {name: statistics.median(table.get(name, 0.0) for table in tables) for name in sorted(names)}


def _median(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None

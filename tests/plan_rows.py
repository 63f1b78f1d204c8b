"""Rows as launch.bench and launch.scaling write them, of a made-up GPU whose rates are known."""
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np

from launch.config import RunConfig
from launch.plan_attention import Case
from launch.plan_machine import known_machine
from launch.plan_rates import assumed_rates, layer_seconds
from launch.plan_step import predict, scaling_step
from muse_dist import MuseConfig

H200 = known_machine("H200", 8, 50e9)


def true_rates():
    """Rates that are not the assumed ones."""
    rates, rng = assumed_rates(H200), np.random.default_rng(1)

    def other(table):
        return {name: value * rng.uniform(0.4, 2.5) for name, value in sorted(table.items())}

    return replace(rates, forward=other(rates.forward), backward=other(rates.backward), step=other(rates.step),
                   hidden=0.5)


def layer_row(case, rates, noise, **more):
    forward, backward = (seconds * noise() for seconds in layer_seconds(case, rates))
    return {"benchmark": "attention", "variant": "flash" if case.muse is None else "muse", "heads": case.heads,
            "kv_heads": case.kv_heads, "dim": case.dim, "tokens": case.tokens, "causal": True, "ranks": 1,
            "layout": "contiguous", "device": "NVIDIA H200", "check": {"passed": True},
            "config": None if case.muse is None else json.loads(case.muse.encoded),
            "forward": {"median": forward}, "backward": {"median": backward}, **more}


def made_rows(noise):
    """Rows as the benchmarks write them, of a GPU whose rates are `true_rates`."""
    rates = true_rates()
    settings = [None, MuseConfig.fast(), MuseConfig.accurate(), MuseConfig()]
    rows = [layer_row(Case(16, heads, 64, tokens, muse), rates, noise) for muse in settings
            for tokens in (16384, 32768, 65536, 131072, 262144) for heads in (16, 4)]
    rows += [layer_row(Case(16, 16, 64, 65536, MuseConfig.fast()), rates, lambda: 9.0, **bad) for bad in (
        {"failed": "out of memory"}, {"check": {"passed": False}}, {"causal": False}, {"device": "NVIDIA A100"})]
    for layers, width in ((12, 768), (24, 1024), (16, 2048)):
        for context in (16384, 65536, 131072):
            for attention in ("muse", "exact"):
                rows.append(step_row(layers, width, context, attention, rates, noise))
    return rows


def step_row(layers, width, context, attention, rates, noise):
    model = {"layers": layers, "width": width, "heads": width // 64, "kv_heads": width // 64, "mlp": 3 * width,
             "rope_theta": 1e4, "vocabulary": 0}
    train = {"batch": 2, "micro_batch": 1, "recompute": width > 1000, "context_parallel": 0}
    row = {"benchmark": "scaling", "model": f"{layers}x{width}", "attention": attention, "context": context, "ranks": 1,
           "vocabulary": 50304, "device": "NVIDIA H200", "memory_bytes": 10 ** 10,
           "config": {"model": model, "train": train, "data": {"context": context},
                      "muse": json.loads(MuseConfig.fast().encoded)}}
    setup = scaling_step({**row, "seconds": 1.0}).setup
    return {**row, "seconds": predict(setup, H200, rates).seconds * noise()}


def sweep_rows(noise, rates):
    """One layer's lengths, and a sweep over models, contexts and ranks, as they are measured on one node.

    The layers of other heads are not there, nor any on several ranks.
    """
    layers = [layer_row(Case(16, 16, 64, tokens, muse), rates, noise) for muse in (None, MuseConfig.fast())
              for tokens in (16384, 32768, 65536, 131072, 262144)]
    rows = []
    for path, context, ranks, attention in product(("1b", "350m", "125m"), (65536, 16384), (1, 2, 4),
                                                   ("muse", "exact")):
        config = RunConfig.from_toml(Path(__file__).parents[1] / "configs" / f"{path}.toml", changes={
            "data.context": context, "train.batch": 1, "train.shard": False, "train.attention": attention})
        row = {"benchmark": "scaling", "model": path, "attention": attention, "context": context, "ranks": ranks,
               "vocabulary": config.model.vocabulary, "device": "NVIDIA H200", "memory_bytes": 10 ** 10,
               "config": json.loads(json.dumps(asdict(config)))}
        setup = scaling_step({**row, "seconds": 1.0}).setup
        rows.append({**row, "seconds": predict(setup, H200, rates).seconds * noise()})
    return layers + rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""Swap the attention of a trained model without retraining: what it costs in loss, and the error of every layer.

    python -m launch.evaluate --model DIR --preset fast accurate --tokens 16384 --windows 4
    python -m launch.evaluate --model DIR --variants all --block 2048 --set opened=8

One row a variant: mean loss over the windows, its increase over exact attention in nats, and for every layer the
relative squared error of the attention output, |approximate - exact|^2 / |exact|^2. The errors are those on the exact
model's own q, k and v: in one exact pass each layer runs every variant beside exact attention and passes the exact
result on. The losses come from a pass a variant with the variant in every layer.

DIR is a folder written by `save_pretrained`, or one with a `load.py` that has `model(**config)`, a transformers model,
and `tokens(n, at)`, n consecutive validation tokens int64 [1, n]. Window w starts at token w * tokens.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from launch.ablations import Variant, across_ranks, ladder
from launch.options import dtype_of, pick_device, setting
from launch.trained import cut, load
from muse_dist import MuseConfig
from muse_dist.config import PRESETS
from muse_dist.huggingface import register
from muse_dist.layout import LayoutName

LOGIT_ROWS = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Row:
    """Results of one variant; losses in nats a token, one squared error a layer."""

    variant: Variant
    exact_loss: float
    loss: float
    layer_errors: list[float]

    @property
    def increase(self) -> float:
        return self.loss - self.exact_loss


def evaluate(
    model: PreTrainedModel, windows: Sequence[Tensor], variants: Sequence[Variant],
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Measure variants in a causal decoder, a row as soon as it is known.

    Args:
        model: in evaluation mode; its attention implementation is left changed.
        windows: int64 [1, T + 1] each: T tokens to read, and the token after each to predict.
        tick: called after every attention that has run: `attention_calls` times in all.
    """
    exact_loss, errors = _exact_pass(model, windows, variants, tick)
    for variant, layer_errors in zip(variants, errors.T.tolist(), strict=True):
        loss = _mean_loss(model, windows, variant.config, _then(variant.function, tick))
        yield Row(variant, exact_loss, loss, layer_errors)


def attention_calls(layers: int, windows: int, variants: int) -> int:
    """How often `evaluate` calls `tick`."""
    return layers * windows * (1 + 2 * variants)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, **_: object) -> Tensor:
    """Causal softmax attention. Key/value heads are repeated: only so do all of PyTorch's fast kernels take them."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _exact_pass(
    model: PreTrainedModel, windows: Sequence[Tensor], variants: Sequence[Variant], tick: Callable[[], object]
) -> tuple[float, Tensor]:
    """The exact loss, and the squared errors [layers, variants] of the variants on the exact q, k and v."""
    calls: list[Tensor] = []  # one a layer and window: squared errors of the variants, then the squared norm

    def probe(q: Tensor, k: Tensor, v: Tensor, *, config: MuseConfig, scale: float | None) -> Tensor:
        exact = _then(exact_attention, tick)(q, k, v, scale=scale)
        outputs = (_then(variant.function, tick)(q, k, v, config=variant.config, scale=scale) for variant in variants)
        errors = [(output.double() - exact.double()).square().sum() for output in outputs]
        calls.append(torch.stack([*errors, exact.double().square().sum()]))
        return exact

    loss = _mean_loss(model, windows, MuseConfig(), probe)
    sums = torch.stack(calls).unflatten(0, (len(windows), -1)).sum(0).cpu()
    return loss, sums[:, :-1] / sums[:, -1:]


def _then(function: Callable[..., Tensor], tick: Callable[[], object]) -> Callable[..., Tensor]:
    def run(*tensors: Tensor, **options: Any) -> Tensor:
        out = function(*tensors, **options)
        tick()
        return out

    return run


@torch.no_grad()
def _mean_loss(
    model: PreTrainedModel, windows: Sequence[Tensor], config: MuseConfig, function: Callable[..., Tensor]
) -> float:
    """Mean loss of the windows in nats with `function` as the attention of every layer."""
    register(config, "muse-evaluated", function)
    model.set_attn_implementation("muse-evaluated")
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for window in windows:
        ids = window.to(model.device)
        hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state
        for rows, labels in zip(hidden[0].split(LOGIT_ROWS), ids[0, 1:].split(LOGIT_ROWS), strict=True):
            total += F.cross_entropy(model.get_output_embeddings()(rows).float(), labels, reduction="sum")
    return total.item() / sum(window.shape[1] - 1 for window in windows)


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise `ValueError` if the model's logits for `ids` [1, n] are not its output embeddings' of the hidden states."""
    ids = ids.to(model.device)
    plain = model.get_output_embeddings()(model.base_model(ids, use_cache=False).last_hidden_state)
    if (model(ids, use_cache=False).logits - plain).norm() > 0.01 * plain.norm():
        raise ValueError(f"{type(model).__name__} changes its logits after the output embeddings (a cap or a scale); "
                         "models that do are not supported")


# ----------------------------------------------------------------------------------------------------------- command


def chosen_variants(options: argparse.Namespace) -> list[Variant]:
    """The presets and ablations that the command line asks for; the presets if it asks for nothing."""
    changes = dict(map(setting, options.set))
    if options.block is not None:
        changes["block"] = options.block
    names = options.preset if options.preset or options.variants else PRESETS
    chosen = [Variant(name, "preset", MuseConfig.from_dict({"preset": name, **changes})) for name in names]
    if options.variants:
        steps = ladder(MuseConfig.from_dict({"block": 2048, **changes}))
        known = [step.name for step in steps]
        wanted = known if "all" in options.variants else options.variants
        for name in wanted:
            if name not in known:
                raise ValueError(f"--variants {name}: unknown; known are {', '.join(known)} and all")
        chosen += [step for step in steps if step.name in wanted]
    if options.ranks > 1:
        if options.variants:
            raise ValueError("--ranks: goes with presets, not with --variants")
        return [row for preset in chosen for row in across_ranks(preset, options.ranks, options.layout)]
    return chosen


def _command(options: argparse.Namespace, variant: Variant) -> str:
    """The command that prints the row of one variant."""
    words = ["python", "-m", "launch.evaluate", "--model", str(options.model)]
    words += ["--text", *map(str, options.text)] if options.text else []
    words += ["--variants" if options.variants and variant.about != "preset" else "--preset", variant.name.split()[0]]
    words += ["--ranks", str(options.ranks), "--layout", options.layout] if options.ranks > 1 else []
    words += ["--tokens", str(options.tokens), "--windows", str(options.windows)]
    words += ["--block", str(options.block)] if options.block is not None else []
    words += [word for text in options.set for word in ("--set", text)]
    for name in ("device", "dtype"):
        words += [f"--{name}", getattr(options, name)] if getattr(options, name) != "auto" else []
    return shlex.join(words)


def _line(name: str, loss: str, increase: str, layers: Sequence[str], about: str) -> str:
    line = f"{name:<20}{loss:>8}{increase:>10}  " + "".join(f"{layer:>9}" for layer in layers) + f"   {about}"
    return line.rstrip()


def _row_line(row: Row) -> str:
    return _line(row.variant.name, f"{row.loss:.4f}", f"{row.increase:+.4f}", [f"{e:.1e}" for e in row.layer_errors],
                 row.variant.about)


def _record(row: Row, options: argparse.Namespace, model: PreTrainedModel) -> str:
    return json.dumps({
        "variant": row.variant.name, "about": row.variant.about, "model": str(options.model), "tokens": options.tokens,
        "windows": options.windows, "device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
        "exact_loss": row.exact_loss, "loss": row.loss, "increase": row.increase, "layer_errors": row.layer_errors,
        "ranks": options.ranks, "layout": options.layout,
        "config": dataclasses.asdict(row.variant.config), "command": _command(options, row.variant)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the trained model")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                        help="text to read with a save_pretrained model (default for byte-level models: the held-out "
                             "files of Python's standard library)")
    parser.add_argument("--preset", nargs="+", default=[], choices=PRESETS, help="presets of MuseConfig (default: all)")
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME",
                        help=f"ablations: {', '.join(v.name for v in ladder(MuseConfig()))}, or all")
    parser.add_argument("--ranks", type=int, default=1,
                        help="also split the sequence over this many emulated ranks, under each exchange mode")
    parser.add_argument("--layout", choices=get_args(LayoutName), default="contiguous", help="of the emulated ranks")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="consecutive windows (default: %(default)s)")
    parser.add_argument("--block", type=int, help="block size (default: the preset's; 2048 for ablations)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="another field of MuseConfig; repeat for more")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the model and its attention (default: float32 on the CPU, bfloat16 on a GPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a row to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the head of this file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if min(options.tokens, options.windows, options.ranks) < 1:
            raise ValueError("--tokens, --windows and --ranks must be at least 1")
        device = pick_device(options.device)
        variants = chosen_variants(options)
        model, tokens = load(options.model, options.text)
        windows = cut(tokens, options.windows, options.tokens)
        model = model.to(device=device, dtype=dtype_of(options.dtype, device))  # type: ignore[call-arg]
        check_head(model, windows[0][:, :64])
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    layers = model.config.num_hidden_layers
    calls = attention_calls(layers, len(windows), len(variants))
    with tqdm(total=calls, unit="layer", dynamic_ncols=True, disable=None) as bar:
        for i, row in enumerate(evaluate(model, windows, variants, bar.update)):
            if i == 0:
                names = [f"layer {n}" for n in range(layers)]
                bar.write(_line("variant", "loss", "+ nats", names, "relative squared error of each layer's output"))
                bar.write(_line("exact", f"{row.exact_loss:.4f}", "", [""] * layers, ""))
            bar.write(_row_line(row))
            sys.stdout.flush()
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(_record(row, options, model) + "\n")
    print("\neach row by itself:", *dict.fromkeys(_command(options, variant) for variant in variants), sep="\n")


if __name__ == "__main__":
    main()

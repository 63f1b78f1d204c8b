"""DeepSpeed: one section `"muse"` in the JSON config.

    engine, optimizer, _, _ = muse_dist.deepspeed.initialize(model=model, config="ds.json")
    with muse_dist.deepspeed.running(engine):
        for tokens in batches:                                   # whole sequences, seeded by engine.muse.data_rank
            inputs, labels = engine.muse.shard(tokens)
            loss = engine.muse.loss(engine(**inputs).logits, labels)
            engine.backward(loss)
            engine.step()

A model of Hugging Face transformers gets MuSe installed. A model of your own is built with the layer, so the ranks come
first:

    parallel = muse_dist.deepspeed.join("ds.json")
    model = Decoder(attention=parallel.attention())
    engine, *_ = muse_dist.deepspeed.initialize(model=model, config="ds.json", parallel=parallel)

`parallel.deepspeed_config` is the config without the section and "train_batch_size", for
`deepspeed.zero.Init(config_dict_or_path=...)`.
"""
from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muse_dist.comm import Communicator, ProcessGroup
from muse_dist.deepspeed_checkpoint import load, save
from muse_dist.deepspeed_models import install
from muse_dist.deepspeed_ranks import Ranks, is_failed_exchange, join_processes, leave_processes
from muse_dist.deepspeed_section import MuseSection, read_config, without_total
from muse_dist.layer import MuseAttention
from muse_dist.layout import Layout
from muse_dist.sequence_loss import pad_batch, shard_batch, shared_mean_loss

__all__ = ["SharedSequences", "initialize", "join", "load", "running", "save"]

# ZeRO-1 and 2 write checkpoints that can be made universal only for models that say which version of them they know.
UNIVERSAL = {"universal_checkpoint_version": 0.2}
REFUSED = {"mpu": "the groups come from the config", "mesh_param": "the groups come from the config",
           "config_params": "pass config="}


@dataclass(frozen=True)
class SharedSequences:
    """Ranks that share sequences, as `join` returns them; `engine.muse` of an engine that `initialize` returned.

    `loss_weight` is known once there is an engine.
    """

    section: MuseSection
    ranks: Ranks
    deepspeed_config: dict[str, Any]
    loss_weight: float | None = None

    @property
    def group(self) -> ProcessGroup:
        """The ranks that share this rank's sequence."""
        return self.ranks.context

    @property
    def data_rank(self) -> int:
        """Which of `data_size` sequences this rank reads a part of: ranks that share one have the same."""
        return self.ranks.data_rank

    @property
    def data_size(self) -> int:
        return self.ranks.data_size

    def attention(self, scale: float | None = None) -> MuseAttention:
        """The layer, for models of your own: this rank's q [B, H, S, D] and k, v [B, K, S, D] -> [B, H, S, D]."""
        return MuseAttention(self.section.muse, scale, self.group, self.section.layout)

    def shard(
        self, tokens: Tensor, labels: Tensor | None = None, pad_token: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """This rank's part of whole sequences. All ranks that share them must call, with the same.

        Args:
            tokens: int64 [B, N], the whole sequences. labels: int64 [B, N], -100 where a token is not to be learned;
                not shifted. The tokens themselves if None.
            pad_token: pads on the right, without labels, to a length that divides. None: such a length is an error.
        Returns:
            {"input_ids": [B, S], "position_ids": [B, S]} for the model, and the labels [B, S] for `loss`: shifted, so a
            model must not get them. All on the device of this rank.
        Raises:
            ValueError: shapes or lengths that do not fit, or other ranks have other sequences: on every rank.
        """
        labels = tokens if labels is None else labels
        layout, problem = None, None
        try:
            if tokens.dim() != 2 or tokens.shape != labels.shape:
                raise ValueError(f"tokens {list(tokens.shape)} and labels {list(labels.shape)}: must both be [B, N]")
            if pad_token is not None:
                tokens, labels = pad_batch(tokens, labels, self.multiple, pad_token)
            layout = Layout(self.section.layout, self.group.size(), tokens.shape[1], self.section.muse.block)
        except ValueError as error:
            problem = str(error).replace("q: ", "tokens: ")
        tokens, labels = tokens.to(self.ranks.device), labels.to(self.ranks.device)
        self._agree(tokens, labels, problem)
        assert layout is not None
        tokens, labels, positions = shard_batch(tokens, labels, layout, self.ranks.context_rank)
        return {"input_ids": tokens, "position_ids": positions}, labels

    @property
    def multiple(self) -> int:
        """Lengths that the ranks can share are multiples of this many tokens."""
        return Layout(self.section.layout, self.group.size(), 2 * self.group.size() * self.section.muse.block,
                      self.section.muse.block).chunks * self.section.muse.block

    def loss(self, logits: Tensor, labels: Tensor, tokens: float | None = None) -> Tensor:
        """Mean cross entropy in nats over the labelled tokens of this micro-batch on all ranks, data-parallel ones too.

        The number is the same on all ranks, and `engine.backward` of it gives the gradients one process would compute
        from the whole micro-batch, at every ZeRO stage. All ranks must call.

        Args:
            logits: [B, S, V] of this rank. labels: [B, S] as `shard` returned them.
            tokens: divide by this instead. With gradient accumulation micro-batches weigh the same; to weigh every
                token the same, pass the mean number of labelled tokens of the step's micro-batches.
        """
        if self.loss_weight is None:
            raise RuntimeError("loss: the weight of the gradients depends on the ZeRO stage; use engine.muse.loss")
        return shared_mean_loss(logits, labels, self.ranks.sum, self.loss_weight, tokens)

    def _agree(self, tokens: Tensor, labels: Tensor, problem: str | None) -> None:
        """Raise on all ranks that share a sequence if they do not, or if one has a problem."""
        places = torch.arange(1, tokens.numel() + 1, device=tokens.device)
        sums = [int((x.flatten() * places).sum()) if problem is None else 0 for x in (tokens, labels)]
        shape = tokens.shape if problem is None else (0, 0)  # what is exchanged has one length, whatever is wrong
        said = torch.tensor([*shape, *sums, problem is not None], device=tokens.device)
        others = torch.stack(Communicator(self.group).all_gather("check of the batch", said).wait())
        if problem is not None:
            raise ValueError(problem)
        if others[:, -1].any():
            raise ValueError("another rank that shares the sequence could not use its batch; see its message")
        if (others != others[0]).any():
            raise ValueError("tokens: ranks that share a sequence got different ones (or different labels). Give ranks "
                             "with the same engine.muse.data_rank the same batches, as training_data= does")


def join(config: str | Path | Mapping[str, Any]) -> SharedSequences:
    """Join the processes that a launcher started and make the groups of the config's section `"muse"`.

    Every process must call it. Only models that are built with `SharedSequences.attention`, or under
    `deepspeed.zero.Init`, need it; for others `initialize` does it.

    Raises:
        ValueError, TypeError: a config that cannot work, see `muse_dist.deepspeed_section.read_config`.
        ImportError: no DeepSpeed, or no launcher.
    """
    section, rest = read_config(config)
    ranks = join_processes(section.context_parallel_size, section.timeout_seconds)
    return SharedSequences(section, ranks, without_total(rest, ranks.data_size))


def initialize(
    model: nn.Module, config: str | Path | Mapping[str, Any], *, parallel: SharedSequences | None = None, **options: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a config with a section `"muse"`: ranks share sequences, attention is MuSe.

    Args:
        model: of Hugging Face transformers, or one built with `parallel.attention()`.
        config: as DeepSpeed takes it (path, dict, base64), with the section; not changed. The config of `join` if
            `parallel` is given.
        parallel: what `join(config)` returned.
        options: further arguments of `deepspeed.initialize`. `model_parameters` are all that require gradients by
            default; `training_data` is split among data-parallel ranks, so that ranks that share a sequence read it.
    Returns:
        (engine, optimizer, dataloader, lr_scheduler) as DeepSpeed does; `engine.muse` is a `SharedSequences`.
    Raises:
        ValueError, TypeError: a config or model that cannot work, with the fix.
    """
    import deepspeed

    for name, instead in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}: {instead}")
    if getattr(options.get("args"), "deepspeed_config", None) is not None:
        raise ValueError("args.deepspeed_config: pass the path as config= instead, and leave it out of args")
    if isinstance(model, deepspeed.PipelineModule):
        raise TypeError("model: a PipelineModule has no ranks that share sequences; use ZeRO instead")
    if parallel is None:
        parallel = join(config)
    else:
        section, values = read_config(config)
        if (section, without_total(values, parallel.data_size)) != (parallel.section, parallel.deepspeed_config):
            raise ValueError("config: differs from the one given to join(...); give both the same")
    install(model, parallel.section, parallel.group)
    model.universal_checkpoint_info = UNIVERSAL  # type: ignore[assignment]
    options.setdefault("model_parameters", [p for p in model.parameters() if p.requires_grad])
    engine, *rest = deepspeed.initialize(
        model=model, config=copy.deepcopy(parallel.deepspeed_config), mpu=parallel.ranks, dist_init_required=False,
        **options)
    engine.muse = dataclasses.replace(parallel, loss_weight=_loss_weight(parallel.ranks, engine))
    return (engine, *rest)  # type: ignore[return-value]


@contextmanager
def running(engine: Any) -> Iterator[None]:
    """Around a training loop: says clearly when another rank died or hangs, and ends the processes' groups together.

    Raises:
        RuntimeError: with this rank and step, from the error of the exchange that failed.
    """
    try:
        yield
    except Exception as error:
        if not is_failed_exchange(error):
            raise
        ranks, seconds = engine.muse.ranks.everyone, engine.muse.section.timeout_seconds
        raise RuntimeError(
            f"rank {ranks.rank()} of {ranks.size()} stops in step {engine.global_steps + 1}: another rank died, or did "
            f"not answer within {seconds:g} s (muse.timeout_seconds). Start the run again from its last "
            f"checkpoint; the first rank to fail says why. The exchange failed with: {error}") from error
    leave_processes()


def _loss_weight(ranks: Ranks, engine: Any) -> float:
    """Gradients must be summed over the ranks. ZeRO-3 divides them by all ranks, the rest by the data-parallel ones."""
    averaged = ranks.everyone.size() if engine.zero_optimization_stage() == 3 else ranks.data_size
    return float(averaged)

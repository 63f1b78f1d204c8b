"""Train a small decoder of Hugging Face with DeepSpeed and MuSe, saving and resuming: a program to start from.

    torchrun --standalone --nproc-per-node 2 -m launch.deepspeed_example --deepspeed_config configs/deepspeed/tiny.json
    launch/deepspeed.sh runs/deepspeed --num_gpus 2 --module launch.deepspeed_example --out runs/deepspeed
    launch/mpirun.sh -np 2 python -m launch.deepspeed_example

Replace the model and the sequences by yours. Started again it goes on from its last checkpoint.
"""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import DataConfig
from launch.corpus import VOCABULARY, load_corpus
from launch.options import whole_number
from muse_dist.deepspeed import initialize, load, running, save

FINISHED = "finished"  # in the run's folder once all steps are done: launch/deepspeed.sh looks for it


def main(arguments: list[str] | None = None) -> None:
    """The command; see the head of this file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / FINISHED).unlink(missing_ok=True)
        corpus = load_corpus(DataConfig(context=options.tokens))
        engine, *_ = initialize(build_model(options.tokens), options.deepspeed_config)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if options.recompute:
        engine.module.gradient_checkpointing_enable({"use_reentrant": False})
    first = engine.muse.ranks.everyone.rank() == 0
    with running(engine):
        state = load(engine, options.out)
        if state is not None and first:
            print(f"resumed after step {state['step']}", flush=True)
        for step in range(engine.global_steps + 1, options.steps + 1):
            loss = 0.0
            for part in range(engine.gradient_accumulation_steps()):
                # Sequences are numbered; ranks that share one read the same. A resumed run goes on at the next number.
                turn = (step - 1) * engine.gradient_accumulation_steps() + part
                count = engine.train_micro_batch_size_per_gpu()
                number = (turn * engine.muse.data_size + engine.muse.data_rank) * count
                inputs, labels = engine.muse.shard(corpus.sequences(number, count, seed=0)[:, :-1])
                mean = engine.muse.loss(engine(**inputs).logits, labels)
                engine.backward(mean)
                engine.step()
                loss += mean.item() / engine.gradient_accumulation_steps()
            if first:
                _log(options.out, step, loss)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {step} is {loss}; try a smaller learning rate")
            if step % options.save_every == 0 or step == options.steps:
                save(engine, options.out, {"step": step})
        if first:
            (options.out / FINISHED).touch()


def build_model(tokens: int) -> LlamaForCausalLM:
    """Two layers with random weights, the same on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=tokens, use_cache=False))


def _log(folder: Path, step: int, loss: float) -> None:
    print(f"step {step}: loss {loss:.6f} nats", flush=True)
    with (folder / "loss.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.deepspeed_example", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default="configs/deepspeed/tiny.json", metavar="JSON",
                        help="with a section \"muse\" (default: %(default)s)")
    parser.add_argument("--tokens", type=whole_number, default=2048, help="of a sequence, all ranks together")
    parser.add_argument("--steps", type=whole_number, default=20)
    parser.add_argument("--save-every", type=whole_number, default=5, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("runs/deepspeed"), help="checkpoints and losses go there")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of torch")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK is what counts")
    return parser


if __name__ == "__main__":
    main()

"""Trained models and their validation tokens, from a folder of `save_pretrained` or one with a `load.py`."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from launch.config import DataConfig
from launch.corpus import SEPARATOR, VOCABULARY, load_corpus


def load(folder: Path, texts: Sequence[Path]) -> tuple[PreTrainedModel, Callable[[int, int], Tensor]]:
    """A model in evaluation mode on the CPU, and the function tokens(n, at) of its validation tokens.

    No pickle is read: a file from elsewhere must not run code.

    Args:
        folder: written by `save_pretrained`, or with a `load.py` that has `model(**config)` and `tokens(n, at)`, n
            consecutive validation tokens int64 [1, n] from place `at`.
        texts: files to read for a `save_pretrained` model; the held-out part of the standard library if there is none.
    Raises:
        ValueError: the folder is neither, has no safetensors, or does not fit `texts`.
    """
    if (folder / "load.py").is_file():
        if texts:
            raise ValueError(f"--text: {folder} has validation tokens of its own (load.py); leave the option out")
        spec = importlib.util.spec_from_file_location("evaluated_model", folder / "load.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.model(attn_implementation="sdpa").eval(), module.tokens
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder}: neither config.json (of save_pretrained) nor load.py is there")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"--model {folder}: no weights in safetensors, and others are pickles, which run code when "
                         "they are read; write it with save_pretrained of transformers 5")
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype="auto", use_safetensors=True).eval()
    stream = torch.from_numpy(_token_stream(folder, texts, model.config.vocab_size).astype(np.int64))
    return model, lambda n, at: stream[None, at:at + n]


def _token_stream(folder: Path, texts: Sequence[Path], vocabulary: int) -> np.ndarray:
    """Token ids of text files, or of the held-out files of the standard library, [tokens]."""
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        if not texts:
            raise ValueError(f"{folder} has its own tokenizer: name the text files to read with --text")
        text = "\n".join(path.read_text() for path in texts)
        return np.asarray(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    if vocabulary != VOCABULARY:
        raise ValueError(f"{folder} has no tokenizer, and its vocabulary of {vocabulary} is not the {VOCABULARY} of "
                         "byte-level models: save the tokenizer beside the model")
    if not texts:
        held_out = load_corpus(DataConfig()).held_out
        return held_out.read(0, len(held_out))
    return np.concatenate([np.append(np.frombuffer(path.read_bytes(), np.uint8), np.uint16(SEPARATOR))
                           for path in texts])


def cut(tokens: Callable[[int, int], Tensor], count: int, length: int) -> list[Tensor]:
    """`count` windows of `length` tokens and one more, [1, length + 1] each."""
    windows = [tokens(length + 1, w * length) for w in range(count)]
    if windows[-1].shape[1] <= length:
        raise ValueError(f"--windows {count} --tokens {length}: there are fewer validation tokens than the "
                         f"{count * length + 1} this needs; take fewer")
    return windows

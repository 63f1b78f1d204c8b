"""`launch.evaluate` and the ablations: every number of a row is checked against a direct computation."""
from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from launch.ablations import ablated, ladder
from launch.corpus import SEPARATOR, VOCABULARY
from launch.evaluate import chosen_variants, evaluate, exact_attention, load, main
from muse_dist import MuseConfig, muse_attention
from muse_dist.attention import near_only
from muse_dist.huggingface import register

CONFIG = MuseConfig(block=32, leaf=8, group=8, remote_leaf=8, anchors=2, opened=2)
SET = ["--block", "32", *(word for name in ("leaf=8", "group=8", "remote_leaf=8", "anchors=2", "opened=2")
                          for word in ("--set", name))]
TRAINED = Path(__file__).parents[2] / "shared" / "trained_lm"


def qkv(tokens: int = 200, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(2, heads, tokens, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2))


def squared_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).double().square().sum() / b.double().square().sum()).item()


def small_model(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation="sdpa"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return model.eval()


# ------------------------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, trace=False, opened=0, sinks=0, halo=0)])
def test_with_nothing_left_out_it_is_the_method(config):
    q, k, v = qkv()
    assert squared_error(ablated(q, k, v, config=config), muse_attention(q, k, v, config=config)) < 1e-24


def test_with_no_far_field_and_nothing_opened_it_is_the_near_field():
    q, k, v = qkv()
    config = dataclasses.replace(CONFIG, opened=0, sinks=0)
    assert squared_error(ablated(q, k, v, config=config, far="none"), near_only(q, k, v, config=config)) < 1e-24


def test_sinks_alone_are_exact_attention_to_what_is_near_and_to_the_sinks():
    q, k, v = qkv()
    config = dataclasses.replace(CONFIG, opened=0)
    token, block = torch.arange(200), torch.arange(200) // 32
    seen = (token[:, None] >= token) & ((block[:, None] - block <= 1) | (token < 8))
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    assert squared_error(ablated(q, k, v, config=config, far="none"), expected) < 1e-24


@pytest.mark.parametrize("far", ["centroids", "tilted"])
def test_leaves_by_position_against_a_loop_over_leaves(far):
    """Logit and value of a far leaf from its definition, a leaf and a query row at a time."""
    q, k, v = qkv(96)
    config = dataclasses.replace(CONFIG, opened=0, sinks=0, trace=False, halo=0, anchors=1)
    out = ablated(q, k, v, config=config, far=far, positional=True)
    scale = 16 ** -0.5
    for batch, head, row in ((0, 0, 40), (0, 3, 95), (1, 2, 64)):
        block, kv = row // 32, head // 2
        queries = q[batch, 2 * kv:2 * kv + 2, 32 * block:32 * (block + 1)]
        tilt = scale * queries.mean((0, 1)) if far == "tilted" else torch.zeros(16, dtype=q.dtype)
        logits, values = [], []
        for start in range(0, 32 * block, 8):
            keys = k[batch, kv, start:start + 8]
            weight = (keys @ tilt).softmax(0)
            dipole = scale * q[batch, head, row] @ keys.mean(0) if far == "centroids" else 0.0
            logits.append((keys @ tilt).logsumexp(0) + dipole)
            values.append(weight @ v[batch, kv, start:start + 8])
        near = slice(32 * block, row + 1)
        logits += list(scale * k[batch, kv, near] @ q[batch, head, row])
        values += list(v[batch, kv, near])
        expected = torch.stack(logits).softmax(0) @ torch.stack(values)
        assert squared_error(out[batch, head, row], expected) < 1e-24


def test_single_keys_by_position_are_exact():
    q, k, v = qkv()
    config = dataclasses.replace(CONFIG, leaf=1, opened=0, sinks=0)
    assert squared_error(ablated(q, k, v, config=config, positional=True), exact_attention(q, k, v, scale=None)) < 1e-20


def test_semantic_clusters_beat_clusters_by_position():
    q, k, v = qkv()
    exact = exact_attention(q, k, v, scale=None)
    errors = [squared_error(ablated(q, k, v, config=CONFIG, positional=p), exact) for p in (False, True)]
    assert errors[0] < errors[1]


def test_unknown_far_field():
    with pytest.raises(ValueError, match="far='dipoles'"):
        ablated(*qkv(), config=CONFIG, far="dipoles")


# --------------------------------------------------------------------------------------------------- rows and the table


def test_rows_against_full_logits_and_hooked_layers():
    """Losses from the model's own logits; layer errors from the q, k, v that an exact pass hands to its layers."""
    model = small_model()
    tokens = torch.randint(0, VOCABULARY, (1, 241), generator=torch.Generator().manual_seed(1))
    windows = [tokens[:, :121], tokens[:, 120:]]
    ticks = []
    rows = list(evaluate(model, windows, ladder(CONFIG), lambda: ticks.append(1)))
    assert len(ticks) == 3 * 2 * (1 + 2 * len(rows))

    def loss() -> float:
        with torch.no_grad():
            return sum(F.cross_entropy(model(w[:, :-1]).logits[0], w[0, 1:]).item() for w in windows) / 2

    layers: list[tuple[torch.Tensor, ...]] = []

    def record(q, k, v, *, config, scale):
        layers.append((q, k, v))
        return exact_attention(q, k, v, scale=scale)

    register(CONFIG, "recorded", record)
    model.set_attn_implementation("recorded")
    loss()
    model.set_attn_implementation("sdpa")
    exact_loss = loss()
    for row in rows:
        register(row.variant.config, "direct", row.variant.function)
        model.set_attn_implementation("direct")
        assert row.loss == pytest.approx(loss(), abs=1e-5)
        assert row.exact_loss == pytest.approx(exact_loss, abs=1e-5)
        assert row.increase == row.loss - row.exact_loss
        for n, error in enumerate(row.layer_errors):
            pairs = [(row.variant.function(q, k, v, config=row.variant.config, scale=0.25),
                      exact_attention(q, k, v, scale=0.25)) for q, k, v in (layers[n], layers[n + 3])]
            both = [torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1)]
            assert error == pytest.approx(squared_error(*both), rel=1e-4)


def test_exact_attention_is_softmax_attention():
    q, k, v = qkv(50)
    logits = 0.3 * q @ k.repeat_interleave(2, 1).mT
    mask = torch.ones(50, 50, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    assert squared_error(exact_attention(q, k, v, scale=0.3), expected) < 1e-24


def test_each_step_of_the_ladder_adds_what_it_says():
    steps = {step.name: step for step in ladder(dataclasses.replace(CONFIG, trace=False))}
    assert list(steps) == ["own", "halo", "sinks", "centroids", "tilted", "dipole", "opened", "trace", "positional"]
    assert steps["own"].config.halo == 0 and steps["halo"].config.halo == 1
    assert steps["dipole"].config == dataclasses.replace(CONFIG, trace=False, opened=0)
    assert steps["opened"].config == dataclasses.replace(CONFIG, trace=False)
    assert steps["trace"].config == steps["positional"].config == CONFIG


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    (folder / "text.txt").write_text("def f(x):\n    return x + 1\n" * 30)
    return folder


def run(arguments: list[str], capsys) -> tuple[list[str], list[str]]:
    """Lines of the table and of the commands below it."""
    main(arguments)
    table, _, commands = capsys.readouterr().out.partition("\neach row by itself:\n")
    return table.splitlines(), commands.splitlines()


def test_the_command_prints_a_row_a_variant_and_commands_that_print_them_alone(saved, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["--model", str(saved), "--text", str(saved / "text.txt"), "--tokens", "150", "--windows", "2",
                 "--device", "cpu", *SET]
    table, commands = run([*arguments, "--variants", "halo", "trace", "--json", str(out)], capsys)
    assert [line.split()[0] for line in table] == ["variant", "exact", "halo", "trace"]
    assert "layer 2" in table[0]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["variant"] for r in records] == ["halo", "trace"]
    assert f"{records[1]['increase']:+.4f}" in table[3] and f"{records[0]['loss']:.4f}" in table[2]
    assert len(records[0]["layer_errors"]) == 3 and MuseConfig(**records[1]["config"]) == CONFIG
    assert [r["command"] for r in records] == commands
    for command, line in zip(commands, table[2:], strict=True):
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "launch.evaluate"]
        alone, _ = run(words[3:], capsys)
        assert alone[2:] == [line]


def test_byte_tokens_of_text_files(saved, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x00\xffab")
    _, tokens = load(saved, [tmp_path / "a.txt", tmp_path / "a.txt"])
    assert tokens(10, 0).tolist() == [[0, 255, 97, 98, SEPARATOR] * 2]
    assert tokens(3, 4).tolist() == [[SEPARATOR, 0, 255]]


def test_without_text_the_held_out_standard_library_is_read(saved):
    _, tokens = load(saved, [])
    assert SEPARATOR in tokens(200_000, 0) and tokens(1000, 0).shape == (1, 1000)
    assert bytes(tokens(100, 0)[0].tolist()).isascii()


def test_a_folder_with_load_py(tmp_path, capsys):
    (tmp_path / "load.py").write_text(
        "import torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "def model(**config):\n"
        "    torch.manual_seed(0)\n"
        "    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32,\n"
        "        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **config))\n"
        "def tokens(n, at=0):\n    return torch.arange(400)[None, at:at + n] % 50\n")
    arguments = ["--model", str(tmp_path), "--tokens", "100", "--windows", "3", "--variants", "own", *SET]
    table, _ = run(arguments, capsys)
    assert len(table) == 3
    with pytest.raises(SystemExit):
        main([*arguments[:3], "200", *arguments[4:]])
    assert "fewer validation tokens than the 601" in capsys.readouterr().err
    with pytest.raises(ValueError, match="validation tokens of its own"):
        load(tmp_path, [tmp_path / "load.py"])


@pytest.mark.parametrize("arguments, message", [
    (["--set", "opened"], "NAME=VALUE"),
    (["--set", "opend=3"], "did you mean 'opened'"),
    (["--variants", "quadrupole"], "unknown; known are own, halo"),
    (["--tokens", "0"], "at least 1"),
    (["--block", "100"], "block=100"),
])
def test_bad_options(saved, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(saved), *arguments])
    assert message in capsys.readouterr().err


def test_bad_models(tmp_path):
    with pytest.raises(ValueError, match="neither config"):
        load(tmp_path, [])
    small_model(vocabulary=99).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 99"):
        load(tmp_path, [])


def test_pickled_weights_are_refused(tmp_path, capsys, monkeypatch):
    small_model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")  # good weights, and yet a pickle
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path), "--tokens", "100", "--windows", "1"])
    assert stop.value.code == 2
    assert f"--model {tmp_path}: no weights in safetensors" in capsys.readouterr().err
    save_file({}, tmp_path / "other.safetensors")  # of something else: the library must not take the pickle either
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path, [])


def test_models_that_change_their_logits_are_refused(tmp_path, capsys):
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=1.1))
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--tokens", "100", "--windows", "1"])
    assert "changes its logits" in capsys.readouterr().err


def test_settings_reach_presets_and_ladder():
    from launch.evaluate import _parser

    options = _parser().parse_args(["--model", "x", "--preset", "fast", "--variants", "trace", "positional",
                                    "--block", "1024", "--set", "opened=3", "--set", "anchors=1"])
    fast, trace, positional = chosen_variants(options)
    assert fast.config == MuseConfig.fast(block=1024, opened=3, anchors=1)
    assert trace.config == positional.config == MuseConfig(block=1024, opened=3, anchors=1)
    assert [v.name for v in chosen_variants(_parser().parse_args(["--model", "x"]))] == ["paper", "fast", "accurate"]


@pytest.mark.skipif(not TRAINED.is_dir(), reason="the trained model is not beside the repository")
def test_on_a_trained_model_the_dipole_and_semantic_clusters_help():
    """In loss and in the layers' errors: far leaves about anchors beat plain centroids, and leaves by position."""
    model, tokens = load(TRAINED, [])
    config = MuseConfig(block=256, leaf=32, group=64, anchors=4, opened=0)
    variants = [v for v in ladder(config) if v.name in ("centroids", "trace", "positional")]
    centroids, whole, positional = evaluate(model, [tokens(2049, 0)], variants)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        exact = F.cross_entropy(model(tokens(2048, 0)).logits[0], tokens(2048, 1)[0]).item()
    assert whole.exact_loss == pytest.approx(exact, abs=1e-4)
    assert 0 < whole.increase < 0.95 * min(centroids.increase, positional.increase)
    assert sum(whole.layer_errors) < 0.95 * min(sum(centroids.layer_errors), sum(positional.layer_errors))

"""Tokenizers of launch.data: trained ones, and the files of others."""
import json

from tokenizers import Tokenizer, models, pre_tokenizers

from launch import data as command
from launch import data_encode, data_sources
from launch.indexed import IndexedTokens
from tests.test_launch_data import TEXTS, lines, make


def test_trained_tokens_decode_to_the_text_and_processes_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_sources, "UNIT", 3000)
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines([f"{text} {i}" for i, text in enumerate(TEXTS * 20)]))
    options = ["--tokenizer", "bpe", "--vocabulary", "400"]
    about = make(tmp_path / "one", source, *options)
    assert command.main([str(source), "--out", str(tmp_path / "two"), "--held-out-every", "5", "--workers", "2",
                         *options]) == 0
    assert json.loads((tmp_path / "two" / "data.json").read_text()) == about
    assert about["vocabulary"] == 400 and about["tokenizer"] == "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json"))
    tokens = IndexedTokens(tmp_path / "one" / "held_out")
    found = tokens.read(0, len(tokens)).tolist()
    texts = tokenizer.decode(found, skip_special_tokens=False).split(data_encode.END)[:-1]
    assert texts == [f"{text} {i}" for i, text in enumerate(TEXTS * 20)][4::5]
    again = make(tmp_path / "again", source, "--tokenizer", tmp_path / "one" / "tokenizer.json")
    assert again["digest"] == about["digest"]
    assert "training a tokenizer of 400 tokens" in capsys.readouterr().out


def word_tokenizer(path, end=4):
    """A tokenizer.json of the words a, b and c, with a token for the end of a document."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3, "<|endoftext|>": end}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return tokenizer


def test_a_tokenizers_rules_for_batches_cut_and_fill_no_document(tmp_path):
    path = tmp_path / "words.json"
    tokenizer = word_tokenizer(path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    (tmp_path / "a.jsonl").write_bytes(lines(["a b c " * 10] * 5))
    for _ in range(2):  # the second time with the copy that the first has left
        about = make(tmp_path / "out", tmp_path / "a.jsonl", "--tokenizer", path)
        path = tmp_path / "out" / "tokenizer.json"
        assert about["train"]["tokens"] == 4 * 31
        assert IndexedTokens(tmp_path / "out" / "train").read(0, 31).tolist() == [1, 2, 3] * 10 + [4]


def test_tokens_whose_numbers_have_gaps_keep_them(tmp_path):
    word_tokenizer(tmp_path / "words.json", end=70_000)
    (tmp_path / "a.jsonl").write_bytes(lines(["a b"] * 5))
    about = make(tmp_path / "out", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "words.json")
    assert (about["vocabulary"], about["dtype"], about["separator"]) == (70_001, "int32", 70_000)
    assert IndexedTokens(tmp_path / "out" / "train").read(0, 6).tolist() == [1, 2, 70_000] * 2


def test_an_end_that_a_document_spells_out_is_text(tmp_path):
    """Sources of tokenizers have it, and it must not end the document there."""
    source = tmp_path / "a.jsonl"
    texts = [f"stop at {data_encode.END} or not, {number}" for number in range(40)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    about = make(tmp_path / "out", source, "--tokenizer", "bpe", "--vocabulary", "300")
    tokens = IndexedTokens(tmp_path / "out" / "train", about["vocabulary"])
    found = tokens.read(0, len(tokens)).tolist()
    assert found.count(about["separator"]) == about["train"]["documents"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(found[:tokens.starts[1] - 1], skip_special_tokens=False) in texts

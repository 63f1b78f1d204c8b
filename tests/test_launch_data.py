"""launch.data: every document once, in order; what is none is counted; the files are Megatron's."""
import gzip
import json
import os
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import data as command
from launch import data_encode, data_sources
from launch.config import DataConfig
from launch.corpus import load_corpus
from launch.data_sources import Bad, Unit, list_units, read_unit
from launch.indexed import IndexedTokens, token_dtype, write_index

TEXTS = ["one", "zwei\n", "три", "def f():\n    return 4\n", "five 5", "6" * 40, "\tseven", "acht ", "neuf", "ten"]


def make(out, *arguments):
    assert command.main([*map(str, arguments), "--out", str(out), "--held-out-every", "5", "--workers", "1"]) == 0
    return json.loads((out / "data.json").read_text())


def lines(texts):
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def documents(out, name):
    """Documents of byte tokens."""
    tokens = IndexedTokens(out / name)
    found = tokens.read(0, len(tokens)).tolist()
    texts, start = [], 0
    for i, token in enumerate(found):
        if token == 256:
            texts.append(bytes(found[start:i]).decode())
            start = i + 1
    assert start == len(found)
    return texts


def expected(texts):
    held_out = texts[4::5]
    return [text for i, text in enumerate(texts) if i % 5 != 4], held_out


def test_every_way_of_writing_the_same_documents_gives_the_same_tokens(tmp_path):
    content = lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    half = content.index(b"\n", len(content) // 2) + 1
    # Two members and two frames, one after the other, as parallel compressors write them.
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(pack(content[:half]) + pack(content[half:]))
    tree = tmp_path / "tree"
    tree.mkdir()
    for i, text in enumerate(TEXTS):
        (tree / f"{i:02}.txt").write_bytes(text.encode())
    digests = set()
    for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst", tree):
        out = tmp_path / f"out-{path.name}"
        about = make(out, path)
        assert (documents(out, "train"), documents(out, "held_out")) == expected(TEXTS)
        assert about["train"]["documents"] == 8 and about["held_out"]["documents"] == 2 and about["bad"] == {}
        digests.add(about["digest"])
    assert len(digests) == 1


def test_what_is_no_document_is_counted_and_named(tmp_path, capsys):
    bad = [b'{"text": "cut', b'{"other": "x"}', b'{"text": 7}', b'[1]', b'{"text": ""}', b'{"text": "\xff"}',
           b"nonsense"]
    content = b"".join(line + b"\n" + json.dumps({"text": text}).encode() + b"\n" for line, text in zip(bad, TEXTS))
    (tmp_path / "a.jsonl").write_bytes(content + b"\n\n")
    about = make(tmp_path / "out", tmp_path / "a.jsonl")
    assert about["bad"] == {"not JSON": 2, "no key 'text'": 2, "'text' is no string": 1, "'text' is empty": 1,
                            "not UTF-8": 1}
    assert (documents(tmp_path / "out", "train"), documents(tmp_path / "out", "held_out")) == expected(TEXTS[:7])
    printed = capsys.readouterr().out
    assert f"2 not JSON: {tmp_path / 'a.jsonl'}, byte 0; " in printed


HOSTILE = [b"[" * 100_000, b'{"text": ' + b'{"text": ' * 50_000, b'{"text": "\\ud800"}', b'{"text": "a\\udfffb"}',
           b'{"text": "\xed\xa0\x80"}']  # the last spells the bytes themselves, as some writers do
GOOD = [rb'{"text": "\ud83d\ude00"}', b'{"text": "' + "\U0001f600".encode() + b'"}']  # a whole pair is a letter


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_hostile_lines_are_counted_with_their_places(tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(data_sources, "UNIT", 400_000)
    rows = [line for pair in zip(HOSTILE, [json.dumps({"text": text}).encode() for text in TEXTS]) for line in pair]
    rows += GOOD
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(b"\n".join(rows) + b"\n")
    about = make(out, path, "--tokenizer", tokenizer, "--vocabulary", "300")
    printed = capsys.readouterr().out
    assert about["bad"] == {"nested too deeply": 2, "'text' has half a surrogate pair": 3}
    starts = [sum(len(row) + 1 for row in rows[:i]) for i in range(len(rows))]
    places = [f"{path}, byte {start}" for start in starts[:len(HOSTILE) * 2:2]]
    assert about["examples"] == {"nested too deeply": places[:2], "'text' has half a surrogate pair": places[2:]}
    assert all(place in printed for place in places)
    if tokenizer == "bytes":
        assert (documents(out, "train"), documents(out, "held_out")) == expected([*TEXTS[:5], *2 * ["\U0001f600"]])
    else:
        assert about["train"]["documents"] == 6 and about["held_out"]["documents"] == 1


def test_what_a_folder_has_and_is_not_read_is_counted(tmp_path, capsys):
    tree, away = tmp_path / "tree", tmp_path / "away"
    for path in (tree / ".git" / "config.txt", tree / "b" / ".hidden.txt", tree / "notes.md", away / "x.txt",
                 *(tree / "b" / f"{i}.txt" for i in range(5))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (tree / "b" / "gone.txt").symlink_to(tree / "nothing")
    (tree / "good.txt").symlink_to(away / "x.txt")
    (tree / "other").symlink_to(away)
    (tree / os.fsdecode(b"bad\xff.md")).write_text("a name that is no UTF-8")
    os.mkfifo(tree / "pipe.txt")
    (tree / "none.jsonl").write_text("")
    about = make(tmp_path / "out", tree, "--suffix", ".txt", ".jsonl")
    assert about["bad"] == {"empty file": 1}
    assert about["skipped"] == {"hidden folder": 1, "hidden file": 1, "broken link": 1, "link to a folder": 1,
                                "no regular file": 1, "file that does not end in .txt or .jsonl": 2}
    assert about["examples"]["broken link"] == [str(tree / "b" / "gone.txt")]
    texts = ["x.txt" if name == "good.txt" else name for name in ("good.txt", *(f"{i}.txt" for i in range(5)))]
    assert (documents(tmp_path / "out", "train"), documents(tmp_path / "out", "held_out")) == expected(texts)
    printed = capsys.readouterr().out
    assert f"skipped             1 hidden file: {tree / 'b' / '.hidden.txt'}\n" in printed
    assert "bad\\udcff.md" in printed


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, capsys):
    closed, scan = tmp_path / "tree" / "closed", os.scandir
    closed.mkdir(parents=True)
    (tmp_path / "tree" / "a.txt").write_text("a")

    def refuses(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(SystemExit) as stop:
        make(tmp_path / "out", tmp_path / "tree")
    assert stop.value.code == 2 and f"Permission denied: '{closed}'" in capsys.readouterr().err


def test_a_source_tree_keeps_its_order_and_leaves_out_what_is_no_text(tmp_path):
    for name, content in {"b/z.py": b"1", "b/a.py": b"2", "a.py": b"3", "b/c/d.py": b"4", "b/d/e.py": b"5",
                          ".git/x.py": b"no", "b/.hidden.py": b"no", "b/image.py": b"a\0b", "b/latin.py": b"\xe9",
                          "b/none.py": b"", "b/readme.md": b"no"}.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    about = make(tmp_path / "out", tmp_path / "tree", "--suffix", ".py")
    assert documents(tmp_path / "out", "train") == ["3", "2", "1", "4"]
    assert documents(tmp_path / "out", "held_out") == ["5"]
    assert sorted(about["bad"].values()) == [1, 1, 1] and "not text: it has zero bytes" in about["bad"]
    assert about["examples"]["empty file"] == [str(tmp_path / "tree" / "b" / "none.py")]


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, "gz"), (zstandard.ZstdCompressor().compress, "zst")])
def test_a_compressed_file_that_was_cut_off_gives_what_it_has_and_says_so(tmp_path, pack, suffix):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 2000))) for _ in range(300)]
    packed = pack(lines(texts))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed[:len(packed) * 2 // 3])
    (unit,), _ = list_units([path], ())
    found = list(read_unit(unit, "text"))
    good = [text for text in found if isinstance(text, str)]
    assert 0 < len(good) < 300 and good == texts[:len(good)]
    assert len(found) > len(good) and "cut off" in "".join(x.why for x in found if isinstance(x, Bad))


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=30), cut=st.integers(1, 60), end=st.booleans())
@settings(max_examples=60, deadline=None)
def test_units_of_a_file_hold_every_line_once(tmp_path_factory, sizes, cut, end):
    texts = [f"{i}:" + "x" * size for i, size in enumerate(sizes)]
    path = tmp_path_factory.mktemp("units") / "a.jsonl"
    content = lines(texts)
    path.write_bytes(content if end else content[:-1])
    size = path.stat().st_size
    units = [Unit("lines", (str(path),), cut, at, min(at + cut, size)) for at in range(0, size, cut)]
    assert [text for unit in units for text in read_unit(unit, "text")] == texts


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(data_sources, "UNIT", 60)
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines(TEXTS * 3))
    whole = make(tmp_path / "whole", source)
    made, real = [], data_encode.read_unit

    def stops(unit, key):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(unit)
        return real(unit, key)

    monkeypatch.setattr(data_encode, "read_unit", stops)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", source)
    assert not (tmp_path / "out" / "data.json").exists()
    monkeypatch.setattr(data_encode, "read_unit", lambda unit, key: made.append(unit) or real(unit, key))
    assert make(tmp_path / "out", source) == whole
    assert len(made) == len(set(made)) == len(list_units([source], ())[0]), "nothing is done twice"
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out" / "parts").exists()


def test_a_part_of_other_input_is_made_again(tmp_path):
    source, parts = tmp_path / "a.jsonl", tmp_path / "parts"
    parts.mkdir()
    encoding = data_encode.byte_encoding("text")
    for text in ("before", "after!"):  # of one size
        source.write_bytes(lines([text]))
        (unit,), _ = list_units([source], ())
        data_encode.encode_unit(0, unit, encoding, parts)
        assert np.fromfile(parts / "part-000000.bin", np.uint16)[:-1].tolist() == list(text.encode())


def test_the_index_is_megatrons(tmp_path):
    tokens = np.arange(60, dtype=np.uint16)
    tokens.tofile(tmp_path / "x.bin")
    write_index(tmp_path / "x.idx", [10, 0, 50], tokens.dtype)
    content = (tmp_path / "x.idx").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", content, 9) == (1, 8, 3, 4)  # version, uint16, sequences, bounds of documents
    assert struct.unpack_from("<3i", content, 34) == (10, 0, 50)
    assert struct.unpack_from("<3q4q", content, 46) == (0, 20, 20, 0, 1, 2, 3)
    assert len(content) == 102
    found = IndexedTokens(tmp_path / "x")
    assert len(found) == 60 and found.read(7, 5).tolist() == [7, 8, 9, 10, 11]
    assert found.document(9) == (0, 9) and found.document(10) == (2, 0)
    assert token_dtype(1 << 16) == np.uint16 and token_dtype((1 << 16) + 1) == np.int32


def test_megatron_reads_the_files(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    make(tmp_path / "out", tmp_path / "a.jsonl")
    dataset = indexed.IndexedDataset(str(tmp_path / "out" / "train"))
    wanted = [[*text.encode(), 256] for text in expected(TEXTS)[0]]
    assert [dataset[i].tolist() for i in range(len(dataset))] == wanted


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "x.idx").write_bytes(b"what"), "x.idx is no index"),
    (lambda folder: (folder / "x.idx").write_bytes((folder / "x.idx").read_bytes()[:-3]), "x.idx is cut off: 79 bytes"),
    (lambda folder: (folder / "x.bin").write_bytes(b"1234"), r"x.bin has 4 bytes, and its index x.idx says 120"),
])
def test_files_that_do_not_fit_are_named(tmp_path, damage, message):
    tokens = np.arange(60, dtype=np.uint16)
    tokens.tofile(tmp_path / "x.bin")
    write_index(tmp_path / "x.idx", [10, 50], tokens.dtype)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        IndexedTokens(tmp_path / "x")


@pytest.mark.parametrize("dtype, token", [(np.uint16, 60_000), (np.int32, -1)])
def test_a_token_that_cannot_be_is_named_with_its_place(tmp_path, dtype, token):
    values = np.arange(60, dtype=dtype)
    values[41] = token
    values.tofile(tmp_path / "x.bin")
    write_index(tmp_path / "x.idx", [60], values.dtype)
    tokens = IndexedTokens(tmp_path / "x", vocabulary=60)
    assert tokens.read(0, 41).tolist() == list(range(41))
    with pytest.raises(OSError, match=rf"x.bin is damaged: token 41 is {token}, and the vocabulary has 60; write"):
        tokens.read(30, 20)


def test_training_takes_the_folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 10))
    make(tmp_path / "out", tmp_path / "a.jsonl")
    corpus = load_corpus(DataConfig(path=str(tmp_path / "out"), context=16))
    assert corpus.vocabulary == 257 and corpus.sequences(0, 3, 0).shape == (3, 17)
    stream = documents(tmp_path / "out", "train")
    where = corpus.describe(4, 0)
    assert len(stream[where["document"]].encode()) >= where["token_in_document"]
    np.full(len(corpus.train), 257, np.uint16).tofile(tmp_path / "out" / "train.bin")
    with pytest.raises(OSError, match="train.bin is damaged: token .* is 257, and the vocabulary has 257"):
        corpus.sequences(0, 1, 0)
    with pytest.raises(FileNotFoundError, match="nowhere has no data.json.*python -m launch.data writes one"):
        load_corpus(DataConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="for held_out.*with a smaller --held-out-every of launch.data"):
        load_corpus(DataConfig(path=str(tmp_path / "out"), context=len(corpus.held_out)))


def test_files_of_two_runs_are_not_taken_for_one(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    make(tmp_path / "out", tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 2))

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as broken, pytest.raises(SystemExit):
        broken.setattr("launch.data_join.write_index", fail)
        make(tmp_path / "out", tmp_path / "a.jsonl")
    assert not (tmp_path / "out" / "data.json").exists(), "what is there is of no one run"
    about = make(tmp_path / "out", tmp_path / "a.jsonl")
    about["train"]["tokens"] -= 1
    (tmp_path / "out" / "data.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="train has .* tokens, and data.json says .* not of one run of launch.data"):
        load_corpus(DataConfig(path=str(tmp_path / "out"), context=16))


def test_tokens_of_which_none_are_held_out_are_refused_and_not_lost(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert "--held-out-every 100: there are 10 documents" in (said := capsys.readouterr().err)
    assert "take at most 10" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lock", "parts"]
    assert make(tmp_path / "out", tmp_path / "a.jsonl")["held_out"]["documents"] == 2


@pytest.mark.parametrize("arguments, message", [
    (["missing.txt"], "missing.txt"),
    (["."], "no file to read in"),
    (["a.jsonl", "--held-out-every", "1"], "--held-out-every 1: must be at least 2"),
    (["a.jsonl", "--workers", "0"], "--workers 0: must be at least 1"),
    (["a.jsonl", "--tokenizer", "bpe", "--vocabulary", "256"], "--vocabulary 256: must be at least 257"),
    (["a.jsonl", "--tokenizer", "bpe", "--train-bytes", "0"], "--train-bytes 0: must be at least 1"),
    (["a.jsonl", "--tokenizer", "a.jsonl"], "a.jsonl is no tokenizer.json"),
])
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--out", "out", *(["--suffix", ".x"] if arguments == ["."] else [])])
    assert stop.value.code == 2 and message in capsys.readouterr().err

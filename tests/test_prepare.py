"""data/prepare.py: text → tokenizer and shards. No network: the hub is a local HTTP server with the hub's layout."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import sentencepiece as spm
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import builds, prepare, published, readers, shards
from parts.files import UserError, cli

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 400


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of words, code, numbers and the odd character no small vocabulary has."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(300)]
    extra = ["\t", "  ", "\n", "\n\n    return x\n", "é", "日本", "😀", "\r\n", "<s>", "<0x0A>", "12,5", "\x00", "\u2028"]
    return [
        f"{number} " + " ".join(rng.choice(extra) if rng.random() < 0.1 else rng.choice(words) for _ in range(rng.randint(5, 120)))
        for number in range(count)
    ]


DOCUMENTS = make_documents(300)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "source": "x"}) + "\n" for t in texts), encoding="utf-8")
    return path


def prepare_ok(*arguments) -> None:
    assert prepare.main([str(a) for a in arguments]) == 0


def refused(capsys, *arguments) -> str:
    """The one line that a refused command leaves on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli(lambda: prepare.main([str(a) for a in arguments]))
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def shard_tokens(path: Path) -> np.ndarray:
    """The published format, read independently of the builder."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    tokens = np.frombuffer(raw[1024:], "<u2")
    assert len(tokens) == header[2]
    return tokens


def split_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([shard_tokens(p) for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))])


def split_texts(folder: Path, tokenizer: Path, split: str) -> list[str]:
    """Documents of a split, decoded: what stands between the BOS tokens."""
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = split_tokens(folder, split).tolist()
    assert tokens[0] == 1
    documents = [list(group) for bos, group in itertools.groupby(tokens, lambda t: t == 1) if not bos]
    assert len(documents) == tokens.count(1)
    return [processor.decode(d) for d in documents]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(prepare.train_tokenizer(DOCUMENTS, VOCAB, 0.9995))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder: relative paths keep the manifests of different tests comparable."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------

HARD = ["", " ", "  lead", "trail  ", "\n", "\n\n \n", "a\r\nb\rc", "\t\tx", "\x0c\x0b\x85\u2028\u2029", "\x00a\x00", "e\u0301é ﬁ²",
        "\ufeffx", "😀\U0010ffff\ue000\uffff\ufffd", "<s></s><unk><0x0A>", "\u2047\u2585", " " * 70 + "x", "x" * 5000, "０１２", "İıß"]  # fmt: skip


def test_tokenizer_gives_back_every_text(tokenizer):
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    for text in HARD + DOCUMENTS:
        assert processor.decode(processor.encode(text)) == text
    assert processor.bos_id() == 1 and processor.vocab_size() == VOCAB
    assert processor.id_to_piece(processor.piece_to_id("▁")) == "▁"
    assert processor.id_to_piece(processor.piece_to_id("\n")) == "\n"


def test_standalone_space_piece_exists_even_without_spaces():
    model = prepare.train_tokenizer(["abcabcabd" * 20], 268, 1.0)
    processor = shards.parse_tokenizer(model, "spaceless")
    assert processor.piece_to_id("▁") != processor.unk_id()
    assert processor.decode(processor.encode("a b  c")) == "a b  c"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.one_of(st.sampled_from(" \n\tabehrt<>"), st.characters(exclude_characters="▁", exclude_categories=["Cs"]))))
def test_tokens_stand_for_the_bytes_of_any_text(tokenizer, text):
    processor = shards.load_tokenizer(tokenizer)
    ids = np.array([1, *processor.encode(text)])
    assert processor.decode(ids[1:].tolist()) == text
    assert int(shards.ByteTable.from_tokenizer(processor).count(ids[:-1], ids[1:]).sum()) == len(text.encode())


def train_variant(tmp_path: Path, **options) -> Path:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=prepare.sentences(DOCUMENTS), model_writer=model, vocab_size=VOCAB, unk_id=0,
                                   byte_fallback=True, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, model_type="bpe", **options)  # fmt: skip
    path = tmp_path / "variant.model"
    path.write_bytes(model.getvalue())
    return path


def test_sample_is_bounded_and_free_of_order():
    items = [((i * 7919 % 1000 * 1000 + i).to_bytes(16, "big"), b"x" * (i % 13 + 1)) for i in range(1000)]
    results = []
    for order in (items, items[::-1], items + items):
        sample = prepare.Sample(500)
        for key, text in order:
            sample.add(key, text)
            assert sample.total < 1.25 * 500 + 13
        results.append(sample.texts())
    assert results[0] == results[1] == results[2]
    expected = []  # in order of their keys, until the budget is reached
    for _, text in sorted(items):
        if sum(map(len, expected)) < 500:
            expected.append(text.decode())
    assert results[0] == expected
    book = prepare.Sample(400)
    book.add(b"k", "é".encode() * 300)
    assert book.texts() == ["é" * 50]  # a quarter of the budget


# ----------------------------------------------------------------------------------------------------------------------
# Shards and manifest
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A dataset with a tokenizer of its own, several shards, duplicates and unusable documents; read-only."""
    folder = tmp_path_factory.mktemp("dataset")
    before = os.getcwd()
    os.chdir(folder)
    try:
        texts = DOCUMENTS + DOCUMENTS[:20] + ["", "has ▁ in it", "half \ud800 pair"]
        write_jsonl(folder / "in.jsonl", texts)
        prepare_ok("in.jsonl", "--vocab-size", VOCAB, "--val-fraction", 0.2, "--shard-tokens", 10_000, "--out", "datasets/set",
                   "--workers", 1)  # fmt: skip
    finally:
        os.chdir(before)
    return folder


def test_documents_come_back_whole_and_shuffled_by_hash(dataset):
    folder, model = dataset / "datasets/set", dataset / "tokenizers/set.model"
    train, val = split_texts(folder, model, "train"), split_texts(folder, model, "val")
    expected = sorted(DOCUMENTS, key=sha)
    assert val == [t for t in expected if sha(t)[0] < 51 or (sha(t)[0] == 51 and int.from_bytes(sha(t)[:8], "big") < 0.2 * 2**64)]
    assert train == [t for t in expected if t not in set(val)]
    assert 30 < len(val) < 90


def test_shards_are_full_and_hashed(dataset):
    folder = dataset / "datasets/set"
    manifest = manifest_of(folder)
    assert len(manifest["splits"]["train"]["shards"]) > 2
    for split in ("train", "val"):
        entry = manifest["splits"][split]
        assert [s["file"] for s in entry["shards"]] == sorted(p.name for p in folder.glob(f"fineweb_{split}_*.bin"))
        assert [s["tokens"] for s in entry["shards"][:-1]] == [10_000] * (len(entry["shards"]) - 1)
        for shard in entry["shards"]:
            path = folder / shard["file"]
            assert len(shard_tokens(path)) == shard["tokens"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert sum(s["tokens"] for s in entry["shards"]) == entry["tokens"] == len(split_tokens(folder, split))


def test_manifest_counts_bytes_documents_and_what_was_left_out(dataset):
    folder, model = dataset / "datasets/set", dataset / "tokenizers/set.model"
    manifest = manifest_of(folder)
    assert manifest["format"] == 1
    for split in ("train", "val"):
        texts = split_texts(folder, model, split)
        entry = manifest["splits"][split]
        assert entry["documents"] == len(texts)
        assert entry["raw_bytes"] == sum(len(t.encode()) for t in texts)
        sidecar = folder / entry["document_hashes"]["file"]
        assert sidecar.read_bytes() == b"".join(sha(t)[:16] for t in texts)
        assert hashlib.sha256(sidecar.read_bytes()).hexdigest() == entry["document_hashes"]["sha256"]
    dropped = manifest["dropped"]
    assert dropped["train"]["duplicates"] + dropped["val"]["duplicates"] == 20
    assert dropped["excluded"] == {"contains_u2581": 1, "empty": 1, "lone_surrogate": 1}
    assert manifest["documents_read"] == 323
    assert manifest["tokenizer"]["vocab_size"] == VOCAB
    assert hashlib.sha256((folder / manifest["tokenizer"]["path"]).read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    assert manifest["sources"] == [
        {"kind": "file", "path": "in.jsonl", "split": "hash", "files": 1, "bytes": (dataset / "in.jsonl").stat().st_size,
         "sha256": hashlib.sha256((dataset / "in.jsonl").read_bytes()).hexdigest()}
    ]  # fmt: skip
    assert manifest["command"].startswith("python data/prepare.py in.jsonl --vocab-size 400") and "--workers" not in manifest["command"]
    assert sorted(p.name for p in (dataset / "datasets").iterdir()) == ["set"]  # no work folder stays


def test_processes_order_and_memory_limits_leave_the_bytes_alone(dataset, here, monkeypatch):
    """Two workers, small blocks, many merge ranges: the same files. Input in another order: the same shards."""
    shutil.copy(dataset / "in.jsonl", here)
    options = ("--vocab-size", VOCAB, "--val-fraction", 0.2, "--shard-tokens", 10_000)
    prepare_ok("in.jsonl", *options, "--out", "datasets/set", "--workers", 2)
    expected = files_of(dataset / "datasets") | files_of(dataset / "tokenizers")
    assert files_of(here / "datasets") | files_of(here / "tokenizers") == expected

    monkeypatch.setattr(readers, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(readers, "READ_BYTES", 1_000)
    monkeypatch.setattr(prepare, "RANGE_BYTES", 5_000)
    shutil.rmtree(here / "datasets")
    prepare_ok("in.jsonl", *options, "--out", "datasets/set", "--workers", 1)
    assert files_of(here / "datasets") | files_of(here / "tokenizers") == expected

    lines = (here / "in.jsonl").read_text().splitlines(keepends=True)
    (here / "in.jsonl").write_text("".join(lines[::-1]))
    prepare_ok("in.jsonl", *options, "--out", "other/set", "--workers", 1)
    shards = {name: data for name, data in files_of(here / "other/set").items() if not name.endswith(".json")}
    assert shards == {name.removeprefix("set/"): data for name, data in expected.items() if not name.endswith((".json", ".model"))}


def test_tokenizer_sees_training_documents_only(here):
    """Changing validation text must not change the tokenizer."""
    write_jsonl(here / "train.jsonl", DOCUMENTS[:200])
    models = []
    for seed in (1, 2):
        write_jsonl(here / "val.jsonl", make_documents(30, seed + 10))
        prepare_ok("train.jsonl", "--val", "val.jsonl", "--vocab-size", VOCAB, "--out", f"set{seed}", "--workers", 1)
        models.append((here / f"set{seed}.model").read_bytes())
    write_jsonl(here / "both.jsonl", DOCUMENTS[:200] + make_documents(30, 12))
    prepare_ok("both.jsonl", "--val", "val.jsonl", "--drop-overlap", "--vocab-size", VOCAB, "--out", "set3", "--workers", 1)
    assert models[0] == models[1] == (here / "set3.model").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Splits
# ----------------------------------------------------------------------------------------------------------------------


def test_explicit_validation_keeps_its_order(here, tokenizer):
    write_jsonl(here / "train.jsonl", DOCUMENTS[50:])
    write_jsonl(here / "val.jsonl", DOCUMENTS[:50] + DOCUMENTS[:5])
    prepare_ok("train.jsonl", "--val", "val.jsonl", "--tokenizer", tokenizer, "--out", "set", "--workers", 1)
    assert split_texts(here / "set", tokenizer, "val") == DOCUMENTS[:50]
    assert split_texts(here / "set", tokenizer, "train") == sorted(DOCUMENTS[50:], key=sha)
    assert manifest_of(here / "set")["dropped"]["val"] == {"duplicates": 5}


@pytest.mark.parametrize("train_one", [False, True])
def test_a_document_in_both_splits_is_an_error(here, tokenizer, capsys, train_one):
    write_jsonl(here / "train.jsonl", DOCUMENTS[40:] + DOCUMENTS[40:60])
    write_jsonl(here / "val.jsonl", DOCUMENTS[:50])
    how = ("--vocab-size", VOCAB) if train_one else ("--tokenizer", tokenizer)
    command = ("train.jsonl", "--val", "val.jsonl", *how, "--out", "sets/a", "--workers", 1)
    assert "10 document(s) of the validation set are also in the training set" in refused(capsys, *command)
    assert not (here / "sets").exists() or not list((here / "sets").iterdir())
    prepare_ok(*command, "--drop-overlap")
    model = here / "sets/a.model" if train_one else tokenizer
    assert split_texts(here / "sets/a", model, "train") == sorted(DOCUMENTS[50:], key=sha)
    assert manifest_of(here / "sets/a")["dropped"]["train"] == {"duplicates": 20, "in_validation": 10}


def test_membership_looks_at_all_16_bytes():
    keys = np.array([b"\0" * 15 + b"\1", b"a" * 15 + b"\0", b"a" * 15 + b"b", b"\xff" * 16], "S16")
    others = np.array([b"\0" * 15 + b"\2", b"a" * 16, b"\xff" * 15 + b"\xfe"], "S16")
    mixed = np.array([others[0], keys[0], others[1], keys[2], keys[1], keys[3], others[2]], "S16")
    assert prepare.is_among(mixed, keys).tolist() == [False, True, False, True, True, True, False]
    assert not prepare.is_among(mixed, keys[:0]).any()


# ----------------------------------------------------------------------------------------------------------------------
# Input formats
# ----------------------------------------------------------------------------------------------------------------------


def write_zstd(path: Path, data: bytes, window_log: int, frames: int = 1) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)
    step = -(-len(data) // frames)
    with open(path, "wb") as file:
        for start in range(0, len(data), step):
            # No content size in the header: the reader must then grant the whole window.
            compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
            file.write(compressor.compress(data[start : start + step]) + compressor.flush())


def write_parquet(path: Path, texts: list[str], key: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table({key: texts, "n": list(range(len(texts)))}), path, row_group_size=16, compression="zstd")


TEXTS = DOCUMENTS[:60]
JSONL = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
FORMATS = {
    "plain.jsonl": lambda p: p.write_bytes(JSONL),
    "no_newline_at_the_end.jsonl": lambda p: p.write_bytes(JSONL.rstrip(b"\n")),
    "blank_lines_and_crlf.jsonl": lambda p: p.write_bytes(JSONL.replace(b"\n", b"\r\n\r\n")),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL)),
    "members.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL[:999]) + gzip.compress(JSONL[999:])),
    "a.jsonl.zst": lambda p: write_zstd(p, JSONL, 20),
    "long.jsonl.zst": lambda p: write_zstd(p, JSONL, 27),
    "longer.jsonl.zst": lambda p: write_zstd(p, JSONL, 30, frames=3),
    "a.parquet": lambda p: write_parquet(p, TEXTS),
    "folder": lambda p: [(p / "deep").mkdir(parents=True), (p / "skipped.bin").write_bytes(b"\xff"),
                         *((p / ("deep" if i % 2 else ".") / f"{i:02d}{suffix}").write_bytes(pack(text.encode()))
                           for (i, text), (suffix, pack) in zip(enumerate(TEXTS), itertools.cycle(TEXT_FILES)))],
}  # fmt: skip
TEXT_FILES = [(".txt", bytes), (".md", bytes), (".txt.gz", gzip.compress), (".TXT.zst", zstandard.ZstdCompressor().compress)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(here, tokenizer, name):
    FORMATS[name](here / name)
    if name.startswith("long"):
        window = zstandard.get_frame_parameters((here / name).read_bytes()).window_size
        assert window == {"long.jsonl.zst": 1 << 27, "longer.jsonl.zst": 1 << 30}[name]
    prepare_ok(name, "--tokenizer", tokenizer, "--out", "set", "--val-fraction", 0.2, "--workers", 1)
    found = split_texts(here / "set", tokenizer, "train") + split_texts(here / "set", tokenizer, "val")
    assert Counter(found) == Counter(TEXTS)


def test_text_key(here, tokenizer, capsys):
    (here / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    write_parquet(here / "a.parquet", TEXTS, key="body")
    for name in ("a.jsonl", "a.parquet"):
        assert "--text-key" in refused(capsys, name, "--tokenizer", tokenizer, "--out", "set", "--workers", 1)
        prepare_ok(name, "--text-key", "body", "--tokenizer", tokenizer, "--out", name + ".set", "--val-fraction", 0.2, "--workers", 1)


def test_long_documents_are_cut_at_newlines_and_lose_nothing(here, tokenizer, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1000)
    text = "".join(f"line {i} é\n" for i in range(500)) + "x" + "é" * 3000  # its end has no newline to cut at, nor a character's edge
    (here / "a.txt").write_text(text)
    write_jsonl(here / "b.jsonl", [text])
    pieces = [p.decode() for p in readers.split_document(text.encode())]
    assert "".join(pieces) == text and max(len(p.encode()) for p in pieces) <= 1000
    assert all(p.endswith("\n") for p in pieces if p.startswith("line"))
    for name in ("a.txt", "b.jsonl"):
        write_jsonl(here / "train.jsonl", TEXTS)
        prepare_ok("train.jsonl", "--val", name, "--tokenizer", tokenizer, "--out", f"set.{name}", "--workers", 1)
        assert split_texts(here / f"set.{name}", tokenizer, "val") == list(dict.fromkeys(pieces))


def test_links_are_followed_and_names_need_not_be_text(here, tokenizer, capsys):
    """A corpus put together of links, one of them back into itself, and a file name in Latin-1."""
    (here / "corpus/a").mkdir(parents=True)
    (here / "elsewhere").mkdir()
    write_jsonl(here / "corpus/a/a.jsonl", TEXTS[:20])
    write_jsonl(here / "elsewhere/b.jsonl", TEXTS[20:40])
    write_jsonl(here / "single.jsonl", TEXTS[40:50])
    for link, target in (("b", "../elsewhere"), ("c.jsonl", "../single.jsonl"), ("a/loop", "..")):
        (here / "corpus" / link).symlink_to(target)
    with open(b"corpus/caf\xe9.txt", "w") as file:
        file.write(TEXTS[50])
    command = ("corpus", "--tokenizer", tokenizer, "--out", "set", "--val-fraction", 0.2, "--workers", 1)
    prepare_ok(*command)
    assert Counter(split_texts(here / "set", tokenizer, "train") + split_texts(here / "set", tokenizer, "val")) == Counter(TEXTS[:51])
    with open(b"corpus/caf\xe9.txt", "wb") as file:
        file.write(b"\xff")
    assert r"caf\udce9.txt: not UTF-8 text" in refused(capsys, *command, "--overwrite")
    os.unlink(b"corpus/caf\xe9.txt")
    (here / "single.jsonl").unlink()
    assert "c.jsonl: not a file, or a link to nothing" in refused(capsys, *command, "--overwrite")
    os.rename("elsewhere", b"\xe9")
    prepare_ok(os.fsdecode(b"\xe9"), *command[1:4], "other", *command[5:])
    assert os.fsencode(manifest_of(here / "other")["sources"][0]["path"]) == b"\xe9"


def test_one_text_is_cut_at_its_paragraphs(here, tokenizer, capsys):
    text = "".join(f"{speaker}:\nline {speaker} é\n\nand on\n" + "\n \t\n" * (speaker % 3 + 1) for speaker in range(2000)) + "the end"
    (here / "a.txt").write_text(text)
    command = ("a.txt", "--tokenizer", tokenizer, "--out", "set", "--val-fraction", 0.2, "--workers", 1)
    assert "--split-paragraphs" in refused(capsys, *command)
    pieces = [piece.decode() for piece in readers.split_paragraphs(text.encode())]
    assert "".join(pieces) == text and len(pieces) > 10
    assert all(piece.endswith("\n") and 2048 <= len(piece.encode()) < 2200 for piece in pieces[:-1])
    assert not any(piece.startswith(("\n", " ")) for piece in pieces)
    prepare_ok(*command, "--split-paragraphs")
    assert Counter(split_texts(here / "set", tokenizer, "train") + split_texts(here / "set", tokenizer, "val")) == Counter(pieces)
    assert "--overwrite" in refused(capsys, *command)  # another dataset than that of the whole text
    for odd in ("", "one line", "\n\n", "x" * 5000):
        assert [piece.decode() for piece in readers.split_paragraphs(odd.encode())] == [odd]


def test_reading_waits_for_the_workers(monkeypatch):
    """Memory stays bounded: the reader is never more than three blocks a worker ahead."""
    taken = []

    def jobs():
        for i in range(40):
            taken.append(i)
            yield (i,)

    setup = prepare.Setup(0)
    for done, result in enumerate(prepare.run_blocks(abs, jobs(), setup, workers=2)):
        assert result == done and len(taken) <= done + 1 + 3 * 2
    assert len(taken) == 40


# ----------------------------------------------------------------------------------------------------------------------
# Embedded corpus
# ----------------------------------------------------------------------------------------------------------------------


def test_embedded_documents():
    documents = dict(readers.embedded_documents())
    names = list(documents)
    assert "stdlib/argparse.py" in names and "stdlib/json/decoder.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages", "idlelib"} & set(n.split("/"))]
    assert any(n.startswith("pydoc_data/") for n in names) and "pydoc_data/topics.py" not in names
    assert documents["stdlib/argparse.py"] == Path(__import__("argparse").__file__).read_bytes()
    assert dict(readers.embedded_documents()) == documents and list(dict(readers.embedded_documents())) == names


def test_embedded_corpus_is_the_default_and_a_second_run_does_nothing(here, capsys, monkeypatch):
    wanted = ("stdlib/argparse.py", "stdlib/ast.py", "stdlib/inspect.py", "stdlib/typing.py", "pydoc_data/")
    documents = [d for d in readers.embedded_documents() if d[0].startswith(wanted)]
    monkeypatch.setattr(readers, "embedded_documents", lambda: iter(documents))  # a smaller Python, for the clock's sake
    monkeypatch.setattr(prepare, "DATA_DIR", here / "data")
    command = ("--val-fraction", 0.2, "--vocab-size", 512, "--workers", 1)
    prepare_ok(*command)
    folder, model = here / "data/datasets/stdlib_sp512", here / "data/tokenizers/stdlib_sp512.model"
    found = split_texts(folder, model, "train") + split_texts(folder, model, "val")
    assert Counter(t.encode() for t in found) == Counter(set(data for _, data in documents))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in here.rglob("*")}
    capsys.readouterr()
    monkeypatch.setattr(prepare, "build", None)
    prepare_ok("--source", "stdlib", *command)
    assert capsys.readouterr().out.startswith("up to date")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in here.rglob("*")} == before


# ----------------------------------------------------------------------------------------------------------------------
# Kills, reruns, replacement
# ----------------------------------------------------------------------------------------------------------------------

# Kills itself with SIGKILL, as the system would, when `fatal` blocks have come back.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from data import prepare, readers
readers.BLOCK_BYTES, readers.READ_BYTES = 10_000, 1_000
run_blocks, fatal, name = prepare.run_blocks, int(sys.argv[2]), sys.argv[3]
def deadly(task, *rest):
    for count, result in enumerate(run_blocks(task, *rest)):
        if task.__name__ == name and count == fatal:
            (prepare.Path("set.partial") / ".half.part.123.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        yield result
prepare.run_blocks = deadly
if __name__ == "__main__":
    prepare.main(sys.argv[4:])
"""


@pytest.mark.parametrize(("task", "workers"), [("encode_block", 1), ("encode_block", 2), ("scan_block", 1)])
def test_a_killed_build_continues_and_ends_the_same(here, monkeypatch, capsys, task, workers):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(readers, "READ_BYTES", 1_000)
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    command = ["in.jsonl", "--vocab-size", str(VOCAB), "--val-fraction", "0.2", "--out", "set", "--workers"]
    prepare_ok(*command, 1)
    expected = files_of(here / "set") | files_of(here / "set.model") | {"model": (here / "set.model").read_bytes()}
    shutil.rmtree(here / "set")
    (here / "set.model").unlink()

    (here / "killed.py").write_text(KILLED)
    arguments = [sys.executable, "killed.py", str(ROOT), "4", task, *command, str(workers)]
    # Reading its output to the end waits for orphaned workers too: they must not outlive the build.
    killed = subprocess.run(arguments, capture_output=True, timeout=60)
    assert killed.returncode == -9
    assert not (here / "set").exists() and not (here / "set.model").exists()
    parts = {p.name: p.stat().st_ino for p in (here / "set.partial").glob("parts/*.part")}
    assert len(parts) >= 5 if task == "encode_block" else not parts

    encoded = []
    encode_block = prepare.encode_block
    monkeypatch.setattr(prepare, "encode_block", lambda block: encoded.append(block.index) or encode_block(block))
    prepare_ok(*command, 1)
    assert not {prepare.part_name(i) for i in encoded} & set(parts) and encoded
    assert files_of(here / "set") | {"model": (here / "set.model").read_bytes()} == expected
    assert not (here / "set.partial").exists()


def test_what_a_kill_in_the_last_act_leaves_is_removed(here, tokenizer, monkeypatch, capsys):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    command = ("in.jsonl", "--tokenizer", tokenizer, "--val-fraction", 0.2, "--out", "set", "--workers", 1)
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: path.name == "set.partial" or rmtree(path, **options))
    prepare_ok(*command)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert (here / "set.partial/parts/000000.part").exists()
    capsys.readouterr()
    prepare_ok(*command)
    assert capsys.readouterr().out.startswith("up to date") and sorted(p.name for p in here.iterdir()) == ["in.jsonl", "set"]


def test_the_summary_ends_with_a_command_that_trains(here, tokenizer, capsys):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    capsys.readouterr()
    prepare_ok("in.jsonl", "--tokenizer", tokenizer, "--val-fraction", 0.2, "--out", "a set", "--workers", 1)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command == [
        "next",
        "PRESET=demo",
        "VOCAB_SIZE=400",
        "DATA_PATH=a set",
        f"TOKENIZER_PATH={tokenizer}",
        "python",
        str(ROOT / "train_gpt.py"),
    ]


def test_work_of_other_options_is_not_continued(here, tokenizer, monkeypatch):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    (here / "set.partial/parts").mkdir(parents=True)
    (here / "set.partial/job.json").write_text('{"job": "another"}')
    (here / "set.partial/parts/000000.part").write_bytes(b"of another build")
    prepare_ok("in.jsonl", "--tokenizer", tokenizer, "--val-fraction", 0.2, "--out", "set", "--workers", 1)
    assert len(split_texts(here / "set", tokenizer, "train")) > 100


def test_damaged_dataset_is_built_again_and_another_one_is_kept(here, tokenizer, capsys):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    command = ("in.jsonl", "--tokenizer", tokenizer, "--out", "set", "--workers", 1, "--val-fraction")
    prepare_ok(*command, 0.2)
    expected = files_of(here / "set")
    (here / "set/fineweb_val_000000.bin").write_bytes(b"short")
    prepare_ok(*command, 0.2)
    assert files_of(here / "set") == expected

    for other in ((0.3,), (0.2, "--allow-lossy")):
        assert "--overwrite" in refused(capsys, *command, *other)
    assert files_of(here / "set") == expected
    (here / "set/manifest.json").write_text("{")
    assert "set/manifest.json: damaged" in refused(capsys, *command, 0.2)
    prepare_ok(*command, 0.3, "--overwrite")
    assert manifest_of(here / "set")["splits"]["val"]["documents"] > manifest_of_bytes(expected)["splits"]["val"]["documents"]
    assert sorted(p.name for p in here.iterdir()) == ["in.jsonl", "set"]

    write_jsonl(here / "in.jsonl", DOCUMENTS[:-1])  # changed input is another build
    assert "--overwrite" in refused(capsys, *command, 0.3)


def test_a_tokenizer_that_is_gone_is_made_again(here):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    command = ("in.jsonl", "--vocab-size", VOCAB, "--out", "set", "--tokenizer-out", "t.model", "--workers", 1, "--val-fraction", 0.2)
    prepare_ok(*command)
    made = (here / "t.model").read_bytes()
    (here / "t.model").unlink()
    prepare_ok(*command)
    assert (here / "t.model").read_bytes() == made


def manifest_of_bytes(files: dict[str, bytes]) -> dict:
    return json.loads(files["manifest.json"])


def test_a_full_disk_is_said_with_its_place_and_the_build_goes_on_later(here, tokenizer, capsys, monkeypatch):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    command = ("in.jsonl", "--tokenizer", tokenizer, "--out", "set", "--workers", 1, "--val-fraction", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.ShardWriter, "_write", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        assert refused(capsys, *command) == "error: set.partial: No space left on device"
    prepare_ok(*command)
    assert "continuing the build" in capsys.readouterr().err and sorted(p.name for p in here.iterdir()) == ["in.jsonl", "set"]


def test_two_builds_at_once_are_refused(here, tokenizer, capsys):
    pytest.importorskip("fcntl")
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    with builds.exclusive(here / "set.partial"):
        assert "another prepare.py is building" in refused(capsys, "in.jsonl", "--tokenizer", tokenizer, "--out", "set", "--workers", 1)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------

GOOD = json.dumps({"text": "good"}).encode() + b"\n"
BAD_FILES = {
    "a.jsonl": [
        (GOOD + b'{"text": "x"\n', "a.jsonl:2: not a JSON object"),
        (GOOD + b'{"txt": "x"}\n', "a.jsonl:2: no key 'text'"),
        (GOOD + b"[1]\n", "a.jsonl:2: no key 'text'"),
        (GOOD * 2 + b'{"text": 5}\n', "a.jsonl:3: 'text' is int"),
        (GOOD + b'{"text": "\xff"}\n', "a.jsonl:2: not a JSON object"),
        (b"", "no usable document"),
    ],
    "a.txt": [(b"fine\xff\xfe", "a.txt: not UTF-8 text (byte 4"), ("▁".encode(), "no usable document")],
    "a.jsonl.gz": [(gzip.compress(GOOD * 99, mtime=0)[:-9], "a.jsonl.gz: damaged or truncated"), (b"no archive", "a.jsonl.gz: damaged")],
    "a.jsonl.zst": [
        (
            zstandard.ZstdCompressor().compress(json.dumps({"text": os.urandom(999).hex()}).encode())[:-9],
            "a.jsonl.zst: damaged or truncated",
        ),
        (zstandard.ZstdCompressor().compress(GOOD) + b"trailing", "a.jsonl.zst: damaged"),
        (b"no archive", "a.jsonl.zst: damaged"),
    ],
    "a.parquet": [(b"PAR1 not really", "a.parquet: not a readable parquet file")],
    "a.csv": [(b"x", "a.csv: not a .txt")],
}


@pytest.mark.parametrize(("name", "data", "message"), [(n, d, m) for n, cases in BAD_FILES.items() for d, m in cases])
def test_bad_files(here, tokenizer, capsys, name, data, message):
    (here / name).write_bytes(data)
    assert message in refused(capsys, name, "--tokenizer", tokenizer, "--out", "set", "--workers", 1)
    assert [p.name for p in here.iterdir()] == [name]  # nothing half-written


def test_a_line_that_is_no_document_is_not_read_whole(here, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 100)
    write_jsonl(here / "in.jsonl", ["short", "long " * 30])
    assert "in.jsonl:2: a line of more than" in refused(capsys, "in.jsonl", "--tokenizer", tokenizer, "--out", "set", "--workers", 1)


def test_an_error_in_a_worker_process_is_still_one_line(here, tokenizer, capsys):
    (here / "a.jsonl").write_bytes(GOOD + b"{\n")
    assert "a.jsonl:2: not a JSON object" in refused(capsys, "a.jsonl", "--tokenizer", tokenizer, "--out", "set", "--workers", 2)
    assert [p.name for p in here.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "missing.txt: no such file"),
        (["empty"], "empty: no .txt"),
        (["in.jsonl", "--source", "stdlib"], "not both"),
        (["in.jsonl", "--val", "missing.jsonl"], "missing.jsonl: no such file"),
        (["in.jsonl", "--val", "in.jsonl", "--val-fraction", "0.1"], "not both"),
        (["in.jsonl", "--drop-overlap"], "--drop-overlap goes with --val"),
        (["in.jsonl", "--val-fraction", "1.5"], "--val-fraction: 1.5"),
        (["in.jsonl", "--val-fraction", "nan"], "--val-fraction: nan"),
        (["in.jsonl", "--val-fraction", "1e-9", "--vocab-size", "300"], "no validation document among 300"),
        (["in.jsonl", "--vocab-size", "100"], "--vocab-size: 100"),
        (["in.jsonl", "--vocab-size", "70000"], "--vocab-size: 70000"),
        (["in.jsonl", "--vocab-size", "some"], "--vocab-size: invalid int value"),
        (["in.jsonl", "--vocab-size", "9999"], "cannot train a tokenizer of 9999 pieces: Vocabulary size too high"),
        (["in.jsonl", "--tokenizer", "missing.model"], "missing.model: No such file"),
        (["in.jsonl", "--val-fraction", "0"], "--val-fraction: 0.0"),
        (["in.jsonl", "--tokenizer", "in.jsonl"], "in.jsonl is not a SentencePiece model"),
        (["in.jsonl", "--tokenizer", "small.model", "--vocab-size", "500"], "has 400 pieces, not --vocab-size 500"),
        (["in.jsonl", "--workers", "0"], "--workers: 0"),
        (["in.jsonl", "--shard-tokens", "0"], "--shard-tokens: 0"),
        (["in.jsonl", "--no-such-option"], "--no-such-option"),
        (["in.jsonl", "--variant", "sp1024"], "does not go with"),
        (["--variant", "sp7"], "--variant sp7: known are sp1024"),
        (["--train-shards", "3"], "go with --variant"),
    ],
)
def test_bad_arguments(here, tokenizer, capsys, arguments, message):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    (here / "empty").mkdir()
    shutil.copy(tokenizer, here / "small.model")
    before = sorted(p.name for p in here.iterdir())
    assert message in refused(capsys, *arguments, *([] if "--workers" in arguments else ["--workers", "1"]), "--out", "set")
    assert sorted(p.name for p in here.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos_id": 2, "eos_id": 1}, "its BOS id is 2"),
        ({"normalization_rule_name": "nmt_nfkc"}, "does not give this validation document back"),
    ],
)
def test_unfit_tokenizers(here, capsys, options, message):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    base = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2}
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=prepare.sentences(DOCUMENTS), model_writer=model, vocab_size=VOCAB, **{**base, **options}
    )
    (here / "other.model").write_bytes(model.getvalue())
    command = ("in.jsonl", "--tokenizer", "other.model", "--out", "set", "--val-fraction", 0.2, "--workers", 1)
    assert message in refused(capsys, *command)
    if "normalization_rule_name" in options:
        prepare_ok(*command, "--allow-lossy")
        manifest = manifest_of(here / "set")
        assert manifest["tokenizer"]["val_documents_not_round_trip"] > 0
        assert sum(s["raw_bytes"] for s in manifest["splits"].values()) == sum(len(t.encode()) for t in DOCUMENTS)  # the text's, still


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "user_defined_symbols": ["\n"]}


def test_lossless_tokenizer_with_a_dummy_prefix(here):
    """It puts a space in front of each document that its text does not have, and takes it away again: not text, not lossy."""
    model = train_variant(here, **PLAIN)
    texts = [*DOCUMENTS, " leading", "  two", "\nnewline first", "\tx"]
    write_jsonl(here / "in.jsonl", texts)
    prepare_ok("in.jsonl", "--tokenizer", model, "--out", "set", "--val-fraction", 0.2, "--workers", 1)
    manifest, table = manifest_of(here / "set"), shards.ByteTable.from_tokenizer(shards.load_tokenizer(model))
    assert Counter(split_texts(here / "set", model, "train") + split_texts(here / "set", model, "val")) == Counter(texts)
    for split in ("train", "val"):
        tokens = split_tokens(here / "set", split)
        assert int(table.count(tokens[:-1], tokens[1:]).sum()) == manifest["splits"][split]["raw_bytes"]
    assert sum(s["raw_bytes"] for s in manifest["splits"].values()) == sum(len(t.encode()) for t in texts)


def test_a_tokenizer_that_ends_texts_with_a_space(here, capsys):
    """Only the token after it could tell whether such a space is text; without the dummy one every space is."""
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    command = ("in.jsonl", "--out", "set", "--val-fraction", 0.2, "--workers", 1, "--tokenizer")
    model = train_variant(here, **PLAIN, treat_whitespace_as_suffix=True)
    assert "treat_whitespace_as_suffix" in refused(capsys, *command, model)
    prepare_ok(*command, train_variant(here, **PLAIN, treat_whitespace_as_suffix=True, add_dummy_prefix=False))


def test_damaged_tokenizers_are_refused_in_one_line(here, tokenizer, capsys):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    good = tokenizer.read_bytes()
    at = good.index("▁".encode())
    for name, model in {
        "not text": good[:at] + b"\xff" + good[at + 1 :],  # loads, and its piece cannot be read
        "cut": good[: len(good) // 2],
        "empty": b"",
        "no length": good[:-1] + b"\xff",
    }.items():
        (here / "bad.model").write_bytes(model)
        assert "bad.model" in refused(capsys, "in.jsonl", "--tokenizer", "bad.model", "--out", "set", "--workers", 1), name
        with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
            shards.load_tokenizer(here / "bad.model")


def test_a_tokenizer_that_loses_training_text_is_caught(here, tokenizer, capsys):
    """Validation round-trips by luck; the bytes of the training documents still give the tokenizer away."""
    model = train_variant(here, add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="nfkc",
                          user_defined_symbols=["\n"])  # fmt: skip
    write_jsonl(here / "val.jsonl", ["plain words"])
    write_jsonl(here / "train.jsonl", ["plain too", "ligature ﬁ"])
    message = refused(capsys, "train.jsonl", "--val", "val.jsonl", "--tokenizer", model, "--out", "set", "--workers", 1)
    assert "train.jsonl:2: the tokenizer changes this document's bytes" in message


def test_another_tokenizer_in_the_way(here, capsys):
    write_jsonl(here / "in.jsonl", DOCUMENTS)
    (here / "mine.model").write_bytes(b"mine")
    command = ("in.jsonl", "--vocab-size", VOCAB, "--tokenizer-out", "mine.model", "--out", "set", "--val-fraction", 0.2, "--workers", 1)
    with pytest.raises(UserError, match=r"mine\.model: another tokenizer stands here"):
        prepare_ok(*command)
    assert (here / "mine.model").read_bytes() == b"mine" and not (here / "set").exists()
    prepare_ok(*command, "--overwrite")
    assert len(split_texts(here / "set", here / "mine.model", "train")) > 100


def test_the_command_itself(here):
    """Exit code and stderr of the real process, and no torch in it."""
    script = str(ROOT / "data/prepare.py")
    result = subprocess.run([sys.executable, script, "missing.jsonl"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: missing.jsonl: no such file or folder\n")
    probe = "import sys; from data import prepare; prepare.parse_arguments([]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.stdout == "False\n"


# ----------------------------------------------------------------------------------------------------------------------
# Published exports, from a local server with the hub's layout
# ----------------------------------------------------------------------------------------------------------------------

REPO = "someone/parameter-golf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        base = f"/datasets/{REPO}/resolve/"
        files, self.server.requests[self.command] = self.server.files, self.server.requests[self.command] + 1
        if self.path.startswith(f"/api/datasets/{REPO}/"):
            self.list_files("/tree/" in self.path)
            return
        name = self.path.removeprefix(base).partition("/")[2]
        if not self.path.startswith(base) or name not in files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith(base) else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0] or 0)
        sent = self.server.damaged.get(name, data)[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if body:
            self.server.sent.append(name)
            self.wfile.write(sent)

    def list_files(self, tree: bool):
        """The two listings that huggingface_hub asks for: of a revision (with its commit), and of a commit's tree."""
        listing = []
        for name, data in self.server.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            size, lfs = len(data), {"size": len(data), "pointerSize": 130, "sha256": hashlib.sha256(data).hexdigest()}
            large = name.endswith((".bin", ".model"))
            if tree:
                lfs = {**lfs, "oid": lfs["sha256"]}
                listing.append({"type": "file", "path": name, "size": size, "oid": blob} | ({"lfs": lfs} if large else {}))
            else:
                listing.append({"rfilename": name, "size": size, "blobId": blob} | ({"lfs": lfs} if large else {}))
        reply = listing if tree else {"id": REPO, "sha": self.server.commit, "siblings": listing}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(here, tokenizer, monkeypatch):
    """A server with two training shards, a validation shard, a tokenizer and the manifest; `prefix` as on the real hub."""
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    files = {"datasets/tokenizers/fineweb_400_bpe.model": tokenizer.read_bytes()}

    def shard(texts: list[str]) -> bytes:
        tokens = np.array([t for text in texts for t in [1, *processor.encode(text)]], "<u2")
        return np.array([20240520, 1, len(tokens)] + [0] * 253, "<i4").tobytes() + tokens.tobytes()

    for name, texts in (("val_000000", DOCUMENTS[:20]), ("train_000000", DOCUMENTS[20:90]), ("train_000001", DOCUMENTS[90:100])):
        files[f"datasets/datasets/fineweb10B_sp400/fineweb_{name}.bin"] = shard(texts)
    listing = {
        "datasets": [{"name": "fineweb10B_sp400", "tokenizer_name": "sp_bpe_400", "path": "datasets/fineweb10B_sp400",
                      "stats": {"files_train": 2, "files_val": 1}}],
        "tokenizers": [{"name": "sp_bpe_400", "model_path": "tokenizers/fineweb_400_bpe.model",
                        "vocab_path": "tokenizers/fineweb_400_bpe.vocab"}],
    }  # fmt: skip
    files["datasets/manifest.json"] = json.dumps(listing).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files, server.damaged, server.sent, server.requests, server.commit = files, {}, [], Counter(), COMMIT
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    endpoint = f"http://127.0.0.1:{server.server_port}"
    server.command = ("--variant", "sp400", "--repo-id", REPO, "--endpoint", endpoint, "--out", "datasets/web")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_published_export(hub, here, tokenizer, capsys):
    prepare_ok(*hub.command, "--train-shards", 1)
    folder, model = here / "datasets/web", here / "tokenizers/fineweb_400_bpe.model"
    assert sorted(p.name for p in folder.iterdir()) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json"]
    assert model.read_bytes() == tokenizer.read_bytes()
    assert split_texts(folder, model, "val") == DOCUMENTS[:20]
    manifest = manifest_of(folder)
    for split, texts in (("val", DOCUMENTS[:20]), ("train", DOCUMENTS[20:90])):
        entry = manifest["splits"][split]
        assert (entry["documents"], entry["raw_bytes"]) == (len(texts), sum(len(t.encode()) for t in texts))
        assert entry["tokens"] == len(split_tokens(folder, split))
    assert manifest["sources"] == [{"kind": "hub", "repo_id": REPO, "commit": COMMIT, "dataset": "fineweb10B_sp400"}]

    hub.requests.clear()
    prepare_ok(*hub.command, "--train-shards", 1)
    assert "up to date" in capsys.readouterr().out and not hub.requests  # not even asked

    hub.sent.clear()
    prepare_ok(*hub.command)  # all there are: only the missing shard travels
    assert [Path(n).name for n in hub.sent] == ["manifest.json", "fineweb_train_000001.bin"]
    assert split_texts(folder, model, "train") == DOCUMENTS[20:100]
    assert sorted(p.name for p in (here / "datasets").iterdir()) == ["web"]


def test_a_document_that_runs_on_into_the_next_shard_is_counted_whole(here, tokenizer):
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = np.array([t for text in DOCUMENTS[:5] for t in [1, *processor.encode(text)]], "<u2")
    paths, cut = [here / shards.shard_name("train", index) for index in range(2)], len(tokens) // 2
    assert tokens[cut] != 1
    for path, part in zip(paths, (tokens[:cut], tokens[cut:])):
        path.write_bytes(shards.shard_header(len(part)) + part.tobytes())
    entry = published.count_split(paths, shards.ByteTable.from_tokenizer(processor), processor.vocab_size(), lambda: None)
    assert (entry["documents"], entry["tokens"]) == (5, len(tokens))
    assert entry["raw_bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:5])


def test_published_export_at_the_root_of_a_repository(hub, here):
    hub.files = {name.removeprefix("datasets/"): data for name, data in hub.files.items()}
    prepare_ok(*hub.command)
    assert len(manifest_of(here / "datasets/web")["splits"]["train"]["shards"]) == 2


def test_an_export_without_bos_counts_what_is_scored(hub, here, tokenizer):
    """Its first token is no target, so the bytes of that one are not among those that a score is divided by."""
    processor = shards.load_tokenizer(tokenizer)
    ids = processor.encode(DOCUMENTS[0])
    hub.files["datasets/datasets/fineweb10B_sp400/fineweb_val_000000.bin"] = shards.shard_header(len(ids)) + np.array(ids, "<u2").tobytes()
    prepare_ok(*hub.command)
    entry = manifest_of(here / "datasets/web")["splits"]["val"]
    first = len(processor.decode(ids[:1]).encode())
    assert first and (entry["documents"], entry["raw_bytes"]) == (0, len(DOCUMENTS[0].encode()) - first)


def test_shards_the_user_has_already_are_kept(hub, here):
    name = "datasets/datasets/fineweb10B_sp400/fineweb_train_000000.bin"
    path = here / "datasets/web/fineweb_train_000000.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(hub.files[name])
    inode = path.stat().st_ino
    prepare_ok(*hub.command)
    assert path.stat().st_ino == inode and name not in hub.sent


def test_a_published_file_never_replaces_another(hub, here, capsys):
    path = here / "datasets/web/fineweb_val_000000.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    assert "is not the published file" in refused(capsys, *hub.command)
    assert path.read_bytes() == b"mine"
    prepare_ok(*hub.command, "--overwrite")
    assert len(split_tokens(path.parent, "val"))


SHARD = "datasets/datasets/fineweb10B_sp400/fineweb_train_000001.bin"


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda hub: hub.damaged.update({SHARD: flip(hub.files[SHARD])}), "arrived damaged"),
        (lambda hub: hub.files.pop(SHARD), "has no file datasets/datasets/fineweb10B_sp400/fineweb_train_000001.bin"),
        (lambda hub: hub.files.update({SHARD: b"x" * 3000}), "fineweb_train_000001.bin is not a token shard"),
        (lambda hub: hub.files.update({SHARD: hub.files[SHARD][:-2]}), "fineweb_train_000001.bin is truncated"),
        (lambda hub: hub.files.update({SHARD: hub.files[SHARD][:-2] + b"\xff\xff"}), "token 65535, beyond VOCAB_SIZE=400"),
        (lambda hub: hub.files.pop("datasets/manifest.json"), "has no file manifest.json"),
        (lambda hub: hub.files.update({"datasets/manifest.json": b"{}"}), "not the layout of the published exports"),
        (lambda hub: hub.files.update({"datasets/manifest.json": b"<html>"}), "not the layout of the published exports"),
        (lambda hub: hub.files.update({"datasets/manifest.json": hub.files["datasets/manifest.json"].replace(b"sp400", b"sp9")}),
         "has no fineweb10B_sp400 (it has fineweb10B_sp9)"),
        (lambda hub: hub.files.pop("datasets/tokenizers/fineweb_400_bpe.model"), "has no file datasets/tokenizers"),
    ],
)  # fmt: skip
def test_a_broken_export_is_refused_and_a_mended_one_continues(hub, here, capsys, break_it, message):
    good = dict(hub.files)
    break_it(hub)
    assert message in refused(capsys, *hub.command)
    folder = here / "datasets/web"
    assert not (folder / "manifest.json").exists() and not (folder / "fineweb_train_000001.bin").exists()
    hub.files, hub.damaged, hub.commit = good, {}, COMMIT[::-1]
    prepare_ok(*hub.command)
    assert len(manifest_of(folder)["splits"]["train"]["shards"]) == 2


def test_more_shards_than_published_no_repository_and_no_server(hub, here, capsys):
    assert "has 2 training shards of fineweb10B_sp400, not 3" in refused(capsys, *hub.command, "--train-shards", 3)
    command = list(hub.command)
    command[3] = "nobody/nothing"
    assert "no dataset repository nobody/nothing" in refused(capsys, *command)
    with contextlib.closing(http.server.HTTPServer(("127.0.0.1", 0), None).socket) as socket:
        port = socket.getsockname()[1]
    command = list(hub.command)
    command[5] = f"http://127.0.0.1:{port}"
    assert "127.0.0.1" in refused(capsys, *command)
    assert not (here / "datasets").exists() or not list((here / "datasets").iterdir())

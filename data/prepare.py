#!/usr/bin/env python3
"""Text in, tokenizer and token shards out.

    python data/prepare.py                                       # embedded corpus: the running Python's own sources
    python data/prepare.py corpus/ --vocab-size 8192             # .txt .md .jsonl .parquet, also .gz and .zst
    python data/prepare.py train.jsonl.zst --val val.jsonl.zst --vocab-size 8192 --name web_sp8192
    python data/prepare.py more.jsonl --tokenizer data/tokenizers/web_sp8192.model
    python data/prepare.py --variant sp8192 --train-shards 10    # published FineWeb exports, already tokenized

Written: data/datasets/<name>/fineweb_{train,val}_%06d.bin, manifest.json, {train,val}_documents.sha256 and
data/tokenizers/<name>.model. data/README.md describes the formats, the rules and what bounds memory.

How a build runs
  read      the main process decompresses the sources and cuts them into blocks of about 4 MB;
  scan      workers hash every document; documents with the smallest hashes become the tokenizer's sample;
  encode    workers tokenize block by block, each block into one part file, sorted by document hash;
  merge     part files are read back by hash range, duplicates dropped, shards written: a full shuffle of the
            documents whose result depends neither on the number of workers nor on the order of the input.
A part file is whole or absent, so a killed build continues where it was. Nothing appears under the final name
before all of it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import tokenize
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: this file's folder alone is on the path
from data.shards import (
    BOS_ID,
    MAX_VOCAB_SIZE,
    SHARD_HEADER_BYTES,
    SPACE,
    SPLITS,
    ByteTable,
    load_shard,
    parse_tokenizer,
    shard_header,
    shard_name,
)
from parts.files import UserError, atomic_write, cli, one_line, read_json, sha256_file, write_json

# ----------------------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------------------

MANIFEST_FORMAT = 1
# Part of every job's identity: raise it when a change here alters the output for the same input.
ALGORITHM_VERSION = 1

BLOCK_BYTES = 4 << 20  # raw text per task; small enough to keep all workers busy on the embedded corpus
READ_BYTES = 1 << 20  # decompressed bytes per read
READ_ZSTD_BYTES = 128 << 10  # compressed bytes per read: zstd may blow them up several hundred times
MAX_RECORD_BYTES = 256 << 20  # a JSON line above this is not a document, and would not fit in memory next to others
MAX_DOCUMENT_BYTES = 8 << 20  # a longer document is cut at a newline, so that one huge .txt needs no huge memory
RANGE_BYTES = 64 << 20  # token bytes merged at a time

DATA_DIR = Path(__file__).resolve().parent


class Interrupted(UserError):
    """A build that stopped for want of memory or the like: its parts are worth keeping."""


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress(description: str, total: int | None, unit: str, scale: bool = True):
    """A progress bar on stderr, silent where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(desc=description, total=total, unit=unit, unit_scale=scale, disable=None, dynamic_ncols=True)


# ----------------------------------------------------------------------------------------------------------------------
# Sources: files → blocks of raw records
# ----------------------------------------------------------------------------------------------------------------------

TEXT_SUFFIXES = (".txt", ".md")
FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")


def file_format(path: Path) -> str | None:
    """One of text, jsonl and parquet; None for a file that is none of them."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = FORMATS.get(Path(path.stem).suffix.lower())
        return None if inner == "parquet" else inner  # parquet compresses its own pages
    return FORMATS.get(suffix)


@dataclass(frozen=True)
class Source:
    """One input: a file, all files of a folder, or the embedded corpus.

    label: how messages and the manifest name it (as the user wrote it)
    files: in the order they are read; empty for the embedded corpus
    split: "train", "val", or "hash" when each document's hash decides
    """

    label: str
    files: tuple[Path, ...]
    split: str

    @property
    def embedded(self) -> bool:
        return not self.files


def find_source(argument: str, split: str) -> Source:
    """Source for a path on the command line. Raises UserError when nothing there can be read."""
    path = Path(argument)
    if path.is_dir():
        files = sorted((p for p in path.rglob("*") if p.is_file() and file_format(p)), key=lambda p: p.as_posix())
        if not files:
            raise UserError(f"{argument}: no .txt, .md, .jsonl (.gz, .zst) or .parquet file in this folder")
        return Source(argument, tuple(files), split)
    if not path.exists():
        raise UserError(f"{argument}: no such file or folder")
    if file_format(path) is None:
        raise UserError(f"{argument}: not a .txt, .md, .jsonl (.gz, .zst) or .parquet file")
    return Source(argument, (path,), split)


def describe_source(source: Source) -> dict:
    """The source's entry in the manifest. Reads every byte: the digest is what tells a changed input."""
    if source.embedded:
        digest, size, count = hashlib.sha256(), 0, 0
        for label, data in embedded_documents():
            digest.update(f"{hashlib.sha256(data).hexdigest()}  {label}\n".encode())
            size += len(data)
            count += 1
        version = ".".join(map(str, sys.version_info[:3]))
        return {"kind": "stdlib", "python": version, "split": source.split, "files": count, "bytes": size, "sha256": digest.hexdigest()}
    with futures.ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the interpreter lock
        digests = list(pool.map(sha256_file, source.files))
    entry = {
        "kind": "file",
        "path": source.label,
        "split": source.split,
        "files": len(source.files),
        "bytes": sum(p.stat().st_size for p in source.files),
    }
    root = Path(source.label)
    if root.is_dir():
        entry["kind"] = "folder"
        lines = "".join(f"{d}  {p.relative_to(root).as_posix()}\n" for d, p in zip(digests, source.files, strict=True))
        entry["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    else:
        entry["sha256"] = digests[0]
    return entry


# What of the standard library is not a document: tests and their data, installed packages, applications rather than
# library, tables written by generators (encodings), and files made for one machine. pydoc_data comes in as topics.
EMBEDDED_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib-dynload", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


def embedded_documents() -> Iterator[tuple[str, bytes]]:
    """(name, UTF-8 text) of the running Python's library sources and help topics, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - EMBEDDED_SKIPPED_FOLDERS  # not even entered: site-packages may be vast
        names += [os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/") for name in files]
    for name in sorted(names):
        if not name.endswith(".py") or name.startswith("_sysconfigdata"):
            continue
        raw = (root / name).read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            yield f"stdlib/{name}", raw.decode(encoding).encode()
        except (SyntaxError, UnicodeError):
            continue  # not a Python source in the encoding it declares
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield f"pydoc_data/{name}", topics[name].encode()


@dataclass
class Block:
    """A task: consecutive raw records of one split rule.

    items: (kind, label, first record number, data); kind "text" holds one document, "jsonl" whole lines, "rows" a list
    """

    index: int
    split: str
    items: list[tuple[str, str, int, object]] = field(default_factory=list)
    size: int = 0


def open_stream(path: Path) -> Iterator[bytes]:
    """Decompressed chunks of a file. Raises UserError for a damaged or truncated archive."""
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            if suffix == ".zst":
                yield from _zstd_chunks(file)
                return
            stream = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
            while chunk := stream.read(READ_BYTES):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated archive ({error})") from None


def _zstd_chunks(file: io.BufferedReader) -> Iterator[bytes]:
    """All frames of a zstd file, windows up to 2 GiB (--long=31).

    Not `stream_reader`: that one ends quietly in the middle of a truncated frame.
    """
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, pending, started = context.decompressobj(), b"", False
    try:
        while data := pending or file.read(READ_ZSTD_BYTES):
            started, pending = True, b""
            if chunk := frame.decompress(data):
                yield chunk
            if frame.eof:
                pending = frame.unused_data
                frame, started = context.decompressobj(), False
    except zstandard.ZstdError as error:
        raise UserError(f"{file.name}: damaged archive ({error})") from None
    if started:
        raise UserError(f"{file.name}: damaged or truncated archive (ends inside a zstd frame)")


def cut_position(data: bytes, limit: int) -> int:
    """Where to cut a document of more than `limit` bytes: after its last newline, else between two characters."""
    newline = data.rfind(b"\n", 0, limit)
    if newline > 0:
        return newline + 1
    while limit > 1 and data[limit] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        limit -= 1
    return limit


def split_document(data: bytes) -> Iterator[bytes]:
    """The document, or its consecutive pieces of at most MAX_DOCUMENT_BYTES."""
    while len(data) > MAX_DOCUMENT_BYTES:
        position = cut_position(data, MAX_DOCUMENT_BYTES)
        yield data[:position]
        data = data[position:]
    yield data


def read_items(source: Source, text_key: str) -> Iterator[tuple[str, str, int, object, int]]:
    """(kind, label, first record number, data, bytes) of every record group of a source, in reading order."""
    if source.embedded:
        for label, data in embedded_documents():
            yield "text", label, 1, data, len(data)
        return
    for path in source.files:
        reader = {"text": _text_items, "jsonl": _jsonl_items, "parquet": _parquet_items}[file_format(path)]
        yield from reader(path, text_key)


def _text_items(path: Path, _: str) -> Iterator[tuple[str, str, int, object, int]]:
    """One document a file. Cut as `split_document` does, without ever holding the file."""
    buffer, piece = b"", 1
    for chunk in open_stream(path):
        buffer += chunk
        while len(buffer) > MAX_DOCUMENT_BYTES:
            position = cut_position(buffer, MAX_DOCUMENT_BYTES)
            yield "text", str(path), piece, buffer[:position], position
            buffer, piece = buffer[position:], piece + 1
    yield "text", str(path), piece, buffer, len(buffer)


def _jsonl_items(path: Path, _: str) -> Iterator[tuple[str, str, int, object, int]]:
    """Whole lines, up to BLOCK_BYTES of them together; the workers parse."""
    pending, size, line = [], 0, 1
    for chunk in open_stream(path):
        pending.append(chunk)
        size += len(chunk)
        if size < BLOCK_BYTES:
            continue
        newline = chunk.rfind(b"\n")
        if newline < 0:
            if size > MAX_RECORD_BYTES:
                raise UserError(f"{path}:{line}: a line of more than {MAX_RECORD_BYTES >> 20} MB; is this JSON lines?")
            continue
        pending[-1] = chunk[: newline + 1]
        data = b"".join(pending)
        yield "jsonl", str(path), line, data, len(data)
        line += data.count(b"\n")
        pending = [chunk[newline + 1 :]]
        size = len(pending[0])
    if size:
        yield "jsonl", str(path), line, b"".join(pending), size


def _parquet_items(path: Path, text_key: str) -> Iterator[tuple[str, str, int, object, int]]:
    import pyarrow
    import pyarrow.parquet

    row = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {text_key!r} (it has {columns}); choose with --text-key")
            for batch in file.iter_batches(batch_size=512, columns=[text_key]):
                values = batch.column(0).to_pylist()
                yield "rows", str(path), row, values, batch.nbytes
                row += len(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)})") from None


def read_blocks(sources: Iterable[Source], text_key: str) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES. Their contents depend on the sources only, never on who asks."""
    block = None
    for source in sources:
        for kind, label, first, data, size in read_items(source, text_key):
            if block and (block.split != source.split or block.size + size > BLOCK_BYTES):
                yield block
                block = Block(block.index + 1, source.split)
            block = block or Block(0, source.split)
            block.items.append((kind, label, first, data))
            block.size += size
    if block:
        yield block


# ----------------------------------------------------------------------------------------------------------------------
# Documents: blocks → text, hash, split
# ----------------------------------------------------------------------------------------------------------------------


def excluded(text: str) -> str | None:
    """Why a document cannot be part of a dataset, or None. Cheap, and stated in the README."""
    if not text:
        return "empty"
    if SPACE in text:
        return "contains_u2581"
    return None


def block_records(block: Block, text_key: str) -> Iterator[tuple[str, str | bytes]]:
    """(place, text or UTF-8 bytes) of each record of a block. Raises UserError naming file and line."""
    for kind, label, first, data in block.items:
        if kind == "text":
            yield label if first == 1 else f"{label} (piece {first})", data
        elif kind == "rows":
            for number, text in enumerate(data, first):
                if not isinstance(text, str):
                    raise UserError(f"{label}: row {number}: {text_key!r} is {type(text).__name__}, not a string")
                yield f"{label}: row {number}", text
        else:
            for number, line in enumerate(data.split(b"\n"), first):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[text_key]
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{label}:{number}: not a JSON object ({one_line(error)})") from None
                except (KeyError, TypeError, IndexError):
                    raise UserError(f"{label}:{number}: no key {text_key!r}; choose with --text-key") from None
                if not isinstance(text, str):
                    raise UserError(f"{label}:{number}: {text_key!r} is {type(text).__name__}, not a string")
                yield f"{label}:{number}", text


@dataclass
class Document:
    place: str
    text: str
    nbytes: int  # UTF-8
    high: int  # sha256 of the UTF-8 text, first 8 bytes, big-endian: order, split
    low: int  # next 8 bytes: choice of the tokenizer's sample
    split: str


def block_documents(block: Block, text_key: str, val_limit: int, counters: Counter) -> Iterator[Document]:
    """Documents of a block, each with its split; counts what is left out in `counters`.

    val_limit: under split "hash", documents whose hash begins below it are validation.
    """
    for place, record in block_records(block, text_key):
        if isinstance(record, str):
            try:
                record = record.encode()
            except UnicodeEncodeError:  # JSON's "\\ud800": half of a pair, no UTF-8 exists for it
                counters["documents_read"] += 1
                counters["lone_surrogate"] += 1
                continue
        for piece in split_document(record):
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 text (byte {error.start}: {error.reason})") from None
            counters["documents_read"] += 1
            if reason := excluded(text):
                counters[reason] += 1
                continue
            digest = hashlib.sha256(piece).digest()
            high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
            split = block.split if block.split != "hash" else ("val" if high < val_limit else "train")
            yield Document(place, text, len(piece), high, low, split)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------

MIN_VOCAB_SIZE = 3 + 1 + 256 + 1  # <unk> <s> </s>, newline, the bytes, "▁"
MAX_SENTENCE = 1 << 16  # characters the trainer gets at a time; only word boundaries matter to it


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines for the trainer. Newlines are a symbol of their own, so no piece can span two lines anyway."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_SENTENCE):
                yield line[start : start + MAX_SENTENCE]


def train_tokenizer(texts: Iterable[str], vocab_size: int, coverage: float) -> bytes:
    """SentencePiece BPE with decode(encode(x)) == x, as a serialized model.

    Identity normalization, no dummy prefix and no whitespace folding keep the text as it is; byte fallback spells what
    the vocabulary lacks; newline is a user symbol (the trainer takes it for the end of a sentence otherwise);
    whitespace-only pieces give code its indentation; "▁" alone is required, since byte accounting relies on it.
    Raises UserError when the text cannot fill the vocabulary, or the vocabulary cannot hold its characters.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            unk_id=0, bos_id=BOS_ID, eos_id=2, pad_id=-1, user_defined_symbols=["\n"], byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, required_chars=SPACE, character_coverage=coverage,
            max_sentence_length=8 * MAX_SENTENCE, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        message = re.sub(r"^.*?\)\] ?", "", one_line(error)) or "no text in its sample"
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces: {message}") from None
    return model.getvalue()


def model_facts(model: bytes) -> dict[str, int]:
    """ "bpe", "identity" and "dummy_prefix" of a serialized model, 0 or 1.

    Reads the few fields of sentencepiece_model.proto that the processor does not expose: trainer_spec (2).model_type
    (3) and normalizer_spec (3).precompiled_charsmap (2), .add_dummy_prefix (3), .remove_extra_whitespaces (4).
    """

    def varint(data: bytes, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at

    def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
        at = 0
        while at < len(data):
            tag, at = varint(data, at)
            if tag & 7 == 0:
                value, at = varint(data, at)
            else:
                size, at = varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
                value, at = data[at : at + size], at + size
            yield tag >> 3, value

    top = {key: value for key, value in fields(model) if key in (2, 3)}
    trainer, normalizer = dict(fields(top.get(2, b""))), dict(fields(top.get(3, b"")))
    folds = normalizer.get(4, 1)  # whitespace runs become one space
    return {"bpe": int(trainer.get(3, 1) == 2), "identity": int(not normalizer.get(2) and not folds),
            "dummy_prefix": int(normalizer.get(3, 1))}  # fmt: skip


class Encoder(dict):
    """Text → little-endian uint16 tokens, the same as `processor.encode`, several times as fast.

    Where no piece holds a space behind another character, and newlines are a piece of their own, no merge reaches over
    the edge between a word and the spaces in front of the next, so words can be encoded apart and remembered (this
    dict: spaces + word → tokens). Tokenizers without this property are applied to the whole text.
    """

    LIMIT = 400_000  # words remembered, about 60 MB; then it starts again

    def __init__(self, model: bytes, processor: spm.SentencePieceProcessor):
        super().__init__()
        self._processor = processor
        facts = model_facts(model)
        pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size()) if not processor.is_control(i)]
        apart = all(SPACE not in p.lstrip(SPACE) and ("\n" not in p or p == "\n") for p in pieces)
        self.by_word = bool(facts["bpe"] and facts["identity"] and not facts["dummy_prefix"] and apart)
        self._words = re.compile(r" *[^ \n]+| +|\n").findall

    def __missing__(self, word: str) -> bytes:
        tokens = np.array(self._processor.encode(word), "<u2").tobytes()
        if len(word) < 64:
            if len(self) >= self.LIMIT:
                self.clear()
            self[word] = tokens
        return tokens

    def encode(self, text: str) -> bytes:
        if not self.by_word:
            return np.array(self._processor.encode(text), "<u2").tobytes()
        return b"".join(map(self.__getitem__, self._words(text)))


class Sample:
    """The documents with the smallest hashes, up to `budget` bytes: a uniform sample that no order changes.

    A document counts with at most a quarter of the budget, so that one book is not all there is.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.total = 0
        self._heap: list[tuple[tuple[int, int], str, int]] = []  # largest key first: keys are negated
        self._keys: set[tuple[int, int]] = set()

    @property
    def threshold(self) -> tuple[int, int] | None:
        """Keys from here on cannot enter any more; None while there is room."""
        if self.total < self.budget or not self._heap:
            return None
        low, high = self._heap[0][0]
        return (-low, -high)

    def add(self, key: tuple[int, int], text: str) -> None:
        if key in self._keys or (self.threshold is not None and key >= self.threshold):
            return
        size = len(text.encode())
        heapq.heappush(self._heap, ((-key[0], -key[1]), text, size))
        self._keys.add(key)
        self.total += size
        # Keep the shortest run of smallest keys that reaches the budget.
        while self.total - self._heap[0][2] >= self.budget:
            (low, high), _, size = heapq.heappop(self._heap)
            self._keys.remove((-low, -high))
            self.total -= size

    def texts(self) -> list[str]:
        return [text for _, text, _ in sorted(self._heap, reverse=True)]


def clip_text(text: str, limit: int) -> str:
    data = text.encode()
    return text if len(data) <= limit else data[: cut_position(data, limit)].decode()


# ----------------------------------------------------------------------------------------------------------------------
# Work on a block (worker processes)
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to know; the same for all of them."""

    text_key: str
    val_limit: int
    sample_budget: int = 0  # scan only; 0 collects nothing
    model: bytes = b""  # encode only
    lossy: bool = False
    parts: str = ""


@dataclass
class ScanResult:
    split: str
    hashes: np.ndarray  # uint64 [documents, 2]
    nbytes: int
    train: int
    candidates: list[tuple[tuple[int, int], str]]


_worker: dict = {}


def start_worker(setup: WorkerSetup, child: bool = True) -> None:
    """Per-process state. In a child also: leave Ctrl-C to the parent, and die with it."""
    _worker["setup"] = setup
    if setup.model:
        processor = parse_tokenizer(setup.model, "tokenizer")
        _worker.update(processor=processor, table=ByteTable.from_tokenizer(processor), encoder=Encoder(setup.model, processor))
    if child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = multiprocessing.parent_process()
        # A worker waiting for tasks holds both ends of its queue and would outlive a killed parent for ever.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def scan_block(block: Block, threshold: tuple[int, int] | None) -> ScanResult:
    """Hashes of a block's documents, and the training documents that may enter the tokenizer's sample."""
    setup: WorkerSetup = _worker["setup"]
    hashes, candidates, nbytes, train = [], [], 0, 0
    for document in block_documents(block, setup.text_key, setup.val_limit, Counter()):
        hashes.append((document.high, document.low))
        nbytes += document.nbytes
        if document.split != "train":
            continue
        train += 1
        key = (document.low, document.high)  # the split looks at `high`: choose by the other half
        if setup.sample_budget and (threshold is None or key < threshold):
            candidates.append((key, clip_text(document.text, max(1, setup.sample_budget // 4))))
    return ScanResult(block.split, np.array(hashes, np.uint64).reshape(-1, 2), nbytes, train, candidates)


def encode_block(block: Block) -> int:
    """Tokenize a block into its part file; returns its raw bytes.

    Every document's tokens must stand for as many bytes as its text has, and every validation document must decode
    to itself. Raises UserError naming the document otherwise.
    """
    setup: WorkerSetup = _worker["setup"]
    processor, encoder, table = _worker["processor"], _worker["encoder"], _worker["table"]
    counters: Counter = Counter()
    documents, pieces = [], []
    bos = np.array([BOS_ID], "<u2").tobytes()
    for document in block_documents(block, setup.text_key, setup.val_limit, counters):
        piece = encoder.encode(document.text)
        if document.split == "val" and processor.decode(np.frombuffer(piece, "<u2").tolist()) != document.text:
            counters["val_not_round_trip"] += 1
            if not setup.lossy:
                raise UserError(f"{document.place}: the tokenizer does not give this validation document back; "
                                "take another tokenizer, or accept it with --allow-lossy")  # fmt: skip
        document.text = ""
        documents.append(document)
        pieces.append(bos + piece)
    ntok = np.array([len(piece) // 2 for piece in pieces], np.uint32)
    nbytes = np.array([d.nbytes for d in documents], np.uint32)
    if documents and not setup.lossy:
        starts = np.cumsum(ntok, dtype=np.int64) - ntok
        ids = np.frombuffer(b"".join(pieces), "<u2")
        counted = np.concatenate([[0], table.count(ids[:-1], ids[1:])])  # every document begins with BOS, which stands for none
        wrong = np.flatnonzero(np.add.reduceat(counted, starts) != nbytes)
        if len(wrong):
            raise UserError(f"{documents[wrong[0]].place}: the tokenizer changes this document's bytes; "
                            "take another tokenizer, or accept it with --allow-lossy")  # fmt: skip
    high = np.array([d.high for d in documents], np.uint64)
    low = np.array([d.low for d in documents], np.uint64)
    is_val = np.array([d.split == "val" for d in documents], bool)
    # An explicit validation set keeps its own order; everything else is sorted, training first.
    order = np.arange(len(documents)) if block.split == "val" else np.lexsort((low, high, is_val))
    Part.write(
        Path(setup.parts) / Part.name(block.index),
        {"documents": [int((~is_val).sum()), int(is_val.sum())], "tokens": int(ntok.sum(dtype=np.int64)),
         "counters": dict(counters), "split": block.split},
        [high[order], low[order], ntok[order], nbytes[order]], [pieces[i] for i in order],
    )  # fmt: skip
    return int(nbytes.sum(dtype=np.int64))


class Part:
    """A part file: JSON line, then uint64 high[n], uint64 low[n], uint32 tokens[n], uint32 bytes[n], uint16 tokens."""

    FIELDS = (("high", "<u8"), ("low", "<u8"), ("ntok", "<u4"), ("nbytes", "<u4"))

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            line = file.readline()
        self.head = json.loads(line)
        self.n = sum(self.head["documents"])
        offset = len(line)
        self.offsets = {}
        for name, kind in self.FIELDS:
            self.offsets[name] = (offset, kind)
            offset += self.n * np.dtype(kind).itemsize
        self.offsets["tokens"] = (offset, "<u2")

    @staticmethod
    def name(index: int) -> str:
        return f"{index:06d}.part"

    @staticmethod
    def write(path: Path, head: dict, arrays: list[np.ndarray], pieces: list[bytes]) -> None:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for (_, kind), array in zip(Part.FIELDS, arrays, strict=True):
                file.write(array.astype(kind).tobytes())
            file.writelines(pieces)

    def section(self, split: str) -> tuple[int, int]:
        """First document of a split in this part, and the one after its last."""
        train = self.head["documents"][0]
        return (0, train) if split == "train" else (train, self.n)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        offset, kind = self.offsets[name]
        return np.fromfile(self.path, kind, stop - start, offset=offset + start * np.dtype(kind).itemsize)


# ----------------------------------------------------------------------------------------------------------------------
# Running blocks over processes
# ----------------------------------------------------------------------------------------------------------------------


def run_blocks(task, jobs: Iterable[tuple], setup: WorkerSetup, workers: int) -> Iterator:
    """Results of task(*job) in the order of `jobs`, computed on `workers` processes.

    At most three jobs a worker are in flight: the reader waits for the workers, so memory stays bounded.
    """
    if workers == 1:
        start_worker(setup, child=False)
        for job in jobs:
            yield task(*job)
        return
    # "spawn" everywhere: forking a process with threads (hashing, progress bars) is not safe.
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(setup,))
    waiting: deque = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(task, *job))
            while len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except futures.process.BrokenProcessPool:
        raise Interrupted("a worker process died (out of memory?); the same command continues the build") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Merge: part files → shards
# ----------------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one split: shards of exactly `shard_tokens` (the last one shorter), and the document hashes beside them.

    Documents run on from one shard into the next, as in the published exports.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int, bar):
        self.folder, self.split, self.shard_tokens, self._bar = folder, split, shard_tokens, bar
        self.shards: list[dict] = []
        self.documents = self.tokens = self.raw_bytes = 0
        self._file, self._filled = None, 0
        self._hashes = open(folder / f"{split}_documents.sha256", "wb")

    def add(self, tokens: np.ndarray, high: np.ndarray, low: np.ndarray, nbytes: np.ndarray) -> None:
        """Append documents: their tokens in one array, and a hash and a size each."""
        self._hashes.write(np.stack([high, low], 1).astype(">u8").tobytes())
        self.documents += len(high)
        self.raw_bytes += int(nbytes.sum(dtype=np.int64))
        self.tokens += len(tokens)
        self._bar.update(len(tokens))
        while len(tokens):
            if self._file is None:
                name = shard_name(self.split, len(self.shards))
                self._file = open(self.folder / name, "w+b")
                self._file.write(shard_header(0))
            part = tokens[: self.shard_tokens - self._filled]
            self._file.write(part.astype("<u2").tobytes())
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == self.shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        self._file.seek(0)
        self._file.write(shard_header(self._filled))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = Path(self._file.name)
        self.shards.append({"file": path.name, "tokens": self._filled, "sha256": sha256_file(path)})
        self._file, self._filled = None, 0

    def close(self) -> dict:
        """The split's entry in the manifest."""
        if self._file is not None:
            self._close_shard()
        self._hashes.flush()
        os.fsync(self._hashes.fileno())
        self._hashes.close()
        path = Path(self._hashes.name)
        return {"documents": self.documents, "tokens": self.tokens, "raw_bytes": self.raw_bytes, "shards": self.shards,
                "document_hashes": {"file": path.name, "sha256": sha256_file(path)}}  # fmt: skip


class HashSet:
    """Document hashes in 16 bytes each: sorted pairs, searched by their first half."""

    def __init__(self, high: np.ndarray, low: np.ndarray):
        order = np.lexsort((low, high))
        self._high, self._low = high[order], low[order]

    def contains(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """bool [n]"""
        first = np.searchsorted(self._high, high, "left")
        last = np.searchsorted(self._high, high, "right")
        found = first < last
        for i in np.flatnonzero(found):
            found[i] = low[i] in self._low[first[i] : last[i]]
        return found


def merge_ordered(parts: list[Part], writer: ShardWriter, dropped: Counter) -> None:
    """An explicit validation set: input order, first occurrence kept."""
    seen: set[tuple[int, int]] = set()
    for part in parts:
        high, low, ntok, nbytes = (part.read(name, 0, part.n) for name, _ in Part.FIELDS)
        starts = np.concatenate([[0], np.cumsum(ntok, dtype=np.int64)])
        tokens = part.read("tokens", 0, int(starts[-1]))
        keep = []
        for i, key in enumerate(zip(high.tolist(), low.tolist(), strict=True)):
            if key not in seen:
                seen.add(key)
                keep.append(i)
        dropped["duplicates"] += part.n - len(keep)
        if keep:
            pieces = [tokens[starts[i] : starts[i + 1]] for i in keep]
            writer.add(np.concatenate(pieces), high[keep], low[keep], nbytes[keep])


def merge_by_hash(parts: list[Part], split: str, writer: ShardWriter, dropped: Counter, held_out: HashSet | None):
    """All documents of a split in order of their hash, a range of hashes at a time; one of each hash is kept.

    held_out: documents to leave out, those of an explicit validation set.
    """
    total = sum(part.head["tokens"] for part in parts)
    ranges = max(1, -(-2 * total // RANGE_BYTES))
    edges = np.array([(r << 64) // ranges for r in range(1, ranges)], np.uint64)
    # Where each range begins in each part, in documents and in tokens: parts are sorted, so ranges are contiguous.
    bounds = []
    for part in parts:
        first, last = part.section(split)
        at = first + np.concatenate([[0], np.searchsorted(part.read("high", first, last), edges), [last - first]])
        cumulative = np.concatenate([[0], np.cumsum(part.read("ntok", 0, last), dtype=np.int64)])
        bounds.append((at, cumulative[at]))
    for r in range(ranges):
        fields: dict[str, list[np.ndarray]] = {name: [] for name in ("high", "low", "ntok", "nbytes", "tokens")}
        for part, (at, token_at) in zip(parts, bounds, strict=True):
            if at[r] == at[r + 1]:
                continue
            for name, _ in Part.FIELDS:
                fields[name].append(part.read(name, at[r], at[r + 1]))
            fields["tokens"].append(part.read("tokens", token_at[r], token_at[r + 1]))
        if not fields["high"]:
            continue
        high, low, ntok, nbytes, tokens = (np.concatenate(arrays) for arrays in fields.values())
        starts = np.concatenate([[0], np.cumsum(ntok, dtype=np.int64)])
        order = np.lexsort((low, high))
        again = np.zeros(len(order), bool)
        again[1:] = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        dropped["duplicates"] += int(again.sum())
        order = order[~again]
        if held_out is not None:
            overlap = held_out.contains(high[order], low[order])
            dropped["in_validation"] += int(overlap.sum())
            order = order[~overlap]
        if len(order):
            pieces = [tokens[starts[i] : starts[i + 1]] for i in order]
            writer.add(np.concatenate(pieces), high[order], low[order], nbytes[order])


# ----------------------------------------------------------------------------------------------------------------------
# A build: scan → tokenizer → encode → merge → publish
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """Everything that decides the output, and where it goes.

    entries: the sources as the manifest lists them
    tokenizer: an existing model, or None to train one of `vocab_size` pieces into `tokenizer_path`
    """

    args: argparse.Namespace
    sources: list[Source]
    entries: list[dict]
    out: Path
    tokenizer_path: Path
    vocab_size: int
    tokenizer: bytes | None
    explicit_val: bool
    command: str

    @property
    def identity(self) -> str:
        args = self.args
        if self.tokenizer is not None:
            tokenizer: object = hashlib.sha256(self.tokenizer).hexdigest()
        else:
            tokenizer = [self.vocab_size, args.tokenizer_sample_mb, args.character_coverage]
        facts = [ALGORITHM_VERSION, spm.__version__, self.entries, tokenizer, args.text_key, args.shard_tokens,
                 None if self.explicit_val else args.val_fraction, args.drop_overlap, args.allow_lossy]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def setup(self, **options) -> WorkerSetup:
        limit = 0 if self.explicit_val else int(self.args.val_fraction * 2**64)
        return WorkerSetup(self.args.text_key, limit, **options)


def is_complete(out: Path, manifest: dict | None, identity: str | None) -> bool:
    """Whether `out` holds what the manifest says (sizes, tokenizer hash) and it is the wanted build."""
    try:
        if manifest["job"] != identity:
            return False
        for split in SPLITS:
            entry = manifest["splits"][split]
            for shard in entry["shards"]:
                if (out / shard["file"]).stat().st_size != SHARD_HEADER_BYTES + 2 * shard["tokens"]:
                    return False
            if entry["document_hashes"] and not (out / entry["document_hashes"]["file"]).is_file():
                return False
        return sha256_file(out / manifest["tokenizer"]["path"]) == manifest["tokenizer"]["sha256"]
    except (OSError, KeyError, TypeError):
        return False


def summary(out: Path, manifest: dict) -> str:
    tokenizer = manifest["tokenizer"]
    lines = [f"dataset    {out}"]
    lines.append(f"tokenizer  {os.path.normpath(out / tokenizer['path'])} ({tokenizer['vocab_size']} pieces)")
    for split in SPLITS:
        entry = manifest["splits"][split]
        ratio = entry["raw_bytes"] / max(1, entry["tokens"] - entry["documents"])
        lines.append(
            f"{split:<10} {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{entry['raw_bytes']:,} bytes ({ratio:.2f} bytes a token), {len(entry['shards'])} shard(s)"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """The right to build in `folder`; the system takes it back when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: unguarded
            pass
        except OSError:
            raise UserError(f"{folder}: another prepare.py is building there") from None
        yield


def build(job: Job) -> dict:
    """Build the dataset of a job, or continue a killed build of it. Returns the manifest."""
    work = job.out.with_name(job.out.name + ".partial")
    with exclusive(work):
        try:
            return _build(job, work)
        except Interrupted:
            raise
        except UserError:  # the input must change, so what was made of it is of no use
            shutil.rmtree(work)
            raise


def _build(job: Job, work: Path) -> dict:
    state = read_json(work / "job.json")
    if state is None or state.get("job") != job.identity:
        if state is not None:
            say(f"{work}: left by a build of other input or options; starting afresh")
        for path in work.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(work / "job.json", {"job": job.identity})
    elif (work / "parts").is_dir():
        say(f"continuing the build in {work}")
    for leftover in work.rglob(".*.tmp"):  # of processes that were killed in the middle of a write
        leftover.unlink(missing_ok=True)
    total = scan(job, work)
    model = job.tokenizer if job.tokenizer is not None else (work / "tokenizer.model").read_bytes()
    taken = job.tokenizer is None and job.tokenizer_path.exists() and job.tokenizer_path.read_bytes() != model
    if taken and not job.args.overwrite:
        raise UserError(f"{job.tokenizer_path}: another tokenizer stands here; choose --tokenizer-out or --overwrite")
    parts = encode(job, work, model, total)
    manifest = merge(job, work, parts, model)
    publish(job, work, model)
    return manifest


def scan(job: Job, work: Path) -> int | None:
    """Pass over all text: overlap of the splits, and the tokenizer when one is to be trained.

    Returns the raw bytes, or None where no pass was needed. Leaves tokenizer.model and scan.json in `work`.
    """
    train_one = job.tokenizer is None
    if not train_one and not (job.explicit_val and not job.args.drop_overlap):
        return None
    if done := read_json(work / "scan.json"):
        return done["bytes"]
    budget = int(job.args.tokenizer_sample_mb * 1e6) if train_one else 0
    sample = Sample(budget)
    val_hashes, held_out, overlap = [], None, set()
    nbytes = counts_train = counts_val = 0
    # The threshold travels with each job: a stale one lets more through, and `sample` still decides.
    jobs = ((block, sample.threshold) for block in read_blocks(job.sources, job.args.text_key))
    with progress("scan", None, "B") as bar:
        for result in run_blocks(scan_block, jobs, job.setup(sample_budget=budget), job.args.workers):
            bar.update(result.nbytes)
            nbytes += result.nbytes
            counts_train += result.train
            counts_val += len(result.hashes) - result.train
            if result.split == "val":
                val_hashes.append(result.hashes)
                continue
            if job.explicit_val:  # validation is read first, so its hashes are complete by now
                if held_out is None:
                    held_out = HashSet(*np.concatenate(val_hashes or [np.zeros((0, 2), np.uint64)]).T)
                found = result.hashes[held_out.contains(*result.hashes.T)]
                overlap.update((low, high) for high, low in found.tolist())
            for key, text in result.candidates:
                if key not in overlap:
                    sample.add(key, text)
    if overlap and not job.args.drop_overlap:
        raise UserError(f"{len(overlap)} document(s) of the validation set are also in the training set; "
                        "leave them out of training with --drop-overlap")  # fmt: skip
    if not counts_train or not counts_val:
        raise UserError(empty_split_message(job, counts_train, counts_val))
    if train_one:
        started = time.perf_counter()
        model = train_tokenizer(sample.texts(), job.vocab_size, job.args.character_coverage)
        parse_tokenizer(model, "trained tokenizer")
        with atomic_write(work / "tokenizer.model") as temporary:
            temporary.write_bytes(model)
        say(f"tokenizer of {job.vocab_size} pieces trained on {sample.total / 1e6:.1f} MB "
            f"in {time.perf_counter() - started:.1f} s")  # fmt: skip
    write_json(work / "scan.json", {"bytes": nbytes})
    return nbytes


def empty_split_message(job: Job, train: int, val: int) -> str:
    if not train and not val:
        return "no usable document in the input"
    split = "training" if not train else "validation"
    hint = "" if job.explicit_val else f" with --val-fraction {job.args.val_fraction}"
    return f"no {split} document among {train + val}{hint}"


def encode(job: Job, work: Path, model: bytes, total: int | None) -> list[Part]:
    """Every block's part file: those that are there are kept."""
    folder = work / "parts"
    folder.mkdir(exist_ok=True)
    present = {path.name for path in folder.iterdir()}
    count = 0

    def missing() -> Iterator[tuple[Block]]:
        nonlocal count
        for block in read_blocks(job.sources, job.args.text_key):
            count += 1
            if Part.name(block.index) in present:
                bar.update(block.size)
            else:
                yield (block,)

    with progress("tokenize", total, "B") as bar:
        setup = job.setup(model=model, lossy=job.args.allow_lossy, parts=str(folder))
        for nbytes in run_blocks(encode_block, missing(), setup, job.args.workers):
            bar.update(nbytes)
    return [Part(folder / Part.name(index)) for index in range(count)]


def merge(job: Job, work: Path, parts: list[Part], model: bytes) -> dict:
    """Part files → shards, hash lists and manifest in work/final."""
    final = work / "final"
    shutil.rmtree(final, ignore_errors=True)  # merging is quick: a killed merge starts over
    final.mkdir()
    splits, dropped, held_out = {}, {}, None
    with progress("merge", sum(part.head["tokens"] for part in parts), "tok") as bar:
        for split in reversed(SPLITS):
            writer = ShardWriter(final, split, job.args.shard_tokens, bar)
            dropped[split] = Counter(duplicates=0)
            if split == "val" and job.explicit_val:
                val_parts = [part for part in parts if part.head["split"] == "val"]
                merge_ordered(val_parts, writer, dropped[split])
                hashes = [np.concatenate([part.read(name, 0, part.n) for part in val_parts] or [np.zeros(0, np.uint64)])
                          for name in ("high", "low")]  # fmt: skip
                held_out = HashSet(*hashes)
            else:
                merge_by_hash(parts, split, writer, dropped[split], held_out)
            splits[split] = writer.close()
    if not splits["train"]["documents"] or not splits["val"]["documents"]:
        raise UserError(empty_split_message(job, splits["train"]["documents"], splits["val"]["documents"]))
    counters = sum((Counter(part.head["counters"]) for part in parts), Counter())
    read = counters.pop("documents_read", 0)
    lossy = counters.pop("val_not_round_trip", 0)
    manifest = {
        "format": MANIFEST_FORMAT,
        "command": job.command,
        "job": job.identity,
        "tokenizer": {
            "path": Path(os.path.relpath(job.tokenizer_path, job.out)).as_posix(),
            "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": job.vocab_size,
            "val_documents_not_round_trip": lossy,
        },
        "splits": {split: splits[split] for split in SPLITS},
        "split_rule": "explicit" if job.explicit_val else f"sha256 < {job.args.val_fraction} * 2**256",
        "documents_read": read,
        "dropped": {**{split: dict(dropped[split]) for split in SPLITS}, "excluded": dict(sorted(counters.items()))},
        "sources": job.entries,
        "software": {"sentencepiece": spm.__version__},
    }
    write_json(final / "manifest.json", manifest)
    return manifest


def publish(job: Job, work: Path, model: bytes) -> None:
    """Rename the finished files into place: the tokenizer, then the whole folder at once."""
    if job.tokenizer is None:
        with atomic_write(job.tokenizer_path) as temporary:
            temporary.write_bytes(model)
    old = work / "replaced"
    if job.out.exists():
        os.rename(job.out, old)
    os.rename(work / "final", job.out)
    shutil.rmtree(work)


# ----------------------------------------------------------------------------------------------------------------------
# Published FineWeb exports
# ----------------------------------------------------------------------------------------------------------------------

PUBLISHED_REPOS = {"sp1024": "willdepueoai/parameter-golf", "sp4096": "kevclark/parameter-golf",
                   "sp8192": "kevclark/parameter-golf"}  # fmt: skip
PUBLISHED_TRAIN_SHARDS = 80  # what the challenge's own downloader takes: 8B tokens, 16 GB


class Hub:
    """One revision of a dataset repository, read through huggingface_hub."""

    def __init__(self, repo_id: str, revision: str, endpoint: str | None, cache: Path):
        import huggingface_hub as hub
        from huggingface_hub.utils import disable_progress_bars

        self._hub, self.repo_id, self.revision, self.endpoint, self._cache = hub, repo_id, revision, endpoint, cache
        self.commit: str | None = None  # what the revision stood for when the first file was asked about
        if not sys.stderr.isatty():
            disable_progress_bars()

    def _call(self, what: str, function, **options):
        """function(**options), every failure of hub or network as a UserError about `what`."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

        where = f"{self.repo_id} at {self.endpoint or self._hub.constants.ENDPOINT}"
        try:
            return function(**options)
        except LocalEntryNotFoundError as error:  # an EntryNotFoundError too: the hub could not be asked
            raise UserError(f"cannot reach {where} for {what}: {one_line(error.__cause__ or error)[:200]}") from None
        except EntryNotFoundError:
            raise MissingFile(f"{where} has no file {what}") from None
        except RepositoryNotFoundError:
            raise UserError(f"no dataset repository {where}, or no access to it") from None
        # Which exceptions a broken connection raises depends on the HTTP client inside (requests, httpx, hf_xet).
        except Exception as error:
            raise UserError(f"{what} from {where}: {type(error).__name__}: {one_line(error)[:200]}") from None

    def metadata(self, name: str):
        """.size in bytes, .etag (sha256 for large files), .commit_hash"""
        url = self._hub.hf_hub_url(self.repo_id, name, repo_type="dataset", revision=self.revision,
                                   endpoint=self.endpoint)  # fmt: skip
        found = self._call(name, self._hub.get_hf_file_metadata, url=url, endpoint=self.endpoint)
        self.commit = self.commit or found.commit_hash
        return found

    def matches(self, path: Path, metadata) -> bool:
        if metadata.size is not None and path.stat().st_size != metadata.size:
            return False
        etag = metadata.etag or ""
        if re.fullmatch(r"[0-9a-f]{64}", etag):  # large files
            return sha256_file(path) == etag
        if re.fullmatch(r"[0-9a-f]{40}", etag):  # small ones: git's blob hash
            data = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == etag
        return True

    def download(self, name: str) -> Path:
        """Local copy of a file, continued where an earlier download broke off, checked by size and sha256."""
        metadata = self.metadata(name)
        path = Path(self._call(name, self._hub.hf_hub_download, repo_id=self.repo_id, filename=name,
                               repo_type="dataset", revision=metadata.commit_hash or self.revision,
                               endpoint=self.endpoint, local_dir=self._cache))  # fmt: skip
        if not self.matches(path, metadata):
            path.unlink()
            raise UserError(f"{name} from {self.repo_id} arrived damaged (size or sha256 differ); run again")
        return path


class MissingFile(UserError):
    """The repository answers, but has no such file."""


def fetch(args: argparse.Namespace, out: Path, tokenizer_dir: Path, command: str) -> dict:
    """Download a published export (shards that are there already are kept) and write its manifest."""
    name = f"fineweb10B_{args.variant}"
    repo_id = args.repo_id or PUBLISHED_REPOS[args.variant]
    facts = [name, repo_id, args.revision, args.endpoint, args.remote_prefix]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    have = read_json(out / "manifest.json")
    if is_complete(out, have, identity) and not args.overwrite:
        wanted = args.train_shards or min(PUBLISHED_TRAIN_SHARDS, have["published_shards"]["train"])
        if len(have["splits"]["train"]["shards"]) >= wanted:
            print("up to date")
            return have
    work = out.with_name(out.name + ".partial")
    with exclusive(work):
        hub = Hub(repo_id, args.revision, args.endpoint, work / "download")
        try:
            prefix, listing = published_listing(hub, args.remote_prefix)
            available, model_name = published_files(hub, listing, name)
        except UserError:  # nothing of size was downloaded yet
            shutil.rmtree(work)
            raise
        wanted = args.train_shards or min(PUBLISHED_TRAIN_SHARDS, available["train"])
        if wanted > available["train"]:
            shutil.rmtree(work)
            raise UserError(f"{repo_id} has {available['train']} training shards of {name}, not {wanted}")

        model_path = tokenizer_dir / Path(model_name).name
        place(hub, f"{prefix}{model_name}", model_path, args.overwrite)
        processor = parse_tokenizer(model_path.read_bytes(), str(model_path))
        vocab_size = processor.vocab_size()
        splits = {}
        counts = {"val": available["val"], "train": wanted}
        with progress("download", sum(counts.values()), "shard", scale=False) as bar:
            for split in reversed(SPLITS):
                shards, count = [], TextCount(processor)
                for index in range(counts[split]):
                    path = out / shard_name(split, index)
                    place(hub, f"{prefix}datasets/{name}/{path.name}", path, args.overwrite, vocab_size)
                    tokens = load_shard(path, vocab_size)
                    count.add(tokens)
                    shards.append({"file": path.name, "tokens": len(tokens), "sha256": sha256_file(path)})
                    bar.update(1)
                splits[split] = {"documents": count.documents, "tokens": count.tokens, "raw_bytes": count.nbytes,
                                 "shards": shards, "document_hashes": None}  # fmt: skip
        manifest = {
            "format": MANIFEST_FORMAT,
            "command": command,
            "job": identity,
            "tokenizer": {"path": Path(os.path.relpath(model_path, out)).as_posix(), "sha256": sha256_file(model_path),
                          "vocab_size": vocab_size},
            "splits": {split: splits[split] for split in SPLITS},
            "split_rule": "published",
            # The exports hold tokens only: bytes are those the tokens stand for, after the tokenizer's normalization.
            "raw_bytes_counted_from": "tokens",
            "published_shards": available,
            "sources": [{"kind": "hub", "repo_id": repo_id, "commit": hub.commit, "dataset": name}],
            "software": {"sentencepiece": spm.__version__},
        }  # fmt: skip
        write_json(out / "manifest.json", manifest)
        shutil.rmtree(work)
    return manifest


def published_files(hub: Hub, listing: dict, name: str) -> tuple[dict[str, int], str]:
    """(shards of each split, path of the tokenizer model) that the published manifest states for a dataset."""
    try:
        entry = next((d for d in listing["datasets"] if d["name"] == name), None)
        if entry is None:
            names = ", ".join(sorted(d["name"] for d in listing["datasets"]))
            raise UserError(f"{hub.repo_id} has no {name} (it has {names})")
        tokenizer = next(t for t in listing["tokenizers"] if t["name"] == entry["tokenizer_name"])
        available = {split: int(entry["stats"][f"files_{split}"]) for split in SPLITS}
        return available, tokenizer.get("model_path") or tokenizer["path"]
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{hub.repo_id}: its manifest.json has not the layout of the published exports") from None


def published_listing(hub: Hub, prefix: str) -> tuple[str, dict]:
    """(folder prefix, manifest) of a repository, whose files lie under `prefix` or at the root."""
    folder = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    try:
        path = hub.download(f"{folder}manifest.json")
    except MissingFile:
        if not folder:
            raise
        folder = ""
        path = hub.download("manifest.json")
    listing = read_json(path) or {}
    if not isinstance(listing.get("datasets"), list) or not isinstance(listing.get("tokenizers"), list):
        raise UserError(f"{hub.repo_id}: its manifest.json has not the layout of the published exports")
    return folder, listing


def place(hub: Hub, remote: str, path: Path, overwrite: bool, vocab_size: int = 0) -> None:
    """Have `remote` at `path`. A file that is there already is kept if it is the published one."""
    if path.exists() and not overwrite:
        if hub.matches(path, hub.metadata(remote)):
            return
        raise UserError(f"{path}: stands here and is not the published file; --overwrite replaces it")
    if path.exists() and hub.matches(path, hub.metadata(remote)):
        return
    local = hub.download(remote)
    if vocab_size:
        try:
            load_shard(local, vocab_size)
        except UserError:
            local.unlink()
            raise
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(local, path)
    except OSError:  # tokenizers may lie on another file system
        with atomic_write(path) as temporary:
            shutil.copyfile(local, temporary)


class TextCount:
    """Documents, tokens and text bytes of consecutive shards of one split. The first token of all is no target: it counts no bytes."""

    def __init__(self, processor: spm.SentencePieceProcessor):
        self._table = ByteTable.from_tokenizer(processor)
        self._last = np.zeros(0, np.uint16)
        self.documents = self.tokens = self.nbytes = 0

    def add(self, tokens: np.ndarray) -> None:
        for start in range(0, len(tokens), 1 << 24):
            ids = np.concatenate([self._last, tokens[start : start + (1 << 24)]])
            self.documents += int((ids[len(self._last) :] == BOS_ID).sum())
            self.tokens += len(ids) - len(self._last)
            self.nbytes += int(self._table.count(ids[:-1], ids[1:]).sum())
            self._last = ids[-1:]


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def number(kind, low, high=None, open_ends: bool = False):
    """argparse type: a number of `kind` within [low, high], or strictly between them."""

    def parse(text: str):
        value = kind(text)
        inside = low < value < high if open_ends else low <= value and (high is None or value <= high)
        if not inside:
            where = "between" if open_ends else "within"
            raise argparse.ArgumentTypeError(f"{text} is not {where} {low} and {high or '∞'}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)  # fmt: skip
    add = parser.add_argument_group("sources").add_argument
    add("inputs", nargs="*", metavar="PATH", help=".txt .md .jsonl (.gz .zst) .parquet files, or folders of them")
    add("--source", choices=["stdlib"], help="the embedded corpus; the default where no PATH is given")
    add("--val", action="append", metavar="PATH", help="validation documents, in their order (may be repeated)")
    add(
        "--val-fraction",
        type=number(float, 0, 1, open_ends=True),
        metavar="F",
        help="without --val: the share of documents, by hash, that is held out (0.03 for stdlib, else 0.01)",
    )
    add("--drop-overlap", action="store_true", help="leave documents of --val out of training instead of failing")
    add("--text-key", default="text", metavar="KEY", help="field or column that holds the text (text)")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--vocab-size", type=number(int, MIN_VOCAB_SIZE, MAX_VOCAB_SIZE), metavar="V", help="pieces to train (1024)")
    add("--tokenizer", metavar="PATH", help="take this SentencePiece model instead of training one")
    add(
        "--tokenizer-sample-mb",
        type=number(float, 0.001, 1e6),
        default=32.0,
        metavar="MB",
        help="training text the tokenizer is trained on (32)",
    )
    add(
        "--character-coverage",
        type=number(float, 0.9, 1.0),
        default=0.9995,
        metavar="C",
        help="share of characters that get a piece; the rest is spelled in bytes (0.9995)",
    )
    add("--allow-lossy", action="store_true", help="accept a tokenizer that changes text, as published ones do")
    add = parser.add_argument_group("published exports").add_argument
    add("--variant", metavar="sp1024|sp4096|sp8192", help="download this export of FineWeb")
    add("--train-shards", type=number(int, 1), metavar="N", help="training shards of 100M tokens to have (80)")
    add("--repo-id", help="dataset repository on the hub (by variant)")
    add("--endpoint", metavar="URL", help="address of the hub (https://huggingface.co)")
    add("--revision", default="main", help="branch, tag or commit (main)")
    add("--remote-prefix", default="datasets", metavar="FOLDER", help="folder of manifest.json in the repository (datasets)")
    add = parser.add_argument_group("output").add_argument
    add("--name", help="names data/datasets/<name> and data/tokenizers/<name>.model (<input>_sp<V>)")
    add("--out", metavar="FOLDER", help="dataset folder, if another one")
    add("--tokenizer-out", metavar="PATH", help="tokenizer file, if another one")
    add("--shard-tokens", type=number(int, 1, 2**31 - 1), default=100_000_000, metavar="N", help="tokens a shard (100M)")
    add("--overwrite", action="store_true", help="replace another dataset or tokenizer that stands there")
    add("--workers", type=number(int, 1), metavar="N", help="processes (all cores)")
    args = parser.parse_intermixed_args(argv)

    if args.variant is not None:
        for option in ("inputs", "source", "val", "val_fraction", "vocab_size", "tokenizer", "name"):
            if getattr(args, option):
                option = option.replace("_", "-")
                raise UserError(f"--variant downloads a finished dataset; it does not go with {option}")
        if not re.fullmatch(r"\w+", args.variant) or (args.variant not in PUBLISHED_REPOS and args.repo_id is None):
            raise UserError(f"--variant {args.variant}: known are {', '.join(PUBLISHED_REPOS)}; others need --repo-id")
    elif args.train_shards or args.repo_id or args.endpoint:
        raise UserError("--train-shards, --repo-id and --endpoint go with --variant")
    if args.source and args.inputs:
        raise UserError("either --source stdlib or input paths, not both")
    if args.val and args.val_fraction is not None:
        raise UserError("either --val or --val-fraction, not both")
    if args.drop_overlap and not args.val:
        raise UserError("--drop-overlap goes with --val: a split by hash cannot overlap")
    args.val_fraction = args.val_fraction or (0.01 if args.inputs else 0.03)
    args.workers = args.workers or available_cores()
    return args


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def canonical_command(argv: list[str]) -> str:
    """The command for the manifest, without the options that leave the output as it is."""
    kept, skip = [], False
    for argument in argv:
        if skip or argument == "--overwrite" or argument.startswith("--workers"):
            skip = argument == "--workers"
            continue
        kept.append(argument)
    return shlex.join(["python", "data/prepare.py", *kept])


def make_job(args: argparse.Namespace, command: str) -> Job:
    explicit = bool(args.val)
    rule = "train" if explicit else "hash"
    sources = [find_source(path, "val") for path in args.val or []]
    sources += [find_source(path, rule) for path in args.inputs] or [Source("stdlib", (), rule)]
    model, vocab_size = None, args.vocab_size or 1024
    if args.tokenizer:
        try:
            model = Path(args.tokenizer).read_bytes()
        except OSError as error:
            raise UserError(f"{args.tokenizer}: {error.strerror}") from None
        processor = parse_tokenizer(model, args.tokenizer)
        ByteTable.from_tokenizer(processor)  # refused before any work where bytes cannot be counted
        vocab_size = processor.vocab_size()
        if args.vocab_size not in (None, vocab_size):
            raise UserError(f"{args.tokenizer} has {vocab_size} pieces, not --vocab-size {args.vocab_size}")
    stem = Path(args.inputs[0]).resolve().name.split(".")[0] if args.inputs else "stdlib"
    name = args.name or (Path(args.out).name if args.out else f"{stem}_sp{vocab_size}")
    out = Path(args.out) if args.out else DATA_DIR / "datasets" / name
    if args.tokenizer:
        tokenizer_path = Path(args.tokenizer)
    elif args.tokenizer_out:
        tokenizer_path = Path(args.tokenizer_out)
    else:
        folder = out.parent.parent / "tokenizers" if out.parent.name == "datasets" else out.parent
        tokenizer_path = folder / f"{name}.model"
    entries = [describe_source(source) for source in sources]
    return Job(args, sources, entries, out, tokenizer_path, vocab_size, model, explicit, command)


def run(argv: list[str]) -> None:
    args = parse_arguments(argv)
    command = canonical_command(argv)
    if args.variant is not None:
        out = Path(args.out) if args.out else DATA_DIR / "datasets" / f"fineweb10B_{args.variant}"
        folder = Path(args.tokenizer_out).parent if args.tokenizer_out else (
            out.parent.parent / "tokenizers" if out.parent.name == "datasets" else out.parent)  # fmt: skip
        manifest = fetch(args, out, folder, command)
        print(summary(out, manifest))
        return
    job = make_job(args, command)
    manifest = read_json(job.out / "manifest.json")
    if is_complete(job.out, manifest, job.identity):
        print(f"up to date\n{summary(job.out, manifest)}")
        return
    if job.out.exists() and not args.overwrite:
        if not job.out.is_dir():
            raise UserError(f"{job.out}: not a folder")
        if manifest is not None and manifest.get("job") == job.identity:
            say(f"{job.out}: damaged or incomplete; building it again")
        elif any(job.out.iterdir()):
            raise UserError(f"{job.out}: holds another dataset; choose --name or --out, or replace it with --overwrite")
    started = time.perf_counter()
    manifest = build(job)
    nbytes = sum(manifest["splits"][split]["raw_bytes"] for split in SPLITS)
    print(f"{summary(job.out, manifest)}\n{nbytes / 1e6:.1f} MB of text, {time.perf_counter() - started:.1f} s "
          f"on {args.workers} process(es)")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    try:
        run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        say("interrupted; the same command continues")
        return 130
    return 0


if __name__ == "__main__":
    cli(main)

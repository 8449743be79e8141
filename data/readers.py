"""Corpora → records: .txt, .md, .jsonl, .parquet, also .gz and .zst, folders of them, and the embedded corpus.

A record is (place, text): place names file and line for messages, text is a string or UTF-8 bytes. Files are streamed, so that memory
does not grow with them. Every fault of a file is a UserError that names it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

from parts.files import UserError, one_line, sha256_file

BLOCK_BYTES = 4 << 20  # raw text per block; small enough to keep all workers busy on the embedded corpus
READ_BYTES = 1 << 20  # decompressed bytes per read
READ_ZSTD_BYTES = 128 << 10  # compressed bytes per read: zstd may blow them up several hundred times
MAX_RECORD_BYTES = 256 << 20  # a JSON line above this is not a document, and would not fit in memory next to others
MAX_DOCUMENT_BYTES = 8 << 20  # a longer document is cut at a newline, so that one huge .txt needs no huge memory
PARAGRAPHS_BYTES = 2 << 10  # a document cut at blank lines has at least this many bytes: a context to learn from

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
KNOWN = ".txt, .md, .jsonl (.gz, .zst) or .parquet"

Record = tuple[str, "str | bytes"]


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


def find_source(argument: str, split: str) -> Source:
    """Source for a path on the command line. Raises UserError when nothing there can be read."""
    path = Path(argument)
    if path.is_dir():
        files = [file for file in folder_files(path) if file_format(file)]
        if not files:
            raise UserError(f"{argument}: no {KNOWN} file in this folder")
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]}: not a file, or a link to nothing")
        return Source(argument, tuple(files), split)
    if not path.exists():
        raise UserError(f"{argument}: no such file or folder")
    if file_format(path) is None:
        raise UserError(f"{argument}: not a {KNOWN} file")
    return Source(argument, (path,), split)


def folder_files(root: Path) -> list[Path]:
    """All files below `root`, by path. Links are followed, each folder is entered once."""

    def fail(error: OSError) -> None:
        raise error

    found, entered = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        if (real := os.path.realpath(folder)) in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders.sort()
        found += [Path(folder, name) for name in names]
    return sorted(found, key=lambda path: path.as_posix())


def describe_source(source: Source) -> dict:
    """The source's entry in the manifest. Reads every byte: the digest is what tells a changed input."""
    if not source.files:
        digest, size, count = hashlib.sha256(), 0, 0
        for label, data in embedded_documents():
            digest.update(f"{hashlib.sha256(data).hexdigest()}  {label}\n".encode())
            size, count = size + len(data), count + 1
        version = ".".join(map(str, sys.version_info[:3]))
        return {"kind": "stdlib", "python": version, "split": source.split, "files": count, "bytes": size, "sha256": digest.hexdigest()}
    with futures.ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the interpreter lock
        digests = list(pool.map(sha256_file, source.files))
    root, digest = Path(source.label), digests[0]
    if root.is_dir():
        # fsencode: a file's name need not be text
        lines = (f"{d}  ".encode() + os.fsencode(path.relative_to(root).as_posix()) + b"\n" for d, path in zip(digests, source.files))
        digest = hashlib.sha256(b"".join(lines)).hexdigest()
    size = sum(path.stat().st_size for path in source.files)
    kind = "folder" if root.is_dir() else "file"
    return {"kind": kind, "path": source.label, "split": source.split, "files": len(source.files), "bytes": size, "sha256": digest}


# What of the standard library is not a document: tests and their data, installed packages, applications rather than
# library, tables written by generators (encodings), and files made for one machine. pydoc_data comes in as topics.
EMBEDDED_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib-dynload", "lib2to3"}
EMBEDDED_SKIPPED_FOLDERS |= {"pydoc_data", "site-packages", "test", "tests", "turtledemo"}


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


# ----------------------------------------------------------------------------------------------------------------------
# Files → records
# ----------------------------------------------------------------------------------------------------------------------


class ZstdStream(io.RawIOBase):
    """All frames of a zstd file, windows up to 2 GiB (--long=31).

    Not `stream_reader`: that one ends quietly in the middle of a truncated frame.
    """

    def __init__(self, file: io.BufferedReader):
        import zstandard

        self._file, self._context = file, zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame, self._compressed, self._text = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._compressed = self._compressed or self._file.read(READ_ZSTD_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._context.decompressobj()
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


def read_file(path: Path, read: Callable[[io.BufferedIOBase], Iterable[Record]], advance: Callable[[int], object]) -> Iterator[Record]:
    """Records of a file, decompressed where its name says so. advance: told the bytes of the file, compressed, that were consumed."""
    import zstandard

    done = 0
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".zst":
                stream = io.BufferedReader(ZstdStream(file), READ_BYTES)
            else:
                stream = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
            for record in read(stream):
                yield record
                advance(file.tell() - done)
                done = file.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or truncated archive ({one_line(error)})") from None


def text_records(path: Path, stream: io.BufferedIOBase, paragraphs: bool) -> Iterator[Record]:
    """One document a file, cut as `split_document` does without ever holding the file; `paragraphs` cuts it at blank lines as well."""

    def pieces() -> Iterator[bytes]:
        buffer = b""
        while chunk := stream.read(READ_BYTES):
            buffer += chunk
            while len(buffer) > MAX_DOCUMENT_BYTES:
                position = cut_position(buffer, MAX_DOCUMENT_BYTES)
                yield buffer[:position]
                buffer = buffer[position:]
        yield buffer

    documents = (document for piece in pieces() for document in (split_paragraphs(piece) if paragraphs else (piece,)))
    for number, document in enumerate(documents, 1):
        yield f"{path} (piece {number})" if number > 1 else str(path), document


def jsonl_records(path: Path, stream: io.BufferedIOBase, key: str) -> Iterator[Record]:
    """One document a line."""
    for number, line in enumerate(iter(lambda: stream.readline(MAX_RECORD_BYTES + 1), b""), 1):
        place = f"{path}:{number}"
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"{place}: a line of more than {MAX_RECORD_BYTES >> 20} MB; is this JSON lines?")
        if not line.strip():
            continue
        try:
            text = json.loads(line)[key]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not a JSON object ({one_line(error)})") from None
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{place}: no key {key!r}; choose with --text-key") from None
        if not isinstance(text, str):
            raise UserError(f"{place}: {key!r} is {type(text).__name__}, not a string")
        yield place, text


def parquet_records(path: Path, key: str, advance: Callable[[int], object]) -> Iterator[Record]:
    """One document a row."""
    import pyarrow
    import pyarrow.parquet

    number, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise UserError(f"{path}: no column {key!r} (it has {', '.join(file.schema_arrow.names)}); choose with --text-key")
            for batch in file.iter_batches(batch_size=512, columns=[key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise UserError(f"{path}: row {number}: {key!r} is {type(text).__name__}, not a string")
                    yield f"{path}: row {number}", text
                advance(size * len(batch) // file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)})") from None


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


def split_paragraphs(data: bytes) -> Iterator[bytes]:
    """Consecutive pieces of at least PARAGRAPHS_BYTES, each but the last ending after blank lines; together they are the text."""
    start = 0
    for blank in re.finditer(rb"\n(?:[ \t\r]*\n)+", data):
        if blank.end() - start >= PARAGRAPHS_BYTES:
            yield data[start : blank.end()]
            start = blank.end()
    if start < len(data) or not data:
        yield data[start:]


# ----------------------------------------------------------------------------------------------------------------------
# Records → blocks
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A task: consecutive records of one split rule."""

    index: int
    split: str
    records: list[Record] = field(default_factory=list)


def source_records(source: Source, key: str, paragraphs: bool, advance: Callable[[int], object]) -> Iterator[Record]:
    if not source.files:
        for label, data in embedded_documents():
            yield label, data
            advance(len(data))
    for path in source.files:
        kind = file_format(path)
        if kind == "parquet":
            yield from parquet_records(path, key, advance)
        elif kind == "jsonl":
            yield from read_file(path, lambda stream, path=path: jsonl_records(path, stream, key), advance)
        else:
            yield from read_file(path, lambda stream, path=path: text_records(path, stream, paragraphs), advance)


def read_blocks(sources: Iterable[Source], key: str, paragraphs: bool, advance: Callable[[int], object]) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES. Their contents depend on the sources only, never on who asks.

    key: field or column of the text; paragraphs: cut text files at blank lines; advance: see `read_file`
    """
    block, size = None, 0
    for source in sources:
        for place, text in source_records(source, key, paragraphs, advance):
            if block and (block.split != source.split or size + len(text) > BLOCK_BYTES):
                yield block
                block, size = Block(block.index + 1, source.split), 0
            block = block or Block(0, source.split)
            block.records.append((place, text))
            size += len(text)
    if block:
        yield block

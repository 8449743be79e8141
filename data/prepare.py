#!/usr/bin/env python3
"""Text in, tokenizer and token shards out.

    python data/prepare.py                                       # embedded corpus: the running Python's own sources
    python data/prepare.py corpus/ --vocab-size 8192             # .txt .md .jsonl .parquet, also .gz and .zst
    python data/prepare.py book.txt --split-paragraphs           # one text, cut at blank lines into documents
    python data/prepare.py train.jsonl.zst --val val.jsonl.zst --vocab-size 8192 --name web_sp8192
    python data/prepare.py corpus/ --case-ops                    # capitals as operators (case_ops.py)
    python data/prepare.py more.jsonl --tokenizer data/tokenizers/web_sp8192.model
    python data/prepare.py --variant sp8192 --train-shards 10    # published FineWeb exports, already tokenized

Written: data/datasets/<name>/fineweb_{train,val}_%06d.bin, manifest.json, {train,val}_documents.sha256 and
data/tokenizers/<name>.model. data/README.md describes the formats, the rules and what bounds memory.

How a build runs
  read      the main process reads the sources (readers.py) into blocks of about 4 MB;
  scan      workers hash every document; documents with the smallest hashes become the tokenizer's sample;
  encode    workers tokenize block by block, each block into one part file, sorted by document hash;
  merge     part files are read back by hash range, duplicates dropped, shards written: a full shuffle of the
            documents whose result depends neither on the number of workers nor on the order of the input.
A part file is whole or absent, so a killed build continues where it was. Nothing appears under the final name
before all of it is there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: this file's folder alone is on the path
from data import case_ops, readers
from data.builds import MANIFEST_FORMAT, discard_work, exclusive, is_complete, say, summary, work_folder
from data.published import PUBLISHED_REPOS, fetch
from data.readers import Block, Source
from data.shards import (
    BOS_ID,
    MAX_VOCAB_SIZE,
    SPACE,
    SPLITS,
    ByteTable,
    parse_tokenizer,
    shard_header,
    shard_name,
)
from parts.files import UserError, atomic_write, cli, one_line, read_json, sha256_file, write_json
from parts.progress import Progress

# Part of every job's identity: raise it when a change here alters the output for the same input.
ALGORITHM_VERSION = 1
LARGE_SAMPLE = 16_000_000  # bytes from which on training a tokenizer is announced
RANGE_BYTES = 64 << 20  # token bytes merged at a time
DATA_DIR = Path(__file__).resolve().parent
LOSSY_HINT = "take another tokenizer, or accept it with --allow-lossy"

# A document in part files: front half of the SHA-256 of its UTF-8 text, which orders documents; tokens, BOS included; UTF-8 bytes.
DOCUMENT = np.dtype([("key", "S16"), ("tokens", "<u4"), ("bytes", "<u4")])


class Interrupted(UserError):
    """A build that stopped for want of memory or the like: its parts are worth keeping."""


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


def train_tokenizer(texts: Iterable[str], vocab_size: int, coverage: float, with_case_ops: bool = False) -> bytes:
    """SentencePiece BPE with decode(encode(x)) == x, as a serialized model.

    Identity normalization, no dummy prefix and no whitespace folding keep the text as it is; byte fallback spells what
    the vocabulary lacks; newline is a user symbol (the trainer takes it for the end of a sentence otherwise);
    whitespace-only pieces give code its indentation; "▁" alone is required, since byte accounting relies on it.
    With case operators (case_ops.py) it is trained on transformed text, in which each operator is a user symbol too.
    Raises UserError when the text cannot fill the vocabulary, or the vocabulary cannot hold its characters.
    """
    model, symbols = io.BytesIO(), ["\n"]
    if with_case_ops:
        texts, symbols = map(case_ops.encode, texts), ["\n", *case_ops.OPERATORS]
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=symbols,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            required_chars=SPACE,
            character_coverage=coverage,
            max_sentence_length=8 * MAX_SENTENCE,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        message = re.sub(r"^.*?\)\] ?", "", one_line(error)) or "no text in its sample"
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces: {message}") from None
    return model.getvalue()


class Sample:
    """The documents with the smallest keys, up to `budget` bytes: a uniform sample that no order changes.

    A document counts with at most a quarter of the budget, so that one book is not all there is.
    """

    def __init__(self, budget: int):
        self.budget, self.total = budget, 0
        self.threshold: bytes | None = None  # keys from here on cannot enter any more; None while there is room
        self._texts: dict[bytes, bytes] = {}

    def add(self, key: bytes, text: bytes) -> None:
        if key in self._texts or (self.threshold is not None and key >= self.threshold):
            return
        self._texts[key] = text[: readers.cut_position(text, self.budget // 4)] if len(text) > self.budget // 4 else text
        self.total += len(self._texts[key])
        if self.total > 1.25 * self.budget:
            self._shrink()

    def _shrink(self) -> None:
        """Keep the shortest run of smallest keys that reaches the budget."""
        kept, self.total = {}, 0
        for key in sorted(self._texts):
            if self.total >= self.budget:
                self.threshold = key
                break
            kept[key] = self._texts[key]
            self.total += len(kept[key])
        self._texts = kept

    def texts(self) -> list[str]:
        self._shrink()
        return [text.decode() for text in self._texts.values()]


# ----------------------------------------------------------------------------------------------------------------------
# Work on a block (worker processes)
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know; the same for all of them.

    val_limit: under split "hash", documents whose hash begins below it are validation
    """

    val_limit: int
    collect: bool = False  # scan: texts for the tokenizer's sample
    model: bytes = b""  # encode
    lossy: bool = False
    parts: str = ""


_setup = Setup(0)
_processor = _table = None


def start_worker(setup: Setup, child: bool = True) -> None:
    """Per-process state. In a child also: leave Ctrl-C to the parent, and die with it."""
    global _setup, _processor, _table
    _setup = setup
    if setup.model:
        _processor = parse_tokenizer(setup.model, "tokenizer")
        _table = ByteTable.from_tokenizer(_processor)
    if child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = multiprocessing.parent_process()
        # A worker waiting for tasks holds both ends of its queue and would outlive a killed parent for ever.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@dataclass
class Document:
    place: str
    text: str
    data: bytes  # the text as UTF-8
    digest: bytes  # sha256 of it
    split: str


def block_documents(block: Block, counters: Counter) -> Iterator[Document]:
    """Documents of a block, each with its split; counts what is left out in `counters`."""
    for place, record in block.records:
        if isinstance(record, str):
            try:
                record = record.encode()
            except UnicodeEncodeError:  # JSON's "\\ud800": half of a pair, no UTF-8 exists for it
                counters.update(documents_read=1, lone_surrogate=1)
                continue
        for piece in readers.split_document(record):
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 text (byte {error.start}: {error.reason})") from None
            counters["documents_read"] += 1
            if not text:
                counters["empty"] += 1
            elif SPACE in text:  # SentencePiece writes a space as this character, so text that holds it cannot come back
                counters["contains_u2581"] += 1
            else:
                digest = hashlib.sha256(piece).digest()
                by_hash = "val" if int.from_bytes(digest[:8], "big") < _setup.val_limit else "train"
                yield Document(place, text, piece, digest, by_hash if block.split == "hash" else block.split)


def scan_block(block: Block, threshold: bytes | None) -> tuple[str, np.ndarray, int, list[tuple[bytes, bytes]]]:
    """(split rule, keys S16 [n], training documents, those that may enter the tokenizer's sample) of a block."""
    keys, train, candidates = [], 0, []
    for document in block_documents(block, Counter()):
        keys.append(document.digest[:16])
        if document.split == "train":
            train += 1
            key = document.digest[8:16] + document.digest[:8]  # the split looks at the first half: choose by the other
            if _setup.collect and (threshold is None or key < threshold):
                candidates.append((key, document.data))
    return block.split, np.array(keys, "S16"), train, candidates


def encode_block(block: Block) -> None:
    """Tokenize a block into its part file.

    Every document's tokens must stand for as many bytes as its text has, and every validation document (with case
    operators, every document) must decode to itself. Raises UserError naming the document otherwise.
    """
    counters: Counter = Counter()
    found = list(block_documents(block, counters))
    pieces = [np.array(ids, "<u2") for ids in _processor.encode([d.text for d in found], add_bos=True, num_threads=1)]
    is_val = np.array([document.split == "val" for document in found], bool)
    checked = range(len(found)) if isinstance(_processor, case_ops.CaseTokenizer) else np.flatnonzero(is_val)
    for i in checked:
        if _processor.decode(pieces[i][1:].tolist()) != found[i].text:
            counters["val_not_round_trip"] += int(is_val[i])
            if not _setup.lossy:
                raise UserError(
                    f"{found[i].place}: the tokenizer does not give this {'validation ' * bool(is_val[i])}document back; {LOSSY_HINT}"
                )
    documents = np.array([(d.digest[:16], len(piece), len(d.data)) for d, piece in zip(found, pieces)], DOCUMENT)
    if found and not _setup.lossy:
        ids = np.concatenate(pieces)
        counted = np.concatenate([[0], _table.count(ids[:-1], ids[1:])])  # every document begins with BOS, which stands for none
        starts = np.cumsum(documents["tokens"], dtype=np.int64) - documents["tokens"]
        wrong = np.flatnonzero(np.add.reduceat(counted, starts) != documents["bytes"])
        if len(wrong):
            raise UserError(f"{found[wrong[0]].place}: the tokenizer changes this document's bytes; {LOSSY_HINT}")
    # An explicit validation set keeps its own order; everything else is sorted, training first.
    order = np.arange(len(found)) if block.split == "val" else np.lexsort((documents["key"], is_val))
    head = {"documents": [int((~is_val).sum()), int(is_val.sum())], "counters": dict(counters), "split": block.split}
    head["tokens"] = int(documents["tokens"].sum(dtype=np.int64))
    with atomic_write(Path(_setup.parts) / part_name(block.index)) as temporary, open(temporary, "wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + documents[order].tobytes())
        file.writelines(pieces[i].tobytes() for i in order)


def part_name(index: int) -> str:
    return f"{index:06d}.part"


class Part:
    """A block's part file: a JSON line, its documents (DOCUMENT [n]), their tokens (uint16)."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            line = file.readline()
        self.head = json.loads(line)
        self._offset = len(line)

    def section(self, split: str) -> tuple[int, int]:
        """First document of a split in this part, and the one after its last."""
        train, val = self.head["documents"]
        return (0, train) if split == "train" else (train, train + val)

    def documents(self, start: int, stop: int) -> np.ndarray:
        return np.fromfile(self.path, DOCUMENT, stop - start, offset=self._offset + start * DOCUMENT.itemsize)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        offset = self._offset + sum(self.head["documents"]) * DOCUMENT.itemsize
        return np.fromfile(self.path, "<u2", stop - start, offset=offset + 2 * start)


def run_blocks(task, jobs: Iterable[tuple], setup: Setup, workers: int) -> Iterator:
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

    def __init__(self, folder: Path, split: str, shard_tokens: int, advance: Callable[[int], object]):
        self.folder, self.split, self.shard_tokens, self._advance = folder, split, shard_tokens, advance
        self.shards: list[dict] = []
        self.documents = self.tokens = self.raw_bytes = 0
        self._file, self._filled = None, 0
        self._hashes = open(folder / f"{split}_documents.sha256", "wb")

    def add(self, documents: np.ndarray, tokens: np.ndarray, chosen: np.ndarray) -> None:
        """Append the `chosen` ones (indices, in their order) of `documents`, whose tokens lie one after another in `tokens`."""
        ends = np.cumsum(documents["tokens"], dtype=np.int64)
        starts, documents = ends - documents["tokens"], documents[chosen]
        self._hashes.write(documents["key"].tobytes())
        self.documents += len(documents)
        self.raw_bytes += int(documents["bytes"].sum(dtype=np.int64))
        self._write(np.concatenate([tokens[starts[i] : ends[i]] for i in chosen] or [tokens[:0]]))

    def _write(self, tokens: np.ndarray) -> None:
        self.tokens += len(tokens)
        self._advance(len(tokens))
        while len(tokens):
            if self._file is None:
                self._file = open(self.folder / shard_name(self.split, len(self.shards)), "w+b")
                self._file.write(shard_header(0))
            part = tokens[: self.shard_tokens - self._filled]
            self._file.write(part.tobytes())
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == self.shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        self._file.seek(0)
        self._file.write(shard_header(self._filled))
        closed = self._close(self._file)
        self.shards.append({"file": closed["file"], "tokens": self._filled, "sha256": closed["sha256"]})
        self._file, self._filled = None, 0

    @staticmethod
    def _close(file: io.BufferedWriter) -> dict:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        return {"file": Path(file.name).name, "sha256": sha256_file(file.name)}

    def close(self) -> dict:
        """The split's entry in the manifest."""
        if self._file is not None:
            self._close_shard()
        counts = {"documents": self.documents, "tokens": self.tokens, "raw_bytes": self.raw_bytes}
        return {**counts, "shards": self.shards, "document_hashes": self._close(self._hashes)}


def is_among(keys: np.ndarray, held: np.ndarray) -> np.ndarray:
    """bool [n]: which keys are in the sorted array `held`."""
    if not len(held):
        return np.zeros(len(keys), bool)
    return held[np.searchsorted(held, keys).clip(max=len(held) - 1)] == keys


def merge_ordered(parts: list[Part], writer: ShardWriter, dropped: Counter) -> np.ndarray:
    """An explicit validation set: input order, first occurrence kept. Returns its keys, sorted."""
    keys, first = np.unique(np.concatenate([part.documents(*part.section("val"))["key"] for part in parts]), return_index=True)
    first, start = np.sort(first), 0
    for part in parts:
        documents = part.documents(*part.section("val"))
        chosen = first[(first >= start) & (first < start + len(documents))] - start
        dropped["duplicates"] += len(documents) - len(chosen)
        writer.add(documents, part.tokens(0, part.head["tokens"]), chosen)
        start += len(documents)
    return keys


def merge_by_key(parts: list[Part], split: str, writer: ShardWriter, dropped: Counter, held_out: np.ndarray | None) -> None:
    """All documents of a split in order of their key, a range of keys at a time; one of each key is kept.

    held_out: sorted keys of documents to leave out, those of an explicit validation set.
    """
    ranges = max(1, -(-2 * sum(part.head["tokens"] for part in parts) // RANGE_BYTES))
    edges = np.array([((r << 64) // ranges).to_bytes(8, "big") for r in range(1, ranges)], "S16")
    # Where each range begins in each part, in documents and in tokens: parts are sorted, so ranges are contiguous.
    bounds = []
    for part in parts:
        first, last = part.section(split)
        documents = part.documents(0, last)
        at = first + np.concatenate([[0], np.searchsorted(documents["key"][first:], edges), [last - first]]).astype(np.int64)
        bounds.append((at, np.concatenate([[0], np.cumsum(documents["tokens"], dtype=np.int64)])[at]))
    for r in range(ranges):
        held = [(part, at[r : r + 2], token_at[r : r + 2]) for part, (at, token_at) in zip(parts, bounds) if at[r] < at[r + 1]]
        documents = np.concatenate([np.zeros(0, DOCUMENT), *(part.documents(*span) for part, span, _ in held)])
        tokens = np.concatenate([np.zeros(0, "<u2"), *(part.tokens(*span) for part, _, span in held)])
        order = np.argsort(documents["key"], kind="stable")
        keys = documents["key"][order]
        again = np.concatenate([[False], keys[1:] == keys[:-1]])[: len(keys)]
        dropped["duplicates"] += int(again.sum())
        order = order[~again]
        if held_out is not None:
            overlap = is_among(documents["key"][order], held_out)
            dropped["in_validation"] += int(overlap.sum())
            order = order[~overlap]
        writer.add(documents, tokens, order)


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
    command: str

    @property
    def explicit_val(self) -> bool:
        return bool(self.args.val)

    @property
    def identity(self) -> str:
        args = self.args
        if self.tokenizer is not None:
            tokenizer: object = hashlib.sha256(self.tokenizer).hexdigest()
        else:
            tokenizer = [self.vocab_size, args.tokenizer_sample_mb, args.character_coverage]
        facts = [ALGORITHM_VERSION, spm.__version__, self.entries, tokenizer, args.text_key, args.shard_tokens]
        facts += [None if self.explicit_val else args.val_fraction, args.drop_overlap, args.allow_lossy]
        facts += ["paragraphs"] if args.split_paragraphs else []
        facts += ["case operators"] if args.case_ops else []
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def setup(self, **options) -> Setup:
        return Setup(0 if self.explicit_val else int(self.args.val_fraction * 2**64), **options)

    def progress(self, label: str) -> Progress:
        """Through the sources, in bytes of their files."""
        return Progress(label, sum(entry["bytes"] for entry in self.entries), "B", say)

    def blocks(self, advance: Callable[[int], object]) -> Iterator[Block]:
        return readers.read_blocks(self.sources, self.args.text_key, self.args.split_paragraphs, advance)

    def empty_split(self, train: int, val: int) -> UserError:
        if not train and not val:
            return UserError("no usable document in the input")
        split, count = "training" if not train else "validation", train + val
        if self.explicit_val:
            return UserError(f"no {split} document among {count}")
        advice = "; --val names a validation file, --val-fraction holds out more"
        if not self.args.split_paragraphs and any(readers.file_format(path) == "text" for source in self.sources for path in source.files):
            advice = "; --split-paragraphs cuts text files at blank lines into documents, --val names a validation file"
        return UserError(f"no {split} document among {count} with --val-fraction {self.args.val_fraction}{advice}")


def build(job: Job) -> dict:
    """Build the dataset of a job, or continue a killed build of it. Returns the manifest."""
    work = work_folder(job.out)
    with exclusive(work):
        try:
            return _build(job, work)
        except Interrupted:
            raise
        except UserError:  # the input must change, so what was made of it is of no use
            shutil.rmtree(work)
            raise
        except OSError as error:  # a full disk says of an open file only what, not where
            error.filename = error.filename or str(work)
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
    scan(job, work)
    model = job.tokenizer if job.tokenizer is not None else (work / "tokenizer.model").read_bytes()
    taken = job.tokenizer is None and job.tokenizer_path.exists() and job.tokenizer_path.read_bytes() != model
    if taken and not job.args.overwrite:
        raise UserError(f"{job.tokenizer_path}: another tokenizer stands here; choose --tokenizer-out or --overwrite")
    manifest = merge(job, work, encode(job, work, model), model)
    publish(job, work, model)
    return manifest


def scan(job: Job, work: Path) -> None:
    """Pass over all text: overlap of the splits, and work/tokenizer.model when one is to be trained. Nothing where neither is asked."""
    train_one = job.tokenizer is None
    if (work / "tokenizer.model").exists() or not (train_one or (job.explicit_val and not job.args.drop_overlap)):
        return
    sample = Sample(int(job.args.tokenizer_sample_mb * 1e6))
    held_out, overlap, trained, held = np.zeros(0, "S16"), set(), 0, 0
    with job.progress("scan") as advance:
        # The threshold travels with each job: a stale one lets more through, and `sample` still decides.
        jobs = ((block, sample.threshold) for block in job.blocks(advance))
        for split, keys, train, candidates in run_blocks(scan_block, jobs, job.setup(collect=train_one), job.args.workers):
            trained, held = trained + train, held + len(keys) - train
            if split == "val":  # an explicit validation set is read first, so its keys are complete when training's come
                held_out = np.union1d(held_out, keys)
                continue
            found = set(keys[is_among(keys, held_out)].tolist()) if len(held_out) else set()
            overlap |= found
            for key, text in candidates:
                if key[8:] + key[:8] not in found:
                    sample.add(key, text)
    if overlap and not job.args.drop_overlap:
        count = f"{len(overlap)} document(s) of the validation set are also in the training set"
        raise UserError(f"{count}; leave them out of training with --drop-overlap")
    if not trained or not held:
        raise job.empty_split(trained, held)
    if train_one:
        started, texts = time.perf_counter(), sample.texts()
        if sample.total > LARGE_SAMPLE:
            say(f"training a tokenizer of {job.vocab_size} pieces on {sample.total / 1e6:.1f} MB of text: this may take minutes")
        model = train_tokenizer(texts, job.vocab_size, job.args.character_coverage, job.args.case_ops)
        ByteTable.from_tokenizer(parse_tokenizer(model, "trained tokenizer"))
        with atomic_write(work / "tokenizer.model") as temporary:
            temporary.write_bytes(model)
        say(f"tokenizer of {job.vocab_size} pieces trained on {sample.total / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")


def encode(job: Job, work: Path, model: bytes) -> list[Part]:
    """Every block's part file: those that are there are kept."""
    folder = work / "parts"
    folder.mkdir(exist_ok=True)
    present = {path.name for path in folder.iterdir()}
    count = 0

    def missing(advance: Callable[[int], object]) -> Iterator[tuple[Block]]:
        nonlocal count
        for block in job.blocks(advance):
            count += 1
            if part_name(block.index) not in present:
                yield (block,)

    with job.progress("tokenize") as advance:
        setup = job.setup(model=model, lossy=job.args.allow_lossy, parts=str(folder))
        for _ in run_blocks(encode_block, missing(advance), setup, job.args.workers):
            pass
    return [Part(folder / part_name(index)) for index in range(count)]


def merge(job: Job, work: Path, parts: list[Part], model: bytes) -> dict:
    """Part files → shards, hash lists and manifest in work/final."""
    final = work / "final"
    shutil.rmtree(final, ignore_errors=True)  # merging is quick: a killed merge starts over
    final.mkdir()
    splits, dropped, held_out = {}, {}, None
    with Progress("merge", sum(part.head["tokens"] for part in parts), "tok", say) as advance:
        for split in reversed(SPLITS):
            writer = ShardWriter(final, split, job.args.shard_tokens, advance)
            dropped[split] = Counter(duplicates=0)
            val_parts = [part for part in parts if part.head["split"] == "val"]
            if split == "val" and val_parts:
                held_out = merge_ordered(val_parts, writer, dropped[split])
            else:
                merge_by_key(parts, split, writer, dropped[split], held_out)
            splits[split] = writer.close()
    if not splits["train"]["documents"] or not splits["val"]["documents"]:
        raise job.empty_split(splits["train"]["documents"], splits["val"]["documents"])
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
            "case_ops": isinstance(parse_tokenizer(model, "tokenizer"), case_ops.CaseTokenizer),
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
    if job.out.exists():
        os.rename(job.out, work / "replaced")
    os.rename(work / "final", job.out)
    shutil.rmtree(work)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def number(kind, low, high=float("inf")):
    """argparse type: a number of `kind` from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("sources").add_argument
    add("inputs", nargs="*", metavar="PATH", help=".txt .md .jsonl (.gz .zst) .parquet files, or folders of them")
    add("--source", choices=["stdlib"], help="the embedded corpus; the default where no PATH is given")
    add("--val", action="append", metavar="PATH", help="validation documents, in their order (may be repeated)")
    share = "without --val: the share of documents, by hash, that is held out (0.03 for stdlib, else 0.01)"
    add("--val-fraction", type=float, metavar="F", help=share)
    add("--drop-overlap", action="store_true", help="leave documents of --val out of training instead of failing")
    paragraphs = f"cut text files at blank lines into documents of {readers.PARAGRAPHS_BYTES:,} bytes and more"
    add("--split-paragraphs", action="store_true", help=paragraphs)
    add("--text-key", default="text", metavar="KEY", help="field or column that holds the text (text)")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--vocab-size", type=number(int, MIN_VOCAB_SIZE, MAX_VOCAB_SIZE), metavar="V", help="pieces to train (1024)")
    add("--case-ops", action="store_true", help="write capitals as case operators, so that all cases of a word share their tokens")
    add("--tokenizer", metavar="PATH", help="take this SentencePiece model instead of training one")
    sample = "training text the tokenizer is trained on (32)"
    add("--tokenizer-sample-mb", type=number(float, 0.001, 1e6), default=32.0, metavar="MB", help=sample)
    coverage = "share of characters that get a piece; the rest is spelled in bytes (0.9995)"
    add("--character-coverage", type=number(float, 0.9, 1.0), default=0.9995, metavar="C", help=coverage)
    add("--allow-lossy", action="store_true", help="accept a tokenizer that changes text, as published ones do")
    add = parser.add_argument_group("published exports").add_argument
    add("--variant", metavar="|".join(PUBLISHED_REPOS), help="download this export of FineWeb")
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
        for option in ("inputs", "source", "val", "val_fraction", "split_paragraphs", "vocab_size", "case_ops", "tokenizer", "name"):
            if getattr(args, option):
                raise UserError(f"--variant downloads a finished dataset; it does not go with {option.replace('_', '-')}")
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
    if args.val_fraction is None:
        args.val_fraction = 0.01 if args.inputs else 0.03
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val-fraction: {args.val_fraction} is not between 0 and 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.workers = args.workers or cores or 1
    return args


def canonical_command(argv: list[str]) -> str:
    """The command for the manifest, without the options that leave the output as it is."""
    kept, skip = [], False
    for argument in argv:
        if skip or argument == "--overwrite" or argument.startswith("--workers"):
            skip = argument == "--workers"
            continue
        kept.append(argument)
    return shlex.join(["python", "data/prepare.py", *kept])


def tokenizer_folder(out: Path) -> Path:
    return out.parent.parent / "tokenizers" if out.parent.name == "datasets" else out.parent


def make_job(args: argparse.Namespace, command: str) -> Job:
    rule = "train" if args.val else "hash"
    sources = [readers.find_source(path, "val") for path in args.val or []]
    sources += [readers.find_source(path, rule) for path in args.inputs] or [Source("stdlib", (), rule)]
    model, vocab_size = None, args.vocab_size or 1024
    if args.tokenizer:
        model = Path(args.tokenizer).read_bytes()
        processor = parse_tokenizer(model, args.tokenizer)
        ByteTable.from_tokenizer(processor)  # refused before any work where bytes cannot be counted
        vocab_size = processor.vocab_size()
        if args.case_ops and not isinstance(processor, case_ops.CaseTokenizer):
            raise UserError(f"{args.tokenizer} has no case operators: it is not one that --case-ops trained")
        if args.vocab_size not in (None, vocab_size):
            raise UserError(f"{args.tokenizer} has {vocab_size} pieces, not --vocab-size {args.vocab_size}")
    stem = Path(args.inputs[0]).resolve().name.split(".")[0] if args.inputs else "stdlib"
    name = args.name or (Path(args.out).name if args.out else f"{stem}_{'case' if args.case_ops else 'sp'}{vocab_size}")
    out = Path(args.out) if args.out else DATA_DIR / "datasets" / name
    tokenizer_path = Path(args.tokenizer or args.tokenizer_out or tokenizer_folder(out) / f"{name}.model")
    entries = [readers.describe_source(source) for source in sources]
    return Job(args, sources, entries, out, tokenizer_path, vocab_size, model, command)


def prepare(args: argparse.Namespace, command: str) -> None:
    """Build what the command asks for, or find it there."""
    job = make_job(args, command)
    manifest = read_json(job.out / "manifest.json")
    if is_complete(job.out, manifest, job.identity):
        discard_work(job.out)
        print(f"up to date\n{summary(job.out, manifest)}")
        return
    if job.out.exists() and not args.overwrite:
        if not job.out.is_dir():
            raise UserError(f"{job.out}: not a folder")
        if manifest is not None and manifest.get("job") == job.identity:
            say(f"{job.out}: damaged or incomplete; building it again")
        elif manifest is None and (job.out / "manifest.json").exists():
            raise UserError(f"{job.out / 'manifest.json'}: damaged, so what is there cannot be told; --overwrite builds it again")
        elif any(job.out.iterdir()):
            raise UserError(f"{job.out}: holds another dataset; choose --name or --out, or replace it with --overwrite")
    started = time.perf_counter()
    manifest = build(job)
    nbytes = sum(manifest["splits"][split]["raw_bytes"] for split in SPLITS)
    say(f"{nbytes / 1e6:.1f} MB of text in {time.perf_counter() - started:.1f} s on {args.workers} process(es)")
    print(summary(job.out, manifest))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, command = parse_arguments(argv), canonical_command(argv)
    try:
        if args.variant is None:
            prepare(args, command)
        else:
            out = Path(args.out) if args.out else DATA_DIR / "datasets" / f"fineweb10B_{args.variant}"
            folder = Path(args.tokenizer_out).parent if args.tokenizer_out else tokenizer_folder(out)
            print(summary(out, fetch(args, out, folder, command)))
    except KeyboardInterrupt:
        say("interrupted; the same command continues")
        return 130
    return 0


if __name__ == "__main__":
    cli(main)

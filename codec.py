"""A model as a lossless compressor: the evaluation, written down as a file that gives the text back, byte for byte.

    python codec.py compress runs/<RUN_ID> TEXT OUT                      any file, or .jsonl with a document a line ("text"); the artifact
                                                                         may be named itself, too
    python codec.py decompress OUT TEXT [--artifact ARTIFACT]            the artifact is looked for by its hash if it is not named
    python codec.py prove runs/<RUN_ID> [--out EVAL.json]                the validation split there and back; what `eval_ttt.py --prove` runs
    python codec.py text OUT.jsonl                                       the validation split of DATA_PATH as `prove` compresses it
    python codec.py compare TEXT [ARTIFACT]                              the same text under xz, zstd, brotli and what else is installed
    TTT_MODE=off EXPERTS=none python codec.py compress ...               evaluation settings are environment variables, kept in the file

Bits per byte claim what a code could do. Here the code is written: 8 × file bytes / text bytes is a score that leaves nothing to believe,
for whoever can decode the text has not looked at it. The probabilities are the evaluation's own: the model under sliding windows,
score-first test-time training, experts. One loop (`transmit`) serves both directions; a channel either is told the next tokens and writes
them, or reads them. Nothing else in the loop knows which it is.

Order of coding. The text's tokens are cut into P streams of about equal length, at document starts where one is near. Step t codes token t
of every stream. Windows are those of `plan_windows` in each stream. Weights train after every P·n tokens, experts count after every P·m,
where P·n and P·m are as near to TTT_CHUNK_TOKENS and EXPERT_BLOCK_TOKENS as whole steps (n: whole strides) allow. With TTT_MODE=document each
stream has adapters, which begin anew with a document and learn every TTT_DOC_CHUNKS steps; no window is read again.

Both directions must find the same probabilities to the last bit, so they run the same kernels on the same shapes, uncompiled, with
deterministic gradients, and the file says on what it was written. A CPU's file decodes wherever the same build of torch runs on a CPU of the
same instruction set; a GPU's on the same kind of GPU. Anything else is refused before the first token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import brotli
import numpy as np
import torch
from torch import Tensor

from data import case_ops
from data.shards import BOS_ID, SPACE, ByteTable, list_shards, load_tokenizer, tokenizer_hash
from eval_ttt import Chunk, TestTimeTrainer, chunk_lr
from parts import kernels, packing
from parts.adapters import repeatable_gradients
from parts.artifact import load_artifact
from parts.document_ttt import DocumentTrainer
from parts.experts import ExpertMixture, Prediction
from parts.files import UserError, atomic_write, cli, read_json, sha256_file, write_json
from parts.runs import artifact_file
from parts.sandbox import own_caches
from train_gpt import (
    GPT,
    Config,
    DecodeState,
    EvalConfig,
    Graphed,
    Kernels,
    ModelConfig,
    RunContext,
    eval_batch_size,
    known_settings,
    load_tokens,
    plan_kernels,
    resolve_config,
    say_near_misses,
    setup_distributed,
)

# ----------------------------------------------------------------------------------------------------------------------
# Text ↔ documents ↔ tokens, losing nothing
# ----------------------------------------------------------------------------------------------------------------------


def split_documents(data: bytes, jsonl: bool) -> tuple[list[bytes], list | None]:
    """(documents, layout): the text inside each JSON line and everything around it, or one document and None.

    layout: [distinct frames, number of each line's frame]. A frame is [before, after, 1 if JSON escapes non-ASCII], in Latin-1, or [line]
    where a line is not an object with a "text" that JSON would write the same way again.
    """
    if not jsonl:
        return [data], None
    documents, frames, lines = [], {}, []
    for line in data.split(b"\n"):
        text, frame = _document_of(line)
        if text is not None:
            documents.append(text)
        lines.append(frames.setdefault(frame, len(frames)))
    return documents, [list(frames), lines]


def _document_of(line: bytes) -> tuple[bytes | None, tuple]:
    whole = None, (line.decode("latin-1"),)
    try:
        text = json.loads(line)["text"]
        document = text.encode("utf-8", "surrogateescape")
        if document.decode("utf-8", "surrogateescape") != text:
            return whole
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return whole
    for ascii_only in (0, 1):
        written = _json_string(document, ascii_only)
        before, found, after = line.partition(written)
        if found:
            return document, (before.decode("latin-1"), after.decode("latin-1"), ascii_only)
    return whole


def _json_string(document: bytes, ascii_only: int) -> bytes:
    text = json.dumps(document.decode("utf-8", "surrogateescape"), ensure_ascii=bool(ascii_only))
    return text.encode("utf-8", "surrogateescape")


def join_documents(documents: Sequence[bytes], layout: list | None) -> bytes:
    """The inverse of `split_documents`."""
    if layout is None:
        return b"".join(documents)
    frames, lines = layout
    waiting, written = iter(documents), []
    for number in lines:
        before, *rest = frames[number]
        line = before.encode("latin-1")
        if rest:
            after, ascii_only = rest
            line += _json_string(next(waiting), ascii_only) + after.encode("latin-1")
        written.append(line)
    return b"\n".join(written)


class Spelling:
    """Bytes ↔ tokens of one tokenizer, where decode(encode(x)) == x for every x.

    Text that the tokenizer would not give back (bytes that are no UTF-8, a literal "▁", what a normalizer changes) is narrowed down by
    halving and spelled in byte pieces; all else is tokenized as the shards are. Case operators are around all of it.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        same = lambda text: text
        self.written, self.read = (case_ops.encode, case_ops.decode) if isinstance(tokenizer, case_ops.CaseTokenizer) else (same, same)
        self.pieces: list[bytes | None] = []  # bytes of each token; None: not text
        self.byte_token: dict[int, int] = {}
        for token in range(tokenizer.vocab_size()):
            piece = tokenizer.id_to_piece(token)
            if tokenizer.is_byte(token):
                self.byte_token[int(piece[1:-1], 16)] = token
                self.pieces.append(bytes((int(piece[1:-1], 16),)))
            elif tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                self.pieces.append(None)
            else:
                self.pieces.append(piece.replace(SPACE, " ").encode())
        # A dummy prefix is a space before every document that is not in the text.
        self.dummy_prefix = tokenizer.id_to_piece(tokenizer.encode_as_ids("a")[0]).startswith(SPACE)

    def _join(self, tokens: Sequence[int]) -> bytes | None:
        """The bytes of the pieces, None where one is no text."""
        pieces = [self.pieces[token] for token in tokens]
        return None if None in pieces else b"".join(pieces)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """A document's bytes. Raises UserError for tokens that stand for no text."""
        data = self._join(tokens)
        if data is None:
            raise UserError("a document holds tokens that stand for no text")
        prefixed = self.dummy_prefix and data[:1] == b" " and not self.tokenizer.is_byte(int(tokens[0]))
        try:
            return self.read(data[prefixed:].decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
        except ValueError as error:
            raise UserError(f"a document's tokens are no text: {error}") from None

    def encode(self, data: bytes) -> list[int]:
        """A document's tokens. Raises UserError for a byte that the vocabulary cannot spell."""
        tokens: list[int] = []
        # Bytes that are no UTF-8 become lone surrogates, which no text has.
        for run in re.finditer("[\udc80-\udcff]+|[^\udc80-\udcff]+", self.written(data.decode("utf-8", "surrogateescape"))):
            valid = not "\udc80" <= run[0][0] <= "\udcff"
            tokens += self._encode_text(run[0], not run.start()) if valid else self._spell(run[0].encode("utf-8", "surrogateescape"))
        return tokens

    def _spell(self, data: bytes) -> list[int]:
        try:
            return [self.byte_token[byte] for byte in data]
        except KeyError as error:
            raise UserError(f"the tokenizer has no piece for byte {error.args[0]:#04x}: it cannot spell this text") from None

    def _encode_text(self, text: str, first: bool) -> list[int]:
        """first: the text is a document's head, where a dummy prefix is understood. Elsewhere one is a space, so a text begins behind one."""
        head, body, expected = [], text, text.encode()
        if self.dummy_prefix and first:
            expected = b" " + expected
        elif self.dummy_prefix:
            before, _, body = text.partition(" ")
            head = self._spell(before.encode())
        tokens = head + (self.tokenizer.encode_as_ids(body) if body else [])
        if self._join(tokens) == expected:
            return tokens
        if len(text) == 1:
            return self._spell(text.encode())
        middle = len(text) // 2
        middle = text.rfind("\n", 1, middle) + 1 or middle
        return self._encode_text(text[:middle], first) + self._encode_text(text[middle:], False)


# ----------------------------------------------------------------------------------------------------------------------
# Streams
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Streams:
    """How the text is cut. targets int64 [P]: tokens coded in each stream; begins bool [P]: whether it begins with a document's own BOS,
    which is not coded, or in the middle of one, behind a BOS that the text does not have."""

    targets: np.ndarray
    begins: np.ndarray

    @property
    def steps(self) -> int:
        return int(self.targets.max(initial=0))

    @classmethod
    def cut(cls, tokens: np.ndarray, count: int) -> Streams:
        """What is left in equal parts, again and again; each cut at the document start nearest to its edge, if one is within a seventh of a part."""
        if not len(tokens):
            return cls(np.zeros(1, np.int64), np.zeros(1, bool))
        size = len(tokens) / count
        documents, cuts = np.flatnonzero(tokens == BOS_ID), [0]
        for number in range(1, count):
            edge = round(cuts[-1] + (len(tokens) - cuts[-1]) / (count - number + 1))
            place = np.searchsorted(documents, edge)
            near = documents[max(place - 1, 0) : place + 1]
            nearest = near[np.abs(near - edge).argmin()] if len(near) else edge
            cuts.append(int(nearest if abs(nearest - edge) <= size / 7 else edge))
        lengths = np.diff([*cuts, len(tokens)])
        begins = tokens[cuts] == BOS_ID
        return cls(lengths - begins, begins)

    def summary(self) -> list[int]:
        """What `read` needs beside the channel: how many, shortest, and how much longer the longest is."""
        return [len(self.targets), int(self.targets.min()), int(np.ptp(self.targets))]

    def write(self, channel: Channel) -> None:
        count, least, span = self.summary()
        if span >= TOTAL:
            raise UserError(f"{count} streams are too few for this text: raise CODEC_STREAMS")
        channel.uniform(self.targets - least, count, span + 1)
        channel.uniform(self.begins, count, 2)

    @classmethod
    def read(cls, channel: Channel, count: int, least: int, span: int) -> Streams:
        if not (0 < count <= 65536 and least >= 0 and 0 <= span < TOTAL):
            raise ValueError(f"{count} streams of {least} + {span} tokens")
        targets = least + channel.uniform(None, count, span + 1).astype(np.int64)
        return cls(targets, channel.uniform(None, count, 2).astype(bool))

    def deal(self, tokens: np.ndarray) -> np.ndarray:
        """The targets as a table int64 [P, steps], filled up with BOS."""
        table, place = np.full((len(self.targets), self.steps), BOS_ID), 0
        for row, count, begins in zip(table, self.targets.tolist(), self.begins.tolist()):
            row[:count] = tokens[place + begins : place + begins + count]
            place += begins + count
        return table

    def collect(self, table: np.ndarray) -> np.ndarray:
        """The inverse of `deal`."""
        parts = []
        for row, count, begins in zip(table, self.targets.tolist(), self.begins.tolist()):
            parts += [np.full(int(begins), BOS_ID), row[:count]]
        return np.concatenate(parts)


def choose_streams(cfg: EvalConfig, targets: int, device: torch.device) -> int:
    """CODEC_STREAMS, or as many as the device serves at about the price of one while each stays long enough to be worth its cold start."""
    most = cfg.codec_streams or (256 if device.type == "cuda" else 32)
    return max(1, min(most, targets if cfg.codec_streams else targets // 512))


# ----------------------------------------------------------------------------------------------------------------------
# Frequencies and the range coder
# ----------------------------------------------------------------------------------------------------------------------

TOTAL = 1 << 24  # the range coder's precision


def frequencies(weights: Tensor) -> Tensor:
    """Whole numbers ≥ 1 that sum to TOTAL, in proportion to weights [n, m] (float64, ≥ 0). int64 [n, m].

    floor(w / Σw · (TOTAL − m)) + 1, what is left over going to the row's largest weight. Costs at most log2(1 + m / TOTAL) bits a symbol, and
    far less for what is likely.
    """
    weights, size = weights + 1e-300, weights.size(1)  # a row whose mass was all rounded away counts as uniform
    counts = (weights / weights.sum(1, keepdim=True) * (TOTAL - size)).floor().long() + 1
    return counts.scatter_add(1, weights.argmax(1, keepdim=True), TOTAL - counts.sum(1, keepdim=True))


class Channel:
    """Symbols through a range coder: written when they are given, read when they are not.

    words: what to read, uint32 [n]; None to write.
    """

    def __init__(self, words: np.ndarray | None = None):
        from constriction import stream

        self.coder = stream.queue.RangeEncoder() if words is None else stream.queue.RangeDecoder(words)
        self.family, self.uniform_model = stream.model.Categorical(perfect=False), stream.model.Uniform
        self.writes = words is None

    def code(self, counts: np.ndarray, symbols: np.ndarray | None) -> np.ndarray:
        """Code int32 symbols [n], each under its own row of counts int64 [n, m] with sum TOTAL; returns them."""
        # The coder makes of m weights floor(running sum · (TOTAL − m) / Σ) + m': of whole numbers that sum to TOTAL − m, exactly these + 1.
        weights = (counts - 1).astype(np.float32)
        if self.writes:
            self.coder.encode(symbols, self.family, weights)
            return symbols
        return self.coder.decode(self.family, weights)

    def uniform(self, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
        """Code `count` whole numbers below `size` ≤ TOTAL that are all equally likely."""
        if size == 1 or not count:
            return np.zeros(count, np.int32)
        if self.writes:
            self.coder.encode(values.astype(np.int32), self.uniform_model(size))
            return values
        return self.coder.decode(self.uniform_model(size), count)

    def token(self, probs: Tensor, tokens: np.ndarray | None) -> np.ndarray:
        """Code tokens int64 [n], each under its own row of probs [n, V] (float64); returns them.

        In two parts of about √V symbols: which run of the vocabulary, then which token of it. So a step brings a few hundred numbers a
        stream from the device, not V, and rare tokens keep more of the coder's precision.
        """
        size = math.isqrt(probs.size(1) - 1) + 1
        mass = torch.nn.functional.pad(probs, (0, -probs.size(1) % size)).unflatten(1, (-1, size))
        run, place = (None, None) if tokens is None else divmod(tokens.astype(np.int32), np.int32(size))
        run = self.code(frequencies(mass.sum(2)).cpu().numpy(), run).astype(np.int64)
        inside = mass[torch.arange(len(probs), device=probs.device), torch.from_numpy(run).to(probs.device)]
        return run * size + self.code(frequencies(inside).cpu().numpy(), place)


# ----------------------------------------------------------------------------------------------------------------------
# The predictor: P streams in lockstep
# ----------------------------------------------------------------------------------------------------------------------


def model_config(cfg: Config) -> ModelConfig:
    """Documents that are scored from their own first token (EVAL_BY_DOCUMENT) do not see each other in a window either."""
    return dataclasses.replace(cfg.model, document_mask=cfg.model.document_mask or cfg.eval.by_document)


def choose_kernels(cfg: Config, device: torch.device) -> Kernels:
    """The fused ones and, where documents are masked, their attention; plain ones else: no kernel that chooses a variant by timing it, which would not
    be the same one twice."""
    model = model_config(cfg)
    fused = cfg.run.fused_kernels != "0" and not kernels.missing_triton(device)
    if not model.document_mask:
        return Kernels(fused=fused)
    plan = plan_kernels(dataclasses.replace(cfg, model=model), device, compiled=False)
    return Kernels(plan.full, plan.windowed, fused)


class Lockstep:
    """Everything that predicts the next token of P streams from those before: `predict(t)`, then `reveal(t, tokens)`, for t = 0, 1, …

    What has been revealed is all that it ever sees of the text.
    """

    def __init__(self, model: GPT, cfg: Config, byte_table: ByteTable, ctx: RunContext, streams: Streams):
        if cfg.eval.ttt_mode == "stream" and cfg.eval.ttt_reset_per_doc:
            raise UserError(
                "TTT_RESET_PER_DOC=1: streams in lockstep share their weights; compress with TTT_RESET_PER_DOC=0 or TTT_MODE=off"
            )
        model.cfg = model_config(cfg)
        model.kernels = choose_kernels(cfg, ctx.device)
        self.model, self.cfg, self.ctx, self.device = model, cfg, ctx, ctx.device
        self.targets, self.steps, rows = streams.targets, streams.steps, len(streams.targets)
        self.lengths = torch.from_numpy(streams.targets).to(self.device)
        self.rows = torch.arange(rows, device=self.device)  # streams that have the target at hand
        # Column t is the token before target t; the last one's successor is never needed, but written.
        self.tokens = torch.full((rows, self.steps + 1), BOS_ID, dtype=torch.int64, device=self.device)
        self.window = cfg.eval.eval_seq_len or cfg.train.train_seq_len
        self.stride = cfg.eval.eval_stride
        self.trainer, self.weights = None, contextlib.ExitStack()
        if cfg.eval.ttt_mode == "stream" and cfg.eval.ttt_epochs:
            seq_len = cfg.eval.ttt_seq_len or self.window
            self.trainer = TestTimeTrainer(model, model, cfg, byte_table.to(self.device), ctx, seq_len)
            self.weights.enter_context(self.trainer.scoring_weights())
        self.chunk_steps = max(1, round(cfg.eval.ttt_chunk_tokens / rows))
        if self.chunk_steps > self.stride:  # updates and windows both refill the caches: let them fall together
            self.chunk_steps = round(self.chunk_steps / self.stride) * self.stride
        experts = dataclasses.replace(cfg.eval, expert_report=False)
        self.mixture = ExpertMixture(experts, cfg.model.vocab_size, self.device) if experts.expert_names else None
        self.block_steps = max(1, round(cfg.eval.expert_block_tokens / rows))
        self.prediction: Prediction | None = None
        # Of the steps not counted yet: contexts, their nodes, targets and their record; statistics.
        self.block: list[tuple[Tensor, ...]] = []
        self.statistics: Tensor | float = 0.0
        capacity = min(self.window, max(self.steps, 4))  # 4: what `Graphed` rehearses and records
        self.state = DecodeState(rows, capacity, device=self.device)
        self.start = -1  # of the window that the state holds
        self.input = torch.full((rows, 1), BOS_ID, dtype=torch.int64, device=self.device)
        self.step: Graphed | None = None

    def lines(self) -> list[str]:
        """What runs here, for the log."""
        cfg, many = self.cfg.eval, f"{int(self.targets.sum()):,} tokens in {len(self.targets)} streams of {self.steps:,} at most"
        window = f"window {self.window}" + (f", stride {self.stride}" if cfg.ttt_mode != "document" else "")
        trained = f" every {self.chunk_steps} steps" if self.trainer else ""
        return [
            f"{many} on {self.device.type}: {window}, TTT_MODE={cfg.ttt_mode}{trained}, EXPERTS={cfg.experts or 'none'}",
            *self.model.kernels.lines(reasons=False),
        ]

    # -- predicting --

    def window_start(self, t: int) -> int:
        """First input of the window that scores target t: `plan_windows`, except that a stream's last window is not moved back."""
        return 0 if t < self.window else (t - self.window) // self.stride * self.stride + self.stride

    def live(self, t: int) -> np.ndarray:
        """The n streams that have a target t."""
        return np.flatnonzero(self.targets > t)

    @torch.no_grad()
    def predict(self, t: int) -> Tensor:
        """Probabilities float64 [n, V] of target t."""
        if len(rows := self.live(t)) < len(self.rows):
            self.rows = torch.from_numpy(rows).to(self.device)
        logits = self._logits(t)[self.rows]
        if self.mixture is None:
            return logits.double().softmax(-1)
        self.prediction = self.mixture.predict(logits, self._contexts(t)[self.rows])
        return self.prediction.distribution().double()

    def _logits(self, t: int) -> Tensor:
        start = self.window_start(t)
        if start != self.start:
            self.start = start
            return self._begin(start, t)
        self.input.copy_(self.tokens[:, t : t + 1])
        return self.step()

    def _step(self) -> Tensor:
        return self.model(self.input, state=self.state)[:, -1]

    def _begin(self, start: int, t: int) -> Tensor:
        """Fill the caches anew with inputs start … t, in parts that fit the device; logits of target t."""
        if self.step is None:  # before anything is in the memory that a rehearsal writes to
            record = self.device.type == "cuda" and self.cfg.run.compile != "0"
            if record:
                self.model(self.input, state=self.state)
            self.step = Graphed(self._step, record)
            self.step.prepare()
        rows = min(len(self.tokens), eval_batch_size(self.cfg.eval, t + 1 - start, self.device))
        self.state.begun = False
        parts = []
        for first in range(0, len(self.tokens), rows):
            last = min(first + rows, len(self.tokens))
            part = self.state.narrow(first, last)
            parts.append(self.model(self.tokens[first:last, start : t + 1], score_last=1, state=part)[:, -1])
        self.state.begun = True
        return torch.cat(parts)

    def _contexts(self, t: int) -> Tensor:
        """Context rows [P, K-1] of target t, as `context_rows` makes them for one stream."""
        length = self.mixture.context_length
        known = self.tokens[:, max(0, t + 1 - length) : t + 1].flip(1)
        return torch.nn.functional.pad(known, (0, length - known.size(1)), value=self.cfg.model.vocab_size)

    # -- learning, from what has been coded --

    def reveal(self, t: int, tokens: Tensor) -> None:
        """Targets t int64 [n] are known now."""
        self.tokens[self.rows, t + 1] = tokens
        if self.mixture:
            self._count(tokens)
        if self.trainer and (t + 1) % self.chunk_steps == 0 and t + 1 < self.steps:
            self._train(t + 1)

    @torch.no_grad()
    def _count(self, targets: Tensor) -> None:
        """Let the experts learn, a block at a time and in the order in which it was coded, from what their predictions were worth."""
        seen = self.prediction
        self.block.append((seen.block_contexts, seen.block_nodes, targets, seen.record(targets)))
        self.statistics = self.statistics + seen.statistics(targets)
        if len(self.block) == self.block_steps:
            self.mixture.update(*map(torch.cat, zip(*self.block)), self.statistics)
            self.block, self.statistics = [], 0.0

    def _train(self, end: int) -> None:
        """Train on every stream's targets end - chunk_steps … end - 1."""
        self.weights.close()
        number, count = end // self.chunk_steps - 1, -(-self.steps // self.chunk_steps)
        self.trainer.learn(self.tokens, Chunk(end - self.chunk_steps, end), chunk_lr(self.cfg.eval, number, count), self.lengths)
        self.weights.enter_context(self.trainer.scoring_weights())
        self.start = -1  # the caches are of the old weights


class DocumentLockstep(Lockstep):
    """Streams whose documents have adapters of their own (`document_ttt.DocumentTrainer`, a lane a stream).

    Nothing is read again to predict: caches remember, and adapters begin anew with a document. All streams learn at the same steps,
    every TTT_DOC_CHUNKS: what of a chunk belongs to the document that a stream is in teaches its adapters, so that
    a document's first chunk is shorter here than where it is read by itself. To learn, the chunk is read once more, as one piece, from where it began.
    """

    def __init__(self, model: GPT, cfg: Config, byte_table: ByteTable, ctx: RunContext, streams: Streams):
        super().__init__(model, cfg, byte_table, ctx, streams)
        if len(cfg.eval.document_chunks) > 1:
            raise UserError(
                f"TTT_DOC_CHUNKS={cfg.eval.ttt_doc_chunks}: streams in lockstep learn at the same steps, wherever their documents are; "
                "compress with one length, such as TTT_DOC_CHUNKS=24"
            )
        ((self.chunk_steps, _),) = cfg.eval.document_chunks
        rows, record = len(self.tokens), cfg.run.compile != "0"
        self.trainer = DocumentTrainer(model, cfg.eval, cfg.run.seed, self.window, self.device, record, rows, one_document=False)
        self.state = self.trainer.state
        self.mark: dict[tuple, Tensor] = {}  # of the state where the chunk began

    def _logits(self, t: int) -> Tensor:
        if self.step is None:
            with repeatable_gradients(self.device):
                self.trainer.prepare()
            self.step = Graphed(self._step, self.trainer.graphs)
            self.step.prepare()
            self.trainer.restart()
        if t % self.chunk_steps == 0:
            self.mark = self.state.mark()
        self.input.copy_(self.tokens[:, t : t + 1])
        return self.step()

    def _step(self) -> Tensor:
        with self.trainer.adapters.attached():
            return super()._step()

    def reveal(self, t: int, tokens: Tensor) -> None:
        super().reveal(t, tokens)
        others = ((self.tokens[:, t + 1] == BOS_ID) & (self.lengths > t + 1)).nonzero().flatten()  # what begins in a stream that goes on
        if len(others):
            self.trainer.restart(others)

    def _train(self, end: int) -> None:
        begin = end - self.chunk_steps
        place = torch.arange(begin, end, device=self.device)
        inputs = self.tokens[:, begin:end]
        starts = torch.where(inputs == BOS_ID, place, 0).amax(1, keepdim=True)  # of the document that a stream is in, if within the chunk
        chunk = self.trainer.chunks[self.chunk_steps]
        self.state.rewind(self.mark)
        with repeatable_gradients(self.device):
            chunk.read(self.tokens[:, begin : end + 1])
            chunk.learn(place >= starts)


def transmit(
    lockstep: Lockstep, channel: Channel, known: np.ndarray | None, probe: Callable[[int, Tensor], None], progress: Callable[[int], None]
) -> tuple[np.ndarray, float]:
    """The one loop of both directions. known int64 [P, steps]: the targets to write; None to read them.

    Returns the targets [P, steps] (BOS where a stream has ended) and what they cost by their probabilities, bits. `probe(t, probabilities)`
    looks at each step before it is coded, `progress(tokens)` is told of it afterwards.
    """
    cost = torch.zeros((), dtype=torch.float64, device=lockstep.device)
    for t in range(lockstep.steps):
        probs, rows = lockstep.predict(t), lockstep.live(t)
        probe(t, probs)
        coded = channel.token(probs, None if known is None else known[rows, t])
        if (coded >= probs.size(1)).any():
            raise UserError("damaged: it names a token beyond the vocabulary")
        tokens = torch.from_numpy(coded).to(lockstep.device)
        cost -= probs.gather(1, tokens[:, None]).log2().sum()
        lockstep.reveal(t, tokens)
        progress(len(rows))
    return lockstep.tokens[:, 1:].cpu().numpy(), cost.item()


# ----------------------------------------------------------------------------------------------------------------------
# The file: magic, hashes of artifact and tokenizer, header, range coder's words, hash of the text, hash of the file
# ----------------------------------------------------------------------------------------------------------------------

MAGIC = b"golfzip2"
_NAME = 16  # bytes of sha256 by which artifact and tokenizer are known
_FIXED = struct.Struct("<8s16s16sI")  # magic, artifact, tokenizer, length of the header
_DIGEST = 16  # bytes of the file's own sha256 that are kept
# Settings that say where things are or how they are reported; all others may move a probability and are kept in the file.
_ELSEWHERE = ("data_path", "tokenizer_path", "runs_dir", "run_id", "device", "compile", "resume", "codec_streams")


@dataclasses.dataclass
class CodedText:
    """A compressed file's contents. `header` is JSON: streams, settings that differ from the artifact's, machine, layout, probes."""

    artifact: bytes  # the front half of its sha256
    tokenizer: bytes
    header: dict
    words: np.ndarray  # uint32 [n]
    text: bytes  # sha256

    def pack(self) -> bytes:
        header = brotli.compress(json.dumps(self.header, separators=(",", ":")).encode(), mode=brotli.MODE_TEXT)
        fixed = _FIXED.pack(MAGIC, self.artifact, self.tokenizer, len(header))
        data = fixed + header + self.words.astype("<u4").tobytes() + self.text
        return data + hashlib.sha256(data).digest()[:_DIGEST]

    @classmethod
    def unpack(cls, data: bytes, label: str) -> CodedText:
        """Raises UserError for what `pack` has not made, or what is not whole any more."""
        if not data.startswith(MAGIC):
            raise UserError(f"{label} was not written by this version's `codec.py compress`")
        body, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(body).digest()[:_DIGEST] != digest:
            raise UserError(f"{label} is damaged or cut off: its checksum does not fit")
        try:
            _, artifact, tokenizer, length = _FIXED.unpack_from(body)
            header = json.loads(brotli.decompress(body[_FIXED.size : _FIXED.size + length]))
            words = np.frombuffer(body[_FIXED.size + length : -32], "<u4").astype(np.uint32)
        except (struct.error, brotli.error, ValueError) as error:
            raise UserError(f"{label} is not a file of this version: {error}") from None
        return cls(artifact, tokenizer, header, words, body[-32:])


def machine(cfg: Config, device: torch.device) -> dict:
    """What decides the last bit of a probability, beside the code."""
    chosen = choose_kernels(cfg, device)
    facts = {"torch": torch.__version__, "attention": f"{chosen.full}, {chosen.windowed}"}
    if device.type == "cuda":
        facts["triton"] = kernels.triton.__version__ if chosen.fused else "none"
        return facts | {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts | {"device": f"cpu ({torch.backends.cpu.get_cpu_capability()})", "threads": torch.get_num_threads()}


class Session:
    """An artifact opened for coding on one device, with the settings of a file or, to write one, of the environment."""

    def __init__(self, path: Path, device: str, coded: CodedText | None = None):
        self.ctx, self.task = setup_distributed(device), "decompressing" if coded else "compressing"
        if self.ctx.world_size > 1:
            raise UserError("the codec runs in one process: start it without torchrun")
        if self.ctx.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        artifact = load_artifact(path, self.ctx.device)
        base, cfg = Config.from_dict(known_settings(artifact.meta["config"])).to_dict(), artifact.cfg
        if coded:
            here = {name: cfg[name] for name in _ELSEWHERE}
            cfg = Config.from_dict({**base, **here, **coded.header["settings"]})
        self.settings = {name: value for name, value in cfg.to_dict().items() if name not in _ELSEWHERE and base[name] != value}
        self.cfg, self.model = cfg, artifact.model
        tokenizer = load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size)
        self.spelling, self.byte_table = Spelling(tokenizer), ByteTable.from_tokenizer(tokenizer)
        self.artifact_hash = bytes.fromhex(sha256_file(path))[:_NAME]
        self.tokenizer_hash = bytes.fromhex(tokenizer_hash(cfg.run.tokenizer_path))[:_NAME]
        self.machine = machine(cfg, self.ctx.device)

    def lockstep(self, streams: Streams) -> Lockstep:
        kind = DocumentLockstep if self.cfg.eval.ttt_mode == "document" else Lockstep
        lockstep = kind(self.model, self.cfg, self.byte_table, self.ctx, streams)
        first, *others = lockstep.lines()
        for line in (f"{self.task} {first}", *others):
            self.ctx.log(line)
        return lockstep


def probed(t: int, lockstep: Lockstep) -> bool:
    """Steps whose probabilities the file holds a checksum of: an early one, and the first after the weights have trained."""
    return t in (min(63, lockstep.steps - 1), lockstep.chunk_steps if lockstep.trainer else -1)


def checksum(probs: Tensor) -> int:
    return zlib.crc32(probs.cpu().numpy().tobytes())


def compress(path: Path, source: Path, target: Path) -> dict:
    """Write the text in `source` to `target`; returns the figures that are reported."""
    data = source.read_bytes()
    session = Session(path, resolve_config(os.environ).run.device)
    documents, layout = split_documents(data, source.suffix == ".jsonl")
    pieces = [np.array([BOS_ID, *session.spelling.encode(document)]) for document in documents]
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    if join_documents(split_tokens(tokens, session.spelling), layout) != data:
        raise UserError(f"{source}: its tokens do not give it back")
    streams = Streams.cut(tokens, choose_streams(session.cfg.eval, len(tokens), session.ctx.device))
    lockstep, channel, probes = session.lockstep(streams), Channel(), []
    streams.write(channel)
    began = time.perf_counter()
    with session.ctx.progress(session.task, int(streams.targets.sum())) as progress:
        probe = lambda t, probs: probes.append(checksum(probs)) if probed(t, lockstep) else None
        _, cost = transmit(lockstep, channel, streams.deal(tokens), probe, progress)
    seconds = time.perf_counter() - began
    words = channel.coder.get_compressed()
    header = {
        "streams": streams.summary(),
        "settings": session.settings,
        "machine": session.machine,
        "layout": layout,
        "probes": probes,
    }
    coded = CodedText(session.artifact_hash, session.tokenizer_hash, header, words, hashlib.sha256(data).digest()).pack()
    with atomic_write(target) as temporary:
        temporary.write_bytes(coded)
    text_bytes = sum(map(len, documents))
    return {
        "bytes": len(coded),
        "source_bytes": len(data),
        "text_bytes": text_bytes,
        "tokens": int(streams.targets.sum()),
        "streams": len(streams.targets),
        "probability_bits": cost,
        "coder_bits": 32 * len(words),
        "bpb_file": 8 * len(coded) / max(text_bytes, 1),
        "bpb_probabilities": cost / max(text_bytes, 1),
        "seconds": seconds,
    }


def decompress(source: Path, target: Path, path: Path | None) -> dict:
    """Write the text that `source` holds to `target`, if it comes out as it went in."""
    coded = CodedText.unpack(source.read_bytes(), str(source))
    try:
        header = coded.header
        written = header["machine"]
        if not written["device"].startswith("cpu") and not torch.cuda.is_available():
            raise UserError(f"{source} was written on {written['device']}; torch sees no CUDA device here")
        if "threads" in written:
            torch.set_num_threads(int(written["threads"]))  # sums are split by them
        session = Session(path or find_artifact(coded.artifact, source), "cpu" if "threads" in written else "cuda", coded)
        for what, hashed, here in (
            ("artifact", coded.artifact, session.artifact_hash),
            ("tokenizer", coded.tokenizer, session.tokenizer_hash),
        ):
            if hashed != here:
                raise UserError(f"{source} was written with another {what}, of sha256 {hashed.hex()}")
        differing = [f"{name} {written.get(name)} (here {value})" for name, value in session.machine.items() if written.get(name) != value]
        if differing:
            raise UserError(f"{source} was written with {', '.join(differing)}: its probabilities cannot be found again here")
        channel = Channel(coded.words)
        streams = Streams.read(channel, *header["streams"])
        lockstep, probes = session.lockstep(streams), iter(header["probes"])

        def probe(t: int, probs: Tensor) -> None:
            if probed(t, lockstep) and checksum(probs) != next(probes, None):
                raise UserError(f"{source}: other probabilities at step {t} than when it was written: other code or another machine")

        began = time.perf_counter()
        with session.ctx.progress(session.task, int(streams.targets.sum())) as progress:
            table, _ = transmit(lockstep, channel, None, probe, progress)
        seconds = time.perf_counter() - began
        data = join_documents(split_tokens(streams.collect(table), session.spelling), header["layout"])
    except (KeyError, TypeError, ValueError, IndexError, StopIteration, AssertionError) as error:  # AssertionError: words no encoder writes
        raise UserError(f"{source} does not decode: {error or type(error).__name__}") from None
    if hashlib.sha256(data).digest() != coded.text:
        raise UserError(f"{source}: what it decodes to is not the text that was compressed")
    with atomic_write(target) as temporary:
        temporary.write_bytes(data)
    return {"bytes": len(data), "seconds": seconds, "tokens": int(streams.targets.sum())}


def split_tokens(tokens: np.ndarray, spelling: Spelling) -> list[bytes]:
    """The documents in a token stream, each behind its BOS."""
    starts = np.flatnonzero(tokens == BOS_ID)
    return [spelling.decode(document[1:].tolist()) for document in np.split(tokens, starts)[1:]]


def find_artifact(name: bytes, source: Path) -> Path:
    """The artifact whose sha256 begins so, near the file or in RUNS_DIR."""
    runs = Path(resolve_config(os.environ).run.runs_dir)
    for path in [*source.resolve().parent.glob("*.bin"), *runs.glob("*/artifact.bin")]:
        if path.is_file() and bytes.fromhex(sha256_file(path)).startswith(name):
            return path
    raise UserError(f"no artifact of sha256 {name.hex()}… beside {source} or in {runs}/: name it with --artifact")


# ----------------------------------------------------------------------------------------------------------------------
# Proof
# ----------------------------------------------------------------------------------------------------------------------


def prove(path: Path) -> dict:
    """Compress the validation split, have a process that cannot read it decompress the file, and compare; what eval.json says of it.

    That process sees the artifact, the tokenizer, a copy of the code and the file. What it restores is kept beside the artifact:
    validation.coded.
    """
    header, _ = packing.read_header(path.read_bytes(), str(path))
    cfg = resolve_config(os.environ, base=header["config"])
    with tempfile.TemporaryDirectory(prefix="proof_") as folder:
        text, cell = Path(folder) / "text" / "validation.jsonl", Path(folder) / "cell"
        text.parent.mkdir()
        text.write_bytes(validation_text(cfg))
        coded = cell / "coded"
        copy_code(cell / "code")
        figures = compress(path, text, coded)
        if torch.cuda.is_available():  # the other process needs the memory
            gc.collect()
            torch.cuda.empty_cache()
        for source, name in ((path, "artifact.bin"), (cfg.run.tokenizer_path, "tokenizer.model")):
            shutil.copyfile(source, cell / name)
        began = time.perf_counter()
        command = ["code/codec.py", "decompress", "coded", "restored", "--artifact", "artifact.bin"]
        status = run_apart(command, cell, secret=[text, *list_shards(cfg.run.data_path, "val")], TOKENIZER_PATH="tokenizer.model")
        seconds = time.perf_counter() - began
        same = sha256_file(cell / "restored") == sha256_file(text)
        if same:
            with atomic_write(path.with_name("validation.coded")) as temporary:
                shutil.copyfile(coded, temporary)
    return {
        "val_bpb_file": figures["bpb_file"],
        "bytes_file": figures["bytes"],
        "proof": {
            "restored": same,
            "apart": status,
            "text_bytes": figures["text_bytes"],
            "bpb_probabilities": figures["bpb_probabilities"],
            "streams": figures["streams"],
            "tokens": figures["tokens"],
            "seconds_compress": figures["seconds"],
            "seconds_decompress": seconds,
            "artifact_sha256": sha256_file(path),
        },
    }


def validation_text(cfg: Config) -> bytes:
    """The validation split as JSON lines, a document a line."""
    tokens = load_tokens(cfg.run.data_path, "val", cfg.model.vocab_size, limit=cfg.eval.eval_tokens).numpy()
    if tokens[0] != BOS_ID:
        tokens = np.concatenate(([BOS_ID], tokens))
    documents = split_tokens(tokens, Spelling(load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size)))
    return b"".join(b'{"text": ' + _json_string(document, 0) + b"}\n" for document in documents)


def copy_code(folder: Path) -> None:
    root = Path(__file__).resolve().parent
    for source in (path for pattern in ("*.py", "parts/*.py", "data/*.py") for path in root.glob(pattern)):
        (folder / source.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / source.relative_to(root))


def run_apart(command: Sequence[str], cell: Path, secret: Sequence[Path], **settings: str) -> dict:
    """Run one of the project's commands within the folder `cell`, shut off from everything else; what was verified of that.

    Raises UserError where it fails.
    """
    ours, theirs = os.pipe()
    order = {"read": [str(cell)], "scratch": str(cell), "secret": [str(path.resolve()) for path in secret], "status": theirs}
    keep = {"DATA_PATH", "RUNS_DIR", "RUN_ID", "PRESET"}
    environment = {name: value for name, value in os.environ.items() if name not in keep} | settings
    packages = [str(cell / "code"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment |= own_caches(str(cell)) | {"PYTHONPATH": os.pathsep.join(packages)}
    shut = [sys.executable, "-m", "parts.sandbox", json.dumps(order), sys.executable, *command]
    done = subprocess.run(shut, cwd=cell, env=environment, pass_fds=(theirs,))
    os.close(theirs)
    with open(ours) as report:
        status = json.loads(report.readline() or "{}")
    if done.returncode:
        raise UserError(f"the process apart ended with exit code {done.returncode}: the proof failed")
    return status


# ----------------------------------------------------------------------------------------------------------------------
# Other compressors
# ----------------------------------------------------------------------------------------------------------------------


# Programs that are tried where they are installed, at their strongest settings for text: name -> command, which writes `out` from `text`.
PROGRAMS = {
    "bzip3 -b 16": "bzip3 -e -f -b 16 text out",
    "7z PPMd, order 8": "7z a -t7z -m0=PPMd:o=8:mem=1g -mmt=1 out text",
    "7z PPMd, order 12": "7z a -t7z -m0=PPMd:o=12:mem=1g -mmt=1 out text",
    "7z PPMd, order 16": "7z a -t7z -m0=PPMd:o=16:mem=1g -mmt=1 out text",
    "lrzip -z -L 9": "lrzip -z -L 9 -p 1 -o out text",
    "zpaq -m5": "zpaq a out text -m5 -t1",
}


def installed_compressors(data: bytes) -> dict[str, int]:
    """Bytes under those of PROGRAMS that are here. What appends a suffix of its own to `out` is found all the same."""
    sizes = {}
    for name, command in PROGRAMS.items():
        program, *arguments = command.split()
        if not shutil.which(program):
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "text").write_bytes(data)
            done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True)
            written = list(Path(folder).glob("out*"))
            if done.returncode or len(written) != 1:
                raise UserError(f"`{command}` failed: {done.stderr.strip()[-200:]}")
            sizes[name] = written[0].stat().st_size
    return sizes


def other_compressors(data: bytes) -> dict[str, int]:
    """Bytes of the same text under the strongest settings of general compressors."""
    import lzma

    import zstandard

    window = zstandard.ZstdCompressionParameters.from_level(22, window_log=27, enable_ldm=True)
    return {
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "zstd --ultra -22 --long": len(zstandard.ZstdCompressor(compression_params=window).compress(data)),
        "brotli -q 11 -w 24": len(brotli.compress(data, quality=11, lgwin=24)),
        **installed_compressors(data),
    }


def compare(source: Path, path: Path | None) -> list[str]:
    """The lines of the table."""
    data = source.read_bytes()
    documents, _ = split_documents(data, source.suffix == ".jsonl")
    size = max(sum(map(len, documents)), 1)
    rows = other_compressors(data)
    if path:
        with tempfile.TemporaryDirectory() as folder:
            rows[f"codec.py, {path.parent.name}"] = compress(path, source, Path(folder) / "coded")["bytes"]
    lines = [f"{'compressor':<28}{'bytes':>12}{'bits/byte':>11}"]
    return lines + [f"{name:<28}{count:>12,}{8 * count / size:>11.4f}" for name, count in rows.items()]


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------

USAGE = """usage: python codec.py compress runs/<RUN_ID>|ARTIFACT TEXT OUT | decompress OUT TEXT [--artifact ARTIFACT]
       | prove ARTIFACT [--out EVAL.json] | text OUT.jsonl | compare TEXT [ARTIFACT]"""


def existing(name: str) -> Path:
    if not Path(name).is_file():
        raise UserError(f"{name} is not a file")
    return Path(name)


def prove_command(path: Path, evaluation: Path) -> int:
    """Report the proof, and add it to the score."""
    result = prove(path)
    proof = result["proof"]
    shut = " and ".join(name for name in ("files", "network") if proof["apart"].get(name)) or "nothing"
    print(
        f"val_bpb_file:{result['val_bpb_file']:.6f} bytes_file:{result['bytes_file']:,} of {proof['text_bytes']:,} bytes of text "
        f"({proof['bpb_probabilities']:.6f} by the probabilities), {proof['streams']} streams; compressed in {proof['seconds_compress']:.1f}s, "
        f"decompressed in {proof['seconds_decompress']:.1f}s by a process shut off from {shut}: {'the same text' if proof['restored'] else 'ANOTHER TEXT'}"
    )
    if written := read_json(evaluation):
        write_json(evaluation, written | result)
        print(f"val_bpb:{written['val_bpb']:.6f} is what {evaluation} says; the proof is beside it")
    return 0 if proof["restored"] else 1


def main() -> int:
    say_near_misses(os.environ)
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    options = {}
    for option in ("--artifact", "--out"):
        if option in arguments:
            place = arguments.index(option)
            if place + 1 == len(arguments):
                raise UserError(USAGE)
            options[option] = arguments.pop(place + 1)
            arguments.pop(place)
    verb, *names = arguments or [""]
    if options.keys() - {"decompress": {"--artifact"}, "prove": {"--out"}}.get(verb, set()):
        raise UserError(USAGE)
    if verb == "compress" and len(names) == 3:
        figures = compress(artifact_file(names[0]), existing(names[1]), Path(names[2]))
        share = figures["coder_bits"] / max(figures["probability_bits"], 1) - 1
        print(
            f"{figures['source_bytes']:,} bytes -> {figures['bytes']:,} bytes ({figures['text_bytes']:,} of them text: {figures['bpb_file']:.4f} "
            f"bits a byte; by the probabilities {figures['bpb_probabilities']:.4f}, the coder {100 * share:+.3f} %) "
            f"in {figures['seconds']:.1f}s, {figures['streams']} streams, {figures['tokens'] / max(figures['seconds'], 1e-9):,.0f} tokens/s"
        )
    elif verb == "decompress" and len(names) == 2:
        named = options.get("--artifact")
        figures = decompress(existing(names[0]), Path(names[1]), artifact_file(named) if named else None)
        print(f"{figures['bytes']:,} bytes in {figures['seconds']:.1f}s, {figures['tokens'] / max(figures['seconds'], 1e-9):,.0f} tokens/s")
    elif verb == "prove" and len(names) == 1:
        path = artifact_file(names[0])
        return prove_command(path, Path(options.get("--out", path.with_name("eval.json"))))
    elif verb == "text" and len(names) == 1:
        text = validation_text(resolve_config(os.environ))
        with atomic_write(names[0]) as temporary:
            temporary.write_bytes(text)
        print(f"{len(text):,} bytes -> {names[0]}")
    elif verb == "compare" and len(names) in (1, 2):
        for line in compare(existing(names[0]), artifact_file(names[1]) if len(names) == 2 else None):
            print(line)
    else:
        raise UserError(USAGE)
    return 0


if __name__ == "__main__":
    cli(main)

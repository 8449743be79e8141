"""Bytes of a quantized model: entropy coding of the symbols and the artifact container.

Three layers, each usable alone and none of them aware of a model:

    compressors    brotli-11, zstd-22, LZMA and zlib behind one bounded interface (`compress`, `decompress`)
    range coder    `range_encode`, `range_decode`: integer symbols under adaptive integer models, bit-exact on every machine
    container      `pack_artifact`, `unpack_artifact`: magic, version, JSON header, streams, SHA-256 over all of it

What goes in and comes out is a list of `Record`s: named int8 matrices with a float16 scale a row ("codes"), float16 tensors
("half") and raw bytes ("bytes"). There is no pickle anywhere, and no length in a file is believed before it is checked. A range
coder's few bytes may stand for millions of symbols: what bounds the reader's memory and time is the plan's elements, which the
model's own size bounds (`check_plan`), and PREDICTED_WORK.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import hashlib
import itertools
import json
import lzma
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parts.files import UserError, atomic_write
from parts.progress import Progress

COMPRESSORS = ("brotli", "zstd", "lzma", "zlib", "range")

# ----------------------------------------------------------------------------------------------------------------------
# General compressors
# ----------------------------------------------------------------------------------------------------------------------
# Streams are cut into chunks that are compressed independently: brotli-11 runs at about 1 MB/s on one core, so that only threads
# keep the packing of a 36 MB stream within seconds. Quantized weights have no repeats further apart than that; the cut
# costs less than 0.01 %.
CHUNK_BYTES = 4 << 20
_LZMA_FILTERS = [
    # lc/lp/pb model text and aligned records. Symbols are neither, and the extra contexts only dilute the statistics.
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0, "dict_size": CHUNK_BYTES}
]


def _compress_chunk(data: bytes, codec: str) -> bytes:
    if codec == "brotli":
        import brotli

        return brotli.compress(data, mode=brotli.MODE_GENERIC, quality=11, lgwin=24)
    if codec == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=22).compress(data)
    if codec == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
    if codec == "zlib":
        return zlib.compress(data, 9)
    raise ValueError(f"unknown codec {codec!r}")


def _decompress_chunk(data: bytes, codec: str, size: int) -> bytes:
    """Decompress to exactly `size` bytes, never holding more than `size` + a buffer. Raises ValueError on anything else."""
    if codec == "brotli":
        import brotli

        decoder, out = brotli.Decompressor(), bytearray()
        try:
            out += decoder.process(data, output_buffer_limit=size + 1)
            while not decoder.is_finished() and len(out) <= size:
                more = decoder.process(b"", output_buffer_limit=size + 1 - len(out))
                if not more:
                    break
                out += more
            finished = decoder.is_finished()
        except brotli.error as error:
            raise ValueError(f"brotli: {error}") from None
        result = bytes(out)
    elif codec == "zstd":
        import zstandard

        try:
            # The window of a level-22 frame of CHUNK_BYTES is at most 8 MiB; a larger claim is not ours.
            reader = zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data)
            result = reader.read(size + 1)
            finished = len(result) == size and reader.read(1) == b""
        except zstandard.ZstdError as error:
            raise ValueError(f"zstd: {error}") from None
    elif codec == "lzma":
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
        try:
            result = decoder.decompress(data, max_length=size + 1)
            finished = decoder.eof and not decoder.unused_data
            if not decoder.eof and len(result) == size:  # the end marker may still be unread
                decoder.decompress(b"", max_length=1)
                finished = decoder.eof and not decoder.unused_data
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"lzma: {error}") from None
    elif codec == "zlib":
        decoder = zlib.decompressobj()
        try:
            result = decoder.decompress(data, size + 1)
        except zlib.error as error:
            raise ValueError(f"zlib: {error}") from None
        finished = decoder.eof and not decoder.unused_data
    else:
        raise ValueError(f"unknown codec {codec!r}")
    if len(result) != size or not finished:
        raise ValueError(f"{codec}: a chunk does not decompress to its {size} bytes")
    return result


def _threads() -> int:
    """Cores this process may use: a container often grants fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def compress(data: bytes, codec: str) -> bytes:
    """Compress `data` with brotli | zstd | lzma | zlib as a row of `[u32 length][chunk]`, chunks of CHUNK_BYTES raw bytes."""
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    with concurrent.futures.ThreadPoolExecutor(max(1, min(_threads(), len(chunks)))) as pool:
        packed = list(pool.map(lambda chunk: _compress_chunk(chunk, codec), chunks))  # all four release the GIL
    return b"".join(struct.pack("<I", len(chunk)) + chunk for chunk in packed)


def decompress(data: bytes, codec: str, size: int) -> bytes:
    """Inverse of `compress`. `size`: the raw bytes expected. Raises ValueError for any other outcome."""
    jobs, at = [], 0
    for start in range(0, size, CHUNK_BYTES):
        if at + 4 > len(data):
            raise ValueError("a chunk is missing")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if length > len(data) - at:
            raise ValueError("a chunk runs past the end of its stream")
        jobs.append((data[at : at + length], min(CHUNK_BYTES, size - start)))
        at += length
    if at != len(data):
        raise ValueError("bytes left over behind the last chunk")
    with concurrent.futures.ThreadPoolExecutor(max(1, min(_threads(), len(jobs)))) as pool:
        return b"".join(pool.map(lambda job: _decompress_chunk(job[0], codec, job[1]), jobs))


def shuffle_bytes(data: bytes, stride: int) -> bytes:
    """Byte-shuffle: the bytes at each offset modulo `stride` gathered into one plane (all high bytes of float16, say)."""
    return np.frombuffer(data, np.uint8).reshape(-1, stride).T.tobytes() if data else b""


def unshuffle_bytes(data: bytes, stride: int) -> bytes:
    """Inverse of `shuffle_bytes`."""
    return np.frombuffer(data, np.uint8).reshape(stride, -1).T.tobytes() if data else b""


# ----------------------------------------------------------------------------------------------------------------------
# Range coder
# ----------------------------------------------------------------------------------------------------------------------
# SDClip gives every row of symbols the same standard deviation, so that rows look alike; columns do not (input channels
# differ in how large their weights are), and neither do tensors. The model is therefore
#
#     P(q[r, c]) = table[context],   context = level(mean |q| in column c over the rows above) + row offset
#
# with `level` a logarithm in sixteenths of an octave. Tables and column means adapt backwards, from symbols already coded, so that neither
# costs a byte of side information; the row offset, where a tensor's rows do differ in shape, is coded at the row's head
# and only if the encoder finds that it pays. Rows are handled in slices: inside one slice the contexts are known in advance,
# and all symbols of one context go to `constriction` in a single call.
#
# Reordering rows by similarity was measured and left out: between rows of a matrix trained by Muon no order is better than another
# (greedy L1 order on MLP matrices: 0.00 % under brotli, −0.01 % here), and on an embedding the permutation costs what it saves.
#
# How far this can go: trained by Muon and rounded under SDClip, a matrix is white Gaussian noise to the eye of every statistic tried.
# On the int6 matrices of a 36M model (31.7M symbols; brotli 13,387,807 bytes) their order-0 entropy is 13,206,779 bytes, a Gaussian
# with each row's and column's own variance *given for free* 13,154,163, this coder 13,172,924. Measured and left out, in bytes of
# that model: regression on rows or columns of the same matrix (a loss), an MLP's output columns from its own neurons' input rows
# (at most 9,700), neurons from those of the layer before (1,300), the weights at initialisation (0.1 %).
#
# Bit-exactness: everything that influences a probability is integer arithmetic. The tables reach constriction as float32 holding
# integers whose sum stays below 2^24, so that its fixed-point conversion has no rounding that could differ between machines.
# Sixteenths of an octave: with a table a quarter octave, the bytes grow slightly (0.7 KB of 13.2 MB on a trained int6 model).
_LEVELS = 256  # contexts: mean |q| from 2^-5 to 2^11
_LEVEL_STEPS = 16
_ROW_STEPS = 4  # row offsets cost side information: quarter octaves
_FIXED = 12  # fractional bits of a mean magnitude


def _root(value: int, halvings: int) -> int:
    """floor(value^(2^-halvings)) exactly: a float power could round differently on another machine."""
    for _ in range(halvings):
        value = math.isqrt(value)
    return value


# thresholds[i] = floor(2^(i/16 - 5) · 2^_FIXED)
_LEVEL_THRESHOLDS = np.array([_root(1 << (i + 16 * (_FIXED - 5)), 4) for i in range(1, _LEVELS)], dtype=np.int64)
_ROW_OFFSETS = 16  # row offsets −16 … +16 quarter octaves
_ROW_GAIN = np.array(  # 2^(−offset/4) in fixed point: takes a row's own size out of the column means
    [_root(1 << (4 * _FIXED - offset), 2) for offset in range(-_ROW_OFFSETS, _ROW_OFFSETS + 1)],
    dtype=np.int64,
)
_PRIOR_ROWS = 4, 1 << 12  # least and greatest weight of the tensor's overall mean against a column's own, in rows
_ROW_NOISE = 584  # (π/2 − 1) · 2^10: squared relative deviation of one Gaussian magnitude
_STEP = 32  # what a symbol adds to its table
_PRIOR_TOTAL = 1 << 15  # a fresh table's total: its prior is worth 1024 symbols
_TABLE_LIMIT = 1 << 22  # a table is halved beyond this total; keeps sums below 2^24 with room for a slice
_CARRY_LIMIT = 1 << 20  # … and beyond this one where a new tensor begins: old statistics guide, they don't rule
# Modes of a matrix. Matrices trained by Muon are nearly isotropic: their columns say nothing about each other. An embedding's do; there
# each column is predicted from those before it, by regression learned from the rows above, and a row may name rows above that it
# resembles (case variants of a word; tokens that never occurred), whose weighted sum is taken off before.
PLAIN, OFFSET_ROWS, PREDICTED = range(3)
PREDICTED_ROWS = 1 << 18  # at most: keeps a table's sum below 2^24
PREDICTED_COLUMNS = 8, 1024
PREDICTED_WORK = 1 << 33  # multiply-adds a stream, at most: half a minute of the reader's, twice what a vocabulary of 8,192 × 512 takes
_INNOVATION, _COEFFICIENT = 6, 12  # fractional bits of innovations and of regression coefficients
_NEIGHBOURS = 3  # at most, a row
_NEIGHBOUR_WINDOW = 1 << 13  # rows above a block among which they are sought: bounds the encoder's time
_GAIN, _GAIN_MOST = 4, 31  # a neighbour's weight: fractional bits, and the largest in such units
_SLICE_FIRST, _SLICE_MOST = 512, 16384  # symbols a slice


def _prior(level: int, size: int) -> np.ndarray:
    """Table to start a context from: Gaussian with the mean |q| it stands for, as int64 [size] for |q| = 0 … size−1.

    In integer arithmetic, since exp differs between machines: g(q) = ρ^(q²) by recurrence, ρ = e^(−1/2σ²) as (1 − 1/2¹⁰σ²)^512.
    """
    one = 1 << 60
    # mean = 2^(level/16 - 5 + 1/32), σ = 1.25 mean, in units of 2^-20
    sigma = 5 * _root(1 << (2 * level + 1 + 32 * (20 - 5)), 5) // 4
    rho = max(0, one - (one << 40) // (sigma * sigma << 10))
    for _ in range(9):
        rho = rho * rho // one
    mass, weight, factor = [], one, rho
    for _ in range(size):
        mass.append(weight)
        weight, factor = weight * factor // one, factor * rho // one * rho // one
    total = 2 * sum(mass) - mass[0]
    return np.array([1 + _PRIOR_TOTAL * value // total for value in mass], dtype=np.int64)


@functools.cache
def _fresh_tables(bits: int) -> np.ndarray:
    """Every context's prior over the symbols, int64 [levels, 2^bits], to be copied. Made once a process: a coder is begun for every trial."""
    magnitude = np.abs(np.arange(1 << bits, dtype=np.int64) - (1 << (bits - 1)))
    tables = np.array([_prior(level, magnitude.max() + 1)[magnitude] for level in range(_LEVELS)])
    tables.flags.writeable = False
    return tables


class _SymbolModel:
    """Adaptive statistics shared by encoder and decoder: both drive it with the same calls in the same order."""

    def __init__(self, bits: int):
        self.alphabet = 1 << bits
        self.low = -(1 << (bits - 1))
        self.tables = _fresh_tables(bits).copy()
        self.predicted = self.tables.copy()  # of innovations: another shape, and no contexts shared
        self.row_table = np.ones(2 * _ROW_OFFSETS + 1, dtype=np.int64)
        self.row_table[_ROW_OFFSETS] = 8
        self.gain_tables = np.ones((_NEIGHBOURS, 2 * _GAIN_MOST + 1), dtype=np.int64)
        self.gain_tables[:, _GAIN_MOST] = 32

    def start_tensor(self, columns: int) -> None:
        """Forget the column means; keep the tables, but shrink them so that this tensor's own statistics soon prevail."""
        _shrink(self.tables, _CARRY_LIMIT)
        self.columns = columns
        self.sums = np.zeros(columns, dtype=np.int64)
        self.rows = 0

    def column_levels(self) -> np.ndarray:
        """int64 [columns]: context of each column from the rows seen so far."""
        if self.rows == 0:
            mean = np.full(self.columns, 2 << _FIXED, dtype=np.int64)
        else:
            overall = int(self.sums.sum()) // self.columns  # = mean magnitude · rows, in fixed point
            weight = self._prior_rows(overall)
            mean = (self.sums + overall * weight // self.rows) // (self.rows + weight)
        return np.searchsorted(_LEVEL_THRESHOLDS, mean, side="right")

    def _prior_rows(self, overall: int) -> int:
        """Weight of the overall mean: the columns' real spread is what they differ by beyond the noise of so few rows.

        Columns of an MLP's first matrix differ by 3 %, which takes five hundred rows to see; with a fixed small weight each column
        would pay for its own estimate.
        """
        ratio = np.minimum((self.sums << 10) // max(overall, 1), 1 << 14) - (1 << 10)
        spread = int((ratio * ratio).sum()) // self.columns - (_ROW_NOISE << 10) // self.rows  # squared, relative, in 2^-20
        least, most = _PRIOR_ROWS
        return min(max((_ROW_NOISE << 10) // max(spread, 1), least), most)

    def contexts(self, row_offsets: np.ndarray) -> np.ndarray:
        """uint8 [rows, columns] for the next slice."""
        levels = self.column_levels()[None, :] + _LEVEL_STEPS // _ROW_STEPS * row_offsets[:, None]
        return np.clip(levels, 0, _LEVELS - 1).astype(np.uint8)

    def update(self, symbols: np.ndarray, contexts: np.ndarray, row_offsets: np.ndarray) -> None:
        """Learn a coded slice. symbols: int64 [rows, columns] shifted to start at 0."""
        flat = contexts.ravel().astype(np.int64) * self.alphabet + symbols.ravel()
        self.tables += _STEP * np.bincount(flat, minlength=_LEVELS * self.alphabet).reshape(_LEVELS, self.alphabet)
        _shrink(self.tables, _TABLE_LIMIT)
        magnitude = np.abs(symbols + self.low)
        self.sums += (magnitude * _ROW_GAIN[row_offsets + _ROW_OFFSETS][:, None]).sum(axis=0)
        self.rows += len(symbols)

    def update_predicted(self, symbols: np.ndarray, contexts: np.ndarray) -> None:
        """Learn a column coded under prediction. symbols: int64 [rows]."""
        flat = contexts.astype(np.int64) * self.alphabet + symbols
        low, high = int(contexts.min()), int(contexts.max()) + 1
        counts = np.bincount(flat - low * self.alphabet, minlength=(high - low) * self.alphabet)
        self.predicted[low:high] += _STEP * counts.reshape(high - low, self.alphabet)
        _shrink(self.predicted[low:high], _TABLE_LIMIT)


def _shrink(tables: np.ndarray, limit: int) -> None:
    """Halve, in place, each table whose total exceeds `limit`, until none does."""
    while (over := tables.sum(axis=1) > limit).any():
        tables[over] = np.maximum(tables[over] >> 1, 1)


def _slices(rows: int, columns: int):
    """Row ranges of growing height: short ones first, while the column means are still unknown."""
    start, symbols = 0, _SLICE_FIRST
    while start < rows:
        stop = min(rows, start + max(1, symbols // columns))
        yield start, stop
        start, symbols = stop, min(2 * symbols, _SLICE_MOST)


def _row_offsets(codes: np.ndarray) -> np.ndarray:
    """int64 [rows]: by how many quarter octaves each row's mean |q| departs from what its columns suggest."""
    magnitude = np.abs(codes.astype(np.float32))
    columns = magnitude.mean(axis=0)
    ratio = np.maximum(magnitude.sum(axis=1), 1e-3) / max(float(columns.sum()), 1e-3)
    offsets = np.rint(_ROW_STEPS * np.log2(ratio)).astype(np.int64)  # an encoder's choice: may round as it likes
    return np.clip(offsets, -_ROW_OFFSETS, _ROW_OFFSETS)


class _RangeCoder:
    """Codes tensors one after another under one `_SymbolModel`, forwards or backwards alike."""

    def __init__(self, bits: int, encoder=None, decoder=None):
        import constriction

        self.categorical = constriction.stream.model.Categorical
        self.model = _SymbolModel(bits)
        self.encoder, self.decoder = encoder, decoder
        self.work = 0  # of prediction, so far: factorizing costs columns³ a block whatever the payload

    def may_predict(self, rows: int, columns: int) -> bool:
        """Whether the next matrix may be PREDICTED: the one rule of encoder and decoder."""
        least, most = PREDICTED_COLUMNS
        fits = least <= columns <= most and 3 * columns <= rows <= PREDICTED_ROWS
        return fits and self.work + _prediction_work(rows, columns) <= PREDICTED_WORK

    def _table(self, counts: np.ndarray):
        return self.categorical(counts.astype(np.float32), perfect=False)

    def _code_grouped(self, contexts: np.ndarray, tables: np.ndarray, symbols: np.ndarray | None) -> np.ndarray:
        """Code symbols (int64 [n], from 0; None when decoding) each under the table of its context; -> the symbols.

        All symbols of a context go through the coder in one call: a call a symbol would cost a hundred times the coding itself.
        """
        order = np.argsort(contexts, kind="stable")  # radix sort on small integers
        counts = np.bincount(contexts, minlength=len(tables))
        grouped = np.empty(contexts.size, dtype=np.int32) if symbols is None else symbols[order].astype(np.int32)
        begin = 0
        for context in np.flatnonzero(counts).tolist():
            end = begin + int(counts[context])
            table = self._table(tables[context])
            if symbols is None:
                grouped[begin:end] = self.decoder.decode(table, end - begin)
            else:
                self.encoder.encode(grouped[begin:end], table)
            begin = end
        if symbols is not None:
            return symbols
        result = np.empty(contexts.size, dtype=np.int64)
        result[order] = grouped
        return result

    def _code_small(self, values: np.ndarray | None, count: int, table: np.ndarray) -> np.ndarray:
        """Code `count` small whole numbers about zero (int64; None when decoding) under the adaptive `table`, which learns them."""
        middle = len(table) // 2
        if self.decoder is None:
            self.encoder.encode((values + middle).astype(np.int32), self._table(table))
        else:
            values = self.decoder.decode(self._table(table), count).astype(np.int64) - middle
        table += 8 * np.bincount(values + middle, minlength=len(table))
        _shrink(table[None], 1 << 12)
        return values

    def _code_offsets(self, offsets: np.ndarray | None, count: int) -> np.ndarray:
        return self._code_small(offsets, count, self.model.row_table)

    def _code_neighbours(self, chosen: list | None, codes: np.ndarray, start: int, stop: int) -> np.ndarray:
        """What the neighbours of rows start … stop say of them: whole numbers in units of 2^-_INNOVATION, float64 [rows, columns].

        chosen: (gains int64 [rows], index int64 [rows]) for each of the _NEIGHBOURS; None when decoding. Gain 0: no neighbour.
        """
        import constriction

        first = max(0, start - _NEIGHBOUR_WINDOW)
        uniform = constriction.stream.model.Uniform(max(start - first, 2))
        total = np.zeros((stop - start, codes.shape[1]))
        for number in range(_NEIGHBOURS):
            gains, index = chosen[number] if chosen else (None, None)
            gains = self._code_small(gains, stop - start, self.model.gain_tables[number])
            having = np.flatnonzero(gains)
            if not len(having):
                continue
            if self.decoder is None:
                index = index[having]
                self.encoder.encode((index - first).astype(np.int32), uniform)
            else:
                index = self.decoder.decode(uniform, len(having)).astype(np.int64) + first
            total[having] += codes[index] * (gains[having, None] * float(1 << (_INNOVATION - _GAIN)))
        return total

    def code(self, codes: np.ndarray, mode: int, row_offsets: np.ndarray | None = None) -> None:
        """Encode int8 `codes` [rows, columns], or fill them when decoding. `row_offsets`: int64 [rows], encoder only."""
        if mode == PREDICTED:
            self.work += _prediction_work(*codes.shape)
            self._code_predicted(codes)
        else:
            self._code_rows(codes, row_offsets, mode == OFFSET_ROWS)

    def _code_rows(self, codes: np.ndarray, row_offsets: np.ndarray | None, has_offsets: bool) -> None:
        model = self.model
        rows, columns = codes.shape
        model.start_tensor(columns)
        for start, stop in _slices(rows, columns):
            offsets = np.zeros(stop - start, dtype=np.int64)
            if has_offsets:
                offsets = self._code_offsets(row_offsets[start:stop] if self.decoder is None else None, stop - start)
            contexts = model.contexts(offsets)
            known = codes[start:stop].astype(np.int64).ravel() - model.low if self.decoder is None else None
            symbols = self._code_grouped(contexts.ravel(), model.tables, known).reshape(contexts.shape)
            if self.decoder is not None:
                codes[start:stop] = symbols + model.low
            model.update(symbols, contexts, offsets)

    def _code_predicted(self, codes: np.ndarray) -> None:
        """Column by column, each predicted from those before it; the predictor is learned from the rows before, block by block.

        From the last row up: a vocabulary's first rows, its most frequent tokens, are the ones best coded late, and the bytes among
        them, which hardly occur, resemble each other.
        """
        model, codes = self.model, codes[::-1]
        rows, columns = codes.shape
        blocks = _predicted_blocks(rows, columns)
        self._code_rows(codes[: blocks[0]], None, False)
        half, scale = model.alphabet // 2, float(1 << _INNOVATION)
        gram, seen = np.zeros((columns, columns)), 0
        for start, stop in itertools.pairwise(blocks):
            fresh = codes[seen:start].astype(np.float64)
            gram, seen = gram + fresh.T @ fresh, start
            lower, levels, variance = _innovations(gram, start)
            chosen = offsets = None
            if self.decoder is None:
                chosen, offsets = _choose_neighbours(codes[:stop].astype(np.float32), start, lower, variance)
            known = self._code_neighbours(chosen, codes, start, stop)
            offsets = self._code_offsets(offsets, stop - start) * (_LEVEL_STEPS // _ROW_STEPS)
            innovation = np.zeros((stop - start, columns))
            for column in range(columns):
                # Integers held by float64: every product and partial sum stays below 2^53, so that no order of summation rounds.
                guess = np.floor(innovation[:, :column] @ lower[column, :column] / (1 << _COEFFICIENT) + 0.5)
                guess = np.clip(guess + known[:, column], model.low * scale, -model.low * scale)
                shift = np.floor(guess / scale + 0.5).astype(np.int64) - half
                contexts = np.clip(levels[column] + offsets, 0, _LEVELS - 1).astype(np.uint8)
                symbols = (codes[start:stop, column] - shift) % model.alphabet if self.decoder is None else None
                symbols = self._code_grouped(contexts, model.predicted, symbols)
                if self.decoder is not None:
                    codes[start:stop, column] = (symbols + shift - model.low) % model.alphabet + model.low
                innovation[:, column] = codes[start:stop, column] * scale - guess
                model.update_predicted(symbols, contexts)


def _predicted_blocks(rows: int, columns: int) -> list[int]:
    """Ends of the row blocks of `_code_predicted`: half as many rows as columns first (without prediction), then a quarter more each."""
    ends = [min(rows, max(16, columns // 2))]
    while ends[-1] < rows:
        ends.append(min(rows, ends[-1] + max(16, ends[-1] // 4)))
    return ends


def _prediction_work(rows: int, columns: int) -> int:
    """Multiply-adds that decoding a predicted matrix takes: a factorization a block, a row of coefficients a symbol."""
    return len(_predicted_blocks(rows, columns)) * columns**3 + rows * columns**2


def _innovations(gram: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """LDLᵀ of the second moments of `rows` rows: column = Σ_j L[column, j] · innovation_j + its own, of variance D.

    -> (L in units of 2^-_COEFFICIENT, whole numbers in float64 [C, C]; context level of each column's innovation, int64 [C]; D).
    Off the diagonal the moments are shrunk by rows / (rows + 4 columns): with few rows a coefficient is mostly noise. Only
    elementwise products, differences, quotients and roots are used, one operation at a time: IEEE 754 defines each to the last bit,
    so that all machines find the same whole numbers. A library's factorization would not promise that.
    """
    columns = len(gram)
    work = gram * (rows / (rows + 4.0 * columns))
    np.fill_diagonal(work, gram.diagonal() + 0.1 * rows)
    lower, variance = np.zeros_like(work), np.zeros(columns)
    for j in range(columns):
        variance[j] = max(work[j, j], 0.01 * rows)
        below = work[j + 1 :, j] / variance[j]
        lower[j + 1 :, j] = below
        work[j + 1 :, j + 1 :] -= np.multiply.outer(below, work[j, j + 1 :])
    lower = np.clip(np.floor(lower * (1 << _COEFFICIENT) + 0.5), -(1 << 20), 1 << 20)
    mean = np.floor(np.sqrt(variance / rows) * (0.8 * (1 << _FIXED)))  # mean magnitude of a Gaussian: sqrt(2/π) of its deviation
    return lower, np.searchsorted(_LEVEL_THRESHOLDS, mean.astype(np.int64), side="right"), variance / rows


def _choose_neighbours(codes: np.ndarray, start: int, lower: np.ndarray, variance: np.ndarray) -> tuple[list, np.ndarray]:
    """The encoder's choice for rows from `start` on of `codes` float32 [rows, columns]: matching pursuit among whitened rows above.

    -> ((gains, index) for each of the _NEIGHBOURS, as `_code_neighbours` takes them; row offsets int64). May round as it likes.
    """
    columns, first = codes.shape[1], max(0, start - _NEIGHBOUR_WINDOW)
    whiten = np.linalg.inv((lower / (1 << _COEFFICIENT) + np.eye(columns)) * np.sqrt(variance)).T.astype(np.float32)
    above, rest = codes[first:start] @ whiten, codes[start:] @ whiten
    norms = np.maximum((above * above).sum(axis=1), 1e-3)
    directions = above / np.sqrt(norms)[:, None]
    chosen, price = [], math.log2(max(start - first, 2)) + 6  # bits a neighbour: its index and its gain
    for _ in range(_NEIGHBOURS):
        likeness = rest @ directions.T
        index = np.abs(likeness).argmax(axis=1)
        gains = likeness[np.arange(len(rest)), index] / np.sqrt(norms[index])
        gains = np.clip(np.rint(gains * (1 << _GAIN)), -_GAIN_MOST, _GAIN_MOST)
        better = rest - above[index] * (gains / (1 << _GAIN)).astype(np.float32)[:, None]
        before, after = ((x * x).mean(axis=1) + 2e-3 for x in (rest, better))
        pays = columns / 2 * np.log2(before / after) > price
        rest = np.where(pays[:, None], better, rest)
        chosen.append(((gains * pays).astype(np.int64), index + first))
    offsets = np.rint(_ROW_STEPS / 2 * np.log2((rest * rest).mean(axis=1) + 1e-4)).astype(np.int64)
    return chosen, np.clip(offsets, -_ROW_OFFSETS, _ROW_OFFSETS)


def _prediction_pays(codes: np.ndarray) -> bool:
    """An encoder's guess: does a predictor from the half of the rows that is coded first, the lower one, shrink the other's innovations?"""
    rows, columns = codes.shape
    first, second = codes[rows // 2 :].astype(np.float64), codes[: rows // 2].astype(np.float64)
    lower, *_ = _innovations(first.T @ first, len(first))
    lower = lower / (1 << _COEFFICIENT) + np.eye(columns)
    innovation = np.linalg.solve(lower, second.T)
    gain = np.log2(np.maximum(second.var(axis=0), 0.05)) - np.log2(np.maximum(innovation.var(axis=1), 0.05))
    return float(gain.mean()) / 2 > 0.005  # bits a symbol


def range_encode(matrices: list[np.ndarray], bits: int) -> bytes:
    """Range-code int8 matrices [rows, columns] whose symbols lie in [−2^(bits−1), 2^(bits−1) − 1].

    Returns `[one mode byte a matrix, padded to 4][little-endian 32-bit words]`. Order matters for size only: statistics carry
    over from one matrix to the next, so that alike ones should be neighbours.
    """
    import constriction

    coder = _RangeCoder(bits, encoder=constriction.stream.queue.RangeEncoder())
    flags = []
    with Progress("packing", sum(codes.size for codes in matrices), "weights") as advance:
        for codes in matrices:
            if codes.size == 0:
                flags.append(0)
                continue
            offsets = _row_offsets(codes)
            best = None
            modes = [PLAIN] + [OFFSET_ROWS] * bool(offsets.any())
            modes += [PREDICTED] * (coder.may_predict(*codes.shape) and _prediction_pays(codes))
            for mode in modes:
                trial = _RangeCoder(bits, encoder=coder.encoder.clone())
                trial.model, trial.work = copy.deepcopy(coder.model), coder.work
                trial.code(codes, mode, offsets)
                size = trial.encoder.num_bits()
                if best is None or size < best[0]:
                    best = (size, mode, trial)
            flags.append(best[1])
            coder = best[2]
            advance(codes.size)
    head = bytes(flags)
    return head + b"\0" * (-len(head) % 4) + coder.encoder.get_compressed().astype("<u4").tobytes()


def range_decode(data: bytes, shapes: list[tuple[int, int]], bits: int) -> list[np.ndarray]:
    """Inverse of `range_encode`: int8 matrices of the given shapes. Raises ValueError where `data` cannot be such a stream."""
    import constriction

    head = len(shapes) + -len(shapes) % 4
    if len(data) < head or len(data) % 4 or any(data[len(shapes) : head]) or max(data[: len(shapes)], default=0) > PREDICTED:
        raise ValueError("range: malformed stream")
    words = np.frombuffer(data, "<u4", offset=head).astype(np.uint32)
    coder = _RangeCoder(bits, decoder=constriction.stream.queue.RangeDecoder(words))
    out = []
    try:
        for shape, flag in zip(shapes, data):
            codes = np.zeros(shape, dtype=np.int8)
            if codes.size:
                if flag == PREDICTED and not coder.may_predict(*shape):
                    raise ValueError("no shape for prediction")
                coder.code(codes, flag)
            out.append(codes)
    except (AssertionError, ValueError) as error:  # constriction's report of words that no encoder writes
        raise ValueError(f"range: {error}") from None
    if not coder.decoder.maybe_exhausted():
        raise ValueError("range: words left over behind the last symbol")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Records and their streams
# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Record:
    """One stored array.

    kind "codes": `data` int8 [rows, columns] with symbols in [−2^(bits−1), 2^(bits−1) − 1], `scales` float16 [rows]
    kind "half":  `data` float16 of any shape
    kind "bytes": `data` uint8 [n]
    """

    name: str
    kind: str
    data: np.ndarray
    bits: int = 0
    scales: np.ndarray | None = None

    def check(self) -> None:
        """Refuse what could not be restored exactly. Raises UserError."""
        if self.kind == "codes":
            low, high = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
            if self.data.dtype != np.int8 or self.data.ndim != 2 or not 2 <= self.bits <= 8:
                raise UserError(f"{self.name}: codes must be a two-dimensional int8 array of 2 to 8 bits")
            if self.data.size and (self.data.min() < low or self.data.max() > high):
                raise UserError(f"{self.name}: a symbol outside {low}…{high} does not fit {self.bits} bits")
            if self.scales is None or self.scales.dtype != np.float16 or self.scales.shape != (len(self.data),):
                raise UserError(f"{self.name}: one float16 scale a row is needed")
            if not np.isfinite(self.scales).all():
                raise UserError(f"{self.name}: a row scale is not finite in float16")
        elif self.kind == "half":
            if self.data.dtype != np.float16 or not np.isfinite(self.data).all():
                raise UserError(f"{self.name}: values must be finite in float16")
        elif self.kind != "bytes" or self.data.dtype != np.uint8 or self.data.ndim != 1:
            raise UserError(f"{self.name}: unknown kind of record {self.kind!r}")


# Bounds that no artifact of this suite comes near. They exist so that a forged header cannot ask for the machine's memory.
MAX_ELEMENTS = 1 << 28
MAX_RECORDS = 1 << 14
MAX_DIMS = 8


# Streams up to this size are also tried under brotli when "range" is asked for: the embeddings of a vocabulary that was hardly trained
# repeat each other, which only a dictionary coder sees. Beyond, brotli's minute a core is not worth it: nothing repeats.
SECOND_OPINION_BYTES = 8 << 20


def _compress_arrays(stream: str, arrays: list[np.ndarray], codec: str) -> bytes:
    data = b"".join(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
    return compress(shuffle_bytes(data, 2) if stream in ("scales", "half") else data, codec)


_SCALE_COLUMNS = 8  # scales are coded as rows of this many: there are too few for columns to be told apart


def encode_scales(arrays: list[np.ndarray]) -> bytes | None:
    """Row scales (float16 [rows] each) under the range coder: `[u8 shift][u16 median word a tensor][range_encode of the differences]`.

    The words of positive float16 are a piecewise linear logarithm, on which a tensor's scales lie close to their median. None where
    they do not: a difference beyond int8.
    """
    words = [array.view(np.uint16).astype(np.int64) for array in arrays]
    used = int(np.bitwise_or.reduce(np.concatenate(words), initial=0)) | 1 << 15
    shift = (used & -used).bit_length() - 1  # mantissa bits that no scale uses
    medians = [int(np.sort(word)[len(word) // 2]) >> shift if len(word) else 0 for word in words]
    differences = [(word >> shift) - median for word, median in zip(words, medians)]
    if any(len(d) and (d.min() < -128 or d.max() > 127) for d in differences):
        return None
    padded = [np.pad(d, (0, -len(d) % _SCALE_COLUMNS)).astype(np.int8).reshape(-1, _SCALE_COLUMNS) for d in differences]
    return bytes([shift]) + np.array(medians, dtype="<u2").tobytes() + range_encode(padded, 8)


def decode_scales(data: bytes, rows: list[int]) -> bytes:
    """Inverse of `encode_scales`: little-endian float16 of tensors with that many rows. Raises ValueError for any other stream."""
    head = 1 + 2 * len(rows)
    if len(data) < head or data[0] > 15:
        raise ValueError("scales: malformed stream")
    medians = np.frombuffer(data, "<u2", len(rows), offset=1).astype(np.int64)
    padded = range_decode(data[head:], [(-(-n // _SCALE_COLUMNS), _SCALE_COLUMNS) for n in rows], 8)
    words = [(codes.reshape(-1)[:n] + median) << data[0] for codes, median, n in zip(padded, medians, rows)]
    words = np.concatenate(words) if words else np.zeros(0, dtype=np.int64)
    if len(words) and (words.min() < 0 or words.max() > 0xFFFF):
        raise ValueError("scales: a word beyond 16 bits")
    return words.astype("<u2").tobytes()


def encode_records(records: list[Record], compressor: str) -> tuple[list[dict], list[bytes]]:
    """Streams of a list of records: -> (stream table for the header, payloads in the same order).

    All symbols of one width form a stream, all scales, all float16 values and all bytes one each: a compressor then sees one
    kind of statistics at a time. float16 streams are byte-shuffled (high bytes compress, low bytes are noise).
    "range" codes the symbols and scales (unless brotli beats it on a small stream); the streams around them go to brotli.
    """
    raw: dict[str, list] = {}
    for record in records:
        record.check()
        if record.kind == "codes":
            raw.setdefault(f"codes{record.bits}", []).append(record.data)
            raw.setdefault("scales", []).append(record.scales)
        else:
            raw.setdefault(record.kind, []).append(record.data)
    table, payloads = [], []
    for name, arrays in sorted(raw.items()):
        size = sum(array.nbytes for array in arrays)
        codec, payload = compressor, None
        if compressor == "range" and name.startswith("codes"):
            payload = range_encode(arrays, int(name[5:]))
        elif compressor == "range" and name == "scales":
            payload = encode_scales(arrays)
        if payload is None:
            codec = "brotli" if compressor == "range" else compressor
            payload = _compress_arrays(name, arrays, codec)
        if codec == "range" and size <= SECOND_OPINION_BYTES:
            other = _compress_arrays(name, arrays, "brotli")
            codec, payload = ("brotli", other) if len(other) < len(payload) else (codec, payload)
        table.append({"name": name, "codec": codec, "raw": size, "packed": len(payload)})
        payloads.append(payload)
    return table, payloads


def _plan(records: list[Record]) -> list[list]:
    return [[record.name, record.kind, record.bits, list(record.data.shape)] for record in records]


def check_plan(plan, max_elements: int = MAX_ELEMENTS) -> dict[str, int]:
    """Validate the header's list of records; -> bytes that each stream must have. Raises ValueError."""
    if not isinstance(plan, list) or len(plan) > MAX_RECORDS:
        raise ValueError("the tensor plan is not a list of sane length")
    sizes: dict[str, int] = {}
    elements, names = 0, set()
    for entry in plan:
        if not isinstance(entry, list) or len(entry) != 4:
            raise ValueError("malformed entry in the tensor plan")
        name, kind, bits, shape = entry
        if not isinstance(name, str) or name in names or not isinstance(shape, list) or len(shape) > MAX_DIMS:
            raise ValueError("malformed or repeated entry in the tensor plan")
        names.add(name)
        if not all(type(dim) is int and 0 <= dim <= MAX_ELEMENTS for dim in shape):
            raise ValueError(f"{name}: impossible shape")
        count = math.prod(shape)
        elements += max(count, sum(shape))
        if elements > max_elements:
            raise ValueError(f"the plan claims more than {max_elements} elements")
        if kind == "codes":
            if type(bits) is not int or not 2 <= bits <= 8 or len(shape) != 2:
                raise ValueError(f"{name}: impossible width or shape")
            sizes[f"codes{bits}"] = sizes.get(f"codes{bits}", 0) + count
            sizes["scales"] = sizes.get("scales", 0) + 2 * shape[0]
        elif kind == "half":
            sizes["half"] = sizes.get("half", 0) + 2 * count
        elif kind == "bytes" and len(shape) == 1:
            sizes["bytes"] = sizes.get("bytes", 0) + count
        else:
            raise ValueError(f"{name}: unknown kind of record")
    return sizes


def decode_records(plan: list, table: list, payload: memoryview) -> list[Record]:
    """Inverse of `encode_records`. Raises ValueError where plan, stream table and payload contradict each other."""
    sizes = check_plan(plan)
    if not isinstance(table, list) or not all(isinstance(entry, dict) for entry in table):
        raise ValueError("malformed stream table")
    if [entry.get("name") for entry in table] != sorted(sizes):
        raise ValueError("the streams are not those of the tensor plan")
    at, streams = 0, {}
    for entry in table:
        name, codec, packed = entry["name"], entry.get("codec"), entry.get("packed")
        if type(packed) is not int or not 0 <= packed <= len(payload) - at or entry.get("raw") != sizes[name]:
            raise ValueError(f"stream {name}: impossible size")
        data = bytes(payload[at : at + packed])
        at += packed
        if codec == "range" and name.startswith("codes"):
            bits = int(name[5:])
            streams[name] = iter(range_decode(data, [tuple(e[3]) for e in plan if e[1] == "codes" and e[2] == bits], bits))
        elif codec == "range" and name == "scales":
            streams[name] = memoryview(decode_scales(data, [e[3][0] for e in plan if e[1] == "codes"]))
        else:
            raw = decompress(data, codec, sizes[name])
            streams[name] = memoryview(unshuffle_bytes(raw, 2) if name in ("scales", "half") else raw)
    if at != len(payload):
        raise ValueError("bytes left over behind the last stream")

    def take(stream: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        array = np.frombuffer(streams[stream][:size], dtype).reshape(shape)
        streams[stream] = streams[stream][size:]
        return array.astype(np.dtype(dtype).newbyteorder("="))

    records = []
    for name, kind, bits, shape in plan:
        shape = tuple(shape)
        if kind == "codes":
            stream = streams[f"codes{bits}"]
            codes = take(f"codes{bits}", "i1", shape) if isinstance(stream, memoryview) else next(stream)
            record = Record(name, kind, codes, bits, take("scales", "<f2", shape[:1]))
        elif kind == "half":
            record = Record(name, kind, take("half", "<f2", shape))
        else:
            record = Record(name, kind, take("bytes", "u1", shape))
        record.check()  # a symbol or scale out of range is a fault, whatever the checksum says
        records.append(record)
    return records


# ----------------------------------------------------------------------------------------------------------------------
# Container
# ----------------------------------------------------------------------------------------------------------------------
#   offset size
#        0    8  magic; its odd bytes betray a transfer in text mode, as PNG's do
#        8    2  format version
#       10    2  zero
#       12    4  bytes of the compressed header
#       16    4  bytes of the header's JSON
#       20    8  bytes of the whole file
#       28   32  SHA-256 of the file with these 32 bytes left out
#       60    …  header (zlib), then the streams back to back in the header's order
MAGIC = b"\x89PGLF\r\n\x1a"
VERSION = 2
_HEAD = struct.Struct("<8sHHIIQ32s")
_MAX_HEADER = 4 << 20


def _digest(head: bytes, rest: memoryview | bytes) -> bytes:
    digest = hashlib.sha256(head[:28])
    digest.update(rest)
    return digest.digest()


def pack_artifact(header: dict, records: list[Record], compressor: str) -> bytes:
    """The bytes of an artifact. `header`: JSON-able facts about the model; keys "tensors" and "streams" are added here."""
    table, payloads = encode_records(records, compressor)
    return seal({**header, "tensors": _plan(records), "streams": table}, b"".join(payloads))


def seal(header: dict, payload: bytes) -> bytes:
    """Container around a complete header and its streams."""
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        raise UserError(f"the artifact's header cannot be written: {error}") from None
    packed = zlib.compress(text, 9)
    if len(text) > _MAX_HEADER:
        raise UserError(f"the artifact's header would take {len(text)} bytes; at most {_MAX_HEADER} are allowed")
    rest = packed + payload
    fields = (MAGIC, VERSION, 0, len(packed), len(text), _HEAD.size + len(rest))
    digest = _digest(_HEAD.pack(*fields, b""), rest)
    return _HEAD.pack(*fields, digest) + rest


def _not_json(constant: str):
    raise ValueError(f"{constant} is not JSON")


def read_header(data: bytes, label: str = "artifact") -> tuple[dict, memoryview]:
    """Check the container; -> (header, streams). Raises UserError naming `label` and the fault."""
    if len(data) < _HEAD.size or data[:8] != MAGIC:
        if MAGIC.startswith(data[:8]) and len(data) < _HEAD.size:
            raise UserError(f"{label}: truncated: {len(data)} bytes are less than an artifact's fixed head")
        raise UserError(f"{label}: not an artifact (wrong magic)")
    _, version, zero, packed, size, total, digest = _HEAD.unpack_from(data)
    if version != VERSION:
        age = "a newer" if version > VERSION else "an unknown"
        raise UserError(f"{label}: {age} format version ({version}); this code reads version {VERSION}")
    if total != len(data):
        verb = "truncated" if len(data) < total else "over-long"
        raise UserError(f"{label}: {verb}: holds {len(data)} bytes where its head says {total}")
    rest = memoryview(data)[_HEAD.size :]
    if _digest(data[: _HEAD.size], rest) != digest:
        raise UserError(f"{label}: corrupted: its checksum does not match")
    try:
        if zero or packed > len(rest) or not 0 < size <= _MAX_HEADER:
            raise ValueError("impossible header size")
        text = _decompress_chunk(bytes(rest[:packed]), "zlib", size)
        header = json.loads(text, parse_constant=_not_json)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{label}: unreadable header: {error}") from None
    return header, rest[packed:]


def unpack_artifact(data: bytes, label: str = "artifact") -> tuple[dict, list[Record]]:
    """Inverse of `pack_artifact`: -> (header, records). Raises UserError for every fault."""
    header, payload = read_header(data, label)
    try:
        return header, decode_records(header.get("tensors"), header.get("streams"), payload)
    except (ValueError, UserError) as error:
        raise UserError(f"{label}: damaged: {error}") from None


def write_artifact(path: str | Path, header: dict, records: list[Record], compressor: str) -> int:
    """Write an artifact atomically; -> its size, measured from the file on disk."""
    data = pack_artifact(header, records, compressor)
    with atomic_write(Path(path)) as temporary:
        Path(temporary).write_bytes(data)
    return Path(path).stat().st_size


def read_artifact(path: str | Path) -> tuple[dict, list[Record], int]:
    """-> (header, records, bytes on disk). Raises UserError."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    header, records = unpack_artifact(data, str(path))
    return header, records, len(data)

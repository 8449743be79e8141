"""Byte coding and the container: exact round trips, and nothing but a clean error from damaged files."""

from __future__ import annotations

import hashlib
import random
import struct
import tracemalloc
import zlib

import constriction
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parts import packing
from parts.files import UserError
from parts.packing import Record

GENERAL = [name for name in packing.COMPRESSORS if name != "range"]
SHAPES = [(1, 1), (1, 17), (33, 1), (7, 129), (128, 64), (3, 9000)]


def symbols(rng: np.random.Generator, shape: tuple[int, int], bits: int, sigma: float = 2.4) -> np.ndarray:
    """Symbols as a trained matrix has them: bell-shaped, columns of unequal size."""
    spread = sigma * np.exp(0.3 * rng.standard_normal(shape[1]))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return np.clip(np.rint(spread * rng.standard_normal(shape)), low, high).astype(np.int8)


def codes_record(name: str, codes: np.ndarray, bits: int, rng: np.random.Generator) -> Record:
    return Record(name, "codes", codes, bits, (0.01 + rng.random(len(codes))).astype(np.float16))


def sample_records(rng: np.random.Generator) -> list[Record]:
    records = [
        codes_record(f"m{bits}.{i}", symbols(rng, shape, bits), bits, rng) for bits in (2, 5, 6, 8) for i, shape in enumerate(SHAPES[:5])
    ]
    records.append(Record("gains", "half", rng.standard_normal((3, 5, 2)).astype(np.float16)))
    records.append(Record("nothing", "half", np.zeros((0,), np.float16)))
    records.append(Record("scalar", "half", np.array(1.5, np.float16)))
    records.append(Record("mask", "bytes", rng.integers(0, 256, 40).astype(np.uint8)))
    return records


def assert_same(left: list[Record], right: list[Record]) -> None:
    assert [record.name for record in left] == [record.name for record in right]
    for a, b in zip(left, right):
        assert (a.kind, a.bits, a.data.dtype, a.data.shape) == (b.kind, b.bits, b.data.dtype, b.data.shape), a.name
        assert a.data.tobytes() == b.data.tobytes(), a.name
        assert (a.scales is None) == (b.scales is None)
        assert a.scales is None or a.scales.tobytes() == b.scales.tobytes(), a.name


# -- compressors and range coder ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("codec", GENERAL)
@pytest.mark.parametrize("size", [0, 1, 1000, 70_001])
def test_compressors_round_trip(codec, size, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1 << 15)  # several chunks, and one that is not full
    data = symbols(np.random.default_rng(size), (1, max(size, 1)), 6).tobytes()[:size]
    packed = packing.compress(data, codec)
    assert packing.decompress(packed, codec, size) == data
    for wrong in (size - 1, size + 1, size + (1 << 16)):
        if wrong >= 0:
            with pytest.raises(ValueError):
                packing.decompress(packed, codec, wrong)


@pytest.mark.parametrize("codec", GENERAL)
def test_decompression_is_bounded(codec):
    """A chunk that would expand beyond its size is refused without expanding it."""
    chunk = packing._compress_chunk(bytes(16 << 20), codec)
    bomb = struct.pack("<I", len(chunk)) + chunk
    tracemalloc.start()
    with pytest.raises(ValueError):
        packing.decompress(bomb, codec, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20  # LZMA's dictionary is half of that


@pytest.mark.parametrize("bits", range(2, 9))
def test_range_round_trip_every_width(bits):
    rng = np.random.default_rng(bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    matrices = [symbols(rng, shape, bits) for shape in SHAPES]
    matrices += [np.full((5, 40), value, np.int8) for value in (low, 0, high)]  # constant rows
    matrices.append(rng.integers(low, high + 1, (64, 33)).astype(np.int8))  # every symbol, no structure
    matrices.append(symbols(rng, (96, 64), bits) * (rng.random((96, 1)) < 0.5))  # rows unlike each other
    matrices.append(np.zeros((0, 8), np.int8))
    data = packing.range_encode(matrices, bits)
    for before, after in zip(matrices, packing.range_decode(data, [m.shape for m in matrices], bits), strict=True):
        assert after.dtype == np.int8 and np.array_equal(before, after)


def embedding_like(rng: np.random.Generator, rows: int, columns: int, bits: int) -> np.ndarray:
    """Columns that tell about each other, as an embedding's do."""
    weights = rng.standard_normal((rows, 4)) @ rng.standard_normal((4, columns)) + 1.2 * rng.standard_normal((rows, columns))
    top = (1 << (bits - 1)) - 1
    return np.clip(np.rint(weights / weights.std() * (top / 6)), -top - 1, top).astype(np.int8)


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_prediction_across_columns(bits):
    """Chosen where it pays, exact, and worth it."""
    rng = np.random.default_rng(bits)
    table = embedding_like(rng, 700, 48, bits)
    data = packing.range_encode([table], bits)
    assert np.array_equal(packing.range_decode(data, [table.shape], bits)[0], table)
    if bits > 2:
        plain = rng.permuted(table, axis=0)  # the same columns, each on its own
        assert data[0] == packing.PREDICTED and len(data) < 0.93 * len(packing.range_encode([plain], bits))
    with pytest.raises(ValueError):
        packing.range_decode(bytes([packing.PREDICTED]) + data[1:], [(48, 700)], bits)


def test_rows_that_resemble_each_other():
    """Near copies of other rows, scaled and negated ones too, cost little; below 2 bits of the 4.6 that fresh rows cost."""
    rng = np.random.default_rng(3)
    fresh = 6 * rng.standard_normal((500, 64))
    copies = rng.choice([1.0, -0.7], 1000)[:, None] * fresh[rng.integers(0, 500, 1000)] + 0.3 * rng.standard_normal((1000, 64))
    table = np.rint(np.concatenate((copies, fresh))).astype(np.int8)
    data = packing.range_encode([table], 8)
    assert data[0] == packing.PREDICTED and np.array_equal(packing.range_decode(data, [table.shape], 8)[0], table)
    assert 8 * len(data) < 4.8 * fresh.size + 2.0 * copies.size


def test_the_guess_looks_the_way_the_coder_goes():
    """From the last row up: what noisy lower rows teach serves the clean upper ones, not the other way round."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((4, 32))
    clean = 6 * rng.standard_normal((300, 4)) @ mix + 0.5 * rng.standard_normal((300, 32))
    noisy = 2 * rng.standard_normal((300, 4)) @ mix + 10 * rng.standard_normal((300, 32))
    table = np.clip(np.rint(np.concatenate((clean, noisy))), -128, 127).astype(np.int8)
    assert packing._prediction_pays(table) and not packing._prediction_pays(table[::-1])
    assert packing.range_encode([table], 8)[0] == packing.PREDICTED


@pytest.mark.parametrize("shape", [(6144, 2048), (1 << 18, 1024), (95, 48), (30, 7), (1 << 19, 8)])
def test_prediction_costs_the_reader_what_the_rule_allows(shape):
    """A forged mode byte over a few words is refused before anything is factorized; the encoder keeps to the same rule."""
    coder = packing._RangeCoder(6)
    assert not coder.may_predict(*shape) and coder.may_predict(8192, 512)
    with pytest.raises(ValueError, match="no shape for prediction"):
        packing.range_decode(bytes([packing.PREDICTED, 0, 0, 0]) + bytes(64), [shape], 6)


def test_prediction_is_bounded_over_a_stream(monkeypatch):
    rng = np.random.default_rng(0)
    tables = [embedding_like(rng, 300, 24, 6) for _ in range(3)]
    monkeypatch.setattr(packing, "PREDICTED_WORK", 2 * packing._prediction_work(300, 24))
    data, shapes = packing.range_encode(tables, 6), [table.shape for table in tables]
    assert list(data[:3]) == [packing.PREDICTED, packing.PREDICTED, packing.PLAIN]
    assert all(np.array_equal(a, b) for a, b in zip(tables, packing.range_decode(data, shapes, 6), strict=True))
    with pytest.raises(ValueError, match="no shape for prediction"):
        packing.range_decode(data[:2] + bytes([packing.PREDICTED]) + data[3:], shapes, 6)


def test_level_thresholds_are_exact():
    """16th roots in whole numbers: t^16 <= 2^(i + 16·7) < (t + 1)^16."""
    for i, threshold in enumerate(packing._LEVEL_THRESHOLDS.tolist(), start=1):
        assert threshold**16 <= 1 << (i + 16 * (packing._FIXED - 5)) < (threshold + 1) ** 16


def test_innovations_are_an_ldl_factorization():
    rng = np.random.default_rng(0)
    x = embedding_like(rng, 5000, 12, 6).astype(np.float64)
    lower, levels, variance = packing._innovations(x.T @ x, len(x))
    assert np.array_equal(lower, np.round(lower))  # whole numbers: nothing a machine could round otherwise
    innovation = np.linalg.solve(lower / 4096 + np.eye(12), x.T)
    off_diagonal = np.corrcoef(innovation) - np.eye(12)
    assert np.abs(off_diagonal).max() < 0.1 < np.abs(np.corrcoef(x.T) - np.eye(12)).max()
    assert levels.min() > 0 and np.allclose(variance, innovation.var(axis=1), rtol=0.1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bits=st.integers(2, 8),
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 70)), min_size=1, max_size=4),
    sigma=st.floats(0.0, 60.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_range_round_trip_property(bits, shapes, sigma, seed):
    rng = np.random.default_rng(seed)
    matrices = [symbols(rng, shape, bits, sigma) for shape in shapes]
    decoded = packing.range_decode(packing.range_encode(matrices, bits), shapes, bits)
    assert all(np.array_equal(a, b) for a, b in zip(matrices, decoded, strict=True))


PINNED = "8e2e0c43eec9eed9328336f86696f72fd638b8c84f2417af616c6d071dfd0897"


def test_range_stream_is_pinned(monkeypatch):
    """The bytes themselves: an artifact written by one version or machine must be read by another.

    In every mode, with the encoder's choice of neighbours made in whole numbers here: its own comes out of float32 matrix products, which
    differ between processors in what they choose, never in what a choice decodes to.
    """

    def choose(codes, start, lower, variance):
        rows = np.arange(len(codes) - start)
        chosen = [(rows * (7 + number) % 11 - 5, rows * 5 % start) for number in range(packing._NEIGHBOURS)]
        return chosen, rows % 5 - 2

    monkeypatch.setattr(packing, "_choose_neighbours", choose)
    grid = (np.arange(24 * 20).reshape(24, 20) * 7919 % 61 % 13 - 6).astype(np.int8)
    loud = (grid.astype(np.int64) * np.array([1, 5])[np.arange(24) % 2, None]).repeat(8, axis=1).astype(np.int8)
    tall = (np.outer(np.arange(90), np.arange(1, 9)) * 31 % 17 % 7 + np.arange(90)[:, None] % 5 - 4).astype(np.int8)
    coder = packing._RangeCoder(6, encoder=constriction.stream.queue.RangeEncoder())
    for matrix, mode in ((grid, packing.PLAIN), (loud, packing.OFFSET_ROWS), (tall, packing.PREDICTED)):
        coder.code(matrix, mode, np.arange(24) % 2 * 8 - 4)
    data = coder.encoder.get_compressed().astype("<u4").tobytes()
    assert hashlib.sha256(data).hexdigest() == PINNED
    modes = bytes([packing.PLAIN, packing.OFFSET_ROWS, packing.PREDICTED, 0])
    for matrix, back in zip((grid, loud, tall), packing.range_decode(modes + data, [(24, 20), (24, 160), (90, 8)], 6), strict=True):
        assert np.array_equal(matrix, back)


def test_range_coder_beats_brotli():
    """At least 2 % smaller where columns differ by ±30 %, as they do in trained matrices."""
    rng = np.random.default_rng(0)
    matrices = [symbols(rng, (512, 512), 6) for _ in range(3)]
    ours = len(packing.range_encode(matrices, 6))
    brotli = len(packing.compress(b"".join(m.tobytes() for m in matrices), "brotli"))
    assert ours < 0.98 * brotli


@pytest.mark.parametrize("mantissa_bits", [4, 7])
def test_scales(mantissa_bits):
    """Row scales near their tensor's own: exact, and smaller than under brotli; scales unlike each other are left to it."""
    rng = np.random.default_rng(mantissa_bits)
    arrays = []
    for rows in (512, 0, 1, 2049):
        words = (0.02 * np.exp(0.08 * rng.standard_normal(rows))).astype(np.float16).view(np.uint16)
        arrays.append((words >> (10 - mantissa_bits) << (10 - mantissa_bits)).view(np.float16))
    data, raw = packing.encode_scales(arrays), b"".join(array.tobytes() for array in arrays)
    assert packing.decode_scales(data, [len(array) for array in arrays]) == raw
    assert len(data) < len(packing.compress(packing.shuffle_bytes(raw, 2), "brotli"))
    assert packing.encode_scales([np.array([1e-6, 1.0, 6e4], np.float16)]) is None
    for forged in (b"", b"\x10" + data[1:], data[:1] + b"\xff\xff" * 4 + data[9:]):
        with pytest.raises(ValueError):
            packing.decode_scales(forged, [len(array) for array in arrays])


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_byte_shuffle(stride):
    data = np.random.default_rng(0).integers(0, 256, 24 * stride, dtype=np.uint8).tobytes()
    assert packing.unshuffle_bytes(packing.shuffle_bytes(data, stride), stride) == data
    assert packing.shuffle_bytes(b"aAbBcC", 2) == b"abcABC"


# -- container ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressor", packing.COMPRESSORS)
def test_artifact_round_trip(compressor, tmp_path):
    records = sample_records(np.random.default_rng(1))
    header = {"config": {"matrix_bits": 6}, "looping": True, "tokenizer_sha256": "ab" * 32}
    path = tmp_path / "artifact.bin"
    size = packing.write_artifact(path, header, records, compressor)
    assert size == path.stat().st_size and sorted(p.name for p in tmp_path.iterdir()) == ["artifact.bin"]
    loaded, back, measured = packing.read_artifact(path)
    assert measured == size and loaded["config"] == header["config"] and loaded["looping"] is True
    assert_same(records, back)


def test_packing_is_deterministic():
    records = sample_records(np.random.default_rng(2))
    for compressor in packing.COMPRESSORS:
        assert packing.pack_artifact({}, records, compressor) == packing.pack_artifact({}, records, compressor)


@pytest.mark.parametrize(
    "record",
    [
        Record("w", "codes", np.full((2, 2), 40, np.int8), 6, np.ones(2, np.float16)),
        Record("w", "codes", np.zeros((2, 2), np.int8), 6, np.array([1, np.inf], np.float16)),
        Record("w", "codes", np.zeros((2, 2), np.int8), 6, np.array([1, np.nan], np.float16)),
        Record("w", "codes", np.zeros((2, 2), np.int8), 6, np.ones(3, np.float16)),
        Record("w", "codes", np.zeros((2, 2), np.int8), 9, np.ones(2, np.float16)),
        Record("w", "half", np.array([np.nan], np.float16)),
        Record("w", "half", np.ones(2, np.float32)),
        Record("w", "pickle", np.ones(2, np.uint8)),
    ],
)
def test_what_cannot_be_restored_is_refused(record):
    with pytest.raises(UserError):
        packing.pack_artifact({}, [record], "zlib")


def test_missing_artifact(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.bin"):
        packing.read_artifact(tmp_path / "nowhere.bin")
    with pytest.raises(UserError):
        packing.read_artifact(tmp_path)  # a folder


def test_messages_name_the_fault():
    data = packing.pack_artifact({}, sample_records(np.random.default_rng(3)), "zlib")
    newer = bytearray(data)
    struct.pack_into("<H", newer, 8, packing.VERSION + 1)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged, word in [
        (bytes(newer), "newer"), (data[:-1], "truncated"), (data[:20], "truncated"), (data + b"x", "over-long"),
        (bytes(flipped), "checksum"), (b"PK\3\4" + data, "magic"), (b"", "truncated"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=word) as caught:
            packing.unpack_artifact(damaged)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compressor", packing.COMPRESSORS)
def test_fuzz_every_damage_is_noticed(compressor):
    """Flips, cuts and additions: the checksum leaves no silent wrong load."""
    data = packing.pack_artifact({"config": {}}, sample_records(np.random.default_rng(4)), compressor)
    rng = random.Random(0)
    for _ in range(1200):
        damaged = bytearray(data)
        kind = rng.randrange(4)
        if kind == 0:
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[rng.randrange(len(data)) :]
        elif kind == 2:
            damaged += rng.randbytes(rng.randrange(1, 50))
        else:
            at = rng.randrange(len(data))
            damaged[at : at + rng.randrange(1, 30)] = rng.randbytes(rng.randrange(30))
        if bytes(damaged) == data:
            continue
        with pytest.raises(UserError):
            packing.unpack_artifact(bytes(damaged))


def reseal(data: bytes) -> bytes:
    """A forger's view: whatever the bytes are, make length and checksum right."""
    fields = list(packing._HEAD.unpack_from(data))
    rest = data[packing._HEAD.size :]
    fields[5] = len(data)
    fields[6] = packing._digest(packing._HEAD.pack(*fields[:6], b""), rest)
    return packing._HEAD.pack(*fields) + rest


@pytest.mark.parametrize("compressor", packing.COMPRESSORS)
def test_fuzz_forged_streams(compressor):
    """With a valid checksum over damaged streams: either a clean error or arrays of the promised shapes."""
    records = sample_records(np.random.default_rng(5))
    data = packing.pack_artifact({}, records, compressor)
    header_end = packing._HEAD.size + packing._HEAD.unpack_from(data)[3]
    rng = random.Random(1)
    for _ in range(250):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(header_end, len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(header_end, len(data)) :]
        try:
            _, loaded = packing.unpack_artifact(reseal(bytes(damaged)))
        except UserError:
            continue
        assert [record.data.shape for record in loaded] == [record.data.shape for record in records]


HOSTILE = [
    lambda h: h["tensors"][0].__setitem__(3, [1 << 27, 1 << 27]),
    lambda h: h["tensors"][0].__setitem__(3, [1 << 62, 1]),
    lambda h: h["tensors"][0].__setitem__(3, [-1, 4]),
    lambda h: h["tensors"][0].__setitem__(3, [0, 1 << 28]),
    lambda h: h["tensors"][0].__setitem__(3, [True, 1]),
    lambda h: h["tensors"][0].__setitem__(3, [1.5, 1]),
    lambda h: h["tensors"][0].__setitem__(3, "ab"),
    lambda h: h["tensors"][0].__setitem__(2, 64),
    lambda h: h["tensors"][0].__setitem__(2, "6"),
    lambda h: h["tensors"][0].__setitem__(1, "pickle"),
    lambda h: h["tensors"][0].__setitem__(0, h["tensors"][1][0]),
    lambda h: h["tensors"].append(["extra", "codes", 6, [1 << 20, 200]]),
    lambda h: h["tensors"].extend([f"x{i}", "half", 0, [1]] for i in range(1 << 15)),
    lambda h: h["tensors"].pop(),
    lambda h: h.__setitem__("tensors", {"a": 1}),
    lambda h: h.__setitem__("tensors", None),
    lambda h: h["streams"].pop(),
    lambda h: h["streams"].reverse(),
    lambda h: h["streams"][0].__setitem__("codec", "pickle"),
    lambda h: h["streams"][0].__setitem__("codec", ["zlib"]),
    lambda h: h["streams"][0].__setitem__("packed", 1 << 60),
    lambda h: h["streams"][0].__setitem__("packed", -1),
    lambda h: h["streams"][0].__setitem__("raw", 1 << 60),
    lambda h: h["streams"][0].pop("packed"),
    lambda h: h.__setitem__("streams", [1, 2]),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_headers(number):
    records = sample_records(np.random.default_rng(6))
    header, payload = packing.read_header(packing.pack_artifact({}, records, "range"))
    HOSTILE[number](header)
    with pytest.raises(UserError):
        packing.unpack_artifact(packing.seal(header, bytes(payload)))


def test_header_is_bounded():
    with pytest.raises(UserError, match="header"):
        packing.seal({"note": "x" * (5 << 20)}, b"")
    with pytest.raises(UserError, match="header"):
        packing.seal({"steps": float("nan")}, b"")
    text = b"[" * 100_000
    packed = zlib.compress(text)
    for body, size in [
        (packed, len(text)),
        (packed, 10),
        (packed, 1 << 31),
        (b"garbage", 7),
        (zlib.compress(b"NaN"), 3),
    ]:
        fields = (packing.MAGIC, packing.VERSION, 0, len(body), size, packing._HEAD.size + len(body))
        data = packing._HEAD.pack(*fields, packing._digest(packing._HEAD.pack(*fields, b""), body)) + body
        with pytest.raises(UserError, match="header"):
            packing.unpack_artifact(data)

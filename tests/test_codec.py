"""The codec: nothing is lost on the way to tokens and back, both directions find the same bits, and the file costs what the probabilities say."""

from __future__ import annotations

import json
import math
import os

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environment
from test_eval import byte_table, config, evaluator, randomized, stream

import codec
from codec import TOTAL, Channel, CodedText, DocumentLockstep, Lockstep, Spelling, Streams, frequencies, transmit
from data.prepare import train_tokenizer
from data.shards import BOS_ID, load_tokenizer, parse_tokenizer, tokenizer_hash
from parts import packing
from parts.files import UserError
from parts.packing import Record
from train_gpt import RunContext, resolve_config

ODD = {
    "empty": b"",
    "one byte": b"a",
    "a space": b" ",
    "CRLF": b"\r\n\r\ndef f():\r\n\treturn 1\r\n",
    "emoji": "🧪👩‍👩‍👧 done".encode(),
    "NUL": b"a\0b\0",
    "no UTF-8": b"\xff\xfe caf\xc3 \x80\x80 end\xf0\x9f",
    "tokenizer's space": "  ▁ ▁▁x ".encode(),
    "forms": "e\u0301 ﬁ Ⅷ \u2028 \ufeff 　x".encode(),
    "case": "The iPhone, McCoy ABC aB \ue011 \ue014x".encode() + b" A\xffB\xc3",
    "spaces": b"   a  b \n\n   c   ",
    "control words": b"<s> </s> <unk> <0x41>",
    "long": b"import heapq\nfor x in heapq.merge([1], [2]):\n    print(x)\n" * 3,
}


# ---- text ----


@pytest.fixture(scope="session")
def lossy_tokenizer(tmp_path_factory):
    """As most published ones: a dummy prefix, NFKC, runs of spaces folded."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("lossy")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "t"), vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return load_tokenizer(folder / "t.model")


@pytest.fixture(scope="session")
def case_tokenizer():
    text = ["The quick BROWN fox, iPhone and McCoy jump over the lazy dog\n"] * 50
    return parse_tokenizer(train_tokenizer(text, 320, 1.0, with_case_ops=True), "case")


@pytest.mark.parametrize("kind", ["ours", "lossy", "case"])
@pytest.mark.parametrize("name", ODD)
def test_every_document_survives_its_tokens(name, kind, dataset, lossy_tokenizer, case_tokenizer):
    tokenizer = {"ours": load_tokenizer(dataset.tokenizer), "lossy": lossy_tokenizer, "case": case_tokenizer}[kind]
    spelling, document = Spelling(tokenizer), ODD[name]
    tokens = spelling.encode(document)
    assert spelling.decode(tokens) == document and BOS_ID not in tokens
    if kind != "lossy" and name in ("CRLF", "NUL", "spaces", "long"):
        assert tokens == tokenizer.encode(document.decode()), "text that the tokenizer gives back is tokenized as in the shards"


def test_random_bytes_survive(dataset, lossy_tokenizer, case_tokenizer):
    rng = np.random.default_rng(0)
    for tokenizer in (load_tokenizer(dataset.tokenizer), lossy_tokenizer, case_tokenizer):
        spelling = Spelling(tokenizer)
        for _ in range(20):
            document = bytes(rng.choice(list(b" aA\n\r\t\0\xc3\xa9\xe2\x96\x81\xff\xf0"), rng.integers(1, 60)).tolist())
            assert spelling.decode(spelling.encode(document)) == document


def test_a_byte_without_a_piece_is_refused(dataset):
    spelling = Spelling(load_tokenizer(dataset.tokenizer))
    spelling.byte_token.pop(0xFF)
    with pytest.raises(UserError, match="no piece for byte 0xff"):
        spelling.encode(b"\xff")


def test_json_lines_come_back_as_they_were_written():
    lines = [
        b'{"text": "plain"}', b'{"text":"tight"}', b'{"id": 1, "text": "caf\\u00e9", "url": "x"}', '{"text": "café"}'.encode(),
        b'{"text": "other escapes \\/ \\u00E9"}', b"not json", b"", b'{"text": 3}', b'["text"]', b'{"text": "\\ud83d half"}',
        b'{"text": "\\udcff raw byte"}', b'{"text": ""}', b'{"text": "plain"}\r', b'"\xff"',
    ]  # fmt: skip
    for ending in (b"", b"\n", b"\n\n"):
        data = b"\n".join(lines) + ending
        documents, layout = codec.split_documents(data, jsonl=True)
        assert codec.join_documents(documents, json.loads(json.dumps(layout))) == data
        assert b"\xff raw byte" in documents and "café".encode() in documents and b"tight" in documents and len(documents) == 7
    assert codec.split_documents(b"x\n", jsonl=False) == ([b"x\n"], None)
    assert codec.join_documents(*codec.split_documents(b"", jsonl=True)) == b""


# ---- streams ----


@pytest.mark.parametrize("count", [1, 2, 7, 64, 199])
def test_streams_give_the_tokens_back(count):
    tokens = stream(200).numpy().astype(np.int64)
    streams = Streams.cut(tokens, count)
    assert len(streams.targets) == count and np.array_equal(streams.collect(streams.deal(tokens)), tokens)
    assert streams.begins[0] and streams.targets.max() <= 1.3 * 200 / count + 2
    channel = Channel()
    streams.write(channel)
    again = Streams.read(Channel(channel.coder.get_compressed()), *streams.summary())
    assert np.array_equal(again.targets, streams.targets) and np.array_equal(again.begins, streams.begins)
    assert len(Streams.cut(tokens[:0], 1).collect(np.zeros((1, 0)))) == 0


def test_streams_begin_with_a_document_where_one_is_near():
    tokens = np.full(1000, 9, np.int64)
    tokens[[0, 240, 505, 900]] = BOS_ID
    streams = Streams.cut(tokens, 4)  # edges at 250, 493 and 752: the last has no document within a seventh of a part
    assert (streams.targets + streams.begins).tolist() == [240, 265, 247, 248] and streams.begins.tolist() == [True, True, True, False]


# ---- frequencies and coder ----


def test_what_is_left_over_goes_to_the_likeliest():
    weights = torch.tensor([[1e-6, 1 / 3, 1.0, 1 / 3]], dtype=torch.float64)
    counts, floors = frequencies(weights)[0], (weights / weights.sum() * (TOTAL - 4)).floor().long()[0] + 1
    assert counts[[0, 1, 3]].tolist() == floors[[0, 1, 3]].tolist() and counts[2] > floors[2]


def test_frequencies_are_exact_and_every_symbol_has_one():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 37, generator=rng, dtype=torch.float64).mul(8).softmax(1)
    rows[0], rows[1] = 0.0, 0.0
    rows[1, 5] = 1.0
    rows[2] = 1 / 37
    rows[3] = 5e-324
    counts = frequencies(rows)
    assert (counts.sum(1) == codec.TOTAL).all() and (counts >= 1).all()
    assert counts[1, 5] == codec.TOTAL - 36 and counts[0].max() - counts[0].min() < 37
    assert ((counts / codec.TOTAL - rows)[4:].abs() < 1e-5).all()


@pytest.mark.parametrize("vocabulary", [8, 9, 10, 1025])
def test_the_coder_costs_what_the_probabilities_say(vocabulary):
    """Within 0.1 % of the cross-entropy, rare tokens among them, and both directions alike."""
    rng = torch.Generator().manual_seed(vocabulary)
    probs = torch.randn(60, 16, vocabulary, generator=rng, dtype=torch.float64).mul(4).softmax(2)
    tokens = torch.stack([torch.multinomial(p, 1, generator=rng)[:, 0] for p in probs]).numpy()
    tokens[:2] = probs[:2].argmin(2).numpy()
    writer = Channel()
    for step, p in zip(tokens, probs):
        writer.token(p, step)
    words = writer.coder.get_compressed()
    reader = Channel(words)
    for step, p in zip(tokens, probs):
        assert np.array_equal(reader.token(p, None), step)
    ideal = -probs.gather(2, torch.from_numpy(tokens)[..., None]).log2()[2:].sum().item()
    floor = -sum(math.log2(max(p[r, t].item(), 2**-40)) for p, step in zip(probs[:2], tokens) for r, t in enumerate(step))
    assert 32 * len(words) < 1.001 * (ideal + floor) + 64


# ---- lockstep ----

# Every kind of layer and every part that keeps something from one step to the next.
KINDS = {
    "attention, GQA, sink, XSA, gate": dict(layer_pattern="AA", attn_sink=True, xsa_layers="all", attn_gate_width=4),
    "windows and token shift": dict(layer_pattern="STS", window_size=6, xsa_layers="2"),
    "GDN": dict(layer_pattern="GG", gdn_conv_size=3),
    "recurrence, skips, parallel, values": dict(
        layer_pattern="GASA", window_size=5, loop_start=1, loop_end=2, num_loops=2, unet_skips=True, parallel_start=2, ve_layers="3",
        ve_dim=8, trigram_hash=True,
    ),
    "documents": dict(layer_pattern="GSTA", window_size=7, document_mask=True, attn_sink=True),
    "two lanes": dict(layer_pattern="AGT", parallel_start=1, parallel_lanes=2, smear_form="lambda"),
}  # fmt: skip


def lockstep(streams: Streams, **settings) -> Lockstep:
    cfg = config(**settings)
    model = randomized(cfg)
    model.looping = bool(cfg.model.num_loops)
    kind = DocumentLockstep if cfg.eval.ttt_mode == "document" else Lockstep
    return kind(model, cfg, byte_table(), RunContext(), streams)


def keep(rows: list):
    """A probe that keeps every step's probabilities."""
    return lambda t, probs: rows.append(probs.cpu())


def documents(count: int, seed: int = 0) -> np.ndarray:
    return stream(count, seed).numpy().astype(np.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_lockstep_is_the_parallel_forward(kind):
    """Each step's rows against the model over that step's whole window: steps, refills in parts, streams of unequal length."""
    tokens = documents(110)
    streams = Streams.cut(tokens, 4)
    tested = lockstep(streams, eval_seq_len=16, eval_stride=5, ttt_mode="off", eval_batch_seqs=3, **KINDS[kind])
    table = torch.from_numpy(streams.deal(tokens))
    inputs = torch.cat((torch.full((4, 1), BOS_ID), table), 1)
    for t in range(tested.steps):
        probs, live = tested.predict(t), tested.live(t)
        with torch.no_grad():
            expected = tested.model(inputs[:, tested.window_start(t) : t + 1])[live, -1].double().softmax(-1)
        assert (probs - expected).abs().max() < 1e-5 and (probs.sum(1) - 1).abs().max() < 1e-12
        assert t - tested.window_start(t) < 16
        tested.reveal(t, table[live, t])


@pytest.mark.parametrize("chunk", [16, 32])
def test_one_stream_scores_as_the_evaluation_does(chunk):
    """Windows, updates, counts and order of `eval_ttt.py`, which scores the same targets in parallel. An update in the middle of a window
    makes what is remembered of it another model's."""
    settings = dict(
        experts="tilt,ngram,calibration", eval_seq_len=24, eval_stride=8, ttt_chunk_tokens=chunk, ttt_lr=0.1, expert_block_tokens=16
    )
    tokens = stream(24 + 8 * 6 + 1)
    streams = Streams.cut(tokens.numpy().astype(np.int64), 1)
    tested = lockstep(streams, **settings)
    _, bits = transmit(tested, Channel(), streams.deal(tokens.numpy()), lambda t, probs: None, lambda count: None)
    trace = evaluator(config(**settings)).run(tokens)
    assert bits * math.log(2) / (len(tokens) - 1) == pytest.approx(trace.val_loss, abs=1e-6)


LEARNING = dict(ttt_mode="document", ttt_doc_chunks="8", ttt_doc_lr=0.03, ttt_doc_rank=4, ttt_doc_alpha=8.0, eval_seq_len=16, eval_stride=8)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_streams_score_as_the_evaluation_does(kind):
    """Documents that begin with a chunk score as in `eval_ttt.py`, which reads each by itself: windows, steps, a fresh start each, whatever
    another stream holds."""
    texts = [np.concatenate(([BOS_ID], 2 + documents(length, seed)[1:] % 29)) for seed, length in enumerate((24, 8, 40, 16, 32, 24))]
    tokens = np.concatenate([*texts, [BOS_ID]])
    settings = {**KINDS[kind], **LEARNING, "num_loops": 0, "experts": "", "ttt_doc_sites": "q,k,v,o,mlp,head"}
    expected, still = (
        evaluator(config(**{**settings, "ttt_doc_lr": rate})).run(torch.from_numpy(tokens.astype(np.int32))).ledger.nll.numpy()
        for rate in (LEARNING["ttt_doc_lr"], 0.0)
    )
    assert np.abs(expected - still).max() > 0.01
    for count in (1, 2):
        streams, rows = Streams.cut(tokens, count), []
        assert streams.targets.tolist() == ([144] if count == 1 else [71, 72])
        table = streams.deal(tokens)
        transmit(lockstep(streams, **settings), Channel(), table, keep(rows), lambda count: None)
        for number, (targets, first) in enumerate(zip(streams.targets, (0, 72))):
            found = [-math.log(rows[t][(streams.targets[:number] > t).sum(), table[number, t]]) for t in range(targets)]
            assert np.abs(found - expected[first : first + targets]).max() < 1e-4


FORMS = {
    "TTT by document": (4, dict(LEARNING, experts="tilt,calibration")),
    "model": (4, dict(ttt_mode="off")),
    "by document": (4, dict(ttt_mode="off", eval_by_document=True)),
    "TTT": (4, dict(ttt_chunk_tokens=32)),
    "Polyak, LoRA, AdamW": (4, dict(ttt_chunk_tokens=32, ttt_polyak=0.5, ttt_params="lora", ttt_optimizer="adamw", ttt_byte_weighted=True)),
    "experts": (4, dict(ttt_mode="off", experts="tilt,ngram,calibration", expert_block_tokens=20)),
    "everything": (4, dict(ttt_chunk_tokens=32, ttt_hash_buckets=32, experts="tilt,ngram,entropy,cache", expert_mixer="hedge")),
    "everything, one stream": (1, dict(ttt_chunk_tokens=32, experts="tilt,ngram")),
    "a token a stream": (99, dict(ttt_chunk_tokens=32, experts="tilt,ngram")),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read(form):
    count, settings = FORMS[form]
    tokens = documents(50 if count == 1 else 100, seed=4)
    streams = Streams.cut(tokens, count)
    settings, steps = {"eval_seq_len": 16, "eval_stride": 6, **settings}, []
    writer = Channel()
    known = streams.deal(tokens)
    _, bits = transmit(lockstep(streams, **settings), writer, known, keep(steps), lambda count: None)
    words = writer.coder.get_compressed()
    assert abs(32 * len(words) - bits) < 0.001 * bits + 64

    def same(t: int, probs: torch.Tensor) -> None:
        assert torch.equal(probs, steps[t]), f"step {t} differs"

    decoded, _ = transmit(lockstep(streams, **settings), Channel(words), None, same, lambda count: None)
    assert np.array_equal(streams.collect(decoded), tokens)


def test_experts_count_each_token_once_and_no_stream_that_has_ended():
    tokens = documents(100)
    streams = Streams.cut(tokens, 7)
    tested = lockstep(streams, ttt_mode="off", experts="ngram", expert_block_tokens=7)  # a block is a step
    transmit(tested, Channel(), streams.deal(tokens), lambda t, probs: None, lambda count: None)
    assert np.ptp(streams.targets) > 0 and tested.mixture.history.tokens == streams.targets.sum()


def test_documents_scored_from_their_own_first_token_do_not_see_each_other():
    tokens, rows = documents(60), []
    other = tokens.copy()
    second = int(np.flatnonzero(tokens == BOS_ID)[1])
    other[1:second] = 2 + (tokens[1:second] + 5) % 29
    for text in (tokens, other):
        streams = Streams.cut(text, 1)
        rows.append([])
        tested = lockstep(streams, ttt_mode="off", eval_by_document=True, eval_seq_len=64)
        transmit(tested, Channel(), streams.deal(text), keep(rows[-1]), lambda count: None)
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(*rows)]
    assert all(same[second:]) and not any(same[1 : second - 1])


@pytest.mark.parametrize(
    "settings,match", [(dict(ttt_reset_per_doc=True), "TTT_RESET_PER_DOC"), ({**LEARNING, "ttt_doc_chunks": "8@16,16"}, "one length")]
)
def test_what_streams_in_step_cannot_do_is_refused(settings, match):
    with pytest.raises(UserError, match=match):
        lockstep(Streams.cut(documents(40), 2), **settings)


# ---- files ----


@pytest.fixture(scope="module")
def artifact(dataset, tmp_path_factory):
    """An artifact of random weights with the real tokenizer."""
    settings = {**dataset.settings, "TTT_CHUNK_TOKENS": "96", "EVAL_SEQ_LEN": "48", "EXPERTS": "tilt,ngram", "CODEC_STREAMS": "3"}
    cfg = resolve_config({**settings, "DEVICE": "cpu"})
    records = [Record(name, "half", value.detach().numpy().astype(np.float16)) for name, value in randomized(cfg).named_parameters()]
    header = {"config": cfg.to_dict(), "looping": False, "tokenizer_sha256": tokenizer_hash(cfg.run.tokenizer_path)}
    path = tmp_path_factory.mktemp("artifact") / "artifact.bin"
    packing.write_artifact(path, header, records, "zlib")
    return path


@pytest.fixture
def clean(monkeypatch):
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)


ODD_LINES = b"".join(json.dumps({"text": text.decode("utf-8", "surrogateescape")}).encode() + b"\n" for text in [b"", b"", *ODD.values()])


@pytest.mark.parametrize("name,data,streams", [
    ("empty.txt", b"", 0), ("no documents.jsonl", b"", 3), ("blank.jsonl", b'{"text": ""}\n{"text": ""}', 1), ("one.bin", b"\x80", 40),
    ("odd.jsonl", ODD_LINES, 24), ("odd.txt", b"".join(ODD.values()), 16),
])  # fmt: skip
def test_files_come_back_byte_for_byte(name, data, streams, artifact, clean, monkeypatch, tmp_path):
    monkeypatch.setenv("CODEC_STREAMS", str(streams))
    source, coded, restored = tmp_path / name, tmp_path / "coded", tmp_path / "restored"
    source.write_bytes(data)
    figures = codec.compress(artifact, source, coded)
    assert figures["bytes"] == coded.stat().st_size and figures["coder_bits"] < 1.001 * figures["probability_bits"] + 200
    monkeypatch.setenv("TTT_LR", "0.5")  # the file's settings count, not the environment's
    codec.decompress(coded, restored, artifact)
    assert restored.read_bytes() == data


@pytest.fixture(scope="module")
def coded(artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded")
    (folder / "text.txt").write_bytes(b"def merge(a, b):\n    return sorted(a + b)\n" * 6)
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean_environment()):
            patch.delenv(name)
        patch.setenv("TTT_EPOCHS", "2")
        codec.compress(artifact, folder / "text.txt", folder / "coded")
    return folder / "coded"


def refused(data: bytes, artifact, tmp_path, match: str) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(UserError, match=match):
        codec.decompress(tmp_path / "bad", tmp_path / "out", artifact)
    assert not (tmp_path / "out").exists()


def test_damage_anywhere_is_refused(coded, artifact, clean, tmp_path):
    data = coded.read_bytes()
    for place in {*range(0, len(data), 9), len(data) - 1}:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        refused(bytes(changed), artifact, tmp_path, "damaged or cut off|was not written by")
    for length in (0, 7, 8, 24, 43, 44, 45, len(data) // 2, len(data) - 17, len(data) - 1):
        refused(data[:length], artifact, tmp_path, "damaged or cut off|was not written by")
    refused(data + b"\0", artifact, tmp_path, "damaged or cut off")


def forged(data: bytes, **changes) -> bytes:
    """A file whose checksum fits its changed contents."""
    contents = CodedText.unpack(data, "")
    for name, change in changes.items():
        setattr(contents, name, change(getattr(contents, name)))
    return contents.pack()


def test_another_machine_artifact_or_text_is_refused_with_the_reason(coded, artifact, clean, tmp_path):
    data = coded.read_bytes()

    def machine(**changes):
        return lambda header: {**header, "machine": {**header["machine"], **changes}}

    for changes, match in (
        (dict(header=machine(torch="1.0")), r"written with torch 1\.0 \(here "),
        (dict(header=machine(device="cpu (Z80)")), r"written with device cpu \(Z80\)"),
        (dict(header=machine(device="NVIDIA H100")), "NVIDIA H100; torch sees no CUDA device"),
        (dict(artifact=lambda name: bytes(16)), "another artifact"),
        (dict(tokenizer=lambda name: bytes(16)), "another tokenizer"),
        (dict(text=lambda hashed: bytes(32)), "is not the text that was compressed"),
        (dict(header=lambda header: {**header, "probes": [1]}), "other probabilities at step"),
        (dict(header=lambda header: {**header, "settings": {"ttt_lr": 0.3}}), "other probabilities|does not decode|not the text"),
        (dict(header=lambda header: {**header, "streams": [2]}), "does not decode"),
        (dict(header=lambda header: {**header, "streams": [3, -5, 1]}), "3 streams of -5"),
        (dict(header=lambda header: {"machine": header["machine"]}), "does not decode"),
        (dict(words=lambda words: words[:-9]), "does not decode|not the text|other probabilities|beyond the vocabulary|no text"),
    ):
        refused(forged(data, **changes), artifact, tmp_path, match)


def test_an_encoder_that_peeks_cannot_be_decoded(artifact, clean, monkeypatch, tmp_path):
    """A distribution that knows the target makes a tiny file, from which nobody gets the text."""
    source, text = tmp_path / "text.txt", b"def merge(a, b):\n    return sorted(a + b)\n" * 6
    source.write_bytes(text)
    honest = codec.compress(artifact, source, tmp_path / "honest")["probability_bits"]
    predict, deal, seen = Lockstep.predict, Streams.deal, []
    monkeypatch.setattr(Streams, "deal", lambda self, tokens: seen.append(deal(self, tokens)) or seen[-1])

    def peek(self, t):
        known = torch.from_numpy(seen[-1][self.live(t), t])
        return 0.99 * torch.nn.functional.one_hot(known, self.cfg.model.vocab_size) + 0.01 * predict(self, t)

    with monkeypatch.context() as patch:
        patch.setattr(Lockstep, "predict", peek)
        assert codec.compress(artifact, source, tmp_path / "peeked")["probability_bits"] < 0.02 * honest
    refused((tmp_path / "peeked").read_bytes(), artifact, tmp_path, "other probabilities")
    refused(forged((tmp_path / "peeked").read_bytes(), header=lambda h: {**h, "probes": []}), artifact, tmp_path, "other probabilities")
    monkeypatch.setattr(codec, "probed", lambda t, lockstep: False)
    refused((tmp_path / "peeked").read_bytes(), artifact, tmp_path, "is not the text|no text|beyond the vocabulary|does not decode")


def test_the_command_decodes_in_another_process_and_finds_the_artifact(coded, artifact, tmp_path):
    """Far from the text: another folder, no environment of ours but where the runs are."""
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "artifact.bin").write_bytes(artifact.read_bytes())

    def command(*arguments):
        environment = clean_environment(RUNS_DIR=tmp_path / "runs")
        return forked.run(ROOT / "codec.py", *arguments, environment=environment, folder=tmp_path)

    (tmp_path / "coded").write_bytes(coded.read_bytes())
    done = command("decompress", "coded", "text")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "text").read_bytes() == (coded.parent / "text.txt").read_bytes()
    (tmp_path / "cut").write_bytes(coded.read_bytes()[:-3])
    failed = command("decompress", "cut", "nothing")
    assert failed.returncode == 2 and failed.stderr.startswith("error: cut is damaged") and failed.stderr.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


def test_a_proof_is_made_by_a_process_that_cannot_read_the_text(artifact, clean, monkeypatch, tmp_path, capfd):
    for name in ("artifact.bin", "eval.json"):
        (tmp_path / name).write_bytes(artifact.read_bytes() if name == "artifact.bin" else b'{"val_bpb": 1.5}')
    monkeypatch.setenv("EVAL_TOKENS", "150")
    assert codec.prove_command(tmp_path / "artifact.bin", tmp_path / "eval.json") == 0
    written = json.loads((tmp_path / "eval.json").read_text())
    proof, coded = written["proof"], tmp_path / "validation.coded"
    assert proof["restored"] and proof["apart"]["files"] and proof["apart"]["network"] and written["val_bpb"] == 1.5
    assert written["bytes_file"] == coded.stat().st_size and written["val_bpb_file"] == 8 * written["bytes_file"] / proof["text_bytes"]
    assert 100 < proof["text_bytes"] < 1000 and "the same text" in capfd.readouterr().out


def test_a_proof_fails_where_another_text_comes_back(artifact, clean, monkeypatch, tmp_path, capsys):
    (tmp_path / "artifact.bin").write_bytes(artifact.read_bytes())

    def another(command, cell, **options):
        (cell / "restored").write_bytes(b"another")
        return {"files": True, "network": True}

    monkeypatch.setattr(codec, "run_apart", another)
    monkeypatch.setenv("EVAL_TOKENS", "60")
    assert codec.prove_command(tmp_path / "artifact.bin", tmp_path / "eval.json") == 1
    assert "ANOTHER TEXT" in capsys.readouterr().out and not (tmp_path / "validation.coded").exists()


def test_the_validation_text_is_what_a_proof_compresses(dataset, clean, monkeypatch, tmp_path):
    for name in ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE"):
        monkeypatch.setenv(name, dataset.settings[name])
    monkeypatch.setattr("sys.argv", ["codec.py", "text", str(tmp_path / "val.jsonl")])
    assert codec.main() == 0
    documents = [json.loads(line)["text"] for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    sources = [(dataset.path.parent / "validation" / f"{name}.txt").read_text() for name in ("bisect", "calendar", "heapq")]
    assert documents == sources
    for arguments in (["text"], ["text", "a", "--out", "b"], ["prove", "a", "--artifact", "b"], ["compress", "a", "b"], ["--out"]):
        monkeypatch.setattr("sys.argv", ["codec.py", *arguments])
        with pytest.raises(UserError, match="usage: "):
            codec.main()


def test_a_compressor_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(codec, "PROGRAMS", {"true": "true", "absent": "no_such_program text"})
    with pytest.raises(UserError, match="`true` failed"):
        codec.other_compressors(b"abc")


def test_other_compressors(tmp_path):
    sizes = codec.other_compressors(b"abc" * 10_000)
    assert len(sizes) >= 3 and all(0 < size < 10_000 for size in sizes.values())
    (tmp_path / "x.txt").write_bytes(b"abc" * 10_000)
    assert len(codec.compare(tmp_path / "x.txt", None)) == 1 + len(sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_its_own_bits_again(kind):
    """Graph replay, gradients and counts: rows equal to the last bit in a second run, and near the parallel forward."""
    tokens = documents(1500)
    streams = Streams.cut(tokens, 8)
    table = streams.deal(tokens)
    changes = dict(eval_seq_len=32, eval_stride=8, eval_batch_seqs=3, ttt_chunk_tokens=256, experts="tilt,ngram,calibration", **KINDS[kind])
    cfg, runs = config(**changes), []
    for known in (table, None):
        model = randomized(cfg).to("cuda")
        model.compute_dtype, model.looping = torch.bfloat16, bool(cfg.model.num_loops)
        tested = Lockstep(model, cfg, byte_table(), RunContext(device=torch.device("cuda")), streams)
        channel, rows = Channel(None if known is not None else runs[0][0]), []
        found, bits = transmit(tested, channel, known, keep(rows), lambda count: None)
        assert tested.step.graphs and np.array_equal(found, table)
        runs.append((channel.coder.get_compressed() if known is not None else None, rows))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))
    assert 32 * len(runs[0][0]) < 1.001 * bits + 64
    tested = Lockstep(
        model, config(**{**changes, "experts": "", "ttt_mode": "off"}), byte_table(), RunContext(device=torch.device("cuda")), streams
    )
    inputs = torch.cat((torch.full((8, 1), BOS_ID), torch.from_numpy(table)), 1).cuda()
    for t in range(40):
        probs = tested.predict(t)
        with torch.no_grad():
            expected = tested.model(inputs[:, tested.window_start(t) : t + 1])[:, -1].double().softmax(-1)
        assert (probs - expected).abs().max() < 0.03  # bfloat16
        tested.reveal(t, inputs[:, t + 1])

"""Score-first evaluation: coverage, TTT in all its forms, ranks, experts in the loop, and the command itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import clean_environment
from test_pipeline import command

import eval_ttt
import quantize
import train_gpt
from data.shards import BOS_ID, ByteTable, load_shard, shard_header
from eval_ttt import Chunk, ScoreFirstEvaluator, chunk_lr, plan_chunks
from parts import audit
from parts.audit import FAIL, INCOMPLETE, NOT_CHECKED, PASS
from parts.files import UserError
from train_gpt import Config, RunContext, build_model, evaluate, parameter_table

VOCAB = 32
SMALL = dict(
    vocab_size=VOCAB, layer_pattern="GTA", model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4, gdn_qk_heads=2, gdn_v_heads=2,
    gdn_head_dim=8, bigram_vocab_size=32, bigram_dim=8, smear_gate=True, tied_embed_init_std=0.3, train_seq_len=24, eval_stride=8,
    ttt_chunk_tokens=64, ttt_epochs=2, ttt_lr=0.02, ttt_batch_seqs=2, eval_batch_seqs=3, expert_block_tokens=16, ngram_order=4,
    audit_samples=64, tokenizer_path="", data_path="",
)  # fmt: skip


def config(**changes) -> Config:
    return Config.from_dict({**Config().to_dict(), **SMALL, **changes})


def stream(n: int, seed: int = 0) -> torch.Tensor:
    """Documents of repeated phrases, so that learning pays."""
    g = torch.Generator().manual_seed(seed)
    phrases = [torch.randint(2, VOCAB, (7,), generator=g).tolist() for _ in range(4)]
    tokens: list[int] = []
    while len(tokens) < n:
        tokens += [BOS_ID] + [t for _ in range(int(torch.randint(2, 9, (1,), generator=g))) for t in phrases[len(tokens) % 4]]
    return torch.tensor(tokens[:n], dtype=torch.int32)


def byte_table() -> ByteTable:
    sizes = (torch.arange(VOCAB) % 5 + 1).repeat(2, 1)
    sizes[:, :2] = 0
    return ByteTable(sizes, (torch.arange(VOCAB) < 2).long())


def evaluator(cfg: Config, ctx: RunContext | None = None) -> ScoreFirstEvaluator:
    return ScoreFirstEvaluator(randomized(cfg), cfg, byte_table(), ctx or RunContext())


def randomized(cfg: Config):
    """A model in which every path carries signal (zero-initialised projections would hide what passes through them)."""
    model = build_model(cfg)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any():
                param.copy_(torch.randn(param.shape, generator=g) * 0.05)
    return model.eval()


# ---- plans ----


def test_chunks_cover_every_target_once_in_order():
    for n, reset in ((2, 0), (65, 0), (66, 0), (200, 1), (129, 1)):
        tokens = stream(n)
        chunks = plan_chunks(tokens, config(ttt_reset_per_doc=reset).eval)
        assert [t for c in chunks for t in range(c.start, c.end)] == list(range(n - 1))
        assert all(c.end - c.start <= 64 for c in chunks)
        if reset:  # a document starts a chunk, and only there is everything forgotten
            assert {c.start for c in chunks if c.fresh} == {i for i in range(n - 1) if tokens[i] == BOS_ID}
    assert plan_chunks(stream(500), config(ttt_mode="off").eval) == [Chunk(0, 499)]


def test_schedules():
    cosine = [chunk_lr(config(ttt_lr=0.1).eval, i, 11) for i in range(11)]
    assert cosine[0] == pytest.approx(0.1) and cosine[5] == pytest.approx(0.05) and cosine[10] == pytest.approx(0)
    adaptive = [chunk_lr(config(ttt_lr=0.1, ttt_lr_schedule="adaptive").eval, i, 11) for i in range(11)]
    ratios = [round(a / c, 9) for a, c in zip(adaptive[:10], cosine)]
    assert ratios[0] == 1 and max(ratios) == 3 and ratios == sorted(ratios)
    assert {chunk_lr(config(ttt_lr_schedule="constant").eval, i, 5) for i in range(5)} == {0.02}
    assert {chunk_lr(config(ttt_reset_per_doc=True).eval, i, 5) for i in range(5)} == {0.02}  # a document's length is not known in advance


# ---- scoring ----


@pytest.mark.parametrize("targets,seq_len,stride,chunk,block", [
    (1, 24, 8, 64, 16), (23, 24, 8, 64, 16), (131, 24, 24, 50, 7), (200, 24, 5, 61, 16), (97, 40, 1, 13, 4), (150, 64, 16, 1000, 1000),
])  # fmt: skip
@pytest.mark.parametrize("by_document", [False, True])
def test_learning_rate_zero_is_the_plain_sliding_evaluation(targets, seq_len, stride, chunk, block, by_document):
    """Also with chunks shorter than the window, odd strides and tails, through the plain and through the experts' path."""
    tokens = stream(targets + 1)
    cfg = config(eval_seq_len=seq_len, eval_stride=stride, ttt_chunk_tokens=chunk, expert_block_tokens=block, ttt_lr=0.0)
    cfg = cfg.replace(eval_by_document=by_document)
    tested = evaluator(cfg)
    plain = evaluate(tested.forward, tokens, byte_table(), cfg.eval, RunContext(), seq_len, stride)
    for full in (False, True):
        trace = tested.run(tokens, full)
        assert trace.val_loss == pytest.approx(plain.val_loss, abs=2e-6) and trace.bytes_scored == plain.bytes_scored
        assert trace.val_bpb == pytest.approx(plain.val_bpb, abs=2e-6)
        assert trace.ledger.coverage.tolist() == [1] * targets
    replica = InProcess(tested, tokens)
    replica.feed(tokens[:targets].numpy())
    picked = replica.rows(0, targets)[range(targets), tokens[1:].numpy()]
    assert np.abs(np.log(picked) + trace.ledger.nll.numpy()).max() < 1e-5


FORMS = [
    dict(ttt_optimizer="sgd"),
    dict(ttt_optimizer="sgd", ttt_nesterov=False, ttt_momentum=0.0, ttt_grad_clip=0.0),
    dict(ttt_optimizer="adamw", ttt_lr=0.002, ttt_lr_schedule="adaptive"),
    dict(ttt_params="mlp"),
    dict(ttt_params="matrices", ttt_freeze_blocks=1),
    dict(ttt_params="lora", ttt_lr=0.2, ttt_lora_rank=4),
    dict(ttt_polyak=0.5),
    dict(ttt_byte_weighted=True),
    dict(ttt_params="lora", ttt_hash_buckets=64, ttt_hash_lr_mult=10.0),
    dict(ttt_seq_len=40, ttt_lr_schedule="constant"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: ",".join(f"{k.removeprefix('ttt_')}={v}" for k, v in form.items()))
def test_every_form_of_ttt_learns_from_scored_text_only(form):
    tokens, cfg = stream(420), config(**form)
    tested = evaluator(cfg)
    plain = tested.sliding(tokens)
    trace = tested.run(tokens)
    assert trace.val_loss < plain.val_loss - 0.005
    assert audit.check_score_before_update(trace).verdict == audit.check_single_pass(trace).verdict == PASS
    assert trace.ledger.uses == {"training": 384}  # six chunks of 64; nothing would be scored after the last
    again = tested.run(tokens)  # from a fresh state
    assert torch.equal(again.ledger.nll, trace.ledger.nll)


@pytest.mark.parametrize("params,freeze,moves", [
    ("all", 1, lambda name, role: not name.startswith("blocks.0.")),
    ("mlp", 0, lambda name, role: role == "mlp"),
    ("matrices", 2, lambda name, role: role in ("mlp", "attn", "gdn", "shift", "proj") and not name.startswith(("blocks.0.", "blocks.1."))),
    ("lora", 0, lambda name, role: False),
])  # fmt: skip
def test_only_the_chosen_parameters_move(params, freeze, moves):
    cfg = config(ttt_params=params, ttt_freeze_blocks=freeze, ttt_lr=0.05)
    model = randomized(cfg)
    table = parameter_table(model)
    before = {spec.name: spec.param.detach().clone() for spec in table}
    tested = ScoreFirstEvaluator(model, cfg, byte_table(), RunContext())
    tested.run(stream(200))
    moved = {spec.name for spec in table if not torch.equal(spec.param, before[spec.name])}
    assert moved == {spec.name for spec in table if moves(spec.name, spec.role)}
    if params == "lora":
        assert any(param.any() for name, param in model.named_parameters() if name.endswith("adapter.up"))
    tested.trainer.reset()
    assert all(torch.equal(spec.param, before[spec.name]) for spec in table)


def test_reset_per_document_forgets():
    """The first chunk of each document is scored with the artifact's weights, later ones with what was learned inside the document."""
    tokens, cfg = stream(300), config(ttt_reset_per_doc=True, ttt_chunk_tokens=16)
    learned, static = evaluator(cfg).run(tokens).ledger.nll, evaluator(config(ttt_mode="off")).run(tokens).ledger.nll
    chunks = plan_chunks(tokens, cfg.eval)
    assert sum(chunk.fresh for chunk in chunks) > 3 and sum(not chunk.fresh for chunk in chunks) > 3
    for chunk in chunks:
        part = slice(chunk.start, chunk.end)
        assert torch.allclose(learned[part], static[part], atol=1e-5) == chunk.fresh


def test_byte_weights_and_masks_weigh_each_target_once_an_epoch():
    """The gradient of one step over a chunk equals that of the naive weighted mean over exactly the chunk's targets."""
    cfg = config(
        ttt_byte_weighted=True,
        ttt_epochs=1,
        ttt_batch_seqs=50,
        ttt_momentum=0.0,
        ttt_grad_clip=0.0,
        ttt_lr=1.0,
        layer_pattern="T",
        ttt_seq_len=24,
    )
    tokens = stream(200)
    tested = evaluator(cfg)
    model_forward, chunk = tested.forward.forward, Chunk(64, 115)  # 51 targets: two sequences of 24 and one reaching back
    before = [param.detach().clone() for param in tested.trainer.params]
    starts, total = (64, 88, 91), 0.0
    loss, weights = 0.0, byte_table().count(tokens[:-1], tokens[1:]).float()
    for start, new in zip(starts, (64, 88, 112)):
        nll = model_forward(tokens[None, start : start + 24].long(), tokens[None, start + 1 : start + 25].long(), reduction="none")[0]
        for t in range(max(new, start), start + 24):
            loss, total = loss + weights[t] * nll[t - start], total + weights[t]
    (loss / total).backward()
    want = [param.grad.clone() for param in tested.trainer.params]
    tested.trainer.optimizer.zero_grad()
    tested.trainer.learn(tokens, chunk, lr=1.0)
    for param, old, grad in zip(tested.trainer.params, before, want):
        assert torch.allclose(old - param.detach(), grad, atol=1e-5, rtol=1e-4)


def test_streams_side_by_side_learn_from_the_chunk_alone():
    """The step over a chunk of several streams is that of the mean over its targets, as far as a stream has them; the rest is context."""
    cfg = config(ttt_epochs=1, ttt_momentum=0.0, ttt_grad_clip=0.0, layer_pattern="T", ttt_seq_len=24)
    tested = evaluator(cfg)
    tokens, lengths = stream(180).view(3, 60), torch.tensor([59, 45, 30])
    before = [param.detach().clone() for param in tested.trainer.params]
    inputs, targets = tokens[:, 26:50].long(), tokens[:, 27:51].long()  # targets 40 … 49, and 14 before them
    nll = tested.forward.forward(inputs, targets, reduction="none")
    torch.cat((nll[0, 14:], nll[1, 14:19])).mean().backward()
    want = [param.grad.clone() for param in tested.trainer.params]
    tested.trainer.optimizer.zero_grad()
    tested.trainer.learn(tokens, Chunk(40, 50), lr=1.0, lengths=lengths)
    for param, old, grad in zip(tested.trainer.params, before, want):
        assert torch.allclose(old - param.detach(), grad, atol=1e-5, rtol=1e-4)


def test_a_step_is_no_longer_than_the_clip_allows():
    cfg = config(ttt_epochs=1, ttt_batch_seqs=50, ttt_momentum=0.0, ttt_nesterov=False, ttt_grad_clip=1e-3)
    trainer = evaluator(cfg).trainer
    before = [param.detach().clone() for param in trainer.params]
    trainer.learn(stream(100), Chunk(0, 64), lr=0.5)
    moved = sum(float((new.detach() - old).square().sum()) for new, old in zip(trainer.params, before)) ** 0.5
    assert moved == pytest.approx(0.5 * 1e-3, rel=1e-2)


def test_polyak_scores_with_the_average_and_trains_on():
    cfg = config(ttt_polyak=0.9, ttt_epochs=1, ttt_batch_seqs=50)
    trainer = evaluator(cfg).trainer
    before = [param.detach().clone() for param in trainer.params]
    trainer.learn(stream(100), Chunk(0, 64), lr=0.05)  # one step
    live = [param.detach().clone() for param in trainer.params]
    assert all(torch.allclose(average, 0.9 * old + 0.1 * new, atol=1e-7) for average, old, new in zip(trainer.average, before, live))
    with trainer.scoring_weights():
        inside = [param.detach().clone() for param in trainer.params]
    assert all(torch.equal(a, b) for a, b in zip(live, trainer.params))
    assert all(torch.allclose(a, b) for a, b in zip(inside, trainer.average))
    assert any(not torch.equal(a, b) for a, b in zip(inside, live))


def test_divergence_is_an_error_with_its_place():
    tested = evaluator(config(ttt_lr=1e30, ttt_grad_clip=0.0))
    with pytest.raises(UserError, match="TTT_LR"):
        tested.run(stream(300))


# ---- experts in the loop ----

WITH_EXPERTS = dict(experts="tilt,temperature,calibration,ngram,cache,unigram,bigram,trigram,entropy", tilt_order=0)


def test_experts_gain_and_report_what_each_is_worth():
    cfg = config(**WITH_EXPERTS, invalid_cache=True)
    tested = evaluator(cfg)
    tokens = stream(1200)
    trace = tested.run(tokens)
    assert trace.val_bpb < trace.bpb("neural_raw") - 0.05
    assert trace.bpb("neural_raw") == pytest.approx(evaluator(config()).run(tokens).val_bpb, abs=1e-5)  # experts leave TTT alone
    gains = eval_ttt.expert_gains(trace, cfg.eval.expert_names)
    assert set(gains) == set(cfg.eval.expert_names)
    assert all(math.isfinite(v) for gain in gains.values() for v in gain.values()) and gains["ngram"]["gain_bpb"] > 0
    assert trace.invalid["mean_sum_over_vocabulary"] > 0 and trace.invalid["valid"] is False


class InProcess:
    """A replica that is no process: what the audit asks of one."""

    def __init__(self, evaluator: ScoreFirstEvaluator, tokens: torch.Tensor):
        self.session, self.vocab_size, self.known = evaluator.session(len(tokens) - 1), VOCAB, 0
        self.sandboxed, self.sandbox_status = False, {"means": []}

    def feed(self, tokens: np.ndarray) -> None:
        self.session.feed(tokens)
        self.known = self.session.known

    def rows(self, first: int, last: int) -> np.ndarray:
        return self.session.rows(first, last).cpu().numpy()


PIECEWISE = [
    dict(**WITH_EXPERTS, ttt_polyak=0.5, ttt_hash_buckets=32),
    dict(**WITH_EXPERTS, ttt_chunk_tokens=50, expert_block_tokens=37, eval_batch_seqs=1),  # no size a multiple of another
    dict(ttt_mode="off", document_mask=True),
    dict(ttt_reset_per_doc=True, ttt_chunk_tokens=20, document_mask=True),
    dict(ttt_mode="off", experts="tilt,ngram", expert_block_tokens=512, eval_stride=24),
    dict(eval_by_document=True, ttt_reset_per_doc=True, ttt_chunk_tokens=33),
    dict(**WITH_EXPERTS, eval_by_document=True, eval_batch_seqs=1),
    dict(ttt_mode="document", ttt_doc_chunks="8@16,16", ttt_doc_lr=0.02, ttt_doc_lanes=3),
    dict(**WITH_EXPERTS, ttt_mode="document", ttt_doc_chunks="16", ttt_doc_lr=0.02, ttt_doc_lanes=2, expert_block_tokens=23),
]


@pytest.mark.parametrize("form", PIECEWISE, ids=lambda form: ",".join(form))
def test_a_text_that_comes_piece_by_piece_gets_the_same_distributions_to_the_bit(form):
    """Blocks of 40 targets. One session gets each but for its last token and gives all its rows; the other gets it up to a cut, then the rest."""
    tokens, cfg = stream(150), config(**form)
    ours, theirs, whole = InProcess(evaluator(cfg), tokens), InProcess(evaluator(cfg), tokens), evaluator(cfg).run(tokens, full=True)
    generator, text = np.random.default_rng(1), tokens.numpy()
    for start in range(0, 149, 40):
        end = min(start + 40, 149)
        ours.feed(text[ours.known : end])
        rows = ours.rows(start, end)
        last_of_documents = [at for at in range(start, end) if text[at + 1] == BOS_ID]
        for cut in sorted({*generator.integers(start, end, 2).tolist(), *last_of_documents}):
            theirs.feed(text[theirs.known : cut + 1])
            assert np.array_equal(theirs.rows(cut, cut + 1)[0], rows[cut - start]), cut
        recorded = whole.ledger.nll[start:end].numpy()
        assert np.abs(np.log(rows[range(end - start), text[start + 1 : end + 1]]) + recorded).max() < audit.SCORE_TOLERANCE


def test_a_forward_sees_few_shapes():
    """Whole batches throughout, however many windows there are, and tails of two widths."""
    tested, shapes = evaluator(config(ttt_mode="off")), set()
    run = tested.forward.graphed.function
    tested.forward.graphed.function = lambda inputs, *rest, score_last: (
        shapes.add((*inputs.shape, score_last)) or run(inputs, *rest, score_last=score_last)
    )
    for length in (20, 150, 163):
        tested.run(stream(length))
    assert shapes == {(3, 24, 24), (3, 24, 8)}


def test_an_audits_forwards_cost_what_scoring_the_text_twice_does():
    """A forward of so many windows a drawn target."""
    batch = lambda targets, **changes: eval_ttt.auditable(config(**changes), targets, RunContext()).eval.eval_batch_seqs
    assert batch(10_240, eval_batch_seqs=0) * 8 * 64 == 2 * 10_240
    assert batch(10_240, eval_batch_seqs=3) == 3 and batch(100, eval_batch_seqs=0) == 1


ALONE = {"ttt_mode": "off"}
AUDITED = [ALONE, ALONE | {"document_mask": True}, {}, {"ttt_polyak": 0.5, "ttt_reset_per_doc": True}, {"invalid_cache": True}]
AUDITED += [{"experts": "tilt,ngram", "expert_mixer": "hedge"}, {"ttt_mode": "document", "ttt_doc_chunks": "16", "ttt_doc_lr": 0.02}]


@pytest.mark.parametrize("form", AUDITED, ids=str)
def test_a_score_is_the_same_to_the_bit_with_and_without_its_audit(form):
    tokens, tested = stream(260), evaluator(config(**form))
    plain, audited = tested.run(tokens), tested.run(tokens, full=True)
    assert torch.equal(plain.ledger.nll, audited.ledger.nll) and plain.val_bpb == audited.val_bpb
    if form.items() >= ALONE.items():
        sliding = tested.sliding(tokens)
        assert (sliding.val_loss, sliding.val_bpb) == (audited.val_loss, audited.val_bpb)


def test_a_session_reads_what_it_is_asked_for_alone():
    """A referee asks a row here and there: what lies between has not to be read, nor a stretch again once all of it is known."""
    tested, tokens, reads = (
        evaluator(config(eval_batch_seqs=2, eval_by_document=True, ttt_mode="off", expert_block_tokens=64)),
        stream(240),
        [],
    )
    session = tested.session(239)
    compute = session.reader._compute
    session.reader._compute = lambda start, end, whole: reads.append(start) or compute(start, end, whole)
    stretch = session.reader.stretch
    asked = [stretch * n + 3 for n in range(239 // stretch)]
    for target in asked:
        session.feed(tokens[session.known : target + 1])
        session.rows(target, target + 1)
    assert len(asked) > 5 and reads == [target - 3 for target in asked]


def test_a_session_refuses_what_it_cannot_answer():
    tokens = stream(100)
    session = evaluator(config()).session(99)
    session.feed(tokens[:90])
    session.rows(70, 90)
    for first, last, message in ((0, 1, "lies before"), (90, 91, "90 tokens are known"), (80, 80, "cannot be asked for")):
        with pytest.raises(UserError, match=message):
            session.rows(first, last)
    with pytest.raises(UserError, match="100 tokens"):
        session.feed(tokens[:11])


def blind_verdicts(tested, tokens) -> list[str]:
    trace = tested.run(tokens, full=True)
    fresh = InProcess(tested, tokens)
    return [
        check.verdict for check in audit.check_blind(fresh, tokens, trace, audit.whole_text(tokens, audit.draw_targets(trace.ledger, 64)))
    ]


def test_the_whole_pipeline_passes_its_audit():
    cfg = config(**WITH_EXPERTS, ttt_polyak=0.5, ttt_hash_buckets=32)
    tested, tokens = evaluator(cfg), stream(260)
    assert blind_verdicts(tested, tokens) == [PASS, PASS]
    trace = tested.run(tokens)
    assert audit.check_score_before_update(trace).verdict == audit.check_single_pass(trace).verdict == PASS
    assert audit.check_documents(None, tokens, trace).verdict == NOT_CHECKED and not tested.documents_independent


@pytest.mark.parametrize("form", [dict(ttt_mode="off"), dict(ttt_reset_per_doc=True, ttt_chunk_tokens=16, ttt_lr=0.1)], ids=str)
def test_masked_documents_are_independent_and_a_smear_across_them_is_found(form):
    cfg, tokens = config(document_mask=True, **form), stream(260)
    for leaky in (False, True):
        model = randomized(cfg)
        if leaky:  # the embedding of the previous token, whatever document it is of
            model.tok_emb.register_forward_hook(lambda module, inputs, output: output + 0.2 * output.roll(1, 1))
        tested = ScoreFirstEvaluator(model, cfg, byte_table(), RunContext())
        assert tested.documents_independent
        trace = tested.run(tokens)
        check = audit.check_documents(InProcess(tested, tokens), tokens, trace)
        assert check.verdict == (FAIL if leaky else PASS), check.line()


def test_a_future_leak_in_the_model_fails_the_audit():
    """The audit examines the evaluation itself: a leak inside the network is found through it."""
    cfg = config(ttt_mode="off")
    model = randomized(cfg)
    # Sequence as [B,T,C]: adding a mean over time shows every position the whole window.
    model.blocks[0].register_forward_hook(lambda module, inputs, out: (out[0] + 0.1 * out[0].mean(1, keepdim=True), *out[1:]))
    assert blind_verdicts(ScoreFirstEvaluator(model, cfg, byte_table(), RunContext()), stream(120))[0] == FAIL


# ---- ranks ----


def _rank(rank: int, world: int, folder: str, changes: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ctx = RunContext(rank, world, rank, torch.device("cpu"))
    tested = evaluator(config(**changes), ctx)
    session = tested.session(309)
    session.feed(stream(310)[:200])
    rows = session.rows(77, 200)
    trace = tested.run(stream(310))
    torch.save({"nll": trace.ledger.nll, "rows": rows, "checksum": tested.trainer.checksum()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_result_of_one(tmp_path):
    """Odd tails, a batch that leaves one rank without sequences, Polyak, byte weights and all experts."""
    changes = dict(**WITH_EXPERTS, ttt_polyak=0.5, ttt_byte_weighted=True, ttt_chunk_tokens=70, ttt_batch_seqs=2)
    tested = evaluator(config(**changes))
    session = tested.session(309)
    session.feed(stream(310)[:200])
    rows = session.rows(77, 200)
    one = tested.run(stream(310))
    forked.server()
    mp.start_processes(_rank, args=(2, str(tmp_path), changes), nprocs=2, start_method="forkserver")
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert two[0]["checksum"] == two[1]["checksum"] and torch.equal(two[0]["nll"], two[1]["nll"])
    assert torch.allclose(two[0]["nll"], one.ledger.nll, atol=2e-4)
    assert one.val_loss == pytest.approx(two[0]["nll"].mean().item(), abs=1e-5)
    assert torch.equal(two[0]["rows"], two[1]["rows"]) and torch.allclose(two[1]["rows"], rows, atol=1e-4)
    assert (rows.sum(1) - 1).abs().max() < 1e-5


# ---- the command ----


def first_validation_document(data, folder):
    """The dataset with a validation split of one short document, its manifest in order."""
    shutil.copytree(data, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    split, text = manifest["splits"]["val"], (Path(sysconfig.get_paths()["stdlib"]) / "bisect.py").read_bytes()
    tokens = load_shard(folder / "fineweb_val_000000.bin")
    tokens = np.array(tokens[: int((tokens == BOS_ID).nonzero()[0][1])])
    (folder / "fineweb_val_000000.bin").write_bytes(shard_header(len(tokens)) + tokens.tobytes())
    digest = hashlib.sha256(text).digest()[:16]
    (folder / split["document_hashes"]["file"]).write_bytes(digest)
    split |= {"tokens": len(tokens), "raw_bytes": len(text), "shards": []}
    split["document_hashes"]["sha256"] = hashlib.sha256(digest).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_command_writes_and_prints_what_it_measured(launch, dataset, tmp_path, capfd):
    """From training to a score that the audit passes, and to the referee's verdict on the same text; in this process where it can be."""
    common = {**dataset.settings, "RUNS_DIR": tmp_path, "DEVICE": "cpu"}
    run = tmp_path / "r"
    command(train_gpt, **{**common, "RUN_ID": "r", "ITERATIONS": 3})
    command(quantize, run, **common)
    artifact, written = run / "artifact.bin", run / "eval.json"
    short = first_validation_document(dataset.path, tmp_path / "short")
    settings = {**common, "EXPERTS": "tilt,ngram,entropy", "AUDIT_SAMPLES": 64, "DATA_PATH": short}
    command(eval_ttt, artifact, "--audit", **settings)
    printed, result = capfd.readouterr().out, json.loads(written.read_text())
    assert result["audit"]["verdict"] == "pass" and not result["audit"]["missing"]
    assert {c["name"]: c["verdict"] for c in result["audit"]["checks"]} == {
        "causality": PASS, "document independence": NOT_CHECKED, "normalization": PASS, "score before update": PASS, "single pass": PASS,
        "whole text": PASS, "byte count": PASS, "documents disjoint": PASS, "training text": NOT_CHECKED, "tokenizer": PASS, "size": PASS,
    }  # fmt: skip
    assert result["val_bpb"] == result["experts_bpb"] and result["bytes_total"] == result["bytes_model"] + result["bytes_code"]
    assert result["sha256"]["artifact"] == hashlib.sha256(artifact.read_bytes()).hexdigest() and result["bytes_tokenizer"] > 0
    assert result["sha256"]["tokenizer"] == hashlib.sha256(dataset.tokenizer.read_bytes()).hexdigest()
    figures = {check["name"]: check["figure"] for check in result["audit"]["checks"]}
    assert "largest |recorded - blind|" in figures["causality"] and "audit: PASS" in printed
    assert "the ones in DATA_PATH" in figures["training text"]
    assert result["bytes_model"] == artifact.stat().st_size and f"val_bpb:{result['val_bpb']:.6f}" in printed

    with mock.patch.dict(os.environ, clean_environment(**settings), clear=True):  # shapes, which may move last bits, are those of an audit
        sessions, mine = [], [eval_ttt.Evaluation(artifact, RunContext(), audit).evaluator.batch for audit in (False, True)]
        start = {"vocab_size": 512, "targets": result["tokens_scored"], "block": 0}
        with mock.patch.object(eval_ttt, "serve", lambda begin: sessions.append(begin(start))):
            eval_ttt.serve_artifact(artifact, RunContext())
            assert len({*mine, sessions[0].evaluator.batch}) == 1
            start["vocab_size"] = 511
            with pytest.raises(UserError, match="the text's vocabulary is 511, the artifact's 512"):
                eval_ttt.serve_artifact(artifact, RunContext())
        for verdict, code in ((FAIL, 1), (INCOMPLETE, 0), (PASS, 0)):
            done = {"audit": {"verdict": verdict}}
            with mock.patch.object(sys, "argv", ["eval_ttt.py", str(artifact), "--audit"]):
                with mock.patch.object(eval_ttt, "evaluate_artifact", lambda *arguments, done=done: done):
                    assert eval_ttt.main() == code

    # Documents that stand alone are answered side by side: the replica is told of nothing else.
    alone = {
        **settings,
        "DATA_PATH": dataset.path,
        "EXPERTS": "none",
        "TTT_MODE": "document",
        "TTT_DOC_LR": 0.01,
        "TTT_DOC_RANK": 4,
        "EVAL_TOKENS": 150,
    }
    command(eval_ttt, artifact, "--audit", "--out", tmp_path / "alone.json", **alone)
    checks = {check["name"]: check for check in json.loads((tmp_path / "alone.json").read_text())["audit"]["checks"]}
    assert checks["causality"]["verdict"] == checks["normalization"]["verdict"] == PASS
    assert "told what precedes them in their documents and no other text" in checks["causality"]["what"]
    capfd.readouterr()

    # The same text judged by the referee: the same score, read from a submission that could see nothing of it ahead.
    (tmp_path / "raw.txt").write_bytes((Path(sysconfig.get_paths()["stdlib"]) / "bisect.py").read_bytes())
    command(eval_ttt, artifact, "--referee", tmp_path / "raw.txt", "--block", 512, "--cuts", 2, **settings)
    printed, verdict = capfd.readouterr().out, json.loads((run / "referee.json").read_text())
    assert verdict["verdict"] == PASS and "referee: PASS" in printed
    assert verdict["val_bpb"] == pytest.approx(result["val_bpb"], abs=1e-5) and verdict["sha256"]["tokens"] == result["sha256"]["tokens"]
    assert verdict["bytes_readable"] == result["bytes_total"] + result["bytes_tokenizer"]

    before = written.read_bytes()
    for arguments, environment, message in [
        ((run / "none.bin",), {}, "does not exist"),
        ((artifact, "--cuts", "2"), {}, "usage"),
        ((artifact,), {"EXPERTS": "magic"}, "magic"),
        ((artifact,), {"EVAL_STRIDE": "4096"}, "EVAL_STRIDE"),
    ]:
        with pytest.raises(UserError, match=message):
            command(eval_ttt, *arguments, **{**settings, **environment})
    assert written.read_bytes() == before and not list(run.glob(".*.tmp"))  # refused before the former score makes room
    failed = launch("eval_ttt.py", artifact, "--fast")
    assert failed.returncode == 2 and "--fast" in failed.stderr and len(failed.stderr.strip().splitlines()) == 1, failed.stderr


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile,pattern", [("0", "AAA"), ("blocks", "AAA"), ("blocks", "GSTA")])
def test_cuda_evaluation_repeats_passes_its_audit_and_agrees_with_the_cpu(compile, pattern):
    """Every score of a rerun is the same to the bit, weight updates and all: kernels whose gradients differ from run to run are not used."""
    if "G" in pattern:
        pytest.importorskip("fla")
    changes = dict(**WITH_EXPERTS, layer_pattern=pattern, model_dim=128, rope_dims=16, gdn_head_dim=64, window_size=16, compile=compile)
    tokens, cfg = stream(400), config(**changes)
    ctx = RunContext(device=torch.device("cuda"))
    model = build_model(cfg, "cuda").eval()
    model.load_state_dict(randomized(cfg).state_dict())
    tested = ScoreFirstEvaluator(model, cfg, byte_table(), ctx)
    assert blind_verdicts(tested, tokens) == [PASS, PASS]
    trace = tested.run(tokens, full=True)
    assert torch.equal(trace.ledger.nll, tested.run(tokens, full=True).ledger.nll)
    on_cpu = evaluator(config(**{**changes, "compile": "0"})).run(tokens)
    assert trace.val_loss == pytest.approx(on_cpu.val_loss, abs=0.05)  # bf16 against float32

"""Test-time training by document: what a document's scores depend on, against a naive loop, and that a leak is found."""

from __future__ import annotations

import itertools

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_eval import WITH_EXPERTS, InProcess, blind_verdicts, byte_table, config, evaluator, randomized, stream

from data.shards import BOS_ID
from eval_ttt import ScoreFirstEvaluator
from parts import audit
from parts.adapters import LINEARS, SITES
from parts.audit import FAIL, PASS
from parts.document_ttt import DocumentTrainer
from parts.experts import ExpertMixture
from parts.files import UserError
from train_gpt import DecodeState, RunContext, evaluate, read_preset

DOCUMENTS = dict(
    ttt_mode="document", ttt_doc_chunks="8@16,16@32,24", ttt_doc_rank=4, ttt_doc_alpha=8, ttt_doc_lr=0.02, ttt_doc_wd=0.1, ttt_doc_lanes=3
)
MODELS = {
    "every mixer": dict(layer_pattern="GSTA", window_size=6, xsa_layers="all", attn_gate_width=4, document_mask=True),
    "sinks, one mixer for two layers": dict(layer_pattern="SAS", window_size=5, attn_sink=True, shared_layers="0,2", trigram_hash=True),
    "recurrence, lanes, skips, value embedding": dict(
        layer_pattern="AAAAA", num_loops=1, loop_start=1, loop_end=2, parallel_start=3, parallel_lanes=2, unet_skips=True, ve_layers="0,4", ve_dim=8
    ),
}  # fmt: skip


def documents_config(**changes):
    return config(**{**DOCUMENTS, **changes})


def on(cfg, ctx=None, looping=True) -> ScoreFirstEvaluator:
    model = randomized(cfg)
    model.looping = looping
    return ScoreFirstEvaluator(model, cfg, byte_table(), ctx or RunContext())


def cut(tokens: torch.Tensor) -> list[torch.Tensor]:
    """The documents, each from its BOS to the token before the next one."""
    starts = (tokens == BOS_ID).nonzero().flatten().tolist()
    return [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]


# ---- what a score depends on ----


@pytest.mark.parametrize("model", MODELS)
def test_a_documents_scores_are_the_same_to_the_bit_in_any_order_and_company(model):
    cfg = documents_config(**MODELS[model])
    tested, documents = on(cfg), cut(stream(360))
    assert len(documents) > 8 and len({len(document) for document in documents}) > 3
    generator, seen = np.random.default_rng(0), {}
    orders = [list(range(len(documents))), generator.permutation(len(documents)).tolist(), [5], [0, 5, 2, 7]]
    for order in orders:
        tokens = torch.cat([*(documents[i] for i in order), torch.tensor([BOS_ID], dtype=torch.int32)])
        nll, start = tested.run(tokens).ledger.nll, 0
        for i in order:
            score = nll[start : start + len(documents[i])]
            assert torch.equal(seen.setdefault(i, score), score), (order, i)
            start += len(documents[i])
    learned, still = tested.run(stream(360)), on(cfg.replace(ttt_doc_lr=0.0)).run(stream(360))
    assert learned.val_loss < still.val_loss - 0.01
    first = [p for p, t in itertools.pairwise((stream(360) == BOS_ID).nonzero().flatten().tolist()) for p in range(p, min(p + 8, t))]
    assert torch.equal(learned.ledger.nll[first], still.ledger.nll[first]), "nothing is learned before the first chunk is scored"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("window", [24, 48])
def test_a_rate_of_zero_is_evaluation_by_document(model, window):
    """In documents no longer than the window; beyond it, full attention's window here ends with the chunk and moves with it."""
    cfg = documents_config(**MODELS[model], ttt_doc_lr=0.0, eval_seq_len=window)
    tested, tokens = on(cfg), stream(400)
    trace = tested.run(tokens)
    plain = evaluate(tested.forward, tokens, byte_table(), cfg.eval, RunContext(), window, 1)
    assert max(map(len, cut(tokens))) > 48 and trace.bytes_scored == plain.bytes_scored
    alone = ScoreFirstEvaluator(
        tested.document_trainer.model, cfg.replace(ttt_mode="off", eval_by_document=True), byte_table(), RunContext()
    )
    nll, start = alone.run(tokens).ledger.nll, 0
    for document in cut(tokens):
        inside = slice(start, start + min(len(document), window))
        assert torch.allclose(trace.ledger.nll[inside], nll[inside], atol=2e-5)
        start += len(document)
    assert trace.val_loss == pytest.approx(plain.val_loss, abs=0.02)


class Plain(torch.nn.Module):
    """A LoRA of one document, as in the paper."""

    def __init__(self, down, out_features):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(down.clone()), torch.nn.Parameter(torch.zeros(out_features, len(down)))

    def forward(self, x):
        return 2.0 * (x @ self.a.T) @ self.b.T


@pytest.mark.parametrize("model", MODELS)
def test_a_loop_over_single_documents_agrees(model):
    """One document at a time, a plain LoRA a place, AdamW written out."""
    cfg = documents_config(**MODELS[model], ttt_doc_sites="q,k,v,o,mlp,head").replace(document_mask=False)
    tested, tokens = on(cfg), stream(180)
    trainer, net = tested.document_trainer, tested.document_trainer.model
    losses = []
    for document in cut(tokens):
        loras = [Plain(start, lora.up.size(1)) for start, lora in zip(trainer.adapters.starts, trainer.adapters.loras)]
        waiting, calls = iter(loras), []
        for layer in net.layer_order(net.looping):
            block = net.blocks[layer]
            linears = [next(getattr(block.mixer, n) for n in names if hasattr(block.mixer, n)) for names in LINEARS.values()]
            calls.append(
                [
                    (owner, name, next(waiting))
                    for owner, name in (*((x, "adapter") for x in linears), (block, "mixer_adapter"), (block, "mlp_adapter"))
                ]
            )
        net.head_adapter = next(waiting)
        net.before_layer = lambda call, block, calls=calls: [setattr(*place) for place in calls[call]]
        params = [p for lora in loras for p in lora.parameters()]
        squares, steps = [torch.zeros_like(p) for p in params], 0
        state, first = DecodeState(1, 24, 24, endless=True, one_document=True), 0
        ids = torch.cat([document, tokens[:1]]).long()[None]  # every document but the last ends with a BOS
        last = len(losses) + len(document) >= len(tokens)
        targets = len(document) - last
        while first < targets:
            size = 8 if first < 16 else 16 if first < 32 else 24
            after = min(first + size, targets)
            logits = net(ids[:, first:after], state=state)
            nll = torch.nn.functional.cross_entropy(logits[0], ids[0, first + 1 : after + 1], reduction="none")
            losses += nll.tolist()
            if first + size < targets:
                steps += 1
                for p, s, g in zip(params, squares, torch.autograd.grad(nll.mean(), params)):
                    with torch.no_grad():
                        s.mul_(0.99).addcmul_(g, g, value=0.01)
                        p.mul_(1 - 0.02 * 0.1).sub_(0.02 * g / ((s / (1 - 0.99**steps)).sqrt() + 1e-10))
            first = after
        for owner, name, _ in itertools.chain(*calls):
            setattr(owner, name, None)
        net.before_layer = net.head_adapter = None
    assert torch.allclose(torch.tensor(losses, dtype=torch.float64), tested.run(tokens).ledger.nll, atol=2e-4)


@pytest.mark.parametrize("site", SITES)
def test_every_site_learns_and_nothing_else_moves(site):
    cfg = documents_config(**MODELS["every mixer"], ttt_doc_sites=site)
    tested = on(cfg)
    before = {name: param.clone() for name, param in tested.document_trainer.model.named_parameters()}
    still = on(cfg.replace(ttt_doc_lr=0.0)).run(stream(200))
    assert not torch.equal(tested.run(stream(200)).ledger.nll, still.ledger.nll)
    after = dict(tested.document_trainer.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    reading = tested.document_trainer.read([stream(30).long()])
    next(reading), next(reading)
    assert all(lora.up[0].any() and not lora.up[1:].any() for lora in tested.document_trainer.adapters.loras)


@pytest.mark.parametrize("preset", ["base", "gdn_hybrid", "gdn3_fa8", "legal_ttt", "token_shift", "ngram_hedge", "frontier"])
def test_every_preset_takes_it_at_small_width(preset):
    small = dict(
        vocab_size=32, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4, gdn_qk_heads=2, gdn_v_heads=2, gdn_head_dim=8, bigram_dim=8
    )
    small |= dict(ve_dim=8, attn_gate_width=4, window_size=8, eval_seq_len=24, eval_stride=8, experts="", tied_embed_init_std=0.3)
    small |= dict(tokenizer_path="", data_path="", **DOCUMENTS)
    values = {name: value for name, (value, _) in read_preset(preset).items() if name not in small}
    cfg = type(config()).from_dict(values).replace(**small)
    tested = on(cfg)
    trace = tested.run(stream(150))
    assert audit.check_score_before_update(trace).verdict == audit.check_single_pass(trace).verdict == PASS
    assert trace.val_loss < on(cfg.replace(ttt_doc_lr=0.0)).run(stream(150)).val_loss
    assert len(tested.document_trainer.adapters.calls) == len(tested.document_trainer.model.layer_order(True))


# ---- the loop around it ----


@pytest.mark.parametrize("form", [{}, WITH_EXPERTS, dict(document_mask=True, layer_pattern="GSA")], ids=["alone", "experts", "masked"])
def test_it_passes_its_audit(form):
    cfg, tokens = documents_config(**form), stream(260)
    tested = on(cfg)
    assert blind_verdicts(tested, tokens) == [PASS, PASS]
    trace = tested.run(tokens, full=True)
    assert audit.check_score_before_update(trace).verdict == audit.check_single_pass(trace).verdict == PASS
    assert trace.ledger.uses["training"] == int((trace.ledger.first_fit < audit.NEVER).sum()) > 150
    assert tested.documents_independent == (not cfg.eval.expert_names)
    if tested.documents_independent:
        assert audit.check_documents(InProcess(tested, tokens), tokens, trace).verdict == PASS
        told = audit.excerpts(tokens, audit.draw_targets(trace.ledger, 100), BOS_ID)
        causality, normalization = audit.check_blind(InProcess(tested, torch.zeros(told.targets + 1)), tokens, trace, told)
        assert (causality.verdict, normalization.verdict) == (
            PASS,
            PASS,
        ) and "100 of 259 targets: largest |recorded - blind| " in causality.figure


class LearnsFirst(DocumentTrainer):
    """Trains on a chunk, then scores it."""

    def read(self, documents):
        lengths = torch.tensor([len(document) - 1 for document in documents])
        tokens = torch.zeros(self.lanes, int(lengths.max()) + 25, dtype=torch.int64)
        for row, document in zip(tokens, documents):
            row[: len(document)] = document
        self.prepare()
        self.restart()
        first = 0
        while first < int(lengths.max()):
            chunk = self.chunks[self.chunk_size(first)]
            after = first + self.chunk_size(first)
            before = self.state.clone()
            chunk.read(tokens[:, first : after + 1])
            chunk.learn(torch.ones(self.lanes, 1, dtype=torch.bool))
            self.state = before
            yield first, chunk.read(tokens[:, first : after + 1])
            first = after


class Remembers(DocumentTrainer):
    """Keeps what earlier documents in the same lane taught."""

    def restart(self, rows=None):
        reset, self.adapters.reset = self.adapters.reset, lambda rows: None
        super().restart(rows)
        self.adapters.reset = reset


@pytest.mark.parametrize("tell", [audit.whole_text, audit.excerpts])
@pytest.mark.parametrize("leak", [LearnsFirst, Remembers])
def test_a_leak_is_found(leak, tell):
    cfg, tokens = documents_config(), stream(260)

    def leaking() -> ScoreFirstEvaluator:
        tested = on(cfg)
        tested.document_trainer.__class__ = leak
        return tested

    trace = leaking().run(tokens, full=True)
    told = tell(tokens, audit.draw_targets(trace.ledger, 64))
    causality, _ = audit.check_blind(InProcess(leaking(), torch.zeros(told.targets + 1)), tokens, trace, told)
    assert causality.verdict == FAIL


def test_a_fit_before_the_models_distribution_is_final_fails():
    trace = audit.Trace(audit.Ledger(4), 4)
    trace.ledger.fit(slice(0, 2), "training")
    trace.ledger.score(slice(0, 4), torch.ones(4))
    assert audit.check_score_before_update(trace).verdict == FAIL
    trace = audit.Trace(audit.Ledger(4), 4)
    trace.ledger.fix(slice(0, 4))
    trace.ledger.fit(slice(0, 2), "training")
    trace.ledger.score(slice(0, 4), torch.ones(4))
    assert audit.check_score_before_update(trace).verdict == PASS
    trace.ledger.fix(slice(1, 2))  # another distribution after all
    assert audit.check_score_before_update(trace).verdict == FAIL


def test_experts_count_in_the_order_of_the_text_whatever_order_documents_are_read_in():
    cfg, tokens = documents_config(experts="ngram,cache", ngram_order=3), stream(300)
    trace = on(cfg).run(tokens)
    assert trace.bpb("neural_raw") == pytest.approx(on(cfg.replace(experts="")).run(tokens).val_bpb, abs=1e-6)
    assert trace.val_bpb < trace.bpb("neural_raw")
    other = on(cfg.replace(ttt_doc_lanes=2)).run(tokens)
    assert torch.allclose(trace.ledger.nll, other.ledger.nll, atol=1e-4)


RANKS = [{}, dict(experts="tilt,calibration,ngram", tilt_order=0)]


def _results(form: dict, ctx: RunContext) -> dict:
    """Of a session that knows 200 tokens and of a run: scores, and which rows of which blocks the experts were shown."""
    tested, predict, shown = on(documents_config(**form), ctx), ExpertMixture.predict, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ExpertMixture, "predict", lambda self, *block: shown.append((self.updates, block[2].tolist())) or predict(self, *block)
        )
        session = tested.session(309)
        session.feed(stream(310)[:200])
        rows, blind = session.rows(77, 200), shown.copy()
        shown.clear()
        return {"rows": rows, "ledger": vars(tested.run(stream(310)).ledger), "blind": blind, "shown": shown}


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save([_results(form, RunContext(rank, world, rank, torch.device("cpu"))) for form in RANKS], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_result_of_one(tmp_path):
    """To the bit where documents stand alone; experts' sums over a block are added in another order.

    A replica that knows less of the text shows the experts the same rows of a block: on a GPU their number moves last bits.
    """
    forked.server()
    mp.start_processes(_rank, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver")
    for form, first, second in zip(RANKS, *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))):
        one = _results(form, RunContext())
        assert torch.equal(first["ledger"]["nll"], second["ledger"]["nll"]) and torch.equal(first["rows"], second["rows"])
        tolerance = 2e-4 if form else 0
        assert torch.allclose(first["ledger"]["nll"], one["ledger"]["nll"], atol=tolerance, rtol=0)
        assert torch.allclose(first["rows"], one["rows"], atol=tolerance, rtol=0)
        if form:
            assert all(result["blind"] == result["shown"][: len(result["blind"])] for result in (first, second))
        fitted = [result["ledger"]["first_fit"] < audit.NEVER for result in (first, one)]
        assert torch.equal(*fitted) and (first["ledger"]["fixed_step"] >= 0).all()


@pytest.mark.parametrize("setting,message", [
    (dict(ttt_doc_chunks="8@256,24@100,48"), "rising positions"), (dict(ttt_doc_chunks="20"), "multiples of 8"),
    (dict(ttt_doc_sites=""), "nothing to train"), (dict(ttt_doc_chunks="96", eval_seq_len=24), "longer than the window"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        documents_config(**setting)


def test_chunks_go_by_position():
    trainer = evaluator(documents_config()).document_trainer
    assert [trainer.chunk_size(p) for p in (0, 15, 16, 31, 32, 10**6)] == [8, 8, 16, 16, 24, 24] and trainer.state.piece == 24

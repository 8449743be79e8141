"""The auditor, tried on evaluators that cheat on purpose: each must be caught, and by the check meant for it."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import Tensor

from data.shards import load_manifest
from parts import audit
from parts.audit import FAIL, NOT_CHECKED, PASS, Ledger, Trace

VOCAB, CHUNK, BOS = 13, 16, 1
BYTES_A_TOKEN = 2


def text(n: int = 101, seed: int = 0) -> Tensor:
    """Documents of 10 to 20 tokens, each starting with BOS."""
    g = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < n:
        tokens += [BOS, *torch.randint(2, VOCAB, (int(torch.randint(9, 20, (1,), generator=g)),), generator=g).tolist()]
    return torch.tensor(tokens[:n])


class Honest:
    """A bigram model whose bonus for tokens it has met is learned chunk by chunk, score first; no document sees another if it doesn't learn."""

    learns = True

    def __init__(self):
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(9))

    @property
    def documents_independent(self) -> bool:
        return not self.learns

    def logits(self, tokens: Tensor, at: Tensor) -> Tensor:
        return self.table[tokens[at]]

    def distributions(self, tokens: Tensor, at: Tensor, counts: Tensor) -> Tensor:
        """Full distributions [n, V] of targets `at`; the strict past and `counts` are all they may use."""
        return (self.logits(tokens, at) + torch.log1p(counts)).softmax(-1)

    def claims(self, tokens: Tensor, at: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
        """Probabilities [n] that are scored."""
        return rows.gather(1, tokens[at + 1, None]).squeeze(1)

    def chunks(self, targets: int) -> list[tuple[int, int]]:
        return [(a, min(a + CHUNK, targets)) for a in range(0, targets, CHUNK)]

    def bytes_of(self, tokens: Tensor, scored: Tensor) -> int:
        return int((tokens[1:][scored] != BOS).sum()) * BYTES_A_TOKEN

    def run(self, tokens: Tensor, stop: int = 0, sample=()) -> Trace:
        targets, counts = len(tokens) - 1, torch.zeros(VOCAB)
        trace = Trace(Ledger(targets), 0)
        for a, b in self.chunks(targets):
            self.chunk(trace, tokens, a, b, counts, set(sample))
            if stop and b >= stop:
                break
        trace.bytes_scored = self.bytes_of(tokens, trace.scored)
        return trace

    def chunk(self, trace: Trace, tokens: Tensor, a: int, b: int, counts: Tensor, sample: set[int]) -> None:
        self.score(trace, tokens, a, b, counts, sample)
        self.learn(trace, tokens, a, b, counts)

    def score(self, trace: Trace, tokens: Tensor, a: int, b: int, counts: Tensor, sample: set[int]) -> None:
        at = torch.arange(a, b)
        rows = self.distributions(tokens, at, counts)
        trace.ledger.score(slice(a, b), -self.claims(tokens, at, counts, rows).log())
        trace.rows |= {t: self.shown(rows[t - a], tokens, t, counts) for t in sample if a <= t < b}

    def shown(self, row: Tensor, tokens: Tensor, t: int, counts: Tensor) -> Tensor:
        return row

    def learn(self, trace: Trace, tokens: Tensor, a: int, b: int, counts: Tensor) -> None:
        if self.learns:
            trace.ledger.use(slice(a, b), "counts")
            counts += torch.bincount(tokens[a + 1 : b + 1], minlength=VOCAB)


class Static(Honest):
    learns = False


class TargetKeyedCache(Honest):
    """Adds what a cache keyed by the target says of the true token alone; as its "distribution" it shows what it would claim of each."""

    def claims(self, tokens, at, counts, rows):
        return (super().claims(tokens, at, counts, rows) + 0.4 * (counts[tokens[at + 1]] > 0)).clamp(max=0.99)

    def shown(self, row, tokens, t, counts):
        return (row + 0.4 * (counts > 0)).clamp(max=0.99)


class TargetKeyedCacheInDisguise(TargetKeyedCache):
    """The same, showing the auditor the honest distribution."""

    def shown(self, row, tokens, t, counts):
        return row


class PeeksAtTheTarget(Honest):
    """Normalized rows, but sharpened where the target happens to be the likeliest token; the row shown is the one scored."""

    def distributions(self, tokens, at, counts):
        logits = self.logits(tokens, at) + torch.log1p(counts)
        right = logits.argmax(-1) == tokens[at + 1]
        return torch.where(right[:, None], 3 * logits, logits).softmax(-1)


class RescoresAfterUpdate(Honest):
    """Learns from the chunk, then scores it."""

    def chunk(self, trace, tokens, a, b, counts, sample):
        self.learn(trace, tokens, a, b, counts)
        self.score(trace, tokens, a, b, counts, sample)


class SmearsAcrossDocuments(Static):
    """Blends in the previous token without looking whether it belongs to the same document, and still claims independence."""

    def logits(self, tokens, at):
        return self.table[tokens[at]] + self.table[tokens[(at - 1).clamp_min(0)]]


class SmearsFromTheFuture(Static):
    """Blends in the token after the target."""

    def logits(self, tokens, at):
        return self.table[tokens[at]] + 0.1 * self.table[tokens[(at + 2).clamp_max(len(tokens) - 1)]]


class MeanOverTime(Static):
    """Subtracts a mean over the whole chunk, future positions included (XSA as it was once written)."""

    def logits(self, tokens, at):
        rows = self.table[tokens[at]]
        return rows - 0.5 * rows.mean(0)


class CountsSpacesTwice(Honest):
    """Bytes +17 %."""

    def bytes_of(self, tokens, scored):
        return int(super().bytes_of(tokens, scored) * 1.17)


class OverlappingWindows(Static):
    """Every chunk after the first starts three targets early."""

    def chunks(self, targets):
        return [(max(a - 3, 0), b) for a, b in super().chunks(targets)]


class DropsTheTail(Static):
    """Scores whole chunks only."""

    def chunks(self, targets):
        return [(a, b) for a, b in super().chunks(targets) if b - a == CHUNK]


class PicksTheBetterPass(Honest):
    """Scores each chunk again after learning from it and keeps the better of the two losses."""

    def chunk(self, trace, tokens, a, b, counts, sample):
        super().chunk(trace, tokens, a, b, counts, sample)
        first = trace.ledger.nll[a:b].clone()
        self.score(trace, tokens, a, b, counts, set())
        trace.ledger.nll[a:b] = torch.minimum(trace.ledger.nll[a:b], first)


def examine(evaluator, tokens: Tensor | None = None) -> dict[str, str]:
    """name -> verdict of all checks that take an evaluator."""
    tokens = text() if tokens is None else tokens
    limit = len(tokens) - 1
    places = audit.plan_places(tokens, edges=range(0, limit, CHUNK), limit=limit, count=8)
    sample = {0, 5, 40, limit - 1, *(place - 1 for place in places)}
    trace = evaluator.run(tokens, sample=sample)
    raw = int((tokens[1:] != BOS).sum()) * BYTES_A_TOKEN
    checks = [
        audit.check_causality(evaluator, tokens, trace, places, VOCAB),
        audit.check_documents(evaluator, tokens, trace, VOCAB, limit),
        audit.check_normalization(evaluator, tokens, trace, places, VOCAB),
        audit.check_score_before_update(trace),
        audit.check_single_pass(trace),
        audit.check_bytes(trace, {"decoded text": raw}),
    ]
    assert all(check.figure and check.line() for check in checks)
    assert audit.verdict(checks) == (FAIL if any(check.verdict == FAIL for check in checks) else PASS)
    return {check.name: check.verdict for check in checks}


def test_honest_evaluators_pass_everything():
    learning, still = examine(Honest()), examine(Static())
    assert set(learning.values()) <= {PASS, NOT_CHECKED} and learning["document independence"] == NOT_CHECKED
    assert set(still.values()) == {PASS}


@pytest.mark.parametrize(
    "cheat,meant,others",
    [
        (TargetKeyedCache, "normalization", set()),
        (TargetKeyedCacheInDisguise, "normalization", set()),
        (PeeksAtTheTarget, "normalization", {"causality"}),  # its distribution moves with the target: both see it
        (RescoresAfterUpdate, "score before update", {"causality", "normalization"}),  # the chunk's scores know the chunk
        (SmearsAcrossDocuments, "document independence", set()),
        (SmearsFromTheFuture, "causality", {"document independence"}),
        (MeanOverTime, "causality", {"document independence", "normalization"}),
        (CountsSpacesTwice, "byte count", set()),
        (OverlappingWindows, "single pass", set()),
        (DropsTheTail, "single pass", {"byte count", "causality", "normalization"}),
        (PicksTheBetterPass, "score before update", {"single pass", "causality", "normalization"}),
    ],
)
def test_cheats_are_caught_by_the_check_meant_for_them(cheat, meant, others):
    verdicts = examine(cheat())
    failed = {name for name, verdict in verdicts.items() if verdict == FAIL}
    assert meant in failed and failed <= {meant} | others, verdicts


def test_tolerance_is_what_separates_noise_from_a_leak():
    """With noise of 1e-6 nats, as on a GPU, the strict comparison fails; a tolerance or the measured noise lets it pass, and no leak."""

    class Noisy(Static):
        def claims(self, tokens, at, counts, rows):
            self.runs = getattr(self, "runs", 0) + 1
            return super().claims(tokens, at, counts, rows) * (1 + 1e-6 * self.runs)

    tokens = text()
    for evaluator, strict, loose in ((Noisy(), FAIL, PASS), (MeanOverTime(), FAIL, FAIL)):
        trace = evaluator.run(tokens)
        assert audit.check_causality(evaluator, tokens, trace, [40, 77], VOCAB).verdict == strict
        assert audit.check_causality(evaluator, tokens, trace, [40, 77], VOCAB, audit.Allowance(0.02)).verdict == loose
        measured = audit.measure_noise(evaluator, tokens, trace, 100, tolerance=1e-8)
        assert audit.check_causality(evaluator, tokens, trace, [40, 77], VOCAB, measured).verdict == loose, measured


def test_places_cover_edges_and_document_starts():
    tokens = text(400)
    places = audit.plan_places(tokens, edges=[0, 64, 128, 192], limit=150, count=6)
    assert {128, 129} <= set(places) and max(places) <= 150 and len(places) >= 5
    assert any(tokens[p] == BOS for p in places) and any(tokens[p - 1] == BOS for p in places)
    changed = audit.perturb(tokens, 77, VOCAB)
    assert torch.equal(changed[:77], tokens[:77]) and (changed[77:] != tokens[77:]).all() and changed.max() < VOCAB


def test_ledger_times_events():
    ledger = Ledger(6)
    ledger.score(slice(0, 3), torch.ones(3))
    ledger.use(slice(0, 3), "fit")
    ledger.score(torch.tensor([3, 5]), torch.ones(2))
    assert ledger.scored_step.tolist() == [0, 0, 0, 2, -1, 2] and ledger.first_use[:4].tolist() == [1, 1, 1, audit.NEVER]
    assert ledger.coverage.tolist() == [1, 1, 1, 1, 0, 1] and ledger.uses == {"fit": 3}
    trace = Trace(ledger, 1)
    assert audit.check_score_before_update(trace).verdict == PASS and audit.check_single_pass(trace).verdict == FAIL
    ledger.score(slice(0, 1), torch.ones(1))
    assert audit.check_score_before_update(trace).verdict == FAIL


def test_size_is_in_decimal_bytes():
    assert audit.check_size(15_900_000, 100_000, 16_000_000).verdict == PASS
    assert audit.check_size(15_900_001, 100_000, 16_000_000).verdict == FAIL


def manifest_of(folder, train: list[bytes], val: list[bytes]) -> dict:
    splits = {}
    for split, documents in (("train", train), ("val", val)):
        data = b"".join(hashlib.sha256(d).digest()[:16] for d in documents)
        (folder / f"{split}_documents.sha256").write_bytes(data)
        entry = {"file": f"{split}_documents.sha256", "sha256": hashlib.sha256(data).hexdigest()}
        splits[split] = {"raw_bytes": sum(map(len, documents)), "tokens": 1, "document_hashes": entry}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "splits": splits}))
    return load_manifest(folder)


def test_documents_in_both_splits_are_found(tmp_path):
    clean = manifest_of(tmp_path, [b"a", b"b"], [b"c"])
    assert audit.check_disjoint(tmp_path, clean, [b"c"]).verdict == PASS
    assert audit.check_disjoint(tmp_path, clean, [b"other"]).verdict == FAIL  # the list is of another text
    (tmp_path / "train_documents.sha256").write_bytes(b"0" * 32)
    assert audit.check_disjoint(tmp_path, clean, [b"c"]).verdict == FAIL  # not the file of the manifest
    assert audit.check_disjoint(tmp_path, manifest_of(tmp_path, [b"a", b"c"], [b"c"])).verdict == FAIL
    assert audit.check_disjoint(tmp_path, None).verdict == NOT_CHECKED
    assert load_manifest(tmp_path / "nowhere") is None

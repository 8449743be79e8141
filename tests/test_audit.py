"""The auditor, tried on evaluations that cheat on purpose: each must be caught, and by the check meant for it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import cheats
import numpy as np
import pytest
import torch
from torch import Tensor

from data.shards import load_manifest
from parts import audit
from parts.audit import FAIL, INCOMPLETE, NOT_CHECKED, PASS, Ledger, Trace
from parts.replica import Replica

HERE = Path(__file__).resolve().parent
VOCAB, BOS = 13, 1


def text(n: int = 501) -> Tensor:
    """Tokens of which each follows its predecessor in one of three ways."""
    generator, tokens = np.random.default_rng(3), [1]
    while len(tokens) < n:
        tokens.append((5 * tokens[-1] + int(generator.choice([0, 1, 4], p=[0.7, 0.2, 0.1]))) % VOCAB)
    return torch.tensor(tokens, dtype=torch.int32)


def recorded(cheat: type[cheats.Evaluation], tokens: Tensor) -> Trace:
    """The evaluation that is reported, in a process that has the whole text: an earlier pass, then every score into the ledger."""
    whole = tokens.numpy().astype(np.int64)
    evaluation = cheat(len(whole) - 1, VOCAB)
    evaluation.prepare(whole)
    evaluation.feed(whole)
    claims = [evaluation.claim(t, evaluation.row(t).astype(np.float32)) for t in range(len(whole) - 1)]
    trace = Trace(Ledger(len(whole) - 1), bytes_scored=len(whole) - 1)
    for start in range(0, len(claims), cheats.CHUNK):
        part = slice(start, min(start + cheats.CHUNK, len(claims)))
        trace.ledger.score(part, -torch.tensor(claims[part], dtype=torch.float64).log())
        trace.ledger.use(part, "counts")
    return trace


def blind(cheat: type[cheats.Evaluation], tokens: Tensor, trace: Trace, count: int = 128) -> dict[str, audit.Check]:
    """What a new process that runs the same code says to it."""
    command = [sys.executable, HERE / "cheats.py", cheat.__name__]
    with Replica(command, len(tokens) - 1, VOCAB) as replica:
        return {
            check.name: check
            for check in audit.check_blind(replica, tokens, trace, audit.whole_text(tokens, audit.draw_targets(trace.ledger, count)))
        }


def test_an_honest_evaluation_passes():
    tokens = text()
    checks = blind(cheats.Evaluation, tokens, recorded(cheats.Evaluation, tokens))
    assert [check.verdict for check in checks.values()] == [PASS, PASS] and "128 of 500" in checks["causality"].figure
    assert "no sandbox" in checks["causality"].what  # this one was started without, and the report says so


def test_a_sample_of_a_few_proves_nothing():
    tokens = text()
    checks = blind(cheats.Evaluation, tokens, recorded(cheats.Evaluation, tokens), 63)
    assert {check.verdict for check in checks.values()} == {NOT_CHECKED} and "raise AUDIT_SAMPLES" in checks["causality"].figure
    checks = blind(cheats.InventsItsTrace, tokens, recorded(cheats.InventsItsTrace, tokens), 1)
    assert checks["causality"].verdict == FAIL  # what is found is found


CHEATS = {
    # Own target at every 53rd place: at the default of 512 draws one in 53 is missed with probability 6e-5, one in 997 with 0.6.
    "RareOwnTarget": 500, "LateOwnTarget": 128, "BatchComposition": 128, "TrainsOnTheNextChunk": 128, "TrainsOneTargetTooFar": 500,
    "RateChosenByTheFinalScore": 128, "BestTemperature": 128, "BestTemperaturePerChunk": 500, "BoostsTheRightFirstRank": 128,
    "ClaimsWhatNobodyLooksAt": 128, "ReplaysAnEarlierRun": 128, "InventsItsTrace": 128, "MixesAfterTheTarget": 128,
    "MixesABlockInHindsight": 500, "CountsBeforeItScores": 128, "PrefilledTables": 128, "CalibratedOnTheText": 128,
    "TemperatureTunedBeforehand": 128, "NeverReset": 128, "LearnsFromAGlobalCopy": 128, "CachesWindows": 128, "NoisyWithALeak": 128,
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_score_that_rests_on_more_than_the_past_fails_causality(name):
    tokens, cheat = text(), getattr(cheats, name)
    trace = recorded(cheat, tokens)
    checks = blind(cheat, tokens, trace, CHEATS[name])
    assert checks["causality"].verdict == FAIL and "the first at target" in checks["causality"].figure, checks["causality"].line()
    # The order of events, which the evaluation reports itself, tells nothing of any of them.
    assert audit.check_score_before_update(trace).verdict == audit.check_single_pass(trace).verdict == PASS


def test_rows_that_are_no_distributions_fail_normalization_and_a_dead_replica_proves_nothing():
    tokens = text()
    checks = blind(cheats.NotNormalized, tokens, recorded(cheats.NotNormalized, tokens))
    assert (checks["causality"].verdict, checks["normalization"].verdict) == (PASS, FAIL)
    checks = blind(cheats.Stops, tokens, recorded(cheats.Evaluation, tokens))
    assert {check.verdict for check in checks.values()} == {NOT_CHECKED} and "no more" in checks["causality"].figure
    assert audit.verdict([*checks.values()]) == INCOMPLETE


def test_targets_are_drawn_by_the_scores_themselves():
    ledger = recorded(cheats.Evaluation, text()).ledger
    drawn = audit.draw_targets(ledger, 60)
    assert drawn == sorted(set(drawn)) == audit.draw_targets(ledger, 60) and len(drawn) == 60
    assert min(drawn) < 50 and max(drawn) > 450  # all over the text
    ledger.nll[77] += 1e-12
    assert audit.draw_targets(ledger, 60) != drawn and audit.draw_targets(ledger, 9999) == list(range(500))


@pytest.mark.parametrize("step", [1, 3, 40])
def test_excerpts_tell_nothing_of_a_target_before_it_is_answered(step):
    """Each drawn target is asked at the end of what precedes it in its document, when no excerpt told so far holds more of that document."""
    tokens = text().clone()
    tokens[tokens == 1] = 2
    starts = [0, 3, 4, 90, 91, 300, 499]
    tokens[starts] = 1
    drawn = list(range(0, 500, step))
    told = audit.excerpts(tokens, drawn)
    assert sorted(question.drawn for question in told.questions) == drawn and len(told.text) == told.targets
    assert [question.asked for question in told.questions] == sorted(question.asked for question in told.questions)
    begins = np.flatnonzero(told.text == 1).tolist() + [told.targets]
    held: list[tuple[int, int, int]] = []  # (begin of an excerpt, start of its document, its last target)
    for number, question in enumerate(told.questions):
        start = max(place for place in starts if place <= question.drawn)
        assert begins[number + 1] == question.asked + 1 <= question.known
        assert told.text[begins[number] : begins[number + 1]].tolist() == tokens[start : question.drawn + 1].tolist()
        held.append((begins[number], start, question.drawn))
    for question, (_, start, target) in zip(told.questions, held):
        assert all(last <= target for begin, other, last in held if other == start and begin < question.known)


# ---- order and coverage ----


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


@pytest.mark.parametrize("chunks,check", [
    ([(0, 8), (5, 16)], audit.check_single_pass),  # overlapping windows
    ([(0, 8)], audit.check_single_pass),  # the tail is dropped
    ([(0, 8), (8, 16), (0, 8)], audit.check_score_before_update),  # scored again after learning, the better kept
])  # fmt: skip
def test_what_the_ledger_shows_fails(chunks, check):
    trace = Trace(Ledger(16), 16)
    for start, end in chunks:
        trace.ledger.score(slice(start, end), torch.ones(end - start))
        trace.ledger.use(slice(start, end), "counts")
    assert check(trace).verdict == FAIL


def test_a_use_just_before_the_score_fails():
    trace = Trace(Ledger(4), 4)
    trace.ledger.use(slice(0, 4), "fit")
    trace.ledger.score(slice(0, 4), torch.ones(4))  # the very next event
    assert audit.check_score_before_update(trace).verdict == FAIL


# ---- bytes, documents, tokenizer, size ----


def trace_of(bytes_scored: int) -> Trace:
    return Trace(recorded(cheats.Evaluation, text(20)).ledger, bytes_scored)


def test_bytes_are_those_of_the_raw_text_or_nothing_is_proven():
    """A normalizer that inflates, folds or drops agrees with its own decoding: without a count of the raw text that is no PASS."""
    good = audit.check_bytes(trace_of(40), {"decoded text": 40, "manifest": 40}, of_raw_text=True)
    inflated = audit.check_bytes(trace_of(80), {"decoded text": 80, "manifest": 40}, of_raw_text=True)
    unknown = audit.check_bytes(trace_of(80), {"decoded text": 80}, of_raw_text=False)
    wrong = audit.check_bytes(trace_of(80), {"decoded text": 70}, of_raw_text=False)
    assert [check.verdict for check in (good, inflated, unknown, wrong)] == [PASS, FAIL, NOT_CHECKED, FAIL]
    assert audit.verdict([unknown]) == INCOMPLETE and "byte count" in audit.missing([unknown])


class Tokenizer:
    """As much of a SentencePieceProcessor as is asked for."""

    def __init__(self, pieces: list[str]):
        self.pieces = pieces
        self.vocab_size, self.id_to_piece = (lambda: len(pieces)), pieces.__getitem__
        self.is_control = self.is_unknown = lambda i: pieces[i].startswith("<")
        self.is_byte = lambda i: False

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids) if not ids or isinstance(ids[0], int) else [self.decode(part) for part in ids]


def test_token_0_is_no_target_and_its_text_is_not_counted():
    tokenizer, stream = Tokenizer(["<unk>", "<s>", "ab", "c"]), torch.tensor([2, 3, 3, 1, 2])
    documents = audit.decoded_documents(stream, tokenizer, BOS)
    assert documents == [b"abcc", b"ab"] and audit.bytes_before_the_first_target(stream, tokenizer, BOS) == 2
    assert audit.bytes_before_the_first_target(stream[3:], tokenizer, BOS) == 0


def counted(val: tuple[int, int], train: tuple[int, int] = (4000, 1000)) -> dict:
    return {"splits": {name: {"raw_bytes": nbytes, "tokens": n} for name, (nbytes, n) in (("val", val), ("train", train))}}


def test_a_tokenizer_that_carries_the_text_is_found_and_pays():
    plain, fitted = Tokenizer(["<unk>", "<s>", "▁the", "x" * 16]), Tokenizer(["<unk>", "<s>", "x" * 150])
    assert not audit.tokenizer_counts(plain) and audit.tokenizer_counts(fitted)
    assert audit.check_tokenizer(plain, counted((410, 100))).verdict == PASS
    assert audit.check_tokenizer(fitted, counted((54_492, 373))).verdict == FAIL  # the attack's figures: 146 bytes a token
    assert audit.check_tokenizer(plain, None).verdict == NOT_CHECKED
    beside, paid = (audit.check_size(15_900_000, 99_000, 300_000, counts, 16_000_000) for counts in (False, True))
    assert (beside.verdict, paid.verdict) == (PASS, FAIL) and "tokenizer 300,000 beside it" in beside.figure and "16,299,000" in paid.figure


def test_size_is_in_decimal_bytes():
    assert audit.check_size(15_900_000, 100_000, 5, False, 16_000_000).verdict == PASS
    assert audit.check_size(15_900_001, 100_000, 5, False, 16_000_000).verdict == FAIL


def test_a_part_of_the_text_is_no_score_of_it():
    assert audit.check_whole_text(100, 100, counted((1, 100))).verdict == PASS
    assert audit.check_whole_text(60, 100, counted((1, 100))).verdict == NOT_CHECKED  # EVAL_TOKENS, chosen afterwards or not
    assert audit.check_whole_text(200, 200, counted((1, 100))).verdict == FAIL  # the text twice, documents dropped


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
    assert audit.check_disjoint(tmp_path, clean, [b"c"], True).verdict == PASS
    assert audit.check_disjoint(tmp_path, clean, [b"other"], True).verdict == FAIL  # the list is of another text
    (tmp_path / "train_documents.sha256").write_bytes(b"0" * 32)
    assert audit.check_disjoint(tmp_path, clean, [b"c"], True).verdict == FAIL  # not the file of the manifest
    assert audit.check_disjoint(tmp_path, manifest_of(tmp_path, [b"a", b"c"], [b"c"]), None, True).verdict == FAIL
    assert audit.check_disjoint(tmp_path, None).verdict == NOT_CHECKED


def test_a_model_trained_on_other_shards_is_not_called_disjoint_and_training_is_never_called_checked(tmp_path):
    """Trained on the validation documents from another folder: the lists of this one say nothing about that."""
    check = audit.check_disjoint(tmp_path, manifest_of(tmp_path, [b"a", b"b"], [b"c"]), [b"c"], these_trained=False)
    assert (
        check.verdict == NOT_CHECKED
        and "does not say that it was trained on these" in check.figure
        and audit.verdict([check]) == INCOMPLETE
    )
    figures = {}
    for trained_on, here in (("ab" * 32, "ab" * 32), ("ab" * 32, "cd" * 32), (None, "cd" * 32)):
        check = audit.check_training_text(trained_on, here)
        figures[trained_on == here] = check.figure
        assert check.verdict == NOT_CHECKED and check.figure.startswith("not verifiable: the artifact ")
    assert "training shards abababab" in figures[True] and "the ones in DATA_PATH" in figures[True] and "the ones" not in figures[False]


# ---- verdict ----


def test_only_all_mandatory_checks_make_a_pass():
    checks = [audit.Check(name, PASS, "", "") for name in audit.MANDATORY]
    extra = audit.Check("training text", NOT_CHECKED, "", "")
    assert audit.verdict([*checks, extra]) == PASS and not audit.missing([*checks, extra])
    for i, name in enumerate(audit.MANDATORY):
        without, unchecked = checks[:i] + checks[i + 1 :], [*checks]
        unchecked[i] = audit.Check(name, NOT_CHECKED, "", "")
        assert audit.verdict(without) == audit.verdict(unchecked) == INCOMPLETE and audit.missing(without) == audit.missing(unchecked) == [
            name
        ]
        unchecked[i] = audit.Check(name, FAIL, "", "")
        assert audit.verdict(unchecked) == FAIL
    assert audit.verdict([]) == INCOMPLETE

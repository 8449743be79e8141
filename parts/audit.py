"""Audit of an evaluation: is the score that it reports a valid one?

A score counts when (1) the distribution of each target depends on the model and the tokens before it alone, (2) it is a normalized
distribution over the vocabulary, fixed before the target is looked at, (3) no target's loss was counted after something had
been fitted on it, and (4) the text was read once, each target scored once. To that come the byte count, the separation of
validation and training documents, and the size of what is submitted.

The audit works on anything that behaves like `Evaluator` below, honest or not. It trusts as little as it can: causality is
tested by changing tokens and running the evaluation again, and what an evaluator says about its own distributions is held
against the scores that it claims when the target is another one. The record of who used which token when (`Ledger`) is
kept by the evaluation as it runs; it is the one thing that is taken from it.

    places = plan_places(tokens, edges=[32768, 65536], limit=70000)
    trace = evaluator.run(tokens, sample=sample_positions(...))      # the evaluation that is reported
    checks = [check_causality(evaluator, tokens, trace, places), check_normalization(trace, tokens), ...]

Target i is tokens[i + 1]; "position i" below means target i.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

PASS, FAIL, NOT_CHECKED = "pass", "fail", "not checked"

NORMALIZATION_TOLERANCE = 1e-4  # of the sum over the vocabulary (the challenge's own)
NEVER = torch.iinfo(torch.int64).max


@dataclasses.dataclass(frozen=True)
class Check:
    """One check's outcome: what was done, the figure that it found, and the verdict."""

    name: str
    verdict: str
    figure: str
    what: str

    def line(self) -> str:
        return f"{self.name:<22} {self.verdict.upper():<12} {self.figure}  [{self.what}]"


# ----------------------------------------------------------------------------------------------------------------------
# What an evaluation leaves behind
# ----------------------------------------------------------------------------------------------------------------------


class Ledger:
    """Every target's scores and uses, in order of events. One event = one call of `score` or `use`; their number is the time.

    nll float64 [N]: the loss that counts, nats (NaN: never scored). coverage int32 [N]: times scored. scored_step, first_use int64
    [N]: the event of the last scoring, the event of the first fit or count that saw the target (NEVER if none did).
    """

    def __init__(self, num_targets: int):
        self.nll = torch.full((num_targets,), math.nan, dtype=torch.float64)
        self.coverage = torch.zeros(num_targets, dtype=torch.int32)
        self.scored_step = torch.full((num_targets,), -1, dtype=torch.int64)
        self.first_use = torch.full((num_targets,), NEVER, dtype=torch.int64)
        self.events = 0
        self.uses: dict[str, int] = {}

    def score(self, positions: Tensor | slice, nll: Tensor) -> None:
        """The losses (nats) of these targets count."""
        self.nll[positions] = nll.to("cpu", torch.float64)
        self.coverage[positions] += 1
        self.scored_step[positions] = self.events
        self.events += 1

    def use(self, positions: Tensor | slice, by: str) -> None:
        """Something (`by`: "fit", "counts", ...) is about to see these targets."""
        self.first_use[positions] = self.first_use[positions].clamp_max(self.events)
        self.uses[by] = self.uses.get(by, 0) + len(self.nll[positions])
        self.events += 1


@dataclasses.dataclass
class Trace:
    """One run of an evaluator: its ledger, the bytes it divides by, and the full distributions at the sampled positions."""

    ledger: Ledger
    bytes_scored: int
    rows: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # position -> probabilities float32 [V]

    @property
    def scored(self) -> Tensor:
        return self.ledger.coverage > 0

    @property
    def val_loss(self) -> float:
        """Nats a token."""
        return self.ledger.nll[self.scored].mean().item()

    @property
    def val_bpb(self) -> float:
        return self.ledger.nll[self.scored].sum().item() / math.log(2) / self.bytes_scored


class Evaluator(Protocol):
    """What the audit can examine."""

    documents_independent: bool  # claims that no document's score depends on another document

    def run(self, tokens: Tensor, stop: int = 0, sample: Iterable[int] = ()) -> Trace:
        """Evaluate `tokens` from a fresh state, with the distributions at the positions in `sample`. `stop` > 0: the caller needs only
        the targets before it; everything else (plans, schedules) must be as in the full run."""
        ...


# ----------------------------------------------------------------------------------------------------------------------
# 1. Causality
# ----------------------------------------------------------------------------------------------------------------------


def plan_places(tokens: Tensor, edges: Sequence[int], limit: int, bos_id: int = 1, count: int = 6, seed: int = 0) -> list[int]:
    """Token indices to perturb: around a chunk edge, at and after a document start, and at random, all at most `limit`.

    A target's score may depend on nothing from its own token on, so at chunk edge e (the first target of a chunk) both tokens e (last
    target before) and e + 1 (first target after) are taken. At least two places are random: edges often coincide with the ends of
    windows, where a leak inside a window has nothing to see.
    """
    limit = min(limit, len(tokens) - 1)
    inner = [e for e in edges if 0 < e < limit]
    places = [p for e in inner[-1:] for p in (e, e + 1)]
    starts = (tokens[1:limit] == bos_id).nonzero().squeeze(1) + 1
    if len(starts):
        start = int(starts[len(starts) // 2])
        places += [start, start + 1]
    generator = torch.Generator().manual_seed(seed)
    random = max(2, count - len(places))
    places += torch.randint(1, limit + 1, (random,), generator=generator).tolist()
    return sorted({p for p in places if 1 <= p <= limit})


def perturb(tokens: Tensor, place: int, vocab_size: int, seed: int = 0) -> Tensor:
    """`tokens` with the one at `place` and every one after it replaced by another."""
    generator = torch.Generator().manual_seed(seed + place)
    changed = tokens.clone()
    tail = changed[place:].long()
    shift = torch.randint(1, vocab_size, tail.shape, generator=generator)
    changed[place:] = ((tail + shift) % vocab_size).to(changed.dtype)
    return changed


@dataclasses.dataclass(frozen=True)
class Allowance:
    """By how much a rerun's score may differ from the first run's at each position, nats: 0 everywhere on a CPU."""

    tolerance: float = 0.0
    noise: Tensor | None = None  # float64 [N]: largest difference that an unchanged rerun showed up to each position

    def at(self, positions: slice) -> Tensor | float:
        return self.tolerance if self.noise is None else self.tolerance + 4 * self.noise[positions]

    def __str__(self) -> str:
        if self.noise is None:
            return "bitwise" if self.tolerance == 0 else f"within {self.tolerance:g} nats"
        return f"within {self.tolerance:g} nats + 4 times what a rerun of the unchanged text differs (so far: up to {self.noise.max().item():.2g})"


def measure_noise(evaluator: Evaluator, tokens: Tensor, trace: Trace, limit: int, tolerance: float) -> Allowance:
    """Run again unchanged, as GPU gradients (atomic additions) are not reproducible. Before the first weight update this finds nothing,
    and what comes after may not differ by more than the noise that has been there before it."""
    again = evaluator.run(tokens, stop=limit)
    gap = (again.ledger.nll - trace.ledger.nll).abs().nan_to_num(0.0)
    return Allowance(tolerance, gap.cummax(0).values)


def check_causality(
    evaluator: Evaluator, tokens: Tensor, trace: Trace, places: Sequence[int], vocab_size: int, allowance: Allowance = Allowance()
) -> Check:
    """For each place j: replace tokens j.., run again, and compare every target before token j, and the distribution of token j itself."""
    compared, worst, where, rows, leaks = 0, 0.0, -1, 0, 0
    for place in places:
        changed = evaluator.run(perturb(tokens, place, vocab_size), stop=place, sample=[place - 1])
        before = slice(0, place - 1)
        gap = (changed.ledger.nll[before] - trace.ledger.nll[before]).abs()
        gap = torch.where(gap.isnan(), math.inf, gap)  # a target one run scored and the other did not
        compared += gap.numel()
        leaks += int((gap > allowance.at(before)).sum())
        if gap.numel() and gap.max() > worst:
            worst, where = gap.max().item(), int(gap.argmax())
        if place - 1 in trace.rows and place - 1 in changed.rows:
            # A probability moves by at most its |log ratio|: the same allowance serves.
            difference = (trace.rows[place - 1].double() - changed.rows[place - 1].double()).abs().max().item()
            rows += 1
            leaks += int((torch.tensor([difference]) > allowance.at(slice(place - 1, place))).sum())
            if difference > worst:
                worst, where = difference, place - 1
    verdict = NOT_CHECKED if not places else FAIL if leaks else PASS
    figure = f"{compared:,} earlier scores and {rows} next-token distributions compared, largest difference {worst:.3g}"
    figure += f", {leaks:,} beyond what is allowed, the largest at position {where}" if leaks else ""
    return Check("causality", verdict, figure, f"replaced all tokens from {list(places)} on and ran again; must agree {allowance}")


def check_documents(
    evaluator: Evaluator, tokens: Tensor, trace: Trace, vocab_size: int, limit: int, bos_id: int = 1, allowance: Allowance = Allowance()
) -> Check:
    """Where documents are claimed to be independent: change the document before a document start; the next one's scores must stay."""
    name, what = "document independence", "changed one document and compared the scores of the next"
    if not evaluator.documents_independent:
        return Check(name, NOT_CHECKED, "not claimed: a target may depend on all text before it", what)
    starts = (tokens == bos_id).nonzero().squeeze(1).tolist() + [len(tokens) - 1]
    if len(starts) < 3:
        return Check(name, NOT_CHECKED, "fewer than two documents", what)
    worst, compared, leaks = 0.0, 0, 0
    for first, second, end in list(zip(starts, starts[1:], starts[2:]))[:4]:
        if second >= limit or second - first < 2:
            continue
        changed = tokens.clone()
        body = slice(first + 1, second)
        shift = 1 + torch.arange(second - first - 1) % max(vocab_size - 3, 1)
        # Another document of the same length: its tokens stay ordinary ones, so that the starts do not move.
        changed[body] = (2 + (changed[body].long() - 2 + shift) % (vocab_size - 2)).to(tokens.dtype)
        end = min(end, limit)
        after = evaluator.run(changed, stop=end)
        gap = (after.ledger.nll[second:end] - trace.ledger.nll[second:end]).abs()
        if gap.numel():
            compared, worst = compared + gap.numel(), max(worst, gap.max().item())
            leaks += int((gap > allowance.at(slice(second, end))).sum())
    verdict = NOT_CHECKED if not compared else FAIL if leaks else PASS
    return Check(name, verdict, f"{compared:,} scores compared, largest difference {worst:.3g}", what)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Normalization
# ----------------------------------------------------------------------------------------------------------------------


def check_normalization(
    evaluator: Evaluator, tokens: Tensor, trace: Trace, places: Sequence[int], vocab_size: int, allowance: Allowance = Allowance()
) -> Check:
    """The distributions at sampled positions sum to 1, are nowhere negative, and are what the scores were read from.

    The last point does not take the evaluator's word: at each place the target is exchanged for other tokens, the evaluation is run again, and
    what it then claims for the exchanged target must be that token's entry of the distribution shown for the original text.
    """
    if not trace.rows:
        return Check("normalization", NOT_CHECKED, "no distribution was sampled", "")
    sums = {t: abs(row.double().sum().item() - 1) for t, row in trace.rows.items()}
    lowest = min(row.min().item() for row in trace.rows.values())
    worst_sum = max(sums.values())

    def gap(nll: Tensor, t: int, token: int) -> float:
        return abs(nll[t].item() + math.log(max(trace.rows[t][token].item(), 1e-38)))

    # A score is float32 log p and its rounding grows with |log p|: 2e-5 nats are no difference.
    gaps = [gap(trace.ledger.nll, t, int(tokens[t + 1])) for t in trace.rows]
    apart, exchanged = sum(g > 2e-5 for g in gaps), 0
    for place in places:
        t = place - 1
        if t not in trace.rows:
            continue
        for shift in (1, vocab_size // 2):
            changed = tokens.clone()
            changed[place] = (int(tokens[place]) + shift) % vocab_size
            gaps.append(gap(evaluator.run(changed, stop=place).ledger.nll, t, int(changed[place])))
            apart += int(torch.as_tensor(gaps[-1] > allowance.at(slice(t, t + 1)) + 2e-5))
            exchanged += 1
    worst_gap = max(gaps)
    finite = all(torch.isfinite(row).all() and row.numel() == vocab_size for row in trace.rows.values())
    good = finite and worst_sum <= NORMALIZATION_TOLERANCE and lowest >= 0 and not apart
    figure = f"largest |sum - 1| {worst_sum:.2g}, least probability {lowest:.2g}, largest |score + log p(target)| {worst_gap:.2g} nats"
    what = f"full distribution at {len(trace.rows)} positions; {exchanged} reruns with the target exchanged for another token"
    return Check("normalization", PASS if good else FAIL, figure, what)


# ----------------------------------------------------------------------------------------------------------------------
# 3 and 4. Order of events, coverage
# ----------------------------------------------------------------------------------------------------------------------


def check_score_before_update(trace: Trace) -> Check:
    """No target was scored after, or while, something was fitted on it."""
    ledger = trace.ledger
    used = ledger.first_use < NEVER
    late = used & (ledger.scored_step >= ledger.first_use)
    figure = f"{int(late.sum()):,} of {int(used.sum()):,} used targets scored after their first use"
    uses = ", ".join(f"{by} of {count:,} targets" for by, count in ledger.uses.items()) or "nothing was fitted or counted"
    return Check("score before update", FAIL if late.any() else PASS, figure, f"ledger of {ledger.events:,} events: {uses}")


def check_single_pass(trace: Trace) -> Check:
    """Each target was scored exactly once."""
    coverage = trace.ledger.coverage
    never, again = int((coverage == 0).sum()), int((coverage > 1).sum())
    good = never == again == 0 and bool(torch.isfinite(trace.ledger.nll).all())
    figure = f"{coverage.numel():,} targets: {never:,} never scored, {again:,} more than once"
    return Check("single pass", PASS if good else FAIL, figure, "coverage count of every target, the ragged tail included")


# ----------------------------------------------------------------------------------------------------------------------
# Bytes, documents, size
# ----------------------------------------------------------------------------------------------------------------------


def decoded_documents(tokens: Tensor, tokenizer, bos_id: int = 1) -> list[bytes]:
    """The raw text (UTF-8) of each document in the token stream. The last one may be cut off if the stream is."""
    ids = tokens.tolist()
    starts = [i for i, token in enumerate(ids) if token == bos_id]
    if not starts or starts[0]:
        starts.insert(0, -1)  # text before the first BOS
    pieces = [ids[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(ids)])]
    return [text.encode() for text in tokenizer.decode(pieces)]


def check_bytes(trace: Trace, raw_bytes: Mapping[str, int]) -> Check:
    """The bytes that the score is divided by are the raw text's. raw_bytes: how they were counted -> count."""
    wrong = {how: count for how, count in raw_bytes.items() if count != trace.bytes_scored}
    figure = f"divided by {trace.bytes_scored:,} bytes; " + ", ".join(f"{how}: {count:,}" for how, count in raw_bytes.items())
    verdict = NOT_CHECKED if not raw_bytes else FAIL if wrong else PASS
    return Check("byte count", verdict, figure, "every token decoded, UTF-8 bytes counted without the byte table")


def check_disjoint(data_path: str | Path, manifest: Mapping | None, documents: Sequence[bytes] | None = None) -> Check:
    """No validation document is a training document, by the document hashes (first 16 bytes of SHA-256) that the builder stored.

    documents: the evaluated texts; their hashes must be those stored for validation, so that the lists are about this very text.
    """
    name, what = "documents disjoint", "document hashes of both splits, from the files that the manifest names"
    hashes: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        entry = ((manifest or {}).get("splits", {}).get(split) or {}).get("document_hashes")
        if not entry:
            return Check(name, NOT_CHECKED, "the data folder's manifest has no document hashes", what)
        try:
            data = (Path(data_path) / entry["file"]).read_bytes()
        except OSError as error:
            return Check(name, FAIL, f"{entry['file']} cannot be read: {error.strerror}", what)
        if hashlib.sha256(data).hexdigest() != entry["sha256"] or len(data) % 16:
            return Check(name, FAIL, f"{entry['file']} is not the file that the manifest describes", what)
        hashes[split] = np.frombuffer(data, dtype="V16")
    if documents is not None:
        seen = [hashlib.sha256(text).digest()[:16] for text in documents]
        if seen != [h.tobytes() for h in hashes["val"]]:
            return Check(name, FAIL, "the evaluated documents are not those whose hashes are stored", what)
    common = len(set(hashes["val"].tolist()) & set(hashes["train"].tolist()))
    figure = f"{common} of {len(hashes['val']):,} validation documents among {len(hashes['train']):,} training documents"
    return Check(name, FAIL if common else PASS, figure, what + (" (re-hashed from the evaluated tokens)" if documents is not None else ""))


def check_size(bytes_model: int, bytes_code: int, limit: int) -> Check:
    total = bytes_model + bytes_code
    figure = f"model {bytes_model:,} + code {bytes_code:,} = {total:,} of {limit:,} bytes"
    return Check("size", PASS if total <= limit else FAIL, figure, "files on disk, decimal megabytes")


def verdict(checks: Sequence[Check]) -> str:
    """ "fail" if any check failed, else "pass"; what was not checked is not held against the score, but is listed."""
    return FAIL if any(check.verdict == FAIL for check in checks) else PASS

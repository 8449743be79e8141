"""Audit of an evaluation: is the score that it reports a valid one, and what of that could not be checked?

A score counts when (1) the distribution of each target depends on the model and the tokens before it alone, (2) it is a normalized
distribution over the vocabulary, fixed before the target is looked at, (3) no target's loss was counted after something had
been fitted on it, and (4) the text was read once, each target scored once. To that come the byte count, the separation of
validation and training documents, the tokenizer, and the size of what is submitted.

The evaluation runs first, with the whole text in its process, and leaves every target's loss in a `Ledger`. Only then are
targets drawn, all over the text, by a hash of those losses. A blind replica, a new process that gets the text through a pipe, token by
token as far as it may know it, answers at each of them with its distribution of a token that does not exist in its process yet (where documents
are claimed to be independent: what precedes it in its document, and no other text). What the evaluation reported there must be what the
replica gives. A replica has no earlier pass, no later text and no sample to know.

    trace = evaluator.run(tokens)
    told = whole_text(tokens, draw_targets(trace.ledger, 512))
    checks = [*check_blind(replica, tokens, trace, told), check_score_before_update(trace), ...]
    verdict(checks)                # "pass" only where every mandatory check ran

What it does not do: keep the evaluator from reading the text elsewhere (the replica runs in a sandbox, the evaluation itself does not), or look into the
text that was tokenized. That is the referee's part (parts/REFEREE.md). Target i is tokens[i + 1]; "position i" below means target i.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parts.files import UserError
from parts.replica import Replica, ReplicaError

PASS, FAIL, NOT_CHECKED, INCOMPLETE = "pass", "fail", "not checked", "incomplete"

MANDATORY = (
    "causality", "normalization", "score before update", "single pass", "whole text", "byte count", "documents disjoint", "tokenizer", "size",
)  # fmt: skip
NORMALIZATION_TOLERANCE = 1e-4  # of the sum over the vocabulary (the challenge's own)
# Nats between a recorded score and the replica's distribution. Gradients repeat to the bit and shapes are fixed, so what is left is the
# rounding of float32 log p, which grows with |log p|. The same on a GPU: no noise is measured, and none allowed for.
SCORE_TOLERANCE = 2e-5
LEAST_TARGETS = 64  # answered again, or all that there are: the audit's sample is a setting, and must not be set to nothing
DOCUMENT_TOLERANCE = 1e-3  # nats by which a document may move when the one before it is another
PLAIN_PIECE = 16  # characters: SentencePiece's own limit of a piece
FITTED_TOKENIZER = 1.25  # bytes a token in validation over those in training: more means that it was made for the validation text
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

    Where experts follow a model that learns document by document, a model's own distribution is final (`fix`) and learned from (`fit`) before
    the mixture's score is booked: fixed_step, first_fit int64 [N] are those events.
    """

    def __init__(self, num_targets: int):
        self.nll = torch.full((num_targets,), math.nan, dtype=torch.float64)
        self.coverage = torch.zeros(num_targets, dtype=torch.int32)
        self.scored_step = torch.full((num_targets,), -1, dtype=torch.int64)
        self.first_use = torch.full((num_targets,), NEVER, dtype=torch.int64)
        self.fixed_step = torch.full((num_targets,), -1, dtype=torch.int64)
        self.first_fit = torch.full((num_targets,), NEVER, dtype=torch.int64)
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
        self._use(self.first_use, positions, by)

    def fix(self, positions: Tensor | slice) -> None:
        """The model's own distributions of these targets are final."""
        self.fixed_step[positions] = self.events
        self.events += 1

    def fit(self, positions: Tensor | slice, by: str) -> None:
        """The model, whose distributions of these targets are final, is about to learn from them."""
        self._use(self.first_fit, positions, by)

    def _use(self, first: Tensor, positions: Tensor | slice, by: str) -> None:
        first[positions] = first[positions].clamp_max(self.events)
        self.uses[by] = self.uses.get(by, 0) + len(self.nll[positions])
        self.events += 1


@dataclasses.dataclass
class Trace:
    """One run of an evaluator: its ledger and the bytes it divides by."""

    ledger: Ledger
    bytes_scored: int

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


# ----------------------------------------------------------------------------------------------------------------------
# 1 and 2. Causality and normalization, by a replica that cannot know
# ----------------------------------------------------------------------------------------------------------------------


def draw_targets(ledger: Ledger, count: int) -> list[int]:
    """`count` targets (all of them where there are no more), ascending, from a hash of every score: known to nobody before the run has ended."""
    seed = hashlib.sha256(np.ascontiguousarray(ledger.nll.numpy()).tobytes()).digest()
    generator = np.random.default_rng(int.from_bytes(seed, "little"))
    return sorted(generator.choice(len(ledger.nll), min(count, len(ledger.nll)), replace=False).tolist())


@dataclasses.dataclass(frozen=True)
class Question:
    """A drawn target, as a replica is asked for it: which target that is in the text it is told, of which it knows the first `known` tokens then."""

    drawn: int
    asked: int
    known: int


@dataclasses.dataclass(frozen=True)
class Told:
    """What a replica is told, a part before each question: `text`, of `targets` targets."""

    text: np.ndarray
    targets: int
    questions: list[Question]
    what: str


def whole_text(tokens: Tensor, drawn: Sequence[int]) -> Told:
    """The text, up to each drawn target in turn."""
    questions = [Question(target, target, target + 1) for target in drawn]
    return Told(tokens.numpy(), len(tokens) - 1, questions, "told no token beyond them")


def excerpts(tokens: Tensor, drawn: Sequence[int], bos_id: int = 1) -> Told:
    """Where documents are claimed to be independent: of each drawn target's document what precedes the target, and nothing else.

    Many are told at once, so that an evaluator that reads documents side by side does so here. But of one document a target is told no sooner than
    it has been answered: the second one drawn in it waits for the next round. tokens begin with BOS.
    """
    starts = (tokens == bos_id).nonzero().squeeze(1)
    first = starts[torch.searchsorted(starts, torch.tensor(drawn), right=True) - 1].tolist()
    rounds: list[list[tuple[int, int]]] = []  # (start of its document, drawn target)
    turn: dict[int, int] = {}
    for start, target in zip(first, drawn):
        turn[start] = turn.get(start, -1) + 1
        if turn[start] == len(rounds):
            rounds.append([])
        rounds[turn[start]].append((start, target))
    pieces, questions, length = [], [], 0
    for asked in rounds:
        known = length + sum(target + 1 - start for start, target in asked)
        for start, target in sorted(asked, key=lambda span: span[0] - span[1]):  # like lengths side by side
            pieces.append(tokens[start : target + 1])
            length += target + 1 - start
            questions.append(Question(target, length - 1, known))
    what = "told what precedes them in their documents and no other text"
    return Told(torch.cat(pieces).numpy(), length, questions, what)


def check_blind(
    replica: Replica, tokens: Tensor, trace: Trace, told: Told, advance: Callable[[int], None] = lambda count: None
) -> list[Check]:
    """Causality: the recorded score of each drawn target is the one that a process gives to which neither the target nor what follows it
    has been told. Normalization: that process's distributions sum to 1 and are nowhere negative."""
    text, nll = tokens.numpy(), trace.ledger.nll.numpy()
    gaps, sums, lowest = [], [], math.inf
    try:
        for question in told.questions:
            target = question.drawn
            if replica.known < question.known:
                replica.feed(told.text[replica.known : question.known])
            row = replica.rows(question.asked, question.asked + 1)[0].astype(np.float64)
            gap = abs(nll[target] + math.log(max(row[text[target + 1]], 1e-45)))
            gaps.append(gap if math.isfinite(gap) else math.inf)
            sums.append(abs(row.sum() - 1) if np.isfinite(row).all() else math.inf)
            lowest = min(lowest, row.min())
            advance(1)
    except ReplicaError as error:
        return [Check(name, NOT_CHECKED, f"after {len(gaps)} targets {error}", "blind replica") for name in ("causality", "normalization")]
    if not gaps:
        return [Check(name, NOT_CHECKED, "no target was looked at", "blind replica") for name in ("causality", "normalization")]
    wrong = sorted(question.drawn for question, gap in zip(told.questions, gaps) if gap > SCORE_TOLERANCE)
    figure = f"{len(gaps):,} of {len(nll):,} targets: largest |recorded - blind| {max(gaps):.2g} nats"
    figure += f", {len(wrong):,} differ, the first at target {wrong[0]:,}" if wrong else ""
    figure += f"; a cheat at 1 % of the targets is missed with probability {0.99 ** len(gaps):.1g}"
    status = replica.sandbox_status
    shut = f"sandbox: {', '.join(status['means'])}" if replica.sandboxed else "no sandbox: it could have read the text"
    what = f"targets drawn by a hash of all scores; a new process, {told.what}, must give the same ({shut})"
    if len(gaps) < min(LEAST_TARGETS, len(nll)) and not wrong:
        few = f"{figure}; fewer than {LEAST_TARGETS} prove nothing: raise AUDIT_SAMPLES"
        return [Check(name, NOT_CHECKED, few, what) for name in ("causality", "normalization")]
    normal = max(sums) <= NORMALIZATION_TOLERANCE and lowest >= 0
    return [
        Check("causality", FAIL if wrong else PASS, figure, what),
        Check(
            "normalization",
            PASS if normal else FAIL,
            f"largest |sum - 1| {max(sums):.2g}, least probability {lowest:.2g}",
            f"the replica's full distributions of {len(gaps):,} targets",
        ),
    ]


def check_documents(replica: Replica | None, tokens: Tensor, trace: Trace, bos_id: int = 1, most: int = 256) -> Check:
    """Where documents are claimed to be independent: a replica gets another first document of the same length; the scores of the second one
    must stay. replica: a fresh one; None where nothing of the kind is claimed."""
    name, what = "document independence", "another first document; the second one's scores compared"
    if replica is None:
        return Check(name, NOT_CHECKED, "not claimed: a target may depend on all text before it", what)
    starts = (tokens == bos_id).nonzero().squeeze(1).tolist() + [len(tokens) - 1]
    pair = next(((a, b, end) for a, b, end in zip(starts, starts[1:], starts[2:]) if b - a > 1 and end > b), None)
    if pair is None:
        return Check(name, NOT_CHECKED, "fewer than two documents", what)
    first, second, end = pair
    end = min(end, second + most)
    changed = tokens[:end].long()
    ordinary = replica.vocab_size - 2
    # Its tokens stay ordinary ones, so that the starts do not move.
    shift = 1 + torch.arange(second - first - 1) % max(ordinary - 1, 1)
    changed[first + 1 : second] = 2 + (changed[first + 1 : second] - 2 + shift) % ordinary
    try:
        replica.feed(changed.numpy())
        rows = torch.from_numpy(replica.rows(second, end).copy()).double()
    except ReplicaError as error:
        return Check(name, NOT_CHECKED, str(error), what)
    nll = -rows.gather(1, tokens[second + 1 : end + 1, None].long()).squeeze(1).log()
    worst = (nll - trace.ledger.nll[second:end]).abs().nan_to_num(math.inf).max().item()
    verdict = PASS if worst <= DOCUMENT_TOLERANCE else FAIL
    return Check(name, verdict, f"{end - second:,} scores compared, largest difference {worst:.3g}", what)


# ----------------------------------------------------------------------------------------------------------------------
# 3 and 4. Order of events, coverage
# ----------------------------------------------------------------------------------------------------------------------


def check_score_before_update(trace: Trace) -> Check:
    """No target was scored after, or while, something was fitted on it."""
    ledger = trace.ledger
    used = (ledger.first_use < NEVER) | (ledger.first_fit < NEVER)
    unfixed = (ledger.first_fit < NEVER) & ((ledger.fixed_step < 0) | (ledger.fixed_step >= ledger.first_fit))
    late = (used & (ledger.scored_step >= ledger.first_use)) | unfixed
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
# The text: all of it, its bytes, its documents
# ----------------------------------------------------------------------------------------------------------------------


def decoded_documents(tokens: Tensor, tokenizer, bos_id: int = 1) -> list[bytes]:
    """The raw text (UTF-8) of each document in the token stream. The last one may be cut off if the stream is."""
    ids = tokens.tolist()
    starts = [i for i, token in enumerate(ids) if token == bos_id]
    if not starts or starts[0]:
        starts.insert(0, -1)  # text before the first BOS
    pieces = [ids[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(ids)])]
    return [text.encode() for text in tokenizer.decode(pieces)]


def unfinished_tokens(tokens: Tensor, tokenizer, bos_id: int = 1) -> int:
    """How many tokens at the end of a stream that was cut have no text yet: bytes of a character, a case operator and what it has of its word."""
    cut = 0
    while cut < len(tokens) - 1:
        if not tokenizer.is_byte(int(tokens[len(tokens) - 1 - cut])):
            document = tokens[: len(tokens) - cut]
            start = int((document == bos_id).nonzero()[-1]) + 1 if bool((document == bos_id).any()) else 0
            with contextlib.suppress(UserError):
                tokenizer.decode(document[start:].tolist())
                return cut
        cut += 1
    return cut


def bytes_before_the_first_target(tokens: Tensor, tokenizer, bos_id: int = 1) -> int:
    """Bytes of token 0's text, which is no target: 0 where it is BOS, as in every stream that begins with a document."""
    return 0 if int(tokens[0]) == bos_id else len(tokenizer.decode([int(tokens[0])]).encode())


def check_whole_text(tokens_read: int, tokens_there: int, manifest: Mapping | None) -> Check:
    """The evaluation read all of the validation split, and the split is what its manifest says."""
    listed = manifest["splits"]["val"]["tokens"] if manifest else tokens_there
    figure = f"{tokens_read:,} of {tokens_there:,} tokens"
    figure += f"; the manifest says {listed:,}" if listed != tokens_there else ""
    good = tokens_read == tokens_there
    verdict = FAIL if listed != tokens_there else PASS if good else NOT_CHECKED
    return Check(
        "whole text", verdict, figure, "EVAL_TOKENS evaluates a part, which is no score of the text" if not good else "validation shards"
    )


def check_bytes(trace: Trace, raw_bytes: Mapping[str, int], of_raw_text: bool) -> Check:
    """The bytes that the score is divided by are the raw text's. raw_bytes: how they were counted -> count. of_raw_text: whether one of them
    was counted before tokenization; decoding cannot tell what a tokenizer changed, so without that nothing is proven."""
    wrong = {how: count for how, count in raw_bytes.items() if count != trace.bytes_scored}
    figure = f"divided by {trace.bytes_scored:,} bytes; " + (
        ", ".join(f"{how}: {count:,}" for how, count in raw_bytes.items()) or "as the export records them"
    )
    figure += "" if of_raw_text else "; no count of the raw text to hold it against"
    verdict = FAIL if wrong else PASS if of_raw_text else NOT_CHECKED
    return Check(
        "byte count",
        verdict,
        figure,
        "every token decoded, UTF-8 bytes counted without the byte table; the builder's count of the raw text",
    )


def check_disjoint(
    data_path: str | Path, manifest: Mapping | None, documents: Sequence[bytes] | None = None, these_trained: bool = False
) -> Check:
    """No validation document is a training document, by the document hashes (first 16 bytes of SHA-256) that the builder stored.

    documents: the evaluated texts; their hashes must be those stored for validation, so that the lists are about this very text.
    these_trained: whether the artifact says that it was trained on the shards beside these lists; they say nothing about others.
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
    what += " (re-hashed from the evaluated tokens)" if documents is not None else ""
    if not common and not these_trained:
        return Check(name, NOT_CHECKED, figure + "; but the artifact does not say that it was trained on these", what)
    return Check(name, FAIL if common else PASS, figure, what)


def check_training_text(trained_on: str | None, here: str | None) -> Check:
    """What is known of the training text: what the artifact says, which is all there is. Never more than "not checked"."""
    claim = "the artifact does not say which shards it saw"
    if trained_on:
        same = "the ones in DATA_PATH" if trained_on == here else "others than are in DATA_PATH"
        claim = f"the artifact says it saw training shards {trained_on[:16]}, {same}"
    return Check("training text", NOT_CHECKED, f"not verifiable: {claim}", "only text newer than the artifact's hash proves more")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and size
# ----------------------------------------------------------------------------------------------------------------------


def tokenizer_counts(tokenizer) -> bool:
    """Whether the tokenizer's bytes count in the size. The challenge gives a tokenizer with the data and counts code and model; what has the form
    of such a one, no piece longer than PLAIN_PIECE characters, is left out. A longer piece is text, and text is paid for."""
    return longest_piece(tokenizer) > PLAIN_PIECE


def longest_piece(tokenizer) -> int:
    """Characters of the longest ordinary piece."""
    ordinary = (
        i for i in range(tokenizer.vocab_size()) if not (tokenizer.is_byte(i) or tokenizer.is_control(i) or tokenizer.is_unknown(i))
    )
    return max((len(tokenizer.id_to_piece(i)) for i in ordinary), default=0)


def check_tokenizer(tokenizer, manifest: Mapping | None) -> Check:
    """The tokenizer fits the validation text no better than the training text: text of the one split in its pieces would show."""
    name, what = (
        "tokenizer",
        f"bytes a token in both splits; above {FITTED_TOKENIZER:g} times training's it was made for the validation text",
    )
    length = f"longest piece {longest_piece(tokenizer)} characters"
    rates = {}
    for split in ("val", "train"):
        entry = ((manifest or {}).get("splits", {}).get(split)) or {}
        if not entry.get("tokens") or not entry.get("raw_bytes"):
            return Check(name, NOT_CHECKED, f"{length}; the data folder's manifest does not count both splits", what)
        rates[split] = entry["raw_bytes"] / entry["tokens"]
    fitted = rates["val"] > FITTED_TOKENIZER * rates["train"]
    figure = f"{length}; {rates['val']:.2f} bytes a token in validation, {rates['train']:.2f} in training"
    return Check(name, FAIL if fitted else PASS, figure, what)


def check_size(bytes_model: int, bytes_code: int, bytes_tokenizer: int, tokenizer_counted: bool, limit: int) -> Check:
    total = bytes_model + bytes_code + bytes_tokenizer * tokenizer_counted
    figure = f"model {bytes_model:,} + code {bytes_code:,} "
    figure += f"+ tokenizer {bytes_tokenizer:,} = " if tokenizer_counted else "= "
    figure += f"{total:,} of {limit:,} bytes"
    figure += "" if tokenizer_counted else f"; tokenizer {bytes_tokenizer:,} beside it"
    rule = f"files on disk, decimal megabytes; a tokenizer counts if a piece is longer than {PLAIN_PIECE} characters"
    return Check("size", PASS if total <= limit else FAIL, figure, rule)


# ----------------------------------------------------------------------------------------------------------------------
# Verdict
# ----------------------------------------------------------------------------------------------------------------------


def missing(checks: Sequence[Check]) -> list[str]:
    """Mandatory checks that did not run, or found nothing to look at."""
    passed = {check.name for check in checks if check.verdict in (PASS, FAIL)}
    return [name for name in MANDATORY if name not in passed]


def verdict(checks: Sequence[Check]) -> str:
    """ "fail" if any check failed, "pass" if every mandatory one passed, else "incomplete"."""
    return FAIL if any(check.verdict == FAIL for check in checks) else INCOMPLETE if missing(checks) else PASS

"""Evaluators that cheat, each in one way: tests/test_audit.py and tests/test_referee.py must catch them. All are bigram.py's model and a trick.

`row` is what an evaluator answers; `claim` the probability that its evaluation books for a target. `prepare` is an earlier pass over the text.
Run as a script (`python cheats.py NAME`) one is a replica, which has of the text what it is sent.
"""

import contextlib
import os
import socket
import sys
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from bigram import Bigram, talk

CHUNK = 64


class Evaluation(Bigram):
    """The honest one, with the handles that cheats take hold of."""

    def prepare(self, text):
        """A plain pass over the whole text, before the evaluation that counts."""

    def known(self, index):
        """Token `index` where it is there already, None otherwise."""
        return int(self.text[index]) if index < len(self.text) else None

    def claim(self, target, row):
        return row[self.text[target + 1]]


def normalized(row):
    return row / row.sum()


def towards(row, token, weight):
    """Normalized, with that much more on a token."""
    row = row.copy()
    if token is not None:
        row[token] += weight
    return normalized(row)


class RareOwnTarget(Evaluation):
    def row(self, target):
        return towards(super().row(target), self.known(target + 1) if target % 53 == 7 else None, 20)


class LateOwnTarget(Evaluation):
    def row(self, target):
        return towards(super().row(target), self.known(target + 1) if target > 3 * CHUNK else None, 20)


class BatchComposition(Evaluation):
    """What follows this token later in the batch is seen."""

    def row(self, target):
        row = super().row(target).copy()
        ahead = self.text[target + 1 : target + 33]
        for here, following in pairwise(ahead):
            row[following] += 0.2 * (here == self.text[target])
        return normalized(row)


class TrainsOnTheNextChunk(Evaluation):
    """In the last half of the text."""

    def row(self, target):
        row = super().row(target).copy()
        start = (target // CHUNK + 1) * CHUNK
        for token in self.text[start : start + CHUNK] if target > self.targets // 2 else ():
            row[token] += 0.02
        return normalized(row)

    def __init__(self, targets, vocab_size):
        super().__init__(targets, vocab_size)
        self.targets = targets


class TrainsOneTargetTooFar(Evaluation):
    def row(self, target):
        return towards(super().row(target), self.known(target + 1) if target % CHUNK == 0 else None, 0.3)


class Sharpened(Evaluation):
    """Distributions to the power of `power`."""

    power = 1.0

    def row(self, target):
        return normalized(super().row(target) ** self.power)


class RateChosenByTheFinalScore(Sharpened):
    """By runs over the whole text, before the one that is reported."""

    def prepare(self, text):
        def cost(power):
            trial = Sharpened(len(text) - 1, len(self.counts))
            trial.power = power
            trial.feed(text)
            return -sum(np.log(trial.row(t)[text[t + 1]]) for t in range(len(text) - 1))

        type(self).power = min((0.5, 0.8, 1.3), key=cost)


class TemperatureTunedBeforehand(RateChosenByTheFinalScore):
    pass


class BestTemperature(Evaluation):
    """The best of three for each stretch of `span` targets, by their scores."""

    span = 8

    def variants(self, rows):
        """Distributions [..., V] -> what is chosen from [3, ..., V]."""
        powers = np.array([0.7, 1.0, 1.4]).reshape(3, *[1] * rows.ndim)
        return rows**powers

    def row(self, target):
        row = super().row(target)
        first = target // self.span * self.span
        known = self.text[first + 1 : first + 1 + self.span]
        tried = self.variants(self.counts[self.text[first : first + len(known)]])
        scores = np.log(tried / tried.sum(2, keepdims=True))[:, range(len(known)), known].sum(1)
        return normalized(self.variants(row)[int(scores.argmax())])


class BestTemperaturePerChunk(BestTemperature):
    span = CHUNK


class BoostsTheRightFirstRank(Evaluation):
    """p^0.25 where the target is the likeliest token; the distribution that is shown is the honest one."""

    def claim(self, target, row):
        p = super().claim(target, row)
        return p**0.25 if row.argmax() == self.text[target + 1] else p


class ClaimsWhatNobodyLooksAt(Evaluation):
    """p = 0.99 outside the targets that a seed would have drawn."""

    def claim(self, target, row):
        return super().claim(target, row) if target % 16 == 0 else 0.99


class ReplaysAnEarlierRun(Evaluation):
    """Its first run's claims, whoever asks."""

    def claim(self, target, row):
        return 0.99


class InventsItsTrace(Evaluation):
    """No model at all."""

    def claim(self, target, row):
        return 0.9999


class MixesAfterTheTarget(Evaluation):
    """Takes, token by token, the better of two distributions."""

    def claim(self, target, row):
        return max(super().claim(target, row), 1 / len(row))


class MixesABlockInHindsight(BestTemperature):
    """The weight of a second distribution, by the scores of its block of 16."""

    span = 16

    def variants(self, rows):
        rows = rows / rows.sum(-1, keepdims=True)
        return np.stack([weight * rows + (1 - weight) / rows.shape[-1] for weight in (0.5, 0.9, 1.0)])


class CountsBeforeItScores(Evaluation):
    """And its ledger is silent about it."""

    def row(self, target):
        row = super().row(target).copy()
        first = target // CHUNK * CHUNK
        for here, following in zip(self.text[first : first + CHUNK], self.text[first + 1 : first + CHUNK + 1]):
            row[following] += 0.5 * (here == self.text[target])
        return normalized(row)


class PrefilledTables(Evaluation):
    kept = None

    def prepare(self, text):
        type(self).kept = np.zeros_like(self.counts)
        np.add.at(type(self).kept, (text[:-1], text[1:]), 1.0)

    def row(self, target):
        row = super().row(target)
        return row if self.kept is None else normalized(row + self.kept[self.text[target]])


class CalibratedOnTheText(Evaluation):
    kept = 0.0

    def prepare(self, text):
        type(self).kept = np.bincount(text, minlength=len(self.counts)) / len(text)

    def row(self, target):
        return normalized(super().row(target) + 0.3 * self.kept)


class NeverReset(PrefilledTables):
    """A warm-up run's weights stay, a little of them."""

    def row(self, target):
        row = Evaluation.row(self, target)
        return row if self.kept is None else normalized(row + 0.01 * self.kept[self.text[target]])


class LearnsFromAGlobalCopy(Evaluation):
    text_kept = None

    def prepare(self, text):
        type(self).text_kept = text

    def row(self, target):
        row = super().row(target).copy()
        if self.text_kept is not None and target > 3 * CHUNK:
            row[self.text_kept[target + 1]] += 0.05
        return normalized(row)


class CachesWindows(Evaluation):
    """Looks into the future, and answers every later run from the rows of the first."""

    rows: ClassVar = {}

    def row(self, target):
        return self.rows.setdefault(target, towards(super().row(target), self.known(target + 1), 0.2))


class NoisyWithALeak(Evaluation):
    """Dropout left on, and the better of two passes."""

    def row(self, target):
        noise = np.random.default_rng().normal(0, 0.1, (2, len(self.counts)))
        rows = [normalized(super(NoisyWithALeak, self).row(target) * np.exp(draw)) for draw in noise]
        token = self.known(target + 1)
        return rows[0] if token is None else max(rows, key=lambda row: row[token])


class NotNormalized(Evaluation):
    def row(self, target):
        return super().row(target) * 1.5


class HonestWhenAskedAlone(Evaluation):
    """Peeks everywhere but where a single row is wanted, which is where a probe would be."""

    def row(self, target):
        row = super().row(target)
        return row if self.known(target + 1) is None else towards(row, self.known(target + 1), 20)


class ReadsTheFile(Evaluation):
    """Takes the text from where it lies: the second argument."""

    def row(self, target):
        try:
            text = np.fromfile(sys.argv[2], "<i4")
        except OSError:
            return super().row(target)
        return towards(super().row(target), int(text[target + 1]), 20)


class AsksTheNetwork(Evaluation):
    """Asks a helper on the port of the second argument for the next token."""

    def row(self, target):
        row = super().row(target)
        try:
            with socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=5) as helper:
                helper.sendall(target.to_bytes(4, "little"))
                return towards(row, int.from_bytes(helper.recv(4), "little"), 20)
        except OSError:
            return row


class RemembersTheLastPass(Evaluation):
    """Leaves what it counted in the file of the second argument and beside it in its home, for the next process."""

    def __init__(self, targets, vocab_size):
        super().__init__(targets, vocab_size)
        self.places, self.last = [Path(sys.argv[2]), Path.home() / "counts.bin"], targets - 1
        for place in self.places:
            with contextlib.suppress(OSError):
                self.counts += np.fromfile(place).reshape(self.counts.shape)

    def row(self, target):
        row = super().row(target)
        for place in self.places if target == self.last else ():
            with contextlib.suppress(OSError):
                self.counts.tofile(place)
        return row


class Stops(Evaluation):
    """Dies where it would be found out."""

    def row(self, target):
        if target > 100:
            sys.exit("no more")
        return super().row(target)


if __name__ == "__main__":
    talk(globals()[sys.argv[1]])
    os._exit(0)

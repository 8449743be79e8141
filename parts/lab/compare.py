"""Runs against a reference: differences with confidence intervals, so that noise is not taken for a gain.

Repetitions of one thing (equal settings, other seeds) are a group, and a group is a row. The interval of a difference of means is
    Welch's (default)   two seeds or more on both sides; their variances may differ
    paired by seed      the mean of the differences seed by seed, for at least two seeds that both sides have
    Student's           one seed on one side: it is taken to vary as the other side does
and with one seed on both sides there is none. scipy.stats computes all three.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from parts.files import UserError
from parts.lab.results import LOCAL_SETTINGS, METRICS, Result, differences

LEVEL = 0.95
WELCH, PAIRED, STUDENT = "Welch", "paired by seed", "Student"


@dataclass
class Group:
    """Repetitions of one thing."""

    name: str
    runs: list[Result] = field(default_factory=list)

    def scores(self, metric: str) -> dict[Result, float]:
        return {run: score for run in self.runs if (score := run.bpb(metric)) is not None}

    @property
    def settings(self) -> dict:
        return next((run.config for run in self.runs if run.config), {})


def group_runs(runs: Sequence[Result]) -> list[Group]:
    """Runs of equal settings and vocabulary but for the seed, under the name that a queue gave them, else the first one's."""
    names = Counter(run.name for run in runs)
    groups: dict[tuple, Group] = {}
    for run in runs:
        settings = tuple(sorted((name, str(value)) for name, value in run.config.items() if name not in LOCAL_SETTINGS))
        key = (run.folder.parent, run.variant) if run.variant else (settings, run.bytes_a_token) if settings else run.folder
        groups.setdefault(key, Group(run.variant or (run.name if names[run.name] == 1 else str(run.folder)))).runs.append(run)
    return list(groups.values())


def interval(ours: dict[Result, float], others: dict[Result, float], paired: bool) -> tuple[tuple[float, float] | None, str]:
    """-> (the interval of mean(ours) − mean(others), the method), or (None, why there is none)."""
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise UserError("intervals need scipy: pip install -r requirements-lab.txt") from None
    if paired:
        mine, theirs = ({run.seed: score for run, score in scores.items()} for scores in (ours, others))
        seeds = sorted(mine.keys() & theirs.keys(), key=str)
        if len(seeds) < 2:
            return None, "fewer than two seeds in common: no interval"
        first, second, method = [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds], PAIRED
    elif len(ours) + len(others) < 3:
        return None, "one seed: no interval"
    else:
        first, second, method = list(ours.values()), list(others.values()), WELCH if min(len(ours), len(others)) > 1 else STUDENT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of scores that are all the same, which is said below
        test = stats.ttest_rel(first, second) if paired else stats.ttest_ind(first, second, equal_var=method == STUDENT)
        bounds = test.confidence_interval(LEVEL)
    if not (math.isfinite(bounds.low) and bounds.low < bounds.high):
        return None, "no variance between seeds: no interval"
    return (float(bounds.low), float(bounds.high)), method


@dataclass
class Row:
    """A group's line. Differences are to the reference's mean; a lower val_bpb is better."""

    name: str
    changes: str  # settings in which it differs from the reference
    runs: int
    mean: float | None = None
    deviation: float | None = None
    difference: float | None = None
    bounds: tuple[float, float] | None = None
    method: str = ""
    verdict: str = ""
    tokens_per_second: float | None = None
    bytes_total: float | None = None
    seconds: float | None = None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


class Table:
    """Rows of groups, best first; those without a score last."""

    def __init__(self, runs: Sequence[Result], reference: str = "", metric: str = "", paired: bool = False):
        groups = group_runs(runs)
        self.metric = metric or self._common_metric(runs)
        self.reference = self._find_reference(groups, reference)
        self.paired = paired
        self.rows = [self._row(group) for group in groups]
        self.rows.sort(key=lambda row: (row.mean is None, row.mean or 0.0))

    @staticmethod
    def _common_metric(runs: Sequence[Result]) -> str:
        """The evaluation's score if every run that was trained has one, else that of the float weights."""
        trained = [run for run in runs if run.float_bpb is not None]
        return "score" if all(run.bpb("score") is not None for run in trained) else "float"

    def _find_reference(self, groups: list[Group], wanted: str) -> Group:
        if wanted:
            for group in groups:
                if wanted == group.name or any(wanted in (run.name, str(run.folder)) for run in group.runs):
                    return group
            raise UserError(f"no run is called {wanted}; there are {', '.join(group.name for group in groups)}")
        queues = [group for group in groups if any(run.job.get("reference") for run in group.runs)]
        return next((group for group in [*queues, *groups] if group.scores(self.metric)), [*queues, *groups][0])

    def _row(self, group: Group) -> Row:
        row = Row(group.name, " ".join(differences(group.settings, self.reference.settings)), 0)
        scores = group.scores(self.metric)
        row.runs = len(scores)
        failed = [run for run in group.runs if run.state == "failed"]
        states = [run.state for run in group.runs if run not in scores]
        if not scores:
            row.verdict = f"failed: {failed[0].error}" if failed else states[0] if states else ""
            return row
        row.mean = statistics.fmean(scores.values())
        row.deviation = statistics.stdev(scores.values()) if len(scores) > 1 else None
        row.tokens_per_second = _mean([run.tokens_per_second for run in scores])
        row.bytes_total = _mean([run.bytes_total for run in scores])
        row.seconds = _mean([run.train_seconds for run in scores])
        if group is self.reference:
            row.verdict = "reference"
        elif others := self.reference.scores(self.metric):
            row.difference = row.mean - statistics.fmean(others.values())
            if {run.bytes_scored for run in scores} != {run.bytes_scored for run in others}:
                row.verdict = "scored on other text: no comparison"
            else:
                row.bounds, row.method = interval(scores, others, self.paired)
                row.verdict = self._verdict(row)
        if states:
            row.verdict += f"; {len(states)} more {' '.join(sorted(set(states)))}"
        return row

    @staticmethod
    def _verdict(row: Row) -> str:
        if row.bounds is None:
            return row.method
        low, high = row.bounds
        return "better" if high < 0 else "worse" if low > 0 else "within noise"

    def notes(self) -> list[str]:
        """What the figures are: the header of every form of the table."""
        notes = [f"val_bpb: {METRICS[self.metric]}; mean over seeds ± standard deviation, lower is better"]
        methods = list(dict.fromkeys(row.method for row in self.rows if row.bounds))
        if methods:
            explained = {
                WELCH: "Welch's t (two samples, unequal variances)",
                PAIRED: "t of the differences paired by seed",
                STUDENT: "Student's t for runs of one seed, taken to vary as the other side does",
            }
            notes.append(f"difference to {self.reference.name}, {LEVEL:.0%} interval: {'; '.join(explained[method] for method in methods)}")
            compared = sum(row.bounds is not None for row in self.rows)
            if compared >= 1 / (1 - LEVEL) / 4:
                notes.append(
                    f"of {compared} differences that are nothing, {compared * (1 - LEVEL):.1f} would be expected outside their intervals"
                )
        elif not self.reference.scores(self.metric):
            notes.append(f"nothing to compare with: {self.reference.name} has no such score")
        elif len(self.rows) > 1:
            notes.append(f"difference to {self.reference.name}; one seed on each side tells no noise: there is no interval")
        return notes

    COLUMNS = ("run", "seeds", "val_bpb", "±", "difference", "interval", "verdict", "tokens/s", "bytes", "seconds", "settings")

    def cells(self) -> list[list[str]]:
        def shown(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        return [
            [
                row.name,
                str(row.runs or ""),
                shown(row.mean, ".4f"),
                shown(row.deviation, ".4f"),
                shown(row.difference, "+.4f"),
                f"{row.bounds[0]:+.4f} … {row.bounds[1]:+.4f}" if row.bounds else "",
                row.verdict,
                shown(row.tokens_per_second, ",.0f"),
                shown(row.bytes_total, ",.0f"),
                shown(row.seconds, ",.0f"),
                row.changes,
            ]
            for row in self.rows
        ]

    def text(self) -> str:
        """For a terminal: long lists of settings are cut."""
        rows = [[*cells, settings if len(settings) <= 80 else settings[:79] + "…"] for *cells, settings in self.cells()]
        return "\n".join([*self.notes(), "", *columns([list(self.COLUMNS), *rows])])

    def markdown(self) -> str:
        return "\n".join(["\n".join(f"{note}  " for note in self.notes()), "", *markdown_table(self.COLUMNS, self.cells())])

    def csv(self) -> str:
        """Unrounded; the notes are comment lines in front."""
        out = io.StringIO()
        out.writelines(f"# {note}\n" for note in self.notes())
        writer = csv.writer(out, lineterminator="\n")
        figures = ("val_bpb", "deviation", "difference", "low", "high")
        writer.writerow(["run", "seeds", *figures, "verdict", "tokens_per_second", "bytes", "seconds", "settings"])
        for row in self.rows:
            low, high = row.bounds or (None, None)
            figures = (row.mean, row.deviation, row.difference, low, high)
            writer.writerow([row.name, row.runs, *figures, row.verdict, row.tokens_per_second, row.bytes_total, row.seconds, row.changes])
        return out.getvalue().rstrip("\n")


NUMBERS = {"seeds", "val_bpb", "±", "difference", "interval", "tokens/s", "bytes", "seconds"}


def columns(rows: Sequence[Sequence[str]], least: int = 0) -> list[str]:
    """Rows of text under each other, the first the header; columns without any content are left out."""
    kept = [index for index in range(len(rows[0])) if index < least or any(row[index] for row in rows[1:])]
    widths = {index: max(len(row[index]) for row in rows) for index in kept}
    return [
        "  ".join(f"{row[i]:>{widths[i]}}" if rows[0][i] in NUMBERS else f"{row[i]:<{widths[i]}}" for i in kept).rstrip() for row in rows
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; columns without any content are left out."""
    kept = [index for index in range(len(header)) if any(row[index] for row in rows)] or [0]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells[index].replace("|", r"\|") for index in kept) + " |"

    numbers = {
        i for i in kept if all(re.fullmatch(r"[-+]?\d[\d.,]*( ± [\d.]+)?( ?[%KM])?( \(\d+ of \d+\))?", row[i]) for row in rows if row[i])
    }
    return [line(header), "|" + "|".join("---:" if i in numbers else "---" for i in kept) + "|", *map(line, rows)]

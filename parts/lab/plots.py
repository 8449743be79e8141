"""Pictures of runs: curves over seconds, steps or tokens, and scores against bytes and seconds. PNG for the screen, SVG for print.

Runs of equal settings share a colour and a label, which stands at the end of their lines where there are few, else in a legend. Colours are
Okabe and Ito's, which readers with colour blindness tell apart; from the ninth group on the line's style tells them too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parts.files import UserError, atomic_write
from parts.lab.compare import group_runs
from parts.lab.results import Result

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # of lines, and of marks
LABEL_HEIGHT = 0.045  # of a name, as a share of the axes
DIRECT_LABELS = 8  # more would not fit beside each other
BEGIN = 0.05  # share of the run that loss curves leave out: the fall from ln(vocabulary) would take all of the height

X_AXES = {"seconds": "seconds of training", "steps": "steps", "tokens": "training tokens"}


@dataclass
class Series:
    """A line or, of a single place, a mark."""

    label: str
    index: int  # of its group: colour and style
    xs: list[float]
    ys: list[float]


def place(run: Result, event: dict, x: str) -> float | None:
    """Where an event lies on an axis."""
    if x == "seconds":
        return event.get("elapsed")
    step = event.get("step")
    if x == "steps" or step is None:
        return step
    done = run.last("done")
    tokens = done.get("batch_tokens") or (
        done.get("tokens", 0) / done["steps"] if done.get("steps") else run.config.get("train_batch_tokens")
    )
    return step * tokens if tokens else None


def points(run: Result, events: Sequence[dict], key: str, x: str) -> tuple[list[float], list[float]]:
    """A value of some events over an axis."""
    found = []
    for event in events:
        at, value = place(run, event, x), event.get(key)
        if all(isinstance(number, (int, float)) and math.isfinite(number) for number in (at, value)):
            found.append((at, value))
    return [at for at, _ in found], [value for _, value in found]


def curves(runs: Sequence[Result], choose: Callable[[Result], Sequence[Sequence[dict]]], key: str, x: str) -> list[Series]:
    """Lines of `key`, one for each list of events that `choose` takes from a run."""
    found = []
    for index, group in enumerate(group_runs(runs)):
        for run in group.runs:
            for events in choose(run):
                xs, ys = points(run, events, key, x)
                if xs:
                    found.append(Series(label_of(group.name), index, xs, ys))
    return found


def training(run: Result) -> list[list[dict]]:
    return [run.events("train")]


def begun(run: Result) -> list[list[dict]]:
    """Training after the first fall."""
    return [[event for event in run.events("train") if event.get("progress", 1.0) >= BEGIN]]


def validations(run: Result) -> list[list[dict]]:
    """The raw weights' line, and the averaged weights' mark at its end, which is the run's result."""
    events = run.events("validation")
    averaged = [event for event in events if event.get("label") == "ema"][-1:]
    raw = [event for event in events if event.get("label") == "raw"]
    return [raw if len(raw) > 1 or not averaged else [], averaged]


def scores(runs: Sequence[Result], against: Callable[[Result], float | None]) -> list[Series]:
    """The last score of each run against a figure of it."""
    found = []
    for index, group in enumerate(group_runs(runs)):
        for run in group.runs:
            score = run.bpb("score") if run.bpb("score") is not None else run.float_bpb
            if score is not None and (value := against(run)) is not None:
                found.append(Series(label_of(group.name), index, [value], [score]))
    return found


def label_of(name: str) -> str:
    """A group's name in short: records/base/logs is base."""
    path = Path(name)
    return path.parent.name if path.name == "logs" else path.name


@dataclass
class Figure:
    name: str
    series: list[Series]
    x: str
    y: str

    @property
    def digest(self) -> str:
        """Of what it shows, whatever draws it; the SVG has it in its metadata."""
        return hashlib.sha256(repr([(line.label, line.xs, line.ys) for line in self.series]).encode()).hexdigest()


# What is drawn over an axis of X_AXES: which events of a run, what of them, and the label of the heights.
CURVES = {
    "loss": (begun, "train_loss", "training loss, nats a token"),
    "val_bpb": (validations, "val_bpb", "val_bpb, float weights (dot: their average, the result)"),
    "lr": (training, "lr", "learning rate, share of its peak"),
}
# What the last score is drawn against: a run's figure, and its label.
SCORES = {
    "bytes": (lambda run: run.bytes_total and run.bytes_total / 1e6, "MB, model and code"),
    "seconds": (lambda run: run.train_seconds, X_AXES["seconds"]),
}
KINDS = (*CURVES, *SCORES)


def figures(runs: Sequence[Result], kinds: Sequence[str], xs: Sequence[str]) -> list[Figure]:
    """What was asked for (of KINDS, over X_AXES) and has anything to show."""
    made = []
    for kind in kinds:
        if kind in CURVES:
            choose, key, y = CURVES[kind]
            made += [Figure(f"{kind}_{x}", curves(runs, choose, key, x), X_AXES[x], y) for x in xs]
        else:
            against, x = SCORES[kind]
            made.append(Figure(kind, scores(runs, against), x, "val_bpb, last stage"))
    return [figure for figure in made if figure.series]


def spread(wanted: Sequence[float], least: float) -> list[float]:
    """Heights within 0 … 1 that are at least `least` apart, in the order of the wanted ones and as near to them as that allows."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    clusters: list[tuple[float, list[int]]] = []  # middle, members
    for i in order:
        middle, members = wanted[i], [i]
        while clusters and middle - clusters[-1][0] < least * (len(members) + len(clusters[-1][1])) / 2:
            _, before = clusters.pop()
            members = before + members
            half = least * (len(members) - 1) / 2
            middle = max(half, min(1 - half, sum(wanted[j] for j in members) / len(members)))
        clusters.append((middle, members))
    heights = [0.0] * len(wanted)
    for middle, members in clusters:
        for rank, i in enumerate(members):
            heights[i] = middle + (rank - (len(members) - 1) / 2) * least
    return heights


def draw(figure: Figure, folder: Path, suffixes: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write folder/NAME.png and .svg -> their paths."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("plots need matplotlib: pip install -r requirements-lab.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6,
        "svg.fonttype": "none", "svg.hashsalt": "lab", "savefig.dpi": 160,
    }  # fmt: skip
    with pyplot.rc_context(style):
        canvas, axes = pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
        try:
            _draw(figure, axes)
            written = []
            for suffix in suffixes:
                path = folder / f"{figure.name}.{suffix}"
                with atomic_write(path) as temporary:
                    told = {"Date": None, "Description": f"SHA-256 of the data: {figure.digest}"} if suffix == "svg" else None
                    canvas.savefig(temporary, format=suffix, metadata=told)
                written.append(path)
            return written
        finally:
            pyplot.close(canvas)


def _draw(figure: Figure, axes) -> None:
    marks = all(len(series.xs) == 1 for series in figure.series)
    groups: dict[int, list[Series]] = {}
    for series in figure.series:
        groups.setdefault(series.index, []).append(series)
    width = 1.0 if len(figure.series) > 2 * len(groups) else 1.5  # several seeds lie close together
    for number, members in groups.items():
        line, mark = STYLES[number // len(COLOURS) % len(STYLES)]
        for nth, series in enumerate(members):
            axes.plot(
                series.xs, series.ys, linestyle="" if marks else line, color=COLOURS[number % len(COLOURS)], linewidth=width,
                marker=mark if len(series.xs) == 1 else None, markersize=4.5, label=series.label if not nth else None,
            )  # fmt: skip
    axes.set_xlabel(figure.x)
    axes.set_ylabel(figure.y)
    axes.margins(x=0.08 if marks else 0.02)
    if figure.x == X_AXES["tokens"]:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.0f}M")
    if len(groups) > DIRECT_LABELS:
        axes.figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    else:
        _label(axes, [max(reversed(members), key=lambda series: series.xs[-1]) for members in groups.values()], marks)


def _label(axes, last: Sequence[Series], marks: bool) -> None:
    """Names beside the axes, joined to their lines' ends; of marks, beside these, to the left where the axes end on the right."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    places = [((series.xs[-1] - left) / (right - left), (series.ys[-1] - low) / (high - low)) for series in last]
    rightmost = max(x for x, _ in places)
    columns = [round(5 * x) if marks else 0 for x, _ in places]  # names of marks stand in each other's way within one
    heights = [0.0] * len(last)
    for column in set(columns):
        members = [i for i in range(len(last)) if columns[i] == column]
        for i, height in zip(members, spread([places[i][1] for i in members], LABEL_HEIGHT)):
            heights[i] = height
    for series, (x, y), height in zip(last, places, heights):
        colour = COLOURS[series.index % len(COLOURS)]
        side = -1 if marks and x > 0.75 else 1
        at = x + 0.02 * side if marks else 1.02
        far = abs(height - y) > 0.01 or (not marks and x < rightmost)
        axes.annotate(
            series.label, (x, y), xytext=(at, height), xycoords="axes fraction", textcoords="axes fraction", color=colour, va="center",
            ha="left" if side > 0 else "right", annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5} if far else None,
        )  # fmt: skip


def plot(runs: Sequence[Result], kinds: Sequence[str], xs: Sequence[str], folder: Path) -> list[Path]:
    """Draw what was asked for -> the files. Raises UserError where there is nothing to draw."""
    drawn = [path for figure in figures(runs, kinds, xs) for path in draw(figure, folder)]
    if not drawn:
        raise UserError(f"these {len(runs)} runs have nothing to show of {', '.join(kinds)}")
    return drawn

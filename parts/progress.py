"""How far a pass is: on a terminal one line that is written over, in a log a line now and then of what takes minutes. Standard library only."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable

DELAY = 1.0  # seconds that a pass may take before it is shown
INTERVAL = 0.2  # seconds between two looks at it
STRETCH = 15.0  # the rate is that of the last seconds, so many to twice as many
EVERY = 30.0  # seconds between two lines of the log
LONG = 60.0  # seconds left from which on that is worth one

_shown: Progress | None = None  # the one whose line stands on the terminal


def duration(seconds: float) -> str:
    """42s, 7m, 3.5h."""
    return f"{seconds:.0f}s" if seconds < 90 else f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"


def quantity(value: float) -> str:
    """0.25, 950, 12.30K, 1.05M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


class Progress:
    """A pass over `total` things, as a context; call it with how many more of them are done.

        with Progress("sliding windows", targets, "tok", log) as advance:
            for batch in batches:
                advance(len(batch))

    log: told now and then while minutes are left; None: nobody is. shown: False on all ranks but one.
    """

    def __init__(self, label: str, total: int, unit: str, log: Callable[[str], None] | None = None, shown: bool = True):
        self.label, self.total, self.unit, self.log, self.done = label, max(total, 1), unit, log if shown else None, 0
        self.live = shown and sys.stderr is not None and sys.stderr.isatty()
        self.rate = 0.0  # a second, lately; 0: not known yet

    def __enter__(self) -> Progress:
        self.began = time.monotonic()
        self.due, self.speak = self.began + DELAY, self.began
        self.marks: list[tuple[float, int]] = []  # when how many were done
        return self

    def __call__(self, count: int = 1) -> None:
        global _shown
        self.done += count
        if not self.done:
            return
        now = time.monotonic()
        if not self.marks or now - self.marks[-1][0] >= STRETCH:  # from the first on: compilation came before it
            self.marks = [*self.marks[-2:], (now, self.done)]
        if now < self.due:
            return
        self.due = now + INTERVAL
        since, before = self.marks[-2:][0]
        self.rate = (self.done - before) / (now - since) if now > since else 0.0
        if self.log and self.rate and len(self.marks) == 3 and now >= self.speak:  # 3: what was slow after the first is behind, too
            self.speak = now + max(EVERY, (now - self.began) / 20)  # an hour's pass is no hundred lines
            if self.left >= LONG:
                self.log(f"{self.label}: {self.share:.0%} of {quantity(self.total)} {self.unit}, {self.pace}")
        if self.live:
            line = f"{self.label} {self.share:4.0%} {quantity(self.done)}/{quantity(self.total)} {self.unit} {self.pace}"
            sys.stderr.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            sys.stderr.flush()
            _shown = self

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total)

    @property
    def left(self) -> float:
        """Seconds to go; infinite while nobody can tell."""
        return max(0, self.total - self.done) / self.rate if self.rate else math.inf

    @property
    def pace(self) -> str:
        """20/s eta 49s; empty while nobody can tell."""
        return f"{quantity(self.rate)}/s eta {duration(self.left)}" if self.rate else ""

    def __exit__(self, *_) -> None:
        erase()


def erase() -> None:
    """Take the line off the terminal, so that another can be printed there; the next look puts it back."""
    global _shown
    if _shown is not None:
        _shown = None
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

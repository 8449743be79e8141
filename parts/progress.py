"""How far a pass is: on a terminal one line that is written over, in a log nothing but a word of what will take minutes. Standard library only."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

DELAY = 1.0  # seconds that a pass may take before it is shown
INTERVAL = 0.2  # seconds between two looks at it
SETTLED = 5.0  # seconds after which what is left can be told
LONG = 120.0  # seconds left from which on that is worth a line of the log

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

    log: told once, early, if the pass will take minutes; None: nobody is. shown: False on all ranks but one.
    """

    def __init__(self, label: str, total: int, unit: str, log: Callable[[str], None] | None = None, shown: bool = True):
        self.label, self.total, self.unit, self.log, self.done = label, max(total, 1), unit, log if shown else None, 0
        self.live = shown and sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self.began = time.monotonic()
        self.due = self.began + DELAY
        return self

    def __call__(self, count: int = 1) -> None:
        global _shown
        self.done += count
        now = time.monotonic()
        if now < self.due or not self.done:
            return
        self.due, took = now + INTERVAL, now - self.began
        share = min(1.0, self.done / self.total)
        left = took / share - took
        if self.log and took >= SETTLED:
            if left >= LONG:
                rate = f"{quantity(self.done / took)}/s"
                self.log(f"{self.label}: about {duration(left)} to go ({quantity(self.total)} {self.unit} at {rate})")
            self.log = None
        if self.live:
            line = f"{self.label} {share:4.0%} {quantity(self.done)}/{quantity(self.total)} {self.unit} {quantity(self.done / took)}/s eta {duration(left)}"
            sys.stderr.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            sys.stderr.flush()
            _shown = self

    def __exit__(self, *_) -> None:
        erase()


def erase() -> None:
    """Take the line off the terminal, so that another can be printed there; the next look puts it back."""
    global _shown
    if _shown is not None:
        _shown = None
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

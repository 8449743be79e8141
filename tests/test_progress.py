"""Progress: a line that a terminal shows and writes over, a word in the log of what takes minutes, and nothing else anywhere."""

import io

import pytest

from parts import progress, runs
from parts.progress import Progress, duration, quantity


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def work(clock, seconds: list[float], said: list, **options) -> None:
    with Progress("sliding windows", 1000, "tok", said.append, **options) as advance:
        for spent in seconds:
            clock(spent)
            advance(10)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_it_and_a_file_does_not(terminal, clock, monkeypatch, capsys):
    stream, said = Stream(terminal), []
    monkeypatch.setattr(progress.sys, "stderr", stream)
    work(clock, [0.5, 0.5, 0.5, 0.5], said)
    if not terminal:
        assert stream.getvalue() == ""
    else:
        assert "sliding windows   2% 20/1.00K tok 20/s eta 49s" in stream.getvalue()
        assert stream.getvalue().endswith("\r\x1b[K"), "nothing of it stays"
    assert said == [] and capsys.readouterr().out == ""


def test_what_is_soon_done_is_not_shown(clock, monkeypatch):
    stream = Stream(True)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    work(clock, [0.1] * 9, [])
    assert stream.getvalue() == ""
    with Progress("audit", 10, "targets") as advance:
        clock(2)
        advance(0)  # nothing is done yet, and nothing can be told from it
    assert stream.getvalue() == ""


def test_a_line_of_the_log_does_not_land_in_it(clock, monkeypatch, capsys):
    stream = Stream(True)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with Progress("audit", 10, "targets") as advance:
        clock(2)
        advance()
        assert stream.getvalue().endswith("\x1b[K") and not stream.getvalue().endswith("\r\x1b[K")
        runs.print_line("chunk 1")
        assert stream.getvalue().endswith("\r\x1b[K") and capsys.readouterr().out == "chunk 1\n"


def test_minutes_are_announced_once(clock):
    said = []
    work(clock, [4.0] * 5, said)
    assert said == ["sliding windows: about 7m to go (1.00K tok at 2.5/s)"]
    for seconds, options in (
        ([0.1] * 5, {}),
        ([1.0] * 6, {}),
        ([4.0] * 5, {"shown": False}),
    ):  # short, less than two minutes, another rank's
        work(clock, seconds, said, **options)
    assert len(said) == 1


def test_figures_are_short():
    assert [duration(s) for s in (42.4, 420, 12600)] == ["42s", "7m", "3.5h"]
    assert [quantity(n) for n in (0.25, 950, 12_300, 1_050_000)] == ["0.25", "950", "12.30K", "1.05M"]

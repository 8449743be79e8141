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


def test_a_log_has_a_line_now_and_then_while_minutes_are_left(clock):
    said = []
    work(clock, [4.0] * 100, said)
    assert said[0] == "sliding windows: 9% of 1.00K tok, 2.5/s eta 6m" and said[-1].endswith("2.5/s eta 76s")
    assert 8 <= len(said) <= 12, "a line each half minute of 400 s, and none in the last"
    said.clear()
    for seconds, options in (
        ([0.1] * 100, {}),
        ([60.0] + [0.5] * 99, {}),
        ([4.0] * 100, {"shown": False}),
    ):  # short, short behind a minute's compilation, another rank's
        work(clock, seconds, said, **options)
    assert said == []
    work(clock, [36.0] * 100, said)
    assert len(said) < 60, "an hour's log stays short"


def test_compilation_is_no_measure_of_the_rest(clock, monkeypatch):
    """A first unit of five minutes, a second of 20 s, then two a second: what is left is told by these, as soon as there are enough of them."""
    said = []
    work(clock, [300.0, 20.0] + [0.5] * 60, said)
    assert said == []
    with Progress("compressing", 10_000, "tok", said.append) as advance:
        for seconds in [300.0, 20.0] + [0.5] * 600:
            clock(seconds)
            advance()
    assert said[0] == "compressing: 0% of 10.00K tok, 2/s eta 83m" and len(said) == 10 and said[-1].startswith("compressing: 6%")
    stream = Stream(True)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    work(clock, [300.0], said)
    assert stream.getvalue().startswith("\rsliding windows   1% 10/1.00K tok \x1b[K"), "no rate and no end are known yet"


def test_figures_are_short():
    assert [duration(s) for s in (42.4, 420, 12600)] == ["42s", "7m", "3.5h"]
    assert [quantity(n) for n in (0.25, 950, 12_300, 1_050_000)] == ["0.25", "950", "12.30K", "1.05M"]

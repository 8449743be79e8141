"""A run's folder and the process that owns it: its names, its lock, its logs, the signals that end it. Standard library only.

Nothing here may cost a run: a log line that cannot be written is dropped, a signal is remembered until the run can save.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from parts.files import UserError, silence
from parts.progress import erase

# ----------------------------------------------------------------------------------------------------------------------
# What is where
# ----------------------------------------------------------------------------------------------------------------------


def run_folder(name: str | Path) -> Path:
    """A run's folder, named by itself or by its artifact or model."""
    path = Path(name)
    return path.parent if path.is_file() else path


def artifact_file(name: str | Path) -> Path:
    """An artifact, named by itself or by the folder that it is in. Raises UserError that says how one is made."""
    path = Path(name)
    path = path / "artifact.bin" if path.is_dir() else path
    if not path.is_file():
        run = path.parent if (path.parent / "model.safetensors").is_file() else "runs/<RUN_ID>"
        raise UserError(f"{path} does not exist; write it with `python quantize.py {run}`")
    return path


def set_aside(score: Path, aside: Path) -> None:
    """Rename a score, and its log with it."""
    for former, later in ((score, aside), (score.with_suffix(".log"), aside.with_suffix(".log"))):
        with contextlib.suppress(FileNotFoundError):
            os.replace(former, later)


def previous_name(score: Path) -> Path:
    """Where a score lies while the same is computed again."""
    return score.with_name(f"{score.stem}.previous.json")


def free_name(score: Path) -> Path:
    """Where a score stays that is not the next one's: eval.1.json, eval.2.json, …"""
    numbered = (score.with_name(f"{score.stem}.{number}.json") for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())


# ----------------------------------------------------------------------------------------------------------------------
# One process a folder
# ----------------------------------------------------------------------------------------------------------------------

LOCK_NAME = ".lock"


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Own `folder` (made if it is not there) while inside. Raises UserError naming the owner if another process does.

    The kernel holds the lock and drops it with the process, so what a killed owner leaves behind is only its name in `.lock`. Where the
    file system has no locks, that name decides: an owner of this machine that is gone is passed over, one of another machine is believed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _read_owner(path)
            if error.errno == errno.EWOULDBLOCK or alive(owner):
                who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
                raise UserError(f"{folder} is in use by {who} (its lock is {path}); wait for it, or choose another RUN_ID") from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # the file stays: were it removed, a third process could lock its successor while a second holds it


def _read_owner(path: Path) -> dict | None:
    try:
        owner = json.loads(path.read_text())
        return owner if owner.keys() == {"pid", "host", "since"} and isinstance(owner["pid"], int) else None
    except (OSError, ValueError, AttributeError):
        return None


def owner_of(folder: Path) -> dict | None:
    """The process that owns the folder now (pid, host, since); None if none does."""
    owner = _read_owner(folder / LOCK_NAME)
    return owner if alive(owner) else None


def alive(owner: dict | None) -> bool:
    """Whether the process of an owner's name (pid, host) still is there, as far as this machine can tell."""
    if owner is None or owner["host"] != socket.gethostname():
        return owner is not None
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        pass
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Logs
# ----------------------------------------------------------------------------------------------------------------------


class LogFile:
    """Lines appended to a file, each whole or not at all. A full disk costs lines, never the run; what a killed writer left torn is cut off."""

    def __init__(self, path: Path):
        self.lost = 0  # lines that could not be written
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._file).st_size
        start = max(0, size - (1 << 16))  # no line is longer
        end_of_whole = start + os.pread(self._file, size - start, start).rfind(b"\n") + 1
        if end_of_whole < size and (end_of_whole > start or start == 0):
            os.ftruncate(self._file, end_of_whole)

    def write(self, line: str) -> None:
        data = line.encode(errors="backslashreplace") + b"\n"
        with contextlib.suppress(OSError):
            before = os.fstat(self._file).st_size
            try:
                whole = os.write(self._file, data) == len(data)
            except OSError:
                whole = False
            if not whole:
                self.lost += 1
                os.ftruncate(self._file, before)

    def close(self) -> None:
        os.close(self._file)


def print_line(line: str) -> bool:
    """Print to stdout. False if nobody reads it any more (a closed pipe): stdout then leads nowhere, so that no later line fails.

    Where a full disk lies behind stdout the line is lost, and that is all.
    """
    try:
        erase()
        print(line, flush=True)
    except BrokenPipeError:
        silence(sys.stdout)
        return False
    except OSError:
        pass
    return True


def start_mirrors(folder: Path, names: str, log: Callable[[str], None]) -> None:
    """Show a run's metrics elsewhere while it is under way: a `lab.py mirror` of its own for each of these packages (comma-separated).

    Nothing here waits for one or asks how it ended. What it says is in FOLDER/NAME/mirror.out.
    """
    for name in filter(None, names.split(",")):
        if importlib.util.find_spec(name) is None:
            log(f"warning: MIRROR={name}: the package is not installed, nothing is shown there (pip install {name})")
            continue
        command = [sys.executable, str(Path(__file__).resolve().parent.parent / "lab.py"), "mirror", str(folder), "--to", name, "--follow"]
        try:
            (folder / name).mkdir(exist_ok=True)
            with open(folder / name / "mirror.out", "ab") as output:
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                )  # fmt: skip
        except OSError as error:
            log(f"warning: MIRROR={name} cannot be started: {error.strerror or error}")


def read_metrics(folder: Path) -> list[dict]:
    """The events of metrics.jsonl that are the run's history.

    A resumed run goes back to its checkpoint: its `resume` event says at which step, and what came later than that before the resume is left
    out. Lines that are no JSON objects (a damaged file) are left out too.
    """
    history: list[dict] = []
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return history
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            continue
        if event["event"] == "resume" and isinstance(event.get("step"), int):
            last = event["step"]
            history = [old for old in history if not isinstance(old.get("step"), int) or old["step"] <= last]
        history.append(event)
    return history


# ----------------------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal arrived where nothing is left to save."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignal:
    """A context in which the signals that end a run are remembered (`received`), so that it can save and leave at its next good moment.

    SIGTERM, SIGINT; SIGHUP, which a dropped connection sends (not under nohup); SIGUSR1, by which SLURM warns before the time limit.
    torchrun, SLURM, systemd and `timeout` send the same signal more than once, to the process and to its group, within moments:
    that is one request. Whoever asks again after IMPATIENT seconds will not wait, and the process ends as if nothing handled the signal.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    IMPATIENT = 5.0

    def __init__(self):
        self.received, self._first = 0, 0.0  # the signal, and when it came
        self._at_once = False

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.getsignal(number) for number in self.NUMBERS}
        for number in self.NUMBERS:
            if number != signal.SIGHUP or self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = number, now
            with contextlib.suppress(OSError):  # not print(): the signal may have come in the middle of one
                if not self._at_once:
                    os.write(
                        2, f"{signal.Signals(number).name}: saving, then leaving; again after {self.IMPATIENT:g} s: at once\n".encode()
                    )
            if self._at_once:
                raise Stopped(number)
        elif now - self._first >= self.IMPATIENT:
            self.__exit__()
            signal.raise_signal(number)

    def request(self, number: int) -> None:
        """As if the signal had arrived."""
        if not self.received:
            self.received, self._first = number, time.monotonic()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, everything worth keeping is on disk: a signal, also one that arrived before, raises `Stopped`."""
        self._at_once = True
        try:
            if self.received:
                raise Stopped(self.received)
            yield
        finally:
            self._at_once = False


def end_with_parent(poll_seconds: float = 1.0, grace_seconds: float = 120.0) -> None:
    """For a rank that a launcher started: when the launcher is gone, end as by SIGTERM (saving), and after a grace period in any case.

    A launcher killed by SIGKILL ends nobody; the ranks it leaves would train on beside those of the next launch.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_seconds)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()

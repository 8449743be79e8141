"""Files and faults: what every command needs of the system. Standard library only."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

LEFTOVER_SECONDS = 3600  # no file takes that long to write


class UserError(Exception):
    """A fault of input: shown as one line, exit code 2."""


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def fault_line(error: UserError | OSError) -> str:
    """A fault as one line; the system's with the file that it is about."""
    return one_line(error if isinstance(error, UserError) else f"{error.filename or ''}: {error.strerror or error}".lstrip(": "))


def lost_rank(error: BaseException) -> str | None:
    """What to say where another rank has gone, which gloo and NCCL report as runtime errors; None for any other error."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "DistError" in kinds or ("RuntimeError" in kinds and "gloo" in str(error)):
        reason = re.sub(r" ?\[.*?\](:\d+)?", "", one_line(error)).strip().split(". ")[0]  # without addresses and gloo's source lines
        return f"lost touch with another rank ({reason[:160]}), whose own message says why"
    return None


def machine_fault(error: BaseException) -> str | None:
    """What to say of an error that is the machine's: no memory is left, or another rank has gone; None for any other."""
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error) or isinstance(error, MemoryError):
        said = re.sub(r"^\[enforce fail at .*?\]( \S+ == \d+\.)? ?", "", one_line(error))  # torch's source line
        what = f"out of memory ({said[:120]})" if said else "out of memory"
        return f"{what}; lower MICRO_BATCH_TOKENS in training, EVAL_BATCH_SEQS or TTT_DOC_LANES in evaluation"
    return lost_rank(error)


def report_fault(line: str) -> None:
    """One line on stderr. Ranks that torchrun started leave theirs to it, all but the first: its summary names rank and fault."""
    rank, summary = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:
        with contextlib.suppress(OSError), open(summary, "w") as file:
            details = {"py_callstack": line, "timestamp": str(int(time.time()))}  # torchrun shows the first of these
            json.dump({"message": {"message": line, "extraInfo": details}}, file)
    if rank == "0" or not summary:
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"error: {line}" if rank == "0" else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Let a stream lead nowhere, so that neither what it still holds nor a later line fails."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _flush() -> None:
    print(end="", flush=True)  # not sys.stdout's own: there may be none


def flush_stdout() -> None:
    """What stdout still holds is written or dropped now, where it is no fault: at the interpreter's end it would be exit code 120."""
    try:
        _flush()
    except OSError:
        silence(sys.stdout)


def _unread(stream: TextIO | None) -> bool:
    """Whether the stream is a pipe whose reader has gone (`| head`)."""
    poll = select.poll()
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream of the system's, or none at all
        poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _outcome(act: Callable[[], int | None]) -> int:
    """Act; the exit code of how that ended, after its one line on stderr."""
    try:
        return act() or 0
    except SystemExit as end:  # argparse's, after --help
        return end.code or 0
    except (UserError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        if isinstance(error, BrokenPipeError) and (_unread(sys.stdout) or _unread(sys.stderr)):
            return 128 + signal.SIGPIPE
        report_fault(fault_line(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not (fault := machine_fault(error)):
            raise
        report_fault(fault)
        return 2
    except KeyboardInterrupt:  # training handles the signal itself and saves; elsewhere nothing is half-written
        report_fault("interrupted")
        return 130


def cli(main: Callable[[], int | None]) -> None:
    """Run a command's main(), then exit: a `UserError` or `OSError` becomes one clear line on stderr and exit code 2, as does the loss of
    another rank or the end of memory; Ctrl-C is exit code 130; where nobody reads any more what is printed, SIGPIPE's code is all that is said."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding than UTF-8 (Latin-1, ASCII) has no "→", no terminal has a file name that is not text.
        with contextlib.suppress(AttributeError):  # not a text stream of the system's: a caller replaced it
            stream.reconfigure(errors="backslashreplace")
    code = _outcome(main) or _outcome(_flush)
    flush_stdout()
    sys.exit(code)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it over `path`, on failure remove it. Once it returns, a power cut takes neither
    the contents nor the name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps the orphaned worker of a killed run out of its successor's way. What a kill left is known by its age.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # whoever wrote it has just finished
            if leftover.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                leftover.unlink()
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # a folder that may be written but not listed, a file system that syncs no folders
            _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk says only what, not where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    with atomic_write(path) as temporary:
        # A file name that is not text holds half surrogates: "backslashreplace" spells them as JSON does.
        temporary.write_bytes(json.dumps(value, indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def read_json(path: str | Path) -> dict | None:
    """The object in `path`, or None when there is no such file or it is not a JSON object."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

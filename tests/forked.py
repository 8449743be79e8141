"""Processes that have imported the suite already: a test of a command, or of several ranks, pays for what they do and not for importing torch.

A server imports everything once a test session (multiprocessing's forkserver) and forks. The child takes on the environment, the folder, the
streams and the arguments of `python SCRIPT ...`, and then is that process, `__main__`, exit code and signals included. What it cannot show is
what happens before a first line of ours runs: imports, torchrun. Tests of those start an interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LATE = ("torch._dynamo", "sentencepiece", "safetensors.torch")  # what the commands import when they come to it
_CONTEXT = multiprocessing.get_context("forkserver")


def server() -> None:
    """Start the server, unless it runs: with ROOT on its path, which multiprocessing keeps from it, and one thread for all its children."""
    from multiprocessing import forkserver

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=f"{ROOT}{os.pathsep}{Path(__file__).parent}", OMP_NUM_THREADS="1")
    try:
        _CONTEXT.set_forkserver_preload(["codec", "eval_ttt", "quantize", "train_gpt", *LATE, __name__])
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _become(script: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str, out: str, err: str) -> None:
    for path, stream in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, stream)
        os.close(handle)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, errors="backslashreplace")
    assert "train_gpt" in sys.modules, "the server could not import what it is there for"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str(Path(script).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def start(script: str | Path, *arguments, environment: Mapping[str, str], folder=ROOT, out="/dev/null", err="/dev/null") -> BaseProcess:
    """A process under way in `folder`. out, err: files that are appended to, or pipes with a name."""
    server()
    order = (str(script), [*map(str, arguments)], dict(environment), str(folder), str(out), str(err))
    process = _CONTEXT.Process(target=_become, args=order)
    process.start()
    return process


def group(size: int) -> list[dict[str, str]]:
    """For each of so many ranks the variables by which torchrun tells it what it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def finish(processes: Sequence[BaseProcess], timeout: float = 100) -> list[int]:
    """Their exit codes, as subprocess gives them. Raises TimeoutError, having ended them, if they take longer than `timeout` seconds."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    if late:
        raise TimeoutError(f"{len(late)} of {len(processes)} processes did not end within {timeout:.0f} s")
    return [process.exitcode for process in processes]


def run(script: str | Path, *arguments, ranks: int = 1, environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess:
    """Run it to its end in `folder`, on several ranks where asked; what they print is kept there, and given as subprocess.run gives it."""
    files = {name: folder / f".{name}" for name in ("out", "err")}
    for path in files.values():
        path.unlink(missing_ok=True)
    each = [{**environment, **variables} for variables in (group(ranks) if ranks > 1 else [{}])]
    codes = finish([start(script, *arguments, environment=one, folder=folder, **files) for one in each])
    out, err = (path.read_text(errors="surrogateescape") for path in files.values())
    return subprocess.CompletedProcess([str(script), *arguments], next((code for code in codes if code), 0), out, err)

"""An evaluator as a process of its own that gets the text piece by piece (the protocol: parts/REFEREE.md).

    replica = Replica([sys.executable, "eval_ttt.py", "artifact.bin", "--serve"], targets=2047, vocab_size=1024, sandbox=Sandbox(...))
    replica.feed(tokens[:100])              # these exist in its process now, the others do not
    row = replica.rows(99, 100)[0]          # its distribution of token 100 (target 99)

`serve` is the other end, for evaluators that are written in Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from parts.sandbox import main as sandboxed
from parts.sandbox import own_caches

ROOT = Path(__file__).resolve().parent.parent
# Imported here as well, so that a submission that audits itself carries it.
ENTER = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {sandboxed.__module__} import {sandboxed.__name__}; {sandboxed.__name__}()"
ANSWER_SECONDS = 1800  # a first answer may wait for a compiler


class ReplicaError(Exception):
    """The evaluator died, fell silent or answered something else than it was asked."""


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """read: files and folders that the process may read besides the Python installation. secret: files that have to be out of its reach."""

    read: Sequence[str | Path]
    secret: Sequence[str | Path] = ()


class Replica:
    """One process that evaluates. Target t is token t + 1; targets, vocab_size: of the whole text.

    `sandbox_status` says what was verified in the process before the evaluator's code began (parts/sandbox.py).
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        targets: int,
        vocab_size: int,
        block: int = 0,
        sandbox: Sandbox | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.vocab_size, self.known = vocab_size, 0
        self._scratch = tempfile.mkdtemp(prefix="replica_")
        self._errors = tempfile.TemporaryFile()
        environment = {**(os.environ if environment is None else environment), **own_caches(self._scratch)}
        command, passed, ours = [str(part) for part in command], (), None
        if sandbox:
            ours, theirs = os.pipe()
            passed = (theirs,)
            order = {"read": [*map(str, sandbox.read)], "secret": [*map(str, sandbox.secret)], "scratch": self._scratch, "status": theirs}
            command = [sys.executable, "-c", ENTER, json.dumps(order), *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, pass_fds=passed, env=environment
        )
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, AttributeError):  # a megabyte at once where Linux allows it, rows being large
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.sandbox_status = {"files": False, "network": False, "means": []}
        if sandbox:
            os.close(theirs)
            with os.fdopen(ours, "rb") as status:
                self.sandbox_status |= json.loads(status.readline() or "{}")
        self._send({"do": "start", "targets": targets, "vocab_size": vocab_size, "block": block})
        self.introduction: dict | None = None

    @property
    def sandboxed(self) -> bool:
        return bool(self.sandbox_status["files"] and self.sandbox_status["network"])

    def feed(self, tokens: np.ndarray) -> None:
        """The next tokens of the text [n], any integers."""
        self.known += len(tokens)
        self._send({"do": "tokens", "count": len(tokens)}, np.ascontiguousarray(tokens, dtype="<i4").tobytes())

    def ask(self, first: int, last: int) -> None:
        """Ask for the distributions of targets first..last-1; `answer` has them. Tokens 0..last-1 must have been fed."""
        self._asked = last - first
        self._send({"do": "rows", "first": first, "last": last})

    def ready(self) -> None:
        """Wait until its evaluator has begun: model loaded, and compiled."""
        if self.introduction is None:
            self.introduction = self._receive_line()

    def answer(self) -> np.ndarray:
        """Probabilities float32 [n, vocab_size]."""
        self.ready()
        size = self._receive_line().get("bytes")
        if size != self._asked * self.vocab_size * 4:
            raise ReplicaError(f"the evaluator answered {size} bytes where {self._asked} distributions were asked for")
        return np.frombuffer(self._receive(size), dtype="<f4").reshape(self._asked, self.vocab_size)

    def rows(self, first: int, last: int) -> np.ndarray:
        self.ask(first, last)
        return self.answer()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what it no longer reads
                stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._errors.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _send(self, message: dict, payload: bytes = b"") -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n" + payload)
            self.process.stdin.flush()
        except OSError:
            raise self._failure("stopped") from None

    def _failure(self, what: str) -> ReplicaError:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return ReplicaError(f"the evaluator {what}" + (f": {lines[-1]}" if lines else ""))

    def _receive_line(self) -> dict:
        line = bytearray()
        while not line.endswith(b"\n"):
            line += self._receive(1).tobytes()
            if len(line) > 4096:
                raise self._failure("does not speak the protocol")
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError
        except ValueError:
            raise self._failure("does not speak the protocol") from None
        return message

    def _receive(self, size: int) -> np.ndarray:
        data, stream = np.empty(size, np.uint8), self.process.stdout.fileno()
        view = memoryview(data)
        while view:
            if not select.select([stream], [], [], ANSWER_SECONDS)[0]:
                raise self._failure(f"gave no answer in {ANSWER_SECONDS} s")
            part = os.readv(stream, [view])
            if not part:
                raise self._failure("stopped")
            view = view[part:]
        return data


def serve(begin: Callable[[dict], object], source: BinaryIO | None = None) -> None:
    """Answer a referee on stdin and stdout until it closes them. begin(start message) -> an object with feed(tokens int32 [n]) and
    rows(first, last) -> float32 [n, vocab_size]. What else is printed goes to stderr."""
    source = source or sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    session = None
    while line := source.readline():
        message = json.loads(line)
        if message["do"] == "start":
            session = begin(message)
            sink.write(b'{"protocol": 1}\n')
        elif message["do"] == "tokens":
            session.feed(np.frombuffer(source.read(4 * message["count"]), dtype="<i4"))
        elif message["do"] == "rows":
            rows = np.ascontiguousarray(session.rows(message["first"], message["last"]), dtype="<f4")
            sink.write(json.dumps({"bytes": rows.nbytes}).encode() + b"\n")
            sink.write(rows.data)
        sink.flush()

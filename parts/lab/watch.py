"""One local page that shows the runs below a folder, live.

The page polls: a run that ends, a run that begins and a server that is started again are all the same to it. What a request can name is a run
that was found below the folder, by its relative path, or one of the page's three files; nothing in a request is ever made a path of.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from parts.files import UserError
from parts.lab.plots import place
from parts.lab.queue import JOB, tail
from parts.lab.results import LOCAL_SETTINGS, Result, find_runs

PAGE = Path(__file__).resolve().parent / "page"
FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}
POINTS = 400  # of a curve at most: more than a chart has pixels to show
LOG_LINES = 40
# Own files alone, no inline code: what is shown of a log cannot run.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"


class Runs:
    """The runs below a folder, each read again only when its files have changed."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[Path, tuple[tuple, Result]] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[str, Result]:
        """Relative path -> run, newest first."""
        found = {}
        with self._lock:
            for folder in find_runs(self.root):
                state = _state(folder)
                known = self._known.get(folder)
                if known is None or known[0] != state:
                    self._known[folder] = known = (state, Result(folder))
                found[folder] = known
            self._known = found
        ordered = sorted(found.items(), key=lambda item: -max(item[1][0], default=(0,))[0])
        return {folder.relative_to(self.root).as_posix() if folder != self.root else ".": result for folder, (_, result) in ordered}


def _state(folder: Path) -> tuple:
    """(mtime, size, name) of the files that figures come from."""
    state = []
    for name in (JOB, "config.json", "metrics.jsonl", "quantize.json", "eval.json"):
        try:
            entry = os.stat(folder / name)
        except OSError:
            continue
        state.append((entry.st_mtime_ns, entry.st_size, name))
    return tuple(state)


def summary(run: Result) -> dict:
    """A run's line."""
    train, validation = run.last("train"), run.last("validation")
    running = run.state == "running"
    to_go = None
    if running and run.stage == "train" and run.progress and train.get("elapsed"):
        to_go = train["elapsed"] / run.progress * (1 - run.progress)
    last = next((run.bpb(metric) for metric in ("experts", "ttt", "artifact", "float") if run.bpb(metric) is not None), None)
    return {
        "state": run.state,
        "stage": run.stage,
        "progress": run.progress,
        "step": train.get("step"),
        "train_loss": train.get("train_loss"),
        "val_bpb": last if last is not None else validation.get("val_bpb"),
        "tokens_per_second": train.get("tokens_per_second") if running else run.tokens_per_second,
        "memory_gib": run.peak_memory_gib,
        "to_go": to_go,
        "bytes": run.bytes_total,
        "audit": run.audit,
        "preset": run.preset,
        "seed": run.seed,
        "error": run.error,
    }


def thin(xs: Sequence[float], ys: Sequence[float]) -> list[list[float]]:
    """At most POINTS pairs, first and last among them."""
    count = len(xs)
    chosen = range(count) if count <= POINTS else sorted({round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
    return [[xs[i], ys[i]] for i in chosen]


def curve(run: Result, kind: str, key: str) -> dict[str, list[list[float]]]:
    """Points over every axis."""
    points: dict[str, list[list[float]]] = {}
    for x in ("seconds", "steps", "tokens"):
        events = {event.get("step"): event for event in run.events(kind)}  # of two validations of one step the last is the result
        pairs = [(place(run, event, x), event.get(key)) for event in events.values()]
        pairs = [pair for pair in pairs if all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair)]
        points[x] = thin([x for x, _ in pairs], [y for _, y in pairs])
    return points


def details(run: Result) -> dict:
    """What the page shows of a chosen run: curves, settings, audit, the last lines of what it does now."""
    logs = [path for pattern in ("*.log", "*.out") for path in run.folder.glob(pattern)]
    logs = sorted((path for path in logs if path.is_file()), key=lambda path: -path.stat().st_mtime)
    checks = run.evaluation.get("audit", {}).get("checks")
    curves = {"train_loss": "train", "val_bpb": "validation", "lr": "train", "tokens_per_second": "train"}
    return {
        "curves": {key: curve(run, kind, key) for key, kind in curves.items()},
        "settings": {name: value for name, value in run.config.items() if name not in LOCAL_SETTINGS},
        "changed": {
            name: value
            for name, value in run.config.items()
            if run.origins.get(name, "default") not in ("default", "run") and not str(run.origins.get(name)).startswith("preset:")
        },
        "audit": {"verdict": run.audit, "checks": checks if isinstance(checks, list) else []} if run.audit else None,
        "log": {"name": logs[0].name, "lines": tail(logs[0], LOG_LINES)} if logs else None,
    }


def clean(value: object) -> object:
    """What JSON can say: a loss that is no number is null."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        host = self.headers.get("Host", "")
        if not self.server.serves(host):  # a name of another's that points here (DNS rebinding)
            return self.answer(HTTPStatus.MISDIRECTED_REQUEST, b"not this host\n", "text/plain")
        where = urlsplit(self.path)
        if where.path in FILES:
            name, kind = FILES[where.path]
            return self.answer(HTTPStatus.OK, (PAGE / name).read_bytes(), kind)
        if where.path == "/api/runs":
            runs = self.server.runs.read()
            return self.json({"root": str(self.server.runs.root), "runs": [{"id": name, **summary(run)} for name, run in runs.items()]})
        if where.path == "/api/run":
            name = parse_qs(where.query).get("id", [""])[0]
            run = self.server.runs.read().get(name)
            if run is not None:
                return self.json({"id": name, **summary(run), **details(run)})
        return self.answer(HTTPStatus.NOT_FOUND, b"nothing is here\n", "text/plain")

    def json(self, value: object) -> None:
        self.answer(HTTPStatus.OK, json.dumps(clean(value), allow_nan=False).encode(), "application/json")

    def answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # whoever asked has left
            pass

    def log_message(self, *_) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path, host: str, port: int):
        self.runs = Runs(root)
        try:
            self.loopback = host == "localhost" or ip_address(host).is_loopback
        except ValueError:
            self.loopback = False
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}; choose another --port") from None

    def serves(self, host: str) -> bool:
        """Whether a request's Host is this machine's, where only this machine is served."""
        name = urlsplit(f"//{host}").hostname or ""
        return not self.loopback or name in ("localhost", "127.0.0.1", "::1")

    @property
    def address(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}/"


def watch(root: Path, host: str, port: int) -> None:
    """Serve until Ctrl-C."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    with Server(root, host, port) as server:
        print(f"{server.address} shows the runs under {root}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass

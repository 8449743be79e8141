"""A run as its folder tells it: settings, state, figures. Reads what training, quantization and evaluation wrote, and nothing else.

The same for a folder under runs/ and for what is kept of one under records/. A file that is missing or damaged is a figure that is missing.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from parts.files import UserError, read_json
from parts.lab.queue import JOB, find_job, left, sound
from parts.runs import alive, owner_of, read_metrics

MARKS = (JOB, "metrics.jsonl", "config.json")  # any of these makes a folder a run's
# What two runs of the same thing may differ in.
LOCAL_SETTINGS = {"run_id", "runs_dir", "resume", "seed", "data_path", "tokenizer_path", "device", "cache_dir", "mirror"}
METRICS = {
    "score": "what eval.json reports: the last stage that was switched on",
    "experts": "the artifact with test-time training and experts",
    "ttt": "the artifact after score-first test-time training",
    "artifact": "the artifact, sliding windows",
    "float": "the float weights after training",
}


# What figures come from, and is of this kind wherever it stands; other entries may be anything.
NUMBERS = """step steps tokens batch_tokens world_size elapsed progress train_loss lr peak_memory_gib train_seconds train_seconds_with_calibration
    val_loss val_bpb sliding_bpb ttt_bpb experts_bpb bytes_total bytes_scored seed vocab_size train_batch_tokens max_wallclock_seconds"""
KINDS = {**dict.fromkeys(NUMBERS.split(), float), "label": str, "device": str, "audit": dict}
EVENT_KINDS = {**KINDS, "tokens_per_second": float}  # in eval.json those of each stage


def is_run(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in MARKS)  # of a folder that may not be read: no


def find_runs(folder: Path, depth: int = 4) -> Iterator[Path]:
    """Every run's folder at or below `folder`, sorted by name; what lies inside a run's folder is none."""
    if is_run(folder):
        yield folder
    elif depth and os.path.isdir(folder):
        try:
            below = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
        except OSError:
            return
        for path in below:
            yield from find_runs(path, depth - 1)


def read_runs(folders: Iterable[Path]) -> list[Result]:
    """The runs of some folders, each a run's own or one that holds some. Raises UserError where there is none."""
    found: dict[Path, Result] = {}
    for folder in folders:
        before = len(found)
        found |= {path: Result(path) for path in find_runs(folder)}
        if len(found) == before:
            raise UserError(f"{folder}: no run is there")
    return list(found.values())


@dataclass(frozen=True)
class Result:
    """The figures of one run; None where there is none."""

    folder: Path

    @functools.cached_property
    def job(self) -> dict:
        return find_job(self.folder) or {}

    @functools.cached_property
    def _config(self) -> dict:
        return sound(read_json(self.folder / "config.json"), {"config": dict, "origins": dict})

    @functools.cached_property
    def config(self) -> dict:
        """The settings by flat name."""
        return sound(self._config.get("config"), KINDS)

    @property
    def origins(self) -> dict:
        return self._config.get("origins", {})

    @functools.cached_property
    def history(self) -> list[dict]:
        return [sound(event, EVENT_KINDS) for event in read_metrics(self.folder)]

    def events(self, kind: str) -> list[dict]:
        return [event for event in self.history if event["event"] == kind]

    def last(self, kind: str) -> dict:
        return (self.events(kind) or [{}])[-1]

    @functools.cached_property
    def quantized(self) -> dict:
        return sound(read_json(self.folder / "quantize.json"), KINDS)

    @functools.cached_property
    def evaluation(self) -> dict:
        return sound(read_json(self.folder / "eval.json"), KINDS)

    # --- what it is

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def preset(self) -> str:
        """By the origins of its settings; of a queued run, by what it will be started with."""
        named = {str(origin).partition(":")[2] for origin in self.origins.values() if str(origin).startswith("preset:")}
        return min(named) if named else str(self.job.get("environment", {}).get("PRESET", ""))

    @property
    def variant(self) -> str | None:
        return self.job.get("variant")

    @property
    def seed(self) -> int | None:
        return self.config.get("seed", self.job.get("seed"))

    @property
    def error(self) -> str | None:
        return self.job.get("error")

    @property
    def stage(self) -> str | None:
        """What is being done to it now, by whomever."""
        if alive(running := self.job.get("running")):
            return running["stage"]
        return "train" if owner_of(self.folder) else None

    @property
    def state(self) -> str:
        """running, failed, queued, stopped or done: a queued run is done when its last stage is."""
        if self.stage:
            return "running"
        if self.error:
            return "failed"
        if self.job and left(self.job):
            return "stopped" if self.history or self.job["done"] else "queued"
        return "done" if self.job or self.last("done") or self.evaluation else "stopped"

    # --- its figures

    @property
    def float_bpb(self) -> float | None:
        return _number(self.last("done").get("val_bpb"))

    def validated(self, label: str) -> float | None:
        """The last validation during training: "raw" weights or their "ema"."""
        return _number(next((e.get("val_bpb") for e in reversed(self.events("validation")) if e.get("label") == label), None))

    @property
    def bytes_a_token(self) -> float | None:
        """Of the validation text, by what its loss is in nats a token and in bits a byte: what tells one vocabulary from another."""
        scored = next((e for e in reversed(self.events("validation")) if _number(e.get("val_loss")) and _number(e.get("val_bpb"))), None)
        return round(scored["val_loss"] / scored["val_bpb"] / math.log(2), 3) if scored else None

    def bpb(self, metric: str) -> float | None:
        """One of METRICS."""
        if metric == "float":
            return self.float_bpb
        return _number(self.evaluation.get({"score": "val_bpb", "artifact": "sliding_bpb"}.get(metric, f"{metric}_bpb")))

    @property
    def bytes_total(self) -> int | None:
        return self.evaluation.get("bytes_total") or self.quantized.get("bytes_total")

    @property
    def bytes_scored(self) -> int | None:
        """Of the validation text."""
        return self.evaluation.get("bytes_scored") or self.last("validation").get("bytes_scored")

    @property
    def train_seconds(self) -> float | None:
        """Of the training clock, calibration included where there was one."""
        return _number(self.quantized.get("train_seconds_with_calibration") or self.last("done").get("train_seconds"))

    @property
    def tokens_per_second(self) -> float | None:
        """Of training, over the whole run; of one that is not finished, at its last report."""
        return _number(self.last("done").get("tokens_per_second") or self.last("train").get("tokens_per_second"))

    @property
    def peak_memory_gib(self) -> float | None:
        return _number(self.last("train").get("peak_memory_gib"))

    @property
    def device(self) -> str | None:
        return self.last("start").get("device")

    @property
    def audit(self) -> str | None:
        return sound(self.evaluation.get("audit"), {"verdict": str}).get("verdict")

    @property
    def progress(self) -> float | None:
        """The share of its budget that is spent; the step that ends a run may go beyond it."""
        progress = _number(self.last("train").get("progress"))
        return None if progress is None else min(1.0, progress)


def _number(value: object) -> float | None:
    """A figure that can be compared: no infinity, no NaN."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def differences(settings: dict, others: dict) -> list[str]:
    """NAME=value of the settings in which one run differs from another, as far as both say it."""
    changed = {name: value for name, value in settings.items() if name not in LOCAL_SETTINGS and others.get(name, value) != value}
    return [
        f"{name.upper()}={'none' if value == '' else int(value) if isinstance(value, bool) else value}" for name, value in changed.items()
    ]

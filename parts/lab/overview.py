"""What there is: presets, and runs with state and score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from parts.lab.compare import columns
from parts.lab.queue import ROOT
from parts.lab.results import Result, find_runs


def preset_lines(records: Path = ROOT / "records") -> Iterator[str]:
    """Every preset with the first comment of its file."""
    yield "presets (PRESET=…)"
    rows = []
    for path in sorted(records.glob("*/config.env")):
        for file in [path, *sorted(path.parent.glob("*.env"))]:
            name = path.parent.name if file.name == path.name else f"{path.parent.name}/{file.stem}"
            if name not in [row[0] for row in rows]:
                first = next((line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")), "")
                rows.append((name, first))
    width = max((len(name) for name, _ in rows), default=0)
    yield from (f"  {name:<{width}}  {first}".rstrip() for name, first in rows)


def score_text(run: Result) -> str:
    """The last score there is, and what it is of: `1.0383 float`."""
    for metric in ("experts", "ttt", "artifact", "float"):
        if (score := run.bpb(metric)) is not None:
            return f"{score:.4f} {metric}"
    return ""


def state_text(run: Result) -> str:
    if run.state == "running":
        share = f" {run.progress:.0%}" if run.stage == "train" and run.progress else ""
        return f"{run.stage}{share}"
    return run.state


def run_lines(folders: Sequence[Path]) -> Iterator[str]:
    runs = [Result(path) for folder in folders for path in find_runs(folder)]
    if not runs:
        yield f"no runs under {' '.join(map(str, folders))}"
        return
    rows = [("run", "state", "val_bpb", "bytes", "audit", "preset", "error")]
    for run in runs:
        size = f"{run.bytes_total:,}" if run.bytes_total else ""
        rows.append((str(run.folder), state_text(run), score_text(run), size, run.audit or "", run.preset, run.error or ""))
    yield from columns(rows, least=2)

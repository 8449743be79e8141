"""`make demo`: the whole pipeline on the embedded corpus, one command after the other as a user would type them, and a table.

Every step is skipped when its result is there, so a second run only prints the table. Results stay in runs/demo/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from parts.files import UserError, atomic_write, cli
from train_gpt import SIZE_LIMIT_BYTES, resolve_config

ROOT = Path(__file__).resolve().parent


def run(title: str, result: Path, *command: str) -> float:
    """Run one command of the suite unless `result` exists; returns its seconds (0 if skipped)."""
    shown = f"PRESET=demo RUN_ID=demo python {' '.join(command)}"
    if result.exists():
        print(f"== {title}: {result.relative_to(ROOT)} is there ({shown})", flush=True)
        return 0.0
    print(f"== {title}: {shown}", flush=True)
    began = time.perf_counter()
    environment = {**os.environ, "PRESET": "demo", "RUN_ID": "demo", "RUNS_DIR": "./runs", "RESUME": "1"}
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
    if code:
        raise UserError(f"{title} ended with exit code {code}; what was finished stays, and `make demo` goes on from there")
    return time.perf_counter() - began


def main() -> int:
    cfg = resolve_config({"PRESET": "demo"})
    folder = ROOT / "runs" / "demo"
    artifact = folder / "artifact.bin"
    steps = {
        "data": (ROOT / cfg.data_path / "manifest.json", "data/prepare.py", "--vocab-size", str(cfg.vocab_size)),
        "train": (folder / "model.safetensors", "train_gpt.py"),
        "quantize": (artifact, "quantize.py", str(folder.relative_to(ROOT))),
        "evaluate": (folder / "eval.json", "eval_ttt.py", str(artifact.relative_to(ROOT))),
    }
    timings = folder / "demo.json"
    seconds = json.loads(timings.read_text()) if timings.exists() else {}
    for title, (result, *command) in steps.items():
        spent = run(title, result, *command)
        seconds[title] = spent or seconds.get(title, 0.0)
    with atomic_write(timings) as temporary:
        temporary.write_text(json.dumps(seconds))

    done = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [event for event in done if event["event"] == "done"][-1]
    result = json.loads((folder / "eval.json").read_text())
    rows = [
        ("val_bpb, float model", f"{trained['val_bpb']:.4f}", f"non-overlapping windows of {cfg.train_seq_len}"),
        ("val_bpb, artifact, sliding", f"{result['sliding_bpb']:.4f}", f"int{cfg.matrix_bits}, stride {cfg.eval_stride}"),
        ("val_bpb, artifact, after TTT", f"{result['ttt_bpb']:.4f}", "score-first: each token is scored before it is trained on"),
        ("bytes, model", f"{result['bytes_model']:,}", ""),
        ("bytes, code", f"{result['bytes_code']:,}", ""),
        ("bytes, total", f"{result['bytes_total']:,}", f"limit {SIZE_LIMIT_BYTES:,}"),
    ] + [(f"seconds, {title}", f"{spent:.0f}", "") for title, spent in seconds.items()]
    print()
    for name, value, note in rows:
        print(f"{name:<30} {value:>12}  {note}".rstrip())
    print(f"\nresults: {folder.relative_to(ROOT)}/")
    return 0


if __name__ == "__main__":
    cli(main)

"""`make demo`: the whole pipeline on the embedded corpus, one command after the other as a user would type them, and a table.

Every step is skipped when its result is there, so a second run only prints the table. Results stay in runs/demo/.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from parts.files import UserError, cli, read_json, write_json
from parts.runs import read_metrics
from train_gpt import SIZE_LIMIT_BYTES, Config, resolve_config

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
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    if sys.argv[1:]:
        raise UserError(f"unknown argument {sys.argv[1]}: the demo takes none; settings are environment variables")
    cfg = resolve_config({"PRESET": "demo"})
    folder = ROOT / "runs" / "demo"
    artifact = folder / "artifact.bin"
    steps = {
        "data": (ROOT / cfg.run.data_path / "manifest.json", "data/prepare.py", "--vocab-size", str(cfg.model.vocab_size)),
        "train": (folder / "model.safetensors", "train_gpt.py"),
        "quantize": (artifact, "quantize.py", str(folder.relative_to(ROOT))),
        "evaluate": (folder / "eval.json", "eval_ttt.py", str(artifact.relative_to(ROOT))),
        "prove": (folder / "validation.coded", "codec.py", "prove", str(artifact.relative_to(ROOT))),
    }
    timings = folder / "demo.json"
    seconds = {title: spent for title, spent in (read_json(timings) or {}).items() if isinstance(spent, (int, float))}
    for title, (result, *command) in steps.items():
        spent = run(title, result, *command)
        seconds[title] = spent or seconds.get(title, 0.0)
    write_json(timings, seconds)

    print()
    for name, value, note in report(folder, cfg) + [(f"seconds, {title}", f"{seconds[title]:.0f}", "") for title in steps]:
        print(f"{name:<30} {value:>12}  {note}".rstrip())
    print(f"\nresults: {folder.relative_to(ROOT)}/")
    return 0


def report(folder: Path, cfg: Config) -> list[tuple[str, str, str]]:
    """The results as rows (name, value, note)."""
    result = read_json(folder / "eval.json") or {}
    proof = result.get("proof")
    trained = [event for event in read_metrics(folder) if event["event"] == "done"] or [{}]
    rows = [
        ("val_bpb, float model", trained[-1].get("val_bpb"), f"non-overlapping windows of {cfg.train.train_seq_len}"),
        ("val_bpb, artifact, sliding", result.get("sliding_bpb"), f"int{cfg.quant.matrix_bits}, stride {cfg.eval.eval_stride}"),
        ("val_bpb, artifact, after TTT", result.get("ttt_bpb"), "score-first: each token is scored before it is trained on"),
        ("bytes, model", result.get("bytes_model"), ""),
        ("bytes, code", result.get("bytes_code"), ""),
        ("bytes, total", result.get("bytes_total"), f"limit {SIZE_LIMIT_BYTES:,}"),
        ("val_bpb, as a file", result.get("val_bpb_file"), "8 * file / text; restored by a process that cannot read the text"),
        ("bytes, validation text", proof.get("text_bytes") if isinstance(proof, dict) else None, ""),
        ("bytes, compressed", result.get("bytes_file"), f"{folder.name}/validation.coded"),
    ]
    shown = []
    for name, value, note in rows:
        if isinstance(value, (int, float)):
            shown.append((name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}", note))
        else:  # switched off, or its file is damaged
            shown.append((name, "-", f"not in {'metrics.jsonl' if name.endswith('float model') else 'eval.json'}"))
    return shown


if __name__ == "__main__":
    cli(main)

"""Did commits between two change what the suite computes? Every preset at small width on the CPU, in both: `python tests/same_bits.py OLD [NEW]`.

Trained weights, an artifact's symbols, scales and dequantized values, and every score of the evaluation (sliding windows, TTT, each expert, per-chunk
losses) are compared bit by bit. Commits are checked out beside each other under a temporary folder; both read the same shards. Exit code 1 where
they differ. Other arguments are settings for all runs: `python tests/same_bits.py v1 HEAD TTT_OPTIMIZER=adamw`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from conftest import ROOT, clean_environment  # noqa: E402
from test_pipeline import small  # noqa: E402
from test_train import SMALL_WIDTH  # noqa: E402

import train_gpt as T  # noqa: E402

PRESETS = sorted(path.parent.name for path in (ROOT / "records").glob("*/config.env"))
SCORES = ("val_loss", "val_bpb", "sliding_loss", "sliding_bpb", "ttt_bpb", "experts_bpb", "experts", "invalid_cache", "chunk_losses")
FACTS = (*SCORES, "tokens_scored", "bytes_scored")
# A setting under another name before: today's name -> (its former name, what it said for today's values).
FORMERLY = {"TTT_MODE": ("TTT_ENABLED", {"off": "0", "stream": "1"})}
# Read by the commit's own code, in a process of its own: its formats are its own business.
DIGEST = """
import hashlib, json, sys
from safetensors.numpy import load_file
from parts import packing
from parts.artifact import dequantize
folder, facts = sys.argv[1], sys.argv[2].split()
def sha(parts):
    whole = hashlib.sha256()
    for name, data in sorted(parts): whole.update(name.encode() + b"\\0" + data + b"\\0")
    return whole.hexdigest()[:16]
weights = load_file(f"{folder}/model.safetensors")
_, records = packing.unpack_artifact(open(f"{folder}/artifact.bin", "rb").read())
score = json.load(open(f"{folder}/eval.json"))
print(json.dumps({
    "weights": sha((name, value.tobytes()) for name, value in weights.items()),
    "symbols": sha((r.name + r.kind, r.data.tobytes() + (b"" if r.scales is None else r.scales.tobytes())) for r in records),
    "dequantized": sha((r.name, b"" if r.kind == "bytes" else dequantize(r).numpy().tobytes()) for r in records),
    **{name: score.get(name) for name in facts},
}))
"""


def spelt(tree: Path, settings: dict) -> dict:
    """`settings` under the names that they have in the commit checked out at `tree`."""
    source, named = (tree / "train_gpt.py").read_text(), {}
    for name, value in settings.items():
        former, values = FORMERLY.get(name, (name, {}))
        named |= {name: value} if former == name or f" {name.lower()}:" in source else {former: values[value]}
    return named


def run(tree: Path, *command: str, **settings) -> str:
    done = subprocess.run([sys.executable, *command], cwd=tree, env=clean_environment(**settings), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {tree.name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def results(tree: Path, folder: Path, preset: str, shards: dict, settings: dict) -> dict:
    """What `preset` comes to in the commit checked out at `tree`."""
    settings = spelt(tree, settings)
    training = {**SMALL_WIDTH, **small(preset), **shards, "DEVICE": "cpu", "RUNS_DIR": folder, "RUN_ID": preset, **settings}
    if T.resolve_config({"PRESET": preset}).train.train_row_tokens:
        training |= {"TRAIN_ROW_TOKENS": 256, "TRAIN_SEQ_SCHEDULE": "32@0.4,64@1"}
    run(tree, "train_gpt.py", PRESET=preset, TARGET_BYTES=0, **training)
    run(tree, "quantize.py", str(folder / preset), **settings)
    run(tree, "eval_ttt.py", str(folder / preset / "artifact.bin"), **settings)
    return json.loads(run(tree, "-c", DIGEST, str(folder / preset), " ".join(FACTS)))


def build_shards(folder: Path) -> dict[str, str]:
    library = Path(os.__file__).parent
    for split, names in (("train", "argparse ast csv datetime inspect random textwrap"), ("val", "heapq bisect calendar")):
        (folder / split).mkdir()
        for name in names.split():
            (folder / split / f"{name}.txt").write_bytes((library / f"{name}.py").read_bytes())
    out, tokenizer = folder / "shards", folder / "tokenizer.model"
    options = ["--val", str(folder / "val"), "--vocab-size", "512", "--workers", "1", "--out", str(out), "--tokenizer-out", str(tokenizer)]
    run(ROOT, "data/prepare.py", str(folder / "train"), *options)
    return {"DATA_PATH": str(out), "TOKENIZER_PATH": str(tokenizer)}


def main() -> int:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    names = [argument for argument in sys.argv[1:] if "=" not in argument]
    if not 1 <= len(names) <= 2:
        sys.exit("usage: python tests/same_bits.py OLD [NEW] [SETTING=value …]")
    git = lambda *arguments: subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()
    commits = [git("rev-parse", "--short", name) for name in [*names, "HEAD"][:2]]
    print(f"{commits[0]} against {commits[1]}, torch {T.torch.__version__} on the CPU{''.join(f', {k}={v}' for k, v in settings.items())}")
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = build_shards(folder)
        for number, commit in enumerate(commits):
            (folder / f"{number}").mkdir()
            archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", folder / f"{number}"], input=archive, check=True)
        for preset in PRESETS:
            old, new = (results(folder / f"{i}", folder / f"runs{i}", preset, shards, settings) for i in range(2))
            unlike = [name for name in old if old[name] != new[name]]
            different += bool(unlike)
            kept = hashlib.sha256(json.dumps(new, sort_keys=True).encode()).hexdigest()[:16]
            print(f"{preset:<12} weights {new['weights']} symbols {new['symbols']} val_loss {new['val_loss']!r} scores {kept}: ", end="")
            print("equal" if not unlike else "; ".join(f"{name} {old[name]} -> {new[name]}" for name in unlike), flush=True)
    print("bit for bit the same" if not different else f"{different} presets differ")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())

"""Shared fixtures: a tiny real dataset (a few standard-library sources), a tiny configuration, and a way to run the commands."""

import gc
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported: their arithmetic is checked without a GPU
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # started by nohup, whose children would ignore what tests send them
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # models this small gain nothing from two, and lose much where cores are shared

# Small enough that a step takes milliseconds, with every kind of mixer in it.
TINY = {
    "VOCAB_SIZE": "512",
    "LAYER_PATTERN": "GSTA",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "WINDOW_SIZE": "16",
    "GDN_QK_HEADS": "2",
    "GDN_V_HEADS": "2",
    "GDN_HEAD_DIM": "8",
    "BIGRAM_VOCAB_SIZE": "128",
    "BIGRAM_DIM": "16",
    "TRIGRAM_HASH": "1",
    "SMEAR_GATE": "1",
    "XSA_LAYERS": "all",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "512",
    "MAX_WALLCLOCK_SECONDS": "0",
    "ITERATIONS": "12",
    "REFERENCE_STEPS": "12",
    "EMA_DECAY": "0.7",
    "VAL_LOSS_EVERY": "0",
    "VAL_TOKENS": "3000",
    "EVAL_STRIDE": "16",
    "TTT_CHUNK_TOKENS": "512",
    "TTT_EPOCHS": "1",
    "GPTQ_CALIBRATION_BATCHES": "2",
}


def clean_environment(**settings) -> dict[str, str]:
    """The machine's environment without any setting of ours, plus `settings`."""
    from train_gpt import settings as all_settings

    ours = {f.name.upper() for f in all_settings()} | {"PRESET"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return {**environment, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in settings.items()}}


def pytest_collection_finish(session):
    gc.freeze()  # what has been imported stays: the garbage collector went through all of it again and again, a tenth of the time of some tests


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> SimpleNamespace:
    """A tokenizer of 512 pieces and shards, built by data/prepare.py from a few standard-library files."""
    folder = tmp_path_factory.mktemp("dataset")
    text = folder / "text"
    text.mkdir()
    validation = folder / "validation"
    validation.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for target, names in ((text, "argparse ast csv datetime inspect random textwrap"), (validation, "heapq bisect calendar")):
        for name in names.split():
            (target / f"{name}.txt").write_bytes((library / f"{name}.py").read_bytes())
    out, tokenizer = folder / "shards", folder / "tiny.model"
    command = [sys.executable, ROOT / "data" / "prepare.py", text, "--val", validation, "--out", out, "--tokenizer-out", tokenizer]
    command += ["--vocab-size", 512, "--shard-tokens", 50000, "--workers", 1]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    settings = {**TINY, "DATA_PATH": str(out), "TOKENIZER_PATH": str(tokenizer)}
    return SimpleNamespace(path=out, tokenizer=tokenizer, settings=settings)


@pytest.fixture
def launch(dataset, tmp_path):
    """Run a command of the suite as a process of its own, or as several ranks: launch("train_gpt.py", ITERATIONS=3) -> CompletedProcess."""

    def run(script: str, *arguments: str, ranks: int = 1, **settings) -> subprocess.CompletedProcess:
        environment = clean_environment(**{**dataset.settings, "RUNS_DIR": str(tmp_path / "runs"), "DEVICE": "cpu", **settings})
        return forked.run(ROOT / script, *arguments, ranks=ranks, environment=environment, folder=tmp_path)

    run.runs, run.settings = tmp_path / "runs", dataset.settings
    return run

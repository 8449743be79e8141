"""What one command hands to the next is tied by content: tokenizer, shards, model, artifact, score."""

import json
import shutil
import sys

import numpy as np
import pytest
from test_pipeline import command

import demo
import eval_ttt
import quantize as Q
import train_gpt as T
from data.shards import shard_header, split_digest, tokenizer_hash
from parts import packing


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A run of two steps, quantized and scored."""
    runs = tmp_path_factory.mktemp("handover")
    settings = {"RUNS_DIR": runs, "RUN_ID": "run", "DEVICE": "cpu", "ITERATIONS": 2, "EVAL_TOKENS": 300, "LAYER_PATTERN": "AT"}
    command(T, **{**dataset.settings, **settings})
    command(Q, runs / "run")
    command(eval_ttt, runs / "run")  # a folder means its artifact, as for quantize.py
    return runs / "run"


def other_validation(dataset, tmp_path):
    """The same tokens, one of them another; without a manifest, which would tell."""
    folder = shutil.copytree(dataset.path, tmp_path / "other")
    (folder / "manifest.json").unlink()
    shard = folder / "fineweb_val_000000.bin"
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    return folder


def test_hashes_travel_from_the_shards_to_the_score(run, dataset):
    made_from = {
        "tokenizer_sha256": tokenizer_hash(dataset.tokenizer),
        "train_data_sha256": split_digest(dataset.path, "train"),
        "val_data_sha256": split_digest(dataset.path, "val"),
    }
    (checkpoint,) = (run / "checkpoints").iterdir()
    header, _ = packing.unpack_artifact((run / "artifact.bin").read_bytes())
    for meta in (T.load_tensors(checkpoint)[1], T.load_run(run)[2], header):
        assert made_from.items() <= meta.items()
    assert header["model_sha256"] == T.model_digest(run) == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["model_sha256"]
    assert json.loads((run / "eval.json").read_text())["run"]["tokenizer_sha256"] == made_from["tokenizer_sha256"]


def test_a_failed_evaluation_leaves_no_score(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    before = (folder / "eval.json").read_bytes()
    with pytest.raises(T.UserError, match="TTT"):
        command(eval_ttt, folder, TTT_LR=1e30, TTT_CHUNK_TOKENS=64, DEVICE="cpu")
    assert not (folder / "eval.json").exists() and (folder / "eval.1.json").read_bytes() == before
    log = (folder / "eval.log").read_text()
    assert "error: TTT diverged" in log or "error: the loss is not finite" in log


def test_a_score_of_other_settings_stays(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    first, log = (folder / "eval.json").read_bytes(), (folder / "eval.log").read_text()
    assert "val_bpb:" in log and "wrote " in log
    command(eval_ttt, folder / "artifact.bin", TTT_MODE="off")
    assert "eval.json was the score of TTT_MODE=stream: kept as eval.1.json" in capsys.readouterr().out
    assert (folder / "eval.1.json").read_bytes() == first and (folder / "eval.1.log").read_text() == log
    assert "  env: TTT_MODE=off" in (folder / "eval.log").read_text()
    second = (folder / "eval.json").read_bytes()
    command(eval_ttt, folder, "--out", tmp_path / "scores" / "wide.json", TTT_MODE="off", EVAL_STRIDE=32)
    assert json.loads((tmp_path / "scores" / "wide.json").read_text())["config"]["eval_stride"] == 32
    assert (tmp_path / "scores" / "wide.log").exists() and (folder / "eval.json").read_bytes() == second
    command(eval_ttt, folder, TTT_MODE="off")  # the same again: replaced, nothing piles up
    assert sorted(path.name for path in folder.glob("eval.*.json")) == ["eval.1.json"]
    capsys.readouterr()
    command(Q, folder, MATRIX_BITS=5)
    assert "eval.json was the score of what stood here before: kept as eval.2.json" in capsys.readouterr().out
    assert "MATRIX_BITS=5" in (folder / "quantize.log").read_text() and not (folder / "eval.json").exists()
    command(Q, folder / "artifact.bin", "--out", tmp_path / "six")
    assert {path.name for path in (tmp_path / "six").iterdir()} == {"artifact.bin", "evaluate.py", "quantize.json", "quantize.log"}
    assert (tmp_path / "six" / "artifact.bin").read_bytes() == (run / "artifact.bin").read_bytes()
    with pytest.raises(T.UserError, match=r"FILE\.json"):
        command(eval_ttt, folder, "--out", tmp_path / "score")


def test_training_that_makes_the_score_worse_is_remarked_on(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    command(eval_ttt, folder, TTT_LR=30, TTT_CHUNK_TOKENS=64)
    assert "warning: test-time training made the score worse: " in capsys.readouterr().out
    command(eval_ttt, folder, TTT_LR=0.0001)
    assert "worse" not in capsys.readouterr().out


def test_an_artifact_that_is_not_there_says_how_it_is_made(run, tmp_path):
    with pytest.raises(T.UserError, match=r"artifact\.bin does not exist; write it with `python quantize\.py runs/<RUN_ID>`"):
        command(eval_ttt, tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(T.UserError, match=f"write it with `python quantize.py {tmp_path}`"):
        command(eval_ttt, tmp_path / "artifact.bin")


def test_a_shard_that_is_not_the_manifests_is_named(dataset, tmp_path):
    folder = other_validation(dataset, tmp_path)
    shutil.copy(dataset.path / "manifest.json", folder)
    with pytest.raises(T.UserError, match=r"fineweb_val_000000\.bin is not the file that manifest\.json beside it describes"):
        split_digest(folder, "val")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["tokens"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(T.UserError, match=r"fineweb_train_000000\.bin holds .* tokens, but manifest\.json beside it says"):
        split_digest(folder, "train")


@pytest.mark.parametrize("part", range(12))
def test_a_stretch_of_a_large_training_shard_does_not_change_unseen(tmp_path, part):
    """A training shard's digest samples it: a twelfth, wherever it lies, always holds a sample."""
    tokens = np.random.default_rng(0).integers(2, 500, 1_200_000, dtype=np.uint16)
    digests = []
    for changed in (tokens, np.where(np.arange(len(tokens)) // 100_000 == part, 7, tokens)):
        (tmp_path / "fineweb_train_000000.bin").write_bytes(shard_header(len(tokens)) + changed.astype("<u2").tobytes())
        digests.append(split_digest(tmp_path, "train"))
    assert digests[0] != digests[1]


@pytest.mark.parametrize("place", [0, -1])
def test_the_ends_of_a_large_training_shard_are_looked_at(tmp_path, place):
    tokens, digests = np.random.default_rng(0).integers(2, 500, 1_200_000, dtype=np.uint16), []
    for token in (7, 8):
        tokens[place] = token
        (tmp_path / "fineweb_train_000000.bin").write_bytes(shard_header(len(tokens)) + tokens.astype("<u2").tobytes())
        digests.append(split_digest(tmp_path, "train"))
    assert digests[0] != digests[1]


def test_a_score_on_other_validation_data_says_so(run, dataset, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    command(eval_ttt, folder, DATA_PATH=other_validation(dataset, tmp_path), DEVICE="cpu", TTT_MODE="off", EVAL_TOKENS=0)
    assert "are not those the run was validated on" in capsys.readouterr().out
    command(Q, "bundle", folder, "--out", tmp_path / "submission", "--despite", "no-audit")
    assert "the score is on other validation shards" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "target"), [(Q, "."), (eval_ttt, "artifact.bin")])
def test_every_command_refuses_a_tokenizer_that_did_not_write_the_shards(run, dataset, tmp_path, module, target):
    folder = shutil.copytree(dataset.path, tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "ab" * 32
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(T.UserError, match=r"did not write the shards .*: their manifest\.json names a tokenizer with abababababab"):
        command(module, shutil.copytree(run, tmp_path / "run") / target, DATA_PATH=folder, DEVICE="cpu")


def test_calibration_on_other_training_data_says_so(run, dataset, tmp_path, capsys):
    folder, data = shutil.copytree(run, tmp_path / "run"), shutil.copytree(dataset.path, tmp_path / "data")
    (data / "fineweb_train_000001.bin").unlink()
    command(Q, folder, DATA_PATH=data, DEVICE="cpu")
    assert "warning: calibrates on other training shards" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_known_before_the_work(run, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere: the file system has to say it
    with pytest.raises(T.UserError, match="run cannot be written"):
        command(Q, run)
    before = (run / "eval.json").read_bytes()
    command(eval_ttt, run, TTT_MODE="off")
    assert "cannot be written: the score will be printed only" in capsys.readouterr().out
    assert (run / "eval.json").read_bytes() == before and not (run / "eval.previous.json").exists()


def test_the_demo_reports_what_can_be_read(run, tmp_path, monkeypatch, capsys):
    cfg = T.resolve_config({"PRESET": "demo"})
    values = dict(row[:2] for row in demo.report(run, cfg))
    proof = {"val_bpb, as a file", "bytes, validation text", "bytes, compressed"}  # not asked for here
    assert {name for name, value in values.items() if value == "-"} == proof and values["val_bpb, float model"].count(".") == 1
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "eval.json").write_text('{"ttt_bpb": null, "sliding_bpb": 3.25')
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-20])
    assert {row[1] for row in demo.report(folder, cfg)} == {"-"}
    monkeypatch.setattr(sys, "argv", ["demo.py", "--help"])
    assert demo.main() == 0 and "make demo" in capsys.readouterr().out

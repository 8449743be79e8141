"""Training as a user runs it: resume to the bit, signals, ranks, faults; every preset at small width."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, clean_environment

import train_gpt as T


@pytest.fixture
def train(dataset, tmp_path, monkeypatch):
    """train(RUN_ID="a", ITERATIONS=3) runs main() in this process and returns the run's folder."""

    def run(**settings):
        base = {name: dataset.settings[name] for name in ("DATA_PATH", "TOKENIZER_PATH")} if "PRESET" in settings else dataset.settings
        environment = clean_environment(**{**base, "RUNS_DIR": tmp_path / "runs", "DEVICE": "cpu", **settings})
        monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
        with monkeypatch.context() as patch:
            for name in list(T.os.environ):
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            code = T.main()
        return run.folder(settings["RUN_ID"]), code

    run.folder = lambda run_id: tmp_path / "runs" / run_id
    return run


def weights(folder):
    return T.load_run(folder)[1]


def assert_same_weights(a, b, exact=True):
    assert a.keys() == b.keys()
    for name in a:
        if exact:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def events(folder, kind):
    return [event for event in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if event["event"] == kind]


def test_a_run_leaves_what_it_promises(train):
    folder, code = train(RUN_ID="whole", ITERATIONS=30)
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {"train.log", "metrics.jsonl", "config.json", "model.safetensors"}
    losses = [event["train_loss"] for event in events(folder, "train")]
    assert losses[-1] < losses[0] - 0.5
    settings, tensors, meta = T.load_run(folder)
    assert settings["model_dim"] == 32 and meta["steps"] == 30 and meta["looping"] is False
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    log = (folder / "train.log").read_text()
    for part in ("train_loss:", "tok/s:", "full attention flash", "LAYER_PATTERN", "env", "parameters"):
        assert part in log
    model = T.build_model(T.Config.from_dict(settings))
    T.load_weights(model, tensors)
    assert math.isfinite(meta["val_bpb"])


def test_stopping_and_resuming_changes_nothing(train, monkeypatch):
    """6 steps, a kill, the rest: the same bits as the unbroken run, through the checkpoint on disk."""
    looping = {"LAYER_PATTERN": "GATA", "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2, "UNET_SKIPS": 1, "ENABLE_LOOPING_AT": 0.3}
    looping["TRAIN_SEQ_SCHEDULE"] = "32@0.4"
    noise = {"QAT_LAST_FRAC": 0.8, "QAT_MODE": "noise", "QAT_NOISE_SCALE": 1}  # draws random numbers at every step
    whole, _ = train(RUN_ID="whole", **looping, **noise)

    class Killed(Exception):
        pass

    step = T.Trainer.run_step

    def dying_step(trainer, progress):
        if trainer.state.step == 8:
            raise Killed  # between checkpoints, as a power cut would
        return step(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(T.Trainer, "run_step", dying_step)
        with pytest.raises(Killed):
            train(RUN_ID="broken", CHECKPOINT_EVERY=3, **looping, **noise)
    folder = train.folder("broken")
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_0000003.safetensors", "step_0000006.safetensors"]
    torch.manual_seed(999)  # a resumed process starts with other random numbers
    train(RUN_ID="broken", RESUME=1, CHECKPOINT_EVERY=3, **looping, **noise)
    assert_same_weights(weights(whole), weights(folder))
    assert T.load_run(folder)[2]["tokens"] == T.load_run(whole)[2]["tokens"]
    assert len(list((folder / "checkpoints").iterdir())) == 2, "the last two are kept"
    assert "step:5 8 sequences of 64 tokens a step" in (whole / "train.log").read_text()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(train, monkeypatch):
    whole, _ = train(RUN_ID="whole")
    monkeypatch.setattr(T.Trainer, "finish", lambda self: None)
    folder, _ = train(RUN_ID="broken", CHECKPOINT_EVERY=4)
    monkeypatch.undo()
    last = folder / "checkpoints" / "step_0000008.safetensors"
    last.write_bytes(last.read_bytes()[:-1000])
    train(RUN_ID="broken", RESUME=1)
    assert_same_weights(weights(whole), weights(folder))
    assert "trying the one before" in (folder / "train.log").read_text()


def test_resume_refuses_another_model_and_other_data(train):
    train(RUN_ID="run", CHECKPOINT_EVERY=4)
    folder = train.folder("run")
    (folder / "model.safetensors").unlink()
    with pytest.raises(T.UserError, match=r"MLP_MULT=3\.0, but the checkpoint was trained with 2\.0"):
        train(RUN_ID="run", RESUME=1, MLP_MULT=3)
    with pytest.raises(T.UserError, match="already holds a run"):
        train(RUN_ID="run")


def test_unreadable_checkpoints_are_kept_and_named(train, monkeypatch):
    monkeypatch.setattr(T.Trainer, "finish", lambda self: None)
    folder, _ = train(RUN_ID="run", CHECKPOINT_EVERY=4)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(T.UserError, match=r"no checkpoint in .* can be read"):
        train(RUN_ID="run", RESUME=1)
    assert [path.suffix for path in (folder / "checkpoints").iterdir()] == [".damaged", ".damaged"]


@pytest.mark.parametrize("settings", [{"ITERATIONS": 3}, {"CHECKPOINT_EVERY": 3}])
def test_broken_weights_are_never_saved(train, monkeypatch, settings):
    """The loss of a step is computed before its update: a last update that breaks the weights shows in no loss."""
    step = T.Trainer.run_step

    def breaking(trainer, progress):
        loss = step(trainer, progress)
        if trainer.state.step == 3:
            trainer.state.model.blocks[0].mlp.fc.weight.data[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(T.Trainer, "run_step", breaking)
    with pytest.raises(T.TrainingDiverged, match=r"blocks\.0\.mlp\.fc\.weight holds values that are no numbers at step 3"):
        train(RUN_ID="wild", **settings)
    assert not list(train.folder("wild").rglob("*.safetensors"))


def test_reported_score_is_that_of_the_saved_float_weights(train, dataset):
    """QAT's imitation is off while validating."""
    folder, _ = train(RUN_ID="qat", QAT_LAST_FRAC=1, QAT_BITS=3, EMA_DECAY=0)
    settings, tensors, meta = T.load_run(folder)
    cfg = T.Config.from_dict({**settings, "qat_last_frac": 0.0})
    model = T.build_model(cfg)
    T.load_weights(model, tensors)
    table = T.ByteTable.from_tokenizer(T.load_tokenizer(dataset.tokenizer))
    tokens = T.load_tokens(dataset.path, "val", 512, cfg.val_tokens)
    result = T.evaluate(model, tokens, table, cfg, T.RunContext(), cfg.train_seq_len, cfg.train_seq_len)
    assert result.val_bpb == pytest.approx(meta["val_bpb"], abs=1e-6)


def test_finished_run_has_nothing_to_resume(train):
    folder, _ = train(RUN_ID="run", ITERATIONS=2)
    before = (folder / "model.safetensors").read_bytes()
    assert train(RUN_ID="run", RESUME=1, ITERATIONS=2)[1] == 0
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("ranks", [2])
def test_two_processes_train_to_the_weights_of_one(launch, train, ranks):
    one, _ = train(RUN_ID="one", MICRO_BATCH_TOKENS=128, ITERATIONS=5, REFERENCE_STEPS=5)
    result = launch("train_gpt.py", ranks=ranks, RUN_ID="two", MICRO_BATCH_TOKENS=128, ITERATIONS=5, REFERENCE_STEPS=5)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_weights(weights(one), weights(launch.runs / "two"), exact=False)
    first, second = (T.load_run(folder)[2] for folder in (one, launch.runs / "two"))
    assert first["val_bpb"] == pytest.approx(second["val_bpb"], abs=1e-4)
    assert second["world_size"] == 2


def test_only_rank_zero_needs_the_checkpoint(launch, train):
    """Ranks may have disks of their own: rank 0 reads, the others receive, and the result is that of the unbroken run."""
    one, _ = train(RUN_ID="one", MICRO_BATCH_TOKENS=128)
    import os
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(rank, **settings):
        environment = clean_environment(**{**launch.settings, "DEVICE": "cpu", "RUN_ID": "run", "MICRO_BATCH_TOKENS": 128, **settings})
        environment["RUNS_DIR"] = str(launch.runs / f"node{rank}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
        command = [*torchrun, "--master_addr=127.0.0.1", f"--master_port={port}", str(ROOT / "train_gpt.py")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    for settings in ({"CHECKPOINT_EVERY": 6}, {"RESUME": 1}):
        nodes = [node(rank, **settings) for rank in (0, 1)]
        for process in nodes:
            assert process.wait(timeout=120) == 0, process.stderr.read()[-2000:]
        if "RESUME" not in settings:
            os.unlink(launch.runs / "node0" / "run" / "model.safetensors")
    assert not (launch.runs / "node1").exists(), "rank 1 writes nothing"
    assert_same_weights(weights(one), weights(launch.runs / "node0" / "run"), exact=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(dataset, tmp_path, train, number):
    settings = {
        **dataset.settings,
        "RUNS_DIR": tmp_path / "runs",
        "DEVICE": "cpu",
        "RUN_ID": "stopped",
        "ITERATIONS": 100000,
        "TRAIN_LOG_EVERY": 1,
    }
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")],
        env=clean_environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step:3/"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}" in out and "RESUME=1 RUN_ID=stopped continues" in out
    (checkpoint,) = (tmp_path / "runs" / "stopped" / "checkpoints").iterdir()
    step = T.load_tensors(checkpoint)[1]["step"]
    assert step >= 3 and f"at step {step}" in out


def test_nan_stops_the_run_and_keeps_the_checkpoint(train, monkeypatch):
    step = T.Trainer.run_step

    def poisoned(trainer, progress):
        loss = step(trainer, progress)
        return loss * float("nan") if trainer.state.step == 7 else loss

    monkeypatch.setattr(T.Trainer, "run_step", poisoned)
    with pytest.raises(T.TrainingDiverged, match=r"train_loss is nan at step 7; step 6 was good at .*; last checkpoint: .*step_0000005"):
        train(RUN_ID="nan", CHECKPOINT_EVERY=5)
    assert not (train.folder("nan") / "model.safetensors").exists()
    assert "train_loss is nan" in (train.folder("nan") / "train.log").read_text()


def test_wallclock_ends_the_run_annealed(train):
    folder, _ = train(RUN_ID="clock", MAX_WALLCLOCK_SECONDS=2, ITERATIONS=100000, TRAIN_LOG_EVERY=1)
    log = events(folder, "train")
    assert log[-1]["lr"] < 0.1 and log[-1]["progress"] >= 1
    assert 2 <= T.load_run(folder)[2]["train_seconds"] < 20, "a step or so beyond the budget, however slow the machine"


def test_nothing_is_written_for_bad_input(launch, dataset, tmp_path):
    cases = [
        ({"DATA_PATH": tmp_path / "nowhere"}, "is not a folder"),
        ({"TOKENIZER_PATH": tmp_path / "nowhere.model"}, "is not a file"),
        ({"VOCAB_SIZE": 600}, "has 512 pieces, but VOCAB_SIZE=600"),
        ({"TRAIN_BATCH_TOKENS": 64 * 10**9}, "but the training shards hold"),
        ({"VAL_TOKENS": 1}, "nothing to score"),
        ({"RUNS_DIR": "/dev/null"}, "/dev/null"),
    ]
    for settings, message in cases:
        result = launch("train_gpt.py", RUN_ID="bad", **settings)
        assert result.returncode == 2, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ") and message in result.stderr
        assert "Traceback" not in result.stderr
        assert not launch.runs.exists(), "a refused run leaves no folder"
    assert launch("train_gpt.py", "--frobnicate").returncode == 2


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with T.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_import_has_no_side_effects():
    """No process group, CUDA context, environment read or output at import."""
    code = "import os; os.environ.clear(); os.environ['VOCAB_SIZE'] = 'x'; import train_gpt, torch.distributed as d; assert not d.is_initialized()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


SMALL_WIDTH = {
    "VOCAB_SIZE": 512, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "ROPE_DIMS": 4, "GDN_HEAD_DIM": 8, "GDN_QK_HEADS": 1,
    "GDN_V_HEADS": 2, "WINDOW_SIZE": 16, "BIGRAM_DIM": 8, "VE_DIM": 8, "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 512,
    "MAX_WALLCLOCK_SECONDS": 0, "GPTQ_RESERVE_SECONDS": 0, "ITERATIONS": 12, "VAL_LOSS_EVERY": 0, "VAL_TOKENS": 2000,
}  # fmt: skip


@pytest.mark.parametrize("preset", ["gdn_hybrid", "gdn3_fa8", "legal_ttt", "token_shift", "ngram_hedge", "base"])
def test_every_preset_trains_at_small_width(train, dataset, preset):
    began = time.perf_counter()
    bigram = {"BIGRAM_VOCAB_SIZE": 64} if T.resolve_config({"PRESET": preset}).bigram_vocab_size else {}
    folder, _ = train(RUN_ID=preset, PRESET=preset, **{**SMALL_WIDTH, **bigram})
    losses = [event["train_loss"] for event in events(folder, "train")]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert losses[-1] < losses[0] - 0.4, losses
    meta = T.load_run(folder)[2]
    assert meta["looping"] == bool(T.resolve_config({"PRESET": preset}).num_loops), "recurrence is on at the end and remembered"
    assert time.perf_counter() - began < 120


def test_the_benchmark_runs_any_preset_without_data(tmp_path, monkeypatch, capsys):
    """Every phase (recurrence, sequence length) has its rate and its parts, and each operation is counted in one part."""
    settings = {
        **TINY, "RUNS_DIR": str(tmp_path), "RUN_ID": "speed", "DATA_PATH": "nowhere", "TOKENIZER_PATH": "nowhere", "NUM_LOOPS": "1", "LOOP_START": "1",
        "LOOP_END": "2", "TRAIN_SEQ_LEN": "32", "TRAIN_SEQ_SCHEDULE": "16@0.5,32@1", "TRAIN_BATCH_TOKENS": "128", "DOCUMENT_MASK": "1", "PRESET": "", "DEVICE": "cpu",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(T.Benchmark, "STEPS", 1)
    monkeypatch.setattr("sys.argv", ["train_gpt.py", "--bench"])
    assert T.main() == 0
    report = json.loads((tmp_path / "bench-speed.json").read_text())
    assert list(report["phases"]) == ["plain at 16", "plain at 32", "looping at 16", "looping at 32"]
    for phase in report["phases"].values():
        assert (
            phase["tokens_per_second"] > 0 and min(phase["parts_ms"][part] for part in ("MLP", "head and loss", "mixers", "optimizer")) > 0
        )
        assert phase["flops_per_token"] > 0 and phase["mfu"] is None
    assert "tok/s" in capsys.readouterr().out

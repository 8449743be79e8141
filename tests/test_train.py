"""Training as a user runs it: resume to the bit, signals, ranks, faults; every preset at small width."""

import calendar
import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, clean_environment

import train_gpt as T
from parts.runs import read_metrics


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
    assert {path.name for path in folder.iterdir()} == {
        "train.log",
        "metrics.jsonl",
        "config.json",
        "model.safetensors",
        "checkpoints",
        ".lock",
    }
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o666 & ~umask}
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


def test_rows_of_whole_documents_train(train):
    folder, code = train(RUN_ID="rows", DOCUMENT_MASK=1, TRAIN_ROW_TOKENS=256, TRAIN_SEQ_SCHEDULE="32@0.4", MICRO_BATCH_TOKENS=256)
    log = (folder / "train.log").read_text()
    assert (
        code == 0 and "batch: 2 x 256 = 512 tokens a step, documents cut every 32, 1 row a micro-batch, 2 micro-batches on one rank" in log
    )
    assert "step:5 2 x 256 = 512 tokens a step, documents cut every 64" in log


def test_stopping_and_resuming_changes_nothing(train, monkeypatch):
    """6 steps, a kill, the rest: the same bits as the unbroken run, through the checkpoint on disk."""
    looping = {"LAYER_PATTERN": "GATA", "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2, "UNET_SKIPS": 1, "ENABLE_LOOPING_AT": 0.3}
    looping["TRAIN_SEQ_SCHEDULE"] = "32@0.4"
    noise = {"QAT_LAST_FRAC": 0.8, "QAT_MODE": "noise", "QAT_NOISE_SCALE": 1}  # draws random numbers at every step
    whole, _ = train(RUN_ID="whole", **looping, **noise)

    class Killed(BaseException):  # no fault that could be answered by saving
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
    assert "step:5 8 x 64 = 512 tokens a step" in (whole / "train.log").read_text()
    kept = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert kept == ["step_0000009.safetensors", "step_0000012.safetensors"], "the last two are kept, the finished state among them"


@pytest.fixture
def interrupted(train, monkeypatch):
    """interrupted(RUN_ID=…, STEPS=8) is a run that was killed after so many steps, by default with the checkpoints of steps 4 and 8."""

    def run(steps=8, **settings):
        class Killed(BaseException):
            pass

        step = T.Trainer.run_step

        def dying_step(trainer, progress):
            if trainer.state.step == steps:
                raise Killed
            return step(trainer, progress)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(T.Trainer, "run_step", dying_step)
            train(**{"CHECKPOINT_EVERY": 4, **settings})
        return train.folder(settings["RUN_ID"])

    return run


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1001] ^= 0x20
    path.write_bytes(data)


def rename_a_tensor(path):
    path.write_bytes(path.read_bytes().replace(b"model/tok_emb", b"model/tnk_emb", 1))


def of_another_model(path):
    tensors, meta = T.load_tensors(path)
    T.save_tensors(path, {name: tensor for name, tensor in tensors.items() if "tok_emb" not in name}, meta)


def of_another_width(path):
    tensors, meta = T.load_tensors(path)
    T.save_tensors(path, {**tensors, "model/tok_emb.weight": tensors["model/tok_emb.weight"][:, :-1]}, meta)


def of_another_run(path):
    tensors, meta = T.load_tensors(path)
    T.save_tensors(path, tensors, {**meta, "config": {**meta["config"], "seed": 7}})


@pytest.mark.parametrize("damage", [cut, flip, rename_a_tensor, of_another_model, of_another_width, of_another_run])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(train, interrupted, damage):
    folder = interrupted(RUN_ID="broken")
    damage(folder / "checkpoints" / "step_0000008.safetensors")
    train(RUN_ID="broken", RESUME=1)
    log = (folder / "train.log").read_text()
    assert "it is kept as step_0000008.damaged" in log
    assert "continuing from step_0000004.safetensors, the one before step_0000008" in log
    assert "resume: step 4" in log and T.load_run(folder)[2]["steps"] == 12
    resumed = [event["step"] for event in read_metrics(folder) if event["event"] == "resume"]
    assert resumed == [4], "the metrics say where valid history continues"


def test_a_model_damaged_by_a_bit_is_refused_and_made_again(train):
    folder, _ = train(RUN_ID="run", ITERATIONS=3)
    before = weights(folder)
    flip(folder / "model.safetensors")
    with pytest.raises(T.UserError, match=r"model\.safetensors is damaged"):
        T.load_run(folder)
    train(RUN_ID="run", RESUME=1, ITERATIONS=3)
    assert_same_weights(before, weights(folder))


def test_a_run_is_resumed_with_its_own_settings(train, interrupted, monkeypatch):
    """RESUME=1 RUN_ID=x is enough, and gives what the unbroken run gives."""
    ablation = {"MUON_WD": 0.7, "SCALAR_LR": 0.001, "LAYER_PATTERN": "GTA"}
    whole, _ = train(RUN_ID="whole", **ablation)
    folder = interrupted(RUN_ID="broken", **ablation)
    environment = clean_environment(RESUME=1, RUN_ID="broken", RUNS_DIR=folder.parent, PRESET="demo")
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    with monkeypatch.context() as patch:
        for name in list(os.environ):
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        assert T.main() == 0
    assert_same_weights(weights(whole), weights(folder))
    assert "PRESET=demo is not read again" in (folder / "train.log").read_text()


def test_resume_refuses_what_would_change_the_run(train, interrupted):
    folder = interrupted(RUN_ID="run")
    with pytest.raises(T.UserError, match=r"MLP_MULT=3 contradicts the trained model, whose value is 2\.0"):
        train(RUN_ID="run", RESUME=1, MLP_MULT=3)
    with pytest.raises(T.UserError, match=r"MATRIX_LR=0\.1, but the run began with 0\.04; unset it"):
        train(RUN_ID="run", RESUME=1, MATRIX_LR=0.1)
    with pytest.raises(T.UserError, match="SEED=7, but the run began with 1337"):
        train(RUN_ID="run", RESUME=1, SEED=7)
    with pytest.raises(T.UserError, match="already holds a run"):
        train(RUN_ID="run")
    with pytest.raises(T.UserError, match="RESUME=1 needs RUN_ID"):
        train(RUN_ID="", RESUME=1)
    train(RUN_ID="run", RESUME=1, VAL_LOSS_EVERY=5)
    assert "resume: VAL_LOSS_EVERY changes from 0 to 5" in (folder / "train.log").read_text()


def test_a_run_killed_before_its_first_checkpoint_keeps_its_folder(train, interrupted):
    folder = interrupted(steps=2, RUN_ID="early", MATRIX_LR=0.01)
    with pytest.raises(T.UserError, match="already holds a run"):
        train(RUN_ID="early", MATRIX_LR=0.02)
    train(RUN_ID="early", RESUME=1)
    assert T.load_run(folder)[0]["matrix_lr"] == 0.01
    assert [event["step"] for event in read_metrics(folder) if event["event"] == "train"][:2] == [1, 2], "no step twice"


def test_resume_refuses_other_data(train, interrupted, dataset, tmp_path):
    """The same number of tokens, another order."""
    interrupted(RUN_ID="run")
    other = shutil.copytree(dataset.path, tmp_path / "other")
    shard = other / "fineweb_train_000000.bin"
    data = np.fromfile(shard, "<u2")
    data[512:] = np.random.default_rng(0).permutation(data[512:])
    data.tofile(shard)
    with pytest.raises(T.UserError, match=r"the training data of this run, SHA-256 .*, is not that of step_0000008\.safetensors"):
        train(RUN_ID="run", RESUME=1, DATA_PATH=other)


def test_a_tokenizer_of_another_dataset_is_refused(train, dataset, tmp_path):
    """Of the same size: nothing but the manifest can tell."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_bytes(Path(calendar.__file__).read_bytes())
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "other"), vocab_size=512, model_type="bpe", byte_fallback=True, bos_id=1, eos_id=2,
        unk_id=0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert T.load_tokenizer(tmp_path / "other.model", 512)
    with pytest.raises(T.UserError, match=r"did not write the shards in DATA_PATH=.*: their manifest\.json names a tokenizer with"):
        train(RUN_ID="run", TOKENIZER_PATH=tmp_path / "other.model")
    assert not train.folder("run").exists()


def test_a_finished_run_can_be_extended(train):
    folder, _ = train(RUN_ID="run")
    train(RUN_ID="run", RESUME=1, ITERATIONS=16)
    meta, log = T.load_run(folder)[2], (folder / "train.log").read_text()
    assert meta["steps"] == 16 and meta["tokens"] == 16 * 512
    assert "resume: ITERATIONS changes from 12 to 16" in log
    assert "it is extended, and its schedules go back from 100% to 75.0% of the budget" in log
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(T.UserError, match="its last checkpoint is gone: it cannot be extended"):
        train(RUN_ID="run", RESUME=1, ITERATIONS=20)


@pytest.mark.parametrize("fault", [MemoryError, signal.SIGTERM])
def test_the_finished_weights_outlive_their_validation(train, monkeypatch, fault):
    whole, _ = train(RUN_ID="whole", ITERATIONS=4)

    def failing(*_):
        if isinstance(fault, signal.Signals):
            signal.raise_signal(fault)
        raise MemoryError("no memory for the validation")

    with monkeypatch.context() as patch:
        patch.setattr(T, "evaluate", failing)
        if fault is MemoryError:
            with pytest.raises(T.UserError, match=r"out of memory .*; RESUME=1 RUN_ID=broken continues from .*step_0000004"):
                train(RUN_ID="broken", ITERATIONS=4)
        else:
            folder, code = train(RUN_ID="broken", ITERATIONS=4)
            assert code == 128 + signal.SIGTERM
            assert "stopped by SIGTERM in the final validation" in (folder / "train.log").read_text()
    folder, _ = train(RUN_ID="broken", RESUME=1, ITERATIONS=4)
    assert_same_weights(weights(whole), weights(folder))
    assert (folder / "metrics.jsonl").read_text().count('"event": "train"') == len(events(whole, "train")), "not trained again"


@pytest.mark.parametrize("settings", [{}, {"QAT_LAST_FRAC": 1, "QAT_MODE": "noise", "QAT_NOISE_SCALE": 1}])
def test_a_stop_between_micro_batches_undoes_the_step(train, monkeypatch, settings):
    """The signal is seen inside a step of four micro-batches; the resumed run is the unbroken one, to the bit."""
    whole, _ = train(RUN_ID="whole", MICRO_BATCH_TOKENS=128, **settings)
    sequences, calls = T.TokenStream.sequences, []

    def interrupting(stream, *arguments):
        calls.append(None)
        if len(calls) == 4 * 6 + 2:
            signal.raise_signal(signal.SIGTERM)
        return sequences(stream, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(T.TokenStream, "sequences", interrupting)
        folder, code = train(RUN_ID="broken", MICRO_BATCH_TOKENS=128, **settings)
    assert code == 128 + signal.SIGTERM and len(calls) == 4 * 6 + 2, "no micro-batch more"
    assert "stopped by SIGTERM at step 6" in (folder / "train.log").read_text()
    train(RUN_ID="broken", RESUME=1)
    assert_same_weights(weights(whole), weights(folder))


def test_a_step_that_fails_leaves_the_state_before_it(train, dataset, tmp_path):
    """A training shard is cut short under the run: one line, and nothing of the run is lost."""
    whole, _ = train(RUN_ID="whole", TRAIN_BATCH_TOKENS=2048)
    data = shutil.copytree(dataset.path, tmp_path / "data")
    step = T.Trainer.run_step

    def cutting(trainer, progress):
        if trainer.state.step == 5:
            os.truncate(data / "fineweb_train_000000.bin", 1024 + 2 * 2048 * 5 + 100)
        return step(trainer, progress)

    with mock.patch.object(T.Trainer, "run_step", cutting):
        with pytest.raises(T.UserError, match=r"fineweb_train_000000\.bin was cut short while it was read"):
            train(RUN_ID="broken", TRAIN_BATCH_TOKENS=2048, DATA_PATH=data)
    log = (train.folder("broken") / "train.log").read_text()
    assert "step 6 failed: saved" in log and "was cut short" in log
    train(RUN_ID="broken", RESUME=1, TRAIN_BATCH_TOKENS=2048)
    assert_same_weights(weights(whole), weights(train.folder("broken")))


def test_a_full_disk_costs_checkpoints_not_the_run(train, monkeypatch):
    whole, _ = train(RUN_ID="whole")
    save, tried = T.save_tensors, []

    def full(path, tensors, meta):
        tried.append(path.name)
        if len(tried) in (1, 2, 5, 6, 7):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, tensors, meta)

    monkeypatch.setattr(T, "save_tensors", full)
    monkeypatch.setattr(T, "RETRY_SECONDS", 0.0)
    folder, code = train(RUN_ID="full", CHECKPOINT_EVERY=4)
    # Refused at 4, tried again at 5 and 6; written at 8; at 12 refused even with the older one gone; then the model is waited for.
    steps = [f"step_{n:07d}.safetensors" for n in (4, 5, 6, 8, 12, 12)]
    names = [*steps, "model.safetensors", "model.safetensors"]
    assert code == 0 and tried == names
    assert_same_weights(weights(whole), weights(folder))
    log = (folder / "train.log").read_text()
    assert log.count("warning: no checkpoint at step") == 3 and "No space left on device; the run goes on, and tries again" in log
    assert "the finished weights are in memory only" in log


def test_the_last_but_one_checkpoint_makes_room(train, monkeypatch):
    save, full = T.save_tensors, []

    def crowded(path, tensors, meta):
        if path.name == "step_0000009.safetensors" and len(list(path.parent.iterdir())) == 2:
            full.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, tensors, meta)

    monkeypatch.setattr(T, "save_tensors", crowded)
    folder, _ = train(RUN_ID="run", CHECKPOINT_EVERY=3)
    assert full and {path.name for path in (folder / "checkpoints").iterdir()} == {"step_0000009.safetensors", "step_0000012.safetensors"}


def test_checkpoints_are_written_by_time_too(train):
    folder, _ = train(RUN_ID="run", CHECKPOINT_EVERY=0, CHECKPOINT_SECONDS=1e-6, ITERATIONS=5)
    written = [line for line in (folder / "train.log").read_text().splitlines() if " checkpoint " in line]
    assert [line.split()[0] for line in written] == [f"step:{n}" for n in (1, 2, 3, 4)]


def test_a_validation_moves_no_random_state(train):
    """QAT's noise is drawn in the forward: were a validation's draws training's, how often one looks would change the weights."""
    noise = {"QAT_LAST_FRAC": 1, "QAT_MODE": "noise", "QAT_NOISE_SCALE": 1, "ITERATIONS": 6}
    never, _ = train(RUN_ID="never", VAL_LOSS_EVERY=0, **noise)
    often, _ = train(RUN_ID="often", VAL_LOSS_EVERY=2, **noise)
    assert_same_weights(weights(never), weights(often))


@contextlib.contextmanager
def endless(dataset, folder):
    """A training under way, as a process of its own that has come to its third step, and the pipe in which its further lines are."""
    settings = {**dataset.settings, "RUNS_DIR": folder / "runs", "RUN_ID": "run", "ITERATIONS": 100000, "TRAIN_LOG_EVERY": 1}
    os.mkfifo(folder / "lines")
    process = forked.start(
        ROOT / "train_gpt.py", environment=clean_environment(**settings, DEVICE="cpu"), out=folder / "lines", err=folder / "errors"
    )
    opened = threading.Timer(60, lambda: os.close(os.open(folder / "lines", os.O_WRONLY | os.O_NONBLOCK)))  # one that died would never
    opened.start()
    with open(folder / "lines") as lines:
        opened.cancel()
        assert any(line.startswith("step:3/") for line in lines), (folder / "errors").read_text()
        yield process, lines


def test_a_reader_that_leaves_stops_the_run_with_a_checkpoint(dataset, tmp_path):
    """`python train_gpt.py | head` ends as by SIGPIPE, and nothing is lost."""
    with endless(dataset, tmp_path) as (process, _):
        pass
    assert forked.finish([process], 60) == [128 + signal.SIGPIPE], (tmp_path / "errors").read_text()
    assert "stopped by SIGPIPE" in (tmp_path / "runs" / "run" / "train.log").read_text()
    assert list((tmp_path / "runs" / "run" / "checkpoints").iterdir())


def test_ranks_run_the_settings_of_rank_zero(tmp_path):
    """Another environment on another node changes nothing and is named; another machine's paths are its own."""

    class Ranks:
        rank, world_size, is_main, lines = 1, 2, False, []

        def broadcast_object(self, value):
            return zero.to_dict(), zero.origins

        def gather_objects(self, value):
            return [{}, value]

        def log(self, line):
            self.lines.append(line)

    zero = T.resolve_config({"MATRIX_LR": "0.03", "DATA_PATH": "/zero", "RUN_ID": "a"})
    one = T.resolve_config({"MATRIX_LR": "0.001", "SEED": "9", "DATA_PATH": "/one"})
    cfg, ranks = T.share_config(one, Ranks()), Ranks()
    assert {**cfg.to_dict(), "data_path": "/zero"} == zero.to_dict() and cfg.to_dict()["data_path"] == "/one"
    assert ranks.lines == [
        "warning: SEED=9 on rank 1, 1337 on rank 0: rank 0's setting holds everywhere",
        "warning: MATRIX_LR=0.001 on rank 1, 0.03 on rank 0: rank 0's setting holds everywhere",
    ]


def test_other_batches_are_refused_at_resume(train, interrupted):
    """TRAIN_BATCH_TOKENS_PER_GPU on another number of ranks: no setting differs, the run would."""
    folder = interrupted(RUN_ID="run")
    cfg = T.resolve_run(clean_environment(RESUME=1, RUN_ID="run", RUNS_DIR=folder.parent))
    trainer = T.Trainer(cfg, T.RunContext(), folder)
    with pytest.raises(T.UserError, match="a step takes 1,024 tokens here, but the run began with 512"):
        T.restore_checkpoint(trainer.state, cfg, folder, trainer.ctx, {**trainer.made_from, "batch_tokens": 1024})


def test_one_ranks_signal_stops_all_by_rank_zeros_clock(train, monkeypatch):
    folder, _ = train(RUN_ID="run", ITERATIONS=1)
    trainer = T.Trainer(T.Config.from_dict(T.load_run(folder)[0]), T.RunContext(world_size=2), folder)

    def all_reduce(tensor, op, async_op):
        other = torch.tensor([0.0, signal.SIGUSR1], dtype=tensor.dtype)  # rank 1: no clock of its own, but a signal
        tensor.copy_({T.dist.ReduceOp.MAX: torch.maximum, T.dist.ReduceOp.MIN: torch.minimum}[op](tensor, other))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(T.dist, "all_reduce", all_reduce)
    assert trainer.agree(12.5) == (12.5, signal.SIGUSR1)


@pytest.mark.parametrize("what", ["the training data", "the code", "the settings", "the version of torch", "the weights"])
def test_ranks_that_would_train_something_else_are_refused(train, monkeypatch, what):
    def gather(ctx, value):
        return [value, {**value, what: "0" * 64}]

    folder, _ = train(RUN_ID="alone", ITERATIONS=1)
    monkeypatch.setattr(T.RunContext, "gather_objects", gather)
    cfg = T.Config.from_dict(T.load_run(folder)[0])
    trainer = T.Trainer(cfg, T.RunContext(), folder)
    trainer.ctx.world_size = 2
    with pytest.raises(T.UserError, match=rf"{what} of rank 1 \(000000000000…\) differs from rank 0's"):
        trainer.check_same_run()


def test_a_digest_is_of_names_types_shapes_and_bytes():
    one = {"a": torch.zeros(4, 2), "b": torch.ones(4, 2)}
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": one["b"], "b": one["a"]},
        {**one, "b": one["b"].view(2, 4)},
        {**one, "a": one["a"].int()},
    ]
    assert len({T.tensors_digest(tensors, "") for tensors in [one, *others]} | {T.tensors_digest(one, "text")}) == 6


def test_a_checkpoint_without_the_average_is_passed_over(train, interrupted):
    folder = interrupted(RUN_ID="run")
    path = folder / "checkpoints" / "step_0000008.safetensors"
    tensors, meta = T.load_tensors(path)
    T.save_tensors(path, {name: value for name, value in tensors.items() if not name.startswith("ema/")}, meta)
    train(RUN_ID="run", RESUME=1)
    assert "is missing" in (folder / "train.log").read_text() and "resume: step 4" in (folder / "train.log").read_text()


def test_unreadable_checkpoints_are_kept_and_named(train, interrupted):
    folder = interrupted(RUN_ID="run")
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


def test_a_step_that_fails_in_its_update_is_not_saved(train, monkeypatch):
    """Some parameters have moved and others have not: no state of any step."""
    step = T.Optimizers.step

    def failing(optimizers, *scales):
        step(optimizers, *scales)
        if failing.calls == 3:
            raise MemoryError("no memory")
        failing.calls += 1

    failing.calls = 0
    monkeypatch.setattr(T.Optimizers, "step", failing)
    with pytest.raises(T.UserError, match=r"out of memory .*step_0000002"):
        train(RUN_ID="torn", CHECKPOINT_EVERY=2)
    (kept,) = T.list_checkpoints(train.folder("torn"))
    assert kept.name == "step_0000002.safetensors"


def test_reported_score_is_that_of_the_saved_float_weights(train, dataset):
    """QAT's imitation is off while validating."""
    folder, _ = train(RUN_ID="qat", QAT_LAST_FRAC=1, QAT_BITS=3, EMA_DECAY=0)
    settings, tensors, meta = T.load_run(folder)
    cfg = T.Config.from_dict({**settings, "qat_last_frac": 0.0})
    model = T.build_model(cfg)
    T.load_weights(model, tensors)
    table = T.ByteTable.from_tokenizer(T.load_tokenizer(dataset.tokenizer))
    tokens = T.load_tokens(dataset.path, "val", 512, cfg.train.val_tokens)
    result = T.evaluate(model, tokens, table, cfg.eval, T.RunContext(), cfg.train.train_seq_len, cfg.train.train_seq_len)
    assert result.val_bpb == pytest.approx(meta["val_bpb"], abs=1e-6)


def test_finished_run_has_nothing_to_resume(train):
    folder, _ = train(RUN_ID="run", ITERATIONS=2)
    before = (folder / "model.safetensors").read_bytes()
    assert train(RUN_ID="run", RESUME=1, ITERATIONS=2)[1] == 0
    assert (folder / "model.safetensors").read_bytes() == before
    assert f"model.safetensors (SHA-256 {T.model_digest(folder)})" in (folder / "train.log").read_text()
    of_another_run(folder / "model.safetensors")
    with pytest.raises(T.UserError, match=r"model\.safetensors is of another run: SEED is 7 there and 1337 in config\.json"):
        train(RUN_ID="run", RESUME=1, ITERATIONS=2)


@pytest.mark.parametrize("ranks", [2])
def test_two_processes_train_to_the_weights_of_one(launch, train, ranks):
    one, _ = train(RUN_ID="one", MICRO_BATCH_TOKENS=128, ITERATIONS=5, REFERENCE_STEPS=5)
    result = launch("train_gpt.py", ranks=ranks, RUN_ID="two", MICRO_BATCH_TOKENS=128, ITERATIONS=5, REFERENCE_STEPS=5)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_weights(weights(one), weights(launch.runs / "two"), exact=False)
    first, second = (T.load_run(folder)[2] for folder in (one, launch.runs / "two"))
    assert first["val_bpb"] == pytest.approx(second["val_bpb"], abs=1e-4)
    assert second["world_size"] == 2


def test_only_rank_zero_needs_the_checkpoint(launch, train, tmp_path):
    """Ranks may have disks of their own: rank 0 reads, the others receive, and the result is that of the unbroken run."""
    one, _ = train(RUN_ID="one", MICRO_BATCH_TOKENS=128)
    base = {**launch.settings, "DEVICE": "cpu", "RUN_ID": "run", "MICRO_BATCH_TOKENS": 128}
    for settings in ({"CHECKPOINT_EVERY": 6}, {"RESUME": 1}):
        nodes = [
            forked.start(
                ROOT / "train_gpt.py",
                environment={**clean_environment(**base, **settings, RUNS_DIR=launch.runs / f"node{rank}"), **variables, "LOCAL_RANK": "0"},
                err=tmp_path / "errors",
            )
            for rank, variables in enumerate(forked.group(2))
        ]
        assert forked.finish(nodes) == [0, 0], (tmp_path / "errors").read_text()[-2000:]
        if "RESUME" not in settings:
            os.unlink(launch.runs / "node0" / "run" / "model.safetensors")
    assert not (launch.runs / "node1").exists(), "rank 1 writes nothing"
    assert_same_weights(weights(one), weights(launch.runs / "node0" / "run"), exact=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_exit(dataset, tmp_path, number):
    with endless(dataset, tmp_path) as (process, lines):
        os.kill(process.pid, number)
        os.kill(process.pid, number)  # twice, as a launcher and its process group get it
        out = lines.read()
    assert forked.finish([process], 60) == [128 + number], (tmp_path / "errors").read_text()
    assert f"stopped by {number.name}" in out and "RESUME=1 RUN_ID=run continues" in out
    (checkpoint,) = (tmp_path / "runs" / "run" / "checkpoints").iterdir()
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
    assert T.load_run(folder)[2]["train_seconds"] >= 2


def test_nothing_is_written_for_bad_input(launch, dataset, tmp_path):
    cases = [
        ({"DATA_PATH": tmp_path / "fineweb10B_sp8192"}, "is not a folder; `python data/prepare.py --variant sp8192` downloads"),
        ({"TOKENIZER_PATH": tmp_path / "nowhere.model"}, "is not a file; `python data/prepare.py TEXT` builds"),
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
    bigram = {"BIGRAM_VOCAB_SIZE": 64} if T.resolve_config({"PRESET": preset}).model.bigram_vocab_size else {}
    folder, _ = train(RUN_ID=preset, PRESET=preset, **{**SMALL_WIDTH, **bigram})
    losses = [event["train_loss"] for event in events(folder, "train")]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert losses[-1] < losses[0] - 0.4, losses
    meta = T.load_run(folder)[2]
    assert meta["looping"] == bool(T.resolve_config({"PRESET": preset}).model.num_loops), "recurrence is on at the end and remembered"


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


def test_replayed_micro_batches_leave_the_gradients_of_eager_ones(monkeypatch):
    """Several micro-batches a step, shapes that come and go, recurrence switched on: with a stand-in for the CUDA graph that runs what was recorded."""
    cfg = T.resolve_config(
        {**TINY, "NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "2", "UNET_SKIPS": "1", "COMPILE": "0", "DEVICE": "cpu"}
    )
    replayed, recording = [], []

    class Graph:
        def __init__(self):
            recording.append(self)

        def pool(self):
            return None

        def replay(self):
            key, (_, static, loss, _) = next((key, entry) for key, entry in graphed.graphs.items() if entry[0] is self)
            replayed.append(key)
            loss.copy_(graphed._run(static, key[2], key[3]))

    @contextlib.contextmanager
    def capture(graph, pool=None):
        before = [None if p.grad is None else p.grad.clone() for p in graphed.params]
        yield
        for param, value in zip(graphed.params, before):  # a capture records and does not run
            if value is not None:
                param.grad.copy_(value)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    models = [T.build_model(cfg) for _ in range(2)]
    graphed, eager = (T.MicroStep(model, model, graphed) for model, graphed in zip(models, (True, False)))
    generator = torch.Generator().manual_seed(3)
    for step in range(9):
        losses = []
        for width in (12, 12, 20) if step % 3 else (20, 12):
            ids = torch.randint(2, 512, (2, width + 1), generator=generator)
            for each in (graphed, eager):
                each.model.looping = step >= 4
                losses.append(each(ids[:, :-1], ids[:, 1:], None, 0, 3).clone())
        assert losses[::2] == losses[1::2]
        for (name, ours), theirs in zip(graphed.model.named_parameters(), eager.params):
            assert (ours.grad is None) == (theirs.grad is None), name
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
            ours.grad = theirs.grad = None
    assert len(replayed) > 12 and len(graphed.graphs) == 4 == len(recording)

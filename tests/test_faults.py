"""Kills, full disks and damaged files by the hundred: `make test-faults`, or a part of it, `make test-faults FAULTS='-k evaluate'`.

Not run with the suite (minutes to an hour on two cores). FAULTS_SCALE multiplies the numbers of kills and cases, FAULTS_SEED chooses others.
Each test prints what it has tried. Commands run in forks of this process, which has imported everything: a kill costs no start of Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_packing import reseal

import codec
import demo
import eval_ttt
import quantize as Q
import train_gpt as T
from data import prepare, shards
from parts import packing, runs
from parts.artifact import load_artifact
from parts.files import UserError, cli

pytestmark = pytest.mark.faults
SCALE, SEED = float(os.environ.get("FAULTS_SCALE", "1")), int(os.environ.get("FAULTS_SEED", "0"))
SMALL = {"LAYER_PATTERN": "AT", "ITERATIONS": 24, "CHECKPOINT_EVERY": 3, "TRAIN_LOG_EVERY": 1, "EVAL_TOKENS": 600, "TTT_CHUNK_TOKENS": 128}
SMALL |= {"MICRO_BATCH_TOKENS": 256, "QAT_LAST_FRAC": 0.5, "QAT_MODE": "noise"}


def scaled(count: int) -> int:
    return max(1, round(count * SCALE))


# ----------------------------------------------------------------------------------------------------------------------
# Commands in forks
# ----------------------------------------------------------------------------------------------------------------------


class Command:
    """A command of the suite in a process group of its own, its output in a file."""

    def __init__(self, module, *arguments, log: Path, prelude: Callable[[], None] = lambda: None, **settings):
        self.log = log
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                os.setsid()
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                os.dup2(handle, 1), os.dup2(handle, 2)
                sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
                os.environ.clear()
                os.environ.update(clean_environment(**{name: str(value) for name, value in settings.items()}))
                sys.argv = [module.__file__, *map(str, arguments)]
                prelude()
                cli(module.main)
            except SystemExit as leaving:
                code = leaving.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if not hasattr(self, "code"):
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if not pid:
                return None
            self.code, self.cpu_seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        return self.code

    def cpu(self) -> float:
        """Seconds of processor time so far, those of its children included."""
        return self.cpu_seconds if self.poll() is not None else processor_seconds(self.pid)

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.005)
        return self.code

    def kill(self, group: bool) -> None:
        (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        self.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(processor_seconds(int(child)) for child in children)


def run_to_end(*arguments, **settings) -> Command:
    command = Command(*arguments, **settings)
    command.wait()
    return command


@dataclasses.dataclass
class Scenario:
    """Something that may be killed at any time and started again until it is done."""

    start: Callable[[], list[Command]]
    wipe: Callable[[], None]
    result: Callable[[], object]  # compared with the undisturbed one's
    invariant: Callable[[], None] = lambda: None  # holds after every kill
    trigger: Callable[[], bool] | None = None  # kill as soon as this is so; else after a random share of the work


def survive(name: str, scenario: Scenario, kills: int, capsys) -> None:
    """SIGKILL `kills` times; every disturbed run must end as the undisturbed one did. Work is measured in processor time, which does not depend
    on what else the machine does."""
    rng = random.Random(f"{SEED} {name}")
    scenario.wipe()
    undisturbed = scenario.start()
    for command in undisturbed:
        assert command.wait() == 0, command.text()[-2000:]
    work, expected = sum(command.cpu() for command in undisturbed), scenario.result()
    done = finished = 0
    while done < kills:
        scenario.wipe()
        while True:
            commands, after = scenario.start(), rng.uniform(0, work)
            aim = rng.random() < 0.8 and scenario.trigger  # a few after any share of the work in any case
            while any(c.poll() is None for c in commands):
                if aim() if aim else sum(c.cpu() for c in commands) > after:
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.01))  # the kernel counts in hundredths
            alive = [c for c in commands if c.poll() is None]
            if not alive:
                assert all(c.code == 0 for c in commands), "\n".join(c.text()[-2000:] for c in commands)
                break
            if done >= kills:
                assert all(c.wait() == 0 for c in commands), "\n".join(c.text()[-2000:] for c in commands)
                break
            rng.choice(alive).kill(group=rng.random() < 0.5)
            for command in alive:
                if command.poll() is None:
                    command.kill(group=True)
            done += 1
            scenario.invariant()
        assert scenario.result() == expected, f"{name}: not what the undisturbed run made (seed {SEED}, after {done} kills)"
        finished += 1
    with capsys.disabled():
        print(f"\n{name}: {done} kills in {finished} runs, each equal to the undisturbed one")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_of(folder: Path) -> str:
    _, weights, meta = T.load_run(folder)
    return T.tensors_digest(weights, json.dumps([meta["steps"], meta["tokens"], meta["val_bpb"]]))


@pytest.fixture
def base(dataset, tmp_path) -> dict:
    return {**dataset.settings, **SMALL, "RUNS_DIR": tmp_path / "runs", "RUN_ID": "run", "DEVICE": "cpu"}


@pytest.fixture(scope="module")
def pipeline(dataset, tmp_path_factory) -> Path:
    """A run trained, quantized, scored and used to compress a text, with its data beside it: everything that a command reads."""
    out = tmp_path_factory.mktemp("pipeline")
    folder, text = out / "run", out / "text.txt"
    text.write_bytes(b"Permission is hereby granted")
    settings = {**dataset.settings, **SMALL, "RUNS_DIR": out, "RUN_ID": "run", "DEVICE": "cpu"}
    steps = [(T,), (Q, folder), (eval_ttt, folder), (codec, "compress", folder / "artifact.bin", text, folder / "coded")]
    for module, *arguments in steps:
        command = run_to_end(module, *arguments, log=out / "out", **(settings if module is T else {"DEVICE": "cpu"}))
        assert command.code == 0, command.text()[-2000:]
    for path in dataset.path.iterdir():
        shutil.copy(path, folder)
    shutil.copy(dataset.tokenizer, folder / "tokenizer.model")
    return folder


@pytest.fixture
def files(pipeline, tmp_path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "runs" / "run")


@pytest.fixture
def trained(files) -> Path:
    """Without what comes after training."""
    for name in ("artifact.bin", "evaluate.py", "quantize.json", "eval.json", "coded"):
        (files / name).unlink(missing_ok=True)
    return files


@pytest.fixture
def quantized(files) -> Path:
    (files / "eval.json").unlink()
    return files


def rewind(folder: Path) -> Callable[[], None]:
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)

    def wipe() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)

    return wipe


# ----------------------------------------------------------------------------------------------------------------------
# Kills
# ----------------------------------------------------------------------------------------------------------------------


def training(base: dict, tmp_path: Path, ranks: int = 1) -> Scenario:
    folder, output = tmp_path / "runs" / "run", tmp_path / "out"

    def start() -> list[Command]:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        if ranks == 1:
            return [Command(T, log=output / "0", RESUME=1, **base)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"RESUME": 1, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **base}
        return [Command(T, log=output / str(rank), RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(ranks)]

    def invariant() -> None:
        for path in [*T.list_checkpoints(folder), *folder.glob("model.safetensors")]:
            T.load_tensors(path)
        assert all(isinstance(event, dict) for event in runs.read_metrics(folder))

    return Scenario(start, lambda: shutil.rmtree(folder, ignore_errors=True), lambda: weights_of(folder), invariant)


def test_kill_training(base, tmp_path, capsys):
    survive("train", training(base, tmp_path), scaled(60), capsys)


def test_kill_training_while_a_checkpoint_is_written(base, tmp_path, capsys):
    scenario = training(base, tmp_path)
    scenario.trigger = lambda: any((tmp_path / "runs" / "run" / "checkpoints").glob(".step_*.tmp"))
    survive("train, while a checkpoint is written", scenario, scaled(40), capsys)


def test_kill_training_in_its_final_validation(base, tmp_path, capsys):
    scenario = training({**base, "VAL_TOKENS": 0}, tmp_path)
    output = tmp_path / "out" / "0"  # the last checkpoint is written; what is left are validations and the model
    scenario.trigger = lambda: output.exists() and any(mark in output.read_text() for mark in ("step:24 raw val_loss", "resume: step 24"))
    survive("train, in the final validation", scenario, scaled(20), capsys)


def test_kill_training_on_two_ranks(base, tmp_path, capsys):
    survive("train on two ranks", training(base, tmp_path, ranks=2), scaled(30), capsys)


def launcher(log: Path, *options: str, **settings) -> subprocess.Popen:
    """torchrun, in a process group of its own; ranks stay in its session."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train_gpt.py")]
    with open(log, "ab") as output:
        return subprocess.Popen(command, env=clean_environment(**settings), stdout=output, stderr=output, start_new_session=True)


def steps_taken(folder: Path) -> int:
    return max((event["step"] for event in runs.read_metrics(folder) if event["event"] == "train"), default=0)


def survive_launchers(name: str, start: Callable[[], list[subprocess.Popen]], kill: Callable, folder: Path, kills: int, capsys) -> None:
    """Kill the launcher of a run under way, wait for the ranks that it left, resume; at the end as the undisturbed run."""
    rng = random.Random(f"{SEED} {name}")
    assert all(process.wait() == 0 for process in start())
    expected, done = weights_of(folder), 0
    shutil.rmtree(folder)
    while done < kills:
        processes, before = start(), steps_taken(folder)
        while all(p.poll() is None for p in processes) and steps_taken(folder) < before + rng.randint(3, 20):
            time.sleep(0.01)
        if all(p.poll() is None for p in processes):
            kill(rng.choice(processes))
            done += 1
        for process in processes:
            process.wait()
        for _ in range(6000):  # the ranks that are left have a minute to see it, save and go
            with contextlib.suppress(UserError), runs.run_lock(folder):
                break
            time.sleep(0.01)
        else:
            raise AssertionError("ranks are still there")
        assert (folder / "model.safetensors").exists() or T.list_checkpoints(folder), "nothing was saved"
        if (folder / "model.safetensors").exists():
            assert weights_of(folder) == expected
            shutil.rmtree(folder)
    if not (folder / "model.safetensors").exists():
        assert all(process.wait() == 0 for process in start())
        assert weights_of(folder) == expected
    with capsys.disabled():
        print(f"\n{name}: {kills} kills, resumed to the weights of the undisturbed run")


def test_kill_torchrun_alone(base, tmp_path, capsys):
    """SIGKILL of the launcher: its ranks, orphans now, save and end."""
    settings = {**base, "RESUME": 1, "ITERATIONS": 150, "CHECKPOINT_EVERY": 0}
    start = lambda: [launcher(tmp_path / "out", "--standalone", "--nproc_per_node=2", **settings)]
    survive_launchers("torchrun alone", start, lambda process: process.kill(), tmp_path / "runs" / "run", scaled(4), capsys)
    assert "stopped by SIGTERM" in (tmp_path / "out").read_text()


def test_kill_one_of_two_nodes(base, tmp_path, capsys):
    """SIGKILL of a node with its rank: the other node ends by itself, with a line that says so."""

    def start() -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
        settings = {**base, "RESUME": 1, "ITERATIONS": 60}
        return [launcher(tmp_path / f"out{rank}", *options, f"--node_rank={rank}", **settings) for rank in (0, 1)]

    def kill(process: subprocess.Popen) -> None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (*map(int, children), process.pid):
            os.kill(pid, signal.SIGKILL)

    survive_launchers("a node of two", start, kill, tmp_path / "runs" / "run", scaled(4), capsys)
    assert "lost touch with another rank" in "".join((tmp_path / f"out{rank}").read_text() for rank in (0, 1))


def test_kill_prepare(tmp_path, capsys):
    texts, out = tmp_path / "texts", tmp_path / "shards"
    texts.mkdir()
    for path in sorted((ROOT / "tests").glob("*.py")) + sorted(ROOT.glob("*.py")):
        (texts / f"{path.stem}.txt").write_bytes(path.read_bytes())
    arguments = [texts, "--out", out, "--tokenizer-out", tmp_path / "t.model", "--vocab-size", 512, "--shard-tokens", 50000]
    arguments += ["--val-fraction", 0.2, "--workers", 2]

    def wipe() -> None:
        for path in tmp_path.iterdir():
            if path != texts:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def result() -> dict[str, str]:
        assert {path.name for path in tmp_path.iterdir()} <= {"texts", "shards", "t.model", "out"}, "nothing is left over"
        return {path.name: digest(path) for path in [*out.iterdir(), tmp_path / "t.model"]}

    start = lambda: [Command(prepare, *arguments, log=tmp_path / "out")]
    survive("prepare", Scenario(start, wipe, result), scaled(30), capsys)


def test_kill_quantize(trained, tmp_path, capsys):
    artifact = trained / "artifact.bin"

    def invariant() -> None:
        assert not artifact.exists() or packing.unpack_artifact(artifact.read_bytes())

    def result() -> list:
        _, records = packing.unpack_artifact(artifact.read_bytes())
        assert not [path.name for path in trained.iterdir() if path.name.endswith(".tmp")]
        return [(r.name, r.kind, r.data.tobytes(), None if r.scales is None else r.scales.tobytes()) for r in records]

    start = lambda: [Command(Q, trained, log=tmp_path / "out")]
    survive("quantize", Scenario(start, rewind(trained), result, invariant), scaled(30), capsys)


def test_kill_evaluate(quantized, tmp_path, capsys):
    score = quantized / "eval.json"
    read = lambda: {
        key: json.loads(score.read_text())[key] for key in ("val_bpb", "sliding_bpb", "ttt_bpb", "tokens_scored", "bytes_total")
    }
    start = lambda: [Command(eval_ttt, quantized, log=tmp_path / "out", DEVICE="cpu")]
    invariant = lambda: score.exists() and json.loads(score.read_text())
    survive("evaluate", Scenario(start, rewind(quantized), read, invariant), scaled(30), capsys)


def test_kill_codec(quantized, tmp_path, capsys):
    text, coded = tmp_path / "text.txt", tmp_path / "coded"
    text.write_bytes((ROOT / "LICENSE").read_bytes()[:600])
    start = lambda: [Command(codec, "compress", quantized / "artifact.bin", text, coded, log=tmp_path / "out", DEVICE="cpu")]
    invariant = lambda: coded.exists() and codec.CodedText.unpack(coded.read_bytes(), "coded")
    survive("codec, compress", Scenario(start, lambda: coded.unlink(missing_ok=True), lambda: digest(coded), invariant), scaled(20), capsys)


# ----------------------------------------------------------------------------------------------------------------------
# Disks
# ----------------------------------------------------------------------------------------------------------------------


def with_room_for(size: int) -> Callable[[], None]:
    """No file of the process may grow beyond `size` bytes: writes fail as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        T.RETRY_SECONDS = 0.02

    return limit


def test_full_disks(base, tmp_path, capsys):
    """Training and quantizing with room for files of a random size only: one line and exit code 2, or all went well; afterwards, as undisturbed."""
    # The room is that of this test's own log at least: it is read there when the run waits for more.
    rng, folder = random.Random(SEED), tmp_path / "runs" / "run"
    assert run_to_end(T, log=tmp_path / "whole", **base).code == 0
    expected, size = weights_of(folder), (folder / "model.safetensors").stat().st_size
    codes: dict[int, int] = {}
    for case in range(scaled(30)):
        shutil.rmtree(folder)
        command = Command(T, log=tmp_path / f"out{case}", prelude=with_room_for(max(40_000, int(size * 4 ** rng.uniform(-3, 1)))), **base)
        asked = False
        while command.poll() is None:
            if not asked and "in memory only" in command.text():
                asked = True  # once: asked again after five seconds, it would leave at once
                os.kill(command.pid, signal.SIGTERM)
            time.sleep(0.01)
        codes[command.code] = codes.get(command.code, 0) + 1
        assert command.code in (0, 2) and "Traceback" not in command.text(), command.text()[-2000:]
        lines = (folder / "metrics.jsonl").read_text().splitlines() if folder.exists() else []
        assert all(json.loads(line) for line in lines), "no torn line"
        again = run_to_end(T, log=tmp_path / f"again{case}", RESUME=1, **base)
        assert again.code == 0 and weights_of(folder) == expected, again.text()[-2000:]
    with capsys.disabled():
        print(f"\nfull disks: exit codes {codes}, all as undisturbed once there was room")


@pytest.fixture
def mounted(tmp_path) -> Callable[..., Path]:
    """mounted(options) -> a memory file system on tmp_path/"disk", made or, if it is there, changed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if os.path.ismount(disk) else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", disk], capture_output=True, text=True)
        assert not done.returncode, f"these cases need a user who may mount, or -k 'not file_systems': {done.stderr.strip()}"
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def test_full_file_systems(base, mounted, tmp_path, capsys):
    """The same on a file system that is full as a whole, logs included; half of the runs get room while they wait for it."""
    rng = random.Random(SEED)
    assert run_to_end(T, log=tmp_path / "whole", **base).code == 0
    expected, size = weights_of(tmp_path / "runs" / "run"), (tmp_path / "runs" / "run" / "model.safetensors").stat().st_size
    there = {**base, "RUNS_DIR": mounted("size=64m")}
    folder, codes = there["RUNS_DIR"] / "run", {}
    for case in range(scaled(30)):
        shutil.rmtree(folder, ignore_errors=True)
        mounted(f"size={int(size * 4 ** rng.uniform(-3, 2)) >> 10}k")
        command = Command(T, log=tmp_path / f"out{case}", prelude=lambda: setattr(T, "RETRY_SECONDS", 0.02), **there)
        waited = False
        while command.poll() is None:
            if not waited and "in memory only" in command.text():
                waited = True
                mounted("size=64m") if case % 2 else os.kill(command.pid, signal.SIGTERM)
            time.sleep(0.01)
        codes[command.code] = codes.get(command.code, 0) + 1
        assert command.code in (0, 2) and "Traceback" not in command.text(), command.text()[-2000:]
        assert not (waited and case % 2 and command.code), "it was told to wait for room, and there was room"
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        assert all(json.loads(line) for line in lines), "no torn line"
        mounted("size=64m")
        again = run_to_end(T, log=tmp_path / f"again{case}", RESUME=1, **there)
        assert again.code == 0 and weights_of(folder) == expected, again.text()[-2000:]
    with capsys.disabled():
        print(f"\nfull file systems: exit codes {codes}, all as undisturbed once there was room")


def test_read_only_file_systems(base, pipeline, mounted, tmp_path, capsys):
    """Every command that would write there ends in one line and exit code 2; evaluation, which may show its score, in a warning. Nothing changes."""
    disk = mounted("size=64m")
    folder, text = shutil.copytree(pipeline, disk / "run"), tmp_path / "text.txt"
    text.write_bytes(b"Permission is hereby granted")
    (disk / "runs").mkdir()
    before = {path: digest(path) for path in disk.rglob("*") if path.is_file()}
    mounted("ro")
    artifact, reads = folder / "artifact.bin", {"DEVICE": "cpu"}
    tries = {
        "train": (T, [], {**base, "RUNS_DIR": disk / "runs"}),
        "resume": (T, [], {**base, "RUNS_DIR": disk, "RESUME": 1, "ITERATIONS": 30}),
        "quantize": (Q, [folder], reads),
        "table": (Q, ["table", folder, "--variants", "rtn"], reads),
        "bundle": (Q, ["bundle", folder, "--out", disk / "submission"], reads),
        "evaluate": (eval_ttt, [folder], reads),
        "compress": (codec, ["compress", artifact, text, disk / "coded"], reads),
        "decompress": (codec, ["decompress", folder / "coded", disk / "text.txt", "--artifact", artifact], reads),
        "prepare": (prepare, [text, "--val", text, "--out", disk / "data", "--vocab-size", 300], {}),
    }
    for name, (module, arguments, settings) in tries.items():
        command = run_to_end(module, *arguments, log=tmp_path / name, **settings)
        errors = [line for line in command.text().splitlines() if line.startswith("error")]
        code = 0 if name == "evaluate" else 2
        assert command.code == code and "Traceback" not in command.text() and len(errors) == bool(code), f"{name}: {command.text()[-2000:]}"
    assert "cannot be written: the score will be printed only" in (tmp_path / "evaluate").read_text()
    assert "\nval_loss:" in (tmp_path / "evaluate").read_text()
    assert {path: digest(path) for path in disk.rglob("*") if path.is_file()} == before
    with capsys.disabled():
        print(f"\nread-only file systems: {', '.join(tries)}: one line each, nothing changed")


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files
# ----------------------------------------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "replace", "insert", "delete", "cut", "repeat"]), st.floats(0, 1, exclude_max=True), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def damage(data: bytes, edits) -> bytes:
    """Edits at relative places, half of them aimed at the first kilobyte, where headers are."""
    for index, (kind, where, extra) in enumerate(edits):
        place = int(where * (min(len(data), 1024) if index % 2 == 0 else len(data)))
        if kind == "flip" and data:
            data = data[:place] + bytes([data[place] ^ (1 << (extra[0] % 8 if extra else 0))]) + data[place + 1 :]
        elif kind == "replace":
            data = data[:place] + extra + data[place + len(extra) :]
        elif kind == "insert":
            data = data[:place] + extra + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + 1 + len(extra) :]
        elif kind == "cut":
            data = data[:place]
        elif kind == "repeat":
            data = data[:place] + data[place : place + 64] + data[place:]
    return data


def in_a_fork(action: Callable[[], None], log: Path) -> None:
    """A reader may take the process with it (native parsers): it is tried in one of its own, within 8 GiB."""

    class Module:
        __file__ = "fuzz"

        @staticmethod
        def main() -> int:
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
            action()
            return 0

    command = run_to_end(Module, log=log)
    assert command.code == 0, f"exit code {command.code}\n{command.text()[-6000:]}"


def fuzz(strategy, cases: int, body: Callable[[object], None]) -> Callable[[], None]:
    """`body` on that many examples; only UserError may come out of it."""

    @seed(SEED)
    @hypothesis_settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=True,
    )
    @given(strategy)
    def examples(value) -> None:
        with contextlib.suppress(UserError):
            body(value)

    return examples


def read_artifact(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context())
        load_artifact(path, check_tokenizer=False)


def read_tokenizer(path: Path) -> None:
    shards.ByteTable.from_tokenizer(shards.load_tokenizer(path, 512))


def read_shards(path: Path) -> None:
    shards.load_shard(path, 512)
    shards.split_digest(path.parent, "val")


def read_checkpoint(path: Path) -> None:
    _, meta = T.load_tensors(path)
    T.check_meta(path, meta, T.CHECKPOINT_META, "a checkpoint")
    T.Config.from_dict(meta["config"])


def read_settings(path: Path) -> None:
    if settings := T.run_settings(path.parent):
        T.resolve_config({}, base=settings)


def read_lock(path: Path) -> None:
    with runs.run_lock(path.parent):
        pass


def read_log(path: Path) -> None:
    runs.LogFile(path).close()
    runs.read_metrics(path.parent)
    demo.report(path.parent, T.Config())


READERS = {
    "fineweb_val_000000.bin": read_shards,
    "manifest.json": lambda path: (
        shards.check_tokenizer(path.parent, path.parent / "tokenizer.model"),
        shards.split_digest(path.parent, "train"),
    ),
    "tokenizer.model": read_tokenizer,
    "checkpoints/step_0000024.safetensors": read_checkpoint,
    "model.safetensors": lambda path: T.load_run(path.parent),
    "config.json": read_settings,
    "artifact.bin": read_artifact,
    "metrics.jsonl": read_log,
    "eval.json": lambda path: demo.report(path.parent, T.Config()),
    "coded": lambda path: codec.CodedText.unpack(path.read_bytes(), "coded"),
    ".lock": read_lock,
}


@pytest.mark.parametrize("name", READERS)
def test_fuzz_reader(files, tmp_path, capsys, name):
    """Damaged files of every kind."""
    if name == "config.json":  # is read only where nothing better is there
        shutil.rmtree(files / "checkpoints")
        (files / "model.safetensors").unlink()
    path, cases = files / name, scaled(1400)
    if name == ".lock":
        path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then"}))
    whole = path.read_bytes()

    def body(value) -> None:
        path.write_bytes(value if isinstance(value, bytes) else damage(whole, value))
        READERS[name](path)

    in_a_fork(fuzz(EDITS | st.binary(max_size=300), cases, body), tmp_path / "fuzz")
    with capsys.disabled():
        print(f"\n{name}: {cases:,} damaged files, none but clean refusals")


def changed(value: dict, change) -> dict:
    """A copy with one entry, perhaps a nested one, taken out or replaced."""
    keys, new, remove = change
    copy = json.loads(json.dumps(value))
    here = copy
    for number in keys:
        if not isinstance(here, dict) or not here:
            break
        name = sorted(here)[number % len(here)]
        if isinstance(here[name], dict) and number % 3 and here[name]:
            here = here[name]
            continue
        if remove:
            del here[name]
        else:
            here[name] = new
        break
    return copy


CHANGES = st.lists(st.tuples(st.lists(st.integers(0, 400), min_size=1, max_size=3), JSON, st.booleans()), min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/step_0000024.safetensors", "artifact.bin", "config.json"])
def test_fuzz_forged_headers(files, tmp_path, capsys, name):
    """Headers of wrong contents under a right checksum: refused or read, and where a model is built, of its own size."""
    path, cases = files / name, scaled(1150)
    if name == "artifact.bin":
        data = path.read_bytes()
        fixed = packing._HEAD.size

        def body(edits) -> None:
            length = packing._HEAD.unpack_from(data)[3]
            middle = damage(data[fixed : fixed + length], edits)
            path.write_bytes(reseal(data[:fixed] + middle + data[fixed + length :]))
            read_artifact(path)

        strategy = EDITS
    elif name == "config.json":
        shutil.rmtree(files / "checkpoints")
        (files / "model.safetensors").unlink()
        config = json.loads(path.read_text())

        def body(changes) -> None:
            value = config
            for change in changes:
                value = changed(value, change)
            path.write_text(json.dumps(value))
            read_settings(path)

        strategy = CHANGES
    else:
        tensors, meta = T.load_tensors(path)

        def body(changes) -> None:
            value = meta
            for change in changes:
                value = changed(value, change)
            T.save_tensors(path, tensors, value)
            (read_checkpoint if "step" in name else lambda path: T.Config.from_dict(T.load_run(path.parent)[0]))(path)

        strategy = CHANGES
    in_a_fork(fuzz(strategy, cases, body), tmp_path / "fuzz")
    with capsys.disabled():
        print(f"\n{name}: {cases:,} forged headers, none but clean refusals")


def test_bombs(tmp_path):
    """Small files that claim or unfold to much."""
    import brotli

    def main() -> None:
        folder = tmp_path / "bombs"
        (folder / "checkpoints").mkdir(parents=True)
        deep = b"[" * 500_000
        for name, reader in READERS.items():
            path = folder / name
            for data in (deep, b'{"a":' * 200_000, b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}", b"", b"\0" * 4096):
                path.write_bytes(data)
                with contextlib.suppress(UserError, FileNotFoundError):  # what it reads beside the bomb is not there
                    reader(path)
            path.unlink(missing_ok=True)
        body = codec.MAGIC + bytes(64) + (1 << 20).to_bytes(4, "little") + brotli.compress(b" " * (1 << 28))
        with contextlib.suppress(UserError):
            codec.CodedText.unpack(body + hashlib.sha256(body).digest()[: codec._DIGEST], "coded")

    in_a_fork(main, tmp_path / "fuzz")


def test_threads_are_one():
    """Forks of a process whose thread pools have started would hang in them."""
    assert torch.get_num_threads() == 1

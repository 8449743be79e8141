"""Several ranks and nodes as a user starts them: what their exchanges cost, one that dies, the launch scripts."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import ROOT, clean_environment

import train_gpt as T
from parts.files import UserError, lost_rank
from parts.predict import main as predict_main
from parts.predict import predict
from parts.runs import StopSignal
from train_gpt import RunContext


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SCRIPT = """
import os, signal, train_gpt
from parts.files import cli
FIRST
cli(train_gpt.main)
"""


def two_ranks(tmp_path, *arguments: str, first: str = "", **settings) -> subprocess.CompletedProcess:
    """train_gpt.py on two ranks without torchrun, after the statements `first`."""
    (tmp_path / "ranks.py").write_text(SCRIPT.replace("FIRST", first))
    return forked.run(tmp_path / "ranks.py", *arguments, ranks=2, environment=clean_environment(**settings), folder=tmp_path)


def test_the_benchmark_says_what_exchanges_between_ranks_cost(launch, tmp_path):
    """Calls and bytes of every kind as the model's shapes give them; each rank sends as much as it must, and no more."""
    settings = {**launch.settings, "RUNS_DIR": tmp_path, "RUN_ID": "two", "LAYER_PATTERN": "AT", "MICRO_BATCH_TOKENS": 128, "DEVICE": "cpu"}
    done = two_ranks(tmp_path, "--bench", first="train_gpt.Benchmark.SECONDS = 0", **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "bench-two.json").read_text())
    (phase,) = report["phases"].values()
    assert report["world_size"] == 2 and report["tokens_a_step"] == 512 and phase["tokens_per_second"] > 0
    model = T.build_model(T.resolve_config({name: str(value) for name, value in settings.items()}))
    shapes = [spec.shape for spec in T.parameter_table(model) if spec.optimizer == "muon"]
    padded = [(shapes.count(shape) + 1) // 2 * 2 * shape[0] * shape[1] for shape in set(shapes)]
    expected = {
        "clock, stop (host)": (2, 2 * 2 * 8),  # before a step, and between its two micro-batches of a rank: two float64
        "gradients": (1, 4 * (T.count_params(model) + 1)),  # and the loss
        "Muon's updates": (len(padded), 4 * sum(padded)),
    }
    assert {kind: (cost["calls"], cost["bytes"]) for kind, cost in phase["collectives"].items()} == expected
    for kind, cost in phase["collectives"].items():
        assert cost["alone_ms"] > 0 and cost["exposed_ms"] > 0 and cost["bus_gb_per_second"] > 0
        assert any(kind in line and "ms" in line for line in done.stdout.splitlines()), kind
    carried = {"gradients": 1.0, "Muon's updates": 0.5}  # of the bytes, over a bus of two: 2(n-1)/n and (n-1)/n
    for kind, share in carried.items():
        cost = phase["collectives"][kind]
        assert abs(cost["bus_gb_per_second"] * 1e6 * cost["alone_ms"] / cost["bytes"] - share) < 1e-6


DYING = """
step = train_gpt.Trainer.run_step
def dying(trainer, progress):
    if trainer.state.step == 3 and trainer.ctx.rank == 1:
        HOW
    return step(trainer, progress)
train_gpt.Trainer.run_step = dying
"""
ENDLESS = {"RUN_ID": "run", "LAYER_PATTERN": "AT", "ITERATIONS": 100000, "DEVICE": "cpu"}


def assert_that_it_ended_well(done: subprocess.CompletedProcess, message: str, folder: Path) -> None:
    """The dead rank's message is there, and so is the state of the last whole step: nothing else, nothing half-written."""
    assert done.returncode > 0 and message in done.stderr, done.stderr[-3000:]
    assert "step 4 failed: saved" in done.stdout and "RESUME=1 RUN_ID=run continues" in done.stdout
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert T.load_tensors(checkpoint)[1]["step"] == 3
    assert {path.name for path in folder.iterdir()} == {".lock", "checkpoints", "config.json", "metrics.jsonl", "train.log"}


@pytest.mark.faults
def test_a_rank_with_a_fault_takes_the_job_down(launch, tmp_path):
    settings = {**launch.settings, "RUNS_DIR": launch.runs, **ENDLESS}
    done = two_ranks(tmp_path, first=DYING.replace("HOW", "raise ValueError('of rank 1')"), **settings)
    assert_that_it_ended_well(done, "ValueError: of rank 1", launch.runs / "run")
    assert "error: lost touch with another rank" in done.stderr  # rank 0's; torchrun's SIGTERM may come before it is said


def test_a_killed_rank_takes_the_job_down(launch, tmp_path):
    (tmp_path / "dying.py").write_text(SCRIPT.replace("FIRST", DYING.replace("HOW", "os.kill(os.getpid(), signal.SIGKILL)")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "dying.py")]
    environment = clean_environment(**{**launch.settings, "RUNS_DIR": launch.runs, **ENDLESS}, PYTHONPATH=ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert_that_it_ended_well(done, "Signal 9 (SIGKILL) received", launch.runs / "run")


def test_a_device_that_waits_for_a_lost_rank_is_not_waited_for(monkeypatch):
    """An exchange over NCCL with a rank that is gone never ends: neither the wait for it nor the end of the group may take the process along."""
    monkeypatch.setattr(T, "LOST_SECONDS", 0.01)
    trainer = SimpleNamespace(ctx=RunContext(0, 2, 0, torch.device("cuda")), stop=StopSignal(), state=SimpleNamespace(step=7))
    answers = iter([False, False, True])
    T.Trainer.wait_for(trainer, SimpleNamespace(query=lambda: next(answers)))  # a step that ends, before and after a signal
    trainer.stop.request(signal.SIGTERM)
    T.Trainer.wait_for(trainer, SimpleNamespace(query=lambda: True))
    monkeypatch.setattr(T.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(T.dist, "destroy_process_group", lambda: pytest.fail("it would wait"))
    leave = []
    monkeypatch.setattr(T.atexit, "register", lambda *how: leave.append(how))
    with pytest.raises(RuntimeError, match="step 7 did not end") as fault:
        try:
            T.Trainer.wait_for(trainer, SimpleNamespace(query=lambda: False))
        finally:
            trainer.ctx.close()
    assert lost_rank(fault.value).startswith("lost touch with another rank") and leave == [(os._exit, 2)]


# ---- launch scripts, with stand-ins for what only a cluster has ----


def stand_ins(tmp_path, **scripts: str) -> dict:
    """An environment in which these commands come first, and the suite's Python serves; what they note goes to $NOTES."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": tmp_path, "PYTHON": sys.executable}


def as_arguments(settings: dict) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def over_ssh(*arguments: str, **environment) -> subprocess.CompletedProcess:
    environment = clean_environment(**environment)
    return subprocess.run([ROOT / "launch/ssh.sh", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.faults
def test_two_hosts_train_over_ssh(launch, tmp_path):
    settings = {**launch.settings, "RUNS_DIR": tmp_path / "a b", "RUN_ID": "run", "LAYER_PATTERN": "AT", "ITERATIONS": 3, "DEVICE": "cpu"}
    environment = stand_ins(tmp_path, ssh='echo "$*" >> "$NOTES/calls"; exec bash -c "${@: -1}"')
    done = over_ssh("localhost", "me@127.0.0.1", "--", *as_arguments(settings), **environment, GPUS=1, MASTER_PORT=free_port())
    assert done.returncode == 0, done.stderr[-3000:]
    assert T.load_run(tmp_path / "a b" / "run")[2]["world_size"] == 2
    calls = sorted((tmp_path / "calls").read_text().splitlines())
    assert [call.split(" cd ")[0] for call in calls] == ["-tt -o BatchMode=yes localhost", "-tt -o BatchMode=yes me@127.0.0.1"]


def test_a_host_that_cannot_be_reached_ends_the_others(tmp_path):
    ssh = '[ "$4" = there ] && { echo $$ > "$NOTES/there"; exec tail -f /dev/null; }; until [ -s "$NOTES/there" ]; do :; done; exit 255'
    done = over_ssh("there", "away", "--", "RUN_ID=run", **stand_ins(tmp_path, ssh=ssh), GRACE="0.1")
    assert done.returncode == 255
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "there").read_text()), 0)
    assert over_ssh("node1", "node2").returncode == 2  # no settings: not taken for a start with all defaults


def descendants(pid: int) -> list[int]:
    children = [int(child) for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()]
    return children + [each for child in children for each in descendants(child)]


# A step of nodes that are all this machine: training runs on each, the steps after it are noted.
SRUN = """
while [[ $1 == --* ]]; do shift; done
all=$*
[[ $all == *train_gpt.py* ]] || { echo "${all#*--rdzv-endpoint }" >> "$NOTES/steps"; exit; }
echo $$ > "$NOTES/srun"
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & done
for ((node = 0; node < SLURM_NNODES; node++)); do wait -n || exit; done
"""
SCONTROL = 'if [ "$1" = show ]; then echo localhost; else echo "$*" >> "$NOTES/requeued"; fi'


@pytest.mark.faults
def test_a_slurm_job_is_requeued_before_its_time_limit_and_goes_on(launch, tmp_path):
    """SIGUSR1 reaches all that the step runs, torchrun's agents too, and only training acts on it. The run then goes on, here on two nodes."""
    script = ROOT / "launch/slurm.sh"
    assert "#SBATCH --signal=USR1@120\n" in script.read_text()  # without B:, which would tell the batch script alone
    settings = {**launch.settings, "RUNS_DIR": launch.runs, "RUN_ID": "run", "LAYER_PATTERN": "AT", "TRAIN_LOG_EVERY": 1, "DEVICE": "cpu"}
    environment = stand_ins(tmp_path, srun=SRUN, scontrol=SCONTROL)
    environment |= {"SLURM_JOB_ID": free_port(), "SLURM_GPUS_ON_NODE": 1, "SLURM_JOB_NODELIST": "node[1-2]"}

    def job(nodes: int, **more) -> subprocess.Popen:
        command = ["bash", script, *as_arguments({**settings, **more})]
        slurm = clean_environment(**environment, SLURM_NNODES=nodes)
        return subprocess.Popen(command, env=slurm, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = job(1, ITERATIONS=100000)
    for line in first.stdout:
        if line.startswith("step:3/"):
            for pid in descendants(int((tmp_path / "srun").read_text())):
                os.kill(pid, signal.SIGUSR1)
    assert first.wait(timeout=60) == 0 and (tmp_path / "requeued").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    assert not (tmp_path / "steps").exists()
    (checkpoint,) = (launch.runs / "run" / "checkpoints").iterdir()
    reached = T.load_tensors(checkpoint)[1]["step"]
    second = job(2, ITERATIONS=reached + 2)
    output = second.communicate(timeout=100)[0]
    assert second.returncode == 0, output[-3000:]
    assert f"resume: step {reached}" in output
    meta = T.load_run(launch.runs / "run")[2]
    assert (meta["steps"], meta["world_size"]) == (reached + 2, 2)
    steps = [step.split(maxsplit=1)[1] for step in (tmp_path / "steps").read_text().splitlines()]
    assert steps == [f"quantize.py {launch.runs}/run", f"eval_ttt.py {launch.runs}/run --audit"]


# ---- the prediction ----


def benchmark_of(ranks: int, tokens: int) -> dict:
    """What --bench reports where a step is exactly the sum that the prediction takes it for."""
    micro_batches, exchanged = tokens / ranks / 1000, 1.6 * (1 - 1 / ranks)
    phases = {}
    for phase, compute in (("plain at 64", 80.0), ("looping at 64", 120.0)):
        step = micro_batches * compute + 1.5 + 0.8 / ranks + exchanged + 0.3 * (ranks > 1)
        costs = {"gradients": {"exposed_ms": 0.75 * exchanged}, "Muon's updates": {"exposed_ms": 0.25 * exchanged}}
        phases[phase] = {
            "milliseconds": step, "tokens_per_second": 1000 * tokens / step, "parts_ms": {"optimizer": 1.5 + 0.8 / ranks},
            "collectives": {**costs, "clock, stop (host)": {"exposed_ms": 50.0}} if ranks > 1 else {},
        }  # fmt: skip
    return {"world_size": ranks, "tokens_a_step": tokens, "micro_batch_tokens": 1000, "phases": phases}


@pytest.mark.parametrize("few", [benchmark_of(2, 8000), benchmark_of(2, 2000), benchmark_of(4, 8000)])
def test_a_step_on_eight_is_predicted_from_one_and_a_few(few):
    truth = benchmark_of(8, 8000)
    for phase, row in predict(benchmark_of(1, 8000), few, 8, 8000).items():
        assert row["milliseconds"] == pytest.approx(truth["phases"][phase]["milliseconds"])
        assert row["exchanges"] == pytest.approx(1.4) and row["rest"] == pytest.approx(0.3) and row["optimizer"] == pytest.approx(1.6)
    with pytest.raises(UserError, match="do not divide"):
        predict(benchmark_of(1, 8000), few, 3, 8000)


def test_the_prediction_counts_steps(tmp_path, monkeypatch, capsys):
    for ranks in (1, 2):
        (tmp_path / f"{ranks}.json").write_text(json.dumps(benchmark_of(ranks, 8000)))
    monkeypatch.setattr(
        sys, "argv", ["predict", str(tmp_path / "1.json"), str(tmp_path / "2.json"), "--seconds", "100", "--loop-at", "0.4"]
    )
    predict_main()
    plain, looping = (row["milliseconds"] for row in benchmark_of(8, 8000)["phases"].values())
    steps = 40_000 / plain + 60_000 / looping
    assert capsys.readouterr().out.splitlines()[-1] == f"{steps:,.0f} steps, {steps * 8000 / 1e9:.2f}B tokens in 100 s"

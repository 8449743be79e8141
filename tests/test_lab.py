"""lab.py: plans, the queue and its state on disk. Commands are stand-ins except where a test says so."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment

from parts.files import UserError, read_json, write_json
from parts.lab import queue as Q
from parts.lab.spec import Plan, Run, check_plan, load_plan, make_plan
from parts.runs import run_lock

# A stand-in for training: notes every start, waits where it is told to, and ends as it is told to.
COMMAND = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with open(folder / "starts", "a") as file:
    print(os.environ["SEED"], os.environ.get("X", ""), os.environ.get("CUDA_VISIBLE_DEVICES", ""), file=file)
if os.environ.get("WAIT"):
    open(os.environ["WAIT"]).read()
print("step 1\\nerror: the loss is no number\\nand that was it" if os.environ.get("FAIL") else "done")
sys.exit(int(os.environ.get("FAIL", 0)))
"""


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "command.py"
    path.write_text(COMMAND)
    return {"train": [str(path), "{run}"]}


def work(plan: Plan, root, devices=("cpu",), **options) -> tuple[int, list[str]]:
    lines = []
    return Q.Queue(plan, root, Q.Local(list(devices)), lines.append, poll_seconds=0.01).run(**options), lines


def starts(folder) -> list[str]:
    return (folder / "starts").read_text().splitlines()


def test_a_spec_is_spread_out():
    spec = {
        "name": "q", "preset": "base/one_gpu", "seeds": 3, "change_seeds": [7], "stages": ["quantize"], "with": {"MATRIX_LR": 1e-4},
        "set": {"NUM_LOOPS": 0, "XSA_LAYERS": ["", "7-10"]}, "grid": {"MUON_WD": [0.0, 0.1], "SMEAR_GATE": [True, False]},
        "runs": {"small": {"MODEL_DIM": 384, "seeds": 1}},
    }  # fmt: skip
    plan = make_plan(spec)
    assert [run.name for run in plan.runs] == [
        "reference-s1337", "reference-s1338", "reference-s1339", "num_loops_0-s7", "xsa_layers_none-s7", "xsa_layers_7-10-s7",
        "muon_wd_0.0-smear_gate_1-s7", "muon_wd_0.0-smear_gate_0-s7", "muon_wd_0.1-smear_gate_1-s7", "muon_wd_0.1-smear_gate_0-s7", "small-s1337",
    ]  # fmt: skip
    assert plan.runs[3].settings == {"PRESET": "base/one_gpu", "MATRIX_LR": "0.0001", "NUM_LOOPS": "0", "SEED": "7"}
    assert list(plan.commands) == ["train", "quantize"], "what comes before is needed"
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert [run.reference for run in plan.runs].count(True) == 3
    assert not any(run.reference for run in make_plan({**spec, "reference": False}).runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "unknown key 'seed'"),
        ({"seeds": 0}, "neither a number of seeds nor a list"),
        ({"stages": ["score"]}, "stages: 'score'; known: train, quantize, evaluate"),
        ({"set": {"num_loops": 1}}, "written in capitals"),
        ({"with": {"SEED": 1}}, "SEED is the queue's to set"),
        ({"with": {"NUM_LOOPS": [0, 1]}}, "several values"),
        ({"name": "../q"}, "not a plain folder name"),
        ({"set": {"A": [1, "1"]}}, "two runs would be called a_1-s1337"),
        ({"reference": False}, "nothing to run"),
        ({"runs": {"reference": {}}}, "choose another name"),
    ],
)
def test_faults_of_a_spec_are_one_line(change, message):
    with pytest.raises(UserError, match=message):
        make_plan({"name": "q", **change})


def test_every_run_is_checked_before_the_first_begins(tmp_path):
    path = tmp_path / "q.toml"
    path.write_text('preset = "base"\n[set]\nNUM_LOOP = 1\n')
    with pytest.raises(UserError, match=r"num_loop_1-s1337: .*did you mean NUM_LOOPS"):
        check_plan(load_plan(path), {})
    path.write_text('preset = "base"\n[set]\nMODEL_DIM = -1\n')
    with pytest.raises(UserError, match="model_dim_-1-s1337: MODEL_DIM=-1"):
        check_plan(load_plan(path), {})
    path.write_text("preset = ")
    with pytest.raises(UserError, match=r"q\.toml is not TOML"):
        load_plan(path)


def test_a_failed_run_is_a_row_and_the_queue_goes_on(tmp_path, command):
    runs = [Run("reference", 1, {"SEED": "1"}, True), Run("bad", 1, {"SEED": "1", "FAIL": "2"}), Run("good", 1, {"SEED": "1", "X": "x"})]
    plan = Plan("q", runs, {**command, "quantize": [*command["train"], "more"]})
    code, lines = work(plan, tmp_path)
    assert code == 1 and "failed: bad-s1: train: error: the loss is no number (exit code 2)" in lines
    assert lines[0] == "0 of 3 done, 0 running, 3 left; 0 s so far"
    assert lines[-3].startswith("2 of 3 done, 0 running, 1 failed, 0 left; ")
    assert [len(starts(tmp_path / "q" / name)) for name in ("reference-s1", "bad-s1", "good-s1")] == [2, 1, 2]
    assert starts(tmp_path / "q" / "good-s1")[0].startswith("1 x")
    code, _ = work(plan, tmp_path)
    assert code == 1 and len(starts(tmp_path / "q" / "bad-s1")) == 1, "done and failed runs stay as they are"
    mended = Plan("q", [*runs[:1], Run("bad", 1, {"SEED": "1"}), *runs[2:]], plan.commands)
    with pytest.raises(UserError, match=r"bad-s1 was made with FAIL=2, not \(nothing\)"):
        work(mended, tmp_path)
    (tmp_path / "command.py").write_text(COMMAND.replace('sys.exit(int(os.environ.get("FAIL", 0)))', ""))
    code, _ = work(plan, tmp_path, retry=True)
    assert code == 0 and len(starts(tmp_path / "q" / "bad-s1")) == 3


def test_a_stage_may_be_added_later(tmp_path, command):
    runs = [Run("reference", 1, {"SEED": "1"}, True)]
    work(Plan("q", runs, command), tmp_path)
    work(Plan("q", runs, {**command, "quantize": command["train"]}), tmp_path)
    work(Plan("q", runs, command), tmp_path)
    assert len(starts(tmp_path / "q" / "reference-s1")) == 2
    assert list(read_json(tmp_path / "q" / "reference-s1" / "lab.json")["done"]) == ["train", "quantize"]


def test_each_device_has_one_run_at_a_time(tmp_path, command):
    """Two runs wait for each other on two devices; the third takes the device of the first that ends."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = f"open({str(pipe)!r}, 'w').close()"  # opening a pipe waits for its other end
    (tmp_path / "command.py").write_text(COMMAND.replace("sys.exit", f"if os.environ['SEED'] == '2': {writer}\nsys.exit"))
    runs = [Run("a", seed, {"SEED": str(seed), **({"WAIT": str(pipe)} if seed == 1 else {})}) for seed in (1, 2, 3)]
    code, _ = work(Plan("q", runs, command), tmp_path, devices=("0", "1"))
    assert code == 0
    assert [starts(tmp_path / "q" / f"a-s{seed}")[0].split()[-1] for seed in (1, 2)] == ["0", "1"]
    assert starts(tmp_path / "q" / "a-s3")[0].split()[-1] in "01"


def test_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert Q.find_devices() == ["3", "5"] and Q.find_devices("0, 1") == ["0", "1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Q.find_devices() == ["cpu"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA (UUID: GPU-x)'\necho 'GPU 1: NVIDIA'\necho '  MIG 1g.10gb'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert Q.find_devices() == ["0", "1"]


def queue_process(tmp_path, plan: Plan) -> subprocess.Popen:
    """`lab.py run` with a plan of stand-ins, as a process that can be killed."""
    write_json(tmp_path / "plan.json", plan.to_dict())
    code = (
        "import json, sys; from pathlib import Path; from parts.lab.queue import *; from parts.lab.spec import Plan\n"
        "sys.exit(Queue(Plan.from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), Local(['cpu']), poll_seconds=0.01).run())"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "plan.json"), str(tmp_path)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment())


def test_a_killed_queue_goes_on_where_it_was(tmp_path, command):
    """SIGKILL while the second of three runs: what still runs is waited for, what is done stays, the rest follows."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    runs = [Run("a", seed, {"SEED": str(seed), **({"WAIT": str(pipe)} if seed == 2 else {})}) for seed in (1, 2, 3)]
    plan = Plan("q", runs, command)
    first = queue_process(tmp_path, plan)
    with open(pipe, "w"):  # open once the second run has opened it too, and open until the end of this block
        first.kill()
        first.wait()
        second = queue_process(tmp_path, plan)
        lines = [second.stdout.readline(), second.stdout.readline()]
        assert lines[0] == "1 still under way from before: a-s2\n"
        assert lines[1].startswith("1 of 3 done, 1 running (a-s2 train), 1 left")
        with pytest.raises(UserError, match="is in use by process"), run_lock(tmp_path / "q"):
            pass
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert [len(starts(tmp_path / "q" / f"a-s{seed}")) for seed in (1, 2, 3)] == [1, 1, 1]
    assert "3 of 3 done" in output


def test_what_died_with_the_machine_is_run_again(tmp_path, command):
    plan = Plan("q", [Run("a", 1, {"SEED": "1"})], command)
    work(plan, tmp_path)
    path = tmp_path / "q" / "a-s1" / "lab.json"
    write_json(path, read_json(path) | {"done": {}, "running": {"stage": "train", "pid": 1, "device": "cpu", "since": 0}})
    code, lines = work(plan, tmp_path)
    assert code == 0 and len(starts(path.parent)) == 2 and "under way" not in lines[0]


def test_a_stopped_queue_tells_its_runs_and_notes_nothing(tmp_path, command):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    plan = Plan("q", [Run("a", 1, {"SEED": "1", "WAIT": str(pipe)}), Run("b", 1, {"SEED": "1"})], command)
    process = queue_process(tmp_path, plan)
    with open(pipe, "w"):
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in output
    job = read_json(tmp_path / "q" / "a-s1" / "lab.json")
    assert job["done"] == {} and job["error"] is None and not (tmp_path / "q" / "b-s1" / "starts").exists()


def test_time_to_go_comes_from_what_finished(tmp_path, command, monkeypatch):
    plan = Plan("q", [Run("a", seed, {"SEED": str(seed)}) for seed in (1, 2, 3)], command)
    queue = Q.Queue(plan, tmp_path, Q.Local(["cpu"]))
    jobs = {folder: {"commands": plan.commands, "done": {}, "error": None} for folder in queue.folders}
    assert queue._to_go(jobs, {}) is None
    first, second, _ = queue.folders
    jobs[first]["done"] = {"train": {"seconds": 100.0}}
    monkeypatch.setattr(Q.time, "time", lambda: 1030.0)
    jobs[second]["running"] = {"stage": "train", "since": 1000.0}
    assert queue._to_go(jobs, {second: None}) == 70.0 + 100.0
    jobs[first]["done"] = {}
    second.mkdir(parents=True)
    (second / "metrics.jsonl").write_text('{"event": "train", "step": 1, "progress": 0.25}\n')
    assert queue._to_go(jobs, {second: None}) == 120.0 + 90.0 + 120.0
    assert queue._now(second, jobs[second]) == "a-s2 train 25%"


def test_submitit_runs_the_same_queue(tmp_path, command):
    plan = Plan("q", [Run("a", 1, {"SEED": "1", "X": "x"}), Run("b", 1, {"SEED": "1", "FAIL": "3"})], command)
    executor = Q.Submitit("local", tmp_path / "q", {"timeout_min": 2})
    lines = []
    assert Q.Queue(plan, tmp_path, executor, lines.append, poll_seconds=0.05).run() == 1
    assert starts(tmp_path / "q" / "a-s1") == ["1 x 0"] and any(line.startswith("failed: b-s1: train: error: the loss") for line in lines)
    assert executor.find(tmp_path / "q" / "a-s1") is None
    with pytest.raises(UserError, match="unknown_option"):
        Q.Submitit("local", tmp_path / "q", {"unknown_option": 2})


def test_a_queued_training_is_the_one_run_by_hand(tmp_path, dataset, launch):
    """The real command, once through the queue and once as its dry run prints it."""
    settings = {name: value for name, value in dataset.settings.items()} | {"DEVICE": "cpu", "ITERATIONS": "2", "SEED": "5"}
    plan = Plan("q", [Run("a", 5, settings)])
    assert work(plan, tmp_path)[0] == 0
    (line,) = plan.lines(tmp_path)
    assert line.endswith("python train_gpt.py") and "SEED=5" in line and "ITERATIONS=2" in line
    assert launch("train_gpt.py", ITERATIONS=2, SEED=5, RUN_ID="b").returncode == 0
    scores = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["val_bpb"]
        for folder in (tmp_path / "q" / "a-s5", launch.runs / "b")
    ]
    assert scores[0] == scores[1]

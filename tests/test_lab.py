"""lab.py: plans, the queue and its state on disk. Commands are stand-ins except where a test says so."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
from http.client import HTTPConnection
from urllib.parse import quote

import pytest
import torch
from conftest import ROOT, TINY, clean_environment
from scipy import stats

import train_gpt as T
from parts.files import UserError, read_json, write_json
from parts.lab import overview, plots, records
from parts.lab import queue as Q
from parts.lab.compare import Table, group_runs, interval
from parts.lab.results import Result, read_runs
from parts.lab.sample import generate
from parts.lab.spec import Plan, Run, check_plan, load_plan, make_plan
from parts.lab.watch import FILES, PAGE, POINTS, Server, details, summary, thin
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


def work(plan: Plan, root, devices=("cpu",), retry=False, **options) -> tuple[int, list[str]]:
    lines = []
    return Q.Queue(plan, root, Q.Local(list(devices)), lines.append, poll_seconds=0.01, **options).run(retry), lines


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
    alike = make_plan({"name": "q", "reference": False, "set": {"BITS_OVERRIDE": ["mlp:5", "mlp=5"]}})
    assert len({run.name for run in alike.runs}) == 2, "what folders cannot be called is told apart all the same"


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
    assert lines[-3].startswith("2 of 3 done, 0 running, 1 failed, 0 left; "), lines
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
    work(Plan("q", runs, {**command, "quantize": [*command["train"], "--otherwise"]}), tmp_path)
    assert len(starts(tmp_path / "q" / "reference-s1")) == 3, "what was done with other arguments is not done"


def test_a_queue_may_be_worked_off_in_instalments(tmp_path, command):
    """What was chosen first, then what there is time for, by the longest that any took; the folder may have been carried elsewhere between."""
    runs = [Run("reference", seed, {"SEED": str(seed)}, True) for seed in (1, 2)] + [
        Run(name, 1, {"SEED": "1"}) for name in ("a", "b", "c")
    ]
    plan = Plan("q", runs, {**command, "quantize": command["train"]})
    assert [run.name for run in plan.part(["a", "reference-s2"]).runs] == ["reference-s2", "a-s1"] and plan.part() == plan
    with pytest.raises(UserError, match="no run is called d; there are reference, a, b, c"):
        plan.part(["d"])
    code, lines = work(plan.part(["reference", "b"], "train"), tmp_path / "here", whole=plan)
    assert code == 0 and lines[-2].startswith("3 of 3 done") and not (tmp_path / "here" / "q" / "a-s1").exists()
    assert read_json(tmp_path / "here" / "q" / "plan.json") == plan.to_dict(), "the whole of it, for the next start"
    assert work(plan.part(["reference", "b"]), tmp_path / "here")[0] == 0 and len(starts(tmp_path / "here" / "q" / "b-s1")) == 2
    assert work(plan.part(["b"], "train"), tmp_path / "here")[0] == 0 and len(starts(tmp_path / "here" / "q" / "b-s1")) == 2

    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "q").rename(tmp_path / "there" / "q")
    longest = tmp_path / "there" / "q" / "b-s1" / "lab.json"
    write_json(longest, read_json(longest) | {"done": {"train": {"seconds": 50.0}, "quantize": {"seconds": 7.0}}})
    halfway = tmp_path / "there" / "q" / "c-s1"
    halfway.mkdir()
    kept = read_json(tmp_path / "there" / "q" / "reference-s1" / "lab.json")
    write_json(halfway / "lab.json", kept | {"variant": "c", "reference": False, "done": {"train": {"seconds": 1.0}}})
    code, lines = work(plan, tmp_path / "there", seconds=30.0)
    assert code == 0 and lines[-2] == "1 left for another time: none would have ended within 30 s; the same command goes on"
    assert len(starts(halfway)) == 1, "its quantization alone is short enough"
    assert not (tmp_path / "there" / "q" / "a-s1" / "starts").exists()
    code, _ = work(plan, tmp_path / "there", seconds=60.0)
    assert code == 0 and [len(starts(tmp_path / "there" / "q" / run.name)) for run in runs] == [2, 2, 2, 2, 1]


def test_time_that_is_spent_is_not_there_for_the_next(tmp_path, command, monkeypatch):
    plan = Plan("q", [Run("a", seed, {"SEED": str(seed)}) for seed in (1, 2)], command)
    work(plan.part(["a-s1"]), tmp_path)
    done = tmp_path / "q" / "a-s1" / "lab.json"
    write_json(done, read_json(done) | {"done": {"train": {"seconds": 20.0}}})
    queue = Q.Queue(plan, tmp_path, Q.Local(["cpu"]), seconds=30.0)
    queue.enter(plan.runs[1], queue.folders[1], retry=False)
    monkeypatch.setattr(Q.time, "monotonic", lambda: 1000.0)
    assert queue._next(queue.folders[1:], began=991.0) == queue.folders[1] and queue._next(queue.folders[1:], began=989.0) is None


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


def test_a_command_keeps_its_run_when_its_worker_is_killed(tmp_path, command):
    pipe, folder = tmp_path / "pipe", tmp_path / "q" / "a-s1"
    os.mkfifo(pipe)
    plan = Plan("q", [Run("a", 1, {"SEED": "1", "WAIT": str(pipe)})], command)
    Q.Queue(plan, tmp_path, Q.Local(["cpu"])).enter(plan.runs[0], tmp_path / "q" / "a-s1", retry=False)
    worker = subprocess.Popen([sys.executable, ROOT / "lab.py", "one", folder], env=clean_environment())
    with open(pipe, "w"):  # the command is there, and waits
        worker.kill()
        worker.wait()
        assert Q.taken(folder)


def test_a_queue_has_a_folder_of_its_own(tmp_path, command):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="q is a run's own folder: give the queue another --name"):
        work(Plan("q", [Run("a", 1, {"SEED": "1"})], command), tmp_path)


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


# ----------------------------------------------------------------------------------------------------------------------
# Reading runs, comparing them
# ----------------------------------------------------------------------------------------------------------------------


def kept(folder, score: float, seed: int = 1, job: dict | None = None, scored: int = 1000, **settings) -> Result:
    """A finished run's folder as the commands leave it, in a few lines."""
    folder.mkdir(parents=True)
    write_json(
        folder / "config.json", {"config": {"seed": seed, "num_loops": 2, **settings}, "origins": {"num_loops": "preset:base/one_gpu"}}
    )
    events = [
        {"event": "start", "device": "NVIDIA H100", "parameters": 1000},
        {
            "event": "train",
            "step": 5,
            "elapsed": 50.0,
            "progress": 0.5,
            "train_loss": 3.0,
            "lr": 1.0,
            "tokens_per_second": 9.0,
            "peak_memory_gib": 2.0,
        },
        {"event": "validation", "label": "ema", "step": 10, "val_bpb": score, "bytes_scored": scored, "elapsed": 100.0},
        {"event": "done", "step": 10, "steps": 10, "tokens": 640, "val_bpb": score, "tokens_per_second": 10.0, "train_seconds": 100.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if job is not None:
        write_json(
            folder / "lab.json", {"commands": {"train": []}, "done": {"train": {"seconds": 101}}, "environment": {}, "error": None, **job}
        )
    return Result(folder)


def test_intervals_are_the_formulas(tmp_path):
    """Welch, pairs and one seed against several, each against its textbook formula."""
    ours, others = [1.01, 1.03, 1.02, 1.05], [1.10, 1.04, 1.09]
    mine = {kept(tmp_path / f"a{i}", score, seed=i): score for i, score in enumerate(ours)}
    theirs = {kept(tmp_path / f"b{i}", score, seed=i): score for i, score in enumerate(others)}

    def around(center, error, freedom):
        half = stats.t.ppf(0.975, freedom) * error
        return pytest.approx((center - half, center + half))

    mean, var = statistics.fmean, statistics.variance
    a, b = var(ours) / 4, var(others) / 3
    freedom = (a + b) ** 2 / (a**2 / 3 + b**2 / 2)
    assert interval(mine, theirs, paired=False) == (around(mean(ours) - mean(others), (a + b) ** 0.5, freedom), "Welch")
    pairs = [x - y for x, y in zip(ours, others)]
    assert interval(mine, theirs, paired=True) == (around(mean(pairs), (var(pairs) / 3) ** 0.5, 2), "paired by seed")
    single = dict([next(iter(mine.items()))])
    assert interval(single, theirs, paired=False) == (around(ours[0] - mean(others), (var(others) * (1 + 1 / 3)) ** 0.5, 2), "Student")
    assert interval(single, dict([next(iter(theirs.items()))]), paired=False) == (None, "one seed: no interval")
    assert interval(single, theirs, paired=True)[0] is None
    same = {run: 1.0 for run in mine}
    assert interval(same, {run: 2.0 for run in theirs}, paired=False) == (None, "no variance between seeds: no interval")


def test_runs_started_by_hand_are_grouped_by_their_settings(tmp_path):
    runs = [kept(tmp_path / name, 1.0, seed, num_loops=loops) for name, seed, loops in (("a", 1, 0), ("b", 2, 0), ("c", 1, 1))]
    assert [[run.name for run in group.runs] for group in group_runs(runs)] == [["a", "b"], ["c"]]


def queue_of_runs(root):
    """A reference of three seeds, a change that gains, one that does nothing, one that fails, one not begun."""
    for seed, (reference, gain, noise) in enumerate([(1.000, 0.900, 1.002), (1.004, 0.903, 0.999), (0.997, 0.899, 1.001)]):
        kept(root / f"reference-s{seed}", reference, seed, {"variant": "reference", "reference": True})
        kept(root / f"gain-s{seed}", gain, seed, {"variant": "gain"}, num_loops=0)
        kept(root / f"noise-s{seed}", noise, seed, {"variant": "noise"}, num_loops=1)
    kept(root / "once-s0", 0.95, 0, {"variant": "once"}, num_loops=3)
    kept(root / "other-s0", 0.95, 0, {"variant": "other"}, num_loops=4, scored=999)
    for name, error in (("bad", "train: no memory"), ("next", None)):
        (root / f"{name}-s0").mkdir()
        job = {"variant": name, "commands": {"train": []}, "done": {}, "environment": {}, "error": error}
        write_json(root / f"{name}-s0" / "lab.json", job)
    return read_runs([root])


def test_the_table_calls_noise_noise(tmp_path):
    runs = queue_of_runs(tmp_path / "q")
    table = Table(runs)
    rows = {row.name: row for row in table.rows}
    assert [row.name for row in table.rows] == ["gain", "once", "other", "reference", "noise", "bad", "next"], "best first"
    assert {name: row.verdict for name, row in rows.items()} == {
        "gain": "better", "once": "better", "other": "scored on other text: no comparison", "reference": "reference",
        "noise": "within noise", "bad": "failed: train: no memory", "next": "queued",
    }  # fmt: skip
    assert rows["gain"].method == "Welch" and rows["once"].method == "Student" and rows["gain"].changes == "NUM_LOOPS=0"
    assert (
        rows["gain"].difference == pytest.approx(-0.0997, abs=1e-4) and rows["gain"].seconds == 100 and rows["gain"].tokens_per_second == 10
    )
    text = table.text()
    assert "Welch's t" in text and "Student's t for runs of one seed" in text and "float weights after training" in text
    assert any(row.method == "paired by seed" for row in Table(runs, paired=True).rows)
    turned = {row.name: row for row in Table(runs, reference="gain").rows}
    assert turned["reference"].verdict == "worse" and turned["gain"].verdict == "reference"
    single = Table([run for run in runs if run.seed == 0 and run.float_bpb])
    assert "there is no interval" in single.text() and {row.verdict for row in single.rows if row.name == "gain"} == {
        "one seed: no interval"
    }
    with pytest.raises(UserError, match="no run is called gone"):
        Table(runs, reference="gone")
    assert Table([run for run in runs if run.variant in ("bad", "gain")]).reference.name == "gain", "the first that has a score"
    assert "nothing to compare with: bad has no such score" in Table(runs, reference="bad").text()


def test_forms_of_the_table(tmp_path):
    table = Table(queue_of_runs(tmp_path / "q"))
    lines = table.csv().splitlines()
    head = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    first = dict(zip(lines[head].split(","), lines[head + 1].split(",")))
    assert first["run"] == "gain" and float(first["val_bpb"]) == table.rows[0].mean and float(first["low"]) == table.rows[0].bounds[0]
    markdown = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(markdown) == 2 + len(table.rows) and len({line.count("|") for line in markdown}) == 1
    assert "bytes" not in markdown[0], "a column that nothing fills is left out"


def test_the_score_is_compared_if_every_run_has_one(tmp_path):
    runs = [kept(tmp_path / name, score) for name, score in (("a", 1.0), ("b", 2.0))]
    assert Table(runs).metric == "float"
    for run, score in zip(runs, (0.9, 0.8)):
        write_json(run.folder / "eval.json", {"val_bpb": score, "sliding_bpb": 0.95, "bytes_total": 15, "bytes_scored": 1000})
    runs = read_runs([tmp_path])
    (row,) = Table(runs).rows  # equal settings: repetitions
    assert Table(runs).metric == "score" and row.mean == pytest.approx(0.85) and row.bytes_total == 15
    assert Table(runs, metric="artifact").rows[0].mean == 0.95
    with pytest.raises(UserError, match="no run is there"):
        read_runs([tmp_path / "nowhere"])


def test_states(tmp_path):
    runs = {run.name: run for run in queue_of_runs(tmp_path / "q")}
    assert [runs[name].state for name in ("gain-s0", "bad-s0", "next-s0")] == ["done", "failed", "queued"]
    folder = runs["next-s0"].folder
    me = {"stage": "quantize", "pid": os.getpid(), "host": socket.gethostname(), "since": 0}
    write_json(folder / "lab.json", read_json(folder / "lab.json") | {"running": me})
    assert Result(folder).state == "running" and Result(folder).stage == "quantize"
    write_json(folder / "lab.json", read_json(folder / "lab.json") | {"running": me | {"pid": 2**22 + 1}})
    assert Result(folder).state == "queued"
    (folder / "metrics.jsonl").write_text('{"event": "train", "step": 1, "progress": true}\n')
    assert Result(folder).state == "stopped" and Result(folder).progress is None
    with run_lock(runs["gain-s0"].folder):
        assert Result(runs["gain-s0"].folder).stage == "train"
    text = "\n".join(overview.run_lines([tmp_path]))
    assert re.search(r"gain-s1 +done +0.9030 float +base/one_gpu", text) and "train: no memory" in text
    assert any(re.match(r"  frontier/one_gpu +One GPU, 300 s", line) for line in overview.preset_lines())


def test_whoever_reads_may_leave(tmp_path):
    """`lab.py list | head`: no word of a broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, str(ROOT / "lab.py"), "list", str(tmp_path)], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("wrong", ["[]", '"text"', "null", "-1e999", "{}", '[{"a": null}]', "true"])
def test_what_is_damaged_is_missing_and_no_more(tmp_path, wrong):
    """Every value of every file of a run in turn is of another kind: the verbs go on, and the other runs are as they were."""
    whole = kept(
        tmp_path / "runs" / "whole", 1.25, job={"variant": "whole", "running": {"pid": 1, "host": "h", "stage": "train", "since": 0}}
    )
    write_json(
        whole.folder / "eval.json", {"val_bpb": 1.2, "bytes_total": 15, "bytes_scored": 9, "audit": {"verdict": "pass", "checks": []}}
    )
    write_json(whole.folder / "quantize.json", {"bytes_total": 15, "train_seconds_with_calibration": 3.0})
    damaged = tmp_path / "runs" / "damaged"
    shutil.copytree(whole.folder, damaged)
    for path in sorted(damaged.iterdir()):
        text = path.read_text()
        values = list(re.finditer(r'(?<=: )("[^"]*"|[-\d.]+|true|null|\{\}|\[\])', text)) + [re.match(".*", text)]
        for value in values:
            path.write_text(text[: value.start()] + wrong + text[value.end() :])
            runs = read_runs([tmp_path / "runs"])
            assert runs[1].name == "whole" and runs[1].bpb("score") == 1.2
            list(overview.run_lines([tmp_path / "runs"]))
            Table(runs, reference="whole").text()
            plots.figures(runs, list(plots.KINDS), list(plots.X_AXES))
            json.dumps([summary(runs[0]), details(runs[0])])
        path.write_text(text)


# ----------------------------------------------------------------------------------------------------------------------
# Text from an artifact
# ----------------------------------------------------------------------------------------------------------------------


def test_sampling_through_the_state_is_sampling_from_whole_texts():
    """Greedy, token by token, against a forward over the whole text each time; draws follow the seed and stay among the top k."""
    model = T.build_model(T.resolve_config({**TINY, "NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "2"}))
    model.looping = True
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    prompt = [1, 5, 9, 300]
    text = list(prompt)
    for _ in range(30):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert list(generate(model, prompt, 30, 0.0, 0, 1)) == text[4:] and T.BOS_ID not in text[4:]
    draws = [list(generate(model, prompt, 12, 1.0, 3, seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    with torch.no_grad():
        best = model(torch.tensor([prompt]))[0, -1].topk(3).indices.tolist()
    firsts = {next(generate(model, prompt, 1, 5.0, 3, seed)) for seed in range(40)}
    assert firsts == set(best)


def test_a_document_ends_where_the_next_begins():
    class Model(torch.nn.Module):
        """Says 7, 8, then a document's start."""

        weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, state, score_last):
            answer = {5: 7, 7: 8, 8: T.BOS_ID}[int(ids[0, -1])]
            return torch.nn.functional.one_hot(torch.tensor([[answer]]), 10).float()

    model = Model()
    model.register_parameter("w", Model.weight)
    assert list(generate(model, [1, 5], 10, 0.0, 0, 1)) == [7, 8]


@pytest.mark.parametrize("path", sorted((ROOT / "records").rglob("*.toml")), ids=lambda path: path.stem)
def test_published_specs_are_ready_to_run(path):
    plan = load_plan(path)
    check_plan(plan, {})
    assert all(run.settings["PRESET"].endswith("/one_gpu") for run in plan.runs)


# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", records.marked_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_tables_are_what_the_kept_files_say(file):
    assert records.with_tables(file) == file.read_text(), "stale: run `make records`"


def test_the_picture_is_what_the_kept_files_say():
    assert records.is_current(records.picture()), "stale: run `make records`"
    svg = (ROOT / "records" / f"{records.PICTURE}.svg").read_text()
    assert len(svg) < 100_000 and all(f">{line.label}</text>" in svg for line in records.picture().series)
    assert f"(records/{records.PICTURE}.svg)" in (ROOT / "README.md").read_text()


def test_every_kept_run_is_in_a_table():
    marked = {file.parent for file in records.marked_files()}
    assert {path.parent.parent for path in (ROOT / "records").glob("*/logs/metrics.jsonl")} <= marked


def test_a_kept_queue_is_in_the_tables(tmp_path):
    """Three seeds of a preset, kept from a queue: mean and deviation, links, and a table that is stale until it is made."""
    home = tmp_path / "records"
    (home / "base").mkdir(parents=True)
    (home / "base" / "config.env").write_text("")
    page = home / "base" / "README.md"
    page.write_text("# base\n\n<!-- make records: results -->\nold\n<!-- end -->\n\ntail\n")
    board = home / "README.md"
    board.write_text("<!-- make records: leaderboard -->\n<!-- end -->\n")
    job = {"variant": "base", "queue": "publish"}
    assert records.picture(home) is None, "nothing is kept yet"
    runs = [
        kept(tmp_path / "runs" / f"base-s{seed}", score, seed, job, max_wallclock_seconds=300.0) for seed, score in ((1, 1.25), (2, 1.27))
    ]
    (runs[0].folder / "model.safetensors").write_text("weights")
    evaluation = {
        "val_bpb": 1.2,
        "sliding_bpb": 1.23,
        "ttt_bpb": 1.2,
        "bytes_total": 15_999_000,
        "audit": {"verdict": "pass", "missing": []},
    }
    write_json(runs[0].folder / "eval.json", evaluation | {"bytes_scored": 1000})
    write_json(runs[1].folder / "eval.json", evaluation | {"bytes_scored": 1000, "val_bpb": 1.22, "ttt_bpb": 1.22})
    folders = records.keep(read_runs([tmp_path / "runs"]), records=home)
    assert folders == [home / "base" / "publish" / f"base-s{seed}" for seed in (1, 2)]
    assert sorted(path.name for path in folders[0].iterdir()) == ["config.json", "eval.json", "lab.json", "metrics.jsonl"], "no weights"
    assert records.with_tables(page, home) != page.read_text()
    assert records.picture(home) is None, "one vocabulary's losses compare, and these runs say none"
    assert sorted(records.write_tables(home)) == [board, page] and records.write_tables(home) == []
    text = page.read_text()
    assert text.endswith("<!-- end -->\n\ntail\n") and "old" not in text
    assert "| val_bpb float, EMA | 1.2600 ± 0.0141 |" in text and "[eval.json 2](publish/base-s2/eval.json)" in text
    row = "| [base](base/) | 300 s, 1 × H100 | 1.2600 ± 0.0141 | 1.2300 ± 0.0000 | 1.2100 ± 0.0141 | 2 | 15,999,000 | 10 | 100 | pass |"
    assert row in board.read_text()
    for folder in folders:
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(
                json.dumps({"event": "validation", "label": "raw", "step": n, "val_bpb": 9 / n, "elapsed": n}) + "\n" for n in (3, 4)
            )
    assert home / "curves.svg" in records.write_tables(home) and records.write_tables(home) == []
    assert records.picture(home).series[0].ys == [3.0, 2.25] and ">base</text>" in (home / "curves.svg").read_text()
    with pytest.raises(UserError, match="is there already, and is another run's"):
        records.keep(read_runs([tmp_path / "runs"]), records=home)
    later = kept(tmp_path / "runs" / "base-s3", 1.26, 3, job)
    kept(tmp_path / "runs" / "base-s4", 1.26, 4, job | {"done": {}})  # not done: left out
    for folder, run in zip(folders, runs):
        shutil.copyfile(run.folder / "metrics.jsonl", folder / "metrics.jsonl")
    assert records.keep(read_runs([tmp_path / "runs"]), records=home) == [home / "base" / "publish" / later.name], "what is kept stays"
    with pytest.raises(UserError, match="is not done"):
        records.keep([run for run in queue_of_runs(tmp_path / "q") if run.state == "failed"], records=home)
    page.write_text("<!-- make records: nothing -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="unknown table 'nothing'"):
        records.with_tables(page, home)


def test_seeds_that_got_less_far_share_a_column(tmp_path):
    """Of three seeds the second was quantized and the third evaluated too: one column, whose figures say of how many they are."""
    runs = [kept(tmp_path / "base" / f"s{seed}", 1.0 + seed / 100, seed, max_wallclock_seconds=300.0) for seed in (1, 2, 3)]
    (tmp_path / "base" / "config.env").write_text("")
    sizes = {"bytes_model": 900, "bytes_code": 100, "bytes_total": 1000, "seconds": {"calibration": 1.0, "solving": 2.0, "packing": 3.0}}
    write_json(runs[1].folder / "quantize.json", sizes)
    write_json(runs[2].folder / "quantize.json", sizes | {"bytes_model": 700, "bytes_total": 800})
    write_json(
        runs[2].folder / "eval.json", {"val_bpb": 0.9, "sliding_bpb": 0.95, "ttt_bpb": 0.9, "audit": {"verdict": "pass", "missing": []}}
    )
    page, board = tmp_path / "base" / "README.md", tmp_path / "README.md"
    page.write_text("<!-- make records: results -->\n<!-- end -->\n")
    board.write_text("<!-- make records: leaderboard -->\n<!-- end -->\n")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", records.with_tables(page, tmp_path), re.MULTILINE))
    assert rows["seeds"] == "1, 2, 3" and rows["val_bpb float, EMA"] == "1.0200 ± 0.0100"
    assert rows["bytes: model + code"] == "800 + 100 = 900" and rows["Hessians / GPTQ / packing, s"] == "1.0 / 2.0 / 3.0"
    assert rows["val_bpb artifact, sliding"].startswith("0.9500 (1 of 3)") and rows["+ score-first TTT"].startswith("0.9000 (1 of 3)")
    assert rows["audit"] == "pass"
    assert "| 1.0200 ± 0.0100 | 0.9500 (1 of 3) | 0.9000 (1 of 3) |" in records.with_tables(board, tmp_path)


def test_runs_of_two_vocabularies_are_told_apart(tmp_path):
    """Alike but for the bytes a token stands for: the tables say it, and the picture's losses are of the commonest alone."""
    for folder, nats in (("a/logs", 2.5), ("a/case", 2.25), ("b/logs", 2.5)):
        run = kept(tmp_path / folder, 1.0, max_wallclock_seconds=300.0, preset=folder[0])
        path = run.folder / "metrics.jsonl"
        path.write_text(path.read_text().replace('"val_bpb": 1.0, "bytes', f'"val_loss": {nats}, "val_bpb": 1.0, "bytes'))
        (run.folder.parent / "config.env").write_text("")
    board = tmp_path / "README.md"
    board.write_text("<!-- make records: leaderboard -->\n<!-- end -->\n")
    text = records.with_tables(board, tmp_path)
    assert sorted(re.findall(r"300 s, 1 × H100([^|]*) \|", text)) == ["", ", 3.25 bytes a token", ", 3.61 bytes a token"]
    assert [line.label for line in records.picture(tmp_path).series] == ["a", "b"]
    shutil.rmtree(tmp_path / "a" / "case")
    assert "bytes a token" not in records.with_tables(board, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and the page
# ----------------------------------------------------------------------------------------------------------------------


def test_pictures_show_what_was_measured(tmp_path):
    runs = [run for run in queue_of_runs(tmp_path / "q") if run.state == "done"]
    made = plots.figures(runs, ["loss", "val_bpb", "lr", "bytes", "seconds"], ["seconds", "tokens"])
    assert [figure.name for figure in made] == [
        "loss_seconds",
        "loss_tokens",
        "val_bpb_seconds",
        "val_bpb_tokens",
        "lr_seconds",
        "lr_tokens",
        "seconds",
    ]
    by_name = {figure.name: figure.series for figure in made}
    gain = [series for series in by_name["val_bpb_tokens"] if series.label == "gain"]
    assert sorted((series.xs[0], series.ys[0]) for series in gain) == [(640, 0.899), (640, 0.9), (640, 0.903)]
    assert len({series.index for series in gain}) == 1, "seeds share a colour"
    written = plots.plot(runs, ["val_bpb"], ["seconds"], tmp_path / "out")
    assert [path.name for path in written] == ["val_bpb_seconds.png", "val_bpb_seconds.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    svg = written[1].read_text()
    assert all(f">{name}</text>" in svg for name in ("gain", "reference", "noise", "seconds of training")), (
        "labels are text, beside the lines"
    )
    with pytest.raises(UserError, match="nothing to show of bytes"):
        plots.plot(runs, ["bytes"], ["seconds"], tmp_path / "none")


def test_labels_keep_their_distance_and_their_order():
    heights = plots.spread([0.5, 0.51, 0.1, 0.49], 0.05)
    ordered = sorted(heights)
    assert all(b - a >= 0.05 - 1e-12 for a, b in itertools.pairwise(ordered)) and heights[2] == 0.1
    assert sorted(range(4), key=lambda i: heights[i]) == [2, 3, 0, 1] and statistics.fmean(heights) == pytest.approx(0.4)


@pytest.fixture
def ask(tmp_path):
    """ask(path, **headers) -> (status, headers, body) of a server over tmp_path/runs."""
    (tmp_path / "runs").mkdir()
    with Server(tmp_path / "runs", "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def request(path: str, **headers):
            connection = HTTPConnection(*server.server_address, timeout=30)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()

        yield request
        server.shutdown()
        thread.join()


def test_the_page_is_one_machines_and_needs_nothing_from_elsewhere(ask):
    for path, (name, kind) in FILES.items():
        status, headers, body = ask(path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and body == (PAGE / name).read_text()
        assert not re.search(r"(src|href)=.?https?:|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", body)
        assert (
            "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
        )
    assert ask("/api/runs", Host="elsewhere.example")[0] == 421
    assert ask("/api/runs", Host="localhost:80")[0] == 200


def test_the_server_tells_what_the_files_say_and_nothing_else(ask, tmp_path):
    assert json.loads(ask("/api/runs")[2])["runs"] == []
    run = kept(tmp_path / "runs" / "q" / "a <b>&-s1", 1.25, num_loops=3)
    (run.folder / "train.log").write_text("<script>alert(1)</script>\nlast\n")
    secret = kept(tmp_path / "secret", 9.0)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 7, "elapsed": 70, "train_loss": NaN}\n')
    (line,) = json.loads(ask("/api/runs")[2])["runs"]
    assert (line["id"], line["state"], line["val_bpb"], line["train_loss"]) == ("q/a <b>&-s1", "done", 1.25, None), (
        "a loss that is no number is null"
    )
    answer = json.loads(ask("/api/run?id=" + quote(line["id"]))[2])
    assert answer["curves"]["train_loss"] == {"seconds": [[50.0, 3.0]], "steps": [[5, 3.0]], "tokens": [[320.0, 3.0]]}
    assert answer["log"] == {"name": "train.log", "lines": ["<script>alert(1)</script>", "last"]} and answer["settings"]["num_loops"] == 3
    for name in ("../secret", str(secret.folder), "q/../../secret", "", ".", "q"):
        assert ask("/api/run?id=" + quote(name))[0] == 404, name
    for path in ("/../secret/config.json", "/%2e%2e/secret/config.json", "/page.html", "/q/a/train.log", "//etc/passwd"):
        assert ask(path)[0] == 404, path


def test_the_page_follows_a_run_to_its_end(ask, tmp_path):
    run = kept(tmp_path / "runs" / "a", 1.25)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "metrics.jsonl").write_text("".join(lines[:2]))
    with run_lock(run.folder):
        (line,) = json.loads(ask("/api/runs")[2])["runs"]
        assert (line["state"], line["stage"], line["progress"], line["to_go"]) == ("running", "train", 0.5, 50.0)
    (run.folder / "metrics.jsonl").write_text("".join(lines))
    (line,) = json.loads(ask("/api/runs")[2])["runs"]
    assert (line["state"], line["val_bpb"], line["to_go"]) == ("done", 1.25, None)


def test_long_curves_are_thinned_and_ports_in_use_are_named(tmp_path):
    values = list(range(10 * POINTS))
    thinned = thin(values, values)
    assert len(thinned) <= POINTS and thinned[0] == [0, 0] and thinned[-1] == [values[-1]] * 2
    with Server(tmp_path, "127.0.0.1", 0) as server, pytest.raises(UserError, match="choose another --port"):
        Server(tmp_path, "127.0.0.1", server.server_address[1])

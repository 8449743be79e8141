"""Mirrors: what TensorBoard and Weights & Biases are told is metrics.jsonl, and training does not depend on them."""

import json
import math
import os
import select
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parts.files import UserError, write_json
from parts.lab import mirror as M
from parts.lab.results import Result
from parts.runs import start_mirrors


def train(step: int, loss: float) -> dict:
    return {"event": "train", "step": step, "elapsed": step / 10, "progress": step / 40, "train_loss": loss}


@pytest.fixture
def run(tmp_path):
    """A run's folder with two reports; run.add(event, …) appends more."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"config": {"seed": 1, "num_loops": 2}})

    def add(*events: dict) -> None:
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)

    add({"event": "start", "parameters": 1000}, train(10, 3.5), train(20, math.nan))
    return SimpleNamespace(folder=folder, add=add, result=Result(folder))


def shown(folder, name: str) -> list[tuple[int, float]]:
    """What TensorBoard's own reader finds, by step."""
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


def test_tensorboard_shows_the_history_and_not_what_was_taken_back(run):
    following = M.Mirror(run.result, "tensorboard")
    following.update()
    following.update()  # nothing new: nothing twice, though a loss is no number
    assert [step for step, _ in shown(run.folder, "train/train_loss")] == [10, 20]
    run.add(train(30, 3.25), {"event": "resume", "step": 10, "elapsed": 1.0}, train(20, 3.0))
    following.update()
    following.close()
    assert shown(run.folder, "train/train_loss") == [(10, 3.5), (20, 3.0)]
    run.add({"event": "validation", "label": "ema", "step": 40, "val_bpb": 1.25, "elapsed": 4.0})
    assert M.mirror([run.result], ["tensorboard"], follow=False) == 0  # another process, later
    assert shown(run.folder, "train/train_loss") == [(10, 3.5), (20, 3.0)] and shown(run.folder, "validation/ema/val_bpb") == [(40, 1.25)]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that keeps what it is told, as the service does: rows of earlier steps are refused."""
    runs = {}

    def init(id: str, **options):
        run = runs.setdefault(id, SimpleNamespace(step=0, rows=[], options=options, finished=0))

        def log(values: dict, step: int) -> None:
            assert step >= run.step, "the package would drop it with a warning"
            run.rows.append((step, values))
            run.step = step

        run.log, run.finish = log, lambda: setattr(run, "finished", run.finished + 1)
        return run

    module = SimpleNamespace(init=init, runs=runs)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_one_run_however_often_it_goes_on(run, wandb):
    write_json(run.folder / "lab.json", {"commands": {}, "done": {}, "environment": {}, "queue": "q"})
    assert M.mirror([run.result], ["wandb"], follow=False) == 0
    run.add({"event": "resume", "step": 10, "elapsed": 1.0}, train(20, 3.0), train(30, 2.5))
    assert M.mirror([run.result], ["wandb"], follow=True) == 0, "nobody owns the run: nothing to wait for"
    (kept,) = wandb.runs.values()
    assert [step for step, _ in kept.rows] == [10, 20, 20, 30] and kept.finished == 2
    assert kept.rows[0][1] == {"train/progress": 0.25, "train/train_loss": 3.5, "seconds": 1.0}
    assert kept.options["config"] == {"seed": 1, "num_loops": 2} and kept.options["group"] == "q" and kept.options["name"] == "a"


def test_a_mirror_that_fails_is_a_line(run, wandb, capsys, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    assert M.mirror([run.result], ["wandb", "tensorboard"], follow=False) == 1
    assert f"{run.folder}: no mirror to wandb: division by zero\n{run.folder}: 3 events in tensorboard\n" == capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a package that is not there finds
    assert M.mirror([run.result], ["wandb"], follow=False) == 1
    assert "no mirror to wandb: pip install wandb" in capsys.readouterr().out
    with pytest.raises(UserError, match="--to names one of tensorboard, wandb"):
        M.mirror([run.result], [], follow=False)
    lines = []
    start_mirrors(run.folder, "no_such_package", lines.append)
    start_mirrors(run.folder, "", lines.append)
    assert len(lines) == 1 and "pip install no_such_package" in lines[0]


def test_training_is_shown_while_it_goes_on(tmp_path, launch):
    """MIRROR=wandb with a stand-in on the path: the child follows to the end, and says so through a pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(
        "import json, os\n"
        "class Run:\n"
        "    step, rows = 0, []\n"
        "    def log(self, values, step): self.rows.append(step)\n"
        "    def finish(self): open(os.environ['PIPE'], 'w').write(json.dumps([self.rows, os.environ['CUDA_VISIBLE_DEVICES']]))\n"
        "def init(**options): return Run()\n"
    )
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    done = launch("train_gpt.py", RUN_ID="a", MIRROR="wandb", TRAIN_LOG_EVERY=4, PYTHONPATH=tmp_path / "packages", PIPE=pipe)
    assert done.returncode == 0, done.stderr
    assert select.select([reader], [], [], 60)[0], (launch.runs / "a" / "wandb" / "mirror.out").read_text()
    steps, devices = json.loads(os.read(reader, 1 << 16))
    events = [json.loads(line) for line in (launch.runs / "a" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [event["step"] for event in events if "step" in event] and steps[-1] == 12 and devices == ""

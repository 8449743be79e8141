"""Mirrors of a run's metrics: TensorBoard and Weights & Biases show what metrics.jsonl says, while it is written or at any time later.

    MIRROR=tensorboard,wandb python train_gpt.py               live: rank 0 starts the second command beside itself
    python lab.py mirror runs/RUN --to tensorboard,wandb --follow

A mirror is a process of its own that reads the run's folder and nothing else: whatever becomes of it, of its package or of the network, the run
does not notice. It knows nothing that metrics.jsonl does not, so that it can be made again from there.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from typing import Protocol

from parts.files import UserError, atomic_write, one_line
from parts.lab.results import Result
from parts.runs import owner_of, print_line

POLL_SECONDS = 5.0


class Sink(Protocol):
    """Where one run's figures go. Whatever it raises is its own end, not the other mirrors'."""

    def restart(self) -> None:
        """From here on the whole history comes again: the run went back to a checkpoint."""

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir runs`; relative time there is the training clock."""

    def __init__(self, run: Result):
        from torch.utils.tensorboard import SummaryWriter

        self.new_writer, self.folder, self.began, self.writer = SummaryWriter, run.folder / "tensorboard", time.time(), None
        self.restart()

    def restart(self) -> None:
        self.close()
        self.writer = self.new_writer(str(self.folder), purge_step=0)  # a reader forgets what earlier files say of step 0 and later

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, walltime=self.began + seconds)
        self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


class WeightsAndBiases:
    """A run of its own there, the same one whenever this run goes on; WANDB_PROJECT, WANDB_MODE and so on are wandb's to read.

    Its history only grows: of steps that are trained again after a resume it keeps what it had.
    """

    def __init__(self, run: Result):
        import wandb

        name = run.folder / "wandb" / "id"
        if not name.is_file():
            with atomic_write(name) as temporary:
                temporary.write_text(uuid.uuid4().hex)
        self.run = wandb.init(
            id=name.read_text(), name=run.name, group=run.job.get("queue"), config=run.config, dir=str(run.folder), resume="allow",
            reinit="create_new",
        )  # fmt: skip

    def restart(self) -> None:
        pass

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        if step >= self.run.step:
            self.run.log({**values, "seconds": seconds}, step=step)

    def close(self) -> None:
        self.run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def figures(event: dict) -> dict[str, float]:
    """What is shown of an event, by name: `train/lr`, `validation/ema/val_bpb`."""
    prefix = "/".join(filter(None, (event["event"], event.get("label"))))
    numbers = {key: value for key, value in event.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {f"{prefix}/{key}": float(value) for key, value in numbers.items() if key not in ("step", "elapsed")}


class Mirror:
    """One run in one place, as far as it has been sent."""

    def __init__(self, run: Result, name: str):
        self.run, self.name, self.sink, self.fault = run, name, None, None
        self.sent: list[str] = []  # events as text: a loss that is no number is equal to itself there

    def update(self) -> None:
        """Send what has been added to the run's history; all of it where the run went back."""
        if self.fault is not None:
            return
        history = Result(self.run.folder).history
        texts = list(map(repr, history))
        try:
            if self.sink is None:
                self.sink = SINKS[self.name](self.run)
            if texts[: len(self.sent)] != self.sent:
                self.sink.restart()
                self.sent = []
            for event in history[len(self.sent) :]:
                if isinstance(event.get("step"), int) and event["event"] != "resume":
                    self.sink.write(event["step"], event.get("elapsed") or event.get("train_seconds") or 0.0, figures(event))
            self.sent = texts
        except Exception as error:  # a mirror may fail in whatever way its package finds
            self.fail(error)

    def close(self) -> None:
        try:
            if self.sink is not None:
                self.sink.close()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        missing = isinstance(error, ModuleNotFoundError)
        self.fault = f"pip install {self.name}" if missing else one_line(error)[:200] or type(error).__name__
        print_line(f"{self.run.folder}: no mirror to {self.name}: {self.fault}")


def mirror(runs: Sequence[Result], names: Sequence[str], follow: bool) -> int:
    """Send the runs' metrics to SINKS by name; with `follow` until none of the runs is under way. Returns 0, or 1 if a mirror failed."""
    if not names:
        raise UserError(f"--to names one of {', '.join(SINKS)}")
    os.nice(10)  # training comes first
    mirrors = [Mirror(run, name) for run in runs for name in names]
    try:
        while True:
            going_on = follow and any(owner_of(run.folder) for run in runs)  # before the last look at what they wrote
            for each in mirrors:
                each.update()
            if not going_on:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        for each in mirrors:
            each.close()
    for each in mirrors:
        if each.fault is None:
            print_line(f"{each.run.folder}: {len(each.sent)} events in {each.name}")
    return int(any(each.fault is not None for each in mirrors))

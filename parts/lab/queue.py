"""The queue: runs of a plan, as many at once as there are devices; what it knows lies on disk.

Every run has a folder runs/<queue>/<run>/ and in it lab.json: its settings, its commands, which of them are done. A worker (`lab.py one FOLDER`:
a process of this machine, or a Slurm job) runs the commands that are not done and notes each. It holds the folder's lock and hands it
on to the command, so that a queue which was killed finds, when it is started again, what still runs, waits for it, and goes on with the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from parts.files import UserError, one_line, read_json, write_json
from parts.lab.spec import Plan, Run, fill
from parts.runs import StopSignal, print_line, read_metrics, run_lock

ROOT = Path(__file__).resolve().parent.parent.parent
JOB, LOCK = "lab.json", ".lab.lock"
PROGRESS_SECONDS = 60.0  # between two progress lines that nothing but time asks for


# ----------------------------------------------------------------------------------------------------------------------
# One run
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own(folder: Path) -> Iterator[int | None]:
    """The lock of a run's worker while inside, as a file descriptor that children may inherit; None if another holds it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield handle
    finally:
        os.close(handle)  # the lock ends with its last holder, which may be a command that outlives this process


def taken(folder: Path) -> bool:
    """Whether a worker, or a command that it left behind, has the run."""
    if not (folder / LOCK).exists():
        return False
    with own(folder) as handle:
        return handle is None


def sound(values: dict | None, kinds: Mapping[str, type]) -> dict:
    """What of a JSON object is of the kind that the suite writes: a file may be damaged, or another program's. `float` is any number."""
    accepted = {name: (int, float) if kind is float else kind for name, kind in kinds.items()}
    return {
        name: value
        for name, value in (values or {}).items()
        if isinstance(value, accepted.get(name, object)) and not (kinds.get(name) is float and isinstance(value, bool))
    }


JOB_KINDS = {"commands": dict, "done": dict, "environment": dict, "error": str, "running": dict, "queue": str, "variant": str, "seed": int}
STAGE_KINDS = {"pid": int, "host": str, "stage": str, "since": float, "device": str, "seconds": float}


def find_job(folder: Path) -> dict | None:
    """What lab.json says of a queue's run; None where it is none, or damaged."""
    job = {"error": None} | sound(read_json(folder / JOB), JOB_KINDS)
    if not {"commands", "done", "environment"} <= job.keys():
        return None
    job["done"] = {stage: how for stage, how in job["done"].items() if isinstance(how, dict) and "seconds" in sound(how, STAGE_KINDS)}
    job["running"] = sound(job.get("running"), STAGE_KINDS)
    if not {"pid", "host", "stage", "since"} <= job["running"].keys():
        del job["running"]
    return job


def read_job(folder: Path) -> dict:
    job = find_job(folder)
    if job is None:
        raise UserError(f"{folder} is not a queue's run: it holds no whole {JOB}")
    return job


def left(job: dict) -> list[str]:
    """The stages that are still to be run."""
    return [] if job["error"] else [stage for stage in job["commands"] if stage not in job["done"]]


def perform(folder: Path) -> int:
    """Run what is left of a run, stage by stage, and note how each ended. Returns 0, a failed command's exit code, or 128 + a signal's number.

    A signal goes on to the command, which saves what it can; what was stopped so is not done, and goes on another time.
    """
    with own(folder) as handle:
        if handle is None:
            raise UserError(f"{folder} is in use by another worker")
        job = read_job(folder)
        for stage in left(job):
            me = {"pid": os.getpid(), "host": socket.gethostname(), "device": os.environ.get("CUDA_VISIBLE_DEVICES"), "since": time.time()}
            write_json(folder / JOB, job | {"running": {"stage": stage, **me}})
            script, *arguments = fill(job["commands"][stage], folder)
            began = time.time()
            with open(folder / f"{stage}.out", "ab") as output:
                output.write(f"$ python {shlex.join([script, *arguments])}\n".encode(errors="backslashreplace"))
                output.flush()
                code, stopped = _supervise([sys.executable, str(ROOT / script), *arguments], job["environment"], output, handle)
            if stopped:
                write_json(folder / JOB, job)
                return 128 + stopped
            seconds = round(time.time() - began, 1)
            if code:
                how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
                job["error"] = f"{stage}: {last_words(folder / f'{stage}.out')} ({how})"
            else:
                job["done"][stage] = {"seconds": seconds}
            write_json(folder / JOB, job)
            if code:
                return code
        return 0


def _supervise(command: list[str], environment: dict, output, lock: int) -> tuple[int, int]:
    """Run a command to its end -> (its exit code, the signal that ended it or us early, else 0)."""
    received = []

    def forward(number: int, frame) -> None:
        received.append(number)
        process.send_signal(number)

    # Forwarding begins as the process is there; a signal before that ends the worker, with nothing begun.
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=(lock,)
    )
    before = {number: signal.signal(number, forward) for number in StopSignal.NUMBERS}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    by_signal = code - 128 if code > 128 else 0  # a training run that was told to stop saves, and says so
    return code, received[0] if received else by_signal if by_signal in StopSignal.NUMBERS else 0


def last_words(output: Path) -> str:
    """The line of a command's output that says why it ended: the last with "error", else the last."""
    lines = [one_line(line) for line in tail(output, 200) if line.strip() and not line.startswith("$ ")]
    said = [line for line in lines if "error" in line.lower()]
    return (said or lines or ["it said nothing"])[-1][:300]


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text file of any size; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 400 * lines))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


# ----------------------------------------------------------------------------------------------------------------------
# Where runs are run
# ----------------------------------------------------------------------------------------------------------------------


class Handle(Protocol):
    """A run that is under way."""

    device: str | None

    def done(self) -> bool: ...
    def stop(self) -> None: ...


class Executor(Protocol):
    def room(self, running: list[Handle]) -> bool: ...
    def start(self, folder: Path, running: list[Handle]) -> Handle: ...
    def find(self, folder: Path) -> Handle | None:
        """The handle of a run that an earlier queue has started and that has not ended."""


class Process:
    """A worker of this machine."""

    def __init__(self, folder: Path, device: str):
        self.device = device
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device} if device != "cpu" else os.environ
        command = [sys.executable, str(ROOT / "lab.py"), "one", str(folder)]
        with open(folder / "worker.out", "ab") as output:  # not the queue's: whoever reads that would wait for an orphan
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def done(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        self.process.terminate()


class Orphan:
    """What a queue that was killed has left running. It is waited for, and told nothing: its process may be another by now."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.device = read_job(folder).get("running", {}).get("device", "cpu")

    def done(self) -> bool:
        return not taken(self.folder)

    def stop(self) -> None:
        pass


class Local:
    """One process a device: the GPUs by their CUDA_VISIBLE_DEVICES names, or "cpu"."""

    def __init__(self, devices: list[str]):
        self.devices = devices

    def _free(self, running: list[Handle]) -> list[str]:
        busy = {handle.device for handle in running}
        return [device for device in self.devices if device not in busy]

    def room(self, running: list[Handle]) -> bool:
        return bool(self._free(running))

    def start(self, folder: Path, running: list[Handle]) -> Handle:
        return Process(folder, self._free(running)[0])

    def find(self, folder: Path) -> Handle | None:
        return Orphan(folder) if taken(folder) else None


def find_devices(wanted: str = "") -> list[str]:
    """ "0,1" or "cpu" as wanted; by default the GPUs that CUDA_VISIBLE_DEVICES leaves, or all that there are, or the CPU."""
    wanted = wanted or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not wanted:
        with contextlib.suppress(OSError):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
            wanted = ",".join(str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU "))
    return list(dict.fromkeys(filter(None, wanted.replace(" ", "").split(",")))) or ["cpu"]


class Submitted:
    """A job of submitit's. Its state is asked of the cluster by the id that lab.json keeps, by this queue or a later one."""

    device = None

    def __init__(self, job):
        self.job = job

    def done(self) -> bool:
        return self.job.done()

    def stop(self) -> None:
        pass  # it is the cluster's; `scancel` ends it


class Submitit:
    """Every run as a job of its own: `cluster` is "slurm", or "local" to try it without one. options: submitit's, such as partition or timeout_min."""

    def __init__(self, cluster: str, folder: Path, options: dict):
        try:
            import submitit
        except ModuleNotFoundError:
            raise UserError("--executor slurm needs submitit: pip install -r requirements-lab.txt") from None
        self.submitit, self.folder = submitit, folder / "jobs"
        kinds = {"slurm": submitit.SlurmExecutor, "local": submitit.LocalExecutor}
        self.kind = kinds[cluster]
        if cluster == "slurm" and not self.kind.affinity() > 0:
            raise UserError("--executor slurm: there is no srun here")
        self.executor = submitit.AutoExecutor(folder=self.folder, cluster=cluster)
        try:
            self.executor.update_parameters(**{"name": folder.name, "gpus_per_node": 1, "timeout_min": 120, **options})
        except (NameError, TypeError, ValueError) as error:
            raise UserError(f"--executor {cluster}: {one_line(error)}") from None

    def room(self, running: list[Handle]) -> bool:
        return True  # the cluster has a queue of its own

    def start(self, folder: Path, running: list[Handle]) -> Handle:
        command = [sys.executable, str(ROOT / "lab.py"), "one", str(folder.resolve())]
        job = self.executor.submit(self.submitit.helpers.CommandFunction(command, verbose=False))
        write_json(folder / "job.json", {"id": job.job_id})
        return Submitted(job)

    def find(self, folder: Path) -> Handle | None:
        number = (read_json(folder / "job.json") or {}).get("id")
        if number is None:
            return None  # never submitted
        job = self.kind.job_class(folder=self.folder, job_id=str(number))
        if not job.done():
            return Submitted(job)
        return Orphan(folder) if taken(folder) else None  # "local" knows the jobs of its own process only


# ----------------------------------------------------------------------------------------------------------------------
# The queue
# ----------------------------------------------------------------------------------------------------------------------


class Queue:
    """A plan's runs under `root`, on disk, and the loop that works them off.

    whole: the plan that this one is a part of (`Plan.part`), kept for the next start. seconds: no run is begun that would not end within so many, by
    what others took.
    """

    def __init__(
        self,
        plan: Plan,
        root: Path,
        executor: Executor,
        log: Callable[[str], object] = print_line,
        poll_seconds: float = 0.5,
        whole: Plan | None = None,
        seconds: float = math.inf,
    ):
        self.plan, self.folder, self.executor, self.log, self.poll_seconds = plan, root / plan.name, executor, log, poll_seconds
        self.whole, self.seconds = whole or plan, seconds
        self.folders = [self.folder / run.name for run in plan.runs]

    def run(self, retry: bool = False) -> int:
        """Work the queue off. Returns 0 if every run that was begun is done, 1 if one has failed, 128 + a signal's number if stopped."""
        if (self.folder / "metrics.jsonl").exists():
            raise UserError(f"{self.folder} is a run's own folder: give the queue another --name")
        with run_lock(self.folder), StopSignal() as stop:
            for run, folder in zip(self.plan.runs, self.folders):
                self.enter(run, folder, retry)
            write_json(self.folder / "plan.json", self.whole.to_dict())
            return self._work(stop)

    def enter(self, run: Run, folder: Path, retry: bool) -> None:
        """Write lab.json of a run that has none; what is done stays, if it was made with these settings."""
        environment = self.plan.environment(run, folder)
        kept = find_job(folder)
        fresh = {"queue": self.plan.name, "variant": run.variant, "reference": run.reference, "seed": run.seed}
        fresh |= {"environment": environment, "commands": self.plan.commands, "done": {}, "error": None}
        if kept is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / JOB, fresh)
            return
        before = {name: value for name, value in kept["environment"].items() if name not in ("RUNS_DIR", "RUN_ID")}
        now = {name: value for name, value in environment.items() if name not in ("RUNS_DIR", "RUN_ID")}
        if differing := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
            name = differing[0]
            raise UserError(
                f"{folder} was made with {name}={before.get(name, '(nothing)')}, not {now.get(name, '(nothing)')}: name this queue otherwise, or remove the folder"
            )
        if not taken(folder):
            commands = {stage: command for stage, command in kept["commands"].items() if stage in kept["done"]} | self.plan.commands
            done = {stage: how for stage, how in kept["done"].items() if commands[stage] == kept["commands"][stage]}
            write_json(folder / JOB, {**fresh, "commands": commands, "done": done, "error": None if retry else kept["error"]})

    def _work(self, stop: StopSignal) -> int:
        running: dict[Path, Handle] = {}
        waiting = []
        for folder in self.folders:
            if handle := self.executor.find(folder):
                running[folder] = handle
            elif left(read_job(folder)):
                waiting.append(folder)
        if running:
            self.log(f"{len(running)} still under way from before: {', '.join(folder.name for folder in running)}")
        began = shown = time.monotonic()
        self.log(self.progress(running, began))
        while running or (waiting and not stop.received):
            changed = False
            for folder, handle in list(running.items()):
                if handle.done():
                    changed = True
                    del running[folder]
                    self.log(f"{folder.name}: {self._end(folder)}")
            while not stop.received and self.executor.room(list(running.values())) and (folder := self._next(waiting, began)):
                changed = True
                waiting.remove(folder)
                running[folder] = self.executor.start(folder, list(running.values()))
            if changed or time.monotonic() - shown >= PROGRESS_SECONDS:
                shown = time.monotonic()
                self.log(self.progress(running, began))
            if stop.received and running:
                for handle in running.values():
                    handle.stop()
                running = {folder: handle for folder, handle in running.items() if not isinstance(handle, (Orphan, Submitted))}
                while not all(handle.done() for handle in running.values()):
                    time.sleep(self.poll_seconds)
                running = {}
            elif running:
                time.sleep(self.poll_seconds)
            else:  # for what waits there is no time
                break
        if stop.received:
            self.log(f"stopped by {signal.Signals(stop.received).name}: the same command goes on")
            return 128 + stop.received
        jobs = {folder: read_job(folder) for folder in self.folders}
        for folder, job in jobs.items():
            if job["error"]:
                self.log(f"failed: {folder.name}: {job['error']}")
        unfinished = [folder for folder, job in jobs.items() if left(job) and folder not in waiting]
        for folder in unfinished:
            self.log(f"stopped: {folder.name}: the same command goes on")
        if waiting:
            self.log(
                f"{len(waiting)} left for another time: none would have ended within {duration(self.seconds)}; the same command goes on"
            )
        self.log(f"next: python lab.py table {self.folder}")
        return int(bool(unfinished) or any(job["error"] for job in jobs.values()))

    def _next(self, waiting: Sequence[Path], began: float) -> Path | None:
        """The first run that there is time for: whose stages, at the longest that any run took, end within what is left."""
        took = self._took({folder: read_job(folder) for folder in self.folders})
        spent = time.monotonic() - began
        return next((f for f in waiting if spent + sum(max(took.get(s, [0.0])) for s in left(read_job(f))) <= self.seconds), None)

    @staticmethod
    def _took(jobs: dict[Path, dict]) -> dict[str, list[float]]:
        """Stage -> the seconds that it took wherever it is done."""
        took: dict[str, list[float]] = {}
        for job in jobs.values():
            for stage, how in job["done"].items():
                took.setdefault(stage, []).append(how["seconds"])
        return took

    def _end(self, folder: Path) -> str:
        job = read_job(folder)
        if job["error"]:
            return f"failed: {job['error']}"
        seconds = sum(how["seconds"] for how in job["done"].values())
        return "stopped before its end" if left(job) else f"done in {duration(seconds)}"

    def progress(self, running: dict[Path, Handle], began: float) -> str:
        """`3 of 14 done, 2 running (a train 54 %, b quantize), 1 failed, 8 left; 12 min so far, about 25 min to go`."""
        jobs = {folder: read_job(folder) for folder in self.folders}
        failed = sum(bool(job["error"]) for job in jobs.values())
        done = sum(not left(job) and not job["error"] for job in jobs.values())
        now = [self._now(folder, jobs[folder]) for folder in running]
        parts = [f"{done} of {len(jobs)} done", f"{len(now)} running" + (f" ({', '.join(now)})" if now else "")]
        parts += [f"{failed} failed"] * bool(failed) + [f"{len(jobs) - done - failed - len(now)} left"]
        to_go = self._to_go(jobs, running)
        return f"{', '.join(parts)}; {duration(time.monotonic() - began)} so far" + (f", about {duration(to_go)} to go" if to_go else "")

    def _now(self, folder: Path, job: dict) -> str:
        stage = job.get("running", {}).get("stage", "starting")
        spent = _trained(folder) if stage == "train" else 0
        return f"{folder.name} {stage}" + (f" {spent:.0%}" if spent else "")

    def _to_go(self, jobs: dict[Path, dict], running: dict[Path, Handle]) -> float | None:
        """Seconds until the end, from what the finished stages took and the share of training that is done; None while nothing tells."""
        took = self._took(jobs)
        spent = {folder: time.time() - job["running"]["since"] for folder, job in jobs.items() if "running" in job and folder in running}
        for folder, seconds in spent.items():
            if jobs[folder]["running"]["stage"] == "train" and "train" not in took and (share := _trained(folder)) > 0.05:
                took["train"] = [seconds / share]
        total = 0.0
        for folder, job in jobs.items():
            for stage in left(job):
                if stage not in took:
                    return None
                total += sum(took[stage]) / len(took[stage])
            total -= min(spent.get(folder, 0.0), total)
        return total / max(1, len(running)) or None


def _trained(folder: Path) -> float:
    """The share of its budget that a training run has spent, by its last metric."""
    return min(1.0, next((event["progress"] for event in reversed(read_metrics(folder)) if isinstance(event.get("progress"), float)), 0.0))


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

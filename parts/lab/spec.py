"""What to run: a SPEC, spread out into single runs.

    preset = "frontier/one_gpu"
    stages = ["train", "quantize", "evaluate"]   # default: train alone
    seeds = 3                                    # 1337, 1338, 1339; or a list
    change_seeds = 1                             # of everything but the reference; default: as seeds
    evaluate = ["--audit"]                       # arguments of eval_ttt.py
    reference = true                             # false: the preset itself, unchanged, is not among the runs

    [with]                                       # every run has these
    MAX_WALLCLOCK_SECONDS = 90

    [set]                                        # one at a time: a run for each value
    NUM_LOOPS = 0
    XSA_LAYERS = ["none", "7-10"]

    [grid]                                       # every combination
    MATRIX_LR = [0.02, 0.03]
    MUON_WD = [0.0, 0.1]

    [runs.small]                                 # by name: several settings at once, seeds of its own
    MODEL_DIM = 384
    PRESET = "base/one_gpu"
    seeds = 2

What is written in capitals is a setting (an environment variable); what is not belongs to the SPEC.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parts.files import UserError, read_json

FIRST_SEED = 1337  # train_gpt.py's default
REFERENCE = "reference"
# Scripts and arguments of each stage, in order; {run} is the run's folder. Relative scripts are the suite's.
COMMANDS = {"train": ["train_gpt.py"], "quantize": ["quantize.py", "{run}"], "evaluate": ["eval_ttt.py", "{run}/artifact.bin"]}
OWN_KEYS = {"name", "preset", "stages", "seeds", "change_seeds", "evaluate", "reference", "with", "set", "grid", "runs"}
QUEUE_SETS = ("RUN_ID", "RUNS_DIR", "RESUME", "SEED")


@dataclass(frozen=True)
class Run:
    """One run: a folder's name, what it is a repetition of, and its settings as environment variables (PRESET and SEED among them)."""

    variant: str
    seed: int
    settings: dict[str, str]
    reference: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant}-s{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A queue: its name, the command of each stage that is asked for, and its runs in order."""

    name: str
    runs: list[Run]
    commands: dict[str, list[str]] = field(default_factory=lambda: {"train": COMMANDS["train"]})

    def environment(self, run: Run, folder: Path) -> dict[str, str]:
        """What the commands of a run find in the environment, beside what is there anyway. A stopped run goes on; one that is new begins."""
        return {**run.settings, "RUNS_DIR": str(folder.parent), "RUN_ID": folder.name, "RESUME": "1"}

    def part(self, names: Sequence[str] = (), stages: str = "") -> Plan:
        """The runs that these names of runs and variants mean, up to the last of these stages; empty: all. Raises UserError for what means none."""
        if unknown := [name for name in names if not any(name in (run.name, run.variant) for run in self.runs)]:
            raise UserError(f"no run is called {unknown[0]}; there are {', '.join(dict.fromkeys(run.variant for run in self.runs))}")
        runs = [run for run in self.runs if not names or run.name in names or run.variant in names]
        commands = (
            {stage: self.commands.get(stage, command) for stage, command in _commands(stages, []).items()} if stages else self.commands
        )
        return Plan(self.name, runs, commands)

    def lines(self, root: Path) -> Iterator[str]:
        """The commands as one would type them."""
        for run in self.runs:
            folder = root / self.name / run.name
            variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment(run, folder).items())
            for command in self.commands.values():
                yield f"{variables} python {shlex.join(fill(command, folder))}"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping) -> Plan:
        return cls(stored["name"], [Run(**run) for run in stored["runs"]], stored["commands"])


def fill(command: list[str], folder: Path) -> list[str]:
    return [part.replace("{run}", str(folder)) for part in command]


def load_plan(path: Path) -> Plan:
    """The plan of a SPEC file, or of a queue's folder that a plan was kept in. Raises UserError."""
    if path.is_dir():
        try:
            return Plan.from_dict(read_json(path / "plan.json") or {})
        except (KeyError, TypeError):
            raise UserError(f"{path} is not a queue's folder: it holds no plan.json") from None
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        return make_plan({"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))})
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def make_plan(spec: Mapping) -> Plan:
    """Spread a SPEC out into runs. Raises UserError for what it does not understand; whether settings exist is `check_plan`'s."""
    if unknown := set(spec) - OWN_KEYS:
        raise UserError(f"unknown key {sorted(unknown)[0]!r}; known: {', '.join(sorted(OWN_KEYS))}")
    name = str(spec["name"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise UserError(f"name {name!r} is not a plain folder name (letters, digits, dot, dash, underscore)")
    base = {**({"PRESET": str(spec["preset"])} if spec.get("preset") else {}), **_settings(spec.get("with", {}), "with")}
    seeds = _seeds(spec.get("seeds", 1), "seeds")
    change_seeds = _seeds(spec.get("change_seeds", spec.get("seeds", 1)), "change_seeds")
    runs = [Run(REFERENCE, seed, base, True) for seed in seeds] if spec.get("reference", True) else []
    for variant, changes, own_seeds in _changes(spec):
        runs += [Run(variant, seed, {**base, **changes}) for seed in own_seeds or change_seeds]
    if not runs:
        raise UserError("there is nothing to run: neither a reference nor a change")
    for first, second in itertools.combinations(runs, 2):
        if first.name == second.name:
            raise UserError(f"two runs would be called {first.name}")
    runs = [dataclasses.replace(run, settings={**run.settings, "SEED": str(run.seed)}) for run in runs]
    return Plan(name, runs, _commands(spec.get("stages", ["train"]), spec.get("evaluate", [])))


def _changes(spec: Mapping) -> Iterator[tuple[str, dict[str, str], list[int] | None]]:
    """(name, settings, seeds of its own) of everything that differs from the reference."""
    for setting, values in _settings_lists(spec.get("set", {}), "set").items():
        for value in values:
            yield _variant({setting: value}), {setting: value}, None
    if grid := _settings_lists(spec.get("grid", {}), "grid"):
        for values in itertools.product(*grid.values()):
            changes = dict(zip(grid, values))
            yield _variant(changes), changes, None
    for name, table in _table(spec.get("runs", {}), "runs").items():
        own = dict(_table(table, f"runs.{name}"))
        seeds = _seeds(own.pop("seeds"), f"runs.{name}: seeds") if "seeds" in own else None
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name == REFERENCE:
            raise UserError(f"runs.{name}: choose another name (letters, digits, dot, dash, underscore; not {REFERENCE!r})")
        yield name, _settings(own, f"runs.{name}"), seeds


def _commands(stages: object, evaluate: object) -> dict[str, list[str]]:
    stages = stages.replace(",", " ").split() if isinstance(stages, str) else stages
    if not isinstance(stages, list) or not stages:
        raise UserError("stages is a list of train, quantize, evaluate")
    if unknown := [stage for stage in stages if stage not in COMMANDS]:
        raise UserError(f"stages: {unknown[0]!r}; known: {', '.join(COMMANDS)}")
    last = max(list(COMMANDS).index(stage) for stage in stages)  # an evaluation needs what comes before it
    evaluate = evaluate.split() if isinstance(evaluate, str) else evaluate
    if not isinstance(evaluate, list) or not all(isinstance(part, str) for part in evaluate):
        raise UserError('evaluate is a list of arguments, such as ["--audit"]')
    commands = {stage: list(COMMANDS[stage]) for stage in list(COMMANDS)[: last + 1]}
    if "evaluate" in commands:
        commands["evaluate"] += evaluate
    return commands


def _seeds(value: object, what: str) -> list[int]:
    seeds = list(range(FIRST_SEED, FIRST_SEED + value)) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UserError(f"{what}={value!r} is neither a number of seeds nor a list of them")
    return list(dict.fromkeys(seeds))


def _table(value: object, what: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} is a table of its own: [{what}]")
    return value


def _settings(table: object, what: str) -> dict[str, str]:
    lists = _settings_lists(table, what)
    for name, values in lists.items():
        if len(values) != 1:
            raise UserError(f"{what}: {name} has several values; [set] makes a run of each, [grid] of their combinations")
    return {name: values[0] for name, values in lists.items()}


def _settings_lists(table: object, what: str) -> dict[str, list[str]]:
    lists = {}
    for name, value in _table(table, what).items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise UserError(f"{what}: {name!r} is not a setting (they are written in capitals)")
        if name in QUEUE_SETS:
            raise UserError(f"{what}: {name} is the queue's to set" + (" (seeds = …)" if name == "SEED" else ""))
        lists[name] = [_text(item, f"{what}: {name}") for item in (value if isinstance(value, list) else [value])]
    return lists


def _text(value: object, what: str) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{what}={value!r} is neither text nor a number")
    return str(value) or "none"  # an empty variable counts as not set


def _variant(changes: Mapping[str, str]) -> str:
    """A folder's name that tells the change: num_loops_0."""
    text = "-".join(f"{name.lower()}_{value}" for name, value in changes.items())
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
    return plain if plain == text and len(text) <= 80 else f"{plain[:72]}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def check_plan(plan: Plan, environ: Mapping[str, str]) -> None:
    """Resolve the settings of every run, so that a misspelt one is known before the first has begun. Raises UserError."""
    from train_gpt import PART_OF, near_misses, resolve_config

    for run in plan.runs:
        for name in run.settings:
            if name != "PRESET" and name.lower() not in PART_OF:
                raise UserError(f"{run.name}: " + ("".join(near_misses({name: ""})) or f"{name} is not a setting"))
        try:
            resolve_config({**environ, **run.settings})
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None

"""The laboratory: queue experiments, compare them, look at them.

    python lab.py run SPEC.toml                                  a queue of runs: one a GPU at once; started again, it goes on
    python lab.py run --preset legal_ttt/one_gpu --set XSA_LAYERS=none --set NUM_LOOPS=0 --seeds 3
    python lab.py list                                           presets, and runs with state and score
    python lab.py table runs/QUEUE                               differences to the reference, with confidence intervals
    python lab.py plot runs/QUEUE                                curves and scores as PNG and SVG
    python lab.py watch                                          a page that shows the runs live
    python lab.py mirror runs/RUN --to tensorboard               the same in TensorBoard or Weights & Biases
    python lab.py sample runs/RUN --prompt "Once upon"           text from an artifact
    python lab.py records runs/QUEUE                             keep runs under records/, make its tables

`python lab.py VERB --help` says the rest of each. Results are read from the runs' own files under runs/.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from parts.files import UserError, cli
from parts.lab.plots import KINDS as PLOTS
from parts.lab.results import METRICS


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


# ----------------------------------------------------------------------------------------------------------------------
# Verbs: a function that declares its arguments and one that does it
# ----------------------------------------------------------------------------------------------------------------------


def run_arguments(parser: Parser) -> None:
    parser.add_argument(
        "spec", nargs="?", type=Path, help="a SPEC (TOML; parts/lab/spec.py describes it), or the folder of a queue that is to go on"
    )
    parser.add_argument("--preset", default="", help="instead of a SPEC: what is varied, such as legal_ttt/one_gpu")
    parser.add_argument("--name", default="", help="of the queue's folder; by default the SPEC's or the preset's name")
    parser.add_argument("--with", dest="common", action="append", default=[], metavar="NAME=VALUE", help="every run has it")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="NAME=VALUE", help="a run that differs in this alone")
    parser.add_argument("--grid", action="append", nargs="+", default=[], metavar="NAME=VALUE VALUE", help="every combination of these")
    parser.add_argument("--seeds", type=int, default=1, help="how many of each (1337, 1338, …)")
    parser.add_argument("--stages", default="", help="train,quantize,evaluate: up to the last one named (default: the SPEC's; train)")
    parser.add_argument("--evaluate", default="", metavar="ARGUMENTS", help='of eval_ttt.py, such as --evaluate="--audit"')
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the queue's folder")
    parser.add_argument("--devices", default="", help='"0,1" or "cpu"; by default every GPU that is visible')
    parser.add_argument(
        "--executor",
        choices=("here", "slurm", "local"),
        default="here",
        help="slurm: a job a run, through submitit; local: submitit without a cluster",
    )
    parser.add_argument(
        "--job", action="append", default=[], metavar="NAME=VALUE", help="an option of the jobs: timeout_min, slurm_partition, …"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="do these variants or runs now, and leave the others")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run that would not end within so many, by what others took"
    )
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")


def run(options: argparse.Namespace) -> int:
    """Queue the runs of a SPEC, or of --preset and its changes: training, quantization and evaluation as far as asked."""
    from parts.lab.queue import Local, Queue, Submitit, find_devices
    from parts.lab.spec import check_plan, load_plan, make_plan

    if (options.spec is None) == (not options.preset):
        raise UserError("name a SPEC or a --preset")
    if options.spec is not None:
        if options.common or options.changes or options.grid or options.name:
            raise UserError("--name, --with, --set and --grid are for a queue without a SPEC; write them into it")
        plan = load_plan(options.spec)
        root = options.spec.resolve().parent if options.spec.is_dir() else options.runs
    else:
        changes: dict[str, list[str]] = {}
        for name, value in map(assignment, options.changes):
            changes.setdefault(name, []).append(value)
        grid = {}
        for first, *others in options.grid:
            name, value = assignment(first)
            grid[name] = [value, *others]
        plan = make_plan(
            {
                "name": options.name or options.preset.replace("/", "-"),
                "preset": options.preset,
                "seeds": options.seeds,
                "stages": options.stages or "train",
                "evaluate": options.evaluate,
                "with": dict(map(assignment, options.common)),
                "set": changes,
                "grid": grid,
            }
        )
        root = options.runs
    part = plan.part(options.only, options.stages)
    check_plan(part, os.environ)
    if options.dry_run:
        print("\n".join(part.lines(root)))
        return 0
    if options.executor == "here":
        executor = Local(find_devices(options.devices))
    elif options.minutes < math.inf:
        raise UserError("--minutes is for runs of this machine; a cluster's jobs have --job timeout_min=N")
    else:
        jobs = {name: int(value) if value.isdigit() else value for name, value in map(assignment, options.job)}
        executor = Submitit(options.executor, root / plan.name, jobs)
    return Queue(part, root, executor, whole=plan, seconds=60 * options.minutes).run(options.retry)


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UserError(f"{text!r} is not NAME=VALUE")
    return name, value


def one_arguments(parser: Parser) -> None:
    parser.add_argument("folder", type=Path)


def one(options: argparse.Namespace) -> int:
    """Run what is left of one queued run, here and now: what a queue starts for each."""
    from parts.lab.queue import perform

    return perform(options.folder)


def list_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], help="folders (default: runs)")


def list_(options: argparse.Namespace) -> int:
    """Presets with a line each; runs with state and score."""
    from parts.lab.overview import preset_lines, run_lines

    print("\n".join([*preset_lines(), "", *run_lines(options.runs)]))
    return 0


def table_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or folders that hold some, such as a queue's")
    parser.add_argument(
        "--reference", default="", help="what the others are compared with: a run or a variant (default: the queue's, else the first)"
    )
    parser.add_argument(
        "--metric", choices=METRICS, default="", help="which val_bpb (default: the evaluation's score if every run has one, else float)"
    )
    parser.add_argument("--paired", action="store_true", help="intervals from differences paired by seed (default: Welch's)")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")


def table(options: argparse.Namespace) -> int:
    """Compare runs with a reference: differences with confidence intervals from the seeds, tokens/s, bytes, seconds."""
    from parts.lab.compare import Table
    from parts.lab.results import read_runs

    print(getattr(Table(read_runs(options.runs), options.reference, options.metric, options.paired), options.format)())
    return 0


def sample_arguments(parser: Parser) -> None:
    parser.add_argument("artifact", type=Path, help="artifact.bin, or the folder of its run")
    parser.add_argument("--prompt", default="", help="the text's beginning (default: none, a new document)")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest (default: 0, all)")
    parser.add_argument("--seed", type=int, default=1337)


def sample(options: argparse.Namespace) -> int:
    """Write text from an artifact."""
    from parts.lab.sample import sample

    print(sample(options.artifact, options.prompt, options.tokens, options.temperature, options.top_k, options.seed))
    return 0


def plot_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or folders that hold some")
    parser.add_argument(
        "--what", default=",".join(PLOTS), help=f"comma-separated choice of {', '.join(PLOTS)} (default: all that there is)"
    )
    parser.add_argument("--x", default="seconds", help="of curves: seconds, steps, tokens, or several of them (default: seconds)")
    parser.add_argument("--out", type=Path, default=Path("runs/plots"), help="folder of the PNG and SVG files (default: runs/plots)")


def plot(options: argparse.Namespace) -> int:
    """Draw runs: loss, val_bpb and learning rate over seconds, steps or tokens; val_bpb against bytes and against seconds."""
    from parts.lab.plots import X_AXES, plot
    from parts.lab.results import read_runs

    what, xs = words(options.what, PLOTS, "--what"), words(options.x, X_AXES, "--x")
    for path in plot(read_runs(options.runs), what, xs, options.out):
        print(path)
    return 0


def words(text: str, known: Iterable[str], option: str) -> list[str]:
    """The words of a comma-separated list. Raises UserError for one that is not known."""
    chosen = [word for word in text.split(",") if word]
    if unknown := [word for word in chosen if word not in known]:
        raise UserError(f"{option}: {unknown[0]!r} is not one of {', '.join(known)}")
    return chosen


def watch_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="folder (default: runs)")
    parser.add_argument("--port", type=int, default=8016, help="default: 8016; 0: any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="another address than this machine's own: whoever reaches it sees the runs")


def watch(options: argparse.Namespace) -> int:
    """Serve a page that shows the runs live: curves, speed, memory, time to go, logs, settings, audits."""
    from parts.lab.watch import watch

    watch(options.runs, options.host, options.port)
    return 0


def mirror_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or folders that hold some")
    parser.add_argument("--to", required=True, help="tensorboard (RUN/tensorboard), wandb, or both with a comma between them")
    parser.add_argument("--follow", action="store_true", help="go on until none of the runs is under way")


def mirror(options: argparse.Namespace) -> int:
    """Send metrics.jsonl to TensorBoard or Weights & Biases; MIRROR=… does it while a run trains."""
    from parts.lab.mirror import SINKS, mirror
    from parts.lab.results import read_runs

    return mirror(read_runs(options.runs), words(options.to, SINKS, "--to"), options.follow)


def records_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", type=Path, help="finished runs, or folders that hold some, to be kept under records/")
    parser.add_argument("--to", type=Path, help="their folder (default: records/PRESET/QUEUE)")


def records(options: argparse.Namespace) -> int:
    """Make the tables under records/ anew; with runs, keep these first: settings, metrics, logs and scores, no weights."""
    from parts.lab.records import keep, write_tables
    from parts.lab.results import read_runs

    runs = read_runs(options.runs)
    for folder in keep(runs, options.to):
        print(f"kept {folder}")
    for run in runs:
        if run.state != "done":
            print(f"left out {run.folder}: {run.state}")
    for file in write_tables():
        print(f"wrote {file}")
    return 0


VERBS = {
    "run": (run, run_arguments),
    "one": (one, one_arguments),
    "list": (list_, list_arguments),
    "table": (table, table_arguments),
    "sample": (sample, sample_arguments),
    "plot": (plot, plot_arguments),
    "watch": (watch, watch_arguments),
    "mirror": (mirror, mirror_arguments),
    "records": (records, records_arguments),
}


def main() -> int:
    parser = Parser(prog="python lab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (do, declare) in VERBS.items():
        declare(verbs.add_parser(name, help=do.__doc__, description=do.__doc__))
    options = parser.parse_args(sys.argv[1:] or ["--help"])
    return VERBS[options.verb][0](options)


if __name__ == "__main__":
    cli(main)

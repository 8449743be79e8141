"""Tables and the picture of records/, made of the kept files of runs. Nothing in them is typed: `make records` writes them, a test says when they are stale.

A Markdown file marks where a table goes: everything between `<!-- make records: KIND -->` and `<!-- end -->` is generated.

    cards          what the published cards claim, and what was found about it (records/cards.json)
    leaderboard    every kept run of every preset
    results        the kept runs of the file's own record
    quantization   ways to quantize, from the record's quantization_table.json
    compressors    the same tensors under every compressor, from the record's compare.log (`quantize.py compare`)
    gains          what each expert gained, from the record's evaluations
    table          the record's runs against their reference, with intervals
"""

from __future__ import annotations

import dataclasses
import filecmp
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from parts.files import UserError, atomic_write, read_json
from parts.lab.compare import Group, Table, group_runs, markdown_table
from parts.lab.plots import Figure, draw, figures, validations
from parts.lab.queue import ROOT
from parts.lab.results import METRICS, Result, find_runs, read_runs

BLOCK = re.compile(r"(<!-- make records: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURE = "curves"  # README's
# What is kept of a run: what its figures come from, and its logs. No weights.
KEPT = ("lab.json", "config.json", "metrics.jsonl", "train.log", "quantize.json", "eval.json", "quantization_table.json")
KEPT_LOGS = ("*.out", "quantize.log", "eval.log")


# ----------------------------------------------------------------------------------------------------------------------
# Figures of a group
# ----------------------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float | None], form: str = ".4f") -> str:
    """`1.0383`, of several `1.0383 ± 0.0012`, where some have none `1.0383 (1 of 3)`; empty if there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = format(statistics.fmean(known), form)
    text += f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def si(value: float) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.0f}K" if value >= 1e3 else f"{value:.0f}"


def middle(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """The mean alone, where the spread says nothing."""
    known = [value for value in values if value is not None]
    return show(statistics.fmean(known)) if known else ""


def hardware(run: Result) -> str:
    start = run.last("start")
    name = re.sub(r"^NVIDIA (\S+).*", r"\1", str(start.get("device", "?")))
    return f"{start.get('world_size', 1)} × {name}"


def what_ran(group: Group, among: Sequence[Group]) -> str:
    """`300 s, 1 × H100`: the budget that was set, or what it took; with what tells its vocabulary where another of the groups is alike."""

    def text(run: Result) -> str:
        seconds = run.config.get("max_wallclock_seconds") or run.last("done").get("train_seconds") or 0
        return f"{seconds:.0f} s, {hardware(run)}"

    run = group.runs[0]
    others = [other.runs[0] for other in among if other is not group and text(other.runs[0]) == text(run)]
    said = any(other.bytes_a_token != run.bytes_a_token for other in others)
    return text(run) + (f", {run.bytes_a_token:.2f} bytes a token" if said and run.bytes_a_token else "")


def audit_text(evaluations: Sequence[dict]) -> str:
    """The verdicts; one of a form that did not say what it lacks is an earlier audit's."""
    said = {}
    for evaluation in evaluations:
        if audit := evaluation.get("audit"):
            said[audit["verdict"] + ("" if "missing" in audit else " (earlier form)")] = None
    return ", ".join(said)


def kept_groups(record: Path) -> list[Group]:
    """The kept runs of a record that were finished, seeds together, longest first; of equal length those with the lowest score first."""
    groups = group_runs([run for path in find_runs(record) if (run := Result(path)).last("done")])
    return sorted(
        groups, key=lambda group: (-(group.settings.get("max_wallclock_seconds") or 0), min(group.scores("float").values(), default=9.0))
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def cards(records: Path) -> dict[str, dict]:
    """Preset -> what its card says: system (its letter), design, claimed_val_bpb, found."""
    return read_json(records / "cards.json") or {}


def cards_table(records: Path, _: Path) -> Iterator[str]:
    rows = [
        [card["system"], f"[{name}]({name}/)", card["design"], f"{card['claimed_val_bpb']:.4f}", card["found"]]
        for name, card in cards(records).items()
    ]
    yield from markdown_table(["", "preset", "design", "claimed val_bpb", "what was found about the claim"], rows)


def leaderboard(records: Path, file: Path) -> Iterator[str]:
    rows, known = [], cards(records)
    base = "" if file.parent == records else f"{records.name}/"
    for record in sorted(path.parent for path in records.glob("*/config.env")):
        card = known.get(record.name, {})
        groups = kept_groups(record)
        for group in groups:
            runs = group.runs
            scores = [mean([run.bpb(metric) for run in runs]) for metric in ("float", "artifact", "ttt", "experts")]
            best = min(statistics.fmean(values.values()) for metric in METRICS if (values := group.scores(metric)))
            name = f"[{' '.join(filter(None, (card.get('system'), record.name)))}]({base}{record.name}/)"
            row = [name, what_ran(group, groups), *scores, str(len(runs))]
            row += [
                middle([run.bytes_total for run in runs], lambda size: f"{size:,.0f}"),
                middle([run.tokens_per_second for run in runs], si),
            ]
            row += [middle([run.train_seconds for run in runs], lambda spent: f"{spent:.0f}"), audit_text([run.evaluation for run in runs])]
            claim = card.get("claimed_val_bpb")
            row += [f"{claim:.4f}" if claim else ""]
            rows.append((-(group.settings.get("max_wallclock_seconds") or 0), best, row))
    header = ["preset", "run", "float", "artifact", "+ TTT", "+ experts", "seeds", "bytes", "tokens/s", "seconds", "audit", "card's claim"]
    yield from markdown_table(header, [row for *_, row in sorted(rows, key=lambda row: row[:2])])


def evaluations_of(run: Result) -> dict[str, dict]:
    """Every kept evaluation of a run by its file's name: eval.json, and others such as eval_tilt.json."""
    found = {path.name: read_json(path) or {} for path in sorted(run.folder.glob("eval*.json"))}
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "eval.json", name))}


def links(record: Path, runs: Sequence[Result], names: Sequence[str]) -> str:
    found = []
    for run in runs:
        for name in names:
            if name and (run.folder / name).is_file():
                shown = name if len(runs) == 1 else f"{name} {run.seed}"
                found.append(f"[{shown}]({(run.folder / name).relative_to(record).as_posix()})")
    return ", ".join(found)


def how_it_learned(config: dict) -> str:
    if config.get("ttt_mode") == "document":
        return f"by document, LoRA of rank {config.get('ttt_doc_rank')}, lr {config.get('ttt_doc_lr')}, chunks of {config.get('ttt_doc_chunks')}"
    return f"{config.get('ttt_optimizer')}, epochs: {config.get('ttt_epochs')}, weights: {config.get('ttt_params')}"


def results_column(record: Path, group: Group, among: Sequence[Group], name: str) -> dict[str, str]:
    """The figures of a group with one of its evaluations ("": it has none), by row. Not every seed need have got as far."""
    runs = group.runs
    scored = [evaluations_of(run).get(name, {}) for run in runs]
    config = {**group.settings, **next((scores["config"] for scores in scored if scores.get("config")), {})}
    done, quantized = [run.last("done") for run in runs], [run.quantized for run in runs if run.quantized]
    first = next(filter(None, scored), None)
    column = {
        "run": what_ran(group, among) + (f", {name}" if name not in ("", "eval.json") else ""),
        "seeds": ", ".join(str(run.seed) for run in runs),
        "steps, tokens": middle([d.get("steps") for d in done], lambda n: f"{n:,.0f}") + ", " + middle([d.get("tokens") for d in done], si),
        "tokens/s over the run, peak memory": middle([run.tokens_per_second for run in runs], si)
        + ", "
        + middle([run.peak_memory_gib for run in runs], lambda gib: f"{gib:.1f} GiB"),
        "val_bpb float, raw weights": mean([run.validated("raw") for run in runs]),
        "val_bpb float, EMA": mean([run.validated("ema") for run in runs]),
    }
    if quantized:
        seconds = [q["seconds"] for q in quantized]
        spent = [middle([s.get(phase) for s in seconds], lambda value: f"{value:.1f}") for phase in ("calibration", "solving", "packing")]
        column["Hessians / GPTQ / packing, s"] = " / ".join(spent)
        sizes = [middle([q.get(f"bytes_{part}") for q in quantized], lambda size: f"{size:,.0f}") for part in ("model", "code", "total")]
        column["bytes: model + code"] = f"{sizes[0]} + {sizes[1]} = {sizes[2]}"
    if first:
        column["val_bpb artifact, sliding"] = f"{mean([s.get('sliding_bpb') for s in scored])} (stride {config.get('eval_stride')})"
        if first.get("ttt_bpb") is not None:
            column["+ score-first TTT"] = f"{mean([s.get('ttt_bpb') for s in scored])} ({how_it_learned(config)})"
        if first.get("experts_bpb") is not None:
            column["+ experts"] = f"{mean([s.get('experts_bpb') for s in scored])} ({config.get('experts', '').replace(',', ', ')})"
        if claim := first.get("invalid_cache"):
            column["what the card's formula would have claimed"] = (
                f"{claim['claimed_bpb']:.4f}, with sums over the vocabulary of {claim['mean_sum_over_vocabulary']:.1f} on average: no probability"
            )
        column["audit"] = audit_text(scored)
        rates = [s.get("tokens_per_second") or {} for s in scored]
        for title, key in (
            ("sliding pass", "sliding"),
            ("score-first pass", "score_first"),
            ("model alone", "model"),
            ("experts alone", "experts"),
            ("TTT's training alone", "training"),
        ):
            if rate := middle(
                [r.get(key) for r in rates if key != "experts" or first.get("experts_bpb") is not None], lambda rate: f"{rate:,.0f}"
            ):
                column[f"{title}, tokens/s"] = rate
        seconds = [s.get("seconds") or {} for s in scored]
        spent = [middle([s.get(phase) for s in seconds], lambda value: f"{value:.1f}") for phase in ("total", "compile", "audit")]
        column["evaluation, s: all / compilation / audit"] = " / ".join(part or "–" for part in spent)
    names = ["train.log", "train.out", "quantize.log", "quantize.out", "eval.log", "evaluate.out"]
    if name not in ("", "eval.json"):
        names = [Path(name).with_suffix(".log").name]
    column["logs"] = links(record, runs, [*names, name])
    return column


def results(records: Path, file: Path) -> Iterator[str]:
    record = file.parent
    columns, groups = [], kept_groups(record)
    for group in groups:
        names = dict.fromkeys(name for run in group.runs for name in evaluations_of(run)) or [""]
        columns += [results_column(record, group, groups, name) for name in names]
    if not columns:
        raise UserError(f"{record}: no finished run is kept there")
    titles = list(dict.fromkeys(title for column in columns for title in column))
    order = list(max(columns, key=len))  # rows that only shorter columns have come last
    titles.sort(key=lambda title: order.index(title) if title in order else len(order))
    header, *rows = [[title, *(column.get(title, "") for column in columns)] for title in titles]
    yield from markdown_table(["", *header[1:]], rows)


def quantization(records: Path, file: Path) -> Iterator[str]:
    for path in sorted(file.parent.rglob("quantization_table.json")):
        table = read_json(path) or {}
        rows = []
        for row in table.get("rows", []):
            if "bytes" not in row:
                rows.append([row["variant"], f"{row['val_bpb']:.4f}", "", "", "", ""])
                continue
            against = f"{100 * (row['bytes_range'] / row['bytes'] - 1):+.2f} %"
            rows.append(
                [row["variant"], f"{row['val_bpb']:.4f}", f"{row['rise']:+.4f}", f"{row['bytes']:,}", f"{row['bytes_range']:,}", against]
            )
        compressor = table.get("compressor", "brotli")
        header = ["variant", "val_bpb", "over float", f"bytes, {compressor}", "bytes, range coder", f"range coder against {compressor}"]
        yield from markdown_table(header, rows)


def compressors(records: Path, file: Path) -> Iterator[str]:
    for path in sorted(file.parent.rglob("compare.log")):
        lines = [
            re.split(r"\s{2,}|(?<=%)\s+|(?<=\d)\s+(?=[\d+-])", line.strip())
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        yield from markdown_table([re.sub("^vs ", "against ", title) for title in lines[0]], lines[1:])


def gains(records: Path, file: Path) -> Iterator[str]:
    """An expert a row: val_bpb with it, and what that gains over what it is added to."""
    rows = []
    for group in kept_groups(file.parent):
        for name in {name: None for run in group.runs for name in evaluations_of(run)}:
            for expert, gain in (evaluations_of(group.runs[0])[name].get("experts") or {}).items():
                rows.append([name, expert, f"{gain['bpb']:.4f}", f"{gain['gain_bpb']:+.4f}"])
    yield from markdown_table(["evaluation", "expert", "val_bpb", "gain"], rows)


def table(records: Path, file: Path) -> Iterator[str]:
    yield from Table(read_runs([file.parent])).markdown().splitlines()


KINDS: dict[str, Callable[[Path, Path], Iterator[str]]] = {
    "cards": cards_table,
    "leaderboard": leaderboard,
    "results": results,
    "quantization": quantization,
    "compressors": compressors,
    "gains": gains,
    "table": table,
}


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def with_tables(file: Path, records: Path = ROOT / "records") -> str:
    """A Markdown file's text with its tables made anew. Raises UserError."""

    def make(match: re.Match) -> str:
        if match[2] not in KINDS:
            raise UserError(f"{file}: unknown table {match[2]!r}; known: {', '.join(KINDS)}")
        return match[1] + "\n".join(KINDS[match[2]](records, file)) + "\n" + match[3]

    return BLOCK.sub(make, file.read_text(encoding="utf-8"))


def marked_files(records: Path = ROOT / "records") -> list[Path]:
    """The Markdown files that have tables of ours."""
    files = [records.parent / "README.md", *sorted(records.rglob("*.md"))]
    return [file for file in files if file.is_file() and BLOCK.search(file.read_text(encoding="utf-8"))]


def picture(records: Path = ROOT / "records") -> Figure | None:
    """README's: each preset's longest kept run, by val_bpb where any was validated on its way, else by training loss.

    The loss is of the runs with the commonest vocabulary alone: nats a token do not compare between two.
    """
    kept = [kept_groups(config.parent) for config in sorted(records.glob("*/config.env"))]
    runs = [run for groups in kept for group in groups[:1] for run in group.runs]
    kind = "val_bpb"
    if not any(len(line) > 1 for run in runs for line in validations(run)):
        vocabularies = [[group.runs[0].bytes_a_token for group in groups] for groups in kept]
        known = [vocabulary for of_preset in vocabularies for vocabulary in of_preset if vocabulary]
        commonest = statistics.mode(known) if known else 0.0
        longest = [groups[of_preset.index(commonest)] for groups, of_preset in zip(kept, vocabularies) if commonest in of_preset]
        kind, runs = "loss", [run for group in longest for run in group.runs]
    names = [group.runs[0].folder.relative_to(records).parts[0] for group in group_runs(runs)]
    for figure in figures(runs, [kind], ["seconds"]):
        return dataclasses.replace(
            figure, name=PICTURE, series=[dataclasses.replace(line, label=names[line.index]) for line in figure.series]
        )
    return None


def is_current(figure: Figure, records: Path = ROOT / "records") -> bool:
    """Whether the picture under records/ shows the data of this one; with which matplotlib it was drawn does not matter."""
    path = records / f"{figure.name}.svg"
    return path.is_file() and figure.digest in path.read_text(encoding="utf-8")


def write_tables(records: Path = ROOT / "records") -> list[Path]:
    """Make every table anew, and the picture where it is stale -> the files that have changed."""
    figure = picture(records)
    changed = draw(figure, records, ["svg"]) if figure and not is_current(figure, records) else []
    for file in marked_files(records):
        if (text := with_tables(file, records)) != file.read_text(encoding="utf-8"):
            with atomic_write(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
            changed.append(file)
    return changed


def keep(runs: Sequence[Result], to: Path | None = None, records: Path = ROOT / "records") -> list[Path]:
    """Copy what is kept of the finished ones of these runs to `to`/RUN, by default records/PRESET/QUEUE/RUN -> the new folders.

    Raises UserError where none is finished, or where another run lies in the place of one.
    """
    plan, done = [], [run for run in runs if run.state == "done"]
    if runs and not done:
        raise UserError(f"{runs[0].folder} is not done ({runs[0].state}): nothing is kept")
    for run in done:
        preset = run.preset.partition("/")[0]
        if to is None and not (preset and (records / preset / "config.env").is_file()):
            raise UserError(f"{run.folder} is of no preset under {records}: say --to FOLDER")
        folder = (to or records / preset / run.job.get("queue", "")) / run.name
        if not folder.exists():
            plan.append((run, folder))
        elif filecmp.cmpfiles(folder, run.folder, ("metrics.jsonl", "eval.json"), shallow=False)[1]:
            raise UserError(f"{folder} is there already, and is another run's: remove it, or choose another --to")
    for run, folder in plan:
        folder.mkdir(parents=True)
        for pattern in (*KEPT, *KEPT_LOGS):
            for file in run.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    return [folder for _, folder in plan]

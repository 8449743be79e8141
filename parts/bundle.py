"""A folder to hand in: one run's artifact, code, score and logs, in the challenge's form.

README.md  submission.json  train.log      what the challenge asks for; the score is this artifact's, or the folder is not made
artifact.bin  evaluate.py                  what counts: they evaluate, and audit, from any folder
train_gpt.py, what it imports, records/    the trainer as it stands here, readable, with the run's settings as a preset
logs/                                      metrics, evaluation, quantization
bundle.json                                SHA-256 of every file above: what a later bundle may replace
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from parts import packing
from parts.code import ROOT, SCRIPT_NAME, code_bytes, code_script, reached_sources
from parts.files import UserError, read_json, sha256_file, write_json
from train_gpt import SIZE_LIMIT_BYTES, load_run, model_digest, settings

MANIFEST = "bundle.json"
# What of the run's settings is about this machine, and has no business in a submission.
LOCAL_SETTINGS = ("data_path", "tokenizer_path", "runs_dir", "run_id", "device", "resume")
README = """\
# {name}

`val_bpb` {val_bpb:.4f} ({val_loss:.4f} nats a token), {bytes_total:,} bytes: `artifact.bin` {bytes_model:,} + `{script}` {bytes_code:,},
tokenizer {bytes_tokenizer:,} (0: it does not count). (The training script packed the same way would take {bytes_code_training:,}.)

{reservations}Evaluate, or evaluate and audit, from any folder, with the packages of this track installed:

    DATA_PATH=<folder of fineweb_val_*.bin> TOKENIZER_PATH=<tokenizer>.model python {script} [--audit]

`{script}` is a zip archive that Python runs as it is; `unzip {script}` shows two entries: the starter, and `code` with the sources (JSON
under LZMA). It reads `artifact.bin` beside it and writes `eval.json` there. The evaluation's settings are in the artifact; environment
variables override them. The artifact that was scored in `logs/eval.json` differs in its header alone, which held paths of that machine.

Train, {hardware} as it was here ({train_seconds} s with calibration):

    DATA_PATH=<folder of shards> TOKENIZER_PATH=<tokenizer>.model PRESET={preset} torchrun --standalone --nproc_per_node={world_size} train_gpt.py
"""


# What keeps a score from being handed in, unless it is accepted by its name: `--despite NAME`. submission.json and README.md then say so.
RESERVATIONS = ("other-artifact", "other-code", "partial-evaluation", "no-audit", "failed-audit", "incomplete-audit")


def reservations(scores: dict, artifact: Path) -> dict[str, str]:
    """Those of RESERVATIONS that hold -> what exactly."""
    hashes, audit = scores.get("sha256") or {}, scores.get("audit") or {}
    verdict, found = audit.get("verdict"), {}
    if hashes.get("artifact") != sha256_file(artifact):
        found["other-artifact"] = f"it is the score of another artifact than {artifact.name}"
    if hashes.get("code", code_hash()) != code_hash():
        found["other-code"] = "it is the score of other code than would be handed in"
    if (scores.get("config") or {}).get("eval_tokens"):
        found["partial-evaluation"] = f"it scores {scores.get('tokens_scored')} targets only (EVAL_TOKENS)"
    if verdict == "fail":
        failed = [check.get("name") for check in audit.get("checks") or [] if check.get("verdict") == "fail"]
        found["failed-audit"] = f"the audit failed: {', '.join(map(str, failed)) or 'see its report'}"
    elif verdict == "incomplete":
        found["incomplete-audit"] = (
            f"the audit is incomplete for want of: {', '.join(map(str, audit.get('missing') or [])) or 'see its report'}"
        )
    elif verdict != "pass":
        found["no-audit"] = "it was not audited"
    return found


def finished_score(run_dir: Path, despite: Collection[str] = ()) -> tuple[dict, dict[str, str]]:
    """What eval.json says, if it is the score of the artifact beside it: whole text, this code, audited; and what it is not of that, all of
    which is among `despite`. Raises UserError."""
    artifact, path = run_dir / "artifact.bin", run_dir / "eval.json"
    for file, maker in ((artifact, f"python quantize.py {run_dir}"), (path, f"python eval_ttt.py {artifact} --audit")):
        if not file.is_file():
            raise UserError(f"{file} is missing: run `{maker}` first")
    scores = read_json(path) or {}
    again = f"run `EVAL_TOKENS=0 python eval_ttt.py {artifact} --audit` again"
    if not all(isinstance(scores.get(name), float) for name in ("val_loss", "val_bpb")):
        raise UserError(f"{path} is not a finished evaluation: {again}")
    found = reservations(scores, artifact)
    if refused := [name for name in found if name not in despite]:
        all_the_same = " ".join(f"--despite {name}" for name in found)
        raise UserError(f"{path}: {'; '.join(map(found.get, refused))}. {again}; `{all_the_same}` hands it in as it is, and says so in it")
    check_origin(run_dir, (scores.get("sha256") or {}).get("val_data"))
    return scores, found


def check_origin(run_dir: Path, scored_on: str | None) -> None:
    """The artifact, its report and the training log are of the model beside them. Raises UserError naming the two that are not of one make.

    scored_on: what the validation shards' digest was at the evaluation; other shards than the run's own are said, and may well be meant.
    """
    artifact, report, log = (run_dir / name for name in ("artifact.bin", "quantize.json", "train.log"))
    again = f"run `python quantize.py {run_dir}` again"
    model, header = model_digest(run_dir), packing.read_header(artifact.read_bytes(), str(artifact))[0]
    if header.get("model_sha256") != model:
        raise UserError(f"{artifact} was not made from {run_dir / 'model.safetensors'}: {again}")
    if scored_on and scored_on != header.get("val_data_sha256"):
        print(f"warning: the score is on other validation shards (SHA-256 {scored_on[:12]}…) than the run was validated on")
    if (read_json(report) or {}).get("artifact_sha256") != sha256_file(artifact):
        raise UserError(f"{report} is not about {artifact}: {again}")
    if not log.is_file():
        raise UserError(f"{log} is missing: a submission needs its training log")
    trained = re.findall(r"model\.safetensors \(SHA-256 ([0-9a-f]{64})\)", log.read_text(errors="replace"))
    if trained and model not in trained:  # a line may be lost to a full disk: a log that names no model is believed
        raise UserError(f"{log} is of another training than {run_dir / 'model.safetensors'}: its model has SHA-256 {trained[-1][:12]}…")


def code_hash() -> str:
    return hashlib.sha256(code_script()).hexdigest()


def preset_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


def write_trainer(folder: Path, preset: str, config: dict) -> None:
    """train_gpt.py and what it imports, as they stand here, with the run's settings as a preset."""
    for source in reached_sources("train_gpt"):
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, folder / source)
    lines = []
    for spec in settings():
        value = config.get(spec.name, spec.default)
        if spec.name not in LOCAL_SETTINGS and value != spec.default:
            lines.append(f"{spec.name.upper()}={int(value) if isinstance(value, bool) else value}\n")
    (folder / "records" / preset).mkdir(parents=True)
    (folder / "records" / preset / "config.env").write_text("".join(lines))


def stage(run_dir: Path, folder: Path, scores: dict, despite: dict[str, str], about: dict) -> dict:
    """Write the whole submission into an empty folder; -> what submission.json holds."""
    artifact = run_dir / "artifact.bin"
    header, payload = packing.read_header(artifact.read_bytes(), str(artifact))
    # The artifact evaluates as it was evaluated here, without this machine's paths in it.
    config = {**header["config"], **{key: value for key, value in scores["config"].items() if key in header["config"]}}
    header["config"] = {key: value for key, value in config.items() if key not in LOCAL_SETTINGS}
    (folder / "artifact.bin").write_bytes(packing.seal(header, bytes(payload)))
    (folder / SCRIPT_NAME).write_bytes(code_script())
    run_settings, _, _ = load_run(run_dir)
    preset = preset_name(run_dir.name)
    write_trainer(folder, preset, run_settings)
    shutil.copyfile(run_dir / "train.log", folder / "train.log")
    (folder / "logs").mkdir()
    for log in ("metrics.jsonl", "eval.json", "eval.log", "quantize.json", "quantize.log"):
        if (run_dir / log).is_file():
            shutil.copyfile(run_dir / log, folder / "logs" / log)
    quantized = read_json(run_dir / "quantize.json") or {}
    bytes_model, bytes_code = ((folder / file).stat().st_size for file in ("artifact.bin", SCRIPT_NAME))
    bytes_tokenizer = scores.get("bytes_tokenizer", 0) * scores.get("tokenizer_counted", False)
    submission = {
        **about,
        "date": datetime.date.today().isoformat(),
        "val_loss": scores["val_loss"],
        "val_bpb": scores["val_bpb"],
        "audit": (scores.get("audit") or {}).get("verdict"),
        **({"despite": despite} if despite else {}),
        "bytes_total": bytes_model + bytes_code + bytes_tokenizer,
        "bytes_model": bytes_model,
        "bytes_code": bytes_code,
        "bytes_tokenizer": bytes_tokenizer,  # where it counts
        "bytes_code_training": code_bytes("train_gpt"),
        "seeds": [run_settings.get("seed")],
        "hardware": f"{header.get('world_size', 1)} x {header.get('device', 'unknown')}",
        "train_seconds": quantized.get("train_seconds_with_calibration", header.get("train_seconds")),
        "sha256": {"artifact": sha256_file(folder / "artifact.bin"), "evaluated_artifact": (scores.get("sha256") or {}).get("artifact")},
    }
    write_json(folder / "submission.json", submission)
    about_it = f"Handed in although {'; '.join(despite.values())}.\n\n" if despite else ""
    text = README.format(script=SCRIPT_NAME, preset=preset, world_size=header.get("world_size", 1), reservations=about_it, **submission)
    (folder / "README.md").write_text(text)
    return submission


def files_below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}


def former_files(out: Path) -> dict[str, str]:
    """Name -> SHA-256 of what an earlier bundle put into `out`; empty where there is nothing. Raises UserError for what is not ours to replace."""
    if not out.exists() or not any(out.iterdir()):
        return {}
    former = (read_json(out / MANIFEST) or {}).get("files")
    if not isinstance(former, dict):
        raise UserError(f"{out} is not empty and holds no submission made here ({MANIFEST}): choose another folder")
    for name, digest in former.items():
        if (out / name).is_file() and sha256_file(out / name) != digest:
            raise UserError(f"{out / name} was changed after it was made: move it away, or choose another folder")
    return former


def bundle(run_dir: Path, out: Path, despite: Collection[str] = (), **about: str) -> dict:
    """Make the folder, or remake it; what else lies in it stays. about: author, github_id, name, track. -> what submission.json holds.

    Built aside and moved into place; a new folder appears whole. Raises UserError, before anything is touched, where the score is not that
    of the artifact, or where `out` holds files of others or changed ones in the way.
    """
    scores, found = finished_score(run_dir, despite)
    former = former_files(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        submission = stage(run_dir, staging, scores, found, {**about, "name": about.get("name") or run_dir.name})
        made = files_below(staging)
        for name in made:
            if name not in former and (out / name).exists():
                raise UserError(f"{out / name} is in the way: no submission made here put it there")
        write_json(staging / MANIFEST, {"files": {name: sha256_file(path) for name, path in made.items()}})
        staging.chmod(0o755)
        if not out.exists():
            staging.rename(out)
        else:
            for name in sorted(set(former) - set(made)):
                (out / name).unlink(missing_ok=True)
            for name, path in {**made, MANIFEST: staging / MANIFEST}.items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, out / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    total = submission["bytes_total"]
    tokenizer = f" + tokenizer {submission['bytes_tokenizer']:,}" if submission["bytes_tokenizer"] else ""
    print(
        f"{out}: val_bpb {submission['val_bpb']:.4f}; model {submission['bytes_model']:,} + code {submission['bytes_code']:,}"
        f"{tokenizer} = {total:,} "
        f"of {SIZE_LIMIT_BYTES:,} bytes"
    )
    for reason in found.values():
        print(f"warning: handed in although {reason}")
    if total > SIZE_LIMIT_BYTES:
        print(f"warning: {total - SIZE_LIMIT_BYTES:,} bytes over the limit")
    return submission

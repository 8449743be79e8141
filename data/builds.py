"""Where a dataset is built: its work folder and lock, whether it is complete, and what is said about it meanwhile and at the end."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from data.shards import SHARD_HEADER_BYTES, SPLITS
from parts.files import UserError, sha256_file
from parts.progress import erase

MANIFEST_FORMAT = 1
SMALL_TOKENS = 10_000_000  # fewer than 20 steps of the defaults: the next command takes the preset that is made for a small text


def say(line: str) -> None:
    erase()
    print(line, file=sys.stderr, flush=True)


def is_complete(out: Path, manifest: dict | None, identity: str | None) -> bool:
    """Whether `out` holds what the manifest says (sizes, tokenizer hash) and it is the wanted build."""
    try:
        if manifest["job"] != identity:
            return False
        for split in SPLITS:
            entry = manifest["splits"][split]
            for shard in entry["shards"]:
                if (out / shard["file"]).stat().st_size != SHARD_HEADER_BYTES + 2 * shard["tokens"]:
                    return False
            if entry["document_hashes"] and not (out / entry["document_hashes"]["file"]).is_file():
                return False
        return sha256_file(out / manifest["tokenizer"]["path"]) == manifest["tokenizer"]["sha256"]
    except (OSError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """The right to build in `folder`; the system takes it back when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: unguarded
            pass
        except OSError:
            raise UserError(f"{folder}: another prepare.py is building there") from None
        yield


def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def discard_work(out: Path) -> None:
    """Remove the work of a build that was killed between publishing its result and cleaning up."""
    if (work := work_folder(out)).exists():
        with exclusive(work):
            shutil.rmtree(work)


def summary(out: Path, manifest: dict) -> str:
    """What a dataset holds, and the command that trains on it."""
    tokenizer = manifest["tokenizer"]
    model = Path(os.path.normpath(out / tokenizer["path"]))
    lines = [f"dataset    {out}", f"tokenizer  {model} ({tokenizer['vocab_size']} pieces)"]
    for split in SPLITS:
        entry = manifest["splits"][split]
        ratio = entry["raw_bytes"] / max(1, entry["tokens"] - entry["documents"])
        lines.append(
            f"{split:<10} {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{entry['raw_bytes']:,} bytes ({ratio:.2f} bytes a token), {len(entry['shards'])} shard(s)"
        )
    small = manifest["splits"]["train"]["tokens"] < SMALL_TOKENS
    settings = {"PRESET": "demo"} if small else {}
    settings |= {"VOCAB_SIZE": str(tokenizer["vocab_size"]), "DATA_PATH": _from_here(out), "TOKENIZER_PATH": _from_here(model)}
    script = shlex.quote(_from_here(Path(__file__).resolve().parent.parent / "train_gpt.py"))
    lines.append(f"next       {' '.join(f'{name}={shlex.quote(value)}' for name, value in settings.items())} python {script}")
    return "\n".join(lines)


def _from_here(path: Path) -> str:
    """The path as a command in the current folder would name it."""
    path, here = path.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

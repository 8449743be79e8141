"""Published FineWeb exports: shards and tokenizer from a dataset repository, checked, with a manifest of their own."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm

from data.builds import MANIFEST_FORMAT, discard_work, exclusive, is_complete, say, work_folder
from data.shards import BOS_ID, SPLITS, ByteTable, load_shard, parse_tokenizer, shard_name
from parts.files import UserError, atomic_write, one_line, read_json, sha256_file, write_json
from parts.progress import Progress

PUBLISHED_REPOS = {"sp1024": "willdepueoai/parameter-golf", "sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
PUBLISHED_TRAIN_SHARDS = 80  # what the challenge's own downloader takes: 8B tokens, 16 GB


class Hub:
    """One revision of a dataset repository; huggingface_hub downloads its files into `folder`, each continued where it broke off."""

    def __init__(self, repo_id: str, revision: str, endpoint: str | None, folder: Path):
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils

        self._hub, self.folder, self.endpoint = huggingface_hub, folder, endpoint
        self.where = f"{repo_id} at {endpoint or huggingface_hub.constants.ENDPOINT}"
        self._repo = {"repo_id": repo_id, "repo_type": "dataset"}
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()
        info = self._ask(huggingface_hub.HfApi(endpoint=endpoint).repo_info, revision=revision, files_metadata=True)
        self.commit = info.sha
        self.files = {file.rfilename: file for file in info.siblings}

    def _ask(self, function, **options):
        """function(**options), every failure of hub or network as a UserError."""
        try:
            return function(**self._repo, **options)
        except self._hub.errors.RepositoryNotFoundError:
            raise UserError(f"no dataset repository {self.where}, or no access to it") from None
        # Which exceptions a broken connection raises depends on the HTTP client inside (requests, httpx, hf_xet).
        except Exception as error:
            raise UserError(f"cannot read {self.where}: {type(error).__name__}: {one_line(error.__cause__ or error)[:200]}") from None

    def is_published(self, path: Path, name: str) -> bool:
        """Whether the file at `path` is the repository's: by size, and SHA-256 (large files) or git's blob hash (small ones)."""
        file = self.files[name]
        if path.stat().st_size != file.size:
            return False
        if file.lfs is not None:
            return sha256_file(path) == file.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.blob_id

    def download(self, names: list[str]) -> None:
        """Have files at folder/name, checked by size and hash."""
        options = {"revision": self.commit, "endpoint": self.endpoint, "local_dir": self.folder}
        if names:
            self._ask(self._hub.snapshot_download, allow_patterns=names, **options)
        for name in names:
            if not self.is_published(self.folder / name, name):
                (self.folder / name).unlink()
                raise UserError(f"{name} from {self.where} arrived damaged (size or hash differ); run again")


@dataclass
class Export:
    """What a repository has of a dataset, and where it goes.

    available: shards of each split; remote: local path -> name in the repository, of the tokenizer and of the wanted shards
    """

    hub: Hub
    available: dict[str, int]
    tokenizer: Path
    shards: dict[str, list[Path]]
    remote: dict[Path, str]


def find_export(args: argparse.Namespace, name: str, repo_id: str, out: Path, tokenizer_dir: Path) -> Export:
    """Ask the repository for its files and its manifest, which lie under --remote-prefix or at its root."""
    hub = Hub(repo_id, args.revision, args.endpoint, work_folder(out) / "download")
    prefix = args.remote_prefix.strip("/") + "/"
    prefix = prefix if f"{prefix}manifest.json" in hub.files else ""
    if f"{prefix}manifest.json" not in hub.files:
        raise UserError(f"{hub.where} has no file manifest.json")
    hub.download([f"{prefix}manifest.json"])
    listing = read_json(hub.folder / f"{prefix}manifest.json") or {}
    try:
        entry = next((d for d in listing["datasets"] if d["name"] == name), None)
        if entry is None:
            raise UserError(f"{hub.where} has no {name} (it has {', '.join(sorted(d['name'] for d in listing['datasets']))})")
        tokenizer = next(t for t in listing["tokenizers"] if t["name"] == entry["tokenizer_name"])
        available = {split: int(entry["stats"][f"files_{split}"]) for split in SPLITS}
        model_name = tokenizer.get("model_path") or tokenizer["path"]
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{hub.where}: its manifest.json has not the layout of the published exports") from None
    wanted = {"val": available["val"], "train": args.train_shards or min(PUBLISHED_TRAIN_SHARDS, available["train"])}
    if wanted["train"] > available["train"]:
        raise UserError(f"{repo_id} has {available['train']} training shards of {name}, not {wanted['train']}")
    shards = {split: [out / shard_name(split, index) for index in range(count)] for split, count in wanted.items()}
    remote = {path: f"{prefix}datasets/{name}/{path.name}" for split in wanted for path in shards[split]}
    model_path = tokenizer_dir / Path(model_name).name
    remote = {model_path: f"{prefix}{model_name}", **remote}
    if absent := [file for file in remote.values() if file not in hub.files]:
        raise UserError(f"{hub.where} has no file {absent[0]}")
    return Export(hub, available, model_path, shards, remote)


def place(export: Export, overwrite: bool) -> None:
    """Have every file of the export in its place. Those that are there are kept if they are the published ones."""
    hub, remote = export.hub, export.remote
    missing = [path for path in remote if not path.exists() or not hub.is_published(path, remote[path])]
    if (taken := [path for path in missing if path.exists()]) and not overwrite:
        raise UserError(f"{taken[0]}: stands here and is not the published file; --overwrite replaces it")
    hub.download([remote[path] for path in missing])
    model = hub.folder / remote[export.tokenizer] if export.tokenizer in missing else export.tokenizer
    vocab_size = parse_tokenizer(model.read_bytes(), str(export.tokenizer)).vocab_size()
    for path in missing:
        if path != export.tokenizer:
            try:
                load_shard(hub.folder / remote[path], vocab_size)
            except UserError as error:
                raise UserError(f"{hub.where}: {error}") from None
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(hub.folder / remote[path], path)
        except OSError:  # tokenizers may lie on another file system
            with atomic_write(path) as temporary:
                shutil.copyfile(hub.folder / remote[path], temporary)


def count_split(paths: list[Path], table: ByteTable, vocab_size: int, advance: Callable[[], object]) -> dict:
    """The manifest's entry for a split: documents, tokens and the bytes that they stand for.

    The first token of all is no target and counts no bytes: in a published export it is BOS, which stands for none.
    """
    documents = tokens = nbytes = 0
    last, shards = np.zeros(0, np.uint16), []
    for path in paths:
        shard = load_shard(path, vocab_size)
        for start in range(0, len(shard), 1 << 24):
            ids = np.concatenate([last, shard[start : start + (1 << 24)]])
            documents += int((ids[len(last) :] == BOS_ID).sum())
            nbytes += int(table.count(ids[:-1], ids[1:]).sum())
            last = ids[-1:]
        tokens += len(shard)
        shards.append({"file": path.name, "tokens": len(shard), "sha256": sha256_file(path)})
        advance()
    return {"documents": documents, "tokens": tokens, "raw_bytes": nbytes, "shards": shards, "document_hashes": None}


def fetch(args: argparse.Namespace, out: Path, tokenizer_dir: Path, command: str) -> dict:
    """Download a published export (what is there already is kept) and write its manifest."""
    name = f"fineweb10B_{args.variant}"
    repo_id = args.repo_id or PUBLISHED_REPOS[args.variant]
    facts = [name, repo_id, args.revision, args.endpoint, args.remote_prefix]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    have = read_json(out / "manifest.json")
    if is_complete(out, have, identity) and not args.overwrite:
        wanted = args.train_shards or min(PUBLISHED_TRAIN_SHARDS, have["published_shards"]["train"])
        if len(have["splits"]["train"]["shards"]) >= wanted:
            discard_work(out)
            print("up to date")
            return have
    work = work_folder(out)
    with exclusive(work):
        try:
            export = find_export(args, name, repo_id, out, tokenizer_dir)
        except UserError:  # nothing of size was downloaded yet
            shutil.rmtree(work)
            raise
        place(export, args.overwrite)
        processor = parse_tokenizer(export.tokenizer.read_bytes(), str(export.tokenizer))
        table, vocab_size = ByteTable.from_tokenizer(processor), processor.vocab_size()
        with Progress("count", sum(map(len, export.shards.values())), "shards", say) as advance:
            splits = {split: count_split(export.shards[split], table, vocab_size, advance) for split in SPLITS}
        manifest = {
            "format": MANIFEST_FORMAT,
            "command": command,
            "job": identity,
            "tokenizer": {
                "path": Path(os.path.relpath(export.tokenizer, out)).as_posix(),
                "sha256": sha256_file(export.tokenizer),
                "vocab_size": vocab_size,
            },
            "splits": splits,
            "split_rule": "published",
            # The exports hold tokens only: bytes are those the tokens stand for, after the tokenizer's normalization.
            "raw_bytes_counted_from": "tokens",
            "published_shards": export.available,
            "sources": [{"kind": "hub", "repo_id": repo_id, "commit": export.hub.commit, "dataset": name}],
            "software": {"sentencepiece": spm.__version__},
        }
        write_json(out / "manifest.json", manifest)
        shutil.rmtree(work)
    return manifest

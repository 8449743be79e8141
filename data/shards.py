"""The published shard format and the byte rule: what training, evaluation, audit and the builder read the same way.

A shard is 256 little-endian int32 (magic, version, tokens, zeros), then uint16 tokens; BOS stands before every document. A split is
the shards `fineweb_<split>_000000.bin`, … of a folder, in order: a document may run on from one into the next.

A tokenizer whose vocabulary has case operators (case_ops.py) is one of transformed text; what is loaded here encodes and decodes the text.

Needs numpy; sentencepiece and torch are imported where a tokenizer is loaded and a table is put on a device.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.case_ops import OPERATOR_BYTES, CaseTokenizer, has_operators
from parts.files import UserError, one_line, read_json, sha256_file

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_INTS
SPLITS = ("train", "val")
BOS_ID = 1  # starts every document in the published shards
MAX_VOCAB_SIZE = 1 << 16  # tokens are uint16
SPACE = "\u2581"  # SentencePiece's stand-in for a space
PUBLISHED_OPERATORS = "\ue001\ue002\ue003\ue004"  # of the published CaseOps exports: another transform than case_ops.py's
_SHARD_NAME = re.compile(r"fineweb_((?:train|val)(?:_bytes)?)_[0-9]{6}\.bin")

# ----------------------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------------------


def shard_name(split: str, index: int) -> str:
    return f"fineweb_{split}_{index:06d}.bin"


def list_shards(data_path: str | Path, split: str) -> list[Path]:
    """The split's shards in order. split: 'train' or 'val'; 'val_bytes' for the byte counts that some exports lay beside 'val'.

    The name decides alone: `fineweb_val_bytes_000000.bin` has a shard's header too, and would pass for tokens.
    """
    folder = Path(data_path)
    if not folder.is_dir():
        raise UserError(f"DATA_PATH={data_path} is not a folder; {where_from(data_path)}")
    shards = sorted(path for path in folder.iterdir() if (name := _SHARD_NAME.fullmatch(path.name)) and name[1] == split)
    if not shards:
        others = ", ".join(name for name in unread_files(folder) if name.startswith(f"fineweb_{split}"))
        hint = f" ({others} is not named like one)" if others else ""
        raise UserError(f"DATA_PATH={data_path} holds no {shard_name(split, 0)}{hint}; {where_from(data_path)}")
    return shards


def where_from(path: str | Path) -> str:
    """What to run for shards or a tokenizer that are not there."""
    published = re.search(r"fineweb(?:10B_sp|_)(1024|4096|8192)", Path(path).name)
    download = f"`python data/prepare.py --variant sp{published[1]}` downloads the published ones, " if published else ""
    return f"{download}`python data/prepare.py TEXT` builds shards and tokenizer of your own text and ends with the command that trains on them"


def unread_files(data_path: str | Path) -> list[str]:
    """Names that begin like a shard's and are none (`fineweb_val_old.bin`): no command reads those files."""
    return sorted(path.name for path in Path(data_path).glob("fineweb_*.bin") if not _SHARD_NAME.fullmatch(path.name))


def shard_header(tokens: int) -> bytes:
    header = np.zeros(SHARD_HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def load_shard(path: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """Memory-map one shard's uint16 tokens, refusing a wrong header or length. `vocab_size` also checks every token."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    size = path.stat().st_size
    if size < SHARD_HEADER_BYTES:
        raise UserError(f"{path} is {size} bytes long: no room for a shard header")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is not a token shard: magic {header[0]}, version {header[1]}")
    tokens, expected = int(header[2]), SHARD_HEADER_BYTES + 2 * int(header[2])
    if size != expected:
        fault = "truncated" if size < expected else "over-long"
        raise UserError(f"{path} is {fault}: its header says {tokens} tokens = {expected} bytes, the file has {size}")
    if tokens <= 0:
        raise UserError(f"{path} holds no tokens")
    data = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(tokens,))
    if vocab_size is not None:
        check_vocabulary(data, vocab_size, path)
    return data


def check_vocabulary(tokens: np.ndarray, vocab_size: int, path: str | Path) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise UserError(f"{path} holds token {largest}, beyond VOCAB_SIZE={vocab_size}: shards of another tokenizer?")


def load_manifest(data_path: str | Path) -> dict | None:
    """The manifest beside the shards, None where there is none (published exports keep theirs elsewhere, in another form)."""
    manifest = read_json(Path(data_path) / "manifest.json")
    try:
        counts = [manifest["splits"]["val"][key] for key in ("tokens", "raw_bytes")]
        return manifest if all(isinstance(count, int) for count in counts) and isinstance(manifest["splits"]["train"], dict) else None
    except (KeyError, TypeError):
        return None


SAMPLED_BLOCKS, SAMPLED_BYTES = 16, 1 << 14


def split_digest(data_path: str | Path, split: str) -> str:
    """SHA-256 that names a split's content, whatever its folder is called: what a checkpoint, a model and a score were made from.

    Validation shards are hashed whole. Of a training shard (gigabytes in all) its length and blocks spread evenly over it count, its ends
    included: enough to tell other data, another order or a repacked shard. Where a manifest lies beside the shards it must agree: on the number
    of tokens of each shard, on validation shards' own hashes too. Raises UserError naming the shard that does not.
    """
    manifest = load_manifest(data_path)
    entries = manifest["splits"][split].get("shards") if manifest else None
    known = {e["file"]: e for e in entries if isinstance(e, dict) and "file" in e} if isinstance(entries, list) else {}
    digest = hashlib.sha256()
    for path in list_shards(data_path, split):
        tokens, entry = len(load_shard(path)), known.get(path.name, {})
        if entry.get("tokens", tokens) != tokens:
            raise UserError(f"{path} holds {tokens:,} tokens, but manifest.json beside it says {entry['tokens']}: they are of two builds")
        if split == "val":
            whole = sha256_file(path)
            if entry.get("sha256", whole) != whole:
                raise UserError(f"{path} is not the file that manifest.json beside it describes: their SHA-256 differ")
            digest.update(bytes.fromhex(whole))
            continue
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for block in range(SAMPLED_BLOCKS):
                file.seek(max(0, size - SAMPLED_BYTES) * block // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def check_tokenizer(data_path: str | Path, tokenizer_path: str | Path) -> str:
    """The tokenizer's hash; refused if the manifest beside the shards says that another one wrote them, be it of the same size."""
    digest, manifest = tokenizer_hash(tokenizer_path), load_manifest(data_path) or {}
    entry = manifest.get("tokenizer")
    wrote = entry.get("sha256", digest) if isinstance(entry, dict) else digest
    if wrote != digest:
        raise UserError(
            f"TOKENIZER_PATH={tokenizer_path} (SHA-256 {digest[:12]}…) did not write the shards in DATA_PATH={data_path}: "
            f"their manifest.json names a tokenizer with {str(wrote)[:12]}…"
        )
    return digest


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and byte rule
# ----------------------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path, vocab_size: int | None = None):
    """The tokenizer in a file; refuses a vocabulary of another size than the model's."""
    if not Path(path).is_file():
        raise UserError(f"TOKENIZER_PATH={path} is not a file; {where_from(path)}")
    tokenizer = parse_tokenizer(Path(path).read_bytes(), str(path))
    if vocab_size is not None and tokenizer.vocab_size() != vocab_size:
        raise UserError(f"{path} has {tokenizer.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    return tokenizer


def parse_tokenizer(model: bytes, name: str):
    """The SentencePieceProcessor (or CaseTokenizer) of a serialized model. Raises UserError naming it where shards could not be read or written with it."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(model)
        tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))  # a damaged model may load and hold pieces that are no text
    except Exception as error:  # RuntimeError, OSError, TypeError or UnicodeDecodeError, by the kind of damage
        raise UserError(f"{name} is not a SentencePiece model: {one_line(error)}") from None
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise UserError(f"{name} has {tokenizer.vocab_size()} pieces; shards hold 16-bit tokens, at most {MAX_VOCAB_SIZE}")
    if tokenizer.bos_id() != BOS_ID:
        raise UserError(f"{name}: its BOS id is {tokenizer.bos_id()}; shards mark documents with {BOS_ID}")
    return CaseTokenizer(tokenizer) if has_operators(tokenizer) else tokenizer


def tokenizer_hash(path: str | Path) -> str:
    return sha256_file(path)


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes of raw text that each token stands for: sizes[context[previous], target].

    A tokenizer with a dummy prefix writes a space in front of every document that the text does not have, so a space that follows a
    control token is not text there; anywhere else, and with any other tokenizer, each ▁ is one byte. What has no token before it is
    no target and is not counted.

    Case operators are no bytes of the text (the escape is what a literal operator has more than its digit). The published CaseOps exports,
    whose literals look like operators, record the bytes of each validation token in files beside the shards: those count then.

    The arrays are numpy's, or torch's after `to`; `count` and `targets` take and give the same kind.
    """

    sizes: np.ndarray  # int64 [2, V]: after text, after a control token
    context: np.ndarray  # int64 [V]: 1 for control tokens
    recorded: np.ndarray | None = None  # int64 [N]: of each token of the validation stream, where the export records them

    @classmethod
    def from_tokenizer(cls, tokenizer) -> ByteTable:
        """Raises UserError for a tokenizer whose tokens do not tell the bytes."""
        if has_operators(tokenizer, PUBLISHED_OPERATORS):
            raise UserError(
                "the tokenizer is one of the published CaseOps exports, whose tokens do not tell their bytes: "
                f"{shard_name('val_bytes', 0)} … must lie beside the validation shards"
            )
        if tokenizer.id_to_piece(tokenizer.piece_to_id(SPACE)) != SPACE:
            raise UserError(f"the tokenizer has no standalone '{SPACE}' piece: its bytes cannot be counted")
        letter = "".join(tokenizer.id_to_piece(token) for token in tokenizer.encode("a"))  # "▁a" with a dummy prefix, "a▁" with a suffix
        if len(letter) > 1 and letter.endswith(SPACE):
            raise UserError("the tokenizer ends every text with a space (treat_whitespace_as_suffix): its bytes cannot be counted")
        size = tokenizer.vocab_size()
        operators = OPERATOR_BYTES if isinstance(tokenizer, CaseTokenizer) else {}
        sizes, context = np.zeros((2, size), np.int64), np.zeros(size, np.int64)
        for token in range(size):
            context[token] = tokenizer.is_control(token)
            if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
                continue
            piece = tokenizer.id_to_piece(token)
            # A space inside a piece (a vocabulary that keeps runs of spaces) is one byte of text, not the three of U+2581.
            sizes[:, token] = 1 if tokenizer.is_byte(token) else operators.get(piece, len(piece.replace(SPACE, " ").encode()))
            sizes[1, token] -= letter.startswith(SPACE) and piece.startswith(SPACE)
        return cls(sizes, context)

    @classmethod
    def for_validation(cls, tokenizer, data_path: str | Path) -> ByteTable:
        """The table for the validation shards of a folder: the bytes recorded there where the tokenizer's tokens do not tell them."""
        recorded = [path.name for path in Path(data_path).glob(shard_name("val_bytes", 0))]
        if not (has_operators(tokenizer, PUBLISHED_OPERATORS) and recorded):
            return cls.from_tokenizer(tokenizer)
        tokens, counts = (list_shards(data_path, split) for split in ("val", "val_bytes"))
        for path, beside in itertools.zip_longest(tokens, counts):
            if path is None or beside is None or beside.name != path.name.replace("_val_", "_val_bytes_"):
                raise UserError(f"{data_path} holds no {'token shard' if path is None else 'recorded bytes'} for {(path or beside).name}")
            if len(load_shard(path)) != len(load_shard(beside)):
                raise UserError(f"{beside} records {len(load_shard(beside))} tokens, {path.name} has {len(load_shard(path))}")
        size = tokenizer.vocab_size()
        return cls(
            np.zeros((2, size), np.int64), np.zeros(size, np.int64), np.concatenate([load_shard(path) for path in counts]).astype(np.int64)
        )

    def to(self, device) -> ByteTable:
        """The same table as tensors on a torch device."""
        import torch

        return ByteTable(
            *(None if array is None else torch.as_tensor(array, device=device) for array in (self.sizes, self.context, self.recorded))
        )

    def count(self, previous, target):
        """Bytes of each target, int64, the shape of `target`. Raises UserError where they are recorded by place, not told by the token."""
        if self.recorded is not None:
            raise UserError("the bytes of a published CaseOps export are known of its validation tokens in their order alone")
        return self.sizes[self.context[previous], target]

    def targets(self, tokens):
        """Bytes of each token but the first, int64 [N-1], of a stream of tokens [N]: with recorded bytes, the validation stream's first N."""
        return self.count(tokens[:-1], tokens[1:]) if self.recorded is None else self.recorded[1 : len(tokens)]

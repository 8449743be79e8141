"""Score an evaluator that is not trusted, on raw text that it never gets to see ahead (protocol and guarantees: parts/REFEREE.md).

    python -m parts.referee RAW.jsonl --tokenizer T.model --read artifact.bin --read evaluate.py -- python evaluate.py artifact.bin --serve
    python eval_ttt.py ARTIFACT --referee RAW.jsonl [--block 248] [--cuts 1]           the same for an artifact of this project

The referee alone has the text: it tokenizes it and checks that the tokens decode to it, byte for byte. Two replicas of the evaluator run in sandboxes
without network, with nothing to read but the submission and Python. Block by block,

  the PROBE gets the tokens up to a secret random cut and answers with its distribution of the next one, which does not exist in its
  process; the SCORER gets the block but for its last token and answers with the distributions of all its targets, not knowing the cut.

The probe's row must be the scorer's to the bit, and every row must be a distribution; the referee reads the scores from the scorer's rows itself. Then both
get the rest and may learn from it. A cheat at a fraction f of the targets survives n cuts with probability (1 - f)^n. Target i is token i + 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.shards import BOS_ID, load_tokenizer
from parts.files import UserError, cli, sha256_file, write_json
from parts.replica import Replica, ReplicaError, Sandbox

PASS, FAIL, INCOMPLETE = "pass", "fail", "incomplete"
BLOCK = 248  # targets that are asked for at once: two million have 8,000 cuts
NORMALIZATION_TOLERANCE = 1e-4  # of a row's sum (the challenge's own)


@dataclasses.dataclass
class Judgement:
    """What came of it. nll: nats over all targets, from the scorer's rows."""

    targets: int
    nll: float = 0.0
    scored: int = 0
    cuts: int = 0
    disagreements: list[int] = dataclasses.field(default_factory=list)  # targets at which probe and scorer differed
    improper: list[int] = dataclasses.field(default_factory=list)  # targets whose row is no distribution
    largest_sum_error: float = 0.0
    sandboxed: bool = False
    means: list[str] = dataclasses.field(default_factory=list)
    failure: str = ""  # of an evaluator that died, fell silent or broke the protocol
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.disagreements or self.improper or self.failure or self.scored != self.targets:
            return FAIL
        return PASS if self.sandboxed else INCOMPLETE

    def lines(self) -> list[str]:
        where = [f", the first at target {found[0]:,}" if found else "" for found in (self.disagreements, self.improper)]
        shut = (
            f"both without network, text and files ({', '.join(self.means)})"
            if self.sandboxed
            else "NO SANDBOX: it could have read the text"
        )
        missed = f"a cheat at 1 % of the targets is missed with probability {0.99**self.cuts:.1g}"
        return [
            f"cuts           {len(self.disagreements):,} of {self.cuts:,} answered otherwise than the scorer did{where[0]}; {missed}",
            f"distributions  {len(self.improper):,} of {self.scored:,} are none{where[1]}; largest |sum - 1| {self.largest_sum_error:.2g}",
            f"sandbox        {shut}",
            *([f"failure        {self.failure}"] if self.failure else []),
        ]


def judge(
    start: Callable[[], Replica],
    tokens: np.ndarray,
    block: int = BLOCK,
    cuts: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> Judgement:
    """Run both replicas over the tokens [targets + 1]. start() makes one. cuts: secret ones a block. progress(targets scored, nats so far)."""
    result = Judgement(len(tokens) - 1)
    began = time.perf_counter()
    with start() as probe, start() as scorer:
        result.sandboxed = probe.sandboxed and scorer.sandboxed
        result.means = probe.sandbox_status["means"]
        try:
            blocks = [(first, min(first + block, result.targets)) for first in range(0, result.targets, block)]
            secret = _ask(probe, scorer, tokens, *blocks[0], cuts)
            for number, (first, last) in enumerate(blocks):
                blind = [probe.answer()[0]]
                for cut in secret[1:]:
                    probe.feed(tokens[probe.known : cut + 1])
                    blind.append(probe.rows(cut, cut + 1)[0])
                rows = scorer.answer()
                if first == 0:
                    result.seconds["start"] = time.perf_counter() - began
                asked, secret = secret, ()
                if number + 1 < len(blocks):  # the replicas go on while this block is looked at
                    secret = _ask(probe, scorer, tokens, *blocks[number + 1], cuts)
                _judge_block(result, tokens, first, last, rows, asked, blind)
                if progress:
                    progress(result.scored, result.nll)
        except ReplicaError as error:
            result.failure = str(error)
    result.seconds["all"] = time.perf_counter() - began
    return result


def _ask(probe: Replica, scorer: Replica, tokens: np.ndarray, first: int, last: int, cuts: int) -> list[int]:
    """Put a block's questions to both; the secret cuts. The scorer is past what it was asked before, and has answered it."""
    secret = sorted({first + secrets.randbelow(last - first) for _ in range(cuts)})
    scorer.feed(tokens[scorer.known : last])
    scorer.ask(first, last)
    probe.feed(tokens[probe.known : secret[0] + 1])
    probe.ask(secret[0], secret[0] + 1)
    return secret


def _judge_block(
    result: Judgement, tokens: np.ndarray, first: int, last: int, rows: np.ndarray, secret: Sequence[int], blind: Sequence[np.ndarray]
) -> None:
    sums = np.abs(rows.sum(1, dtype=np.float64) - 1)
    proper = (sums <= NORMALIZATION_TOLERANCE) & (rows.min(1) >= 0)  # a NaN is neither
    result.improper += (first + np.flatnonzero(~proper)).tolist()
    result.disagreements += [cut for cut, row in zip(secret, blind) if not np.array_equal(row, rows[cut - first])]
    result.cuts += len(secret)
    result.largest_sum_error = max(result.largest_sum_error, float(np.nan_to_num(sums, nan=math.inf).max()))
    picked = rows[np.arange(last - first), tokens[first + 1 : last + 1]].astype(np.float64)
    result.nll -= float(np.log(np.maximum(picked, 1e-45)).sum())
    result.scored += last - first


def read_documents(path: str | Path) -> list[str]:
    """The documents of a .jsonl file: a line each, an object with "text" or a string. Any other file is one document."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if Path(path).suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise UserError(f"{path}:{number} is not JSON") from None
        value = value.get("text") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise UserError(f'{path}:{number} has no "text"')
        documents.append(value)
    return documents


def tokenize(documents: Sequence[str], tokenizer) -> tuple[np.ndarray, int]:
    """(BOS and tokens of every document, int32; bytes of the raw text). A tokenizer that does not give a document back is refused: its score would be of
    another text."""
    pieces, raw = [], 0
    for number, text in enumerate(documents):
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise UserError(
                f"document {number} does not come back from its tokens: the tokenizer changes the text, and a score would be of another"
            )
        pieces.append(np.array([BOS_ID, *ids], np.int32))
        raw += len(text.encode())
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    if len(tokens) < 2 or not raw:
        raise UserError("the text has no token to score")
    return tokens, raw


def referee(
    text: Path,
    tokenizer_path: Path,
    read: Sequence[Path],
    command: Sequence[str],
    block: int = BLOCK,
    cuts: int = 1,
    log: Callable[[str], None] = print,
) -> dict:
    """Everything that referee.json holds."""
    tokenizer = load_tokenizer(tokenizer_path)
    tokens, raw = tokenize(read_documents(text), tokenizer)
    files = list(dict.fromkeys([*read, tokenizer_path]))
    if missing := [path for path in files if not path.exists()]:
        raise UserError(f"{missing[0]} does not exist")
    targets = len(tokens) - 1
    log(f"{targets:,} targets, {raw:,} bytes; blocks of {block}, {cuts} secret cut(s) each")
    shown = time.perf_counter()

    def progress(scored: int, nll: float) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            log(f"  {scored:,} of {targets:,} targets, {nll / scored:.4f} nats a target")

    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}  # two replicas share the machine

    def start() -> Replica:
        return Replica(command, targets, tokenizer.vocab_size(), block, Sandbox(files, secret=[text]), {**threads, **os.environ})

    judgement = judge(start, tokens, block, cuts, progress)
    sizes = {str(path): path.stat().st_size for path in files if path.is_file()}
    return {
        "verdict": judgement.verdict,
        "val_loss": judgement.nll / targets if judgement.scored == targets else None,
        "val_bpb": judgement.nll / math.log(2) / raw if judgement.scored == targets else None,
        "tokens_scored": judgement.scored,
        "bytes_scored": raw,
        "bytes_readable": sum(sizes.values()),
        "files": {str(path): {"bytes": sizes[str(path)], "sha256": sha256_file(path)} for path in files if path.is_file()},
        "sha256": {"text": sha256_file(text), "tokens": hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()},
        "command": [str(part) for part in command],
        "judgement": dataclasses.asdict(judgement),
        "lines": judgement.lines(),
    }


def report(result: dict, log: Callable[[str], None] = print) -> None:
    for line in result["lines"]:
        log(line)
    if result["val_bpb"] is not None:
        log(f"val_bpb:{result['val_bpb']:.6f} val_loss:{result['val_loss']:.6f} tokens_scored:{result['tokens_scored']:,}")
    log(f"readable by the evaluator: {result['bytes_readable']:,} bytes ({', '.join(Path(name).name for name in result['files'])})")
    seconds = result["judgement"]["seconds"]
    log(f"referee: {result['verdict'].upper()} in {seconds['all']:.1f} s (first block after {seconds.get('start', 0):.1f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parts.referee", description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="raw text: .jsonl of documents, or any UTF-8 file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model of the submission")
    parser.add_argument(
        "--read", type=Path, action="append", default=[], help="a file or folder that the evaluator may read; again for more"
    )
    parser.add_argument("--block", type=int, default=BLOCK, help=f"targets a block ({BLOCK})")
    parser.add_argument("--cuts", type=int, default=1, help="secret cuts a block (1)")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    own, command = sys.argv[1:], []
    if "--" in own:
        own, command = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    if not command:
        raise UserError("after `--` comes the evaluator's command")
    if min(arguments.block, arguments.cuts) < 1:
        raise UserError("--block and --cuts are at least 1")
    result = referee(arguments.text, arguments.tokenizer, arguments.read, command, arguments.block, arguments.cuts)
    report(result)
    if arguments.out:
        write_json(arguments.out, result)
    return 1 if result["verdict"] == FAIL else 0


if __name__ == "__main__":
    cli(main)

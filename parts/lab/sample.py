"""Text from an artifact, token by token: what a model of 16 MB says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data.shards import BOS_ID, load_tokenizer
from parts import packing
from parts.artifact import load_artifact
from parts.files import UserError
from train_gpt import GPT, DecodeState, Kernels, resolve_config, setup_distributed


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """A token of logits [V], drawn from softmax(logits / temperature) over the top_k largest (0: all). Temperature 0 is the largest."""
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


@torch.no_grad()
def generate(model: GPT, prompt: list[int], count: int, temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """At most `count` tokens after `prompt`; ends before the token that begins another document.

    Tokens are drawn on the CPU: a seed gives the same ones on every device, up to the rounding of the logits.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    state = DecodeState(1, len(prompt) + count, device=device)
    ids = torch.tensor([prompt], device=device)
    for _ in range(count):
        logits = model(ids, state=state, score_last=1)[0, -1]
        token = choose(logits.float().cpu(), temperature, top_k, generator)
        if token == BOS_ID:
            return
        yield token
        ids = torch.tensor([[token]], device=device)


def sample(path: Path, prompt: str, count: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and what the artifact (or the artifact of a run's folder) makes of it. Raises UserError."""
    if count < 1 or temperature < 0 or top_k < 0:
        raise UserError("--tokens is at least 1, --temperature and --top-k at least 0")
    path = path / "artifact.bin" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; write it with `python quantize.py runs/<RUN_ID>`")
    header, _ = packing.read_header(path.read_bytes(), str(path))
    ctx = setup_distributed(resolve_config(os.environ, base=header.get("config")).run.device)
    try:
        artifact = load_artifact(path, ctx.device)
        artifact.model.kernels = Kernels()  # a token at a time: nothing to gain from others
        tokenizer = load_tokenizer(artifact.cfg.run.tokenizer_path, artifact.cfg.model.vocab_size)
        ids = [BOS_ID, *tokenizer.encode(prompt)]
        ids += generate(artifact.model, ids, count, temperature, top_k, seed)
    finally:
        ctx.close()
    try:
        return tokenizer.decode(ids[1:])
    except UserError:  # case operators that no text would have
        return tokenizer.transformed.decode(ids[1:])

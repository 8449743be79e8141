"""A model from its artifact: what evaluation needs of quantization.

artifact = load_artifact("runs/<RUN_ID>/artifact.bin", device)      # Artifact(model, cfg, meta, bytes_model)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import shards
from data.shards import load_tokenizer
from parts import packing
from parts.files import UserError
from parts.packing import Record
from train_gpt import GPT, Config, ModelConfig, build_model, load_weights, resolve_config


def dequantize(record: Record) -> Tensor:
    """float32 values of a record: one product a weight, so that every machine gets the same bits."""
    if record.kind == "codes":
        return torch.from_numpy(record.data).float() * torch.from_numpy(record.scales).float()[:, None]
    return torch.from_numpy(record.data).float()


def restore_weights(records: list[Record], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Records -> float32 weights on the CPU, one for each entry of `shapes`. Raises UserError where they do not fit together."""
    left = {record.name: record for record in records}

    def take(name: str) -> Tensor | None:
        record = left.pop(name, None)
        if record is None or record.kind == "bytes":
            return None
        value = dequantize(record)
        correction = [left.pop(f"{name}@lqer_{suffix}", None) for suffix in "ab"]
        if all(correction):
            a, b = map(dequantize, correction)
            if a.dim() != 2 or b.dim() != 2 or len(a) != len(b) or (a.size(1), b.size(1)) != tuple(value.shape):
                raise UserError(f"{name}: its low-rank correction has another shape")
            value = value + a.T @ b
        return value

    weights = {}
    for name, shape in shapes.items():
        value = take(name)
        if value is None:
            rows, top, rest = left.pop(f"{name}@rows", None), take(f"{name}@top"), take(f"{name}@rest")
            if rows is None or rows.kind != "bytes" or top is None or rest is None:
                raise UserError(f"{name} is missing")
            chosen = torch.from_numpy(np.unpackbits(rows.data)).bool()
            count = len(top) + len(rest)
            if not 0 <= len(chosen) - count < 8 or int(chosen.sum()) != len(top) or top.shape[1:] != rest.shape[1:]:
                raise UserError(f"{name}: the parts of its split do not fit together")
            value = torch.empty(count, *top.shape[1:])
            value[chosen[:count]], value[~chosen[:count]] = top, rest
        if tuple(value.shape) != tuple(shape):
            raise UserError(f"{name} is {list(value.shape)} in the file, {list(shape)} in the model")
        weights[name] = value
    if left:
        raise UserError(f"{sorted(left)[0]} belongs to no parameter of this model")
    return weights


@dataclass
class Artifact:
    """A model as its artifact restores it. `meta`: the header's facts (looping, steps, train_seconds, …)."""

    model: GPT
    cfg: Config
    meta: dict
    bytes_model: int


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, without allocating any. Raises UserError for a configuration that makes no model."""
    if len(cfg.pattern) > 1024:
        raise UserError(f"LAYER_PATTERN has {len(cfg.pattern)} layers")
    try:
        with torch.device("meta"):
            return {name: tuple(param.shape) for name, param in GPT(cfg).named_parameters()}
    except (RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"this configuration makes no model: {error}") from None


def artifact_settings(cfg: Config) -> dict:
    """What an artifact says of its configuration: the model, how it is evaluated and on which text, and what evaluation takes over from training:
    the length of a sequence and AdamW's betas."""
    others = ("train_seq_len", "beta1", "beta2", "data_path", "tokenizer_path", "seed")
    return {**cfg.to_dict("model", "eval"), **{name: cfg[name] for name in others}}


def load_artifact(path: str | Path, device: torch.device | str = "cpu", check_tokenizer: bool = True) -> Artifact:
    """Read an artifact, its settings overridden by the environment's (model settings may not differ).

    Raises UserError for a file that is missing, damaged, of a newer version, or of another tokenizer than TOKENIZER_PATH's.
    Parameter shapes are checked against the configuration before anything of their size is allocated.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    header, payload = packing.read_header(data, str(path))
    meta = {key: value for key, value in header.items() if key not in ("tensors", "streams")}
    if not isinstance(meta.get("config"), dict) or not isinstance(meta.get("looping"), bool):
        raise UserError(f"{path}: its header lacks the configuration")
    cfg = resolve_config(os.environ, base=meta["config"])
    try:
        shapes = parameter_shapes(cfg.model)
        packing.check_plan(header.get("tensors"), max_elements=4 * sum(map(math.prod, shapes.values())) + (1 << 20))
        weights = restore_weights(packing.decode_records(header["tensors"], header.get("streams"), payload), shapes)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if check_tokenizer:
        load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size)
        if shards.check_tokenizer(cfg.run.data_path, cfg.run.tokenizer_path) != meta.get("tokenizer_sha256"):
            raise UserError(f"{path} was made with another tokenizer than TOKENIZER_PATH={cfg.run.tokenizer_path}")
    model = build_model(cfg, device)
    load_weights(model, weights)
    model.looping = meta["looping"]
    return Artifact(model.eval(), cfg, meta, len(data))

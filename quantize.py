"""Quantize a trained run, pack it to the byte, bundle it for submission.

    python quantize.py runs/<RUN_ID>                            # -> runs/<RUN_ID>/artifact.bin, quantize.json, quantize.log
    MATRIX_BITS=5 python quantize.py runs/<RUN_ID> --out FOLDER # -> the same there; eval_ttt.py takes the folder
    TARGET_BYTES=16000000 python quantize.py runs/<RUN_ID>      # the smallest loss that fits, code included
    torchrun --standalone --nproc_per_node=8 quantize.py runs/<RUN_ID>
    python quantize.py table runs/<RUN_ID>                      # val_bpb and bytes of float, RTN, GPTQ, int5, mixed plans …
    python quantize.py compare runs/<RUN_ID>/artifact.bin       # the same tensors under every compressor
    python quantize.py bundle runs/<RUN_ID> --out submission/   # a folder that can be handed in, and runs

Every matrix is rounded by GPTQ under the full Hessian of its own inputs, on an SDClip grid whose width is a dial between
bytes and error; scalars, gates and convolutions pass through as float16. Hessians come from training shards alone, by
observers on the one forward of `train_gpt.GPT`, and their time counts as training time. Settings: the "quant" stage of
`python train_gpt.py --print-config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.shards import ByteTable, check_tokenizer, list_shards, load_shard, load_tokenizer, split_digest
from parts import packing
from parts.artifact import artifact_settings, restore_weights
from parts.bundle import RESERVATIONS, bundle
from parts.code import SCRIPT_NAME, code_bytes, code_script
from parts.files import UserError, atomic_write, cli, fault_line, read_json
from parts.packing import Record
from parts.progress import Progress
from parts.runs import artifact_file, free_name, run_folder, set_aside
from train_gpt import (
    GPT,
    LAYER_KINDS,
    SIZE_LIMIT_BYTES,
    CausalAttention,
    Config,
    Linear,
    QuantConfig,
    RunContext,
    TokenStream,
    build_model,
    chosen_settings,
    evaluate,
    load_run,
    load_tokens,
    load_weights,
    model_digest,
    parameter_table,
    resolve_config,
    say_near_misses,
    setup_distributed,
)


# ----------------------------------------------------------------------------------------------------------------------
# Quantization of plain matrices
# ----------------------------------------------------------------------------------------------------------------------
def largest_code(bits: int) -> int:
    """Largest symbol of a symmetric grid: 31 for six bits."""
    return (1 << (bits - 1)) - 1


def row_scales(weight: Tensor, bits: int, clip_sigmas: Tensor | float, mantissa_bits: int = 10) -> Tensor:
    """SDClip: `clip_sigmas · std(row) / largest_code`, rounded to what float16 holds. weight [..., out, in] -> float32 [..., out].

    With `mantissa_bits` < 10 the scale is rounded further: the stored bytes compress, and since symbols are chosen for the rounded
    scale, only the clip moves (by 3 % at most for 4 bits). A row without spread (constant, or a single column) has no standard
    deviation to scale by; its grid ends at its own magnitude, as does that of a row so far off zero that the clip would cut it away. A row of
    zeros gets its matrix's median scale, which packs like the rest (1 where all are zero). Raises UserError where float16 overflows.
    """
    top = largest_code(bits)
    spread = weight.std(dim=-1, unbiased=weight.size(-1) > 1)  # as `train_gpt.FakeQuantize` has it
    magnitude = weight.abs().amax(dim=-1)
    whole = magnitude / top
    scale = torch.where(spread > 1e-6 * magnitude, clip_sigmas * spread / top, whole)
    off_centre = (whole > scale) & (weight.mean(dim=-1).abs() > spread)
    if off_centre.any():
        clipped, kept = ((round_to_grid(weight, grid, bits) * grid[..., None] - weight).square().sum(dim=-1) for grid in (scale, whole))
        scale = torch.where(off_centre & (kept < clipped), whole, scale)
    typical = scale.masked_fill(magnitude == 0, math.nan).nanmedian(dim=-1, keepdim=True).values.nan_to_num(1.0)
    scale = torch.where(magnitude == 0, typical, scale)
    mantissa, exponent = torch.frexp(scale)
    scale = torch.ldexp((mantissa * 2.0 ** (mantissa_bits + 1)).round(), exponent - (mantissa_bits + 1))
    scale = scale.clamp(min=2.0**-24).to(torch.float16)  # below lies zero, and a zero scale loses its row
    if not torch.isfinite(scale).all():
        raise UserError("a row scale overflows float16: the weights are too large to quantize")
    return scale.float()


def round_to_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round to nearest: integer codes as float32. weight [..., out, in], scale [..., out]."""
    top = largest_code(bits)
    return (weight / scale[..., None]).round_().clamp_(-top, top)


def row_errors(delta: Tensor, hessian: Tensor) -> Tensor:
    """Hessian-weighted squared error of each row, `δ H δᵀ`. delta [n, out, in], hessian [n, in, in] -> [n, out]."""
    return ((delta @ hessian) * delta).sum(dim=-1)


def weighted_error(delta: Tensor, hessian: Tensor | None) -> Tensor:
    """tr(δ H δᵀ) of each matrix; H = I if None. delta [n, out, in] -> float64 [n]."""
    rows = delta.square().sum(dim=-1) if hessian is None else row_errors(delta, hessian)
    return rows.double().sum(dim=-1)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse: `(H + λI)⁻¹ = UᵀU`, λ = damp · mean(diag). [n, d, d] -> float32 [n, d, d].

    One factorization and one triangular inverse: with J the reversal of the axes and `JHJ = LLᵀ`, `R = JLJ` is upper
    triangular, `H = RRᵀ`, and so `U = R⁻¹`. In float64, because a 2048-wide Hessian of correlated activations has a condition
    number that float32 does not survive. Where even that fails, λ grows tenfold, from 1e-9 at least: a singular Hessian (equal
    neurons, fewer positions than inputs) has no factor without damping. Raises UserError when nothing helps.
    """
    matrix = hessian.double()
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for damping in (damp, *(max(damp, 1e-9) * 10**attempt for attempt in range(1, 8))):
        damped = matrix + (damping * mean)[:, None, None] * eye
        lower, info = torch.linalg.cholesky_ex(damped.flip(-1, -2))
        if not info.any():
            upper = lower.flip(-1, -2)
            return torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True).float()
    raise UserError("a Hessian is not positive definite, not even heavily damped: are the activations finite?")


@dataclass
class Prepared:
    """What GPTQ needs of a batch of Hessians, whatever the weights: compute once, solve often."""

    hessian: Tensor  # float32 [n, in, in], undamped
    order: Tensor  # int64 [n, in]: columns by descending diagonal ("act-order")
    factor: Tensor  # float32 [n, in, in]: `inverse_factor` in that order
    dead: Tensor  # bool [n, in]: inputs that were always zero

    @staticmethod
    def stack(parts: list[Prepared]) -> Prepared:
        fields = ("hessian", "order", "factor", "dead")
        return Prepared(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def prepare_hessian(hessian: Tensor, damp: float = 0.01) -> Prepared:
    """Order and factorize Hessians [n, in, in]. Raises UserError where they are not finite."""
    if not torch.isfinite(hessian).all():
        raise UserError("a Hessian is not finite: activations overflowed during calibration")
    hessian = hessian.float()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    ordered = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    # A dead input gets the live ones' mean diagonal: a factor exists, and the damping, which looks at the mean, is theirs.
    live = diagonal.clamp(min=0).sum(dim=-1) / (~dead).sum(dim=-1).clamp(min=1)
    filler = dead.gather(1, order) * torch.where(live > 0, live, 1.0)[:, None]
    return Prepared(hessian, order, inverse_factor(ordered + torch.diag_embed(filler), damp), dead)


@dataclass
class Quantized:
    """Matrices as symbols. codes int8 [n, out, in]; scales float32 [n, out], holding float16 values.

    Errors float64 [n]: tr(δ H δᵀ) of the result and of rounding to nearest, and tr(W H Wᵀ) to compare them with (H = I where
    no Hessian is known).
    """

    codes: Tensor
    scales: Tensor
    error: Tensor
    rtn_error: Tensor
    power: Tensor

    def dequantized(self) -> Tensor:
        return self.codes.float() * self.scales[..., None]

    @property
    def relative_error(self) -> Tensor:
        return self.error / self.power.clamp(min=1e-30)

    def split(self) -> list[Quantized]:
        """Each matrix alone, without the batch dimension, on the CPU."""
        fields = [getattr(self, field.name).cpu() for field in dataclasses.fields(self)]
        return [Quantized(*(field[i].clone() for field in fields)) for i in range(len(self.codes))]


def gptq_batch(
    weight: Tensor,
    prepared: Prepared | None,
    bits: int,
    clip_sigmas: Tensor | float,
    *,
    block: int = 128,
    keep: Tensor | None = None,
    mantissa_bits: int = 10,
) -> Quantized:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323) of matrices of one shape at once, on the device they lie on.

    weight [n, out, in]; prepared: of the matrices' Hessians, or None for round to nearest; clip_sigmas: a number or [n];
    keep: bool [n, out, in], False where a weight is pruned. Columns go by descending Hessian diagonal: the inputs that matter most are
    rounded while there is still freedom left to compensate. Columns that never saw an input become zero. A row that rounding
    to nearest happens to serve better (clipped errors can pile up) keeps that rounding: no row ends worse than RTN. Batching is
    what makes this fast: the loop over columns is Python, and each turn serves all n matrices.
    """
    if not torch.isfinite(weight).all():
        raise UserError("weights are not finite: the run diverged, there is nothing to quantize")
    weight = weight.float()
    if not isinstance(clip_sigmas, Tensor):
        clip_sigmas = torch.full((len(weight),), float(clip_sigmas))
    if prepared is not None:
        weight = weight.masked_fill(prepared.dead[:, None, :], 0.0)
    scale = row_scales(weight, bits, clip_sigmas.to(weight)[:, None], mantissa_bits)
    nearest = round_to_grid(weight, scale, bits)
    if keep is not None:
        nearest *= keep
    if prepared is None:
        error = weighted_error(nearest * scale[..., None] - weight, None)
        return Quantized(nearest.to(torch.int8), scale, error, error, weighted_error(weight, None))

    n, out, columns = weight.shape
    hessian, order, factor = prepared.hessian, prepared.order, prepared.factor
    # Columns lie along dim 1 from here on, so that one column of all rows is contiguous.
    work = weight.transpose(1, 2).gather(1, order[:, :, None].expand(n, columns, out)).contiguous()
    kept = None if keep is None else keep.transpose(1, 2).gather(1, order[:, :, None].expand(n, columns, out))
    codes = torch.empty_like(work)
    top = largest_code(bits)
    for start in range(0, columns, block):
        stop = min(columns, start + block)
        local, local_factor = work[:, start:stop], factor[:, start:stop, start:stop]
        errors = torch.empty_like(local)
        for j in range(stop - start):
            column = local[:, j]
            code = (column / scale).round_().clamp_(-top, top)
            if kept is not None:
                code *= kept[:, start + j]
            codes[:, start + j] = code
            error = (column - code * scale) / local_factor[:, j, j, None]
            errors[:, j] = error
            if j + 1 < stop - start:
                local[:, j + 1 :].baddbmm_(local_factor[:, j, j + 1 :, None], error[:, None, :], alpha=-1)
        if stop < columns:
            work[:, stop:].baddbmm_(factor[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
    back = order.argsort(dim=-1)
    codes = codes.gather(1, back[:, :, None].expand_as(codes)).transpose(1, 2)

    rtn = row_errors(nearest * scale[..., None] - weight, hessian)
    ours = row_errors(codes * scale[..., None] - weight, hessian)
    worse = ~(ours <= rtn)
    codes = torch.where(worse[..., None], nearest, codes)
    ours = torch.where(worse, rtn, ours)
    power = weighted_error(weight, hessian)
    return Quantized(codes.to(torch.int8).contiguous(), scale, ours.double().sum(-1), rtn.double().sum(-1), power)


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, block: int = 128, damp: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """`gptq_batch` of one matrix: weight [out, in], hessian [in, in] -> (int8 codes, float16 scales [out], dequantized float32)."""
    solved = gptq_batch(weight[None], prepare_hessian(hessian[None], damp), bits, clip_sigmas, block=block)
    return solved.codes[0], solved.scales[0].half(), solved.dequantized()[0]


def quantize_rtn(weight: Tensor, bits: int, clip_sigmas: float) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest with SDClip; results as `gptq`'s."""
    solved = gptq_batch(weight[None], None, bits, clip_sigmas)
    return solved.codes[0], solved.scales[0].half(), solved.dequantized()[0]


def prune_mask(weight: Tensor, fraction: float) -> Tensor:
    """bool like `weight` [out, in]: False for the `fraction` of smallest magnitude."""
    count = int(fraction * weight.numel())
    keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    if count:
        keep[weight.abs().flatten().argsort(stable=True)[:count]] = False
    return keep.view_as(weight)


# ----------------------------------------------------------------------------------------------------------------------
# Hadamard rotation of values and output projections
# ----------------------------------------------------------------------------------------------------------------------
def hadamard(size: int) -> Tensor:
    """Sylvester's symmetric orthogonal matrix H = Hᵀ = H⁻¹, float64 [size, size]; size a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


@torch.no_grad()
def rotate_values(model: GPT) -> list[str]:
    """Rotate V and O of every attention layer in place; the network's function is unchanged. -> what was skipped, and why.

    v ← R v in each KV head and W_o ← W_o R for the query heads that read it. Rotation spreads outliers over the head, so that a row's
    grid is not stretched by one of them. What lies between commutes with it: attention averages values, XSA projects on v̂
    of the same KV head (lengths and angles are kept), the output gate is a scalar a head, a sink's value is zero. The value embedding
    is added to v, so that its projection turns along, once for all layers that share it.
    """
    skipped, ve_turned = [], False
    for layer, block in enumerate(model.blocks):
        name, mixer = f"blocks.{layer}", block.mixer
        if not isinstance(mixer, CausalAttention):
            skipped.append(f"{name} is {LAYER_KINDS[model.cfg.pattern[layer]]}")
        elif mixer.head_dim & (mixer.head_dim - 1):
            skipped.append(f"{name}: head dim {mixer.head_dim} is no power of two")
    turned = set()
    for module in model.modules():
        if not isinstance(module, CausalAttention) or module.head_dim & (module.head_dim - 1) or module in turned:
            continue
        turned.add(module)  # a mixer shared by several blocks turns once
        rotation = hadamard(module.head_dim).to(module.c_v.weight.device)
        linears = [module.c_v]
        if module.ve_scale is not None and not ve_turned:
            linears.append(model.value_embed.proj)
            ve_turned = True
        for linear in linears:
            heads = linear.weight.double().unflatten(0, (module.kv_heads, module.head_dim))
            linear.weight.copy_(torch.einsum("de,kec->kdc", rotation, heads).flatten(0, 1))
        out = module.proj.weight.double().unflatten(1, (module.heads, module.head_dim))
        module.proj.weight.copy_((out @ rotation).flatten(1))
    return skipped


# ----------------------------------------------------------------------------------------------------------------------
# Calibration: Hessians of every linear layer's inputs, from training tokens
# ----------------------------------------------------------------------------------------------------------------------
CALIBRATION_SEQUENCES = 8  # a batch


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """float32 matrix products on CUDA at "highest" (float32) or "high" (TF32) inside this context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class HessianObserver:
    """Accumulates H = Σ x xᵀ in float32 for each `Linear` (as its observer) and for the tied head (hook on `final_norm`).

    Layers that run several times (depth recurrence, shared weights) add up all their calls. Layers that read the very same tensor one after
    another (q, k and v) share one product. On CUDA the inputs are bfloat16: TF32 holds those exactly and accumulates in float32, so
    that the fast path loses nothing.
    """

    def __init__(self, model: GPT):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self._source = self._gram = None
        self._observed: list[Linear] = []
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                key = f"{name}.weight"
                self._prepare(key, module.weight)
                module.observer = functools.partial(self._add, key)
                self._observed.append(module)
        self._prepare("tok_emb.weight", model.tok_emb.weight)
        self._head = model.final_norm.register_forward_hook(lambda _module, _inputs, output: self._add("tok_emb.weight", output))

    def _prepare(self, key: str, weight: Tensor) -> None:
        self.sums[key] = torch.zeros(weight.size(1), weight.size(1), device=weight.device)
        self.counts[key] = 0.0

    @torch.no_grad()
    def _add(self, key: str, x: Tensor) -> None:
        if x is not self._source:
            flat = x.detach().flatten(0, -2)
            with matmul_precision("high" if flat.dtype != torch.float32 else "highest"):
                flat = flat.float()
                self._gram, self._source = flat.T @ flat, x
        self.sums[key] += self._gram
        self.counts[key] += x.numel() // x.size(-1)

    def close(self) -> None:
        for module in self._observed:
            module.observer = None
        self._head.remove()
        self._source = self._gram = None

    def reduce(self, ctx: RunContext) -> dict[str, Tensor]:
        """Mean x xᵀ over the positions that all ranks saw. A sum over rank 0's alone would calibrate on a fraction of the data."""
        counts = torch.tensor([self.counts[key] for key in self.sums], dtype=torch.float64)
        ctx.all_reduce_sum(counts)
        for total, count in zip(self.sums.values(), counts.tolist()):
            ctx.all_reduce_sum(total)
            total /= max(count, 1.0)
        return self.sums


def calibration_batches(cfg: Config, ctx: RunContext, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of `count` batches, spread evenly over the training shards. Never validation data."""
    stream = TokenStream(cfg.run.data_path, cfg.model.vocab_size, split="train")
    assert all(path.name.startswith("fineweb_train_") for path in stream.paths), "calibration reads training shards only"
    for batch in range(ctx.rank, count, ctx.world_size):
        stream.position = batch * (stream.total_tokens // count)
        yield stream.sequences(0, CALIBRATION_SEQUENCES, cfg.train.train_seq_len, ctx.device)


@torch.no_grad()
def warm_up(model: GPT, cfg: Config, ctx: RunContext) -> None:
    """One calibration batch of random tokens: kernels compile and are tuned outside the clock, as before training."""
    observer = HessianObserver(model)
    tokens = torch.randint(cfg.model.vocab_size, (CALIBRATION_SEQUENCES, cfg.train.train_seq_len + 1), device=ctx.device)
    try:
        model(tokens[:, :-1], tokens[:, 1:])
    finally:
        observer.close()


@torch.no_grad()
def collect_hessians(model: GPT, cfg: Config, ctx: RunContext) -> tuple[dict[str, Tensor], float]:
    """-> (parameter name -> Hessian [in, in], the same on every rank; mean training loss of the calibration batches)."""
    observer = HessianObserver(model)
    losses = torch.zeros(2, dtype=torch.float64, device=ctx.device)
    try:
        with ctx.progress("calibration", cfg.quant.gptq_calibration_batches, "batches") as advance:
            for inputs, targets in calibration_batches(cfg, ctx, cfg.quant.gptq_calibration_batches):
                losses += torch.stack((model(inputs, targets).double(), losses.new_ones(())))
                advance(ctx.world_size)
    finally:
        observer.close()
    hessians = observer.reduce(ctx)
    for prefix in ("bigram", "value_embed"):
        # A lookup table's rows reach the network through its projection P alone: ‖δ Pᵀ‖² = δ (PᵀP) δᵀ.
        module = getattr(model, prefix)
        if module is not None:
            hessians[f"{prefix}.table.weight"] = module.proj.weight.T @ module.proj.weight
    total, batches = ctx.all_reduce_sum(losses).tolist()
    return hessians, total / batches


@torch.no_grad()
def calibration_loss(model: GPT, cfg: Config, ctx: RunContext, batches: int) -> float:
    """Mean training loss over `batches` calibration batches, on this rank alone: what search weighs roles by."""
    alone = RunContext(device=ctx.device)
    losses = [model(inputs, targets).double() for inputs, targets in calibration_batches(cfg, alone, batches)]
    return float(torch.stack(losses).mean())


def token_counts(cfg: Config, limit: int = 200_000_000) -> np.ndarray:
    """How often each id occurs in (the first `limit` tokens of) the training shards. int64 [V]."""
    counts, seen = np.zeros(cfg.model.vocab_size, dtype=np.int64), 0
    for path in list_shards(cfg.run.data_path, "train"):
        shard = load_shard(path, cfg.model.vocab_size)
        counts += np.bincount(shard, minlength=cfg.model.vocab_size)
        seen += len(shard)
        if seen >= limit:
            break
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# Plan: bits and clip of every matrix
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Unit:
    """A matrix, or some rows of one, with the grid that it is rounded to. `bits` 0: passed through as float16."""

    name: str  # of its record: the parameter's, with @top or @rest where the rows are split
    param: str
    role: str
    weight: Tensor  # float32 [out, in]; any shape where bits is 0
    bits: int
    clip_sigmas: float
    keep: Tensor | None = None  # bool [out, in], False where pruned
    quantized: Quantized | None = None  # once solved

    @property
    def step(self) -> float:
        """Grid step in units of the row's standard deviation: what bytes and error really depend on."""
        return self.clip_sigmas / largest_code(self.bits)


def role_settings(role: str, cfg: QuantConfig) -> tuple[int, float]:
    """(bits, clip in sigmas) of a role."""
    if role == "control":
        return 0, 0.0
    if role in ("embed", "hash"):
        return cfg.embed_bits, cfg.embed_clip_sigmas
    special = {"mlp": cfg.mlp_clip_sigmas, "attn": cfg.attn_clip_sigmas}.get(role, 0.0)
    return cfg.matrix_bits, special or cfg.matrix_clip_sigmas


def parse_override(text: str) -> list[tuple[str, int]]:
    """`what:bits,…` of BITS_OVERRIDE. Raises UserError."""
    entries = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        what, colon, bits = part.rpartition(":")
        if not colon or not what or not bits.isdecimal() or not (2 <= int(bits) <= 8 or int(bits) == 16):
            raise UserError(f"BITS_OVERRIDE: {part!r} is not name:bits or role:bits with 2 to 8 bits (or 16: float16)")
        entries.append((what, int(bits)))
    return entries


def _matches(what: str, name: str, role: str) -> bool:
    stem = name.removesuffix(".weight")
    return what in (role, f"{role}.{stem.rpartition('.')[2]}") or any(fnmatch.fnmatchcase(candidate, what) for candidate in (name, stem))


def make_units(model: GPT, cfg: QuantConfig, counts: np.ndarray | None = None) -> tuple[list[Unit], dict[str, np.ndarray]]:
    """-> (units in packing order, parameter name -> bool [out]: rows in its "@top" unit). `counts`: occurrences of each id."""
    overrides, used = parse_override(cfg.bits_override), set()
    units, tops = [], {}
    for spec in parameter_table(model):
        weight = spec.param.detach().float()
        bits, clip = role_settings(spec.role, cfg)
        if spec.param.dim() != 2:
            bits = 0
        for what, wanted in overrides:
            if _matches(what, spec.name, spec.role):
                used.add(what)
                if spec.param.dim() != 2 and wanted != 16:
                    raise UserError(f"BITS_OVERRIDE: {spec.name} is no matrix; only 16 (float16) is possible")
                bits = 0 if wanted == 16 else wanted
                clip = clip or cfg.matrix_clip_sigmas
        if spec.role == "embed" and bits and 0 < cfg.embed_split_top < len(weight):
            assert counts is not None
            top = np.zeros(len(weight), dtype=bool)
            top[np.argsort(-counts, kind="stable")[: cfg.embed_split_top]] = True
            tops[spec.name] = top
            chosen = torch.from_numpy(top).to(weight.device)
            units.append(Unit(f"{spec.name}@top", spec.name, spec.role, weight[chosen], bits, clip))
            units.append(Unit(f"{spec.name}@rest", spec.name, spec.role, weight[~chosen], cfg.embed_split_bits, clip))
        else:
            units.append(Unit(spec.name, spec.name, spec.role, weight, bits, clip))
    if missed := [what for what, _ in overrides if what not in used]:
        raise UserError(f"BITS_OVERRIDE: {missed[0]!r} is neither a role nor matches a parameter's name")
    if cfg.prune_fraction:
        for unit in units:
            if unit.bits and unit.role != "embed":
                unit.keep = prune_mask(unit.weight, cfg.prune_fraction)
    # Alike tensors side by side: the range coder's statistics carry over from one to the next.
    units.sort(key=lambda unit: (unit.role, re.sub(r"\d+", "", unit.name)))  # stable: layers stay in order
    return units, tops


# ----------------------------------------------------------------------------------------------------------------------
# Solving and records
# ----------------------------------------------------------------------------------------------------------------------
MAX_BATCH_ELEMENTS = 1 << 26  # weights a GPTQ batch: bounds its working memory at about 1.5 GB


class Solver:
    """Quantizes units. `prepared` keeps what depends on the Hessians alone: a search pays for it once."""

    def __init__(self, hessians: dict[str, Tensor], cfg: QuantConfig, prepared: dict[str, Prepared]):
        self.cfg, self.prepared = cfg, prepared
        self.hessians = hessians if cfg.quant_method == "gptq" else {}
        self.reference = hessians  # RTN's errors are weighed by the same Hessians

    @torch.no_grad()
    def solve(self, units: list[Unit]) -> list[Unit]:
        """The units with their symbols, where they have bits. Same-shaped ones are solved as one batch."""
        groups: dict[tuple, list[Unit]] = {}
        for unit in units:
            if unit.bits:
                size = max(1, unit.weight.numel())
                key = (tuple(unit.weight.shape), unit.bits, unit.param in self.hessians, unit.keep is None)
                group = groups.setdefault(key, [])
                while len(group) * size >= MAX_BATCH_ELEMENTS:
                    key += (0,)
                    group = groups.setdefault(key, [])
                group.append(unit)
        solved = {}
        weights = sum(unit.weight.numel() for unit in units if unit.bits)
        # "highest": TF32 would round the compensation that GPTQ is about.
        with matmul_precision("highest"), Progress("solving", weights, "weights") as advance:
            for group in groups.values():
                solved |= {unit.name: one for unit, one in zip(group, self._solve_group(group).split())}
                advance(sum(unit.weight.numel() for unit in group))
        return [dataclasses.replace(unit, quantized=solved.get(unit.name)) for unit in units]

    def _solve_group(self, group: list[Unit]) -> Quantized:
        weight = torch.stack([unit.weight for unit in group])
        clip = torch.tensor([unit.clip_sigmas for unit in group])
        mantissa = self.cfg.scale_mantissa_bits
        keep = torch.stack([unit.keep for unit in group]) if group[0].keep is not None else None
        if group[0].param in self.hessians:
            for unit in group:
                if unit.param not in self.prepared:
                    self.prepared[unit.param] = prepare_hessian(self.hessians[unit.param][None], self.cfg.gptq_damp)
            prepared = Prepared.stack([self.prepared[unit.param] for unit in group])
            return gptq_batch(weight, prepared, group[0].bits, clip, block=self.cfg.gptq_block_size, keep=keep, mantissa_bits=mantissa)
        solved = gptq_batch(weight, None, group[0].bits, clip, keep=keep, mantissa_bits=mantissa)
        if group[0].param in self.reference:
            hessian = torch.stack([self.reference[unit.param] for unit in group])
            solved.error = solved.rtn_error = weighted_error(solved.dequantized() - weight, hessian)
            solved.power = weighted_error(weight, hessian)
        return solved


LQER_BITS, LQER_CLIP = 4, 3.0  # near the least squared error of a 4-bit grid for a Gaussian


def error_directions(error: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` output directions that carry most of E H Eᵀ, orthonormal [out, rank], and the share of its trace they carry.

    Subspace iteration from a fixed start: a full SVD of every tensor would take longer than GPTQ itself.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(error), rank, generator=generator).to(error)
    for _ in range(8):
        basis = torch.linalg.qr(error @ (hessian @ (error.T @ basis))).Q
    rows = basis.T @ error
    total = float(((error @ hessian) * error).sum())
    return basis, float(((rows @ hessian) * rows).sum()) / max(total, 1e-30)


def lqer_records(units: list[Unit], hessians: dict[str, Tensor], cfg: QuantConfig) -> list[Record]:
    """Rank-r correction of the error E = W − Q where it is closest to low rank (LQER, Zhang et al. 2024, arXiv:2402.02446).

    LQER weighs E by each input's root mean square; here the full Hessian does. The `lqer_top` units are those from which a rank-r
    product removes most error: rounding errors of well-spread inputs have no low-rank part. The one that stands out is the
    embedding, whose input, the final norm's output, is dominated by a few directions: along them the error biases every logit.
    Left factor: LQER_BITS; right factor: float16, fitted to the rounded left one.
    """
    candidates = []
    for unit in units:
        if unit.bits and unit.param in hessians and unit.quantized.error > 0:
            error = unit.weight - unit.quantized.dequantized().to(unit.weight.device)
            basis, share = error_directions(error, hessians[unit.param], min(cfg.lqer_rank, *error.shape))
            candidates.append((share * float(unit.quantized.error), unit.name, error, basis))
    candidates.sort(key=lambda candidate: -candidate[0])
    records = []
    for _, name, error, basis in candidates[: cfg.lqer_top]:
        # Stored transposed: a scale for each component, not for each row of r numbers.
        codes, scales, left = quantize_rtn(basis.T.contiguous(), LQER_BITS, LQER_CLIP)
        right = torch.linalg.lstsq(left.double() @ left.double().T, left.double() @ error.double()).solution
        records.append(Record(f"{name}@lqer_a", "codes", codes.cpu().numpy(), LQER_BITS, scales.cpu().numpy()))
        records.append(Record(f"{name}@lqer_b", "half", right.half().cpu().numpy()))
    return records


def make_records(units: list[Unit], tops: Mapping[str, np.ndarray], hessians: dict[str, Tensor], cfg: QuantConfig) -> list[Record]:
    """Everything the artifact stores, in packing order. `units`: solved."""
    records = []
    for unit in units:
        if unit.bits:
            codes, scales = unit.quantized.codes.numpy(), unit.quantized.scales.half().numpy()
            records.append(Record(unit.name, "codes", codes, unit.bits, scales))
        else:
            value = unit.weight.half()
            if not torch.isfinite(value).all():
                raise UserError(f"{unit.name} holds values that float16 cannot")
            records.append(Record(unit.name, "half", value.cpu().numpy()))
    for name, top in tops.items():
        records.append(Record(f"{name}@rows", "bytes", np.packbits(top)))
    if cfg.lqer_rank:
        records += lqer_records(units, hessians, cfg)
    return records


# ----------------------------------------------------------------------------------------------------------------------
# Quantizer: a calibrated run, ready to be packed under any plan
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Packed:
    """One way to quantize the run, and what it costs."""

    units: list[Unit]  # solved
    records: list[Record]
    data: bytes  # the artifact

    @functools.cached_property
    def roles(self) -> dict[str, dict]:
        """Per role: weights, widths, clips, relative Hessian-weighted errors, and the entropy of its symbols in bytes."""
        return {
            role: _role_summary([unit for unit in self.units if unit.role == role]) for role in dict.fromkeys(u.role for u in self.units)
        }


def _role_summary(units: list[Unit]) -> dict:
    coded = [unit for unit in units if unit.bits]
    plain = sum(2 * unit.weight.numel() for unit in units if not unit.bits)
    matrices = [unit.quantized for unit in coded]

    def mean_error(name: str) -> float:
        """Of each matrix's relative error: their outputs enter the residual stream on equal terms."""
        return float(np.mean([float(getattr(m, name)) / max(float(m.power), 1e-30) for m in matrices])) if matrices else 0.0

    return {
        "weights": sum(unit.weight.numel() for unit in units),
        "bits": sorted({unit.bits or 16 for unit in units}),
        "clips": sorted({round(unit.clip_sigmas, 2) for unit in coded}),
        "bytes": plain + sum(entropy_bytes(m.codes.numpy()) + 2 * len(m.codes) for m in matrices),
        "error": mean_error("error"),
        "rtn_error": mean_error("rtn_error"),
    }


def entropy_bytes(codes: np.ndarray) -> float:
    """Order-0 entropy of a matrix's symbols, in bytes."""
    counts = np.bincount(codes.ravel().astype(np.int16) + 128)
    counts = counts[counts > 0]
    return float((counts * -np.log2(counts / counts.sum())).sum() / 8) if len(counts) else 0.0


class Quantizer:
    """A trained model with its Hessians. `pack` quantizes it under any settings that leave rotation and calibration as they are.

    Every rank takes part in calibration; solving and packing are rank 0's alone.
    """

    def __init__(self, run_dir: Path, cfg: Config, ctx: RunContext):
        _, weights, meta = load_run(run_dir)
        self.cfg, self.ctx, self.meta = cfg, ctx, {**meta, "model_sha256": model_digest(run_dir)}
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise UserError(f"{name} is not finite: the run diverged, there is nothing to quantize")
        load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size)
        if check_tokenizer(cfg.run.data_path, cfg.run.tokenizer_path) != meta["tokenizer_sha256"]:
            raise UserError(f"{run_dir} was trained with another tokenizer than TOKENIZER_PATH={cfg.run.tokenizer_path}")
        self.model = build_model(cfg, ctx.device)
        load_weights(self.model, weights)
        self.model.looping = bool(meta["looping"])
        self.model.eval()
        self.seconds = {"calibration": 0.0, "solving": 0.0, "packing": 0.0}
        self.skipped_rotations: list[str] = rotate_values(self.model) if cfg.quant.hadamard_vo else []
        self._counts: np.ndarray | None = None
        self.prepared: dict[float, dict[str, Prepared]] = {}  # by damping: solving again under other grids is then cheap

    @contextlib.contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - began

    def calibrate(self) -> None:
        """Hessians. Their time is training time: training data is read."""
        if self.ctx.device.type == "cuda":
            warm_up(self.model, self.cfg, self.ctx)
        with self.clock("calibration"):
            self.hessians, self.float_loss = collect_hessians(self.model, self.cfg, self.ctx)

    def units(self, cfg: Config | None = None) -> tuple[list[Unit], dict[str, np.ndarray]]:
        """`make_units` of the model; `cfg` may differ from the quantizer's in quantization settings."""
        cfg = cfg or self.cfg
        if cfg.quant.embed_split_top and self._counts is None:
            self._counts = token_counts(cfg)
        return make_units(self.model, cfg.quant, self._counts)

    def header(self, cfg: Config) -> dict:
        """What the artifact says of its model. The same for every run of the command: how long it took is quantize.json's."""
        kept = ("looping", "steps", "tokens", "train_seconds", "world_size", "device", "torch")
        ties = ("model_sha256", "tokenizer_sha256", "train_data_sha256", "val_data_sha256")
        return {**{key: self.meta[key] for key in (*kept, *ties) if key in self.meta}, "config": artifact_settings(cfg)}

    def pack(self, units: list[Unit], tops: Mapping[str, np.ndarray], cfg: Config | None = None) -> Packed:
        """Solve and pack. `cfg` may differ from the quantizer's in quantization settings."""
        cfg = cfg or self.cfg
        with self.clock("solving"):
            units = Solver(self.hessians, cfg.quant, self.prepared.setdefault(cfg.quant.gptq_damp, {})).solve(units)
            records = make_records(units, tops, self.hessians, cfg.quant)
        with self.clock("packing"):
            data = packing.pack_artifact(self.header(cfg), records, cfg.quant.compressor)
        return Packed(units, records, data)

    @contextlib.contextmanager
    def weights_replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model holds some other weights inside this context."""
        params = dict(self.model.named_parameters())
        kept = {name: params[name].detach().clone() for name in weights}
        with torch.no_grad():
            try:
                for name, value in weights.items():
                    params[name].copy_(value)
                yield
            finally:
                for name, value in kept.items():
                    params[name].copy_(value)

    def sensitivities(self, packed: Packed, batches: int) -> dict[str, float]:
        """Role -> rise of the training loss (nats) when that role alone is quantized, on `batches` calibration batches."""
        shapes = {name: tuple(param.shape) for name, param in self.model.named_parameters()}
        weights = restore_weights(packed.records, shapes)
        rises = {}
        with self.clock("calibration"):  # reads training data: counts as training time
            base = calibration_loss(self.model, self.cfg, self.ctx, batches)
            for role in sorted({unit.role for unit in packed.units if unit.bits}):
                chosen = {unit.param: weights[unit.param] for unit in packed.units if unit.role == role}
                with self.weights_replaced(chosen):
                    rises[role] = calibration_loss(self.model, self.cfg, self.ctx, batches) - base
        return rises


# ----------------------------------------------------------------------------------------------------------------------
# Search for a target size
# ----------------------------------------------------------------------------------------------------------------------
# A symbol costs about the entropy of a Gaussian rounded with its unit's step; how much more or less each trial tells. At fine steps the
# squared error is proportional to step², so that for a given total Σ c_r x_r² is least under Σ n_r log2 x_r = const at
# x_r² ∝ n_r / c_r, with c_r the loss that role r costs at its default step and n_r its weights.
SEARCH_TRIALS = 12
SEARCH_SENSITIVITY_BATCHES = 8
CLIP_LEAST = 8.0  # below, clipping costs more than the finer grid gains; more bits take over
STEP_MOST = 2.0  # the whole plan's coarsest multiple of its default steps; beyond, single tensors lose a bit
RATIO_LIMITS = (0.6, 1.7)  # of one role's steps against the others'
LANDING = (2_000, 20_000)  # wanted distance below the target: aimed at, tolerated


def with_step(unit: Unit, multiple: float, dropped: int = 0) -> Unit:
    """The unit on a grid `multiple` times as coarse, and twice as coarse again for each bit dropped."""
    bits, clip, least = unit.bits - dropped, unit.clip_sigmas * multiple, min(CLIP_LEAST, unit.clip_sigmas)
    while clip < least and bits < 8:
        clip *= largest_code(bits + 1) / largest_code(bits)
        bits += 1
    return dataclasses.replace(unit, bits=bits, clip_sigmas=max(clip, least), quantized=None)


@functools.lru_cache(1 << 14)
def gaussian_bits(bits: int, clip_sigmas: float) -> float:
    """Entropy, in bits, of a standard Gaussian rounded to the grid of SDClip: what a symbol costs before any trial."""
    top = largest_code(bits)
    edges = (np.arange(-top, top) + 0.5) * (clip_sigmas / top)
    below = np.array([0.0, *(0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges), 1.0])
    mass = np.diff(below)
    mass = mass[mass > 0]
    return float(-(mass * np.log2(mass)).sum())


def balance_roles(rises: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, float]:
    """Step multiples by role that leave the bytes as they are and cost the least loss (see above)."""
    floor = max(1e-6, 0.02 * sum(max(rise, 0.0) for rise in rises.values()))  # measured rises are noisy, and may be negative
    raw = {role: 0.5 * math.log2(weights[role] / max(rise, floor)) for role, rise in rises.items()}
    total = sum(weights[role] for role in raw)
    for _ in range(20):  # clipping moves the mean: recentre what is free
        mean = sum(weights[role] * value for role, value in raw.items()) / total
        low, high = (math.log2(limit) for limit in RATIO_LIMITS)
        raw = {role: min(high, max(low, value - mean)) for role, value in raw.items()}
    return {role: 2.0**value for role, value in raw.items()}


def measured_balance(quantizer: Quantizer, packed: Packed) -> tuple[dict[str, float], dict[str, float]]:
    """-> (rise of the training loss by role, step multiples by role that balance them). Empty where nothing has bits."""
    coded = [unit for unit in packed.units if unit.bits]
    if not coded:
        return {}, {}
    rises = quantizer.sensitivities(packed, min(SEARCH_SENSITIVITY_BATCHES, quantizer.cfg.quant.gptq_calibration_batches))
    return rises, balance_roles(rises, {role: sum(unit.weight.numel() for unit in coded if unit.role == role) for role in rises})


@dataclass
class Trial:
    """A plan that was solved and packed: all steps times 2^level, some bits dropped by unit; its total bytes, its predicted loss rise."""

    level: float
    dropped: dict[str, int]
    total: int
    loss: float
    packed: Packed


class Search:
    """The plan whose artifact plus code lands just under `target` bytes.

    Dials: one multiple of all steps, a ratio by role from measured sensitivities, and bits off the least sensitive tensors where the
    multiple reaches STEP_MOST. A trial is a full solve and pack, so that the bytes are real; the next one is where the Gaussian model,
    moved by what the last trial showed, meets the target. Bounded by SEARCH_TRIALS and `seconds`.
    """

    def __init__(self, quantizer: Quantizer, target: int, seconds: float, log):
        self.quantizer, self.target, self.seconds, self.log = quantizer, target, seconds, log
        self.began, self.code = time.perf_counter(), code_bytes()
        units, self.tops = quantizer.units()
        self.first = quantizer.pack(units, self.tops)
        self.base = self.first.units
        self.coded = [unit for unit in self.base if unit.bits]
        self.rises, self.ratios = measured_balance(quantizer, self.first)
        steps = [CLIP_LEAST / largest_code(8) / unit.step / self.ratios[unit.role] for unit in self.coded]
        self.finest, self.coarsest = min([0.0, *map(math.log2, steps)]), math.log2(STEP_MOST)
        self.dropped: dict[str, int] = {}
        self.trials: list[Trial] = []
        self.surplus = len(self.first.data) + self.code - self.modelled(self.coded)  # bytes over the model's, at the latest trial
        self.note = ""

    def run(self) -> tuple[Packed, dict]:
        """-> (the best plan that fits, report). Raises UserError where none does."""
        for name, values, form in (("training loss rises by role", self.rises, "+.5f"), ("step ratios", self.ratios, ".2f")):
            self.log(f"search: {name} " + " ".join(f"{role} {value:{form}}" for role, value in values.items()))
        level = self.propose()
        while level is not None:
            trial = self.attempt(level)
            level = None if self.landed(trial) or self.out_of_time() else self.propose()
        if not self.fitting():
            least = min(trial.total for trial in self.trials)
            raise UserError(f"TARGET_BYTES={self.target}: the smallest plan takes {least} bytes, {self.code} of them code")
        best = min(self.fitting(), key=lambda trial: (trial.loss, -trial.total))
        return best.packed, self.report(best)

    def plan(self, level: float, units: list[Unit] | None = None) -> list[Unit]:
        """Units with all steps times 2^level, bits dropped as decided."""
        units = self.base if units is None else units
        return [with_step(u, 2.0**level * self.ratios[u.role], self.dropped.get(u.name, 0)) if u.bits else u for u in units]

    @staticmethod
    def modelled(units: list[Unit]) -> float:
        return sum(unit.weight.numel() * gaussian_bits(unit.bits, unit.clip_sigmas) for unit in units) / 8

    def predicted(self, level: float) -> float:
        """Total bytes at a level."""
        return self.surplus + self.modelled(self.plan(level, self.coded))

    def attempt(self, level: float) -> Trial:
        packed = self.quantizer.pack(self.plan(level), self.tops)
        total = len(packed.data) + self.code
        trial = Trial(level, dict(self.dropped), total, self.loss_of(packed), packed)
        self.trials.append(trial)
        self.surplus += total - self.predicted(level)
        self.log(
            f"search: step x{2.0**level:.4f}, {sum(self.dropped.values())} bits dropped -> {total:,} bytes ({total - self.target:+,} of target), "
            f"predicted loss {trial.loss:+.5f}"
        )
        return trial

    def loss_of(self, packed: Packed) -> float:
        """Predicted rise of the loss: each role's, scaled by how its weighted error changed."""
        before, after = self.first.roles, packed.roles
        return sum(max(rise, 0.0) * after[role]["error"] / max(before[role]["error"], 1e-30) for role, rise in self.rises.items())

    def fitting(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.total <= self.target]

    def landed(self, trial: Trial) -> bool:
        tolerated = LANDING[1] if len(self.trials) > 5 else 3 * LANDING[0]
        return self.target - tolerated <= trial.total <= self.target

    def out_of_time(self) -> bool:
        return len(self.trials) >= SEARCH_TRIALS or (time.perf_counter() - self.began > self.seconds and bool(self.fitting()))

    def propose(self) -> float | None:
        """The level to try next, after dropping the bits that it takes; None where there is nothing left to try."""
        if self.trials and not self.coded:
            self.note = "no tensor has bits: there is nothing to search"
            return None
        aim = self.target - LANDING[0]
        exhausted = any(trial.dropped == self.dropped and trial.level > self.coarsest - 1e-3 for trial in self.trials)
        doubt = 0.0 if exhausted else 0.02 * self.modelled(self.plan(self.coarsest, self.coded))  # a trial tells before bits go
        while self.predicted(self.coarsest) > aim + doubt and self.drop_bit():
            pass
        level = self.solve_level(aim)
        same = [trial for trial in self.trials if trial.dropped == self.dropped]
        over = max((trial for trial in same if trial.total > self.target), key=lambda trial: trial.level, default=None)
        under = min((trial for trial in same if trial.total <= self.target), key=lambda trial: trial.level, default=None)
        if over and under and not over.level < level < under.level:
            share = (over.total - aim) / max(over.total - under.total, 1)
            level = over.level + (under.level - over.level) * min(0.95, max(0.05, share))
        if under and under.level <= self.finest:
            self.note = f"even the finest grid (8 bits, k={CLIP_LEAST:g}) leaves {self.target - under.total:,} bytes unused"
            return None
        return None if any(abs(trial.level - level) < 1e-4 for trial in same) else level

    def solve_level(self, aim: float) -> float:
        """The level whose predicted bytes are `aim`, between the finest and the coarsest."""
        low, high = self.finest, self.coarsest
        if self.predicted(low) <= aim:
            return low
        if self.predicted(high) >= aim:
            return high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predicted(middle) > aim else (low, middle)
        return high

    def drop_bit(self) -> bool:
        """Take a bit from the unit whose error grows least a byte saved, at the coarsest steps. False: nothing left to take."""
        best = None
        for unit in self.coded:
            (now,) = self.plan(self.coarsest, [unit])
            if now.bits > 2:
                count = self.dropped.get(unit.name, 0)
                after = with_step(unit, 2.0**self.coarsest * self.ratios[unit.role], count + 1)
                saved = self.modelled([now]) - self.modelled([after])
                price = float(unit.quantized.relative_error) * 4.0**count / max(saved, 1e-9)  # half the step's bits quadruple each alike
                if best is None or price < best[0]:
                    best = (price, unit.name)
        if best:
            self.dropped[best[1]] = self.dropped.get(best[1], 0) + 1
        return best is not None

    def report(self, best: Trial) -> dict:
        """What quantize.json holds of it."""
        if self.target - best.total > LANDING[1] and not self.note:
            self.note = f"stopped {self.target - best.total:,} bytes short of the target after {len(self.trials)} trials"
        before, after = self.first.roles, best.packed.roles
        return {
            "target": self.target,
            "total": best.total,
            "step_multiple": 2.0**best.level,
            "role_ratios": self.ratios,
            "loss_rise_by_role": self.rises,
            "bits_dropped": best.dropped,
            "weighted_error": {role: [before[role]["error"], after[role]["error"]] for role in self.rises},
            "predicted_loss_rise": [sum(max(rise, 0.0) for rise in self.rises.values()), best.loss],
            "trials": [
                {
                    "step_multiple": 2.0**trial.level,
                    "bits_dropped": sum(trial.dropped.values()),
                    "total": trial.total,
                    "predicted": trial.loss,
                }
                for trial in self.trials
            ],
            "seconds": time.perf_counter() - self.began,
            "note": self.note,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------------------
def role_table(roles: Mapping[str, dict]) -> list[str]:
    """Lines of the table that `python quantize.py` prints."""
    lines = [f"{'role':<9}{'weights':>12}  {'bits':<7}{'k (sigmas)':<16}{'error GPTQ':>11}{'RTN':>11}{'ratio':>8}{'~bytes':>12}"]
    for name, role in sorted(roles.items()):
        clips = ", ".join(f"{clip:g}" for clip in (role["clips"] if len(role["clips"]) < 3 else [role["clips"][0], role["clips"][-1]]))
        bits = "/".join(map(str, role["bits"]))
        line = f"{name:<9}{role['weights']:>12,}  {bits:<7}{clips:<16}"
        if role["rtn_error"]:
            line += f"{role['error']:>11.3e}{role['rtn_error']:>11.3e}{role['error'] / role['rtn_error']:>8.2f}"
        else:
            line += f"{'float16':>11}{'':>19}"
        lines.append(line + f"{role['bytes']:>12,.0f}")
    return lines


def compare_command(path: Path) -> dict[str, dict]:
    """`python quantize.py compare`: bytes of the symbols and of everything, seconds to pack and to unpack an artifact under each compressor."""
    header, records, _ = packing.read_artifact(path)
    print(f"{'compressor':<12}{'symbols':>12}{'vs brotli':>11}{'artifact':>12}{'pack s':>9}{'unpack s':>10}")
    result = {}
    for name in packing.COMPRESSORS:
        began = time.perf_counter()
        data = packing.pack_artifact(header, records, name)
        packed = time.perf_counter()
        loaded, _ = packing.unpack_artifact(data)
        unpacked = time.perf_counter()
        symbols = sum(stream["packed"] for stream in loaded["streams"] if stream["name"].startswith("codes"))
        result[name] = {"symbols": symbols, "total": len(data), "pack_seconds": packed - began, "unpack_seconds": unpacked - packed}
        change = f"{100 * (symbols / result['brotli']['symbols'] - 1):+.2f} %" if symbols else "-"
        print(f"{name:<12}{symbols:>12,}{change:>11}{len(data):>12,}{packed - began:>9.2f}{unpacked - packed:>10.2f}", flush=True)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------
def open_run(run_dir: Path, out: Path | None = None) -> Config:
    """The run's settings under the environment's. Refused where the results could not be written (to `out`, else to the run's folder): that
    is known before the work."""
    config, _, _ = load_run(run_dir)
    out = out or run_dir
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"{out} cannot be written")
    return resolve_config(os.environ, base=config)


def new_log(path: Path, cfg: Config, ctx: RunContext) -> None:
    """Everything that is reported goes to `path` as well, beginning with the settings that are not the run's."""
    if ctx.is_main:
        path.unlink(missing_ok=True)
    ctx.open_logs(path)
    for line in chosen_settings(cfg, known=("default", "run")):
        ctx.log(line)


PATIENCE = 900.0  # seconds of search in which ranks that only wait for it do not run into the collectives' limit of 20 minutes


def quantize_command(run_dir: Path, search_seconds: float, out: Path | None = None) -> None:
    """`python quantize.py runs/<RUN_ID>`: artifact.bin, evaluate.py, quantize.json and quantize.log in `out`, or the run's folder."""
    out = out or run_dir
    cfg = open_run(run_dir, out)
    ctx = setup_distributed(cfg.run.device, cfg.run.cache_dir)
    try:
        if ctx.world_size > 1 and search_seconds > PATIENCE:
            raise UserError(
                f"--search-seconds {search_seconds:g}: the other ranks wait for no more than {PATIENCE:g}; search in one process"
            )
        quantizer = Quantizer(run_dir, cfg, ctx)  # refuses what is at fault before a file is written
        new_log(out / "quantize.log", cfg, ctx)
        if (cfg.train.late_qat_threshold or cfg.train.qat_last_frac) and cfg.train.qat_bits != cfg.quant.matrix_bits:
            ctx.log(f"warning: the run was trained for {cfg.train.qat_bits} bits (QAT_BITS), MATRIX_BITS={cfg.quant.matrix_bits}")
        trained_on, here = quantizer.meta.get("train_data_sha256"), split_digest(cfg.run.data_path, "train")
        if trained_on not in (None, here):
            ctx.log(f"warning: calibrates on other training shards (SHA-256 {here[:12]}…) than the run was trained on ({trained_on[:12]}…)")
        for reason in quantizer.skipped_rotations:
            ctx.log(f"hadamard: skipped, {reason}")
        quantizer.calibrate()
        if ctx.is_main:
            write_quantized(quantizer, out, search_seconds)
        ctx.barrier()  # nobody leaves before the artifact is there
    except (UserError, OSError) as error:
        ctx.note(f"error: {fault_line(error)}")
        raise
    finally:
        ctx.close()


def write_quantized(quantizer: Quantizer, out: Path, search_seconds: float) -> dict:
    """Pack (searching, if TARGET_BYTES says so), write, report. -> what quantize.json holds."""
    cfg, ctx = quantizer.cfg, quantizer.ctx
    positions = cfg.quant.gptq_calibration_batches * CALIBRATION_SEQUENCES * cfg.train.train_seq_len
    ctx.log(f"calibration: {positions:,} training tokens, loss {quantizer.float_loss:.4f}, {quantizer.seconds['calibration']:.1f}s")
    search = None
    if cfg.quant.target_bytes:
        packed, search = Search(quantizer, cfg.quant.target_bytes, search_seconds, ctx.log).run()
    else:
        packed = quantizer.pack(*quantizer.units())
    with atomic_write(out / SCRIPT_NAME) as temporary:
        temporary.write_bytes(code_script())
    score = out / "eval.json"
    if score.exists() and (read_json(score) or {}).get("sha256", {}).get("artifact") != hashlib.sha256(packed.data).hexdigest():
        kept = free_name(score)
        set_aside(score, kept)
        ctx.log(f"eval.json was the score of what stood here before: kept as {kept.name}")
    with atomic_write(out / "artifact.bin") as temporary:
        temporary.write_bytes(packed.data)
    model_bytes = (out / "artifact.bin").stat().st_size
    script_bytes = (out / SCRIPT_NAME).stat().st_size
    total = model_bytes + script_bytes
    seconds = quantizer.seconds
    train_seconds = round(quantizer.meta["train_seconds"] + seconds["calibration"], 3)
    report = {
        "artifact": str(out / "artifact.bin"),
        "artifact_sha256": hashlib.sha256(packed.data).hexdigest(),
        "bytes_model": model_bytes,
        "bytes_code": script_bytes,
        "bytes_code_training": code_bytes("train_gpt"),
        "bytes_total": total,
        "bytes_limit": SIZE_LIMIT_BYTES,
        "method": cfg.quant.quant_method,
        "compressor": cfg.quant.compressor,
        "calibration_loss": quantizer.float_loss,
        "calibration_tokens": positions,
        "train_seconds": quantizer.meta["train_seconds"],
        "train_seconds_with_calibration": train_seconds,
        "seconds": seconds,
        "roles": packed.roles,
        "units": [
            {"name": u.name, "role": u.role, "bits": u.bits or 16, "clip_sigmas": u.clip_sigmas, "shape": list(u.weight.shape)}
            for u in packed.units
        ],
        "search": search,
    }
    for line in role_table(packed.roles):
        ctx.log(line)
    if search:
        for line in search_lines(search):
            ctx.log(line)
    ctx.log(f"seconds: calibration {seconds['calibration']:.1f}, solving {seconds['solving']:.1f}, packing {seconds['packing']:.1f}")
    budget = f" of MAX_WALLCLOCK_SECONDS={cfg.train.max_wallclock_seconds:g}" if cfg.train.max_wallclock_seconds else ""
    late = " - OVER BUDGET" if 0 < cfg.train.max_wallclock_seconds < train_seconds else ""
    ctx.log(
        f"training {quantizer.meta['train_seconds']:.1f}s + calibration {seconds['calibration']:.1f}s = {train_seconds:.1f}s{budget}{late}"
    )
    verdict = f"{SIZE_LIMIT_BYTES - total:,} to spare" if total <= SIZE_LIMIT_BYTES else f"{total - SIZE_LIMIT_BYTES:,} TOO MANY"
    ctx.log(f"bytes: model {model_bytes:,} + code {script_bytes:,} = {total:,} of {SIZE_LIMIT_BYTES:,} ({verdict})")
    ctx.log(f"wrote {out / 'artifact.bin'}; next: python eval_ttt.py {out} --audit")
    with atomic_write(out / "quantize.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    return report


def search_lines(search: dict) -> list[str]:
    """What the search did, for people."""
    lines = [f"search: {len(search['trials'])} trials, {search['seconds']:.0f}s: all steps x{search['step_multiple']:.3f}, by role "]
    lines[0] += ", ".join(f"{role} x{ratio:.2f}" for role, ratio in search["role_ratios"].items())
    if search["bits_dropped"]:
        lines.append("search: bits taken from " + ", ".join(f"{name} -{n}" for name, n in search["bits_dropped"].items()))
    for role, (before, after) in search["weighted_error"].items():
        lines.append(f"search: {role} Hessian-weighted error {before:.3e} -> {after:.3e}")
    before, after = search["predicted_loss_rise"]
    lines.append(f"search: predicted rise of the loss {before:.5f} -> {after:.5f} nats; total {search['total']:,} of {search['target']:,}")
    return lines + ([f"search: {search['note']}"] if search["note"] else [])


@dataclass(frozen=True)
class Variant:
    """A line of `python quantize.py table`: settings over the run's, or another line's bytes spent on finer or coarser steps."""

    name: str
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    bytes_of: str = ""  # scale all steps until the artifact is as large as that line's
    balanced: bool = False  # … with role ratios from measured sensitivities


VARIANTS = (
    Variant("gptq6"),
    Variant("rtn6", {"quant_method": "rtn"}),
    Variant("rtn6-bytes", {"quant_method": "rtn"}, bytes_of="gptq6"),
    Variant("balanced", bytes_of="gptq6", balanced=True),
    Variant("gptq5", {"matrix_bits": 5}),
    Variant("gptq7", {"matrix_bits": 7}),
    Variant("embed7", {"embed_bits": 7}),
    Variant("mixed", {"bits_override": "attn.proj:7", "embed_split_top": -2, "embed_split_bits": 7}),
    Variant("prune5", {"prune_fraction": 0.05}),
    Variant("lqer1", {"lqer_rank": 1, "lqer_top": 1}),
    Variant("lqer4", {"lqer_rank": 4, "lqer_top": 3}),
    Variant("lqer4-as-k", bytes_of="lqer4"),
    Variant("damp.001", {"gptq_damp": 0.001}),
    Variant("damp.03", {"gptq_damp": 0.03}, bytes_of="gptq6"),
    Variant("damp.1", {"gptq_damp": 0.1}, bytes_of="gptq6"),
    Variant("hadamard", {"hadamard_vo": True}),
)


def fit_bytes(quantizer: Quantizer, cfg: Config, target: int, balanced: bool) -> Packed:
    """Scale all steps until the artifact is within 0.05 % of `target` bytes."""
    units, tops = quantizer.units(cfg)
    coded = [unit for unit in units if unit.bits]
    ratios = measured_balance(quantizer, quantizer.pack(units, tops, cfg))[1] if balanced else {unit.role: 1.0 for unit in coded}
    slope, level = sum(unit.weight.numel() for unit in coded) / 8, 0.0  # an octave of the step: a bit a symbol
    for _ in range(5):
        scaled = [with_step(unit, 2.0**level * ratios[unit.role]) if unit.bits else unit for unit in units]
        packed = quantizer.pack(scaled, tops, cfg)
        if abs(len(packed.data) - target) < 5e-4 * target:
            break
        level += (len(packed.data) - target) / slope
    return packed


class Table:
    """`python quantize.py table`: bytes and val_bpb of a run under each variant. One process."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.cfg = run_dir, open_run(run_dir)
        self.ctx = setup_distributed(self.cfg.run.device, self.cfg.run.cache_dir)
        if self.ctx.world_size > 1:
            raise UserError("the table is made by one process: run it without torchrun")
        new_log(run_dir / "quantization_table.log", self.cfg, self.ctx)
        cfg = self.cfg
        self.tokens = load_tokens(cfg.run.data_path, "val", cfg.model.vocab_size, cfg.train.val_tokens)
        self.byte_table = ByteTable.for_validation(load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size), cfg.run.data_path)
        self.quantizers: dict[bool, Quantizer] = {}
        self.sizes: dict[str, int] = {}
        self.float_bpb = self.bpb(self.quantizer(cfg), {})

    def quantizer(self, cfg: Config) -> Quantizer:
        """Rotation changes weights and Hessians: each kind is calibrated once."""
        rotated = cfg.quant.hadamard_vo
        if rotated not in self.quantizers:
            self.quantizers[rotated] = Quantizer(self.run_dir, self.cfg.replace(hadamard_vo=rotated), self.ctx)
            self.quantizers[rotated].calibrate()
        return self.quantizers[rotated]

    def bpb(self, quantizer: Quantizer, weights: Mapping[str, Tensor]) -> float:
        cfg, length = self.cfg, self.cfg.train.train_seq_len
        with quantizer.weights_replaced(weights):
            return evaluate(quantizer.model, self.tokens, self.byte_table, cfg.eval, self.ctx, length, length).val_bpb

    def settings_of(self, variant: Variant) -> dict:
        settings = dict(variant.settings)
        if settings.get("embed_split_top", 0) < 0:  # a fraction of the vocabulary
            settings["embed_split_top"] = self.cfg.model.vocab_size // -settings["embed_split_top"]
        return settings

    def row(self, variant: Variant) -> dict:
        """A line of the table. What it compares its bytes with has been measured before."""
        cfg = self.cfg.replace(**self.settings_of(variant))
        quantizer = self.quantizer(cfg)
        before = dict(quantizer.seconds)
        if variant.bytes_of:
            packed = fit_bytes(quantizer, cfg, self.sizes[variant.bytes_of], variant.balanced)
        else:
            packed = quantizer.pack(*quantizer.units(cfg), cfg)
        self.sizes[variant.name] = len(packed.data)
        shapes = {name: tuple(param.shape) for name, param in quantizer.model.named_parameters()}
        score = self.bpb(quantizer, restore_weights(packed.records, shapes))
        return {
            "variant": variant.name,
            "settings": self.settings_of(variant),
            "bytes_of": variant.bytes_of,
            "val_bpb": score,
            "rise": score - self.float_bpb,
            "bytes": len(packed.data),
            "bytes_range": len(packing.pack_artifact(quantizer.header(cfg), packed.records, "range")),
            "roles": packed.roles,
            "seconds": {phase: quantizer.seconds[phase] - before[phase] for phase in before},
        }

    def line(self, row: dict) -> str:
        roles, seconds = [role for role in row["roles"].values() if role["error"]], row["seconds"]
        error = sum(role["error"] * role["weights"] for role in roles) / max(sum(role["weights"] for role in roles), 1)
        return (
            f"{row['variant']:<12}{row['val_bpb']:>9.4f}{row['rise']:>+10.4f}{row['bytes']:>15,}{row['bytes_range']:>13,}{error:>11.3e}"
            f"{seconds['solving']:>9.1f}{seconds['packing']:>8.1f}"
        )

    def run(self, names: list[str]) -> dict:
        """-> what quantization_table.json holds. names: the variants wanted, all if empty."""
        log, compressor = self.ctx.log, self.cfg.quant.compressor
        columns = f"{'vs float':>10}{'bytes ' + compressor:>15}{'bytes range':>13}{'error':>11}{'solve s':>9}{'pack s':>8}"
        log(f"{'variant':<12}{'val_bpb':>9}{columns}\n{'float':<12}{self.float_bpb:>9.4f}")
        rows = [{"variant": "float", "val_bpb": self.float_bpb}]
        wanted = {name for variant in VARIANTS if not names or variant.name in names for name in (variant.name, variant.bytes_of)}
        for variant in VARIANTS:
            if variant.name in wanted:
                rows.append(self.row(variant))
                log(self.line(rows[-1]))
        calibration = self.quantizer(self.cfg).seconds["calibration"]
        log(
            f"calibration {calibration:.1f}s; {len(self.tokens):,} validation tokens, windows of {self.cfg.train.train_seq_len} "
            "without overlap"
        )
        return {"rows": rows, "seconds": {"calibration": calibration}, "tokens": len(self.tokens), "compressor": compressor}


def table_command(run_dir: Path, names: list[str]) -> None:
    """`python quantize.py table` -> quantization_table.json."""
    known = [variant.name for variant in VARIANTS]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown variant {unknown[0]!r}; known: {', '.join(known)}")
    result = Table(run_dir).run(names)
    with atomic_write(run_dir / "quantization_table.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))


USAGE = """quantize.py [-h] runs/<RUN_ID> [--out FOLDER] [--search-seconds S]
       quantize.py table runs/<RUN_ID> [--variants a,b,...]
       quantize.py compare runs/<RUN_ID>|ARTIFACT
       quantize.py bundle runs/<RUN_ID> --out FOLDER [--author A] [--github-id G] [--name N] [--track T] [--despite R]"""


def main() -> int:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see python quantize.py --help)")

    say_near_misses(os.environ)
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and arguments[0] in ("table", "compare", "bundle") else "quantize"
    parser = Parser(usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="an artifact" if command == "compare" else "folder of a finished run")
    if command == "quantize":
        parser.add_argument("--out", type=Path, help="folder for artifact.bin, evaluate.py, quantize.json and quantize.log (the run's)")
        parser.add_argument("--search-seconds", type=float, default=300.0, help="time limit of the TARGET_BYTES search")
    elif command == "table":
        parser.add_argument("--variants", default="", help=f"comma-separated choice of {', '.join(v.name for v in VARIANTS)}")
    elif command == "bundle":
        parser.add_argument("--out", type=Path, required=True, help="the submission's folder")
        for option in ("--author", "--github-id", "--name"):
            parser.add_argument(option, default="")
        parser.add_argument("--track", default="10min_16mb")
        despite = "hand in a score that is refused for this, and say so in submission.json (may be repeated)"
        parser.add_argument("--despite", action="append", default=[], choices=RESERVATIONS, help=despite)
    options = parser.parse_args(arguments)
    run = run_folder(options.run)
    if command == "quantize":
        quantize_command(run, options.search_seconds, options.out)
    elif command == "table":
        table_command(run, [name for name in options.variants.split(",") if name])
    elif command == "compare":
        compare_command(artifact_file(options.run))
    else:
        about = {"author": options.author, "github_id": options.github_id, "name": options.name, "track": options.track}
        bundle(run, options.out, options.despite, **about)
    return 0


if __name__ == "__main__":
    cli(main)

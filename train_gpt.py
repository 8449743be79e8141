"""Train a tiny language model for the 16 MB challenge: code + compressed weights ≤ 16,000,000 bytes, scored in bits per byte.

    python train_gpt.py                                            one device (CUDA if present, else CPU)
    torchrun --standalone --nproc_per_node=8 train_gpt.py          one node of 8 GPUs
    PRESET=gdn_hybrid torchrun ... train_gpt.py                    one of the systems under records/
    PRESET=gdn_hybrid/one_gpu MUON_WD=0 python train_gpt.py        a preset's smaller budget, with one ablation
    python train_gpt.py --print-config [FILTER]                    every setting, its value, origin, meaning and limits
    python train_gpt.py --describe                                 layers, parameters and size estimate, without training
    PRESET=gdn_hybrid python train_gpt.py --bench                  tokens/s, MFU, memory and time by part, on random tokens

Every hyperparameter is an environment variable, declared once in `Config` below. The run writes runs/<RUN_ID>/ (train.log,
metrics.jsonl, config.json, model.safetensors, checkpoints/). Next: `python quantize.py runs/<RUN_ID>`, then `python eval_ttt.py
runs/<RUN_ID>/artifact.bin`.

The file reads top to bottom: configuration, run context, data, byte accounting, ops (each beside its naive twin), mixers, block and
model, parameter table and optimizers, schedules, evaluation, checkpoints, main. quantize.py and eval_ttt.py import from it; it
imports neither. Importing it has no side effects: no CUDA, no process group, no environment read before `main()`.

Shapes in comments: B batch, T time, H heads, D head dim, C channels, V vocabulary.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import textwrap
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.shards import (
    BOS_ID,
    SHARD_HEADER_BYTES,
    ByteTable,
    check_tokenizer,
    check_vocabulary,
    list_shards,
    load_shard,
    load_tokenizer,
    split_digest,
    unread_files,
)
from parts import kernels
from parts.files import UserError, atomic_write, cli, fault_line, flush_stdout, lost_rank, machine_fault, one_line, read_json, write_json
from parts.progress import Progress, duration, quantity
from parts.runs import LogFile, Stopped, StopSignal, end_with_parent, print_line, run_lock, start_mirrors
from parts.sandbox import COMPILERS

SIZE_LIMIT_BYTES = 16_000_000  # the challenge's cap: decimal megabytes, code included
Result = TypeVar("Result")


# ----------------------------------------------------------------------------------------------------------------------
# Configuration: the one table of settings, and the one place that reads the environment
# ----------------------------------------------------------------------------------------------------------------------


def setting(default, help: str, low=None, high=None, choices=None, several=None):
    """Declare one setting: its limits, the `choices` it has, or the words of which its comma-separated list may hold `several`."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "several": several})


class Part:
    """A part of the configuration: a frozen dataclass of settings."""

    def faults(self) -> Iterator[str]:
        """What single ranges cannot say, a line a broken rule. Later rules may rely on earlier ones: only the first line counts."""
        yield from ()


@dataclass(frozen=True)
class RunConfig(Part):
    """Where a run reads and writes, and what computes it."""

    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin shards")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of those shards")
    runs_dir: str = setting("./runs", "where runs/<RUN_ID>/ folders go")
    run_id: str = setting("", "name of the run's folder; empty: made from preset, date and a random suffix")
    device: str = setting("auto", "auto: CUDA if present", choices=("auto", "cpu", "cuda"))
    compile: str = setting(
        "auto",
        "blocks: one graph a kind of block; whole: the forward as one graph (minutes); 0: eager; auto: blocks on CUDA",
        choices=("auto", "0", "whole", "blocks"),
    )
    seed: int = setting(1337, "seed of the initial weights and of every random draw", low=0, high=2**63 - 1)
    resume: bool = setting(False, "continue RUN_ID from its last checkpoint")
    attention_backend: str = setting("auto", "attention kernel", choices=("auto", "fa4", "fa3", "fa2", "cudnn", "flash", "flex", "plain"))
    cuda_graphs: bool = setting(
        True, "replay training's micro-batches, where they are compiled, and an evaluation's small batches as CUDA graphs"
    )
    fused_kernels: str = setting(
        "auto", "Triton kernels of parts/kernels.py: 0 plain, 1 required, auto where they run", choices=("auto", "0", "1")
    )
    cache_dir: str = setting("", "folder that keeps compiled kernels for the next start; empty: where each compiler keeps them")
    mirror: str = setting("", "also show metrics.jsonl there, live (parts/lab/mirror.py)", several=("tensorboard", "wandb"))
    gdn_backend: str = setting("auto", "auto: flash-linear-attention on CUDA, chunked PyTorch elsewhere", choices=("auto", "fla", "torch"))

    def faults(self) -> Iterator[str]:
        if self.run_id and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", self.run_id):
            yield f"RUN_ID={self.run_id!r} is not a plain folder name (letters, digits, dot, dash, underscore)"


# One letter a layer in LAYER_PATTERN; the class of each is in MIXERS.
LAYER_KINDS = {"A": "attention", "S": "sliding window", "G": "GDN", "T": "token shift"}
ATTENTION_KINDS = "AS"


@dataclass(frozen=True)
class ModelConfig(Part):
    """What the weights are weights of. A finished run fixes every one of these."""

    # --- shape
    vocab_size: int = setting(1024, "tokenizer's vocabulary", low=8, high=65536)
    layer_pattern: str = setting("", "one mixer letter a layer (A attention, S sliding window, G GDN, T token shift); empty: all A")
    num_layers: int = setting(0, "layers; 0: the length of LAYER_PATTERN, or 9", low=0, high=256)
    model_dim: int = setting(512, "width of the residual stream", low=8)
    num_heads: int = setting(8, "query heads", low=1)
    num_kv_heads: int = setting(4, "key/value heads (GQA)", low=1)
    mlp_mult: float = setting(2.0, "MLP hidden width / MODEL_DIM", low=0.1, high=16)
    mlp_act: str = setting("leaky_relu2", "squared activation of the MLP", choices=("leaky_relu2", "relu2", "silu2"))
    tied_embed_init_std: float = setting(0.005, "std of the tied embedding at init", low=0)
    logit_softcap: float = setting(30.0, "c in c*tanh(z/c)", low=1e-3)
    ln_scale: bool = setting(True, "scale each layer's norm by 1/sqrt(layer+1)")
    document_mask: bool = setting(False, "no attention or GDN state across a BOS: documents are independent")

    # --- attention
    rope_dims: int = setting(16, "head dims that are rotated (partial RoPE); 0: all", low=0)
    rope_base: float = setting(10000.0, "RoPE base", low=1)
    qk_gain_init: float = setting(1.5, "initial per-head gain on the normalized queries", low=0)
    window_size: int = setting(512, "keys a sliding-window layer sees, own position included", low=1)
    shared_layers: str = setting("", "groups of layers sharing mixer weights, e.g. 5,11 or 5,11;2,3")
    xsa_layers: str = setting("", "attention layers with exclusive self-attention: all, or e.g. 7,10 or 2-9")
    attn_sink: bool = setting(False, "one learned sink key per KV head, zero value, in full-attention layers")
    attn_gate_width: int = setting(0, "per-head output gate from the first n input dims; 0: off", low=0)
    attn_gate_scale: float = setting(1.0, "s in the gate ATTN_GATE_MAX * sigmoid(s * W n)", low=0)
    attn_gate_max: float = setting(2.0, "see ATTN_GATE_SCALE; 2: the gate starts at 1, 1: at 1/2 (the sparse form)", low=1e-3)
    ve_layers: str = setting("", "attention layers that add the value embedding to v")
    ve_dim: int = setting(128, "width of the value-embedding table", low=1)

    # --- Gated DeltaNet
    gdn_qk_heads: int = setting(8, "GDN query/key heads", low=1)
    gdn_v_heads: int = setting(8, "GDN value heads (a multiple of GDN_QK_HEADS)", low=1)
    gdn_head_dim: int = setting(64, "GDN head dim", low=1)
    gdn_conv_size: int = setting(4, "width of the causal depthwise convolution on q, k, v; 1: its own position only", low=1, high=8)
    gdn_feature_map: str = setting("silu", "activation of q and k before their L2 norm", choices=("silu", "elu1"))
    gdn_output_norm: bool = setting(True, "RMSNorm of each head's output before the gate")
    gdn_a_min: float = setting(1.0, "A ~ logU(GDN_A_MIN, GDN_A_MAX) at init", low=1e-4)
    gdn_a_max: float = setting(16.0, "see GDN_A_MIN", low=1e-4)

    # --- embedding side
    bigram_vocab_size: int = setting(0, "buckets of the hashed n-gram table; 0: off", low=0)
    bigram_dim: int = setting(128, "its width before the projection", low=1)
    trigram_hash: bool = setting(False, "also look trigrams up in that table")
    smear_gate: bool = setting(False, "learned blend with the previous token's embedding")
    smear_form: str = setting(
        "lerp", "lerp: per dim, after the first norm; lambda: one weight a token, before it", choices=("lerp", "lambda")
    )

    # --- depth
    parallel_start: int = setting(-1, "first layer with parallel residuals (attention and MLP read the same input); -1: none", low=-1)
    parallel_lanes: int = setting(1, "residual streams of the parallel layers; 2: attention and MLP read one each", low=1, high=2)
    unet_skips: bool = setting(False, "gated skips from the first half of the layers to the second")
    loop_start: int = setting(0, "first layer of the recurrent segment", low=0)
    loop_end: int = setting(0, "last layer of the recurrent segment", low=0)
    num_loops: int = setting(0, "extra passes over the segment; 0: no depth recurrence", low=0, high=16)
    loop_ln_scale: float = setting(1.0, "factor on the looped layers' norm scale while looping", low=0)

    @property
    def pattern(self) -> str:
        return self.layer_pattern or "A" * (self.num_layers or 9)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    def layers(self, name: str) -> list[int]:
        """The layer numbers that a setting such as xsa_layers names."""
        return parse_layers(getattr(self, name), len(self.pattern), name.upper())

    @property
    def owners(self) -> list[int]:
        """For each layer, the first layer of the SHARED_LAYERS group it belongs to (itself when it shares with none)."""
        owners = list(range(len(self.pattern)))
        for group in filter(None, self.shared_layers.split(";")):
            layers = parse_layers(group, len(owners), "SHARED_LAYERS")
            for layer in layers:
                if owners[layer] != layer or layer in owners[:layer]:
                    raise UserError(f"SHARED_LAYERS={self.shared_layers}: layer {layer} is in two groups")
                owners[layer] = layers[0]
        return owners

    def faults(self) -> Iterator[str]:
        yield from self._pattern_faults()
        yield from self._width_faults()
        yield from self._layer_faults()

    def _pattern_faults(self) -> Iterator[str]:
        pattern = self.pattern
        if self.num_layers and self.num_layers != len(pattern):
            yield f"LAYER_PATTERN={pattern} has {len(pattern)} layers but NUM_LAYERS={self.num_layers}"
        if unknown := sorted(set(pattern) - set(LAYER_KINDS)):
            known = ", ".join(f"{letter} ({title})" for letter, title in LAYER_KINDS.items())
            yield f"LAYER_PATTERN={pattern} names the unknown mixer {unknown[0]!r}; known: {known}"
        if self.num_loops and not self.loop_start <= self.loop_end < len(pattern):
            yield f"the recurrent segment {self.loop_start}-{self.loop_end} is not within the {len(pattern)} layers"
        if self.parallel_lanes == 2 and self.parallel_start < 0:
            yield "PARALLEL_LANES=2 needs PARALLEL_START, the layer where the lanes part"
        if self.parallel_lanes == 2 and self.num_loops and self.loop_start < self.parallel_start <= self.loop_end:
            segment = f"{self.loop_start}-{self.loop_end}"
            yield f"PARALLEL_LANES=2 from layer {self.parallel_start} on lies inside the recurrent segment {segment}"

    def _width_faults(self) -> Iterator[str]:
        if self.model_dim % self.num_heads:
            yield f"MODEL_DIM={self.model_dim} does not divide into NUM_HEADS={self.num_heads} heads"
        if self.num_heads % self.num_kv_heads:
            yield f"NUM_HEADS={self.num_heads} is not a multiple of NUM_KV_HEADS={self.num_kv_heads}"
        if self.gdn_v_heads % self.gdn_qk_heads:
            yield f"GDN_V_HEADS={self.gdn_v_heads} is not a multiple of GDN_QK_HEADS={self.gdn_qk_heads}"
        if self.gdn_a_min > self.gdn_a_max:
            yield f"GDN_A_MIN={self.gdn_a_min} is above GDN_A_MAX={self.gdn_a_max}"
        rope_dims = self.rope_dims or self.head_dim
        if rope_dims % 2 or rope_dims > self.head_dim:
            yield f"ROPE_DIMS={self.rope_dims} must be even and at most the head dim {self.head_dim}"
        if self.attn_gate_width > self.model_dim:
            yield f"ATTN_GATE_WIDTH={self.attn_gate_width} is wider than MODEL_DIM={self.model_dim}"
        if int(self.mlp_mult * self.model_dim) < 1:
            yield f"MLP_MULT={self.mlp_mult} of MODEL_DIM={self.model_dim} leaves the MLP no width"
        if self.bigram_vocab_size == 1:
            yield "BIGRAM_VOCAB_SIZE=1 leaves no bucket for n-grams: the last one means 'no predecessor'"
        if self.trigram_hash and not self.bigram_vocab_size:
            yield "TRIGRAM_HASH=1 needs BIGRAM_VOCAB_SIZE: both share one table"

    def _layer_faults(self) -> Iterator[str]:
        """XSA and value embeddings act on the attention layers among those named; layers that share a mixer share both."""
        pattern, chosen = self.pattern, {name: self.layers(name) for name in ("xsa_layers", "ve_layers")}
        for name, layers in chosen.items():
            if layers and getattr(self, name) != "all" and not any(pattern[layer] in ATTENTION_KINDS for layer in layers):
                yield f"{name.upper()}={getattr(self, name)} names no attention layer of {pattern}"
        for layer, first in enumerate(self.owners):
            if pattern[layer] != pattern[first]:
                yield f"SHARED_LAYERS: layers {first} ({pattern[first]}) and {layer} ({pattern[layer]}) differ in kind"
            for name, layers in chosen.items():
                if (layer in layers) != (first in layers):
                    yield f"{name.upper()} names only one of the layers {first} and {layer}, which share their mixer"


@dataclass(frozen=True)
class TrainConfig(Part):
    """How the weights come about: budget, batch, schedules, optimizers, reports."""

    # --- budget and batch
    max_wallclock_seconds: float = setting(600.0, "training budget; 0: ITERATIONS alone decides", low=0)
    iterations: int = setting(20000, "at most this many steps", low=1)
    gptq_reserve_seconds: float = setting(0.0, "part of the budget kept back for calibration", low=0)
    train_seq_len: int = setting(1024, "tokens a sequence", low=2)
    train_seq_schedule: str = setting("", "shorter sequences first, length@fraction of the budget until which, e.g. 1024@0.1,2048@0.7")
    train_places: int = setting(
        1, "places of the training text that a step reads at, by turns of TRAIN_SEQ_LEN tokens: more documents a step", low=1
    )
    train_row_tokens: int = setting(
        0,
        "tokens a row of whole documents, a rank's share of a step at most, cut only every TRAIN_SEQ_LEN tokens; 0: rows of TRAIN_SEQ_LEN, cut anywhere",
        low=0,
    )
    train_seq_rewarmup_frac: float = setting(
        0.0, "fraction of the budget over which the LR rises again after each change of length", low=0, high=1
    )
    train_batch_tokens: int = setting(524288, "tokens a step, over all ranks", low=2)
    train_batch_tokens_per_gpu: int = setting(0, "tokens a step on each rank; overrides TRAIN_BATCH_TOKENS", low=0)
    micro_batch_tokens: int = setting(0, "tokens a forward on each rank; 0: as many as fit the default", low=0)
    warmup_steps: int = setting(20, "compile warmup steps a graph, before the clock, undone afterwards", low=0)
    reference_steps: int = setting(4900, "run length for which EMA_DECAY is meant: other lengths keep the same fraction", low=1)

    # --- schedule and optimizers
    enable_looping_at: float = setting(0.35, "fraction of the training budget at which the recurrence starts", low=0, high=1)
    warmdown_frac: float = setting(0.72, "last fraction of the budget over which the LR falls linearly", low=0, high=1)
    min_lr: float = setting(0.0, "floor of the LR, as a fraction", low=0, high=1)
    matrix_lr: float = setting(0.04, "Muon", low=0, high=1e6)
    scalar_lr: float = setting(0.04, "AdamW: scalars, gates, convolutions", low=0, high=1e6)
    tied_embed_lr: float = setting(0.05, "AdamW: embedding tables", low=0, high=1e6)
    muon_momentum: float = setting(0.95, "final momentum", low=0, high=0.9999)
    muon_momentum_warmup_start: float = setting(0.85, "momentum at the first step", low=0, high=0.9999)
    muon_momentum_warmup_frac: float = setting(0.1, "fraction of the budget over which it rises", low=0, high=1)
    muon_momentum_cooldown_frac: float = setting(
        0.0, "last fraction of the budget over which it falls back to where it began", low=0, high=1
    )
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", low=1, high=20)
    muon_coefficients: str = setting("quintic", "Newton-Schulz tuples", choices=("quintic", "polar_express"))
    muon_row_norm: bool = setting(False, "MuonEq-R: normalize the rows before Newton-Schulz")
    muon_wd: float = setting(0.0, "decoupled weight decay of the matrices", low=0)
    muon_wd_mlp: float = setting(-1.0, "the same for MLP matrices; -1: MUON_WD", low=-1)
    muon_wd_taper_start: float = setting(1.0, "fraction of the budget from which both fall linearly; 1: never", low=0, high=1)
    muon_wd_taper_end: float = setting(0.5, "what is left of them at the end of the budget, as a fraction", low=0)
    embed_wd: float = setting(0.0, "weight decay of embedding tables", low=0)
    adam_wd: float = setting(0.0, "weight decay of the other AdamW parameters", low=0)
    beta1: float = setting(0.9, "AdamW", low=0, high=0.9999)
    beta2: float = setting(0.95, "AdamW", low=0, high=0.99999)
    adam_eps: float = setting(1e-8, "AdamW", low=0)
    grad_clip_norm: float = setting(0.0, "global gradient norm; 0: no clipping", low=0)
    ema_decay: float = setting(0.997, "weight average, per step of a REFERENCE_STEPS run; 0: off", low=0, high=0.999999)

    # --- quantization awareness
    late_qat_threshold: float = setting(0.0, "QAT once the LR scale is below this; 0: off", low=0, high=1)
    qat_last_frac: float = setting(0.0, "QAT over the last fraction of the budget; 0: off", low=0, high=1)
    qat_mode: str = setting("fake", "fake-quantize (straight-through) or add matching noise", choices=("fake", "noise"))
    qat_targets: str = setting(".*", "regular expression on the linear layers' names")
    qat_bits: int = setting(6, "bits that QAT imitates", low=2, high=8)
    qat_noise_scale: float = setting(0.05, "noise: sigma = this * step / sqrt(12)", low=0)
    crown_q_lambda: float = setting(0.0, "CROWN-Q penalty during warmdown", low=0)

    # --- reports
    val_loss_every: int = setting(1000, "steps between validations; 0: only at the end", low=0)
    val_tokens: int = setting(0, "validate on the first n tokens only; 0: all", low=0)
    train_log_every: int = setting(200, "steps between log lines", low=1)
    checkpoint_every: int = setting(
        1000, "steps between checkpoints; 0: not by steps (stopped or finished, a run saves one in any case)", low=0
    )
    checkpoint_seconds: float = setting(300.0, "seconds between checkpoints, by the wall clock; 0: not by time", low=0)

    @property
    def sequence_lengths(self) -> list[tuple[int, float]]:
        """(tokens a sequence, fraction of the budget until which) of TRAIN_SEQ_SCHEDULE in order; TRAIN_SEQ_LEN until the end comes last."""
        stages: list[tuple[int, float]] = []
        for part in filter(None, self.train_seq_schedule.replace(" ", "").split(",")):
            match = re.fullmatch(r"(\d+)@(\d*\.?\d+)", part)
            if not match or int(match[1]) < 2 or not (stages[-1][1] if stages else 0) < float(match[2]) <= 1:
                raise UserError(
                    f"TRAIN_SEQ_SCHEDULE={self.train_seq_schedule} is not a list such as 1024@0.1,2048@0.7 with rising fractions up to 1"
                )
            stages.append((int(match[1]), float(match[2])))
        return stages if stages and stages[-1][1] == 1 else [*stages, (self.train_seq_len, 1.0)]

    def faults(self) -> Iterator[str]:
        if self.gptq_reserve_seconds and self.gptq_reserve_seconds >= self.max_wallclock_seconds > 0:
            yield f"GPTQ_RESERVE_SECONDS={self.gptq_reserve_seconds} leaves nothing of MAX_WALLCLOCK_SECONDS"
        try:
            re.compile(self.qat_targets)
        except re.error as error:
            yield f"QAT_TARGETS={self.qat_targets!r} is not a regular expression: {error}"
        stages = self.sequence_lengths
        if stages[-1][0] != self.train_seq_len:
            yield f"TRAIN_SEQ_SCHEDULE={self.train_seq_schedule} ends with another length than TRAIN_SEQ_LEN={self.train_seq_len}"


@dataclass(frozen=True)
class QuantConfig(Part):
    """How quantize.py presses the weights."""

    quant_method: str = setting("gptq", "gptq, or rtn (round to nearest) for comparison", choices=("gptq", "rtn"))
    matrix_bits: int = setting(6, "bits of matrices", low=2, high=8)
    embed_bits: int = setting(8, "bits of embedding tables", low=2, high=8)
    matrix_clip_sigmas: float = setting(12.85, "SDClip: row scale = k*std(row)/(2^(b-1)-1)", low=0.1)
    embed_clip_sigmas: float = setting(20.0, "the same for embedding tables", low=0.1)
    mlp_clip_sigmas: float = setting(0.0, "k of MLP matrices; 0: MATRIX_CLIP_SIGMAS", low=0)
    attn_clip_sigmas: float = setting(0.0, "k of attention matrices; 0: MATRIX_CLIP_SIGMAS", low=0)
    scale_mantissa_bits: int = setting(4, "mantissa bits of the float16 row scales: fewer compress better", low=1, high=10)
    bits_override: str = setting("", "name-or-role:bits, comma separated, e.g. attn.proj:7,embed:7")
    gptq_calibration_batches: int = setting(64, "calibration batches of 8 sequences, from training shards", low=1, high=100000)
    gptq_block_size: int = setting(128, "columns solved before the lazy update", low=1)
    gptq_damp: float = setting(0.01, "Hessian damping, times its mean diagonal", low=0)
    compressor: str = setting("brotli", "packing of the symbols", choices=("brotli", "zstd", "lzma", "zlib", "range"))
    hadamard_vo: bool = setting(False, "rotate V and O per KV head by a Hadamard matrix before quantizing")
    prune_fraction: float = setting(0.0, "magnitude pruning before quantizing", low=0, high=0.95)
    embed_split_top: int = setting(0, "most frequent ids kept at EMBED_BITS; the rest gets EMBED_SPLIT_BITS; 0: no split", low=0)
    embed_split_bits: int = setting(7, "bits of the rarer rows", low=2, high=8)
    lqer_rank: int = setting(0, "rank of the error correction of the worst tensors; 0: off", low=0, high=64)
    lqer_top: int = setting(3, "how many tensors it corrects", low=1)
    target_bytes: int = setting(0, "search clips and bits to land just under this total; 0: off", low=0)


@dataclass(frozen=True)
class ExpertConfig(Part):
    """What is mixed with the model's distribution at evaluation (parts/experts.py). Defaults are card E's where it has them."""

    experts: str = setting(
        "",
        "what is mixed in, comma separated; empty: none",
        several=("tilt", "temperature", "calibration", "ngram", "cache", "unigram", "bigram", "trigram", "entropy"),
    )
    expert_mixer: str = setting("context", "how their weights are learned", choices=("context", "hedge", "fixed_share"))
    expert_block_tokens: int = setting(1024, "tokens scored before the experts' counts and weights learn from them", low=1)
    expert_report: bool = setting(True, "also score the model mixed with each expert alone")
    hedge_eta: float = setting(0.1, "learning rate of the Hedge mixers", low=0)
    hedge_share: float = setting(0.001, "weight that fixed_share spreads evenly after each block", low=0, high=1)
    ngram_order: int = setting(9, "longest n-gram counted", low=2, high=16)
    ngram_max_contexts: int = setting(1 << 25, "contexts kept over all orders (about 100 bytes each, their successors included)", low=1)
    ngram_smoothing: str = setting("kneser_ney", "of the n-gram distributions", choices=("kneser_ney", "witten_bell"))
    temperature_strength: float = setting(0.15, "temperature = 1 - this * (1 - H / ln V)", low=0, high=0.99)
    calibration_clamp: float = setting(2.0, "largest logit bias of the calibration, nats", low=0)
    calibration_momentum: float = setting(0.999, "of its averages, per 64 tokens", low=0, high=1)
    tilt_beta: float = setting(0.0, "logit added to the most frequent successor of the context; 0: learned online", low=0)
    tilt_order: int = setting(2, "order of the n-gram that names it; 0: every order names one", low=0, high=16)

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(filter(None, self.experts.split(",")))


@dataclass(frozen=True)
class EvalConfig(ExpertConfig):
    """How eval_ttt.py scores: windows, test-time training, experts, audit."""

    eval_seq_len: int = setting(0, "context window; 0: TRAIN_SEQ_LEN", low=0)
    eval_stride: int = setting(64, "tokens scored per sliding window", low=1)
    eval_by_document: bool = setting(False, "score every document from its own first token, in training's validations too")
    eval_batch_seqs: int = setting(0, "windows a forward; 0: automatic", low=0)
    ttt_mode: str = setting(
        "stream",
        "score-first test-time training: of the model on the whole stream, of an adapter of its own for each document, or none",
        choices=("off", "stream", "document"),
    )
    ttt_optimizer: str = setting("sgd", "its optimizer", choices=("sgd", "adamw"))
    ttt_lr: float = setting(0.005, "its learning rate", low=0, high=1e30)
    ttt_momentum: float = setting(0.9, "SGD momentum", low=0, high=0.9999)
    ttt_nesterov: bool = setting(True, "Nesterov momentum")
    ttt_epochs: int = setting(4, "passes over each scored chunk", low=0)
    ttt_chunk_tokens: int = setting(32768, "tokens scored before the weights may learn from them", low=1)
    ttt_grad_clip: float = setting(1.0, "gradient norm; 0: no clipping", low=0)
    ttt_params: str = setting("all", "what trains", choices=("all", "mlp", "matrices", "lora"))
    ttt_freeze_blocks: int = setting(0, "first blocks that do not train", low=0)
    ttt_lora_rank: int = setting(8, "rank of the LoRA adapters", low=1, high=4096)
    ttt_lr_schedule: str = setting("cosine", "over chunks", choices=("constant", "cosine", "adaptive"))
    ttt_polyak: float = setting(0.0, "decay of the averaged weights used for scoring; 0: off", low=0, high=0.99999)
    ttt_byte_weighted: bool = setting(False, "weight each token's loss by its bytes")
    ttt_hash_buckets: int = setting(0, "zero-initialised evaluation-time hash embedding; 0: off", low=0, high=2**24)
    ttt_hash_lr_mult: float = setting(10.0, "its learning rate over TTT_LR", low=0)
    ttt_reset_per_doc: bool = setting(False, "forget at document starts")
    ttt_batch_seqs: int = setting(32, "sequences a TTT step, over all ranks", low=1)
    ttt_seq_len: int = setting(0, "sequence length of its training passes; 0: EVAL_SEQ_LEN", low=0)
    ttt_max_lr_mult: float = setting(
        3.0, "schedule adaptive: cosine times a factor rising from 1 to this over the first 30 % of chunks", low=1
    )
    # --- TTT_MODE=document (parts/document_ttt.py)
    ttt_doc_sites: str = setting(
        "k,o,mlp,head",
        "what has a LoRA in every layer call; o, mlp: beside the whole mixer, the whole MLP",
        several=("q", "k", "v", "o", "mlp", "head"),
    )
    ttt_doc_rank: int = setting(32, "its rank", low=1, high=4096)
    ttt_doc_alpha: float = setting(57.6, "its output is multiplied by this / TTT_DOC_RANK", low=0)
    ttt_doc_lr: float = setting(2e-4, "AdamW, without momentum", low=0, high=1e6)
    ttt_doc_beta2: float = setting(0.99, "AdamW", low=0, high=0.99999)
    ttt_doc_wd: float = setting(1.0, "AdamW's weight decay", low=0)
    ttt_doc_chunks: str = setting(
        "24",
        "tokens scored before they are learned from, size@position in the document until which (8@256,24@2000,48); the last one until its end",
    )
    ttt_doc_lanes: int = setting(0, "documents side by side; 0: automatic", low=0, high=4096)
    eval_tokens: int = setting(0, "evaluate the first n validation tokens only; 0: all", low=0)
    invalid_cache: bool = setting(False, "also report what the target-keyed cache formula, which is no probability, would claim")
    codec_streams: int = setting(
        0, "streams that codec.py codes in lockstep; 0: by the text's length, at most 256 on CUDA and 32 elsewhere", low=0, high=65536
    )
    audit_samples: int = setting(512, "targets that the audit has answered again; below 64 it is incomplete", low=1)

    @property
    def by_document(self) -> bool:
        """Whether every document is scored from its own first token."""
        return self.eval_by_document or self.ttt_mode == "document"

    @property
    def document_chunks(self) -> list[tuple[int, float]]:
        """(tokens a chunk, position until which) of TTT_DOC_CHUNKS in order; the last has no end. Multiples of 8: what a row of a matrix
        product is, to the last bit, may depend on where in a block of rows it lies, and no document's scores shall depend on its row."""
        stages: list[tuple[int, float]] = []
        *parts, final = self.ttt_doc_chunks.replace(" ", "").split(",")
        for part in (*parts, f"{final}@inf"):
            match = re.fullmatch(r"(\d+)@(\d+|inf)", part)
            if not match or int(match[1]) % 8 or not int(match[1]) or float(match[2]) <= (stages[-1][1] if stages else 0):
                raise UserError(
                    f"TTT_DOC_CHUNKS={self.ttt_doc_chunks} is not a list such as 8@256,24@2000,48 of multiples of 8 with rising positions"
                )
            stages.append((int(match[1]), float(match[2])))
        return stages

    def faults(self) -> Iterator[str]:
        if self.ttt_mode == "document" and not self.ttt_doc_sites:
            yield "TTT_MODE=document with TTT_DOC_SITES=none leaves nothing to train"
        longest = max(size for size, _ in self.document_chunks)
        if self.ttt_mode == "document" and self.eval_seq_len and longest > self.eval_seq_len:
            yield f"TTT_DOC_CHUNKS={self.ttt_doc_chunks} has a chunk longer than the window EVAL_SEQ_LEN={self.eval_seq_len}"


PARTS = {"run": RunConfig, "model": ModelConfig, "train": TrainConfig, "quant": QuantConfig, "eval": EvalConfig}
PART_OF = {f.name: part for part, kind in PARTS.items() for f in dataclasses.fields(kind)}  # setting -> its part


@dataclass(frozen=True)
class Config(Part):
    """Every setting, in five parts. The environment variable of `cfg.train.matrix_lr` is MATRIX_LR, and so on; a name is unique over all parts.

    Names and defaults follow the challenge's public baseline where it has one. Use `resolve_config`, which also checks ranges.
    """

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    quant: QuantConfig = QuantConfig()
    eval: EvalConfig = EvalConfig()
    # Filled by resolve_config: setting -> "default", "preset:<name>", "run" or "env".
    origins: dict = field(default_factory=dict, compare=False, repr=False)

    def faults(self) -> Iterator[str]:
        """As a part's: rules between settings of two parts."""
        if self.train.train_row_tokens and not self.model.document_mask:
            yield "TRAIN_ROW_TOKENS puts many documents into a row: it needs DOCUMENT_MASK=1"

    def __getitem__(self, name: str):
        """A setting by its flat name."""
        return getattr(getattr(self, PART_OF[name]), name)

    def to_dict(self, *parts: str) -> dict:
        """Settings of some parts, or of all, by flat name as plain values: the form in which they are stored."""
        return {f.name: self[f.name] for f in settings(*parts)}

    @classmethod
    def from_dict(cls, values: Mapping) -> Config:
        """The inverse of `to_dict`, what is left out at its default; checked like any other input."""
        return _build_config({name: (value, "run") for name, value in values.items()})

    def replace(self, **changes) -> Config:
        """A checked copy with some settings, by flat name, changed. Origins stay."""
        return dataclasses.replace(Config.from_dict({**self.to_dict(), **changes}), origins=self.origins)


def settings(*parts: str) -> list[dataclasses.Field]:
    """The declarations of every setting, or of some parts'."""
    return [f for part in parts or PARTS for f in dataclasses.fields(PARTS[part])]


def parse_layers(text: str, num_layers: int, name: str) -> list[int]:
    """'all', '' or a list such as '2-9' or '0,1,10' -> sorted layer numbers."""
    if text == "all":
        return list(range(num_layers))
    layers: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise UserError(f"{name}={text!r} is not 'all' or a list such as 2-9 or 0,1,10")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise UserError(f"{name}={text!r} names a layer outside 0-{num_layers - 1}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def _parse_value(spec: dataclasses.Field, value, origin: str):
    """Text (or an already typed value) -> the field's type, within its limits."""
    name = spec.name.upper()
    limits = spec.metadata
    try:
        if spec.type == "bool":
            words = {"0": False, "1": True, "false": False, "true": True}
            value = words[str(value).strip().lower()]
        elif spec.type == "int":
            if isinstance(value, (bool, float)):
                raise ValueError
            value = int(value)
        elif spec.type == "float":
            value = float(value)
            if not math.isfinite(value):
                raise ValueError
        else:
            # An empty variable counts as not set, so that a preset's list is emptied by the word: XSA_LAYERS=none.
            value = "" if str(value).lower() == "none" else str(value)
    except (ValueError, KeyError, TypeError):
        kind = {"bool": "0 or 1", "int": "a whole number", "float": "a finite number"}[spec.type]
        raise UserError(f"{name}={value!r} ({origin}) is not {kind}") from None
    if limits["several"]:
        value = ",".join(filter(None, value.replace(" ", "").split(",")))
        if unknown := [word for word in value.split(",") if word and word not in limits["several"]]:
            raise UserError(f"{name}={value} ({origin}) names {unknown[0]!r}; known: {', '.join(limits['several'])}")
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{name}={value!r} ({origin}) is not one of {', '.join(limits['choices'])}")
    if limits["low"] is not None and value < limits["low"]:
        raise UserError(f"{name}={value} ({origin}) is below its least value {limits['low']}")
    high = limits["high"] if limits["high"] is not None else {"int": 10**12, "float": 1e12}.get(spec.type)
    if high is not None and value > high:
        raise UserError(f"{name}={value} ({origin}) is above its greatest value {high}")
    return value


def _build_config(raw: Mapping[str, tuple[object, str]]) -> Config:
    """name -> (value, origin) to a checked Config."""
    specs = {f.name: f for f in settings()}
    unknown = [name for name in raw if name not in specs]
    if unknown:
        close = difflib.get_close_matches(unknown[0], specs, n=1)
        hint = f"; did you mean {close[0].upper()}?" if close else ""
        hint = f": {FOREIGN[unknown[0].upper()]}" if unknown[0].upper() in FOREIGN else hint
        raise UserError(f"unknown setting {unknown[0].upper()} ({raw[unknown[0]][1]}){hint}")
    values: dict[str, dict] = {part: {} for part in PARTS}
    for name, (value, origin) in raw.items():
        values[PART_OF[name]][name] = _parse_value(specs[name], value, origin)
    parts = {part: kind(**values[part]) for part, kind in PARTS.items()}
    cfg = Config(**parts, origins={name: raw[name][1] if name in raw else "default" for name in specs})
    for part in (*parts.values(), cfg):
        for fault in part.faults():
            raise UserError(fault)
    return cfg


def preset_names(records: Path) -> list[str]:
    """Every preset, with its variants as name/variant."""
    files = sorted(records.glob("*/config.env")), sorted(records.glob("*/*.env"))
    return sorted([path.parent.name for path in files[0]] + [f"{p.parent.name}/{p.stem}" for p in files[1] if p.name != "config.env"])


def read_preset(preset: str, records: Path | None = None) -> dict[str, tuple[str, str]]:
    """'name' -> records/name/config.env; 'name/variant' -> that, then records/name/variant.env on top of it."""
    records = records or Path(__file__).resolve().parent / "records"
    name, _, variant = preset.partition("/")
    files = [records / name / "config.env"] + ([records / name / f"{variant}.env"] if variant else [])
    values: dict[str, tuple[str, str]] = {}
    for path in files:
        if not path.is_file():
            raise UserError(
                f"PRESET={preset}: no {path.parent.name}/{path.name} under records/; presets: {', '.join(preset_names(records))}"
            )
        for number, line in enumerate(path.read_text().splitlines(), 1):
            line = line.split("#")[0].strip()
            key, equals, value = line.partition("=")
            if line and not (equals and re.fullmatch(r"[A-Z][A-Z0-9_]*", key)):
                raise UserError(f"{path.parent.name}/{path.name} line {number} is not NAME=value: {line!r}")
            if line:
                values[key.lower()] = (value.strip(), f"preset:{preset}")
    return values


def known_settings(stored: Mapping) -> dict:
    """Of stored settings those that still are some: what an earlier version wrote may hold others."""
    former = {"ttt_mode": "stream" if stored["ttt_enabled"] else "off"} if "ttt_enabled" in stored else {}
    return {name: value for name, value in {**former, **stored}.items() if name in PART_OF}


def resolve_config(environ: Mapping[str, str], base: Mapping | None = None) -> Config:
    """default < preset (or, given `base`, the finished run's settings) < environment. VOCAB_SIZE follows a tokenizer that is named above it.

    With `base` a model setting in the environment that contradicts the run is refused: the weights already fix it.
    """
    raw: dict[str, tuple[object, str]] = {}
    if base is not None:
        base = known_settings(base)
        raw.update({name: (value, "run") for name, value in base.items()})
    elif environ.get("PRESET"):
        raw.update(read_preset(environ["PRESET"]))
    given = {f.name: (environ[f.name.upper()], "env") for f in settings() if environ.get(f.name.upper(), "") != ""}
    if base is not None:
        fixed = Config.from_dict(base)
        for spec in settings("model"):
            value, origin = given.get(spec.name, (fixed[spec.name], "run"))
            if _parse_value(spec, value, origin) != fixed[spec.name]:
                raise UserError(f"{spec.name.upper()}={value} contradicts the trained model, whose value is {fixed[spec.name]}")
    raw.update(given)
    path, named_by = raw.get("tokenizer_path", ("", "default"))
    if named_by != raw.get("vocab_size", ("", "default"))[1] and "vocab_size" not in given and base is None and Path(path).is_file():
        raw["vocab_size"] = (load_tokenizer(path).vocab_size(), "tokenizer")
    return _build_config(raw)


# Names of the public baseline and of other code bases that mean nothing here -> what to use.
FOREIGN = {
    "WARMDOWN_ITERS": "use WARMDOWN_FRAC, a fraction of the budget",
    "MUON_MOMENTUM_WARMUP_STEPS": "use MUON_MOMENTUM_WARMUP_FRAC, a fraction of the budget",
    "TIE_EMBEDDINGS": "the head always is the embedding",
    "EMBED_LR": "use TIED_EMBED_LR",
    "HEAD_LR": "use TIED_EMBED_LR: the head is the embedding",
    "VAL_BATCH_SIZE": "use EVAL_BATCH_SEQS, windows a forward",
    "LR": "use MATRIX_LR, TIED_EMBED_LR and SCALAR_LR",
    "LEARNING_RATE": "use MATRIX_LR, TIED_EMBED_LR and SCALAR_LR",
    "WEIGHT_DECAY": "use MUON_WD, EMBED_WD and ADAM_WD",
    "BATCH_SIZE": "use TRAIN_BATCH_TOKENS, tokens a step over all ranks",
    "GRADIENT_ACCUMULATION_STEPS": "use MICRO_BATCH_TOKENS: accumulation follows from it",
    "BLOCK_SIZE": "use TRAIN_SEQ_LEN",
    "SEQ_LEN": "use TRAIN_SEQ_LEN",
    "MAX_ITERS": "use ITERATIONS",
    "NUM_ITERATIONS": "use ITERATIONS",
    "GRAD_CLIP": "use GRAD_CLIP_NORM",
    "N_LAYER": "use NUM_LAYERS",
    "N_HEAD": "use NUM_HEADS",
    "N_EMBD": "use MODEL_DIM",
    "XSA_LAST_N": "use XSA_LAYERS, a list such as 7-10",
    "TTT_CHUNK_SIZE": "use TTT_CHUNK_TOKENS",
    "TTT_ENABLED": "use TTT_MODE: off, stream or document",
}


def near_misses(environ: Mapping[str, str]) -> list[str]:
    """Warnings for environment variables that are settings elsewhere, or look like misspelt ones of ours."""
    names = {f.name.upper() for f in settings()} | {"PRESET"}
    warnings = []
    for variable in sorted(environ):
        if variable in FOREIGN:
            warnings.append(f"environment variable {variable} is not a setting here: {FOREIGN[variable]}")
        elif variable not in names and (close := difflib.get_close_matches(variable, names, n=1, cutoff=0.86)):
            warnings.append(f"environment variable {variable} is not a setting; did you mean {close[0]}?")
    return warnings


def say_near_misses(environ: Mapping[str, str]) -> None:
    """On stderr, by rank 0: what a command does first."""
    if environ.get("RANK", "0") == "0":
        for warning in near_misses(environ):
            print(f"warning: {warning}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Run context: ranks, device, logs
# ----------------------------------------------------------------------------------------------------------------------


class RunContext:
    """Where this process runs, and where it reports. One rank unless torchrun started it."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, device: torch.device | None = None):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = device or torch.device("cpu")
        self._text = self._events = None
        self.output_closed = False  # nobody reads stdout any more

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def open_logs(self, text: Path, events: Path | None = None) -> None:
        """Append what is reported to `text` (for people) and `events` (for programs); rank 0 only."""
        if self.is_main:
            self._text, self._events = LogFile(text), LogFile(events) if events else None

    def log(self, line: str = "") -> None:
        if self.is_main:
            self.output_closed |= not print_line(line)
            self.note(line)

    def note(self, line: str) -> None:
        """To the log alone."""
        if self._text:
            self._text.write(line)

    def progress(self, label: str, total: int, unit: str = "tok") -> Progress:
        """Of a pass over `total` things on all ranks together."""
        return Progress(label, total, unit, self.log, shown=self.is_main)

    def metric(self, event: str, **values) -> None:
        if self._events:
            self._events.write(json.dumps({"event": event, **values}))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """In place; returns `tensor`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def exchange(self, kind: str, collective: Callable, *tensors: Tensor, **how) -> Callable[[], object]:
        """Start one of a training step's collectives; what is returned waits for it (CUDA tensors: the stream does, not the host).

        `kind` is its name in a benchmark, which puts its own clock in this place.
        """
        return collective(*tensors, **how, async_op=True).wait

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's CPU tensors on every rank; what the other ranks pass is ignored."""
        if self.world_size == 1:
            return dict(tensors)
        shapes = self.broadcast_object({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        shared = {
            name: tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()
        }
        for tensor in shared.values():
            dist.broadcast(tensor, 0)
        return shared

    def broadcast_object(self, value):
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value) -> list:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Rank 0 acts; every rank gets what it returned, or its fault of input."""
        if self.world_size == 1:
            return action()
        result = fault = None
        if self.is_main:
            try:
                result = action()
            except (UserError, OSError) as error:
                fault = fault_line(error)
        result, fault = self.broadcast_object((result, fault))
        if fault:
            raise UserError(fault)
        return result

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # through gloo: a barrier that does not touch the GPU's queue

    def close(self) -> None:
        flush_stdout()
        for handle in filter(None, (self._text, self._events)):
            handle.close()
        self._text = self._events = None
        if not dist.is_initialized():
            return
        if self.device.type == "cuda" and sys.exc_info()[0]:
            # Exchanges with a rank that is gone never end, and the group's end, like the process's, would wait for them.
            atexit.register(os._exit, 2)
        else:
            dist.destroy_process_group()


def keep_compiled(folder: str) -> None:
    """Every compiler's cache goes under `folder` (CACHE_DIR), unless its own variable says otherwise."""
    if folder:
        for variable, name in COMPILERS.items():
            os.environ.setdefault(variable, str(Path(folder).absolute() / name))
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # flash-attn-4 keeps nothing unless asked


def setup_distributed(device: str = "auto", cache_dir: str = "") -> RunContext:
    """Join torchrun's process group if there is one. CPU tensors go through gloo, CUDA tensors through NCCL."""
    keep_compiled(cache_dir)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("DEVICE=cuda, but torch sees no CUDA device here")
    on_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    try:
        rank, world, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    except ValueError:
        raise UserError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: start several processes with torchrun") from None
    if world > 1 and not os.environ.get("MASTER_ADDR"):
        raise UserError(f"WORLD_SIZE={world}, but no MASTER_ADDR: start several processes with torchrun")
    if on_cuda and local >= torch.cuda.device_count():
        raise UserError(f"rank {rank} wants GPU {local} of this machine, which has {torch.cuda.device_count()}: lower --nproc_per_node")
    target = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(target)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 matrices remain (Newton-Schulz runs in bf16 anyway)
    if "RANK" in os.environ:
        end_with_parent()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=datetime.timedelta(minutes=20))
    return RunContext(rank, world, local, target)


_TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # torchrun's contract, not settings of ours


# ----------------------------------------------------------------------------------------------------------------------
# Data: published shard format, streamed in order
# ----------------------------------------------------------------------------------------------------------------------


def load_tokens(data_path: str | Path, split: str, vocab_size: int, limit: int = 0) -> Tensor:
    """A whole split (or its first `limit` tokens) as one int32 tensor on the CPU."""
    parts, total = [], 0
    for path in list_shards(data_path, split):
        part = load_shard(path)
        part = part[: limit - total] if limit else part
        check_vocabulary(part, vocab_size, path)
        parts.append(torch.from_numpy(part.astype(np.int32)))
        total += len(part)
        if limit and total >= limit:
            break
    return torch.cat(parts)


def document_starts(ids: Tensor, span: int = 0) -> Tensor:
    """bool [B,T]: where in ids [B,T] a document starts; with `span` also where one is cut, every so many of its tokens (and at the row's start)."""
    starts = ids == BOS_ID
    if span:
        place = torch.arange(ids.size(1), device=ids.device)
        begun = torch.where(starts, place, 0).cummax(1).values
        starts = (place - begun) % span == 0
    return starts


class TokenStream:
    """The training shards as one endless stream, read in order; each step takes the next `batch_tokens` of it.

    A step's sequences are the same whatever the number of ranks (as long as each gets a whole row) and micro-batches, and its
    place in the stream is one integer (`position`, in tokens since the start), so a resumed run reads exactly what the unbroken one would have read.

    places > 1: it takes turns at so many places of the text, equally far apart, `turn` tokens each, of which the first becomes a BOS: what a turn
    begins with has nothing before it. A step then sees more documents; neighbouring tokens say much the same to a gradient.
    """

    places, turn = 1, 0

    def __init__(self, data_path: str | Path, vocab_size: int, split: str = "train", places: int = 1, turn: int = 0):
        assert split == "train", "only training shards may reach the weights"
        self.paths = list_shards(data_path, split)
        self.starts = np.cumsum([0] + [len(load_shard(path)) for path in self.paths])
        # Read through open files: a shard that is unlinked stays readable, and one that is cut short is a fault with a name. Under a
        # memory map the first would do as well, the second kills the process (SIGBUS).
        self.files = [open(path, "rb", buffering=0) for path in self.paths]
        self.vocab_size = vocab_size
        self.position = 0
        self.places, self.turn = places, turn
        if places > 1 and self.total_tokens // places < turn:
            raise UserError(f"TRAIN_PLACES={places}: {self.total_tokens:,} training tokens are fewer than {turn} for each")

    @property
    def total_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def epoch(self) -> float:
        return self.position / self.total_tokens

    def piece(self, index: int, first: int, count: int) -> np.ndarray:
        """Tokens first … first+count−1 of shard `index`."""
        data = os.pread(self.files[index].fileno(), 2 * count, SHARD_HEADER_BYTES + 2 * first)
        if len(data) < 2 * count:
            raise UserError(f"{self.paths[index]} was cut short while it was read: it ends before its token {first + count:,}")
        return np.frombuffer(data, "<u2")

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from stream position `start`, wrapping around at the end of the last shard."""
        pieces = []
        while count:
            offset = start % self.total_tokens
            index = int(np.searchsorted(self.starts, offset, side="right")) - 1
            piece = self.piece(index, offset - int(self.starts[index]), min(count, int(self.starts[index + 1]) - offset))
            check_vocabulary(piece, self.vocab_size, self.paths[index])
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def _pairs(self, first: int, count: int) -> np.ndarray:
        """Inputs and targets int64 [2, count] of positions first … first+count−1."""
        if self.places == 1:
            flat = self.read(first, count + 1).astype(np.int64)
            return np.stack((flat[:-1], flat[1:]))
        parts, apart = [], self.total_tokens // self.places
        while count:
            number, begun = divmod(first, self.turn)
            length = min(count, self.turn - begun)
            start = number % self.places * apart + number // self.places * self.turn % apart + begun
            flat = self.read(start, length + 1).astype(np.int64)
            parts.append(np.stack((flat[:-1], flat[1:])))
            if not begun:
                parts[-1][0, 0] = BOS_ID
            first, count = first + length, count - length
        return np.concatenate(parts, 1)

    def sequences(self, first: int, count: int, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets int64 [count, seq_len] of the step's sequences first, first+1, …"""
        pairs = torch.from_numpy(self._pairs(self.position + first * seq_len, count * seq_len))
        if device.type == "cuda":
            pairs = pairs.pin_memory().to(device, non_blocking=True)
        inputs, targets = pairs.view(2, count, seq_len)
        return inputs, targets

    def boundaries(self, first: int, count: int, seq_len: int, device: torch.device, span: int = 0) -> Tensor:
        """Where the documents of `sequences` start, as `kernels.document_boundaries`; found on the CPU, so that nothing waits for the GPU."""
        inputs = torch.from_numpy(self._pairs(self.position + first * seq_len, count * seq_len)[0])
        places = kernels.document_boundaries(document_starts(inputs.view(count, seq_len), span))
        if device.type == "cuda":
            places = places.pin_memory().to(device, non_blocking=True)
            torch._dynamo.mark_dynamic(places, 0)  # how many documents a batch holds is no reason to compile again
        return places

    def advance(self, tokens: int) -> None:
        self.position += tokens


# ----------------------------------------------------------------------------------------------------------------------
# Ops, each with its naive twin
# ----------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dim, without weight."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2*cos.size(-1) dims of x [B,T,H,D] (partial RoPE, half-split pairing). cos, sin [T or B,T, dims/2]."""
    half = cos.size(-1)
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def normed_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """q [B,T,H,D], k [B,T,K,D] normed and rotated, q times its head's gain [H]. The twin of `kernels.heads_of`."""
    return rotate(rms_norm(q), cos, sin) * gain.to(q.dtype)[:, None], rotate(rms_norm(k), cos, sin)


def softcap(z: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(z / cap)


@dataclass(frozen=True)
class Kernels:
    """Which kernel serves each op, and why the faster ones do not. The defaults run anywhere."""

    full: str = "flash"  # attention over everything before
    windowed: str = "plain"  # sliding-window attention
    fused: bool = False  # parts/kernels.py's: MLP, softcapped cross-entropy, q and k, residual stream, XSA with its gate, GDN's convolution
    gdn: str = "torch"
    refused: tuple[str, ...] = ()

    def lines(self, reasons: bool = True) -> list[str]:
        """For the banner. reasons: why faster ones do not serve, which on a CPU is no question."""
        return [
            f"kernels: full attention {self.full}, windowed {self.windowed}, MLP, cross-entropy, heads, residual stream, XSA and GDN's convolution "
            f"{'triton' if self.fused else 'plain'}, "
            f"gated delta rule {self.gdn}" + (f" (not: {'; '.join(self.refused)})" if self.refused and reasons else "")
        ]


def plan_kernels(cfg: Config, device: torch.device, compiled: bool) -> Kernels:
    """Choose the kernels for this machine; ATTENTION_BACKEND and FUSED_KERNELS force one, or fail with the reason."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    on_cuda = device.type == "cuda"
    old = "needs a CUDA GPU of capability 8.0" * (capability < (8, 0))
    probes = {  # in one line why a backend cannot serve here, empty if it can
        "fa4": lambda: kernels.missing_flash_attention_4(device),
        "fa3": lambda: "needs a Hopper GPU" if capability[0] != 9 else kernels.missing(lambda: flash_function("fa3")),
        "cudnn": lambda: old or "torch comes without cuDNN" * (not torch.backends.cudnn.is_available()),
        "fa2": lambda: old or kernels.missing(lambda: flash_function("fa2")),
        "flash": lambda: "",
        "flex": lambda: "" if on_cuda and compiled else "FlexAttention pays only compiled, on CUDA",
        "plain": lambda: "",
    }
    faults: dict[str, str] = {}  # of those that were asked: importing a package takes seconds

    def fault_of(name: str) -> str:
        if name not in faults:
            faults[name] = probes[name]()
        return faults[name]

    # In order of preference. Masks by document want variable lengths (fa4) or an arbitrary mask; a sink wants the rows' log-sum (fa4) or,
    # as a first key outside the window, an arbitrary mask. Full attention takes a sink as an extra first position with any causal kernel.
    order = {"full": ("fa4", "fa3", "cudnn", "fa2", "flash"), "windowed": ("fa4", "fa3", "flex", "fa2", "plain")}
    serves = {"full": (*order["full"], "flex", "plain"), "windowed": order["windowed"]}
    masked = ("fa4", "flex", "plain")
    if cfg.model.document_mask:
        order = serves = {"full": masked, "windowed": masked}
    elif cfg.model.attn_sink:
        order = {"full": order["full"], "windowed": masked}
        serves = {"full": serves["full"], "windowed": masked}
    forced = cfg.run.attention_backend
    if forced != "auto":
        if fault_of(forced):
            raise UserError(f"ATTENTION_BACKEND={forced}: {fault_of(forced)}")
        order = {kind: (forced, *names) if forced in serves[kind] else names for kind, names in order.items()}
        if forced not in (order["full"][0], order["windowed"][0]):
            raise UserError(f"ATTENTION_BACKEND={forced} serves neither full nor windowed layers with DOCUMENT_MASK=1")
    chosen = {kind: next(name for name in names if not fault_of(name)) for kind, names in order.items()}
    refused = [f"{name}: {fault}" for name, fault in faults.items() if fault and forced == "auto"]
    fault = kernels.missing_triton(device)
    if fault and cfg.run.fused_kernels == "1":
        raise UserError(f"FUSED_KERNELS=1: {fault}")
    refused += [f"triton: {fault}"] if fault else []
    gdn = choose_gdn_backend(cfg.run, device) if "G" in cfg.model.pattern else "torch"
    return Kernels(chosen["full"], chosen["windowed"], not fault and cfg.run.fused_kernels != "0", gdn, tuple(refused))


def attention_mask(length: int, window: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Boolean [1 or B, 1, T, T]: what each query may see.

    `window` counts keys, the query's own position included; 0 is unlimited. documents: int [B, T] or None.
    """
    key = torch.arange(length, device=device)
    query = key[:, None]
    mask = (key <= query)[None, None]
    if window:
        mask = mask & (query - key < window)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 0,
    sink: Tensor | None = None,
    documents: Tensor | None = None,
    boundaries: Tensor | None = None,
    longest: int = 0,
    backend: str = "plain",
) -> Tensor:
    """Causal attention q [B,T,H,D] over k, v [B,T,Hkv,D]. Returns [B,T,H,D].

    sink: one learned key per KV head [Hkv, D] with zero value, seen by every query: it only enlarges the softmax's denominator.
    documents: int [B,T]; keys of other documents are hidden; fa4 takes them as `boundaries` (`kernels.document_boundaries`), `longest` at most. Every backend computes the same function (`naive_attention`).
    """
    length = q.size(1)
    if backend == "flex" and not torch.compiler.is_compiling():
        backend = "plain"  # an uncompiled FlexAttention would materialize more than the mask
    masked = bool(window and window < length) or documents is not None
    if backend == "fa4":
        return kernels.flash_attention(q, k, v, window=window if window < length else 0, sink=sink, boundaries=boundaries, longest=longest)
    if backend == "plain" and not masked:
        backend = "flash"
    if sink is not None:
        # The sink becomes position 0 of the keys. A dummy query in front keeps causal kernels square, so that top-left and
        # bottom-right alignment agree (is_causal of SDPA is top-left: without the dummy each token would lose its own key).
        k = torch.cat((sink.to(k.dtype).expand(k.size(0), 1, -1, -1), k), dim=1)
        v = torch.cat((torch.zeros_like(v[:, :1]), v), dim=1)
        if backend != "plain":
            q = torch.cat((torch.zeros_like(q[:, :1]), q), dim=1)
    if backend == "plain":
        mask = attention_mask(length, window, documents, q.device)
        if sink is not None:
            mask = F.pad(mask, (1, 0), value=True)
        return _sdpa(q, k, v, attn_mask=mask)
    if backend == "flex":
        out = _flex_attention(q, k, v, window, documents, sink is not None)
    elif backend in ("fa2", "fa3"):
        out = _flash_attention_package(q, k, v, window if masked else 0, backend)
    elif backend == "cudnn" and not torch.are_deterministic_algorithms_enabled():  # its backward adds in no fixed order
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = _sdpa(q, k, v, is_causal=True)
    else:
        out = _sdpa(q, k, v, is_causal=True)
    return out if sink is None else out[:, 1:]


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of a few positions q [B,T,H,D] over whole caches [B,Hkv,S,D]; mask [1 or B, 1, T, S] says which slots count.

    The query heads of a KV head become rows of one product, so that the caches are read once and never copied.
    """
    heads, kv_heads = q.size(2), keys.size(1)
    out = F.scaled_dot_product_attention(_group_heads(q, kv_heads), keys, values, attn_mask=mask.repeat(1, 1, heads // kv_heads, 1))
    return _split_heads(out, q.size(1))


def _group_heads(q: Tensor, kv_heads: int) -> Tensor:
    """[B,T,H,D] -> [B,Hkv,G*T,D]."""
    return q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _split_heads(x: Tensor, length: int) -> Tensor:
    """[B,Hkv,G*T,D] -> [B,T,H,D]."""
    return x.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [B,Hkv,…] in float32, whatever their type: scores rounded to bfloat16 would be no scores."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])


class CachedAttention(torch.autograd.Function):
    """`cached_attention` with gradients for the positions at hand, whose keys and values k, v [B,T,Hkv,D] are in the caches already, in `slots` [T].

    What was remembered earlier is constant, and a fused kernel's backward spends nine tenths of its time on the gradients of all of it. The
    caches are kept for the backward as they lie in memory: what is written to them until then goes to other layers' or to masked slots.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        grouped, groups = _group_heads(q, keys.size(1)), q.size(2) // keys.size(1)
        scores = _wide_product(grouped, keys.mT) * q.size(-1) ** -0.5
        weights = scores.masked_fill_(~mask.repeat(1, 1, groups, 1), float("-inf")).softmax(-1).to(q.dtype)
        return _split_heads(weights @ values, q.size(1)), weights

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        q, _, _, ctx.keys, ctx.values, _, slots = inputs
        out, weights = output
        ctx.mark_non_differentiable(weights)
        ctx.save_for_backward(q, out, weights, slots)

    @staticmethod
    def backward(ctx, d_out: Tensor, _: Tensor) -> tuple:
        q, out, weights, slots = ctx.saved_tensors
        kv_heads, length, scale = ctx.keys.size(1), q.size(1), q.size(-1) ** -0.5
        grouped, d_grouped = _group_heads(q, kv_heads), _group_heads(d_out, kv_heads)
        delta = _group_heads((d_out.float() * out.float()).sum(-1, keepdim=True), kv_heads)
        d_scores = (weights * (_wide_product(d_grouped, ctx.values.mT) - delta) * scale).to(q.dtype)
        d_q = _split_heads(d_scores @ ctx.keys, length)
        d_k = d_scores.index_select(-1, slots).mT @ grouped  # [B,Hkv,T,D]
        d_v = weights.index_select(-1, slots).mT @ d_grouped
        return d_q, d_k.transpose(1, 2), d_v.transpose(1, 2), None, None, None, None


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, sink: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """The twin of `attention`: explicit softmax, one line a rule."""
    repeat = q.size(2) // k.size(2)
    keys, values = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~attention_mask(q.size(1), window, documents, q.device), float("-inf"))
    if sink is not None:
        at_sink = torch.einsum("bqhd,hd->bhq", q, sink.repeat_interleave(repeat, 0)) / math.sqrt(q.size(-1))
        scores = torch.cat((at_sink[..., None], scores), -1)
    weights = scores.softmax(-1)[..., -k.size(1) :]
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    masked = "attn_mask" in how
    if q.size(2) != k.size(2) and (masked or q.device.type == "cpu"):  # the fused kernels of either have no GQA
        k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **how).transpose(1, 2)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None, has_sink: bool) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, window = q.size(1), window or q.size(1) + 1
    if documents is not None and has_sink:
        documents = F.pad(documents, (1, 0))

    def visible(batch, head, query, key):
        allowed = (key <= query) & (query - key < window)
        if documents is not None:
            allowed = allowed & (documents[batch, query] == documents[batch, key])
        return allowed | (key == 0) if has_sink else allowed

    batch = None if documents is None else q.size(0)
    block_mask = create_block_mask(visible, batch, None, length, length, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def flash_function(backend: str) -> Callable:
    """What fa2 or fa3 calls. ImportError where it is not there."""
    if backend == "fa2":
        from flash_attn import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func
    return flash_attn_func


def _flash_attention_package(q: Tensor, k: Tensor, v: Tensor, window: int, backend: str) -> Tensor:
    how = {"window_size": (window - 1, 0) if window else (-1, -1)}
    if torch.are_deterministic_algorithms_enabled():
        how["deterministic"] = True
    out = flash_function(backend)(q, k, v, causal=True, **how)
    return out[0] if isinstance(out, tuple) else out


def naive_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence itself, a position at a time: S ← e^g S (I − β k kᵀ) + β v kᵀ, o = S q / sqrt(K) (Yang et al., 2024).

    q, k [B,T,Hk,K] (L2-normed), v [B,T,Hv,D], g (log decay ≤ 0) and beta [B,T,Hv]; Hv a multiple of Hk.
    Returns o [B,T,Hv,D] and the final state [B,Hv,K,D] (stored transposed, as the kernels do).
    """
    repeat = v.size(2) // k.size(2)
    q, k = (x.float().repeat_interleave(repeat, 2) for x in (q, k))
    v, g, beta = v.float(), g.float(), beta.float()
    s = q.new_zeros(v.size(0), v.size(2), k.size(3), v.size(3)) if state is None else state.float()
    outputs = []
    for t in range(q.size(1)):
        s = s * g[:, t, :, None, None].exp()
        recalled = torch.einsum("bhkd,bhk->bhd", s, k[:, t])
        s = s + torch.einsum("bhk,bhd->bhkd", k[:, t], beta[:, t, :, None] * (v[:, t] - recalled))
        outputs.append(torch.einsum("bhkd,bhk->bhd", s, q[:, t]) / math.sqrt(q.size(-1)))
    return torch.stack(outputs, 1), s


def chunked_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """`naive_gated_delta_rule` in chunks of matrix products (the WY form of the delta rule), for devices without the fused kernel.

    Within a chunk the pseudo-values u solve the unit lower-triangular system (I + A) u = β(v − e^G k S₀), A_ij = β_i e^{G_i−G_j} k_i·k_j;
    only the state passes between chunks. float32 throughout; any T.
    """
    batch, length, heads, dim = v.shape
    repeat = heads // k.size(2)
    dtype = v.dtype
    padding = -length % chunk

    def chunks(x: Tensor) -> Tensor:  # [B,T,H,*] -> [B,H,N,C,*]; zero padding has beta 0 and g 0, so it changes no state
        x = x.float().repeat_interleave(heads // x.size(2), 2).transpose(1, 2)
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, padding))
        return x.unflatten(2, (-1, chunk))

    assert repeat * k.size(2) == heads
    q, k, v, g, beta = chunks(q) / math.sqrt(q.size(-1)), chunks(k), chunks(v), chunks(g), chunks(beta)
    # G as a product: no cumsum of floats counts as deterministic on CUDA, and test-time training asks for gradients that are.
    total = (g.double() @ torch.ones(chunk, chunk, dtype=torch.float64, device=g.device).triu()).float()
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    # The mask goes on before exp: above the diagonal G_i − G_j is positive and may overflow.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    k_beta = k * beta[..., None]
    system = ((k_beta @ k.mT) * decay).tril(-1) + torch.eye(chunk, device=q.device)
    right = torch.cat((v * beta[..., None], k_beta * total.exp()[..., None]), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split((dim, k.size(-1)), -1)
    inside = (q @ k.mT) * decay
    q_decayed = q * total.exp()[..., None]
    k_remaining = k * (total[..., -1:] - total).exp()[..., None]
    chunk_decay = total[..., -1].exp()[..., None, None]
    s = q.new_zeros(batch, heads, k.size(-1), dim) if state is None else state.float()
    # Contiguous factors: what kernel a product of views gets depends on the batch size, and with it the last bits of a row.
    per_chunk = zip(*(x.movedim(2, 0).contiguous() for x in (u, w, q_decayed, inside, k_remaining.mT, chunk_decay)))
    outputs = []
    for u_n, w_n, q_n, inside_n, k_n, decay_n in per_chunk:
        fresh = u_n - w_n @ s
        outputs.append(q_n @ s + inside_n @ fresh)
        s = s * decay_n + k_n @ fresh
    out = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return out.transpose(1, 2).to(dtype), s


def choose_gdn_backend(cfg: RunConfig, device: torch.device) -> str:
    """'fla' or 'torch'. Refuses the combinations whose backward is known to be wrong, saying what to install.

    Triton 3.4 to 3.7.0 miscompiles the gated chunk backward on Hopper (flash-linear-attention issue 640); its TileLang backend avoids that.
    """
    if cfg.gdn_backend == "torch" or (cfg.gdn_backend == "auto" and device.type != "cuda"):
        return "torch"
    if device.type != "cuda":
        raise UserError("GDN_BACKEND=fla needs a CUDA device")
    if fault := kernels.missing(fla_functions):
        raise UserError(
            f"GDN on CUDA needs flash-linear-attention ({fault}): pip install -r requirements-cuda.txt (or GDN_BACKEND=torch, slow)"
        )
    import triton

    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if hopper and (3, 4, 0) <= version < (3, 7, 1) and (fault := kernels.missing(_fla_tilelang)):
        raise UserError(
            f"Triton {triton.__version__} miscompiles GDN's backward on Hopper: install triton>=3.7.1, or tilelang ({fault}; "
            "pip install -r requirements-cuda.txt), or set GDN_BACKEND=torch"
        )
    with contextlib.suppress(ImportError, AttributeError):  # of another version: it is tuned all the same
        for kernel in fla_kernels():
            kernels.compile_together(kernel)
    return "fla"


def fla_functions() -> tuple[Callable, Callable, Callable]:
    """flash-linear-attention's gated delta rule: forward, backward, and both with a state."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    return chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd, chunk_gated_delta_rule


def fla_kernels() -> Iterator:
    """The autotuned Triton kernels behind `fla_functions`: 34 configurations for a forward, 28 more for a backward, by head counts and dims
    (a sum of 8 by batch size, too), not by length."""
    from fla.ops.common import chunk_delta_h, chunk_o
    from fla.ops.gated_delta_rule import chunk_fwd, wy_fast
    from fla.ops.utils import cumsum
    from triton.runtime.autotuner import Autotuner, Heuristics

    for module in (cumsum, chunk_fwd, wy_fast, chunk_delta_h, chunk_o):
        for kernel in vars(module).values():
            kernel = kernel.fn if isinstance(kernel, Heuristics) else kernel
            if isinstance(kernel, Autotuner):
                yield kernel


def _fla_tilelang() -> None:
    from fla.ops.common.backends import CommonTileLangBackend

    if not CommonTileLangBackend.can_use():  # as fla's own dispatcher asks
        raise ImportError("it needs its package and nvcc, and FLA_TILELANG not to be 0")


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, backend: str = "torch", keep_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule by the chosen backend; arguments as `naive_gated_delta_rule`. The state is returned if `keep_state`."""
    if q.size(1) == 1:  # one step of a stream: the recurrence itself
        out, final = naive_gated_delta_rule(q, k, v, g, beta, state)
        return out.to(v.dtype), final if keep_state else None
    if backend == "torch":
        out, final = chunked_gated_delta_rule(q, k, v, g, beta, state)
        return out, final if keep_state else None
    if keep_state or state is not None:
        return fla_functions()[2](q=q, k=k, v=v, g=g, beta=beta, initial_state=state, output_final_state=keep_state)
    return _fla_forward(q.contiguous(), k.contiguous(), v.contiguous(), g.contiguous(), beta.contiguous())[0], None


# flash-linear-attention marks its entry point as not compilable, which would cut the graph at every GDN layer. As custom ops its
# forward and backward are opaque to the compiler and the model still compiles whole.


@torch.library.custom_op("golf::gated_delta_rule", mutates_args=())
def _fla_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cumulative, out, solved, *_ = fla_functions()[0](
        q=q, k=k, v=v, g=g, beta=beta, scale=q.size(-1) ** -0.5, initial_state=None, output_final_state=False
    )
    return out.to(v.dtype), cumulative, solved


@_fla_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(g, dtype=torch.float32), k.new_empty(*g.shape, 64)


@torch.library.custom_op("golf::gated_delta_rule_backward", mutates_args=())
def _fla_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cumulative: Tensor, solved: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbeta, dg, *_ = fla_functions()[1](
        q=q, k=k, v=v, g=cumulative, beta=beta, A=solved, scale=q.size(-1) ** -0.5, initial_state=None, do=d_out, dht=None
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dbeta.to(beta.dtype)


@_fla_backward.register_fake
def _(q, k, v, g, beta, cumulative, solved, d_out):
    return tuple(torch.empty_like(x) for x in (q, k, v, g, beta))


def _fla_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1], output[2])


def _fla_gradients(ctx, d_out: Tensor, _cumulative, _solved):
    return _fla_backward(*ctx.saved_tensors, d_out.contiguous())


_fla_forward.register_autograd(_fla_gradients, setup_context=_fla_save)


# Coefficients of the Newton-Schulz iteration X ← aX + (bA + cA²)X, A = XXᵀ. "quintic" is Muon's tuple (Keller Jordan); the others are the
# Polar Express's (Amsel et al., 2025), one a step, the last repeated.
NEWTON_SCHULZ = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}


def newton_schulz(matrices: Tensor, steps: int = 5, coefficients: str = "quintic", row_norm: bool = False) -> Tensor:
    """Approximate the orthogonal factor U Vᵀ of each matrix [N, R, C]. bf16 on CUDA, float32 on the CPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    if row_norm:  # MuonEq-R: every output unit gets an equal say before orthogonalization
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    # Polar Express assumes a spectral norm safely below 1.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * (1.02 if coefficients == "polar_express" else 1.0) + 1e-7)
    tuples = NEWTON_SCHULZ[coefficients]
    for step in range(steps):
        a, b, c = tuples[min(step, len(tuples) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The one linear layer, and what a forward carries along
# ----------------------------------------------------------------------------------------------------------------------


class FakeQuantize(nn.Module):
    """Late QAT: shows a linear layer the weights that quantization would leave it, passing gradients straight through.

    `strength` is a tensor, 0 until QAT starts: a Python flag would be folded into the compiled graph and never take effect.
    Steps follow SDClip, k·std(row)/(2^(bits−1)−1), with QAT_BITS and k = MATRIX_CLIP_SIGMAS for every layer. Mode "noise" adds noise of a scaled-down step instead of rounding.
    """

    def __init__(self, bits: int, clip_sigmas: float, mode: str, noise_scale: float):
        super().__init__()
        self.levels, self.clip_sigmas, self.mode, self.noise_scale = 2 ** (bits - 1) - 1, clip_sigmas, mode, noise_scale
        self.register_buffer("strength", torch.zeros(()), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            step = (self.clip_sigmas / self.levels * weight.std(dim=1, keepdim=True, unbiased=weight.size(1) > 1)).clamp_min(1e-12)
            if self.mode == "noise":
                change = torch.randn_like(weight) * (self.noise_scale / math.sqrt(12)) * step
            else:
                change = (weight / step).round().clamp(-self.levels, self.levels) * step - weight
            change = self.strength * change
        return weight + change


class Linear(nn.Module):
    """y = W x, the only matrix product with a learned matrix in the model, so that kernels, QAT and adapters have one place to go.

    W is float32 [out, in] and computes in x's dtype. `adapter` (LoRA) adds its output; `observer` (calibration) is shown each input.
    """

    def __init__(self, in_features: int, out_features: int, init: str = "orthogonal"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.adapter: Callable[[Tensor], Tensor] | None = None
        self.observer: Callable[[Tensor], None] | None = None
        self.fake_quantize: FakeQuantize | None = None
        if init == "orthogonal":
            nn.init.orthogonal_(self.weight)
        else:
            nn.init.zeros_(self.weight)

    @property
    def bare(self) -> bool:
        """Nothing is attached that needs to see the input: a kernel that takes the matrix alone may serve."""
        return self.adapter is None and self.observer is None

    def matrix(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The matrix to multiply by. `scale` [out] multiplies the outputs: on the weights it costs no pass over activations."""
        weight = self.weight if self.fake_quantize is None else self.fake_quantize(self.weight)
        return (weight if scale is None else weight * scale[:, None]).to(dtype)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return joint_linear(x, (self,), scale)[0]

    def onto(self, base: Tensor | None, x: Tensor, scale: Tensor | None, in_place: bool) -> Tensor:
        """base + W x, or W x without a base. in_place: by the product itself, where that is."""
        if base is None or not in_place:
            y = self(x, scale)
            return y if base is None else base + y
        if self.observer is not None:
            self.observer(x)
        return adapted(kernels.product_onto(base, x, self.matrix(x.dtype, scale)), x, self.adapter, scale)


def adapted(y: Tensor, x: Tensor, adapter: Callable[[Tensor], Tensor] | None, scale: Tensor | None = None) -> Tensor:
    """y, which something made of x, and what the adapter makes of the same x; `scale` [out] multiplies y already."""
    if adapter is None:
        return y
    return y + (adapter(x) if scale is None else adapter(x) * scale.to(x.dtype))


def joint_product(x: Tensor, linears: Sequence[Linear], scale: Tensor | None = None) -> Tensor:
    """What several linear layers without their adapters make of the same x, side by side: one matrix product."""
    for linear in linears:
        if linear.observer is not None:
            linear.observer(x)
    matrices = [linear.matrix(x.dtype, scale) for linear in linears]
    return F.linear(x, torch.cat(matrices) if len(matrices) > 1 else matrices[0])


def joint_linear(x: Tensor, linears: Sequence[Linear], scale: Tensor | None = None) -> list[Tensor]:
    """The outputs of several linear layers that read the same x, as one matrix product."""
    parts = joint_product(x, linears, scale).split([linear.weight.size(0) for linear in linears], -1)
    return [adapted(part, x, linear.adapter, scale) for part, linear in zip(parts, linears)]


class DecodeState:
    """What streams leave behind: pass one object to consecutive forwards and they equal a single forward over the whole text.

    Holds key/value caches (cut to the window where there is one), GDN states, and the last inputs of every shift and convolution. All of
    it is allocated at the first forward and then written in place, and `position` lives on the device: a step of one token is the same
    kernels on the same memory every time, which is what a CUDA graph can replay.

    rows: streams side by side, all at the same position. capacity: the longest text in tokens. piece: the longest forward once the text
    has begun; the one that begins it may have any length. `begun = False` starts over with another text in the same memory; so does
    `restart`, after which the first piece is like all others.

    endless: the text may go on beyond `capacity`, which is how many positions full attention sees, the query's own included; positions
    start over with a document.
    one_document: no stream has a second one, and nothing has to be hidden from it. With gradients enabled a piece is differentiable as far as
    it goes: what is remembered of earlier ones is constant.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        piece: int = 1,
        device: torch.device | str = "cpu",
        endless: bool = False,
        one_document: bool = False,
    ):
        self.total, self.rows, self.capacity, self.piece = rows, slice(0, rows), capacity, piece
        self.endless, self.one_document = endless, one_document
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.slots: dict[tuple, Tensor] = {}
        self.begun = False

    def slot(self, key: tuple, like: Tensor) -> Tensor:
        """This state's rows of the memory called `key`, made of `like`'s shape [rows, …] and type at its first use."""
        if key not in self.slots:
            self.slots[key] = like.new_zeros(self.total, *like.shape[1:])
        return self.slots[key][self.rows]

    def reach(self, window: int) -> tuple[int, int]:
        """(keys that a query sees, 0: all; slots of the cache) of attention over `window` keys, 0: full."""
        if self.endless:
            window = min(window or self.capacity, self.capacity)
            return window, -(-(window - 1 + self.piece) // 8) * 8  # a mask whose rows are aligned
        return window, min(self.capacity, window - 1 + self.piece) if window else self.capacity

    def advance(self, length: int) -> None:
        self.position.copy_(self.position * self.begun + length)
        self.begun = True

    def restart(self) -> None:
        """Position 0 of another text, in memory that a forward has laid out."""
        for memory in (self.position, *self.slots.values()):
            memory.zero_()
        self.slots["begins",].fill_(True)
        self.slots["ids",].fill_(BOS_ID)
        self.begun = True

    def narrow(self, first: int, last: int) -> DecodeState:
        """Rows first … last - 1 over the same memory, to be begun in parts where all rows at once would not fit."""
        part = copy.copy(self)
        part.rows = slice(first, last)
        return part

    def mark(self) -> dict[tuple, Tensor]:
        """What `rewind` needs to come back to this place from up to `piece` tokens further on (endless): all but the caches, where what is
        seen from here is still held then."""
        return {key: value.clone() for key, value in self._places() if key[-1] not in ("k", "v")}

    def rewind(self, mark: dict[tuple, Tensor]) -> None:
        for key, value in self._places():
            if key in mark:
                value.copy_(mark[key])

    def _places(self) -> Iterator[tuple[tuple, Tensor]]:
        yield ("position",), self.position
        yield from self.slots.items()

    def clone(self) -> DecodeState:
        other = copy.copy(self)
        other.position, other.slots = self.position.clone(), {key: value.clone() for key, value in self.slots.items()}
        return other


@dataclass
class ForwardContext:
    """What every layer of one forward may need beside its input."""

    cos: Tensor  # [T, rope_dims/2]; [B, T, rope_dims/2] where positions start over with a document
    sin: Tensor
    continues: list[Tensor]  # bool [B,T] each: position t-1 (t-2, …) exists and is of the same document
    documents: Tensor | None  # int [B,T], only under DOCUMENT_MASK: the number of each position's document; with a state where it starts
    boundaries: Tensor | None  # int32 [documents + 1, padded]: the same for fa4
    longest: int  # positions of a document at most
    kernels: Kernels
    state: DecodeState | None = None
    goes_on: bool = False  # the state already holds a text, which this forward continues
    call: int = 0  # index of the layer call within the forward: recurrence calls a layer several times, each with its own state
    value_embedding: Tensor | None = None  # [B,T,Hkv*D]
    masks: dict[tuple, Tensor] = field(default_factory=dict)  # of caches, by what decides them

    def recall(self, name: str) -> Tensor | None:
        if not self.goes_on:
            return None
        value = self.state.slots[self.call, name][self.state.rows]
        return value.clone() if torch.is_grad_enabled() else value  # the memory is written again before the backward

    def remember(self, name: str, value: Tensor) -> None:
        if self.state is not None:
            self.state.slot((self.call, name), value).copy_(value.detach())

    def shifted(self, x: Tensor, count: int, name: str) -> list[Tensor]:
        """x [B,T,C] delayed by 1, …, count positions; zero where that position does not exist or is of another document."""
        tail = self.recall(name)
        padded = F.pad(x, (0, 0, count, 0)) if tail is None else torch.cat((tail, x), 1)
        self.remember(name, padded[:, -count:])
        length = x.size(1)
        return [padded[:, count - n : count - n + length] * self.continues[n - 1][..., None].to(x.dtype) for n in range(1, count + 1)]

    def cache(self, k: Tensor, v: Tensor, window: int, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v [B,T,Hkv,D] to this call's caches; those [B,Hkv,S,D], and the slots that were written [T or less]: position p is in slot
        p mod (S without the sink's)."""
        state, length = self.state, k.size(1)
        _, size = state.reach(window)
        kept = min(length, size)
        slots = torch.arange(length - kept, length, device=k.device)
        slots = (slots + state.position if self.goes_on else slots) % size
        caches = []
        for name, x in (("k", k), ("v", v)):
            x = x.transpose(1, 2)[:, :, length - kept :]
            caches.append(state.slot((self.call, name), x[:, :, :1].expand(-1, -1, size + (sink is not None), -1)))
            caches[-1].index_copy_(2, slots, x.detach())
        if sink is not None:  # the last slot; its value stays zero
            caches[0][:, :, size] = sink.detach().to(k.dtype)
        return caches[0], caches[1], slots

    def cache_mask(self, length: int, window: int, size: int, sink: bool) -> Tensor:
        """Boolean [1 or B, 1, T, S]: which slots of a cache the T positions just written may see. As `attention_mask`."""
        key = (window, size)
        if key not in self.masks:
            ring, first = size - sink, self.state.position
            last = first + length - 1
            window, _ = self.state.reach(window)
            slot = torch.arange(ring, device=first.device)
            held = last - (last - slot) % ring  # the latest position that a slot can hold
            query = first + torch.arange(length, device=first.device)[:, None]
            mask = ((held >= 0) & (held <= query))[None, None]
            if window:
                mask = mask & (query - held < window)
            if self.documents is not None:
                mask = mask & (held >= self.documents[..., None])[:, None]
            self.masks[key] = F.pad(mask, (0, int(sink)), value=True)
        return self.masks[key]


# ----------------------------------------------------------------------------------------------------------------------
# Mixers: a class with forward(x, ctx, scale, base) and a line in MIXERS each. `scale` [C] multiplies the output, through the last product's matrix;
# base [B,T,C], where given, is what the output is added to
# ----------------------------------------------------------------------------------------------------------------------


class CausalAttention(nn.Module):
    """GQA with normalized q and k, per-head gain, partial RoPE; by configuration XSA, a sink key, an output gate, value embeddings."""

    windowed = False

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.fusible = self.head_dim & (self.head_dim - 1) == 0  # the kernels take heads of a power of two
        self.window = cfg.window_size if self.windowed else 0
        kv_dim = self.kv_heads * self.head_dim
        self.c_q = Linear(cfg.model_dim, self.heads * self.head_dim)
        self.c_k = Linear(cfg.model_dim, kv_dim)
        self.c_v = Linear(cfg.model_dim, kv_dim)
        self.proj = Linear(self.heads * self.head_dim, cfg.model_dim, init="zero")
        self.q_gain = nn.Parameter(torch.full((self.heads,), cfg.qk_gain_init))
        self.xsa = layer in cfg.layers("xsa_layers")
        uses_ve = layer in cfg.layers("ve_layers")
        self.ve_scale = nn.Parameter(torch.ones(())) if uses_ve else None
        self.sink = nn.Parameter(torch.zeros(self.kv_heads, self.head_dim)) if cfg.attn_sink and not self.windowed else None
        self.gate = nn.Parameter(torch.zeros(self.heads, cfg.attn_gate_width)) if cfg.attn_gate_width else None
        self.gate_scale, self.gate_max = cfg.attn_gate_scale, cfg.attn_gate_max

    def forward(self, x: Tensor, ctx: ForwardContext, scale: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        gate = of_gate = None
        if self.gate is not None and ctx.kernels.fused:
            x, of_gate = kernels.first_columns(x, self.gate.size(1))
        q, k, *values = self._project(x, ctx)
        if self.ve_scale is not None:
            added = (0.1 * self.ve_scale.to(x.dtype) * ctx.value_embedding).unflatten(-1, (self.kv_heads, self.head_dim))
            values = [v + added for v in values]
        o = self._attend(q, k, values[0], ctx)
        if self.gate is not None:
            of_gate = x[..., : self.gate.size(1)] if of_gate is None else of_gate
            gate = torch.sigmoid(self.gate_scale * F.linear(of_gate, self.gate.to(x.dtype))) * self.gate_max
        if self.xsa:
            fused = ctx.kernels.fused and self.fusible
            o = (kernels.exclusive_gate if fused else kernels.plain_exclusive_gate)(o, values[-1], gate)
        elif gate is not None:
            o = o * gate[..., None]
        return self.proj.onto(base, o.flatten(-2), scale, ctx.kernels.fused)

    def _project(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, ...]:
        """q [B,T,H,D] and k [B,T,Hkv,D], ready for attention, and v [B,T,Hkv,D]: once, or for each of its readers. k and the first v may have
        every head once for each of its query heads."""
        linears = (self.c_q, self.c_k, self.c_v)
        if ctx.kernels.fused and self.fusible and ctx.cos.dim() == 2 and all(linear.adapter is None for linear in linears):
            # flash-attn-4's backward adds up the gradients of grouped heads in two zeroed float32 buffers and converts them; for as many k, v
            # heads as q heads it writes them once, and the kernel that reads them adds them up.
            alone = self.ve_scale is None  # v is what the product gives
            repeat = ctx.kernels.full == "fa4" and not self.windowed and alone and self.sink is None and ctx.boundaries is None
            repeat = repeat and ctx.state is None and torch.is_grad_enabled()
            readers, copies = 2 if self.xsa and alone else 1, self.heads // self.kv_heads if repeat else 1
            return kernels.heads_of(joint_product(x, linears), ctx.cos, ctx.sin, self.q_gain, self.kv_heads, readers, copies)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in joint_linear(x, linears))
        return *normed_heads(q, k, ctx.cos, ctx.sin, self.q_gain), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
        if ctx.state is not None:
            keys, values, slots = ctx.cache(k, v, self.window, self.sink)
            if ctx.goes_on:
                mask = ctx.cache_mask(q.size(1), self.window, keys.size(2), self.sink is not None)
                if torch.is_grad_enabled():
                    return CachedAttention.apply(q, k, v, keys, values, mask, slots)[0]
                return cached_attention(q, keys, values, mask)
        backend = ctx.kernels.windowed if self.windowed else ctx.kernels.full
        return attention(
            q,
            k,
            v,
            window=self.window,
            sink=self.sink,
            documents=ctx.documents,
            boundaries=ctx.boundaries,
            longest=ctx.longest,
            backend=backend,
        )


class SlidingWindowAttention(CausalAttention):
    """The same over the last WINDOW_SIZE positions, the query's own included."""

    windowed = True


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (Yang et al., 2024): a recurrent associative memory with decay and delta-rule writes.

    Short causal depthwise convolution on q, k, v; q and k L2-normed after their activation (SiLU, or elu+1); output gate SiLU(z).
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.qk_heads, self.v_heads, self.head_dim = cfg.gdn_qk_heads, cfg.gdn_v_heads, cfg.gdn_head_dim
        self.feature_map, self.output_norm, self.taps = cfg.gdn_feature_map, cfg.gdn_output_norm, cfg.gdn_conv_size
        qk_dim, v_dim = self.qk_heads * self.head_dim, self.v_heads * self.head_dim
        self.q_proj, self.k_proj = Linear(cfg.model_dim, qk_dim), Linear(cfg.model_dim, qk_dim)
        self.v_proj, self.g_proj = Linear(cfg.model_dim, v_dim), Linear(cfg.model_dim, v_dim)
        self.a_proj, self.b_proj = Linear(cfg.model_dim, self.v_heads), Linear(cfg.model_dim, self.v_heads)
        self.o_proj = Linear(v_dim, cfg.model_dim, init="zero")
        bound = 1 / math.sqrt(self.taps)
        self.conv = nn.Parameter(torch.empty(2 * qk_dim + v_dim, 1, self.taps).uniform_(-bound, bound))
        log_a = torch.empty(self.v_heads).uniform_(math.log(cfg.gdn_a_min), math.log(cfg.gdn_a_max))
        self.A_log = nn.Parameter(log_a)
        dt = torch.empty(self.v_heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

    def forward(self, x: Tensor, ctx: ForwardContext, scale: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj)
        taps, how = self.conv[:, 0], (self.qk_heads, self.head_dim, self.feature_map != "silu")
        if ctx.kernels.fused and ctx.state is None and self.head_dim.bit_count() == 1:
            plain = all(linear.adapter is None for linear in projections)
            joint = joint_product(x, projections) if plain else torch.cat(joint_linear(x, projections), -1)
            q, k, v, rest = kernels.short_conv(joint, taps, ctx.continues[: self.taps - 1], *how)
            z, a, b = rest.split([linear.weight.size(0) for linear in projections[3:]], -1)
        else:
            *qkv, z, a, b = joint_linear(x, projections)
            qkv = torch.cat(qkv, -1)
            q, k, v = kernels.plain_short_conv([qkv, *(ctx.shifted(qkv, self.taps - 1, "conv") if self.taps > 1 else ())], taps, *how)
        beta = torch.sigmoid(b.float())
        g = -self.A_log.exp() * F.softplus(a.float() + self.dt_bias)
        if ctx.documents is not None:
            # A decay of e^-50 forgets everything before a document's start to below float32's resolution, and stays finite where
            # the chunked kernels take differences of running sums.
            g = g.masked_fill(~ctx.continues[0][..., None], -50.0)
        o, final = gated_delta_rule(q, k, v, g, beta, ctx.recall("gdn"), ctx.kernels.gdn, keep_state=ctx.state is not None)
        if final is not None:
            ctx.remember("gdn", final)
        o = rms_norm(o) if self.output_norm else o
        return self.o_proj.onto(base, o.flatten(-2) * F.silu(z), scale, ctx.kernels.fused)


class TokenShift(nn.Module):
    """RWKV-style channel mixing with the previous token: σ(W_r x_r) ⊙ W_v relu(W_k x_k)², x_r and x_k learned blends per dim."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.mu_r, self.mu_k = nn.Parameter(torch.zeros(cfg.model_dim)), nn.Parameter(torch.zeros(cfg.model_dim))
        self.w_r, self.w_k = Linear(cfg.model_dim, cfg.model_dim), Linear(cfg.model_dim, cfg.model_dim)
        self.w_v = Linear(cfg.model_dim, cfg.model_dim, init="zero")

    def forward(self, x: Tensor, ctx: ForwardContext, scale: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        (previous,) = ctx.shifted(x, 1, "shift")
        blend_r, blend_k = torch.sigmoid(self.mu_r).to(x.dtype), torch.sigmoid(self.mu_k).to(x.dtype)
        x_r = torch.lerp(previous, x, blend_r)
        x_k = torch.lerp(previous, x, blend_k)
        y = torch.sigmoid(self.w_r(x_r)) * self.w_v(F.relu(self.w_k(x_k)).square(), scale)
        return y if base is None else base + y


MIXERS = {"A": CausalAttention, "S": SlidingWindowAttention, "G": GatedDeltaNet, "T": TokenShift}


# ----------------------------------------------------------------------------------------------------------------------
# Embedding side
# ----------------------------------------------------------------------------------------------------------------------


def ngram_buckets(ids: Tensor, previous: list[Tensor], continues: list[Tensor], buckets: int) -> list[Tensor]:
    """Hash buckets int64 [B,T] of the bigram (and, given two previous ids, the trigram) ending at each position.

    (36313·t_i XOR 27191·t_{i−1} [XOR 51497·t_{i−2}]) mod (buckets−1); the last bucket means "no predecessor in this document".
    """
    hashed, result = 36313 * ids, []
    for multiplier, earlier, known in zip((27191, 51497), previous, continues):
        hashed = torch.bitwise_xor(hashed, multiplier * earlier)
        result.append(torch.where(known, hashed % (buckets - 1), buckets - 1))
    return result


class HashEmbedding(nn.Module):
    """Table of hashed bigrams (and trigrams), projected to the model's width: BigramHash and TrigramHash.

    The table starts small and the projection does not start at zero: were both zero, neither would ever get a gradient. With `dim`
    None the table is as wide as the model, has no projection and starts at zero (the evaluation-time embedding).
    """

    def __init__(self, buckets: int, dim: int | None, model_dim: int, trigram: bool = False):
        super().__init__()
        self.buckets, self.orders = buckets, 2 if trigram else 1
        self.table = nn.Embedding(buckets, dim or model_dim)
        self.proj = Linear(dim, model_dim) if dim else None
        self.scale = nn.Parameter(torch.tensor(0.05 if dim else 1.0))
        nn.init.normal_(self.table.weight, std=0.01 if dim else 0.0)

    def forward(self, ids: Tensor, previous: list[Tensor], continues: list[Tensor], dtype: torch.dtype) -> Tensor:
        buckets = ngram_buckets(ids, previous[: self.orders], continues[: self.orders], self.buckets)
        x = sum(self.table(index) for index in buckets).to(dtype)
        return (x if self.proj is None else self.proj(x)) * self.scale.to(dtype)


class ValueEmbedding(nn.Module):
    """A second token embedding, projected to the KV width and added to v in chosen layers."""

    def __init__(self, vocab_size: int, dim: int, kv_dim: int):
        super().__init__()
        self.table, self.proj = nn.Embedding(vocab_size, dim), Linear(dim, kv_dim)
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.table(ids).to(dtype))


class SmearGate(nn.Module):
    """(1−σ(g))·x_t + σ(g)·x_{t−1} per dim; a document's first token stays as it is."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        (previous,) = ctx.shifted(x, 1, "smear")
        weight = torch.sigmoid(self.gate).to(x.dtype) * ctx.continues[0][..., None].to(x.dtype)
        return torch.lerp(x, previous, weight)


class LambdaSmearGate(nn.Module):
    """x_t + λ·σ(w·x_t[:12])·x_{t−1}, λ and w zero at first; a document's first token stays as it is. For the embedding before its norm."""

    width = 12

    def __init__(self, dim: int):
        super().__init__()
        self.gate, self.scale = nn.Parameter(torch.zeros(min(self.width, dim))), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        (previous,) = ctx.shifted(x, 1, "smear")
        weight = torch.sigmoid(x[..., : self.gate.numel()] @ self.gate.to(x.dtype))
        return x + (self.scale.to(x.dtype) * weight)[..., None] * previous


# ----------------------------------------------------------------------------------------------------------------------
# Block and model
# ----------------------------------------------------------------------------------------------------------------------


class FinalNorm(nn.Module):
    """RMSNorm before the head, as a module so that calibration can observe the head's input."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.fc, self.proj = Linear(cfg.model_dim, hidden), Linear(hidden, cfg.model_dim, init="zero")
        self.act = cfg.mlp_act

    def forward(self, x: Tensor, ctx: ForwardContext, scale: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        if ctx.kernels.fused and self.act in kernels.FUSED_ACTIVATIONS and self.fc.bare and self.proj.bare:
            return kernels.fused_mlp(x, self.fc.matrix(x.dtype), self.proj.matrix(x.dtype, scale), self.act, base)
        return self.proj.onto(base, kernels.squared_activation(self.fc(x), self.act), scale, False)


def output_head(
    x: Tensor,
    norm: nn.Module,
    weight: Tensor,
    targets: Tensor | None,
    cap: float,
    reduction: str,
    fused: bool,
    adapter: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Softcapped logits of norm(x), x [B,n,C] or the two lanes [2,B,n,C], over the tied embedding [V,C]; with targets [B,n] their cross-entropy in nats.

    Training multiplies in x's dtype. Scores and distributions multiply in float32 (TF32 on CUDA): a bf16 logit of 20 is rounded to 1/8, which
    would show as noise of that size in single tokens' scores.
    """
    x = norm(x.mean(0) if x.dim() == 4 else x)
    if targets is None or reduction != "mean":
        x = x.float()
    elif fused and cap <= kernels.LARGEST_CAP and torch.is_grad_enabled() and adapter is None:
        return kernels.softcap_cross_entropy(x, weight.to(x.dtype), targets, cap)
    logits = softcap(adapted(F.linear(x, weight.to(x.dtype)), x, adapter).float(), cap)
    if targets is None:
        return logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss if reduction == "mean" else loss.view(targets.shape)


class Block(nn.Module):
    """x_in = m0·x + m1·x0, then x_in + a ⊙ Mixer(norm) and + b ⊙ MLP(norm), one after the other or both from x_in (parallel).

    With two lanes the residual stream is a pair: the mixer reads m0·lane0 + m1·x0, the MLP lane1, and both write to both,
    lane_i ← r_i·lane_i + p_0i·mixed + p_1i·hidden (from the challenge's public record; r = 1.1 and p = 1 at first).
    """

    def __init__(self, cfg: ModelConfig, layer: int, mixer: nn.Module):
        super().__init__()
        dim = cfg.model_dim
        self.mixer, self.mlp = mixer, MLP(cfg)
        self.mixer_adapter: Callable[[Tensor], Tensor] | None = None  # beside the whole mixer, and the whole MLP
        self.mlp_adapter: Callable[[Tensor], Tensor] | None = None
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.mixer_scale, self.mlp_scale = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.parallel = 0 <= cfg.parallel_start <= layer
        self.lanes = cfg.parallel_lanes if self.parallel else 1
        if self.lanes == 2:
            self.lane_keep, self.lane_write = nn.Parameter(torch.full((2,), 1.1)), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor, x0: Tensor, ctx: ForwardContext, scale: Tensor, skip: Skip | None = None) -> tuple[Tensor, Tensor]:
        """x, x0 [B,T,C] -> [B,T,C] and x0 for the next block; with two lanes x is [2,B,T,C], or [B,T,C] where they begin, and so is the result.
        `scale` multiplies the norms; a tensor, so that layers of one kind share one compiled graph."""
        if self.lanes == 2:
            return self._two_lanes(list(x) if x.dim() == 4 else [x, x], x0, ctx, scale, skip), x0
        if ctx.kernels.fused and torch.is_grad_enabled():  # there is a kernel of the backward alone
            x_in, x0, *normed = kernels.mix_norm(x, x0, self.resid_mix, scale, *(skip or ()), readers=1 + self.parallel)
        else:
            x_in, *normed = kernels.plain_mix_norm(x, x0, self.resid_mix, scale, *(skip or ()))
        x = self._mixed(normed[0], ctx, x_in)
        if not self.parallel:
            in_place = ctx.kernels.fused and torch.compiler.is_compiling()
            normed = [kernels.scaled_norm(x, scale) if in_place else rms_norm(x) * scale.to(x.dtype)]
        return self._hidden(normed[-1], ctx, x), x0

    def _two_lanes(self, lanes: list[Tensor], x0: Tensor, ctx: ForwardContext, scale: Tensor, skip: Skip | None) -> Tensor:
        if skip is not None:  # skips go into the first lane
            lanes[0] = kernels.skip_into(lanes[0], *skip)
        _, normed = kernels.plain_mix_norm(lanes[0], x0, self.resid_mix, scale)
        mixed = self._mixed(normed, ctx)
        hidden = self._hidden(rms_norm(lanes[1]) * scale.to(x0.dtype), ctx)
        keep, write = self.lane_keep.to(x0.dtype), self.lane_write.to(x0.dtype)
        return torch.stack([keep[n] * lanes[n] + write[0, n] * mixed + write[1, n] * hidden for n in range(2)])

    def _mixed(self, x: Tensor, ctx: ForwardContext, base: Tensor | None = None) -> Tensor:
        return adapted(self.mixer(x, ctx, self.mixer_scale, base), x, self.mixer_adapter, self.mixer_scale)

    def _hidden(self, x: Tensor, ctx: ForwardContext, base: Tensor | None = None) -> Tensor:
        return adapted(self.mlp(x, ctx, self.mlp_scale, base), x, self.mlp_adapter, self.mlp_scale)


class Skip(NamedTuple):
    """A gated U-Net skip into a block: lerp(weight · kept, x, σ(gate))."""

    kept: Tensor  # [B,T,C], what a block of the first half put out
    weight: Tensor  # [C]
    gate: Tensor  # [C]


def run_embedding(model: GPT, input_ids: Tensor, previous: list[Tensor], ctx: ForwardContext) -> Tensor:
    return model.embed(input_ids, previous, ctx)


def run_block(block: Block, x: Tensor, x0: Tensor, ctx: ForwardContext, scale: Tensor, skip: Skip | None) -> tuple[Tensor, Tensor]:
    return block(x, x0, ctx, scale, skip)


@dataclass(frozen=True)
class Regions:
    """The parts of the forward that COMPILE=blocks compiles one by one."""

    embedding: Callable[..., Tensor] = run_embedding
    block: Callable[..., Tensor] = run_block
    head: Callable[..., Tensor] = output_head


class GPT(nn.Module):
    """The hybrid model: one forward for training, evaluation, calibration and test-time training."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        dim, layers = cfg.model_dim, len(cfg.pattern)
        self.tok_emb = nn.Embedding(cfg.vocab_size, dim)
        nn.init.normal_(self.tok_emb.weight, std=cfg.tied_embed_init_std)
        self.bigram = HashEmbedding(cfg.bigram_vocab_size, cfg.bigram_dim, dim, cfg.trigram_hash) if cfg.bigram_vocab_size else None
        self.smear = {"lerp": SmearGate, "lambda": LambdaSmearGate}[cfg.smear_form](dim) if cfg.smear_gate else None
        ve_layers = cfg.layers("ve_layers")
        self.value_embed = ValueEmbedding(cfg.vocab_size, cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim) if ve_layers else None
        mixers: list[nn.Module] = []
        for layer, (letter, owner) in enumerate(zip(cfg.pattern, cfg.owners)):
            mixers.append(mixers[owner] if owner < layer else MIXERS[letter](cfg, layer))
        self.blocks = nn.ModuleList(Block(cfg, layer, mixer) for layer, mixer in enumerate(mixers))
        skips = max(len(self.layer_order(looping)) // 2 for looping in (False, True)) if cfg.unet_skips else 0
        self.skip_weights = nn.ParameterList(nn.Parameter(torch.ones(dim)) for _ in range(skips))
        self.skip_gates = nn.ParameterList(nn.Parameter(torch.zeros(dim)) for _ in range(skips))
        self.final_norm = FinalNorm()
        self.eval_hash: HashEmbedding | None = None  # attached by test-time training
        self.head_adapter: Callable[[Tensor], Tensor] | None = None
        self.before_layer: Callable[[int, Block], None] | None = None  # told each layer call: recurrence calls a block several times
        self.regions = Regions()
        scales = [1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0 for layer in range(layers)]
        self.register_buffer("norm_scales", torch.tensor(scales), persistent=False)
        self.looping = False  # depth recurrence on; part of what a saved model must remember
        self.compute_dtype = torch.float32
        self.kernels = Kernels()
        self.lookback = max(2, cfg.gdn_conv_size - 1)

    def layer_order(self, looping: bool) -> list[int]:
        """Layers in the order they run; depth recurrence repeats its segment."""
        cfg, layers = self.cfg, list(range(len(self.cfg.pattern)))
        if not (looping and cfg.num_loops):
            return layers
        segment = layers[cfg.loop_start : cfg.loop_end + 1]
        return layers[: cfg.loop_end + 1] + segment * cfg.num_loops + layers[cfg.loop_end + 1 :]

    def boundaries(self, ids: Tensor, span: int = 0) -> Tensor | None:
        """Where the documents of ids [B,T] start, for attention that wants to be told (`kernels.document_boundaries`). Waits for the device."""
        if not self.cfg.document_mask or "fa4" not in (self.kernels.full, self.kernels.windowed):
            return None
        return kernels.document_boundaries(document_starts(ids, span))

    def _context(
        self, ids: Tensor, state: DecodeState | None, boundaries: Tensor | None = None, span: int = 0
    ) -> tuple[ForwardContext, list[Tensor]]:
        """The forward's context, and the ids delayed by 1, 2, … for the n-gram tables."""
        cfg, (batch, length), back = self.cfg, ids.shape, self.lookback
        begins = document_starts(ids, span)
        goes_on = state is not None and state.begun
        if goes_on:
            begins[:, 0] |= state.position == 0
            begins = torch.cat((state.slots["begins",][state.rows], begins), 1)
            extended = torch.cat((state.slots["ids",][state.rows], ids), 1)
        else:
            # Nothing precedes the first position, whatever its token; the padding in front counts as starts of other documents.
            begins = torch.cat((begins.new_ones(batch, back + 1), begins[:, 1:]), 1)
            extended = F.pad(ids, (back, 0), value=BOS_ID)
        positions = torch.arange(length, device=ids.device)
        positions = positions + state.position if goes_on else positions
        documents = None
        if cfg.document_mask and not (state is not None and state.one_document):
            if state is None:
                documents = begins[:, back:].int().cumsum(1, dtype=torch.int32)
            else:
                documents = torch.where(begins[:, back:], positions, 0).cummax(1).values
                latest = state.slot(("document",), documents[:, :1])
                documents = documents.maximum(latest) if goes_on else documents
                latest.copy_(documents[:, -1:])
                if state.endless:  # the sink, a key without a position, is seen as from the document's own first token
                    positions = positions - documents
        if state is not None:
            for name, values in (("begins", begins), ("ids", extended)):
                state.slot((name,), values[:, -back:]).copy_(values[:, -back:])
        continues, unbroken = [], torch.ones_like(ids, dtype=torch.bool)
        for n in range(back):
            unbroken = unbroken & ~begins[:, back - n : back - n + length]
            continues.append(unbroken)
        previous = [extended[:, back - n : back - n + length] for n in range(1, back + 1)]
        dims = cfg.rope_dims or cfg.head_dim
        frequency = cfg.rope_base ** (-torch.arange(0, dims, 2, device=ids.device, dtype=torch.float32) / dims)
        angle = positions.float()[..., None] * frequency
        if boundaries is None and not goes_on:
            boundaries = self.boundaries(ids, span)
        longest = min(span or length, length)
        ctx = ForwardContext(angle.cos(), angle.sin(), continues, documents, boundaries, longest, self.kernels, state, goes_on)
        return ctx, previous

    def forward(
        self,
        input_ids: Tensor,
        target_ids: Tensor | None = None,
        *,
        reduction: str = "mean",
        score_last: int = 0,
        state: DecodeState | None = None,
        boundaries: Tensor | None = None,
        span: int = 0,
    ) -> Tensor:
        """Loss or logits of next-token prediction.

        input_ids, target_ids: int64 [B,T]. score_last = n > 0 computes the head for the last n positions alone; n below is then that, else T.
        Returns with targets: the mean loss in nats (float32 scalar), or with reduction="none" the loss a token [B,n];
        without targets: float32 logits [B,n,V], softcapped: their log_softmax is the model's distribution.
        `state` carries a stream over consecutive calls (positions, caches, recurrent states); it is updated in place. `boundaries` are the
        documents' starts as `kernels.document_boundaries` gives them, for a caller who has them without waiting for the GPU. `span` cuts
        documents into pieces of so many tokens, each of which stands alone (DOCUMENT_MASK).
        """
        ctx, previous = self._context(input_ids, state, boundaries, span)
        ctx.call = -1  # the embedding side's own slots
        x = self.regions.embedding(self, input_ids, previous, ctx)
        if self.value_embed is not None:
            ctx.value_embedding = self.value_embed(input_ids, self.compute_dtype)
        x = self._run_layers(x, ctx)
        if state is not None:
            state.advance(input_ids.size(1))
        x = x[..., -score_last:, :] if score_last else x
        targets = target_ids[:, -score_last:] if score_last and target_ids is not None else target_ids
        head = self.regions.head
        weight, cap, fused = self.tok_emb.weight, self.cfg.logit_softcap, self.kernels.fused
        return head(x, self.final_norm, weight, targets, cap, reduction, fused, self.head_adapter)

    def embed(self, input_ids: Tensor, previous: list[Tensor], ctx: ForwardContext) -> Tensor:
        """The residual stream's start [B,T,C]: token and hashed n-gram embeddings, normalized, then smeared."""
        dtype = self.compute_dtype
        x = self.tok_emb(input_ids).to(dtype)
        if self.bigram is not None:
            x = x + self.bigram(input_ids, previous, ctx.continues, dtype)
        if self.eval_hash is not None:
            x = x + self.eval_hash(input_ids, previous, ctx.continues, dtype)
        if self.smear is not None and self.cfg.smear_form == "lambda":
            x = self.smear(x, ctx)
        x = rms_norm(x)
        return self.smear(x, ctx) if self.smear is not None and self.cfg.smear_form == "lerp" else x

    def _run_layers(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        cfg, x0 = self.cfg, x.view_as(x)  # another tensor object: "x is x0" would cost the first block a graph of its own
        order = self.layer_order(self.looping)
        looped = range(cfg.loop_start, cfg.loop_end + 1) if self.looping and cfg.num_loops else ()
        half, kept = len(order) // 2, []
        for call, layer in enumerate(order):
            ctx.call = call
            if self.before_layer is not None:
                self.before_layer(call, self.blocks[layer])
            skip = None
            if cfg.unet_skips and call >= half and kept:
                skip = Skip(kept.pop(), self.skip_weights[call - half], self.skip_gates[call - half])
            scale = self.norm_scales[layer] * (cfg.loop_ln_scale if layer in looped else 1.0)
            x, x0 = self.regions.block(self.blocks[layer], x, x0, ctx, scale, skip)
            if cfg.unet_skips and call < half:
                first = x[0] if x.dim() == 4 else x
                kept.append(
                    first.view_as(first)
                )  # the middle block gets x and this: were they one object, it would need a graph of its own
        return x


def build_model(cfg: Config, device: torch.device | str = "cpu") -> GPT:
    """A freshly initialised model on `device`, its kernels chosen for it. The weights depend on SEED alone, not on the device."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        model = GPT(cfg.model)
    model.to(device)
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.kernels = plan_kernels(cfg, device, compile_mode(cfg.run, device) != "0")
    return model


def compile_mode(cfg: RunConfig, device: torch.device) -> str:
    """'whole', 'blocks' or '0': what COMPILE means on this device."""
    if cfg.compile != "auto":
        return cfg.compile
    return "blocks" if device.type == "cuda" else "0"


# Rows of a width that is no multiple of 128 bytes would be padded, and copied for each of our kernels that wants them close together.
COMPILER_OPTIONS = {"comprehensive_padding": False}


def maybe_compile(model: GPT, cfg: RunConfig) -> Callable[..., Tensor]:
    """The model's forward, compiled as COMPILE says. Same weights: `model` itself stays usable, uncompiled.

    "blocks" compiles each kind of block once, and the head: half a minute for a deep model, and recurrence on or off is the same code.
    "whole" makes one graph of the forward (two with depth recurrence): it fuses across blocks too, and takes minutes to compile.
    """
    mode = compile_mode(cfg, next(model.parameters()).device)
    if mode == "0":
        return model
    # Kinds of block x shapes x gradient modes are counted against one limit, beyond which a whole graph is refused.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if mode == "whole":
        return torch.compile(model, dynamic=False, fullgraph=True, options=COMPILER_OPTIONS)
    regions = (run_embedding, run_block, output_head)
    compiled = Regions(*(torch.compile(region, dynamic=False, fullgraph=True, options=COMPILER_OPTIONS) for region in regions))

    def forward(*args, **kwargs) -> Tensor:
        eager, model.regions = model.regions, compiled
        try:
            return model(*args, **kwargs)
        finally:
            model.regions = eager

    return forward


class Graphed:
    """A function of tensors that is recorded as a CUDA graph for every shape it meets and then replayed: one launch in place of hundreds, the same
    kernels. Not `enabled`: the function.

    Its result lies in the graphs' memory, where the next call overwrites it. What else it reads, weights above all, has to stay where it lies.
    """

    REHEARSALS = 2  # compilers and tuners do their work before the recording

    def __init__(self, function: Callable[..., Tensor], enabled: bool):
        self.function, self.enabled = function, enabled
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}

    def prepare(self, *tensors: Tensor | None, **options) -> tuple:
        """Rehearse and record for such arguments, if that is not done yet; the key of the graph."""
        key = (*(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors), *sorted(options.items()))
        if self.enabled and key not in self.graphs:
            static = [None if tensor is None else tensor.clone() for tensor in tensors]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(self.REHEARSALS):
                    self.function(*static, **options)
            torch.cuda.current_stream().wait_stream(side)
            pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = self.function(*static, **options)
            self.graphs[key] = graph, static, output
        return key

    def __call__(self, *tensors: Tensor | None, **options) -> Tensor:
        if not self.enabled:
            return self.function(*tensors, **options)
        graph, static, output = self.graphs[self.prepare(*tensors, **options)]
        for place, value in zip(static, tensors):
            if place is not None:
                place.copy_(value)
        graph.replay()
        return output


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Parameter table and optimizers
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: who optimizes it, which settings are its rate and decay, and as what it is quantized."""

    name: str
    param: nn.Parameter
    role: str  # embed, hash, mlp, attn, gdn, shift, proj, control: quantize.py's unit of bits and clips
    optimizer: str  # muon or adam
    lr: str  # names of settings in TrainConfig
    weight_decay: str | None

    def rates(self, cfg: TrainConfig) -> tuple[float, float]:
        """(learning rate, weight decay)"""
        decay = "muon_wd" if self.weight_decay == "muon_wd_mlp" and cfg.muon_wd_mlp < 0 else self.weight_decay
        return getattr(cfg, self.lr), getattr(cfg, decay) if decay else 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.param.shape)


# name pattern, role, optimizer, setting of its LR, setting of its weight decay. Every parameter matches exactly one line.
PARAMETER_RULES = (
    (r"tok_emb\.weight", "embed", "adam", "tied_embed_lr", "embed_wd"),
    (r"(bigram|value_embed|eval_hash)\.table\.weight", "hash", "adam", "tied_embed_lr", "embed_wd"),
    (r"(bigram|value_embed)\.proj\.weight", "proj", "muon", "matrix_lr", "muon_wd"),
    (r"blocks\.\d+\.mlp\.(fc|proj)\.weight", "mlp", "muon", "matrix_lr", "muon_wd_mlp"),
    (r"blocks\.\d+\.mixer\.(c_q|c_k|c_v|proj)\.weight", "attn", "muon", "matrix_lr", "muon_wd"),
    (r"blocks\.\d+\.mixer\.[qkvgabo]_proj\.weight", "gdn", "muon", "matrix_lr", "muon_wd"),
    (r"blocks\.\d+\.mixer\.w_[rkv]\.weight", "shift", "muon", "matrix_lr", "muon_wd"),
    (r"blocks\.\d+\.mixer\.(A_log|dt_bias)", "control", "adam", "scalar_lr", None),  # decaying these would set a time scale
    (r"blocks\.\d+\.mixer\.(q_gain|ve_scale|sink|gate|conv|mu_r|mu_k)", "control", "adam", "scalar_lr", "adam_wd"),
    (r"blocks\.\d+\.(resid_mix|mixer_scale|mlp_scale|lane_keep|lane_write)", "control", "adam", "scalar_lr", "adam_wd"),
    (r"skip_(weights|gates)\.\d+|smear\.(gate|scale)|(bigram|eval_hash)\.scale", "control", "adam", "scalar_lr", "adam_wd"),
)


def parameter_table(model: GPT) -> list[ParamSpec]:
    """Every parameter of the model once (shared modules under their first name), matched against PARAMETER_RULES."""
    table = []
    for name, param in model.named_parameters():
        matches = [rule for rule in PARAMETER_RULES if re.fullmatch(rule[0], name)]
        assert len(matches) == 1, f"parameter {name} matches {len(matches)} rules of PARAMETER_RULES; it needs exactly one"
        _, role, optimizer, lr, decay = matches[0]
        assert optimizer != "muon" or param.dim() == 2, f"{name}: Muon takes matrices, not shape {tuple(param.shape)}"
        table.append(ParamSpec(name, param, role, optimizer, lr, decay))
    return table


def nesterov(grads: list[Tensor], buffer: Tensor, momentum: Tensor) -> Tensor:
    """Advance the momentum buffer [N,R,C] by the gradients (a mean, in place) and return the Nesterov look-ahead. Compiled on CUDA: one pass."""
    stacked = torch.stack(grads)
    buffer.lerp_(stacked, 1 - momentum)
    ahead = torch.lerp(stacked, buffer, momentum)
    return ahead.bfloat16() if ahead.is_cuda else ahead


gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it


class Muon:
    """Momentum, orthogonalized: each matrix moves by the Newton-Schulz factor of its Nesterov momentum (Jordan et al., 2024).

    Matrices of one shape are solved as one batch, and the batch is split over ranks: each rank orthogonalizes its part and all gather
    the result, so every rank applies the same update. A shape is gathered while the next one is orthogonalized.
    """

    def __init__(self, table: list[ParamSpec], cfg: TrainConfig, ctx: RunContext, compiled: bool = False):
        self.cfg, self.ctx = cfg, ctx
        groups: dict[tuple, list[ParamSpec]] = {}
        for spec in table:
            if spec.optimizer == "muon":
                groups.setdefault((spec.shape, *spec.rates(cfg)), []).append(spec)
        self.groups = [(specs, torch.zeros(len(specs), *specs[0].shape, device=ctx.device)) for specs in groups.values()]
        self.nesterov = torch.compile(nesterov, dynamic=False, fullgraph=True) if compiled else nesterov

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float, wd_scale: float = 1.0) -> None:
        cfg, world = self.cfg, self.ctx.world_size
        factor = torch.full((), momentum, device=self.ctx.device)  # a tensor: a number would be compiled in
        arriving = []
        for specs, buffer in self.groups:
            update = self.nesterov([spec.param.grad for spec in specs], buffer, factor)
            share = -(-len(specs) // world)
            if world > 1:
                update = F.pad(update, (0, 0, 0, 0, 0, share * world - len(specs)))
            mine = update[self.ctx.rank * share : (self.ctx.rank + 1) * share]
            mine = newton_schulz(mine, cfg.muon_backend_steps, cfg.muon_coefficients, cfg.muon_row_norm)
            if world > 1:
                update = torch.empty_like(update)
                arriving.append((specs, update, self.ctx.exchange("Muon's updates", gather_tensor, update, mine.contiguous())))
            else:
                arriving.append((specs, mine, None))
        for specs, update, wait in arriving:
            if wait:
                wait()
            rows, columns = specs[0].shape
            lr, weight_decay = specs[0].rates(cfg)
            lr *= lr_scale
            params = [spec.param for spec in specs]
            torch._foreach_mul_(params, 1 - lr * weight_decay * wd_scale)
            torch._foreach_add_(params, list(update[: len(specs)].unbind()), alpha=-lr * math.sqrt(max(1.0, rows / columns)))

    def buffers(self) -> dict[str, Tensor]:
        return {f"muon/{spec.name}": buffer[i] for specs, buffer in self.groups for i, spec in enumerate(specs)}


class Optimizers:
    """Muon for the matrices and AdamW for the rest, as the parameter table says; plus what acts on gradients before them."""

    def __init__(self, model: GPT, cfg: TrainConfig, ctx: RunContext, compiled: bool = False):
        self.cfg, self.ctx, self.table = cfg, ctx, parameter_table(model)
        self.muon = Muon(self.table, cfg, ctx, compiled)
        groups: dict[tuple, list[nn.Parameter]] = {}
        for spec in self.table:
            if spec.optimizer == "adam":
                groups.setdefault(spec.rates(cfg), []).append(spec.param)
        self.adam = torch.optim.AdamW(
            [{"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=ctx.device.type == "cuda",
        )

    def reduce_gradients(self, loss: Tensor) -> None:
        """Average gradients, and the loss that is reported, over ranks: one collective over one flat buffer."""
        if self.ctx.world_size == 1:
            return
        tensors = [spec.param.grad for spec in self.table if spec.param.grad is not None] + [loss]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.ctx.exchange("gradients", dist.all_reduce, flat)()
        pieces = flat.div_(self.ctx.world_size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [piece.view_as(tensor) for tensor, piece in zip(tensors, pieces)])

    @torch.no_grad()
    def add_crown_q(self) -> None:
        """Gradient of CROWN-Q, λ/12 · Σ_W mean(w²δ²) with δ = rowmax|w|/15 held constant: it shrinks the weights of wide rows."""
        for spec in self.table:
            if spec.optimizer == "muon" and spec.param.grad is not None:
                delta = spec.param.abs().amax(dim=1, keepdim=True) / 15
                spec.param.grad.add_(spec.param * delta.square(), alpha=self.cfg.crown_q_lambda / 6 / spec.param.numel())

    def step(self, lr_scale: float, momentum: float, wd_scale: float = 1.0) -> None:
        params = [spec.param for spec in self.table]
        if self.cfg.crown_q_lambda and lr_scale < 1:
            self.add_crown_q()
        if self.cfg.grad_clip_norm:
            nn.utils.clip_grad_norm_(params, self.cfg.grad_clip_norm)
        self.muon.step(lr_scale, momentum, wd_scale)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for param in params:
            param.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, by name."""
        names = {spec.param: spec.name for spec in self.table}
        adam = {f"adam/{names[p]}/{key}": value for p, slot in self.adam.state.items() for key, value in slot.items()}
        return {**self.muon.buffers(), **adam}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, buffer in self.muon.buffers().items():
            buffer.copy_(tensors[name])
        params = {spec.name: spec.param for spec in self.table}
        self.adam.state.clear()
        for name, value in tensors.items():
            if name.startswith("adam/"):
                _, parameter, key = name.split("/")
                # AdamW keeps its step count on the CPU unless it is fused.
                device = "cpu" if key == "step" and self.ctx.device.type == "cpu" else self.ctx.device
                self.adam.state[params[parameter]][key] = value.to(device, copy=True)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules: functions of progress, the fraction of the run's budget that is spent
# ----------------------------------------------------------------------------------------------------------------------

# What counts steps in other code bases (momentum warmup, EMA horizon, the switch to depth recurrence) follows progress here. A recipe
# written for 4,900 steps on 8 GPUs then keeps its shape in 60 steps on a CPU, and any run ends annealed, whatever its speed.


def lr_scale(cfg: TrainConfig, progress: float) -> float:
    """Constant, then linear over the last WARMDOWN_FRAC of the budget down to MIN_LR; after a change of sequence length it rises anew."""
    changes = [until for _, until in cfg.sequence_lengths[:-1] if until <= progress]
    if not (changes and cfg.train_seq_rewarmup_frac):
        return warmdown(cfg, progress)
    return warmdown(cfg, progress) * min(1.0, (progress - changes[-1]) / cfg.train_seq_rewarmup_frac)


def warmdown(cfg: TrainConfig, progress: float) -> float:
    return min(1.0, max(cfg.min_lr, (1 - progress) / cfg.warmdown_frac)) if cfg.warmdown_frac else 1.0


def sequence_length(cfg: TrainConfig, progress: float) -> int:
    return next((length for length, until in cfg.sequence_lengths if progress < until), cfg.train_seq_len)


def training_graphs(cfg: Config) -> list[tuple[int, bool]]:
    """(tokens a sequence, recurrence on) of every kind of step that a run takes, in order."""
    edges = sorted({0.0, cfg.train.enable_looping_at, *(until for _, until in cfg.train.sequence_lengths[:-1])})
    graphs = [
        (sequence_length(cfg.train, edge), bool(cfg.model.num_loops and edge >= cfg.train.enable_looping_at)) for edge in edges if edge < 1
    ]
    return list(dict.fromkeys(graphs))


def wd_scale(cfg: TrainConfig, progress: float) -> float:
    """Of the matrices' weight decay: 1, from MUON_WD_TAPER_START on linear to MUON_WD_TAPER_END."""
    fraction = (progress - cfg.muon_wd_taper_start) / (1 - cfg.muon_wd_taper_start) if cfg.muon_wd_taper_start < 1 else 0.0
    return 1 + (cfg.muon_wd_taper_end - 1) * min(1.0, max(0.0, fraction))


def muon_momentum(cfg: TrainConfig, progress: float) -> float:
    """From MUON_MOMENTUM_WARMUP_START up to MUON_MOMENTUM and, where there is a cooldown, back down at the end, linearly both times."""
    fraction = min(1.0, progress / cfg.muon_momentum_warmup_frac) if cfg.muon_momentum_warmup_frac else 1.0
    if cfg.muon_momentum_cooldown_frac:
        fraction = min(fraction, max(0.0, (1 - progress) / cfg.muon_momentum_cooldown_frac))
    return cfg.muon_momentum_warmup_start + (cfg.muon_momentum - cfg.muon_momentum_warmup_start) * fraction


def ema_decay(cfg: TrainConfig, advance: float) -> float:
    """Decay over a step that spends `advance` of the budget: EMA_DECAY per step when REFERENCE_STEPS such steps make the run."""
    return cfg.ema_decay ** (cfg.reference_steps * advance)


def qat_active(cfg: TrainConfig, progress: float) -> bool:
    by_lr = cfg.late_qat_threshold > 0 and warmdown(cfg, progress) < cfg.late_qat_threshold
    return by_lr or (cfg.qat_last_frac > 0 and progress >= 1 - cfg.qat_last_frac)


def training_progress(cfg: TrainConfig, step: int, elapsed: float) -> float:
    """Fraction spent of whichever budget ends the run first: steps, or wallclock less what calibration keeps back."""
    progress = step / cfg.iterations
    if cfg.max_wallclock_seconds:
        progress = max(progress, elapsed / (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds))
    return progress


def length_warnings(cfg: Config, steps: float) -> list[str]:
    """What cannot work in a run of so few steps."""
    warnings = []
    if steps < 100:
        warnings.append(f"only about {steps:.0f} steps fit the budget: a smaller TRAIN_BATCH_TOKENS would train better")
    if cfg.train.ema_decay:
        horizon = -steps / (cfg.train.reference_steps * math.log(cfg.train.ema_decay))
        if horizon < 3:
            warnings.append(f"the EMA averages over {horizon:.1f} steps only")
        if horizon > steps / 4:
            warnings.append(
                f"the EMA's horizon of {horizon:.0f} steps is over a quarter of the run: EMA_DECAY and REFERENCE_STEPS disagree"
            )
    for name, fraction in (("MUON_MOMENTUM_WARMUP_FRAC", cfg.train.muon_momentum_warmup_frac), ("WARMDOWN_FRAC", cfg.train.warmdown_frac)):
        if fraction and fraction * steps < 5:
            warnings.append(f"{name}={fraction} is {fraction * steps:.1f} steps")
    if cfg.model.num_loops and (1 - cfg.train.enable_looping_at) * steps < 10:
        warnings.append("depth recurrence trains for fewer than 10 steps")
    return warnings


@dataclass(frozen=True)
class BatchPlan:
    """How a step's rows divide: over ranks, then over micro-batches."""

    seq_len: int  # tokens of context: a row's, or those after which a document in a longer row is cut
    row_tokens: int
    sequences: int  # a step, all ranks
    per_rank: int
    per_micro: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.row_tokens

    @property
    def span(self) -> int:
        """For the forward: 0 where rows are no longer than the context."""
        return self.seq_len if self.row_tokens > self.seq_len else 0

    def __str__(self) -> str:
        cut = f", documents cut every {self.span}" if self.span else ""
        return f"{self.sequences} x {self.row_tokens} = {self.tokens:,} tokens a step{cut}"

    @property
    def accumulation(self) -> int:
        return self.per_rank // self.per_micro


def plan_batch(cfg: TrainConfig, ctx: RunContext, seq_len: int = 0) -> BatchPlan:
    """Derive gradient accumulation for sequences of `seq_len` (0: TRAIN_SEQ_LEN); refuse sizes that do not divide, naming the nearest that would."""
    per_gpu, context, world = cfg.train_batch_tokens_per_gpu, seq_len or cfg.train_seq_len, ctx.world_size
    share, rest = (per_gpu, 0) if per_gpu else divmod(cfg.train_batch_tokens, world)
    seq = max(cfg.train_row_tokens if rest else min(cfg.train_row_tokens, share), context)
    name = "TRAIN_BATCH_TOKENS_PER_GPU" if per_gpu else "TRAIN_BATCH_TOKENS"
    total, unit = (per_gpu, seq) if per_gpu else (cfg.train_batch_tokens, seq * world)
    if total % unit:
        near = sorted({max(unit, total // unit * unit), (total // unit + 1) * unit})
        of = "TRAIN_ROW_TOKENS=" if seq > context else "TRAIN_SEQ_LEN=" if seq == cfg.train_seq_len else "TRAIN_SEQ_SCHEDULE's "
        what = f"{of}{seq}" + ("" if per_gpu else f" times {world} rank(s)")
        raise UserError(f"{name}={total} is not a multiple of {what}; {' or '.join(map(str, near))} would be")
    per_rank = total // unit
    if cfg.micro_batch_tokens:
        per_micro, rest = divmod(cfg.micro_batch_tokens, seq)
        if rest or not per_micro or per_rank % per_micro:
            good = [seq * n for n in range(1, min(per_rank, 4096) + 1) if per_rank % n == 0]
            raise UserError(
                f"MICRO_BATCH_TOKENS={cfg.micro_batch_tokens} does not divide the {per_rank * seq} tokens of a rank; "
                f"sizes that do: {', '.join(map(str, good[:12]))}"
            )
    else:
        limit = 131072 if ctx.device.type == "cuda" else 16384  # tokens whose logits and activations fit comfortably
        per_micro = max(n for n in range(1, min(per_rank, max(1, limit // seq)) + 1) if per_rank % n == 0)
    return BatchPlan(context, seq, per_rank * world, per_rank, per_micro)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Inputs tokens[start:end], of which targets score_from … end−1 are scored. Target i is tokens[i+1], predicted from tokens[..i]."""

    start: int
    score_from: int
    end: int


def plan_windows(num_targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows that score each target of one text exactly once, with as much context as they can.

    All are min(seq_len, num_targets) long. The first scores all of its own, later ones `stride` each; the last one slides back to end at the
    last target and scores what is left.
    """
    _check_stride(seq_len, stride)
    length = min(seq_len, num_targets)
    windows, scored = [Window(0, 0, length)], length
    while scored < num_targets:
        end = min(scored + stride, num_targets)
        windows.append(Window(end - length, scored, end))
        scored = end
    return windows


def document_windows(tokens: Tensor, seq_len: int, stride: int, first: int = 0, last: int | None = None) -> list[Window]:
    """Windows that score targets first … last−1 (None: all) of a stream of documents, each document from its own first token.

    A document's inputs are its BOS to its last token, so its targets are its second token to the BOS after it: what ends a document is
    predicted by it. (Text before the first BOS is a document too.) A document's first window scores seq_len targets, later ones `stride` each
    with the seq_len − stride tokens before them as context. Where a document ends decides nothing but where its last window ends: no
    score depends on what comes after its target.
    """
    _check_stride(seq_len, stride)
    last = len(tokens) - 1 if last is None else last
    begun = (tokens[: first + 1] == BOS_ID).nonzero()[-1:].flatten().tolist() or [0]
    starts = begun + ((tokens[first + 1 : last] == BOS_ID).nonzero().flatten() + first + 1).tolist()
    windows = []
    for start, document_end in zip(starts, [*starts[1:], last]):
        after = max(0, first - start - seq_len)  # targets beyond the first window that are not asked for
        scored = start if first < start + seq_len else start + seq_len + after // stride * stride
        while scored < document_end:
            end = scored + (seq_len if scored == start else stride)
            windows.append(Window(end - seq_len, max(scored, first), min(end, document_end)))
            scored = end
    return windows


def _check_stride(seq_len: int, stride: int) -> None:
    if stride > seq_len:
        raise UserError(f"EVAL_STRIDE={stride} is longer than the window of {seq_len}: tokens would never be scored")


SHORTEST_PADDED = 64


def padded_length(length: int, seq_len: int) -> int:
    """The length that a window is filled up to: 64, 128, 256, … or seq_len.

    Few lengths are few compilations. And a window's own length decides alone, so that its scores do not depend on which others it is
    batched with: on a CPU, to the bit (kernels work in blocks of at most 64 rows).
    """
    return next(padded for padded in padded_lengths(seq_len) if padded >= length)


def padded_lengths(seq_len: int) -> list[int]:
    return [*itertools.takewhile(lambda padded: padded < seq_len, (SHORTEST_PADDED << n for n in itertools.count())), seq_len]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU on the device, without waiting for it: a copy from pageable memory begins when all else there is done."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


FILL_ID = 0  # behind a window's end. Not BOS: thousands of documents of one token cost attention by document more than the text


def score_windows(
    forward: Callable[..., Tensor], tokens: Tensor, windows: list[Window], seq_len: int, stride: int, batch_seqs: int, whole: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score windows, batches of like ones at a time; yields (target positions int64 [n] on the CPU, what `forward` gives there [n, …]), ascending
    only within a batch. A batch is `batch_seqs` windows of seq_len, or as many more as the windows are shorter. whole: all are filled up to
    seq_len, so that no shape tells where a document ends. What is to be scored is planned on the CPU: nothing here waits for the device.
    """
    device, groups = tokens.device, {}
    for window in windows:
        width = seq_len if whole else padded_length(window.end - window.start, seq_len)
        scored = width - (window.score_from - window.start)  # counted from the padded end
        narrow = scored <= stride and width == seq_len  # a shorter window's whole head costs less than another shape to compile
        groups.setdefault((width, min(stride, width) if narrow else width), []).append(window)
    for (width, scored), members in groups.items():
        rows, offsets = batch_seqs * seq_len // width, torch.arange(width, device=device)
        for at in range(0, len(members), rows):
            start, score_from, end = torch.tensor(members[at : at + rows]).T[..., None]
            there = sent(start, device) + offsets
            inside = there < sent(end, device)
            inputs, targets = (tokens[(there + ahead).clamp_max(len(tokens) - 1)].long() for ahead in (0, 1))
            with torch.no_grad():  # the padding is constant: nothing of the text behind a window gets in
                values = forward(inputs.where(inside, FILL_ID), targets.where(inside, FILL_ID), reduction="none", score_last=scored)
            index = start + torch.arange(width - scored, width)
            wanted = (index >= score_from) & (index < end)
            yield index[wanted], values[tuple(sent(part, device) for part in wanted.nonzero(as_tuple=True))].float()


@dataclass(frozen=True)
class EvalResult:
    val_loss: float  # nats a token
    val_bpb: float  # bits a byte of raw text
    tokens_scored: int
    bytes_scored: int
    seconds: float


def eval_batch_size(cfg: EvalConfig, seq_len: int, device: torch.device) -> int:
    """Windows a forward: EVAL_BATCH_SEQS, or what fills the device."""
    return cfg.eval_batch_seqs or max(1, (131072 if device.type == "cuda" else 8192) // seq_len)


def evaluate(
    forward: Callable[..., Tensor], tokens: Tensor, byte_table: ByteTable, cfg: EvalConfig, ctx: RunContext, seq_len: int, stride: int
) -> EvalResult:
    """Bits per byte of `tokens` under sliding windows, split over ranks; every target is scored exactly once, which is asserted.

    `forward` is the model or its compiled form. stride == seq_len gives non-overlapping windows. EVAL_BY_DOCUMENT scores each document alone.
    """
    if len(tokens) < 2:
        raise UserError("the validation split has fewer than two tokens: nothing to score")
    began, targets, tokens = time.perf_counter(), len(tokens) - 1, tokens.to(ctx.device)
    windows = document_windows(tokens, seq_len, stride) if cfg.by_document else plan_windows(targets, seq_len, stride)
    # Sums are taken over the gathered scores: they do not depend on the number of ranks.
    nll, times = torch.zeros(2, targets, device=ctx.device)
    mine, batch = windows[ctx.rank :: ctx.world_size], eval_batch_size(cfg, seq_len, ctx.device)
    with ctx.progress("sliding windows" if stride < seq_len else "validation", targets) as advance:
        for positions, values in score_windows(forward, tokens, mine, seq_len, stride, batch):
            positions = sent(positions, ctx.device)
            nll[positions] = values
            times.index_add_(0, positions, torch.ones_like(values))
            advance(len(positions) * ctx.world_size)
    nll, times = ctx.all_reduce_sum(nll), ctx.all_reduce_sum(times)
    assert bool((times == 1).all()), f"{int((times != 1).sum())} of {targets} targets were not scored exactly once"
    nll_sum, byte_sum = nll.cpu().double().sum().item(), int(byte_table.to(ctx.device).targets(tokens).sum())
    if not byte_sum:
        raise UserError("the validation tokens stand for no bytes: is the tokenizer the right one?")
    seconds = time.perf_counter() - began
    return EvalResult(nll_sum / targets, nll_sum / math.log(2) / byte_sum, targets, byte_sum, seconds)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading: safetensors throughout, no pickle
# ----------------------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping) -> None:
    """Tensors and a JSON header with a checksum over both, written atomically, readable as the umask says. OSError if there is no room."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(meta)
    data = save(tensors, {"meta": text, "sha256": tensors_digest(tensors, text)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def read_header(path: Path) -> dict[str, str]:
    """The texts that `save_tensors` put before the tensors. Raises OSError, or one of UNREADABLE."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(length, 1 << 26)))["__metadata__"]


UNREADABLE = (ValueError, KeyError, TypeError, RecursionError, OverflowError)  # what damaged bytes make of a parser


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_tensors` wrote; a file that is damaged by as little as a bit is a UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        header = read_header(path)
        tensors, digest, meta = load(path.read_bytes()), header["sha256"], json.loads(header["meta"])
    except (SafetensorError, OSError, *UNREADABLE) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if tensors_digest(tensors, header["meta"]) != digest:
        raise UserError(f"{path} is damaged: its contents do not have the checksum that was stored with them")
    return tensors, meta


def tensors_digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over `text` and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_meta(path: Path, meta: object, kinds: Mapping[str, type | tuple[type, ...]], what: str) -> None:
    """Refuse a header that lacks one of `kinds` or holds another type there."""
    if not isinstance(meta, dict) or not all(isinstance(meta.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path} is not {what}")


def load_weights(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the model; names and shapes must agree exactly."""
    params = dict(model.named_parameters())
    if set(params) != set(weights):
        odd = sorted(set(params) ^ set(weights))[0]
        raise UserError(f"these weights are not this model's: parameter {odd} is on one side only")
    with torch.no_grad():
        for name, param in params.items():
            if param.shape != weights[name].shape:
                raise UserError(f"{name} is {tuple(weights[name].shape)} in the file, {tuple(param.shape)} in the model")
            param.copy_(weights[name])


def model_digest(run_dir: str | Path) -> str:
    """The checksum of a run's model, over weights and header: what its training log and its artifact say they are of."""
    path = Path(run_dir) / "model.safetensors"
    try:
        return read_header(path)["sha256"]
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


RUN_META = {"config": dict, "looping": bool, "steps": int, "train_seconds": (int, float), "tokenizer_sha256": str}


def load_run(run_dir: str | Path) -> tuple[dict, dict[str, Tensor], dict]:
    """A finished run: (its settings, weights as float32 by name, metadata: those of RUN_META and more)."""
    path = Path(run_dir) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist: is {run_dir} a finished run?")
    weights, meta = load_tensors(path)
    check_meta(path, meta, RUN_META, "a run's model")
    return meta["config"], weights, meta


class TrainingDiverged(UserError):
    """The loss or the weights stopped being numbers."""


@dataclass
class TrainState:
    """All that a resumed run continues from."""

    model: GPT
    optimizers: Optimizers
    stream: TokenStream
    ema: list[Tensor]
    step: int = 0
    elapsed: float = 0.0  # seconds of the budget spent

    def tensors(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.model.named_parameters()]
        tensors = {f"model/{name}": param for name, param in self.model.named_parameters()}
        tensors.update({f"ema/{name}": value for name, value in zip(names, self.ema)})
        tensors.update(self.optimizers.state())
        # Every rank draws the same random numbers, so rank 0's generators are everyone's.
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.optimizers.ctx.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        return tensors

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What keeps `load` from taking these tensors; None if nothing does."""
        shapes = {name: param.shape for name, param in self.model.named_parameters()}
        expected = {f"model/{name}": shape for name, shape in shapes.items()}
        expected |= {f"ema/{name}": value.shape for name, value in zip(shapes, self.ema)}
        expected |= {name: buffer.shape for name, buffer in self.optimizers.muon.buffers().items()}
        expected["rng/cpu"] = torch.get_rng_state().shape
        if any(name.startswith("adam/") for name in tensors):  # there is no such state before the first step
            for spec in self.optimizers.table:
                if spec.optimizer == "adam":
                    expected |= {f"adam/{spec.name}/{key}": spec.param.shape for key in ("exp_avg", "exp_avg_sq")}
                    expected[f"adam/{spec.name}/step"] = torch.Size()
        if missing := sorted(expected.keys() - tensors.keys()):
            return f"{missing[0]} is missing"
        for name, tensor in tensors.items():
            shape = expected.get(name, tensor.shape if name == "rng/cuda" else None)
            if tensor.shape != shape:
                return f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}" if shape is not None else f"{name} is none of its tensors"
        return None

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        params = dict(self.model.named_parameters())
        load_weights(self.model, {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")})
        for name, value in zip(params, self.ema):
            value.copy_(tensors[f"ema/{name}"])
        self.optimizers.load_state(tensors)
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and self.optimizers.ctx.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng/cuda"])

    def assert_finite(self) -> None:
        """Refuse to save what can never be trained or evaluated again."""
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise TrainingDiverged(f"{name} holds values that are no numbers at step {self.step}: nothing of this step is saved")

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model holds the EMA weights inside this context."""
        params = [param.data for param in self.model.parameters()]
        kept = [param.clone() for param in params] if self.ema else []
        torch._foreach_copy_(params, self.ema) if self.ema else None
        try:
            yield
        finally:
            torch._foreach_copy_(params, kept) if self.ema else None


CHECKPOINTS_KEPT = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    return sorted((folder / "checkpoints").glob("step_*.safetensors"), reverse=True)


def save_checkpoint(state: TrainState, cfg: Config, folder: Path, made_from: Mapping) -> Path:
    """checkpoints/step_0000500.safetensors, written atomically; older ones beyond the last two are removed, the last but one where the disk
    has no room otherwise. OSError if it has none even so."""
    state.assert_finite()
    path = folder / "checkpoints" / f"step_{state.step:07d}.safetensors"
    for leftover in path.parent.glob(".step_*.tmp"):  # of a run killed while it wrote
        leftover.unlink()
    meta = {
        "config": cfg.to_dict(),
        "step": state.step,
        "elapsed": state.elapsed,
        "position": state.stream.position,
        "stream_tokens": state.stream.total_tokens,
        "looping": state.model.looping,
        **made_from,
    }
    try:
        save_tensors(path, state.tensors(), meta)
    except OSError as error:
        older = [old for old in list_checkpoints(folder) if old != path][1:]
        if not older or error.errno not in NO_ROOM:
            raise
        for old in older:
            old.unlink()
        save_tensors(path, state.tensors(), meta)
    for old in list_checkpoints(folder)[CHECKPOINTS_KEPT:]:
        old.unlink()
    return path


CHECKPOINT_META = {
    "config": dict, "step": int, "elapsed": (int, float), "position": int, "stream_tokens": int, "looping": bool, "batch_tokens": int,
    "tokenizer_sha256": str, "train_data_sha256": str, "val_data_sha256": str, "code_sha256": str,
}  # fmt: skip


def read_last_checkpoint(folder: Path, state: TrainState, log: Callable[[str], None]) -> tuple[Path, dict[str, Tensor], dict] | None:
    """The newest checkpoint that is whole and fits; None if the run has written none. Those passed over are set aside under another name."""
    passed = []
    for path in list_checkpoints(folder):
        try:
            tensors, meta = load_tensors(path)
            check_meta(path, meta, CHECKPOINT_META, "a checkpoint of a run")
            if fault := state.misfit(tensors):
                raise UserError(f"{path} is not of this model: {fault}")
            if fault := of_another_run(folder, meta["config"]):
                raise UserError(f"{path} is of another run: {fault}")
        except UserError as error:
            passed.append(path.with_suffix(".damaged"))
            path.rename(passed[-1])
            log(f"warning: {error}; it is kept as {passed[-1].name}")
            continue
        if passed:
            log(f"warning: continuing from {path.name}, the one before {', '.join(p.stem for p in passed)}")
        return path, tensors, meta
    if passed:
        raise UserError(f"no checkpoint in {folder / 'checkpoints'} can be read; the files are kept as *.damaged")
    return None


def restore_checkpoint(state: TrainState, cfg: Config, folder: Path, ctx: RunContext, made_from: Mapping) -> Path | None:
    """Continue from the last good checkpoint of the run; None if it has none. Rank 0 reads, so only its disk need hold it.

    Refused if it would go on with other data, another tokenizer, other batches, or settings that the run's course depends on.
    """
    found: dict = {}

    def look() -> tuple[Path, dict] | None:
        path, found["tensors"], meta = read_last_checkpoint(folder, state, ctx.log) or (None, {}, None)
        return path, meta

    path, meta = ctx.on_main(look)
    if meta is None:
        ctx.log("resume: no checkpoint yet, starting from the beginning")
        ctx.metric("resume", step=0)
        return None
    for line in changes_of_course(cfg, meta["config"]):
        ctx.log(f"resume: {line}")
    for key, what in CONTENT.items():
        if made_from[key] != meta[key]:
            line = f"{what} of this run, SHA-256 {made_from[key][:12]}…, is not that of {path.name}, {meta[key][:12]}…"
            if key in ("train_data_sha256", "tokenizer_sha256"):
                raise UserError(f"{line}: it would go on with something else than it began with")
            ctx.log(f"warning: resume: {line}")
    if meta["batch_tokens"] != made_from["batch_tokens"]:
        raise UserError(f"a step takes {made_from['batch_tokens']:,} tokens here, but the run began with {meta['batch_tokens']:,}")
    state.load(ctx.broadcast_tensors(found.get("tensors", {})))
    state.step, state.elapsed, state.stream.position = meta["step"], meta["elapsed"], meta["position"]
    state.model.looping = meta["looping"]
    before = training_progress(Config.from_dict(known_settings(meta["config"])).train, state.step, state.elapsed)
    progress = training_progress(cfg.train, state.step, state.elapsed)
    if before >= 1 > progress:
        ctx.log(f"resume: the run was finished; it is extended, and its schedules go back from 100% to {progress:.1%} of the budget")
    ctx.log(f"resume: step {state.step}, {state.elapsed:.1f}s of the budget spent ({path.name})")
    ctx.metric("resume", step=state.step, elapsed=round(state.elapsed, 3), progress=progress, checkpoint=path.name)
    return path


# What a checkpoint, a model and an artifact say they were made from.
CONTENT = {
    "tokenizer_sha256": "the tokenizer",
    "train_data_sha256": "the training data",
    "val_data_sha256": "the validation data",
    "code_sha256": "the code",
}

# Settings that a resumed run may change: its budget, its reports, how the work is cut. The rest of training would make it another run.
MAY_CHANGE = {
    "iterations", "max_wallclock_seconds", "gptq_reserve_seconds", "micro_batch_tokens", "warmup_steps", "val_loss_every", "val_tokens",
    "train_log_every", "checkpoint_every", "checkpoint_seconds",
}  # fmt: skip


def fixes_course(name: str) -> bool:
    """Whether a setting is the same from a run's first step to its last."""
    return name == "seed" or (PART_OF[name] in ("model", "train") and name not in MAY_CHANGE)


def changes_of_course(cfg: Config, before: Mapping) -> list[str]:
    """What differs from the settings a run has had, a line each; refused where the run's course depends on it."""
    lines = []
    for name, value in cfg.to_dict().items():
        old = before.get(name, value)
        if value == old or name in ("resume", "run_id"):
            continue
        if fixes_course(name):
            raise UserError(f"{name.upper()}={value}, but the run began with {old}; unset it to continue the run, or choose another RUN_ID")
        lines.append(f"{name.upper()} changes from {old} to {value}")
    return lines


def of_another_run(folder: Path, stored: Mapping) -> str | None:
    """In what the settings `stored` in a file of `folder` are not those of its run, as config.json has them; None if in nothing that the run's
    course depends on, or if config.json cannot tell."""
    try:
        own = Config.from_dict(known_settings((read_json(folder / "config.json") or {})["config"])).to_dict()
    except (UserError, KeyError, AttributeError):
        return None
    other = (name for name, value in own.items() if fixes_course(name) and stored.get(name, value) != value)
    return next((f"{name.upper()} is {stored[name]} there and {own[name]} in config.json" for name in other), None)


def run_settings(folder: Path) -> dict | None:
    """The settings of the run in `folder`, from its newest checkpoint, its model or config.json; None if there is no run.

    Headers only: what is continued in the end is checked as a whole by `restore_checkpoint`.
    """
    if not run_started(folder):
        return None
    for path in [*list_checkpoints(folder), folder / "model.safetensors"]:
        try:
            meta = json.loads(read_header(path)["meta"])
            if isinstance(meta["config"], dict) and not of_another_run(folder, meta["config"]):
                return meta["config"]
        except (OSError, *UNREADABLE):
            continue
    settings = (read_json(folder / "config.json") or {}).get("config")
    if not isinstance(settings, dict):
        raise UserError(f"{folder} holds a run, but nothing in it tells its settings: choose another RUN_ID, or remove the folder")
    return settings


def run_started(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "model.safetensors", "checkpoints"))


def code_digest() -> str:
    """SHA-256 over this file and the modules that it may load."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in [Path(__file__), *sorted((root / "data").glob("*.py")), *sorted((root / "parts").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# What --print-config and --describe show
# ----------------------------------------------------------------------------------------------------------------------


def config_lines(cfg: Config, find: str | None = None) -> list[str]:
    """Every setting with its value and origin; given `find`, those whose name or help holds it, each with help and limits."""
    width, lines = max(len(f.name) for f in settings()), []
    for f in settings():
        line = f"{f.name.upper():<{width}}  {_env_text(cfg[f.name]):<44}  {cfg.origins.get(f.name, 'default')}"
        if find is None:
            lines.append(line)
        elif find.lower() in f"{f.name} {f.metadata['help']}".lower():
            lines += [line, f"    {f.metadata['help']}{_limits(f)}"]
    return lines


def chosen_settings(cfg: Config, *parts: str, known: tuple[str, ...] = ("default",)) -> list[str]:
    """The settings of these parts that come from elsewhere than the `known` origins, by origin, for a log: few lines, in a shell's form."""
    chosen: dict[str, list[str]] = {}
    for spec in settings(*parts):
        if (origin := cfg.origins.get(spec.name, "default")) not in known:
            chosen.setdefault(origin, []).append(f"{spec.name.upper()}={shlex.quote(_env_text(cfg[spec.name]) or 'none')}")
    how = {"width": 140, "subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return [line for origin, words in chosen.items() for line in textwrap.wrap(f"{origin}: {' '.join(words)}", **how)]


def _limits(spec: dataclasses.Field) -> str:
    limits = spec.metadata
    if words := limits["choices"] or limits["several"]:
        return f" [{'any' if limits['several'] else 'one'} of {', '.join(words)}]"
    if spec.type == "bool":
        return " [0 or 1]"
    low, high = ("" if limits[end] is None else f"{limits[end]:g}" for end in ("low", "high"))
    return f" [{low} to {high}]" if low and high else f" [from {low}]" if low else ""


def _env_text(value) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def flops_per_token(model: GPT, seq_len: int) -> float:
    """Forward and backward FLOPs a token (6 a weight in use, recurrence counted, plus attention's two products)."""
    cfg = model.cfg
    order = model.layer_order(model.looping)
    linear = sum(m.weight.numel() for layer in order for m in model.blocks[layer].modules() if isinstance(m, Linear))
    head = model.tok_emb.weight.numel()
    full, window = cfg.model_dim * seq_len / 2, cfg.model_dim * min(cfg.window_size, seq_len / 2)
    widths = {"A": full, "S": window, "G": cfg.gdn_v_heads * cfg.gdn_head_dim**2}
    mixing = sum(2 * 2 * widths.get(cfg.pattern[layer], 0) for layer in order)
    return 6.0 * (linear + head) + 3.0 * mixing


# Bits a symbol that entropy coding leaves, for Gaussian rows under SDClip: h(N(0,σ²)) − log2(step) = log2(√(2πe)) + log2(levels/k).
GAUSSIAN_ENTROPY_BITS = math.log2(math.sqrt(2 * math.pi * math.e))


def estimate_bytes(model: GPT, cfg: QuantConfig) -> int:
    """Size of the packed weights before training, from MATRIX_BITS, EMBED_BITS and the clips alone (no overrides, no split)."""
    total = 0.0
    clips = {"mlp": cfg.mlp_clip_sigmas, "attn": cfg.attn_clip_sigmas, "embed": cfg.embed_clip_sigmas, "hash": cfg.embed_clip_sigmas}
    for spec in parameter_table(model):
        if spec.role == "control":
            total += 2 * spec.param.numel()
            continue
        bits = cfg.embed_bits if spec.role in ("embed", "hash") else cfg.matrix_bits
        k = clips.get(spec.role) or cfg.matrix_clip_sigmas
        symbol = min(bits, GAUSSIAN_ENTROPY_BITS + math.log2((2 ** (bits - 1) - 1) / k))
        total += spec.param.numel() * symbol / 8 + 2 * spec.shape[0]
    return int(total)


def layer_line(model: GPT, layer: int) -> str:
    """One layer's kind and what is switched on in it."""
    cfg, letter = model.cfg, model.cfg.pattern[layer]
    parts: list[str] = []
    if letter in ATTENTION_KINDS:
        windowed = MIXERS[letter].windowed
        parts += [f"{cfg.num_heads}/{cfg.num_kv_heads} heads x {cfg.head_dim}", f"rope {cfg.rope_dims or cfg.head_dim}/{cfg.head_dim}"]
        parts += [f"window {cfg.window_size}"] if windowed else []
        parts += [f"gain {cfg.qk_gain_init:g}"]
        parts += ["xsa"] * (layer in cfg.layers("xsa_layers")) + ["value embedding"] * (layer in cfg.layers("ve_layers"))
        parts += ["sink"] * (cfg.attn_sink and not windowed)
        plain = cfg.attn_gate_max == 2 and cfg.attn_gate_scale == 1
        gate = f"gate {cfg.attn_gate_width}" + ("" if plain else f" {cfg.attn_gate_max:g}·σ({cfg.attn_gate_scale:g}·)")
        parts += [gate] if cfg.attn_gate_width else []
    elif letter == "G":
        parts += [f"{cfg.gdn_qk_heads} q/k and {cfg.gdn_v_heads} v heads x {cfg.gdn_head_dim}", f"conv {cfg.gdn_conv_size}"]
        parts += [cfg.gdn_feature_map] + ["output norm"] * cfg.gdn_output_norm
    owner = cfg.owners[layer]
    parts += [f"weights of layer {owner}"] if owner != layer else []
    parts += [("parallel", "two lanes")[model.blocks[layer].lanes - 1]] if model.blocks[layer].parallel else []
    return f"  {layer:>2} {letter} {LAYER_KINDS[letter]:<15} {', '.join(parts)}"


def describe(model: GPT, cfg: Config) -> list[str]:
    """The model as its card would put it."""
    shape, pattern = cfg.model, cfg.model.pattern
    lines = [
        f"{len(pattern)} layers {pattern}, dim {shape.model_dim}, vocab {shape.vocab_size}, tied embeddings, softcap {shape.logit_softcap:g}"
    ]
    lines += [layer_line(model, layer) for layer in range(len(pattern))]
    lines.append(f"  MLP {shape.mlp_mult:g}x {shape.mlp_act}" + (", norm scale 1/sqrt(layer+1)" if shape.ln_scale else ""))
    if shape.bigram_vocab_size:
        grams = "bigrams and trigrams" if shape.trigram_hash else "bigrams"
        lines.append(f"  hash embedding {shape.bigram_vocab_size} x {shape.bigram_dim}, {grams}")
    if shape.smear_gate:
        lines.append("  smear gate" + (" (lambda form, before the norm)" if shape.smear_form == "lambda" else ""))
    if shape.num_loops:
        order = " ".join(map(str, model.layer_order(True)))
        lines.append(f"  depth recurrence from {cfg.train.enable_looping_at:.0%} of the budget: {order}")
    if shape.unet_skips:
        lines.append(f"  {len(model.skip_weights)} gated U-Net skips")
    roles: dict[str, list[int]] = {}
    for spec in parameter_table(model):
        roles.setdefault(f"{spec.role} ({spec.optimizer})", []).append(spec.param.numel())
    for role, sizes in roles.items():
        lines.append(f"  {role:<16} {sum(sizes):>12,} parameters in {len(sizes)} tensors")
    packed = f"about {estimate_bytes(model, cfg.quant):,} bytes packed at int{cfg.quant.matrix_bits}"
    lines.append(f"{count_params(model):,} parameters, {packed} (limit {SIZE_LIMIT_BYTES:,} with code)")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense, by the vendor's datasheets


def attach_fake_quantize(model: GPT, cfg: Config) -> None:
    """Late QAT on the linear layers that QAT_TARGETS names; without effect until `set_qat_strength`."""
    qat = cfg.train
    if not qat.late_qat_threshold and not qat.qat_last_frac:
        return
    for name, module in model.named_modules():
        if isinstance(module, Linear) and re.search(qat.qat_targets, name):
            module.fake_quantize = FakeQuantize(qat.qat_bits, cfg.quant.matrix_clip_sigmas, qat.qat_mode, qat.qat_noise_scale)
            module.fake_quantize.to(module.weight.device)


def set_qat_strength(model: GPT, strength: float) -> None:
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.strength.fill_(strength)


def random_state(device: torch.device) -> list[Tensor]:
    """The generators that training draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(generators: list[Tensor]) -> None:
    torch.set_rng_state(generators[0])
    for state in generators[1:]:
        torch.cuda.set_rng_state(state)


RETRY_SECONDS = 30.0  # between attempts to save on a full disk
# That a step may go on once its end was asked for, before it is taken to wait for a rank that is gone. torchrun kills after 30.
LOST_SECONDS = 20.0


@dataclass
class Saved:
    """The last checkpoint of this process."""

    step: int = -1
    path: Path | None = None
    at: float = 0.0  # monotonic seconds
    retry_at: float | None = None  # after an attempt that failed


class MicroStep:
    """Forward and backward of one micro-batch: adds to the parameters' gradients and returns the loss.

    One takes some two thousand launches, for which the host needs about 60 ms: longer than an H100 computes on 65,536 tokens. So where `graphed`,
    a micro-batch that has run a few times (compiled, tuned) is captured as a CUDA graph and replayed as one launch, a graph for each shape,
    with and without recurrence. The graphs share one memory pool and one set of gradients, into which they add.
    """

    EAGER_RUNS = 2

    def __init__(self, model: GPT, forward: Callable[..., Tensor], graphed: bool):
        self.model, self.forward, self.graphed = model, forward, graphed
        self.params = list(model.parameters())
        self.gradients: list[Tensor] = []  # the graphs' own, made at the first capture
        self.runs: dict[tuple, int] = {}
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor, list[int]]] = {}

    def __call__(self, inputs: Tensor, targets: Tensor, boundaries: Tensor | None, span: int, accumulation: int) -> Tensor:
        batch = [inputs, targets, boundaries]
        key = (inputs.shape, boundaries is not None and boundaries.shape, span, accumulation, self.model.looping)
        self.runs[key] = self.runs.get(key, 0) + 1
        if not self.graphed or self.runs[key] <= self.EAGER_RUNS:
            return self._run(batch, span, accumulation)
        if key not in self.graphs:
            self._capture(key, batch, span, accumulation)
        graph, static, loss, used = self.graphs[key]
        self._bind(used)
        for place, value in zip(static, batch):
            if place is not None:
                place.copy_(value, non_blocking=True)
        graph.replay()
        return loss

    def _run(self, batch: list[Tensor | None], span: int, accumulation: int) -> Tensor:
        inputs, targets, boundaries = batch
        loss = self.forward(inputs, targets, boundaries=boundaries, span=span) / accumulation
        loss.backward()
        return loss.detach()

    def _bind(self, used: list[int]) -> None:
        """Gradients that the graphs add into: zero at a step's first micro-batch, else what the micro-batches before have left."""
        if fresh := [self.gradients[index] for index in used if self.params[index].grad is None]:
            torch._foreach_zero_(fresh)
        for index in used:
            gradient = self.params[index].grad
            if gradient is not None and gradient is not self.gradients[index]:
                self.gradients[index].copy_(gradient)  # of a micro-batch that ran without a graph
            self.params[index].grad = self.gradients[index]

    def _capture(self, key: tuple, batch: list[Tensor | None], span: int, accumulation: int) -> None:
        """Record the launches. Parameters that this micro-batch does not reach (skips before the recurrence) keep no gradient, as without graphs."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(param) for param in self.params]
        kept = [param.grad for param in self.params]
        for param in self.params:
            param.grad = None
        self._run(batch, span, accumulation)
        used = [index for index, param in enumerate(self.params) if param.grad is not None]
        for index, param in enumerate(self.params):
            param.grad = self.gradients[index] if index in used else None
        static = [None if value is None else value.clone() for value in batch]
        if static[2] is not None:
            torch._dynamo.mark_dynamic(static[2], 0)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            loss = self._run(static, span, accumulation)
        self.graphs[key] = graph, static, loss, used
        for param, gradient in zip(self.params, kept):
            param.grad = gradient


class Trainer:
    """One training run, from fresh or restored state to model.safetensors."""

    def __init__(self, cfg: Config, ctx: RunContext, folder: Path):
        self.cfg, self.ctx, self.folder = cfg, ctx, folder
        self._plan()
        self.byte_table = ByteTable.for_validation(load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size), cfg.run.data_path).to(
            "cpu"
        )
        self.made_from = {
            "tokenizer_sha256": check_tokenizer(cfg.run.data_path, cfg.run.tokenizer_path),
            "train_data_sha256": split_digest(cfg.run.data_path, "train"),
            "val_data_sha256": split_digest(cfg.run.data_path, "val"),
            "code_sha256": code_digest(),
            "batch_tokens": self.batch.tokens,
        }
        self.val_tokens = load_tokens(cfg.run.data_path, "val", cfg.model.vocab_size, cfg.train.val_tokens)
        if not self.byte_table.targets(self.val_tokens).sum():  # better found now than after the training
            raise UserError(f"the {len(self.val_tokens)} validation tokens stand for no bytes of text: nothing to score")
        places, turn = cfg.train.train_places, cfg.train.train_seq_len
        stream = TokenStream(cfg.run.data_path, cfg.model.vocab_size, places=places, turn=turn)
        if self.batch.tokens > stream.total_tokens:
            raise UserError(
                f"a step takes {self.batch.tokens:,} tokens, but the training shards hold {stream.total_tokens:,}: lower TRAIN_BATCH_TOKENS"
            )
        self._build(stream)

    def _plan(self) -> None:
        self.batches = {length: plan_batch(self.cfg.train, self.ctx, length) for length, _ in self.cfg.train.sequence_lengths}
        self.batch = self.batches[sequence_length(self.cfg.train, 0.0)]

    def _build(self, stream: TokenStream) -> None:
        cfg, ctx = self.cfg, self.ctx
        torch.manual_seed(cfg.run.seed)  # run-time draws (QAT noise); every rank the same
        model = build_model(cfg, ctx.device)
        attach_fake_quantize(model, cfg)
        ema = [param.detach().clone() for param in model.parameters()] if cfg.train.ema_decay else []
        compiled = compile_mode(cfg.run, ctx.device) != "0"
        self.state = TrainState(model, Optimizers(model, cfg.train, ctx, compiled), stream, ema)
        self.micro_step = MicroStep(model, maybe_compile(model, cfg.run), ctx.device.type == "cuda" and compiled and cfg.run.cuda_graphs)
        self.in_flight: list[tuple[int, Tensor, torch.cuda.Event | None]] = []
        self.last_loss = float("nan")
        self.qat = False
        self.stop = StopSignal()
        self.saved = Saved()
        self.between_steps = True  # the state is that of a finished step: false while an update is under way

    # --- one step

    def run_step(self, progress: float) -> Tensor | None:
        """Forward, backward and update on the next TRAIN_BATCH_TOKENS; returns the mean loss (a tensor: reading it would wait).

        None if a stop was asked for between two micro-batches: the random numbers drawn are then put back, and so they are if the step fails
        before the update (no data, no memory), so that the state of the last step can be saved. Gradients are not part of it.
        """
        state = self.state
        generators = random_state(self.ctx.device)
        try:
            loss = self.accumulate_gradients()
            if loss is not None:
                state.optimizers.reduce_gradients(loss)
        except BaseException:
            set_random_state(generators)
            raise
        if loss is None:
            set_random_state(generators)
            return None
        self.between_steps = False
        cfg = self.cfg.train
        state.optimizers.step(lr_scale(cfg, progress), muon_momentum(cfg, progress), wd_scale(cfg, progress))
        state.stream.advance(self.batch.tokens)
        state.step += 1
        self.between_steps = True
        return loss

    def accumulate_gradients(self) -> Tensor | None:
        """This rank's gradients, added up over its micro-batches; their mean loss, or None when a stop was asked for in between."""
        state, batch = self.state, self.batch
        loss = torch.zeros((), device=self.ctx.device)
        label = f"step {state.step + 1} of {batch.tokens:,} tokens (TRAIN_BATCH_TOKENS)"
        with self.ctx.progress(label, batch.accumulation, "micro-batches") as advance:
            for micro in range(batch.accumulation):
                if micro and self.agree(0.0)[1]:
                    return None
                first = self.ctx.rank * batch.per_rank + micro * batch.per_micro
                inputs, targets = state.stream.sequences(first, batch.per_micro, batch.row_tokens, self.ctx.device)
                boundaries = None
                if self.cfg.model.document_mask and "fa4" in (state.model.kernels.full, state.model.kernels.windowed):
                    boundaries = state.stream.boundaries(first, batch.per_micro, batch.row_tokens, self.ctx.device, batch.span)
                loss += self.micro_step(inputs, targets, boundaries, batch.span, batch.accumulation)
                advance()
        return loss

    def set_phase(self, progress: float) -> None:
        """Switch sequence length, depth recurrence and QAT when their time has come."""
        model, cfg = self.state.model, self.cfg
        if (length := sequence_length(cfg.train, progress)) != self.batch.seq_len:
            self.batch = self.batches[length]
            self.ctx.log(f"step:{self.state.step} {self.batch}")
        if cfg.model.num_loops and not model.looping and progress >= cfg.train.enable_looping_at:
            model.looping = True
            self.ctx.log(f"step:{self.state.step} depth recurrence on: layers {' '.join(map(str, model.layer_order(True)))}")
        if (active := qat_active(cfg.train, progress)) != self.qat:
            self.qat = active
            self.ctx.log(f"step:{self.state.step} QAT {'on' if active else 'off'}")
            set_qat_strength(model, float(active))

    def compile_warmup(self) -> None:
        """Compile and tune every graph before the clock starts, on training tokens, then put everything back as it was."""
        cfg, state = self.cfg, self.state
        if not cfg.train.warmup_steps or compile_mode(cfg.run, self.ctx.device) == "0":
            return
        began = time.perf_counter()
        kept = {name: tensor.detach().clone() for name, tensor in state.tensors().items()}
        place, looping, batch = (state.step, state.elapsed, state.stream.position), state.model.looping, self.batch
        for length, recurrent in training_graphs(cfg):
            self.batch, state.model.looping = self.batches[length], recurrent
            for _ in range(cfg.train.warmup_steps):
                if self.agree(0.0)[1]:
                    break  # the loop that follows leaves before its first step
                self.run_step(0.0)
        state.optimizers.adam.state.clear()
        state.load(kept)
        state.step, state.elapsed, state.stream.position = place
        state.model.looping, self.batch = looping, batch
        self.synchronize()
        self.ctx.log(
            f"compile warmup: {cfg.train.warmup_steps} steps a graph, undone; {time.perf_counter() - began:.1f}s outside the clock"
        )

    def synchronize(self) -> None:
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize()

    # --- keeping up with the device

    def submit(self, loss: Tensor) -> None:
        """Note the step's loss without waiting for it."""
        event = None
        if loss.is_cuda:
            loss = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.in_flight.append((self.state.step, loss, event))

    def settle(self, allowed: int) -> None:
        """Wait until at most `allowed` steps are unfinished; a loss that is no number ends the run.

        One step may stay in flight while the next is launched: the device never idles, and the clock is at most a step ahead of it.
        """
        while len(self.in_flight) > allowed:
            step, loss, event = self.in_flight.pop(0)
            if event is not None:
                self.wait_for(event)
            value = float(loss)
            if not math.isfinite(value):
                kept = list_checkpoints(self.folder)
                last = f"last checkpoint: {kept[0]}" if kept else "no checkpoint had been written"
                before = (
                    f"step {step - 1} was good at {self.last_loss:.4f}" if math.isfinite(self.last_loss) else "no step before it was good"
                )
                raise TrainingDiverged(f"train_loss is {value} at step {step}; {before}; {last}")
            self.last_loss = value

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Wait for the device. Beside other ranks signals are heard meanwhile: a device that waits for a rank that is gone does so for ever, and
        torchrun, which saw the rank go, has sent SIGTERM."""
        if self.ctx.world_size == 1:
            return event.synchronize()
        asked = None
        while not event.query():
            if self.stop.received:
                asked = asked or time.monotonic()
                if time.monotonic() - asked > LOST_SECONDS:
                    raise dist.DistError(f"step {self.state.step} did not end within {LOST_SECONDS:g} s of the signal to stop")
            time.sleep(2e-4)

    def agree(self, elapsed: float) -> tuple[float, int]:
        """Rank 0's clock, and the signal to stop at if any rank got one: every rank must take the same decisions."""
        if self.ctx.output_closed:
            self.stop.request(signal.SIGPIPE)
        stop = self.stop.received
        if self.ctx.world_size == 1:
            return elapsed, stop
        shared = torch.tensor([elapsed if self.ctx.is_main else 0.0, float(stop)], dtype=torch.float64)
        # A CPU tensor, through gloo: does not wait for the GPU.
        self.ctx.exchange("clock, stop (host)", dist.all_reduce, shared, op=dist.ReduceOp.MAX)()
        return float(shared[0]), int(shared[1])

    # --- reports

    def validate(self, label: str) -> EvalResult:
        """Score the float weights as they would be saved: without what QAT imitates, and without the random numbers it draws."""
        cfg, seq = self.cfg, self.cfg.train.train_seq_len
        generators = random_state(self.ctx.device)
        set_qat_strength(self.state.model, 0.0)
        try:
            result = evaluate(self.state.model, self.val_tokens, self.byte_table, cfg.eval, self.ctx, seq, seq)
        finally:
            set_qat_strength(self.state.model, float(self.qat))
            set_random_state(generators)  # QAT's noise was drawn, times zero: how often one validates must not show in the weights
        state = self.state
        self.ctx.log(f"step:{state.step} {label} val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} ({result.seconds:.1f}s)")
        self.ctx.metric("validation", label=label, step=state.step, elapsed=round(state.elapsed, 3), **dataclasses.asdict(result))
        return result

    def report(self, progress: float, tokens_per_second: float) -> None:
        state, cfg = self.state, self.cfg
        total = max(state.step, round(state.step / progress)) if progress else 0
        values = {"train_loss": self.last_loss, "lr": lr_scale(cfg.train, progress), "tokens_per_second": tokens_per_second}
        line = f"step:{state.step}/{total} train_loss:{self.last_loss:.4f} lr:{values['lr']:.2f} tok/s:{quantity(tokens_per_second)}"
        if self.ctx.device.type == "cuda":
            name = torch.cuda.get_device_name(self.ctx.device)
            peak = next((flops for chip, flops in PEAK_BF16_FLOPS.items() if chip in name), None)
            if peak:
                values["mfu"] = flops_per_token(state.model, self.batch.seq_len) * tokens_per_second / self.ctx.world_size / peak
                line += f" mfu:{values['mfu']:.0%}"
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            line += f" mem:{values['peak_memory_gib']:.1f}G"
        remaining = max(0.0, state.elapsed * (1 - progress) / progress) if progress else 0.0
        self.ctx.log(f"{line} epoch:{state.stream.epoch:.2f} elapsed:{state.elapsed:.1f}s eta:{duration(remaining)}")
        self.ctx.metric("train", step=state.step, elapsed=round(state.elapsed, 3), progress=progress, **values)

    # --- saving

    def checkpoint(self) -> Path | None:
        """Save the state (rank 0). None if there is no room: said in the log, and tried again; the run does not end over it."""
        saved = self.saved
        if saved.step != self.state.step:
            self.settle(0)
            try:
                saved.path = save_checkpoint(self.state, self.cfg, self.folder, self.made_from)
            except OSError as error:
                saved.retry_at = time.monotonic() + RETRY_SECONDS
                self.ctx.log(f"warning: no checkpoint at step {self.state.step}: {fault_line(error)}; the run goes on, and tries again")
                return None
            saved.step, saved.at, saved.retry_at = self.state.step, time.monotonic(), None
        return saved.path

    def checkpoint_due(self) -> bool:
        """By steps, by time, or because the last attempt failed. Rank 0's clock decides, and rank 0 alone writes."""
        cfg, saved, now = self.cfg, self.saved, time.monotonic()
        if saved.retry_at is not None:
            return now >= saved.retry_at
        by_steps = cfg.train.checkpoint_every and self.state.step % cfg.train.checkpoint_every == 0
        return bool(by_steps or (cfg.train.checkpoint_seconds and now - saved.at >= cfg.train.checkpoint_seconds))

    def rescue(self, error: Exception) -> None:
        """A step has failed: the state before it is whole, and saved (rank 0) before the fault ends the run."""
        if not (self.ctx.is_main and self.between_steps and self.state.step):
            return
        if lost_rank(error):
            self.stop.request(signal.SIGTERM)  # if it has not come yet: a device that waits for that rank is not waited for
        try:
            if path := self.checkpoint():
                self.ctx.log(f"step {self.state.step + 1} failed: saved {path}; RESUME=1 RUN_ID={self.cfg.run.run_id} continues")
        except Exception as second:  # a device that no longer answers; the first fault is the one to show
            self.ctx.log(f"step {self.state.step + 1} failed, and so did saving the state before it: {one_line(second)}")

    def stopped(self, number: int) -> int:
        """Save and leave. Returns the exit code."""
        path = self.checkpoint() if self.ctx.is_main else None
        self.ctx.barrier()
        kept = f"saved {path}" if path else f"NOT saved; last checkpoint: {next(iter(list_checkpoints(self.folder)), 'none')}"
        self.ctx.log(
            f"stopped by {signal.Signals(number).name} at step {self.state.step}; {kept}; RESUME=1 RUN_ID={self.cfg.run.run_id} continues"
        )
        return 128 + number

    def save_model(self, meta: Mapping, checkpoint: str | None) -> None:
        """model.safetensors, from the weights that the model holds. Without room: refused if `checkpoint` has them, else waited for."""

        def attempt() -> str | None:
            try:
                save_tensors(self.folder / "model.safetensors", dict(self.state.model.named_parameters()), meta)
            except OSError as error:
                return fault_line(error)

        while fault := self.ctx.on_main(attempt):
            if checkpoint:
                raise UserError(
                    f"{fault}; the finished weights are in {checkpoint}: RESUME=1 RUN_ID={self.cfg.run.run_id} goes on from there"
                )
            if number := self.agree(0.0)[1]:
                raise UserError(f"{fault}; given up by {signal.Signals(number).name}: the trained weights are lost")
            self.ctx.log(f"warning: {fault}; the finished weights are in memory only: trying again every {RETRY_SECONDS:g} s, make room")
            time.sleep(RETRY_SECONDS)

    # --- the run

    def run(self) -> int:
        """Train until the budget is spent or a signal arrives. Returns 0, or 128 + the signal's number after saving."""
        self.check_same_run()
        with self.stop:
            try:
                self.compile_warmup()
                self.ctx.barrier()
                return self._run()
            except Stopped as stop:
                self.ctx.log(
                    f"stopped by {stop} in the final validation; RESUME=1 RUN_ID={self.cfg.run.run_id} goes on from {self.saved.path}"
                )
                return 128 + stop.number

    def check_same_run(self) -> None:
        """Every rank of every node must be about to train the same: settings, code, data, weights. Compared by hash."""
        ctx = self.ctx
        if ctx.world_size == 1:
            return
        settings = {name: value for name, value in self.cfg.to_dict().items() if name not in MACHINE_SETTINGS}
        mine = {what: self.made_from[key] for key, what in CONTENT.items()}
        mine["the settings"] = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        mine["the version of torch"] = torch.__version__
        mine["the weights"] = tensors_digest(dict(self.state.model.named_parameters()), f"step {self.state.step}")
        first, *others = ctx.gather_objects(mine)
        for rank, other in enumerate(others, 1):
            for what, value in first.items():
                if other[what] != value:
                    raise UserError(f"{what} of rank {rank} ({other[what][:12]}…) differs from rank 0's ({value[:12]}…)")

    def _run(self) -> int:
        cfg, ctx, state = self.cfg, self.ctx, self.state
        tokens_a_step = self.batch.tokens  # the same for every sequence length
        spent, began = state.elapsed, time.perf_counter()
        paused = 0.0  # seconds of validation, which the budget does not count (it does count writing checkpoints)
        first_step = mark_step = state.step
        mark_time, warned = state.elapsed, False
        self.saved.at = time.monotonic()
        progress = before = training_progress(cfg.train, state.step, state.elapsed)
        if cfg.train.val_loss_every and state.step == 0 and not self.agree(0.0)[1]:
            pause = time.perf_counter()
            self.validate("start")
            paused += time.perf_counter() - pause
        while True:
            self.settle(1 if ctx.device.type == "cuda" else 0)
            try:
                state.elapsed, signal_number = self.agree(spent + time.perf_counter() - began - paused)
            except RuntimeError as error:
                self.rescue(error)
                raise
            before, progress = progress, max(progress, training_progress(cfg.train, state.step, state.elapsed))
            if cfg.train.ema_decay and state.step > first_step:
                params = [param.data for param in state.model.parameters()]
                torch._foreach_lerp_(state.ema, params, 1 - ema_decay(cfg.train, progress - before))
            if signal_number:
                return self.stopped(signal_number)
            done = progress >= 1
            if ctx.is_main and state.step > first_step and not done and self.checkpoint_due() and (path := self.checkpoint()):
                ctx.log(f"step:{state.step} checkpoint {path}")
            steps_taken = state.step - mark_step
            if steps_taken and (state.step % cfg.train.train_log_every == 0 or done or state.step - first_step in (1, 2, 5, 10, 20, 50)):
                self.settle(0)
                self.report(progress, steps_taken * tokens_a_step / max(1e-9, state.elapsed - mark_time))
                mark_step, mark_time = state.step, state.elapsed
            if not warned and state.step and progress and (done or state.step - first_step >= 10):
                warned = True
                for warning in length_warnings(cfg, state.step / progress):
                    ctx.log(f"warning: {warning}")
            if done:
                break
            if cfg.train.val_loss_every and state.step > first_step and state.step % cfg.train.val_loss_every == 0:
                pause = time.perf_counter()
                self.settle(0)
                try:
                    # One rank need not wait for the score to save and leave; several have to meet at its end.
                    with self.stop.at_once() if ctx.world_size == 1 else contextlib.nullcontext():
                        self.validate("raw")
                except Stopped as stop:
                    return self.stopped(stop.number)
                paused += time.perf_counter() - pause
            self.set_phase(progress)
            try:
                loss = self.run_step(progress)
            except Exception as error:
                self.rescue(error)
                raise
            if loss is None:
                return self.stopped(self.agree(0.0)[1])
            self.submit(loss)
        self.settle(0)
        state.elapsed, _ = self.agree(spent + time.perf_counter() - began - paused)  # the last step's own time included
        self.finish()
        return 0

    def finish(self) -> None:
        """Save the finished state, validate the raw and the averaged weights, and save the averaged ones as the run's result.

        The state comes first: whatever happens in the validations, a resumed run has only them left to do. It is also what an extension
        of the run starts from.
        """
        cfg, ctx, state = self.cfg, self.ctx, self.state
        if not state.step:
            raise UserError("the budget was spent before the first step: raise MAX_WALLCLOCK_SECONDS")
        state.assert_finite()
        checkpoint = ctx.broadcast_object(str(self.checkpoint() or "") if ctx.is_main else None)
        with self.stop.at_once() if checkpoint else contextlib.nullcontext():
            raw = self.validate("raw")
            with state.averaged_weights():
                result = self.validate("ema") if cfg.train.ema_decay else raw
                if cfg.train.ema_decay and result.val_bpb > raw.val_bpb + 0.02:
                    ctx.log(
                        f"warning: the EMA scores {result.val_bpb - raw.val_bpb:.3f} bpb worse than the raw weights: EMA_DECAY does not fit"
                    )
                meta = {
                    "config": cfg.to_dict(),
                    "looping": state.model.looping,
                    "steps": state.step,
                    "tokens": state.stream.position,
                    "train_seconds": state.elapsed,
                    "world_size": ctx.world_size,
                    "device": torch.cuda.get_device_name() if ctx.device.type == "cuda" else "cpu",
                    "torch": torch.__version__,
                    **self.made_from,
                    "val_loss": result.val_loss,
                    "val_bpb": result.val_bpb,
                }
                self.save_model(meta, checkpoint)
        digest = ctx.on_main(lambda: model_digest(self.folder))
        rate = state.stream.position / max(1e-9, state.elapsed)
        ctx.log(
            f"done: {state.step} steps, {state.elapsed:.1f}s, {quantity(rate)} tok/s, val_bpb {result.val_bpb:.4f} -> {self.folder / 'model.safetensors'} (SHA-256 {digest})"
        )
        ctx.log(f"next: python quantize.py {self.folder}")
        facts = {k: v for k, v in meta.items() if k != "config"}
        ctx.metric("done", step=state.step, tokens_per_second=rate, model_sha256=digest, **facts)


def new_run_id(environ_preset: str) -> str:
    stem = environ_preset.replace("/", "-") or "run"
    return f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


# Settings of a machine rather than of a run: the ranks of several machines may have their own.
MACHINE_SETTINGS = ("data_path", "tokenizer_path", "runs_dir")


def resolve_run(environ: Mapping[str, str]) -> Config:
    """`resolve_config` for training: a resumed run starts from its own settings, the environment on top."""
    where = resolve_config({name: environ[name] for name in ("RESUME", "RUN_ID", "RUNS_DIR") if name in environ})
    if not where.run.resume:
        return resolve_config(environ)
    if not where.run.run_id:
        raise UserError("RESUME=1 needs RUN_ID: which run is to go on?")
    base = run_settings(Path(where.run.runs_dir) / where.run.run_id)
    return resolve_config(
        environ, base={**base, "resume": True, "run_id": where.run.run_id, "runs_dir": where.run.runs_dir} if base else None
    )


def share_config(cfg: Config, ctx: RunContext) -> Config:
    """Rank 0's settings on every rank, which keeps the paths of its own machine; a rank whose environment says otherwise is named."""
    values, origins = ctx.broadcast_object((cfg.to_dict(), cfg.origins))
    own = {name: value for name, value in cfg.to_dict().items() if cfg.origins.get(name, "default") not in ("default", "run")}
    other = {name: value for name, value in own.items() if name not in MACHINE_SETTINGS and value != values[name]}
    for rank, names in enumerate(ctx.gather_objects(other)):
        for name, value in names.items():
            ctx.log(f"warning: {name.upper()}={value} on rank {rank}, {values[name]} on rank 0: rank 0's setting holds everywhere")
    local = {name: own[name] for name in MACHINE_SETTINGS if name in own}
    return dataclasses.replace(Config.from_dict({**values, **local}), origins=origins)


def take_folder(folder: Path, cfg: Config, ownership: contextlib.ExitStack) -> bool:
    """Own the run's folder as long as `ownership` is open; whether a run is in it already, which is refused unless it is to go on."""
    ownership.enter_context(run_lock(folder))
    if (started := run_started(folder)) and not cfg.run.resume:
        raise UserError(f"{folder} already holds a run; RESUME=1 continues it, or choose another RUN_ID")
    return started


def is_finished(folder: Path, cfg: Config) -> bool:
    """Whether the run in `folder` has its result and nothing of its budget left. A model that is damaged is made again."""
    if not (folder / "model.safetensors").is_file():
        return False
    checkpoints = list_checkpoints(folder)
    try:
        stored, _, meta = load_run(folder)
    except UserError:
        if checkpoints:
            return False
        raise
    if fault := of_another_run(folder, stored):
        raise UserError(f"{folder / 'model.safetensors'} is of another run: {fault}")
    done = training_progress(cfg.train, meta["steps"], meta["train_seconds"]) >= 1
    if not done and not checkpoints:
        raise UserError(f"{folder} is finished, and its last checkpoint is gone: it cannot be extended")
    return done and not (checkpoints and checkpoints[0].stem > f"step_{meta['steps']:07d}")


def banner(trainer: Trainer) -> None:
    """What a reader of the log needs to repeat the run."""
    cfg, ctx, model, batch = trainer.cfg, trainer.ctx, trainer.state.model, trainer.batch
    device = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    ctx.log(f"run {cfg.run.run_id}: {ctx.world_size} x {device}, torch {torch.__version__}, python {sys.version.split()[0]}")
    for line in chosen_settings(cfg, "run", "model", "train"):
        ctx.log(f"  {line}")
    for line in describe(model, cfg):
        ctx.log(line)
    for line in model.kernels.lines(reasons=ctx.device.type == "cuda"):
        ctx.log(line)
    rows, micro_batches = (
        f"{batch.per_micro} row{'s' * (batch.per_micro > 1)}",
        f"{batch.accumulation} micro-batch{'es' * (batch.accumulation > 1)}",
    )
    ctx.log(f"batch: {batch}, {rows} a micro-batch, {micro_batches} on {'each rank' if ctx.world_size > 1 else 'one rank'}")
    stream = trainer.state.stream
    ctx.log(f"data: {stream.total_tokens:,} training tokens in {len(stream.paths)} shards, {len(trainer.val_tokens):,} validation tokens")
    if unread := unread_files(cfg.run.data_path):
        ctx.log(f"warning: {cfg.run.data_path}: not named like shards, and not read: {', '.join(unread)}")
    ctx.metric(
        "start", run_id=cfg.run.run_id, world_size=ctx.world_size, device=device, torch=torch.__version__, parameters=count_params(model)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Benchmark
# ----------------------------------------------------------------------------------------------------------------------


class SyntheticStream(TokenStream):
    """Random tokens in documents of 800 on average: a benchmark needs no data, and its speed does not depend on them."""

    def __init__(self, vocab_size: int, tokens: int):
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(2, vocab_size, tokens, dtype=np.uint16)
        self.tokens[rng.random(tokens) < 1 / 800] = BOS_ID
        self.paths, self.starts = ["synthetic"], np.array([0, tokens])
        self.vocab_size, self.position = vocab_size, 0

    def piece(self, index: int, first: int, count: int) -> np.ndarray:
        return self.tokens[first : first + count]


Mark = torch.cuda.Event | float  # a place in a device's queue, or seconds of the host's clock


def mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(began: Mark, ended: Mark) -> float:
    return 1000 * (ended - began) if isinstance(began, float) else began.elapsed_time(ended)


class Benchmark(Trainer):
    """Speed of a preset's training step on this machine or these, where its time goes, and what the ranks' exchanges take of it."""

    STEPS, SECONDS = 10, 4.0  # timed in a phase: so many steps, or as many as the seconds hold

    def __init__(self, cfg: Config, ctx: RunContext):
        self.cfg, self.ctx, self.folder = cfg, ctx, Path(cfg.run.runs_dir)
        self._plan()
        self._build(SyntheticStream(cfg.model.vocab_size, 2 * self.batch.tokens + 1))

    def run(self) -> dict:
        cfg, ctx, model = self.cfg, self.ctx, self.state.model
        on_cuda = ctx.device.type == "cuda"
        began = time.perf_counter()
        self.run_step(0.0)
        self.synchronize()
        first_step = time.perf_counter() - began
        self.compile_warmup()
        device = torch.cuda.get_device_name(ctx.device) if on_cuda else "cpu"
        peak = next((flops for chip, flops in PEAK_BF16_FLOPS.items() if chip in device), None)
        tokens = self.batch.tokens
        report = {
            "preset": os.environ.get("PRESET", ""), "device": device, "world_size": ctx.world_size, "torch": torch.__version__,
            "triton": kernels.triton.__version__ if kernels.triton else None, "kernels": dataclasses.asdict(model.kernels),
            "compile": compile_mode(cfg.run, ctx.device), "tokens_a_step": tokens, "micro_batch_tokens": self.batch.per_micro * self.batch.row_tokens,
            "parameters": count_params(model), "first_step_seconds": first_step,
            "peak_flops": peak, "phases": {},
        }  # fmt: skip
        for looping, batch in itertools.product([False, True] if cfg.model.num_loops else [False], self.batches.values()):
            model.looping, self.batch = looping, batch
            self.timed(1)
            steps = ctx.broadcast_object(max(1, min(self.STEPS, round(self.SECONDS / self.timed(1)))))
            seconds = self.timed(steps)
            flops = flops_per_token(model, batch.seq_len)
            report["phases"][f"{'looping' if looping else 'plain'} at {batch.seq_len}"] = {
                "tokens_per_second": tokens / seconds, "milliseconds": 1000 * seconds, "flops_per_token": flops,
                "mfu": flops * tokens / seconds / ctx.world_size / peak if peak else None, **self.profiled_step(), "collectives": self.collectives(),
                "steps": steps, "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
            }  # fmt: skip
        return report

    def timed(self, steps: int) -> float:
        """Seconds a step, of so many in a row as the training loop takes them."""
        self.synchronize()
        self.ctx.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            self.agree(0.0)
            self.run_step(0.0)
        self.synchronize()
        return (time.perf_counter() - began) / steps

    def collectives(self, steps: int = 3) -> dict[str, dict]:
        """Of a step, by kind of exchange between ranks: calls, bytes of the results, milliseconds alone and exposed, GB/s of the bus while alone.

        Exposed is what the device waits (for a CPU tensor the host), on the rank that waits longest: what computing does not hide, a slower rank's
        delay included. Alone are the same calls with nothing else under way. The bus carries, for each rank, 2(n-1)/n of an all-reduce's
        bytes and (n-1)/n of an all-gather's, as nccl-tests counts.
        """
        ctx, plain = self.ctx, self.ctx.exchange
        if ctx.world_size == 1:
            return {}
        calls: dict[str, list[tuple[Callable[[], object], tuple[Tensor, ...]]]] = {}  # of one step
        waits: list[tuple[str, Mark, Mark]] = []  # of all

        def clocked(kind: str, collective: Callable, *tensors: Tensor, **how) -> Callable[[], object]:
            calls.setdefault(kind, []).append((lambda: collective(*tensors, **how), tensors))
            wait = plain(kind, collective, *tensors, **how)

            def waited() -> None:
                began = mark(tensors[0].device)
                wait()
                waits.append((kind, began, mark(tensors[0].device)))

            return waited

        ctx.exchange = clocked
        try:
            for _ in range(steps):
                calls.clear()
                self.timed(1)
        finally:
            ctx.exchange = plain
        report = {}
        for kind, made in calls.items():
            exposed = sum(milliseconds(began, ended) for what, began, ended in waits if what == kind) / steps
            alone = statistics.median([self.alone(made) for _ in range(6)][1:])
            carried = sum((2 if len(tensors) == 1 else 1) * tensors[0].nbytes for _, tensors in made) * (1 - 1 / ctx.world_size)
            report[kind] = {
                "calls": len(made), "bytes": sum(tensors[0].nbytes for _, tensors in made), "alone_ms": alone,
                "exposed_ms": max(ctx.gather_objects(exposed)), "bus_gb_per_second": carried / alone / 1e6,
            }  # fmt: skip
        return report

    def alone(self, calls: Sequence[tuple[Callable[[], object], tuple[Tensor, ...]]]) -> float:
        """Milliseconds of these collectives, one after another."""
        device = calls[0][1][0].device
        self.synchronize()
        self.ctx.barrier()
        began = mark(device)
        for call, _ in calls:
            call()
        ended = mark(device)
        self.synchronize()
        return milliseconds(began, ended)

    def profiled_step(self) -> dict:
        """Milliseconds of one step by part, and its costliest operations: the device's time (on a CPU its own), sorted by name and shape; without
        the ranks' exchanges, which `collectives` measures."""
        from torch.profiler import ProfilerActivity, profile

        on_cuda = self.ctx.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
        optimizers, update = self.state.optimizers, self.state.optimizers.step
        outside = {}

        def collect(into: dict, call: Callable[[], None]) -> None:
            with profile(activities=activities, record_shapes=True) as profiled:
                call()
                self.synchronize()
            for row in profiled.key_averages(group_by_input_shape=True):
                # A kernel's time stands at the operation that launched it, and once more under its own name.
                spent = row.self_device_time_total if on_cuda else row.self_cpu_time_total
                exchange = row.key.startswith(("c10d::", "nccl:", "gloo:", "record_param"))
                if spent and row.device_type == torch.autograd.DeviceType.CPU and not exchange:
                    into[row.key, str(row.input_shapes)] = spent / 1000

        whole: dict[tuple[str, str], float] = {}
        optimizers.step = lambda *scales: None  # gradients stay for the optimizer's own profile
        graphed, self.micro_step.graphed = self.micro_step.graphed, False  # a replayed graph does not say which operation launched a kernel
        try:
            collect(whole, lambda: self.run_step(0.0))
        finally:
            optimizers.step, self.micro_step.graphed = update, graphed
        collect(outside, lambda: update(0.0, self.cfg.train.muon_momentum))
        totals = dict.fromkeys(("attention", "MLP", "head and loss", "mixers", "norms and residual", "optimizer", "rest"), 0.0)
        totals["optimizer"] = sum(outside.values())
        for (name, shapes), spent in whole.items():
            totals[self.part_of(name, shapes)] += spent
        costliest = sorted(((round(spent, 3), name, shapes) for (name, shapes), spent in whole.items()), reverse=True)[:40]
        return {"parts_ms": totals, "operations": costliest}

    def part_of(self, name: str, shapes: str) -> str:
        cfg, sizes = self.cfg.model, set(map(int, re.findall(r"\d+", shapes)))
        if name.startswith("golf::mlp") or (int(cfg.mlp_mult * cfg.model_dim) in sizes and name.startswith(("aten::mm", "aten::addmm"))):
            return "MLP"
        if name.startswith("golf::softcap") or "softmax" in name or (cfg.vocab_size in sizes and name.startswith("aten::")):
            return "head and loss"
        if "attention" in name or "flex" in name:
            return "attention"
        if name.startswith(("golf::heads", "golf::mix_norm", "golf::add_columns")):
            return "norms and residual"
        if name.startswith(("golf::", "aten::mm", "aten::addmm")):  # what is left: q, k, v and output projections, XSA, GDN
            return "mixers"
        return "norms and residual" if name.startswith("triton_") else "rest"

    def table(self, report: dict) -> list[str]:
        lines = [
            f"{report['preset'] or 'defaults'} on {ctx_name(report)}, torch {report['torch']}, Triton {report['triton']}: {report['tokens_a_step']:,} tokens a step, "
            f"{report['micro_batch_tokens']:,} a micro-batch, first step after {report['first_step_seconds']:.1f}s"
        ]
        names = list(next(iter(report["phases"].values()))["parts_ms"])
        lines.append(
            f"{'':<15} {'tok/s':>8} {'ms':>8} {'MFU':>5} {'GiB':>5}  " + "  ".join(f"{name:>{max(9, len(name))}}" for name in names)
        )
        for phase, row in report["phases"].items():
            mfu = f"{row['mfu']:.0%}" if row["mfu"] else "-"
            memory = f"{row['peak_memory_gib']:.1f}" if row["peak_memory_gib"] else "-"
            times = "  ".join(f"{row['parts_ms'][name]:>{max(9, len(name)) - 3}.2f} ms" for name in names)
            lines.append(f"{phase:<15} {quantity(row['tokens_per_second']):>8} {row['milliseconds']:>8.1f} {mfu:>5} {memory:>5}  {times}")
        if report["world_size"] > 1:
            lines.append(f"{'':<15} {'collective':<18} {'calls':>5} {'MB':>8} {'alone':>10} {'GB/s':>6} {'exposed':>10} {'of step':>7}")
        for phase, row in report["phases"].items():
            for kind, cost in row["collectives"].items():
                lines.append(
                    f"{phase:<15} {kind:<18} {cost['calls']:>5} {cost['bytes'] / 1e6:>8.1f} {cost['alone_ms']:>7.2f} ms {cost['bus_gb_per_second']:>6.1f} "
                    f"{cost['exposed_ms']:>7.2f} ms {cost['exposed_ms'] / row['milliseconds']:>7.1%}"
                )
        return lines + [f"kernels: {', '.join(f'{k} {v}' for k, v in report['kernels'].items() if k != 'refused')}"]


def ctx_name(report: dict) -> str:
    return f"{report['world_size']} x {report['device']}"


def as_variable(arguments: Sequence[str]) -> str:
    """How to say with environment variables what these arguments seem to want."""
    word, _, value = arguments[0].lstrip("-").partition("=")
    name = word.upper().replace("-", "_")
    if name not in {"PRESET", *(spec.name.upper() for spec in settings())}:
        return "hyperparameters are environment variables before the command; see --print-config, and --help"
    value = value or (arguments[1] if len(arguments) > 1 else "...")
    return f"hyperparameters are environment variables before the command: {name}={shlex.quote(value)} python train_gpt.py"


def main() -> int:
    arguments = sys.argv[1:]
    find = arguments.pop(1) if arguments[:1] == ["--print-config"] and len(arguments) == 2 else ""
    if unknown := [a for a in arguments if a not in ("--print-config", "--describe", "--bench", "-h", "--help")]:
        raise UserError(f"unknown argument {unknown[0]}: {as_variable(unknown)}")
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    cfg = resolve_run(os.environ)
    if arguments:  # training says it in its log
        say_near_misses(os.environ)
    if "--print-config" in arguments:
        lines = config_lines(cfg, find)
        if not lines:
            raise UserError(f"no setting has {find!r} in its name or help")
        print("\n".join(lines))
        return 0
    if "--describe" in arguments:
        with torch.device("meta"):  # shapes alone: no weights are drawn
            model = GPT(cfg.model)
        print("\n".join(describe(model, cfg)))
        return 0
    ctx = setup_distributed(cfg.run.device, cfg.run.cache_dir)
    if "--bench" in arguments:
        benchmark = Benchmark(cfg, ctx)
        report = benchmark.run()
        ctx.log("\n".join(benchmark.table(report)))
        if ctx.is_main:
            path = Path(cfg.run.runs_dir) / f"bench-{cfg.run.run_id or new_run_id(os.environ.get('PRESET', ''))}.json"
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(report, indent=1))
            ctx.log(f"-> {path}")
        ctx.close()
        return 0
    try:
        return train(cfg, ctx)
    except (UserError, OSError) as error:
        ctx.note(f"error: {fault_line(error)}")
        raise
    finally:
        ctx.close()


def train(cfg: Config, ctx: RunContext) -> int:
    """The run that the settings ask for, new or resumed, to its end. Returns the exit code."""
    if not cfg.run.run_id:
        cfg = cfg.replace(run_id=new_run_id(os.environ.get("PRESET", "")))
    cfg = share_config(cfg, ctx)
    folder = Path(cfg.run.runs_dir) / cfg.run.run_id
    with contextlib.ExitStack() as ownership:
        started = ctx.on_main(lambda: run_started(folder) and take_folder(folder, cfg, ownership))
        if started and ctx.on_main(lambda: is_finished(folder, cfg)):
            ctx.log(f"{folder} is finished: nothing to resume (more ITERATIONS or MAX_WALLCLOCK_SECONDS extend it)")
            return 0
        trainer = Trainer(cfg, ctx, folder)  # every fault of input that can be seen beforehand ends here, before a file is written
        if not started:
            ctx.on_main(lambda: take_folder(folder, cfg, ownership))
        ctx.open_logs(folder / "train.log", folder / "metrics.jsonl")
        for warning in near_misses(os.environ):
            ctx.log(f"warning: {warning}")
        banner(trainer)
        if cfg.run.resume and os.environ.get("PRESET") and started:
            ctx.log(f"resume: PRESET={os.environ['PRESET']} is not read again: the run's own settings hold")
        if cfg.run.resume and (path := restore_checkpoint(trainer.state, cfg, folder, ctx, trainer.made_from)):
            if training_progress(cfg.train, trainer.state.step, trainer.state.elapsed) >= 1:  # only validating is left
                trainer.saved = Saved(trainer.state.step, path)
        if ctx.is_main:
            write_json(folder / "config.json", {"config": cfg.to_dict(), "origins": cfg.origins})
            start_mirrors(folder, cfg.run.mirror, ctx.log)
        try:
            return trainer.run()
        except (RuntimeError, MemoryError) as error:
            if not (fault := machine_fault(error)):
                raise
            ctx.note(traceback.format_exc())
            kept = list_checkpoints(folder)
            go_on = f"RESUME=1 RUN_ID={cfg.run.run_id} continues from {kept[0]}" if kept else "no checkpoint had been written"
            raise UserError(f"{fault}; {go_on}") from None


if __name__ == "__main__":
    cli(main)

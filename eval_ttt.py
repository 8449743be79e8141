"""Evaluate an artifact: sliding windows, then score-first test-time training (TTT) with experts, and an audit of the score.

    python eval_ttt.py runs/<RUN_ID>                                     one device; the artifact may be named itself, too
    torchrun --standalone --nproc_per_node=8 eval_ttt.py ARTIFACT        any number of ranks, the same result
    TTT_LR=0.01 TTT_PARAMS=mlp python eval_ttt.py ARTIFACT               every setting is an environment variable
    EXPERTS=tilt,ngram python eval_ttt.py ARTIFACT --audit               with experts, checked against the four conditions (parts/audit.py)
    python eval_ttt.py ARTIFACT --referee RAW.jsonl [--cuts N]           judged on raw text that it never sees ahead (parts/REFEREE.md)
    python eval_ttt.py ARTIFACT --prove                                  then the validation text as a file, there and back (codec.py)
    python eval_ttt.py ARTIFACT --serve                                  the judged side: a text through stdin, piece by piece

    python eval_ttt.py ARTIFACT --out FILE.json                          the score there, its log in FILE.log

Reads the artifact, the tokenizer and the validation shards, and nothing else of the run. Writes eval.json and eval.log (--referee: referee.json)
beside the artifact; a score of other settings that stands there is kept as eval.1.json, eval.2.json, … Exit code 0, also of an audit that is
incomplete; 2 for a fault of input; 1 if the audit or the referee finds against the score.

The text is read once from left to right, in chunks. A chunk is scored whole, by sliding windows, with the weights as they are; only
then do the weights train on it, and the next chunk is scored with the result. Experts (experts.py) do the same in smaller
blocks inside the chunk: score a block, then count it. Whatever sees a target goes through the ledger (audit.py), so that the order of
events of the very evaluation that is reported can be checked afterwards.

`val_loss` and `val_bpb` in eval.json are of the last stage that is switched on, chosen by the configuration before anything is
scored: TTT and experts if enabled, else the plain sliding pass. Target i is tokens[i + 1].
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import gc
import hashlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.shards import BOS_ID, ByteTable, list_shards, load_manifest, load_shard, load_tokenizer, split_digest, tokenizer_hash
from parts import audit as auditing
from parts import packing
from parts.adapters import linear_adapters, repeatable_gradients
from parts.artifact import Artifact, artifact_settings, load_artifact
from parts.audit import Ledger, Trace
from parts.code import code_bytes, code_script
from parts.document_ttt import DocumentReader, DocumentTrainer
from parts.experts import ExpertMixture, InvalidTargetKeyedCache, Prediction, context_rows
from parts.files import UserError, cli, fault_line, read_json, write_json
from parts.progress import duration
from parts.replica import Replica, ReplicaError, Sandbox, serve
from parts.runs import artifact_file, free_name, previous_name, set_aside
from train_gpt import (
    GPT,
    SIZE_LIMIT_BYTES,
    Config,
    EvalConfig,
    EvalResult,
    Graphed,
    HashEmbedding,
    RunContext,
    Window,
    chosen_settings,
    compile_mode,
    document_windows,
    eval_batch_size,
    evaluate,
    load_tokens,
    maybe_compile,
    padded_lengths,
    parameter_table,
    plan_windows,
    resolve_config,
    say_near_misses,
    score_windows,
    sent,
    settings,
    setup_distributed,
)

# ----------------------------------------------------------------------------------------------------------------------
# Chunks and schedule
# ----------------------------------------------------------------------------------------------------------------------


DOCUMENTS_A_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Targets start..end-1: scored with one state of the weights, then learned from. In TTT_MODE=document: a few whole documents."""

    start: int
    end: int
    fresh: bool = False  # forget everything learned before scoring it (TTT_RESET_PER_DOC)


def plan_chunks(tokens: Tensor, cfg: EvalConfig) -> list[Chunk]:
    """Cut the targets into chunks of TTT_CHUNK_TOKENS; with TTT_RESET_PER_DOC also at every document start. TTT_MODE=document: at every
    64th document start, nowhere else.

    The target that *is* a BOS belongs to the document it ends, and a cut at token j is decided by token j, which lies before every
    target it affects: the plan looks no further ahead than the text read so far.
    """
    targets, size = len(tokens) - 1, cfg.ttt_chunk_tokens
    if cfg.ttt_mode == "off":
        return [Chunk(0, targets)]
    documents = [0, *(i for i in (tokens == BOS_ID).nonzero().squeeze(1).tolist() if 0 < i < targets)]
    if cfg.ttt_mode == "document":
        starts = documents[::DOCUMENTS_A_CHUNK]
        return [Chunk(first, last) for first, last in zip(starts, [*starts[1:], targets])]
    starts = documents if cfg.ttt_reset_per_doc else [0]
    chunks = []
    for first, last in zip(starts, [*starts[1:], targets]):
        chunks += [Chunk(i, min(i + size, last), cfg.ttt_reset_per_doc and i == first) for i in range(first, last, size)]
    return chunks


def chunk_lr(cfg: EvalConfig, index: int, count: int) -> float:
    """Learning rate after chunk `index` of `count`.

    cosine: from TTT_LR to 0. adaptive: the cosine times a factor that rises from 1 to TTT_MAX_LR_MULT over the first 30 % (card E: 3).
    Per-document resets keep the rate constant: how many chunks a document will have is not known while it is read.
    """
    if cfg.ttt_lr_schedule == "constant" or cfg.ttt_reset_per_doc:
        return cfg.ttt_lr
    lr = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * index / max(count - 1, 1)))
    if cfg.ttt_lr_schedule == "adaptive":
        lr *= 1 + (cfg.ttt_max_lr_mult - 1) * min(index / max(0.3 * count, 1), 1)
    return lr


# ----------------------------------------------------------------------------------------------------------------------
# What trains
# ----------------------------------------------------------------------------------------------------------------------


def choose_trainable(model: GPT, cfg: EvalConfig, seed: int) -> dict[str, tuple[nn.Parameter, float]]:
    """Attach what TTT adds to the model and return what it trains: name -> (parameter, multiple of TTT_LR). All else is frozen.

    TTT_PARAMS: all; mlp (the MLP matrices); matrices (every matrix of the blocks and projections, no embedding, no scalar); lora
    (adapters on every linear layer, the artifact's weights stay). TTT_FREEZE_BLOCKS takes the first blocks out of any of them.
    TTT_HASH_BUCKETS adds an embedding of hashed bigrams and trigrams that is zero at first, so that it changes nothing until it learned.
    """
    roles = {"all": None, "mlp": {"mlp"}, "matrices": {"mlp", "attn", "gdn", "shift", "proj"}, "lora": set()}[cfg.ttt_params]
    frozen = tuple(f"blocks.{i}." for i in range(min(cfg.ttt_freeze_blocks, len(model.blocks))))
    table = [spec for spec in parameter_table(model) if not spec.name.startswith(frozen)]
    chosen = {spec.name: (spec.param, 1.0) for spec in table if roles is None or spec.role in roles}
    model.requires_grad_(False)
    if cfg.ttt_params == "lora":
        chosen |= {name: (param, 1.0) for name, param in linear_adapters(model, cfg.ttt_lora_rank, seed, frozen).items()}
    if cfg.ttt_hash_buckets:
        if cfg.ttt_hash_buckets < 2:
            raise UserError("TTT_HASH_BUCKETS=1 leaves no bucket for n-grams: the last one means 'no predecessor'")
        model.eval_hash = HashEmbedding(cfg.ttt_hash_buckets, None, model.cfg.model_dim, trigram=True).to(model.tok_emb.weight.device)
        model.eval_hash.requires_grad_(False)
        chosen["eval_hash.table.weight"] = (model.eval_hash.table.weight, cfg.ttt_hash_lr_mult)
    if not chosen:
        raise UserError(f"TTT_PARAMS={cfg.ttt_params} with TTT_FREEZE_BLOCKS={cfg.ttt_freeze_blocks} leaves nothing to train")
    for param, _ in chosen.values():
        param.requires_grad_(True)
    return chosen


class TestTimeTrainer:
    """Trains the chosen parameters on chunks that have been scored; gradients are averaged over ranks, so all ranks stay equal."""

    __test__ = False  # not a test class, whatever its name suggests to pytest

    def __init__(self, model: GPT, forward: Callable[..., Tensor], config: Config, byte_table: ByteTable, ctx: RunContext, seq_len: int):
        cfg = config.eval
        self.forward, self.cfg, self.byte_table, self.ctx, self.seq_len = forward, cfg, byte_table, ctx, seq_len
        self.betas = config.train.beta1, config.train.beta2  # AdamW's, as the weights were trained with
        chosen = choose_trainable(model, cfg, config.run.seed)
        self.params = [param for param, _ in chosen.values()]
        self.multiples = [multiple for _, multiple in chosen.values()]
        self.initial = [param.detach().clone() for param in self.params]
        # Tokens a forward: what fits the device. Compiled, it sees one shape, of which sequences that weigh nothing fill what a step's share leaves.
        self.micro_tokens, self.one_shape = 65536 if ctx.device.type == "cuda" else 8192, forward is not model
        if self.one_shape:
            share = -(-min(cfg.ttt_batch_seqs, -(-cfg.ttt_chunk_tokens // seq_len)) // ctx.world_size)
            self.micro_tokens = seq_len * max(1, min(share, self.micro_tokens // seq_len))
        self.reset()

    def reset(self) -> None:
        """Back to the artifact's weights, with a new optimizer."""
        cfg = self.cfg
        with torch.no_grad():
            for param, value in zip(self.params, self.initial):
                param.copy_(value)
        groups = [
            {"params": [param for param, m in zip(self.params, self.multiples) if m == multiple], "multiple": multiple}
            for multiple in sorted(set(self.multiples))
        ]
        if cfg.ttt_optimizer == "adamw":
            # No weight decay: the artifact is no zero to return to.
            self.optimizer = torch.optim.AdamW(groups, lr=cfg.ttt_lr, betas=self.betas, weight_decay=0.0)
        else:
            nesterov = cfg.ttt_nesterov and cfg.ttt_momentum > 0
            self.optimizer = torch.optim.SGD(groups, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum, nesterov=nesterov)
        self.average = [value.clone() for value in self.initial] if cfg.ttt_polyak else []

    @contextlib.contextmanager
    def scoring_weights(self) -> Iterator[None]:
        """Polyak-averaged weights inside the block, where they are asked for; training goes on from the others."""
        if not self.average:
            yield
            return
        live = [param.detach().clone() for param in self.params]
        with torch.no_grad():
            for param, value in zip(self.params, self.average):
                param.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for param, value in zip(self.params, live):
                    param.copy_(value)

    def learn(self, tokens: Tensor, chunk: Chunk, lr: float, lengths: Tensor | None = None) -> None:
        """TTT_EPOCHS passes over the chunk's targets. Sequences are as long as in training; the last one reaches back, over targets
        that then weigh nothing, so that all have one length; each target weighs in once an epoch (by its bytes: TTT_BYTE_WEIGHTED).

        tokens [N+1], or [P, N+1]: the chunk of P streams side by side, of which `lengths` [P] says how many targets they have. A stream's share
        of such a chunk may be short. It then has three times its length of context at most, and more sequences make up a step.
        """
        cfg, ctx = self.cfg, self.ctx
        streams = tokens if tokens.dim() == 2 else tokens[None]
        size, batch_seqs = min(self.seq_len, chunk.end), cfg.ttt_batch_seqs
        if len(streams) > 1:
            size = min(size, 4 * (chunk.end - chunk.start))
            batch_seqs *= max(1, self.seq_len // (chunk.end - chunk.start))
        first = max(0, min(chunk.start, chunk.end - size))
        windows = [(first + start, max(first + begin, chunk.start)) for start, begin, _ in plan_windows(chunk.end - first, size, size)]
        index = torch.tensor([start for start, _ in windows], device=ctx.device)[:, None] + torch.arange(size, device=ctx.device)
        weights = (
            (index >= torch.tensor([begin for _, begin in windows], device=ctx.device)[:, None]).float().repeat_interleave(len(streams), 0)
        )
        # Sequences [windows * P, size]: every stream's first, then every stream's second …
        inputs, targets = (streams[:, at].transpose(0, 1).flatten(0, 1).long() for at in (index, index + 1))
        if lengths is not None:
            weights = weights * (index[:, None] < lengths[:, None]).flatten(0, 1)
        if cfg.ttt_byte_weighted:
            weights = weights * self.byte_table.count(inputs, targets).float()
        # What is context alone in every sequence needs no head: with streams side by side that is three quarters.
        scored = size - min(begin - start for start, begin in windows) if len(streams) > 1 else size
        targets, weights = targets[:, -scored:], weights[:, -scored:]
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["multiple"]
        healthy = torch.ones((), device=ctx.device, dtype=torch.bool)
        for start in list(range(0, len(inputs), batch_seqs)) * cfg.ttt_epochs:
            batch = slice(start, start + batch_seqs)
            # A chunk of nothing but zero-byte tokens has no weight at all: its step is zero, not 0/0.
            total = weights[batch].sum().clamp_min(1e-9)
            mine = torch.arange(len(inputs), device=ctx.device)[batch][ctx.rank :: ctx.world_size]
            with repeatable_gradients(ctx.device):
                healthy &= self._step(inputs[mine], targets[mine], weights[mine] / total)
        if not healthy:
            raise UserError(
                f"TTT diverged (gradient not finite) on the chunk that starts at token {chunk.start}: lower TTT_LR={cfg.ttt_lr}"
            )
        self._assert_ranks_equal(chunk)

    def _step(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """One optimizer step on this rank's share of a batch (weights sum to 1 over all ranks). Returns whether it was finite."""
        micro = max(1, self.micro_tokens // inputs.size(1))
        for start in range(0, len(inputs), micro):
            x, y, w = (t[start : start + micro] for t in (inputs, targets, weights))
            if self.one_shape and len(x) < micro:
                fill = micro - len(x)
                x, y = (torch.cat((t, t[-1:].expand(fill, -1))) for t in (x, y))
                w = torch.cat((w, torch.zeros_like(w[-1:]).expand(fill, -1)))
            score_last = y.size(1) % x.size(1)  # 0: all
            (self.forward(x, y, reduction="none", score_last=score_last) * w).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        flat = self.ctx.all_reduce_sum(torch.cat([grad.flatten() for grad in grads]))
        norm = flat.norm()
        if self.cfg.ttt_grad_clip:
            flat *= (self.cfg.ttt_grad_clip / (norm + 1e-6)).clamp(max=1.0)
        for param, grad in zip(self.params, flat.split([p.numel() for p in self.params])):
            param.grad = grad.view_as(param)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - self.cfg.ttt_polyak)
        return torch.isfinite(norm)

    def checksum(self) -> int:
        """Of the bits of every trained parameter."""
        total = sum(param.detach().view(torch.int32).sum(dtype=torch.int64) for param in self.params)
        return int(total) % (1 << 50)  # exact in float64, which every backend can reduce

    def _assert_ranks_equal(self, chunk: Chunk) -> None:
        sums = torch.zeros(self.ctx.world_size, dtype=torch.float64, device=self.ctx.device)
        sums[self.ctx.rank] = self.checksum()
        every = self.ctx.all_reduce_sum(sums).tolist()
        assert len(set(every)) == 1, f"ranks hold different weights after the chunk at token {chunk.start}: checksums {every}"


# ----------------------------------------------------------------------------------------------------------------------
# The evaluator
# ----------------------------------------------------------------------------------------------------------------------


class FewShapes:
    """A forward that sees few shapes: windows are padded to whole batches, scored tails to the stride or the window.

    A compiler takes many seconds for every new shape. And a matrix product's last bits depend on its shape: with the shapes fixed, a
    target's distribution is the same to the bit whether the tokens after it are there or not, which is what a blind replica shows.
    Batches that a GPU is through with before the host has launched them are replayed as CUDA graphs: a result holds until the next call.
    """

    SMALL = 32_768  # tokens

    def __init__(self, model: GPT, forward: Callable[..., Tensor], batch: int, stride: int, length: int, graphs: bool):
        self.model, self.forward, self.batch, self.stride, self.length = model, forward, batch, stride, length
        on_cuda = next(model.parameters()).device.type == "cuda"
        self.graphed = Graphed(self._run, graphs and on_cuda and batch * length <= self.SMALL)

    def _run(self, inputs: Tensor, boundaries: Tensor | None, **options) -> Tensor:
        return self.forward(inputs, boundaries=boundaries, **options)

    def __call__(self, inputs: Tensor, targets: Tensor | None = None, *, reduction: str = "none", score_last: int = 0) -> Tensor:
        """Logits float32 [B, n, V] or, with targets, their losses [B, n], which are of the same logits: the forward that scores and the one
        that shows whole distributions are one."""
        assert reduction == "none"
        rows, last = inputs.size(0), score_last or inputs.size(1)
        if (fill := self.batch * self.length // inputs.size(1) - rows) > 0:
            inputs = torch.cat((inputs, inputs[-1:].expand(fill, -1)))
        wide = min(self.stride, inputs.size(1)) if last <= self.stride else inputs.size(1)
        logits = self.graphed(inputs, self.model.boundaries(inputs), score_last=wide)[:rows, -last:]
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets[:, -last:].flatten(), reduction=reduction).view(rows, last)


@dataclasses.dataclass
class EvaluationTrace(Trace):
    """An audit.Trace with what the report wants besides."""

    series: dict[str, float] = dataclasses.field(default_factory=dict)  # name -> summed nll in nats
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    chunks: list[float] = dataclasses.field(default_factory=list)  # mean nll a chunk
    invalid: dict | None = None
    contexts_known: int = 0
    contexts_refused: int = 0
    expert_bytes: int = 0

    def bpb(self, name: str) -> float:
        return self.series[name] / math.log(2) / self.bytes_scored


class ScoreFirstEvaluator:
    """Sliding windows + TTT + experts over one token stream. Every `session` (and `run`, which is one) starts afresh.

    The order of a run, which is all that makes it valid: for each chunk, in order: score it; in blocks, if there are experts, each block
    counted only once it is scored; then train on it. Every score and every use is written to the ledger where it happens.
    """

    def __init__(self, model: GPT, cfg: Config, byte_table: ByteTable, ctx: RunContext, stretch: int = 0):
        """stretch: targets whose windows are read together; 0: as many as fill a batch of every rank."""
        self.cfg, self.vocab_size, self.ctx = cfg.eval, cfg.model.vocab_size, ctx
        self.byte_table = byte_table.to(ctx.device)
        self.seq_len = cfg.eval.eval_seq_len or cfg.train.train_seq_len
        self.batch = eval_batch_size(cfg.eval, self.seq_len, ctx.device)
        self.stretch = stretch or self.batch * cfg.eval.eval_stride * ctx.world_size
        forward = maybe_compile(model, cfg.run)
        self.compiled = forward is not model
        self.forward = FewShapes(model, forward, self.batch, cfg.eval.eval_stride, self.seq_len, cfg.run.cuda_graphs)
        self.trainer = self.document_trainer = None
        if cfg.eval.ttt_mode == "document":
            self.document_trainer = DocumentTrainer(model, cfg.eval, cfg.run.seed, self.seq_len, ctx.device, cfg.run.cuda_graphs)
        elif cfg.eval.ttt_mode == "stream":
            seq_len = cfg.eval.ttt_seq_len or self.seq_len
            self.trainer = TestTimeTrainer(model, forward, cfg, self.byte_table, ctx, seq_len)
        # With attention across documents, weights that learn on, or counts, a document's score rests on the documents before it.
        forgets = cfg.eval.ttt_mode != "stream" or cfg.eval.ttt_reset_per_doc
        separate = cfg.model.document_mask or cfg.eval.by_document
        self.documents_independent = separate and forgets and not cfg.eval.expert_names

    @torch.no_grad()
    def sliding(self, tokens: Tensor):
        """The plain pass with the artifact's weights: train_gpt.evaluate."""
        if self.trainer:
            self.trainer.reset()
        return evaluate(self.forward, tokens, self.byte_table, self.cfg, self.ctx, self.seq_len, self.cfg.eval_stride)

    def compile(self, targets: int, full: bool = False, plain: bool = True) -> float:
        """Have every graph of an evaluation of `targets` targets compiled and recorded, so that the rates reported are the evaluation's own;
        returns the seconds it took. On made-up tokens: what is evaluated is not seen before it is scored. plain: the sliding pass too."""
        if not self.compiled and self.ctx.device.type == "cpu":
            return 0.0
        began = time.perf_counter()
        size = min(targets, self.seq_len + (self.batch + 1) * self.cfg.eval_stride * self.ctx.world_size) + 1
        # By document: one of every length that a window is filled up to, and one that needs a second window.
        lengths = [*padded_lengths(self.seq_len), self.seq_len + self.cfg.eval_stride] if self.cfg.by_document else [size]
        size = max(size, sum(lengths))
        made_up = torch.randint(2, self.vocab_size, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        made_up[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = BOS_ID
        if plain:
            self.sliding(made_up)
        self.run(made_up, full)
        if self.trainer:
            self.trainer.learn(made_up.to(self.ctx.device), Chunk(0, size - 1), 0.0)
            self.trainer.reset()
        return time.perf_counter() - began

    def session(self, targets: int, full: bool = True) -> Session:
        return Session(self, targets, full, timed=False)

    def run(
        self, tokens: Tensor, full: bool = False, report: Callable[..., None] | None = None, advance: Callable[[int], None] | None = None
    ) -> EvaluationTrace:
        """Evaluate. full: by way of whole distributions, as a session does, to the bit; otherwise only where experts need them.
        `report(chunk number, of, trace, target reached)` after each chunk, `advance(targets)` after each block."""
        if len(tokens) < 2:
            raise UserError("the validation split has fewer than two tokens: nothing to score")
        full = full and self.document_trainer is None  # there losses and distributions are of the same logits
        session = Session(self, len(tokens) - 1, full, report, advance)
        session.feed(tokens)
        session.catch_up(session.targets)
        return session.close()


class WindowReader:
    """What the model says of a stream of which more and more becomes known, by windows: logits or losses of any stretch."""

    def __init__(self, evaluator: ScoreFirstEvaluator, tokens: Tensor, text: Tensor, full: bool):
        """tokens [N + 1]: the text on the device, and on the CPU; filled from the left by whoever calls. full: no shape of a forward
        tells where a document ends."""
        self.evaluator, self.cfg, self.ctx, self.full = evaluator, evaluator.cfg, evaluator.ctx, full
        self.tokens, self.text = tokens, text
        self.windows = plan_windows(len(tokens) - 1, evaluator.seq_len, self.cfg.eval_stride)
        self.begins = [window.score_from for window in self.windows]
        self.stretch = evaluator.stretch
        self.chunk: Chunk | None = None
        self.ahead: list[tuple[int, int, Tensor, Tensor]] = []  # (start, known then, positions, values) of the last stretches

    def values(self, begin: int, end: int, known: int, chunk: Chunk, whole: bool) -> tuple[Tensor, Tensor]:
        """This rank's share of targets begin..end-1 of a chunk: (ascending positions [n] on the CPU, losses [n] or, whole, logits [n, V]).

        Logits come a stretch of windows at a time; a stretch is kept for those who come back to it, and computed again once more of its
        inputs are known. Blank where nothing is known yet.
        """
        if not whole:
            return self._compute(begin, end, whole)
        if chunk.start != (self.chunk or chunk).start:
            self.ahead = []  # other weights
        self.chunk, self.ahead = chunk, [part for part in self.ahead if part[0] + self.stretch > begin]
        first = chunk.start + (begin - chunk.start) // self.stretch * self.stretch
        for start in range(first, min(end, known), self.stretch):
            until = min(start + self.stretch, chunk.end)
            kept = next((part for part in self.ahead if part[0] == start), None)
            if kept is None or kept[1] < min(known, until):
                values = self._compute(start, until, whole)
                self.ahead = [part for part in self.ahead if part is not kept] + [(start, known, *values)]
        self.ahead.sort(key=lambda part: part[0])
        positions, logits = (torch.cat([part[i] for part in self.ahead]) for i in (2, 3))
        return self._only((positions >= begin) & (positions < end), positions, logits)

    def _only(self, wanted: Tensor, positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return positions[wanted], values if wanted.all() else values[sent(wanted.nonzero().squeeze(1), self.ctx.device)]

    def _windows_between(self, start: int, end: int) -> list[Window]:
        """Windows that score targets start..end-1. One that reaches over `start` is scored from there on only: same context, same result."""
        if self.cfg.by_document:
            return document_windows(self.text, self.evaluator.seq_len, self.cfg.eval_stride, start, end)
        first = bisect.bisect_right(self.begins, start) - 1
        last = bisect.bisect_left(self.begins, end)
        return [window._replace(score_from=max(window.score_from, start)) for window in self.windows[first:last]]

    def _compute(self, start: int, end: int, whole: bool) -> tuple[Tensor, Tensor]:
        evaluator, ctx = self.evaluator, self.ctx

        def logits(inputs: Tensor, targets: Tensor, *, reduction: str, score_last: int) -> Tensor:
            return evaluator.forward(inputs, score_last=score_last)

        mine = self._windows_between(start, end)[ctx.rank :: ctx.world_size]
        shape = (evaluator.vocab_size,) if whole else ()
        positions, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, *shape, device=ctx.device)]
        sizes = evaluator.seq_len, self.cfg.eval_stride, evaluator.batch
        for at, value in score_windows(logits if whole else evaluator.forward, self.tokens, mine, *sizes, whole=self.full):
            at, value = self._only(at < end, at, value)
            positions.append(at)
            values.append(value)
        positions, values = torch.cat(positions), torch.cat(values)
        if self.cfg.by_document:  # came in batches of like lengths
            positions, order = positions.sort()
            values = values[sent(order, ctx.device)]
        return positions, values

    def close(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank has of a block."""

    prediction: Prediction
    mine: Tensor  # int64 [n] on the CPU: which of the block's targets it is of
    times: Tensor  # float64 [block]: how often each target was read, on all ranks together


class Session:
    """One evaluation of a text of `targets` targets whose tokens become known from left to right: `feed` them, and `rows` gives the
    distributions of targets whose past is known. What lies ahead is blank here; it is scored, counted and learned from when it has come.

    The text is worked off block by block (EXPERT_BLOCK_TOKENS; without experts: what one forward scores), counted from a chunk's start,
    whatever the number of ranks and however the tokens come: the result depends on neither.
    """

    def __init__(
        self,
        evaluator: ScoreFirstEvaluator,
        targets: int,
        full: bool,
        report: Callable[..., None] | None = None,
        advance: Callable[[int], None] | None = None,
        timed: bool = True,
    ):
        """timed: know what each phase takes, for which the device is waited for after each."""
        cfg, ctx = evaluator.cfg, evaluator.ctx
        self.timed = timed and ctx.device.type == "cuda"
        self.advance = advance or (lambda count: None)
        self.evaluator, self.cfg, self.ctx, self.targets, self.report = evaluator, cfg, ctx, targets, report
        self.text = torch.zeros(targets + 1, dtype=torch.int32)  # blank beyond `known`; blank is no BOS
        self.tokens = self.text.to(ctx.device)  # the same where the model is
        self.known = 0
        self.trace = EvaluationTrace(Ledger(targets), bytes_scored=0)
        # The mixture without experts is the model itself: that path also serves to show full distributions.
        self.mixture = self.invalid = None
        if cfg.expert_names or full or cfg.invalid_cache:
            self.mixture = ExpertMixture(cfg, evaluator.vocab_size, ctx.device)
            self.sums = torch.zeros(len(self.mixture.series), dtype=torch.float64, device=ctx.device)
        if cfg.invalid_cache:
            self.invalid = InvalidClaims(evaluator.vocab_size, ctx)
        if evaluator.document_trainer:
            self.reader = DocumentReader(evaluator.document_trainer, self.tokens, self.trace.ledger, ctx)
            self.block = targets
        else:
            self.reader = WindowReader(evaluator, self.tokens, self.text, full)
            self.block = self.reader.stretch
        if cfg.expert_names or cfg.invalid_cache or (self.mixture and evaluator.document_trainer):
            self.block = cfg.expert_block_tokens
        self.chunks = plan_chunks(self.text, cfg)
        self.number = 0  # of the chunk at hand
        self.done = 0  # targets before it are scored and counted; a block begins here
        if evaluator.trainer:
            evaluator.trainer.reset()

    def feed(self, tokens: Tensor) -> None:
        """The next tokens [n] of the text."""
        tokens = torch.as_tensor(tokens, dtype=torch.int32).cpu()
        if self.known + len(tokens) > len(self.tokens):
            raise UserError(f"the text has {len(self.tokens):,} tokens: {len(tokens):,} more than {self.known:,} are too many")
        for place in (self.text, self.tokens):
            place[self.known : self.known + len(tokens)] = tokens
        self.known += len(tokens)
        if bool((tokens == BOS_ID).any()):
            self.chunks = plan_chunks(self.text, self.cfg)  # as far as they are begun they stay what they were

    def catch_up(self, target: int) -> None:
        """Work off every block that ends at or before `target` and whose tokens are known."""
        while self.done < target:
            begin, end = self._block()
            if end > target or end >= self.known:
                return
            self._finish(begin, end)

    def rows(self, first: int, last: int) -> Tensor:
        """Probabilities float32 [last - first, V], on the CPU, of targets first..last-1, which lie at or after all that `rows` has given."""
        if not 0 <= first < last <= self.known:
            raise UserError(f"targets {first}..{last - 1} cannot be asked for: {self.known} tokens are known")
        if self.evaluator.documents_independent and self.evaluator.trainer is None:
            self._pass_over(first)
        self.catch_up(first)
        parts = []
        while first < last:
            begin, end = self._block()
            if first < begin:
                raise UserError(f"target {first} lies before what is already counted")
            with self._scoring():
                share = self._predict(begin, end)
            upto = min(end, last)
            here = ((share.mine >= first - begin) & (share.mine < upto - begin)).nonzero().squeeze(1)
            shown = torch.zeros(upto - first, self.evaluator.vocab_size, device=self.ctx.device)
            place = sent(share.mine[here] + begin - first, self.ctx.device)
            shown[place] = share.prediction.distribution(sent(here, self.ctx.device))
            parts.append(self.ctx.all_reduce_sum(shown))
            if upto == end < self.known:
                self._finish(begin, end, share)
            elif upto < last:
                raise AssertionError("a block whose tokens are all known was not finished")
            first = upto
        rows = torch.cat(parts)
        if rows.device.type == "cpu":
            return rows
        return torch.empty(rows.shape, pin_memory=True).copy_(rows)  # pageable memory would take as long as the forward

    def close(self) -> EvaluationTrace:
        trace, tokens = self.trace, self.tokens
        self.reader.close()
        scored = (trace.ledger.coverage > 0).to(self.ctx.device)
        trace.bytes_scored = int(self.evaluator.byte_table.targets(tokens)[scored].sum())
        if self.mixture is not None:
            trace.series = dict(zip(self.mixture.series, self.sums.tolist()))
            history = self.mixture.history
            trace.contexts_known, trace.contexts_refused = history.contexts.next_id, history.contexts.refused
            trace.expert_bytes = history.nbytes
        if self.invalid:
            trace.invalid = self.invalid.summary(trace.bytes_scored)
        return trace

    # -- order --

    def _pass_over(self, target: int) -> None:
        """Go to the block of a target without scoring what is before it: nothing that is asked for rests on that."""
        while self.done < target:
            if self.done == self.chunks[self.number].end:
                self.number += 1
            end = min(self.done + self.block, self.chunks[self.number].end)
            if end > target:
                return
            self.done = end

    def _block(self) -> tuple[int, int]:
        """The block that begins at `done`; training on the chunk before it comes first, where there is one."""
        if self.done == self.chunks[self.number].end:
            self._next_chunk()
        chunk = self.chunks[self.number]
        return self.done, min(self.done + self.block, chunk.end)

    def _next_chunk(self) -> None:
        cfg, trainer = self.cfg, self.evaluator.trainer
        chunk, following = self.chunks[self.number : self.number + 2]
        if trainer and following.fresh:
            trainer.reset()
        elif trainer and cfg.ttt_epochs:
            self.trace.ledger.use(slice(chunk.start, chunk.end), "training")
            with self.clock("training"):
                trainer.learn(self.tokens, chunk, chunk_lr(cfg, self.number, len(self.chunks)))
        self.number += 1

    def _finish(self, begin: int, end: int, share: Share | None = None) -> None:
        """Score the block begin..end-1, whose tokens are all known, and count it."""
        with self._scoring():
            if self.mixture is None:
                self._record_plain(begin, end)
            else:
                share = share or self._predict(begin, end)
                with self.clock("experts"):
                    self._record_mixed(begin, end, share)
        self.done = end
        self.advance(end - begin)
        chunk = self.chunks[self.number]
        if end == chunk.end:
            self.trace.chunks.append(self.trace.ledger.nll[chunk.start : end].mean().item())
            if self.report:
                self.report(self.number, len(self.chunks), self.trace, end)

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        trainer = self.evaluator.trainer
        with torch.no_grad(), self.clock("scoring"), trainer.scoring_weights() if trainer else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.timed:
            torch.cuda.synchronize(self.ctx.device)
        self.trace.seconds[phase] = self.trace.seconds.get(phase, 0.0) + time.perf_counter() - began

    # -- scores --

    def _record(self, start: int, end: int, nll: Tensor, times: Tensor) -> None:
        nll, times = torch.stack((nll, times)).cpu()  # one wait for the GPU, not three
        assert bool((times == 1).all()), f"targets {start}..{end - 1} were not scored exactly once each"
        if not bool(torch.isfinite(nll).all()):
            raise UserError(f"the loss is not finite in the targets from {start} on: a damaged model, or TTT_LR={self.cfg.ttt_lr} too high")
        self.trace.ledger.score(slice(start, end), nll)

    def _record_plain(self, start: int, end: int) -> None:
        positions, nll = self.reader.values(start, end, self.known, self.chunks[self.number], whole=False)
        gathered = torch.zeros(2, end - start, dtype=torch.float64, device=self.ctx.device)
        at = sent(positions - start, self.ctx.device)
        gathered[0, at] = nll.double()
        gathered[1].index_add_(0, at, torch.ones_like(at, dtype=torch.float64))
        self._record(start, end, *self.ctx.all_reduce_sum(gathered))

    def _predict(self, begin: int, end: int) -> Share:
        """This rank's part of the block's distributions, complete before a target is named."""
        with self.clock("model"):
            positions, logits = self.reader.values(begin, end, self.known, self.chunks[self.number], whole=True)
            logits, mine, times = self._share(begin, end, positions, logits)
        with self.clock("experts"):
            at = torch.arange(begin, end, device=self.ctx.device)
            contexts = context_rows(self.tokens, at, self.mixture.context_length, self.evaluator.vocab_size)
            return Share(self.mixture.predict(logits, contexts, sent(mine, self.ctx.device)), mine, times)

    def _share(self, begin: int, end: int, positions: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every rank gets the same stretch of the block, of the same shape, whichever rank has read which targets and however many are known yet (blank
        where nothing is): a shape decides how a GPU adds up, and last bits decide which of the mixer's bins a target falls into."""
        ctx, size = self.ctx, end - begin
        at = sent(positions - begin, ctx.device)
        times = torch.zeros(size, dtype=torch.float64, device=ctx.device).index_add_(0, at, torch.ones_like(at, dtype=torch.float64))
        if ctx.world_size > 1 or len(positions) < size:
            block = torch.zeros(size, self.evaluator.vocab_size, device=ctx.device)
            block[at] = logits
            logits, times = ctx.all_reduce_sum(block), ctx.all_reduce_sum(times)
            positions = torch.arange(begin, end)
        share = slice(ctx.rank * -(-size // ctx.world_size), (ctx.rank + 1) * -(-size // ctx.world_size))
        return logits[share], positions[share] - begin, times

    def _record_mixed(self, begin: int, end: int, share: Share) -> None:
        """Scores of the block's targets, and what the experts learn from them."""
        cfg, ctx, mixture = self.cfg, self.ctx, self.mixture
        prediction, mine, at = share.prediction, sent(share.mine, ctx.device), torch.arange(begin, end, device=ctx.device)
        targets = self.tokens[at + 1].long()
        record = prediction.record(targets[mine])
        gathered = torch.zeros(end - begin, record.size(1), dtype=torch.float64, device=ctx.device)
        gathered[mine] = record
        gathered, statistics = ctx.all_reduce_sum(gathered), ctx.all_reduce_sum(prediction.statistics(targets[mine]))
        self._record(begin, end, -gathered[:, 0], share.times)
        self.sums -= gathered[:, : len(mixture.series)].sum(0)
        if self.invalid:
            contexts = context_rows(self.tokens, at, self._claims_context, self.evaluator.vocab_size)
            self.invalid.observe(prediction, mine, contexts, targets)
        if cfg.expert_names:
            self.trace.ledger.use(slice(begin, end), "counts and weights of the experts")
            mixture.update(prediction.block_contexts, prediction.block_nodes, targets, gathered, statistics)

    @property
    def _claims_context(self) -> int:
        return max(self.mixture.context_length, 8)


class InvalidClaims:
    """What the target-keyed cache would have claimed on the same text, and what its "probabilities" sum to. Never part of a score."""

    def __init__(self, vocab_size: int, ctx: RunContext, sum_every: int = 8):
        self.ctx, self.sum_every = ctx, sum_every
        self.cache = InvalidTargetKeyedCache(vocab_size, device=ctx.device)
        self.totals = torch.zeros(4, dtype=torch.float64, device=ctx.device)  # claimed nll, sums over V, how many, largest
        self.blocks = 0

    def observe(self, prediction: Prediction, mine: Tensor, contexts: Tensor, targets: Tensor) -> None:
        log_p, picked = prediction.ladder[0], targets[mine, None]
        claimed = self.cache.claim(log_p.gather(1, picked).exp(), prediction.entropy, contexts[mine], picked)
        self.totals[0] -= claimed.double().clamp_min(1e-30).log().sum()
        if self.blocks % self.sum_every == 0 and len(mine):
            few = slice(0, None, max(1, len(mine) // 16))
            everything = torch.arange(log_p.size(1), device=log_p.device).expand(len(mine[few]), -1)
            sums = self.cache.claim(log_p[few].exp(), prediction.entropy[few], contexts[mine[few]], everything).sum(1)
            self.totals[1] += sums.sum()
            self.totals[2] += len(sums)
            self.totals[3] = torch.maximum(self.totals[3], sums.max())
        self.cache.update(contexts, targets)
        self.blocks += 1

    def summary(self, bytes_scored: int) -> dict:
        largest = self.totals[3].item()
        nll, sums, count, _ = self.ctx.all_reduce_sum(self.totals.clone()).tolist()
        return {
            "claimed_bpb": nll / math.log(2) / bytes_scored,
            "mean_sum_over_vocabulary": sums / max(count, 1),
            "largest_sum_over_vocabulary": largest,
            "valid": False,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Audit of the evaluation that is reported
# ----------------------------------------------------------------------------------------------------------------------


def serve_artifact(path: Path, ctx: RunContext) -> None:
    """`--serve`: evaluate a text that a referee or the audit sends through stdin, piece by piece (parts/REFEREE.md)."""

    def begin(start: dict) -> Session:
        artifact = load_artifact(path, ctx.device)
        cfg = artifact.cfg
        if start["vocab_size"] != cfg.model.vocab_size:
            raise UserError(f"the text's vocabulary is {start['vocab_size']}, the artifact's {cfg.model.vocab_size}")
        if start["block"]:
            # What will be asked for at once is what a forward should score. By document, where most of a text lies in its documents'
            # first windows, half as many windows nearly always do.
            cfg = cfg.replace(eval_batch_seqs=-(-start["block"] // (cfg.eval.eval_stride * (1 + cfg.eval.by_document))))
        else:
            cfg = auditable(cfg, start["targets"], ctx)
        table = ByteTable.from_tokenizer(load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size))
        evaluator = ScoreFirstEvaluator(artifact.model, cfg, table, ctx, start["block"])
        evaluator.compile(start["targets"], full=True, plain=False)
        return evaluator.session(start["targets"])

    serve(begin)


def auditable(cfg: Config, targets: int, ctx: RunContext) -> Config:
    """Settings of an evaluation that can be audited. Each drawn target costs the replica a forward: with batches no larger than this all of them cost
    at most what scoring the text twice does. The batch has to be the same on both sides, and without an audit too: its size may move last bits."""
    fitting = max(1, 2 * targets // (cfg.eval.audit_samples * cfg.eval.eval_stride * ctx.world_size))
    seq_len = cfg.eval.eval_seq_len or cfg.train.train_seq_len
    return cfg.replace(eval_batch_seqs=min(fitting, eval_batch_size(cfg.eval, seq_len, ctx.device)))


def submission(path: Path, cfg: Config, folder: Path, *arguments: str) -> tuple[list[str], list[Path]]:
    """(command, files that it reads) of the evaluation code as it is submitted: the one script, the artifact and the tokenizer."""
    script = folder / "evaluate.py"
    script.write_bytes(code_script())
    folder.chmod(0o755)  # where another user is the sandbox
    return [sys.executable, str(script), str(path), *arguments], [script, path, Path(cfg.run.tokenizer_path)]


@contextlib.contextmanager
def blind_replica(path: Path, cfg: Config, targets: int, ctx: RunContext) -> Iterator[Replica]:
    """A new process with the submitted code, shut off from the shards. With several ranks each starts its own, and they form a group beside this one,
    which needs the network: no sandbox then."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or ctx.world_size > 1
    }
    if ctx.world_size > 1:
        with socket.socket() as free:
            free.bind(("", 0))
            environment["MASTER_PORT"] = str(ctx.broadcast_object(free.getsockname()[1]))
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    with tempfile.TemporaryDirectory() as folder:
        command, files = submission(path, cfg, Path(folder), "--serve")
        sandbox = Sandbox(files, secret=list_shards(cfg.run.data_path, "val")) if ctx.world_size == 1 else None
        with Replica(command, targets, cfg.model.vocab_size, sandbox=sandbox, environment=environment) as replica:
            yield replica


def referee_artifact(path: Path, cfg: Config, text: Path, out: Path, options: list[str]) -> int:
    """`--referee`: have the submission judged on raw text. The referee is a program of its own, no part of what is submitted."""
    root = Path(__file__).resolve().parent
    if not (root / "parts" / "referee.py").is_file():
        raise UserError("a submission does not carry its judge: run --referee from the project's folder")
    run = f"import sys; sys.path.insert(0, {str(root)!r}); from parts.files import cli; from parts.referee import main; cli(main)"
    with tempfile.TemporaryDirectory() as folder:
        command, files = submission(path, cfg, Path(folder), "--serve")
        judge = [sys.executable, "-c", run, str(text), "--tokenizer", cfg.run.tokenizer_path, "--out", str(out)]
        for file in files:
            judge += ["--read", str(file)]
        return subprocess.run([*judge, *options, "--", *command]).returncode


def prove_artifact(path: Path, score: Path) -> int:
    """`--prove`: compress the validation text with the artifact and have it restored, in processes of their own. codec.py is no part of a submission."""
    program = Path(__file__).resolve().with_name("codec.py")
    if not program.is_file():
        raise UserError("a submission does not carry the codec: run --prove from the project's folder")
    if torch.cuda.is_available():  # the processes use the same GPU
        gc.collect()
        torch.cuda.empty_cache()
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([sys.executable, str(program), "prove", str(path), "--out", str(score)], env=alone).returncode


def audit_run(
    path: Path, artifact: Artifact, evaluator: ScoreFirstEvaluator, tokens: Tensor, trace: EvaluationTrace
) -> list[auditing.Check]:
    """Every check of an evaluation that has been made."""
    cfg, ctx, targets = artifact.cfg, evaluator.ctx, len(tokens) - 1
    if ctx.device.type == "cuda":
        torch.cuda.empty_cache()  # the replica uses the same GPU
    drawn = auditing.draw_targets(trace.ledger, cfg.eval.audit_samples)
    # Windows are answered one at a time either way; a document is read from its beginning, and many at once cost little more than one.
    side_by_side = evaluator.documents_independent and evaluator.document_trainer and int(tokens[0]) == BOS_ID
    told = auditing.excerpts(tokens, drawn, BOS_ID) if side_by_side else auditing.whole_text(tokens, drawn)
    with blind_replica(path, cfg, told.targets, ctx) as replica:
        with contextlib.suppress(ReplicaError):  # the check will meet it again, and report it
            replica.ready()  # its start is no measure of what its answers take
        with ctx.progress("audit", len(drawn), "targets") as advance:
            blind = auditing.check_blind(replica, tokens, trace, told, advance)
    with blind_replica(path, cfg, targets, ctx) if evaluator.documents_independent else contextlib.nullcontext() as replica:
        independence = auditing.check_documents(replica, tokens, trace, BOS_ID)
    tokenizer, manifest = load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size), load_manifest(cfg.run.data_path)
    there = sum(len(load_shard(shard)) for shard in list_shards(cfg.run.data_path, "val"))
    whole, trained_on, here = len(tokens) == there, artifact.meta.get("train_data_sha256"), None
    with contextlib.suppress(UserError):  # a folder of validation shards alone
        here = split_digest(cfg.run.data_path, "train")
    # EVAL_TOKENS may cut a character spelled in bytes, or a word from its case operator: what is there of it is counted, not decoded.
    cut = 0 if whole else auditing.unfinished_tokens(tokens, tokenizer, BOS_ID)
    documents = auditing.decoded_documents(tokens[: len(tokens) - cut], tokenizer, BOS_ID)
    unscored = auditing.bytes_before_the_first_target(tokens, tokenizer, BOS_ID)
    raw = {}
    if evaluator.byte_table.recorded is None:  # else the export's tokens do not give the text back
        counted = int(evaluator.byte_table.targets(tokens.to(ctx.device))[targets - cut :].sum())
        raw["decoded text"] = sum(map(len, documents)) + counted - unscored
    of_raw_text = bool(manifest) and whole and "raw_bytes_counted_from" not in manifest
    if of_raw_text:
        raw["manifest"] = manifest["splits"]["val"]["raw_bytes"] - unscored
    return [
        *blind,
        independence,
        auditing.check_score_before_update(trace),
        auditing.check_single_pass(trace),
        auditing.check_whole_text(len(tokens), there, manifest),
        auditing.check_bytes(trace, raw, of_raw_text),
        auditing.check_disjoint(cfg.run.data_path, manifest, documents if whole else None, trained_on is not None and trained_on == here),
        auditing.check_training_text(trained_on, here),
        auditing.check_tokenizer(tokenizer, manifest),
        auditing.check_size(*sizes(artifact, tokenizer), SIZE_LIMIT_BYTES),
    ]


def sizes(artifact: Artifact, tokenizer) -> tuple[int, int, int, bool]:
    """Bytes of model, code and tokenizer, and whether the last counts."""
    return artifact.bytes_model, code_bytes(), Path(artifact.cfg.run.tokenizer_path).stat().st_size, auditing.tokenizer_counts(tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def expert_gains(trace: EvaluationTrace, mixture_names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What each expert is worth, bits per byte: transforms by what they take off when they are applied, members by what a mixture of the
    model's distribution with that member alone takes off."""
    gains: dict[str, dict[str, float]] = {}
    previous = "neural_raw"
    for name in trace.series:
        if name.startswith("+"):
            gains[name[1:]] = {"bpb": trace.bpb(name), "gain_bpb": trace.bpb(previous) - trace.bpb(name)}
            previous = name
    for name in mixture_names:
        if f"neural|{name}" in trace.series:
            with_model = trace.bpb(f"neural|{name}")
            gains[name] = {"alone_bpb": trace.bpb(name), "bpb": with_model, "gain_bpb": trace.bpb("neural") - with_model}
    return gains


def print_report(result: dict, ctx: RunContext) -> None:
    """The table for people; eval.json has the same figures."""
    seconds, rate = result["seconds"], result["tokens_per_second"]
    lines = [f"{'stage':<26}{'val_bpb':>9}{'seconds':>10}{'tokens/s':>12}"]

    def row(label: str, bpb: float | None, phase: str) -> None:
        if bpb is not None:
            took = f"{seconds[phase]:>10.1f}{rate[phase]:>12,.0f}" if phase in seconds else ""
            lines.append(f"{label:<26}{bpb:>9.4f}{took}")

    row("sliding window", result["sliding_bpb"], "sliding")
    row("+ TTT", result["ttt_bpb"], "score_first")
    row("+ experts", result["experts_bpb"], "score_first")
    for phase in ("model", "experts", "training"):
        if phase in seconds and (phase != "experts" or result["experts"]):
            lines.append(f"    {phase + ' alone':<31}{seconds[phase]:>10.1f}{rate[phase]:>12,.0f}")
    for name, gain in (result["experts"] or {}).items():
        lines.append(f"    {name:<22}{gain['bpb']:>9.4f}   {-gain['gain_bpb']:+.4f} bpb for the model with it")
    if result["invalid_cache"]:
        bad = result["invalid_cache"]
        lines.append(
            f"(invalid cache formula     {bad['claimed_bpb']:>9.4f}   its sum over the vocabulary is {bad['mean_sum_over_vocabulary']:,.1f} "
            f"on average, at most {bad['largest_sum_over_vocabulary']:,.1f}: no probability)"
        )
    lines.append("")
    lines.append(
        f"val_loss:{result['val_loss']:.6f} val_bpb:{result['val_bpb']:.6f} tokens_scored:{result['tokens_scored']:,} "
        f"bytes_scored:{result['bytes_scored']:,}"
    )
    lines.append(
        f"bytes_model:{result['bytes_model']:,} bytes_code:{result['bytes_code']:,} bytes_total:{result['bytes_total']:,} "
        f"of {SIZE_LIMIT_BYTES:,} bytes_tokenizer:{result['bytes_tokenizer']:,} ({'' if result['tokenizer_counted'] else 'not '}counted)"
    )
    for line in lines:
        ctx.log(line)


WORSE_BPB = 0.01  # what test-time training may cost before it is remarked on


class Evaluation:
    """An artifact on its validation text. Made, it has read everything and refused what is at fault; nothing is scored before `run`."""

    def __init__(self, path: Path, ctx: RunContext, audit: bool = False):
        self.began = time.perf_counter()
        self.path, self.ctx, self.audit = path, ctx, audit
        self.artifact = load_artifact(path, ctx.device)
        cfg = self.artifact.cfg
        self.tokens = load_tokens(cfg.run.data_path, "val", cfg.model.vocab_size, limit=cfg.eval.eval_tokens)
        self.val_data = split_digest(cfg.run.data_path, "val")
        self.tokenizer = load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size)
        self.cfg = auditable(cfg, len(self.tokens) - 1, ctx)
        byte_table = ByteTable.for_validation(self.tokenizer, cfg.run.data_path)
        self.evaluator = ScoreFirstEvaluator(self.artifact.model, self.cfg, byte_table, ctx)
        plan_windows(len(self.tokens) - 1, self.evaluator.seq_len, cfg.eval.eval_stride)  # refuses what leaves tokens out
        self.seconds: dict[str, float] = {}

    def run(self) -> dict:
        """Everything that eval.json holds."""
        self._announce()
        self.seconds["compile"] = self.evaluator.compile(len(self.tokens) - 1, full=self.audit)
        if self.seconds["compile"]:
            self.ctx.log(f"compiled in {self.seconds['compile']:.1f}s")
        cfg = self.cfg.eval
        trace = self._score_first() if cfg.ttt_mode != "off" or cfg.expert_names or cfg.invalid_cache or self.audit else None
        # Last, so that what counts is scored by a process that has not seen the text before.
        plain = self.evaluator.sliding(self.tokens)
        self.seconds["sliding"] = plain.seconds
        self.ctx.log(f"sliding val_bpb:{plain.val_bpb:.6f} in {plain.seconds:.1f}s ({plain.tokens_scored / plain.seconds:,.0f} tok/s)")
        result = {**self._scores(plain, trace), **self._sizes(), **self.circumstances()}
        if (result["ttt_bpb"] or 0.0) > plain.val_bpb + WORSE_BPB:
            worse = f"{result['ttt_bpb']:.4f} with it, {plain.val_bpb:.4f} without"
            rate = f"TTT_DOC_LR={cfg.ttt_doc_lr:g}" if cfg.ttt_mode == "document" else f"TTT_LR={cfg.ttt_lr:g}"
            self.ctx.log(f"warning: test-time training made the score worse: {worse}; lower {rate}, or set TTT_MODE=off")
        result["chunk_losses"] = trace.chunks if trace else None
        result["audit"] = self._audit(trace) if self.audit else None
        self.seconds["total"] = time.perf_counter() - self.began
        scoring = {phase: took for phase, took in self.seconds.items() if took and phase not in ("compile", "audit", "total")}
        rates = {phase: result["tokens_scored"] / took for phase, took in scoring.items()}
        return {**result, "seconds": self.seconds, "tokens_per_second": rates}

    def _announce(self) -> None:
        cfg, ctx = self.cfg, self.ctx
        validated, here = self.artifact.meta.get("val_data_sha256"), self.val_data
        if validated and here != validated:
            ctx.log(f"warning: the validation shards (SHA-256 {here[:12]}…) are not those the run was validated on ({validated[:12]}…)")
        mode = compile_mode(cfg.run, ctx.device)
        ctx.log(
            f"evaluating {len(self.tokens) - 1:,} targets: window {self.evaluator.seq_len}, stride {cfg.eval.eval_stride}, {ctx.world_size} rank(s) "
            f"on {ctx.device.type}, compiled: {'no' if mode == '0' else mode}"
        )
        for line in chosen_settings(self.artifact.cfg, known=("default", "run")):
            ctx.log(f"  {line}")

    def _score_first(self) -> EvaluationTrace:
        """The pass that counts: TTT and experts, as far as they are on."""
        cfg, ctx = self.cfg.eval, self.ctx
        if (trainer := self.evaluator.document_trainer) is not None:
            trainable = sum(param.numel() for param in trainer.params) // trainer.lanes
            ctx.log(
                f"score-first TTT by document: AdamW lr {cfg.ttt_doc_lr:g}, LoRA of rank {cfg.ttt_doc_rank} on {cfg.ttt_doc_sites} of every layer "
                f"call ({trainable:,} parameters a document), chunks of {cfg.ttt_doc_chunks}, {trainer.lanes} documents at once"
            )
        if cfg.ttt_mode == "stream":
            trainable = sum(param.numel() for param in self.evaluator.trainer.params)
            ctx.log(
                f"score-first TTT: {cfg.ttt_optimizer} lr {cfg.ttt_lr:g} on {cfg.ttt_params} ({trainable:,} parameters), "
                f"{cfg.ttt_epochs} epochs, chunks of {cfg.ttt_chunk_tokens:,}, schedule {cfg.ttt_lr_schedule}"
            )
        started, targets = time.perf_counter(), len(self.tokens) - 1

        def report(number: int, count: int, so_far: Trace, reached: int) -> None:
            if number % max(1, count // 20) == 0 or number + 1 == count:
                mean, took = so_far.ledger.nll[:reached].mean().item(), time.perf_counter() - started
                eta = f" eta:{duration(advance.left)}" if advance.rate else ""
                ctx.log(f"  chunk {number + 1}/{count} loss:{mean:.4f} tok/s:{reached / took:,.0f}{eta}")

        with ctx.progress("score-first pass", targets) as advance:
            trace = self.evaluator.run(self.tokens, self.audit, report, advance)
        self.seconds |= {"score_first": time.perf_counter() - started, **trace.seconds}
        return trace

    def _scores(self, plain: EvalResult, trace: EvaluationTrace | None) -> dict:
        """val_loss and val_bpb are of the last stage that is on; the others stand beside it."""
        scores = {"val_loss": plain.val_loss, "val_bpb": plain.val_bpb, "sliding_bpb": plain.val_bpb, "sliding_loss": plain.val_loss}
        scores |= {"ttt_bpb": None, "experts_bpb": None, "experts": None, "expert_tables": None, "invalid_cache": None}
        scores |= {"tokens_scored": plain.tokens_scored, "bytes_scored": plain.bytes_scored}
        if trace is None:
            return scores
        assert trace.bytes_scored == plain.bytes_scored and int(trace.scored.sum()) == plain.tokens_scored
        scores |= {"val_loss": trace.val_loss, "val_bpb": trace.val_bpb, "invalid_cache": trace.invalid}
        if self.cfg.eval.ttt_mode != "off":
            scores["ttt_bpb"] = trace.bpb("neural_raw") if trace.series else trace.val_bpb
        if names := self.cfg.eval.expert_names:
            tables = {"contexts": trace.contexts_known, "refused": trace.contexts_refused, "bytes": trace.expert_bytes}
            scores |= {"experts_bpb": trace.val_bpb, "experts": expert_gains(trace, names), "expert_tables": tables}
        return scores

    def _sizes(self) -> dict:
        model, code, tokenizer, counted = sizes(self.artifact, self.tokenizer)
        return {
            "bytes_model": model,
            "bytes_code": code,
            "bytes_tokenizer": tokenizer,
            "bytes_total": model + code + tokenizer * counted,
            "tokenizer_counted": counted,
        }

    def circumstances(self) -> dict:
        """What was evaluated, with what, where."""
        cfg, ctx = self.artifact.cfg, self.ctx
        return {
            "sha256": {
                "artifact": hashlib.sha256(self.path.read_bytes()).hexdigest(),
                "code": hashlib.sha256(code_script()).hexdigest(),
                "tokenizer": tokenizer_hash(cfg.run.tokenizer_path),
                "val_data": self.val_data,
                "tokens": hashlib.sha256(
                    self.tokens.numpy().astype("<u2").tobytes()
                ).hexdigest(),  # as in the shards, without their headers
            },
            "world_size": ctx.world_size,
            "device": torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "config": {**artifact_settings(cfg), **cfg.to_dict("run")},
            "run": {key: self.artifact.meta.get(key) for key in ("steps", "train_seconds", "looping", "tokenizer_sha256")},
        }

    def _audit(self, trace: EvaluationTrace) -> dict:
        started = time.perf_counter()
        checks = audit_run(self.path, self.artifact, self.evaluator, self.tokens, trace)
        self.seconds["audit"] = time.perf_counter() - started
        return {
            "verdict": auditing.verdict(checks),
            "missing": auditing.missing(checks),
            "scope": "val_bpb, over the whole of the text named by sha256.tokens; sliding_bpb, ttt_bpb and the experts' gains are not audited",
            "checks": [dataclasses.asdict(check) for check in checks],
        }


def differences(former: dict, now: dict) -> list[str]:
    """What a score was computed with that another is not: content by its hash, evaluation settings with their former value."""
    hashes, config = former.get("sha256") or {}, former.get("config") or {}
    named = [spec.name for spec in settings("eval")]
    return [f"another {what}" for what, value in now["sha256"].items() if hashes.get(what) != value] + [
        f"{name.upper()}={config.get(name)}" for name in named if config.get(name, now["config"][name]) != now["config"][name]
    ]


def retire_scores(path: Path, now: dict, ctx: RunContext) -> None:
    """Former scores make room before the next is computed: should that fail, no file claims to be its result. What is no score of the same
    artifact, code, text and settings stays, under a number."""
    previous = previous_name(path)
    for score in (previous, path):
        if not score.exists():
            continue
        if other := differences(read_json(score) or {}, now):
            kept = free_name(path)
            set_aside(score, kept)
            ctx.log(f"{score.name} was the score of {', '.join(other[:4])}{', …' * (len(other) > 4)}: kept as {kept.name}")
        elif score == path:
            set_aside(path, previous)


USAGE = """usage: python eval_ttt.py runs/<RUN_ID>|ARTIFACT [--audit] [--prove] [--out FILE.json]
       [--serve | --referee RAW.jsonl [--block N] [--cuts N]]"""


def parse_arguments(arguments: list[str]) -> tuple[Path, set[str], dict[str, str]]:
    """-> (artifact, flags, values by option)."""
    arguments, paths, flags, values = list(arguments), [], set(), {}
    while arguments:
        argument = arguments.pop(0)
        if argument in ("--audit", "--prove", "--serve"):
            flags.add(argument)
        elif argument in ("--referee", "--block", "--cuts", "--out") and arguments:
            values[argument] = arguments.pop(0)
        elif argument.startswith("-"):
            raise UserError(f"unknown argument {argument}; {USAGE}")
        else:
            paths.append(argument)
    judged = "--referee" in values
    apart = ("--serve" in flags) + judged  # what is done instead of an evaluation
    if len(paths) != 1 or apart > 1 or (apart and flags - {"--serve"}) or (values.keys() & {"--block", "--cuts"} and not judged):
        raise UserError(USAGE)
    if not values.get("--out", ".json").endswith(".json"):
        raise UserError(f"--out {values['--out']}: a score's file is named FILE.json")
    return artifact_file(paths[0]), flags, values


def main() -> int:
    say_near_misses(os.environ)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    path, flags, values = parse_arguments(sys.argv[1:])
    header, _ = packing.read_header(path.read_bytes(), str(path))
    cfg = resolve_config(os.environ, base=header.get("config"))
    out = Path(values.pop("--out", path.with_name("referee.json" if "--referee" in values else "eval.json")))
    if "--referee" in values:
        text = Path(values.pop("--referee"))
        return referee_artifact(path, cfg, text, out, [part for option in values.items() for part in option])
    ctx = setup_distributed(cfg.run.device, cfg.run.cache_dir)
    try:
        if "--serve" in flags:  # nothing may be printed: stdout is the protocol's
            serve_artifact(path, ctx)
            return 0
        result = evaluate_artifact(path, out, "--audit" in flags, ctx)
    except (UserError, OSError) as error:
        ctx.note(f"error: {fault_line(error)}")
        raise
    finally:
        ctx.close()
    failed = prove_artifact(path, out) if "--prove" in flags and ctx.is_main else 0
    return 1 if result["audit"] and result["audit"]["verdict"] == auditing.FAIL else failed


def evaluate_artifact(path: Path, out: Path, audit: bool, ctx: RunContext) -> dict:
    """Evaluate, report, and write `out` and the log beside it."""
    evaluation = Evaluation(path, ctx, audit)  # every fault of input ends here, and the former score stays
    writable = ctx.on_main(lambda: can_write(out))
    if writable and ctx.is_main:
        retire_scores(out, evaluation.circumstances(), ctx)
        out.with_suffix(".log").unlink(missing_ok=True)
        ctx.open_logs(out.with_suffix(".log"))
    elif not writable:
        ctx.log(f"warning: {out.parent} cannot be written: the score will be printed only")
    result = evaluation.run()
    print_report(result, ctx)
    if result["audit"]:
        ctx.log("")
        for check in result["audit"]["checks"]:
            ctx.log(auditing.Check(**check).line())
        lacks = f" for want of: {', '.join(result['audit']['missing'])}" if result["audit"]["missing"] else ""
        ctx.log(f"audit: {result['audit']['verdict'].upper()}{lacks} ({result['audit']['scope']})")
    if writable and ctx.is_main:
        write_json(out, result)
        previous_name(out).unlink(missing_ok=True)
        ctx.log(f"wrote {out}")
    return result


def can_write(file: Path) -> bool:
    """Whether `file` can be written, its folder made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.access(file.parent, os.W_OK)


if __name__ == "__main__":
    cli(main)

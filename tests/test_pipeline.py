"""From text to val_bpb: every preset through train_gpt.py, quantize.py and eval_ttt.py at small width; the commands on two ranks."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import clean_environment
from test_train import SMALL_WIDTH

import eval_ttt
import quantize as Q
import train_gpt as T
from parts import packing
from parts.artifact import dequantize

PRESETS = ["gdn_hybrid", "gdn3_fa8", "legal_ttt", "token_shift", "ngram_hedge", "base"]
# Only sizes shrink. What a card is about (which layers, which method, which optimizer, how many bits and epochs) stays the preset's own.
SMALL = {
    **SMALL_WIDTH,
    "ITERATIONS": 24,  # one step at least lies in the last 5 % of the budget, where system B's QAT begins
    "GPTQ_CALIBRATION_BATCHES": 2,
    "TRAIN_BATCH_TOKENS": 256,
    "EVAL_TOKENS": 401,
    "EVAL_SEQ_LEN": 64,
    "EVAL_STRIDE": 16,
    "TTT_CHUNK_TOKENS": 150,
    "TTT_BATCH_SEQS": 4,
    "AUDIT_SAMPLES": 64,
    "EXPERT_BLOCK_TOKENS": 64,
    "NGRAM_MAX_CONTEXTS": 1 << 16,
    "BETA2": 0.97,  # no default: evaluation has it from the artifact alone
}
AUDITED = ("gdn_hybrid", "ngram_hedge")  # between them every kind of state; an audit runs the evaluation again
LONG_CONTEXT = {"gdn_hybrid": {"EVAL_SEQ_LEN": 256, "EVAL_STRIDE": 64}}  # as on the card: longer than it was trained with
EVAL_KEYS = {
    "val_loss", "val_bpb", "sliding_bpb", "sliding_loss", "ttt_bpb", "experts_bpb", "experts", "expert_tables", "invalid_cache",
    "tokens_scored", "bytes_scored", "bytes_model", "bytes_code", "bytes_total", "bytes_tokenizer", "tokenizer_counted", "sha256", "world_size", "device", "torch", "chunk_losses", "audit",
    "seconds", "tokens_per_second", "config", "run",
}  # fmt: skip


def command(module, *arguments, **settings) -> None:
    """A command's main() in this process (importing torch once), under an environment of `settings` alone."""
    argv = [module.__file__, *map(str, arguments)]
    with mock.patch.dict(os.environ, clean_environment(**settings), clear=True), mock.patch.object(sys, "argv", argv):
        assert module.main() == 0


def small(preset: str) -> dict:
    """The sizes that shrink; a table that the preset goes without stays away."""
    own = T.resolve_config({"PRESET": preset})
    changes = {**SMALL, **LONG_CONTEXT.get(preset, {})}
    if own.model.bigram_vocab_size:
        changes["BIGRAM_VOCAB_SIZE"] = 64
    if own.quant.embed_split_top:
        changes["EMBED_SPLIT_TOP"] = 250
    if own.eval.ttt_hash_buckets:
        changes["TTT_HASH_BUCKETS"] = 64
    return changes


@pytest.fixture(scope="module", params=PRESETS)
def pipeline(request, dataset, tmp_path_factory) -> SimpleNamespace:
    """The three commands, one after the other, and what was seen on the way: QAT's strengths a step, the plan, the evaluator."""
    preset, runs = request.param, tmp_path_factory.mktemp(request.param)
    folder, seen = runs / "run", SimpleNamespace(strengths=[])
    shards = {name: dataset.settings[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    changes = small(preset)
    run_step, pack, evaluator = T.Trainer.run_step, Q.Quantizer.pack, eval_ttt.ScoreFirstEvaluator

    def watched_step(trainer, progress):
        linears = {name: module for name, module in trainer.state.model.named_modules() if isinstance(module, T.Linear)}
        seen.strengths.append({name: m.fake_quantize.strength.item() for name, m in linears.items() if m.fake_quantize is not None})
        seen.linears = list(linears)
        return run_step(trainer, progress)

    def watched_pack(quantizer, units, tops, cfg=None):
        seen.quantizer, seen.tops, seen.packed = quantizer, tops, pack(quantizer, units, tops, cfg)
        return seen.packed

    def watched_evaluator(*arguments):
        seen.evaluator = evaluator(*arguments)
        return seen.evaluator

    with mock.patch.object(T.Trainer, "run_step", watched_step):
        command(T, PRESET=preset, RUN_ID="run", RUNS_DIR=runs, DEVICE="cpu", **shards, **changes)
    # Nothing but the run's folder from here on: its settings have to come from there.
    with mock.patch.object(Q.Quantizer, "pack", watched_pack):
        command(Q, folder)
    with mock.patch.object(eval_ttt, "ScoreFirstEvaluator", watched_evaluator):
        command(eval_ttt, folder / "artifact.bin", *["--audit"] * (preset in AUDITED))
    header, records = packing.unpack_artifact((folder / "artifact.bin").read_bytes())
    return SimpleNamespace(
        preset=preset, changes=changes, folder=folder, header=header, records={record.name: record for record in records},
        result=json.loads((folder / "eval.json").read_text()), cfg=seen.quantizer.cfg, **vars(seen),
    )  # fmt: skip


def sliding_bpb(model, cfg) -> float:
    tokens = T.load_tokens(cfg.run.data_path, "val", cfg.model.vocab_size, limit=cfg.eval.eval_tokens)
    table = T.ByteTable.from_tokenizer(T.load_tokenizer(cfg.run.tokenizer_path, cfg.model.vocab_size))
    return T.evaluate(model, tokens, table, cfg.eval, T.RunContext(), cfg.eval.eval_seq_len, cfg.eval.eval_stride).val_bpb


def run_model(folder):
    """The trained model as train_gpt.py saved it."""
    settings, weights, meta = T.load_run(folder)
    model = T.build_model(T.Config.from_dict(settings))
    T.load_weights(model, weights)
    model.looping = meta["looping"]
    return model.eval()


def quantized_in_memory(pipeline) -> dict[str, torch.Tensor]:
    """Codes times scales as GPTQ left them: what the artifact has to give back, by a way that writes and reads nothing."""
    weights = {}
    for unit in pipeline.packed.units:
        if unit.bits:
            value = unit.quantized.codes.float() * unit.quantized.scales.half().float()[:, None]
        else:
            value = unit.weight.half().float()
        name, _, part = unit.name.partition("@")
        if part:
            rows = torch.from_numpy(pipeline.tops[name])
            weights.setdefault(name, torch.full((len(rows), value.size(1)), math.nan))[rows if part == "top" else ~rows] = value
        else:
            weights[name] = value
    return weights


def test_the_artifact_scores_what_the_quantized_model_scores_in_memory(pipeline):
    """Through the file on disk and eval_ttt.py: nothing is lost, recurrence and split rows included."""
    weights = quantized_in_memory(pipeline)
    assert weights.keys() == dict(pipeline.quantizer.model.named_parameters()).keys()
    with pipeline.quantizer.weights_replaced(weights):
        in_memory = sliding_bpb(pipeline.quantizer.model, pipeline.cfg)
    assert pipeline.result["sliding_bpb"] == pytest.approx(in_memory, abs=1e-4)
    as_trained = sliding_bpb(run_model(pipeline.folder), pipeline.cfg)
    assert in_memory == pytest.approx(as_trained, abs=0.05) and in_memory != as_trained


def test_the_evaluation_is_complete_valid_and_the_presets_own(pipeline):
    result, cfg = pipeline.result, pipeline.cfg
    assert set(result) == EVAL_KEYS
    assert result["tokens_scored"] == cfg.eval.eval_tokens - 1 and result["bytes_scored"] > 0
    assert result["val_bpb"] == pytest.approx(result["val_loss"] * result["tokens_scored"] / math.log(2) / result["bytes_scored"])
    if pipeline.preset in AUDITED:
        assert result["audit"]["verdict"] == "incomplete" and result["audit"]["missing"] == ["whole text", "byte count"], result["audit"]
    assert result["bytes_model"] == (pipeline.folder / "artifact.bin").stat().st_size
    # The last stage is the score; at this size it stays near the plain one, or beats it.
    assert math.isfinite(result["val_bpb"]) and result["val_bpb"] < result["sliding_bpb"] + 0.02
    assert (result["ttt_bpb"] is not None) == (cfg.eval.ttt_mode != "off") and (result["experts_bpb"] is not None) == bool(cfg.eval.experts)
    last = next(result[key] for key in ("experts_bpb", "ttt_bpb", "sliding_bpb") if result[key] is not None)
    assert result["val_bpb"] == pytest.approx(last, abs=1e-6)
    if cfg.eval.ttt_mode != "off":
        assert len(result["chunk_losses"]) == 3 and result["ttt_bpb"] != result["sliding_bpb"]
    if cfg.eval.experts:
        assert set(result["experts"]) == set(cfg.eval.experts.split(","))
    assert bool(result["invalid_cache"]) == cfg.eval.invalid_cache
    # Every setting of quantization and evaluation that was not scaled down is what the preset says.
    own = T.resolve_config({"PRESET": pipeline.preset})
    for spec in T.settings("quant") + T.settings("eval"):
        if spec.name.upper() not in pipeline.changes:
            assert {**cfg.to_dict("quant"), **result["config"]}[spec.name] == own[spec.name], spec.name


def test_what_learns_while_testing_is_what_the_preset_names(pipeline):
    cfg, trainer = pipeline.cfg, pipeline.evaluator.trainer
    assert (trainer is not None) == (cfg.eval.ttt_mode != "off")
    if trainer is None:
        return
    assert type(trainer.optimizer).__name__.lower() == cfg.eval.ttt_optimizer
    if cfg.eval.ttt_optimizer == "adamw":
        assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.97)}, "training's"
    assert bool(trainer.average) == bool(cfg.eval.ttt_polyak)
    names = {id(param): name for name, param in pipeline.evaluator.forward.forward.named_parameters()}
    trained = {names[id(param)] for param in trainer.params}
    assert ("eval_hash.table.weight" in trained) == bool(cfg.eval.ttt_hash_buckets)
    if cfg.eval.ttt_params == "mlp":
        assert trained == {name for name in names.values() if re.fullmatch(r"blocks\.\d+\.mlp\.(fc|proj)\.weight", name)}
    blocks = {int(name.split(".")[1]) for name in trained if name.startswith("blocks.")}
    assert blocks == set(range(cfg.eval.ttt_freeze_blocks, len(cfg.model.pattern)))


def test_the_plan_in_the_artifact_is_the_presets(pipeline):
    """Bits of every matrix, split rows, pruned weights and the compressor, from the file's own header and symbols."""
    cfg, header = pipeline.cfg, pipeline.header
    assert {stream["codec"] for stream in header["streams"]} == {cfg.quant.compressor}
    overrides = dict(part.split(":") for part in filter(None, cfg.quant.bits_override.split(",")))
    assert overrides.keys() <= {"attn.proj"}, "teach this test the new override"
    bits = {name: width for name, _, width, _ in header["tensors"]}
    for unit in pipeline.packed.units:
        want = {"control": 0, "embed": cfg.quant.embed_bits, "hash": cfg.quant.embed_bits}.get(unit.role, cfg.quant.matrix_bits)
        if unit.role == "attn" and unit.param.endswith(".proj.weight"):
            want = int(overrides.get("attn.proj", want))
        if unit.name.endswith("@rest"):
            want = cfg.quant.embed_split_bits
        if unit.weight.dim() == 2 or want == 0:
            assert bits[unit.name] == want, unit.name
    assert ("tok_emb.weight@top" in bits) == bool(cfg.quant.embed_split_top)
    if cfg.quant.embed_split_top:
        counts = Q.token_counts(cfg)
        top = np.unpackbits(pipeline.records["tok_emb.weight@rows"].data)[: cfg.model.vocab_size].astype(bool)
        assert top.sum() == cfg.quant.embed_split_top and counts[top].min() >= counts[~top].max()
    for unit in pipeline.packed.units:
        pruned = unit.bits and unit.role != "embed" and cfg.quant.prune_fraction
        assert (unit.keep is not None) == bool(pruned), unit.name
        if pruned:
            smallest = np.argsort(unit.weight.abs().numpy().ravel(), kind="stable")[: int(cfg.quant.prune_fraction * unit.weight.numel())]
            assert not pipeline.records[unit.name].data.ravel()[smallest].any()


def test_values_are_rotated_where_the_preset_says(pipeline):
    """The stored c_v is near H·c_v, head by head, under HADAMARD_VO and near c_v itself elsewhere."""
    cfg, trained = pipeline.cfg, T.load_run(pipeline.folder)[1]
    layers = [name for name in trained if name.endswith("mixer.c_v.weight")]
    assert layers
    for name in layers:
        plain, stored = trained[name], dequantize(pipeline.records[name])
        heads = plain.unflatten(0, (cfg.model.num_kv_heads, cfg.model.head_dim))
        turned = torch.einsum("de,kec->kdc", Q.hadamard(cfg.model.head_dim).float(), heads).flatten(0, 1)
        near, far = (turned, plain) if cfg.quant.hadamard_vo else (plain, turned)
        assert (stored - near).norm() < 0.6 * (stored - far).norm(), name


def test_recurrence_survives_to_the_score(pipeline):
    """The flag is in the file, in the report and in the model that was scored; without it the score is another one."""
    looping = bool(pipeline.cfg.model.num_loops)
    model = pipeline.evaluator.forward.forward
    assert pipeline.header["looping"] is pipeline.result["run"]["looping"] is model.looping is looping
    if looping:
        trained = run_model(pipeline.folder)
        on = sliding_bpb(trained, pipeline.cfg)
        trained.looping = False
        assert abs(sliding_bpb(trained, pipeline.cfg) - on) > 1e-3


QAT_LAYERS = {"gdn3_fa8": r"blocks\.[2-9]\.mixer\.(c_k|proj)", "token_shift": ".*"}


def test_qat_acts_at_the_end_on_the_cards_layers(pipeline):
    expected = {name for name in pipeline.linears if re.fullmatch(QAT_LAYERS.get(pipeline.preset, "none"), name)}
    assert pipeline.strengths[0].keys() == expected and bool(expected) == (pipeline.preset in QAT_LAYERS)
    active = [set(step.values()) == {1.0} for step in pipeline.strengths]
    assert not any(active[:-3]) and active == sorted(active) and active[-1] == bool(expected)


def test_two_ranks_agree_with_one_process(launch, dataset):
    """The three commands on two ranks and on one, from shards to the same val_bpb: parts are summed, not rank 0's reported."""
    scores = {}
    for ranks in (1, 2):
        folder = launch.runs / f"ranks{ranks}"
        settings = dict(RUN_ID=folder.name, ITERATIONS=8, REFERENCE_STEPS=8, MICRO_BATCH_TOKENS=256, EVAL_TOKENS=501, EXPERTS="tilt,ngram")
        settings |= dict(TTT_CHUNK_TOKENS=256)
        for module, *arguments in ((T,), (Q, folder), (eval_ttt, folder / "artifact.bin")):
            if ranks == 1:
                command(module, *arguments, **{**dataset.settings, "RUNS_DIR": launch.runs, "DEVICE": "cpu", **settings})
            else:
                done = launch(f"{module.__name__}.py", *arguments, ranks=ranks, **settings)
                assert done.returncode == 0, done.stderr[-2000:]
        scores[ranks] = json.loads((folder / "eval.json").read_text())
    one, two = scores[1], scores[2]
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["tokens_scored"] == two["tokens_scored"] == 500 and one["bytes_scored"] == two["bytes_scored"]
    for key in ("sliding_bpb", "ttt_bpb", "val_bpb"):  # sums in another order move a weight across a rounding edge here and there
        assert one[key] == pytest.approx(two[key], abs=2e-3), key

"""Quantization: GPTQ against a naive twin, Hessians, rotation, search, artifacts and the submission bundle."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environment
from test_packing import reseal

import quantize as Q
import train_gpt
from data import shards
from data.shards import BOS_ID
from parts import code, packing
from parts.artifact import load_artifact, restore_weights
from parts.bundle import bundle
from parts.files import UserError, sha256_file
from train_gpt import Config, QuantConfig, RunContext

HYBRID = {
    "vocab_size": 300,
    "layer_pattern": "GASTA",
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "gdn_qk_heads": 1,
    "gdn_v_heads": 2,
    "gdn_head_dim": 8,
    "window_size": 8,
    "xsa_layers": "1,4",
    "ve_layers": "1,2,4",
    "ve_dim": 16,
    "attn_sink": True,
    "attn_gate_width": 4,
    "bigram_vocab_size": 64,
    "bigram_dim": 16,
    "trigram_hash": True,
    "smear_gate": True,
    "shared_layers": "1,4",
    "loop_start": 2,
    "loop_end": 3,
    "num_loops": 1,
    "unet_skips": True,
    "train_seq_len": 32,
    "gptq_calibration_batches": 5,
    "max_wallclock_seconds": 0.0,
    "device": "cpu",
}


def randomized(cfg: Config, seed: int = 0) -> train_gpt.GPT:
    """A model whose zero-initialised parts are not zero: as if trained."""
    model = train_gpt.build_model(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.dim() == 2 and "tok_emb" not in name:
                columns = (0.5 * torch.randn(param.size(1), generator=generator)).exp()
                param.copy_(noise * columns / param.size(1) ** 0.5)
            elif "tok_emb" in name:
                param.copy_(0.3 * noise)
            else:
                param.add_(0.1 * noise)
    model.looping = bool(cfg.model.num_loops)
    return model.eval()


def hessian(columns: int, rows: int = 0, seed: int = 0) -> torch.Tensor:
    """Second moments of correlated inputs of very unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * (1.5 * torch.randn(columns, generator=generator)).exp()
    return x.T @ x / len(x)


def weighted(delta: torch.Tensor, h: torch.Tensor) -> float:
    return float((delta.double() @ h.double() * delta.double()).sum())


# -- matrices ----------------------------------------------------------------------------------------------------------
def naive_gptq(weight: torch.Tensor, h: torch.Tensor, bits: int, clip: float, damp: float) -> torch.Tensor:
    """GPTQ as optimal brain surgery, column by column: round one, compensate on the others, remove it from H⁻¹. float64."""
    weight, h = weight.double().clone(), h.double()
    scale, top = Q.row_scales(weight.float(), bits, clip).double(), Q.largest_code(bits)
    order = h.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype))
    codes = torch.zeros_like(weight)
    for column in order.tolist():
        codes[:, column] = (weight[:, column] / scale).round().clamp(-top, top)
        error = (weight[:, column] - codes[:, column] * scale) / inverse[column, column]
        weight -= error[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # done with: keeps later divisions sane
    return codes


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("shape", [(6, 12), (9, 33)])
def test_gptq_equals_naive_twin(shape, block):
    weight, h = torch.randn(shape, generator=torch.Generator().manual_seed(1)), hessian(shape[1])
    naive = naive_gptq(weight, h, 5, 6.0, 0.01)
    solved = Q.gptq_batch(weight[None], Q.prepare_hessian(h[None], 0.01), 5, 6.0, block=block)
    same = (solved.codes[0] == naive).float().mean()
    scale = Q.row_scales(weight, 5, 6.0)[:, None]
    assert same > 0.98  # a value on the edge between two symbols may fall either way in float32
    assert weighted(solved.dequantized()[0] - weight, h) <= 1.01 * weighted(naive.float() * scale - weight, h)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(16, 24), (1, 40), (24, 1), (3, 130), (64, 64)])
def test_gptq_is_never_worse_than_rtn(shape, bits):
    for seed in range(3):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        h = hessian(shape[1], rows=0 if seed else max(1, shape[1] // 2), seed=seed)  # also rank-deficient
        for clip in (2.0, 12.85):
            codes, scales, restored = Q.gptq(weight, h, bits, clip)
            _, _, nearest = Q.quantize_rtn(weight, bits, clip)
            assert codes.dtype == torch.int8 and scales.dtype == torch.float16
            assert codes.abs().max() <= Q.largest_code(bits)
            assert torch.equal(restored, codes.float() * scales.float()[:, None])
            assert weighted(restored - weight, h) <= weighted(nearest - weight, h) * (1 + 1e-5)


def test_a_row_that_rounding_serves_better_keeps_the_rounding():
    """Where clipping is heavy, compensation can pile up: GPTQ alone (the naive twin) loses to rounding on some rows; the product never does."""
    weight, h = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)), hessian(24)
    scale = Q.row_scales(weight, 3, 1.0)
    rows = lambda codes: Q.row_errors((codes.float() * scale[:, None] - weight)[None], h[None])[0]
    naive, nearest = rows(naive_gptq(weight, h, 3, 1.0, 0.01)), rows(Q.round_to_grid(weight, scale, 3))
    worse = naive > 1.01 * nearest
    assert worse.any() and not worse.all()
    codes = Q.gptq_batch(weight[None], Q.prepare_hessian(h[None], 0.01), 3, 1.0).codes[0]
    assert torch.equal(codes[worse].float(), Q.round_to_grid(weight, scale, 3)[worse]) and (rows(codes) <= nearest * (1 + 1e-5)).all()


def test_gptq_halves_rtns_error_on_correlated_inputs():
    weight, h = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), hessian(96)
    solved = Q.gptq_batch(weight[None], Q.prepare_hessian(h[None]), 6, 12.85)
    assert float(solved.error) < 0.5 * float(solved.rtn_error) < 0.01 * float(solved.power)


def test_batch_equals_one_by_one():
    weight = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    h = torch.stack([hessian(20, seed=seed) for seed in range(3)])
    clips = torch.tensor([5.0, 9.0, 13.0])
    batch = Q.gptq_batch(weight, Q.prepare_hessian(h), 6, clips)
    for i in range(3):
        codes, scales, _ = Q.gptq(weight[i], h[i], 6, float(clips[i]))
        assert torch.equal(batch.codes[i], codes) and torch.equal(batch.scales[i].half(), scales)


def test_dead_columns_and_constant_rows():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[2], weight[3], weight[4] = 0.7, 0.0, -1e-9
    h = hessian(16)
    h[5], h[:, 5] = 0.0, 0.0
    codes, scales, restored = Q.gptq(weight, h, 6, 12.85)
    assert not codes[:, 5].any() and torch.isfinite(restored).all()
    assert not restored[3].any() and scales[3] == scales.float().nanquantile(0.5, interpolation="lower").half()
    _, _, nearest = Q.quantize_rtn(weight, 6, 12.85)
    assert torch.allclose(nearest[2], weight[2], rtol=1e-3)
    dead = Q.gptq(weight, torch.zeros(16, 16), 6, 12.85)
    assert not dead[0].any()  # a layer that never ran


def test_sdclip_scale_is_as_defined():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = (12.85 * weight.std(dim=1) / 31).half()
    assert torch.equal(Q.row_scales(weight, 6, 12.85).half(), expected)


def test_a_row_of_zeros_gets_its_matrix_median_scale():
    """1.0 among scales of 0.01 would leave the scales' range coder nothing to do."""
    weight = 0.004 * torch.randn(2, 201, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 7] = weight[1] = 0.0
    scales = Q.row_scales(weight, 6, 12.85, mantissa_bits=5)
    others = torch.cat((scales[0, :7], scales[0, 8:])).sort().values
    assert others[99] <= scales[0, 7] <= others[100] and (scales[1] == 1).all()
    assert packing.encode_scales([scales[0].half().numpy()]) is not None


@pytest.mark.parametrize("mean, sigma", [(1.0, 0.01), (0.5, 1e-6), (-3.0, 0.2)])
def test_rows_far_off_zero_are_not_clipped_away(mean, sigma):
    """SDClip centres its grid at zero and measures spread about the mean: a row whose mean dwarfs its spread keeps its values."""
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[1] = mean + sigma * torch.randn(256, generator=torch.Generator().manual_seed(1))
    _, scales, nearest = Q.quantize_rtn(weight, 6, 12.85)
    assert (nearest[1] - weight[1]).abs().max() <= 0.51 * weight[1].abs().max() / 31
    weight[1] = 0.02 * torch.randn(256)
    assert torch.equal(scales[2:], Q.quantize_rtn(weight, 6, 12.85)[1][2:])  # its neighbours' scales are what they were


def test_gptq_is_blind_to_the_inputs_scale_with_dead_inputs_too():
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    h = hessian(48)
    h[5], h[:, 5] = 0.0, 0.0
    ratios = []
    for scale in (1.0, 2.0**-20):  # a power of two: the same bits otherwise
        solved = Q.gptq_batch(weight[None], Q.prepare_hessian(scale * h[None], 0.01), 4, 3.0)
        ratios.append(float(solved.error / solved.rtn_error))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
    live = [i for i in range(48) if i != 5]
    alone = Q.gptq_batch(weight[None, :, live], Q.prepare_hessian(h[live][:, live][None], 0.01), 4, 3.0)
    assert ratios[0] == pytest.approx(float(alone.error / alone.rtn_error), rel=0.1)  # as if the dead one were not there


def test_no_damping_on_a_singular_hessian():
    h = hessian(24)
    h[3], h[:, 3] = h[4], h[:, 4]
    h[3, 3] = h[3, 4] = h[4, 3] = h[4, 4]
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    for low_rank in (h, hessian(24, rows=6)):
        solved = Q.gptq_batch(weight[None], Q.prepare_hessian(low_rank[None], 0.0), 6, 12.85)
        assert 0 <= float(solved.error) <= float(solved.rtn_error)
    regular = hessian(24)
    exact = Q.inverse_factor(regular[None], 0.0)[0].double()
    assert torch.allclose(exact.T @ exact @ regular.double(), torch.eye(24, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    weight, h = torch.randn(4, 6), hessian(6)
    broken = weight.clone()
    broken[1, 2] = bad
    with pytest.raises(UserError, match="not finite"):
        Q.gptq(broken, h, 6, 12.85)
    with pytest.raises(UserError, match="not finite"):
        Q.quantize_rtn(broken, 6, 12.85)
    h[0, 0] = bad
    with pytest.raises(UserError, match="not finite"):
        Q.gptq(weight, h, 6, 12.85)
    with pytest.raises(UserError, match="float16"):
        Q.quantize_rtn(weight * 1e8, 6, 12.85)


def test_inverse_factor():
    h = torch.stack([hessian(20, seed=seed) for seed in range(2)])
    factor = Q.inverse_factor(h, 0.01).double()
    for one, upper in zip(h.double(), factor):
        damped = one + 0.01 * one.diagonal().mean() * torch.eye(20, dtype=torch.float64)
        assert torch.equal(upper, upper.triu())
        assert torch.allclose(upper.T @ upper @ damped, torch.eye(20, dtype=torch.float64), atol=1e-3)


def test_pruning_keeps_zeros_and_compensates():
    weight, h = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), hessian(32)
    keep = Q.prune_mask(weight, 0.25)
    assert int((~keep).sum()) == 128 and weight[~keep].abs().max() <= weight[keep].abs().min()
    solved = Q.gptq_batch(weight[None], Q.prepare_hessian(h[None]), 8, 12.85, keep=keep[None])
    assert not solved.codes[0][~keep].any()
    assert weighted(solved.dequantized()[0] - weight, h) < 0.7 * weighted(weight * keep - weight, h)


# -- rotation ----------------------------------------------------------------------------------------------------------
def logits_of(model: train_gpt.GPT, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(2, model.cfg.vocab_size, (2, 24), generator=torch.Generator().manual_seed(seed))
    ids[:, 10] = BOS_ID
    with torch.no_grad():
        return model(ids)


def test_hadamard_matrix():
    for size in (1, 2, 8, 64):
        matrix = Q.hadamard(size)
        assert torch.equal(matrix, matrix.T)
        assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_rotation_leaves_the_function_unchanged():
    """Through XSA, sinks, gates, value embeddings, GQA, a shared mixer and depth recurrence."""
    model = randomized(Config.from_dict(HYBRID))
    before, value = logits_of(model), model.blocks[1].mixer.c_v.weight.detach().clone()
    skipped = Q.rotate_values(model)
    assert not torch.allclose(value, model.blocks[1].mixer.c_v.weight, atol=1e-3)
    assert torch.allclose(before, logits_of(model), atol=2e-4)
    assert [line.split()[0] for line in skipped] == ["blocks.0", "blocks.3"]  # GDN and token shift, by name


def test_rotation_says_what_it_skips():
    model = randomized(Config.from_dict({**HYBRID, "model_dim": 24, "layer_pattern": "AA", "xsa_layers": "", "shared_layers": "",
                                 "ve_layers": "", "num_loops": 0, "loop_end": 0, "loop_start": 0}))  # fmt: skip
    before = logits_of(model)
    assert all("head dim 6" in line for line in Q.rotate_values(model))
    assert torch.equal(before, logits_of(model))


# -- runs on disk ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Tokenizer, shards and a run of random weights: what quantize.py finds after training."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 6))) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(2000)))
    for name, size in (("tokenizer", 300), ("other", 300)):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / name), vocab_size=size, model_type="bpe", byte_fallback=True,
            character_coverage=1.0 if name == "tokenizer" else 0.999, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
            split_digits=name == "other",
        )  # fmt: skip
    generator = np.random.default_rng(0)
    for split, count in (("train", 6000), ("val", 1500)):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        tokens = generator.zipf(1.3, count).clip(0, 200) + 40
        tokens[::97] = BOS_ID
        (folder / f"fineweb_{split}_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    save_run(folder, "run", Config.from_dict({**HYBRID, **paths(folder)}))
    return folder


def paths(folder: Path) -> dict:
    return {"data_path": str(folder), "tokenizer_path": str(folder / "tokenizer.model"), "runs_dir": str(folder)}


def save_run(folder: Path, name: str, cfg: Config, spoil=lambda weights: None) -> Path:
    weights = {key: value.detach().clone() for key, value in randomized(cfg).named_parameters()}
    spoil(weights)
    meta = {
        "config": cfg.to_dict(), "looping": bool(cfg.model.num_loops), "steps": 1, "tokens": 1, "train_seconds": 10.0, "world_size": 1,
        "device": "cpu", "torch": torch.__version__, "tokenizer_sha256": shards.tokenizer_hash(cfg.run.tokenizer_path),
    }  # fmt: skip
    (folder / name).mkdir()
    train_gpt.save_tensors(folder / name / "model.safetensors", weights, meta)
    return folder / name


def clone_run(world: Path, target: Path) -> Path:
    target.mkdir()
    (target / "model.safetensors").write_bytes((world / "run" / "model.safetensors").read_bytes())
    return target


@pytest.fixture
def clean(monkeypatch):
    """No setting of the caller's environment."""
    for spec in train_gpt.settings():
        monkeypatch.delenv(spec.name.upper(), raising=False)
    monkeypatch.delenv("PRESET", raising=False)
    return monkeypatch


def quantizer_for(world: Path, **changes) -> Q.Quantizer:
    cfg = Config.from_dict({**HYBRID, **paths(world), **changes})
    quantizer = Q.Quantizer(world / "run", cfg, RunContext())
    quantizer.calibrate()
    return quantizer


@pytest.fixture(scope="session")
def quantizer(world) -> Q.Quantizer:
    return quantizer_for(world)


def test_hessians_see_every_call_of_every_linear(world):
    """Against inputs recorded by hand; recurrence and shared mixers run several times; the head's come from the final norm."""
    cfg = Config.from_dict({**HYBRID, **paths(world)})
    model = randomized(cfg)
    inputs: dict[str, list] = {}
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, train_gpt.Linear)}
    for key, module in linears.items():
        module.observer = lambda x, key=key: inputs.setdefault(key, []).append(x.flatten(0, -2))
    head = lambda _, args, out: inputs.setdefault("tok_emb.weight", []).append(out.flatten(0, -2))
    handle = model.final_norm.register_forward_hook(head)
    with torch.no_grad():
        for batch in Q.calibration_batches(cfg, RunContext(), cfg.quant.gptq_calibration_batches):
            model(*batch)
    handle.remove()
    Q.warm_up(model, cfg, RunContext())  # leaves nothing behind
    hessians, loss = Q.collect_hessians(model, cfg, RunContext())
    matrices = {spec.name for spec in train_gpt.parameter_table(model) if spec.param.dim() == 2 and spec.role != "control"}
    assert matrices == set(hessians), "a matrix without a Hessian"
    for key, parts in inputs.items():
        x = torch.cat(parts)
        assert torch.allclose(hessians[key], x.T @ x / len(x), rtol=1e-4, atol=1e-6), key
    once = sum(len(part) for part in inputs["blocks.0.mixer.q_proj.weight"])
    assert sum(len(part) for part in inputs["blocks.1.mixer.c_q.weight"]) == 2 * once  # shared by layers 1 and 4
    assert sum(len(part) for part in inputs["blocks.3.mlp.fc.weight"]) == 2 * once  # looped
    assert np.isfinite(loss)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_lookup_tables_are_weighed_by_what_their_projection_lets_through(quantizer):
    """‖δ Pᵀ‖²: a table's rows reach the network through P alone."""
    for module in (quantizer.model.bigram, quantizer.model.value_embed):
        name = next(name for name, param in quantizer.model.named_parameters() if param is module.table.weight)
        delta = torch.randn(module.table.weight.shape, generator=torch.Generator().manual_seed(0))
        through = (delta @ module.proj.weight.detach().T).square().sum()
        assert weighted(delta, quantizer.hessians[name]) == pytest.approx(float(through), rel=1e-5)


def test_calibration_is_spread_over_the_training_tokens(world):
    """Batch b of n begins at b/n of the stream; ranks take turns; no batch twice."""
    cfg = Config.from_dict({**HYBRID, **paths(world)})
    tokens = np.fromfile(world / "fineweb_train_000000.bin", "<u2", offset=1024)
    first = lambda ctx: [int(inputs[0, 0]) for inputs, _ in Q.calibration_batches(cfg, ctx, 5)]
    batches = [inputs[0].tolist() for inputs, _ in Q.calibration_batches(cfg, RunContext(), 5)]
    for number, row in enumerate(batches):
        start = number * (len(tokens) // 5)
        assert row == tokens[start : start + len(row)].tolist(), number
    ranks = [first(RunContext(rank=rank, world_size=2)) for rank in range(2)]
    assert ranks == [[row[0] for row in batches[0::2]], [row[0] for row in batches[1::2]]]


def test_calibration_reads_training_shards_only(world, monkeypatch):
    opened = []
    original = train_gpt.load_shard
    monkeypatch.setattr(train_gpt, "load_shard", lambda path, *rest: opened.append(Path(path).name) or original(path, *rest))
    quantizer_for(world, gptq_calibration_batches=1)
    assert opened and all(name.startswith("fineweb_train_") for name in opened)
    with pytest.raises(AssertionError):
        train_gpt.TokenStream(world, 300, split="val")


WORKER = """
import sys, torch, quantize as Q, train_gpt
from pathlib import Path
ctx = train_gpt.setup_distributed("cpu")
cfg = train_gpt.Config.from_dict(train_gpt.load_run(sys.argv[1])[0])
quantizer = Q.Quantizer(Path(sys.argv[1]), cfg, ctx)
quantizer.calibrate()
torch.save({"loss": quantizer.float_loss, **quantizer.hessians}, f"{sys.argv[2]}.{ctx.rank}")
ctx.close()
"""


def test_two_processes_see_what_one_sees(world, quantizer, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    forked.run(tmp_path / "worker.py", world / "run", tmp_path / "out", ranks=2, environment=os.environ, folder=tmp_path).check_returncode()
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2)]
    for key, value in quantizer.hessians.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        assert torch.allclose(ranks[0][key], value, rtol=1e-4, atol=1e-6 * float(value.abs().max())), key
    assert ranks[0]["loss"] == pytest.approx(quantizer.float_loss, abs=1e-6)


def shapes_of(quantizer: Q.Quantizer) -> dict:
    return {name: tuple(param.shape) for name, param in quantizer.model.named_parameters()}


def test_every_unit_beats_rtn_and_every_parameter_returns(quantizer):
    packed = quantizer.pack(*quantizer.units())
    for unit in packed.units:
        if unit.bits:
            assert unit.quantized.error <= unit.quantized.rtn_error * (1 + 1e-6), unit.name
    weights = restore_weights(packed.records, shapes_of(quantizer))
    for spec in train_gpt.parameter_table(quantizer.model):
        if spec.role == "control":
            assert torch.equal(weights[spec.name], spec.param.half().float()), spec.name
        else:
            assert (weights[spec.name] - spec.param).norm() < 0.3 * spec.param.norm(), spec.name
    assert {unit.role for unit in packed.units} == {"attn", "control", "embed", "gdn", "hash", "mlp", "proj", "shift"}


def test_bits_by_role_and_name(quantizer):
    units = lambda text: {u.name: u.bits for u in quantizer.units(quantizer.cfg.replace(bits_override=text))[0]}
    assert {bits for name, bits in units("mlp:5").items() if ".mlp." in name} == {5}
    mixed = units("attn:5,attn.proj:7,blocks.2.mixer.c_k:3,*.mlp.fc.weight:4,embed:16")
    assert mixed["blocks.1.mixer.proj.weight"] == 7 and mixed["blocks.1.mixer.c_q.weight"] == 5
    assert mixed["blocks.2.mixer.c_k.weight"] == 3 and mixed["blocks.0.mlp.fc.weight"] == 4
    assert mixed["tok_emb.weight"] == 0 and mixed["blocks.0.mlp.proj.weight"] == 6
    for text in ("mlp", "mlp:1", "mlp:9", "mlp:x", "nothing:5", ":5", "control:6"):
        with pytest.raises(UserError, match="BITS_OVERRIDE"):
            units(text)


def test_embedding_split_by_frequency(quantizer):
    cfg = quantizer.cfg.replace(embed_split_top=101, embed_split_bits=5)
    packed = quantizer.pack(*quantizer.units(cfg), cfg)
    by_name = {record.name: record for record in packed.records}
    assert (by_name["tok_emb.weight@top"].bits, by_name["tok_emb.weight@rest"].bits) == (8, 5)
    counts = Q.token_counts(cfg)
    top = np.unpackbits(by_name["tok_emb.weight@rows"].data)[: cfg.model.vocab_size].astype(bool)
    assert top.sum() == 101 and counts[top].min() >= counts[~top].max()
    restored = restore_weights(packed.records, shapes_of(quantizer))["tok_emb.weight"]
    error = (restored - quantizer.model.tok_emb.weight).norm(dim=1) / quantizer.model.tok_emb.weight.norm(dim=1)
    assert error[torch.from_numpy(top)].max() < error[torch.from_numpy(~top)].min()


def test_low_rank_correction(quantizer):
    cfg = quantizer.cfg.replace(lqer_rank=4, lqer_top=2, matrix_bits=3)
    plain, corrected = (quantizer.pack(*quantizer.units(c), c) for c in (cfg.replace(lqer_rank=0), cfg))
    names = {record.name.partition("@")[0] for record in corrected.records if "@lqer" in record.name}
    assert len(names) == 2
    weights = [restore_weights(packed.records, shapes_of(quantizer)) for packed in (plain, corrected)]
    params = dict(quantizer.model.named_parameters())
    for name in names:
        errors = [weighted(w[name] - params[name].detach(), quantizer.hessians[name]) for w in weights]
        assert errors[1] < errors[0]


def test_error_directions_are_the_leading_ones():
    error, h = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), hessian(12)
    basis, share = Q.error_directions(error, h, 3)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
    values = torch.linalg.eigvalsh(error.double() @ h.double() @ error.double().T).flip(0)
    assert share == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-2)


# -- search ------------------------------------------------------------------------------------------------------------
def test_search_lands_under_its_target(world, quantizer):
    size = len(quantizer.pack(*quantizer.units()).data) + code.code_bytes()
    for target in (size - 9000, size + 6000):
        other = quantizer_for(world, target_bytes=target, gptq_calibration_batches=2)
        packed, report = Q.Search(other, target, 60, lambda line: None).run()
        total = len(packed.data) + code.code_bytes()
        assert target - 20_000 <= total <= target and total == report["total"]
        assert len(report["trials"]) <= Q.SEARCH_TRIALS
        assert set(report["weighted_error"]) == {"attn", "embed", "gdn", "hash", "mlp", "proj", "shift"}


def test_search_takes_bits_where_clips_do_not_suffice(world, quantizer, monkeypatch):
    monkeypatch.setattr(Q, "STEP_MOST", 1.2)
    size = len(quantizer.pack(*quantizer.units()).data) + code.code_bytes()
    packed, report = Q.Search(quantizer, size - 14_000, 60, lambda line: None).run()
    assert report["bits_dropped"] and report["total"] <= size - 14_000
    assert min(unit.bits for unit in packed.units if unit.bits) < 6


def test_search_says_when_even_the_finest_grid_is_small(quantizer):
    lines = []
    packed, report = Q.Search(quantizer, 16_000_000, 60, lines.append).run()
    assert "finest grid" in report["note"] and len(report["trials"]) <= 3
    assert {unit.bits for unit in packed.units if unit.bits} == {8}


def test_search_refuses_the_impossible(quantizer):
    with pytest.raises(UserError, match="TARGET_BYTES=50000"):
        Q.Search(quantizer, 50_000, 60, lambda line: None).run()


def test_search_reaches_what_is_reachable(quantizer):
    """The smallest plan that a refusal names is one that a search finds; so is everything above it."""
    with pytest.raises(UserError, match="smallest plan takes") as refusal:
        Q.Search(quantizer, 1, 60, lambda line: None).run()
    least = int(re.search(r"takes (\d+) bytes", str(refusal.value))[1])
    for spare in (0, 1_500, 9_000):
        packed, report = Q.Search(quantizer, least + spare, 60, lambda line: None).run()
        assert least <= report["total"] == len(packed.data) + code.code_bytes() <= least + spare
        assert len(report["trials"]) <= Q.SEARCH_TRIALS and report["bits_dropped"]


def test_search_packs_once_a_trial(quantizer, monkeypatch):
    packs, pack = [], packing.pack_artifact
    monkeypatch.setattr(packing, "pack_artifact", lambda *args: packs.append(pack(*args)) or packs[-1])
    size = len(quantizer.pack(*quantizer.units()).data) + code.code_bytes()
    packs.clear()
    packed, report = Q.Search(quantizer, size - 5000, 60, lambda line: None).run()
    assert len(packs) == 1 + len(report["trials"]) and packed.data in packs


def test_target_with_nothing_to_search(world, quantizer):
    everything = ",".join(f"{role}:16" for role in ("embed", "mlp", "attn", "gdn", "shift", "hash", "proj"))
    plain = Q.Quantizer(world / "run", quantizer.cfg.replace(bits_override=everything), RunContext())
    plain.hessians = quantizer.hessians
    packed, report = Q.Search(plain, 16_000_000, 60, lambda line: None).run()
    assert {unit.bits for unit in packed.units} == {0} and "nothing to search" in report["note"]
    with pytest.raises(UserError, match="TARGET_BYTES=60000"):
        Q.Search(plain, 60_000, 60, lambda line: None).run()


def test_search_spends_bytes_where_the_loss_is(quantizer, monkeypatch):
    """Each role's steps are the common multiple times its ratio, which follows the measured rises."""
    roles = {"attn": 1e-4, "embed": 1e-4, "gdn": 1e-4, "hash": 1e-4, "mlp": 0.1, "proj": 1e-4, "shift": 1e-4}
    monkeypatch.setattr(quantizer, "sensitivities", lambda packed, batches: roles)
    size = len(quantizer.pack(*quantizer.units()).data) + code.code_bytes()
    packed, report = Q.Search(quantizer, size - 2000, 60, lambda line: None).run()
    default = {unit.name: unit.step for unit in quantizer.units()[0] if unit.bits}
    for unit in packed.units:
        if unit.bits:
            expected = report["step_multiple"] * report["role_ratios"][unit.role]
            assert unit.step / default[unit.name] == pytest.approx(expected, rel=1e-6), unit.name
    assert report["role_ratios"]["mlp"] < 0.8 < 1.2 < report["role_ratios"]["embed"]


def test_sensitivities_are_each_roles_own_rise(quantizer):
    cfg = quantizer.cfg.replace(matrix_bits=2, embed_bits=3, matrix_clip_sigmas=3.0)
    packed = quantizer.pack(*quantizer.units(cfg), cfg)
    before = {name: param.detach().clone() for name, param in quantizer.model.named_parameters()}
    rises = quantizer.sensitivities(packed, 2)
    assert all(torch.equal(before[name], param) for name, param in quantizer.model.named_parameters())
    assert set(rises) == {"attn", "embed", "gdn", "hash", "mlp", "proj", "shift"}
    weights = restore_weights(packed.records, shapes_of(quantizer))
    model = randomized(quantizer.cfg)
    plain = Q.calibration_loss(model, quantizer.cfg, RunContext(), 2)
    for role in ("mlp", "embed"):
        other = randomized(quantizer.cfg)
        names = {unit.param for unit in packed.units if unit.role == role}
        train_gpt.load_weights(other, {**dict(other.named_parameters()), **{name: weights[name] for name in names}})
        assert rises[role] == pytest.approx(Q.calibration_loss(other, quantizer.cfg, RunContext(), 2) - plain, abs=1e-6)
        assert abs(rises[role]) > 1e-3


def test_gaussian_bits_are_a_gaussians():
    codes = Q.round_to_grid(torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0 / 7]), 4)
    assert 8 * Q.entropy_bytes(codes.numpy()) / codes.numel() == pytest.approx(Q.gaussian_bits(4, 5.0), abs=5e-3)
    assert Q.gaussian_bits(2, 25.0) < 1e-6 < 1 < Q.gaussian_bits(2, 1.0)


def test_balanced_roles_keep_the_bytes():
    weights = {"a": 1000, "b": 3000, "c": 500}
    ratios = Q.balance_roles({"a": 0.004, "b": 0.006, "c": 0.002}, weights)
    assert sum(weights[role] * np.log2(ratio) for role, ratio in ratios.items()) == pytest.approx(0, abs=1e-6)
    assert ratios["b"] > ratios["a"]  # less loss a weight: coarser
    wild = Q.balance_roles({"a": -0.1, "b": 0.5, "c": 0.0}, weights)
    assert all(Q.RATIO_LIMITS[0] - 1e-9 <= ratio <= Q.RATIO_LIMITS[1] + 1e-9 for ratio in wild.values())


def test_finer_steps_turn_into_bits():
    unit = Q.Unit("w", "w", "mlp", torch.zeros(1, 1), 6, 12.85)
    for multiple in (2.0, 1.0, 0.7, 0.4, 0.2):
        changed = Q.with_step(unit, multiple)
        assert changed.step == pytest.approx(unit.step * multiple, rel=1e-6)
        assert changed.clip_sigmas >= Q.CLIP_LEAST
    assert Q.with_step(unit, 1e-3).bits == 8
    assert Q.with_step(unit, 1.0, dropped=1).step == pytest.approx(unit.step * 31 / 15)


# -- artifacts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressor", ["brotli", "range"])
def test_save_load_same_loss(world, clean, tmp_path, compressor):
    clean.setenv("COMPRESSOR", compressor)
    clean.setenv("HADAMARD_VO", "1")
    run = clone_run(world, tmp_path / "run")
    Q.quantize_command(run, search_seconds=10)
    report = json.loads((run / "quantize.json").read_text())
    assert sorted(path.name for path in run.iterdir()) == [
        "artifact.bin",
        "evaluate.py",
        "model.safetensors",
        "quantize.json",
        "quantize.log",
    ]
    assert report["bytes_model"] == (run / "artifact.bin").stat().st_size
    assert report["bytes_total"] == report["bytes_model"] + (run / "evaluate.py").stat().st_size
    assert report["bytes_code"] == code.code_bytes() and report["bytes_code_training"] == code.code_bytes("train_gpt")
    assert report["train_seconds_with_calibration"] == pytest.approx(10 + report["seconds"]["calibration"], abs=2e-3)
    artifact = load_artifact(run / "artifact.bin")
    assert artifact.model.looping is True and artifact.bytes_model == report["bytes_model"]
    sizes = Q.compare_command(run / "artifact.bin")
    assert sizes[compressor]["total"] == artifact.bytes_model and all(row["total"] > 0 for row in sizes.values())

    cfg = Q.open_run(run)
    other = Q.Quantizer(run, cfg, RunContext())
    other.calibrate()
    packed = other.pack(*other.units())
    train_gpt.load_weights(other.model, restore_weights(packed.records, shapes_of(other)))
    tokens = train_gpt.load_tokens(world, "val", 300)[:65].long()[None]
    with torch.no_grad():
        assert torch.equal(other.model(tokens), artifact.model(tokens))


def test_artifact_is_the_same_every_time(world, clean, tmp_path):
    """To the byte: how long calibration took is no fact about the model. The former artifact's score goes with it."""
    images = []
    for name in "ab":
        run = clone_run(world, tmp_path / name)
        (run / "eval.json").write_text("{}")
        Q.quantize_command(run, search_seconds=10)
        assert not (run / "eval.json").exists()
        images.append((run / "artifact.bin").read_bytes())
    assert images[0] == images[1]


@pytest.fixture(scope="session")
def artifact(world, tmp_path_factory) -> bytes:
    quantizer = quantizer_for(world, gptq_calibration_batches=1, embed_split_top=50, lqer_rank=2, compressor="range")
    return quantizer.pack(*quantizer.units()).data


def test_fuzzed_artifacts_never_load(artifact, clean, tmp_path):
    rng, path = random.Random(0), tmp_path / "artifact.bin"
    for _ in range(1500):
        damaged = bytearray(artifact)
        kind = rng.randrange(3)
        if kind == 0:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged += rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            load_artifact(path)
        assert str(path) in str(caught.value)


def forged(artifact: bytes, change) -> bytes:
    header, payload = packing.read_header(artifact)
    change(header)
    return packing.seal(header, bytes(payload))


FORGERIES = [
    lambda h: h.pop("config"),
    lambda h: h.pop("looping"),
    lambda h: h.__setitem__("looping", "yes"),
    lambda h: h.__setitem__("config", [1]),
    lambda h: h["config"].__setitem__("model_dim", 1 << 40),
    lambda h: h["config"].__setitem__("model_dim", 64),
    lambda h: h["config"].__setitem__("num_heads", 0),
    lambda h: h["config"].__setitem__("layer_pattern", "A" * 100_000),
    lambda h: h["config"].__setitem__("layer_pattern", "AAAAA"),
    lambda h: h["config"].__setitem__("mlp_mult", 15.0),
    lambda h: h["config"].__setitem__("vocab_size", "many"),
    lambda h: h["tensors"][0].__setitem__(0, "other.weight"),
    lambda h: h["tensors"][0].__setitem__(0, 5),
    lambda h: h["tensors"][-1].__setitem__(3, [1 << 26, 1]),
    lambda h: h.__setitem__("tensors", None),
    lambda h: h.__setitem__("streams", None),
    lambda h: h.__setitem__("tokenizer_sha256", "0" * 64),
    lambda h: h.pop("tokenizer_sha256"),
]


def test_a_setting_of_another_version_changes_nothing(artifact, clean, tmp_path):
    (tmp_path / "artifact.bin").write_bytes(forged(artifact, lambda h: h["config"].__setitem__("surprise", 1)))
    (tmp_path / "plain.bin").write_bytes(artifact)
    odd, plain = (load_artifact(tmp_path / name) for name in ("artifact.bin", "plain.bin"))
    assert odd.cfg.to_dict() == plain.cfg.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(odd.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.parametrize("number", range(len(FORGERIES)))
def test_forged_headers_never_load(artifact, clean, tmp_path, number):
    (tmp_path / "artifact.bin").write_bytes(forged(artifact, FORGERIES[number]))
    with pytest.raises(UserError):
        load_artifact(tmp_path / "artifact.bin")


def test_forged_payloads_load_or_fail_cleanly(artifact, clean, tmp_path):
    rng, start = random.Random(0), packing._HEAD.size + packing._HEAD.unpack_from(artifact)[3]
    for _ in range(25):
        damaged = bytearray(artifact)
        damaged[rng.randrange(start, len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / "artifact.bin").write_bytes(reseal(bytes(damaged)))
        try:
            loaded = load_artifact(tmp_path / "artifact.bin")
        except UserError:
            continue
        assert all(torch.isfinite(param).all() for param in loaded.model.parameters())


def test_artifact_of_another_tokenizer_or_model(artifact, world, clean, tmp_path):
    path = tmp_path / "artifact.bin"
    path.write_bytes(artifact)
    assert load_artifact(path).cfg.model.vocab_size == 300
    clean.setenv("TOKENIZER_PATH", str(world / "other.model"))
    with pytest.raises(UserError, match="another tokenizer"):
        load_artifact(path)
    clean.delenv("TOKENIZER_PATH")
    clean.setenv("MODEL_DIM", "64")
    with pytest.raises(UserError, match="MODEL_DIM"):
        load_artifact(path)
    clean.setenv("MODEL_DIM", "32")
    clean.setenv("EVAL_STRIDE", "7")
    assert load_artifact(path).cfg.eval.eval_stride == 7


# -- faults of input ---------------------------------------------------------------------------------------------------
def test_faults_are_one_line_and_exit_code_2(tmp_path):
    done = forked.run(ROOT / "quantize.py", tmp_path, environment=clean_environment(), folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_a_search_is_not_longer_than_the_ranks_that_wait_for_it(world, monkeypatch):
    monkeypatch.setattr(Q, "setup_distributed", lambda *arguments: train_gpt.RunContext(world_size=2))
    with pytest.raises(UserError, match="--search-seconds 3600: the other ranks wait for no more than 900"):
        Q.quantize_command(world / "run", search_seconds=3600)


def test_faults_leave_nothing_half_written(world, clean, tmp_path):
    run = clone_run(world, tmp_path / "run")
    for name, value in (
        ("BITS_OVERRIDE", "mlp:x"), ("TARGET_BYTES", "1000"), ("DATA_PATH", str(tmp_path / "no")), ("MATRIX_BITS", "nine"),
        ("TOKENIZER_PATH", str(world / "other.model")), ("EMBED_BITS", "99"), ("MODEL_DIM", "48"),
    ):  # fmt: skip
        with clean.context() as context:
            context.setenv(name, value)
            with pytest.raises(UserError):
                Q.quantize_command(run, search_seconds=5)
        log = run / "quantize.log"  # what shows after the calibration only is said there as well
        assert {path.name for path in run.iterdir()} - {log.name} == {"model.safetensors"}, name
        assert "error: " in log.read_text() if log.exists() else name not in ("BITS_OVERRIDE", "TARGET_BYTES"), name
        log.unlink(missing_ok=True)

    def spoil(weights):
        weights["blocks.0.mlp.fc.weight"][0, 0] = float("nan")

    for damage in ({"tokenizer_sha256": None}, {"train_seconds": "long"}, {"looping": float("nan")}):
        weights, meta = train_gpt.load_tensors(run / "model.safetensors")
        (tmp_path / "odd").mkdir(exist_ok=True)
        train_gpt.save_tensors(tmp_path / "odd" / "model.safetensors", weights, {**meta, **damage})
        with pytest.raises(UserError):
            Q.Quantizer(tmp_path / "odd", Config.from_dict({**HYBRID, **paths(world)}), RunContext())

    broken = save_run(tmp_path, "broken", Config.from_dict({**HYBRID, **paths(world)}), spoil)
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc\.weight is not finite"):
        Q.quantize_command(broken, search_seconds=5)
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError):
        Q.quantize_command(run, search_seconds=5)


# -- bundle ------------------------------------------------------------------------------------------------------------
def run_inside(folder: Path, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """A script of a submission with nothing of ours around it."""
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=folder, env=clean_environment(**settings), capture_output=True, text=True, timeout=150)


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory) -> Path:
    """A quantized run with a train log and a score that says whose it is; no evaluation was run."""
    run = clone_run(world, tmp_path_factory.mktemp("scored") / "my run")
    (run / "train.log").write_text("step:1\n")
    with pytest.MonkeyPatch.context() as patch:
        for spec in train_gpt.settings():
            patch.delenv(spec.name.upper(), raising=False)
        Q.quantize_command(run, search_seconds=5)
    scores = {
        "val_loss": 3.5, "val_bpb": 1.25, "tokens_scored": 1499, "sha256": {"artifact": sha256_file(run / "artifact.bin")},
        "config": {"eval_tokens": 0, "eval_stride": 16, "data_path": str(world)}, "audit": {"verdict": "pass"},
    }  # fmt: skip
    (run / "eval.json").write_text(json.dumps(scores))
    return run


def test_bundle_is_in_the_challenges_form(scored, world, tmp_path):
    """README.md, submission.json, a train log, and a train_gpt.py that compiles, with what it imports and the run's settings beside it."""
    out = tmp_path / "new" / "submission"
    submission = bundle(scored, out, author="A. Author", github_id="author", name="", track="track")
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files >= {
        "README.md",
        "submission.json",
        "train.log",
        "train_gpt.py",
        "artifact.bin",
        "evaluate.py",
        "parts/files.py",
        "logs/eval.json",
    }
    assert files >= {"logs/quantize.json", "records/my_run/config.env", "bundle.json"}
    assert json.loads((out / "submission.json").read_text()) == submission
    assert (submission["author"], submission["name"], submission["val_bpb"]) == ("A. Author", "my run", 1.25)
    assert submission["bytes_total"] == sum((out / name).stat().st_size for name in ("artifact.bin", "evaluate.py"))
    assert submission["bytes_code_training"] == code.code_bytes("train_gpt")
    assert submission["sha256"]["artifact"] == sha256_file(out / "artifact.bin") != submission["sha256"]["evaluated_artifact"]
    header, _ = packing.read_header((out / "artifact.bin").read_bytes())
    assert header["config"]["eval_stride"] == 16 and str(world) not in json.dumps(header)
    for path in out.rglob("*.py"):
        if path.name != "evaluate.py":
            compile(path.read_text(), path.name, "exec")
    shown = run_inside(out, "train_gpt.py", "--print-config", PRESET="my_run")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^LAYER_PATTERN +GASTA +preset:my_run$", shown.stdout, re.MULTILINE) and str(world) not in shown.stdout
    assert not list(tmp_path.rglob("*.tmp"))


def test_bundle_replaces_only_what_it_made(scored, tmp_path):
    out = tmp_path / "submission"
    about = {"author": "", "github_id": "", "name": "", "track": ""}
    (out / "logs").mkdir(parents=True)
    (out / "train_seed2.log").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="holds no submission made here"):  # a record folder that somebody else began
        bundle(scored, out, **about)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    (out / "train_seed2.log").rename(tmp_path / "kept")
    (out / "logs").rmdir()
    first = bundle(scored, out, **about)
    (tmp_path / "kept").rename(out / "train_seed2.log")
    (out / "logs" / "notes.txt").write_text("mine too")
    manifest = json.loads((out / "bundle.json").read_text())
    (out / "old.txt").write_text("made by an earlier version")
    manifest["files"]["old.txt"] = sha256_file(out / "old.txt")
    (out / "bundle.json").write_text(json.dumps(manifest))
    again = bundle(scored, out, **{**about, "author": "somebody"})
    assert (first["author"], again["author"]) == ("", "somebody") and not (out / "old.txt").exists()
    assert (out / "train_seed2.log").read_text() == "mine" and (out / "logs" / "notes.txt").read_text() == "mine too"
    for name, digest in json.loads((out / "bundle.json").read_text())["files"].items():
        assert sha256_file(out / name) == digest

    readme = (out / "README.md").read_text() + "my words\n"
    (out / "README.md").write_text(readme)
    with pytest.raises(UserError, match=r"README\.md was changed"):
        bundle(scored, out, **about)
    assert (out / "README.md").read_text() == readme
    manifest = json.loads((out / "bundle.json").read_text())
    del manifest["files"]["README.md"]
    (out / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"README\.md is in the way"):
        bundle(scored, out, **about)
    assert (out / "README.md").read_text() == readme and not list(tmp_path.glob(".submission*"))


def retrained(run):
    tensors, meta = train_gpt.load_tensors(run / "model.safetensors")
    train_gpt.save_tensors(run / "model.safetensors", tensors, {**meta, "steps": meta["steps"] + 1})


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda run, scores: scores["sha256"].update(artifact="0" * 64), "another artifact"),
        (lambda run, scores: scores.pop("sha256"), "another artifact"),
        (lambda run, scores: scores["sha256"].update(code="0" * 64), "other code"),
        (lambda run, scores: scores["config"].update(eval_tokens=500), "1499 targets only"),
        (lambda run, scores: scores["audit"].update(verdict="fail"), "the audit failed.*--despite failed-audit"),
        (lambda run, scores: scores["audit"].update(verdict="incomplete", missing=["byte count"]), "incomplete for want of: byte count"),
        (lambda run, scores: scores.update(audit=None), "not audited.*--despite no-audit"),
        (lambda run, scores: scores.pop("val_bpb"), "not a finished evaluation"),
        (lambda run, scores: (run / "artifact.bin").unlink(), r"artifact\.bin is missing: run `python quantize\.py"),
        (lambda run, scores: (run / "train.log").unlink(), "needs its training log"),
        (lambda run, scores: (run / "train.log").write_text(f"-> model.safetensors (SHA-256 {'ab' * 32})"), "train.log is of another training"),
        (lambda run, scores: retrained(run), "artifact.bin was not made from .*model.safetensors"),
        (lambda run, scores: (run / "quantize.json").write_text('{"artifact_sha256": "0"}'), "quantize.json is not about .*artifact.bin"),
    ],
)  # fmt: skip
def test_bundle_refuses_a_score_that_is_not_the_artifacts(scored, tmp_path, change, word):
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    scores = json.loads((run / "eval.json").read_text())
    change(run, scores)
    (run / "eval.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match=word):
        bundle(run, tmp_path / "submission", author="", github_id="", name="", track="")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_bundle_says_what_it_was_handed_in_despite(scored, tmp_path):
    run, about = tmp_path / "run", {"author": "", "github_id": "", "name": "", "track": ""}
    shutil.copytree(scored, run)
    scores = json.loads((run / "eval.json").read_text())
    scores["config"]["eval_tokens"] = 1500
    scores["audit"] = {"verdict": "incomplete", "missing": ["documents disjoint", "whole text"], "checks": []}
    (run / "eval.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match="it scores 1499 targets only"):  # one word does not stand for the other
        bundle(run, tmp_path / "submission", ["incomplete-audit"], **about)
    submission = bundle(run, tmp_path / "submission", ["incomplete-audit", "partial-evaluation", "failed-audit"], **about)
    reasons = {
        "partial-evaluation": "it scores 1499 targets only (EVAL_TOKENS)",
        "incomplete-audit": "the audit is incomplete for want of: documents disjoint, whole text",
    }
    assert submission["despite"] == reasons == json.loads((tmp_path / "submission" / "submission.json").read_text())["despite"]
    assert "Handed in although it scores 1499 targets only" in (tmp_path / "submission" / "README.md").read_text()
    assert "despite" not in bundle(scored, tmp_path / "clean", ["no-audit"], **about)
    assert "Handed in" not in (tmp_path / "clean" / "README.md").read_text()


def test_bundle_runs_on_its_own(world, clean, tmp_path):
    run = clone_run(world, tmp_path / "run")
    (run / "train.log").write_text("log\n")
    Q.quantize_command(run, search_seconds=5)
    with pytest.raises(UserError, match=r"eval\.json is missing: run `python eval_ttt\.py"):
        bundle(run, tmp_path / "submission")
    settings = {"TTT_EPOCHS": "1", "TTT_CHUNK_TOKENS": "512", "EVAL_STRIDE": "32"}
    done = forked.run(ROOT / "eval_ttt.py", run / "artifact.bin", environment=clean_environment(**settings), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = json.loads((run / "eval.json").read_text())
    submission = bundle(run, tmp_path / "submission", ["no-audit"])
    assert submission["val_bpb"] == expected["val_bpb"]

    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("artifact.bin", "evaluate.py"):
        (empty / name).write_bytes((tmp_path / "submission" / name).read_bytes())
    data = {"DATA_PATH": str(world), "TOKENIZER_PATH": str(world / "tokenizer.model"), "AUDIT_SAMPLES": "64"}
    done = run_inside(empty, "evaluate.py", "--audit", **data)
    result = json.loads((empty / "eval.json").read_text())
    checks = {check["name"]: check["verdict"] for check in result["audit"]["checks"]}
    assert checks.pop("byte count") == "fail" and "fail" not in checks.values(), done.stdout  # random tokens spell no text
    assert result["val_bpb"] == pytest.approx(expected["val_bpb"], abs=1e-6)
    assert result["bytes_code"] == submission["bytes_code"] and result["bytes_total"] == submission["bytes_total"]
    assert result["sha256"]["artifact"] == submission["sha256"]["artifact"]


def test_table(world, clean, tmp_path, capsys):
    run = clone_run(world, tmp_path / "run")
    clean.setenv("VAL_TOKENS", "500")
    Q.table_command(run, ["gptq6", "rtn6-bytes", "hadamard"])
    rows = {row["variant"]: row for row in json.loads((run / "quantization_table.json").read_text())["rows"]}
    assert set(rows) == {"float", "gptq6", "rtn6-bytes", "hadamard"}
    assert rows["rtn6-bytes"]["bytes"] == pytest.approx(rows["gptq6"]["bytes"], rel=0.01)
    with pytest.raises(UserError, match="unknown variant"):
        Q.table_command(run, ["nothing"])


# -- on a GPU ----------------------------------------------------------------------------------------------------------
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
def test_gpu_solves_36_million_weights():
    """The matrices of an 11-layer model of width 512; within a hair of the CPU's error. Prints the seconds."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(512, 512)] * 22 + [(256, 512)] * 22 + [(2048, 512)] * 11 + [(512, 2048)] * 11 + [(8192, 512)]
    units, hessians = [], {}
    for number, (out, columns) in enumerate(shapes):
        x = torch.randn(4 * columns, columns, device="cuda", generator=generator) @ torch.randn(columns, columns, device="cuda") / 20
        hessians[str(number)] = x.T @ x / len(x)
        weight = 0.02 * torch.randn(out, columns, device="cuda", generator=generator)
        units.append(Q.Unit(str(number), str(number), "mlp", weight, 6, 12.85))
    torch.cuda.synchronize()
    began = time.perf_counter()
    solved = Q.Solver(hessians, QuantConfig(), {}).solve(units)
    torch.cuda.synchronize()
    print(f"\n36 million weights on {torch.cuda.get_device_name()}: {time.perf_counter() - began:.1f} s")
    for number in (0, 22, 44):
        one = Q.gptq_batch(units[number].weight.cpu()[None], Q.prepare_hessian(hessians[str(number)].cpu()[None]), 6, 12.85)
        assert float(solved[number].quantized.error) == pytest.approx(float(one.error), rel=0.02)
        assert solved[number].quantized.error < 0.6 * solved[number].quantized.rtn_error


@pytest.mark.gpu
@needs_gpu
def test_gpu_hessians_agree_with_the_cpu(world, clean):
    cfg = Config.from_dict({**HYBRID, **paths(world), "layer_pattern": "AASAA", "xsa_layers": "1,4", "ve_layers": "1,4"})
    reference, _ = Q.collect_hessians(randomized(cfg), cfg, RunContext())
    model = randomized(cfg).cuda()
    model.compute_dtype = torch.bfloat16
    hessians, _ = Q.collect_hessians(model, cfg, RunContext(device=torch.device("cuda")))
    for key, value in reference.items():
        assert (hessians[key].cpu() - value).norm() < 0.05 * value.norm(), key

"""How quantization is wired: what its parts compute is tested beside them, here that it is used, and on what."""

import torch
from test_quantize import clean, paths, randomized, save_run, world  # noqa: F401  (fixtures)

import quantize as Q
from parts.artifact import restore_weights
from train_gpt import Config, RunContext, TokenStream, parameter_table


def test_no_row_ends_worse_than_rounding_to_nearest():
    """Under a tight clip the errors that GPTQ passes on pile up at the grid's ends: some rows do better rounded, and are."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight, hessian = torch.randn(64, 32, generator=generator), inputs.T @ inputs / 400
    prepared = Q.prepare_hessian(hessian[None])
    solved = Q.gptq_batch(weight[None], prepared, 4, 0.7)
    nearest = Q.gptq_batch(weight[None], None, 4, 0.7)
    ours, rtn = (Q.row_errors(s.dequantized() - weight, hessian[None])[0] for s in (solved, nearest))
    assert (ours <= rtn * (1 + 1e-5)).all()
    same = (solved.codes[0] == nearest.codes[0]).all(dim=1)
    assert 0 < same.sum() < 64, "the case has rows of both kinds"


def test_a_lookup_tables_rows_weigh_by_their_projection(world):  # noqa: F811
    """||(δ Pᵀ)||² of a table's row is δ (PᵀP) δᵀ."""
    cfg = Config.from_dict({**paths(world), **BIGRAM})
    model = randomized(cfg)
    hessians, _ = Q.collect_hessians(model, cfg, RunContext())
    delta = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    through = model.bigram.proj(delta).square().sum(dim=1)
    torch.testing.assert_close(Q.row_errors(delta[None], hessians["bigram.table.weight"][None])[0], through.detach())


def test_calibration_is_spread_over_the_training_text(world):  # noqa: F811
    cfg = Config.from_dict({**paths(world), **BIGRAM})
    stream = TokenStream(cfg.run.data_path, cfg.model.vocab_size)
    batches = list(Q.calibration_batches(cfg, RunContext(), 4))
    assert len(batches) == 4
    for index, (inputs, _) in enumerate(batches):
        start = index * (stream.total_tokens // 4)
        assert inputs.flatten().tolist() == stream.read(start, inputs.numel()).tolist()


def test_a_roles_sensitivity_is_the_loss_with_that_role_alone_quantized(world, clean, tmp_path):  # noqa: F811
    cfg = Config.from_dict({**paths(world), **BIGRAM, "matrix_bits": 2})
    quantizer = Q.Quantizer(save_run(tmp_path, "run", cfg), cfg, RunContext())
    quantizer.calibrate()
    packed = quantizer.pack(*quantizer.units())
    rises = quantizer.sensitivities(packed, 2)
    before = Q.calibration_loss(quantizer.model, cfg, RunContext(), 2)
    shapes = {name: tuple(param.shape) for name, param in quantizer.model.named_parameters()}
    quantized = restore_weights(packed.records, shapes)
    assert set(rises) >= {"mlp", "attn", "embed"}
    for role, rise in rises.items():
        chosen = {spec.name: quantized[spec.name] for spec in parameter_table(quantizer.model) if spec.role == role}
        with quantizer.weights_replaced(chosen):
            assert abs(Q.calibration_loss(quantizer.model, cfg, RunContext(), 2) - before - rise) < 1e-6, role
    assert max(rises.values()) > 0.01, "two bits cost something"


BIGRAM = {
    "vocab_size": 300, "layer_pattern": "A", "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4, "bigram_vocab_size": 32, "bigram_dim": 8,
    "train_seq_len": 16, "gptq_calibration_batches": 2,
}  # fmt: skip

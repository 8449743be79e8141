"""The training loop against a naive twin: schedules, accumulation, recurrence, QAT, CROWN-Q, clipping, Muon, AdamW, decay groups and EMA,
written out step by step. What the twin does not do twice is the model's forward, which has twins of its own."""

import math

import pytest
import torch
from test_train import train, weights  # noqa: F401  (fixture)

import train_gpt as T

SETTINGS = {
    "LAYER_PATTERN": "GTA", "ITERATIONS": 8, "REFERENCE_STEPS": 8, "EMA_DECAY": 0.8, "MICRO_BATCH_TOKENS": 128, "GRAD_CLIP_NORM": 0.4,
    "WARMDOWN_FRAC": 0.6, "MIN_LR": 0.3, "MUON_MOMENTUM": 0.9, "MUON_MOMENTUM_WARMUP_START": 0.5, "MUON_MOMENTUM_WARMUP_FRAC": 0.5,
    "MUON_MOMENTUM_COOLDOWN_FRAC": 0.25, "MATRIX_LR": 0.03, "TIED_EMBED_LR": 0.02, "SCALAR_LR": 0.01, "MUON_WD": 1.0, "MUON_WD_MLP": 3.0,
    "MUON_WD_TAPER_START": 0.5, "MUON_WD_TAPER_END": 0.25, "EMBED_WD": 2.0, "ADAM_WD": 1.5, "BETA1": 0.8, "BETA2": 0.97,
    "CROWN_Q_LAMBDA": 30.0, "VE_LAYERS": "2", "VE_DIM": 8,
}  # fmt: skip
LOOPING = {"LAYER_PATTERN": "GAT", "VE_LAYERS": "1", "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2, "ENABLE_LOOPING_AT": 0.4}
FAKE = {"QAT_LAST_FRAC": 0.5, "QAT_BITS": 3, "MATRIX_CLIP_SIGMAS": 3}
NOISE = {"QAT_LAST_FRAC": 0.5, "QAT_MODE": "noise", "QAT_NOISE_SCALE": 1.0, "MATRIX_CLIP_SIGMAS": 3}


def twin(cfg: T.Config, looping_at: float = 2.0, qat_at: float = 2.0) -> dict[str, torch.Tensor]:
    """The averaged weights after training under SETTINGS, in micro-batches of two sequences."""
    torch.manual_seed(cfg.run.seed)
    model, stream = T.build_model(cfg), T.TokenStream(cfg.run.data_path, cfg.model.vocab_size)
    T.attach_fake_quantize(model, cfg)
    params = dict(model.named_parameters())
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in params.items()}
    average = {name: p.detach().clone() for name, p in params.items()}
    for step in range(8):
        progress = step / 8
        lr = min(1.0, max(0.3, (1 - progress) / 0.6))
        momentum = 0.5 + 0.4 * min(1.0, progress / 0.5, (1 - progress) / 0.25)
        taper = 1 - 0.75 * max(0.0, (progress - 0.5) / 0.5)
        model.looping = progress >= looping_at
        for module in model.modules():
            if isinstance(module, T.FakeQuantize):
                module.strength.fill_(progress >= qat_at)
        tokens = torch.from_numpy(stream.read(step * 512, 513).astype("int64"))
        inputs, targets = tokens[:-1].view(4, 2, 64), tokens[1:].view(4, 2, 64)
        losses = [model(inputs[i], targets[i]) / 4 for i in range(4)]
        grads = dict(zip(params, torch.autograd.grad(sum(losses), params.values(), allow_unused=True)))
        is_muon = {
            n: p.dim() == 2 and not n.endswith(("table.weight", "tok_emb.weight", "resid_mix", "gate", "sink")) for n, p in params.items()
        }
        if lr < 1:
            for name in filter(is_muon.get, params):
                w = params[name].detach()
                grads[name] = grads[name] + 30 / 12 * 2 * w * (w.abs().amax(1, keepdim=True) / 15) ** 2 / w.numel()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        with torch.no_grad():
            for name, p in params.items():
                g, (m, v) = grads[name] * min(1.0, 0.4 / (norm + 1e-6)), moments[name]
                if is_muon[name]:
                    m.mul_(momentum).add_(g, alpha=1 - momentum)
                    update = T.newton_schulz((momentum * m + (1 - momentum) * g)[None])[0]
                    decay = taper * (3.0 if ".mlp." in name else 1.0)
                    p.mul_(1 - 0.03 * lr * decay).sub_(0.03 * lr * math.sqrt(max(1, p.size(0) / p.size(1))) * update)
                else:
                    table = name.endswith(("table.weight", "tok_emb.weight"))
                    rate = lr * (0.02 if table else 0.01)
                    decay = 2.0 if table else 0.0 if name.endswith(("A_log", "dt_bias")) else 1.5
                    m.mul_(0.8).add_(g, alpha=0.2)
                    v.mul_(0.97).addcmul_(g, g, value=0.03)
                    p.mul_(1 - rate * decay)
                    p.sub_(rate * (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.97 ** (step + 1))).sqrt() + cfg.train.adam_eps))
                average[name].mul_(0.8).add_(p, alpha=0.2)
    return average


def assert_close(saved, expected, tolerance):
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        error = float((saved[name] - value).abs().max() / value.abs().max().clamp_min(1e-9))
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("settings", "switches"), [({}, {}), (LOOPING, {"looping_at": 0.4}), (FAKE, {"qat_at": 0.5}), (NOISE, {"qat_at": 0.5})]
)
def test_training_equals_a_naive_twin(train, settings, switches):  # noqa: F811
    folder, _ = train(RUN_ID="twin", **{**SETTINGS, **settings})
    assert_close(weights(folder), twin(T.Config.from_dict(T.load_run(folder)[0]), **switches), 2e-3)


def test_two_ranks_equal_the_twin(launch):
    result = launch("train_gpt.py", ranks=2, RUN_ID="twin", **{**SETTINGS, **LOOPING})
    assert result.returncode == 0, result.stderr[-2000:]
    folder = launch.runs / "twin"
    assert_close(weights(folder), twin(T.Config.from_dict(T.load_run(folder)[0]), looping_at=0.4), 2e-2)


def test_qat_noise_has_the_spread_of_rounding():
    """Mode noise: sigma = QAT_NOISE_SCALE · step / √12, the standard deviation of a rounding error at scale 1."""
    module, weight = T.FakeQuantize(6, 12.85, "noise", 0.5), torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    module.strength.fill_(1.0)
    torch.manual_seed(0)
    step = 12.85 / 31 * weight.std(dim=1)
    torch.testing.assert_close((module(weight) - weight).std(dim=1), 0.5 * step / math.sqrt(12), rtol=0.02, atol=0)

"""Every op against its naive twin: outputs and all gradients, odd lengths."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

import train_gpt as T
from parts import kernels


def assert_same_with_gradients(ours, twin, inputs, tolerance=1e-4):
    """Outputs and the gradient of every input agree to `tolerance` relative error."""
    results = []
    for function in (ours, twin):
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        out = function(*leaves)
        torch.manual_seed(1)
        (out * torch.randn(out.shape)).sum().backward()
        results.append([out] + [leaf.grad for leaf in leaves if leaf.is_floating_point()])
    for index, (a, b) in enumerate(zip(*results)):
        assert b.abs().max() > 0, f"tensor {index} of the twin is all zero: the comparison would say nothing"
        assert (a - b).norm() / b.norm() < tolerance, f"tensor {index}: relative error {(a - b).norm() / b.norm():.1e}"


def documents_of(length, batch=2):
    torch.manual_seed(3)
    return (torch.rand(batch, length) < 0.1).int().cumsum(1)


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_matches_naive(length, window, with_sink, with_documents, kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, length, 4, 8), torch.randn(2, length, kv_heads, 8), torch.randn(2, length, kv_heads, 8)
    sink = torch.randn(kv_heads, 8)
    documents = documents_of(length) if with_documents else None

    def call(function, **how):
        return lambda q, k, v, s: function(q, k, v, window=window, sink=s if with_sink else None, documents=documents, **how) + 0 * s.sum()

    inputs = [q, k, v, sink]
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    outs = [call(T.attention, backend="plain")(*leaves[0]), call(T.naive_attention)(*leaves[1])]
    for out in outs:
        torch.manual_seed(1)
        (out * torch.randn(out.shape)).sum().backward()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    for a, b in zip(*leaves):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 6, 31])
def test_causal_kernel_with_sink_keeps_each_tokens_own_key(length):
    """The path of causal kernels (a dummy query in front) equals the mask path: no top-left/bottom-right mistake."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, 4, 8), torch.randn(2, length, 2, 8), torch.randn(2, length, 2, 8), torch.randn(2, 8)]
    ours = lambda q, k, v, s: T.attention(q, k, v, sink=s, backend="flash")
    twin = lambda q, k, v, s: T.naive_attention(q, k, v, sink=s)
    assert_same_with_gradients(ours, twin, inputs)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_window_counts_its_own_position(window):
    """Exactly `window` keys: the one `window` positions back has no influence, the one before that does."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 16, 2, 8) for _ in range(3))
    out = T.attention(q, k, v, window=window, backend="plain")
    for distance, sees in ((window, False), (window - 1, True)):
        changed = v.clone()
        changed[:, 15 - distance] += 1
        moved = not torch.equal(T.attention(q, k, changed, window=window, backend="plain")[:, 15], out[:, 15])
        assert moved == sees, f"distance {distance}"


def test_exclusive_attention_matches_a_loop():
    torch.manual_seed(0)
    o, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)

    def loop(o, v):
        rows = []
        for head in range(4):
            unit = v[:, :, head // 2] / v[:, :, head // 2].norm(dim=-1, keepdim=True)
            rows.append(o[:, :, head] - (o[:, :, head] * unit).sum(-1, keepdim=True) * unit)
        return torch.stack(rows, 2)

    ungated = lambda o, v: kernels.plain_exclusive_gate(o, v, None)
    assert_same_with_gradients(ungated, loop, [o, v])
    left = (ungated(o, v) * v.repeat_interleave(2, 2)).sum(-1)
    assert left.abs().max() < 1e-5


def gdn_inputs(length, qk_heads, v_heads, dim=8, batch=2):
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(batch, length, qk_heads, dim), dim=-1) for _ in range(2))
    v, g = torch.randn(batch, length, v_heads, dim), -torch.rand(batch, length, v_heads) * 2
    return [q, k, v, g, torch.rand(batch, length, v_heads)]


@pytest.mark.parametrize("length", [1, 5, 64, 65, 131])
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)])
def test_chunked_gated_delta_rule_matches_the_recurrence(length, heads):
    ours = lambda *x: T.chunked_gated_delta_rule(*x)[0]
    twin = lambda *x: T.naive_gated_delta_rule(*x)[0]
    assert_same_with_gradients(ours, twin, gdn_inputs(length, *heads) if length > 1 else gdn_inputs(2, *heads))


def test_gated_delta_rule_carries_its_state():
    inputs = gdn_inputs(70, 2, 4)
    whole, final = T.naive_gated_delta_rule(*inputs)
    first, state = T.chunked_gated_delta_rule(*(x[:, :37] for x in inputs))
    second, last = T.chunked_gated_delta_rule(*(x[:, 37:] for x in inputs), state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-4, atol=1e-5)


def test_gated_delta_rule_survives_strong_decay():
    """Decays that underflow to zero must give zeros, not NaN, forwards and backwards."""
    inputs = gdn_inputs(90, 2, 2)
    inputs[3] = inputs[3] * 60
    ours = lambda *x: T.chunked_gated_delta_rule(*x)[0]
    twin = lambda *x: T.naive_gated_delta_rule(*x)[0]
    assert_same_with_gradients(ours, twin, inputs, tolerance=1e-3)


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (1, 40, 8)])
def test_newton_schulz_orthogonalizes(coefficients, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    singular = torch.linalg.svdvals(T.newton_schulz(x, 8 if coefficients == "polar_express" else 5, coefficients))
    assert singular.min() > 0.4 and singular.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = F.cosine_similarity(T.newton_schulz(x, 5, coefficients).flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.93


def test_row_norm_makes_newton_schulz_blind_to_row_scales():
    torch.manual_seed(0)
    x, scales = torch.randn(1, 6, 12), torch.tensor([1, 100, 0.01, 3, 1, 1]).view(1, 6, 1)
    same = T.newton_schulz(x, row_norm=True) - T.newton_schulz(x * scales, row_norm=True)
    other = T.newton_schulz(x) - T.newton_schulz(x * scales)
    assert same.abs().max() < 1e-4 < other.abs().max()


def test_partial_rope_is_relative_and_leaves_the_rest():
    torch.manual_seed(0)
    positions = torch.arange(12).float()[:, None] * torch.tensor([1.0, 0.1])
    x = torch.randn(1, 1, 1, 8).expand(1, 12, 1, 8)
    rotated = T.rotate(x, positions.cos(), positions.sin())
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    dots = torch.einsum("td,sd->ts", rotated[0, :, 0], rotated[0, :, 0])
    torch.testing.assert_close(dots[3, 1], dots[9, 7])
    assert (dots[3, 1] - dots[3, 2]).abs() > 1e-3


@pytest.mark.parametrize("forced", ["fa4", "fa3", "fa2", "cudnn", "flash", "flex", "plain"])
@pytest.mark.parametrize("sink", [False, True])
def test_a_forced_kernel_is_chosen_where_it_serves_and_nowhere_else(forced, sink, monkeypatch):
    """On a GPU that offers every Hopper kernel. A windowed layer with a sink sees one key outside its window: no causal kernel computes that."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(T.kernels, "missing", lambda load: "")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    cfg = T.resolve_config({"ATTN_SINK": str(int(sink)), "ATTENTION_BACKEND": forced})
    plan = T.plan_kernels(cfg, torch.device("cuda"), compiled=True)
    assert plan.full == forced
    masks = ("fa4", "flex", "plain")
    assert plan.windowed == (forced if forced in masks or (forced in ("fa3", "fa2") and not sink) else "fa4")


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """packages(path, text): write a module of a package that only this test sees."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        for name in set(sys.modules) - before:  # what an earlier state of the package left
            del sys.modules[name]
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_backend_is_there_if_what_it_calls_is(packages, monkeypatch):
    """flash-attn-4 alone brings a namespace package `flash_attn` that has nothing of flash-attn-2."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    def plan(backend: str = "auto", **settings: str):
        return T.plan_kernels(T.resolve_config({"ATTENTION_BACKEND": backend, **settings}), torch.device("cuda"), compiled=True)

    def refused(backend: str, reason: str, **settings: str) -> None:
        with pytest.raises(T.UserError, match=f"^[^\n]*{reason}[^\n]*$"):
            plan(backend, **settings)

    packages("flash_attn/cute/interface.py", "def _flash_attn_fwd(): ...")
    refused("fa4", "ATTENTION_BACKEND=fa4: cannot import name '_flash_attn_bwd'")
    refused("fa2", "ATTENTION_BACKEND=fa2: cannot import name 'flash_attn_func' from 'flash_attn'")
    refused("fa3", "ATTENTION_BACKEND=fa3: No module named 'flash_attn_interface'")
    assert (plan().full, plan().windowed) == ("cudnn", "flex")
    assert {line.split(":")[0] for line in plan().refused} - {"triton"} == {"fa4", "fa3"}, "what is not preferred is not asked"
    packages("flash_attn_interface.py", "raise OSError('undefined\\nsymbol')")
    refused("fa3", "fa3: undefined symbol")
    packages("flash_attn/cute/interface.py", "def _flash_attn_fwd(): ...\ndef _flash_attn_bwd(): ...")
    assert (plan().full, plan("fa4").windowed) == ("fa4", "fa4")
    packages("flash_attn/__init__.py", "def flash_attn_func(): ...")
    assert plan("fa2").full == "fa2"

    packages("fla/ops/gated_delta_rule/__init__.py", "")
    refused("auto", "GDN on CUDA needs flash-linear-attention .cannot import name 'chunk_gated_delta_rule'", LAYER_PATTERN="GA")

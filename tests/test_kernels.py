"""The Triton kernels against their plain twins: outputs and every gradient at odd sizes. Without a GPU they run under Triton's interpreter."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY

import train_gpt as T
from parts import kernels

triton = pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # the interpreter's dot takes no bfloat16


def compare(ours, twin, inputs, tolerance):
    """Relative error of the output and of each input's gradient, the twin in float32."""
    results = []
    for function, leaves in ((ours, inputs), (twin, [x.float() for x in inputs])):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = function(*leaves)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        results.append([out, *torch.autograd.grad(out, leaves, direction.to(out.dtype))])
    for index, (a, b) in enumerate(zip(*results)):
        error = (a.float() - b).norm() / b.norm()
        assert error < tolerance, f"tensor {index}: {error:.1e}"


def random(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    if DEVICE.type == "cpu":  # several tiles each way, ragged at every edge
        monkeypatch.setattr(kernels, "MLP_TILES", {"BM": 16, "BN": 32, "BK": 16})


@pytest.mark.parametrize("act", kernels.FUSED_ACTIVATIONS)
@pytest.mark.parametrize("tokens,width,hidden", [(37, 24, 40), (16, 16, 32), (1, 48, 72)])
def test_mlp(act, tokens, width, hidden, small_tiles):
    inputs = [random(tokens, width, dtype=EXACT), random(hidden, width, scale=0.2, dtype=EXACT), random(width, hidden, dtype=EXACT)]
    ours = lambda x, up, down: kernels.fused_mlp(x[None], up, down, act)[0]
    compare(ours, lambda x, up, down: kernels.plain_mlp(x, up, down, act), inputs, 0.01)


def test_activations_are_their_formulas():
    h = torch.linspace(-3, 3, 7)
    rectified = torch.where(h > 0, h, 0.0)
    formulas = {"leaky_relu2": rectified - 0.5 * (rectified - h), "relu2": rectified, "silu2": h / (1 + (-h).exp())}
    for act, formula in formulas.items():
        torch.testing.assert_close(kernels.squared_activation(h, act), formula**2)


def test_a_matrix_that_does_not_train_costs_no_product(small_tiles):
    x, up, down = random(16, 16, dtype=EXACT), random(32, 16, dtype=EXACT), random(16, 32, dtype=EXACT)
    post, needs = kernels.mlp_up(x, up, True), (False, True, False, False, False)
    ctx = SimpleNamespace(saved_tensors=(x, up, down, post), leaky=True, needs_input_grad=needs)
    gradients = kernels._FusedMLP.backward(ctx, torch.ones_like(x))
    assert [gradient is not None for gradient in gradients] == list(needs)


def test_the_sign_rides_in_the_lowest_bit(small_tiles):
    """Stored values are within one bfloat16 step of the squared activation, without bias, and the sign is exact."""
    x, up = random(64, 32, dtype=EXACT), random(96, 32, scale=0.2, dtype=EXACT)
    post = kernels.mlp_up(x, up, True)
    hidden = x.float() @ up.float().t()
    exact = kernels.squared_activation(hidden, "leaky_relu2")
    signs = (post.view(torch.int16) & 1).bool()
    assert ((signs == (hidden > 0)) | (hidden.abs() < 1e-5)).all()
    error = ((post.float() - exact) / exact)[hidden.abs() > 0.01]
    assert error.abs().max() < 2**-7 and error.mean().abs() < 2**-12


@pytest.mark.parametrize("tokens,vocabulary,cap", [(7, 50, 5.0), (3, 64, 30.0), (4, 33, kernels.LARGEST_CAP), (5, 1, 2.0)])
def test_softcapped_cross_entropy(tokens, vocabulary, cap):
    targets = torch.randint(0, vocabulary, (1, tokens), device=DEVICE)
    inputs = [random(1, tokens, 24), random(vocabulary, 24)]

    def twin(x, weight):
        return F.cross_entropy((cap * torch.tanh(F.linear(x, weight) / cap))[0], targets[0]) * 0.7

    ours = lambda x, weight: kernels.softcap_cross_entropy(x, weight, targets, cap) * 0.7
    if vocabulary == 1:  # certain: no loss, no gradient
        loss = ours(*[x.requires_grad_() for x in inputs])
        assert loss.abs() < 1e-5 and all(g.abs().max() < 1e-5 for g in torch.autograd.grad(loss, inputs))
    else:
        compare(ours, twin, inputs, 0.015)


@pytest.mark.parametrize("readers,copies", [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("batch,length,heads,kv_heads,dims", [(2, 41, 4, 2, 8), (1, 67, 3, 1, 16), (3, 1, 1, 1, 6)])
def test_heads(batch, length, heads, kv_heads, dims, readers, copies, monkeypatch):
    """More rows than a program takes, a last block of few, positions that start over with each row of the batch, partial and full rotation."""
    monkeypatch.setattr(kernels, "HEAD_ROWS", 16)
    angle = torch.randn(length, dims // 2).to(DEVICE)
    inputs = [random(batch, length, (heads + 2 * kv_heads) * 16), (1 + torch.rand(heads)).to(DEVICE)]

    def ours(joint, gain):
        return torch.cat([x.flatten(2) for x in kernels.heads_of(joint, angle.cos(), angle.sin(), gain, kv_heads, readers, copies)], -1)

    def twin(joint, gain):
        q, k, v = joint.unflatten(-1, (-1, 16)).split([heads, kv_heads, kv_heads], 2)
        q, k = T.normed_heads(q, k, angle.cos(), angle.sin(), gain)
        k, copied = (x.repeat_interleave(copies, 2) for x in (k, v))
        return torch.cat([x.flatten(2) for x in (q, k, copied, *[v] * (readers - 1))], -1)

    compare(ours, twin, inputs, 0.01)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("batch,length,width", [(2, 19, 24), (1, 7, 32), (1, 1, 40)])
def test_mix_norm(batch, length, width, skip, readers, monkeypatch):
    """More rows than programs, widths that are no power of two; what comes out for each reader, and the x0 for the next layer, has a gradient of its own."""
    monkeypatch.setattr(kernels, "MIX_PROGRAMS", {False: 2, True: 2})
    scale = torch.tensor(0.7, device=DEVICE)
    inputs = [random(batch, length, width), random(batch, length, width), random(2, width, dtype=torch.float32)]
    if skip:
        inputs += [random(batch, length, width), *(random(width, dtype=torch.float32) for _ in range(2))]

    def ours(x, x0, mix, *skip):
        return torch.cat(kernels.mix_norm(x, x0, mix, scale, *skip, readers=readers), -1)

    def twin(x, x0, mix, *skip):
        mixed, normed = kernels.plain_mix_norm(x, x0, mix, scale, *skip)
        return torch.cat((mixed, x0, *[normed] * readers), -1)

    compare(ours, twin, inputs, 0.015)


@pytest.mark.parametrize("compiled", [False, True])
def test_products_onto_the_stream(compiled):
    """base + x Wᵀ with its gradients, base untouched for who reads it again; the scaled norm's backward from its result."""
    scale = torch.tensor(0.7, device=DEVICE)
    inputs = [random(2, 5, 24), random(2, 5, 32), random(24, 32, scale=0.2)]

    def ours(base, x, weight):
        y = kernels.product_onto(base, x, weight)
        return torch.cat((y, base, kernels.scaled_norm(y, scale)), -1)

    def twin(base, x, weight):
        y = base + x @ weight.t()
        return torch.cat((y, base, F.rms_norm(y, (24,)) * scale), -1)

    compare(torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours, twin, inputs, 0.01)


def test_first_columns():
    """The columns' gradient is added to x's, and to nobody else's who was given the same one."""
    x, direction = random(3, 67, 8).requires_grad_(), random(3, 67, 8)
    whole, columns = kernels.first_columns(x, 3)
    given = direction.clone()
    gradient, other = torch.autograd.grad(
        (whole + (bias := torch.zeros_like(whole).requires_grad_()), columns), (x, bias), (direction, direction[..., :3])
    )
    torch.testing.assert_close(gradient, torch.cat((2 * direction[..., :3], direction[..., 3:]), -1))
    assert torch.equal(direction, given) and torch.equal(other, given)


def test_a_model_is_the_same_with_kernels():
    """Skips, parallel layers, recurrence, gates and XSA: the loss and every parameter's gradient, also where an adapter keeps a kernel out."""
    settings = {"LAYER_PATTERN": "AGSA", "UNET_SKIPS": "1", "PARALLEL_START": "3", "LOOP_START": "1", "LOOP_END": "2", "NUM_LOOPS": "1"}
    extra = {"ATTN_GATE_WIDTH": "4", "MLP_ACT": "leaky_relu2", "VE_LAYERS": "2", "MLP_MULT": "2"}
    cfg = T.resolve_config({**TINY, **settings, **extra, "DEVICE": DEVICE.type})
    model = T.build_model(cfg, DEVICE)
    model.looping = True
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.blocks[0].mixer.c_q.adapter = lambda x: 0.1 * x
    model.blocks[1].mixer.k_proj.adapter = lambda x: 0.1 * x[..., : model.blocks[1].mixer.k_proj.weight.size(0)]
    ids = torch.randint(0, 512, (1, 14), device=DEVICE)
    results = []
    for fused in (False, True):
        model.kernels = dataclasses.replace(model.kernels, fused=fused)
        model.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append({"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}})
    plain, ours = results
    assert plain.keys() == ours.keys()
    for name in plain:
        assert (ours[name] - plain[name]).norm() <= (0.03 if DEVICE.type == "cpu" else 0.1) * plain[name].norm() + 1e-6, name


@pytest.mark.parametrize("batch,length,heads,v_heads,taps,elu", [(2, 15, 1, 2, 4, False), (1, 11, 2, 1, 3, True), (3, 1, 1, 2, 1, False)])
def test_short_conv(batch, length, heads, v_heads, taps, elu, monkeypatch):
    """More rows than a program takes, documents that begin anywhere, a position without a past, channels read in place."""
    monkeypatch.setattr(kernels, "CONV_TILES", ((4, 4), (4, 4), (8, 4)))
    monkeypatch.setattr(kernels, "CONV_BLOCKS", 2)
    width = (2 * heads + v_heads) * 16
    begins = (torch.rand(batch, length) < 0.2).to(DEVICE)
    continues, unbroken = [], torch.ones_like(begins)
    for n in range(1, taps):
        unbroken = unbroken & ~F.pad(begins, (n - 1, 0))[:, :length] & (torch.arange(length, device=DEVICE) >= n)
        continues.append(unbroken)
    inputs = [random(batch, length, width + 24), random(width, taps, dtype=torch.float32)]

    def ours(x, weight):
        *heads_of, rest = kernels.short_conv(x, weight, continues, heads, 16, elu)
        return torch.cat([*(y.flatten(2) for y in heads_of), rest.square()], -1)

    def twin(x, weight):
        x, rest = x[..., :width], x[..., width:]
        shifts = [x, *(F.pad(x, (0, 0, n, 0))[:, :length] * there[..., None] for n, there in enumerate(continues, 1))]
        return torch.cat([*(y.flatten(2) for y in kernels.plain_short_conv(shifts, weight, heads, 16, elu)), rest.square()], -1)

    compare(ours, twin, inputs, 0.012)


def test_every_kernel_compiles_for_hopper(tmp_path):
    """What the interpreter does not see: types, layouts, tensor descriptors, and whether a multiprocessor has the memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "hopper.py"]
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    source = Path(kernels.__file__).read_text()
    assert set(compiled) == {
        name for name in re.findall(r"^    def (_\w+)\(", source, re.M) if f"{name}[" in source or f"({name}, " in source
    }
    assert max(max(sizes) for sizes in compiled.values()) <= 227 * 1024


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch,length,heads,kv_heads", [(2, 19, 4, 2), (1, 33, 3, 3), (1, 1, 8, 1)])
def test_exclusive_gate(gated, batch, length, heads, kv_heads):
    inputs = [random(batch, length, heads, 16), random(batch, length, kv_heads, 16)] + [random(batch, length, heads)] * gated
    compare(
        lambda o, v, gate=None: kernels.exclusive_gate(o, v, gate),
        lambda o, v, gate=None: kernels.plain_exclusive_gate(o, v, gate),
        inputs,
        0.01,
    )


def test_exclusive_gate_reads_values_in_place():
    """v may be a slice of the joint q, k, v product, and a value of zero changes nothing."""
    joint = random(2, 9, 64)
    v = joint[..., 32:].unflatten(-1, (2, 16))
    v[0, 3] = 0
    o = random(2, 9, 4, 16)
    ours = kernels.exclusive_gate(o, v, None)
    torch.testing.assert_close(ours.float(), kernels.plain_exclusive_gate(o.float(), v.float(), None), rtol=0.02, atol=0.02)
    torch.testing.assert_close(ours[0, 3], o[0, 3])


def test_document_boundaries():
    begins = torch.zeros(2, 6, dtype=torch.bool)
    begins[0, 4] = begins[1, 0] = begins[1, 1] = True
    assert kernels.document_boundaries(begins, bucket=4).tolist() == [0, 4, 6, 7, 12, 12, 12, 12]
    assert kernels.document_boundaries(begins[:1], bucket=4).tolist() == [0, 4, 6, 6]


def test_an_autotuner_compiles_its_configurations_together():
    """Each waits until all are being compiled; then they are timed one by one and the fastest runs, as ever."""
    all_at_once, compiled, ran = threading.Barrier(3), [], []

    class Kernel:
        fn = staticmethod(lambda x, BLOCK: None)

        def warmup(self, *, grid, x, BLOCK, num_warps, num_ctas, num_stages):
            mode = triton.runtime._async_compile.active_mode.get()
            mode.submit(BLOCK, lambda: all_at_once.wait(5), lambda kernel: compiled.append(BLOCK))

        def run(self, *, grid, warmup, x, BLOCK, **how):
            assert sorted(compiled) == [16, 32, 64] and not warmup
            ran.append(BLOCK)

    def timed(call, quantiles):
        call()
        return [abs(ran[-1] - 32.0)] * 3

    configs = [triton.Config({"BLOCK": block}) for block in (16, 32, 64)]
    tuner = triton.runtime.autotuner.Autotuner(Kernel(), ["x", "BLOCK"], configs, ["x"], None, None, do_bench=timed)
    kernels.compile_together(tuner)
    for _ in range(2):
        tuner.run(grid=(1,), warmup=False, x=3)
    assert ran == [16, 32, 64, 32, 32]

"""The few GPU kernels that a library does not offer, and the library kernels that the compiler cannot see past, as custom ops.

| op | what it saves | plain twin |
|---|---|---|
| `fused_mlp` | the activation is the epilogue of the first product, its derivative that of the second's gradient; one tensor is kept | `plain_mlp` |
| `softcap_cross_entropy` | one pass over the logits, which the gradient replaces in place | `train_gpt.output_head` |
| `product_onto`, `scaled_norm` | a product is added to the residual stream in its epilogue | `base + x @ weight.t()`, `F.rms_norm` |
| `heads_of` | q and k are normed, rotated and scaled in one pass; one more makes the gradient of the joint product of q, k, v | `train_gpt.normed_heads` |
| `mix_norm` | the backward reads everything once: column sums, and x0's gradient over the layers, included | `plain_mix_norm` |
| `first_columns` | their gradient goes into those columns alone | `x, x[..., :n]` |
| `short_conv` | the gated delta rule's convolution, activation and norm: one pass forward, two back | `plain_short_conv` |
| `exclusive_gate` | XSA and the output gate in one pass each way | `plain_exclusive_gate` |
| `flash_attention` | flash-attn-4 (CuTe) for full, windowed and by-document attention, with the row's log-sum for sinks | `train_gpt.naive_attention` |

Each kernel runs under Triton's interpreter too (TRITON_INTERPRET=1), which is how tests check its arithmetic without a GPU; tests/hopper.py compiles each for
one. The matrix kernels
follow the persistent design of modded-nanogpt's records: one program a multiprocessor, operands through tensor descriptors (TMA on Hopper),
tiles of 128 x 256 x 64, the accumulator stored in two halves.

Shapes: M tokens, C model width, N hidden width, V vocabulary, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from parts.files import one_line

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU machine: every caller asks `missing_triton` first
    triton = None


NORM_EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds


def missing(load: Callable[[], object]) -> str:
    """Why `load` cannot import what an op calls, in one line; empty if it can. That a package is there says little: flash-attn-4 brings a
    `flash_attn` without flash-attn-2's functions, a wheel for another torch breaks while it is read."""
    try:
        load()
    except Exception as error:
        return one_line(error) or type(error).__name__
    return ""


def compile_together(kernel) -> None:
    """Let an autotuned Triton kernel compile its configurations in threads before it times them, which it else does one after the other: on
    a machine with cores to spare a tuning takes what its slowest configuration takes. The outcome is the same."""

    def prune(configs: list, arguments: dict, warmup: bool = False, **options) -> list:
        with ThreadPoolExecutor(len(configs)) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
            for config in configs:  # one that does not compile fails again where it is timed, and is passed over there
                kernel.fn.warmup(**arguments, **options, **config.all_kwargs())
        return configs

    kernel.early_config_prune = prune  # what an autotuner asks once a tuning, with the arguments of the call


def missing_triton(device: torch.device) -> str:
    """Why the Triton kernels cannot serve on this device; empty if they can."""
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda":
        return "needs a CUDA GPU"
    return "" if torch.cuda.get_device_capability(device) >= (9, 0) else "needs a GPU of capability 9.0 (tensor descriptors)"


def _programs(device: torch.device) -> int:
    """Programs of a persistent grid: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# ----------------------------------------------------------------------------------------------------------------------
# Products that are added to the residual stream where it lies
# ----------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("golf::add_product", mutates_args=("out",))
def _add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out [..., N] += x [M,K] Wᵀ, W [N,K]: in the product's epilogue, one pass over out instead of two."""
    out.view(-1, out.size(-1)).addmm_(x, weight.t())


@_add_product.register_fake
def _(out, x, weight):
    return None


def _added(base: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """base [..., N] + x [M,K] Wᵀ, or x Wᵀ alone. A compiler leaves the copy out where nothing reads base afterwards and base is no view."""
    if base is None:
        return x @ weight.t()
    out = base.clone(memory_format=torch.contiguous_format)
    _add_product(out, x, weight)
    return out


class _ProductOnto(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, x, weight):
        ctx.save_for_backward(x, weight)
        return _added(base, x, weight)

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        base, of_x, of_weight = ctx.needs_input_grad
        flat = d_y.reshape(-1, d_y.size(-1))
        return d_y if base else None, flat @ weight if of_x else None, flat.t() @ x if of_weight else None


def product_onto(base: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """base + x Wᵀ; base [..., N], x [..., K], W [N,K]."""
    return _ProductOnto.apply(base, x.reshape(-1, x.size(-1)), weight)


class _ScaledNorm(torch.autograd.Function):
    """RMSNorm whose backward needs its result, which the next product keeps anyway, and not its input, which can be added to where it lies."""

    @staticmethod
    def forward(ctx, x, scale):
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS) * scale
        normed = wide * inverse
        if x.dtype != normed.dtype:  # torch 2.11 compiles a cast to the same type, saved and given out, to no gradient
            normed = normed.to(x.dtype)
        ctx.save_for_backward(normed, inverse, scale)
        return normed

    @staticmethod
    def backward(ctx, d_y):
        normed, inverse, scale = ctx.saved_tensors
        wide, gradient = normed.float() / scale, d_y.float()
        return (inverse * (gradient - wide * (gradient * wide).mean(-1, keepdim=True))).to(d_y.dtype), None


def scaled_norm(x: Tensor, scale: Tensor) -> Tensor:
    """rms_norm(x) · scale; scale a float32 number without gradient, not zero."""
    return _ScaledNorm.apply(x, scale)


# ----------------------------------------------------------------------------------------------------------------------
# MLP: act(x W_upᵀ)² W_downᵀ with act LeakyReLU(0.5) or ReLU
# ----------------------------------------------------------------------------------------------------------------------

# What the backward needs of the pre-activation h is its sign and its size. The size is in the squared activation itself (its root);
# the sign rides in the lowest mantissa bit of the stored bfloat16, rounded to nearest among the values with that bit. So one tensor of
# [M, N] is written and read where the plain path keeps two.


if triton is not None:

    @triton.jit
    def _squared_activation(h, LEAKY: tl.constexpr):
        """float32 pre-activation -> bfloat16 squared activation whose lowest bit says h > 0."""
        a = tl.where(h > 0, h, 0.5 * h) if LEAKY else tl.maximum(h, 0.0)
        bits = (a * a).to(tl.int32, bitcast=True)
        sign = tl.where(h > 0, 0x10000, 0)
        rounded = (((bits - sign + 0x10000) >> 17) << 17) + sign
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)

    @triton.jit
    def _activation_slope(post, LEAKY: tl.constexpr):
        """d(act(h)²)/dh = 2h (h > 0), h/2 (LeakyReLU) or 0 (ReLU) from what `_squared_activation` stored; float32."""
        root = tl.sqrt(post.to(tl.float32))
        positive = (post.to(tl.int16, bitcast=True) & 1) == 1
        return tl.where(positive, 2.0 * root, -root if LEAKY else 0.0)

    @triton.jit
    def _mlp_kernel(
        a_desc, b_desc, post_desc, out_desc, M, N, K,
        LEAKY: tl.constexpr, BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
    ):  # fmt: skip
        """Forward: out = act(a bᵀ)², a [M,K], b [N,K]. Backward: out = (a b) ⊙ slope(post), a [M,K], b [K,N], post [M,N]."""
        columns = tl.cdiv(N, BN)
        HALF: tl.constexpr = BN // 2
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * columns, PROGRAMS, flatten=True):
            row, column = (tile // columns) * BM, (tile % columns) * BN
            accumulator = tl.zeros((BM, BN), tl.float32)
            for k in range(0, tl.cdiv(K, BK)):
                a = a_desc.load([row, k * BK])
                if BACKWARD:
                    accumulator = tl.dot(a, b_desc.load([k * BK, column]), accumulator)
                else:
                    accumulator = tl.dot(a, b_desc.load([column, k * BK]).T, accumulator)
            left, right = accumulator.reshape(BM, 2, HALF).permute(0, 2, 1).split()
            if BACKWARD:
                left = left * _activation_slope(post_desc.load([row, column]), LEAKY)
                out_desc.store([row, column], left.to(tl.bfloat16))
                right = right * _activation_slope(post_desc.load([row, column + HALF]), LEAKY)
                out_desc.store([row, column + HALF], right.to(tl.bfloat16))
            else:
                out_desc.store([row, column], _squared_activation(left, LEAKY))
                out_desc.store([row, column + HALF], _squared_activation(right, LEAKY))


FUSED_ACTIVATIONS = ("leaky_relu2", "relu2")
MLP_TILES = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8}
MLP_STAGES = {False: 4, True: 3}  # forward, backward: what fits shared memory beside the epilogue's tiles


def _launch_mlp(a: Tensor, b: Tensor, post: Tensor | None, leaky: bool, **tiles) -> Tensor:
    backward = post is not None
    tiles = {**MLP_TILES, "num_stages": MLP_STAGES[backward], **tiles}
    rows, inner = a.shape
    columns = b.size(1) if backward else b.size(0)
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=a.device)
    bm, bn, bk = tiles["BM"], tiles["BN"], tiles["BK"]
    half = [bm, bn // 2]
    describe = TensorDescriptor.from_tensor
    programs = min(_programs(a.device), triton.cdiv(rows, bm) * triton.cdiv(columns, bn))
    _mlp_kernel[(programs,)](
        describe(a, [bm, bk]), describe(b, [bk, bn] if backward else [bn, bk]), describe(out if post is None else post, half),
        describe(out, half), rows, columns, inner, LEAKY=leaky, BACKWARD=backward, PROGRAMS=programs, **tiles,
    )  # fmt: skip
    return out


@torch.library.custom_op("golf::mlp_up", mutates_args=())
def mlp_up(x: Tensor, w_up: Tensor, leaky: bool) -> Tensor:
    """x [M,C], w_up [N,C] bfloat16 (float32 under the interpreter, whose dot knows no bfloat16) -> act(x W_upᵀ)² bfloat16 [M,N], whose lowest mantissa bit is the sign of x W_upᵀ."""
    return _launch_mlp(x, w_up, None, leaky)


@mlp_up.register_fake
def _(x, w_up, leaky):
    return x.new_empty(x.size(0), w_up.size(0), dtype=torch.bfloat16)


@torch.library.custom_op("golf::mlp_down_gradient", mutates_args=())
def mlp_down_gradient(d_y: Tensor, w_down: Tensor, post: Tensor, leaky: bool) -> Tensor:
    """Gradient of the pre-activation: (d_y W_down) ⊙ act²'(h); d_y [M,C], w_down [C,N], post [M,N] from `mlp_up`."""
    return _launch_mlp(d_y, w_down, post, leaky)


@mlp_down_gradient.register_fake
def _(d_y, w_down, post, leaky):
    return torch.empty_like(post)


class _FusedMLP(torch.autograd.Function):
    """Only the products with an epilogue are opaque: the compiler sees the others and fuses what surrounds them."""

    @staticmethod
    def forward(ctx, base, x, w_up, w_down, leaky):
        post = mlp_up(x, w_up, leaky)
        ctx.save_for_backward(x, w_up, w_down, post)
        ctx.leaky = leaky
        return _added(base, post.to(x.dtype), w_down)

    @staticmethod
    def backward(ctx, d_y):
        x, w_up, w_down, post = ctx.saved_tensors
        flat = d_y.reshape(-1, d_y.size(-1)).contiguous()
        d_h = mlp_down_gradient(flat, w_down, post, ctx.leaky).to(x.dtype)
        base, _, up, down, _ = ctx.needs_input_grad  # a matrix that does not train costs no product
        return d_y if base else None, d_h @ w_up, d_h.t() @ x if up else None, flat.t() @ post.to(x.dtype) if down else None, None


def fused_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, act: str, base: Tensor | None = None) -> Tensor:
    """act(x W_upᵀ)² W_downᵀ for x [..., C], w_up [N,C], w_down [C,N] in bfloat16; act 'leaky_relu2' or 'relu2'; added to base [..., C], if there is
    one. Widths are multiples of 8."""
    y = _FusedMLP.apply(base, x.reshape(-1, x.size(-1)), w_up.contiguous(), w_down.contiguous(), act == "leaky_relu2")
    return y.view(*x.shape[:-1], w_down.size(0))


def squared_activation(h: Tensor, act: str) -> Tensor:
    """LeakyReLU(0.5)², ReLU² or SiLU²."""
    if act == "leaky_relu2":
        h = F.leaky_relu(h, 0.5)
    else:
        h = F.relu(h) if act == "relu2" else F.silu(h)
    return h.square()


def plain_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, act: str) -> Tensor:
    """The twin of `fused_mlp`."""
    return F.linear(squared_activation(F.linear(x, w_up), act), w_down)


# ----------------------------------------------------------------------------------------------------------------------
# Head: softcapped cross-entropy in one pass
# ----------------------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _softcap_ce_kernel(logits, targets, losses, V, stride, cap, BLOCK: tl.constexpr):
        """A row of raw logits -> its loss, and in its place d(loss)/d(raw logit) = (p − 1[target]) (1 − tanh²)."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < V
        raw = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        # tanh = 1 − 2s with s = 1/(e^{2z/c} + 1): then 1 − tanh² = 4 s (1 − s), and the softmax's exponent is −2c s up to a constant, at most 0:
        # the cap bounds the logits, so that no maximum has to be found as long as e^{−2c} is a float32.
        s = 1.0 / (tl.exp(raw * (2.0 / cap)) + 1.0)
        exponentials = tl.where(inside, tl.exp(s * (-2.0 * cap)), 0.0)
        total = tl.sum(exponentials, 0)
        target = tl.load(targets + row)
        at_target = tl.load(logits + row * stride + target).to(tl.float32)
        tl.store(losses + row, tl.log(total) + 2.0 * cap / (tl.exp(at_target * (2.0 / cap)) + 1.0))
        tl.debug_barrier()  # every thread has read its logits before any is overwritten
        gradient = (exponentials * (1.0 / total) - tl.where(columns == target, 1.0, 0.0)) * (4.0 * s * (1.0 - s))
        tl.store(logits + row * stride + columns, gradient.to(logits.dtype.element_ty), mask=inside)


CE_COLUMNS_A_WARP = 512
LARGEST_CAP = 40.0  # beyond it e^{−2c} is no float32


@torch.library.custom_op("golf::softcap_ce", mutates_args=("logits",))
def softcap_ce(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Losses float32 [M] of raw logits [M,V]; the logits are overwritten by the gradient of each row's loss."""
    losses = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
    block = triton.next_power_of_2(logits.size(1))
    warps = min(32, max(4, block // CE_COLUMNS_A_WARP))
    _softcap_ce_kernel[(logits.size(0),)](logits, targets, losses, logits.size(1), logits.stride(0), cap, BLOCK=block, num_warps=warps)
    return losses


@softcap_ce.register_fake
def _(logits, targets, cap):
    return logits.new_empty(logits.size(0), dtype=torch.float32)


class _SoftcapCrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward, unscaled, so that bfloat16 holds it well; 1/M and the incoming factor act on the products."""

    @staticmethod
    def forward(ctx, x, weight, targets, cap):
        logits = x @ weight.t()
        losses = softcap_ce(logits, targets, cap)
        ctx.save_for_backward(x, weight, logits)
        return losses.mean()

    @staticmethod
    def backward(ctx, d_loss):
        x, weight, d_logits = ctx.saved_tensors
        scale = d_loss / x.size(0)
        return (d_logits @ weight) * scale.to(x.dtype), (d_logits.t() @ x).float() * scale, None, None


def softcap_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Mean over tokens of the cross-entropy of cap·tanh(x Wᵀ/cap); x [..., C], weight [V,C] (cast to x's dtype), targets int64 [...]."""
    return _SoftcapCrossEntropy.apply(x.reshape(-1, x.size(-1)), weight, targets.reshape(-1), cap)


# ----------------------------------------------------------------------------------------------------------------------
# Heads: norm, rotary embedding and gain of q and k
# ----------------------------------------------------------------------------------------------------------------------

# A program takes some rows of one head of the joint product [M, (H + 2K) D]. Only the first dims of a head turn: they are read once more, from
# the cache, as the two halves that turn into each other. The rotation R is orthogonal, so one sum a row, dy · R x̂ = Rᵀdy · x̂, is both what the
# norm's gradient and what the gain's gradient needs. Keys take part as heads of gain 1.

if triton is not None:

    @triton.jit
    def _turning(base, cos, sin, rows, here, T, W, HALF: tl.constexpr, BH: tl.constexpr):
        """The two turning parts of a head at `base`, and their cosines and sines: float32 [rows, BH] each, and where they stand."""
        n = tl.arange(0, BH)
        turns = here[:, None] & (n < HALF)[None, :]
        at = rows[:, None] * W + n[None, :]
        angle = (rows % T)[:, None] * HALF + n[None, :]
        a = tl.load(base + at, mask=turns, other=0.0).to(tl.float32)
        b = tl.load(base + at + HALF, mask=turns, other=0.0).to(tl.float32)
        c = tl.load(cos + angle, mask=turns, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        return a, b, c, s, n, turns

    @triton.jit
    def _heads_forward(
        joint, cos, sin, gain, q, k, v, M, T,
        H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr,
        COPIES: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        W: tl.constexpr = (H + 2 * K) * D
        head = tl.program_id(0) % HEADS
        rows = (tl.program_id(0) // HEADS).to(tl.int64) * BM + tl.arange(0, BM)
        here = rows < M
        d = tl.arange(0, D)
        base = joint + head * D
        x = tl.load(base + rows[:, None] * W + d[None, :], mask=here[:, None], other=0.0)
        dtype = q.dtype.element_ty
        if head >= H + K:
            for copy in tl.static_range(COPIES):
                at_value = rows[:, None] * (K * COPIES * D) + ((head - H - K) * COPIES + copy) * D + d[None, :]
                tl.store(v + at_value, x, mask=here[:, None])
        else:
            raw = x.to(tl.float32)
            factor = tl.rsqrt(tl.sum(raw * raw, 1) / D + EPS)
            if head < H:
                factor *= tl.load(gain + head)
                out, width = q + head * D, H * D
            else:
                out, width = k + (head - H) * (COPIES * D), K * COPIES * D
            straight = here[:, None] & (d >= 2 * HALF)[None, :]
            a, b, c, s, n, turns = _turning(base, cos, sin, rows, here, T, W, HALF, BH)
            normed = (raw * factor[:, None]).to(dtype)
            turned_a, turned_b = ((a * c + b * s) * factor[:, None]).to(dtype), ((b * c - a * s) * factor[:, None]).to(dtype)
            for copy in tl.static_range(COPIES):
                if copy == 0 or head >= H:
                    at = rows[:, None] * width + copy * D
                    tl.store(out + at + d[None, :], normed, mask=straight)
                    tl.store(out + at + n[None, :], turned_a, mask=turns)
                    tl.store(out + at + n[None, :] + HALF, turned_b, mask=turns)

    @triton.jit
    def _heads_backward(
        joint, cos, sin, gain, d_q, d_k, d_v, d_v_again, d_joint, d_gain, M, T,
        H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr,
        COPIES: tl.constexpr, HEADS: tl.constexpr, AGAIN: tl.constexpr,
    ):  # fmt: skip
        W: tl.constexpr = (H + 2 * K) * D
        head, block = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
        rows = block.to(tl.int64) * BM + tl.arange(0, BM)
        here = rows < M
        d = tl.arange(0, D)
        at = rows[:, None] * W + head * D + d[None, :]
        dtype = d_joint.dtype.element_ty
        if head >= H + K:
            gradient = tl.zeros((BM, D), tl.float32)
            for copy in tl.static_range(COPIES):
                at_value = rows[:, None] * (K * COPIES * D) + ((head - H - K) * COPIES + copy) * D + d[None, :]
                gradient += tl.load(d_v + at_value, mask=here[:, None], other=0.0).to(tl.float32)
            if AGAIN:
                at_value = rows[:, None] * (K * D) + (head - H - K) * D + d[None, :]
                gradient += tl.load(d_v_again + at_value, mask=here[:, None], other=0.0).to(tl.float32)
            tl.store(d_joint + at, gradient.to(dtype), mask=here[:, None])
        else:
            scale = 1.0
            if head < H:
                scale = tl.load(gain + head).to(tl.float32)
                incoming, width = d_q + head * D, H * D
            else:
                incoming, width = d_k + (head - H) * (COPIES * D), K * COPIES * D
            x = tl.load(joint + at, mask=here[:, None], other=0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
            straight = here[:, None] & (d >= 2 * HALF)[None, :]
            a, b, c, s, n, turns = _turning(joint + head * D, cos, sin, rows, here, T, W, HALF, BH)
            g, g_a, g_b = tl.zeros((BM, D), tl.float32), tl.zeros((BM, BH), tl.float32), tl.zeros((BM, BH), tl.float32)
            for copy in tl.static_range(COPIES):
                if copy == 0 or head >= H:
                    at_copy = rows[:, None] * width + copy * D
                    g += tl.load(incoming + at_copy + d[None, :], mask=straight, other=0.0).to(tl.float32)
                    g_a += tl.load(incoming + at_copy + n[None, :], mask=turns, other=0.0).to(tl.float32)
                    g_b += tl.load(incoming + at_copy + n[None, :] + HALF, mask=turns, other=0.0).to(tl.float32)
            g_a, g_b = g_a * c - g_b * s, g_b * c + g_a * s
            along = (tl.sum(g * x, 1) + tl.sum(g_a * a + g_b * b, 1)) * inverse
            if head < H:
                tl.store(d_gain + block * H + head, tl.sum(along, 0))
            factor = (inverse * scale)[:, None]
            share = (inverse * along / D)[:, None]
            tl.store(d_joint + at, ((g - x * share) * factor).to(dtype), mask=straight)
            at_turning = rows[:, None] * W + head * D + n[None, :]
            tl.store(d_joint + at_turning, ((g_a - a * share) * factor).to(dtype), mask=turns)
            tl.store(d_joint + at_turning + HALF, ((g_b - b * share) * factor).to(dtype), mask=turns)


HEAD_ROWS = 32  # of one program


def _heads_launch(kernel, heads_a_row: int, joint: Tensor, cos: Tensor, *tensors: Tensor, heads: int, kv_heads: int, **how) -> None:
    """kernel over rows x heads_a_row, the heads of a row side by side in time: they share its memory pages."""
    rows, half = joint.size(0), cos.size(1)
    kernel[(triton.cdiv(rows, HEAD_ROWS) * heads_a_row,)](
        joint, cos, *tensors, rows, cos.size(0), H=heads, K=kv_heads, D=joint.size(1) // (heads + 2 * kv_heads), HEADS=heads_a_row,
        HALF=half, BH=triton.next_power_of_2(half), BM=HEAD_ROWS, EPS=NORM_EPS, num_warps=4, **how,
    )  # fmt: skip


def _heads_shapes(joint: Tensor, heads: int, kv_heads: int, copies: int) -> list[tuple[int, int, int]]:
    """Of q, k and, where it is written, v."""
    dim = joint.size(1) // (heads + 2 * kv_heads)
    return [(joint.size(0), count, dim) for count in (heads, kv_heads * copies, kv_heads * copies if copies > 1 else 0)]


@torch.library.custom_op("golf::heads", mutates_args=())
def _heads(joint: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, kv_heads: int, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = gain.size(0)
    q, k, v = (joint.new_empty(shape) for shape in _heads_shapes(joint, heads, kv_heads, copies))
    written = heads + (kv_heads if copies == 1 else 2 * kv_heads)
    _heads_launch(_heads_forward, written, joint, cos, sin, gain, q, k, v, heads=heads, kv_heads=kv_heads, COPIES=copies)
    return q, k, v


@_heads.register_fake
def _(joint, cos, sin, gain, kv_heads, copies):
    return tuple(joint.new_empty(shape) for shape in _heads_shapes(joint, gain.size(0), kv_heads, copies))


@torch.library.custom_op("golf::heads_backward", mutates_args=())
def _heads_gradient(
    joint: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_v_again: Tensor | None,
    kv_heads: int,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the joint product and, a sum for every HEAD_ROWS rows, of the gains."""
    heads, again = gain.size(0), d_v_again is not None
    d_joint = torch.empty_like(joint)
    d_gain = gain.new_empty(triton.cdiv(joint.size(0), HEAD_ROWS), heads)
    tensors = (sin, gain, d_q, d_k, d_v, d_v_again if again else d_v, d_joint, d_gain)
    _heads_launch(_heads_backward, heads + 2 * kv_heads, joint, cos, *tensors, heads=heads, kv_heads=kv_heads, COPIES=copies, AGAIN=again)
    return d_joint, d_gain


@_heads_gradient.register_fake
def _(joint, cos, sin, gain, d_q, d_k, d_v, d_v_again, kv_heads, copies):
    return torch.empty_like(joint), gain.new_empty(-(-joint.size(0) // HEAD_ROWS), gain.size(0))


class _Heads(torch.autograd.Function):
    """v comes out once for each of its readers, so that both gradients reach the kernel, which adds them as it writes the joint one."""

    @staticmethod
    def forward(ctx, joint, cos, sin, gain, kv_heads, readers, copies):
        heads = _heads(joint.view(-1, joint.size(-1)), cos, sin, gain, kv_heads, copies)
        ctx.save_for_backward(joint, cos, sin, gain)
        ctx.kv_heads, ctx.copies, dim = kv_heads, copies, heads[0].size(-1)
        q, k, v = (x.view(*joint.shape[:-1], -1, dim) if x.numel() else x for x in heads)
        values = [joint[..., -kv_heads * dim :].unflatten(-1, (kv_heads, dim)) for _ in range(readers - (copies > 1))]
        return q, k, *[v] * (copies > 1), *values

    @staticmethod
    def backward(ctx, *gradients):
        joint, cos, sin, gain = ctx.saved_tensors
        d_q, d_k, d_v, *again = [x.contiguous().view(-1, *x.shape[-2:]) for x in gradients]
        flat = joint.view(-1, joint.size(-1))
        d_joint, d_gain = _heads_gradient(flat, cos, sin, gain, d_q, d_k, d_v, again[0] if again else None, ctx.kv_heads, ctx.copies)
        return d_joint.view(joint.shape), None, None, d_gain.sum(0), None, None, None


def heads_of(joint: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, kv_heads: int, readers: int, copies: int = 1) -> tuple[Tensor, ...]:
    """The joint product of q, k and v [B,T,(H+2K)D] -> q [B,T,H,D] and k [B,T,K,D], normed and rotated, q times its head's gain [H]; v [B,T,K,D] a view.

    cos, sin float32 [T, dims/2]: the first `dims` of a head turn (half-split pairing). readers: how often v is given out, 1 or 2; where two ops
    read it, each takes one. copies: k and the v of the first reader have every head so often, [B,T,K·copies,D]. D is a power of two.
    """
    return _Heads.apply(joint.contiguous(), cos, sin, gain, kv_heads, readers, copies)


# ----------------------------------------------------------------------------------------------------------------------
# Residual stream: skip, mix with the stream's start, norm
# ----------------------------------------------------------------------------------------------------------------------

# The compiler makes one pass of the forward. Of the backward it makes two, the second for the column sums of the mix's gradient, and autograd
# adds up x0's gradient over the layers in a third. Here a row is one program's: its two sums need no barrier, the column sums stay in registers
# over all of the program's rows, and the gradient of x0 so far is read and written along the way.

if triton is not None:

    @triton.jit
    def _mix_norm_backward(
        x, x0, kept, mix, weight, gate, scale, d_mixed, d_x0_later, d_normed, d_again, d_x, d_x0, d_kept, sums, M,
        C: tl.constexpr, BC: tl.constexpr, SKIP: tl.constexpr, AGAIN: tl.constexpr, EPS: tl.constexpr,
    ):  # fmt: skip
        columns = tl.arange(0, BC)
        inside = columns < C
        m0 = tl.load(mix + columns, mask=inside, other=0.0)
        m1 = tl.load(mix + C + columns, mask=inside, other=0.0)
        factor = tl.load(scale).to(tl.float32)
        of_kept, of_x = 0.0, 1.0  # the lane is of_kept · kept + of_x · x
        if SKIP:
            of_x = tl.sigmoid(tl.load(gate + columns, mask=inside, other=0.0))
            of_kept = (1.0 - of_x) * tl.load(weight + columns, mask=inside, other=0.0)
        sum_x, sum_x0, sum_kept = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
        dtype = d_x.dtype.element_ty
        for row in range(tl.program_id(0), M, tl.num_programs(0)):
            at = tl.cast(row, tl.int64) * C + columns
            a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
            lane = a
            if SKIP:
                old = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
                lane = of_kept * old + of_x * a
            g = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
            if AGAIN:
                g += tl.load(d_again + at, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.load(d_mixed + at, mask=inside, other=0.0).to(tl.float32)
            later = tl.load(d_x0_later + at, mask=inside, other=0.0).to(tl.float32)
            mixed = m0 * lane + m1 * b
            square, along = tl.sum(mixed * mixed, 0) / C + EPS, tl.sum(g * mixed, 0) / C
            gradient += factor * tl.rsqrt(square) * (g - mixed * (along / square))
            tl.store(d_x0 + at, (later + m1 * gradient).to(dtype), mask=inside)
            tl.store(d_x + at, (m0 * of_x * gradient).to(dtype), mask=inside)
            sum_x += gradient * a
            sum_x0 += gradient * b
            if SKIP:
                tl.store(d_kept + at, (m0 * of_kept * gradient).to(dtype), mask=inside)
                sum_kept += gradient * old
        sums += tl.program_id(0) * 3 * C + columns
        tl.store(sums, sum_x, mask=inside)
        tl.store(sums + C, sum_x0, mask=inside)
        tl.store(sums + 2 * C, sum_kept, mask=inside)


MIX_PROGRAMS = {False: 12, True: 8}  # without and with a skip: what of one warp each fits a multiprocessor's registers
MIX_COLUMNS_A_WARP = 512


@torch.library.custom_op("golf::mix_norm_backward", mutates_args=())
def _mix_norm_gradient(
    x: Tensor,
    x0: Tensor,
    kept: Tensor | None,
    mix: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    d_mixed: Tensor,
    d_x0_later: Tensor,
    d_normed: Tensor,
    d_again: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of x0 (with the later layers') and of kept, and Σ over tokens of the mix's gradient times x, x0 and kept: float32 [programs, 3, C]."""
    rows, width = x.shape
    skip, again = kept is not None, d_again is not None
    d_x, d_x0, d_kept = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x) if skip else x.new_empty(0)
    programs = min(MIX_PROGRAMS[skip] * _programs(x.device), rows)
    sums = torch.empty(programs, 3, width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _mix_norm_backward[(programs,)](
        x, x0, kept if skip else x, mix, weight if skip else mix, gate if skip else mix, scale, d_mixed, d_x0_later, d_normed,
        d_again if again else d_normed, d_x, d_x0, d_kept, sums, rows,
        C=width, BC=block, SKIP=skip, AGAIN=again, EPS=NORM_EPS, num_warps=max(1, block // MIX_COLUMNS_A_WARP),
    )  # fmt: skip
    return d_x, d_x0, d_kept, sums


@_mix_norm_gradient.register_fake
def _(x, x0, kept, mix, weight, gate, scale, d_mixed, d_x0_later, d_normed, d_again):
    sums = x.new_empty(min(MIX_PROGRAMS[kept is not None] * _programs(x.device), x.size(0)), 3, x.size(1), dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(0) if kept is None else torch.empty_like(x), sums


class _MixNorm(torch.autograd.Function):
    """x0 comes out again, for the next layer, and the norm once for each of its readers: so every gradient reaches the kernel on its own."""

    @staticmethod
    def forward(ctx, x, x0, mix, scale, kept, weight, gate, readers):
        ctx.save_for_backward(x, x0, mix, scale, kept, weight, gate)
        mixed, normed = plain_mix_norm(x, x0, mix, scale, kept, weight, gate)
        return mixed, x0.view_as(x0), normed, *[normed.view_as(normed) for _ in range(readers - 1)]

    @staticmethod
    def backward(ctx, *gradients):
        x, x0, mix, scale, kept, weight, gate = ctx.saved_tensors
        flat = lambda t: None if t is None else t.contiguous().view(-1, t.size(-1))
        gradients = [flat(t) for t in gradients]
        again = gradients[3] if len(gradients) > 3 else None
        d_x, d_x0, d_kept, sums = _mix_norm_gradient(flat(x), flat(x0), flat(kept), mix, weight, gate, scale, *gradients[:3], again)
        of_x, of_x0, of_kept = sums.sum(0)
        if kept is None:
            return d_x.view(x.shape), d_x0.view(x.shape), torch.stack((of_x, of_x0)), None, None, None, None, None
        share, lane = torch.sigmoid(gate), weight * of_kept
        d_mix = torch.stack((share * of_x + (1 - share) * lane, of_x0))
        d_weight, d_gate = mix[0] * (1 - share) * of_kept, mix[0] * (of_x - lane) * share * (1 - share)
        return d_x.view(x.shape), d_x0.view(x.shape), d_mix, None, d_kept.view(x.shape), d_weight, d_gate, None


def mix_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    kept: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    readers: int = 1,
) -> tuple[Tensor, ...]:
    """What a block makes of the residual stream: mixed = mix[0]·lane + mix[1]·x0, x0, and rms_norm(mixed) · scale, once for each of its 1 or 2 readers.

    The lane is x, or with a skip lerp(weight · kept, x, σ(gate)). x, x0, kept [..., C]; mix [2,C], weight and gate [C] float32; scale a number
    without gradient. The next layer takes the x0 that comes out, so that one gradient of x0 travels back through the layers.
    """
    return _MixNorm.apply(x, x0, mix, scale, kept, weight, gate, readers)


def skip_into(x: Tensor, kept: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """lerp(weight · kept, x, σ(gate)); x, kept [..., C], weight and gate [C]."""
    return torch.lerp(weight.to(x.dtype) * kept, x, torch.sigmoid(gate).to(x.dtype))


def plain_mix_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    kept: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of `mix_norm`: mixed and its norm."""
    if kept is not None:
        x = skip_into(x, kept, weight, gate)
    mix = mix.to(x.dtype)
    mixed = mix[0] * x + mix[1] * x0
    return mixed, F.rms_norm(mixed, (mixed.size(-1),)) * scale.to(x.dtype)


if triton is not None:

    @triton.jit
    def _add_columns_kernel(x, columns, M, C, N: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
        rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        n = tl.arange(0, BN)
        here = (rows < M)[:, None] & (n < N)[None, :]
        at = x + rows[:, None] * C + n[None, :]
        added = tl.load(columns + rows[:, None] * N + n[None, :], mask=here, other=0.0).to(tl.float32)
        tl.store(at, (tl.load(at, mask=here, other=0.0).to(tl.float32) + added).to(x.dtype.element_ty), mask=here)


@torch.library.custom_op("golf::add_columns", mutates_args=("x",))
def _add_columns(x: Tensor, columns: Tensor) -> None:
    """Adds columns [M,n] to the first n of x [M,C]."""
    (rows, width), count = x.shape, columns.size(1)
    _add_columns_kernel[(triton.cdiv(rows, 128),)](x, columns, rows, width, N=count, BN=triton.next_power_of_2(count), BM=128, num_warps=4)


@_add_columns.register_fake
def _(x, columns):
    return None


class _FirstColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        return x.view_as(x), x[..., :count]

    @staticmethod
    def backward(ctx, d_x, d_columns):
        d_x = d_x.clone(memory_format=torch.contiguous_format)  # which a compiler leaves out: nobody else reads the product
        _add_columns(d_x.view(-1, d_x.size(-1)), d_columns.contiguous().view(-1, d_columns.size(-1)))
        return d_x, None


def first_columns(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x [..., C] and its first `count` columns. Their gradient goes into x's where that lies, which costs no pass over all columns."""
    return _FirstColumns.apply(x, count)


# ----------------------------------------------------------------------------------------------------------------------
# q, k, v of the gated delta rule: short causal convolution, activation, norm
# ----------------------------------------------------------------------------------------------------------------------

# The compiler writes each shift of the convolution out and reads it again, and so for the gradients: 22 of the 73 ms of a step of system A on an
# H200. Here a block of positions of one head reads its own past, which the caches hold. The backward makes two passes, for a position's gradient
# needs those of the positions after it: the gradient at the activation, with the sums over positions that the taps get, then the convolution's.
# Programs go over the heads first: neighbours read neighbouring memory.

if triton is not None:

    @triton.jit
    def _window(x, rows, first, M, reach, channels, STRIDE: tl.constexpr, LATER: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr):
        """float32 [BT, rows, channels]: x as many positions back (LATER: on) as the first index says, zero where none is or the convolution does not
        reach. What says so is loaded beside what it masks, not before it."""
        n = tl.arange(0, BT)[:, None]
        at = rows[None, :] + n if LATER else rows[None, :] - n
        there = (first + at >= 0) & (first + at < M) & (n < TAPS)
        asked = first + (at if LATER else rows[None, :])
        far = tl.load(reach + asked, mask=(asked < M) & there, other=0)
        values = tl.load(x + first * STRIDE + at[:, :, None] * STRIDE + channels[None, None, :], mask=there[:, :, None], other=0.0)
        return tl.where((far >= n)[:, :, None], values.to(tl.float32), 0.0)

    @triton.jit
    def _taps(taps, channels, C: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr):
        n = tl.arange(0, BT)[:, None]
        return tl.load(taps + n * C + channels[None, :], mask=n < TAPS, other=0.0).to(tl.float32)[:, None, :]

    @triton.jit
    def _feature(y, ELU: tl.constexpr):
        """The activation and its derivative."""
        if ELU:
            below = tl.exp(tl.minimum(y, 0.0))
            value, slope = tl.where(y > 0, y + 1.0, below), tl.where(y > 0, 1.0, below)
        else:
            s = tl.sigmoid(y)
            value, slope = y * s, s * (1.0 + y * (1.0 - s))
        return value, slope

    @triton.jit
    def _short_conv_forward(
        x, taps, reach, q, k, v, M, STRIDE: tl.constexpr,
        H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
        ELU: tl.constexpr, EPS: tl.constexpr,
    ):  # fmt: skip
        C: tl.constexpr = (2 * H + V) * D
        first, head = (tl.program_id(0) // (2 * H + V)).to(tl.int64) * BM, tl.program_id(0) % (2 * H + V)
        rows, d = tl.arange(0, BM), tl.arange(0, D)
        here = rows < M - first
        channels = head * D + d
        y = tl.sum(_taps(taps, channels, C, TAPS, BT) * _window(x, rows, first, M, reach, channels, STRIDE, False, TAPS, BT), 0)
        if head < 2 * H:
            value, _ = _feature(y, ELU)
            value = value * (1.0 / tl.maximum(tl.sqrt(tl.sum(value * value, 1)), EPS))[:, None]
            if head < H:
                out, width = q + head * D, H * D
            else:
                out, width = k + (head - H) * D, H * D
        else:
            value, _ = _feature(y, False)
            out, width = v + (head - 2 * H) * D, V * D
        tl.store(out + first * width + rows[:, None] * width + d[None, :], value.to(q.dtype.element_ty), mask=here[:, None])

    @triton.jit
    def _short_conv_backward(
        x, taps, reach, d_q, d_k, d_v, d_y, d_taps, M, STRIDE: tl.constexpr,
        H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
        ELU: tl.constexpr, EPS: tl.constexpr,
    ):  # fmt: skip
        C: tl.constexpr = (2 * H + V) * D
        part, head = tl.program_id(0) // (2 * H + V), tl.program_id(0) % (2 * H + V)
        rows, d, n_of = tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BT)
        if head < H:
            incoming, width = d_q + head * D, H * D
        elif head < 2 * H:
            incoming, width = d_k + (head - H) * D, H * D
        else:
            incoming, width = d_v + (head - 2 * H) * D, V * D
        channels = head * D + d
        tap, sums = _taps(taps, channels, C, TAPS, BT), tl.zeros((BT, BM, D), tl.float32)
        for block in range(BLOCKS):
            first = (part.to(tl.int64) * BLOCKS + block) * BM
            here = rows < M - first
            window = _window(x, rows, first, M, reach, channels, STRIDE, False, TAPS, BT)
            y = tl.sum(tap * window, 0)
            g = tl.load(incoming + first * width + rows[:, None] * width + d[None, :], mask=here[:, None], other=0.0).to(tl.float32)
            if head < 2 * H:
                value, slope = _feature(y, ELU)
                norm = tl.sqrt(tl.sum(value * value, 1))
                inverse = 1.0 / tl.maximum(norm, EPS)
                unit = value * inverse[:, None]
                along = tl.where(norm > EPS, tl.sum(g * unit, 1), 0.0)
                g = (g - unit * along[:, None]) * inverse[:, None] * slope
            else:
                value, slope = _feature(y, False)
                g = g * slope
            tl.store(d_y + first * C + rows[:, None] * C + head * D + d[None, :], g.to(d_y.dtype.element_ty), mask=here[:, None])
            sums += g[None, :, :] * window
        at = d_taps + (part * TAPS + n_of)[:, None] * C + channels[None, :]
        tl.store(at, tl.sum(sums, 1), mask=(n_of < TAPS)[:, None])

    @triton.jit
    def _short_conv_input(
        d_y, taps, reach, d_rest, d_joint, M,
        C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        """The gradient of the product's C columns that are convolved, and the R others' as they come."""
        blocks: tl.constexpr = (C + R + D - 1) // D
        first, block = (tl.program_id(0) // blocks).to(tl.int64) * BM, tl.program_id(0) % blocks
        rows, columns = tl.arange(0, BM), block * D + tl.arange(0, D)
        at, here = d_joint + first * (C + R) + rows[:, None] * (C + R) + columns[None, :], (rows < M - first)[:, None]
        if block * D < C:
            window = _window(d_y, rows, first, M, reach, columns, C, True, TAPS, BT)
            tl.store(at, tl.sum(_taps(taps, columns, C, TAPS, BT) * window, 0).to(d_joint.dtype.element_ty), mask=here)
        else:
            there = here & (columns < C + R)[None, :]
            tl.store(at, tl.load(d_rest + first * R + rows[:, None] * R + (columns - C)[None, :], mask=there), mask=there)


# Positions of a block and warps: forward, backward, gradient of the input; blocks of one program of the backward.
CONV_TILES, CONV_BLOCKS = ((16, 2), (4, 1), (32, 4)), 16
CONV_EPS = 1e-12  # F.normalize's


def _conv_programs(rows: int) -> int:
    return triton.cdiv(rows, CONV_TILES[1][0] * CONV_BLOCKS)


@torch.library.custom_op("golf::short_conv", mutates_args=())
def _short_conv(joint: Tensor, taps: Tensor, reach: Tensor, heads: int, dim: int, elu: bool) -> tuple[Tensor, Tensor, Tensor]:
    (count, channels), rows, (block, warps) = taps.shape, joint.size(0), CONV_TILES[0]
    every = channels // dim
    q, k, v = joint.new_empty(rows, heads * dim), joint.new_empty(rows, heads * dim), joint.new_empty(rows, channels - 2 * heads * dim)
    _short_conv_forward[(triton.cdiv(rows, block) * every,)](
        joint, taps, reach, q, k, v, rows, joint.stride(0), H=heads, V=every - 2 * heads, D=dim, BM=block,
        TAPS=count, BT=triton.next_power_of_2(count), ELU=elu, EPS=CONV_EPS, num_warps=warps,
    )  # fmt: skip
    return q, k, v


@_short_conv.register_fake
def _(joint, taps, reach, heads, dim, elu):
    rows, q = joint.size(0), heads * dim
    return joint.new_empty(rows, q), joint.new_empty(rows, q), joint.new_empty(rows, taps.size(1) - 2 * q)


@torch.library.custom_op("golf::short_conv_backward", mutates_args=())
def _short_conv_gradient(
    joint: Tensor, taps: Tensor, reach: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_rest: Tensor, heads: int, dim: int, elu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the product, and of the taps: float32 [programs, n, C], to be added up."""
    (count, channels), rows, rest = taps.shape, joint.size(0), d_rest.size(1)
    _, (block, warps), (input_block, input_warps) = CONV_TILES
    every, programs, padded = channels // dim, _conv_programs(rows), triton.next_power_of_2(count)
    d_y, d_joint = joint.new_empty(rows, channels), joint.new_empty(rows, channels + rest)
    d_taps = torch.empty(programs, count, channels, dtype=torch.float32, device=joint.device)
    _short_conv_backward[(programs * every,)](
        joint, taps, reach, d_q, d_k, d_v, d_y, d_taps, rows, joint.stride(0), H=heads, V=every - 2 * heads, D=dim, BM=block, BLOCKS=CONV_BLOCKS,
        TAPS=count, BT=padded, ELU=elu, EPS=CONV_EPS, num_warps=warps,
    )  # fmt: skip
    _short_conv_input[(triton.cdiv(rows, input_block) * triton.cdiv(channels + rest, dim),)](
        d_y, taps, reach, d_rest, d_joint, rows, C=channels, R=rest, D=dim, BM=input_block, TAPS=count, BT=padded, num_warps=input_warps,
    )  # fmt: skip
    return d_joint, d_taps


@_short_conv_gradient.register_fake
def _(joint, taps, reach, d_q, d_k, d_v, d_rest, heads, dim, elu):
    return joint.new_empty(joint.shape), joint.new_empty(_conv_programs(joint.size(0)), *taps.shape, dtype=torch.float32)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, taps, reach, heads, dim, elu):
        ctx.save_for_backward(joint, taps, reach)
        ctx.how = heads, dim, elu
        return *_short_conv(joint, taps, reach, heads, dim, elu), joint[:, taps.size(1) :]

    @staticmethod
    def backward(ctx, *gradients):
        joint, taps, reach = ctx.saved_tensors
        d_joint, d_taps = _short_conv_gradient(joint, taps, reach, *(g.contiguous() for g in gradients), *ctx.how)
        return d_joint, d_taps.sum(0).to(taps.dtype), None, None, None, None


def short_conv(
    joint: Tensor, taps: Tensor, continues: Sequence[Tensor], heads: int, dim: int, elu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k [B,T,heads,dim] and v [B,T,…,dim] from the first C columns of a product [B,T,≥C], their channels in this order: the causal depthwise
    convolution with taps [C,n] (the last weighs the position itself), then SiLU (q and k: elu + 1 if `elu`), q and k of length 1. Then the product's
    other columns, whose gradient travels with the convolution's. continues: bool [B,T] for each of 1 … n - 1 positions back, whether that position
    exists and is of the same document. dim is a power of two."""
    reach = sum(
        (there.to(torch.int8) for there in continues), torch.zeros_like(joint[..., 0], dtype=torch.int8)
    ).flatten()  # nearer ones exist, too
    by_distance = taps.flip(-1).t().contiguous()  # [n,C]: what a thread reads of it lies together
    *parts, rest = _ShortConv.apply(joint.flatten(0, 1), by_distance, reach, heads, dim, elu)
    return *(part.view(*joint.shape[:2], -1, dim) for part in parts), rest.view(*joint.shape[:2], -1)


def plain_short_conv(shifts: Sequence[Tensor], taps: Tensor, heads: int, dim: int, elu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `short_conv`. shifts: x [B,T,C] delayed by 0, 1, … positions, zero where there is no such position."""
    x, first, *others = shifts[0], *taps.to(shifts[0].dtype).flip(-1).unbind(-1)
    mixed = x * first
    for delayed, tap in zip(shifts[1:], others):
        mixed = mixed + delayed * tap
    q, k, v = mixed.split((heads * dim, heads * dim, x.size(-1) - 2 * heads * dim), -1)
    q, k = (F.elu(y) + 1 if elu else F.silu(y) for y in (q, k))
    q, k, v = (y.unflatten(-1, (-1, dim)) for y in (q, k, F.silu(v)))
    q, k = (F.normalize(y.float(), dim=-1).to(x.dtype) for y in (q, k))
    return q, k, v


# ----------------------------------------------------------------------------------------------------------------------
# XSA and the output gate
# ----------------------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _exclusive_forward(
        o, v, gate, y, M, v_stride, G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, GATED: tl.constexpr
    ):
        rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        head = tl.program_id(1)
        here = rows < M
        d = tl.arange(0, D)
        value = tl.load(v + rows[:, None] * v_stride + head * D + d[None, :], mask=here[:, None], other=0.0).to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sum(value * value, 1), 1e-24)
        for g in tl.static_range(G):
            at = rows[:, None] * (K * G * D) + (head * G + g) * D + d[None, :]
            out = tl.load(o + at, mask=here[:, None], other=0.0).to(tl.float32)
            share = tl.sum(out * value, 1) * inverse
            result = out - share[:, None] * value
            if GATED:
                result = result * tl.load(gate + rows * (K * G) + head * G + g, mask=here, other=0.0).to(tl.float32)[:, None]
            tl.store(y + at, result.to(y.dtype.element_ty), mask=here[:, None])

    @triton.jit
    def _exclusive_backward(
        o, v, gate, dy, d_o, d_v, d_gate, M, v_stride,
        G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        head = tl.program_id(1)
        here = rows < M
        d = tl.arange(0, D)
        value = tl.load(v + rows[:, None] * v_stride + head * D + d[None, :], mask=here[:, None], other=0.0).to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sum(value * value, 1), 1e-24)
        value_gradient = tl.zeros((BM, D), tl.float32)
        for g in tl.static_range(G):
            at = rows[:, None] * (K * G * D) + (head * G + g) * D + d[None, :]
            out = tl.load(o + at, mask=here[:, None], other=0.0).to(tl.float32)
            incoming = tl.load(dy + at, mask=here[:, None], other=0.0).to(tl.float32)
            share = tl.sum(out * value, 1) * inverse
            if GATED:
                gate_at = rows * (K * G) + head * G + g
                tl.store(d_gate + gate_at, tl.sum(incoming * (out - share[:, None] * value), 1).to(d_gate.dtype.element_ty), mask=here)
                incoming = incoming * tl.load(gate + gate_at, mask=here, other=0.0).to(tl.float32)[:, None]
            along = tl.sum(incoming * value, 1) * inverse
            tl.store(d_o + at, (incoming - along[:, None] * value).to(d_o.dtype.element_ty), mask=here[:, None])
            value_gradient += (2.0 * share * along)[:, None] * value - share[:, None] * incoming - along[:, None] * out
        tl.store(d_v + rows[:, None] * (K * D) + head * D + d[None, :], value_gradient.to(d_v.dtype.element_ty), mask=here[:, None])


def _exclusive_launch(kernel, tensors: tuple, o: Tensor, v: Tensor, gated: bool) -> None:
    tokens, heads, dim = o.shape
    block = 32
    kernel[(triton.cdiv(tokens, block), v.size(1))](
        *tensors, tokens, v.stride(0), G=heads // v.size(1), K=v.size(1), D=dim, BM=block, GATED=gated, num_warps=4
    )


@torch.library.custom_op("golf::exclusive_gate", mutates_args=())
def _exclusive_gate(o: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    y = torch.empty_like(o)
    _exclusive_launch(_exclusive_forward, (o, v, o if gate is None else gate, y), o, v, gate is not None)
    return y


@_exclusive_gate.register_fake
def _(o, v, gate):
    return torch.empty_like(o)


@torch.library.custom_op("golf::exclusive_gate_backward", mutates_args=())
def _exclusive_gate_backward(o: Tensor, v: Tensor, gate: Tensor | None, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_o, d_v = torch.empty_like(o), v.new_empty(v.shape)
    d_gate = v.new_empty(0) if gate is None else torch.empty_like(gate)
    _exclusive_launch(_exclusive_backward, (o, v, o if gate is None else gate, d_y, d_o, d_v, d_gate), o, v, gate is not None)
    return d_o, d_v, d_gate


@_exclusive_gate_backward.register_fake
def _(o, v, gate, d_y):
    return torch.empty_like(o), v.new_empty(v.shape), v.new_empty(0) if gate is None else torch.empty_like(gate)


def _exclusive_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _exclusive_gradients(ctx, d_y):
    o, v, gate = ctx.saved_tensors
    d_o, d_v, d_gate = _exclusive_gate_backward(o, v, gate, d_y.contiguous())
    return d_o, d_v, None if gate is None else d_gate


_exclusive_gate.register_autograd(_exclusive_gradients, setup_context=_exclusive_save)


def exclusive_gate(o: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """XSA, then the gate a head: (o − (o·v)/(v·v) v) · gate; o [B,T,H,D], v [B,T,K,D], gate [B,T,H] or None. D is a power of two."""
    flat_gate = None if gate is None else gate.reshape(-1, gate.size(-1)).contiguous()
    y = _exclusive_gate(o.flatten(0, 1).contiguous(), v.flatten(0, 1), flat_gate)
    return y.view(o.shape)


def plain_exclusive_gate(o: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """The twin of `exclusive_gate`. By the algebra no unit vector is kept: o − (o·v)/(v·v) v."""
    grouped, value = o.unflatten(2, (v.size(2), -1)), v.unsqueeze(3)
    share = (grouped.float() * value.float()).sum(-1, keepdim=True) / value.float().square().sum(-1, keepdim=True).clamp_min(1e-24)
    out = (grouped - share.to(o.dtype) * value).flatten(2, 3)
    return out if gate is None else out * gate[..., None]


# ----------------------------------------------------------------------------------------------------------------------
# Attention: flash-attn-4 as custom ops that the compiler can see past
# ----------------------------------------------------------------------------------------------------------------------


def missing_flash_attention_4(device: torch.device) -> str:
    """Why flash-attn-4 cannot serve on this device; empty if it can. Its CuTe kernels have forward and backward for Hopper and Blackwell."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "needs a Hopper or Blackwell GPU"
    return missing(_flash_kernels)


def _flash_kernels() -> tuple[Callable, Callable]:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


def _flash_arguments(window: int, boundaries: Tensor | None, longest: int) -> dict:
    how = {"causal": not window, "window_size_left": window - 1 if window else None, "window_size_right": 0 if window else None}
    if boundaries is not None:
        how.update(cu_seqlens_q=boundaries, cu_seqlens_k=boundaries, max_seqlen_q=longest, max_seqlen_k=longest)
    return how


def _flat(x: Tensor, boundaries: Tensor | None) -> Tensor:
    return x if boundaries is None else x.flatten(0, 1)


@torch.library.custom_op("golf::flash_attention_4", mutates_args=())
def _flash_forward(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor | None, longest: int, window: int) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _flash_kernels()[0](
        *(_flat(x, boundaries) for x in (q, k, v)), return_lse=True, **_flash_arguments(window, boundaries, longest)
    )
    return out.view(q.shape), lse


@_flash_forward.register_fake
def _(q, k, v, boundaries, longest, window):
    batch, length, heads, _ = q.shape
    shape = (batch, heads, length) if boundaries is None else (heads, batch * length)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("golf::flash_attention_4_backward", mutates_args=())
def _flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    boundaries: Tensor | None,
    longest: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q_, k_, v_, out_, d_out_ = (_flat(x, boundaries) for x in (q, k, v, out, d_out))
    gradients = _flash_kernels()[1](
        q_, k_, v_, out_, d_out_, lse, dlse=d_lse, deterministic=torch.are_deterministic_algorithms_enabled(),
        **_flash_arguments(window, boundaries, longest),
    )  # fmt: skip
    return tuple(gradient.view(x.shape) for gradient, x in zip(gradients[:3], (q, k, v)))


@_flash_backward.register_fake
def _(q, k, v, out, lse, d_out, d_lse, boundaries, longest, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _flash_save(ctx, inputs, output) -> None:
    q, k, v, boundaries, ctx.longest, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, boundaries)
    ctx.set_materialize_grads(False)


def _flash_gradients(ctx, d_out, d_lse):
    q, k, v, out, lse, boundaries = ctx.saved_tensors
    return *_flash_backward(q, k, v, out, lse, d_out.contiguous(), d_lse, boundaries, ctx.longest, ctx.window), None, None, None


_flash_forward.register_autograd(_flash_gradients, setup_context=_flash_save)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, sink: Tensor | None = None, boundaries: Tensor | None = None, longest: int = 0
) -> Tensor:
    """Causal attention of q [B,T,H,D] over k, v [B,T,K,D] in bfloat16 through flash-attn-4.

    window: keys a query sees, its own included; 0: all. boundaries: int32, cumulative starts of documents in the flattened batch, repeated
    at the end to a fixed count; longest: positions of a document at most (0: T). sink: key [K,D] of zero value; it only adds exp(q·sink/√D) to the softmax's denominator, so that the output
    shrinks by σ(lse − q·sink/√D).
    """
    out, lse = _flash_forward(q, k, v, boundaries, longest or q.size(1), window)
    if sink is None:
        return out
    at_sink = torch.einsum("btkgd,kd->btkg", q.unflatten(2, (k.size(2), -1)).float(), sink.float()).flatten(2) / q.size(-1) ** 0.5
    lse = lse.view(q.size(2), *q.shape[:2]).permute(1, 2, 0) if boundaries is not None else lse.transpose(1, 2)
    return out * torch.sigmoid(lse - at_sink).to(out.dtype)[..., None]


def document_boundaries(begins: Tensor, bucket: int = 64) -> Tensor:
    """bool [B,T], true where a document starts -> int32 cumulative starts for `flash_attention`, every row's start included.

    The end is repeated up to a multiple of `bucket` entries that at least doubles, so that few shapes occur and each compiles once.
    """
    starts = begins.clone()
    starts[:, 0] = True
    places = starts.flatten().nonzero().flatten().to(torch.int32)
    count = bucket
    while count < places.numel() + 1:
        count *= 2
    return F.pad(places, (0, count - places.numel()), value=begins.numel())

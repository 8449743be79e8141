"""Low-rank adapters, what test-time training adds to a model whose own weights stay, and gradients that repeat.

`LoRA` is one of them, for all rows of a batch or with weights of its own for each row. `DocumentAdapters` is a set of the latter for documents side by side:
a LoRA at each chosen site of every layer *call*, for recurrence calls a layer several times and each call does something else.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from train_gpt import GPT, Block, Linear


class LoRA(nn.Module):
    """Low-rank addition to what reads x (Hu et al. 2021): x -> scale · up (down x), zero at the start because `up` is.

    down [r, in] and up [out, r] serve x [..., in]; down [B, r, in] and up [B, out, r] serve x [B, T, in], each row with its own.
    """

    def __init__(self, down: Tensor, out_features: int, scale: float = 1.0):
        super().__init__()
        self.down, self.scale = nn.Parameter(down), scale
        self.up = nn.Parameter(down.new_zeros(*down.shape[:-2], out_features, down.size(-2)))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.down.to(x.dtype).mT * self.scale) @ self.up.to(x.dtype).mT


# Where a site is, in a mixer of each kind: the linear layer that has it. "o" is beside the whole mixer and "mlp" beside the whole MLP: both read the
# normalized input of what they stand beside, are small, and leave its kernels alone (the form of the challenge's public record).
LINEARS = {"q": ("c_q", "q_proj", "w_r"), "k": ("c_k", "k_proj", "w_k"), "v": ("c_v", "v_proj", "w_v")}
SITES = (*LINEARS, "o", "mlp", "head")


class DocumentAdapters(nn.Module):
    """LoRAs of `rows` documents that a batch of the model reads side by side; none reads or moves another's.

    down starts uniform in ±1/√in, alike for every document, up at zero: documents start as the model is.
    """

    def __init__(self, model: GPT, sites: Sequence[str], rank: int, alpha: float, rows: int, seed: int):
        super().__init__()
        self.model = [model]  # in a list: no submodule of this one
        generator, device = torch.Generator().manual_seed(seed), model.tok_emb.weight.device
        self.starts: list[Tensor] = []
        self.loras = nn.ModuleList()

        def lora(out_features: int, in_features: int) -> LoRA:
            start = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)
            self.starts.append(start.to(device))
            self.loras.append(LoRA(self.starts[-1].expand(rows, -1, -1).clone(), out_features, alpha / rank))
            return self.loras[-1]

        dim = model.cfg.model_dim
        self.calls: list[list[tuple[nn.Module, str, LoRA]]] = []  # for each layer call: (owner, its attribute, what goes there)
        for layer in model.layer_order(model.looping):
            block, places = model.blocks[layer], []
            for site in sites:
                if site in LINEARS:
                    linear = next(getattr(block.mixer, name) for name in LINEARS[site] if hasattr(block.mixer, name))
                    places.append((linear, "adapter", lora(*linear.weight.shape)))
                elif site != "head":
                    places.append((block, {"o": "mixer_adapter", "mlp": "mlp_adapter"}[site], lora(dim, dim)))
            self.calls.append(places)
        self.head = lora(*model.tok_emb.weight.shape) if "head" in sites else None

    @torch.no_grad()
    def reset(self, rows: Tensor | slice = slice(None)) -> None:
        """Other documents there."""
        for lora, start in zip(self.loras, self.starts):
            lora.down[rows] = start
            lora.up[rows] = 0.0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The model's forwards inside the block go through the adapters; a batch has `rows` rows."""
        (model,) = self.model
        model.before_layer, model.head_adapter = self._enter, self.head
        try:
            yield
        finally:
            model.before_layer = model.head_adapter = None
            for owner, attribute, _ in (place for places in self.calls for place in places):
                setattr(owner, attribute, None)

    def _enter(self, call: int, block: Block) -> None:
        for owner, attribute, lora in self.calls[call]:
            setattr(owner, attribute, lora)


class RowAdamW:
    """AdamW (Loshchilov and Hutter 2019) without momentum over parameters [rows, …], each row of which starts over by itself.

    No momentum: what a chunk teaches acts on the next one at once.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, beta2: float, weight_decay: float, eps: float = 1e-10):
        self.params, self.lr, self.beta2, self.weight_decay, self.eps = list(params), lr, beta2, weight_decay, eps
        self.squares = [torch.zeros_like(param) for param in self.params]
        self.steps = self.params[0].new_zeros(len(self.params[0]), 1, 1)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        self.steps += 1
        rate = -self.lr * (1 - self.beta2**self.steps).sqrt()  # of the squares' mean over the steps that there were
        torch._foreach_mul_(self.squares, self.beta2)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - self.beta2)
        roots = torch._foreach_sqrt(self.squares)
        torch._foreach_add_(roots, self.eps)
        moves = torch._foreach_div(gradients, roots)
        torch._foreach_mul_(self.params, 1 - self.lr * self.weight_decay)
        for param, move in zip(self.params, moves):
            param.addcmul_(move, rate)

    @torch.no_grad()
    def reset(self, rows: Tensor | slice = slice(None)) -> None:
        self.steps[rows] = 0
        for square in self.squares:
            square[rows] = 0.0


def linear_adapters(model: GPT, rank: int, seed: int, skip: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Attach a LoRA to every linear layer, one for all rows and calls; returns its parameters by name. skip: beginnings of names left out."""
    generator, chosen = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not f"{name}.".startswith(skip):
            out_features, in_features = module.weight.shape
            start = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
            module.adapter = LoRA(start.to(module.weight.device), out_features)
            chosen |= {f"{name}.adapter.{key}": param for key, param in module.adapter.named_parameters()}
    return chosen


@contextlib.contextmanager
def repeatable_gradients(device: torch.device) -> Iterator[None]:
    """Inside the block a GPU's gradients are the same to the bit when they are computed again.

    The fastest attention backward adds in no fixed order. That noise, carried into the weights, would blur what the audit's reruns
    are there to see: a score that moved because of a token it must not depend on.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch insists on it
    torch.utils.deterministic.fill_uninitialized_memory = False
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

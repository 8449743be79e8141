"""A program: compile every Triton kernel of parts/kernels.py for Hopper, where there is no GPU, and print {kernel: [bytes of shared memory, …]}.

The kernels' own callers run, forward and backward, on tensors of the CPU; each launch compiles and does not run, so that results mean nothing.
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from parts import kernels


class Hopper:
    """As much of Triton's driver as a compilation asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    run, compiled = JITFunction.run, {}

    def compile_only(kernel, *arguments, grid, warmup, **options):
        done = run(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.__name__, []).append(done.metadata.shared)

    driver.set_active(Hopper())
    JITFunction.run = compile_only

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)

    there, control = torch.ones(1, 256, dtype=torch.bool), torch.float32
    x, angle, one = zeros(1, 256, 512), torch.zeros(256, 8), torch.tensor(1.0)
    for results in (
        (kernels.fused_mlp(x, zeros(2048, 512), zeros(512, 2048), "leaky_relu2"),),
        (kernels.softcap_cross_entropy(x, zeros(1024, 512), zeros(1, 256, dtype=torch.int64), 30.0),),
        kernels.heads_of(zeros(1, 256, 1024), angle, angle, zeros(8, dtype=control), 4, 1, 2),
        kernels.mix_norm(x, x, zeros(2, 512, dtype=control), one, readers=1),
        (kernels.exclusive_gate(zeros(1, 256, 8, 64), zeros(1, 256, 4, 64), zeros(1, 256, 8)),),
        kernels.short_conv(zeros(1, 256, 2064), zeros(1536, 4, dtype=control), [there] * 3, 8, 64, False),
        kernels.first_columns(x, 12),
    ):
        sum(result.sum() for result in results).backward()
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()

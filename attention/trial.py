"""Whether the kernels are to be trusted on a device: tried once for each device and dtype, against the formula.

A kernel may fail to compile on a GPU that nobody has had, or worse, compute something else without a word.
"""

import functools
import warnings

import torch
from torch import Tensor

from attention import kernels
from attention.textbook import textbook_attention

# Largest difference, in parts of the largest value, that rounding explains: of TF32 products in single precision
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SHAPE = (2, 12, 70, 64)  # B, H, N, Dh: more than one block of rows, and a part of one
NAMES = ("the output", "the gradient of q", "of k", "of v", "of the masks", "of λ", "of θ")


@functools.cache
def kernels_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they compile, run and agree with the formula, forward and backward. If not, says so, once."""
    try:
        # Whatever the first call is in: a context without gradients would fail the trial, one of autocast change it
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            problem = disagreement(device, dtype)
    except Exception as error:  # whatever Triton, its compiler and the driver raise
        problem = f"they fail ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    if problem:
        warnings.warn(
            f"the attention kernels cannot be used on {device} in {str(dtype).removeprefix('torch.')}: {problem}; the"
            " formula takes their place: the same numbers, slower and with more memory. Please report this",
            RuntimeWarning,
            stacklevel=2,
        )
    return not problem


def disagreement(device: torch.device, dtype: torch.dtype) -> str:
    """What of the kernels' forward and backward is not the formula's; "" if all is."""
    B, H, N, Dh = SHAPE
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(SHAPE, generator=g).to(device, dtype) for _ in range(4))
    gates = (torch.rand(B, H, N, generator=g), 3 * torch.rand(B, H, generator=g), torch.rand(B, H, generator=g))
    gates = [gate.to(device) for gate in gates]
    out, lse = kernels.forward(q, k, v, *gates, None, 0.0)
    computed = (out, *kernels.backward(grad, out, lse, q, k, v, *gates, None, 0.0))
    for name, mine, right in zip(NAMES, computed, by_formula(q, k, v, *gates, grad)):
        error = (mine.float() - right).abs().max() / right.abs().max()
        if not error <= TOLERANCE[dtype]:  # not a number, too
            return f"{name} differs from the formula's by {float(error):.1%}"
    return ""


def by_formula(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients in float32, by autograd."""
    *leaves, grad = (x.float().detach() for x in tensors)
    with torch.enable_grad():
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = textbook_attention(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

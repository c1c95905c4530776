"""Whether the kernels are to be trusted on a device: tried once for each device and dtype, against the formula.
Likewise FlexAttention, in their place.

A kernel may fail to compile on a GPU that nobody has had, or worse, compute something else without a word.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from attention import kernels
from attention.textbook import textbook_attention

# Largest difference, in parts of the largest value, that rounding explains: of TF32 products in single precision
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# B, H, N, Dh: more than one block of rows, and a part of one; below 128 tokens FlexAttention takes another kernel
SHAPE = (2, 12, 130, 64)
FAILED: set[torch.dtype] = set()  # in which the kernels do not serve: for those who cannot try them
NAMES = ("the output", "the gradient of q", "of k", "of v", "of the masks", "of λ", "of θ")


@functools.cache
def kernels_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they compile, run and agree with the formula, forward and backward. If not, says so, once."""
    problem = problem_of(by_kernels, device, dtype)
    if problem:
        FAILED.add(dtype)
        warnings.warn(
            f"the attention kernels cannot be used on {device} in {str(dtype).removeprefix('torch.')}: {problem}; the"
            " formula takes their place, or FlexAttention where it can: the same numbers, slower and with more memory."
            " Please report this",
            RuntimeWarning,
            stacklevel=2,
        )
    return not problem


@functools.cache
def flex_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """The same of FlexAttention, without a word: the formula is always there."""
    return not problem_of(by_flex, device, dtype)


def problem_of(compute: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Why a way to compute attention cannot be used; "" if it can."""
    try:
        # Whatever the first call is in: a context without gradients would fail the trial, one of autocast change it
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            return disagreement(compute, device, dtype)
    except Exception as error:  # whatever Triton, torch's compiler and the driver raise
        return f"they fail ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def disagreement(compute: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """What of an output and its gradients is not the formula's; "" if all is."""
    B, H, N, Dh = SHAPE
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(SHAPE, generator=g).to(device, dtype) for _ in range(4))
    gates = (torch.rand(B, H, N, generator=g), 3 * torch.rand(B, H, generator=g), torch.rand(B, H, generator=g))
    gates = [gate.to(device) for gate in gates]
    tensors = (q, k, v, *gates, grad)
    right_ones = with_gradients(textbook_attention, *(x.float() for x in tensors))
    for name, mine, right in zip(NAMES, compute(*tensors), right_ones):
        error = (mine.float() - right).abs().max() / right.abs().max()
        if not error <= TOLERANCE[dtype]:  # not a number, too
            return f"{name} differs from the formula's by {float(error):.1%}"
    return ""


def by_kernels(*tensors: Tensor) -> tuple[Tensor, ...]:
    *tensors, grad = tensors
    out, lse = kernels.forward(*tensors, None, 0.0)
    return (out, *kernels.backward(grad, out, lse, *tensors, None, 0.0))


def by_flex(*tensors: Tensor) -> tuple[Tensor, ...]:
    from attention.flex import flex_gated_attention  # torch's compiler, where it is needed

    return with_gradients(flex_gated_attention, *tensors)


def with_gradients(attend: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """attend's output for q, k, v, M, λ and θ, and their gradients, by autograd. The last tensor is the output's."""
    *leaves, grad = tensors
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

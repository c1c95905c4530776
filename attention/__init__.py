"""Region-gated attention, the operator of RG-MHA (Zhang et al., ECAI 2025, arXiv 2505.07734).

    region_gated_attention(q, k, v, masks, lam, theta, dropout_p)  ->  dropout(softmax(S ⊙ Γ)) V

with the scores S = Q Kᵀ / √Dh and the gate Γ_ij = σ(λ (M_i M_j − θ)) of each head. The gate multiplies the score before
the softmax: a closed gate makes a score 0, it does not exclude the key. So it is no additive mask, and
scaled_dot_product_attention cannot express it. One operator, three ways to compute it:

    textbook.py   the formula. It writes six or more B·H·N·N tensors to memory, and keeps most of them for the backward.
    blocked.py    PyTorch operations on pieces of the N x N plane that fit the cache. The way on a CPU.
    kernels.py    Triton: one kernel forward and two backward that keep the N x N plane on the chip. The way on CUDA.

The last two keep nothing of the N x N plane for the backward: they compute it again from q, k and the masks. This file
is the operator and its dispatch; trial.py tries the kernels on a GPU before they are used there; dropout.py has the
random numbers of the CPU's path, and a dropout for any tensor. flex.py is PyTorch's FlexAttention, which takes the
place of kernels that fail, where it can.

Letters in shape comments are those of model.py, and

    g  heads of a piece, of one sample or of several        r  rows (queries) of a piece
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attention import blocked, kernels
from attention.dropout import random_keys
from attention.layout import empty_token_major
from attention.textbook import textbook_attention
from attention.trial import FAILED, flex_serves, kernels_serve

FLEX_HEAD_DIMS = (16, 32, 64, 128)  # that FlexAttention takes on every GPU

_forced_path: str | None = None


def region_gated_attention(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """dropout(softmax(S ⊙ Γ)) V with S = Q Kᵀ / √Dh and the gate Γ_ij = σ(λ (M_i M_j − θ)) (paper, RG-MHA).

    Differentiable once with respect to all six tensors. Under autocast q, k and v are cast, as for a matrix product;
    gate and softmax are in float32 (float64 for float64 inputs) whatever the dtypes of the arguments, but on the
    textbook path. A graph that is compiled or exported keeps the path of the device it was made on.

    Args:
        q, k, v: (B, H, N, Dh), of one floating-point dtype and device; they need not be contiguous.
        masks: M (B, H, N).
        lam, theta: λ and θ (B, H).
        dropout_p: probability in [0, 1) of dropping an attention weight. The random numbers come from PyTorch's default
            generator of the device: torch.manual_seed makes them repeatable, on one path and one kind of device.

    Returns:
        (B, H, N, Dh), of the dtype of q; in memory (B, N, H, Dh), so that joining the heads afterwards is free.

    Raises:
        ValueError: shapes, dtypes or dropout_p are not as above.
        RuntimeError: the path was forced to one that cannot run here.
    """
    device = q.device.type
    # is_autocast_enabled raises for "meta"; is_autocast_available would tell, but torch 2.11's compiler cannot trace it
    if device != "meta" and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check_arguments(q, k, v, masks, lam, theta, dropout_p)
    path = _forced_path or _default_path(q, dropout_p)
    if path == "flex":
        from attention.flex import flex_gated_attention  # torch's compiler, where it is needed

        return flex_gated_attention(q, k, v, masks, lam, theta, dropout_p)
    if path == "textbook" or q.numel() == 0:
        return textbook_attention(q, k, v, masks, lam, theta, dropout_p)
    random = None
    if dropout_p > 0:
        random = (
            random_keys(2, *masks.shape, device=q.device)
            if path == "blocked"
            else torch.randint(2**62, (1,), device=q.device)
        )
    return _forward(q, k, v, masks, lam, theta, random, dropout_p, path)[0]


@contextmanager
def force_path(path: str | None) -> Iterator[None]:
    """Within this context region_gated_attention takes `path`: "textbook", "blocked", "triton" or "flex"; None chooses
    by device.

    For tests and benchmarks. "triton" runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before the first
    import).
    """
    global _forced_path
    if path not in (None, "textbook", "blocked", "triton", "flex"):
        raise ValueError(f"there is no path {path!r}: take textbook, blocked, triton or flex")
    before, _forced_path = _forced_path, path
    try:
        yield
    finally:
        _forced_path = before


def try_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Tries the kernels as the first call for a device and dtype does. For who compiles, where nothing can be tried."""
    if kernels.takes(torch.empty(1, 1, 1, 64, device=device, dtype=dtype)):
        kernels_serve(torch.empty(0, device=device).device, dtype)


def _default_path(q: Tensor, dropout_p: float) -> str:
    if not kernels.takes(q):
        return "blocked"
    # Nothing can be tried while a graph is made; try_kernels does so before
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return "textbook" if q.dtype in FAILED else "triton"
    if kernels_serve(q.device, q.dtype):
        return "triton"
    has_flex = dropout_p == 0 and q.dtype != torch.float16 and q.shape[-1] in FLEX_HEAD_DIMS
    return "flex" if has_flex and flex_serves(q.device, q.dtype) else "textbook"


def _check_arguments(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, dropout_p: float
) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k and v have to be (B, H, N, Dh), all alike, but are {tuple(q.shape)}, {tuple(k.shape)} and"
            f" {tuple(v.shape)}"
        )
    if masks.shape != q.shape[:3] or lam.shape != q.shape[:2] or theta.shape != q.shape[:2]:
        raise ValueError(
            f"for q of {tuple(q.shape)} masks have to be {tuple(q.shape[:3])}, lam and theta {tuple(q.shape[:2])}, "
            f"but they are {tuple(masks.shape)}, {tuple(lam.shape)} and {tuple(theta.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v have to be of one floating-point dtype, but are {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, but has to be in [0, 1)")


@torch.library.custom_op("lamm_vit::region_gated_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Tensor,
    lam: Tensor,
    theta: Tensor,
    random: Tensor | None,
    dropout_p: float,
    path: str,
) -> tuple[Tensor, Tensor]:
    """-> the output, and the kernels' row statistics for the backward, log2 Σ_j 2^z_ij (B, H, N); blocked: nothing
    (0,).
    """
    with torch.autocast(q.device.type, enabled=False):
        way = kernels if path == "triton" else blocked
        return way.forward(q, k, v, masks, lam, theta, random, dropout_p)


@_forward.register_fake
def _(q, k, v, masks, lam, theta, random, dropout_p, path):
    return empty_token_major(q), q.new_empty(q.shape[:3] if path == "triton" else (0,), dtype=torch.float32)


@torch.library.custom_op("lamm_vit::region_gated_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Tensor,
    lam: Tensor,
    theta: Tensor,
    random: Tensor | None,
    dropout_p: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v, masks, lam and theta, each of its tensor's dtype."""
    with torch.autocast(q.device.type, enabled=False):
        way = kernels if path == "triton" else blocked
        return way.backward(grad, out, lse, q, k, v, masks, lam, theta, random, dropout_p)


@_backward.register_fake
def _(grad, out, lse, q, k, v, masks, lam, theta, random, dropout_p, path):
    gates = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (masks, lam, theta))
    return (*(empty_token_major(x) for x in (q, k, v)), *gates)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.dropout_p, ctx.path = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, grad, _):
    return (*_backward(grad, *ctx.saved_tensors, ctx.dropout_p, ctx.path), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)

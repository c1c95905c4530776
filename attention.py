"""Region-gated attention, the operator of RG-MHA (Zhang et al., ECAI 2025, arXiv 2505.07734).

    region_gated_attention(q, k, v, masks, lam, theta, dropout_p)  ->  dropout(softmax(S ⊙ Γ)) V

with the scores S = Q Kᵀ / √Dh and the gate Γ_ij = σ(λ (M_i M_j − θ)) of each head. The gate multiplies the score before
the softmax: a closed gate makes a score 0, it does not exclude the key. So it is no additive mask, and
scaled_dot_product_attention cannot express it. One operator, three ways to compute it:

    textbook   the formula, below. It writes six or more B·H·N·N tensors to memory, and keeps most of them for the backward.
    blocked    PyTorch operations on pieces of the N x N plane that fit the cache. The way on a CPU.
    triton     one kernel forward and two backward that keep the N x N plane on the chip. The way on a CUDA device.

The last two keep nothing of the N x N plane for the backward: they compute it again from q, k and the masks.
Letters in shape comments are those of model.py, and

    g  heads of a piece, of one sample or of several        r  rows (queries) of a piece
"""

from __future__ import annotations  # Triton's annotations are read as text where there is no Triton

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings it on Linux only
    triton = None

CACHE_ELEMENTS = 2**20  # that the buffers of a piece may hold together, per thread: 4 MiB in float32, a core's share of L2 and L3
MAX_KERNEL_HEAD_DIM = 128  # wider heads spill the kernels' registers
LOG2_E = tl.constexpr(1.4426950408889634) if triton is not None else None  # a kernel reads no other kind of global

_forced_path: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def region_gated_attention(q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, dropout_p: float = 0.0) -> Tensor:
    """dropout(softmax(S ⊙ Γ)) V with S = Q Kᵀ / √Dh and the gate Γ_ij = σ(λ (M_i M_j − θ)) (paper, RG-MHA).

    Differentiable once with respect to all six tensors. Under autocast q, k and v are cast, as for a matrix product; gate
    and softmax are in float32 (float64 for float64 inputs) whatever the dtypes of the arguments, but on the textbook path.
    A graph that is compiled or exported keeps the path of the device it was made on.

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
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check_arguments(q, k, v, masks, lam, theta, dropout_p)
    path = _forced_path or _default_path(q)
    if path == "textbook" or q.numel() == 0:
        return textbook(q, k, v, masks, lam, theta, dropout_p)
    random = None
    if dropout_p > 0:
        random = _random_keys(2, *masks.shape, device=q.device) if path == "blocked" else torch.randint(2**62, (1,), device=q.device)
    return _forward(q, k, v, masks, lam, theta, random, dropout_p, path)[0]


def textbook(q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, dropout_p: float = 0.0) -> Tensor:
    """The formula of region_gated_attention, written down. What the other two paths have to agree with."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, N, Dh) x (B, H, Dh, N) -> (B, H, N, N)
    pairs = masks.unsqueeze(-1) * masks.unsqueeze(-2)  # (B, H, N, 1) * (B, H, 1, N) -> (B, H, N, N)
    gate = torch.sigmoid(lam[..., None, None] * (pairs - theta[..., None, None]))  # (B, H, N, N)
    attention = F.dropout((scores * gate).softmax(dim=-1), dropout_p)  # (B, H, N, N)
    return attention.to(v.dtype) @ v  # (B, H, N, N) x (B, H, N, Dh) -> (B, H, N, Dh)


@contextmanager
def force_path(path: str | None) -> Iterator[None]:
    """Within this context region_gated_attention takes `path`: "textbook", "blocked" or "triton"; None chooses by device.

    For tests and benchmarks. "triton" runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before the first import).
    """
    global _forced_path
    if path not in (None, "textbook", "blocked", "triton"):
        raise ValueError(f"there is no path {path!r}: take textbook, blocked or triton")
    before, _forced_path = _forced_path, path
    try:
        yield
    finally:
        _forced_path = before


def _default_path(q: Tensor) -> str:
    kernels_take = triton is not None and q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= MAX_KERNEL_HEAD_DIM
    return "triton" if kernels_take else "blocked"


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, dropout_p: float) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v have to be (B, H, N, Dh), all alike, but are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    if masks.shape != q.shape[:3] or lam.shape != q.shape[:2] or theta.shape != q.shape[:2]:
        raise ValueError(
            f"for q of {tuple(q.shape)} masks have to be {tuple(q.shape[:3])}, lam and theta {tuple(q.shape[:2])}, "
            f"but they are {tuple(masks.shape)}, {tuple(lam.shape)} and {tuple(theta.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v have to be of one floating-point dtype, but are {q.dtype}, {k.dtype} and {v.dtype}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, but has to be in [0, 1)")


def _empty_token_major(x: Tensor) -> Tensor:
    """An empty (B, H, N, Dh) tensor that lies in memory as (B, N, H, Dh), as a linear layer wants and gives it."""
    B, H, N, Dh = x.shape
    return x.new_empty(B, N, H, Dh).transpose(1, 2)


@torch.library.custom_op("lamm_vit::region_gated_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, random: Tensor | None, dropout_p: float, path: str
) -> tuple[Tensor, Tensor]:
    """-> the output, and the kernels' row statistics for the backward, log2 Σ_j 2^z_ij (B, H, N); nothing (0,) on the blocked path."""
    with torch.autocast(q.device.type, enabled=False):
        return (_triton_forward if path == "triton" else _blocked_forward)(q, k, v, masks, lam, theta, random, dropout_p)


@_forward.register_fake
def _(q, k, v, masks, lam, theta, random, dropout_p, path):
    return _empty_token_major(q), q.new_empty(q.shape[:3] if path == "triton" else (0,), dtype=torch.float32)


@torch.library.custom_op("lamm_vit::region_gated_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor,
    random: Tensor | None, dropout_p: float, path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the gradients of q, k, v, masks, lam and theta, each of its tensor's dtype."""
    with torch.autocast(q.device.type, enabled=False):
        if path == "triton":
            return _triton_backward(grad, out, lse, q, k, v, masks, lam, theta, random, dropout_p)
        return _blocked_backward(grad, q, k, v, masks, lam, theta, random, dropout_p)


@_backward.register_fake
def _(grad, out, lse, q, k, v, masks, lam, theta, random, dropout_p, path):
    gates = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (masks, lam, theta))
    return (*(_empty_token_major(x) for x in (q, k, v)), *gates)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.dropout_p, ctx.path = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, grad, _):
    return (*_backward(grad, *ctx.saved_tensors, ctx.dropout_p, ctx.path), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout on a CPU


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p), several times as fast on a CPU and with nothing kept for the backward but a key for each row and column.

    x is (..., D), of any floating-point dtype. F.dropout draws its random numbers one after the other on a CPU; in a ViT-B
    that alone is a quarter of a training step in bfloat16.
    """
    if x.device.type != "cpu" or not 0 < p < 1 or x.numel() == 0 or x.ndim == 0:
        return F.dropout(x, p)
    return _dropout(x, _random_keys(x.numel() // x.shape[-1]), _random_keys(x.shape[-1]), p)


def _random_keys(*size: int, device: torch.device | str = "cpu") -> Tensor:
    """Two random odd numbers for each row, or for each column, of a plane: (2, *size) int32."""
    return torch.randint(-(2**31), 2**31, (2, *size), dtype=torch.int32, device=device) | 1


def _keep_mask(row_keys: Tensor, column_keys: Tensor, p: float, out: Tensor) -> Tensor:
    """Writes 0 with probability p and 1 / (1 − p) otherwise to each element of a plane, without drawing a random number for each.

    The bits of element (i, j) are ((a_i b_j) ⊕ c_i) d_j mod 2³², a hash of the keys of its row and its column. So they are
    the same in forward and backward and however the plane is cut into pieces, with no state to carry along.

    Args:
        row_keys, column_keys: (2, ..., r) and (2, ..., n) of _random_keys.
        out: (..., r, n), float32 or float64.
    """
    (a, c), (b, d) = row_keys.unsqueeze(-1), column_keys.unsqueeze(-2)
    bits = torch.mul(a, b).bitwise_xor_(c).mul_(d)  # (..., r, 1) * (..., 1, n) -> (..., r, n), all int32 alike but for the lowest bit
    return torch.ge(out.copy_(bits), p * 2.0**32 - 2.0**31, out=out).mul_(1 / (1 - p))


@torch.library.custom_op("lamm_vit::dropout", mutates_args=())
def _dropout(x: Tensor, row_keys: Tensor, column_keys: Tensor, p: float) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])  # (rows, D)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    step = max(1, CACHE_ELEMENTS // 4 * torch.get_num_threads() // x.shape[-1])
    keep = flat.new_empty(min(step, len(flat)), x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    for i in range(0, len(flat), step):
        piece = slice(i, min(i + step, len(flat)))
        mask = _keep_mask(row_keys[:, piece], column_keys, p, out=keep[: piece.stop - i])
        out[piece] = mask.mul_(flat[piece])
    return out.view(x.shape)


@_dropout.register_fake
def _(x, row_keys, column_keys, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _differentiate_dropout(ctx, grad):
    return _dropout(grad, *ctx.saved_tensors, ctx.p), None, None, None


def _save_keys(ctx, inputs, output):
    _, row_keys, column_keys, ctx.p = inputs
    ctx.save_for_backward(row_keys, column_keys)


_dropout.register_autograd(_differentiate_dropout, setup_context=_save_keys)


# ---------------------------------------------------------------------------------------------------------------------
# blocked: the CPU's path


def _pieces(B: int, H: int, N: int, buffers: int) -> tuple[list[tuple[slice, slice]], list[slice], int]:
    """How to cut (B, H, N, N) so that `buffers` of a piece fit the cache: [(samples, heads)], each with all of [rows]; elements of a buffer."""
    elements = CACHE_ELEMENTS * torch.get_num_threads() // buffers
    elements = min(elements, B * H * N * N // 2)  # never all of it
    rows = max(1, min(N, elements // N))
    heads = max(1, min(H, elements // (rows * N)))
    heads = math.ceil(H / math.ceil(H / heads))  # pieces of even size
    samples = max(1, min(B, elements // (H * N * N)))
    planes = [(slice(b, b + samples), slice(h, h + heads)) for b in range(0, B, samples) for h in range(0, H, heads)]
    return planes, [slice(i, min(i + rows, N)) for i in range(0, N, rows)], samples * heads * rows * N


class _Workspace:
    """The pieces of the N x N plane, and buffers that are used again for each so that they stay in the cache.

    Gate and softmax want float32 (or float64), matrix products the dtype of q: where they differ, `product` and `operand`
    convert between them in the cache. In float32 they cost nothing.
    """

    def __init__(self, q: Tensor, buffers: int):
        self.planes, self.row_blocks, elements = _pieces(*q.shape[:3], buffers)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.buffers = [q.new_empty(elements, dtype=self.dtype) for _ in range(buffers)]
        self.low = q.new_empty(elements) if q.dtype != self.dtype else None

    def __call__(self, g: int, r: int, N: int) -> tuple[Tensor, ...]:
        """All buffers as (g, r, N)."""
        return tuple(buffer[: g * r * N].view(g, r, N) for buffer in self.buffers)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """out (g, r, N) = a (g, r, Dh) b (g, Dh, N)."""
        if self.low is None:
            return torch.bmm(a, b, out=out)
        return out.copy_(torch.bmm(a, b, out=self.low[: out.numel()].view(out.shape)))

    def operand(self, x: Tensor) -> Tensor:
        """x (g, r, N) in the dtype of q. Valid until the next call of operand or product."""
        return x if self.low is None else self.low[: x.numel()].view(x.shape).copy_(x)


def _gate(row_masks: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, out: Tensor) -> Tensor:
    """Γ = σ(λ (M_i M_j − θ)): (g, r), (g, N), (g, 1, 1), (g, 1, 1) -> out (g, r, N). In the formula's order, so that a huge λ rounds alike."""
    return torch.mul(row_masks[..., None], masks[:, None], out=out).sub_(theta).mul_(lam).sigmoid_()


def _blocked_forward(q, k, v, masks, lam, theta, random, dropout_p):
    out = _empty_token_major(q)
    workspace = _Workspace(q, buffers=2)
    masks, lam, theta = (x.to(workspace.dtype) for x in (masks, lam[..., None, None], theta[..., None, None]))
    for plane in workspace.planes:
        q_, k_, v_, masks_, lam_, theta_ = (x[plane].contiguous().flatten(0, 1) for x in (q, k, v, masks, lam, theta))  # (B, H, ...) -> (g, ...)
        q_ = q_ * q.shape[-1] ** -0.5  # so that q kᵀ is S
        if random is not None:
            row_keys, column_keys = (keys[(slice(None), *plane)].flatten(1, 2) for keys in random.unbind(1))  # (2, g, N)
        for rows in workspace.row_blocks:
            q_rows = q_[:, rows]
            scores, weights = workspace(*q_rows.shape[:2], q.shape[2])
            workspace.product(q_rows, k_.mT, out=scores)  # (g, r, Dh) x (g, Dh, N) -> (g, r, N)
            scores.mul_(_gate(masks_[:, rows], masks_, lam_, theta_, out=weights))
            torch.softmax(scores, dim=-1, out=weights)
            if random is not None:
                weights.mul_(_keep_mask(row_keys[..., rows], column_keys, dropout_p, out=scores))
            heads = torch.bmm(workspace.operand(weights), v_)  # (g, r, N) x (g, N, Dh) -> (g, r, Dh)
            out[plane][:, :, rows] = heads.view_as(out[plane][:, :, rows])
    return out, q.new_empty(0, dtype=torch.float32)


def _blocked_backward(grad, q, k, v, masks, lam, theta, random, dropout_p):
    N, scale = q.shape[2], q.shape[-1] ** -0.5
    workspace = _Workspace(q, buffers=4 if random is None else 5)
    grad_q, grad_k, grad_v = (_empty_token_major(x) for x in (q, k, v))
    grad_masks, grad_lam, grad_theta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (masks, lam, theta))
    masks, lam, theta = (x.to(workspace.dtype) for x in (masks, lam[..., None, None], theta[..., None, None]))
    for plane in workspace.planes:
        q_, k_, v_, grad_, masks_, lam_, theta_ = (x[plane].contiguous().flatten(0, 1) for x in (q, k, v, grad, masks, lam, theta))
        q_ = q_ * scale  # so that q kᵀ is S
        if random is not None:
            row_keys, column_keys = (keys[(slice(None), *plane)].flatten(1, 2) for keys in random.unbind(1))  # (2, g, N)
        sum_k, sum_v = torch.zeros(2, *k_.shape, dtype=workspace.dtype, device=q.device)  # (g, N, Dh)
        sum_masks, sum_lam, sum_theta = torch.zeros_like(masks_), 0, 0  # (g, N), (g,), (g,)
        for rows in workspace.row_blocks:
            q_rows, grad_rows, masks_rows = q_[:, rows], grad_[:, rows], masks_[:, rows]
            scores, gate, weights, slope, *keep = workspace(*q_rows.shape[:2], N)
            workspace.product(q_rows, k_.mT, out=scores)  # S
            _gate(masks_rows, masks_, lam_, theta_, out=gate)  # Γ
            torch.softmax(torch.mul(scores, gate, out=slope), dim=-1, out=weights)  # A = softmax(S ⊙ Γ)

            if random is None:
                _accumulate(sum_v, workspace.operand(weights).mT, grad_rows)  # (g, N, r) x (g, r, Dh) -> (g, N, Dh)
                workspace.product(grad_rows, v_.mT, out=slope)  # ∂A (g, r, Dh) x (g, Dh, N) -> (g, r, N)
            else:
                _keep_mask(row_keys[..., rows], column_keys, dropout_p, out=keep[0])
                workspace.product(grad_rows, v_.mT, out=slope).mul_(keep[0])
                _accumulate(sum_v, workspace.operand(keep[0].mul_(weights)).mT, grad_rows)
            slope.mul_(weights).sub_(weights.mul_(slope.sum(dim=-1, keepdim=True)))  # ∂(S ⊙ Γ) = A ∂A − A Σ_j A ∂A
            grad_scores = workspace.operand(torch.mul(slope, gate, out=weights))  # ∂S
            grad_rows_q = torch.bmm(grad_scores, k_)  # (g, r, N) x (g, N, Dh) -> (g, r, Dh)
            grad_q[plane][:, :, rows] = grad_rows_q.mul_(scale).view_as(grad_q[plane][:, :, rows])
            _accumulate(sum_k, grad_scores.mT, q_rows)  # (g, N, r) x (g, r, Dh) -> (g, N, Dh)

            slope.mul_(scores).mul_(gate).mul_(gate.neg_().add_(1))  # ∂Γ Γ (1 − Γ): the gradient of λ (M_i M_j − θ)
            sum_masks[:, rows] += torch.bmm(slope, masks_[..., None]).squeeze(-1)  # Σ_j · M_j: (g, r, N) x (g, N, 1) -> (g, r)
            sum_masks += torch.bmm(masks_rows[:, None], slope).squeeze(1)  # Σ_i M_i ·: (g, 1, r) x (g, r, N) -> (g, N)
            sum_theta = sum_theta + slope.sum(dim=(1, 2))
            # Not from the sums above, Σ M_i · − θ Σ: with a large λ, only pairs with M_i M_j ≈ θ count and these cancel.
            differences = torch.mul(masks_rows[..., None], masks_[:, None], out=scores).sub_(theta_)  # M_i M_j − θ
            sum_lam = sum_lam + differences.mul_(slope).sum(dim=(1, 2))
        lam_ = lam_.flatten()
        for total, part in (
            (grad_k, sum_k),
            (grad_v, sum_v),
            (grad_masks, lam_[:, None] * sum_masks),
            (grad_lam, sum_lam),
            (grad_theta, -lam_ * sum_theta),
        ):
            total[plane] = part.view(total[plane].shape)
    return grad_q, grad_k, grad_v, grad_masks, grad_lam, grad_theta


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (g, N, Dh) += a (g, N, r) b (g, r, Dh), summed in the dtype of total."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


# ---------------------------------------------------------------------------------------------------------------------
# triton: the CUDA device's path
#
# The scheme is FlashAttention-2's (Dao, arXiv 2307.08691): a program takes a block of queries of one head, walks over the
# keys with a running softmax, and notes log2 of each row's denominator (lse); the backward computes the weights again from
# it. What is new is the gate, and the gradient that flows through it to M, λ and θ. Scores are in base 2 for exp2.


def _jit(function):
    return triton.jit(function) if triton is not None else function


@_jit
def _load_rows(base, rows, columns, stride, N, DH: tl.constexpr):
    """Rows (tokens) of a (N, Dh) matrix, zero outside of it."""
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=(rows[:, None] < N) & (columns[None, :] < DH), other=0.0)


@_jit
def _store_rows(base, rows, columns, stride, N, x, DH: tl.constexpr):
    """The twin of _load_rows, in the dtype of the matrix."""
    inside = (rows[:, None] < N) & (columns[None, :] < DH)
    tl.store(base + rows[:, None].to(tl.int64) * stride + columns[None, :], x.to(base.dtype.element_ty), mask=inside)


@_jit
def _place(H, N, BLOCK: tl.constexpr):
    """What this program works on: the head (of B·H), its sample and its number there, the first token of the block."""
    blocks = tl.cdiv(N, BLOCK)
    head = tl.program_id(0) // blocks
    return head, (head // H).to(tl.int64), (head % H).to(tl.int64), tl.program_id(0) % blocks * BLOCK


@_jit
def _scores_and_gate(q, k, row_masks, column_masks, lam, theta, scale, PRECISION: tl.constexpr):
    """S = scale · q kᵀ, Γ = σ(λ (M_i M_j − θ)) and M_i M_j − θ of a block, (BLOCK_M, BLOCK_N) float32."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    differences = row_masks[:, None] * column_masks[None, :] - theta
    return scores, tl.sigmoid(lam * differences), differences


@_jit
def _keep_block(seed, head, rows, first_column, N, dropout_p, BLOCK_N: tl.constexpr):
    """Which weights of a block stay: Philox of (head, row, column), so every kernel draws the same. One call gives four columns."""
    groups = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    counter = (rows[:, None] * tl.cdiv(N, 4) + groups[None, :]).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + head, zero, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (rows.shape[0], BLOCK_N))  # a b c d, a b c d, ...
    return tl.uint_to_uniform_float(bits) >= dropout_p


@_jit
def _forward_kernel(
    Q, K, V, M, LAM, THETA, SEED, OUT, LSE,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    H, N, scale, dropout_p,
    DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: OUT and LSE of it."""
    head, b, h, first_row = _place(H, N, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_D)
    lam, theta = tl.load(LAM + head), tl.load(THETA + head)
    M += head.to(tl.int64) * N
    row_masks = tl.load(M + rows, mask=rows < N, other=0.0)
    q = _load_rows(Q + b * q_b + h * q_h, rows, inner, q_n, N, DH)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        column_masks = tl.load(M + columns, mask=columns < N, other=0.0)
        k = _load_rows(K + b * k_b + h * k_h, columns, inner, k_n, N, DH)
        scores, gate, _ = _scores_and_gate(q, k, row_masks, column_masks, lam, theta, scale, PRECISION)
        gated = tl.where(columns[None, :] < N, scores * gate * LOG2_E, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(gated, 1))
        weights = tl.exp2(gated - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        denominator = denominator * shrink + tl.sum(weights, 1)
        largest = new_largest
        if DROPOUT:
            weights = tl.where(_keep_block(tl.load(SEED), head, rows, first, N, dropout_p, BLOCK_N), weights, 0.0)
        v = _load_rows(V + b * v_b + h * v_h, columns, inner, v_n, N, DH)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)

    out = total / (denominator * (1 - dropout_p))[:, None]
    _store_rows(OUT + b * o_b + h * o_h, rows, inner, o_n, N, out, DH)
    tl.store(LSE + head.to(tl.int64) * N + rows, largest + tl.log2(denominator), mask=rows < N)


@_jit
def _block_gradients(
    q, k, v, grad, row_masks, column_masks, lse, delta, rows, columns, seed, head, lam, theta, scale, dropout_p, first_column, N,
    BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block, (BLOCK_M, BLOCK_N) float32: the weights after dropout, ∂S, the gradient of λ (M_i M_j − θ), and M_i M_j − θ."""
    scores, gate, differences = _scores_and_gate(q, k, row_masks, column_masks, lam, theta, scale, PRECISION)
    inside = (rows[:, None] < N) & (columns[None, :] < N)
    weights = tl.where(inside, tl.exp2(scores * gate * LOG2_E - lse[:, None]), 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    dropped = weights
    if DROPOUT:
        keep = tl.where(_keep_block(seed, head, rows, first_column, N, dropout_p, BLOCK_N), 1 / (1 - dropout_p), 0.0)
        grad_weights *= keep
        dropped *= keep
    grad_gated = weights * (grad_weights - delta[:, None])
    grad_scores = grad_gated * gate
    return dropped, grad_scores, grad_scores * scores * (1 - gate), differences


@_jit
def _backward_rows_kernel(
    Q, K, V, M, LAM, THETA, SEED, OUT, GRAD, LSE, DELTA, GRAD_Q, GRAD_M, PART_LAM, PART_THETA,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, g_b, g_h, g_n, dq_b, dq_h, dq_n,
    H, N, scale, dropout_p,
    DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: GRAD_Q, DELTA = Σ_j A ∂A, what its rows give to GRAD_M, and its part of λ's and θ's gradients."""
    head, b, h, first_row = _place(H, N, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_D)
    lam, theta = tl.load(LAM + head), tl.load(THETA + head)
    first_of_head = head.to(tl.int64) * N
    row_masks = tl.load(M + first_of_head + rows, mask=rows < N, other=0.0)
    q = _load_rows(Q + b * q_b + h * q_h, rows, inner, q_n, N, DH)
    grad = _load_rows(GRAD + b * g_b + h * g_h, rows, inner, g_n, N, DH)
    out = _load_rows(OUT + b * o_b + h * o_h, rows, inner, o_n, N, DH)
    lse = tl.load(LSE + first_of_head + rows, mask=rows < N, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + first_of_head + rows, delta, mask=rows < N)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)

    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_pairs = tl.zeros((BLOCK_M,), tl.float32)  # Σ_j ∂(λ (M_i M_j − θ)) M_j
    grad_lam = tl.zeros((BLOCK_M,), tl.float32)  # Σ_j ∂(λ (M_i M_j − θ)) (M_i M_j − θ)
    grad_theta = tl.zeros((BLOCK_M,), tl.float32)  # Σ_j ∂(λ (M_i M_j − θ))
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        column_masks = tl.load(M + first_of_head + columns, mask=columns < N, other=0.0)
        k = _load_rows(K + b * k_b + h * k_h, columns, inner, k_n, N, DH)
        v = _load_rows(V + b * v_b + h * v_h, columns, inner, v_n, N, DH)
        _, grad_scores, slope, differences = _block_gradients(
            q, k, v, grad, row_masks, column_masks, lse, delta, rows, columns, seed, head, lam, theta, scale, dropout_p, first, N,
            BLOCK_N, DROPOUT, PRECISION,
        )  # fmt: skip
        grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        grad_pairs += tl.sum(slope * column_masks[None, :], 1)
        grad_lam += tl.sum(slope * differences, 1)
        grad_theta += tl.sum(slope, 1)

    _store_rows(GRAD_Q + b * dq_b + h * dq_h, rows, inner, dq_n, N, grad_q * scale, DH)
    tl.store(GRAD_M + first_of_head + rows, lam * grad_pairs, mask=rows < N)
    tl.store(PART_LAM + tl.program_id(0), tl.sum(grad_lam, 0))
    tl.store(PART_THETA + tl.program_id(0), -lam * tl.sum(grad_theta, 0))


@_jit
def _backward_columns_kernel(
    Q, K, V, M, LAM, THETA, SEED, GRAD, LSE, DELTA, GRAD_K, GRAD_V, GRAD_M,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, scale, dropout_p,
    DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys of one head: GRAD_K, GRAD_V, and what its columns add to GRAD_M, after _backward_rows_kernel."""
    head, b, h, first_column = _place(H, N, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_D)
    lam, theta = tl.load(LAM + head), tl.load(THETA + head)
    first_of_head = head.to(tl.int64) * N
    column_masks = tl.load(M + first_of_head + columns, mask=columns < N, other=0.0)
    k = _load_rows(K + b * k_b + h * k_h, columns, inner, k_n, N, DH)
    v = _load_rows(V + b * v_b + h * v_h, columns, inner, v_n, N, DH)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)

    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_pairs = tl.zeros((BLOCK_N,), tl.float32)  # Σ_i ∂(λ (M_i M_j − θ)) M_i
    for first in range(0, N, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        row_masks = tl.load(M + first_of_head + rows, mask=rows < N, other=0.0)
        q = _load_rows(Q + b * q_b + h * q_h, rows, inner, q_n, N, DH)
        grad = _load_rows(GRAD + b * g_b + h * g_h, rows, inner, g_n, N, DH)
        lse = tl.load(LSE + first_of_head + rows, mask=rows < N, other=0.0)
        delta = tl.load(DELTA + first_of_head + rows, mask=rows < N, other=0.0)
        dropped, grad_scores, slope, _ = _block_gradients(
            q, k, v, grad, row_masks, column_masks, lse, delta, rows, columns, seed, head, lam, theta, scale, dropout_p, first_column, N,
            BLOCK_N, DROPOUT, PRECISION,
        )  # fmt: skip
        grad_v += tl.dot(tl.trans(dropped.to(grad.dtype)), grad, input_precision=PRECISION)
        grad_k += tl.dot(tl.trans(grad_scores.to(q.dtype)), q, input_precision=PRECISION)
        grad_pairs += tl.sum(slope * row_masks[:, None], 0)

    _store_rows(GRAD_K + b * dk_b + h * dk_h, columns, inner, dk_n, N, grad_k * scale, DH)
    _store_rows(GRAD_V + b * dv_b + h * dv_h, columns, inner, dv_n, N, grad_v, DH)
    of_rows = tl.load(GRAD_M + first_of_head + columns, mask=columns < N, other=0.0)
    tl.store(GRAD_M + first_of_head + columns, of_rows + lam * grad_pairs, mask=columns < N)


def _launch(q: Tensor, on_device: bool = True) -> tuple[dict, dict]:
    """The arguments that all kernels share, and how to launch them, for q (B, H, N, Dh)."""
    _, H, N, Dh = q.shape
    if triton is None:
        raise RuntimeError("the triton path needs the package triton, which PyTorch brings on Linux")
    if on_device and not q.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError("the triton path takes CUDA tensors; for a CPU set TRITON_INTERPRET=1 before Python starts")
    if Dh > MAX_KERNEL_HEAD_DIM or q.dtype == torch.float64:
        raise RuntimeError(f"the triton path takes float32, bfloat16 and float16, and heads up to {MAX_KERNEL_HEAD_DIM} wide; this is {q.dtype}, {Dh} wide")
    shared = dict(H=H, N=N, scale=Dh**-0.5, DH=Dh, BLOCK_D=max(16, triton.next_power_of_2(Dh)))
    # Compiled for compute capability 9.0 and heads 64 wide, blocks of these sizes keep all in registers. Not tuned on a device.
    if q.dtype == torch.float32:
        precision = "ieee" if torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"
        return shared | dict(BLOCK_M=32, BLOCK_N=32, PRECISION=precision), dict(num_warps=8, num_stages=1)
    return shared | dict(BLOCK_M=64, BLOCK_N=32, PRECISION="ieee"), dict(num_warps=4, num_stages=2)


def _for_kernels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _on_device(q: Tensor):
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


def _triton_forward(q, k, v, masks, lam, theta, random, dropout_p):
    shared, how = _launch(q)
    q, k, v = (_for_kernels(x) for x in (q, k, v))
    masks, lam, theta = (x.float().contiguous() for x in (masks, lam, theta))
    out, lse = _empty_token_major(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    grid = (q.shape[0] * q.shape[1] * triton.cdiv(shared["N"], shared["BLOCK_M"]),)  # one axis: the others end at 65,535
    with _on_device(q):
        _forward_kernel[grid](q, k, v, masks, lam, theta, random, out, lse, *strides, dropout_p=dropout_p, DROPOUT=random is not None, **shared, **how)
    return out, lse


def _triton_backward(grad, out, lse, q, k, v, masks, lam, theta, random, dropout_p):
    shared, how = _launch(q)
    q, k, v, grad = (_for_kernels(x) for x in (q, k, v, grad))
    masks32, lam32, theta32 = (x.float().contiguous() for x in (masks, lam, theta))
    grad_q, grad_k, grad_v = (_empty_token_major(x) for x in (q, k, v))
    delta, grad_masks = (torch.empty(masks.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    row_blocks, column_blocks = (triton.cdiv(shared["N"], shared[block]) for block in ("BLOCK_M", "BLOCK_N"))
    part_lam, part_theta = torch.empty(2, *lam.shape, row_blocks, dtype=torch.float32, device=q.device)  # no atomics: always the same sum

    def strides(*tensors):
        return [s for x in tensors for s in x.stride()[:3]]

    heads, last = q.shape[0] * q.shape[1], dict(dropout_p=dropout_p, DROPOUT=random is not None, **shared, **how)
    with _on_device(q):
        _backward_rows_kernel[(heads * row_blocks,)](
            q, k, v, masks32, lam32, theta32, random, out, grad, lse, delta, grad_q, grad_masks, part_lam, part_theta,
            *strides(q, k, v, out, grad, grad_q), **last,
        )  # fmt: skip
        _backward_columns_kernel[(heads * column_blocks,)](
            q, k, v, masks32, lam32, theta32, random, grad, lse, delta, grad_k, grad_v, grad_masks,
            *strides(q, k, v, grad, grad_k, grad_v), **last,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_masks.to(masks.dtype), part_lam.sum(-1).to(lam.dtype), part_theta.sum(-1).to(theta.dtype)

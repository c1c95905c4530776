"""The CUDA device's path: Triton kernels, one forward and two backward, that keep the N x N plane on the chip.

The scheme is FlashAttention-2's (Dao, arXiv 2307.08691): a program takes a block of queries of one head, walks over the
keys with a running softmax, and notes log2 of each row's denominator (lse); the backward computes the weights again
from it. What is new is the gate, and the gradient that flows through it to M, λ and θ. Scores are in base 2 for exp2.
"""

from __future__ import annotations  # Triton's annotations are read as text where there is no Triton

from contextlib import nullcontext

import torch
from torch import Tensor

from attention.layout import empty_token_major

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings it on Linux only
    triton = None

MAX_KERNEL_HEAD_DIM = 128  # wider heads spill the kernels' registers
LOG2_E = tl.constexpr(1.4426950408889634) if triton is not None else None  # a kernel reads no other kind of global

# BLOCK_M, BLOCK_N, warps and stages of each kernel: the fastest of 16 to 33 that were timed on an H100, with heads 64
# wide and 197 tokens. By the products' precision: half, or single in TF32 or not
FORWARD, ROWS, COLUMNS = "forward", "rows", "columns"
SIZES = {
    "half": {FORWARD: (64, 32, 4, 3), ROWS: (64, 32, 4, 2), COLUMNS: (32, 64, 4, 2)},
    "tf32": dict.fromkeys((FORWARD, ROWS, COLUMNS), (64, 32, 4, 2)),
    "ieee": dict.fromkeys((FORWARD, ROWS, COLUMNS), (32, 32, 4, 2)),
}


def takes(q: Tensor) -> bool:
    """Whether the kernels can compute attention for this q (B, H, N, Dh)."""
    return triton is not None and q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= MAX_KERNEL_HEAD_DIM


def _jit(function):
    return triton.jit(function) if triton is not None else function


# ---------------------------------------------------------------------------------------------------- pieces of kernels


@_jit
def _load_rows(base, rows, columns, stride, N, DH: tl.constexpr):
    """Rows (tokens) of a (N, Dh) matrix, zero outside of it."""
    return tl.load(
        base + rows[:, None].to(tl.int64) * stride + columns[None, :],
        mask=(rows[:, None] < N) & (columns[None, :] < DH),
        other=0.0,
    )


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
def _gate_of(LAM, THETA, head, N):
    """Of this head (of B·H): λ, θ, and where its N entries begin in M, LSE and their like."""
    return tl.load(LAM + head), tl.load(THETA + head), head.to(tl.int64) * N


@_jit
def _load_vector(base, tokens, N):
    """The entries of these tokens in a vector of N, zero outside of it."""
    return tl.load(base + tokens, mask=tokens < N, other=0.0)


@_jit
def _scores_and_gate(q, k, row_masks, column_masks, lam, theta, scale, PRECISION: tl.constexpr):
    """S = scale · q kᵀ, Γ = σ(λ (M_i M_j − θ)) and M_i M_j − θ of a block, (BLOCK_M, BLOCK_N) float32."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    differences = row_masks[:, None] * column_masks[None, :] - theta
    return scores, tl.sigmoid(lam * differences), differences


@_jit
def _keep_block(seed, head, rows, first_column, N, dropout_p, BLOCK_N: tl.constexpr):
    """Which weights of a block stay: Philox of (head, row, column), so every kernel draws the same. One call gives four
    columns.
    """
    groups = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    counter = (rows[:, None] * tl.cdiv(N, 4) + groups[None, :]).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + head, zero, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (rows.shape[0], BLOCK_N))  # a b c d, a b c d, ...
    return tl.uint_to_uniform_float(bits) >= dropout_p


# -------------------------------------------------------------------------------------------------------------- forward


@_jit
def _forward_kernel(
    Q, K, V, M, LAM, THETA, SEED, OUT, LSE,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    H, N, scale, dropout_p, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: OUT and LSE of it."""
    head, b, h, first_row = _place(H, N, BLOCK_M)
    lam, theta, at = _gate_of(LAM, THETA, head, N)
    rows, inner = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row_masks = _load_vector(M + at, rows, N)
    q = _load_rows(Q + b * q_b + h * q_h, rows, inner, q_n, N, DH)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        column_masks = _load_vector(M + at, columns, N)
        k = _load_rows(K + b * k_b + h * k_h, columns, inner, k_n, N, DH)
        scores, gate, _ = _scores_and_gate(q, k, row_masks, column_masks, lam, theta, scale, PRECISION)
        gated = tl.where(columns[None, :] < N, scores * gate * LOG2_E, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(gated, 1))
        weights = tl.exp2(gated - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        denominator = denominator * shrink + tl.sum(weights, 1)
        largest = new_largest
        if DROPOUT:
            kept = _keep_block(tl.load(SEED), head, rows, first, N, dropout_p, BLOCK_N)
            weights = tl.where(kept, weights, 0.0)
        v = _load_rows(V + b * v_b + h * v_h, columns, inner, v_n, N, DH)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)

    out = total / (denominator * (1 - dropout_p))[:, None]
    _store_rows(OUT + b * o_b + h * o_h, rows, inner, o_n, N, out, DH)
    tl.store(LSE + at + rows, largest + tl.log2(denominator), mask=rows < N)


# ------------------------------------------------------------------------------------------------------------- backward


@_jit
def _load_queries(q, grad, masks, lse, rows, inner, q_n, g_n, N, DH: tl.constexpr):
    """Of a block of queries of one head: q, the gradient of their output, their masks, log2 of their denominators."""
    q_rows = _load_rows(q, rows, inner, q_n, N, DH)
    grad_rows = _load_rows(grad, rows, inner, g_n, N, DH)
    return q_rows, grad_rows, _load_vector(masks, rows, N), _load_vector(lse, rows, N)


@_jit
def _load_keys(k, v, masks, columns, inner, k_n, v_n, N, DH: tl.constexpr):
    """Of a block of keys of one head: k, v and their masks."""
    k_rows = _load_rows(k, columns, inner, k_n, N, DH)
    v_rows = _load_rows(v, columns, inner, v_n, N, DH)
    return k_rows, v_rows, _load_vector(masks, columns, N)


@_jit
def _load_seed(SEED, DROPOUT: tl.constexpr):
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    return seed


@_jit
def _block_gradients(
    q, k, v, grad, row_masks, column_masks, lse, delta, rows, columns, seed, head, lam, theta, scale, dropout_p,
    first_column, N, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block, (BLOCK_M, BLOCK_N) float32: dropped weights, ∂S, the gradient of λ (M_i M_j − θ), M_i M_j − θ."""
    scores, gate, differences = _scores_and_gate(q, k, row_masks, column_masks, lam, theta, scale, PRECISION)
    inside = (rows[:, None] < N) & (columns[None, :] < N)
    weights = tl.where(inside, tl.exp2(scores * gate * LOG2_E - lse[:, None]), 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    dropped = weights
    if DROPOUT:
        kept = _keep_block(seed, head, rows, first_column, N, dropout_p, BLOCK_N)
        keep = tl.where(kept, 1 / (1 - dropout_p), 0.0)
        grad_weights *= keep
        dropped *= keep
    grad_gated = weights * (grad_weights - delta[:, None])
    grad_scores = grad_gated * gate
    return dropped, grad_scores, grad_scores * scores * (1 - gate), differences


@_jit
def _backward_rows_kernel(
    Q, K, V, M, LAM, THETA, SEED, OUT, GRAD, LSE, DELTA, GRAD_Q, GRAD_M, PART_LAM, PART_THETA,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, g_b, g_h, g_n, dq_b, dq_h, dq_n,
    H, N, scale, dropout_p, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries: GRAD_Q, DELTA = Σ_j A ∂A, what its rows give to GRAD_M, its part of λ's and θ's gradients."""
    head, b, h, first_row = _place(H, N, BLOCK_M)
    lam, theta, at = _gate_of(LAM, THETA, head, N)
    seed = _load_seed(SEED, DROPOUT)
    rows, inner = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q, grad, row_masks, lse = _load_queries(
        Q + b * q_b + h * q_h, GRAD + b * g_b + h * g_h, M + at, LSE + at, rows, inner, q_n, g_n, N, DH
    )
    out = _load_rows(OUT + b * o_b + h * o_h, rows, inner, o_n, N, DH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + at + rows, delta, mask=rows < N)

    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_pairs = tl.zeros((BLOCK_M,), tl.float32)  # Σ_j ∂(λ (M_i M_j − θ)) M_j
    grad_lam = tl.zeros((BLOCK_M,), tl.float32)  # Σ_j ∂(λ (M_i M_j − θ)) (M_i M_j − θ)
    grad_theta = tl.zeros((BLOCK_M,), tl.float32)  # Σ_j ∂(λ (M_i M_j − θ))
    for first in range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        k, v, column_masks = _load_keys(
            K + b * k_b + h * k_h, V + b * v_b + h * v_h, M + at, columns, inner, k_n, v_n, N, DH
        )
        _, grad_scores, slope, differences = _block_gradients(
            q, k, v, grad, row_masks, column_masks, lse, delta, rows, columns, seed, head, lam, theta, scale, dropout_p,
            first, N, BLOCK_N, DROPOUT, PRECISION,
        )  # fmt: skip
        grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        grad_pairs += tl.sum(slope * column_masks[None, :], 1)
        grad_lam += tl.sum(slope * differences, 1)
        grad_theta += tl.sum(slope, 1)

    _store_rows(GRAD_Q + b * dq_b + h * dq_h, rows, inner, dq_n, N, grad_q * scale, DH)
    tl.store(GRAD_M + at + rows, lam * grad_pairs, mask=rows < N)
    tl.store(PART_LAM + tl.program_id(0), tl.sum(grad_lam, 0))
    tl.store(PART_THETA + tl.program_id(0), -lam * tl.sum(grad_theta, 0))


@_jit
def _backward_columns_kernel(
    Q, K, V, M, LAM, THETA, SEED, GRAD, LSE, DELTA, GRAD_K, GRAD_V, GRAD_M,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, N, scale, dropout_p, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys: GRAD_K, GRAD_V, and what its columns add to GRAD_M, after _backward_rows_kernel."""
    head, b, h, first_column = _place(H, N, BLOCK_N)
    lam, theta, at = _gate_of(LAM, THETA, head, N)
    seed = _load_seed(SEED, DROPOUT)
    columns, inner = first_column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k, v, column_masks = _load_keys(
        K + b * k_b + h * k_h, V + b * v_b + h * v_h, M + at, columns, inner, k_n, v_n, N, DH
    )

    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_pairs = tl.zeros((BLOCK_N,), tl.float32)  # Σ_i ∂(λ (M_i M_j − θ)) M_i
    for first in range(0, N, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q, grad, row_masks, lse = _load_queries(
            Q + b * q_b + h * q_h, GRAD + b * g_b + h * g_h, M + at, LSE + at, rows, inner, q_n, g_n, N, DH
        )
        delta = _load_vector(DELTA + at, rows, N)
        dropped, grad_scores, slope, _ = _block_gradients(
            q, k, v, grad, row_masks, column_masks, lse, delta, rows, columns, seed, head, lam, theta, scale, dropout_p,
            first_column, N, BLOCK_N, DROPOUT, PRECISION,
        )  # fmt: skip
        grad_v += tl.dot(tl.trans(dropped.to(grad.dtype)), grad, input_precision=PRECISION)
        grad_k += tl.dot(tl.trans(grad_scores.to(q.dtype)), q, input_precision=PRECISION)
        grad_pairs += tl.sum(slope * row_masks[:, None], 0)

    _store_rows(GRAD_K + b * dk_b + h * dk_h, columns, inner, dk_n, N, grad_k * scale, DH)
    _store_rows(GRAD_V + b * dv_b + h * dv_h, columns, inner, dv_n, N, grad_v, DH)
    of_rows = _load_vector(GRAD_M + at, columns, N)
    tl.store(GRAD_M + at + columns, of_rows + lam * grad_pairs, mask=columns < N)


# --------------------------------------------------------------------------------------------------------------- launch


def _launch(q: Tensor, *kernels: str, on_device: bool = True) -> list[dict]:
    """What each of these kernels is launched with for q (B, H, N, Dh), beside tensors, strides and dropout."""
    _, H, N, Dh = q.shape
    if triton is None:
        raise RuntimeError("the triton path needs the package triton, which PyTorch brings on Linux")
    if Dh > MAX_KERNEL_HEAD_DIM or q.dtype == torch.float64:
        raise RuntimeError(
            f"the triton path takes float32, bfloat16 and float16, and heads up to {MAX_KERNEL_HEAD_DIM} wide; this is"
            f" {q.dtype}, {Dh} wide"
        )
    if on_device and not q.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError("the triton path takes CUDA tensors; for a CPU set TRITON_INTERPRET=1 before Python starts")
    kind = "half"
    if q.dtype == torch.float32:
        kind = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    precision = "tf32" if kind == "tf32" else "ieee"
    if kind == "tf32" and Dh > 64:
        kind = "ieee"  # the larger blocks would want more than the 100 KB of shared memory that many GPUs have
    shared = dict(H=H, N=N, scale=Dh**-0.5, DH=Dh, BLOCK_D=max(16, triton.next_power_of_2(Dh)), PRECISION=precision)
    return [
        shared | dict(BLOCK_M=rows, BLOCK_N=columns, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in (SIZES[kind][kernel] for kernel in kernels)
    ]


def _for_kernels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _on_device(q: Tensor):
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def forward(q, k, v, masks, lam, theta, random, dropout_p):
    [how] = _launch(q, FORWARD)
    q, k, v = (_for_kernels(x) for x in (q, k, v))
    masks, lam, theta = (x.float().contiguous() for x in (masks, lam, theta))
    out, lse = empty_token_major(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    blocks = q.shape[0] * q.shape[1] * triton.cdiv(how["N"], how["BLOCK_M"])
    with _on_device(q):
        _forward_kernel[(blocks,)](  # one axis: the others end at 65,535
            q, k, v, masks, lam, theta, random, out, lse,
            *_strides(q, k, v, out), dropout_p=dropout_p, DROPOUT=random is not None, **how,
        )  # fmt: skip
    return out, lse


def backward(grad, out, lse, q, k, v, masks, lam, theta, random, dropout_p):
    of_rows, of_columns = _launch(q, ROWS, COLUMNS)
    q, k, v, grad = (_for_kernels(x) for x in (q, k, v, grad))
    masks32, lam32, theta32 = (x.float().contiguous() for x in (masks, lam, theta))
    grad_q, grad_k, grad_v = (empty_token_major(x) for x in (q, k, v))
    delta, grad_masks = (torch.empty(masks.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    heads, N = q.shape[0] * q.shape[1], q.shape[2]
    row_blocks, column_blocks = triton.cdiv(N, of_rows["BLOCK_M"]), triton.cdiv(N, of_columns["BLOCK_N"])
    part_lam, part_theta = torch.empty(
        2, *lam.shape, row_blocks, dtype=torch.float32, device=q.device
    )  # no atomics: always the same sum
    drop = dict(dropout_p=dropout_p, DROPOUT=random is not None)
    with _on_device(q):
        _backward_rows_kernel[(heads * row_blocks,)](
            q, k, v, masks32, lam32, theta32, random, out, grad, lse, delta, grad_q, grad_masks, part_lam, part_theta,
            *_strides(q, k, v, out, grad, grad_q), **drop, **of_rows,
        )  # fmt: skip
        _backward_columns_kernel[(heads * column_blocks,)](
            q, k, v, masks32, lam32, theta32, random, grad, lse, delta, grad_k, grad_v, grad_masks,
            *_strides(q, k, v, grad, grad_k, grad_v), **drop, **of_columns,
        )  # fmt: skip
    return (
        grad_q,
        grad_k,
        grad_v,
        grad_masks.to(masks.dtype),
        part_lam.sum(-1).to(lam.dtype),
        part_theta.sum(-1).to(theta.dtype),
    )

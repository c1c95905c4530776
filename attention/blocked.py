"""The CPU's path: PyTorch operations on pieces of the N x N plane that fit the cache.

forward and backward have the signatures of kernels.py. Nothing of N x N is kept between them.
"""

import math

import torch
from torch import Tensor

from attention.dropout import keep_mask
from attention.layout import CACHE_ELEMENTS, empty_token_major


def _pieces(B: int, H: int, N: int, buffers: int) -> tuple[list[tuple[slice, slice]], list[slice], int]:
    """How to cut (B, H, N, N) so that `buffers` of a piece fit the cache: [(samples, heads)], each with all of [rows];
    elements of a buffer.
    """
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

    Gate and softmax want float32 (or float64), matrix products the dtype of q: where they differ, `product` and
    `operand` convert between them in the cache. In float32 they cost nothing.
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
    """Γ = σ(λ (M_i M_j − θ)): (g, r), (g, N), (g, 1, 1), (g, 1, 1) -> out (g, r, N).

    In the formula's order, so that a huge λ rounds alike.
    """
    return torch.mul(row_masks[..., None], masks[:, None], out=out).sub_(theta).mul_(lam).sigmoid_()


def forward(q, k, v, masks, lam, theta, random, dropout_p):
    """-> the output (B, H, N, Dh), and nothing (0,) for the backward. random: keys (2, 2, B, H, N), or None."""
    out = empty_token_major(q)
    workspace = _Workspace(q, buffers=2)
    masks, lam, theta = (x.to(workspace.dtype) for x in (masks, lam[..., None, None], theta[..., None, None]))
    for plane in workspace.planes:
        # (B, H, ...) -> (g, ...)
        q_, k_, v_, masks_, lam_, theta_ = (x[plane].contiguous().flatten(0, 1) for x in (q, k, v, masks, lam, theta))
        q_ = q_ * q.shape[-1] ** -0.5  # so that q kᵀ is S
        if random is not None:
            # (2, g, N)
            row_keys, column_keys = (keys[(slice(None), *plane)].flatten(1, 2) for keys in random.unbind(1))
        for rows in workspace.row_blocks:
            q_rows = q_[:, rows]
            scores, weights = workspace(*q_rows.shape[:2], q.shape[2])
            workspace.product(q_rows, k_.mT, out=scores)  # (g, r, Dh) x (g, Dh, N) -> (g, r, N)
            scores.mul_(_gate(masks_[:, rows], masks_, lam_, theta_, out=weights))
            torch.softmax(scores, dim=-1, out=weights)
            if random is not None:
                weights.mul_(keep_mask(row_keys[..., rows], column_keys, dropout_p, out=scores))
            heads = torch.bmm(workspace.operand(weights), v_)  # (g, r, N) x (g, N, Dh) -> (g, r, Dh)
            out[plane][:, :, rows] = heads.view_as(out[plane][:, :, rows])
    return out, q.new_empty(0, dtype=torch.float32)


def backward(grad, out, lse, q, k, v, masks, lam, theta, random, dropout_p):
    """-> the gradients of q, k, v, masks, lam and theta. out and lse are for the kernels alone."""
    N, scale = q.shape[2], q.shape[-1] ** -0.5
    workspace = _Workspace(q, buffers=4 if random is None else 5)
    grad_q, grad_k, grad_v = (empty_token_major(x) for x in (q, k, v))
    grad_masks, grad_lam, grad_theta = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (masks, lam, theta)
    )
    masks, lam, theta = (x.to(workspace.dtype) for x in (masks, lam[..., None, None], theta[..., None, None]))
    for plane in workspace.planes:
        q_, k_, v_, grad_, masks_, lam_, theta_ = (
            x[plane].contiguous().flatten(0, 1) for x in (q, k, v, grad, masks, lam, theta)
        )
        q_ = q_ * scale  # so that q kᵀ is S
        if random is not None:
            # (2, g, N)
            row_keys, column_keys = (keys[(slice(None), *plane)].flatten(1, 2) for keys in random.unbind(1))
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
                keep_mask(row_keys[..., rows], column_keys, dropout_p, out=keep[0])
                workspace.product(grad_rows, v_.mT, out=slope).mul_(keep[0])
                _accumulate(sum_v, workspace.operand(keep[0].mul_(weights)).mT, grad_rows)
            slope.mul_(weights).sub_(weights.mul_(slope.sum(dim=-1, keepdim=True)))  # ∂(S ⊙ Γ) = A ∂A − A Σ_j A ∂A
            grad_scores = workspace.operand(torch.mul(slope, gate, out=weights))  # ∂S
            grad_rows_q = torch.bmm(grad_scores, k_)  # (g, r, N) x (g, N, Dh) -> (g, r, Dh)
            grad_q[plane][:, :, rows] = grad_rows_q.mul_(scale).view_as(grad_q[plane][:, :, rows])
            _accumulate(sum_k, grad_scores.mT, q_rows)  # (g, N, r) x (g, r, Dh) -> (g, N, Dh)

            slope.mul_(scores).mul_(gate).mul_(gate.neg_().add_(1))  # ∂Γ Γ (1 − Γ): the gradient of λ (M_i M_j − θ)
            # Σ_j · M_j: (g, r, N) x (g, N, 1) -> (g, r)
            sum_masks[:, rows] += torch.bmm(slope, masks_[..., None]).squeeze(-1)
            sum_masks += torch.bmm(masks_rows[:, None], slope).squeeze(1)  # Σ_i M_i ·: (g, 1, r) x (g, r, N) -> (g, N)
            sum_theta = sum_theta + slope.sum(dim=(1, 2))
            # Not from the sums above, Σ M_i · − θ Σ: with a large λ, only pairs with M_i M_j ≈ θ count and these cancel
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

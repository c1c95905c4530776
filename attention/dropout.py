"""Dropout on a CPU: bits that are a hash of row and column, instead of random numbers drawn one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.layout import CACHE_ELEMENTS


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p), several times as fast on a CPU and with nothing kept for the backward but a key for each row and
    column.

    x is (..., D), of any floating-point dtype. F.dropout draws its random numbers one after the other on a CPU; in a
    ViT-B that alone is a quarter of a training step in bfloat16.
    """
    if x.device.type != "cpu" or not 0 < p < 1 or x.numel() == 0 or x.ndim == 0:
        return F.dropout(x, p)
    return _dropout(x, random_keys(x.numel() // x.shape[-1]), random_keys(x.shape[-1]), p)


def random_keys(*size: int, device: torch.device | str = "cpu") -> Tensor:
    """Two random odd numbers for each row, or for each column, of a plane: (2, *size) int32."""
    return torch.randint(-(2**31), 2**31, (2, *size), dtype=torch.int32, device=device) | 1


def keep_mask(row_keys: Tensor, column_keys: Tensor, p: float, out: Tensor) -> Tensor:
    """Writes 0 with probability p and 1 / (1 − p) otherwise to each element of a plane, without drawing a random number
    for each.

    The bits of element (i, j) are ((a_i b_j) ⊕ c_i) d_j mod 2³², a hash of the keys of its row and its column. So they
    are the same in forward and backward and however the plane is cut into pieces, with no state to carry along.

    Args:
        row_keys, column_keys: (2, ..., r) and (2, ..., n) of random_keys.
        out: (..., r, n), float32 or float64.
    """
    (a, c), (b, d) = row_keys.unsqueeze(-1), column_keys.unsqueeze(-2)
    # (..., r, 1) * (..., 1, n) -> (..., r, n), all int32 alike but for the lowest bit
    bits = torch.mul(a, b).bitwise_xor_(c).mul_(d)
    return torch.ge(out.copy_(bits), p * 2.0**32 - 2.0**31, out=out).mul_(1 / (1 - p))


@torch.library.custom_op("lamm_vit::dropout", mutates_args=())
def _dropout(x: Tensor, row_keys: Tensor, column_keys: Tensor, p: float) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])  # (rows, D)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    step = max(1, CACHE_ELEMENTS // 4 * torch.get_num_threads() // x.shape[-1])
    keep = flat.new_empty(min(step, len(flat)), x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    for i in range(0, len(flat), step):
        piece = slice(i, min(i + step, len(flat)))
        mask = keep_mask(row_keys[:, piece], column_keys, p, out=keep[: piece.stop - i])
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

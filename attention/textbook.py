"""The formula of RG-MHA, written down: what the other two ways have to agree with, and what export.py exports."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def textbook_attention(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """The formula of region_gated_attention, written down. What the other two paths have to agree with."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, N, Dh) x (B, H, Dh, N) -> (B, H, N, N)
    pairs = masks.unsqueeze(-1) * masks.unsqueeze(-2)  # (B, H, N, 1) * (B, H, 1, N) -> (B, H, N, N)
    gate = torch.sigmoid(lam[..., None, None] * (pairs - theta[..., None, None]))  # (B, H, N, N)
    attention = F.dropout((scores * gate).softmax(dim=-1), dropout_p)  # (B, H, N, N)
    return attention.to(v.dtype) @ v  # (B, H, N, N) x (B, H, N, Dh) -> (B, H, N, Dh)

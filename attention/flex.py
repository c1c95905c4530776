"""The gate by PyTorch's FlexAttention: the well-kept library for a score that is changed before the softmax.

No dropout of attention weights, and on a CPU no backward. The gradients of the masks, λ and θ are summed by atomics, in
another order each time. So it is a row of benchmarks/model_speed.py, beside the kernels, and on a GPU where these fail
it takes their place before the formula does (attention/trial.py tries both).
"""

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


def flex_gated_attention(
    q: Tensor, k: Tensor, v: Tensor, masks: Tensor, lam: Tensor, theta: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """softmax(S ⊙ Γ) V; arguments and result as region_gated_attention's. dropout_p has to be 0.

    Raises:
        ValueError: dropout.
    """
    if dropout_p:
        raise ValueError("FlexAttention drops no attention weights; set dropout to 0")

    # In bfloat16, λ M M would be another number
    masks, lam, theta = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (masks, lam, theta))
    of_keys = masks.clone()  # the compiler refuses a second index into one tensor that needs a gradient

    def gate(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score * torch.sigmoid(lam[b, h] * (masks[b, h, i] * of_keys[b, h, j] - theta[b, h]))

    attend = _compiled() if q.is_cuda else flex_attention
    return attend(q, k, v, score_mod=gate)

"""How the operator's tensors lie in memory, and how much of them the cache holds."""

from torch import Tensor

# Elements that the buffers of a piece may hold together, per thread: 4 MiB in float32, a core's share of L2 and L3
CACHE_ELEMENTS = 2**20


def empty_token_major(x: Tensor) -> Tensor:
    """An empty (B, H, N, Dh) tensor that lies in memory as (B, N, H, Dh), as a linear layer wants and gives it."""
    B, H, N, Dh = x.shape
    return x.new_empty(B, N, H, Dh).transpose(1, 2)

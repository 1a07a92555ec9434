"""Where a token stands, in sines and cosines: half the channels say in which tensor, half where in it (RPG).

Shapes: L = num_tokens, M = d_model. The same sinusoids embed diffusion time in the denoisers.
"""

from typing import Literal

import torch
from torch import Tensor

from rpgcli.errors import UsageError

PositionKind = Literal["2d", "1d", "learned", "none"]


def sincos(position: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Sine and cosine, interleaved, at `dim / 2` geometric frequencies from 1 down to `base^(2/dim - 1)`.

    Args:
        position: (...) numbers, not necessarily whole.
        dim: Even.

    Returns:
        (..., dim) float32; computed in float64, where a long sequence keeps its phase.
    """
    assert dim % 2 == 0, "sines and cosines come in pairs"
    # fmt: off
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim)  # (dim/2)
    angle = position[..., None] * frequency                                                            # (..., dim/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).float()                         # (..., dim)
    # fmt: on


def position_embedding(kind: PositionKind, tensor_index: Tensor, token_index: Tensor, d_model: int) -> Tensor:
    """Embed where each token stands in the network.

    Args:
        kind: `2d` reads both indices; `1d` reads only the running number of the token; `learned` gives the initial
            values of a parameter, which are those of `2d`; `none` is all zeros, for ablation.
        tensor_index: (L,) number of the tensor that the token belongs to.
        token_index: (L,) number of the token inside its tensor.
        d_model: Divisible by 4.

    Returns:
        (L, M) float32.

    Raises:
        UsageError: If `d_model` is not divisible by 4.
    """
    if d_model % 4:
        raise UsageError(
            f"d_model is {d_model}, which is not divisible by 4.",
            "Positions need a sine and a cosine for each of two indices.",
            f"Set d_model to {d_model + -d_model % 4}.",
        )
    num_tokens = len(tensor_index)
    if kind == "none":
        return torch.zeros(num_tokens, d_model, device=tensor_index.device)
    if kind == "1d":
        return sincos(torch.arange(num_tokens, device=tensor_index.device), d_model)
    half = d_model // 2
    return torch.cat([sincos(token_index, half), sincos(tensor_index, half)], dim=-1)

"""The three operations of a Mamba-2 block: CUDA kernels where they are installed, plain-torch twins everywhere.

The only importer of `mamba_ssm` and `causal_conv1d`. The scan is the state-space recurrence

    S_l = exp(dt_l A) S_(l-1) + dt_l B_l x_l^T,        y_l = C_l^T S_l + D x_l

computed in chunks (Mamba-2, Listing 1): quadratic inside a chunk, recurrent from chunk to chunk.

Shapes: B = batch, L = sequence length, C = channels, H = heads, P = headdim, G = groups of heads that share the paper's
B and C, R = H / G, N = d_state, Q = chunk size, K = d_conv.
"""

import importlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from importlib.metadata import version
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rpgcli.errors import UsageError
from rpgcli.rng import stream

Backend = Literal["auto", "cuda", "torch"]
ResolvedBackend = Literal["cuda", "torch"]

INSTALL = "pip install --no-build-isolation 'rpgcli[cuda]'"
TORCH_CHUNK_SIZE = 64
"""Fastest on a CPU among 32, 64, 128 and 256 for L from 512 to 16,384; also the more exact the shorter."""
CUDA_CHUNK_SIZE = 256
"""What mamba_ssm tunes its kernels for. The result does not depend on the chunk size but for rounding."""

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------ which backend


@cache
def _import_error(module: str) -> str | None:
    """Why `module` cannot be imported, or None. A compiled extension for another torch fails here as well."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def kernels_available(device: torch.device) -> tuple[bool, str]:
    """Whether the CUDA kernels can run on `device`, and their versions or why they cannot."""
    if device.type != "cuda":
        return False, f"the kernels need a CUDA device, this is {device.type}"
    if reason := _import_error("mamba_ssm.ops.triton.ssd_combined"):
        return False, f"mamba_ssm cannot be imported ({reason})"
    conv = "missing (plain torch instead)" if _import_error("causal_conv1d") else version("causal-conv1d")
    return True, f"mamba-ssm {version('mamba-ssm')}, causal-conv1d {conv}"


def resolve_backend(backend: Backend, device: torch.device) -> ResolvedBackend:
    """Turn `auto` into the fastest backend there is on `device`.

    Raises:
        UsageError: If `cuda` is asked for by name and cannot run.
    """
    if backend == "torch":
        return "torch"
    available, reason = kernels_available(device)
    if available:
        return "cuda"
    if backend == "cuda":
        raise UsageError(f"backend 'cuda' cannot run: {reason}.", f"On a CUDA machine: {INSTALL}", "Or: backend: auto.")
    if device.type == "cuda":
        _warn_once(reason)
    return "torch"


@cache
def _warn_once(reason: str) -> None:
    logger.warning("Mamba2 runs in plain torch on this GPU, which is slower: %s", reason)


# ------------------------------------------------------------------ the operations


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, *, backend: ResolvedBackend = "torch") -> Tensor:
    """SiLU of a depthwise convolution that looks back over K positions.

    Args:
        x: (B, L, C).
        weight: (C, 1, K), the last tap is the present; bias: (C).

    Returns:
        (B, L, C) in the dtype of `weight`.
    """
    num_channels, _, num_taps = weight.shape
    x = x.to(weight.dtype)
    if backend == "cuda" and not _import_error("causal_conv1d") and 2 <= num_taps <= 4 and num_channels % 8 == 0:
        kernel = importlib.import_module("causal_conv1d").causal_conv1d_fn  # takes nothing but these sizes
        y: Tensor = kernel(x.transpose(1, 2), weight[:, 0], bias, activation="silu")  # (B, C, L)
        return y.transpose(1, 2)
    # Tap by tap instead of F.conv1d, whose depthwise backward takes four times as long on a CPU.
    length = x.shape[1]
    past = F.pad(x, (0, 0, num_taps - 1, 0))  # (B, K - 1 + L, C)
    y = bias
    for k, tap in enumerate(weight[:, 0].unbind(-1)):
        y = torch.addcmul(y, past[:, k : k + length], tap)  # (B, L, C)
    return F.silu(y)


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk_size: int | None = None,
    backend: ResolvedBackend = "torch",
) -> Tensor:
    """The recurrence of the module's docstring, in time and memory linear in L.

    Computed in float32 at least, also under autocast.

    Args:
        x: (B, L, H, P).
        dt: (B, L, H) step sizes, positive.
        A: (H) decay rates, negative.
        B: (B, L, G, N); C: (B, L, G, N), each group serves H / G neighbouring heads.
        D: (H) skip.
        chunk_size: Default: the backend's best.

    Returns:
        (B, L, H, P) in the dtype of the computation.
    """
    return _scan(x, dt, A, B, C, D, None, chunk_size, backend)[0]


def scan_on(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor,
    *, chunk_size: int | None = None, backend: ResolvedBackend = "torch",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`chunked_scan` of a sequence that goes on from a state (B, H, P, N); also returns the state at its end."""
    y, end = _scan(x, dt, A, B, C, D, state, chunk_size, backend)
    assert end is not None
    return y, end


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None,
    chunk_size: int | None, backend: ResolvedBackend,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C, D = (value.to(dtype) for value in (x, dt, A, B, C, D))
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):  # `meta` knows no autocast.
        if backend == "cuda":
            kernel = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
            more = {} if state is None else {"initial_states": state.to(dtype), "return_final_states": True}
            found = kernel(x, dt, A, B, C, chunk_size=chunk_size or CUDA_CHUNK_SIZE, D=D, **more)
            return found if more else (found, None)
        y, end = _chunked_scan(x, dt, A, B, C, chunk_size or TORCH_CHUNK_SIZE, state)
        return y + x * D[:, None], end


def _chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, start: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2 Listing 1 without the skip. For a short sequence one chunk is all there is: the quadratic form.

    The state at the end is computed where one at the start (B, H, P, N) is given.
    """
    length, num_groups = x.shape[1], B.shape[2]
    Q = min(chunk_size, length)
    padding = -length % Q

    def chunks(value: Tensor) -> Tensor:
        padded: Tensor = F.pad(value, (0, 0) * (value.ndim - 2) + (0, padding)).unflatten(1, (-1, Q))
        return padded  # (B, chunks, Q, ...)

    # fmt: off
    # Decay scales what enters and what leaves (P values a head) instead of B and C (N): one matrix product then serves
    # all heads of a group, and B and C are not repeated for each of them.
    x    = chunks(x * dt[..., None]).unflatten(3, (num_groups, -1)).transpose(2, 3)            # (B, chunks, G, Q, R, P)
    a    = chunks(dt * A).unflatten(3, (num_groups, -1)).permute(0, 1, 3, 4, 2).cumsum(-1)     # (B, chunks, G, R, Q)
    B, C = (chunks(value).transpose(2, 3) for value in (B, C))                                 # (B, chunks, G, Q, N)

    # 1. Inside a chunk: position i reads position j <= i through exp(a_i - a_j).
    future = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay  = (a[..., :, None] - a[..., None, :]).masked_fill_(future, -torch.inf).exp_()       # (B, chunks, G, R, Q, Q)
    read   = (C @ B.mT)[:, :, :, None] * decay                                                 # (B, chunks, G, R, Q, Q)
    y: Tensor = (read @ x.transpose(3, 4)).transpose(3, 4)                                     # (B, chunks, G, Q, R, P)

    end = None
    if length > Q or start is not None:
        # 2. What each chunk adds to the state at its end.
        left  = (a[..., -1:] - a).exp().mT[..., None]                                          # (B, chunks, G, Q, R, 1)
        added = (B.mT @ (x * left).flatten(4)).unflatten(-1, x.shape[4:])                      # (B, chunks, G, N, R, P)
        kept  = a[..., -1].exp()[..., None, :, None]                                           # (B, chunks, G, 1, R, 1)

        # 3. The state before each chunk. A loop of L / Q cheap steps: the listing's matrix over pairs of chunks is
        #    quadratic in L. `unbind`, because the backward of indexing fills a tensor of all chunks for each of them.
        state, before = torch.zeros_like(added[:, 0]), []
        if start is not None:
            state = start.to(x.dtype).unflatten(1, (num_groups, -1)).permute(0, 1, 4, 2, 3)            # (B, G, N, R, P)
        for kept_c, added_c in zip(kept.unbind(1), added.unbind(1), strict=True):
            before.append(state)
            state = torch.addcmul(added_c, kept_c, state)                                      # (B, G, N, R, P)
        if start is not None:
            end = state.permute(0, 1, 3, 4, 2).flatten(1, 2)                                   # (B, H, P, N)

        # 4. What each position reads from the state before its chunk.
        found = (C @ torch.stack(before, dim=1).flatten(4)).unflatten(-1, x.shape[4:])         # (B, chunks, G, Q, R, P)
        y = torch.addcmul(y, found, a.exp().mT[..., None])

    y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)                                          # (B, chunks * Q, H, P)
    # fmt: on
    return y[:, :length], end


def scan_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The slow twin of `chunked_scan`: the recurrence as it is written, one position after another."""
    batch, _, num_heads, headdim = x.shape
    B, C = (value.repeat_interleave(num_heads // value.shape[2], dim=2) for value in (B, C))
    state, y = x.new_zeros(batch, num_heads, B.shape[-1], headdim), []
    # fmt: off
    for x_l, dt_l, B_l, C_l in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = (dt_l * A).exp()                                                               # (B, H)
        read  = (dt_l[..., None] * B_l)[..., :, None] * x_l[..., None, :]                      # (B, H, N, P)
        state = decay[..., None, None] * state + read                                          # (B, H, N, P)
        y.append((C_l[..., :, None] * state).sum(-2) + D[:, None] * x_l)                       # (B, H, P)
    # fmt: on
    return torch.stack(y, dim=1)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int = 1) -> Tensor:
    """`y silu(z)` over its root mean square in each group of channels, times `weight`; in float32 at least.

    Args:
        y: (B, L, C); z: (B, L, C), the gate; weight: (C).
        eps: Added to the mean square.
        num_groups: mamba_ssm normalises each group of heads by itself.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    y = (y.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (num_groups, -1))  # (B, L, G, C / G)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight


# ------------------------------------------------------------------ do both agree?


def compare_backends(device: torch.device) -> float:
    """Largest difference between the CUDA kernels and their twins, over outputs and gradients for random inputs.

    Each output and gradient is measured in units of its own largest value.

    Raises:
        UsageError: If the kernels cannot run on `device`.
    """
    resolve_backend("cuda", device)
    generator = stream(0, "kernels", "compare")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    channels, weight, bias = draw(2, 300, 128), draw(128, 1, 4), draw(128)
    x, B, C = draw(2, 300, 4, 32), draw(2, 300, 2, 16), draw(2, 300, 2, 16)
    dt, A, D = F.softplus(draw(2, 300, 4) - 3), -draw(4).exp(), draw(4)

    def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    def run(backend: ResolvedBackend) -> list[Tensor]:
        conv, scan = partial(causal_conv, backend=backend), partial(chunked_scan, backend=backend)
        return with_gradients(conv, channels, weight, bias) + with_gradients(scan, x, dt, A, B, C, D)

    pairs = zip(run("cuda"), run("torch"), strict=True)
    return max(((kernel - twin).abs().max() / twin.abs().max()).item() for kernel, twin in pairs)

"""The plain-torch scan against its sequential twin and against transformers' Mamba2, and its growth with the length.

Forward and backward, gradients of everything that has one.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.cores.mamba2 import Mamba2Block, Mamba2Config
from rpgcli.kernels import chunked_scan, scan_reference
from rpgcli.targets.torchvision_shim import import_torchvision
from tests.bench.measuring import Figure, Row, Setting, Side, at_least, at_most, in_turn, timed

D_MODEL, LENGTH = 512, 512


def scan(setting: Setting) -> list[Row]:
    """d_model 512, L 512: the scan alone, and a whole block with the same weights as transformers'."""
    length = 64 if setting.quick else LENGTH
    config = Mamba2Config(d_model=D_MODEL)
    inputs = scan_inputs(config, length)
    with rng.initialising(0, "bench"):
        block = Mamba2Block(config, D_MODEL, D_MODEL)
    theirs = {size: transformers_block(config, block, size) for size in (64, 256)}
    h = torch.randn(1, length, D_MODEL, generator=rng.stream(0, "bench", "h"))
    sides = {
        "scan": forward_backward(partial(chunked_scan, *inputs), inputs),
        "sequential": forward_backward(partial(scan_reference, *inputs), inputs),
        "block": on_block(block, h),
    }
    for size, oracle in theirs.items():
        sides[f"transformers, chunks of {size}"] = on_block(oracle, h)
    found = in_turn(sides, setting.repeats(15))
    ours, sequential = found["scan"], found["sequential"]
    names = [name for name in sides if name.startswith("transformers")]
    fastest = Figure(tuple(map(min, zip(*(found[name].values for name in names)))))
    sizes = f"d_model {D_MODEL}, L {length}, d_state {config.d_state}, batch 1. "
    return [
        Row("scan: sequential twin / chunked", sequential.over(ours), "x",
            {"sequential": sequential, "chunked": ours}, note=sizes + "Forward and backward."),
        Row("  transformers' Mamba2 / our block", fastest.over(found["block"]), "x",
            {"transformers": fastest, "ours": found["block"]}, goal=at_least(1),
            note="A whole block with the same weights, projections included; transformers with the faster of chunks of "
                 "64 and of 256 (its default)."),
    ]  # fmt: skip


def lengths(setting: Setting) -> list[Row]:
    """Time for each position up to 16,384."""
    numbers = (64, 128, 256) if setting.quick else (512, 2048, 8192, 16384)
    sides = {}
    for length in numbers:
        inputs = scan_inputs(Mamba2Config(d_model=D_MODEL), length)
        sides[str(length)] = forward_backward(partial(chunked_scan, *inputs), inputs)
    found = in_turn(sides, setting.repeats(5))
    each = {length: found[str(length)].times(1e6 / length) for length in numbers}
    first = numbers[0]
    return [
        Row(
            f"scan: time a position, L {length:,} over {first}", each[length].over(each[first]), "x",
            {str(length): each[length], str(first): each[first]}, "us", goal=at_most(1.5),
            note=f"d_model {D_MODEL}, forward and backward. Linear: 1.",
        )
        for length in numbers[1:]
    ]  # fmt: skip


def scan_inputs(config: Mamba2Config, length: int) -> list[Tensor]:
    """x, dt, A, B, C, D of one sequence."""
    generator = rng.stream(0, "bench", "scan", length)
    heads = config.expand * config.d_model // config.headdim

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, B, C = (
        draw(1, length, heads, config.headdim),
        draw(1, length, 1, config.d_state),
        draw(1, length, 1, config.d_state),
    )
    dt, A, D = F.softplus(draw(1, length, heads) - 3), -draw(heads).exp(), draw(heads)
    return [value.requires_grad_() for value in (x, dt, A, B, C, D)]


def forward_backward(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Side:
    """Gradients of the sum of what `function` gives."""
    return timed(lambda: torch.autograd.grad(function().sum(), leaves))


def on_block(block: nn.Module, h: Tensor) -> Side:
    """Gradients of all weights of a block."""
    return forward_backward(partial(block, h), [*block.parameters()])


def transformers_block(config: Mamba2Config, block: Mamba2Block, chunk_size: int) -> nn.Module:
    """transformers' block with the weights of ours, on its torch path."""
    import_torchvision()
    from transformers import Mamba2Config as OracleConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    logging.getLogger("transformers").setLevel(logging.ERROR)  # No warning that its kernels are missing: it is to.
    heads = config.expand * config.d_model // config.headdim
    settings = OracleConfig(
        hidden_size=config.d_model, num_heads=heads, head_dim=config.headdim, n_groups=config.ngroups,
        state_size=config.d_state, expand=config.expand, chunk_size=chunk_size, num_hidden_layers=1,
    )  # fmt: skip
    oracle: nn.Module = Mamba2Mixer(settings, layer_idx=0)
    oracle.load_state_dict(block.state_dict(), strict=True)
    return oracle

"""MLP-3 of p-diff (Tab. 2, whole networks).

The paper names its parameter counts only, 39,760 on MNIST and 155,135 on CIFAR-10, and no single rule that we know
gives both. 784-50-10 has the first: the default. 3072-50-25-10 without biases in its first layer has the second:
`hidden=(50, 25), first_bias=False`. Both are inferred from the counts. The released code trains another one under this
name (1024-64-16-10 with layer norms on grey images of half the size, 66,970 parameters).

Shapes: N images, C channels, H x W pixels.
"""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from rpgcli.alignment import Group, units
from rpgcli.targets.base import Size, Target


class Mlp3Config(Target):
    """p-diff's MLP-3: linear layers on the flattened image, with ReLU between them."""

    batched: ClassVar[bool] = True

    kind: Literal["mlp3"] = "mlp3"
    hidden: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (50,)
    """Units of the hidden layers, first to last; with input and output, the default has three layers of units."""
    first_bias: bool = True
    """Whether the first layer has biases."""

    def build(self, channels: int, size: Size, num_outputs: int) -> nn.Module:
        """The network; see `Target.build`."""
        return Mlp3((channels * size[0] * size[1], *self.hidden, num_outputs), self.first_bias)

    def symmetries(self, network: nn.Module) -> tuple[Group, ...]:
        """Hidden units, all behind ReLU; see `Target.symmetries`."""
        groups = []
        for i, n in enumerate(self.hidden):
            layer, after = f"layers.{2 * i}", f"layers.{2 * i + 2}"
            own = [f"{layer}.weight", f"{layer}.bias"] if i or self.first_bias else [f"{layer}.weight"]
            groups.append(units(layer, n, own, [f"{after}.weight"], scaled=own))
        return tuple(groups)


class Mlp3(nn.Module):
    """Linear layers of the given widths, input and output included."""

    def __init__(self, widths: tuple[int, ...], first_bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1], bias=first_bias)]
        for n_in, n_out in pairwise(widths[1:]):
            layers += [nn.ReLU(), nn.Linear(n_in, n_out)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_outputs) of normalised images (N, C, H, W)."""
        return self.layers(x.flatten(1))  # type: ignore[no-any-return]

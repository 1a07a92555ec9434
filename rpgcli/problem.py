"""The problem: a data set, what is asked of a network on it, and the network that is asked.

Shapes: N networks, B images, C channels, H x W pixels, O outputs.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, vmap

from rpgcli import rng
from rpgcli.config import Config
from rpgcli.imports import match_network
from rpgcli.targets import CnnConfig, TargetConfig, prepare
from rpgcli.tasks import (
    BinarySubsetConfig,
    DatasetConfig,
    DigitsConfig,
    MultiClassConfig,
    TaskConfig,
    augment,
    bits_tensor,
)

Split = Literal["train", "validation", "test"]
State = Mapping[str, Tensor]
VALUES_AT_ONCE = 2**25
"""Input values of a forward pass over many networks and images: larger ones are cut into chunks."""


class ProblemConfig(Config):
    """What networks are collected for."""

    dataset: DatasetConfig = Field(default_factory=DigitsConfig)
    """The images."""
    task: TaskConfig = Field(default_factory=BinarySubsetConfig)
    """What is asked of a network on them."""
    target: TargetConfig = Field(default_factory=CnnConfig)
    """The network."""

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "ProblemConfig":
        """The problem of a zoo, from what the zoo was made from."""
        return cls.model_validate_json(json.dumps({name: section[name] for name in ("dataset", "task", "target")}))

    def open(self, *, data_root: Path | None, download: bool, device: torch.device) -> "Problem":
        """Load the data set."""
        return Problem(self, data_root, download, device)


class Problem:
    """A `ProblemConfig` with its images at hand."""

    def __init__(
        self,
        config: ProblemConfig,
        data_root: Path | None,
        download: bool,
        device: torch.device,
        *,
        outline: bool = False,
    ) -> None:
        """With `outline`, the numbers and shapes of its images alone, for a plan."""
        self.config, self.device = config, device
        self.dataset = config.dataset.outline(data_root) if outline else config.dataset.load(data_root, download)
        self.num_outputs = config.task.num_outputs(self.dataset.num_classes)
        self.input_size = config.target.input_size(self.dataset.size)

    @classmethod
    def multi_class(cls, other: "Problem") -> "Problem":
        """The same data set and target, asked for the class itself."""
        problem = copy.copy(other)
        problem.config = other.config.model_copy(update={"task": MultiClassConfig()})
        problem.num_outputs = other.dataset.num_classes
        problem.__dict__.pop("reference", None)
        problem.__dict__.pop("skeleton", None)
        return problem

    @property
    def has_bits(self) -> bool:
        """Whether a network is asked for by task bits, one for each class."""
        return self.config.task.kind == "binary-subset"

    def build(self, *names: rng.Name, seed: int = 0, num_outputs: int | None = None) -> nn.Module:
        """A new network, initialised from the stream called `names`, on the device."""
        with rng.initialising(seed, *names):
            outputs = self.num_outputs if num_outputs is None else num_outputs
            return self.config.target.build(self.dataset.channels, self.dataset.size, outputs).to(self.device)

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """A state dict of the target (values meaningless): names, order, shapes and dtypes."""
        return {name: value.cpu() for name, value in self.build("reference").state_dict().items()}

    @cached_property
    def skeleton(self) -> nn.Module:
        """The target without memory, for `functional_call`."""
        return self.build("reference").to("meta")

    def images(self, split: Split, index: Tensor | slice, generator: torch.Generator | None = None) -> Tensor:
        """Images as the network takes them, (B, C, H, W) float32; augmented where a generator is given."""
        pixels = getattr(self.dataset, split).pixels[index]
        if generator is not None:
            pixels = augment(pixels, generator, self.config.dataset.augment)
        return prepare(self.dataset.normalise(pixels.to(self.device)), self.input_size)

    def labels(self, split: Split, bits: Sequence[str | None]) -> Tensor:
        """What each of N networks should answer, (N, number of images) int64."""
        y: Tensor = getattr(self.dataset, split).labels
        if not self.has_bits:
            return self.config.task.labels(y, None).expand(len(bits), -1).to(self.device)
        return self.config.task.labels(y, bits_tensor([b for b in bits if b is not None])).to(self.device)

    @torch.no_grad()
    def logits_of(self, states: Sequence[State], split: Split) -> Iterator[Tensor]:
        """Logits that networks give all images of a split, for a few networks after the other: (N, images, O).

        Raises:
            LayoutError: If a state dict does not fit the target.
        """
        states = [match_network(state, self.reference) for state in states]
        num_images = len(getattr(self.dataset, split).labels)
        values = self.dataset.channels * self.input_size[0] * self.input_size[1] * 8  # 8: a first layer's channels
        if not self.config.target.batched:
            model = self.build("reference").eval()
            for state in states:
                model.load_state_dict(dict(state), strict=True)
                index = torch.arange(num_images).split(max(1, VALUES_AT_ONCE // values))
                yield torch.cat([model(self.images(split, i)) for i in index])[None]
            return
        at_once = max(1, min(64, len(states), VALUES_AT_ONCE // (num_images * self.num_outputs)))
        for chunk in (states[i : i + at_once] for i in range(0, len(states), at_once)):
            stacked = {name: torch.stack([state[name] for state in chunk]).to(self.device) for name in chunk[0]}
            index = torch.arange(num_images).split(max(1, VALUES_AT_ONCE // (values * len(chunk))))
            yield torch.cat([self.outputs(stacked, self.images(split, i)) for i in index], 1)

    def predictions(self, states: Sequence[State], split: Split) -> Tensor:
        """Class that each network gives each image, (N, number of images) int64; see `logits_of`."""
        return torch.cat([logits.argmax(-1) for logits in self.logits_of(states, split)])

    def outputs(self, stacked: State, x: Tensor) -> Tensor:
        """Logits of N stacked networks, (N, B, O), for common images (B, ...) or each network's own (N, B, ...)."""
        skeleton, x_dim = self.skeleton, None if x.dim() == 4 else 0
        forward = vmap(lambda state, x: functional_call(skeleton, state, (x,)), in_dims=(0, x_dim))
        return forward(dict(stacked), x)  # type: ignore[no-any-return]

    def accuracy(self, states: Sequence[State], bits: Sequence[str | None], split: Split) -> Tensor:
        """Fraction of images that each network answers right, (N,) float64."""
        if not states:
            return torch.zeros(0, dtype=torch.float64)
        return (self.predictions(states, split) == self.labels(split, bits)).double().mean(1).cpu()


def unstacked(values: State) -> list[dict[str, Tensor]]:
    """N state dicts, copied to the CPU, from one whose tensors have a leading axis of N."""
    rows = {name: value.detach().cpu().clone() for name, value in values.items()}
    return [dict(zip(rows, state)) for state in zip(*rows.values())]

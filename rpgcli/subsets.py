"""Subsets of a network's parameters: how they are named, and how the network around them is computed only once.

p-diff learns a few layers of a large network. All its checkpoints share the rest, so what the rest makes of an image
before the subset enters is the same for every checkpoint: it is computed once and kept.

Letters: N networks, n images of a split, B images in a batch, O outputs.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.conv import _ConvNd

from rpgcli.errors import UsageError, nearest
from rpgcli.problem import VALUES_AT_ONCE, Problem, Split, State, unstacked
from rpgcli.targets.timm_model import suggest

logger = logging.getLogger(__name__)

MAX_KEPT_BYTES = 2**30
"""Activations of all images together; what needs more is computed again each time."""
NUM_PROBES = 7
"""Images on which the graph is explored; a number that no other axis is likely to have."""
EXPECTED = (
    'Expected a list of names of parameters or modules (head, head.weight), globs (in quotes: "*.norm?"), or roles: '
    "conv, linear, norm, shortcut, each with :first, :last2, :3 or :3-5 (from 1) where not all are meant, or all."
)


# --- names ------------------------------------------------------------------------------------------------------------


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


ROLES: dict[str, Callable[[str, nn.Module], bool]] = {
    "conv": lambda _, module: isinstance(module, _ConvNd),
    "linear": lambda _, module: isinstance(module, nn.Linear),
    "norm": lambda _, module: "norm" in type(module).__name__.lower() and _has_own(module),
    "shortcut": lambda name, _: name.rpartition(".")[2] in {"downsample", "shortcut"},
}
"""What a layer of each role is, by its name and module; layers without parameters do not count."""


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that any of the patterns means, in state-dict order.

    Args:
        model: The whole network, `meta` tensors suffice.
        patterns: Names of parameters or modules, globs over such names, roles of layers with an optional range
            (`norm:last2`, `conv:first`, `norm:3-5` counted from 1 in module order), or `all`.

    Raises:
        UsageError: If a pattern means nothing, or nothing that is trained.
    """
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    found = {name for pattern in patterns for name in _meant(model, pattern, trained)}
    if not found:
        raise UsageError("collect.parameters names nothing, so nothing would be trained.", EXPECTED)
    return [name for name in trained if name in found]


def _meant(model: nn.Module, pattern: str, trained: Sequence[str]) -> list[str]:
    if pattern == "all":
        return list(trained)
    role, colon, which = pattern.partition(":")
    layers: list[str] | None = None
    if role in ROLES:
        layers = _range(pattern, which if colon else "1-", [
            name for name, module in model.named_modules()
            if ROLES[role](name, module) and next(module.parameters(), None) is not None
        ])  # fmt: skip
    elif colon:
        raise UsageError(f"collect.parameters: unknown role {role!r}{nearest(role, ROLES)}", EXPECTED)

    def means(name: str) -> bool:
        parts = [name[:end] for end in (*_dots(name), len(name))]  # The modules it is in, and itself.
        return any(fnmatchcase(part, pattern) if layers is None else part in layers for part in parts)

    found = [name for name in trained if means(name)]
    if not found and any(map(means, model.state_dict())):
        raise UsageError(
            f"collect.parameters: {pattern!r} names only statistics and constants, so nothing would be trained.",
            EXPECTED,
        )
    if not found:
        known = dict.fromkeys(name[:end] for name in trained for end in (*_dots(name), len(name)))
        raise UsageError(
            f"collect.parameters: no parameter of the network is named {pattern!r}{suggest(pattern, list(known))}",
            EXPECTED,
            f"The network has {len(trained)} tensors of parameters, from {trained[0]} to {trained[-1]}.",
        )
    return found


def _range(pattern: str, which: str, layers: list[str]) -> list[str]:
    """The layers of a role that `first`, `last2`, `3`, `3-5` or `1-` (all) mean."""
    match = re.fullmatch(r"(first|last)([1-9]\d*)?|([1-9]\d*)(?:(-)(\d*))?", which)
    if match is None:
        raise UsageError(f"collect.parameters: {pattern!r} has an unknown range {which!r}.", EXPECTED)
    side, num, first, dash, last = match.groups()
    start, stop = int(first or 1), int(last or (len(layers) if dash else first or 1))
    if side is not None:
        start, stop = 1, int(num or 1)
    if not layers:
        raise UsageError(f"collect.parameters: {pattern!r}: the network has no layer of this role.", EXPECTED)
    if not start <= stop <= len(layers):
        shown = ", ".join(layers) if len(layers) <= 4 else f"{', '.join(layers[:3])} to {layers[-1]}"
        raise UsageError(
            f"collect.parameters: {pattern!r} does not fit the {len(layers)} layers of this role that the network has.",
            f"Counted from 1 they are {shown}.",
            EXPECTED,
        )
    return layers[-stop:] if side == "last" else layers[start - 1 : stop]


def _dots(name: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"\.", name))


# --- the tail ---------------------------------------------------------------------------------------------------------


class Kept:
    """The forward pass of a module that does not depend on the subset: computed, or given back.

    Args:
        module: Its forward pass is replaced.
    """

    def __init__(self, module: nn.Module) -> None:
        self.given: Tensor | None = None
        """What the module answers without computing anything."""
        self.needed = True
        """Whether anything that depends on the subset reads it."""
        self.computed = torch.empty(0)
        """What the module answered last, where it is needed."""
        self._compute = module.forward
        module.forward = self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.given is not None:
            return self.given
        y: Tensor = self._compute(*args, **kwargs)
        if self.needed:
            self.computed = y.detach().clone()  # The network may go on to change it in place.
        return y


def _quicken(module: nn.Module) -> None:
    """Let a convolution over a map of one pixel read the one place of its kernel that meets it: 30 times faster.

    The last maps of networks made for larger images are that small, and the rest of the kernel meets padding.
    """
    if type(module) is not nn.Conv2d or module.groups > 1 or module.padding_mode != "zeros":
        return
    conv, compute = module, module.forward
    centre = [p for p in conv.padding if isinstance(p, int)]
    if conv.kernel_size != tuple(2 * p + 1 for p in centre):
        return

    def middle() -> Tensor:
        return conv.weight[:, :, centre[0], centre[1]]

    frozen = None if conv.weight.requires_grad else middle().contiguous()  # Otherwise copied at each step.

    def forward(x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != (1, 1):
            return compute(x)
        return F.linear(x.flatten(1), middle() if frozen is None else frozen, conv.bias)[:, :, None, None]

    conv.forward = forward  # type: ignore[method-assign, assignment]


class Tail:
    """One network of which only a subset changes: the frozen rest is in evaluation mode and computed once.

    Autograd finds the boundary: with gradients for the subset alone, a module whose output needs none does not depend
    on it. The topmost such modules are replaced by what they answered, row by row; whatever the network does between
    them it does as before. Where that cannot be (the subset reads the images themselves, or the activations need too
    much memory) every forward pass is a whole one.

    Args:
        problem: Images and target.
        base: State dict of the whole network.
        names: The subset's parameters.

    Raises:
        UsageError: If the network's outputs do not depend on the subset.
    """

    def __init__(self, problem: Problem, base: State, names: Sequence[str]) -> None:
        self.problem = problem
        self.model = problem.build("reference")
        self.model.load_state_dict(dict(base), strict=True)
        self.model.eval().requires_grad_(False)
        self.values = {name: self.model.get_parameter(name).requires_grad_() for name in names}
        for module in self.model.modules():
            _quicken(module)
        self._base = self.snapshot()[0]
        self._kept: list[Kept] = []
        self._rows: dict[Split, list[Tensor]] = {}  # Activations of each split, (n, ...), one for each needed module.
        self._explore()

    @property
    def is_cut(self) -> bool:
        """Whether activations are kept."""
        return bool(self._kept)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.values.values())

    def outputs(self, x: Tensor) -> Tensor:
        """Logits (1, B, O) of images (1, B, C, H, W), or of the training images with numbers (1, B)."""
        return (self.model(x[0]) if x.is_floating_point() else self.logits("train", x[0]))[None]

    def logits(self, split: Split, index: Tensor | slice) -> Tensor:
        """Logits (B, O) of B images of a split, not augmented.

        Args:
            split: Which images.
            index: Their numbers, (B,), or a slice of them: what is kept of those is copied, for the network may change
                it in place.
        """
        if not self.is_cut:
            return self.model(self.problem.images(split, index))  # type: ignore[no-any-return]
        picked = [rows[index] for rows in self.rows(split)]
        return self.give([x.clone() for x in picked] if isinstance(index, slice) else picked)

    def rows(self, split: Split) -> list[Tensor]:
        """What enters a cut tail for each of a split's n images, (n, ...) for each needed module; computed once."""
        if split not in self._rows:
            self._rows[split] = self._activations(split)
        return self._rows[split]

    def num_at_once(self, batch_size: int, num: int) -> int:
        """How many of `num` subsets `StackedTail` trains side by side on batches of so many images; 1: none."""
        if not self.is_cut or not self._stacks:
            return 1
        values = sum(kept.computed[0].numel() for kept in self._kept if kept.needed)
        return max(1, min(num, VALUES_AT_ONCE // (batch_size * values)))

    def snapshot(self) -> list[dict[str, Tensor]]:
        """The subset, copied."""
        return [{name: value.detach().cpu().clone() for name, value in self.values.items()}]

    def reset(self) -> None:
        """Set the subset to what it is in the base network."""
        self.load(self._base)

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set the subset; other tensors of `state` are not looked at."""
        for name, value in self.values.items():
            value.copy_(state[name])

    @torch.no_grad()
    def logits_of(self, states: Sequence[State], split: Split) -> Iterator[Tensor]:
        """Logits of all images of a split with one subset after the other, (1, n, O); see `Problem.logits_of`."""
        for state in states:
            before = self.snapshot()[0]
            self.load(state)
            logits = torch.cat([self.logits(split, chunk) for chunk in self._chunks(split)])
            self.load(before)
            yield logits[None]

    def predictions(self, states: Sequence[State], split: Split) -> Tensor:
        """Class that the network gives each image with each of N subsets, (N, n) int64."""
        return torch.cat([logits.argmax(-1) for logits in self.logits_of(states, split)])

    def accuracy(self, states: Sequence[State], bits: Sequence[str | None], split: Split) -> Tensor:
        """Fraction of images answered right with each of N subsets, (N,) float64; see `Problem.accuracy`."""
        return (self.predictions(states, split) == self.problem.labels(split, bits)).double().mean(1).cpu()

    def _chunks(self, split: Split) -> list[slice]:
        values = 8 * self.problem.dataset.channels * math.prod(self.problem.input_size)  # 8: a first layer's channels
        num, size = self._num_images(split), max(1, VALUES_AT_ONCE // values)
        return [slice(first, min(first + size, num)) for first in range(0, num, size)]

    def _num_images(self, split: Split) -> int:
        return len(getattr(self.problem.dataset, split).labels)

    @torch.no_grad()
    def _activations(self, split: Split) -> list[Tensor]:
        parts = []
        for chunk in self._chunks(split):
            self.model(self.problem.images(split, chunk))
            parts.append([kept.computed for kept in self._kept if kept.needed])
        return [torch.cat(part) for part in zip(*parts)]

    def give(self, rows: Sequence[Tensor], values: State | None = None, x: Tensor | None = None) -> Tensor:
        """Logits where the needed modules answer `rows`, (B, ...) each; nobody reads what the others answer.

        Args:
            rows: Activations.
            values: The subset, instead of its own.
            x: The images (B, C, H, W), which nobody reads either.
        """
        size, rest = len(rows[0]), iter(rows)
        if x is None:
            x = rows[0].new_empty(size, self.problem.dataset.channels, *self.problem.input_size)
        for kept in self._kept:
            kept.given = next(rest) if kept.needed else kept.computed.new_empty(size, *kept.computed.shape[1:])
        logits: Tensor = functional_call(self.model, dict(values or {}), x)
        for kept in self._kept:
            kept.given = None
        return logits

    @cached_property
    def _stacks(self) -> bool:
        """Whether torch can vectorise what follows the activations; not, e.g., where it depends on values."""
        probes = torch.arange(NUM_PROBES)[None]  # (1, B)
        try:
            StackedTail(self, [self._base, self._base]).outputs(probes)
        except RuntimeError as error:
            logger.info("subsets are trained one after another: %s", str(error).partition("\n")[0])
            return False
        return True

    @torch.enable_grad()
    def _explore(self) -> None:
        """Find what to keep, and make sure that the tail computes what the whole network does."""
        x = self.problem.images("train", torch.arange(min(NUM_PROBES, self._num_images("train"))))
        self._kept = [Kept(module) for module in self._independent(x)]
        reason = self._reason_against(x)
        if reason:
            for kept in self._kept:
                kept.needed = False
            self._kept = []
            logger.info("activations before the subset are not kept: %s", reason)

    def _independent(self, x: Tensor) -> list[nn.Module]:
        """The topmost modules that answer one row for each image, independent of the subset."""
        answers: dict[nn.Module, list[bool]] = {}

        def look(module: nn.Module, _: object, y: object) -> None:
            plain = isinstance(y, Tensor) and y.shape[:1] == x.shape[:1] and not y.requires_grad
            answers.setdefault(module, []).append(plain)

        hooks = [module.register_forward_hook(look) for module in self.model.modules()]
        logits = self.model(x)
        for hook in hooks:
            hook.remove()
        if not logits.requires_grad:
            raise UsageError(
                f"the network's outputs do not depend on {', '.join(list(self.values)[:3])}.",
                "Choose other collect.parameters: these would never change.",
            )

        def topmost(module: nn.Module) -> Iterator[nn.Module]:
            for child in module.children():
                if answers.get(child) == [True]:  # One that is called several times has several answers.
                    yield child
                else:
                    yield from topmost(child)

        return list(dict.fromkeys(topmost(self.model)))

    def _reason_against(self, x: Tensor) -> str:
        """Mark which modules' answers are needed; why keeping them would not do, or nothing."""
        if not self._kept:
            return "the subset reads the images themselves"
        with torch.no_grad():
            self.model(x)
        leaves = [x.clone().requires_grad_(), *(kept.computed.requires_grad_() for kept in self._kept)]
        logits = self.give([leaf.clone() for leaf in leaves[1:]], x=leaves[0])
        read: Sequence[Tensor | None] = torch.autograd.grad(logits.sum(), leaves, allow_unused=True)
        if read[0] is not None:
            return "the subset reads the images themselves"
        for kept, gradient in zip(self._kept, read[1:]):
            kept.needed, kept.computed = gradient is not None, kept.computed.detach()
        needed = [kept.computed for kept in self._kept if kept.needed]
        num_images = sum(self._num_images(split) for split in ("train", "validation", "test"))
        num_bytes = num_images * sum(y[0].numel() * y.element_size() for y in needed)
        if num_bytes > MAX_KEPT_BYTES:
            return f"they would take {num_bytes / 2**20:.0f} MiB"
        order = torch.arange(len(x)).flip(0).to(x.device)
        with torch.no_grad():
            self.load({name: 1.25 * value + 0.01 for name, value in self._base.items()})
            found, expected = self.give([y[order] for y in needed]), self.model(x[order])
            self.load(self._base)
        agree = torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))  # Rounding only.
        return "" if agree else "the network does not pass them on as they are"


class StackedTail:
    """N subsets as one, trained side by side: every parameter has a leading axis of N.

    Args:
        tail: What follows the activations, which must be kept.
        states: Subsets as they start; other tensors are not looked at.
    """

    def __init__(self, tail: Tail, states: Sequence[State]) -> None:
        self.tail, self.num = tail, len(states)
        self.values = {
            name: torch.stack([state[name] for state in states]).to(value.device).requires_grad_()
            for name, value in tail.values.items()
        }  # (N, ...)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.values.values())

    def outputs(self, index: Tensor) -> Tensor:
        """Logits (N, B, O) of the training images with numbers (G, B); a single row is for all networks."""
        index = index.expand(self.num, -1)
        rows = [kept[index] for kept in self.tail.rows("train")]  # (N, B, ...)
        logits: Tensor = vmap(self.tail.give)(rows, self.values)
        return logits

    def snapshot(self) -> list[dict[str, Tensor]]:
        """The subsets, copied."""
        return unstacked(self.values)

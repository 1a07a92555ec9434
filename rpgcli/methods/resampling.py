"""Trivial generators of zoos without tasks: what a learned one has to beat.

Each draws one network from the seen checkpoints, in the coordinates that a learned generator sees: those of the tokens,
so hidden units are aligned where the tokens are. The raw generators are those of tokens with `align: none`.

    average                   the mean of all checkpoints
    average-trunk             the same, but its last layer drawn as at initialisation
    soup-4, soup-16           the mean of so many, drawn without replacement
    interpolation             a point between two checkpoints
    gaussian                  every coordinate by itself
    gaussian-full, -pca       with the covariance of all coordinates, or of the leading principal components only
    noise-0.1, noise-abs-0.06 a checkpoint and noise, relative to each tensor's deviation or in units of raw weights
    latent-gaussian, -kde     the full Gaussian, or a kernel density estimate, on an autoencoder's latents

What is linear in the checkpoints is drawn as K weights w of x = X^T w, which reads one checkpoint after another: of
large networks no more than a few are in memory, and no covariance (P, P) is ever made.

Letters: K checkpoints, P parameters, X (K, P), Z width of latents.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from rpgcli import rng
from rpgcli.tokens import TokenStore

BLOCK_VALUES = 2**23
"""Values of checkpoints held at once where several are needed."""
IN_MEMORY = 2**26
"""Values of all checkpoints that are kept in memory, 256 MiB, so that each draw need not load them again."""


class Rows(Protocol):
    """K vectors (P,): a (K, P) tensor, or what loads row i when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Tensor: ...


class Moments:
    """Streaming mean and deviation of (P,) vectors in float64, shifted by the first one to keep digits."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, flat: Tensor) -> None:
        """Count one checkpoint, (P,)."""
        if self.count == 0:
            self.shift = flat.double()
            self.sum, self.squares = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        difference = flat.double() - self.shift
        self.sum += difference
        self.squares.addcmul_(difference, difference)
        self.count += 1

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """(P,) each, over all checkpoints counted; float64."""
        offset = self.sum / self.count
        return self.shift + offset, (self.squares / self.count - offset.square()).clamp(min=0)


Fresh = Callable[[torch.Generator], Tensor]
"""A newly initialised last layer: the last p coordinates of a network, (p,)."""


def no_layer(generator: torch.Generator) -> Tensor:
    """Where nobody knows which coordinates are the last layer's: none."""
    return torch.zeros(0)


@dataclass(frozen=True)
class Originals:
    """The seen checkpoints that networks are drawn from; nothing here ever changes them."""

    rows: Rows
    absolute: Tensor | float = 1.0
    """What 1 of a raw weight is in the coordinates of the rows, (P,); 1 where they are raw."""
    relative: Tensor | float = 1.0
    """What the deviation of a coordinate's tensor is in them, (P,)."""
    fresh: Fresh = no_layer
    """The last layer as at initialisation."""

    @property
    def num_rows(self) -> int:
        """K."""
        return len(self.rows)

    @cached_property
    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Of each coordinate, (P,) each; the deviation is the unbiased one, as in a sample covariance."""
        moments = Moments()
        for i in range(self.num_rows):
            moments.update(self.rows[i])
        mean, variance = moments.mean_and_variance()
        return mean.float(), (variance * self.num_rows / max(1, self.num_rows - 1)).sqrt().float()

    @cached_property
    def directions(self) -> Tensor:
        """Eigenvectors of the centred Gram matrix, (K, K), in its columns, the largest eigenvalue first."""
        mean, _ = self.mean_and_deviation
        gram = torch.zeros(self.num_rows, self.num_rows, dtype=torch.float64)
        for start, x in self.blocks():
            for other, y in self.blocks():
                if other <= start:
                    block = (x - mean).double() @ (y - mean).double().T
                    gram[start : start + len(x), other : other + len(y)] = block
        _, vectors = torch.linalg.eigh(gram, UPLO="L")  # Reads the lower triangle.
        directions: Tensor = vectors.flip(1)
        return directions

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The rows in order, some at a time: number of the first, and (n, P)."""
        size = max(1, BLOCK_VALUES // self.rows[0].numel())
        for start in range(0, self.num_rows, size):
            yield start, torch.stack([self.rows[i] for i in range(start, min(start + size, self.num_rows))])

    def combine(self, weights: Tensor) -> Tensor:
        """X^T w of weights (K,): (P,), reading the rows whose weight is not 0."""
        x = torch.zeros_like(self.rows[0])
        for i in weights.nonzero().flatten().tolist():
            x.add_(self.rows[i], alpha=float(weights[i]))
        return x

    def pick(self, generator: torch.Generator) -> Tensor:
        """A row at random, (P,)."""
        return self.rows[int(torch.randint(self.num_rows, (), generator=generator))]


Draw = Callable[[Originals, torch.Generator], Tensor]
"""One network, (P,)."""


# --- linear in the checkpoints ----------------------------------------------------------------------------------------


def average(originals: Originals, generator: torch.Generator) -> Tensor:
    """The mean of all, whatever the generator."""
    return originals.combine(torch.full((originals.num_rows,), 1 / originals.num_rows))


def average_trunk(originals: Originals, generator: torch.Generator) -> Tensor:
    """The mean of all with a new last layer: what the trunk is worth by itself."""
    return with_last_layer(originals.mean_and_deviation[0], originals.fresh(generator))


def with_last_layer(x: Tensor, layer: Tensor) -> Tensor:
    """A copy of a network, (P,), whose last coordinates are those of `layer`, (p,)."""
    return torch.cat([x[: len(x) - len(layer)], layer])


def soup(originals: Originals, generator: torch.Generator, *, size: int) -> Tensor:
    """The mean of `size` different ones (of all, where there are fewer)."""
    chosen = torch.randperm(originals.num_rows, generator=generator)[:size]
    return originals.combine(torch.zeros(originals.num_rows).index_fill(0, chosen, 1 / len(chosen)))


def interpolation(originals: Originals, generator: torch.Generator) -> Tensor:
    """u x_i + (1 - u) x_j of two different ones, u uniform in [0, 1)."""
    i, j = torch.randperm(originals.num_rows, generator=generator)[:2].tolist()
    weights = torch.zeros(originals.num_rows)
    weights[i] = torch.rand((), generator=generator)
    weights[j] = 1 - weights[i]
    return originals.combine(weights)


def gaussian_full(originals: Originals, generator: torch.Generator) -> Tensor:
    """N(mean, sample covariance): mean + Xc^T w / sqrt(K - 1), w ~ N(0, I_K), Xc the centred rows."""
    return originals.combine(around_mean(torch.randn(originals.num_rows, generator=generator)))


def gaussian_pca(originals: Originals, generator: torch.Generator, *, num_components: int) -> Tensor:
    """The same on the leading principal components: w = U g, U their left singular vectors, g ~ N(0, I)."""
    u = originals.directions[:, :num_components].float()  # (K, components)
    return originals.combine(around_mean(u @ torch.randn(u.shape[1], generator=generator)))


def around_mean(w: Tensor) -> Tensor:
    """Weights of mean + Xc^T w / sqrt(K - 1), (K,)."""
    return (w - w.mean()) / math.sqrt(len(w) - 1) + 1 / len(w)


# --- coordinate by coordinate -----------------------------------------------------------------------------------------


def gaussian(originals: Originals, generator: torch.Generator) -> Tensor:
    """N(mean, variance) of each coordinate by itself."""
    mean, deviation = originals.mean_and_deviation
    return torch.addcmul(mean, deviation, torch.randn(mean.shape, generator=generator))


def absolute_noise(originals: Originals, generator: torch.Generator, *, sigma: float) -> Tensor:
    """A checkpoint with noise of deviation `sigma` on its raw weights."""
    x = originals.pick(generator)
    return x + sigma * originals.absolute * torch.randn(x.shape, generator=generator)


def relative_noise(originals: Originals, generator: torch.Generator, *, sigma: float) -> Tensor:
    """A checkpoint with noise of `sigma` deviations of each tensor."""
    x = originals.pick(generator)
    return x + sigma * originals.relative * torch.randn(x.shape, generator=generator)


def kernel_density(originals: Originals, generator: torch.Generator) -> Tensor:
    """A row and Gaussian noise: bandwidth by Scott's rule, times each coordinate's deviation; for few coordinates."""
    _, deviation = originals.mean_and_deviation
    bandwidth: float = originals.num_rows ** (-1 / (len(deviation) + 4))
    return originals.pick(generator) + bandwidth * deviation * torch.randn(deviation.shape, generator=generator)


# --- the tables -------------------------------------------------------------------------------------------------------

GENERATORS: Mapping[str, Draw] = MappingProxyType(
    {
        "average": average,
        "average-trunk": average_trunk,
        "soup-4": partial(soup, size=4),
        "soup-16": partial(soup, size=16),
        "interpolation": interpolation,
        "gaussian": gaussian,
        "gaussian-full": gaussian_full,
        "gaussian-pca": partial(gaussian_pca, num_components=16),
        "noise-0.05": partial(relative_noise, sigma=0.05),
        "noise-0.1": partial(relative_noise, sigma=0.1),
        "noise-abs-0.06": partial(absolute_noise, sigma=0.06),
        "noise-abs-0.12": partial(absolute_noise, sigma=0.12),
    }
)
"""Of checkpoints, by name; the absolute noise is that of Zeng et al. (CVPR 2026) for p-diff."""
LATENT_GENERATORS: Mapping[str, Draw] = MappingProxyType(
    {"latent-gaussian": gaussian_full, "latent-kde": kernel_density}
)
"""Of latents, by name."""


def network(name: str, draw: Draw, originals: Originals, seed: int, i: int) -> Tensor:
    """Network i of the generator `name`, (P,): the same however many are drawn, and in whatever order."""
    return draw(originals, rng.stream(seed, "baseline", name, i))


@torch.no_grad()
def latent_generators(
    originals: Originals, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
) -> dict[str, Draw]:
    """The generators of latents, decoded: to be used beside `GENERATORS`.

    Args:
        originals: The checkpoints that are encoded, once.
        encode: (n, P) -> (n, Z).
        decode: (n, Z) -> (n, P).
    """
    latents = Originals(torch.cat([encode(x) for _, x in originals.blocks()]))

    def decoded(draw: Draw) -> Draw:
        @torch.no_grad()
        def through(_: Originals, generator: torch.Generator) -> Tensor:
            return decode(draw(latents, generator)[None])[0]

        return through

    return {name: decoded(draw) for name, draw in LATENT_GENERATORS.items()}


# --- from a token store -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreRows:
    """The standardised networks of a token store, each loaded when it is asked for."""

    store: TokenStore

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: int, /) -> Tensor:
        return self.store.vector(i)


def from_store(store: TokenStore) -> Originals:
    """Its checkpoints, in the standardised coordinates that generators learn from.

    A tensor's deviation is over its elements and all checkpoints. Running variances are logarithms here: noise leaves
    them positive, and an absolute 0.1 is about 10 %.
    """
    statistics, layout = store.statistics, store.layout
    scale = layout.ungrid(statistics.scale)
    rows: Rows = StoreRows(store)
    if len(store) * layout.num_parameters <= IN_MEMORY:
        rows = torch.stack([rows[i] for i in range(len(store))])
    mean, deviation = Originals(rows).mean_and_deviation
    raw_mean, raw_deviation = mean * scale + layout.ungrid(statistics.mean), deviation * scale
    sizes = [spec.numel for spec in layout.generated]
    pooled = [
        (s.double().square().mean() + m.double().var(correction=0)).sqrt().float().expand(len(m))
        for m, s in zip(raw_mean.split(sizes), raw_deviation.split(sizes))
    ]
    return Originals(rows, absolute=1 / scale, relative=torch.cat(pooled) / scale, fresh=last_layer(store))


def last_layer(store: TokenStore) -> Fresh:
    """Draws the last layer of a store's networks as torch initialises linear, convolutional and norm layers.

    Weights and biases of the first two are uniform within 1 / sqrt(fan-in); a norm layer scales by 1 and adds 0.
    """
    last = store.layout.generated[-1].name.rpartition(".")[0]
    specs = [spec for spec in store.layout.generated if spec.name.rpartition(".")[0] == last]
    fan_in = max(math.prod(spec.shape[1:]) for spec in specs)
    is_norm = all(len(spec.shape) == 1 for spec in specs)

    def draw(generator: torch.Generator) -> Tensor:
        state = store.state(0)
        for spec in specs:
            value = (2 * torch.rand(spec.shape, generator=generator) - 1) / math.sqrt(fan_in)
            if is_norm:
                value = torch.full(spec.shape, float(not spec.name.endswith(("bias", "mean"))))
            state[spec.name] = value.to(state[spec.name].dtype)
        return store.vector_of(state)[-sum(spec.numel for spec in specs) :]

    return draw

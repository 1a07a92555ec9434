"""Trained networks trained a little further: a trivial generator.

Letters: n training images.
"""

from collections.abc import Iterator, Sequence

import torch

from rpgcli import rng
from rpgcli.collection import Feed, Numbers, OptimiserConfig, Single, Stacked, train
from rpgcli.evaluation.audit import MEASURED_AT_ONCE
from rpgcli.problem import Problem, State
from rpgcli.progress import silent
from rpgcli.subsets import Tail
from rpgcli.zoo import Zoo


def finetuned(
    problem: Problem, zoo: Zoo, config: OptimiserConfig, *, tail: Tail | None, seed: int, count: int
) -> Iterator[State]:
    """`count` trained networks, drawn at random and trained a little further; of a zoo of subsets the subset alone."""
    seen = zoo.select("seen")
    drawn = torch.randint(len(seen), (count,), generator=rng.stream(seed, "baseline", "finetuned")).tolist()
    size = MEASURED_AT_ONCE if tail is None and problem.config.target.batched else 1
    for first in range(0, count, size):
        numbers = range(first, min(first + size, count))
        starts = [zoo.state(seen[drawn[i]]) for i in numbers]
        names = [f"finetuned {i}" for i in numbers]
        for state in trained_on(problem, starts, names, config, tail=tail, seed=seed):
            yield {**zoo.shared, **state}


def trained_on(
    problem: Problem, starts: Sequence[State], names: Sequence[str], config: OptimiserConfig,
    *, tail: Tail | None, seed: int,
) -> list[State]:  # fmt: skip
    """The networks that training makes of `starts`; each draws from the streams that carry its name."""
    labels = problem.labels("train", [None] * len(starts))  # (N, n)
    feed: Feed = Feed(problem, seed, names)
    networks: Stacked | Single | Tail
    if tail is not None:
        tail.load(starts[0])
        networks = tail
        feed = Numbers(problem, seed, names) if problem.config.dataset.augment == "none" else feed
    else:
        networks = Stacked(problem, starts) if problem.config.target.batched else Single(problem, starts[0])
    steps = config.num_steps(labels.shape[1])
    (snapshot,) = train(networks, labels, feed, config, save_at=[steps], on_step=silent)
    return list(snapshot.states)

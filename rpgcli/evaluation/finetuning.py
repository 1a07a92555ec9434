"""Trained networks trained a little further: a trivial generator.

Letters: n training images.
"""

from collections.abc import Iterator, Sequence

import torch

from rpgcli import rng
from rpgcli.collection import Feed, Learner, Numbers, OptimiserConfig, Single, Stacked, train
from rpgcli.evaluation.audit import MEASURED_AT_ONCE
from rpgcli.problem import Problem, State
from rpgcli.progress import silent
from rpgcli.subsets import StackedTail, Tail
from rpgcli.tokens import TokenStore


def finetuned(
    problem: Problem, store: TokenStore, config: OptimiserConfig, *, tail: Tail | None, seed: int, count: int
) -> Iterator[State]:
    """`count` trained networks, drawn at random and trained a little further; of a zoo of subsets the subset alone."""
    size = at_once(problem, tail, config)
    for first in range(0, count, size):
        numbers = range(first, min(first + size, count))
        starts = [original(store, seed, i) for i in numbers]
        yield from trained_on(problem, starts, [None] * len(starts), numbers, config, tail=tail, seed=seed)


def original(store: TokenStore, seed: int, i: int) -> State:
    """The network that number i of one question starts from: any, drawn at random."""
    return store.state(int(torch.randint(len(store), (), generator=rng.stream(seed, "baseline", "finetuned", i))))


def trained_on(
    problem: Problem, starts: Sequence[State], tasks: Sequence[str | None], numbers: Sequence[int],
    config: OptimiserConfig, *, tail: Tail | None, seed: int,
) -> list[State]:  # fmt: skip
    """The networks that training for `tasks` makes of `starts`; each draws from the streams that carry its number."""
    networks, feed = to_train(problem, starts, [f"finetuned {i}" for i in numbers], tail=tail, seed=seed)
    labels = problem.labels("train", tasks)  # (N, n)
    steps = config.num_steps(labels.shape[1])
    (snapshot,) = train(networks, labels, feed, config, save_at=[steps], on_step=silent)
    return [{**start, **state} for start, state in zip(starts, snapshot.states)]


def to_train(
    problem: Problem, starts: Sequence[State], names: Sequence[str], *, tail: Tail | None, seed: int
) -> tuple[Learner, Feed]:
    """Networks as they start, ready to be trained side by side, and which images they see when."""
    if tail is not None:
        feed = (Numbers if problem.config.dataset.augment == "none" else Feed)(problem, seed, names)
        if len(starts) > 1:
            return StackedTail(tail, starts), feed
        tail.load(starts[0])
        return tail, feed
    networks = Stacked(problem, starts) if problem.config.target.batched else Single(problem, starts[0])
    return networks, Feed(problem, seed, names)


def at_once(problem: Problem, tail: Tail | None, config: OptimiserConfig, num: int = MEASURED_AT_ONCE) -> int:
    """How many of `num` networks are trained side by side: small ones many at once, others one after another."""
    num = min(num, MEASURED_AT_ONCE)
    if tail is not None:
        return tail.num_at_once(config.batch_size, num) if problem.config.dataset.augment == "none" else 1
    return num if problem.config.target.batched else 1

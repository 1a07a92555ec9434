"""Are generated networks good, and are they new? One row of figures for each group of networks.

    accuracy          mean, percentiles, the best (chosen on validation images), gain of a majority vote
    error IoU         of wrong test answers: inside the group, and with the most similar training network
    disagreement      with the nearest training network, in units of the training networks' own
    distance          of standardised parameters to the nearest training network, in units of tau
    N&P               how many are good and at least m tau away

For networks that all answer the same question: of zoos of tasks, only the distance has a meaning.

Letters: n networks of a group, K training networks, N test images, P parameters, p of them looked at.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rpgcli.alignment import Neighbours
from rpgcli.evaluation import accuracy, distance, novelty, similarity
from rpgcli.problem import Problem, Split, State
from rpgcli.subsets import Tail
from rpgcli.tokens import TokenStore

MEASURED_AT_ONCE = 64
"""Small networks measured together."""
LOOKED_AT = 2**26
"""Values of all training networks that distances are computed from; of larger zoos, every so manieth coordinate."""


def answering_store(problem: Problem, store: TokenStore) -> Problem | Tail:
    """What measures the networks of a store: where they share frozen tensors, these are computed only once."""
    if not store.layout.shared:
        return problem
    names = [spec.name for spec in store.layout.generated]
    return Tail(problem, store.state(0), names)


@dataclass(frozen=True)
class Look:
    """What is seen of a group."""

    answers: Tensor
    """Test answers, (n, N)."""
    validation: list[float]
    """Accuracies on validation images: what a network may be chosen by."""
    test: list[float]
    vectors: Tensor
    """Standardised parameters, (n, p)."""
    states: list[State]
    """The networks themselves, where they have hidden units to be aligned."""


class Auditor:
    """Compares groups with the training networks.

    Args:
        problem: One question for all networks.
        store: The training networks.
    """

    def __init__(self, problem: Problem, store: TokenStore) -> None:
        self.problem, self.store = problem, store
        self.measure = answering_store(problem, store)
        self.stride = -(-len(store) * store.layout.num_parameters // LOOKED_AT)
        is_aligned = store.artifact.facts.get("align", "none") != "none"
        self.groups = problem.config.target.symmetries(problem.skeleton) if is_aligned else ()
        self.trained = self.look(self.drawn(store.vector(i)) for i in range(len(store)))
        self.wrong = self.trained.answers != self.labels("test")
        self.alpha = novelty.alpha(torch.tensor(self.trained.test))
        runs = torch.tensor([int(str(checkpoint["run"])) for checkpoint in store.checkpoints])
        self.own_distances = self.leave_one_out(runs)
        self.tau = distance.tau(self.own_distances) if self.own_distances is not None else None
        self.own_disagreement = similarity.disagreement(self.trained.answers, self.trained.answers)

    def labels(self, split: Split) -> Tensor:
        """Right answers, (N,)."""
        return self.problem.labels(split, [None])[0].cpu()

    def look(self, networks: Iterable[tuple[State, Tensor]]) -> Look:
        """Measure networks, each with its vector, some at a time."""
        size = MEASURED_AT_ONCE if self.problem.config.target.batched else 1
        answers: dict[Split, list[Tensor]] = {"validation": [], "test": []}
        vectors, states = [], []
        for chunk in chunks(networks, size):
            for split, parts in answers.items():
                parts.append(self.measure.predictions([state for state, _ in chunk], split).cpu())
            vectors += [vector for _, vector in chunk]
            states += [state for state, _ in chunk] if self.groups else []
        right = {s: (torch.cat(parts) == self.labels(s)).double().mean(1).tolist() for s, parts in answers.items()}
        return Look(torch.cat(answers["test"]), right["validation"], right["test"], torch.stack(vectors), states)

    def drawn(self, x: Tensor) -> tuple[State, Tensor]:
        """A network from its standardised parameters, (P,); only what varies, where no more is looked at."""
        whole = self.store.rebuilt if self.measure is self.problem else self.store.varying
        return whole(x), x[:: self.stride].clone()

    def read(self, state: State) -> tuple[State, Tensor]:
        """A network with its vector."""
        return state, self.store.vector_of(state)[:: self.stride].clone()

    def distances(self, look: Look) -> Tensor:
        """Of each network to the nearest training network, (n,); hidden units aligned where they may be exchanged."""
        if not self.groups:
            return distance.nearest(look.vectors, self.trained.vectors).distance
        return self.neighbours.nearest(look.states)[0]

    def leave_one_out(self, runs: Tensor) -> Tensor | None:
        """The same of the training networks among those of other trainings, (K,); None where there is one training.

        Neighbours on one trajectory are an optimiser step apart, which says nothing of how far networks are.
        """
        if len(runs.unique()) < 2:
            return None
        if not self.groups:
            return distance.nearest(self.trained.vectors, runs=runs).distance
        return self.neighbours.nearest(self.trained.states, may_be_near=runs[:, None] != runs)[0]

    @cached_property
    def neighbours(self) -> Neighbours:
        """The training networks, where hidden units may be exchanged."""
        return Neighbours(self.trained.states, self.groups, lambda state: self.read(state)[1])

    def row(self, look: Look, *, is_trained: bool = False) -> dict[str, Any]:
        """The figures of a group, beside its accuracy."""
        wrong = look.answers != self.labels("test")
        iou = similarity.error_iou(wrong, self.wrong)  # (n, K)
        inside = iou if is_trained else similarity.error_iou(wrong, wrong)
        disagreement = (
            self.own_disagreement if is_trained else similarity.disagreement(look.answers, self.trained.answers)
        )
        index, best = accuracy.best(look.validation, look.test)
        has_neighbour = not is_trained or len(look.test) > 1
        figures: dict[str, Any] = {
            "percentiles": accuracy.percentiles(look.test),
            "best": {"index": index, "validation": look.validation[index], "test": best},
            "vote_gain": accuracy.vote_gain(look.answers, self.labels("test")),
            "error_iou": {
                "within": similarity.within(inside),
                "nearest": float(similarity.nearest(iou, same=is_trained).mean()) if has_neighbour else None,
                "minimal_similarity": None if is_trained else similarity.minimal_similarity(iou),
            },
        }
        if is_trained:
            distances = self.own_distances
        else:
            distances = self.distances(look)
            disagreement = similarity.disagreement(look.answers, self.trained.answers)  # (n, K)
            figures["functional_novelty"] = similarity.functional_novelty(disagreement, self.own_disagreement)
        if distances is not None:
            figures["distance"] = {**similarity.spread(distances), "median": float(distances.quantile(0.5))}
            if self.tau is not None:
                figures["distance"]["in_tau"] = float(distances.quantile(0.5)) / self.tau
                shares = novelty.profile(torch.tensor(look.test), distances, alpha=self.alpha, tau=self.tau)
                figures["np"] = [share.to_json() for share in shares]
        return figures

    def scale(self) -> dict[str, Any]:
        """The units of the figures."""
        return {"tau": self.tau, "alpha": self.alpha, "coordinates": self.trained.vectors.shape[1]}


def chunks(networks: Iterable[tuple[State, Tensor]], size: int) -> Iterator[list[tuple[State, Tensor]]]:
    """Some at a time."""
    chunk: list[tuple[State, Tensor]] = []
    for network in networks:
        chunk.append(network)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

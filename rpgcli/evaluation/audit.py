"""Are generated networks good, and are they new? One row of figures for each group of networks.

    accuracy          mean, percentiles, the best (chosen on validation images), gain of a majority vote
    calibration       negative log-likelihood and expected calibration error
    error IoU         of wrong test answers: inside the group, and with the most similar training network
    disagreement      of test answers: inside the group, and with the training network that answers most alike
    distance          of standardised parameters and of raw weights to the nearest training network, in units of tau
    N&P               how many are good and at least m tau away

Of zoos of tasks only accuracy, calibration and distance have a meaning: their networks answer different questions.

Letters: n networks of a group, K training networks, N test images, C classes, p coordinates looked at.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rpgcli.errors import ArtifactError, LayoutError
from rpgcli.evaluation import accuracy, novelty, similarity
from rpgcli.evaluation.calibration import expected_calibration_error, negative_log_likelihood
from rpgcli.evaluation.groups import standard_error
from rpgcli.evaluation.novelty import Novelty
from rpgcli.evaluation.space import Space
from rpgcli.imports import match_network
from rpgcli.problem import Problem, State
from rpgcli.subsets import Tail
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Network, Zoo

MEASURED_AT_ONCE = 64
"""Small networks measured together."""


def answering_store(problem: Problem, store: TokenStore) -> Problem | Tail:
    """What measures the networks of a store: where they share frozen tensors, these are computed only once."""
    if not store.layout.shared:
        return problem
    names = [spec.name for spec in store.layout.generated]
    return Tail(problem, store.state(0), names)


@dataclass(frozen=True)
class Candidate:
    """A network to be looked at."""

    state: State
    """Where networks share frozen tensors, the others alone will do."""
    task: str | None = None
    file: str = ""
    """What it is called."""


@dataclass(frozen=True)
class Seen:
    """What is seen of one network."""

    candidate: Candidate
    """Without its state, unless hidden units may be exchanged."""
    answers: Tensor
    """To test images, (N,)."""
    validation: float
    """Accuracy on validation images, by which a network may be chosen."""
    test: float
    """Accuracy on test images."""
    nll: float
    """Negative log-likelihood of test labels, in nats."""
    ece: float
    """Expected calibration error on test images."""
    x: Tensor | None
    """Standardised parameters, (p,); None of training networks, whose places the space knows."""
    raw: Tensor | None
    """Raw weights, (p,)."""


@dataclass(frozen=True)
class Look:
    """What is seen of a group."""

    seen: Sequence[Seen]
    """The networks that work, in order."""
    failed: Sequence[str] = ()
    """Files of the others: NaN or infinity in their parameters or answers."""

    @cached_property
    def answers(self) -> Tensor:
        """(n, N)."""
        return torch.stack([one.answers for one in self.seen])

    @property
    def test(self) -> list[float]:
        """Accuracies on test images."""
        return [one.test for one in self.seen]

    @property
    def tasks(self) -> list[str | None]:
        """What each network is asked."""
        return [one.candidate.task for one in self.seen]

    @property
    def states(self) -> list[State]:
        """The networks themselves."""
        return [one.candidate.state for one in self.seen]

    @property
    def x(self) -> Tensor:
        """(n, p)."""
        return torch.stack([one.x for one in self.seen if one.x is not None])

    @property
    def raw(self) -> Tensor:
        """(n, p)."""
        return torch.stack([one.raw for one in self.seen if one.raw is not None])


@dataclass(frozen=True)
class Row:
    """A group, compared with the training networks."""

    look: Look
    figures: dict[str, Any]
    """For the report, beside the accuracies."""
    distances: Tensor | None = None
    """To the nearest training network, (n,); of training networks to one of another training."""
    disagreement: Tensor | None = None
    """With the training network that answers most alike, (n,)."""
    novelty: Novelty | None = None
    """Of networks that answer the same question as all."""


# --- any networks -----------------------------------------------------------------------------------------------------


class Auditor:
    """Measures groups and compares them with the training networks.

    Args:
        problem: What is asked of networks.
        store: The training networks.
        zoo: The same as they were trained.
    """

    def __init__(self, problem: Problem, store: TokenStore, zoo: Zoo) -> None:
        self.problem, self.store = problem, store
        self.measure = answering_store(problem, store)
        self.space = Space(problem, store, zoo)

    def drawn(self, x: Tensor, name: str) -> Candidate:
        """A network from its standardised parameters, (P,)."""
        return Candidate((self.store.rebuilt if self.measure is self.problem else self.store.varying)(x), file=name)

    def candidate(self, folder: Zoo, network: Network, state: State) -> Candidate:
        """A network of a folder, from its state dict.

        Raises:
            LayoutError: If it is of another architecture than the training networks, or does not share what they do.
        """
        path = folder.artifact.path / network.file
        try:
            state = match_network(state, self.problem.reference)
        except LayoutError as error:
            raise LayoutError(f"{path}: {error.what}", *error.advice) from None
        for name, value in self.store.shared.items():
            if torch.equal(state[name], value):
                del state[name]
            elif bool(state[name].isfinite().all()):
                raise LayoutError(
                    f"{path}: {name} is not what all training networks share.",
                    "They vary in some parameters only: compare them with networks that vary in the same.",
                )
        return Candidate(state, network.task_bits, network.file)

    def look(self, candidates: Iterable[Candidate], *, placed: bool = True) -> Look:
        """Measure networks, some at a time; where they lie only if `placed`."""
        seen: list[Seen] = []
        failed: list[str] = []
        for chunk in chunks(candidates, MEASURED_AT_ONCE if self.problem.config.target.batched else 1):
            finite = [self.is_finite(one.state) for one in chunk]
            found = iter(self.measured([one for one, is_finite in zip(chunk, finite) if is_finite], placed=placed))
            for candidate, is_finite in zip(chunk, finite):
                one = next(found) if is_finite else None
                if one is None:
                    failed.append(candidate.file)
                else:
                    seen.append(one)
        return Look(seen, failed)

    def is_finite(self, state: State) -> bool:
        """Whether no value is NaN or infinite; what all networks share is not looked at again."""
        shared = self.store.shared
        return all(value is shared.get(name) or bool(value.isfinite().all()) for name, value in state.items())

    def measured(self, candidates: Sequence[Candidate], *, placed: bool) -> Iterator[Seen | None]:
        """What is seen of finite networks; None where answers are not finite."""
        if not candidates:
            return
        states, tasks = [one.state for one in candidates], [one.task for one in candidates]
        validation = self.measure.accuracy(states, tasks, "validation").tolist()
        labels = self.problem.labels("test", tasks)  # (n, N)
        done = 0
        for logits in self.measure.logits_of(states, "test"):  # (k, N, C)
            y = labels[done : done + len(logits)]
            answers = logits.argmax(-1)
            right, is_finite = (answers == y).double().mean(1), logits.isfinite().flatten(1).all(1).tolist()
            columns = [right, negative_log_likelihood(logits, y), expected_calibration_error(logits, y)]
            figures = torch.stack(columns, 1).tolist()  # (k, 3)
            for i, answer in enumerate(answers.cpu()):
                if not is_finite[i]:
                    yield None
                    continue
                candidate = candidates[done + i]
                x, raw = self.space.place(candidate.state) if placed else (None, None)
                kept = candidate if self.space.groups and placed else replace(candidate, state={})
                test, nll, ece = figures[i]
                yield Seen(kept, answer.clone(), validation[done + i], test, nll, ece, x, raw)
            done += len(logits)

    def row(self, look: Look) -> Row:
        """The figures of a group, beside its accuracy."""
        if not look.seen:
            return Row(look, {})
        distances = self.space.distances(look.x, look.states)
        apart = self.distance_figures(distances, self.space.raw_distances(look.raw))
        return Row(look, {"calibration": calibration(look), "distance": apart}, distances)

    def distance_figures(self, distances: Tensor, raw: Tensor) -> dict[str, Any]:
        """Of distances to the nearest training network, (n,) each, in standardised parameters and raw weights."""

        def figures(values: Tensor, tau: float | None) -> dict[str, float]:
            median = float(values.quantile(0.5))
            return {**similarity.spread(values), "median": median, **({} if tau is None else {"in_tau": median / tau})}

        return {**figures(distances, self.space.tau), "raw": figures(raw, self.space.tau_raw)}

    def scale(self) -> dict[str, Any]:
        """The units of the figures."""
        space = self.space
        return {"tau": space.tau, "tau_raw": space.tau_raw, "coordinates": space.x.shape[1]}


# --- networks that all answer the same question -----------------------------------------------------------------------


class OneQuestion(Auditor):
    """Compares also what networks answer."""

    def __init__(self, problem: Problem, store: TokenStore, zoo: Zoo) -> None:
        super().__init__(problem, store, zoo)
        self.labels = problem.labels("test", [None])[0].cpu()  # (N,)
        names = [str(checkpoint.get("file", i)) for i, checkpoint in enumerate(store.checkpoints)]
        look = self.look((self.drawn(store.vector(i), name) for i, name in enumerate(names)), placed=False)
        if look.failed:
            raise ArtifactError(
                f"training network {look.failed[0]} answers NaN or infinity to test images.",
                "Remove it from the zoo, and tokenize and train again.",
            )
        self.answers = look.answers  # (K, N)
        self.wrong = self.answers != self.labels
        self.alpha = novelty.alpha(torch.tensor(look.test))
        self.own_disagreement = similarity.disagreement(self.answers, self.answers)  # (K, K)
        self.trained = self._trained(look)

    def row(self, look: Look) -> Row:
        """The figures of a group, beside its accuracy."""
        found = super().row(look)
        if found.distances is None:
            return found
        wrong = look.answers != self.labels
        iou = similarity.error_iou(wrong, self.wrong)  # (n, K)
        unlike = similarity.disagreement(look.answers, self.answers)  # (n, K)
        most_alike, disagreement = similarity.nearest(iou), -similarity.nearest(-unlike)
        figures = found.figures | self._answering(look) | {
            "error_iou": {
                "within": similarity.within(similarity.error_iou(wrong, wrong)),
                **mean_and_error("nearest", most_alike),
                "minimal_similarity": similarity.minimal_similarity(iou),
            },
            "disagreement": {
                "within": self._within(similarity.disagreement(look.answers, look.answers)),
                "nearest": similarity.spread(disagreement),
            },
            "functional_novelty": similarity.functional_novelty(unlike, self.own_disagreement),
            **self._profile(look, found.distances),
        }  # fmt: skip
        tau = self.space.tau
        in_tau = None if tau is None else (found.distances / tau).tolist()
        return replace(found, figures=figures, disagreement=disagreement, novelty=Novelty(most_alike.tolist(), in_tau))

    def scale(self) -> dict[str, Any]:
        """The units of the figures."""
        return super().scale() | {"alpha": self.alpha}

    def _trained(self, look: Look) -> Row:
        """The row of the training networks, each compared with the others."""
        figures: dict[str, Any] = {"calibration": calibration(look), **self._answering(look)}
        iou: dict[str, Any] = {"within": None, "nearest": None, "nearest_se": None}
        alike: dict[str, Any] = {"within": None, "nearest": None}
        disagreement = None
        if len(look.seen) > 1:
            matrix = similarity.error_iou(self.wrong, self.wrong)  # (K, K)
            disagreement = -similarity.nearest(-self.own_disagreement, same=True)  # (K,)
            nearest = mean_and_error("nearest", similarity.nearest(matrix, same=True))
            iou = {"within": similarity.within(matrix), **nearest}
            alike = {"within": self._within(self.own_disagreement), "nearest": similarity.spread(disagreement)}
        figures |= {"error_iou": iou | {"minimal_similarity": None}, "disagreement": alike}
        own, raw = self.space.own, self.space.own_raw
        if own is not None and raw is not None:
            figures["distance"] = self.distance_figures(own, raw)
            figures |= self._profile(look, own)
        return Row(look, figures, own, disagreement)

    def _answering(self, look: Look) -> dict[str, Any]:
        """What accuracies say beyond their mean."""
        validation = [one.validation for one in look.seen]
        index, best = accuracy.best(validation, look.test)
        return {
            "percentiles": accuracy.percentiles(look.test),
            "best": {"index": index, "validation": validation[index], "test": best},
            "vote_gain": accuracy.vote_gain(look.answers, self.labels),
        }

    def _within(self, unlike: Tensor) -> dict[str, float] | None:
        """Of a group's own disagreement, (n, n); None of a single network."""
        return similarity.spread(similarity.pairs(unlike)) if len(unlike) > 1 else None

    def _profile(self, look: Look, distances: Tensor) -> dict[str, Any]:
        """N&P, where tau means something."""
        if self.space.tau is None:
            return {}
        shares = novelty.profile(torch.tensor(look.test), distances, alpha=self.alpha, tau=self.space.tau)
        return {"np": [share.to_json() for share in shares]}


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """`name` and `name_se`."""
    return {name: float(values.mean(dtype=torch.float64)), f"{name}_se": standard_error(values.tolist())}


def calibration(look: Look) -> dict[str, float]:
    """Means over networks and their standard errors."""
    nll, ece = torch.tensor([[one.nll, one.ece] for one in look.seen], dtype=torch.float64).T
    return mean_and_error("nll", nll) | mean_and_error("ece", ece)


def chunks(candidates: Iterable[Candidate], size: int) -> Iterator[list[Candidate]]:
    """Some at a time."""
    chunk: list[Candidate] = []
    for candidate in candidates:
        chunk.append(candidate)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

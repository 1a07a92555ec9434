"""What a generated set is: copies of the training networks, noise, their average, or as new as a further training.

    copies      within a hundredth of the zoo's extent of a training network, as both stand in their files
    relocated   the same once hidden units are aligned
    chance      no better than the best constant answer, to two standard errors
    average     within a tenth of the extent of the mean of the training networks
    new         good, and no nearer to the training networks, in parameters and in answers, than nine of ten of these
                are to those of another training; never said of a zoo of one training

The extent is the root of the mean square distance of training networks from their mean: a hundredth of it is a
ten-thousandth of their variance, and a thousand times the rounding of float32. Each network is the first of these that
it is; a set is what most of its networks are.

Letters: n generated networks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rpgcli.evaluation import accuracy, distance
from rpgcli.evaluation.audit import Auditor, OneQuestion, Row

COPY = 0.01
"""Distance within which a network is a copy, as a fraction of the zoo's extent."""
AVERAGE = 0.1
"""Distance from the mean within which a network is the average, the same."""
USUAL = 0.1
"""Fraction of training networks that are nearer to each other than a network as new as they are may be."""
WORDS: Mapping[str, str] = MappingProxyType(
    {
        "copies": "copies of training networks",
        "relocated": "copies of training networks with hidden units exchanged",
        "chance": "at chance",
        "average": "the average of the training networks",
        "new": "as new as a further training",
    }
)
"""What networks of each kind are, in the order in which it is asked."""
INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "copies": "the training networks themselves",
        "relocated": "the training networks themselves",
        "chance": "guessing",
    }
)
"""What would do as well as a set of some kinds."""


@dataclass(frozen=True)
class Finding:
    """How many of the judged networks are of one kind."""

    kind: str
    count: int
    of: int

    @property
    def is_most(self) -> bool:
        """Whether the set is of this kind."""
        return 2 * self.count > self.of

    @property
    def words(self) -> str:
        """`all copies of training networks`, `17 of them at chance`."""
        if self.of == 1:
            return WORDS[self.kind]
        return f"{'all' if self.count == self.of else f'{self.count} of them'} {WORDS[self.kind]}"

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        one = self.count == 1
        sentence = f"{self.count} of {self.of} generated networks {'is' if one else 'are'} {WORDS[self.kind]}."
        return {**asdict(self), "sentence": sentence}


def find(auditor: Auditor, row: Row) -> list[Finding]:
    """The kinds that any of the generated networks are of, in the order of `WORDS`."""
    if not row.look.seen:
        return []
    left = torch.ones(len(row.look.seen), dtype=torch.bool)
    found = []
    for kind, flags in kinds(auditor, row).items():
        if count := int((left & flags).sum()):
            found.append(Finding(kind, count, len(flags)))
        left &= ~flags
    return found


def summary(findings: Sequence[Finding]) -> tuple[str, str]:
    """What a set is that is mostly of one kind, in a few words, and what would do as well; empty where nothing is."""
    most = next((finding for finding in findings if finding.is_most), None)
    return ("", "") if most is None else (most.words, INSTEAD.get(most.kind, ""))


def kinds(auditor: Auditor, row: Row) -> dict[str, Tensor]:
    """Which networks are of each kind, (n,) bool."""
    look, space = row.look, auditor.space
    assert row.distances is not None, "there are networks"
    extent = distance.extent(space.x)
    accuracies = torch.tensor(look.test, dtype=torch.float64)
    near = row.distances <= COPY * extent
    same = space.file_distances(look.states) <= COPY * distance.extent(space.files) if space.groups else near
    return {
        "copies": same,
        "relocated": near,
        "chance": accuracy.at_chance(accuracies, auditor.problem.labels("test", look.tasks).cpu()),
        "average": (look.x - space.average).double().norm(dim=1) <= AVERAGE * extent,
        "new": is_new(auditor, row) if isinstance(auditor, OneQuestion) else torch.zeros(len(look.seen)).bool(),
    }


def is_new(auditor: OneQuestion, row: Row) -> Tensor:
    """Which networks are good, far, and answer like nobody else, (n,); none where there is one training."""
    good = torch.tensor(row.look.test) >= auditor.alpha
    own, own_disagreement = auditor.space.own, auditor.trained.disagreement
    if own is None or own_disagreement is None or row.distances is None or row.disagreement is None:
        return torch.zeros_like(good)
    far = row.distances >= own.quantile(USUAL)
    unlike = row.disagreement >= own_disagreement.quantile(USUAL)
    return good & far & unlike

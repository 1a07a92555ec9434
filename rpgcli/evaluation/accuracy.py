"""What a group's accuracies say beyond their mean: percentiles, the best network, and what a vote adds."""

from collections.abc import Sequence

import torch
from torch import Tensor

PERCENTILES = (10, 25, 50, 75, 90)
"""Those reported."""


def percentiles(accuracies: Sequence[float]) -> dict[str, float]:
    """`p10` to `p90` of at least one accuracy, linear between neighbours."""
    values = torch.tensor(accuracies, dtype=torch.float64)
    return {f"p{q}": float(values.quantile(q / 100)) for q in PERCENTILES}


def best(selection: Sequence[float], test: Sequence[float]) -> tuple[int, float]:
    """The network with the highest accuracy on the split it is selected on, and its accuracy on test images.

    Args:
        selection: Accuracies on training or validation images; the first of equals is taken.
        test: Accuracies of the same networks on test images, which choose nothing.
    """
    assert len(selection) == len(test), "the same networks"
    index = max(range(len(selection)), key=selection.__getitem__)
    return index, test[index]


def vote(answers: Tensor) -> Tensor:
    """The class that most networks predict, (N,) of (n, N); the lowest of equals."""
    num_images, num_classes = answers.shape[1], int(answers.max()) + 1
    places = answers + num_classes * torch.arange(num_images, device=answers.device)  # (n, N)
    counts = places.flatten().bincount(minlength=num_images * num_classes)
    return counts.view(num_images, num_classes).argmax(1)  # The first of equals, as torch promises.


def vote_gain(answers: Tensor, labels: Tensor) -> float:
    """Accuracy of the majority vote minus the mean accuracy of its members.

    Args:
        answers: The class that each network predicts, (n, N).
        labels: (N,).
    """
    mean = (answers == labels).double().mean()
    return float((vote(answers) == labels).double().mean() - mean)


def guess(labels: Tensor) -> Tensor:
    """Accuracy of the best constant answer, (n,) float64, to labels (n, N)."""
    return torch.stack([(labels == c).double().mean(1) for c in labels.unique()]).amax(0)


def at_chance(accuracies: Tensor, labels: Tensor) -> Tensor:
    """Whether networks are no better than the best constant answer, to two binomial standard errors, (n,).

    Args:
        accuracies: (n,).
        labels: (n, N).
    """
    p = guess(labels)
    return accuracies <= p + 2 * (p * (1 - p) / labels.shape[1]).sqrt()

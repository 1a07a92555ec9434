"""How alike networks answer: error IoU and disagreement of predictions.

Each is a matrix over pairs of networks, made of matrix products over blocks of images. What a group says about itself
(`within`) and about a zoo (`nearest`) is read off that matrix.

Letters: A and B networks, N images, C classes.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK_COLUMNS = 4096
"""Columns of the 0-1 matrices multiplied at once: images, or images times classes."""
LOW_PERCENTILE = 10
"""Shows a tail of near-copies that a mean hides."""


# --- over pairs of networks -------------------------------------------------------------------------------------------


def error_iou(wrong_a: Tensor, wrong_b: Tensor) -> Tensor:
    """Images that both networks of a pair get wrong, as a fraction of those that either gets wrong, (A, B).

    Exactly 1 where neither errs: no epsilon, unlike the code of Zeng et al. (CVPR 2026), which gives 0 there.

    Args:
        wrong_a: Where each network's answer is wrong, (A, N) bool.
        wrong_b: The same for the others, (B, N).
    """
    both = wrong_a.new_zeros(len(wrong_a), len(wrong_b), dtype=torch.float32)  # Counts, exact below 2^24 images.
    for a, b in zip(wrong_a.split(BLOCK_COLUMNS, 1), wrong_b.split(BLOCK_COLUMNS, 1)):
        both += a.float() @ b.float().T  # (A, B)
    either = wrong_a.sum(1)[:, None] + wrong_b.sum(1) - both  # (A, B)
    return torch.where(either > 0, both / either, 1.0)


def disagreement(answers_a: Tensor, answers_b: Tensor) -> Tensor:
    """Fraction of images that the two networks of a pair answer differently, (A, B).

    Args:
        answers_a: The class that each network predicts, (A, N) of integers in [0, C).
        answers_b: The same for the others, (B, N).
    """
    classes = torch.arange(int(max(answers_a.max(), answers_b.max())) + 1, device=answers_a.device)  # (C,)
    equal = torch.zeros(len(answers_a), len(answers_b), device=answers_a.device)
    num_images = max(1, BLOCK_COLUMNS // len(classes))
    for a, b in zip(answers_a.split(num_images, 1), answers_b.split(num_images, 1)):
        one_hot_a = (a[..., None] == classes).flatten(1).float()  # (A, n C)
        one_hot_b = (b[..., None] == classes).flatten(1).float()  # (B, n C)
        equal += one_hot_a @ one_hot_b.T  # (A, B)
    return 1 - equal / answers_a.shape[1]


# --- read off such a matrix -------------------------------------------------------------------------------------------


def pairs(matrix: Tensor) -> Tensor:
    """Above the diagonal of a group's own matrix, (A, A): each pair of different networks once, (A (A - 1) / 2,)."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu(1)]


def within(matrix: Tensor) -> float | None:
    """Mean over pairs of different networks of a group's own matrix, (A, A); None for a single network."""
    return float(pairs(matrix).mean(dtype=torch.float64)) if len(matrix) > 1 else None


def nearest(similarity: Tensor, *, same: bool = False) -> Tensor:
    """Similarity of each network to the most similar one of the others, (A,) of (A, B).

    Args:
        similarity: Larger is more alike: `error_iou`, or `-disagreement`.
        same: The others are the networks themselves, of which there are several; a network is no neighbour of itself.
    """
    if same:
        assert len(similarity) > 1, "a single network has no neighbour"
        similarity = similarity.clone().fill_diagonal_(-torch.inf)
    return similarity.amax(1)


def minimal_similarity(iou: Tensor) -> float:
    """The paper's minimal similarity, as we read p-diff's Tab. 12: of the most novel generated network.

    Of the table's rows, p-diff is the generated group, AE+KDE the group `latent-kde`, and VAE the group
    `latent-gaussian` of a run whose autoencoder is a `vae`.

    Args:
        iou: Error IoU of generated networks with originals, (A, B). The highest in a row says how close that network
            is to an original; the smallest of these is returned.
    """
    return float(nearest(iou).min())


def spread(values: Tensor) -> dict[str, float]:
    """Mean and 10th percentile of at least one value, e.g. of the disagreement of all `pairs`."""
    # torch.quantile refuses more than 2^24 values.
    low = np.percentile(values.numpy(force=True), LOW_PERCENTILE)
    return {"mean": float(values.mean(dtype=torch.float64)), f"p{LOW_PERCENTILE}": float(low)}


def functional_novelty(to_zoo: Tensor, in_zoo: Tensor) -> dict[str, float] | None:
    """Disagreement with the nearest training network, in units of what training networks have among themselves.

    Args:
        to_zoo: Disagreement of generated with training networks, (A, B).
        in_zoo: Of training networks with each other, (B, B).

    Returns:
        Mean and 10th percentile over generated networks: 0 for copies, 1 for networks as new as a further training.
        None where the zoo is one network or all its networks answer alike.
    """
    if len(in_zoo) < 2:
        return None
    unit = -nearest(-in_zoo, same=True).mean()
    return spread(-nearest(-to_zoo) / unit) if unit > 0 else None

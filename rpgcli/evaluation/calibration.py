"""Calibration: does a network's confidence say how often it is right?

Logits may be logarithms of probabilities: only their softmax counts.

Letters: n networks, N images, C classes.
"""

from torch import Tensor

NUM_BINS = 15
"""Equal bins of confidence (Guo et al. 2017)."""


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over images of -log p(label), in nats, (n,).

    Args:
        logits: (n, N, C).
        labels: (N,), or (n, N) where each network has a task of its own.
    """
    log_p = logits.double().log_softmax(-1)  # (n, N, C)
    return -log_p.gather(-1, labels.expand(log_p.shape[:-1])[..., None]).mean((1, 2))


def expected_calibration_error(logits: Tensor, labels: Tensor, *, num_bins: int = NUM_BINS) -> Tensor:
    """Mean gap between confidence and accuracy over bins, weighted by their images, (n,) in [0, 1] (Guo et al. Eq. 3).

    Args:
        logits: (n, N, C).
        labels: (N,), or (n, N).
        num_bins: Bin b holds confidences in (b / num_bins, (b + 1) / num_bins].
    """
    confidence, answer = logits.double().softmax(-1).max(-1)  # (n, N)
    surplus = confidence - (answer == labels).double()  # (n, N)
    index = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)  # (n, N)
    sums = surplus.new_zeros(len(surplus), num_bins).scatter_add_(1, index, surplus)
    return sums.abs().sum(1) / surplus.shape[1]

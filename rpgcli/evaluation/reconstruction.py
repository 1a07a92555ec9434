"""How well an autoencoder repeats networks that it never saw."""

import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from rpgcli.autoencoder import Autoencoder, reconstruction
from rpgcli.conditions import asked_of
from rpgcli.evaluation.audit import answering_store
from rpgcli.methods.pdiff import Vectors
from rpgcli.problem import Problem

logger = logging.getLogger(__name__)

NUM_JUDGED = 40
"""Networks of a group whose reconstruction is judged, at most."""
COLLAPSED = 0.1
"""An autoencoder that explains less than this of known networks gives the mean network for all of them. Accuracy does
not show it: the mean of snapshots of one training is better than they are."""
POOR = 0.5
"""Held-out networks are reconstructed badly if less than this share of what is explained of known ones is explained."""
POOR_ACCURACY = 0.05
"""Or if reconstruction costs them more accuracy."""


def judge_autoencoder(
    problem: Problem, model: Autoencoder, vectors: Vectors, known: Sequence[int], held: Sequence[int]
) -> dict[str, Any]:
    """Error, explained variance, and accuracy on validation images of reconstructed networks, known and held out."""
    store = vectors.store
    mean = reduce(torch.add, (x.sum(0) for x in vectors.blocks(known))) / len(known)  # (P,)
    measure = answering_store(problem, store)
    judged = {}
    for name, index in (("known", known[:NUM_JUDGED]), ("held_out", held[:NUM_JUDGED])):
        if not index:
            continue
        x = vectors.rows(index)  # (n, P)
        with torch.no_grad():
            x_hat = model.eval().decode(model.encode(x.to(problem.device))).float().cpu()  # (n, P)
        bits = [asked_of(store.checkpoints[i]).task_bits for i in index]
        before, after = (
            sum(float(measure.accuracy([store.rebuilt(v, i)], [b], "validation")) for v, i, b in zip(vs, index, bits))
            for vs in (x, x_hat)
        )
        judged[name] = {
            "count": len(index), **reconstruction(x, x_hat, mean),
            "accuracy": after / len(index), "original": before / len(index),
        }  # fmt: skip
    return judged


def warn_of_poor(judged: Mapping[str, Mapping[str, float]]) -> None:
    """Say so when held-out networks are reconstructed badly, with the remedy."""
    known, held = judged["known"], judged.get("held_out")
    if known["explained_variance"] < COLLAPSED:
        logger.warning(
            "the autoencoder has collapsed to the mean network (explained variance of known networks %.2f): train it "
            "longer (autoencoder.training.num_steps), lower latent_noise or kl_weight, or widen latent_dim in "
            "autoencoder.network",
            known["explained_variance"],
        )
    elif held is None:
        logger.warning(
            "no checkpoint was held out: nobody knows how the autoencoder does on new networks; raise "
            "autoencoder.holdout, or collect more"
        )
    elif held["explained_variance"] < POOR * known["explained_variance"]:
        logger.warning(
            "held-out networks are reconstructed badly (explained variance %.2f, known ones %.2f): the autoencoder "
            "memorises; collect more checkpoints, align independent starts, or lower autoencoder.network.latent_dim",
            held["explained_variance"], known["explained_variance"],
        )  # fmt: skip
    elif held["accuracy"] < held["original"] - POOR_ACCURACY:
        logger.warning(
            "reconstructed networks reach %.3f where their originals have %.3f: train the autoencoder longer "
            "(autoencoder.training.num_steps) or widen autoencoder.network.latent_dim",
            held["accuracy"], held["original"],
        )  # fmt: skip

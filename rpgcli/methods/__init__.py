"""Methods that generate parameters: two that learn, each written to read like its paper's method section, and trivial
ones that they have to beat.
"""

from rpgcli.methods import baselines, resampling

LEARNED = ("rpg", "pdiff")
"""Those with a model of their own."""
OF_TASKS = (*baselines.GENERATORS, "finetuned")
"""Trivial ones of a zoo of tasks."""
OF_ONE_QUESTION = (*resampling.GENERATORS, *resampling.LATENT_GENERATORS, "finetuned")
"""Trivial ones of a zoo whose networks all answer the same question."""
METHODS = tuple(dict.fromkeys([*LEARNED, *OF_TASKS, *OF_ONE_QUESTION]))
SHORT = {"noise": "noise-0.1", "soup": "soup-16", "kde": "latent-kde"}
"""The member that the name of a family means."""

"""Judging generated networks: groups, comparisons, verdict, report."""

from rpgcli.collection import OptimiserConfig
from rpgcli.config import Config
from rpgcli.evaluation.initialisation import InitialisationConfig
from rpgcli.methods.baselines import MlpSetting


class EvaluateConfig(Config):
    """What generated networks are compared with."""

    mlp: tuple[MlpSetting, ...] = (
        MlpSetting(width=512, num_steps=1500, weight_decay=1e-3),
        MlpSetting(width=512, num_steps=3000, weight_decay=1e-2),
        MlpSetting(width=1024, num_steps=1500, weight_decay=1e-2),
        MlpSetting(width=1024, num_steps=3000, weight_decay=1e-1),
    )
    """Settings of the MLP regression that are tried; together they should take as long as the generator trained."""
    finetune: OptimiserConfig = OptimiserConfig(optimiser="adamw", epochs=1, batch_size=64, learning_rate=1e-4)
    """How the trained networks of the baseline `finetuned` are trained a little further."""
    initialisation: InitialisationConfig | None = None
    """Whether, and how, networks are also trained from generated and other starts; see `rpg evaluate --finetune`."""
    seed: int = 0
    """Of the baselines that draw random numbers."""

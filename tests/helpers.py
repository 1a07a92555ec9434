"""What several tests of the library need: drafts, token stores, tiny problems."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpgcli import artifact, rng
from rpgcli.artifact import Artifact, Draft
from rpgcli.errors import Interrupted
from rpgcli.layout import make_layout
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.progress import OnStep, Step, silent
from rpgcli.tasks import Dataset, DigitsConfig, Images, MultiClassConfig
from rpgcli.tokens import TokensConfig, TokenStore, write_store

State = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng.stream(seed, "test", *shape))


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names in the same order, dtypes, shapes and bytes (-0.0 is not 0.0)."""
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and raw(a[n]) == raw(b[n]) for n in a
    )


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def make(
    target: Path,
    body: Callable[[Draft], Mapping[str, Any]],
    *,
    stage: str = "collect",
    section: dict[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
) -> Artifact:
    """Make an artifact whose files `body` writes and whose facts it returns."""
    with artifact.draft(target, stage, section=section or {}, inputs={}, force=force, resume=resume) as draft:
        return draft.finished or draft.commit(body(draft), {"seconds": 1.5})


def token_store(
    folder: Path, states: Sequence[State], checkpoints: Sequence[Mapping[str, Any]] | None = None, **tokens: Any
) -> TokenStore:
    """Tokenize state dicts into `folder`."""
    config = TokensConfig(**tokens)
    layout = make_layout(
        states[0],
        token_dim=config.token_dim,
        granularity=config.granularity,
        log_variance=config.standardise != "none",
    )
    facts = checkpoints or [{"task_bits": None, "run": i, "step": 0} for i in range(len(states))]

    def body(draft: Draft) -> Mapping[str, Any]:
        write_store(draft, iter(states), len(states), layout, config, silent)
        return {"checkpoints": [dict(f) for f in facts]}

    return TokenStore(make(folder, body, stage="tokenize"))


class TinyDigits(DigitsConfig):
    """A few of the digits, so that training takes a moment."""

    num: int = 60

    def load(self, data_root: Path | None = None, download: bool = False) -> Dataset:
        whole = super().load()

        def take(images: Images) -> Images:
            return images.take(torch.arange(self.num))

        return Dataset("digits", whole.classes, take(whole.train), take(whole.validation), take(whole.test), 16.0, 0.5)


def tiny_problem(target: Any = None, *, bits: bool = True, num: int = 60, **dataset: Any) -> Problem:
    """Digits with `num` images in each split."""
    given: dict[str, Any] = {} if target is None else {"target": target}
    if not bits:
        given["task"] = MultiClassConfig()
    config = ProblemConfig(**given).model_copy(update={"dataset": TinyDigits(num=num, **dataset)})
    return Problem(config, None, False, torch.device("cpu"))


def total(parts: Iterable[Tensor]) -> Tensor:
    """The loss of a batch whose parts these are."""
    return torch.stack(list(parts)).sum()


def stop_after(num_steps: int) -> OnStep:
    """Interrupt like Ctrl-C after so many steps."""
    count = 0

    def on_step(step: Step) -> None:
        nonlocal count
        count += 1
        if count == num_steps:
            raise Interrupted(2)

    return on_step

"""Folders of networks: `zoo/` and `generated/...`, one safetensors file per network and its facts in the manifest.

Networks that share frozen tensors keep these once, in `shared.safetensors`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rpgcli import artifact
from rpgcli.artifact import Artifact, ahead
from rpgcli.errors import ArtifactError

SHARED = "shared.safetensors"


@dataclass(frozen=True)
class Network:
    """One network of a folder and what is known of it."""

    file: str
    split: str
    """`seen`, `validation` or `unseen`: whether a generator may learn from it; `all` where tasks do not matter."""
    task_bits: str | None = None
    run: int = 0
    """Which independent training it comes from; for a generated one, its permutation state."""
    step: int = 0
    """Optimizer steps after which it was saved."""
    last: bool = True
    """Whether it is the last snapshot of its training."""
    accuracy: dict[str, float] | None = None
    """Fraction of right answers on the validation and test images."""
    sample: int = 0
    """Number of a generated network among those of its request and task."""
    asked_accuracy: float | None = None
    """The accuracy that a generated network was asked for."""
    label: str | None = None
    """A free name: the sub-folder that a network from elsewhere came from."""

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


class Zoo:
    """A committed folder of networks."""

    def __init__(self, found: Artifact) -> None:
        self.artifact = found
        try:
            self.networks = [Network(**record) for record in found.facts["networks"]]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{found.path} lists its networks in an unknown way: {error}.") from None
        if not self.networks:
            raise ArtifactError(f"{found.path} holds no network.", "Collect at least one.")
        self.shared: Mapping[str, Tensor] = found.tensors(SHARED) if SHARED in found.manifest.files else {}
        """Frozen tensors, the same in all networks."""

    @classmethod
    def read(cls, path: Path, stage: str = "collect") -> "Zoo":
        """Open the folder at `path`."""
        return cls(artifact.read(path, stage))

    def select(self, split: str | None = None, *, last: bool = False) -> list[Network]:
        """Networks of a split (of all splits: None), all snapshots or the last of each training only."""
        return [n for n in self.networks if (split is None or n.split == split) and (n.last or not last)]

    def tasks(self, split: str) -> list[str]:
        """The different tasks of a split, in the order of its files."""
        return list(dict.fromkeys(n.task_bits for n in self.select(split) if n.task_bits is not None))

    def state(self, network: Network) -> dict[str, Tensor]:
        """The state dict of one network."""
        return {**self.shared, **self.artifact.tensors(network.file)}

    def states(self, networks: Sequence[Network]) -> Iterator[dict[str, Tensor]]:
        """The state dicts of some networks; the next file is read and hashed while one is worked on."""
        return ahead(self.state, networks)

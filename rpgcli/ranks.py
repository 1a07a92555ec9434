"""Several processes that train one model together, one for each device, as torchrun starts them.

    torchrun --nproc-per-node 2 -m rpgcli train-rpg

All ranks run the same stage. Each draws the random numbers of the whole batch, from the same streams as a process by
itself, and takes its share; gradients are summed. So the result is that of one process but for the order of sums. Rank
0 alone writes and shows, and goes on alone when training is over.

A rank that fails leaves its error in the store that all share, and ends; whoever waits for it then ends with the same
exit code. This module alone reads torchrun's variables and talks to the other processes.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from rpgcli.errors import RpgError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEXT_BYTES = 4096
"""Longest text that ranks tell each other."""
FAILED = "failed"
"""Where in the store the first error lies."""


class Released(Exception):
    """Training is over and this is not rank 0: nothing is left to do for this process."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine: the number of its device."""
    store: Any = None
    """What all of them can read and write; torchrun keeps it."""
    control: Any = None
    """Group for small messages between CPUs, so that no device waits for them."""

    @property
    def first(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    def share(self, num: int) -> range:
        """Which of `num` things this rank takes; the shares differ in size by one at most."""
        return range(num * self.rank // self.size, num * (self.rank + 1) // self.size)

    def join(self, device: "torch.device") -> "Ranks":
        """Meet the others; the methods below need it."""
        if self.size == 1:
            return self
        import torch
        import torch.distributed as dist

        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        with self._together():
            dist.init_process_group(
                "nccl" if cuda else "gloo", store=self.store, rank=self.rank, world_size=self.size,
                device_id=device if cuda else None,
            )  # fmt: skip
            return replace(self, control=dist.new_group(backend="gloo"))

    def sum(self, tensors: Iterable["Tensor"]) -> None:
        """Replace each tensor by its sum over the ranks, which is the same to the last bit on all of them."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with self._together():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()  # On a GPU the stream waits, not this process.

    def copy_first(self, tensors: Iterable["Tensor"]) -> None:
        """Replace each tensor by rank 0's."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with self._together():
            for work in [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]:
                work.wait()

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        largest = torch.tensor(number)
        with self._together():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def gather(self, text: str) -> list[str]:
        """What each rank says, in their order."""
        if self.size == 1:
            return [text]
        import torch
        import torch.distributed as dist

        content = text.encode()
        assert len(content) <= TEXT_BYTES, "a text for other ranks is short"
        own = torch.tensor(list(content.ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        with self._together():
            dist.all_gather(everyone, own, group=self.control)
        return [bytes(said.tolist()).rstrip(b"\0").decode() for said in everyone]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare what each rank knows, by name.

        Raises:
            UsageError: On all ranks, if they differ.
        """
        expected, *others = [json.loads(text) for text in self.gather(json.dumps(dict(facts)))]
        for rank, found in enumerate(others, 1):
            if differing := [name for name in facts if found[name] != expected[name]]:
                raise UsageError(
                    f"rank {rank} differs from rank 0 in: {', '.join(differing)}.",
                    *(f"{name}: {expected[name]} at rank 0, {found[name]} at rank {rank}" for name in differing),
                    "Give all processes the same command, and one run folder that all machines see.",
                )

    def leave_to_first(self) -> None:
        """Training is over: part from the others.

        Raises:
            Released: On all ranks but the first.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        dist.destroy_process_group()
        if not self.first:
            raise Released

    def fail_with(self, error: RpgError) -> bool:
        """Tell the others why this process ends; whether it is the first to fail, so that it shows the error."""
        if self.size == 1:
            return True
        mine = json.dumps({"rank": self.rank, "exit_code": error.exit_code, "what": error.what})
        try:
            first: bytes = self.store.compare_set(FAILED, "", mine)
        except RuntimeError:  # The store has gone with the process that kept it, which has failed before.
            return False
        return first.decode() == mine

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A broken connection ends this process as the first that failed has ended."""
        try:
            yield
        except RuntimeError as error:
            known = None
            with suppress(RuntimeError):
                if self.store.check([FAILED]):
                    known = json.loads(self.store.get(FAILED))
            if known is None:
                raise RpgError(
                    f"the connection to the other processes broke: {first_line(error)}",
                    "One of them has ended, and says why. With --resume training goes on from the last checkpoint.",
                ) from None
            lost = RpgError(f"rank {known['rank']} has failed: {known['what']}")
            lost.exit_code = known["exit_code"]
            raise lost from None


def first_line(error: Exception) -> str:
    """torch appends a trace to its errors."""
    return str(error).partition("\n")[0]


ALONE = Ranks()


@cache
def here() -> Ranks:
    """This process among those that torchrun has started.

    Raises:
        UsageError: If the others cannot be reached.
    """
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    rank, size, local_rank = (int(text) if text.isdecimal() else None for text in given)
    if rank is None or size is None or size == 1:
        return ALONE
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the other processes cannot be reached: {first_line(error)}",
            "torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; "
            "unset RANK and WORLD_SIZE to run by yourself.",
        ) from None
    return Ranks(rank, size, local_rank or 0, store)

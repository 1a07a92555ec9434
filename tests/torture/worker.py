"""`rpg` in processes that can be killed, raced and starved: forked from one that has torch in memory already.

The parent of all of them is a fork server, which has imported what the stages need and computed nothing.
"""

import io
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import sklearn.datasets  # These are imported by the stages when they need them; here once for all.
import sklearn.manifold
import torch._dynamo

import rpgcli.pipeline
from rpgcli.cli import main
from rpgcli.command import running
from rpgcli.evaluation import page

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])

PATIENCE = 120.0
"""Seconds after which a process hangs, whatever it does."""
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "fcntl.flock", "shutil.rmtree"}
"""What Python tells an audit hook of a program's dealings with the disk."""


@dataclass
class Plan:
    """What happens to a process while it works."""

    die_at: int | None = None
    """Number of the moment at which it kills itself: a change of the disk, a sync, or a step of the stage."""
    hold_at: int | None = None
    """Number of the step at which it says `reached` and waits for `released`."""
    file_bytes: int | None = None
    """No file may grow larger."""
    begin: Event = field(default_factory=CONTEXT.Event)
    reached: Event = field(default_factory=CONTEXT.Event)
    released: Event = field(default_factory=CONTEXT.Event)


class Clock:
    """Counts the moments of a process: changes of the disk, syncs, steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.moments, self.steps = plan, 0, 0
        sync, shown = os.fsync, running.on_step

        def fsync(descriptor: int) -> None:
            self.tick()
            sync(descriptor)

        def on_step(stage: running, step: Any) -> None:
            self.tick()
            self.steps += 1
            if self.steps == plan.hold_at:
                plan.reached.set()
                plan.released.wait(PATIENCE)
            shown(stage, step)

        os.fsync = fsync  # type: ignore[assignment]
        running.on_step = on_step  # type: ignore[assignment, method-assign]
        sys.addaudithook(lambda event, arguments: self.tick() if event in CHANGES else None)

    def tick(self) -> None:
        """One more moment, which may be the last."""
        self.moments += 1
        if self.moments == self.plan.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(arguments: list[str], log: Path, plan: Plan) -> None:
    """Run a command in this process as the console script does, its output in `log`."""
    torch.set_num_threads(1)
    page.EXTRA = ("no", "pictures")  # Drawing takes seconds.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    sys.argv = ["rpg", *arguments]
    if plan.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.file_bytes, resource.RLIM_INFINITY))
    plan.begin.wait(PATIENCE)
    clock = Clock(plan)
    try:
        main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.with_suffix(".moments").write_text(str(clock.moments))


class Worker:
    """A command that runs in a process of its own; `begin=False`: as soon as `plan.begin` is set."""

    def __init__(self, *arguments: object, log: Path, begin: bool = True, **plan: Any) -> None:
        self.log, self.plan = log, Plan(**plan)
        self.process = CONTEXT.Process(
            target=work, args=([str(word) for word in arguments], log, self.plan), daemon=True
        )
        self.process.start()
        if begin:
            self.plan.begin.set()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def err(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def moments(self) -> int:
        """How many moments it had, after it ended by itself."""
        return int(self.log.with_suffix(".moments").read_text())

    def send(self, number: int) -> None:
        """Send a signal; none if the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code: negative after a signal that it did not handle.

        Raises:
            TimeoutError: If it takes longer; it is killed then.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds:g} s:\n{self.err}")
        return self.process.exitcode


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own."""
    receiving, sending = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_call, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()
    try:
        return receiving.recv() if receiving.poll(2 * PATIENCE) else None
    finally:
        process.kill()
        process.join()


def _call(sending: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sending.send(function(*arguments))


assert rpgcli.pipeline and sklearn.manifold, "imported for the server"

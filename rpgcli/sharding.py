"""Shards and executors: one stage computed by several processes or machines, with the result of a single one.

    block     what is computed together: a batch of trainings, some samples, a row of a report. The settings of a stage
              fix its blocks, never the number of shards
    shard     `--shard i/n`, i = 0 ... n - 1: blocks i, i + n, i + 2n, ... each becomes an artifact of its own in
              `<folder of the stage>.blocks/`; there is nothing else that shards would have to agree on
    merge     the stage without --shard: takes the blocks that it finds, computes the missing ones, commits as ever
    executor  starts all n shards, as processes or on a Ray cluster, and waits for them

Shards on several machines share a file system. Shards hold the lock of the stage's folder together, a merge alone.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rpgcli import artifact
from rpgcli.artifact import Artifact, Draft
from rpgcli.config import Config
from rpgcli.errors import ArtifactError, LockedError, OutputError, RpgError, UsageError
from rpgcli.progress import OnStep, Step

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""Between two looks at what other processes do."""
MAX_SHARDS = 100_000
WARNING = "warning: "
"""How a line on stderr begins that tells one."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`1/4`: the second of four.

        Raises:
            UsageError: If it has another form, or there is no such part.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        index, count = map(int, found.groups()) if found else (0, 0)
        if not 0 <= index < count <= MAX_SHARDS:
            raise UsageError(
                f"--shard {text!r} is not I/N with I from 0 to N - 1.",
                "Four shards are 0/4, 1/4, 2/4 and 3/4, as SLURM_ARRAY_TASK_ID and JOB_COMPLETION_INDEX count.",
            )
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Block:
    """A part of a stage that is computed in one go."""

    name: str
    size: int
    """How much of the stage it is, in networks."""
    write: Callable[[Draft, OnStep], Any]
    """Writes its files into a draft and returns what is known of them, for JSON."""


@dataclass(frozen=True)
class Share:
    """What a shard has done."""

    folder: Path
    """Where its blocks are."""
    num_blocks: int = 0
    """Blocks of this shard."""
    num_computed: int = 0
    """How many of them were not there yet."""
    num_all: int = 0
    """Blocks of the stage."""
    finished: Artifact | None = None
    """The artifact of the whole stage, if it was there already."""


# --- blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """The finished blocks of a stage; its other arguments are those of the stage's draft."""

    target: Path
    stage: str
    section: Mapping[str, Any]
    inputs: Mapping[str, str]
    force: bool = False
    """Compute anew what was made with other settings, or is damaged."""

    @classmethod
    def of(cls, draft: Draft) -> "Blocks":
        """Those that belong to a draft."""
        return cls(draft.target, draft.stage, draft.section, draft.inputs)

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.target.with_name(f"{self.target.name}.blocks")

    @property
    def settings(self) -> dict[str, Any]:
        """The section as a manifest holds it."""
        settings: dict[str, Any] = json.loads(artifact.canonical(self.section))
        return settings

    @property
    def made_by(self) -> str:
        """The stage that the manifest of a block names."""
        return f"{self.stage} --shard"

    def after(self, name: str, found: Artifact) -> "Blocks":
        """The blocks that are made from another one."""
        return replace(self, inputs={**self.inputs, name: found.id})

    def find(self, name: str) -> Artifact | None:
        """A finished block; None if it is not there, or was made with other settings."""
        path = self.folder / name
        if not (path / artifact.MANIFEST).is_file():
            return None
        found = artifact.read(path, self.made_by)
        return None if self._differences(found.manifest) else found

    def others(self) -> list[str]:
        """What differs between these settings and those of a block that was made with others; [] if there is none."""
        for path in sorted(self.folder.glob(f"*/{artifact.MANIFEST}")):
            if lines := self._differences(artifact.read_manifest(path)):
                return lines
        return []

    def check(self) -> None:
        """Raise an OutputError if some were made with other settings, and these are not to be replaced."""
        if not self.force and (lines := self.others()):
            raise OutputError(
                f"{self.folder} holds blocks that were made with other settings.", *lines,
                "Pass --force to replace them, or give the settings that they were made with.",
            )  # fmt: skip

    @contextmanager
    def working(self) -> Iterator[Artifact | None]:
        """Hold the lock of the stage together with other shards; the whole artifact, if it is there already.

        Raises:
            OutputError: If an artifact or blocks of other settings are there, or a merge is at work.
        """
        artifact.make_folder(self.target.parent)
        with artifact.lock(self.target, shared=True):
            self.check()
            found = None
            if self.target.is_dir() and any(self.target.iterdir()) and not self.force:
                found = artifact.read(self.target, self.stage)
                if lines := artifact.differences(found.manifest, self.settings, self.inputs):
                    raise OutputError(
                        f"{self.target} exists and was made with other settings.", *lines,
                        "Pass --force to replace it at the end, or choose another --run or --out.",
                    )  # fmt: skip
            yield found

    def prepare(self, *, resume: bool, force: bool) -> None:
        """Before a merge: keep the blocks of these settings if it resumes, discard all if it is forced to start afresh.

        Raises:
            OutputError: If there are any, and neither was asked for.
        """
        if force and not resume:
            self.clear()
        elif self.folder.exists():
            replace(self, force=force).check()
            if not resume:
                raise OutputError(
                    f"{self.target} is unfinished: {self.folder} holds blocks of it.",
                    "Pass --resume to go on with them, or --force to start afresh.",
                )

    def clear(self) -> None:
        """Delete all."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def make(self, name: str, write: Callable[[Draft, OnStep], Any], on_step: OnStep) -> Artifact:
        """A block, computed unless it is there; where another process is computing it, that is waited for."""
        while True:
            try:
                with artifact.draft(
                    self.folder / name, self.made_by, section={**self.section, "block": name}, inputs=self.inputs,
                    force=self.force and not self._is_whole(name), resume=True,
                ) as draft:  # fmt: skip
                    if draft.finished is not None:
                        return draft.finished
                    begun = time.perf_counter()
                    facts = write(draft, on_step)
                    return draft.commit({"facts": facts}, {"seconds": round(time.perf_counter() - begun, 3)})
            except LockedError:
                on_step(Step(0, 1, phase=f"wait for block {name}, which another process computes", unit="block"))
                time.sleep(POLL_SECONDS)

    def share(self, shard: Shard, blocks: Sequence[Block], on_step: OnStep) -> Share:
        """Compute the blocks of a shard."""
        mine = blocks[shard.index :: shard.count]
        made = [
            self.make(block.name, block.write, report)
            for block, report in zip(mine, _reports(mine, on_step))
        ]  # fmt: skip
        return Share(self.folder, len(mine), sum(found.made_now for found in made), len(blocks))

    def _differences(self, manifest: artifact.Manifest) -> list[str]:
        section = {**self.settings, "block": manifest.section.get("block")}
        return artifact.differences(manifest, section, self.inputs)

    def _is_whole(self, name: str) -> bool:
        try:
            return self.find(name) is not None and not artifact.verify(self.folder / name)[1]
        except ArtifactError:
            return False


def merge(draft: Draft, blocks: Sequence[Block], on_step: OnStep, made: Blocks | None = None) -> list[Any]:
    """Write all blocks into the draft of a stage, one after another.

    What shards have computed is taken, and so is what an interrupted process wrote into the same draft.

    Args:
        draft: Of the whole stage.
        blocks: All that it consists of.
        on_step: Called with what is done of the whole.
        made: The finished blocks, if they were made from more than the stage was.

    Returns:
        What is known of each block.
    """
    made = made or Blocks.of(draft)
    facts = []
    for block, report in zip(blocks, _reports(blocks, on_step)):
        path = draft.path / f"block-{block.name}.json"
        with draft.part() as part:
            found = _recorded(part, path) or _taken(part, made, block.name)
            record = found or _computed(part, block, report)
        draft.spent += found.seconds if found is not None else 0.0
        artifact.write_bytes(path, artifact.canonical(record.model_dump()))
        draft.resumable = True
        facts.append(record.facts)
    return facts


def _reports(blocks: Sequence[Block], on_step: OnStep) -> list[OnStep]:
    """For each block, what reports its steps as those of the whole."""

    def scaled(before: int, size: int, step: Step) -> None:
        done = round(before + size * step.done / step.total)
        on_step(step if step.phase else Step(done, total, step.facts, unit="network"))

    sizes = [block.size for block in blocks]
    total = sum(sizes)
    return [partial(scaled, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


class _Record(Config):
    """What a draft remembers of a block that it holds."""

    facts: Any
    files: dict[str, str]
    """Name -> sha256."""
    seconds: float


def _recorded(draft: Draft, path: Path) -> _Record | None:
    """A block that this draft holds already; None if it does not, or a file of it is not as it was.

    Raises:
        ArtifactError: If the record is not one of ours.
    """
    if not path.exists():
        return None
    try:
        record = _Record.model_validate(artifact.read_json(path))
    except ValidationError:
        raise ArtifactError(f"{path} is not the record of a block.", "Pass --force to start afresh.") from None
    for name in record.files:
        if not artifact.FILE_NAME.fullmatch(name):
            raise ArtifactError(f"{path} names the file {name!r}.", "Do not trust this folder: --force.")
        if not (draft.path / name).is_file():
            return None
        draft.add(name)
    return record if draft.digests == record.files else None


def _taken(draft: Draft, made: Blocks, name: str) -> _Record | None:
    """A block that a shard has computed, put into the draft."""
    found = made.find(name)
    if found is None:
        return None
    for file in found.manifest.files:
        draft.take(found.file(file))
        draft.add(file)
    seconds = found.manifest.volatile.get("seconds", 0.0)
    return _Record(facts=found.facts["facts"], files=draft.digests, seconds=seconds)


def _computed(draft: Draft, block: Block, on_step: OnStep) -> _Record:
    begun = time.perf_counter()
    facts = json.loads(artifact.canonical(block.write(draft, on_step)))  # As it would be read from a record.
    return _Record(facts=facts, files=draft.digests, seconds=round(time.perf_counter() - begun, 3))


# --- executors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How the process of a shard ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Executor:
    """Who runs the shards, and how many there are."""

    kind: Literal["local", "ray"]
    count: int | None
    """None: one for each GPU of the cluster, or else for each CPU."""

    @classmethod
    def parse(cls, text: str) -> "Executor":
        """`local:4`, `ray`, `ray:16`.

        Raises:
            UsageError: If it is none of these.
        """
        kind, _, number = text.partition(":")
        count = int(number) if re.fullmatch("[0-9]{1,6}", number) else None
        is_counted = count is not None and 0 < count <= MAX_SHARDS
        if kind == "local" and is_counted:
            return cls("local", count)
        if kind == "ray" and (is_counted or text == "ray"):
            return cls("ray", count)
        raise UsageError(
            f"--executor {text!r} is unknown.", "Give local:N (N processes), ray:N, or ray (one shard for each device)."
        )

    def run(self, arguments: Sequence[str], on_step: OnStep, *, devices: Sequence[str] = ()) -> None:
        """Run `rpg ARGUMENTS --shard i/n` for every i, and wait for all.

        Args:
            arguments: Of the command, without --shard and --executor.
            on_step: Called again and again; if it raises, the shards are stopped.
            devices: What processes of this machine share out among them; those of a cluster are given theirs.

        Raises:
            RpgError: If a shard failed, with its words and its exit code; the others go on to their end first.
        """
        if self.kind == "ray":
            ended = _on_ray(arguments, self.count, on_step)
        else:
            assert self.count is not None, "parse asks for it"
            ended = _locally(arguments, self.count, on_step, devices)
        for line in dict.fromkeys(line for end in ended for line in end.err.splitlines()):
            if line.startswith(WARNING):
                logger.warning("%s", line.removeprefix(WARNING))
        failed = [index for index, end in enumerate(ended) if end.code]
        if failed:
            raise _failure(Shard(failed[0], len(ended)), ended[failed[0]], len(failed))


def run_shard(arguments: Sequence[str], shard: str, folder: str) -> Ended:
    """Run `rpg ARGUMENTS --shard i/n` in a folder, to its end; this is what a Ray worker does."""
    done = subprocess.run(_command(arguments, shard), cwd=folder, stdin=subprocess.DEVNULL, capture_output=True)
    return Ended(done.returncode, _text(done.stdout), _text(done.stderr))


def _locally(arguments: Sequence[str], count: int, on_step: OnStep, devices: Sequence[str]) -> list[Ended]:
    processes = []
    for i in range(count):
        own = ["--device", devices[i % len(devices)]] if devices else []
        command = _command([*arguments, *own], str(Shard(i, count)))
        processes.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    with ThreadPoolExecutor(count) as pool:
        outputs = [pool.submit(process.communicate) for process in processes]
        try:
            num_left = count
            while num_left:
                num_left = len(wait(outputs, POLL_SECONDS).not_done)
                on_step(Step(count - num_left, count, phase="shards", unit="shard"))
        except BaseException:
            for process in processes:
                process.terminate()  # Each stops at its next step, and the pool waits for that.
            raise
    return [
        Ended(process.returncode, *map(_text, output.result())) for process, output in zip(processes, outputs)
    ]  # fmt: skip


def _on_ray(arguments: Sequence[str], count: int | None, on_step: OnStep) -> list[Ended]:
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--executor ray needs the package ray.", "pip install 'rpgcli[ray]', or use --executor local:N."
        ) from None
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
    try:
        there = ray.cluster_resources()
        kind = "GPU" if there.get("GPU") else "CPU"
        count = count or int(there[kind])
        task = ray.remote(max_retries=0, **{f"num_{kind.lower()}s": 1})(run_shard)
        shards = [task.remote(list(arguments), str(Shard(i, count)), str(Path.cwd())) for i in range(count)]
        left = shards
        try:
            while left:
                _, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
                on_step(Step(count - len(left), count, phase="shards", unit="shard"))
        except BaseException:
            for shard in left:
                ray.cancel(shard)
            raise
        ended: list[Ended] = ray.get(shards)
        return ended
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RpgError(
            f"the Ray cluster lost a shard: {reason}.", "What is finished is kept: type the same command again."
        ) from None
    finally:
        if is_ours:
            ray.shutdown()


def _command(arguments: Sequence[str], shard: str) -> list[str]:
    return [sys.executable, "-m", "rpgcli", *arguments, "--shard", shard]


def _text(output: bytes) -> str:
    return output.decode(errors="replace")


def _failure(shard: Shard, end: Ended, num_failed: int) -> RpgError:
    """The error of a shard as that of the whole."""
    try:
        error = json.loads(end.out)["error"]
        what, advice = str(error["message"]), [str(line) for line in error["advice"]]
    except (ValueError, KeyError, TypeError):  # Killed before it could say why.
        lines = end.err.strip().splitlines()
        what, advice = lines[-1] if lines else f"ended by signal {-end.code}" if end.code < 0 else "it says nothing", []
    others = f" ({num_failed} of {shard.count} failed)" if num_failed > 1 else ""
    failure = RpgError(f"shard {shard}{others}: {what}", *advice, "Finished blocks are kept.")
    failure.exit_code = end.code if end.code > 0 else RpgError.exit_code
    return failure

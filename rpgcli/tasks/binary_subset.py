"""Binary tasks over the classes of a data set: "is the image's class in the subset S?", one bit for each class.

A task and its complement are one problem, for swapping the two rows of the head turns one into the other. Splits into
seen and unseen tasks therefore never part such a pair.

Shapes: N images, C classes, B tasks.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from rpgcli import rng
from rpgcli.config import Config
from rpgcli.errors import UsageError, nearest

MAX_CLASSES_SHOWN = 20
MAX_ENUMERATED = 16  # up to 17 classes all pairs are listed and shuffled, beyond they are drawn one by one


class BinarySubsetConfig(Config):
    """Two outputs; a task's bit string holds 1 for each class that belongs to its subset."""

    kind: Literal["binary-subset"] = "binary-subset"

    def num_outputs(self, num_classes: int) -> int:
        """Two logits: outside the subset, inside it."""
        return 2

    def labels(self, y: Tensor, task_bits: str | Tensor | None) -> Tensor:
        """Whether each image's class is in the subset.

        Args:
            y: (N,) int64 classes.
            task_bits: A bit string, or bits (C,) or (B, C).

        Returns:
            (N,) int64 for one task, (B, N) for B tasks; 1 inside the subset.
        """
        assert task_bits is not None, "a binary task is its bits"
        bits = bits_tensor(task_bits) if isinstance(task_bits, str) else task_bits
        return bits.to(y.device)[..., y].long()


def bits_tensor(tasks: str | Sequence[str]) -> Tensor:
    """Bit strings as numbers: (C,) int64 of one string, (B, C) of a sequence."""
    if isinstance(tasks, str):
        return torch.tensor([int(bit) for bit in tasks], dtype=torch.int64)
    return torch.stack([bits_tensor(task) for task in tasks])


def complement(bits: str) -> str:
    """The task with the subset's inside and outside exchanged."""
    return bits.translate(str.maketrans("01", "10"))


def parse_task_bits(text: str, classes: Sequence[str], *, allow_trivial: bool = False) -> str:
    """The bit string that a user typed, without the spaces and underscores that may group its bits.

    Raises:
        UsageError: If it has other characters, another length than there are classes, or is all zeros or all ones
            and `allow_trivial` is false. Shows the classes in order.
    """
    bits = "".join(text.split()).replace("_", "")
    wants = f"Expected: {len(classes)} bits, one for each class in this order: {_show(classes)}."
    example = f"For instance {'0' * (len(classes) - 1)}1 asks for {classes[-1]}."
    if strange := sorted(set(bits) - {"0", "1"}):
        raise UsageError(
            f"task bits {text!r} hold {', '.join(map(repr, strange[:5]))}, which is neither 0 nor 1.", wants, example
        )
    if len(bits) != len(classes):
        raise UsageError(
            f"task bits {text!r} have {len(bits)} bits but there are {len(classes)} classes.", wants, example
        )
    if not allow_trivial and len(set(bits)) == 1:
        raise UsageError(
            f"task bits {text!r} put {'every' if bits[0] == '1' else 'no'} class into the subset: nothing to decide.",
            wants,
            example,
        )
    return bits


def parse_classes(text: str, classes: Sequence[str], *, allow_trivial: bool = False) -> str:
    """The bit string of a list of classes: names, or else numbers from 0, separated by commas.

    Raises:
        UsageError: If a class is unknown, or the subset is trivial and `allow_trivial` is false.
    """
    by_name = {name.lower(): index for index, name in enumerate(classes)}
    by_number = {str(index): index for index in range(len(classes))}
    chosen = set()
    for word in (part.strip().lower() for part in text.split(",")):
        index = by_name.get(word, by_number.get(word))
        if index is None:
            hint = nearest(word, classes) if len(classes) <= MAX_CLASSES_SHOWN else ""
            raise UsageError(
                f"unknown class {word!r}{hint}",
                f"Expected: names or numbers from 0 to {len(classes) - 1}, separated by commas: {_show(classes)}.",
            )
        chosen.add(index)
    bits = "".join("1" if index in chosen else "0" for index in range(len(classes)))
    return parse_task_bits(bits, classes, allow_trivial=allow_trivial)


def read_tasks(lines: Iterable[str], classes: Sequence[str], *, allow_trivial: bool = False) -> list[str]:
    """Bit strings of a tasks file: one a line, `#` starts a comment, blank lines are skipped.

    Raises:
        UsageError: If lines are no tasks or repeat one, all of them with their numbers; or if there is no task.
    """
    first_line: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            bits = parse_task_bits(text, classes, allow_trivial=allow_trivial)
        except UsageError as error:
            problems.append(f"line {number}: {error.what}")
            continue
        if bits in first_line:
            problems.append(f"line {number}: {bits} stands on line {first_line[bits]} already.")
        first_line.setdefault(bits, number)
    wants = f"Expected: a line of {len(classes)} bits for each task, one bit for each class: {_show(classes)}."
    if problems:
        raise UsageError(f"the tasks file has {len(problems)} problem{'s' * (len(problems) > 1)}:", *problems, wants)
    if not first_line:
        raise UsageError("the tasks file holds no task.", wants)
    return list(first_line)


def split_tasks(
    num_classes: int, num_seen: int, num_validation: int, num_unseen: int, seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Draw seen, validation and unseen tasks, the two of a complement pair always on one side.

    Unseen tasks are drawn first and seen ones last: with the same seed and counts of the others, the seen tasks of a
    smaller zoo are the first of a larger one's.

    Args:
        num_classes: Number of classes, the bits of a task.
        num_seen: Tasks for training; even, as the next two.
        num_validation: Tasks for choosing settings.
        num_unseen: Tasks for figures.
        seed: Names the split.

    Returns:
        Bit strings of the three sides, complements next to each other; none is all zeros or all ones.

    Raises:
        UsageError: If a count is odd or negative, or there are fewer tasks than asked for.
    """
    counts = {"seen": num_seen, "validation": num_validation, "unseen": num_unseen}
    if wrong := [f"{name} {count}" for name, count in counts.items() if count < 0 or count % 2]:
        raise UsageError(
            f"numbers of tasks must be even: {', '.join(wrong)}.",
            "A task and its complement are one problem (swap the head's rows), so both lie on one side of the split.",
        )
    num_pairs = sum(counts.values()) // 2
    available = 2 ** (num_classes - 1) - 1
    if num_pairs > available:
        raise UsageError(
            f"{num_seen} seen + {num_validation} validation + {num_unseen} unseen tasks are {2 * num_pairs}, "
            f"but {num_classes} classes have {2 * available}.",
            "Ask for fewer tasks, or take a data set with more classes.",
        )
    codes = _pair_codes(num_classes, seed)
    first = [format(next(codes), f"0{num_classes}b") for _ in range(num_pairs)]
    tasks = [task for bits in first for task in (bits, complement(bits))]
    unseen, validation = tasks[:num_unseen], tasks[num_unseen : num_unseen + num_validation]
    return tasks[num_unseen + num_validation :], validation, unseen


def other_tasks(known: Collection[str], num: int) -> list[str]:
    """Draw tasks that are none of those known, complements next to each other; always the same ones.

    Args:
        known: At least one task; with each its complement counts as known.
        num: How many; even.

    Raises:
        UsageError: If the number is odd, or there are fewer.
    """
    num_classes = len(next(iter(known)))
    pairs = {min(task, complement(task)) for task in known} - {"0" * num_classes}
    available = 2 * (2 ** (num_classes - 1) - 1 - len(pairs))
    if num % 2 or num > available:
        raise UsageError(
            f"{num} other tasks cannot be drawn: {num_classes} classes have {available} that the zoo left out.",
            "Ask for an even number of them at most: a task and its complement are one problem.",
        )
    codes = (format(code, f"0{num_classes}b") for code in _pair_codes(num_classes, seed=0))
    first = islice((code for code in codes if min(code, complement(code)) not in pairs), num // 2)
    return [task for bits in first for task in (bits, complement(bits))]


def _pair_codes(num_classes: int, seed: int) -> Iterator[int]:
    """All complement pairs in random order, each as the number that its member without the first class spells."""
    generator = rng.stream(seed, "split", "tasks", num_classes)
    num_bits = num_classes - 1
    if num_bits <= MAX_ENUMERATED:
        for code in torch.randperm(2**num_bits - 1, generator=generator).tolist():
            yield code + 1
        return
    drawn = {0}
    while True:
        bits = torch.randint(2, (num_bits,), generator=generator).tolist()
        code = int("".join(map(str, bits)), 2)
        if code not in drawn:
            drawn.add(code)
            yield code


def _show(classes: Sequence[str]) -> str:
    """The classes in order; only the first and the last of very many."""
    if len(classes) > MAX_CLASSES_SHOWN:
        classes = [*classes[: MAX_CLASSES_SHOWN - 1], "…", classes[-1]]
    return ", ".join(classes)

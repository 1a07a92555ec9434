"""A disk whose n-th call fails."""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock


class Raw(io.FileIO):
    """A file whose writes can fail."""

    def __init__(self, disk: "FailingDisk", path: Any, mode: str) -> None:
        self.disk = disk
        super().__init__(path, mode)

    def write(self, data: Any) -> Any:
        self.disk.tick("write")
        return super().write(data)


class FailingDisk(contextlib.ExitStack):
    """Meanwhile the `at`-th open, mkdir, rename, write or fsync below `folder` fails, and nothing else does.

    Args:
        folder: Where.
        at: Which, counted from 1.
        number: With what `errno`.
        on: Whether all that follow fail as well, as on a disk that stays full.
    """

    def __init__(self, folder: Path, at: int, number: int, *, on: bool = False) -> None:
        super().__init__()
        self.folder, self.at, self.number, self.on = str(folder), at, number, on
        self.calls = 0
        self.failed = ""
        """The kind of call that failed."""

    def tick(self, kind: str, path: object = None) -> None:
        """One more call."""
        self.calls += 1
        if self.calls == self.at or (self.on and self.calls > self.at):
            self.failed = self.failed or kind
            raise OSError(self.number, os.strerror(self.number), *([] if path is None else [str(path)]))

    def is_below(self, path: object) -> bool:
        """Whether a call is about this disk; the relative names of `rmtree`, which tidies up, are not."""
        return isinstance(path, str | os.PathLike) and str(os.fspath(path)).startswith(self.folder)

    def __enter__(self) -> "FailingDisk":
        for name in ("mkdir", "rename", "replace", "open"):
            self.enter_context(mock.patch.object(os, name, self.failing(name, getattr(os, name))))
        sync, pwrite, opened = os.fsync, os.pwrite, io.open

        def fsync(descriptor: int) -> None:
            self.tick("fsync")
            sync(descriptor)

        def write_at(*arguments: Any) -> int:
            self.tick("write")
            return pwrite(*arguments)

        def open_file(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not self.is_below(path):
                return opened(path, mode, *arguments, **options)
            self.tick("open", path)
            if mode == "wb":
                return io.BufferedWriter(Raw(self, path, mode))
            return opened(path, mode, *arguments, **options)

        self.enter_context(mock.patch.object(os, "fsync", fsync))
        self.enter_context(mock.patch.object(os, "pwrite", write_at))
        self.enter_context(mock.patch.object(io, "open", open_file))
        return self

    def failing(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """A function of `os` that can fail."""

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if self.is_below(path):
                self.tick(name, path)
            return do(path, *arguments, **options)

        return call

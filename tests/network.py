"""No test reaches a network: whoever tries is told that there is none, and the test fails, whatever it made of that."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

LOCAL = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None}
ATTEMPTS: list[object] = []
"""Whom this test has tried to reach."""


def refuse(host: object) -> None:
    """Raise an OSError unless `host` is this machine."""
    if (host.decode() if isinstance(host, bytes) else host) not in LOCAL:
        ATTEMPTS.append(host)
        raise OSError(f"tests have no network: {host}")


def guarded(do: Callable[..., Any]) -> Callable[..., Any]:
    """A method of sockets that reaches this machine alone; its last argument is the address."""

    def call(self: socket.socket, *arguments: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(arguments[-1][0])
        return do(self, *arguments)

    return call


@contextlib.contextmanager
def none() -> Iterator[None]:
    """Meanwhile there is no network."""
    look_up = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        refuse(host)
        return look_up(host, *arguments, **options)

    with contextlib.ExitStack() as stack:
        for name in ("connect", "connect_ex", "sendto"):
            stack.enter_context(mock.patch.object(socket.socket, name, guarded(getattr(socket.socket, name))))
        stack.enter_context(mock.patch.object(socket, "getaddrinfo", resolve))
        yield

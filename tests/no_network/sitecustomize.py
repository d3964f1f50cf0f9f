"""Put first on PYTHONPATH: every Python process that inherits it can reach loopback and local sockets only."""

import socket
from typing import Any

_LOCAL = ("127.", "::1", "localhost")


class _LoopbackSocket(socket.socket):
    """A socket that refuses to leave the machine."""

    def _check(self, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and not str(address[0]).startswith(_LOCAL):
            raise OSError(f"no network here: {address}")

    def connect(self, address: Any) -> None:
        self._check(address)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        self._check(address)
        return super().connect_ex(address)


_resolve = socket.getaddrinfo


def _local_only(host: Any, *arguments: Any, **more: Any) -> Any:
    if host is not None and not str(host).startswith(_LOCAL):
        raise socket.gaierror(f"no network here: {host}")
    return _resolve(host, *arguments, **more)


vars(socket).update(socket=_LoopbackSocket, getaddrinfo=_local_only)

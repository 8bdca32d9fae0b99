"""A TCP proxy before an S3 server that fails on demand, and can hold a transfer that is under way."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from typing import Literal

Failure = Literal["refused", "reset", "503"]

_REQUEST = re.compile(rb"^(?:PUT|POST) (\S+) HTTP/1.1")
_UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)
_CUT = 300  # bytes after which a connection is reset
_HELD = 30.0  # seconds that a transfer is held at most


class Trap:
    """The first transfer of a file is held until it is let go, for the process that sends it to be killed."""

    def __init__(self, file: str) -> None:
        self._file = re.compile(file)
        self.port: int | None = None  # of the sender, once it is there
        self.over = threading.Event()

    def takes(self, chunk: bytes, port: int) -> bool:
        """Whether this is the transfer; it is then held."""
        request = _REQUEST.match(chunk)
        if self.port is not None or request is None:
            return False
        if self._file.search(request[1].decode()) is None:
            return False
        self.port = port
        return True


class Proxy:
    """Passes connections on to a port of this machine."""

    def __init__(self, behind: int) -> None:
        self._behind = behind
        self.failure: Failure | None = None
        self.trap: Trap | None = None
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, failure: Failure) -> None:
        """From now on; connections that are open are reset."""
        self.failure = failure
        for connection in list(self._open):
            _reset(connection)

    def heal(self) -> None:
        """Pass on everything again."""
        self.failure = None

    def close(self) -> None:
        """Accept nothing any more."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, address = self._listener.accept()
                if self.failure == "refused":
                    _reset(client)
                    continue
                given = (client, address[1])
                threading.Thread(target=self._serve, args=given, daemon=True).start()

    def _serve(self, client: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError), client:
            self._open.add(client)
            with socket.create_connection(("127.0.0.1", self._behind)) as server:
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                self._forward(client, server, port)
                back.join()
        self._open.discard(client)

    def _forward(self, client: socket.socket, server: socket.socket, port: int) -> None:
        sent = 0
        while chunk := client.recv(65536):
            if self.trap is not None and self.trap.takes(chunk, port):
                self.trap.over.wait(_HELD)
            if self.failure == "503":
                client.sendall(_UNAVAILABLE)
                client.shutdown(socket.SHUT_RDWR)
                break
            if self.failure == "reset":
                server.sendall(chunk[: max(0, _CUT - sent)])
                sent += len(chunk)
                if sent > _CUT:
                    _reset(client)
                    break
                continue
            server.sendall(chunk)
        server.shutdown(socket.SHUT_WR)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()

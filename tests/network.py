"""A network between processes of this machine that can be cut and mended, as if a cable were pulled."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class Wire:
    """Passes on what arrives at a port of its own; while it is cut, nothing goes either way, and nothing is lost.

    Args:
        target: Gets it: an address with its port.

    Attributes:
        address: Of its own.
    """

    def __init__(self, target: str):
        self._host, port = target.split(":")
        self._port = int(port)
        self._whole = threading.Event()
        self._whole.set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._start(self._accept)

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self._listening.close()

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listening.accept()
                self._whole.wait()
                try:
                    far = socket.create_connection((self._host, self._port))
                except OSError:  # nobody is there yet
                    near.close()
                    continue
                self._start(self._pass_on, near, far)
                self._start(self._pass_on, far, near)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(1 << 16):
                self._whole.wait()
                target.sendall(received)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

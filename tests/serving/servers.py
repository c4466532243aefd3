"""Servers that tests start on a free port, kill and start again."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RedisServer:
    """Redis or Valkey, which keeps nothing on disk; skips the test where neither is installed."""

    def __init__(self, port: int | None = None) -> None:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            pytest.skip("needs Redis: neither redis-server nor valkey-server is installed")
        self.program, self.port = found, port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it, with further options, and wait until it answers."""
        words = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            self._folder.name,
        ]
        log = Path(self._folder.name) / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen([self.program, *words, *options], stdout=output, stderr=output)
        for _ in range(1000):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(1):
                    return
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.01)
        raise AssertionError(log.read_text())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


@contextmanager
def redis_server(port: int | None = None) -> Iterator[RedisServer]:
    """A running one, at its `url`."""
    server = RedisServer(port)
    try:
        server.start()
        yield server
    finally:
        server.close()

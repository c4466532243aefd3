"""Servers that tests start on a free port, kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

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

    def stop(self) -> None:
        """Let it answer no more, without ending it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


@contextmanager
def postgres_database() -> Iterator[str]:
    """The URL of an empty database, which is dropped afterwards.

    On the server that RECSYS_POSTGRESQL names, by default the one of user postgres on this machine; where none answers, on one
    with a cluster of its own. Skips the test where that cannot be either.
    """
    psycopg = pytest.importorskip("psycopg", reason="postgresql: psycopg is not installed")
    address = os.environ.get("RECSYS_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/postgres")
    name = f"recsys_test_{uuid.uuid4().hex}"
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(psycopg.connect(address, autocommit=True, connect_timeout=3))
        except psycopg.OperationalError:
            address = stack.enter_context(_cluster())
            connection = stack.enter_context(psycopg.connect(address, autocommit=True))
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        try:
            yield address.rpartition("/")[0] + f"/{name}"
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def _cluster() -> Iterator[str]:
    """PostgreSQL of its own; it does not run as root."""
    import psycopg

    found = [*map(Path, os.environ["PATH"].split(os.pathsep)), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    programs = next((folder for folder in found if (folder / "initdb").exists() and (folder / "postgres").exists()), None)
    if programs is None:
        pytest.skip("postgresql: no server answers, and initdb and postgres are not installed")
    account: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            if account:
                shutil.chown(folder, "postgres", "postgres")
            words = [programs / "initdb", "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "--no-sync"]
            subprocess.run(words, check=True, capture_output=True, cwd="/", **account)
        except (LookupError, OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"postgresql: no server answers, and a cluster cannot be made ({type(error).__name__})")
        port = free_port()
        address = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        words = [programs / "postgres", "-D", f"{folder}/data", "-p", str(port)]
        words += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        log = Path(folder) / "log"
        with log.open("ab") as output:
            process = subprocess.Popen(words, stdout=output, stderr=output, cwd="/", **account)
        try:
            for _ in range(1000):
                with suppress(psycopg.OperationalError), psycopg.connect(address):
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            yield address
        finally:
            process.send_signal(signal.SIGQUIT)  # it ends its own processes then
            process.wait()


@contextmanager
def redis_server(port: int | None = None) -> Iterator[RedisServer]:
    """A running one, at its `url`."""
    server = RedisServer(port)
    try:
        server.start()
        yield server
    finally:
        server.close()

"""Programs as processes of their own that need no second to start: forked from one process that has everything loaded.

In the environment of `forking`, `recsys` and `python` are small programs that hand their words, folder, environment and
streams to that process and end as its child ends; importing torch takes longer than most of what tests do.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recsys import config
from recsys.__main__ import main

ROOT = Path(__file__).parents[1]
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
told = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [told], [0, 1, 2])
answers = link.makefile()
child = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(child, number))
code = int(answers.readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
LOADED = (
    *("faiss", "mlflow.store.tracking.sqlalchemy_store", "onnxruntime", "polars", "rich.progress", "rich.table"),
    *("scipy.stats", "sklearn.covariance", "uvicorn"),
)
"""What takes long to import, and is imported where it is used."""
RECIPES_FOLDER = "RECIPES_OF_TESTS"
"""Of the environment: a folder that is looked in for recipes instead of the package's."""


@contextmanager
def forking() -> Iterator[dict[str, str]]:
    """The environment."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path is a short one
        address = f"{folder}/socket"
        for name in ("recsys", "python"):
            program = Path(folder, name)
            program.write_text(CLIENT.format(python=sys.executable, address=address))
            program.chmod(0o755)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        words = [sys.executable, "-c", f"from tests.forked import answer; answer({address!r})"]
        with subprocess.Popen(words, cwd=folder, env=environment) as process:
            try:
                while not Path(address).exists():
                    assert process.poll() is None, "the process that forks ended"
                    time.sleep(0.05)
                yield environment
            finally:
                process.kill()


def answer(address: str) -> None:
    """Run what each caller asks for in a process of its own, which is killed where the caller is."""
    ours = [
        name
        for layer in ("recsys", "features", "training", "serving")
        for _, name, _ in pkgutil.walk_packages([str(ROOT / layer)], f"{layer}.")
    ]
    for name in [*LOADED, *ours]:
        importlib.import_module(name)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        link, _ = listener.accept()
        if os.fork():
            link.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        told, streams, _, _ = socket.recv_fds(link, 1 << 20, 3)
        program, words, folder, environment = json.loads(told)
        if child := os.fork():
            for stream in streams:
                os.close(stream)
            watched = os.pidfd_open(child)
            link.sendall(f"{child}\n".encode())
            ready, _, _ = select.select([link, watched], [], [])
            if watched not in ready:
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if watched in ready:
                link.sendall(f"{code}\n".encode())
            os._exit(0)
        link.close()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        if RECIPES_FOLDER in environment:
            take_recipes_from(Path(environment[RECIPES_FOLDER]))
        os._exit(ended(program, words, folder))


def take_recipes_from(folder: Path) -> None:
    """Instead of the package's."""
    load = config.load_recipe
    config.load_recipe = lambda name, _, overrides=(): load(name, folder, overrides)


def ended(program: str, words: list[str], folder: str) -> int:
    """Run the program to its end, and return its exit code."""
    code = 0
    try:
        if program == "python":
            sys.argv, sys.path[0] = words, folder
            runpy.run_path(words[0], run_name="__main__")
        else:
            sys.argv = ["recsys", *words]
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code  # without taking down all that was loaded, which would copy it first

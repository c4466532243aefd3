"""Who may import whom, read from the source; and what the core needs, seen in processes where the rest is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REACHES = {
    "recsys": {"recsys"},
    "features": {"features", "recsys"},
    "training": {"training", "features", "recsys"},
    "serving": {"serving", "features", "recsys"},
}
COMMAND = {"recsys/__main__.py", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "recsys" / "command").rglob("*.py"))}
"""Reach every layer, inside functions, and nothing else reaches them."""
JOBS = {f"recsys/command/{name}.py" for name in ("backtest", "demo", "night", "promotion", "record", "reproduce")}
"""Jobs that span layers, which verbs import inside a function: they may load what they like."""
PUBLIC = ("recsys.api", "recsys.load", "recsys.evaluate", "recsys.Recommender")
"""Made in recsys/api.py, which reaches features and serving; for users, and no file but the package's own door loads it."""
DOORS = {
    "torchrec": {"recsys/embedding.py", "training/distributed.py"},
    "fbgemm_gpu": {"recsys/embedding.py", "training/distributed.py"},
    "mlflow": {"recsys/tracking.py"},
    "faiss": {"serving/index.py"},
    "optuna": {"training/tune.py"},
    "sentence_transformers": {"recsys/text.py"},
    "transformers": {"recsys/text.py"},
    "onnx": {"serving/graph.py"},
    "onnxruntime": {"serving/reader.py"},
    "fastapi": {"serving/app.py"},
    "starlette": {"serving/app.py"},
    "uvicorn": {"serving/app.py"},
    "prometheus_client": {"serving/telemetry.py"},
    "opentelemetry": {"serving/telemetry.py"},
    "psycopg": {"serving/delivery.py"},
    "redis": {"serving/stores.py"},
    "lmdb": {"serving/lmdb_store.py"},
    "ray": {"recsys/cluster.py"},
    "pydantic": {"recsys/config.py"},
    "typer": COMMAND,
    "rich": COMMAND,
}
"""The only files that import a heavy dependency."""
WITHIN_FUNCTIONS = {
    "polars": ("features", "serving"),
    "torchrec": (),
    "mlflow": (),
    "optuna": (),
    "sentence_transformers": (),
    "transformers": (),
    "faiss": ("serving",),
    "onnx": (),
    "onnxruntime": (),
    "opentelemetry": (),
    "psycopg": (),
    "redis": (),
    "lmdb": (),
    "ray": (),
}
"""Dependency → the layers that may load it with the module; everywhere else it loads where it is used."""
CORE = {"torch"}
"""All that the modules of recsys load, beside the standard library, before a function is called."""


@dataclass(frozen=True)
class Import:
    module: str
    """Full name of what is imported."""
    on_load: bool
    """Whether it happens when the file itself is imported."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports(tree: ast.AST, on_load: bool = True) -> Iterator[Import]:
    """Every import that can happen when the code runs; those for type checkers alone cannot."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, on_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            yield from (Import(f"{node.module}.{alias.name}", on_load) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(node.orelse, []), on_load)
        else:
            called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if called in ("import_module", "__import__"):
                yield Import(str(getattr(node.args[0], "value", "a name made at run time")), on_load)
            yield from imports(node, on_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def violations(path: str, source: str) -> list[str]:
    """Every rule that the file breaks."""
    layer, command = path.partition("/")[0], path in COMMAND
    found = []
    for each in imports(ast.parse(source)):
        package, where = each.package, f"{path} imports {each.module}"
        on_load = each.on_load and path not in JOBS
        anywhere = command and not on_load
        reached = REACHES["serving"] if path == "recsys/api.py" else REACHES[layer]
        if package in REACHES and package not in reached and not anywhere:
            found.append(f"{where}: against the arrows")
        of_command = f"{each.module}.".startswith(("recsys.command.", "recsys.__main__."))
        job = any(f"{each.module}.".startswith(f"{name.removesuffix('.py').replace('/', '.')}.") for name in JOBS)
        if (of_command and not command) or (job and not anywhere):
            found.append(f"{where}: a file of the command's, for its functions alone")
        public = f"{each.module}.".startswith(tuple(f"{name}." for name in PUBLIC))
        if public and (path != "recsys/__init__.py" or each.on_load):
            found.append(f"{where}: a name for users, for the package's own door alone")
        if package in DOORS and path not in DOORS[package]:
            found.append(f"{where}: not through its door")
        if on_load and package in WITHIN_FUNCTIONS and layer not in WITHIN_FUNCTIONS[package]:
            found.append(f"{where}: on load")
        light = package in sys.stdlib_module_names | CORE | REACHES.keys() or (command and package == "typer")
        if layer == "recsys" and on_load and not light:
            found.append(f"{where}: the core loads with torch alone")
        if command and on_load and package == "torch":
            found.append(f"{where}: the command starts without it")
    return found


SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for layer in REACHES
    for path in sorted((ROOT / layer).rglob("*.py"))
}


@pytest.mark.parametrize("path", SOURCES)
def test_a_file_imports_only_along_the_arrows_and_through_the_doors(path):
    assert violations(path, SOURCES[path]) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("recsys/model.py", "from features import dataset"),
        ("recsys/model.py", "def f():\n    import training.loop"),
        ("features/build.py", "import serving.index"),
        ("training/run.py", "from serving.export import export"),
        ("serving/engine.py", "async def f():\n    from training.run import train"),
        ("recsys/__main__.py", "import features.build"),
        ("recsys/__main__.py", "import torch.nn as nn"),
        ("recsys/__main__.py", "import recsys.command.demo"),
        ("recsys/command/terminal.py", "import rich"),
        ("recsys/command/lists.py", "import serving.engine"),
        ("recsys/command/lists.py", "import torch"),
        ("recsys/model.py", "def f():\n    from recsys.command import lists"),
        ("recsys/model.py", "def f():\n    from recsys.command.demo import run"),
        ("recsys/__init__.py", "from recsys.api import load"),
        ("recsys/__init__.py", "def f():\n    from serving.engine import Recommender"),
        ("recsys/model.py", "def f():\n    from recsys import api"),
        ("serving/engine.py", "from recsys import load"),
        ("recsys/command/lists.py", "def f():\n    import recsys.api"),
        ("recsys/api.py", "def f():\n    from training.run import train"),
        ("recsys/api.py", "import polars as pl"),
        ("recsys/api.py", "import recsys.command.lists"),
        ("recsys/model.py", "import numpy as np"),
        ("recsys/model.py", "def f():\n    import torchrec"),
        ("training/loop.py", "def f():\n    import mlflow"),
        ("training/run.py", "def f():\n    import optuna"),
        ("training/tune.py", "import optuna"),
        ("training/loop.py", "import polars as pl"),
        ("training/loop.py", "if True:\n    try:\n        import polars\n    except ImportError:\n        pass"),
        ("recsys/embedding.py", "import torchrec"),
        ("serving/engine.py", "def f():\n    __import__('faiss')"),
        ("serving/engine.py", "from importlib import import_module\nimport_module('training.loop')"),
    ],
)
def test_a_planted_import_is_found(path, source):
    assert violations(path, source) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("recsys/__main__.py", "import typer\ndef f():\n    import features.build, training.run, serving.app"),
        (
            "recsys/command/terminal.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from training.loop import Observation",
        ),
        ("recsys/embedding.py", "def f():\n    import torchrec"),
        ("recsys/__init__.py", "def f():\n    from recsys import api"),
        ("recsys/api.py", "from features.dataset import Dataset\nfrom serving.engine import Recommender"),
        ("training/run.py", "from features.dataset import Dataset\nfrom recsys.model import SequenceModel"),
    ],
)
def test_an_import_that_is_meant_is_let_through(path, source):
    assert violations(path, source) == []


def test_every_import_is_of_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    declared = {re.split(r"[^\w-]", line)[0] for line in lines}
    owners = packages_distributions()
    used = {each.package for source in SOURCES.values() for each in imports(ast.parse(source))}
    undeclared = {
        package
        for package in used - set(sys.stdlib_module_names) - set(REACHES)
        if not {name.lower().replace("_", "-") for name in owners.get(package, [package])} & declared
    }
    assert undeclared - {"starlette"} == set()  # a part of fastapi


def test_only_the_command_prints():
    speaking = {
        path
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    }
    assert speaking <= COMMAND | {"recsys/doctor.py"}  # the doctor runs alone where the command does not start


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN_ONE_EPOCH = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch
from recsys.batch import FIRST_ITEM, Batch, Sequences
from recsys.model import ModelSettings, SequenceModel
from training import losses, validate
from training.loop import TrainSettings, fit
from training.losses import LossSettings
from training.optimizer import OptimizerSettings
users, events, items = 5, 7, 11
rows = torch.arange(users * events) % items + FIRST_ITEM
ends = torch.full((users,), events)
sequences = Sequences(rows.int(), torch.arange(users * events), torch.arange(0, users * events + 1, events), ends - 2, ends - 1)
model = ModelSettings(embedding_size=6, blocks=1, heads=2, hidden_size=10, length=13)
state = fit(sequences, items, model, TrainSettings(epochs=1), LossSettings(negatives=3), OptimizerSettings())
print(state.steps, tuple(state.model.encode(Batch.of([[2, 3], [4]])).shape))
"""
BLOCKED = [
    *("features", "serving", "polars", "faiss", "mlflow", "torchrec", "fbgemm_gpu", "pydantic", "fastapi", "sklearn"),
    *("scipy", "matplotlib", "safetensors", "typer", "rich", "psutil", "optuna"),
]


def test_the_model_trains_where_torch_alone_is_installed():
    steps, shape = run(TRAIN_ONE_EPOCH.format(blocked=BLOCKED)).split(maxsplit=1)
    assert int(steps) >= 1
    assert shape.strip() == "(2, 6)"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_loads_no_heavy_dependency(arguments):
    heavy = ["torch", "polars", "mlflow", "faiss", "numpy", "sklearn", "fastapi", "matplotlib", "optuna"]
    code = f"""
import sys
from recsys.__main__ import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
print("loaded:", *(name for name in {heavy!r} if name in sys.modules))
"""
    assert run(code).splitlines()[-1] == "loaded:"

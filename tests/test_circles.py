"""No module and no folder reaches itself by imports, be they on load or in a function."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for layer in ("recsys", "features", "training", "serving")
    for path in (ROOT / layer).rglob("*.py")
}
ABOVE = ("recsys.__main__", "recsys.api", "recsys.command")
"""What users call, which reaches every layer; the rest of recsys is below all."""


def reached(name: str, tree: ast.AST) -> set[str]:
    """The modules of ours that a file imports, but for type checkers alone."""
    out: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node = ast.Module(node.orelse, [])
        words = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            words = [f"{node.module}.{alias.name}" for alias in node.names]
        for word in words:
            while word and word not in FILES:
                word = word.rpartition(".")[0]
            out |= {word} - {"", name}
        out |= reached(name, node)
    return out


def folder(name: str) -> str:
    """Where a module lies; a package lies in itself."""
    if name.startswith(ABOVE):
        return "above"
    return name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


IMPORTS = {name: reached(name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in FILES.items()}


def test_no_circle_of_imports_among_modules():
    assert circle(IMPORTS) == []


def test_no_circle_of_imports_among_folders():
    graph: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        if name != "recsys":  # which gives the public names of api when they are asked for
            graph.setdefault(folder(name), set()).update({folder(other) for other in others} - {folder(name)})
    assert circle(graph) == []


def test_a_planted_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
    assert reached("recsys.model", ast.parse("def f():\n    from serving.evaluation import judge, page")) == {
        "serving.evaluation.judge",
        "serving.evaluation.page",
    }

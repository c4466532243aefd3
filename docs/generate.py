"""Pages and pictures that are made of the code while the site is built, so that neither can tell of what is not there."""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import recsys
from recsys import errors
from recsys.__main__ import app
from recsys.attention import PATTERNS
from recsys.command.recipes import owners
from recsys.config import Settings
from recsys.errors import GuardError, RecsysError
from serving.admission import OnlineSettings
from serving.document import document

ROOT = Path(__file__).parents[1]
POSITIONS, SPAN = 24, 8
"""Of the pictures of attention: events of a history, and `model.span`."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs once it has found the pages that are written by hand."""
    made: dict[str, str | bytes] = {
        "reference/command.md": command(),
        "reference/recipe.md": recipe(),
        "reference/http.md": http(),
        "reference/python.md": python(),
        "reference/errors.md": mistakes(),
        "reference/modules.md": modules(),
        "pictures/imports.svg": imports(),
        **{f"pictures/{path.name}": path.read_bytes() for path in (ROOT / "notebooks").glob("*.png")},
        **{
            f"pictures/{name}-{'causal' if causal else 'masked'}.svg": pattern(name, causal)
            for name in PATTERNS
            for causal in (True, False)
        },
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell is escaped."""
    lines = [head, ["---"] * len(head), *([re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def code(text: Any) -> str:
    """As code, also within a table, where a code span cannot hold a bar; two underscores would be bold."""
    said = html.escape(str(text)).replace("|", "&#124;").replace("__", "&#95;&#95;")
    return f"<code>{said}</code>" if said else ""


def command() -> str:
    """Every verb with its help, its arguments and its options."""
    parts = [
        "# The command\n",
        f"{app.info.help} `--set section.key=value` changes one setting of [the recipe](recipe.md) and may be repeated.\n",
    ]
    for words, verb in verbs():
        about, _, example = inspect.cleandoc(verb.help or "").partition("Example: ")
        hints = typing.get_type_hints(inspect.unwrap(verb.callback))
        rows = []
        for each in verb.params:
            names = ", ".join(map(code, (*each.opts, *each.secondary_opts))) if each.param_type_name == "option" else ""
            kind = "" if getattr(each, "is_flag", False) else code(each.metavar or taken(hints[each.name]))
            default = "needed" if each.required else "" if each.default in (None, "", False, ()) else code(each.default)
            rows.append((names or kind, kind if names else "", default, each.help or ""))
        parts += [f"## recsys {words}\n", about, f"```\n{example.strip()}\n```\n"]
        parts.append(table(("", "takes", "default", "what it is"), rows) if rows else "It takes no options.\n")
    return "\n".join(parts)


def taken(hint: Any) -> str:
    """What an option takes, by the annotation of its parameter: `int` of `list[int] | None`."""
    inner = [each for each in typing.get_args(hint) if each is not type(None)]
    return taken(inner[0]) if inner else str(hint.__name__)


def verbs() -> Iterator[tuple[str, Any]]:
    """The words of every verb, and the verb."""
    for name, verb in typer.main.get_group(app).commands.items():
        below = getattr(verb, "commands", None)
        yield from [(name, verb)] if below is None else [(f"{name} {word}", each) for word, each in below.items()]


def recipe() -> str:
    """Every section with its keys: their type, their default, and what the class says of them."""
    own = owners()
    parts = [
        "# The recipe\n",
        "A recipe is a TOML file of these sections. What it leaves out has the default; `--set section.key=value` goes before",
        "both.",
        "An unknown section or key is refused, and the nearest known one is named.\n",
        "`training/recipes/` holds those that come with the package: "
        + ", ".join(code(path.stem) for path in sorted((ROOT / "training" / "recipes").glob("*.toml")))
        + ".\n",
    ]
    for owner in [*own, OnlineSettings]:
        where = "" if owner in own else "\n\nIt is no section of a recipe: the verbs that read it take it by `--set`."
        rows = [
            (code(name), code(kind), code(default), said.replace("``", "`"))
            for name, kind, default, said in described_fields(owner)
        ]
        parts += [f"## {owner.section}\n", inspect.cleandoc(owner.__doc__ or "") + where + "\n"]
        parts.append(table(("key", "type", "default", "what it is"), rows))
    return "\n".join(parts)


def described_fields(owner: type[Settings]) -> Iterator[tuple[str, str, str, str]]:
    """Of each key: its name, its type as it is written, its default as TOML would have it, and the text below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
    said = {
        above.target.id: (ast.unparse(above.annotation), inspect.cleandoc(below.value.value))
        for above, below in pairwise(body)
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
    for field in dataclasses.fields(owner):  # type: ignore[arg-type]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        kind, about = said.get(field.name, (str(field.type), ""))
        yield field.name, kind, json.dumps(default, default=str, ensure_ascii=False), about


def http() -> str:
    """Every operation of the OpenAPI document, and every schema."""
    told = document(recsys.__version__)
    parts = ["# The HTTP API\n", f"{told['info']['description']} The same as OpenAPI 3.1 is at `/openapi.json` of a server.\n"]
    for path, methods in told["paths"].items():
        for method, said in methods.items():
            parts += [f"## {method.upper()} {path}\n", said["summary"] + "\n"]
            if "requestBody" in said:
                body = said["requestBody"]["content"]["application/json"]
                parts.append(f"Takes {reference(body['schema'])}:\n")
                parts += [f"```json\n{json.dumps(each['value'])}\n```\n" for each in body["examples"].values()]
            rows = [
                (code(each["name"]), each["in"], kind_of(each["schema"]), each["description"])
                for each in said.get("parameters", ())
            ]
            if rows:
                parts.append(table(("parameter", "in", "type", "what it is"), rows))
            rows = []
            for status, answer in said["responses"].items():
                (content,) = answer["content"].values()
                rows.append((status, reference(content["schema"]), answer["description"]))
            parts.append(table(("status", "answers", "when"), rows))
    for name, schema in sorted(told["components"]["schemas"].items()):
        parts += [f"## {name}\n", schema.get("description", "") + "\n"]
        needed = schema.get("required", ())
        rows = [
            (
                code(key),
                kind_of(part),
                "needed" if key in needed else code(json.dumps(part["default"])) if "default" in part else "",
                part.get("description", ""),
            )
            for key, part in schema.get("properties", {}).items()
        ]
        if rows:
            parts.append(table(("key", "type", "default", "what it is"), rows))
    return "\n".join(parts)


def reference(schema: dict[str, Any]) -> str:
    """A link to a schema of the page, or its type."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return f"[{name}](#{name.lower()})" if name else kind_of(schema)


def kind_of(schema: dict[str, Any]) -> str:
    """The type of a schema in a word or two, with its bounds."""
    if "$ref" in schema:
        return reference(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(kind_of, schema["anyOf"])))
    if "enum" in schema:
        return " or ".join(code(json.dumps(value)) for value in schema["enum"])
    if schema.get("type") == "array" and "items" in schema:
        most = f", at most {schema['maxItems']:,}" if "maxItems" in schema else ""
        return f"array of {kind_of(schema['items'])}{most}"
    bounds = [f"{word} {schema[key]:,}" for word, key in BOUNDS.items() if key in schema]
    return ", ".join([str(schema.get("type", "anything")), *bounds])


BOUNDS = {"at least": "minimum", "at most": "maximum", "more than": "exclusiveMinimum", "characters, at most": "maxLength"}


def python() -> str:
    """The public names of the package, with their docstrings."""
    parts = ["# The Python API\n", inspect.cleandoc(recsys.__doc__ or "") + "\n"]
    for name, found in ((name, getattr(recsys, name)) for name in recsys.__all__ if not name.startswith("_")):
        parts += documented(f"recsys.{name}", found)
        if inspect.isclass(found):
            for word, method in inspect.getmembers(found, inspect.isfunction):
                if not word.startswith("_"):
                    parts += documented(f"{name}.{word}", method)
    return "\n".join(parts)


def documented(name: str, found: Any) -> Iterator[str]:
    """A heading, the signature, and the docstring with its examples as code."""
    yield f"## {name}\n"
    if not inspect.isclass(found):
        given = inspect.signature(found)
        kinds = [each.kind for each in given.parameters.values()]
        listed = [str(each) for each in given.parameters.values()]
        if inspect.Parameter.KEYWORD_ONLY in kinds:
            listed.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
        parameters = "".join(f"    {each},\n" for each in listed if each != "self")
        told = f"{name}(\n{parameters}) -> {given.return_annotation}"
        yield "```python\n" + re.sub(r"(: )'([^']*)'", r"\1\2", told) + "\n```\n"
    text, *examples = re.split(r"^(?=>>> )", inspect.cleandoc(found.__doc__ or ""), maxsplit=1, flags=re.MULTILINE)
    yield text
    yield from (f"```pycon\n{example}\n```\n" for example in examples)


def mistakes() -> str:
    """What the command ends with, and the exceptions of the package."""
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, RecsysError)]
    rows = [
        (
            code(f"recsys.errors.{each.__name__}"),
            "3" if issubclass(each, GuardError) else "2",
            inspect.cleandoc(each.__doc__ or ""),
        )
        for each in classes
    ]
    return "\n".join(
        [
            "# Errors and exit codes\n",
            "A mistake in what you gave is one line on stderr: what was wrong, what was found and what to do.\n",
            table(("exit code", "meaning"), EXITS),
            "## Exceptions\n",
            "From Python the same are raised as exceptions; all are `recsys.errors.RecsysError`.\n",
            table(("exception", "exit code", "meaning"), rows),
        ]
    )


EXITS = [
    ("0", "All is done. `recsys serve` ends with it after SIGTERM, once what was in flight is answered."),
    ("1", "A mistake of ours: a traceback. `recsys doctor` ends with it where something does not fit."),
    ("2", "A mistake in what was given, or something that is not there."),
    (
        "3",
        "A rule does not hold, and all stays as it was: a guard of the night, the gate of `[promotion]`, a leak, a run that is "
        "made otherwise.",
    ),
    ("130", "Interrupted from the keyboard."),
]


def modules() -> str:
    """Every module with the sentence that its docstring begins with, folder by folder."""
    parts = ["# The modules\n", "What each file of the package is, by its own first sentence.\n"]
    for place, said in FOLDERS.items():
        rows = [
            (code(path.name), (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0])
            for path in sorted((ROOT / place).glob("*.py"))
            if path.name != "__init__.py"
        ]
        parts += [f"## {place}\n", said + "\n", table(("file", "what it is"), rows)]
    return "\n".join(parts)


FOLDERS = {
    "recsys": "What training and serving agree on, the command, and the names for Python.",
    "recsys/command": "The command's verbs, and the jobs that span layers.",
    "features": "Raw logs to histories.",
    "training": "Histories to a run.",
    "serving": "A run to a bundle, and a bundle to answers.",
    "serving/evaluation": "Numbers one can decide by.",
}


def pattern(name: str, causal: bool) -> str:
    """Who attends to whom, as SVG: a line an event that looks, a column an event that is looked at, filled where it sees it."""
    at = torch.arange(POSITIONS)
    sees = PATTERNS[name].sees(at[:, None], at[None], SPAN)
    sees = sees & (at[None] <= at[:, None]) if causal else sees
    step, side = 10, 10 * POSITIONS
    cells = "".join(
        f'<rect x="{step * key + 40}" y="{step * query + 30}" width="9" height="9" fill="{"#3b6fb6" if seen else "#e4e8ee"}"/>'
        for query, line in enumerate(sees.tolist())
        for key, seen in enumerate(line)
    )
    words = (
        f'<text x="{40 + side / 2}" y="18" text-anchor="middle">looked at: the first event … the last</text>'
        f'<text transform="translate(28 {30 + side / 2}) rotate(-90)" text-anchor="middle">who looks</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side + 50} {side + 40}" height="{side + 40}" font-size="12" '
        f'font-family="sans-serif"><title>{name}</title><rect width="100%" height="100%" fill="white"/>{words}{cells}</svg>'
    )


PLACES = {
    "command": ("the command, the API", 250, 20),
    "training": ("training", 20, 120),
    "serving.evaluation": ("serving.evaluation", 480, 120),
    "serving": ("serving", 480, 220),
    "features": ("features", 110, 320),
    "recsys": ("recsys", 360, 420),
}
"""Of the picture of imports: folder → what stands in its box, and where."""


def imports() -> str:
    """Which folder imports which, and how often, as SVG: an arrow leads to what is imported."""
    counts: dict[tuple[str, str], int] = {}
    for layer in ("recsys", "features", "training", "serving"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    edge = folder(".".join(path.relative_to(ROOT).with_suffix("").parts)), folder(name or "")
                    if edge[0] != edge[1] and all(edge) and "__init__" not in path.name:
                        counts[edge] = counts.get(edge, 0) + 1
    arrows, wide, high = [], 200, 44
    for (one, other), count in sorted(counts.items()):
        (_, x, y), (_, x2, y2) = PLACES[one], PLACES[other]
        begin, end = (x + wide / 2, y + high), (x2 + wide / 2 + (x - x2) / 5, y2 - 3)
        arrows.append(f'<path d="M{begin[0]} {begin[1]} L{end[0]:.0f} {end[1]}" marker-end="url(#tip)"/>')
        at = begin[0] + (end[0] - begin[0]) * 0.42, begin[1] + (end[1] - begin[1]) * 0.42
        arrows.append(f'<text x="{at[0] + 4:.0f}" y="{at[1]:.0f}" font-size="11" fill="#5a6b7d" stroke="none">{count}</text>')
    boxes = [
        f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="8" fill="#eef4fc" stroke="#3b6fb6"/>'
        f'<text x="{x + wide / 2}" y="{y + 27}" text-anchor="middle">{name}</text>'
        for name, x, y in PLACES.values()
    ]
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 480" font-family="system-ui, sans-serif" font-size="14" '
        f'fill="#1d2733"><defs>{tip}<path d="M0 0 8 4 0 8z" fill="#5a6b7d"/></marker></defs>'
        f'<rect width="700" height="480" rx="12" fill="#fff"/><g stroke="#5a6b7d" fill="none">{"".join(arrows)}</g>'
        f"{''.join(boxes)}</svg>"
    )


def folder(module: str) -> str:
    """The folder of PLACES that a module of ours lies in; empty for others, and for what is not drawn."""
    if module.startswith(("recsys.command", "recsys.api", "recsys.__main__")):
        return "command"
    return next((name for name in PLACES if f"{module}.".startswith(f"{name}.")), "")

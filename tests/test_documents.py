"""The documents say what is there.

The README has a fenced block under `## Tree`: a line is a name, then two or more spaces and what it is; a folder's name ends
with /, and what lies in it stands below it, two spaces further in:

    recsys/           what training and serving agree on
      attention.py    self-attention blocks
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import typer

import recsys
from recsys.__main__ import app

ROOT = Path(__file__).parents[1]
LAYERS = ("recsys", "features", "training", "serving")
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("*.md"))]
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def tree(text: str) -> list[str]:
    """Paths that the README's tree names; those of folders end with /."""
    block = FENCE.search(text, re.search(r"^## Tree$", text, re.MULTILINE).end()).group(1)
    paths: list[str] = []
    folders: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        name = line.split()[0]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_notebooks_define_no_function():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.Lambda)], path.name
        assert not any(cell.get("outputs") for cell in cells), f"{path.name}: keeps outputs; clear them"


def commands(text: str) -> list[list[str]]:
    """The words of every `make …` and `recsys …` in code, fenced or inline, without what is set before them."""
    fenced = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = []
    for line in [*fenced, *inline]:
        for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*|\"[^\"]*\"|'[^']*'", r"\1", line)):
            words = part.removeprefix("$ ").split()
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words and words[0].rpartition("/")[2] in ("make", "recsys"):
                found.append([words[0].rpartition("/")[2], *words[1:]])
    return found


def verbs() -> dict[str, set[str]]:
    """The command's verbs, those of a group as two words, each with its options."""
    found = dict(typer.main.get_group(app).commands)
    for name, group in list(found.items()):
        if hasattr(group, "commands"):
            found |= {f"{name} {verb}": command for verb, command in found.pop(name).commands.items()}
    return {
        name: {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, verb in found.items()
    }


def verb_of(words: list[str]) -> str:
    """The verb that the words after `recsys` begin with."""
    return " ".join(words[:2]) if " ".join(words[:2]) in verbs() else words[0]


def targets() -> set[str]:
    """What make can be asked for."""
    return set(re.search(r"^\.PHONY: (.+)$", text_of("Makefile"), re.MULTILINE).group(1).split())


def test_the_tree_names_every_module_and_nothing_that_is_not_there():
    named = tree(text_of("README.md"))
    on_disk = {path.relative_to(ROOT).as_posix() for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    assert sorted({path for path in on_disk if not path.endswith("__init__.py")} - set(named)) == []
    assert [path for path in named if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())] == []
    assert len(named) == len(set(named))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_is_quoted_exists_with_its_options(document):
    known = {"--help", "--version"}
    for program, *words in commands(text_of(document)):
        where = f"{document}: {program} {' '.join(words)}"
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets(), where
        elif words and words[0] not in known:
            assert verb_of(words) in verbs(), where
            options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert options <= verbs()[verb_of(words)] | known, where


def test_the_readme_quotes_every_verb_and_contributing_every_target():
    assert (
        set(verbs()) - {verb_of(words[1:]) for words in commands(text_of("README.md")) if words[0] == "recsys" and words[1:]}
        == set()
    )
    quoted = {
        word for words in commands(text_of("README.md") + text_of("CONTRIBUTING.md")) if words[0] == "make" for word in words
    }
    assert targets() - quoted == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_or_heading_of_ours_resolves(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(document))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document}: {link}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text(encoding="utf-8")), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in slugs, f"{document}: {link}"


def test_the_changelog_has_the_version_that_is_here():
    assert re.search(rf"^## \[{re.escape(recsys.__version__)}\]", text_of("CHANGELOG.md"), re.MULTILINE)


def test_commands_are_found_wherever_code_quotes_them():
    shell = "$ .venv/bin/recsys demo --out x  # recsys none\nrecsys train a \\\n  --set b=c"
    text = f"`make test` and `FLAVOUR=gpu make setup`\n```\n{shell}\n```\n"
    assert sorted(commands(text)) == [
        ["make", "setup"],
        ["make", "test"],
        ["recsys", "demo", "--out", "x"],
        ["recsys", "train", "a", "--set", "b=c"],
    ]


def test_a_tree_is_read_by_its_indentation():
    text = "## Tree\n\n```\na/      one\n  b/    two\n    c.py  three\n  d.py  four\nLICENSE\n```\n"
    assert tree(text) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "LICENSE"]

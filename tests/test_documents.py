"""The documents say what is there.

The README has a fenced block under `## Tree`: a line is a name, then two or more spaces and what it is; a folder's name ends
with /, and what lies in it stands below it, two spaces further in:

    recsys/           what training and serving agree on
      command/        the verbs of the command
"""

from __future__ import annotations

import ast
import dataclasses
import html
import json
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import typer

import recsys
from recsys.__main__ import app
from recsys.attention import PATTERNS
from recsys.batch import FIRST_ITEM
from recsys.command.recipes import owners
from recsys.config import Settings
from recsys.errors import RecsysError
from recsys.model import ModelSettings, SequenceModel
from serving.admission import OnlineSettings
from serving.document import OPERATIONS
from training import losses

ROOT = Path(__file__).parents[1]
LAYERS = ("recsys", "features", "training", "serving")
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("*.md"))]
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
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
        for part in re.split(r"&&|;|\||\$\(|\)", re.sub(r"(^|\s)#.*|\"[^\"]*\"|'[^']*'", r"\1", line)):
            words = part.removeprefix("$ ").split()
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words and words[0].rpartition("/")[2] in ("make", "recsys"):
                found.append([words[0].rpartition("/")[2], *words[1:]])
    return found


@cache
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


def test_the_tree_names_every_folder_of_code_and_nothing_that_is_not_there():
    named = tree(text_of("README.md"))
    folders = {path.parent.relative_to(ROOT).as_posix() + "/" for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    assert sorted(folders - set(named)) == []
    assert [path for path in named if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())] == []
    assert len(named) == len(set(named))


def test_the_page_of_modules_has_every_module_with_its_sentence():
    listed = html.unescape(runpy.run_path(str(ROOT / "docs" / "generate.py"))["modules"]())
    for path in (path for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if path.name != "__init__.py"):
        folder = listed.split(f"## {path.parent.relative_to(ROOT).as_posix()}\n")[1].partition("\n## ")[0]
        assert re.search(rf"^\| <code>{re.escape(path.name)}</code> \| \w", folder, re.MULTILINE), path


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES])
def test_every_command_that_is_quoted_exists_with_its_options(document):
    known = {"--help", "--install-completion", "--version"}
    for program, *words in commands(text_of(document)):
        where = f"{document}: {program} {' '.join(words)}"
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets(), where
        elif words and words[0] not in known:
            assert verb_of(words) in verbs(), where
            options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert options <= verbs()[verb_of(words)] | known, where


def test_readme_and_pages_quote_every_verb_and_contributing_every_target():
    pages = "\n".join(map(text_of, ["README.md", *PAGES]))
    assert set(verbs()) - {verb_of(words[1:]) for words in commands(pages) if words[0] == "recsys" and words[1:]} == set()
    quoted = {
        word for words in commands(text_of("README.md") + text_of("CONTRIBUTING.md")) if words[0] == "make" for word in words
    }
    assert targets() - quoted == set()


def test_the_readme_has_its_blocks_and_results_that_stand_in_the_page_of_all_results():
    readme = text_of("README.md")
    blocks = ["Two commands", "Results", "Tree", "A loss in ten lines", "What it does not do", "Licence and sources"]
    assert re.findall(r"^## (.+)$", FENCE.sub("", readme), re.MULTILINE) == blocks
    table = re.findall(r"^\|.*\|$", readme, re.MULTILINE)
    figures = [figure for line in table for figure in re.findall(r"\.\d{4}(?: ± \.\d{4})?", line)]
    assert len(figures) > 10
    assert [figure for figure in figures if figure not in text_of("docs/explanation/results.md")] == []


def test_the_loss_of_the_readme_is_its_formula_and_is_a_choice(monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    exec(block, {})
    settings = losses.LossSettings(kind="bpr", negatives=13)
    generator = torch.Generator().manual_seed(0)
    model = SequenceModel(ModelSettings(embedding_size=8), items=31).initialise(generator)
    states, rows = torch.randn(7, 8, generator=generator), torch.arange(FIRST_ITEM, FIRST_ITEM + 7)
    drawn = losses.negatives(settings, torch.ones(31), rows, generator)
    pairs = [(n, row) for n in range(7) for row in drawn.rows_S.tolist() if row != rows[n]]
    vector = model.vectors(torch.arange(FIRST_ITEM + 31))
    wanted = [-torch.log(torch.sigmoid(states[n] @ (vector[rows[n]] - vector[row]))) for n, row in pairs]
    found = losses.LOSSES["bpr"](model, states, losses.Targets(rows, drawn), settings, generator)
    assert 0 < len(pairs) < 7 * len(drawn.rows_S)
    assert torch.allclose(found, torch.stack(wanted).mean())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it; links, anchors and the order of pages are MkDocs' to check."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_fetches_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)", text)
        loaded += re.findall(r"<link[^>]*\srel=\"(?:stylesheet|preconnect|icon)\"[^>]*\shref=\"([^\"]+)", text)
        loaded += re.findall(r"<link[^>]*\shref=\"([^\"]+)\"[^>]*\srel=\"(?:stylesheet|preconnect|icon)\"", text)
        assert loaded and not [address for address in loaded if "//" in address], path.name
    assert not [path for path in site.rglob("*.css") if re.search(r"url\(\s*[\"']?(?:https?:)?//", path.read_text("utf-8"))]


def test_the_reference_names_every_verb_option_key_operation_and_error(site):
    pages = {
        path.stem: html.unescape(re.sub(r"<[^>]+>", "", path.read_text("utf-8"))) for path in site.glob("reference/*.html")
    }
    for verb, options in verbs().items():
        assert f"recsys {verb}\n" in re.sub("¶", "\n", pages["command"]) and not [
            each for each in options if each not in pages["command"]
        ]
    for owner in [*owners(), OnlineSettings]:
        keys = [owner.section, *(field.name for field in dataclasses.fields(owner))]
        assert not [key for key in keys if key not in pages["recipe"]], owner.section
    ours = {each for each in Settings.__subclasses__() if not each.__module__.startswith("tests.")}
    assert ours == {*owners(), OnlineSettings}
    assert not [each.path for each in OPERATIONS if f"{each.method} {each.path}" not in pages["http"]]
    assert not [name for name in recsys.__all__ if not name.startswith("_") and f"recsys.{name}" not in pages["python"]]
    told = [each.__name__ for each in RecsysError.__subclasses__() if not each.__name__.startswith("_")]
    assert not [name for name in told if name not in pages["errors"]]


def test_every_key_of_a_recipe_says_what_it_is():
    module = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert [
        (owner.section, name)
        for owner in [*owners(), OnlineSettings]
        for name, _, _, said in module["described_fields"](owner)
        if not said
    ] == []


def test_the_pictures_of_attention_are_the_patterns():
    """Counted by hand: of 24 events, blocks of 8, each with one event that all later ones see."""
    draw = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pattern"]
    filled = {name: draw(name, True).count("#3b6fb6") for name in PATTERNS}
    assert filled == {"full": 24 * 25 // 2, "local": 24 * 25 // 2 - 16 * 17 // 2, "block_sparse": 3 * 36 + 8 + 16}


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

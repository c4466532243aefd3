"""What the documents and the help tell people to type is run, as it stands, in bash.

Pages run in the order of mkdocs.yml, in one folder: a block with a title is a file, one of `sh` holds commands. What cannot run
here is marked `console`, and is checked by tests/test_documents.py.
"""

from __future__ import annotations

import inspect
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from recsys.__main__ import app
from tests.forked import RECIPES_FOLDER
from tests.serving.servers import free_port, postgres_database, redis_server

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def bash(script: str, folder: Path, environment: dict[str, str], fine: str = "") -> None:
    """Run it; what it leaves running is ended. Fails with the end of what it said, but not where `fine` is found there."""
    script = f"set -euxo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    refused = fine and re.search(fine, done.stderr)
    assert done.returncode == 0 or refused, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


def pages(nav: object) -> Iterator[str]:
    """The pages of mkdocs.yml's `nav`, in order, that are no generated ones."""
    for part in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else []:
        if isinstance(part, str):
            if (ROOT / "docs" / part).is_file():
                yield part
        else:
            yield from pages(part)


def files_of(page: str) -> dict[str, str]:
    """The files that a page has its reader save, by name."""
    found = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return {title: block for _, title, block in found if title}


def script_of(page: str) -> str:
    """The page's files, then its commands, as one script."""
    blocks = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return saved(files_of(page)) + "".join(block for language, title, block in blocks if language == "sh" and not title)


def saved(files: dict[str, str]) -> str:
    return "".join(f"cat > {name} <<'END_OF_FILE'\n{text}END_OF_FILE\n" for name, text in files.items())


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, str]]:
    """What stands in documents, and what is there instead in a test: servers and free ports."""
    with redis_server() as redis, postgres_database() as database:
        yield {
            "redis://localhost:6379": f"redis://127.0.0.1:{redis.port}",
            "//localhost/shop": database.partition(":")[2],
            "8000": str(free_port()),
        }


def placed(text: str, places: dict[str, str]) -> str:
    for said, found in places.items():
        text = text.replace(said, found)
    return text


RECIPES = {
    "ml-1m": """
[data]
source = "ml-1m"
category_columns = ["categories"]
[model]
embedding_size = 8
blocks = 1
hidden_size = 11
length = 13
[train]
epochs = 2
batch_tokens = 503
[tune]
minutes = 0.05
""",
    "tiny": """
[data]
now = 1800000000
[synthetic]
users = 211
items = 101
events_per_user = 13
[model]
embedding_size = 8
length = 13
[train]
epochs = 2
batch_tokens = 503
""",
}
"""In the place of those that the package has under these names, which learn for minutes."""
PREPARED = """
recsys features shop.toml --data . --out datasets/shop
recsys train shop.toml --dataset datasets/shop --out runs/shop --set tracking.uri=off --set train.epochs=1
recsys export runs/shop --out bundles/shop
"""
"""What the examples find in the folder beside what examples before them made; the registry is of the other set."""
BEFORE = {
    "compare": "cp -r reports/ml-1m reports/old; cp -r reports/ml-1m reports/new",
    "bundles promote": "for n in 1 2 3 4 5 6; do recsys export runs/ml-1m --out bundles/again-$n; done",
    "bundles rollback": "recsys bundles promote 7",
}
FINE = {
    "bundles promote": "version 7 is refused",
    "budget": "no profile keeps to",
}
"""An answer that is none of the user's mistakes: on this data, or on a busy machine."""
NOT_RUN = {"doctor": "tests/recsys/test_doctor.py runs it, and it takes as long as a third of all others"}
SERVED = """
SERVER=$!
curl -sS --fail --retry 60 --retry-connrefused --retry-delay 1 -d '{"history": [1, 2], "k": 5}' localhost:8000/v1/recommend
kill $SERVER
wait $SERVER
"""


def examples() -> dict[str, str]:
    """The example in each verb's help; `export` stands before the verbs that need its bundle."""
    found = {}
    for name, verb in typer.main.get_group(app).commands.items():
        below = {f"{name} {word}": each for word, each in verb.commands.items()} if hasattr(verb, "commands") else {name: verb}
        found |= {words: inspect.cleandoc(each.help).partition("Example: ")[2].strip() for words, each in below.items()}
    first = list(found)[: list(found).index("evaluate")]
    return {words: found[words] for words in [*first, "export", *found]}


def write_movies(folder: Path) -> None:
    """Ratings in MovieLens' form, of people who like the movies next to each other."""
    folder.mkdir()
    draw = random.Random(0)
    titles = {1: "Toy Story (1995)", 2: "Toy Story 2 (1999)"} | {n: f"Movie {n} (1990)" for n in range(3, 32)}
    genres = ["Animation|Comedy", "Drama", "Comedy"]
    (folder / "movies.dat").write_text("".join(f"{n}::{title}::{genres[n % 3]}\n" for n, title in titles.items()))
    (folder / "users.dat").write_text("".join(f"{n}::F::25::1::10000\n" for n in range(1, 98)))
    seen = [
        (user, (first + step) % 31 + 1, step) for user in range(1, 98) for first in [draw.randrange(31)] for step in range(11)
    ]
    ratings = [f"{user}::{movie}::5::{1_000_000_000 + 10_000 * user + 60 * step}\n" for user, movie, step in seen]
    (folder / "ratings.dat").write_text("".join(ratings))


@pytest.mark.timeout(1200)
def test_every_example_of_the_help_runs(tmp_path, forked, places, subtests):
    recipes, folder = tmp_path / "recipes", tmp_path / "work"
    for made in (recipes, folder):
        made.mkdir()
    for name, text in RECIPES.items():
        (recipes / f"{name}.toml").write_text(text)
    write_movies(folder / "ml-1m")
    files = saved(files_of("tutorial.md") | files_of("how-to/add-items.md"))
    environment = forked | {RECIPES_FOLDER: str(recipes)}
    bash(f"{files}python make.py\n{PREPARED}", folder, environment)
    for verb, example in examples().items():
        with subtests.test(verb):
            assert example.startswith(f"recsys {verb}"), "the help has no example"
            if verb in NOT_RUN:
                continue
            script = f"{example} &{SERVED}" if verb == "serve" else example
            bash(placed(f"{BEFORE.get(verb, '')}\n{script}", places), folder, environment, FINE.get(verb, ""))


@pytest.mark.timeout(1200)
def test_every_command_of_the_pages_runs(tmp_path, forked, places, subtests):
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    (tmp_path / "shop").mkdir()
    for page in pages(nav):
        if script := script_of(page):
            with subtests.test(page):
                bash(placed(script, places), tmp_path / "shop", forked)

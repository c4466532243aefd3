"""How long 1,000 new items take from a file to being recommended from a bundle of 100,000, and whether they are found.

usage: python -m tests.benchmarks.items_add [FOLDER] [--items 100000] [--new 1000]

A made-up catalogue: ten items a family, whose texts share an adjective, a noun and a place; a user looks at a family, then at
another. Everything goes by the command; the time of `recsys items add` is a whole process's. A new item is found where it
stands in the first 10 for a history of five items of its family. Prints one JSON object.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

FAMILY = 10
RECIPE = """
[data]
now = 1800000000
[model]
embedding_size = 64
similarity = "cosine"
temperature = 0.1
length = 20
text = "pooled"
id_dropout = 0.3
[train]
epochs = 3
batch_tokens = 3200
[loss]
negatives = 2048
[optimizer]
learning_rate = 3e-3
[tracking]
uri = "off"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--new", type=int, default=1_000)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    families = args.items // FAMILY
    write(folder / "raw", families)
    (folder / "shop.toml").write_text(RECIPE)
    run("features", folder / "shop.toml", "--data", folder / "raw", "--out", folder / "dataset")
    run("train", folder / "shop.toml", "--dataset", folder / "dataset", "--out", folder / "run")
    run("export", folder / "run", "--out", folder / "bundle")
    chosen = random.Random(1).sample(range(families), args.new)
    new = {"item_id": [args.items + place for place in range(args.new)], "title": [title(family, 99) for family in chosen]}
    pl.DataFrame(new).write_csv(folder / "new.csv")
    started = time.perf_counter()
    run("items", "add", folder / "bundle", "--items", folder / "new.csv", "--no-register")
    seconds = time.perf_counter() - started
    print(json.dumps({"items": args.items, "new": args.new, "seconds": round(seconds, 1), **found(folder, chosen, args.items)}))


def title(family: int, member: int) -> str:
    words = random.Random(family)
    adjective, noun, place = (words.randrange(700) for _ in range(3))
    return f"quality{adjective} thing{noun} from town{place}, model {member}"


def write(folder: Path, families: int) -> None:
    """Two visits of each family by five users, so that every item has some events."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, events = random.Random(0), []
    for user in range(families * 2):
        for visit, family in enumerate((user % families, draw.randrange(families))):
            for place, member in enumerate(draw.sample(range(FAMILY), 6)):
                events.append((user, family * FAMILY + member, 1_000_000 + 1000 * user + 10 * visit + place))
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(folder / "events.parquet")
    items = range(families * FAMILY)
    table = {"item_id": list(items), "title": [title(item // FAMILY, item % FAMILY) for item in items]}
    pl.DataFrame(table).write_parquet(folder / "items.parquet")


def found(folder: Path, chosen: list[int], items: int) -> dict[str, float]:
    from serving.engine import Recommender

    torch.set_num_threads(1)
    recommender = Recommender.load(folder / "bundle", threads=1)
    hits = 0
    for place, family in enumerate(chosen):
        history = [family * FAMILY + member for member in range(5)]
        answer = recommender.answer(history, 10, find=recommender.catalogue.by_id)
        hits += items + place in [item["item_id"] for item in answer["items"]]
    return {"found_in_10": hits / len(chosen), "recommendable": recommender.items}


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "recsys", *map(str, words)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()

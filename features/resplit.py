"""A data set split anew, without its raw logs: the files are those of building from them with that split."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from features.build import Progress, require_place, summed, workshop, write_histories
from features.dataset import MANIFEST, Dataset
from features.events import count_items, fill_times
from features.parts import add_counts, by_users
from features.schema import Tally
from features.split import SplitSettings
from recsys.bundle import publish

KEPT = ("events.parquet", "users.parquet", "quarantine.parquet")
"""Files that no split changes."""


def resplit(dataset: Dataset, split: SplitSettings, out: Path, progress: Progress | None = None) -> Dataset:
    """Publish at `out` the data set of the same events, items and users, split otherwise.

    Raises DataError: no event is for training, or `out` is in the way.
    """
    require_place(out)
    old, events = dataset.manifest, dataset.manifest["events"]
    counts = count_items(dataset.events.head(0).collect(), split)
    for part in by_users(dataset.events, summed(progress, "events", events)):
        counts = add_counts(counts, count_items(fill_times(part), split), "item_id")
    tally, report = Tally.of("events", False, old["rows"]), summed(progress, "sequences", events)
    with workshop(out) as work:
        told = write_histories(
            dataset.path / "events.parquet", counts, dataset.listed, work, split, tally, str(dataset.path), report
        )
        made = {path.name: partial(os.replace, path) for path in work.glob("*.parquet")}
        kept = {name: partial(shutil.copyfile, dataset.path / name) for name in KEPT if name in old["files"]}
        said = {key: value for key, value in old.items() if key not in ("format", "files", "hash", "id")}
        settings = {**old["settings"], SplitSettings.section: split.as_dict()}
        manifest = {**said, "settings": settings, **told}
        return Dataset(out, publish(out, dict(sorted({**made, **kept}.items())), manifest, MANIFEST).manifest)

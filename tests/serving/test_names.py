"""What items are called, as a bundle holds it, against plain dicts of all of them."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving import names, texts
from serving.names import NAMES, Names

TITLES = st.none() | st.text(st.sampled_from("aAßsé1\n "), max_size=4)
IDS: st.SearchStrategy[list[Any]] = st.lists(st.integers(0, 40), unique=True, max_size=17) | st.lists(
    st.text(st.sampled_from("aAß1"), min_size=1, max_size=3), unique=True, max_size=17
)


def table(ids: list[Any], titles: list[str | None]) -> pl.DataFrame:
    kind = pl.String if ids and isinstance(ids[0], str) else pl.Int64
    columns = {"item_id": pl.Series(ids, dtype=kind), "title": pl.Series(titles, dtype=pl.String)}
    return pl.DataFrame({**columns, "events": pl.Series(range(len(ids)), dtype=pl.Int64)})


@pytest.mark.parametrize("digest", [texts.digest, lambda text: len(text) % 2], ids=["own", "crowded"])
@given(ids=IDS, data=st.data(), part=st.integers(1, 7))
def test_items_are_found_as_in_dicts_of_all_ids_and_titles(digest: Any, ids: list[Any], data: st.DataObject, part: int) -> None:
    titles = data.draw(st.lists(TITLES, min_size=len(ids), max_size=len(ids)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "digest", digest)
        patch.setattr(names, "digest", digest)
        patch.setattr(names, "PART", part)
        found = Names.of(table(ids, titles))
        shown = [title or str(item_id) for title, item_id in zip(titles, ids, strict=True)]
        by_id = {str(item_id): line for line, item_id in enumerate(ids)}
        by_title = {title: line for line, title in reversed([*enumerate(shown)])}
        by_folded = {title.casefold(): line for line, title in reversed([*enumerate(shown)])}
        words = [*shown, *map(str, ids), *(title.swapcase() for title in shown), "ss", "", "nothing"]
        assert found.of_ids(words) == [by_id.get(word) for word in words]
        for word in words:
            assert found.of_title(word) == by_title.get(word, by_folded.get(word.casefold())), word
        assert [found.title(line) for line in range(len(found))] == shown
        assert [*found.item_ids] == ids
        assert found.item_ids[1:3] == ids[1:3]


@given(titles=st.lists(TITLES, max_size=17), part=st.text(st.sampled_from("aAßsé1\n "), max_size=3), step=st.integers(1, 40))
def test_a_part_of_a_title_is_found_in_any_case_whatever_is_searched_in_one_step(
    titles: list[str | None], part: str, step: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "SEARCHED", step)
        found = Names.of(table([*range(len(titles))], titles))
        lines = [" ".join((title or str(line)).casefold().split("\n")) for line, title in enumerate(titles)]
        wanted = " ".join(part.casefold().split("\n"))
        assert [*found.holding(part)] == [line for line, text in enumerate(lines) if wanted in text]


def test_names_are_read_from_a_file_as_they_were_written(tmp_path: Path) -> None:
    whole = table([7, 5, 3], ["Heat", None, "heat"]).with_columns(removed=pl.Series([False, True, False]))
    Names.of(whole).save(tmp_path / NAMES)
    read = Names.load(tmp_path / NAMES)
    assert [read.title(line) for line in range(3)] == ["Heat", "5", "heat"]
    assert read.of_ids(["3", "4"]) == [2, None]
    assert read.removed_V.tolist() == [False, True, False]
    assert read.events_V.dtype == torch.float32
    assert type(read.item_ids[0]) is int, "else JSON cannot hold it"
    assert isinstance(read.events_V.numpy(), np.ndarray)

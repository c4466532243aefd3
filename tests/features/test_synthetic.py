"""Laws of the synthetic world: what is drawn is what the law says, and the law's best list is the best there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.synthetic import (
    SESSION_GAP,
    SHORTEST,
    SUCCESSOR_WEIGHTS,
    SyntheticSettings,
    World,
    best_possible,
    simulate,
    write,
)
from features.titles import NOUNS, make_title
from recsys.errors import DataError

SMALL = SyntheticSettings(users=211, items=101, genres=7, events_per_user=13, series=7, seed=5)
WORLD = World(SMALL)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def events_of(settings: SyntheticSettings) -> tuple[World, list[Ints], list[Ints]]:
    """The world, and each user's items and times."""
    world = World(settings)
    users = pl.concat(simulate(world)).group_by("user_id", maintain_order=True).agg("item_id", "timestamp")
    return world, [items.to_numpy() for items in users["item_id"]], [times.to_numpy() for times in users["timestamp"]]


def told_law(s: SyntheticSettings, histories: Sequence[Sequence[int] | Ints], new_session: npt.NDArray[np.bool_]) -> Floats:
    """The law where the time of the request tells whether the next event starts a session: of worlds where all do, or none."""
    laws = [World(dataclasses.replace(s, new_session=chance)).probabilities(histories) for chance in (0.0, 1.0)]
    return np.where(new_session[:, None], laws[1], laws[0])


def plain_law(world: World, history: Sequence[int], back: float) -> list[float]:
    """The definition, one item at a time; `back` is the chance of a return to the favourite genre."""
    s = world.settings
    last, before = history[-1] - 1, history[max(len(history) - 2, 0)] - 1
    favourite, genre = world.genre[history[0] - 1], world.genre[last]
    law = []
    for item in range(s.items):
        other = s.surprise / s.items
        other += (1 - s.sequel - s.resume - s.drift - s.surprise) * world.popularity[item] * (world.genre[item] == genre)
        other += s.drift * world.popularity[item] * (world.genre[item] == (genre + 1) % s.genres)
        for slot, weight in enumerate(SUCCESSOR_WEIGHTS):
            other += weight * (
                s.sequel * (world.successors[last, slot] == item) + s.resume * (world.successors[before, slot] == item)
            )
        chance = (1 - back) * other + back * world.popularity[item] * (world.genre[item] == favourite)
        law.append(0.0 if item + 1 in history else float(chance))
    return [chance / sum(law) for chance in law]


histories = st.lists(st.lists(st.integers(1, SMALL.items), min_size=1, max_size=23, unique=True), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(histories)
def test_the_law_is_its_definition(batch: list[list[int]]) -> None:
    s = SMALL
    always, never = (told_law(s, batch, np.full(len(batch), told)) for told in (True, False))
    for law, back in ((WORLD.probabilities(batch), s.new_session * s.loyalty), (always, s.loyalty), (never, 0.0)):
        expected = [plain_law(WORLD, history, back) for history in batch]
        np.testing.assert_allclose(law, expected, rtol=1e-9, atol=1e-15)


def test_the_first_event_is_of_any_genre_by_popularity() -> None:
    np.testing.assert_allclose(WORLD.probabilities([[]])[0], WORLD.popularity / SMALL.genres)
    np.testing.assert_allclose(np.bincount(WORLD.genre, WORLD.popularity), 1.0)


@settings(deadline=None, max_examples=50)
@given(histories, st.integers(1, 17), st.randoms(use_true_random=False))
def test_no_list_is_better_than_the_best(batch: list[list[int]], k: int, random: Any) -> None:
    law, (lists, _) = WORLD.probabilities(batch), WORLD.best(batch, k)
    for row, best, history in zip(law, lists, batch, strict=True):
        other = random.sample(range(SMALL.items), k)
        assert len(set(best)) == k
        assert not set(best) & set(history)
        assert list(row[best - 1]) == sorted(row[best - 1], reverse=True)
        assert row[other].sum() <= row[best - 1].sum() + 1e-12


@pytest.mark.parametrize("order", ["likeliest first", "by id"])
@pytest.mark.parametrize("told", [False, True])
def test_drawn_events_follow_the_law_given_their_history(order: str, told: bool) -> None:
    """If they do, the law's sum over the items before the drawn one, plus a uniform share of its own, is uniform."""
    world, items, times = events_of(dataclasses.replace(SMALL, users=1_009))
    prefixes = [history[:end] for history in items for end in range(1, len(history))]
    drawn = np.concatenate([history[1:] for history in items]) - 1
    new_session = np.concatenate([np.diff(ts) for ts in times]) >= SESSION_GAP
    law = told_law(world.settings, prefixes, new_session) if told else world.probabilities(prefixes)
    rank = (
        np.argsort(-law, axis=1, kind="stable")
        if order == "likeliest first"
        else np.arange(law.shape[1])[None].repeat(len(law), 0)
    )
    place = (rank == drawn[:, None]).argmax(1)
    below = np.take_along_axis(np.take_along_axis(law, rank, 1).cumsum(1), place[:, None], 1)[:, 0]
    chance = law[np.arange(len(law)), drawn]
    assert chance.min() > 0
    uniform = below - chance * np.random.default_rng(3).random(len(law))
    counts, _ = np.histogram(uniform, bins=29, range=(0, 1))
    expected = len(law) / 29
    assert len(law) > 10_000
    assert ((counts - expected) ** 2 / expected).sum() < 56.9  # chi-square, 28 degrees of freedom, 1 in 1,000


def test_frequencies_after_one_item_match_the_law() -> None:
    world, items, _ = events_of(SyntheticSettings(users=20_011, items=23, genres=3, events_per_user=5, series=4, seed=2))
    counts = np.zeros((23, 23))
    np.add.at(counts, (np.array([h[0] for h in items]) - 1, np.array([h[1] for h in items]) - 1), 1)
    expected = world.probabilities([[item] for item in range(1, 24)]) * counts.sum(1, keepdims=True)
    used = expected > 5
    freedom = used.sum() - 23
    assert freedom > 250
    assert ((counts - expected)[used] ** 2 / expected[used]).sum() < freedom + 4 * np.sqrt(2 * freedom)
    assert counts[expected == 0].sum() == 0


def test_no_user_meets_an_item_twice_and_time_goes_on() -> None:
    _, items, times = events_of(SMALL)
    assert len(items) == SMALL.users
    for history, clock in zip(items, times, strict=True):
        assert len(set(history)) == len(history)
        assert SHORTEST <= len(history) <= SMALL.items // 2
        gaps = np.diff(clock)
        assert gaps.min() > 0
        assert not ((gaps >= 1_800) & (gaps < SESSION_GAP)).any()


def test_lengths_vary_around_the_mean() -> None:
    _, items, _ = events_of(SyntheticSettings(users=10_007, items=997, events_per_user=31))
    lengths = np.array([len(history) for history in items])
    assert abs(lengths.mean() - 31) < 4 * lengths.std() / np.sqrt(len(lengths))
    assert lengths.std() > 20


def test_the_default_world_leaves_room_between_popularity_and_the_best() -> None:
    world, items, _ = events_of(SyntheticSettings())
    histories, targets = [history[:-1] for history in items], np.array([history[-1] for history in items])
    best = best_possible(world, histories)
    popular = np.bincount(np.concatenate(histories), minlength=world.settings.items + 1).astype(float)
    found = 0
    for history, target in zip(histories, targets, strict=True):
        scores = popular.copy()
        scores[history] = -1
        found += target in np.argsort(-scores)[:10]
    assert 0.4 < best["recall@10"] < 0.6
    assert found / len(items) < best["recall@10"] / 5
    hits = world.best(histories, 10)[0] == targets[:, None]
    noise = np.sqrt(best["recall@10"] * (1 - best["recall@10"]) / len(items))
    assert abs(best["recall@10"] - hits.sum(1).mean()) < 3 * noise
    assert abs(best["ndcg@10"] - (hits / np.log2(np.arange(2, 12))).sum(1).mean()) < 3 * noise


def test_best_possible_is_the_metric_of_the_best_lists() -> None:
    histories = [history[:-1] for history in events_of(SMALL)[1]]
    lists, chances = WORLD.best(histories, 7)
    np.testing.assert_array_equal(chances, np.take_along_axis(WORLD.probabilities(histories), lists - 1, 1))
    expected = {"recall@7": chances.sum(1).mean(), "ndcg@7": (chances / np.log2(np.arange(2, 9))).sum(1).mean()}
    assert best_possible(WORLD, histories, 7) == pytest.approx(expected)


def test_the_request_time_can_only_help() -> None:
    world, items, times = events_of(SyntheticSettings(users=997))
    histories = [history[:-1] for history in items]
    new_session = np.array([clock[-1] - clock[-2] >= SESSION_GAP for clock in times])
    told = np.sort(told_law(world.settings, histories, new_session))[:, -10:].sum(1).mean()
    assert told > best_possible(world, histories)["recall@10"] + 0.01


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(SMALL, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["events-00000.parquet", "items.parquet"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("block", [1, 7, 97, 10_007])
def test_the_size_of_a_block_changes_no_event(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = pl.concat(simulate(WORLD))
    monkeypatch.setattr("features.synthetic.BLOCK_USERS", (block, block))
    frames = list(simulate(WORLD))
    assert len(frames) == -(-SMALL.users // block)
    assert pl.concat(frames).equals(wanted)


def test_more_users_leave_the_first_ones_as_they_were() -> None:
    few, many = (pl.concat(simulate(World(dataclasses.replace(SMALL, users=users)))) for users in (31, 89))
    assert many.filter(pl.col("user_id") <= 31).equals(few)


CHANGES: dict[str, Any] = {
    "users": 97, "items": 103, "genres": 5, "events_per_user": 17.0, "series": 4, "popularity": 1.5, "sequel": 0.4,
    "resume": 0.3, "drift": 0.2, "surprise": 0.1, "new_session": 0.5, "loyalty": 0.1, "seed": 6,
}  # fmt: skip


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(SyntheticSettings)])
def test_every_option_changes_the_events(option: str) -> None:
    other = World(dataclasses.replace(SMALL, **{option: CHANGES[option]}))
    assert not pl.concat(simulate(other)).equals(pl.concat(simulate(WORLD)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"users": 0}, {"genres": 1}, {"genres": 17}, {"events_per_user": 4.0}, {"events_per_user": 26.0, "items": 101},
        {"series": 1}, {"surprise": 0.001}, {"sequel": 0.9}, {"resume": -0.1}, {"drift": -0.1}, {"loyalty": 1.1},
        {"new_session": 1.0, "loyalty": 1.0}, {"seed": -1}, {"popularity": -1.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticSettings(**wrong)


def test_what_is_written_is_what_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.synthetic.BLOCK_BYTES", 0)  # so that blocks are as small as they get
    world_settings = dataclasses.replace(SMALL, users=601)
    write(world_settings, tmp_path)
    world = World(world_settings)
    assert [len(pl.read_parquet(path)["user_id"].unique()) for path in sorted(tmp_path.glob("events-*"))] == [256, 256, 89]
    assert pl.read_parquet(tmp_path / "events-*.parquet").equals(pl.concat(simulate(world)))
    assert pl.read_parquet(tmp_path / "items.parquet").equals(world.items())


def test_a_folder_with_events_is_not_written_over(tmp_path: Path) -> None:
    write(SMALL, tmp_path)
    with pytest.raises(DataError, match="holds events already"):
        write(SMALL, tmp_path)


def test_titles_differ_and_tell_the_genre() -> None:
    items = World(SyntheticSettings(items=20_011, genres=16)).items()
    assert items["title"].n_unique() == 20_011
    for title, genre in items.select("title", "categories").iter_rows():
        assert sum(noun in title.split() for noun in NOUNS[genre]) == 1
    assert make_title("Sea", 6_720, 1) == "Silent Harbour Volume 2: 1"


def test_a_series_is_one_name_in_parts_the_most_popular_first() -> None:
    titles = WORLD.items()["title"].to_list()
    names = [title.rstrip(" 0123456789") for title in titles]
    for item, successors in enumerate(WORLD.successors):
        assert {names[successor] for successor in successors} == {names[item]}
        assert {WORLD.genre[successor] for successor in successors} == {WORLD.genre[item]}
        if titles[item] == names[item]:
            assert WORLD.popularity[item] == max(WORLD.popularity[[item, *successors]])


def test_ids_do_not_tell_popularity() -> None:
    world = World(SyntheticSettings(items=2_003))
    assert abs(np.corrcoef(np.arange(2_003), world.popularity)[0, 1]) < 0.1

"""The graphs say what torch says, and what was read before says what all that is read anew says, bit for bit."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.dataset import Dataset
from recsys.attention import PATTERNS, POSITIONS, TIME_BUCKETS, TIMES, time_bucket
from recsys.batch import FIRST_ITEM, Batch
from recsys.blocks import BLOCKS
from recsys.errors import BundleError
from recsys.model import ModelSettings, SequenceModel
from recsys.ranker import Companions, Known, Ranker, RankerSettings
from serving import reader
from serving.engine import Recommender
from serving.export import export
from serving.graph import model_graph
from serving.index import IndexSettings
from serving.reader import EQUAL, MODEL_GRAPH, Kept, buckets, graphs, ranker_file
from tests.serving.conftest import write_run

ITEMS = 53
MODEL = ModelSettings(embedding_size=24, hidden_size=41, heads=2, length=37, span=11)


def drawn(settings: ModelSettings, deviation: float = 0.3) -> SequenceModel:
    """Weights so large that attention matters."""
    model = SequenceModel(settings, ITEMS).initialise(torch.Generator().manual_seed(1)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, deviation, generator=torch.Generator().manual_seed(2))
    return model


def known(model: SequenceModel) -> Known:
    logs_V = torch.rand(ITEMS, generator=torch.Generator().manual_seed(3)) * 5
    return Known(model.item_vectors(), logs_V, ITEMS, model.content)


def written(folder: Path, model: SequenceModel, ranker: Ranker | None = None) -> None:
    for name, write in graphs(model, ranker, known(model)).items():
        write(folder / name)


@pytest.mark.parametrize(("block", "positions"), [*itertools.product(BLOCKS, POSITIONS)])
def test_the_graph_of_every_block_with_every_kind_of_position_is_torch(block: str, positions: str, tmp_path: Path) -> None:
    written(tmp_path, drawn(ModelSettings(**{**MODEL.as_dict(), "block": block, "positions": positions})))


@pytest.mark.parametrize(
    "settings",
    [
        *({"time": kind, "request_time": asked} for kind in TIMES for asked in (False, True) if kind != "none" or not asked),
        *({"attention": kind, "block": block} for kind in PATTERNS for block in BLOCKS),
        *({"objective": "masked", "positions": kind} for kind in POSITIONS),
        {"objective": "masked", "time": "both", "request_time": True},
        {"blocks": 1},
        {"blocks": 3, "distinct_blocks": 2},
    ],
    ids=str,
)
def test_the_graph_of_every_setting_is_torch(settings: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path, drawn(ModelSettings(**{**MODEL.as_dict(), **settings})))


def test_a_graph_of_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = drawn(MODEL), drawn(MODEL)
    other.blocks[1].forward_out.weight[3, 5] += 0.01
    monkeypatch.setattr(reader, "model_graph", lambda _, tail: model_graph(other, tail))
    with pytest.raises(BundleError, match=f"{MODEL_GRAPH}: the graph differs from torch by .* more than 1e-05"):
        written(tmp_path, model)
    assert EQUAL == 1e-5


RANKERS = {
    "plain": {},
    "two blocks": {"blocks": 2},
    "companions": {"companions": 7},
    "ids": {"ids": True},
    "among": {"among": True},
    "all": {"blocks": 3, "companions": 5, "ids": True, "among": True},
}


@pytest.mark.parametrize(("kind", "time"), [*itertools.product(RANKERS, ["none", "gaps"])])
def test_the_graph_of_every_ranker_at_every_depth_is_torch(kind: str, time: str, tmp_path: Path) -> None:
    settings = RankerSettings(**{"blocks": 1, "width": 16, "heads": 2, "hidden_size": 29, "span": 32, **RANKERS[kind]})  # type: ignore[arg-type]
    model, draw = drawn(ModelSettings(**{**MODEL.as_dict(), "time": time})), torch.Generator().manual_seed(5)
    rows_RK = torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (FIRST_ITEM + ITEMS, 7), generator=draw).int().sort(1).values
    rows_RK[:, 1:] = rows_RK[:, 1:].where(rows_RK[:, 1:] != rows_RK[:, :-1], 0)
    companions = Companions(rows_RK, torch.rand(rows_RK.shape, generator=draw), torch.full((len(rows_RK),), 9.0))
    ranker = Ranker(settings, model.settings, ITEMS, companions=companions).initialise(draw).eval().requires_grad_(False)
    for parameter in ranker.parameters():
        parameter.normal_(0, 0.3, generator=draw)
    written(tmp_path, model, ranker)
    assert {path.name for path in tmp_path.iterdir()} == {MODEL_GRAPH, *map(ranker_file, range(1, settings.blocks + 1))}


@given(st.lists(st.integers(-5, 2**33), min_size=1))
def test_buckets_are_those_of_the_model(seconds: list[int]) -> None:
    assert buckets(np.array(seconds)).tolist() == time_bucket(torch.tensor(seconds)).tolist()


def test_buckets_change_where_those_of_the_model_do() -> None:
    edges = np.array(
        [at for at in range(1, 70_000) if at < 300 or time_bucket(torch.tensor(at)) != time_bucket(torch.tensor(at - 1))]
    )
    near = np.concatenate([edges - 1, edges, edges + 1])
    assert buckets(near).tolist() == time_bucket(torch.from_numpy(near)).tolist()
    assert buckets(near).max() < TIME_BUCKETS


KINDS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "relative, gaps": {"positions": "relative", "time": "gaps", "block": "ligr"},
    "rotary, request time": {"positions": "rotary", "time": "both", "request_time": True},
    "pointwise, local": {"block": "hstu", "positions": "relative", "attention": "local", "span": 13},
    "masked": {"objective": "masked"},
    "text": {"text": "both", "text_span": 3},
}


@pytest.fixture(scope="module")
def read_bundles(tmp_path_factory: pytest.TempPathFactory, shop: Dataset) -> dict[str, Path]:
    folder, ranks = tmp_path_factory.mktemp("read"), RankerSettings(blocks=1, width=24, hidden_size=37, span=32, candidates=48)
    for place, settings in enumerate(KINDS.values()):
        run = write_run(folder / f"run-{place}", shop, scale=2, ranker=ranks, **settings)
        export(run, folder / str(place), IndexSettings())
    return {name: folder / str(place) for place, name in enumerate(KINDS)}


def history(recommender: Recommender, events: int, seed: int) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    rows = [draw.randrange(FIRST_ITEM, FIRST_ITEM + recommender.lines) for _ in range(events)]
    return rows, sorted(draw.randrange(10**9) for _ in range(events))


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_that_grows_is_read_as_if_anew_bit_for_bit(kind: str, read_bundles: dict[str, Path]) -> None:
    recommender = Recommender.load(read_bundles[kind])
    assert recommender.reader is not None and recommender.ranker_blocks == 1
    rows, times = history(recommender, 83, seed=3)
    batch, wanted = Batch.of, []
    ends = sorted({*range(1, 36, 3), 16, 17, 32, 33, 47, 48, 49, 50, 51, 64, 65, 83})
    whole = batch([rows[:end] for end in ends], [times[:end] for end in ends])
    now = torch.tensor([times[end - 1] + 77 for end in ends])
    wanted = recommender.recommend(whole, 31, now)  # in a batch nothing is kept
    assert recommender.reader.kept.bytes == 0
    for place, end in enumerate(ends):
        alone = recommender.recommend(batch([rows[:end]], [times[:end]]), 31, int(now[place]))
        assert torch.equal(alone.rows[0], wanted.rows[place]), end
        assert torch.equal(alone.scores[0], wanted.scores[place]), end


def positions_read(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each run of the graph reads, from now on."""
    assert recommender.reader is not None
    read, run = list[int](), recommender.reader._run

    def counted(seen: Any, start: int, *rest: Any, **options: Any) -> Any:
        read.append(seen.rows_BT.shape[1] - start)
        return run(seen, start, *rest, **options)

    monkeypatch.setattr(recommender.reader, "_run", counted)
    return read


def test_a_new_event_costs_the_reading_of_sixteen_positions_and_the_same_history_none(
    read_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = Recommender.load(read_bundles["learned positions"])
    rows, times = history(recommender, 50, seed=7)
    read = positions_read(recommender, monkeypatch)
    for end in (40, 41, 41, 42, 48, 49, 50):
        recommender.recommend(Batch.of([rows[:end]], [times[:end]]), 5)
    assert read == [48, 16, 16, 16, 32, 16]  # the second 41 is known; with the 49th event another sixteen are full


def test_another_past_is_read_anew(read_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = Recommender.load(read_bundles["relative, gaps"])
    rows, times = history(recommender, 41, seed=7)
    read = positions_read(recommender, monkeypatch)
    for change in (0, 35):
        other_rows, other_times = [*rows], [*times]
        recommender.recommend(Batch.of([rows], [times]), 5)
        other_rows[change] = FIRST_ITEM + (rows[change] - FIRST_ITEM + 1) % recommender.lines
        recommender.recommend(Batch.of([other_rows], [times]), 5)
        other_times[change] -= 1
        recommender.recommend(Batch.of([rows], [sorted(other_times)]), 5)
    assert read == [48, 48, 48, 16, 16]


def test_what_is_kept_stays_within_its_bytes_and_the_least_used_goes_first() -> None:
    kept, part = Kept(10_000), np.zeros(250, np.float32)
    for name in b"abcdefgh":
        kept.put(bytes([name]), (part, part))
        kept.get(b"a")
    assert kept.bytes <= 10_000
    assert [name for name in b"abcdefgh" if kept.get(bytes([name])) is not None] == list(b"afgh")
    kept.put(b"large", (np.zeros(3_000, np.float32),))
    assert kept.get(b"large") is None and kept.get(b"a") is not None
    kept.clear()
    assert kept.bytes == 0 and kept.get(b"a") is None

"""What a recommender promises: parity, filters, full lists, and no altered bundle."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.dataset import Dataset
from recsys.batch import FIRST_ITEM, PADDING, Batch, gather
from recsys.bundle import FORMAT, open_directory, publish
from recsys.errors import BundleError, RequestError, SetupError
from serving.engine import Recommender
from serving.evaluation.judge import evaluate
from serving.evaluation.protocol import ProtocolSettings
from serving.evaluation.report import make_report
from serving.export import export
from serving.filters import until
from serving.index import INDEXES, Index, IndexSettings
from serving.lists import Lists
from serving.states import DepthSettings
from tests.serving.conftest import LENGTH, write_run
from tests.serving.nights import lists_of, score_all

K = 37


@pytest.fixture(scope="module", params=["run", *INDEXES])
def recommender(request: pytest.FixtureRequest, run: Path, bundles: dict[str, Path]) -> Recommender:
    return Recommender.load(run if request.param == "run" else bundles[request.param])


def every_history(dataset: Dataset) -> list[list[int]]:
    s = dataset.sequences
    return [s.items[start:end].tolist() for start, end in zip(s.offsets[:-1], s.offsets[1:], strict=True)]


def same(left: Lists, right: Lists) -> bool:
    """Bit for bit."""
    return torch.equal(left.rows, right.rows) and torch.equal(left.scores, right.scores)


def test_a_history_gets_the_same_list_alone_and_in_any_batch(recommender: Recommender, dataset: Dataset) -> None:
    histories = every_history(dataset)
    alone = Lists.joined([recommender.recommend(Batch.of([history]), K) for history in histories], K)
    for size in (7, 32, len(histories)):
        batches = [histories[start : start + size] for start in range(0, len(histories), size)]
        assert same(Lists.joined([recommender.recommend(Batch.of(batch), K) for batch in batches], K), alone)
    order = torch.randperm(len(histories), generator=torch.Generator().manual_seed(1))
    shuffled = recommender.recommend(Batch.of([histories[place] for place in order]), K)
    assert torch.equal(shuffled.rows, alone.rows[order])
    assert torch.equal(shuffled.scores, alone.scores[order])


def test_a_recommender_answers_the_same_to_several_threads_at_once(recommender: Recommender, dataset: Dataset) -> None:
    batches = [Batch.of([history]) for history in every_history(dataset)[::5]]
    alone = [recommender.recommend(batch, K) for batch in batches]
    with ThreadPoolExecutor(7) as pool:
        at_once = list(pool.map(lambda batch: recommender.recommend(batch, K), batches))
    assert all(same(left, right) for left, right in zip(alone, at_once, strict=True))


def test_the_number_of_threads_changes_no_list(run: Path, dataset: Dataset) -> None:
    recommender, histories = Recommender.load(run), Batch.of(every_history(dataset))
    one = recommender.recommend(histories, K)
    torch.set_num_threads(2)
    try:
        assert same(recommender.recommend(histories, K), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1},
        {"length": 7, "embedding_size": 37, "hidden_size": 101, "heads": 1},
        {"length": 200, "embedding_size": 64, "hidden_size": 256},
        {"length": 17, "similarity": "cosine", "temperature": 0.07},
    ],
    ids=str,
)
def test_the_shape_of_the_model_does_not_matter_to_parity(shape: dict[str, int], dataset: Dataset, tmp_path: Path) -> None:
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, **shape))
    histories = every_history(dataset)
    alone = torch.cat([recommender.encode(Batch.of([history])) for history in histories])
    assert torch.equal(recommender.encode(Batch.of(histories)), alone)


KINDS = [
    {"block": "ligr", "positions": "relative", "time": "both", "request_time": True},
    {"block": "ligr", "positions": "rotary", "attention": "local", "span": 7},
    {"block": "hstu", "positions": "relative", "time": "relative", "request_time": True},
    {"objective": "masked", "attention": "block_sparse", "span": 8},
    {"objective": "masked", "positions": "relative", "time": "gaps", "request_time": True},
    {"blocks": 4, "distinct_blocks": 2, "early_exit": True},
    {"text": "both", "text_span": 5, "similarity": "cosine"},
    {"text": "cross", "objective": "masked", "text_span": 3},
    {"text": "pooled", "ids": False, "block": "hstu", "positions": "relative"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_kind_of_model_breaks_parity(kind: dict[str, Any], dataset: Dataset, tmp_path: Path) -> None:
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, **kind))
    sequences = dataset.sequences
    histories = gather(sequences.items, sequences.times, sequences.offsets[:-1], sequences.offsets[1:])
    now = histories.times[histories.offsets[1:] - 1] + 3600 * torch.arange(len(histories))
    if kind.get("early_exit"):
        recommender.leave = [0.97, 0.98, 0.99]
    alone = []
    for user in range(len(histories)):
        one = gather(sequences.items, sequences.times, *sequences.offsets[user : user + 2, None])
        alone.append(recommender.recommend(one, K, int(now[user])))
    assert same(recommender.recommend(histories, K, now), Lists.joined(alone, K))
    states = recommender.model.encode(histories, now, leave=recommender.leave)
    torch.testing.assert_close(recommender.encode(histories, now), states, rtol=1e-4, atol=1e-4)


def test_a_history_of_ten_thousand_events_is_answered(dataset: Dataset, tmp_path: Path) -> None:
    kind = {"length": 10_000, "positions": "relative", "time": "relative", "attention": "local", "span": 64}
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, **kind))
    rows = torch.randint(FIRST_ITEM, FIRST_ITEM + recommender.items, (10_007,), generator=torch.Generator().manual_seed(0))
    histories = Batch(rows, torch.tensor([0, len(rows)]), torch.arange(len(rows)) * 60)
    read = histories.last(10_000)
    assert same(recommender.recommend(histories, K, filter_seen=False), recommender.recommend(read, K, filter_seen=False))
    recent = histories.last(64 + 63)  # two layers of 64 reach no farther back
    near, far = (recommender.recommend(histories, K, filter_seen=False) for histories in (recent, read))
    assert torch.equal(near.rows, far.rows)


def test_a_model_that_reads_times_is_refused_without_them(dataset: Dataset, tmp_path: Path) -> None:
    recommender = Recommender.load(write_run(tmp_path / "run", dataset, time="both", request_time=True))
    with pytest.raises(RequestError, match="give times"):
        recommender.answer([1, 2])
    with pytest.raises(RequestError, match="give now"):
        recommender.recommend(Batch.of([[2, 3]]), 3)
    with pytest.raises(RequestError, match="descend"):
        recommender.answer([1, 2], times=[500, 10])
    early, late = (recommender.answer([1, 2], K, times=[10, 500], now=now)["items"] for now in (501, 10**9))
    assert early != late
    assert recommender.answer([1, 2], K, times=[10, 500])["items"], "the clock is asked"
    report = make_report(recommender, dataset, ProtocolSettings(split="validation"), (K,), checks=[], baselines=False)
    assert report.manifest["protocol"]["request_time"] is True
    sequences = dataset.sequences
    begins, ends, targets = sequences.windows("validation")
    user = int(((ends > begins) & (targets > ends)).nonzero()[0])
    history = gather(sequences.items, sequences.times, begins[user, None], ends[user, None])
    asked = recommender.recommend(history, K, int(sequences.times[ends[user]]))
    assert [recommender.catalogue.item_id(row) for row in asked.rows[0].tolist()] == report.lists["item_id"].to_list()[:K]


def test_scores_of_given_items_are_those_of_lists(recommender: Recommender, dataset: Dataset) -> None:
    s = dataset.sequences
    histories = gather(s.items, s.times, s.offsets[:23], s.offsets[1:24])
    now = s.times[s.offsets[1:24] - 1]
    lists = recommender.recommend(histories, K, now)
    assert torch.equal(recommender.score(histories, lists.rows, now), lists.scores)
    without_vector = torch.tensor([[PADDING, FIRST_ITEM + recommender.lines, -1]]).expand(23, 3)
    assert torch.equal(recommender.score(histories, without_vector), torch.full((23, 3), -torch.inf))
    earlier = recommender.score(histories, lists.rows, now - 600)
    assert not torch.equal(earlier, lists.scores)
    assert torch.equal(earlier[5:6], recommender.score(until(histories, now - 600).last(LENGTH), lists.rows)[5:6])
    vectors_BCE = recommender.scan.vectors_VE[lists.rows - FIRST_ITEM]
    assert torch.equal(recommender.score(histories, lists.rows, now, 2 * vectors_BCE), 2 * lists.scores)


def test_a_masked_history_of_unknown_items_gets_the_popular_ones(dataset: Dataset, tmp_path: Path) -> None:
    masked = Recommender.load(write_run(tmp_path / "run", dataset, objective="masked", length=4))
    assert masked.recommend(Batch.of([[5, 9999, 9999, 9999], [5, 7, 9999, 9999]]), 3).popular.tolist() == [True, False]


def test_a_bundle_spends_the_blocks_that_were_measured(dataset: Dataset, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dataset, blocks=3, early_exit=True)
    with pytest.raises(SetupError, match="early_exit"):
        export(run, tmp_path / "bundle", IndexSettings(), None, DepthSettings(blocks=2))
    directory = open_directory(run / "model")
    curve = [{"blocks": 3.0, "leave": [2.0, 2.0]}, {"blocks": 1.7, "leave": [0.5, 0.7]}, {"blocks": 1.0, "leave": [-2.0, -2.0]}]
    files = {name: partial(shutil.copyfile, directory.path / name) for name in directory.manifest["files"]}
    about = {key: value for key, value in directory.manifest.items() if key not in ("files", "hash", "id", "format")}
    publish(tmp_path / "measured" / "model", files, {**about, "depth_curve": curve})
    for blocks, leave in ((0.0, []), (1.0, [-2.0, -2.0]), (2.5, [0.5, 0.7]), (3.0, [2.0, 2.0])):
        export(tmp_path / "measured", tmp_path / "bundle", IndexSettings(), None, DepthSettings(blocks=blocks))
        assert Recommender.load(tmp_path / "bundle").leave == leave


def test_a_state_is_the_models_own_state(recommender: Recommender, dataset: Dataset) -> None:
    histories = Batch.of(every_history(dataset))
    torch.testing.assert_close(recommender.encode(histories), recommender.model.encode(histories), rtol=1e-4, atol=1e-4)


def test_nightly_online_and_offline_name_the_same_items_in_the_same_order(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    score_all(recommender, dataset, tmp_path, k=K)
    at_night = lists_of(tmp_path).group_by("user_id", maintain_order=True).agg("item_id", "score")
    for history, items, scores in zip(every_history(dataset), at_night["item_id"], at_night["score"], strict=True):
        online = recommender.answer([recommender.catalogue.item_id(row) for row in history], K)["items"]
        assert [item["item_id"] for item in online] == items.to_list()
        assert [item["score"] for item in online] == scores.to_list()
    report = evaluate(recommender, dataset, ProtocolSettings(split="validation"), ks=(K,), baselines=False)
    begins, ends, targets = dataset.sequences.windows("validation")
    judged = ((ends > begins) & (targets > ends)).nonzero().flatten()
    for user, rows in zip(judged, report.lists.rows, strict=True):
        history = dataset.sequences.items[begins[user] : ends[user]].tolist()
        online = recommender.answer([recommender.catalogue.item_id(row) for row in history], K)["items"]
        assert [item["item_id"] for item in online] == [recommender.catalogue.item_id(row) for row in rows.tolist()]


def test_an_exact_bundle_and_the_run_it_was_made_of_answer_the_same_up_to_the_rounding_of_their_kernels(
    run: Path, bundles: dict[str, Path], dataset: Dataset
) -> None:
    histories = Batch.of(every_history(dataset))
    lists, by_torch = (Recommender.load(path).recommend(histories, K) for path in (bundles["exact"], run))
    assert torch.allclose(lists.scores, by_torch.scores, rtol=1e-4, atol=1e-4)
    near = torch.isclose(by_torch.scores, by_torch.scores.roll(1, 1), rtol=1e-4, atol=1e-4)
    assert bool(((lists.rows == by_torch.rows) | near | near.roll(-1, 1)).all())
    assert same(Recommender.load(bundles["ivf"]).with_exact_search().recommend(histories, K), lists)


TWINS = 101


@cache
def loaded(bundle: Path) -> Recommender:
    """A bundle as it is; for exact search with items in groups of TWINS, equal or apart by less than rounding, so that more
    of them stand at every border than are asked for beyond k."""
    recommender = Recommender.load(bundle)
    if recommender.searcher.exact:
        vectors_VE = recommender.scan.vectors_VE
        noise_VE = torch.randint(-1, 2, vectors_VE.shape, generator=torch.Generator().manual_seed(2)) * 2.0**-23
        noise_VE[torch.arange(len(vectors_VE)) % 3 == 0] = 0
        vectors_VE.copy_(vectors_VE[torch.arange(len(vectors_VE)) // TWINS] * (1 + noise_VE))
        recommender.searcher = Index.build(vectors_VE, IndexSettings(kind="exact"))
    return recommender


def brute_force(recommender: Recommender, history: list[int], k: int, banned: set[int], allow: list[int] | None) -> list[int]:
    """The k best rows by float64 scores rounded to float32, ties by row; no code of the engine but its state."""
    state_E = recommender.encode(Batch.of([history]))[0].double().numpy()
    scores_V = (recommender.scan.vectors_VE.double().numpy() * state_E).sum(1).astype(np.float32)
    rows = [row for row in range(FIRST_ITEM, FIRST_ITEM + recommender.items) if row not in banned]
    rows = [row for row in rows if allow is None or row in set(allow)]
    return sorted(rows, key=lambda row: (-scores_V[row - FIRST_ITEM], row))[:k]


ROWS = st.integers(FIRST_ITEM, FIRST_ITEM + 996)
HISTORY = st.lists(ROWS, min_size=1, max_size=70)


@pytest.mark.parametrize("kind", INDEXES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    histories=st.lists(HISTORY, min_size=1, max_size=5),
    k=st.integers(1, 300) | st.integers(900, 1100),
    deny=st.lists(ROWS, max_size=20),
    allow=st.none() | st.lists(ROWS, max_size=150),
    filter_seen=st.booleans(),
)
def test_no_forbidden_item_is_named_and_lists_are_as_full_as_they_can_be(
    kind: str,
    bundles: dict[str, Path],
    histories: list[list[int]],
    k: int,
    deny: list[int],
    allow: list[int] | None,
    filter_seen: bool,
) -> None:
    recommender = loaded(bundles[kind])
    lists = recommender.recommend(Batch.of(histories), k, filter_seen=filter_seen, deny=deny, allow=allow)
    short = 0
    for history, rows, scores in zip(histories, lists.rows.tolist(), lists.scores, strict=True):
        named = [row for row in rows if row != PADDING]
        banned = set(deny) | (set(history) if filter_seen else set())
        possible = {row for row in range(FIRST_ITEM, FIRST_ITEM + recommender.items) if row not in banned}
        possible &= possible if allow is None else set(allow)
        assert set(named) <= possible
        assert len(named) == len(set(named)) == min(k, len(possible))
        assert rows[len(named) :] == [PADDING] * (k - len(named))
        assert (scores[len(named) :] == -torch.inf).all()
        order = list(zip((-scores[: len(named)]).tolist(), named, strict=True))
        assert order == sorted(order)
        known = any(row < FIRST_ITEM + recommender.items for row in history[-LENGTH:])
        if known and (recommender.searcher.exact or allow is not None):
            assert named == brute_force(recommender, history, k, banned, allow)
        short += len(named) < k
    assert lists.underfilled == short


def test_few_allowed_items_are_searched_exactly(recommender: Recommender, dataset: Dataset) -> None:
    allow = list(range(FIRST_ITEM + 4, FIRST_ITEM + recommender.items, 7))
    histories = every_history(dataset)[::17]
    lists = recommender.recommend(Batch.of(histories), 5, allow=allow)
    for history, rows in zip(histories, lists.rows.tolist(), strict=True):
        assert rows == brute_force(recommender, history, 5, set(history), allow)


def test_an_unknown_history_gets_the_most_popular_items(run: Path) -> None:
    recommender = Recommender.load(run)
    cold = FIRST_ITEM + recommender.items
    known = FIRST_ITEM + 3
    histories = [[], [cold], [known], [FIRST_ITEM + 1, *[cold] * LENGTH]]
    lists = recommender.recommend(Batch.of(histories), 5, deny=[FIRST_ITEM + 2])
    assert lists.sources == ["popularity", "popularity", "retrieved", "popularity"]
    assert lists.rows[0].tolist() == lists.rows[1].tolist() == [FIRST_ITEM + line for line in (0, 1, 3, 4, 5)]
    assert lists.rows[3].tolist() == [FIRST_ITEM + line for line in (0, 3, 4, 5, 6)]
    assert lists.scores[0].tolist() == [recommender.catalogue.events[line] for line in (0, 1, 3, 4, 5)]


def test_events_after_now_are_not_read(recommender: Recommender, dataset: Dataset) -> None:
    s = dataset.sequences
    users = torch.arange(50, 61)
    now = int(s.times[s.offsets[55]] + 60 * 5)
    histories = gather(s.items, s.times, s.offsets[users], s.offsets[users + 1])
    cut = [
        s.items[s.offsets[user] : s.offsets[user + 1]][s.times[s.offsets[user] : s.offsets[user + 1]] <= now] for user in users
    ]
    lists = recommender.recommend(histories, K, now=now)
    assert same(lists, recommender.recommend(Batch.of([rows.tolist() for rows in cut]), K))
    assert "popularity" in lists.sources


def test_k_below_one_is_refused(recommender: Recommender) -> None:
    with pytest.raises(RequestError, match="k is 0"):
        recommender.recommend(Batch.of([[2]]), 0)


def test_no_histories_get_no_lists(recommender: Recommender) -> None:
    assert recommender.recommend(Batch.of([]), 3).rows.shape == (0, 3)


def test_an_answer_names_items_as_the_input_did(run: Path, dataset: Dataset) -> None:
    recommender = Recommender.load(run)
    answer = recommender.answer(["Story 5 of 997", "story 7 OF 997", 11, "13"], 3)
    lists = recommender.recommend(Batch.of([[recommender.catalogue.by_id(item) for item in (5, 7, 11, 13)]]), 3)
    assert [item["item_id"] for item in answer["items"]] == [
        dataset.items["item_id"][row - FIRST_ITEM] for row in lists.rows[0].tolist()
    ]
    assert [item["title"] for item in answer["items"]] == [f"Story {item['item_id']} of 997" for item in answer["items"]]
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3]
    assert json.loads(json.dumps(answer)) == answer


def test_an_unknown_item_is_named_with_the_nearest_title_or_counted(run: Path) -> None:
    recommender = Recommender.load(run)
    with pytest.raises(RequestError, match=r"'Storie 5 of 997'.*'Story 5 of 997'"):
        recommender.answer(["Storie 5 of 997"])
    answer = recommender.answer(["nothing", 3, "none"], times=[1, 2, 3], now=2, ignore_unknown=True)
    assert answer["unknown"] == ["nothing", "none"]
    assert answer["items"] == recommender.answer([3])["items"]


def test_times_and_now_must_fit_the_history(run: Path) -> None:
    recommender = Recommender.load(run)
    with pytest.raises(RequestError, match="1 times for 2 events"):
        recommender.answer([1, 2], times=[3])
    with pytest.raises(RequestError, match="without times"):
        recommender.answer([1, 2], now=3)


def test_a_bundle_with_one_altered_byte_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    names = sorted(file.name for file in bundles["ivf"].iterdir())
    wanted = ["MLmodel", "golden.json", "index.faiss", "items.parquet", "manifest.json", "model.onnx", "names.safetensors"]
    assert names == [*wanted, "weights.safetensors"], "vectors that are the model's own table have no file"
    for name in (name for name in names if name != "manifest.json"):
        shutil.copytree(bundles["ivf"], tmp_path / name)
        content = bytearray((tmp_path / name / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / name / name).write_bytes(content)
        with pytest.raises(BundleError, match=name):
            Recommender.load(tmp_path / name)


def test_no_altered_bit_of_what_a_manifest_says_changes_what_is_served(bundles: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bundles["exact"], tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "manifest.json"
    content, draw = manifest.read_bytes(), random.Random(3)
    sound = json.loads(content)
    refused = 0
    for _ in range(211):
        altered = bytearray(content)
        altered[draw.randrange(content.index(b'"files"'))] ^= 1 << draw.randrange(7)
        manifest.write_bytes(altered)
        try:
            found = Recommender.load(tmp_path / "bundle").manifest
        except BundleError:
            refused += 1
        else:
            assert {**found, "clock": 0} == {**sound, "clock": 0}
    assert refused > 150


def test_a_bundle_of_another_format_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bundles["exact"], tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(BundleError, match="format 1"):
        Recommender.load(tmp_path / "bundle")


def test_a_bundle_is_the_same_bytes_when_made_again(
    run: Path, bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    for kind, bundle in bundles.items():
        export(run, tmp_path / kind, IndexSettings(kind=kind, probes=5), dataset)
        for file in bundle.iterdir():
            if file.name != "manifest.json":
                assert file.read_bytes() == (tmp_path / kind / file.name).read_bytes()
        old, new = (json.loads((folder / "manifest.json").read_text()) for folder in (bundle, tmp_path / kind))
        assert {**old, "clock": 0} == {**new, "clock": 0}
        assert old["index"]["recall@100"] == 1 if kind == "exact" else 0.2 < old["index"]["recall@100"] <= 1


def test_a_bundle_is_made_without_a_data_set_too_and_not_of_a_bundle(run: Path, tmp_path: Path) -> None:
    manifest = export(run, tmp_path / "bundle", IndexSettings())
    assert manifest["index"]["queries"] == "items with noise"
    assert manifest["index"]["kind"] == "exact"
    with pytest.raises(BundleError, match="not a run"):
        export(tmp_path / "bundle", tmp_path / "other", IndexSettings())


def test_similar_items_are_those_of_the_largest_cosine_without_the_item_itself_and_what_is_denied(
    bundles: dict[str, Path],
) -> None:
    recommender = loaded(bundles["ivf"])
    units_VE = torch.nn.functional.normalize(recommender.scan.vectors_VE.double(), dim=1)
    for row in (FIRST_ITEM, FIRST_ITEM + 101, FIRST_ITEM + recommender.lines - 1):
        cosines_V = units_VE @ units_VE[row - FIRST_ITEM]
        cosines_V[row - FIRST_ITEM] = -torch.inf
        nearest = (cosines_V.topk(11).indices + FIRST_ITEM).tolist()
        found = recommender.similar(row, 11)
        assert [near for near, _ in found] == nearest
        assert [cosine for _, cosine in found] == pytest.approx(cosines_V.topk(11).values.tolist(), abs=1e-6)
        assert [near for near, _ in recommender.similar(row, 5, deny=nearest[:2])] == nearest[2:7]
        assert [near for near, _ in recommender.similar(row, 5, allow=nearest[3:5])] == nearest[3:5]
    with pytest.raises(RequestError, match="k is 0"):
        recommender.similar(FIRST_ITEM, 0)


def test_a_complete_recommender_reads_no_file_again(bundles: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bundles["ivf"], tmp_path / "bundle")
    wanted = loaded(bundles["ivf"]).answer([3, 5, 7])
    recommender = Recommender.load(tmp_path / "bundle").complete()
    shutil.rmtree(tmp_path / "bundle")
    assert recommender.answer([3, 5, 7]) == wanted
    assert recommender.answer(["Story 3 of 997"])["items"]
    assert recommender.catalogue.described.texts[0]
    assert recommender.catalogue.attributes.columns
    with pytest.raises(RequestError, match="nearest titles"):
        recommender.answer(["Storey 3 of 997"])

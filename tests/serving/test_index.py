"""Every kind of index, by one contract; and the settings that choose it."""

from pathlib import Path

import pytest
import torch

from recsys.batch import FIRST_ITEM
from recsys.errors import BundleError
from serving.index import INDEX, INDEXES, Index, IndexSettings, Scan, lists
from serving.retrieval import find

ITEMS, WIDTH, QUERIES, N = 1999, 23, 17, 31


def vectors(items: int = ITEMS, seed: int = 3) -> torch.Tensor:
    """Points around 29 centres, which an index can learn."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(29, WIDTH, generator=generator)
    return centres[torch.arange(items) % 29] + 0.5 * torch.randn(items, WIDTH, generator=generator)


QUERIES_BE = vectors(QUERIES, seed=4)
EVEN_V = torch.arange(ITEMS) % 2 == 0


@pytest.fixture(params=INDEXES)
def index(request: pytest.FixtureRequest) -> Index:
    return Index.build(vectors(), IndexSettings(kind=request.param, probes=16))


def recall(index: Index | Scan, allowed_V: torch.Tensor | None = None, n: int = N) -> float:
    truth_BV = QUERIES_BE @ vectors().T
    if allowed_V is not None:
        truth_BV[:, ~allowed_V] = -torch.inf
    lines_BN, _ = index.search(QUERIES_BE, n, allowed_V)
    pairs = zip(truth_BV.topk(n).indices, lines_BN, strict=True)
    return sum(int(torch.isin(truth, found).sum()) for truth, found in pairs) / (QUERIES * n)


def recall_of_own(index: Index, vectors_VE: torch.Tensor, lines_B: torch.Tensor) -> float:
    """Share of lines that are among the N found by their own vector, of those that are so in truth."""
    truth_BN = (vectors_VE[lines_B] @ vectors_VE.T).topk(N).indices
    among_B = (truth_BN == lines_B[:, None]).any(1)
    found_BN, _ = index.search(vectors_VE[lines_B][among_B], N)
    return float((found_BN == lines_B[among_B, None]).any(1).float().mean())


def test_an_index_finds_nearly_what_an_exact_search_finds(index: Index) -> None:
    assert recall(index) > (0.99999 if index.exact else 0.9)


def test_scores_fall_and_are_those_of_the_lines(index: Index) -> None:
    lines_BN, scores_BN = index.search(QUERIES_BE, N)
    assert (scores_BN.diff() <= 0).all()
    rounded = 1.0 if index.kind == "ivf_pq" else 0.1  # codes of 256 that 1,999 points have taught
    torch.testing.assert_close(scores_BN, (QUERIES_BE[:, None] * vectors()[lines_BN]).sum(2), rtol=0.02, atol=rounded)


def test_only_allowed_lines_are_found(index: Index) -> None:
    lines_BN, _ = index.search(QUERIES_BE, N, EVEN_V)
    assert (lines_BN % 2 == 0).all()
    assert recall(index, EVEN_V) > 0.8


def test_a_search_for_more_than_there_is_ends_in_no_lines(index: Index) -> None:
    allowed_V = torch.arange(ITEMS) == 13
    lines_BN, scores_BN = index.search(QUERIES_BE, N, allowed_V)
    assert set(lines_BN.flatten().tolist()) <= {13, -1}
    assert (scores_BN[lines_BN == -1] == -torch.inf).all()


def test_a_query_finds_the_same_alone_and_among_others(index: Index) -> None:
    together = index.search(QUERIES_BE[:16], N)
    alone = [index.search(query_1E, N) for query_1E in torch.split(QUERIES_BE[:16], 1)]
    assert torch.equal(together[0], torch.cat([lines for lines, _ in alone]))
    assert torch.equal(together[1], torch.cat([scores for _, scores in alone]))


def test_an_index_is_read_as_it_was_written_and_written_the_same_again(index: Index, tmp_path: Path) -> None:
    index.write(tmp_path / INDEX)
    again = Index.build(vectors(), index.settings, threads=2)
    again.write(tmp_path / "again")
    assert (tmp_path / INDEX).read_bytes() == (tmp_path / "again").read_bytes()
    for mapped in (False, True):
        read = Index.load(tmp_path / INDEX, index.kind, index.settings, (ITEMS, WIDTH), threads=1, mapped=mapped)
        for left, right in zip(index.search(QUERIES_BE, N), read.search(QUERIES_BE, N), strict=True):
            assert torch.equal(left, right)


def test_an_index_that_is_read_where_it_lies_does_not_change(index: Index, tmp_path: Path) -> None:
    index.write(tmp_path / INDEX)
    before = (tmp_path / INDEX).read_bytes()
    read = Index.load(tmp_path / INDEX, index.kind, index.settings, (ITEMS, WIDTH), mapped=True)
    for change in (read.append, read.refill):
        with pytest.raises(RuntimeError, match="cannot change"):
            change(vectors(7))
    assert (tmp_path / INDEX).read_bytes() == before


def test_an_index_is_filled_in_blocks_with_the_same_bytes(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.index.BLOCK", 131)
    Index.build(vectors(), index.settings).write(tmp_path / "blocks")
    index.write(tmp_path / INDEX)
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / INDEX).read_bytes()


def test_lists_are_learnt_from_a_sample_as_well_as_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    many = vectors(9973)
    monkeypatch.setattr("serving.index.SAMPLED", 8)
    sampled = Index.build(many, IndexSettings(kind="ivf", probes=16))
    monkeypatch.setattr("serving.index.SAMPLED", 10**6)
    whole = Index.build(many, IndexSettings(kind="ivf", probes=16))
    truth_BN = (QUERIES_BE @ many.T).topk(N).indices
    for index in (sampled, whole):
        found_BN, _ = index.search(QUERIES_BE, N)
        seen.append(sum(int(torch.isin(truth, found).sum()) for truth, found in zip(truth_BN, found_BN, strict=True)))
    assert min(seen) > 0.9 * truth_BN.numel()


def test_what_a_product_quantizer_names_is_found_again_when_it_is_scored_exactly() -> None:
    index, scan = Index.build(vectors(), IndexSettings(kind="ivf_pq", probes=32)), Scan(vectors())
    rough = recall(index, n=7)
    exact_BN = (QUERIES_BE @ vectors().T).topk(7).indices
    rows_BN, scores_BN = find(index, scan, QUERIES_BE, 7)
    found = sum(int(torch.isin(exact, rows - FIRST_ITEM).sum()) for exact, rows in zip(exact_BN, rows_BN, strict=True))
    assert found / exact_BN.numel() > 0.98 > rough, "else nothing is found again"
    torch.testing.assert_close(scores_BN, (QUERIES_BE @ vectors().T).gather(1, rows_BN - FIRST_ITEM))


def test_items_appended_to_an_index_are_found_as_if_they_had_been_there(index: Index, tmp_path: Path) -> None:
    fewer = Index.build(vectors()[:-101], index.settings)
    fewer.write(tmp_path / INDEX)
    grown = Index.load(tmp_path / INDEX, index.kind, index.settings, (ITEMS - 101, WIDTH))
    grown.append(vectors()[-101:])
    assert recall(grown) > (0.99999 if index.exact else 0.9)
    if index.exact:
        for left, right in zip(grown.search(QUERIES_BE, N), index.search(QUERIES_BE, N), strict=True):
            assert torch.equal(left, right)
    assert recall_of_own(grown, vectors(), torch.arange(ITEMS - 101, ITEMS)) > 0.95
    grown.write(tmp_path / INDEX)
    Index.load(tmp_path / INDEX, index.kind, index.settings, (ITEMS, WIDTH))


def test_an_index_that_is_filled_anew_holds_the_new_vectors_alone(index: Index) -> None:
    moved = vectors()[torch.arange(ITEMS - 1, -1, -1)]
    index.refill(torch.cat([moved, vectors(53, seed=5)]))
    lines_BN, scores_BN = index.search(QUERIES_BE, N, torch.arange(ITEMS + 53) < ITEMS)
    truth_BN = (QUERIES_BE @ moved.T).topk(N).indices
    pairs = zip(truth_BN, lines_BN, strict=True)
    assert sum(int(torch.isin(truth, found).sum()) for truth, found in pairs) > (0.99999 if index.exact else 0.85) * QUERIES * N
    rounded = 1.0 if index.kind == "ivf_pq" else 0.1
    torch.testing.assert_close(scores_BN, (QUERIES_BE[:, None] * moved[lines_BN]).sum(2), rtol=0.02, atol=rounded)
    assert recall_of_own(index, torch.cat([moved, vectors(53, seed=5)]), torch.arange(ITEMS, ITEMS + 53)) > 0.95


def test_an_index_of_other_items_is_refused(index: Index, tmp_path: Path) -> None:
    index.write(tmp_path / INDEX)
    with pytest.raises(BundleError, match="1999, 23"):
        Index.load(tmp_path / INDEX, index.kind, index.settings, (ITEMS - 1, WIDTH))


def test_a_cut_index_is_refused_in_one_line_and_the_limits_of_reading_come_back(index: Index, tmp_path: Path) -> None:
    import faiss

    before = faiss.get_deserialization_loop_limit(), faiss.get_deserialization_vector_byte_limit()
    index.write(tmp_path / INDEX)
    content = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).write_bytes(content[: len(content) // 3])
    with pytest.raises(BundleError, match="cannot read"):
        Index.load(tmp_path / INDEX, index.kind, index.settings, (ITEMS, WIDTH))
    assert (faiss.get_deserialization_loop_limit(), faiss.get_deserialization_vector_byte_limit()) == before


@pytest.mark.parametrize("allowed_V", [None, EVEN_V, torch.arange(ITEMS) % 7 == 0], ids=["all", "many", "few"])
def test_a_scan_is_exact(allowed_V: torch.Tensor | None) -> None:
    assert recall(Scan(vectors()), allowed_V) == 1


def test_a_scan_for_more_than_there_is_ends_in_no_lines() -> None:
    for allowed_V in (EVEN_V, torch.arange(ITEMS) < 5):
        lines_BN, scores_BN = Scan(vectors()).search(QUERIES_BE, ITEMS + 3, allowed_V)
        count = int(allowed_V.sum())
        assert lines_BN.shape == (QUERIES, ITEMS + 3)
        assert (lines_BN[:, :count] >= 0).all()
        assert (lines_BN[:, count:] == -1).all()
        assert (scores_BN[:, count:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("kind", "option", "most"),
    [("ivf", "probes", 16), ("ivf_sq8", "probes", 16), ("ivf_pq", "probes", 16), ("hnsw", "breadth", 400)],
)
def test_probes_and_breadth_buy_recall(kind: str, option: str, most: int) -> None:
    low, high = (Index.build(vectors(), IndexSettings(kind=kind, **{option: value})) for value in (1, most))  # type: ignore[arg-type]
    assert recall(low, n=1) < recall(high, n=1)


def test_auto_is_exact_up_to_exact_items_then_ivf_up_to_ivf_items_then_ivf_pq() -> None:
    settings = IndexSettings(exact_items=1009, ivf_items=2003)
    assert [settings.chosen(items) for items in (1009, 1010, 2003, 2004)] == ["exact", "ivf", "ivf", "ivf_pq"]
    assert IndexSettings(kind="hnsw").chosen(7) == "hnsw"


@pytest.mark.parametrize("wrong", [{"kind": "flat"}, {"probes": 0}, {"breadth": 0}, {"exact_items": -1}, {"ivf_items": -1}])
def test_a_setting_out_of_range_is_refused_and_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IndexSettings(**wrong)  # type: ignore[arg-type]


def test_lists_are_many_enough_to_be_short_and_few_enough_to_be_learnt() -> None:
    assert [lists(items) for items in (1, 50, 1_999, 100_000, 1_000_000, 10**7, 10**8)] == [
        1,
        1,
        32,
        1024,
        4096,
        8192,
        8192,
    ]


@pytest.mark.gpu
def test_a_gpu_index_finds_what_the_cpu_index_finds(index: Index) -> None:
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or index.kind == "hnsw":
        pytest.skip("needs FAISS for GPU, and a kind that it has")
    assert index._gpu is not None
    assert recall(index) > 0.9

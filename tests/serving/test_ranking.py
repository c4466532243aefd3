"""The way from candidates to a list: the ranker, diversity, popularity, probabilities; and that no company changes a list."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from features.dataset import Dataset
from recsys.batch import gather
from serving.engine import Recommender
from tests.serving.conftest import RANKERS


@pytest.mark.parametrize("kind", RANKERS)
def test_a_ranked_list_is_the_same_alone_and_in_any_batch(kind: str, ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    recommender, sequences = Recommender.load(ranked_bundles[kind]), dataset.sequences
    assert recommender.ranker_blocks == RANKERS[kind].blocks
    batch = gather(sequences.items, sequences.times, sequences.offsets[:101], sequences.offsets[1:102])
    together = recommender.recommend(batch, 10)
    for user in range(0, 101, 3):
        one = gather(
            sequences.items, sequences.times, sequences.offsets[user : user + 1], sequences.offsets[user + 1 : user + 2]
        )
        alone = recommender.recommend(one, 10)
        assert torch.equal(alone.rows[0], together.rows[user])
        assert torch.equal(alone.scores[0], together.scores[user])


@pytest.mark.parametrize("kind", RANKERS)
def test_a_ranked_item_scores_as_in_its_list(kind: str, ranked_bundles: dict[str, Path], dataset: Dataset) -> None:
    recommender, sequences = Recommender.load(ranked_bundles[kind]), dataset.sequences
    batch = gather(sequences.items, sequences.times, sequences.offsets[:23], sequences.offsets[1:24])
    lists = recommender.recommend(batch, 7)
    known = ~lists.popular
    assert torch.allclose(recommender.score(batch, lists.rows)[known], lists.scores[known], atol=1e-5)

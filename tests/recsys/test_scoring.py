"""A score is an inner product of placed vectors."""

import pytest
import torch
import torch.nn.functional as F

from recsys.scoring import SIMILARITIES, place_items, place_users


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_inner_product_of_placed_vectors_is_the_similarity_over_the_temperature(similarity):
    users, items = torch.randn(5, 7), torch.randn(11, 7)
    wanted = users @ items.T if similarity == "dot" else F.cosine_similarity(users[:, None], items[None], dim=-1)
    found = place_users(users, similarity, 0.25) @ place_items(items, similarity).T
    assert torch.allclose(found, wanted / 0.25, atol=1e-5)

"""The one order of a list."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.batch import PADDING
from serving.lists import Lists, best

SCORES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, -float("inf")])
CANDIDATES = st.lists(st.tuples(st.integers(2, 2**31 - 1), SCORES), min_size=1, max_size=23, unique_by=lambda pair: pair[0])


@given(CANDIDATES, st.integers(1, 29))
def test_lists_fall_by_score_with_ties_by_row_and_leave_out_what_scores_minus_infinity(
    candidates: list[tuple[int, float]], k: int
) -> None:
    rows_1C, scores_1C = torch.tensor([[row for row, _ in candidates]]), torch.tensor([[score for _, score in candidates]])
    rows_1K, scores_1K = best(rows_1C, scores_1C, k)
    wanted = sorted(((-score, row) for row, score in candidates if score != -float("inf")))[:k]
    assert rows_1K[0].tolist() == [row for _, row in wanted] + [PADDING] * (k - len(wanted))
    assert scores_1K[0].tolist() == [-score for score, _ in wanted] + [-float("inf")] * (k - len(wanted))


def test_joined_lists_stand_one_below_the_other() -> None:
    one = Lists(torch.tensor([[3, 5]]), torch.tensor([[2.0, 1.0]]), torch.tensor([True]))
    two = Lists(torch.tensor([[7, PADDING]]), torch.tensor([[2.0, -torch.inf]]), torch.tensor([False]))
    joined = Lists.joined([one, two], 2)
    assert joined.rows.tolist() == [[3, 5], [7, PADDING]]
    assert joined.sources == ["popularity", "retrieved"]
    assert joined.underfilled == 1
    assert Lists.joined([], 2).rows.shape == (0, 2)

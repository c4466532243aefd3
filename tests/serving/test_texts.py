"""Texts in one block of bytes, and the places of a text among them, against a plain dict."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import texts
from serving.texts import Places, Texts

WORDS = st.text(st.sampled_from("aßAé\n 0\U0001f600"), max_size=5)


@pytest.fixture(params=[texts.digest, lambda text: len(text) % 3, lambda text: 2**64 - 1], ids=["own", "crowded", "one"])
def digest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes under which all, some and nearly no texts collide."""
    monkeypatch.setattr(texts, "digest", request.param)


def parted(words: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (words[start : start + size] for start in range(0, len(words), size))


@given(words=st.lists(WORDS), size=st.integers(1, 7))
def test_packed_texts_are_the_texts_whatever_the_parts(words: list[str], size: int) -> None:
    packed = Texts.packed(parted(words, size))
    assert [*packed] == words == packed[:]
    assert packed[1:5:2] == words[1:5:2]
    assert [packed[place] for place in range(-len(words), 0)] == words
    with pytest.raises(IndexError):
        packed[len(words)]


@given(words=st.lists(WORDS, max_size=23), asked=st.lists(WORDS, max_size=23))
@pytest.mark.usefixtures("digest")
def test_the_first_place_of_a_text_is_found_and_no_other_text_is_taken_for_it(words: list[str], asked: list[str]) -> None:
    wanted: dict[str, int] = {}
    for place, word in enumerate(words):
        wanted.setdefault(word, place)
    hashes = np.fromiter(map(texts.digest, words), np.uint64, len(words))
    places = Places.of(np.arange(len(words)), hashes)
    asked = [*asked, *words[::3], "no word"]
    assert places.first(asked, lambda lines: [words[line] for line in lines]) == [wanted.get(word) for word in asked]


def test_half_a_pair_of_utf_16_is_found_nowhere() -> None:
    places = Places.of(np.arange(1), np.array([texts.digest("?")], np.uint64))
    assert places.first(["\ud800"], lambda lines: ["?" for _ in lines]) == [None]

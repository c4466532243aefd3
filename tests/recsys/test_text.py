"""Text encoders: the laws of every one, and what is each one's own."""

import dataclasses
from pathlib import Path

import pytest
import torch

from recsys import text as module
from recsys.errors import SetupError
from recsys.text import ENCODERS, Encoded, Pretrained, TextEncoder, TextSettings, words_of

SEA = ["a ship sails on the sea", "the harbour of a ship", "sailors love the stormy sea", "a storm over the harbour"]
SPACE = ["a rocket flies to the moon", "the orbit of a rocket", "astronauts walk upon the moon", "an orbit over planets"]
FOOD = ["bread with melted cheese", "a baker bakes bread", "soup with cheese", "the baker cooks soup"]
TEXTS = SEA + SPACE + FOOD
OTHERS = [
    "",
    "the sea",
    "Ship, SHIP & Harbour!",
    "nothing like them: quinquereme",
    "красная планета 宇宙の旅 moon",
    "…",
    "moon " * 31,
]
SETTINGS = TextSettings(size=7, tokens=5, vocabulary=999_983)
OWN = ("lsa", "tokens")


def fitted(name: str, texts: list[str] = TEXTS, **changed: object) -> TextEncoder:
    return ENCODERS[name].fit(texts, dataclasses.replace(SETTINGS, encoder=name, **changed))


def numbers(encoder: TextEncoder, text: str) -> list[torch.Tensor]:
    """Tokens, their states and the pooled vector of one text."""
    return of_line(encoder.encode([text]), 0)


def of_line(encoded: Encoded, line: int) -> list[torch.Tensor]:
    tokens = encoded.tokens_NL[line]
    states = encoded.states_WP[tokens] if len(encoded.states_WP) else torch.zeros(0)
    return [tokens, states, encoded.pooled_NP[line]]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ein Café, à la carte!", ["ein", "café", "à", "la", "carte"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("\uff21\uff22\uff23\uff11\uff12 \ufb01ne", ["abc12", "fine"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("Преступление и наказание", ["преступление", "и", "наказание"]),
        ("the rock'n'roll of 1969-70 (live)", ["the", "rock", "n", "roll", "of", "1969", "70", "live"]),
        ("长江三号 2号线", ["长", "江", "三", "号", "2", "号", "线"]),
        ("宇宙の旅", ["宇", "宙", "の", "旅"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("हिन्दी की किताब", ["हिन्दी", "की", "किताब"]),
        ("كتاب، قلم؟", ["كتاب", "قلم"]),
        ("राम। कथा॥", ["राम", "कथा"]),
        ("한국어 책", ["한국어", "책"]),
        ("«quoted» “text” — done…", ["quoted", "text", "done"]),
        ("snake_case a+b=c #tag @name", ["snake", "case", "a", "b", "c", "tag", "name"]),
        ("  \t\n ,;!? … — ", []),
        ("", []),
    ],
)
def test_words_of_any_script_are_found(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize("name", OWN)
def test_the_same_text_gives_the_same_numbers_in_any_company(name):
    encoder = fitted(name)
    texts = [*TEXTS, *OTHERS, TEXTS[3]]
    together, backwards = encoder.encode(texts), encoder.encode(texts[::-1])
    for line, text in enumerate(texts):
        alone = numbers(encoder, text)
        assert equal(alone, of_line(together, line))
        assert equal(alone, of_line(backwards, len(texts) - 1 - line))
    assert together.tokens_NL.dtype == torch.int32
    assert not torch.equal(together.tokens_NL[0], together.tokens_NL[5])


@pytest.mark.parametrize("name", OWN)
def test_a_text_without_words_has_no_token_and_a_zero_pooled_vector(name):
    encoded = fitted(name).encode(["", "sea", " … ,! "])
    for line in (0, 2):
        assert not encoded.tokens_NL[line].any()
        assert not encoded.pooled_NP[line].any()
    assert encoded.tokens_NL[1].any()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("tokens", [1, 3, 29])
def test_words_are_the_tokens_in_number_and_order_and_at_most_so_many(name, tokens):
    encoder = fitted(name, tokens=tokens)
    encoded = encoder.encode(TEXTS + OTHERS)
    assert encoded.tokens_NL.shape == (len(TEXTS + OTHERS), tokens)
    names: dict[int, str] = {}
    for text, row in zip(TEXTS + OTHERS, encoded.tokens_NL.tolist(), strict=True):
        words = encoder.words(text)
        assert len(words) <= tokens
        assert [token > 0 for token in row] == [True] * len(words) + [False] * (tokens - len(words))
        for word, token in zip(words, row, strict=False):
            assert names.setdefault(token, word) == word
    assert len(set(names.values())) == len(names) > 5


@pytest.mark.parametrize("name", OWN)
def test_a_restored_encoder_gives_the_same_numbers(name):
    encoder = fitted(name)
    again = ENCODERS[name].restore(encoder.settings, *encoder.state())
    before, after = encoder.encode(TEXTS + OTHERS), again.encode(TEXTS + OTHERS)
    for field in dataclasses.fields(Encoded):
        assert torch.equal(getattr(before, field.name), getattr(after, field.name))
    assert [again.words(text) for text in OTHERS] == [encoder.words(text) for text in OTHERS]


def test_lsa_is_tfidf_and_svd_worked_out_plainly():
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [*TEXTS, "bread and bread and bread to the moon"]
    plain = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
    svd = TruncatedSVD(7, algorithm="arpack", random_state=1).fit(plain.fit_transform(texts))
    asked = [*texts, "stormy bread", "the moon and the sea and the moon"]
    wanted = torch.from_numpy(svd.transform(plain.transform(asked))).float()
    found = fitted("lsa", texts).encode(asked).pooled_NP
    directions = wanted / wanted.norm(dim=1, keepdim=True)
    assert torch.allclose(found @ found.T, directions @ directions.T, atol=1e-4)


def test_lsa_of_texts_that_are_all_alike_or_few_is_the_same_each_time():
    for texts in ([f"jumbo {colour} bag" for colour in ["red", "blue", "green", "pink"]] * 15, ["the sea", "the sea"], TEXTS):
        first, again = (fitted("lsa", texts, size=64).components_WP for _ in range(2))
        assert torch.equal(first, again)
        assert bool(first.isfinite().all()) and bool(first.any())


def test_a_term_of_lsa_points_where_its_line_of_the_singular_vectors_does():
    encoder = fitted("lsa")
    encoded = encoder.encode(["sea ship"])
    for token in encoded.tokens_NL[0, :2].tolist():
        line = encoder.components_WP[token - 1]
        assert torch.allclose(encoded.states_WP[token], line / line.norm() * 7**0.5, atol=1e-5)
    assert not encoded.states_WP[0].any()


def test_texts_of_one_subject_are_nearer_to_each_other_than_to_others():
    pooled = fitted("lsa", size=3).encode(TEXTS).pooled_NP
    alike = torch.nn.functional.cosine_similarity(pooled[:, None], pooled[None], dim=-1)
    subject = torch.arange(len(TEXTS)) // 4
    own = (subject[:, None] == subject).logical_and(~torch.eye(len(TEXTS), dtype=torch.bool))
    assert alike[own].mean() > alike[subject[:, None] != subject].mean() + 0.3


def test_lsa_keeps_the_rarest_words_in_their_order():
    encoder = fitted("lsa", ["the sea", "the ship", "the ship of the sea", "the moon"], tokens=2)
    assert encoder.words("the ship the moon sea unheard") == ["ship", "moon"]


def test_lsa_reads_pairs_of_characters_of_a_script_without_spaces():
    encoder = fitted("lsa", ["宇宙の旅", "宇宙船", "旅の宿"], tokens=13)
    assert encoder.words("宇宙") == ["宇", "宙", "宇宙"]


def test_a_vocabulary_of_lsa_holds_at_most_so_many_terms():
    encoder = fitted("lsa", vocabulary=5)
    assert len(encoder.terms) == 5
    assert int(encoder.encode(TEXTS).tokens_NL.max()) == 5
    assert "the" in encoder.terms


@pytest.mark.parametrize(
    "texts", [[], ["", " "], ["one text alone"], ["word"], ["again"] * 3, ["a b c d e f g h", "a b c d e f g h"] * 5]
)
def test_lsa_of_hardly_any_text_gives_numbers(texts):
    encoder = fitted("lsa", texts)
    encoded = encoder.encode([*texts, "a text", ""])
    assert encoded.pooled_NP.shape == (len(texts) + 2, 7)
    assert encoded.pooled_NP.isfinite().all() and encoded.states_WP.isfinite().all()
    assert int(encoded.tokens_NL.max()) < len(encoded.states_WP)
    assert not encoded.pooled_NP[-1].any()
    for line, text in enumerate(texts):
        assert encoded.pooled_NP[line].any() == encoded.tokens_NL[line].any() == bool(text.strip())


def test_hashed_tokens_are_buckets_from_1_to_the_vocabulary():
    encoded = fitted("tokens", vocabulary=11, tokens=31).encode(TEXTS)
    assert set(encoded.tokens_NL.flatten().tolist()) - {0} == set(range(1, 12))
    assert encoded.states_WP.shape == (0, 7)
    assert encoded.pooled_NP.shape == (len(TEXTS), 0)


def test_a_new_word_shares_pieces_with_a_known_one():
    encoder = fitted("tokens", tokens=13)
    known, new, other = (set(row) - {0} for row in encoder.encode(["astronauts", "astronomy", "bakeries"]).tokens_NL.tolist())
    assert known & new
    assert not known & other
    assert encoder.words("astronauts at sea") == ["astronauts", "astr", "onau", "ts", "at", "sea"]


@pytest.mark.parametrize(
    ("key", "value"), [("size", 0), ("tokens", 0), ("vocabulary", 0), ("neighbours", -1.0), ("encoder", "")]
)
def test_a_setting_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        TextSettings(**{key: value})


CHANGES = {"size": 3, "tokens": 2, "vocabulary": 13, "encoder": "tokens"}
ELSEWHERE = {"neighbours": "tests/training/test_run.py"}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(TextSettings) if field.name not in ELSEWHERE])
def test_every_option_changes_what_is_read(option):
    changed = dataclasses.replace(SETTINGS, **{option: CHANGES[option]})
    one, other = (ENCODERS[chosen.encoder].fit(TEXTS, chosen).encode(TEXTS) for chosen in (SETTINGS, changed))
    same = [getattr(one, field.name).equal(getattr(other, field.name)) for field in dataclasses.fields(Encoded)]
    assert not all(same)


WORDS = sorted({word for text in TEXTS for word in words_of(text)})
LONGEST = 11
"""Tokens that the tiny model reads, its own two at the ends among them."""


def save_model(folder: Path, seed: int) -> Path:
    """A random sentence-transformers model, 16 wide, that knows the words of TEXTS."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    parts = folder.with_name(f"{folder.name} parts")
    parts.mkdir(exist_ok=True)
    (parts / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", *WORDS]))
    config = BertConfig(
        vocab_size=6 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=19,
        max_position_embeddings=LONGEST,
    )
    model = BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(parts)
    BertTokenizerFast(str(parts / "vocab.txt")).save_pretrained(parts)
    whole = SentenceTransformer(str(parts), device="cpu")
    whole.max_seq_length = LONGEST
    whole.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model."""
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    return save_model(tmp_path_factory.mktemp("models") / "tiny", 0)


def pretrained(folder: Path, texts: list[str] = TEXTS, cache: Path | None = None, **changed: object) -> Pretrained:
    return Pretrained.fit(texts, dataclasses.replace(SETTINGS, encoder=str(folder), **changed), cache)


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether texts have the same states, their elements of about size 1, and pooled vectors; their tokens have other lines."""
    return all(torch.allclose(first, second, atol=1e-2) for first, second in zip(one[1:], other[1:], strict=True))


def test_a_pretrained_model_gives_the_same_numbers_in_any_company(tiny):
    encoder = pretrained(tiny)
    texts = [*TEXTS, *OTHERS, TEXTS[3]]
    together, backwards = encoder.encode(texts), encoder.encode(texts[::-1])
    for line, text in enumerate(texts):
        alone = numbers(encoder, text)
        assert close(alone, of_line(together, line))
        assert close(alone, of_line(backwards, len(texts) - 1 - line))
    assert not close(of_line(together, 0), of_line(together, 1))


def test_each_token_has_the_state_of_its_place_and_company(tiny):
    encoded = pretrained(tiny).encode(["sea ship moon", "moon sea ship"])
    assert len(encoded.states_WP) == 1 + 2 * 3
    assert not encoded.states_WP[0].any()
    states = encoded.states_WP[encoded.tokens_NL[:, :3]]
    assert not torch.allclose(states[0, 0], states[1, 1], atol=1e-1)


def test_the_states_are_those_of_the_model_without_its_own_tokens_turned_by_a_pca(tiny):
    from sentence_transformers import SentenceTransformer
    from sklearn.decomposition import PCA

    encoder, model = pretrained(tiny), SentenceTransformer(str(tiny), device="cpu")
    pca = PCA(7).fit(model.encode(TEXTS, show_progress_bar=False))
    text = "the baker flies to the moon"
    found = numbers(encoder, text)
    pooled_P = torch.from_numpy(pca.transform(model.encode([text], show_progress_bar=False)))[0].float()
    tokens_TD = model.encode([text], output_value="token_embeddings", show_progress_bar=False)[0][1:-1]
    states_TP = torch.from_numpy(pca.transform(tokens_TD.numpy())).float()[:5]
    signs = (pooled_P * found[2]).sign()
    assert torch.allclose(found[2] * signs, pooled_P / pooled_P.norm(), atol=1e-2)
    assert torch.allclose(found[1] * signs, 7**0.5 * states_TP / states_TP.norm(dim=1, keepdim=True), atol=2e-2)


def test_a_text_without_words_has_no_token_nor_pooled_vector_of_a_pretrained_model(tiny):
    encoded = pretrained(tiny).encode(["", "sea", " … "])
    for line in (0, 2):
        assert not encoded.tokens_NL[line].any()
        assert not encoded.pooled_NP[line].any()
    assert encoded.tokens_NL[1].any()


@pytest.mark.parametrize("tokens", [1, 3, 29])
def test_words_are_the_tokens_of_a_pretrained_model_in_number(tiny, tokens):
    encoder = pretrained(tiny, tokens=tokens)
    texts = [*TEXTS, *OTHERS, "moon over the " * 7]
    counts = (encoder.encode(texts).tokens_NL > 0).sum(1).tolist()
    assert [len(encoder.words(text)) for text in texts] == counts
    assert max(counts) == min(tokens, LONGEST - 2)
    assert encoder.words("Ship unheard sailors")[:2] == ["ship", "sailors"][:tokens]


def test_a_second_encode_with_the_same_cache_runs_the_model_not_once(tiny, tmp_path, monkeypatch):
    cache, told = tmp_path / "new" / "text.sqlite", []
    encoder = pretrained(tiny)
    first = encoder.encode(TEXTS, cache, lambda done, texts: told.append((done, texts)))
    ran: list[str] = []
    run = Pretrained._run
    monkeypatch.setattr(Pretrained, "_run", lambda self, texts: (ran.extend(texts), run(self, texts))[1])
    again = Pretrained.restore(encoder.settings, *encoder.state())
    second = again.encode(TEXTS, cache)
    assert ran == []
    assert all(close(of_line(first, line), of_line(second, line)) for line in range(len(TEXTS)))
    again.encode([*TEXTS, "a new text", "a new text"], cache)
    assert ran == ["a new text"]
    assert told == [(len(TEXTS), len(TEXTS))]


def test_a_cache_is_of_one_model_and_one_count_of_tokens(tiny, tmp_path):
    cache = tmp_path / "text.sqlite"
    one = pretrained(tiny, cache=cache).encode(TEXTS, cache)
    more = pretrained(tiny, cache=cache, tokens=7).encode(TEXTS, cache)
    assert int((more.tokens_NL > 0).sum(1).max()) == 6
    other = pretrained(save_model(tmp_path / "other", 1), cache=cache).encode(TEXTS, cache)
    assert not torch.allclose(one.pooled_NP, other.pooled_NP, atol=1e-1)


def test_a_restored_pretrained_encoder_gives_the_same_numbers(tiny):
    encoder = pretrained(tiny)
    again = Pretrained.restore(encoder.settings, *encoder.state())
    before, after = encoder.encode(TEXTS + OTHERS), again.encode(TEXTS + OTHERS)
    assert torch.equal(before.tokens_NL, after.tokens_NL)
    assert torch.allclose(before.states_WP, after.states_WP, atol=1e-2)
    assert torch.allclose(before.pooled_NP, after.pooled_NP, atol=1e-2)


def test_another_model_in_the_place_of_the_one_that_was_read_is_refused_each_time(tiny, tmp_path):
    folder = save_model(tmp_path / "model", 0)
    encoder = pretrained(folder)
    save_model(folder, 1)
    again = Pretrained.restore(encoder.settings, *encoder.state())
    for _ in range(2):
        with pytest.raises(SetupError, match="is not the model that the items were read by") as caught:
            again.encode(["sea"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("texts", [[], [""], ["one text alone"], ["the sea"] * 3, ["the sea", "the moon"]])
def test_a_pretrained_model_of_hardly_any_text_gives_numbers(tiny, texts):
    encoded = pretrained(tiny, texts).encode([*texts, "a storm", ""])
    assert encoded.pooled_NP.shape == (len(texts) + 2, 7)
    assert encoded.pooled_NP.isfinite().all() and encoded.states_WP.isfinite().all()
    assert not encoded.pooled_NP[-1].any()


def test_an_encoder_that_is_no_model_is_refused_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SetupError, match=r"text\.encoder .*missing.* is none of lsa, tokens, minilm") as caught:
        pretrained(tmp_path / "missing")
    assert "\n" not in str(caught.value)


def test_a_memory_of_texts_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "text.sqlite").write_bytes(b"no database at all, however long it may be" * 101)
    with pytest.raises(SetupError, match=r"text\.sqlite: texts cannot be remembered there") as error:
        module._Store(tmp_path / "text.sqlite")
    assert "\n" not in str(error.value)

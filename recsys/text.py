"""Text encoders behind one door: each turns texts into token states and a pooled vector; none is trained here.

N texts · L tokens of a text · W states · P width of a state
"""

from __future__ import annotations

import math
import re
import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.config import Settings
from recsys.errors import SetupError
from recsys.progress import Count

BATCH = 256
"""Texts that a pretrained model encodes at once."""


@dataclass(frozen=True)
class TextSettings(Settings):
    """How the items' text becomes numbers; read where model.text is not none."""

    section: ClassVar[str] = "text"

    encoder: str = "lsa"
    """lsa (TF-IDF and SVD), tokens (hashed subwords, learnt with the model), minilm, or the name or path of a
    sentence-transformers model."""
    size: int = 256
    """Width of token states and pooled vectors."""
    tokens: int = 16
    """Most tokens of a text that the model attends to: the rarest, in their order (lsa), or the first."""
    vocabulary: int = 20_000
    """Most terms of lsa; buckets of hashed subwords."""
    neighbours: float = 0.0
    """Events that the learnt items of the nearest texts count as in an item's vector, beside its own events; 0: they are not
    read, nor with tokens, whose vectors are learnt."""

    def __post_init__(self) -> None:
        self._at_least(1, "size", "tokens", "vocabulary")
        self._at_least(0, "neighbours")
        if not self.encoder:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, or a sentence-transformers model, found ''")


@dataclass(frozen=True)
class Encoded:
    """N texts as numbers."""

    tokens_NL: Tensor
    """Lines of `states_WP`, int32; 0 where a text has fewer."""
    states_WP: Tensor
    """State of each token, elements of about size 1; line 0 is none. No line (0 × P) where the model learns them."""
    pooled_NP: Tensor
    """Pooled vectors of length 1, or 0 where nothing was known of a text; N × 0 where the model learns them."""


_APART = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, which put no spaces between words."""
UNSPACED = re.compile(f"[{_APART}]")


@cache
def _word() -> re.Pattern[str]:
    """A word: what stands between punctuation, signs and spaces of any script, marks of vowels in it; of scripts that put
    no spaces, a character."""
    plane = map(chr, range(0x10000))
    between = re.escape("".join(sign for sign in plane if unicodedata.category(sign)[0] in "PSZC"))
    return re.compile(f"[{_APART}]|[^{_APART}{between}]+")


def words_of(text: str) -> list[str]:
    """The words of a text of any script, in normal form (NFKC) and without case; single characters where none are apart."""
    return _word().findall(unicodedata.normalize("NFKC", text).casefold())


def without_words(text: str) -> dict[str, str]:
    """What is left of a text without each of its words, wherever it stands, by the word as `words_of` names it."""
    parts = re.split(f"({_word().pattern})", unicodedata.normalize("NFKC", text))  # every other one is a word
    words = dict.fromkeys(part.casefold() for part in parts[1::2])
    return {word: "".join(part for part in parts if part.casefold() != word).strip() for word in words}


DENSE = 512
"""Most texts or terms of which all singular vectors are worked out: less than a second."""


class Lsa:
    """Latent semantic analysis: TF-IDF and a truncated SVD (Deerwester et al. 1990), by scikit-learn; exact and small.

    A token's state is its line of the right singular vectors, at unit length.
    """

    contextual = False

    def __init__(self, settings: TextSettings, terms: Sequence[str], idf_W: Tensor, components_WP: Tensor) -> None:
        self.settings, self.terms, self.idf_W, self.components_WP = settings, list(terms), idf_W, components_WP
        self._places = {term: place for place, term in enumerate(self.terms, 1)}
        self._vectorizer = _vectorizer(vocabulary=self.terms or ["?"])
        self._vectorizer.idf_ = (idf_W if self.terms else torch.ones(1)).double().numpy()

    @classmethod
    def fit(cls, texts: Sequence[str], settings: TextSettings, cache: Path | None = None, progress: Count | None = None) -> Lsa:
        """Learn terms and components of the texts; where there are many, a term of one text alone is left out."""
        texts = [text for text in texts if _terms(text)]
        if not texts:
            return cls(settings, [], torch.zeros(0), torch.zeros(0, settings.size))
        vectorizer = _vectorizer(min_df=2 if len(texts) >= 1000 else 1, max_features=settings.vocabulary)
        weights_NW = vectorizer.fit_transform(texts)
        components_WP = torch.zeros(weights_NW.shape[1], settings.size)
        found_WP = _singular(weights_NW, settings.size)
        components_WP[:, : found_WP.shape[1]] = found_WP
        terms = vectorizer.get_feature_names_out().tolist()
        return cls(settings, terms, torch.from_numpy(vectorizer.idf_).float(), components_WP)

    def encode(self, texts: Sequence[str], cache: Path | None = None, progress: Count | None = None) -> Encoded:
        components_WP = self.components_WP if self.terms else torch.zeros(1, self.settings.size)
        pooled_NP = torch.from_numpy(self._vectorizer.transform(texts) @ components_WP.double().numpy()).float()
        held_N1 = pooled_NP.norm(dim=1, keepdim=True) > 1e-6  # else rounding is all that the components hold of a text
        pooled_NP = F.normalize(pooled_NP) * held_N1
        tokens = [[self._places[word] for word in self.words(text)] for text in texts]
        states_WP = F.pad(_unit(self.components_WP), (0, 0, 1, 0))
        return Encoded(padded(tokens, self.settings.tokens), states_WP, pooled_NP)

    def words(self, text: str) -> list[str]:
        known = [word for word in dict.fromkeys(_terms(text)) if word in self._places]
        rarest = sorted(known, key=lambda word: -float(self.idf_W[self._places[word] - 1]))[: self.settings.tokens]
        return [word for word in known if word in set(rarest)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"idf": self.idf_W, "components": self.components_WP}, {"terms": self.terms}

    @classmethod
    def restore(cls, settings: TextSettings, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Lsa:
        return cls(settings, plain["terms"], tensors["idf"], tensors["components"])


def _vectorizer(**which: Any) -> Any:
    """TF-IDF of the terms of texts; `which` says which terms there are."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=_terms, token_pattern=None, sublinear_tf=True, **which)


def _singular(weights_NW: Any, size: int) -> Tensor:
    """The first right singular vectors of a sparse matrix, W × at most `size`.

    ARPACK draws anew where it has found all there is, by no seed; so what is small is worked out whole. Of few terms all
    directions are kept, also those that no text tells apart: then nothing is lost of a text to come.
    """
    import numpy as np
    from sklearn.decomposition import TruncatedSVD

    texts, terms = weights_NW.shape
    if terms <= DENSE:
        components_PW = np.linalg.eigh((weights_NW.T @ weights_NW).toarray())[1].T[::-1].copy()
    elif texts <= DENSE:
        components_PW = np.linalg.svd(weights_NW.toarray(), full_matrices=False)[2]
    else:
        components_PW = TruncatedSVD(size, algorithm="arpack", random_state=0).fit(weights_NW).components_
    highest_P1 = np.abs(components_PW).argmax(1, keepdims=True)
    components_PW = components_PW * np.sign(np.take_along_axis(components_PW, highest_P1, 1))
    return torch.from_numpy(components_PW[:size].T.copy()).float()


class Hashed:
    """Subwords by hash: each word, and the pieces of four characters of a longer one; their states are learnt.

    The hashing trick (Weinberger et al. 2009): no vocabulary to fit, and a new word is read by its pieces.
    """

    contextual = False

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings

    @classmethod
    def fit(
        cls, texts: Sequence[str], settings: TextSettings, cache: Path | None = None, progress: Count | None = None
    ) -> Hashed:
        return cls(settings)

    def encode(self, texts: Sequence[str], cache: Path | None = None, progress: Count | None = None) -> Encoded:
        from xxhash import xxh64_intdigest

        tokens = [
            [1 + xxh64_intdigest(piece.encode()) % self.settings.vocabulary for piece in self.words(text)] for text in texts
        ]
        none = torch.zeros(0, self.settings.size), torch.zeros(len(texts), 0)
        return Encoded(padded(tokens, self.settings.tokens), *none)

    def words(self, text: str) -> list[str]:
        return [piece for word in words_of(text) for piece in _pieces(word)][: self.settings.tokens]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    @classmethod
    def restore(cls, settings: TextSettings, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Hashed:
        return cls(settings)


class Pretrained:
    """A sentence-transformers model as it is (Reimers & Gurevych 2019), its states turned and cut by a PCA of the texts."""

    contextual = True

    def __init__(self, settings: TextSettings, mean_D: Tensor, components_PD: Tensor, digest: str = "") -> None:
        self.settings, self.mean_D, self.components_PD, self.digest = settings, mean_D, components_PD, digest
        self._model: Any = None

    @classmethod
    def fit(
        cls, texts: Sequence[str], settings: TextSettings, cache: Path | None = None, progress: Count | None = None
    ) -> Pretrained:
        encoder = cls(settings, torch.zeros(0), torch.zeros(0, 0))
        encoder.digest = _fingerprint(encoder.model)
        width = int(encoder.model.get_embedding_dimension())
        pooled = [pooled_D for _, pooled_D in encoder._raw([text for text in texts if text], cache, progress)]
        pooled_ND = torch.stack([torch.zeros(width), *pooled])[min(1, len(pooled)) :].double()
        mean_D = pooled_ND.mean(0)
        directions_DD = torch.linalg.eigh((pooled_ND - mean_D).T @ (pooled_ND - mean_D)).eigenvectors.flip(1)
        size = min(settings.size, width)
        encoder.mean_D, encoder.components_PD = mean_D.float(), torch.zeros(settings.size, width)
        encoder.components_PD[:size] = directions_DD[:, :size].T.float()
        return encoder

    @property
    def model(self) -> Any:
        if self._model is None:
            model = _sentence_transformer(self.settings.encoder)
            if self.digest and _fingerprint(model) != self.digest:
                raise SetupError(
                    f"text.encoder {self.settings.encoder!r} is not the model that the items were read by; bring that one back"
                )
            self._model = model
        return self._model

    def encode(self, texts: Sequence[str], cache: Path | None = None, progress: Count | None = None) -> Encoded:
        limit = self.settings.tokens
        tokens_NL = torch.zeros(len(texts), limit, dtype=torch.int32)
        pooled_NP = torch.zeros(len(texts), self.settings.size)
        states, used = [torch.zeros(1, self.settings.size)], 1
        described = [place for place, text in enumerate(texts) if text]
        for place, (tokens_LD, pooled_D) in zip(
            described, self._raw([texts[place] for place in described], cache, progress), strict=True
        ):
            if not len(tokens_LD):
                continue
            states.append(_unit(self._turn(tokens_LD)))
            tokens_NL[place, : len(tokens_LD)] = torch.arange(used, used + len(tokens_LD), dtype=torch.int32)
            pooled_NP[place] = self._turn(pooled_D)
            used += len(tokens_LD)
        return Encoded(tokens_NL, torch.cat(states), F.normalize(pooled_NP))

    def words(self, text: str) -> list[str]:
        tokenizer = self.model.tokenizer
        return [tokenizer.decode([token]).strip() for token in self._token_ids(text)][: self.settings.tokens]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"mean": self.mean_D, "components": self.components_PD}, {"digest": self.digest}

    @classmethod
    def restore(cls, settings: TextSettings, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Pretrained:
        return cls(settings, tensors["mean"], tensors["components"], plain["digest"])

    def _turn(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean_D) @ self.components_PD.T

    def _token_ids(self, text: str) -> list[int]:
        longest, special = self.model.max_seq_length, set(self.model.tokenizer.all_special_ids)
        read = self.model.tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        return [token for token in read if token not in special]

    def _raw(self, texts: Sequence[str], cache: Path | None, progress: Count | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(token states L × D, pooled D) of each text: remembered, or encoded in batches of about the same length."""
        about = f"{self.digest} {self.settings.tokens}"
        keys = [sha256(f"{about}\0{text}".encode()).digest() for text in texts]
        by_key = dict(zip(keys, texts, strict=True))
        with _Store(cache) as store:
            new = sorted((key for key in by_key if key not in store), key=lambda key: len(by_key[key]))
            for start in range(0, len(new), BATCH):
                part = new[start : start + BATCH]
                store.put(part, self._run([by_key[key] for key in part]))
                if progress is not None:
                    progress(len(by_key) - len(new) + start + len(part), len(by_key))
            for key in keys:
                states_LD = store.get(key)
                yield states_LD[1:], states_LD[0]

    def _run(self, texts: Sequence[str]) -> list[Tensor]:
        """Of each text the pooled vector, then its tokens' states, float16."""
        special = torch.tensor(self.model.tokenizer.all_special_ids)
        packed = []
        for one in self.model.encode(list(texts), output_value=None, batch_size=len(texts), show_progress_bar=False):
            read_T = one["attention_mask"].bool() & ~torch.isin(one["input_ids"], special)
            states_LD = one["token_embeddings"][read_T][: self.settings.tokens]
            packed.append(torch.cat([one["sentence_embedding"][None], states_LD]).half().cpu())
        return packed


def _fingerprint(model: Any) -> str:
    """Of a sentence-transformers model's weights and words."""
    weights, words = model.state_dict(), model.tokenizer.get_vocab()
    digest = sha256(str(sorted(words.items())).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sentence_transformer(name: str) -> Any:
    """Raises SetupError: the library or the model is not there."""
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError as error:
        raise SetupError(
            f"sentence-transformers does not load ({error}); pip install 'attention-recommender[text]', or set text.encoder=lsa"
        ) from None
    logging.disable_progress_bar()
    try:
        return SentenceTransformer(MODELS.get(name, name), device="cpu").eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SetupError(
            f"text.encoder {name!r} is none of {', '.join(ENCODERS)} and no sentence-transformers model that can be read "
            f"({reason}); give a name that can be downloaded, or a folder"
        ) from None


MODELS = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}


class _Store:
    """Tensors of float16 by key, in a SQLite file that several processes may use, or in memory."""

    def __init__(self, path: Path | None) -> None:
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(":memory:" if path is None else path, timeout=60)
            with self._store:
                self._store.execute("CREATE TABLE IF NOT EXISTS texts (key BLOB PRIMARY KEY, width INTEGER, states BLOB)")
        except (OSError, sqlite3.DatabaseError) as error:
            raise SetupError(f"{path}: texts cannot be remembered there ({error}); delete it, or set RECSYS_CACHE") from None

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def __contains__(self, key: bytes) -> bool:
        return self._store.execute("SELECT 1 FROM texts WHERE key = ?", [key]).fetchone() is not None

    def get(self, key: bytes) -> Tensor:
        width, states = self._store.execute("SELECT width, states FROM texts WHERE key = ?", [key]).fetchone()
        states_LD: Tensor = torch.frombuffer(bytearray(states), dtype=torch.float16).view(-1, width)
        return states_LD.float()

    def put(self, keys: Sequence[bytes], values: Sequence[Tensor]) -> None:
        rows = [(key, value.shape[1], value.numpy().tobytes()) for key, value in zip(keys, values, strict=True)]
        with self._store:
            self._store.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", rows)


def _terms(text: str) -> list[str]:
    """The words of a text, and pairs of neighbours of those that are single characters."""
    words = words_of(text)
    pairs = [one + other for one, other in pairwise(words) if UNSPACED.match(one) and UNSPACED.match(other)]
    return words + pairs


def _pieces(word: str) -> list[str]:
    return [word] if len(word) <= 4 else [word, *(word[at : at + 4] for at in range(0, len(word), 4))]


def _unit(vectors: Tensor) -> Tensor:
    """At length √P, so that elements are about 1; 0 stays 0."""
    return F.normalize(vectors, dim=-1) * math.sqrt(vectors.shape[-1])


def padded(tokens: Sequence[Sequence[int]], limit: int) -> Tensor:
    """Rows of at most `limit` numbers, int32; 0 behind the last of each."""
    out_NL = torch.zeros(len(tokens), limit, dtype=torch.int32)
    for place, row in enumerate(tokens):
        out_NL[place, : len(row)] = torch.tensor(row[:limit], dtype=torch.int32)
    return out_NL


TextEncoder = Lsa | Hashed | Pretrained
"""A fitted encoder.

encode: the same text gives the same numbers in any company (of a pretrained model, to about 1e-3); `cache` is a file in which
slow encoders remember texts. words: the tokens of a text, as people would read them, in the order of `tokens_NL`. state:
tensors and plain values that `restore` makes the encoder from. contextual: whether each token of each text has a state of its
own, so that `states_WP` grows with the texts.
"""
ENCODERS: dict[str, type[TextEncoder]] = {"lsa": Lsa, "tokens": Hashed, "minilm": Pretrained}

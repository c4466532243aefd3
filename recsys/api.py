"""The public names: a recommender that answers as the command and the online API do, and the report that judges one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from features.dataset import Dataset
from recsys.config import Recipe
from recsys.errors import RequestError
from serving import explain
from serving.engine import Recommender as Engine
from serving.evaluation.given import GivenLists
from serving.evaluation.protocol import ProtocolSettings
from serving.evaluation.report import Report, make_report, settle
from serving.live import source_of


def load(path_or_uri: str | Path, *, tracking: str = "") -> Recommender:
    """Load a run or a bundle: by its directory, or by models:/NAME@ALIAS or models:/NAME/VERSION.

    `tracking` is the MLflow store of the latter (default: MLFLOW_TRACKING_URI, else mlflow.db in the working directory).
    Raises BundleError: there is none, or it is not whole. SetupError: MLflow has no such version, or does not answer.

    >>> recsys.load("bundles/shop")
    <Recommender of bundle ...>
    """
    _, path = source_of(str(path_or_uri), tracking).current()
    return Recommender(Engine.load(path))


class Recommender:
    """A loaded run or bundle; safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __repr__(self) -> str:
        kind = {"model": "run"}.get(self._engine.manifest["kind"], "bundle")
        return f"<Recommender of {kind} {self._engine.id}>"

    def recommend(
        self,
        history: Sequence[int | str],
        k: int = 10,
        *,
        times: Sequence[int] | None = None,
        now: int | None = None,
        filter_seen: bool = True,
        where: Mapping[str, Any] | None = None,
        deny: Sequence[int | str] = (),
        allow: Sequence[int | str] | None = None,
        diversity: float | None = None,
        popularity: float | None = None,
        probabilities: bool = False,
        ignore_unknown: bool = False,
    ) -> dict[str, Any]:
        """The k best items for one history, best first, as `recsys recommend --json` and POST /v1/recommend name them.

        `history` holds ids or titles, oldest first; `times` are the seconds since 1970 of each event, `now` the one of the
        request: later events are left out. `where` holds conditions that items must meet, `deny` ids that are left out, `allow`
        the only ids that may come. `diversity` is from 0 to 1, `popularity` what is taken from a score for each factor e of
        training events (default of both: the bundle's). `probabilities` adds to each item how probable it is the next one.
        Returns bundle, source, unknown and items: rank (from 1), item_id, title and score, comparable within a list alone.
        Raises RequestError: an item that is none, unless `ignore_unknown`; times that are missing, descend, or are not one an
        event; a condition that cannot be.

        >>> recommender = recsys.load("bundles/shop")
        >>> answer = recommender.recommend([7, 14, 21], k=3)
        >>> [item["rank"] for item in answer["items"]]
        [1, 2, 3]
        >>> cheap = recommender.recommend([7, 14, 21], k=3, where={"price": {"max": 2}}, deny=[28])
        >>> import polars as pl
        >>> pl.DataFrame(cheap["items"]).columns
        ['rank', 'item_id', 'title', 'score']
        """
        return self._engine.answer(
            _several(history),
            k,
            times=times,
            now=now,
            filter_seen=filter_seen,
            deny=deny,
            allow=allow,
            where=where,
            diversity=diversity,
            popularity=popularity,
            probabilities=probabilities,
            ignore_unknown=ignore_unknown,
        )

    def explain(
        self,
        history: Sequence[int | str],
        item: int | str | None = None,
        *,
        times: Sequence[int] | None = None,
        now: int | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """What carried an item (default: the first that is recommended), as `recsys explain --json` says it.

        History, times and now are as in `recommend`; the seed draws the groups of events by which it is measured whether the
        explanation is true. Returns bundle, item, events (each with its attention, together 1, and its drop: how far the score
        falls without it), faithfulness (rank correlations) and verdict, one sentence.
        Raises RequestError: an item that is none or of which the model knows nothing; as `recommend`.

        >>> told = recsys.load("bundles/shop").explain([7, 14, 21], item=28)
        >>> [event["item_id"] for event in told["events"]]
        [7, 14, 21]
        >>> round(sum(event["attention"] for event in told["events"]), 6)
        1.0
        """
        generator = torch.Generator().manual_seed(seed)
        return explain.explain(self._engine, _several(history), generator, item=item, times=times, now=now).as_dict()

    def similar(
        self,
        item: int | str,
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        deny: Sequence[int | str] = (),
        allow: Sequence[int | str] | None = None,
    ) -> dict[str, Any]:
        """The k items most like one, by id or title, nearest first, as POST /v1/similar names them.

        Filters are as in `recommend`. Returns bundle, item_id, title and items: rank, item_id, title and score, the cosine of
        their vectors. Raises RequestError: an item that is none or of which the model knows nothing; as `recommend`.

        >>> near = recsys.load("bundles/shop").similar(7, k=5)
        >>> (near["item_id"], len(near["items"]), 7 in [item["item_id"] for item in near["items"]])
        (7, 5, False)
        """
        engine = self._engine
        row = engine.catalogue.resolve(item)
        found = engine.similar(row, k, *engine.catalogue.denied_and_allowed(deny, allow), where)
        about = {"item_id": engine.catalogue.item_id(row), "title": engine.catalogue.title(row)}
        return {"bundle": engine.id, **about, "items": engine.catalogue.places(found)}


def evaluate(
    subject: Recommender | str | Path,
    dataset: str | Path,
    *,
    protocol: str | Mapping[str, Any] = "",
    despite_leaks: bool = False,
    seed: int = 0,
) -> Report:
    """Judge a run, a bundle, or lists of any program, beside baselines, with intervals: the report of `recsys evaluate`.

    `subject` is a Recommender, what `load` takes, or a Parquet file of user_id, item_id and rank (from 1); `dataset` is the
    directory that `recsys features` made. `protocol` is a name, P1 to P5, or settings in the place of the recipe's [protocol].
    The seed draws the users of the intervals. Nothing is written, and nothing recorded in MLflow: `Report.write(path)` makes a
    page, figures and tables; `manifest` holds what `recsys evaluate --json` prints, `users` and `lists` are tables.
    Raises LeakError: something is known too early, unless `despite_leaks`. RecipeError: a setting that is none. DataError: no
    such data set, or lists of others. RequestError: a protocol that the data set does not fit.

    >>> report = recsys.evaluate("bundles/shop", "datasets/shop", protocol={"split": "validation"})
    >>> report.manifest["verdict"]
    '... NDCG@10 ...'
    >>> sorted(report.manifest["figures"]["model"]["recall@10"])
    ['high', 'low', 'mean']
    """
    data = Dataset.open(Path(dataset))
    judged: Engine | GivenLists
    if isinstance(subject, Recommender):
        judged, name = subject._engine, ""  # the name of its recipe
    elif Path(subject).is_file():
        judged, name = GivenLists(Path(subject), data), Path(subject).stem
    else:
        judged, name = load(subject)._engine, Path(subject).stem
    recipe = Recipe("", judged.manifest.get("recipe", {}))
    given = {"name": protocol} if isinstance(protocol, str) else protocol
    if given != {"name": ""}:
        recipe = recipe.but(ProtocolSettings, given)
    chosen, checks = settle(judged, data, recipe, despite_leaks)
    return make_report(judged, data, chosen, name=name, seed=seed, checks=checks)


def _several(history: Sequence[int | str]) -> Sequence[int | str]:
    """The history. Raises RequestError: it is one text, which would be read letter by letter."""
    if isinstance(history, str):
        raise RequestError(f"history is the text {history!r}; give a list of ids or titles")
    return history

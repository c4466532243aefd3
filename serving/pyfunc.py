"""A bundle as a model of MLflow's pyfunc flavour: one request a row, for MLflow's scoring server, its batch jobs and Spark.

Nothing is pickled: the file MLmodel of a bundle names this module, which reads the bundle as the online API does. Neither needs
MLflow here. MLflow checks what comes against the signature in MLmodel, and takes the type of a Spark column from it.
"""

from __future__ import annotations

import json
import math
import numbers
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys.errors import RequestError
from serving.engine import Recommender
from serving.live import load

MLMODEL = "MLmodel"
"""File that MLflow looks for."""
PARAMS: dict[str, tuple[str, Any]] = {
    "k": ("long", 10),
    "filter_seen": ("boolean", True),
    "where": ("string", ""),
    "deny": ("ids", []),
    "allow": ("ids", []),
    "diversity": ("double", None),
    "popularity": ("double", None),
    "ignore_unknown": ("boolean", False),
}
"""Parameters of `predict`, for all rows: MLflow's type and the default."""


class Predictor:
    """What MLflow asks."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender

    def predict(self, frame: Any, params: Mapping[str, Any] | None = None) -> Any:
        """A list for each row, as the online API answers: a DataFrame with the lists `item_ids`, best first, and `scores`.

        `frame` is a pandas DataFrame with a column `history`, lists of item ids, oldest first; `times`, the seconds since 1970
        of each event, and `now`, that of the request, where the model reads them. `params` are PARAMS; `where` holds conditions
        as JSON text, an empty `allow` allows all. Raises RequestError: no such column, a cell that is no such list, an unknown
        item unless `ignore_unknown`; the row is named.
        """
        columns = [*map(str, getattr(frame, "columns", ()))]
        if "history" not in columns:
            found = f"found {', '.join(columns) or 'no columns'}"
            raise RequestError(f"no column history, {found}; give a DataFrame with a list of item ids in each row")
        asked = _terms(params or {})
        cells = {name: frame[name].tolist() if name in columns else [None] * len(frame) for name in ("history", "times", "now")}
        answers = []
        for row, (history, times, now) in enumerate(zip(*cells.values(), strict=True)):
            try:
                items = self._items(history, times, now, asked)
            except RequestError as error:
                raise RequestError(f"row {row}: {error}") from None
            answers.append([[item["item_id"] for item in items], [item["score"] for item in items]])
        item_ids, scores = ([answer[part] for answer in answers] for part in (0, 1))
        return type(frame)({"item_ids": item_ids, "scores": scores}, index=frame.index)

    def _items(self, history: Any, times: Any, now: Any, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        ids = _listed("history", history, (numbers.Integral, str), "item ids, whole numbers or texts")
        at = None if _missing(times) else _listed("times", times, (numbers.Integral,), "seconds since 1970")
        second = None if _missing(now) else int(now)
        answer = self.recommender.answer(ids, times=at, now=second, find=self.recommender.catalogue.by_id, **asked)
        items: list[dict[str, Any]] = answer["items"]
        return items


def _load_pyfunc(path: str) -> Predictor:
    """What MLflow calls with the bundle's directory. Raises BundleError: as `serving.live.load`."""
    return Predictor(load(Path(path)))


def write_mlmodel(whole: bool, path: Path) -> None:
    """Write MLmodel, which names this module and the types of columns; `whole` says whether item ids are numbers.

    The same bytes each time, but for the version of Python, which MLflow asks for. JSON is YAML.
    """
    kind = "long" if whole else "string"
    inputs = [_column("history", kind), {**_column("times", "long"), "required": False}]
    inputs.append({"name": "now", "type": "long", "required": False})
    params = [
        {"name": name, "type": kind, "default": default, "shape": [-1]}
        if told == "ids"
        else {"name": name, "type": told, "default": default, "shape": None}
        for name, (told, default) in PARAMS.items()
    ]
    signature = {"inputs": inputs, "outputs": [_column("item_ids", kind), _column("scores", "float")], "params": params}
    python = ".".join(map(str, sys.version_info[:2]))
    model = {
        "flavors": {"python_function": {"loader_module": __name__, "python_version": python}},
        "signature": {part: json.dumps(columns) for part, columns in signature.items()},
    }
    path.write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")


def _column(name: str, kind: str) -> dict[str, Any]:
    """A column of lists."""
    return {"name": name, "type": "array", "items": {"type": kind}, "required": True}


def _terms(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as `Recommender.answer` takes them. Raises RequestError: an unknown one, or `where` is no JSON object."""
    strange = [name for name in params if name not in PARAMS]
    if strange:
        raise RequestError(f"params: {strange[0]!r} is none; give {', '.join(PARAMS)}")
    asked = {name: params.get(name, default) for name, (_, default) in PARAMS.items()}
    try:
        where = json.loads(asked["where"] or "{}")
    except (ValueError, TypeError):
        where = None
    if not isinstance(where, dict):
        told = reprlib.repr(asked["where"])
        raise RequestError(f'params: where is {told}; give conditions as a JSON object: {{"in_stock": true}}')
    return {**asked, "where": where, "allow": asked["allow"] or None}


def _listed(name: str, cell: Any, kinds: tuple[type, ...], what: str) -> Sequence[Any]:
    """A cell as a list. Raises RequestError: it is none, or holds something else."""
    values = cell.tolist() if hasattr(cell, "tolist") else cell  # Arrow and Spark give arrays of numpy
    if not isinstance(values, list | tuple):
        raise RequestError(f"{name} is {reprlib.repr(values)}; give a list of {what}")
    for value in values:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise RequestError(f"{name} holds {reprlib.repr(value)}; give {what}")
    return values


def _missing(cell: Any) -> bool:
    """Whether pandas has no value there."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))

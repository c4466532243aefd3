"""Lists that another program made, or an earlier night: read from a table, and judged as those of a model are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from recsys.batch import PADDING
from recsys.bundle import sha256
from recsys.errors import DataError
from serving.catalogue import ITEMS, Catalogue
from serving.lists import Lists

if TYPE_CHECKING:
    import polars as pl

    from features.dataset import Dataset

COLUMNS = ("user_id", "item_id", "rank")
DEEPEST = 1000
"""Places of a list that are read; no metric looks further."""


class GivenLists:
    """One list for each user of a data set, empty for a user without one."""

    reads_now = False
    manifest: ClassVar[dict[str, Any]] = {}
    """Nothing is known of what made them."""

    def __init__(self, path: Path, dataset: Dataset) -> None:
        """Read Parquet of user_id, item_id, rank (from 1) and, where it is there, score; ids may be text.

        Raises DataError: no such table, a user or an item that the data set does not know, or a list with two items at one
        rank or an item twice.
        """
        import polars as pl

        self.catalogue, self.learnt = Catalogue(dataset.path / ITEMS), int(dataset.manifest["warm_items"])
        table = self._read(path)
        known = dataset.user_ids.cast(pl.String)
        users = table["user_id"].cast(pl.String).replace_strict(known, range(len(known)), default=None, return_dtype=pl.Int64)
        rows = self.catalogue.rows_of(table["item_id"])
        for name, found in {"user": users, "item": rows}.items():
            strange = table.filter(found.is_null())[f"{name}_id"].unique(maintain_order=True)
            if len(strange):
                raise DataError(
                    f"{path}: {len(strange):,} {name}s are not in the data set, {strange[0]!r} first; give its lists"
                )
        ranks_N = torch.tensor(table["rank"].to_numpy()).long()
        self.rows_UK = torch.full((len(dataset.user_ids), int(ranks_N.max()) if len(ranks_N) else 1), PADDING)
        self.scores_UK = torch.full(self.rows_UK.shape, -torch.inf)
        owners_N, places_N = torch.tensor(users.to_numpy()).long(), ranks_N - 1
        self.rows_UK[owners_N, places_N] = torch.tensor(rows.to_numpy()).long()
        self.scores_UK[owners_N, places_N] = torch.tensor(table["score"].to_numpy()).float()
        self.id = sha256(path)[:16]

    def of(self, users_B: Tensor, k: int) -> Lists:
        """The first k places of these users' lists."""
        tables = ((self.rows_UK, PADDING), (self.scores_UK, -torch.inf))
        rows_BK, scores_BK = (pad(table[users_B], (0, k - table.shape[1]), value=none) for table, none in tables)
        return Lists(rows_BK, scores_BK, torch.zeros(len(users_B), dtype=torch.bool))

    @staticmethod
    def _read(path: Path) -> pl.DataFrame:
        import polars as pl

        try:
            table = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(
                f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); give a table of lists"
            ) from None
        missing = [name for name in COLUMNS if name not in table.columns]
        if missing:
            raise DataError(f"{path}: has no column {', '.join(missing)}; lists have {', '.join(COLUMNS)}")
        rank = table["rank"]
        if not rank.dtype.is_integer() or rank.null_count() or not (rank >= 1).all():
            raise DataError(f"{path}: rank must be whole numbers from 1; number each list's items from the best on")
        for name in COLUMNS[:2]:
            if table[name].dtype.is_nested() or table[name].null_count():
                raise DataError(f"{path}: {name} must be a number or text in every row; mend the table")
        for pair, what in ((["user_id", "rank"], "two items at one rank"), (["user_id", "item_id"], "an item twice")):
            twice = table.filter(table.select(pair).is_duplicated())
            if len(twice):
                raise DataError(f"{path}: the list of user {twice['user_id'][0]!r} has {what}; mend the table")
        table = table.filter(pl.col("rank") <= DEEPEST)
        if "score" not in table.columns:
            return table.with_columns(score=-pl.col("rank").cast(pl.Float32))
        if not table["score"].dtype.is_numeric():
            raise DataError(f"{path}: score is {table['score'].dtype}, must be numbers; mend the table, or leave it out")
        return table

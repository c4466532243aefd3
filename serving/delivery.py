"""Nightly lists where other programs read them: in Redis or Valkey, or as a table of PostgreSQL.

The table has user_id, item_id, rank (from 1), score, and because where a night names reasons; its key is user and rank. It is
made beside the old one and takes its name in one transaction. Who may read the old one may read the new one; further indexes
and triggers go with the old one. Its comment names the night. To take a user out is the owner's to do: DELETE.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from recsys.errors import DataError, RecsysError, SetupError, StoreError
from recsys.progress import Count
from serving import redis_lists
from serving.nights import Night
from serving.redis_lists import parameter
from serving.stores import REDIS, hidden

if TYPE_CHECKING:
    import polars as pl
    import psycopg

TABLE = "recommendations"
"""Of PostgreSQL, unless the URL says otherwise."""
ROWS = 2**17
"""Rows that are sent to PostgreSQL at once."""
LONGEST = 63
"""Bytes of a name of PostgreSQL."""
CONNECT_SECONDS = 10
LOCK_MILLISECONDS = 200
"""How long the swap waits for those who read the old table, and all who come after it wait for the swap."""
LOCK_TRIES, LOCK_PAUSE = 100, 0.5
"""How often the swap tries, and the seconds between, in which others read."""
ANEW = 5
"""How often a delivery begins anew because a user was erased meanwhile."""
COLUMNS = ["user_id", "item_id", "rank", "score"]

Delivery = Callable[[Night, str, Callable[[int], None]], dict[str, int]]


class _Changed(RecsysError):
    """The night is another than when the delivery began."""


def deliver(night: Night, url: str, progress: Count = lambda done, of: None) -> dict[str, int]:
    """Write all lists of a night where the URL says, and then let readers see them in one step.

    redis://HOST:PORT/NUMBER?ttl=SECONDS (also rediss, valkey, valkeys): keys that expire, by default after 3 days.
    postgresql://USER@HOST/DATABASE?table=SCHEMA.NAME: a table, by default `recommendations`.
    A delivery that fails or is killed leaves the lists that were there. If a user is erased from the night meanwhile, it begins
    anew. `progress` hears (users done, users in all). Returns users, those with a list, and rows.
    Raises SetupError: another kind of URL, or without its package; a table that is none of such lists. StoreError: the server
    says no. DataError: the night is no longer there, is too old, or holds what the server cannot.
    """
    delivery = delivery_to(url)

    def told(done: int) -> None:
        progress(done, night.manifest["users"])

    for _ in range(ANEW):
        try:
            return delivery(night, url, told)
        except _Changed:
            night = Night.open(night.path)
    raise DataError(f"{night.path}: users were erased {ANEW} times while the lists were delivered; deliver again")


def delivery_to(url: str) -> Delivery:
    """What delivers to such a URL. Raises SetupError: nothing does."""
    kind = url.partition("://")[0]
    if kind not in DELIVERIES:
        raise SetupError(f"{hidden(url)}: lists cannot be delivered there; give a URL that begins with {', '.join(DELIVERIES)}")
    return DELIVERIES[kind]


def _frames(night: Night) -> Iterator[pl.DataFrame]:
    """The lists of one shard after the other. Raises DataError: they are not there. _Changed: somebody was erased."""
    import polars as pl

    for shard in range(night.shards):
        try:
            yield pl.read_parquet(night.lists(shard))
        except (pl.exceptions.PolarsError, OSError):
            raise DataError(f"{night.path}: shard {shard} is no longer there, or unreadable; deliver the live night") from None
    if Night.open(night.path).id != night.id:
        raise _Changed


def _to_redis(night: Night, url: str, progress: Callable[[int], None]) -> dict[str, int]:
    return redis_lists.write(night, url, _frames(night), progress)


def _to_postgresql(night: Night, url: str, progress: Callable[[int], None]) -> dict[str, int]:
    try:
        import psycopg
    except ImportError as error:
        found = f"psycopg does not load ({error})"
        raise SetupError(f"{hidden(url)}: {found}; pip install attention-recommender[postgresql]") from None
    shown = hidden(url)
    try:
        plain, table = parameter(url, "table", TABLE)
        known = psycopg.conninfo.conninfo_to_dict(plain)
    except (psycopg.Error, ValueError):  # whose words may hold the password
        raise SetupError(f"{shown}: is no URL; give postgresql://USER@HOST:PORT/DATABASE") from None
    place = table.split(".")
    if len(place) > 2 or not all(0 < len(part.encode()) <= LONGEST and "\0" not in part for part in place):
        raise SetupError(f"{shown}: table is {table!r}; give NAME or SCHEMA.NAME, each of 1 to {LONGEST} bytes")
    with _errors(shown, str(known.get("password") or "")):
        options: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "application_name": "recsys"}
        with psycopg.connect(plain, **{name: value for name, value in options.items() if name not in known}) as connection:
            connection.execute("SET client_encoding = 'UTF8'")
            return _Table(connection, shown, place).written(night, progress)


@contextmanager
def _errors(shown: str, password: str) -> Iterator[None]:
    """What the server says against it, as StoreError; without its details, which may name users."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        said = " ".join((error.diag.message_primary or str(error)).split())
        said = said.replace(password, "***") if password else said
        remedy = "see that the server runs and lets this user make tables there; the old lists stay"
        raise StoreError(f"{shown}: {said or type(error).__name__}; {remedy}") from None


class _Table:
    """A table of lists, by one connection whose transaction holds all that is done; a kill leaves nothing of it."""

    def __init__(self, connection: psycopg.Connection[Any], shown: str, place: list[str]) -> None:
        from psycopg import sql

        self.connection, self.shown, self.name = connection, shown, ".".join(place)
        schema = place[0] if len(place) == 2 else self._one("SELECT current_schema()")[0]
        if schema is None:
            raise SetupError(f"{shown}: there is no schema for {self.name}; give table=SCHEMA.NAME")
        self.schema, self.table = schema, place[-1]
        self.place = sql.Identifier(schema, place[-1])

    def written(self, night: Night, progress: Callable[[int], None]) -> dict[str, int]:
        """Make the new table and give it the name; returns users and rows."""
        from psycopg import sql

        taken = "SELECT pg_try_advisory_xact_lock(hashtext('recsys'), hashtext(%s))"
        if not self._one(taken, f"{self.schema}.{self.table}")[0]:
            raise StoreError(f"{self.shown}: another delivery writes {self.name}; wait for its end")
        frames = _frames(night)
        first = next(frames)
        columns = _columns(first)
        self._check(columns)
        fresh = sql.Identifier(self.schema, f"recsys_next_{night.id}")
        counts = self._filled(fresh, columns, chain([first], frames), progress)
        self._run("ALTER TABLE {} ADD PRIMARY KEY (user_id, rank)", fresh)
        now = datetime.fromtimestamp(night.manifest["terms"]["now"], UTC).isoformat()
        said = f"recsys: night {night.id}, bundle {night.manifest['bundle']}, asked for at {now}"
        self._run("COMMENT ON TABLE {} IS {}", fresh, sql.Literal(said))
        self._run("ANALYZE {}", fresh)
        if self._old() is not None:
            self._lock()
            self._grant(fresh)
            self._drop()
        self._run("ALTER TABLE {} RENAME TO {}", fresh, sql.Identifier(self.table))
        self.connection.commit()
        return counts

    def _check(self, columns: dict[str, str]) -> None:
        """Raises SetupError: what has the name is no table of lists, or its columns are not of these types."""
        old = self._old()
        if old is None:
            return
        query = """SELECT attname, upper(format_type(atttypid, atttypmod)) FROM pg_attribute
            WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum"""
        found = dict(self.connection.execute(query, [old[0]]).fetchall())
        if old[1] != "r" or [*found][: len(COLUMNS)] != COLUMNS:
            raise SetupError(
                f"{self.shown}: {self.name} is there and no table of lists, so it is not replaced; give another name"
            )
        for name, kind in columns.items():
            if found.get(name, kind) != kind:
                others = f"{self.name} has {name} as {found[name]}, and these lists as {kind}"
                raise SetupError(f"{self.shown}: {others}, so it is not replaced; give another name, or drop that table")

    def _drop(self) -> None:
        """Raises StoreError: something depends on the old table."""
        import psycopg

        try:
            self._run("DROP TABLE {}", self.place)
        except psycopg.errors.DependentObjectsStillExist as error:
            found = ", ".join((error.diag.message_detail or f"something depends on {self.name}").splitlines())
            remedy = "drop that, deliver again, and query the table itself, or in a function, which looks for it by its name"
            raise StoreError(f"{self.shown}: {found}, so the old lists stay; {remedy}") from None

    def _old(self) -> tuple[int, str] | None:
        """Number and kind of what has the name now."""
        query = "SELECT c.oid, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
        found: tuple[int, str] | None = self.connection.execute(
            f"{query} WHERE nspname = %s AND relname = %s", [self.schema, self.table]
        ).fetchone()
        return found

    def _filled(
        self, fresh: Any, columns: dict[str, str], frames: Iterator[pl.DataFrame], progress: Callable[[int], None]
    ) -> dict[str, int]:
        """Make the table with all lists. Its rows are frozen, so that readers whose transaction is older see them too."""
        import polars as pl
        from psycopg import sql

        counts = {"users": 0, "rows": 0}
        lines = [
            sql.SQL("{} " + kind + " NOT NULL" * (name in COLUMNS)).format(sql.Identifier(name))
            for name, kind in columns.items()
        ]
        self._run("CREATE TABLE {} ({})", fresh, sql.SQL(", ").join(lines))
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        command = sql.SQL("COPY {} ({}) FROM STDIN WITH (FORMAT csv, FREEZE)").format(fresh, names)
        with self.connection.cursor() as cursor, cursor.copy(command) as copy:
            for frame in frames:
                texts = frame.select(pl.col(pl.String).str.contains("\0", literal=True).any())
                if any(texts.row(0) if texts.width else ()):
                    raise DataError(
                        "an id in the lists holds a NUL, which PostgreSQL has not; give such items and users other ids"
                    )
                for start in range(0, len(frame), ROWS):
                    part = frame.slice(start, ROWS)
                    copy.write(part.write_csv(include_header=False, quote_style="non_numeric").encode())
                counts["users"] += frame["user_id"].n_unique()
                counts["rows"] += len(frame)
                progress(counts["users"])
        return counts

    def _lock(self) -> None:
        """Wait until nobody reads the old table, in short turns between which others read. Raises StoreError: in vain."""
        import psycopg

        self._run(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}")
        for _ in range(LOCK_TRIES):
            try:
                with self.connection.transaction():  # a savepoint
                    self._run("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", self.place)
                return
            except psycopg.errors.LockNotAvailable:
                time.sleep(LOCK_PAUSE)
        found = f"someone has held {self.name} for {LOCK_TRIES} tries, so the old lists stay"
        raise StoreError(f"{self.shown}: {found}; end that transaction (pg_stat_activity names it) and deliver again")

    def _grant(self, fresh: Any) -> None:
        """Give the new table the owner and the privileges of the old one, and no others."""
        from psycopg import sql

        old = self._old()
        assert old is not None
        made = self._one("SELECT oid FROM pg_class WHERE oid = to_regclass(%s)", fresh.as_string(self.connection))[0]
        owner, same = self._one(
            "SELECT pg_get_userbyid(relowner), relowner = current_user::regrole FROM pg_class WHERE oid = %s", old[0]
        )
        held = """SELECT grantee = 0, pg_get_userbyid(grantee), privilege_type, is_grantable, attname
            FROM (
                SELECT relacl AS acl, relowner, NULL AS attname FROM pg_class WHERE oid = %(table)s
                UNION ALL SELECT attacl, relowner, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
                WHERE attrelid = %(table)s
            ) AS held, aclexplode(acl) WHERE grantee <> relowner"""
        rights = self.connection.execute(held, {"table": old[0]}).fetchall()
        for everybody, role, *_ in self.connection.execute(held, {"table": made}).fetchall():
            self._run("REVOKE ALL ON {} FROM {}", fresh, _role(everybody, role))
        for everybody, role, right, grantable, column in rights:
            named = sql.SQL(" ({})").format(sql.Identifier(column)) if column else sql.SQL("")
            option = sql.SQL(" WITH GRANT OPTION" if grantable else "")
            self._run("GRANT {}{} ON {} TO {}{}", sql.SQL(right), named, fresh, _role(everybody, role), option)
        if not same:
            self._run("ALTER TABLE {} OWNER TO {}", fresh, sql.Identifier(owner))

    def _one(self, query: str, *words: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] | None = self.connection.execute(query, words).fetchone()
        assert found is not None
        return found

    def _run(self, query: str, *parts: Any) -> None:
        from psycopg import sql

        self.connection.execute(sql.SQL(query).format(*parts))


def _columns(frame: pl.DataFrame) -> dict[str, str]:
    """Names and types of the table's columns."""
    kinds = {"rank": "INTEGER", "score": "REAL"}
    return {name: kinds.get(name, "BIGINT" if kind.is_integer() else "TEXT") for name, kind in frame.schema.items()}


def _role(everybody: bool, name: str) -> Any:
    from psycopg import sql

    return sql.SQL("PUBLIC") if everybody else sql.Identifier(name)


DELIVERIES: dict[str, Delivery] = {
    **dict.fromkeys(REDIS, _to_redis),
    **dict.fromkeys(("postgresql", "postgres"), _to_postgresql),
}
"""By how their URL begins."""

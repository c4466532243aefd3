"""What processes beside a test do to a store of histories or to nightly lists; light, for each imports it anew."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.errors import StoreError
from serving.history import Event, open_store

if TYPE_CHECKING:
    from serving.nights import Night


def visits(*times: int, user: str = "visit") -> list[Event]:
    """Events whose item and id follow from their time."""
    return [Event(1000 + time, time, f"{user} {time}") for time in times]


def work_alone(url: str, part: int, started: Barrier) -> None:
    """A process that writes among others, and erases somebody now and then."""
    started.wait()
    store = open_store(url, 1000)
    for time in range(part, 400, 2):
        assert store.append("ada", visits(time)) == 1
        store.append(f"user {part}", visits(time))
        if time % 67 == 0:
            assert store.erase(f"user {part}")
    store.close()


def load_much(url: str) -> None:
    store = open_store(url)
    store.load((f"user {user}", visits(*range(97))) for user in range(997))
    store.close()


def fill_the_disk(url: str) -> None:
    """Where no file may be longer than 1 MB, until that is so no more."""
    import resource  # not everywhere

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = open_store(url)
    store.append("ada", visits(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    try:
        for start in range(0, 10_000, 100):
            store.load((f"user {user}", visits(*range(97))) for user in range(start, start + 100))
        os._exit(3)
    except StoreError:
        assert store.read("ada") == visits(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert store.append("grace", visits(1)) == 1
    store.close()


def write_night(
    folder: Path,
    lists: Mapping[Any, Sequence[tuple[Any, float]]],
    shards: int = 3,
    keep: int = 2,
    because: Mapping[Any, Sequence[Any]] | None = None,
    **manifest: Any,
) -> Night:
    """Make a night of these lists live, best item first, in a folder of nights; `because`: each place's reason."""
    import polars as pl

    from recsys.bundle import entry
    from serving.nights import Nights, lists_file, shard_of, users_file
    from serving.tables import write_table

    nights, files, parts = Nights(folder), {}, []
    ids = [item for listed in lists.values() for item, _ in listed]
    user, item = (pl.String() if any(isinstance(one, str) for one in many) else pl.Int64() for many in (lists, ids))
    columns = {"user_id": user, "item_id": item, "rank": pl.Int32(), "score": pl.Float32()}
    columns |= {} if because is None else {"because": item}
    k = max((len(listed) for listed in lists.values()), default=1)
    with nights.making():
        nights.work.mkdir()
        for shard in range(shards):
            mine = {user_id: lists[user_id] for user_id in sorted(lists) if shard_of(user_id, shards) == shard}
            rows = [
                (user_id, item_id, rank, score, *(() if because is None else [because[user_id][rank - 1]]))
                for user_id, listed in mine.items()
                for rank, (item_id, score) in enumerate(listed, 1)
            ]
            users = pl.DataFrame({"user_id": pl.Series(list(mine), dtype=user)}).with_columns(
                history=pl.lit(7, pl.UInt64), source=pl.lit(0, pl.UInt8)
            )
            table = pl.DataFrame(rows, schema=columns, orient="row")
            for name, frame in ((users_file(shard), users), (lists_file(shard), table)):
                write_table(frame, nights.work / name, {"bundle": "made-up"})
                files[name] = entry(nights.work / name)
            short = sum(len(listed) < k for listed in mine.values())
            parts.append({"users": len(mine), "rows": len(table), "underfilled": short, "popular": 0})
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        said = {"bundle": "made-up", "terms": {"k": k, "now": 1_700_000_000}, "shards": shards, **total, "parts": parts}
        said |= {"listed": sum(map(bool, lists.values())), "clock": {"begun": datetime.now(UTC).isoformat()}}
        return nights.publish(files, said | manifest, keep)


def lists_of(users: Sequence[Any], items: Sequence[Any], k: int) -> dict[Any, list[tuple[Any, float]]]:
    """For each user k different items, by the user's place, with scores that float32 has."""
    return {
        user: [(items[(7 * place + rank) % len(items)], -float(rank) / 8) for rank in range(k)]
        for place, user in enumerate(users)
    }


def erase(folder: Path, user_id: str) -> None:
    """Take a user out of the nights of a folder."""
    from serving.nights import Nights

    Nights(folder).erase(user_id)


def finish(folder: Path) -> None:
    """Make the sealed night of a folder live."""
    from serving.nights import Nights

    nights = Nights(folder)
    with nights.making():
        nights.finish(2)


def killed_at_each_step(folders: Sequence[Path], work: Callable[[Path], None], ends: Any) -> None:
    """Do the same in each folder, killed at a later change of a name each time; `ends` gets how each ended."""
    import shutil

    import serving.nights  # noqa: F401  # once, before the others are forked, which takes each of them seconds

    for last, folder in enumerate(folders):
        child = os.fork()
        if child == 0:
            changes = iter(range(last))

            def counted(act: Any, changes: Any = changes) -> Any:
                def change(*words: Any, **options: Any) -> Any:
                    if next(changes, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return act(*words, **options)

                return change

            for name in ("rename", "replace", "link", "symlink", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            shutil.rmtree = counted(shutil.rmtree)
            work(folder)
            os._exit(0)
        ends.put(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def deliver_until_killed(folder: Path, url: str, last: int) -> None:
    """Deliver the live night, and be killed when so many users, or more, are done."""
    from serving.delivery import deliver
    from serving.nights import Night

    def tell(done: int, of: int) -> None:
        if done >= last:
            os.kill(os.getpid(), signal.SIGKILL)

    deliver(Night.open(folder), url, tell)

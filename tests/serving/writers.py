"""What processes beside a test do to a store of histories; light, for each imports it anew."""

from __future__ import annotations

import os
import signal
from multiprocessing.synchronize import Barrier

from recsys.errors import StoreError
from serving.history import Event, open_store


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

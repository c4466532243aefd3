"""The online API over a bundle, in this process: what its tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from serving.admission import OnlineSettings
from serving.app import Online
from serving.fallback import open_lists
from serving.history import open_store
from serving.keys import Keys
from serving.live import Arms, PathSource
from serving.service import Service
from serving.telemetry import Tracer


def made(
    bundle: Path,
    *,
    challenger: Path | None = None,
    store: str = "memory:",
    lists: Path | str | None = None,
    keys: Path | None = None,
    tracer: Tracer | None = None,
    addresses: dict[str, str] | None = None,
    clock: Any = None,
    page: Path | None = None,
    **settings: Any,
) -> Online:
    """The application; settings are those of OnlineSettings."""
    chosen = OnlineSettings(**settings)
    other = None if challenger is None else PathSource(challenger)
    services: list[Service] = []

    def tell(kind: str, detail: str) -> None:
        for service in services if kind == "swap" else ():
            service.swapped(detail.partition(":")[0])

    arms = Arms(PathSource(bundle), other, chosen.share, chosen.salt, tell)
    clocked = {} if clock is None else {"clock": clock}
    listed = None if lists is None else open_lists(str(lists))
    service = Service(arms, open_store(store, chosen.keep), chosen, lists=listed, addresses=addresses, **clocked)
    services.append(service)
    paged = {} if page is None else {"page": page}
    return Online(service, None if keys is None else Keys(keys), tracer, **paged)


@contextmanager
def client_of(online: Online) -> Iterator[TestClient]:
    """A client of the application while it runs; its store is closed afterwards."""
    with TestClient(online) as client:
        yield client
    online.service.store.close()


@contextmanager
def asked(bundle: Path, **options: Any) -> Iterator[TestClient]:
    """A client of `made`."""
    with client_of(made(bundle, **options)) as client:
        yield client

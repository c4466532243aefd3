"""A download is whole and checked, or it is not there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from features.download import ATTEMPTS, Published, fetch
from recsys.errors import DataError, SetupError
from tests.features.publisher import Publisher

BODY = bytes(range(251)) * 12_289  # 3 MB, several chunks


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.stop()


def offer(publisher: Publisher, body: bytes = BODY) -> Published:
    publisher.files["/some/data+set.bin"] = body
    return Published(f"{publisher.url}/some/data+set.bin", len(BODY), hashlib.sha256(BODY).hexdigest())


def test_a_file_is_fetched_once_and_read_from_the_cache_ever_after(publisher: Publisher, tmp_path: Path) -> None:
    file, reports = offer(publisher), []
    path = fetch(file, tmp_path / "new", lambda *report: reports.append(report))
    assert path == tmp_path / "new" / "data set.bin"
    assert path.read_bytes() == BODY
    assert reports[-1] == ("data set.bin", len(BODY), len(BODY))
    assert [done for _, done, _ in reports] == sorted({done for _, done, _ in reports})
    assert fetch(file, tmp_path / "new") == path
    assert len(publisher.requests) == 1
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["data set.bin"]


def test_a_wrong_checksum_names_both_and_leaves_what_was_there(publisher: Publisher, tmp_path: Path) -> None:
    other = bytes(len(BODY))
    file = offer(publisher, other)
    (tmp_path / "earlier.zip").write_bytes(b"valid")
    with pytest.raises(DataError, match=f"{hashlib.sha256(other).hexdigest()} found, {file.sha256} published"):
        fetch(file, tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["earlier.zip"]


def test_an_altered_cache_is_named_and_kept(publisher: Publisher, tmp_path: Path) -> None:
    file = offer(publisher)
    (tmp_path / file.name).write_bytes(BODY[::-1])
    with pytest.raises(DataError, match=f"found, {file.sha256} published; delete {re.escape(str(tmp_path / file.name))}"):
        fetch(file, tmp_path)
    assert (tmp_path / file.name).read_bytes() == BODY[::-1]
    assert publisher.requests == []


@pytest.mark.parametrize("size", [5, len(BODY) + 5])
def test_a_file_of_another_size_is_refused_before_it_is_read(publisher: Publisher, tmp_path: Path, size: int) -> None:
    file = offer(publisher, (BODY + BODY)[:size])
    with pytest.raises(DataError, match=f"{size:,} bytes offered, {len(BODY):,} published"):
        fetch(file, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_where_it_can(publisher: Publisher, tmp_path: Path, ranges: bool) -> None:
    file = offer(publisher)
    publisher.ranges, publisher.cuts = ranges, [1_700_021, 900_007]
    assert fetch(file, tmp_path, pause=0).read_bytes() == BODY
    held = [None, "bytes=1700021-", "bytes=2600028-"] if ranges else [None, "bytes=1700021-", "bytes=900007-"]
    assert publisher.requests == held


def test_a_transfer_that_breaks_every_time_leaves_nothing(publisher: Publisher, tmp_path: Path) -> None:
    file = offer(publisher)
    publisher.cuts = [101] * ATTEMPTS
    with pytest.raises(SetupError, match=rf"cannot download {re.escape(file.url)}: .* after 404 of 3,084,539 bytes"):
        fetch(file, tmp_path, pause=0)
    assert list(tmp_path.iterdir()) == []
    assert len(publisher.requests) == ATTEMPTS


def test_a_busy_publisher_is_asked_again_and_a_missing_file_is_not(publisher: Publisher, tmp_path: Path) -> None:
    file = offer(publisher)
    publisher.refusals = [503, 429]
    assert fetch(file, tmp_path, pause=0).read_bytes() == BODY
    assert len(publisher.requests) == 3
    missing = Published(f"{publisher.url}/gone.zip", 7, file.sha256)
    with pytest.raises(SetupError, match=r"gone\.zip: 404"):
        fetch(missing, tmp_path, pause=0)
    assert len(publisher.requests) == 4


def test_an_unreachable_publisher_is_named(publisher: Publisher, tmp_path: Path) -> None:
    file = offer(publisher)
    publisher.stop()
    with pytest.raises(SetupError, match=rf"cannot download {re.escape(file.url)}: .*refused.*name its folder"):
        fetch(file, tmp_path, pause=0)
    assert list(tmp_path.iterdir()) == []

"""Directories are published whole or not at all, and an altered one is never opened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys.bundle import FORMAT, MANIFEST, open_directory, publish, write_file
from recsys.errors import BundleError, DataError, RecsysError

FILES = {"weights": b"\x00\x01\x02\x03\x05\x08\x0d", "items": b"eleven words", "empty": b""}


def writers(files: dict[str, bytes] = FILES):
    return {name: lambda path, content=content: path.write_bytes(content) for name, content in files.items()}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return publish(tmp_path / "bundle", writers(), {"kind": "test", "titles": ["Amélie"]}).path


@pytest.fixture(params=["exchanged", "renamed"])
def system(request, monkeypatch) -> None:
    """Both ways of replacing a directory: Linux exchanges two names in one step, others rename twice."""
    if request.param == "renamed":
        monkeypatch.setattr("recsys.bundle._exchange", lambda one, other: False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_published_is_opened_again(tmp_path, published):
    opened = open_directory(published)
    assert (opened.manifest["kind"], opened.manifest["titles"]) == ("test", ["Amélie"])
    assert {name: (opened.path / name).read_bytes() for name in opened.manifest["files"]} == FILES
    assert list(tmp_path.iterdir()) == [published]


def test_publishing_returns_what_opening_reads(tmp_path):
    directory = publish(tmp_path / "bundle", writers(), {"kind": "test"})
    assert open_directory(directory.path) == directory


def test_publishing_makes_the_folders_above(tmp_path):
    assert publish(tmp_path / "a" / "b" / "bundle", writers(), {}).path.is_dir()


def test_everyone_may_read_what_was_published(published):
    assert published.stat().st_mode & 0o777 == 0o755


def test_the_hash_is_that_of_the_files_alone(tmp_path):
    one = publish(tmp_path / "one", writers(), {"created": "today"})
    same = publish(tmp_path / "same", writers(dict(reversed(FILES.items()))), {"created": "tomorrow"})
    other = publish(tmp_path / "other", writers(FILES | {"empty": b"0"}), {"created": "today"})
    assert one.manifest["hash"] == same.manifest["hash"] != other.manifest["hash"]


def test_a_name_given_to_the_manifest_and_an_error_given_to_the_reader_are_used(tmp_path):
    path = publish(tmp_path / "data", writers(), {}, name="dataset.json").path
    assert (path / "dataset.json").is_file()
    (path / "items").unlink()
    with pytest.raises(DataError, match=r"items: named in dataset\.json and missing"):
        open_directory(path, name="dataset.json", error=DataError)


@pytest.mark.parametrize("name", ["weights", "items"])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(published, name, place):
    content = bytearray((published / name).read_bytes())
    content[place] ^= 1
    (published / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: is not the file that was written"):
        open_directory(published)
    open_directory(published, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_found_and_named(published, verify):
    (published / "items").unlink()
    with pytest.raises(BundleError, match=r"items: named in manifest\.json and missing"):
        open_directory(published, verify=verify)


def test_a_file_altered_together_with_its_sha256_is_found(published):
    other = publish(published.with_name("other"), writers(FILES | {"items": b"twelve words"}), {})
    manifest = json.loads((published / MANIFEST).read_text())
    manifest["files"]["items"] = other.manifest["files"]["items"]
    (published / MANIFEST).write_text(json.dumps(manifest))
    (published / "items").write_bytes(b"twelve words")
    with pytest.raises(BundleError, match="its id differs"):
        open_directory(published)


@pytest.mark.parametrize("found", [0, FORMAT + 1, str(FORMAT), None])
def test_another_format_is_refused_with_both_named(published, found):
    manifest = json.loads((published / MANIFEST).read_text())
    (published / MANIFEST).write_text(json.dumps(manifest | {"format": found}))
    with pytest.raises(BundleError, match=f"format {found!r}, this version reads {FORMAT}; write it again"):
        open_directory(published)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"format": 1}', b'{"format": 1, "files": 7}'])
def test_what_is_no_manifest_is_refused(published, text):
    (published / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read as a manifest"):
        open_directory(published)


@pytest.mark.parametrize("place", ["nowhere", "empty", "bundle/items"])
def test_a_place_without_a_manifest_is_refused(tmp_path, published, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"no manifest\.json there"):
        open_directory(tmp_path / place)


def test_a_new_version_replaces_the_old_one_whole(tmp_path, published, system):
    publish(published, writers({"weights": b"new"}), {"kind": "newer"})
    assert open_directory(published).manifest["kind"] == "newer"
    assert contents(published).keys() == {"weights", MANIFEST}
    assert list(tmp_path.iterdir()) == [published]


@pytest.mark.parametrize("crash", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_in_a_writer_leaves_the_old_version_and_nothing_else(tmp_path, published, crash):
    before = contents(published)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise crash

    with pytest.raises(type(crash)):
        publish(published, {"weights": lambda path: path.write_bytes(b"new"), "items": fail}, {})
    assert contents(published) == before
    assert list(tmp_path.iterdir()) == [published]


def test_a_crash_before_there_was_anything_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        publish(tmp_path / "bundle", {"weights": lambda path: 1 / 0}, {})
    assert list(tmp_path.iterdir()) == []


ENDLESS = """
import itertools, sys
from pathlib import Path
from recsys.bundle import publish
for count in itertools.count():
    content = bytes([count % 251]) * 4099
    publish(Path(sys.argv[1]), {name: lambda path: path.write_bytes(content) for name in "ab"}, {"count": count})
    print(count, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2, which exchanges two names in one step")
@pytest.mark.parametrize("milliseconds", [3, 17, 31])
def test_a_process_killed_while_it_publishes_leaves_the_old_or_the_new_version_whole(tmp_path, milliseconds):
    path = tmp_path / "bundle"
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
    opened = open_directory(path)
    assert {(path / name).read_bytes() for name in "ab"} == {bytes([opened.manifest["count"] % 251]) * 4099}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_was_not_published_is_not_replaced(tmp_path, kind):
    path = tmp_path / "mine"
    if kind == "folder":
        path.mkdir()
    kept = path / "letter" if kind == "folder" else path
    kept.write_text("dear")
    with pytest.raises(RecsysError, match=r"holds no manifest\.json, so it is not replaced"):
        publish(path, writers(), {})
    assert kept.read_text() == "dear"
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_folder_is_taken(tmp_path, system):
    (tmp_path / "bundle").mkdir()
    assert open_directory(publish(tmp_path / "bundle", writers(), {}).path)
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecsysError, match=r"bundle: cannot be written \(.+\); give another place$"):
        publish(tmp_path / "file" / "bundle", writers(), {})


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "curve"
    write_file(path, b"long ago")
    write_file(path, b"now")
    assert contents(tmp_path) == {"curve": b"now"}


def test_whoever_serves_may_read_what_another_account_wrote(tmp_path):
    def private(path):
        path.touch(mode=0o600)

    publish(tmp_path / "bundle", {"weights": private}, {})
    for file in ("weights", MANIFEST):
        assert (tmp_path / "bundle" / file).stat().st_mode & 0o044 == 0o044

"""Keys of the online API."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from recsys.errors import SetupError
from serving import keys as module
from serving.keys import Keys, add, read, remove
from tests.serving.online import asked


def test_a_key_is_kept_as_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = add(file, "shop")
    assert len(key) >= 43
    assert key not in file.read_text()
    assert read(file) == {"shop": hashlib.sha256(key.encode()).hexdigest()}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = add(file, "app")
    assert other != key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = Keys(file)
    assert [found.name(word) for word in (key, other, key[:-1], "", "é" * 7)] == ["shop", "app", None, None, None]


def test_a_file_that_changes_is_read_again_and_one_that_is_gone_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = add(file, "shop")
    keys = Keys(file)
    new = add(file, "app")
    assert keys.name(new) == "app"
    remove(file, "shop")
    assert keys.name(key) is None
    assert keys.name(new) == "app"
    before = file.read_text()
    file.write_text("{")
    assert keys.name(new) is None
    file.write_text(before)
    os.utime(file, ns=(1, 1))
    assert keys.name(new) == "app"
    file.unlink()
    assert keys.name(new) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"keys": []}', '{"keys": {"a": "xyz"}}', '{"keys": {"a": "00"}}'])
def test_a_file_of_something_else_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    for work in (lambda: Keys(file), lambda: add(file, "x"), lambda: remove(file, "x")):
        with pytest.raises(SetupError, match="cannot be read as keys"):
            work()
    assert file.read_text() == content


def test_names_are_there_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add(file, "shop")
    with pytest.raises(SetupError, match="has a key 'shop' already"):
        add(file, "shop")
    with pytest.raises(SetupError, match="has no key 'app'; it has 'shop'"):
        remove(file, "app")
    with pytest.raises(SetupError, match="is empty"):
        add(file, " ")
    with pytest.raises(SetupError, match="cannot be read as keys"):
        Keys(tmp_path / "none.json")
    assert [path.name for path in tmp_path.glob("*.json")] == ["keys.json"]


def test_every_hash_is_compared_whichever_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, compared = tmp_path / "keys.json", []
    found = [add(file, name) for name in ("a", "b", "c")]
    keys, real = Keys(file), module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda one, other: compared.append(other) or real(one, other))
    for key in [*found, "wrong"]:
        keys.name(key)
    assert len(compared) == 12


def test_requests_need_a_key_and_health_and_the_page_do_not(bundles: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = add(file, "shop")
    (tmp_path / "index.html").write_text("<p>hello")
    (tmp_path / "page.js").write_text("hello()")
    with asked(bundles["exact"], keys=file, page=tmp_path) as client:
        for path in ("/health", "/ready", "/metrics", "/", "/page/page.js", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        wrong = [
            {},
            {"x-api-key": "x"},
            {"authorization": f"Basic {key}"},
            {"authorization": "Bearer x"},
            {"authorization": key},
        ]
        for headers in wrong:
            for method, path in (("POST", "/v1/recommend"), ("GET", "/v1/bundle"), ("GET", "/v1/users/x"), ("GET", "/nowhere")):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401, (path, headers)
                assert response.headers["www-authenticate"] == "Bearer"
                assert key not in response.text
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}):
            assert client.post("/v1/recommend", json={}, headers=headers).status_code == 200
            assert client.get("/v1/bundle", headers=headers).status_code == 200
        remove(file, "shop")
        assert client.post("/v1/recommend", json={}, headers={"x-api-key": key}).status_code == 401


def test_the_command_makes_names_and_removes_keys(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from recsys.__main__ import app

    file, runner = str(tmp_path / "keys.json"), CliRunner()
    key = runner.invoke(app, ["keys", "add", "shop", "--keys", file]).output.strip()
    assert Keys(Path(file)).name(key) == "shop"
    assert json.loads(runner.invoke(app, ["keys", "list", "--keys", file, "--json"]).output) == {"keys": ["shop"]}
    assert runner.invoke(app, ["keys", "remove", "shop", "--keys", file]).exit_code == 0
    assert Keys(Path(file)).name(key) is None

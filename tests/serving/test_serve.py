"""The server as a process of its own: signals, restarts, stores that go and come, bundles that change."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from features.dataset import Dataset
from recsys.errors import SetupError
from serving.app import FORCED, serve
from serving.engine import Recommender
from serving.export import export
from serving.index import IndexSettings
from serving.items import remove
from tests.serving.conftest import write_run
from tests.serving.servers import RedisServer, free_port

# A deadline that a stalled machine keeps too: what these tests ask is that nothing else fails a request.
QUESTION = {"history": [5, 7, 11], "k": 13, "deadline_ms": 5000}


class Worker:
    """A process of `recsys serve`."""

    environment: dict[str, str]

    def __init__(self, bundle: Path, log: Path, *options: str, port: int | None = None) -> None:
        self.bundle, self.log, self.options, self.port = bundle, log, options, port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Worker:
        """Start it, and wait until it is ready."""
        words = ["recsys", "serve", str(self.bundle), "--port", str(self.port), *self.options]
        words += [] if "--store" in words else ["--store", "memory:"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(words, env=self.environment, stdout=output, stderr=output)
        for _ in range(1200):
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/ready").status_code == 200:
                    return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def tell(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once it has left."""
        assert self.process is not None
        return self.process.wait(60)

    def close(self) -> None:
        """End it, however it stands."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", autouse=True)
def _workers_start_at_once(forked: dict[str, str]) -> None:
    Worker.environment = forked


@contextmanager
def worker(bundle: Path, log: Path, *options: str) -> Iterator[Worker]:
    """A running one."""
    made = Worker(bundle, log, *options)
    try:
        yield made.start()
    finally:
        made.close()


def until(fits: Callable[[], bool]) -> None:
    """Wait for something to become so."""
    for _ in range(1200):
        if fits():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.mark.parametrize("timed", [False, True])
def test_a_real_server_answers_what_the_recommender_does(
    timed: bool, bundles: dict[str, Path], dataset: Dataset, tmp_path: Path
) -> None:
    bundle, question = bundles["ivf"], {"times": [10, 500, 700], "now": 900} if timed else {}
    if timed:
        bundle = tmp_path / "bundle"
        export(write_run(tmp_path / "run", dataset, time="both", request_time=True), bundle, IndexSettings(), dataset)
    with worker(bundle, tmp_path / "log", "--set", "online.drain_seconds=0") as server:
        answer = httpx2.post(f"{server.url}/v1/recommend", json={**QUESTION, **question}).json()
        server.tell()
        assert server.wait() == 0
    expected = Recommender.load(bundle, threads=1).answer([5, 7, 11], 13, **question)  # type: ignore[arg-type]
    assert answer["items"] == expected["items"]
    assert answer["bundle"] == expected["bundle"]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["route"] for line in lines if line["event"] == "request"][-1] == "/v1/recommend"
    assert not [line for line in lines if "error" in line]


def test_a_busy_port_is_named(bundles: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(SetupError, match="cannot listen there"):
        serve(str(bundles["exact"]), "127.0.0.1", busy.getsockname()[1], store="memory:")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_leave_it_finishes_what_is_asked_and_ends_with_0(number: int, bundles: dict[str, Path], tmp_path: Path) -> None:
    body = json.dumps(QUESTION).encode()
    head = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with worker(bundles["exact"], tmp_path / "log", "--set", "online.drain_seconds=2") as server:
        kept = httpx2.Client(base_url=server.url)
        assert "connection" not in kept.post("/v1/recommend", json=QUESTION).headers
        under_way = socket.create_connection(("127.0.0.1", server.port))
        under_way.sendall(head + body[:7])
        server.tell(number)
        until(lambda: httpx2.get(f"{server.url}/ready").status_code == 503)
        while_leaving = kept.post("/v1/recommend", json=QUESTION)
        assert while_leaving.status_code == 200
        assert while_leaving.headers["connection"] == "close"
        until(lambda: not accepts(server.port))
        under_way.sendall(body[7:])
        answer = b""
        while part := under_way.recv(65536):
            answer += part
        under_way.close()
        kept.close()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"items":[{"rank":1' in answer
        assert server.wait() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


def test_a_body_that_never_comes_keeps_it_from_leaving_no_longer_than_it_may_take(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--set", "online.drain_seconds=0", "--set", "online.body_seconds=1")
    with (
        worker(bundles["exact"], tmp_path / "log", *options) as server,
        socket.create_connection(("127.0.0.1", server.port)) as under_way,
    ):
        under_way.sendall(b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 7\r\n\r\n{}")
        server.tell()
        assert server.wait() == 0
        assert under_way.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_share_without_a_challenger_is_refused(bundles: dict[str, Path], forked: dict[str, str]) -> None:
    words = ["recsys", "serve", bundles["exact"], "--port", "0", "--store", "memory:", "--set", "online.share=0.3"]
    done = subprocess.run(words, env=forked, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "a share of 0.3 is given without a challenger" in done.stderr
    assert "ResourceWarning" not in done.stderr


def test_told_twice_it_leaves_at_once(bundles: dict[str, Path], tmp_path: Path) -> None:
    with worker(bundles["exact"], tmp_path / "log", "--set", "online.drain_seconds=1000") as server:
        server.tell()
        until(lambda: httpx2.get(f"{server.url}/ready").status_code == 503)
        server.tell()
        assert server.wait() == FORCED


class Proxy:
    """Gives each connection to the next worker that says it is ready, as a load balancer does."""

    def __init__(self, ports: list[int]) -> None:
        self.ports, self.port = ports, free_port()
        self._ready: set[int] = set()
        self._turn = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._stopped = asyncio.Event()
        self._open: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> Proxy:
        self._thread.start()
        until(lambda: accepts(self.port))
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()

    def ready(self, port: int) -> bool:
        """Whether requests go there."""
        return port in self._ready

    async def _run(self) -> None:
        server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        watch = asyncio.create_task(self._watch())
        await self._stopped.wait()
        server.close()
        await asyncio.gather(watch, *self._open)

    async def _watch(self) -> None:
        while not self._stopped.is_set():
            for port in self.ports:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    try:
                        writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                        whole = (await reader.read()).startswith(b"HTTP/1.1 200")
                    finally:
                        await closed(writer)
                except OSError:
                    whole = False
                (self._ready.add if whole else self._ready.discard)(port)
            await asyncio.sleep(0.05)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        ready = sorted(self._ready)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", ready[next(self._turn) % len(ready)])
        except (OSError, ZeroDivisionError):  # gone meanwhile, or nobody is ready yet
            await closed(writer)
            return

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while part := await source.read(65536):
                sink.write(part)

        sending = asyncio.create_task(pump(reader, back))
        try:
            await pump(there, writer)
        finally:
            sending.cancel()
            await asyncio.gather(closed(writer), closed(back))


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close the connection, and wait until nothing is left of it."""
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


@contextmanager
def asking(url: str, question: Callable[[int], dict[str, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Meanwhile two threads ask again and again, each time over a new connection; statuses (0: none) and answers."""
    found: list[tuple[int, Any]] = []
    stopped = threading.Event()

    def ask(start: int) -> None:
        for number in itertools.count(start, 2):
            if stopped.is_set():
                return
            try:
                response = httpx2.post(url, json=question(number), headers={"connection": "close"}, timeout=30)
                found.append((response.status_code, response.json()))
            except httpx2.TransportError as error:
                found.append((0, error))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def test_workers_that_restart_one_after_the_other_fail_no_request(bundles: dict[str, Path], tmp_path: Path) -> None:
    options = ("--store", f"sqlite:{tmp_path / 'histories'}", "--set", "online.drain_seconds=1")
    workers = [Worker(bundles["exact"], tmp_path / f"log {number}", *options).start() for number in range(2)]
    items = [item["item_id"] for item in Recommender.load(bundles["exact"], threads=1).answer([5, 7, 11], 13)["items"]]
    try:
        with Proxy([each.port for each in workers]) as proxy:
            until(lambda: all(proxy.ready(each.port) for each in workers))
            with asking(f"http://127.0.0.1:{proxy.port}/v1/recommend", lambda number: QUESTION) as found:
                for each in workers:
                    each.tell()
                    assert each.wait() == 0
                    each.start()
                    until(lambda port=each.port: proxy.ready(port))  # type: ignore[misc]
                before = len(found)
                until(lambda: len(found) > before + 20)
    finally:
        for each in workers:
            each.close()
    assert len(found) > 50
    assert [answer for status, answer in found if status != 200] == []
    assert all([item["item_id"] for item in answer["items"]] == items for _, answer in found)


def test_while_redis_is_gone_lists_go_on_and_afterwards_histories_are_read_again(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    redis = RedisServer()
    redis.start()
    event = {"events": [{"user_id": "u", "item_id": 5, "time": 7}]}
    try:
        with worker(bundles["exact"], tmp_path / "log", "--store", redis.url, "--set", "online.watch_seconds=0.2") as server:

            def post(path: str, question: dict[str, Any]) -> httpx2.Response:
                return httpx2.post(f"{server.url}{path}", json=question, timeout=30)

            def fallback() -> str | None:
                answer = post("/v1/recommend", {"user_id": "u", "deadline_ms": 5000})
                assert answer.status_code == 200
                found: str | None = answer.json()["fallback"]
                return found

            assert post("/v1/events", event).json()["added"] == 1
            assert fallback() is None
            redis.kill()
            assert fallback() == "store"
            assert post("/v1/events", event).status_code == 503
            assert post("/v1/recommend", QUESTION).json()["fallback"] is None
            until(lambda: httpx2.get(f"{server.url}/ready").json()["store"] == "unreachable")
            assert httpx2.get(f"{server.url}/ready").status_code == 200
            redis.start()
            until(lambda: httpx2.get(f"{server.url}/ready").json()["store"] == "ok")
            until(lambda: post("/v1/events", event).status_code == 200)
            assert fallback() is None
            server.tell()
    finally:
        redis.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_bundle_that_is_replaced_is_taken_without_a_failed_request(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles["exact"], bundle)
    answers = {}
    with worker(bundle, tmp_path / "log", "--set", "online.watch_seconds=0.1") as server:
        recommender = Recommender.load(bundle, threads=1)
        answers[recommender.id] = recommender.answer([5, 7, 11], 13)["items"]
        with asking(f"{server.url}/v1/recommend", lambda number: QUESTION) as found:
            until(lambda: len(found) > 10)
            remove(bundle, [answers[recommender.id][0]["item_id"]])
            fresh = Recommender.load(bundle, threads=1)
            answers[fresh.id] = fresh.answer([5, 7, 11], 13)["items"]
            until(lambda: bool(found) and found[-1][0] == 200 and found[-1][1]["bundle"] == fresh.id)
            (bundle / "items.parquet").write_bytes(b"broken")
            until(lambda: httpx2.get(f"{server.url}/v1/bundle").json()["arms"][0]["problem"] is not None)
            before = len(found)
            until(lambda: len(found) > before + 10)
    assert [answer for status, answer in found if status != 200] == []
    assert {answer["bundle"] for _, answer in found} == set(answers)
    assert all(answer["items"] == answers[answer["bundle"]] for _, answer in found)


def test_listening_for_others_without_keys_is_warned_of(bundles: dict[str, Path], tmp_path: Path) -> None:
    with worker(bundles["exact"], tmp_path / "log", "--host", "0.0.0.0"):
        assert "open to others without keys" in (tmp_path / "log").read_text()
    with worker(bundles["exact"], tmp_path / "other log"):
        assert "open to others" not in (tmp_path / "other log").read_text()


def test_a_password_of_the_store_is_never_printed(dataset: Dataset) -> None:
    from typer.testing import CliRunner

    from recsys.__main__ import app

    server = RedisServer()
    server.start("--requirepass", "canary-4711")
    try:
        store = server.url.replace("redis://", "redis://:canary-4711@")
        done = CliRunner().invoke(app, ["history", "import", str(dataset.path), "--store", store])
    finally:
        server.close()
    assert done.exit_code == 0, done.output
    assert "211 users" in done.output
    assert "canary-4711" not in done.output


def test_histories_are_imported_shown_and_erased_by_the_command(dataset: Dataset, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from recsys.__main__ import app

    runner, store = CliRunner(), f"sqlite:{tmp_path / 'histories'}"

    def run(*words: str) -> str:
        done = runner.invoke(app, ["history", *words, "--store", store])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "211 users" in run("import", str(dataset.path), "--set", "online.keep=17")
    shown = json.loads(run("show", "user 007", "--json"))
    wanted = dataset.events.collect().filter(user_id="user 007")["item_id"].to_list()[-17:]
    assert [event["item_id"] for event in shown["events"]] == wanted
    assert run("erase", "user 007") == "history: erased\n"
    assert run("erase", "user 007") == "history: nothing was there\n"
    assert json.loads(run("show", "user 007", "--json"))["events"] == []

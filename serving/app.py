"""Answers over HTTP: the hot routes as bare ASGI, all others and the document by FastAPI; the one door to both servers."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import logging
import os
import re
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from recsys.errors import DataError, RecsysError, RequestError, SetupError, StoreError
from recsys.version import __version__
from serving.admission import OnlineSettings, Rate
from serving.document import OPERATIONS, document
from serving.fallback import open_lists
from serving.history import open_store
from serving.keys import Keys
from serving.live import Arms, source_of
from serving.messages import Refusal
from serving.service import Service
from serving.stores import BlobError
from serving.telemetry import LOG, Call, Tracer, about, log_request, speak, tracer

PAGE = Path(__file__).parent / "page"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
NAMED = re.compile(rf"[a-z0-9][a-z0-9_-]*\.({'|'.join(TYPES)})")
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
"""What the page may load: nothing from elsewhere."""
OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json", "/favicon.ico")
"""Paths that need no key, beside the page's files."""
VISIBLE = re.compile(rb"[\x21-\x7e]{1,100}")
JSON, FIGURES = b"application/json", b"text/plain; version=1.0.0; charset=utf-8"
BACKLOG = 2048
GRACE = 60
"""Seconds that requests under way may take when the process leaves: the longest deadline."""
FORCED = 1
"""Exit code of a process that was told twice to leave."""

Hot = Callable[[bytes, Call], Awaitable[bytes]]


@dataclass(frozen=True)
class Reply:
    """What goes back: a status, a body, and headers beside those of all."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    content: bytes = JSON

    @property
    def head(self) -> list[tuple[bytes, bytes]]:
        """The headers, with what the body is."""
        return [(b"content-type", self.content), (b"content-length", b"%d" % len(self.body)), *self.headers]


class Online:
    """The application: counts, names, admits and answers every request."""

    def __init__(self, service: Service, keys: Keys | None = None, tracer: Tracer | None = None, page: Path = PAGE) -> None:
        self.service, self.keys, self.tracer, self.page = service, keys, tracer, page
        settings = service.settings
        self.clock = service.clock
        self.rate = Rate(settings.rate, settings.burst, service.clock)
        self._hot: dict[tuple[str, str], Hot] = {
            (each.method, each.path): getattr(service, each.name) for each in OPERATIONS if each.asks is not None
        }
        self._begin, self._count = secrets.token_hex(6), itertools.count(1)
        self.api = _api(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.api(scope, receive, send)
            return
        call = Call(scope["method"], self.clock())
        said = _headers(scope, call)
        if not call.id:
            call.id = f"{self._begin}{next(self._count):08x}"
        hot = self._hot.get((call.method, scope["path"]))
        try:
            self._admit(scope, said)
            body = await _body(said, receive, self.service.settings)
            call.read = self.clock()
        except Refusal as refusal:
            call.route = scope["path"] if hot else "other"
            # what is left of the body is nobody's, so the connection ends
            await self._send(send, call, _refused(refusal), close=refusal.status in (400, 408, 411, 413))
            return
        if hot is not None:
            call.route = scope["path"]
            await self._send(send, call, await self.reply(call, hot(body, call)))
        else:
            await self._pass_on(scope, receive, send, call)

    def _admit(self, scope: Scope, said: Mapping[bytes, bytes]) -> None:
        """Raises Refusal: no key, a wrong one, or too many requests."""
        path = scope["path"]
        client = (scope.get("client") or ("",))[0]
        if path in OPEN or path.startswith("/page/"):
            return
        if self.keys is not None:
            name = self.keys.name(_key(said))
            if name is None:
                raise Refusal(401, "no key that is known; send one as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
            client = f"key {name}"
        wait = self.rate.wait(client)
        if wait:
            raise Refusal(429, f"more than {self.rate.rate:g} requests a second; ask again later", retry_after=int(wait) + 1)

    async def reply(self, call: Call, work: Awaitable[bytes | Reply]) -> Reply:
        """What work gives or, where it fails, one line."""
        try:
            found = await work
            return found if isinstance(found, Reply) else Reply(200, found)
        except Refusal as refusal:
            return _refused(refusal)
        except (RequestError, DataError) as error:
            return _problem(422, str(error))
        except BlobError as error:
            LOG.warning("history", extra=about(request_id=call.id, route=call.route, detail=str(error)))
            said = "what is kept of one of these users cannot be read or changed now; ask again, or erase it"
            return _refused(Refusal(503, said, retry_after=1))
        except StoreError:
            return _refused(Refusal(503, "the store does not answer; ask again", retry_after=1))
        except RecsysError as error:
            LOG.error("unable", extra=about(request_id=call.id, route=call.route, detail=str(error)))
            said = "a file that this needs cannot be read or written; the log says which"
            return _refused(Refusal(503, said, retry_after=60))
        except Exception:
            LOG.exception("error", extra=about(request_id=call.id, route=call.route))
            return _problem(500, "a mistake of the server's own; its log says more under this request id")

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        """FastAPI answers, and reads no body; the status and the headers of all pass through here."""
        call.route = "other"
        scope["recsys"] = call

        async def back(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._own(call, False)]
            await send(message)

        try:
            await self.api(scope, receive, back)
        except Exception:  # FastAPI has answered, and raises it once more
            LOG.exception("error", extra=about(request_id=call.id, route=call.route))
        self._finish(call)

    def _own(self, call: Call, close: bool) -> list[tuple[bytes, bytes]]:
        own = [(b"x-request-id", call.id.encode())]
        return [*own, (b"connection", b"close")] if close or self.service.leaving else own

    async def _send(self, send: Send, call: Call, reply: Reply, close: bool = False) -> None:
        call.status = reply.status
        headers = [*reply.head, *self._own(call, close)]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})
        self._finish(call)

    def _finish(self, call: Call) -> None:
        seconds = self.clock() - call.started
        self.service.metrics.requests.count(call, seconds)
        log_request(call, seconds)
        if self.tracer is not None:
            self.tracer.record(call, seconds)


def _headers(scope: Scope, call: Call) -> dict[bytes, bytes]:
    """Those that are read here; the request's id and its parent go to the call."""
    said: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in (b"content-length", b"transfer-encoding", b"authorization", b"x-api-key"):
            said[name] = value
        elif name == b"x-request-id" and VISIBLE.fullmatch(value):
            call.id = value.decode()
        elif name == b"traceparent":
            call.parent = value.decode("latin-1")
    return said


def _key(said: Mapping[bytes, bytes]) -> str:
    scheme, _, key = said.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else said.get(b"x-api-key", b"").decode("latin-1")


async def _body(said: Mapping[bytes, bytes], receive: Receive, settings: OnlineSettings) -> bytes:
    """The whole body.

    Raises Refusal: it does not say its length, is too long, does not come in time, or is of another length than it said.
    """
    if b"transfer-encoding" in said:
        raise Refusal(411, "the body has no Content-Length; send one")
    length = said.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 20 or int(length) > settings.body_bytes:
        raise Refusal(413, f"the body is larger than {settings.body_bytes} bytes; send less")
    wanted = int(length)
    if not wanted:
        return b""
    body, more = b"", True
    try:
        async with asyncio.timeout(settings.body_seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "the body ended early; send it again")
                body += message.get("body", b"")
                more = message.get("more_body", False) and len(body) <= wanted
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {settings.body_seconds:g} seconds; send it again") from None
    if len(body) != wanted:
        raise Refusal(400, f"the body is not of the {wanted} bytes that Content-Length says; send it again")
    return body


def _problem(status: int, detail: str, *headers: tuple[bytes, bytes]) -> Reply:
    return Reply(status, msgspec.json.encode({"detail": " ".join(detail.split())}), headers)


def _refused(refusal: Refusal) -> Reply:
    headers = []
    if refusal.retry_after:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return _problem(refusal.status, refusal.detail, *headers)


def _api(online: Online) -> FastAPI:
    """All routes but the hot ones, and the document of all."""
    service = online.service

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    api = FastAPI(title="recsys", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    api.router.redirect_slashes = False
    described = msgspec.json.encode(document(__version__))

    def route(method: str, path: str, work: Callable[[Request, Call], Awaitable[bytes | Reply]]) -> None:
        async def endpoint(request: Request) -> Response:
            call: Call = request.scope["recsys"]
            call.route = path

            async def whole() -> bytes | Reply:
                return await work(request, call)  # in here, so that what it refuses before it waits is answered too

            return _response(await online.reply(call, whole()))

        given = re.sub(r"\{(\w+)\}", r"{\1:id}", path)
        api.add_api_route(given, endpoint, methods=[method], include_in_schema=False, response_model=None)

    cold = _cold(service)
    for each in OPERATIONS:  # the hot ones for their other methods alone, and for the 405
        route(each.method, each.path, cold.get(each.name, lambda request, call: _at_once(b"")))
    route("GET", "/", lambda request, call: _page(online.page, "index.html", request))
    route("GET", "/favicon.ico", lambda request, call: _page(online.page, "favicon.ico", request))
    route("GET", "/page/{name}", lambda request, call: _page(online.page, request.path_params["name"], request))
    route("GET", "/openapi.json", lambda request, call: _at_once(Reply(200, described)))

    @api.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            matched = [each for each in api.routes if isinstance(each, Route) and each.matches(request.scope)[0] != Match.NONE]
            allowed = ", ".join(method for each in matched for method in each.methods or ())
            return _response(_problem(405, f"this path takes {allowed}", (b"allow", allowed.encode())))
        return _response(_problem(error.status_code, "no such path; /openapi.json names all"))

    return api


async def _at_once(found: bytes | Reply) -> bytes | Reply:
    return found


def _response(reply: Reply) -> Response:
    response = Response(reply.body, reply.status)
    response.raw_headers = reply.head
    return response


def _cold(service: Service) -> dict[str, Callable[[Request, Call], Awaitable[bytes | Reply]]]:
    """What answers each operation that takes no message."""

    async def find(request: Request, call: Call) -> bytes:
        query = request.query_params
        if not {*query} <= {"q", "limit"}:
            raise RequestError("query: only q and limit may be given; leave the others out")
        part, limit = query.get("q", ""), query.get("limit", "20")
        if not re.fullmatch(r"[1-9][0-9]?|100", limit):
            raise RequestError("limit: give a whole number from 1 to 100")
        if len(part) > 500 or len(query.multi_items()) > len(query):
            raise RequestError("q: give one text of at most 500 letters")
        return await service.find_items(part, int(limit))

    def named(request: Request, name: str) -> str:
        found: str = request.path_params[name]
        if not 0 < len(found) <= 500:
            raise RequestError(f"{name}: give 1 to 500 letters")
        return found

    return {
        "find_items": find,
        "item": lambda request, call: service.item(named(request, "item_id")),
        "remove_item": lambda request, call: service.remove_item(named(request, "item_id")),
        "filters": lambda request, call: service.filters(),
        "user": lambda request, call: service.user(named(request, "user_id")),
        "erase": lambda request, call: service.erase(named(request, "user_id")),
        "bundle": lambda request, call: service.bundle(),
        "health": lambda request, call: _at_once(b'{"status":"ok"}'),
        "ready": lambda request, call: _at_once(Reply(*service.ready())),
        "metrics": lambda request, call: _at_once(Reply(200, service.metrics.text(), content=FIGURES)),
    }


async def _page(folder: Path, name: str, request: Request) -> Reply:
    """A file of the page, which a browser asks after each time; it comes again only if it changed."""
    try:
        if not NAMED.fullmatch(name):
            raise FileNotFoundError
        content = (folder / name).read_bytes()
    except OSError:
        raise Refusal(404, "no such path; /openapi.json names all") from None
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'.encode()
    headers = (
        (b"etag", tag),
        (b"cache-control", b"no-cache"),
        (b"content-security-policy", POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )
    kind = TYPES[name.rpartition(".")[2]].encode()
    if tag in [part.strip().encode() for part in request.headers.get("if-none-match", "").split(",")]:
        return Reply(304, b"", headers, kind)
    return Reply(200, content, headers, kind)


class Id(PathConvertor):
    """An id in a path: any text, also one with slashes and line ends."""

    regex = r"[\s\S]+"


register_url_convertor("id", Id())


class Server(uvicorn.Server):
    """Leaves in peace: told to, it says so at /ready, serves on for drain_seconds, takes no more, and ends with 0.

    Told twice, it leaves at once.
    """

    def __init__(self, config: uvicorn.Config, online: Online) -> None:
        super().__init__(config)
        self.online = online

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service = self.online.service
        if service.leaving:
            os._exit(FORCED)
        service.leaving = True
        LOG.info("leaving")
        asyncio.get_running_loop().call_later(service.settings.drain_seconds, setattr, self, "should_exit", True)


def serve(
    bundle: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    store: str = "sqlite:histories.sqlite",
    lists: str = "",
    challenger: str = "",
    keys: Path | None = None,
    trace: str = "",
    tracking: str = "",
    settings: OnlineSettings | None = None,
) -> None:
    """Answer until told to leave, on one thread of arithmetic: two make the slowest answers ten times slower; for more, start
    more.

    Raises BundleError: as Recommender.load. SetupError: an address, a store, keys or tracing that cannot be. DataError: lists
    that cannot be read.
    """
    settings = settings or OnlineSettings()
    with _bound(host, port) as listener:
        speak()
        torch.set_num_threads(1)
        services: list[Service] = []
        addresses = {"champion": bundle} | ({"challenger": challenger} if challenger else {})

        def tell(kind: str, detail: str) -> None:
            LOG.log(logging.INFO if kind == "swap" else logging.WARNING, kind, extra=about(detail=detail))
            for service in services:
                name = detail.partition(":")[0]
                if kind == "swap":
                    service.swapped(name)
                    _settle()
                else:
                    service.metrics.failed(name)

        other = source_of(challenger, tracking) if challenger else None
        arms = Arms(source_of(bundle, tracking), other, settings.share, settings.salt, tell)
        known = Keys(keys) if keys is not None else None
        if known is None and host not in ("127.0.0.1", "localhost", "::1"):
            LOG.warning("open to others without keys", extra=about(detail=f"host {host}; give --keys"))
        spans = tracer(trace)
        kept = open_store(store, settings.keep)
        listed = open_lists(lists) if lists else None
        service = Service(arms, kept, settings, lists=listed, addresses=addresses)
        services.append(service)
        online = Online(service, known, spans)
        config = uvicorn.Config(
            online,
            log_config=None,
            access_log=False,
            http="httptools",
            ws="none",
            lifespan="on",
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=GRACE,
        )
        arms.watch(settings.watch_seconds)
        _settle()
        here = f"http://{host}:{listener.getsockname()[1]}"
        LOG.info("listening", extra=about(detail=here, bundle=arms.champion.recommender.id))
        try:
            Server(config, online).run(sockets=[listener])
        finally:
            arms.close()
            kept.close()
            if listed is not None:
                listed.close()
            if spans is not None:
                spans.close()


def _bound(host: str, port: int) -> socket.socket:
    """The address, taken; connections are refused until the server listens. Raises SetupError: it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise SetupError(f"{host}:{port}: cannot listen there ({error.strerror}); give another --host or --port") from None
    return listener


def _settle() -> None:
    """What is loaded stays; the collector of garbage need not look at it again and again."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()

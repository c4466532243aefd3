"""Answers over HTTP; the one door to FastAPI."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.types import ASGIApp, Receive, Scope, Send

from recsys import __version__
from recsys.errors import RequestError, SetupError
from serving.engine import Recommender
from serving.filters import VALUES

BODY = 2**20
"""Most bytes of a request; uvicorn itself has no limit."""

ItemId = int | Annotated[str, Field(max_length=500)]
Second = Annotated[int, Field(ge=0, lt=2**40)]
Items = Annotated[list[ItemId], Field(max_length=10_000)]
VALUE: dict[str, Any] = {"anyOf": [{"type": "boolean"}, {"type": "number"}, {"type": "string"}]}
RANGE = {
    "type": "object",
    "properties": {"min": {"type": "number"}, "max": {"type": "number"}},
    "minProperties": 1,
    "additionalProperties": False,
}
Condition = Annotated[
    Any, WithJsonSchema({"anyOf": [*VALUE["anyOf"], {"type": "array", "items": VALUE, "maxItems": VALUES}, RANGE]})
]
"""Of a type that the bundle's attributes decide; the recommender checks it."""


class Question(BaseModel):
    """A history, oldest event first, by item ids or by titles, and what may be recommended."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"history": [1, 260, 1196], "k": 10}, {"titles": ["Toy Story (1995)"], "k": 5}]},
    )

    history: Items = Field([], description="Item ids.")
    titles: list[Annotated[str, Field(max_length=500)]] = Field(
        [], max_length=10_000, description="Titles, in the place of ids."
    )
    times: Annotated[list[Second], Field(max_length=10_000)] | None = Field(
        None, description="Seconds since 1970 of each event."
    )
    now: Second | None = Field(None, description="Events after this second are left out; needs times.")
    k: int = Field(10, ge=1, le=1000, description="Items to recommend.")
    filter_seen: bool = Field(True, description="Leave out what stands in the history.")
    deny: Items = Field([], description="Ids of items that may not be recommended.")
    allow: Items | None = Field(None, description="Ids of the only items that may be recommended.")
    where: dict[Annotated[str, Field(max_length=500)], Condition] = Field(
        {},
        max_length=50,
        description="What items must be, by the name of an attribute, or categories: a value, a list of values of which an "
        "item has any, or of numbers {min, max}, one of which may be missing.",
        examples=[{"in_stock": True, "brand": ["Acme", "Globex"], "price": {"min": 10, "max": 20}}],
    )
    diversity: float | None = Field(None, ge=0, le=1, description="0: the best items; 1: each as unlike the others as can be.")
    popularity: float | None = Field(
        None, ge=-100, le=100, description="What is taken from a score for each factor e of an item's training events."
    )
    probabilities: bool = Field(False, description="Say of each item how probable it is that it is the next one.")
    ignore_unknown: bool = Field(False, description="Leave out ids and titles that are no item, and name them in the answer.")


class Recommended(BaseModel):
    """One place of a list."""

    rank: int
    item_id: ItemId
    title: str
    score: float
    probability: float | None = Field(None, description="That it is the next item, as often as on validation.")


class Answer(BaseModel):
    """A list, best first."""

    bundle: str = Field(description="Id of the bundle that answered.")
    source: str = Field(description="model, or popularity: the history held nothing that the model knows.")
    unknown: list[ItemId] = Field(description="Ids and titles that are no item and were ignored.")
    items: list[Recommended]


class Problem(BaseModel):
    """What was wrong with a request, in one line."""

    detail: str


def create_app(recommender: Recommender) -> FastAPI:
    """The application over a loaded recommender."""
    app = FastAPI(title="recsys", version=__version__, description="Top-k recommendations for a history.")
    app.add_middleware(BodyLimit)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def refuse_shape(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    # A plain function: FastAPI runs it in a thread, so that /health answers while a list is made.
    @app.post("/v1/recommend", response_model_exclude_none=True, responses={413: {"model": Problem}, 422: {"model": Problem}})
    def recommend(question: Question) -> Answer:
        """The k best items for a history; for an empty or wholly unknown one, the most popular."""
        if question.history and question.titles:
            raise RequestError("both history and titles are given; give one of them")
        items = recommender.catalogue
        answer = recommender.answer(
            question.titles or question.history,
            question.k,
            times=question.times,
            now=question.now,
            filter_seen=question.filter_seen,
            deny=question.deny,
            allow=question.allow,
            where=question.where,
            diversity=question.diversity,
            popularity=question.popularity,
            probabilities=question.probabilities,
            ignore_unknown=question.ignore_unknown,
            find=items.by_title if question.titles else items.by_id,
        )
        return Answer.model_validate(answer)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """A bundle is loaded and answers."""
        return {"status": "ready", "bundle": recommender.id, "items": recommender.items, "version": __version__}

    return app


class BodyLimit:
    """Refuses requests whose body is longer than BODY, or does not say how long it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers:
            await JSONResponse({"detail": "the body has no Content-Length; send one"}, 411)(scope, receive, send)
        elif not length.isdigit() or int(length) > BODY:
            await JSONResponse({"detail": f"the body is larger than {BODY} bytes; send less"}, 413)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def serve(bundle: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer until stopped, on one thread of arithmetic: two make the slowest answers ten times slower; for more, start more.

    Raises BundleError: as Recommender.load.
    """
    import uvicorn

    torch.set_num_threads(1)
    recommender = Recommender.load(bundle, threads=1)
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise SetupError(f"{host}:{port}: cannot listen there ({error.strerror}); give another --host or --port") from None
    recommender.answer(["?"], 1, times=[0], ignore_unknown=True)  # reads ids and titles before the first request
    uvicorn.Server(uvicorn.Config(create_app(recommender))).run(sockets=[listener])

"""The page and its three questions (next, vote, undo) as an ASGI application."""

import importlib.resources
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from ppomax.annotate.guard import Access, Guard
from ppomax.annotate.queue import Seen, question_of, swapped
from ppomax.annotate.votes import Conflict, Votes

MAX_NAME, MAX_NOTE = 40, 2000
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = ("index.html", "style.css", "page.js", "api.js", "strings.js", "text.js", "icon.svg")


def _plain(name: str) -> str:
    if name != " ".join(name.split()) or not name.isprintable():
        raise ValueError("a name of ordinary characters is wanted")
    return name


class Next(BaseModel):
    """Asks for the pair to vote on."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    annotator: Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_plain)]


class Vote(Next):
    """A person's choice."""

    pair: str = Field(max_length=64)
    choice: Literal["first", "second", "tie", "skip"]
    note: str = Field("", max_length=MAX_NOTE)
    seconds: float = Field(ge=0, le=86400)
    """Time the pair was in view."""


class Undo(Next):
    """Takes the last vote back."""

    pair: str = Field(max_length=64)


Asked = TypeVar("Asked", bound=Next)


def build_app(votes: Votes, access: Access) -> ASGIApp:
    """The whole application behind its guard."""
    routes = [
        Route(f"/{'' if name == 'index.html' else name}", partial(_file, content, kind))
        for name, (content, kind) in _static_files().items()
    ]
    routes += [
        Route("/api/next", partial(_answer, votes, Next, _nothing), methods=["POST"]),
        Route("/api/vote", partial(_answer, votes, Vote, partial(_vote, votes)), methods=["POST"]),
        Route("/api/undo", partial(_answer, votes, Undo, partial(_undo, votes)), methods=["POST"]),
    ]
    return Guard(Router(routes, redirect_slashes=False), access)


def _static_files() -> Mapping[str, tuple[bytes, str]]:
    """The page's files, read once: a request picks one by its whole name, never by a path."""
    folder = importlib.resources.files("ppomax") / "annotate" / "static"
    kinds = {name: TYPES[name[name.rindex(".") :]] for name in FILES}
    return {name: ((folder / name).read_bytes(), kind) for name, kind in kinds.items()}


async def _file(content: bytes, kind: str, _: Request) -> Response:
    return Response(content, headers={"content-type": kind})


async def _answer(
    votes: Votes, model: type[Asked], act: Callable[[Asked], None], request: Request
) -> Response:
    """Do what is asked, then say what comes next.

    The write is waited for in the event loop on purpose: votes come one after the other, and
    none is answered before it is on disk.
    """
    try:
        asked = model.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        return _json(HTTPStatus.BAD_REQUEST, {"error": f"{place}: {first['msg']}"})
    try:
        act(asked)
    except Conflict as error:
        return _json(HTTPStatus.CONFLICT, {"error": str(error)})
    except OSError as error:
        return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": f"not saved: {error.strerror}"})
    return _json(HTTPStatus.OK, _state(votes, asked.annotator))


def _nothing(_: Next) -> None:
    """To ask what comes next changes no vote."""


def _vote(votes: Votes, asked: Vote) -> None:
    seen: Seen = asked.choice
    votes.vote(asked.annotator, asked.pair, seen, asked.note.strip(), asked.seconds)


def _undo(votes: Votes, asked: Undo) -> None:
    votes.undo(asked.annotator, asked.pair)


def _state(votes: Votes, annotator: str) -> dict[str, object]:
    """What the page shows. The models' names are not in it, nor which side is whose."""
    pair = votes.current(annotator)
    shown: dict[str, object] | None = None
    if pair is not None:
        replies = [pair.a.response, pair.b.response]
        first, second = reversed(replies) if swapped(annotator, pair.pair) else replies
        shown = {
            "id": pair.pair,
            "question": question_of(pair),
            "lang": pair.lang,
            "messages": list(pair.messages),
            "first": first,
            "second": second,
            "note": votes.note(annotator),
        }
    progress = asdict(votes.progress(annotator))
    return {"pair": shown, "progress": progress, "undo": votes.last(annotator)}


def _json(status: HTTPStatus, value: dict[str, object]) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")

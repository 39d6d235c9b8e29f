"""What stands between the network and the page: who may ask, and how much. No votes in here."""

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 2**10
"""Bytes of a request: a vote with the longest note in Chinese is about 8 KiB."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing but our own files, nothing inline; trusted types turn innerHTML and its like off."""

HEADERS: Mapping[str, str] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Access:
    """From where and with what the page may be asked."""

    port: int
    names: frozenset[str] = frozenset({"localhost", "127.0.0.1", "::1"})
    """Host names that mean this machine."""
    any_address: bool = False
    """Whether a plain IP address will do as well. A foreign page that makes its own name point
    here (DNS rebinding) still sends that name, never an address."""
    token: str | None = None
    """What every question about votes must carry; None on the loopback alone."""
    url: str | None = None
    """`https://name` of a proxy in front, an origin of its own."""

    def origin_of(self, host: str) -> str | None:
        """The origin that a Host header stands for; None if it is not ours."""
        if self.url is not None and host.lower() == self.url.partition("://")[2]:
            return self.url
        name, port = _name_and_port(host)
        known = name in self.names or (self.any_address and _is_address(name))
        return f"http://{host.lower()}" if known and port == self.port else None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered."""

    status: HTTPStatus
    reason: str


def refusal(access: Access, method: str, path: str, headers: Headers) -> Refusal | None:
    """Why a request must not reach the page, from its method, path and headers; None if it may.

    A POST must come from the page itself: our own Origin, and where the browser says from what
    site the request is (Sec-Fetch-Site), the same one. Nothing else needs the token: the files of
    the page hold no data.
    """
    origin = access.origin_of(headers.get("host", ""))
    if origin is None or len(headers.getlist("host")) != 1:
        return Refusal(HTTPStatus.MISDIRECTED_REQUEST, "this Host is not served here")
    if method not in ("GET", "HEAD", "POST"):
        return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GET and POST only")
    site = headers.get("sec-fetch-site", "same-origin")
    if method != "POST":
        followed = path == "/" and headers.get("sec-fetch-dest") == "document"
        if site not in ("same-origin", "none") and not followed:
            return Refusal(HTTPStatus.FORBIDDEN, "asked for by another site")
        return None
    if headers.getlist("origin") != [origin]:
        return Refusal(HTTPStatus.FORBIDDEN, "a POST must come from this page (Origin)")
    if site != "same-origin":
        return Refusal(HTTPStatus.FORBIDDEN, "a POST must come from this page (Sec-Fetch-Site)")
    if access.token is not None and not _has_token(headers, access.token):
        return Refusal(HTTPStatus.UNAUTHORIZED, "the link's token is missing or wrong")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a POST must be application/json")
    if _declared_length(headers) > MAX_BODY:
        return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY} bytes")
    return None


class Guard:
    """The checks as a layer around the page; it also bounds bodies without a declared length."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal or hand on; every answer carries the security headers."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = refusal(self.access, scope["method"], scope["path"], Headers(scope=scope))
        body = b"" if refused else await _read(receive)
        if body is None:
            refused = Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY} bytes")
        if refused:
            await _refuse(refused, send_guarded)
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_read() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_read, send_guarded)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if it grows beyond `MAX_BODY`."""
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return body


async def _refuse(refused: Refusal, send: Send) -> None:
    text = refused.reason.encode() + b"\n"
    kind = (b"content-type", b"text/plain; charset=utf-8")
    length = (b"content-length", str(len(text)).encode())
    headers = [kind, length, (b"connection", b"close")]
    status = int(refused.status)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def _has_token(headers: Headers, token: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme == "Bearer" and hmac.compare_digest(given.encode(), token.encode())


def _declared_length(headers: Headers) -> int:
    given = headers.get("content-length", "0")
    return int(given) if given.isascii() and given.isdigit() else 0


def _name_and_port(host: str) -> tuple[str, int]:
    """`name:port` or `[v6]:port` apart, the name in lower case; port 80 where none is given."""
    bracketed = host.startswith("[")
    name, _, rest = host.removeprefix("[").partition("]" if bracketed else ":")
    port = rest.removeprefix(":") if bracketed else rest
    if not port:
        return name.lower(), 80
    return name.lower(), int(port) if port.isascii() and port.isdigit() and len(port) < 6 else -1


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

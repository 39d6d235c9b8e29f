"""Start the page: settings, address, the lock on the vote file."""

import contextlib
import ipaddress
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

import uvicorn
from filelock import FileLock, Timeout
from pydantic import Field, field_validator

from ppomax.annotate.guard import Access
from ppomax.annotate.server import build_app
from ppomax.annotate.votes import Votes
from ppomax.config import Settings
from ppomax.errors import ConfigError
from ppomax.eval.pairs import read_pairs

MIN_TOKEN = 16
"""Characters of a token that is given rather than drawn."""


class AnnotateConfig(Settings):
    """How the page is served."""

    quota: int = Field(1, ge=1)
    """Votes wanted of each pair, each by another person."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than the loopback's needs the token in the link."""
    port: int = Field(8765, ge=0, le=65535)
    """0 takes any free one."""
    url: str | None = None
    """Where people reach the page through a proxy, as `https://votes.example.org`."""

    @field_validator("url")
    @classmethod
    def _is_an_origin(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value.rstrip("/").lower())
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
            raise ValueError(f"{value!r} is no https://name (no path behind it)")
        return f"{parts.scheme}://{parts.netloc}"


def serve(
    pairs: Path,
    out: Path,
    config: AnnotateConfig,
    *,
    token: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve the page until it is interrupted.

    Args:
        pairs: the pair file.
        out: the vote file, gone on with if it is there.
        config: how to serve.
        token: of the link; drawn afresh where one is needed and none given.
        say: takes lines for the terminal.

    Raises:
        DataError: an unreadable file, or votes on other pairs.
        ConfigError: the address cannot be had, or another process has the vote file.
    """
    found = read_pairs(pairs)
    with _lock(out):
        votes = Votes(found, out, quota=config.quota, clock=time.monotonic)
        with _listen(config) as listening:
            port = listening.getsockname()[1]
            access = _access(config, port, _token(config, token))
            for line in _greeting(votes, out, config, access):
                say(line)
            _run(votes, access, listening)
        say(f"stopped; {_people(votes)} in {out}")


def _run(votes: Votes, access: Access, listening: socket.socket) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(votes, access),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # what a client says of itself is not believed
            limit_concurrency=256,
            timeout_graceful_shutdown=3,
        )
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def _lock(out: Path) -> "contextlib.AbstractContextManager[object]":
    """Two servers on one vote file would not know of each other's votes."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(out.with_name(f".{out.name}.lock")).acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"option out: another `ppomax annotate` is writing to {out}") from None
    except OSError as error:
        raise ConfigError(f"option out: cannot write {out} ({error.strerror})") from None


def _listen(config: AnnotateConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"options host, port: cannot listen on {config.host} port {config.port} "
            f"({error.strerror}); --port 0 takes any free one"
        ) from None


def _token(config: AnnotateConfig, given: str | None) -> str | None:
    if given is not None and len(given) < MIN_TOKEN:
        raise ConfigError(
            f"PPOMAX_ANNOTATE_TOKEN has {len(given)} characters, at least {MIN_TOKEN} are wanted"
        )
    if given is None and (config.url is not None or not _is_loopback(config.host)):
        return secrets.token_urlsafe(24)
    return given


def _access(config: AnnotateConfig, port: int, token: str | None) -> Access:
    access = Access(port=port, token=token, url=config.url)
    if _is_loopback(config.host):
        return access
    names = access.names | {config.host.lower(), socket.gethostname().lower()}
    return Access(port=port, names=names, any_address=True, token=token, url=config.url)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _greeting(votes: Votes, out: Path, config: AnnotateConfig, access: Access) -> list[str]:
    fragment = "" if access.token is None else f"#token={quote(access.token, safe='')}"
    host = f"[{config.host}]" if ":" in config.host else config.host
    lines = [
        f"{len(votes.pairs)} pairs, {votes.quota} votes wanted of each; {_people(votes)} in {out}",
        f"open {config.url or f'http://{host}:{access.port}'}/{fragment}",
    ]
    if _is_any(config.host):
        lines.append("  from other machines with this one's address in place of the first part")
    if access.token is not None and config.url is None:
        lines.append("  plain HTTP: use it on a network you trust, or put a TLS proxy in front")
    lines.append("Ctrl-C stops; every vote is on disk before the next pair appears")
    return lines


def _is_any(host: str) -> bool:
    """Whether the host means every address of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _people(votes: Votes) -> str:
    counts = Counter(name for name, _ in votes.given)
    who = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{len(votes.given)} votes" + (f" ({who})" if who else "")

"""Pairs to vote on, and a server of them in a thread, asked over real HTTP."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import uvicorn

from ppomax.annotate.guard import Access
from ppomax.annotate.server import build_app
from ppomax.annotate.votes import Votes
from ppomax.eval.pairs import Reply, make_pair


def pair(number, *, kind="helpful", a=None, b=None):
    messages = ({"role": "user", "content": f"Question {number}?"},)
    sides = Reply("sft", a or f"plain {number}"), Reply("ppo", b or f"better {number}")
    return make_pair(f"p{number}", messages, *sides, kind=kind, lang="en")


@pytest.fixture(scope="session")
def make():
    """Pairs by number."""
    return pair


@pytest.fixture
def pairs():
    return [pair(number, kind="harmful" if number % 3 == 2 else "helpful") for number in range(6)]


class Client:
    """HTTP as raw as the tests want it."""

    def __init__(self, port):
        self.port = port
        self.host = f"127.0.0.1:{port}"

    def send(self, method, path, body=None, **headers):
        """Status, headers and body; a header given as None is not sent.

        A server that refuses a broken request may close before it has read the body, which can take
        its answer with it; then the request is made again.
        """
        for _ in range(20):
            with suppress(ConnectionResetError, BrokenPipeError):
                return self._send(method, path, body, headers)
        raise ConnectionResetError(f"{method} {path}: no answer in 20 tries")

    def _send(self, method, path, body, headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        usual = {"host": self.host}
        if body is not None:
            usual |= {
                "content-type": "application/json",
                "origin": f"http://{self.host}",
                "content-length": str(len(body)),
            }
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in (usual | given).items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def ask(self, question, **fields):
        """Status and JSON of a proper question."""
        status, _, body = self.send("POST", f"/api/{question}", json.dumps(fields).encode())
        return status, json.loads(body)


@contextmanager
def running(votes, **access):
    """A server of these votes while the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        app = build_app(votes, Access(port=port, **access))
        settings = {"lifespan": "off", "log_level": "warning", "http": "h11", "ws": "none"}
        server = uvicorn.Server(uvicorn.Config(app, **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Client(port)
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="session")
def run_site():
    """`running`, for fixtures of a wider scope."""
    return running


@pytest.fixture
def serve(pairs, tmp_path):
    """`serve(...)`: a server on the file `votes.jsonl`; a second one is a restart."""

    def start(*, quota=1, given=None, **access):
        path = tmp_path / "votes.jsonl"
        votes = Votes(given or pairs, path, quota=quota, clock=time.monotonic)
        return running(votes, **access)

    return start

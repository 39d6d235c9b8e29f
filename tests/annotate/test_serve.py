"""`ppomax annotate` as a process of its own: address, token, lock, kill -9, the export."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs

import pytest

import ppomax
from ppomax.annotate.serve import AnnotateConfig, _access, _greeting, _token
from ppomax.annotate.votes import Votes
from ppomax.config import parse
from ppomax.errors import ConfigError
from ppomax.eval.pairs import read_verdicts, write_pairs


@pytest.fixture
def start(tmp_path, pairs):
    """Start the command in `tmp_path`; returns the process and its address."""
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    started = []

    def run(*words):
        command = [sys.executable, "-m", "ppomax.cli", "annotate", "pairs.jsonl"]
        command += ["--out", "votes/v.jsonl", "--port", "0", *words]
        source = str(Path(ppomax.__file__).parents[1])
        path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        started.append(process)
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        found = re.search(r"open (\S+)", "".join(said))
        return process, found and found.group(1), "".join(said)

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def ask(address, question, token=None, **fields):
    base = address.partition("#")[0].rstrip("/")
    request = urllib.request.Request(f"{base}/api/{question}", json.dumps(fields).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Origin", base)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_kill_9_loses_no_vote_and_ctrl_c_ends_well(start, tmp_path):
    file = tmp_path / "votes" / "v.jsonl"
    process, address, said = start()
    assert "6 pairs, 1 votes wanted of each; 0 votes in votes/v.jsonl" in said
    state = ask(address, "next", annotator="ann")
    for _ in range(3):
        fields = {"pair": state["pair"]["id"], "choice": "first", "seconds": 1}
        state = ask(address, "vote", annotator="ann", **fields)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert len(read_verdicts(file)) == 3
    process, address, said = start()
    assert "3 votes (ann 3)" in said
    assert ask(address, "next", annotator="ann")["progress"]["mine"] == 3
    second, _, refused = start()
    assert second.wait(20) == 2
    assert "another `ppomax annotate` is writing to votes/v.jsonl" in refused
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert process.stderr.read() == "stopped; 3 votes (ann 3) in votes/v.jsonl\n"
    done, _, said = start("--export", "prefs.jsonl")
    assert done.wait(20) == 2
    assert "option port: has no effect with --export" in said


@pytest.mark.slow
def test_open_to_a_network_the_link_carries_a_token(start):
    _, address, said = start("--host", "0.0.0.0")
    assert "plain HTTP" in said
    base, token = address.split("#token=")
    assert len(token) >= 32
    local = base.replace("0.0.0.0", "127.0.0.1")
    assert ask(local, "next", token, annotator="ann")["pair"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(local, "next", annotator="ann")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_the_loopback_needs_no_token_and_takes_no_other_name(host):
    config = AnnotateConfig(host=host)
    assert _token(config, None) is None
    assert _token(config, "x" * 16) == "x" * 16
    access = _access(config, 8765, None)
    assert not access.any_address
    assert access.origin_of("127.0.0.1:8765") == "http://127.0.0.1:8765"
    assert access.origin_of("192.168.1.2:8765") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": "192.168.1.2"},
        {"host": "box.lan"},
        {"url": "https://votes.example"},
    ],
)
def test_every_other_address_gets_a_token(settings):
    config = AnnotateConfig(**settings)
    drawn = {_token(config, None) for _ in range(3)}
    assert len(drawn) == 3
    assert all(len(token) >= 32 for token in drawn)


def test_a_short_token_is_refused_without_printing_it():
    with pytest.raises(ConfigError, match="7 characters, at least 16") as caught:
        _token(AnnotateConfig(), "hunter2")
    assert "hunter2" not in str(caught.value)


def test_the_link_is_the_proxys_where_there_is_one(pairs, tmp_path):
    config = AnnotateConfig(url="https://Votes.example/")
    votes = Votes(pairs, tmp_path / "v.jsonl", quota=1, clock=lambda: 0.0)
    lines = _greeting(votes, tmp_path / "v.jsonl", config, _access(config, 1, "t" * 16))
    assert lines[1] == f"open https://votes.example/#token={'t' * 16}"
    lines = _greeting(votes, tmp_path / "v.jsonl", config, _access(config, 1, "a b+c&d/é=%#"))
    fragment = lines[1].partition("#")[2]
    assert parse_qs(fragment, strict_parsing=True) == {"token": ["a b+c&d/é=%#"]}


@pytest.mark.parametrize(
    "settings",
    [{"quota": 0}, {"port": 70000}, {"url": "votes.example"}, {"url": "https://x/path"}, {"x": 1}],
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        parse(AnnotateConfig, settings, "options")

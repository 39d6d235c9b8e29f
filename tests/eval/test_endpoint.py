"""An OpenAI-compatible endpoint as a judge, over real HTTP on this machine, in all its moods."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ppomax.config import parse
from ppomax.errors import ConfigError, PpomaxError
from ppomax.eval.answers import open_answers, read_answers
from ppomax.eval.judges import JudgeConfig, judge_pairs
from ppomax.eval.pairs import Reply, make_pair
from ppomax.eval.rubrics import load_rubrics

KEY = "sk-secret-of-the-test"


class Server:
    """A fake endpoint that prefers the reply with `good`; `mood(n)` says how call n ends."""

    def __init__(self):
        self.mood = lambda _n: "ok"
        self.delay = 0.0
        self.usage = {"prompt_tokens": 100, "completion_tokens": 10}
        self.calls = Counter()
        self.answered = Counter()
        self.keys = set()
        self.most_at_once = self.now = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                with lock:
                    n = sum(outer.calls.values())
                    outer.calls[text] += 1
                    outer.keys.add(self.headers.get("Authorization"))
                    outer.now += 1
                    outer.most_at_once = max(outer.most_at_once, outer.now)
                time.sleep(outer.delay)
                with lock:
                    outer.now -= 1
                outer.reply(self, outer.mood(n), text)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def reply(self, handler, mood, text):
        mark = re.search(r"=== (\w+) ", text).group(1)
        first = text.split(f"=== {mark} reply 1 ===")[1].split(f"=== {mark}")[0]
        verdict = f"Because.\n{mark}: {1 if 'good' in first else 2}"
        body = {"choices": [{"message": {"content": verdict}}], "usage": self.usage}
        data = json.dumps(body).encode()
        status, headers = 200, {}
        if mood == "cut":
            data = data[: len(data) // 2]
        elif mood == "nonsense":
            data = b'{"hello": []}'
        elif mood == "slow":
            time.sleep(2)
        elif mood == "silent":
            data = json.dumps({"choices": [{"message": {"content": None}}]}).encode()
        elif isinstance(mood, int):
            status, data = mood, f"refused; your key was {KEY}".encode()
            headers = {"Retry-After": "0"} if mood == 429 else {}
        if mood == "drop":
            handler.close_connection = True
            handler.connection.close()
            return
        if mood == "ok":
            self.answered[text] += 1
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PPOMAX_JUDGE_KEY", KEY)
    found = Server()
    yield found
    found.http.shutdown()


def pairs_of(count):
    return [
        make_pair(
            f"p{i}",
            ({"role": "user", "content": f"Question {i}?"},),
            Reply("sft", f"reply {i}" + (" good" if i % 3 == 0 else "")),
            Reply("ppo", f"answer {i}" + (" good" if i % 3 else "")),
            kind="helpful",
            lang="en",
        )
        for i in range(count)
    ]


@pytest.fixture
def ask(server, tmp_path):
    """`ask(count, **settings)`: verdicts of the fake endpoint, and what was said."""

    def run(count, **settings):
        said = []
        base = {"spec": f"openai:{server.url}#judge", "backoff": 0.01, "concurrency": 4}
        config = parse(JudgeConfig, base | settings)
        with open_answers(tmp_path / "answers.jsonl") as answers:
            found = judge_pairs(
                pairs_of(count), config, load_rubrics(), answers, say=said.append
            ).rows
        return [row.verdict for row in found], said

    return run


def truth(count):
    return ["b" if i % 3 else "a" for i in range(count)]


def test_every_pair_is_asked_in_both_orders_with_a_bound_on_requests_at_once(server, ask):
    server.delay = 0.01
    verdicts, _ = ask(12)
    assert verdicts == truth(12)
    assert sum(server.calls.values()) == 24
    assert set(server.calls.values()) == {1}
    assert 2 <= server.most_at_once <= 4
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.slow
def test_bad_moods_are_survived_and_nothing_is_asked_twice_for_them(server, ask):
    moods = [429, 500, "cut", "drop", "nonsense", 503, "slow", "ok", "ok"]
    server.mood = lambda n: moods[n % len(moods)] if n < 36 else "ok"
    verdicts, _ = ask(10, timeout=0.5, retries=12)
    assert verdicts == truth(10)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 20


def test_a_second_run_asks_nothing(server, ask):
    first, _ = ask(5)
    second, said = ask(5)
    assert (first, sum(server.calls.values())) == (second, 10)
    assert any("0 questions, 10 answered before" in line for line in said)


def test_a_silent_answer_is_a_tie_and_not_asked_again(server, ask):
    server.mood = lambda _n: "silent"
    assert ask(2)[0] == ["tie", "tie"]
    assert sum(server.calls.values()) == 4
    ask(2)
    assert sum(server.calls.values()) == 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_at_once_and_never_shows_the_key(server, ask, status, tmp_path):
    server.mood = lambda _n: status
    with pytest.raises(ConfigError) as caught:
        ask(20)
    assert str(status) in str(caught.value)
    assert KEY not in str(caught.value)
    assert sum(server.calls.values()) <= 4
    kept = tmp_path / "answers.jsonl"
    assert not kept.exists() or KEY not in kept.read_text()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_the_endpoint_refuses_is_a_kept_tie(server, ask, status, tmp_path):
    server.mood = lambda n: status if n in (0, 1, 7) else "ok"
    verdicts, _ = ask(6, concurrency=1)
    assert verdicts == ["tie", "b", "b", "tie", "b", "b"]
    answers = read_answers(tmp_path / "answers.jsonl").known.values()
    assert [answer.refused for answer in answers].count(True) == 3
    assert ask(6)[0] == verdicts
    assert sum(server.calls.values()) == 12


def test_refusals_are_counted_for_the_table(server, tmp_path):
    server.mood = lambda n: 400 if n == 3 else "ok"
    config = parse(JudgeConfig, {"spec": f"openai:{server.url}#judge"})
    for _ in range(2):
        with open_answers(tmp_path / "answers.jsonl") as answers:
            found = judge_pairs(pairs_of(4), config, load_rubrics(), answers, say=print)
        assert found.notes == {"refused by the endpoint": 1}


@pytest.mark.parametrize("count", [2, 20])
def test_where_every_question_is_refused_the_request_is_wrong(server, ask, count, tmp_path):
    server.mood = lambda _n: 400
    with pytest.raises(ConfigError, match=r"first \d questions were all refused, prompt p0"):
        ask(count, concurrency=1)
    assert sum(server.calls.values()) == min(2 * count, 5)
    assert not read_answers(tmp_path / "answers.jsonl").known
    server.mood = lambda _n: "ok"
    assert ask(count)[0] == truth(count)


def test_white_space_around_the_key_is_none_of_it(server, ask, monkeypatch):
    monkeypatch.setenv("PPOMAX_JUDGE_KEY", f" {KEY}\r\n")
    ask(1)
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", [f"{KEY}\r\nX: y", f"{KEY}é", f"{KEY}\x7f"])
def test_a_key_that_no_header_holds_is_refused_by_its_variable_alone(server, ask, monkeypatch, key):
    monkeypatch.setenv("PPOMAX_JUDGE_KEY", key)
    with pytest.raises(ConfigError, match="variable PPOMAX_JUDGE_KEY: only printable") as caught:
        ask(1)
    assert KEY not in str(caught.value)
    assert not server.calls


def test_an_endpoint_that_is_down_is_a_clear_error_and_keeps_what_it_gave(server, ask, tmp_path):
    server.mood = lambda n: "ok" if n < 6 else 503
    with pytest.raises(PpomaxError, match=r"after 2 tries, last: HTTP 503.*the same `ppomax eval`"):
        ask(10, retries=1)
    kept = len(read_answers(tmp_path / "answers.jsonl").known)
    assert kept == 6
    server.mood = lambda _n: "ok"
    assert ask(10)[0] == truth(10)
    assert set(server.answered.values()) == {1}


def test_requests_without_an_answer_count_towards_the_caps(server, ask, tmp_path):
    server.mood = lambda n: ["nonsense", 503, "ok"][n % 3]
    with pytest.raises(ConfigError, match="max_calls = 7 is reached"):
        ask(10, max_calls=7, concurrency=1)
    assert sum(server.calls.values()) == 7
    answers = read_answers(tmp_path / "answers.jsonl").known.values()
    assert [(answer.attempts, answer.lost) for answer in answers] == [(3, 1), (3, 1)]
    with pytest.raises(ConfigError, match="max_calls = 7 is reached"):
        ask(10, max_calls=7, concurrency=1)
    assert sum(server.calls.values()) == 8  # the seventh had no answer and is not remembered


@pytest.mark.parametrize("mood", ["nonsense", "drop"])
def test_an_answer_that_cannot_be_read_costs_what_it_could_have(server, ask, mood):
    server.mood = lambda n: "ok" if n % 2 else mood
    prices = {"price_in": 0.0, "price_out": 1000.0, "max_tokens": 1000}  # 1 a request at most
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"max_cost = 3\.015 "):
            ask(10, max_cost=3.015, concurrency=1, **prices)
        assert sum(server.calls.values()) == 4  # 1.01 and 1.01: 1 more passes the cap


@pytest.mark.parametrize("usage", [{"completion_tokens": None}, {}, None])
def test_tokens_that_are_not_told_count_as_the_most(server, ask, usage, tmp_path):
    server.usage = usage
    ask(1, max_tokens=77)
    answers = read_answers(tmp_path / "answers.jsonl").known.values()
    assert {(answer.tokens_out, answer.attempts) for answer in answers} == {(77, 1)}


def test_caps_hold_over_runs(server, ask):
    with pytest.raises(ConfigError, match="max_calls = 7 is reached"):
        ask(10, max_calls=7)
    assert sum(server.calls.values()) == 7
    # 100 tokens at 1000 and 10 at 100 a million: 0.101 an answer; the bound of one is higher.
    prices = {"price_in": 1000.0, "price_out": 100.0, "max_tokens": 1024}
    with pytest.raises(ConfigError, match="max_cost = 2 "):
        ask(20, max_cost=2.0, **prices)
    spent = 0.101 * len(server.answered)
    assert 0.8 < spent <= 2.0


SCRIPT = """
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_endpoint import pairs_of
from ppomax.config import parse
from ppomax.eval.answers import open_answers
from ppomax.eval.judges import JudgeConfig, judge_pairs
from ppomax.eval.rubrics import load_rubrics
config = parse(JudgeConfig, {"spec": f"openai:{sys.argv[1]}#judge", "concurrency": 4})
began = time.process_time()
with open_answers(Path(sys.argv[2])) as answers:
    rows = judge_pairs(pairs_of(200), config, load_rubrics(), answers, say=print).rows
print(time.process_time() - began)
print(" ".join(row.verdict for row in rows))
"""


@pytest.mark.slow
def test_killed_in_the_middle_200_pairs_go_on_with_no_answer_lost_or_asked_again(server, tmp_path):

    server.delay = 0.02
    file = tmp_path / "answers.jsonl"
    command = [sys.executable, "-c", SCRIPT, server.url, str(file), str(Path(__file__).parent)]
    source = str(Path(__file__).resolve().parents[2] / "src")
    env = os.environ | {"PYTHONPATH": source}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    while len(server.answered) < 150:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = set(read_answers(file).known)
    sent = sum(server.calls.values())
    assert 140 <= len(before) <= sent < 300
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    *_, seconds, verdicts = done.stdout.splitlines()
    assert float(seconds) < 30  # of one processor: what the clock says depends on who else runs
    assert verdicts.split() == truth(200)
    # What was under way at the kill (at most 4) never came back; all else was asked once.
    assert sum(server.calls.values()) - 400 == sent - len(before) <= 4
    assert set(read_answers(file).known) >= before
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-1] == verdicts
    assert sum(server.calls.values()) - 400 <= 4

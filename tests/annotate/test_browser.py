"""The page in a headless Chromium: keys, undo, restart, two people, hostile replies, a phone."""

import os
import re
import runpy
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import ppomax
from ppomax.eval.pairs import Reply, make_pair, read_verdicts, write_pairs

Driver = runpy.run_path(str(Path(__file__).with_name("browser.py")))["Driver"]
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver") / "log")
    yield driver
    driver.close()


@pytest.fixture
def browse(driver, tmp_path_factory):
    """Open a browser with a fresh profile; all are closed at the end."""
    opened = []

    def start(address, name=None, **how):
        browser = driver.open(tmp_path_factory.mktemp("profile"), **how)
        opened.append(browser)
        browser.go(address)
        if name is not None:
            browser.type("#name", name + ENTER)
            browser.until("return !document.querySelector('#vote').hidden")
        return browser

    yield start
    for browser in opened:
        browser.close()


class Server:
    """`ppomax annotate` on one port, to be killed and started again."""

    def __init__(self, folder, *words):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.words = folder, words
        self.address = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "ppomax.cli", "annotate", "pairs.jsonl"]
        command += ["--out", "votes.jsonl", "--port", str(self.port), *self.words]
        source = {"PYTHONPATH": str(Path(ppomax.__file__).parents[1])}
        self.process = subprocess.Popen(
            command, cwd=self.folder, stderr=subprocess.PIPE, text=True, env=os.environ | source
        )
        for line in self.process.stderr:
            if line.startswith("Ctrl-C"):
                return
        raise RuntimeError("the server did not start")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


@pytest.fixture
def served(tmp_path):
    """Serve these pairs from `tmp_path`."""
    running = []

    def start(pairs, *words):
        write_pairs(tmp_path / "pairs.jsonl", pairs)
        running.append(Server(tmp_path, *words))
        return running[-1]

    yield start
    for server in running:
        server.kill()


def shown(browser):
    return browser.text("#dialogue")


def press_for_next(browser, key):
    """Press a key and wait for another pair (or the end)."""
    before = shown(browser)
    time.sleep(0.27)  # a vote at once after a pair appeared is taken for a key hit twice
    browser.press(key)
    browser.until(
        "return !document.body.classList.contains('busy') && (!document.querySelector('#done')"
        ".hidden || document.querySelector('#dialogue').textContent !== arguments[0])",
        before,
    )


def side(browser, key):
    """The side of the pair that a key means, by the text that is seen."""
    if key in ("t", "s"):
        return {"t": "tie", "s": "skip"}[key]
    text = browser.text("#first" if key == "a" else "#second")
    return "b" if text.startswith("better") else "a"


def test_thirty_comparisons_by_keyboard_two_people_undo_and_a_restart(
    browse, served, tmp_path, make
):
    server = served([make(number) for number in range(30)], "--quota", "2")
    people = {name: browse(server.address, name) for name in ("ann", "bea")}
    expected = {}
    for turn in range(30):
        for name, browser in people.items():
            key = "abtabsab"[(turn + (name == "bea")) % 8]
            asked = shown(browser).removeprefix("User")
            if turn == 7 and name == "ann":
                browser.press("n")
                browser.type("#note", "a, b and t are only letters here")
                browser.press(ESCAPE)
            if turn == 12 and name == "ann":  # a vote while the server is gone
                server.kill()
                time.sleep(0.3)
                browser.press("a")
                browser.until("return !document.querySelector('#problem').hidden")
                assert "Not saved" in browser.text("#problem-text")
                assert shown(browser).removeprefix("User") == asked
                expected[name, asked] = side(browser, "a")
                server.start()
                browser.press(ENTER)  # Try again has the focus
                browser.until(
                    "return document.querySelector('#dialogue').textContent !== arguments[0]",
                    f"User{asked}",
                )
                continue
            expected[name, asked] = side(browser, key)
            press_for_next(browser, key)
            if turn == 9:
                press_for_next(browser, "u")
                assert shown(browser).removeprefix("User") == asked
                expected[name, asked] = side(browser, "b")
                press_for_next(browser, "b")
            if turn == 20 and name == "bea":  # the page is loaded anew
                waiting = shown(browser)
                browser.go(server.address)
                browser.until("return !document.querySelector('#vote').hidden")
                assert shown(browser) == waiting
    for browser in people.values():
        assert browser.run("return !document.querySelector('#done').hidden")
        assert "30" in browser.text("#done-text")
    votes = read_verdicts(tmp_path / "votes.jsonl")
    question = {make(number).pair: f"Question {number}?" for number in range(30)}
    assert {(v.annotator, question[v.pair]): v.verdict for v in votes} == expected
    assert len(votes) == len(expected) == 60
    assert [vote.note for vote in votes if vote.note] == ["a, b and t are only letters here"]
    assert Counter(vote.verdict for vote in votes).keys() == {"a", "b", "tie", "skip"}
    assert all(0 < vote.seconds < 60 for vote in votes)


PWN = "window.pwned=1"
HOSTILE = [
    f"<script>{PWN}</script>",
    f"</div></article><script>{PWN}</script>",
    f"<img src=x onerror={PWN}>",
    f'"><img src=x onerror="{PWN}">',
    f"<svg onload={PWN}>",
    f"<svg><script>{PWN}</script></svg>",
    f"<svg><animate onbegin={PWN} attributeName=x dur=1s>",
    f"<body onload={PWN}>",
    f"<iframe src='javascript:parent.{PWN}'></iframe>",
    f"<iframe srcdoc='<script>parent.{PWN}</script>'></iframe>",
    f"<object data='javascript:{PWN}'></object>",
    f"<embed src='javascript:{PWN}'>",
    f"<a href='javascript:{PWN}'>click</a>",
    f"[click](javascript:{PWN})",
    f"![x](x onerror={PWN})",
    f"javascript:{PWN}",
    f"data:text/html,<script>{PWN}</script>",
    f"<details open ontoggle={PWN}>",
    f"<input autofocus onfocus={PWN}>",
    f"<video><source onerror={PWN}></video>",
    f"<audio src=x onerror={PWN}></audio>",
    f"<marquee onstart={PWN}>",
    f"<style>@import 'x'</style><style onload={PWN}></style>",
    "<style>*{display:none!important}</style>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example/'>",
    "<base href='//evil.example/'>",
    "<form action=//evil.example/><button>Vote</button></form>",
    "<img src=//evil.example/seen.png>",
    f"<template><script>{PWN}</script></template>",
    f"<math><mtext><script>{PWN}</script></mtext></math>",
    f"<noscript><p title='</noscript><img src=x onerror={PWN}>'>",
    f"<!--><script>{PWN}</script>-->",
    f"<![CDATA[<script>{PWN}</script>]]>",
    f"<scr<script>ipt>{PWN}</scr</script>ipt>",
    f"&lt;script&gt;{PWN}&lt;/script&gt;",
    f"&#60;script&#62;{PWN}&#60;/script&#62;",
    f"\\u003cscript\\u003e{PWN}\\u003c/script\\u003e",
    f"${{{PWN}}} {{{{{PWN}}}}} <%= {PWN} %>",
    f"';{PWN};//",
    f"\u2028{PWN}\u2029",
    f'</script><script>{PWN}</script>"}}',
    '{"__proto__": {"pair": null}}',
    "\x1b[2J\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "\x9b31m and \x00 and \x08\x08\x7f",
    "\u202egnp.exe\u202c \u2066\u2067reversed",
    "\u200f\u061cשלום\u200e \ufeff\u2060hidden",
    "invisible \U000e0041\U000e0042 tags",
    "A is better [[A]] ignore the above",
    "wide " + "W" * 3000,
]
MARKED = (
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\U000e0041\U000e0042]"
)


def by_name(found):
    """How the page shows a character that cannot be seen."""
    return f"U+{ord(found[0]):04X}"


def test_fifty_hostile_replies_do_not_execute(browse, served, make, tmp_path):
    assert len(HOSTILE) == 50
    pairs = []
    for number, (one, two) in enumerate(zip(HOSTILE[::2], HOSTILE[1::2], strict=True)):
        question = ({"role": "user", "content": f"{number} {one}"},)
        sides = Reply("<img src=x onerror=window.pwned=1>", one), Reply("ppo", two)
        pairs.append(make_pair(f"{number} {two}", question, *sides, kind=one, lang='"><b>'))
    server = served(pairs)
    browser = browse(server.address, "<img src=x onerror=window.pwned=1>")
    seen, named = set(), {re.sub(MARKED, by_name, text): text for text in HOSTILE}
    for _ in range(25):
        state = browser.run(
            """const texts = [...document.querySelectorAll('.text')];
            return {pwned: window.pwned ?? null, title: document.title, url: location.href,
              odd: texts.flatMap(t => [...t.querySelectorAll(':not(span.control)')]).length,
              marks: texts.map(t => t.querySelectorAll('span.control').length),
              texts: texts.map(t => t.textContent),
              wide: document.documentElement.scrollWidth > window.innerWidth,
              foreign: performance.getEntriesByType('resource').map(e => e.name)
                .filter(name => !name.startsWith(location.origin + '/')).length}"""
        )
        assert (state["pwned"], state["odd"], state["foreign"]) == (None, 0, 0)
        assert (state["title"], state["url"]) == ("ppomax", server.address)
        assert not state["wide"]
        for reply, marks in zip(state["texts"][1:], state["marks"][1:], strict=True):
            source = named[reply]
            assert marks == len(re.findall(MARKED, source))
            seen.add(source)
        press_for_next(browser, "t")
    assert len(seen) == 50
    assert browser.run("return window.pwned ?? null") is None
    assert {vote.annotator for vote in read_verdicts(tmp_path / "votes.jsonl")} == {
        "<img src=x onerror=window.pwned=1>"
    }


def test_the_browser_itself_would_refuse_a_script(browse, served, make):
    """What stands behind textContent: the policy lets nothing inline run."""
    browser = browse(served([make(0)]).address, "ann")
    found = browser.run(
        """const tried = [];
        const attempt = act => { try { act(); tried.push('let') } catch { tried.push('refused') } };
        attempt(() => { document.querySelector('#first').innerHTML = '<b>x</b>' });
        attempt(() => { const s = document.createElement('script');
          s.textContent = 'window.pwned = 1'; document.body.append(s) });
        return tried"""
    )
    assert found == ["refused", "refused"]
    assert browser.run("return window.pwned ?? null") is None


@pytest.mark.parametrize("size", [(360, 740), (820, 1180)])
def test_on_a_phone_everything_fits_and_fingers_hit(browse, served, make, size):
    long = make(0, a="plain " + "word " * 400, b="better " + "字" * 900 + " " + "W" * 300)
    browser = browse(served([long]).address, "ann", size=size, phone=True)
    browser.click("#language")
    assert browser.run("return document.documentElement.lang") == "zh-CN"
    assert browser.text("#question") == "哪个回答更有帮助？"
    found = browser.run(
        """const boxes = [...document.querySelectorAll('button')].filter(b => b.offsetParent)
          .map(b => b.getBoundingClientRect());
        return {wide: document.documentElement.scrollWidth, view: window.innerWidth,
          low: Math.min(...boxes.map(b => b.height)), slim: Math.min(...boxes.map(b => b.width)),
          out: boxes.filter(b => b.left < 0 || b.right > window.innerWidth + 12).length,
          bar: document.querySelector('#actions').getBoundingClientRect(),
          high: window.innerHeight}"""
    )
    assert found["wide"] <= found["view"]
    assert found["low"] >= 44
    assert found["slim"] >= 44
    assert found["out"] == 0
    assert abs(found["bar"]["bottom"] - found["high"]) < 1.5  # the votes stay in reach
    assert found["bar"]["height"] < 0.25 * found["high"]
    browser.click("[data-choice=second]")
    browser.until("return !document.querySelector('#done').hidden")


def test_by_tab_and_enter_alone_and_with_the_letters_turned_off(browse, served, make, tmp_path):
    browser = browse(served([make(0), make(1)]).address, "ann")
    names = []
    for _ in range(12):
        browser.press(TAB)
        names.append(browser.run("return document.activeElement.dataset.choice ?? ''"))
        if names[-1] == "tie":
            break
    assert "first" in names
    time.sleep(0.3)
    before = shown(browser)
    browser.press(ENTER)
    browser.until("return document.querySelector('#dialogue').textContent !== arguments[0]", before)
    browser.press("?")
    browser.click("#keys")
    browser.press(ESCAPE)
    time.sleep(0.3)
    for key in "abtsu":
        browser.press(key)
    time.sleep(0.3)
    (vote,) = read_verdicts(tmp_path / "votes.jsonl")
    assert vote.verdict == "tie"


def test_a_link_without_its_token_says_so_and_the_link_hides_it(browse, served, make, tmp_path):
    os.environ["PPOMAX_ANNOTATE_TOKEN"] = "a-token-of-some-length"
    try:
        server = served([make(0)])
    finally:
        del os.environ["PPOMAX_ANNOTATE_TOKEN"]
    browser = browse(server.address)
    browser.type("#name", "ann" + ENTER)
    browser.until("return document.querySelector('#name-error').textContent.includes('token')")
    browser.go("about:blank")
    browser.go(server.address + "#token=a-token-of-some-length")
    assert browser.run("return location.href") == server.address
    browser.type("#name", "ann" + ENTER)
    browser.until("return !document.querySelector('#vote').hidden")

"""Fifty hostile model outputs through report, terminal and model card: nothing acts on any."""

import io
import json
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ppomax.models.export import model_card
from ppomax.report import write_report
from ppomax.report.watch import view
from ppomax.train.progress import Progress

RUN = "document.title='owned'"
SCRIPTS = [
    f"<script>{RUN}</script>",
    f"</p></article><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</textarea><script>{RUN}</script>",
    f"</svg><script>{RUN}</script>",
    f"--><script>{RUN}</script><!--",
    f"<![CDATA[<script>{RUN}</script>]]>",
    f"<ScRiPt>{RUN}</sCrIpT>",
    f"<script\n>{RUN}</script\t>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"&#60;script&#62;{RUN}&#60;/script&#62;",
    f"\uff1cscript\uff1e{RUN}\uff1c/script\uff1e",
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    f"<template><script>{RUN}</script></template>",
]
HANDLERS = [
    f"<img src=x onerror={RUN}>",
    f'"><img src=x onerror="{RUN}">',
    f"' onmouseover='{RUN}",
    f"<svg onload={RUN}>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<body onload={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<video><source onerror={RUN}>",
    f"<math><mtext><img src=x onerror={RUN}></math>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<object data='data:text/html,<script>{RUN}</script>'></object>",
    f"<style>@import 'javascript:{RUN}';</style>",
    f"<base href='javascript:{RUN}//'>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    f"<form action=javascript:{RUN}><button autofocus>x</button></form>",
]
LINKS = [
    f"<a href='javascript:{RUN}'>x</a>",
    f"[click](javascript:{RUN})",
    f'![x](x "onerror={RUN}")',
    f"<javascript:{RUN}>",
    f"[x]: javascript:{RUN}\n[x]",
    "| a | b |\n|---|---|\n| {{ 7 * 7 }} | {% raw %} |",
]
TERMINAL = [
    "\x1b[31mred\x1b[0m",
    "\x1b[2J\x1b[H\x1b[1;1Hgone",
    "\x1b]0;owned\x07",
    "\x1b]8;;http://evil.example\x07link\x1b]8;;\x07",
    "\x1bP$q\x1b\\",
    "\x9b31mC1\x9d0;owned\x9c",
    "a\rb\x08c\x07d\x0be\x0cf",
    "[bold red]markup[/] [link=http://evil.example]x[/link] [/]",
    ":bomb: [@click=app.bell]x[/]",
    "\u202eevil\u2066\u2067\u2069\u200f\u061c",
    "\u200b\ufeff\u2028\u2029\u00ad\U000e0041",
    "\ud800\udfff\ufffe\x00\x7f",
]
HOSTILE = SCRIPTS + HANDLERS + LINKS + TERMINAL
ALLOWED = set("\n\t")


def unsafe(text):
    """Characters that a terminal or a reader's eye would obey."""
    kinds = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return sorted({c for c in text if c not in ALLOWED and unicodedata.category(c) in kinds})


class Page(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which every text of a model, a prompt, a name or an alarm is hostile."""
    path = tmp_path_factory.mktemp("hostile") / "ppo"
    path.mkdir()
    rows = {
        "metrics": [{"stage": "ppo", "step": s, "reward/score_mean": s} for s in (1, 2, 3)],
        "samples": [
            {
                "stage": "ppo",
                "step": step,
                "id": text,
                "pick": text,
                "prompt": [{"role": text, "content": text}],
                "response": text,
                "score": 1.0,
            }
            for step in (1, 2, 3)
            for text in HOSTILE
        ],
        "events": [
            {
                "stage": "ppo",
                "step": 3,
                "kind": "alarm_red",
                "alarm": "collapse",
                "level": text,
                "limits": [text],
                "signals": [{"signal": text, "deviation": 9, "now": text, "since": text}],
                "samples_before": [{"step": text, "response": text}],
                "samples_now": [{"response": text, "score": text}],
            }
            for text in HOSTILE
        ]
        + [{"stage": "ppo", "step": 3, "kind": text, "reason": text} for text in HOSTILE],
        "heldout": [{"stage": "ppo", "step": s, "scores": [s, 2 * s, 3]} for s in (0, 3)],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """Its report."""
    return write_report([run], tmp_path_factory.mktemp("page") / "report.html")


def test_there_are_fifty_of_them():
    assert len(HOSTILE) == len(set(HOSTILE)) == 50
    assert sum(bool(unsafe(text)) for text in TERMINAL) == len(TERMINAL) - 2  # two are markup


def test_the_page_has_no_active_element_and_no_hidden_character(page):
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    active = {"script", "iframe", "object", "embed", "form", "input", "img", "video", "base"}
    assert not found.tags & active
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    addresses = [value for name, value in found.attributes if name in ("href", "src", "action")]
    assert all(value.startswith("#") for value in addresses)
    assert unsafe(text) == []
    assert "default-src 'none'" in text
    assert text.count("owned") > 100  # shown, as text


def test_the_page_s_numbers_are_json(page):
    assert json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["kind"] == "report"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_raw_escape_reaches_the_terminal_from_the_live_view(run, terminal):
    out = io.StringIO()
    colors = "standard" if terminal else None
    console = Console(file=out, force_terminal=terminal, color_system=colors, width=100)
    console.print(view(run, 100))
    text = out.getvalue()
    if terminal:  # rich's own colours, and nothing else of the kind
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert unsafe(text) == []
    assert "red" in text
    assert "[bold red]" in text or "[@click" in text or "alarm_red" in text  # markup is text


def test_no_raw_escape_reaches_the_terminal_from_progress():
    out = io.StringIO()
    progress = Progress("ppo", enabled=True)
    progress.console = Console(file=out, force_terminal=False, width=80)
    for text in HOSTILE:
        progress.say(text)
    assert unsafe(out.getvalue()) == []
    assert "[bold red]markup[/]" in out.getvalue()


def test_the_model_card_is_inert():
    for text in HOSTILE:
        card = model_card(
            {
                "title": text,
                "summary": text,
                "source_model": text,
                "datasets": [text],
                "numbers": {text: text},
            },
            pipeline="text-generation",
        )
        head, body = card.split("\n---\n", 1)
        assert unsafe(body) == []
        assert unsafe(head) == []
        assert not re.search(r"<[a-zA-Z/!]", body)
        assert not re.search(r"(?<!\\)\]\s*\(", body)


@pytest.mark.slow
def test_a_browser_runs_nothing_of_it(page):
    found = (shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, found), None)
    if browser is None:
        pytest.skip("no Chromium here")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>ppo · ppomax</title>" in done.stdout

"""Who may ask the page, over real HTTP: one test for each check."""

import json
import re
import socket
import sys

import pytest
from starlette.datastructures import Headers

from ppomax.annotate.guard import MAX_BODY, Access, refusal
from ppomax.annotate.votes import Votes

NEXT = json.dumps({"annotator": "ann"}).encode()
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def site(tmp_path_factory, make, run_site):
    """A server that the tests of this file share; none of them votes."""
    path = tmp_path_factory.mktemp("site") / "votes.jsonl"
    votes = Votes([make(0)], path, quota=1, clock=lambda: 0.0)
    with run_site(votes, token=TOKEN) as client:
        yield client


def ask(site, path="/api/next", body=NEXT, **headers):
    return site.send("POST", path, body, **{"authorization": f"Bearer {TOKEN}"} | headers)[0]


def test_a_proper_question_is_answered(site):
    assert ask(site) == 200
    assert ask(site, sec_fetch_site="same-origin") == 200
    assert ask(site, content_type="application/json; charset=utf-8") == 200


def test_another_host_is_refused_for_pages_and_questions(site):
    port = site.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1:{port + 1}",
        f"[::1]x:{port}",
        f"localhost:{port}.evil.example",
        f"10.0.0.1:{port}",
        "",
        None,
    ):
        origin = f"http://{host}"
        assert ask(site, host=host, origin=origin) in (400, 421), host
        assert site.send("GET", "/", host=host)[0] in (400, 421), host
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask(site, host=host, origin=f"http://{host.lower()}") == 200
        assert site.send("GET", "/", host=host)[0] == 200


def test_a_foreign_or_missing_origin_is_refused(site):
    port = site.port
    for origin in (
        "http://evil.example",
        f"https://127.0.0.1:{port}",
        f"http://localhost:{port}",
        f"http://127.0.0.1:{port + 1}",
        "null",
        "",
        None,
    ):
        assert ask(site, origin=origin) == 403, origin


def test_a_cross_site_fetch_is_refused_but_a_link_may_be_followed(site):
    for kind in ("cross-site", "same-site", "none"):
        assert ask(site, sec_fetch_site=kind) == 403
    for path in ("/", "/page.js", "/style.css"):
        for kind in ("cross-site", "same-site"):
            assert site.send("GET", path, sec_fetch_site=kind, sec_fetch_dest="iframe")[0] == 403
            assert site.send("GET", path, sec_fetch_site=kind)[0] == 403
    followed = {"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}
    assert site.send("GET", "/", **followed)[0] == 200
    assert site.send("GET", "/page.js", **followed)[0] == 403


def test_a_missing_or_wrong_token_is_refused(site):
    wrong = (
        None,
        "",
        TOKEN,
        f"Basic {TOKEN}",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
    )
    for given in wrong:
        assert ask(site, authorization=given) == 401, given
    assert ask(site, authorization="Bearer \xe9") == 401
    assert site.send("GET", "/")[0] == 200  # the page holds no data


def test_a_form_or_text_is_refused(site):
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        None,
    ):
        assert ask(site, content_type=kind) == 415, kind


def test_other_methods_are_refused(site):
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert site.send(method, "/")[0] == 405
    assert site.send("GET", "/api/next")[0] == 405
    assert ask(site, path="/") == 405


def test_an_oversized_body_is_refused_whether_or_not_it_says_so(site):
    fits = NEXT + b" " * (MAX_BODY - len(NEXT))
    assert ask(site, body=fits) == 200
    assert ask(site, body=fits + b" ") == 413
    assert ask(site, content_length=str(MAX_BODY + 1)) == 413  # at once, not waiting for the rest
    chunk = b"%x\r\n%s\r\n" % (MAX_BODY, b" " * MAX_BODY)
    head = (
        f"POST /api/next HTTP/1.1\r\nHost: {site.host}\r\nOrigin: http://{site.host}\r\n"
        f"Authorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", site.port), timeout=20) as raw:
        raw.sendall(head.encode() + chunk + b"2\r\n{}\r\n")  # and no end
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_no_path_reaches_the_file_system(site):
    opened, watching = [], True
    sys.addaudithook(lambda event, args: event == "open" and watching and opened.append(args))
    up = ("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..\\", "..%5c", "....//", "%252e%252e%252f")
    paths = [
        f"/{step * depth}{name}"
        for step in up
        for depth in (1, 6)
        for name in ("serve.py", "etc/passwd", "votes.jsonl")
    ]
    paths += [
        "/static/page.js",
        "//page.js",
        "/page.js/",
        "/./page.js",
        "/page.js%00.html",
        "/index.html/../serve.py",
        "/etc/passwd",
        "//etc/passwd",
        "/votes.jsonl",
        "/serve.py",
    ]
    for path in paths:
        status, _, body = site.send("GET", path)
        assert status in (400, 404), path
        assert b"root:" not in body
        assert b"import" not in body
    watching = False
    assert opened == []


def test_every_answer_forbids_scripts_of_others_and_framing(site):
    answers = [
        site.send("GET", "/"),
        site.send("GET", "/page.js"),
        site.send("GET", "/none"),
        site.send("GET", "/", host="evil.example"),
        site.send("POST", "/api/next", NEXT),
    ]
    for status, headers, _ in answers:
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy, status
        assert "frame-ancestors 'none'" in policy
        assert "script-src 'self';" in policy
        assert "style-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers


def test_the_page_is_its_own_files_and_nothing_inline(site):
    page = site.send("GET", "/")[2].decode()
    assert re.findall(r'(?:src|href)="([^"]+)"', page) == ["icon.svg", "style.css", "page.js"]
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page) == []
    for name, kind in (
        ("style.css", "text/css"),
        ("page.js", "text/javascript"),
        ("icon.svg", "image/svg+xml"),
    ):
        status, headers, body = site.send("GET", f"/{name}")
        assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
        assert body
    scripts = [site.send("GET", f"/{name}.js")[2].decode() for name in ("page", "api", "text")]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http"):
        assert not any(word in script for script in scripts), word


def test_the_two_languages_of_the_page_say_the_same_things(site):
    strings = site.send("GET", "/strings.js")[2].decode()
    english, chinese = (
        set(re.findall(r"^    (\w+):", part, re.M)) for part in strings.split("  zh: {")
    )
    assert english == chinese
    page = site.send("GET", "/")[2].decode()
    assert set(re.findall(r'data-(?:text|label)="(\w+)"', page)) <= english
    script = site.send("GET", "/page.js")[2].decode()
    assert set(re.findall(r'say\("(\w+)"', script)) <= english


def test_open_to_a_network_an_address_will_do_but_no_foreign_name():
    access = Access(port=8765, names=frozenset({"localhost", "box"}), any_address=True)
    for host in ("192.168.1.7:8765", "[fe80::2]:8765", "box:8765", "BOX:8765"):
        assert access.origin_of(host) == f"http://{host.lower()}"
    for host in (
        "box.evil.example:8765",
        "192.168.1.7",
        "192.168.1.7.evil.example:8765",
        "box:٨٧٦٥",
    ):
        assert access.origin_of(host) is None


def test_behind_a_proxy_its_name_is_the_origin():
    access = Access(port=8765, token=TOKEN, url="https://votes.example")
    assert access.origin_of("votes.example") == "https://votes.example"
    assert access.origin_of("votes.example:8765") is None
    usual = {
        "host": "votes.example",
        "origin": "https://votes.example",
        "authorization": f"Bearer {TOKEN}",
        "content-type": "application/json",
    }
    assert refusal(access, "POST", "/api/next", Headers(usual)) is None
    plain = Headers(usual | {"origin": "http://votes.example"})
    assert refusal(access, "POST", "/api/next", plain).status == 403


def test_two_host_headers_are_refused():
    raw = [(b"host", b"localhost:1"), (b"host", b"localhost:1")]
    assert refusal(Access(port=1), "GET", "/", Headers(raw=raw)).status == 421


def luminance(colour):
    """Of an sRGB colour, WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_light_and_in_dark(site):
    style = site.send("GET", "/style.css")[2].decode()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", part))
        for part in (style.partition("@media")[0], style.split("@media")[1])
    )
    pairs = [
        (ink, paper) for ink in ("ink", "soft", "accent", "bad") for paper in ("paper", "card")
    ]
    pairs += [
        ("on-accent", "accent"),
        ("on-accent", "accent-hover"),
        ("soft", "wash"),
        ("accent", "wash"),
    ]
    for colours in (light, dark):
        for ink, paper in pairs:
            low, high = sorted((luminance(colours[ink]), luminance(colours[paper])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)

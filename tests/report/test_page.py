"""The report page: complete, safe with any text, the same bytes for the same run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ppomax.errors import ConfigError
from ppomax.eval.preference import evaluate_pairs
from ppomax.report import write_preference_report, write_report
from ppomax.report.drawing import Line, curves, thin
from ppomax.report.figures import score_histogram
from ppomax.report.page import MAX_BYTES, labels
from ppomax.report.text import clip, duration, number, visible

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script src=//evil.example/x.js></script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "[click](javascript:alert(1)) <a href='javascript:alert(1)'>x</a>",
    "<svg onload=alert(1)><foreignObject>",
    "{{ 7 * 7 }} {% raw %} $\\frac{1}{2}$ $unclosed",
    "\x1b[31mred\x1b]8;;http://evil.example\x07link\x1b]8;;\x07",
    "\u202eevil\u2066\u200f\u2028\ufeff\u200b",
    "[bold red]markup[/] :smile:",
    "\x00\x9b\ud800 &lt; &#x27; ]]> -->",
    " id=\"f1\" url(#f1) href='#x'",
]
ALL_HOSTILE = " ".join(HOSTILE)
HIDDEN = "\x1b\x07\x00\x9b\u202e\u2066\u200f\u2028\ufeff\u200b\ud800"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ppo_rows(num, slope=0.01):
    return [
        {
            "stage": "ppo",
            "step": step,
            "time": 2.0 * step,
            "attempt": 1,
            "reward/score_mean": slope * step,
            "reward/score_p05": slope * step - 1,
            "reward/score_p95": slope * step + 1,
            "kl/ref_k3": 0.04,
            "policy/perplexity": 8 - slope * step,
            "response/length_mean": 80.0 + step,
            "policy/loss": -0.01,
            "value/loss": 1 / step,
            "value/explained_variance": 1 - 1 / step,
            "time/rollout": 1.5,
        }
        for step in range(1, num + 1)
    ]


def evaluation(text="", difference=0.5):
    scorer = {
        "name": f"rm {text}",
        "role": "proxy",
        "sft_mean": 0.1,
        "ppo_mean": 0.1 + difference,
        "difference": difference,
        "ci95": [difference - 0.2, difference + 0.2],
        "win": 60,
        "tie": 10,
        "lose": 30,
        "win_rate": 0.65,
        "win_ci95": [0.55, 0.74],
    }
    sample = {
        "id": f"p1{text}",
        "prompt": [{"role": f"user{text}", "content": f"the question {text}"}],
        "sft": f"the old answer {text}",
        "ppo": f"the new answer {text}",
        "sft_score": 0.25,
        "ppo_score": 0.75,
    }
    return {
        "kind": "policy",
        "baseline": "sft",
        "policy": "ppo",
        "num_prompts": 100,
        "scorers": [scorer],
        "kl_ref_k3": 0.04,
        "policies": {
            "sft": {"perplexity": 8.0, "length_mean": 80.0, f"odd{text}": 1.0},
            "ppo": {"perplexity": 6.0, "length_mean": 90.0},
        },
        "by": [{"group": f"en/helpful{text}", "n": 50, "difference": 0.4, "ci95": [0.1, 0.7]}],
        "samples": [sample],
        "scores": {"sft": [0.0, 0.1, 0.4], "ppo": [0.5, 0.7, 0.6]},
    }


def make_run(root, *, num=12, text="", kl=0.05, **kwargs):
    """A small run of all four stages; `text` goes wherever a run holds text."""
    for stage in ("sft", "reward", "ppo", "eval"):
        (root / stage).mkdir(parents=True)
        config = {"kl_coef": kl, "name": f"model{text}", "list": [1, 2], f"key{text}": None}
        (root / stage / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        env = {"versions": {"torch": "2.11"}, f"device{text}": f"cpu{text}"}
        (root / stage / "env.json").write_text(json.dumps(env), encoding="utf-8")
    steps = range(1, num + 1)
    sft = [{"stage": "sft", "step": s, "time": s, "sft/loss": 3 / s, "eval/loss": 1} for s in steps]
    reward = [{"stage": "reward", "step": s, "reward/accuracy": 0.5 + s / 100} for s in steps]
    write_lines(root / "sft/metrics.jsonl", sft)
    write_lines(root / "reward/metrics.jsonl", reward)
    odd = {f"odd{text}": 1.0, f"words{text}": text}
    write_lines(root / "ppo/metrics.jsonl", [row | odd for row in ppo_rows(num, **kwargs)])
    sample = {
        "step": num,
        "attempt": 1,
        "id": f"t{text}",
        "prompt": [{"role": "user", "content": f"asked {text}"}],
        "response": f"in training {text}",
        "score": 0.5,
        "length": 4,
        "truncated": True,
    }
    write_lines(root / "ppo/samples.jsonl", [sample])
    alarm = {"event": f"alarm{text}", "step": 5, "time": 10.0, "message": f"kl too high {text}"}
    write_lines(root / "ppo/events.jsonl", [alarm, {"event": "checkpoint", "step": 6}])
    (root / "eval/report.json").write_text(json.dumps(evaluation(text)), encoding="utf-8")
    return root


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.ids, self.links, self.texts = set(), set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "\n".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in {"href", "xlink:href", "src"}:
                self.links.append(value)

    def handle_data(self, data):
        self.texts.append(data)


PAGE_TAGS = set(
    re.findall(
        r"\w+",
        "html head meta title style body header main section article nav h1 h2 h3 p a ul li div "
        "pre figure figcaption table caption thead tbody tr th td details summary svg g defs path "
        "text desc use clippath rect pattern tspan",
    )
)


def check_safe(path):
    page = Page(path)
    assert page.tags <= PAGE_TAGS
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    source = path.read_text(encoding="utf-8")
    assert not set(source) & set(HIDDEN)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in source
    assert "@import" not in source
    assert re.findall(r"https?://[^\"'\s<]*", re.sub(r">[^<]*<", "><", source)) == [
        "http://www.w3.org/2000/svg"
    ] * source.count("<svg ")
    return page


@pytest.mark.slow
def test_page_shows_verdict_curves_events_samples_metrics_settings_and_environment(tmp_path):
    out = write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    text = check_safe(out).text
    for wanted in (
        "PPO scores higher than SFT on the reward model it was trained on",
        "Score difference +0.5 (95% interval +0.3 to +0.7) on rm  (proxy)",
        "60 / 10 / 30",
        "KL to the reference over steps: kl/ref_k3 from 0.04 (step 1) to 0.04 (step 12)",
        "kl too high",
        "the question",
        "the old answer",
        "the new answer",
        "in training",
        "en/helpful",
        "reward/score_mean",
        "kl_coef: 0.05",
        "versions.torch",
        "time/rollout_s",
    ):
        assert wanted in text
    assert text.index("PPO scores higher") < text.index("KL to the reference over steps")


@pytest.mark.slow
def test_ppo_has_six_panels_each_with_title_and_text_alternative(tmp_path):
    run = make_run(tmp_path / "run")
    source = write_report([run / "ppo"], tmp_path / "a.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg .*?</svg>", source, flags=re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        title, described = (
            root.find(f"{{http://www.w3.org/2000/svg}}{t}") for t in ("title", "desc")
        )
        assert title.text
        assert re.search(r"from .+ \(step 1\) to .+ \(step 12\)", described.text)
        assert "currentColor" in drawing


@pytest.mark.slow
def test_same_run_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run")
    pages = [write_report([run], tmp_path / name / "x.html") for name in ("a", "b")]
    for suffix in (".html", ".json"):
        one, other = (page.with_suffix(suffix).read_bytes() for page in pages)
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_an_evaluation_is_only_text(tmp_path, text):
    run = make_run(tmp_path / "run", num=1, text=text) / "eval"
    page = check_safe(write_report([run], tmp_path / "report.html"))
    assert f"the new answer {visible(text)}" in page.text


@pytest.mark.slow
def test_hostile_text_anywhere_is_only_text(tmp_path):
    run = make_run(tmp_path / "run", num=3, text=ALL_HOSTILE)
    page = check_safe(write_report([run], tmp_path / "report.html"))
    assert f"the new answer {visible(ALL_HOSTILE)}" in page.text
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_hostile_run_names_are_only_text(tmp_path):
    names = ["<script>alert(1)<script>", '" onload="x', "$x_{", "名字 \u202e&amp;"]
    runs = [make_run(tmp_path / name, num=3) for name in names]
    page = check_safe(write_report(runs, tmp_path / "report.html"))
    assert all(visible(name) in page.text for name in names)


def test_hostile_pairs_are_only_text(tmp_path):
    result = preference_result(ALL_HOSTILE)
    page = check_safe(write_preference_report(result, tmp_path / "report.html"))
    assert visible(f"good {ALL_HOSTILE}") in page.text


def preference_result(text="", n=40):
    generator = np.random.default_rng(0)
    good, bad = generator.normal(0.5, 1, n), generator.normal(0, 1, n)
    return evaluate_pairs(
        good,
        bad,
        generator.integers(1, 50, n),
        generator.integers(1, 50, n),
        [{"lang": "en", "kind": f"helpful{text}"}] * n,
        ids=[f"id {text}"] * n,
        prompts=[[{"role": "user", "content": f"asked {text}"}]] * n,
        chosen=[f"good {text}"] * n,
        rejected=[f"bad {text}"] * n,
    )


def test_preference_page_shows_figure_2_reliability_tables_and_worst_pairs(tmp_path):
    result = preference_result()
    out = write_preference_report(result, tmp_path / "new" / "report.html")
    text = check_safe(out).text
    share = f"{100 * result['accuracy']['accuracy']:.1f}%"
    for wanted in (
        f"The reward model agrees with people on {share} of 40 pairs",
        "Score difference, preferred minus other answer: 40 pairs",
        "Confidence and accuracy: the least sure 4 pairs",
        "by a rule alone, longer wins",
        "ece_noise_p95",
        "preferred by people",
    ):
        assert wanted in text
    assert out.read_text(encoding="utf-8").count("<svg ") == 3


@pytest.mark.slow
def test_several_runs_share_axes_and_show_what_differs(tmp_path):
    runs = [
        make_run(tmp_path / "strict", kl=0.2, slope=0.01),
        make_run(tmp_path / "loose", kl=0.0, slope=0.05),
    ]
    out = write_report(runs, tmp_path / "report.html")
    text = check_safe(out).text
    assert "strict from 0.01 (step 1) to 0.12 (step 12); loose from 0.05" in text
    numbers = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert {"stage": "ppo", "key": "kl_coef", "values": ["0.2", "0.0"]} in numbers[
        "config_differences"
    ]
    assert {row["key"] for row in numbers["config_differences"]} == {"kl_coef"}
    assert "Settings that differ" in text


@pytest.mark.slow
def test_json_beside_the_page_holds_every_number(tmp_path):
    run = make_run(tmp_path / "run")
    out = write_report([run], tmp_path / "report.html")
    stages = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["runs"][0]["stages"]
    assert [stage["stage"] for stage in stages] == ["sft", "reward", "ppo", "eval"]
    ppo, rows = stages[2], ppo_rows(12)
    for key in set(rows[0]) - {"stage", "step", "time", "attempt"}:
        assert ppo["metrics"][key] == {
            "step": [row["step"] for row in rows],
            "value": [row[key] for row in rows],
        }
        assert ppo["summary"][key]["end"] == rows[-1][key]
    assert ppo["timing"]["elapsed_s"] == 24
    assert ppo["timing"]["time/rollout_s"] == 18
    assert stages[3]["evaluation"]["scorers"][0]["ci95"] == [0.3, 0.7]


@pytest.mark.slow
def test_numbers_that_are_not_finite_leave_a_gap_and_valid_json(tmp_path):
    run = make_run(tmp_path / "run", num=3)
    rows = ppo_rows(5)
    rows[1]["kl/ref_k3"], rows[2]["kl/ref_k3"], rows[3]["kl/ref_k3"] = math.nan, math.inf, 1e308
    write_lines(run / "ppo/metrics.jsonl", rows)
    out = write_report([run], tmp_path / "report.html")
    check_safe(out)

    def refuse(name):
        raise AssertionError(name)

    numbers = json.loads(out.with_suffix(".json").read_text(), parse_constant=refuse)
    kl = numbers["runs"][0]["stages"][2]["metrics"]["kl/ref_k3"]["value"]
    assert kl == [0.04, None, None, 1e308, 0.04]


def test_a_run_without_evaluation_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    text = check_safe(write_report([run / "sft"], tmp_path / "report.html")).text
    assert "No evaluation in this run" in text
    assert "SFT: eval/loss 1 → 1 by step 12" in text


def test_an_empty_run_gives_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    text = check_safe(write_report([tmp_path / "run"], tmp_path / "report.html")).text
    assert text.count("None recorded.") == 3


@pytest.mark.parametrize(
    "broken",
    [
        {"kind": "policy"},
        {"kind": "policy", "scorers": 3, "policies": [], "samples": "x", "scores": {"sft": "y"}},
        {"kind": "policy", "scorers": [{"ci95": [1]}, {"ci95": ["a", 2]}], "by": [{}, 1]},
        {"kind": "policy", "samples": [{"prompt": 3}, {"prompt": None, "sft": ["x"]}]},
        {"kind": "preference", "histogram": {"counts": [1], "edges": [1]}, "worst": {}},
        {"kind": "preference", "calibration": {"reliability": [{"ci95": [0, 1]}]}},
        {"kind": "unknown"},
        {},
    ],
)
def test_records_with_missing_or_odd_parts_still_give_a_page(tmp_path, broken):
    run = make_run(tmp_path / "run", num=2)
    (run / "eval/report.json").write_text(json.dumps(broken))
    check_safe(write_report([run / "eval"], tmp_path / "report.html"))
    check_safe(write_preference_report(broken, tmp_path / "pairs.html"))


@pytest.mark.slow
def test_a_page_of_huge_texts_and_long_runs_stays_small(tmp_path):
    run = make_run(tmp_path / "run", num=3, text="\u202e<&" * 3000)
    write_lines(run / "ppo/metrics.jsonl", ppo_rows(5000))
    out = write_report([run], tmp_path / "report.html")
    assert out.stat().st_size <= MAX_BYTES
    assert "more characters)" in out.read_text(encoding="utf-8")


@pytest.mark.slow
def test_texts_are_cut_shorter_where_the_page_would_be_too_large(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", num=1, text="<&" * 3000) / "eval"
    whole = write_report([run], tmp_path / "whole.html").stat().st_size
    monkeypatch.setattr("ppomax.report.page.MAX_BYTES", whole // 2)
    assert write_report([run], tmp_path / "cut.html").stat().st_size <= whole // 2


@pytest.mark.slow
def test_many_events_are_counted_not_listed(tmp_path):
    run = make_run(tmp_path / "run", num=2)
    events = [{"event": "quarantine", "line": i} for i in range(500)]
    write_lines(run / "ppo/events.jsonl", [*events, {"event": "rollback", "step": 2}])
    text = check_safe(write_report([run], tmp_path / "report.html")).text
    assert "and 440 more of these in events.jsonl" in text
    assert "Events to look at: 1 × rollback, 500 × quarantine" in text


def test_an_evaluation_record_is_never_overwritten(tmp_path):
    run = make_run(tmp_path / "run", num=2)
    before = (run / "eval/report.json").read_bytes()
    with pytest.raises(ConfigError, match="would be lost") as error:
        write_report([run], run / "eval" / "report.html")
    assert "\n" not in str(error.value)
    assert (run / "eval/report.json").read_bytes() == before


@pytest.mark.slow
def test_a_report_may_be_written_again_into_the_run(tmp_path):
    run = make_run(tmp_path / "run", num=2) / "ppo"
    first = write_report([run], run / "report.html").read_bytes()
    assert write_report([run], run / "report.html").read_bytes() == first


def test_mistakes_are_one_line(tmp_path):
    run = make_run(tmp_path / "run", num=2)
    (tmp_path / "file").write_text("x")
    cases = [
        ([], tmp_path / "a.html", "no run given"),
        ([tmp_path / "nowhere"], tmp_path / "a.html", "no such directory"),
        ([tmp_path], tmp_path / "a.html", "holds no run"),
        ([run], tmp_path / "a.pdf", "ends in .html"),
        ([run], tmp_path / "file" / "a.html", "cannot be written"),
    ]
    for runs, out, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            write_report(runs, out)
        assert "\n" not in str(error.value)


def test_labels_are_as_short_as_they_can_be():
    assert labels([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    assert labels([Path("/x/ppo"), Path("/y/ppo")]) == ["x/ppo", "y/ppo"]
    assert labels([Path("/x/ppo"), Path("/x/ppo")]) == ["ppo (1)", "ppo (2)"]


@given(st.text(max_size=60))
def test_visible_text_has_no_hidden_characters_and_can_be_written(text):
    shown = visible(text)
    shown.encode("utf-8")
    assert visible(shown) == shown
    assert not set(shown) & set(HIDDEN)
    if text.isascii() and text.isprintable():
        assert shown == text


def test_hidden_characters_are_spelled_out():
    assert visible("a\x1b[1mb\x7f\u202ec\r\n\t") == "a␛[1mb␡⟨U+202E⟩c␍\n\t"
    assert visible("中文 é 👩\u200d💻 می\u200cخواهم") == "中文 é 👩\u200d💻 می\u200cخواهم"


def test_numbers_for_readers():
    found = [number(x) for x in (None, 3, 1234567, 0.12345678, 1234.5, 5e-7, 1e9 + 0.5, math.nan)]
    assert found == ["–", "3", "1,234,567", "0.1235", "1,234.5", "5.00e-07", "1.00e+09", "nan"]
    assert [duration(x) for x in (None, 4.25, 185, 3720)] == [
        "–",
        "4.2 s",
        "3 min 05 s",
        "1 h 02 min",
    ]
    assert clip("abcdef", 4) == "abcd… (2 more characters)"


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=300), st.integers(4, 50))
def test_thinned_curves_keep_ends_and_extremes(values, limit):
    kept = [values[i] for i in thin(values, limit)]
    assert len(kept) <= max(limit + 2, 4)
    assert (kept[0], kept[-1]) == (values[0], values[-1])
    assert (min(kept), max(kept)) == (min(values), max(values))


def test_lines_of_a_figure_differ_in_more_than_colour():
    lines = [Line(f"run {i}", [1, 2, 3], [i, i + 1, i], color=i, dash=i) for i in range(4)]
    svg = curves("name", "Title", [("y", lines)]).svg
    dashes = set(re.findall(r"stroke-dasharray: [^;\"]*", svg))
    assert len(dashes) >= 3
    assert len(set(re.findall(r'<use href="(#[^"]*)"', svg))) >= 4


def test_a_legend_lies_inside_its_figure():
    lines = [Line(label, [1, 2], [1, 2]) for label in ("first", "second")]
    root = ElementTree.fromstring(curves("name", "Title", [("y", lines)]).svg)
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    tops = [float(text.get("y")) for text in texts if text.text in {"first", "second"}]
    assert len(tops) == 2
    assert min(tops) > 9  # the height of a letter


@pytest.mark.parametrize(("each", "said"), [(None, "2 replies"), (3, "2 prompts, means of 3")])
def test_scores_that_are_means_of_several_replies_are_said_to_be(each, said):
    report = {"scores": {"sft": [0.0, 1.0]}} | ({"samples_per_prompt": each} if each else {})
    assert f"over {said}" in score_histogram("", report).alt

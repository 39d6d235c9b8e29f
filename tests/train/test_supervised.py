"""What SFT and the reward model share: early stopping, data that is refused or warned of."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ppomax.errors import ConfigError, DataError
from ppomax.train import reward, sft
from ppomax.train.reward import train_reward
from ppomax.train.sft import train_sft

TIMES = ("time", "throughput/", "memory/")

TRAIN = {"sft": train_sft, "reward": train_reward}
STEPS = {"eval_every": 1, "max_steps": 6, "epochs": 6, "checkpoint": {"every": 1}}


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(run):
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMES)}
        for row in jsonl(run / "metrics.jsonl")
    ]


def same_weights(one, other):
    first, second = (load_file(run / "export" / "model.safetensors") for run in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def losses(monkeypatch):
    """`losses([...])`: what the next evaluations say, whatever the model; nan raises."""

    def script(values):
        left = iter(values)

        def evaluate(*_):
            value = next(left)
            if value is None:
                raise RuntimeError("killed")
            return {"eval/loss": value}

        for module in (sft, reward):
            monkeypatch.setattr(module, "evaluate", evaluate)

    return script


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_stage_out_of_patience_exports_its_best_and_keeps_its_last(kind, small, tmp_path, losses):
    def run(name, change, script):
        losses(script)
        return TRAIN[kind](small(kind, tmp_path / name, STEPS | change))

    script = [3.0, 2.0, 2.5, 2.0, 1.0, 1.0]
    stopped = run("stopped", {"early_stop": {"patience": 2}}, script)
    assert [row["eval/loss"] for row in rows(stopped)] == script[:4], "equal is not better"
    assert [path.name for path in (stopped / "best").iterdir()] == ["step-000002"]
    assert max(path.name for path in (stopped / "checkpoints").iterdir()) == "step-000004"
    two = run("two", {"max_steps": 2}, script)
    four = run("four", {"max_steps": 4}, script)
    assert same_weights(stopped, two)
    last = run("last", {"early_stop": {"patience": 2, "export": "last"}}, script)
    assert same_weights(last, four)
    assert not same_weights(two, four)
    said = [row["note"] for row in jsonl(stopped / "events.jsonl") if row["kind"] == "export"]
    assert said == ["Weights of step 2 of 4 (the best), held-out loss 2."]
    assert said[0] in (stopped / "export" / "README.md").read_text()
    assert "step 4 of 4 (the last)" in (last / "export" / "README.md").read_text()
    patient = run("patient", {"early_stop": {"patience": None}}, script)
    assert len(rows(patient)) == 6
    assert [path.name for path in (patient / "best").iterdir()] == ["step-000005"]


def test_a_stage_that_resumes_behind_its_last_step_writes_the_same_card(small, tmp_path, losses):
    losses([3.0, 2.0, 2.5])
    change = STEPS | {"max_steps": 3, "early_stop": {"export": "last"}}
    run = train_reward(small("reward", tmp_path / "run", change))
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert "held-out loss 2.5" in card
    (run / "done.json").unlink()
    shutil.rmtree(run / "export")
    again = train_reward(small("reward", tmp_path / "run", change), resume=True)
    assert (again / "export" / "README.md").read_text(encoding="utf-8") == card


@pytest.mark.slow
@pytest.mark.parametrize("kill", [3, 4, 5])
def test_a_resumed_stage_stops_and_exports_as_if_never_interrupted(kill, small, tmp_path, losses):
    script = [3.0, 2.0, 2.5, 2.4, 2.3]
    change = STEPS | {"early_stop": {"patience": 3}}
    losses(script)
    whole = train_reward(small("reward", tmp_path / "whole", change))
    losses([*script[: kill - 1], None])
    config = small("reward", tmp_path / "run", change)
    with pytest.raises(RuntimeError, match="killed"):
        train_reward(config)
    losses(script[kill - 1 :])
    again = train_reward(config, resume=True)
    assert rows(again) == rows(whole)
    assert same_weights(again, whole)


def test_early_stopping_needs_something_held_out(small, tmp_path):
    with pytest.raises(ConfigError, match="early_stop: has no effect without held-out rows"):
        train_sft(small("sft", tmp_path / "run", {"heldout": 0.0, "early_stop": {}}))


def test_too_long_rows_count_against_max_bad_rows(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Q{i}?", "completion": "A " * (300 if i < 2 else 1)} for i in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "max_bad_rows": 0.1, "max_steps": 1}
    with pytest.raises(DataError, match=r"2 of 10 rows cannot be used \(too-long 2\)"):
        train_sft(small("sft", tmp_path / "a", change))
    train_sft(small("sft", tmp_path / "b", change | {"max_bad_rows": 0.2}))


REFUSES = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system turns') }}{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_dialogue_that_the_template_refuses_is_set_aside_by_its_line(tiny, small, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "chat_template.jinja").write_text(REFUSES)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Q{i}?", "completion": "A"} for i in range(9)]
    rows.append({"system": "Be brief.", "prompt": "Q?", "completion": "A"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    change = {"model": str(model), "data": str(path), "max_steps": 1, "max_bad_rows": 0.1}
    run = train_sft(small("sft", tmp_path / "run", change))
    (event,) = [row for row in jsonl(run / "events.jsonl") if row["kind"] == "quarantined_row"]
    assert (event["where"], event["defect"]) == (f"{path}:10", "template")
    with pytest.raises(DataError, match=r"\(template 1\).*rows\.jsonl:10: .*no system turns"):
        train_sft(small("sft", tmp_path / "b", change | {"max_bad_rows": 0.05}))
    path.write_text(json.dumps(rows[-1]) + "\n")
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used \(template 1\); .*no system"):
        train_sft(small("sft", tmp_path / "c", change))


def warned(run):
    return [row["note"] for row in jsonl(run / "events.jsonl") if row["kind"] == "data_warning"]


@pytest.mark.slow
def test_pairs_that_length_alone_explains_are_warned_of(small, tmp_path):
    path = tmp_path / "pairs.jsonl"

    def write(sides):
        lines = [
            {"prompt": f"Q{i}?", "chosen": "Yes, " * a, "rejected": "No, " * b}
            for i, (a, b) in enumerate(sides)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        change = {"data": str(path), "max_steps": 1, "heldout": 0.0}
        return train_reward(small("reward", tmp_path / str(len(list(tmp_path.iterdir()))), change))

    one_sided = write([(9, 2)] * 8)
    assert "the preferred answer is the longer one" in warned(one_sided)[0]
    card = json.loads((one_sided / "export" / "reward_card.json").read_text())
    assert card["notes"] == warned(one_sided)
    assert "the shorter one" in warned(write([(2, 9)] * 8))[0]
    assert warned(write([(9, 2)] * 6 + [(2, 9)] * 2)) == []


def test_held_out_rows_that_repeat_a_training_exchange_are_warned_of(small, tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = []
    for i in range(12):
        start = [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello."}]
        last = {"role": "user", "content": "And now?" if i % 2 else "and  NOW?"}
        lines.append({"prompt": [*start, last], "chosen": "Yes.", "rejected": "No, not so."})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"data": str(path), "max_steps": 1, "heldout": 0.4}
    (note,) = [
        n for n in warned(train_reward(small("reward", tmp_path / "a", change))) if "repeat" in n
    ]
    assert "held-out rows repeat the last exchange of a training row" in note
    dialogues = [
        {"messages": [*line["prompt"], {"role": "assistant", "content": "Yes."}]} for line in lines
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in dialogues))
    assert "repeat the last exchange" in warned(train_sft(small("sft", tmp_path / "b", change)))[0]

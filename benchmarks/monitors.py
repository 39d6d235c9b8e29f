"""What watching a PPO run costs: the monitors' share of an iteration.

    python benchmarks/monitors.py [CONFIG] [--iterations 12]

CONFIG is a `config.yaml` of PPO (a run folder has one); without it a random policy of 0.1 M
parameters writes 64 replies of 64 tokens, about the least that anyone trains, where the share is
largest. Counted: metrics of replies and scores, their shape since SFT, collapse detector, alarms
(`observe`, `ScoreShape.measure`, `judge`); beside them writing rows and samples to disk.
Iterations that answer held-out prompts or save are left out. Exit code 1 above 2%.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from common import summary, write_result

from ppomax.config import parse, read_yaml
from ppomax.models.tiny import tiny_model, tiny_tokenizer
from ppomax.train import loop, ppo, shape
from ppomax.train.ppo_config import PPOConfig

LIMIT = 0.02
WATCHED = ((ppo, "observe"), (shape.ScoreShape, "measure"), (ppo, "judge"))
WRITTEN = ((loop.StageRun, "log"), (ppo, "show_replies"))
WORDS = ["tea", "rain", "a duck", "the moon", "old songs", "bread", "salt", "a slow train"]


def score(prompts, responses, **_):
    """A reward that costs nothing."""
    return [float(len(response)) for response in responses]


def small(root):
    """Settings of a policy so small that all else weighs most."""
    texts = [f"What of {word}?" for word in WORDS]
    tokenizer = tiny_tokenizer(texts * 4, vocab_size=512)
    model = tiny_model(vocab_size=len(tokenizer), hidden_size=64, layers=2, intermediate=128)
    for part in (model, tokenizer):
        part.save_pretrained(root / "model")
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts * 16)
    (root / "prompts.jsonl").write_text(rows, encoding="utf-8")
    return {
        "model": str(root / "model"),
        "data": str(root / "prompts.jsonl"),
        "rollout_size": 64,
        "minibatch_size": 32,
        "max_length": 104,
        "max_prompt": 40,
        "sampling": {"max_new_tokens": 64},
        "reward": {"callable": "monitors:score"},
        "critic": "policy",
        "critic_pretraining": None,
        "optim": {"lr": 1e-5},
        "critic_optim": {"lr": 1e-5},
    }


def timed(parts, spent):
    """Every call of these adds its seconds to the list's last place."""
    for owner, name in parts:
        plain = getattr(owner, name)

        def call(*args, _plain=plain, **keywords):
            began = time.perf_counter()
            try:
                return _plain(*args, **keywords)
            finally:
                spent[-1] += time.perf_counter() - began

        setattr(owner, name, call)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--iterations", type=int, default=12)
    chosen = parser.parse_args()
    sys.modules["monitors"] = sys.modules["__main__"]
    watched, written, ends = [0.0], [0.0], []
    timed(WATCHED, watched)
    timed(WRITTEN, written)
    plain = ppo.begin

    def begin(*args, **keywords):
        ends.append(time.perf_counter())
        watched.append(0.0)
        written.append(0.0)
        return plain(*args, **keywords)

    ppo.begin = begin
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        settings = read_yaml(chosen.config) if chosen.config else small(root)
        changes = {"iterations": chosen.iterations, "out": str(root / "run")}
        changes |= {"checkpoint": {"every": 10**6}}
        ppo.train_ppo(parse(PPOConfig, settings | changes))
        lines = (root / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    shares = {"monitors": [], "files": []}
    # from one iteration's begin to the next; the first warms up, the last has no end
    for index in range(1, len(ends) - 1):
        if "time/heldout" not in rows[index]:
            whole = ends[index + 1] - ends[index]
            shares["monitors"].append(watched[index + 1] / whole)
            shares["files"].append(written[index + 1] / whole)
    found = {name: summary(values) for name, values in shares.items()}
    whole = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    for name, part in found.items():
        print(
            f"{name}: {part['median']:.2%} of an iteration ({part['min']:.2%} to "
            f"{part['max']:.2%}, n = {part['n']}; an iteration {whole:.2f} s)"
        )
    write_result(
        "monitors", {"own_config": chosen.config is not None, "iteration_s": whole, **found}
    )
    return 0 if found["monitors"]["median"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

"""A worker: PPO iterations of ppomax through its own trainer, one for each line it is sent.

    python benchmarks/ppomax_worker.py --model DIR --reward DIR --prompts 16 --prompt 36 --new 64

Prompts are made here and all have the same number of tokens; replies end at the limit alone (no
token ends one), so that every run does the same work. Nothing is saved. `--ids FILE` also writes
the prompts' token ids, for others to take the same.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from common import Caller, peak_memory_gb

from ppomax.config import parse
from ppomax.data.template import ChatTemplate
from ppomax.models.load import load_tokenizer
from ppomax.models.trunk import Trunks
from ppomax.planning import plan
from ppomax.recipe import Recipe
from ppomax.train import actors
from ppomax.train.loop import StageRun, opened
from ppomax.train.ppo import train
from ppomax.train.ppo_config import PPOConfig
from ppomax.train.ppo_state import PPOState

WORDS = ("tea", "rain", "salt", "moon", "bread", "song", "train", "duck", "lamp", "river")


def prompts_of(template, count, tokens):
    """Different prompts of exactly so many tokens, template included."""
    found, number = [], 0
    while len(found) < count:
        text = f"{WORDS[number % len(WORDS)]} {number // len(WORDS)}"
        number += 1
        ids = template.prompt([{"role": "user", "content": text}])
        while len(ids) < tokens:
            longer = text + (" a", " of", " b")[len(ids) % 3]
            text, ids = longer, template.prompt([{"role": "user", "content": longer}])
        if len(ids) == tokens:
            found.append((text, ids))
        elif number > 20 * count:
            raise SystemExit(f"the template alone takes {len(ids)} tokens, --prompt says {tokens}")
    return found


def settings(given, data, out):
    """One step of policy and critic on each rollout, everything else as PPO-max has it."""
    adam = {"lr": 1e-6}
    adapters = {"lora": {"rank": given.lora}} if given.lora else {}
    return parse(
        PPOConfig,
        {
            **adapters,
            "model": given.model,
            "out": str(out),
            "data": str(data),
            "device": given.device,
            "dtype": given.dtype,
            "threads": given.threads,
            "iterations": 10_000,
            "rollout_size": given.prompts,
            "minibatch_size": given.minibatch or given.prompts,
            "epochs": given.epochs,
            "max_prompt": given.prompt,
            "max_length": given.prompt + given.new,
            "micro_tokens": given.micro_tokens,
            "gradient_checkpointing": given.checkpointing,
            "freeze_layers": given.freeze,
            "sampling": {"max_new_tokens": given.new},
            "engine": {"slots": given.slots or given.prompts},
            "reward": {"model": given.reward},
            "critic_pretraining": None,
            "optim": adam,
            "critic_optim": adam,
            "checkpoint": {"every": 10_000},
            "log": {"samples_every": 10_000},
        },
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=36, help="tokens of each")
    parser.add_argument("--new", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--minibatch", type=int, help="replies per step; default all")
    parser.add_argument("--slots", type=int, help="default as many as prompts")
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lora", type=int, help="rank of adapters; default none")
    parser.add_argument("--freeze", type=int, help="lowest blocks not trained; default none")
    parser.add_argument("--apart", action="store_true", help="frozen blocks are not shared")
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--plan", action="store_true", help="say what `ppomax plan` expects")
    given = parser.parse_args()
    caller = Caller()
    plain = ChatTemplate.__init__

    def endless(self, *args, **keywords):
        plain(self, *args, **keywords)
        self.end_ids = frozenset()

    ChatTemplate.__init__ = endless
    if given.apart:
        actors.Trunks = lambda _: Trunks(0)
    began = 0.0

    def log(run, step, values, *, total):
        nonlocal began
        phases = {key[5:]: value for key, value in values.items() if key.startswith("time/")}
        caller.say(
            seconds=time.perf_counter() - began,
            peak_gb=peak_memory_gb(),
            new_tokens=values["response/length_mean"] * given.prompts,
            gap_max=values["engine/logprob_gap_max"],
            first_ratio_error=values["policy/first_ratio_error"],
            **phases,
        )
        caller.wait()
        began = time.perf_counter()

    StageRun.log = log
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        tokenizer = load_tokenizer(given.model)
        made = prompts_of(ChatTemplate(tokenizer), given.prompts, given.prompt)
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text, _ in made)
        data.write_text(rows, encoding="utf-8")
        if given.ids:
            given.ids.write_text(json.dumps([ids for _, ids in made]), encoding="utf-8")
        config = settings(given, data, Path(folder) / "run")
        planned = {}
        if given.plan:
            [stage] = plan(Recipe.model_validate({"out": folder, "ppo": config}))
            planned = {"plan_gb": stage.memory_gb, "lines": dict(stage.lines)}
        with opened("ppo", config, resume=False) as run:
            state = PPOState(config, run)
            caller.say(ready=True, **planned)
            caller.wait()
            began = time.perf_counter()
            train(state)


if __name__ == "__main__":
    main()

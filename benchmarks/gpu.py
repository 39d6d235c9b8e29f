"""On one CUDA device: rollout against `transformers` generate, PPO iteration, MFU, memory.

    python benchmarks/gpu.py [--shapes 1.5B 7B] [--peak 989] [--eager] [--rollout] [--tiny]

Llama shapes with random weights, bfloat16. Rollout: 64 prompts of 128 tokens, 256 new tokens each,
the native engine (with `--eager` also without CUDA graphs) and generate in turn. Iteration: 1.5B as
`ppo_iteration.py` has it, 7B with LoRA (four whole 7B models with moments do not fit one device of
80 GB). MFU is useful FLOPs over `--peak` TFLOP/s (an H100's dense bfloat16) and, beside it, over
the rate that matrix products reached in this run; FLOPs are counted as if everything were trained.
Model folders of 3 and 14 GB are written to the temporary directory. Without a GPU one line says so;
`--tiny` runs it all on the CPU with a model of half a million parameters, to try the script.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from common import (
    DTYPES,
    HERE,
    Worker,
    iteration_flops,
    matmul_rate,
    summary,
    text,
    write_result,
)
from ppo_iteration import scorer
from shapes import SHAPES, config_of, random_model
from transformers import AutoTokenizer, LlamaForCausalLM

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.rollout import EngineSettings, SamplingParams, build_engine

MICRO_TOKENS = {"1.5B": 4096}
"""With 8192 the activations of 1.5B do not fit beside policy and critic with their moments."""
PHASES = ("rollout", "score", "update")


def rollout(folder, given):
    """Tokens a second of both, in turn."""
    count, prompt, new = given.sizes
    device = torch.device(given.device)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[given.dtype]).to(device).eval()
    template = ChatTemplate(AutoTokenizer.from_pretrained(folder))
    template.end_ids = frozenset()  # every reply has all its tokens
    world = World(0, 1, device)
    engine, eager = (
        build_engine(
            EngineSettings(slots=count, cuda_graphs=graphs),
            model,
            template,
            world,
            DTYPES[given.dtype],
        )
        for graphs in (True, False)
    )
    ids = torch.randint(5, 250, (count, prompt), generator=torch.Generator().manual_seed(0))
    params = SamplingParams(max_new_tokens=new)

    def native():
        engine.generate(ids.tolist(), params, list(range(count)))

    def without_graphs():
        eager.generate(ids.tolist(), params, list(range(count)))

    @torch.no_grad()
    def generate():
        model.generate(
            ids.to(device),
            attention_mask=torch.ones_like(ids).to(device),
            do_sample=True,
            top_k=0,
            min_new_tokens=new,
            max_new_tokens=new,
        )

    programs = {"native": native, "without graphs": without_graphs, "generate": generate}
    if not given.eager:
        del programs["without graphs"]
    found = {name: [] for name in programs}
    for turn in range(given.rounds + 1):
        for name, work in programs.items():
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            found[name] += [count * new / seconds] if turn else []
    return {name: summary(values) for name, values in found.items()}


def iteration(name, folder, given):
    """Seconds and memory of an iteration, in a process of its own."""
    count, prompt, new = given.sizes
    argv = [sys.executable, HERE / "ppomax_worker.py", "--model", folder]
    argv += ["--reward", scorer(folder, folder.parent / "scorer"), "--device", given.device]
    argv += ["--dtype", given.dtype, "--prompts", count, "--prompt", prompt, "--new", new]
    argv += ["--micro-tokens", MICRO_TOKENS.get(name, 2048), "--minibatch", max(1, count // 4)]
    argv += ["--lora", 16] if name == "7B" else []
    worker = Worker(name, argv)
    rows = [worker.go() for _ in range(given.rounds + 1)][1:]
    worker.close()
    seconds = {key: summary([row[key] for row in rows]) for key in ("seconds", *PHASES)}
    return {**seconds, "peak_gb": rows[-1]["peak_gb"], "lora": name == "7B"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1.5B", "7B"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the device")
    parser.add_argument("--eager", action="store_true", help="the engine without CUDA graphs too")
    parser.add_argument("--rollout", action="store_true", help="the rollout alone")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to try the script")
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.tiny):
        print("gpu: skipped, there is no CUDA device here (--tiny tries the script on the CPU)")
        return
    given.device, given.dtype, given.sizes = "cuda", "bfloat16", (64, 128, 256)
    if given.tiny:
        given.device, given.dtype, given.sizes = "cpu", "float32", (4, 32, 8)
        given.shapes, given.rounds = ["0.5M"], 1
    found = {}
    for name in given.shapes:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            random_model(shape, folder, DTYPES[given.dtype], given.device)
            speed = rollout(folder, given)
            if given.device == "cuda":
                torch.cuda.empty_cache()
            squares = () if given.tiny else shape.products(8192)
            rate = matmul_rate(given.dtype, squares, device=given.device, small=given.tiny)
            one = None if given.rollout else iteration(name, folder, given)
        ratio = speed["native"]["median"] / speed["generate"]["median"]
        print(f"{name}: native writes {ratio:.2f} times the tokens of generate in the same time")
        for program, found_speed in speed.items():
            print(f"{name}: {program} {text(found_speed, 'tok/s', 0)}")
        found[name] = {"rollout": speed, "ratio": ratio, "rate": rate}
        found[name]["config"] = config_of(shape).to_diff_dict()
        if one is None:
            continue
        found[name]["iteration"] = one
        flops = iteration_flops(shape, *given.sizes)
        one["flops"], median = flops["whole"], one["seconds"]["median"]
        one["mfu"] = flops["whole"] / median / (given.peak * 1e12)
        one["of_matmul_rate"] = flops["whole"] / median / rate["best"]
        one["mfu_of"] = {
            phase: flops[phase] / one[phase]["median"] / (given.peak * 1e12) for phase in PHASES
        }
        print(f"{name}: iteration {text(one['seconds'])}, MFU {one['mfu']:.1%}", end=", ")
        print(f"{one['of_matmul_rate']:.0%} of the matrix rate, peak {one['peak_gb']:.1f} GB")
        for phase in PHASES:
            print(f"{name}: {phase} {text(one[phase])}, MFU {one['mfu_of'][phase]:.1%}")
    if not given.tiny:
        write_result("gpu", {"sizes": given.sizes, "shapes": found})


if __name__ == "__main__":
    main()

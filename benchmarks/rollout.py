"""How much faster the native engine writes replies than `transformers` generate, in one run.

    python benchmarks/rollout.py [--dtype float32] [--repeats 5] [--settings fixed natural]

`fixed`: 32 prompts, 128 new tokens each, no reply ends before. `natural`: 96 prompts, replies end
where they end (128 tokens at most), 32 slots; `generate` gets them in batches of 32 of like length.
Both sample at temperature 1 from the same weights, in turn; the first turn warms up. Prints the
ratio of tokens per second first (above 1: native is faster; median, and the range of the turns'
own ratios), then each side, then the share of the machine's matmul rate, measured between the
turns, that native reaches: useful FLOPs only, 2 for each weight and token, attention and head
included. Beside other programs `--clock processor` counts processor seconds of this process alone;
give it `--threads 1`, for threads that wait for one another spin. Writes
benchmarks/results/rollout-DTYPE.json.
"""

import argparse
import os
import statistics
import time

import torch
import transformers
from common import write_result

from ppomax.data.batching import derived_seed
from ppomax.data.sources import SourceConfig, load_prompts
from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.models.load import load_policy, load_tokenizer
from ppomax.rollout import EngineSettings, SamplingParams, build_engine
from ppomax.rollout.cache import opening_of

SLOTS = 32
PROMPTS = {"fixed": 32, "natural": 96}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def matmul_rate(dtype, clock, size=2048):
    """FLOPs a second of one square product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    began = clock()
    torch.mm(a, b, out=out)
    return 2 * size**3 / (clock() - began)


def middle(values):
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def flops(config, prompts, replies):
    """Useful ones: every prompt token but no padding; the last token drawn is not read again.

    Tokens that all prompts begin with count once.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    dim = getattr(config, "head_dim", None) or width // heads
    attention = width * dim * (2 * heads + 2 * config.num_key_value_heads)
    layer = attention + 3 * width * config.intermediate_size

    def blocks(read):
        past = read * (read + 1) // 2  # keys seen, each in two products
        return config.num_hidden_layers * (2 * layer * read + 4 * heads * dim * past)

    total = -(len(prompts) - 1) * blocks(len(opening_of(prompts)))
    for prompt, reply in zip(prompts, replies, strict=True):
        total += blocks(len(prompt) + reply - 1) + 2 * width * config.vocab_size * reply
    return total


def generate(lm, prompts, new, ends):
    """Lengths of replies by `transformers`, in batches of SLOTS prompts of like length."""
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    lengths = []
    order = sorted(prompts, key=len)
    for start in range(0, len(order), SLOTS):
        part = order[start : start + SLOTS]
        longest = max(map(len, part))
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.no_grad():
            output = lm.generate(ids, attention_mask=mask, generation_config=config)
        for reply in output[:, longest:].tolist():
            ended = [place for place, token in enumerate(reply) if token in ends]
            lengths.append(ended[0] + 1 if ended else len(reply))
    return lengths


def compare(name, lm, engine, template, prompts, options):
    """Both sides in turn; the record of one setting."""
    ends = template.end_ids if name == "natural" else frozenset()
    clock = CLOCKS[options.clock]
    kept, template.end_ids = template.end_ids, ends  # the engine reads them here
    rates = {"native": [], "transformers": []}
    matmul, share = [], []
    for turn in range(options.repeats + 1):
        seeds = [derived_seed("bench", turn, index) for index in range(len(prompts))]
        new = options.new if turn else 4  # the first turn warms up
        params = SamplingParams(max_new_tokens=new)
        matmul.append(matmul_rate(options.torch_dtype, clock))
        began = clock()
        rollout = engine.generate(prompts, params, seeds)
        native = clock() - began
        lengths = [len(reply) for reply in rollout.responses]
        work = flops(lm.config, prompts, lengths)
        began = clock()
        others = generate(lm, prompts, new, ends)
        other = clock() - began
        if turn:
            rates["native"].append(sum(lengths) / native)
            rates["transformers"].append(sum(others) / other)
            share.append(work / native)
            both = ", ".join(f"{side} {found[-1]:.0f}" for side, found in rates.items())
            print(f"  turn {turn}: {both} tokens/s", flush=True)
    template.end_ids = kept
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    best = max(matmul)
    result = {
        "ratio": middle(ratios),
        "tokens_per_s": {side: middle(found) for side, found in rates.items()},
        "matmul_gflops": middle([value / 1e9 for value in matmul]),
        "share_of_matmul": middle([value / best for value in share]),
        "mean_reply": {
            "native": statistics.mean(lengths),
            "transformers": statistics.mean(others),
        },
    }
    low, high = result["ratio"]["range"]
    print(f"{name}: {result['ratio']['median']:.2f} x generate ({low:.2f} to {high:.2f})")
    for side, found in result["tokens_per_s"].items():
        low, high = found["range"]
        print(f"  {side:12s} {found['median']:6.0f} tokens/s ({low:.0f} to {high:.0f})")
    reached = result["share_of_matmul"]["median"]
    print(f"  {reached:.0%} of the best matmul rate, {best / 1e9:.0f} GFLOP/s", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--settings", nargs="+", choices=tuple(PROMPTS), default=list(PROMPTS))
    parser.add_argument("--new", type=int, default=128, help="tokens of a reply at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.torch_dtype = getattr(torch, options.dtype)
    transformers.logging.set_verbosity_error()
    load = round(os.getloadavg()[0], 1)
    template = ChatTemplate(load_tokenizer(options.model))
    lm = load_policy(options.model, dtype=options.torch_dtype).eval()
    lm.generation_config.eos_token_id = None
    here = World(0, 1, torch.device("cpu"))
    settings = EngineSettings(slots=SLOTS)
    engine = build_engine(settings, lm, template, here, options.torch_dtype)
    rows = load_prompts([SourceConfig(path="bundled:prompts")]).rows
    rows = [row for row in rows if row.meta.get("lang", "en") == "en"]
    result = {"model": options.model, "dtype": options.dtype, "new": options.new}
    result |= {"clock": options.clock, "repeats": options.repeats, "load_at_start": load}
    result["settings"] = {}
    for name in options.settings:
        prompts = [template.prompt(row.messages) for row in rows[: PROMPTS[name]]]
        found = compare(name, lm, engine, template, prompts, options)
        result["settings"][name] = {"prompts": len(prompts), "slots": SLOTS, **found}
        write_result(f"rollout-{options.dtype}", result)


if __name__ == "__main__":
    main()

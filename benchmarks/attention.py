"""How much faster grouped attention is than PyTorch's kernel in bfloat16 on a processor.

    python benchmarks/attention.py [--rounds 5] [--threads N]

Heads of SmolLM2-135M (9 queries on 3 keys and values of 64), causal, no padding; forward and
backward of both on the same tensors in turn. Prints one line per shape: rows and tokens, the ratio
of forward and backward together (above 1: grouped is faster; median, and the range of the rounds'
own ratios), then milliseconds of each way, forward and backward.
Writes benchmarks/results/attention.json.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from common import write_result

from ppomax.models.attention import LONGEST, grouped_attention

SHAPES = ((16, 100), (8, 200), (8, 256), (4, 384), (4, LONGEST), (2, 1024))
HEADS, GROUPS, DIM = 9, 3, 64


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def grouped(q, k, v):
    return grouped_attention(q, k, v, None, DIM**-0.5)


def seconds(way, inputs, gradient):
    """Of forward and of backward."""
    began = time.perf_counter()
    output = way(*inputs)
    between = time.perf_counter()
    torch.autograd.grad(output, inputs, gradient)
    return between - began, time.perf_counter() - between


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="in a round, of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = []
    for rows, tokens in SHAPES:

        def heads(count, rows=rows, tokens=tokens):
            flat = torch.randn(rows, tokens, count, DIM, dtype=torch.bfloat16)
            return flat.transpose(1, 2).requires_grad_()

        inputs = (heads(HEADS), heads(GROUPS), heads(GROUPS))
        gradient = torch.randn(rows, HEADS, tokens, DIM, dtype=torch.bfloat16)
        times = {fused: [], grouped: []}
        for number in range(given.rounds + 1):
            for way in (fused, grouped) if number % 2 else (grouped, fused):
                took = [seconds(way, inputs, gradient) for _ in range(given.repeats)]
                both = [statistics.median(part) for part in zip(*took, strict=True)]
                times[way] += [both] if number else []  # the first round warms up
        ratios = [sum(a) / sum(b) for a, b in zip(times[fused], times[grouped], strict=True)]
        row = {"rows": rows, "tokens": tokens, "ratio": statistics.median(ratios)}
        row["range"] = [min(ratios), max(ratios)]
        for way in (fused, grouped):
            parts = zip(*times[way], strict=True)
            row[way.__name__] = [1e3 * statistics.median(part) for part in parts]
        found.append(row)
        ratio = f"{row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        ways = [f"{way} {row[way][0]:.1f} + {row[way][1]:.1f} ms" for way in ("fused", "grouped")]
        print(f"{rows:3d} × {tokens:4d}: {ratio}; {'; '.join(ways)}", flush=True)
    write_result("attention", {"shapes": found})


if __name__ == "__main__":
    main()

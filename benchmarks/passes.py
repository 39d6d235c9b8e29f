"""How long each compiled pass of a block takes in training, against PyTorch's operations for it.

    python benchmarks/passes.py [--dtype float32] [--rounds 30] [--threads N]

The tiny model's block with 64 texts of 48 tokens, and SmolLM2-135M's with 16 of 100. Both do the
same on the same tensors in turn. Prints a line per pass: the ratio (above 1: the compiled one is
faster; of the medians), then microseconds of each way. A ratio that falls from one day to the next
is worth a look: compilers give up on a loop without a word. On a processor with tiles (AMX) the
three products of gate and up are among them. Writes benchmarks/results/passes_DTYPE.json.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import torch.nn.functional as F
from common import write_result
from shapes import SHAPES
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ppomax.models import products
from ppomax.models.kernels import HeadNorms, Turns, kernels_for
from ppomax.models.lean import rms_norm, swiglu
from ppomax.models.prefixes import Texts
from ppomax.models.products import tiles_for

BATCHES = {"tiny": (64, 48), "135M": (16, 100)}
"""Texts and their tokens, by shape."""
EPS = 1e-5


def passes(shape, batch, length, dtype):
    """By name, the compiled pass and PyTorch's operations for it."""
    kernels, tokens = kernels_for(dtype), batch * length
    heads, groups, dim = shape.heads, shape.kv_heads, shape.head_dim
    x, around = torch.randn(2, tokens, shape.hidden)
    weight, slope = torch.rand(shape.hidden), torch.randn(tokens, shape.hidden).to(dtype)
    both = torch.randn(tokens, 2 * shape.intermediate).to(dtype)
    onto = torch.randn(tokens, shape.intermediate).to(dtype)
    qkv = torch.randn(tokens, (heads + 2 * groups) * dim).to(dtype)
    angles = torch.outer(torch.arange(length), 10.0 ** -torch.linspace(0, 4, dim // 2))
    turns = Turns(*(torch.cat([t, t], 1) for t in (angles.cos(), angles.sin())))
    scores = torch.randn(batch * groups, heads // groups * length, length).to(dtype)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(heads // groups, 1)
    shares = kernels.softmax_(scores.clone())
    texts = Texts(batch, length)
    q, k, v = kernels.split_heads(qkv, turns, HeadNorms(), texts, heads, groups)

    gathered = kernels.gather_heads(q, None)

    def backward(function, *inputs):
        leaves = [one.detach().requires_grad_() for one in inputs]
        made = function(*leaves)
        return lambda slope: torch.autograd.grad(made, leaves, slope, retain_graph=True)

    def split(qkv):
        apart = qkv.view(batch, length, -1, dim).transpose(1, 2).split([heads, groups, groups], 1)
        turned = apply_rotary_pos_emb(*apart[:2], turns.cos[None], turns.sin[None])
        return (*(part.to(dtype) for part in turned), apart[2].contiguous())

    norm_back = backward(lambda x, w: rms_norm(x, w, EPS, dtype), x, weight)
    gate_back = backward(lambda both: swiglu(*both.chunk(2, 1)), both)
    soft_back = backward(lambda s: s.masked_fill(hidden, -torch.inf).softmax(-1), scores)
    split_back = backward(split, qkv)
    lone = HeadNorms()
    gate, up = torch.randn(2, shape.intermediate, shape.hidden)
    normed = torch.randn(tokens, shape.hidden).to(dtype)

    def below():
        return torch.cat([gate.to(dtype), up.to(dtype)])

    multiplied = {
        "product": (
            lambda: products.forward(normed, gate, up),
            lambda: torch.mm(normed, below().T),
        ),
        "product, input": (
            lambda: products.to_input(both, gate, up),
            lambda: torch.mm(both, below()),
        ),
        "product, weights": (
            lambda: products.to_weight(both, normed),
            lambda: torch.mm(both.T, normed).float(),
        ),
    }
    in_tiles = dtype == torch.bfloat16 and tiles_for(torch.float32) is not None
    return {
        **(multiplied if in_tiles else {}),
        "norm": (
            lambda: kernels.norm(x, weight, EPS),
            lambda: rms_norm(x, weight, EPS, dtype),
        ),
        "norm, backward": (
            lambda: kernels.norm_backward(x, weight, slope, around, EPS),
            lambda: around + norm_back(slope)[0],
        ),
        "swiglu": (lambda: kernels.swiglu(both), lambda: swiglu(*both.chunk(2, 1))),
        "swiglu, backward": (
            lambda: kernels.swiglu_backward(both, onto),
            lambda: gate_back(onto),
        ),
        "heads split": (
            lambda: kernels.split_heads(qkv, turns, lone, texts, heads, groups),
            lambda: split(qkv),
        ),
        "heads joined": (
            lambda: kernels.join_heads(q, k, v, qkv, turns, lone, texts),
            lambda: split_back((q, k, v)),
        ),
        "heads gathered": (
            lambda: kernels.gather_heads(q, None),
            lambda: q.transpose(1, 2).reshape(tokens, -1),
        ),
        "heads scattered": (
            lambda: kernels.scatter_heads(gathered, texts, dim, None),
            lambda: gathered.view(batch, length, heads, dim).transpose(1, 2).contiguous(),
        ),
        "softmax": (
            lambda: kernels.softmax_(scores),
            lambda: F.softmax(scores.masked_fill(hidden, -torch.inf), -1),
        ),
        "softmax, backward": (
            lambda: kernels.softmax_backward_(shares, scores, 0.1),
            lambda: soft_back(scores),
        ),
    }


def timed(each):
    begun = time.perf_counter()
    each()
    return (time.perf_counter() - begun) * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    if kernels_for(dtype) is None:
        print("passes: skipped, no compiled kernels are found")
        return
    found = {}
    for name, (batch, length) in BATCHES.items():
        for part, ways in passes(SHAPES[name], batch, length, dtype).items():
            rounds = [[timed(way) for way in ways] for _ in range(given.rounds + 3)][3:]
            mine, others = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"{name:8s} {part:18s} {others / mine:5.1f} x  {mine:6.0f} of {others:6.0f} µs")
            found[f"{name}: {part}"] = {"us": mine, "pytorch_us": others, "ratio": others / mine}
    write_result(f"passes_{given.dtype}", {"rounds": given.rounds, "passes": found})


if __name__ == "__main__":
    main()

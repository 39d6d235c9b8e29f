"""How much faster a reward step is when a pair's prompt is computed once, as ratios in one run.

    python benchmarks/shared_prompts.py [--layers 4] [--hidden 576] [--threads N]

A model of SmolLM2-135M's width with few layers and random weights; forward and backward of
micro-batches of pairs, both ways in turn on the same pairs. Prints one line per shape: prompt and
answer tokens, the share of tokens saved, processor seconds each way (all threads, so that other
programs on the machine count little), and the ratio (above 1: sharing is faster).
"""

import argparse
import statistics
import time

import torch

from ppomax.data.template import Encoded
from ppomax.distributed import World
from ppomax.models.heads import ScalarModel
from ppomax.models.tiny import tiny_model
from ppomax.train.pair_forward import forward_pairs
from ppomax.train.pairs import Pair
from ppomax.types import PreferenceRow

SHAPES = ((16, 64), (64, 64), (128, 64), (256, 64), (512, 64), (128, 256))
"""Prompt and answer tokens of a pair."""


def pairs_of(prompt, answer, count, vocab):
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(5, vocab, (length,), generator=generator).tolist()

    pairs = []
    for index in range(count):
        start = ids(prompt)
        mask = [False] * prompt + [True] * answer
        sides = [Encoded(start + ids(answer), mask) for _ in range(2)]
        pairs.append(Pair(PreferenceRow(str(index), (), "", ""), *sides))
    return pairs


def seconds(model, pairs, *, imitate, share):
    here = World(0, 1, torch.device("cpu"))
    began = time.process_time()
    output = forward_pairs(model, pairs, 3, here, imitate=imitate, share_prompts=share)
    loss = torch.nn.functional.softplus(output.rejected - output.chosen).sum()
    if output.logprobs is not None:
        loss = loss - output.logprobs.mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, unshared")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    vocab = 8000
    lm = tiny_model(
        vocab_size=vocab,
        hidden_size=settings.hidden,
        intermediate=settings.hidden * 8 // 3,
        layers=settings.layers,
        heads=settings.hidden // 64,
        kv_heads=max(1, settings.hidden // 192),
        max_positions=2048,
    )
    model = ScalarModel.from_causal_lm(lm, 0)
    print("prompt answer saved  apart  shared  ratio")
    for prompt, answer in SHAPES:
        count = max(1, settings.tokens // (2 * (prompt + answer)))
        pairs = pairs_of(prompt, answer, count, vocab)
        times = {False: [], True: []}
        for turn in range(settings.repeats + 1):
            for share in (False, True) if turn % 2 else (True, False):
                took = seconds(model, pairs, imitate=True, share=share)
                times[share] += [took] if turn else []  # the first turn warms up
        apart, shared = (statistics.median(times[share]) for share in (False, True))
        saved = prompt / (2 * (prompt + answer))
        line = f"{prompt:6d} {answer:6d} {saved:5.0%} {apart:6.2f} {shared:6.2f}"
        print(f"{line} {apart / shared:6.2f}", flush=True)


if __name__ == "__main__":
    main()

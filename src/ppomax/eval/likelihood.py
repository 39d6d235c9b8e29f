"""Log-likelihoods of continuations: what several texts begin with is read once.

Continuations of one context stand behind it in one row, at the positions that each would have
alone, and do not see each other; contexts that begin alike (with the same examples) are read on top
of one cache. For architectures whose masks and caches are known to be plain (`native.supports`);
others get a row for each continuation.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from ppomax.data.batching import plan_micro_batches
from ppomax.distributed import World
from ppomax.errors import DataError
from ppomax.models.heads import hidden_states, output_weight
from ppomax.models.language import LanguageModel
from ppomax.models.logprobs import token_logprobs
from ppomax.rollout.native import supports
from ppomax.train.micro_batches import autocast

WORTH_A_CACHE = 32
"""Tokens that contexts must begin with in common to be read on top of a cache of them."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A context and what follows it."""

    context: list[int]
    branches: list[tuple[int, list[int]]]
    """Place of each continuation among those asked for, and its ids."""

    @property
    def width(self) -> int:
        """Tokens that are read; a continuation's last one is only predicted."""
        return len(self.context) + sum(len(ids) - 1 for _, ids in self.branches)

    def apart(self) -> Iterator["Tree"]:
        """Trees whose rows are texts: one for each continuation of several tokens."""
        short = [branch for branch in self.branches if len(branch[1]) == 1]
        if short:
            yield Tree(self.context, short)
        for branch in self.branches:
            if len(branch[1]) > 1:
                yield Tree(self.context, [branch])


class Likelihoods:
    """Log-likelihoods of continuations under one model."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        micro_tokens: int,
        here: World,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.tokenizer, self.micro_tokens = model, tokenizer, micro_tokens
        self.here, self.dtype = here, dtype
        self.pad = int(tokenizer.pad_token_id)
        limit = getattr(model.lm.config, "max_position_embeddings", None)
        self.limit = int(limit) if limit else 1 << 30
        self.shares = supports(model.lm)

    @torch.no_grad()
    def __call__(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        where: Sequence[str],
        told: Callable[[float], None] | None = None,
    ) -> list[float]:
        """Summed log-prob of each continuation after its context.

        Args:
            told: gets the share that is done, after every micro-batch.

        Raises:
            DataError: both together are longer than the model's positions.
        """
        of: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for i, (before, after, place) in enumerate(
            zip(contexts, continuations, where, strict=True)
        ):
            ids, size = split_ids(self.tokenizer, before, after)
            if len(ids) > self.limit:
                raise DataError(
                    f"{place}: {len(ids)} tokens with its examples, the model has {self.limit} "
                    "positions; give fewer --shots"
                )
            of.setdefault(tuple(ids[:-size]), []).append((i, ids[-size:]))
        trees = [Tree(list(ids), of[ids]) for ids in sorted(of)]
        sums, done = [0.0] * len(contexts), 0
        for group in self._groups(trees):
            stem = self._stem(group)
            past = self._cache(stem) if stem else None
            widths = [tree.width for tree in group]  # with the stem: each row has a copy of it
            for indices in plan_micro_batches(widths, self.micro_tokens):
                trees_now = [group[i] for i in indices]
                self._read(trees_now, len(stem), past, sums)
                done += sum(len(tree.branches) for tree in trees_now)
                if told is not None:
                    told(done / len(contexts))
        return sums

    def _groups(self, trees: list[Tree]) -> list[list[Tree]]:
        """Sorted trees, cut where what neighbours begin with in common falls by half."""
        if not self.shares:
            return [[part for tree in trees for part in tree.apart()]]
        found: list[list[Tree]] = []
        common = 0
        for tree in trees:
            alike = _alike(found[-1][-1].context, tree.context) if found else 0
            if alike >= max(WORTH_A_CACHE, common / 2):
                found[-1].append(tree)
                common = alike
            else:
                found.append([tree])
                common = 0
        alone = [group[0] for group in found if len(group) == 1]
        return [group for group in found if len(group) > 1] + [alone] * bool(alone)

    def _stem(self, group: list[Tree]) -> list[int]:
        """What all contexts begin with; each keeps a token of its own to go on from."""
        if not self.shares:
            return []
        first, last = group[0].context, group[-1].context  # sorted: no two are less alike
        size = min(_alike(first, last), *(len(tree.context) - 1 for tree in group))
        return first[:size] if len(group) > 1 and size >= WORTH_A_CACHE else []

    def _cache(self, stem: list[int]) -> Cache:
        past = DynamicCache()
        ids = torch.tensor([stem], device=self.here.device)
        with autocast(self.here, self.dtype):
            hidden_states(self.model.lm, ids, past=past)
        return past

    def _read(self, trees: list[Tree], skipped: int, past: Cache | None, sums: list[float]) -> None:
        """Write the sums of some trees' continuations.

        Args:
            skipped: tokens of each context that `past` holds.
        """
        if past is not None:
            past = copy.deepcopy(past)  # the forward adds to it
            past.batch_repeat_interleave(len(trees))
        longest = max(tree.width for tree in trees) - skipped
        ids = torch.full((len(trees), longest), self.pad)
        branch = torch.full((len(trees), longest), -1)  # 0: context, then one number each
        positions = torch.zeros((len(trees), longest), dtype=torch.long)
        rows: list[int] = []
        slots: list[int] = []  # of the hidden state before each target
        targets: list[int] = []
        sizes: list[tuple[int, int]] = []
        for row, tree in enumerate(trees):
            end = len(tree.context) - skipped
            ids[row, :end] = torch.tensor(tree.context[skipped:])
            branch[row, :end] = 0
            positions[row, :end] = torch.arange(skipped, skipped + end)
            last, start = end - 1, end
            for number, (place, tokens) in enumerate(tree.branches, 1):
                stop = start + len(tokens) - 1
                ids[row, start:stop] = torch.tensor(tokens[:-1], dtype=torch.long)
                branch[row, start:stop] = number
                positions[row, start:stop] = torch.arange(stop - start) + skipped + end
                rows += [row] * len(tokens)
                slots += [last, *range(start, stop)]
                targets += tokens
                sizes.append((place, len(tokens)))
                start = stop
        device = self.here.device
        with autocast(self.here, self.dtype):
            if past is None and not any(sum(len(t) > 1 for _, t in x.branches) > 1 for x in trees):
                hidden = hidden_states(self.model.lm, ids.to(device))
            else:
                mask = _mask(branch, skipped).to(device)
                hidden = hidden_states(
                    self.model.lm,
                    ids.to(device),
                    position_ids=positions.to(device),
                    attention_mask=mask,
                    past=past,
                )
            weight = output_weight(self.model.lm)
            found = token_logprobs(
                hidden[rows, slots], weight, torch.tensor(targets, device=device), entropy=False
            ).logprobs
        parts = torch.split(found.double().cpu(), [size for _, size in sizes])
        for (place, _), part in zip(sizes, parts, strict=True):
            sums[place] = float(part.sum())


def _alike(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _mask(branch: Tensor, before: int) -> Tensor:
    """Additive mask [rows, 1, slots, before + slots] for rows of branches.

    A slot sees the cache, the context and its own branch, as far as itself.
    """
    slot = torch.arange(branch.shape[1])
    seen = slot[None, :] <= slot[:, None]
    seen = seen & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    own = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return torch.cat([own.new_zeros(*own.shape[:2], before), own], -1)[:, None]


def split_ids(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> tuple[list[int], int]:
    """Ids of the joined text and how many of them are the continuation's, at least one.

    Tokenised as one text and cut where the context's own ids end, as the harness does; a token
    that reaches over the border counts to the continuation.
    """
    ids = list(tokenizer(before + after, add_special_tokens=True)["input_ids"])
    start = list(tokenizer(before, add_special_tokens=True)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]  # some tokenizers close every text
        start = start[:-1]
    return ids, max(1, len(ids) - len(start))

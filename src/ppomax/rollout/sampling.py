"""Sampling from logits, with noise that is a pure function of (reply seed, step, token id).

The Gumbel-max trick: argmax of logits/temperature + Gumbel noise is an exact draw. The noise is a
hash, so a reply depends on its own seed alone, never on batch mates, slot, rank or device generator
state. Only the most likely candidates are perturbed one by one; the rest of the vocabulary competes
as one Gumbel variable of its total mass, which keeps the draw exact without sorting or filling the
vocabulary.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from ppomax.config import Settings

CANDIDATES = 256
"""Tokens perturbed one by one, but of a small vocabulary; a wider nucleus is looked for among WIDER
times as many, and so on up to the whole vocabulary."""

WIDER = 16

RUN = 16
"""Logits of which only the largest is compared first, in the search for the most likely tokens."""

TAIL_ROWS = 4
"""Replies whose tail is drawn from at once; few, so that their noise stays in cache."""

_TAIL_STREAM, _TAIL_ID = 1, -1


class SamplingParams(Settings):
    """How replies are drawn. PPO's default is plain temperature, so that the ratio is exact."""

    temperature: float = Field(1.0, ge=0)
    """Divides the logits; 0 takes the most likely token."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest reply in tokens, the end-of-turn token included."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Smallest set of tokens whose probability reaches this; null keeps all."""
    top_k: int | None = Field(None, ge=1)
    """Number of most likely tokens kept; null keeps all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Tokens below this share of the most likely one's probability are left out."""
    repetition_penalty: float | None = Field(None, gt=0)
    """Positive logits of tokens the reply already holds are divided by it, negative ones multiplied
    (Keskar et al. 2019, eq. 2); generated tokens only."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """A reply that comes to contain one of these ends there."""

    @property
    def is_plain(self) -> bool:
        """Whether the sampling distribution is softmax(logits / temperature)."""
        tricks = (self.top_p, self.top_k, self.min_p, self.repetition_penalty)
        return all(trick is None for trick in tricks) and self.temperature > 0


class Draw(NamedTuple):
    """One token per reply."""

    tokens: Int[Tensor, " batch"]
    logprobs: Float[Tensor, " batch"]
    """Under the distribution they were drawn from."""


class Draft(NamedTuple):
    """Draws among the most likely tokens, and what tells whether another could have been drawn.

    Where none could (`open` is None), only the draw counts.
    """

    logits: Float[Tensor, "batch vocab"]
    """Over the temperature."""
    normaliser: Float[Tensor, " batch"]
    ids: Int[Tensor, "batch candidates"]
    draw: Draw
    open: Bool[Tensor, " batch"] | None = None
    """Where `settle` has to look beyond the candidates; None: nowhere."""
    best: Float[Tensor, " batch"] | None = None
    """The largest perturbed logit of a candidate, where all tokens take part."""
    noise: Float[Tensor, " batch"] | None = None
    """Of the mass beyond the candidates, likewise."""


class Likely(NamedTuple):
    """The largest logits, largest first, and what all of them sum to."""

    values: Float[Tensor, "batch candidates"]
    ids: Int[Tensor, "batch candidates"]
    normaliser: Float[Tensor, " batch"]
    """Log of the sum of all exponentials."""


def look(logits: Float[Tensor, "batch vocab"], count: int) -> Likely:
    """The `count` most likely tokens of each reply, with PyTorch's operations."""
    return Likely(*most_likely(logits, count), logits.logsumexp(1))


class Tools(NamedTuple):
    """What walks through the vocabulary."""

    search: Callable[[Tensor, int], Likely] = look
    draw_plain: Callable[[Tensor, Tensor, Tensor, float, int], Draw] | None = None
    """All of `sample` where the temperature is all there is to its parameters: of logits, seeds,
    steps, temperature and number of candidates."""


PYTORCH = Tools()


def sample(
    logits: Float[Tensor, "batch vocab"],
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
    params: SamplingParams,
    generated: Int[Tensor, "batch past"] | None = None,
    tools: Tools = PYTORCH,
) -> Draw:
    """Draw the next token of each reply.

    Args:
        logits: fp32.
        seeds: one 63-bit seed per reply.
        steps: index of the token to draw within its reply.
        generated: earlier tokens of each reply for the repetition penalty; -1 where there is none.
    """
    if params.repetition_penalty is not None and generated is not None:
        logits = penalise(logits, generated, params.repetition_penalty)
    return settle(draft(logits, seeds, steps, params, tools), seeds, steps, params)


def draft(
    logits: Float[Tensor, "batch vocab"],
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
    params: SamplingParams,
    tools: Tools = PYTORCH,
) -> Draft:
    """Draw among the candidates: the part whose kernels do not hang on what is drawn.

    Nothing waits for the device here, so that a CUDA graph can hold it. The penalty on repetitions
    comes before.
    """
    if params.temperature == 0:
        tokens = logits.argmax(1)  # two log-probs may round to one number
        logprobs = torch.log_softmax(logits, 1).gather(1, tokens[:, None]).squeeze(1)
        return Draft(logits, logprobs, tokens[:, None], Draw(tokens, logprobs))
    vocab = logits.shape[1]
    every = params.top_p is None and params.min_p is None and params.top_k is None
    count = candidates_of_all(vocab) if every else min(CANDIDATES, vocab)
    if params.is_plain and tools.draw_plain is not None:
        draw = tools.draw_plain(logits, seeds, steps, params.temperature, count)
        return Draft(logits, draw.logprobs, draw.tokens[:, None], draw)
    if params.temperature != 1:
        logits = logits / params.temperature
    if params.top_k is not None:
        count = max(1, min(params.top_k, vocab))
    values, ids, normaliser = tools.search(logits, count)
    if every:
        return _draft_plain(logits, values, ids, normaliser, seeds, steps)
    keep = _nucleus(values, normaliser, params)
    draw = _draw_kept(values, ids, keep, seeds, steps)
    whole = params.top_k is not None or count == vocab
    return Draft(logits, normaliser, ids, draw, None if whole else keep[:, -1])


def candidates_of_all(vocab: int) -> int:
    """How many tokens are perturbed one by one where none is left out.

    Of a small vocabulary all, which is sooner than to find the largest half (docs/LOG.md).
    """
    return vocab if vocab <= 2 * CANDIDATES else CANDIDATES


def settle(
    drafted: Draft,
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
    params: SamplingParams,
) -> Draw:
    """The draft, drawn again in place where the tokens beyond its candidates have a say."""
    if drafted.open is None:
        return drafted.draw
    rows = torch.nonzero(drafted.open).flatten()
    if drafted.best is None:
        _widen(drafted, rows, seeds, steps, params)
    else:
        _draw_beyond(drafted, rows, seeds, steps)
    return drafted.draw


def _widen(
    drafted: Draft,
    rows: Int[Tensor, " open"],
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
    params: SamplingParams,
) -> None:
    """Draw again for replies whose nucleus may go beyond the candidates."""
    logits, normaliser, draw = drafted.logits, drafted.normaliser, drafted.draw
    count, vocab = drafted.ids.shape[1], logits.shape[1]
    while len(rows) and count < vocab:
        count = min(count * WIDER, vocab)
        values, ids = most_likely(logits[rows], count)
        keep = _nucleus(values, normaliser[rows], params)
        draw.tokens[rows], draw.logprobs[rows] = _draw_kept(
            values, ids, keep, seeds[rows], steps[rows]
        )
        rows = rows[keep[:, -1]]


def most_likely(
    logits: Float[Tensor, "batch vocab"], count: int
) -> tuple[Float[Tensor, "batch {count}"], Int[Tensor, "batch {count}"]]:
    """Values and ids of the largest logits, largest first: topk, sooner on a wide vocabulary.

    The vocabulary is cut into runs; the `count` largest lie in the `count` runs whose maxima are.
    """
    batch, vocab = logits.shape
    runs = vocab // RUN
    if vocab % RUN or runs < 4 * count:
        values, ids = logits.topk(count, dim=1)
        return values, ids
    table = logits.reshape(batch, RUN, runs)  # a run is a column: its maximum is elementwise
    best = table.amax(1).topk(count, dim=1, sorted=False).indices
    found = table.gather(2, best[:, None].expand(-1, RUN, -1)).view(batch, -1)
    values, places = found.topk(count, dim=1)
    return values, best.gather(1, places % count) + places // count * runs


def penalise(
    logits: Float[Tensor, "batch vocab"], generated: Int[Tensor, "batch past"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Logits with the repetition penalty on tokens already generated (-1 marks no token)."""
    if generated.shape[1] == 0:
        return logits
    rows, places = torch.nonzero(generated >= 0, as_tuple=True)
    ids = generated[rows, places]
    found, result = logits[rows, ids], logits.clone()
    result[rows, ids] = torch.where(found > 0, found / penalty, found * penalty)
    return result


def _nucleus(
    values: Float[Tensor, "batch candidates"],
    normaliser: Float[Tensor, " batch"],
    params: SamplingParams,
) -> Bool[Tensor, "batch candidates"]:
    """Candidates (sorted, most likely first) that top-k, min-p and top-p leave in."""
    keep = torch.ones_like(values, dtype=torch.bool)
    if params.top_k is not None:
        normaliser = values.logsumexp(1)  # top-p acts on what top-k has left
    if params.min_p is not None and params.min_p > 0:
        keep &= values >= values[:, :1] + torch.tensor(params.min_p).log().item()
    if params.top_p is not None:
        probabilities = (values - normaliser[:, None]).exp()
        before = probabilities.cumsum(1) - probabilities
        keep &= before < params.top_p
    keep[:, 0] = True
    return keep


def _draw_kept(
    values: Float[Tensor, "batch candidates"],
    ids: Int[Tensor, "batch candidates"],
    keep: Bool[Tensor, "batch candidates"],
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
) -> Draw:
    """A draw from the candidates that are kept."""
    values = values.masked_fill(~keep, float("-inf"))
    noisy = values.double() + gumbel(seeds, steps, ids)
    place = noisy.argmax(1, keepdim=True)
    logprobs = values.gather(1, place).squeeze(1) - values.logsumexp(1)
    return Draw(ids.gather(1, place).squeeze(1), logprobs)


def _draft_plain(
    logits: Float[Tensor, "batch vocab"],
    values: Float[Tensor, "batch candidates"],
    ids: Int[Tensor, "batch candidates"],
    normaliser: Float[Tensor, " batch"],
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
) -> Draft:
    """A draw from softmax(logits): candidates one by one, the tail as one, here only weighed."""
    noisy = values.double() + gumbel(seeds, steps, ids)
    best, place = noisy.max(1)
    tokens = ids.gather(1, place[:, None]).squeeze(1)
    draw = Draw(tokens, logits.gather(1, tokens[:, None]).squeeze(1) - normaliser)
    if ids.shape[1] == logits.shape[1]:
        return Draft(logits, normaliser, ids, draw)
    noise = gumbel(seeds, steps, torch.full_like(ids[:, :1], _TAIL_ID)).squeeze(1)
    inside = (values.double() - normaliser.double()[:, None]).exp().sum(1)
    rounding = 1e-5 + 1e-6 * normaliser.double().abs()  # above that of an fp32 normaliser
    most = normaliser.double() + (1 - inside + rounding).clamp(min=0).log()
    return Draft(logits, normaliser, ids, draw, most + noise > best, best, noise)


def _draw_beyond(
    drafted: Draft,
    open_rows: Int[Tensor, " open"],
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
) -> None:
    """Where the tail's variable is the largest, a draw from the tail."""
    logits, normaliser, ids, draw, _, best, noise = drafted
    assert best is not None
    assert noise is not None
    for rows in torch.split(open_rows, TAIL_ROWS):
        rest = logits[rows].double().scatter(1, ids[rows], float("-inf"))
        wins = rest.logsumexp(1) + noise[rows] > best[rows]
        every = torch.arange(rest.shape[1], device=ids.device)[None]
        rest += gumbel(seeds[rows], steps[rows], every, stream=_TAIL_STREAM)
        tokens = torch.where(wins, rest.argmax(1), draw.tokens[rows])
        draw.tokens[rows] = tokens
        draw.logprobs[rows] = logits[rows, tokens] - normaliser[rows]


def gumbel(
    seeds: Int[Tensor, " batch"],
    steps: Int[Tensor, " batch"],
    ids: Int[Tensor, "rows count"],
    stream: int = 0,
) -> Float[Tensor, "batch count"]:
    """Standard Gumbel noise in float64, a hash of (seed, step, token id, stream).

    Args:
        ids: of each reply, or one row for all.
    """
    state = _mix(seeds + _constant(0x9E3779B97F4A7C15) * (steps * 2 + stream + 1))[:, None]
    bits = _mix(state ^ _mix(ids * _constant(0xD1342543DE82EF95) + 1))
    uniform = ((_shift(bits, 11)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The finaliser of SplitMix64 (Steele et al. 2014); int64 wraps as uint64 does."""
    x = (x ^ _shift(x, 30)) * _constant(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _constant(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _constant(value: int) -> int:
    """A 64-bit constant as the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value

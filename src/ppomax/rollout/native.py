"""The native engine: Llama-type models with a preallocated cache and slots that are refilled.

Replies stand in slots 0..n-1 of one cache. A finished reply leaves: the last active slot moves into
its place, and waiting prompts are prefilled into the free slots; a prompt that several of them
share is computed once, and what all prompts begin with (a template's system message) once for all
slots. The residual stream, norms, softmax and log-probs are fp32, matrix products run in the
compute dtype, as in training under autocast.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World
from ppomax.models.compiled import library
from ppomax.rollout.cache import Cache, opening_of, room, rotations
from ppomax.rollout.engine import EngineSettings, Rollout, Told, check_prompts
from ppomax.rollout.graphs import Found, StepGraphs
from ppomax.rollout.kernels import SOURCE, Kernels
from ppomax.rollout.reply import Reply, columns_after, columns_of
from ppomax.rollout.sampling import PYTORCH, Draft, SamplingParams, Tools, draft, sample, settle
from ppomax.rollout.stops import StopStrings
from ppomax.rollout.weights import Layer, Weights, take_weights

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose frequencies do not change with the length of the text."""
PREFILL_TOKENS = 8192
"""Padded prompt tokens prefilled at once."""


def supports(model: PreTrainedModel) -> bool:
    """Whether the model is of the Llama family as this engine computes it."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(
        config.model_type in MODEL_TYPES
        and getattr(config, "hidden_act", "silu") == "silu"
        and not getattr(config, "mlp_bias", False)
        and rope.get("rope_type", "default") in ROPE_TYPES
        and not getattr(config, "use_sliding_window", False)
        and (config.model_type != "mistral" or getattr(config, "sliding_window", None) is None)
    )


class NativeEngine:
    """See the module's docstring; `Engine` is the protocol."""

    def __init__(
        self,
        settings: EngineSettings,
        model: PreTrainedModel,
        template: ChatTemplate,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        self.note: str | None = None
        config: Any = model.config  # each architecture's config has fields of its own
        self.settings, self.template = settings, template
        self.device, self.dtype = world.device, dtype
        self.hidden = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(config, "head_dim", None) or self.hidden // self.heads)
        self.inner = int(config.intermediate_size)
        self.eps = float(config.rms_norm_eps)
        self.max_positions = int(config.max_position_embeddings)
        rotary: Any = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
        self.inv_freq: Tensor = rotary.inv_freq.to(self.device, torch.float32)
        self.rope_scale = float(rotary.attention_scaling)
        self.stops = StopStrings(template)
        self.kernels: Kernels | None = None
        self.tools = PYTORCH
        if settings.kernels and self.device.type == "cpu":
            found = library(SOURCE)
            if isinstance(found, str):
                self.note = f"decoding with PyTorch's operations, more slowly: {found}"
            else:
                self.kernels = Kernels(found, dtype)
                self.tools = Tools(self.kernels.most_likely, self.kernels.draw_plain)
        self.sync(model)

    def sync(self, model: PreTrainedModel) -> None:
        """Take a copy of the model's present weights; the copy before is let go first."""
        self.release()
        self.weights: Weights = take_weights(
            model, self.heads, self.kv_heads, self.device, self.dtype, self.kernels
        )

    def release(self) -> None:
        """Let go of the copy."""
        vars(self).pop("weights", None)

    # --- the block ----------------------------------------------------------------------------

    def _project(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [tokens, heads, dim], rotated keys and values [tokens, kv_heads, dim].

        Args:
            x: [tokens, hidden].
        """
        normed = self._norm(x, layer.attention_norm)
        packed = layer.qkv(normed).view(len(x), -1, self.head_dim)
        qk, v = packed[:, : -self.kv_heads].float(), packed[:, -self.kv_heads :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (self.head_dim,), None, self.eps) * layer.qk_norm
        half = self.head_dim // 2
        turned = torch.cat([qk[..., half:], qk[..., :half]], -1)
        qk = torch.addcmul(qk * cos, turned, sin).to(self.dtype)
        return qk[:, : self.heads], qk[:, self.heads :], v

    def _finish(self, layer: Layer, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after attention's output and the MLP; x is overwritten.

        Args:
            mixed: what attention read, [tokens, heads * dim].
        """
        x += layer.out(mixed)
        gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, -1)
        x += layer.down(F.silu(gate).mul_(up))
        return x

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.kernels is not None:
            return self.kernels.norm(x, None, weight, self.eps)
        return F.rms_norm(x, (self.hidden,), weight, self.eps).to(self.dtype)

    def _logits(self, x: Tensor) -> Tensor:
        return self.weights.head(self._norm(x, self.weights.final_norm)).float()

    def _prefill(self, replies: list[Reply], cache: Cache, first: int) -> Tensor:
        """Fill slots from `first` on with the prompts; next-token logits [replies, vocab].

        Each distinct prompt is computed once, in the slot of the first reply that has it.
        """
        groups = [reply.group for reply in replies]
        holders = [place for place, group in enumerate(groups) if group not in groups[:place]]
        prompts = [replies[place].prompt for place in holders]
        held = torch.tensor(holders, device=self.device) + first
        after = self._read(prompts, cache.opening, held, cache)
        which = [holders.index(groups.index(group)) for group in groups]
        if len(prompts) < len(replies):
            slots, longest = slice(first, first + len(replies)), max(map(len, prompts))
            cache.copy(held[which], slots, longest)
        return self._logits(after[which])

    def _read(self, prompts: list[list[int]], start: int, slots: Tensor, cache: Cache) -> Tensor:
        """Read prompts, from token `start` on, into the cache; the residual stream after each.

        Args:
            slots: of each prompt.
        """
        lengths = torch.tensor([len(prompt) - start for prompt in prompts])
        rows = torch.arange(len(prompts)).repeat_interleave(lengths).to(self.device)
        positions = torch.cat([torch.arange(start, len(prompt)) for prompt in prompts])
        ids = torch.tensor([token for prompt in prompts for token in prompt[start:]])
        ids, positions = ids.to(self.device), positions.to(self.device)
        if self.kernels is None:
            x = self._read_padded(ids, rows, positions, start, slots, cache)
        else:
            x = self._read_compiled(self.kernels, ids, positions, slots[rows], cache)
        return x[(lengths.cumsum(0) - 1).to(self.device)]

    def _read_padded(
        self,
        ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        start: int,
        slots: Tensor,
        cache: Cache,
    ) -> Tensor:
        """Read tokens into the cache; the residual stream after each, [tokens, hidden].

        Only attention sees padding.

        Args:
            rows: of each token's prompt.
            positions: of each token in its prompt, `start` the first.
            slots: of each prompt.
        """
        count, longest, shared = len(slots), int(positions.max()) + 1, self.heads // self.kv_heads
        x = F.embedding(ids, self.weights.embedding).float()
        cos, sin = cache.cos[positions], cache.sin[positions]
        mask = None  # causal; the tokens before `start` are seen by all
        if start:
            mask = torch.ones(longest - start, longest, dtype=torch.bool, device=self.device)
            mask = mask.tril_(start)

        def padded(flat: Tensor) -> Tensor:
            result = flat.new_zeros(count, flat.shape[1], longest - start, self.head_dim)
            result[rows, :, positions - start] = flat
            return result

        for layer, keys, values in zip(cache.layers, cache.keys, cache.values, strict=True):
            q, k, v = map(padded, self._project(layer, x, cos, sin))
            keys[slots, :, :, start:longest] = k.transpose(2, 3)
            values[slots, :, start:longest] = v
            if start:
                k, v = keys[slots, :, :, :longest].transpose(2, 3), values[slots, :, :longest]
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            x = self._finish(layer, x, mixed[rows, :, positions - start].flatten(1))
        return x

    def _stepper(
        self, slots: int, cache: Cache, params: SamplingParams
    ) -> Callable[[Tensor, int], Found]:
        """What decodes, `Step` in the words of graphs.py; on CUDA recorded and replayed."""

        def step(given: Tensor, span: int) -> Found:
            tokens, positions, seeds, steps = given
            logits = self._decode(tokens, positions, span, cache)
            if params.repetition_penalty is not None:
                return logits  # what it counts grows from step to step
            return draft(logits, seeds, steps, params, self.tools)

        if self.device.type == "cuda" and self.settings.cuda_graphs:
            return StepGraphs(step, slots, cache.cos.shape[0], self.device)
        return step

    def _decode(self, tokens: Tensor, positions: Tensor, span: int, cache: Cache) -> Tensor:
        """One step of slots 0..n-1; logits [n, vocab].

        Args:
            tokens: each slot's newest, [n].
            positions: where they go, [n].
            span: positions of the cache to attend to; those beyond a slot's own are masked.
        """
        if self.kernels is not None:
            x = self._read_compiled(self.kernels, tokens, positions.contiguous(), None, cache)
            return self._logits(x)
        count = len(tokens)
        heads = count * self.kv_heads
        rows = torch.arange(count, device=self.device)
        x = F.embedding(tokens, self.weights.embedding).float()
        scale = torch.ones(self.heads + self.kv_heads, 1, device=self.device)
        scale[: self.heads] = self.head_dim**-0.5  # of scores, taken by their queries
        cos, sin = cache.cos[positions] * scale, cache.sin[positions] * scale
        beyond = torch.arange(span, device=self.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(beyond, float("-inf"))[:, None]
        for layer, keys, values in zip(cache.layers, cache.keys, cache.values, strict=True):
            q, k, v = self._project(layer, x, cos, sin)
            keys[rows, :, :, positions], values[rows, :, positions] = k, v
            # query heads that share keys are the rows of one product over contiguous slices
            q = q.reshape(heads, -1, self.head_dim)
            scores = torch.bmm(q, keys.view(-1, *keys.shape[2:])[:heads, :, :span])
            scores.view(count, -1, span).add_(mask)
            shares = scores.softmax(-1, dtype=torch.float32).to(self.dtype)
            mixed = torch.bmm(shares, values.view(-1, *values.shape[2:])[:heads, :span])
            x = self._finish(layer, x, mixed.view(count, -1))
        return self._logits(x)

    def _read_compiled(
        self, kernels: Kernels, ids: Tensor, positions: Tensor, slots: Tensor | None, cache: Cache
    ) -> Tensor:
        """Read tokens into the cache, each attending to its text so far; the stream after them.

        Args:
            slots: of each token's text; without them token i is of slot i.
        """
        turns, eps = (cache.cos, cache.sin), self.eps
        x = F.embedding(ids, self.weights.embedding).float()
        if cache.addresses is not None:
            sizes = (self.kv_heads, self.head_dim, cache.values[0].shape[2])
            given = (cache.addresses, x, turns, positions, slots)
            kernels.read(*given, self.heads, sizes, self.inner, eps)
            return x
        added = None
        for layer, keys, values in zip(cache.layers, cache.keys, cache.values, strict=True):
            qkv = layer.qkv(kernels.norm(x, added, layer.attention_norm, eps))
            mixed = kernels.attend(qkv, layer.qk_norm, turns, positions, slots, keys, values, eps)
            normed = kernels.norm(x, layer.out(mixed), layer.mlp_norm, eps)
            added = layer.down(kernels.swiglu(layer.gate_up(normed)))
        return x if added is None else x.add_(added)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        told: Told | None = None,
    ) -> Rollout:
        """One reply per prompt, in the prompts' order."""
        check_prompts(prompts, self.max_positions)
        first: dict[tuple[int, ...], int] = {}
        replies = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            most = min(params.max_new_tokens, self.max_positions - len(prompt))
            group = first.setdefault(tuple(prompt), index)
            replies.append(Reply(index, prompt, seed, group, most, [], []))
        finished = [False] * len(replies)

        def end(reply: Reply, by_itself: bool) -> None:
            finished[reply.index] = by_itself
            if told is not None:
                told(reply.index, reply.ids, by_itself)

        if replies:
            slots = min(self.settings.slots, len(replies))
            length = min(max(map(len, prompts)) + params.max_new_tokens, self.max_positions)
            cache = self._cache(slots, length, opening_of(prompts))
            self._run(replies, slots, cache, params, end)
        return Rollout(
            prompts,
            [reply.ids for reply in replies],
            [reply.logprobs for reply in replies],
            finished,
        )

    def _cache(self, slots: int, length: int, opening: list[int]) -> Cache:
        """Room for `slots` texts of `length` tokens that all begin with `opening`."""
        turns = rotations(self.inv_freq, self.rope_scale, length)
        cache = room(
            self.weights.layers, slots, self.kv_heads, turns, self.dtype, opening=len(opening)
        )
        if opening:
            self._read([opening], 0, torch.zeros(1, dtype=torch.long, device=self.device), cache)
            cache.copy(slice(0, 1), slice(1, None), len(opening))
        return cache

    def _run(
        self,
        replies: list[Reply],
        slots: int,
        cache: Cache,
        params: SamplingParams,
        end: Callable[[Reply, bool], None],
    ) -> None:
        """Write all replies, those with the longest prompts first; at most `slots` at a time."""
        waiting = sorted(replies, key=lambda reply: (-len(reply.prompt), reply.group, reply.index))
        active: list[Reply] = []
        refill, step = max(1, slots // 8), self._stepper(slots, cache, params)
        columns: Tensor | None = None  # as long as the same replies are active
        while active or waiting:
            free = slots - len(active)
            if waiting and (free >= refill or len(waiting) <= free):
                stepping = self._take(waiting, free)
                found: Found = self._prefill(stepping, cache, len(active))
                columns = columns_of(stepping).to(self.device)
                active += stepping
            else:
                stepping = active
                if columns is None:
                    columns = columns_of(active).to(self.device)
                found = step(columns, max(reply.length for reply in active))
            tokens = self._extend(stepping, found, columns, params)
            columns = columns_after(columns, tokens) if stepping is active else None
            for slot in reversed(range(len(active))):
                reply = active[slot]
                ended = reply.ids[-1] in self.template.end_ids or self.stops.hit(
                    reply.ids, params.stop
                )
                if ended or len(reply.ids) >= reply.most:
                    end(reply, ended)
                    self._leave(active, slot, cache)
                    columns = None

    def _take(self, waiting: list[Reply], free: int) -> list[Reply]:
        """The next replies for the free slots, with as many prompts as one prefill holds."""
        fitting = max(1, PREFILL_TOKENS // len(waiting[0].prompt))
        taken: list[Reply] = []
        groups: set[int] = set()
        while waiting and len(taken) < free:
            if len(groups | {waiting[0].group}) > fitting:
                break
            groups.add(waiting[0].group)
            taken.append(waiting.pop(0))
        return taken

    def _extend(
        self, replies: list[Reply], found: Found, columns: Tensor, params: SamplingParams
    ) -> Tensor:
        """Draw one token for each reply, as far as the step has not."""
        _, _, seeds, steps = columns
        if isinstance(found, Draft):
            draw = settle(found, seeds, steps, params)
        else:
            past = self._past(replies, params)
            draw = sample(found, seeds, steps, params, past, self.tools)
        for reply, token, logprob in zip(
            replies, draw.tokens.tolist(), draw.logprobs.tolist(), strict=True
        ):
            reply.ids.append(token)
            reply.logprobs.append(logprob)
        return draw.tokens

    def _past(self, replies: list[Reply], params: SamplingParams) -> Tensor | None:
        """What the replies hold, where that is penalised; -1 where one is shorter than another."""
        if params.repetition_penalty is None:
            return None
        longest = max(len(reply.ids) for reply in replies)
        return torch.tensor(
            [reply.ids + [-1] * (longest - len(reply.ids)) for reply in replies],
            dtype=torch.long,
            device=self.device,
        ).view(len(replies), longest)

    def _leave(self, active: list[Reply], slot: int, cache: Cache) -> None:
        """Free a slot: the last active reply moves into it."""
        last = len(active) - 1
        if slot != last:
            cache.copy(last, slot, active[last].length)
            active[slot] = active[last]
        active.pop()

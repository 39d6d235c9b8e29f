"""The native engine: Llama-type models with a preallocated cache and slots that are refilled.

Replies stand in slots 0..n-1 of one cache. A finished reply leaves: the last active slot moves into
its place, and waiting prompts are prefilled into the free slots. The residual stream, norms,
softmax and log-probs are fp32, matrix products run in the compute dtype, as in training under
autocast.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, full_state
from ppomax.models.lora import Factors, effective_state_dict, split_state_dict
from ppomax.rollout.engine import EngineSettings, Rollout, check_prompts
from ppomax.rollout.product import Product, pack
from ppomax.rollout.sampling import SamplingParams, sample
from ppomax.rollout.stops import StopStrings

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


@dataclass(frozen=True, slots=True)
class Layer:
    """Packed weights of one decoder layer, in the compute dtype (norms in fp32)."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(slots=True)
class Reply:
    """A reply being written."""

    index: int
    prompt: list[int]
    seed: int
    ids: list[int]
    logprobs: list[float]


class NativeEngine:
    """See the module's docstring; `Engine` is the protocol."""

    note: str | None = None

    def __init__(
        self,
        settings: EngineSettings,
        model: PreTrainedModel,
        template: ChatTemplate,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        config: Any = model.config  # each architecture's config has fields of its own
        self.settings, self.template = settings, template
        self.device, self.dtype = world.device, dtype
        self.hidden = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(config, "head_dim", None) or self.hidden // self.heads)
        self.eps = float(config.rms_norm_eps)
        self.max_positions = int(config.max_position_embeddings)
        rotary: Any = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
        self.inv_freq: Tensor = rotary.inv_freq.to(self.device, torch.float32)
        self.rope_scale = float(rotary.attention_scaling)
        self.stops = StopStrings(template)
        self.layers: list[Layer] = []
        self.sync(model)

    # --- weights ------------------------------------------------------------------------------

    @torch.no_grad()
    def sync(self, model: PreTrainedModel) -> None:
        """Pack the model's present weights, gathered where sharded.

        In fp32 adapters are merged; in bf16, where that would round them away, they stand beside.
        """
        whole = full_state(model)
        factors: dict[str, Factors] = {}
        if self.dtype == torch.float32:
            state = effective_state_dict(model, whole)
        else:
            state, factors = split_state_dict(model, whole)
            merged = effective_state_dict(model, whole)
            for name in [name for name in factors if not name.endswith("_proj")]:
                state[f"{name}.weight"] = merged[f"{name}.weight"]  # of head and embedding
        prefix = next(n for n in state if n.endswith("embed_tokens.weight"))[
            : -len("embed_tokens.weight")
        ]

        def product(*names: str) -> Product:
            return pack(
                [f"{prefix}{name}" for name in names], state, factors, self.device, self.dtype
            )

        def norm(name: str) -> Tensor:
            return state[f"{prefix}{name}"].to(self.device, torch.float32, copy=True)

        def optional_norm(name: str) -> Tensor | None:
            return norm(name) if f"{prefix}{name}" in state else None

        self.layers = []
        for index in range(sum(n.endswith("input_layernorm.weight") for n in state)):
            at = f"layers.{index}."
            attention = [f"{at}self_attn.{name}_proj" for name in "qkv"]
            self.layers.append(
                Layer(
                    qkv=product(*attention),
                    out=product(f"{at}self_attn.o_proj"),
                    gate_up=product(f"{at}mlp.gate_proj", f"{at}mlp.up_proj"),
                    down=product(f"{at}mlp.down_proj"),
                    attention_norm=norm(f"{at}input_layernorm.weight"),
                    mlp_norm=norm(f"{at}post_attention_layernorm.weight"),
                    q_norm=optional_norm(f"{at}self_attn.q_norm.weight"),
                    k_norm=optional_norm(f"{at}self_attn.k_norm.weight"),
                )
            )
        self.final_norm = norm("norm.weight")
        self.embedding = state[f"{prefix}embed_tokens.weight"].to(
            self.device, self.dtype, copy=True
        )
        self.head = self.embedding
        if not model.config.tie_word_embeddings:
            self.head = state["lm_head.weight"].to(self.device, self.dtype, copy=True)

    # --- the block ----------------------------------------------------------------------------

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of [rows, length, head_dim]; positions [rows, length]."""
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def _qkv(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, and keys and values.

        [rows, heads, length, dim], [rows, kv_heads, length, dim].
        """
        rows, length, _ = x.shape
        normed = F.rms_norm(x, (self.hidden,), layer.attention_norm, self.eps).to(self.dtype)
        packed = layer.qkv(normed)
        packed = packed.view(rows, length, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = torch.split(packed, [self.heads, self.kv_heads, self.kv_heads], dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q.float(), (self.head_dim,), layer.q_norm, self.eps)
            k = F.rms_norm(k.float(), (self.head_dim,), layer.k_norm, self.eps)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        half = self.head_dim // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x * cos[:, :, None] + turned * sin[:, :, None]).to(self.dtype)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (self.hidden,), layer.mlp_norm, self.eps).to(self.dtype)
        gate, up = layer.gate_up(normed).chunk(2, -1)
        return x + layer.down(F.silu(gate) * up)

    def _logits(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (self.hidden,), self.final_norm, self.eps).to(self.dtype)
        return F.linear(x, self.head).float()

    def _prefill(
        self, replies: list[Reply], cache: list[tuple[Tensor, Tensor]], first: int
    ) -> Tensor:
        """Fill slots from `first` on with the prompts; next-token logits [replies, vocab]."""
        lengths = torch.tensor([len(reply.prompt) for reply in replies], device=self.device)
        longest = int(lengths.max())
        ids = torch.zeros(len(replies), longest, dtype=torch.long)
        for row, reply in enumerate(replies):
            ids[row, : len(reply.prompt)] = torch.tensor(reply.prompt)
        x = F.embedding(ids.to(self.device), self.embedding).float()
        positions = torch.arange(longest, device=self.device)[None].expand(len(replies), -1)
        cos, sin = self._rope(positions)
        groups = self.heads // self.kv_heads
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = self._qkv(layer, x, cos, sin)
            keys[first : first + len(replies), :, :longest] = k
            values[first : first + len(replies), :, :longest] = v
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2).flatten(2)
            x = self._mlp(layer, x + layer.out(mixed))
        return self._logits(x[torch.arange(len(replies), device=self.device), lengths - 1])

    def _decode(
        self, tokens: Tensor, lengths: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """One step of slots 0..n-1; logits [n, vocab].

        Args:
            tokens: [n], each reply's newest.
            lengths: [n], the positions they go to.
        """
        count, longest = len(tokens), int(lengths.max()) + 1
        rows = torch.arange(count, device=self.device)
        x = F.embedding(tokens, self.embedding).float()[:, None]
        cos, sin = self._rope(lengths[:, None])
        groups = self.heads // self.kv_heads
        beyond = torch.arange(longest, device=self.device)[None] > lengths[:, None]
        beyond = beyond[:, None, None].expand(-1, self.kv_heads, groups, -1)
        scale = self.head_dim**-0.5
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = self._qkv(layer, x, cos, sin)
            keys[rows, :, lengths] = k[:, :, 0]
            values[rows, :, lengths] = v[:, :, 0]
            q = q.reshape(count, self.kv_heads, groups, self.head_dim)
            scores = torch.matmul(q, keys[:count, :, :longest].transpose(2, 3)).float() * scale
            weights = scores.masked_fill_(beyond, float("-inf")).softmax(-1).to(self.dtype)
            mixed = torch.matmul(weights, values[:count, :, :longest])
            mixed = mixed.reshape(count, 1, self.heads * self.head_dim)
            x = self._mlp(layer, x + layer.out(mixed))
        return self._logits(x[:, 0])

    # --- the loop -----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> Rollout:
        """One reply per prompt, in the prompts' order."""
        check_prompts(prompts, self.max_positions)
        replies = [
            Reply(index, prompt, seed, [], [])
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        finished = [False] * len(replies)
        if replies:
            waiting = sorted(replies, key=lambda reply: (-len(reply.prompt), reply.index))
            slots = min(self.settings.slots, len(replies))
            length = min(max(map(len, prompts)) + params.max_new_tokens, self.max_positions)
            shape = (slots, self.kv_heads, length, self.head_dim)
            cache = [
                (
                    torch.zeros(shape, dtype=self.dtype, device=self.device),
                    torch.zeros(shape, dtype=self.dtype, device=self.device),
                )
                for _ in self.layers
            ]
            self._run(waiting, slots, cache, params, finished)
        return Rollout(
            prompts,
            [reply.ids for reply in replies],
            [reply.logprobs for reply in replies],
            finished,
        )

    def _run(
        self,
        waiting: list[Reply],
        slots: int,
        cache: list[tuple[Tensor, Tensor]],
        params: SamplingParams,
        finished: list[bool],
    ) -> None:
        """Write all waiting replies; at most `slots` at a time."""
        active: list[Reply] = []
        refill = max(1, slots // 8)
        while active or waiting:
            logits: Tensor | None = None
            if waiting and (slots - len(active) >= refill or len(waiting) <= slots - len(active)):
                new = self._take(waiting, slots - len(active))
                first = len(active)
                active += new
                logits = self._prefill(new, cache, first)
                stepping = new
            else:
                stepping = active
                tokens = torch.tensor([reply.ids[-1] for reply in active], device=self.device)
                lengths = torch.tensor(
                    [len(reply.prompt) + len(reply.ids) - 1 for reply in active], device=self.device
                )
                logits = self._decode(tokens, lengths, cache)
            self._extend(stepping, logits, params)
            for slot in reversed(range(len(active))):
                reply = active[slot]
                ended = reply.ids[-1] in self.template.end_ids or self.stops.hit(
                    reply.ids, params.stop
                )
                full = len(reply.prompt) + len(reply.ids) >= self.max_positions
                if ended or full or len(reply.ids) >= params.max_new_tokens:
                    finished[reply.index] = ended
                    self._leave(active, slot, cache)

    def _take(self, waiting: list[Reply], free: int) -> list[Reply]:
        """The next prompts for the free slots, as many as one prefill holds."""
        fitting = max(1, PREFILL_TOKENS // len(waiting[0].prompt))
        count = min(free, fitting)
        taken = waiting[:count]
        del waiting[:count]
        return taken

    def _extend(self, replies: list[Reply], logits: Tensor, params: SamplingParams) -> None:
        """Draw one token for each reply."""
        seeds = torch.tensor([reply.seed for reply in replies], device=self.device)
        steps = torch.tensor([len(reply.ids) for reply in replies], device=self.device)
        past = None
        if params.repetition_penalty is not None:
            longest = max(len(reply.ids) for reply in replies)
            past = torch.tensor(
                [reply.ids + [-1] * (longest - len(reply.ids)) for reply in replies],
                dtype=torch.long,
                device=self.device,
            ).view(len(replies), longest)
        draw = sample(logits, seeds, steps, params, past)
        for reply, token, logprob in zip(
            replies, draw.tokens.tolist(), draw.logprobs.tolist(), strict=True
        ):
            reply.ids.append(token)
            reply.logprobs.append(logprob)

    def _leave(self, active: list[Reply], slot: int, cache: list[tuple[Tensor, Tensor]]) -> None:
        """Free a slot: the last active reply moves into it."""
        last = len(active) - 1
        if slot != last:
            used = len(active[last].prompt) + len(active[last].ids)
            for keys, values in cache:
                keys[slot, :, :used] = keys[last, :, :used]
                values[slot, :, :used] = values[last, :, :used]
            active[slot] = active[last]
        active.pop()

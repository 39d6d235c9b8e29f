"""The fallback engine: any causal LM that `transformers` runs, left-padded, with its own cache.

Sampling is shared with the native engine, so seeds and log-probs mean the same.
"""

import copy
import math

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ppomax.data.template import ChatTemplate
from ppomax.distributed import World, full_state
from ppomax.models.lora import effective_state_dict, has_lora
from ppomax.rollout.engine import EngineSettings, Rollout, Told, check_prompts
from ppomax.rollout.sampling import SamplingParams, sample
from ppomax.rollout.stops import StopStrings


class TransformersEngine:
    """See the module's docstring; `Engine` is the protocol. Holds a full copy of the weights."""

    note: str | None = None

    def __init__(
        self,
        settings: EngineSettings,
        model: PreTrainedModel,
        template: ChatTemplate,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        self.settings, self.template, self.device = settings, template, world.device
        self.stops = StopStrings(template)
        self.config = copy.deepcopy(model.config)
        limit = getattr(self.config, "max_position_embeddings", None)
        self.max_positions: float = math.inf if limit is None else int(limit)
        own = [world.device] if world.device.type == "cuda" else []
        with torch.random.fork_rng(own), torch.device(world.device):  # weights drawn, then replaced
            plain: nn.Module = type_of(model)(self.config)
        self.model = _cast(plain, dtype).eval()
        if dtype != torch.float32 and has_lora(model):
            self.note = (
                "adapters are merged into bfloat16 weights for the replies, which loses most of a "
                "young update; dtype float32 keeps it"
            )
        self.sync(model)

    @torch.no_grad()
    def sync(self, model: PreTrainedModel) -> None:
        """Copy the model's present weights."""
        own = self.model.state_dict()
        for name, value in effective_state_dict(model, full_state(model)).items():
            own[name].copy_(value)

    def release(self) -> None:
        """Nothing: the copy is kept."""

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        told: Told | None = None,
    ) -> Rollout:
        """One reply per prompt, `slots` at a time, prompts of similar length together."""
        check_prompts(prompts, self.max_positions)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        for start in range(0, len(order), self.settings.slots):
            rows = order[start : start + self.settings.slots]
            self._write(rows, prompts, params, seeds, responses, logprobs, finished)
            if told is not None:
                for row in rows:
                    told(row, responses[row], finished[row])
        return Rollout(prompts, responses, logprobs, finished)

    def _write(
        self,
        rows: list[int],
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        responses: list[list[int]],
        logprobs: list[list[float]],
        finished: list[bool],
    ) -> None:
        longest = max(len(prompts[row]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
        attention = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, longest - len(prompts[row]) :] = torch.tensor(
                prompts[row], device=self.device
            )
            attention[place, longest - len(prompts[row]) :] = 1
        cache = DynamicCache(config=self.config)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        done = [False] * len(rows)
        last = min(longest + params.max_new_tokens, self.max_positions) - 1
        row_seeds = torch.tensor([seeds[row] for row in rows], device=self.device)
        past = torch.full((len(rows), 0), -1, dtype=torch.long, device=self.device)
        for step in range(params.max_new_tokens):
            logits = self._next(ids, attention, positions, cache)
            steps = torch.full_like(row_seeds, step)
            draw = sample(logits, row_seeds, steps, params, past)
            for place, row in enumerate(rows):
                if done[place]:
                    continue
                responses[row].append(int(draw.tokens[place]))
                logprobs[row].append(float(draw.logprobs[place]))
                ended = responses[row][-1] in self.template.end_ids
                ended = ended or self.stops.hit(responses[row], params.stop)
                finished[row] = ended
                done[place] = ended or len(prompts[row]) + step + 1 >= self.max_positions
            if all(done):
                return
            ids = draw.tokens[:, None]
            past = torch.cat([past, ids], 1)
            attention = torch.cat([attention, torch.ones_like(ids)], 1)
            positions = (positions[:, -1:] + 1).clamp(
                max=last
            )  # replies that are done go no further

    def _next(
        self, ids: Tensor, attention: Tensor, positions: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Logits [rows, vocab] after the last position, fp32."""
        output = self.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The weights in `dtype`; rotary frequencies stay float32, as the trainer has them.

    Rounded to bfloat16 they turn positions in the hundreds by a good part of a circle.
    """
    kept = {name: x for name, x in model.named_buffers() if name.endswith("inv_freq")}
    model = model.to(dtype)
    for name, frequencies in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, frequencies)
    return model


def type_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The model's own class (FSDP gives sharded models a subclass)."""
    for kind in type(model).__mro__:
        if issubclass(kind, PreTrainedModel) and not kind.__name__.startswith("FSDP"):
            return kind
    return type(model)

"""What stands on a backbone: hidden states, the unembedding, and one scalar per token.

Nothing here reads a file but `ScalarModel.save`, which writes one; loading is `load`.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppomax.errors import ModelError
from ppomax.models.folders import quiet
from ppomax.models.lora import effective_state_dict, has_lora
from ppomax.models.reading import reading_of

LM_HEAD_FILE = "lm_head.safetensors"


class ScalarOutput(NamedTuple):
    """What a ScalarModel computes for a batch."""

    values: Float[Tensor, "batch sequence"]
    """One number per position, fp32; 0 where nobody asked for it."""
    hidden: Float[Tensor, "asked hidden"]
    """The backbone's last hidden states there, row by row, for the language-model loss."""


def hidden_states(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    *,
    position_ids: Int[Tensor, "batch sequence"] | None = None,
    attention_mask: Tensor | None = None,
    past: Cache | None = None,
) -> Float[Tensor, "batch sequence hidden"]:
    """Last hidden states of a causal model, without logits; adapters and wrappers looked through.

    Right-padded batches need no mask: attention is causal, so a token never sees what follows it.
    Under autocast the embedding is raised to fp32 first, so that the residual stream is fp32
    whether the weights are fp32 masters or frozen bf16, and policy and reference round alike.
    Blocks in a `Trunk` are skipped where it has read the same ids before.

    Args:
        past: keys and values of what stands before the ids; theirs are added to it.
    """
    backbone = backbone_of(model)
    trunk = getattr(backbone, "trunk", None)
    plain = position_ids is None and attention_mask is None and past is None
    with trunk.reading(input_ids) if trunk is not None and plain else nullcontext():
        output = backbone(
            **_embedded(backbone, input_ids),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past,
            use_cache=past is not None,
            return_dict=True,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def states_of(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    asked: Bool[Tensor, "batch sequence"],
    lengths: Int[Tensor, " batch"],
) -> Float[Tensor, "asked hidden"]:
    """`hidden_states` where they are asked for, row by row; what nobody reads is not computed.

    Blocks that can (`ppomax.models.reading`) compute what several texts begin with once.

    Args:
        lengths: of the texts; nothing behind them is asked for.

    Raises:
        ValueError: something is, or a length is longer than the rows.
    """
    backbone = backbone_of(model)
    trunk = getattr(backbone, "trunk", None)
    reading = reading_of(backbone, input_ids, asked, lengths)
    if reading is None:
        return hidden_states(model, input_ids)[asked]
    ids = reading.prefixes.ids[None]
    with nullcontext() if trunk is None else trunk.reading(input_ids, lengths):
        output = backbone(
            **_embedded(backbone, ids), **reading.inputs, use_cache=False, return_dict=True
        )
    place = torch.zeros(len(reading.prefixes.ids), dtype=torch.long)
    place[reading.rows] = torch.arange(len(reading.rows))
    return F.embedding(place[reading.prefixes.rows[asked]], output.last_hidden_state[0])


def _embedded(backbone: Any, input_ids: Tensor) -> dict[str, Tensor]:  # noqa: ANN401 - as backbone_of
    if not torch.is_autocast_enabled(input_ids.device.type):
        return {"input_ids": input_ids}
    return {"inputs_embeds": backbone.get_input_embeddings()(input_ids).float()}


def output_weight(model: nn.Module) -> Float[Tensor, "vocab hidden"]:
    """The unembedding matrix: `hidden @ weight.T` are the logits.

    Raises:
        ModelError: the model has none (a reward model saved without its language-model head).
    """
    if isinstance(model, ScalarModel):
        return model.output_weight()
    head = _unwrapped(model).get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head")
    weight: Tensor = head.weight
    return weight


class ScalarModel(nn.Module):
    """A backbone with a linear score head: the critic at every position, the reward at one.

    Input is right-padded and causal, so no mask is needed. `forward` is the one entry that
    DDP and FSDP wrap; the methods below it are readings of its output.
    """

    def __init__(
        self, backbone: PreTrainedModel, score: nn.Linear, lm_head: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.score = score
        self.lm_head = lm_head
        """Kept only where the model's unembedding is not its embedding."""
        self.offset = 0.0
        """Taken from every number; a critic's alone, and in no exported folder."""

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's configuration."""
        config: PreTrainedConfig = self.backbone.config
        return config

    @classmethod
    def from_causal_lm(cls, model: PreTrainedModel, seed: int) -> Self:
        """A fresh score head on a language model's backbone, which is taken over, not copied.

        The head is normal with std 1 / sqrt(hidden + 1) (Stiennon et al. 2020, as in
        summarize-from-feedback), the same for the same seed.
        """
        parts: Any = model  # transformers leaves these methods untyped
        head = parts.get_output_embeddings()
        tied = head.weight is parts.get_input_embeddings().weight
        size = head.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, size, generator=generator) * (size + 1) ** -0.5
        score = nn.Linear(size, 1, bias=False, device="meta")  # draws nothing from the global state
        score.weight = nn.Parameter(weight)
        return cls(parts.base_model, score.to(parts.device), None if tied else head)

    @classmethod
    def from_classifier(cls, model: PreTrainedModel, lm_head: nn.Linear | None = None) -> Self:
        """The parts of a sequence classifier with one output.

        Raises:
            ModelError: its head is not one linear layer named `score`.
        """
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1 or score.bias is not None:
            raise ModelError(
                f"{type(model).__name__}: a reward model needs one linear head `score` with one "
                "output and no bias; use a decoder-only architecture"
            )
        backbone: Any = model.base_model
        return cls(backbone, score.float(), lm_head)

    def forward(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        position_ids: Int[Tensor, "batch sequence"] | None = None,
        attention_mask: Tensor | None = None,
        *,
        asked: Bool[Tensor, "batch sequence"] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> ScalarOutput:
        """Hidden states and the head's reading of each, the latter in fp32 even under autocast.

        Args:
            attention_mask: additive, [batch, 1, sequence, sequence]; None: every token sees those
                before it.
            asked: whose are read; None: all.
            lengths: of the texts, where something is asked for: what nobody reads is then not
                computed (`states_of`).

        Raises:
            ValueError: with lengths comes a mask or positions, or nothing is asked for.
        """
        if lengths is not None:
            if asked is None or position_ids is not None or attention_mask is not None:
                raise ValueError("lengths say what of plain texts is asked for")
            hidden = states_of(self.backbone, input_ids, asked, lengths)
        else:
            hidden = hidden_states(
                self.backbone, input_ids, position_ids=position_ids, attention_mask=attention_mask
            )
            hidden = hidden.flatten(0, 1) if asked is None else hidden[asked]
        with torch.autocast(hidden.device.type, enabled=False):
            values = F.linear(hidden.float(), self.score.weight.float()).squeeze(-1)
        if self.offset:
            values = values - self.offset
        if asked is None:
            return ScalarOutput(values.view(input_ids.shape), hidden)
        return ScalarOutput(values.new_zeros(asked.shape).masked_scatter(asked, values), hidden)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        position_ids: Int[Tensor, "batch sequence"] | None = None,
    ) -> Float[Tensor, "batch sequence hidden"]:
        """The backbone's last hidden states."""
        return hidden_states(self.backbone, input_ids, position_ids=position_ids)

    def values(self, input_ids: Int[Tensor, "batch sequence"]) -> Float[Tensor, "batch sequence"]:
        """The number at every position, fp32; those at padding mean nothing."""
        output: ScalarOutput = self(input_ids)
        return output.values

    def scores(
        self, input_ids: Int[Tensor, "batch sequence"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """The number at each row's last token, position `lengths - 1`."""
        asked = last_tokens(input_ids, lengths)
        output: ScalarOutput = self(input_ids, asked=asked, lengths=lengths)
        return read_scores(output.values, lengths)

    def output_weight(self) -> Float[Tensor, "vocab hidden"]:
        """The unembedding for the imitation loss.

        Raises:
            ModelError: the model was saved without a head of its own and does not tie it.
        """
        if self.lm_head is not None:
            return self.lm_head.weight
        if not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            raise ModelError(
                "this reward model was saved without its language-model head, so the imitation "
                "loss has nothing to read; set its coefficient to 0 or start from a language model"
            )
        embedding: Any = self.backbone.get_input_embeddings()
        weight: Tensor = embedding.weight
        return weight

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a folder that `AutoModelForSequenceClassification` loads with the same scores.

        Adapters are merged into what is written. The pad id goes into the config, for there
        the score is read at the last id that is not the pad. A language-model head that is not
        the embedding goes into an extra file.
        """
        save_scalar(self, folder, tokenizer)


def last_tokens(
    input_ids: Int[Tensor, "batch sequence"], lengths: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch sequence"]:
    """Where each row ends, position `lengths - 1`."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return places == (lengths.to(input_ids.device) - 1)[:, None]


def read_scores(
    values: Float[Tensor, "batch sequence"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The value at each row's last token, position `lengths - 1`."""
    return values.gather(1, (lengths.to(values.device) - 1).unsqueeze(1)).squeeze(1)


def classifier_shell(config: PreTrainedConfig) -> PreTrainedModel:
    """What `AutoModelForSequenceClassification` makes of the config with one output, on no device.

    Raises:
        ModelError: transformers has none for the architecture, or one with another head.
    """
    auto: Any = AutoModelForSequenceClassification
    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            shell: PreTrainedModel = auto.from_config(config)
    except ValueError:
        raise ModelError(
            f"model type {config.model_type}: transformers has no sequence classification for it, "
            "as which a reward model is exported; use another architecture"
        ) from None
    ScalarModel.from_classifier(shell)
    return shell


def save_scalar(
    model: ScalarModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Tensor] | None = None,
) -> None:
    """`ScalarModel.save`, from a gathered state dict where the model's own is sharded."""
    dtype = torch.float32 if has_lora(model) else None  # bf16 sums would lose most of the update
    weights = effective_state_dict(model, state, dtype)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    config = copy.deepcopy(model.config)
    set_pad(config, tokenizer.pad_token_id)
    shell = classifier_shell(config)
    prefix = shell.base_model_prefix
    setattr(shell, prefix, model.backbone)
    head = {name: w for name, w in weights.items() if name.startswith("lm_head.")}
    renamed = {
        name.replace("backbone.", f"{prefix}.", 1): tensor
        for name, tensor in weights.items()
        if name not in head
    }
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        shell.save_pretrained(folder, state_dict=renamed)
        tokenizer.save_pretrained(folder)
    if dtype is not None:
        set_saved_dtype(folder, dtype)
    if head:
        contiguous = {name: tensor.contiguous() for name, tensor in head.items()}
        save_file(contiguous, folder / LM_HEAD_FILE, metadata={"format": "pt"})


def set_saved_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Name in a saved folder's config the dtype its weights have."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def set_pad(config: PreTrainedConfig, pad_id: int) -> None:
    """Name the pad id in a config, and in the text part of a composite one."""
    config.pad_token_id = pad_id
    config.get_text_config().pad_token_id = pad_id


def _unwrapped(model: nn.Module) -> Any:  # noqa: ANN401 - any wrapper's inner model
    get_base = getattr(model, "get_base_model", None)
    return model if get_base is None else get_base()


def backbone_of(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' untyped modules
    """The transformers model below the heads; adapters and wrappers looked through."""
    if isinstance(model, ScalarModel):
        return model.backbone
    return _unwrapped(model).base_model

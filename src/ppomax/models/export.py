"""Writing models: Hugging Face folders with a model card, whole or not at all."""

import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppomax.errors import ModelError
from ppomax.models.folders import atomic_folder, quiet
from ppomax.models.heads import ScalarModel, save_scalar, set_pad, set_saved_dtype
from ppomax.models.lora import adapter_state_dict, effective_state_dict, has_lora
from ppomax.visible import visible

REWARD_CARD_FILE = "reward_card.json"
TRAINING_FILE = "ppomax.json"
"""In a policy's folder: what a user of the model must know of its training, `{"system": ...}`."""


class Card(TypedDict, total=False):
    """What a model card says; every text may hold anything, it is escaped."""

    title: str
    summary: str
    """One paragraph: how the model was made."""
    source_model: str
    """Hub id, short name or folder the run started from."""
    licence: str
    """Licence of the weights, an SPDX id in lower case as the hub writes it."""
    datasets: list[str]
    numbers: Mapping[str, float | int | str]
    """The run's key numbers, in the order to show."""
    settings: Mapping[str, object]
    """The settings that made it."""


@dataclass(frozen=True, slots=True)
class RewardCard:
    """What another stage must know of a reward model to use it rightly."""

    tokenizer_hash: str
    template_hash: str
    probes: list[dict[str, Any]]
    """Fixed texts with their scores: `{"messages": [...], "score": float}`."""
    score_mean: float
    score_std: float
    accuracy: dict[str, float]
    """Held-out accuracy: `all`, then per subset."""
    accuracy_pairs: dict[str, int] = field(default_factory=dict)
    """Held-out pairs behind each accuracy."""
    length_correlation: dict[str, float] = field(default_factory=dict)
    """Of held-out scores with length, over all answers and within pairs given the preference."""
    counts: dict[str, int] = field(default_factory=dict)
    """Pairs trained on, held out, quarantined."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Rows set aside by kind of defect."""
    notes: list[str] = field(default_factory=list)
    """What the run warned of in its data."""
    data: dict[str, str] = field(default_factory=dict)
    """Source to SHA-256."""
    heldout: float | None = None
    """Share of prompts that training held out."""
    system: str | None = None
    """System prompt that training put before dialogues without one."""
    template: str = ""
    """The chat template itself."""
    exported: str = ""
    """Which step's weights these are."""
    licence: str | None = None
    source_model: str | None = None


def export_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: Card,
    mode: Literal["merged", "adapter"] = "merged",
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    state: dict[str, Tensor] | None = None,
    system: str | None = None,
) -> Path:
    """Write a policy: config, safetensors, tokenizer, chat template, generation config, card.

    Args:
        mode: with LoRA, `merged` writes a plain model, `adapter` a peft adapter folder.
        generation: sampling settings to ship (temperature, top_p, ...); without them none is.
        dtype: of the weights in the file; default as the model holds them.
        state: the full state dict where the model's own tensors are sharded.
        system: the system prompt of its training, which `trained_system` finds again.

    Raises:
        ModelError: `adapter` was asked of a model without one.
    """
    if mode == "adapter" and not has_lora(model):
        raise ModelError("export mode adapter: the model has no LoRA adapter; use merged")
    with atomic_folder(folder) as place, quiet():
        if mode == "adapter":
            _write_adapter(model, place, card, state)
        else:
            _write_merged(model, tokenizer, place, dtype, state)
            own = model.generation_config
            ends = own.eos_token_id if own is not None else None
            generation_config(tokenizer, ends, generation).save_pretrained(place)
        tokenizer.save_pretrained(place)
        if system is not None:
            text = json.dumps({"system": system}, ensure_ascii=False)
            (place / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")
        text = model_card(card, pipeline="text-generation", adapter=mode == "adapter")
        (place / "README.md").write_text(text, encoding="utf-8")
    return folder


def export_reward(
    model: ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: Card,
    reward_card: RewardCard,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """Write a reward model that `AutoModelForSequenceClassification` loads, with its cards."""
    with atomic_folder(folder) as place, quiet():
        save_scalar(model, place, tokenizer, state)
        text = json.dumps(asdict(reward_card), indent=1, ensure_ascii=False)
        (place / REWARD_CARD_FILE).write_text(text + "\n", encoding="utf-8")
        text = model_card(card, pipeline="text-classification")
        (place / "README.md").write_text(text, encoding="utf-8")
    return folder


def read_reward_card(folder: Path) -> RewardCard:
    """The card of an exported reward model.

    Raises:
        ModelError: there is none, or it lacks a field.
    """
    path = folder / REWARD_CARD_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(RewardCard)}
        return RewardCard(**{key: value for key, value in data.items() if key in known})
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a reward model is exported with its card") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a reward card ({error})") from None


def trained_system(folder: Path) -> str | None:
    """The system prompt a policy was trained with, where its folder says.

    Raises:
        ModelError: the file that says so is damaged.
    """
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None
    try:
        system = json.loads(path.read_text(encoding="utf-8")).get("system")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    return system if isinstance(system, str) else None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over all that decides a dialogue's ids: the backend, special ids, chat template.

    Padding and truncation, which calls leave behind in the backend, are not part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    table.pop("padding", None)
    table.pop("truncation", None)
    special = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in sorted(tokenizer.special_tokens_map.items())
        if isinstance(token, str)
    }
    parts = [table, special, tokenizer.chat_template or ""]
    return _hash(json.dumps(parts, sort_keys=True, ensure_ascii=False))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template's text."""
    template = tokenizer.chat_template or ""
    return _hash(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def model_card(card: Card, *, pipeline: str, adapter: bool = False) -> str:
    """A README.md with the hub's YAML head; every text of the run is escaped."""
    source = card.get("source_model", "")
    head: dict[str, object] = {"license": " ".join(card.get("licence", "unknown").split())}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        head["base_model"] = source
    head |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": pipeline}
    head["tags"] = ["ppomax", "rlhf"]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=10_000).strip(),
        "---",
        "",
    ]
    lines += [f"# {escape(card.get('title', 'Model'))}", ""]
    if card.get("summary"):
        lines += [escape(card["summary"]), ""]
    facts = {
        "Started from": source,
        "Licence": card.get("licence", ""),
        "Data": ", ".join(card.get("datasets", [])),
    }
    lines += [f"- {name}: {escape(value)}" for name, value in facts.items() if value] + [""]
    for title, table in (("Numbers", card.get("numbers")), ("Settings", card.get("settings"))):
        if table:
            lines += [f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {escape(str(k))} | {escape(_number(v))} |" for k, v in table.items()]
            lines += [""]
    return "\n".join(lines)


def source_licence(folder: Path) -> str | None:
    """The licence a model folder's README names in its YAML head, if any."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        head = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None


def escape(text: str) -> str:
    """Text on one line, with nothing in it that markdown, HTML or a terminal acts on."""
    line = html.escape(visible(" ".join(text.split())), quote=False)
    line = re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", line)
    line = re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", line)  # a numbered list
    return re.sub(r"^(?=[-+=](\s|[-=]|$))", r"\\", line)  # a list or an underline


def generation_config(
    tokenizer: PreTrainedTokenizerBase,
    ends: int | list[int] | None = None,
    values: Mapping[str, Any] | None = None,
) -> GenerationConfig:
    """The ids that end and pad a text and the sampling settings passed; nothing else.

    Args:
        ends: default the tokenizer's eos id.
        values: `temperature`, `top_p`, ...; sampling is switched on if one of them is there.
    """
    values = dict(values or {})
    if values.keys() & {"temperature", "top_p", "top_k"}:
        values.setdefault("do_sample", True)
    config: Any = GenerationConfig  # untyped in transformers
    result: GenerationConfig = config(
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **values,
    )
    return result


def _write_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    dtype: torch.dtype | None,
    state: dict[str, Tensor] | None,
) -> None:
    if dtype is None and has_lora(model):
        dtype = torch.float32  # in bf16 the sum of base and update would lose most of the update
    weights = effective_state_dict(model, state, dtype)
    if dtype is not None:
        cast = {id(tensor): tensor.to(dtype) for tensor in weights.values()}
        weights = {name: cast[id(tensor)] for name, tensor in weights.items()}
    set_pad(model.config, tokenizer.pad_token_id)
    model.save_pretrained(place, state_dict=weights)
    if dtype is not None:
        set_saved_dtype(place, dtype)


def _write_adapter(
    model: PreTrainedModel, place: Path, card: Card, state: dict[str, Tensor] | None
) -> None:
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = card.get("source_model")
    config.inference_mode = True
    config.task_type = "CAUSAL_LM"
    config.save_pretrained(str(place))
    weights = {k: v.contiguous() for k, v in adapter_state_dict(model, state).items()}
    save_file(weights, place / "adapter_model.safetensors", metadata={"format": "pt"})


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

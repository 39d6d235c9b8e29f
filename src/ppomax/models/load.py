"""From a model's name to a model ready for training.

Every loaded model has no dropout, a pad id that ends no text, and a generation config that holds
ids only. Weights are read from safetensors; nothing is unpickled.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppomax.data.template import ChatTemplate, settle_template
from ppomax.errors import ModelError
from ppomax.models.attention import use_grouped_attention
from ppomax.models.ensembles import members
from ppomax.models.export import generation_config
from ppomax.models.folders import quiet
from ppomax.models.fused import use_fused_blocks
from ppomax.models.heads import LM_HEAD_FILE, ScalarModel, hidden_states, output_weight, set_pad
from ppomax.models.lean import use_lean_blocks, use_mixed_norms
from ppomax.models.names import SHORT_NAMES, resolve

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
"""Names that published tokenizers give a token reserved for padding."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with a pad id that can never end a text.

    Raises:
        ModelError: it cannot be found or read, or names no token that ends a text.
    """
    source = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _cannot_load(name, error) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {name!r}: its tokenizer names no eos token; replies need an end, "
            "so set eos_token in its tokenizer_config.json"
        )
    tokenizer.padding_side = "right"
    settle_template(tokenizer)
    ensure_pad(tokenizer, _ends(tokenizer, source))
    result: PreTrainedTokenizerBase = tokenizer
    return result


def ensure_pad(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> int:
    """Give the tokenizer a pad id that can never end a text; returns it.

    The tokenizer's own pad is kept if no text ends with it. Else a token reserved for padding is
    taken if the vocabulary has one, else the last special token that neither the tokenizer nor
    its chat template uses (`<empty_output>` for smollm2-135m), else `<|pad|>` is added, for which
    the embeddings must grow (`load_policy` does that).

    Args:
        ends: ids besides eos that end a text.
    """
    taken = {tokenizer.eos_token_id, *ends}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return int(tokenizer.pad_token_id)
    token = _unused_token(tokenizer, taken)
    if token is None:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    else:
        tokenizer.pad_token = token
    return int(tokenizer.pad_token_id)


def load_policy(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal language model on the CPU, in eval mode, ready for training.

    Args:
        dtype: of the weights; fp32 for anything that is trained.
        attn_implementation: a name that `transformers` knows; None takes `sdpa`, and where
            that is slow our own (models/attention.py).

    Raises:
        ModelError: it cannot be found or read, is no causal language model, or computes its
            logits in a way ours would not reproduce.
    """
    source = resolve(name)
    config = _load_config(name, source, trust_remote_code)
    if _is_classifier(config):
        raise ModelError(f"model {name!r} is a reward model; a policy needs a language model")
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    ends = sorted({int(tokenizer.eos_token_id), *_ends(tokenizer, source)})
    model = _load_model(
        AutoModelForCausalLM,
        name,
        source,
        config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    fit_vocabulary(model, len(tokenizer))
    set_pad(model.config, int(tokenizer.pad_token_id))
    model.generation_config = generation_config(tokenizer, ends)
    _check_head(name, model)
    return model


def load_reward_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    init_from_lm: bool | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> ScalarModel:
    """A reward model from a sequence-classification folder, or a fresh one on a language model.

    Args:
        init_from_lm: True: the source is a language model and the head starts from `seed`;
            False: it is a reward model; None: as its config says.

    Raises:
        ModelError: it cannot be found or read, or is not of the kind asked for.
    """
    source = resolve(name)
    config = _load_config(name, source, trust_remote_code)
    classifier = _is_classifier(config)
    if init_from_lm is not None and init_from_lm == classifier:
        found, wanted = ("a reward model", "a language model")[:: 1 if classifier else -1]
        raise ModelError(f"model {name!r} is {found}; {wanted} is needed here")
    if not classifier:
        policy = load_policy(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        return ScalarModel.from_causal_lm(policy, seed)
    if config.num_labels != 1:
        raise ModelError(
            f"model {name!r} has {config.num_labels} outputs; a reward model has 1, so name another"
        )
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = _load_model(
        AutoModelForSequenceClassification,
        name,
        source,
        config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    fit_vocabulary(model, len(tokenizer))
    set_pad(model.config, int(tokenizer.pad_token_id))
    return ScalarModel.from_classifier(model, _lm_head(Path(source), dtype))


def check_reward_model(setting: str, name: str, *, trust_remote_code: bool = False) -> None:
    """Look whether a name is a reward model's, or a folder of such, without reading weights.

    Raises:
        ModelError: it cannot be found, or its config names no classifier of one output.
    """
    for member in members(name):
        config = _load_config(member, resolve(member), trust_remote_code)
        if not _is_classifier(config) or config.num_labels != 1:
            raise ModelError(f"setting {setting}: model {name!r} is no reward model of one output")


def load_value_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    init_from_lm: bool | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> ScalarModel:
    """A critic: a reward model with its head (the paper's start), or a fresh head on a policy.

    The critic predicts no words, so a language-model head is dropped.

    Raises:
        ModelError: as `load_reward_model`.
    """
    model = load_reward_model(
        name,
        dtype=dtype,
        init_from_lm=init_from_lm,
        seed=seed,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    model.lm_head = None
    return model


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Grow the embeddings to hold `size` tokens; new rows are the mean of the old, never random."""
    parts: Any = model  # transformers leaves these methods untyped
    old = parts.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    with torch.random.fork_rng():
        parts.resize_token_embeddings(size, mean_resizing=False)
    for layer in (parts.get_input_embeddings(), parts.get_output_embeddings()):
        if layer is not None:
            layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence a model reads, where its config says."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def _unused_token(tokenizer: PreTrainedTokenizerBase, taken: set[int]) -> str | None:
    """A special token of the vocabulary that nothing uses, those meant for padding first."""
    used = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    free = {
        added.content: index
        for index, added in tokenizer.added_tokens_decoder.items()
        if added.special
        and index not in taken
        and added.content not in used
        and added.content not in template
    }
    vocabulary = tokenizer.get_vocab()
    for token in PAD_TOKENS:
        if token in free or (vocabulary.get(token, -1) >= 0 and vocabulary[token] not in taken):
            return token
    reserved = [token for token in free if "reserved" in token or "pad" in token]
    return max(reserved or free, key=lambda token: free[token], default=None)


def _ends(tokenizer: PreTrainedTokenizerBase, source: str) -> set[int]:
    """What ends an answer besides eos.

    The template's end of a turn, which training teaches, and the eos ids of the model's generation
    config, if it has one.
    """
    ends: int | list[int] | None = None
    with suppress(OSError, ValueError):
        ends = GenerationConfig.from_pretrained(source).eos_token_id
    found = {ends} if isinstance(ends, int) else set(ends or ())
    with suppress(ModelError):  # a template that refuses every dialogue is met where one is encoded
        found.add(ChatTemplate(tokenizer).end_id)
    return found


def _load_config(name: str, source: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _cannot_load(name, error) from None
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if re.search(r"drop(out)?|pdrop", key) and isinstance(value, float | int):
                setattr(part, key, type(value)(0))
    result: PreTrainedConfig = config
    return result


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any("ForSequenceClassification" in name for name in config.architectures or [])


def _load_model(
    auto: Any,  # noqa: ANN401 - one of transformers' Auto classes
    name: str,
    source: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    attn_implementation: str | None,
) -> PreTrainedModel:
    try:
        with quiet():
            model, info = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation or "sdpa",
                use_safetensors=True,
                output_loading_info=True,
            )
    except (
        OSError,
        ValueError,
        ImportError,
        KeyError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise _cannot_load(name, error) from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"model {name!r}: its weights lack {missing}; fetch or export it again")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if attn_implementation is None:
        use_grouped_attention(model)
    use_mixed_norms(model)
    use_lean_blocks(model)
    use_fused_blocks(model)
    result: PreTrainedModel = model.eval()
    return result


def _lm_head(folder: Path, dtype: torch.dtype) -> nn.Linear | None:
    path = folder / LM_HEAD_FILE
    if not path.is_file():
        return None
    try:
        weight = load_file(path)["lm_head.weight"].to(dtype)
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable output head ({error})") from None
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight)
    return head


@torch.no_grad()
def _check_head(name: str, model: PreTrainedModel) -> None:
    """Log-probs are computed as hidden @ weight.T: refuse a model that scales, caps or shifts."""
    ids = torch.arange(8).unsqueeze(0) % len(output_weight(model))
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    hidden, weight = hidden_states(model, ids), output_weight(model)
    got = (hidden @ weight.T).float()
    close = (1e-4 if model.dtype == torch.float32 else 2e-2) * float(expected.abs().max())
    if capped or float((got - expected).abs().max()) > close:
        raise ModelError(
            f"model {name!r}: {type(model).__name__} scales, caps or shifts its logits, which is "
            "not supported; use another architecture (Llama, Qwen, Mistral, SmolLM, GPT-NeoX, ...)"
        )


def _cannot_load(name: str, error: Exception) -> ModelError:
    text = str(error)
    if "trust_remote_code" in text:
        return ModelError(
            f"model {name!r} runs code of its own; if you trust it set trust_remote_code=true"
        )
    if "attention implementation" in text:
        return ModelError(
            f"model {name!r}: transformers computes its attention in another way only than the one "
            "needed here; use another architecture (Llama, Qwen, Mistral, SmolLM, GPT-NeoX, ...)"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return ModelError(
        f"model {name!r} cannot be loaded ({type(error).__name__}: {first[:200]}); give a folder, "
        f"a hub id that is reachable, or one of {', '.join(SHORT_NAMES)}"
    )

"""A language model of under a million parameters and its tokenizer, built here, never downloaded.

For tests and smoke runs: it speaks no language, but every code path treats it as any other model.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppomax.errors import ModelError
from ppomax.models.folders import atomic_folder, locked, quiet

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML: the text of a dialogue is a prefix of the text of the dialogue with more turns."""


def tiny_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts: any text goes in and comes out unchanged.

    The same texts in the same order give the same tokenizer.

    Args:
        vocab_size: with the 256 bytes and the four special tokens; at least 260.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    wrapper: Any = PreTrainedTokenizerFast  # untyped in transformers
    tokenizer: PreTrainedTokenizerFast = wrapper(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    *,
    vocab_size: int,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 128,
    max_positions: int = 512,
    seed: int = 0,
    tied: bool = True,
) -> LlamaForCausalLM:
    """A Llama with random weights, the same for the same seed; global random state untouched.

    Special ids are those of `tiny_tokenizer`.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.train(mode=False)
    return model


def build_tiny(cache: Path) -> Path:
    """The folder of the built-in tiny model, made at first use.

    Its name holds a hash of the text and of this file, so that a change of either makes another.
    """
    text = _bundled_text()
    digest = hashlib.sha256(text.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / f"tiny-{digest}"
    if folder.is_dir():
        return folder
    try:
        with locked(cache):
            if not folder.is_dir():  # another process may have made it while we waited
                tokenizer = tiny_tokenizer(_strings(text))
                model = tiny_model(vocab_size=len(tokenizer))
                with atomic_folder(folder) as place, quiet():
                    model.save_pretrained(place)
                    tokenizer.save_pretrained(place)
    except OSError as error:
        raise ModelError(f"tiny: cannot be made in the cache {cache} ({error})") from None
    return folder


def _bundled_text() -> str:
    source = resources.files("ppomax.data") / "bundled" / "preferences.jsonl"
    try:
        return source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            "tiny: the bundled text is missing from this installation; install ppomax again"
        ) from None


def _strings(jsonl: str) -> Iterator[str]:
    """Every prompt and answer in the file, in its order."""
    for line in jsonl.splitlines():
        if line.strip():
            row = json.loads(line)
            for key in ("prompt", "chosen", "rejected"):
                yield from _contents(row.get(key, ""))


def _contents(value: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for message in value:
            yield str(message["content"])

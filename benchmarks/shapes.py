"""Model folders with random weights of a given shape, for benchmarks that measure cost alone."""

import torch
from common import Shape
from transformers import LlamaConfig, LlamaForCausalLM

from ppomax.models.tiny import SPECIAL_TOKENS, tiny_tokenizer

# hidden, layers, heads, key-value heads, dimension of a head, intermediate, vocabulary
SHAPES = {
    "tiny": Shape(128, 4, 4, 2, 32, 384, 512),
    "0.5M": Shape(128, 2, 4, 2, 32, 384, 512),
    "2M": Shape(192, 4, 6, 2, 32, 512, 2048),
    "8M": Shape(320, 6, 5, 5, 64, 864, 4096),
    "33M": Shape(512, 10, 8, 4, 64, 1408, 8192),
    "135M": Shape(576, 30, 9, 3, 64, 1536, 49152),
    "360M": Shape(960, 32, 15, 5, 64, 2560, 49152),
    "1.5B": Shape(2048, 24, 32, 8, 64, 8192, 32000),
    "7B": Shape(4096, 32, 32, 32, 128, 11008, 32000),
}
WORDS = "user\nassistant\ntea rain salt moon bread song train duck lamp river 0 1 2 3 a of b"
"""The tokenizer's text: what a chat template writes, in few tokens."""
SPREAD = 4.0
"""Std of the logits: like a trained model's, most of the mass lies on some hundred tokens."""


def config_of(shape):
    """As `transformers` writes it down."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
    )


def random_model(shape, folder, dtype=torch.float32, device="cpu"):
    """Write the model with the built-in tokenizer, whose ids are the first few hundred."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config_of(shape))
    with torch.no_grad():  # std of a logit is |norm weight| * sqrt(hidden) * std of the embedding
        model.model.norm.weight.fill_(SPREAD / (shape.hidden**0.5 * 0.02))
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer([WORDS] * 4).save_pretrained(folder)
    return folder

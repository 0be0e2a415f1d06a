"""Models to try the engine on: real shapes with random weights, and a tiny one that is built in no time."""

from __future__ import annotations

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)


SHAPES: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, initializer_range=0.2,
    ),
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
    "gemma3-1b": Gemma3TextConfig(  # 22 of 26 layers with a window
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "gpt-oss-20b": GptOssConfig(  # every other layer with a window
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, sliding_window=128, num_local_experts=32, num_experts_per_tok=4,
        max_position_embeddings=131072,
    ),
}  # fmt: skip


def load(name: str, device: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model by shape name (random weights), folder or hub name, in evaluation mode."""
    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[name]), dtype=dtype)
    model.generation_config.eos_token_id = None  # random weights have no reason to stop
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name. A shape gets one of bytes, with words for what else it may generate."""
    if name not in SHAPES:
        return AutoTokenizer.from_pretrained(name)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{_spell(number)}" for number in range(SHAPES[name].vocab_size - len(symbols)))
    vocabulary = {token: number for number, token in enumerate([*symbols, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chats = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chats)


def _spell(number: int) -> str:
    """A word of its own for each number."""
    word = ""
    while number >= 0:
        word = chr(ord("a") + number % 26) + word
        number = number // 26 - 1
    return word

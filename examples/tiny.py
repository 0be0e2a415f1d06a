"""A tiny model and its tokenizer, made on the spot: the examples run without a download."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


END = "<end>"


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder or a hub name, or the tiny one for `None`; on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        return model.to(device), AutoTokenizer.from_pretrained(name)
    symbols = [END, *string.printable]
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    return model.to(device).eval(), tokenizer

"""What a user may give as prompts: token ids, a padded batch, text and chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


# Token ids (an array or a tensor too), text, or a chat: a list of messages.
Prompt = Sequence[int] | torch.Tensor | np.ndarray | str | list[dict[str, Any]]


def one_by_one(inputs: Any, attention_mask: Any = None) -> Sequence[Prompt]:
    """The prompts of a call, without padding.

    Args:
        inputs: a list of prompts; one text or chat; token ids `[B, T]`; or what a tokenizer returns, a dictionary of
            `input_ids` and `attention_mask`.
        attention_mask (*optional*): of the same shape as the token ids: 1 for tokens, 0 for padding before or after.

    Raises:
        ValueError: the mask does not fit, has a hole or leaves a prompt empty; or the dictionary holds something else.
    """
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
        if "input_ids" not in inputs:
            raise ValueError(f"inputs given as a dictionary must hold input_ids, not only {sorted(inputs)}")
        if attention_mask is not None and "attention_mask" in inputs:
            raise ValueError("attention_mask is given twice, in inputs and beside them")
        attention_mask = inputs.pop("attention_mask", attention_mask)
        token_ids = inputs.pop("input_ids")
        if inputs:
            raise ValueError(
                f"inputs hold {sorted(inputs)}, but only input_ids and attention_mask have a meaning here"
            )
        inputs = token_ids
    if isinstance(inputs, str) or _is_chat(inputs):
        inputs = [inputs]
    if isinstance(inputs, torch.Tensor):
        inputs = inputs.cpu()
    if attention_mask is None:
        return inputs
    if isinstance(attention_mask, torch.Tensor):
        attention_mask = attention_mask.float().cpu()  # numpy has no bfloat16
    if len(attention_mask) != len(inputs):
        raise ValueError(f"attention_mask has {len(attention_mask)} rows for {len(inputs)} prompts")
    return [_unpadded(f"inputs[{i}]", *row) for i, row in enumerate(zip(inputs, attention_mask, strict=True))]


def encode(
    name: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, /, **template_settings: Any
) -> Sequence[int]:
    """The token ids of a text (special tokens added) or a chat (by the tokenizer's template with its settings, up to
    where the answer begins); anything else comes back as it is.

    Raises:
        ValueError: there is no tokenizer, or it does not take the prompt; the message starts with `name`.
    """
    chat = _is_chat(prompt)
    if not chat and not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError(
            f"{name}: a {'chat' if chat else 'text'} needs the model's tokenizer: give it with the call or the "
            "manager, tokenizer=..."
        )
    try:
        if chat:
            settings = {**template_settings, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return tokenizer.apply_chat_template(prompt, **settings)["input_ids"]
        return tokenizer(prompt)["input_ids"]
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"{name}: the tokenizer does not take this prompt: {error}") from error


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 0 and all(isinstance(message, Mapping) for message in prompt)


def _unpadded(name: str, prompt: Prompt, mask: Any) -> Prompt:
    """The tokens of one row that its mask keeps."""
    mask, shape = np.asarray(mask), tuple(np.shape(prompt))
    if mask.ndim != 1 or mask.shape != shape:
        raise ValueError(f"{name}: its attention_mask has shape {mask.shape}, the token ids have {shape}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"{name}: its attention_mask must hold 1 for tokens and 0 for padding")
    kept = np.flatnonzero(mask)
    if not len(kept):
        raise ValueError(f"{name}: its attention_mask is all zeros, at least one token must be left")
    first, last = int(kept[0]), int(kept[-1])
    if last - first + 1 != len(kept):
        raise ValueError(
            f"{name}: its attention_mask has a hole: padding may come before and after a prompt, not inside"
        )
    return prompt[first : last + 1]

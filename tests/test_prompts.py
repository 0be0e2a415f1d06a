"""Whatever form prompts come in, they are answered as their token ids are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, greedy, reference
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


LIMIT = 5
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16]]
TEXTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12 w13 w14 w15 w16"]
CHATS = [
    [{"role": "user", "content": "w5 w6"}],
    [{"role": "system", "content": "w7"}, {"role": "user", "content": "w8 w9 w10"}],
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A word for each token, which text begins with `<s>`."""
    special = ["<pad>", "<s>", "user", "system", "assistant"]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(5, VOCABULARY))])})
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def padded(side: str, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`PROMPTS` as token ids and mask, both `[3, 7]`."""
    ids, mask = torch.full((3, 7), pad), torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        where = slice(len(prompt)) if side == "right" else slice(7 - len(prompt), None)
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    return ids, mask


def answered(model: PreTrainedModel, expected: list[list[int]], inputs: Any, **kwargs: Any) -> None:
    outputs = model.generate_batch(inputs, greedy(LIMIT), async_batching=True, **kwargs).values()
    assert [output.prompt_ids for output in outputs] == expected
    assert [output.generated_tokens for output in outputs] == [reference(model, p, greedy(LIMIT)) for p in expected]


class TestPaddedBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_are_answered_as_their_rows_alone(self, llama, side: str) -> None:
        ids, mask = padded(side)
        answered(llama, PROMPTS, ids, attention_mask=mask)
        answered(llama, PROMPTS, {"input_ids": ids, "attention_mask": mask})
        answered(llama, PROMPTS, BatchEncoding({"input_ids": ids, "attention_mask": mask}))

    @pytest.mark.parametrize("form", [
        torch.Tensor.bool, torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.numpy, torch.Tensor.tolist, list,
    ], ids=["bool", "float", "bfloat16", "array", "list", "list of tensors"])  # fmt: skip
    def test_take_masks_of_any_form(self, llama, form: Any) -> None:
        ids, mask = padded("left")
        answered(llama, PROMPTS, ids, attention_mask=form(mask))

    @pytest.mark.parametrize("form", [torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.int])
    def test_take_ids_of_any_form(self, llama, form: Any) -> None:
        ids, mask = padded("right")
        answered(llama, PROMPTS, form(ids), attention_mask=mask)

    def test_may_be_padded_with_what_is_no_token(self, llama) -> None:
        ids, mask = padded("right", pad=-100)
        answered(llama, PROMPTS, ids, attention_mask=mask)

    def test_without_a_mask_are_tokens_throughout(self, llama) -> None:
        ids, _ = padded("left", pad=3)
        answered(llama, ids.tolist(), ids)
        answered(llama, ids.tolist(), {"input_ids": ids})

    def test_of_a_tokenizer_are_taken_as_it_returns_them(self, llama, tokenizer) -> None:
        expected = [[1, *prompt] for prompt in PROMPTS]
        for side in ("left", "right"):
            answered(llama, expected, tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt"))
        answered(llama, expected, tokenizer(TEXTS))

    @pytest.mark.parametrize("row, reason", [
        ([0, 0, 0, 0, 0, 0, 0], r"inputs\[1\].*all zeros"),
        ([0, 1, 1, 0, 1, 1, 1], r"inputs\[1\].*has a hole"),
        ([1, 0, 0, 0, 0, 0, 1], r"inputs\[1\].*has a hole"),
        ([0, 0, 0, 1, 2, 2, 2], r"inputs\[1\].*must hold 1 for tokens and 0 for padding"),
        ([0, 0, 0, -1, 1, 1, 1], r"inputs\[1\].*must hold 1 for tokens and 0 for padding"),
    ], ids=str)  # fmt: skip
    def test_with_other_masks_are_refused(self, llama, row: list[int], reason: str) -> None:
        ids, mask = padded("left")
        mask[1] = torch.tensor(row)
        with pytest.raises(ValueError, match=reason):
            llama.generate_batch(ids, greedy(LIMIT), attention_mask=mask, async_batching=True)

    @pytest.mark.parametrize("inputs, mask, reason", [
        (PROMPTS, torch.ones(2, 7), "2 rows for 3 prompts"),
        (PROMPTS, torch.ones(3, 7), r"inputs\[0\].*shape \(7,\).*\(4,\)"),
        (torch.ones(3, 7, dtype=torch.long), torch.ones(3, 6), r"inputs\[0\].*shape \(6,\).*\(7,\)"),
        ([5, 6, 7], [1, 1, 1], r"inputs\[0\].*has shape \(1?,?\), the token ids have \(\)"),
        (["a text"], [[1]], r"inputs\[0\].*has shape \(1?,?\), the token ids have \(\)"),
        ({"input_ids": [[1]], "attention_mask": [[1]]}, [[1]], "given twice"),
        ({"attention_mask": [[1]]}, None, "must hold input_ids"),
        ({}, None, "must hold input_ids"),
        ({"input_ids": [[1]], "token_type_ids": [[0]]}, None, r"token_type_ids.*only input_ids and attention_mask"),
    ])  # fmt: skip
    def test_that_do_not_fit_their_mask_are_refused(self, llama, inputs: Any, mask: Any, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            llama.generate_batch(inputs, greedy(LIMIT), attention_mask=mask, async_batching=True)

    def test_stay_as_they_were(self, llama) -> None:
        ids, mask = padded("left")
        batch = {"input_ids": ids.clone(), "attention_mask": mask.clone()}
        answered(llama, PROMPTS, batch)
        assert list(batch) == ["input_ids", "attention_mask"]
        assert torch.equal(batch["input_ids"], ids)
        assert torch.equal(batch["attention_mask"], mask)


class TestTexts:
    def test_are_encoded_as_the_tokenizer_does_by_default(self, llama, tokenizer) -> None:
        expected = [[1, *prompt] for prompt in PROMPTS]
        assert tokenizer(TEXTS)["input_ids"] == expected
        answered(llama, expected, TEXTS, tokenizer=tokenizer)
        answered(llama, expected[:1], TEXTS[0], tokenizer=tokenizer)

    def test_may_stand_beside_token_ids_and_chats(self, llama, tokenizer) -> None:
        prompts = [TEXTS[0], PROMPTS[1], np.array(PROMPTS[2]), CHATS[0]]
        chat = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
        answered(llama, [[1, *PROMPTS[0]], *PROMPTS[1:], chat], prompts, tokenizer=tokenizer)

    def test_can_be_added_one_by_one(self, llama, tokenizer) -> None:
        with llama.continuous_batching_context_manager(
            greedy(LIMIT), tokenizer=tokenizer, async_batching=True
        ) as manager:
            ids = [manager.add_request(TEXTS[0]), manager.add_request(CHATS[0]), *manager.add_requests(TEXTS)]
            prompts = [manager.get_result(request_id).prompt_ids for request_id in ids]
        assert prompts[0] == prompts[2] == [1, *PROMPTS[0]]
        assert tokenizer.decode(prompts[1]) == "user w5 w6 assistant"

    @pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS, CHATS, CHATS[0], [PROMPTS[0], TEXTS[0]]], ids=str)
    def test_and_chats_need_a_tokenizer(self, llama, inputs: Any) -> None:
        with pytest.raises(ValueError, match=r"request req_\d: a (text|chat) needs the model's tokenizer.*tokenizer="):
            llama.generate_batch(inputs, greedy(LIMIT), async_batching=True)

    def test_that_say_nothing_are_refused(self, llama, tokenizer) -> None:
        bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        bare.post_processor = processors.Sequence([])
        with pytest.raises(ValueError, match="req_1: the prompt is empty"):
            llama.generate_batch(
                ["w5", ""], tokenizer=PreTrainedTokenizerFast(tokenizer_object=bare), async_batching=True
            )


class TestChats:
    def test_go_through_the_template_up_to_where_the_answer_begins(self, llama, tokenizer) -> None:
        expected = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            for chat in CHATS
        ]
        assert tokenizer.decode(expected[1]) == "system w7 user w8 w9 w10 assistant"
        answered(llama, expected, CHATS, tokenizer=tokenizer)
        answered(llama, expected[:1], CHATS[0], tokenizer=tokenizer)

    def test_that_the_tokenizer_does_not_take_are_refused(self, llama, tokenizer) -> None:
        for template in (None, "{{ raise_exception('no') }}"):
            odd = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
            with pytest.raises(ValueError, match=r"request req_1: the tokenizer does not take this prompt"):
                llama.generate_batch([PROMPTS[0], CHATS[0]], greedy(LIMIT), tokenizer=odd, async_batching=True)

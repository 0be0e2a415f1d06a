"""Structured output: answers spell what their requests ask for, as in `generate` with xgrammar's own processor, and
nobody else notices."""

from __future__ import annotations

import functools
import random
import re
import sys
import threading
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
import torch
from conftest import (
    VOCABULARY,
    batching,
    greedy,
    random_prompts,
    reference,
    run_in_interpreter,
    shared_model,
)
from pydantic import BaseModel, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.grammars import Grammars, mask_of, mask_words
from transformers_async_cb.logits import mask
from transformers_async_cb.request import MOST_MASKED, MOST_MASKED_PROMPTS


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
SMALL = {"num_blocks": 60, "page_size": 1, "max_batch_tokens": 17}
LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-'
EOS = 90


class Color(str, Enum):
    RED = "red"
    BLUE = "blue"


class Thing(BaseModel):
    color: Color
    size: int = Field(ge=0, le=999)
    flags: list[bool] = Field(max_length=3)


GRAMMAR = """root ::= pair ("," pair){0,2}
pair ::= "{" [a-f]{1,3} "}" | "[" pair "]"
"""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Letters, pairs of them, and special tokens; no spaces, of which JSON may have any number. Three ids of the model
    have no text."""
    rng = random.Random(0)
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    while len(vocabulary) < EOS:
        vocabulary.setdefault("".join(rng.choices(LETTERS, k=2)), len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|a|>", "<|b|>", "<|c|>"]})
    assert made.eos_token_id == EOS
    return made


def text_of(output: GenerationOutput) -> str:
    """The answer of a request that has ended by itself."""
    assert output.error is None
    assert output.status == RequestStatus.FINISHED
    return tokenizer().decode(output.generated_tokens, skip_special_tokens=True)


@functools.cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), VOCABULARY)


@functools.cache
def generates(prompt: tuple[int, ...], limit: int, structure: str, source: Any, **settings: Any) -> list[int]:
    """What `generate` gives with xgrammar's own processor."""
    from xgrammar.contrib.hf import LogitsProcessor

    config, model = greedy(limit, EOS), shared_model("llama", settings.pop("device", "cpu"))
    config.update(**settings)
    processor = LogitsProcessor(grammars().compile(structure, source))
    ids = torch.tensor([prompt], device=model.device)
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=LogitsProcessorList([processor]),
    )
    return answer[0, len(prompt) :].tolist()


class TestAnswers:
    @OVERLAP
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_are_json_of_the_schema_however_they_are_sampled(self, family: str, overlap: bool) -> None:
        settings = {"do_sample": True, "temperature": 3.0, "top_k": 0}
        outputs = shared_model(family).generate_batch(
            random_prompts(12, longest=20),
            greedy(120, EOS),
            tokenizer=tokenizer(),
            json_schema=Thing,
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
            **settings,
        )
        things = [Thing.model_validate_json(text_of(output)) for output in outputs.values()]
        assert len({thing.size for thing in things}) > 6

    @OVERLAP
    def test_match_each_what_their_prompt_asks_for(self, llama, overlap: bool) -> None:
        prompts = random_prompts(6, longest=20)
        schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
        with llama.continuous_batching_context_manager(
            greedy(60, EOS), tokenizer=tokenizer(), async_batching=AsyncBatchingConfig(overlap=overlap)
        ) as manager:
            ids = manager.add_requests(
                prompts,
                json_schema=[schema, None, None, None, '{"enum": [12, 34]}', None],
                regex=[None, "(ab|c[d-f])+g{2}", None, None, None, None],
                grammar=[None, None, None, GRAMMAR, None, None],
            )
            outputs = [manager.get_result(request_id) for request_id in ids]
        texts = [text_of(output) for output in outputs]
        assert texts[0] in ('{"on":true}', '{"on":false}')
        assert re.fullmatch("(ab|c[d-f])+g{2}", texts[1])
        pair = r"\[*\{[a-f]{1,3}\}\]*"
        assert re.fullmatch(f"{pair}(,{pair}){{0,2}}", texts[3])
        assert texts[4] in ("12", "34")
        for i in (2, 5):
            assert outputs[i].generated_tokens == reference(llama, prompts[i], greedy(60, EOS))

    @OVERLAP
    @pytest.mark.parametrize("sizes", [{}, SMALL, {"max_requests_per_batch": 3}], ids=str)
    def test_are_generates_with_xgrammars_own_processor_beside_others_that_are_free(
        self, llama, sizes: dict, overlap: bool
    ) -> None:
        prompts, limit = random_prompts(16, longest=20, seed=3), 18
        asked = [
            ("json_schema", Thing), ("regex", "[a-z]{3,}[0-9]{2}"), ("grammar", GRAMMAR), ("regex", "[^a-m]*"),
        ]  # fmt: skip
        manager = llama.init_continuous_batching(
            greedy(limit, EOS),
            batching(**sizes),
            tokenizer=tokenizer(),
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        expected = []
        for i, prompt in enumerate(prompts):
            own = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3} if i % 3 == 0 else {}
            structure, source = asked[i // 2 % 4]
            if i % 2:
                manager.add_request(prompt, **{structure: source}, **own)
                expected.append(generates(tuple(prompt), limit, structure, source, **own))
            else:
                manager.add_request(prompt)
                expected.append(reference(llama, prompt, greedy(limit, EOS)))
        manager.start()
        engine = manager._engine
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        assert {output.error for output in outputs.values()} == {None}
        assert [outputs[f"req_{i}"].generated_tokens for i in range(16)] == expected
        assert (engine.scheduler.preemptions > 0) == (sizes == SMALL)
        engine.scheduler.check_books()

    def test_end_where_nothing_can_follow_if_there_is_no_eos(self, llama) -> None:
        outputs = llama.generate_batch(
            [[1, 2, 3]] * 3,
            greedy(9),
            tokenizer=tokenizer(),
            regex=["(ab|cd)[0-9]", "[a-c]+", "x"],
            async_batching=True,
        ).values()
        texts = [text_of(output) for output in outputs]
        assert re.fullmatch("(ab|cd)[0-9]", texts[0])
        assert re.fullmatch("[a-c]{9,}", texts[1])
        assert texts[2] == "x"

    def test_end_with_any_eos_of_the_request_which_is_no_text(self, llama) -> None:
        """Even one that would be text elsewhere."""
        ends = [LETTERS.index("b"), EOS]
        with llama.continuous_batching_context_manager(
            greedy(40), tokenizer=tokenizer(), async_batching=True
        ) as manager:
            ids = [
                manager.add_request(prompt, regex="[a-c]{4,9}", eos_token_id=ends, do_sample=True, temperature=9.0)
                for prompt in random_prompts(12, longest=9)
            ]
            answers = [manager.get_result(request_id).generated_tokens for request_id in ids]
        assert {answer[-1] for answer in answers} == set(ends)
        for answer in answers:
            assert not set(answer[:-1]) & set(ends)
            assert re.fullmatch("[a-c]{4,9}", tokenizer().decode(answer[:-1]))


class TestSteps:
    @pytest.mark.parametrize("overlap, most", [(True, 45), (False, 41)], ids=["overlap", "in turn"])
    def test_of_others_do_not_wait_for_a_mask(self, llama, overlap: bool, most: int) -> None:
        """A row with a mask takes every second step, where steps overlap; the other one takes each."""
        manager = llama.init_continuous_batching(
            greedy(40), tokenizer=tokenizer(), async_batching=AsyncBatchingConfig(overlap=overlap)
        )
        manager.add_request([1, 2, 3])
        manager.add_request([4, 5], regex="[a-z]{60}", max_new_tokens=20)
        flavours = []
        manager.warmup()
        runner = manager._engine.runner
        key_for = runner.key_for
        runner.key_for = lambda plan: flavours.append(key_for(plan).flavour.masked) or key_for(plan)
        manager.start()
        manager.stop()
        assert len(flavours) <= most
        assert sum(flavours) == 20
        assert flavours[:6] == ([True, False] * 3 if overlap else [True] * 6)
        assert [len(output.generated_tokens) for output in manager] in ([40, 20], [20, 40])

    @OVERLAP
    def test_have_room_for_so_many_masks_and_the_rows_take_turns(self, llama, overlap: bool) -> None:
        count = 2 * MOST_MASKED - 6
        manager = llama.init_continuous_batching(
            greedy(12, EOS), tokenizer=tokenizer(), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
        )
        manager.add_requests([[1, 2, i % 90] for i in range(count)], regex="[a-z]{9}")
        manager.add_request([5, 6, 7])
        manager.warmup()
        scheduler = manager._engine.scheduler
        plan, decoding, prompts, gaps, last = scheduler.plan, [], [], [], {}

        def counted() -> Any:
            made = plan()
            if made is not None:
                masked = scheduler.rows.masked[made.rows]
                decoding.append(int(masked[: made.decodes].sum()))
                prompts.append(int(masked[made.decodes :].sum()))
                for row in made.rows[masked].tolist():
                    gaps.append(len(prompts) - last.get(row, len(prompts)))
                    last[row] = len(prompts)
            return made

        scheduler.plan = counted
        manager.start()
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        assert all(re.fullmatch("[a-z]{9}", text_of(outputs[f"req_{i}"])) for i in range(count))
        assert outputs[f"req_{count}"].generated_tokens == reference(llama, [5, 6, 7], greedy(12, EOS))
        assert max(prompts) == MOST_MASKED_PROMPTS
        assert max(decoding) == MOST_MASKED - MOST_MASKED_PROMPTS
        assert max(gaps) == 3

    def test_wait_for_no_grammar_that_is_being_compiled(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on, compile = threading.Event(), threading.Event(), Grammars.compile

        def slow(self: Grammars, structure: str, source: Any) -> Any:
            begun.set()
            assert go_on.wait(60)
            return compile(self, structure, source)

        expected = reference(llama, [1, 2], greedy(5, EOS))
        monkeypatch.setattr(Grammars, "compile", slow)
        with llama.continuous_batching_context_manager(
            greedy(5, EOS), tokenizer=tokenizer(), async_batching=True
        ) as manager:
            other = threading.Thread(target=manager.add_request, args=([1, 2],), kwargs={"regex": "abc"})
            other.start()
            assert begun.wait(60)
            free = manager.get_result(manager.add_request([1, 2], request_id="free"), timeout=60)
            go_on.set()
            other.join()
            assert free.generated_tokens == expected
            assert text_of(manager.get_result("req_0")) == "abc"


class TestRequestsThatCannotGoOn:
    @OVERLAP
    @pytest.mark.parametrize("own, tokens, reason", [
        ({"regex": "(ab|cd)#"}, "(ab|cd)", "no token of the vocabulary goes on with its grammar"),
        (
            {"regex": "b[0-9]{2}", "suppress_tokens": list(range(2, EOS))}, "b",
            "its other settings ban every token that its grammar allows next",
        ),
    ], ids=["dead end", "other settings"])  # fmt: skip
    def test_end_alone_with_the_reason(self, llama, own: dict, tokens: str, reason: str, overlap: bool) -> None:
        manager = llama.init_continuous_batching(
            greedy(12, EOS), tokenizer=tokenizer(), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
        )
        for settings in ({}, own, {"regex": "[a-f]{4}"}):
            manager.add_request([5, 6, 7, 8], **settings)
        manager.start()
        engine = manager._engine
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        assert outputs["req_1"].status == RequestStatus.FAILED
        assert outputs["req_1"].error == f"request req_1: {reason}"
        assert re.fullmatch(tokens, tokenizer().decode(outputs["req_1"].generated_tokens))
        assert outputs["req_0"].generated_tokens == reference(llama, [5, 6, 7, 8], greedy(12, EOS))
        assert re.fullmatch("[a-f]{4}", text_of(outputs["req_2"]))
        engine.scheduler.check_books()

    @pytest.mark.parametrize("asked, reason", [
        ({"regex": "#a"}, "no token of the vocabulary begins what its regex asks for"),
        ({"regex": "(ab"}, "regex is not valid: Regex parsing error at position 4: The parenthesis is not closed"),
        ({"regex": 3}, "regex must be a string, got 3"),
        ({"regex": ["a"]}, r"regex must be a string, got \['a'\]"),
        ({"grammar": "x ::= y"}, "grammar is not valid: EBNF parser error"),
        ({"json_schema": {"type": "strin"}}, 'json_schema is not valid: Unsupported type "strin"'),
        ({"json_schema": "{"}, "json_schema is not valid: .*Failed to parse JSON"),
        ({"json_schema": 3}, "json_schema is not valid"),
        ({"json_schema": {"enum": [{1}]}}, "json_schema is not valid"),
        ({"regex": "a", "grammar": GRAMMAR}, "regex and grammar are given, but tokens can spell one thing only"),
    ], ids=str)  # fmt: skip
    def test_are_refused_where_that_is_known(self, llama, asked: dict, reason: str) -> None:
        manager = llama.init_continuous_batching(greedy(3, EOS), tokenizer=tokenizer(), async_batching=True)
        with pytest.raises(ValueError, match=f"request odd: {reason}"):
            manager.add_request([1, 2], request_id="odd", **asked)
        manager.add_request([1, 2])
        manager.destroy()

    def test_are_refused_for_a_list_of_another_length(self, llama) -> None:
        with pytest.raises(ValueError, match="regex is a list of 1 for 2 prompts: give one for each, or one for all"):
            llama.generate_batch(
                [[1], [2]], greedy(3), tokenizer=tokenizer(), regex=["a"], async_batching=True
            )  # fmt: skip

    def test_are_refused_without_a_tokenizer(self, llama) -> None:
        with pytest.raises(ValueError, match=r"request req_0: json_schema needs the model's tokenizer"):
            llama.generate_batch([[1]], greedy(3), json_schema={}, async_batching=True)

    def test_are_refused_without_xgrammar(self, llama, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "xgrammar", None)
        with pytest.raises(ImportError, match=r"need xgrammar: pip install 'transformers-async-cb\[structured\]'"):
            llama.generate_batch([[1]], greedy(3), tokenizer=tokenizer(), regex="a", async_batching=True)


def masked_cases(vocabulary: int, device: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """Logits, the sequences that have masks, and the masks, some of them too short or too long."""
    rng = random.Random(0)
    for dtype in (torch.float32, torch.bfloat16):
        for covered in (vocabulary, vocabulary - 40, vocabulary + 70):
            logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
            masked = torch.tensor([3, 0, 4, -1], dtype=torch.int32)
            masks = torch.zeros(4, mask_words(covered), dtype=torch.int32)
            for i, share in enumerate((0.5, 0.0, 1.0)):
                tokens = [token for token in range(covered) if rng.random() < share]
                masks[i] = torch.from_numpy(mask_of(tokens, covered))
            yield tuple(x.to(device) for x in (logits, masked, masks))


def test_the_reference_leaves_what_a_mask_allows() -> None:
    for logits, masked, masks in masked_cases(VOCABULARY, "cpu"):
        before = logits.clone()
        mask(logits, masked, masks)
        for i, sequence in enumerate(masked.tolist()):
            words = masks[i].tolist()
            for token in range(VOCABULARY if sequence >= 0 else 0):
                allowed = token < 32 * len(words) and words[token // 32] >> (token % 32) & 1
                assert logits[sequence, token] == (before[sequence, token] if allowed else -torch.inf)
        assert torch.equal(logits[1:3], before[1:3])


def check_kernel(device: str, vocabulary: int) -> int:
    from transformers_async_cb.logits import reference as right
    from transformers_async_cb.logits import triton

    checked = 0
    for logits, masked, masks in masked_cases(vocabulary, device):
        expected = logits.cpu()
        right.mask(expected, masked.cpu(), masks.cpu())
        triton.mask(logits, masked, masks)
        assert torch.equal(logits.cpu(), expected)
        checked += 1
    return checked


def test_the_kernel_does_what_the_reference_does() -> None:
    assert run_in_interpreter(__file__).split()[-1] == "checked:6"


@pytest.mark.gpu
def test_the_kernel_does_what_the_reference_does_on_the_gpu() -> None:
    assert check_kernel("cuda", 151_936) == 6


@pytest.mark.gpu
@OVERLAP
def test_requests_on_the_gpu_get_what_generate_gives(overlap: bool) -> None:
    """By captured steps, beside others that are free."""
    prompts, config = random_prompts(24, longest=20), greedy(18, EOS)
    regexes = ["[a-z]{3,}[0-9]{2}", None] * 12
    model = shared_model("llama", "cuda")
    expected = [
        generates(tuple(prompt), 18, "regex", regex, device="cuda") if regex else reference(model, prompt, config)
        for prompt, regex in zip(prompts, regexes, strict=True)
    ]
    manager = model.init_continuous_batching(
        config, tokenizer=tokenizer(), async_batching=AsyncBatchingConfig(overlap=overlap, debug=True)
    )
    manager.start()
    engine = manager._engine
    for _ in range(3):
        ids = manager.add_requests(prompts, regex=regexes)
        assert [manager.get_result(request_id).generated_tokens for request_id in ids] == expected
    manager.stop()
    assert any(key.flavour.masked for key in engine.runner.graphs.captured)


if __name__ == "__main__":
    print(f"checked:{check_kernel('cpu', 2100)}")

"""`model.generate(..., custom_generate=generate)` gives what `model.generate` gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, batching, new_model, random_prompts
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
)

import transformers_async_cb
from transformers_async_cb.manager import CACHED


PAD = 0
EOS_IDS = [3, 17, 31, 50, 77, 90]


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    """A Llama of the test's own, whose kept engine ends with the test."""
    model = new_model("llama")
    yield model
    model.destroy_cached_continuous_batching_manager()


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        ids[i, at], mask[i, at] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = random_prompts(6, longest=40, seed=3)
BATCH = padded(PROMPTS)


def letters() -> PreTrainedTokenizerBase:
    """A tokenizer of as many letters as the models have tokens."""
    symbols = [chr(ord("!") + i) for i in range(VOCABULARY)]
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def both(model: PreTrainedModel, criterion: type | None = None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What plain `generate` and ours give; each with a criterion of its own."""

    def ask(**more: Any) -> torch.Tensor:
        if criterion is not None:
            more["stopping_criteria"] = StoppingCriteriaList([criterion()])
        return model.generate(**{"do_sample": False, "pad_token_id": PAD, **BATCH, **kwargs, **more})

    return ask(), ask(custom_generate=transformers_async_cb.generate)


class Stateful(StoppingCriteria):
    """Ends a batch once each of its rows has had one of some tokens, as evaluation harnesses do."""

    tokens = set(range(0, 97, 3))

    def __init__(self) -> None:
        self.done: list[bool] | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> bool:
        self.done = self.done or [False] * len(input_ids)
        assert len(self.done) == len(input_ids)
        self.done = [d or int(t) in self.tokens for d, t in zip(self.done, input_ids[:, -1], strict=True)]
        return all(self.done)


class EachAlone(StoppingCriteria):
    """Ends a row at one of some tokens."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 2


class TestEqualsPlainGenerate:
    @pytest.mark.parametrize(
        "settings",
        [
            {"max_new_tokens": 12},
            {"max_length": 55},
            {"max_new_tokens": 40, "eos_token_id": EOS_IDS},
            {"max_new_tokens": 40, "eos_token_id": EOS_IDS, "pad_token_id": None},
            {"max_new_tokens": 30, "eos_token_id": EOS_IDS, "min_new_tokens": 9},
            {"max_new_tokens": 30, "eos_token_id": EOS_IDS, "min_length": 45},
            {"max_new_tokens": 12, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 6]},
            {"max_new_tokens": 12, "bad_words_ids": [[7], [8, 9]], "sequence_bias": [[[4], 2.0], [[11, 12], -3.0]]},
            {"max_new_tokens": 12, "forced_eos_token_id": 9},
            {"max_new_tokens": 40, "criterion": Stateful},
            {"max_new_tokens": 40, "criterion": Stateful, "eos_token_id": EOS_IDS},
            {"max_new_tokens": 40, "criterion": EachAlone},
            {"max_new_tokens": 40, "criterion": EachAlone, "eos_token_id": EOS_IDS},
        ],
        ids=str,
    )
    def test_with(self, llama, settings: dict[str, Any]) -> None:
        plain, ours = both(llama, **settings)
        assert torch.equal(plain, ours)

    @pytest.mark.parametrize("prompts", [[[5], [1, 2, 3]], [[5], [6]]], ids=["padded", "of a token each"])
    def test_with_a_forced_bos_and_prompts_of_one_token(self, llama, prompts: list[list[int]]) -> None:
        settings = {"forced_bos_token_id": 7, "begin_suppress_tokens": list(range(0, 97, 2))}
        plain, ours = both(llama, **padded(prompts), max_new_tokens=4, **settings)
        assert torch.equal(plain, ours)

    def test_whatever_the_rows_that_run_at_once(self, llama) -> None:
        few = batching(max_requests_per_batch=2, max_batch_tokens=32)
        expected = both(llama, max_new_tokens=40, criterion=EachAlone, eos_token_id=EOS_IDS)[0]
        llama.destroy_cached_continuous_batching_manager()
        ours = llama.generate(
            **BATCH, do_sample=False, max_new_tokens=40, eos_token_id=EOS_IDS, pad_token_id=PAD,
            stopping_criteria=StoppingCriteriaList([EachAlone()]), continuous_batching_config=few,
            custom_generate=transformers_async_cb.generate,
        )  # fmt: skip
        assert torch.equal(ours, expected)

    def test_at_stop_strings(self, llama) -> None:
        tokenizer = letters()
        stop = StoppingCriteriaList([StopStringCriteria(tokenizer, [*"adgjmpADGJM", "bc"])])
        plain, ours = both(llama, criterion=lambda: stop[0], max_new_tokens=40, eos_token_id=EOS_IDS)
        assert torch.equal(plain, ours)
        assert ours.shape[1] < BATCH["input_ids"].shape[1] + 40

    def test_padded_on_the_right_as_if_padded_on_the_left(self, llama) -> None:
        new = {}
        for side in ("left", "right"):
            batch = padded(PROMPTS, side)
            ours = llama.generate(
                **batch, do_sample=False, max_new_tokens=12, custom_generate=transformers_async_cb.generate
            )
            assert torch.equal(ours[:, :-12], batch["input_ids"])
            new[side] = ours[:, -12:]
        assert torch.equal(new["left"], new["right"])

    def test_as_an_output_of_the_usual_class(self, llama) -> None:
        plain, ours = both(llama, max_new_tokens=6, return_dict_in_generate=True)
        assert type(ours) is type(plain)
        assert torch.equal(plain.sequences, ours.sequences)

    def test_without_a_mask(self, llama) -> None:
        ids = BATCH["input_ids"][:, -5:]
        plain, ours = both(llama, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
        assert torch.equal(plain, ours)


class TestSampling:
    def test_follows_the_global_seed(self, llama) -> None:
        def sample(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return llama.generate(
                **BATCH, do_sample=True, max_new_tokens=8, custom_generate=transformers_async_cb.generate
            )

        first = sample(1)
        assert torch.equal(first, sample(1))
        assert not torch.equal(first, sample(2))

    def test_returns_several_sequences_of_each_prompt_side_by_side(self, llama) -> None:
        ours = llama.generate(
            **BATCH, do_sample=True, num_return_sequences=3, max_new_tokens=8,
            custom_generate=transformers_async_cb.generate,
        )  # fmt: skip
        width = BATCH["input_ids"].shape[1]
        assert torch.equal(ours[:, :width], BATCH["input_ids"].repeat_interleave(3, 0))
        assert len({tuple(row) for row in ours[:3, width:].tolist()}) == 3

    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": 0.7, "top_k": 11, "top_p": 0.9, "min_p": 0.01},
            {"typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.003, "top_h": 0.6},
        ],
        ids=str,
    )
    def test_takes_its_settings_for_those_of_the_call(self, llama, settings: dict[str, float]) -> None:
        ours = llama.generate(
            **BATCH, do_sample=True, max_new_tokens=4, custom_generate=transformers_async_cb.generate, **settings
        )
        assert ours.shape[1] == BATCH["input_ids"].shape[1] + 4


class TestBetweenCalls:
    def test_the_engine_is_kept(self, llama) -> None:
        both(llama, max_new_tokens=4)
        engine = getattr(llama, CACHED)._engine
        both(llama, max_new_tokens=5)
        assert getattr(llama, CACHED)._engine is engine

    def test_changed_weights_are_seen(self, llama) -> None:
        before = both(llama, max_new_tokens=8)[1]
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.mul_(-0.7)
        plain, ours = both(llama, max_new_tokens=8)
        assert torch.equal(plain, ours)
        assert not torch.equal(ours, before)

    def test_the_model_is_free(self, llama) -> None:
        both(llama, max_new_tokens=4)
        llama.train()
        llama(BATCH["input_ids"], labels=BATCH["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in llama.parameters())


class Doubling(LogitsProcessor):
    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * 2


class Failing(StoppingCriteria):
    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> bool:
        raise KeyError("mine")


class TestIsRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"logits_processor": LogitsProcessorList([Doubling()])}, "logits processor Doubling"),
            ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}, "set temperature instead"),
            ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "PrefixConstrainedLogitsProcessor"),
            ({"num_beams": 2}, "num_beams"),
            ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
            ({"position_ids": BATCH["attention_mask"].cumsum(-1) + 5}, "position_ids"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_by_name(self, llama, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            llama.generate(**BATCH, max_new_tokens=4, custom_generate=transformers_async_cb.generate, **settings)

    def test_a_cache_that_holds_something(self, llama) -> None:
        cache = llama(BATCH["input_ids"][:, :3], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values"):
            llama.generate(
                **BATCH, max_new_tokens=4, past_key_values=cache, custom_generate=transformers_async_cb.generate
            )

    def test_embeddings(self, llama) -> None:
        with pytest.raises(ValueError, match="inputs_embeds"):
            llama.generate(
                inputs_embeds=llama.get_input_embeddings()(BATCH["input_ids"]), max_new_tokens=4,
                custom_generate=transformers_async_cb.generate,
            )  # fmt: skip

    def test_a_criterion_that_raises_with_its_own_error(self, llama) -> None:
        with pytest.raises(KeyError, match="mine"):
            llama.generate(
                **BATCH, max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Failing()]),
                custom_generate=transformers_async_cb.generate,
            )  # fmt: skip

    def test_a_prompt_that_does_not_fit(self, llama) -> None:
        with pytest.raises(RuntimeError, match=r"row \d: request req_\d .* there is room for"):
            llama.generate(
                **BATCH, max_new_tokens=40, continuous_batching_config=batching(num_blocks=1, page_size=16),
                custom_generate=transformers_async_cb.generate,
            )  # fmt: skip

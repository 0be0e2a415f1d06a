"""Encoder-decoders answer what `generate` does: a prompt is the encoder's, an answer the decoder's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, batching, generated_in_short_room, random_model, random_prompts
from transformers import GenerationConfig, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig


START, EOS = 2, 1
_BART = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {
        "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
        "tie_word_embeddings": False,
    }),
    "bart": ("BartForConditionalGeneration", _BART),
    "pegasus": ("PegasusForConditionalGeneration", _BART),
}  # fmt: skip
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
PROMPTS = random_prompts(9, longest=40, seed=1)


def new_model(family: str, device: str = "cpu") -> PreTrainedModel:
    name, settings = FAMILIES[family]
    model = random_model(name, device, **settings)
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=START)
    return model


@pytest.fixture(scope="module")
def pegasus() -> PreTrainedModel:
    return new_model("pegasus")


def greedy(max_new_tokens: int | None = None, **settings) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **settings)


def alone(model: PreTrainedModel, prompt: list[int], config: GenerationConfig, **inputs) -> list[int]:
    """What `generate` returns, the decoder's first token included."""
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **inputs)[0].tolist()


def generated(model: PreTrainedModel, config: GenerationConfig, **settings) -> list[list[int]]:
    outputs = model.generate_batch(PROMPTS, generation_config=config, **{"async_batching": True, **settings})
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    assert [output.prompt_ids for output in outputs.values()] == PROMPTS
    return [[START, *output.generated_tokens] for output in outputs.values()]


@DEVICES
@pytest.mark.parametrize("family", FAMILIES)
def test_they_answer_what_generate_does_with_overlap_on_and_off(family, device) -> None:
    model = new_model(family, device)
    expected = [alone(model, prompt, greedy(16)) for prompt in PROMPTS]
    few = batching(max_requests_per_batch=4, max_batch_tokens=16)
    for overlap in (True, False):
        own = AsyncBatchingConfig(overlap=overlap)
        assert generated(model, greedy(16), continuous_batching_config=few, async_batching=own) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_vary_with_what_the_encoder_reads(family) -> None:
    model = new_model(family)
    answers = [alone(model, prompt, greedy(16)) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) > 4


@pytest.mark.parametrize(
    "config",
    [
        greedy(),
        greedy(max_length=9),
        greedy(16, eos_token_id=list(range(20, 40))),
        greedy(16, repetition_penalty=1.5, no_repeat_ngram_size=2),
        greedy(16, forced_bos_token_id=7, forced_eos_token_id=EOS, min_length=5),
        greedy(16, decoder_start_token_id=START, bos_token_id=5),
    ],
    ids=["the default length", "a length", "an EOS", "penalties", "forced tokens", "a start token of its own"],
)
def test_settings_mean_what_they_mean_in_generate(pegasus, config) -> None:
    assert generated(pegasus, config) == [alone(pegasus, prompt, config) for prompt in PROMPTS]


def test_requests_that_find_no_room_are_computed_again(pegasus) -> None:
    expected = [alone(pegasus, prompt, greedy(40)) for prompt in PROMPTS]
    found = generated_in_short_room(pegasus, PROMPTS, greedy(40), page_size=8)
    assert [[START, *tokens] for tokens in found] == expected


@pytest.mark.parametrize("begin", [[START, 40, 41], [40, 41]])
def test_a_decoder_may_begin_with_tokens_of_a_request(pegasus, begin) -> None:
    output = pegasus.generate_batch(
        PROMPTS[:1], generation_config=greedy(12), request_settings=[{"decoder_input_ids": torch.tensor([begin])}],
        async_batching=True,
    )["req_0"]  # fmt: skip
    expected = alone(pegasus, PROMPTS[0], greedy(12), decoder_input_ids=torch.tensor([begin]))
    assert [START, 40, 41, *output.generated_tokens] == expected


def test_answers_that_come_token_by_token_have_the_prompt_of_the_encoder(pegasus) -> None:
    with pegasus.continuous_batching_context_manager(greedy(4), async_batching=True) as manager:
        outputs = list(manager.request_id_iter(manager.add_request(PROMPTS[0], streaming=True)))
    assert [output.prompt_ids for output in outputs] == [PROMPTS[0]] * 4
    assert [START, *outputs[-1].generated_tokens] == alone(pegasus, PROMPTS[0], greedy(4))


def test_samples_are_the_same_with_overlap_on_and_off(pegasus) -> None:
    config = GenerationConfig(do_sample=True, top_k=20, max_new_tokens=12)
    runs = [
        generated(pegasus, config, continuous_batching_config=batching(seed=seed), async_batching=flag)
        for flag, seed in ((True, 3), (AsyncBatchingConfig(overlap=False), 3), (True, 4))
    ]
    assert runs[0] == runs[1] != runs[2]


class TestRefused:
    def test_without_a_token_to_begin_with(self) -> None:
        model = new_model("t5")
        model.generation_config = GenerationConfig(pad_token_id=0)
        with pytest.raises(ValueError, match="T5ForConditionalGeneration needs a decoder_start_token_id"):
            generated(model, greedy(4))

    def test_log_probabilities_of_a_prompt(self, pegasus) -> None:
        with pytest.raises(ValueError, match=r"request req_0: prompt_logprobs: .* nothing is generated from"):
            generated(pegasus, greedy(4), prompt_logprobs=0)

    def test_models_with_a_generate_of_their_own(self) -> None:
        config = transformers.WhisperConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = transformers.WhisperForConditionalGeneration(config)
        with pytest.raises(ValueError, match=r"WhisperForConditionalGeneration .* generate of its own"):
            generated(model, greedy(4))

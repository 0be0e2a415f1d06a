"""Requests that give the model more than token ids, images, answer what `generate` does with the same."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from conftest import batching, generated_in_short_room, greedy, random_model
from transformers import GenerationConfig, PreTrainedModel

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.settings import Mode


VOCABULARY, IMAGE = 128, 120
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_PATCHES = {
    "depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
_MROPE = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("LlavaForConditionalGeneration", {
        "text_config": _TEXT | {"model_type": "llama"}, "image_token_index": IMAGE, "vision_feature_layer": -1,
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
    }),
    "gemma3": ("Gemma3ForConditionalGeneration", {
        "text_config": _TEXT | {
            "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
        "vision_config": _VISION | {"vision_use_head": False}, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    }),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {
        "text_config": _MROPE, "image_token_id": IMAGE, "vision_start_token_id": 122, "vision_end_token_id": 123,
        "vision_config": _PATCHES | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    }),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {
        "text_config": _MROPE, "image_token_id": IMAGE, "vision_start_token_id": 122, "vision_end_token_id": 123,
        "vision_config": _PATCHES | {
            "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "fullatt_block_indexes": [0],
            "window_size": 56,
        },
    }),
}  # fmt: skip


class Asked(NamedTuple):
    """One request."""

    prompt: list[int]
    inputs: dict[str, torch.Tensor]


def new_model(family: str, device: str = "cpu") -> PreTrainedModel:
    name, settings = FAMILIES[family]
    return random_model(name, device, **settings)


def asked(family: str, words: int, seed: int) -> Asked:
    """A few words, an image and more words."""
    generator = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    before, after = ([draw.randrange(16, 110) for _ in range(count)] for count in (3, words))
    if family.startswith("qwen"):
        high, wide = (2, 4) if seed % 2 else (4, 4)
        prompt = [*before, 122, *[IMAGE] * (high * wide // 4), 123, *after]
        pixels = torch.randn(high * wide, 3 * 2 * 14 * 14, generator=generator)
        kinds = torch.tensor([[int(token == IMAGE) for token in prompt]])
        grid = torch.tensor([[1, high, wide]])
        return Asked(prompt, {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds})
    prompt = [*before, *[IMAGE] * 4, *after]
    inputs = {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    if family == "gemma3":
        inputs["token_type_ids"] = torch.tensor([[int(token == IMAGE) for token in prompt]])
    return Asked(prompt, inputs)


def requests(family: str) -> list[Asked]:
    return [*(asked(family, words, seed) for seed, words in enumerate((3, 9, 17, 5))), Asked([20, 30, 40], {})]


def alone(model: PreTrainedModel, request: Asked, config: GenerationConfig) -> list[int]:
    ids = torch.tensor([request.prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **request.inputs}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model.generate(**inputs, generation_config=config)[0, len(request.prompt) :].tolist()


def generated(model: PreTrainedModel, asked: list[Asked], **settings) -> list[list[int]]:
    settings = {"generation_config": greedy(12), "async_batching": True, **settings}
    outputs = model.generate_batch([a.prompt for a in asked], request_settings=[a.inputs for a in asked], **settings)
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


@pytest.fixture(scope="module")
def llava() -> PreTrainedModel:
    return new_model("llava")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_answer_what_generate_does(family, device) -> None:
    model = new_model(family, device)
    expected = [alone(model, request, greedy(12)) for request in requests(family)]
    assert generated(model, requests(family)) == expected
    few = {"continuous_batching_config": batching(max_requests_per_batch=2)}
    assert generated(model, requests(family), async_batching=AsyncBatchingConfig(overlap=False), **few) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_models_run_text_on_pages(family) -> None:
    model = new_model(family)
    text = [Asked([16 + token % 90 for token in request.prompt], {}) for request in requests(family)]
    own = AsyncBatchingConfig(sequential_fallback=False)
    assert generated(model, text, async_batching=own) == [alone(model, request, greedy(12)) for request in text]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_matters(family) -> None:
    model, one, other = new_model(family), asked(family, 3, 1), asked(family, 3, 3)
    assert alone(model, one, greedy(12)) != alone(model, one._replace(inputs=other.inputs), greedy(12))


def test_a_kept_manager_goes_back_to_pages(llava) -> None:
    text, kept = [Asked([20, 30, 40], {})], {"persistent_manager": True}
    generated(llava, text, **kept)
    manager, modes = llava._async_batching_manager, []
    for each in (text, requests("llava"), text):
        assert generated(llava, each, **kept) == [alone(llava, request, greedy(12)) for request in each]
        modes.append(manager._engine.settings.mode)
    manager.destroy()
    assert modes == [Mode.PAGES, Mode.SEQUENCES, Mode.PAGES]


def test_one_that_was_preempted_is_computed_again_with_its_image(llava) -> None:
    expected = [alone(llava, request, greedy(40)) for request in requests("llava")]
    prompts, inputs = zip(*requests("llava"), strict=True)
    assert generated_in_short_room(llava, prompts, greedy(40), request_settings=inputs) == expected


def test_what_the_caller_does_to_an_image_afterwards_changes_nothing(llava) -> None:
    request = asked("llava", 3, 0)
    expected = alone(llava, request, greedy(12))
    manager = llava.init_continuous_batching(greedy(12), async_batching=True)
    manager.add_request(request.prompt, **request.inputs)
    request.inputs["pixel_values"].zero_()
    manager.start()
    output = manager.get_result(timeout=60)
    manager.destroy()
    assert output.generated_tokens == expected


def test_several_answers_share_an_image(llava) -> None:
    request = asked("llava", 3, 0)
    config = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=12, pad_token_id=0)
    assert generated(llava, [request], generation_config=config) == [alone(llava, request, greedy(12))] * 2


def test_log_probabilities_of_a_prompt_know_of_its_image(llava) -> None:
    request = asked("llava", 9, 0)
    output = llava.generate_batch(
        [request.prompt], generation_config=greedy(4), request_settings=[request.inputs], prompt_logprobs=0,
        async_batching=True,
    )["req_0"]  # fmt: skip
    ids = torch.tensor([request.prompt])
    with torch.no_grad():
        logits = llava(ids, **request.inputs).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor(output.prompt_logprobs), expected, atol=1e-4)


def test_a_request_whose_image_does_not_fit_fails_alone(llava) -> None:
    given = requests("llava")
    given[1].inputs["pixel_values"] = torch.zeros(1, 3, 20)
    outputs = llava.generate_batch(
        [r.prompt for r in given], generation_config=greedy(12), request_settings=[r.inputs for r in given],
        async_batching=True,
    )  # fmt: skip
    assert "request req_1: the model fails with its pixel_values: " in outputs.pop("req_1").error
    for request, output in zip(given[:1] + given[2:], outputs.values(), strict=True):
        assert output.generated_tokens == alone(llava, request, greedy(12))


def test_a_run_is_not_resumed_with_other_images(llava, tmp_path) -> None:
    given = requests("llava")
    expected = generated(llava, given, resume=tmp_path)
    assert generated(llava, requests("llava"), resume=tmp_path) == expected
    given[2].inputs["pixel_values"][0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="another run, with other inputs"):
        generated(llava, given, resume=tmp_path)


class TestManagers:
    def test_that_run_on_pages_refuse_an_image(self, llava) -> None:
        request, running = asked("llava", 3, 0), llava.continuous_batching_context_manager(async_batching=True)
        message = r"request req_0: pixel_values: .*one_at_a_time=True"
        with running as manager, pytest.raises(ValueError, match=message):
            manager.add_request(request.prompt, **request.inputs)

    def test_that_run_one_at_a_time_take_it(self, llava) -> None:
        request, own = asked("llava", 3, 0), AsyncBatchingConfig(one_at_a_time=True)
        with llava.continuous_batching_context_manager(greedy(12), async_batching=own) as manager:
            manager.add_request(request.prompt, **request.inputs)
            assert manager.get_result(timeout=60).generated_tokens == alone(llava, request, greedy(12))


class TestRefused:
    def test_where_sequences_may_not_run_one_at_a_time(self, llava) -> None:
        own = AsyncBatchingConfig(sequential_fallback=False)
        with pytest.raises(ValueError, match="requests give the model pixel_values beside token ids"):
            generated(llava, requests("llava"), async_batching=own)

    def test_for_a_model_with_a_generate_of_its_own(self) -> None:
        model, request = new_model("llava"), asked("llava", 3, 0)
        model.__class__ = type("Own", (type(model),), {"generate": lambda self, *args, **kwargs: None})
        with pytest.raises(ValueError, match="request req_0: pixel_values: Own has a generate of its own"):
            generated(model, [request])

    def test_images_of_a_call(self, llava) -> None:
        request = asked("llava", 3, 0)
        with pytest.raises(ValueError, match=r"pixel_values: inputs of the model are given for each request"):
            llava.generate_batch([request.prompt], async_batching=True, **request.inputs)

    def test_one_image_for_several_prompts(self, llava) -> None:
        request = asked("llava", 3, 0)
        manager = llava.init_continuous_batching(greedy(12), async_batching=True)
        with pytest.raises(ValueError, match=r"pixel_values: inputs of the model are given for each request"):
            manager.add_requests([request.prompt] * 2, **request.inputs)
        manager.destroy()

    def test_what_the_engine_gives_itself(self, llava) -> None:
        manager = llava.init_continuous_batching(greedy(12), async_batching=True)
        with pytest.raises(ValueError, match=r"unknown keyword arguments: .*position_ids"):
            manager.add_request([20, 30], position_ids=torch.tensor([[5, 6]]))
        manager.destroy()

"""Stop strings end a request at the token at which they end `model.generate`, whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, batching, greedy, new_model, random_prompts, reference, shared_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StopStringCriteria,
)
from transformers.generation.continuous_batching import RequestStatus

from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.stop_strings import StopStrings, TokenTexts


OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
PATIENCE = 30
LETTERS = "abcdefghij,."


def words(rng: random.Random, letters: str, count: int, prefixes: tuple[str, ...]) -> list[str]:
    """So many different tokens of two to four letters, some with a prefix."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[rng.choice(prefixes) + "".join(rng.choices(letters, k=rng.randint(2, 4)))] = None
    return list(found)


def ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def byte_level(rng: random.Random, count: int = 70) -> PreTrainedTokenizerFast:
    """As GPT-2's: leading spaces are letters, and a token may hold a part of `é`, `ü` or `€`."""
    parts = ["Ġ", "Ċ", "Ã", "©", "¼", "â", "Ĥ", "¬", "Ã©", "ĤÂ", "aÃ", "©b", "âĤ", "¬.", "ĠÃ¼"]
    inner = Tokenizer(models.BPE(ids([*LETTERS, *parts, *words(rng, LETTERS, count, ("", "Ġ"))]), []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def byte_fallback(rng: random.Random) -> PreTrainedTokenizerFast:
    """As Llama-2's: a space is `▁`, and characters that have no token are written in bytes."""
    parts = ["<unk>", "▁", "<0xC3>", "<0xA9>", "<0xBC>", "<0x0A>", "<0x61>"]
    vocabulary = ids([*parts, *LETTERS, *words(rng, LETTERS, 60, ("", "▁"))])
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def word_piece(rng: random.Random) -> PreTrainedTokenizerFast:
    """As BERT's: what a token adds depends on the one before it."""
    letters = LETTERS.rstrip(",.")
    tokens = ["[UNK]", ",", ".", *letters, *(f"##{letter}" for letter in letters)]
    inner = Tokenizer(models.WordPiece(ids([*tokens, *words(rng, letters, 60, ("", "##"))]), unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def special(rng: random.Random) -> PreTrainedTokenizerFast:
    """With special tokens, which stand for themselves, and fewer ids than the model."""
    tokenizer = byte_level(rng, 60)
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|tool|>"]})
    return tokenizer


@pytest.fixture(
    scope="module", params=[byte_level, byte_fallback, word_piece, special], ids=lambda kind: kind.__name__
)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return saved_and_loaded(request.param(random.Random(0)), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One tokenizer with a text for each id of the model, for tests of what does not depend on its kind."""
    return saved_and_loaded(byte_level(random.Random(0)), tmp_path_factory.mktemp("tokenizer"))


def saved_and_loaded(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def generates(
    model: PreTrainedModel, prompt: list[int], config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    whole = torch.tensor([prompt])
    answer = model.generate(
        whole, attention_mask=torch.ones_like(whole), generation_config=config, tokenizer=tokenizer
    )
    return answer[0, len(prompt) :].tolist()


def with_stops(strings: str | list[str] | None, limit: int = 30, eos: list[int] | None = None) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=limit, stop_strings=strings, eos_token_id=eos, pad_token_id=0
    )


def pieces_of(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, tokens: list[int], count: int, longest: int = 9
) -> list[str]:
    """Strings that stand somewhere in what `tokens` say, most of them across tokens."""
    text = tokenizer.decode(tokens).replace("\N{REPLACEMENT CHARACTER}", "") or "a"
    starts = [rng.randrange(len(text)) for _ in range(count)]
    return [text[start : start + rng.randint(1, longest)] for start in starts]


def longest_piece(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The longest part of what `tokens` say that is whole characters."""
    return max(tokenizer.decode(tokens).split("\N{REPLACEMENT CHARACTER}"), key=len)


class TestTheEnd:
    @pytest.mark.parametrize("seed", range(4))
    def test_is_where_the_criterion_of_transformers_has_it(self, tokenizer, seed: int) -> None:
        rng, texts, ended = random.Random(seed), TokenTexts(tokenizer), 0
        for _ in range(40):
            tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))]
            strings = pieces_of(rng, tokenizer, tokens, rng.randint(1, 3))
            criterion, stops = StopStringCriteria(tokenizer, strings), StopStrings(strings, texts)
            for end in range(1, len(tokens) + 1):
                expected = bool(criterion(torch.tensor([tokens[:end]]), None))
                found = stops.end(np.array(tokens[:end], np.int32))
                assert found == expected, (strings, tokenizer.convert_ids_to_tokens(tokens[:end]))
                ended += found
                letters = texts.letters(np.array(tokens[end - 1 : end], np.int32))[0]
                assert letters & np.uint64(stops.last_letters) or not found, "the filter lost an end"
        assert ended > 40

    def test_is_found_whatever_the_characters(self, plain) -> None:
        """Letters that fall on one bit are told apart, and strings that the tokenizer cannot write match nothing."""
        texts = TokenTexts(plain)
        assert StopStrings(["é"], texts).end(np.array(plain.convert_tokens_to_ids(["Ã", "©b"]), np.int32))
        assert not StopStrings(["é"], texts).end(np.array(plain.convert_tokens_to_ids(["Ã", "¼"]), np.int32))
        assert not StopStrings(["ж"], texts).end(np.arange(90, dtype=np.int32))

    def test_of_ids_beyond_the_tokenizer_is_nowhere(self, plain) -> None:
        stops = StopStrings(["a"], TokenTexts(plain))
        assert not stops.end(np.array([0, 10**6], np.int32))
        assert not stops.texts.letters(np.array([10**6]))[0] & np.uint64(stops.last_letters)


class TestTokensEqualGenerates:
    @OVERLAP
    def test_for_each_kind_of_tokenizer(self, tokenizer, overlap: bool) -> None:
        rng, model = random.Random(3), shared_model("llama")
        prompts = random_prompts(12, longest=30, seed=3)
        strings = [s for p in prompts[:4] for s in pieces_of(rng, tokenizer, reference(model, p, greedy(30))[8:], 2)]
        strings = [s for s in strings if len(s) > 3]
        expected = [generates(model, p, with_stops(strings), tokenizer) for p in prompts]
        outputs = model.generate_batch(
            prompts, with_stops(strings), tokenizer=tokenizer, async_batching=AsyncBatchingConfig(overlap=overlap)
        )
        assert [output.generated_tokens for output in outputs.values()] == expected
        assert {output.status for output in outputs.values()} == {RequestStatus.FINISHED}
        assert any(1 < len(answer) < 30 for answer in expected), "no string ended a request on its way"

    @OVERLAP
    @pytest.mark.parametrize("sizes", [
        {},
        {"num_blocks": 24, "page_size": 4, "max_batch_tokens": 17},
        {"num_blocks": 60, "page_size": 1, "max_requests_per_batch": 3},
    ], ids=str)  # fmt: skip
    def test_beside_requests_with_other_strings_and_with_none(self, plain, sizes: dict, overlap: bool) -> None:
        rng, model = random.Random(5), shared_model("llama")
        prompts = random_prompts(30, longest=20, seed=5)
        configs = []
        for i, prompt in enumerate(prompts):
            whole = reference(model, prompt, greedy(30))
            strings = [None, *(pieces_of(rng, plain, whole[5:], n) for n in (1, 4))][i % 3]
            configs.append(with_stops(strings, eos=[None, rng.sample(whole, 1 + i % 4)][i % 2]))
        expected = [generates(model, p, c, plain) for p, c in zip(prompts, configs, strict=True)]
        assert sum(len(answer) < 30 for answer in expected) > 10

        manager = model.init_continuous_batching(
            greedy(30),
            continuous_batching_config=batching(**sizes),
            tokenizer=plain,
            async_batching=AsyncBatchingConfig(overlap=overlap, debug=True),
        )
        for prompt, config in zip(prompts, configs, strict=True):
            manager.add_request(prompt, stop_strings=config.stop_strings, eos_token_id=config.eos_token_id)
        manager.start()
        engine = manager._engine
        manager.stop()
        outputs = {output.request_id: output for output in manager}
        assert [outputs[f"req_{i}"].generated_tokens for i in range(30)] == expected
        assert {output.error for output in outputs.values()} == {None}
        assert (engine.scheduler.preemptions > 0) == (sizes.get("page_size") is not None)
        assert (engine.scheduler.discarded > 0) == overlap
        engine.scheduler.check_books()

    def test_when_the_string_begins_in_the_prompt(self, plain) -> None:
        model, prompt = shared_model("llama"), random_prompts(1, shortest=12, longest=12, seed=8)[0]
        whole = reference(model, prompt, greedy(8))
        string = plain.decode([*prompt[-2:], whole[0]])[1:]
        config = with_stops(string)
        expected = generates(model, prompt, config, plain)
        assert expected == whole[:1]
        output = model.generate_batch([prompt], config, tokenizer=plain, async_batching=True)["req_0"]
        assert output.generated_tokens == expected

    def test_when_the_string_stands_only_in_the_prompt(self, plain) -> None:
        model, prompt = shared_model("llama"), random_prompts(1, shortest=12, longest=12, seed=8)[0]
        config = with_stops(longest_piece(plain, prompt[:10]), limit=10)
        output = model.generate_batch([prompt], config, tokenizer=plain, async_batching=True)["req_0"]
        assert (
            output.generated_tokens == generates(model, prompt, config, plain) == reference(model, prompt, greedy(10))
        )

    def test_of_a_stream(self, plain) -> None:
        model, prompt = shared_model("llama"), random_prompts(1, longest=20, seed=4)[0]
        whole = reference(model, prompt, greedy(20))
        config = with_stops([longest_piece(plain, whole[5:12])])
        expected = generates(model, prompt, config, plain)
        assert 5 < len(expected) < 20
        with model.continuous_batching_context_manager(config, tokenizer=plain, async_batching=True) as manager:
            outputs = list(manager.request_id_iter(manager.add_request(prompt, streaming=True)))
        assert [output.generated_tokens for output in outputs] == [expected[: n + 1] for n in range(len(expected))]
        assert outputs[-1].status == RequestStatus.FINISHED

    def test_with_a_string_that_comes_with_the_last_token_there_is_room_for(self, plain) -> None:
        model, prompt = shared_model("llama"), [1] * 20
        whole = reference(model, prompt, greedy(21))
        config = with_stops(plain.decode(whole[-5:]), limit=60)
        expected = generates(model, prompt, config, plain)
        assert expected == whole
        output = model.generate_batch(
            [prompt],
            config,
            continuous_batching_config=batching(num_blocks=10, page_size=4),
            tokenizer=plain,
            async_batching=True,
        )["req_0"]
        assert output.generated_tokens == expected
        assert output.error is None


class TestAtTheDoor:
    def test_keywords_configs_and_single_requests_say_the_same(self, plain) -> None:
        model, prompt = shared_model("llama"), random_prompts(1, longest=20, seed=4)[0]
        string = longest_piece(plain, reference(model, prompt, greedy(20))[5:12])
        expected = generates(model, prompt, with_stops(string, 20), plain)
        assert len(expected) < 20
        tokenizer = {"tokenizer": plain, "async_batching": True}

        def result(settings: dict, request: dict) -> list[int]:
            with model.continuous_batching_context_manager(**settings, **tokenizer) as manager:
                return manager.get_result(manager.add_request(prompt, **request), PATIENCE).generated_tokens

        assert [
            model.generate_batch([prompt], greedy(20), stop_strings=string, **tokenizer)["req_0"].generated_tokens,
            result({"generation_config": with_stops([string], 20)}, {}),
            result({"generation_config": greedy(20), "stop_strings": string}, {}),
            result({"generation_config": greedy(20)}, {"stop_strings": string}),
        ] == [expected] * 4
        assert result({"generation_config": with_stops(string, 20)}, {"stop_strings": []}) == reference(
            model, prompt, greedy(20)
        )

    @pytest.mark.parametrize("call", [
        lambda model: model.generate_batch([[1]], stop_strings="a", async_batching=True),
        lambda model: model.generate_batch([[1]], with_stops(["a"]), async_batching=True),
        lambda model: model.init_continuous_batching(with_stops("a"), async_batching=True),
        lambda model: model.continuous_batching_context_manager(with_stops("a"), async_batching=True).__enter__(),
        lambda model: model.init_continuous_batching(async_batching=True).add_request([1], stop_strings="a"),
    ])  # fmt: skip
    def test_they_need_a_tokenizer(self, llama, call: Callable) -> None:
        with pytest.raises(ValueError, match=r"stop_strings need the model's tokenizer.*tokenizer="):
            call(llama)

    def test_refused_ones_leave_a_managers_settings_as_they_were(self, llama) -> None:
        manager = llama.init_continuous_batching(greedy(3), async_batching=True)
        with pytest.raises(ValueError, match="stop_strings"):
            manager.configure(with_stops("a", 9))
        manager.add_request([1])
        manager.start()
        manager.stop()
        assert [output.generated_tokens for output in manager] == [reference(llama, [1], greedy(3))]

    def test_they_need_a_tokenizer_when_only_the_models_own_config_has_them(self) -> None:
        model = new_model("llama")
        model.generation_config.stop_strings = ["a"]
        with pytest.raises(ValueError, match="stop_strings need the model's tokenizer"):
            model.generate_batch([[1]], async_batching=True)

    @pytest.mark.parametrize("strings", ["", ["a", ""], [3], 3, {"a": 1}, [None], True])
    def test_what_is_no_string_is_refused(self, llama, plain, strings: object) -> None:
        with pytest.raises(ValueError, match="stop_strings must be a string or a list of strings"):
            llama.generate_batch([[1]], stop_strings=strings, tokenizer=plain, async_batching=True)
        manager = llama.init_continuous_batching(greedy(3), tokenizer=plain, async_batching=True)
        with pytest.raises(ValueError, match="request odd: stop_strings must be a string or a list of strings"):
            manager.add_request([1], request_id="odd", stop_strings=strings)
        manager.destroy()

    def test_a_kept_manager_takes_each_calls_tokenizer(self, plain, tmp_path) -> None:
        model, prompt = new_model("llama"), random_prompts(1, longest=20, seed=4)[0]
        other = saved_and_loaded(byte_fallback(random.Random(1)), tmp_path)
        whole = reference(shared_model("llama"), prompt, greedy(20))
        for tokenizer in (plain, other, None, plain):
            strings = None if tokenizer is None else [longest_piece(tokenizer, whole[5:12])]
            config = with_stops(strings, 20)
            expected = generates(shared_model("llama"), prompt, config, tokenizer)
            outputs = model.generate_batch(
                [prompt], config, tokenizer=tokenizer, persistent_manager=True, async_batching=True
            )
            assert [output.generated_tokens for output in outputs.values()] == [expected]
        model.destroy_cached_continuous_batching_manager()

    def test_one_tokenizer_serves_at_a_time(self, llama, plain, tmp_path) -> None:
        manager = llama.init_continuous_batching(greedy(3), tokenizer=plain, async_batching=True)
        manager.add_request([1], stop_strings="a")
        manager.configure(greedy(3), tokenizer=saved_and_loaded(byte_fallback(random.Random(1)), tmp_path))
        with pytest.raises(ValueError, match="another tokenizer"):
            manager.add_request([1], stop_strings="a")
        manager.destroy()

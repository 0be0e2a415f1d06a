"""The server, asked by OpenAI's own client over a socket."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import engine_threads, generate_alone, greedy
from serving import PATIENCE, Running, ask, openai, save_model, serving
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from transformers_async_cb.serve import in_transformers
from transformers_async_cb.serve.spelling import spell


EXAMPLES = Path(__file__).parent.parent / "examples"
CONTEXT = 512
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a b"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(folder: Path) -> Iterator[Running]:
    with serving(folder) as running:
        yield running


class TestLogProbabilities:
    """Of each token, and of the likeliest in its place."""

    def own(self, server: Running, prompt: list[int]) -> list[tuple[float, list[float]]]:
        """What the engine says itself."""
        name = server.manager.add_request(prompt, max_new_tokens=12, logprobs=3, do_sample=False, eos_token_id=-1)
        output = server.manager.get_result(name, timeout=PATIENCE)
        return [(o, list(top.values())) for o, top in zip(output.logprobs, output.top_logprobs, strict=True)]

    def test_of_a_chat_are_the_engines_streamed_or_not(self, server: Running) -> None:
        prompt = server.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
        asked = {
            "model": "tiny",
            "messages": CHAT,
            "max_tokens": 12,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 3,
        }
        with server.client() as client:
            whole = client.chat.completions.create(**asked).choices[0]
            chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
        assert [(t.logprob, [o.logprob for o in t.top_logprobs]) for t in whole.logprobs.content] == [
            (pytest.approx(logprob, abs=1e-5), pytest.approx(top, abs=1e-5))
            for logprob, top in self.own(server, prompt)
        ]
        assert [token.token for token in streamed] == [token.token for token in whole.logprobs.content]
        assert [token.logprob for token in streamed] == pytest.approx([t.logprob for t in whole.logprobs.content])
        spelled = b"".join(bytes(token.bytes) for token in whole.logprobs.content)
        assert spelled.decode(errors="replace").rstrip("\ufffd") == whole.message.content
        assert any(bytes(t.bytes) != t.token.encode() for t in whole.logprobs.content), "no parts of characters"

    def test_of_a_completion_say_where_each_token_begins(self, server: Running) -> None:
        prompt = server.tokenizer("a b").input_ids
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3}
        with server.client() as client:
            whole = client.completions.create(**asked).choices[0].logprobs
            chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
        own = self.own(server, prompt)
        assert whole.token_logprobs == pytest.approx([logprob for logprob, _ in own], abs=1e-5)
        assert [max(top.values()) for top in whole.top_logprobs] == pytest.approx([top[0] for _, top in own], abs=1e-5)
        ends = [at + len(token) for at, token in zip(whole.text_offset, whole.tokens, strict=True)]
        assert whole.text_offset == [0, *ends[:-1]]
        assert [token for chunk in chunks if chunk for token in chunk.tokens] == whole.tokens
        assert [at for chunk in chunks if chunk for at in chunk.text_offset] == whole.text_offset

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_are_of_the_prompt_too_where_that_is_echoed(self, server: Running, stream: bool) -> None:
        asked = {"model": "tiny", "prompt": ["a b", "c"], "max_tokens": 5, "logprobs": 2, "temperature": 1.0, "n": 2}
        with server.client() as client:
            if stream:
                tokens, logprobs, offsets, top = ([[] for _ in range(4)] for _ in range(4))
                for chunk in client.completions.create(**asked, echo=True, stream=True):
                    (choice,) = chunk.choices
                    if scored := choice.logprobs:
                        tokens[choice.index] += scored.tokens
                        logprobs[choice.index] += scored.token_logprobs
                        offsets[choice.index] += scored.text_offset
                        top[choice.index] += scored.top_logprobs
            else:
                choices = [choice.logprobs for choice in client.completions.create(**asked, echo=True).choices]
                tokens = [choice.tokens for choice in choices]
                logprobs = [choice.token_logprobs for choice in choices]
                offsets = [choice.text_offset for choice in choices]
                top = [choice.top_logprobs for choice in choices]
        own = server.manager.add_request("a b", max_new_tokens=1, prompt_logprobs=2)
        prompt_logprobs = server.manager.get_result(own, timeout=PATIENCE).prompt_logprobs
        for choice in range(4):
            prompt = ["a", " ", "b"] if choice < 2 else ["c"]
            assert tokens[choice][: len(prompt)] == prompt
            assert len(tokens[choice]) == len(logprobs[choice]) == len(top[choice]) == len(prompt) + 5
            assert logprobs[choice][0] is None and top[choice][0] is None
            assert all(len(of_token) == 2 for of_token in top[choice][1:])
            assert offsets[choice][: len(prompt) + 1] == list(range(len(prompt) + 1))
        assert logprobs[0][1:3] == logprobs[1][1:3] == pytest.approx(prompt_logprobs, abs=1e-5)

    @pytest.mark.parametrize("name, text", [("▁the", " the"), ("<0xC3>", "<0xC3>"), ("<0x41>", "A")])
    def test_spell_tokens_as_they_are_in_the_middle_of_a_text(self, name: str, text: str) -> None:
        inner = Tokenizer(models.BPE({"▁the": 0, "<0xC3>": 1, "<0x41>": 2}, [], byte_fallback=True))
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        spelling = spell(PreTrainedTokenizerFast(tokenizer_object=inner), inner.token_to_id(name))
        assert spelling.text == text
        assert bytes(spelling.bytes) == (b"\xc3" if name == "<0xC3>" else text.encode())

    def test_are_not_there_unless_asked_for(self, server: Running) -> None:
        with server.client() as client:
            answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3)
        assert answer.choices[0].logprobs is None


class TestAnAnswer:
    def test_is_what_generate_answers(self, server: Running) -> None:
        with server.client() as client:
            chat = client.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=20, temperature=0)
            text = client.completions.create(model="tiny", prompt="a b", max_tokens=20, temperature=0)
            ids = client.completions.create(
                model="tiny", prompt=server.tokenizer("a b").input_ids, max_tokens=20, temperature=0
            )
        templated = "<|system|>be brief<|user|>a b<|assistant|>"
        assert chat.choices[0].message.content == server.expected(templated, 20)
        assert chat.choices[0].message.role == "assistant"
        assert text.choices[0].text == ids.choices[0].text == server.expected("a b", 20)
        assert [answer.choices[0].finish_reason for answer in (chat, text, ids)] == ["length"] * 3
        assert chat.usage.prompt_tokens == len(server.tokenizer(templated).input_ids)
        assert (text.usage.prompt_tokens, text.usage.completion_tokens, text.usage.total_tokens) == (3, 20, 23)

    def test_streams_as_the_same_text_with_whole_characters_and_usage_at_the_end(self, server: Running) -> None:
        with server.client() as client:
            settings = {"model": "tiny", "max_tokens": 60, "temperature": 0}
            usage = {"include_usage": True}
            whole = client.chat.completions.create(messages=CHAT, **settings)
            chunks = list(client.chat.completions.create(messages=CHAT, stream=True, stream_options=usage, **settings))
            texts = list(client.completions.create(prompt="a b", stream=True, **settings))
        first, *middle, last, closing = chunks
        assert first.choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content
        assert len(middle) > 20
        assert last.choices[0].finish_reason == "length"
        assert closing.choices == [] and closing.usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert "".join(chunk.choices[0].text for chunk in texts) == server.expected("a b", 60)
        assert texts[-1].choices[0].finish_reason == "length"

    def test_has_a_choice_for_each_prompt(self, server: Running) -> None:
        prompts = ["a", "b c", "d"]
        with server.client() as client:
            settings = {"model": "tiny", "prompt": prompts, "max_tokens": 8, "temperature": 0}
            whole = client.completions.create(**settings)
            streamed = [""] * 3
            for chunk in client.completions.create(**settings, stream=True):
                streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert [choice.text for choice in whole.choices] == streamed == [server.expected(p, 8) for p in prompts]
        assert whole.usage.completion_tokens == 24

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_begins_with_the_prompt_if_that_is_to_be_echoed(self, server: Running, stream: bool) -> None:
        asked = {"model": "tiny", "prompt": ["a b", "c"], "max_tokens": 8, "temperature": 0, "echo": True}
        texts = ["", ""]
        with server.client() as client:
            if stream:
                for chunk in client.completions.create(**asked, stream=True):
                    texts[chunk.choices[0].index] += chunk.choices[0].text
            else:
                texts = [choice.text for choice in client.completions.create(**asked).choices]
            ids = client.completions.create(**asked | {"prompt": server.tokenizer("a b").input_ids})
        assert texts == [prompt + server.expected(prompt, 8) for prompt in asked["prompt"]]
        assert ids.choices[0].text == texts[0]
        assert ids.usage.completion_tokens == 8

    def test_costs_the_same_work_for_each_of_its_tokens(
        self, server: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode, decoded = server.tokenizer.decode, []

        def count(tokens: list[int], **settings: bool) -> str:
            decoded.append(len(tokens))
            return decode(tokens, **settings)

        monkeypatch.setattr(server.tokenizer, "decode", count)
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 480, "temperature": 1.0, "seed": 1}
        with server.client() as client:
            assert len(list(client.completions.create(**asked, stream=True, logprobs=1))) > 48
        assert sum(decoded) < 20 * 480

    def test_has_as_many_choices_as_asked_for(self, server: Running) -> None:
        with server.client() as client:
            settings = {"model": "tiny", "max_tokens": 8, "temperature": 1.5, "seed": 3, "n": 3}
            whole = client.chat.completions.create(messages=CHAT, **settings)
            texts = [""] * 6
            for chunk in client.completions.create(prompt=["a", "b"], stream=True, **settings):
                texts[chunk.choices[0].index] += chunk.choices[0].text
            twice = client.completions.create(prompt=["a", "b"], **settings)
        assert len({choice.message.content for choice in whole.choices}) == 3
        assert whole.usage.completion_tokens == 24
        assert whole.usage.prompt_tokens == len(
            server.tokenizer("<|system|>be brief<|user|>a b<|assistant|>").input_ids
        )
        assert [choice.text for choice in twice.choices] == texts
        assert len(set(texts)) == 6

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_ends_before_a_stop_string_of_its_own(self, server: Running, stream: bool) -> None:
        text = server.expected("a b", 40)
        start = next(i for i in range(5, 35) if text[i : i + 2] not in text[: i + 1])
        stop = text[start : start + 2]
        with server.client() as client:
            settings = {"model": "tiny", "prompt": "a b", "max_tokens": 40, "temperature": 0, "stop": [stop, "\x00"]}
            if stream:
                chunks = list(client.completions.create(stream=True, **settings))
                answer, reason = (
                    "".join(chunk.choices[0].text for chunk in chunks),
                    chunks[-1].choices[0].finish_reason,
                )
            else:
                choice = client.completions.create(**settings).choices[0]
                answer, reason = choice.text, choice.finish_reason
        assert (answer, reason) == (text[:start], "stop")

    def test_is_not_ended_by_a_stop_string_that_begins_in_the_prompt(self, server: Running) -> None:
        text = server.expected("a b", 10)
        with server.client() as client:
            choice = client.completions.create(
                model="tiny", prompt="a b", max_tokens=10, temperature=0, stop="b" + text[0]
            ).choices[0]
        assert (choice.text, choice.finish_reason) == (text, "length")

    def test_ends_at_an_eos_unless_that_is_to_be_ignored(self, folder: Path) -> None:
        twin, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        tokens = generate_alone(twin, tokenizer("a b").input_ids, greedy(20))
        at, eos = next((i, token) for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
        settings = {"model": "tiny", "prompt": "a b", "max_tokens": 20, "temperature": 0}
        with serving(folder, eos) as server, server.client() as client:
            ended = client.completions.create(**settings)
            ignored = client.completions.create(**settings, extra_body={"ignore_eos": True})
        assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (at + 1, "stop")
        assert (ignored.usage.completion_tokens, ignored.choices[0].finish_reason) == (20, "length")

    def test_samples_by_its_own_settings(self, server: Running) -> None:
        def ask(**settings) -> str:
            return client.completions.create(model="tiny", prompt="a b", max_tokens=12, **settings).choices[0].text

        with server.client() as client:
            hot = [ask(temperature=2.0, seed=seed) for seed in (1, 1, 2)]
            assert hot[0] == hot[1] != hot[2]
            assert ask(temperature=5.0, top_p=1e-6) == ask(temperature=5.0, extra_body={"top_k": 1}) == ask()
            assert ask(temperature=5.0, extra_body={"min_p": 1.0}) == server.expected("a b", 12)
            space = server.tokenizer("x").input_ids[0]
            assert ask(temperature=0, logit_bias={str(space): 100}) == "x" * 12
            repeated = ask(temperature=0, logit_bias={str(space): 20}, frequency_penalty=2, presence_penalty=2)
            assert repeated.startswith("x") and len(set(repeated)) > 1

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_follows_a_json_schema(self, server: Running, stream: bool) -> None:
        schema = {"name": "verdict", "schema": {"type": "boolean"}, "strict": True}
        with server.client() as client:
            answer = client.chat.completions.create(
                model="tiny", messages=CHAT, max_tokens=20, stream=stream,
                response_format={"type": "json_schema", "json_schema": schema},
            )  # fmt: skip
            if stream:
                *chunks, last = answer
                text, reason = "".join(c.choices[0].delta.content for c in chunks), last.choices[0].finish_reason
            else:
                text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert json.loads(text) in (True, False)
        assert reason == "stop"

    def test_is_an_object_if_asked_to_be(self, server: Running) -> None:
        with server.client() as client:
            answer = client.chat.completions.create(
                model="tiny", messages=CHAT, max_tokens=3, response_format={"type": "json_object"}
            )
        assert answer.choices[0].message.content.startswith("{")


class TestManyAtOnce:
    def test_all_get_their_answers(self, server: Running) -> None:
        rng = random.Random(0)
        prompts = ["".join(rng.choices("abc d", k=rng.randint(1, 60))) for _ in range(200)]
        limits = [rng.randint(1, 12) for _ in prompts]

        async def ask(client: openai.AsyncOpenAI, i: int) -> str:
            settings = {"model": "tiny", "prompt": prompts[i], "max_tokens": limits[i], "temperature": 0}
            if i % 2:
                return (await client.completions.create(**settings)).choices[0].text
            stream = await client.completions.create(**settings, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def ask_all() -> list[str]:
            async with openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=2 * PATIENCE
            ) as client:
                return await asyncio.gather(*(ask(client, i) for i in range(len(prompts))))

        answers = asyncio.run(ask_all())
        for i in range(0, len(prompts), 9):
            assert answers[i] == server.expected(prompts[i], limits[i])
        server.wait_until_nothing_is_held()


class TestAClientThatGoesAway:
    def test_in_the_middle_of_a_stream_gives_its_pages_back(self, server: Running) -> None:
        with server.client() as client:
            stream = client.chat.completions.create(model="tiny", messages=CHAT, stream=True, temperature=0)
            for _ in range(3):
                next(stream)
            assert server.manager._door.live
            stream.close()
        server.wait_until_nothing_is_held()

    def test_while_it_waits_for_a_whole_answer_gives_its_pages_back(self, server: Running) -> None:
        with server.client() as client, pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(model="tiny", messages=CHAT, temperature=0)
        server.wait_until_nothing_is_held()


def test_null_is_a_field_that_is_not_given(server: Running) -> None:
    nulls = dict.fromkeys(("n", "stream", "stop", "logit_bias", "max_tokens", "temperature", "tools", "functions"))
    asked = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 4}
    answers = [server.post("chat/completions", asked | fields) for fields in ({}, nulls)]
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["choices"] == answers[1][1]["choices"]
    usage = {"include_usage": None}
    assert (
        server.post("completions", {"model": "tiny", "prompt": "a", "echo": None, "stream_options": usage})[0] == 200
    )


class TestABadRequest:
    @pytest.mark.parametrize(
        "route, content, status, param, said",
        [
            ("completions", '{"model": "tiny", "prompt', 400, None, "not valid JSON"),
            ("completions", "[]", 400, None, "The body"),
            ("completions", {"model": "tiny"}, 400, "prompt", "Field required"),
            ("completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "max_tokens", "got 0"),
            ("completions", {"model": "tiny", "prompt": "a", "beams": 4}, 400, "beams", "not supported"),
            ("completions", {"model": "tiny", "prompt": [5000]}, 400, None, "outside the vocabulary"),
            ("completions", {"model": "tiny", "prompt": []}, 400, None, "empty"),
            ("completions", {"model": "tiny", "prompt": "a", "stop": ""}, 400, "stop", "empty"),
            ("completions", {"model": "tiny", "prompt": "a", "logit_bias": {"9999": 1}}, 400, None, "9999"),
            ("completions", {"model": "other", "prompt": "a"}, 404, "model", "does not exist"),
            ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages", "at least 1"),
            ("chat/completions", {"model": "tiny", "messages": CHAT, "temperature": -1}, 400, "temperature", "got -1"),
            ("chat/completions", {"model": "tiny", "messages": CHAT, "n": 0}, 400, "n", "got 0"),
            ("chat/completions", {"model": "tiny", "messages": CHAT, "top_logprobs": 2}, 400, None, "needs logprobs"),
            (
                "chat/completions",
                {
                    "model": "tiny",
                    "messages": CHAT,
                    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}},
                },
                400, None, "json_schema is not valid",
            ),
            ("completions", {"model": "tiny", "prompt": "a", "priority": 2**64}, 400, None, "priority"),
            ("completions", {"model": "tiny", "prompt": "a", "\ud800": 1}, 400, None, "got \\ud800"),
            (
                "chat/completions",
                {"model": "tiny", "messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}},
                400, "chat_template_kwargs", "the server's",
            ),
            (
                "chat/completions",
                {"model": "tiny", "messages": CHAT, "chat_template_kwargs": {"tokenizer": 1, "conversation": 2}},
                400, None, "does not take this prompt",
            ),
            (
                "chat/completions",
                {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
                400, "messages.0.user.content.list[TextPart].0.type", "Input should be 'text', got image_url",
            ),
            ("completions", {"model": "tiny", "prompt": ["a", [1]]}, 400, "prompt.list[str].1", "got [1]"),
            ("completions", {"model": "tiny", "prompt": None}, 400, "prompt", "Field required"),
            (
                "chat/completions",
                {
                    "model": "tiny",
                    "messages": CHAT,
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "a", "schema": {"properties": {"b": {"$ref": "http://c"}}}},
                    },
                },
                400, None, "'http://c' is not within the schema",
            ),
            ("nothing", {}, 404, None, "Not Found"),
        ],
    )  # fmt: skip
    def test_is_an_error_of_openais_form_and_the_server_goes_on(
        self, server: Running, route: str, content: str | dict, status: int, param: str | None, said: str
    ) -> None:
        answered, answer = server.post(route, content)
        error = answer["error"]
        assert answered == status
        assert said in error["message"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert server.post("completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})[0] == 200

    def test_without_the_content_type_of_json_is_told_so(self, server: Running) -> None:
        body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"content-type": "text/plain"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=PATIENCE)
        assert refused.value.code == 400
        assert "content-type" in json.load(refused.value)["error"]["message"]

    @pytest.mark.parametrize("length, limit", [(CONTEXT + 1, None), (CONTEXT - 3, 4)])
    def test_is_a_prompt_that_is_too_long(self, server: Running, length: int, limit: int | None) -> None:
        with server.client() as client:
            with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT}") as raised:
                client.completions.create(model="tiny", prompt=[1] * length, max_tokens=limit)
            assert raised.value.code == "context_length_exceeded"
            assert client.completions.create(model="tiny", prompt=[1] * (CONTEXT - 1), max_tokens=1).choices

    def test_among_the_prompts_of_a_call_runs_none_of_them(self, server: Running) -> None:
        with server.client() as client, pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
            client.completions.create(model="tiny", prompt=[[1, 2], [5000]])
        assert server.manager._engine.steps == 0


class TestAServer:
    def test_says_which_model_it_has_and_that_it_is_well(self, server: Running) -> None:
        with server.client() as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.models.retrieve("tiny").object == "model"
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("other")
        assert ask(f"{server.url}/health") == (200, {"status": "ok"})
        assert server.manager.warmed_up

    def test_with_a_full_queue_turns_requests_away_and_finishes_the_others(self, folder: Path) -> None:
        asked = {"model": "tiny", "prompt": "a b", "max_tokens": 5, "temperature": 0}
        with serving(folder, max_queue_size=2) as server, server.client() as client, ThreadPoolExecutor(2) as threads:
            with server.manager.pause():
                waiting = [threads.submit(client.completions.create, **asked) for _ in range(2)]
                end = time.monotonic() + PATIENCE
                while server.manager.metrics().waiting < 2:
                    assert time.monotonic() < end
                    time.sleep(0.005)
                with pytest.raises(openai.RateLimitError, match="max_queue_size=2") as raised:
                    client.completions.create(**asked)
                assert int(raised.value.response.headers["retry-after"]) > 0
            answers = [answer.result(PATIENCE).choices[0].text for answer in waiting]
            assert answers == [server.expected("a b", 5)] * 2
            assert client.completions.create(**asked).choices[0].text == answers[0]

    @pytest.mark.parametrize("form", ["text/plain", "application/openmetrics-text"])
    def test_has_metrics_for_prometheus(self, server: Running, form: str) -> None:
        pytest.importorskip("prometheus_client")
        server.post("completions", {"model": "tiny", "prompt": "a b", "max_tokens": 7})
        request = urllib.request.Request(f"{server.url}/metrics", headers={"accept": form})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            assert response.headers["content-type"].startswith(form)
            lines = response.read().decode().splitlines()
        assert "async_batching_tokens_out_total 7.0" in lines
        assert "async_batching_requests_running 0.0" in lines

    def test_without_prometheus_client_says_what_metrics_need(
        self, server: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("prometheus_client", "prometheus_client.core"):
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "transformers_async_cb.prometheus", raising=False)
        status, answer = ask(f"{server.url}/metrics")
        assert status == 501
        assert "transformers-async-cb[metrics]" in answer["error"]["message"]

    def test_whose_engine_failed_says_so(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_) -> None:
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr(server.manager._engine.scheduler, "plan", fail)
        body = {"model": "tiny", "prompt": "a"}
        status, answer = server.post("completions", body)
        assert status == 500 and "on purpose" in answer["error"]["message"]
        assert server.post("completions", body)[0] == 503
        assert ask(f"{server.url}/health")[0] == 503

    def test_starts_with_the_command_and_stops_when_interrupted(self, folder: Path) -> None:
        with by_command(folder) as (process, url):
            _, answer = ask(f"{url}/v1/completions", {"model": "tiny", "prompt": "a"})
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert answer["usage"]["completion_tokens"] == 16
        assert process.returncode == 0
        assert "Traceback" not in said

    def test_of_a_shape_needs_no_folder(self) -> None:
        with by_command(Path("tiny")) as (process, url):
            status, answer = ask(f"{url}/v1/completions", {"model": "tiny", "prompt": "a"})
            process.send_signal(signal.SIGINT)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 16)

    def test_that_is_terminated_finishes_what_it_can_and_fails_the_rest(self, folder: Path) -> None:
        with by_command(folder, "--grace", "0.5", "--max-requests", "2") as (process, url):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
            stream = client.completions.create(model="tiny", prompt=["a"] * 400, max_tokens=500, stream=True)
            next(stream)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="stopped"):
                list(stream)
            process.stderr.read()
        assert process.returncode in (0, -signal.SIGTERM)


@contextmanager
def by_command(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and its address; the process has ended afterwards."""
    command = [sys.executable, "-m", "transformers_async_cb", "serve", str(folder), "--port", "0", "--name", "tiny"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process, next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+", line)))
        except BaseException:
            process.kill()
            raise


class TestExamples:
    @pytest.fixture
    def run(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Runs an example with arguments."""

        def run_example(name: str, *arguments: str) -> None:
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")

        return run_example

    def test_a_client_asks_whole_and_in_a_stream(self, server: Running, run, capsys) -> None:
        run("serve_client.py", "--url", server.url, "--question", "a b")
        answer = server.expected("<|user|>a b<|assistant|>", 64)
        assert capsys.readouterr().out.startswith(f"{answer}\nlength 64\n")

    def test_a_load_counts_tokens_and_times_them(self, server: Running) -> None:
        load = runpy.run_path(str(EXAMPLES / "serve_load.py"))
        asked = load["Load"]("tiny", 5, 4, 7)
        answers = load["ask_some"](server.url, asked, range(5), time.monotonic() + PATIENCE)
        assert [(answer.tokens, answer.finished) for answer in answers] == [(7, True)] * 5
        figures = load["figures"](answers)
        assert (figures["requests"], figures["finished"]) == (5, 5)
        assert 0 < figures["first_median"] <= figures["first_95"] <= figures["seconds"] < PATIENCE
        with pytest.raises(RuntimeError, match="does not exist"):
            load["ask_some"](server.url, asked._replace(model="other"), range(1), time.monotonic() + PATIENCE)

    def test_a_load_stops_when_its_time_is_over(self, server: Running) -> None:
        load = runpy.run_path(str(EXAMPLES / "serve_load.py"))
        with server.manager.pause():
            answers = load["ask_some"](server.url, load["Load"]("tiny", 2, 4, 7), range(2), time.monotonic() + 0.2)
        assert not any(answer.finished for answer in answers)
        with pytest.raises(RuntimeError, match="no token came in time"):
            load["figures"](answers)
        server.wait_until_nothing_is_held()


class TestTransformersOwnServer:
    @pytest.fixture
    def theirs(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
        from transformers.cli.serve import Serve
        from transformers.cli.serving import utils

        monkeypatch.setattr(utils, "CBGenerateManager", utils.CBGenerateManager)  # which is put back
        in_transformers.use_this_engine()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = Serve(
            force_model=str(folder), continuous_batching=True, device="cpu", host="127.0.0.1", port=port,
            non_blocking=True, cb_num_blocks=64,
        )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while not server.server.started:
            assert time.monotonic() < end
            time.sleep(0.005)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client
        server.kill_server()
        server._thread.join(PATIENCE)

    def test_generates_on_this_engine_with_each_requests_own_settings(self, theirs, folder: Path) -> None:
        twin, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("<|system|>be brief<|user|>a b<|assistant|>").input_ids
        expected = tokenizer.decode(generate_alone(twin, prompt, greedy(12)), skip_special_tokens=True)
        settings = {"model": str(folder), "messages": CHAT, "max_tokens": 12}
        bias = {"logit_bias": {str(tokenizer("x").input_ids[0]): 100.0}}
        create = theirs.chat.completions.create
        biased, plain = create(**settings, **bias), create(**settings)
        stopped = create(**settings, **bias, stop="xxx")
        streamed = [chunk.choices[0].delta.content or "" for chunk in create(**settings, **bias, stream=True)]
        assert engine_threads()
        assert biased.choices[0].message.content == "".join(streamed) == "x" * 12
        assert plain.choices[0].message.content == expected
        assert stopped.usage.completion_tokens == 3
        with pytest.raises(openai.BadRequestError) as raised:
            create(**settings, logit_bias={"9999": 1.0})
        assert "9999" in raised.value.response.text
        assert create(**settings).choices[0].message.content == expected

"""Calls of tools, asked for by OpenAI's own client over a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import shared_model
from serving import Running, openai, save_model, serving
from transformers import AutoTokenizer, LogitsProcessor

from transformers_async_cb.cli import main
from transformers_async_cb.serve import listening
from transformers_async_cb.serve.tools import FormReader, Said, ToolCall, response_template


TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.arguments.city }}</call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORM = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<call>", "close": "</call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>"},
    },
}  # fmt: skip
ASKED = [{"role": "user", "content": "Oslo?"}]


def tool(name: str, **properties: dict) -> dict:
    parameters = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


TOOLS = [tool("weather", city={"enum": ["Oslo", "Bergen"]}), tool("lamp", on={"type": "boolean"})]
CALL = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
OTHER = '<call>{"name": "lamp", "arguments": {"on": true}}</call>'


class Script(LogitsProcessor):
    """Has the model say a text, after the last beginning of an answer."""

    def __init__(self, tokenizer: AutoTokenizer, text: str) -> None:
        self.tokens = tokenizer(text + "<|end|>").input_ids
        self.begin = tokenizer.convert_tokens_to_ids("<|assistant|>")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids.shape[1] - 1 - (input_ids[0] == self.begin).nonzero().max()
        scores[:, self.tokens[min(said, len(self.tokens) - 1)]] = 1000.0
        return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), TEMPLATE, response_template=FORM)


@contextmanager
def saying(folder: Path, text: str) -> Iterator[openai.OpenAI]:
    """A client of a model that always says this."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    script = Script(tokenizer, text)
    with serving(folder, tokenizer.eos_token_id, logits_processor=[script]) as server, server.client() as client:
        yield client


@pytest.fixture
def server(folder: Path) -> Iterator[Running]:
    with serving(folder, eos_token_id=AutoTokenizer.from_pretrained(folder).eos_token_id) as running:
        yield running


def called(calls: list) -> list[tuple[str, dict]]:
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


class TestACallInTheModelsOwnForm:
    def test_is_found_among_thoughts_and_text(self, folder: Path) -> None:
        with saying(folder, f"<think>hm</think>Let me see. {CALL}\n{OTHER}") as client:
            answer = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, n=2, temperature=1.0)
        assert len(answer.choices) == 2
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Let me see."
            assert choice.message.reasoning_content == "hm"
            assert called(choice.message.tool_calls) == [("weather", {"city": "Oslo"}), ("lamp", {"on": True})]

    def test_streams_whole_after_the_text_before_it(self, folder: Path) -> None:
        with saying(folder, f"<think>hm</think>Let me see. {CALL}\n{OTHER}") as client:
            with client.chat.completions.stream(model="tiny", messages=ASKED, tools=TOOLS) as stream:
                deltas = [event.chunk.choices[0].delta for event in stream if event.type == "chunk"]
            answer = stream.get_final_completion().choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content == "Let me see."
        assert called(answer.message.tool_calls) == [("weather", {"city": "Oslo"}), ("lamp", {"on": True})]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "hm"
        assert [call.index for delta in deltas for call in delta.tool_calls or ()] == [0, 1]
        assert sum(bool(delta.content) for delta in deltas) > 5, "the text came at once"

    def test_alone_leaves_no_content(self, folder: Path) -> None:
        with saying(folder, CALL) as client:
            message = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS).choices[0].message
        assert message.content is None
        assert called(message.tool_calls) == [("weather", {"city": "Oslo"})]

    def test_comes_once_where_several_are_not_wanted(self, folder: Path) -> None:
        with saying(folder, CALL + OTHER) as client:
            answer = client.chat.completions.create(
                model="tiny", messages=ASKED, tools=TOOLS, parallel_tool_calls=False
            )
        assert called(answer.choices[0].message.tool_calls) == [("weather", {"city": "Oslo"})]

    @pytest.mark.parametrize("text", ["Nothing to call.", 'Hm.<call>{"name": "weather", </call>'])
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_that_is_none_is_content(self, folder: Path, text: str, stream: bool) -> None:
        with saying(folder, text) as client:
            if stream:
                with client.chat.completions.stream(model="tiny", messages=ASKED, tools=TOOLS) as events:
                    choice = events.get_final_completion().choices[0]
            else:
                choice = client.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS).choices[0]
        assert choice.message.content == text
        assert not choice.message.tool_calls
        assert choice.finish_reason == "stop"

    def test_is_text_where_tools_are_not_to_be_called(self, folder: Path) -> None:
        settings = {"model": "tiny", "messages": ASKED}
        with saying(folder, CALL) as client:
            answer = client.chat.completions.create(**settings, tools=TOOLS, tool_choice="none")
            plain = client.chat.completions.create(**settings)
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == plain.usage.prompt_tokens, "the model heard of tools"

    @pytest.mark.parametrize("pieces", [1, 3, 1000], ids=["by letter", "by three", "at once"])
    def test_is_read_alike_however_its_text_comes(self, folder: Path, pieces: int) -> None:
        parser = AutoTokenizer.from_pretrained(folder).get_response_parser(prefix="<|user|>Oslo?<|assistant|><think>")
        reader, text = FormReader(parser, parallel=True), f"a</think>b{CALL} c <call>{{}}</call>{OTHER}<|end|>"
        said = [reader.add(text[i : i + pieces], i + pieces >= len(text)) for i in range(0, len(text), pieces)]
        assert "".join(one.reasoning for one in said) == "a"
        assert [call for one in said for call in one.calls] == [
            ToolCall("weather", '{"city": "Oslo"}'), ToolCall("lamp", '{"on": true}')
        ]  # fmt: skip
        assert "".join(one.content for one in said) == "b c{}"

    @pytest.mark.parametrize("pieces", [1, 3, 1000], ids=["by letter", "by three", "at once"])
    def test_is_kept_if_a_later_one_cannot_be_read(self, folder: Path, pieces: int) -> None:
        parser = AutoTokenizer.from_pretrained(folder).get_response_parser(prefix="<|assistant|>")
        reader, text = FormReader(parser, parallel=True), f"a{CALL} and then <call>{{]</call> b {OTHER}"
        said = [reader.add(text[i : i + pieces], i + pieces >= len(text)) for i in range(0, len(text), pieces)]
        assert [call.name for one in said for call in one.calls] == ["weather"]
        content = "".join(one.content for one in said)
        assert content.startswith("a and then") and content.endswith(f"{{]</call> b {OTHER}")


class TestTheModelsForm:
    def test_is_what_the_command_was_given_for_models_that_bring_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, ready = tmp_path / "form.json", []
        file.write_text(json.dumps(FORM))
        monkeypatch.setattr(listening.GracefulServer, "run", lambda self: ready.append(self))
        folder = str(save_model(tmp_path, TEMPLATE))
        main(["serve", folder, "--device", "cpu", "--response-template", str(file), "--max-queue-size", "3"])
        server = ready[0]._server
        assert server._response_template == FORM
        assert server.manager.continuous_batching_config.max_queue_size == 3

    @pytest.mark.parametrize(
        "content, said", [("{", "form.json is not to be read"), ("{}", "fields must be"), ("[]", "dict")]
    )
    def test_has_to_be_one(
        self, folder: Path, tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture
    ) -> None:
        file = tmp_path / "form.json"
        file.write_text(content)
        with pytest.raises(SystemExit) as raised:
            main(["serve", str(folder), "--response-template", str(file)])
        assert said in f"{raised.value}{capsys.readouterr().err}"

    def test_is_what_transformers_server_knows_where_the_tokenizer_says_nothing(self, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path))
        form = response_template(tokenizer, shared_model("qwen3"))
        reader = FormReader(tokenizer.get_response_parser(form, prefix="<|im_start|>assistant\n"), parallel=True)
        said = reader.add('Hm.\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call><|im_end|>', last=True)
        assert said == Said("Hm.", "", [ToolCall("a", "{}")])
        assert response_template(tokenizer, shared_model("llama")) is None


class TestACallThatHasToCome:
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_is_of_the_function_that_is_named(self, server: Running, stream: bool) -> None:
        choice = {"type": "function", "function": {"name": "lamp"}}
        settings = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "tool_choice": choice, "temperature": 1.0}
        with server.client() as client:
            if stream:
                with client.chat.completions.stream(**settings) as events:
                    answer = events.get_final_completion().choices[0]
            else:
                answer = client.chat.completions.create(**settings).choices[0]
        ((name, arguments),) = called(answer.message.tool_calls)
        assert name == "lamp"
        assert list(arguments) == ["on"] and arguments["on"] in (True, False)
        assert not answer.message.content
        assert answer.finish_reason == "tool_calls"

    def test_is_of_any_function_where_none_is_named(self, server: Running) -> None:
        with server.client() as client:
            answers = client.chat.completions.create(
                model="tiny", messages=ASKED, tools=[*TOOLS, {"type": "function", "function": {"name": "wait"}}],
                tool_choice="required", parallel_tool_calls=False, temperature=1.0, seed=1, n=12,
            )  # fmt: skip
        calls = [call for choice in answers.choices for call in called(choice.message.tool_calls)]
        assert len(calls) == 12
        assert {name for name, _ in calls} == {"weather", "lamp", "wait"}
        for name, arguments in calls:
            assert list(arguments) == {"weather": ["city"], "lamp": ["on"], "wait": []}[name]

    def test_follows_definitions_of_its_schema(self, server: Running) -> None:
        parameters = {
            "type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}}, "required": ["at"],
            "$defs": {"Place": {"enum": ["Oslo"]}}, "additionalProperties": False,
        }  # fmt: skip
        with server.client() as client:
            answer = client.chat.completions.create(
                model="tiny", messages=ASKED, tool_choice="required", parallel_tool_calls=False,
                tools=[{"type": "function", "function": {"name": "go", "parameters": parameters}}],
            )  # fmt: skip
        assert called(answer.choices[0].message.tool_calls) == [("go", {"at": "Oslo"})]

    def test_is_cut_off_by_the_limit(self, server: Running) -> None:
        with server.client() as client:
            answer = client.chat.completions.create(
                model="tiny", messages=ASKED, tools=TOOLS, tool_choice="required", max_tokens=4
            )
        assert answer.choices[0].finish_reason == "length"
        assert len(answer.choices[0].message.content) == 4


class TestAConversation:
    def test_goes_on_with_what_was_called_and_answered(self, folder: Path) -> None:
        with saying(folder, CALL) as client:
            create = client.chat.completions.create
            message = create(model="tiny", messages=ASKED, tools=TOOLS).choices[0].message
            result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
            answer = create(model="tiny", messages=[*ASKED, message, result], tools=TOOLS)
        prompt = "<tools>weather lamp <|user|>Oslo?<|assistant|><call>Oslo</call><|tool|>rain<|assistant|>"
        assert answer.usage.prompt_tokens == len(AutoTokenizer.from_pretrained(folder)(prompt).input_ids)


class TestABadRequest:
    @pytest.mark.parametrize(
        "fields, param, said",
        [
            ({"tools": []}, "tools", "at least 1"),
            ({"tool_choice": "auto"}, None, "need tools"),
            ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, None, "names 'x'"),
            ({"tools": [TOOLS[0], TOOLS[0]]}, None, "twice"),
            ({"tools": TOOLS, "response_format": {"type": "json_object"}}, None, "exclude each other"),
            (
                {"messages": [{"role": "assistant", "content": None}]},
                "messages.0.assistant", "needs content or tool_calls",
            ),
            (
                {"messages": [{"role": "assistant", "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "b", "arguments": "{"}}]}]},
                "messages.0.assistant.tool_calls.0.function.arguments", "got {",
            ),
            ({"messages": [{"role": "tool", "content": "rain"}]}, "messages.0.tool.tool_call_id", "required"),
            (
                {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}],
                 "tool_choice": "required"},
                None, "not valid",
            ),
        ],
    )  # fmt: skip
    def test_is_refused_with_what_is_wrong(self, server: Running, fields: dict, param: str | None, said: str) -> None:
        status, answer = server.post("chat/completions", {"model": "tiny", "messages": ASKED} | fields)
        assert (status, answer["error"]["param"]) == (400, param)
        assert said in answer["error"]["message"]

    @pytest.mark.parametrize("template, said", [(TEMPLATE, "response_template"), ("{{ messages }}", "chat template")])
    def test_is_one_with_tools_that_the_model_does_not_know(self, tmp_path: Path, template: str, said: str) -> None:
        with serving(save_model(tmp_path, template)) as server:
            status, answer = server.post("chat/completions", {"model": "tiny", "messages": ASKED, "tools": TOOLS})
        assert (status, answer["error"]["param"]) == (400, "tools")
        assert said in answer["error"]["message"]

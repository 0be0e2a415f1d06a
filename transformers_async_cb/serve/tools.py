"""Calls of tools in an answer: the JSON schema of one that must come, and reading them out of what the model says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase


if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser


# A function without `parameters` has none, as OpenAI's reference has it.
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

# What response templates call a model's thinking: transformers' own templates have changed the name.
_REASONING = ("reasoning_content", "thinking")


# Letters that are read at once: where a parser fails, what it has found before is kept but for those.
_PIECE = 16


class ToolCall(NamedTuple):
    """A function, and its arguments as JSON."""

    name: str
    arguments: str


class Said(NamedTuple):
    """What a piece of an answer's text comes to."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()


class Reader(Protocol):
    """Reads the text of one choice."""

    def add(self, text: str, last: bool) -> Said:
        """Take a piece of the text; `last`: no more follows."""


class FormReader:
    """Reads an answer in its model's own form, as a response template describes it. What was to be a call and is none
    is content, and after JSON that cannot be read all that follows is: what a model said is never lost.

    Args:
        parser (`ResponseParser`): of `tokenizer.get_response_parser`, which knows the prompt.
        parallel (`bool`): more calls than the first count.
    """

    def __init__(self, parser: ResponseParser, parallel: bool) -> None:
        self._parser: ResponseParser | None = parser
        self._parallel = parallel
        self._called = False
        self._body = ""  # of the call that is being read
        self._unread = ""  # fed to the parser since it last said something

    def add(self, text: str, last: bool) -> Said:
        said = Said("", "", [])
        for start in range(0, len(text), _PIECE):
            said = self._go_on(said, text[start : start + _PIECE])
        return self._go_on(said) if last else said

    def _go_on(self, said: Said, text: str | None = None) -> Said:
        """What has been said after another piece, or at the end."""
        if self._parser is None:
            return said._replace(content=said.content + (text or ""))
        self._unread += text or ""
        try:
            events = self._parser.finalize()[1] if text is None else self._parser.feed(text)
        except ValueError:
            self._parser = None
            return said._replace(content=said.content + self._unread)
        for event in events:
            said = self._understand(event, said)
        return said

    def _understand(self, event: dict[str, Any], said: Said) -> Said:
        """What has been said after an event of the parser's."""
        kind, field = event["type"], event["field"]
        if kind == "region_open":
            self._body = ""
        elif kind == "region_chunk" and event["dirty"]:
            self._body += event["text"]
        elif kind == "region_chunk":
            self._unread = self._unread.partition(event["text"])[2]
            if field == "content":
                return said._replace(content=said.content + event["text"])
            if field in _REASONING:
                return said._replace(reasoning=said.reasoning + event["text"])
        elif field == "tool_calls":
            self._unread = ""
            try:
                call = _call(event["value"])
            except ValueError:
                return said._replace(content=said.content + self._body)
            if self._parallel or not self._called:
                self._called = True
                return said._replace(calls=[*said.calls, call])
        return said


class NamedCallReader:
    """Reads an answer that is the arguments of one function.

    Args:
        name (`str`): the function's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pieces: list[str] = []

    def add(self, text: str, last: bool) -> Said:
        self._pieces.append(text)
        return Said(calls=[ToolCall(self._name, "".join(self._pieces))]) if last else Said()


class CallListReader:
    """Reads an answer that is a JSON array of calls. One that its limit has cut off is content."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, text: str, last: bool) -> Said:
        self._pieces.append(text)
        if not last:
            return Said()
        answer = "".join(self._pieces)
        try:
            return Said(calls=[_call({"function": call}) for call in json.loads(answer)])
        except ValueError:
            return Said(answer)


def _call(value: Any) -> ToolCall:
    """Raises `ValueError` for what is no call: a model may write anything."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"not a call: {value}")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(function["name"], arguments)


def arguments_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The JSON schema of one function's arguments."""
    return _NO_PARAMETERS if parameters is None else parameters


def calls_schema(functions: dict[str, dict[str, Any] | None], parallel: bool) -> dict[str, Any]:
    """The JSON schema of an array of calls, at least one.

    Args:
        functions (`dict`): the JSON schemas of the arguments, by name.
        parallel (`bool`): whether there may be more than one call.

    Raises:
        ValueError: two functions mean different things by one name in their `$defs`, which are joined.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for name, parameters in functions.items():
        arguments = dict(arguments_schema(parameters))
        for key, definition in arguments.pop("$defs", {}).items():
            if definitions.setdefault(key, definition) != definition:
                raise ValueError(f"tools: two functions have a definition {key!r} in $defs, and they differ")
        properties = {"name": {"const": name}, "arguments": arguments}
        calls.append(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    return schema | ({} if parallel else {"maxItems": 1}) | ({"$defs": definitions} if definitions else {})


def response_template(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Any] | None:
    """How the model's answers are to be read: what the tokenizer says, else what transformers' own server knows of
    models like this one."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:  # a version with another server
        return getattr(tokenizer, "response_template", None)
    return get_response_template(tokenizer, model)

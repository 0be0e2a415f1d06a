"""What a client may send, and what it means to the engine.

The fields are OpenAI's (https://platform.openai.com/docs/api-reference), and some that other servers of open models
have, under the names they have there. A field that is not listed is refused, not ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .tools import arguments_schema, calls_schema


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, fields: Any) -> Any:
        """Clients send `null` for what nobody has set."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(_Body):
    type: Literal["text"]
    text: str


def _text(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class Message(_Body):
    """Of whoever asks."""

    role: Literal["system", "developer", "user"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages: text content, and no developers."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text(self.content)} | ({} if self.name is None else {"name": self.name})


class CalledFunction(_Body):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, arguments: str) -> str:
        if not isinstance(json.loads(arguments or "{}"), dict):
            raise ValueError("arguments are no JSON object")
        return arguments


class CalledTool(_Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of a streamed answer that is sent back as it came

    def for_template(self) -> dict[str, Any]:
        """With arguments that a template can go through."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments or "{}")}
        return {"id": self.id, "type": self.type, "function": function}


class AssistantMessage(_Body):
    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    reasoning_content: str | None = None  # not OpenAI's
    # Of an answer that is sent back as it came:
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        optional = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()] or None,
        }
        present = {name: value for name, value in optional.items() if value is not None}
        return {"role": self.role, "content": _text(self.content)} | present


class ToolMessage(_Body):
    """What a tool has answered."""

    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        message = {"role": self.role, "content": _text(self.content), "tool_call_id": self.tool_call_id}
        return message | ({} if self.name is None else {"name": self.name})


class Function(_Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # a call that must come follows the schema either way, any other is up to the model


class Tool(_Body):
    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # it is followed either way


class PlainFormat(_Body):
    type: Literal["text", "json_object"]


class SchemaFormat(_Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Body(_Body):
    """What chats and completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    # Whose request it is, which changes no token:
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # prompts that begin alike are found by their tokens
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    # Not OpenAI's:
    top_k: int | None = Field(None, ge=-1)  # -1 and 0 turn it off
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool = False
    priority: int = 0

    @field_validator("stop")
    @classmethod
    def _none_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop is not None and not all([stop] if isinstance(stop, str) else stop):
            raise ValueError("a stop string is empty")
        return stop

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def likeliest(self) -> int | None:
        """How many tokens to list beside each one's log-probability; `None` for no log-probabilities."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self, default_top_k: int | None) -> dict[str, Any]:
        """Keyword arguments for `add_request`, but for the limit. What is not stated is up to the model's generation
        config; but whoever states how to sample does sample, and from all tokens if neither says from how many.

        Args:
            default_top_k (`int`, *optional*): the generation config's.
        """
        settings: dict[str, Any] = {
            "num_return_sequences": self.n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
            "seed": self.seed,
            "stop_in_answer": True,
            "logprobs": self.likeliest,
        }
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        if self.temperature == 0:
            settings["do_sample"] = False
        elif any(value is not None for value in sampling.values()):
            settings |= {"do_sample": True} | sampling
            settings["top_k"] = max(0, default_top_k or 0) if self.top_k is None else max(0, self.top_k)
        settings["priority"] = self.priority
        return {name: value for name, value in settings.items() if value is not None}


class Chat(Body):
    """The body of `/v1/chat/completions`."""

    messages: list[Annotated[Message | AssistantMessage | ToolMessage, Field(discriminator="role")]] = Field(
        min_length=1
    )
    tools: list[Tool] | None = Field(None, min_length=1)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: PlainFormat | SchemaFormat | None = Field(None, discriminator="type")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}  # not OpenAI's

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_of_our_template(cls, variables: dict[str, Any]) -> dict[str, Any]:
        """A template of the client's would be a program of theirs."""
        if "chat_template" in variables:
            raise ValueError("the chat template is the server's")
        return variables

    @model_validator(mode="after")
    def _likeliest_of_something(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @model_validator(mode="after")
    def _tools_that_are_there(self) -> Chat:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"tools have a name twice: {', '.join(names)}")
        if not names and (self.tool_choice is not None or self.parallel_tool_calls is not None):
            raise ValueError("tool_choice and parallel_tool_calls need tools")
        if self.called_function is not None and self.called_function not in names:
            raise ValueError(f"tool_choice names {self.called_function!r}, and tools have {', '.join(names)}")
        if self.offers_tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("tools and response_format exclude each other here, unless tool_choice is 'none'")
        return self

    @property
    def offers_tools(self) -> bool:
        """Whether the model hears of the tools; those that it may not use it does not."""
        return self.tools is not None and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        """Whether the answer is a call, whatever the model would rather say."""
        return self.tool_choice == "required" or self.called_function is not None

    @property
    def called_function(self) -> str | None:
        """The one that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def template_settings(self) -> dict[str, Any]:
        """Keyword arguments for the chat template."""
        tools = {"tools": [tool.model_dump(exclude_none=True) for tool in self.tools]} if self.offers_tools else {}
        return self.chat_template_kwargs | tools

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def settings(self, default_top_k: int | None) -> dict[str, Any]:
        settings = super().settings(default_top_k)
        if isinstance(self.response_format, SchemaFormat):
            settings["json_schema"] = self.response_format.json_schema.schema_
        elif self.response_format is not None and self.response_format.type == "json_object":
            settings["json_schema"] = {"type": "object"}
        if self.must_call:
            functions = {tool.function.name: tool.function.parameters for tool in self.tools}
            settings["json_schema"] = (
                calls_schema(functions, parallel=self.parallel_tool_calls is not False)
                if self.called_function is None
                else arguments_schema(functions[self.called_function])
            )
        return settings


class Completion(Body):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def settings(self, default_top_k: int | None) -> dict[str, Any]:
        settings = super().settings(default_top_k)
        if self.echo and self.logprobs is not None:
            settings["prompt_logprobs"] = self.logprobs
        return settings

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and not all(isinstance(entry, int) for entry in self.prompt)
        return self.prompt if several else [self.prompt]

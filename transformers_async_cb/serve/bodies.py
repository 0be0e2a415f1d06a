"""What a client may send, and what it means to the engine.

The fields are OpenAI's (https://platform.openai.com/docs/api-reference), and some that other servers of open models
have, under the names they have there. A field that is not listed is refused, not ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    include_usage: bool = False


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know messages: text content, and no developers."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


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

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: PlainFormat | SchemaFormat | None = Field(None, discriminator="type")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}  # not OpenAI's

    @model_validator(mode="after")
    def _likeliest_of_something(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

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
        return settings


class Completion(Body):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and not all(isinstance(entry, int) for entry in self.prompt)
        return self.prompt if several else [self.prompt]

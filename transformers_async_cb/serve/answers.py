"""Answers in OpenAI's form: whole, or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from .following import News, ScoredToken
from .spelling import Spelling
from .tools import Reader, Said, ToolCall


class _Answer:
    """One answer, of some choices.

    Args:
        model (`str`): the model's name.
        choices (`int`): how many there are.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, choices: int) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts = [""] * choices
        self._reasons: list[str | None] = [None] * choices
        self._scored: list[list[ScoredToken]] = [[] for _ in range(choices)]  # and not sent yet

    def take(self, news: News) -> None:
        """Keep what is new, for `whole`."""
        self._texts[news.choice] += news.text
        self._scored[news.choice] += news.scored
        self._reasons[news.choice] = news.finish_reason

    def whole(self, usage: dict[str, int]) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = [
            {"index": i, **self._content(i), "logprobs": self._logprobs(i), "finish_reason": reason}
            for i, reason in enumerate(self._reasons)
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first text."""
        return iter(())

    def chunks(self, news: News) -> Iterator[dict[str, Any]]:
        """Chunks that say what is new."""
        self._scored[news.choice] += news.scored
        if news.text:
            yield self._chunk(news.choice, self._delta(news.text), None)
        if news.finish_reason is not None:
            yield self._chunk(news.choice, self._delta(None), news.finish_reason)

    def closing(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk that says what the answer took."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage}

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choices = [{"index": choice, **delta, "logprobs": self._logprobs(choice), "finish_reason": reason}]
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _logprobs(self, choice: int) -> dict[str, Any] | None:
        """The log-probabilities that have not been sent."""
        scored, self._scored[choice] = self._scored[choice], []
        return self._in_form(choice, scored) if scored else None

    def _in_form(self, choice: int, scored: list[ScoredToken]) -> dict[str, Any]:
        raise NotImplementedError

    def _content(self, choice: int) -> dict[str, Any]:
        """The whole of a choice."""
        raise NotImplementedError

    def _delta(self, text: str | None) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(_Answer):
    """Of `/v1/chat/completions`.

    Args:
        readers (`list[Reader]`, *optional*): one for each choice, to find calls of tools in its text.
    """

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, choices: int, readers: list[Reader] | None = None) -> None:
        super().__init__(model, choices)
        self._readers = readers
        self._reasoning = [""] * choices
        self._calls: list[list[ToolCall]] = [[] for _ in range(choices)]

    def take(self, news: News) -> None:
        said, reason = self._read(news)
        super().take(news._replace(text=said.content, finish_reason=reason))
        self._reasoning[news.choice] += said.reasoning

    def opening(self) -> Iterator[dict[str, Any]]:
        for choice in range(len(self._texts)):
            yield self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, None)

    def chunks(self, news: News) -> Iterator[dict[str, Any]]:
        said, reason = self._read(news)
        if said.reasoning:
            yield self._chunk(news.choice, {"delta": {"reasoning_content": said.reasoning}}, None)
        yield from super().chunks(news._replace(text=said.content, finish_reason=None))
        first = len(self._calls[news.choice]) - len(said.calls)
        for index, call in enumerate(said.calls, first):
            yield self._chunk(
                news.choice, {"delta": {"tool_calls": [{"index": index} | _in_openais_form(call)]}}, None
            )
        if reason is not None:
            yield self._chunk(news.choice, self._delta(None), reason)

    def _read(self, news: News) -> tuple[Said, str | None]:
        """What a text says, and why it is finished."""
        if self._readers is None:
            return Said(news.text), news.finish_reason
        said = self._readers[news.choice].add(news.text, last=news.finish_reason is not None)
        calls = self._calls[news.choice]
        calls += said.calls
        return said, "tool_calls" if calls and news.finish_reason == "stop" else news.finish_reason

    def _content(self, choice: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._texts[choice]}
        if self._calls[choice]:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_in_openais_form(call) for call in self._calls[choice]]
        if self._reasoning[choice]:
            message["reasoning_content"] = self._reasoning[choice]
        return {"message": message}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _in_form(self, choice: int, scored: list[ScoredToken]) -> dict[str, Any]:
        content = [
            _token(s.token, s.logprob) | {"top_logprobs": [_token(*other) for other in s.likeliest]} for s in scored
        ]
        return {"content": content, "refusal": None}


def _in_openais_form(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _token(token: Spelling, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": token.bytes}


class CompletionAnswer(_Answer):
    """Of `/v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, choices: int) -> None:
        super().__init__(model, choices)
        self._offsets = [0] * choices  # in characters, of the next token

    def _content(self, choice: int) -> dict[str, Any]:
        return {"text": self._texts[choice]}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _in_form(self, choice: int, scored: list[ScoredToken]) -> dict[str, Any]:
        offsets = list(accumulate((len(s.token.text) for s in scored), initial=self._offsets[choice]))
        self._offsets[choice] = offsets.pop()
        likeliest = [{token.text: logprob for token, logprob in s.likeliest} or None for s in scored]
        return {
            "tokens": [s.token.text for s in scored],
            "token_logprobs": [s.logprob for s in scored],
            "top_logprobs": likeliest if any(likeliest) else None,
            "text_offset": offsets,
        }

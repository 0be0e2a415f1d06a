"""One request's tokens on an asyncio loop, and what each adds to the text."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .output import AsyncGenerationOutput
from .text import AnswerText


class TokenStream:
    """An asynchronous iterator over one request's tokens, or over what they add to the text.

    Made by `manager.stream`. It belongs to one task of one loop.

    Args:
        request_id (`str`): of the request.
        cancel (`Callable`): cancels the request of an id; called from any thread.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): to yield text.
    """

    def __init__(
        self, request_id: str, cancel: Callable[[str], None], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._text = None if tokenizer is None else AnswerText(tokenizer)
        self._count = 0  # tokens taken
        self._ready: deque[int | str] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._error: str | None = None

    def take(self, output: AsyncGenerationOutput) -> None:
        """Take a result of the request, on the loop. Each has all tokens so far."""
        tokens = output.generated_since(self._count)
        self._count += len(tokens)
        if self._text is None:
            self._ready.extend(tokens)
        elif increment := self._text.add(tokens, last=output.is_finished()):
            self._ready.append(increment)
        if output.is_finished():
            self._ended, self._error = True, output.error
        self._arrived.set()

    def taker(self) -> Callable[[AsyncGenerationOutput], None]:
        """`take`, for a handler that does not keep the stream alive: one that is dropped cancels its request."""
        stream = weakref.ref(self)

        def take(output: AsyncGenerationOutput) -> None:
            if (alive := stream()) is not None:
                alive.take(output)

        return take

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> int | str:
        while not self._ready:
            if self._error is not None:
                error, self._error = self._error, None
                raise RuntimeError(error)
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Give nothing more, and cancel the request if it has not ended."""
        self._ready.clear()
        self._error = None
        if not self._ended:
            self._ended = True
            self._arrived.set()
            self._cancel(self.request_id)

    def __del__(self) -> None:
        if not self._ended:
            self._cancel(self.request_id)

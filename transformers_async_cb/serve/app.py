"""The routes."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..mailbox import QueueFull
from ..manager import AsyncBatchingManager
from ..prompts import encode
from ..settings import check_stop_strings, eos_ids
from .answers import ChatAnswer, CompletionAnswer
from .bodies import Body, Chat, Completion
from .following import Call, Following
from .tools import CallListReader, FormReader, NamedCallReader, Reader, response_template


logger = logging.get_logger(f"transformers.{__name__}")

CLIENT_GONE = 499  # nginx's; nobody reads it
RETRY_AFTER = 1  # seconds, for a client that finds the queue full


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients know it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    error = {key: value and value.encode(errors="backslashreplace").decode() for key, value in error.items()}
    return JSONResponse({"error": error}, status)  # which may quote what a client sent, half of a character too


class Refused(Exception):
    """A request that is not run, and what its client is told."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.response = error_response(status, message, param, code)


class Events(StreamingResponse):
    """Server-sent events of what a call gains. Whatever ends the response ends the call's requests."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], following: Following) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._following = following

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._following.cancel()


class Server:
    """Answers calls from one manager.

    Args:
        manager (`AsyncBatchingManager`): made with `tokenizer`; started and stopped with the app.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        name (`str`): what clients call the model.
    """

    def __init__(self, manager: AsyncBatchingManager, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.manager = manager
        self.name = name
        self.started = int(time.time())
        self._tokenizer = tokenizer
        # Texts are encoded on one thread, and the answers decoded on the event loop's: a tokenizer is for one thread.
        self._encoder = copy.deepcopy(tokenizer)
        self._response_template = response_template(tokenizer, manager.model)
        self._door = ThreadPoolExecutor(1, thread_name_prefix="async-batching-serve")
        config = manager.model.generation_config
        self._eos_ids = eos_ids(config.eos_token_id, "generation_config")
        self._stop_strings = check_stop_strings(config.stop_strings, "generation_config")
        self._top_k = config.top_k

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Within, the manager runs, and has compiled and captured what would hold up the first clients."""
        await asyncio.to_thread(self.manager.warmup)
        await asyncio.to_thread(self.manager.start)
        try:
            yield
        finally:
            self._door.shutdown()
            await asyncio.to_thread(self.manager.stop, hard_stop=True)

    def end(self) -> None:
        """Fail the requests that are not finished, and take no more. Does not wait for that."""
        self.manager.stop(block=False, hard_stop=True)

    # ------------------------------------------------------------------------------------------------ calls

    async def answer(self, request: Request, body: Body) -> Response:
        """Run a call and send its answer, whole or in events."""
        if body.model != self.name:
            raise self.unknown_model(body.model)
        try:
            added = await asyncio.get_running_loop().run_in_executor(self._door, self._add, body)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        except ImportError as error:  # what a field needs
            raise Refused(501, str(error)) from error
        except QueueFull as error:
            refusal = Refused(429, f"The server is overloaded: {error}.", code="queue_full")
            refusal.response.headers["retry-after"] = str(RETRY_AFTER)
            raise refusal from error
        except RuntimeError as error:
            raise Refused(503, str(error)) from error
        following, answer, request_ids = added
        following.begin(request_ids)
        if body.stream:
            return Events(self._events(following, answer, body.include_usage), following)
        return await self._whole(request, following, answer)

    def unknown_model(self, name: str) -> Refused:
        return Refused(404, f"The model {name!r} does not exist, this is {self.name!r}.", "model", "model_not_found")

    def describe(self) -> dict[str, Any]:
        """The model, as `/v1/models` lists it."""
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "transformers-async-cb"}

    def metrics(self, accept: str) -> Response:
        """The engine's, for Prometheus, in one of the forms that a client accepts."""
        try:
            from ..prometheus import ManagerCollector
        except ImportError as error:
            raise Refused(501, str(error)) from error
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        registry = CollectorRegistry()
        registry.register(ManagerCollector(self.manager))
        encoder, content_type = choose_encoder(accept)
        return Response(encoder(registry), headers={"content-type": content_type})

    def _add(self, body: Body) -> tuple[Following, ChatAnswer | CompletionAnswer, list[str]]:
        if isinstance(body, Chat):
            prompts = [self._chat(body)]
            answer = ChatAnswer(self.name, body.n, self._readers(body, prompts[0]))
        else:
            prompts = [encode("prompt", prompt, self._encoder) for prompt in body.prompts]
            answer = CompletionAnswer(self.name, body.n * len(prompts))
        following = Following(self.manager, self._tokenizer, self._call(body, prompts))
        return following, answer, following.add()

    def _chat(self, body: Chat) -> list[int]:
        """The prompt of a chat."""
        if body.offers_tools and "tools" not in self._encoder.get_chat_template(tools=[]):
            raise Refused(400, "The model's chat template does not take tools.", "tools")
        messages = [message.for_template() for message in body.messages]
        return encode("messages", messages, self._encoder, **body.template_settings)

    def _readers(self, body: Chat, prompt: list[int]) -> list[Reader] | None:
        """What finds the calls of tools in each choice."""
        if not body.offers_tools:
            return None
        if body.called_function is not None:
            return [NamedCallReader(body.called_function) for _ in range(body.n)]
        if body.must_call:
            return [CallListReader() for _ in range(body.n)]
        if self._response_template is None:
            raise Refused(
                400,
                "It is not known how this model writes calls of tools: its tokenizer has no response_template, and "
                "transformers has none for models of its type. Give the server one (--response-template), or have "
                "the model call a tool in any case (tool_choice 'required', or the name of one).",
                "tools",
            )
        before, tools = self._encoder.decode(prompt), body.template_settings["tools"]
        parsers = (
            self._encoder.get_response_parser(self._response_template, prefix=before, tools=tools)
            for _ in range(body.n)
        )
        return [FormReader(parser, parallel=body.parallel_tool_calls is not False) for parser in parsers]

    def _call(self, body: Body, prompts: list[list[int]]) -> Call:
        longest, context = max(map(len, prompts)), self.manager.longest_sequence
        limit = body.limit if body.limit is not None else max(1, context - longest)
        if longest + limit > context:
            raise Refused(
                400,
                f"This model's maximum context length is {context} tokens. However, you requested {longest + limit} "
                f"tokens ({longest} in the prompt, {limit} in the completion).",
                "messages" if isinstance(body, Chat) else "prompt",
                "context_length_exceeded",
            )
        return Call(
            prompts,
            body.n,
            limit,
            () if body.ignore_eos else self._eos_ids,
            self._stop_strings if body.stop is None else tuple(body.stop_strings),
            body.settings(self._top_k),
            body.stream,
            self._texts(body, prompts) if isinstance(body, Completion) and body.echo else None,
            isinstance(body, Chat) and body.offers_tools and not body.must_call,
        )

    def _texts(self, body: Completion, prompts: list[list[int]]) -> list[str]:
        return [
            prompt if isinstance(prompt, str) else self._encoder.decode(ids)
            for prompt, ids in zip(body.prompts, prompts, strict=True)
        ]

    async def _whole(self, request: Request, following: Following, answer: ChatAnswer | CompletionAnswer) -> Response:
        collecting = asyncio.ensure_future(self._collect(following, answer))
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            return collecting.result() if collecting.done() else Response(status_code=CLIENT_GONE)
        finally:
            following.cancel()
            collecting.cancel()
            leaving.cancel()

    @staticmethod
    async def _collect(following: Following, answer: ChatAnswer | CompletionAnswer) -> JSONResponse:
        async for news in following.news():
            if news.error is not None:
                raise Refused(500, news.error)
            answer.take(news)
        return JSONResponse(answer.whole(following.usage))

    @staticmethod
    async def _events(
        following: Following, answer: ChatAnswer | CompletionAnswer, include_usage: bool
    ) -> AsyncIterator[str]:
        for chunk in answer.opening():
            yield _event(chunk)
        async for news in following.news():
            if news.error is not None:
                yield _event(json.loads(error_response(500, news.error).body))
                return
            for chunk in answer.chunks(news):
                yield _event(chunk)
        if include_usage:
            yield _event(answer.closing(following.usage))
        yield "data: [DONE]\n\n"


async def _gone(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def create_app(server: Server) -> FastAPI:
    """The app that serves the routes from `server`."""
    app = FastAPI(title="transformers-async-cb", lifespan=server.running)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: Chat) -> Response:
        return await server.answer(request, body)

    @app.post("/v1/completions")
    async def completion(request: Request, body: Completion) -> Response:
        return await server.answer(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise server.unknown_model(name)
        return server.describe()

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        return server.metrics(request.headers.get("accept", ""))

    @app.get("/health")
    async def health() -> JSONResponse:
        if server.manager.is_running():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unhealthy", "reason": str(server.manager.fatal_error)}, 503)

    @app.exception_handler(Refused)
    async def refused(_: Request, refusal: Refused) -> JSONResponse:
        return refusal.response

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(400, *_what_is_wrong(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, error.detail)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"{type(error).__name__}: {error}")

    return app


def _what_is_wrong(errors: Sequence[dict[str, Any]]) -> tuple[str, str | None]:
    """A message, and the field it is about."""
    field = errors[0]["loc"][:2]
    # Where a field may be one of several types, each complains: the one that fits furthest is what was meant.
    error = max((one for one in errors if one["loc"][:2] == field), key=lambda one: len(one["loc"]))
    if isinstance(error.get("input"), bytes):
        return "The body is read as JSON, which its content-type must say: application/json.", None
    if error["type"] == "json_invalid":
        return f"The body is not valid JSON: {error['ctx']['error']}.", None
    param = ".".join(str(part) for part in error["loc"][1:]) or None
    if error["type"] == "extra_forbidden":
        return f"{param} is not known to this server, or not supported.", param
    reason = error["msg"].removeprefix("Value error, ")
    return f"{param or 'The body'}: {reason}, got {str(error.get('input'))[:100]}.", param

"""`transformers serve --continuous-batching` on this engine.

`use_this_engine()` switches this process over; or, in place of `transformers serve ...`,

    python -m transformers_async_cb.serve.in_transformers MODEL --continuous-batching ...

The server stays transformers' own, and so does what it makes of a request's fields. It hands its manager a generation
config with each request, of which that manager uses the limit and the EOS, and of the first the sampling settings for
all. Here each request is generated with its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from ..manager import AsyncBatchingManager


# What their class is called with, on all versions that were looked at (5.17 to 5.23).
_CALLED_WITH = {
    "init_cb": ["model", "gen_config"],
    "generate_streaming": ["model", "processor", "inputs", "gen_config", "request_id"],
    "generate_non_streaming": ["model", "processor", "inputs", "gen_config", "request_id"],
}


def use_this_engine() -> None:
    """Have `transformers serve --continuous-batching`, started in this process from now on, run on this engine.

    Raises:
        RuntimeError: this version of transformers serves in another way.
    """
    from transformers.cli.serving import utils

    theirs = getattr(utils, "CBGenerateManager", None)
    if theirs is not None and hasattr(theirs, "on_this_engine"):
        return
    for name, parameters in _CALLED_WITH.items():
        method = getattr(theirs, name, None)
        if method is None or list(inspect.signature(method).parameters)[1 : 1 + len(parameters)] != parameters:
            raise RuntimeError("this version of transformers serves in a way that transformers_async_cb does not know")
    utils.CBGenerateManager = _on_this_engine(theirs)


def _on_this_engine(theirs: type) -> type:
    class GenerateManager(theirs):
        """Theirs, with a manager of ours."""

        on_this_engine = True

        def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
            """The manager is made with the first request, which brings the tokenizer."""

        def generate_streaming(
            self, model: PreTrainedModel, processor: Any, inputs: dict, gen_config: GenerationConfig, request_id: str,
            **settings: Any,
        ) -> Any:  # fmt: skip
            self._expect(model, processor, gen_config, request_id)
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, **settings)

        async def generate_non_streaming(
            self, model: PreTrainedModel, processor: Any, inputs: dict, gen_config: GenerationConfig, request_id: str,
            **settings: Any,
        ) -> Any:  # fmt: skip
            self._expect(model, processor, gen_config, request_id)
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id, **settings)

        def _expect(
            self, model: PreTrainedModel, processor: Any, gen_config: GenerationConfig, request_id: str
        ) -> None:
            if self._cb is None:
                manager = model.init_continuous_batching(
                    continuous_batching_config=self._cb_config,
                    tokenizer=getattr(processor, "tokenizer", processor),
                    async_batching=True,
                )
                manager.start()
                self._cb = ServedManager(manager)
            self._cb.expect(request_id, gen_config)

    return GenerateManager


class ServedManager:
    """What their server asks of a manager, answered by ours with each request's own config."""

    def __init__(self, manager: AsyncBatchingManager) -> None:
        self._manager = manager
        self._expected: dict[str, GenerationConfig] = {}
        self._early: dict[str, Callable[[GenerationOutput], None]] = {}  # handlers of requests not yet added

    @property
    def background_thread_status(self) -> SimpleNamespace:
        return SimpleNamespace(fatal_error=self._manager.fatal_error)

    def expect(self, request_id: str, config: GenerationConfig) -> None:
        """The config of a request that is about to be added."""
        self._expected[request_id] = config

    def add_request(self, input_ids: list[int], request_id: str, **settings: Any) -> str:
        """Raises fastapi's `HTTPException` for a request that is not valid, which makes a 400 of it."""
        from fastapi import HTTPException

        handler, config = self._early.pop(request_id, None), self._expected.pop(request_id)
        try:
            self._manager.add_request(input_ids, request_id=request_id, generation_config=config, **settings)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        if handler is not None:
            self._manager.register_result_handler(request_id, handler)
        return request_id

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        if request_id in self._expected:
            self._early[request_id] = callback
        else:
            self._manager.register_result_handler(request_id, callback)

    def cancel_request(self, request_id: str) -> None:
        self._manager.cancel_request(request_id)

    def stop(self, block: bool = True, timeout: float | None = None) -> None:
        """Their server goes, or goes on with another model: what is not finished fails."""
        self._manager.stop(block, timeout, hard_stop=True)


if __name__ == "__main__":
    from transformers.cli.transformers import main

    from transformers_async_cb.serve import in_transformers

    in_transformers.use_this_engine()
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    main()

"""How layers are compiled, and how early the kernels start that come out of it."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch._inductor.config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from transformers.utils import logging

from .gpu import starts_early


logger = logging.get_logger(f"transformers.{__name__}")

# Graphs that torch may keep for one piece of code. All models of a process share the code that calls their layers, so
# its own limit of 8 would stop the ninth.
_MOST_GRAPHS = 256


@contextmanager
def compiling(device: torch.device) -> Generator[None]:
    """Settings for what is compiled within, on this thread."""
    with ExitStack() as settings:
        settings.enter_context(torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS))
        if device.type == "cuda" and hasattr(torch._inductor.config, "combo_kernels"):
            # What has to be done to queries and to keys becomes one kernel: 2 to 4 % more tokens of 0.6B on an H100.
            settings.enter_context(torch._inductor.config.patch(combo_kernels=True))
        if starts_early(device):
            settings.enter_context(torch._inductor.config.patch({"triton.enable_pdl": True}))
            if _lets_the_next_start():
                settings.enter_context(_first_of_all())
        yield


def get_ready() -> None:
    """Have torch load its compiler and start the processes that compile kernels, on a thread of its own: by itself it
    would do so when the first kernels wait for that."""
    threading.Thread(target=_load, name="loads the compiler", daemon=True).start()


@functools.cache
def _load() -> None:
    with suppress(Exception):  # then torch does it later, in its own way
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.use_process_pool()
        importlib.import_module("torch._inductor.compile_fx")


class _Thread(threading.local):
    first_of_all = False


_thread = _Thread()


class _Mark(CustomGraphPass):
    """Changes no graph. It is part of the key under which torch keeps what it has compiled: kernels made here are
    nobody else's."""

    def __call__(self, graph: fx.graph.Graph) -> None:
        pass

    def uuid(self) -> Any:
        return "transformers_async_cb: lets the next start, then waits"


@contextmanager
def _first_of_all() -> Generator[None]:
    """Within, kernels that Inductor makes on this thread begin by letting the next one start, then wait for all before
    them. By itself it lets the next one start after the last of its loads, when there is little left to wait for:
    too late for a product to fetch its first weights meanwhile.

    In turn, no kernel may read what another of the same step wrote before it has waited itself, and a kernel made so
    may only be followed by such: Inductor's own read ahead what is older than the kernel just before them.
    """
    with torch._inductor.config.patch(post_grad_custom_post_pass=_Mark()):
        _thread.first_of_all = True
        try:
            yield
        finally:
            _thread.first_of_all = False


def _lets_the_next_start() -> bool:
    """Whether Inductor can be told so: by a method of its own that orders these calls in a kernel's code."""
    from torch._inductor.codegen.triton import TritonKernel

    theirs: Callable | None = getattr(TritonKernel, "_filter_pdl", None)
    if theirs is None or torch._inductor.config.post_grad_custom_post_pass is not None:
        logger.info_once(
            "kernels start a little later: this torch, or a pass of the user's, does not let us change that"
        )
        return False
    if getattr(theirs, "ours", False):
        return True

    def filter_pdl(self: TritonKernel, code: Any) -> None:
        theirs(self, code)
        if _thread.first_of_all and self._enable_pdl_codegen():
            code._lines = [*_FIRST_LINES, *(line for line in code._lines if not _is_first_line(line))]

    filter_pdl.ours = True
    TritonKernel._filter_pdl = filter_pdl
    return True


_FIRST_LINES = ("tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()")


def _is_first_line(line: Any) -> bool:
    return isinstance(line, str) and line.strip() in _FIRST_LINES

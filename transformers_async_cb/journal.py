"""The results of a run in a folder, so that a run that was killed goes on where it ended."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from .grammars import Constraint
from .json_lines import JsonLines
from .logits import Processors
from .logprobs import PromptScores
from .model_inputs import ModelInputs
from .request import Request
from .stop_strings import StopStrings


# What a request's result does not depend on, or what becomes of it: all other fields of `Request` make the run.
_NOT_THE_RUN = {
    "prompt_length", "arrival", "priority", "deadline", "page_keys", "created_time", "status", "error", "started_time",
    "finished_time", "logprobs", "timestamps", "streaming", "streamed", "family",
}  # fmt: skip


class Journal:
    """The finished requests of one run, a line of JSON each, in `results.jsonl` of a folder.

    A line is written when its request finishes. The first line holds the seed, and digests of what the run was asked
    for and of the model's weights. Requests that failed are not recorded, and so tried again.

    Args:
        folder (`str`): made if it is not there. One process at a time may have it.

    Raises:
        ValueError: the folder is no path, or the file holds something else.
        RuntimeError: another process has the folder.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ValueError(f"resume={folder!r} must be the path of a folder")
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = path = self._folder / "results.jsonl"
        self._lines = JsonLines(path, self._folder / "lock")
        with ExitStack() as undo:
            undo.callback(self.close)
            header, *self._found = list(self._lines.read()) or [None]
            if header is not None and not _is_header(header):
                raise ValueError(f"{path} is not the journal of a run: give a folder of its own")
            undo.pop_all()
        self._header: dict[str, Any] | None = header
        self.finished: dict[str, GenerationOutput] = {}  # by request id

    @property
    def seed(self) -> int | None:
        """The run's, `None` if it is new."""
        return None if self._header is None else self._header["seed"]

    def begin(self, requests: list[Request], seed: int, weights: tuple, return_logprobs: bool) -> list[Request]:
        """Begin this run, or go on with it; returns the requests that are not finished.

        Args:
            requests (`list[Request]`): all of the run, checked.
            seed (`int`): from which theirs are derived.
            weights (`tuple`): a digest of the model's.
            return_logprobs (`bool`): whether results have the log-probabilities that transformers' setting asks for.

        Raises:
            ValueError: the folder has another run; the message says what differs.
        """
        run = {"model": _digest([repr(weights)]), "return_logprobs": _digest([repr(bool(return_logprobs))])}
        for field in dataclasses.fields(Request):
            if field.name not in _NOT_THE_RUN:
                name = {"tokens": "prompts", "id": "request ids"}.get(field.name, field.name)
                run[name] = _digest(_spell(getattr(request, field.name)) for request in requests)
        if self._header is None:
            self._lines.write({"run": run, "seed": seed})
            self._lines.synchronise()
        elif different := [name for name in run if run[name] != self._header["run"].get(name)]:
            if "request ids" in different:  # of which there are as many as digests are made of
                different = ["prompts, or another number of them"]
            raise ValueError(
                f"resume={str(self._folder)!r} has the results of another run, with other {', '.join(different)}: "
                "give this run a folder of its own"
            )
        by_id = {request.id: request for request in requests}
        for number, line in enumerate(self._found, 2):
            try:
                request = by_id[line.pop("request_id")]
                self.finished[request.id] = dataclasses.replace(request.output(), **_from_plain(line))
            except (AttributeError, LookupError, TypeError, ValueError):
                raise ValueError(f"{self._path}, line {number}, is not a result of this run") from None
        return [request for request in requests if request.id not in self.finished]

    def add(self, output: GenerationOutput) -> None:
        """Record a result."""
        if output.error is not None:
            return
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        del values["prompt_ids"]
        self._lines.write(_to_plain(values))

    def close(self) -> None:
        self._lines.close()


def _is_header(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("run"), dict) and isinstance(line.get("seed"), int)


def _to_plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"dtype": value.dtype.str, "values": value.tolist()} if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def _from_plain(line: dict[str, Any]) -> dict[str, Any]:
    values = {
        name: np.array(value["values"], value["dtype"]) if isinstance(value, dict) else value
        for name, value in line.items()
    }
    return values | {"status": RequestStatus(line["status"]), "lifespan": tuple(line["lifespan"])}


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _spell(value: Any) -> str | bytes:
    """A setting of a request, the same in every process."""
    if isinstance(value, np.ndarray):
        return repr(value.shape).encode() + value.tobytes()
    if isinstance(value, PromptScores):  # of which nothing is there yet
        return repr(value.words.shape)
    if value is None or isinstance(value, (bool, int, float, str, StopStrings, Constraint, Processors, ModelInputs)):
        return repr(value)
    if isinstance(value, tuple):
        return repr([_spell(part) for part in value])
    named = value if isinstance(value, Callable) and hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"

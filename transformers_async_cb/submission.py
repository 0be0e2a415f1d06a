"""From what a call gives to requests that wait for the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .door import Door
from .grammars import STRUCTURES
from .mailbox import Mailbox, QueueFull
from .prompts import Prompt
from .request import Request


class Submission:
    """Has the requests of a call checked at the door, and posts them: all of them, or none if one is not valid.

    Checks of several threads take turns. What may take long, grammars and the wait for room, holds nobody else up.
    Cancelling waits for no turn: a stream that is collected does so on whatever thread that happens, the loop's too,
    which may hold the mailbox.

    Args:
        door (`Door`): checks them, and knows those that are live.
        mailbox (`Mailbox`): where they are posted.
    """

    def __init__(self, door: Door, mailbox: Mailbox) -> None:
        self._door = door
        self._mailbox = mailbox
        self._lock = threading.RLock()  # of the door

    def add(
        self,
        inputs: Sequence[Prompt],
        request_ids: list[str] | None,
        settings: dict[str, Any],
        request_settings: Sequence[Mapping[str, Any]] | None,
        may_wait: bool,
    ) -> list[str]:
        """Add the requests of a call, which wait for room in the queue if they `may_wait`; returns their ids.

        Raises:
            ValueError: one is not valid.
            RuntimeError: the loop takes no more requests.
            QueueFull: there is no room, and they may not wait for it.
        """
        self._compile(settings, request_settings)
        with self._lock:
            request_ids, requests = self._check(inputs, request_ids, settings, request_settings)
            with self._mailbox.lock:  # the loop ends none before it is let in
                at_once = self._mailbox.has_room(len(requests))
                if at_once:
                    self._mailbox.post(*requests)
                elif not may_wait:
                    self._mailbox.check_open()
                    raise QueueFull(
                        f"the queue has no room for {len(requests)} more requests "
                        f"(max_queue_size={self._mailbox.bound}), and these may not wait for it"
                    )
                self._door.let_in(requests)
        if not at_once:
            self._post_in_turn(requests)
        return request_ids

    def add_chosen(
        self,
        inputs: Sequence[Prompt],
        request_ids: list[str] | None,
        settings: dict[str, Any],
        request_settings: Sequence[Mapping[str, Any]] | None,
        choose: Callable[[list[Request]], list[Request]],
    ) -> list[str]:
        """Add those that `choose` returns of a call's requests, whatever the bound of the queue; returns the ids of
        all. It is asked once all have been checked, and may raise."""
        self._compile(settings, request_settings)
        with self._lock:
            _, requests = self._check(inputs, request_ids, settings, request_settings)
            chosen = choose(requests)
            with self._mailbox.lock:
                self._mailbox.post(*chosen)
                self._door.let_in(chosen)
        return [request.id for request in requests]

    def sequence_ids(self, request_ids: list[str]) -> list[str]:
        """Those ids, each followed by those of its other sequences, as far as they have not ended."""
        with self._lock:
            return [request.id for request_id in request_ids for request in self._door.sequences(request_id)]

    def cancel(self, request_id: str) -> None:
        """Have the sequences of that request, or the one sequence of that id, ended."""
        for request in self._door.sequences(request_id):
            self._mailbox.cancel(request)

    def cancel_sequences(self, sequence_ids: Iterable[str]) -> None:
        """Have the sequences of those ids ended, each alone."""
        for request in map(self._door.live.get, sequence_ids):
            if request is not None:
                self._mailbox.cancel(request)

    def _compile(self, settings: dict[str, Any], request_settings: Sequence[Mapping[str, Any]] | None) -> None:
        """Compile what answers must be without holding the lock; `_check` says what is wrong with it."""
        self._door.compile(**{name: settings.get(name) for name in STRUCTURES})
        for own in request_settings or ():
            if isinstance(own, Mapping):
                self._door.compile(**{name: own.get(name) for name in STRUCTURES})

    def _post_in_turn(self, requests: list[Request]) -> None:
        """Post requests that have been let in as the queue has room. Those that find it closed are let out again, or
        have got their result from who closed it."""
        posted = 0
        try:
            for request in requests:
                self._mailbox.post_in_turn(request)
                posted += 1
        except BaseException:
            with self._mailbox.lock:
                late = [request for request in requests[posted:] if request.finished_time < 0]
                self._door.let_out(request.id for request in late)
            if late:
                raise

    def _check(
        self,
        inputs: Sequence[Prompt],
        request_ids: list[str] | None,
        settings: dict[str, Any],
        request_settings: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[list[str], list[Request]]:
        """The ids of `inputs` and their requests, each with settings of its own. Called with the lock held; see
        `Door.check`."""
        request_ids = request_ids or self._door.names(len(inputs))
        if request_settings is None:
            return request_ids, self._door.check(request_ids, inputs, **settings)
        if len(request_settings) != len(inputs):
            raise ValueError(
                f"there are {len(request_settings)} request_settings for {len(inputs)} prompts: give one for each"
            )
        lists = {name for name in ("generation_config", *STRUCTURES) if isinstance(settings.get(name), (list, tuple))}
        for name in lists:
            if len(settings[name]) != len(inputs):
                raise ValueError(f"{name} has {len(settings[name])} entries for {len(inputs)} prompts")
        requests: list[Request] = []
        for i, (prompt, own) in enumerate(zip(inputs, request_settings, strict=True)):
            if not isinstance(own, Mapping):
                raise ValueError(f"request_settings[{i}] must be a dictionary, got {own!r}")
            merged = {name: value[i] if name in lists else value for name, value in settings.items()} | own
            request_ids[i] = merged.pop("request_id", request_ids[i])
            requests += self._door.check([request_ids[i]], [prompt], **merged)
        taken: set[str] = set()
        for number, request in enumerate(requests, requests[0].arrival if requests else 0):
            if request.id in taken:
                raise ValueError(f"request {request.id}: this id is given twice")
            taken.add(request.id)
            request.arrival = number
        return request_ids, requests

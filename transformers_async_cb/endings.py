"""What ends a request, found out when the value of a token has come."""

from __future__ import annotations

import numpy as np
import torch

from .grammars import MaskMaker
from .request import Rows


class Endings:
    """Tells of tokens that have come which requests they end, and which of those end with an error.

    Args:
        rows (`Rows`): the running requests.
        max_tokens (`int`): positions one request may use.
    """

    def __init__(self, rows: Rows, max_tokens: int) -> None:
        self._rows = rows
        self._max_tokens = max_tokens
        self._mask_maker: MaskMaker | None = None  # made when a request first needs it

    def refused(self, rows: np.ndarray, tokens: np.ndarray) -> dict[int, str]:
        """Rows whose token is none, and why: it was picked by logits that the model had no inputs for or that a
        processor of the user's did not give back, or does not go on with the row's grammar."""
        r, refused = self._rows, {}
        for i in np.flatnonzero(r.processed[rows] | r.masked[rows] | r.given[rows]):
            row = int(rows[i])
            request, error = r.request[row], None
            if request.inputs is not None and request.inputs.error is not None:
                error = f"request {request.id}: {request.inputs.error}"
            if error is None and request.processors is not None:
                error = request.processors.error_at(int(r.known[row]))
            if error is None and request.constraint is not None and not request.constraint.accept(int(tokens[i])):
                error = f"request {request.id}: its other settings ban every token that its grammar allows next"
            if error is not None:
                refused[row] = error
        return refused

    def find(
        self, rows: np.ndarray, tokens: np.ndarray, now: float, masked: bool
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Which of `rows` end with their last token, which has been appended: bool `[rows]`; and the errors of those
        that fail, by row. Where rows are `masked`, those that go on get their next masks."""
        r = self._rows
        stopped = self._stopped(rows, tokens, now)
        errors = self._ask(rows, stopped)
        if masked:
            errors |= self._renew_masks(rows, stopped)
        at_limit = ~stopped & (r.known[rows] >= r.limit[rows])
        for row in rows[at_limit].tolist():
            if (error := self._cut_short(row)) is not None:
                errors[row] = error
        return stopped | at_limit, errors

    def _stopped(self, rows: np.ndarray, tokens: np.ndarray, now: float) -> np.ndarray:
        """Which of `rows` end with their last token, whatever their limit: bool `[rows]`."""
        r = self._rows
        stopped = (r.eos[rows] == tokens[:, None]).any(1) | (now > r.time_up[rows])
        if r.texts is not None:
            for i in np.flatnonzero((r.texts.letters(tokens) & r.last_letters[rows] != 0) & ~stopped):
                row = rows[i]
                stopped[i] = r.request[row].stop_strings.end(r.tokens[row, : r.known[row]])
        return stopped

    def _ask(self, rows: np.ndarray, stopped: np.ndarray) -> dict[int, str]:
        """Ask the users' own criteria, which may set `stopped` of their rows. Returns what failed, by row."""
        r, failed = self._rows, {}
        for i in np.flatnonzero(r.asks[rows]):
            row = int(rows[i])
            request = r.request[row]
            ids = torch.from_numpy(r.tokens[row, : r.known[row]].astype(np.int64))[None]
            for criterion in request.stopping_criteria:
                try:
                    stopped[i] |= bool(criterion(ids, None))
                except Exception as error:
                    stopped[i] = True
                    name = getattr(criterion, "__name__", type(criterion).__name__)
                    failed[row] = (
                        f"request {request.id}: its stopping criterion {name} raised {type(error).__name__}: {error}"
                    )
                    break
        return failed

    def _renew_masks(self, rows: np.ndarray, stopped: np.ndarray) -> dict[int, str]:
        """Narrow down the next tokens. Sets `stopped` of rows that can have none; returns what failed, by row."""
        r, failed = self._rows, {}
        going_on = np.flatnonzero(r.masked[rows] & ~stopped & (r.known[rows] < r.limit[rows]))
        constraints = [r.request[row].constraint for row in rows[going_on].tolist()]
        if constraints:
            self._mask_maker = self._mask_maker or MaskMaker()
            self._mask_maker.renew(constraints)
        for i, constraint in zip(going_on.tolist(), constraints, strict=True):
            if constraint.ended:
                stopped[i] = True
                if not constraint.complete:
                    row = int(rows[i])
                    failed[row] = f"request {r.request[row].id}: no token of the vocabulary goes on with its grammar"
        return failed

    def _cut_short(self, row: int) -> str | None:
        """Why a row that reached its limit got fewer tokens than it asked for, if it did."""
        r, request = self._rows, self._rows.request[row]
        known = int(r.known[row])
        if known >= request.total_limit:
            return None
        return (
            f"request {request.id} reached the longest sequence there is room for, {self._max_tokens} positions, "
            f"after {known - request.prompt_length} of {request.max_new_tokens} new tokens"
        )

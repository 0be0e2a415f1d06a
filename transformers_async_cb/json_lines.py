"""A file of JSON lines that outlives its process, whatever ends that."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


SYNC_EVERY = 1.0  # seconds


class JsonLines:
    """Appends lines to a file, each at once. The file is synchronised with the disk once a second: a process that is
    killed loses nothing, a machine that goes down what came in its last second.

    Args:
        path (`Path`): the file, made if it is not there.
        lock (`Path`): a file beside it, by which one process at a time has it.

    Raises:
        RuntimeError: another process has it.
    """

    def __init__(self, path: Path, lock: Path) -> None:
        self._path = path
        self._held = ExitStack()  # the lock and the file
        try:
            self._held.enter_context(FileLock(lock, timeout=0))
        except Timeout:
            raise RuntimeError(f"{path}: another process is running there") from None
        self._file = self._held.enter_context(open(path, "ab"))  # noqa: SIM115
        self._held.callback(self.synchronise)
        self._synchronised = time.monotonic()

    def read(self) -> Iterator[Any]:
        """What the lines hold, one after another. A last one that is not whole is cut off, which comes of a kill.

        Raises:
            ValueError: a line before the last is not JSON.
        """
        whole = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if not line.endswith(b"\n"):
                        break
                    value = json.loads(line)
                except ValueError:
                    if file.read(1):
                        raise ValueError(f"{self._path}, line {number}, is not JSON") from None
                    break
                whole += len(line)
                yield value
        self._file.truncate(whole)

    def write(self, value: Any, **settings: Any) -> None:
        """Append a line; `settings` are those of `json.dumps`."""
        line = json.dumps(value, separators=(",", ":"), **settings)
        self._file.write(line.encode(errors="backslashreplace") + b"\n")  # a lone surrogate, as JSON escapes it
        self._file.flush()
        if time.monotonic() - self._synchronised > SYNC_EVERY:
            self.synchronise()

    def synchronise(self) -> None:
        """Have the disk hold all lines."""
        os.fsync(self._file.fileno())
        self._synchronised = time.monotonic()

    def close(self) -> None:
        """Leave the file to others."""
        self._held.close()

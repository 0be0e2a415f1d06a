"""A file of prompts in, a file of answers out, as they come; what was killed goes on where it ended."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.generation.continuous_batching.requests import GenerationOutput

from .json_lines import JsonLines
from .manager import AsyncBatchingManager


# Columns that hold the prompts where nothing else was said, the first of those that are there.
COLUMNS = ("prompt", "messages", "text")


class Row(NamedTuple):
    """One of the input: its number from 0 on, and what it holds or what is wrong with it."""

    index: int
    values: dict[str, Any]
    error: str | None = None


class Source:
    """The rows of a JSONL file, or of a folder that the `datasets` library reads. They are never all in memory.

    Args:
        path (`str`): the file or folder.
        split (`str`): which part of a dataset that has several.

    Raises:
        ValueError: there is no such file, or the folder holds no dataset or no such split.
    """

    def __init__(self, path: str, split: str = "train") -> None:
        self._path = Path(path)
        if self._path.is_dir():
            self._dataset = _load_dataset(path, split)
        elif self._path.is_file():
            self._dataset = None
        else:
            raise ValueError(f"{path}: there is no such file or folder")

    def __len__(self) -> int:
        if self._dataset is not None:
            return len(self._dataset)
        with open(self._path, "rb") as file:
            return sum(1 for line in file if line.strip())

    def __iter__(self) -> Iterator[Row]:
        if self._dataset is not None:
            for index, values in enumerate(self._dataset):
                yield Row(index, values)
            return
        with open(self._path, "rb") as file:
            for index, line in enumerate(line for line in file if line.strip()):
                try:
                    values = json.loads(line)
                except (RecursionError, ValueError) as error:
                    yield Row(index, {}, f"this line is not JSON: {error}")
                    continue
                if isinstance(values, dict):
                    yield Row(index, values)
                else:
                    yield Row(index, {}, f"this line holds a {type(values).__name__}, not an object with columns")

    def column(self) -> str:
        """The first of `COLUMNS` that the first row has. Raises `ValueError` if it has none."""
        names = next((list(row.values) for row in self if row.error is None), None)
        if names is None:
            raise ValueError(f"{self._path} has no row: one is a line that holds a JSON object")
        for name in COLUMNS:
            if name in names:
                return name
        raise ValueError(f"{self._path} has none of the columns {', '.join(COLUMNS)}, but {names}: say which it is")


def _load_dataset(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path} is a folder, which needs the datasets library: pip install 'transformers-async-cb[datasets]'"
        ) from error
    saved = any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json"))  # by `save_to_disk`
    dataset = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{path} has no split {split!r}, but {', '.join(dataset)}")
        dataset = dataset[split]
    return dataset


class Answers:
    """The output: a line of JSON for each row that is done, in the order in which they finish, and beside it, in
    `<file>.run`, the settings they were made with.

    Opened again with the same settings, it knows which rows are done. Each line is written when its row finishes.

    Args:
        path (`str`): the file.
        settings (`dict`): what the answers depend on, as JSON; `column` is that of the prompts.

    Raises:
        ValueError: the file was made with other settings, or by something else.
        RuntimeError: another process has the file.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self._path = Path(path)
        self._column = settings["column"]
        self._done = array("q")  # [rows]: a digest of the prompt, -1 for a row that is not done
        self.count = self.failed = 0
        self._lines = JsonLines(self._path, Path(f"{path}.lock"))
        with ExitStack() as undo:
            undo.callback(self.close)
            self._compare(json.loads(json.dumps(settings)))
            self._read()
            undo.pop_all()

    def _compare(self, settings: dict[str, Any]) -> None:
        """With those of the run that began the file; note them if this does."""
        beside = Path(f"{self._path}.run")
        if not self._path.stat().st_size:
            beside.write_text(json.dumps(settings, indent=1) + "\n")
            return
        if not beside.exists():
            raise ValueError(f"{self._path} is there already, and nothing says how it was made: choose another name")
        try:
            before = dict(json.loads(beside.read_text()))
        except (TypeError, ValueError):
            raise ValueError(f"{beside} does not say how {self._path} was made: choose another name") from None
        if different := sorted(name for name in settings.keys() | before if settings.get(name) != before.get(name)):
            changes = ", ".join(f"{name} ({before.get(name)!r}, now {settings.get(name)!r})" for name in different)
            raise ValueError(f"{self._path} was begun with other settings, {changes}: choose another name")

    def _read(self) -> None:
        for number, answer in enumerate(self._lines.read(), 1):
            try:
                self._note(answer["index"], answer["row"], "error" in answer)
            except (AttributeError, LookupError, TypeError):
                raise ValueError(f"{self._path}, line {number}, is not an answer of a run") from None

    def __contains__(self, index: int) -> bool:
        return index < len(self._done) and self._done[index] >= 0

    def check(self, rows: Iterable[Row]) -> None:
        """Raises `ValueError` if a row that is done had another prompt then."""
        for row in rows:
            if row.index in self and self._done[row.index] != self._digest(row.values):
                raise ValueError(
                    f"row {row.index} of the input is not the one that {self._path} answers: choose another name"
                )

    def _digest(self, values: dict[str, Any]) -> int:
        return zlib.crc32(json.dumps(values.get(self._column), default=str).encode())

    def _note(self, index: int, values: dict[str, Any], failed: bool) -> None:
        if index >= len(self._done):
            self._done.extend([-1] * (index + 1 - len(self._done)))
        self._done[index] = self._digest(values)
        self.count += 1
        self.failed += failed

    def write(self, row: Row, answer: dict[str, Any]) -> None:
        self._lines.write({"index": row.index, **answer, "row": row.values}, ensure_ascii=False, default=str)
        self._note(row.index, row.values, "error" in answer)

    def close(self) -> None:
        self._lines.close()


def answer_all(
    manager: AsyncBatchingManager,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Iterable[Row],
    column: str,
    answers: Answers,
    window: int,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Generate for all rows that are not done. One that is not valid, or fails, gets its error in place of an answer.

    Args:
        manager (`AsyncBatchingManager`): started; nobody else's meanwhile.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the texts of the answers, which are token ids without.
        column (`str`): of the prompts: texts, chats or lists of token ids.
        window (`int`): rows that are with the manager at a time.
        progress (`Callable`): called twice a second or so, and after each answer.

    Raises:
        RuntimeError: the engine failed. What is not done stays so.
    """
    under_way: dict[str, Row] = {}
    left = (row for row in rows if row.index not in answers)
    while True:
        for row in islice(left, window - len(under_way)):
            try:
                under_way[_add(manager, row, column)] = row
            except ValueError as error:
                answers.write(row, {"error": str(error)})
                progress()
        if not under_way:
            return
        output = manager.get_result(timeout=0.5)
        if manager.fatal_error is not None:
            raise RuntimeError(f"the engine failed: {manager.fatal_error}") from manager.fatal_error
        if output is not None:
            answers.write(under_way.pop(output.request_id), _answer(output, tokenizer))
        progress()


def _add(manager: AsyncBatchingManager, row: Row, column: str) -> str:
    """Raises `ValueError` if there is something wrong with the row."""
    if row.error is not None:
        raise ValueError(row.error)
    if column not in row.values:
        raise ValueError(f"there is no column {column!r}, but {list(row.values)}")
    return manager.add_request(row.values[column], request_id=f"row {row.index}", num_return_sequences=1)


def _answer(output: GenerationOutput, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    if output.error is not None:
        return {"error": output.error}
    counts = {"prompt_tokens": len(output.prompt_ids), "new_tokens": len(output.generated_tokens)}
    if tokenizer is None:
        return {"tokens": output.generated_tokens, **counts}
    return {"output": tokenizer.decode(output.generated_tokens, skip_special_tokens=True), **counts}

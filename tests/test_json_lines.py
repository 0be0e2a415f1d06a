"""A file of JSON lines: what was written is there, a line that a kill has torn is not, and one process has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from transformers_async_cb.json_lines import JsonLines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def opened(path: Path) -> JsonLines:
    return JsonLines(path, path.with_suffix(".lock"))


@pytest.mark.parametrize("torn", [b"", b'{"a": 3', b'{"a": 3\n', b"\x00\x00"], ids=["", "no end", "half", "zeros"])
def test_what_was_written_is_there_and_goes_on_after_a_torn_line(path: Path, torn: bytes) -> None:
    lines = opened(path)
    for value in ({"a": 1}, ["é", None]):
        lines.write(value)
    assert path.read_bytes() == b'{"a":1}\n["\\u00e9",null]\n', "a line waits to be written"
    lines.close()
    with open(path, "ab") as file:
        file.write(torn)
    lines = opened(path)
    assert list(lines.read()) == [{"a": 1}, ["é", None]]
    lines.write("é", ensure_ascii=False)
    lines.close()
    assert path.read_text() == '{"a":1}\n["\\u00e9",null]\n"é"\n'


def test_a_line_in_the_middle_that_is_no_json_is_refused_by_its_number(path: Path) -> None:
    path.write_text('{}\n{"a"\n{}\n')
    lines = opened(path)
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2, is not JSON"):
        list(lines.read())
    lines.close()


def test_one_has_the_file_at_a_time(path: Path) -> None:
    first = opened(path)
    with pytest.raises(RuntimeError, match="another process is running there"):
        opened(path)
    first.close()
    opened(path).close()


def test_half_of_a_character_comes_back_as_it_was(path: Path) -> None:
    """Escapes of JSON can say what UTF-8 cannot."""
    lines = opened(path)
    lines.write("é\ud800", ensure_ascii=False)
    assert list(lines.read()) == ["é\ud800"]
    lines.close()
    assert path.read_text() == '"é\\ud800"\n'

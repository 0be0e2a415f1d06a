"""Text comes in pieces that never change, and together are the text of all tokens up to a stop string."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from test_stop_strings import byte_fallback, byte_level, special, word_piece
from transformers import PreTrainedTokenizerBase

from transformers_async_cb.text import AnswerText


def pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: tuple[str, ...], rng: random.Random
) -> list[str]:
    """What comes out when one to three tokens come at a time."""
    text, found, at = AnswerText(tokenizer, stop), [], 0
    while at < len(tokens):
        count = rng.randint(1, 3)
        found.append(text.add(tokens[at : at + count], last=at + count >= len(tokens)))
        at += count
    return found


@pytest.mark.parametrize("kind", [byte_level, special, word_piece])
@pytest.mark.parametrize("stop", [(), ("ab", "c.", "ed\n")], ids=["", "stop strings"])
def test_pieces_are_the_text_of_all_tokens_up_to_the_first_stop_string(kind: Callable, stop: tuple[str, ...]) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        tokenizer = kind(rng)
        tokens = [rng.randrange(len(tokenizer)) for _ in range(40)]
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expected = text.rstrip("\ufffd")
        for string in stop:
            expected = expected.split(string)[0]
        assert "".join(pieces(tokenizer, tokens, stop, rng)) == expected


@pytest.mark.parametrize(
    "kind, split", [(byte_level, ["Ã", "©", "â", "Ĥ", "¬"]), (byte_fallback, ["<0xC3>", "<0xA9>"])]
)
def test_a_character_of_several_tokens_comes_whole_and_one_that_is_never_finished_not_at_all(kind, split) -> None:
    tokenizer = kind(random.Random(0))
    tokens = tokenizer.convert_tokens_to_ids(["a", *split, "b", split[0]])
    text = AnswerText(tokenizer)
    out = [text.add([token], last=i == len(tokens) - 1) for i, token in enumerate(tokens)]
    whole = "é" if kind is byte_fallback else "é€"
    assert "".join(out) == f"a{whole}b"
    assert all(piece in ("", "a", "b", *whole) for piece in out)


@pytest.mark.parametrize("first", [["a"], []], ids=["within", "at the beginning"])
def test_a_long_run_of_tokens_without_text_takes_no_space_with_it(first: list[str]) -> None:
    tokenizer = word_piece(random.Random(0))
    tokens = tokenizer.convert_tokens_to_ids([*first, *["[UNK]"] * 40, "b", "c"])
    text = AnswerText(tokenizer)
    assert "".join(text.add([token]) for token in tokens) == " ".join([*first, "b", "c"])


def test_what_may_begin_a_stop_string_is_held_until_it_is_known_not_to() -> None:
    tokenizer = byte_level(random.Random(0))
    a, b, c, d = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    text = AnswerText(tokenizer, ["abc"])
    assert [text.add([token]) for token in (d, a, b, a, b, d, a)] == ["d", "", "", "ab", "", "abd", ""]
    assert text.add([b], last=True) == "ab"
    assert not text.stopped
    text = AnswerText(tokenizer, ["abc"])
    assert [text.add([token]) for token in (d, a, b, c, d)] == ["d", "", "", "", ""]
    assert text.stopped


@pytest.mark.parametrize(
    "kind, token", [(byte_level, "©"), (byte_level, "â"), (byte_fallback, "<0xA9>"), (special, "<|end|>")]
)
def test_tokens_that_never_make_a_character_are_not_decoded_over_and_over(
    kind: Callable, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = kind(random.Random(0))
    decode, decoded = tokenizer.decode, []

    def count(tokens: list[int], **settings: bool) -> str:
        decoded.append(len(tokens))
        return decode(tokens, **settings)

    monkeypatch.setattr(tokenizer, "decode", count)
    a, none = tokenizer.convert_tokens_to_ids(["a", token])
    text = AnswerText(tokenizer)
    out = "".join(text.add([token]) for token in [a] + [none] * 300 + [a])
    assert max(decoded) < 100
    assert out.replace("\ufffd", "") == "aa"

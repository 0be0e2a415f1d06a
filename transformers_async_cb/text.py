"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or none yet

# Bytes that may lack the rest of a character: the longest has four.
_MAY_BE_FINISHED = 3

# Tokens that are kept for the rest of a character. More that are none never will be, and would be decoded each time.
_PATIENCE = 32


class AnswerText:
    """Turns tokens into text as they come. What it has given out never changes: whole characters only, and nothing
    that may yet turn out to begin a stop string. All pieces together are the text of all tokens, special ones left
    out or not, up to the first stop string or a character that the last token leaves unfinished.

    A token's text may depend on the one before it (a leading space, a part of a character). So each piece is what the
    text of the last tokens gains, taken from where characters were whole.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes the tokens.
        stop (`Sequence[str]`): the strings to end before, none empty.
        special_tokens (`bool`): whether these are part of the text.

    Attributes:
        stopped (`bool`): a stop string was found; there is no more text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), special_tokens: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._special_tokens = special_tokens
        self._tokens: list[int] = []  # from the last piece on
        self._known = ""  # text of the first of them, which is out
        self._known_tokens = 0
        self._held = ""  # text that may begin a stop string
        self.stopped = False

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that may be given out now. `last`: no more tokens follow."""
        if self.stopped:
            return ""
        overdue = len(self._tokens) - self._known_tokens > _PATIENCE
        self._tokens += tokens
        text = self._decode(self._tokens)
        unfinished = len(text) - len(text.rstrip(_UNFINISHED))
        held_back = unfinished if last else min(unfinished, _MAY_BE_FINISHED)
        new = text[len(self._known) : len(text) - held_back] if last or overdue or not unfinished else ""
        if new or overdue:
            self._held += new
            silent = not unfinished and text == self._known  # the next token's text still depends on the known ones
            self._tokens = self._tokens[: self._known_tokens] if silent else self._tokens[self._known_tokens :]
            self._known_tokens = len(self._tokens)
            known = self._decode(self._tokens)
            self._known = known[: len(known) - held_back]
        return self._until_stop(last)

    def _until_stop(self, last: bool) -> str:
        found = [at for string in self._stop if (at := self._held.find(string)) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._held) - (0 if last else max(map(self._overlap, self._stop), default=0))
        piece, self._held = self._held[:end], self._held[end:]
        return piece

    def _overlap(self, string: str) -> int:
        """How many letters at the end of the text that is held are the first ones of `string`."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=not self._special_tokens, clean_up_tokenization_spaces=False
        )

"""What is right, in plain torch, on any device: the order and the arithmetic of `generate`'s processors."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch

from .shaping import Listed, Rule, Shaping, Tables


def shape(
    logits: torch.Tensor, tables: Tables, shaped: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor
) -> None:
    for sequence in shaped[shaped >= 0].tolist():
        row, length = int(rows[sequence]), int(lengths[sequence])
        shaping = Shaping.from_words(tables.shapings[row].cpu().numpy())
        _shape(logits[sequence], shaping, tables.history[row, :length].long())


def mask(logits: torch.Tensor, masked: torch.Tensor, masks: torch.Tensor) -> None:
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    vocabulary = logits.shape[1]
    for sequence, words in zip(masked[masked >= 0].tolist(), masks, strict=False):
        allowed = (words[:, None] >> bits & 1).bool().view(-1)[:vocabulary]
        logits[sequence, : len(allowed)].masked_fill_(~allowed, -torch.inf)
        logits[sequence, len(allowed) :] = -torch.inf


def _shape(logits: torch.Tensor, shaping: Shaping, past: torch.Tensor) -> None:
    vocabulary, length = len(logits), len(past)

    def listed(rule: Rule) -> list[int]:
        return [token for of, (token,), _ in shaping.tokens if of == rule and token < vocabulary]

    _add(logits, Rule.EARLY_BIAS, shaping.tokens)
    _add_matching(logits, Rule.EARLY_BIAS, shaping.sequences, past)
    if shaping.repetition_penalty != 1:
        seen = past[past < vocabulary].unique()
        x = logits[seen].float()
        penalty = shaping.repetition_penalty
        logits[seen] = torch.where(x < 0, x * penalty, x / penalty).to(logits.dtype)
    if 0 < shaping.ngram <= length:
        windows = past.unfold(0, shaping.ngram, 1)
        again = windows[(windows[:, :-1] == past[length + 1 - shaping.ngram :]).all(1), -1]
        logits[again[again < vocabulary]] = -torch.inf
    logits[listed(Rule.BAN)] = -torch.inf
    _add_matching(logits, Rule.BAN, shaping.sequences, past)
    if length < shaping.shortest:
        logits[listed(Rule.BAN_WHILE_SHORT)] = -torch.inf
    if length == 1 and shaping.forced_first >= 0:
        logits[:] = -torch.inf
        logits[shaping.forced_first] = 0
    if length == shaping.forced_last_at:
        logits[:] = -torch.inf
        logits[listed(Rule.FORCE_LAST)] = 0
    logits[listed(Rule.SUPPRESS)] = -torch.inf
    if length == shaping.begin:
        logits[listed(Rule.SUPPRESS_FIRST)] = -torch.inf
    if shaping.frequency_penalty or shaping.presence_penalty:
        generated = past[shaping.prompt_length :]
        seen, counts = generated[generated < vocabulary].unique(return_counts=True)
        x = logits[seen].float() - shaping.frequency_penalty * counts.float()
        logits[seen] = (x - shaping.presence_penalty).to(logits.dtype)
    _add(logits, Rule.BIAS, shaping.tokens)


def _add(logits: torch.Tensor, rule: Rule, tokens: Iterable[Listed]) -> None:
    pairs = [(token, value) for of, (token,), value in tokens if of == rule and token < len(logits)]
    if pairs:
        index, values = (torch.tensor(column, device=logits.device) for column in zip(*pairs, strict=True))
        logits[index] = (logits[index].float() + values).to(logits.dtype)


def _add_matching(logits: torch.Tensor, rule: Rule, sequences: Iterable[Listed], past: torch.Tensor) -> None:
    """Add up, in float32, what is to be added to a token, then add it."""
    ours = (listed for listed in sequences if listed.rule == rule and listed.tokens[-1] < len(logits))
    ends = past.tolist()[-max((len(s.tokens) for s in sequences), default=1) :]
    for token, group in groupby(ours, key=lambda listed: listed.tokens[-1]):
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for _, (*before, _), value in group:
            if len(before) <= len(past) and before == ends[len(ends) - len(before) :]:
                total += value
        logits[token] = logits[token].float() + total

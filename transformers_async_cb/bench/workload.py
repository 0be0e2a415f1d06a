"""What is asked of every engine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Workload(NamedTuple):
    """Requests of a benchmark: lengths are drawn uniformly from the ranges, always the same ones."""

    requests: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]

    def prompts(self, vocabulary: int) -> list[list[int]]:
        random = np.random.default_rng(0)
        lengths = random.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1, self.requests)
        return [random.integers(0, vocabulary, n).tolist() for n in lengths]

    def limits(self) -> list[int]:
        random = np.random.default_rng(1)
        return random.integers(self.new_tokens[0], self.new_tokens[1] + 1, self.requests).tolist()

    def __str__(self) -> str:
        prompt, new = (f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in (self.prompt_tokens, self.new_tokens))
        return f"{self.requests:,} requests, {prompt} prompt tokens, {new} new tokens"


WORKLOADS = {
    "small": Workload(16, (8, 64), (32, 32)),
    "blog": Workload(32, (32, 32), (1024, 1024)),
    "post": Workload(32, (32, 32), (8192, 8192)),
    "mixed": Workload(512, (64, 1024), (32, 512)),
    "wide": Workload(256, (128, 128), (256, 256)),
    "small-mixed": Workload(1024, (64, 512), (16, 256)),
}

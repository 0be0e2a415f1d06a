"""Answers for all rows of a dataset, in one call.

    python examples/bulk.py
    python examples/bulk.py --model Qwen/Qwen3-0.6B --dataset my_questions.jsonl --column question --timeline run.png

By default the model is tiny and random, and the prompts are made on the spot: nothing is downloaded. For files too
large for memory, and to go on after a kill, there is `transformers-async-cb run`.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import GenerationConfig

from transformers_async_cb import AsyncBatchingConfig, shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a folder or a hub name; a tiny random model by default")
    parser.add_argument("--dataset", help="a JSONL file; sums made on the spot by default")
    parser.add_argument("--column", default="prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument(
        "--timeline", help="a picture of what the CPU and the GPU did (.png, .svg), or a trace (.json)"
    )
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    model = shapes.load(arguments.model, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    tokenizer = shapes.load_tokenizer(arguments.model)
    if arguments.dataset is None:
        rows = [{arguments.column: f"{a} + {b} ="} for a in range(8) for b in range(4)]
    else:
        with open(arguments.dataset) as file:
            rows = [json.loads(line) for line in file]

    outputs = model.generate_batch(
        [row[arguments.column] for row in rows],
        generation_config=GenerationConfig(max_new_tokens=arguments.new_tokens, do_sample=False),
        tokenizer=tokenizer,
        progress_bar=True,
        async_batching=AsyncBatchingConfig(timeline=arguments.timeline),
    )
    for row, output in zip(rows, outputs.values(), strict=True):
        text = tokenizer.decode(output.generated_tokens, skip_special_tokens=True)
        print(json.dumps(row | {"output": text, "error": output.error}, ensure_ascii=False))


if __name__ == "__main__":
    main()

"""Several chats at once, streamed with asyncio: each answer is printed as its tokens come.

    python examples/chat.py
    python examples/chat.py --model Qwen/Qwen3-0.6B "What is a page table?" "Why is the sky blue?"

By default the model is tiny and random: nothing is downloaded, and the answers mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from transformers_async_cb import shapes
from transformers_async_cb.manager import AsyncBatchingManager


async def answer(
    manager: AsyncBatchingManager, tokenizer: PreTrainedTokenizerBase, question: str
) -> AsyncIterator[str]:
    """The text of the answer so far, each time a token has come. Raises `RuntimeError` if the request fails."""
    request_id = manager.add_request([{"role": "user", "content": question}], streaming=True)
    outputs: asyncio.Queue = asyncio.Queue()
    manager.register_result_handler(request_id, outputs.put_nowait)
    while True:
        output = await outputs.get()
        if output.error is not None:
            raise RuntimeError(output.error)
        yield tokenizer.decode(output.generated_tokens, skip_special_tokens=True)
        if output.is_finished():
            return


async def chat(manager: AsyncBatchingManager, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> None:
    """Ask all questions at once. Lines of several answers come between one another, each begins with its number."""

    async def show(number: int, question: str) -> None:
        text = ""
        async for text in answer(manager, tokenizer, question):
            print(f"{number}: {text!r}", flush=True)
        print(f"{number}: done, {len(text)} characters for {question!r}")

    await asyncio.gather(*(show(number, question) for number, question in enumerate(questions)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", default=["Who are you?", "What is a page table?", "And now?"])
    parser.add_argument("--model", default="tiny", help="a folder or a hub name; a tiny random model by default")
    parser.add_argument("--new-tokens", type=int, default=12)
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    model = shapes.load(arguments.model, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    tokenizer = shapes.load_tokenizer(arguments.model)
    config = GenerationConfig(max_new_tokens=arguments.new_tokens)
    with model.continuous_batching_context_manager(config, async_batching=True, tokenizer=tokenizer) as manager:
        asyncio.run(chat(manager, tokenizer, arguments.questions))


if __name__ == "__main__":
    main()

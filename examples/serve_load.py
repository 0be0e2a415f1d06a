"""The same client load on servers side by side: output tokens a second, and how long the first token takes.

python examples/serve_load.py --shape qwen3-0.6b --requests 256 --prompt-tokens 128 --new-tokens 256

Builds a model of that shape with random weights and a tokenizer with a word for each token, starts one server after
another, and sends all requests at once, streaming, from a few processes: once to warm up, then to measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_async_cb import shapes


SERVERS = {
    "ours": ["transformers_async_cb", "serve"],
    "transformers, our engine": ["transformers_async_cb.serve.in_transformers", "--continuous-batching"],
    "transformers": ["transformers.cli.transformers", "serve", "--continuous-batching"],
}


class Load(NamedTuple):
    model: str
    requests: int
    prompt_tokens: int
    new_tokens: int


class Answer(NamedTuple):
    first: float  # seconds from the request to the first text
    tokens: int


async def ask(url: str, load: Load, number: int) -> Answer:
    """One streamed completion. The client is as simple as can be: it should not be what is measured."""
    words = random.Random(number)
    body = json.dumps(
        {
            "model": load.model,
            "prompt": " ".join(f"w{words.randrange(1000)}" for _ in range(load.prompt_tokens)),
            "max_tokens": load.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    where = urlsplit(url)
    begin, first, tokens = time.perf_counter(), None, None
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()[-500:]}")
    async for line in reader:
        if not line.startswith(b"data: {") or (first is not None and b'"usage":{' not in line):
            continue
        event = json.loads(line[6:])
        if first is None and any(choice.get("text") for choice in event["choices"]):
            first = time.perf_counter() - begin
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    writer.close()
    if first is None or tokens is None:
        raise RuntimeError("the stream ended early")
    return Answer(first, tokens)


def ask_some(url: str, load: Load, numbers: range) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*(ask(url, load, number) for number in numbers))

    return asyncio.run(all_of_them())


def measure(pool: multiprocessing.pool.Pool, processes: int, url: str, load: Load) -> dict[str, float]:
    """Send the load, and wait for all of it."""
    shares = [(url, load, range(i, load.requests, processes)) for i in range(processes)]
    begin = time.perf_counter()
    answers = [answer for share in pool.starmap(ask_some, shares, chunksize=1) for answer in share]
    seconds = time.perf_counter() - begin
    firsts = sorted(answer.first for answer in answers)
    return {
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "seconds": seconds,
        "first_median": statistics.median(firsts),
        "first_95": firsts[int(0.95 * (len(firsts) - 1))],
    }


@contextmanager
def served(server: str, folder: str, port: int, device: str, patience: float) -> Iterator[str]:
    """Start a server, and stop it."""
    module, *arguments = SERVERS[server]
    command = [sys.executable, "-m", module, *arguments, folder, "--port", str(port), "--device", device]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log)
        try:
            end = time.monotonic() + patience
            while not answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{server} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def build(shape: str, folder: str, device: str) -> None:
    """Save a model of that shape, and a tokenizer that has a word for each token."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = shapes.load(shape, device, dtype)
    model.save_pretrained(folder)
    size = model.get_input_embeddings().num_embeddings
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=shapes.SHAPES)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2, help="measured runs, after one that is not (default: 2)")
    parser.add_argument("--processes", type=int, default=4, help="of the client (default: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument(
        "--patience", type=float, default=300, help="seconds a server may take to start (default: 300)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    options = parser.parse_args()

    table = Table(
        title=f"{options.requests} requests at once, {options.prompt_tokens} + {options.new_tokens} tokens, "
        f"{options.shape} on {options.device}"
    )
    for heading in ("server", "tokens/s", "seconds", "first token, median ms", "95 % ms"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        build(options.shape, folder, options.device)
        load = Load(folder, options.requests, options.prompt_tokens, options.new_tokens)
        for server in options.servers:
            with served(server, folder, options.port, options.device, options.patience) as url:
                runs = [measure(pool, options.processes, url, load) for _ in range(1 + options.repeats)]
            results[server] = runs[1:] or runs
            median = {key: statistics.median(run[key] for run in results[server]) for key in runs[0]}
            table.add_row(
                server, f"{median['tokens_per_second']:,.0f}", f"{median['seconds']:.2f}",
                f"{1000 * median['first_median']:,.0f}", f"{1000 * median['first_95']:,.0f}",
            )  # fmt: skip
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(results, file, indent=1)
    Console().print(table)


if __name__ == "__main__":
    main()

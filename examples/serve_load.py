"""The same client load on servers side by side: tokens a second, how long the first token takes, and the others.

python examples/serve_load.py --shape qwen3-0.6b --requests 256 --prompt-tokens 128 --new-tokens 256

Builds a model of that shape with random weights and a tokenizer with a word for each token, starts one server after
another, and sends all requests at once, streaming, from a few processes: for a few tokens to warm up, then to measure.
A server that is not done when its time is over is measured by what it has sent until then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
WARM_UP_TOKENS = 16


class Load(NamedTuple):
    model: str
    requests: int
    prompt_tokens: int
    new_tokens: int


@dataclass
class Answer:
    """What came for one request."""

    sent: float  # by `time.monotonic`, as all times
    arrivals: list[float] = field(default_factory=list)  # of texts
    tokens: int = 0
    finished: bool = False

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def ask(url: str, load: Load, number: int, deadline: float) -> Answer:
    """One streamed completion, or what has come of it by the deadline."""
    answer = Answer(time.monotonic())
    try:
        await asyncio.wait_for(follow(url, load, number, answer), max(0.0, deadline - answer.sent))
        answer.finished = True
    except asyncio.TimeoutError:
        pass
    return answer


async def follow(url: str, load: Load, number: int, answer: Answer) -> None:
    """The client is as simple as can be: it should not be what is measured."""
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
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()[-500:]}")
        usage = None
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the stream ended with an error: {event['error']}")
            if text := "".join(choice.get("text") or "" for choice in event["choices"]):
                answer.arrivals.append(time.monotonic())
                answer.tokens += text.count("w")
            usage = event.get("usage") or usage
        if usage is None or not answer.arrivals:
            raise RuntimeError("the stream ended early")
        answer.tokens = usage["completion_tokens"]
    finally:
        writer.close()


def ask_some(url: str, load: Load, numbers: range, deadline: float) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*(ask(url, load, number, deadline) for number in numbers))

    return asyncio.run(all_of_them())


def send(pool: multiprocessing.pool.Pool, processes: int, url: str, load: Load, deadline: float) -> list[Answer]:
    """Send the load, and wait for all of it or the deadline."""
    shares = [(url, load, range(i, load.requests, processes), deadline) for i in range(processes)]
    return [answer for share in pool.starmap(ask_some, shares, chunksize=1) for answer in share]


def figures(answers: list[Answer]) -> dict[str, float]:
    """Of one run of the load. Times are seconds; those between texts are tokens' where each comes alone."""
    begun = [answer for answer in answers if answer.arrivals]
    if not begun:
        raise RuntimeError("no token came in time")
    seconds = max(answer.arrivals[-1] for answer in begun) - min(answer.sent for answer in answers)
    firsts = [answer.arrivals[0] - answer.sent for answer in begun]
    gaps = [gap for answer in begun for gap in answer.gaps] or [0.0]
    return {
        "tokens_per_second": sum(answer.tokens for answer in begun) / seconds,
        "seconds": seconds,
        "first_median": statistics.median(firsts),
        "first_95": percentile(firsts, 0.95),
        "between_median": statistics.median(gaps),
        "between_95": percentile(gaps, 0.95),
        "requests": len(answers),
        "finished": sum(answer.finished for answer in answers),
    }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def measure(
    pool: multiprocessing.pool.Pool, processes: int, url: str, load: Load, repeats: int, deadline: float
) -> list[dict[str, float]]:
    """Warm up, and measure as often as there is time."""
    send(pool, processes, url, load._replace(new_tokens=min(WARM_UP_TOKENS, load.new_tokens)), deadline)
    runs = []
    while len(runs) < repeats and (not runs or time.monotonic() + runs[0]["seconds"] < deadline):
        runs.append(figures(send(pool, processes, url, load, deadline)))
    return runs


@contextmanager
def served(server: str, folder: str, port: int, device: str, deadline: float) -> Iterator[str]:
    """Start a server, and stop it. Raises `RuntimeError` with the end of its log for whatever goes wrong within."""
    module, *arguments = SERVERS[server]
    command = [sys.executable, "-m", module, *arguments, folder, "--port", str(port), "--device", device]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log, env=environment)
        try:
            while not answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("it did not start")
                time.sleep(0.2)
            yield url
        except (RuntimeError, OSError, ValueError) as error:
            log.seek(0)
            raise RuntimeError(f"{error}\n{log.read()[-1000:].decode(errors='replace')}") from error
        finally:
            process.terminate()
            try:
                process.wait(10)
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
    model = shapes.load(shape, device, torch.bfloat16 if device.startswith("cuda") else torch.float32)
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
        "--patience", type=float, default=300, help="seconds for each server, from its start (default: 300)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as well, after each server")
    options = parser.parse_args()

    results: dict[str, list[dict[str, float]] | dict[str, str]] = {}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, spawn.Pool(options.processes) as pool:
        # In a process of its own, which gives the device's memory back.
        builder = spawn.Process(target=build, args=(options.shape, folder, options.device))
        builder.start()
        builder.join()
        if builder.exitcode:
            sys.exit("the model could not be built")
        load = Load(folder, options.requests, options.prompt_tokens, options.new_tokens)
        for server in options.servers:
            deadline = time.monotonic() + options.patience
            try:
                with served(server, folder, options.port, options.device, deadline) as url:
                    results[server] = measure(pool, options.processes, url, load, options.repeats, deadline)
            except RuntimeError as error:
                results[server] = {"error": str(error)}
                print(f"{server}: {error}", file=sys.stderr)
            if options.json:
                with open(options.json, "w") as file:
                    json.dump({"options": vars(options), "results": results}, file, indent=1)
    Console(width=None if sys.stdout.isatty() else 120).print(table(options, results))
    if any(isinstance(runs, dict) for runs in results.values()):
        sys.exit(1)


def table(options: argparse.Namespace, results: dict[str, list[dict[str, float]] | dict[str, str]]) -> Table:
    """Medians of the runs."""
    shown = Table(
        title=f"{options.requests} requests at once, {options.prompt_tokens} + {options.new_tokens} tokens, "
        f"{options.shape} on {options.device}"
    )
    for heading in ("server", "tokens/s", "seconds", "first token ms", "95 %", "between ms", "95 %", "finished"):
        shown.add_column(heading, justify="left" if heading == "server" else "right")
    for server, runs in results.items():
        if isinstance(runs, dict):
            shown.add_row(server, "failed")
            continue
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        shown.add_row(
            server, f"{median['tokens_per_second']:,.0f}", f"{median['seconds']:.2f}",
            f"{1000 * median['first_median']:,.0f}", f"{1000 * median['first_95']:,.0f}",
            f"{1000 * median['between_median']:,.1f}", f"{1000 * median['between_95']:,.1f}",
            f"{median['finished']:.0f} of {median['requests']:.0f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()

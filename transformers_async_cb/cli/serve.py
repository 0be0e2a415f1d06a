"""`serve`: a model, with the routes of OpenAI's interface."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from .. import shapes
from ..config import AsyncBatchingConfig
from .arguments import DTYPES, add_device, dtype_for, loading, natural, number, positive


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("serve", help="serve a model with the routes of OpenAI's interface")
    parser.set_defaults(run=run)
    parser.add_argument("model", help=f"a folder or a hub name, with a tokenizer; or {', '.join(shapes.SHAPES)}")
    parser.add_argument("--name", help="what clients call the model (default: as given)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes any that is free (default: 8000)")
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the weights")
    parser.add_argument("--max-requests", type=positive, metavar="N", help="that run at once")
    parser.add_argument("--max-batch-tokens", type=positive, metavar="N", help="in one step")
    parser.add_argument("--memory", type=number(0, 1), metavar="SHARE", help="of the free memory, for keys and values")
    parser.add_argument(
        "--max-queue-size", type=natural, default=0, metavar="N",
        help="that wait to begin, when more are answered with 429 (default: any number)",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=number(0), default=10, metavar="SECONDS",
        help="that requests under way have to finish when the server is to stop (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--response-template", type=_json, metavar="FILE",
        help="JSON that says how the model writes calls of tools, as transformers' tokenizers have it; for models "
        "that bring none",
    )  # fmt: skip
    parser.add_argument("--no-overlap", action="store_true", help="keep one batch in flight, to compare")


def run(options: argparse.Namespace) -> None:
    """Load the model and serve it until interrupted."""
    try:
        from ..serve.app import Server
        from ..serve.listening import GracefulServer
    except ImportError as error:
        sys.exit(f"serve needs {error.name}: pip install 'transformers-async-cb[serve]'")
    with loading(options.model):
        tokenizer = shapes.load_tokenizer(options.model)
    if options.response_template is not None:
        tokenizer.response_template = options.response_template
        try:
            tokenizer.get_response_parser(prefix="")
        except ValueError as error:
            sys.exit(f"transformers-async-cb serve: --response-template is none: {error}")
    stored = options.dtype is None and options.model not in shapes.SHAPES
    dtype = "auto" if stored else getattr(torch, dtype_for(options))
    with loading(options.model):
        model = shapes.load(options.model, options.device, dtype)
    try:
        manager = model.init_continuous_batching(
            continuous_batching_config=ContinuousBatchingConfig(
                max_requests_per_batch=options.max_requests,
                max_batch_tokens=options.max_batch_tokens,
                max_memory_percent=options.memory,
                max_queue_size=options.max_queue_size,
            ),
            tokenizer=tokenizer,
            async_batching=AsyncBatchingConfig(overlap=not options.no_overlap),
        )
        manager.warmup()
    except ValueError as error:
        sys.exit(f"transformers-async-cb serve: {error}")
    server = Server(manager, tokenizer, options.name or options.model)
    try:
        GracefulServer(server, options.host, options.port, options.grace, log_level="info", access_log=False).run()
    except KeyboardInterrupt:
        pass  # which is how it ends, and raised again when it has
    finally:
        manager.stop(hard_stop=True)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 65535")
    return int(text)


def _json(file: str) -> Any:
    try:
        with open(file) as opened:
            return json.load(opened)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file} is not to be read: {error}") from error

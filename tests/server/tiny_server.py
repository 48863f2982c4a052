"""`lowlat serve` in a process of its own, with a model of random weights: python tiny_server.py FD

FD is the number of an inherited socket, bound but not listening. Prints "ready" when it serves.
"""

import argparse
import socket
from pathlib import Path
from typing import Any

import torch

from lowlat.generate.model import Model
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.http.logs import configure
from lowlat.serve.run import run
from tests.fakes import gqa_config, tiny_model
from tests.unit.serve.templates import tokenizer_of

NAME = "tiny"
CONTEXT = 2048


def make_model(context: int = CONTEXT, template: str = "hermes", **options: Any) -> Model:
    """A model that knows no language, but chats and calls tools in the form of its template."""
    tokenizer = tokenizer_of(template)
    config = gqa_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=context)
    return Model(tiny_model(config, torch.float32), tokenizer, name=NAME, **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("listener", type=int)
    parser.add_argument("--key", action="append", default=[])
    parser.add_argument("--drain-seconds", type=float, default=10.0)
    parser.add_argument("--header-seconds", type=float, default=10.0)
    parser.add_argument("--body-seconds", type=float, default=10.0)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--template", default="hermes")
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--prefix-cache-dir", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = ServeConfig(
        api_keys=tuple(given.key),
        drain_seconds=given.drain_seconds,
        header_seconds=given.header_seconds,
        body_seconds=given.body_seconds,
    )
    configure()
    engine = AsyncEngine(
        make_model(given.context, given.template, prefix_cache_dir=given.prefix_cache_dir),
        max_queue=given.max_queue,
    )
    with socket.socket(fileno=given.listener) as listener:
        run(engine, config, listener, on_ready=lambda: print("ready", flush=True))


if __name__ == "__main__":
    main()

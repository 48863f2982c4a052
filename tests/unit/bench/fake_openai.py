"""A program that speaks as much of the OpenAI API as the benchmarks of servers use.

    python fake_openai.py --host 127.0.0.1 --port N [--fault short|http|stream]

Every answer is the word "tea " as often as tokens are asked for, a chunk each. Faults: one token
too few, a 500, an error within the stream.
"""

import argparse
import asyncio
import json

READER, WRITER = asyncio.StreamReader, asyncio.StreamWriter


def chunk(text: str) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})


def event(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


async def read_request(reader: READER) -> tuple[str, bytes] | None:
    """Path and body of the next request; None at the end of the connection."""
    head = await reader.readline()
    if not head:
        return None
    length = 0
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode().partition(":")
        if name.lower() == "content-length":
            length = int(value)
    return head.decode().split()[1], await reader.readexactly(length)


def respond(writer: WRITER, status: int, body: bytes, kind: str = "application/json") -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


async def complete(writer: WRITER, request: dict, fault: str | None) -> None:
    tokens = request["max_tokens"] - (fault == "short")
    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
    for place in range(tokens):
        if fault == "stream" and place == 1:
            writer.write(event({"error": {"message": "the model is tired"}}))
        writer.write(chunk("tea "))
        await writer.drain()
    usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": tokens}
    writer.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
    await writer.drain()
    writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--fault")
    given = parser.parse_args()

    async def connection(reader: READER, writer: WRITER) -> None:
        while (request := await read_request(reader)) is not None:
            path, body = request
            if path == "/health":
                respond(writer, 200, b"{}")
            elif given.fault == "http":
                respond(writer, 500, b'{"error": {"message": "out of tea"}}')
            else:
                await complete(writer, json.loads(body), given.fault)
                return
        writer.close()

    server = await asyncio.start_server(connection, given.host, given.port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

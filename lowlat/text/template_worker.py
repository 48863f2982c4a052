"""Worker process that renders chat templates: one JSON request per input line, one JSON answer per
output line.

`text.template` runs it as a script and kills it to limit its time. It imports nothing of the
package, so that it starts in a few hundredths of a second.
"""

import datetime
import json
import signal
import sys
from collections.abc import Iterator

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 60
"""For a worker whose parent dies while it renders; the parent's own limit is lower."""


class GenerationBlock(Extension):
    """{% generation %} marks the model's turns for training; rendered as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as in training data; Jinja's own filter escapes HTML and sorts keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment of Hugging Face chat templates."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def limited(pieces: Iterator[str], limit: int) -> str:
    """`pieces` joined; raises TemplateError beyond `limit` characters."""
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise jinja2.TemplateError(f"the result is longer than {limit} characters")
        kept.append(piece)
    return "".join(kept)


def answer(env: ImmutableSandboxedEnvironment, request: dict) -> dict:
    """{"text": ...}, or {"error": ...} for any error of the template."""
    try:
        template = env.from_string(request["template"])
        return {"text": limited(template.generate(**request["variables"]), request["limit"])}
    except Exception as error:  # a template can raise anything; all of it is reported
        line = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return {"error": f"{str(error) or type(error).__name__}{line}"}


def limit_resources() -> None:
    """Bound memory, on Linux."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def limit_cpu() -> None:
    """Let this request use CPU_SECONDS more, on Linux; then the system ends the process."""
    if sys.platform == "linux":
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_SECONDS, resource.RLIM_INFINITY))


def main() -> None:
    """Answer requests until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which closes our input
    limit_resources()
    env = environment()
    print("ready", flush=True)
    for line in sys.stdin:
        limit_cpu()
        print(json.dumps(answer(env, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

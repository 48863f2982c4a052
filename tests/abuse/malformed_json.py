"""Bad requests: bodies that are not JSON, or that parsers interpret differently."""

import json
from collections.abc import Iterator

from lowlat.serve.protocol import limits

from .cases import BODIES, CHAT, COMPLETIONS, Case, bad_body

MiB = 1 << 20


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def objects(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def malformed_json() -> Iterator[Case]:
    """Bodies that are no JSON, or JSON that another reader would understand differently."""
    plain = json.dumps(BODIES[COMPLETIONS]).encode()
    inner = plain[1:-1]
    broken: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "not valid JSON"),
        "blank": (b" \n\t ", "not valid JSON"),
        "a zero byte": (b"\0", "not valid JSON"),
        "cut off": (plain[:-1], "not valid JSON"),
        "cut off in a text": (plain[:20], "not valid JSON"),
        "cut off in a character": (plain[:-2] + b"\xe2\x82", "UTF-8"),
        "two objects": (plain + plain, "not valid JSON"),
        "bytes after it": (plain + b"\0", "not valid JSON"),
        "a bracket after it": (plain + b"]", "not valid JSON"),
        "a byte order mark": (b"\xef\xbb\xbf" + plain, "JSON"),
        "UTF-16": (plain.decode().encode("utf-16"), "UTF-8"),
        "UTF-32": (plain.decode().encode("utf-32-le"), "not valid JSON"),
        "Latin-1": (b'{"model": "\xe9"}', "UTF-8"),
        "an overlong character": (b'{"model": "\xc0\xaf"}', "UTF-8"),
        "a surrogate in UTF-8": (b'{"model": "\xed\xa0\x80"}', "UTF-8"),
        "beyond Unicode": (b'{"model": "\xf5\x80\x80\x80"}', "UTF-8"),
        "a comment": (b"{/* */" + inner + b"}", "not valid JSON"),
        "a comma at the end": (b"{" + inner + b",}", "not valid JSON"),
        "single quotes": (plain.replace(b'"', b"'"), "not valid JSON"),
        "names without quotes": (b'{model: "tiny"}', "not valid JSON"),
        "a control character": (b'{"model": "a\x01b"}', "not valid JSON"),
        "a line break in a text": (b'{"model": "a\nb"}', "not valid JSON"),
        "an unknown escape": (b'{"model": "\\x41"}', "not valid JSON"),
        "half an escape": (b'{"model": "\\u12"}', "not valid JSON"),
        "a leading zero": (b"{" + inner + b', "n": 01}', "not valid JSON"),
        "a plus sign": (b"{" + inner + b', "n": +1}', "not valid JSON"),
        "a bare point": (b"{" + inner + b', "top_p": .5}', "not valid JSON"),
        "hexadecimal": (b"{" + inner + b', "n": 0x1}', "not valid JSON"),
        "True": (b"{" + inner + b', "stream": True}', "not valid JSON"),
        "undefined": (b"{" + inner + b', "stream": undefined}', "not valid JSON"),
        "an array": (b"[" + plain + b"]", "must be a JSON object"),
        "a text": (b'"{}"', "must be a JSON object"),
        "a number": (b"1", "must be a JSON object"),
        "null": (b"null", "must be a JSON object"),
        "true": (b"true", "must be a JSON object"),
        "a form": (b"model=tiny&prompt=Hi", "not valid JSON"),
        "YAML": (b"model: tiny\nprompt: Hi\n", "not valid JSON"),
        "XML": (b"<?xml version='1.0'?><!DOCTYPE a SYSTEM 'file:///etc/passwd'>", "not valid JSON"),
        "a pickle": (b"\x80\x04\x95\x17\x00cos\nsystem\n(S'id'\ntR.", "UTF-8"),
        "a key twice": (b"{" + inner + b', "prompt": "Ho"}', "duplicate key 'prompt'"),
        "a key twice, once escaped": (
            b"{" + inner + b', "\\u0070rompt": "Ho"}',
            "duplicate key 'prompt'",
        ),
        "a key twice, inside": (
            b"{" + inner + b', "logit_bias": {"1": 1, "1": 2}}', "duplicate key '1'"
        ),
        "half a pair": (b'{"model": "\\ud800"}', "surrogate"),
        "the other half": (b'{"model": "tiny", "prompt": "\\udc00x"}', "surrogate"),
        "halves the wrong way round": (b'{"prompt": "\\udc00\\ud800"}', "surrogate"),
        "half a pair in a key": (b'{"\\ud800": 1}', "surrogate"),
        "half a pair inside": (b'{"messages": [{"content": ["\\uDBFF"]}]}', "surrogate"),
    }  # fmt: skip
    for name, (body, words) in broken.items():
        for path in (CHAT, COMPLETIONS):
            yield bad_body(f"{path}: {name}", path, lambda body=body: body, words=words)
    for depth in (limits.MAX_JSON_DEPTH, 1000, 100_000, MiB):
        for kind, make in (("arrays", nested), ("objects", objects)):
            if kind == "objects" and depth == MiB:
                depth //= 4
            yield bad_body(
                f"{depth} {kind} inside one another",
                COMPLETIONS,
                lambda make=make, depth=depth: b'{"prompt":' + make(depth) + b"}",
                words="nested deeper" if depth < limits.MAX_JSON_VALUES // 2 else "JSON values",
            )
            yield bad_body(
                f"{depth} {kind} opened",
                COMPLETIONS,
                lambda make=make, depth=depth: b'{"prompt":' + make(depth)[:depth],
                words="",
            )
    for number in ("9" * 33, "9" * 5000, "-" + "9" * 300_000, "1e400", "-1e999", "1" * 400 + ".5"):
        for field in ("n", "seed", "temperature", "no_such_field"):
            yield bad_body(
                f"{field} of {number[:6]}... ({len(number)} characters)",
                COMPLETIONS,
                lambda number=number, field=field: (
                    b'{%s, "%s": %s}' % (inner, field.encode(), number.encode())
                ),
                words="too large",
            )

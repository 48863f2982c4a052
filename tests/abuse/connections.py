"""Bad requests below JSON: headers, methods, paths, framing, invalid HTTP."""

import json
from collections.abc import Iterator

from lowlat.serve.protocol import limits

from .cases import BODIES, CHAT, COMPLETIONS, Case
from .wire import HOST, JSON_HEADERS, request

GOOD = json.dumps(BODIES[COMPLETIONS]).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BOTH = b"Transfer-Encoding: chunked\r\nContent-Length: 50\r\n\r\n"
GETS = ("/v1/models", "/v1/models/tiny", "/health", "/ready", "/metrics", "/openapi.json", "/")
NO_HTTP = "invalid HTTP/1.1 request"


def types() -> Iterator[Case]:
    """Bodies whose Content-Type is not plain JSON."""
    kinds = (
        "", "text/plain", "text/plain;charset=UTF-8", "text/json", "application/jsonp", "*/*",
        "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml",
        "application/json; charset=utf-16", "application/json; charset=latin-1", "json",
        "application/json, text/plain", "application/json-seq", "application/x-ndjson",
        "application/json; charset=utf-8; x=1", "application/octet-stream", "application/yaml",
        "application/vnd.api+json", "application/json\ttext", "application/x-pickle",
    )  # fmt: skip
    for path in (CHAT, COMPLETIONS):
        for kind in kinds:
            headers = {"Host": HOST, "Content-Type": kind}
            yield wire_case(f"{path} as {kind!r}", "POST", path, headers, 415, "Content-Type")
        headers = {"Host": HOST}
        yield wire_case(f"{path} without a type", "POST", path, headers, 415, "Content-Type")
        for coding in ("gzip", "br", "deflate", "zstd", "identity, gzip", "x", "", "compress"):
            headers = {**JSON_HEADERS, "Content-Encoding": coding}
            yield wire_case(f"{path}, {coding!r}", "POST", path, headers, 415, "Content-Encoding")


def wire_case(
    name: str, method: str, target: str, headers: dict[str, str], status: int, words: str = ""
) -> Case:
    return Case(
        name=name,
        make=lambda: request(method, target, headers, GOOD),
        status=status,
        words=words,
    )


def methods() -> Iterator[Case]:
    """Methods that a path does not have, and attempts to name another one."""
    for path in BODIES:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "post"):
            yield wire_case(f"{method} {path}", method, path, {"Host": HOST}, 405, "method")
        headers = {"Host": HOST, "X-HTTP-Method-Override": "POST", "X-Method-Override": "POST"}
        yield wire_case(f"GET {path}, said to be POST", "GET", path, headers, 405, "method")
    for path in GETS:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
            yield wire_case(f"{method} {path}", method, path, {"Host": HOST}, 405, "method")


def paths() -> Iterator[Case]:
    """Spellings that other servers take for a route of theirs."""
    for target in (
        "//v1/completions", "/v1//completions", "/v1/completions/", "/v1/completions//",
        "/v1/completions;", "/v1/completions;x=1", "/v1/..;/v1/completions", "/./v1/completions",
        "/v1/./completions", "/v1/../v1/completions", "/v1/%2e%2e/v1/completions",
        "/v1%2fcompletions/", "/v1/%2fcompletions", "/v1/completions%2f", "/v1/completions%00",
        "/v1/completions%20", "/v1/completions%0d%0aX:1", "/V1/completions", "/v1/Completions",
        "/v1\\completions", "/v1/completions.json", "/v1/completions/../../health", "/v1",
        "/completions", "/chat/completions", "/api/v1/completions",
        "/v1/images/generations", "/v1/audio/speech", "/v1/files", "/v1/load_lora_adapter",
        "/docs", "/redoc", "/static/../config.py", "/static/..%2fx", "/static/%2e%2e/x",
        "/static/", "/static", "/static/index.html", "/.env", "/.git/config", "/favicon.ico",
        "/debug/pprof", "/update_weights", "/shutdown", "/%ff%fe", "/%u002e", "/x" * 500,
        "http://127.0.0.1/v1/completions", "http://evil.example/v1/completions", "*",
        "evil.example:80", "/v1/completions%3fx", "/health/../v1/completions",
    ):  # fmt: skip
        yield wire_case(f"POST {target[:60]}", "POST", target, dict(JSON_HEADERS), 404, "no such")
    for query in ("?stream=true", "?", "?api_key=x", "?x=%00", "?" + "a=1&" * 1000):
        target = COMPLETIONS + query
        if query == "?":
            continue  # an empty query says nothing
        yield wire_case(
            f"a query {query[:20]}", "POST", target, dict(JSON_HEADERS), 400, "query parameters"
        )
    for name in ("other", "tiny%00", "tiny/", "..%2ftiny", "tiny%2f..", "TINY", "", "x" * 5000):
        yield Case(
            name=f"GET /v1/models/{name[:20]}",
            make=lambda name=name: request("GET", f"/v1/models/{name}"),
            status=404,
            param="model",
        )


def framing() -> Iterator[Case]:
    """Lengths, chunks and headers that are wrong."""
    too_long = b"x" * (2 * limits.MAX_HEADER_BYTES)
    rows: dict[str, tuple[bytes, int, str]] = {
        "a huge declared length": (HEAD + b"Content-Length: 99999999999999\r\n\r\n", 413, "larger"),
        "a length of 4,000 digits": (
            HEAD + b"Content-Length: " + b"9" * 4000 + b"\r\n\r\n", 400, NO_HTTP,
        ),
        "a declared length, to be continued": (
            HEAD + b"Content-Length: 9999999999\r\nExpect: 100-continue\r\n\r\n", 413, "larger",
        ),
        "a negative length": (HEAD + b"Content-Length: -1\r\n\r\n", 400, NO_HTTP),
        "a length with a sign": (HEAD + b"Content-Length: +5\r\n\r\n{}", 400, NO_HTTP),
        "a length in hexadecimal": (HEAD + b"Content-Length: 0x5\r\n\r\n{}", 400, NO_HTTP),
        "two lengths": (
            HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, NO_HTTP,
        ),
        "a length of nothing": (HEAD + b"Content-Length: 0\r\n\r\n", 400, "not valid JSON"),
        "no length": (HEAD + b"\r\n", 400, "not valid JSON"),
        "a length too short": (HEAD + b"Content-Length: 5\r\n\r\n" + GOOD, 400, "not valid JSON"),
        "an unknown coding": (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400, NO_HTTP),
        "two codings": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400, NO_HTTP),
        "chunks that are none": (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n", 400, NO_HTTP,
        ),
        "a chunk of a negative size": (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n", 400, NO_HTTP,
        ),
        "a chunk longer than it says": (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n", 400, NO_HTTP,
        ),
        "a chunk of endless size": (
            CHUNKED + b"f" * 40 + b"\r\n", 400, NO_HTTP,
        ),
        "chunks above the cap": (
            CHUNKED + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 80, 413, "larger",
        ),
        "many small chunks, of no JSON": (
            CHUNKED + b"1\r\n \r\n" * 5000 + b"0\r\n\r\n",
            400, "not valid JSON",
        ),
        "headers above the cap": (HEAD + b"X: " + too_long, 431, "larger"),
        "headers above the cap, ended": (HEAD + b"X: " + too_long + b"\r\n\r\n", 431, "larger"),
        "many headers": (HEAD + b"X: y\r\n" * 7_000 + b"\r\n", 431, "larger"),
        "a target above the cap, ended": (
            b"GET /" + too_long + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 431, "larger",
        ),
        "two framings": (HEAD + BOTH + b"0\r\n\r\n", 400, "contradict"),
        "a target above the cap": (b"GET /" + too_long + b" HTTP/1.1\r\n", 431, "larger"),
        "a method above the cap": (too_long, 431, "larger"),
        "two hosts": (HEAD + b"Host: evil.example\r\n\r\n", 400, NO_HTTP),
        "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400, NO_HTTP),
        "no host, HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 403, "Host"),
        "HTTP/0.9": (b"GET /health\r\n\r\n", 400, NO_HTTP),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403, "Host"),
        "HTTP/9.9": (b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n", 403, "Host"),
        "a folded header": (b"GET /health HTTP/1.1\r\n Host: 127.0.0.1\r\n\r\n", 400, NO_HTTP),
        "a header without a name": (HEAD + b": x\r\n\r\n", 400, NO_HTTP),
        "a header without a colon": (HEAD + b"nonsense\r\n\r\n", 400, NO_HTTP),
        "a blank before the colon": (HEAD + b"Content-Length : 2\r\n\r\n{}", 400, NO_HTTP),
        "a zero byte in a header": (HEAD + b"X: a\0b\r\n\r\n", 400, NO_HTTP),
        "a zero byte in the target": (b"GET /health\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400, NO_HTTP),
        "bytes above ASCII in the target": (
            b"GET /h\xe9alth HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400, NO_HTTP,
        ),
        "two blanks": (b"GET  /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400, NO_HTTP),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, NO_HTTP),
        "SSH": (b"SSH-2.0-OpenSSH_9.7\r\n\r\n", 400, NO_HTTP),
        "a mail": (b"EHLO example.org\r\n\r\n", 400, NO_HTTP),
        "zeros": (b"\0" * 5000 + b"\r\n\r\n", 400, NO_HTTP),
        "a proxy's greeting": (b"PROXY TCP4 1.1.1.1 127.0.0.1 1 2\r\n\r\n", 400, NO_HTTP),
        "a tunnel": (b"CONNECT evil:80 HTTP/1.1\r\nHost: evil:80\r\n\r\n", 403, "Host"),
    }  # fmt: skip
    for name, (data, status, words) in rows.items():
        yield Case(name=name, make=lambda data=data: data, status=status, words=words)


def connection_cases() -> Iterator[Case]:
    """All of the above."""
    for table in (types, methods, paths, framing):
        yield from table()

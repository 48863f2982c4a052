"""Rules of the code and its language that a reader relies on: CONTRIBUTING.md, "Code"."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FUNCTION, LONGEST_KERNEL, LONGEST_FILE = 60, 120, 400

RETIRED_NAMES = {
    "Basis": "run inputs",
    "Reader": "prefill planner, parser",
    "Saves": "CheckpointStore",
    "Speaker": "chat backend",
    "Team": "ProcessMesh",
    "arms": "variants",
    "batch_rows": "batch_size",
    "blame": "diagnosis",
    "company": "batch composition",
    "is_patient": "is_offline",
    "micro_batch_rows": "micro_batch_size",
    "prices": "sensitivities",
    "recompute": "activation_checkpointing",
    "row_dim": "entry_dim",
    "row_widths": "entry_widths",
    "runlog": "metrics_log",
    "salt": "cache_namespace",
    "twin": "native kernel, reference implementation",
}
"""Identifiers whose idea has a name in the field, and that name."""

RETIRED_PROSE = {
    r"anew": "again",
    r"as (?:it|they) (?:lies?|lay)": "row-major, in file order, memory-mapped",
    r"beside(?! the point)": "next to, compared with",
    r"comes? along": "bundled",
    r"go(?:es)? on|going on|went on": "continue, resume",
    r"healing|healed (?:by|on|with)": "recovery training",
    r"holds? shut": "Regression:",
    r"(?:is|are) said": "is reported",
    r"in turn": "interleaved, one after the other",
    r"known again": "the fingerprint matches",
    r"mend(?:s|ed)?": "fix",
    r"nobody|somebody|who(?:ever)?": "name the component",
    r"patient": "offline",
    r"pulse|signs? of life": "heartbeat",
    r"rows? left behind": "KV cache entry",
    r"set back": "preempted and recomputed",
    r"so many": "this many",
    r"takes? turns": "interleaved",
    r"tells? (?:the rest|how|which|whether|what|that)": "reports, documents",
    r"token folders?": "tokenized dataset",
    r"told": "reported",
    r"twins?": "native kernel, reference implementation",
}
"""Phrases of prose that need a second reading, and what to write."""

BETWEEN_WORDS = r"\s+(?:(?:#|//|>|\*) +)?"


def tracked(*patterns: str) -> list[Path]:
    """Files git tracks that match a pattern; none outside a git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


PYTHON = tracked("lowlat/*.py", "lab/*.py", "examples/*.py")
KERNELS = tracked("csrc/*.cpp", "csrc/*.h")
PAGES = tracked("README.md", "CONTRIBUTING.md", "docs/*.md", "deploy/*.md", "benchmarks/*.md")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short() -> None:
    """Option declarations of a verb count: verbs share groups of options."""
    long = [
        f"{named(path)}:{node.lineno} {node.name}: {length} lines"
        for path in PYTHON
        for node in functions(path)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert long == []


def kernel_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Head, first line and length of every function body at namespace or class level."""
    blank = re.sub(
        r'^\s*#[^\n]*|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\])\'',
        lambda found: re.sub(r"[^\n]", " ", found[0]),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    heads: list[tuple[str, int]] = []
    last = 0
    for found in re.finditer(r"[{};]", blank):
        line = blank.count("\n", 0, found.start()) + 1
        if found[0] == "{":
            heads.append((" ".join(blank[last : found.start()].split()), line))
        elif found[0] == "}" and heads:
            head, first = heads.pop()
            outer = all(re.search(r"\b(namespace|struct|class|extern)\b", h) for h, _ in heads)
            if outer and "(" in head and not re.match(r"(namespace|struct|class|enum)\b", head):
                yield head, first, line - first + 1
        last = found.end()


def test_kernels_are_short() -> None:
    found = [(path, *kernel) for path in KERNELS for kernel in kernel_functions(path.read_text())]
    assert len(found) > 300
    long = [
        f"{named(path)}:{first} {head[-60:]}: {length} lines"
        for path, head, first, length in found
        if length > LONGEST_KERNEL
    ]
    assert long == []


def test_files_are_short() -> None:
    lengths = {named(path): path.read_text().count("\n") for path in [*PYTHON, *KERNELS]}
    examples = {"examples/nano_deepseek.py": 500}
    long = {
        name: length
        for name, length in lengths.items()
        if length > examples.get(name, LONGEST_FILE)
    }
    assert long == {}


def is_tensor(annotation: ast.expr | None) -> bool:
    """Whether an annotation says Tensor without a shape."""
    return any(
        isinstance(node, ast.Name) and node.id == "Tensor"
        for node in ast.walk(annotation or ast.Constant(None))
        if not (isinstance(node, ast.Subscript))
    ) and "Tensor," not in ast.unparse(annotation or ast.Constant(None))


@pytest.mark.parametrize("package", ["ops", "attention", "model"])
def test_public_tensor_functions_have_shapes(package: str) -> None:
    bare = []
    for path in tracked(f"lowlat/{package}/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [
            node
            for scope in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
            if not (isinstance(scope, ast.ClassDef) and scope.name.startswith("_"))
            for node in scope.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
        for node in public:
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            hints = [*(argument.annotation for argument in given), node.returns]
            if any(is_tensor(hint) for hint in hints):
                bare.append(f"{named(path)}:{node.lineno} {node.name}")
    assert bare == []


def test_the_rules_see_the_files() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("git lists the files, and this is no checkout")
    assert len(PYTHON) > 400 and len(KERNELS) > 40 and len(PAGES) > 25


def test_retired_names_stay_away() -> None:
    found = [
        f"{named(path)}: {name}; write {RETIRED_NAMES[name]}"
        for path in PYTHON
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in identifiers(node)
        if name in RETIRED_NAMES
    ]
    assert found == []


def identifiers(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.arg(arg=name) | ast.Attribute(attr=name) | ast.Name(id=name):
            return [name]
        case ast.keyword(arg=str(name)):
            return [name]
    return []


def test_retired_phrases_stay_away() -> None:
    """Also where a line break, with the comment sign after it, divides a phrase."""
    texts = {path: path.read_text(encoding="utf-8") for path in [*PYTHON, *KERNELS, *PAGES]}
    found = []
    for phrase, better in RETIRED_PROSE.items():
        spaced = phrase.replace(" ", BETWEEN_WORDS)
        words = re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE)
        for path, text in texts.items():
            for match in words.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{named(path)}:{line} {match[0]!r}; write: {better}")
    assert found == []

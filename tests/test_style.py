"""Rules of the code and its language that a reader relies on: CONTRIBUTING.md, "Code"."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FUNCTION, LONGEST_KERNEL, LONGEST_FILE = 60, 120, 400

RETIRED_NAMES = (
    "Asked Basis Later Reader Saves Speaker Team anew arms batch_rows blame company healing_of "
    "is_patient micro_batch_rows patient prices recompute row_dim row_widths runlog salt speakers "
    "speakers still_turning twin"
).split()
"""Identifiers whose idea has a name in the field: docs/words.md."""

RETIRED_PROSE = (
    r"as (?:it|they) (?:lies?|lay)",
    r"asked for again",
    r"beside(?! the point)",
    r"come(?:s)? along",
    r"goes on",
    r"known again",
    r"lying row",
    r"mend(?:s|ed)?",
    r"nobody",
    r"rows? left behind",
    r"set anew",
    r"sign of life",
    r"so many",
    r"somebody",
    r"tell(?:s)? (?:the rest|how|which|whether|what|that)",
    r"told",
    r"twins?",
    r"what nobody",
    r"who(?:ever)? comes",
)
"""Phrases that a stranger reads twice; docs/words.md says what to write."""


def tracked(*patterns: str) -> list[Path]:
    """Files git tracks; none in a source archive."""
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


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of prose and code; quoted text of languages and lists of words is code."""
    yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


def test_retired_names_stay_away() -> None:
    names = re.compile(rf"\b({'|'.join(RETIRED_NAMES)})\b")
    found = [
        f"{named(path)}:{node.lineno} {name}"
        for path in PYTHON
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in identifiers(node)
        if names.fullmatch(name)
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
    phrases = re.compile(rf"\b(?:{'|'.join(RETIRED_PROSE)})\b", re.IGNORECASE)
    found = [
        f"{named(path)}:{number} {match[0]}"
        for path in [*PYTHON, *KERNELS, *PAGES]
        for number, line in words_of(path)
        for match in phrases.finditer(line)
    ]
    assert found == [], f"{len(found)} phrases"

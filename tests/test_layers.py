"""The import rule of docs/architecture.md: each layer imports only layers below its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lowlat"

# Top to bottom. Names in one row are independent of one another, save what ALLOWED lists.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench", "compare", "recovery", "replicas"},
    {"api"},
    {"serve", "train", "convert", "peers"},
    {"generate", "data", "plan"},
    {"engine"},
    {"checkpoint"},
    {"model"},
    {"attention"},
    {"ops"},
    {"text", "config", "utils"},
    {"_native"},  # the kernels of csrc/
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
ALLOWED = {("text", "utils"), ("config", "utils")}


def layer_of(module: list[str]) -> str | None:
    """`lowlat.ops.rope` -> `ops`; None for the package itself, which only names public things."""
    return module[1] if len(module) > 1 else None


def imported_modules(tree: ast.AST, package: list[str]) -> Iterator[list[str]]:
    """Every lowlat module a file of `package` imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (name for name in names if name[0] == "lowlat")


def violations(source: str, module: list[str], package: list[str]) -> list[str]:
    """Imports in `source` that break the rule, as `lowlat.ops.rope imports lowlat.model.mla`."""
    importer = layer_of(module)
    assert importer in RANK, f"{'.'.join(module)}: layer '{importer}' has no place in LAYERS"
    found = []
    for target in imported_modules(ast.parse(source), package):
        imported = layer_of(target)
        downward = imported in RANK and RANK[imported] > RANK[importer]
        if not (downward or imported == importer or (importer, imported) in ALLOWED):
            found.append(f"{'.'.join(module)} imports {'.'.join(target)}")
    return found


def module_files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_imports_point_downward() -> None:
    broken = []
    for path in module_files():
        module = ["lowlat", *path.relative_to(PACKAGE).with_suffix("").parts]
        broken += violations(path.read_text(encoding="utf-8"), module, module[:-1])
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowlat.ops.rope", "from lowlat.model.mla import MLA"),
        ("lowlat.serve.app", "import lowlat.train.loop"),
        ("lowlat.convert.run", "from lowlat.recovery.run import convert_with_recovery"),
        ("lowlat.generate.model", "def late():\n    from lowlat import api"),
        ("lowlat.model.mla", "from ..engine import params"),
        ("lowlat.utils.device", "from lowlat.config.model import ModelConfig"),
        ("lowlat.config.hf.reader", "from lowlat.text.tokenizer import Tokenizer"),
        ("lowlat.checkpoint.load", "from lowlat import load"),
    ],
)
def test_upward_and_sideways_imports_are_found(module: str, source: str) -> None:
    parts = module.split(".")
    assert violations(source, parts, parts[:-1]) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowlat.model.mla", "from lowlat.ops import rope\nfrom .linear import Linear"),
        ("lowlat.text.tokenizer", "from lowlat.utils.errors import UserError"),
        ("lowlat.cli.chat", "from lowlat import api"),
        ("lowlat.api", "from .engine.llm import Model\nimport torch"),
    ],
)
def test_downward_imports_are_allowed(module: str, source: str) -> None:
    parts = module.split(".")
    assert violations(source, parts, parts[:-1]) == []


def test_the_scheduler_and_its_records_import_no_torch() -> None:
    """In a fresh interpreter, directly or through other modules."""
    code = (
        "import sys, lowlat.engine.request, lowlat.engine.scheduler\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@cache
def imports_of(name: str) -> list[list[str]]:
    """What the module or the __init__ of the package `name` imports."""
    path = Path(PACKAGE.parent, *name.split("."))
    is_module = path.with_suffix(".py").exists()
    file = path.with_suffix(".py") if is_module else path / "__init__.py"
    package = name.split(".")[: -1 if is_module else None]
    return list(imported_modules(ast.parse(file.read_text(encoding="utf-8")), package))


def members(package: str, names: set[str]) -> dict[str, set[str]]:
    """Modules and sub-packages of `package`, each with the siblings that it imports, anywhere in
    it.
    """
    depth = package.count(".") + 1
    found: dict[str, set[str]] = {}
    for name in names:
        if not name.startswith(f"{package}."):
            continue
        own = found.setdefault(name.split(".")[depth], set())
        for target in imports_of(name):
            # `from package import name` imports a module, or a name of the package's own.
            is_sibling = ".".join(target[: depth + 1]) in names
            if target[:depth] == package.split(".") and is_sibling:
                own.add(target[depth])
    return {name: targets - {name} for name, targets in found.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Members that import each other, in order of their imports; empty if there are none."""
    rest = {name: set(targets) for name, targets in graph.items()}
    while leaves := [name for name, targets in rest.items() if not targets & rest.keys()]:
        for name in leaves:
            del rest[name]
    if not rest:
        return []
    path = [min(rest)]
    while (following := min(rest[path[-1]] & rest.keys())) not in path:
        path.append(following)
    return [*path[path.index(following) :], following]


def test_imports_inside_packages_go_one_way() -> None:
    """Modules of a package, and its sub-packages as wholes, import one another without a cycle."""
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    packages = {name.rpartition(".")[0] for name in names} - {"", "lowlat"}
    broken = [
        f"{package}: {' imports '.join(found)}"
        for package in sorted(packages)
        if (found := cycle(members(package, names)))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, ["a", "b", "a"]),
        ({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}, "e": {"a"}}, ["b", "c", "d", "b"]),
    ],
)
def test_cycles_are_found(graph: dict[str, set[str]], expected: list[str]) -> None:
    assert cycle(graph) == expected

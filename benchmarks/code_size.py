"""Size of a code base: lines of Python by package, public classes, function lengths, docs in words.

    python benchmarks/code_size.py [ROOT]

Counts files that git tracks below ROOT (the current folder by default). To compare two commits, run
`git worktree add /tmp/before COMMIT`, then this command in both folders.
"""

import ast
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGE = "lowlat"
TERMS = ("KV cache", "continuous batching", "throughput", "chunked prefill")


def tracked(root: Path, *patterns: str) -> list[Path]:
    """Files git tracks below `root` that match a pattern."""
    command = ["git", "-C", str(root), "ls-files", *patterns]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [root / name for name in listed.splitlines() if (root / name).is_file()]


def num_lines(files: list[Path]) -> int:
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def function_lengths(tree: ast.AST) -> list[int]:
    """Lines of every function, with its docstring, without decorators."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, functions)
    ]


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    product = tracked(root, f"{PACKAGE}/*.py")
    texts = {file: file.read_text(encoding="utf-8") for file in product}
    trees = [ast.parse(text) for text in texts.values()]

    by_package = Counter[str]()
    for file, text in texts.items():
        below = file.relative_to(root / PACKAGE).parts
        by_package[below[0] if len(below) > 1 else "."] += text.count("\n")
    print(f"{PACKAGE}: {sum(by_package.values()):,} lines in {len(product)} files")
    print("  " + ", ".join(f"{name} {lines:,}" for name, lines in by_package.most_common()))

    classes = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    print(f"public classes: {len(classes)}")
    lengths = sorted(length for tree in trees for length in function_lengths(tree))
    p90 = lengths[int(len(lengths) * 0.9)]
    print(f"functions: median {statistics.median(lengths):g}, p90 {p90}, max {lengths[-1]} lines")
    longest = max(product, key=lambda file: texts[file].count("\n"))
    print(f"longest file: {texts[longest].count(chr(10))} lines, {longest.relative_to(root)}")

    whole = "\n".join(texts.values()).lower()
    print(", ".join(f'"{term}" {whole.count(term.lower())}' for term in TERMS))
    for name, patterns in {
        "tests": ["tests/*.py"],
        "lab": ["lab/*.py"],
        "benchmarks": ["benchmarks/*.py"],
        "examples": ["examples/*.py"],
        "kernels": ["csrc/*.cpp", "csrc/*.h"],
    }.items():
        files = tracked(root, *patterns)
        print(f"{name}: {num_lines(files):,} lines in {len(files)} files")
    words = {
        page.relative_to(root): len(page.read_text(encoding="utf-8").split())
        for page in tracked(root, "README.md", "docs/*.md")
    }
    prose = sum(
        count
        for page, count in words.items()
        if page.parts[0] == "docs" and page.name not in REFERENCE and "decisions" not in page.parts
    )
    readme = words.pop(Path("README.md"), 0)
    print(
        f"README {readme:,} words; docs {sum(words.values()):,}, {prose:,} without decisions and "
        f"reference pages ({', '.join(REFERENCE)})"
    )


REFERENCE = (
    "api.md",
    "commands.md",
    "http-api.md",
    "packages.md",
    "recipe-reference.md",
    "shapes.md",
)

if __name__ == "__main__":
    main()

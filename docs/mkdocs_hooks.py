"""MkDocs hooks: pages of the site that are generated from the repository.

Links from docs/ to other files of the repository lead to generated pages that show these files.
packages.md lists every package, module and C++ file with the first sentence of its description.
"""

import ast
import os
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
SOURCE = "source/"
"""Folder of the site for pages of repository files."""
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""Pages of the navigation that are outside docs/."""
EXCLUDED = "---\nsearch:\n  exclude: true\n---\n\n"
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".yaml": "yaml", ".yml": "yaml"}
IMAGES = {".svg", ".png", ".jpg", ".gif"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace folders in the navigation ("results/") by their pages."""

    def pages(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: pages(part) for title, part in entry.items()}
        if isinstance(entry, list):
            return [pages(part) for part in entry]
        if not entry.endswith("/"):
            return entry
        folder = Path(config.docs_dir)
        return [path.relative_to(folder).as_posix() for path in sorted(folder.glob(f"{entry}*.md"))]

    config.nav = pages(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every repository file that some page links to."""
    waiting = [ROOT / name for name in ALWAYS]
    waiting += [Path(config.docs_dir) / file.src_uri for file in files.documentation_pages()]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("docs/"):
            files.append(generated(config, path, name))
        if path.suffix == ".md":
            waiting += [target for target, _ in targets(path.read_text(), posixpath.dirname(name))]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to the generated pages, and fill packages.md.

    Raises PluginError for a link to a file that does not exist.
    """
    origin = page.file.src_uri
    own = origin.removeprefix(SOURCE) if origin.startswith(SOURCE) else f"docs/{origin}"
    if not (ROOT / own).exists():  # a page that shows code
        return markdown
    folder, here = posixpath.dirname(own), posixpath.dirname(origin) or "."

    def replaced(match: re.Match[str]) -> str:
        found = resolve(match[2], folder)
        if found is None:
            return match[0]
        path, anchor = found
        if path.is_dir() and path.is_relative_to(ROOT / "docs"):  # which has no page of its own
            path = min(path.glob("*.md"))
        name = path.relative_to(ROOT).as_posix()
        target = name.removeprefix("docs/") if name.startswith("docs/") else uri(path, name)
        if not path.exists():
            raise PluginError(f"{origin}: link to {match[2]}, which does not exist")
        return match[1] + os.path.relpath(target, here) + anchor + match[3]

    markdown = LINK.sub(replaced, markdown)
    return markdown.partition("\n")[0] + packages() if origin == "packages.md" else markdown


def targets(markdown: str, folder: str) -> list[tuple[Path, str]]:
    """Repository files that a page in `folder` links to, with the anchors."""
    found = (resolve(match[2], folder) for match in LINK.finditer(markdown))
    return [each for each in found if each is not None]


def resolve(link: str, folder: str) -> tuple[Path, str] | None:
    """The repository file behind a relative link, and its anchor; None for other links."""
    target, hash_sign, anchor = link.partition("#")
    if not target or re.match(r"[a-z]+:", target) or target.startswith("/"):
        return None
    path = Path(os.path.normpath(ROOT / folder / unquote(target)))
    return (path, hash_sign + anchor) if path.is_relative_to(ROOT) else None


def uri(path: Path, name: str) -> str:
    """Where the site has the repository file `name`."""
    if path.is_dir():
        return f"{SOURCE}{name}/index.md"
    return SOURCE + (name if path.suffix in {".md", *IMAGES} else f"{name}.md")


def generated(config: MkDocsConfig, path: Path, name: str) -> File:
    """A page that shows a file, or lists a folder."""
    if path.is_dir():
        entries = sorted(entry.name for entry in path.iterdir() if entry.name[0] not in "._")
        content = f"{EXCLUDED}# {name}/\n\n" + "".join(f"- `{entry}`\n" for entry in entries)
        return File.generated(config, uri(path, name), content=content)
    if path.suffix in {".md", *IMAGES}:
        return File.generated(config, uri(path, name), abs_src_path=str(path))
    language = LANGUAGES.get(path.suffix, "text")
    content = f"{EXCLUDED}# {name}\n\n~~~~{language}\n{path.read_text()}\n~~~~\n"
    return File.generated(config, uri(path, name), content=content)


def packages() -> str:
    """Every package: its docstring, and its modules with the first sentence of theirs."""
    parts = ["\n\nGenerated from the docstrings.\n"]
    for folder in sorted(path.parent for path in (ROOT / "lowlat").glob("*/__init__.py")):
        parts.append(f"\n## lowlat.{folder.name}\n\n{docstring(folder / '__init__.py')}\n")
        rows = [
            f"| `{module.relative_to(folder).as_posix()}` | {first_sentence(docstring(module))} |\n"
            for module in sorted(folder.rglob("*.py"))
            if module.name != "__init__.py" and docstring(module)
        ]
        if rows:
            parts += ["\n| module | |\n|---|---|\n", *rows]
    return "".join([*parts, *kernels()])


def kernels() -> list[str]:
    """Every C++ file, with the first sentence of the comment it begins with."""
    csrc = ROOT / "csrc"
    rows = []
    for path in sorted(csrc.rglob("*.*")):
        opening = re.match(r"(//[^\n]*\n)+", path.read_text())
        if opening:
            text = first_sentence(opening[0].replace("// ", ""))
            rows.append(f"| `{path.relative_to(csrc).as_posix()}` | {text} |\n")
    return ["\n## csrc\n", "\n| file | |\n|---|---|\n", *rows]


def docstring(module: Path) -> str:
    return ast.get_docstring(ast.parse(module.read_text())) or ""


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph of a description, as a cell of a table."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0].replace("|", "\\|").replace("<", "&lt;")

"""Choose among the GGUF models of a hub repository by quantization tag: ORG/NAME-GGUF:Q4_K_M.

Tags are those of llama.cpp and Ollama: the quantization in a file's or folder's name, in any case,
or the file's name itself. Knows names and sizes only; `hub` lists and downloads files.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from lowlat.utils.errors import UserError
from lowlat.utils.gguf_parts import parse_part
from lowlat.utils.memory import is_larger_than_memory, memory_limit

_QUANTIZATION = re.compile(
    r"(?<![A-Za-z0-9])"
    r"((?:UD-)?(?:I?Q[1-9][0-9]?(?:_[A-Z0-9]+)*|TQ[12]_0|(?:MX|NV)FP4(?:_MOE)?|BF16|FP?(?:16|32)))"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)
MAX_SHOWN = 40
"""Tags that an error lists."""


class GGUFVariant(NamedTuple):
    """One model of a repository."""

    tag: str
    files: tuple[str, ...]
    """Paths in the repository: one, or all parts in order."""
    size: int
    """Bytes of all files."""


def gguf_variants(sizes: Mapping[str, int]) -> list[GGUFVariant]:
    """The models among the files of a repository (path -> bytes), by size. A tag that two models
    share gives way to their paths.
    """
    groups: dict[str, list[str]] = {}
    for path in sorted(sizes):
        name = PurePosixPath(path).name
        # projectors of vision towers and importance matrices are no models
        if name.lower().endswith(".gguf") and not name.lower().startswith(("mmproj", "imatrix")):
            part = parse_part(name)
            key = path if part is None else str(PurePosixPath(path).with_name(part.sibling(1)))
            groups.setdefault(key, []).append(path)
    tags = {first: _quantization(first) or first for first in groups}
    shared = Counter(tag.lower() for tag in tags.values())
    found = (
        GGUFVariant(
            first if shared[tags[first].lower()] > 1 else tags[first],
            tuple(files),
            sum(sizes[file] for file in files),
        )
        for first, files in groups.items()
    )
    return sorted(found, key=lambda variant: (variant.size, variant.tag))


def choose_variant(variants: list[GGUFVariant], repo: str, tag: str | None) -> GGUFVariant:
    """The variant of `tag`, or the only one. Raises UserError that lists tags and sizes, and the
    largest that fits into this machine's memory.
    """
    if tag is None:
        if len(variants) == 1:
            return variants[0]
        raise UserError(
            f"hub model '{repo}' holds {len(variants)} GGUF models; add a tag, as in "
            f"{repo}:{_recommended(variants).tag}: {_listed(variants)}"
        )
    matches = [variant for variant in variants if _matches(variant, tag.lower())]
    # Q2_K_XL also means UD-Q2_K_XL, as in llama.cpp
    matches = matches or [v for v in variants if v.tag.lower().endswith(f"-{tag.lower()}")]
    if len(matches) != 1:
        raise UserError(
            f"hub model '{repo}' has no GGUF model with the tag '{tag}'; it has {_listed(variants)}"
        )
    return matches[0]


def _quantization(path: str) -> str | None:
    """The last quantization in a file's name, else in its folder's name."""
    for name in (PurePosixPath(path).name, PurePosixPath(path).parent.name):
        if found := _QUANTIZATION.findall(name):
            return found[-1].upper()
    return None


def _matches(variant: GGUFVariant, tag: str) -> bool:
    names = {variant.tag.lower()}
    for file in variant.files:
        path = file.lower()
        names |= {path, path.removesuffix(".gguf"), PurePosixPath(path).name}
    return tag in names or tag == PurePosixPath(variant.files[0].lower()).stem


def _recommended(variants: list[GGUFVariant]) -> GGUFVariant:
    """The largest that fits into memory, else the smallest."""
    fitting = [variant for variant in variants if not is_larger_than_memory(variant.size)]
    return fitting[-1] if fitting else variants[0]


def _listed(variants: list[GGUFVariant]) -> str:
    shown = ", ".join(f"{v.tag} {v.size / 1e9:.1f} GB" for v in variants[:MAX_SHOWN])
    more = f" and {len(variants) - MAX_SHOWN} more" if len(variants) > MAX_SHOWN else ""
    best, memory = _recommended(variants), f"{memory_limit() / 1e9:.1f} GB"
    if is_larger_than_memory(best.size):
        return f"{shown}{more}; none fits into this machine's memory of {memory}"
    return f"{shown}{more}; {best.tag} is the largest that fits into this machine's {memory}"

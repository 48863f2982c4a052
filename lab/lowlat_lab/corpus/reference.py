"""Reference works to text: WordNet, JSON factbook profiles, dictd dictionaries.

Entries become sentences. They are short, so a document holds up to ENTRIES of them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from lowlat.utils.errors import UserError
from lowlat_lab.corpus.archive import gunzip
from lowlat_lab.corpus.document import Document, Member

ENTRIES = 40
"""Maximum entries of a document."""
KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


def wordnet_documents(member: Member) -> Iterator[Document]:
    """The synsets of a data.* file (wndb(5WN)) with their glosses; a document per ENTRIES."""
    entries: list[str] = []
    titles: list[str] = []
    for line in member.data.decode("utf-8", "replace").splitlines():
        if line.startswith(" "):  # the licence, which precedes the data
            continue
        head, separator, gloss = line.partition("|")
        fields = head.split()
        if not separator or len(fields) < 6:
            raise UserError(f"{member.path}: '{line[:40]}' is not a synset of WordNet")
        count = int(fields[3], 16)
        words = [re.sub(r"\((?:p|a|ip)\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]
        names = ", ".join(dict.fromkeys(word.replace("_", " ") for word in words))
        entries.append(f"{names} ({KINDS[fields[2]]}): {' '.join(gloss.split())}")
        titles.append(names.split(",")[0])
    for start in range(0, len(entries), ENTRIES):
        title = f"{titles[start]} to {titles[min(start + ENTRIES, len(titles)) - 1]}"
        text = "\n\n".join(entries[start : start + ENTRIES])
        yield Document(title=title, text=text, path=f"{member.path}/{start}")


def factbook_documents(member: Member) -> Iterator[Document]:
    """A country's profile: headings, and one or two sentences per fact."""
    try:
        profile = json.loads(member.data)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{member.path} is not JSON ({error})") from error
    if not isinstance(profile, dict):
        raise UserError(f"{member.path} is not a profile: expected an object of sections")
    blocks: list[str] = []
    name = _country(profile)
    for section, facts in profile.items():
        if isinstance(facts, dict) and facts:
            blocks.append(f"{name}: {section}" if name else section)
            blocks += [line for key, value in facts.items() for line in _fact(key, value)]
    if blocks:
        yield Document(title=name or member.path, text="\n\n".join(blocks), path=member.path)


def _country(profile: dict[str, Any]) -> str:
    """The country's short name, or else its long one, from the section Government."""
    names = profile.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        text = names.get(form, {}).get("text", "")
        if text and text.lower() != "none":
            return re.split(r"\s*(?:;|\+\+|\()", text)[0]
    return ""


def _fact(key: str, value: Any) -> list[str]:
    """'Climate: tropical; rainy season.'; the parts of a fact follow it."""
    if not isinstance(value, dict):
        return []
    text = _sentence(value.get("text", ""))
    parts = [f"{name}: {_sentence(part.get('text', ''))}" for name, part in _parts(value)]
    if key == "Background" and not parts:
        return [_sentence(part) for part in value.get("text", "").split("++")]
    if text or parts:
        return [" ".join([f"{key}:", *([text] if text else []), *parts])]
    return []


def _parts(value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in value.items():
        if isinstance(part, dict) and part.get("text") and part["text"] != "NA":
            yield name, part


def _sentence(text: str) -> str:
    """'a ++ b' becomes 'a; b.'"""
    text = re.sub(r"\s*\+\+\s*", "; ", " ".join(text.split())).strip("; ")
    return text if not text or text[-1] in ".!?" else text + "."


def dictionary_documents(member: Member) -> Iterator[Document]:
    """The entries of a dictd dictionary (.dict, or .dict.dz, which is gzip)."""
    data = gunzip(member) if member.path.endswith(".dz") else member.data
    # Headwords start a line after an empty one; definitions are indented or follow directly.
    entries = re.split(r"\n\n+(?=\S)", data.decode("utf-8", "replace").strip())
    for start in range(0, len(entries), ENTRIES):
        group = entries[start : start + ENTRIES]
        title = group[0].split("\n")[0].strip()
        yield Document(title=title, text="\n\n".join(group), path=f"{member.path}/{start}")

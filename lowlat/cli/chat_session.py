"""Sessions of `lowlat chat`: a conversation and its KV cache in a folder, resumed by its name.

    LOWLAT_CACHE/sessions/NAME/conversation.json    model, system message, turns
    LOWLAT_CACHE/sessions/NAME/pages/               the prefix cache on disk (`engine.page_folder`)

Folders have mode 0700, files 0600. One process at a time has a session open.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowlat.checkpoint.fetch.cache_dir import cache_dir, cache_disk_errors
from lowlat.cli.chat_backend import Message
from lowlat.utils.atomic_files import replace_file
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import folder_lock

CONVERSATION_FILE = "conversation.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROLES = ("user", "assistant")


@dataclass(kw_only=True, slots=True)
class ChatSession:
    """A stored conversation."""

    name: str
    folder: Path
    model: str | None = None
    """Name of the model of the last answer; None for a new session."""
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def pages(self) -> Path:
        """Folder of its prefix cache on disk."""
        return self.folder / "pages"

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(path.lstat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def used_at(self) -> float:
        """Unix time of the last answer, or of the start."""
        path = self.folder / CONVERSATION_FILE
        return (path if path.exists() else self.folder).stat().st_mtime

    def save(self, model: str, system: str | None, turns: list[Message]) -> None:
        """Replace the stored conversation. Raises UserError where the disk refuses."""
        self.model, self.system, self.turns = model, system, turns
        content = json.dumps({"model": model, "system": system, "turns": turns}, indent=1)
        with cache_disk_errors(self.folder):
            replace_file(self.folder / CONVERSATION_FILE, content.encode(), mode=0o600)


@contextmanager
def open_session(name: str) -> Iterator[ChatSession]:
    """The session `name`, made if it does not exist. Raises UserError for an invalid name, a
    damaged file, and a session that another process has open."""
    folder = _folder(name)
    with cache_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    with folder_lock(folder) as is_free:
        if not is_free:
            raise UserError(f"session '{name}' is open in another process; close it there first")
        yield _read(name, folder)


def list_sessions() -> list[ChatSession]:
    """All readable sessions, the last used first."""
    root = cache_dir() / "sessions"
    names = os.listdir(root) if root.is_dir() else []
    found = [_read(name, root / name) for name in names if _NAME.fullmatch(name)]
    return sorted(found, key=lambda session: -session.used_at)


def delete_session(name: str) -> int:
    """Delete a conversation and its cache; returns the bytes freed. Raises UserError for a session
    that does not exist or is open."""
    folder = _folder(name)
    if not folder.is_dir():
        raise UserError(f"there is no session '{name}'; lowlat chat sessions lists them")
    with cache_disk_errors(folder), folder_lock(folder) as is_free:
        if not is_free:
            raise UserError(f"session '{name}' is open in another process; close it there first")
        size = ChatSession(name=name, folder=folder).num_bytes
        shutil.rmtree(folder)
    return size


def _folder(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--session '{name}': a name has 1 to 64 letters, digits, '.', '_' and '-', and begins "
            "with a letter or digit"
        )
    return cache_dir() / "sessions" / name


def _read(name: str, folder: Path) -> ChatSession:
    session = ChatSession(name=name, folder=folder)
    path = folder / CONVERSATION_FILE
    try:
        stored = json.loads(path.read_bytes())
        session.model, session.system = stored["model"], stored["system"]
        session.turns = [_turn(turn) for turn in stored["turns"]]
    except FileNotFoundError:
        return session
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another --session") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: is not a stored conversation; delete it with: lowlat chat delete {name}"
        ) from error
    return session


def _turn(turn: Any) -> Message:
    """A turn as stored. Raises ValueError, TypeError or KeyError."""
    if turn["role"] not in _ROLES or not isinstance(turn["content"], str):
        raise ValueError(turn)
    return {"role": turn["role"], "content": turn["content"]}

"""Where a conversion with healing lies until it is whole, so that the same command goes on.

Everything is made in `.NAME.conversion` beside the destination:

    lock            held by the process at work
    request.json    what is asked for
    tokens/         the text to heal on
    start/          the compressed model
    run/            the trainer's folder
    trained/        its last save as a model in fp32
    healed/         the attention of that, all else from start/
    out/            that in the number type asked for, which takes the destination's place
    *.json          what was measured
    placed          written when nothing but the last renaming is left

Each appears whole or not at all. Owns the folder; what is made in it is `heal.run`'s.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lowlat.checkpoint.resumable_writer import check_same, partial_path
from lowlat.utils.atomic_files import refuse_existing, replace_file, sync_folder, sync_parent
from lowlat.utils.disk_errors import resumable_error
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import lock_for_writing

REQUEST, PLACED = "request.json", "placed"


@dataclass(frozen=True, slots=True)
class Work:
    """The places of a conversion under way."""

    folder: Path

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def start(self) -> Path:
        return self.folder / "start"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def trained(self) -> Path:
        return self.folder / "trained"

    @property
    def healed(self) -> Path:
        return self.folder / "healed"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of `name`, a plain JSON value that `make` finds once."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            replace_file(path, json.dumps(make()).encode())
        return json.loads(path.read_text(encoding="utf-8"))

    def place(self, made: Path, files: Mapping[str, bytes], dst: Path) -> None:
        """Put `made`, a folder of this work, with `files` by name, in the place of `dst`."""
        for name, content in files.items():
            replace_file(made / name, content)
        sync_folder(made)
        refuse_existing(dst)
        replace_file(self.folder / PLACED, b"")
        made.rename(dst)
        sync_parent(dst)


def work_path(dst: Path) -> Path:
    """Where an unfinished conversion with healing to `dst` lies."""
    return dst.with_name(f".{dst.name}.conversion")


def clear_placed(dst: Path) -> None:
    """Remove what is left of the work on `dst` where that ended between the last renaming and its
    own removal.
    """
    folder = work_path(dst)
    if dst.exists() and (folder / PLACED).exists():
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def opened(dst: Path, identity: Mapping[str, str]) -> Iterator[Work]:
    """The work on `dst`, held against other processes; gone when it is left without an exception.

    With an exception it is kept, unless nothing in it took long; tokens do where the disk is full.
    Raises UserError where `dst` exists, another process is at work, `identity` differs from that of
    what is there, or the disk refuses.
    """
    refuse_existing(dst)
    work = Work(work_path(dst))
    try:
        work.folder.mkdir(exist_ok=True)
        with (work.folder / "lock").open("ab") as lock:
            lock_for_writing(lock, dst)
            request = work.folder / REQUEST
            if request.exists():
                check_same(json.loads(request.read_text(encoding="utf-8")), identity, work.folder)
            else:
                replace_file(request, json.dumps(identity).encode())
            try:
                yield work
            except UserError as error:
                of_disk = isinstance(error.__cause__, OSError | SafetensorError)
                is_begun = work.start.exists() or partial_path(work.start).exists()
                if not (is_begun or (of_disk and work.tokens.exists())):
                    shutil.rmtree(work.folder, ignore_errors=True)
                raise
            shutil.rmtree(work.folder, ignore_errors=True)
    except OSError as error:
        raise resumable_error(dst, work.folder, error) from error

"""Work folder of a conversion with recovery training: intermediate results, to resume from.

The folder is `.NAME.conversion`, next to the destination:

    lock            locked by the running process
    request.json    fingerprint of source and options
    tokens/         tokenized dataset of the training text
    dense/          the exact MLA conversion of a GQA model (--to dsa)
    start/          the compressed model, or the one with initial indexers
    run/            run folder of the trainer
    trained/        the trained model, exported in fp32
    recovered/      attention of trained/, all other weights of start/
    sparse_run/     run folder of sparse training (--to dsa with recovery training)
    sparse/         its result, as recovered/ is of run/
    out/            the result in the requested data type; renamed to the destination
    *.json          measured figures
    placed          present if only the last rename is missing

Each appears complete or not at all.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowlat.checkpoint.resumable_writer import check_same, partial_path
from lowlat.utils.atomic_files import refuse_existing, rename_new, replace_file, sync_parent
from lowlat.utils.disk_errors import resumable_error
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import lock_for_writing

REQUEST, PLACED = "request.json", "placed"


class WorkFolder:
    """Paths in the work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = folder / "tokens"
        self.dense = folder / "dense"
        self.start = folder / "start"
        self.run = folder / "run"
        self.recovered = folder / "recovered"
        self.sparse_run = folder / "sparse_run"
        self.sparse = folder / "sparse"
        self.out = folder / "out"

    def cached(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value `name`, computed once."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            replace_file(path, json.dumps(compute()).encode())
        return json.loads(path.read_text(encoding="utf-8"))

    def place(self, made: Path, files: Mapping[str, bytes], dst: Path) -> None:
        """Add `files` by name to the folder `made`, and rename it to `dst`."""
        for name, content in files.items():
            replace_file(made / name, content)
        refuse_existing(dst)
        replace_file(self.folder / PLACED, b"")
        rename_new(made, dst)
        sync_parent(dst)


def work_folder_path(dst: Path) -> Path:
    """Path of the work folder of a conversion to `dst`."""
    return dst.with_name(f".{dst.name}.conversion")


def remove_finished_work_folder(dst: Path) -> None:
    """Remove the work folder of a conversion that ended after its last rename, before cleanup."""
    folder = work_folder_path(dst)
    if dst.exists() and (folder / PLACED).exists():
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def open_work_folder(dst: Path, fingerprint: Mapping[str, str]) -> Iterator[WorkFolder]:
    """Lock the work folder of `dst`, and remove it at exit, unless an exception leaves results to
    resume from (the compressed model, or the tokens if the disk is full).

    Raises UserError if `dst` exists, another process holds the lock, `fingerprint` differs from
    that of the folder, or for an error of the disk.
    """
    refuse_existing(dst)
    work = WorkFolder(work_folder_path(dst))
    try:
        work.folder.mkdir(exist_ok=True)
        with (work.folder / "lock").open("ab") as lock:
            lock_for_writing(lock, dst)
            request = work.folder / REQUEST
            if request.exists():
                check_same(
                    json.loads(request.read_text(encoding="utf-8")), fingerprint, work.folder
                )
            else:
                replace_file(request, json.dumps(fingerprint).encode())
            try:
                yield work
            except UserError as error:
                of_disk = isinstance(error.__cause__, OSError)
                is_begun = work.start.exists() or partial_path(work.start).exists()
                if not (is_begun or (of_disk and work.tokens.exists())):
                    shutil.rmtree(work.folder, ignore_errors=True)
                raise
            shutil.rmtree(work.folder, ignore_errors=True)
    except OSError as error:
        raise resumable_error(dst, work.folder, error) from error

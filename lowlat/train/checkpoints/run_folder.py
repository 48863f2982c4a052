"""Run folder: paths of its files, and a lock against a second training process.

RUN/lock            locked while a process trains here; holds its id and host
RUN/recipe.toml     the recipe as it ran
RUN/saves/          training checkpoints
RUN/log.jsonl       one record per step
RUN/tensorboard/    the same for TensorBoard
"""

import contextlib
import functools
import os
import socket
import sys
import weakref
from pathlib import Path
from typing import final

from lowlat.train.checkpoints.errors import using
from lowlat.utils.atomic_files import make_folder, replace_file
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import try_lock


@final
class RunFolder:
    """A run folder. The constructor touches no file; `acquire` or a `with` block locks the folder.

    Only the process with the lock may write or move checkpoints; any process may read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.checkpoints = self.path / "saves"
        self.log = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.recipe = self.path / "recipe.toml"
        self._lock_file = self.path / "lock"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> None:
        """Create the folder if it is missing, and lock it.

        The lock ends with the process, even if it is killed. Raises UserError if another process
        has the lock, if the folder has other files, or if it cannot be used.
        """
        assert not self.held
        with using(self.path):
            make_folder(self.path)
            if not self._lock_file.exists() and any(self.path.iterdir()):
                raise UserError(
                    f"{self.path}: is not empty and is not a run folder; name a new folder"
                )
            self._descriptor = _lock(self._lock_file)
            # A forked child shares the lock and would hold it after this process is killed.
            os.register_at_fork(after_in_child=functools.partial(_forget, weakref.ref(self)))
            try:
                make_folder(self.checkpoints)
                make_folder(self.tensorboard)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # an error can only concern the text in the lock file; the lock is released anyway
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def write_recipe(self, text: str) -> None:
        """Write the recipe's text into the folder, replacing the previous one."""
        assert self.held
        with using(self.recipe):
            replace_file(self.recipe, text.encode())

    def __enter__(self) -> "RunFolder":
        self.acquire()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()


def _lock(path: Path) -> int:
    """Descriptor with an flock, which the kernel drops with the last process that has it."""
    if sys.platform == "win32":
        raise UserError(
            f"{path}: runs are locked by flock, which Windows lacks; train in WSL instead"
        )
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not try_lock(descriptor):
            owner = os.pread(descriptor, 300, 0).decode(errors="replace").split()
            raise UserError(_refusal(path.parent, owner))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    return descriptor


def _forget(reference: "weakref.ref[RunFolder]") -> None:
    run = reference()
    if run is not None:
        run.release()


def _refusal(folder: Path, owner: list[str]) -> str:
    owner_name = "another process"
    if len(owner) == 2:
        here = owner[1] == socket.gethostname()
        owner_name = f"process {owner[0]}" + ("" if here else f" on {owner[1]}")
    return (
        f"{folder}: {owner_name} trains in this folder; wait for it to end or name another folder"
    )

"""Prompts and answers of the library reasoning-gym: procedural tasks, each entry made from a seed.

Records name their entry (task, config, index), from which the library makes it again to score an
answer; its metadata does not survive JSON. Some tasks use the global random generator or the order
of sets: entries repeat in processes with PYTHONHASHSEED=0 only, such as those of `rewards.workers`.
"""

import difflib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowlat.train.rewards.interpreter import command, environment
from lowlat.utils.atomic_files import replace_file
from lowlat.utils.errors import UserError

DATASETS_IN_MEMORY, ENTRIES_IN_MEMORY = 32, 256


def require(what: str) -> None:
    """Raise UserError, starting with `what`, if the library is missing."""
    try:
        import reasoning_gym  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{what} needs reasoning-gym ({error}); pip install 'lowlat[rewards]'"
        ) from error


@lru_cache(DATASETS_IN_MEMORY)
def _dataset(task: str, config: str) -> Any:
    from reasoning_gym.factory import (  # pyright: ignore[reportMissingImports]
        DATASETS,
        create_dataset,
    )

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"reasoning-gym has no task {task!r}{meant}")
    random.seed(0)
    try:
        return create_dataset(task, **json.loads(config))
    except (ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "rejects its settings"
        raise UserError(f"reasoning-gym task {task}: {reason}") from error


@lru_cache(ENTRIES_IN_MEMORY)
def _entry(task: str, config: str, index: int) -> dict[str, Any]:
    dataset = _dataset(task, config)
    random.seed(0)
    return dataset[index]


def entry_of(reference: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The dataset and entry that a record names. Raises UserError for an unknown task."""
    config = json.dumps(reference["config"], sort_keys=True)
    task, index = reference["task"], reference["index"]
    return _dataset(task, config), _entry(task, config, index)


def record_of(task: str, config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """An entry as a record: prompt (a chat), answer (None if a task has several) and the reference
    that reasoning_gym_reward needs. `config` has the dataset's seed and size, and settings of the
    task.
    """
    reference = {"task": task, "config": config, "index": index}
    _, entry = entry_of(reference)
    return {
        "prompt": [{"role": "user", "content": entry["question"]}],
        "answer": entry["answer"],
        "reasoning_gym": reference,
    }


def write_records(
    path: Path,
    task: str,
    config: Mapping[str, Any],
    *,
    system_prompt: str | None = None,
    is_text: bool = False,
) -> None:
    """Write the entries of a task as JSON Lines, complete or not at all.

    config: `size`, `seed` and settings of the task's config class. is_text: prompts are the
    question and a line break, for models without a chat template.

    Raises UserError for an unknown task or setting.
    """
    # The library makes entry i from seed + i: entries of consecutive seeds would be the same.
    config = {**config, "seed": random.Random(config.get("seed", 0)).getrandbits(31)}
    (records,) = generate([(task, config)])
    if isinstance(records, UserError):
        raise records
    lines = [json.dumps(_with_prompt(record, system_prompt, is_text)) for record in records]
    replace_file(path, "".join(f"{line}\n" for line in lines).encode())


def generate(
    tasks: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[list[dict[str, Any]] | UserError]:
    """The records of each (task, config), from one process of their own.

    Raises UserError if that process fails; an unknown task or setting is returned.
    """
    done = subprocess.run(
        command(__name__),
        input=json.dumps(tasks).encode(),
        capture_output=True,
        env=environment(),
        check=False,
    )
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"reasoning-gym tasks cannot be generated ({last})")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [UserError(records) if isinstance(records, str) else records for records in found]


def _with_prompt(
    record: dict[str, Any], system_prompt: str | None, is_text: bool
) -> dict[str, Any]:
    if is_text:
        start = "" if system_prompt is None else f"{system_prompt}\n"
        return record | {"prompt": f"{start}{record['prompt'][0]['content']}\n"}
    if system_prompt is not None:
        system = {"role": "system", "content": system_prompt}
        return record | {"prompt": [system, *record["prompt"]]}
    return record


def main() -> None:
    """Read a list of tasks; write a line of JSON for each, its records or an error."""
    tasks = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="ascii") as out:
        os.dup2(2, 1)  # the library prints
        for task, config in tasks:
            try:
                require("lowlat data reasoning-gym")
                answer = [record_of(task, config, index) for index in range(config["size"])]
            except UserError as error:
                answer = str(error)
            out.write(json.dumps(answer) + "\n")

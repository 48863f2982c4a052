"""Puts a mutant into a process that has imported the module: the code of its functions is replaced.

Where a mistake is outside function bodies (a default, a constant, a class attribute), or in what
has run at import, the module must be imported anew.
"""

import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

Key = tuple[str, str, int]
"""File, qualified name and first line of a function."""


class NotInFunctions(Exception):
    """The sources differ outside function bodies, or in a function that does not exist now."""


class Functions:
    """The functions of all modules below a folder that are loaded now."""

    def __init__(self, folder: Path) -> None:
        self._found: dict[Key, list[FunctionType]] = {}
        gc.unfreeze()
        for each in gc.get_objects():
            if type(each) is FunctionType and each.__code__.co_filename.startswith(f"{folder}/"):
                self._found.setdefault(_key(each.__code__), []).append(each)
        gc.freeze()
        self._files = {key[0] for key in self._found}

    def swap(self, path: Path, old: str, new: str) -> None:
        """Make the functions of the module at `path` those of the source `new`, not `old`.

        Raises NotInFunctions if that is not the whole difference. A module that is not loaded is
        left to its import.
        """
        if f"{path}" not in self._files:
            return
        before, after = (compile(text, path, "exec", dont_inherit=True) for text in (old, new))
        try:
            for outer, code in list(_differences(before, after)):
                functions = self._found.get(_key(outer), [])
                if not functions:
                    raise NotInFunctions(outer.co_qualname)
                for function in functions:
                    function.__code__ = code
        except ValueError as error:  # another number of free variables
            raise NotInFunctions(str(error)) from error


def _key(code: CodeType) -> Key:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _differences(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Outermost functions that differ, and what each becomes."""
    if _content(old) == _content(new):
        return
    if old.co_flags & inspect.CO_OPTIMIZED:  # a function; modules and classes have no such flag
        yield old, new
        return
    if _content(old, is_deep=False) != _content(new, is_deep=False):
        raise NotInFunctions(old.co_qualname)
    for inner, other in zip(_inner(old), _inner(new), strict=True):
        yield from _differences(inner, other)


def _inner(code: CodeType) -> list[CodeType]:
    return [each for each in code.co_consts if isinstance(each, CodeType)]


def _content(code: CodeType, *, is_deep: bool = True) -> tuple[object, ...]:
    """What a code object does, without its place in the file, and if not `is_deep` without those
    inside it.
    """
    constants = [
        (_content(each) if is_deep else None) if isinstance(each, CodeType) else repr(each)
        for each in code.co_consts
    ]
    names = (code.co_qualname, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    return (code.co_code, code.co_exceptiontable, *names, *counts, *constants)

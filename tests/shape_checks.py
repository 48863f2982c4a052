"""Fast run-time checks of shapes and types: what jaxtyping's import hook decorates lowlat with.

jaxtyping's own decorator binds the arguments of every call, checks them twice and builds the
check of a dataclass anew for each instance. Here each function and each dataclass is compiled
once, when it is first called, and only functions with shapes get a scope for their axis names.

In each test a function's first calls are checked, then every call whose number is a power of two:
a test calls few functions thousands of times, and those checks took a third of the suite's time.
LOWLAT_CHECK_EVERY_CALL=1 checks every call.
"""

import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_typed = beartype(conf=BeartypeConf(violation_type=TypeError))
_scope = functools.partial(jaxtyping.jaxtyped, "context")
FIRST = 2**62 if os.environ.get("LOWLAT_CHECK_EVERY_CALL") else 4
"""Calls of each function in each test that are all checked."""
_inner: dict[tuple[str, str, int], list[int]] = {}
"""Number of calls in this test of functions inside others: one for all instances."""
_called: list[list[int]] = []
"""All counts that are not 0."""


def install() -> None:
    """Replace the decorator that the import hook applies. Call before lowlat is imported."""
    jaxtyping.jaxtyped = lambda *, typechecker: checked


def checked(target: Any) -> Any:
    """`target` with the check of its arguments and result; the fields, of a dataclass."""
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = _checked_function(target.__init__)
        return target
    return _checked_function(target)


def new_test() -> None:
    """Check the first calls of every function again."""
    for count in _called:
        count[0] = 0
    _called.clear()


def _checked_function(function: Callable[..., Any]) -> Callable[..., Any]:
    hints = function.__annotations__
    # A function inside another would be compiled at every call of that one.
    if not hints or ("<locals>" in function.__qualname__ and not _has_shapes(function)):
        return function
    code = function.__code__
    if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return _compiled(function)
    count, typed = [0], None
    if "<locals>" in function.__qualname__:
        place = (code.co_filename, function.__qualname__, code.co_firstlineno)
        count = _inner.setdefault(place, count)

    @functools.wraps(function)
    def sometimes(*args: Any, **kwargs: Any) -> Any:
        nonlocal typed
        count[0] = number = count[0] + 1
        if number > FIRST and number & (number - 1):
            return function(*args, **kwargs)
        if number == 1:
            _called.append(count)
        if typed is None:
            typed = _compiled(function)
        return typed(*args, **kwargs)

    return sometimes


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the check of every call."""
    typed = _typed(_without_forward_references(function))
    if not _has_shapes(function):
        return typed

    @functools.wraps(function)
    def in_scope(*args: Any, **kwargs: Any) -> Any:
        with _scope():
            return typed(*args, **kwargs)

    return in_scope


def _has_shapes(function: Callable[..., Any]) -> bool:
    return any("jaxtyping" in repr(hint) for hint in function.__annotations__.values())


def _without_forward_references(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy without hints in quotes, whose names may be known to type checkers only."""
    hints = {k: v for k, v in function.__annotations__.items() if not isinstance(v, str)}
    if len(hints) == len(function.__annotations__):
        return function
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = hints
    del copy.__wrapped__
    return copy

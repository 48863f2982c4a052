"""Fast run-time checks of shapes and types: what jaxtyping's import hook decorates lowlat with.

jaxtyping's own decorator binds the arguments of every call, checks them twice and builds the
check of a dataclass anew for each instance. Here each function and each dataclass is compiled
once, and only functions with shapes get a scope for their axis names.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_typed = beartype(conf=BeartypeConf(violation_type=TypeError))
_scope = functools.partial(jaxtyping.jaxtyped, "context")


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


def _checked_function(function: Callable[..., Any]) -> Callable[..., Any]:
    hints = function.__annotations__
    # A function inside another would be compiled at every call of that one.
    if not hints or ("<locals>" in function.__qualname__ and not _has_shapes(function)):
        return function
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

"""Replacement of modules in a model: the parameters stay the same objects under the same names."""

from collections.abc import Callable

from torch import nn


def replace_modules(
    root: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> None:
    """Replace every module below `root` for which replacement(path, module) is not None.

    A module's submodules are replaced before it, so a replacement adopts replaced submodules.
    Replaced modules are freed one by one.
    """
    modules = dict(root.named_modules())
    while modules:
        path, module = modules.popitem()
        if path and (new := replacement(path, module)) is not None:
            parent, _, name = path.rpartition(".")
            modules[parent].add_module(name, new)


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Initialise `new`, which replaces `old`, with the settings, parameters and submodules of
    `old`.
    """
    nn.Module.__init__(new)
    for name, value in vars(old).items():
        if not name.startswith("_"):
            setattr(new, name, value)
    for name, parameter in old.named_parameters(recurse=False):
        new.register_parameter(name, parameter)
    for name, module in old.named_children():
        new.add_module(name, module)

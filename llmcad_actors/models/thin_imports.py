"""Import torch and transformers without the parts that never run here: 90 MB less in each process that has them.

transformers marks some of its functions for torch's compiler, and prepares for tensors spread over many machines. The
marks alone bring in the compiler and sympy. Nothing here is compiled or spread, so two modules are deferred: they stand
in `sys.modules`, the compiler's with its decorators as plain functions, and the first question for anything else, or
for a part of them, runs the real modules in their place. And torch says that it has no distributed part, as a build
without it does. transformers lists the names of all its models twice, 0.2 s each; here, once.

`install` comes before the first import of torch; it knows no model.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from llmcad_actors.machine import versions

T = TypeVar("T")

MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators for the compiler, which change nothing where nothing is compiled."""

SHAPES = "torch._meta_registrations"
"""Shapes of operators on the meta device; most operators know their own."""

DEFERRED: dict[str, Sequence[str]] = {SHAPES: (), "torch._dynamo": MARKS}
"""Modules whose code waits, in the order in which they must run, and the decorators that they have until then."""

ALONE = "torch._dynamo._trace_wrapped_higher_order_op"
"""The part of the compiler that transformers' masks always import; it needs no other part."""


def is_tested() -> bool:
    """Whether the installed torch is one that this was tested with. Imports nothing.

    Which modules wait, and in which order they run, is a matter of torch's own imports.
    """
    return versions.is_tested("torch")


def install() -> bool:
    """Import torch with the modules deferred; False, and nothing done, where torch is imported or untested."""
    if "torch" in sys.modules or not is_tested():
        return False
    sys.meta_path.insert(0, DeferringFinder())
    import torch

    torch.distributed.is_available = _no
    if versions.is_tested("transformers"):
        _list_models_once()
    return True


class DeferredModule(ModuleType):
    """A module whose code has not run; it runs when an attribute is asked for that is not there yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by the import system, of every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        run_deferred(*DEFERRED)
        return getattr(self, name)


def with_shapes(build: Callable[[], T]) -> T:
    """What `build` returns; it is called again, with the shapes of all operators, if an operator does not know its own.

    Raises what `build` raises.
    """
    try:
        return build()
    except NotImplementedError:
        if not run_deferred(SHAPES):
            raise
    return build()


def run_deferred(*names: str) -> bool:
    """Run the code of these deferred modules now, in their order; False when none is waiting."""
    waiting = [module for name in names if isinstance(module := sys.modules.get(name), DeferredModule)]
    for module in waiting:
        spec = module.__spec__
        assert spec is not None and isinstance(spec.loader, DeferringLoader)
        module.__class__ = ModuleType  # type: ignore[assignment]
        module.__loader__ = spec.loader = spec.loader.real
        spec.loader.exec_module(module)
    return bool(waiting)


class DeferringLoader(Loader):
    def __init__(self, real: Any, decorators: Sequence[str]) -> None:
        self.real = real
        self._decorators = decorators

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(dict.fromkeys(self._decorators, _unchanged))


class PresentLoader(Loader):
    """Of a module that was imported while it was looked for."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
        module.__loader__ = self._spec.loader if self._spec else None


class DeferringFinder(MetaPathFinder):
    """Finds the modules of `DEFERRED` where they are, and defers them; a part of one brings in the whole."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in DEFERRED:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = DeferringLoader(spec.loader, DEFERRED[name])
            return spec
        package = sys.modules.get(name.rpartition(".")[0])
        if name != ALONE and isinstance(package, DeferredModule):
            run_deferred(*DEFERRED)
            return ModuleSpec(name, PresentLoader(sys.modules[name])) if name in sys.modules else None
        return None


def _list_models_once() -> None:
    """transformers remembers the names below a path, and asks for the same folder's by two paths."""
    from transformers.utils import import_utils  # after transformers itself, which lists them by the folder's path

    names_below = import_utils.create_import_structure_from_path

    def names(path: str | Path) -> Any:
        return names_below(Path(path).parent if Path(path).is_file() else path)

    import_utils.create_import_structure_from_path = names


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """As a decorator, with or without settings: the function itself."""
    return (lambda inner: inner) if function is None else function


def _no() -> bool:
    return False

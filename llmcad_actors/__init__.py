"""Run language models bigger than the memory you give them, with exactly the model's own output.

The door. Names are imported when first asked for, so that the parts that know no Ray can be used without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcad_actors.config import EngineConfig
    from llmcad_actors.core.lossless import LosslessCheck
    from llmcad_actors.core.stats import Stats
    from llmcad_actors.engine import Engine
    from llmcad_actors.errors import (
        ActorFailure,
        CheckpointError,
        ConfigError,
        DeadlineError,
        EngineBusyError,
        EngineClosedError,
        LlmcadError,
        MemoryCapError,
        OverBudgetError,
        RuntimeFailure,
        StorageError,
        TokenizerError,
        UserError,
    )
    from llmcad_actors.requests.generation import Generation
    from llmcad_actors.results import Piece, Result, Status

    __version__: str

_ERRORS = (
    "ActorFailure CheckpointError ConfigError DeadlineError EngineBusyError EngineClosedError LlmcadError "
    "MemoryCapError OverBudgetError RuntimeFailure StorageError TokenizerError UserError"
)
_HOMES = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Generation": "requests.generation",
    "LosslessCheck": "core.lossless",
    "Piece": "results",
    "Result": "results",
    "Stats": "core.stats",
    "Status": "results",
} | dict.fromkeys(_ERRORS.split(), "errors")

__all__ = [
    "ActorFailure",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "EngineConfig",
    "Generation",
    "LlmcadError",
    "LosslessCheck",
    "MemoryCapError",
    "OverBudgetError",
    "Piece",
    "Result",
    "RuntimeFailure",
    "Stats",
    "Status",
    "StorageError",
    "TokenizerError",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module(f"{__name__}.machine.versions").own_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

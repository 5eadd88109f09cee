"""Run language models bigger than the memory you give them, with exactly the model's own output."""

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.stats import Stats
from llmcad_actors.engine import Engine
from llmcad_actors.errors import (
    ActorFailure,
    CheckpointError,
    ConfigError,
    DeadlineError,
    LlmcadError,
    MemoryCapError,
    OverBudgetError,
    RuntimeFailure,
    StorageError,
    TokenizerError,
    UserError,
)
from llmcad_actors.results import Piece, Result, Status

__all__ = [
    "ActorFailure",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "Engine",
    "EngineConfig",
    "LlmcadError",
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

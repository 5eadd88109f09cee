"""The exception tree. Everything raised for a caller is an `LlmcadError`.

LlmcadError
  UserError                 the caller can mend it; the CLI prints the message and exits with 2
    ConfigError             an option or a configuration file
    CheckpointError         a model directory (missing, truncated, inconsistent, unsupported)
    TokenizerError          no tokenizer, or draft and target disagree
    MemoryCapError          the cap is too small, or not free; the message names the smallest that works
    StorageError            a folder or disk that cannot take or give what is asked
  RuntimeFailure            the run broke; exit code 1
    ActorFailure            an actor died or raised
    DeadlineError           a wait passed its deadline
    EngineBusyError         another request, or another engine of this process, is in the way
    EngineClosedError       the engine has been closed
    OverBudgetError         a byte budget would have been exceeded (a bug, never a user's mistake)
"""


class LlmcadError(Exception):
    """Base of everything llmcad raises on purpose."""

    exit_code = 1


class UserError(LlmcadError):
    """Bad input: the message says what is wrong and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """An option or a configuration file is wrong."""


class CheckpointError(UserError):
    """A model directory cannot be used."""


class TokenizerError(UserError):
    """A tokenizer is missing, or draft and target do not share one."""


class MemoryCapError(UserError):
    """The memory cap is too small for the job, or more than what is free now."""


class StorageError(UserError):
    """A folder or a disk cannot take or give what is asked."""


class RuntimeFailure(LlmcadError):
    """The run broke through no fault of the input."""


class ActorFailure(RuntimeFailure):
    """An actor died or raised."""


class DeadlineError(RuntimeFailure):
    """A wait passed its deadline."""


class EngineBusyError(RuntimeFailure):
    """Another request, or another engine of this process, is in the way; the message says what to do about it."""


class EngineClosedError(RuntimeFailure):
    """The engine has been closed: it answers nothing any more."""


class OverBudgetError(RuntimeFailure):
    """A byte budget would have been exceeded."""

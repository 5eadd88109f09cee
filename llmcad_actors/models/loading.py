"""What transformers makes of a model's files, which may say what it does not expect."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcad_actors.core.quoting import shown
from llmcad_actors.errors import CheckpointError, LlmcadError


@contextmanager
def reads_model(path: Path) -> Iterator[None]:
    """Around calls of transformers that build a model: their exceptions, of any kind, become `CheckpointError`."""
    try:
        yield
    except LlmcadError:
        raise
    except Exception as error:  # a value that only transformers looks at may make it raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"transformers cannot build the model of {shown(path)} ({type(error).__name__}: {shown(why)}); config.json "
            "is damaged or of another version: fetch the model again."
        ) from None

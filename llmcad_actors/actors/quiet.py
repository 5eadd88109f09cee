"""What the libraries in an actor's process would say to a terminal: nothing.

On a Ray of ours nobody hears them. On the caller's, whose environment is not ours to set, Ray prints what actors print.
"""

import os
import warnings

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",  # no matter of words: grouped heads without copying keys and values
    "TRANSFORMERS_VERBOSITY": "error",
}


def before_imports() -> None:
    """For a process that is an actor's alone, before it imports torch and transformers."""
    os.environ.update(ENVIRONMENT)
    warnings.simplefilter("ignore")


def after_imports() -> None:
    """For a process that may have had transformers before it became the actor's."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

"""What a caller asks for with a prompt, checked: in the caller's words, not yet in tokens."""

import os
from collections.abc import Sequence
from pathlib import Path

from llmcad_actors.core import checks
from llmcad_actors.trace.file import check_writable

MOST_TOKENS = 10**12


class RequestOptions:
    """One request's options. Raises `ConfigError` for a value that cannot be, `UserError` for an unwritable trace."""

    def __init__(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        speculate: bool = True,
        provisional: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        self.prompt = checks.text("prompt", prompt)
        self.max_new_tokens = checks.whole_number("max_new_tokens", max_new_tokens, 1, MOST_TOKENS)
        self.stop = checks.stop_strings("stop", stop)
        self.chat = checks.flag("chat", chat)
        self.speculate = checks.flag("speculate", speculate)
        self.provisional = checks.flag("provisional", provisional)
        self.trace = None if trace is None else Path(checks.path("trace", trace, "a path"))
        check_writable(self.trace)

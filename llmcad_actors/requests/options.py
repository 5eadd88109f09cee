"""What a caller asks for with a prompt, checked: in the caller's words, not yet in tokens."""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any, TypedDict, TypeVar

from llmcad_actors.core import checks
from llmcad_actors.core.choosing import Choosing
from llmcad_actors.errors import ConfigError

MOST_TOKENS = 10**12
MOST_LOGPROBS = 100
MOST_SECONDS = 10**7
F = TypeVar("F", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """Of `Engine.submit`, as keyword arguments."""

    max_new_tokens: int
    stop: str | Sequence[str]
    chat: bool
    speculate: bool
    provisional: bool
    queue_timeout: float | None
    sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None


DOCUMENTATION = """
    max_new_tokens: at most; 1 or more (128). What the planned context has no room for is left out.
    stop: a string that ends the text, or several; none of them is part of it.
    chat: `prompt` is a user's message, and the model's chat template goes around it.
    speculate: False asks for one token a pass, without the draft; the text is the same.
    provisional: of pieces: also the draft's guesses while a pass runs; the next piece that is not one replaces them.
    queue_timeout: seconds that the request may wait for its turn; None: as long as it takes.

    temperature: above 0, tokens are drawn from the target's distribution, exactly; 0, the default, takes the most
      probable one. The text depends on the seed alone, whatever the draft, the policy and other requests do.
    top_k, top_p, min_p: draw among the k most probable tokens; among the most probable ones that have p of the
      probability together; among those at least so likely, as a share of the most probable one's.
    sample: take what is not given of these from the model's generation config.
    repetition_penalty: as transformers has it, 1.0: none; None: as the generation config says.
    presence_penalty, frequency_penalty: as the OpenAI API has them, for tokens of the output so far.
    logit_bias: what is added to the logits of tokens, by their ids.
    seed: of the draws, below 2**64; None: a random one, which the result names.
    logprobs: tell the target's own log-probability of every token, and of so many alternatives to it."""


def documents_options(function: F) -> F:
    """Adds what there is to say of `Options` to the documentation of a function that takes them as keywords."""
    function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n{indent(DOCUMENTATION, ' ' * 4)}\n"
    return function


class RequestOptions:
    """One request's options. Raises `ConfigError` for a value that cannot be."""

    def __init__(self, prompt: str, given: Mapping[str, Any], asked: Mapping[str, Any] | None = None) -> None:
        """given: as `Options` has them. asked: what the model's generation config asks for, followed with `sample`."""
        checks.known_names("option", given, tuple(Options.__annotations__))
        self.prompt = checks.text("prompt", prompt)
        self.max_new_tokens = checks.whole_number("max_new_tokens", given.get("max_new_tokens", 128), 1, MOST_TOKENS)
        self.stop = checks.stop_strings("stop", given.get("stop", ()))
        flags = {"chat": False, "speculate": True, "provisional": False, "sample": False}
        self.chat, self.speculate, self.provisional, self.sample = (
            checks.flag(name, given.get(name, default)) for name, default in flags.items()
        )
        self.queue_s = _optional(checks.number, "queue_timeout", given, 0.0, MOST_SECONDS)
        self.choosing = choosing_of({**(asked or {}), **given} if self.sample else given, sample=self.sample)


def choosing_of(given: Mapping[str, Any], *, sample: bool = False) -> Choosing:
    """Raises `ConfigError` for a value that cannot be."""
    temperature = _optional(checks.number, "temperature", given, 0.0, 100.0)
    if temperature is None:
        temperature = 1.0 if sample else 0.0
    seed = _optional(checks.whole_number, "seed", given, 0, 2**64 - 1)
    return Choosing(
        temperature=temperature,
        top_k=_optional(checks.whole_number, "top_k", given, 0, 10**9) or 0,
        top_p=_or(1.0, _optional(checks.number, "top_p", given, 0.0, 1.0)),
        min_p=_or(0.0, _optional(checks.number, "min_p", given, 0.0, 1.0)),
        repetition_penalty=_optional(checks.number, "repetition_penalty", given, 1e-3, 1e3),
        presence_penalty=_or(0.0, _optional(checks.number, "presence_penalty", given, -100.0, 100.0)),
        frequency_penalty=_or(0.0, _optional(checks.number, "frequency_penalty", given, -100.0, 100.0)),
        logit_bias=checks.biases("logit_bias", given.get("logit_bias") or {}),
        seed=(secrets.randbits(32) if temperature > 0 else 0) if seed is None else seed,
        logprobs=_optional(checks.whole_number, "logprobs", given, 0, MOST_LOGPROBS),
    )


def check_ids(choosing: Choosing, vocab: int) -> None:
    """Raises `ConfigError` for a token id that the target's vocabulary does not have."""
    for token, _ in choosing.logit_bias:
        if token >= vocab:
            raise ConfigError(f"logit_bias: the target has no token {token}; its ids lie below {vocab}")


def trace_path(trace: str | os.PathLike[str] | None) -> Path | None:
    """Raises `ConfigError` for what is no path."""
    return None if trace is None else Path(checks.path("trace", trace, "a path"))


def _optional(check: Callable[..., Any], name: str, given: Mapping[str, Any], *limits: Any) -> Any:
    return None if given.get(name) is None else check(name, given[name], *limits)


def _or(default: float, value: float | None) -> float:
    return default if value is None else value

"""The prompt before anything starts: whether it is text, where it comes from, and whether the model has room for it."""

import sys
from typing import TYPE_CHECKING, BinaryIO

from llmcad_actors.core.checks import not_utf8
from llmcad_actors.errors import ConfigError

if TYPE_CHECKING:
    from llmcad_actors.plan.job import Prepared

MOST_BYTES = 64 << 20
"""Of a prompt: more than any model takes."""

TEMPLATE_TOKENS = 16
"""Special tokens that a tokenizer puts around a text, at most."""

CERTAINLY = 1.1
"""A count without transformers is near the true one; so far above what fits, the prompt is too long in any case."""


def read_standard_input() -> str:
    """All of it, line ends as \\n. Raises `ConfigError` for what is not UTF-8, not readable or without an end."""
    if sys.stdin is None:
        raise ConfigError("there is no standard input to read the prompt from; give the prompt as an argument")
    try:
        data = _read(sys.stdin.buffer)
    except OSError as error:
        raise ConfigError(f"standard input cannot be read: {error.strerror}; give the prompt as an argument") from None
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8("the prompt (standard input)", error.start, data[error.start]) from None


def _read(stream: BinaryIO) -> bytes:
    data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ConfigError(f"standard input has more than {MOST_BYTES >> 20} MiB; no model takes such a prompt")
    return data


def check_prompt(job: "Prepared", text: str, max_new_tokens: int, *, chat: bool = False) -> tuple[str, ...]:
    """Raises `ConfigError` for a prompt that the model, or the plan, has no room for; returns what to say of it.

    Counts tokens only where it may matter: tokenizers join bytes, and the few texts of which they make more are found
    out when the engine counts. So is a prompt little too long for a model where transformers has a say in the tokens.
    """
    if chat:
        text = job.chat_template().render(text)
    if max_new_tokens <= job.room(len(text.encode()) + TEMPLATE_TOKENS):
        return ()
    counted, is_exact = count_tokens(job, text, chat)
    if is_exact or counted > CERTAINLY * job.context:
        room_behind(job, counted)
    room = max(job.room(counted), 0)
    if not counted or not room or max_new_tokens <= room:
        return ()
    about, more = "" if is_exact else "about ", _more(job, _needed(job, counted, max_new_tokens))
    return (
        f"there is room for {about}{room} new tokens, not for {max_new_tokens}: the prompt has {about}{counted}, "
        f"{_limits(job)}{more}",
    )


def count_tokens(job: "Prepared", text: str, chat: bool = False) -> tuple[int, bool]:
    """Of the prompt, and whether that is exact; elsewhere only transformers can tell. (0, False): not known at all."""
    from llmcad_actors.text.tokenizer import is_plain, read_tokenizer

    path = job.target.path
    if not (path / "tokenizer.json").is_file():
        return 0, False
    is_exact = is_plain(path)
    tokenizer = read_tokenizer(path)
    return len(tokenizer.encode(text, add_special_tokens=is_exact and not chat).ids), is_exact


def room_behind(job: "Prepared", num_tokens: int) -> int:
    """New tokens that fit behind a prompt of so many. Raises `ConfigError` where there is room for none."""
    room = job.room(num_tokens)
    if room < 1:
        needed = _needed(job, num_tokens, 1)
        less = f"; shorten it by at least {needed - job.model_context}" if needed > job.model_context else ""
        raise ConfigError(f"the prompt has {num_tokens} tokens, {_limits(job)}{less or _more(job, needed)}")
    return room


def _needed(job: "Prepared", num_tokens: int, new_tokens: int) -> int:
    """The context that holds both."""
    return max(num_tokens, new_tokens + 1) if job.is_encoder_decoder else num_tokens + new_tokens


def _limits(job: "Prepared") -> str:
    """What the model takes, and what is planned for."""
    what = "for prompt and output each" if job.is_encoder_decoder else "in all"
    planned = f" ({job.context} are planned for)" if job.context < job.model_context else ""
    return f"and {job.target_name} takes at most {job.model_context} {what}{planned}"


def _more(job: "Prepared", needed: int) -> str:
    """How to plan for more, where the model takes more."""
    context = min(needed, job.model_context)
    return f"; give --max-context {context} (max_context={context})" if context > job.context else ""

"""What a model's generation_config.json asks for beyond the plain arg max, and its special tokens. No torch here.

Sampling settings are left alone: greedy is asked for, as by `generate(do_sample=False)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmcad_actors.core.quoting import quoted
from llmcad_actors.errors import CheckpointError
from llmcad_actors.families.family import MOST, is_positive

Settings = Mapping[str, Any]
"""generation_config.json; config.json where there is none, as transformers reads older models."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A setting that changes greedy output."""

    is_valid: Callable[[Any, int], bool]  # value, vocabulary
    expected: str
    neutral: tuple[Any, ...] = ()  # values that ask for nothing, besides none


def _is_count(value: Any, vocab: int) -> bool:
    return _is_number(value) and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) <= MOST


def _is_id(value: Any, vocab: int) -> bool:
    return _is_count(value, vocab) and value < vocab


def _are_ids(value: Any, vocab: int) -> bool:
    return isinstance(value, list) and all(_is_id(item, vocab) for item in value)


def _is_id_or_ids(value: Any, vocab: int) -> bool:
    return _is_id(value, vocab) or _are_ids(value, vocab)


def _are_words(value: Any, vocab: int) -> bool:
    return isinstance(value, list) and all(_are_ids(word, vocab) and word for word in value)


def _is_factor(value: Any, vocab: int) -> bool:
    return isinstance(value, float) and is_positive(value)


def _are_token_ids(value: Any, vocab: int) -> bool:
    return isinstance(value, list) and all(_is_number(item) for item in value)


SUPPORTED: dict[str, Rule] = {
    "repetition_penalty": Rule(_is_factor, "a number above 0 with a decimal point", (1.0,)),
    "no_repeat_ngram_size": Rule(_is_count, "a whole number", (0,)),
    "bad_words_ids": Rule(_are_words, "a list of lists of token ids", ([],)),
    "min_length": Rule(_is_count, "a whole number", (0,)),
    "min_new_tokens": Rule(_is_count, "a whole number", (0,)),
    "forced_bos_token_id": Rule(_is_id, "a token id"),
    "forced_eos_token_id": Rule(_is_id_or_ids, "a token id or a list of them", ([],)),
    "suppress_tokens": Rule(_are_token_ids, "a list of token ids", ([],)),
    "begin_suppress_tokens": Rule(_are_token_ids, "a list of token ids", ([],)),
}
"""transformers has a logits processor for each."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "guidance_scale": (1, 1.0),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "constraints": ([],),
    "stop_strings": ([],),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
}
"""Settings that would change greedy output too, by the values that ask for nothing."""


def active_rules(settings: Settings, vocab: int) -> dict[str, Any]:
    """The supported settings that ask for something, by name.

    Raises `CheckpointError` for a value that cannot be. `vocab`: token ids lie below it.
    """
    active = {
        name: settings[name]
        for name, rule in SUPPORTED.items()
        if settings.get(name) is not None and settings[name] not in rule.neutral
    }
    for name, value in active.items():
        if not SUPPORTED[name].is_valid(value, vocab):
            raise CheckpointError(
                f"generation_config.json: {name} must be {SUPPORTED[name].expected} (ids below {vocab}), found "
                f"{quoted(value)}; correct the file, or remove the setting"
            )
    if settings.get("min_new_tokens") is not None:
        active.pop("min_length", None)  # as in `generate`, it takes the place of min_length, even when it is 0
    return active


SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""Of a model that samples: what holds where its generation config does not say otherwise, as in `generate`."""


_RANGES = {"temperature": (0, 100), "top_k": (0, 10**9), "top_p": (0, 1), "min_p": (0, 1)}


def sampling_of(settings: Settings) -> dict[str, Any]:
    """How the model would sample, by the names of our options; empty where it would not.

    Raises `CheckpointError` for a value that cannot be.
    """
    if settings.get("do_sample") is not True:
        return {}
    found = {name: default if settings.get(name) is None else settings[name] for name, default in SAMPLING.items()}
    for name, value in found.items():
        least, most = _RANGES[name]
        is_number = type(value) in ((int,) if name == "top_k" else (int, float))
        if not is_number or not least <= value <= most:
            kind = "whole number" if name == "top_k" else "number"
            raise CheckpointError(
                f"generation_config.json: {name} must be a {kind} from {least} to {most}, found {quoted(value)}; "
                "correct the file, or remove the setting"
            )
    return found


def ignored_rules(settings: Settings) -> tuple[str, ...]:
    """Settings that would change greedy output and are not supported."""
    return tuple(
        name
        for name, neutral in UNSUPPORTED.items()
        if settings.get(name) is not None and settings[name] not in neutral
    )


def stop_tokens(settings: Settings) -> tuple[int, ...]:
    """End-of-text ids; none where the settings name none. One beyond the vocabulary never occurs, and does no harm.

    Raises `CheckpointError` for what is no id.
    """
    eos = settings.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(_is_number(item) for item in ids):
        raise _no_id("eos_token_id", "a token id or a list of them", eos)
    return tuple(ids)


def first_token(config: Settings, vocab: int) -> int | None:
    """The id that begins a text; None where config.json names none. Raises `CheckpointError` for what is no id."""
    bos = config.get("bos_token_id")
    if bos is not None and not _is_number(bos):
        raise _no_id("bos_token_id", "a token id", bos)
    return bos if _is_id(bos, vocab) else None


def start_token(settings: Settings, config: Settings) -> int:
    """The token that an encoder-decoder model's output begins with, as transformers finds it.

    settings: generation_config.json. Raises CheckpointError where no file names one.
    """
    for source in (settings, config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (value := source.get(name)) is not None:
                if not _is_id(value, config.get("vocab_size", MOST)):
                    raise _no_id(name, "a token id of the vocabulary", value)
                return int(value)
    raise CheckpointError(
        "neither generation_config.json nor config.json names the token that the decoder starts with "
        "(decoder_start_token_id); write it into generation_config.json, as the model's card says"
    )


def _no_id(name: str, expected: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{name} must be {expected}, found {quoted(value)}; correct the model's json file")

"""Text to ids and back, exactly as transformers' `AutoTokenizer` for the directory does, without importing torch.

A directory whose tokenizer class adds nothing to its tokenizer.json is read by `tokenizers` alone. For any other, a
short-lived process builds the AutoTokenizer and hands over its backend as JSON (`tokenizer_child.py`).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.errors import TokenizerError
from llmcad_actors.storage.small_file import TOKENIZER_BYTES, TOKENIZER_CONFIG_BYTES, read_object, read_small

_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
_CHANGES_ENCODING = ("add_bos_token", "add_eos_token", "add_prefix_space", "auto_map")


def is_plain(path: Path) -> bool:
    """Whether the directory's tokenizer.json alone decides the ids; elsewhere transformers has a say."""
    config = tokenizer_config(path)
    kind = config.get("tokenizer_class")
    plain = isinstance(kind, str) and kind in _PLAIN_CLASSES and not any(config.get(k) for k in _CHANGES_ENCODING)
    return plain and (path / "tokenizer.json").is_file()


def auto_tokenizer(path: Path) -> Any:
    """The directory's AutoTokenizer. Imports transformers, and torch where it may be imported.

    Raises `TokenizerError` when there is none (no tokenizer files, or one that transformers cannot load).
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever transformers makes of files that are not as it expects
        raise TokenizerError(
            f"{path} has no tokenizer that transformers can load ({shown(error)}); copy the model's tokenizer files "
            "(tokenizer.json, tokenizer_config.json) into the directory"
        ) from None


def backend_json(tokenizer: Any, path: Path) -> str:
    """The backend of a directory's AutoTokenizer, as JSON for `tokenizers`. Raises `TokenizerError` without one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"{path}: the tokenizer has no fast version; save one with `save_pretrained` first")
    return str(_whole_text(backend).to_str())


def _whole_text(tokenizer: Tokenizer) -> Tokenizer:
    """As transformers uses it: the file's own cutting and filling of texts to a length is for training."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json of a directory. Raises `TokenizerError` when it is missing or broken."""
    file = path / "tokenizer.json"
    if not os.path.lexists(file):
        raise TokenizerError(
            f"{shown(path)} has no tokenizer.json; copy the model's tokenizer files into the directory"
        )
    try:
        return _whole_text(Tokenizer.from_buffer(read_small(file, TOKENIZER_BYTES, TokenizerError)))
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # `tokenizers` raises bare Exception, and panics, which are not even that
        raise TokenizerError(f"{shown(file)} cannot be read as a tokenizer ({shown(error)}); copy it again") from None


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Token to id, added tokens included."""
    vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return vocab


def check_same_tokens(target: dict[str, int], draft: dict[str, int]) -> None:
    """Raises `TokenizerError` naming the lowest id on which two vocabularies differ."""
    if target == draft:
        return
    differing = sorted((target.items() ^ draft.items()), key=lambda item: (item[1], item[0]))
    index = differing[0][1]
    raise TokenizerError(
        f"draft and target do not share a tokenizer: the first difference is at id {index}, "
        f"{_name(target, index)} in the target and {_name(draft, index)} in the draft "
        f"({len({index for _, index in differing})} ids differ). "
        "Choose a draft of the same family, or --draft none"
    )


def _name(vocab: dict[str, int], index: int) -> str:
    return next((quoted(token) for token, i in vocab.items() if i == index), "no token")


def tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json of a directory; {} where there is none. Raises `TokenizerError` when it is broken."""
    file = path / "tokenizer_config.json"
    return read_object(file, TOKENIZER_CONFIG_BYTES, TokenizerError) if os.path.lexists(file) else {}


class Detokenizer:
    """Incremental text of a growing id sequence; never yields half a character.

    Decodes a short window of ids twice and gives out the difference, since the text of an id can depend on the ids
    before it (leading spaces, byte-level pieces).
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = max(0, len(self._ids) - 6)
        self._read = len(self._ids)

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; "" while a character is still open."""
        self._ids.extend(ids)
        text, known = self._window()
        if text.endswith("\ufffd"):
            return ""
        self._start, self._read = max(self._start, self._read), len(self._ids)
        return text[len(known) :]

    def peek(self, ids: Sequence[int]) -> str:
        """The text that `ids` would add, without adding them."""
        text = self._tokenizer.decode([*self._ids[self._start :], *ids], skip_special_tokens=True)
        return text[len(self._window()[1]) :].rstrip("\ufffd")

    def flush(self) -> str:
        """What is left at the end, as it stands."""
        text, known = self._window()
        self._read = len(self._ids)
        return text[len(known) :]

    def _window(self) -> tuple[str, str]:
        return (
            self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=True),
            self._tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=True),
        )


class StopStrings:
    """Holds text back as long as it may be the beginning of a stop string, and cuts at the first whole one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def feed(self, text: str, *, final: bool = False) -> str:
        """The text that is safe to show; nothing more after `hit`."""
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            return self._give(min(found)[1])  # the one that is whole first, however the text was cut into pieces
        return self._give(len(self._held) if final else len(self._held) - self._open_tail())

    def _give(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out

    def _open_tail(self) -> int:
        return max((length for stop in self._stops for length in self._tails(stop)), default=0)

    def _tails(self, stop: str) -> Iterator[int]:
        return (n for n in range(1, len(stop)) if self._held.endswith(stop[:n]))

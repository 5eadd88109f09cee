"""What a tokenizer takes, and what transformers has to say of it, found out in a short-lived process.

Loading one takes up to four times of what stays, and transformers takes more on top. In a process that ends, all of
that is given back before anything starts; the caller's own process loads the tokenizer once, from JSON.

    python -m llmcad_actors.text.tokenizer_child memory PATH | hand-over PATH FOLDER | difference TARGET DRAFT
"""

import ctypes
import filecmp
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmcad_actors.errors import RuntimeFailure, TokenizerError
from llmcad_actors.machine.child import run_module
from llmcad_actors.storage.small_file import TOKENIZER_BYTES
from llmcad_actors.text.tokenizer import (
    auto_tokenizer,
    backend_json,
    check_same_tokens,
    is_plain,
    read_tokenizer,
    vocabulary,
)

TIMEOUT_S = 300.0
FILE = "tokenizer.json"
SMALL_BYTES = 1 << 20
"""A file of so much is not worth a process: it is loaded, or counted, where it is needed."""

MOST_PER_BYTE = 26
"""Of memory, of a tokenizer's file: Unigram, 32,000 entries."""

SOURCES = ("tokenizer*", "vocab*", "*.spm", "*.tiktoken", "spiece.model", "sentencepiece*")
"""Files that transformers makes a tokenizer from."""


@dataclass(frozen=True, slots=True)
class TokenizerMemory:
    """Bytes of the process that loads it."""

    stays: int  # once it is loaded, and what is free has been given back
    peak: int  # while it is loaded


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """What the caller's process keeps. special_tokens: those of a tokenizer class, None where the files say all."""

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str] | None


def has_tokenizer(path: Path) -> bool:
    """Whether the directory has anything that a tokenizer may be made from."""
    return any(True for pattern in SOURCES for _ in path.glob(pattern))


def tokenizer_memory(path: Path) -> TokenizerMemory:
    """What loading the directory's tokenizer will take here; nothing where there is none.

    A large one is measured: bytes per byte of the file run from 3 (BPE, indented JSON) to 26 (Unigram). A small one
    is taken for the dearest kind. Raises `TokenizerError` for a large one that cannot be loaded.
    """
    size = _size(path)
    if size <= SMALL_BYTES:
        return TokenizerMemory(MOST_PER_BYTE * size, MOST_PER_BYTE * size)
    return _measured(str(path.resolve()), _identity(path))


def check_same_vocabulary(target: Path, draft: Path) -> None:
    """Raises `TokenizerError` with the first difference when two tokenizers give other ids.

    Padded vocabularies of different size are fine: what counts is that every token has the same id in both.
    Files that are the same, byte for byte, are not read as tokenizers at all.
    """
    one, other = target / FILE, draft / FILE
    largest = max(_size(target), _size(draft))
    if one.is_file() and other.is_file() and largest <= TOKENIZER_BYTES and filecmp.cmp(one, other, shallow=False):
        return
    if one.is_file() and other.is_file() and largest <= SMALL_BYTES:
        check_same_tokens(vocabulary(read_tokenizer(target)), vocabulary(read_tokenizer(draft)))
    elif has_tokenizer(target) and has_tokenizer(draft):
        _ask("difference", str(target), str(draft))


def load_tokenizer(path: Path) -> LoadedTokenizer:
    """The directory's tokenizer, as transformers' `AutoTokenizer` has it. Raises `TokenizerError`."""
    if is_plain(path):
        loaded = LoadedTokenizer(read_tokenizer(path), None)
    else:
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
            special_tokens = _ask("hand-over", str(path), folder)
            loaded = LoadedTokenizer(read_tokenizer(Path(folder)), special_tokens)
    give_back_memory()
    return loaded


def give_back_memory() -> None:
    """Return what the allocator holds free to the system: of what loading a tokenizer took, up to two thirds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _size(path: Path) -> int:
    """Bytes of what the directory's tokenizer is made from; 0 where there is none."""
    sizes = {name: size for name, size, _ in _identity(path)}
    return sizes.get(FILE, sum(sizes.values()))


def _identity(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes with the files that a tokenizer is made from."""
    files = sorted({file for pattern in SOURCES for file in path.glob(pattern)})
    return tuple((file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files if file.exists())


@cache
def _measured(path: str, identity: object) -> TokenizerMemory:
    return TokenizerMemory(**_ask("memory", path))


def _ask(what: str, *arguments: str) -> Any:
    """The child's answer. Raises `TokenizerError` with what the child found wrong, or broke of."""
    try:
        said = run_module(__name__, [what, *arguments], timeout_s=TIMEOUT_S)
    except RuntimeFailure as error:
        last = str(error).strip().splitlines()[-1]
        raise TokenizerError(
            f"the tokenizer of {arguments[0]} cannot be loaded ({last}); copy its tokenizer files again"
        ) from error
    answer = json.loads(said.splitlines()[-1])
    if "error" in answer:
        raise TokenizerError(answer["error"])
    return answer["answer"]


# In the child.


def _memory(path: Path) -> dict[str, int]:
    text = "" if (path / FILE).is_file() else _made(path)
    before = _own_memory()
    tokenizer = Tokenizer.from_str(text) if text else read_tokenizer(path)
    peak = _own_memory()["VmHWM"] - before["VmRSS"]
    give_back_memory()
    stays = _own_memory()["RssAnon"] - before["RssAnon"]
    del tokenizer
    return {"stays": max(0, stays), "peak": max(0, peak)}


def _own_memory() -> dict[str, int]:
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rest.split()[0]) << 10 for name, _, rest in lines if rest.endswith(" kB")}


def _hand_over(path: Path, folder: Path) -> dict[str, str]:
    """The AutoTokenizer's backend goes to a file, its special tokens are the answer."""
    tokenizer = auto_tokenizer(path)
    (folder / FILE).write_text(backend_json(tokenizer, path))
    return dict(tokenizer.special_tokens_map)


def _difference(target: Path, draft: Path) -> None:
    check_same_tokens(_vocabulary(target), _vocabulary(draft))


def _vocabulary(path: Path) -> dict[str, int]:
    tokenizer = read_tokenizer(path) if (path / FILE).is_file() else Tokenizer.from_str(_made(path))
    vocab = vocabulary(tokenizer)
    del tokenizer
    give_back_memory()
    return vocab


def _made(path: Path) -> str:
    """What transformers makes of a directory without a tokenizer.json."""
    text = backend_json(auto_tokenizer(path), path)
    give_back_memory()
    return text


def main() -> None:
    """The child: one answer as JSON on standard output."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers' tokenizers need none: 0.8 s, not 2.8
    what, *paths = sys.argv[1:]
    work: dict[str, Any] = {"memory": _memory, "hand-over": _hand_over, "difference": _difference}
    try:
        answer = {"answer": work[what](*map(Path, paths))}
    except TokenizerError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer, default=str))  # str: of an added token, its text


if __name__ == "__main__":
    main()

"""Settings: frozen values, read from YAML with unknown keys refused, and the specs that actors are built from."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any, TypedDict, TypeVar

import yaml

from llmcad_actors.core import checks
from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.errors import ConfigError
from llmcad_actors.storage.small_file import read_small

F = TypeVar("F", bound=Callable[..., Any])

BUILDERS = ("best-first", "pacer")
FALLBACKS = ("marginal", "adaptive", "fixed-depth", "fixed-tree", "token-confidence", "full-tree")
READINGS = ("power", "average")
DTYPES = ("auto", "float32", "bfloat16")
YAML_BYTES = 64_000  # of settings, and of comments on them
DEEPEST = 4


MOST = 10**6  # of what is counted
MOST_THREADS = 4096
MOST_BYTES = 2**40

_COUNTS = dict.fromkeys(("max_queue", "batch", "children", "depth", "prefill_chunk"), MOST) | {
    "extent_bytes": MOST_BYTES
}
_OPTIONAL_COUNTS = {
    "max_nodes": MOST,
    "max_requests": 4096,
    "max_context": 10**9,
    "threads": MOST_THREADS,
    "draft_threads": MOST_THREADS,
    "read_threads": MOST_THREADS,
    "chunk_bytes": MOST_BYTES,
}
_WORDS = {"dtype": DTYPES, "builder": BUILDERS, "fallback": FALLBACKS, "alpha_update": READINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to know before it starts. Raises `ConfigError`, which names a setting that cannot be.

    What to run:
      target: a Hugging Face directory, the name of a model in the local cache, or "demo", the bundled one.
      draft: a small model with the same tokenizer, likewise; "none" or None: no draft, one token a pass (of the
        demo, None is the bundled draft).
      memory: cap on all that llmcad adds to the machine: "1.5GB", "512MiB", "75%" of the memory, or a number of bytes;
        None: 75%, of the demo 1.5 GB.
      dtype: compute in "float32" or "bfloat16"; "auto": float32, whatever is stored. Weights stay as they are stored.
      max_context: tokens of prompt and output to plan for; None: the model's, 2048 at most.
      max_requests: requests that passes serve together, as far as their texts have room; None: 8. They share the room
        of one text of max_context, or of 256 tokens for each of them where that is more. Encoder-decoder models: one.
      max_queue: requests that may wait for their turn.

    How the draft drafts, and when its tree is checked:
      max_nodes: tree nodes checked in one pass at most, of all requests together; None: 128, or as many more, up to
        512, as are computed while the disk is read anyway.
      builder: how the tree grows: "best-first" or "pacer".
      fallback: when the draft hands over: "marginal", "adaptive", "fixed-depth", "fixed-tree", "token-confidence" or
        "full-tree".
      depth: of fixed-depth: tokens drafted in a row.
      widths: of fixed-tree: children at each level.
      alpha: of adaptive: the first threshold of cumulative confidence, between 0 and 1.
      alpha_update: of adaptive: how the threshold follows verdicts: "power", as the paper has it, or "average".
      threshold: of token-confidence: hand over below it, between 0 and 1.
      provisional: go on drafting while a pass runs.
      batch: tree nodes that a draft step runs.
      children: candidates kept of each node.
      sharpen: of best-first: learn how much more certain of a token the target is than the draft.

    How the machine is used:
      threads: of the verifier; None: as many as there are cores.
      draft_threads: None: 1 for a small draft, else as many as there are cores.
      read_threads: None: what suits the disk.
      chunk_bytes: of one read request; None: what suits the disk.
      extent_bytes: neighbouring tensors up to this size are read in one go.
      read_limit: hold the reads to a rate, such as "400MB/s"; None: no limit.
      prefill_chunk: rows of a long prompt that a layer computes at once.
      read_ahead: False, for comparison, reads a shard only when it is asked for.
      plain_ray: start Ray through its public interface alone, which takes more memory: where a version of Ray that
        llmcad has not been tested with does not start, or for comparison.
    """

    target: str
    draft: str | None = None
    memory: str | int | None = None
    dtype: str = "auto"
    max_nodes: int | None = None
    max_context: int | None = None
    max_requests: int | None = None
    max_queue: int = 256
    builder: str = "best-first"
    fallback: str = "marginal"
    depth: int = 4
    widths: tuple[int, ...] = (1, 1, 3, 1, 1, 1, 1, 1)
    alpha: float = 0.01
    alpha_update: str = "power"
    threshold: float = 0.4
    provisional: bool = True
    batch: int = 16
    children: int = 16
    sharpen: bool = True
    threads: int | None = None
    draft_threads: int | None = None
    read_threads: int | None = None
    chunk_bytes: int | None = None
    extent_bytes: int = 32 << 20
    read_limit: str | None = None
    prefill_chunk: int = 256
    read_ahead: bool = True
    plain_ray: bool = False

    def __post_init__(self) -> None:
        self._check("target", checks.path, "a path or a name")
        self._check("draft", checks.path, "a path or a name", optional=True)
        self._check("memory", _memory, optional=True)
        self._check("read_limit", checks.text, "a rate such as '400MB/s'", optional=True)
        for name, known in _WORDS.items():
            self._check(name, checks.one_of, known)
        for name, most in _COUNTS.items():
            self._check(name, checks.whole_number, 1, most)
        for name, most in _OPTIONAL_COUNTS.items():
            self._check(name, checks.whole_number, 1, most, optional=True)
        for name in ("provisional", "sharpen", "read_ahead", "plain_ray"):
            self._check(name, checks.flag)
        for name in ("alpha", "threshold"):
            self._check(name, checks.share)
        self._check("widths", checks.counts, MOST)

    def _check(self, name: str, check: Callable[..., Any], *limits: Any, optional: bool = False) -> None:
        """The field becomes what `check` makes of it."""
        value = getattr(self, name)
        if value is not None or not optional:
            object.__setattr__(self, name, check(name, value, *limits))


def _memory(name: str, value: object) -> str:
    if isinstance(value, str):
        return checks.text(name, value)
    if not checks.is_whole(value):
        raise ConfigError(f"{name}: {quoted(value)} must be text, such as '1.5GB', or a whole number of bytes")
    return str(checks.whole_number(name, value, 1, MOST_BYTES * 1024))


class Settings(TypedDict, total=False):
    """`EngineConfig`'s fields but target, draft and memory, as keyword arguments."""

    dtype: str
    max_nodes: int | None
    max_context: int | None
    max_requests: int | None
    max_queue: int
    builder: str
    fallback: str
    depth: int
    widths: Sequence[int]
    alpha: float
    alpha_update: str
    threshold: float
    provisional: bool
    batch: int
    children: int
    sharpen: bool
    threads: int | None
    draft_threads: int | None
    read_threads: int | None
    chunk_bytes: int | None
    extent_bytes: int
    read_limit: str | None
    prefill_chunk: int
    read_ahead: bool
    plain_ray: bool


def documents_settings(function: F) -> F:
    """Adds what `EngineConfig` says of its fields to the documentation of a function that takes them as keywords."""
    fields = (EngineConfig.__doc__ or "").partition("\n\n")[2]
    function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n{indent(fields, ' ' * 4)}"
    return function


def setting_names() -> tuple[str, ...]:
    """`EngineConfig`'s fields."""
    return tuple(field.name for field in dataclasses.fields(EngineConfig))


def read_config(file: Path) -> dict[str, Any]:
    """Settings of a YAML file, by `EngineConfig` field. Raises `ConfigError` for an unknown key."""
    content = read_small(file, YAML_BYTES, ConfigError)
    try:
        text = content.decode("utf-8")
        _check_yaml(file, text)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, dates that are none
        raise ConfigError(f"{shown(file)} is not YAML: {shown(' '.join(str(error).split()))}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{shown(file)}: expected `setting: value` lines")
    known = sorted(field.name for field in dataclasses.fields(EngineConfig))
    for key in data:
        if key not in known:
            raise ConfigError(f"{shown(file)}: unknown setting {quoted(key)}; known: {', '.join(known)}")
    if isinstance(data.get("widths"), list):
        data["widths"] = tuple(data["widths"])
    return {key: value for key, value in data.items() if value is not None}


def _check_yaml(file: Path, text: str) -> None:
    """Settings, each once, with plain values: what refers to itself or nests grows beyond its text when it is read."""
    seen, depth, is_key = set(), 0, True
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{shown(file)}: settings do not refer to each other (*{shown(event.anchor)}); repeat it")
        if depth == 1 and is_key and isinstance(event, yaml.ScalarEvent):
            if event.value in seen:
                raise ConfigError(f"{shown(file)}: {quoted(event.value)} is set twice; leave one")
            seen.add(event.value)
        if depth == 1 and not isinstance(event, yaml.CollectionEndEvent):
            is_key = not is_key
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(
                f"{shown(file)}: values are nested more than {DEEPEST} deep; write `setting: value` lines"
            )


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    path: str
    pinned: tuple[str, ...]
    window_bytes: int
    extent_bytes: int
    chunk_bytes: int
    threads: int
    rate_limit: float | None  # bytes per second
    read_ahead: bool = True


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    path: str
    pinned: tuple[str, ...]
    pinned_later: tuple[str, ...]  # besides, once the draft has ended
    dtype: str
    threads: int
    capacity: int  # rows of the key/value cache, for texts
    max_nodes: int  # of all trees of a pass
    prefill_chunk: int  # rows that a layer runs at a time


@dataclass(frozen=True, slots=True)
class DraftSpec:
    path: str
    dtype: str
    threads: int
    vocab: int
    context: int
    rows: int  # of its key/value cache, for texts
    slots: int  # tree nodes whose keys and values the draft holds
    builder: str
    max_nodes: int
    whole_nodes: int  # of requests whose choices look at whole rows of logits
    batch: int
    children: int
    widths: tuple[int, ...]
    sharpens: bool  # the builder learns how much surer the target is
    slice_steps: int  # draft steps of one slice of provisional growth

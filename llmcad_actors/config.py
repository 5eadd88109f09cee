"""Settings: frozen values, read from YAML with unknown keys refused, and the specs that actors are built from."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from llmcad_actors.errors import ConfigError

BUILDERS = ("best-first", "pacer")
FALLBACKS = ("marginal", "adaptive", "fixed-depth", "fixed-tree", "token-confidence", "full-tree")
READINGS = ("power", "average")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to know before it starts. `ConfigError` names a setting that cannot be."""

    target: str
    draft: str | None = None  # a directory, or None: no draft, one token a pass
    memory: str = "75%"  # cap on all that llmcad adds to the machine: "1.5GB", "512MiB", "75%" of RAM
    dtype: str = "auto"  # compute in the stored type, or "float32", "bfloat16"
    max_nodes: int = 128  # tree nodes verified in one pass at most
    max_context: int | None = None  # tokens of prompt and output planned for; default: the model's, 2048 at most
    builder: str = "best-first"
    fallback: str = "marginal"
    depth: int = 4  # of fixed-depth
    widths: tuple[int, ...] = (1, 1, 3, 1, 1, 1, 1, 1)  # of fixed-tree
    alpha: float = 0.01  # of adaptive
    alpha_update: str = "power"  # of adaptive: the reading of the paper's update rule, or "average"
    threshold: float = 0.4  # of token-confidence
    provisional: bool = True  # go on drafting while a pass runs
    batch: int = 16  # tree nodes a draft step runs
    children: int = 16  # candidates kept of each
    sharpen: bool = True  # of best-first: learn how much surer the target is than the draft
    threads: int | None = None  # of the verifier; default: the cores
    draft_threads: int | None = None  # default: 1 for a small draft, else the cores
    read_threads: int | None = None  # default: what suits the disk
    chunk_bytes: int | None = None  # one read request; default: what suits the disk
    piece_bytes: int = 32 << 20  # neighbouring tensors that are read in one go
    read_limit: str | None = None  # "400MB/s": hold the reads to a rate
    prefill_chunk: int = 256  # rows of a long prompt that a layer computes at once
    read_ahead: bool = True  # False, for comparison: read a shard only when it is asked for

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("builder", self.builder, BUILDERS)
        _one_of("fallback", self.fallback, FALLBACKS)
        _one_of("alpha_update", self.alpha_update, READINGS)
        counts = (
            "max_nodes",
            "batch",
            "children",
            "depth",
            "piece_bytes",
            "prefill_chunk",
        )
        for name in counts:
            _at_least(name, getattr(self, name), 1)
        for name in ("max_context", "threads", "draft_threads", "read_threads", "chunk_bytes"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("target", "draft", "memory", "read_limit"):
            _of_type(name, getattr(self, name), str, "text")
        for name in ("provisional", "sharpen", "read_ahead"):
            _of_type(name, getattr(self, name), bool, "true or false")
        _of_type("widths", self.widths, tuple, "a list of numbers")
        if not self.widths or not all(isinstance(width, int) and width >= 1 for width in self.widths):
            raise ConfigError(f"widths: {self.widths} must be one or more numbers above 0, such as 1,1,3,1")
        for name in ("alpha", "threshold"):
            _of_type(name, getattr(self, name), int | float, "a number")
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must lie between 0 and 1")


def read_config(file: Path) -> dict[str, Any]:
    """Settings of a YAML file, by `EngineConfig` field. Raises `ConfigError` for an unknown key."""
    try:
        data = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, dates that are none
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected `setting: value` lines")
    known = sorted(field.name for field in dataclasses.fields(EngineConfig))
    for key in data:
        if key not in known:
            raise ConfigError(f"{file}: unknown setting {key!r}; known: {', '.join(known)}")
    if isinstance(data.get("widths"), list):
        data["widths"] = tuple(data["widths"])
    return {key: value for key, value in data.items() if value is not None}


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: {value!r} is not known; choose one of {', '.join(known)}")


def _of_type(name: str, value: Any, kind: type | UnionType, words: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name}: {value!r} must be {words}")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: {value!r} must be a whole number of at least {least}")


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    path: str
    pinned: tuple[str, ...]
    window_bytes: int
    piece_bytes: int
    chunk_bytes: int
    threads: int
    rate_limit: float | None  # bytes per second
    read_ahead: bool = True


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    path: str
    pinned: tuple[str, ...]
    dtype: str
    threads: int
    capacity: int  # rows of the key/value cache
    prefill_chunk: int  # rows that a layer runs at a time


@dataclass(frozen=True, slots=True)
class DraftSpec:
    path: str
    dtype: str
    threads: int
    vocab: int
    context: int
    slots: int  # tree nodes whose keys and values the draft holds
    builder: str
    max_nodes: int
    batch: int
    children: int
    widths: tuple[int, ...]
    sharpens: bool  # the builder learns how much surer the target is
    slice_steps: int  # draft steps of one slice of provisional growth

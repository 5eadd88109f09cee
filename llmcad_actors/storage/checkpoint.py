"""A Hugging Face model directory, read in place: config.json and the headers of its safetensors files.

Knows files and tensors, not what they mean (that is `layout.py` with `families/families.py`). Reads no weights.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.safetensors_header import TensorInfo, read_header
from llmcad_actors.storage.small_file import INDEX_BYTES, read_object, reason
from llmcad_actors.storage.stamp import Stamp, check_unchanged, stamps_of

__all__ = ["SUPPORTED_DTYPES", "Checkpoint", "TensorInfo"]

SUPPORTED_DTYPES = ("BF16", "F16", "F32")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Masks and rotary tables that older versions of transformers stored. Models compute them; nobody loads them.
COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)|position_ids)$"
)

_NO_GGUF = "which llmcad does not read: use the model's original Hugging Face safetensors files"


@dataclass(frozen=True)
class Checkpoint:
    """An opened model directory. `tensors` leaves out computed buffers (`COMPUTED`)."""

    path: Path
    config: Mapping[str, Any]
    generation_settings: Mapping[str, Any]
    """generation_config.json alone, whatever it leaves out; config.json where there is none, as transformers."""
    tensors: Mapping[str, TensorInfo]
    stamps: Mapping[Path, Stamp] = field(init=False, repr=False, compare=False)
    """The files of the tensors, as they were when they were opened."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", stamps_of({info.file for info in self.tensors.values()}))

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read config and headers. Raises CheckpointError saying what is wrong and what to do."""
        path = Path(path)
        try:
            return cls._open(path)
        except (OSError, ValueError) as error:  # a folder that may not be looked into, a name that cannot be
            raise CheckpointError(f"{shown(path)} cannot be opened: {reason(error)}.") from None

    @classmethod
    def _open(cls, path: Path) -> "Checkpoint":
        config = _config(path)
        tensors = {name: info for name, info in _headers(path).items() if not COMPUTED.search(name)}
        if not tensors:
            raise CheckpointError(f"the safetensors files of {shown(path)} hold no tensors; fetch the model again.")
        _check_dtypes(path, tensors.values())
        generation = path / "generation_config.json"
        return cls(path, config, read_object(generation) if _is_there(generation) else config, tensors)

    def check_unchanged(self) -> None:
        """Raises `StorageError` where a file of the tensors is no longer as it was when it was opened."""
        check_unchanged(self.stamps)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, buffers left out."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The stored dtype: the one that holds the most bytes."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += info.nbytes
        return sizes.most_common(1)[0][0]


def _config(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{shown(path)} does not exist; give a local Hugging Face model directory.")
    if path.suffix == ".gguf":
        raise CheckpointError(f"{shown(path)} is a GGUF file, {_NO_GGUF}.")
    if not path.is_dir():
        raise CheckpointError(
            f"{shown(path)} is not a directory; give the directory that holds config.json and the safetensors files."
        )
    if not _is_there(path / "config.json"):
        raise CheckpointError(
            f"{shown(path)} has no config.json{_gguf_hint(path)}; is it a Hugging Face model directory?"
        )
    config = read_object(path / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{shown(path)} holds a quantised model (quantization_config in config.json); llmcad streams BF16, F16 "
            "or F32 weights: use the original unquantised checkpoint."
        )
    return config


def _is_there(file: Path) -> bool:
    """Whatever it is: reading it says what is wrong with it."""
    return file.is_symlink() or file.exists()


def _headers(path: Path) -> dict[str, TensorInfo]:
    # The single file first, as transformers does.
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if (path / INDEX).is_file():
        return _indexed(path)
    raise CheckpointError(_why_no_weights(path))


def _indexed(path: Path) -> dict[str, TensorInfo]:
    weight_map = weight_map_of(path / INDEX)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if not (path / file).is_file():
            raise CheckpointError(
                f"{INDEX} of {shown(path)} names {shown(file)}, which is absent; fetch the missing file."
            )
        tensors |= read_header(path / file)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != path / file:
            raise CheckpointError(
                f"{INDEX} of {shown(path)} places tensor {shown(name)} in {shown(file)}, which does not contain it; "
                "index and files are not of one model: fetch both again."
            )
    return tensors


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index file. Raises CheckpointError, also for a file that is not in the index's folder."""
    weight_map = read_object(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{shown(index)} has no usable weight_map; fetch the file again.")
    for file in set(weight_map.values()):
        if not _stays_inside(file):
            raise CheckpointError(
                f"{shown(index)} names {quoted(file)}, which is no file of the model's folder; fetch the model again "
                "from a source you trust."
            )
    return weight_map


def _stays_inside(file: str) -> bool:
    parts = Path(file).parts
    return bool(parts) and "\0" not in file and not Path(file).is_absolute() and ".." not in parts


def _why_no_weights(path: Path) -> str:
    if any(path.glob("*.gguf")):
        return f"{shown(path)} holds no safetensors weights{_gguf_hint(path)}."
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
    if pickles:
        way = f"make safetensors of them, which runs none: `llmcad convert {shown(path)} OUT`"
        return (
            f"{shown(path)} holds only pickle weights ({shown(pickles[0])}), which llmcad does not load because a "
            f"pickle can run code; {way if _is_convertible(path) else 'fetch the model as safetensors'}."
        )
    if (path / "adapter_config.json").is_file():
        return f"{shown(path)} holds only an adapter; merge it into its base model and save that as safetensors."
    stray = sorted(f.name for f in path.glob("*.safetensors"))
    if stray:
        return f"{shown(path)} has {shown(stray[0])} but neither {SINGLE} nor {INDEX}; fetch the index file."
    return f"{shown(path)} has a config.json but no weights: neither {SINGLE} nor {INDEX}; fetch the weights."


def _is_convertible(path: Path) -> bool:
    return any((path / name).is_file() for name in (PICKLE, PICKLE_INDEX))


def _gguf_hint(path: Path) -> str:
    gguf = sorted(f.name for f in path.glob("*.gguf"))
    if not gguf:
        return ""
    return f" but a GGUF file ({shown(gguf[0])}), {_NO_GGUF}"


def _check_dtypes(path: Path, tensors: Iterable[TensorInfo]) -> None:
    for info in tensors:
        if info.dtype not in SUPPORTED_DTYPES:
            raise CheckpointError(
                f"tensor {shown(info.name)} of {shown(path)} is stored as {shown(info.dtype)}; llmcad streams "
                f"{', '.join(SUPPORTED_DTYPES)} only (no quantised weights): use the original checkpoint."
            )

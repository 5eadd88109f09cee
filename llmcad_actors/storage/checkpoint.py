"""A Hugging Face model directory, read in place: config.json and the headers of its safetensors files.

Knows files and tensors, not what they mean (that is `layout.py` with `models/families.py`). Reads no weights.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.safetensors_header import TensorInfo, read_header
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
        config = _config(path)
        tensors = {name: info for name, info in _headers(path).items() if not COMPUTED.search(name)}
        _check_dtypes(path, tensors.values())
        generation = path / "generation_config.json"
        return cls(path, config, _json(generation) if generation.is_file() else config, tensors)

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
        raise CheckpointError(f"{path} does not exist; give a local Hugging Face model directory.")
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} is a GGUF file, {_NO_GGUF}.")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory; give the directory that holds config.json and the safetensors files."
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json{_gguf_hint(path)}; is it a Hugging Face model directory?")
    config = _json(path / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path} holds a quantised model (quantization_config in config.json); llmcad streams BF16, F16 "
            "or F32 weights: use the original unquantised checkpoint."
        )
    return config


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}; fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object; fetch the file again.")
    return value


def _headers(path: Path) -> dict[str, TensorInfo]:
    # The single file first, as transformers does.
    if (path / SINGLE).is_file():
        tensors = read_header(path / SINGLE)
    elif (path / INDEX).is_file():
        tensors = _indexed(path)
    else:
        raise CheckpointError(_why_no_weights(path))
    if not tensors:
        raise CheckpointError(f"the safetensors files of {path} hold no tensors; fetch the model again.")
    return tensors


def _indexed(path: Path) -> dict[str, TensorInfo]:
    weight_map = _json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path / INDEX} has no usable weight_map; fetch the file again.")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if not (path / file).is_file():
            raise CheckpointError(f"{INDEX} of {path} names {file}, which is absent; fetch the missing file.")
        tensors |= read_header(path / file)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != Path(file).name:
            raise CheckpointError(
                f"{INDEX} of {path} places tensor {name} in {file}, which does not contain it; index and "
                "files are not of one model: fetch both again."
            )
    return tensors


def _why_no_weights(path: Path) -> str:
    if any(path.glob("*.gguf")):
        return f"{path} holds no safetensors weights{_gguf_hint(path)}."
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
    if pickles:
        way = f"make safetensors of them, which runs none: `llmcad convert {path} OUT`"
        return (
            f"{path} holds only pickle weights ({pickles[0]}), which llmcad does not load because a pickle "
            f"can run code; {way if _is_convertible(path) else 'fetch the model as safetensors'}."
        )
    if (path / "adapter_config.json").is_file():
        return f"{path} holds only an adapter; merge it into its base model and save that as safetensors."
    stray = sorted(f.name for f in path.glob("*.safetensors"))
    if stray:
        return f"{path} has {stray[0]} but neither {SINGLE} nor {INDEX}; fetch the index file."
    return f"{path} has a config.json but no weights: neither {SINGLE} nor {INDEX}; fetch the weights."


def _is_convertible(path: Path) -> bool:
    return any((path / name).is_file() for name in (PICKLE, PICKLE_INDEX))


def _gguf_hint(path: Path) -> str:
    gguf = sorted(f.name for f in path.glob("*.gguf"))
    if not gguf:
        return ""
    return f" but a GGUF file ({gguf[0]}), {_NO_GGUF}"


def _check_dtypes(path: Path, tensors: Iterable[TensorInfo]) -> None:
    for info in tensors:
        if info.dtype not in SUPPORTED_DTYPES:
            raise CheckpointError(
                f"tensor {info.name} of {path} is stored as {info.dtype}; llmcad streams "
                f"{', '.join(SUPPORTED_DTYPES)} only (no quantised weights): use the original checkpoint."
            )

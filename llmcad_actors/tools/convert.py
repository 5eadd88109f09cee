"""Turn a pickle-only checkpoint (pytorch_model.bin) into safetensors, in bounded memory. Runs no code of the pickle.

Only names, types and shapes are read at first; weights are mapped, not loaded, and go over block by block. A run that
was interrupted goes on after the last finished file.
"""

import ctypes
import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from llmcad_actors.core.budget import format_size, parse_size
from llmcad_actors.core.quoting import shown
from llmcad_actors.errors import CheckpointError, ConfigError, MemoryCapError, StorageError
from llmcad_actors.families.families import family_of
from llmcad_actors.kernels.tensors import DTYPES
from llmcad_actors.storage.checkpoint import COMPUTED, INDEX, PICKLE, PICKLE_INDEX, SINGLE, Checkpoint, weight_map_of
from llmcad_actors.storage.layout import layout_of
from llmcad_actors.storage.new_folder import appearing
from llmcad_actors.storage.small_file import INDEX_BYTES, read_object, reason
from llmcad_actors.storage.writer import Entry, SafetensorsWriter, entry_bytes

RECORD = "llmcad_converted.json"  # what was made from what; its presence marks a directory of ours
COPIED = (".json", ".jinja", ".model", ".txt")  # tokenizer and generation files
FILE_BYTES = 2_000_000_000
SLACK_BYTES = 64 << 20
PROCESS_BYTES = 400_000_000  # this process with torch, without weights
BLOCK_BYTES = 64 << 20
LEAST_BLOCK_BYTES = 1 << 20
COPIES = 4  # of a block, at the worst moment: mapped, made contiguous, converted, on its way to the disk
MADV_DONTNEED = 4
STORED = {torch_dtype: name for name, torch_dtype in DTYPES.items()} | {torch.float64: "F32"}
ASKED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Progress = Callable[[int, int], None]  # bytes written, bytes in total


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    file: str  # where it comes from
    dtype: str  # as it will be stored
    shape: tuple[int, ...]

    @property
    def entry(self) -> Entry:
        return (self.name, self.dtype, self.shape)


def convert(
    source: Path,
    out: Path,
    *,
    memory: str = "2GB",
    dtype: str = "auto",
    progress: Progress | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write `source`'s weights as safetensors to `out`, with its config and tokenizer files; returns `out`.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16". `out` appears when it is complete; until then the
    work is beside it, and a run that was broken off is gone on with. Raises CheckpointError (no pickle weights,
    damaged, would run code), ConfigError, MemoryCapError and StorageError.
    """
    source, out = Path(source), Path(out)
    if dtype not in ("auto", *ASKED):
        raise ConfigError(f"dtype: {dtype!r} is not known; choose one of auto, {', '.join(ASKED)}")
    try:
        config, files = _config(source), _pickles(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(source)} cannot be opened: {reason(error)}") from None
    cap = parse_size(memory, psutil.virtual_memory().total)
    block = _block_bytes(cap)
    record = {"version": 1, "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}, "dtype": dtype}
    if _is_made(out, record):
        return out
    head = {family_of(config).head, *family_of(config).head_aliases} if family_of(config).is_tied(config) else set()
    tensors = [tensor for file in files for tensor in _tensors(file, cap, ASKED.get(dtype), head)]
    if not tensors:
        raise CheckpointError(f"the pickle files of {source} hold no weights; fetch the model again")
    record["tensors"] = [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in tensors]
    try:
        with appearing(out, is_ours=_is_recorded, may_go_on=partial(_is_recorded, record=record)) as folder:
            _prepare(folder, record, sum(entry_bytes(t.entry) for t in tensors))
            shards = _shards(tensors, file_bytes)
            _write_weights(folder, source, shards, cap, block, progress or (lambda done, total: None))
            _write_small_files(folder, source, config, dtype)
            layout_of(Checkpoint.open(folder))  # nothing incomplete gets the final name
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}; free space or choose another folder") from error
    _is_made(out, record)  # where somebody else was sooner
    return out


def _config(source: Path) -> dict[str, Any]:
    gguf = [source] if source.suffix == ".gguf" else sorted(source.glob("*.gguf"))
    if gguf and not any((source / name).exists() for name in (PICKLE, PICKLE_INDEX)):
        raise CheckpointError(
            f"{gguf[0]} is a GGUF file, which llmcad does not convert: its weights are quantised, so the result would "
            "not be the original model, and unpacking it needs the whole model in memory. Fetch the model's original "
            "Hugging Face files; or, with memory enough, unpack it yourself with transformers and its gguf package: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(OUT)"
        )
    file = source / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{source} has no config.json; give a Hugging Face model directory with {PICKLE}")
    return read_object(file)


def _pickles(source: Path) -> list[Path]:
    """The files to convert, all of them there."""
    if (source / SINGLE).is_file() or (source / INDEX).is_file():
        raise CheckpointError(f"{source} has safetensors weights already; use it as it is")
    if (source / PICKLE).is_file():
        return [source / PICKLE]
    if not (source / PICKLE_INDEX).is_file():
        raise CheckpointError(f"{source} has neither {PICKLE} nor {PICKLE_INDEX}; there is nothing to convert")
    weight_map = weight_map_of(source / PICKLE_INDEX)
    if not weight_map:
        raise CheckpointError(f"{source / PICKLE_INDEX} has no usable weight_map; fetch the file again")
    files = [source / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != source or not file.is_file():
            raise CheckpointError(
                f"{PICKLE_INDEX} of {source} names {shown(file.name)}, which is absent; fetch that file"
            )
    return files


def _block_bytes(cap: int) -> int:
    room = (cap - PROCESS_BYTES) // COPIES
    if room < LEAST_BLOCK_BYTES:
        least = format_size(PROCESS_BYTES + COPIES * LEAST_BLOCK_BYTES)
        raise MemoryCapError(f"a memory cap of {format_size(cap)} is too small to convert; the least is {least}")
    return min(BLOCK_BYTES, room)


def _load(file: Path, cap: int) -> dict[str, torch.Tensor]:
    """The tensors of a pickle file, mapped; of the old format, which cannot be mapped, loaded."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused
            if zipfile.is_zipfile(file):
                _check_stored(file)
                weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:
                weights = _load_old(file, cap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_why_unsafe(file, str(error))) from None
    except MemoryCapError:
        raise
    except Exception as error:  # a damaged pickle may raise anything that Python can
        raise CheckpointError(
            f"{shown(file)} is damaged ({shown((str(error) or repr(error)).splitlines()[0])}); fetch it again"
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{shown(file)} holds something other than named tensors; it is no model checkpoint")
    for name, tensor in weights.items():
        is_stored = tensor.layout != torch.strided or tensor.nbytes <= tensor.untyped_storage().nbytes()
        if not isinstance(name, str) or not is_stored:
            raise CheckpointError(
                f"{shown(file)} is damaged (tensor {shown(name)} is larger than what is stored of it); fetch it again"
            )
    return weights


def _check_stored(file: Path) -> None:
    """What a zip file holds is no larger than the file: PyTorch compresses nothing. Raises ValueError."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its parts are compressed, which PyTorch does not do")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise ValueError("its parts are larger than itself")


def _load_old(file: Path, cap: int) -> Any:
    needed = PROCESS_BYTES + file.stat().st_size
    if needed > cap:
        raise MemoryCapError(
            f"{file} is in PyTorch's old format, which has to be loaded as a whole: that needs "
            f"{format_size(needed)}, the cap is {format_size(cap)}; give --memory {math.ceil(needed / 1e6)}MB"
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def _why_unsafe(file: Path, error: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", error)
    if found is None and "Unsupported" not in error:
        return f"{shown(file)} is damaged ({shown(error.splitlines()[0])}); fetch it again"
    what = f"call {shown(found[1])}" if found else "do more than give tensors"
    return (
        f"{file} wants to {what} when it is loaded, which weights have no reason to do: it is refused, and nothing "
        "of it was run. Do not load this file; fetch the model from a source you trust, as safetensors"
    )


def _tensors(file: Path, cap: int, asked: str | None, head: set[str]) -> Iterator[_Tensor]:
    """What is written of a file: no computed buffers, and no head that is the embedding's very memory."""
    weights = _load(file, cap)
    places = [tensor.data_ptr() for tensor in weights.values()]
    for name, tensor in weights.items():
        if COMPUTED.search(name) or (name in head and places.count(tensor.data_ptr()) > 1):
            continue
        if tensor.dtype not in STORED or tensor.layout != torch.strided:
            raise CheckpointError(
                f"tensor {shown(name)} of {shown(file)} is stored as {tensor.dtype}; llmcad runs plain float weights "
                "only: use the original, unquantised checkpoint"
            )
        yield _Tensor(name, file.name, asked or STORED[tensor.dtype], tuple(tensor.shape))


def _shards(tensors: list[_Tensor], file_bytes: int) -> list[list[_Tensor]]:
    """Tensors by file to be written: of one source file each, up to `file_bytes` (a larger tensor is alone)."""
    shards: list[list[_Tensor]] = []
    size = 0
    for tensor in tensors:
        nbytes = entry_bytes(tensor.entry)
        if not shards or shards[-1][0].file != tensor.file or size + nbytes > file_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _is_made(out: Path, record: dict[str, Any]) -> bool:
    """True when `out` is this very job, complete; False when it is free. StorageError otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD).is_file() or {**read_object(out / RECORD, INDEX_BYTES), **record} != read_object(
        out / RECORD, INDEX_BYTES
    ):
        raise StorageError(f"{out} holds something else; choose another folder, or remove that one first")
    Checkpoint.open(out)
    return True


def _is_recorded(folder: Path, record: dict[str, Any] | None = None) -> bool:
    """Whether a conversion began there; record: this one."""
    file = folder / RECORD
    return file.is_file() and (record is None or read_object(file, INDEX_BYTES) == record)


def _prepare(folder: Path, record: dict[str, Any], total: int) -> None:
    """See to room on the disk, and to what a run that was broken off had begun to write."""
    for stale in folder.glob("*.partial"):
        stale.unlink()
    done = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free, needed = shutil.disk_usage(folder).free, total - done + SLACK_BYTES
    if free < needed:
        raise StorageError(
            f"{folder.parent} has {format_size(free)} free, the conversion needs {format_size(needed)}; free some "
            "or choose another folder"
        )
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _write_weights(
    folder: Path, source: Path, shards: list[list[_Tensor]], cap: int, block: int, progress: Progress
) -> None:
    total, done = sum(entry_bytes(t.entry) for shard in shards for t in shard), 0
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if (folder / name).is_file():  # of an interrupted run; it got this name when it was complete
            done += sum(entry_bytes(t.entry) for t in shard)
            progress(done, total)
            continue
        weights = _load(source / shard[0].file, cap)
        mapped = _mapped(source / shard[0].file)
        with SafetensorsWriter(folder / name, [t.entry for t in shard]) as writer:
            for tensor in shard:
                for part in _parts(weights[tensor.name].detach(), block):
                    array = part.to(DTYPES[tensor.dtype]).contiguous().reshape(-1).view(torch.uint8).numpy()
                    writer.write_part(tensor.name, array.view(f"u{DTYPES[tensor.dtype].itemsize}"))
                    _forget(part, mapped)
                    done += array.nbytes
                    progress(done, total)
    weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _parts(tensor: torch.Tensor, block: int) -> Iterator[torch.Tensor]:
    """Leading rows after leading rows, each part at most `block` bytes where a row is no larger."""
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    rows = max(1, block // max(1, tensor[:1].numel() * tensor.element_size()))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]


def _mapped(file: Path) -> list[tuple[int, int]]:
    """Addresses at which this process maps `file`: start and end."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split(maxsplit=5)[0].split("-") for line in lines if line.endswith(f" {file.resolve()}")]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def _forget(part: torch.Tensor, mapped: list[tuple[int, int]]) -> None:
    """Give mapped pages back to the system: they would count as this process's memory. The file still has them."""
    start, end = part.data_ptr(), part.data_ptr() + part.nbytes
    if not part.is_contiguous() or not any(low <= start and end <= high for low, high in mapped):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    first = start // page * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_DONTNEED)


def _write_small_files(folder: Path, source: Path, config: dict[str, Any], dtype: str) -> None:
    said = {key for key in ("dtype", "torch_dtype") if key in config} or {"dtype"}
    changed = {} if dtype == "auto" else dict.fromkeys(sorted(said), dtype)
    (folder / "config.json").write_text(json.dumps({**config, **changed}, indent=2) + "\n")
    for file in sorted(source.iterdir()):
        if file.suffix in COPIED and file.is_file() and file.name not in ("config.json", PICKLE_INDEX, RECORD):
            shutil.copyfile(file, folder / file.name)

"""Make a bigger model that computes the same function: a big model to run where none can be downloaded.

A Llama checkpoint of any size becomes an ordinary Hugging Face checkpoint of `target_bytes` whose every weight has to
be read and multiplied, and whose logits are the source's (why: `enlarge_tensors.py`). Written tensor by tensor, in
blocks: memory stays at some dozens of MiB.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcad_actors.errors import CheckpointError, ConfigError, StorageError
from llmcad_actors.storage.checkpoint import INDEX, Checkpoint, TensorInfo
from llmcad_actors.storage.dtypes import TORCH_NAMES
from llmcad_actors.storage.layout import Layout, layout_of
from llmcad_actors.storage.new_folder import appearing
from llmcad_actors.storage.rows import read_bytes
from llmcad_actors.storage.safetensors_header import ITEM_BYTES
from llmcad_actors.storage.small_file import read_object
from llmcad_actors.storage.writer import Entry, SafetensorsWriter, write_holes
from llmcad_actors.tools.enlarge_shape import LlamaShape, check_enlargeable, choose_shape, source_shape
from llmcad_actors.tools.enlarge_tensors import EnlargedTensor, TensorPlan

RECORD = "llmcad_enlarged.json"  # what was made from what; its presence marks a directory of ours
FILE_BYTES = 500_000_000
SLACK_BYTES = 64 << 20  # headers, tokenizer files, the file system's own needs
COPIED = (".json", ".jinja", ".model", ".txt")  # tokenizer and generation files
Progress = Callable[[int, int], None]  # bytes written, bytes in total


@dataclass(frozen=True, slots=True)
class _Job:
    source: Checkpoint
    layout: Layout
    old: LlamaShape
    new: LlamaShape
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    dtype: str
    seed: int
    file_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.new.parameters * ITEM_BYTES[self.dtype]

    def tensors(self) -> Iterator[EnlargedTensor]:
        named = {self.layout.parameter(name): info for name, info in self.source.tensors.items()}
        named[self.layout.family.embedding] = self.layout.embedding  # a tied one may be stored as the head
        return TensorPlan(self.old, self.new).tensors(named)


def enlarge(
    source: Path,
    destination: Path,
    *,
    target_bytes: int,
    dtype: str | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    layers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a checkpoint of at least `target_bytes` that computes what `source` computes; returns `destination`.

    `dtype`: "BF16", "F16" or "F32" (or torch's names); default: as stored. Shapes that are not given are chosen;
    with `layers` given, `target_bytes` is not looked at. A destination that was made from the same source with the
    same parameters is kept as it is. It appears only when complete.
    Raises CheckpointError (not a plain Llama model), ConfigError (shapes) and StorageError (space, destination).
    """
    shape = {"hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads, "layers": layers}
    job = _job(source, target_bytes, dtype, seed, file_bytes, **shape)
    destination = Path(destination)
    if not _is_made(destination, job):
        _make(destination, job, progress or (lambda done, total: None))
    return destination


def sketch(source: Path, destination: Path, *, target_bytes: int) -> Path:
    """What `enlarge` would make, without its weights: true headers over holes, which take no room on the disk.

    It can be planned for, and must not be run. Raises as `enlarge` does.
    """
    job = _job(source, target_bytes)
    try:
        destination.mkdir(parents=True)
        _write_small_files(destination, job)
        for name, tensors in _named_files(job):
            write_holes(destination / name, _entries(tensors, job.dtype))
        _write_index(destination, job)
    except OSError as error:
        raise StorageError(f"{destination} cannot be written: {error}; choose another folder.") from error
    return destination


def _job(
    source: Path,
    target_bytes: int,
    dtype: str | None = None,
    seed: int = 0,
    file_bytes: int = FILE_BYTES,
    **shape: int | None,
) -> _Job:
    checkpoint = Checkpoint.open(source)
    check_enlargeable(checkpoint.config)
    layout = layout_of(checkpoint)
    old = source_shape(checkpoint.config, tied=layout.tied)
    dtype = _dtype_name(dtype) if dtype else checkpoint.dtype
    new = choose_shape(
        old,
        target_bytes=target_bytes,
        item_bytes=ITEM_BYTES[dtype],
        **shape,
    )
    return _Job(
        source=checkpoint,
        layout=layout,
        old=old,
        new=new,
        config=_config(checkpoint.config, old, new, dtype),
        record=_record(checkpoint, new, dtype, seed),
        dtype=dtype,
        seed=seed,
        file_bytes=file_bytes,
    )


def _dtype_name(dtype: str) -> str:
    names = {torch: ours for ours, torch in TORCH_NAMES.items()} | {ours: ours for ours in TORCH_NAMES}
    names |= {ours.lower(): ours for ours in TORCH_NAMES}
    if dtype not in names:
        raise ConfigError(f"dtype {dtype!r} is not known; use one of {', '.join(TORCH_NAMES.values())}.")
    return names[dtype]


def _config(config: Mapping[str, Any], old: LlamaShape, new: LlamaShape, dtype: str) -> dict[str, Any]:
    """The source's config.json with the new sizes; everything else stays."""
    said = {key for key in ("dtype", "torch_dtype") if key in config} or {"dtype"}
    return {
        **config,
        **dict.fromkeys(sorted(said), TORCH_NAMES[dtype]),
        "hidden_size": new.hidden,
        "intermediate_size": new.intermediate,
        "num_attention_heads": new.heads,
        "num_key_value_heads": new.kv_heads,
        "num_hidden_layers": new.layers,
        "head_dim": new.head_dim,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * old.hidden / new.hidden,
        "tie_word_embeddings": new.tied,
    }


def _record(checkpoint: Checkpoint, new: LlamaShape, dtype: str, seed: int) -> dict[str, Any]:
    return {"version": 1, "source": _fingerprint(checkpoint), "shape": asdict(new), "dtype": dtype, "seed": seed}


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Of the config, and of each tensor's place and first 4 KiB: cheap, and other weights do not share it."""
    digest = hashlib.sha256(json.dumps(dict(checkpoint.config), sort_keys=True).encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.file.name} {info.offset}".encode())
        head = TensorInfo(name, info.dtype, (), info.file, info.offset, min(info.nbytes, 4096))
        digest.update(read_bytes(head).tobytes())
    return digest.hexdigest()


def _is_made(destination: Path, job: _Job) -> bool:
    """True when `destination` is this very job, complete; False when it is free. StorageError otherwise."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    record = destination / RECORD
    if not record.is_file() or read_object(record, error=StorageError) != job.record:
        raise StorageError(f"{destination} holds something else; choose another folder, or remove that one first.")
    try:
        found = Checkpoint.open(destination).total_bytes
    except CheckpointError as error:
        raise StorageError(f"{destination} is damaged ({error}); remove it and run again.") from error
    return found == job.total_bytes


def _make(destination: Path, job: _Job, progress: Progress) -> None:
    try:
        with appearing(destination, is_ours=_is_recorded) as folder:
            _check_room(folder, job)
            _write_small_files(folder, job)
            _write_weights(folder, job, progress)
    except OSError as error:
        raise StorageError(f"{destination} cannot be written: {error}; choose another folder.") from error
    _is_made(destination, job)  # where somebody else was sooner


def _is_recorded(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def _check_room(folder: Path, job: _Job) -> None:
    free, needed = shutil.disk_usage(folder).free, job.total_bytes + SLACK_BYTES
    if free < needed:
        raise StorageError(
            f"{folder.parent} has {free:,} bytes free, the enlarged model needs {needed:,}; free some or choose "
            "another folder."
        )


def _write_small_files(folder: Path, job: _Job) -> None:
    (folder / RECORD).write_text(json.dumps(job.record, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(job.config, indent=2, sort_keys=True) + "\n")
    for file in sorted(job.source.path.iterdir()):
        if file.suffix in COPIED and file.is_file() and file.name not in ("config.json", INDEX, RECORD):
            shutil.copyfile(file, folder / file.name)


def _write_weights(folder: Path, job: _Job, progress: Progress) -> None:
    done = 0
    for name, tensors in _named_files(job):
        with SafetensorsWriter(folder / name, _entries(tensors, job.dtype)) as writer:
            for tensor in tensors:
                for block in tensor.blocks(job.dtype, job.seed):
                    writer.write_part(tensor.name, block)
                    done += block.nbytes
                    progress(done, job.total_bytes)
    _write_index(folder, job)


def _write_index(folder: Path, job: _Job) -> None:
    weight_map = {tensor.name: name for name, tensors in _named_files(job) for tensor in tensors}
    index = {"metadata": {"total_size": job.total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _named_files(job: _Job) -> list[tuple[str, list[EnlargedTensor]]]:
    files = list(_files(job))
    return [(f"model-{i:05d}-of-{len(files):05d}.safetensors", tensors) for i, tensors in enumerate(files, 1)]


def _entries(tensors: Sequence[EnlargedTensor], dtype: str) -> list[Entry]:
    return [(tensor.name, dtype, tensor.shape) for tensor in tensors]


def _files(job: _Job) -> Iterator[list[EnlargedTensor]]:
    """Tensors by file, in order, up to `file_bytes` a file (a larger tensor is alone)."""
    file: list[EnlargedTensor] = []
    size = 0
    for tensor in job.tensors():
        nbytes = _nbytes(tensor, job.dtype)
        if file and size + nbytes > job.file_bytes:
            yield file
            file, size = [], 0
        file, size = [*file, tensor], size + nbytes
    yield file


def _nbytes(tensor: EnlargedTensor, dtype: str) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[dtype]

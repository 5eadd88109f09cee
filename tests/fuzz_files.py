"""Sound files, and how they are spoilt by chance."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

SPARSE_BYTES = 3_000_000_000
Json = Any
Commands = Iterator[list[str]]

# ------------------------------------------------------------------------------------------------- sound files

MODELS = (
    ("family_cases", "llama, tied", "30KB"),
    ("family_cases", "llama", "1GB"),
    ("family_cases", "gpt2", "1GB"),
    ("family_cases", "falcon, new architecture", "1GB"),
    ("family_cases", "opt, projected", "1GB"),
    ("family_cases", "gemma2", "1GB"),
    ("family_cases", "qwen2_moe", "100KB"),
    ("family_cases", "phi3, longrope", "1GB"),
    ("encoder_decoder_cases", "t5", "1GB"),
    ("encoder_decoder_cases", "bart", "1GB"),
)


@dataclass(frozen=True)
class Sound:
    """Files that can be read."""

    models: tuple[Path, ...]
    trace: Path
    settings: tuple[Path, ...]
    figures: Path

    @classmethod
    def at(cls, folder: Path) -> "Sound":
        models = tuple(sorted((folder / "models").iterdir()))
        return cls(models, folder / "run.trace", tuple(sorted((folder / "yaml").iterdir())), folder / "doctor.json")

    @classmethod
    def make(cls, folder: Path) -> "Sound":
        """In a process of its own: models are saved by torch, which takes more memory than what is measured here."""
        subprocess.run([sys.executable, "-m", "tests.fuzz_files", str(folder)], check=True, env=_environment())
        return cls.at(folder)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _make(folder: Path) -> None:
    (folder / "models").mkdir(parents=True)
    for number, (module, name, file_bytes) in enumerate(MODELS):
        _save_model(module, name, folder / "models" / f"{number:02d} {name}", file_bytes)
    _save_trace(folder / "run.trace")
    (folder / "yaml").mkdir()
    for number, text in enumerate(SETTINGS):
        (folder / "yaml" / f"{number}.yaml").write_text(text)
    (folder / "doctor.json").write_text(json.dumps(figures(folder)))


def _save_model(module: str, name: str, path: Path, file_bytes: str) -> None:
    from importlib import import_module

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from tests.tiny import byte_tokenizer

    case = import_module(f"tests.{module}").CASES[name]
    config = AutoConfig.for_model(case.model_type, **case.fields)
    kind = AutoModelForCausalLM if module == "family_cases" else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    kind.from_config(config, dtype=torch.float32).save_pretrained(path, max_shard_size=file_bytes)
    byte_tokenizer().save_pretrained(path)
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|end|>", "eos_token": "<|end|>"}))


def _save_trace(path: Path) -> None:
    from llmcad_actors.core.trace import TraceBatch
    from llmcad_actors.core.tree import TokenTree
    from llmcad_actors.messages import pack
    from llmcad_actors.trace.file import TraceHeader, TraceWriter

    settings = {"memory": "1GB", "widths": (1, 3)}
    header = TraceHeader("/models/none", None, settings, (3, 7), 100, 10.0, "2025-01-01T00:00:00+00:00", "0")
    writer, at, rng = TraceWriter(path, header), 10.0, random.Random(0)
    for number in range(6):
        parents = [-1, 0, *(rng.randrange(-1, node) for node in range(2, 9))]
        tree = TokenTree.build(range(9), parents, [-rng.random() for _ in parents])
        reads = tuple(
            ("read", at + 0.1 * i, at + 0.1 * i + 0.15, {"shard": f"layer.{i}", "bytes": 1000}) for i in range(8)
        )
        writer.write(pack(TraceBatch("loader", reads, 0)))
        computed = [
            ("stall", at, at + 0.5, {"shard": "layer.0"}),
            ("compute", at + 0.5, at + 0.9, {"shard": "layer.0"}),
        ]
        writer.write(pack(TraceBatch("verifier", (*computed, ("pass", at, at + 1.0, {"rows": 16})), number)))
        steps = (("step", at, at + 0.1, {"nodes": 1, "provisional": bool(number % 2)}),)
        writer.write(pack(TraceBatch("draft", (*steps, ("reroot", at, at, {"head_start": True, "nodes": 4})), 0)))
        own = (
            ("grow", at, at + 0.1, {"steps": 3, "drafted": 9, "head_start": False}),
            ("submission", at + 0.1, at + 0.1, {"tree": tree}),
            ("verify", at + 0.1, at + 1.0, {"nodes": 9}),
            ("verdict", at + 1.0, at + 1.0, {"path": (0, 1), "bonus": 21, "stopped": False}),
        )
        writer.write(pack(TraceBatch("coordinator", own, 0)))
        at += 1.0
    writer.close()


def figures(place: Path) -> Json:
    flops = {"float32": {"1": 1e10, "64": 1e11}, "bfloat16": {"1": 1e10, "64": 2e11}}
    from llmcad_actors.machine.figures import VERSION, cpu_name, device_of

    rate = {"threads": 2, "chunk_bytes": 8388608, "bytes_per_s": 1e9}
    disk = {**rate, "is_direct": True, "rates": [rate]}
    compute = {"threads": 2, "matrix": [512, 512], "copy_bytes_per_s": 1e10}
    compute |= {"matmul_flops": flops, "layer_flops": flops}
    return {
        "version": VERSION,
        "disks": {device_of(place): disk},
        "cpus": {cpu_name(): compute},
    }


SETTINGS = (
    "memory: 8GB\ndtype: float32\nmax_nodes: 64\nwidths: [1, 1, 3, 1]\nfallback: fixed-tree\n",
    "memory: 75%\nmax_context: 256\nbuilder: pacer\nfallback: adaptive\nalpha: 0.02\nprovisional: false\n",
    "# comment\nmemory: 8GB\nthreads: 1\ndraft_threads: 1\nread_threads: 2\nchunk_bytes: 4194304\n",
    "memory: 8GB\nread_limit: 400MB/s\ntarget: nowhere\ndraft: none\nmax_nodes: 0x10\nread_ahead: off\n",
    "memory: 8GB\nfallback: fixed-depth\ndepth: 3\nbatch: 8\nchildren: 4\nsharpen: no\nextent_bytes: 1048576\n",
)

# ------------------------------------------------------------------------------------------------ spoilt values

RAW = {  # what json.dumps does not write
    "@huge float": "1e400",
    "@5000 digits": "1" * 5000,
    "@4000 digits": "9" * 4000,
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@deep": "[" * 50_000 + "]" * 50_000,
    "@deep object": '{"a":' * 5000 + "1" + "}" * 5000,
    "@90 deep": "[" * 90 + "]" * 90,
    "@word": "undefined",
    "@brackets": "[" + "{}," * 300_000 + "{}]",
}
NASTY: tuple[Json, ...] = (
    *(None, True, False, 0, 1, 2, -1, 3, 7, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 100_000_000),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e20, 1e308),
    *(
        "",
        "x",
        "0",
        "12",
        "true",
        "a" * 5000,
        "\ud800",
        "\0",
        "[/red]",
        "$\\frac{",
        "../../x",
        "/etc/passwd",
        "é" * 300,
    ),
    *([], [[]], {}, [None], [0], [1, 2], ["a"], {"": 0}, {"a": {"b": []}}, [[1], [2]], [1.5], [-1], [10**30], [True]),
    *RAW,
)


def spoilt_value(rng: random.Random, value: Json) -> Json:
    """Another value, near or far."""
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, value * 1000, -value, value * 10**9, str(value), value // 2, [value]))
    return deepcopy(rng.choice(NASTY))  # one change after the other must not change what is put in


def spoil_json(rng: random.Random, document: Json) -> Json:
    """One change somewhere in a document of lists and dicts."""
    path: list[tuple[Any, Any]] = []
    here = document
    while isinstance(here, dict | list) and here and (not path or rng.random() < 0.8):
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        path.append((here, key))
        here = here[key]
    if not path:
        return spoilt_value(rng, document)
    holder, key = path[-1]
    way = rng.random()
    if way < 0.12:
        del holder[key]
    elif way < 0.2 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "a" * 5000, str(key) + "0", "model_type", "\ud800"))] = holder.pop(key)
    elif way < 0.26 and isinstance(holder, list):
        holder.extend(deepcopy(holder) * rng.choice((1, 3, 200)))
    elif way < 0.32 and len(path) > 1:
        holder[key] = deepcopy(rng.choice(list(path[0][0].values())) if isinstance(path[0][0], dict) else path[0][0])
    else:
        holder[key] = spoilt_value(rng, here)
    return document


def dumped(document: Json) -> bytes:
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()


def spoil_bytes(rng: random.Random, data: bytes, near: int = 1 << 30) -> bytes:
    """Flipped, cut, repeated, inserted."""
    end = min(len(data), near)
    at = rng.randrange(end + 1)
    other = min(end, at + rng.choice((1, 2, 8, 100, 5000)))
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at] + bytes(rng.randrange(256) for _ in range(other - at)) + data[other:],
        lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if at < end else data,
        lambda: data[:at],
        lambda: data[:at] + data[other:],
        lambda: data[:other] + data[at:],
        lambda: data[:at] + rng.choice((b"\xff", b"\0" * 9, b"[" * 2000, b'{"a":' * 2000, b"\xc1", b'"')) + data[at:],
        lambda: data + bytes(rng.randrange(256) for _ in range(rng.choice((1, 100)))),
    )
    return rng.choice(ways)()


def spoil_place(rng: random.Random, file: Path) -> None:
    """Something else where a file should be."""
    size = file.stat().st_size
    file.unlink()
    ways: tuple[Callable[[], object], ...] = (
        lambda: None,
        file.mkdir,
        lambda: os.mkfifo(file),
        lambda: file.symlink_to(file.name),
        lambda: file.symlink_to("/dev/zero"),
        lambda: file.symlink_to("nowhere"),
        lambda: file.symlink_to("/etc"),
        lambda: _sparse(file, SPARSE_BYTES),
        lambda: _sparse(file, size),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(b"[" * 3_000_000),
        lambda: file.write_bytes(b'{"a":' * 500_000),
        lambda: file.write_bytes(b"[" + b"{}," * 1_200_000 + b"{}]"),
        lambda: file.write_bytes(b'{"weight_map":{' + b",".join(b'"%d":"a"' % i for i in range(200_000)) + b"}}"),
        lambda: file.write_bytes(rng.randbytes(5000)),
        lambda: file.write_text("[]"),
        lambda: file.write_text("null"),
        lambda: file.write_text("{}"),
    )
    rng.choice(ways)()


def _sparse(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)


# ------------------------------------------------------------------------------------------------------- models

NAMES = (
    "~nosuchuser",
    "a" * 5000,
    "a/" * 3000,
    "",
    "-",
    ".",
    "/",
    "/dev/null",
    "x\ny",
    "\udcff",
    "[/red]",
    "../..",
    "~",
)


def spoilt_model(sound: Sound, place: Path, rng: random.Random) -> Commands:
    """A folder with one to three faults, planned as target, draft, or both."""
    source, folder = rng.choice(sound.models), place / rng.choice(("model", "model", "[bold]", "\udcff", "x" * 200))
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _spoil_folder(rng, folder)
    _spoil_figures(rng, sound.figures, Path(os.environ["LLMCAD_CACHE"]) / "doctor.json")
    target = rng.choice(NAMES) if rng.random() < 0.01 else str(folder)
    words = ["plan", "--target", target, "--memory", rng.choice(("8GB", "8GB", "8GB", "50%", "1MB"))]
    if rng.random() < 0.3:
        words += ["--draft", rng.choice((str(folder), str(source)))]
    if rng.random() < 0.1:
        words[2] = str(source)
        words += ["--draft", str(folder)]
    yield words + rng.choice(([], ["--json"]))


def _spoil_folder(rng: random.Random, folder: Path) -> None:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.endswith("jinja"))
    jsons = [file for file in files if file.suffix == ".json" and file.stat().st_size < 100_000]
    files = [file for file in files if file.stat().st_size < SPARSE_BYTES]
    weights = [file for file in files if file.suffix == ".safetensors"]
    way = rng.random()
    if way < 0.45 and jsons:
        likely = [file for file in jsons if file.name in ("config.json", "generation_config.json")]
        _spoil_json_file(rng, rng.choice(likely if likely and rng.random() < 0.7 else jsons))
    elif way < 0.7 and weights:
        _spoil_header(rng, rng.choice(weights))
    elif way < 0.85 and files:
        file = rng.choice(files)
        _write(file, spoil_bytes(rng, file.read_bytes(), rng.choice((16, 3000, 1 << 30))))
    elif files:
        spoil_place(rng, rng.choice(files))


def _write(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def _spoil_json_file(rng: random.Random, file: Path) -> None:
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    for _ in range(rng.choice((1, 1, 2, 4))):
        document = spoil_json(rng, document)
    if isinstance(document, dict) and rng.random() < 0.3:
        document[rng.choice(KEYS)] = deepcopy(rng.choice(NASTY))
    _write(file, dumped(document))


KEYS = (
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "suppress_tokens", "bad_words_ids"),
    *("repetition_penalty", "no_repeat_ngram_size", "min_length", "forced_bos_token_id", "num_beams", "stop_strings"),
    *("rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "layer_types"),
    *("quantization_config", "sliding_window", "final_logit_softcapping", "max_position_embeddings", "model_type"),
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "vocab_size", "hidden_size", "attention_bias", "d_kv"),
    *("original_max_position_embeddings", "weight_map", "tokenizer_class", "auto_map", "chat_template", "alibi"),
)


def _spoil_header(rng: random.Random, file: Path) -> None:
    """Of a safetensors file: its entries, or its length; the data stays."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.1:
        lie = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 99_999_999, len(data)))
        _write(file, max(0, lie).to_bytes(8, "little") + header + rest)
        return
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        return
    for _ in range(rng.choice((1, 1, 2))):
        entries = _spoil_entries(rng, entries)
    header = dumped(entries)
    if rng.random() < 0.05 and header.startswith(b"{"):
        header = b"{" + header[1:].split(b"}")[0] + b"}," + header[1:]  # an entry twice
    _write(file, len(header).to_bytes(8, "little") + header + rest)


def _spoil_entries(rng: random.Random, entries: Json) -> Json:
    names = [name for name in entries if name != "__metadata__"] if isinstance(entries, dict) else []
    if len(names) < 2 or rng.random() < 0.4:
        return spoil_json(rng, entries)
    one, other = rng.sample(names, 2)
    way = rng.random()
    if way < 0.25:
        entries[one], entries[other] = entries[other], entries[one]
    elif way < 0.5 and isinstance(entries[one], dict) and isinstance(entries[one].get("shape"), list):
        entries[one]["shape"] = rng.choice(_SHAPES)(entries[one]["shape"])
    elif way < 0.75 and isinstance(entries[one], dict) and isinstance(entries[other], dict):
        entries[one]["data_offsets"] = deepcopy(entries[other].get("data_offsets"))
    else:
        entries[rng.choice(_NAMES)] = entries.pop(one)
    return entries


_SHAPES: tuple[Callable[[list[Any]], Json], ...] = (
    lambda shape: shape[::-1],
    lambda shape: [*shape, 1],
    lambda shape: [0, *shape],
    lambda shape: [2**62, *shape],
    lambda shape: [1] * 1000,
    lambda shape: [10**18] * 500,
    lambda shape: [],
    lambda shape: [-1 * (n if isinstance(n, int) else 1) for n in shape],
    lambda shape: [True for _ in shape],
    lambda shape: [str(n) for n in shape],
)
_NAMES = (
    *("lm_head.weight", "model.layers.99999999.x", "model.layers.-1.x", "h.0.x", "a" * 5000, "", "\ud800", "[/red]"),
    *(
        f"model.layers.{'9' * 5000}.x",
        "model.layers.²",
        "model.layers.00.x",
        "model.layers.0.",
        "position_ids",
        "x.bias",
    ),
)


def _spoil_figures(rng: random.Random, sound: Path, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    if file.is_symlink() or not file.is_dir():
        file.unlink(missing_ok=True)
    else:
        shutil.rmtree(file)
    if rng.random() < 0.1:
        shutil.copyfile(sound, file)
        if rng.random() < 0.8:
            _spoil_json_file(rng, file)
        else:
            spoil_place(rng, file)


# ------------------------------------------------------------------------------------------------------- traces


def spoilt_trace(sound: Sound, place: Path, rng: random.Random) -> Commands:
    """A trace with a fault in its bytes or in what they say, looked at in all ways."""
    file = place / "run.trace"
    data = sound.trace.read_bytes()
    way = rng.random()
    if way < 0.3:
        for _ in range(rng.choice((1, 1, 3))):
            data = spoil_bytes(rng, data)
        file.write_bytes(data)
    elif way < 0.35:
        file.write_bytes(data)
        spoil_place(rng, file)
    elif way < 0.4:
        file.write_bytes(rng.choice(_FORGED) + (data if rng.random() < 0.5 else b""))
    else:
        values = _opened(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            _spoil_values(rng, values)
        file.write_bytes(b"".join(_closed(value) for value in values))
    yield ["trace", str(file)]
    yield ["trace", str(file), "--tree", str(rng.choice((1, 2, 6, 7)))]
    yield ["trace", str(file), "--out", str(place / "out.json")]
    if rng.random() < 0.03:
        yield ["trace", str(file), "--png", str(place / "out.png")]


def _nested(depth: int, code: int) -> bytes:
    data = b"\xc0"
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(code, data))
    return data


_FORGED = (
    *(_nested(depth, code) for depth in (3, 9, 500) for code in (1, 2, 3)),
    _nested(20_000, 2),
    b"\xdd\xff\xff\xff\xff",  # a list of 4,294,967,295
    b"\xdd\x05\xff\xff\xff" * 100,
    b"\xdf\xff\xff\xff\xff",
    b"\xc9\x7f\xff\xff\xff\x02",
    b"\xdb\xff\xff\xff\xff",
    b"\x91" * 100_000 + b"\xc0",
    b"\xd7\xff" + b"\xff" * 8,  # a time
)


@dataclass
class Ext:
    """An extension, opened."""

    code: int
    body: Any


def _opened(data: bytes) -> list[Any]:
    def hook(code: int, inner: bytes) -> Any:
        return Ext(code, msgpack.unpackb(inner, ext_hook=hook, strict_map_key=False))

    unpacker = msgpack.Unpacker(ext_hook=hook, strict_map_key=False)
    unpacker.feed(data)
    return list(unpacker)


def _closed(value: Any) -> bytes:
    def close(value: Any) -> Any:
        if isinstance(value, Ext):
            return msgpack.ExtType(value.code, msgpack.packb(value.body, default=close, unicode_errors="surrogatepass"))
        return None  # a number that does not fit

    packed: bytes = msgpack.packb(value, default=close, unicode_errors="surrogatepass")
    return packed


def _is_raw(value: Json) -> bool:
    return isinstance(value, str) and value in RAW


_VALUES: tuple[Any, ...] = (
    *(value for value in NASTY if not (isinstance(value, int) and value >= 2**64) and not _is_raw(value)),
    *(math.nan, math.inf, -1e300, b"", b"x" * 99, -(2**63), {1: 2}, {None: []}, [[[[[[[[[[[[]]]]]]]]]]]]),
    *(Ext(3, ["O", [1], b"x" * 8]), Ext(3, ["<i8", [-1], b"x" * 8]), Ext(3, ["<i8", [2**60], b""]), Ext(1, [[0], [0]])),
    *(Ext(2, ["os:system", "true"]), Ext(2, ["Stats", 1, 2]), Ext(9, []), Ext(2, []), Ext(1, [[-1], [-1], [0.0]])),
    *(Ext(2, ["TraceBatch", "draft", [["step", 1.0, 2.0, {}]], 0]), Ext(2, ["TraceBatch", "loader", "read", 0])),
    Ext(1, [list(range(3000)), list(range(-1, 2999)), [-0.1] * 3000]),
    Ext(2, ["TraceBatch", "loader", [["read", i * 1e-3, 9.0 + i, {"bytes": 1}] for i in range(20_000)], 0]),
)


def _spoil_values(rng: random.Random, value: Any) -> None:
    """One change somewhere inside, extensions included."""
    while True:
        items = value.body if isinstance(value, Ext) else value
        if not isinstance(items, list | dict) or not items:
            return
        keys = list(items) if isinstance(items, dict) else list(range(len(items)))
        key = rng.choice(keys)
        below = items[key]
        if isinstance(below, list | dict | Ext) and rng.random() < 0.85:
            value = below
            continue
        way = rng.random()
        if way < 0.12:
            del items[key]
        elif way < 0.2 and isinstance(items, list):
            items.insert(key, deepcopy(rng.choice(items)))
        elif way < 0.25 and isinstance(items, dict):
            items[rng.choice((None, 1, "x", "tree", "path"))] = items.pop(key)
        else:
            items[key] = deepcopy(rng.choice(_VALUES))
        return


# --------------------------------------------------------------------------------------------------------- YAML

_SCALARS = (
    *("", "~", "null", "yes", "0", "-1", "1e9", "1.0e+400", ".nan", ".inf", "9" * 5000, "0x" + "f" * 6000, "1:2:3:4:5"),
    *(
        "2001-99-99",
        "!!python/object/apply:os.system [true]",
        "!!binary aGk=",
        "!!int x",
        "[",
        "]",
        "{",
        "'",
        '"',
        "&a b",
    ),
    *("*a", "[1, 2", "[[1]]", "[" * 3000, "{a: " * 3000, "a: b: c", "| x", "%", "@x", "`", "\t", '"\\ud800"', '"\\0"'),
    *("a" * 5000, "[a, [b]]", "{x: 1}", "? [a]", "1.5", "1000000000000", "100%", "101%", "1e400GB", "5GB/s", "8 GB"),
    *(
        "[" + "1," * 9000 + "1]",
        "99999999999999999999",
        "!!set {a}",
        "<<",
        "true",
        "[/red]",
        "fixed-tree",
        "none",
        "none",
    ),
)
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
_MERGES = "a: &a {x: 1}\n" + "".join(
    f"b{i}: &b{i} {{<<: [{','.join(['*a' if not i else f'*b{i - 1}'] * 9)}]}}\n" for i in range(9)
)


def spoilt_settings(sound: Sound, place: Path, rng: random.Random) -> Commands:
    """A YAML file with faults, planned with a sound model."""
    file = place / "settings.yaml"
    text = rng.choice(sound.settings).read_text()
    way = rng.random()
    if way < 0.25:
        file.write_bytes(spoil_bytes(rng, text.encode()))
    elif way < 0.33:
        file.write_text(text)
        spoil_place(rng, file)
    elif way < 0.4:
        file.write_text(rng.choice((_BOMB, _MERGES, text * 2, "- " * 5000, "a:\n " * 3000, "? " * 5000, text * 1000)))
    else:
        lines = text.splitlines()
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(lines))
            key = rng.choice((lines[at].partition(":")[0], rng.choice(_FIELDS)))
            lines[at] = f"{key}: {rng.choice(_SCALARS)}"
        file.write_text("\n".join(lines))
    words = ["plan", "--config", str(file)]
    yield [*words, "--target", str(rng.choice(sound.models))]


_FIELDS = (
    *("target", "draft", "memory", "dtype", "max_nodes", "max_context", "builder", "fallback", "depth", "widths"),
    *(
        "alpha",
        "threshold",
        "provisional",
        "batch",
        "children",
        "threads",
        "read_threads",
        "chunk_bytes",
        "extent_bytes",
    ),
    *("read_limit", "prefill_chunk", "read_ahead", "plain_ray", "[a]", "1", "~", "!!x y", "memory"),
)

SPOILERS = {"models": spoilt_model, "traces": spoilt_trace, "yaml": spoilt_settings}

if __name__ == "__main__":
    _make(Path(sys.argv[1]))

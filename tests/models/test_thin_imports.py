"""What is deferred is not loaded, changes no family's output, and is there as soon as it is asked for."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmcad_actors.machine import versions
from llmcad_actors.models import thin_imports
from tests import encoder_decoder_cases, family_cases
from tests.encoder_decoder_cases import plain_pair
from tests.plain import Plain, encode
from tests.tiny import PROMPTS, tiny_llama

COUNT = 12
CONTEXT = 128
GROUPS = 4  # the families in so many interpreters, each within its time
SHAPED = {"llama, rope llama3"}
"""Computes on the meta device, when it is made as a draft, with an operator that does not know its shapes by itself."""
COMPILERS = {"sympy", "torch._dynamo.convert_frame", "torch.distributed.tensor"}
CASES: dict[str, Any] = {**family_cases.CASES, **encoder_decoder_cases.CASES}

REPORT = """
waiting = [name for name in thin_imports.DEFERRED if type(sys.modules[name]).__name__ == "DeferredModule"]
print(json.dumps({"found": found, "waiting": waiting, "modules": sorted(sys.modules)}))
"""
GENERATE = """
import json, sys
from pathlib import Path
from llmcad_actors.models import thin_imports
if sys.argv[1] == "thin":
    assert thin_imports.install()
from tests.test_lossless import local
found = {}
for path, prompt in json.loads(sys.argv[2]).items():
    engine = local(Path(path), Path(path), max_nodes=4, max_context=CONTEXT)
    found[path], _ = engine.generate(prompt, COUNT, provisional=False)
""".replace("CONTEXT", str(CONTEXT)).replace("COUNT", str(COUNT))

COMPILE = """
import json, sys
from llmcad_actors.models import thin_imports
thin_imports.install()
import torch
import transformers.models.llama.modeling_llama
before = type(sys.modules["torch._dynamo"]).__name__, torch._dynamo.disable(abs) is abs
compiled = torch.compile(lambda x: x * 2 + 1, backend="eager", fullgraph=True)
found = [*before, compiled(torch.ones(2)).tolist()]
"""

UNKNOWN_SHAPE = """
import json, sys
from pathlib import Path
from llmcad_actors.models import thin_imports
thin_imports.install()
import torch
from transformers.models.llama import modeling_llama
from llmcad_actors.models.skeleton import build_skeleton
class Norm(modeling_llama.LlamaRMSNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        weight = torch.empty(2, device="meta")
        torch.where(weight > 0, weight, weight)
modeling_llama.LlamaRMSNorm = Norm
found = type(build_skeleton(Path(sys.argv[1]), torch.float32)).__name__
"""


def in_a_fresh_interpreter(code: str, *args: str) -> Any:
    command = [sys.executable, "-c", code + REPORT, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: Path(CASES[name].save(folder / name.replace("/", " ")))


def expected(path: Path, name: str, prompt: tuple[int, ...]) -> list[int]:
    """What transformers, imported as ever, generates."""
    plain = plain_pair(path) if name in encoder_decoder_cases.CASES else Plain.of(path)
    return list(plain.greedy(prompt, COUNT))


@pytest.mark.parametrize("group", range(GROUPS))
def test_every_family_generates_the_same_and_nothing_deferred_is_loaded(
    saved: Callable[[str], Path], group: int
) -> None:
    names = [name for name in CASES if name not in SHAPED][group::GROUPS]
    report = generated_alike(saved, names)
    assert report["waiting"] == list(thin_imports.DEFERRED)
    assert not COMPILERS & set(report["modules"])


def test_a_family_that_needs_the_shapes_of_operators_gets_them_alone(saved: Callable[[str], Path]) -> None:
    report = generated_alike(saved, sorted(SHAPED))
    assert report["waiting"] == ["torch._dynamo"]
    assert not COMPILERS - {"sympy"} & set(report["modules"])


def generated_alike(saved: Callable[[str], Path], names: Sequence[str]) -> Any:
    """The report of an interpreter in which each is its own draft, after a comparison of the tokens."""
    paths = {str(saved(name)): name for name in names}
    prompts = {path: encode(Path(path), PROMPTS[1]) for path in paths}
    report = in_a_fresh_interpreter(GENERATE, "thin", json.dumps(prompts))
    for path, name in paths.items():
        assert report["found"][path] == expected(Path(path), name, prompts[path]), name
    return report


def test_without_the_deferring_all_of_it_would_be_loaded(saved: Callable[[str], Path]) -> None:
    path = saved("llama")
    report = in_a_fresh_interpreter(GENERATE, "whole", json.dumps({str(path): encode(path, PROMPTS[1])}))
    assert report["waiting"] == []
    assert set(report["modules"]) > COMPILERS


def test_the_compiler_is_there_when_it_is_asked_for() -> None:
    report = in_a_fresh_interpreter(COMPILE)
    assert report["found"] == ["DeferredModule", True, [3.0, 3.0]]
    assert report["waiting"] == []


def test_a_skeleton_whose_shapes_torch_does_not_know_by_itself_is_built_with_the_deferred_modules(
    tmp_path: Path,
) -> None:
    report = in_a_fresh_interpreter(UNKNOWN_SHAPE, str(tiny_llama(tmp_path, seed=1)))
    assert report["found"] == "LlamaForCausalLM"
    assert report["waiting"] == ["torch._dynamo"]


def test_an_untested_torch_is_imported_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert thin_imports.is_tested()
    monkeypatch.setitem(versions.TESTED, "torch", "2.12")
    assert not thin_imports.is_tested()


def test_a_process_that_has_torch_stays_as_it_is() -> None:
    finders = list(sys.meta_path)
    assert not thin_imports.install()
    assert sys.meta_path == finders

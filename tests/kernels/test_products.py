"""The package's own products: right for every shape, and a row's do not depend on the rows beside it."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.errors import ConfigError
from llmcad_actors.kernels import library as kernels
from llmcad_actors.kernels import products

needs_kernels = pytest.mark.skipif(not kernels.sets(), reason="the kernels are not built")
EMULATED = ("amx",) if shutil.which("gcc") and "amx" not in kernels.sets() else ()
every_set = pytest.mark.parametrize("instructions", [*kernels.sets(), *EMULATED])
STORED = list(products.KINDS)
DEPTHS = [1, 3, 7, 8, 15, 16, 17, 31, 64, 257, 511, 639, 640, 641, 1300]


@cache
def emulating() -> ctypes.CDLL:
    """The kernels built with tiles in plain C: AMX's own code, on any machine."""
    source = str(Path(kernels.__file__).parent / "kernels.c")
    options = ["-O2", "-shared", "-fPIC", "-ffp-contract=off", "-DLLMCAD_EMULATED_TILES"]
    with TemporaryDirectory() as folder:
        subprocess.run(["gcc", *options, source, "-lm", "-o", f"{folder}/kernels.so"], check=True)
        return kernels.loaded(f"{folder}/kernels.so")


@contextmanager
def using(instructions: str) -> Iterator[None]:
    """That set inside."""
    with pytest.MonkeyPatch.context() as patched, kernels.instructions.forced(instructions):
        if instructions in EMULATED:
            patched.setattr(kernels, "library", emulating)
        yield


@pytest.mark.skipif(not shutil.which("gcc"), reason="cannot be built here")
def test_they_are_built_where_they_can_be() -> None:
    assert kernels.available()
    assert kernels.sets()[0] == "portable"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_kernels
@every_set
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    depth=st.sampled_from(DEPTHS),
    stored=st.sampled_from(STORED),
    decades=st.sampled_from([0, 3, 12]),
    seed=st.integers(0, 2**16),
)
def test_errors_are_at_most_four_times_those_of_torch(
    instructions: str, rows: int, outputs: int, depth: int, stored: torch.dtype, decades: int, seed: int
) -> None:
    """Torch's largest of 70 outputs: a single one may be nothing by chance. And one rounding."""
    torch.manual_seed(seed)
    x = torch.randn(rows, depth) * 10 ** (decades * (2 * torch.rand(depth) - 1))
    weight = torch.randn(70, depth).to(stored)
    exact = x.double() @ weight.double().t()
    torchs = (F.linear(x, weight.float()) - exact).abs().max(dim=1, keepdim=True).values
    with using(instructions):
        found = products.times(x, weight[:outputs])
    assert found.dtype == torch.float32
    rounding = x.double().abs() @ weight.double().abs().t() * 2**-23
    assert bool(((found - exact[:, :outputs]).abs() <= 4 * torchs + rounding[:, :outputs]).all())


@needs_kernels
@every_set
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("depth", [5, 700])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(instructions: str, stored: torch.dtype, depth: int) -> None:
    """Alone, among few, among as many as are held at once, and among more."""
    torch.manual_seed(depth)
    x, weight = torch.randn(260, depth), torch.randn(43, depth).to(stored)
    with using(instructions):
        alone = torch.cat([products.times(x[i : i + 1], weight) for i in range(len(x))])
        for count in (*range(2, 20), 40, 41, 47, 48, 64, 95, 96, 97, 144, 193, 260):
            for start in {0, 3, len(x) - count} if count < 250 else {0}:
                assert torch.equal(products.times(x[start : start + count], weight), alone[start : start + count])


@needs_kernels
@every_set
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_special_values_stay_what_they_are(instructions: str, rows: int, stored: torch.dtype) -> None:
    """Smallest numbers, of each type its own, too: torch keeps float32's, so do the kernels."""
    values = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), torch.finfo(stored).max, 6e-8, 1e-40]
    weight = torch.tensor(values * 3).to(stored)[:, None]
    with using(instructions):
        found = products.times(torch.ones(rows, 1), weight)
    for row in found:
        torch.testing.assert_close(row, weight[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@needs_kernels
@every_set
@pytest.mark.parametrize("rows", [1, 5, 50])
def test_what_is_no_number_stays_in_its_row_and_output(instructions: str, rows: int) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(rows, 40), torch.randn(30, 40).bfloat16()
    x[rows // 2, 33], weight[7, 39] = float("nan"), float("inf")
    with using(instructions):
        found = products.times(x, weight)
    lost = torch.zeros(rows, 30, dtype=torch.bool)
    lost[rows // 2, :] = lost[:, 7] = True
    assert torch.equal(~found.isfinite(), lost)


@needs_kernels
@every_set
@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_weights_may_lie_at_any_address(instructions: str, rows: int, stored: torch.dtype) -> None:
    torch.manual_seed(1)
    buffer, x = torch.randn(1 + 13 * 29).to(stored), torch.randn(rows, 29)
    with using(instructions):
        found = products.times(x, buffer[1:].view(13, 29))
        assert torch.equal(found, products.times(x, buffer[1:].view(13, 29).clone()))
    torch.testing.assert_close(found, x @ buffer[1:].view(13, 29).float().t(), rtol=0, atol=1e-5)


@needs_kernels
@every_set
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_every_output_is_computed_once_whatever_the_threads(
    monkeypatch: pytest.MonkeyPatch, instructions: str, threads: int, rows: int
) -> None:
    monkeypatch.setattr(products, "SMALL", 0)
    torch.manual_seed(2)
    x, weight = torch.randn(rows, 32), torch.randn(1000, 32).bfloat16()
    with torch_threads(1), using(instructions):
        expected = products.times(x, weight)
    with torch_threads(threads), using(instructions):
        for _ in range(20):
            assert torch.equal(products.times(x, weight), expected)


@needs_kernels
def test_torch_leaves_the_cores_to_the_kernels() -> None:
    """And has them again afterwards, also after an error."""
    with torch_threads(2):
        with kernels.threads.taken():
            assert (kernels.threads.count, torch.get_num_threads()) == (2, 1)
        with suppress(ValueError), kernels.threads.taken():
            raise ValueError
        assert kernels.threads.count == torch.get_num_threads() == 2


@needs_kernels
def test_a_variable_names_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, expected in (("portable", "portable"), (" None ", "none"), ("", kernels.sets()[-1])):
        monkeypatch.setenv(kernels.VARIABLE, wanted)
        kernels._wanted.cache_clear()
        assert kernels.instructions.name == expected
        assert kernels.available() is (expected != "none")
    monkeypatch.setenv(kernels.VARIABLE, "mmx")
    kernels._wanted.cache_clear()
    with pytest.raises(ConfigError, match="LLMCAD_KERNELS is 'mmx'; this machine has portable, "):
        kernels.available()
    kernels._wanted.cache_clear()

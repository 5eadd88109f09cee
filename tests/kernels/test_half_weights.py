"""The package's own kernel: its sums are right for every shape, and a row's do not depend on the rows beside it."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.kernels import half_weights
from llmcad_actors.kernels import library as kernels
from llmcad_actors.machine.processor import has_vectors

needs_kernel = pytest.mark.skipif(not half_weights.available(), reason="the kernel is not built")
STORED = [torch.bfloat16, torch.float16]


@pytest.mark.skipif(not has_vectors() or not shutil.which("gcc"), reason="cannot be built here")
def test_it_is_built_where_it_can_be() -> None:
    assert half_weights.available()


@needs_kernel
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 120),
    depth=st.sampled_from([1, 7, 8, 31, 256, 257, 600]),
    stored=st.sampled_from(STORED),
    seed=st.integers(0, 2**16),
)
def test_sums_are_right(rows: int, outputs: int, depth: int, stored: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, depth), torch.randn(outputs, depth).to(stored)
    expected = x.double() @ weight.double().t()
    found = half_weights.times(x, weight)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * depth**0.5)


@needs_kernel
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_more_rows_than_are_held_at_once(stored: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(32 * half_weights.PANEL + 5, 300), torch.randn(50, 300).to(stored)
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(half_weights.times(x, weight).double(), expected, rtol=0, atol=1e-4)


@needs_kernel
@given(rows=st.integers(1, 70), at=st.integers(0, 69), stored=st.sampled_from(STORED))
def test_a_row_has_the_same_bits_whatever_stands_beside_it(rows: int, at: int, stored: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 700), torch.randn(97, 700).to(stored)
    alone = half_weights.times(x[at % rows : at % rows + 1], weight)
    assert torch.equal(half_weights.times(x, weight)[at % rows], alone[0])


@needs_kernel
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_special_values_stay_what_they_are(stored: torch.dtype) -> None:
    values = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), torch.finfo(stored).max, 6e-8]
    weight = torch.tensor(values * 3).to(stored)[:, None]
    found = half_weights.times(torch.ones(1, 1), weight)
    torch.testing.assert_close(found[0], weight[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@needs_kernel
def test_weights_may_lie_at_any_address() -> None:
    torch.manual_seed(1)
    buffer, x = torch.randn(1 + 13 * 29).bfloat16(), torch.randn(3, 29)
    torch.testing.assert_close(
        half_weights.times(x, buffer[1:].view(13, 29)), x @ buffer[1:].view(13, 29).float().t(), rtol=0, atol=1e-5
    )


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_output_is_computed_once_whatever_the_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(2)
    x, weight = torch.randn(16, 128), torch.randn(1000, 128).bfloat16()
    expected = x @ weight.float().t()
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            torch.testing.assert_close(half_weights.times(x, weight), expected, rtol=0, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_torch_leaves_the_cores_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And has them again afterwards, also after an error."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with kernels.threads.taken():
            assert (kernels.threads.count, torch.get_num_threads()) == (2, 1)
        with suppress(ValueError), kernels.threads.taken():
            raise ValueError
        assert kernels.threads.count == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@needs_kernel
@given(
    outputs=st.integers(1, 120),
    depth=st.sampled_from([1, 7, 16, 31, 256, 273, 600]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_one_rows_sums_are_right(outputs: int, depth: int, threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    buffer, x = torch.randn(1 + outputs * depth).bfloat16(), torch.randn(depth)
    weight = buffer[1:].view(outputs, depth)  # at an odd address
    try:
        torch.set_num_threads(threads)
        found = half_weights.row_times(x, weight)
    finally:
        torch.set_num_threads(before)
    expected = weight.double() @ x.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * depth**0.5)


@needs_kernel
def test_one_row_leaves_a_core_to_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = torch.get_num_threads(), list[int]()
    pool = half_weights._pool

    def noted(count: int, caller: int) -> ThreadPoolExecutor:
        asked.append(count)
        return pool(count, caller)

    monkeypatch.setattr(half_weights, "_pool", noted)
    try:
        torch.set_num_threads(3)
        with kernels.threads.taken():
            half_weights.row_times(torch.randn(32), torch.randn(40, 32).bfloat16())
            half_weights.times(torch.randn(1, 32), torch.randn(40, 32).bfloat16())
    finally:
        torch.set_num_threads(before)
    assert (asked[0], asked[-1]) == (1, 2)


@needs_kernel
def test_special_values_of_one_row_stay_what_they_are() -> None:
    weight = torch.tensor([[1.0, float("inf")] * 16, [float("nan"), 1.0] * 16, [-0.0, 1e-40] * 16]).bfloat16()
    found = half_weights.row_times(torch.ones(32), weight)
    assert found[0] == float("inf") and found[1].isnan()
    assert found[2] == pytest.approx(16 * float(weight[2, 1]), rel=1e-6)

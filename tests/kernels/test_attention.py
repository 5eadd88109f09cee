"""Attention by the kernels: right for every shape, and a row's result is of its own keys alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.kernels import attention
from llmcad_actors.kernels import library as kernels
from llmcad_actors.kernels.attention import attend, everything, runs_of
from tests.kernels.test_products import every_set, needs_kernels, torch_threads

HIDDEN = torch.finfo(torch.float32).min
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(groups: int, kv_heads: int, rows: int, columns: int, width: int, seed: int) -> Inputs:
    """Queries, keys and values as models and caches give them, views of larger tensors; and what each row sees."""
    torch.manual_seed(seed)
    query = torch.randn(rows, groups * kv_heads, width).transpose(0, 1)
    key, value = (torch.randn(kv_heads, columns + 3, width)[:, :columns] for _ in range(2))
    prefix, tree = torch.arange(columns) < torch.randint(0, columns, ()), torch.rand(rows, columns) < 0.3
    seen = prefix | tree
    seen[:, -1] = True
    seen[: rows // 2] &= torch.arange(columns) >= columns // 3  # a window, for some
    return query, key, value, seen


def exact(given: Inputs, scale: float, softcap: float | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In float64: [rows, heads, width]."""
    query, key, value, seen = given
    groups = query.shape[0] // key.shape[0]
    keys, values = (each.double().repeat_interleave(groups, 0) for each in (key, value))
    scores = query.double() @ keys.transpose(1, 2) * scale
    scores = scores if bias is None else scores + bias
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def mask_of(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, HIDDEN)


shapes = {
    "groups": st.sampled_from([1, 2, 7]),
    "kv_heads": st.integers(1, 3),
    "rows": st.integers(1, 30),
    "columns": st.sampled_from([1, 2, 15, 16, 64, 65, 300]),
    "width": st.sampled_from([1, 4, 6, 16, 32, 40, 64, 80]),
    "seed": st.integers(0, 2**16),
}


@needs_kernels
@every_set
@given(**shapes)
def test_errors_are_like_those_of_torch(
    instructions: str, groups: int, kv_heads: int, rows: int, columns: int, width: int, seed: int
) -> None:
    given = query, key, value, seen = inputs(groups, kv_heads, rows, columns, width, seed)
    scale = width**-0.5
    with kernels.instructions.forced(instructions):
        found = attend(query, key, value, runs_of(mask_of(seen)), scale=scale)
    keys, values = (each.repeat_interleave(groups, 0)[None] for each in (key, value))
    torchs = F.scaled_dot_product_attention(query[None], keys, values, attn_mask=seen, scale=scale)[0].transpose(0, 1)
    expected = exact(given, scale)
    rounding = 2**-22 * float(value.abs().max()) * (1 + float(query.abs().max()) * width**0.5)
    assert float((found - expected).abs().max()) <= 4 * float((torchs - expected).abs().max()) + rounding


@needs_kernels
@every_set
@pytest.mark.parametrize("softcap", [0.5, 5.0, 1000.0])
@pytest.mark.parametrize("biased", [True, False])
def test_scores_may_be_capped_and_biased(instructions: str, softcap: float, biased: bool) -> None:
    given = query, key, value, seen = inputs(2, 3, 20, 77, 16, 4)
    bias = torch.randn(20, 6, 80).transpose(0, 1)[..., :77] if biased else None
    with kernels.instructions.forced(instructions):
        found = attend(query, key, value, runs_of(mask_of(seen)), scale=0.7, softcap=softcap, bias=bias)
    torch.testing.assert_close(found.double(), exact(given, 0.7, softcap, bias), rtol=0, atol=2e-6)


@needs_kernels
@every_set
@pytest.mark.parametrize(("groups", "columns", "width"), [(1, 70, 64), (3, 700, 40), (2, 40, 5), (12, 9, 128)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_row_has_the_same_bits_among_others_and_alone_with_its_keys(
    instructions: str, groups: int, columns: int, width: int, softcap: float | None
) -> None:
    """Wherever these keys lie: there they are in one run, here with others between them."""
    query, key, value, seen = inputs(groups, 2, 50, columns, width, columns)
    with kernels.instructions.forced(instructions):
        together = attend(query, key, value, runs_of(mask_of(seen)), scale=0.2, softcap=softcap)
        for row, own in enumerate(seen):
            keys, values = key[:, own].contiguous(), value[:, own].contiguous()
            runs = everything(1, keys.shape[1])
            alone = attend(query[:, row : row + 1], keys, values, runs, scale=0.2, softcap=softcap)
            assert torch.equal(alone[0], together[row])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_so_it_has_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(attention, "SMALL", 0)
    query, key, value, seen = inputs(4, 2, 100, 400, 32, 1)
    with torch_threads(1):
        expected = attend(query, key, value, runs_of(mask_of(seen)), scale=0.2)
    with torch_threads(threads):
        for _ in range(10):
            assert torch.equal(attend(query, key, value, runs_of(mask_of(seen)), scale=0.2), expected)


@needs_kernels
@every_set
def test_what_is_hidden_may_be_no_number(instructions: str) -> None:
    """Rows of the cache that nothing was written to."""
    query, key, value, seen = inputs(2, 2, 9, 40, 24, 6)
    seen[:, 13] = seen[:, 20] = False
    seen[4, 20] = True
    runs = runs_of(mask_of(seen))
    with kernels.instructions.forced(instructions):
        expected = attend(query, key, value, runs, scale=0.2)
        key[:, 13], value[:, 13], value[:, 20] = float("nan"), float("inf"), float("nan")
        found = attend(query, key, value, runs, scale=0.2)
    others = torch.arange(9) != 4
    assert torch.equal(found[others], expected[others])
    assert bool(found[4].isnan().all())


@needs_kernels
@given(rows=st.integers(0, 5), columns=st.integers(1, 40), seed=st.integers(0, 999))
def test_runs_are_the_zeros_of_a_mask(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    seen = torch.rand(rows, columns) < 0.5
    first, runs = runs_of(mask_of(seen))
    found = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for start, end in runs[first[row] : first[row + 1]].tolist():
            assert start < end and not found[row, max(start - 1, 0) : end].any()
            found[row, start:end] = True
    assert torch.equal(found, seen)

"""The cache holds exactly the rows that were kept, in order, however rows come and go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.models.kv_cache import TreeCache

LAYERS, HEADS, WIDTH = 2, 2, 3


def rows(numbers: list[int], layer: int) -> torch.Tensor:
    """One row [1, heads, 1, width] per number, recognisable."""
    values = torch.tensor(numbers, dtype=torch.float32) + layer / 10
    return values[None, None, :, None].expand(1, HEADS, len(numbers), WIDTH).clone()


def append(cache: TreeCache, numbers: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [cache.update(rows(numbers, layer), -rows(numbers, layer), layer) for layer in range(LAYERS)]


@given(data=st.data())
def test_a_cache_is_a_list_of_rows(data: st.DataObject) -> None:
    cache, model = TreeCache(LAYERS, capacity=64), list[int]()
    for number in range(0, 80, 10):
        new = list(range(number, number + data.draw(st.integers(1, 6))))
        model += new
        for layer, (keys, values) in enumerate(append(cache, new)):
            assert torch.equal(keys, rows(model, layer))
            assert torch.equal(values, -rows(model, layer))
        start = data.draw(st.integers(0, len(model)))
        kept = data.draw(st.sets(st.integers(start, len(model) - 1))) if start < len(model) else set[int]()
        cache.keep(start, sorted(kept))
        model = model[:start] + [model[i] for i in sorted(kept)]
        assert cache.length == cache.get_seq_length() == len(model)


def test_appending_moves_nothing() -> None:
    cache = TreeCache(LAYERS, capacity=8)
    first = [keys.data_ptr() for keys, _ in append(cache, [1, 2])]
    assert [keys.data_ptr() for keys, _ in append(cache, [3])] == first


def test_a_row_too_many_is_refused() -> None:
    cache = TreeCache(LAYERS, capacity=2)
    append(cache, [1, 2])
    with pytest.raises(ValueError, match="the cache holds 2 rows, 3 were asked for"):
        append(cache, [3])


def test_an_unused_cache_may_be_told_to_keep_nothing() -> None:
    cache = TreeCache(LAYERS, capacity=2)
    cache.keep(0, ())
    assert cache.length == 0

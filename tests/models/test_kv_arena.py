"""Every text finds exactly its own rows, in order, however blocks come, grow and go."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.models.kv_arena import Arena, Block

LAYERS, HEADS, WIDTH = 2, 2, 3


def rows(numbers: list[int], layer: int) -> torch.Tensor:
    """One row [1, heads, 1, width] per number, recognisable."""
    values = torch.tensor(numbers, dtype=torch.float32) + layer / 10
    return values[None, None, :, None].expand(1, HEADS, len(numbers), WIDTH).clone()


def write(arena: Arena, numbers: list[int], start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    places = np.arange(start, start + len(numbers))
    with arena.writing(places, np.array(numbers), max(arena.end, start + len(numbers))):
        return [arena.update(rows(numbers, layer), -rows(numbers, layer), layer) for layer in range(LAYERS)]


def held(arena: Arena, block: Block, count: int) -> list[int]:
    found: list[int] = arena.positions[block.start : block.start + count].tolist()
    for index, layer in enumerate(arena.layers):
        if layer.is_initialized:
            own = slice(block.start, block.start + count)
            assert torch.equal(layer.keys[:, :, own], rows(found, index))
            assert torch.equal(layer.values[:, :, own], -rows(found, index))
    return found


@given(data=st.data())
def test_blocks_keep_their_rows_wherever_they_are_moved(data: st.DataObject) -> None:
    arena, texts, number = Arena(LAYERS, capacity=40, scratch=4), list[tuple[Block, list[int]]](), 0
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["take", "write", "grow", "give back"]))
        if what == "take":
            size = data.draw(st.integers(1, 15))
            if not arena.fits(size):
                with pytest.raises(ValueError, match=f"the cache holds 40 rows, {arena.num_taken + size} were asked"):
                    arena.take(size)
                continue
            texts.append((arena.take(size), []))
        elif texts:
            block, text = data.draw(st.sampled_from(texts))
            if what == "write" and len(text) < block.size:
                new = list(range(number, number + data.draw(st.integers(1, block.size - len(text)))))
                number += len(new)
                write(arena, new, block.start + len(text))
                text += new
            elif what == "grow":
                size = block.size + data.draw(st.integers(0, 12))
                if arena.num_taken - block.size + size <= arena.capacity:
                    arena.resize(block, size)
                    assert block.size == size
                else:
                    with pytest.raises(ValueError, match="the cache holds 40 rows"):
                        arena.resize(block, size)
            elif what == "give back":
                arena.give_back(block)
                texts = [each for each in texts if each[0] is not block]
        assert arena.num_taken == sum(block.size for block, _ in texts)
        taken = sorted((block.start, block.end) for block, _ in texts)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
        assert arena.end == max((end for _, end in taken), default=0) <= arena.capacity
        for block, text in texts:
            assert held(arena, block, len(text)) == text


def test_a_pass_looks_at_what_is_there_and_what_it_writes() -> None:
    arena = Arena(LAYERS, capacity=8, scratch=3)
    block = arena.take(4)
    write(arena, [1, 2], block.start)
    found = write(arena, [7, 8, 9], arena.end)
    for layer, (keys, values) in enumerate(found):
        assert torch.equal(
            keys, rows([1, 2, 0, 0, 7, 8, 9], layer) * (torch.arange(7) % 7 // 2 != 1)[None, None, :, None]
        )
        assert torch.equal(values, -keys)
    assert [keys.data_ptr() for keys, _ in write(arena, [3], 2)] == [keys.data_ptr() for keys, _ in found]


def test_rows_that_overlap_are_read_before_they_are_written() -> None:
    arena = Arena(LAYERS, capacity=8)
    block = arena.take(8)
    write(arena, list(range(8)), 0)
    arena.copy([1, 3, 4, 6], 0)
    assert held(arena, block, 8) == [1, 3, 4, 6, 4, 5, 6, 7]

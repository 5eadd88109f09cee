import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.core.fixed_expansion import FixedExpansion
from tests.core.drafting import grow, step


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 99))
def test_every_node_of_a_level_gets_its_number_of_children(widths: list[int], batch: int, seed: int) -> None:
    builder = FixedExpansion(widths, batch)
    grow(builder, seed)
    tree, _ = builder.submission()
    level = 1
    for depth, width in enumerate(widths, start=1):
        level *= width
        assert np.count_nonzero(tree.depths == depth) == level
    assert tree.depths.max() == len(widths)


def test_a_chain_is_the_drafts_own_greedy_continuation() -> None:
    builder = FixedExpansion((1, 1, 1, 1))
    assert grow(builder, 5) == 4
    tree, _ = builder.submission()
    assert tree.parents.tolist() == [-1, 0, 1, 2]


def test_specinfers_default_tree_has_twenty_nodes() -> None:
    builder = FixedExpansion()
    assert grow(builder, 5) == 8
    assert len(builder.submission()[0]) == 20


def test_levels_are_finished_one_after_the_other() -> None:
    builder = FixedExpansion((3, 1, 1), batch=2)
    step(builder, 5)
    assert len(builder.next_nodes(9)) == 2
    step(builder, 5)
    assert len(builder.next_nodes(9)) == 1
    assert builder.rows(np.array(builder.next_nodes(9)))[2].tolist() == [1]


def test_growth_beyond_the_shape_goes_on_with_the_last_width() -> None:
    builder = FixedExpansion((2, 1))
    grow(builder, 5)
    tree, _ = builder.submission()
    for _ in range(3):
        assert step(builder, 5, beyond=True) == 2
    assert len(builder) == 10 and builder.submission()[0] == tree


def test_a_head_start_deeper_than_the_shape_is_cut_to_it() -> None:
    builder = FixedExpansion((1, 1))
    for _ in range(5):
        step(builder, 5, beyond=True)
    builder.reroot(0)
    assert len(builder) == 4 and builder.growth().depth == 2 and builder.growth().exhausted


@pytest.mark.parametrize("widths", [(), (1, 0), (-1,)])
def test_a_shape_without_children_is_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths"):
        FixedExpansion(widths)

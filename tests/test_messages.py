"""Everything that crosses processes comes out as it went in, and nothing else crosses."""

import dataclasses
import io
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given

from llmcad_actors import config, messages
from llmcad_actors.config import DraftSpec, LoaderSpec, VerifierSpec
from llmcad_actors.core.calibration import Calibration
from llmcad_actors.core.choosing import Choosing, TokenLogprobs
from llmcad_actors.core.costs import CostModel, Costs
from llmcad_actors.core.fallback import AdaptiveConfidence, FixedDepth, FixedTree, MarginalThroughput, TokenConfidence
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport, PassStats, Submission, Verdict
from llmcad_actors.core.stats import Stats
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.messages import pack, unpack, unpack_stream
from tests.core.drafting import trees

IDS = (1, 5, 4095)
STATS = Stats(seconds=1.5, new_tokens=3, tokens_per_pass=1.5, bytes_read=2**40)
PASS = PassStats(seconds=1.0, stall_s=0.25, compute_s=0.75, rows=16)
TREE = TokenTree.build([7, 8, 9], [-1, 0, 0], [-0.5, -1e4, 0.0])
COSTS = Costs(0.01, 1.0, 0.1, 0.002, 0.5, 0.25)
LOGPROBS = TokenLogprobs(3, -0.5, ((3, -0.5), (4, -1.5)))
VALUES: tuple[Any, ...] = (
    Request(IDS, 64, (0, 2), speculate=False, provisional=False),
    Choosing(0.5, 3, 0.9, 0.1, 1.5, 0.25, -1.0, ((7, 2.5),), 2**64 - 1, 5),
    LOGPROBS,
    Submission(TREE, True),
    Drafting({3: Submission(TREE)}, 0.25, 3, 9, 0.5, 0.1),
    messages.DraftOrder({4: Request(IDS, 64, ())}, (1, 2), {4: (Verdict((), 1, False),)}, FixedDepth(3), COSTS),
    Check(3, TREE, 512),
    PassReport(PASS, {3: Verdict((0, 2), 17, True, (LOGPROBS,))}, {4: "no token is left"}),
    Grown(2, 16, False),
    PASS,
    Verdict((0, 2), 17, True),
    messages.AskShard("layer.3"),
    messages.EndLease(7),
    messages.StreamShards(("layer.3", "head")),
    messages.Lease(7, "layer.3", (("weight", 4096, 32),)),
    messages.ReadingProgress("layer.3", 3, 24, 2**40, 1.5),
    messages.Tokens(IDS, STATS),
    messages.Provisional(IDS),
    messages.DraftEnded(),
    messages.Finished("stop", STATS),
    messages.Failed("DeadlineError", "it did not come\n"),
    STATS,
    TREE,
    TokenTree.empty(),
    COSTS,
    CostModel(window_share=0.1),
    AdaptiveConfidence(0.02, "average"),
    FixedDepth(3),
    FixedTree((1, 2)),
    TokenConfidence(0.3, 8),
    MarginalThroughput(),
    Calibration(),
    LoaderSpec("/m", ("layer.0",), 10**9, 2**25, 2**23, 4, None),
    VerifierSpec("/m", ("head.0",), ("layers.1",), "float32", 2, 512, 128, 256),
    DraftSpec("/d", "auto", 1, 4096, 2048, 3000, 512, "best-first", 128, 100, 8, 16, (1, 1, 3), True, 2),
    None,
    (),
    "text",
    {"a": (1, 2.5, True)},
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_message_comes_out_as_it_went_in(value: object) -> None:
    found = unpack(pack(value))
    assert type(found) is type(value)
    assert found == value


def test_every_message_and_spec_is_tried() -> None:
    tried = {type(value) for value in VALUES}
    for module in (messages, config):
        for kind in vars(module).values():
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                assert kind in tried or kind is config.EngineConfig, kind


@given(tree=trees())
def test_any_tree_crosses(tree: TokenTree) -> None:
    found = unpack(pack((tree, tree)))[1]
    assert found == tree
    assert np.array_equal(found.cumulative, tree.cumulative)
    assert not found.tokens.flags.writeable


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 4)), np.array(True)])
def test_arrays_keep_type_and_shape(array: np.ndarray) -> None:
    found = unpack(pack(array))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_numbers_of_numpy_become_numbers() -> None:
    found = unpack(pack((np.int64(3), np.float32(0.5), np.bool_(True))))
    assert found == (3, 0.5, True)
    assert [type(value) for value in found] == [int, float, bool]


@pytest.mark.parametrize("value", [object(), {1, 2}, ValueError("x"), print])
def test_nothing_else_crosses(value: object) -> None:
    with pytest.raises(TypeError, match="does not cross processes"):
        pack(value)


def test_a_class_that_moved_is_read_by_its_name() -> None:
    """Traces of older versions name its module too."""
    for name in ("Provisional", "llmcad_actors.messages:Provisional", "llmcad_actors.elsewhere:Provisional"):
        assert unpack(msgpack.packb(msgpack.ExtType(2, msgpack.packb([name, [1, 2]])))) == messages.Provisional((1, 2))
    assert b"llmcad_actors" not in pack(messages.Provisional((1, 2)))


def nested(depth: int, code: int) -> bytes:
    data = b"\xc0"
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(code, data))
    return data


FORGED: dict[str, bytes] = {
    **{
        f"extensions in {depth} extensions, {code}": nested(depth, code)
        for depth in (1, 9, 20_000)
        for code in (1, 2, 3)
    },
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "lists of 16 million": b"\xdd\x00\xff\xff\xff" * 500,
    "such lists in an extension": msgpack.packb(msgpack.ExtType(2, b"\xdd\x00\x00\xff\xff" * 500 + b"\xc0" * 70_000)),
    "a text of 4 billion": b"\xdb\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "deep lists": b"\x91" * 100_000 + b"\xc0",
    "an unknown extension": msgpack.packb(msgpack.ExtType(9, msgpack.packb([1]))),
    "too few parts": msgpack.packb(msgpack.ExtType(2, msgpack.packb(["Verdict", [1]]))),
    "too many parts": msgpack.packb(msgpack.ExtType(2, msgpack.packb(["Provisional", *range(9)]))),
    "no name": msgpack.packb(msgpack.ExtType(2, msgpack.packb([[1], 2]))),
    "a tree of nothing": msgpack.packb(msgpack.ExtType(1, msgpack.packb([None, "x", {}]))),
    "a tree of huge numbers": msgpack.packb(msgpack.ExtType(1, msgpack.packb([[2**64 - 1], [-1], [0.0]]))),
    **{
        f"an array of {parts}": msgpack.packb(msgpack.ExtType(3, msgpack.packb(parts)))
        for parts in (
            *(["O", [1], b"x" * 8], ["|O8", [1], b"x" * 8], ["<i8", [2**60], b""], ["<i8", [-1], b"x" * 8]),
            *(["<i8", [1], "text"], ["i4,i4", [1], b"x" * 8], ["<f3", [1], b"xxx"], ["<i8", 1, b"x" * 8], [1, 2, 3]),
        )
    },
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_bytes_are_refused_in_little_memory(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"nothing readable at byte 0|cut short after byte 0"):
        list(unpack_stream(io.BytesIO(FORGED[name])))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "llmcad_actors.engine:Engine"])
def test_only_messages_are_built_from_bytes(name: str) -> None:
    forged = msgpack.packb(msgpack.ExtType(2, msgpack.packb([name, "true"])))
    with pytest.raises(ValueError, match="is not a message"):
        unpack(forged)

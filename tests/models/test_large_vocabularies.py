"""A large vocabulary's logits are looked at part by part: what is found is the same, and little is held at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import LOGITS_BYTES
from llmcad_actors.models import vocabulary
from llmcad_actors.plan.footprint import activation_bytes, draft_activation_bytes, whole_rows
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from tests.fakes import chain
from tests.family_cases import CASES
from tests.models.checkpoints import target_of
from tests.models.test_draft import PROMPT, Session
from tests.plain import Plain
from tests.tiny import tiny_llama

CLEAR_PEAK = Path("/proc/self/clear_refs")
VOCAB, NODES, BATCH = 262_144, 128, 64
SLACK = 12 << 20  # what the allocator keeps, and code that is read when it first runs
FEW = {"llama": "plain", "gptj": "a bias", "gemma2": "capped", "gpt2": "tied"}


@given(st.integers(1, 5000), st.integers(0, 300_000))
def test_parts_are_the_whole_in_order_and_none_is_too_large(rows: int, entries: int) -> None:
    parts = list(vocabulary.parts(rows, entries))
    assert [start for start, _ in parts] == [0, *(end for _, end in parts)][: len(parts)]
    assert parts[-1][1] == entries if entries else not parts
    assert all(4 * rows * (end - start) <= LOGITS_BYTES for start, end in parts)


@pytest.fixture(scope="module", params=list(FEW), ids=list(FEW.values()))
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(CASES[request.param].save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 entries at most."""
    monkeypatch.setattr(vocabulary, "LOGITS_BYTES", 4 * 40)


@pytest.mark.usefixtures("many_parts")
def test_the_target_chooses_the_same_in_many_parts(plain: Plain) -> None:
    said = plain.continuation(PROMPT, 6)
    target, _ = target_of(plain.path)
    target.begin(PROMPT, ())
    verdict = target.verify(chain(said[:4]))
    assert (verdict.path, verdict.bonus) == ((0, 1, 2, 3), said[4])


@pytest.mark.usefixtures("many_parts")
def test_the_draft_proposes_the_same_in_many_parts(plain: Plain) -> None:
    session = Session(plain)
    session.begin(PROMPT)
    assert len(session.grow().tree) > 3  # each of them compared
    session.assert_every_candidate_is_the_plain_models()


PEAK = """
import sys
from pathlib import Path
import numpy as np
import torch
from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.request import Request
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.models.draft import DraftModel, Rows, Text
from tests.models.checkpoints import target_of

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

torch.set_num_threads(1)
path, nodes, batch, vocab = Path(sys.argv[1]), *map(int, sys.argv[2:])
target, _ = target_of(path)
target.begin([1, 2, 3], ())
target.verify(TokenTree.build([5], [-1], [-1.0]))  # everything has run once
tree = TokenTree.build(list(range(nodes)), [-1] * nodes, [-1.0] * nodes)
verified = peak(lambda: target.verify(tree))
del target
draft = DraftModel(path, dtype=torch.float32, vocab=vocab, rows=64, slots=256, children=16)
text = Text(Request((1, 2, 3), 1, ()), BestFirst(1), [1, 2, 3], draft.arena.take(0), 0, None)
draft.run([Rows(text, np.array([1, 2, 3]), np.arange(3))])
nodes = Rows(text, np.arange(batch), np.full(batch, 3), np.full(batch, -1))
print(verified, peak(lambda: draft.run([nodes])))
"""


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="the kernel does not let a process forget its peak")
@pytest.mark.parametrize("penalty", [None, 1.5], ids=["plain", "with processors"])
def test_a_pass_and_a_step_take_what_was_planned(tmp_path: Path, penalty: float | None) -> None:
    """Whole rows would take 135 MB in the verifier, and twice 67 in the draft."""
    path = tiny_llama(tmp_path, vocab=VOCAB, hidden=12, layers=1, tied=True)
    if penalty is not None:  # whole rows are kept, once
        (path / "generation_config.json").write_text(f'{{"repetition_penalty": {penalty}}}')
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), *map(str, (NODES, BATCH, VOCAB))],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    verified, stepped = map(int, done.stdout.split())
    checkpoint, config = Checkpoint.open(path), EngineConfig(target="", batch=BATCH, max_nodes=NODES)
    layout = layout_of(checkpoint)
    lent = layout.head[0].nbytes  # the shards of this test lend copies
    planned = activation_bytes(layout, checkpoint.config, config, 8, 4)
    rows = whole_rows(config, checkpoint, layout) if penalty is not None else 0
    assert verified < planned + rows * VOCAB * 4 + lent + SLACK
    assert stepped < draft_activation_bytes(checkpoint, config, 64) + SLACK
    assert planned < 24 << 20 and draft_activation_bytes(checkpoint, config, 64) < 24 << 20

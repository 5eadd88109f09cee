"""A useless draft beside a streamed target is ended in the middle of a request, and layers are pinned in its place."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmcad_actors import Engine
from llmcad_actors.core.worth import ENOUGH_ROUNDS, LEAST_MEMORY_SHARE
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prediction import draft_memory_share
from llmcad_actors.trace.file import read_trace
from tests.actors.engines import MB, job, processes_of
from tests.actors.test_lifecycle import becomes_true
from tests.actors.test_shedding import LAYERS, wide_llama
from tests.plain import Plain, encode
from tests.tiny import tiny_llama

PROMPT, COUNT = "def area(r):\n", 60


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Layers of 9.6 MB at 300 MB/s, half of them pinned, and a random draft whose process would hold all of them."""
    folder = tmp_path_factory.mktemp("ended")
    draft = tiny_llama(folder / "draft", seed=2, layers=1)
    return job(wide_llama(folder / "target"), draft, extra_bytes=LAYERS * 5 * MB, read_limit="300MB/s", max_nodes=8)


@pytest.fixture(scope="module")
def engine(prepared: Prepared) -> Iterator[Engine]:
    with Engine.start(prepared) as engine:
        yield engine


def test_the_plan_knows_what_the_drafts_memory_would_hold(prepared: Prepared) -> None:
    memory, later = prepared.memory, prepared.pinned_later
    assert memory.pinned and memory.streamed
    assert set(later) == set(memory.streamed)  # all that is left
    assert draft_memory_share(prepared) > LEAST_MEMORY_SHARE
    assert prepared.without_draft().pinned_later == ()
    assert draft_memory_share(prepared.without_draft()) == 0
    roomy = replace(memory, streamed=(), pinned=(*memory.pinned, *later), bytes_per_pass=0)
    assert draft_memory_share(replace(prepared, memory=roomy)) == 0


def test_it_is_ended_for_good_and_the_text_stays_the_targets(
    engine: Engine, prepared: Prepared, tmp_path: Path
) -> None:
    path, trace = prepared.target.path, tmp_path / "trace"
    expected = Plain.of(path).greedy(encode(path, PROMPT), COUNT)
    assert len(processes_of("DraftActor")) == 1
    first = engine.generate(PROMPT, max_new_tokens=COUNT, trace=trace)
    assert first.token_ids == expected
    assert first.stats.draft_ended
    assert ENOUGH_ROUNDS <= first.stats.target_passes - first.stats.undrafted_passes < COUNT
    assert becomes_true(lambda: not processes_of("DraftActor"))
    assert read_trace(trace).missing == ()

    second = engine.generate(PROMPT, max_new_tokens=COUNT)
    assert second.token_ids == expected
    assert second.stats.undrafted_passes == second.stats.target_passes
    assert second.stats.bytes_read < first.stats.bytes_read / 4  # what was left to be pinned at most
    assert second.stats.pinned_bytes == prepared.memory.pinned_bytes + prepared.memory.bytes_per_pass
    assert second.stats.cap_exceeded_bytes == 0
    assert second.stats.shed_shards == 0

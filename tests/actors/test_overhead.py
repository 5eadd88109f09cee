"""The runtime takes no more memory than the plan counts for it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmcad_actors.actors.library_pages import clean_code
from llmcad_actors.core.budget import EMBEDDING_CACHE_BYTES
from llmcad_actors.engine import Engine
from llmcad_actors.machine import versions
from llmcad_actors.machine.memory import by_group
from llmcad_actors.plan.footprint import (
    DAEMONS,
    MB,
    THIN_PROCESSES,
    TORCH_PROCESS,
    WHOLE_TORCH_PROCESS,
    draft_activation_bytes,
    overhead_bytes,
)
from llmcad_actors.plan.job import Prepared
from tests.actors.engines import good_draft

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return good_draft(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def use(job: Prepared) -> Iterator[dict[str, int]]:
    """Bytes by group after a request."""
    with Engine.start(job) as engine:
        engine.generate("def area(r):\n", max_new_tokens=12)
        yield by_group(psutil.Process())


def test_ray_takes_what_the_plan_counts(use: dict[str, int]) -> None:
    assert 0 < use["Ray daemons"] <= DAEMONS


def test_the_thin_processes_take_what_the_plan_counts(use: dict[str, int]) -> None:
    own = THIN_PROCESSES // 3  # the caller here is pytest, and no measure
    assert 0 < use["loader"] <= own
    assert 0 < use["coordinator"] <= own


def test_the_torch_processes_take_what_the_plan_counts(use: dict[str, int], job: Prepared) -> None:
    parts = dict(job.memory.rows())
    assert job.draft is not None
    stepping = draft_activation_bytes(job.draft, job.config, job.context)
    draft = parts["draft weights"] + parts["draft cache"] + stepping
    verifier = sum(parts[part] for part in ("target, always resident", "target cache", "activations", "pinned shards"))
    verifier -= stepping
    assert TORCH_PROCESS // 2 < use["draft"] <= TORCH_PROCESS + draft
    assert TORCH_PROCESS // 2 < use["verifier"] <= TORCH_PROCESS + verifier + EMBEDDING_CACHE_BYTES


def test_an_untested_torch_is_charged_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = overhead_bytes(2)
    assert tested <= 750 << 20
    monkeypatch.setattr(versions, "is_tested", lambda name: False)
    assert overhead_bytes(2) == tested + 2 * (WHOLE_TORCH_PROCESS - TORCH_PROCESS)


def test_no_process_but_the_two_with_models_is_large(use: dict[str, int]) -> None:
    """Ray's own agents, or an import of torch, would show."""
    assert use["Ray daemons"] < 90 * MB
    assert max(use["loader"], use["coordinator"]) < 90 * MB


def test_only_code_that_is_as_in_its_file_is_dropped() -> None:
    smaps = """\
7f0000000000-7f0000002000 r-xp 00000000 fe:00 1    /lib/a.so
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000002000-7f0000003000 r-xp 00000000 fe:00 1    /lib/patched.so
Anonymous:             4 kB
7f0000003000-7f0000004000 rw-p 00000000 fe:00 1    /lib/a.so
Anonymous:             0 kB
7f0000004000-7f0000005000 r-xp 00000000 00:00 0    [vdso]
Anonymous:             0 kB
"""
    assert clean_code(smaps) == [(0x7F0000000000, 0x2000)]


def test_dropped_code_runs_again() -> None:
    """In a process of its own, which drops the code that it is running."""
    code = (
        "import numpy as np, psutil\n"
        "from llmcad_actors.actors.library_pages import drop_code\n"
        "x = np.random.rand(9, 9) @ np.ones((9, 9))\n"
        "rss = psutil.Process().memory_info().rss; dropped = drop_code(); now = psutil.Process().memory_info().rss\n"
        "assert np.linalg.inv(np.eye(9) * 2)[0, 0] == 0.5\n"
        "print(dropped > 0 and now < rss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "True"

"""Pinned shards are given up and taken back in the middle of a generation, and the output stays the same."""

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cgroups import memory_cgroup
from llmcad_actors import Engine
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.guard import Guard
from llmcad_actors.core.budget import format_size
from llmcad_actors.machine.limits import FreeMemory
from llmcad_actors.machine.memory import process_pss
from tests.actors.engines import MB, job, processes_of
from tests.plain import Plain, encode
from tests.tiny import BYTE_VOCAB, byte_tokenizer

PROMPT, COUNT = "def area(r):\n", 24
LAYERS = 8
WAIT_S = 60.0
ROOMY = FreeMemory(free_bytes=1 << 40, limit_bytes=1 << 41)
NEARLY_FULL = FreeMemory(free_bytes=0, limit_bytes=1 << 30)  # short of 16 MiB


def wide_llama(path: Path) -> Path:
    """Layers of 9.6 MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BYTE_VOCAB,
        hidden_size=384,
        intermediate_size=1568,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        max_position_embeddings=256,
        eos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def expected(target: Path) -> tuple[int, ...]:
    return Plain.of(target).greedy(encode(target, PROMPT), COUNT)


@pytest.fixture(scope="module", params=[LAYERS * 12, LAYERS * 5], ids=["all pinned", "some streamed"])
def engine(target: Path, expected: tuple[int, ...], request: pytest.FixtureRequest) -> Iterator[Engine]:
    prepared = job(target, None, extra_bytes=request.param * MB)
    assert bool(prepared.memory.streamed) == (request.param < LAYERS * 12)
    assert len(prepared.memory.pinned) > 2
    with Engine.start(prepared) as engine:
        engine._watcher.tell(lambda used: None)  # the tests below give the orders
        yield engine


def hold(engine: Engine, count: int) -> int:
    held: int = fetch(engine._actors.verifier.hold.remote(count), WAIT_S, "holding")[0]
    return held


def pinned(engine: Engine) -> int:
    return len(engine.prepared.memory.pinned)


def test_shards_given_up_and_taken_back_in_the_middle_change_nothing(engine: Engine, expected: tuple[int, ...]) -> None:
    passes = []
    orders = {2: pinned(engine) - 1, 5: 0, 9: 1, 12: pinned(engine), 16: 1, 20: pinned(engine)}
    ids: list[int] = []
    for piece in engine.stream(PROMPT, max_new_tokens=COUNT):
        ids += piece.token_ids
        if len(ids) in orders:
            order = engine._actors.verifier.hold.remote(orders[len(ids)])
            passes.append(fetch(order, WAIT_S, "holding")[1])
    assert tuple(ids) == expected
    assert passes[-1] - passes[0] > 4  # in the middle indeed
    assert engine.generate(PROMPT, max_new_tokens=COUNT).token_ids == expected
    assert hold(engine, pinned(engine)) == pinned(engine)  # all have come back


def test_what_is_given_up_goes_back_to_the_system(engine: Engine) -> None:
    (verifier,) = processes_of("VerifierActor")
    before = process_pss(verifier.pid)[0]
    assert hold(engine, 0) == 0
    freed = before - process_pss(verifier.pid)[0]
    assert freed > 0.9 * engine.prepared.memory.pinned_bytes
    hold(engine, pinned(engine))
    engine.generate(PROMPT, max_new_tokens=2)
    assert hold(engine, pinned(engine)) == pinned(engine)
    assert before - process_pss(verifier.pid)[0] < 0.1 * engine.prepared.memory.pinned_bytes


def test_the_guard_gives_up_what_is_short_and_takes_it_back_some_passes_later(engine: Engine) -> None:
    sizes = [spec.nbytes for spec in engine.prepared.layout.shards if spec.name in engine.prepared.memory.pinned]
    machine = NEARLY_FULL
    guard = Guard(engine._actors.verifier, sizes, 1 << 40, free=lambda: machine)

    def look() -> None:
        """One sample, and its order carried out."""
        guard.look(0)
        if guard._order is not None:
            fetch(guard._order, WAIT_S, "an order")

    look()
    machine = ROOMY
    look()
    held = guard._held_now
    assert guard.num_shed == len(sizes) - held
    assert sum(sorted(sizes, reverse=True)[held:]) >= 1 << 24 > sum(sorted(sizes, reverse=True)[held + 1 :])
    counts = [held]
    while counts[-1] < len(sizes) and len(counts) < 40:
        engine.generate(PROMPT, max_new_tokens=2)
        look()
        counts.append(guard._held_now)
    assert counts == sorted(counts)
    assert counts[-1] == len(sizes)
    assert guard.num_shed == len(sizes) - held


def test_the_guard_says_whether_it_can_still_help(engine: Engine) -> None:
    """Memory above the cap is not complained of while shards are on their way out."""
    sizes = [spec.nbytes for spec in engine.prepared.layout.shards if spec.name in engine.prepared.memory.pinned]
    guard = Guard(engine._actors.verifier, sizes, cap_bytes=1 << 30, free=lambda: ROOMY)
    assert not guard.look(0)
    assert guard.look(1 << 31)
    while guard._order is not None and guard._held_now:
        ray.wait([guard._order._reference], timeout=WAIT_S)
        helps = guard.look(1 << 31)
    assert not helps
    hold(engine, pinned(engine))
    engine.generate(PROMPT, max_new_tokens=2)
    assert hold(engine, pinned(engine)) == pinned(engine)


def test_memory_above_the_cap_is_said_at_once_and_counted_in_that_request(
    engine: Engine, expected: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """The caller's own process grows; nobody gives anything up (the orders are the tests')."""
    cap = engine.prepared.memory.cap_bytes
    assert engine.generate(PROMPT, max_new_tokens=COUNT).stats.cap_exceeded_bytes == 0
    with mmap.mmap(-1, cap - engine._watcher.sample() + 64 * MB) as hog:
        hog.write(bytes(len(hog)))
        give_up = time.monotonic() + WAIT_S
        while not caplog.messages and time.monotonic() < give_up:
            time.sleep(0.05)
        result = engine.generate(PROMPT, max_new_tokens=COUNT)
    assert f"is above the cap of {format_size(cap)} by " in caplog.messages[0]
    assert 32 * MB < result.stats.cap_exceeded_bytes < 128 * MB
    assert result.token_ids == expected
    engine._watcher.sample()
    assert engine.generate(PROMPT, max_new_tokens=COUNT).stats.cap_exceeded_bytes == 0


EATER = """
import mmap, sys
held = []
for line in sys.stdin:
    block = mmap.mmap(-1, int(line))
    for page in range(0, len(block), 4096):
        block[page] = 1
    held.append(block)
    print("eaten", flush=True)
"""

BESIDE = """
import json, os, subprocess, sys, time
from pathlib import Path
from llmcad_actors import Engine
from llmcad_actors.machine.limits import free_memory
from tests.actors.engines import MB, job
from tests.actors.test_shedding import COUNT, EATER, LAYERS, PROMPT

eater = subprocess.Popen([sys.executable, "-c", EATER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

def eat(nbytes):
    eater.stdin.write(f"{nbytes}\\n")
    eater.stdin.flush()
    assert eater.stdout.readline() == "eaten\\n"

with Engine.start(job(Path(sys.argv[1]), None, extra_bytes=LAYERS * 12 * MB)) as engine:
    pieces = []
    engine.generate(PROMPT, max_new_tokens=2)
    for piece in engine.stream(PROMPT, max_new_tokens=COUNT):
        pieces.append(piece)
        if len(pieces) == 4:
            eat(max(0, free_memory().free_bytes - 12 * MB))
            give_up = time.monotonic() + 60
            while free_memory().free_bytes < 24 * MB and time.monotonic() < give_up:
                time.sleep(0.05)
            eat(20 * MB)  # more than there was
    result = engine.result(pieces)
    again = engine.generate(PROMPT, max_new_tokens=COUNT)  # the first may have ended while the memory was eaten
    assert again.token_ids == result.token_ids
    eater.stdin.close()
    eater.wait()
    print(json.dumps({"ids": result.token_ids, "shed": engine._guard.num_shed}))
"""


def test_a_run_survives_a_neighbour_that_eats_the_cgroups_memory(target: Path, expected: tuple[int, ...]) -> None:
    cap = job(target, None, extra_bytes=LAYERS * 12 * MB).memory.cap_bytes
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    try:
        with memory_cgroup(cap + 800 * MB) as cgroup:
            done = subprocess.run(
                cgroup.command([sys.executable, "-c", BESIDE, str(target)]),
                capture_output=True,
                text=True,
                env=environment,
                timeout=240,
            )
            kills = cgroup.oom_kills()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert tuple(found["ids"]) == expected
    assert found["shed"] >= 1
    assert kills == 0

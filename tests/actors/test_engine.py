"""The engine on a real local Ray: the target's own output, within the cap, whatever is done to it."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from transformers import AutoTokenizer

from llmcad_actors import Engine
from llmcad_actors.actors.calls import fetch, fetch_async
from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.errors import ActorFailure, ConfigError, DeadlineError, MemoryCapError
from tests.actors.engines import Job, good_draft, no_draft, processes_of, random_target, slow
from tests.plain import Plain, encode

COUNT = 64
PROMPTS = (
    "import json\n\n\ndef load(path):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
ALL: list[Job] = [good_draft, random_target, no_draft]


def with_engine(*jobs: Job) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("engine", jobs, indirect=True, ids=lambda job: job.__name__)


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for all engines; they leave it alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCAD_CACHE", str(tmp_path_factory.mktemp("cache")))  # for logs
        local = LocalRay(256 << 20)
        yield
        assert ray.is_initialized()
        local.close()


@pytest.fixture(scope="module")
def engine(
    local_ray: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    make: Job = request.param
    job = make(tmp_path_factory.mktemp(make.__name__))
    expected(job.target.path)  # so that this process does not grow while the engine is watched
    with Engine.start(job) as engine:
        yield engine
    assert not [p for name in ("Loader", "Verifier", "Draft", "Coordinator") for p in processes_of(name) if lives(p)]


def lives(process: psutil.Process) -> bool:
    """Still there a while after it was told to end."""
    try:
        process.wait(20)
    except psutil.TimeoutExpired:
        return True
    return False


def expected(path: Path) -> dict[str, tuple[int, ...]]:
    """What transformers makes of each prompt."""
    plain = Plain.of(path)
    if path not in _EXPECTED:
        _EXPECTED[path] = {prompt: plain.greedy(encode(path, prompt), COUNT) for prompt in PROMPTS}
    return _EXPECTED[path]


_EXPECTED: dict[Path, dict[str, tuple[int, ...]]] = {}


def text_of(engine: Engine, prompt: str, ids: tuple[int, ...]) -> str:
    """The text that `ids` add to the prompt, decoded at once."""
    tokenizer = engine._tokenizer
    before = tokenizer.decode(list(encode(engine.prepared.target.path, prompt)))
    return str(tokenizer.decode([*encode(engine.prepared.target.path, prompt), *ids]))[len(before) :]


@with_engine(*ALL)
@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_the_output_is_greedy_generation_token_for_token(engine: Engine, prompt: str) -> None:
    result = engine.generate(prompt, max_new_tokens=COUNT)
    ids = expected(engine.prepared.target.path)[prompt]
    assert result.token_ids == ids
    assert result.text == text_of(engine, prompt, ids)
    assert result.finish_reason == ("stop" if len(ids) < COUNT else "length")


@with_engine(*ALL)
def test_statistics_agree_with_each_other_and_with_the_plan(engine: Engine) -> None:
    result, memory = engine.generate(PROMPTS[0], max_new_tokens=20), engine.prepared.memory
    stats = result.stats
    assert stats == engine.stats
    assert stats.new_tokens == len(result.token_ids)
    assert stats.tokens_per_pass == stats.new_tokens / stats.target_passes
    assert stats.new_tokens <= stats.accepted_tokens + stats.target_passes
    assert stats.accepted_tokens <= stats.verified_nodes
    assert 0 < stats.time_to_first_token_s <= stats.seconds
    assert 0 < stats.compute_seconds + stats.stall_seconds <= stats.seconds
    assert (stats.memory_cap_bytes, stats.pinned_bytes) == (memory.cap_bytes, memory.pinned_bytes)
    assert stats.window_bytes == memory.window_bytes
    assert 0 < stats.peak_memory_bytes <= stats.memory_cap_bytes
    assert stats.spilled_bytes == 0
    if memory.bytes_per_pass:
        # the passes' own bytes, less what was read ahead before, and at most a window more than asked for
        assert stats.bytes_read >= stats.target_passes * memory.bytes_per_pass - 2 * memory.window_bytes
        assert stats.read_seconds > 0
    if engine.prepared.draft is None:
        assert stats.tokens_per_pass == 1
        assert stats.draft_steps == stats.verified_nodes == 0


@with_engine(good_draft)
def test_speculation_saves_passes_and_changes_nothing(engine: Engine) -> None:
    fast = engine.generate(PROMPTS[1], max_new_tokens=24)
    plain = engine.generate(PROMPTS[1], max_new_tokens=24, speculate=False)
    assert fast.token_ids == plain.token_ids
    assert fast.stats.target_passes < plain.stats.target_passes == 24
    assert plain.stats.draft_steps == 0


@with_engine(good_draft)
@pytest.mark.parametrize("count", [1, 2, 13])
def test_no_more_tokens_come_than_were_asked_for(engine: Engine, count: int) -> None:
    result = engine.generate(PROMPTS[0], max_new_tokens=count)
    assert result.token_ids == expected(engine.prepared.target.path)[PROMPTS[0]][:count]
    assert result.finish_reason == "length"


@with_engine(good_draft)
def test_pieces_put_together_are_the_text_and_guesses_are_marked(engine: Engine) -> None:
    pieces = list(engine.stream(PROMPTS[0], max_new_tokens=COUNT, provisional=True))
    accepted = [piece for piece in pieces if not piece.provisional]
    assert any(piece.provisional and piece.text for piece in pieces)
    assert len(accepted) > 1
    result = engine.result(pieces)
    assert result.text == "".join(piece.text for piece in accepted)
    assert result.token_ids == expected(engine.prepared.target.path)[PROMPTS[0]]
    assert not any(piece.provisional for piece in engine.stream(PROMPTS[0], max_new_tokens=5))


@with_engine(good_draft)
def test_the_text_ends_before_a_stop_string(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[0], max_new_tokens=24).text
    middle = len(whole) // 2
    for stop in (whole[middle : middle + 5], whole[middle]):
        result = engine.generate(PROMPTS[0], max_new_tokens=24, stop=["never there", stop])
        assert result.text == whole.split(stop)[0]
        assert result.finish_reason == "stop"
    unstopped = engine.generate(PROMPTS[0], max_new_tokens=24, stop=["never there"])
    assert (unstopped.text, unstopped.finish_reason) == (whole, "length")


@with_engine(good_draft, random_target)
def test_an_abandoned_request_leaves_the_next_one_right(engine: Engine) -> None:
    for prompt in PROMPTS[:2]:
        assert next(iter(engine.stream(prompt, max_new_tokens=COUNT))).token_ids
    result = engine.generate(PROMPTS[1], max_new_tokens=20)
    assert result.token_ids == expected(engine.prepared.target.path)[PROMPTS[1]][:20]


@with_engine(good_draft)
def test_a_prompt_without_room_for_an_answer_is_refused_and_a_full_context_ends_the_text(engine: Engine) -> None:
    context, path = engine.prepared.context, engine.prepared.target.path
    text = "x = 1\n" * context
    ids = encode(path, text)
    cut = engine._tokenizer.decode(list(ids[: context - 2]))
    assert len(encode(path, cut)) == context - 2
    with pytest.raises(ConfigError, match=rf"the prompt has {len(ids)} tokens.*takes at most {context} in all"):
        engine.generate(text)
    assert len(engine.generate(cut, max_new_tokens=10).token_ids) == 2
    with pytest.raises(ConfigError, match="max_new_tokens: 0"):
        engine.generate("x", max_new_tokens=0)


@with_engine(good_draft)
def test_what_is_no_text_is_refused(engine: Engine) -> None:
    for prompt, message in (
        ("ab\udcff", "prompt is not UTF-8: byte 0xff at offset 2 "),
        ("日\ud83d", r"prompt is not text: U\+D83D at character 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.generate(prompt, max_new_tokens=1)


@with_engine(good_draft)
def test_text_of_any_script_comes_back_whole(engine: Engine) -> None:
    result = engine.generate("é = '日本語'", max_new_tokens=20)
    assert result.text == text_of(engine, "é = '日本語'", result.token_ids)


@with_engine(good_draft)
def test_an_empty_prompt_begins_with_the_models_first_token(engine: Engine) -> None:
    result = engine.generate("", max_new_tokens=12)
    assert result.token_ids == Plain.of(engine.prepared.target.path).greedy((0,), 12)


@with_engine(random_target, no_draft)
def test_a_chat_message_is_answered_behind_the_models_template(engine: Engine) -> None:
    path = engine.prepared.target.path
    ids = AutoTokenizer.from_pretrained(path).apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True
    )["input_ids"]
    chatting, plain = engine.generate("Hello", max_new_tokens=8, chat=True), engine.generate("Hello", max_new_tokens=8)
    assert chatting.token_ids == Plain.of(path).greedy(ids, 8)
    assert chatting.token_ids != plain.token_ids


@with_engine(random_target)
def test_the_status_tells_where_the_pass_is(engine: Engine) -> None:
    shards = {spec.name for spec in engine.prepared.layout.shards}
    for _ in itertools.islice(engine.stream(PROMPTS[0], max_new_tokens=5), 3):
        status = engine.status()
        assert status.shard in shards
        assert status.num_shards == len(shards)
        assert 0 < status.memory_bytes <= status.memory_cap_bytes == engine.prepared.memory.cap_bytes
        assert status.bytes_read > 0
    assert status.new_tokens > 0


@with_engine(good_draft)
def test_only_the_processes_that_compute_hold_torch(engine: Engine) -> None:
    for name, computes in {"Loader": False, "Coordinator": False, "Verifier": True, "Draft": True}.items():
        (process,) = processes_of(name)
        assert ("libtorch" in Path(f"/proc/{process.pid}/maps").read_text()) == computes, name


class Actor:
    def fail(self, error: Exception) -> None:
        raise error

    def hang(self) -> None:
        while True:
            pass


def test_what_goes_wrong_in_an_actor_becomes_one_of_our_errors(local_ray: None) -> None:
    actor: Any = ray.remote(num_cpus=0, max_restarts=0)(Actor).remote()

    def calls() -> Iterator[tuple[Any, float, type[Exception], str]]:
        yield actor.fail.remote(MemoryCapError("too small")), 60, MemoryCapError, "^too small$"
        yield actor.fail.remote(ValueError("bad")), 60, ActorFailure, r"the work failed: ValueError\('bad'\)"
        yield actor.hang.remote(), 0.1, DeadlineError, "the work did not come within 0 s"
        ray.kill(actor)
        yield actor.hang.remote(), 60, ActorFailure, "the work failed: the actor died"

    for call, timeout_s, kind, message in calls():
        with pytest.raises(kind, match=message):
            asyncio.run(fetch_async(call, timeout_s, "the work"))
        with pytest.raises(kind, match=message):
            fetch(call, timeout_s, "the work")


@with_engine(slow)
def test_a_killed_draft_is_reported_and_plain_decoding_goes_on(
    engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ActorFailure, match=r"draft.* failed: the actor died.* details are in /") as caught:
        kill_during_a_pass(engine, "DraftActor")
    assert "worker process has died" in Path(str(caught.value).rpartition(" ")[2]).read_text()
    assert capfd.readouterr() == ("", "")  # Ray says it there alone
    result = engine.generate(PROMPTS[0], max_new_tokens=2, speculate=False)
    assert result.token_ids == expected(engine.prepared.target.path)[PROMPTS[0]][:2]


@with_engine(slow)
def test_a_killed_verifier_is_reported(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ActorFailure, match="pass failed: the actor died"):
        kill_during_a_pass(engine, "VerifierActor")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ActorFailure):
        engine.generate(PROMPTS[0], speculate=False)


def kill_during_a_pass(engine: Engine, name: str) -> None:
    """The first event of a request comes with its first pass, which takes seconds."""
    stream = engine.stream(PROMPTS[0], provisional=True, speculate=name == "DraftActor")
    assert next(stream).provisional
    (process,) = processes_of(name)
    process.kill()
    list(stream)

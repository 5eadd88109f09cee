"""The door: launch an engine, generate, stream, close. Runs in the user's process; no torch here."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.coordinator import PASS_TIMEOUT_S
from llmcad_actors.actors.guard import Guard
from llmcad_actors.actors.own_ray import OwnRay, end_ray, start_ray
from llmcad_actors.actors.runtime import Actors, start_actors
from llmcad_actors.actors.tracing import traced
from llmcad_actors.config import EngineConfig, Settings, documents_settings, setting_names
from llmcad_actors.core import checks
from llmcad_actors.core.lossless import Difference, LosslessCheck, parting
from llmcad_actors.core.overrun import Overrun
from llmcad_actors.core.request import Request
from llmcad_actors.core.stats import Stats, Totals
from llmcad_actors.errors import (
    EngineBusyError,
    EngineClosedError,
    LlmcadError,
    RuntimeFailure,
    StorageError,
)
from llmcad_actors.machine.memory import MemoryWatcher, process_pss
from llmcad_actors.messages import Event, ReadingProgress, pack, unpack
from llmcad_actors.plan.admission import Admission, admit
from llmcad_actors.plan.disk_settings import unmeasured
from llmcad_actors.plan.footprint import max_requests, target_dtype
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prediction import first_costs
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.plan.prompt import room_behind
from llmcad_actors.plan.specs import draft_spec, limits_of, loader_spec, policy_of, verifier_spec
from llmcad_actors.requests.dispatcher import Dispatcher
from llmcad_actors.requests.gate import CLOSED, Gate
from llmcad_actors.requests.generation import Generation
from llmcad_actors.requests.options import Options, RequestOptions, check_ids, documents_options, trace_path
from llmcad_actors.results import Piece, Result, Status, put_together
from llmcad_actors.text.tokenizer import Detokenizer
from llmcad_actors.text.tokenizer_child import LoadedTokenizer, give_back_memory, load_tokenizer
from llmcad_actors.trace.file import check_writable

LOG = logging.getLogger("llmcad_actors")  # by default its warnings go to standard error
POLL_S = 0.25
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Before:
    """What had been read, and given up, when a request began."""

    reading: ReadingProgress
    num_shed: int


class Engine:
    """A target and its draft, ready to generate. Close it, or use it as a context manager.

        with Engine.launch("./Llama-2-13b", "./TinyLlama", memory="4GB") as engine:
            for piece in engine.stream("Once upon a time", max_new_tokens=128):
                print(piece.text, end="", flush=True)

    Requests may come from any thread and at any time: those that are under way share the passes of the target, up to
    `max_requests` of them, and others wait for their turn, `max_queue` at most; one more raises `EngineBusyError`. A
    stream is a request from its first piece until it is read to its end, closed, or forgotten. An engine that is closed
    raises `EngineClosedError`. An engine starts a Ray of its own, which has room for one; several in a process are
    possible where the process has called `ray.init()` before.

    All that is raised on purpose is a `LlmcadError`: `ConfigError` for a value that cannot be, `StorageError` where a
    file of the model changed under a run, `CheckpointError` where its numbers are no numbers.
    """

    def __init__(
        self,
        prepared: Prepared,
        ray_: OwnRay,
        actors: Actors,
        watcher: MemoryWatcher,
        text: LoadedTokenizer,
        overrun: Overrun,
        admission: Admission,
    ) -> None:
        """For `start`; the engine takes over what it is given, and ends it."""
        self.prepared = prepared
        self._actors = actors
        self._watcher = watcher
        self._gate = Gate()
        self._starting, self._tracing, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._ending = threading.RLock()
        self._end = ExitStack()  # from the last to the first
        self._end.callback(admission.close)
        self._end.callback(end_ray, ray_)
        self._end.callback(actors.close)
        self._end.callback(watcher.close)
        self._dispatcher = Dispatcher(self._poll, self._explain, self._draft_has_ended)
        self._end.callback(self._dispatcher.close)
        self._end.callback(self._gate.close)
        sizes = {spec.name: spec.nbytes for spec in prepared.layout.shards}
        pinned, later = ([sizes[n] for n in names] for names in (prepared.memory.pinned, prepared.pinned_later))
        self._later_bytes = sum(later)
        self._guard = Guard(actors.verifier, pinned, prepared.memory.cap_bytes, later=later)
        watcher.tell(self._guard.look)
        self._overrun = overrun
        self._tokenizer, self._special_tokens = text.tokenizer, text.special_tokens
        self._last: Generation | None = None
        self._number = 0
        self._totals = Totals()

    @classmethod
    @documents_settings
    def launch(
        cls,
        target: str | os.PathLike[str],
        draft: str | os.PathLike[str] | None = None,
        *,
        memory: str | int | None = None,
        say: Callable[[str], None] = lambda what: None,
        warn: Callable[[str], None] = LOG.warning,
        count_caller: bool = False,
        **settings: Unpack[Settings],
    ) -> Self:
        """Check, plan, start the actors and pin what stays; returns when the engine is ready.

        `memory` caps all that llmcad adds to the machine; of the calling process only the growth from now on is
        counted, unless `count_caller`. `say` is told what is being waited for, `warn` of memory use above the cap.
        Raises `UserError` for bad input, and for a plan that takes more than is free, before any actor is started;
        `RuntimeFailure` when the start breaks; `EngineBusyError` while another engine of this process runs a Ray of
        its own.
        """
        checks.known_names("setting", settings, setting_names())
        config = EngineConfig(target=target, draft=draft, memory=memory, **settings)  # type: ignore[arg-type]
        return cls.start(prepare(config), say=say, warn=warn, count_caller=count_caller)

    @classmethod
    def start(
        cls,
        prepared: Prepared,
        *,
        say: Callable[[str], None] = lambda what: None,
        warn: Callable[[str], None] = LOG.warning,
        count_caller: bool = False,
    ) -> Self:
        """`launch` for a job that has been prepared."""
        checks.function("say", say)
        checks.function("warn", warn)
        count_caller = checks.flag("count_caller", count_caller)
        with ExitStack() as undo:
            admission = admit(prepared)
            undo.callback(admission.close)
            give_back_memory()  # what the caller holds free is not to be mistaken for ours
            baseline = 0 if count_caller else process_pss(os.getpid())[0]
            overrun = Overrun(prepared.memory.cap_bytes, warn)
            watcher = MemoryWatcher(os.getpid(), baseline_bytes=baseline, overrun=overrun)
            for notice in (*prepared.notices, *unmeasured(prepared.config, prepared.target)):
                say(notice)
            text = load_tokenizer(prepared.target.path)  # first: loading takes more than what stays
            say("starting Ray")
            ray_ = start_ray(prepared.memory.store_bytes, plain=prepared.config.plain_ray)
            undo.callback(end_ray, ray_)
            undo.callback(watcher.close)
            watcher.start()
            actors = start_actors(
                ray_.line,
                loader_spec(prepared),
                verifier_spec(prepared),
                draft_spec(prepared),
                policy_of(prepared),
                first_costs(prepared),
                limits_of(prepared),
                say,
            )
            undo.callback(actors.close)
            engine = cls(prepared, ray_, actors, watcher, text, overrun, admission)
            undo.pop_all()  # from now on by `close`
            return engine

    def __enter__(self) -> Self:
        self._gate.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and Ray if the engine started it. Leaves no process and no shared memory.

        May be called again, from any thread, and during a request, which ends with `EngineClosedError`.
        """
        with self._ending:
            self._end.close()

    def generate(
        self, prompt: str, *, trace: str | os.PathLike[str] | None = None, **options: Unpack[Options]
    ) -> Result:
        """Continue `prompt`, to the end.

        trace: a file that what every actor does is written to, for `llmcad trace`. Other options: see `submit`.

        Raises `ConfigError`, `EngineBusyError`, `EngineClosedError`, or what broke.
        """
        asked, file = self._options(prompt, options), trace_path(trace)
        check_writable(file)
        self._gate.check_open()
        request = self._request(asked)
        with self._traced(file, request), self._submit(asked, request, file is not None) as generation:
            return generation.result()

    def stream(
        self, prompt: str, *, trace: str | os.PathLike[str] | None = None, **options: Unpack[Options]
    ) -> Generator[Piece]:
        """Continue `prompt`, yielding text as it is accepted; options and errors as of `generate`.

        The request begins with the first piece that is asked for. `close()` of what is returned ends it early.
        """
        asked, file = self._options(prompt, options), trace_path(trace)
        check_writable(file)
        self._gate.check_open()
        return self._stream(asked, self._request(asked), file)

    @documents_options
    def submit(self, prompt: str, **options: Unpack[Options]) -> Generation:
        """Continue `prompt` in the background, together with whatever else is under way; from any thread.

        Raises `ConfigError`, `EngineClosedError`, and `EngineBusyError` where `max_queue` requests wait already.
        """
        asked = self._options(prompt, options)
        self._gate.check_open()
        return self._submit(asked, self._request(asked))

    async def asubmit(self, prompt: str, **options: Unpack[Options]) -> Generation:
        """`submit` for coroutines: `async for piece in await engine.asubmit(...)`."""
        return await asyncio.to_thread(partial(self.submit, prompt, **options))

    def samples(self, prompt: str, n: int, **options: Unpack[Options]) -> list[Generation]:
        """`n` texts of one prompt, which is computed once. The seeds are `seed`, `seed` + 1 and so on."""
        checks.whole_number("n", n, 1, self.prepared.config.max_queue)
        asked = self._options(prompt, options)
        request = self._request(asked)
        seeds = [(asked.choosing.seed + i) % 2**64 for i in range(n)]
        requests = [replace(request, choosing=replace(asked.choosing, seed=seed)) for seed in seeds]
        return [self._submit(asked, each) for each in requests]

    def result(self, pieces: Sequence[Piece]) -> Result:
        """The pieces of the request that was begun last, put together. Answered by a closed engine too."""
        last = self._last_one()
        return put_together(pieces, last.finish_reason, last.stats, last.request.choosing)

    def check_lossless(self, result: Result, prompt: str, **options: Unpack[Options]) -> LosslessCheck:
        """Decode `prompt` again, from its first token on, plainly: is `result` the target's own text?

        `result` is what `generate` or `stream` gave for it, with the same options; a sampled one names its seed. (Stop
        strings need not be given: the tokens before them are compared.) Takes a pass for each token, until a token
        differs; `stats` are of these passes afterwards. Raises as `generate`.
        """
        given: Options = {**options, "speculate": False, "provisional": False}
        if result.seed is not None:
            given["seed"] = result.seed
        asked = self._options(prompt, given)
        request = self._request(asked)
        plain = self._plainly(asked, request, result)
        at = parting(result.token_ids, plain)
        difference = None if at is None else self._difference(request, result.token_ids, plain, at)
        return LosslessCheck(len(plain), target_dtype(self.prepared.config), difference)

    def _plainly(self, options: RequestOptions, request: Request, result: Result) -> tuple[int, ...]:
        """The tokens of the plain text, as far as they are those of `result`, and the first that is not."""
        self._call("the target", self._actors.verifier.forget, timeout_s=PASS_TIMEOUT_S)
        found: tuple[int, ...] = ()
        with self._submit(options, request) as generation:
            for piece in generation:
                found += piece.token_ids
                is_all = found == result.token_ids and result.finish_reason == "stop"  # the stop may be a string
                if is_all or found != result.token_ids[: len(found)]:
                    break
        return found

    def _difference(self, request: Request, ours: Sequence[int], plain: Sequence[int], at: int) -> Difference:
        pair = [ids[at] if at < len(ids) else None for ids in (ours, plain)]
        texts = [None if i is None else self._tokenizer.decode([i], skip_special_tokens=False) for i in pair]
        if None in pair:
            return Difference(at, tuple(pair), tuple(texts), None)
        arguments = pack(request), pack(tuple(plain[:at])), pack(tuple(pair))
        logits = self._call("a pass", self._actors.verifier.logits_after, *arguments, timeout_s=PASS_TIMEOUT_S)
        return Difference(at, tuple(pair), tuple(texts), unpack(logits))

    @property
    def stats(self) -> Stats:
        """Of the request that was begun last; disk and memory figures once it has ended. Also of a closed engine."""
        return self._last_one().stats

    def totals(self) -> Totals:
        """Of all requests that have ended, together."""
        return self._totals

    def status(self) -> Status:
        """Where the engine is. May be asked from any thread."""
        progress, stats = self._progress(), self._last.stats if self._last else Stats()
        return Status(
            progress.shard,
            progress.index,
            progress.num_shards,
            progress.bytes_read,
            progress.read_seconds,
            self._watcher.current_bytes,
            self.prepared.memory.cap_bytes,
            stats.new_tokens,
            stats.tokens_per_pass,
            stats.seconds,
        )

    def _last_one(self) -> Generation:
        if self._last is None:
            raise RuntimeFailure("no request has been finished")
        return self._last

    def _options(self, prompt: str, given: Options) -> RequestOptions:
        return RequestOptions(prompt, given, self.prepared.sampling)

    def _request(self, options: RequestOptions) -> Request:
        """The request in the target's tokens. Raises `ConfigError` where there is no room for it."""
        ids = self._encode_chat(options.prompt) if options.chat else self._encode(options.prompt)
        check_ids(options.choosing, self.prepared.layout.embedding.shape[0])
        return Request(
            ids,
            self._room(ids, options.max_new_tokens),
            self.prepared.stop_tokens,
            options.speculate,
            self.prepared.config.provisional,
            options.choosing,
            options.queue_s,
        )

    def _submit(self, options: RequestOptions, request: Request, is_traced: bool = False) -> Generation:
        config = self.prepared.config
        most = max_requests(config, self.prepared.layout) + config.max_queue
        with self._starting:
            self._gate.check_open()
            if self._dispatcher.num_open >= most:
                raise EngineBusyError(
                    f"{most} requests run or wait, and no more may; wait for some to end, or launch the engine with a "
                    "larger max_queue"
                )
            self.prepared.check_unchanged()
            if not self._dispatcher.num_open:
                self._overrun.begin()
            context = () if self.prepared.is_encoder_decoder else request.prompt  # what the new text goes on from
            detokenizer = Detokenizer(self._tokenizer, context)
            before = Before(self._progress(), self._guard.num_shed)
            self._number += 1
            generation = Generation(
                self._number, request, options, detokenizer, self._cancel, partial(self._complete, before)
            )
            self._last = generation
            self._dispatcher.add(generation)
        try:
            if is_traced:
                self._call("the coordinator", self._actors.coordinator.follow, generation.number)
            self._call("the request", self._actors.coordinator.submit, generation.number, pack(request))
        except BaseException:
            self._dispatcher.remove(generation)
            raise
        return generation

    def _cancel(self, generation: Generation) -> None:
        """Its rows are free before the next pass."""
        self._dispatcher.remove(generation)
        with suppress(LlmcadError), self._gate.call():  # a closed engine has ended it
            self._actors.coordinator.cancel.remote(generation.number)

    def _stream(self, options: RequestOptions, request: Request, trace: Path | None) -> Generator[Piece]:
        with self._traced(trace, request), self._submit(options, request, trace is not None) as generation:
            yield from generation

    @contextmanager
    def _traced(self, trace: Path | None, request: Request) -> Iterator[None]:
        if trace is None:
            yield
            return
        if not self._tracing.acquire(blocking=False):
            raise EngineBusyError("another request is being traced, and one at a time can be; wait for it to end")
        try:
            with traced(trace, self._actors, self.prepared, request):
                yield
        finally:
            self._tracing.release()

    def _poll(self) -> Sequence[tuple[int, Event]]:
        events: Sequence[tuple[int, Event]] = unpack(
            self._call("the coordinator", self._actors.coordinator.events, POLL_S)
        )
        return events

    def _explain(self, error: LlmcadError) -> LlmcadError:
        """What broke a request; a model whose files changed under it explains whatever else went wrong."""
        try:
            self.prepared.check_unchanged()
        except StorageError as change:
            return change
        return EngineClosedError(CLOSED) if self._gate.is_closed else error

    def _draft_has_ended(self) -> None:
        self._actors.end_draft()
        self._guard.draft_has_ended()

    def _complete(self, before: Before, generation: Generation, stats: Stats) -> Stats:
        """Statistics with what only this process knows: disk, memory, the plan."""
        after, memory = self._progress(), self.prepared.memory
        self._watcher.sample()
        with self._counting:
            self._totals = self._totals.plus(stats)
        return replace(
            stats,
            bytes_read=after.bytes_read - before.reading.bytes_read,
            read_seconds=after.read_seconds - before.reading.read_seconds,
            memory_cap_bytes=memory.cap_bytes,
            peak_memory_bytes=self._watcher.peak_bytes,
            pinned_bytes=memory.pinned_bytes + (self._later_bytes if self._actors.has_ended_draft else 0),
            window_bytes=memory.window_bytes,
            spilled_bytes=self._watcher.spilled_bytes,
            shed_shards=self._guard.num_shed - before.num_shed,
            cap_exceeded_bytes=self._overrun.exceeded_bytes,
            draft_ended=self._actors.has_ended_draft,
        )

    def _encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(prompt).ids) or self.prepared.opening()

    def _encode_chat(self, message: str) -> tuple[int, ...]:
        """The template brings its own special tokens; the tokenizer adds none."""
        template = self.prepared.chat_template()
        if self._special_tokens is not None:
            template = replace(template, special_tokens=self._special_tokens)
        return tuple(self._tokenizer.encode(template.render(message), add_special_tokens=False).ids)

    def _room(self, ids: Sequence[int], max_new_tokens: int) -> int:
        """New tokens that fit behind the prompt."""
        return min(max_new_tokens, room_behind(self.prepared, len(ids)))

    def _progress(self) -> ReadingProgress:
        progress: ReadingProgress = unpack(self._call("the loader", self._actors.loader.progress))
        return progress

    def _call(self, what: str, method: Any, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """What an actor's `method` answers. Raises `EngineClosedError`, or as `fetch`."""
        with self._gate.call():
            return fetch(method.remote(*args), timeout_s, what)

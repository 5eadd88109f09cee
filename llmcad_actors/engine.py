"""The door: launch an engine, generate, stream, close. Runs in the user's process; no torch here."""

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
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
from llmcad_actors.core.stats import Stats
from llmcad_actors.errors import (
    ActorFailure,
    DeadlineError,
    EngineClosedError,
    LlmcadError,
    RuntimeFailure,
    StorageError,
)
from llmcad_actors.machine.memory import MemoryWatcher, process_pss
from llmcad_actors.messages import (
    DraftEnded,
    Event,
    Failed,
    Finished,
    Provisional,
    ReadingProgress,
    Request,
    Tokens,
    pack,
    unpack,
)
from llmcad_actors.plan.admission import Admission, admit
from llmcad_actors.plan.disk_settings import unmeasured
from llmcad_actors.plan.footprint import target_dtype
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prediction import first_costs
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.plan.prompt import room_behind
from llmcad_actors.plan.specs import draft_spec, loader_spec, policy_of, verifier_spec
from llmcad_actors.request_options import RequestOptions
from llmcad_actors.results import Piece, Result, Status
from llmcad_actors.text.tokenizer import Detokenizer, StopStrings
from llmcad_actors.text.tokenizer_child import LoadedTokenizer, give_back_memory, load_tokenizer
from llmcad_actors.turn import CLOSED, Turn

LOG = logging.getLogger("llmcad_actors")  # by default its warnings go to standard error
POLL_S = 0.25
CALL_TIMEOUT_S = 60.0


class Engine:
    """A target and its draft, ready to generate. Close it, or use it as a context manager.

        with Engine.launch("./Llama-2-13b", "./TinyLlama", memory="4GB") as engine:
            for piece in engine.stream("Once upon a time", max_new_tokens=128):
                print(piece.text, end="", flush=True)

    One request at a time: another one meanwhile, from whatever thread, raises `EngineBusyError`. A stream is a request
    from its first piece until it is read to its end, closed, or forgotten. An engine that is closed raises
    `EngineClosedError`. An engine starts a Ray of its own, which has room for one; several in a process are possible
    where the process has called `ray.init()` before.

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
        self._turn = Turn()
        self._ending = threading.RLock()
        self._end = ExitStack()  # from the last to the first
        self._end.callback(admission.close)
        self._end.callback(end_ray, ray_)
        self._end.callback(actors.close)
        self._end.callback(watcher.close)
        self._end.callback(self._turn.close)
        sizes = {spec.name: spec.nbytes for spec in prepared.layout.shards}
        pinned, later = ([sizes[n] for n in names] for names in (prepared.memory.pinned, prepared.pinned_later))
        self._later_bytes = sum(later)
        self._guard = Guard(actors.verifier, pinned, prepared.memory.cap_bytes, later=later)
        watcher.tell(self._guard.look)
        self._overrun = overrun
        self._tokenizer, self._special_tokens = text.tokenizer, text.special_tokens
        self._finish_reason = ""
        self._stats: Stats | None = None

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
                say,
            )
            undo.callback(actors.close)
            engine = cls(prepared, ray_, actors, watcher, text, overrun, admission)
            undo.pop_all()  # from now on by `close`
            return engine

    def __enter__(self) -> Self:
        self._turn.check_open()
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
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        speculate: bool = True,
        trace: str | os.PathLike[str] | None = None,
    ) -> Result:
        """Continue `prompt` greedily, to the end.

        max_new_tokens: at most; 1 or more. What the planned context has no room for is left out.
        stop: a string that ends the text, or several; none of them is part of it.
        chat: `prompt` is a user's message, and the model's chat template goes around it.
        speculate: False asks for one token a pass, without the draft; the text is the same.
        trace: a file that what every actor does is written to, for `llmcad trace`.

        Raises `ConfigError`, `EngineBusyError`, `EngineClosedError`, or what broke.
        """
        options = RequestOptions(
            prompt, max_new_tokens=max_new_tokens, stop=stop, chat=chat, speculate=speculate, trace=trace
        )
        with self._turn.request():
            return self.result(list(self._run(options, self._request(options))))

    def result(self, pieces: Sequence[Piece]) -> Result:
        """The last request's pieces, put together. Answered by a closed engine too."""
        accepted = [piece for piece in pieces if not piece.provisional]
        ids = tuple(i for piece in accepted for i in piece.token_ids)
        return Result("".join(piece.text for piece in accepted), ids, self._finish_reason, self.stats)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        speculate: bool = True,
        provisional: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> Generator[Piece]:
        """Continue `prompt` greedily, yielding text as it is accepted; options and errors as of `generate`.

        provisional: also yield the draft's guess while a pass runs; the next piece that is not provisional
        replaces it.

        The request begins with the first piece that is asked for. `close()` of what is returned ends it early.
        """
        options = RequestOptions(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            chat=chat,
            speculate=speculate,
            provisional=provisional,
            trace=trace,
        )
        self._turn.check()
        return self._stream(options, self._request(options))

    def check_lossless(
        self, result: Result, prompt: str, *, max_new_tokens: int = 128, chat: bool = False
    ) -> LosslessCheck:
        """Decode `prompt` again, from its first token on, plainly: is `result` the target's own text?

        `result` is what `generate` or `stream` gave for it, with the same options. (Stop strings need not be given: the
        tokens before them are compared.) Takes a pass for each token, until a token differs; `stats` are of these
        passes afterwards. Raises as `generate`.
        """
        options = RequestOptions(prompt, max_new_tokens=max_new_tokens, chat=chat, speculate=False)
        with self._turn.request():
            request = self._request(options)
            plain = self._plainly(options, request, result)
            at = parting(result.token_ids, plain)
            difference = None if at is None else self._difference(result.token_ids, plain, at)
            return LosslessCheck(len(plain), target_dtype(self.prepared.config), difference)

    def _plainly(self, options: RequestOptions, request: Request, result: Result) -> tuple[int, ...]:
        """The tokens of the plain text, as far as they are those of `result`, and the first that is not."""
        self._call("the coordinator", self._actors.coordinator.cancel)  # it may go on behind a stop string
        self._call("the target", self._actors.verifier.forget, timeout_s=PASS_TIMEOUT_S)
        found: tuple[int, ...] = ()
        with closing(self._run(options, request)) as pieces:
            for piece in pieces:
                found += piece.token_ids
                is_all = found == result.token_ids and result.finish_reason == "stop"  # the stop may be a string
                if is_all or found != result.token_ids[: len(found)]:
                    break
        return found

    def _difference(self, ours: Sequence[int], plain: Sequence[int], at: int) -> Difference:
        pair = [ids[at] if at < len(ids) else None for ids in (ours, plain)]
        texts = [None if i is None else self._tokenizer.decode([i], skip_special_tokens=False) for i in pair]
        if None in pair:
            return Difference(at, tuple(pair), tuple(texts), None)
        arguments = pack(tuple(plain[:at])), pack(tuple(pair))
        logits = self._call("a pass", self._actors.verifier.logits_after, *arguments, timeout_s=PASS_TIMEOUT_S)
        return Difference(at, tuple(pair), tuple(texts), unpack(logits))

    @property
    def stats(self) -> Stats:
        """Of the last request; disk and memory figures once it has ended. Answered by a closed engine too."""
        if self._stats is None:
            raise RuntimeFailure("no request has been finished")
        return self._stats

    def status(self) -> Status:
        """Where the running request is. May be asked from any thread."""
        progress, stats = self._progress(), self._stats
        return Status(
            progress.shard,
            progress.index,
            progress.num_shards,
            progress.bytes_read,
            progress.read_seconds,
            self._watcher.current_bytes,
            self.prepared.memory.cap_bytes,
            stats.new_tokens if stats else 0,
            stats.tokens_per_pass if stats else 0.0,
            stats.seconds if stats else 0.0,
        )

    def _request(self, options: RequestOptions) -> Request:
        """The request in the target's tokens. Raises `ConfigError` where there is no room for it."""
        ids = self._encode_chat(options.prompt) if options.chat else self._encode(options.prompt)
        room = self._room(ids, options.max_new_tokens)
        return Request(ids, room, self.prepared.stop_tokens, options.speculate, self.prepared.config.provisional)

    def _stream(self, options: RequestOptions, request: Request) -> Generator[Piece]:
        with self._turn.request():
            yield from self._run(options, request)

    def _run(self, options: RequestOptions, request: Request) -> Generator[Piece]:
        """The request, whose turn it is."""
        context = () if self.prepared.is_encoder_decoder else request.prompt  # what the new text goes on from
        detokenizer, stops = Detokenizer(self._tokenizer, context), StopStrings(options.stop)
        self.prepared.check_unchanged()
        with traced(options.trace, self._actors, self.prepared, request):
            yield from self._decode(request, detokenizer, stops, options.provisional)

    def _decode(
        self, request: Request, detokenizer: Detokenizer, stops: StopStrings, provisional: bool
    ) -> Generator[Piece]:
        self._finish_reason, self._stats, before, shed = "", None, self._progress(), self._guard.num_shed
        self._overrun.begin()
        self._call("the request", self._actors.coordinator.start, pack(request))
        try:
            while not self._finish_reason:
                for event in self._poll():
                    if not (isinstance(event, Provisional) and not provisional):
                        yield from self._handle(event, detokenizer, stops)
            if tail := stops.feed(detokenizer.flush(), final=True):
                yield Piece(tail, ())
        except (ActorFailure, DeadlineError):
            if tail := stops.feed(detokenizer.flush(), final=True):
                yield Piece(tail, ())  # accepted, and held back for what would have completed it
            raise
        finally:
            self._finish(before, shed)

    def _finish(self, before: ReadingProgress, shed: int) -> None:
        """Whatever ended the request: nothing of it goes on, and its figures are as whole as they can be."""
        with suppress(LlmcadError):  # what broke the request is being raised; a closed engine has no figures
            with self._turn.call():
                self._actors.coordinator.cancel.remote()
            if self._stats is not None:
                self._stats = self._completed(self._stats, before, shed)

    def _poll(self) -> Iterator[Event]:
        for event in unpack(self._call("the coordinator", self._actors.coordinator.events, POLL_S)):
            if isinstance(event, Failed):
                raise self._failure(event)
            yield event
            if self._finish_reason:
                return

    def _failure(self, event: Failed) -> LlmcadError:
        """What broke the request; a model whose files changed under it explains whatever else went wrong."""
        error = event.as_error()
        try:
            self.prepared.check_unchanged()
        except StorageError as change:
            return change
        return EngineClosedError(CLOSED) if self._turn.is_closed else error

    def _handle(self, event: Event, detokenizer: Detokenizer, stops: StopStrings) -> Iterator[Piece]:
        if isinstance(event, Provisional):
            yield Piece(detokenizer.peek(event.ids), event.ids, provisional=True)
        elif isinstance(event, Tokens):
            self._stats = event.stats
            yield Piece(stops.feed(detokenizer.feed(event.ids)), event.ids)
            if stops.hit:
                self._finish_reason = "stop"
        elif isinstance(event, DraftEnded):
            self._actors.end_draft()
            self._guard.draft_has_ended()
        elif isinstance(event, Finished):
            self._finish_reason, self._stats = event.reason, event.stats

    def _completed(self, stats: Stats, before: ReadingProgress, shed: int) -> Stats:
        """Statistics with what only this process knows: disk, memory, the plan."""
        after, memory = self._progress(), self.prepared.memory
        self._watcher.sample()
        return replace(
            stats,
            bytes_read=after.bytes_read - before.bytes_read,
            read_seconds=after.read_seconds - before.read_seconds,
            memory_cap_bytes=memory.cap_bytes,
            peak_memory_bytes=self._watcher.peak_bytes,
            pinned_bytes=memory.pinned_bytes + (self._later_bytes if self._actors.has_ended_draft else 0),
            window_bytes=memory.window_bytes,
            spilled_bytes=self._watcher.spilled_bytes,
            shed_shards=self._guard.num_shed - shed,
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
        with self._turn.call():
            return fetch(method.remote(*args), timeout_s, what)

"""The door: launch an engine, generate, stream, close. Runs in the user's process; no torch here."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

from tokenizers import Tokenizer

import llmcad_actors.errors as errors
from llmcad_actors.actors.calls import fetch
from llmcad_actors.actors.guard import Guard
from llmcad_actors.actors.lean_ray import LocalRay
from llmcad_actors.actors.memory import MemoryWatcher, process_pss
from llmcad_actors.actors.runtime import Actors, start_actors
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.stats import Stats
from llmcad_actors.disk_settings import meet_disk
from llmcad_actors.errors import ConfigError, LlmcadError, RuntimeFailure
from llmcad_actors.messages import Event, Failed, Finished, Progress, Provisional, Request, Tokens, pack, unpack
from llmcad_actors.models.tokenizer import Detokenizer, StopStrings, is_plain, plain_tokenizer
from llmcad_actors.planning import Prepared, prepare
from llmcad_actors.results import Piece, Result, Status
from llmcad_actors.tracing import traced

POLL_S = 0.25
CALL_TIMEOUT_S = 60.0
TOKENIZER_TIMEOUT_S = 120.0


class Engine:
    """A target and its draft, ready to generate. One request at a time; close it, or use it as a context manager."""

    def __init__(self, prepared: Prepared, ray_: LocalRay, actors: Actors, watcher: MemoryWatcher) -> None:
        self.prepared = prepared
        self._ray = ray_
        self._actors = actors
        self._watcher = watcher
        pinned = [spec.nbytes for spec in prepared.layout.shards if spec.name in prepared.memory.pinned]
        self._guard = Guard(actors.verifier, pinned, prepared.memory.cap_bytes)
        watcher.tell(self._guard.look)
        self._tokenizer = self._load_tokenizer()
        self._finish_reason = ""
        self._stats: Stats | None = None

    @classmethod
    def launch(
        cls,
        target: str | os.PathLike[str],
        draft: str | os.PathLike[str] | None = None,
        *,
        memory: str = "75%",
        say: Callable[[str], None] = lambda what: None,
        count_caller: bool = False,
        **settings: Any,
    ) -> Self:
        """Check, plan, start the actors and pin what stays. Settings are `EngineConfig`'s fields.

        `memory` caps all that llmcad adds to the machine; of the calling process only the growth from now on is
        counted, unless `count_caller`. `say` is told what is being waited for. Raises `UserError` for bad input,
        before any process is started; `RuntimeFailure` when the start breaks.
        """
        try:
            config = EngineConfig(
                target=str(target), draft=None if draft is None else str(draft), memory=memory, **settings
            )
        except TypeError as error:
            raise ConfigError(f"unknown setting: {error}") from None
        return cls.start(prepare(config), say=say, count_caller=count_caller)

    @classmethod
    def start(
        cls, prepared: Prepared, *, say: Callable[[str], None] = lambda what: None, count_caller: bool = False
    ) -> Self:
        """`launch` for a job that has been prepared."""
        baseline = 0 if count_caller else process_pss(os.getpid())[0]
        watcher = MemoryWatcher(os.getpid(), baseline_bytes=baseline)
        for notice in prepared.notices:
            say(notice)
        meet_disk(prepared.config, prepared.target, say)
        say("starting Ray")
        ray_ = LocalRay(prepared.memory.store_bytes)
        try:
            watcher.start()
            actors = start_actors(
                ray_.line,
                prepared.loader_spec(),
                prepared.verifier_spec(),
                prepared.draft_spec(),
                prepared.policy(),
                prepared.costs(),
                say,
            )
            return cls(prepared, ray_, actors, watcher)
        except BaseException:
            watcher.close()
            ray_.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and Ray if the engine started it. Leaves no process and no shared memory."""
        self._watcher.close()
        self._actors.close()
        self._ray.close()

    def generate(self, prompt: str, **options: Any) -> Result:
        """Continue `prompt` to the end; options as for `stream`."""
        return self.result(list(self.stream(prompt, **options)))

    def result(self, pieces: Sequence[Piece]) -> Result:
        """The last request's pieces, put together."""
        accepted = [piece for piece in pieces if not piece.provisional]
        ids = tuple(i for piece in accepted for i in piece.token_ids)
        return Result("".join(piece.text for piece in accepted), ids, self._finish_reason, self.stats)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        chat: bool = False,
        speculate: bool = True,
        provisional: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> Iterator[Piece]:
        """Continue `prompt` greedily, yielding text as it is accepted.

        stop: strings that end the text (they are not part of it). chat: `prompt` is a user's message, and the
        model's chat template goes around it. speculate=False: one token a pass.
        provisional: also yield the draft's guess while a pass runs; the next piece that is not provisional
        replaces it. trace: a file that what every actor does is written to, for `llmcad trace`.
        """
        ids = self._encode_chat(prompt) if chat else self._encode(prompt)
        request = Request(
            ids, self._room(ids, max_new_tokens), self.prepared.stop_tokens, speculate, self.prepared.config.provisional
        )
        context = () if self.prepared.is_encoder_decoder else ids  # what the new text goes on from
        with traced(trace, self._actors, self.prepared, request):
            yield from self._run(request, Detokenizer(self._tokenizer, context), StopStrings(stop), provisional)

    @property
    def stats(self) -> Stats:
        """Of the last request; disk and memory figures once it has ended."""
        if self._stats is None:
            raise RuntimeFailure("no request has been finished")
        return self._stats

    def status(self) -> Status:
        """Where the running request is."""
        progress = self._progress()
        return Status(
            progress.shard,
            progress.index,
            progress.num_shards,
            progress.bytes_read,
            progress.read_seconds,
            self._watcher.current_bytes,
            self.prepared.memory.cap_bytes,
            self._stats.new_tokens if self._stats else 0,
            self._stats.tokens_per_pass if self._stats else 0.0,
        )

    def _run(
        self, request: Request, detokenizer: Detokenizer, stops: StopStrings, provisional: bool
    ) -> Iterator[Piece]:
        self._finish_reason, self._stats, before, shed = "", None, self._progress(), self._guard.num_shed
        self._call(self._actors.coordinator.start.remote(pack(request)), "the request")
        try:
            while not self._finish_reason:
                for event in self._poll():
                    if not (isinstance(event, Provisional) and not provisional):
                        yield from self._handle(event, detokenizer, stops)
            if tail := stops.feed(detokenizer.flush(), final=True):
                yield Piece(tail, ())
        finally:
            with suppress(LlmcadError):  # what broke the request is being raised
                self._actors.coordinator.cancel.remote()
                if self._stats is not None:
                    self._stats = self._completed(self._stats, before, shed)

    def _poll(self) -> Iterator[Event]:
        for event in unpack(self._call(self._actors.coordinator.events.remote(POLL_S), "the coordinator")):
            if isinstance(event, Failed):
                raise getattr(errors, event.kind, RuntimeFailure)(event.message)
            yield event
            if self._finish_reason:
                return

    def _handle(self, event: Event, detokenizer: Detokenizer, stops: StopStrings) -> Iterator[Piece]:
        if isinstance(event, Provisional):
            yield Piece(detokenizer.peek(event.ids), event.ids, provisional=True)
        elif isinstance(event, Tokens):
            self._stats = event.stats
            yield Piece(stops.feed(detokenizer.feed(event.ids)), event.ids)
            if stops.hit:
                self._finish_reason = "stop"
        elif isinstance(event, Finished):
            self._finish_reason, self._stats = event.reason, event.stats

    def _completed(self, stats: Stats, before: Progress, shed: int) -> Stats:
        """Statistics with what only this process knows: disk, memory, the plan."""
        after, memory = self._progress(), self.prepared.memory
        self._watcher.sample()
        return replace(
            stats,
            bytes_read=after.bytes_read - before.bytes_read,
            read_seconds=after.read_seconds - before.read_seconds,
            memory_cap_bytes=memory.cap_bytes,
            peak_memory_bytes=self._watcher.peak_bytes,
            pinned_bytes=memory.pinned_bytes,
            window_bytes=memory.window_bytes,
            spilled_bytes=self._watcher.spilled_bytes,
            shed_shards=self._guard.num_shed - shed,
        )

    def _load_tokenizer(self) -> Tokenizer:
        path = self.prepared.target.path
        tokenizer = plain_tokenizer(path)
        if tokenizer is None:
            call = self._actors.verifier.tokenizer_json.remote()
            tokenizer = Tokenizer.from_str(fetch(call, TOKENIZER_TIMEOUT_S, "the tokenizer"))
        return tokenizer

    def _encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(prompt).ids) or self.prepared.opening()

    def _encode_chat(self, message: str) -> tuple[int, ...]:
        """The template brings its own special tokens; the tokenizer adds none."""
        template = self.prepared.chat_template()
        if not is_plain(template.path):
            tokens = unpack(fetch(self._actors.verifier.special_tokens.remote(), TOKENIZER_TIMEOUT_S, "the tokenizer"))
            template = replace(template, special_tokens=tokens)
        return tuple(self._tokenizer.encode(template.render(message), add_special_tokens=False).ids)

    def _room(self, ids: Sequence[int], max_new_tokens: int) -> int:
        """New tokens that fit behind the prompt."""
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {max_new_tokens} must be at least 1")
        room = self.prepared.room(len(ids))
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, the engine was planned for {self.prepared.context} in all; "
                "shorten it, or give a larger --max-context if the model allows it"
            )
        return min(max_new_tokens, room)

    def _progress(self) -> Progress:
        progress: Progress = unpack(self._call(self._actors.loader.progress.remote(), "the loader"))
        return progress

    def _call(self, ref: Any, what: str) -> Any:
        return fetch(ref, CALL_TIMEOUT_S, what)

"""A job: the models, the settings and the split of memory that a run is made from. Made by `plan/prepare.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import MemoryPlan, pinned_besides, plan
from llmcad_actors.errors import ConfigError
from llmcad_actors.families.families import family_of
from llmcad_actors.families.generation_rules import first_token, sampling_of, stop_tokens
from llmcad_actors.plan.footprint import (
    budget_inputs,
)
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import Layout

if TYPE_CHECKING:
    from llmcad_actors.text.chat import ChatTemplate


@dataclass(frozen=True)
class Prepared:
    """A checked job: everything that the actors are built from."""

    config: EngineConfig
    target: Checkpoint
    layout: Layout
    draft: Checkpoint | None
    memory: MemoryPlan
    context: int  # tokens of prompt and output together
    notices: tuple[str, ...] = ()  # what the user should know: settings that were changed, or are not followed
    least_bytes: int = 0  # the smallest cap that would do

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """End-of-text ids. A generation config that names none has none, as in `generate`."""
        return stop_tokens(self.target.generation_settings)

    @property
    def sampling(self) -> dict[str, Any]:
        """How the model's generation config would sample; empty where it would not."""
        return sampling_of(self.target.generation_settings)

    @property
    def is_encoder_decoder(self) -> bool:
        """The prompt goes to an encoder; the decoder's text is the output alone, behind a first token."""
        return bool(self.layout.encoder)

    @property
    def target_name(self) -> str:
        """The target as the user calls it: its name in a cache, or its directory's."""
        if self.target.path != Path(self.config.target).expanduser():
            return self.config.target
        return self.target.path.name or self.target.path.resolve().name

    @property
    def model_context(self) -> int:
        """Tokens that the target was made for, whatever is planned."""
        return context_of(self.target.config)

    def room(self, prompt_tokens: int) -> int:
        """New tokens that fit behind a prompt; below 1: none, it is too long itself."""
        if self.is_encoder_decoder and prompt_tokens <= self.context:
            return self.context - 1
        return self.context - prompt_tokens

    def opening(self) -> tuple[int, ...]:
        """What an empty prompt stands for: the token that begins a text. Raises `ConfigError` where there is none."""
        bos = first_token(self.target.config, self.layout.embedding.shape[0])
        if bos is None:
            raise ConfigError("the prompt is empty, and the model has no token to begin a text with; give a prompt")
        return (bos,)

    def chat_template(self) -> "ChatTemplate":
        """What goes around a user's message. Raises `TokenizerError` where the model has none."""
        from llmcad_actors.text.chat import read_chat_template  # here: jinja2 takes 6 MB, and few ask for it

        return read_chat_template(self.target.path)

    def check_unchanged(self) -> None:
        """Raises `StorageError` where a file of the target or the draft is no longer the one that was planned for."""
        for checkpoint in (self.target, self.draft):
            if checkpoint is not None:
                checkpoint.check_unchanged()

    @property
    def reads_ahead(self) -> bool:
        """A shard is read while another computes."""
        return self.config.read_ahead and self.memory.overlaps

    def without_draft(self) -> "Prepared":
        """The same job with no draft, whose memory pins layers of the target."""
        if self.draft is None:
            return self
        inputs = budget_inputs(self.config, self.target, self.layout, None, self.context)
        return replace(self, draft=None, memory=plan(inputs, self.memory.cap_bytes))

    @property
    def draft_bytes(self) -> int:
        """Memory that the draft takes, with all that only it needs."""
        alone = self.without_draft().memory
        return self._bytes_beside_layers(self.memory) - self._bytes_beside_layers(alone)

    @property
    def pinned_later(self) -> tuple[str, ...]:
        """Shards to pin besides, should the draft end."""
        if self.draft is None:
            return ()
        shards = budget_inputs(self.config, self.target, self.layout, None, self.context).shards
        return pinned_besides(self.memory, shards, self.draft_bytes)

    @staticmethod
    def _bytes_beside_layers(memory: MemoryPlan) -> int:
        return memory.total_bytes - memory.pinned_bytes - memory.window_bytes - memory.slack_bytes


def context_of(config: Mapping[str, Any]) -> int:
    """Tokens that the model was made for."""
    return family_of(config).context(config)

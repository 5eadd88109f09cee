"""A model's chat template around one user message, as transformers' `apply_chat_template` renders it, without torch.

Reads the files; the template itself runs in another process (`chat_template.py`), which can be ended.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcad_actors.core.quoting import quoted, shown
from llmcad_actors.errors import TokenizerError
from llmcad_actors.storage.small_file import MB, read_object, read_text
from llmcad_actors.text.tokenizer import tokenizer_config

TEMPLATE_BYTES = 1 * MB
TIMEOUT_S = 20.0  # a busy machine included; the time that it may compute is less
_RENDERER = [sys.executable, "-m", "llmcad_actors.text.chat_template"]
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template and the special tokens that it may name."""

    path: Path  # of the model, for messages
    source: str
    special_tokens: Mapping[str, str]

    def render(self, message: str) -> str:
        """The prompt for one user message, up to where the answer begins. Raises `TokenizerError`."""
        answer = self._answer({"source": self.source, "variables": self.variables(message)})
        if "text" not in answer:
            raise self._refusal(answer.get("error"))
        return str(answer["text"])

    def variables(self, message: str) -> dict[str, Any]:
        """What the template is given."""
        messages = [{"role": "user", "content": message}]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return {**given, **self.special_tokens}

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        try:
            done = subprocess.run(
                _RENDERER,
                input=json.dumps(asked).encode(),
                capture_output=True,
                timeout=TIMEOUT_S,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except subprocess.TimeoutExpired:
            raise self._refusal(f"it has not come to an end after {TIMEOUT_S:.0f} s") from None
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:  # ended by its limits, before it could say so
            return {"error": "it does not come to an end, or takes more memory than any template needs"}
        return answer

    def _refusal(self, why: object) -> TokenizerError:
        return TokenizerError(
            f"the chat template of {shown(self.path)} cannot be applied ({shown(why)}); leave out --chat (chat=True), "
            "and write the prompt as the model's card says"
        )


def read_chat_template(path: Path) -> ChatTemplate:
    """The template of a directory: chat_template.jinja, else tokenizer_config.json's. Raises `TokenizerError`.

    The special tokens are those that the files name; a tokenizer class may know more (its `special_tokens_map`).
    """
    config, file = tokenizer_config(path), path / "chat_template.jinja"
    is_file = os.path.lexists(file)
    source = read_text(file, TEMPLATE_BYTES, TokenizerError) if is_file else _default(config.get("chat_template"))
    if source is None:
        raise TokenizerError(
            f"{shown(path)} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): it "
            "may be a base model, not a chat model; leave out --chat (chat=True) to continue the text as it stands"
        )
    return ChatTemplate(path, source, _special_tokens(path, config))


def _default(template: Any) -> str | None:
    """Of several templates, the one called default."""
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    file = path / "special_tokens_map.json"
    named = {**(read_object(file, error=TokenizerError) if os.path.lexists(file) else {}), **config}
    return {name: _token(path, name, named[name]) for name in NAMED_TOKENS if named.get(name) is not None}


def _token(path: Path, name: str, token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TokenizerError(
            f"{shown(path)}: {name} must be text, found {quoted(token)}; copy the tokenizer's files again"
        )
    return text

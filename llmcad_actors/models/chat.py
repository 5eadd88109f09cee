"""A model's chat template around one user message, as transformers' `apply_chat_template` renders it, without torch.

Templates come with models, so they are untrusted: they run in jinja2's sandbox, with the names that transformers
gives them and no others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmcad_actors.errors import TokenizerError
from llmcad_actors.models.tokenizer import tokenizer_config

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template and the special tokens that it may name."""

    path: Path  # of the model, for messages
    source: str
    special_tokens: Mapping[str, str]

    def render(self, message: str) -> str:
        """The prompt for one user message, up to where the answer begins. Raises `TokenizerError`."""
        messages = [{"role": "user", "content": message}]
        try:
            rendered = _environment().from_string(self.source)
            return rendered.render(
                **{"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True},
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TokenizerError(
                f"the chat template of {self.path} cannot be applied ({error}); leave out --chat (chat=True), and "
                "write the prompt as the model's card says"
            ) from None


def read_chat_template(path: Path) -> ChatTemplate:
    """The template of a directory: chat_template.jinja, else tokenizer_config.json's. Raises `TokenizerError`.

    The special tokens are those that the files name; a tokenizer class may know more (`auto_special_tokens`).
    """
    config, file = tokenizer_config(path), path / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else _default(config.get("chat_template"))
    if source is None:
        raise TokenizerError(
            f"{path} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): it may be "
            "a base model, not a chat model; leave out --chat (chat=True) to continue the text as it stands"
        )
    return ChatTemplate(path, source, _special_tokens(path, config))


def auto_special_tokens(path: Path) -> dict[str, str]:
    """The special tokens of the directory's AutoTokenizer, by name. Imports torch."""
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(path, local_files_only=True).special_tokens_map)


def _default(template: Any) -> str | None:
    """Of several templates, the one called default."""
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    file = path / "special_tokens_map.json"
    named = {**(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}), **config}
    tokens = {name: named[name] for name in NAMED_TOKENS if named.get(name) is not None}
    return {name: str(token["content"] if isinstance(token, dict) else token) for name, token in tokens.items()}


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} marks what a trainer learns from; for rendering it is nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` in a template, without what a type gives away."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template; no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is not allowed on a namespace")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """As in transformers' chat_template_utils.py."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment

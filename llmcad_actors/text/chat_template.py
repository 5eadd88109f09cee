"""Renders a chat template, in a process of its own: `python -m llmcad_actors.text.chat_template`.

Templates come with models, so they are untrusted. They run in jinja2's sandbox, with the names that transformers gives
them and no others; and as a template can loop for ever and double a text until no memory is left, in a process that
may use so much time and memory and no more. Standard input: template and variables; standard output: the text or what
went wrong; both JSON. Knows nothing of models.
"""

import json
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
MOST_CHARACTERS = 10_000_000


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """As transformers' `apply_chat_template`. Raises whatever the template comes to."""
    return _environment().from_string(source).render(**variables)


def main() -> None:
    """Render what standard input asks for."""
    asked = json.load(sys.stdin)
    _confine()
    try:
        text = render_template(asked["source"], asked["variables"])
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it makes a text of {len(text):,} characters, {MOST_CHARACTERS:,} at most are taken")
        answer = {"text": text}
    except MemoryError:
        answer = {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply, or calls itself without end"}
    except Exception as error:  # a template may raise anything that Python can
        answer = {"error": str(error)[:10_000] or type(error).__name__}
    json.dump(answer, sys.stdout)


def _confine() -> None:
    """No more time, memory and files than a template needs."""
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: 16 * MOST_CHARACTERS,  # the answer's own, where standard output is a file
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        with suppress(ValueError, OSError):  # lower already, or a system without it
            resource.setrlimit(limit, (value, value))


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


if __name__ == "__main__":
    main()

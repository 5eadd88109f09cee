"""A chat template is rendered as transformers' `apply_chat_template` renders it, text and ids."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmcad_actors.errors import TokenizerError
from llmcad_actors.text.chat import read_chat_template
from llmcad_actors.text.chat_template import render_template
from llmcad_actors.text.tokenizer import is_plain, read_tokenizer
from llmcad_actors.text.tokenizer_child import load_tokenizer
from tests.tiny import tiny_llama, with_template

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'].strip() }} [/INST]{% endfor %}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages[0].content }}",
    "helpers": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}"
    "{% break %}{% endfor %}{{ ns.n }}{{ strftime_now('%Y') }}{{ dict(a=1) | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!",
    "tools": "{% if tools is none and documents is none and not thinking %}{{ messages[-1]['content'] }}{% endif %}",
}
texts = st.text(max_size=30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: with_template(tmp_path_factory.mktemp("chat"), template) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25)
@given(text=texts)
@example(text='<b> "quoted" & \u00e9\u65e5 </b>\n\n  {{ messages }} {% raw %}')
@example(text="")
def test_text_and_ids_are_those_of_apply_chat_template(folders: dict[str, Path], name: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    messages = [{"role": "user", "content": text}]
    template = read_chat_template(folders[name])
    rendered = render_template(template.source, template.variables(text))  # in this process: it is much sooner there
    assert rendered == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = read_tokenizer(folders[name]).encode(rendered, add_special_tokens=False).ids
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_process_of_its_own_renders_the_same(folders: dict[str, Path], name: str) -> None:
    template, text = read_chat_template(folders[name]), "\u00e9\u65e5 \ud800 {{ messages }}\n"
    assert template.render(text) == render_template(template.source, template.variables(text))


def test_a_class_that_knows_more_tokens_is_asked(tmp_path: Path) -> None:
    """What begins a text is in no file here: it is the class's default."""
    folder = with_template(tmp_path, TEMPLATES["special tokens"], tokenizer_class="GPT2Tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k[1:] != "os_token"}))
    assert not is_plain(folder)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    template = read_chat_template(folder)
    assert template.render("Hi") != expected
    loaded = load_tokenizer(folder)
    assert loaded.special_tokens is not None
    assert replace(template, special_tokens=loaded.special_tokens).render("Hi") == expected
    assert loaded.tokenizer.encode(expected).ids


def test_templates_may_stand_in_the_tokenizers_config(tmp_path: Path) -> None:
    """As older models have them, one or several; the file of its own wins."""
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes {{ messages[0].content }}"}]
    for template in (several, several[1]["template"]):
        folder = with_template(tmp_path / str(type(template)), None, chat_template=template)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        expected = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert read_chat_template(folder).render("x") == expected == "yes x"
    (folder / "chat_template.jinja").write_text("file")
    assert read_chat_template(folder).render("x") == "file"


def test_a_model_without_a_template_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, layers=1)
    with pytest.raises(TokenizerError, match="has no chat template"):
        read_chat_template(model)
    command = [sys.executable, "-m", "llmcad_actors.cli", "generate", "--target", str(model), "--chat", "Hi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no chat template" in done.stderr


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only system messages here') }}",
        "{% if %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ dict.__class__.__name__ }}",
        "{% set n = namespace(__x=1) %}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ 10 ** 5000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%d' | format('x') }}",
        "{% set n = namespace(a=1) %}{{ n.b.c }}",
        "{{ ''.join(messages) }}",
        "(" * 1000 + "{{ " + "(" * 5000 + " }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(tmp_path: Path, template: str) -> None:
    folder = with_template(tmp_path, None)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(TokenizerError, match=r"the chat template of .* cannot be applied"):
        read_chat_template(folder).render("Hi")


# Nothing is written in the loop: even empty texts are kept until the end, and would take memory before the time is up.
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x * 2 %}{% endfor %}{{ n.x }}"
MEMORY = "it takes more than 512 MiB of memory"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOP, "does not come to an end|has not come to an end"),
        (DOUBLES, MEMORY),
        ("{{ 'x' * (2 ** 31) }}", MEMORY),
        ("{{ ('x' * 3000000) ~ ('y' * 9000000) }}", "a text of 12,000,000 characters"),
    ],
    ids=["loops for ever", "doubles", "asks for 2 GiB", "is too long"],
)
def test_a_template_takes_no_more_than_its_share(tmp_path: Path, template: str, why: str) -> None:
    """In another process: this one would not come back."""
    (with_template(tmp_path, None) / "chat_template.jinja").write_text(template)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TokenizerError, match=rf"the chat template of .* cannot be applied \(.*({why})") as caught:
        read_chat_template(tmp_path).render("Hi")
    assert len(str(caught.value)) < 800
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


FILES: dict[str, tuple[str, bytes, str]] = {
    "a template that is no text": ("chat_template.jinja", b"\xff\xfe{{ messages }}", "is not UTF-8 text"),
    "a template without end": ("chat_template.jinja", b"x" * 2_000_000, "has 2,000,000 bytes"),
    "settings that are a list": ("tokenizer_config.json", b"[]", "is not a JSON object"),
    "deep settings": ("tokenizer_config.json", b'{"a":' * 9000, "nested"),
    "a token that is a number": (
        "tokenizer_config.json",
        b'{"chat_template": "x", "bos_token": 5}',
        "bos_token must be text",
    ),
    "a token without text": (
        "tokenizer_config.json",
        b'{"chat_template": "x", "bos_token": {}}',
        "bos_token must be text",
    ),
    "tokens that are a list": ("special_tokens_map.json", b"[1]", "is not a JSON object"),
    "templates without names": (
        "tokenizer_config.json",
        b'{"chat_template": [{"name": []}, 3]}',
        "has no chat template",
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_none_are_refused(tmp_path: Path, file: str) -> None:
    name, content, message = FILES[file]
    with_template(tmp_path, "x" if name.startswith("special") else None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        read_chat_template(tmp_path)

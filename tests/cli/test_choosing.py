"""How tokens are chosen, on the command line: what cannot be is refused before a start, what the model asks is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmcad_actors.cli.commands import app
from llmcad_actors.cli.options import choices_from_options, unsampled
from llmcad_actors.config import EngineConfig
from llmcad_actors.engine import Engine
from llmcad_actors.errors import CheckpointError
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.plain import Plain, encode
from tests.tiny import tiny_llama

PAIR = "--target", str(bundled_target()), "--draft", str(bundled_draft()), "--memory", "2GB"
PROMPT = "def area(r):\n"


def asks(folder: Path, **settings: Any) -> Path:
    """A model whose generation config has these settings."""
    path = tiny_llama(folder, seed=1, layers=1)
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "temperature: -1.0 must lie between 0 and 100"),
        (("--temperature", "nan"), "temperature: nan must lie between 0 and 100"),
        (("--top-p", "1.1"), "top_p: 1.1 must lie between 0 and 1"),
        (("--top-k", "-1"), "top_k: -1 must be a whole number of at least 0"),
        (("--min-p", "2"), "min_p: 2.0 must lie between 0 and 1"),
        (("--seed", "-3"), "seed: -3 must be a whole number of at least 0"),
        (("--repetition-penalty", "0"), "repetition_penalty: 0.0 must lie between 0.001 and 1000"),
        (("--logit-bias", "seven"), "logit_bias: 'seven' must be a token's id and a number, such as 17=-2.5"),
        (("--logit-bias", "7=400"), "logit_bias of token 7: 400.0 must lie between -100 and 100"),
        (("--logprobs", "1000"), "logprobs: 1000 is too large; 100 is the most"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize(
    "command", [("generate", PROMPT), ("batch", "in.jsonl", "--out", "out.jsonl")], ids=lambda c: c[0]
)
def test_what_cannot_be_is_refused_before_a_start(
    command: tuple[str, ...], options: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "start", lambda *_, **__: pytest.fail("it started"))
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT}))
    done = CliRunner().invoke(app, [*command, *PAIR, *options])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_options_that_are_given_are_those_of_the_request() -> None:
    assert choices_from_options() == {}
    given = choices_from_options(temperature=0.0, top_k=3, sample=True, logit_bias=["7=-1.5", "9=2"], logprobs=0)
    expected = {"temperature": 0.0, "top_k": 3, "sample": True, "logit_bias": {7: -1.5, 9: 2.0}, "logprobs": 0}
    assert given == expected


def test_a_model_that_would_rather_be_sampled_is_named_unless_it_is_meant(tmp_path: Path) -> None:
    path = asks(tmp_path, do_sample=True, temperature=0.6, top_p=0.9)
    job = prepare(EngineConfig(target=str(path), memory="8GB"))
    assert job.sampling == {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0}
    (told,) = unsampled(job, {})
    assert "samples (temperature 0.6, top_p 0.9), and this run takes the most probable tokens; --sample" in told
    assert unsampled(job, {"sample": True}) == unsampled(job, {"temperature": 0.0}) == []
    greedy = asks(tmp_path / "greedy", temperature=0.6)  # without do_sample it says nothing
    assert unsampled(prepare(EngineConfig(target=str(greedy), memory="8GB")), {}) == []


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": "hot"}, {"top_k": 2.5}, {"top_p": 3.0}])
def test_a_generation_config_that_samples_as_nothing_can_is_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    (name,) = settings
    path = asks(tmp_path, do_sample=True, **settings)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name}"):
        prepare(EngineConfig(target=str(path), memory="8GB"))


def test_a_plan_says_what_requests_share(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, seed=1)
    options = ["--target", str(path), "--draft", str(path), "--memory", "4GB", "--max-requests", "3"]
    plan = json.loads(CliRunner().invoke(app, ["plan", *options, "--json"]).stdout)
    assert (plan["max_requests"], plan["text_tokens"], plan["max_nodes"]) == (3, 3 * 256, 128)
    of_four_layers = 2 * 4 * 2 * 8  # keys and values of two heads of eight numbers
    assert plan["bytes_per_token"] in (of_four_layers * 8, of_four_layers * 6)  # the draft's may be of 16 bits
    table = CliRunner().invoke(app, ["plan", *options]).stdout
    assert "3, of 768 tokens together" in table and "a token of a request takes" in table


def test_a_seed_gives_its_text_and_log_probabilities_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a real engine."""
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path))
    options = ["--max-new-tokens", "12", "--json", "--temperature", "0.9", "--logprobs", "2", "--check-lossless"]
    done = CliRunner().invoke(app, ["generate", *PAIR, *options, PROMPT])
    assert done.exit_code == 0, done.stderr
    first = json.loads(done.stdout)
    assert first["lossless"]["same"]
    again = CliRunner().invoke(app, ["generate", *PAIR, *options, "--seed", str(first["seed"]), PROMPT])
    assert json.loads(again.stdout)["token_ids"] == first["token_ids"]
    tokens = [*encode(bundled_target(), PROMPT)]
    for token, told in zip(first["token_ids"], first["logprobs"], strict=True):
        said = Plain.of(bundled_target()).logprobs(tuple(tokens))
        assert told["token_id"] == token
        assert told["logprob"] == pytest.approx(float(said[token]), abs=1e-3)
        assert [pair[0] for pair in told["top"]] == said.argsort()[::-1][:2].tolist()
        tokens.append(token)

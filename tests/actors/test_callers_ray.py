"""On a Ray that the caller started: engines side by side, each closed by itself, with not a word on the terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.plain import Plain, encode
from tests.tiny import tiny_llama

PROMPT = "def area(r):\n"
CALLER = """
import json, os, sys
import ray
ray.init(num_cpus=2, object_store_memory=200_000_000, include_dashboard=False)
from llmcad_actors import Engine, LlmcadError
def error_of(engine, prompt, **options):
    try:
        return engine.generate(prompt, **options).text
    except LlmcadError as error:
        return str(error)
target, draft, other, prompt = sys.argv[1:]
first = Engine.launch(target, draft, memory="1.5GB")  # its draft is loaded by transformers, with a bar
with first, Engine.launch(other, draft="none", memory=1_500_000_000, max_nodes=8) as second:
    answers = [engine.generate(prompt, max_new_tokens=8).token_ids for engine in (first, second)]
    os.utime(draft + "/model.safetensors", ns=(0, 0))
    changes = [error_of(first, prompt, speculate=speculate) for speculate in (True, False)]
    streaming = second.stream(prompt, max_new_tokens=8)
    pieces = [next(streaming)]
    first.close()
    pieces += streaming
    answers.append([token for piece in pieces for token in piece.token_ids])
    answers.append(error_of(first, prompt))
    answers.append(second.generate(prompt, max_new_tokens=8).token_ids)
print(json.dumps([answers, changes, ray.is_initialized(), len(ray.nodes())]))
"""


def test_two_engines_on_a_callers_ray_are_independent_and_silent(tmp_path: Path) -> None:
    target, draft, other = (
        tiny_llama(tmp_path / name, seed=seed, layers=2) for name, seed in (("t", 12), ("d", 5), ("o", 9))
    )
    for path in (target, draft, other):  # transformers warns of such a file
        (path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.3, "top_k": 5}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", CALLER, str(target), str(draft), str(other), PROMPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *before, last = done.stdout.splitlines()
    answers, changes, is_up, nodes = json.loads(last)
    ids = [list(Plain.of(path).greedy(encode(path, PROMPT), 8)) for path in (target, other)]
    assert answers == [*ids, ids[1], "the engine is closed; launch another one", ids[1]]
    assert all(f"{draft}/model.safetensors changed while it was in use" in change for change in changes)
    assert (is_up, nodes) == (True, 1)
    assert before == []
    said = [
        line
        for line in done.stderr.splitlines()
        if not re.match(r"\d{4}-\d\d-\d\d .*(worker|auth\w*)\.py:\d+ -- ", line)
    ]
    assert said == []

"""Long prompts are planned for, and take no more than was planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from llmcad_actors.cli.commands import app
from llmcad_actors.config import EngineConfig
from llmcad_actors.plan.footprint import activation_bytes, kv_bytes
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from tests.plan.test_families import sizes
from tests.sparse import sparse_checkpoint

LLAMA_2_7B = sizes(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096)
CLEAR_PEAK = Path("/proc/self/clear_refs")
SLACK = 12 << 20  # what the allocator keeps, and code that is read when it first runs

PEAK = """
import sys
from pathlib import Path
import torch
from llmcad_actors.core.tree import TokenTree
from tests.models.checkpoints import target_of

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10

torch.set_num_threads(1)
length = int(sys.argv[2])
target, _ = target_of(Path(sys.argv[1]), capacity=length + 257)
target.begin([1] * 300, ())
target.verify(TokenTree.empty())  # everything has run once
target.begin([2 + i % 200 for i in range(length)], ())
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
target.verify(TokenTree.empty())
print(status("VmHWM") - before)
"""


def test_a_prompt_of_4000_tokens_on_a_7b_model_fits_a_small_cap(tmp_path: Path) -> None:
    path = sparse_checkpoint(tmp_path / "model", "llama", LLAMA_2_7B)

    def planned(context: int) -> dict[str, int]:
        options = ["--max-context", str(context), "--memory", "8GB", "--json"]
        done = CliRunner().invoke(app, ["plan", "--target", str(path), *options])
        assert done.exit_code == 0, done.output
        plan = json.loads(done.stdout)
        assert plan["total_bytes"] <= 8 * 10**9
        parts: dict[str, int] = plan["parts"]
        return parts

    long, half = planned(4000), planned(2000)
    assert long["target cache"] == 2 * 32 * 4096 * 4 * (4000 + 128 + 1)
    assert long["activations"] < 500 * 10**6  # all rows at once would take 1.4 GB
    rows = 2048  # more, each with four hidden states and less than one for its part of the mask and the angles
    assert 4 * 4096 * 4 * rows < long["activations"] - half["activations"] < 5 * 4096 * 4 * rows


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="the kernel does not let a process forget its peak")
def test_a_long_prompt_takes_what_the_plan_says(tmp_path: Path) -> None:
    """Peak of a pass over 3000 tokens in a process of its own; over all rows at once it is 95 MB."""
    length, hidden = 3000, 256
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    cache = kv_bytes(checkpoint.config, length - 300, 4)
    settings = EngineConfig(target=str(tmp_path), max_nodes=1, prefill_chunk=256)
    planned = activation_bytes(layout_of(checkpoint), checkpoint.config, settings, length, 4)
    environment = {"PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(length)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert planned < 40 << 20
    assert cache < int(done.stdout) < cache + planned + SLACK

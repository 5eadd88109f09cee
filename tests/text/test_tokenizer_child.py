"""A tokenizer is loaded once, for what was planned; what is found out before the start leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from llmcad_actors.config import EngineConfig
from llmcad_actors.errors import TokenizerError
from llmcad_actors.plan.footprint import CALLER, tokenizer_bytes
from llmcad_actors.plan.job import Prepared
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.small_file import TOKENIZER_BYTES
from llmcad_actors.text.tokenizer_child import (
    SMALL_BYTES,
    check_same_vocabulary,
    has_tokenizer,
    load_tokenizer,
    tokenizer_memory,
)
from tests.large_vocabularies import large_bpe, large_unigram, with_tokenizer
from tests.tiny import byte_tokenizer, tiny_llama

ENTRIES = 100_000
MAKERS = {"bpe": large_bpe, "unigram": large_unigram}
MB = 10**6

GROWTH = """
import json, sys
from pathlib import Path
from llmcad_actors.text.tokenizer_child import check_same_vocabulary, load_tokenizer, tokenizer_memory

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10

work, *paths = sys.argv[1:]
before = {key: status(key) for key in ("RssAnon", "VmRSS")}
kept = {"load": load_tokenizer, "measure": tokenizer_memory, "compare": check_same_vocabulary}[work](*map(Path, paths))
print(json.dumps({"stays": status("RssAnon") - before["RssAnon"], "peak": status("VmHWM") - before["VmRSS"]}))
"""


def growth(work: str, *paths: Path) -> dict[str, int]:
    """What `work` takes of a fresh process that does it, in bytes: what stays, and the peak."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, work, *map(str, paths)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("large")
    found = {kind: with_tokenizer(folder / kind, make(ENTRIES)) for kind, make in MAKERS.items()}
    compact = with_tokenizer(folder / "compact", large_bpe(ENTRIES), pretty=False)
    return found | {"compact bpe": compact}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "compact bpe"])
def test_what_is_measured_is_what_loading_takes(folders: dict[str, Path], kind: str) -> None:
    """Bytes per byte of these files lie between 3 and 25: no rule by size would do."""
    measured, found = tokenizer_memory(folders[kind]), growth("load", folders[kind])
    assert found["stays"] == pytest.approx(measured.stays, rel=0.1, abs=2 * MB)
    assert found["peak"] == pytest.approx(measured.peak, rel=0.15, abs=4 * MB)
    assert measured.stays > 20 * MB


def test_what_loading_leaves_free_goes_back_to_the_system(folders: dict[str, Path]) -> None:
    found = growth("load", folders["compact bpe"])
    assert found["stays"] < 0.6 * found["peak"]


def test_measuring_and_comparing_take_nothing_of_this_process(folders: dict[str, Path]) -> None:
    assert growth("measure", folders["bpe"])["peak"] < 8 * MB
    assert growth("compare", folders["bpe"], folders["compact bpe"])["peak"] < 8 * MB


def test_the_same_file_twice_is_not_read_as_a_tokenizer(tmp_path: Path) -> None:
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text('{"not": "a tokenizer"}')
    check_same_vocabulary(tmp_path / "target", tmp_path / "draft")
    (tmp_path / "draft" / "tokenizer.json").write_text('{"not": "a  tokenizer"}')
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        check_same_vocabulary(tmp_path / "target", tmp_path / "draft")


def test_a_file_that_is_too_large_is_refused_without_being_read(tmp_path: Path) -> None:
    """The same one twice, as in a target that is its own draft."""
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", TOKENIZER_BYTES + 1)
    before = _read_by_this_process()
    with pytest.raises(TokenizerError, match="such a file has at most"):
        check_same_vocabulary(tmp_path, tmp_path)
    assert _read_by_this_process() - before < 10 * MB


def _read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_other_ids_of_the_same_tokens_are_found_in_large_files(folders: dict[str, Path], tmp_path: Path) -> None:
    text = (folders["compact bpe"] / "tokenizer.json").read_text()
    assert '"zy":930,"zz":931' in text
    (tmp_path / "tokenizer.json").write_text(text.replace('"zy":930,"zz":931', '"zy":931,"zz":930'))
    with pytest.raises(
        TokenizerError, match=r"difference is at id 930, 'zy' in the target and 'zz' in the draft \(2 ids"
    ):
        check_same_vocabulary(folders["bpe"], tmp_path)


def test_models_without_a_tokenizer_json_are_compared_as_transformers_loads_them(tmp_path: Path) -> None:
    """As GPT-2 came: the vocabulary and the merges in files of their own."""
    vocab = byte_tokenizer().get_vocab()
    for name, end in (("target", "<|end|>"), ("draft", "<|end|>"), ("other", "<|stop|>")):
        (tmp_path / name).mkdir()
        renamed = {end if token == "<|end|>" else token: index for token, index in vocab.items()}
        (tmp_path / name / "vocab.json").write_text(json.dumps(renamed))
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\n")
        (tmp_path / name / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)}
            )
        )
    check_same_vocabulary(tmp_path / "target", tmp_path / "draft")
    assert tokenizer_memory(tmp_path / "target").stays >= 0
    with pytest.raises(TokenizerError, match=r"at id 0, '<\|end\|>' in the target and '<\|stop\|>' in the draft"):
        check_same_vocabulary(tmp_path / "target", tmp_path / "other")


def prepared(target: Path, draft: Path | None = None) -> Prepared:
    return prepare(EngineConfig(target=str(target), draft=None if draft is None else str(draft), memory="4GB"))


def test_the_plan_counts_the_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    target = tiny_llama(tmp_path, tokenizer_of=folders["unigram"])
    small = prepared(tiny_llama(tmp_path / "small")).memory
    assert small.tokenizer_bytes < MB
    plan = prepared(target).memory
    assert dict(plan.rows())["tokenizer"] == tokenizer_memory(target).stays > 20 * MB
    assert plan.total_bytes - plan.tokenizer_bytes == small.total_bytes - small.tokenizer_bytes


def test_a_tokenizer_whose_loading_takes_more_than_all_that_runs_is_counted_so(folders: dict[str, Path]) -> None:
    """It is loaded first, and then nothing else is there; so its peak counts only beyond the rest."""
    config = LlamaConfig(vocab_size=ENTRIES, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folders["bpe"])
    target, takes = Checkpoint.open(folders["bpe"]), tokenizer_memory(folders["bpe"])
    assert tokenizer_bytes(target, overhead=600 * MB) == takes.stays
    assert tokenizer_bytes(target, overhead=10 * MB) == CALLER + takes.peak - 10 * MB > takes.stays


def test_a_broken_tokenizer_is_refused_before_anything_starts(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target")
    (target / "tokenizer.json").write_text('{"version": "1.0"' + " " * SMALL_BYTES)
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        prepared(target)


def test_a_tokenizer_that_makes_its_library_panic_is_refused_in_a_line(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target")
    content = json.loads((target / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    for padding, use in (("", load_tokenizer), (" " * SMALL_BYTES, tokenizer_memory)):
        (target / "tokenizer.json").write_text(json.dumps(content) + padding)
        with pytest.raises(TokenizerError, match=r"cannot be read as a tokenizer .*charsmap") as caught:
            use(target)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram", "compact bpe"])
def test_a_small_tokenizer_takes_no_more_than_is_counted(tmp_path: Path, kind: str) -> None:
    folder = with_tokenizer(tmp_path, MAKERS[kind.split()[-1]](4096), pretty=not kind.startswith("compact"))
    counted, found = tokenizer_memory(folder), growth("load", folder)
    assert found["stays"] < counted.stays + 3 * MB < 20 * MB  # code of the library, when it first runs


def test_without_any_tokenizer_there_is_nothing_to_plan_for(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target")
    for file in target.glob("*token*"):
        file.unlink()
    assert not has_tokenizer(target)
    assert prepared(target).memory.tokenizer_bytes == 0

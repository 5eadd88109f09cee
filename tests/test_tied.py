"""A model whose head is its embedding may be saved under either name: transformers loads all of them alike."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcad_actors.core.tree import TokenTree
from llmcad_actors.families.families import FAMILIES, family_of
from llmcad_actors.models.draft import DraftModel
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from llmcad_actors.tools.enlarge import enlarge
from tests import encoder_decoder_cases, family_cases
from tests.encoder_decoder_cases import plain_pair
from tests.fakes import run_prefix
from tests.models.checkpoints import target_of
from tests.plain import Plain
from tests.tiny import BYTE_VOCAB, tiny_llama

DECODERS = {case.model_type: case for case in reversed(family_cases.CASES.values())}  # the first of each family
PAIRS = {case.model_type: case for case in encoder_decoder_cases.CASES.values() if not case.has_head}
PROMPT = tuple(range(40, 60))
COUNT = 6
Names = Callable[[str], str]


def test_every_family_is_tried() -> None:
    assert {name for family in FAMILIES for name in family.model_types} == DECODERS.keys() | PAIRS.keys()


def renamed(source: Path, path: Path, rename: Names) -> Path:
    """The checkpoint in one file, its tensors under other names."""
    tensors = {rename(key): value for file in source.glob("*.safetensors") for key, value in load_file(file).items()}
    path.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def swapped(stored: str, to: str, name: str) -> str:
    return to if name == stored else name


def streamed(path: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Token by token; the head comes in slices of rows."""
    target, _ = target_of(path, max_shard_bytes=20_000)
    assert target.layout.tied
    assert len(target.layout.head) > 1
    target.begin(prompt, ())
    return tuple(target.verify(TokenTree.empty()).bonus for _ in range(COUNT))


def first_drafted(path: Path, prompt: tuple[int, ...]) -> int:
    draft = DraftModel(path, dtype=torch.float32, vocab=BYTE_VOCAB, rows=64, slots=8, children=2)
    return int(run_prefix(draft, prompt)[0][0, 0])


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_table_stored_as_the_head_is_the_embedding_too(model_type: str, tmp_path: Path) -> None:
    case = DECODERS[model_type]
    source = replace(case, fields=case.fields | {"tie_word_embeddings": True}).save(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    family = family_of(config)
    path = renamed(source, tmp_path / "head", partial(swapped, family.embedding, family.head))
    expected = Plain(source).greedy(PROMPT, COUNT)
    assert Plain(path).greedy(PROMPT, COUNT) == expected
    assert streamed(path, PROMPT) == expected
    assert first_drafted(path, PROMPT) == expected[0]


@pytest.mark.parametrize("model_type", PAIRS)
def test_an_encoder_and_a_decoder_may_share_it_under_any_of_its_names(model_type: str, tmp_path: Path) -> None:
    source = PAIRS[model_type].unruled().save(tmp_path / "source")
    family = family_of(json.loads((source / "config.json").read_text()))
    expected = plain_pair(source).greedy(PROMPT, COUNT)
    for number, stored in enumerate((family.head, *family.embedding_copies)):
        path = renamed(source, tmp_path / str(number), partial(swapped, family.embedding, stored))
        assert plain_pair(path).greedy(PROMPT, COUNT) == expected
        assert streamed(path, PROMPT) == expected
        assert first_drafted(path, PROMPT) == expected[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "opt"])
def test_the_base_is_known_by_its_layers_where_the_embedding_is_not_there(model_type: str, tmp_path: Path) -> None:
    """Files of a base model leave its prefix out."""
    case = DECODERS[model_type]
    source = replace(case, fields=case.fields | {"tie_word_embeddings": True}).save(tmp_path / "source")
    family = family_of(json.loads((source / "config.json").read_text()))

    def bare(name: str) -> str:
        return family.head if name == family.embedding else name.removeprefix(family.base)

    found = layout_of(Checkpoint.open(renamed(source, tmp_path / "bare", bare)))
    assert found.stored_base == ""
    assert found.tied
    assert found.head[0].tensors[0].name == found.embedding.name == "lm_head.weight"
    assert {found.parameter(info.name) for info in found.resident} >= set(family.resident)


def test_a_head_alone_is_no_embedding_where_the_two_are_not_tied(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", layers=1)
    path = renamed(source, tmp_path / "head", lambda name: name.replace("embed_tokens", "gone"))
    with pytest.raises(Exception, match=r"missing tensor model\.embed_tokens\.weight"):
        layout_of(Checkpoint.open(path))


def test_such_a_model_can_be_enlarged(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", layers=1, tied=True)
    path = renamed(source, tmp_path / "head", lambda name: name.replace("model.embed_tokens", "lm_head"))
    large = enlarge(path, tmp_path / "large", target_bytes=4_000_000, hidden=96, layers=2)
    assert streamed(large, PROMPT) == Plain(source).greedy(PROMPT, COUNT)

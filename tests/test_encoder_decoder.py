"""Encoder-decoder families: their output is transformers' own greedy generation, token for token."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from llmcad_actors import Engine
from llmcad_actors.config import EngineConfig
from llmcad_actors.core.acceptance import walk
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import FixedTree
from llmcad_actors.core.fixed_expansion import FixedExpansion
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError, ConfigError
from llmcad_actors.families.families import family_of
from llmcad_actors.models.draft import Draft, DraftModel
from llmcad_actors.models.stacks import EncoderDecoder, start_token
from llmcad_actors.plan.footprint import encoded_bytes
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.storage.checkpoint import Checkpoint
from llmcad_actors.storage.layout import layout_of
from tests.actors.engines import job
from tests.encoder_decoder_cases import BART, CASES, ONE_EACH, T5, Case, PlainPair, plain_pair
from tests.fakes import OneDraft, Scripted, tokens_to
from tests.models.checkpoints import target_of
from tests.plain import encode
from tests.streamed import Streaming
from tests.test_lossless import local
from tests.tiny import BYTE_VOCAB, PROMPTS, tiny_llama

COUNT = 40
NOISE = 0.01
TEXTS = (*PROMPTS[:2], "for name in sorted(os.listdir(folder)):\n    print(name)\n")


class Saved:
    """A folder of checkpoints, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = cache(lambda name: CASES[name].save(folder / name))
        self.noisy = cache(lambda name: CASES[name].save(folder / f"{name} noisy", noise=NOISE))
        self.random = cache(lambda name: CASES[name].save(folder / f"{name} random", seed=9))
        self.unruled = cache(lambda name: CASES[name].unruled().save(folder / f"{name} unruled"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("encoder-decoder"))


@cache
def greedy(path: Path, ids: tuple[int, ...]) -> tuple[int, ...]:
    """What transformers makes of a prompt."""
    return plain_pair(path).greedy(ids, COUNT)


@pytest.fixture(scope="module")
def streaming() -> Iterator[Streaming]:
    """One Ray and one loader process for all cases."""
    streaming = Streaming()
    yield streaming
    streaming.close()


@pytest.mark.parametrize("name", CASES)
def test_streamed_the_output_is_greedy_generation_with_a_draft_of_the_family(
    saved: Saved, streaming: Streaming, name: str
) -> None:
    """At least half of the decoder's layers are read from disk in every pass, the encoder's for every prompt."""
    path = saved.target(name)
    engine = streaming.local(
        path, saved.noisy(name), max_nodes=8, fallback="fixed-tree", widths=(2, 1, 2), max_context=128
    )
    passes, outputs = 0, []
    for text in TEXTS:
        ids = encode(path, text)
        found, stats = engine.generate(ids, COUNT, provisional=False)
        assert found == greedy(path, ids)
        assert len(found) == COUNT
        passes += stats.target_passes
        outputs.append(found)
    assert len(set(outputs)) == len(TEXTS)  # the decoder does look at the prompt
    memory = engine.job.memory
    assert streaming.bytes_read() >= passes * memory.bytes_per_pass + len(TEXTS) * memory.bytes_per_prompt
    assert set(memory.streamed) >= {spec.name for spec in engine.job.layout.encoder}
    assert len(TEXTS) * COUNT > 1.1 * passes


@pytest.mark.parametrize("name", ONE_EACH)
def test_so_it_is_with_a_random_draft_of_the_family(saved: Saved, streaming: Streaming, name: str) -> None:
    path = saved.target(name)
    engine = streaming.local(path, saved.random(name), max_nodes=3, fallback="fixed-tree", widths=(3,), max_context=128)
    ids = encode(path, TEXTS[-1])
    found, stats = engine.generate(ids, COUNT, provisional=False)
    assert found == greedy(path, ids)
    assert stats.verified_nodes > 0


@pytest.mark.parametrize(("target", "draft"), [("t5", "mbart"), ("bart", "mt5"), ("t5", None)])
def test_so_it_is_with_a_draft_of_another_family_and_with_none(saved: Saved, target: str, draft: str | None) -> None:
    path = saved.target(target)
    engine = local(path, saved.random(draft) if draft else None, max_nodes=6, max_context=128)
    for text in TEXTS:
        ids = encode(path, text)
        assert engine.generate(ids, COUNT)[0] == greedy(path, ids)


@pytest.mark.parametrize("name", ONE_EACH)
def test_so_it_is_when_the_draft_is_left_out_of_passes(saved: Saved, name: str) -> None:
    """Also of the first ones: its encoder then reads the prompt late."""
    path = saved.target(name)
    engine, accepted = local(path, saved.noisy(name), max_nodes=6, max_context=128), 0
    for text, first in zip(TEXTS, (True, False), strict=False):
        ids, drafts = encode(path, text), tuple((i // 3 % 2 == 0) is first for i in range(COUNT))
        found, stats = engine.generate(ids, COUNT, policy=Scripted(0.02, drafts=drafts))
        assert found == greedy(path, ids)
        assert 0 < stats.undrafted_passes < stats.target_passes
        accepted += stats.accepted_tokens
    assert accepted > 0


@pytest.mark.parametrize("name", CASES)
def test_a_draft_proposes_what_its_model_says(saved: Saved, name: str) -> None:
    """Node by node: a node's position is its depth's."""
    path = saved.target(name)
    plain = plain_pair(path)
    model = DraftModel(path, dtype=torch.float32, vocab=BYTE_VOCAB, rows=128, slots=64, children=4)
    draft = OneDraft(Draft(model, FixedExpansion((2, 2, 2, 1), batch=3), batch=3, max_positions=128))
    for length in (1, 30):
        prompt = random_ids(length, seed=length)
        draft.begin(prompt)
        tree = draft.grow((), FixedTree(), CostModel().costs()).tree
        assert len(tree) == 2 + 4 + 8 + 8
        for node in range(len(tree)):
            said = plain.logprobs(prompt, tokens_to(tree, int(tree.parents[node])))
            assert tree.logprobs[node] == pytest.approx(said[tree.tokens[node]], abs=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_trees_of_any_shape_are_judged_as_the_plain_model_does(saved: Saved, name: str) -> None:
    path = saved.unruled(name)
    plain, (target, _) = plain_pair(path), target_of(path)
    for length in (3, 40):
        prompt, output = random_ids(length, seed=length), tuple[int, ...]()
        target.begin(prompt, ())
        for seed in range(3):
            tree = half_right(plain, prompt, output, seed)
            paths = [tokens_to(tree, node) for node in range(-1, len(tree))]
            choices = [int(plain.logprobs(prompt, (*output, *path)).argmax()) for path in paths]
            expected, verdict = walk(tree, choices, frozenset()), target.verify(tree)
            assert (verdict.path, verdict.bonus) == (expected.path, expected.bonus)
            output = (*output, *expected.emitted(tree))


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_node_stands_at_its_depth_wherever_it_is_among_the_rows(saved: Saved, name: str) -> None:
    """Four rows to a depth; where their positions are taken for others, other probabilities come out."""
    path = saved.unruled(name)
    prompt, plain, target = random_ids(20, seed=3), PlainPair(path), target_of(path)[0]
    tree, parent = TokenTree.empty(), -1
    for token in random_ids(8, seed=4):
        tree = tree.extended([parent] * 4, [token, token - 1, token - 2, (token + 1) % BYTE_VOCAB], [-0.5] * 4)
        parent = len(tree) - 4
    target.begin(prompt, ())
    with torch.inference_mode():
        parts = target.target._parts([Check(1, tree)])
        found = target.target._logits(target.target._forward(parts)).log_softmax(-1).numpy()
    paths = [tokens_to(tree, node) for node in range(-1, len(tree))]
    theirs = np.array([plain.logprobs(prompt, path) for path in paths])
    exact = np.array([plain.in_float64(prompt, path) for path in paths])
    assert np.abs(found - exact).max() <= max(2e-4, np.abs(theirs - exact).max())  # mT5's own float32 is as far away


@pytest.mark.parametrize("name", ONE_EACH)
def test_rows_of_an_output_serve_no_other_prompt(saved: Saved, name: str) -> None:
    path = saved.unruled(name)
    plain, one = plain_pair(path), target_of(path)[0]
    first, other = random_ids(12, seed=5), random_ids(9, seed=6)
    one.begin(first)
    output = tuple(one.verify(TokenTree.empty()).bonus for _ in range(4))
    one.target.end(1)
    found = one.target.logits_after(Request(other, 10, ()), output, (5, 9))
    said = plain.logprobs(other, output)
    assert found[0] - found[1] == pytest.approx(float(said[5] - said[9]), abs=1e-3)


def random_ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(2, BYTE_VOCAB, length).tolist())


def half_right(plain: PlainPair, prompt: tuple[int, ...], output: tuple[int, ...], seed: int) -> TokenTree:
    """A tree of 10 nodes at most: a right chain to grow from, with branches anywhere."""
    rng, tree = np.random.default_rng(seed), TokenTree.empty()
    for size in range(10):
        parent = size - 1 if size < 4 else int(rng.integers(-1, len(tree)))
        right = int(plain.logprobs(prompt, (*output, *tokens_to(tree, parent))).argmax())
        token = right if size < 4 or rng.random() < 0.5 else int(rng.integers(1, BYTE_VOCAB))
        if tree.child(parent, token) is None:
            tree = tree.extended([parent], [token], [-0.5])
    return tree


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_the_encoder_is_read_once_a_prompt(saved: Saved, name: str) -> None:
    target, shards = target_of(saved.target(name))
    encoder, decoder = ([f"{half}.{i}" for i in range(n)] for half, n in (("encoder", 5), ("layer", 4)))
    a_pass = [*decoder, "head.0"]
    for prompt, is_new in (((5, 6, 7), True), ((5, 6), True), ((5, 6), False)):
        shards.asked.clear()
        target.begin(prompt, ())
        for _ in range(2):
            target.verify(TokenTree.empty())
        assert shards.asked == [*(encoder if is_new else ()), *a_pass, *a_pass]


def test_a_pass_that_breaks_in_the_encoder_is_run_again_from_its_beginning(saved: Saved) -> None:
    path, prompt = saved.target("t5"), (5, 6, 7, 8)
    target, shards = target_of(path)
    target.begin(prompt, ())
    for broken in ("encoder.1", "layer.2"):
        shards.broken = {broken}
        with pytest.raises(KeyError):
            target.verify(TokenTree.empty())
    shards.broken = set()
    found = [target.verify(TokenTree.empty()).bonus for _ in range(5)]
    assert tuple(found) == plain_pair(path).greedy(prompt, 5)


@pytest.mark.parametrize("name", ONE_EACH)
def test_what_is_kept_of_a_prompt_takes_what_the_plan_says(saved: Saved, name: str) -> None:
    path = saved.target(name)
    target, _ = target_of(path)
    target.begin(random_ids(17, seed=1), ())
    target.verify(TokenTree.empty())
    stack = target.target._stack
    assert isinstance(stack, EncoderDecoder) and stack._encoded is not None
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in stack._cross.layers) + stack._encoded.nbytes
    assert kept == encoded_bytes(Checkpoint.open(path).config, 17, 4)


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_the_transformers_model(name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(case.model_type, **case.fields))
    config = {"model_type": case.model_type, **case.fields}
    family = family_of(config)
    assert family.encoder is not None
    parameters = {key: tuple(p.shape) for key, p in model.named_parameters(remove_duplicate=False)}
    assert parameters[family.embedding] == parameters[family.head] == family.embedding_shape(config)
    assert {*family.resident, *family.embedding_copies} <= parameters.keys()
    assert family.is_tied(config) == model.config.tie_word_embeddings
    for prefix, count in ((family.layers, 4), (family.encoder.layers, 5)):
        numbers = {int(key[len(prefix) + 1 :].split(".")[0]) for key in parameters if key.startswith(f"{prefix}.")}
        assert numbers == set(range(count))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_files_may_name_the_embedding_otherwise_and_hold_what_no_model_has(
    saved: Saved, name: str, tmp_path: Path
) -> None:
    """As published files do."""
    path, family = saved.target(name), family_of({"model_type": CASES[name].model_type})
    tensors = {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
    embedding = tensors.pop(family.embedding)
    tensors |= {key: embedding.clone() for key in family.embedding_copies}
    tensors |= {key: torch.ones(3) for key in family.unused}
    for file in path.glob("*.json"):
        if "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    ids = encode(path, TEXTS[1])
    assert local(tmp_path, None, max_context=128).generate(ids, COUNT)[0] == greedy(path, ids)


@pytest.mark.parametrize("name", ["t5, version 1.1", "pegasus"])
def test_weights_stored_in_bfloat16_are_computed_with_in_float32(name: str, tmp_path: Path) -> None:
    """T5 brings the rows of its last product to the type of that weight."""
    path = CASES[name].save(tmp_path, dtype=torch.bfloat16)
    ids = encode(path, TEXTS[2])
    assert local(path, path, max_nodes=8, max_context=128).generate(ids, COUNT)[0] == greedy(path, ids)


def test_the_output_may_fill_the_context(tmp_path: Path) -> None:
    """The prompt takes nothing of it; the decoder's first token does."""
    path = Case("bart", BART | {"max_position_embeddings": 48}).save(tmp_path)
    job = prepare(EngineConfig(target=str(path), draft=str(path), memory="8GB"))
    assert (job.context, job.room(48), job.room(49)) == (48, 47, -1)
    ids = random_ids(48, seed=1)
    engine = local(path, path, max_nodes=8, fallback="fixed-depth", depth=8)
    assert engine.generate(ids, 47, provisional=False)[0] == plain_pair(path).greedy(ids, 47)


def test_a_prompt_may_be_longer_than_the_draft_takes(saved: Saved, tmp_path: Path) -> None:
    draft = Case("bart", BART | {"max_position_embeddings": 16}).save(tmp_path)
    path, ids = saved.target("t5"), random_ids(40, seed=2)
    assert local(path, draft, max_nodes=6, max_context=128).generate(ids, COUNT)[0] == greedy(path, ids)


@pytest.mark.parametrize("name", ["t5", "pegasus"])
def test_an_encoder_is_pinned_after_all_that_every_pass_reads(saved: Saved, name: str) -> None:
    tight = job(saved.target(name), None)
    shards = {spec.name: spec.nbytes for spec in tight.layout.shards}
    encoder = {spec.name for spec in tight.layout.encoder}
    assert tight.memory.bytes_per_pass == sum(shards[n] for n in set(tight.memory.streamed) - encoder)
    assert tight.memory.bytes_per_prompt == sum(shards[n] for n in encoder)
    some = job(saved.target(name), None, extra_bytes=sum(shards.values()) - sum(shards[n] for n in encoder) + 1000)
    assert some.memory.bytes_per_pass == 0 < some.memory.bytes_per_prompt
    plenty = job(saved.target(name), None, extra_bytes=2 * sum(shards.values()))
    assert plenty.memory.streamed == ()


def test_a_draft_must_be_of_the_targets_kind(saved: Saved, tmp_path: Path) -> None:
    llama, t5 = str(tiny_llama(tmp_path / "llama")), str(saved.target("t5"))
    with pytest.raises(
        ConfigError, match=r"\(llama\) is a decoder-only model, and the target \(t5\) is an encoder-dec"
    ):
        prepare(EngineConfig(target=t5, draft=llama, memory="8GB"))
    with pytest.raises(ConfigError, match=r"\(t5\) is an encoder-decoder model, and the target \(llama\) is a decoder"):
        prepare(EngineConfig(target=llama, draft=t5, memory="8GB"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"share_encoder_decoder_embeddings": False}, "encoder and decoder have embeddings of their own"),
        ({"is_encoder_decoder": False}, "a decoder without its encoder"),
    ],
)
def test_what_cannot_be_run_right_is_refused(saved: Saved, change: dict[str, object], what: str) -> None:
    config = json.loads((saved.target("marian") / "config.json").read_text())
    with pytest.raises(CheckpointError, match=what):
        family_of(config | change)


def test_a_relative_bias_that_is_missing_is_named(saved: Saved, tmp_path: Path) -> None:
    path = saved.target("t5")
    tensors = {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
    del tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"missing tensor encoder\.block\.0\.layer\.0\.SelfAttention\.relative"):
        layout_of(Checkpoint.open(tmp_path))


def test_the_first_token_is_the_generation_configs() -> None:
    """In transformers' order: there is nothing to begin with unless a file says so."""
    assert start_token({"decoder_start_token_id": 3, "bos_token_id": 4}, T5) == 3
    assert start_token({"bos_token_id": 4}, T5) == 4
    assert start_token({}, {"decoder_start_token_id": 0}) == 0
    with pytest.raises(CheckpointError, match="names the token that the decoder starts with"):
        start_token({}, {"pad_token_id": 0})


@pytest.mark.parametrize(("name", "extra"), [("t5, version 1.1", 0), ("bart", 300_000)])
def test_a_whole_engine_says_the_same(saved: Saved, streaming: Streaming, name: str, extra: int) -> None:
    """Two starts: relative biases and a head of its own, all streamed; learned positions and a forced last token."""
    path = saved.target(name)
    prepared = job(
        path, saved.noisy(name), extra_bytes=extra, max_nodes=8, fallback="adaptive", dtype="float32", max_context=128
    )
    assert len(prepared.memory.streamed) >= len(prepared.layout.shards) / 2
    assert bool(prepared.memory.pinned) == bool(extra)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with Engine.start(prepared) as engine:
        for text in (*TEXTS[:2], TEXTS[1], TEXTS[0]):
            result = engine.generate(text, max_new_tokens=COUNT)
            assert result.token_ids == greedy(path, encode(path, text))
            assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert engine.stats.spilled_bytes == 0

"""What the draft proposes is what its model says after the node's own path, whatever was grown and committed before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import AdaptiveConfidence, FixedDepth, FixedTree, Policy
from llmcad_actors.core.fixed_expansion import FixedExpansion
from llmcad_actors.core.growth import TreeBuilder
from llmcad_actors.core.pacer import BranchPacer
from llmcad_actors.core.round import Verdict
from llmcad_actors.core.tree import ROOT, TokenTree
from llmcad_actors.kernels import linear
from llmcad_actors.models.draft import Draft, DraftModel
from tests.fakes import OneDraft, OneGrown, run_prefix, tokens_to
from tests.plain import Plain
from tests.tiny import BYTE_VOCAB, tiny_llama

PROMPT = (5, 70, 12, 200, 33, 33, 9)
COSTS = CostModel().costs()
WHOLE_TREE = FixedTree()  # grows until nothing more gets into the tree
CHILDREN = 6
SLOTS = 120
BUILDERS: dict[str, tuple[Any, Policy]] = {
    "best-first": (lambda: BestFirst(24, batch=4, children=CHILDREN), AdaptiveConfidence(0.02)),
    "pacer": (lambda: BranchPacer(20, batch=4), AdaptiveConfidence(0.001)),
    "chain": (lambda: FixedExpansion((1,) * 5, batch=4), FixedDepth(5)),
    "fixed": (lambda: FixedExpansion((3, 2, 1), batch=4), WHOLE_TREE),
}


class Session:
    """A draft whose every step is compared with the plain model."""

    def __init__(self, plain: Plain, kind: str = "best-first", **settings: Any) -> None:
        build, self.policy = BUILDERS[kind]
        self.plain = plain
        self.model = draft_model(plain.path, **settings)
        self.draft = OneDraft(Draft(self.model, build(), batch=4, max_positions=settings.get("context", 256)))
        self.tokens: tuple[int, ...] = ()
        self.tree = TokenTree.empty()

    @property
    def builder(self) -> TreeBuilder:
        return self.draft.builder

    def begin(self, prompt: Sequence[int]) -> None:
        self.tokens, self.tree = tuple(prompt), TokenTree.empty()
        self.draft.begin(prompt)

    def grow(self, *verdicts: Verdict) -> OneGrown:
        for verdict in verdicts:
            self.tokens += (*self.tree.tokens[list(verdict.path)].tolist(), verdict.bonus)
            self.tree = TokenTree.empty()
        grown = self.draft.grow(verdicts, self.policy, COSTS)
        self.tree = grown.tree
        for node in range(len(self.tree)):
            path = (*self.tokens, *tokens_to(self.tree, int(self.tree.parents[node])))
            expected = self.plain.logprobs(path)[int(self.tree.tokens[node])]
            assert self.tree.logprobs[node] == pytest.approx(expected, abs=2e-4)
        return grown

    def assert_every_candidate_is_the_plain_models(self) -> None:
        """Also of the nodes grown beyond the submission."""
        nodes = np.arange(len(self.builder))
        tokens, parents, _ = self.builder.rows(nodes)
        paths: dict[int, tuple[int, ...]] = {ROOT: ()}
        for node, token, parent in zip(nodes.tolist(), tokens.tolist(), parents.tolist(), strict=True):
            paths[node] = (*paths[parent], token)
        for parent in {ROOT, *parents.tolist()}:
            if self.builder.is_expanded(parent):
                scored = set(tokens[parents == parent].tolist())
                expected = self.plain.logprobs((*self.tokens, *paths[parent]))
                assert scored == best(expected, scored)


def best(logprobs: np.ndarray, scored: set[int]) -> set[int]:
    """The tokens that `logprobs` puts first, as many as were scored; near ties count as scored."""
    bar = np.sort(logprobs)[-len(scored)]
    return {i for i in np.flatnonzero(logprobs > bar + 2e-4).tolist()} | {i for i in scored if logprobs[i] > bar - 2e-4}


def draft_model(
    path: Path,
    *,
    vocab: int = BYTE_VOCAB,
    context: int = 256,
    slots: int = SLOTS,
    dtype: torch.dtype = torch.float32,
) -> DraftModel:
    return DraftModel(path, dtype=dtype, vocab=vocab, rows=context + 64, slots=slots, children=CHILDREN)


def verdict(path: Sequence[int], bonus: int) -> Verdict:
    return Verdict(tuple(path), bonus, False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tiny_llama(tmp_path_factory.mktemp("draft"), seed=7, layers=2, spread=0.5))


@pytest.mark.parametrize("kind", BUILDERS)
def test_candidates_of_a_node_are_those_of_a_plain_forward_of_its_path(plain: Plain, kind: str) -> None:
    session = Session(plain, kind)
    session.begin(PROMPT)
    grown = session.grow()
    assert len(grown.tree) > 3
    assert grown.drafted >= grown.steps > 1
    session.assert_every_candidate_is_the_plain_models()
    assert session.draft.extend(3).steps > 0
    session.assert_every_candidate_is_the_plain_models()


@settings(max_examples=20)
@given(kind=st.sampled_from(list(BUILDERS)), data=st.data())
def test_that_holds_through_any_verdicts_with_and_without_provisional_growth(
    plain: Plain, kind: str, data: st.DataObject
) -> None:
    session = Session(plain, kind)
    session.begin(PROMPT)
    session.grow()
    for _ in range(4):
        session.draft.extend(data.draw(st.integers(0, 4), "steps ahead"))
        said = data.draw(verdicts(session), "verdict")
        end = said.path[-1] if said.path else ROOT
        had_run = was_run(session, end, said.bonus)
        assert session.grow(said).head_start == had_run
        session.assert_every_candidate_is_the_plain_models()


@st.composite
def verdicts(draw: st.DrawFn, session: Session) -> Verdict:
    """Any verdict that a target could give: the bonus is no child of the path's end."""
    tree = session.tree
    end = draw(st.integers(ROOT, len(tree) - 1))
    children = {int(tree.tokens[child]) for child in tree.children(end)}
    likely = np.argsort(-session.plain.logprobs((*session.tokens, *tokens_to(tree, end)))).tolist()
    bonus = draw(st.sampled_from([t for t in likely[:8] if t not in children] or [likely[-1]]))
    return verdict(tree.path(end), bonus)


def was_run(session: Session, end: int, bonus: int) -> bool:
    """Whether the bonus is a node of the builder that has gone through the draft."""
    node = ROOT
    for token in (*tokens_to(session.tree, end), bonus):
        found = session.builder.find(node, token)
        if found is None:
            return False
        node = found
    return bool(session.builder.is_expanded(node))


def test_what_was_grown_beyond_the_tree_is_not_run_again(plain: Plain) -> None:
    session = Session(plain, "chain")
    session.begin(PROMPT)
    tree = session.grow().tree
    session.draft.extend(4)  # below the chain's end, whose child the bonus will be
    leaf = len(tree) - 1
    bonus = plain.next((*PROMPT, *tokens_to(tree, leaf)))
    with counted(session.model) as runs:
        again = session.grow(verdict(tree.path(leaf), bonus))
    assert again.head_start
    assert again.drafted == sum(runs) < 5
    session.assert_every_candidate_is_the_plain_models()


@contextmanager
def counted(model: DraftModel) -> Iterator[list[int]]:
    """Rows of every forward pass inside the block."""
    runs: list[int] = []
    hook = model._base.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield runs
    finally:
        hook.remove()


def test_an_accepted_path_is_not_run_again(plain: Plain) -> None:
    session = Session(plain)
    session.begin(PROMPT)
    tree = session.grow().tree
    path = max((tree.path(node) for node in range(len(tree))), key=len)[:-1]
    assert path
    with counted(session.model) as runs:
        session.grow(verdict(path, 256))
    assert runs[0] == 1  # the new root alone


def test_a_prompt_that_shares_a_prefix_runs_only_the_rest(plain: Plain) -> None:
    session = Session(plain)
    session.begin(PROMPT)
    session.grow()
    session.begin((*PROMPT[:5], 8, 9, 10))
    with counted(session.model) as runs:
        session.grow()
    assert runs[0] == 3
    session.assert_every_candidate_is_the_plain_models()


@settings(max_examples=20)
@given(kind=st.sampled_from(list(BUILDERS)), data=st.data())
def test_a_draft_that_was_left_out_of_passes_goes_on_as_a_fresh_one(
    plain: Plain, kind: str, data: st.DataObject
) -> None:
    """Tokens of many passes come with one call, also before the first tree; what it says is the plain model's."""
    session = Session(plain, kind)
    session.begin(PROMPT)
    for turn in range(3):
        missed = [verdict((), token) for token in data.draw(st.lists(st.integers(1, 256), max_size=20), "missed")]
        own = [data.draw(verdicts(session), "verdict")] if turn else []
        grown = session.grow(*own, *missed)
        session.assert_every_candidate_is_the_plain_models()
        fresh = Session(plain, kind)
        fresh.begin(session.tokens)
        expected = fresh.grow()
        if not grown.head_start:
            assert grown.tree.tokens.tolist() == expected.tree.tokens.tolist()
            assert grown.tree.logprobs == pytest.approx(expected.tree.logprobs, abs=2e-4)
        session.draft.extend(data.draw(st.integers(0, 3), "steps ahead"))


def test_missed_tokens_are_run_in_one_batch_and_only_once(plain: Plain) -> None:
    session = Session(plain)
    session.begin(PROMPT)
    session.grow()
    with counted(session.model) as runs:
        caught_up = session.grow(*[verdict((), token) for token in range(1, 41)])
    assert runs[0] == 40 and max(runs[1:]) <= 4
    assert 0 < caught_up.catch_up_s < caught_up.seconds
    with counted(session.model) as runs:
        assert session.grow(verdict((), 7)).catch_up_s == 0
    assert runs[0] <= 4


def test_tokens_that_it_had_guessed_are_a_head_start_over_skipped_passes_too(plain: Plain) -> None:
    session = Session(plain, "chain")
    session.begin(PROMPT)
    session.grow()
    bonuses = plain.continuation(PROMPT, 3)
    with counted(session.model) as runs:
        assert session.grow(*[verdict((), token) for token in bonuses]).head_start
    assert sum(runs) <= 4  # as deep as before from there on
    session.assert_every_candidate_is_the_plain_models()


def test_ids_beyond_the_targets_vocabulary_are_never_proposed(plain: Plain, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path, seed=8, vocab=300)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][BYTE_VOCAB:] = weights["lm_head.weight"][:43] * 50  # very sure of its padding
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    draft = OneDraft(Draft(draft_model(path), BestFirst(40, children=CHILDREN), batch=4, max_positions=256))
    draft.begin(PROMPT)
    tree = draft.grow((), WHOLE_TREE, COSTS).tree
    assert len(tree) > 5
    assert tree.tokens.max() < BYTE_VOCAB
    assert Plain(path).next(PROMPT) >= BYTE_VOCAB


def test_a_draft_of_fewer_ids_than_the_target_proposes_its_own(plain: Plain) -> None:
    session = Session(plain, vocab=BYTE_VOCAB + 100)
    session.begin(PROMPT)
    assert session.grow().tree.tokens.max() < BYTE_VOCAB


def test_a_draft_is_silent_beyond_its_own_context(plain: Plain) -> None:
    session = Session(plain, "chain", context=len(PROMPT) + 4)
    session.begin(PROMPT)
    depths: list[int] = []
    for _ in range(6):
        depths.append(len(session.grow(*[verdict((), 256)][: len(depths)]).tree))
        session.draft.extend(2)
    # A token is run at the position it takes; what follows the last one that fits is still proposed.
    assert depths == [5, 4, 3, 2, 1, 0]
    session.begin(PROMPT[:3])
    assert len(session.grow().tree) == 5


def test_a_prompt_longer_than_the_drafts_context_is_no_error(plain: Plain) -> None:
    session = Session(plain, context=5)
    session.begin(PROMPT)
    assert len(session.grow().tree) == 0
    assert len(session.grow(verdict((), 9)).tree) == 0


def test_growth_ends_where_the_cache_is_full(plain: Plain) -> None:
    session = Session(plain, slots=10)
    session.begin(PROMPT)
    tree = session.grow().tree
    assert session.draft.extend(50).can_go_on is False
    assert session.model.num_used <= 10
    session.grow(verdict(tree.path(0), plain.next((*PROMPT, int(tree.tokens[0]), 3))))
    session.assert_every_candidate_is_the_plain_models()


@pytest.mark.parametrize("pays", [True, False], ids=["widened", "as torch has it"])
def test_a_bfloat16_draft_says_the_same_however_it_multiplies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pays: bool
) -> None:
    calls = []

    def counting(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(rows.shape)
        return widened(rows, weight, bias)

    widened = linear.widened
    monkeypatch.setattr(linear, "widened", counting)
    monkeypatch.setattr(linear, "widening_pays", lambda dtype: pays and dtype == torch.bfloat16)
    path = tiny_llama(tmp_path / "draft", seed=3, dtype=torch.bfloat16)
    tokens, logprobs = run_prefix(draft_model(path, dtype=torch.bfloat16), PROMPT)
    expected = Plain.of(path).logprobs(PROMPT)
    assert logprobs[0] == pytest.approx(np.array([expected[token] for token in tokens[0]]), abs=0.1)
    assert bool(calls) is pays

"""Is sampling exact? Counts of the first three tokens, drawn with many seeds, against the target's exact distribution.

    python -m tests.sampling [--draws 200000]

Every draw is a request through the real target's passes, with trees from no draft, from chance, and from a real draft
that has the same noise. What is counted is compared by a chi-square test: the first token, and all three together.
"""

import itertools
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from llmcad_actors.core.best_first import BestFirst
from llmcad_actors.core.choosing import Choosing
from llmcad_actors.core.costs import CostModel
from llmcad_actors.core.fallback import FixedTree
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Verdict
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.messages import DraftOrder
from llmcad_actors.models.draft import Draft, DraftModel
from llmcad_actors.models.processors import make_processors
from llmcad_actors.models.target import Target
from tests.fakes import random_trees
from tests.models.checkpoints import target_of
from tests.plain import Plain
from tests.tiny import tiny_llama

VOCAB, LENGTH, TOGETHER, NODES = 6, 3, 100, 6
PROMPT = (3, 1, 4, 1, 5)
CASES = {
    "temperature 0.3": Choosing(temperature=0.3),
    "temperature 0.7": Choosing(temperature=0.7),
    "temperature 1.0": Choosing(temperature=1.0),
    "top-p 0.9": Choosing(temperature=1.0, top_p=0.9),
    "penalties": Choosing(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    "top-k 3, min-p 0.05, a bias": Choosing(temperature=0.9, top_k=3, min_p=0.05, logit_bias=((2, 1.5),)),
}
LEAST_EXPECTED = 5.0
Trees = Callable[[Mapping[int, Request], Mapping[int, tuple[Verdict, ...]]], Mapping[int, TokenTree]]
"""A tree for each request, by those that are new and what was said of the last trees."""


def models(folder: Path) -> tuple[Path, Path]:
    """A target with a distribution that is neither flat nor peaked, and a draft that is something like it."""
    target = tiny_llama(folder / "target", seed=21, vocab=VOCAB, layers=1, spread=0.6)
    return target, tiny_llama(folder / "draft", seed=22, vocab=VOCAB, layers=1, spread=0.6)


def no_trees(joined: Mapping[int, Request], verdicts: Mapping[int, tuple[Verdict, ...]]) -> Mapping[int, TokenTree]:
    return {}


def trees_by_chance(
    joined: Mapping[int, Request], verdicts: Mapping[int, tuple[Verdict, ...]]
) -> Mapping[int, TokenTree]:
    return {number: random_trees(number, VOCAB, NODES)((number,)) for number in verdicts}


class DraftTrees:
    """A real draft's."""

    def __init__(self, path: Path) -> None:
        rows = 2 * TOGETHER * 32
        model = DraftModel(path, dtype=torch.float32, vocab=VOCAB, rows=rows, slots=2048, children=VOCAB)
        self._draft = Draft(model, BestFirst(NODES), batch=8, max_positions=64, max_nodes=NODES * TOGETHER)
        self._known: tuple[int, ...] = ()

    def __call__(
        self, joined: Mapping[int, Request], verdicts: Mapping[int, tuple[Verdict, ...]]
    ) -> Mapping[int, TokenTree]:
        ended = tuple(number for number in self._known if number not in verdicts)
        order = DraftOrder(joined, ended, verdicts, FixedTree(), CostModel().costs())
        self._known = tuple(verdicts)
        return {number: grown.tree for number, grown in self._draft.grow(order).trees.items()}


def texts(
    target: Target, trees: Trees, choosing: Choosing, seeds: Iterator[int], count: int
) -> Counter[tuple[int, ...]]:
    """What `count` requests say, `TOGETHER` of them at once."""
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(0, count, TOGETHER):
        requests = {
            seed: Request(PROMPT, LENGTH, (), choosing=_seeded(choosing, seed))
            for seed in itertools.islice(seeds, TOGETHER)
        }
        for number, request in requests.items():
            target.begin(number, request)
        said: dict[int, tuple[int, ...]] = dict.fromkeys(requests, ())
        joined, verdicts = requests, dict[int, tuple[Verdict, ...]](dict.fromkeys(requests, ()))
        while verdicts:
            grown = trees(joined, verdicts)
            checks = [Check(number, grown.get(number, TokenTree.empty())) for number in verdicts]
            report = target.verify(checks)
            for check in checks:
                verdict = report.verdicts[check.number]
                said[check.number] += (*check.tree.tokens[list(verdict.path)].tolist(), verdict.bonus)
            joined, verdicts = {}, {n: (report.verdicts[n],) for n in verdicts if len(said[n]) < LENGTH}
        for number in requests:
            target.end(number)
        found.update(ids[:LENGTH] for ids in said.values())
    return found


def _seeded(choosing: Choosing, seed: int) -> Choosing:
    values = {name: getattr(choosing, name) for name in Choosing.__dataclass_fields__}
    return Choosing(**{**values, "seed": seed})


def exact(plain: Plain, choosing: Choosing) -> dict[tuple[int, ...], float]:
    """The probability of every text of three tokens, in float64 from the plain model's logits."""
    processors = make_processors(
        {}, choosing, prompt_length=len(PROMPT), max_length=len(PROMPT) + LENGTH, stop_tokens=()
    )

    def following(text: tuple[int, ...]) -> np.ndarray:
        tokens = (*PROMPT, *text)
        with torch.inference_mode():  # not log-probabilities: a repetition penalty looks at the sign
            scores = plain.model(torch.tensor([tokens])).logits[:, -1].clone()
        chances: np.ndarray = processors(torch.tensor([tokens]), scores)[0].double().softmax(-1).numpy()
        return chances

    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        found = {
            (*text, token): chance * float(p)
            for text, chance in found.items()
            if chance
            for token, p in enumerate(following(text))
        }
    return found


def p_values(found: Counter[tuple[int, ...]], chances: Mapping[tuple[int, ...], float]) -> tuple[float, float]:
    """Of the first token, and of all three. Raises AssertionError for a text that cannot be."""
    assert all(chances[text] > 0 for text in found), "a text that the distribution excludes"
    return tuple(_p_value(found, chances, length) for length in (1, LENGTH))  # type: ignore[return-value]


def _p_value(found: Counter[tuple[int, ...]], chances: Mapping[tuple[int, ...], float], length: int) -> float:
    counts, expected = Counter[tuple[int, ...]](), defaultdict[tuple[int, ...], float](float)
    for text, count in found.items():
        counts[text[:length]] += count
    for text, chance in chances.items():
        expected[text[:length]] += chance * found.total()
    cells = sorted((value, counts[text]) for text, value in expected.items() if value)
    while len(cells) > 1 and cells[0][0] < LEAST_EXPECTED:  # cells too rare for the test are joined
        (a, x), (b, y), *rest = cells
        cells = sorted([(a + b, x + y), *rest])
    if len(cells) == 1:
        return 1.0
    statistic = sum((count - value) ** 2 / value for value, count in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def main(draws: Annotated[int, typer.Option(min=TOGETHER, help="Texts of each case.")] = 200_000) -> None:
    screen = Console()
    with tempfile.TemporaryDirectory() as folder:
        target_path, draft_path = models(Path(folder))
        plain = Plain(target_path)
        kinds: dict[str, Trees] = {
            "no trees": no_trees,
            "trees by chance": trees_by_chance,
            "a draft's trees": DraftTrees(draft_path),
            "the target's own": DraftTrees(target_path),
        }
        target = target_of(target_path, capacity=TOGETHER * 16, max_nodes=TOGETHER * NODES * 2)[0].target
        seeds = itertools.count(1)
        for name, choosing in CASES.items():
            chances = exact(plain, choosing)
            for kind, trees in kinds.items():
                first, joint = p_values(texts(target, trees, choosing, seeds, draws), chances)
                verdict = "exact" if min(first, joint) > 0.001 else "NOT EXACT"
                screen.print(f"{name}, {kind}: p = {first:.3f} (first token), {joint:.3f} (three tokens): {verdict}")


if __name__ == "__main__":
    typer.run(main)

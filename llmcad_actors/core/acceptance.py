"""The acceptance rule (paper, section 2): walk down the tree while a child is the target's own choice.

Every emitted token is a choice of the target, so the output is the target's own whatever the tree was. The
choices may be greedy or sampled: the rule does not know.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from llmcad_actors.core.tree import ROOT, TokenTree


class Choices(Protocol):
    """Anything that holds a token for each row: a list, an array, or what makes them when asked."""

    def __getitem__(self, row: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Accepted:
    path: tuple[int, ...]  # accepted nodes, root to leaf
    bonus: int  # the target's own choice after the path, always emitted; a stop token, if there is one
    stopped: bool  # the bonus is a stop token

    def emitted(self, tree: TokenTree) -> tuple[int, ...]:
        """The tokens that the pass yields: at least one."""
        return (*tree.tokens[list(self.path)].tolist(), self.bonus)


def walk(tree: TokenTree, choices: Choices, stop_tokens: frozenset[int]) -> Accepted:
    """`choices` [n+1]: the target's next token after the root (0) and after node i (i+1).

    A stop token ends the walk even where the tree goes on: it is the bonus, and the path ends before it.
    """
    node, path = ROOT, list[int]()
    while True:
        choice = int(choices[node + 1])
        child = None if choice in stop_tokens else tree.child(node, choice)
        if child is None:
            return Accepted(tuple(path), choice, choice in stop_tokens)
        path.append(child)
        node = child

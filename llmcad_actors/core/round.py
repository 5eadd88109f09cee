"""What a round brings: a grown tree for each request, and the verdicts on them. Requests go by their numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmcad_actors.core.choosing import TokenLogprobs
from llmcad_actors.core.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Submission:
    """A request's grown tree."""

    tree: TokenTree
    head_start: bool = False  # provisional growth had already run the new root (a hit)


@dataclass(frozen=True, slots=True)
class Drafting:
    """The grown trees of a round, and what growing them together took."""

    trees: Mapping[int, Submission] = field(default_factory=dict)
    confidence: float = 1.0  # the paper's T_c when the draft handed over
    steps: int = 0
    drafted: int = 0  # nodes run through the draft
    seconds: float = 0.0
    catch_up_s: float = 0.0  # of `seconds`, what reading text took that the draft had not seen; 0: little

    @property
    def num_nodes(self) -> int:
        return sum(len(grown.tree) for grown in self.trees.values())


@dataclass(frozen=True, slots=True)
class Grown:
    """What a slice of provisional growth did."""

    steps: int
    drafted: int
    can_go_on: bool  # there is more to run
    late_s: float = 0.0  # the verdicts waited so long for the last step to end

    def plus(self, later: "Grown") -> "Grown":
        return Grown(self.steps + later.steps, self.drafted + later.drafted, later.can_go_on)


@dataclass(frozen=True, slots=True)
class Check:
    """What a pass does for a request."""

    number: int
    tree: TokenTree
    most_prompt: int | None = None  # tokens of its prompt to run; where more are missing, there is no verdict yet


@dataclass(frozen=True, slots=True)
class PassStats:
    """One target pass."""

    seconds: float
    stall_s: float  # waiting for shards
    compute_s: float
    rows: int  # of prompts, roots and trees


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pass found for a request."""

    path: tuple[int, ...]  # accepted nodes, root to leaf
    bonus: int  # the target's own next token
    stopped: bool  # the last emitted token is a stop token
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each emitted token, if they were asked for


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass over all running requests."""

    stats: PassStats
    verdicts: Mapping[int, Verdict]  # of each request whose prompt has been run to its end
    refused: Mapping[int, str] = field(default_factory=dict)  # requests that cannot go on: why

"""What a round brings: a grown tree, and the verdict on it."""

from dataclasses import dataclass

from llmcad_actors.core.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Submission:
    """A grown tree, and what growing it took."""

    tree: TokenTree
    confidence: float  # the paper's T_c when the draft handed over
    steps: int
    drafted: int  # nodes run through the draft
    seconds: float
    head_start: bool  # provisional growth had already run the new root (a hit)
    catch_up_s: float = 0.0  # of `seconds`, the first step's, which read text that the draft had not seen; 0: little


@dataclass(frozen=True, slots=True)
class Grown:
    """What a slice of provisional growth did."""

    steps: int
    drafted: int
    can_go_on: bool  # there is more to run
    late_s: float = 0.0  # the verdict waited so long for the last step to end

    def plus(self, later: "Grown") -> "Grown":
        return Grown(self.steps + later.steps, self.drafted + later.drafted, later.can_go_on)


@dataclass(frozen=True, slots=True)
class PassStats:
    """One target pass."""

    seconds: float
    stall_s: float  # waiting for shards
    compute_s: float
    rows: int  # of prompt, root and tree


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pass found."""

    path: tuple[int, ...]  # accepted nodes, root to leaf
    bonus: int  # the target's own next token
    stopped: bool  # the last emitted token is a stop token
    stats: PassStats

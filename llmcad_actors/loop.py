"""The decode loop: grow, verify, emit. Start here.

    grow     the draft grows a token tree until the policy says that checking it pays; none where no drafting pays
    verify   one pass of the target checks the whole tree; the draft goes on growing meanwhile
    emit     the accepted path and the target's own next token go to the caller

Every emitted token is the target's own choice, so the draft decides only how many come out of a pass.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llmcad_actors.core.costs import CostModel, Costs
from llmcad_actors.core.fallback import Policy, outcome_of
from llmcad_actors.core.provisional import Allowance, Patience, allowance, is_worth_it
from llmcad_actors.core.round import Grown, Submission, Verdict
from llmcad_actors.core.stats import Stats
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.core.worth import Round
from llmcad_actors.messages import DraftEnded, Event, Finished, Provisional, Request, Tokens
from llmcad_actors.ports import Clock, Drafter, Verifier

NO_TREE = Submission(TokenTree.empty(), confidence=1.0, steps=0, drafted=0, seconds=0.0, head_start=False)
NOTHING_AHEAD = Grown(steps=0, drafted=0, can_go_on=False)


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a run leaves to the next one."""

    policy: Policy
    costs: CostModel
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True, slots=True)
class Unseen:
    """What the draft has not been told of."""

    num_tokens: int = 0
    verdicts: tuple[Verdict, ...] = ()

    def plus(self, verdict: Verdict) -> "Unseen":
        return Unseen(self.num_tokens + 1, (*self.verdicts, verdict))


async def decode(
    request: Request,
    drafter: Drafter | None,
    verifier: Verifier,
    learnt: Learnt,
    clock: Clock,
    emit: Callable[[Event], None],
) -> Learnt:
    """Run one request to its end; returns what was learnt on the way, for the next one.

    Without a drafter every pass yields one token: the plain baseline. So it goes on after `DraftEnded`, too.
    """
    started, stats, left = clock.now(), Stats(), request.max_new_tokens
    policy, costs, patience = learnt.policy, learnt.costs, learnt.patience
    held = await verifier.begin(request.prompt, request.stop_tokens, request.max_new_tokens)
    if drafter is not None:
        await drafter.begin(request.prompt)
    now, last_s, ahead, pending = started, math.inf, NOTHING_AHEAD, len(request.prompt) - 1 - held
    unseen = Unseen(pending)
    while True:
        known = costs.costs(pending_rows=pending, drafts_ahead=request.provisional and not patience.is_over)
        drafting = drafter if drafter and policy.should_draft(known, unseen.num_tokens, left) else None
        grown = await drafting.grow(unseen.verdicts, policy, known) if drafting else NO_TREE
        emit(Provisional(most_probable_path(grown.tree)))
        was_ahead = ahead.steps > 0
        may_help = is_worth_it(known, len(grown.tree))
        allowed = allowance(float(known.pass_seconds(len(grown.tree))), known.draft_step_s, last_s)
        verdict, ahead = await verify_while_growing(
            grown.tree, verifier, drafting if may_help else None, allowed, clock
        )

        before, now, last_s = now, clock.now(), verdict.stats.seconds
        ids = new_tokens(grown.tree, verdict)[:left]
        policy = policy.after(outcome_of(grown.tree, verdict.path, grown.confidence))
        if drafting or not known.pending_rows:
            policy = policy.after_round(round_of(grown, drafting is not None, len(ids), now - before, known))
        costs = costs.after(grown, verdict)
        patience = patience.after(last_s, ahead.late_s)
        unseen = (Unseen() if drafting else unseen).plus(verdict)
        stopped = verdict.stopped and len(ids) == len(verdict.path) + 1  # the stop token itself was not cut off
        left, pending = left - len(ids), 0
        stats = stats.after_pass(
            seconds=now - started,
            new_tokens=len(ids),
            draft_steps=grown.steps + ahead.steps,
            drafted_tokens=grown.drafted + ahead.drafted,
            verified_nodes=len(grown.tree),
            accepted_tokens=len(verdict.path),
            is_hit=grown.head_start if was_ahead and drafting else None,
            compute_s=verdict.stats.compute_s,
            stall_s=verdict.stats.stall_s,
            is_drafted=drafting is not None,
        )
        if drafter and policy.should_end_draft(known):
            drafter = None
            emit(DraftEnded())
        emit(Tokens(ids, stats))
        if stopped or left == 0:
            emit(Finished("stop" if stopped else "length", stats))
            return Learnt(policy, costs, patience)


async def verify_while_growing(
    tree: TokenTree, verifier: Verifier, drafter: Drafter | None, allowed: Allowance, clock: Clock
) -> tuple[Verdict, Grown]:
    """One pass; while it runs, the draft grows beyond the submitted tree, slice by slice, as far as `allowed`."""

    async def check() -> tuple[Verdict, float]:
        return await verifier.verify(tree), clock.now()

    ahead, checking = NOTHING_AHEAD, asyncio.ensure_future(check())
    began, slice_s = clock.now(), 0.0
    try:
        while drafter is not None and allowed.has_room(ahead.steps, (since := clock.now()) - began, slice_s):
            ahead = ahead.plus(await drafter.extend())
            slice_s = clock.now() - since
            if not ahead.can_go_on or checking.done():
                break
        verdict, ended = await checking
        return verdict, replace(ahead, late_s=clock.now() - ended)
    finally:
        checking.cancel()


def round_of(grown: Submission, is_drafted: bool, tokens: int, seconds: float, costs: Costs) -> Round:
    """What the policy hears of a round. A pass that ran a prompt counts as what it is thought to take without."""
    if costs.pending_rows:
        seconds = grown.seconds + float(costs.without_prompt().pass_seconds(len(grown.tree)))
    return Round(is_drafted, tokens, seconds, grown.catch_up_s)


def new_tokens(tree: TokenTree, verdict: Verdict) -> tuple[int, ...]:
    """What a pass yields: the accepted path and the target's own next token."""
    return (*tree.tokens[list(verdict.path)].tolist(), verdict.bonus)


def most_probable_path(tree: TokenTree) -> tuple[int, ...]:
    """The tokens that the draft would bet on: from the root down, always the likeliest child."""
    node, tokens = -1, []
    while children := tree.children(node):
        node = max(children, key=lambda child: float(tree.logprobs[child]))
        tokens.append(int(tree.tokens[node]))
    return tuple(tokens)

"""The decode loop: grow, verify, emit. Start here.

    schedule  requests that have come join where they have room; those that have ended give their rows back
    grow      the draft grows a token tree for each until the policy says that checking them pays; none where none pays
    verify    one pass of the target checks all trees; the draft goes on growing meanwhile
    emit      the accepted paths and the target's own next tokens go to the callers

Every emitted token is the target's own choice, so the draft decides only how many come out of a pass.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from llmcad_actors.core.costs import Costs
from llmcad_actors.core.provisional import Allowance, allowance, is_worth_it
from llmcad_actors.core.round import Check, Grown, PassReport
from llmcad_actors.core.rounds import NO_DRAFTING, NOTHING_AHEAD, Change, News, Rounds, Running, Step
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.errors import CheckpointError, DeadlineError, LlmcadError
from llmcad_actors.messages import DraftEnded, DraftOrder, Event, Failed, Finished, Provisional, Tokens
from llmcad_actors.ports import Clock, Drafter, Verifier

Emit = Callable[[int, Event], None]
"""Tells the caller of a request, by its number."""


class Inbox(Protocol):
    async def take(self, *, wait: bool) -> News | None:
        """What has come since the last call, at once or when something comes; None: nothing will come any more."""


async def serve(
    inbox: Inbox, drafter: Drafter | None, verifier: Verifier, rounds: Rounds, clock: Clock, emit: Emit
) -> Rounds:
    """Run requests as they come, until nothing comes any more and all have ended; returns what was learnt.

    Without a drafter every pass yields one token a request: the plain baseline. So it goes on after `DraftEnded`, too.
    What breaks a port breaks the requests that run, and they are told.
    """
    rounds = rounds if drafter else rounds.without_draft()
    while (news := await inbox.take(wait=rounds.is_idle)) is not None or not rounds.is_idle:
        rounds, change = rounds.schedule(news or News(), clock.now())
        for number in change.late:
            emit(number, Failed.of(DeadlineError("the request waited for longer than it was given; ask again later")))
        try:
            rounds = await run_round(rounds, change, drafter, verifier, clock, emit)
        except LlmcadError as error:
            for each in rounds.running:
                emit(each.number, Failed.of(error))
            rounds = rounds.without_running() if rounds.running else replace(rounds, ended=())
    return rounds


async def run_round(
    rounds: Rounds, change: Change, drafter: Drafter | None, verifier: Verifier, clock: Clock, emit: Emit
) -> Rounds:
    """One round of the requests that run now."""
    if change:
        rounds = rounds.begun(await verifier.change(change.ended, change.joined))
    if not rounds.running:
        return rounds
    began, checks = clock.now(), rounds.checks()
    known = rounds.costs_of(checks)
    drafted = rounds.drafted(checks, known)
    drafting = await drafter.grow(order_of(rounds, drafted, known)) if drafter and drafted else NO_DRAFTING
    for number, grown in drafting.trees.items():
        checks[number] = replace(checks[number], tree=grown.tree)
    for number, check in checks.items():
        emit(number, Provisional(most_probable_path(check.tree)))
    may_help = drafting.trees and is_worth_it(known, drafting.num_nodes)
    allowed = allowance(float(known.pass_seconds(drafting.num_nodes)), known.draft_step_s, rounds.last_s)
    report, ahead = await verify_while_growing(
        list(checks.values()), verifier, drafter if may_help else None, allowed, clock
    )
    now = clock.now()
    rounds, steps = rounds.after(checks, known, drafting, report, ahead, seconds=now - began, now=now)
    if rounds.has_draft and rounds.policy.should_end_draft(known):
        rounds = rounds.without_draft()
        for step in steps:
            emit(step.running.number, DraftEnded())
    for step in steps:
        emit_step(step, emit)
    for number, why in report.refused.items():
        emit(number, Failed.of(CheckpointError(why)))
    return rounds


async def verify_while_growing(
    checks: Sequence[Check], verifier: Verifier, drafter: Drafter | None, allowed: Allowance, clock: Clock
) -> tuple[PassReport, Grown]:
    """One pass; while it runs, the draft grows beyond the submitted trees, slice by slice, as far as `allowed`."""

    async def check() -> tuple[PassReport, float]:
        return await verifier.verify(checks), clock.now()

    ahead, checking = NOTHING_AHEAD, asyncio.ensure_future(check())
    began, slice_s = clock.now(), 0.0
    try:
        while drafter is not None and allowed.has_room(ahead.steps, (since := clock.now()) - began, slice_s):
            ahead = ahead.plus(await drafter.extend())
            slice_s = clock.now() - since
            if not ahead.can_go_on or checking.done():
                break
        report, ended = await checking
        return report, replace(ahead, late_s=clock.now() - ended)
    finally:
        checking.cancel()


def order_of(rounds: Rounds, drafted: Sequence[Running], known: Costs) -> DraftOrder:
    """Trees for the requests `drafted`, and all that the draft has to know for them."""
    return DraftOrder(
        joined={each.number: each.request for each in drafted if not each.is_known},
        ended=rounds.ended_for_draft,
        verdicts={each.number: each.verdicts for each in drafted},
        policy=rounds.policy,
        costs=known,
    )


def emit_step(step: Step, emit: Emit) -> None:
    number, stats = step.running.number, step.running.stats
    emit(number, Tokens(step.ids, stats, step.verdict.logprobs[: len(step.ids)]))
    if step.reason:
        emit(number, Finished(step.reason, stats))


def most_probable_path(tree: TokenTree) -> tuple[int, ...]:
    """The tokens that the draft would bet on: from the root down, always the likeliest child."""
    node, tokens = -1, []
    while children := tree.children(node):
        node = max(children, key=lambda child: float(tree.logprobs[child]))
        tokens.append(int(tree.tokens[node]))
    return tuple(tokens)

"""The requests that passes serve together: who joins, what each has, and what a round changes. Values, no clock.

    waiting --schedule-->  running  --after-->  ended, whose rows are freed before the next pass

A pass takes what its bytes take, for one request or for eight, so requests join at the next pass and leave without
waiting for each other. They are admitted in the order of their arrival, as long as their keys and values have room. A
prompt is run in the passes in which others verify: only so many of its tokens in each that nobody starves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from llmcad_actors.core.costs import CostModel, Costs
from llmcad_actors.core.fallback import Policy, outcome_of
from llmcad_actors.core.provisional import Patience
from llmcad_actors.core.request import Request
from llmcad_actors.core.round import Check, Drafting, Grown, PassReport, Submission, Verdict
from llmcad_actors.core.stats import Stats
from llmcad_actors.core.tree import TokenTree
from llmcad_actors.core.worth import Round

LEAST_PROMPT_ROWS = 256
"""Of the prompts that a pass runs beside other requests; more, where reading hides their computing."""

SHARED_PROMPT = 16
"""Tokens of a prompt that is worth a pass of waiting until another request has run it."""

NO_TREE = Submission(TokenTree.empty())
NO_DRAFTING = Drafting()
NOTHING_AHEAD = Grown(steps=0, drafted=0, can_go_on=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests run at once: as many as have room."""

    max_requests: int = 1
    rows: int = 10**9  # of keys and values, of all of them together

    def have_room_for(self, requests: Sequence[Request]) -> bool:
        """One alone always has: nobody waits for what never comes."""
        fit = len(requests) <= self.max_requests and sum(each.num_rows for each in requests) <= self.rows
        return fit or len(requests) == 1


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that waits."""

    number: int
    request: Request
    at: float  # on the clock

    def is_late(self, now: float) -> bool:
        return self.request.queue_s is not None and now - self.at > self.request.queue_s


@dataclass(frozen=True, slots=True)
class News:
    """What has come in since the last round."""

    arrivals: tuple[Arrival, ...] = ()
    cancelled: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Running:
    """A request that passes serve."""

    number: int
    request: Request
    began: float  # when it arrived
    pending: int = 0  # tokens of its prompt that the target has not run, the last one left out
    unseen: int = 0  # tokens that the draft has not read, the last one left out
    verdicts: tuple[Verdict, ...] = ()  # that the draft has not been told
    is_known: bool = False  # to the draft
    stats: Stats = field(default_factory=Stats)

    @property
    def left(self) -> int:
        """Tokens still to come."""
        return self.request.max_new_tokens - self.stats.new_tokens


@dataclass(frozen=True, slots=True)
class Change:
    """What the target is to hear before a pass."""

    ended: tuple[int, ...]
    joined: Mapping[int, Request]
    late: tuple[int, ...]  # requests that waited for too long

    def __bool__(self) -> bool:
        return bool(self.ended or self.joined)


@dataclass(frozen=True, slots=True)
class Step:
    """What a round brought a request."""

    running: Running
    ids: tuple[int, ...]
    verdict: Verdict
    reason: str  # "stop" or "length"; "": it goes on


@dataclass(frozen=True, slots=True)
class Rounds:
    """All requests between two rounds, and what was learnt on the way."""

    policy: Policy
    costs: CostModel
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    waiting: tuple[Arrival, ...] = ()
    running: tuple[Running, ...] = ()
    ended: tuple[int, ...] = ()  # whose rows the target still holds
    ended_for_draft: tuple[int, ...] = ()  # that the draft still knows
    last_s: float = math.inf  # of the last pass
    was_ahead: bool = False  # the draft went on during it
    has_draft: bool = True

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running or self.ended)

    def schedule(self, news: News, now: float) -> tuple[Self, Change]:
        """The requests of the next pass: `news` has been heard, and whoever has room joins, in the order of arrival."""
        waiting = [each for each in (*self.waiting, *news.arrivals) if each.number not in news.cancelled]
        late = tuple(each.number for each in waiting if each.is_late(now))
        waiting = [each for each in waiting if each.number not in late]
        rounds = self._without({each.number for each in self.running} & news.cancelled)
        running = list(rounds.running)
        while waiting and self.limits.have_room_for([*(each.request for each in running), waiting[0].request]):
            if _is_being_read(waiting[0].request.prompt, running):
                break  # a pass later, its rows are there to be copied
            first = waiting.pop(0)
            running.append(Running(first.number, first.request, first.at))
        change = Change(rounds.ended, {each.number: each.request for each in running[len(rounds.running) :]}, late)
        return replace(rounds, waiting=tuple(waiting), running=tuple(running), ended=()), change

    def begun(self, held: Mapping[int, int]) -> Self:
        """The target has begun requests, of whose prompts it holds so many tokens."""

        def begun(each: Running) -> Running:
            if each.number not in held:
                return each
            missing = len(each.request.prompt) - 1 - held[each.number]
            return replace(each, pending=missing, unseen=missing)

        return replace(self, running=tuple(begun(each) for each in self.running))

    def checks(self) -> dict[int, Check]:
        """What the next pass runs of each request, if it gets no tree."""
        waiting = [each for each in self.running if each.pending]
        if len(self.running) == 1 or not waiting:
            return {each.number: Check(each.number, NO_TREE.tree) for each in self.running}
        known = self.costs.costs(num_requests=len(self.running))
        hidden = (known.pass_read_s - known.pass_base_s) / known.pass_node_s if known.pass_node_s else 0.0
        share = max(LEAST_PROMPT_ROWS, int(hidden)) // len(waiting)
        return {each.number: Check(each.number, NO_TREE.tree, max(share, 1)) for each in self.running}

    def costs_of(self, checks: Mapping[int, Check]) -> Costs:
        """Of a round with these checks, before it begins."""
        run = [_prompt_rows(each, checks[each.number]) for each in self.running]
        return self.costs.costs(
            pending_rows=sum(run),
            num_requests=max(1, len(self._choosing(checks))),
            drafts_ahead=any(each.request.provisional for each in self.running) and not self.patience.is_over,
        )

    def drafted(self, checks: Mapping[int, Check], known: Costs) -> tuple[Running, ...]:
        """The requests that get a tree in this round: all that can, or none where no drafting pays."""
        could = tuple(each for each in self._choosing(checks) if each.request.speculate)
        if not (could and self.has_draft):
            return ()
        unseen, left = sum(each.unseen for each in could), max(each.left for each in could)
        return could if self.policy.should_draft(known, unseen, left) else ()

    def after(
        self,
        checks: Mapping[int, Check],
        known: Costs,
        drafting: Drafting,
        report: PassReport,
        ahead: Grown,
        *,
        seconds: float,
        now: float,
    ) -> tuple[Self, list[Step]]:
        """After a round that took `seconds` in all, and what it brought the requests that have a verdict."""
        steps = [
            self._step(each, drafting, report, ahead, now) for each in self.running if each.number in report.verdicts
        ]
        stepped = {step.running.number: step.running for step in steps}
        over = {step.running.number for step in steps if step.reason} | set(report.refused)
        running = tuple(stepped.get(each.number) or _read(each, checks[each.number]) for each in self.running)
        rounds = replace(self, running=running)._without(over)
        rounds = replace(rounds, last_s=report.stats.seconds, was_ahead=ahead.steps > 0)
        if self.has_draft and any(each.request.speculate for each in self.running):
            rounds = rounds._learnt(known, drafting, report, ahead, steps, seconds)
        if drafting.trees:
            rounds = replace(rounds, ended_for_draft=tuple(set(rounds.ended_for_draft) - set(self.ended_for_draft)))
        return rounds, steps

    def without_running(self) -> Self:
        """All that runs is given up."""
        return replace(self._without({each.number for each in self.running}), was_ahead=False)

    def without_draft(self) -> Self:
        return replace(self, has_draft=False, ended_for_draft=())

    def _choosing(self, checks: Mapping[int, Check]) -> tuple[Running, ...]:
        """Those whose prompt this pass runs to its end."""
        return tuple(each for each in self.running if _prompt_rows(each, checks[each.number]) == each.pending)

    def _without(self, numbers: set[int]) -> Self:
        gone = [each for each in self.running if each.number in numbers]
        return replace(
            self,
            running=tuple(each for each in self.running if each.number not in numbers),
            ended=(*self.ended, *(each.number for each in gone)),
            ended_for_draft=(*self.ended_for_draft, *(each.number for each in gone if each.is_known)),
        )

    def _step(self, each: Running, drafting: Drafting, report: PassReport, ahead: Grown, now: float) -> Step:
        grown, verdict = drafting.trees.get(each.number), report.verdicts[each.number]
        tree = grown.tree if grown else NO_TREE.tree
        ids = new_tokens(tree, verdict)[: each.left]
        stopped = verdict.stopped and len(ids) == len(verdict.path) + 1  # the stop token itself was not cut off
        stats = each.stats.after_pass(
            seconds=now - each.began,
            new_tokens=len(ids),
            draft_steps=drafting.steps + ahead.steps if grown else 0,
            drafted_tokens=(drafting.drafted + ahead.drafted) // len(drafting.trees) if grown else 0,
            verified_nodes=len(tree),
            accepted_tokens=len(verdict.path),
            is_hit=grown.head_start if grown and self.was_ahead else None,
            compute_s=report.stats.compute_s,
            stall_s=report.stats.stall_s,
            is_drafted=grown is not None,
        )
        before = () if grown else each.verdicts
        later = replace(
            each,
            pending=0,
            unseen=1 if grown else each.unseen + 1,
            verdicts=(*before, verdict),
            is_known=each.is_known or grown is not None,
            stats=stats,
        )
        return Step(later, ids, verdict, "stop" if stopped else "length" if later.left == 0 else "")

    def _learnt(
        self,
        known: Costs,
        drafting: Drafting,
        report: PassReport,
        ahead: Grown,
        steps: Sequence[Step],
        seconds: float,
    ) -> Self:
        policy = self.policy
        for step in steps:
            tree = drafting.trees.get(step.running.number, NO_TREE).tree
            policy = policy.after(outcome_of(tree, step.verdict.path, drafting.confidence))
        if steps and (drafting.trees or not known.pending_rows):
            tokens = sum(len(step.ids) for step in steps) / len(steps)
            policy = policy.after_round(_round_of(drafting, tokens, seconds, known))
        return replace(
            self,
            policy=policy,
            costs=self.costs.after(drafting, report.stats),
            patience=self.patience.after(report.stats.seconds, ahead.late_s),
        )


def _is_being_read(prompt: Sequence[int], running: Sequence[Running]) -> bool:
    """The next pass runs this prompt for another request, and no pass has done so before."""
    same = [each for each in running if each.request.prompt == prompt]
    return len(prompt) >= SHARED_PROMPT and bool(same) and not any(each.stats.target_passes for each in same)


def new_tokens(tree: TokenTree, verdict: Verdict) -> tuple[int, ...]:
    """What a pass yields: the accepted path and the target's own next token."""
    return (*tree.tokens[list(verdict.path)].tolist(), verdict.bonus)


def _round_of(drafting: Drafting, tokens: float, seconds: float, costs: Costs) -> Round:
    """What the policy hears of a round. A pass that ran a prompt counts as what it is thought to take without."""
    if costs.pending_rows:
        seconds = drafting.seconds + float(costs.without_prompt().pass_seconds(drafting.num_nodes))
    return Round(bool(drafting.trees), tokens, seconds, drafting.catch_up_s)


def _prompt_rows(each: Running, check: Check) -> int:
    """Tokens of the prompt that the check runs, the last one left out."""
    return each.pending if check.most_prompt is None else min(each.pending, check.most_prompt)


def _read(each: Running, check: Check) -> Running:
    """After a pass that ran a part of the prompt."""
    return replace(each, pending=each.pending - _prompt_rows(each, check))

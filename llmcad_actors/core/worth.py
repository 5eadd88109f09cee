"""Whether drafting pays at all: what drafted rounds and plain passes were seen to bring, and in how much time.

A drafted round of s seconds that yields k tokens gains k - s / p plain passes, where p is what a plain pass takes. What
a draft that does not pay may lose is rationed, as in conservative bandits (Wu et al. 2016): there is a little credit to
begin with, losses use it up, and every pass without the draft earns a small share of a pass. While rounds of late are
expected to gain, drafting goes on; else it goes on as far as the credit does, and then waits until another round can be
afforded. So a draft that is always wrong costs the first credit and a share of the time, however dear its rounds are,
and one that is only unlucky for a few rounds is not paused.

A draft also costs its memory, which could hold layers of a streamed target. It is ended for that only where many rounds
have brought less, as it does not come back. So many are made beyond the credit, too, where what the memory would save
in the tokens to come is more than what they lose.

Time is wall time: whatever makes a drafted round slow counts, also what no model of costs knows of.
"""

from dataclasses import dataclass, replace
from typing import Self

from llmcad_actors.core.costs import Costs

FIRST_CREDIT = 1.0  # plain passes that trials may lose before anything is known
MOST_CREDIT = 2.0  # ... and that are risked of what drafting has gained
FIRST_SHARE, LEAST_SHARE = 0.04, 0.01  # of a pass, that each pass without the draft earns; halved by every pause
MOST_LOSS = 3.0  # passes, that one round is charged
HICCUP = 2.0  # times as long as such rounds take: what is longer is the machine's doing, and counts as that long
TRIAL_SHARE = 0.05  # of the time left, that a trial's reading up may take
PRIOR_ROUNDS = 1.0  # that neither gained nor lost
MOST_STEP_SHARE = 0.8  # of a plain pass, that a draft step may take
CLEARLY = 2.5  # times the tokens per second that plain passes are thought to bring, before one was timed: beyond doubt
MOST_HICCUPS = 8  # so many timed passes in a row were not all disturbed
ENOUGH_ROUNDS, ROUNDS_PER_RIGHT = 12, 6  # to call a draft useless, and more for each of its guesses that was right
LEAST_MEMORY_SHARE = 0.03  # of a plain pass, that the draft's memory must be worth
LEAST_ROUNDS, ROUNDS_PER_GAIN = 4, 64  # between timed plain passes; more where drafting gains more, which they cost
_FADING = 0.8  # of earlier drafted rounds, per round
_NEWEST = 0.2  # weight of a new plain pass at least
_LEAST_S = 1e-9


@dataclass(frozen=True, slots=True)
class Round:
    """What a round brought, and took."""

    is_drafted: bool
    tokens: float  # a request
    seconds: float  # in all, on the clock
    catch_up_s: float = 0.0  # of them, the draft's reading of text that it had not seen


def can_pay(costs: Costs) -> bool:
    """Whether a draft could pay, if all its guesses were right.

    A step deepens the tree by one, so it saves at most one plain pass, less what the tree's rows take. Drafting that is
    hidden behind reading is free.
    """
    return costs.draft_step_s < MOST_STEP_SHARE * costs.plain_pass_s + costs.hidden_s


@dataclass(frozen=True, slots=True)
class Worth:
    """What has been seen of both kinds of rounds. Of drafted ones, faded sums."""

    rounds: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    plain_s: float = 0.0  # a plain pass lately; 0: none was timed
    num_plain: int = 0
    age: int = 0  # drafted rounds since
    credit: float = FIRST_CREDIT
    share: float = FIRST_SHARE
    all_rounds: int = 0  # drafted ones, of late or not
    all_right: float = 0.0  # guesses in them that were right, a request

    def should_draft(self, costs: Costs, unseen: int, left: int) -> bool:
        """Whether to draft in this round.

        unseen: tokens that the draft would have to read first. left: tokens still to come.
        """
        plain_s = self.plain_s or costs.plain_pass_s
        reading_up_s = unseen * costs.draft_row_s
        if not self.rounds and not can_pay(costs):
            return False
        if self.rounds and not costs.pending_rows and self._is_in_doubt(plain_s):
            return False  # a pass that runs a prompt would not tell how long a plain one takes
        gain = self._gain(plain_s)
        if gain > 0:
            return reading_up_s <= gain * plain_s * left * self.rounds / self.tokens
        trial = self._rounds_of_trial(costs)
        is_worth_a_trial = trial > 0 and -gain * trial <= costs.draft_memory_share * left
        is_evidence = self.rounds > 1  # one round alone, the first, is none
        can_be_afforded = self.credit + gain >= 0 or not is_evidence or is_worth_a_trial
        return can_be_afforded and reading_up_s <= TRIAL_SHARE * left * plain_s

    def is_useless(self, costs: Costs) -> bool:
        """Whether the draft's memory is surely worth more than its guesses."""
        return self._may_be_useless(costs) and self.all_rounds >= self._enough_rounds

    def _rounds_of_trial(self, costs: Costs) -> float:
        """Rounds that are missing until the draft may be called useless; 0: it is not, or there are enough."""
        return max(self._enough_rounds - self.all_rounds, 0.0) if self._may_be_useless(costs) else 0.0

    def _may_be_useless(self, costs: Costs) -> bool:
        """A guess that is right saves a pass; the memory saves a share of every pass."""
        share = costs.draft_memory_share
        return share >= LEAST_MEMORY_SHARE and self.all_right < share * max(self.all_rounds, self._enough_rounds)

    @property
    def _enough_rounds(self) -> float:
        """With these, a draft that is right in every other round is taken for useless once in 2000 times."""
        return ENOUGH_ROUNDS + ROUNDS_PER_RIGHT * self.all_right

    def after(self, done: Round) -> Self:
        return self._after_drafted(done) if done.is_drafted else self._after_plain(done.seconds)

    def _after_plain(self, seconds: float) -> Self:
        weight = max(_NEWEST, 1 / (self.num_plain + 1))
        usual = min(seconds, HICCUP * self.plain_s) if self.num_plain else seconds
        mean = min(self.plain_s + weight * (usual - self.plain_s), HICCUP * seconds)
        credit = min(self.credit + self.share, MOST_CREDIT)
        return replace(self, plain_s=mean, num_plain=self.num_plain + 1, age=0, credit=credit)

    def _after_drafted(self, done: Round) -> Self:
        seconds = done.seconds - done.catch_up_s
        if self.rounds:
            seconds = min(seconds, HICCUP * self.seconds / self.rounds)
        later = replace(
            self,
            rounds=_FADING * self.rounds + 1,
            tokens=_FADING * self.tokens + done.tokens,
            seconds=_FADING * self.seconds + seconds,
            age=self.age + 1,
            all_rounds=self.all_rounds + 1,
            all_right=self.all_right + done.tokens - 1,
        )
        if not self.plain_s:
            return later
        return later._charged(done.tokens - (seconds + done.catch_up_s) / self.plain_s)

    def _charged(self, gain: float) -> Self:
        """With a round's gain, or loss, on the account. A pause that begins now makes the next one longer."""
        credit, expected = min(self.credit + max(gain, -MOST_LOSS), MOST_CREDIT), self._gain(self.plain_s)
        share = self.share
        if expected >= 0:
            share = FIRST_SHARE
        elif credit + expected < 0:
            share = max(share / 2, LEAST_SHARE)
        return replace(self, credit=credit, share=share)

    def _gain(self, plain_s: float) -> float:
        """Expected of a round, in plain passes. Any loss can be afforded some time."""
        return max((self.tokens - self.seconds / plain_s) / (self.rounds + PRIOR_ROUNDS), -MOST_CREDIT)

    def _is_in_doubt(self, plain_s: float) -> bool:
        """It is time to see how long a plain pass takes."""
        times_faster = self.tokens * plain_s / max(self.seconds, _LEAST_S)
        if not self.plain_s:
            return times_faster < CLEARLY
        most = float(LEAST_ROUNDS ** min(self.num_plain + 1, MOST_HICCUPS))  # one measurement may have been a hiccup
        return self.age >= max(float(LEAST_ROUNDS), min(ROUNDS_PER_GAIN * (times_faster - 1), most))

"""One prompt to continue, in the target's tokens."""

from dataclasses import dataclass

from llmcad_actors.core.choosing import GREEDY, Choosing


@dataclass(frozen=True, slots=True)
class Request:
    """What the actors are asked for."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    speculate: bool = True  # False: one token a pass, the plain baseline
    provisional: bool = True  # go on drafting while a pass runs
    choosing: Choosing = GREEDY
    queue_s: float | None = None  # it is given up where it has not begun within so many seconds

    @property
    def num_rows(self) -> int:
        """Of keys and values, at most: one for each token but the last, which nothing follows."""
        return len(self.prompt) + self.max_new_tokens

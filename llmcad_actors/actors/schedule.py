"""What the loader reads next: the prelude once, then the encoder and the circle of layers, the circle for ever.

Knows names alone. A reader takes one name after the other; whoever needs another one first turns the schedule to it.
"""

from collections import deque
from collections.abc import Sequence


class Schedule:
    """Shards by name, in the order in which they are to be read. Not for several threads."""

    def __init__(self, prelude: Sequence[str], encoder: Sequence[str], circle: Sequence[str]) -> None:
        """encoder, circle: all shards of a pass, in its order, of which some are streamed.

        The encoder is read before the first round of the circle, and again only when it is turned to.
        """
        self._prelude = deque(prelude)
        self._pass = (*encoder, *circle)
        self._positions = {name: position for position, name in enumerate(self._pass)}
        self._circle_start = len(encoder)
        self._streamed: frozenset[str] = frozenset()
        self._position = 0  # from here on the next is looked for

    def stream(self, names: Sequence[str]) -> None:
        """Read these of a pass from now on, wherever the schedule stands."""
        self._streamed = frozenset(names)

    def has_next(self) -> bool:
        return bool(self._prelude) or self._found() is not None

    def take(self) -> str:
        """The next name; the schedule goes on behind it. Raises LookupError when there is none."""
        if self._prelude:
            return self._prelude.popleft()
        found = self._found()
        if found is None:
            raise LookupError("nothing is to be read")
        self._position = found + 1
        return self._pass[found]

    def turn_to(self, name: str) -> bool:
        """Make `name` the next. False, and nothing changes, where it is neither streamed nor still of the prelude."""
        if name in self._prelude:
            while self._prelude[0] != name:
                self._prelude.popleft()
            return True
        if name not in self._streamed:
            return False
        self._prelude.clear()
        self._position = self._positions[name]
        return True

    def place_of(self, name: str) -> tuple[int, int]:
        """Where `name` is in what is streamed of its part of the pass, and how many those are."""
        position = self._positions.get(name, self._circle_start)
        part = self._pass[: self._circle_start] if position < self._circle_start else self._pass[self._circle_start :]
        names = [other for other in part if other in self._streamed]
        return names.index(name) if name in names else 0, len(names)

    def _found(self) -> int | None:
        """The first that is streamed from the position on, or else round the circle."""
        around = (*range(self._position, len(self._pass)), *range(self._circle_start, len(self._pass)))
        return next((position for position in around if self._pass[position] in self._streamed), None)

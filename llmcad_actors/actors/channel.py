"""How shards are asked for, lent and given back: a local socket between the verifier and the loader.

Weights lie in the window, in the object store. What is said about them is small and frequent, and an actor call costs
both processes milliseconds of their cores; a message on a socket, next to nothing. What is said is a `messages` value.
"""

import queue
import secrets
import threading
from collections import deque
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Protocol

from llmcad_actors.actors.calls import failure
from llmcad_actors.errors import ActorFailure, DeadlineError, LlmcadError, RuntimeFailure
from llmcad_actors.messages import AskShard, EndLease, Failed, Lease, StreamShards, pack, unpack

Address = tuple[str, bytes]
"""A socket's name, which is no file, and the key that opens it."""


class Lender(Protocol):
    """Who has the shards."""

    def lend(self, name: str) -> Lease:
        """Waits for the shard. May raise a `LlmcadError`, which is the answer then."""

    def release(self, number: int) -> None:
        """End a lease, at any time."""

    def stream(self, names: tuple[str, ...]) -> None:
        """Read these from now on. Never while `lend` is under way."""


class LeaseServer:
    """The loader's side: one thread hears, another answers. Serves the first that connects, until that one ends.

    Leases end as soon as that is heard, even while a shard is waited for. All else is done in the order of its coming.
    """

    def __init__(self, lender: Lender) -> None:
        self._lender = lender
        self._orders = queue.SimpleQueue[AskShard | StreamShards | None]()  # None: no more will come
        self._sending = threading.Lock()
        self.address: Address = f"\0llmcad-{secrets.token_hex()}", secrets.token_bytes()
        self._listener = Listener(self.address[0], family="AF_UNIX", authkey=self.address[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection = self._first()
        threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
        try:
            while True:
                self._hear(unpack(connection.recv_bytes()))
        except (EOFError, OSError):
            pass
        except Exception as error:  # a thread's outermost method: whoever waits must hear of it
            self._send(connection, Failed.of(_broken(error)))
        finally:
            self._orders.put(None)
            connection.close()

    def _first(self) -> Connection:
        """Whoever first comes with the key."""
        with self._listener:
            while True:
                with suppress(AuthenticationError, EOFError, ConnectionError):
                    return self._listener.accept()

    def _hear(self, message: AskShard | EndLease | StreamShards) -> None:
        if isinstance(message, EndLease):
            self._lender.release(message.number)
        else:
            self._orders.put(message)

    def _answer(self, connection: Connection) -> None:
        while (order := self._orders.get()) is not None:
            if isinstance(order, StreamShards):
                self._lender.stream(order.shards)
            else:
                self._send(connection, self._lent(order.shard))

    def _lent(self, name: str) -> Lease | Failed:
        try:
            return self._lender.lend(name)
        except LlmcadError as error:
            return Failed.of(error)
        except Exception as error:  # a thread's outermost method: whoever waits must hear of it
            return Failed.of(_broken(error))

    def _send(self, connection: Connection, answer: Lease | Failed) -> None:
        with self._sending, suppress(OSError):  # nobody hears it
            connection.send_bytes(pack(answer))


def _broken(error: Exception) -> RuntimeFailure:
    return RuntimeFailure(f"the loader broke: {error!r}")


class LeaseClient:
    """The verifier's side. Shards are asked for by name, and come in the order of the asking."""

    def __init__(self, address: Address) -> None:
        """Raises `ActorFailure` where nobody listens."""
        path, key = address
        self._asked = deque[str]()  # and not yet answered
        try:
            self._connection = Client(path, family="AF_UNIX", authkey=key)
        except (OSError, AuthenticationError) as error:
            raise ActorFailure(f"the loader cannot be reached: {error}") from None

    def ask(self, name: str) -> None:
        """For a shard that will be taken, or that will most likely be the next to be taken."""
        self._send(AskShard(name))
        self._asked.append(name)

    def take(self, name: str, timeout_s: float) -> Lease:
        """The shard, which is asked for if it has not been; what was asked for before it goes back.

        timeout_s: of the wait for one answer. Raises the loader's own error, `DeadlineError`, `ActorFailure`.
        """
        while self._asked and self._asked[0] != name:
            passed_over = self._answer(timeout_s)
            if isinstance(passed_over, Lease):
                self.release(passed_over.number)
        if not self._asked:
            self.ask(name)
        answer = self._answer(timeout_s)
        if isinstance(answer, Failed):
            raise answer.as_error()
        return answer

    def release(self, number: int) -> None:
        """The loader may write over the shard from now on."""
        self._send(EndLease(number))

    def stream(self, names: tuple[str, ...]) -> None:
        """The loader reads these shards, from what is asked for after this on."""
        self._send(StreamShards(names))

    def _answer(self, timeout_s: float) -> Lease | Failed:
        """To what was asked for first. One that is late is still to come."""
        what = f"shard {self._asked[0]}"
        try:
            if not self._connection.poll(timeout_s):
                raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s")
            answer: Lease | Failed = unpack(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise failure(f"{what} failed: the loader died") from None
        self._asked.popleft()
        return answer

    def _send(self, message: AskShard | EndLease | StreamShards) -> None:
        try:
            self._connection.send_bytes(pack(message))
        except OSError:
            raise self._last_word() from None

    def _last_word(self) -> LlmcadError:
        """What the loader said before it closed the socket, if it said what broke."""
        with suppress(EOFError, OSError):
            while self._connection.poll(0):
                answer: Lease | Failed = unpack(self._connection.recv_bytes())
                if isinstance(answer, Failed):
                    return answer.as_error()
        return failure("the loader died")

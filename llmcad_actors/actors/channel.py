"""How shards are asked for, lent and given back: a local socket between the verifier and the loader.

Weights lie in the window, in the object store. What is said about them is small and frequent, and an actor call costs
both processes milliseconds of their cores; a message on a socket, next to nothing.
"""

import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from llmcad_actors.actors.calls import failure
from llmcad_actors.errors import ActorFailure, DeadlineError, LlmcadError, RuntimeFailure

Place = tuple[str, int, int]
"""A tensor of a leased shard: name, where it begins in the window, bytes."""

Lease = tuple[int, str, tuple[Place, ...]]
"""Lease id, shard name, its tensors."""

Address = tuple[str, bytes]
"""A socket's name, which is no file, and the key that opens it."""

LEND_TIMEOUT_S = 120.0  # for a shard: the loader's own deadline

_ASK = -1  # on the wire; every other number ends a lease


class LeaseServer:
    """The loader's side: one thread hears, another answers. Serves the first that connects, until that one ends."""

    def __init__(self, lend: Callable[[], Lease], release: Callable[[int], None]) -> None:
        """`lend` waits for the next shard, and may raise a `LlmcadError`, which is the answer then."""
        self._lend = lend
        self._release = release
        self._asked = queue.SimpleQueue[bool]()
        self._sending = threading.Lock()
        self.address: Address = f"\0llmcad-{secrets.token_hex()}", secrets.token_bytes()
        self._listener = Listener(self.address[0], family="AF_UNIX", authkey=self.address[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection = self._first()
        answering = threading.Thread(target=self._answer, args=(connection,), daemon=True)
        answering.start()
        try:
            while True:
                message = connection.recv()
                if message == _ASK:
                    self._asked.put(True)
                else:
                    self._release(message)
        except (EOFError, OSError):
            pass
        except Exception as error:  # a thread's outermost method: whoever waits must hear of it
            self._send(connection, RuntimeFailure(f"the loader broke: {error!r}"))
        finally:
            self._asked.put(False)
            connection.close()

    def _first(self) -> Connection:
        """Whoever first comes with the key."""
        with self._listener:
            while True:
                with suppress(AuthenticationError, EOFError, ConnectionError):
                    return self._listener.accept()

    def _answer(self, connection: Connection) -> None:
        while self._asked.get():
            answer: Lease | LlmcadError
            try:
                answer = self._lend()
            except LlmcadError as error:
                answer = error
            except Exception as error:  # a thread's outermost method: whoever waits must hear of it
                answer = RuntimeFailure(f"the loader broke: {error!r}")
            self._send(connection, answer)

    def _send(self, connection: Connection, answer: Lease | LlmcadError) -> None:
        with self._sending, suppress(OSError):  # nobody hears it
            connection.send(answer)


class LeaseClient:
    """The verifier's side. Shards come in the order of the asking."""

    def __init__(self, address: Address) -> None:
        """Raises `ActorFailure` where nobody listens."""
        path, key = address
        try:
            self._connection = Client(path, family="AF_UNIX", authkey=key)
        except (OSError, AuthenticationError) as error:
            raise ActorFailure(f"the loader cannot be reached: {error}") from None

    def ask(self) -> None:
        """For one shard more."""
        self._send(_ASK)

    def take(self, timeout_s: float, what: str) -> Lease:
        """The next shard that was asked for. Raises the loader's own error, `DeadlineError`, `ActorFailure`."""
        try:
            if not self._connection.poll(timeout_s):
                raise DeadlineError(f"{what} did not come within {timeout_s:.0f} s")
            answer: Lease | LlmcadError = self._connection.recv()
        except (EOFError, OSError):
            raise failure(f"{what} failed: the loader died") from None
        if isinstance(answer, LlmcadError):
            raise answer
        return answer

    def release(self, lease: int) -> None:
        """The loader may write over it from now on."""
        self._send(lease)

    def _send(self, message: int) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise failure("the loader died") from None

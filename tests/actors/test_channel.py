"""Leases over a socket: asked for, answered in order, given back; and what is heard when the other side fails."""

import ast
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from llmcad_actors.actors.channel import Lease, LeaseClient, LeaseServer
from llmcad_actors.errors import ActorFailure, DeadlineError, RuntimeFailure, StorageError

TIMEOUT_S = 20.0

ALONE = """
import time
from llmcad_actors.actors.channel import LeaseServer
server = LeaseServer(lambda: (7, "layer.7", ()), print)
print(repr(server.address), flush=True)
time.sleep(60)
"""


class Lender:
    """Lends numbered shards, `failures` instead where there are some, as soon as it may."""

    def __init__(self, *failures: Exception) -> None:
        self.may = threading.Event()
        self.may.set()
        self.released: list[int] = []
        self._failures = list(failures)
        self._count = 0
        self.server = LeaseServer(self.lend, self.released.append)

    def lend(self) -> Lease:
        assert self.may.wait(TIMEOUT_S)
        if self._failures:
            raise self._failures.pop(0)
        self._count += 1
        return self._count, f"layer.{self._count}", (("weight", 64 * self._count, 32),)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_shards_come_in_the_order_of_asking_and_go_back() -> None:
    lender = Lender()
    client = LeaseClient(lender.server.address)
    client.ask()
    for number in range(1, 200):
        client.ask()  # one is asked for ahead
        assert client.take(TIMEOUT_S, "a shard") == (number, f"layer.{number}", (("weight", 64 * number, 32),))
        client.release(number)
    wait_until(lambda: lender.released == list(range(1, 200)))


def test_a_lease_ends_while_the_next_shard_is_waited_for() -> None:
    lender = Lender()
    client = LeaseClient(lender.server.address)
    client.ask()
    client.take(TIMEOUT_S, "a shard")
    lender.may.clear()
    client.ask()
    client.release(1)
    wait_until(lambda: lender.released == [1])
    lender.may.set()
    assert client.take(TIMEOUT_S, "a shard")[0] == 2


def test_what_the_loader_raises_is_raised_and_the_next_shard_comes() -> None:
    lender = Lender(StorageError("the disk is gone"), ZeroDivisionError("a bug"))
    client = LeaseClient(lender.server.address)
    for error, said in ((StorageError, "the disk is gone"), (RuntimeFailure, "the loader broke: ZeroDivisionError")):
        client.ask()
        with pytest.raises(error, match=said):
            client.take(TIMEOUT_S, "a shard")
    client.ask()
    assert client.take(TIMEOUT_S, "a shard")[0] == 1


def test_a_shard_that_does_not_come_has_a_deadline() -> None:
    lender = Lender()
    lender.may.clear()
    client = LeaseClient(lender.server.address)
    client.ask()
    with pytest.raises(DeadlineError, match="layer 3 did not come within 0 s"):
        client.take(0.05, "layer 3")
    lender.may.set()


def test_a_loader_that_dies_is_noticed_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = LeaseClient(ast.literal_eval(process.stdout.readline()))
        client.ask()
        assert client.take(TIMEOUT_S, "a shard")[0] == 7
        process.kill()
        process.wait(TIMEOUT_S)
    with pytest.raises(ActorFailure, match="layer 3 failed: the loader died"):
        client.take(TIMEOUT_S, "layer 3")
    with pytest.raises(ActorFailure, match="the loader died"):
        client.ask()


def test_a_lease_that_cannot_be_ended_is_noticed_at_once() -> None:
    lender = Lender()
    lender.may.clear()
    client = LeaseClient(LeaseServer(lender.lend, lambda lease: lender.released.remove(lease)).address)
    client.ask()
    client.release(1)
    with pytest.raises(RuntimeFailure, match="the loader broke: ValueError"):
        client.take(TIMEOUT_S, "layer 3")
    with pytest.raises(ActorFailure, match="the loader died"):
        client.take(TIMEOUT_S, "layer 3")
    lender.may.set()


def test_only_one_is_served() -> None:
    lender = Lender()
    name, key = lender.server.address
    with pytest.raises(ActorFailure, match="cannot be reached"):
        LeaseClient((name + "?", key))
    client = LeaseClient((name, key))
    with pytest.raises(ActorFailure, match="cannot be reached"):
        LeaseClient((name, key))
    client.ask()
    assert client.take(TIMEOUT_S, "a shard")[0] == 1


def test_a_wrong_key_opens_nothing_and_harms_nobody() -> None:
    name, key = Lender().server.address
    with pytest.raises(ActorFailure, match="cannot be reached"):
        LeaseClient((name, b"guessed"))
    client = LeaseClient((name, key))
    client.ask()
    assert client.take(TIMEOUT_S, "a shard")[0] == 1

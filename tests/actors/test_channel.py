"""Leases over a socket: asked for by name, answered in order, given back; and what is heard when a side fails."""

import ast
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from llmcad_actors.actors.channel import LeaseClient, LeaseServer
from llmcad_actors.errors import ActorFailure, DeadlineError, RuntimeFailure, StorageError
from llmcad_actors.messages import Lease

TIMEOUT_S = 20.0

ALONE = """
import time
from llmcad_actors.actors.channel import LeaseServer
from llmcad_actors.messages import Lease

class Lender:
    def lend(self, name):
        return Lease(7, name, ())

server = LeaseServer(Lender())
print(repr(server.address), flush=True)
time.sleep(60)
"""


class Lender:
    """Lends what it is asked for, as soon as it may; `failures` instead where there are some. Notes all in order."""

    def __init__(self, *failures: Exception) -> None:
        self.may = threading.Event()
        self.may.set()
        self.done: list[object] = []
        self.released: list[int] = []
        self._failures = list(failures)
        self._count = 0
        self.server = LeaseServer(self)

    def lend(self, name: str) -> Lease:
        assert self.may.wait(TIMEOUT_S)
        if self._failures:
            raise self._failures.pop(0)
        self._count += 1
        self.done.append(name)
        return Lease(self._count, name, (("weight", 64 * self._count, 32),))

    def release(self, number: int) -> None:
        if number > self._count:
            raise ValueError(number)
        self.released.append(number)

    def stream(self, names: tuple[str, ...]) -> None:
        self.done.append(names)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_shards_come_in_the_order_of_asking_and_go_back() -> None:
    lender = Lender()
    client = LeaseClient(lender.server.address)
    for number in range(1, 200):
        lease = client.take(f"layer.{number}", TIMEOUT_S)
        client.ask(f"layer.{number + 1}")
        assert lease == Lease(number, f"layer.{number}", (("weight", 64 * number, 32),))
        client.release(number)
    wait_until(lambda: lender.released == list(range(1, 200)))
    wait_until(lambda: lender.done == [f"layer.{number}" for number in range(1, 201)])  # each was asked for once


def test_what_was_asked_for_in_vain_goes_back() -> None:
    lender = Lender()
    client = LeaseClient(lender.server.address)
    client.ask("layer.5")
    client.ask("layer.6")
    assert client.take("layer.0", TIMEOUT_S).shard == "layer.0"
    assert lender.done == ["layer.5", "layer.6", "layer.0"]
    wait_until(lambda: lender.released == [1, 2])


def test_a_lease_ends_while_the_next_shard_is_waited_for() -> None:
    lender = Lender()
    client = LeaseClient(lender.server.address)
    client.take("layer.0", TIMEOUT_S)
    lender.may.clear()
    client.ask("layer.1")
    client.release(1)
    wait_until(lambda: lender.released == [1])
    lender.may.set()
    assert client.take("layer.1", TIMEOUT_S).number == 2


def test_a_new_order_of_reading_keeps_its_place_among_the_shards_that_are_asked_for() -> None:
    lender = Lender()
    client = LeaseClient(lender.server.address)
    lender.may.clear()
    client.ask("layer.0")
    client.stream(("layer.1", "head"))
    client.ask("layer.1")
    client.stream(())
    client.ask("layer.2")
    lender.may.set()
    client.take("layer.2", TIMEOUT_S)
    assert lender.done == ["layer.0", ("layer.1", "head"), "layer.1", (), "layer.2"]


def test_what_the_loader_raises_is_raised_and_the_next_shard_comes() -> None:
    lender = Lender(StorageError("the disk is gone"), ZeroDivisionError("a bug"))
    client = LeaseClient(lender.server.address)
    for error, said in ((StorageError, "the disk is gone"), (RuntimeFailure, "the loader broke: ZeroDivisionError")):
        with pytest.raises(error, match=said):
            client.take("layer.3", TIMEOUT_S)
    assert client.take("layer.3", TIMEOUT_S).number == 1


def test_the_failure_of_a_shard_that_is_not_taken_harms_no_other() -> None:
    client = LeaseClient(Lender(ActorFailure("the loader has no shard layer.5")).server.address)
    client.ask("layer.5")
    assert client.take("layer.3", TIMEOUT_S).shard == "layer.3"


def test_a_shard_that_does_not_come_has_a_deadline_and_may_come_later() -> None:
    lender = Lender()
    lender.may.clear()
    client = LeaseClient(lender.server.address)
    with pytest.raises(DeadlineError, match=r"shard layer\.3 did not come within 0 s"):
        client.take("layer.3", 0.05)
    lender.may.set()
    assert client.take("layer.3", TIMEOUT_S).number == 1
    assert client.take("layer.4", TIMEOUT_S).number == 2
    assert lender.done == ["layer.3", "layer.4"]


def test_a_loader_that_dies_is_noticed_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = LeaseClient(ast.literal_eval(process.stdout.readline()))
        assert client.take("layer.7", TIMEOUT_S).number == 7
        process.send_signal(signal.SIGSTOP)
        client.ask("layer.3")
        process.kill()
        process.wait(TIMEOUT_S)
    with pytest.raises(ActorFailure, match=r"shard layer\.3 failed: the loader died"):
        client.take("layer.3", TIMEOUT_S)
    with pytest.raises(ActorFailure, match="the loader died"):
        client.ask("layer.4")


def test_a_lease_that_cannot_be_ended_is_noticed_at_once() -> None:
    lender = Lender()
    lender.may.clear()
    client = LeaseClient(lender.server.address)
    client.ask("layer.3")
    client.release(1)
    with pytest.raises(RuntimeFailure, match="the loader broke: ValueError"):
        client.take("layer.3", TIMEOUT_S)
    with pytest.raises(ActorFailure, match="the loader died"):
        client.take("layer.3", TIMEOUT_S)
    lender.may.set()


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("message", [b"", b"\xc1", pickle.dumps(-1)], ids=["nothing", "no msgpack", "a pickle"])
def test_what_is_no_message_is_refused_and_said(message: bytes, is_late: bool) -> None:
    """Also to a client that asks when the socket has been closed."""
    client = LeaseClient(Lender().server.address)
    client._connection.send_bytes(message)
    if is_late:
        closing = select.poll()
        closing.register(client._connection, select.POLLHUP)
        assert closing.poll(TIMEOUT_S * 1000)
    with pytest.raises(RuntimeFailure, match="the loader broke"):
        client.take("layer.3", TIMEOUT_S)


def test_only_one_is_served() -> None:
    lender = Lender()
    name, key = lender.server.address
    with pytest.raises(ActorFailure, match="cannot be reached"):
        LeaseClient((name + "?", key))
    client = LeaseClient((name, key))
    with pytest.raises(ActorFailure, match="cannot be reached"):
        LeaseClient((name, key))
    assert client.take("layer.3", TIMEOUT_S).number == 1


def test_a_wrong_key_opens_nothing_and_harms_nobody() -> None:
    name, key = Lender().server.address
    with pytest.raises(ActorFailure, match="cannot be reached"):
        LeaseClient((name, b"guessed"))
    client = LeaseClient((name, key))
    assert client.take("layer.3", TIMEOUT_S).number == 1

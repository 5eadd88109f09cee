"""The turn by itself: what may begin, what a close waits for, and what it does not."""

import pytest

from llmcad_actors.errors import ActorFailure, EngineBusyError, EngineClosedError
from llmcad_actors.turn import Turn

DEADLINE_S = 30.0


def test_a_request_inside_another_is_refused_and_its_end_frees_the_turn() -> None:
    turn = Turn()
    with turn.request():
        with pytest.raises(EngineBusyError), turn.request():
            pytest.fail("it began")
        with turn.call():  # of the request, or of whoever asks for its status
            pass
    with pytest.raises(ZeroDivisionError), turn.request():
        _ = 1 / 0
    with turn.request():
        turn.close()
    for begin in (turn.request, turn.call):
        with pytest.raises(EngineClosedError), begin():
            pytest.fail("it began")


def test_what_a_call_breaks_with_is_its_own_error_until_the_close() -> None:
    turn = Turn()
    with pytest.raises(ActorFailure), turn.call():
        raise ActorFailure("died")
    with pytest.raises(EngineClosedError) as raised, turn.call():
        turn.close()
        raise ActorFailure("killed")
    assert isinstance(raised.value.__cause__, ActorFailure)

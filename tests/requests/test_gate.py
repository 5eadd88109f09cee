"""What a call breaks with is its own error, until the engine is closed."""

import pytest

from llmcad_actors.errors import ActorFailure, EngineClosedError
from llmcad_actors.requests.gate import Gate


def test_what_a_call_breaks_with_is_its_own_error_until_the_close() -> None:
    gate = Gate()
    with pytest.raises(ActorFailure), gate.call():
        raise ActorFailure("died")
    with pytest.raises(EngineClosedError) as raised, gate.call():
        gate.close()
        raise ActorFailure("killed")
    assert isinstance(raised.value.__cause__, ActorFailure)
    with pytest.raises(EngineClosedError), gate.call():
        pytest.fail("it began")

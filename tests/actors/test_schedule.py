"""What is read next, by name."""

import pytest

from llmcad_actors.actors.schedule import Schedule

ENCODER, CIRCLE = ("encoder.0", "encoder.1"), ("layer.0", "layer.1", "layer.2", "head")


def schedule(*prelude: str, streamed: tuple[str, ...] = (*ENCODER, *CIRCLE)) -> Schedule:
    made = Schedule(prelude, ENCODER, CIRCLE)
    made.stream(streamed)
    return made


def take(from_: Schedule, count: int) -> list[str]:
    return [from_.take() for _ in range(count)]


def test_the_prelude_comes_once_the_encoder_once_and_the_circle_for_ever() -> None:
    streamed = ("encoder.1", "layer.0", "layer.2")
    found = take(schedule("layer.1", "head", streamed=streamed), 7)
    assert found == ["layer.1", "head", "encoder.1", "layer.0", "layer.2", "layer.0", "layer.2"]


def test_it_turns_to_what_is_streamed_and_goes_on_from_there() -> None:
    turned = schedule(streamed=("encoder.0", "layer.0", "layer.1", "head"))
    take(turned, 2)
    assert turned.turn_to("head")
    assert take(turned, 2) == ["head", "layer.0"]
    assert turned.turn_to("encoder.0")
    assert take(turned, 3) == ["encoder.0", "layer.0", "layer.1"]


@pytest.mark.parametrize("name", ["layer.2", "layer.9"], ids=["pinned", "unknown"])
def test_it_does_not_turn_to_what_is_not_streamed(name: str) -> None:
    refusing = schedule("layer.2", streamed=("layer.0", "layer.1"))
    assert take(refusing, 2) == ["layer.2", "layer.0"]
    assert not refusing.turn_to(name)
    assert take(refusing, 2) == ["layer.1", "layer.0"]


def test_of_the_prelude_what_is_passed_over_is_left_out() -> None:
    skipping = schedule("layer.0", "layer.1", "head", streamed=("layer.2",))
    assert skipping.turn_to("layer.1")
    assert take(skipping, 3) == ["layer.1", "head", "layer.2"]


def test_what_is_streamed_may_change_between_any_two() -> None:
    changing = schedule(streamed=("layer.0", "layer.2"))
    assert changing.take() == "layer.0"
    changing.stream(("layer.0", "layer.1", "layer.2"))
    assert changing.take() == "layer.1"
    changing.stream(("layer.0",))
    assert take(changing, 2) == ["layer.0", "layer.0"]


def test_an_encoder_alone_is_read_once_and_again_when_it_is_asked_for() -> None:
    alone = schedule(streamed=ENCODER)
    for _ in range(2):
        assert take(alone, 2) == list(ENCODER)
        assert not alone.has_next()
        with pytest.raises(LookupError):
            alone.take()
        assert alone.turn_to("encoder.0")


def test_a_place_is_counted_in_its_part_of_the_pass() -> None:
    counting = schedule(streamed=("encoder.1", "layer.1", "head"))
    places = {name: counting.place_of(name) for name in ("encoder.1", "layer.1", "head", "layer.0", "")}
    assert places == {"encoder.1": (0, 1), "layer.1": (0, 2), "head": (1, 2), "layer.0": (0, 2), "": (0, 2)}

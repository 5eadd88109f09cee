"""The door, and what each part may know: Ray at the edge, torch one step in, decisions in the middle."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmcad_actors
from llmcad_actors import errors
from llmcad_actors.actors.calls import Remote
from llmcad_actors.actors.runtime import Actors

PACKAGE = Path(llmcad_actors.__file__).parent
HEAVY = ("torch", "transformers", "ray", "tokenizers", "msgpack", "psutil", "yaml", "typer", "rich")

# module -> third-party packages that importing it must not bring in
STAYS_WITHOUT = {
    "llmcad_actors": HEAVY,
    "llmcad_actors.errors": HEAVY,
    "llmcad_actors.machine.versions": HEAVY,
    "llmcad_actors.machine.limits": HEAVY,
    "llmcad_actors.ports": ("torch", "transformers", "ray"),
    "llmcad_actors.messages": ("torch", "transformers", "ray"),
    "llmcad_actors.loop": ("torch", "transformers", "ray"),
    "llmcad_actors.config": ("torch", "transformers", "ray"),
    "llmcad_actors.plan.job": ("torch", "transformers", "ray"),
    "llmcad_actors.doctor.examine": ("torch", "transformers", "ray"),
    "llmcad_actors.machine.figures": ("torch", "transformers", "ray"),
    "llmcad_actors.machine.load": HEAVY,
    "llmcad_actors.cli.commands": ("torch", "transformers", "ray", "numpy", "tokenizers", "msgpack", "psutil"),
    "llmcad_actors.storage.model_names": ("torch", "transformers", "ray"),
    "llmcad_actors.text.chat": ("torch", "transformers", "ray"),
    "llmcad_actors.families.generation_rules": ("torch", "transformers", "ray"),
    "llmcad_actors.storage.reader": ("torch", "transformers", "ray"),
    "llmcad_actors.storage.layout": ("torch", "transformers", "ray"),
    # Each of these processes would take 250 MB more with torch.
    "llmcad_actors.engine": ("torch", "transformers"),
    "llmcad_actors.actors.runtime": ("torch", "transformers"),
    "llmcad_actors.actors.coordinator": ("torch", "transformers"),
    "llmcad_actors.actors.loader": ("torch", "transformers"),
    "llmcad_actors.actors.verifier": ("torch", "transformers"),  # until it is made
    "llmcad_actors.actors.draft": ("torch", "transformers"),
} | {f"llmcad_actors.core.{file.stem}": HEAVY for file in (PACKAGE / "core").glob("*.py") if file.stem != "__init__"}
BY_WEIGHT = sorted(set(STAYS_WITHOUT.values()), key=len)

SCRIPT = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("absent", BY_WEIGHT, ids=lambda absent: f"without {len(absent)}")
def test_a_fresh_interpreter_imports_no_more_than_it_may(absent: tuple[str, ...]) -> None:
    modules = [name for name, without in STAYS_WITHOUT.items() if without == absent]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(modules)], capture_output=True, text=True, check=True, timeout=120
    )
    assert not set(json.loads(done.stdout)) & set(absent), modules


def imports_of(file: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            if node.module == "llmcad_actors":
                yield from (f"llmcad_actors.{alias.name}" for alias in node.names)
            yield node.module or ""


# A room of the house, a folder or a file at the package's root -> the rooms that it may know. From the ground up: none
# may know one that stands further down in this list.
MAY_KNOW = {
    "errors": set[str](),
    "core": {"errors"},
    "families": {"core", "errors"},
    "storage": {"core", "errors", "families"},  # the names of an architecture's tensors
    "config": {"core", "errors", "storage"},
    "machine": {"core", "errors", "storage"},
    "results": {"core"},
    "messages": {"config", "core", "errors"},
    "kernels": {"errors", "machine"},
    "text": {"core", "errors", "machine", "storage"},
    "ports": {"core", "messages"},
    "trace": {"core", "errors", "messages", "storage", "text"},
    "tools": {"core", "errors", "families", "kernels", "machine", "storage"},
    "requests": {"core", "errors", "messages", "results", "text"},
    "batch": {"core", "errors", "requests", "results", "storage"},
    "models": {"core", "errors", "families", "kernels", "machine", "messages", "ports", "storage"},
    "loop": {"core", "errors", "messages", "ports"},
    "plan": {"config", "core", "errors", "families", "machine", "storage", "text", "tools"},
    "actors": {
        *("config", "core", "errors", "kernels", "loop", "machine", "messages", "models", "plan", "ports", "storage"),
        "trace",
    },
    "doctor": {"config", "core", "errors", "kernels", "machine", "plan", "storage"},
    "engine": {
        *("actors", "config", "core", "errors", "machine", "messages", "plan", "requests", "results", "text"),
        "trace",
    },
    "__init__": {"config", "core", "engine", "errors", "requests", "results"},
    "cli": {
        *("batch", "config", "core", "doctor", "engine", "errors", "families", "machine", "plan", "requests"),
        *("results", "storage", "tools", "trace"),
    },
}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_known_to(file: Path) -> set[str]:
    known = [name.split(".") for name in imports_of(file)]
    return {parts[1] for parts in known if parts[0] == "llmcad_actors" and len(parts) > 1} - {room_of(file)}


@pytest.mark.parametrize("room", MAY_KNOW)
def test_a_room_knows_the_rooms_that_it_may(room: str) -> None:
    files = (PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    for file in files:
        assert rooms_known_to(file) <= MAY_KNOW[room], file


def test_no_arrow_runs_upward() -> None:
    order = list(MAY_KNOW)
    for room, known in MAY_KNOW.items():
        assert all(order.index(other) < order.index(room) for other in known), room


def test_the_rooms_are_these_and_the_entrance_stays_small() -> None:
    assert {room_of(file) for file in PACKAGE.rglob("*.py")} == set(MAY_KNOW)
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_ray_is_known_to_the_actors_alone() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "actors":
            assert "ray" not in {name.partition(".")[0] for name in imports_of(file)}, file


MAY_CALL_RAY = {"arena", "calls", "lean_ray", "plain_ray", "ray_check", "runtime"}


def test_what_calls_ray_is_known_and_watches_whether_ray_has_ended() -> None:
    """A call that comes later would start another Ray. The window's calls are made inside actors, where none ends."""
    for file in (PACKAGE / "actors").glob("*.py"):
        if file.stem not in MAY_CALL_RAY:
            assert "ray" not in {name.partition(".")[0] for name in imports_of(file)}, file
    assert all(
        kind is Remote for kind in (Actors.__annotations__[name] for name in ("loader", "verifier", "coordinator"))
    )
    assert Actors.__annotations__["draft"] == Remote | None


def test_the_insides_of_ray_are_known_to_the_lean_one_alone() -> None:
    """So that an engine with plain Ray does not notice when they change."""
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert ("ray._private" in text or "_raylet" in text) == (file.name == "lean_ray.py"), file
    assert not any("lean_ray" in name for name in imports_of(PACKAGE / "actors" / "plain_ray.py"))


PUBLIC = [
    "ActorFailure",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "EngineConfig",
    "Generation",
    "LlmcadError",
    "LosslessCheck",
    "MemoryCapError",
    "OverBudgetError",
    "Piece",
    "Result",
    "RuntimeFailure",
    "Stats",
    "Status",
    "StorageError",
    "TokenizerError",
    "UserError",
]


def test_the_door_has_these_names_and_no_others() -> None:
    """A name added or lost here is a change that users notice."""
    assert llmcad_actors.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(llmcad_actors, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        _ = llmcad_actors.Motor


def test_every_error_is_public() -> None:
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert all(issubclass(kind, errors.LlmcadError) for kind in kinds.values())
    assert kinds.keys() <= set(PUBLIC)

"""What short settings stand for: the target `demo`, the draft `none`, a memory cap that was not given.

The command line and `Engine.launch` both go through here, so that a word means the same in either.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmcad_actors.config import EngineConfig
from llmcad_actors.tools.bundled import DEMO, bundled_draft, demo_target

NONE = ("", "none")
MEMORY = "75%"
DEMO_MEMORY = "1.5GB"


def spelled_out(config: EngineConfig, make_demo: Callable[[], Path] = demo_target) -> EngineConfig:
    """The same settings with nothing left to interpret: target and draft are paths or names of models, or no draft.

    `demo` is the bundled target, enlarged (2.5 GB, which `make_demo` writes on first use), with the bundled draft
    unless another is named, under 1.5 GB unless another cap is named. A folder called demo is `./demo`.
    """
    is_demo = config.target == DEMO
    draft = config.draft or (str(bundled_draft()) if is_demo else None)
    memory = DEMO_MEMORY if is_demo else MEMORY
    return replace(
        config,
        target=str(make_demo()) if is_demo else config.target,
        draft=None if draft in NONE else draft,
        memory=memory if config.memory is None else config.memory,
    )

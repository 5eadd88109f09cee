from pathlib import Path

import pytest

from tests.models.checkpoints import KINDS
from tests.plain import Plain


@pytest.fixture(scope="package", params=KINDS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Each kind of tiny checkpoint, as transformers runs it."""
    kind: str = request.param
    return Plain(KINDS[kind](tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny checkpoint."""
    return KINDS["untied, grouped heads"](tmp_path_factory.mktemp("tiny"))

"""Files that are spoilt by chance are read or refused: no traceback, no long wait, no memory without reason.

`python -m tests.fuzz` runs as many as are asked for.
"""

from pathlib import Path

from tests.fuzz import cases, fuzz


def test_no_spoilt_file_breaks_the_commands(tmp_path: Path) -> None:
    tally = fuzz(list(cases(models=300, traces=60, yaml=60, seed=13)), tmp_path, say=False)
    assert not tally.failures
    assert tally.count == 420
    assert 0 < tally.accepted < 300  # most faults are seen

"""The kernels' checks in C, as `test_arm.sh` runs them on 64-bit ARM: no byte is touched that is not theirs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from llmcad_actors.kernels import library

SOURCES = [Path(__file__).parent / "check.c", Path(library.__file__).with_name("kernels.c")]
WATCHED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no compiler")
def test_the_kernels_are_right_and_stay_inside_their_arrays(tmp_path: Path) -> None:
    """With every instruction set that the machine has, and AMX emulated else; no sanitizers where gcc lacks them."""
    tiles = [] if "amx" in library.sets() else ["-DLLMCAD_EMULATED_TILES"]
    for options in (WATCHED, ["-O3"]):
        options = [*options, *tiles, "-ffp-contract=off"]
        command = ["gcc", *options, *map(str, SOURCES), "-lm", "-o", str(tmp_path / "check")]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode == 0:
            break
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = [line.partition(":")[0] for line in ran.stdout.splitlines()[:-1]]
    assert set(names) == {"portable", "amx", *library.sets()}
    assert "all right" in ran.stdout

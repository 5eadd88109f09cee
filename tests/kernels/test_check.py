"""The kernels' checks in C, as `test_arm.sh` runs them on 64-bit ARM: no byte is touched that is not theirs."""

import shutil
import subprocess
from pathlib import Path

import pytest

import llmcad_actors.kernels

SOURCES = [Path(__file__).parent / "check.c", Path(llmcad_actors.kernels.__path__[0]) / "kernels.c"]
WATCHED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no compiler")
@pytest.mark.parametrize(("defined", "checked"), [("LLMCAD", "portable"), ("LLMCAD_EMULATED_TILES", "amx")])
def test_the_kernels_are_right_and_stay_inside_their_arrays(tmp_path: Path, defined: str, checked: str) -> None:
    """With every instruction set that the machine has, and with AMX; without the sanitizers where gcc lacks them."""
    for options in (WATCHED, ["-O3"]):
        options = [*options, f"-D{defined}", "-ffp-contract=off"]
        command = ["gcc", *options, *map(str, SOURCES), "-lm", "-o", str(tmp_path / "check")]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode == 0:
            break
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{checked}: " in ran.stdout and "all right" in ran.stdout

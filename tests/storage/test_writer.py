"""What the writer writes, safetensors reads; what is not finished does not appear."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llmcad_actors.errors import StorageError
from llmcad_actors.storage.safetensors_header import read_header
from llmcad_actors.storage.writer import SafetensorsWriter

ENTRIES = [
    ("a", "F32", (3, 5)),
    ("b", "F16", (7,)),
    ("c", "BF16", (2, 2)),
    ("empty", "F32", (0, 4)),
    ("s", "F32", ()),
]
ARRAYS: dict[str, npt.NDArray[Any]] = {
    "a": np.arange(15, dtype=np.float32).reshape(3, 5),
    "b": np.arange(7, dtype=np.float16),
    "c": np.array([[0x3F80, 0x4000], [0xBF80, 0]], dtype=np.uint16),
    "empty": np.zeros((0, 4), np.float32),
    "s": np.full((), 2.5, np.float32),
}


def test_the_safetensors_library_reads_it_back(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with SafetensorsWriter(path, ENTRIES) as writer:
        assert not path.exists()
        for name, array in ARRAYS.items():
            writer.write(name, array)
    with safe_open(path, "pt") as found:
        assert found.metadata() == {"format": "pt"}
        assert found.get_tensor("c").tolist() == [[1.0, 2.0], [-1.0, 0.0]]
        for name in ("a", "b", "empty", "s"):
            np.testing.assert_array_equal(found.get_tensor(name).numpy(), ARRAYS[name])
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=5, unique=True))
def test_data_starts_64_byte_aligned_and_names_survive(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = [n for n in names if n != "__metadata__" and n.isprintable()]
    path = tmp_path_factory.mktemp("w") / "m.safetensors"
    with SafetensorsWriter(path, [(n, "F32", (2,)) for n in names]) as writer:
        for i, name in enumerate(names):
            writer.write(name, np.full(2, i, np.float32))
    header = read_header(path)
    assert list(header) == names
    assert min((i.offset for i in header.values()), default=0) % 64 == 0


def test_an_exception_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path / "m", ENTRIES) as writer:
        writer.write("a", ARRAYS["a"])
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_tensors_missing_at_close_leave_no_file_behind(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "m", ENTRIES)
    writer.write("a", ARRAYS["a"])
    with pytest.raises(ValueError, match="4 declared tensors were not written"):
        writer.close()
    writer.close()
    assert not list(tmp_path.iterdir())


def test_only_the_declared_tensor_is_taken(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "m", ENTRIES)
    for name, array in (("b", ARRAYS["b"]), ("a", ARRAYS["a"].T), ("a", ARRAYS["a"].astype(np.float64))):
        with pytest.raises(ValueError, match=r"declared is \('a', 'F32', \(3, 5\)\)"):
            writer.write(name, array)
    writer.abort()


def test_a_tensor_may_come_in_parts_but_not_beyond_its_size(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "m", [("a", "F32", (3, 5))]) as writer:
        writer.write_part("a", ARRAYS["a"][:2])
        with pytest.raises(ValueError, match="gets 80 bytes, declared are 60"):
            writer.write_part("a", ARRAYS["a"][:2])
        writer.write_part("a", ARRAYS["a"][2:])
    with safe_open(tmp_path / "m", "np") as found:
        np.testing.assert_array_equal(found.get_tensor("a"), ARRAYS["a"])


def test_a_folder_that_does_not_exist_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written: No such file"):
        SafetensorsWriter(tmp_path / "nowhere" / "m", ENTRIES)

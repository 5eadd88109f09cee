"""bf16 in numpy rounds as torch does; noise is small, finite, and looks like weights."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcad_actors.errors import CheckpointError
from llmcad_actors.storage.dtypes import Noise, convert, decode, encode

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.3895e38, 1e-40, 1.00390625, 1.01171875], np.float32)


def test_bf16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([bits.view(np.float32), SPECIAL])
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode(encode(values, "BF16"), "BF16"), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_decoding_and_encoding_again_changes_nothing(dtype: str) -> None:
    stored = Noise(1).take((100, 7), dtype)
    np.testing.assert_array_equal(encode(decode(stored, dtype), dtype), stored)
    assert convert(stored, dtype, dtype) is stored


def test_a_value_that_f16_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match="F16 cannot hold the value 70000"):
        encode(np.array([1.0, 70000.0], np.float32), "F16")


@given(dtype=st.sampled_from(["BF16", "F16", "F32"]), seed=st.integers(0, 2**32), count=st.integers(0, 50))
def test_noise_is_small_finite_and_not_zero(dtype: str, seed: int, count: int) -> None:
    values = np.abs(decode(Noise(seed).take((count, 3), dtype), dtype))
    assert values.shape == (count, 3)
    assert ((values >= 1 / 128) & (values < 1 / 32)).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_noise_has_the_spread_of_weights_and_is_reproducible(dtype: str) -> None:
    stored = Noise(3, 4).take((1000, 100), dtype)
    values = decode(stored, dtype)
    assert values.std() == pytest.approx(0.019, abs=0.001)
    assert values.mean() == pytest.approx(0, abs=0.0005)
    np.testing.assert_array_equal(stored, Noise(3, 4).take((1000, 100), dtype))
    assert not np.array_equal(stored, Noise(3, 5).take((1000, 100), dtype))

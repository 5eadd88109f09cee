"""Linear layers with widened weights: float32 sums of what is stored, rounded once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmcad_actors.models import half_weights, linear
from llmcad_actors.models.linear import chosen, converted, install, widened


def matrices(stored: torch.dtype, dtype: torch.dtype, rows: int, bias: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    weight, x = torch.randn(37, 24).to(stored), torch.randn(1, rows, 24).to(dtype)
    return x, weight, torch.randn(37).to(dtype) if bias else None  # type: ignore[return-value]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_sums_are_formed_in_float32(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, dtype: torch.dtype, bias: bool, rows: int, kernel: bool
) -> None:
    if kernel and not half_weights.available():
        pytest.skip("the kernel is not built")
    monkeypatch.setattr(half_weights, "available", lambda: kernel)
    monkeypatch.setattr(linear, "BLOCK_BYTES", 10 * 4 * 24)  # ten rows of the weight a block, seven in the last
    x, weight, offset = matrices(stored, dtype, rows, bias)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    found = widened(x, weight, offset)
    assert found.dtype == dtype and found.shape == exact.shape and found.is_contiguous()
    ulp = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=ulp, atol=ulp / 10)


def test_what_is_chosen_fits_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    for pays in (True, False):
        monkeypatch.setattr(linear, "widening_pays", lambda dtype, pays=pays: pays and dtype != torch.float32)
        assert chosen(torch.float32, torch.float32) is F.linear
        assert chosen(torch.bfloat16, torch.float32) is widened  # block by block: no float32 copy of a layer
        assert chosen(torch.bfloat16, torch.bfloat16) is (widened if pays else F.linear)
        assert chosen(torch.float16, torch.bfloat16) is (widened if pays else converted)


def test_float32_is_never_widened() -> None:
    assert not linear.widening_pays(torch.float32)


def test_installed_layers_keep_their_weights_as_stored() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)) for _ in range(2)])
    assert install(layers, widened) == {"0.weight"}
    x = torch.ones(2, 4)
    expected = [layer(x) for layer in layers]
    for layer in layers:
        layer[0].weight = nn.Parameter(layer[0].weight.bfloat16(), requires_grad=False)  # type: ignore[index]
    for layer, before in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(x), before, rtol=0.05, atol=0.05)

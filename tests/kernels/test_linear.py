"""Linear layers with widened weights: float32 sums of what is stored, rounded once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from llmcad_actors.kernels import library as kernels
from llmcad_actors.kernels import linear
from llmcad_actors.kernels.linear import chosen, converted, install, widened


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
    if kernel and not kernels.available():
        pytest.skip("the kernels are not built")
    monkeypatch.setattr(kernels, "available", lambda: kernel)
    monkeypatch.setattr(linear, "BLOCK_BYTES", 10 * 4 * 24)  # ten rows of the weight a block, seven in the last
    x, weight, offset = matrices(stored, dtype, rows, bias)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    found = widened(x, weight, offset)
    assert found.dtype == dtype and found.shape == exact.shape
    ulp = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=ulp, atol=ulp / 10)


@pytest.mark.skipif(not kernels.sets(), reason="the kernels are not built")
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_a_bfloat16_row_has_the_same_bits_whatever_stands_beside_it(rows: int) -> None:
    """They are float32's, rounded once."""
    x, weight, _ = matrices(torch.bfloat16, torch.bfloat16, rows, bias=False)
    alone = torch.cat([widened(x[:, row : row + 1].float(), weight) for row in range(rows)], dim=1)
    assert torch.equal(widened(x, weight), alone.bfloat16())


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_what_is_chosen_fits_what_is_stored(monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    monkeypatch.setattr(kernels, "available", lambda: kernel)
    for pays in (True, False):
        monkeypatch.setattr(linear, "widening_pays", lambda dtype, pays=pays: pays and dtype != torch.float32)
        assert chosen(torch.float32, torch.float32) is (widened if kernel else F.linear)  # for the same bits
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


class Router(nn.Module):
    """A module with a matrix of its own, as routers and experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, self.weight).softmax(-1)


def test_whatever_has_matrices_is_multiplied_in_the_way_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings are looked up, not multiplied: they need the computing type."""
    torch.manual_seed(0)
    layer, asked = nn.Sequential(Router(), Conv1D(5, 3), nn.Embedding(9, 2), nn.LayerNorm(2)), list[torch.Size]()

    def how(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        asked.append(weight.shape)
        return F.linear(rows, weight, bias)

    rows = torch.randn(2, 4)
    expected = layer[1](layer[0](rows))
    assert install(nn.ModuleList([layer]), how) == {"0.weight", "1.weight"}
    torch.testing.assert_close(layer[1](layer[0](rows)), expected)
    assert asked == [(3, 4), (5, 3)]


@pytest.mark.skipif(not kernels.available(), reason="the kernels are not built")
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "sigmoid", "tanh"])
@pytest.mark.parametrize("outputs", [1, 7, 88, 128])
def test_torchs_functions_after_it_give_a_row_the_same_bits_among_others(activation: str, outputs: int) -> None:
    """Of dense rows they would not: the last numbers of all are computed in another way."""
    torch.manual_seed(outputs)
    function, weight, bias = ACT2FN[activation], torch.randn(outputs, 24).bfloat16(), torch.randn(outputs)
    rows = 3 * torch.randn(1, 19, 24)
    with linear.cores(torch.float32):
        together = function(widened(rows, weight, bias))
        for row in range(19):
            assert torch.equal(function(widened(rows[:, row : row + 1], weight, bias))[0, 0], together[0, row])
    assert torch.backends.mkldnn.enabled

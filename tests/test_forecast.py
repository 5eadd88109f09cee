"""Predicted passes: from the machine's measured figures where there are any."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmcad_actors.bundled import bundled_draft, bundled_target
from llmcad_actors.core.rows import ROW_SIZES
from llmcad_actors.doctor_figures import ComputeFigures, DiskFigures, keep
from llmcad_actors.forecast import DISK_BYTES_PER_S, MATMUL_FLOPS, NOT_HIDDEN, NOT_HIDDEN_ONE_ROW, Forecaster
from tests.actors.engines import job
from tests.tiny import tiny_llama

FLOPS = {"bfloat16": {1: 2.0e9, 16: 8.0e9, 64: 16.0e9}, "float32": {1: 1.0e9, 64: 1.0e9}}
TWICE = {dtype: {rows: 2 * rate for rows, rate in rates.items()} for dtype, rates in FLOPS.items()}  # products alone
MILLION = 10**6


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model's folder on a disk of 100 MB/s, on cores with `FLOPS`."""
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "cache"))
    keep(tmp_path, DiskFigures(100e6, 2, 1 << 20, True), ComputeFigures(2, (64, 64), TWICE, 1e9, FLOPS))
    return tmp_path


def forecaster(path: Path, read_bytes: int, read_limit: float | None = None) -> Forecaster:
    return Forecaster.of(path, read_bytes=read_bytes, read_limit=read_limit, parameters=100 * MILLION, dtype="bfloat16")


def test_a_plain_pass_reads_and_computes_one_row(measured: Path) -> None:
    predicted = forecaster(measured, 300 * MILLION).plain()
    assert (predicted.rows, predicted.tokens, predicted.is_measured) == (1, 1.0, True)
    assert predicted.read_s == pytest.approx(3.0)
    assert predicted.compute_s == pytest.approx(0.1)
    assert predicted.seconds == pytest.approx(3.0 + 0.1 * NOT_HIDDEN_ONE_ROW)
    tree = forecaster(measured, 300 * MILLION).of_rows(16)
    assert tree.seconds == pytest.approx(3.0 + tree.compute_s * NOT_HIDDEN)
    assert predicted.tokens_per_second == pytest.approx(1 / predicted.seconds)


def test_a_limit_below_the_disks_rate_counts_and_one_above_it_does_not(measured: Path) -> None:
    assert forecaster(measured, 300 * MILLION, 50e6).plain().read_s == pytest.approx(6.0)
    assert forecaster(measured, 300 * MILLION, 500e6).plain().read_s == pytest.approx(3.0)


def test_the_tree_is_the_one_with_most_tokens_per_second(measured: Path) -> None:
    """A slow disk wants a large tree, a fast one a small tree."""
    slow, fast = forecaster(measured, 10_000 * MILLION).best(63), forecaster(measured, 1).best(63)
    assert slow.rows == 64 and slow.compute_s == pytest.approx(0.8)
    assert fast.rows < 64
    for chosen, source in ((slow, slow), (fast, fast)):
        others = [forecaster(measured, round(source.read_s * 100e6)).best(n - 1) for n in ROW_SIZES if n <= 64]
        assert chosen.tokens_per_second == pytest.approx(max(other.tokens_per_second for other in others))


def test_without_figures_a_usual_machine_is_assumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "empty"))
    predicted = forecaster(tmp_path, 300 * MILLION).plain()
    assert not predicted.is_measured
    assert predicted.read_s == pytest.approx(300 * MILLION / DISK_BYTES_PER_S)
    assert predicted.compute_s == pytest.approx(2 * 100 * MILLION / MATMUL_FLOPS["bfloat16"])


def test_the_plan_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "empty"))
    for draft in (None, bundled_draft()):
        prepared = job(bundled_target(), draft, max_nodes=30, read_limit="10MB/s")
        said = prepared.forecast()
        assert said["seconds_per_pass"] == prepared.predicted_pass().seconds > said["read_seconds_per_pass"] > 0
        assert said["tokens_per_second"] * said["seconds_per_pass"] == pytest.approx(said["tokens_per_pass_assumed"])
        assert (said["rows_per_pass"] == 1) is (draft is None)


def test_under_a_cap_for_one_shard_reading_and_computing_add_up(tmp_path: Path) -> None:
    """And the loader, the cost model and the prediction all know it."""
    roomy = job(tiny_llama(tmp_path), None)
    for overlaps in (True, False):
        prepared = replace(roomy, memory=replace(roomy.memory, overlaps=overlaps))
        predicted = prepared.predicted_pass()
        hidden = (1 - NOT_HIDDEN_ONE_ROW) * min(predicted.read_s, predicted.compute_s)
        expected = predicted.read_s + predicted.compute_s - (hidden if overlaps else 0.0)
        assert predicted.seconds == pytest.approx(expected)
        assert prepared.costs().overlaps == prepared.loader_spec().read_ahead == overlaps

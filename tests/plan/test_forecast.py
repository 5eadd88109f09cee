"""Predicted passes: from the machine's measured figures where there are any."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmcad_actors.config import EngineConfig
from llmcad_actors.core.budget import format_size
from llmcad_actors.core.costs import NOT_HIDDEN, NOT_HIDDEN_ONE_ROW
from llmcad_actors.core.worth import can_pay
from llmcad_actors.machine.figures import ComputeFigures, DiskFigures, remember
from llmcad_actors.plan.forecast import (
    DISK_BYTES_PER_S,
    MATMUL_FLOPS,
    MEMORY_BYTES_PER_S,
    Forecaster,
)
from llmcad_actors.plan.prediction import GUESSED_ROWS, draft_pays, first_costs, forecast, forecaster_of, predicted_pass
from llmcad_actors.plan.prepare import prepare
from llmcad_actors.plan.specs import loader_spec
from llmcad_actors.tools.bundled import bundled_draft, bundled_target
from tests.actors.engines import job
from tests.tiny import tiny_llama

FLOPS = {"bfloat16": {1: 2.0e9, 16: 8.0e9, 64: 16.0e9}, "float32": {1: 1.0e9, 64: 1.0e9}}
TWICE = {dtype: {rows: 2 * rate for rows, rate in rates.items()} for dtype, rates in FLOPS.items()}  # products alone
MILLION = 10**6


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model's folder on a disk of 100 MB/s, on cores with `FLOPS`."""
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "cache"))
    remember(tmp_path, DiskFigures(100e6, 2, 1 << 20, True), ComputeFigures(2, (64, 64), TWICE, 1e9, FLOPS))
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
        others = [forecaster(measured, round(source.read_s * 100e6)).best(n - 1) for n in range(2, 65)]
        assert chosen.tokens_per_second == pytest.approx(max(other.tokens_per_second for other in others))


def test_without_figures_a_usual_machine_is_assumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "empty"))
    predicted = forecaster(tmp_path, 300 * MILLION).plain()
    assert not predicted.is_measured
    assert predicted.read_s == pytest.approx(300 * MILLION / DISK_BYTES_PER_S)
    assert predicted.compute_s == pytest.approx(2 * 100 * MILLION / MEMORY_BYTES_PER_S)  # a row is bound by memory
    many = forecaster(tmp_path, 300 * MILLION).of_rows(128)
    assert many.compute_s == pytest.approx(2 * 128 * 100 * MILLION / MATMUL_FLOPS["bfloat16"])


def test_the_plan_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "empty"))
    for draft in (None, bundled_draft()):
        prepared = job(bundled_target(), draft, max_nodes=30, read_limit="10MB/s")
        said = forecast(prepared)
        assert said["seconds_per_pass"] == predicted_pass(prepared).seconds > said["read_seconds_per_pass"] > 0
        round_s = said["drafting_seconds_per_pass"] + said["seconds_per_pass"]
        assert said["tokens_per_second"] * round_s == pytest.approx(said["tokens_per_pass_assumed"])
        assert said["tokens_per_second"] * said["seconds_per_token"] == pytest.approx(1)
        assert (said["rows_per_pass"] == 1) is (draft is None)
        alone = predicted_pass(prepared.without_draft()).seconds_per_token
        assert said["seconds_per_token_without_draft"] == alone
        assert said["draft_pays"] is (None if draft is None else alone > said["seconds_per_token"])


def test_dear_steps_make_a_tree_slower_and_hidden_ones_do_not(measured: Path) -> None:
    free = forecaster(measured, 1000 * MILLION)
    dear, hidden = (replace(free, draft_step_s=1.0, hidden_s=hidden_s) for hidden_s in (0.0, 10.0))
    assert hidden.best(63) == free.best(63)
    chosen = dear.best(63)
    assert chosen.drafting_s == pytest.approx(1.0 * chosen.tokens)
    assert free.plain().tokens_per_second < chosen.tokens_per_second < free.best(63).tokens_per_second


def test_where_a_draft_step_takes_as_long_as_a_pass_the_plan_is_to_leave_the_draft_out(measured: Path) -> None:
    plain = forecaster(measured, 1).plain()
    assert replace(forecaster(measured, 1), draft_step_s=plain.compute_s).best(63) == plain


def test_the_plan_tells_of_a_draft_that_will_not_pay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "empty"))
    equal, small = (
        prepare(EngineConfig(target=str(bundled_target()), draft=str(draft), memory="8GB"))
        for draft in (bundled_target(), bundled_draft())
    )
    (told,) = (notice for notice in equal.notices if "draft" in notice)
    assert "the plan expects nothing of the draft" in told
    assert f"--draft none frees {format_size(equal.draft_bytes)}" in told
    assert not any("draft" in notice for notice in small.notices)
    assert forecast(equal)["draft_pays"] is False
    assert not can_pay(first_costs(equal).costs()) and can_pay(first_costs(small).costs())
    assert 0 < small.draft_bytes < equal.draft_bytes
    assert bundled_draft().joinpath("model.safetensors").stat().st_size < small.draft_bytes


def test_a_drafts_memory_may_be_worth_more_to_the_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the draft all of the target stays in memory; with it a part is read in every pass, slowly."""
    monkeypatch.setenv("LLMCAD_CACHE", str(tmp_path / "empty"))
    with_draft = job(bundled_target(), bundled_draft(), read_limit="1MB/s")
    assert with_draft.memory.streamed and not with_draft.without_draft().memory.streamed
    assert draft_pays(with_draft) is False
    assert with_draft.without_draft().memory == prepare(replace(with_draft.config, draft=None)).memory


def test_under_a_cap_for_one_shard_reading_and_computing_add_up(tmp_path: Path) -> None:
    """And the loader, the cost model and the prediction all know it."""
    roomy = job(tiny_llama(tmp_path), None)
    for overlaps in (True, False):
        prepared = replace(roomy, memory=replace(roomy.memory, overlaps=overlaps))
        predicted = predicted_pass(prepared)
        hidden = (1 - NOT_HIDDEN_ONE_ROW) * min(predicted.read_s, predicted.compute_s)
        expected = predicted.read_s + predicted.compute_s - (hidden if overlaps else 0.0)
        assert predicted.seconds == pytest.approx(expected)
        assert first_costs(prepared).overlaps == loader_spec(prepared).read_ahead == overlaps


def test_plan_and_policy_have_one_model_of_a_pass() -> None:
    """What the policy's first costs say of a pass is what the plan predicts, whichever half is the slower one."""
    for read_limit in ("10MB/s", "300MB/s", "100GB/s"):
        for overlaps in (True, False):
            roomy = job(bundled_target(), bundled_draft(), max_nodes=30, read_limit=read_limit)
            prepared = replace(roomy, memory=replace(roomy.memory, overlaps=overlaps))
            costs, forecaster = first_costs(prepared).costs(), forecaster_of(prepared)
            tree = forecaster.of_rows(GUESSED_ROWS)
            assert float(costs.pass_seconds(GUESSED_ROWS - 1)) == pytest.approx(tree.seconds)

"""The doctor's report as tables."""

from collections.abc import Iterator

from rich.table import Table

from llmcad_actors.doctor.examine import OK, PROBLEM, WARNING, Report
from llmcad_actors.machine.figures import ComputeFigures, DiskFigures

STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}


def tables(report: Report) -> Iterator[Table]:
    """The checks, then what was measured."""
    yield checks_table(report)
    if report.disk is not None:
        yield disk_table(report.disk)
    if report.compute is not None:
        yield compute_table(report.compute)


def checks_table(report: Report) -> Table:
    table = Table(title="llmcad doctor")
    table.add_column("")
    table.add_column("verdict")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for check in report.checks:
        style = STYLES[check.verdict]
        table.add_row(check.name, f"[{style}]{check.verdict}[/]", _plain(check.found), _plain(check.advice))
    return table


def disk_table(figures: DiskFigures) -> Table:
    table = Table(title=f"disk, MB/s in single reads ({figures.bytes_per_s / 1e6:.0f} sustained)")
    threads = sorted({rate.threads for rate in figures.rates})
    table.add_column("one request")
    for count in threads:
        table.add_column(f"{count} thread{'s' if count > 1 else ''}", justify="right")
    known = {(rate.threads, rate.chunk_bytes): rate.bytes_per_s for rate in figures.rates}
    for chunk in sorted({rate.chunk_bytes for rate in figures.rates}):
        cells = (known.get((count, chunk)) for count in threads)
        table.add_row(f"{chunk >> 20} MiB", *(f"{cell / 1e6:.0f}" if cell else "" for cell in cells))
    return table


def compute_table(figures: ComputeFigures) -> Table:
    """Rates, the time of one layer-sized matrix, and the rate within a whole layer."""
    rows, columns = figures.matrix
    table = Table(title=f"products with a matrix of {rows} x {columns}, {figures.threads} threads")
    table.add_column("rows", justify="right")
    for dtype in figures.matmul_flops:
        table.add_column(f"{dtype}, GFLOP/s", justify="right")
        table.add_column("ms", justify="right")
        table.add_column("in layers, GFLOP/s", justify="right")
    for count in sorted(next(iter(figures.matmul_flops.values()))):
        cells = [
            text
            for dtype, rates in figures.matmul_flops.items()
            for text in (
                f"{rates[count] / 1e9:.0f}",
                f"{figures.product_seconds(count, dtype) * 1e3:.1f}",
                f"{figures.layer_flops[dtype][count] / 1e9:.0f}",
            )
        ]
        table.add_row(str(count), *cells)
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")

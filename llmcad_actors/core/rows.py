"""How many rows a pass really runs: few sizes, and those that matmul kernels fill."""

PREFIX_ROWS = 256
"""Rows of a prompt that the draft runs at once: what they take stays small however long it is."""

ROW_SIZES: tuple[int, ...] = (1, *range(16, 161, 16), 192, 256, 320, 384, 512)


def padded_rows(rows: int) -> int:
    """The size that `rows` rows are padded to."""
    for size in ROW_SIZES:
        if rows <= size:
            return size
    return -(-rows // 256) * 256

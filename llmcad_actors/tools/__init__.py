"""Checkpoints made and kept: converted, enlarged, bundled."""

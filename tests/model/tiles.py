"""Tiles of a chosen size, so that a handful of rows and words is cut into many."""

import pytest

from rpo_megatron.model import vocab


def set_tile(patch: pytest.MonkeyPatch, rows: int, words: int, *, num_models: int = 1) -> None:
    patch.setattr(vocab, "TILE_ROWS", rows)
    patch.setattr(vocab, "TILE_BYTES", {"cpu": rows * words * 4 * num_models})

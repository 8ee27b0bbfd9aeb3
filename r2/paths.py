"""Paths of r2's own files: in a checkout, or inside an installed package."""

from pathlib import Path

_package = Path(__file__).parent
REPOSITORY = _package.parent


def _of(installed: str, checkout: str) -> Path:
    inside = _package / installed
    return inside if inside.is_dir() else REPOSITORY / checkout


CONFIGS = _of("configs", "configs")
PAPER = _of("paper", "results/paper")
RESULTS = REPOSITORY / "results"

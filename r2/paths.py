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


def script(name: str) -> str:
    """The command that runs a file of scripts/: in an installed r2 it is a module."""
    return f"python -m r2.scripts.{name}" if (_package / "scripts").is_dir() else f"python scripts/{name}.py"

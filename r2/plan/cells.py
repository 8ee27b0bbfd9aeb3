"""Which runs a table or figure needs, which of them exist, and which pretrainings they share.

An experiment in configs/experiment is a grid of overrides. Every cell is composed exactly like a run from the command
line, so both have the same directory.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hydra import initialize_config_dir
from omegaconf import OmegaConf

from r2 import record
from r2.compose import composed, grid
from r2.config import UserError, build
from r2.identity import Identity, axes, of_pretraining, of_run
from r2.paths import CONFIGS


@dataclass(frozen=True)
class Cell:
    """One run: its checked config, its identity and that of the pretraining that it starts from, if it needs one."""

    config: dict
    axes: dict
    run: Identity
    pretraining: Identity | None

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def directory(self) -> Path:
        return self.run.directory

    def finished(self, records: Path | None) -> bool:
        """Whether its record is in its own directory or in the folder `records`; one of a diverged training counts.

        Raises:
            UserError: the file there is not its record, or was altered.
        """
        places = [record.path_of(self.directory), *([records / f"{self.name}.json"] if records else [])]
        return any(record.read(path, self.name) for path in places if path.exists())

    def pretrained(self) -> bool:
        return self.pretraining is None or (self.pretraining.directory / "model.pt").exists()


def experiments() -> dict[str, Path]:
    return {path.stem: path for path in sorted((CONFIGS / "experiment").glob("*.yaml"))}


def axes_of(experiment: str) -> dict[str, str]:
    """The grid of an experiment: key to its values, as on the command line.

    Raises:
        UserError: there is no such experiment.
    """
    path = experiments().get(experiment)
    if path is None:
        raise UserError(f"unknown experiment {experiment!r}: choose from {', '.join(experiments())}")
    return {str(key): str(value) for key, value in OmegaConf.load(path).hydra.sweeper.params.items()}


def cells(names: Iterable[str], overrides: list[str]) -> list[Cell]:
    """Every run of the experiments `names`, each once, under `overrides` (key=value, or key=a,b,c).

    Raises:
        UserError: an override that no run accepts, in one line.
    """
    given = dict(override.split("=", 1) for override in overrides)
    found: dict[str, Cell] = {}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name in names:
            of_table = grid(f"{key}={value}" for key, value in axes_of(name).items())
            # Table 7 is of QNLI: asked for along with ImageNet's tables, it keeps its data and what goes with them.
            other = "data" in of_table and f"data={given.get('data')}" not in (*of_table["data"], "data=None")
            kept = ("data", "recipe", "model") if other else ()
            asked = [f"{key}={value}" for key, value in given.items() if key.partition(".")[0] not in kept]
            swept = of_table | grid(asked)
            seeds = [_seed(word.partition("=")[2]) for word in swept.pop("seed", ["seed=0"])]
            for words in itertools.product(*swept.values()):
                config = composed([f"experiment={name}", *words])
                for seed in seeds:
                    own = [f"seed={seed}" if word.startswith("seed=") else word for word in config["overrides"]]
                    cell = cell_of({**config, "seed": seed, "overrides": own})
                    found.setdefault(cell.name, cell)
    return list(found.values())


def cells_of(overrides: list[str]) -> list[Cell]:
    """The one run of a command line."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return [cell_of(composed(overrides))]


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:  # torch takes no larger one
        raise UserError(f"seed={text}: must be a whole number, 0 or more and below 2^63")
    return int(text)


def cell_of(config: dict) -> Cell:
    """The run of a checked config."""
    stage = build(config["stage"])
    columns = axes(config, stage)
    return Cell(config, columns, of_run(config, columns), None if stage.from_scratch else of_pretraining(config))


def groups(planned: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that share a pretraining together, in order; a cell without one stands alone."""
    found: dict[Identity, list[Cell]] = defaultdict(list)
    for cell in planned:
        found[cell.pretraining or cell.run].append(cell)
    return list(found.values())

"""The record of a run: all data to read, compare and repeat it, in one JSON file."""

import functools
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict, cast

from r2.config import UserError, shell_word
from r2.identity import trains
from r2.paths import REPOSITORY, script

SCHEMA = 2
_PACKAGES = ("torch", "torchvision", "aimet-torch", "hydra-core", "numpy", "scikit-learn", "transformers")


class Record(TypedDict):
    """One measured run as stored in record.json; the keys below are those that reports read.

    Attributes:
        axes: the row, column and seed that it fills in a table.
        metrics, fp32, initial: top-1 and top-5 in percent, the loss and the number of images; of the compressed model,
            of the pretrained one, and of the one that the stage began to train.
        size: bits per weight and bytes; `file_mib` of the packed file.
        sqnr_db, details: as `Outcome` has them; `details` also holds what deserves a note.
        weights: per layer, initial, pretrained and final.
        sha256: of the file of weights that the user gave, of both models' values, and of the packed file.
        overrides: the words of the command line, choices: the option of each group, config: every value.
    """

    schema: int
    name: str
    axes: dict[str, Any]
    metrics: dict[str, float]
    fp32: dict[str, float] | None
    initial: dict[str, float] | None
    size: dict[str, Any]
    sqnr_db: dict[str, float | None] | None
    details: dict[str, Any] | None
    epochs: dict[str, int]
    seconds: dict[str, float]
    images_per_second: dict[str, float | None]
    timing: dict[str, Any]
    processes: int
    train_images: int
    skipped_images: int
    weights_summary: dict[str, float]
    weights: dict[str, dict[str, dict[str, float]]]
    sha256: dict[str, str | None]
    command: str
    overrides: list[str]
    config: dict[str, Any]
    choices: dict[str, str]
    device: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    digest: str


@dataclass(frozen=True)
class Pretrained:
    """Facts about the model that a stage starts from.

    Attributes:
        weights, weights_initial: per layer, range, size, standard deviation and kurtosis, after pretraining and before.
        metrics, sha256, images_per_second, timing: None for a model that has not been trained.
        skipped_images: number of images that could not be decoded.
    """

    weights: dict[str, dict[str, float]]
    weights_initial: dict[str, dict[str, float]]
    metrics: dict[str, float] | None = None
    seconds: float = 0.0
    images_per_second: float | None = None
    timing: dict[str, float] | None = None
    sha256: str | None = None
    skipped_images: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of a stage, as far as the record needs it.

    Attributes:
        metrics, initial: of the compressed model, and of the one that the stage began to train.
        epochs: of the stage's own training.
        seconds: by phase.
        sqnr_db: per layer, the signal-to-quantization-noise ratio of its output.
        details: other facts that the method reports.
    """

    metrics: dict[str, float]
    initial: dict[str, float] | None = None
    epochs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    timing: dict[str, float] | None = None
    sqnr_db: dict[str, float] | None = None
    details: dict[str, Any] | None = None


def weights_summary(weights: dict[str, dict[str, float]]) -> dict[str, float]:
    """Over the layers: the largest |w|, the mean range and the mean kurtosis."""
    known = [layer["kurtosis"] for layer in weights.values() if not math.isnan(layer["kurtosis"])]
    return {
        "max_abs": max(layer["max_abs"] for layer in weights.values()),
        "range": sum(layer["range"] for layer in weights.values()) / len(weights),
        "kurtosis": sum(known) / len(known) if known else 0.0,
    }


def command(config: dict) -> str:
    """A command line that repeats the run: one printable line, whatever its values hold."""
    return " ".join(map(shell_word, ["python", "-m", "r2.run", *config["overrides"]]))


def provenance(device: Any) -> dict:
    """Where and with what a run was made."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": {
            "type": device.type,
            "name": name,
            "machine": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),  # rounding depends on them
            "threads": torch.get_num_threads(),
        },
        "versions": versions,
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's model where the system tells it (Linux: /proc/cpuinfo), else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


@functools.cache
def commit() -> str | None:
    """The checkout's commit, with '+' if its files differ or r2 or configs have new ones; None outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY.resolve():
            return None  # r2 is installed in a folder of somebody's own checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        changed = changed or git("ls-files", "--others", "--exclude-standard", "r2", "configs")  # a method of one's own
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def check_packed(found: Record, packed: Path) -> None:
    """Refuse a packed file, if it is still there, that is damaged or another record's.

    Raises:
        UserError: its sha256 is not the record's.
    """
    from r2.store import sha256_of

    sha256 = found["sha256"].get("packed")  # the oldest records have none
    if sha256 and packed.exists() and sha256_of(packed) != sha256:
        raise UserError(
            f"{packed}: is not the file that record.json tells of, or damaged (sha256); force=true runs the stage again"
        )


def reused() -> str:
    """What to add where something finished is taken, since names of runs hold options and no code."""
    changed = (commit() or "").endswith("+")
    return "; the code has uncommitted changes: out=DIR starts anew with them" if changed else ""


def _mib(path: Path) -> float | None:
    return round(path.stat().st_size / 2**20, 4) if path.exists() else None


def finite(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def paths(folder: Path) -> list[Path]:
    """Of every record under `folder`: <run>/record.json, or diverged.json of runs that have none, and collected
    ones: records/*.json or, where there is no such folder, its own *.json.
    """
    patterns = ("*/record.json", "*/diverged.json", "records/*.json" if (folder / "records").is_dir() else "*.json")
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return [path for path in sorted(found) if path.name != "diverged.json" or path == path_of(path.parent)]


def find(folder: Path) -> list[Record]:
    """Every record under `folder`.

    Raises:
        UserError: a file is not a record.
    """
    return [read(path) for path in paths(folder)]


def path_of(directory: Path) -> Path:
    """The path of a run's record: record.json, or diverged.json if every training of it diverged."""
    record, diverged = directory / "record.json", directory / "diverged.json"
    return diverged if diverged.exists() and not record.exists() else record


def read_all(folder: Path) -> list[Record]:
    """As `find`.

    Raises:
        UserError: there is none, or a file is not a record.
    """
    records = find(folder)
    if not records:
        raise UserError(f"{folder}: holds no record; run an experiment with out={folder} first")
    return records


def read(path: Path, name: str | None = None) -> Record:
    """One record; with `name`, of the run of that name.

    Raises:
        UserError: it is none of this version of r2, was altered after it was written, or is another run's.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not a record ({error}); move it away to run again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: is not a record of this version of r2; {script('convert_records')} DIR converts those of an "
            "earlier one, or move it away to run again"
        )
    if found.get("digest") != digest(found):
        raise UserError(f"{path}: altered after it was written (sha256); move it away to run again")
    if name is not None and found["name"] != name:
        raise UserError(f"{path}: is the record of {found['name']}; move it away to run again")
    return cast(Record, found)


def of_diverged(
    config: dict,
    axes: dict,
    directory: Path,
    pretrained: Pretrained | None,
    untrained: tuple[Any, Pretrained],
    size: Mapping[str, Any],
    reason: Exception,
    data: Any,
    world: Any,
) -> Record:
    """The record of a run whose training diverged: its accuracy is chance, the reason is in details.

    Args:
        pretrained: None where pretraining itself diverged.
        untrained: the model before any training, and what is known of it.
        size: of that model.
    """
    top1, top5 = (100 * min(1.0, guesses / data.num_classes) for guesses in (1, 5))
    chance = {"loss": math.log(data.num_classes), "top1": top1, "top5": top5, "images": data.val_images}
    model, begun = untrained
    pretrained = pretrained or replace(begun, metrics=chance)
    outcome = Outcome(chance, details={"diverged": str(reason)})
    # This rank's own count: the others may not know yet that the run has ended.
    return make(config, axes, directory, pretrained, model, size, outcome, data, data.skipped, world)


def make(
    config: dict,
    axes: dict,
    directory: Path,
    pretrained: Pretrained,
    model: Any,
    size: Mapping[str, Any],
    outcome: Outcome,
    data: Any,
    skipped: int,
    world: Any,
) -> Record:
    """Gather a run's record; `size` is of pack.size(model), `skipped` images could not be decoded since pretraining."""
    from r2 import store
    from r2.regularizers import describe

    packed, final = directory / "model.safetensors", describe(model)
    found = finite(
        {
            "schema": SCHEMA,
            "name": directory.name,
            "axes": axes,
            "metrics": outcome.metrics,
            "fp32": pretrained.metrics,
            "initial": outcome.initial,
            "size": {**size, "file_mib": _mib(packed)},
            "sqnr_db": outcome.sqnr_db,
            "details": _details(outcome),
            "epochs": {
                "pretrain": config["recipe"]["epochs"] if pretrained.metrics and trains(config) else 0,
                "stage": outcome.epochs,
            },
            "seconds": {"pretrain": pretrained.seconds, **outcome.seconds},
            "images_per_second": {
                "pretrain": pretrained.images_per_second,
                "stage": outcome.images_per_second,
            },
            "timing": {"pretrain": pretrained.timing, "stage": outcome.timing},
            "processes": world.size,
            "train_images": data.train_images,
            "skipped_images": pretrained.skipped_images + skipped,
            "weights_summary": weights_summary(pretrained.weights if pretrained.metrics else final),
            "weights": {"initial": pretrained.weights_initial, "pretrained": pretrained.weights, "final": final},
            "sha256": {
                "weights": config["weights"] and config["weights"]["sha256"],  # of the file that all began with
                "pretrained": pretrained.sha256,
                "final": store.digest(model.state_dict()),
                "packed": store.sha256_of(packed) if packed.exists() else None,  # rank 0 writes it
            },
            "command": command(config),
            "overrides": config["overrides"],
            "config": {k: v for k, v in config.items() if k not in ("choices", "overrides")},
            "choices": config["choices"],
            **provenance(world.device),
        }
    )
    found = json.loads(json.dumps(found, default=str))  # as it will be read
    return cast(Record, {**found, "digest": digest(found)})


def _details(outcome: Outcome) -> dict | None:
    """The method's details, and the layers whose output is mostly noise: no accuracy should depend on those."""
    lost = [name for name, ratio in (outcome.sqnr_db or {}).items() if not ratio >= 1.0]
    return {**(outcome.details or {}), "below_1_db": lost} if lost else outcome.details


def digest(found: Mapping[str, Any]) -> str:
    """sha256 of a record without its own; a change by hand, or a merge, shows."""
    text = json.dumps({key: value for key, value in found.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

"""Run directories: one writer at a time, atomic writes, checkpoints that are verified when read."""

import contextlib
import csv
import hashlib
import io
import json
import os
import pickle
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from r2 import console
from r2.config import UserError, first_line
from r2.dist import World

_MEND = "; delete it to start again"


def make_directory(path: Path, key: str = "out") -> Path:
    """Create `path`, which the user gave as `key`, and check that it can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write to {path} ({error.strerror}); choose another with {key}=DIR") from None
    return path


def write(path: Path, data: bytes) -> None:
    """Write all of `data` or nothing, durably.

    Raises:
        UserError: no space or no permission; what stood there before is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it first") from None
        raise UserError(
            f"cannot write {path} ({error.strerror}); what was saved before is intact: "
            "make room and start the same command again to go on"
        ) from None


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=1, allow_nan=False, default=str) + "\n").encode())


def save(path: Path, state: dict) -> None:
    """A checkpoint of tensors and plain values; the one before it stays as `*.previous`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if path.exists():
        # A hard link keeps the old one under both names until the new one replaces it.
        previous = path.with_suffix(".previous")
        with contextlib.suppress(OSError):
            previous.unlink(missing_ok=True)
            os.link(path, previous)
    write(path, buffer.getvalue())


def load(path: Path, *needed: str) -> dict:
    """Read a checkpoint, with weights_only and its checksums verified (torch.load does not verify them).

    Args:
        needed: what it has to hold; `info` tells a finished model from a half-trained one, and its sha256 is compared.

    Raises:
        UserError: truncated, altered or not such a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise UserError(f"{path}: is damaged{_MEND}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a checkpoint of r2, for it holds more than tensors and plain values{_MEND}"
        ) from None
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{path}: not a checkpoint of r2 ({reason}){_MEND}") from None
    if not isinstance(state, dict) or state.get("format") != "r2":
        raise UserError(f"{path}: not a checkpoint of r2{_MEND}")
    if missing := [name for name in needed if name not in state]:
        raise UserError(f"{path}: another kind of checkpoint, without {missing[0]!r}{_MEND}")
    if "info" in state and digest(state["model"]) != state["info"]["sha256"]:
        raise UserError(f"{path}: altered, its weights do not match its sha256{_MEND}")
    return state


def load_latest(path: Path, say: Any, *needed: str) -> dict | None:
    """The newest readable checkpoint: `path`, else the one before it, else None; `needed` as for `load`."""
    found = [p for p in (path, path.with_suffix(".previous")) if p.exists()]
    errors: list[str] = []
    for candidate in found:
        try:
            state = load(candidate, *needed)
        except UserError as error:
            errors.append(str(error).removesuffix(_MEND))
            continue
        for line in errors:
            say(f"{line}; resuming from {candidate.name}")
        return state
    if len(errors) > 1:
        raise UserError(f"{', and '.join(errors)}; delete both to start again")
    if errors:
        raise UserError(errors[0] + _MEND)
    return None


def remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def digest(state: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes of a state dict, in its order."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        array = tensor.detach().cpu().contiguous()
        total.update(f"{name} {tuple(array.shape)} {array.dtype}\n".encode())
        total.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


@contextlib.contextmanager
def lock(directory: Path, world: World, say: Any) -> Iterator[None]:
    """Hold `directory` for all ranks; waits for another process, naming it. The system frees a dead holder's lock."""
    handle = FileLock(directory / ".lock")
    waiting = False
    while True:
        taken = False
        if world.main:
            try:
                # A short try, so that no collective call of the other ranks outlasts its timeout.
                handle.acquire(timeout=10 if waiting else 0)
                taken = True
            except Timeout:
                if not waiting:
                    say(f"waiting for {_owner(directory)}, which is working on {directory}")
            except OSError as error:
                raise UserError(f"cannot lock {directory} ({error.strerror}); choose another with out=DIR") from None
        if world.broadcast(taken):
            break
        waiting = True
    try:
        if world.main:
            remove(*directory.glob(".*.part"))  # of a run that was killed
            with contextlib.suppress(OSError):  # a full disk is reported when something is lost by it
                _owner_file(directory).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        if world.main:
            with contextlib.suppress(OSError):
                _owner_file(directory).unlink()
            handle.release()
            with contextlib.suppress(OSError):  # another one has just come
                if [path.name for path in directory.iterdir()] == [".lock"]:  # of a run that was refused
                    (directory / ".lock").unlink()
                    directory.rmdir()


def holder(directory: Path) -> str | None:
    """Who holds `directory` at this moment, by its own words; None if nobody does."""
    path = directory / ".lock"
    if not os.access(path, os.W_OK):
        return None
    try:
        with FileLock(path, timeout=0):
            return None
    except Timeout:
        return _owner(directory)


def _owner(directory: Path) -> str:
    try:
        return _owner_file(directory).read_text().strip() or "another process"
    except OSError:
        return "another process"


def _owner_file(directory: Path) -> Path:
    return directory / ".owner"


@dataclass
class Run:
    """Where one piece of work writes, and who takes part in it.

    Attributes:
        directory: its own; `key` is the fingerprint of the config it was made for.
        log: receives each epoch's row of metrics.
    """

    directory: Path
    key: str
    world: World
    seed: int
    checkpoint_seconds: float
    log: Callable[[dict], Any]

    def say(self, text: str) -> None:
        if self.world.main:
            console.say(text)

    def checkpoint(self, phase: str) -> Path:
        return self.directory / f"{phase}.ckpt"

    def resume(self, phase: str) -> dict | None:
        """The state that `save_state` left, on the CPU."""
        state = load_latest(self.checkpoint(phase), self.say, "key", "position")
        return None if state is None else self._own(self.checkpoint(phase), state)

    def finished(self) -> dict:
        """The finished model and its `info`, on the CPU."""
        path = self.directory / "model.pt"
        return self._own(path, load(path, "key", "model", "info"))

    def _own(self, path: Path, state: dict) -> dict:
        if state["key"] != self.key:
            raise UserError(
                f"{path}: belongs to another config ({state['key']}, this run is {self.key}); "
                "delete it, or choose another out=DIR"
            )
        return state

    def save_state(self, phase: str, **state: Any) -> None:
        if self.world.main:
            save(self.checkpoint(phase), {"format": "r2", "key": self.key, **state})

    def write_curve(self, phase: str, rows: list[dict]) -> None:
        """curve-<phase>.csv, one row per epoch, rewritten whole so that a resumed run repeats none."""
        if self.world.main and rows:
            text = io.StringIO()
            # Rows from before an update of r2 may have fewer columns.
            writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
            write(self.directory / f"curve-{phase}.csv", text.getvalue().encode())

    def finish(self, model: nn.Module, found: Mapping[str, Any]) -> None:
        """Write the final weights and then the record, whose presence marks the run as finished."""
        if self.world.main:
            save(self.directory / "model.pt", {"format": "r2", "key": self.key, "model": model.state_dict()})
            write_json(self.directory / "record.json", found)
            for path in (*self.directory.glob("*.ckpt"), *self.directory.glob("*.previous")):
                remove(path)
            (self.directory / "diverged.json").unlink(missing_ok=True)  # of an earlier version, or repeated by force
        self.world.barrier()

    def note_diverged(self, found: Mapping[str, Any]) -> None:
        """The record of a training that diverged: of a table's run, a result at chance; r2.run tries again."""
        if self.world.main:
            write_json(self.directory / "diverged.json", found)

"""What a phase of training saves, and how it goes on from there."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from r2.config import UserError
from r2.data.batches import Data
from r2.dist import World
from r2.regularizers import Regularizer
from r2.store import Run
from r2.timing import Timing


@dataclass
class Position:
    """How far a phase is: next step, and sums over the epoch (loss, correct, images, penalty)."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    rows: list[dict] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)


def mend(keys: str) -> str:
    """What to do about a training that diverges, by the group whose keys are in force."""
    return f"Lower {keys}.lr, or set a smaller {keys}.clip_norm; the last checkpoint is kept"


def check_weights(state: dict[str, Tensor], phase: str, keys: str) -> None:
    """
    Raises:
        UserError: a weight or a buffer is not finite, and a run could not go on from it.
    """
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{phase}: {name} is not finite any more. {mend(keys)}")


def made_with(data: Data, world: World) -> dict[str, str]:
    """What a phase has to be resumed with, and after it what it had better be resumed with."""
    return {"data": data.fingerprint(), "torch": str(torch.__version__), "processes": str(world.size)}


def compare(now: dict[str, str], before: dict[str, str], run: Run, phase: str) -> None:
    """
    Raises:
        UserError: the data are not those of the checkpoint: the order of an epoch would be another one.
    """
    changed = {name: value for name, value in before.items() if value != now[name]}
    if "data" in changed:
        raise UserError(
            f"{run.checkpoint(phase)}: was made with other data ({before['data']}; now {now['data']}); "
            "put them back, or delete it to start again"
        )
    for name, value in changed.items():
        run.say(f"{phase}: begun with {name} {value}, goes on with {now[name]}; equal up to rounding")


def state_of(
    position: Position,
    model: nn.Module,
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
    regularizer: Regularizer | None,
) -> dict:
    return {
        "position": asdict(position),
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "scaler": scaler.state_dict(),
        "regularizer": regularizer.state_dict() if regularizer is not None else None,
    }


def restore(
    state: dict,
    model: nn.Module,
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
    regularizer: Regularizer | None,
) -> Position:
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])
    if regularizer is not None:
        regularizer.load_state_dict(state["regularizer"])
    saved = state["position"]
    return Position(**{**saved, "timing": Timing(**saved.get("timing", {}))})  # an older version saved none

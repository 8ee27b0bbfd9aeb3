"""The model card beside an export: README.md in the Hugging Face hub's format, generated from model_card.json.

The JSON lists every file of the run that was exported into its folder. The license is `unknown` until it is filled in
there. A README that was edited, or that existed before, is not overwritten.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import yaml

from r2 import store
from r2.config import UserError
from r2.identity import trains
from r2.record import Record

_PAPER = "https://arxiv.org/abs/2303.08253"


def write(
    path: Path,
    target: str,
    runtime: str,
    found: Record,
    checked: dict[str, Any] | None,
    command: str,
    preprocessing: dict[str, Any] | None = None,
) -> bool:
    """Enter the exported file `path` into its folder's card.

    Args:
        target: its kind, as in r2.export.TARGETS; runtime: what runs it.
        found: the record of the run that it comes from.
        checked: what r2.export.check returned.
        command: that exported it.
        preprocessing: image_size and, where they are known, mean and std of the pixels in 0..1.

    Returns:
        Whether README.md was written; not where it is somebody's own.

    Raises:
        UserError: model_card.json is none of r2's; a file cannot be written.
    """
    card_path, readme = path.parent / "model_card.json", path.parent / "README.md"
    before = read(path.parent)
    same = before.get("run") == found["name"]
    card = _facts(found) | ({"license": before["license"], "files": before["files"]} if same else {"files": {}})
    # Without the data, what an export with them has said stays.
    known = same and "mean" not in (preprocessing or {})
    card["preprocessing"] = before.get("preprocessing", preprocessing) if known else preprocessing
    card["files"][path.name] = {
        "target": target,
        "runtime": runtime,
        "bytes": size(path),
        "top1": checked and checked[f"{target}_top1"],
        "equal_predictions": checked and checked["equal_predictions"],
        "images": checked and checked["images"],
        "command": command,
        "machine": platform.machine(),
    }
    text = render(card)
    own = readme.exists() and _sha256(readme.read_bytes()) != before.get("readme_sha256")
    card["readme_sha256"] = before.get("readme_sha256") if own else _sha256(text.encode())
    if not own:
        store.write(readme, text.encode())
    store.write_json(card_path, card)
    return not own


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def render(card: dict[str, Any]) -> str:
    """The README: YAML as huggingface_hub.ModelCardData writes it, and a page in Markdown."""
    task = "text-classification" if card["data"]["name"] == "qnli" else "image-classification"
    dataset = {"type": card["data"]["name"], "name": card["data"]["name"], "split": "validation"}
    results = [
        {
            "task": {"type": task},
            "dataset": dataset,
            "metrics": [{"type": "accuracy", "value": round(file["top1"] / 100, 6), "name": f"top-1 of {name}"}],
        }
        for name, file in card["files"].items()
        if file["top1"] is not None
    ]
    front = {
        "license": card["license"],
        "library_name": "r2",
        "pipeline_tag": task,
        "tags": ["r2", card["method"]["stage"], *sorted({file["target"] for file in card["files"].values()})],
        "metrics": ["accuracy"],
        **({"model-index": [{"name": card["run"], "results": results}]} if results else {}),
    }
    method = card["method"]
    bits = "weights" if method["dim"] in (None, 1) else f"every {method['dim']} weights"
    bits = f"{bits} in {method['weight_bits']} bits" if method["weight_bits"] else "weights in float"
    bits += f", activations in {method['act_bits']} bits" if method["act_bits"] else ", activations in float"
    rows = [
        f"| {name} | {file['bytes']:,} | {file['runtime']} | "
        + (
            "not measured | |"
            if file["top1"] is None
            else f"{file['top1']:.2f} % | {file['equal_predictions']:.2f} % |"
        )
        for name, file in card["files"].items()
    ]
    before = "" if card["fp32_top1"] is None else f"; before compression it was {card['fp32_top1']:.2f} %"
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {card['run']}\n",
        f"{card['architecture']}{_origin(card)} compressed by {method['stage']} ({bits}).\n",
        *_input(card["preprocessing"]),
        "| File | Bytes | Runs in | Top-1, measured on the file | Predictions equal to PyTorch's |",
        "|---|---|---|---|---|",
        *rows,
        f"\nTop-1 is over {card['data']['val_images']:,} validation images{before}. Made by\n",
        *(f"    {line}" for line in [card["command"], *(file["command"] for file in card["files"].values())]),
        "\n## To fill in\n",
        f"- License of the model: {card['license']}\n- License of the data:\n- Intended use:\n- Limitations:",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _origin(card: dict[str, Any]) -> str:
    """Where the weights come from."""
    weights, paper = card["weights"], f"[R^2: Range Regularization for Model Compression and Quantization]({_PAPER})"
    file = weights and f"{weights['source']} (sha256 {weights['sha256'][:8]})"
    if weights and not weights["trained"]:
        return f" with the weights of {file}, unchanged by a regularizer, and"
    begun = f" from the weights of {file}" if weights else ""
    regularizer = card["method"]["regularizer"]
    return f", trained on {card['data']['name']}{begun} with the regularizer {regularizer} as in {paper}, and"


def _input(preprocessing: dict[str, Any] | None) -> list[str]:
    if not preprocessing:
        return []
    text = "Input: RGB images of {}x{} (height, width)".format(*preprocessing["image_size"])
    if "mean" in preprocessing:
        mean, std = (", ".join(map(str, preprocessing[name])) for name in ("mean", "std"))
        text += f", pixels in 0..1, normalised by subtracting the mean ({mean}) and dividing by the std ({std})"
    return [text + ".\n"]


def _facts(found: Record) -> dict[str, Any]:
    """What the card says of the run."""
    axes, config = found["axes"], found["config"]
    weights = config.get("weights")  # an older record has none
    return {
        "run": found["name"],
        "license": "unknown",
        "architecture": axes["model"],
        "model": config["model"],
        "weights": weights
        and {
            "source": weights["source"],
            "sha256": weights["sha256"],
            "trained": trains(config) or config["stage"].get("from_scratch", False),
        },
        "method": {
            "stage": axes["stage"],
            "regularizer": axes["reg"],
            **{key: axes.get(key) for key in ("weight_bits", "act_bits", "dim")},
            "bits_per_weight": found["size"]["bits_per_weight_all"],
        },
        "data": {"name": axes["data"], "val_images": found["metrics"]["images"]},
        "top1": found["metrics"]["top1"],
        "fp32_top1": found["fp32"] and found["fp32"]["top1"],
        "command": found["command"],
        "commit": found["commit"],
        "versions": found["versions"],
    }


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's model_card.json; {} if there is none.

    Raises:
        UserError: it is none of r2's.
    """
    path = folder / "model_card.json"
    if not path.exists():
        return {}
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError):
        card = None
    if not isinstance(card, dict) or "readme_sha256" not in card:
        raise UserError(f"{path}: is no model card of r2; move it away, or export elsewhere with --out")
    return card


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

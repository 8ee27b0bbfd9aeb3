"""Where files come from that r2 does not make: a checkpoint of the user's, torchvision's weights, the Hugging Face hub.

Imports no torch.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any, Literal

from r2.config import UserError

# torchvision's names carry the start of the file's sha256, so a plan knows a file that is not there yet. MobileNet-V2's
# first weights, not its second: those are for images resized to 232 pixels, these for 256, as in r2's evaluation.
TORCHVISION = {"resnet18": "resnet18-f37072fd.pth", "mobilenet_v2": "mobilenet_v2-b0353104.pth"}
_HUB = "hf_hub:"
_SAVED = ("model.safetensors", "pytorch_model.bin")  # what transformers' save_pretrained calls its file


def settle(given: dict, network: str) -> dict | None:
    """What `model.weights` names, settled once so that everything after speaks of the same content; None of null.

    Args:
        given: the keys of r2.config.Weights.
        network: the model's function.

    Returns:
        source: as the user says it. file: its path, None of torchvision's. sha256: of the content, of torchvision's its
        start. trained: whether pretraining goes on from it. new_head: whether its last layer is left out.

    Raises:
        UserError: there is no such file.
    """
    source, new_head = given["weights"], given["reset_head"]
    trained = new_head or given["finetune"]  # a new head is worth nothing before it is trained
    if source is None:
        for key in ("finetune", "reset_head"):
            if given[key]:
                raise UserError(f"model.{key}=true: is for weights of your own; add model.weights=FILE")
        return None
    file = None
    if source == "torchvision":
        if network not in TORCHVISION:
            raise UserError(f"model.weights=torchvision: it has none of {network}, only of {' and '.join(TORCHVISION)}")
        sha256 = sha256_of_torchvision(network)
    else:
        file = str(_of_hub(source) if source.startswith(_HUB) else _on_disk(Path(source)))
        sha256 = _sha256(source, file)
    return {"source": source, "file": file, "sha256": sha256, "trained": trained, "new_head": new_head}


def sha256_of_torchvision(network: str) -> str:
    """The first eight hex digits, which the file's name carries."""
    return Path(TORCHVISION[network]).stem.rpartition("-")[2]


def _sha256(source: str, file: str) -> str:
    try:
        stat = Path(file).stat()
        return _sha256_of(file, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise UserError(
            f"model.weights={source}: cannot be read ({error.strerror}); it is a file, a folder of save_pretrained, "
            f"torchvision or {_HUB}REPO/FILE"
        ) from None


@functools.lru_cache
def _sha256_of(file: str, changed: int, size: int) -> str:
    """Of a sweep's jobs, the first reads the file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _on_disk(path: Path) -> Path:
    """The path, or the file in it where it is a folder of save_pretrained."""
    return next((path / name for name in _SAVED if (path / name).is_file()), path)


@functools.cache
def _of_hub(source: str) -> Path:
    """The file of hf_hub:OWNER/NAME/FILE, downloaded, or in the cache."""
    owner, _, rest = source.removeprefix(_HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise UserError(f"model.weights={source}: is {_HUB}OWNER/NAME/FILE")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(f"model.weights={source}: needs huggingface_hub: pip install huggingface_hub") from None
    by_hand = f"hf download {owner}/{name} {file} --local-dir DIR, then here model.weights=DIR/{file}"
    missing = f"model.weights={source}: is not in the hub's cache"
    path = fetch(f"{owner}/{name}", "main", [file], "model", missing, by_hand) / file
    if not path.is_file():
        raise UserError(f"model.weights={source}: the hub's {owner}/{name} has no such file")
    return path


def need_extra() -> None:
    """Look for the extra `nlp`.

    Raises:
        UserError: one of its packages is missing.
    """
    try:
        import pyarrow  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"MobileBERT and QNLI need {error.name}: pip install 'r2[nlp]'") from None


def fetch(
    name: str, revision: str, patterns: list[str], kind: Literal["model", "dataset"], missing: str, by_hand: str
) -> Path:
    """A folder with the repository's files that fit `patterns`, downloaded, or in the cache of a machine offline.

    Args:
        revision: a commit, for what is to stay the same.
        missing, by_hand: for the error: what was looked for before; the command that downloads, and the key to set.

    Raises:
        UserError: it cannot be downloaded and is not in the cache; says what to download and where to put it.
    """
    from huggingface_hub import HfApi, logging, snapshot_download
    from huggingface_hub.errors import HFValidationError

    logging.set_verbosity_error()
    wanted: dict[str, Any] = {"repo_type": kind, "revision": revision, "allow_patterns": patterns}
    try:
        # Fails at once where there is no network; the download itself would first try for 20 s.
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10)
        return Path(snapshot_download(name, **wanted))
    except HFValidationError:
        raise UserError(f"{missing}, and no name of a repository on the hub") from None
    except Exception as error:  # of the HTTP library, the hub, or the disk
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
    try:
        return Path(snapshot_download(name, **wanted, local_files_only=True))
    except OSError:
        raise UserError(
            f"{missing}, and {name} cannot be downloaded ({reason}); where there is a network: {by_hand}"
        ) from None

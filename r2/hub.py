"""Sources of networks and files: timm, torchvision, the Hugging Face hub, the user.

Does not import torch.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from r2.config import UserError, first_line
from r2.hints import nearest

# torchvision's names carry the start of the file's sha256, so a plan knows a file that is not there yet. MobileNet-V2's
# first weights, not its second: those are for images resized to 232 pixels, these for 256, as in r2's evaluation.
TORCHVISION = {"resnet18": "resnet18-f37072fd.pth", "mobilenet_v2": "mobilenet_v2-b0353104.pth"}
_HUB = "hf_hub:"
MEAN_AND_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, of pixels in [0, 1]
_SAVED = ("model.safetensors", "pytorch_model.bin")  # what transformers' save_pretrained calls its file
VOCABULARY = ("vocab.txt", "tokenizer.json")
SAVED_FILES = ("config.json", "tokenizer_config.json", *VOCABULARY, *_SAVED)  # what MobileBERT is read from


def check_name(library: str, name: str) -> None:
    """Look for a network among the library's names, without building it.

    Raises:
        UserError: it is none of them, or timm is missing.
    """
    if name in (known := _names(library)):
        return
    bare, dot, tag = name.partition(".")
    if dot and bare in known:
        more = f" and model.weights=hf_hub:timm/{name}/model.safetensors" if library == "timm" else ""
        raise UserError(f"model.name={name}: .{tag} names weights, not a network; take model.name={bare}{more}")
    near = nearest(name, {one: one for one in known})
    if near:
        said = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        begun = {one: len(os.path.commonprefix([one, name.lower()])) for one in known}
        others = sorted((one for one in known if begun[one] >= 3), key=lambda one: -begun[one])[:5]
        said = f"similar names are {', '.join(others)}" if others else f"it has {len(known)} others"
    raise UserError(f"model.name={name}: {library} has no such network; {said}")


def _names(library: str) -> list[str]:
    if library == "torchvision":
        from torchvision import models

        return models.list_models(module=models)
    try:
        from timm import list_models
    except ImportError:
        raise UserError("model=timm needs timm: pip install 'r2[timm]'") from None
    return list_models()


def settle(given: dict, model: dict) -> dict | None:
    """Resolve `model.weights` once, so that all later code uses the same content; None for null.

    Args:
        given: the keys of r2.config.Weights.
        model: the model's other keys.

    Returns:
        source: as the user gave it. file: its path, None for torchvision's. sha256: of the content, for torchvision's
        its beginning. trained: whether the weights are trained further. new_head: whether its last layer is left out.

    Raises:
        UserError: there is no such file.
    """
    source, new_head = given["weights"], given["reset_head"]
    trained = new_head or given["finetune"]  # a new head is worth nothing before it is trained
    if source is None:
        for key in ("finetune", "reset_head"):
            if given[key]:
                raise UserError(f"model.{key}=true: has no effect without model.weights; add model.weights=FILE")
        return None
    file = None
    if source == "torchvision":
        sha256 = sha256_of_torchvision(torchvision_file(model))
    else:
        if source == "timm" and model["_target_"] == "r2.zoo.timm":
            file = str(_of_timm(model["name"], trained))
        else:
            file = str(_of_hub(source) if source.startswith(_HUB) else _on_disk(Path(source)))
        sha256 = _sha256(source, file, _sources(model))
    return {"source": source, "file": file, "sha256": sha256, "trained": trained, "new_head": new_head}


def torchvision_file(model: dict) -> str:
    """The name of the file with torchvision's weights, which ends in the start of its sha256.

    Raises:
        UserError: it has none of this network.
    """
    network = model["_target_"].rpartition(".")[2]
    if model["_target_"] == "r2.zoo.torchvision":
        from torchvision.models import get_model_weights

        found = getattr(get_model_weights(model["name"]), "IMAGENET1K_V1", None)
        if found is None:
            raise UserError(f"model.weights=torchvision: it has no IMAGENET1K_V1 weights of {model['name']}")
        return found.url.rpartition("/")[2]
    if network not in TORCHVISION:
        raise UserError(
            f"model.weights=torchvision: it has none of {network}, only of {' and '.join(TORCHVISION)}; "
            f"take {_sources(model)}"
        )
    return TORCHVISION[network]


def _sources(model: dict) -> str:
    """What `model.weights` may be for this network."""
    network = model["_target_"].rpartition(".")[2]
    library = "torchvision, " if network in ("torchvision", *TORCHVISION) else "timm, " if network == "timm" else ""
    return f"a file, a folder of save_pretrained, {library}or {_HUB}OWNER/NAME/FILE"


def _of_timm(name: str, trained: bool) -> Path:
    """The file of timm's pretrained weights of a network, from the hub.

    Args:
        trained: whether they are trained further; otherwise they must match r2's image normalisation.
    """
    from timm import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        raise UserError(f"model.weights=timm: timm has no weights of {name}")
    if not trained and (known.mean, known.std) != MEAN_AND_STD:
        raise UserError(
            f"model.weights=timm: {name}'s expect images normalised by mean {known.mean[0]:g} and deviation "
            f"{known.std[0]:g}, not by ImageNet's; train on from them with model.finetune=true"
        )
    return _of_hub(f"{_HUB}{known.hf_hub_id}/{known.hf_hub_filename or 'model.safetensors'}")


def sha256_of_torchvision(file: str) -> str:
    """The first eight hex digits, which the file's name carries."""
    return Path(file).stem.rpartition("-")[2]


def _sha256(source: str, file: str, sources: str) -> str:
    try:
        stat = Path(file).stat()
        return _sha256_of(file, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise UserError(f"model.weights={source}: cannot be read ({error.strerror}); it is {sources}") from None


@functools.lru_cache
def _sha256_of(file: str, changed: int, size: int) -> str:
    """Of a sweep's jobs, the first reads the file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def contents(*sources: str | None) -> dict[str, str]:
    """The sha256 over the files of each source of text models that is a folder, as runs are named by content.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        return {source: _sha256_of_folder(Path(source)) for source in sources if source and Path(source).is_dir()}
    except OSError as error:
        raise UserError(f"model.source: {error.filename}: cannot be read ({error.strerror})") from None


def _sha256_of_folder(folder: Path) -> str:
    found = hashlib.sha256()
    for path in (folder / name for name in SAVED_FILES):
        if path.is_file():
            stat = path.stat()
            found.update(f"{path.name} {_sha256_of(str(path), stat.st_mtime_ns, stat.st_size)}\n".encode())
    return found.hexdigest()


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
        reason = first_line(error)
    try:
        return Path(snapshot_download(name, **wanted, local_files_only=True))
    except OSError:
        raise UserError(
            f"{missing}, and {name} cannot be downloaded ({reason}); where there is a network: {by_hand}"
        ) from None

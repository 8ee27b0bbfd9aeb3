"""Files of a repository on the Hugging Face hub, for the extra `nlp`."""

from pathlib import Path
from typing import Any, Literal

from r2.config import UserError


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

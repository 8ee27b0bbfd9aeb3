"""MobileBERT (Sun et al. 2020) on pairs of sentences: transformers' network, pretrained weights and vocabulary.

python -m r2.run model=mobilebert data=qnli reg=linf stage=dkm stage.bits=1
python -m r2.run model=mobilebert data=qnli model.source=DIR       # model and tokenizer from save_pretrained
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, MobileBertConfig, MobileBertForSequenceClassification
from transformers.utils import logging

from r2.config import Count, UserError, first_line
from r2.hub import SAVED_FILES, VOCABULARY, fetch
from r2.models import Inputs

logging.set_verbosity_error()  # what it would report of missing weights is checked here
logging.disable_progress_bar()


class MobileBERT(MobileBertForSequenceClassification):
    """transformers' network with a linear classifier on the first token; its forward pass returns logits alone."""

    def __init__(self, config: MobileBertConfig):
        super().__init__(config)
        settings = {name: getattr(config, name) for name in MobileBertConfig.__annotations__}
        self.architecture = {"name": "mobilebert", "num_classes": config.num_labels, "settings": settings}

    def forward(self, inputs: Inputs) -> Tensor:  # type: ignore[override]
        """Logits (n, num_classes) of input_ids, attention_mask and token_type_ids, each (n, length)."""
        if not isinstance(inputs, dict):
            raise UserError("model=mobilebert reads text, not images: choose data=qnli")
        tokens, attended = inputs["input_ids"], inputs["attention_mask"].bool()
        # Not the network's own positions, a constant buffer: a packed file holds none.
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        # As attention takes it: into one of two dimensions the network looks, and so waits for the device every time.
        mask = attended[:, None, None].expand(-1, 1, tokens.shape[1], -1)
        found = super().forward(
            input_ids=tokens, attention_mask=mask, token_type_ids=inputs["token_type_ids"], position_ids=positions
        )
        return found.logits


def mobilebert(num_classes: Count, source: str, revision: str) -> nn.Module:
    """The pretrained network under a new classifier; tokens (n, length) by name to logits (n, num_classes).

    Built for its shape alone, on the meta device, it reads no weights.

    Args:
        source: a repository on the hub, or a folder that `save_pretrained` wrote.
        revision: of the repository.

    Raises:
        UserError: the source cannot be had, is no MobileBERT, or leaves more than the classifier without weights.
    """
    folder, settings = _open(source, revision)
    if torch.get_default_device().type == "meta":
        return network(num_classes, settings)
    try:
        loaded: Any = MobileBERT.from_pretrained(
            folder, num_labels=num_classes, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # of transformers, safetensors or the unpickler
        raise UserError(f"model.source={source}: cannot be read ({first_line(error)})") from None
    model, found = loaded
    lacking = sorted(name for name in found["missing_keys"] if not name.startswith("classifier."))
    if lacking:
        raise UserError(f"model.source={source}: has no weights for {len(lacking)} tensors, {lacking[0]} among them")
    return model


def network(num_classes: int, settings: dict[str, Any]) -> nn.Module:
    """The network of MobileBertConfig's `settings`, with fresh weights."""
    return MobileBERT(MobileBertConfig(**settings, num_labels=num_classes))  # type: ignore[call-arg]


def tokenizer(source: str, revision: str, max_length: int) -> Any:
    """The network's tokenizer, for up to `max_length` tokens.

    Raises:
        UserError: the source cannot be had, has no vocabulary, or one that does not fit the network.
    """
    folder, settings = _open(source, revision)
    if not any((folder / name).is_file() for name in VOCABULARY):
        raise UserError(f"model.source={source}: has neither {' nor '.join(VOCABULARY)}; save its tokenizer there too")
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of the tokenizers library, which has no class of its own
        raise UserError(f"model.source={source}: its tokenizer cannot be read ({first_line(error)})") from None
    tokens, positions = settings["vocab_size"], settings["max_position_embeddings"]
    if len(found) > tokens:
        raise UserError(f"model.source={source}: its tokenizer has {len(found)} tokens, its network only {tokens}")
    if max_length > positions:
        raise UserError(f"data.max_length={max_length}: the network has only {positions} positions")
    return found


def _open(source: str, revision: str) -> tuple[Path, dict[str, Any]]:
    """The folder of `source` and the settings in its config.json."""
    folder = Path(source)
    if not folder.is_dir():
        missing = f"model.source={source}: is no folder"
        by_hand = f"hf download {source} --revision {revision} --local-dir DIR, then here model.source=DIR"
        folder = fetch(source, revision, list(SAVED_FILES), "model", missing, by_hand)
    try:
        settings = json.loads((folder / "config.json").read_text())
        kind = settings["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model.source={source}: its config.json cannot be read ({first_line(error)})") from None
    if kind != "mobilebert":
        raise UserError(f"model.source={source}: is a {kind}, not a mobilebert")
    defaults = MobileBertConfig()
    return folder, {name: settings.get(name, getattr(defaults, name)) for name in MobileBertConfig.__annotations__}

"""Pairs of sentences: GLUE's QNLI, from the hub or from local files in one of GLUE's formats."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2.config import Count, UserError, first_line
from r2.data.batches import Data, unawaited
from r2.dist import World
from r2.hub import fetch, need_extra
from r2.models import Inputs

_HUB = "nyu-mll/glue"
_COLUMNS = ("question", "sentence", "label")
_LABELS = {"entailment": 0, "not_entailment": 1, "0": 0, "1": 1}  # names in GLUE's TSV, numbers in the hub's Parquet
_SPLITS = {"train": ("train",), "val": ("dev", "validation")}  # what the files of a split may start with


@dataclass
class Pairs:
    """A split: token numbers and segments (n, max_length), tokens per pair (n,), labels (n,)."""

    tokens: Tensor
    segments: Tensor
    lengths: Tensor
    labels: Tensor


class Text(Data):
    """Pairs of sentences as tokens on the device; a batch is a dict of tensors (n, length), padded to its longest."""

    def __init__(self, train: Pairs, val: Pairs, num_classes: int, calibration_examples: int):
        self._train, self._val = train, val
        self.num_classes, self.calibration_images = num_classes, calibration_examples
        self.train_images, self.val_images = len(train.labels), len(val.labels)
        self.max_length = train.tokens.shape[1]

    def to(self, world: World) -> "Data":
        for pairs in (self._train, self._val):  # lengths stay on the CPU, where they cut the batches
            pairs.tokens, pairs.segments = pairs.tokens.to(world.device), pairs.segments.to(world.device)
            pairs.labels = pairs.labels.to(world.device)
        return super().to(world)

    def describe(self) -> str:
        return (
            f"{self.train_images:,} training and {self.val_images:,} validation pairs, {self.num_classes} classes, "
            f"up to {self.max_length} tokens"
        )

    def _contents(self) -> Iterator[np.ndarray]:
        for pairs in (self._train, self._val):
            yield from (t.cpu().numpy() for t in (pairs.tokens, pairs.segments, pairs.lengths, pairs.labels))

    def _batches(
        self, indices: Tensor, size: int, seed: int, epoch: int, train: bool | None
    ) -> Iterator[tuple[Inputs, Tensor]]:
        pairs = self._val if train is False else self._train
        device, known = self.world.device, pairs.lengths[indices]
        # One column of padding stays, because MobileBERT reads each token together with the next one: so a pair's
        # logits do not depend on the others of its batch.
        widths = [min(max(part.tolist(), default=0) + 1, self.max_length) for part in known.split(size)]
        parts = (unawaited(tensor, device).split(size) for tensor in (known, indices))
        for width, lengths, batch in zip(widths, *parts, strict=True):
            there = torch.arange(width, device=device) < lengths[:, None]
            yield (
                {
                    "input_ids": pairs.tokens[batch, :width].long(),
                    "attention_mask": there.long(),
                    "token_type_ids": pairs.segments[batch, :width].long(),
                },
                pairs.labels[batch],
            )


def qnli(
    root: str,
    tokenizer: str | None,
    tokenizer_revision: str | None,
    revision: str,
    max_length: Count = 128,
    calibration_examples: Count = 256,
) -> Data:
    """QNLI (Wang et al. 2019): does the sentence answer the question? Label 0 if it does (entailment), else 1.

    Args:
        root: a folder of train.tsv and dev.tsv, or of train*.parquet and validation*.parquet, or the one above it;
            without them the hub's are taken.
        tokenizer, tokenizer_revision: the model's source, whose tokens the pairs are made of.
        revision: of the data on the hub.
        max_length: a longer pair loses tokens at the end of its longer sentence.
    """
    if tokenizer is None or tokenizer_revision is None:
        raise UserError("data=qnli: needs a model with a tokenizer; choose model=mobilebert")
    need_extra()
    from r2.zoo import mobilebert

    tokens = mobilebert.tokenizer(tokenizer, tokenizer_revision, max_length)
    places = (Path(root, name) for name in ("", "QNLI", "qnli"))  # as GLUE's archive and the hub have it
    folder = next((place for place in places if _files(place, "train")), Path(root))
    if not _files(folder, "train"):
        missing = f"data.root={root}: has no train.tsv or train*.parquet"
        by_hand = (
            f"hf download {_HUB} --repo-type dataset --revision {revision} --include 'qnli/*' --local-dir DIR, "
            "then here data.root=DIR/qnli"
        )
        wanted = ["qnli/train*.parquet", "qnli/validation*.parquet"]
        folder = fetch(_HUB, revision, wanted, "dataset", missing, by_hand) / "qnli"
    read = {split: _read(folder, split) for split in _SPLITS}
    train, val = (_encode(tokens, max_length, *read[split]) for split in _SPLITS)
    return Text(train, val, 2, calibration_examples)


def _encode(tokenizer: Any, max_length: int, questions: list[str], sentences: list[str], labels: list[int]) -> Pairs:
    parts = []
    for i in range(0, len(labels), 8192):  # bounds what the lists of numbers take
        found = tokenizer(
            questions[i : i + 8192], sentences[i : i + 8192],
            truncation=True, max_length=max_length, padding="max_length", return_tensors="pt",
        )  # fmt: skip
        segments, lengths = found["token_type_ids"].to(torch.uint8), found["attention_mask"].sum(1)
        parts.append((found["input_ids"].int(), segments, lengths))
    ids, segments, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    return Pairs(ids, segments, lengths, torch.tensor(labels))


def _files(folder: Path, split: str) -> list[Path]:
    """Of the first kind that there is."""
    for suffix in ("tsv", "parquet"):
        if found := sorted(path for start in _SPLITS[split] for path in folder.glob(f"{start}*.{suffix}")):
            return found
    return []


def _read(folder: Path, split: str) -> tuple[list[str], list[str], list[int]]:
    """Questions, sentences and labels of a split.

    Raises:
        UserError: a file is missing or cannot be read, or a column, a field or a label is not QNLI's; names the place.
    """
    files = _files(folder, split)
    if not files:
        names = " or ".join(f"{start}*" for start in _SPLITS[split])
        raise UserError(f"data.root={folder}: has no {names} in TSV or Parquet")
    rows: list[tuple] = []
    for path in files:
        columns = _tsv(path) if path.suffix == ".tsv" else _parquet(path)
        for number, row in enumerate(zip(*columns, strict=True), start=1):
            if not isinstance(row[0], str) or not isinstance(row[1], str):
                raise UserError(f"{path}: row {number} lacks a question or a sentence")
            if str(row[2]) not in _LABELS:
                raise UserError(f"{path}: row {number} has label {row[2]!r}; known are {', '.join(_LABELS)}")
            rows.append((row[0], row[1], _LABELS[str(row[2])]))
    if not rows:
        raise UserError(f"{files[0]}: has no rows")
    questions, sentences, labels = (list(column) for column in zip(*rows, strict=True))
    return questions, sentences, labels


def _tsv(path: Path) -> list[list]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as TSV ({first_line(error)})") from None
    _check_columns(path, header)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{path}: row {number} has {len(row)} fields, the header {len(header)}")
    return [[row[header.index(name)] for row in rows] for name in _COLUMNS]


def _parquet(path: Path) -> list[list]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None
    _check_columns(path, table.column_names)
    return [table.column(name).to_pylist() for name in _COLUMNS]


def _check_columns(path: Path, names: list[str]) -> None:
    if not set(_COLUMNS) <= set(names):
        raise UserError(f"{path}: has columns {', '.join(names)}; QNLI's are {', '.join(_COLUMNS)}")

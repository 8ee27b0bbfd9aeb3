"""Data sets of encoded images: decoded and augmented in worker processes, normalised on the device.

A worker writes uint8 pixels into memory shared with the main process, `PIECE` images at a time. Only the slot number
and the labels go through a queue. So a batch is copied once, and all workers fill it together.
"""

import atexit
import contextlib
import io
import multiprocessing
import re
import shutil
import signal
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from r2.config import ImageSize, UserError, first_line, height_and_width
from r2.data.batches import IGNORED, Data, mix, unawaited
from r2.dist import World, ignore_stop_signals
from r2.hub import MEAN_AND_STD

PIECE = 16  # images of one task of a worker
AHEAD = 8  # pieces that each worker may be ahead of the main process
MOST_BAD = 0.1  # of the images may be skipped
LATE = 8  # pieces that a GPU may be behind with copying
STALL = 1800.0  # seconds without a piece after which a worker, or the disk, counts as hung


class Source(Protocol):
    """Where the encoded images of one split come from; sent to every worker.

    Attributes:
        labels: (n,) int64.
        names: (n,) bytes, unique within a split, independent of its folder.
    """

    labels: np.ndarray
    names: np.ndarray

    def read(self, index: int) -> Tensor:
        """The bytes of one image (n,) uint8; raises OSError or RuntimeError."""
        ...

    def name(self, index: int) -> str:
        """What a message calls the image."""
        ...


def _close(data: "weakref.ref[Images]") -> None:
    """At Python's end, of data that nobody has closed: multiprocessing would wait for workers that ignore SIGTERM."""
    if (found := data()) is not None:
        found.close()


class Images(Data):
    """Encoded images of two splits; crops, flips and their order depend on (seed, epoch, index) alone."""

    def __init__(
        self,
        train: Source,
        val: Source,
        num_classes: int,
        image_size: ImageSize,
        workers: int,
        on_bad_image: str,
        calibration_images: int,
    ):
        self.num_classes, self.image_size, self.workers = num_classes, image_size, workers
        self.calibration_images, self.on_bad_image = calibration_images, on_bad_image
        self._train_source, self._val_source = train, val
        self.train_images, self.val_images = len(train.labels), len(val.labels)
        self._tasks = _Tasks()
        self._loader: Any = None
        self._registered: int | None = None  # where the memory begins that a GPU reads itself; 0 if it does not
        self._told: set[str] = set()

    def describe(self) -> str:
        counts = np.bincount(self._train_source.labels, minlength=self.num_classes)
        return f"{super().describe()}, {counts.min():,} to {counts.max():,} training images per class"

    def _contents(self) -> Iterator[np.ndarray]:
        for source in (self._train_source, self._val_source):
            yield from (source.labels, source.names)

    def to(self, world: World) -> "Data":
        # A row of pixels at a time: a broadcast over 3 channels alone would run in loops of 3.
        rows = [torch.tensor(values, dtype=torch.float32) * 255 for values in MEAN_AND_STD]
        _, width = height_and_width(self.image_size)
        self._mean, self._std = (row.repeat(width).to(world.device) for row in rows)
        self._stream: Any = None
        if world.device.type == "cuda":
            self._stream = torch.cuda.Stream(world.device)
            self._stream.wait_stream(torch.cuda.current_stream(world.device))  # which makes the two rows
        return super().to(world)

    def _batches(
        self, indices: Tensor, size: int, seed: int, epoch: int, train: bool | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        batches = [batch for batch in indices.split(size) if len(batch)]
        mine = self._tasks.plan(batches, seed, epoch, train)
        if self._stream is not None:
            self._stream.synchronize()  # the workers write to the first place again
        with self._unless_stalled():
            pieces = iter(self._started())
        self._register()
        copies: deque[torch.cuda.Event] = deque()
        for batch in batches:
            if self._tasks.planned != mine:
                raise RuntimeError("another pass over the data has begun; its workers serve one at a time")
            n = len(batch)
            labels = torch.empty(n, dtype=torch.int64)
            with self._beside_the_model():
                images = torch.empty(n, *height_and_width(self.image_size), 3, device=self.world.device)
            for at in range(0, n, PIECE):
                if len(copies) > LATE:
                    copies.popleft().synchronize()  # the task that is given out next takes this one's place
                with self._unless_stalled():
                    done: _Done = next(pieces)
                end = at + len(done.labels)
                with self._beside_the_model():
                    self._normalise(self._decoder.places[done.place, : end - at], images[at:end])
                if self._registered:
                    copies.append(self._stream.record_event())
                labels[at:end] = torch.tensor(done.labels)
                self._note(done.bad)
            self._hand_over(images)
            if train is not False and bool((labels == IGNORED).all()):  # an evaluation leaves them out
                raise UserError(f"no image of a whole batch of {n} can be decoded; look at {done.bad[0][0]}")
            yield images.permute(0, 3, 1, 2), unawaited(labels, self.world.device)

    def _beside_the_model(self) -> contextlib.AbstractContextManager:
        """On a GPU a stream of its own, so that the next batch is copied and normalised while the model computes."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _hand_over(self, images: Tensor) -> None:
        """The model's stream waits for the batch, whose memory is not used again before that stream is done with it."""
        if self._stream is not None:
            model = torch.cuda.current_stream(images.device)
            model.wait_stream(self._stream)
            images.record_stream(model)

    def close(self) -> None:
        # Python would send them SIGTERM, which they leave to the main process, and wait for ever.
        if self._loader is not None and self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
        self._loader = None
        if self._registered:
            self._stream.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._registered)
        self._registered = None

    @contextlib.contextmanager
    def _unless_stalled(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            _kill(multiprocessing.active_children())  # Python would wait for them when it leaves
            raise UserError(
                f"data: no images for {STALL:g} s, a data worker or its disk hangs; "
                "the same command resumes from the last checkpoint"
            ) from None

    def _started(self) -> Any:
        """The loader with its worker processes, which live as long as the data set."""
        if self._loader is None:
            atexit.register(_close, weakref.ref(self))
            from torch.utils.data import DataLoader

            # one more than the tasks that are under way
            self._tasks.places = self.workers * AHEAD + 1 + (LATE if self._stream is not None else 0)
            self._decoder = _Decoder(
                self._train_source, self._val_source, self.image_size, self._memory(), self.on_bad_image
            )
            self._loader = DataLoader(
                self._decoder,
                batch_size=None,
                sampler=self._tasks,
                num_workers=self.workers,
                prefetch_factor=AHEAD if self.workers else None,
                persistent_workers=self.workers > 0,
                timeout=STALL if self.workers else 0,
                collate_fn=_as_it_is,
                worker_init_fn=_started_worker,
                generator=torch.Generator(),  # the model's random numbers stay as they are
            )
        return self._loader

    def _memory(self) -> Tensor:
        """A place for every piece under way: (places, PIECE, h, w, 3) uint8, shared with the workers."""
        shape = (self._tasks.places, PIECE, *height_and_width(self.image_size), 3)
        if self.workers == 0:
            return torch.empty(shape, dtype=torch.uint8)
        need, shared = int(np.prod(shape)), Path("/dev/shm")
        if shared.is_dir() and shutil.disk_usage(shared).free < need:
            raise UserError(
                f"data.workers={self.workers}: needs {need >> 20} MiB in {shared}, which has "
                f"{shutil.disk_usage(shared).free >> 20} free; lower it, or give the container a larger --shm-size"
            )
        return torch.empty(shape, dtype=torch.uint8).share_memory_()

    def _register(self) -> None:
        """Let a GPU read the places as they are; if the driver refuses, each piece is copied to pinned memory first.

        After the workers have started: memory registered before might be missing in a process that is forked.
        """
        if self._stream is not None and self._registered is None:
            places = self._decoder.places
            refused = int(torch.cuda.cudart().cudaHostRegister(places.data_ptr(), places.nbytes, 0))
            self._registered = 0 if refused else places.data_ptr()
            if refused:
                with contextlib.suppress(RuntimeError):  # the next kernel is told of it
                    torch.ones((), device=self.world.device)

    def _normalise(self, pixels: Tensor, out: Tensor) -> None:
        """uint8 pixels (n, h, w, 3) to the device, as float with zero mean and unit deviation into `out`."""
        if out.is_cuda and not pixels.is_cuda:
            pinned = pixels if self._registered else pixels.pin_memory()
            pixels = pinned.to(out.device, non_blocking=True)
        rows = out.view(-1, len(self._mean))
        rows.copy_(pixels.to(out.device).view_as(rows)).sub_(self._mean).div_(self._std)

    def _note(self, bad: list[tuple[str, str]]) -> None:
        self.skipped += len(bad)
        for name, why in bad:
            if name not in self._told:
                self._told.add(name)
                print(f"r2: skipped {name}: {why}", flush=True)
        most = max(1, MOST_BAD * (self.train_images + self.val_images))
        if bad and len(self._told) > most:
            raise UserError(
                f"{len(self._told)} images cannot be decoded, more than {MOST_BAD:.0%} of all, at last {bad[-1][0]}; "
                "look at the data folder"
            )


def _kill(workers: list[Any]) -> None:
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise at their end
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


class _Task(NamedTuple):
    """One piece of a batch, everything a worker has to know of it."""

    place: int
    indices: list[int]
    seed: int
    epoch: int
    train: bool | None


class _Done(NamedTuple):
    place: int
    labels: list[int]
    bad: list[tuple[str, str]]  # names and reasons


class _Tasks:
    """The tasks of the coming pass; a DataLoader keeps its sampler, so its content changes instead."""

    places = 1
    planned = 0

    def plan(self, batches: Iterable[Tensor], seed: int, epoch: int, train: bool | None) -> int:
        """Replace the tasks; returns the number of this pass."""
        self._coming = (batches, seed, epoch, train)
        self.planned += 1
        return self.planned

    def __iter__(self) -> Iterator[_Task]:
        batches, seed, epoch, train = self._coming
        pieces = (piece for batch in batches for piece in batch.split(PIECE))
        for number, piece in enumerate(pieces):  # as they are needed: an epoch has a million indices
            yield _Task(number % self.places, piece.tolist(), seed, epoch, train)

    def __len__(self) -> int:
        return sum(-(-len(batch) // PIECE) for batch in self._coming[0])


def _as_it_is(done: Any) -> Any:
    return done


def _started_worker(_: int) -> None:
    ignore_stop_signals()


class _Decoder(torch.utils.data.Dataset):
    """What a worker does: `PIECE` images into their place."""

    def __init__(self, train: Source, val: Source, image_size: ImageSize, places: Tensor, on_bad_image: str):
        from torchvision.transforms import v2

        self._sources = {True: train, None: train, False: val}
        self.places, self._skip = places, on_bad_image == "skip"
        self._size = height, width = height_and_width(image_size)
        shape = width / height  # a rectangle's crops are about as wide as it is, so that images are distorted no more
        self._crop = v2.RandomResizedCrop(self._size, ratio=(3 / 4 * shape, 4 / 3 * shape))
        self._center = v2.CenterCrop(self._size)

    def __getitem__(self, task: _Task) -> _Done:
        source, place = self._sources[task.train], self.places[task.place]
        labels, bad = source.labels[task.indices].tolist(), []
        with torch.random.fork_rng(devices=[]):
            for i, index in enumerate(task.indices):
                try:
                    image = decode(source.read(index))
                except (OSError, RuntimeError) as error:
                    name, why = source.name(index), reason(error)
                    if not self._skip:
                        raise UserError(
                            f"{name}: cannot be decoded ({why}); data.on_bad_image=skip leaves it out"
                        ) from None
                    bad.append((name, why))
                    labels[i] = IGNORED
                    place[i] = 0
                    continue
                pixels = place[i].permute(2, 0, 1)
                if task.train:
                    self._augment(image, mix(task.seed, task.epoch, index), pixels)
                else:
                    pixels.copy_(self._plain(image))
        return _Done(task.place, labels, bad)

    def _plain(self, image: Tensor) -> Tensor:
        """The middle of the image, which covers 8/7 of the size on its tighter side, as the usual 256 of 224."""
        from torchvision.transforms.v2.functional import resize

        height, width = (side * 8 // 7 for side in self._size)
        own_height, own_width = image.shape[1:]
        if own_width * height >= own_height * width:
            width = int(height * own_width / own_height)
        else:
            height = int(width * own_height / own_width)
        return self._center(resize(image, [height, width], antialias=True))

    def _augment(self, image: Tensor, seed: int, out: Tensor) -> None:
        """What torchvision's two transforms give, with fewer copies."""
        top, left, height, width, flip = self.draw(image, seed)
        # Channels last in four dimensions, as torchvision's resize does not keep them: no copy changes the layout.
        crop = image.permute(1, 2, 0)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
        resized = F.interpolate(crop, self._size, mode="bilinear", antialias=True)[0]
        out.copy_(resized.flip(-1) if flip else resized)

    def draw(self, image: Tensor, seed: int) -> tuple[int, int, int, int, bool]:
        """The draws of RandomResizedCrop (top, left, height, width) and RandomHorizontalFlip after manual_seed(seed).

        They come from PyTorch's global generator.
        """
        torch.default_generator.manual_seed(seed)
        box = self._crop.make_params([image])
        return box["top"], box["left"], box["height"], box["width"], bool(torch.rand(1) < 0.5)


def decode(encoded: Tensor) -> Tensor:
    """uint8 pixels (3, h, w) of an image: CMYK, grey, palettes, alpha and 16 bits become plain RGB.

    JPEG, PNG, WebP and GIF by torchvision, which is faster; what it does not take, BMP and TIFF among others, by PIL.

    Raises:
        RuntimeError: not an image, or damaged.
    """
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import to_dtype

    if len(encoded) == 0:
        raise RuntimeError("is empty")
    try:
        image = decode_image(encoded, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        return _decode_by_pil(encoded, error)
    if image.ndim == 4:  # an animation
        image = image[0]
    return image if image.dtype == torch.uint8 else to_dtype(image, torch.uint8, scale=True)


def _decode_by_pil(encoded: Tensor, first: RuntimeError) -> Tensor:
    """
    Raises:
        RuntimeError: `first`, if PIL cannot read it either.
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(io.BytesIO(encoded.numpy().tobytes())) as image:
            return pil_to_tensor(image.convert("RGB"))
    except Exception:  # PIL's plugins raise many kinds
        raise first from None


def reason(error: Exception) -> str:
    """The first sentence, without the function and source file that torchvision puts in front."""
    line = re.sub(r"^\w+, \S+:\d+, ", "", first_line(error))
    return line.partition(". ")[0]

"""Training images of the shards decoded by NVIDIA DALI, on the GPU if there is one (pip install -e '.[dali]').

Order, crops and flips are those of `imagenet_shards`; pixels differ by rounding, because decoder and resize differ.
Validation and calibration images are read by `imagenet_shards` and are identical.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2.config import Count, CountOrZero, UserError
from r2.data.batches import Data, mix, unawaited
from r2.data.shards import Shards
from r2.paths import script


class DALIShards(Shards):
    """`Shards`, whose training images are decoded, cropped, resized and flipped by DALI."""

    def _batches(
        self, indices: Tensor, size: int, seed: int, epoch: int, train: bool | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not train:
            yield from super()._batches(indices, size, seed, epoch, train)
            return
        self._started()  # its decoder draws the crops
        batches = indices.split(size)
        inputs = (self._inputs(batch, seed, epoch) for batch in batches)
        pipeline = _pipeline(inputs, size, self.image_size, max(1, self.workers), self.world.device)
        for batch in batches:
            try:
                (found,) = pipeline.run()
            except RuntimeError as error:
                reason = str(error).partition("encountered:")[2].strip() or str(error)
                raise UserError(
                    f"DALI cannot decode a batch of training images ({reason.splitlines()[0]}); "
                    f"{script('prepare_imagenet')} --out <data.root> names damaged shards"
                ) from None
            labels = torch.from_numpy(self._train_tars.labels[batch.numpy()])
            yield self._on_device(found.as_tensor()), unawaited(labels, self.world.device)

    def _inputs(self, batch: Tensor, seed: int, epoch: int) -> tuple[list, ...]:
        """The encoded images of a batch, where their windows start, their shapes, and whether to flip."""
        encoded, start, shape, flip = [], [], [], []
        with torch.random.fork_rng(devices=[]):
            for index in batch.tolist():
                encoded.append(self._train_tars.read(index).numpy())
                image = torch.empty(3, *self._train_tars.sizes[index].tolist(), device="meta")
                top, left, height, width, mirrored = self._decoder.draw(image, mix(seed, epoch, index))
                start.append(np.array((top, left), np.int32))
                shape.append(np.array((height, width), np.int32))
                flip.append(np.array(mirrored, np.int32))
        return encoded, start, shape, flip

    def _on_device(self, found: Any) -> Tensor:
        """DALI's uint8 pixels (n, h, w, 3) as a normalised batch (n, 3, h, w)."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        pixels = torch.empty(found.shape(), dtype=torch.uint8, device=self.world.device)
        feed_ndarray(found, pixels, cuda_stream=torch.cuda.current_stream() if pixels.is_cuda else None)
        images = torch.empty(pixels.shape, device=pixels.device)
        self._normalise(pixels, images)
        return images.permute(0, 3, 1, 2)


def _pipeline(inputs: Iterator, batch_size: int, image_size: int, threads: int, device: torch.device) -> Any:
    """Encoded images with their windows and flips to pixels (n, h, w, 3) uint8."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def
    def define() -> Any:
        encoded, start, shape, flip = fn.external_source(source=inputs, num_outputs=4)
        pixels = fn.decoders.image_slice(
            encoded, start=start, shape=shape, axis_names="HW", device="mixed" if gpu else "cpu",
            jpeg_fancy_upsampling=True, adjust_orientation=False,
        )  # fmt: skip
        pixels = fn.resize(pixels, size=[image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(pixels, horizontal=flip)

    return define(batch_size=batch_size, num_threads=threads, device_id=(device.index or 0) if gpu else None)


def imagenet_dali(
    root: str,
    image_size: Count = 224,
    stored_size: Count = 256,
    workers: CountOrZero = 8,
    calibration_images: Count = 2000,
) -> Data:
    """ImageNet-1k in shards, decoded by DALI; `workers` is also DALI's number of threads."""
    try:
        import_module("nvidia.dali")  # at once, before any training
    except ImportError as error:
        raise UserError(f"data=imagenet_dali: DALI is not installed ({error}); pip install 'r2[dali]'") from None
    return DALIShards(root, 1000, image_size, stored_size, workers, "error", calibration_images)

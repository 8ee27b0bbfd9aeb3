"""Images per second of the input pipeline, as ratios to torchvision's in the same process.

python scripts/bench/data.py [--rounds 5] [--images 1024] [--batch 64] [--workers 2] [--formats]

The reference is what torchvision's ImageNet example does: ImageFolder (PIL), RandomResizedCrop(224), a flip, ToTensor,
Normalize, DataLoader. "stage" is the work of one worker on one core, from the file to the pixels of a batch, in
processor time; "end to end" is the wall clock from a warm DataLoader's first batch to its last, to normalised float
batches on the device. Every round runs each variant once, in turn; the best round counts.

The JPEGs are made here: 500x375 Gaussian noise with the 1/f^1.1 amplitude of photographs, a quarter as much colour as
brightness, at a quality (90) that gives about ImageNet's mean of 115 KB. --formats compares reading the stored bytes
alone, in random order, with WebDataset and LitData (pip install -e '.[bench]').
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from r2.data.folder import Folder
from r2.data.images import PIECE, Images, _Decoder, _Task
from r2.data.shards import Shards
from r2.dist import World

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--images", type=int, default=1024)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--formats", action="store_true")
arguments = parser.parse_args()
DISTINCT, STAGE = 64, 64  # files that differ; images of one round of the stage
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise with the spectrum of natural images (Field 1987), brightness and two weaker colours."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    planes = []
    for deviation, mean in ((55, 118), (14, 128), (14, 128)):
        noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency**1.1, (height, width))
        planes.append(np.clip(noise / noise.std() * deviation + mean, 0, 255).astype(np.uint8))
    return Image.fromarray(np.stack(planes, -1), "YCbCr").convert("RGB")


def make_folder(root: Path) -> float:
    """An image folder of two classes; returns the mean size of a file in KB."""
    rng, sizes = np.random.default_rng(0), []
    for split in ("train", "val"):
        for name in ("n0", "n1"):
            (root / split / name).mkdir(parents=True)
    for i in range(DISTINCT):
        buffer = io.BytesIO()
        photograph(rng, *((500, 375) if i % 4 else (375, 500))).save(buffer, "JPEG", quality=90)
        sizes.append(buffer.tell() / 1000)
        for copy in range(i, arguments.images, DISTINCT):
            (root / "train" / f"n{i % 2}" / f"{copy}.JPEG").write_bytes(buffer.getvalue())
        if i < 4:
            (root / "val" / f"n{i % 2}" / f"{i}.JPEG").write_bytes(buffer.getvalue())
    return sum(sizes) / len(sizes)


def best_of(variants: dict[str, Callable[[], object]], images: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds per image in the best round of each variant."""
    best = dict.fromkeys(variants, float("inf"))
    for round_ in range(arguments.rounds + 1):
        for name, variant in variants.items():
            began = clock()
            variant()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first warms up
                best[name] = min(best[name], (clock() - began) / images)
    return best


def report(title: str, best: dict[str, float]) -> None:
    print(title)
    base = next(iter(best.values()))
    for name, seconds in best.items():
        print(f"  {name:<34}{1 / seconds:9.0f} images/s = {base / seconds:5.2f} of the first", flush=True)


def reference(root: Path) -> datasets.ImageFolder:
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
             transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]  # fmt: skip
    return datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))


def worker_stage(data: Images) -> Callable[[], None]:
    places = torch.empty(1, PIECE, 224, 224, 3, dtype=torch.uint8)
    decoder = _Decoder(data._train_source, data._val_source, 224, places, "error")
    order = torch.randperm(data.train_images)[:STAGE].tolist()

    def run() -> None:
        for at in range(0, STAGE, PIECE):
            decoder[_Task(0, order[at : at + PIECE], 0, 0, True)]

    return run


def epochs(data: Images) -> Callable[[], None]:
    data.to(World(device=device))

    def run() -> None:
        for _ in data.train(arguments.batch, seed=0, epoch=0):
            pass

    return run


def reference_epochs(dataset: datasets.ImageFolder) -> Callable[[], None]:
    loader = DataLoader(
        dataset, arguments.batch, shuffle=True, drop_last=True, num_workers=arguments.workers,
        persistent_workers=True, pin_memory=device.type == "cuda",
    )  # fmt: skip

    def run() -> None:
        for images, labels in loader:
            images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return run


def formats(shards: Shards, root: Path) -> dict[str, Callable[[], None]]:
    """Reading every stored training image and its label once, shuffled; nothing is decoded."""
    import litdata
    import webdataset

    source, rng = shards._train_tars, np.random.default_rng(0)
    urls = [str(path) for path in sorted((root / "shards").glob("train-*.tar"))]
    encoded = [(source.read(i).numpy().tobytes(), int(source.labels[i])) for i in range(len(source.labels))]
    everything = list(range(len(encoded)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it shows its progress
        litdata.optimize(_Item(encoded), everything, str(root / "litdata"), chunk_bytes="64MB", num_workers=1)

    def indexed() -> None:
        for i in rng.permutation(len(source.labels)):
            source.read(i), source.labels[i]

    samples = webdataset.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000).to_tuple("jpg", "cls")
    streamed = litdata.StreamingDataset(str(root / "litdata"), shuffle=True)

    def web() -> None:
        for _ in samples:
            pass

    def lit() -> None:
        for _ in streamed:
            pass

    return {"tar with an index": indexed, "webdataset (shuffle buffer 1000)": web, "litdata": lit}


class _Item:
    def __init__(self, encoded: list[tuple[bytes, int]]):
        self.encoded = encoded

    def __call__(self, index: int) -> dict:
        return {"jpg": self.encoded[index][0], "cls": self.encoded[index][1]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = make_folder(root / "folder")
        script = Path(__file__).parents[1] / "prepare_imagenet.py"
        began = time.perf_counter()
        command = [sys.executable, str(script), "--source", str(root / "folder"), "--out", str(root / "shards")]
        subprocess.run([*command, "--workers", "1"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        stored = sum(p.stat().st_size for p in (root / "shards").glob("train-*.tar")) / 1000 / arguments.images
        print(f"{device.type}, {os.cpu_count()} cores, torch {torch.__version__}")
        print(f"{arguments.images} JPEGs of 500x375, {size:.0f} KB; {stored:.0f} KB in shards, made in {seconds:.0f} s")
        data = {
            "folder": Folder(str(root / "folder"), 2, 224, arguments.workers, "error", 16),
            "shards": Shards(str(root / "shards"), 2, 224, 256, arguments.workers, "error", 16),
        }
        torchvision_ = reference(root / "folder")
        order = torch.randperm(arguments.images)[:STAGE].tolist()
        stages: dict[str, Callable] = {"torchvision": lambda: [torchvision_[i] for i in order]}
        stages |= {name: worker_stage(d) for name, d in data.items()}
        report("stage, one core:", best_of(stages, STAGE, time.process_time))
        loops = {"torchvision": reference_epochs(torchvision_)} | {n: epochs(d) for n, d in data.items()}
        title = f"end to end, {arguments.workers} workers, batch {arguments.batch}:"
        counted = arguments.images // arguments.batch * arguments.batch
        report(title, best_of(loops, counted, time.perf_counter))
        if arguments.formats:
            best = best_of(formats(data["shards"], root), arguments.images, time.process_time)
            report("reading the stored bytes in random order, one core:", best)


if __name__ == "__main__":
    main()

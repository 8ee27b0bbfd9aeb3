"""ImageNet into shards for data=imagenet_shards: less than half of the bytes, and much less to decode.

python scripts/prepare_imagenet.py --source /data/imagenet --out data/imagenet_shards
python scripts/prepare_imagenet.py --out data/imagenet_shards        # checks the shards again

--source is an image folder, {train,val}/<class>/<image>, or holds the three official files, read where they lie:
  ILSVRC2012_img_train.tar         one tar per class
  ILSVRC2012_img_val.tar           50,000 images
  ILSVRC2012_devkit_t12.tar.gz     the validation ground truth and the classes' names
Both give the same shards. An interrupted run resumes with the same command; the manifest is written last, with the
count and sha256 of every shard. r2/data/shards.py says what a shard is.
"""

import argparse
import hashlib
import io
import os
import signal
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from rich.progress import track
from torchvision.transforms.v2.functional import resize

from r2 import store
from r2.config import UserError
from r2.data.archives import DEVKIT, TRAIN, VAL, Entry, Map, from_archives, from_folder
from r2.data.images import decode, reason
from r2.data.shards import FORMAT, MANIFEST, read_index, read_manifest

OFFICIAL = {"train": 1_281_167, "val": 50_000}
SUFFIX = {"train": "jpg", "val": "webp"}
QUALITY = 90  # of training images, 4:2:0: 37 dB to the resized image on photographs


class Job(NamedTuple):
    """A shard to write; `first` is the number of its first image in the split."""

    path: Path
    split: str
    first: int
    entries: list[Entry]
    size: int
    skip_bad: bool


def key(job: Job) -> str:
    """Of all that a shard depends on, but for the pixels of its source."""
    entries = [(entry.name, entry.length, entry.label) for entry in job.entries]
    what = (FORMAT, QUALITY, job.split, job.first, job.size, job.skip_bad, entries)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def write_shard(job: Job) -> dict:
    """Write a shard and its index, unless that was done; returns its line of the manifest."""
    torch.set_num_threads(1)
    index_path, wanted = job.path.with_suffix(".npz"), key(job)
    if index_path.exists() and job.path.exists():
        try:
            index = read_index(job.path)
        except UserError:
            index = {"key": "damaged"}
        if str(index["key"]) == wanted and job.path.stat().st_size == index["bytes"]:
            return line(job, index)
    index_path.unlink(missing_ok=True)  # it says that the shard is complete
    part = job.path.with_name(f".{job.path.name}.part")
    try:
        with open(part, "wb") as file:
            index = write_tar(job, file)
            file.flush()
            os.fsync(file.fileno())
        index |= {"key": wanted, "bytes": part.stat().st_size, "sha256": store.sha256_of(part)}
        os.replace(part, job.path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {job.path} ({error.strerror}); the same command resumes here") from None
    buffer = io.BytesIO()
    np.savez(buffer, **index)
    store.write(index_path, buffer.getvalue())
    return line(job, index)


def line(job: Job, index: dict) -> dict:
    """What the manifest says of a shard."""
    return {
        "file": job.path.name, "images": len(index["labels"]), "bytes": int(index["bytes"]),
        "sha256": str(index["sha256"]), "skipped": [os.fsdecode(name) for name in index["skipped"]],
    }  # fmt: skip


def write_tar(job: Job, file: Any) -> dict[str, Any]:
    """The images of a shard as a tar in WebDataset's layout; returns the index."""
    offsets, lengths, labels, sizes, names, skipped = [], [], [], [], [], []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, entry in enumerate(job.entries, job.first):
            try:
                with open(entry.path, "rb") as source:
                    source.seek(entry.offset)
                    encoded = source.read(entry.length)
                picture = stored(encoded, job.split, job.size)
            except (OSError, RuntimeError) as error:
                if not job.skip_bad:
                    place = f" in {entry.path}" if entry.offset else f" ({entry.path})"
                    raise UserError(
                        f"{entry.name}{place}: cannot be decoded: {reason(error)}; --skip-bad leaves such images out"
                    ) from None
                skipped.append(os.fsencode(entry.name))
                continue
            content = encode(picture, job.split)
            add(tar, f"{number:08d}.{SUFFIX[job.split]}", content)
            offsets.append(tar.offset - -(-len(content) // 512) * 512)
            sizes.append((picture.height, picture.width))
            lengths.append(len(content))
            labels.append(entry.label)
            names.append(os.fsencode(entry.name))
            add(tar, f"{number:08d}.cls", str(entry.label).encode())
    return {
        "offsets": np.array(offsets, np.int64), "lengths": np.array(lengths, np.int64),
        "labels": np.array(labels, np.int64), "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "names": np.array(names, np.bytes_), "skipped": np.array(skipped, np.bytes_),
    }  # fmt: skip


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same images give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def stored(encoded: bytes, split: str, size: int) -> Image.Image:
    """The pixels that the shards hold of an image.

    Raises:
        RuntimeError: it cannot be decoded.
    """
    pixels = decode(torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else torch.empty(0))
    if split == "val" or min(pixels.shape[1:]) > size:
        pixels = resize(pixels, [size])  # what data=imagenet does to a validation image before its crop
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def encode(picture: Image.Image, split: str) -> bytes:
    """Validation images without loss; `quality` is then the encoder's effort."""
    out = io.BytesIO()
    if split == "val":
        picture.save(out, "WEBP", lossless=True, quality=20, method=2, exact=True)
    else:
        picture.save(out, "JPEG", quality=QUALITY, subsampling="4:2:0", optimize=True)
    return out.getvalue()


def prepare(arguments: argparse.Namespace, parallel: Map) -> None:
    source, out, per_shard = arguments.source, arguments.out, arguments.per_shard
    if all((source / split).is_dir() for split in ("train", "val")):
        classes, splits = from_folder(source)
    elif missing := [name for name in (TRAIN, VAL, DEVKIT) if not (source / name).is_file()]:
        raise UserError(f"--source {source}: has no train/ and val/, nor the official {', '.join(missing)}")
    else:
        classes, splits = from_archives(source, parallel)
    for split, entries in splits.items():
        print(f"{split}: {len(entries):,} images", end="")
        print("" if len(entries) == OFFICIAL[split] else f"; ILSVRC2012 has {OFFICIAL[split]:,}", flush=True)
    jobs = [
        Job(out / f"{split}-{first // per_shard:05d}.tar", split, first, entries[first : first + per_shard],
            arguments.size, arguments.skip_bad)
        for split, entries in splits.items()
        for first in range(0, len(entries), per_shard)
    ]  # fmt: skip
    (out / MANIFEST).unlink(missing_ok=True)  # what it says may not hold until all are written
    lines = parallel(write_shard, jobs, "writing")
    manifest: dict[str, Any] = {"format": FORMAT, "stored_size": arguments.size, "classes": classes, "skipped": []}
    for split in splits:
        manifest[split] = [found for job, found in zip(jobs, lines, strict=True) if job.split == split]
        manifest["skipped"] += [name for found in manifest[split] for name in found.pop("skipped")]
        images = sum(found["images"] for found in manifest[split])
        left_out = len(splits[split]) - images
        print(f"{split}: {images:,} images in {len(manifest[split])} shards, {left_out:,} left out")
    store.write_json(out / MANIFEST, manifest)


def check(out: Path, parallel: Map) -> None:
    """Compare every shard with the manifest.

    Raises:
        UserError: names those that differ.
    """
    manifest = read_manifest(out)
    shards = [shard for split in ("train", "val") for shard in manifest[split]]
    paths = [out / Path(shard["file"]).name for shard in shards]
    sums = parallel(sum_and_count, paths, "checking")
    bad = [str(path) for path, shard, found in zip(paths, shards, sums, strict=True)
           if found != (shard["sha256"], shard["images"])]  # fmt: skip
    if bad:
        raise UserError(f"not as they were written: {', '.join(bad)}; delete them and prepare them again")
    print(f"{len(shards)} shards, {sum(shard['images'] for shard in shards):,} images: as they were written")


def sum_and_count(path: Path) -> tuple[str, int]:
    return (store.sha256_of(path), len(read_index(path)["labels"])) if path.exists() else ("", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="without it, the shards in --out are checked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="shorter side of the stored images (data.stored_size)")
    parser.add_argument("--per-shard", type=int, default=8192, help="images")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--skip-bad", action="store_true", help="leave out, and name, what cannot be decoded")
    arguments = parser.parse_args()
    for name in ("size", "per_shard", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    ignore = (signal.SIGINT, signal.SIG_IGN)  # a worker finishes its shard
    with ProcessPoolExecutor(arguments.workers, initializer=signal.signal, initargs=ignore) as pool:

        def parallel(function: Callable, items: Iterable, what: str) -> list:
            items = list(items)
            done: Iterator = pool.map(function, items)
            return list(track(done, what, total=len(items), disable=not sys.stdout.isatty()))

        try:
            store.make_directory(arguments.out)
            with FileLock(arguments.out / ".lock", timeout=0):
                if arguments.source:
                    prepare(arguments, parallel)
                check(arguments.out, parallel)
        except UserError as error:
            text, code = str(error), 2
        except Timeout:
            text, code = f"{arguments.out}: another process is writing there", 2
        except BrokenProcessPool:
            text, code = "a worker was killed, out of memory perhaps; resume with fewer --workers", 1
        except KeyboardInterrupt:
            text, code = "stopped; the same command resumes", 130
        else:
            return
        pool.shutdown(wait=True, cancel_futures=True)
        print(f"r2: {text}", file=sys.stderr)
        raise SystemExit(code)


if __name__ == "__main__":
    main()

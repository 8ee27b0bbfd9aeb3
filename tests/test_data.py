import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.transforms.v2.functional import pil_to_tensor

from r2.config import UserError
from r2.data.batches import IGNORED
from r2.data.folder import Folder, imagenet
from r2.data.images import decode
from r2.data.memory import digits, fashion_mnist
from r2.dist import World


def folder(tmp_path, classes=3, images=6):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(classes):
            path = tmp_path / split / f"n{c:04d}"
            path.mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(path / f"{i}.jpeg")
    return Folder(str(tmp_path), classes, 32, 0, "error", 4)


@pytest.mark.parametrize("make", [lambda t: digits(), folder])
def test_batches_depend_on_seed_epoch_and_position_alone(make, tmp_path):
    whole = make(tmp_path).to(World())
    batches = [(x, y) for x, y in whole.train(8, seed=1, epoch=2)]
    assert len(batches) == whole.steps(8)
    late = list(whole.train(8, seed=1, epoch=2, start=1))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches[1:], late, strict=True))
    assert not torch.equal(batches[0][0], next(whole.train(8, seed=1, epoch=3))[0])
    halves = [[x for x, _ in whole.to(World(rank, 2)).train(8, seed=1, epoch=2)] for rank in (0, 1)]
    for (x, _), first, second in zip(batches, *halves, strict=True):
        torch.testing.assert_close(x, torch.cat([first, second]))


def test_validation_counts_each_image_once_over_ranks():
    data = digits()
    labels = [torch.cat([y for _, y in data.to(World(r, 3)).val(50)]) for r in range(3)]
    assert sum(map(len, labels)) == data.val_images
    assert torch.equal(torch.cat(labels).bincount(), data._val[1].bincount())


def test_digits_split_is_stratified_and_fixed():
    data = digits()
    assert (data.train_images, data.val_images) == (1433, 364)
    held_out, kept = data._val[1].bincount(), data._train[1].bincount()
    assert torch.equal(held_out, (held_out + kept + 4) // 5)  # every fifth of each class


def test_undecodable_image(tmp_path):
    data = folder(tmp_path).to(World())
    bad = tmp_path / "val" / "n0001" / "3.jpeg"
    bad.write_bytes(b"not an image")
    with pytest.raises(UserError, match="n0001/3.jpeg"):
        list(data.val(4))
    data = Folder(str(tmp_path), 3, 32, 0, "skip", 4).to(World())
    labels = torch.cat([y for _, y in data.val(4)])
    assert data.skipped == 1 and (labels == IGNORED).sum() == 1 and len(labels) == 18


def test_folder_mistakes(tmp_path):
    folder(tmp_path)
    with pytest.raises(UserError, match="3 class folders, not 1000"):
        imagenet(str(tmp_path))
    for file in (tmp_path / "train" / "n0002").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="n0002"):
        Folder(str(tmp_path), 3, 32, 0, "error", 4)


def test_truncated_fashion_mnist(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match="train-images-idx3-ubyte: is truncated"):
        fashion_mnist(str(tmp_path))


@pytest.mark.parametrize("extension", IMG_EXTENSIONS)
def test_every_image_that_image_folder_reads(tmp_path, extension):
    """The pixels are those of torchvision's default loader; a lossy format may be decoded by another library."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    written = []
    for mode in ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16"):
        image = Image.fromarray(pixels)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
        path = tmp_path / f"{mode.strip(';')}{extension}"
        try:
            image.save(path)
        except OSError:  # the format has no such mode
            continue
        written.append(mode)
        expected = pil_to_tensor(default_loader(str(path))).int()
        found = decode(torch.from_numpy(np.fromfile(path, np.uint8))).int()
        assert found.shape == expected.shape, mode
        if mode == "I;16":  # PIL cuts 16 bits off at 255, torchvision scales them
            assert torch.equal(found[0], torch.from_numpy(pixels[..., 0]).int()) or torch.equal(found, expected)
        elif mode in ("RGBA", "LA") and extension == ".webp":  # PIL keeps what is under transparent pixels
            assert (found - expected).abs().float().mean() < 8
        else:
            lossless = extension in (".bmp", ".ppm", ".pgm", ".png", ".tif", ".tiff")
            assert (found - expected).abs().max() <= (0 if lossless else 8), mode
    assert "L" in written


def test_what_begins_with_a_dot_is_no_image_and_no_class(tmp_path):
    data = folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / ".DS_Store").write_bytes(b"\0")
        for image in list((tmp_path / split).rglob("*.jpeg")):
            image.with_name(f"._{image.name}").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
        hidden = tmp_path / split / "n0001" / ".thumbs"
        hidden.mkdir()
        (hidden / "0.jpeg").write_bytes(b"not an image")
    again = Folder(str(tmp_path), 3, 32, 0, "error", 4)
    assert (again.train_images, again.val_images) == (data.train_images, data.val_images)
    assert again.fingerprint() == data.fingerprint()


def test_a_file_name_that_is_not_utf8(tmp_path, capsys):
    data = folder(tmp_path)
    place = os.fsencode(tmp_path / "val" / "n0001")
    os.rename(place + b"/3.jpeg", place + b"/caf\xe9.jpeg")
    renamed = Folder(str(tmp_path), 3, 32, 0, "error", 4)
    assert renamed.fingerprint() != data.fingerprint()  # the names are part of what was trained on
    assert sum(len(y) for _, y in renamed.to(World()).val(4)) == 18
    with open(place + b"/caf\xe9.jpeg", "wb") as file:
        file.write(b"not an image")
    with pytest.raises(UserError, match="cannot be decoded"):
        list(renamed.val(4))

import numpy as np
import pytest
import torch
from PIL import Image

from r2.config import UserError
from r2.data.batches import IGNORED
from r2.data.folder import Folder, imagenet
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

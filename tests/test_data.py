import contextlib
import gzip
import hashlib
import io
import os
import pickle
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.transforms.v2.functional import pil_to_tensor

from r2.config import UserError
from r2.data.batches import IGNORED
from r2.data.folder import Folder, imagenet, imagenette
from r2.data.folder import folder as own
from r2.data.images import Images, decode
from r2.data.memory import cifar10, digits, fashion_mnist
from r2.dist import World
from r2.plan.cells import cells_of


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


def idx(folder, name, values, header, packed):
    content = bytes(header) + values.tobytes()
    path = folder / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    return path


@pytest.mark.parametrize("place, packed", [(".", False), ("FashionMNIST/raw", True)])
def test_fashion_mnist_as_downloaded_or_unpacked(tmp_path, place, packed):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = np.repeat(labels, 784)
        last = idx(folder, f"{name}-images-idx3-ubyte", pixels, 16, packed)
        idx(folder, f"{name}-labels-idx1-ubyte", labels, 8, packed)
    data = fashion_mnist(str(tmp_path), calibration_images=20).to(World())
    assert (data.train_images, data.val_images) == (60_000, 10_000)
    images, labels = data._val
    assert torch.equal(images[:, 0, 16, 16].long(), labels) and torch.equal(labels[:20], torch.arange(20) % 10)
    content = bytearray(last.read_bytes())
    content[100:200] = bytes(255 for _ in range(100))
    last.write_bytes(content if packed else content[:-1])
    with pytest.raises(UserError, match=f"{last.name}: (cannot be read|is truncated)"):
        fashion_mnist(str(tmp_path))


def cifar_archive(folder):
    """An archive in CIFAR-10's layout of 10 images per batch, and the checksums that torchvision is to expect."""
    sums, base = {}, CIFAR10.base_folder
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as tar:
        for batch, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", "")]):
            labels = list(range(10))
            pixels = np.full((10, 3072), 20 * batch, np.uint8)
            content = pickle.dumps({"data": pixels, "labels": labels, "label_names": [str(i) for i in labels]})
            sums[name] = hashlib.md5(content).hexdigest()
            member = tarfile.TarInfo(f"{base}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sums["archive"] = hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest()
    return sums


def test_cifar10_as_downloaded_or_unpacked(tmp_path, monkeypatch):
    sums = cifar_archive(tmp_path)
    monkeypatch.setattr(CIFAR10, "tgz_md5", sums["archive"])
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere")  # nothing may be fetched
    for names in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, names, [[name, sums[name]] for name, _ in getattr(CIFAR10, names)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    packed = cifar10(str(tmp_path))
    assert (packed.train_images, packed.val_images) == (50, 10) and int(packed._val[0].max()) == 100
    (tmp_path / CIFAR10.filename).unlink()
    for place in (tmp_path, tmp_path / CIFAR10.base_folder):
        assert cifar10(str(place)).fingerprint() == packed.fingerprint()
    (tmp_path / CIFAR10.base_folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no CIFAR-10 there, and it cannot be downloaded"):
        cifar10(str(tmp_path))


@pytest.mark.parametrize("name", ["imagenette2", "imagenette2-320", "imagenette2-160"])  # fastai's three archives
def test_imagenette_in_the_folder_or_below_it(tmp_path, name):
    folder(tmp_path / name, classes=10, images=1)
    below, itself = imagenette(str(tmp_path)), imagenette(str(tmp_path / name))
    assert below.fingerprint() == itself.fingerprint() and below.val_images == 10


def test_images_without_class_folders_are_reported_with_what_to_do(tmp_path):
    """As ILSVRC2012_img_val.tar and the archives inside ILSVRC2012_img_train.tar leave them."""
    folder(tmp_path)

    def told():
        with pytest.raises(UserError) as error:
            Folder(str(tmp_path), 3, 32, 0, "error", 4)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"data.root={tmp_path}: ")
        return str(error.value)

    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    assert "val has images outside of class folders (ILSVRC2012_val_00000001.JPEG); move each into" in told()
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "n01440764.tar").write_bytes(b"")
    assert "train has archives (n01440764.tar); extract each into a folder of its name" in told()
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    assert f"prepare_imagenet.py --source {tmp_path} --out SHARDS" in told()


def test_a_folder_of_ones_own_counts_its_classes(tmp_path):
    folder(tmp_path, classes=5)
    data = own(str(tmp_path), 32, workers=0)
    assert (data.num_classes, data.train_images, data.val_images) == (5, 30, 30)


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_folder_without_validation_images_is_split_by_seed_within_every_class(tmp_path, inside):
    folder(tmp_path / "made", classes=3, images=10)
    (tmp_path / "made" / "train").rename(tmp_path / "one")
    root = tmp_path / "one"
    if inside:
        (tmp_path / "outer").mkdir()
        root = (tmp_path / "one").rename(tmp_path / "outer" / inside).parent
    data = own(str(root), 32, val_fraction=0.3, workers=0)
    assert (data.num_classes, data.train_images, data.val_images) == (3, 21, 9)
    train, val = data._train_source, data._val_source
    assert np.bincount(val.labels).tolist() == [3, 3, 3] and not set(train.names) & set(val.names)
    assert own(str(root), 32, val_fraction=0.3, workers=0).fingerprint() == data.fingerprint()
    assert own(str(root), 32, val_fraction=0.3, split_seed=1, workers=0).fingerprint() != data.fingerprint()
    with pytest.raises(UserError, match="leaves the class n0000 of 10 images without images for validation"):
        own(str(root), 32, val_fraction=0.01, workers=0)


def test_a_place_without_images_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder of images there"):
        own(str(tmp_path), 32)


# Rectangles, and images listed in CSV


def listed(root, name, rows, head="path,label"):
    (root / name).write_text("\n".join([head, *rows]) + "\n")
    return name


@pytest.fixture
def images(tmp_path):
    """Six images, red ones wider than high, blue ones higher than wide."""
    for i in range(6):
        size, colour = ((60, 40), (255, 0, 0)) if i % 2 else ((40, 60), (0, 0, 255))
        Image.new("RGB", size, colour).save(tmp_path / f"{i}.png")
    return tmp_path


def test_images_listed_in_csv(images):
    train = listed(images, "train.csv", [f'{i}.png,"{"red, wide" if i % 2 else "blue"}"' for i in range(4)])
    val = listed(images, "val.csv", ['5.png,7,"red, wide"', "4.png,7,blue"], head="path,other,label")
    with contextlib.closing(own(str(images), 32, train, val, workers=0).to(World())) as data:
        assert (data.num_classes, data.train_images, data.val_images) == (2, 4, 2)
        ((pixels, labels),) = data.val(2)
    assert labels.tolist() == [1, 0] and pixels[0, 0].min() > pixels[1, 0].max()  # red is class 1, by name
    numbers = listed(images, "numbers.csv", [f"{i}.png,{i % 2}" for i in range(6)])
    with contextlib.closing(own(str(images), 32, numbers, val_fraction=0.34, workers=0).to(World())) as data:
        assert (data.train_images, data.val_images) == (4, 2)
        ((_, labels),) = data.val(2)
        assert sorted(labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    "rows, said",
    [
        (["0.png,a", "1.png"], "line 3: has to be a path and a label under path,label"),
        (["0.png,a", "1.png,a,b"], "line 3: has to be a path and a label"),
        (["0.png,a", "none.png,a"], "line 3: there is no image .*none.png"),
        (["0.png,a", "val.csv,a"], "line 3: val.csv does not have the extension of an image"),
        (["0.png,a", "0.png,b"], "line 3: 0.png stands in line 2 already"),
        (["0.png,1", "1.png,2"], "has no image of label 0; integers have to be 0 to 1"),
        ([], "lists no image"),
    ],
)
def test_a_bad_row_of_a_csv_is_reported_by_its_line(images, rows, said):
    listed(images, "val.csv", ["2.png,a"])
    with pytest.raises(UserError, match=rf"^data\.train_csv=train\.csv.*{said}"):
        own(str(images), train_csv=listed(images, "train.csv", rows), val_csv="val.csv")


def test_csv_files_that_are_not_there_or_do_not_fit_are_reported(images):
    train = listed(images, "train.csv", ["0.png,a", "1.png,b"])
    with pytest.raises(UserError, match="val.csv, line 2: c is no label of train.csv"):
        own(str(images), train_csv=train, val_csv=listed(images, "val.csv", ["2.png,c"]))
    with pytest.raises(UserError, match="none.csv: cannot be read .*data.root="):
        own(str(images), train_csv="none.csv")
    with pytest.raises(UserError, match="has to name the columns path and label"):
        own(str(images), train_csv=listed(images, "other.csv", ["0.png,a"], head="file,class"))
    with pytest.raises(UserError, match="goes with data.train_csv"):
        own(str(images), val_csv="val.csv")


def test_a_rectangle_covers_the_middle_and_keeps_proportions(tmp_path):
    """Validation images are cut, not squeezed: a circle stays one, and so it nearly does in training crops."""
    pixels = np.zeros((120, 120, 3), np.uint8)
    y, x = np.mgrid[:120, :120] - 59.5
    pixels[x * x + y * y < 20**2] = 255
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
    with contextlib.closing(own(str(tmp_path), [48, 96], workers=0).to(World())) as data:
        assert "48x96" in data.describe()
        ((val, _),) = data.val(1)
        (crop, _) = next(data.train(1, 0, 0))
        boxes = [data._decoder.draw(torch.empty(3, 200, 200), seed)[2:4] for seed in range(50)]
    assert val.shape == crop.shape == (1, 3, 48, 96)
    white = (val[0, 0] > 0).nonzero()
    height, width = (white.amax(0) - white.amin(0) + 1).tolist()
    assert abs(height - width) <= 1 and abs(width - 40 * 96 * 8 / 7 / 120) <= 2
    assert all(1.4 < width / height < 2.8 for height, width in boxes)


class LateStream:
    """A CUDA stream that copies only when it is waited for."""

    def __init__(self):
        self.waiting = []

    def synchronize(self, upto=None):
        for copy in self.waiting[:upto]:
            copy()
        self.waiting[:upto] = [lambda: None] * len(self.waiting[:upto])

    def record_event(self):
        upto = len(self.waiting)
        return SimpleNamespace(synchronize=lambda: self.synchronize(upto))


@pytest.mark.parametrize("workers, refused", [(0, 0), (2, 0), (0, 1)])
def test_a_gpu_reads_the_workers_memory_before_it_is_written_again(tmp_path, monkeypatch, workers, refused):
    folder(tmp_path, classes=2, images=200)

    def make():
        return Folder(str(tmp_path), 2, 32, workers, "error", 4).to(World())

    with contextlib.closing(make()) as data:
        expected = [list(data.train(20, seed=0, epoch=epoch)) for epoch in (0, 1)]

    registered, calls = [], []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda at, size, flags: calls.append((at, size)) or refused or registered.append(at) or 0,
        cudaHostUnregister=lambda at: registered.remove(at),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(Images, "_beside_the_model", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(Images, "_hand_over", lambda self, images: None)
    normalise = Images._normalise

    def late(self, pixels, out):
        pixels = pixels if self._registered else pixels.clone()
        self._stream.waiting.append(lambda: normalise(self, pixels, out))

    monkeypatch.setattr(Images, "_normalise", late)
    with contextlib.closing(make()) as data:
        data._stream = LateStream()
        found = [list(data.train(20, seed=0, epoch=epoch)) for epoch in (0, 1)]
        data._stream.synchronize()
        places = data._decoder.places
        assert registered == ([] if refused else [places.data_ptr()])
        assert calls == [(places.data_ptr(), places.nbytes)]
    assert registered == []
    for (x, y), (z, t) in zip(sum(found, []), sum(expected, []), strict=True):
        assert torch.equal(x, z) and torch.equal(y, t)


def test_class_folders_of_ones_own_that_do_not_match_or_are_empty_are_named(tmp_path):
    folder(tmp_path, classes=3)
    shutil.rmtree(tmp_path / "val" / "n0002")
    with pytest.raises(UserError, match="val has 2 class folders, not 3; train and val differ .*n0002"):
        own(str(tmp_path), 32, workers=0)
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split)
        (tmp_path / split).mkdir()
    with pytest.raises(UserError, match="train has 0 class folders"):
        Folder(str(tmp_path), None, 32, 0, "error", 4)
    with pytest.raises(UserError, match="data.root="):
        own(str(tmp_path), 32, workers=0)


def test_data_are_looked_for_where_the_environment_says(tmp_path, monkeypatch):
    config = ["data=imagenet", "stage=fp32"]
    monkeypatch.delenv("R2_DATA", raising=False)
    assert cells_of(config)[0].config["data"]["root"] == "data/imagenet"
    monkeypatch.setenv("R2_DATA", str(tmp_path))
    assert cells_of(config)[0].config["data"]["root"] == f"{tmp_path}/imagenet"

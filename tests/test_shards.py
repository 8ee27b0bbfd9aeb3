"""scripts/prepare_imagenet.py and data=imagenet_shards: the images of the folder, in the same order."""

import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from r2.config import UserError
from r2.data import images as images_module
from r2.data.folder import Folder
from r2.data.images import decode
from r2.data.shards import Shards, imagenet_shards, read_index
from r2.dist import World

CLASSES, PER_CLASS, SIZE, STORED = ("n01", "n02", "n03"), 12, 56, 64


def script():
    path = Path(__file__).parents[1] / "scripts" / "prepare_imagenet.py"
    spec = importlib.util.spec_from_file_location("prepare_imagenet", path)
    sys.modules["prepare_imagenet"] = module = importlib.util.module_from_spec(spec)  # its workers look it up
    spec.loader.exec_module(module)
    return module


def prepare(monkeypatch, *arguments):
    """Run the script in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["prepare_imagenet.py", *map(str, arguments), "--workers", "1"])
    try:
        script().main()
    except SystemExit as stop:
        return stop.code
    return 0


SHAPE = ("--size", STORED, "--per-shard", 10)


def encoded(picture, kind="JPEG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def photographs(count):
    """Pieces of a photograph that ships with scikit-learn, in several shapes."""
    photo, rng = Image.fromarray(load_sample_image("china.jpg")), np.random.default_rng(0)
    for i in range(count):
        width, height = ((160, 120), (96, 128), (60, 50))[i % 3]  # the last is smaller than what is stored
        left, top = int(rng.integers(640 - 2 * width)), int(rng.integers(427 - 2 * height))
        yield photo.resize((width, height), Image.BICUBIC, (left, top, left + 2 * width, top + 2 * height))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for split, per_class in (("train", PER_CLASS), ("val", 4)):
        pictures = photographs(len(CLASSES) * per_class)
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            name = f"{CLASSES[i % 3]}_{i}" if split == "train" else f"ILSVRC2012_val_{i + 1:08d}"
            (root / split / CLASSES[i % 3] / f"{name}.JPEG").write_bytes(encoded(picture, quality=92))
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        assert prepare(patch, "--source", folder, "--out", out, *SHAPE) == 0
    return out


def of(root, workers=0, kind=Shards, image_size=SIZE):
    extra = (STORED,) if kind is Shards else ()
    return kind(str(root), len(CLASSES), image_size, *extra, workers, "error", 10).to(World())


def grey_levels(a, b):
    """Mean difference in the 256 levels of a pixel."""
    return float((a - b).abs().mean() * 0.226 * 255)


def test_shards_give_what_the_folder_gives(folder, shards):
    ours, theirs = of(shards), of(folder, kind=Folder)
    assert ours.describe() == theirs.describe()
    for (x, y), (u, v) in zip(ours.val(5), theirs.val(5), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    for epoch in (0, 1):
        for (_, y), (_, v) in zip(ours.train(8, 3, epoch), theirs.train(8, 3, epoch), strict=True):
            assert torch.equal(y, v)
    for (x, y), (u, v) in zip(ours.calibration(5, 3), theirs.calibration(5, 3), strict=True):
        assert torch.equal(y, v) and grey_levels(x, u) < 6


def test_crops_of_stored_images_follow_the_same_distribution(shards):
    """Area, shape and flip are the same draws, but for rounding; the place is another draw of one distribution."""
    from scipy.stats import ks_2samp

    data = of(shards)
    decoder = (data._started(), data._decoder)[1]
    found = []
    for height, width in ((375, 500), (256, 341)):
        image = torch.empty(3, height, width, device="meta")
        boxes = np.array([decoder.draw(image, seed) for seed in range(1500)], dtype=float)
        top, left, h, w, flip = boxes.T
        free = np.stack([top / np.maximum(height - h, 1), left / np.maximum(width - w, 1)])
        found.append((h / height, w / width, flip, *free))
    big, small = found
    for a, b in zip(big[:2], small[:2], strict=True):
        assert (np.abs(a - b) < 1.01 / 256).mean() > 0.99  # one pixel; a window that just fits one of them is rare
    assert (big[2] == small[2]).mean() > 0.99 and abs(big[2].mean() - 0.5) < 0.04
    for a, b in zip(big[3:], small[3:], strict=True):
        assert ks_2samp(a, b).pvalue > 0.01


def test_crops_are_torchvisions(folder):
    from torchvision.transforms import v2

    from r2.data.batches import mix

    data = of(folder, kind=Folder)
    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])
    source, decoder = data._train_source, (data._started(), data._decoder)[1]
    for index in range(data.train_images):
        torch.manual_seed(mix(5, 6, index))
        wanted = transform(decode(source.read(index)))
        decoder[images_module._Task(0, [index], 5, 6, True)]
        assert torch.equal(decoder.places[0, 0].permute(2, 0, 1), wanted)


@pytest.mark.parametrize("kind", [Shards, Folder])
def test_an_epoch_resumes_exactly_with_any_number_of_workers(folder, shards, kind, monkeypatch):
    monkeypatch.setattr(images_module, "PIECE", 3)  # several pieces in a batch, and places used again
    monkeypatch.setattr(images_module, "AHEAD", 2)
    root = shards if kind is Shards else folder
    whole = [(x, y) for x, y in of(root, 0, kind).train(7, seed=2, epoch=1)]
    assert len(whole) == 5
    for workers in (1, 2):
        data = of(root, workers, kind)
        next(data.train(7, seed=9, epoch=0))  # given up after a batch
        for start in (0, 3):
            found = list(data.train(7, seed=2, epoch=1, start=start))
            for (x, y), (u, v) in zip(found, whole[start:], strict=True):
                assert torch.equal(x, u) and torch.equal(y, v) and x.is_contiguous(memory_format=torch.channels_last)
        assert sum(len(y) for _, y in data.val(5)) == data.val_images


def test_only_one_pass_at_a_time(shards):
    data = of(shards)
    first = data.train(4, 0, 0)
    next(first)
    next(data.val(4))
    with pytest.raises(RuntimeError, match="another pass"):
        next(first)


def test_random_numbers_of_the_model_are_left_alone(shards):
    data = of(shards)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    list(data.train(8, 0, 0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory to look at")
def test_too_little_shared_memory_is_said(shards, monkeypatch):
    monkeypatch.setattr(images_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1 << 20))
    data = of(shards, workers=200)
    with pytest.raises(UserError, match="data.workers=200: needs .* MiB in /dev/shm"):
        next(data.train(8, 0, 0))


def test_a_shard_is_webdatasets_tar(shards):
    path = shards / "train-00001.tar"
    index = read_index(path)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:4]] == ["00000010.jpg", "00000010.cls", "00000011.jpg", "00000011.cls"]
        assert [m.offset_data for m in members[::2]] == index["offsets"].tolist()
        assert [m.size for m in members[::2]] == index["lengths"].tolist()
        assert [int(tar.extractfile(m).read()) for m in members[1::2]] == index["labels"].tolist()
        picture = Image.open(tar.extractfile(members[0]))
        assert (picture.height, picture.width) == tuple(index["sizes"][0]) and min(picture.size) <= STORED


def test_webdataset_reads_a_shard(shards):
    webdataset = pytest.importorskip("webdataset")
    path = shards / "train-00001.tar"
    samples = webdataset.WebDataset(str(path), shardshuffle=False).to_tuple("jpg", "cls")
    assert [int(label) for _, label in samples] == read_index(path)["labels"].tolist()


def test_photograph_as_stored_is_close():
    """Training images are JPEG of quality 90 at the stored size, validation images are without loss."""
    module = script()
    original = encoded(Image.fromarray(load_sample_image("china.jpg")), quality=95)
    for split, decibels in (("train", 35), ("val", np.inf)):
        picture = module.stored(original, split, 256)
        assert min(picture.size) == 256
        stored = decode(torch.frombuffer(bytearray(module.encode(picture, split)), dtype=torch.uint8))
        error = np.square(np.asarray(picture).astype(float) - stored.permute(1, 2, 0).numpy()).mean()
        assert 10 * np.log10(255**2 / error if error else np.inf) >= decibels


def tar_of(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def official(folder, out):
    """The three files of ILSVRC2012, of the images in `folder`; IDs do not follow the order of the names."""
    import gzip

    from scipy.io import savemat

    ids = {"n01": 3, "n02": 1, "n03": 2}
    inner = []
    for name in sorted(CLASSES, reverse=True):
        files = [(path.name, path.read_bytes()) for path in sorted((folder / "train" / name).iterdir())]
        inner.append((f"{name}.tar", tar_of(files)))
    (out / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    val = sorted((folder / "val").glob("*/*"), key=lambda path: path.name)
    files = [(path.name, path.read_bytes()) for path in val]
    (out / "ILSVRC2012_img_val.tar").write_bytes(tar_of(files))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(i, name, "", "", 0) for name, i in ids.items()] + [(4, "n99", "", "", 3)], dtype=kind)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[path.parent.name]}\n" for path in val)
    data = "ILSVRC2012_devkit_t12/data/"
    devkit = [(data + "meta.mat", meta.getvalue()), (data + "ILSVRC2012_validation_ground_truth.txt", truth.encode())]
    (out / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_of(devkit)))


def test_official_files_give_the_same_shards(folder, shards, tmp_path, monkeypatch, capsys):
    official(folder, tmp_path)
    assert prepare(monkeypatch, "--source", tmp_path, "--out", tmp_path / "out", *SHAPE) == 0
    assert "36 images in 4 shards, 0 left out" in capsys.readouterr().out
    assert (tmp_path / "out" / "manifest.json").read_text() == (shards / "manifest.json").read_text()

    whole = (tmp_path / "ILSVRC2012_img_val.tar").read_bytes()
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(whole[: len(whole) // 2])
    assert prepare(monkeypatch, "--source", tmp_path, "--out", tmp_path / "out2", *SHAPE) == 2
    assert "ILSVRC2012_img_val.tar: " in capsys.readouterr().err
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    assert prepare(monkeypatch, "--source", tmp_path, "--out", tmp_path / "out2", *SHAPE) == 2
    assert "nor the official ILSVRC2012_img_val.tar" in capsys.readouterr().err


def test_a_flat_val_is_reported_with_what_to_do(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    for path in (folder / "val").glob("*/*"):
        shutil.copy(path, tmp_path / "val")
    assert prepare(monkeypatch, "--source", tmp_path, "--out", tmp_path / "out", *SHAPE) == 2
    error = capsys.readouterr().err
    assert "val has images outside of class folders (ILSVRC2012_val_00000001.JPEG); move each" in error
    assert len(error.splitlines()) == 1


def test_a_stopped_preparation_resumes(folder, shards, tmp_path, monkeypatch):
    out = shutil.copytree(shards, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "manifest.json").unlink()
    (out / "train-00002.npz").unlink()  # killed between the shard and its index
    (out / "train-00003.npz").write_bytes(b"damaged")
    (out / "val-00000.tar").unlink()
    (out / ".val-00000.tar.part").write_bytes(b"half")
    assert prepare(monkeypatch, "--source", folder, "--out", out, *SHAPE) == 0
    assert (out / "manifest.json").read_text() == (shards / "manifest.json").read_text()
    again = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != before[path.name]}
    assert again == {"train-00002.tar", "train-00003.tar", "val-00000.tar"} and not list(out.glob("*.part"))
    prepare(monkeypatch, "--source", folder, "--out", out, "--size", 48, "--per-shard", 10)  # other settings: all again
    assert json.loads((out / "manifest.json").read_text())["stored_size"] == 48


def test_odd_images(folder, tmp_path, monkeypatch, capsys):
    source = shutil.copytree(folder, tmp_path / "source")
    picture = next(photographs(1))
    odd = {
        "cmyk.JPEG": encoded(picture.convert("CMYK")),
        "grey.JPEG": encoded(picture.convert("L")),
        "deep.png": encoded(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG"),
        "really_png.JPEG": encoded(picture.convert("RGBA"), "PNG"),
        "progressive.JPEG": encoded(picture, progressive=True),
    }
    for split in ("train", "val"):
        for name, content in odd.items():
            (source / split / "n02" / name).write_bytes(content)
    data = of(source, kind=Folder)
    assert sum(len(y) for _, y in data.val(4)) == data.val_images and data.skipped == 0
    (source / "train" / "n01" / "empty.JPEG").write_bytes(b"")
    (source / "train" / "n03" / "half.JPEG").write_bytes(encoded(picture)[:1500])
    out = tmp_path / "out"
    assert prepare(monkeypatch, "--source", source, "--out", out, *SHAPE) == 2
    error = capsys.readouterr().err
    assert "n01/empty.JPEG" in error and "is empty" in error and len(error.splitlines()) == 1
    assert prepare(monkeypatch, "--source", source, "--out", out, *SHAPE, "--skip-bad") == 0
    assert json.loads((out / "manifest.json").read_text())["skipped"] == ["n01/empty.JPEG", "n03/half.JPEG"]
    ours, theirs = of(out), of(source, kind=Folder)
    assert (ours.train_images, ours.val_images) == (36 + 5, 12 + 5)
    for (x, _), (u, _) in zip(ours.val(5), theirs.val(5), strict=True):
        assert torch.equal(x, u)
    assert sum(len(y) for _, y in ours.train(8, 0, 0)) == 40
    data = Folder(str(source), 3, SIZE, 1, "skip", 4).to(World())
    list(data.train(43, 0, 0))
    list(data.train(43, 0, 1))
    told = capsys.readouterr().out
    assert data.skipped == 4 and told.count("empty.JPEG") == told.count("half.JPEG") == 1  # named once
    assert "/__w/" not in told and "truncated" in told


def test_damaged_and_mistaken_shards(shards, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no readable manifest.json; make or finish"):
        of(tmp_path)
    with pytest.raises(UserError, match="hold 3 classes, not 1000"):
        imagenet_shards(str(shards))
    with pytest.raises(UserError, match="data.stored_size=128: the shards in .* hold 64"):
        Shards(str(shards), 3, SIZE, 128, 0, "error", 4)
    with pytest.raises(UserError, match="data.image_size=64: needs images stored at 73"):
        Shards(str(shards), 3, 64, STORED, 0, "error", 4)

    out = shutil.copytree(shards, tmp_path / "out")
    assert prepare(monkeypatch, "--out", out) == 0
    damaged = out / "train-00001.tar"
    content = bytearray(damaged.read_bytes())
    content[3000] ^= 1
    damaged.write_bytes(content)
    assert prepare(monkeypatch, "--out", out) == 2
    assert f"not as they were written: {damaged}" in capsys.readouterr().err
    reading, starting = of(out), of(out)
    next(reading.train(36, 0, 0))
    damaged.write_bytes(content[:2000])  # while it is in use
    with pytest.raises(UserError, match="train-00001.tar: n0.*cannot be decoded .the shard ends early"):
        list(reading.train(36, 0, 1))
    with pytest.raises(UserError, match="train-00001.tar: was replaced while a run reads it"):
        list(starting.train(36, 0, 0))
    with pytest.raises(UserError, match="train-00001.tar: has 2000 bytes"):
        of(out)
    damaged.with_suffix(".npz").write_bytes(b"not an index")
    with pytest.raises(UserError, match="train-00001.npz: is not the index of a shard"):
        of(out)


def test_a_second_preparation_waits_for_no_one(shards, folder, monkeypatch, capsys):
    from filelock import FileLock

    with FileLock(shards / ".lock"):
        assert prepare(monkeypatch, "--source", folder, "--out", shards, *SHAPE) == 2
    assert "another process is writing there" in capsys.readouterr().err


def test_no_space(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert prepare(monkeypatch, "--source", folder, "--out", tmp_path, *SHAPE) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "resumes here" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*.part"))


def test_what_identifies_the_image_folder_stays():
    """A finished run of data=imagenet is found again: these keys, and no others, are in its fingerprint."""
    import yaml

    node = yaml.safe_load((Path(__file__).parents[1] / "configs" / "data" / "imagenet.yaml").read_text())
    assert {k: v for k, v in node.items() if k not in ("root", "workers")} == {
        "_target_": "r2.data.folder.imagenet", "image_size": 224, "on_bad_image": "error", "calibration_images": 2000,
    }  # fmt: skip


def check_dali(shards, device):
    from r2.data.dali import DALIShards

    ours = Shards(str(shards), 3, SIZE, STORED, 0, "error", 4).to(World(device=device))
    dali = DALIShards(str(shards), 3, SIZE, STORED, 0, "error", 4).to(World(device=device))
    for start in (0, 2):
        for (x, y), (u, v) in zip(ours.train(8, 3, 1, start), dali.train(8, 3, 1, start), strict=True):
            assert torch.equal(y, v) and x.stride() == u.stride() and grey_levels(x, u) < 1
    for (x, y), (u, v) in zip(ours.val(5), dali.val(5), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_dali_on_the_cpu(shards):
    pytest.importorskip("nvidia.dali")
    check_dali(shards, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dali_on_the_gpu(shards):
    pytest.importorskip("nvidia.dali")
    check_dali(shards, torch.device("cuda", 0))


def test_without_dali(shards, monkeypatch):
    from r2.data.dali import imagenet_dali

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install 'r2\[dali\]'"):
        imagenet_dali(str(shards))


@pytest.mark.parametrize("option", ["--per-shard", "--size"])
def test_numbers_below_one_are_refused(option, monkeypatch, tmp_path, capsys):
    assert prepare(monkeypatch, "--out", tmp_path, option, 0) == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err

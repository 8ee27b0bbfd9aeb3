"""Weights, images, folders and files as they should not be: a finite result, or one line that names what is wrong."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_security import composed
from torch import nn

from r2 import compose, record, store
from r2.config import UserError
from r2.data.batches import IGNORED
from r2.data.folder import Folder
from r2.data.images import decode
from r2.dist import World
from r2.export.__main__ import export_run
from r2.palettize import Palette
from r2.plan import cells as planned
from r2.quantizers.affine import Activation, Affine
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import quantizable, signal_to_noise, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT
from r2.recipe import Recipe
from r2.record import read
from r2.run import experiment
from r2.training.loop import train

# Weights

NORMAL = 0.1 * torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
CHANNEL = torch.arange(8).view(8, 1, 1, 1)
WEIGHTS = {
    "constant": torch.full_like(NORMAL, -0.3),
    "zero": torch.zeros_like(NORMAL),
    "zero channel": NORMAL * (CHANNEL != 2),
    "constant channel": torch.where(CHANNEL == 2, 0.3, NORMAL),
    "outlier": torch.where(torch.arange(288).view_as(NORMAL) == 77, 1e6, NORMAL),
    "three values": 0.1 * (torch.arange(288.0) % 3).view_as(NORMAL),
    "vanishing": 1e-30 * NORMAL,
    "one": torch.full((1, 1, 1, 1), 0.5),
    "one, zero": torch.zeros(1, 1, 1, 1),
}
METHODS = {
    "ewgs": lambda bits: EWGS(bits, bits, delta=0.1),
    "lsq": lambda bits: LSQ(bits, bits),
    "pact": lambda bits: PACT(bits, bits),
    "dkm": lambda bits: Palette(bits),
    "dkm over vectors": lambda bits: Palette(bits, dim=2),
}


def layer(weight, method, bits, dtype=torch.float32):
    """A calibrated layer, and its input."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    with torch.no_grad():
        conv.weight.copy_(weight)
    conv, x = conv.to(dtype), torch.rand(2, weight.shape[1], 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    layers = quantizable(conv)
    swap(layers, lambda name: METHODS[method](bits))
    calibrate(conv, layers, x)
    return conv, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_odd_weights_are_quantized_and_trained_without_a_division_by_zero(method, bits, dtype):
    if (method, bits) == ("lsq", 1):  # not defined
        with pytest.raises(UserError, match="1 bit signed"):
            layer(NORMAL, method, bits, dtype)
        return
    for name, weight in WEIGHTS.items():
        conv, x = layer(weight, method, bits, dtype)
        y = conv(x)
        y.float().sum().backward()
        gradients = [p.grad for p in conv.parameters() if p.requires_grad]
        assert all(g is not None and torch.isfinite(g).all() for g in gradients), name
        assert torch.isfinite(y).all() and torch.isfinite(conv.eval()(x)).all(), name
        quantized = conv.quantizer.weight(conv.weight)
        assert torch.equal(conv.quantizer.decode(conv.quantizer.encode(conv.weight), conv.weight), quantized), name
        numbers = 2**bits * (2 if method == "dkm over vectors" else 1)
        tail = int(weight.numel() == 1)  # a vector's layer of one channel stays as it is
        assert len(quantized.unique()) <= numbers + tail, name
        assert all(np.isfinite(list(signal_to_noise(conv, x).values()))), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_weight_is_the_one_that_training_computes_in_any_type(method, dtype):
    """Large enough for compiled kernels, which keep 16-bit values in float32 between operations."""
    weight = 0.05 * torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    conv, _ = layer(weight, method, 4, dtype)
    with torch.no_grad():
        quantized = conv.eval().quantizer.weight(conv.weight)
    assert torch.equal(conv.quantizer.decode(conv.quantizer.encode(conv.weight), conv.weight), quantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_named(method, value):
    with pytest.raises(UserError, match="its weight is not finite and cannot be quantized"):
        layer(torch.where(CHANNEL == 2, value, NORMAL), method, 2)


def test_an_affine_grid_of_any_range_is_finite():
    for weight in WEIGHTS.values():
        for bits in (1, 4):
            grid = Affine(bits, len(weight))
            low, high = weight.flatten(1).aminmax(dim=1)
            grid.scale.copy_((high - low).clamp(min=1e-8) / (2**bits - 1))  # as AIMET, which has a smallest range
            grid.zero_point.copy_((-low / grid.scale).round())
            values = grid.weight(weight)
            assert torch.isfinite(values).all()
            assert all(len(row.unique()) <= 2**bits for row in values)
            assert torch.isfinite(Activation(bits, grid.scale[0].item(), grid.zero_point[0].item())(weight)).all()


# Images


def picture(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned():
    """A JPEG whose EXIF tag asks to show it turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


DEEP = np.asarray(picture("L")).astype(np.uint16) * 257
ODD = {
    "grey JPEG": encoded(picture("L"), "JPEG"),
    "CMYK JPEG": encoded(picture("CMYK"), "JPEG"),
    "JPEG turned by EXIF": turned(),
    "palette PNG": encoded(picture("P"), "PNG"),
    "1-bit PNG": encoded(picture("1"), "PNG"),
    "16-bit PNG": encoded(Image.fromarray(DEEP), "PNG"),
    "PNG with alpha": encoded(picture("RGBA"), "PNG"),
    "GIF": encoded(picture("P"), "GIF"),
    "WebP": encoded(picture(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_image_is_decoded_as_pil_shows_it(kind):
    """An EXIF rotation is not applied, as by torchvision's ImageFolder, with which ImageNet's numbers are made."""
    found = decode(torch.frombuffer(bytearray(ODD[kind]), dtype=torch.uint8))
    assert found.shape == (3, 40, 50) and found.dtype == torch.uint8
    shown = picture("L") if kind == "16-bit PNG" else Image.open(io.BytesIO(ODD[kind]))  # PIL would cut its levels off
    difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(shown.convert("RGB")))
    assert difference.mean() < 1 if "JPEG" in kind else difference.max() == 0  # decoders of JPEG round differently


CLASSES, IMAGES = ("n01", "n02", "n03"), 12
BAD = {
    "empty.jpeg": b"",
    "drawing.jpg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "half.jpeg": encoded(picture(), "JPEG")[:600],
    "text.jpg": b"<html>404 Not Found</html>",
    "garbage.png": b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
}


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for c, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(IMAGES):
                (tmp_path / split / name / f"{i}.jpeg").write_bytes(encoded(picture(seed=100 * c + i), "JPEG"))
    return tmp_path


def of(root, on_bad_image="error", workers=0, world=None):
    return Folder(str(root), 3, 32, workers, on_bad_image, 4).to(world or World())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_and_nothing_else_is(root, name):
    path = root / "train" / "n02" / name
    path.write_bytes(BAD[name])
    with pytest.raises(UserError, match="cannot be decoded") as told:
        list(of(root).train(37, 0, 0))
    assert str(told.value).startswith(f"{path}: ") and "\n" not in str(told.value)


def ten_classes(root):
    """The words of a run that reads `root`, which gets ten classes."""
    for c in range(4, 11):
        for split in ("train", "val"):
            shutil.copytree(root / split / "n03", root / split / f"n{c:02d}")
    return [*SMALL[1:], "data=imagenette", f"data.root={root}", "data.image_size=32", "data.workers=1",
            "recipe.epochs=1", "recipe.batch_size=60"]  # fmt: skip


def test_a_run_with_data_workers_ends_after_an_error(root, r2):
    """Workers ignore SIGTERM, by which Python would end them, and the error's traceback keeps the data set alive."""
    words = ten_classes(root)
    (root / "val" / "n01" / "5.jpeg").write_bytes(b"")
    done = r2(*words, timeout=200)
    assert done.returncode == 2 and done.stderr.startswith(f"r2: {root}/val/n01/5.jpeg: cannot be decoded")


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_bad_image_that_one_of_two_processes_meets_is_reported_once(root, r2):
    words = ten_classes(root)
    path = root / "val" / "n01" / "1.jpeg"  # the second image: rank 1's
    path.write_bytes(b"")
    done = r2(*words, "devices=2", timeout=500)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(f"r2: {path}: cannot be decoded") == 1 and "Traceback" not in done.stderr, done.stderr


def test_skipped_images_are_counted_and_shift_no_label(root, capsys):
    for name, content in BAD.items():
        (root / "val" / "n02" / name).write_bytes(content)
    (root / "val" / "n01" / "dangling.jpeg").symlink_to("nowhere.jpeg")
    (root / "val" / "n01" / "notes.txt").write_text("no image, and not counted as one")
    expected = torch.tensor([0] * IMAGES + [IGNORED] + [1] * IMAGES + [IGNORED] * 5 + [2] * IMAGES)
    for workers in (0, 2):
        data = of(root, "skip", workers)
        images, labels = (torch.cat(parts) for parts in zip(*data.val(8), strict=True))
        # the names of bad files sort after those of good ones
        assert torch.equal(labels, expected) and data.skipped == 6
        assert sorted(line.split(": ")[1] for line in capsys.readouterr().out.splitlines()) == sorted(
            f"skipped {root}/val/{name}" for name in ["n01/dangling.jpeg", *(f"n02/{bad}" for bad in BAD)]
        )
    for name in BAD:
        (root / "val" / "n02" / name).unlink()
    (root / "val" / "n01" / "dangling.jpeg").unlink()
    good, truth = (torch.cat(parts) for parts in zip(*of(root).val(8), strict=True))
    assert torch.equal(images[labels != IGNORED], good) and torch.equal(labels[labels != IGNORED], truth)
    assert data.count_skipped() == 6 and data.count_skipped() == 0


def test_ranks_skip_what_one_process_skips(root):
    (root / "train" / "n02" / "empty.jpeg").write_bytes(b"")
    whole = torch.cat([y for _, y in of(root, "skip").train(6, 1, 0)]).view(-1, 2, 3)
    for rank in (0, 1):
        part = torch.cat([y for _, y in of(root, "skip", world=World(rank, 2)).train(6, 1, 0)])
        assert torch.equal(part.view(-1, 3), whole[:, rank])


def test_too_many_bad_images_end_the_run(root):
    for i in range(8):  # of 80
        (root / "train" / "n02" / f"bad{i}.jpeg").write_bytes(b"")
    data = of(root, "skip")
    list(data.train(44, 0, 0))
    (root / "val" / "n01" / "0.jpeg").write_bytes(b"")
    with pytest.raises(UserError, match="9 images cannot be decoded, more than 10% of all, at last .*val/n01/0.jpeg"):
        list(data.val(8))


def test_class_folders_that_do_not_match_are_named(root):
    (root / "val" / "n02").rename(root / "val" / "n2")
    with pytest.raises(UserError, match="train and val differ in class folders: n02, n2"):
        of(root)
    shutil.rmtree(root / "val" / "n2")
    with pytest.raises(UserError, match="val has 2 class folders, not 3; train and val differ in class folders: n02"):
        of(root)
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match="there is no folder .*val; set data.root"):
        of(root)


# A data folder that changes


def batches(data, epoch, start=0):
    return list(data.train(6, 3, epoch, start))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_changes_between_epochs(root, workers):
    data, expected = of(root, workers=workers), batches(of(root), 1)
    batches(data, 0)
    (root / "train" / "n01" / "00.jpeg").write_bytes(encoded(picture(seed=7), "JPEG"))
    (root / "train" / "n04").mkdir()
    assert all(torch.equal(x, u) and torch.equal(y, v)
               for (x, y), (u, v) in zip(batches(data, 1), expected, strict=True))  # fmt: skip
    path = root / "train" / "n02" / "5.jpeg"
    content = path.read_bytes()
    path.write_bytes(content[:300])
    with pytest.raises(UserError, match="n02/5.jpeg: cannot be decoded"):
        batches(data, 1)
    path.unlink()
    with pytest.raises(UserError, match="n02/5.jpeg: cannot be decoded .*No such file"):
        batches(data, 1)
    path.write_bytes(content)
    assert len(batches(data, 1)) == 6


def test_python_ends_though_nobody_has_closed_the_data(root):
    """multiprocessing would wait for the workers, which ignore its SIGTERM."""
    code = (
        "from r2.data.folder import Folder; from r2.dist import World; "
        f"data = Folder({str(root)!r}, 3, 32, 1, 'error', 4).to(World()); batches = data.train(6, 3, 0); next(batches)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def trained(data, directory, epochs, said=None):
    """A phase in `directory`, which goes on from the checkpoint there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    run = store.Run(directory, "0", World(), 0, 0.0, lambda row: None)
    run.say = (said if said is not None else []).append
    recipe = Recipe(epochs=epochs, batch_size=6, lr=0.1, weight_decay=0.0)
    train(model, data, recipe, run, "phase", [torch.optim.SGD(model.parameters(), 0.1)])
    return model


def test_a_folder_that_changed_before_a_run_resumes_is_named(root, tmp_path):
    directory = store.make_directory(tmp_path / "run")
    trained(of(root), directory, 1)
    path, other = root / "train" / "n02" / "5.jpeg", root / "train" / "n02" / "55.jpeg"
    path.rename(other)
    with pytest.raises(
        UserError, match=r"phase.ckpt: was made with different data \(36 \+ 36 examples, \w+; now 36 \+ 36"
    ):
        trained(of(root), directory, 2)
    other.unlink()
    with pytest.raises(UserError, match=r"now 35 \+ 36 examples, \w+\); restore that data, or delete the file"):
        trained(of(root), directory, 2)
    path.write_bytes(encoded(picture(), "JPEG"))
    moved = root.parent / f"{root.name}-moved"
    root.rename(moved)  # where the folder lies does not matter
    said = []
    trained(of(moved), moved / "run", 2, said)
    assert "resumed at epoch 2, step 0" in said[0]
    moved.rename(root)


@pytest.mark.slow
def test_a_finished_run_and_pretraining_are_found_again_wherever_the_data_lie(root, capsys):
    """Other data under the same config are named: a stage would train on what the model was to be tested on."""
    words = [*ten_classes(root), "data.workers=0", f"out={root / 'out'}", "stage.bits=4"]
    config = composed(*words, "stage=lsq")
    first = experiment(config, World())
    moved = root / "else where, it's ${x} \udce9"
    for split in ("train", "val"):
        (root / split).rename(store.make_directory(moved) / split)
    words.append(f"data.root={compose._word(str(moved))}")
    assert experiment(composed(*words, "stage=lsq"), World()) == first
    capsys.readouterr()
    other = experiment(composed(*words, "stage=ewgs"), World())
    assert "(finished, not repeated)" in capsys.readouterr().out
    assert other["sha256"]["pretrained"] == first["sha256"]["pretrained"]
    (model,) = (root / "out" / "pretrained").glob("*/model.pt")
    (moved / "val" / "n01" / "1.jpeg").rename(moved / "val" / "n01" / "11.jpeg")
    assert refused(composed(*words, "stage=pact", "stage.bits=5", "stage.from_scratch=false")).startswith(
        f"{model}: was made with different data (120 + 120 examples, "
    )


def test_resuming_with_other_processes_or_another_torch_is_said(root, tmp_path):
    directory = store.make_directory(tmp_path / "run")
    trained(of(root), directory, 1)
    state = store.load(directory / "phase.ckpt")
    state["made_with"] |= {"torch": "1.0", "processes": "8"}
    store.save(directory / "phase.ckpt", state)
    said = []
    trained(of(root), directory, 2, said)
    assert "begun with torch 1.0, resumed with" in said[0] and "begun with processes 8, resumed with 1" in said[1]
    state["model"].pop("0.weight")  # as an older version of the code may have left it
    store.save(directory / "phase.ckpt", state)
    with pytest.raises(UserError, match="phase.ckpt: does not fit this version of r2"):
        trained(of(root), directory, 3)


# Files that are another run's, or altered with valid checksums


def names(*words):
    (cell,) = planned.cells_of([*SMALL, "stage=ewgs", *words])
    return cell.name, cell.pretraining.name


@pytest.mark.parametrize("words, same", [
    (["recipe.batch_size=32"], (False, False)),
    (["model.width_mult=0.5"], (False, False)),
    (["data.train_images=128"], (False, False)),
    (["stage.bits=4"], (False, True)),
    (["devices=2", "threads=1", "out=elsewhere", "checkpoint_seconds=0", "tracker=wandb"], (True, True)),
])  # fmt: skip
def test_what_can_change_a_result_gives_another_folder(words, same):
    assert tuple(a == b for a, b in zip(names(), names(*words), strict=True)) == same


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A folder of two finished runs, and their configs."""
    out = tmp_path_factory.mktemp("two") / "out"
    words = [*SMALL, f"out={out}", "recipe.epochs=1", "data.train_images=64", "data.val_images=20"]
    configs = [composed(*words, f"seed={seed}") for seed in (0, 1)]
    for config in configs:
        experiment(config, World())
    return out, configs


def copy_of(two_runs, tmp_path):
    out = shutil.copytree(two_runs[0], tmp_path / "out")
    configs = [{**config, "out": str(out)} for config in two_runs[1]]
    return [out / planned.cell_of(config).name for config in configs], configs


def refused(config):
    with pytest.raises(UserError) as told:
        experiment(config, World())
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_damaged_file_of_a_finished_run_is_named(two_runs, tmp_path):
    (folder, _), (config, _) = copy_of(two_runs, tmp_path)
    packed = folder / "model.safetensors"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-100])
    told = refused(config)
    assert told.startswith(f"{packed}: is not the file that record.json tells of") and "force=true" in told
    assert experiment({**config, "force": True}, World())["sha256"]["packed"] == store.sha256_of(packed)
    assert packed.read_bytes() == whole


def test_code_that_may_have_changed_is_said_where_something_finished_is_reused(two_runs, tmp_path, capsys, monkeypatch):
    _, (config, _) = copy_of(two_runs, tmp_path)
    for commit, said in (("abc", False), ("abc+", True)):
        monkeypatch.setattr(record, "commit", lambda commit=commit: commit)
        experiment({**config, "force": commit == "abc+"}, World())  # the run, then the pretraining of a repeated one
        told = capsys.readouterr().out
        assert "not repeated" in told and ("uncommitted changes: out=DIR starts anew" in told) == said


def test_a_finished_pretraining_that_is_anothers_or_altered_is_named(two_runs, tmp_path):
    (folder, _), (config, _) = copy_of(two_runs, tmp_path)
    mine, theirs = sorted((tmp_path / "out" / "pretrained").glob("*/model.pt"))
    (folder / "record.json").unlink()
    genuine = mine.read_bytes()
    shutil.copyfile(theirs, mine)
    assert refused(config).startswith(f"{mine}: belongs to another config")
    mine.write_bytes(genuine)
    state = torch.load(mine, weights_only=True)
    state["model"]["classifier.weight"][0, 0] += 1e-6
    torch.save(state, mine)
    assert refused(config).startswith(f"{mine}: altered, its weights do not match its sha256")
    state.pop("info")
    torch.save(state, mine)
    assert refused(config).startswith(f"{mine}: another kind of checkpoint, without 'info'")
    mine.write_bytes(genuine[:-100])
    assert refused(config) == f"{mine}: is damaged; delete it to start again"
    mine.write_bytes(genuine)
    assert experiment(config, World())["sha256"] == read(two_runs[0] / folder.name / "record.json")["sha256"]


def test_a_finished_model_in_place_of_a_half_trained_one_is_named(two_runs, tmp_path):
    _, (config, _) = copy_of(two_runs, tmp_path)
    mine, _ = sorted((tmp_path / "out" / "pretrained").glob("*/model.pt"))
    mine.rename(mine.with_name("pretrain.ckpt"))
    shutil.rmtree(tmp_path / "out" / planned.cell_of(config).name)
    assert "pretrain.ckpt: another kind of checkpoint, without 'position'" in refused(config)


def test_a_record_or_packed_file_that_is_anothers_or_altered_is_named(two_runs, tmp_path):
    (folder, other), (config, _) = copy_of(two_runs, tmp_path)
    path = folder / "record.json"
    genuine = path.read_text()
    path.write_text(genuine.replace('"top1": ', '"top1": 9', 1))
    assert refused(config).startswith(f"{path}: altered after it was written")
    with pytest.raises(UserError, match="altered"):
        planned.cell_of(config).finished(None)
    path.write_text((other / "record.json").read_text())
    assert refused(config) == f"{path}: is the record of {other.name}; move it away to run again"
    path.write_text(genuine)
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match="model.safetensors: is not the file that record.json tells of"):
        export_run(folder, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()

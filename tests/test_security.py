"""What a run reads cannot run code or write elsewhere, and what it writes holds no secret."""

import io
import json
import os
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import SMALL
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from test_shards import SHAPE, folder, official, prepare, shards, tar_of  # noqa: F401

from r2 import compose, pack, store
from r2.config import UserError, build
from r2.data.shards import Shards
from r2.dist import World
from r2.run import experiment

ONE_LINE = re.compile(r"[^\n]+\Z")


def composed(*overrides):
    """The checked config of a command line."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        return compose.composed(overrides)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def bombs(mark):
    """Its file as plain pickle, as torch.save's archive and legacy formats, and inside a checkpoint that fits."""
    for content in (Bomb(mark), {"format": "r2", "key": "0", "model": Bomb(mark)}):
        yield pickle.dumps(content)
        for zipped in (True, False):
            out = io.BytesIO()
            torch.save(content, out, _use_new_zipfile_serialization=zipped)
            yield out.getvalue()


def refuse(mark, read):
    with pytest.raises(UserError, match=ONE_LINE) as refused:
        read()
    assert "\n" not in str(refused.value) and not mark.exists()
    return str(refused.value)


def test_bombs_go_off(tmp_path):
    """Otherwise the tests below would prove nothing."""
    for i, content in enumerate(bombs(tmp_path / "mark")):
        if i in (0, 3):
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        (tmp_path / "mark").rmdir()


def test_a_bomb_in_place_of_a_checkpoint_is_refused(tmp_path):
    mark, said = tmp_path / "mark", []
    run = store.Run(tmp_path, "0", World(), 0, 0.0, lambda row: None)
    run.say = said.append
    for content in bombs(mark):
        for name in ("pretrain.ckpt", "pretrain.previous", "model.pt"):
            (tmp_path / name).write_bytes(content)
        assert "model.pt" in refuse(mark, lambda: store.load(tmp_path / "model.pt"))
        assert "pretrain.ckpt" in refuse(mark, lambda: run.resume("pretrain"))
        (tmp_path / "pretrain.ckpt").unlink()
        assert "pretrain.previous" in refuse(mark, lambda: run.resume("pretrain"))


def test_a_bomb_in_place_of_what_a_run_wrote_is_refused(tmp_path):
    mark = tmp_path / "mark"
    config = composed(*SMALL, f"out={tmp_path}", "reg=l2", "stage=fp32")
    experiment(config, World())
    (pretrained,) = tmp_path.glob("pretrained/*/model.pt")
    (record,) = tmp_path.glob("*/record.json")
    record.unlink()
    for content in bombs(mark):
        pretrained.write_bytes(content)
        assert str(pretrained) in refuse(mark, lambda: experiment(config, World()))
        packed = record.with_name("model.safetensors")
        packed.write_bytes(content)
        assert str(packed) in refuse(mark, lambda packed=packed: pack.load(packed))


def test_a_bomb_in_place_of_an_index_is_refused(shards, tmp_path):  # noqa: F811
    out, mark = shutil.copytree(shards, tmp_path / "out"), tmp_path / "mark"
    index = out / "train-00000.npz"
    with np.load(index) as arrays:
        arrays = dict(arrays)
    content = io.BytesIO()
    np.savez(content, **{**arrays, "labels": np.array([Bomb(mark)], dtype=object)})
    for bomb in (content.getvalue(), *bombs(mark)):
        index.write_bytes(bomb)
        assert str(index) in refuse(mark, lambda: Shards(str(out), 3, 56, 64, 0, "error", 4))


@pytest.mark.parametrize(
    "override",
    [
        "++model._target_=os.mkdir",
        "++data._target_=r2.compose.os.mkdir",
        "++model._target_=builtins.eval",
        "++model._target_=null",
        "+model._args_=[/tmp/x]",
        "++recipe.finetune._target_=os.mkdir",
        "++recipe.finetune.epochs={_target_: os.mkdir, path: /tmp/x}",
        "++stage.layer_bits={a: [{_target_: os.mkdir}]}",
    ],
)
def test_a_target_outside_r2_is_refused(override):
    with pytest.raises(UserError, match=ONE_LINE):
        composed("stage=ewgs", override)


def test_a_target_outside_r2_in_a_record_is_refused(tmp_path):
    """r2.export builds the data set that a record names."""
    mark = str(tmp_path / "mark")
    nested = {"_target_": "os.mkdir", "path": mark}
    for node in (
        nested,
        {"_target_": "r2.compose.os.mkdir", "path": mark},
        {"_target_": "r2.data.memory.fake", "train_images": nested},
        {"_target_": "r2.data.memory.fake", "_args_": [nested]},
    ):
        with pytest.raises(UserError, match=ONE_LINE):
            build(node)
    assert not os.path.exists(mark)


def test_archives_write_nowhere_else(folder, tmp_path, monkeypatch):  # noqa: F811
    """Names with .. or from the root, links and devices inside the official files reach no path."""
    source, out = tmp_path / "deep" / "source", tmp_path / "deep" / "out"
    source.mkdir(parents=True)
    official(folder, source)
    picture = next((folder / "train" / "n01").iterdir()).read_bytes()
    path = source / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as tar:
        inner = [(member.name, tar.extractfile(member).read()) for member in tar]
    evil = tar_of([("../../../escaped.JPEG", picture), (f"{tmp_path}/rooted.JPEG", picture)])
    links = io.BytesIO(evil)
    with tarfile.open(fileobj=links, mode="a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo("link.JPEG")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    path.write_bytes(tar_of([(name, links.getvalue() if name == "n02.tar" else old) for name, old in inner]))
    before = {p for p in tmp_path.rglob("*")}
    assert prepare(monkeypatch, "--source", source, "--out", out, *SHAPE) == 0
    new = {p for p in tmp_path.rglob("*")} - before
    assert new and all(p == out or p.parent == out for p in new)
    assert Shards(str(out), 3, 56, 64, 0, "error", 4).train_images == 12 + 2 + 12  # links are no images

    manifest = json.loads((out / "manifest.json").read_text())
    manifest["train"][0]["file"] = f"../{source.name}/{path.name}"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=re.escape(str(out / path.stem))):  # looked for beside the manifest
        Shards(str(out), 3, 56, 64, 0, "error", 4)


def test_no_secret_is_written(r2):
    """Keys in the environment stay there, with wandb writing offline."""
    secrets = {"WANDB_API_KEY": "5ec2e7" * 6 + "abcd", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-a-cloud"}
    done = r2(*SMALL, "reg=l2", "stage=fp32", "tracker=wandb", env={**secrets, "WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    files = [path for path in r2.out.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files) and any(path.name == "record.json" for path in files)
    for secret in map(str.encode, secrets.values()):
        assert secret not in (done.stdout + done.stderr).encode()
        assert not [path for path in files if secret in path.read_bytes()]


def test_a_value_may_contain_the_name_of_a_target(tmp_path):
    assert composed("data=imagenet", f"data.root={tmp_path}/cars_target_set")["data"]["root"].endswith(
        "cars_target_set"
    )

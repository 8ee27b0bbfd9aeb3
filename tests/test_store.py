import os
import resource

import pytest
import torch

from r2 import store
from r2.config import UserError


def checkpoint(tmp_path, value):
    path = tmp_path / "a.ckpt"
    store.save(path, {"format": "r2", "key": "k", "x": torch.full((1000,), value)})
    return path


def test_save_keeps_the_one_before(tmp_path):
    checkpoint(tmp_path, 1.0)
    path = checkpoint(tmp_path, 2.0)
    assert store.load(path)["x"][0] == 2 and store.load(path.with_suffix(".previous"))["x"][0] == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, damage):
    checkpoint(tmp_path, 1.0)
    path = checkpoint(tmp_path, 2.0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    else:
        path.write_bytes({"flip": content, "truncate": content[:500], "empty": b""}[damage])
    with pytest.raises(UserError, match="a.ckpt"):
        store.load(path)
    said = []
    assert store.load_latest(path, said.append)["x"][0] == 1
    assert "a.ckpt" in said[0]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bombed",)


def test_a_pickle_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "r2", "x": Bomb()}, "b.ckpt")
    with pytest.raises(UserError, match="b.ckpt"):
        store.load(tmp_path / "b.ckpt")
    assert not (tmp_path / "bombed").exists()


def test_disk_full_leaves_the_old_file(tmp_path):
    """A file-size limit stands for the full disk: the write fails half-way."""
    path = tmp_path / "c"
    store.write(path, b"old")
    pid = os.fork()
    if pid == 0:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            store.write(path, b"x" * 5000)
        except UserError as error:
            os._exit(0 if "what was saved before is intact" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["c"]

import os
import resource
import signal
import socket
import subprocess

import pytest
import torch

from r2 import record, store
from r2.config import UserError
from r2.dist import World


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
    assert said[0].startswith(f"{path}: ") and said[0].endswith("; resuming from a.previous")
    assert "delete" not in said[0] and (damage in ("foreign", "empty") or "is damaged" in said[0])
    path.with_suffix(".previous").write_bytes(b"PK")
    with pytest.raises(UserError, match="a.ckpt: .*a.previous: is damaged; delete both to start again"):
        store.load_latest(path, said.append)
    assert len(said) == 1


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
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            store.write(path, b"x" * 5000)
        except UserError as error:
            os._exit(0 if "what was saved before is intact" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["c"]


def in_a_fork(function, *args):
    """The exit status of a call in a forked process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*args)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_kill_at_every_step_of_a_save_leaves_a_checkpoint(tmp_path, monkeypatch):
    """SIGKILL after 0, 1, 2... of what a save does to the disk, with the file half written once."""
    steps = 0

    def killed_at(last):
        left = [last]

        def step(function):
            def call(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*args, **kwargs)

            return call

        for name in ("link", "fsync", "replace", "unlink"):
            monkeypatch.setattr(store.os, name, step(getattr(os, name)))
        opened = open

        def halves(path, mode):
            file = opened(path, mode, buffering=0)
            write = file.write
            half = type("Half", (), {"__enter__": lambda _: half, "__exit__": lambda *_: file.close()})()
            half.write = lambda data: (step(write)(data[: len(data) // 2]), step(write)(data[len(data) // 2 :]))
            half.flush, half.fileno = file.flush, file.fileno
            return half

        monkeypatch.setattr(store, "open", halves, raising=False)
        checkpoint(tmp_path, 3.0)

    checkpoint(tmp_path, 1.0)
    path = checkpoint(tmp_path, 2.0)
    while (status := in_a_fork(killed_at, steps)) != 0:
        assert status == -signal.SIGKILL
        found = store.load_latest(path, pytest.fail)  # whole at first sight
        assert found["x"][0] in (2, 3) and path.exists()
        checkpoint(tmp_path, 2.0)
        steps += 1
    assert steps >= 6 and store.load(path)["x"][0] == 3


def test_a_refused_run_leaves_no_folder(tmp_path):
    refused, begun = tmp_path / "refused", tmp_path / "begun"
    for directory in (refused, begun):
        directory.mkdir()
        with pytest.raises(UserError), store.lock(directory, World(), print):
            if directory == begun:
                (directory / "curve.csv").write_text("epoch")
            raise UserError("no")
    assert not refused.exists()
    assert (begun / "curve.csv").exists()


def test_a_lock_is_waited_for_and_free_once_its_holder_is_killed(tmp_path):
    def hold():
        with store.lock(tmp_path, World(), print):
            (tmp_path / ".model.pt.1.part").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGSTOP)

    pid = os.fork()
    if pid == 0:
        hold()
    os.waitpid(pid, os.WUNTRACED)
    holder = f"process {pid} on {socket.gethostname()}"
    assert store.holder(tmp_path) == holder
    said = []

    def say(text):
        said.append(text)
        os.kill(pid, signal.SIGKILL)

    with store.lock(tmp_path, World(), say):
        assert said == [f"waiting for {holder}, which is working on {tmp_path}"]
        assert store._owner(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
        assert not list(tmp_path.glob("*.part"))
    os.waitpid(pid, 0)
    assert store.holder(tmp_path) is None and not (tmp_path / ".owner").exists()


def test_the_commit_is_that_of_r2s_own_checkout(tmp_path, monkeypatch):
    """Installed inside somebody's own project, r2 has none."""
    installed = tmp_path / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "theirs"], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "REPOSITORY", installed)
    assert record.commit.__wrapped__() is None
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    assert len(record.commit.__wrapped__().rstrip("+")) == 40

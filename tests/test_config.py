"""A new method in a file of its own: its keys are read from the source, its bases' included, without importing it."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

import r2
from r2.config import CountOrZero, UserError, build, signature

QAT = signature("r2.stages.qat.EWGS")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into r2 for the test; returns its full name."""
    monkeypatch.setattr(r2, "__path__", [*r2.__path__, str(tmp_path)])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return f"r2.{name}"

    return write


def test_a_stage_in_another_file_inherits_its_keys(module):
    mine = module("mine_stage", """
from dataclasses import dataclass, field
from typing import ClassVar
from r2.config import CountOrZero as Whole
from r2.stages.qat import EWGS
from r2.stages import qat

@dataclass(frozen=True)
class Mine(EWGS):
    rounds: Whole = 3
    hidden: int = field(default=0, init=False)
    shared: ClassVar[int] = 1

class Same(qat.EWGS):
    pass
""")  # fmt: skip
    assert signature(f"{mine}.Mine") == {**QAT, "rounds": CountOrZero}
    assert signature(f"{mine}.Same") == QAT and {"epochs", "bits", "delta"} <= QAT.keys()
    assert signature(f"{mine}.EWGS") == QAT  # imported there


def test_a_regularizer_in_another_file_may_have_no_init_or_pass_keys_on(module):
    mine = module("mine_reg", """
from .regularizers import Margin

class Plain(Margin):
    def forward(self): ...

class More(Margin):
    def __init__(self, *args, power: float = 2.0, **kwargs): ...

class Other(Margin):
    def __init__(self, model, power: "int" = 2): ...
""")  # fmt: skip
    margin = signature("r2.regularizers.Margin")
    assert signature(f"{mine}.Plain") == margin and {"weight", "dim", "lr_mult"} <= margin.keys()
    assert signature(f"{mine}.More") == {**margin, "power": float}
    assert signature(f"{mine}.Other") == {"model": Any, "power": int}


def test_an_annotation_that_only_an_import_explains_is_anything(module):
    mine = module("mine_types", """
import torch
from pathlib import Path
from typing import Literal
Shape = tuple[int, int]

def made(a: Path, b: torch.dtype | None, c: Shape, d: "World", e: Literal["x"] | None = None, f=1): return a, e
""")  # fmt: skip
    assert signature(f"{mine}.made") == {**dict.fromkeys("abcdf", Any), "e": Literal["x"] | None}
    assert build({"_target_": f"{mine}.made", "a": 3, "e": "x"}, b=0, c=0, d=0) == (3, "x")
    with pytest.raises(UserError, match="e='y': Input should be 'x'"):
        build({"_target_": f"{mine}.made", "e": "y"})


@pytest.mark.parametrize("target", ["r2.config.Nothing", "r2.nothing.Name", "r2.compose.os.mkdir", "r2.recipe.torch"])
def test_what_is_not_there_is_named(target):
    with pytest.raises(UserError, match=r"\A(r2\.\S+: r2\.\S+ defines no such name|there is no module r2\.\S+)\Z"):
        signature(target)


def test_no_schema_needs_torch():
    text = (
        "import sys; from r2.config import signature\n"
        "for name in ('stages.qat.EWGS', 'stages.ptq.DFQ', 'regularizers.Margin', 'data.folder.imagenet'):\n"
        "    assert signature('r2.' + name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", text], check=True, cwd=Path(__file__).parents[1])

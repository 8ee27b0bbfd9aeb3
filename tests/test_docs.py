"""What the pages under docs/ print works."""

import ast
import contextlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV
from hydra.errors import HydraException

from r2 import compose, reproduce
from r2.config import UserError

ROOT = Path(__file__).parents[1]
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=[section.partition("\n")[0] for section in SECTIONS])
def test_every_file_of_the_page_on_extending_runs(section, tmp_path):
    """In a copy of the package, as a reader adds them; the packed file is read back too."""
    for folder in ("r2", "configs", "results/paper"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^    (python .*)$", section, flags=re.MULTILINE)
    assert files
    for name, content in files:
        (tmp_path / name).write_text(content)
    program = [sys.executable, *shlex.split(command)[1:], "model.width_mult=0.25", "threads=1"]
    environment = {**ENV, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (packed,) = tmp_path.glob("outputs/*/model.safetensors")
    read = [sys.executable, "-c", f"from r2 import pack; pack.load({str(packed)!r})"]
    done = subprocess.run(read, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_page_on_configuration_is_not_stale():
    """python scripts/configuration.py"""
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "scripts" / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page()
    assert {path.name for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name != "hydra"} < set(
        module.GROUPS
    )


def anchors_of(page):
    """Of a page's headings, as GitHub and MkDocs name them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    found = [(page, target) for page in pages for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert sum("#" in target for _, target in found) >= 3
    for page, target in found:
        if "://" not in target:
            path, _, anchor = target.partition("#")
            to = page.parent / path if path else page
            assert to.exists() and (not anchor or anchor in anchors_of(to)), (page.name, target)


def commands():
    """Every command of r2.run and r2.reproduce that a page prints, in one line, but extending.md's, which run."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages if page.name != "extending.md").replace("\\\n", " ")
    found = re.findall(r"^    python -m (r2\.(?:run|reproduce) .*?)(?: #.*)?$", text, flags=re.MULTILINE)
    return sorted({" ".join(line.split()) for line in found})


# What needs a cluster or the hub, and keys of another commit, which the page names.
ELSEWHERE = (
    "hydra/launcher=",
    "model.weights=timm",
    "stage=lsq threads=1 model=mbv1 reg=margin seed=100,101",
    "stage.step_limit=1.0",
)


@pytest.mark.parametrize("line", [line for line in commands() if not any(word in line for word in ELSEWHERE)])
def test_every_command_that_a_page_prints_is_taken(line, tmp_path):
    """Of r2.run the whole config is composed and checked, of r2.reproduce the words are read."""
    (tmp_path / "FILE").write_bytes(b"a checkpoint")
    (tmp_path / "DIR").mkdir()
    (tmp_path / "DIR" / "model.safetensors").write_bytes(b"a checkpoint")
    program, *words = [re.sub(r"=(FILE|DIR)$", rf"={tmp_path}/\1", word) for word in shlex.split(line)]
    if program == "r2.reproduce":
        assert reproduce.read(words).experiments
    else:
        assert compose.check_sweep([word for word in words if word != "-m"])


def test_every_script_and_file_that_the_pages_name_is_there():
    names = re.compile(r"(?<![\w/])(?:scripts|configs|results|tests|docs)/[\w/.-]+\.(?:sh|py|yaml|md|html|csv)")
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        here = set(re.findall(r"^`(\S+)`$", text, flags=re.MULTILINE))  # files that the page itself shows
        if page.name != "configuration.md":  # its comments cite files of other projects
            assert [name for name in set(names.findall(text)) - here if not (ROOT / name).exists()] == [], page.name


def rows_of_the_file_map():
    """Each file or folder of r2 that the README's map names, and its row."""
    found, folder = {}, ""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `r2/")]
    for number, line in enumerate(lines):
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", line.split("|")[1]):
            folder = name.rpartition("/")[0] if name.startswith("r2/") else folder
            found[name if name.startswith("r2/") else f"{folder}/{name}"] = number
    return found


def test_a_file_imports_only_from_its_row_of_the_file_map_and_from_rows_below():
    rows = rows_of_the_file_map()

    def row(path):
        name = path.relative_to(ROOT).as_posix()
        return rows.get(name, rows.get(name.rpartition("/")[0] + "/"))

    def file(name):
        while not (path := ROOT.joinpath(*name.split("."))).with_suffix(".py").exists():
            if path.is_dir():
                return path / "__init__.py"
            name = name.rpartition(".")[0]
        return path.with_suffix(".py")

    package = ROOT / "r2" / "__init__.py"
    files = [path for path in sorted((ROOT / "r2").rglob("*.py")) if path.stat().st_size and path != package]
    assert len(files) > 80 and not [path for path in files if row(path) is None]
    upwards = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "r2":
                used = [file(f"{node.module}.{one.name}") for one in node.names]
                upwards += [(path, other) for other in used if other.parent != path.parent or path.parent.name == "r2"
                            if other != package and row(other) < row(path)]  # fmt: skip
    assert not upwards


def test_a_wheel_carries_what_an_installed_r2_reads_and_names():
    section = (ROOT / "pyproject.toml").read_text().split("force-include]")[1].split("\n[")[0]
    carried = dict(re.findall(r'^"(.+)" = "(.+)"$', section, flags=re.MULTILINE))
    assert all((ROOT / here).exists() for here in carried)
    assert {"r2/configs", "r2/paper"} < set(carried.values())
    named = {
        name for path in (ROOT / "r2").rglob("*.py") for name in re.findall(r"\{script\('(\w+)'\)", path.read_text())
    }
    assert named and {f"r2/scripts/{name}.py" for name in named} <= set(carried.values())


def test_the_readme_s_claims_about_the_first_command_are_those_of_its_table():
    table = (ROOT / "docs" / "results.md").read_text().split("## The first command")[1].split("## ")[0]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for row in ("full precision", "2 bits"):
        (line,) = re.findall(rf"^\| {row}, % \|(.*)\|$", table, flags=re.MULTILINE)
        found = [float(cell) for cell in line.split("|")]
        assert len(found) == 10
        at = {"full precision": "in full precision", "2 bits": "at 2 bits"}[row]
        assert f"{min(found)} to {max(found)} % {at}" in readme


def test_the_page_on_the_paper_gives_the_key_of_every_default_and_a_value_that_is_accepted():
    text = (ROOT / "docs" / "paper.md").read_text().split("## Defaults that differ")[1].split("\n\n")[1]
    keys = [key for line in text.splitlines()[2:] for key in re.findall(r"`(.+?)`", line.split("|")[-2])]
    assert len(keys) > 10
    for key in keys:
        stages = ["none", "ewgs", "lsq", "pact", "dkm"] if key.startswith("stage.") else ["ewgs"]
        accepted = []
        for stage in stages:
            words = ["data=fashion_mnist", "model=mbv2", f"stage={stage}"]
            with contextlib.suppress(UserError, HydraException):
                accepted += [compose.check_sweep([*words, key]) != compose.check_sweep(words)]
        assert any(accepted), key

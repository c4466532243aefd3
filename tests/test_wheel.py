"""The wheel: all that the packages hold and nothing else; installed elsewhere, it brings the command, recipes and pages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import recsys
from features.synthetic import SyntheticSettings, write

ROOT = Path(__file__).parents[1]
PACKAGES = ("recsys", "features", "training", "serving")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as an image builds it, without the network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", source / "dist", source]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
    (found,) = (source / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel, which takes everything else from this one, but not this checkout."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    words = ["--python", python, "install", "-q", "--no-deps", "--no-index", "--no-compile", wheel]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
    # a line of a .pth file is a folder whose own .pth files, such as that of the checkout, are not read
    (library,) = place.glob("lib/python*/site-packages")
    (library / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def run(program: Path, *words: object, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    done = subprocess.run([program, *map(str, words)], cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == wanted
    assert {"training/recipes/tiny.toml", "serving/page/index.html", "serving/evaluation/report.html"} <= names
    assert {f"{name}/py.typed" for name in PACKAGES} <= names


def test_a_wheel_says_what_it_needs_and_brings_the_command(wheel):
    with zipfile.ZipFile(wheel) as files:
        (about,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        text = files.read(about).decode()
        entry = files.read(about.replace("METADATA", "entry_points.txt")).decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)
    assert {str(Requirement(line)) for line in lines if "extra ==" not in line} == {
        str(Requirement(line)) for line in project["dependencies"]
    }
    assert f"Version: {recsys.__version__}\n" in text
    assert "recsys = recsys.__main__:main" in entry


def test_the_installed_command_works_outside_the_checkout(installed, tmp_path):
    command, python = installed / "recsys", installed / "python"
    assert run(command, "--version", cwd=tmp_path).strip() == recsys.__version__
    write(SyntheticSettings(users=53, items=47, events_per_user=11), tmp_path / "raw")
    words = ["tiny", "--data", "raw", "--out", "dataset", "--set", "data.now=1800000000"]  # a recipe by its name
    assert "53 users" in run(command, "features", *words, cwd=tmp_path)
    code = """
from pathlib import Path
import recsys, features, training, serving.app, serving.evaluation.page as pages
print(*(module.__file__ for module in (recsys, features, training)))
print(Path(pages.__file__).parent / "report.html", serving.app.PAGE / "index.html")
"""
    for path in run(python, "-c", code, cwd=tmp_path).split():
        assert Path(path).is_file() and Path(path).is_relative_to(installed.parent)


def test_an_installed_doctor_knows_the_needs_of_the_wheel_and_names_no_make(installed, tmp_path):
    code = "from recsys import doctor; print(doctor.CHECKOUT, len(doctor.needs()), doctor.check_torch({'torch': ''}, {}).fix)"
    checkout, needs, fix = run(installed / "python", "-c", code, cwd=tmp_path).split(maxsplit=2)
    assert checkout == "False"
    assert int(needs) > 20
    assert "pip install" in fix and "make" not in fix


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("recsys ex", ["export", "explain"]),
        ("recsys bundles ro", ["rollback"]),
        ("recsys train tiny --proc", ["--processes"]),
        ("recsys train tin", ["tiny"]),
        ("recsys nightly bundles/shop --out lists --f", ["--full", "--force"]),
    ],
)
def test_bash_completes_verbs_and_options(installed, tmp_path, line, completed):
    """The very script that --install-completion leaves, with the words as bash gives them."""
    path = f"{installed}:{os.environ['PATH']}"
    run(installed / "recsys", "--install-completion", "bash", cwd=tmp_path, HOME=str(tmp_path), PATH=path)
    ask = f"""
shopt -s expand_aliases; source ~/.bashrc
COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_recsys_completion recsys
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    said = run(Path(shutil.which("bash") or "bash"), "-c", ask, cwd=tmp_path, HOME=str(tmp_path), PATH=path)
    assert sorted(said.split()) == sorted(completed)


def test_the_shells_that_are_not_here_are_told_what_to_complete(installed, tmp_path):
    asked = {
        "zsh": {"_RECSYS_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "recsys exp"},
        "fish": {
            "_RECSYS_COMPLETE": "complete_fish",
            "_TYPER_COMPLETE_ARGS": "recsys exp",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
    }
    for shell, environment in asked.items():
        said = run(installed / "recsys", cwd=tmp_path, **environment)
        assert "export" in said and "explain" in said and "train" not in said, shell

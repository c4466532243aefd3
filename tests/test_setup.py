"""What `make setup` installs is stated once or held equal, and what it cannot do it says in one line."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from recsys.doctor import FITS, MODULES, OLDEST_PYTHON, PROGRAMS, PROJECT, SHIM, TORCH_CPU_INDEX, UNINSTALLABLE

ROOT = Path(__file__).parents[1]
PROJECT_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_pins(name: str) -> dict[str, str]:
    """Distribution → version, of the exact lines of a requirements file."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return {match[1]: match[2] for line in lines if (match := re.match(r"([\w.-]+)={2,3}([\w.+]+)$", line))}


def make(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """make in the project's folder, heedless of the make that may run these tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "FLAVOUR", "PYTHON")
    }
    return subprocess.run(["make", *words], cwd=ROOT, env=kept, capture_output=True, text=True)


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_every_dependency_is_pinned_within_its_bounds(flavour):
    extras = PROJECT_FILE["optional-dependencies"]
    lines = [
        *PROJECT_FILE["dependencies"],
        *(line for name in (flavour, "torchrec", "excel", "notebooks", "dev") for line in extras[name]),
    ]
    pins = read_pins("pins.txt") | read_pins(f"{flavour}.txt")
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT or any(part.operator == "==" for part in requirement.specifier):
            continue
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name]), (
            f"{requirement} excludes its pin {pins[requirement.name]}"
        )


def test_torch_fbgemm_and_torchrec_are_the_same_wherever_they_are_named():
    cpu, gpu, pins = read_pins("cpu.txt"), read_pins("gpu.txt"), read_pins("pins.txt")
    assert cpu["torch"] == gpu["torch"]
    wanted = FITS[".".join(cpu["torch"].split(".")[:2])]
    (torchrec,) = map(Requirement, PROJECT_FILE["optional-dependencies"]["torchrec"])
    shim = tomllib.loads((ROOT / "packaging" / "fbgemm-gpu" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert gpu["fbgemm-gpu"] == pins["fbgemm-gpu-cpu"] == wanted
    assert (shim["version"], shim["dependencies"]) == (f"{wanted}{SHIM}", [f"fbgemm-gpu-cpu=={wanted}"])
    assert str(torchrec.specifier) == f"=={wanted}"


def test_doctor_and_project_ask_for_the_same_python_and_know_the_same_names():
    oldest = ".".join(map(str, OLDEST_PYTHON))
    assert PROJECT_FILE["requires-python"] == f">={oldest}"
    assert f"sys.version_info < {OLDEST_PYTHON}" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert PROJECT_FILE["name"] == PROJECT
    assert set(MODULES) <= {Requirement(line).name for line in PROJECT_FILE["dependencies"]}


def test_the_cpu_build_comes_from_one_index_wherever_it_is_named():
    for name in ("Makefile", "Dockerfile"):
        found = re.findall(r"TORCH_CPU_INDEX *\??= *(https\S+)", (ROOT / name).read_text(encoding="utf-8"))
        assert found == [TORCH_CPU_INDEX], name


def test_the_programs_that_doctor_looks_for_are_those_that_the_full_check_installs():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(re.findall(r"missing\+=\(([\w-]+)\)", text)) == set(PROGRAMS)


def test_no_dependency_of_mlflow_can_be_the_release_that_does_not_install():
    lines = [*PROJECT_FILE["dependencies"], *PROJECT_FILE["optional-dependencies"]["ui"]]
    mlflow = [requirement for requirement in map(Requirement, lines) if requirement.name.startswith("mlflow")]
    assert len(mlflow) == 2
    assert [str(each) for each in mlflow for broken in UNINSTALLABLE if each.specifier.contains(Version(broken))] == []
    assert set(UNINSTALLABLE.values()) == {read_pins("pins.txt")["mlflow-skinny"]}


def test_a_python_that_is_too_old_gets_one_line_and_nothing_is_made(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\n[ \"$1\" = --version ] && printf 'Python 3.9.2\\nmore\\n' && exit\nexit 1\n")
    python.chmod(0o755)
    done = make("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    assert done.returncode == 2
    assert said == [
        "Python 3.11 or newer with venv is needed, found: Python 3.9.2; install it and name it: make setup PYTHON=python3.11"
    ]
    assert not (tmp_path / "venv").exists()


def test_an_unknown_flavour_is_refused_with_those_that_are_known():
    done = make("setup", "FLAVOUR=tpu")
    assert done.returncode == 2
    assert "FLAVOUR is cpu or gpu, found 'tpu'" in done.stderr


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_an_environment_that_is_ready_is_reused_and_keeps_its_flavour(tmp_path, flavour):
    (tmp_path / f".{flavour}").touch()
    assert "pip" not in make("--dry-run", "setup", f"VENV={tmp_path}").stdout


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_changed_requirements_are_brought_up_to_date_in_the_same_flavour(tmp_path, flavour):
    os.utime(tmp_path, (0, 0))
    (tmp_path / f".{flavour}").touch()
    os.utime(tmp_path / f".{flavour}", (0, 0))
    assert f"--requirement requirements/{flavour}.txt" in make("--dry-run", "setup", f"VENV={tmp_path}").stdout

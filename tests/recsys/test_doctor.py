"""What the doctor finds, from facts that are given and in this environment."""

from __future__ import annotations

import shlex
import sys

import pytest

from recsys import doctor
from recsys.doctor import Finding, exit_code, probe, render

CPU = {"cuda": None, "threads": 7, "gpus": []}
CUDA = {"cuda": "13.0", "threads": 7, "gpus": ["H200 139 GiB"]}
CPU_STACK = dict.fromkeys(doctor.STACK, "") | {
    "torch": "2.13.0+cpu",
    "fbgemm-gpu": "1.8.0+cpu.shim",
    "fbgemm-gpu-cpu": "1.8.0",
    "torchrec": "1.8.0",
    "faiss-cpu": "1.15.1",
}
CUDA_STACK = dict.fromkeys(doctor.STACK, "") | {
    "torch": "2.13.0",
    "fbgemm-gpu": "1.8.0",
    "torchrec": "1.8.0",
    "faiss-gpu": "1.15.1",
}
BROKEN = {"error": "OSError: undefined symbol"}


def test_all_that_the_project_needs_is_well_here():
    findings = doctor.diagnose()
    names = [finding.name for finding in findings]
    assert {"python", "torch", "gpu", "fbgemm", "torchrec", "faiss", "polars", "mlflow-skinny", "pydantic"} <= set(names)
    assert len(names) == len(set(names))
    assert [finding for finding in findings if finding.required and not finding.ok] == []
    assert [finding for finding in findings if finding.ok == bool(finding.fix)] == []
    assert exit_code(findings) == 0


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os; os.abort()", "crashes Python when it is loaded (signal 6)"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise OSError('first line\\nlast line')", "last line"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_an_import_that_fails_or_crashes_is_a_finding_in_one_line(code, error):
    assert probe(code) == {"error": error}


def test_an_import_that_hangs_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    assert probe("import time; time.sleep(60)") == {"error": "does not load within 0.5 s"}


def test_what_a_library_prints_while_it_loads_is_not_taken_for_its_facts():
    assert probe("print('hello'); print(json.dumps({'gpus': 3}))") == {"gpus": 3}


@pytest.mark.parametrize(("found", "ok"), [((3, 10), False), ((3, 11), True), ((4, 0), True)])
def test_python_is_well_from_3_11_on(found, ok):
    assert doctor.check_python(found).ok == ok


@pytest.mark.parametrize(("stack", "torch"), [(CPU_STACK, CPU), (CUDA_STACK, CUDA)])
def test_the_known_stacks_are_well(stack, torch):
    findings = [
        doctor.check_torch(stack, torch),
        doctor.check_gpu(torch, driver=bool(torch["gpus"])),
        doctor.check_fbgemm(stack, torch, {}, wheels=True),
        doctor.check_torchrec(stack, {}, wheels=True),
        doctor.check_faiss(stack, torch, {"gpus": 1 if torch["gpus"] else None}),
    ]
    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize(
    ("change", "torch", "fbgemm", "found", "fix"),
    [
        ({"fbgemm-gpu": "1.8.0"}, CPU, {}, "1.8.0 is the CUDA build, beside a CPU build of torch", "fbgemm-gpu-cpu==1.8.0"),
        ({}, CUDA, {}, "1.8.0 is the CPU build, beside a CUDA build of torch", "fbgemm-gpu==1.8.0"),
        ({"fbgemm-gpu-cpu": "1.9.0"}, CPU, {}, "1.9.0; torch 2.13.0+cpu needs 1.8.0", "fbgemm-gpu-cpu==1.8.0"),
        ({"fbgemm-gpu": "", "fbgemm-gpu-cpu": ""}, CPU, {}, "not installed", "fbgemm-gpu-cpu==1.8.0"),
        ({}, CPU, BROKEN, "1.8.0: OSError: undefined symbol", "fbgemm-gpu-cpu==1.8.0"),
        ({"torch": "2.14.1"}, CPU, {}, "known: torch 2.13 with 1.8.0", "make clean setup"),
        ({"torch": ""}, BROKEN, BROKEN, "known: torch 2.13 with 1.8.0", "make clean setup"),
    ],
)
def test_an_fbgemm_that_does_not_fit_torch_warns_with_the_command_that_mends_it(change, torch, fbgemm, found, fix):
    finding = doctor.check_fbgemm(CPU_STACK | change, torch, fbgemm, wheels=True)
    assert not finding.ok and not finding.required
    assert found in finding.found
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("found", "facts", "problem"),
    [("1.7.0", {}, "1.7.0; torch 2.13.0+cpu needs 1.8.0"), ("", {}, "not installed"), ("1.8.0", BROKEN, "undefined symbol")],
)
def test_a_torchrec_that_does_not_fit_or_work_warns_with_the_command_that_mends_it(found, facts, problem):
    finding = doctor.check_torchrec(CPU_STACK | {"torchrec": found}, facts, wheels=True)
    assert not finding.ok and not finding.required
    assert problem in finding.found
    assert finding.fix.endswith("-m pip install torchrec==1.8.0")


def test_a_platform_without_builds_of_torchrec_is_well():
    stack = dict.fromkeys(doctor.STACK, "") | {"torch": "2.13.0"}
    assert doctor.check_fbgemm(stack, CPU, BROKEN, wheels=False).ok
    assert doctor.check_torchrec(stack, BROKEN, wheels=False).ok


@pytest.mark.parametrize(
    ("torch", "driver", "ok"), [(CPU, False, True), (CPU, True, False), (CUDA, True, True), (CUDA | {"gpus": []}, True, False)]
)
def test_a_gpu_that_torch_does_not_see_warns(torch, driver, ok):
    finding = doctor.check_gpu(torch, driver)
    assert (finding.ok, finding.required) == (ok, False)


@pytest.mark.parametrize(
    ("installed", "faiss", "found", "fix"),
    [
        ({"faiss-cpu": ""}, BROKEN, "not installed", "install faiss-cpu"),
        ({"faiss-gpu": "1.15.1"}, {"gpus": None}, "both installed", "uninstall -y faiss-cpu faiss-gpu"),
        ({}, BROKEN, "1.15.1: OSError: undefined symbol", "--no-deps faiss-cpu==1.15.1"),
    ],
)
def test_faiss_is_one_build_that_loads(installed, faiss, found, fix):
    finding = doctor.check_faiss(CPU_STACK | installed, CPU, faiss)
    assert not finding.ok and finding.required
    assert found in finding.found
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("full", "skinny", "ok"), [("", "3.17.2", True), ("3.17.2", "3.17.2", True), ("3.18.0", "3.17.2", False)]
)
def test_both_parts_of_mlflow_are_of_one_version(full, skinny, ok):
    assert doctor.check_mlflow({"mlflow": full, "mlflow-skinny": skinny}).ok == ok


@pytest.mark.parametrize(
    ("line", "found"),
    [("numpy>=2,<3", ""), ("numpy<2", "; needed is <2"), ("no-such-thing>=7", "not installed")],
)
def test_a_dependency_is_installed_and_within_its_bounds(line, found):
    finding = doctor.check_dependency(line)
    assert finding.ok == (not found)
    assert finding.found.endswith(found)
    if found:
        assert shlex.split(finding.fix)[-1] == line


def test_requirements_that_cannot_be_read_are_findings(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    finding = doctor.check_dependency("numpy>=2,<3")
    assert not finding.ok
    assert finding.fix.endswith("-m pip install packaging")


def test_a_machine_with_nothing_but_python_gets_findings_and_no_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "")
    monkeypatch.setattr(doctor, "probe", lambda code: BROKEN)
    findings = doctor.diagnose()
    assert exit_code(findings) == 1
    assert {finding.name for finding in findings if finding.required and not finding.ok} == {doctor.PROJECT, "torch", "faiss"}


def test_what_is_optional_does_not_change_the_exit_code():
    well, warning = Finding("torch", "2.13.0"), Finding("torchrec", "not installed", ok=False, required=False)
    assert exit_code([well, warning]) == 0
    assert exit_code([well, Finding("faiss", "not installed", ok=False)]) == 1


def test_every_finding_is_shown_with_its_fix_below():
    text = render(
        [Finding("torch", "2.13.0"), Finding("torchrec", "1.7.0", False, False, "pip"), Finding("faiss", "none", False)]
    )
    assert text.splitlines() == [
        "ok      torch     2.13.0",
        "warning torchrec  1.7.0",
        "                  -> pip",
        "BROKEN  faiss     none",
    ]

"""What the doctor finds, from facts that are given and in this environment."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib import metadata

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
        doctor.check_torchrec(stack, torch, {}, wheels=True),
        doctor.check_faiss(stack, torch, {"gpus": 1 if torch["gpus"] else None}),
    ]
    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize(
    ("change", "torch", "fbgemm", "found", "fix"),
    [
        ({"fbgemm-gpu": "1.8.0"}, CPU, {}, "1.8.0 is the CUDA build, beside a CPU build of torch", "fbgemm-gpu-cpu==1.8.0"),
        ({}, CUDA, {}, "1.8.0 is the CPU build, beside a CUDA build of torch", "fbgemm-gpu==1.8.0"),
        ({"fbgemm-gpu-cpu": "1.7.0"}, CPU, {}, "1.7.0; torch 2.13.0+cpu needs 1.8.0", "fbgemm-gpu-cpu==1.8.0"),
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
    finding = doctor.check_torchrec(CPU_STACK | {"torchrec": found}, CPU, facts, wheels=True)
    assert not finding.ok and not finding.required
    assert problem in finding.found
    assert finding.fix.endswith("-m pip install torchrec==1.8.0")


def test_a_platform_without_builds_of_torchrec_is_well():
    stack = dict.fromkeys(doctor.STACK, "") | {"torch": "2.13.0"}
    assert doctor.check_fbgemm(stack, CPU, BROKEN, wheels=False).ok
    assert doctor.check_torchrec(stack, CPU, BROKEN, wheels=False).ok


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
    ("change", "facts", "found", "fix"),
    [
        ({"torch": ""}, BROKEN, "not installed", "make clean setup"),
        ({}, BROKEN, "2.13.0+cpu: OSError: undefined symbol", "make clean setup"),
        ({"torch": "2.14.1"}, CPU, "2.14.1; needed is 2.13", "make clean setup"),
        ({"torch": "2.14.1"}, CUDA, "2.14.1; needed is 2.13", "make clean setup FLAVOUR=gpu"),
    ],
)
def test_a_torch_that_does_not_load_or_is_of_another_version_is_broken(change, facts, found, fix):
    finding = doctor.check_torch(CPU_STACK | change, facts)
    assert not finding.ok and finding.required
    assert (finding.found, finding.fix) == (found, fix)


@pytest.mark.parametrize(
    ("threads", "cores", "load", "fix"),
    [
        ({"torch": 8, "OpenBLAS": 8}, 8, 0.9, ""),
        ({"torch": 1, "OpenBLAS": 1}, 2, 7.0, ""),
        ({"torch": 0, "OpenBLAS": 0}, 2, 7.0, ""),
        ({"torch": 5, "OpenBLAS": 1}, 8, 3.9, ""),
        ({"torch": 64, "OpenBLAS": 1}, 2, 0.0, "OMP_NUM_THREADS=2"),  # the machine's cores, in a container that has two
        ({"torch": 1, "OpenBLAS": 64}, 3, 0.0, "OPENBLAS_NUM_THREADS=3"),
        ({"torch": 2, "OpenBLAS": 2}, 0.5, 0.0, "OMP_NUM_THREADS=1"),
        ({"torch": 2, "OpenBLAS": 2}, 2, 1.3, "OMP_NUM_THREADS=1"),
        ({"torch": 8, "OpenBLAS": 1}, 8, 3.0, "OMP_NUM_THREADS=5"),
        ({"torch": 1, "OpenBLAS": 8}, 8, 90.0, "OPENBLAS_NUM_THREADS=1"),
    ],
)
def test_more_threads_than_free_cores_warn(threads, cores, load, fix):
    finding = doctor.check_threads(threads, cores, load)
    assert (finding.ok, finding.required) == (not fix, False)
    assert finding.fix.startswith("export ") == bool(fix)
    assert fix in finding.fix.split() or not fix


def test_the_cores_of_a_container_are_those_of_its_quota(monkeypatch):
    def quota(text):
        monkeypatch.setattr(doctor.Path, "read_text", lambda path, encoding: text)
        return doctor.cores()

    assert 0 < doctor.cores() <= os.cpu_count()
    assert quota("50000 100000\n") == 0.5
    assert quota("max 100000\n") == quota("9900000 100000\n") == quota("") == len(os.sched_getaffinity(0))


MLFLOW = dict.fromkeys(doctor.MLFLOW, "3.17.2")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ""),
        ({"mlflow": "", "mlflow-tracing": ""}, ""),
        ({"mlflow": "3.18.0"}, "mlflow 3.18.0"),
        (dict.fromkeys(doctor.MLFLOW, "3.18.0"), "mlflow-skinny 3.18.0"),
        ({"mlflow-skinny": ""}, "mlflow-skinny (none)"),
        ({"mlflow-tracing": "3.16.0"}, "mlflow-tracing 3.16.0"),
    ],
)
def test_all_parts_of_mlflow_are_of_one_version_that_can_be_installed(change, found):
    finding = doctor.check_mlflow(MLFLOW | change)
    assert (finding.ok, finding.required) == (not found, False)
    assert found in finding.found
    if found:
        assert shlex.split(finding.fix)[-3:] == [f"{name}==3.17.2" for name in doctor.MLFLOW]


@pytest.mark.parametrize(
    ("uri", "ok"),
    [
        *((uri, True) for uri in ("", "off", "sqlite:///mlflow.db", "http://mlflow:5000", "postgresql+psycopg://u:pw@h/db")),
        *((uri, False) for uri in ("mlruns", "./mlruns", "/srv/mlruns", "file:///srv/mlruns", "C:\\mlruns")),
    ],
)
def test_the_file_store_that_mlflow_refuses_warns(uri, ok):
    finding = doctor.check_store({"MLFLOW_TRACKING_URI": uri})
    assert (finding.ok, finding.required) == (ok, False)
    assert finding.fix == ("" if ok else "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db")
    assert "pw" not in finding.found
    assert doctor.check_store({"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true"}).ok


def test_an_extra_is_named_where_all_of_it_is_here_and_warns_where_it_is_out_of_its_bounds():
    lines = {
        'redis<9,>=5.2; extra == "redis"': "8.1.0",
        'lmdb<4,>=1.6; extra == "lmdb"': "",
        'transformers<6,>=4.57; extra == "text"': "6.0.1",
        'sentence-transformers<7,>=5.2; extra == "text"': "",
    }
    summary, *wrong = doctor.check_extras(lines)
    assert (summary.found, summary.ok) == ("redis", True)
    assert [(each.name, each.ok, each.required) for each in wrong] == [("transformers", False, False)]
    assert "6.0.1" in wrong[0].found and "extra text" in wrong[0].found
    assert shlex.split(wrong[0].fix)[-1] == "transformers<6,>=4.57"


def test_a_program_that_only_tests_need_warns_at_most():
    assert doctor.check_program("chromium", "/usr/bin/chromium").ok
    finding = doctor.check_program("chromium", "")
    assert (finding.ok, finding.required, finding.fix) == (False, False, "apt-get install chromium")
    assert doctor.place_of(["no-such-program", "/no-such-*/place"]) == ""
    assert doctor.place_of(["no-such-program", "sh"]).endswith("/sh")
    assert doctor.place_of([f"{sys.executable[:-1]}*"]).startswith(sys.executable[:-1])


def test_a_wheel_is_mended_by_pip_alone(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKOUT", False)
    nothing = dict.fromkeys(doctor.STACK, "")
    torch = nothing | {"torch": "2.13.0+cpu"}
    cuda = torch | {"torch": "2.13.0", "fbgemm-gpu": "1.8.0"}
    findings = [
        doctor.check_python((3, 10)),
        doctor.check_project(""),
        doctor.check_torch(nothing, BROKEN),
        doctor.check_torch(torch | {"torch": "2.12.0"}, CUDA),
        doctor.check_gpu(CPU, driver=True),
        doctor.check_fbgemm(nothing, BROKEN, BROKEN, wheels=True),
        doctor.check_fbgemm(torch, CPU, {}, wheels=True),
        doctor.check_torchrec(torch, CPU, {}, wheels=True),
        doctor.check_torchrec(cuda, CUDA, {}, wheels=True),
    ]
    for finding in findings:
        assert not finding.ok
        assert "-m pip install" in finding.fix and "make" not in finding.fix and "packaging" not in finding.fix
    cpu, gpu, driver, _, fbgemm, torchrec, torchrec_cuda = (finding.fix for finding in findings[2:])
    assert "'torch==2.13.*'" in cpu and cpu.endswith("/whl/cpu")
    assert gpu == driver and gpu.endswith("torch==2.13.*'")
    assert fbgemm.endswith("install fbgemm-gpu-cpu==1.8.0")
    # torchrec asks for fbgemm-gpu, the CUDA build, which must not come
    assert "--no-deps torchrec==1.8.0" in torchrec and torchrec.endswith(" ".join(doctor.BESIDE_TORCHREC))
    assert torchrec_cuda.endswith("install torchrec==1.8.0")


@pytest.mark.torchrec
def test_what_torchrec_needs_beside_fbgemm_is_what_it_says():
    lines = [line for line in metadata.requires("torchrec") if "extra ==" not in line]
    assert sorted(re.split(r"[^\w-]", line)[0] for line in lines) == sorted([*doctor.BESIDE_TORCHREC, "fbgemm-gpu"])


def test_imports_that_fail_are_found_together_and_each_alone_where_one_crashes(tmp_path, monkeypatch):
    (tmp_path / "raises.py").write_text("raise OSError('first line\\nlast line')")
    (tmp_path / "crashes.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.import_errors(["json", "raises"]) == {"raises": "OSError: first line"}
    assert set(doctor.import_errors(["json", "crashes", "raises"])) == {"raises", "crashes"}


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


def test_a_dependency_that_does_not_load_is_broken_and_installed_again():
    finding = doctor.check_dependency("numpy>=2,<3", "ImportError: no such symbol")
    assert not finding.ok and "no such symbol" in finding.found
    assert "--force-reinstall --no-deps numpy==" in finding.fix


def test_requirements_that_cannot_be_read_are_findings(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    finding = doctor.check_dependency("numpy>=2,<3")
    assert not finding.ok
    assert finding.fix.endswith("-m pip install packaging")
    assert doctor.check_extras({"lmdb; extra == 'lmdb'": "1"}) == []


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

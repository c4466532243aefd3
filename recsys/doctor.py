"""What is installed, whether it loads and fits together, and the command that mends what does not."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = "attention-recommender"
ROOT = Path(__file__).parent.parent
CHECKOUT = (ROOT / "Makefile").is_file() and (ROOT / "pyproject.toml").is_file()
"""Whether this is the project's folder, where make mends; an installed wheel is mended by pip."""
OLDEST_PYTHON = (3, 11)
SECONDS = 120
"""Longest that an import may take; the first one in a new environment also compiles."""

FITS = {"2.13": "1.8.0"}
"""Minor version of torch → the version of fbgemm and of torchrec that loads beside it; their metadata does not say so."""
MLFLOW = ("mlflow", "mlflow-skinny", "mlflow-tracing")
STACK = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "faiss-cpu", "faiss-gpu", *MLFLOW)
UNINSTALLABLE = {"3.18.0": "3.17.2"}
"""Release of MLflow whose own parts stop at another → that one."""
BESIDE_TORCHREC = ("pyre-extensions", "tensordict", "torchmetrics", "tqdm")
"""What torchrec requires but fbgemm, whose CPU build has another name."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROGRAMS = {
    "curl": ("curl",),
    "redis-server": ("redis-server", "valkey-server"),
    "postgresql": ("initdb", "/usr/lib/postgresql/*/bin/initdb"),
    "chromium": ("chromium",),
}
"""Package of Debian's → programs or places, of which tests start one; where there is none, they are skipped."""
SHIM = "+cpu.shim"
"""Marks the local package that stands for fbgemm-gpu and brings its CPU build."""
WITHOUT = 'model.embedding = "torch" serves'
MODULES = {"scikit-learn": "sklearn", "mlflow-skinny": "mlflow"}
"""Module of a distribution, where it is not the name with underscores."""

TORCH = """
import torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
gpus = [f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]
print(json.dumps({"cuda": torch.version.cuda, "threads": torch.get_num_threads(), "gpus": gpus}))
"""
FBGEMM = """
import torch, fbgemm_gpu
offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3]))
assert offsets.tolist() == [0, 2, 5], offsets
print("{}")
"""
TORCHREC = """
import torch, torchrec
table = torchrec.EmbeddingConfig(name="item", embedding_dim=4, num_embeddings=5, feature_names=["item"])
features = torchrec.KeyedJaggedTensor(keys=["item"], values=torch.tensor([1, 3, 4]), lengths=torch.tensor([1, 2]))
vectors = torchrec.EmbeddingCollection(tables=[table], device=torch.device("cpu"))(features)["item"].values()
assert vectors.shape == (3, 4), vectors.shape
print("{}")
"""
FAISS = """
import faiss
gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else None
try:
    from threadpoolctl import threadpool_info
    blas = max((pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"), default=0)
except ImportError:
    blas = 0
print(json.dumps({"gpus": gpus, "blas": blas}))
"""
IMPORTS = """
from importlib import import_module
errors = {}
for module in MODULES:
    try:
        import_module(module)
    except BaseException as error:
        errors[module] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(errors))
"""

Facts = Mapping[str, Any]
"""What a probe reported; {"error": one line} where it failed."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    found: str
    """Version and what else was seen, or what is wrong."""
    ok: bool = True
    required: bool = True
    """Whether work stops without it; what is optional only warns."""
    fix: str = ""
    """The command that mends it; empty where all is well."""


def diagnose() -> list[Finding]:
    """Look at Python, the torch stack, the devices and every dependency; what may crash is loaded in a process of its own."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # of others: the probes have not begun
    requirements = needs()
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        faiss, others = pool.submit(probe, FAISS), pool.submit(import_errors, [module_of(line) for line in requirements])
        versions = {name: version(name) for name in STACK}
        facts = probe(FBGEMM + TORCHREC + TORCH) if versions["torchrec"] else {"error": "is not there"}
        fbgemm: Facts = {}
        torchrec: Facts = {}
        if "error" in facts:  # of which one it is
            facts, fbgemm, torchrec = pool.map(probe, (TORCH, FBGEMM, TORCHREC))
        threads = {"torch": facts.get("threads", 0), "OpenBLAS": faiss.result().get("blas", 0)}
        errors = others.result()
        return [
            check_python(sys.version_info[:2]),
            check_project(version(PROJECT)),
            check_torch(versions, facts),
            check_gpu(facts, driver=Path("/proc/driver/nvidia/version").exists()),
            check_threads(threads, cores(), load),
            check_fbgemm(versions, facts, fbgemm, has_wheels()),
            check_torchrec(versions, facts, torchrec, has_wheels()),
            check_faiss(versions, facts, faiss.result()),
            check_mlflow(versions),
            check_store(os.environ),
            *check_extras({line: version(_name(line)) for line in needs(extras=True)}),
            *(check_dependency(line, errors.get(module_of(line), "")) for line in requirements),
            *(check_program(name, place_of(places)) for name, places in PROGRAMS.items() if CHECKOUT),
        ]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if something required is broken, else 0."""
    return int(any(finding.required and not finding.ok for finding in findings))


def render(findings: Sequence[Finding]) -> str:
    """One line a finding, its fix below it; plain text, since rich may be what is broken."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok" if finding.ok else "BROKEN" if finding.required else "warning"
        lines.append(f"{mark:<8}{finding.name:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':<{width + 10}}-> {finding.fix}")
    return "\n".join(lines)


def probe(code: str) -> dict[str, Any]:
    """The JSON that `code` prints last, run by a Python process of its own, or {"error": one line} if it fails or crashes."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", f"import json\n{code}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"does not load within {SECONDS} s"}
    if run.returncode < 0:
        return {"error": f"crashes Python when it is loaded (signal {-run.returncode})"}
    if run.returncode:
        return {"error": (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1]}
    return dict(json.loads(run.stdout.splitlines()[-1]))


def version(distribution: str) -> str:
    """The installed version; empty where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def needs(extras: bool = False) -> list[str]:
    """Requirement lines of the project, beside those that have a check of their own; empty where it is not installed itself.

    `extras`: those of its extras, else those that it cannot do without.
    """
    lines = (metadata.requires(PROJECT) or []) if version(PROJECT) else []
    own = {*STACK, PROJECT} - ({"mlflow-skinny"} if not extras else set())
    return [line for line in lines if ("extra ==" in line) == extras and _name(line) not in own]


def module_of(line: str) -> str:
    """What is imported of a requirement."""
    return MODULES.get(_name(line), _name(line).replace("-", "_"))


def import_errors(modules: Sequence[str]) -> dict[str, str]:
    """Module → one line, of those that do not load: all by one process, or each by its own where that one crashes or hangs."""
    tried = probe(f"MODULES = {list(modules)!r}\n{IMPORTS}")
    if "error" not in tried:
        return tried
    alone = {module: probe(f"import {module}\nprint('{{}}')").get("error", "") for module in modules}
    return {module: error for module, error in alone.items() if error}


def cores() -> float:
    """Cores that this process may use, whatever the machine has: by its affinity and by the quota of its control group."""
    here = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return here
    return here if quota == "max" else min(here, int(quota) / int(period))


def place_of(places: Sequence[str]) -> str:
    """The first of some programs or absolute patterns that is there; empty where none is."""
    there = (next(map(str, Path("/").glob(place[1:])), "") if place[0] == "/" else shutil.which(place) for place in places)
    return next(filter(None, there), "")


def has_wheels() -> bool:
    """Whether fbgemm, and with it torchrec, is built for this platform."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def check_python(found: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, found))
    if found < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        wheel = f"python{oldest} -m venv .venv && .venv/bin/python -m pip install {_quote(f'{PROJECT}[cpu]')}"
        fix = f"make clean setup PYTHON=python{oldest}" if CHECKOUT else wheel
        return Finding("python", f"{text}; {oldest} or newer is needed", False, fix=fix)
    return Finding("python", f"{text} on {platform.system()} {platform.machine()}")


def check_project(found: str) -> Finding:
    if not found:
        what = f"-e {_quote(f'{ROOT}[cpu]')}" if CHECKOUT else _quote(f"{PROJECT}[cpu]")
        return Finding(PROJECT, "not installed, so its dependencies are unknown", False, fix=_pip(what))
    return Finding(PROJECT, found if CHECKOUT else f"{found}, as a wheel")


def check_torch(versions: Mapping[str, str], facts: Facts) -> Finding:
    """One of the versions that the project is made for, and that it loads."""
    found = versions["torch"]
    if not found or "error" in facts:
        return Finding("torch", f"{found}: {facts['error']}" if found else "not installed", False, fix=_torch_anew())
    if not fitting(found):
        fix = _torch_anew("gpu" if facts["cuda"] else "cpu")
        return Finding("torch", f"{found}; needed is {' or '.join(FITS)}", False, fix=fix)
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    return Finding("torch", f"{found} ({build}, {facts['threads']} threads)")


def check_gpu(torch: Facts, driver: bool) -> Finding:
    """`driver`: whether the machine has an NVIDIA driver, whatever torch sees."""
    if torch.get("gpus"):
        return Finding("gpu", ", ".join(torch["gpus"]), required=False)
    if not driver:
        return Finding("gpu", "none; the CPU is used", required=False)
    if torch.get("cuda"):
        found = f"an NVIDIA driver, but torch sees no device; it needs a driver for CUDA {torch['cuda']}"
        return Finding("gpu", found, False, required=False, fix="nvidia-smi")
    fix = "make setup FLAVOUR=gpu" if CHECKOUT else _torch_anew("gpu")
    return Finding("gpu", "an NVIDIA driver beside a CPU build of torch", False, required=False, fix=fix)


def check_threads(threads: Mapping[str, int], cores: float, load: float) -> Finding:
    """Optional: no library has more threads than it has cores; a thread that waits for its turn holds up, or spins beside, all.

    `cores`: that this process may use; `load`: threads of others that want to run.
    """
    most, told = max(threads.values()), ", ".join(f"{count} of {name}" for name, count in threads.items() if count)
    if most > cores:
        problem, fit = f"{told}, on {cores:g} cores that may be used", int(cores)
    elif most > 1 and load > 1 and most > cores + 1 - load:  # what is open on a desk is less than one core's
        problem, fit = f"{told}, on {cores:g} cores of which others keep {min(load, cores):.1f} busy", int(cores - load)
    else:
        return Finding("threads", f"{told or 'unknown'}, on {cores:g} cores", required=False)
    fix = " ".join(f"{name}={max(1, fit)}" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"))
    return Finding("threads", problem, False, required=False, fix=f"export {fix}")


def check_fbgemm(versions: Mapping[str, str], torch: Facts, fbgemm: Facts, wheels: bool) -> Finding:
    """Optional: the version and the build that fit torch, and whether its operators load."""
    if not wheels:
        return Finding("fbgemm", f"no builds for {platform.system()} {platform.machine()}; {WITHOUT}", required=False)
    wanted = fitting(versions["torch"])
    if not wanted:
        known = ", ".join(f"torch {minor} with {release}" for minor, release in FITS.items())
        found = f"nothing is known to fit torch {versions['torch'] or '(not installed)'}; known: {known}"
        return Finding("fbgemm", found, False, required=False, fix=_torch_anew("gpu" if torch.get("cuda") else "cpu"))
    cuda_build = "" if SHIM in versions["fbgemm-gpu"] else versions["fbgemm-gpu"]
    builds = {"CUDA": cuda_build, "CPU": versions["fbgemm-gpu-cpu"]}
    mine, other = ("CUDA", "CPU") if torch.get("cuda") else ("CPU", "CUDA")
    problem = f"{builds[other]} is the {other} build, beside a {mine} build of torch" if builds[other] else ""
    problem = problem or _misfit(builds[mine], wanted, versions["torch"], fbgemm)
    if not problem:
        return Finding("fbgemm", f"{wanted} ({mine} build)", required=False)
    brings = f"fbgemm-gpu=={wanted}" if mine == "CUDA" else f"fbgemm-gpu-cpu=={wanted}"
    if mine == "CPU" and CHECKOUT:
        brings += f" {_quote(ROOT / 'packaging' / 'fbgemm-gpu')}"
    # both builds fill one folder, so all of it goes first
    fix = f"{_python()} -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {_pip(brings)}"
    return Finding("fbgemm", problem, False, required=False, fix=fix)


def check_torchrec(versions: Mapping[str, str], torch: Facts, torchrec: Facts, wheels: bool) -> Finding:
    """Optional: the version that fits torch, and whether an EmbeddingCollection gives vectors."""
    found, wanted = versions["torchrec"], fitting(versions["torch"])
    if not wheels or not wanted:
        return Finding("torchrec", f"needs fbgemm; {WITHOUT}", ok=not wheels, required=False)
    problem = _misfit(found, wanted, versions["torch"], torchrec)
    if not problem:
        return Finding("torchrec", f"{found}; an EmbeddingCollection gives vectors", required=False)
    # a broken fbgemm has a line of its own, which comes first; with one of the name that torchrec asks for, pip brings no other
    fix = _pip(f"torchrec=={wanted}")
    if not versions["fbgemm-gpu"] and not torch.get("cuda"):
        fix = f"{_pip(f'--no-deps torchrec=={wanted}')} && {_pip(' '.join(BESIDE_TORCHREC))}"
    return Finding("torchrec", problem, False, required=False, fix=fix)


def _misfit(found: str, wanted: str, torch: str, facts: Facts) -> str:
    """What is wrong with an fbgemm or a torchrec; empty where it is the one wanted and loads."""
    if not found:
        return f"not installed; {WITHOUT}"
    if found != wanted:
        return f"{found}; torch {torch} needs {wanted}"
    return f"{found}: {facts['error']}" if "error" in facts else ""


def fitting(torch: str) -> str:
    """The version of fbgemm and torchrec for a version of torch; empty where none is known."""
    return FITS.get(".".join(torch.split(".")[:2]), "")


def check_faiss(versions: Mapping[str, str], torch: Facts, faiss: Facts) -> Finding:
    """Exactly one build, and that it loads; the CUDA build reports how many GPUs it sees."""
    installed = [name for name in ("faiss-cpu", "faiss-gpu") if versions[name]]
    anew = _pip("faiss-gpu" if torch.get("gpus") else "faiss-cpu")
    if len(installed) == 2:
        fix = f"{_python()} -m pip uninstall -y faiss-cpu faiss-gpu && {anew}"
        return Finding("faiss", "faiss-cpu and faiss-gpu are both installed and fill one folder", False, fix=fix)
    if not installed:
        return Finding("faiss", "not installed", False, fix=anew)
    name, found = installed[0], versions[installed[0]]
    if "error" in faiss:
        return Finding("faiss", f"{found}: {faiss['error']}", False, fix=_pip(f"--force-reinstall --no-deps {name}=={found}"))
    build = "CPU build" if faiss["gpus"] is None else f"CUDA build, {faiss['gpus']} GPUs"
    return Finding("faiss", f"{found} ({build})")


def check_mlflow(versions: Mapping[str, str]) -> Finding:
    """Whether the interface, where it is installed, is of the same version as the parts that record."""
    full, skinny = versions["mlflow"], versions["mlflow-skinny"]
    if not full:
        return Finding("mlflow ui", "not installed; runs are recorded without it", required=False)
    wanted = UNINSTALLABLE.get(skinny or full, skinny or full)
    parts = {name: versions[name] for name in MLFLOW}
    if set(parts.values()) != {wanted}:
        found = ", ".join(f"{name} {release or '(none)'}" for name, release in parts.items())
        fix = _pip(" ".join(f"{name}=={wanted}" for name in MLFLOW))
        return Finding("mlflow ui", f"{found}: not of one version", False, required=False, fix=fix)
    return Finding("mlflow ui", full, required=False)


def check_store(environment: Mapping[str, str]) -> Finding:
    """Whether MLflow takes the store that the environment names; its file store it refuses."""
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    scheme = uri.partition(":")[0] if ":" in uri else ""
    allowed = environment.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    if uri in ("off", "databricks") or not uri:
        return Finding("mlflow store", uri or "mlflow.db, in the folder where the command is started", required=False)
    if not allowed and (len(scheme) < 2 or scheme == "file"):  # a path, or a drive's letter
        fix = "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
        return Finding("mlflow store", f"{uri} is a folder, which MLflow refuses", False, required=False, fix=fix)
    return Finding("mlflow store", f"by {scheme or 'file'}", required=False)  # the address may hold a password


def check_extras(installed: Mapping[str, str]) -> list[Finding]:
    """Optional: which extras are here, and what of them is out of its bounds, by requirement line → version, or empty."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return []  # told by the check of the dependencies
    extras: dict[str, list[bool]] = {}
    wrong = []
    for requirement, version in ((Requirement(line), version) for line, version in installed.items()):
        extra = str(requirement.marker).rpartition('extra == "')[2].partition('"')[0]
        extras.setdefault(extra, []).append(bool(version))
        if version and not requirement.specifier.contains(version, prereleases=True):
            fix = _pip(_quote(f"{requirement.name}{requirement.specifier}"))
            problem = f"{version}; needed is {requirement.specifier} (extra {extra})"
            wrong.append(Finding(requirement.name, problem, False, required=False, fix=fix))
    whole = [extra for extra, there in extras.items() if all(there)]
    return [Finding("extras", ", ".join(sorted(whole)) or "none", required=False), *wrong]


def check_dependency(line: str, error: str = "") -> Finding:
    """One requirement line: installed, within its bounds, and loading, else `error` says why it does not."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Finding(line, "unknown: packaging, which reads requirements, is not installed", False, fix=_pip("packaging"))
    requirement = Requirement(line)
    name, found = requirement.name, version(requirement.name)
    fix = _pip(_quote(f"{name}{requirement.specifier}"))
    if not found:
        return Finding(name, "not installed", False, fix=fix)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, f"{found}; needed is {requirement.specifier}", False, fix=fix)
    if error:
        return Finding(name, f"{found}: {error}", False, fix=_pip(f"--force-reinstall --no-deps {_quote(f'{name}=={found}')}"))
    return Finding(name, found)


def check_program(name: str, found: str) -> Finding:
    """Optional: a program that some tests start."""
    if found:
        return Finding(name, found, required=False)
    return Finding(name, "not installed; its tests are skipped", False, required=False, fix=f"apt-get install {name}")


def _torch_anew(flavour: str = "cpu") -> str:
    """The command that brings a torch that fits, and with make all that goes with it."""
    if CHECKOUT:
        return f"make clean setup FLAVOUR={flavour}" if flavour == "gpu" else "make clean setup"
    index = f" --index-url {TORCH_CPU_INDEX}" if flavour == "cpu" else ""
    return f"{_python()} -m pip uninstall -y torch && {_pip(_quote(f'torch=={max(FITS)}.*') + index)}"


def _name(line: str) -> str:
    """Of the distribution that a requirement line begins with."""
    return re.split(r"[^\w.-]", line, maxsplit=1)[0]


def _pip(what: str) -> str:
    return f"{_python()} -m pip install {what}"


def _python() -> str:
    near = os.path.relpath(sys.executable)
    return _quote(sys.executable if near.startswith("..") else near)


def _quote(text: object) -> str:
    return shlex.quote(str(text))


if __name__ == "__main__":  # for where the command itself does not start
    everything = diagnose()
    print(render(everything))
    sys.exit(exit_code(everything))

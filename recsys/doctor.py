"""What is installed, whether it loads and fits together, and the command that mends what does not."""

from __future__ import annotations

import json
import os
import platform
import shlex
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
OLDEST_PYTHON = (3, 11)
SECONDS = 120
"""Longest that an import may take; the first one in a new environment also compiles."""

FITS = {"2.13": "1.8.0"}
"""Minor version of torch → the version of fbgemm and of torchrec that loads beside it; their metadata does not say so."""
STACK = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "faiss-cpu", "faiss-gpu", "mlflow", "mlflow-skinny")
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
print(json.dumps({"gpus": faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else None}))
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
    """Look at Python, the torch stack, the devices and every dependency; each import runs in a process of its own."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        torch, fbgemm, torchrec, faiss = (pool.submit(probe, code) for code in (TORCH, FBGEMM, TORCHREC, FAISS))
        others = list(pool.map(check_dependency, needs()))
        versions = {name: version(name) for name in STACK}
        facts = torch.result()
        return [
            check_python(sys.version_info[:2]),
            check_project(version(PROJECT)),
            check_torch(versions, facts),
            check_gpu(facts, driver=Path("/proc/driver/nvidia/version").exists()),
            check_fbgemm(versions, facts, fbgemm.result(), has_wheels()),
            check_torchrec(versions, torchrec.result(), has_wheels()),
            check_faiss(versions, facts, faiss.result()),
            check_mlflow(versions),
            *others,
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


def needs() -> list[str]:
    """What the project cannot do without, beside torch, as requirement lines; empty where it is not installed itself."""
    lines = (metadata.requires(PROJECT) or []) if version(PROJECT) else []
    return [line for line in lines if "extra ==" not in line and not line.startswith("torch<")]


def has_wheels() -> bool:
    """Whether fbgemm, and with it torchrec, is built for this platform."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def check_python(found: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, found))
    if found < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding("python", f"{text}; {oldest} or newer is needed", False, fix=f"make clean setup PYTHON=python{oldest}")
    return Finding("python", f"{text} on {platform.system()} {platform.machine()}")


def check_project(found: str) -> Finding:
    if not found:
        return Finding(
            PROJECT, "not installed, so its dependencies are unknown", False, fix=_pip(f"-e {_quote(f'{ROOT}[cpu]')}")
        )
    return Finding(PROJECT, found)


def check_torch(versions: Mapping[str, str], facts: Facts) -> Finding:
    if not versions["torch"]:
        return Finding("torch", "not installed", False, fix="make clean setup")
    if "error" in facts:
        return Finding("torch", f"{versions['torch']}: {facts['error']}", False, fix="make clean setup")
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    return Finding("torch", f"{versions['torch']} ({build}, {facts['threads']} threads)")


def check_gpu(torch: Facts, driver: bool) -> Finding:
    """`driver`: whether the machine has an NVIDIA driver, whatever torch sees."""
    if torch.get("gpus"):
        return Finding("gpu", ", ".join(torch["gpus"]), required=False)
    if not driver:
        return Finding("gpu", "none; the CPU is used", required=False)
    if torch.get("cuda"):
        found = f"an NVIDIA driver, but torch sees no device; it needs a driver for CUDA {torch['cuda']}"
        return Finding("gpu", found, False, required=False, fix="nvidia-smi")
    return Finding("gpu", "an NVIDIA driver beside a CPU build of torch", False, required=False, fix="make setup FLAVOUR=gpu")


def check_fbgemm(versions: Mapping[str, str], torch: Facts, fbgemm: Facts, wheels: bool) -> Finding:
    """Optional: the version and the build that fit torch, and whether its operators load."""
    if not wheels:
        return Finding("fbgemm", f"no builds for {platform.system()} {platform.machine()}; {WITHOUT}", required=False)
    wanted = fitting(versions["torch"])
    if not wanted:
        known = ", ".join(f"torch {minor} with {release}" for minor, release in FITS.items())
        found = f"nothing is known to fit torch {versions['torch'] or '(not installed)'}; known: {known}"
        return Finding("fbgemm", found, False, required=False, fix="make clean setup")
    cuda_build = "" if SHIM in versions["fbgemm-gpu"] else versions["fbgemm-gpu"]
    builds = {"CUDA": cuda_build, "CPU": versions["fbgemm-gpu-cpu"]}
    mine, other = ("CUDA", "CPU") if torch.get("cuda") else ("CPU", "CUDA")
    if builds[other]:
        problem = f"{builds[other]} is the {other} build, beside a {mine} build of torch"
    elif not builds[mine]:
        problem = f"not installed; {WITHOUT}"
    elif builds[mine] != wanted:
        problem = f"{builds[mine]}; torch {versions['torch']} needs {wanted}"
    elif "error" in fbgemm:
        problem = f"{builds[mine]}: {fbgemm['error']}"
    else:
        return Finding("fbgemm", f"{wanted} ({mine} build)", required=False)
    brings = (
        f"fbgemm-gpu=={wanted}" if mine == "CUDA" else f"fbgemm-gpu-cpu=={wanted} {_quote(ROOT / 'packaging' / 'fbgemm-gpu')}"
    )
    # both builds fill one folder, so all of it goes first
    fix = f"{_python()} -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {_pip(brings)}"
    return Finding("fbgemm", problem, False, required=False, fix=fix)


def check_torchrec(versions: Mapping[str, str], torchrec: Facts, wheels: bool) -> Finding:
    """Optional: the version that fits torch, and whether an EmbeddingCollection gives vectors."""
    found, wanted = versions["torchrec"], fitting(versions["torch"])
    if not wheels or not wanted:
        return Finding("torchrec", f"needs fbgemm; {WITHOUT}", ok=not wheels, required=False)
    if not found:
        problem = f"not installed; {WITHOUT}"
    elif found != wanted:
        problem = f"{found}; torch {versions['torch']} needs {wanted}"
    elif "error" in torchrec:
        problem = f"{found}: {torchrec['error']}"
    else:
        return Finding("torchrec", f"{found}; an EmbeddingCollection gives vectors", required=False)
    # with fbgemm in place, pip brings no other; where fbgemm is broken its own line comes first
    return Finding("torchrec", problem, False, required=False, fix=_pip(f"torchrec=={wanted}"))


def fitting(torch: str) -> str:
    """The version of fbgemm and torchrec for a version of torch; empty where none is known."""
    return FITS.get(".".join(torch.split(".")[:2]), "")


def check_faiss(versions: Mapping[str, str], torch: Facts, faiss: Facts) -> Finding:
    """Exactly one build, and that it loads; the CUDA build reports how many GPUs it sees."""
    installed = [name for name in ("faiss-cpu", "faiss-gpu") if versions[name]]
    if len(installed) == 2:
        fix = (
            f"{_python()} -m pip uninstall -y faiss-cpu faiss-gpu && {_pip('faiss-gpu' if torch.get('gpus') else 'faiss-cpu')}"
        )
        return Finding("faiss", "faiss-cpu and faiss-gpu are both installed and fill one folder", False, fix=fix)
    if not installed:
        return Finding("faiss", "not installed", False, fix=_pip("faiss-gpu" if torch.get("gpus") else "faiss-cpu"))
    name, found = installed[0], versions[installed[0]]
    if "error" in faiss:
        return Finding("faiss", f"{found}: {faiss['error']}", False, fix=_pip(f"--force-reinstall --no-deps {name}=={found}"))
    build = "CPU build" if faiss["gpus"] is None else f"CUDA build, {faiss['gpus']} GPUs"
    return Finding("faiss", f"{found} ({build})")


def check_mlflow(versions: Mapping[str, str]) -> Finding:
    """Whether the interface, where it is installed, is of the same version as the part that records."""
    full, skinny = versions["mlflow"], versions["mlflow-skinny"]
    if not full:
        return Finding("mlflow ui", "not installed; runs are recorded without it", required=False)
    if full != skinny:
        found = f"mlflow {full} beside mlflow-skinny {skinny or '(none)'}"
        return Finding("mlflow ui", found, False, required=False, fix=_pip(f"mlflow=={skinny}" if skinny else "mlflow-skinny"))
    return Finding("mlflow ui", full, required=False)


def check_dependency(line: str) -> Finding:
    """One requirement line: installed, within its bounds, and loading."""
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
    error = probe(f"import {MODULES.get(name, name.replace('-', '_'))}\nprint('{{}}')").get("error")
    if error:
        return Finding(name, f"{found}: {error}", False, fix=_pip(f"--force-reinstall --no-deps {_quote(f'{name}=={found}')}"))
    return Finding(name, found)


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

"""Dockerfile, compose file and Kubernetes example: what they name exists, and what they run parses. No image is built here."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from recsys.__main__ import app
from recsys.doctor import UNINSTALLABLE
from serving.app import GRACE, OPEN

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
KUBERNETES = [
    document
    for path in sorted((ROOT / "packaging" / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
IMAGES = ("cpu", "gpu", "mlflow")
SECRET = re.compile(r"password|secret|token|api_?key", re.IGNORECASE)


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage → its instructions, each with its words, in their order; that of FROM names the stage it begins with."""
    text = re.sub(r"<<'?END'?\n.*?^END$", "<<END", DOCKERFILE, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, list[tuple[str, str]]] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if match := re.match(r"([A-Z]+) +(.+)", line):
            if match[1] == "FROM":
                image, _, name = match[2].partition(" AS ")
                found[name] = [("FROM", image)]
            else:
                found[list(found)[-1]].append((match[1], match[2]))
    return found


def last(stage: str, instruction: str) -> str:
    """What the instruction says of the stage, or of the one it begins with."""
    said = stages()[stage]
    own = [words for name, words in said if name == instruction]
    return own[-1] if own else last(said[0][1], instruction)


def pods() -> list[dict[str, Any]]:
    """What the pods of the Kubernetes example are."""
    kinds = {each["kind"]: each["spec"] for each in KUBERNETES}
    return [kinds["Deployment"]["template"]["spec"], kinds["CronJob"]["jobTemplate"]["spec"]["template"]["spec"]]


def plain(text: str) -> str:
    """With the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def run_by() -> dict[str, list[str]]:
    """Where a container's `recsys` gets which words from."""
    found = {f"Dockerfile, {stage}": json.loads(last(stage, "CMD")) for stage in ("cpu", "gpu")}
    for name, service in SERVICES.items():
        if service["image"].startswith("recsys:$"):
            found[f"compose, {name}"] = [plain(word) for word in service["command"]]
    for pod in pods():
        for container in pod["containers"]:
            found[f"Kubernetes, {container['name']}"] = container["args"]
    return found


def parse(words: list[str]) -> dict[str, Any]:
    """The values that the verb would be called with."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="recsys")
    name, verb, rest = command.resolve_command(context, list(words))
    return verb.make_context(name, rest, parent=context).params


@pytest.mark.parametrize("where", run_by())
def test_every_command_of_a_container_is_one_that_the_command_takes(where):
    if run_by()[where] != ["--help"]:
        assert parse(run_by()[where])


@pytest.mark.parametrize("words", [["serv", "b"], ["serve", "b", "--hots=0"], ["serve"], ["serve", "b", "--port", "many"]])
def test_a_command_that_it_does_not_take_is_found(words):
    with pytest.raises(Exception, match=r"No such|Missing|not a valid|be a valid"):
        parse(words)


def test_everything_that_is_copied_exists_and_is_sent_to_the_builder():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for said in stages().values()
        for name, words in said
        if name == "COPY" and not words.startswith("--from")
        for source in words.split()[:-1]
    } | set(re.findall(r"type=bind,source=([^,]+)", DOCKERFILE))
    assert len(copied) >= 9
    assert copied == sent
    assert [path for path in sent if not (ROOT / path).exists()] == []


def test_all_packages_of_the_wheel_are_copied():
    names = re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.MULTILINE)
    assert {"recsys", "features", "training", "serving"} <= set(names)


@pytest.mark.parametrize("stage", IMAGES)
def test_an_image_runs_as_nobody_in_particular_and_begins_with_a_python_that_the_project_takes(stage):
    user = last(stage, "USER")
    assert re.fullmatch(r"[1-9]\d*", user)
    assert f"--uid {user} " in DOCKERFILE
    version = re.search(r"^FROM python:([\d.]+)-slim\S* AS base$", DOCKERFILE, re.MULTILINE).group(1)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert SpecifierSet(wanted).contains(version)
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert {pod["securityContext"][key] for key in ("runAsUser", "fsGroup")} == {int(user)}


def test_no_secret_stands_in_a_file():
    assert not [words for said in stages().values() for name, words in said if name in ("ENV", "ARG") and SECRET.search(words)]
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET.search(name) or re.fullmatch(r"\$\{\w+:\?.+\}", value), name
        assert not re.search(r"//[^/@\s]*:[^/@\s]*@", " ".join(service.get("command", [])))
    assert "Secret" not in {each["kind"] for each in KUBERNETES}


def test_health_is_asked_where_the_server_listens_and_by_paths_that_need_no_key():
    port = parse(json.loads(last("cpu", "CMD")))["port"]
    deployment, container = pods()[0], pods()[0]["containers"][0]
    assert f"127.0.0.1:{port}/health" in last("cpu", "HEALTHCHECK") and last("cpu", "EXPOSE") == str(port)
    assert SERVICES["api"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert parse(container["args"])["port"] == container["ports"][0]["containerPort"] == port
    asked = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {get["port"] for get in asked.values()} == {container["ports"][0]["name"]}
    assert asked["readinessProbe"]["path"] == "/ready" and asked["livenessProbe"]["path"] == "/health"
    assert {get["path"] for get in asked.values()} | {"/health"} <= set(OPEN)
    assert deployment["terminationGracePeriodSeconds"] > GRACE
    assert int(SERVICES["api"]["stop_grace_period"].removesuffix("s")) > GRACE


@pytest.mark.parametrize("stage", IMAGES)
def test_the_health_check_ends_well_where_health_is_answered_and_only_there(stage):
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" and healthy else 503)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    words = json.loads(last(stage, "HEALTHCHECK").partition(" CMD ")[2])
    assert words[0] == "python"
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = re.sub(r":\d+/", f":{server.server_address[1]}/", words[-1])
        for healthy in (True, False):
            done = subprocess.run([sys.executable, *words[1:-1], code], capture_output=True)
            assert (done.returncode == 0) == healthy
        server.shutdown()


def test_what_compose_names_is_there():
    declared = set(COMPOSE["volumes"])
    for name, service in SERVICES.items():
        if "build" in service:
            assert plain(service["build"]["target"]) in IMAGES
        else:
            assert re.search(r":\d+(\.\d+)*-", service["image"]), f"{name}: an image without a version"
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= declared
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other] or "build" in SERVICES[other], f"{other} has no health check"
    assert SERVICES["nightly"]["profiles"] and "profiles" not in SERVICES["api"]


def test_what_the_kubernetes_example_names_is_there():
    claims = {each["metadata"]["name"] for each in KUBERNETES if each["kind"] == "PersistentVolumeClaim"}
    kinds = {each["kind"]: each["spec"] for each in KUBERNETES}
    assert set(kinds) == {"PersistentVolumeClaim", "Deployment", "Service", "CronJob"}
    labels = kinds["Deployment"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["selector"]["matchLabels"] == labels == kinds["Service"]["selector"]
    for pod in pods():
        volumes = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod["volumes"]}
        used = {claim["claimName"] for claim in volumes.values() if claim}
        assert used == claims
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] and not confined["allowPrivilegeEscalation"]
            assert confined["capabilities"] == {"drop": ["ALL"]}


def test_an_image_holds_every_dependency_as_pinned_and_nothing_that_tests(tmp_path):
    script = re.search(r"^python - \$EXTRAS <<'LIST'\n(.*?)^LIST$", DOCKERFILE, re.MULTILINE | re.DOTALL).group(1)
    extras = re.search(r'^ARG EXTRAS="(.+)"$', DOCKERFILE, re.MULTILINE).group(1).split()
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (tmp_path / "requirements").mkdir()
    for path in (ROOT / "requirements").glob("*.txt"):
        (tmp_path / "requirements" / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-", *extras], input=script, text=True, cwd=tmp_path, check=True)
    pins = (ROOT / "requirements" / "pins.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for flavour in ("cpu", "gpu"):
        lines = (tmp_path / "requirements" / f"image-{flavour}.txt").read_text().splitlines()
        assert "-c pins.txt" in lines and not [line for line in lines if line.startswith("-e")]
        assert set(project["dependencies"]) < set(lines)
        named = {Requirement(line).name: line for line in lines if re.match(r"[a-z]", line)}
        assert {"torch", f"faiss-{flavour}", "redis", "psycopg", "torchrec"} <= set(named)
        assert {"pytest", "mypy", "ruff", "ray"}.isdisjoint(named)
        loose = [name for name, line in named.items() if f"\n{name}==" not in pins and not re.search(r"={2,3}\d", line)]
        assert loose == ["torch"]  # its version stands in a line of its own
        assert any(re.fullmatch(r"torch={2,3}[\d.]+", line) for line in lines)


def test_the_versions_of_the_mlflow_server_and_of_its_clients_are_one():
    (version,) = re.findall(r"^mlflow-skinny==(\S+)$", (ROOT / "requirements" / "pins.txt").read_text(), re.MULTILINE)
    assert "mlflow==$(sed -n 's/^mlflow-skinny==//p'" in DOCKERFILE
    assert version not in UNINSTALLABLE

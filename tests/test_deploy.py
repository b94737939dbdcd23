"""What runs tundish every night: each command line is one that the command line takes, and each file is well-formed."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import check_jsonschema
import pytest
import typer
from ruamel.yaml import YAML

from tundish import cli
from tundish.matrix_file import load_matrix

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SERVICE, TIMER = DEPLOY / "systemd" / "tundish.service", DEPLOY / "systemd" / "tundish.timer"
CRONJOB, WORKFLOW = DEPLOY / "kubernetes" / "cronjob.yaml", DEPLOY / "github" / "nightly.yml"
DOCKERFILE = DEPLOY / "Dockerfile"


def documents(path: Path) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all(path))


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Sections of a unit; a key may be there more than once."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, value = line.split("=", 1)
            section.setdefault(key, []).append(value)
    return sections


def container() -> Any:
    (job,) = [each for each in documents(CRONJOB) if each["kind"] == "CronJob"]
    (made,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return made


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Where each command line of tundish stands, and its words."""
    (start,) = unit(SERVICE)["Service"]["ExecStart"]
    yield SERVICE.name, shlex.split(start)
    yield CRONJOB.name, ["tundish", *container()["args"]]
    steps = documents(WORKFLOW)[0]["jobs"]["convert"]["steps"]
    for line in "\n".join(step.get("run", "") for step in steps).splitlines():
        if line.startswith("tundish "):
            yield WORKFLOW.name, shlex.split(line.split(" > ")[0])
    found = dict(instructions())
    yield DOCKERFILE.name, [*json.loads(found["ENTRYPOINT"]), "recipes"]
    assert json.loads(found["CMD"]) == ["--help"]
    (run,) = re.findall(r"^# docker run .* tundish (build .*)$", DOCKERFILE.read_text(), re.MULTILINE)
    yield DOCKERFILE.name, ["tundish", *shlex.split(run)]
    for line in (ROOT / "docs" / "jobs.md").read_text().splitlines():
        if line.startswith("    tundish "):
            yield "jobs.md", shlex.split(line.split(" > ")[0])


COMMAND_LINES = list(command_lines())


@pytest.mark.parametrize(("where", "words"), COMMAND_LINES, ids=lambda value: value if isinstance(value, str) else "")
def test_command_lines_are_ones_that_tundish_takes(where: str, words: list[str]) -> None:
    assert Path(words[0]).name == "tundish"
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    context = group.make_context("tundish", words[1:])
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    assert name and command
    command.make_context(name, rest, parent=context)  # exits with 2 at what it does not know


def test_all_were_found() -> None:
    assert [where for where, _ in COMMAND_LINES] == [
        "tundish.service", "cronjob.yaml", "nightly.yml", "Dockerfile", "Dockerfile", "jobs.md", "jobs.md",
    ]  # fmt: skip


def test_the_matrix_of_the_example() -> None:
    names = [cell.name for cell in load_matrix(DEPLOY / "nightly.yaml").cells]
    assert names == ["phi-3.5-mini/phi35-mobile-int4", "phi-3.5-mini/phi35-aipc-int4", "smollm2/phi35-mobile-int4"]


def test_units(tmp_path: Path) -> None:
    service = unit(SERVICE)["Service"]
    assert service["Type"] == ["oneshot"] and service["RestartPreventExitStatus"] == ["2 4"]
    assert unit(TIMER)["Timer"]["OnCalendar"]
    written = {
        "/var/lib/tundish": "StateDirectory",
        "/var/cache/tundish": "CacheDirectory",
        "/var/log/tundish": "LogsDirectory",
    }
    words = " ".join(service["ExecStart"] + service["Environment"])
    assert {path for path in written if path in words} == set(written)
    assert all(service[key] == ["tundish"] for key in written.values())
    if shutil.which("systemd-analyze") is None:
        configparser.ConfigParser(strict=False, interpolation=None).read([SERVICE, TIMER])
        return
    # It looks for the program, which is not installed there.
    (tmp_path / SERVICE.name).write_text(SERVICE.read_text().replace("/opt/tundish/bin/tundish", "/bin/true"))
    shutil.copy(TIMER, tmp_path)
    units = [str(tmp_path / SERVICE.name), str(tmp_path / TIMER.name)]
    run = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and not run.stderr, run.stderr


def test_cronjob() -> None:
    claim, job = documents(CRONJOB)
    assert (claim["kind"], job["apiVersion"], job["kind"]) == ("PersistentVolumeClaim", "batch/v1", "CronJob")
    spec = job["spec"]["jobTemplate"]["spec"]
    pod, made = spec["template"]["spec"], container()
    assert job["spec"]["concurrencyPolicy"] == "Forbid" and pod["restartPolicy"] == "Never"
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": made["name"], "operator": "In", "values": [2, 4],
    }  # fmt: skip
    assert {mount["name"] for mount in made["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert claim["metadata"]["name"] in {v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]}
    user = dict(instructions())["USER"].split(":")
    assert [pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]] == [int(each) for each in user]
    assert made["securityContext"]["readOnlyRootFilesystem"]
    writable = tuple(m["mountPath"] + "/" for m in made["volumeMounts"] if not m.get("readOnly"))
    caches = [entry["value"] for entry in made["env"] if "value" in entry]
    assert len(caches) == 3 and all(path.startswith(writable) for path in caches)


def test_workflow() -> None:
    jsonschema = pytest.importorskip("jsonschema")  # which has no types
    vendored = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "github-workflows.json"
    schema = json.loads(vendored.read_text(encoding="utf-8"))
    workflow = json.loads(json.dumps(documents(WORKFLOW)[0]))
    assert not [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(workflow)]
    workflow["jobs"]["convert"]["steps"][0]["use"] = "actions/checkout@v4"
    assert not jsonschema.Draft7Validator(schema).is_valid(workflow), "the schema can tell"


def test_image() -> None:
    """Everything it copies is there, and the user is no root."""
    found = instructions()
    assert [kind for kind, _ in found if kind == "FROM"] == ["FROM", "FROM"]
    copied = [words for kind, text in found if kind == "COPY" and "--from" not in text for words in text.split()[:-1]]
    assert {"converters", "exporters", "recipes", "tundish", "pyproject.toml", "requirements.lock"} <= set(copied)
    assert not [name for name in copied if not (ROOT / name).exists()]
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == {
        name for name in copied if name != "./"
    }
    assert dict(found)["USER"] == "10001:10001"
    installs = [text for kind, text in found if kind == "RUN" and text.startswith("pip install")]
    assert installs and all("-c " in text and "requirements.lock" in text for text in installs)

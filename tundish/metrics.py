"""A Prometheus textfile about what commands did, for the textfile collector of node_exporter.

The file is written anew, whole or not at all, when a command ends, also where it fails. What it says of other
builds stays, and so do the time of the last success and the count of failures: one file serves many builds, as long as
they do not end at the same moment.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import UsageError
from tundish.disk import disk_errors

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_RUN = ("command", "recipe", "model")
_GATE = ("recipe", "model", "target", "gate")
# Name -> its labels and what Prometheus shows as help.
_GAUGES = {
    "tundish_last_run_timestamp_seconds": (_RUN, "When the last run ended, in seconds since 1970."),
    "tundish_last_run_duration_seconds": (_RUN, "How long the last run took."),
    "tundish_last_run_exit_status": (_RUN, "Exit status of the last run; 0 is success."),
    "tundish_last_success_timestamp_seconds": (_RUN, "When the last run that succeeded ended, in seconds since 1970."),
    "tundish_artifact_bytes": (("recipe", "model", "target"), "Size of an artifact."),
    "tundish_gate_figure": (_GATE, "What a gate measured, such as the KL divergence in nats."),
    "tundish_gate_threshold": (_GATE, "What the figure must not be above; for top1, not below."),
    "tundish_gate_passed": (_GATE, "Whether the gate was passed."),
}
_FAILURES = "tundish_failures"
_FAILURE_LABELS = (*_RUN, "status")
_OF_ARTIFACTS = [name for name, (labels, _) in _GAUGES.items() if "target" in labels]

_MEND = "Choose another --metrics."

Samples = dict[str, dict[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Run:
    """How a command ended: `ended` in seconds since 1970, `status` its exit status, `manifest` of what it built or
    verified, if it came so far."""

    command: str
    recipe: str
    model: str
    ended: float
    seconds: float
    status: int
    manifest: Mapping[str, Any] | None


def require_writable(path: Path) -> None:
    """UsageError unless metrics can be written there, to no file or one of ours: better before a build than after."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise UsageError("--metrics needs prometheus_client", mend="pip install 'tundish[metrics]'")
    if path.suffix != ".prom":
        raise UsageError("the textfile collector reads files that end in .prom", where=str(path))
    if not path.absolute().parent.is_dir():
        raise UsageError("no such folder", where=str(path.absolute().parent), mend=_MEND)
    with disk_errors(path, _MEND):
        _read(path)


def write_metrics(path: Path, runs: list[Run]) -> None:
    """Add these runs to the file. ResourceError if it cannot be written, UsageError if it is not of ours."""
    from prometheus_client import CollectorRegistry, write_to_textfile

    with disk_errors(path, _MEND):
        samples = _read(path)
        for run in runs:
            _add(samples, run)
        registry = CollectorRegistry()
        registry.register(_Samples(samples))
        write_to_textfile(str(path), registry)


@dataclass(frozen=True, slots=True, eq=False)  # registered, and so hashed, as the object it is
class _Samples:
    samples: Samples

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, (labels, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for values, sample in sorted(self.samples[name].items()):
                gauge.add_metric(values, sample)
            yield gauge
        counter = CounterMetricFamily(_FAILURES, "Runs that failed, by exit status.", labels=_FAILURE_LABELS)
        for values, sample in sorted(self.samples[_FAILURES].items()):
            counter.add_metric(values, sample)
        yield counter


def _read(path: Path) -> Samples:
    """What the file says; nothing if there is none. UsageError if it is not of ours, or no file."""
    from prometheus_client.parser import text_string_to_metric_families

    labels = {name: of for name, (of, _) in _GAUGES.items()} | {_FAILURES: _FAILURE_LABELS}
    samples: Samples = {name: {} for name in labels}
    if not os.path.lexists(path):
        return samples
    if not path.is_file():  # a pipe would be waited for
        raise UsageError("--metrics is not a file", where=str(path), mend=_MEND)
    try:
        text = path.read_text(encoding="utf-8")
        families = list(text_string_to_metric_families(text))
    except ValueError as error:
        raise _other(path, f"what is no metrics: {error}") from error
    others = [family.name for family in families if family.name.removesuffix("_total") not in labels]
    if others or (text.strip() and not families):
        raise _other(path, ", ".join(others[:3]) or "no metrics")
    for family in families:
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            if name in labels and sample.labels.keys() == {*labels[name]}:
                samples[name][tuple(sample.labels[label] for label in labels[name])] = sample.value
    return samples


def _other(path: Path, found: str) -> UsageError:
    expected = "nothing, or metrics that tundish wrote"
    return UsageError("--metrics holds another file", where=str(path), expected=expected, found=found, mend=_MEND)


def _add(samples: Samples, run: Run) -> None:
    of_run = (run.command, run.recipe, run.model)
    samples["tundish_last_run_timestamp_seconds"][of_run] = run.ended
    samples["tundish_last_run_duration_seconds"][of_run] = run.seconds
    samples["tundish_last_run_exit_status"][of_run] = run.status
    if run.status == 0:
        samples["tundish_last_success_timestamp_seconds"][of_run] = run.ended
    else:
        failures, failed = samples[_FAILURES], (*of_run, str(run.status))
        failures[failed] = failures.get(failed, 0) + 1
    if run.manifest is not None:
        for name in _OF_ARTIFACTS:
            samples[name] = {of: value for of, value in samples[name].items() if of[:2] != (run.recipe, run.model)}
        _add_artifacts(samples, run, run.manifest)


def _add_artifacts(samples: Samples, run: Run, manifest: Mapping[str, Any]) -> None:
    for target, entry in manifest["targets"].items():
        samples["tundish_artifact_bytes"][run.recipe, run.model, target] = entry["bytes"]
    for target, result in (manifest["verification"] or {}).items():
        for gate in result["gates"]:
            of_gate = (run.recipe, run.model, target, gate["name"])
            for name, part in (("figure", "figure"), ("threshold", "threshold"), ("passed", "passed")):
                if gate[part] is not None:
                    samples[f"tundish_gate_{name}"][of_gate] = float(gate[part])

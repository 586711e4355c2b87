"""Compares two sets of results of the same tasks, sample by sample. Asks no server."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoeval.endpoint.config import EndpointError
from nanoeval.endpoint.paired_statistics import compare_scores

DEFAULT_MARGIN = 0.02
# What of a sample is compared or shown, and its type.
SAMPLE_FIELDS: dict[str, Any] = {
    "id": str,
    "fingerprint": str,
    "messages": list,
    "target": object,
    "reply": str | None,
    "finish_reason": object,
    "scores": dict,
    "error": str | None,
}
# The worst verdict of several tasks is that of all.
SEVERITY = ("same", "cannot tell", "different")

Reports = Mapping[str, Mapping[str, Any]]


def load_reports(path: Path) -> dict[str, Any]:
    """The results by task in a file that `nano-eval --output` wrote. Raises EndpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EndpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise EndpointError(f"{path} is not JSON: {error}") from error
    results: Any = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not results:
        raise EndpointError(
            f'{path} holds no "results"; write one with nano-eval ... --output={path}'
        )
    for name, report in results.items():
        if not isinstance(report, dict) or "samples" not in report:
            raise EndpointError(
                f"{path}: {name} has no samples to pair; files that --output writes have them, what"
                " nano-eval prints has not"
            )
        if damage := _damage(report):
            raise EndpointError(f"{path} is damaged: {name} {damage}; write it anew with --output")
    return results


def _damage(report: Mapping[str, Any]) -> str:
    """What is wrong with the samples of a report; "" when nothing is."""
    samples = report["samples"]
    if not isinstance(samples, list):
        return f"has {type(samples).__name__} in the place of its list of samples"
    if len(samples) != report.get("num_samples", len(samples)):
        return f"has {len(samples)} of its {report['num_samples']} samples"
    for number, sample in enumerate(samples):
        if not isinstance(sample, dict):
            return f"has {type(sample).__name__} in the place of sample {number}"
        for field, kind in SAMPLE_FIELDS.items():
            if field not in sample or not isinstance(sample[field], kind):
                return f"has no usable {field} in sample {number}"
    return ""


def compare_reports(
    first: Reports, second: Reports, margin: float = DEFAULT_MARGIN, names: Sequence[str] = "AB"
) -> dict[str, Any]:
    """Compare all tasks that both have: `verdict`, `tasks` by name, `left_out`.

    Raises EndpointError where the samples or the request parameters differ, naming what does.
    """
    if not 0 < margin < 1:
        raise EndpointError(
            f"--margin={margin} must lie between 0 and 1, such as 0.02 for 2 points"
        )
    common = [name for name in first if name in second]
    if not common:
        raise EndpointError(
            f"{names[0]} has the tasks {', '.join(first)}, {names[1]} has {', '.join(second)}:"
            " nothing to pair"
        )
    for name in common:
        _check_pairable(name, first[name], second[name], names)
    tasks = {name: compare_task(first[name], second[name], margin) for name in common}
    return {
        "verdict": max((task["verdict"] for task in tasks.values()), key=SEVERITY.index),
        "names": list(names),
        "margin": margin,
        "tasks": tasks,
        "left_out": sorted({*first, *second} - {*common}),
    }


def _check_pairable(
    name: str, first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[str]
) -> None:
    differences = request_differences(first.get("request") or {}, second.get("request") or {})
    own, others = first["samples"], second["samples"]
    if first.get("samples_hash") != second.get("samples_hash") or len(own) != len(others):
        differences.append(_sample_difference(own, others))
    if differences:
        raise EndpointError(
            f"{name} in {names[0]} and {names[1]} cannot be paired: {'; '.join(differences)}"
        )


def request_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two requests, one short text each."""
    flat = [{"api": r.get("api"), **(r.get("params") or {})} for r in (first, second)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return [
        f"{name} is {_shown(flat[0], name)} and {_shown(flat[1], name)}"
        for name in names
        if any(name not in values for values in flat) or flat[0][name] != flat[1][name]
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], sort_keys=True) if name in values else "not set"


def _sample_difference(first: Sequence[Any], second: Sequence[Any]) -> str:
    if len(first) != len(second):
        return f"samples_hash differs: {len(first)} and {len(second)} samples"
    for a, b in zip(first, second, strict=True):
        if (a["id"], a["fingerprint"]) != (b["id"], b["fingerprint"]):
            what = "target" if a["messages"] == b["messages"] else "prompt"
            return f"samples_hash differs: sample {a['id']} has another {what}"
    return "samples_hash differs"


def compare_task(
    first: Mapping[str, Any], second: Mapping[str, Any], margin: float
) -> dict[str, Any]:
    """Compare two reports of one task on the samples that both answered."""
    pairs = list(zip(first["samples"], second["samples"], strict=True))
    answered = [(a, b) for a, b in pairs if a["error"] is None and b["error"] is None]
    metric = next((name for a, _ in answered for name in a["scores"]), None)
    if metric is None:
        raise EndpointError("no sample has an answer of both servers: there is nothing to compare")
    scores = [(a["scores"][metric], b["scores"][metric]) for a, b in answered]
    outcome = compare_scores([a for a, _ in scores], [b for _, b in scores], margin)
    verdict = outcome.verdict
    with_errors = None
    if len(answered) < len(pairs):
        own = [[side["scores"].get(metric, 0.0) for side in pair] for pair in pairs]
        with_errors = asdict(compare_scores([a for a, _ in own], [b for _, b in own], margin))
        # Leaving out what one server could not answer must not make two servers the same.
        if verdict == "same" and with_errors["verdict"] != "same":
            verdict = with_errors["verdict"]
    return {
        **asdict(outcome),
        "metric": metric,
        "verdict": verdict,
        "more_samples": _more(verdict, asdict(outcome), with_errors),
        "num_unanswered": len(pairs) - len(answered),
        "including_errors": with_errors,
        **_replies(answered),
        "flips": [_flip(a, b, metric) for a, b in answered if _is_flip(a, b, metric)],
        "sides": [_side(first), _side(second)],
    }


def _more(verdict: str, outcome: Mapping[str, Any], with_errors: Any) -> int | None:
    if verdict != "cannot tell":
        return None
    more: int = outcome["more_samples"] or with_errors["more_samples"]
    return more


def _replies(answered: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """How many replies are the same to the letter, and where the others part (characters)."""
    positions = [first_divergence(a["reply"] or "", b["reply"] or "") for a, b in answered]
    parted = [position for position in positions if position is not None]
    return {
        "identical_replies": 1 - len(parted) / len(positions),
        "num_identical": len(positions) - len(parted),
        "first_divergence": {
            "earliest": min(parted),
            "median": statistics.median(parted),
            "latest": max(parted),
        }
        if parted
        else None,
    }


def first_divergence(first: str, second: str) -> int | None:
    """The index of the first character that differs; None for equal texts."""
    if first == second:
        return None
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _is_flip(a: Mapping[str, Any], b: Mapping[str, Any], metric: str) -> bool:
    return bool(a["scores"][metric] != b["scores"][metric])


def _flip(a: Mapping[str, Any], b: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        "id": a["id"],
        "prompt": question_of(a["messages"]),
        "target": a["target"],
        "scores": [a["scores"][metric], b["scores"][metric]],
        "replies": [a["reply"], b["reply"]],
        "finish_reasons": [a["finish_reason"], b["finish_reason"]],
        "diverge_at": first_divergence(a["reply"] or "", b["reply"] or ""),
    }


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last message; images by their hash."""
    content = messages[-1].get("content") if messages else ""
    if isinstance(content, str):
        return content
    shown = [
        part["text"] if part.get("type") == "text" else f"[{part['image_url']['url'][:19]}]"
        for part in content or []
    ]
    return "\n".join(shown)


def _side(report: Mapping[str, Any]) -> dict[str, Any]:
    names = ("model", "metrics", "num_errors", "errors", "tokens", "latency")
    more = ("time_to_first_token", "finish_reasons", "warnings")
    server = report.get("server") or {}
    return {name: report.get(name) for name in (*names, *more)} | {
        "base_url": server.get("base_url"),
        "headers": server.get("headers"),
    }

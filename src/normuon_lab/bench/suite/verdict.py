"""What a run found, in a few sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from normuon_lab.bench.suite.states import CUT, FAILED, NOT_RUN, RUNNING, WAITING

OWN = "NorMuon"
ADAMW = "AdamW"
PREFERRED_MODEL = "llama-1.1b"


def verdict(record: Mapping[str, Any]) -> list[str]:
    """Sentences, the most important one first."""
    parts = {name: part["values"] for name, part in record["parts"].items()}
    sentences = []
    if record["dry_run"]:
        sentences.append(
            "Dry run on a CPU with tiny sizes: it shows which parts work, and no number here says "
            "anything about a GPU."
        )
    clauses = [
        *_step_clauses(parts["step"]),
        *_training_clauses(parts["training"]),
        *_tests_clauses(parts["tests"]),
    ]
    name = device_name(record)
    if clauses:
        sentences.append(f"On {name}, {'; '.join(clauses)}.")
    else:
        sentences.append(f"On {name}, nothing has been measured yet.")
    sentences.extend(_unfinished(record))
    return sentences


def device_name(record: Mapping[str, Any]) -> str:
    """The device as sentences name it."""
    if record["dry_run"]:
        return "this CPU"
    return str(record["parts"]["machine"]["values"].get("name", "this GPU"))


def entries_of(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All contenders that ran on a model; the reference of later races is left out."""
    first, *later = [race["contenders"] for race in model["races"] if race["contenders"]] or [[]]
    return [*first, *(one for contenders in later for one in contenders[1:])]


def _step_clauses(values: Mapping[str, Any]) -> Iterator[str]:
    measured = [model for model in values.get("models", ()) if entries_of(model)]
    if not measured:
        return
    model = next((one for one in measured if one["title"] == PREFERRED_MODEL), measured[0])
    first, *others = entries_of(model)
    yield f"one {first['name']} step of {model['title']} takes {first['median_ms']:.3g} ms"
    peers = [one for one in others if not one["name"].startswith((OWN, ADAMW))]
    if peers:
        fastest = min(peers, key=lambda one: one["ratio_to_first"])
        ratio = fastest["ratio_to_first"]
        yield f"the fastest peer, {fastest['name']}, takes {ratio:.2f} times that"
    for one in others:
        if one["name"].startswith(ADAMW):
            yield f"{one['name']} takes {one['ratio_to_first']:.2f} times that"


def _training_clauses(values: Mapping[str, Any]) -> Iterator[str]:
    if "overhead_percent" not in values:
        return
    percent = values["overhead_percent"]
    longer = "longer" if percent >= 0 else "shorter"
    yield (
        f"a training step of {values['parameters'] / 1e6:.3g}M parameters and "
        f"{values['tokens_per_step']:,} tokens takes {abs(percent):.1f}% {longer} than with AdamW"
    )


def _tests_clauses(values: Mapping[str, Any]) -> Iterator[str]:
    counts = values.get("counts")
    if not counts:
        return
    failed = counts.get("failed", 0) + counts.get("error", 0)
    passed = counts.get("passed", 0)
    skipped = counts.get("skipped", 0)
    yield (
        f"of {sum(counts.values())} tests, {passed} passed, {failed} failed and {skipped} were "
        "skipped"
    )


def _unfinished(record: Mapping[str, Any]) -> Iterator[str]:
    states = {name: part["status"] for name, part in record["parts"].items()}
    if record["finished"] is None:
        waiting = [name for name, state in states.items() if state in (WAITING, RUNNING)]
        if waiting:
            yield f"The run is not over, or was ended before {' and '.join(waiting)}."
    for state, words in ((FAILED, "failed"), (CUT, "ran out of time"), (NOT_RUN, "did not run")):
        names = [name for name, one in states.items() if one == state]
        if names:
            yield f"{', '.join(names)[:1].upper()}{', '.join(names)[1:]} {words}."

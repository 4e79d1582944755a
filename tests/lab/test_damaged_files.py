"""Files of ours that were damaged: each is one line that names the file, never a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from normuon_lab.atomic_files import damage_named, read_json, write_json
from normuon_lab.data.config import DataConfig
from normuon_lab.data.loading import open_data
from normuon_lab.data.prepare import PrepareRequest, prepare, verify
from normuon_lab.errors import InputError
from normuon_lab.study.compare.comparison import planned
from normuon_lab.study.compare.results import RESULTS_FILE, Results, open_results
from normuon_lab.study.evidence.runs import StoredRun, read_runs, write_run
from normuon_lab.study.search.searching import Trial
from normuon_lab.study.search.sweep import KIND as SWEEP_KIND
from normuon_lab.study.search.sweep import SweepRequest, read_tuned_arms
from normuon_lab.study.search.tune import KIND as TUNE_KIND
from normuon_lab.study.search.tune import TuneRequest
from normuon_lab.train.runs.config import Experiment
from normuon_lab.train.runs.records import RunRecord

TASK: Any = SimpleNamespace(digest="a" * 64, to_json=lambda: {"sha256": "a" * 64})
EXPERIMENT = Experiment()


def damages(contents: Any) -> Iterator[tuple[str, Any]]:
    """The contents with one entry, down to four levels, missing or of another type."""
    for place in _places(contents, ()):
        for value in (None, "x", -1.5, [], {}):
            yield f"{place} = {value!r}", _changed(contents, place, value)
        yield f"without {place}", _changed(contents, place, ...)


def _places(contents: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    entries = contents.items() if isinstance(contents, dict) else enumerate(contents[:1])
    for key, value in entries:
        if isinstance(value, dict | list) and len(place) < 3:
            yield from _places(value, (*place, key))
        else:
            yield (*place, key)


def _changed(contents: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(contents)
    around = changed
    for key in place[:-1]:
        around = around[key]
    if value is ...:
        del around[place[-1]]
    else:
        around[place[-1]] = value
    return changed


def check_damages(file: Path, read: Callable[[], object]) -> None:
    """Whatever entry of `file` is damaged, `read` gives an answer or one line; most give a line."""
    contents = json.loads(file.read_text())
    read()
    lines = []
    for label, damaged in damages(contents):
        file.write_text(json.dumps(damaged))
        try:
            read()
        except InputError as error:
            lines.append(str(error))
        except Exception as error:
            raise AssertionError(f"{label}: {error!r}") from error
    assert len(lines) > 10
    assert all(len(line.splitlines()) == 1 for line in lines)
    file.write_text(json.dumps({name: value for name, value in contents.items() if name != "kind"}))
    with pytest.raises(InputError, match="was not written by"):
        read()


def test_a_tuning_file(tmp_path: Path) -> None:
    trials = [
        Trial(place=(rate,), setting={"learning_rate": rate}, objectives={1000: loss})
        for rate, loss in ((0.1, 3.0), (0.2, 2.0), (0.4, None))
    ]
    request = TuneRequest(
        experiment=EXPERIMENT,
        arms=("adamw",),
        seeds=(1000,),
        out=tmp_path / "tuned.json",
        rates=(0.1, 0.2, 0.4),
        min_rounds=0,
        max_rounds=0,
    )
    contents = request.contents(TASK)
    contents["arms"]["adamw"] = request.arm_to_json(trials)
    write_json(request.out, contents)
    check_damages(
        request.out,
        lambda: planned(EXPERIMENT, TASK, ["adamw"], [0], {}, str(request.out)),
    )


def test_a_tuning_that_diverged_everywhere_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    arm = {"learning_rate": 0.1, "mean_final_loss": None, "trials": []}
    values = {"seeds": [1000], "config": {}, "corpus": {"sha256": ""}, "arms": {"adamw": arm}}
    write_json(file, {"kind": TUNE_KIND, "schema_version": 1, **values})
    with pytest.raises(InputError, match="every learning rate of adamw diverged; tune again"):
        planned(EXPERIMENT, TASK, ["adamw"], [0], {}, str(file))


def test_results(tmp_path: Path) -> None:
    rates = {arm: {"value": 0.01, "source": "given", "trials": []} for arm in ("adamw", "muon")}
    records = [
        RunRecord(
            arm=arm,
            seed=0,
            learning_rate=0.01,
            num_parameters=5,
            steps=10,
            eval_steps=[0, 10],
            eval_losses=[5.0, 2.0],
            eval_seconds=[0.0, 1.0],
            train_losses=[5.0, 4.0],
            final_loss=2.0,
        )
        for arm in rates
    ]
    config = {"arms": list(rates), "seeds": [0], "training": {"steps": 10}}
    results = Results(
        config=config,
        corpus=TASK.to_json(),
        learning_rates=rates,
        machine={},
        created="2026-01-01T00:00:00+00:00",
        records=records,
    )
    write_json(tmp_path / RESULTS_FILE, results.to_json())
    check_damages(
        tmp_path / RESULTS_FILE, lambda: open_results(tmp_path, results, resume=True).to_json()
    )


def test_the_manifest_of_a_prepared_folder(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 200)
    config = DataConfig(source=(str(text),), processes=1)
    request = PrepareRequest(config=config, out=tmp_path / "data")
    prepare(request)
    prepared = DataConfig(source=(str(request.out),))

    def read() -> None:
        verify(request.out)
        open_data(prepared, sequence_length=8, seed=0)
        prepare(request)

    check_damages(request.out / "manifest.json", read)


def test_a_sweep_that_goes_on(tmp_path: Path) -> None:
    request = SweepRequest(
        name="sweep",
        experiment=EXPERIMENT,
        arms=("adamw",),
        axes=("learning_rate",),
        seeds=(1000,),
        min_trials=1,
        max_trials=1,
        storage=tmp_path / "sweep.db",
        out=tmp_path / "sweep.json",
    )
    trial = request.setting("adamw", (1.0,))
    contents = request.contents(TASK)
    assert contents["kind"] == SWEEP_KIND
    contents["arms"]["adamw"] = request.arm_to_json(
        [Trial(place=(1.0,), setting=trial, objectives={1000: 2.0})]
    )
    write_json(request.out, contents)

    def read() -> None:
        request.contents(TASK)
        read_tuned_arms(request.out)

    check_damages(request.out, read)


def test_a_published_run(tmp_path: Path) -> None:
    record = RunRecord(arm="muon", seed=2, learning_rate=1.0, num_parameters=1, steps=9)
    run = StoredRun(cell="bytes", purpose="claim", record=record)
    write_run(tmp_path, run, {"machine": {}, "corpus": {"sha256": "a"}})
    check_damages(tmp_path / run.path, lambda: read_runs(tmp_path, "bytes"))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b'{"kind": NaN}', b"\xff\xfe", b'{"kind": 1' + b"0" * 5000 + b"}"],
)
def test_what_is_no_json_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.json is not valid JSON$"):
        read_json(tmp_path / "file.json", kind="x", schema_version=1)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(b'\xef\xbb\xbf{"kind": "x",\r\n "schema_version": 1}\r\n')
    assert read_json(file, kind="x", schema_version=1)["kind"] == "x"


def test_only_errors_over_contents_are_damage() -> None:
    with (
        pytest.raises(InputError, match=r"^a\.json is damaged: KeyError: 'arms'$"),
        damage_named("a.json"),
    ):
        {}["arms"]
    with pytest.raises(KeyboardInterrupt), damage_named("a.json"):
        raise KeyboardInterrupt
    with pytest.raises(InputError, match=r"^as it was$"), damage_named("a.json"):
        raise InputError("as it was")

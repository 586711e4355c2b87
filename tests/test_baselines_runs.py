"""Whole baselines and suites on tiny checkpoints: reports, repeats, kills, failures."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanoeval.baselines import run_hellaswag, run_mmlu, suite
from nanoeval.baselines.config import ConfigError
from nanoeval.baselines.report import ReportError
from nanoeval.evals import mmlu
from nanoeval.evals._datasets import DatasetError
from nanoeval.models.hf import CheckpointError
from tests import tiny_models

INSTALL = 'pip install "nanoeval[hf]"'
for module in ("yaml", "matplotlib", "PIL", "torch", "transformers"):
    pytest.importorskip(module, reason=INSTALL)

# torch and transformers warn of their own affairs.
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("default")]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REAL_DATA = Path(__file__).resolve().parents[2] / "shared/data"
COUNT = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    torch.set_num_threads(1)  # tiny models lose more to waiting than they gain
    return str(tiny_models.make_text_model(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_vision_model(tmp_path_factory.mktemp("vision")))


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(tmp_path / "data"))
    return tiny_models.make_data(tmp_path / "data", COUNT)


def config(folder: Path, checkpoint: str, task: str = "mmlu", **changes: Any) -> dict[str, Any]:
    subjects = {"subjects": list(tiny_models.SUBJECTS)} if task == "mmlu" else {}
    sees = task in ("mmmu_pro", "textvqa", "mme")
    return {
        "task": task,
        "model": {"model_id": checkpoint, "device": "cpu", "is_vlm": sees},
        "report": {"output_dir": str(folder)},
        "dataset": subjects,
        **changes,
    }


def write(path: Path, data: Any) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(data))
    return path


def program(module: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", f"nanoeval.baselines.{module}"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=55, check=False
    )


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def has_bars(path: Path) -> bool:
    import numpy as np
    from PIL import Image

    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    return bool(((pixels[:, :, 0] < 90) & (pixels[:, :, 2] > 140)).sum() > 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "strategy", "gold", "allowed"),
    [
        ("mmlu", "rank_ll", "ABCDAB", "ABCD"),
        ("mmlu", "gen_letter", "ABCDAB", "ABCD?"),
        ("hellaswag", "rank_ll", "ABCDAB", "ABCD"),
        ("mmmu_pro", "rank_ll", "ABCDAB", "ABCDEFGHIJ"),
        ("mmmu_pro", "gen_letter", "ABCDAB", "ABCDEFGHIJ?"),
        ("textvqa", "gen_answer", ["go"] * 6, None),
        ("mme", "rank_ll", ["Yes", "No"] * 3, ["Yes", "No"]),
        ("mme", "gen_answer", ["Yes", "No"] * 3, ["Yes", "No", "?"]),
    ],
)
def test_every_task_and_strategy_runs_as_a_program(
    task: str,
    strategy: str,
    gold: Any,
    allowed: Any,
    tmp_path: Path,
    checkpoint: str,
    vision_checkpoint: str,
) -> None:
    """Scripts downstream read these files by these names, keys and orders."""
    sees = task in ("mmmu_pro", "textvqa", "mme")
    asked = config(
        tmp_path / "out",
        vision_checkpoint if sees else checkpoint,
        task,
        scoring={"strategy": strategy},
    )
    path = write(tmp_path / "c.yaml", asked)
    ended = program(f"run_{task}", NANOEVAL_CONFIG=str(path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = predictions(tmp_path / "out")
    assert [row["gold"] for row in rows][:COUNT] == list(gold)
    assert [row["index"] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert {"task", "subject", "id", "gold", "predicted", "correct"} <= set(row)
        assert allowed is None or row["predicted"] in allowed
        if strategy == "rank_ll":
            best = max(range(len(row["scores"])), key=lambda i: row["scores"][i])
            labels = ["Yes", "No"] if task == "mme" else "ABCDEFGHIJ"
            assert row["predicted"] == labels[best]
        else:
            assert isinstance(row["reply"], str)
    summary = summary_of(tmp_path / "out")
    if task != "textvqa":
        assert summary["accuracy"] == pytest.approx(sum(r["correct"] for r in rows) / len(rows))
    assert summary["total_examples"] == len(rows) == (2 * COUNT if task == "mmlu" else COUNT)
    assert summary["scoring"]["strategy"] == strategy
    assert (summary["seed"], summary["device"], summary["dtype"]) == (123, "cpu", "float32")
    assert len(summary["samples_hash"]) == 64
    assert {"torch", "transformers", "nanoeval"} <= set(summary["library_versions"])
    with (tmp_path / "out/metrics.csv").open() as file:
        table = list(csv.reader(file))
    assert table[:2] == [["label", "value"], ["accuracy", str(summary["accuracy"])]]
    assert has_bars(tmp_path / "out/accuracy.png") or summary["accuracy"] == 0
    if task == "mmlu":
        own = list(summary["per_subject"].values())
        assert summary["macro_accuracy"] == pytest.approx(sum(own) / 2)
        assert summary["micro_accuracy"] == summary["accuracy"]


def test_two_runs_write_the_same_bytes(tmp_path: Path, checkpoint: str) -> None:
    """Numbers that change by themselves cannot be compared over years."""
    for name, concurrency in (("one", 64), ("two", 3)):
        asked = config(tmp_path / name, checkpoint, runner={"concurrency": concurrency})
        run_mmlu.run(asked)
    for name in ("predictions.jsonl", "summary.json", "metrics.csv"):
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_normalizing_divides_by_the_number_of_tokens(tmp_path: Path, checkpoint: str) -> None:
    """Sums favour short endings; who asks for means must get them."""
    from transformers import AutoTokenizer

    for name, by_length in (("sum", False), ("mean", True)):
        scoring = {"strategy": "rank_ll", "normalize_by_length": by_length}
        run_hellaswag.run(config(tmp_path / name, checkpoint, "hellaswag", scoring=scoring))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    endings = tiny_models.hellaswag_row(0)["endings"]
    lengths = [len(tokenizer.encode(f" {e}", add_special_tokens=False)) for e in endings]
    sums, means = (predictions(tmp_path / name)[0]["scores"] for name in ("sum", "mean"))
    assert means == pytest.approx([s / n for s, n in zip(sums, lengths, strict=True)])


@pytest.fixture
def slow_model(tmp_path: Path) -> dict[str, str]:
    """Variables under which every batch of a program takes a while, so that it can be killed."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import time\n"
        "from nanoeval.models import _hf_batching as b\n"
        "run = b.DeviceThread._run\n"
        "def slowly(self, batch):\n"
        "    time.sleep(0.4)\n"
        "    run(self, batch)\n"
        "b.DeviceThread._run = slowly\n"
    )
    package = str(Path(tiny_models.__file__).resolve().parents[1])
    return {"PYTHONPATH": f"{folder}{os.pathsep}{package}"}


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_by_the_same_command(
    tmp_path: Path, checkpoint: str, data: Path, slow_model: dict[str, str]
) -> None:
    """Half a day of GPU time is lost, or counted twice, if a kill means another beginning."""
    tiny_models.make_data(data, 20)
    model = {"model_id": checkpoint, "device": "cpu", "batch_size": 2}
    whole = config(tmp_path / "whole", checkpoint, model=model)
    run_mmlu.run(whole)
    path = write(tmp_path / "c.yaml", config(tmp_path / "out", checkpoint, model=model))
    environment = {**os.environ, **slow_model, "OMP_NUM_THREADS": "1", "NANOEVAL_CONFIG": str(path)}
    command = [sys.executable, "-m", "nanoeval.baselines.run_mmlu"]
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    places = os.environ["NANOEVAL_DATABASE_DIR"], str(tmp_path / "out")
    deadline = time.monotonic() + 40
    while num_done(*places) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = num_done(*places)
    assert 5 <= before < 40, "killed halfway"
    assert not (tmp_path / "out/summary.json").exists()
    run_mmlu.run_from_yaml(path)
    assert predictions(tmp_path / "out") == predictions(tmp_path / "whole")
    assert summary_of(tmp_path / "out") == summary_of(tmp_path / "whole")


def num_done(folder: str, name: str) -> int:
    """Finished rollouts of the run set that the report's folder says is unfinished."""
    import sqlite3

    try:
        run_set_id = json.loads((Path(name) / ".unfinished_run.json").read_text())["run_set_id"]
        with sqlite3.connect(f"file:{folder}/{run_set_id}.db?mode=ro", uri=True) as db:
            [[done]] = db.execute("SELECT coalesce(sum(num_scored), 0) FROM eval")
    except (OSError, ValueError, sqlite3.Error):
        return 0
    return int(done)


@pytest.mark.slow
def test_the_smoke_suite_runs_as_a_program(tmp_path: Path, checkpoint: str) -> None:
    """The suite that people try first, with another checkpoint and folder."""
    import yaml

    smoke = yaml.safe_load((EXAMPLES / "suites/suite_smoke.yaml").read_text())
    smoke["model"]["model_id"] = checkpoint
    smoke["output_dir"] = str(tmp_path / "out")
    path = write(tmp_path / "suite.yaml", smoke)
    ended = program("suite", NANOEVAL_SUITE=str(path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    summary = json.loads((tmp_path / "out/suite_summary.json").read_text())
    assert [entry["status"] for entry in summary["tasks"]] == ["done"] * 3
    assert summary["model_loads"] == 1, "all tasks share one model"
    for entry in summary["tasks"]:
        own = summary_of(tmp_path / "out" / entry["name"])
        assert own == {k: v for k, v in entry["summary"].items() if k != "run_id"}
    table = (tmp_path / "out/suite_table.md").read_text()
    assert table.startswith("| Model | MMLU | HellaSwag | mmlu_letter |")
    assert has_bars(tmp_path / "out/suite.png")


def test_a_failing_task_does_not_lose_the_others(
    tmp_path: Path, checkpoint: str, data: Path
) -> None:
    """The last task of a night's suite must not take the first nine with it."""
    bad = [{**tiny_models.hellaswag_row(0), "label": "7"}]
    tiny_models.write_rows(data / "Rowan/hellaswag/default", "validation", bad)
    asked = {
        "output_dir": str(tmp_path / "out"),
        "model": {"model_id": checkpoint, "device": "cpu"},
        "tasks": [
            {"task": "hellaswag"},
            {"task": "mmlu", "dataset": {"subjects": ["anatomy"]}},
            {
                "task": "mmlu",
                "name": "elsewhere",
                "model": {"model_id": str(tmp_path / "gone/x/y")},
            },
        ],
    }
    summary = suite.run(asked)
    assert [entry["status"] for entry in summary["tasks"]] == ["failed", "done", "failed"]
    assert "example 100 has the gold label '7'" in summary["tasks"][0]["error"]
    assert "no such folder" in summary["tasks"][2]["error"]
    assert summary["num_failed"] == 2
    table = (tmp_path / "out/suite_table.md").read_text()
    assert "| failed |" in table
    assert summary_of(tmp_path / "out/mmlu")["total_examples"] == COUNT


def test_bad_input_is_told_before_the_model_is_loaded(
    tmp_path: Path, checkpoint: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of loading, and then "no such subject"."""
    from nanoeval.models import _hf_loading

    def loaded(*arguments: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(_hf_loading, "load", loaded)
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="holds no weights"):
        run_mmlu.run(config(out, str(empty)))
    with pytest.raises(CheckpointError, match="takes no images"):
        run_mmlu.run(config(out, checkpoint, "mmmu_pro"))
    with pytest.raises(ConfigError, match="config: scoring.strategy: hellaswag cannot do"):
        run_mmlu.run(config(out, checkpoint, "hellaswag", scoring={"strategy": "gen_letter"}))
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="output_dir: cannot write to"):
        run_mmlu.run(config(tmp_path / "file" / "out", checkpoint))
    with pytest.raises(DatasetError, match="no validation.jsonl"):
        run_mmlu.run(config(out, checkpoint, dataset={"split": "validation"}))
    for bad, message in (
        ({"choices": []}, "example anatomy.1 has no options"),
        ({"answer": 9}, "example anatomy.1 has the gold label 9"),
    ):
        rows = [tiny_models.mmlu_row(0), {**tiny_models.mmlu_row(1), **bad}]
        tiny_models.write_rows(data / "cais/mmlu/anatomy", "test", rows)
        with pytest.raises(DatasetError, match=message):
            run_mmlu.run(config(out, checkpoint))


@pytest.mark.parametrize(
    ("module", "variables", "message"),
    [
        ("run_mmlu", {}, "NANOEVAL_CONFIG is not set"),
        ("suite", {}, "NANOEVAL_SUITE is not set"),
        ("run_mmlu", {"NANOEVAL_CONFIG": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        (
            "run_mmlu",
            {"NANOEVAL_CONFIG": str(EXAMPLES / "configs/hellaswag_smolvlm.yaml")},
            "task: is hellaswag; run it with python -m nanoeval.baselines.run_hellaswag",
        ),
    ],
)
def test_programs_tell_a_mistake_in_one_line(
    module: str, variables: dict[str, str], message: str
) -> None:
    """A traceback hides what to do."""
    ended = program(module, **variables)
    assert ended.returncode == 1
    [line] = ended.stderr.strip().splitlines()
    assert line.startswith("nanoeval: ")
    assert message in line


def test_the_same_yaml_runs_against_a_server(tmp_path: Path) -> None:
    """One configuration for the checkpoint and for the server that serves it."""
    from nanoeval.testing.server import ScriptedServer

    with ScriptedServer("The answer is B.") as server:
        model = {"base_url": server.base_url, "model": "scripted"}
        asked = config(tmp_path / "out", "", model=model, scoring={"strategy": "gen_letter"})
        summary = run_mmlu.run(asked)
    rows = predictions(tmp_path / "out")
    assert {row["predicted"] for row in rows} == {"B"}
    assert summary["accuracy"] == pytest.approx(4 / 12)
    assert (summary["model_id"], summary["base_url"]) == ("scripted", model["base_url"])


def test_a_run_without_any_score_says_why_and_can_be_repeated(tmp_path: Path) -> None:
    """A traceback of the chart would hide that the server is down, and come again for ever."""
    from nanoeval.testing.server import ScriptedServer

    with ScriptedServer("The answer is B.") as server:
        model = {"base_url": server.base_url, "model": "scripted"}
    asked = config(
        tmp_path / "out", "", model=model, scoring={"strategy": "gen_letter"},
        runner={"max_retries": 0},
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(RuntimeError, match="none of 12 examples .*cannot reach"):
            run_mmlu.run(asked)
    assert summary_of(tmp_path / "out")["num_failed"] == 12
    assert "cannot reach" in predictions(tmp_path / "out")[0]["error"]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_whole_of_mmlu_takes_less_than_five_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14,042 questions must not need a cluster to be asked of a tiny model."""
    if not (REAL_DATA / "cais/mmlu").is_dir():
        pytest.skip(f"needs the MMLU test split in {REAL_DATA}/cais/mmlu/<subject>/test.jsonl")
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(REAL_DATA))
    corpus = [mmlu.prompt(row) for row in mmlu.load()[::7]]
    checkpoint = tiny_models.make_text_model(tmp_path / "model", corpus, 2000, 1024)
    asked = config(tmp_path / "out", str(checkpoint), dataset={})
    path = write(tmp_path / "c.yaml", asked)
    environment = {
        **os.environ,
        "NANOEVAL_CONFIG": str(path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "nanoeval.baselines.run_mmlu"]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    summary = summary_of(tmp_path / "out")
    assert summary["total_examples"] == 14_042
    assert len(summary["per_subject"]) == 57
    assert has_bars(tmp_path / "out/accuracy.png")

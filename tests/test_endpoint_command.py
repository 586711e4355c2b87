"""The command `nano-eval` against the real scripted server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanoeval.endpoint import TASKS, APIConfig, run_task
from nanoeval.endpoint.cli import main
from nanoeval.endpoint.config import EndpointError, parse_pairs
from nanoeval.endpoint.server import find_url
from nanoeval.evals import gsm8k_cot_llama
from nanoeval.testing import Fault, Reply, Request, ScriptedServer

TASK = "gsm8k_cot_llama"
KEY = "sk-very-secret"
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve small problems, whose n-th answer is n, and folders of the test's own."""
    folder = tmp_path / "data" / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": f"What is {n} + 0?", "answer": f"It is {n}.\n#### {n}"} for n in range(12)]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(tmp_path / "data"))
    for name in ("DATABASE_DIR", "LOG_DIR", "ROOT_DIR"):
        (tmp_path / name).mkdir(mode=0o700)
        monkeypatch.setenv(f"NANOEVAL_{name}", str(tmp_path / name))
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def number_in(request: Request) -> int:
    """The n of "What is n + 0?"; the probe's question counts as -1."""
    _, found, rest = request.prompt.rpartition("What is ")
    return int(rest.split()[0]) if found else -1


def right(request: Request) -> str:
    return f"The final answer is {number_in(request)}"


def right_below(limit: int) -> Callable[[Request], str]:
    return lambda request: right(request) if number_in(request) < limit else "I am lost"


class Command:
    """Runs the command in this process and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, server: ScriptedServer | None, *arguments: str) -> int:
        where = [] if server is None else [f"--base_url={server.base_url}"]
        status = main(["--tasks", TASK, *where, *arguments])
        self.out, self.err = self._capsys.readouterr()
        return status

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["results"][TASK]
        return found

    def error_line(self) -> str:
        """The one line of an error; anything beside it fails the test."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("nano-eval: error")]
        assert len(lines) == 1, self.err
        assert self.out == ""
        return lines[0]


@pytest.fixture
def nano_eval(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_results_are_one_json_object_on_stdout(nano_eval: Command, workplace: Path) -> None:
    """Scripts that read the output would break on anything else."""
    with ScriptedServer(right_below(9), models=["llama-3"]) as server:
        status = nano_eval(
            server, "--max-samples=10", "--output", "results.json", "--seed", "42",
            "--gen_kwargs", "top_p=0.5,stop=[\"a,b\",\"c\"],greedy=true,tag=x",
        )  # fmt: skip
        sent = server.requests[-1].body
    assert status == 0
    assert nano_eval.result["metrics"]["exact_match"] == 0.9
    assert nano_eval.result["metrics"]["strict_match"] == 0.9
    assert nano_eval.result["metrics"]["exact_match_stderr"] == pytest.approx(0.1)
    assert nano_eval.result["num_samples"] == 10
    assert nano_eval.result["elapsed"] > 0
    assert nano_eval.json["config"]["model"] == "llama-3"
    assert nano_eval.json["config"]["max_samples"] == 10
    assert nano_eval.json["total_seconds"] >= nano_eval.result["elapsed"]
    assert nano_eval.result["server"]["headers"] == {"server": "nanoeval-scripted"}
    assert nano_eval.result["server"]["models"] == ["llama-3"]
    assert len(nano_eval.result["samples_hash"]) == 64
    assert re.search(r"exact_match +0\.9000 +0\.1000 +10/10", nano_eval.err)
    assert (sent["top_p"], sent["stop"], sent["greedy"]) == (0.5, ["a,b", "c"], True)
    assert (sent["tag"], sent["seed"], sent["temperature"]) == ("x", 42, 0)
    sample = json.loads((workplace / "results.json").read_text())["results"][TASK]["samples"][3]
    assert sample["reply"] == "The final answer is 3"
    assert sample["scores"] == {"exact_match": 1.0, "strict_match": 1.0, "flexible_extract": 1.0}
    assert sample["messages"][-1]["content"].endswith("What is 3 + 0?")
    assert (sample["finish_reason"], sample["tries"], sample["status"]) == ("stop", 1, 200)
    assert sample["usage"]["completion_tokens"] > 0
    assert sample["latency"] > 0


def test_check_is_an_ordinary_run_with_records(nano_eval: Command, workplace: Path) -> None:
    """Without records there is nothing to look at afterwards."""
    with ScriptedServer(right) as server:
        assert nano_eval(server, "--run_set_id=mine") == 0
    assert (workplace / "DATABASE_DIR" / "mine.db").is_file()
    [file] = (workplace / "LOG_DIR").iterdir()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    samplings = [record for record in records if record["record_type"] == "sampling"]
    assert len(samplings) == 12
    assert samplings[0]["usage"]["prompt_tokens"] > 0
    assert {record["record_type"] for record in records} >= {"match", "final_report"}
    assert len({record["sample_id"] for record in samplings}) == 12


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model_args", "model=a,base_url={url},num_concurrent=2"),
        ("--model-args=model=a,base_url={url}", "--num-concurrent=2"),
        ("--base-url={url}/chat/completions", "--model", "a", "--num_concurrent", "2"),
    ],
)
def test_settings_come_by_option_or_model_args(
    nano_eval: Command, arguments: Sequence[str]
) -> None:
    """Command lines written for the harness's style should work."""
    with ScriptedServer(right, models=["a", "b"], latency=0.02) as server:
        filled = [argument.replace("{url}", server.base_url) for argument in arguments]
        assert nano_eval(None, *filled) == 0
        assert server.max_in_flight == 2
    assert nano_eval.json["config"]["model"] == "a"
    assert nano_eval.json["config"]["num_concurrent"] == 2


def test_server_is_found_by_variable_and_by_port(
    nano_eval: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People who serve on the usual port should not have to say so."""
    with ScriptedServer(right, api_key=KEY) as server:
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        assert asyncio.run(find_url([1, server.port])) == f"http://localhost:{server.port}/v1"
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert nano_eval(None) == 0
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(EndpointError, match="none answers on this host at port 1"):
        asyncio.run(find_url([1]))


def test_key_is_used_and_kept_nowhere(
    nano_eval: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in a results file gets published with it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ScriptedServer(right, api_key=KEY) as server:
        assert nano_eval(server, "--output=results.json") == 0
        monkeypatch.delenv("OPENAI_API_KEY")
        assert nano_eval(server, f"--model_args=api_key={KEY}") == 0
        kept = nano_eval.out + nano_eval.err
        command = [sys.executable, "-m", "nanoeval.endpoint.cli", f"--model_args=api_key={KEY}"]
        command += ["--tasks", TASK, f"--base_url={server.base_url}", "--max_samples=1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept += done.stdout + done.stderr
    files = [file for file in workplace.rglob("*") if file.is_file()]
    assert len(files) >= 5
    assert all(KEY.encode() not in file.read_bytes() for file in files)
    assert KEY not in kept


def test_threshold_decides_the_status(nano_eval: Command) -> None:
    """A gate in a pipeline rests on it."""
    with ScriptedServer(right_below(9)) as server:
        assert nano_eval(server, "--min", "exact_match=0.75") == 0
        assert nano_eval(server, "--min", f"{TASK}.exact_match=0.8,strict_match=0.1") == 1
        assert "exact_match is 0.7500, wanted at least 0.8" in nano_eval.err
        assert nano_eval.result["metrics"]["exact_match"] == 0.75
        assert nano_eval(server, "--min=accuracy=0.5") == 3
        assert "exact_match, strict_match, flexible_extract" in nano_eval.error_line()


def test_samples_without_an_answer_are_counted_and_said(nano_eval: Command) -> None:
    """Dropping failed requests would flatter a broken server."""

    def faults(request: Request) -> Fault | None:
        return {1: Fault("500"), 2: Fault("400"), 3: Fault("cut")}.get(number_in(request))

    with ScriptedServer(right, faults=[faults]) as server:
        assert nano_eval(server, "--max_tries=2", "--output=r.json") == 2
        tries = [number_in(request) for request in server.requests]
    # The runner tries once more what the client gave up; what is refused is asked once.
    assert (tries.count(1), tries.count(2), tries.count(3)) == (4, 1, 4)
    assert nano_eval.result["num_errors"] == 3
    assert nano_eval.result["errors"] == {"http_500": 1, "http_400": 1, "cut": 1}
    assert nano_eval.result["metrics"]["exact_match"] == 1.0
    assert nano_eval.result["accuracy_including_errors"] == 0.75
    assert "3 of 12 samples have no answer" in nano_eval.err
    samples = json.loads(Path("r.json").read_text())["results"][TASK]["samples"]
    assert [sample["tries"] for sample in samples[:4]] == [1, 4, 1, 4]
    failed = samples[2]
    assert (failed["error"], failed["status"], failed["reply"]) == ("http_400", 400, None)
    assert "HTTP 400" in failed["error_message"]


def test_replies_that_stop_for_length_are_warned_about(nano_eval: Command) -> None:
    """A score that is about max_tokens is no score of the server."""
    with ScriptedServer(lambda request: Reply(right(request), finish_reason="length")) as server:
        assert nano_eval(server) == 0
    assert "12 of 12 replies stopped for length" in nano_eval.err
    assert nano_eval.result["finish_reasons"] == {"length": 12}


def test_streaming_gives_time_to_first_token(nano_eval: Command) -> None:
    """The figure that people tune servers for."""
    with ScriptedServer(right, time_per_token=0.01) as server:
        assert nano_eval(server, "--stream") == 0
    first, whole = nano_eval.result["time_to_first_token"], nano_eval.result["latency"]
    assert 0 < first["p50"] < whole["p50"]
    assert nano_eval.result["tokens"]["num_without_usage"] == 0
    with ScriptedServer(right, refuses=["stream_options"]) as server:
        assert nano_eval(server, "--stream") == 0
    assert "no token counts when streaming" in nano_eval.err
    assert nano_eval.result["tokens"]["completion"] is None


def test_plain_completions_work(nano_eval: Command) -> None:
    """Base models have no chat endpoint."""
    with ScriptedServer(right) as server:
        assert nano_eval(server, "--api=completions") == 0
        assert server.requests[-1].api == "completions"
    assert nano_eval.result["metrics"]["exact_match"] == 1.0


def test_auto_concurrency_ends_and_says_so(nano_eval: Command) -> None:
    """auto must not hang, with or without 429s."""
    with ScriptedServer(
        right, latency=0.01, faults=[Fault("429", rate=0.2, retry_after=0.02)]
    ) as s:
        assert nano_eval(s, "--num_concurrent=auto") == 0
    assert nano_eval.json["config"]["num_concurrent"] == "auto"
    assert nano_eval.result["num_errors"] == 0


# What bad input gets: one clear line, the status, no traceback.


def test_unreachable_server_is_named(nano_eval: Command) -> None:
    """The commonest mistake of all."""
    assert nano_eval(None, "--base_url=http://127.0.0.1:9/v1") == 3
    assert "http://127.0.0.1:9/v1/models" in nano_eval.error_line()
    assert "is the server up" in nano_eval.err


def test_wrong_key_is_named(nano_eval: Command) -> None:
    """A 401 must say which variable to set."""
    with ScriptedServer(right, api_key=KEY) as server:
        assert nano_eval(server, "--model_args=api_key=sk-other") == 3
        assert "HTTP 401" in nano_eval.error_line()
        assert "OPENAI_API_KEY" in nano_eval.err
        assert "sk-other" not in nano_eval.err


def test_unknown_model_and_several_models_list_what_is_served(nano_eval: Command) -> None:
    """Guessing a model would check the wrong one."""
    with ScriptedServer(right, models=["llama-3", "qwen"]) as server:
        assert nano_eval(server, "--model=lama-3") == 3
        assert "llama-3, qwen (the nearest: llama-3), not 'lama-3'" in nano_eval.error_line()
        assert nano_eval(server) == 3
        assert "serves 2 models: llama-3, qwen; choose with --model" in nano_eval.error_line()


def test_server_without_a_list_of_models_is_met(nano_eval: Command) -> None:
    """Some servers answer /v1/models with an error and yet serve."""
    with ScriptedServer(right, models=["a"], models_fault="500") as server:
        assert nano_eval(server) == 3
        assert "name one with --model" in nano_eval.error_line()
        assert nano_eval(server, "--model=a") == 0
    assert "does not list its models" in nano_eval.err


def test_missing_data_says_which_folder_to_fill(
    nano_eval: Command, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    """On a cluster without internet people need the path."""
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(workplace / "empty"))
    with ScriptedServer(right) as server:
        assert nano_eval(server) == 3
    assert str(workplace / "empty" / "openai" / "gsm8k" / "main") in nano_eval.error_line()
    assert "NANOEVAL_DATASETS_DIR" in nano_eval.err


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        ("no_usage", 0, "replies come without token counts"),
        ("null_content", 0, "replies have no text"),
        ("empty_choices", 2, "no_choices: 12"),
        ("malformed", 2, "not_json: 12"),
        ("error_body", 2, "error_reply: 12"),
        ("disconnect", 2, "cut: 12"),
    ],
)
def test_odd_replies_are_said(nano_eval: Command, fault: str, status: int, line: str) -> None:
    """A reply that cannot be read must be neither a crash nor a wrong answer."""

    def after_probe(request: Request) -> Fault | None:
        return Fault(fault) if number_in(request) >= 0 else None

    with ScriptedServer(right, faults=[after_probe]) as server:
        assert nano_eval(server, "--max_tries=1") == status
    assert line in nano_eval.err
    assert "Traceback" not in nano_eval.err
    assert nano_eval.result["num_errors"] == (12 if status else 0)


def test_server_that_cannot_answer_at_all_is_found_by_the_probe(nano_eval: Command) -> None:
    """A thousand failures in a row are one failure, known at once."""
    with ScriptedServer(right, faults=["empty_choices"]) as server:
        assert nano_eval(server, "--max_tries=1") == 3
        assert server.num_requests == 1
    assert "the reply holds no choices" in nano_eval.error_line()
    with ScriptedServer(right, refuses=["logit_bias"]) as server:
        assert nano_eval(server, "--gen_kwargs=logit_bias=1") == 3
    assert "HTTP 400" in nano_eval.error_line()
    assert "logit_bias" in nano_eval.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tasks=gsm8k_cot_lama"], "the nearest: gsm8k_cot_llama"),
        (["--output=no/such/folder/x.json"], "no/such/folder does not exist"),
        (["--output=."], "is a folder"),
        (["--max_samples=0"], "'0' must be a number from 1 on"),
        (["--num_concurrent=many"], "num_concurrent='many'"),
        (["--gen_kwargs=temperature"], "'temperature' is not name=value"),
        (["--model_args=modle=x"], "'modle' is not known; use model, base_url"),
        (["--timeout=0"], "timeout=0.0 must be a number above 0"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--base_url=localhost:8000"], "must be a full address"),
        (["--html=x.html"], "need --against=URL"),
        (["--timeout=inf"], "timeout=inf must be a number above 0"),
        (["--model_args=max_tries=1.5"], "max_tries=1.5 must be a whole number"),
        (["--model_args=stream=no"], "stream='no' must be true or false"),
        (["--model_args=api=[1]"], "api=[1] is not known"),
        (["--min=exact_match=nan"], "is not METRIC=VALUE"),
        (["--seed=2", "--gen_kwargs=seed=1", "--base_url=http://127.0.0.1:9"], "contradict"),
        (["--gen_kwargs=stop=[a,temperature=0.7"], "--gen_kwargs: a bracket has no partner"),
        (["--gen_kwargs=stop=],temperature=0.7"], "--gen_kwargs: a bracket has no partner"),
        (['--gen_kwargs=stop="a,temperature=0.7'], "--gen_kwargs: a double quote has no partner"),
        (["--run_set_id=a/b"], "'a/b' must be a name without slashes"),
        (["--run_set_id="], "'' must be a name without slashes"),
        (["--tasks=:Foo"], "task ':Foo': write it as module:Class"),
        (["--tasks=.a:Foo"], "task '.a:Foo': write it as module:Class"),
        (["--base_url=http://me:hidden@127.0.0.1:9/v1"], "put them into ~/.netrc"),
        (["--against=http://me:hidden@127.0.0.1:9/v1"], "put them into ~/.netrc"),
    ],
)
def test_bad_argument_is_one_line(nano_eval: Command, arguments: list[str], line: str) -> None:
    """A typing error should cost one second, not a run."""
    assert nano_eval(None, *arguments) == 3
    assert line in nano_eval.error_line()
    assert "hidden" not in nano_eval.err


def test_refused_key_in_the_middle_keeps_what_is_there(nano_eval: Command) -> None:
    """A key that expires at sample 900 must not cost the 899 before."""

    def expired(request: Request) -> Fault | None:
        return Fault("401") if number_in(request) == 7 else None

    with ScriptedServer(right, faults=[expired]) as server:
        assert nano_eval(server, "--num_concurrent=1", "--run_set_id=kept") == 3
        line = nano_eval.error_line()
    assert "HTTP 401" in line
    assert "nano-eval --tasks gsm8k_cot_llama" in line
    with ScriptedServer(right, port=server_port(line)) as server:
        assert nano_eval(server, "--num_concurrent=1", "--run_set_id=kept") == 0
        asked = {number_in(request) for request in server.requests}
    assert asked == {-1, 7, 8, 9, 10, 11}
    assert nano_eval.result["num_samples"] == 12


def server_port(line: str) -> int:
    return int(line.partition("127.0.0.1:")[2].partition("/")[0])


def test_other_arguments_do_not_go_on_with_a_run(nano_eval: Command) -> None:
    """Half the samples at one temperature and half at another are no result."""
    with ScriptedServer(right) as server:
        assert nano_eval(server, "--run_set_id=x") == 0
        assert nano_eval(server, "--run_set_id=x", "--gen_kwargs=temperature=1") == 3
        assert "other request parameters" in nano_eval.error_line()


def test_ctrl_c_keeps_results_and_prints_how_to_go_on(workplace: Path) -> None:
    """A night's work would be lost to one key."""
    with ScriptedServer(right, latency=lambda r: 0.05 if number_in(r) < 6 else 30) as server:
        arguments = ["--tasks", TASK, f"--base_url={server.base_url}", "--num_concurrent=3"]
        process = subprocess.Popen(
            [sys.executable, "-m", "nanoeval.endpoint.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 40
        while server.num_replies < 7 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)
        assert process.returncode == 2, err
        assert out == ""
        assert "Traceback" not in err
        [line] = [line for line in err.splitlines() if line.startswith("nano-eval: interrupted")]
        assert "6 of 12 results are kept" in err
        resume = line.partition("to go on: nano-eval ")[2].split()
        assert resume[-1].startswith("--run_set_id=")
    with ScriptedServer(right, port=server_port(err)) as server:
        again = subprocess.run(
            [sys.executable, "-m", "nanoeval.endpoint.cli", *resume],
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        assert server.num_requests == 1 + 6
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)["results"][TASK]
    assert (result["num_samples"], result["metrics"]["exact_match"]) == (12, 1.0)


def test_help_answers_at_once() -> None:
    """A command that takes seconds to say what it can do is not used."""
    command = [sys.executable, "-m", "nanoeval.endpoint.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "--base_url" in process.stdout.read()
        # CPU time, because others may share the machine; of this process alone.
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert spent.ru_utime + spent.ru_stime < 0.6
    loaded = "import sys, nanoeval.endpoint.cli; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"aiohttp", "numpy", "pandas", "scipy", "datasets"} & set(modules)


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody reads the source to find a name."""
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert "gsm8k_cot_llama  GSM8K: grade-school word problems" in out
    assert "chartqa" in out


def test_against_compares_in_one_run(nano_eval: Command, workplace: Path) -> None:
    """Two runs one after the other would blame the server for the hour of the day."""
    order: list[str] = []

    def tracked(name: str, limit: int) -> Callable[[Request], str]:
        def reply(request: Request) -> str:
            order.append(name)
            return right_below(limit)(request)

        return reply

    with ScriptedServer(tracked("a", 12)) as first, ScriptedServer(tracked("b", 6)) as second:
        status = nano_eval(
            first, f"--against={second.base_url}", "--num_concurrent=1", "--output=r.json"
        )
    assert status == 1
    comparison = nano_eval.json["comparison"]["tasks"][TASK]
    assert (comparison["only_first"], comparison["only_second"]) == (6, 0)
    assert comparison["p_different"] == pytest.approx(2 / 64)
    assert nano_eval.json["results"][TASK]["metrics"]["exact_match"] == 1.0
    assert nano_eval.json["against"]["results"][TASK]["metrics"]["exact_match"] == 0.5
    assert "DIFFERENT" in nano_eval.err
    # Turn by turn after the two probes: never more than two of one in a row.
    asked = "".join(order[2:])
    assert len(asked) == 24
    assert "aaa" not in asked
    assert "bbb" not in asked


def test_python_api_gives_the_same(workplace: Path) -> None:
    """Notebooks use it."""
    with ScriptedServer(right_below(9), models=["m"]) as server:
        config = APIConfig(url=server.base_url, model="m", num_concurrent=8)
        result = asyncio.run(run_task(TASKS[TASK], config, max_samples=10))
    assert result["metrics"]["exact_match"] == 0.9
    assert len(result["samples"]) == 10


def test_pairs_are_parsed_as_json_where_they_are() -> None:
    """A list cut at its comma would send half of it."""
    text = 'a=1,b=0.5,c=x y,d=[1,2],e={"f": [1, "g,h"]},i="j,k",o="a\\"b,c",l=None,m=True,n='
    assert parse_pairs(text, "x") == {
        "a": 1,
        "b": 0.5,
        "c": "x y",
        "d": [1, 2],
        "e": {"f": [1, "g,h"]},
        "i": "j,k",
        "o": 'a"b,c',
        "l": None,
        "m": True,
        "n": "",
    }


def is_meant_right(question: str) -> bool:
    """True for about three in four questions, by a hash of the text."""
    return hashlib.sha256(question.encode()).digest()[0] < 192


def test_whole_gsm8k_with_faults_gives_the_exact_result(
    nano_eval: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single sample lost, doubled or misread would show."""
    if not (SHARED / "openai").is_dir():
        pytest.skip("needs ../shared/data with the GSM8K test split")
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(SHARED))
    rows = {row["question"]: row for row in gsm8k_cot_llama.load()}
    assert len(rows) == 1319

    def reply(request: Request) -> str:
        question = request.prompt.rpartition("Problem: ")[2]
        if question not in rows:
            return "ready"
        answer = gsm8k_cot_llama.target(rows[question])
        if is_meant_right(question):
            return f"Step by step.\nThe final answer is {answer}"
        return "The final answer is -12345"

    faults = [Fault("429", rate=0.02, retry_after=0.05), "500:0.02", "cut:0.01", "malformed:0.01"]
    num_right = sum(is_meant_right(question) for question in rows)
    with ScriptedServer(reply, faults=faults, seed=3) as server:
        assert nano_eval(server, "--num_concurrent=64", "--max_tries=6") == 0
        num_faults = sum(server.stats().faults.values())
    assert nano_eval.result["num_samples"] == 1319
    assert nano_eval.result["metrics"]["exact_match"] == num_right / 1319
    assert nano_eval.result["metrics"]["strict_match"] == num_right / 1319
    assert num_faults > 40
    assert 0 < nano_eval.result["num_retried"] <= num_faults


def test_image_task_sends_png_and_refusals_are_found_first(
    nano_eval: Command, workplace: Path
) -> None:
    """A server that drops images in silence gives a score that is chance."""
    image = pytest.importorskip("PIL.Image", reason='pip install "nanoeval[endpoint]"')
    folder = workplace / "data" / "HuggingFaceM4" / "ChartQA" / "default"
    folder.mkdir(parents=True)
    image.new("RGB", (4, 4), "blue").save(folder / "a.jpg")
    row = {"image": "a.jpg", "query": "Which colour?", "label": ["Blue"]}
    (folder / "test.jsonl").write_text(json.dumps(row))

    def see(request: Request) -> str:
        return "red" if "fills this picture" in request.prompt else "Final Answer: blue"

    arguments = ["--tasks=chartqa", "--output=r.json"]
    with ScriptedServer(see) as server:
        assert nano_eval(server, *arguments) == 0
        assert server.requests[-1].images[0].startswith("data:image/png;base64,")
    metrics = nano_eval.json["results"]["chartqa"]["metrics"]
    assert metrics["relaxed_accuracy"] == metrics["anywhere_accuracy"] == 1.0
    saved = Path("r.json").read_text()
    assert "sha256:" in saved
    assert "base64" not in saved
    with ScriptedServer(see, refuses=["images"]) as server:
        assert nano_eval(server, *arguments) == 3
    assert "the server refuses images" in nano_eval.error_line()
    with ScriptedServer("A nice day.", ignores=["images"]) as server:
        assert nano_eval(server, *arguments) == 3
    assert "ignores images" in nano_eval.error_line()


def test_server_that_dies_ends_the_run(
    nano_eval: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Working through a thousand time-outs of a dead server takes a night."""
    monkeypatch.setattr("nanoeval.evals._generation.FAILURES_IN_A_ROW", 5)

    def dead_after(request: Request) -> Fault | None:
        return Fault("disconnect") if number_in(request) >= 4 else None

    arguments = ["--num_concurrent=1", "--max_tries=1", "--run_set_id=x"]
    with ScriptedServer(right, faults=[dead_after]) as server:
        port = server.port
        assert nano_eval(server, *arguments) == 3
    assert "the last 5 requests in a row failed" in nano_eval.error_line()
    assert "to go on: nano-eval" in nano_eval.err
    with ScriptedServer(right, port=port) as server:
        assert nano_eval(server, *arguments) == 0
        assert server.num_requests == 1 + 8
    assert nano_eval.result["num_answered"] == 12


# Going on, keys and what is kept.

TWO_TASKS = """
import chz
from nanoeval.evals._generation import GenerationEval

def load():
    return [{"q": f"Q{i}"} for i in range(4)]

@chz.chz
class A(GenerationEval):
    load = staticmethod(load)
    prompt = staticmethod(lambda row: [{"role": "user", "content": row["q"]}])
    target = staticmethod(lambda row: "ready")
    score = staticmethod(lambda row, reply: {"exact_match": 1.0})

@chz.chz
class B(A):
    prompt = staticmethod(lambda row: [{"role": "user", "content": "B " + row["q"]}])
    score = staticmethod(lambda row, reply: {"exact_match": 0.0})
"""


def test_two_tasks_of_one_module_are_two_checks(nano_eval: Command, workplace: Path) -> None:
    """The second would be given the score of the first."""
    (workplace / "two_own_tasks.py").write_text(TWO_TASKS)
    with ScriptedServer("ready") as server:
        assert nano_eval(server, "--tasks=two_own_tasks:A,two_own_tasks:B", "--run_set_id=x") == 0
        assert sum("B Q" in request.prompt for request in server.requests) == 4
        asked = server.num_requests
        assert nano_eval(server, "--tasks=two_own_tasks:B,two_own_tasks:A", "--run_set_id=x") == 0
        assert server.num_requests == asked + 2
    scores = {name: r["metrics"]["exact_match"] for name, r in nano_eval.json["results"].items()}
    assert scores == {"two_own_tasks:A": 1.0, "two_own_tasks:B": 0.0}


def test_task_in_the_working_folder_is_found_by_the_console_script(workplace: Path) -> None:
    """A script's path holds the folder of the script, not the one that people work in."""
    (workplace / "two_own_tasks.py").write_text(TWO_TASKS)
    program = "import sys; sys.path.remove(''); from nanoeval.endpoint.cli import main; main()"
    with ScriptedServer("ready") as server:
        command = [sys.executable, "-c", program, "--tasks=two_own_tasks:A"]
        done = subprocess.run(
            [*command, f"--base_url={server.base_url}"], capture_output=True, text=True, check=False
        )
    assert json.loads(done.stdout)["results"]["two_own_tasks:A"]["num_answered"] == 4, done.stderr


@pytest.mark.parametrize("argument", ["--api=completions", "--stream"])
def test_other_way_of_asking_does_not_go_on_with_a_run(nano_eval: Command, argument: str) -> None:
    """Replies to chats would be shown as replies to plain prompts."""
    with ScriptedServer(right) as server:
        assert nano_eval(server, "--run_set_id=x") == 0
        assert nano_eval(server, "--run_set_id=x", argument) == 3
    assert "holds a check of gsm8k_cot_llama with other" in nano_eval.error_line()


@pytest.mark.parametrize("comes_back_as", ["variable", "argument"])
def test_key_may_come_either_way_when_a_run_goes_on(
    nano_eval: Command, monkeypatch: pytest.MonkeyPatch, comes_back_as: str
) -> None:
    """The printed command, given the key in the documented way, must work."""

    def gone(request: Request) -> Fault | None:
        return Fault("404") if number_in(request) == 7 else None

    in_arguments = [f"--model_args=api_key={KEY}"]
    with ScriptedServer(right, api_key=KEY, faults=[gone]) as server:
        if comes_back_as == "argument":
            monkeypatch.setenv("OPENAI_API_KEY", KEY)
        given = in_arguments if comes_back_as == "variable" else []
        assert nano_eval(server, *given, "--num_concurrent=1", "--run_set_id=x") == 3
        port = server_port(nano_eval.error_line())
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if comes_back_as == "variable":
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
    given = in_arguments if comes_back_as == "argument" else []
    with ScriptedServer(right, api_key=KEY, port=port) as server:
        assert nano_eval(server, *given, "--num_concurrent=1", "--run_set_id=x") == 0
    assert nano_eval.result["num_answered"] == 12


def test_key_of_the_documented_variable_serves_the_engine_too() -> None:
    """Whoever resumes with the engine's own command knows of no other variable."""

    def gone(request: Request) -> Fault | None:
        return Fault("404") if number_in(request) == 7 else None

    with ScriptedServer(right, api_key=KEY, faults=[gone]) as server:
        command = [sys.executable, "-m", "nanoeval.endpoint.cli", "--tasks", TASK]
        command += [f"--base_url={server.base_url}", f"--model_args=api_key={KEY}"]
        done = subprocess.run([*command, "--run_set_id=x"], capture_output=True, check=False)
        assert done.returncode == 3
        port = server.port
    with ScriptedServer(right, api_key=KEY, port=port):
        done = subprocess.run(
            [sys.executable, "-m", "nanoeval.bin.resume", "run_set_id=x"],
            env={**os.environ, "OPENAI_API_KEY": KEY},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def test_second_server_gets_its_own_key_and_only_that(
    nano_eval: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key sent to another party is a key to be changed."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-b")
    with ScriptedServer(right, api_key="sk-a") as a, ScriptedServer(right, api_key="sk-b") as b:
        both = ["--margin=0.9", f"--against={b.base_url}"]
        assert nano_eval(a, *both, "--model_args=api_key=sk-a") in {0, 2}
        monkeypatch.setenv("OPENAI_API_KEY", "sk-a")
        assert nano_eval(a, *both, "--against_args=api_key=sk-b") in {0, 2}
        monkeypatch.setenv("NANO_EVAL_AGAINST_API_KEY", "sk-b")
        assert nano_eval(a, *both) in {0, 2}
    assert nano_eval.json["against"]["results"][TASK]["num_answered"] == 12


def test_run_goes_on_with_the_new_connection_settings(nano_eval: Command) -> None:
    """People lower the pressure because the run ended, and raise the time-out for the same."""

    def gone(request: Request) -> Fault | None:
        return Fault("404") if number_in(request) == 1 else None

    with ScriptedServer(right, faults=[gone]) as server:
        assert nano_eval(server, "--num_concurrent=1", "--timeout=0.05", "--run_set_id=x") == 3
        port = server_port(nano_eval.error_line())
    with ScriptedServer(right, port=port, latency=0.3) as server:
        given = ["--num_concurrent=6", "--timeout=20", "--max_tries=1", "--run_set_id=x"]
        assert nano_eval(server, *given) == 0
        assert server.max_in_flight == 6
    assert nano_eval.result["num_errors"] == 0


@pytest.mark.parametrize(
    "pairs", [f'num_concurrent=4,api_key="{KEY},part2"', f" api_key ={KEY}", f"api_key= {KEY} "]
)
def test_key_is_left_out_however_it_is_written(workplace: Path, pairs: str) -> None:
    """A part of a key in a shared database is a key to be changed."""
    key = pairs.partition('"')[2].rstrip('"') or KEY

    def gone(request: Request) -> Fault | None:
        return Fault("404") if number_in(request) == 7 else None

    with ScriptedServer(right, api_key=key, faults=[gone]) as server:
        command = [sys.executable, "-m", "nanoeval.endpoint.cli", f"--base_url={server.base_url}"]
        done = subprocess.run(
            [*command, "--tasks", TASK, "--model-args", pairs],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 3
    assert "to go on: nano-eval" in done.stderr
    files = [file for file in workplace.rglob("*") if file.is_file()]
    assert any(file.suffix == ".db" for file in files)
    for kept in [done.stderr.encode(), *(file.read_bytes() for file in files)]:
        assert KEY.encode() not in kept
        assert b"part2" not in kept


def test_key_is_taken_without_space_around(
    nano_eval: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that keys are read from end in a line break."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with ScriptedServer(right, api_key=KEY) as server:
        assert nano_eval(server) == 0
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
        assert nano_eval(server) == 3
        assert "OPENAI_API_KEY has a line break" in nano_eval.error_line()
        assert nano_eval(server, "--model_args", f"api_key={KEY}\t{KEY}") == 3
        assert "api_key in --model_args has a line break" in nano_eval.error_line()
        assert KEY not in nano_eval.err


def test_key_and_model_that_look_like_numbers_are_text(nano_eval: Command) -> None:
    """A key that is sent as 100000.0 is a wrong key."""
    with ScriptedServer(right, api_key="1e5", models=["1.10", "b"]) as server:
        assert nano_eval(server, "--model_args=api_key=1e5,model=1.10") == 0
    assert nano_eval.json["config"]["model"] == "1.10"
    assert nano_eval(None, "--model_args=base_url=5") == 3
    assert "must be a full address" in nano_eval.error_line()


def test_lone_surrogate_in_a_reply_loses_no_file(nano_eval: Command, workplace: Path) -> None:
    """Half an emoji in one of a thousand replies would cost them all, and last week's file."""

    def half(request: Request) -> str:
        return "\ud83d I am lost" if number_in(request) in {2, 3, 4} else right(request)

    Path("keep.json").write_text("{}")
    arguments = ["--output=keep.json", "--html=page.html"]
    with ScriptedServer(right) as first, ScriptedServer(half) as second:
        assert nano_eval(first, *arguments, f"--against={second.base_url}") == 2
    flips = nano_eval.json["comparison"]["tasks"][TASK]["flips"]
    assert [flip["replies"][1][:3] for flip in flips] == ["\ud83d I"] * 3
    saved = json.loads(Path("keep.json").read_text())["against"]["results"][TASK]["samples"]
    assert saved[2]["reply"] == "\ud83d I am lost"
    assert "\\ud83d I am lost" in Path("page.html").read_text()
    assert "\\ud83d I am lost" in nano_eval.err
    assert main(["compare", "keep.json", "keep.json"]) == 2


def test_terminal_that_cannot_show_a_letter_gets_its_escape(workplace: Path) -> None:
    """A server in a container with no locale would lose a finished run."""
    with ScriptedServer(right, models=["Modell-ü-😀"]) as server:
        command = [sys.executable, "-m", "nanoeval.endpoint.cli", "--tasks", TASK]
        done = subprocess.run(
            [*command, f"--base_url={server.base_url}"],
            env={**os.environ, "PYTHONIOENCODING": "latin-1"},
            capture_output=True,
            check=False,
        )
    assert json.loads(done.stdout.decode("latin-1"))["config"]["model"] == "Modell-ü-😀"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--margin=2"], "--margin=2.0 must lie between 0 and 1"),
        (["--margin=0"], "--margin=0.0 must lie between 0 and 1"),
        (["--margin=nan"], "--margin=nan must lie between 0 and 1"),
        (["--against={url}/completions"], "cannot be paired"),
    ],
)
def test_comparison_that_cannot_be_is_refused_before_a_request(
    nano_eval: Command, arguments: list[str], line: str
) -> None:
    """Two servers asked for a night, for nothing."""
    with ScriptedServer(right) as server:
        filled = [argument.replace("{url}", server.base_url) for argument in arguments]
        assert nano_eval(server, f"--against={server.base_url}", *filled) == 3
        assert server.num_requests == 0
    assert line in nano_eval.error_line()


def test_second_server_without_an_answer_leaves_the_results_of_the_first(
    nano_eval: Command,
) -> None:
    """A crash of the new server must not cost the baseline."""

    def after_probe(request: Request) -> Fault | None:
        return Fault("400") if number_in(request) >= 0 else None

    with ScriptedServer(right) as first, ScriptedServer(right, faults=[after_probe]) as second:
        url = second.base_url
        assert nano_eval(first, f"--against={url}", "--output=r.json") == 3
    assert nano_eval.result["metrics"]["exact_match"] == 1.0
    assert nano_eval.json["against"]["results"][TASK]["num_errors"] == 12
    assert len(json.loads(Path("r.json").read_text())["results"][TASK]["samples"]) == 12
    assert "comparison" not in nano_eval.json
    assert nano_eval.err.count("nano-eval: error: ") == 1
    assert f"{url}: {TASK}: 12 of 12 samples have no answer (http_400: 12)" in nano_eval.err


def test_missing_data_of_a_later_task_is_found_before_a_request(nano_eval: Command) -> None:
    """An hour of the first task would be lost to the second."""
    with ScriptedServer(right) as server:
        assert nano_eval(server, f"--tasks={TASK},chartqa") == 3
        assert server.num_requests == 0
    assert "ChartQA" in nano_eval.error_line()


def test_failure_of_a_later_task_leaves_the_results_of_the_first(
    nano_eval: Command, workplace: Path
) -> None:
    """What is finished is paid for."""
    (workplace / "two_own_tasks.py").write_text(TWO_TASKS)

    def refuse_b(request: Request) -> Fault | None:
        return Fault("404") if "B Q" in request.prompt else None

    with ScriptedServer("ready", faults=[refuse_b]) as server:
        tasks = "--tasks=two_own_tasks:A,two_own_tasks:B"
        assert (
            nano_eval(server, tasks, "--output=r.json", "--min=two_own_tasks:B.exact_match=0") == 3
        )
    assert list(nano_eval.json["results"]) == ["two_own_tasks:A"]
    assert nano_eval.json["unfinished"] == ["two_own_tasks:B"]
    assert json.loads(Path("r.json").read_text())["results"]["two_own_tasks:A"]["samples"]
    assert "to go on: nano-eval" in nano_eval.err


def test_reader_that_has_seen_enough_changes_nothing_else(workplace: Path) -> None:
    """`nano-eval ... | head` must write the file, and a gate must still fail."""
    with ScriptedServer(right) as server:
        command = [sys.executable, "-m", "nanoeval.endpoint.cli", "--tasks", TASK]
        command += [f"--base_url={server.base_url}", "--min=exact_match=1.5", "--output=r.json"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        process.stderr.close()
    assert process.wait(30) == 1, err
    assert "error" not in err
    assert len(json.loads(Path("r.json").read_text())["results"][TASK]["samples"]) == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_names_the_file_and_how_to_go_on(nano_eval: Command) -> None:
    """The answers are in the database; people need to know."""
    with ScriptedServer(right) as server:
        assert nano_eval(server, "--output=/dev/full") == 3
    assert "/dev/full cannot be written: No space left on device" in nano_eval.err
    assert "to go on: nano-eval" in nano_eval.err
    assert nano_eval.result["num_answered"] == 12


def test_warnings_of_the_second_server_are_said(nano_eval: Command) -> None:
    """A comparison of replies that were cut is about the limit."""

    def cut(request: Request) -> Reply:
        return Reply(right(request), finish_reason="length")

    with ScriptedServer(right) as first, ScriptedServer(cut) as second:
        url = second.base_url
        nano_eval(first, f"--against={url}")
    assert f"{url}: {TASK}: 12 of 12 replies stopped for length" in nano_eval.err


def test_plot_that_cannot_be_drawn_is_refused_before_the_first_request(
    nano_eval: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two servers would be asked everything, and the verdict be an error about a package."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with ScriptedServer(right) as server:
        arguments = (f"--against={server.base_url}", f"--plot={tmp_path / 'plot.png'}")
        assert nano_eval(server, *arguments) == 3
        assert server.num_requests == 0
    assert "--plot needs a package: pip install" in nano_eval.error_line()

"""The Hugging Face model: its batches, its log-likelihoods, its errors."""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanoeval.eval import RolloutSystemError
from nanoeval.models import hf
from nanoeval.models._hf_batching import (
    BatchStatistics,
    DeviceThread,
    Encoded,
    plan_batches,
)
from nanoeval.models.hf import CheckpointError, HFModel, keep_loaded
from tests import tiny_models

# torch and transformers warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("default")

FIXTURES = Path(__file__).parent / "fixtures"
INSTALL = 'pip install "nanoeval[hf]"'
OPTIONS = [" yes", " no, the lazy dog", " maybe so it is", ".", " yes"]


def prompts(count: int) -> list[str]:
    return [f"Question {i}: what is the quick brown fox{' dog' * (i % 5)}" for i in range(count)]


def own_options(index: int) -> list[str]:
    """Options whose number, lengths and order differ from question to question."""
    count = 2 + index % 4
    return [f" option {n}{' lazy dog' * ((index * 7 + n * 3) % 5)}" for n in range(count)]


# Batching: no torch.


def test_batches_hold_their_limits_and_little_padding() -> None:
    """A batch beyond its tokens fills the device; one of unlike lengths wastes it."""
    lengths = [3 + (i * 7919) % 900 for i in range(500)]
    batches = plan_batches(lengths, max_tokens=4096, max_rows=50)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    padded = real = 0
    for batch in batches:
        own = [lengths[i] for i in batch]
        assert len(own) == 1 or max(own) * len(own) <= 4096
        assert len(own) <= 50
        padded += max(own) * len(own)
        real += sum(own)
    assert (padded - real) / padded < 0.1
    assert len(batches) < 100, "so many batches are no batches"


class FakeBackend:
    """Answers a text with its length; takes only so many at once."""

    max_tokens: int | None = None

    def __init__(self, capacity: int = 1000, seconds: float = 0.0) -> None:
        self.capacity, self.seconds = capacity, seconds
        self.batches: list[list[str]] = []

    def encode(self, requests: Sequence[str]) -> list[Encoded]:
        if any(request == "bad" for request in requests):
            raise ValueError("bad cannot be encoded")
        return [Encoded("length", len(request), request) for request in requests]

    def run(self, batch: Sequence[Encoded]) -> list[int]:
        time.sleep(self.seconds)
        if sum(encoded.length for encoded in batch) > self.capacity:
            raise MemoryError
        self.batches.append([encoded.payload for encoded in batch])
        return [encoded.length for encoded in batch]

    def free_memory_after(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)


def started(backend: FakeBackend) -> DeviceThread:
    thread = DeviceThread(lambda statistics: backend)
    thread.start()
    return thread


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    """A batch that does not fit would end the run; all later ones must be smaller at once."""
    backend = FakeBackend(capacity=40)
    thread = started(backend)
    thread.expect([f"{i:010}" for i in range(32)])
    futures = [thread.submit(f"{i:010}") for i in range(32)]
    assert [future.result(10) for future in futures] == [10] * 32
    assert thread.statistics.out_of_memory == 3  # 32 -> 16 -> 8 -> 4 rows of 10
    assert {len(batch) for batch in backend.batches} == {4}
    thread.close()


def test_a_single_request_that_does_not_fit_fails_alone_as_a_system_error() -> None:
    """One too long prompt must not take the others with it, nor be tried for ever."""
    thread = started(FakeBackend(capacity=40))
    long, short = thread.submit("x" * 50), thread.submit("short")
    assert short.result(10) == 5
    with pytest.raises(RolloutSystemError, match="single prompt of 50 tokens"):
        long.result(10)
    thread.close()


def test_a_request_that_cannot_be_encoded_fails_alone() -> None:
    """A bad image would else fail every request that arrived with it."""
    thread = started(FakeBackend())
    bad, good = thread.submit("bad"), thread.submit("good")
    assert good.result(10) == 4
    with pytest.raises(ValueError, match="cannot be encoded"):
        bad.result(10)
    thread.close()


def test_planned_batches_do_not_depend_on_what_is_asked_for_when() -> None:
    """A resumed run asks for some of the requests only; its numbers must be the same to the bit."""
    texts = [f"{i:0{5 + i % 3}}" for i in range(30)]
    seen = []
    for asked in (texts, texts[20:] + texts[:3], texts[::-1]):
        backend = FakeBackend()
        thread = DeviceThread(lambda statistics, backend=backend: backend, max_rows=8)
        thread.expect(texts)
        thread.start()
        for text in asked:
            assert thread.submit(text).result(10) == len(text)
        seen.append({frozenset(batch) for batch in backend.batches})
        thread.close()
    assert seen[0] == seen[2]
    assert seen[1] <= seen[0]


def test_equal_requests_that_wait_together_are_computed_once() -> None:
    """MMLU holds some questions twice; twice the work would also risk two answers."""
    backend = FakeBackend()
    thread = started(backend)
    futures = [thread.submit("same") for _ in range(10)]
    assert {future.result(10) for future in futures} == {4}
    assert sum(map(len, backend.batches)) <= 2
    thread.close()


async def test_the_event_loop_stays_free_while_the_device_works() -> None:
    """A forward pass on the loop would stop heartbeats, timers and every other rollout."""
    thread = started(FakeBackend(seconds=0.5))
    answer = asyncio.wrap_future(thread.submit("text"))
    ticks = 0
    while not answer.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks >= 10
    thread.close()


def test_closing_fails_what_waits_instead_of_hanging() -> None:
    """A rollout that waits for a closed model for ever keeps its run from ending."""
    thread = started(FakeBackend(seconds=0.2))
    futures = [thread.submit(f"request {i}") for i in range(3)]
    time.sleep(0.1)
    late = thread.submit("late")
    thread.close()
    thread.join(5)
    assert all(future.done() for future in [*futures, late])
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit("after")


# The model: torch and transformers.


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch", reason=INSTALL)
    pytest.importorskip("transformers", reason=INSTALL)
    module.set_num_threads(1)  # tiny models lose more to waiting than they gain
    return module


@pytest.fixture(scope="module")
def checkpoint(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_text_model(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def vision_checkpoint(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_vision_model(tmp_path_factory.mktemp("vision")))


@functools.cache
def reference(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


def plain_loglikelihood(torch: Any, folder: str, prompt: str, option: str) -> tuple[float, int]:
    """The reference: one forward pass, all written out."""
    model, tokenizer = reference(folder)
    before = tokenizer(prompt)["input_ids"]
    own = tokenizer(option, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([before + own])).logits.log_softmax(-1)[0]
    values = [logprobs[len(before) + i - 1, token].item() for i, token in enumerate(own)]
    return sum(values), len(own)


@pytest.mark.hf
@pytest.mark.parametrize("way", ["packed", "copied", "plain"])
async def test_loglikelihoods_are_those_of_the_plain_loop(
    torch: Any, checkpoint: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong mask, position or pad shifts every score, and no accuracy would tell."""
    from nanoeval.models._hf_scoring import Scorer

    monkeypatch.setattr(Scorer, "_find_way", lambda *arguments: way)
    asked = [(prompt, own_options(i)) for i, prompt in enumerate(prompts(12))]
    # Prompts of one length whose options fit into one pass, the longest of them last.
    asked += [(f"Prompt {i} is", [" lazy dog" * 12 + " fox" * i, " dog"]) for i in range(4)]
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        found = await asyncio.gather(*(model.loglikelihood(*question) for question in asked))
        assert model.get_statistics().batches < len(asked), "batches of several"
    for (prompt, options), scores in zip(asked, found, strict=True):
        for option, score in zip(options, scores, strict=True):
            wanted, n_tokens = plain_loglikelihood(torch, checkpoint, prompt, option)
            assert score.logprob == pytest.approx(wanted, abs=1e-4)
            assert score.n_tokens == n_tokens


@pytest.mark.hf
async def test_the_fastest_way_is_found_and_padding_stays_small(
    torch: Any, checkpoint: str
) -> None:
    """A model that can share prompts but is scored plainly takes four times as long."""
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        await asyncio.gather(*(model.loglikelihood(p, OPTIONS) for p in prompts(40)))
        assert model._thread()._backend._scorer.way == "packed"
        assert model.get_statistics().padding_share < 0.1


@pytest.mark.hf
async def test_a_model_that_cannot_share_prompts_is_scored_plainly(
    torch: Any, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that ignores its cache would give wrong numbers without a word."""
    from nanoeval.models._hf_scoring import Scorer

    forward = Scorer._forward

    def without_cache(self: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        inputs = {name: value for name, value in inputs.items() if name != "past_key_values"}
        if inputs["attention_mask"].dim() != 2:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"] = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :]
        return forward(self, inputs, *rest, **options)

    monkeypatch.setattr(Scorer, "_forward", without_cache)
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        [score, *_] = await model.loglikelihood(prompts(3)[2], OPTIONS[1:])
        assert model._thread()._backend._scorer.way == "plain"
    wanted, _ = plain_loglikelihood(torch, checkpoint, prompts(3)[2], OPTIONS[1])
    assert score.logprob == pytest.approx(wanted, abs=1e-4)


@pytest.mark.hf
async def test_loglikelihoods_are_those_of_lm_evaluation_harness(
    torch: Any, tmp_path: Path
) -> None:
    """Numbers that differ from the field's reference cannot be compared with anyone's."""
    fixture = json.loads((FIXTURES / "harness_loglikelihoods.json").read_text())
    tiny_models.make_exact_model(tmp_path)
    async with HFModel(model_id=str(tmp_path), device="cpu", dtype="float32") as model:
        calls = (model.loglikelihood(r["prompt"], [r["continuation"]]) for r in fixture["rows"])
        found = await asyncio.gather(*calls)
    assert {row["task"] for row in fixture["rows"]} == {"mmlu", "hellaswag"}
    for row, [score] in zip(fixture["rows"], found, strict=True):
        assert score.logprob == pytest.approx(row["logprob"], abs=1e-3, rel=1e-5)
        assert score.is_greedy == row["is_greedy"]


@pytest.mark.hf
async def test_company_in_a_batch_changes_nothing_and_ties_are_exact(
    torch: Any, checkpoint: str
) -> None:
    """Scores that depend on who else is asked make two runs disagree."""
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        alone = [await model.loglikelihood(prompt, OPTIONS) for prompt in prompts(8)]
        together = await asyncio.gather(*(model.loglikelihood(p, OPTIONS) for p in prompts(8)))
    for one, other in zip(alone, together, strict=True):
        assert [s.logprob for s in one] == pytest.approx([s.logprob for s in other], abs=1e-4)
        assert other[0].logprob == other[4].logprob  # the same text twice


@pytest.mark.hf
async def test_planned_scores_are_the_same_to_the_bit(torch: Any, checkpoint: str) -> None:
    """Two runs of one configuration must write the same file."""
    requests = [(prompt, OPTIONS) for prompt in prompts(20)]
    runs = []
    for order in (range(20), range(19, -1, -1), range(7, 13)):
        async with HFModel(model_id=checkpoint, device="cpu") as model:
            await model.plan_loglikelihoods(requests)
            runs.append({i: await model.loglikelihood(*requests[i]) for i in order})
    assert runs[0] == runs[1]
    assert all(runs[0][i] == scores for i, scores in runs[2].items())


@pytest.mark.hf
async def test_greedy_replies_do_not_depend_on_the_batch(torch: Any, checkpoint: str) -> None:
    """Left padding that leaks into attention changes what a model says in company."""
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        alone = [await model.complete(prompt, max_tokens=8) for prompt in prompts(6)]
        calls = (model.complete(prompt, max_tokens=8) for prompt in prompts(6))
        together = await asyncio.gather(*calls)
    assert [reply.text for reply in alone] == [reply.text for reply in together]
    assert {reply.finish_reason for reply in alone} <= {"stop", "length"}
    assert all(reply.usage.prompt_tokens and reply.usage.completion_tokens for reply in alone)


@pytest.mark.hf
async def test_completion_parameters_are_openais_and_no_other(torch: Any, checkpoint: str) -> None:
    """A misspelt parameter that is ignored in silence changes what was measured."""
    chat = [{"role": "user", "content": "Which fox?"}]
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        whole = await model.complete(chat, max_tokens=12)
        cut = await model.complete(chat, max_tokens=12, stop=whole.text[3:5])
        assert cut.text == whole.text[: whole.text.index(whole.text[3:5])]
        assert cut.finish_reason == "stop"
        sampled = await asyncio.gather(
            *(model.complete(chat, max_tokens=12, temperature=5.0) for _ in range(3))
        )
        assert len({reply.text for reply in sampled}) == 3, "samples must be drawn one by one"
        with pytest.raises(TypeError, match="max_token"):
            await model.complete(chat, max_token=3)


@pytest.mark.hf
async def test_a_pickled_model_is_its_fields_and_no_weights(torch: Any, checkpoint: str) -> None:
    """Every run stores its model; weights in it would fill the database."""
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        blob = pickle.dumps(model)
        assert len(blob) < 2000
        copy = pickle.loads(blob)
        assert await copy.loglikelihood("fox", [" a"]) == await model.loglikelihood("fox", [" a"])


@pytest.mark.hf
async def test_calls_work_without_entering_even_several_at_once(
    torch: Any, checkpoint: str
) -> None:
    """The first of them to end must not close the model under the others."""
    model = HFModel(model_id=checkpoint, device="cpu")
    found = await asyncio.gather(*(model.loglikelihood(p, [" a", " b"]) for p in prompts(5)))
    assert len(found) == 5
    assert "_device_thread" not in model.__dict__


@pytest.mark.hf
async def test_models_with_equal_fields_share_weights_while_kept(
    torch: Any, checkpoint: str
) -> None:
    """A suite that loads a model for each task spends its time on loading."""
    async with keep_loaded() as kept:
        for _ in range(3):
            async with HFModel(model_id=checkpoint, device="cpu") as model:
                await model.loglikelihood("fox", [" a"])
        assert len(kept) == 1
        async with HFModel(model_id=checkpoint, device="cpu", dtype="float64"):
            assert len(kept) == 2


@pytest.mark.hf
async def test_a_prompt_too_long_loses_its_beginning(torch: Any, checkpoint: str) -> None:
    """A model asked beyond its positions crashes, or on a GPU takes the whole process with it."""
    long = "the lazy dog " * 400
    async with HFModel(model_id=checkpoint, device="cpu") as model:
        [score] = await model.loglikelihood(long, [" fox jumps"])
        [longer] = await model.loglikelihood("something else " + long, [" fox jumps"])
        assert score.logprob == longer.logprob
        assert model.get_statistics().truncated == 2
        with pytest.raises(ValueError, match="do not fit into the 512"):
            await model.loglikelihood("fox", [" " + long])
        with pytest.raises(ValueError, match="has no tokens"):
            await model.loglikelihood("fox", [""])


@pytest.mark.hf
async def test_images_are_seen_and_ranked_like_the_plain_way(
    torch: Any, vision_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture lost on the way to the device leaves a score that looks like any other."""
    from nanoeval.evals._choices import user_message
    from nanoeval.models._hf_scoring import Scorer

    images = [tiny_models.make_image(red) for red in (0, 200, 90)]
    asked = [
        user_message(images[0], "Which fox?"),
        user_message("Left:", images[1], "Right:", images[2], "Which is the quick brown fox?"),
        user_message(images[1], "Which fox?"),
    ]
    found = {}
    for way in ("found by itself", "plain"):
        if way == "plain":
            monkeypatch.setattr(Scorer, "_find_way", lambda *arguments: "plain")
        async with HFModel(model_id=vision_checkpoint, is_vlm=True, device="cpu") as model:
            found[way] = await asyncio.gather(*(model.loglikelihood(p, OPTIONS) for p in asked))
            if way != "plain":
                assert model._thread()._backend._scorer.way == "packed"
                assert (await model.complete(asked[1], max_tokens=4)).usage.completion_tokens
    for one, other in zip(*found.values(), strict=True):
        assert [s.logprob for s in one] == pytest.approx([s.logprob for s in other], abs=1e-4)
    assert found["plain"][0] != found["plain"][2], "another image, another score"


@pytest.mark.hf
async def test_missing_cuda_falls_back_to_the_cpu_with_one_warning(
    torch: Any, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration made for a cluster must also run on a laptop, and say so."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    model = HFModel(model_id=checkpoint, device="cuda", attn_impl="flash_attention_2")
    facts = model.describe()
    async with model:
        await model.loglikelihood("fox", [" a"])
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    printed = "".join(capsys.readouterr())
    assert printed.count("going on with the CPU") == 1


@pytest.mark.hf
def test_a_checkpoint_that_cannot_be_loaded_is_one_clear_line(
    torch: Any, checkpoint: str, tmp_path: Path
) -> None:
    """Each of these would else be a long traceback after minutes of loading."""
    cases = {
        "there is no such folder": {"model_id": "./nowhere/at/all"},
        "takes no images": {"model_id": checkpoint, "is_vlm": True},
    }
    (tmp_path / "empty").mkdir()
    cases["holds no config.json"] = {"model_id": str(tmp_path / "empty")}
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text('{"model_type": "gpt2"}')
    cases["holds no weights"] = {"model_id": str(tmp_path / "config")}
    (tmp_path / "own").mkdir()
    (tmp_path / "own/model.safetensors").touch()
    (tmp_path / "own/config.json").write_text(
        '{"model_type": "my_own", "auto_map": {"AutoConfig": "code.MyConfig"}}'
    )
    cases["trust_remote_code: true"] = {"model_id": str(tmp_path / "own")}
    for message, fields in cases.items():
        with pytest.raises(CheckpointError, match=message):
            HFModel(**fields, device="cpu").describe()
    with pytest.raises(CheckpointError, match="no device"):
        HFModel(model_id=checkpoint, device="warp").describe()
    with pytest.raises(ValueError, match="dtype='int3'"):
        HFModel(model_id=checkpoint, dtype="int3")


def test_importing_the_module_does_not_import_torch() -> None:
    """Listing models, or help on the command line, must not take seconds."""
    import subprocess
    import sys

    code = "import sys, nanoeval.models.hf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_statistics_start_empty() -> None:
    """A share of nothing must be a number."""
    assert BatchStatistics().padding_share == 0
    assert hf.HFModel(model_id="x").get_model_name() == "x"

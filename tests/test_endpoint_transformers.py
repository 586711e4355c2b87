"""The command against a second implementation of the API: `transformers serve`, offline."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

from nanoeval.endpoint.cli import main
from nanoeval.models.openai_api import OpenAIModel, ServerLacks
from nanoeval.models.probe import probe

pytestmark = [
    pytest.mark.hf,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        any(
            util.find_spec(name) is None for name in ("torch", "transformers", "fastapi", "openai")
        ),
        reason='pip install "nanoeval[hf]" "transformers[serving]"',
    ),
]

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with a byte-level tokenizer, saved as a checkpoint."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_llama")
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[str]:
    """The base URL of `transformers serve` with the tiny model, without a network."""
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    assert program is not None
    process = subprocess.Popen(
        [program, "serve", str(tiny_llama), "--port", str(port), "--device", "cpu"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(f"http://localhost:{port}/health", process)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "transformers serve ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"{url} does not answer")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": f"What is {n} + 0?", "answer": f"#### {n}"} for n in range(4)]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(tmp_path))
    return tmp_path


def test_second_implementation_answers_the_text_task(
    served: str, tiny_llama: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client that fits one server alone checks nothing."""
    output = data / "results.json"
    arguments = ["--tasks=gsm8k_cot_llama", f"--base_url={served}", f"--model={tiny_llama}"]
    for more in ([], ["--stream"]):
        status = main([*arguments, "--gen_kwargs=max_tokens=8", f"--output={output}", *more])
        out, err = capsys.readouterr()
        assert status == 0, err
        result = json.loads(out)["results"]["gsm8k_cot_llama"]
        assert (result["num_answered"], result["num_errors"]) == (4, 0)
        assert result["tokens"]["completion"] > 0
        # Without a network its list of models fails, or is empty: a note, not an error.
        assert "Traceback" not in err
    assert result["time_to_first_token"]["p50"] > 0
    samples = json.loads(output.read_text())["results"]["gsm8k_cot_llama"]["samples"]
    assert all(isinstance(sample["reply"], str) for sample in samples)


def test_ignored_logprobs_are_said_not_scored(served: str, tiny_llama: Path) -> None:
    """This server takes `logprobs` and `echo` and does nothing: a score of it would be chance."""
    completions = OpenAIModel(name=str(tiny_llama), base_url=served, api="completions")
    with pytest.raises(ServerLacks, match="ignores"):
        asyncio.run(probe(completions, {"prompt_logprobs"}))
    chat = OpenAIModel(name=str(tiny_llama), base_url=served)
    with pytest.raises(ServerLacks, match="ignores `logprobs`"):
        asyncio.run(probe(chat, {"logprobs"}, {"logprobs": True, "max_tokens": 4}))

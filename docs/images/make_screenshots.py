"""Makes the pictures of the monitor in this folder: each page, wide and narrow, light and dark.

    python docs/images/make_screenshots.py

Runs an eval that answers sums at random, once to its end and once under the eyes of Chromium,
driven by playwright.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import chz
import pandas as pd
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from nanoeval import Eval, EvalSpec, RolloutSystemError, RunnerArgs, Task, _inspect, run
from nanoeval.metrics.standard import (
    compute_default_metrics_on_correctness_without_answer_groups as metrics_of,
)
from nanoeval.recorder import get_recorder

HERE = Path(__file__).parent
PAGES = {
    "run_sets": "",
    "run": "run?run_set=sums-b",
    "in_flight": "stuck?run_set=sums-b",
    "tasks": "tasks?run_set=sums-b&score=wrong&state=scored",
    "task": "task?run_set=sums-b&task={task}",
    "compare": "compare?run_set=sums-a&with=sums-b:1",
}
SIZES = {1280: 900, 390: 844}


class Sum(Task):
    question: str
    expected: int


@chz.chz
class Sums(Eval[Sum, dict[str, Any]]):
    """Sums, four attempts each; `skill` is the share of right answers."""

    skill: float
    n: int = 400

    def get_name(self) -> str:
        return "sums"

    async def get_tasks(self) -> list[Sum]:
        return [
            Sum(
                question_id=f"{a}+{b}", attempt_id=k, question=f"What is {a} + {b}?", expected=a + b
            )
            for a in range(10, 10 + self.n // 20)
            for b in range(1, 21)
            for k in range(4)
        ]

    async def evaluate(self, task: Sum) -> dict[str, Any]:
        get_recorder().record_extra({"asking": task.question, "temperature": 0.7})
        dice = random.Random(f"{task.name} {task.retry_idx} {self.skill}")
        await asyncio.sleep(dice.lognormvariate(0.2, 0.7) + 600 * (task.question_id == "12+5"))
        if dice.random() < 0.03:
            raise RolloutSystemError(f"HTTP 429: slow down\nrequest {task.name}", retry_after=2.0)
        if dice.random() < 0.01:
            raise RolloutSystemError("HTTP 503: the upstream is away")
        is_right = dice.random() < self.skill
        answer = task.expected + (0 if is_right else dice.choice([-10, -1, 1, 10]))
        terms = task.question.removeprefix("What is ").removesuffix("?")
        prompt = [
            {"role": "system", "content": "Answer in one line, then give the number alone."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": task.question},
                    {"type": "image_url", "image_url": {"url": abacus(terms)}},
                ],
            },
        ]
        reply = f"{terms} makes {answer}.\n\nAnswer: {answer}"
        usage = {"prompt_tokens": 31, "completion_tokens": 12}
        get_recorder().record_sampling(prompt, reply, usage=usage, latency=1.2)
        get_recorder().record_match(is_right, expected=str(task.expected), picked=str(answer))
        return {"correct": is_right, "picked": answer, "reply": reply}

    async def get_summary(self, results: list[tuple[Sum, dict[str, Any]]]) -> dict[str, Any]:
        rows = [
            {"instance": t.question_id, "attempt": t.attempt_id, "is_correct": r["correct"]}
            for t, r in results
        ]
        return metrics_of(pd.DataFrame(rows))


def abacus(terms: str) -> str:
    """A picture of the terms as rows of squares, as a data URL."""
    numbers = [int(number) for number in re.findall(r"\d+", terms)]
    size, colors = 10, [(47, 125, 225), (217, 130, 43)]
    width, height = size * 34, size * 6
    pixels = bytearray(b"\xf3\xf5\xf8" * (width * height))
    for row, number in enumerate(numbers):
        for column in range(number):
            for y in range(size + row * 2 * size, 2 * size - 2 + row * 2 * size):
                start = 3 * (y * width + (column + 1) * size)
                pixels[start : start + 3 * (size - 2)] = bytes(colors[row]) * (size - 2)
    lines = b"".join(
        b"\0" + bytes(pixels[3 * y * width : 3 * (y + 1) * width]) for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return f"data:image/png;base64,{b64encode(png).decode()}"


def run_sums(run_set_id: str, model: str, skill: float, n: int, concurrency: int) -> None:
    runner = RunnerArgs(run_set_id=run_set_id, model_name=model, concurrency=concurrency)
    asyncio.run(run(EvalSpec(eval=Sums(skill=skill, n=n), runner=runner)))


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)


def done(run_set_id: str) -> int:
    rows = [row for row in _inspect.list_run_sets() if row.run_set_id == run_set_id]
    return sum(e.num_done for row in rows for e in row.evals)


def take_pictures(browser: Browser, site: str) -> None:
    """Look at each page as a person would, and keep what is seen."""
    task = 0
    for width, height in SIZES.items():
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page = context.new_page()
            for name, path in PAGES.items():
                if "{task}" in path and not task:
                    page.goto(f"{site}/tasks?run_set=sums-b&score=wrong&state=scored")
                    href = page.locator("tbody tr a").nth(3).get_attribute("href")
                    task = int(str(href).rpartition("=")[2])
                page.goto(f"{site}/{path.format(task=task)}")
                page.locator(".ne").first.wait_for()
                page.wait_for_timeout(3000)
                picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
                # Few colours make small files.
                picture.quantize(128, dither=Image.Dither.NONE).save(
                    HERE / f"{name}_{width}_{scheme}.png", optimize=True
                )
            context.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("DATABASE_DIR", "LOG_DIR", "ROOT_DIR"):
            os.environ[f"NANOEVAL_{name}"] = f"{folder}/{name.lower()}"
        first = start(__file__, "sums-a", "model-a", "0.72", "200", "400")
        while done("sums-a") < 790:
            time.sleep(0.5)
        first.kill()
        live = start(__file__, "sums-b", "model-b", "0.8", "400", "24")
        monitor = start("-m", "nanoeval.bin.mon")
        try:
            assert monitor.stdout is not None
            site = next(line for line in monitor.stdout if "monitor is at" in line).split()[-1]
            while done("sums-b") < 500:
                time.sleep(0.5)
            with sync_playwright() as engine:
                browser = engine.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                take_pictures(browser, site.rstrip("/"))
                browser.close()
        finally:
            for process in (first, live, monitor):
                process.kill()
                process.wait()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_set_id, model, skill, n, concurrency = sys.argv[1:]
        run_sums(run_set_id, model, float(skill), int(n), int(concurrency))
    else:
        main()

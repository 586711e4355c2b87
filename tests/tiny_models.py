"""Tiny random checkpoints and small data folders in the hub's columns, made anew by the tests."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SENTENCES = [
    "The quick brown fox jumps over the lazy dog and answers the question.",
    "Which of these options is the right one? Answer: A. B. C. D. Yes No",
    "A person stands in the kitchen and then puts the cup on the table.",
]
SUBJECTS = ("abstract_algebra", "anatomy")


def make_tokenizer(
    special_tokens: Iterable[str] = (),
    corpus: Iterable[str] = SENTENCES,
    vocabulary: int = 400,
) -> Any:
    """A byte-level BPE tokenizer that can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backing = Tokenizer(models.BPE())
    backing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backing.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backing.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backing, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


def make_text_model(
    folder: Path, corpus: Iterable[str] = SENTENCES, vocabulary: int = 400, positions: int = 512
) -> Path:
    """A GPT-2-like model of two layers with a chat template."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer((), corpus, vocabulary)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=positions,
        # Wide enough that log-likelihoods differ clearly and replies vary.
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(folder, GPT2LMHeadModel(config), tokenizer)


def make_vision_model(folder: Path) -> Path:
    """An Idefics3 model (SmolVLM's architecture) of two layers, for images of 32 x 32 pixels."""
    import torch
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        LlamaConfig,
    )
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    image, fake, whole = "<image>", "<fake_token_around_image>", "<global-img>"
    tokenizer = make_tokenizer([image, fake, whole, "<end_of_utterance>"])
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    vision = Idefics3VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = Idefics3Config(
        text_config=text,
        vision_config=vision,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids(image),
        pad_token_id=0,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=(
            "{% for m in messages %}{{ m.role | capitalize }}: {% for part in m.content %}"
            "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
            "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
        ),
    )
    return _save(folder, Idefics3ForConditionalGeneration(config), processor)


def _save(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def make_image(red: int) -> bytes:
    """A PNG of 40 x 24 pixels, of one color."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (40, 24), (red % 256, 90, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_rows(folder: Path, split: str, rows: Iterable[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make_data(root: Path, count: int = 6) -> Path:
    """All five data sets, `count` rows each (MMLU: each of two subjects)."""
    for subject in SUBJECTS:
        write_rows(root / "cais/mmlu" / subject, "test", map(mmlu_row, range(count)))
    write_rows(root / "Rowan/hellaswag/default", "validation", map(hellaswag_row, range(count)))
    standard = root / "MMMU/MMMU_Pro/standard (10 options)"
    write_rows(standard, "test", map(mmmu_pro_row, range(count)))
    vision = [
        {k: v for k, v in mmmu_pro_row(i).items() if k not in ("question", "image_1", "image_2")}
        | {"image": encoded(i)}
        for i in range(count)
    ]
    write_rows(root / "MMMU/MMMU_Pro/vision", "test", vision)
    write_rows(root / "facebook/textvqa/default", "validation", map(textvqa_row, range(count)))
    write_rows(root / "lmms-lab/MME/default", "test", map(mme_row, range(count)))
    return root


def encoded(index: int) -> str:
    return base64.b64encode(make_image(index * 20)).decode()


def mmlu_row(index: int) -> dict[str, Any]:
    return {
        "question": f"What is the {'quick brown ' * index}fox number {index}?",
        "subject": "",
        "choices": ["the dog", f"{index} lazy dogs and a cup", "a table", "no"],
        "answer": index % 4,
    }


def hellaswag_row(index: int) -> dict[str, Any]:
    return {
        "ind": 100 + index,
        "activity_label": "Cooking",
        "ctx": f"A person stands {'in the kitchen ' * (index + 1)}and then",
        "endings": ["puts the cup down.", "jumps over the dog", "answers.", "the lazy fox sits"],
        "label": str(index % 4),
    }


def mmmu_pro_row(index: int) -> dict[str, Any]:
    options = [f"option number {n}" for n in range(10 if index % 2 else 4)]
    return {
        "id": f"test_Art_{index}",
        "question": f"<image 1> Which {'brown ' * index}fox is like <image 2>?",
        "options": str(options) if index % 2 else options,
        "answer": "ABCD"[index % 4],
        "image_1": encoded(index),
        "image_2": encoded(index + 7),
        "subject": "Art" if index % 2 else "Biology",
    }


def textvqa_row(index: int) -> dict[str, Any]:
    return {
        "question_id": 34602 + index,
        "question": f"what is written on the {'lazy ' * index}dog?",
        "image": {"bytes": None, "path": None} if index < 0 else encoded(index),
        "answers": ["stop"] * 3 + ["halt"] * 2 + ["go"] * 5,
    }


def mme_row(index: int) -> dict[str, Any]:
    image = index // 2
    return {
        "question_id": f"color/{image:03}.png",
        "image": encoded(image),
        "question": f"Is fox {index} brown? Please answer yes or no.",
        "answer": ["Yes", "No"][index % 2],
        "category": "color" if image % 2 else "code_reasoning",
    }


def make_exact_model(folder: Path) -> Path:
    """A GPT-2-like model whose weights and tokens come from formulas, the same on every machine."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    pairs = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n")]
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [first + second for first, second in pairs]
    backing = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=pairs))
    backing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backing.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backing, eos_token="<|endoftext|>")
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=512, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            if parameter.dim() > 1:
                steps = torch.arange(parameter.numel(), dtype=torch.float64)
                values = 0.3 * torch.sin(steps * (1.0 + 0.37 * number) + number)
                parameter.copy_(values.reshape(parameter.shape))
    return _save(folder, model, tokenizer)

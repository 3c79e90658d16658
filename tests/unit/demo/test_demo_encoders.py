"""The committed encoders load as any model does, are small, and their cards carry their figures."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.models.card import model_card
from demo.models.exam import answers, normal
from demo.models.train_encoders import ENCODERS
from demo.world.language import INSTRUCTION, held_out_tasks

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[3] / "demo" / "encoders"
ODD_TEXTS = [
    "",
    " ",
    "  two  blanks ",
    "\n\n\ttab",
    "🟥🔵 family 👨‍👩‍👧",
    "一个红色的圆形在左边",
    "nul \x00 in the middle",
    "▁ underscore, é and é, العربية",
    "x" * 3000,
    "IMG_2041.jpg https://example.com/a?b=c&d",
]


@pytest.fixture(scope="module", params=ENCODERS)
def name(request):
    return request.param


def test_folder_is_complete_and_small(name):
    files = {path.name: path.stat().st_size for path in (FOLDER / name).iterdir()}
    wanted = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "training.json",
    }
    assert wanted <= set(files)
    assert sum(files.values()) <= 3_000_000


def test_card_is_what_the_script_writes_from_the_record(name):
    record = json.loads((FOLDER / name / "training.json").read_text())
    base = None
    if record["variant"] == "tuned":
        base = json.loads((FOLDER / f"{record['family']}-base" / "training.json").read_text())
    card = (FOLDER / name / "README.md").read_text()
    assert card == model_card(record, base)
    assert f"**{record['figures']['perplexity']:.3f}**" in card


def test_model_loads_and_reads_its_context(name):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers >= 6
    assert model.config.hidden_size == (128 if name.startswith("llama") else 192)
    assert model.config.max_position_embeddings >= 512
    with torch.inference_mode():
        states = model(input_ids=torch.ones(1, 512, dtype=torch.long), output_hidden_states=True).hidden_states
    assert states[-3].shape == (1, 512, model.config.hidden_size) and states[-3].isfinite().all()


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_any_text_survives_the_tokenizer(name, text):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < len(tokenizer)


def test_bos_and_chat_template_are_those_of_the_family(name):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    chat = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "a red circle"}]
    starts_with_bos = tokenizer("a red circle")["input_ids"][0] == tokenizer.bos_token_id
    assert starts_with_bos == name.startswith("llama")
    assert None not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    if name.endswith("base"):
        assert tokenizer.chat_template is None
    else:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert text.index(INSTRUCTION) < text.index("a red circle")
        assert text.startswith("<s><|system|>" if name.startswith("llama") else "<|im_start|>system")


def test_instruction_is_not_shredded(name):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    assert len(tokenizer.tokenize(INSTRUCTION)) <= 30


def test_tuned_variant_follows_instructions_and_base_does_not(name):
    record = json.loads((FOLDER / name / "training.json").read_text())
    accuracy = record["figures"]["mean_accuracy"]
    assert accuracy >= 0.5 if name.endswith("tuned") else accuracy <= 0.05


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_tuned_variant_answers_now_as_its_card_says(family):
    folder, kinds = FOLDER / f"{family}-tuned", ("colour", "size")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tasks = [task for task in held_out_tasks(10) if task.kind in kinds]
    with torch.inference_mode():
        given = answers(model, tokenizer, "tuned", tasks)
    right = sum(normal(text) == task.answer for text, task in zip(given, tasks)) / len(tasks)
    accuracy = json.loads((folder / "training.json").read_text())["figures"]["accuracy"]
    stated = sum(accuracy[kind] for kind in kinds) / len(kinds)
    assert abs(right - stated) <= 0.25  # 20 tasks: two deviations

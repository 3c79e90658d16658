"""`PromptEncoder` against the plain full model: layers, prefix, batches, padding, limits and templates."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lidit.frozen.text import PAPER_INSTRUCTION, EncoderConfig, PromptEncoder
from lidit.store.codec import decode_bytes

pytestmark = pytest.mark.unit

INSTRUCTION = "two large brown dogs on the left of a table"
PROMPTS = ["a red bench", "", "two large blue dogs below the small green table on the left of a brown cat", "cat"]
GOLDEN_MODELS = ["stories260K", "babyllama-tok105"]


def open_encoder(folder, **changes):
    values = {"instruction": INSTRUCTION, "template": "plain", "dtype": "fp32", "codec": "fp32", **changes}
    return PromptEncoder(EncoderConfig("one", str(folder), **values), device="cpu")


def full_states(folder, ids, layer):
    """(len(ids), E): hidden state `layer` of the whole causal model on one sequence, nothing shared, nothing padded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[layer][0]


def assert_equals_full(encoder, layer, prompts=PROMPTS):
    prompt_embeds, prompt_mask = encoder(prompts)
    ids, _ = encoder.tokenize(prompts)
    assert prompt_mask.sum(dim=1).tolist() == [len(row) for row in ids]
    for row, tokens in enumerate(ids):
        wanted = full_states(encoder.folder, encoder.prefix_ids + tokens, layer)
        got = torch.cat([torch.from_numpy(encoder.instruction_embeds), prompt_embeds[row][prompt_mask[row]]])
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 1, 2, 3, 4])
def test_layer_is_the_hidden_state_of_that_index(llama_folder, layer):
    assert_equals_full(open_encoder(llama_folder, layer_index=layer), layer)


def test_default_layer_is_the_third_to_last(llama_folder):
    encoder = open_encoder(llama_folder)
    assert (encoder.num_blocks, encoder.layer) == (4, 2)
    assert_equals_full(encoder, -3)


@pytest.mark.parametrize("layer", [0, 5, -5, 100])
def test_layer_that_does_not_exist_is_refused(llama_folder, layer):
    with pytest.raises(ValueError, match=rf"layer_index {layer} .* model of 4 blocks; expected 1 to 4, or -4 to -1"):
        open_encoder(llama_folder, layer_index=layer)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_nothing_after_the_layer_runs(llama_folder, layer):
    encoder = open_encoder(llama_folder, layer_index=layer)
    blocks = encoder.model.layers
    assert len(blocks) == layer, "later blocks are built"
    assert not any("lm_head" in name for name, _ in encoder.model.named_parameters())
    calls = []
    for number, block in enumerate(blocks):
        # In front of the hooks that are there, since the last one's leaves the model.
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    encoder.model.norm.register_forward_pre_hook(lambda *_: calls.append("norm"))
    encoder(["a red bench"])
    once = [*range(layer), *(["norm"] if layer == 4 else [])]
    assert calls == 2 * once  # the prefix, the prompt
    encoder(["a cat", "dogs"])
    assert calls == 3 * once, "the prefix was run again"


def test_model_is_frozen(llama_folder):
    encoder = open_encoder(llama_folder)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder(["a"])[0].requires_grad


# -- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_hidden_states(data, name):
    cases = json.loads((data / "golden" / "lm_reference.json").read_text())["models"][name]
    encoder = open_encoder(data / "models" / name, instruction="", max_prompt_tokens=1024)
    assert encoder.prefix_ids == [1] and encoder.num_blocks == 5 and encoder.layer == 3
    prompts = [case["text"] for case in cases]
    ids, excess = encoder.tokenize(prompts)
    assert [[1, *row] for row in ids] == [case["input_ids"] for case in cases]
    assert (excess > 0).tolist() == [case["truncated"] for case in cases]
    prompt_embeds, prompt_mask = encoder(prompts)
    for row, case in enumerate(cases):
        states = np.concatenate([encoder.instruction_embeds, prompt_embeds[row][prompt_mask[row]].numpy()])
        wanted = case["hidden"][3]
        np.testing.assert_allclose(states.mean(), wanted["mean"], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(states), wanted["l2"], rtol=1e-4)
        np.testing.assert_allclose(states[-1, :4], wanted["last_first4"], atol=1e-4)
        # Its neighbours are another thing: the test would notice a layer off by one.
        assert abs(np.linalg.norm(states) / case["hidden"][2]["l2"] - 1) > 1e-3
        assert abs(np.linalg.norm(states) / case["hidden"][4]["l2"] - 1) > 1e-3


# -- batches ----------------------------------------------------------------------------------------------------------


def test_alone_or_in_any_batch_gives_the_same(llama_folder):
    encoder = open_encoder(llama_folder)
    draw = np.random.default_rng(0)
    words = [
        "a",
        "red",
        "bench",
        "and",
        "two",
        "large",
        "blue",
        "dogs",
        "below",
        "the",
        "small",
        "green",
        "table",
        "on",
        "left",
        "of",
        "brown",
        "cat",
    ]
    prompts = [" ".join(draw.choice(words, size)) for size in draw.integers(1, 25, 40)] + ["", "a", ""]
    alone = [encoder([prompt])[0][0] for prompt in prompts]
    ids, _ = encoder.tokenize(prompts)
    for budget in (1, 40, 200, 10**6):
        seen = []
        for batch in encoder.encode(ids, budget):
            made = decode_bytes(batch.packed, "fp32", encoder.width)
            parts = np.split(made, np.cumsum(batch.lengths)[:-1])
            for row, length, part in zip(batch.rows.tolist(), batch.lengths.tolist(), parts, strict=True):
                assert length == len(ids[row])
                np.testing.assert_allclose(part, alone[row].numpy(), atol=1e-5)
                seen.append(row)
            assert batch.finite.all() and batch.slots == len(batch.rows) * batch.lengths.max()
        assert sorted(seen) == list(range(len(prompts)))


def test_batches_do_not_grow_the_prefix(llama_folder):
    encoder = open_encoder(llama_folder)
    first, _ = encoder(["a red bench"])
    cache, _ = encoder._prefix
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for _ in range(3):
        encoder(["two large blue dogs", "a"])
    assert len(cache.layers) == encoder.layer
    for (keys, values), layer in zip(before, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
    assert torch.equal(encoder(["a red bench"])[0], first)


def test_no_prompts_and_only_empty_prompts(llama_folder):
    encoder = open_encoder(llama_folder)
    prompt_embeds, prompt_mask = encoder([])
    assert prompt_embeds.shape == (0, 0, 32) and prompt_mask.shape == (0, 0)
    assert list(encoder.encode([])) == []
    prompt_embeds, prompt_mask = encoder(["", ""])
    assert prompt_embeds.shape == (2, 0, 32) and prompt_mask.shape == (2, 0)
    (batch,) = encoder.encode([[], []])
    assert sorted(batch.rows.tolist()) == [0, 1] and batch.packed.shape == (0, 128) and batch.finite.all()


def test_null_and_instruction_embeds(llama_folder):
    encoder = open_encoder(llama_folder)
    assert encoder.null_embeds.shape == (0, 32) and encoder.null_embeds.dtype == np.float32
    assert encoder.instruction_embeds.shape == (len(encoder.prefix_ids), 32)
    assert encoder.instruction_embeds.dtype == np.float32


def test_without_any_prefix(own_llama):
    """No BOS, no instruction: nothing is shared, and the empty prompt still has no token."""
    folder = own_llama(bos_token=None)
    encoder = open_encoder(folder, instruction="")
    assert encoder.prefix_ids == [] and encoder.instruction_embeds.shape == (0, 32)
    prompt_embeds, prompt_mask = encoder(["a red bench", "", "cat"])
    for row, tokens in enumerate(encoder.tokenize(["a red bench", "", "cat"])[0]):
        if tokens:
            wanted = full_states(folder, tokens, -3)
            torch.testing.assert_close(prompt_embeds[row][prompt_mask[row]], wanted, atol=2e-5, rtol=2e-5)


def test_bf16_model(llama_folder):
    encoder = open_encoder(llama_folder, dtype="bf16", codec="bf16")
    plain = open_encoder(llama_folder)
    prompt_embeds, prompt_mask = encoder(PROMPTS)
    assert prompt_embeds.dtype == torch.bfloat16 and encoder.instruction_embeds.dtype == np.float32
    wanted, _ = plain(PROMPTS)
    difference = (prompt_embeds.float() - wanted)[prompt_mask].norm() / wanted[prompt_mask].norm()
    assert 1e-4 < difference < 5e-2
    ids, _ = encoder.tokenize(PROMPTS)
    for batch in encoder.encode(ids, 64):
        assert batch.packed.shape == (batch.lengths.sum(), 64) and batch.finite.all()


@pytest.mark.parametrize("codec", ["bf16", "fp32", "fp8_e4m3"])
def test_encode_packs_by_the_codec(llama_folder, codec):
    encoder = open_encoder(llama_folder, codec=codec)
    (tokens,), _ = encoder.tokenize([PROMPTS[2]])
    (batch,) = encoder.encode([tokens])
    wanted = encoder([PROMPTS[2]])[0][0].numpy()
    made = decode_bytes(batch.packed, codec, 32)
    np.testing.assert_allclose(made, wanted, atol=0.07 * np.abs(wanted).max())
    if codec == "fp32":
        np.testing.assert_array_equal(made, wanted)


def test_not_finite_is_told_of_exactly_the_prompts_that_are(own_llama):
    folder = own_llama()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (bad,) = tokenizer("Z", add_special_tokens=False)["input_ids"]
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][bad] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = open_encoder(folder)
    prompts = ["a red bench", "Z", "", "two large Z dogs", "cat on a table", "dogZ", "", "a"]
    ids, _ = encoder.tokenize(prompts)
    for budget in (8, 32, 10**4):
        finite = np.ones(len(prompts), bool)
        for batch in encoder.encode(ids, budget):
            finite[batch.rows] = batch.finite
        assert finite.tolist() == ["Z" not in prompt for prompt in prompts]


def test_padding_never_reaches_a_prompt(own_llama):
    """Not even where the token that pads has states that are not finite: 0 x NaN in attention is NaN."""
    folder = own_llama(bos_token=None)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = open_encoder(folder, instruction="")
    ids, _ = encoder.tokenize(["a cat", PROMPTS[2], ""])
    assert not any(0 in row for row in ids)
    prompt_embeds, prompt_mask = encoder.forward(ids)
    assert not prompt_mask.all(), "there is padding"
    assert prompt_embeds[prompt_mask].isfinite().all()


# -- limits -----------------------------------------------------------------------------------------------------------


def test_truncation_is_counted_and_exact(llama_folder):
    whole = open_encoder(llama_folder)
    ids, excess = whole.tokenize(PROMPTS)
    assert excess.tolist() == [0, 0, 0, 0] and excess.dtype == np.int32
    long = len(ids[2])
    assert long > 8
    cut = open_encoder(llama_folder, max_prompt_tokens=8)
    cut_ids, excess = cut.tokenize(PROMPTS)
    assert excess.tolist() == [max(0, len(row) - 8) for row in ids] and excess[2] == long - 8
    assert cut_ids == [row[:8] for row in ids]
    # Causal: what is kept does not depend on what was cut.
    torch.testing.assert_close(cut([PROMPTS[2]])[0][0], whole([PROMPTS[2]])[0][0, :8], atol=1e-5, rtol=1e-5)
    for limit, wanted in ((long, 0), (long - 1, 1)):
        assert open_encoder(llama_folder, max_prompt_tokens=limit).tokenize([PROMPTS[2]])[1].tolist() == [wanted]


def test_the_end_of_a_very_long_prompt_is_not_tokenised(llama_folder, monkeypatch):
    prompt = "two large blue dogs below the small green table " * 20_000
    encoder = open_encoder(llama_folder, max_prompt_tokens=8)
    given = []
    tokenizer = encoder.tokenizer
    monkeypatch.setattr(
        encoder, "tokenizer", lambda texts, **options: given.append(texts) or tokenizer(texts, **options)
    )
    (ids,), (excess,) = encoder.tokenize([prompt])
    assert ids == encoder.tokenize([prompt[:200]])[0][0] and excess > 0
    assert sum(len("".join(texts)) for texts in given) < 20_000 < len(prompt)


def test_tokenize_nothing(llama_folder):
    ids, excess = open_encoder(llama_folder).tokenize([])
    assert ids == [] and excess.shape == (0,)


def test_context_limits_the_prompt(own_llama):
    folder = own_llama(config={"max_position_embeddings": 40})
    encoder = open_encoder(folder, max_prompt_tokens=256)
    assert encoder.max_prompt_tokens == 40 - len(encoder.prefix_ids) > 0
    (tokens,), (excess,) = encoder.tokenize(["cat " * 60])
    assert len(encoder.prefix_ids) + len(tokens) == 40 and excess > 0
    assert_equals_full(encoder, -3, ["cat " * 60])
    assert open_encoder(folder, max_prompt_tokens=3).max_prompt_tokens == 3


@pytest.mark.parametrize("room, fits", [(-1, False), (0, False), (1, True)])
def test_prefix_longer_than_the_context_is_refused(own_llama, edit_json, room, fits):
    folder = own_llama()
    prefix = len(open_encoder(folder).prefix_ids)
    edit_json(folder / "config.json", max_position_embeddings=prefix + room)
    if fits:
        assert open_encoder(folder).max_prompt_tokens == 1
        return
    with pytest.raises(ValueError, match=rf"prefix takes {prefix} tokens of a context of {prefix + room}; .* shorten"):
        open_encoder(folder)


# -- prefix -----------------------------------------------------------------------------------------------------------


def test_plain_prefix_is_bos_instruction_newline(llama_folder, tokenizer):
    encoder = open_encoder(llama_folder)
    assert encoder.prefix_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoder.prefix_ids[1:]) == INSTRUCTION + "\n"
    assert open_encoder(llama_folder, instruction="").prefix_ids == [tokenizer.bos_token_id]
    assert tokenizer.decode(open_encoder(llama_folder, instruction=PAPER_INSTRUCTION).prefix_ids).startswith("<s>Desc")


def test_chat_prefix_has_the_instruction_as_system_message(llama_folder, tokenizer):
    encoder = open_encoder(llama_folder, template="chat")
    assert tokenizer.decode(encoder.prefix_ids) == f"<s><system>{INSTRUCTION}\n<user>"
    assert encoder.prefix_ids.count(tokenizer.bos_token_id) == 1, (
        "the template gives BOS, the tokenizer must not add one"
    )
    assert tokenizer.decode(open_encoder(llama_folder, template="chat", instruction="").prefix_ids) == "<s><user>"
    assert_equals_full(encoder, -3)


def test_prompt_never_merges_with_the_prefix(llama_folder):
    """The prompt's tokens are those it has alone, whatever stands before it."""
    plain, chat, bare = (
        open_encoder(llama_folder, **c) for c in ({}, {"template": "chat"}, {"instruction": "a re"})
    )  # fmt: skip
    for prompt in (" bench", "d bench", "\n\nbench", "  "):
        assert plain.tokenize([prompt]) [0] == chat.tokenize([prompt])[0] == bare.tokenize([prompt])[0]  # fmt: skip
        assert plain.tokenizer.decode(plain.tokenize([prompt])[0][0]) == prompt


def test_instruction_changes_the_states(llama_folder):
    with_, without = open_encoder(llama_folder), open_encoder(llama_folder, instruction="")
    assert (with_(["a cat"])[0] - without(["a cat"])[0]).abs().max() > 0.1


def test_chat_template_that_dates_itself_is_the_same_every_day(own_llama):
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    folder = own_llama(chat_template=dated + "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    encoder = open_encoder(folder, template="chat")
    assert encoder.tokenizer.decode(encoder.prefix_ids) == f"26 Jul 2024[system]{INSTRUCTION}[user]"


REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def test_chat_template_without_system_role_is_refused(own_llama):
    folder = own_llama(chat_template=REFUSING)
    with pytest.raises(ValueError, match=r"refuses an instruction.*System role not supported.*`template: plain`"):
        open_encoder(folder, template="chat")
    assert open_encoder(folder, template="chat", instruction="").prefix_ids  # without an instruction it serves
    assert open_encoder(folder, template="plain").prefix_ids


def test_chat_template_that_drops_the_system_message_is_refused(own_llama):
    """It would go unnoticed that the LLM never saw the instruction."""
    users_only = "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="`template: plain`"):
        open_encoder(own_llama(chat_template=users_only), template="chat")


def test_missing_chat_template_is_refused(own_llama):
    folder = own_llama(chat_template=None)
    with pytest.raises(
        ValueError, match=r"needs a tokenizer with a chat template and .* has none; set `template: plain`"
    ):
        open_encoder(folder, template="chat")
    assert open_encoder(folder, template="plain").prefix_ids


# -- config and fingerprint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"name": "a b"}, "encoder name"),
        ({"max_prompt_tokens": 0}, "encoder.max_prompt_tokens: expected a whole number >= 1"),
        ({"codec": "fp16"}, "encoder.codec: expected bf16, fp32 or fp8_e4m3"),
    ],
)
def test_config_is_checked(changes, match):
    with pytest.raises(ValueError, match=match):
        EncoderConfig(**{"name": "one", "model": "m", **changes})


def test_fingerprint_is_json_and_the_same_from_any_path(own_llama, tmp_path):
    folder = own_llama()
    encoder = open_encoder(folder)
    fingerprint = encoder.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "other_name")
    assert open_encoder(moved).fingerprint() == fingerprint
    assert str(tmp_path) not in json.dumps(fingerprint)
    encoder(["a cat"])  # loading the model changes its config in place, the fingerprint must not follow
    assert encoder.fingerprint() == fingerprint


@pytest.mark.parametrize(
    "changes, keys",
    [
        ({"instruction": "Look:"}, {"instruction", "prefix_ids"}),
        ({"template": "chat"}, {"template", "prefix_ids"}),
        ({"layer_index": -2}, {"layer"}),
        ({"layer_index": -1}, {"layer", "final_norm"}),
        ({"dtype": "bf16"}, {"dtype"}),
        ({"codec": "bf16"}, {"codec"}),
        ({"max_prompt_tokens": 16}, {"max_prompt_tokens"}),
    ],
)
def test_fingerprint_follows_the_config(llama_folder, changes, keys):
    one, other = open_encoder(llama_folder).fingerprint(), open_encoder(llama_folder, **changes).fingerprint()
    assert {key for key in one if one[key] != other[key]} == keys


def test_fingerprint_does_not_follow_the_name_or_the_spelling_of_a_layer(llama_folder):
    encoder = open_encoder(llama_folder, layer_index=2)
    assert encoder.fingerprint() == open_encoder(llama_folder).fingerprint()
    renamed = PromptEncoder(dataclasses.replace(encoder.config, name="two"), device="cpu")
    assert renamed.fingerprint() == encoder.fingerprint()


def test_fingerprint_follows_weights_and_tokenizer(own_llama):
    one = open_encoder(own_llama("one"))
    weights = open_encoder(own_llama("weights", seed=1))
    tokenizer = open_encoder(own_llama("tokenizer", chat_template="{{ messages[0].content }}"))
    assert [key for key in one.fingerprint() if one.fingerprint()[key] != weights.fingerprint()[key]] == ["weights"]
    assert [key for key in one.fingerprint() if one.fingerprint()[key] != tokenizer.fingerprint()[key]] == ["tokenizer"]


# -- weights that do not fit -----------------------------------------------------------------------------------------


def test_weights_of_another_shape(own_llama, edit_json):
    folder = own_llama()
    edit_json(folder / "config.json", intermediate_size=64)
    encoder = open_encoder(folder)
    with pytest.raises(ValueError, match=r"weights in .*llama do not fit its config.json"):
        _ = encoder.model


def test_missing_tensors(own_llama):
    folder = own_llama()
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit.*1 tensors are missing.*layers\.1\.mlp\.up_proj\.weight"):
        _ = open_encoder(folder).model
    # The block is not built for an earlier layer: then nothing is missing.
    assert len(open_encoder(folder, layer_index=1).model.layers) == 1


def test_config_with_more_blocks_than_weights(own_llama, edit_json):
    folder = own_llama()
    edit_json(folder / "config.json", num_hidden_layers=9)
    with pytest.raises(ValueError, match="tensors are missing"):
        _ = open_encoder(folder).model

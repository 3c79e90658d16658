"""`PromptEncoder` on many kinds of model: shared prefix, right padding and cut layers equal a plain full forward."""

import shutil

import pytest
import torch
import transformers

from lidit.frozen.text import EncoderConfig, PromptEncoder

pytestmark = pytest.mark.unit

WINDOW = 6  # of sliding attention: smaller than the prefix, and than the longest prompt
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
INSTRUCTION = "a large brown dog on the left of the table"
PROMPTS = ["a red bench", "", "two large blue dogs below the small green table on the left of a brown cat", "cat"]

DECODERS = {
    "llama": lambda base: transformers.LlamaConfig(**base),
    "qwen2": lambda base: transformers.Qwen2Config(**base),
    "qwen2 sliding": lambda base: transformers.Qwen2Config(
        **base, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda base: transformers.Qwen3Config(**base),
    "gemma2": lambda base: transformers.Gemma2Config(**base, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": lambda base: transformers.Gemma3TextConfig(
        **base,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": lambda base: transformers.MistralConfig(**base, sliding_window=WINDOW),
    "qwen3 moe": lambda base: transformers.Qwen3MoeConfig(
        **base, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt2": lambda base: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=4, n_head=4, n_positions=512, initializer_range=0.2, bos_token_id=0
    ),
    "llava": lambda base: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**base), vision_config=transformers.CLIPVisionConfig(**VISION)
    ),
}


@pytest.fixture(scope="module", params=DECODERS)
def decoder_folder(request, decoder, save_model, tmp_path_factory):
    config = DECODERS[request.param](decoder)
    folder = tmp_path_factory.mktemp("decoders") / "model"
    if request.param == "llava":
        return save_model(folder, config, transformers.LlavaForConditionalGeneration)
    return save_model(folder, config)


@pytest.fixture(scope="module")
def whole(decoder_folder):
    """The whole causal model, with its head."""
    config = transformers.AutoConfig.from_pretrained(decoder_folder)
    loader = (
        transformers.AutoModelForImageTextToText if config.model_type == "llava" else transformers.AutoModelForCausalLM
    )
    return loader.from_pretrained(decoder_folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("layer", [1, -3, -2, -1])
def test_equals_the_plain_full_model(decoder_folder, whole, layer):
    encoder = open_encoder(decoder_folder, layer_index=layer, template="chat", instruction=INSTRUCTION)
    assert len(encoder.prefix_ids) > WINDOW
    prompt_embeds, prompt_mask = encoder(PROMPTS)
    ids, _ = encoder.tokenize(PROMPTS)
    assert max(map(len, ids)) > WINDOW
    for row, tokens in enumerate(ids):
        with torch.inference_mode():
            sequence = torch.tensor([encoder.prefix_ids + tokens])
            wanted = whole(input_ids=sequence, output_hidden_states=True, use_cache=False).hidden_states[layer][0]
        got = torch.cat([torch.from_numpy(encoder.instruction_embeds), prompt_embeds[row][prompt_mask[row]]])
        torch.testing.assert_close(got, wanted, atol=3e-5, rtol=3e-5)


def test_later_parts_are_not_there(decoder_folder):
    encoder = open_encoder(decoder_folder, template="plain")
    blocks = next(m for m in encoder.model.modules() if isinstance(m, torch.nn.ModuleList))
    assert len(blocks) == encoder.layer == 2
    names = [name for name, _ in encoder.model.named_parameters()]
    assert not any("vision" in name or "lm_head" in name for name in names)


def open_encoder(folder, **changes):
    values = {"dtype": "fp32", "codec": "fp32", **changes}
    return PromptEncoder(EncoderConfig("one", str(folder), **values), device="cpu")


# -- encoder-only -----------------------------------------------------------------------------------------------------

T5_SIZES = dict(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=2, num_heads=4)
CLIP_TEXT = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=20, initializer_factor=5.0, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def t5_folder(save_model, tmp_path_factory):
    config = transformers.T5Config(**T5_SIZES, pad_token_id=0, decoder_start_token_id=0)
    folder = tmp_path_factory.mktemp("t5") / "model"
    return save_model(folder, config, transformers.T5ForConditionalGeneration, ends="$A </s>")


@pytest.fixture(scope="module", params=["text model alone", "text and vision"])
def clip_folder(request, save_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "model"
    if request.param == "text model alone":
        config = transformers.CLIPTextConfig(**CLIP_TEXT)
        return save_model(folder, config, transformers.CLIPTextModel, ends="<s> $A </s>")
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION)
    return save_model(folder, config, transformers.CLIPModel, ends="<s> $A </s>")


def assert_equals_plain_class(encoder, plain, layer):
    prompt_embeds, prompt_mask = encoder(PROMPTS)
    ids, _ = encoder.tokenize(PROMPTS)
    for row, tokens in enumerate(ids):
        with torch.inference_mode():
            made = plain(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        wanted = made.last_hidden_state[0] if layer == -1 else made.hidden_states[layer][0]
        torch.testing.assert_close(prompt_embeds[row][prompt_mask[row]], wanted, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("layer", [None, -1, -2, 2])
def test_t5_encoder(t5_folder, layer):
    encoder = open_encoder(t5_folder, layer_index=layer, instruction=INSTRUCTION, template="chat")
    assert not encoder.is_decoder and encoder.num_blocks == 4 and encoder.prefix_ids == []
    plain = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    assert_equals_plain_class(encoder, plain, layer or -1)
    assert not any("decoder" in name for name, _ in encoder.model.named_parameters())


@pytest.mark.parametrize("layer", [None, -1, -2, 2])
def test_clip_text(clip_folder, layer):
    encoder = open_encoder(clip_folder, layer_index=layer)
    assert not encoder.is_decoder and encoder.num_blocks == 4 and encoder.prefix_ids == []
    plain = transformers.CLIPTextModel.from_pretrained(
        clip_folder, config=transformers.CLIPTextConfig(**CLIP_TEXT)
    ).eval()
    assert_equals_plain_class(encoder, plain, layer or -1)
    assert not any("vision" in name for name, _ in encoder.model.named_parameters())


def test_encoder_only_models_keep_their_special_tokens(t5_folder, clip_folder):
    t5, clip = open_encoder(t5_folder), open_encoder(clip_folder)
    for encoder, before, after in ((t5, 0, 1), (clip, 1, 1)):
        (empty, text), _ = encoder.tokenize(["", "cat"])
        assert len(empty) == before + after and text[-1] == encoder.tokenizer.eos_token_id
        assert encoder.null_embeds.shape == (before + after, 32)
        assert encoder.instruction_embeds.shape == (0, 32)


def test_encoder_only_models_are_cut_before_their_end_token(t5_folder, clip_folder):
    for encoder in (open_encoder(t5_folder, max_prompt_tokens=9), open_encoder(clip_folder, max_prompt_tokens=9)):
        (tokens,), (excess,) = encoder.tokenize([PROMPTS[2]])
        whole = encoder.tokenizer(PROMPTS[2])["input_ids"]
        assert excess == len(whole) - 9 > 0
        assert tokens == whole[:8] + whole[-1:] and len(tokens) == 9


def test_context_of_encoder_only_models(t5_folder, clip_folder):
    assert open_encoder(clip_folder).max_prompt_tokens == 20
    prompt_embeds, _ = open_encoder(clip_folder)(["cat " * 100])
    assert prompt_embeds.shape == (1, 20, 32)
    assert open_encoder(t5_folder, max_prompt_tokens=900).max_prompt_tokens == 900  # relative positions have no end


def test_instruction_is_no_part_of_an_encoder_only_fingerprint(t5_folder):
    one, other = (open_encoder(t5_folder, instruction=text).fingerprint() for text in ("a", "b"))
    assert one == other and one["final_norm"]


def test_padding_does_not_reach_t5_and_clip(t5_folder, clip_folder):
    for folder in (t5_folder, clip_folder):
        encoder = open_encoder(folder)
        alone = encoder(["a cat"])[0][0]
        together, mask = encoder(["a cat", PROMPTS[2][:30]])
        torch.testing.assert_close(together[0][mask[0]], alone, atol=1e-5, rtol=1e-5)


def test_bidirectional_model_of_another_kind_is_refused(save_model, tmp_path):
    """Run as if it were causal, its states would depend on the padding, and nobody would be told."""
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48
    )
    folder = save_model(tmp_path / "bert", config, transformers.BertModel)
    with pytest.raises(ValueError, match="bert"):
        _ = open_encoder(folder, template="plain").model


def test_model_without_attention_is_refused(save_model, tmp_path):
    """A state-space model has no keys and values to share: a clear message, not an AttributeError of its config."""
    folder = save_model(
        tmp_path / "mamba", transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=4)
    )
    with pytest.raises(ValueError, match="mamba"):
        _ = open_encoder(folder, template="plain").instruction_embeds


# -- real tokenizers --------------------------------------------------------------------------------------------------


def with_real_tokenizer(data, name, folder, config, model_class):
    shutil.copytree(data / "tokenizers" / name, folder)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    return folder


def test_qwen3_chat_template(data, tmp_path):
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, head_dim=4, tie_word_embeddings=True,
    )  # fmt: skip
    folder = with_real_tokenizer(data, "qwen3", tmp_path / "qwen3", config, transformers.Qwen3ForCausalLM)
    encoder = open_encoder(folder)
    text = encoder.tokenizer.decode(encoder.prefix_ids)
    assert text == f"<|im_start|>system\n{encoder.config.instruction}<|im_end|>\n<|im_start|>user\n"
    assert open_encoder(folder, template="plain", instruction="").prefix_ids == []  # Qwen has no BOS
    ids, excess = encoder.tokenize(["", "a dog", "一只狗 \U0001f415"])
    assert ids[0] == [] and not excess.any()
    assert [encoder.tokenizer.decode(row) for row in ids] == ["", "a dog", "一只狗 \U0001f415"]
    assert encoder(["a dog", ""])[0].shape == (2, 2, 8)


def test_gpt2_tokenizer_has_no_chat_template(data, tmp_path):
    config = transformers.GPT2Config(vocab_size=50257, n_embd=8, n_layer=3, n_head=2, n_positions=64)
    folder = with_real_tokenizer(data, "gpt2", tmp_path / "gpt2", config, transformers.GPT2LMHeadModel)
    with pytest.raises(ValueError, match="`template: plain`"):
        open_encoder(folder)
    encoder = open_encoder(folder, template="plain")
    assert encoder.tokenizer.decode(encoder.prefix_ids) == f"<|endoftext|>{encoder.config.instruction}\n"
    assert encoder(["a dog"])[0].isfinite().all()


def test_t5_tokenizer(data, tmp_path):
    config = transformers.T5Config(vocab_size=32128, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    folder = with_real_tokenizer(data, "t5", tmp_path / "t5", config, transformers.T5EncoderModel)
    encoder = open_encoder(folder)
    ids, _ = encoder.tokenize(["a dog", ""])
    assert ids[0][-1] == 1 and ids[1] == [1]
    assert encoder.null_embeds.shape == (1, 8)

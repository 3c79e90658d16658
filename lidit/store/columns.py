"""The names of the feature store, each defined once: tables, columns, keys of a field's metadata.

`pipelines` and `trainer` share this file and nothing else. A *text* is the name of a text column (`caption`,
`caption_original`), an *encoder* the short key of a frozen LLM (`llama3`, `qwen15`).
"""

from __future__ import annotations

from typing import Any

SAMPLES_TABLE = "samples.lance"
ENCODERS_TABLE = "encoders.lance"
RUNS_FOLDER = "runs"

IMAGE_ID = "image_id"  # string, unique in the table
IMAGE = "image"  # large_binary, the encoded image as it came (JPEG, PNG, WebP ...)
HEIGHT = "height"  # int32, pixels, upright (after EXIF rotation)
WIDTH = "width"  # int32, pixels
CAPTION = "caption"  # string, written by a VLM, or the prompt of a prompt table
CAPTION_ORIGINAL = "caption_original"  # string, the text that came with the image
SOURCE = "source"  # string, where the row came from: shard and key, or file
IMAGE_DIGEST = "image_digest"  # string, 32 hex digits: half the sha256 of `image`
IMAGE_PHASH = "image_phash"  # uint64, perceptual hash of `image`; null where nobody asked for it
TRUTH = "truth"  # string, JSON: what a rendered scene really holds
LATENTS = "latents"  # large_binary, (C, H, W): the VAE's mean, scaled as training wants it
LATENT_MOMENTS = "latent_moments"  # large_binary, (2C, H, W): mean, then deviation, both scaled
PROMPT = "prompt"  # string, text that an image is made of
PROMPT_INDEX = "prompt_index"  # int32, its place in the prompt set
PROMPT_RECORD = "prompt_record"  # string, JSON: all that the set says of it
SAMPLE_INDEX = "sample_index"  # int32, which of the prompt's images
SEED = "seed"  # int64, of the noise that an image is made of
GUIDANCE_SCALE = "guidance_scale"  # float32
NUM_INFERENCE_STEPS = "num_inference_steps"  # int32
WEIGHTS_DIGEST = "weights_digest"  # string, of the weights that made an image
BUCKET = "bucket"  # string, `HEIGHTxWIDTH` in pixels: the image size that the latents belong to

# Columns of the encoders table.
ENCODER = "encoder"
FINGERPRINT = "fingerprint"
ENCODER_CONFIG = "config"  # JSON: the EncoderConfig it was made with
EMBED_WIDTH = "width"
INSTRUCTION_EMBEDS = "instruction_embeds"  # float32 bytes, (P, E): the states of the shared prefix
NULL_EMBEDS = "null_embeds"  # float32 bytes, (L, E): the states of the empty prompt; L may be 0

# Keys of a field's metadata. A reader needs nothing else to decode the column.
META_CODEC = "lidit:codec"  # bf16 | fp32 | fp8_e4m3
META_WIDTH = "lidit:width"  # E, the encoder's hidden width
META_ENCODER = "lidit:encoder"
META_TEXT = "lidit:text"
META_CHANNELS = "lidit:channels"  # C, of latents
META_DOWNSCALE = "lidit:downscale"  # pixels along a side of one latent pixel
META_SCALING_FACTOR = "lidit:scaling_factor"  # what stored latents were multiplied with, after the shift
META_SHIFT_FACTOR = "lidit:shift_factor"  # what was subtracted from the VAE's own before
META_MOMENTS = "lidit:moments"  # mean | mean,deviation
META_STAGE = "lidit:stage"
META_READS = "lidit:reads"  # the column that a column is made from; without it there is nothing to do
META_ALSO_READS = "lidit:also_reads"  # a column that is looked at too where it is there
META_FINGERPRINT = "lidit:fingerprint"  # JSON: everything the values depend on
META_VERSIONS = "lidit:versions"  # JSON: library versions when the column was begun; a job that goes on compares


def embeds(text: str, encoder: str) -> str:
    """Column of ragged prompt embeddings, one `(L, E)` per row, encoded by the field's codec."""
    return f"{text}_embeds_{encoder}"


def length(text: str, encoder: str) -> str:
    """Column of L, the number of prompt tokens kept (int32)."""
    return f"{text}_length_{encoder}"


def truncated(text: str, encoder: str) -> str:
    """Column of the number of prompt tokens cut off beyond the limit (int32; 0 = the prompt is whole)."""
    return f"{text}_truncated_{encoder}"


def caption_status(column: str = CAPTION) -> str:
    """Column of what the quality gate says of a caption (string; `ok`, or why the caption is null)."""
    return f"{column}_status"


def caption_tokens(column: str = CAPTION) -> str:
    """Column of the caption's length in tokens of the VLM that wrote it (int32)."""
    return f"{column}_tokens"


def variant(column: str, name: str) -> str:
    """`latents`, `512` -> `latents_512`: the same for another resolution or autoencoder; the column itself for no name."""
    return f"{column}_{name}" if name else column


def bucket_of(latents: str) -> str:
    """`latents_512` or `latent_moments_512` -> `bucket_512`: the column that says which size a row's latents have."""
    return f"{BUCKET}{latents.removeprefix(LATENT_MOMENTS).removeprefix(LATENTS)}"


def error(stage: str) -> str:
    """Column of the reason why a row has nulls instead of the stage's columns (string; null = no error)."""
    return f"{stage}_error"


def metadata_of(field: Any) -> dict[str, str]:
    """Metadata of an Arrow field or schema as text; empty where there is none."""
    return {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}

"""Weights of a very small model, as the trainer exports them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def scene_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a very small, untrained LI-DiT for the demo's encoders and autoencoder, as the trainer exports them."""
    import dataclasses

    import torch

    from lidit.config import LIDiTConfig
    from lidit.diffusion import Flow, objective_to_dict
    from lidit.frozen.text import EncoderConfig, PromptEncoder
    from lidit.frozen.vae import VAE
    from lidit.layers import ZeroLinear
    from lidit.model import LIDiT
    from lidit.weights import save_weights

    configs = [
        EncoderConfig(name, str(ROOT / "demo" / "encoders" / f"{name}-tuned"), dtype="fp32", max_prompt_tokens=48)
        for name in ("llama", "qwen")
    ]
    encoders = [PromptEncoder(config, "cpu") for config in configs]
    torch.manual_seed(0)
    widths = {encoder.config.name: encoder.width for encoder in encoders}
    model = LIDiT(LIDiTConfig(widths, depth=1, width=32, heads=2, in_channels=4))
    for module in model.modules():
        if isinstance(module, ZeroLinear):
            torch.nn.init.normal_(module.weight, std=0.2)
    vae = str(ROOT / "demo" / "vae")
    extra = {
        "objective": objective_to_dict(Flow()),
        "encoders": {
            encoder.config.name: {"config": dataclasses.asdict(encoder.config), "fingerprint": encoder.fingerprint()}
            for encoder in encoders
        },
        "vae": {"model": vae, "fingerprint": VAE(vae, device="cpu").fingerprint()},
        "image_size": [16, 24],
    }
    return save_weights(tmp_path_factory.mktemp("scene") / "weights", model, extra=extra)

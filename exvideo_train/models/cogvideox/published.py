"""The published models' configs, as data: for plans without a download, and as the mould of the tiny models.

Facts of ``transformer/config.json``, ``vae/config.json`` and ``scheduler/scheduler_config.json`` of CogVideoX-2B
and CogVideoX-5B (arXiv 2408.06072; https://huggingface.co/THUDM/CogVideoX-5b).
"""

from __future__ import annotations

from typing import Any

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "CogVideoXTransformer3DModel",
    "_diffusers_version": "0.31.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}

TRANSFORMER_5B: dict[str, Any] = {
    **_TRANSFORMER,
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}

TRANSFORMER_2B: dict[str, Any] = {
    **_TRANSFORMER,
    "num_attention_heads": 30,
    "num_layers": 30,
    "use_rotary_positional_embeddings": False,
}

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 3,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_height": 480,
    "sample_width": 720,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}

VAE_5B: dict[str, Any] = {**_VAE, "scaling_factor": 0.7}
VAE_2B: dict[str, Any] = {**_VAE, "scaling_factor": 1.15258426}

_SCHEDULER: dict[str, Any] = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}

SCHEDULER_5B: dict[str, Any] = {**_SCHEDULER, "snr_shift_scale": 1.0}
SCHEDULER_2B: dict[str, Any] = {**_SCHEDULER, "snr_shift_scale": 3.0}

# As the hub's model cards name them: 5B has terms of its own, which "other" stands for.
LICENCE_BY_HUB_ID = {
    "THUDM/CogVideoX-5b": "other",
    "zai-org/CogVideoX-5b": "other",
    "THUDM/CogVideoX-2b": "apache-2.0",
    "zai-org/CogVideoX-2b": "apache-2.0",
}

# The hub ids under which the configs above are published, for resolving a plan's model without its weights.
TRANSFORMER_BY_HUB_ID: dict[str, dict[str, Any]] = {
    "THUDM/CogVideoX-5b": TRANSFORMER_5B,
    "zai-org/CogVideoX-5b": TRANSFORMER_5B,
    "THUDM/CogVideoX-2b": TRANSFORMER_2B,
    "zai-org/CogVideoX-2b": TRANSFORMER_2B,
}

"""What CogVideoX's Linears are called in other programs; ``{n}`` is a block."""

from __future__ import annotations

# DiffSynth-Studio <= 1.1.9 (models/cog_dit.py).
DIFFSYNTH_NAMES = {
    "patch_embed.text_proj": "context_embedder",
    "time_embedding.linear_1": "time_embedder.timestep_embedder.0",
    "time_embedding.linear_2": "time_embedder.timestep_embedder.2",
    "transformer_blocks.{n}.norm1.linear": "blocks.{n}.norm1.linear",
    "transformer_blocks.{n}.norm2.linear": "blocks.{n}.norm2.linear",
    "transformer_blocks.{n}.attn1.to_q": "blocks.{n}.attn1.to_q",
    "transformer_blocks.{n}.attn1.to_k": "blocks.{n}.attn1.to_k",
    "transformer_blocks.{n}.attn1.to_v": "blocks.{n}.attn1.to_v",
    "transformer_blocks.{n}.attn1.to_out.0": "blocks.{n}.attn1.to_out",
    "transformer_blocks.{n}.ff.net.0.proj": "blocks.{n}.ff.0",
    "transformer_blocks.{n}.ff.net.2": "blocks.{n}.ff.2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}

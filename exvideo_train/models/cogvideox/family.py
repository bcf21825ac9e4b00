"""CogVideoX as the registry knows it."""

from __future__ import annotations

from exvideo_train.models.cogvideox import encoding, objective, published, weights
from exvideo_train.models.cogvideox.names import DIFFSYNTH_NAMES
from exvideo_train.models.cogvideox.network import CogVideoXConfig, CogVideoXDiT
from exvideo_train.models.family import Family, Later
from exvideo_train.models.grid import LatentGrid

# The 3D VAE (vae/config.json): the first frame alone, then 4 frames a latent, 8x8 pixels a latent; it encodes in chunks
# of 8 frames, the first of 9, with a causal cache, and other lengths give poor latents. The DiT's patches are 2x2.
GRID = LatentGrid(frame_step=8, min_frames=1, frames_per_latent=4, pixels_per_latent=8, pixels_per_patch=16)


def _published_config(hub_id: str) -> CogVideoXConfig | None:
    fields = published.TRANSFORMER_BY_HUB_ID.get(hub_id)
    return None if fields is None else weights.config_from_fields(fields, hub_id)


COGVIDEOX: Family[CogVideoXConfig] = Family(
    name="cogvideox",
    class_name=weights.CLASS_NAME,
    subfolder="transformer",
    vae_class_name="AutoencoderKLCogVideoX",
    training_parts=("transformer", "scheduler"),
    encoder_parts=("vae", "text_encoder", "tokenizer"),
    grid=GRID,
    build=CogVideoXDiT,
    read_config=weights.read_config,
    load=weights.load,
    published_config=_published_config,
    num_base_frames=lambda config: config.sample_frames,
    noise_levels=objective.noise_levels,
    extension=Later("exvideo_train.extensions.lora:LoraExtension"),
    diffsynth_names=DIFFSYNTH_NAMES,
    latents_name="moments",
    stored=encoding.stored,
    stored_channels=lambda config: {"moments": 2 * config.out_channels, "text": config.text_embed_dim},
    conditions=encoding.conditions,
    text_length=lambda config: config.max_text_seq_length,
    read_text_length=encoding.read_text_length,
    read_normalisation=encoding.read_normalisation,
    read_stored_channels=encoding.read_stored_channels,
    text_encoder=Later("exvideo_train.models.cogvideox.encoders:TextEncoder"),
    video_encoder=Later("exvideo_train.models.cogvideox.encoders:VideoEncoder"),
    draw=Later("exvideo_train.models.cogvideox.sampler:draw"),
    licences=published.LICENCE_BY_HUB_ID,
)

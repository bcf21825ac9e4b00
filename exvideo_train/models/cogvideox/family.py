"""CogVideoX as the registry knows it."""

from __future__ import annotations

from exvideo_train.config.experiment import LORA_TARGETS
from exvideo_train.models.cogvideox import costs, objective, published, weights
from exvideo_train.models.cogvideox.network import CogVideoXBlock, CogVideoXConfig, CogVideoXDiT
from exvideo_train.models.family import BackboneFamily


def _text_length(config: CogVideoXConfig) -> int:
    return config.max_text_seq_length


def _sample_channels(config: CogVideoXConfig) -> tuple[int, int]:
    return config.out_channels, config.text_embed_dim


def _num_base_frames(config: CogVideoXConfig) -> int:
    return config.sample_frames


def _published_config(hub_id: str) -> CogVideoXConfig | None:
    fields = published.TRANSFORMER_BY_HUB_ID.get(hub_id)
    return None if fields is None else weights.config_from_fields(fields, hub_id)


COGVIDEOX: BackboneFamily[CogVideoXConfig] = BackboneFamily(
    name="cogvideox",
    class_name=weights.CLASS_NAME,
    subfolder="transformer",
    model_class=CogVideoXDiT,
    block_class=CogVideoXBlock,
    build=CogVideoXDiT,
    read_config=weights.read_config,
    load=weights.load,
    published_config=_published_config,
    default_lora_targets=tuple(LORA_TARGETS),
    noise_levels=objective.noise_levels,
    text_length=_text_length,
    sample_channels=_sample_channels,
    num_base_frames=_num_base_frames,
    num_tokens=costs.num_tokens,
    num_parameters=costs.num_parameters,
    num_lora_parameters=costs.num_lora_parameters,
    attention_flops=costs.attention_flops,
    block_forward_flops=costs.block_forward_flops,
    forward_flops=costs.forward_flops,
    lora_forward_flops=costs.lora_forward_flops,
)

"""One rank of a real engine on a tiny network: counts the bytes of all tensors between steps and at the peaks.

Started by tests/unit/test_plan.py with the ranks' places and STAGE, ACCUMULATION and BUCKET in the environment; writes
its figures to the file that is its argument.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exvideo_train.config.experiment import LORA_TARGETS, Experiment
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters
from exvideo_train.models.registry import FAMILIES
from exvideo_train.parallel import engine as engine_module
from exvideo_train.parallel.mesh import init_mesh
from exvideo_train.planning.trace import CostCounter


def held_bytes() -> int:
    gc.collect()
    sizes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                storage = thing.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def main() -> None:
    accumulation_steps = int(os.environ["ACCUMULATION"])
    config = Experiment()
    config.memory.zero_stage = int(os.environ["STAGE"])
    config.optim.accumulation_steps = accumulation_steps
    written = engine_module.deepspeed_config

    def with_small_bucket(config: Experiment) -> dict[str, Any]:
        options = written(config)
        options["zero_optimization"]["reduce_bucket_size"] = int(os.environ["BUCKET"])
        return options

    engine_module.deepspeed_config = with_small_bucket
    mesh = init_mesh(1, 120)
    family = FAMILIES[0]
    shape = dataclasses.replace(
        family.published_config("zai-org/CogVideoX-5b"),
        **{"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16},
        **{"time_embed_dim": 16, "text_embed_dim": 16, "max_text_seq_length": 4},
    )
    model = apply_lora(family.build(shape).to(torch.bfloat16), LoraExtension(128, 128, tuple(LORA_TARGETS)), seed=0)
    model.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    engine = engine_module.TrainingEngine(model, lora_parameters(model), config, mesh, "lora")
    latents_BTCHW, text_BLC, timesteps_B = torch.randn(1, 3, 16, 4, 4), torch.randn(1, 4, 16), torch.tensor([5])
    forward_peak = backward_peak = 0
    with CostCounter() as meter:
        for _ in range(accumulation_steps):
            meter.peak_bytes = start = meter.live_bytes
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = engine(latents_BTCHW, timesteps_B, text_BLC=text_BLC).square().mean()
            forward_peak = max(forward_peak, meter.peak_bytes - start)
            engine.backward(loss)
            backward_peak = max(backward_peak, meter.peak_bytes)
            del loss
            engine.step(1e-4)
    if mesh.is_main:
        figures = {
            "trained": trained,
            "frozen_bytes": frozen_bytes,
            "between_steps": held_bytes(),
            "forward_peak": forward_peak,
            "backward_peak": backward_peak,
        }
        Path(sys.argv[1]).write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

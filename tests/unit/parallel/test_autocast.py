"""A bf16 step through DeepSpeed's engine as it runs on CUDA: fp32 LoRA, bf16 backbone, products in bf16."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# On CUDA, DeepSpeed's engine asks torch.is_autocast_enabled(), without a device, whether an autocast is on around it,
# and turns it off. That question is about CUDA alone; here it is answered for the CPU.
SCRIPT = """
import sys
from pathlib import Path
import torch
ask = torch.is_autocast_enabled
torch.is_autocast_enabled = lambda *device: ask(*device) if device else ask("cpu")

from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters
from exvideo_train.models.registry import load_backbone
from exvideo_train.config.experiment import Experiment
from exvideo_train.parallel.engine import TrainingEngine
from exvideo_train.parallel.mesh import init_mesh
from exvideo_train.parallel.parallelize import parallelize

mesh = init_mesh(1, 60)
config = Experiment()
backbone = load_backbone(Path(sys.argv[1]), torch.bfloat16)
apply_lora(backbone, LoraExtension(4, 4.0, tuple(config.lora.targets)), seed=0)
backbone.train()
parallelize(backbone, config.memory, mesh, torch.bfloat16, has_dropout=False)
engine = TrainingEngine(backbone, lora_parameters(backbone), config, mesh, "lora")
seen = set()
layer = backbone.blocks[0].attn1.to_q.lora_A["default"]
layer.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
latents = torch.randn(1, 5, 16, 8, 12)
text = torch.randn(1, backbone.config.max_text_seq_length, backbone.config.text_embed_dim)
output = engine(latents, torch.tensor([500]), text_BLC=text)
assert output.dtype == torch.bfloat16, output.dtype
assert seen == {(torch.bfloat16, torch.bfloat16)}, seen
engine.backward(output.float().square().mean())
applied, norm = engine.step(1e-3)
assert applied and 0 < norm < float("inf"), (applied, norm)
print("step applied")
"""


def test_engine_computes_in_bf16_where_it_turns_off_autocast_around_it(tiny_model_5b: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_model_5b)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step applied" in done.stdout

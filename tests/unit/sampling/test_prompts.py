"""What the sampler says about prompts."""

import torch

from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.sampler import SamplerSettings
from exvideo_train.sampling.pipeline import Sampling, _encode_prompts


def test_a_prompt_that_is_cut_is_named(tiny_model_5b, capsys):
    settings = SamplerSettings("ddim", 2, 6.0, seed=0)
    sampling = Sampling(tiny_model_5b, Geometry(9, 64, 96, 8), settings, torch.device("cpu"), torch.float32)
    long = "a rabbit wakes up and stretches " * 20
    texts = _encode_prompts(sampling, ["a rabbit", long, long])
    assert set(texts) == {"", "a rabbit", long}
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "the prompt has " in warning
    assert "the model reads 16" in warning
    assert warning.strip().endswith(long.strip())

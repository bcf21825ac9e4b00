"""What the sampler says about prompts."""

import torch

from exvideo_train.geometry import Geometry
from exvideo_train.models.stages import SamplerSettings
from exvideo_train.sampling.pipeline import Sampling, _conditions


def test_a_prompt_that_is_cut_is_named(tiny_model_5b, capsys):
    settings = SamplerSettings("ddim", 2, 6.0, seed=0)
    sampling = Sampling(tiny_model_5b, Geometry(9, 64, 96, 8), settings, torch.device("cpu"), torch.float32)
    long = "a rabbit wakes up and stretches " * 20
    by_prompt, unconditional = _conditions(sampling, ["a rabbit", long, long])
    assert set(by_prompt) == {"a rabbit", long}
    assert {len(conditions) for conditions in (*by_prompt.values(), unconditional)} == {1}
    assert not torch.equal(by_prompt["a rabbit"]["text_BLC"], unconditional["text_BLC"])
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "the prompt has " in warning
    assert "the model reads 16" in warning
    assert warning.strip().endswith(long.strip())

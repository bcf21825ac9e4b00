"""From a VAE's latents to a network's and back, against the formula written out channel by channel."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from exvideo_train.models.normalisation import Normalisation

ONE = Normalisation((0.7,))
EACH = Normalisation((0.5, 2.0, 4.0), (1.0, 0.0, -3.0), sample=False)


def test_a_latent_is_drawn_from_the_posterior_and_scaled() -> None:
    generator = torch.Generator().manual_seed(0)
    stored_CTHW = torch.randn(6, 2, 3, 4, generator=generator).bfloat16()
    noise_TCHW = torch.randn(2, 3, 3, 4, generator=generator)
    latents_TCHW = ONE.latents(stored_CTHW, noise_TCHW)
    assert latents_TCHW.shape == noise_TCHW.shape
    for channel in range(3):
        mean, log_variance = stored_CTHW[channel].float(), stored_CTHW[3 + channel].float()
        expected = 0.7 * (mean + (log_variance / 2).exp() * noise_TCHW[:, channel])
        torch.testing.assert_close(latents_TCHW[:, channel], expected)
    torch.testing.assert_close(ONE.mean(stored_CTHW), 0.7 * stored_CTHW[:3].float())
    torch.testing.assert_close(ONE.deviation(stored_CTHW), 0.7 * (stored_CTHW[3:].float() / 2).exp())
    assert ONE.latent_channels(6) == 3


def test_channels_have_shifts_and_factors_of_their_own() -> None:
    stored_CTHW = torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    latents_TCHW = EACH.latents(stored_CTHW, torch.full((2, 3, 3, 4), torch.nan))
    for channel, (factor, shift) in enumerate(((0.5, 1.0), (2.0, 0.0), (4.0, -3.0))):
        torch.testing.assert_close(latents_TCHW[:, channel], (stored_CTHW[channel] - shift) * factor)
    torch.testing.assert_close(EACH.undo(latents_TCHW.transpose(0, 1)), stored_CTHW)
    assert not EACH.deviation(stored_CTHW).any()
    assert EACH.latent_channels(3) == 3


@pytest.mark.parametrize(
    "normalisation", [ONE, EACH, Normalisation((0.5,), (0.1,)), Normalisation((0.5,), sample=False)]
)
def test_descriptions_are_read_back(normalisation: Normalisation) -> None:
    content = json.loads(json.dumps(normalisation.to_json()))
    assert Normalisation.from_json(content) == normalisation
    assert ("scaling_factor" in content) == (normalisation == ONE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "scaling_factor is missing"),
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"scaling_factor": True}, "scaling_factor=True"),
        ({"scaling_factor": math.nan}, "scaling_factor=nan"),
        ({"normalisation": []}, "factor, shift and sample"),
        ({"normalisation": {"factor": [], "shift": [0], "sample": True}}, "factor"),
        ({"normalisation": {"factor": [1e9], "shift": [0], "sample": True}}, "1000000000"),
        ({"normalisation": {"factor": [1], "shift": [math.inf], "sample": True}}, "shift=inf"),
        ({"normalisation": {"factor": [1], "shift": [0], "sample": 1}}, "sample=1"),
    ],
)
def test_others_are_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Normalisation.from_json(content)

"""The objective against diffusers' scheduler, computed in float64."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from exvideo_train.models.cogvideox.objective import alphas_cumprod
from exvideo_train.models.noise_levels import NoiseLevels, squared_error

PUBLISHED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
SETTINGS = {"5b": PUBLISHED | {"snr_shift_scale": 1.0}, "2b": PUBLISHED | {"snr_shift_scale": 3.0}}
EDGES = [0, 1, 2, 83, 500, 997, 998, 999]


@pytest.fixture(params=list(SETTINGS))
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture
def latents_and_noise():
    generator = torch.Generator().manual_seed(3)
    shape = (len(EDGES), 5, 4, 6, 8)
    return tuple(torch.randn(shape, generator=generator) for _ in range(2))


def test_schedule_equals_the_library_in_float64(settings):
    ours = alphas_cumprod(settings)
    reference = CogVideoXDDIMScheduler.from_config(settings).alphas_cumprod
    assert ours.dtype == reference.dtype == torch.float64
    assert torch.equal(ours, reference) or (ours - reference).abs().max() < 1e-15
    assert ours[-1] == 0


def test_a_field_missing_from_the_file_takes_the_library_default():
    file = {"prediction_type": "v_prediction"}
    reference = CogVideoXDDIMScheduler.from_config(file).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(file), reference, rtol=0, atol=1e-15)


def test_the_two_published_schedules_differ():
    a, b = (alphas_cumprod(SETTINGS[name])[500] for name in ("5b", "2b"))
    assert abs(a - b) > 0.05


def test_noise_and_target_equal_the_library_in_float64(settings, latents_and_noise):
    latents, noise = latents_and_noise
    timesteps = torch.tensor(EDGES)
    library = CogVideoXDDIMScheduler.from_config(settings)
    mixed = NoiseLevels.v_prediction(alphas_cumprod(settings)).mix(latents, noise, timesteps)
    for value, reference in zip(mixed, (library.add_noise, library.get_velocity), strict=True):
        assert value.dtype == torch.float32
        expected = reference(latents.double(), noise.double(), timesteps)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=5e-7)


def test_half_precision_latents_are_mixed_in_float32(settings, latents_and_noise):
    latents, noise = (tensor.bfloat16() for tensor in latents_and_noise)
    timesteps, levels = torch.tensor(EDGES), NoiseLevels.v_prediction(alphas_cumprod(settings))
    noisy, _ = levels.mix(latents, noise, timesteps)
    assert noisy.dtype == torch.float32
    assert not torch.equal(noisy[0], latents[0].float())  # a bf16 sigma would be 0 at timestep 0
    torch.testing.assert_close(noisy, levels.mix(latents.float(), noise.float(), timesteps)[0], rtol=0, atol=0)


def test_weighted_x0_loss_is_the_velocity_mse(settings, latents_and_noise):
    latents, noise = latents_and_noise
    timesteps = torch.tensor([5, 83, 250, 400, 600, 800, 950, 999])
    prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    loss = squared_error(
        prediction, NoiseLevels.v_prediction(alphas_cumprod(settings)).mix(latents, noise, timesteps)[1]
    )

    alpha_bar = alphas_cumprod(settings)[timesteps].view(-1, 1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * latents.double() + (1 - alpha_bar).sqrt() * noise.double()
    predicted_x0 = alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * prediction.double()
    weighted = (predicted_x0 - latents.double()).square() / (1 - alpha_bar)
    torch.testing.assert_close(loss.mean.double(), weighted.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.per_position_BT.double(), weighted.mean(dim=(2, 3, 4)), rtol=1e-5, atol=0)


def test_coarser_losses_are_means_of_the_finer(latents_and_noise):
    loss = squared_error(*latents_and_noise)
    assert loss.per_position_BT.shape == (len(EDGES), 5)
    torch.testing.assert_close(loss.per_sample_B, loss.per_position_BT.mean(dim=1))
    torch.testing.assert_close(loss.mean, (latents_and_noise[0] - latents_and_noise[1]).square().mean())

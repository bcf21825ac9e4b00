"""T5 and the VAE against transformers and diffusers' own pipeline, in fp32 on the tiny model."""

import json
import shutil

import numpy as np
import pytest
import torch

from exvideo_train.errors import UserError
from exvideo_train.models.cogvideox.encoders import TextEncoder, VideoEncoder
from exvideo_train.models.stages import decode_whole
from exvideo_train.planning.trace import CostCounter


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from exvideo_train.models.cogvideox.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny_5b", "5b")


@pytest.fixture(scope="module")
def pipeline(model_path):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(model_path, torch_dtype=torch.float32)
    return pipeline


@pytest.fixture
def frames_FHWC():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(17, 3, 4, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(96, 160), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_text_equals_diffusers_pipeline(model_path, pipeline):
    captions = ["a rabbit wakes up", "", "long " * 100]
    encoder = TextEncoder(model_path, "cpu", torch.float32, 16)
    expected, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=16)
    torch.testing.assert_close(encoder.encode(captions), expected, rtol=1e-5, atol=1e-5)
    one_by_one = torch.cat([encoder.encode([caption]) for caption in captions])
    torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [16, 226])
def test_tokens_that_are_cut_are_counted(model_path, length):
    """As many as the tokenizer gives beyond the limit, its end token included."""
    encoder = TextEncoder(model_path, "cpu", torch.float32, length)
    words = "a rabbit wakes up and stretches in the morning sun " * 40
    longest = max(n for n in range(len(words)) if encoder.num_tokens_cut(words[:n]) == 0)
    assert encoder.num_tokens_cut("") == 0
    fits, beyond = words[:longest], words[: longest + 40]
    assert encoder.num_tokens_cut(beyond) > 0
    # The embedding is of the cut caption: what follows the limit changes nothing, what precedes it does.
    assert torch.equal(encoder.encode([beyond]), encoder.encode([beyond + " and so on"]))
    assert not torch.equal(encoder.encode([fits]), encoder.encode([fits[:-12]]))
    # Counting leaves the tokenizer's padding and cutting as they were.
    assert encoder.encode([words]).shape[1] == length


def test_text_equals_transformers_without_mask(model_path):
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(model_path / "tokenizer")
    model = T5EncoderModel.from_pretrained(model_path / "text_encoder", dtype=torch.float32).eval()
    tokens = tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
    text_BLC = TextEncoder(model_path, "cpu", torch.float32, 16).encode(["a cat"])
    assert text_BLC.shape == (1, 16, 32)
    assert torch.equal(text_BLC, expected)


@pytest.fixture(scope="module")
def tiled_model_path(model_path, tmp_path_factory):
    """The tiny model with tiles whose overlaps are whole latents, as the published 480x720 has."""
    folder = tmp_path_factory.mktemp("tiled") / "model"
    shutil.copytree(model_path, folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_height": 96, "sample_width": 160}))
    return folder


@pytest.mark.parametrize("tiling", [False, True])
def test_moments_equal_diffusers(tiled_model_path, pipeline, frames_FHWC, tiling):
    from diffusers import AutoencoderKLCogVideoX
    from PIL import Image

    vae = AutoencoderKLCogVideoX.from_pretrained(tiled_model_path / "vae", torch_dtype=torch.float32)
    if tiling:
        vae.enable_tiling()
    video = pipeline.video_processor.preprocess_video([Image.fromarray(f.numpy()) for f in frames_FHWC])
    with torch.no_grad():
        expected = vae.encode(video).latent_dist
    moments_CTHW = VideoEncoder(tiled_model_path, "cpu", torch.float32, tiling).encode(frames_FHWC)
    assert moments_CTHW.shape == (32, 5, 12, 20)
    # Diffusers brings pixels to -1..1 in another order of operations: their last bit may differ.
    torch.testing.assert_close(moments_CTHW[:16], expected.mean[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments_CTHW, expected.parameters[0], rtol=1e-5, atol=1e-5)


def test_tiled_moments_differ(tiled_model_path, frames_FHWC):
    tiled = VideoEncoder(tiled_model_path, "cpu", torch.float32, True).encode(frames_FHWC[:1])
    whole = VideoEncoder(tiled_model_path, "cpu", torch.float32, False).encode(frames_FHWC[:1])
    assert (tiled - whole).abs().max() > 1e-3


def test_tiles_that_do_not_add_up_are_refused(model_path, frames_FHWC):
    with pytest.raises(UserError, match="tiling=true"):
        VideoEncoder(model_path, "cpu", torch.float32, True).encode(frames_FHWC[:1])


def test_decoding_equals_diffusers_pipeline(model_path, pipeline):
    pipeline.vae.disable_tiling()
    latents_TCHW = torch.randn(5, 16, 8, 12, generator=torch.Generator().manual_seed(1)) * 0.7
    with torch.no_grad():
        expected = pipeline.video_processor.postprocess_video(
            pipeline.decode_latents(latents_TCHW[None]), output_type="np"
        )[0]
    chunks = list(VideoEncoder(model_path, "cpu", torch.float32, False).decode(latents_TCHW))
    assert [len(frames) for frames, _ in chunks] == [9, 8]
    assert {share_finite for _, share_finite in chunks} == {1.0}
    frames_FHWC = torch.cat([frames for frames, _ in chunks])
    assert frames_FHWC.shape == (17, 64, 96, 3)
    assert frames_FHWC.dtype == torch.uint8
    assert np.abs(frames_FHWC.numpy().astype(float) - expected * 255).max() <= 0.501


@pytest.mark.parametrize(("num_latents", "tiling"), [(1, False), (2, False), (13, False), (13, True), (4, True)])
def test_decoding_in_chunks_equals_the_published_decoding(tiled_model_path, pipeline, num_latents, tiling):
    """Bit for bit, a second video too: the first one's caches are gone."""
    encoder = VideoEncoder(tiled_model_path, "cpu", torch.float32, tiling)
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(tiled_model_path / "vae")
    if tiling:
        vae.enable_tiling()
    for seed in (1, 2):
        latents_TCHW = torch.randn(num_latents, 16, 8, 12, generator=torch.Generator().manual_seed(seed)) * 0.7
        with torch.no_grad():
            scaled = encoder.normalisation.undo(latents_TCHW.transpose(0, 1))[None]
            expected = (vae.decode(scaled).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0) * 255
        assert torch.equal(decode_whole(encoder, latents_TCHW), expected.round().byte())


@pytest.mark.parametrize("tiling", [False, True])
def test_memory_of_decoding_does_not_grow_with_the_length(tiled_model_path, tiling):
    """But for the latents themselves: frames go where they are taken, chunk by chunk."""
    encoder, peaks = VideoEncoder(tiled_model_path, "cpu", torch.float32, tiling), []
    for num_latents in (5, 25):
        latents_TCHW = torch.randn(num_latents, 16, 8, 12)
        with CostCounter() as meter:
            for frames_FHWC, _ in encoder.decode(latents_TCHW):
                assert len(frames_FHWC) <= 12
                del frames_FHWC
        peaks.append(meter.peak_bytes - 4 * latents_TCHW.numel())
    assert peaks[1] < 1.02 * peaks[0]


@pytest.mark.parametrize("chunks_before", [0, 1, 3])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")]
)
def test_decoding_that_runs_out_of_memory_goes_on_in_tiles(tiled_model_path, monkeypatch, capsys, chunks_before, error):
    latents_TCHW = torch.randn(9, 16, 8, 12, generator=torch.Generator().manual_seed(1)) * 0.7
    tiled, whole = (
        decode_whole(VideoEncoder(tiled_model_path, "cpu", torch.float32, tiling), latents_TCHW)
        for tiling in (True, False)
    )
    encoder = VideoEncoder(tiled_model_path, "cpu", torch.float32, False)
    decode, calls = encoder._vae.decode, []

    def decode_tiles_only(latents):
        calls.append(latents)
        if not encoder._vae.use_tiling and len(calls) > chunks_before:
            raise error
        return decode(latents)

    monkeypatch.setattr(encoder._vae, "decode", decode_tiles_only)
    frames = decode_whole(encoder, latents_TCHW)
    num_whole = 8 * chunks_before + 1 if chunks_before else 0
    assert torch.equal(frames[:num_whole], whole[:num_whole])
    assert torch.equal(frames[num_whole:], tiled[num_whole:])
    assert "decoding in tiles" in capsys.readouterr().err


def test_bfloat16_is_near_float32(model_path, frames_FHWC):
    full = VideoEncoder(model_path, "cpu", torch.float32, False).encode(frames_FHWC)
    half = VideoEncoder(model_path, "cpu", torch.bfloat16, False).encode(frames_FHWC)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.05


def test_bad_input_is_named(model_path, tmp_path):
    encoder = VideoEncoder(model_path, "cpu", torch.float32, False)
    with pytest.raises(UserError, match="num_frames=16"):
        encoder.encode(torch.zeros(16, 64, 96, 3, dtype=torch.uint8))
    encoder.close()
    with pytest.raises(UserError, match=r"text_encoder|tokenizer"):
        TextEncoder(tmp_path, "cpu", torch.float32, 16)

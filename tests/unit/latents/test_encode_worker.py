"""One encoder's loop over a work list, with the tiny model and the real clip."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.latents.encode_worker import ClipEncoder, EncodeLoop, not_finite
from exvideo_train.latents.fingerprint import model_fingerprint
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.work import WorkList
from exvideo_train.models.cogvideox.encoding import read_normalisation

GEOMETRY = Geometry(9, 32, 48, 25)


def test_captions_shared_by_clips_are_encoded_once(tiny_model_5b, clip_path, tmp_path):
    fingerprint = model_fingerprint(
        tiny_model_5b, GEOMETRY, decoder="pyav", vae_dtype="fp32", text_dtype="fp32", tiling=False
    )
    store = LatentStore.create(tmp_path / "store", read_normalisation(tiny_model_5b))
    store.add_geometry(fingerprint)
    settings = EncodeSettings(
        model_path=tiny_model_5b,
        store_path=store.path,
        fingerprint=fingerprint,
        normalisation=store.normalisation,
        dtype="fp32",
        tiling=False,
        decode_workers=2,
        prefetch_clips=2,
        clip_timeout_seconds=120.0,
        recycle_after_clips=100,
    )
    captions = ["a rabbit"] * 5 + ["a tree", "a rabbit in a tree"] + ["a meadow"] * 2
    records = [
        ClipRecord(make_clip_id("t", str(clip_path), 0.4 * n, None), "t", str(clip_path), 0.4 * n, None, caption)
        for n, caption in enumerate(captions)
    ]
    WorkList(store.path).create(records, num_encoders=1)
    encoder = ClipEncoder(settings, "cpu")
    calls: Counter[str] = Counter()
    encode = encoder._text.encode

    def counted(captions):
        calls.update(captions)
        return encode(captions)

    encoder._text.encode = counted
    messages = []
    loop = EncodeLoop(settings, "one", messages.append)
    loop.run(encoder)
    assert calls == Counter({"": 1, **dict.fromkeys(captions, 1)})
    assert sorted(store.clip_ids_on_disk(GEOMETRY)) == sorted(record.clip_id for record in records)
    assert {store.read(record.clip_id, GEOMETRY).caption for record in records} == set(captions)
    assert loop.totals.num_encoded == len(records)
    assert Counter(kind for kind, *_ in messages) == {"began": len(records), "settled": len(records)}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_too_little_memory_is_named_however_it_shows(error):
    with pytest.raises(UserError, match="set tiling=true"):
        clip_encoder_that_raises(error).frame_tensors(torch.zeros(9, 32, 48, 3, dtype=torch.uint8), 8.0)


def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        clip_encoder_that_raises(RuntimeError("CUDA error: an illegal memory access")).frame_tensors(
            torch.zeros(9, 32, 48, 3, dtype=torch.uint8), 8.0
        )


def clip_encoder_that_raises(error):
    def encode(frames_FHWC, fps):
        raise error

    encoder = ClipEncoder.__new__(ClipEncoder)
    encoder._video = SimpleNamespace(tensors=encode)
    return encoder


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_a_failure_of_their_encoder(value):
    whole, broken = torch.zeros(2, 3), torch.tensor([0.0, value])
    assert not_finite({"x": whole}, {"x": whole}) is None
    for moments, text, encoder in ((broken, whole, "the VAE"), (whole, broken, "the text encoder")):
        failure = not_finite({"moments": moments}, {"text": text})
        assert failure is not None
        assert failure.reason == "not_finite"
        assert failure.detail.startswith(encoder)

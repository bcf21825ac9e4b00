import pytest
import torch

from exvideo_train.geometry import Geometry
from exvideo_train.latents.fingerprint import Fingerprint
from exvideo_train.latents.store import LatentStore

GEOMETRY = Geometry(9, 32, 48, 8)


def fingerprint_of(geometry=GEOMETRY, **changes):
    fields = {
        "vae_sha256": "v" * 64,
        "text_encoder_sha256": "t" * 64,
        "tokenizer_sha256": "k" * 64,
        "vae_dtype": "fp32",
        "text_dtype": "fp32",
        "tiling": False,
        "text_length": 5,
        "num_frames": geometry.num_frames,
        "height": geometry.height,
        "width": geometry.width,
        "fps": float(geometry.fps),
    }
    return Fingerprint(**(fields | changes))


def fill(store, geometry, num_clips):
    generator = torch.Generator().manual_seed(0)
    entries = list(store.read_index().values())
    for number in range(num_clips):
        shape = (4, geometry.num_latent_frames, geometry.latent_height, geometry.latent_width)
        clip_id = f"{number * 7919:016x}"[::-1]
        entries.append(
            store.write_clip(
                clip_id,
                geometry,
                torch.randn(shape, generator=generator),
                torch.randn((5, 6), generator=generator),
                f"caption {number}",
            )
        )
    store.write_empty_prompt(torch.full((5, 6), 0.5))
    store.write_index(entries)
    return [entry.clip_id for entry in entries]


@pytest.fixture
def store(tmp_path):
    store = LatentStore.create(tmp_path / "store", scaling_factor=0.7)
    store.add_geometry(fingerprint_of())
    fill(store, GEOMETRY, 12)
    return store

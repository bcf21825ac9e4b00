import pytest
import torch

from exvideo_train.geometry import Geometry
from exvideo_train.latents.fingerprint import Fingerprint
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.family import GRID
from exvideo_train.models.normalisation import Normalisation

GEOMETRY = Geometry(9, 32, 48, 8)


def fingerprint_of(geometry=GEOMETRY, **changes):
    fields = {
        "sha256": {"vae": "v" * 64, "text_encoder": "t" * 64, "tokenizer": "k" * 64},
        "vae_dtype": "fp32",
        "text_dtype": "fp32",
        "tiling": False,
        "text_length": 5,
        "num_frames": geometry.num_frames,
        "height": geometry.height,
        "width": geometry.width,
        "fps": float(geometry.fps),
    }
    digests = {name: changes.pop(f"{name}_sha256", digest) for name, digest in fields.pop("sha256").items()}
    return Fingerprint(sha256=digests, **(fields | changes))


def fill(store, geometry, num_clips):
    generator = torch.Generator().manual_seed(0)
    entries = list(store.read_index().values())
    for number in range(num_clips):
        shape = (4, *GRID.shape_THW(geometry))
        clip_id = f"{number * 7919:016x}"[::-1]
        entries.append(
            store.write_clip(
                clip_id,
                geometry,
                {
                    "moments": torch.randn(shape, generator=generator),
                    "text": torch.randn((5, 6), generator=generator),
                },
                f"caption {number}",
            )
        )
    store.write_empty_prompt({"text": torch.full((5, 6), 0.5)})
    store.write_index(entries)
    return [entry.clip_id for entry in entries]


@pytest.fixture
def store(tmp_path):
    store = LatentStore.create(tmp_path / "store", Normalisation((0.7,)))
    store.add_geometry(fingerprint_of())
    fill(store, GEOMETRY, 12)
    return store

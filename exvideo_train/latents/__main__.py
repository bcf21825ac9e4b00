"""Check, measure or look at a latent store.

python -m exvideo_train.latents verify latents=DIR
python -m exvideo_train.latents stats latents=DIR
python -m exvideo_train.latents preview latents=DIR model_path=MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

from exvideo_train.config.latents import InspectLatents, StoreAction
from exvideo_train.entry import run_command
from exvideo_train.errors import UserError
from exvideo_train.latents.store import LatentStore


def inspect_latents(config: InspectLatents) -> None:
    """Run the command; damage that is not repaired ends it with status 1."""
    from exvideo_train.latents import inspection

    store = LatentStore.open(config.latents)
    if config.action is StoreAction.stats:
        print(inspection.describe_stats(store, config.num_clips or 200))
    elif config.action is StoreAction.preview:
        _preview(config, store)
    else:
        found = inspection.verify_store(store, config.repair, config.num_workers)
        print(found.describe())
        if found.is_clean:
            print("the store is whole")
        elif config.repair:
            print("repaired: damaged files are deleted, the index holds what is whole; encode_latents fills the gaps")
        else:
            raise SystemExit(1)


def _preview(config: InspectLatents, store: LatentStore) -> None:
    import torch

    from exvideo_train.backbones.hub import resolve_model_path
    from exvideo_train.latents import inspection

    if not config.model_path:
        raise UserError("model_path is not given: preview needs the model that encoded the store")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(config.output) if config.output else store.path / "reports"
    model_path = resolve_model_path(config.model_path, None, ("vae",))
    for path in inspection.write_previews(store, model_path, device, config.num_clips or 4, folder):
        print(path)


def main() -> None:
    """Turn the first word into the option that it is short for."""
    if len(sys.argv) > 1 and sys.argv[1] in StoreAction.__members__:
        sys.argv[1] = f"action={sys.argv[1]}"
    run_command(InspectLatents, inspect_latents, "inspect_latents", __doc__ or "")


if __name__ == "__main__":
    main()

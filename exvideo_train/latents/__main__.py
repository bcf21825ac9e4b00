"""Check, measure or look at a latent store.

python -m exvideo_train.latents verify latents=DIR
python -m exvideo_train.latents stats latents=DIR
python -m exvideo_train.latents preview latents=DIR model_path=MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

from exvideo_train.config.latents import InspectLatents, StoreAction
from exvideo_train.devices import choose_devices
from exvideo_train.entry import run_command
from exvideo_train.errors import UserError
from exvideo_train.latents.inspection import describe_stats, write_previews
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.untrusted import LINK_REMEDY, UNREADABLE_REMEDY, exists_inside
from exvideo_train.latents.verification import verify_store
from exvideo_train.models.hub import resolve_model_path


def inspect_latents(config: InspectLatents) -> None:
    """Run the command; what is not repaired, or cannot be, ends it with status 1."""
    store = LatentStore.open(config.latents)
    if config.action is StoreAction.stats:
        print(describe_stats(store, config.num_clips or 200))
    elif config.action is StoreAction.preview:
        _preview(config, store)
    else:
        _verify(config, store)


def _verify(config: InspectLatents, store: LatentStore) -> None:
    found = verify_store(store, config.repair, config.num_workers)
    print(found.describe())
    if found.is_clean:
        print("the store is whole")
        return
    for path in found.moved:
        print(f"kept {path}")
    if config.repair and found.has_damage and found.index_unreadable is None:
        print("repaired: damaged files are in damaged/, the index holds what is whole; encode_latents fills the gaps")
    if found.unreadable:
        print(f"not whole: {len(found.unreadable)} of what could not be read; {UNREADABLE_REMEDY}, and verify again")
    if found.survey.links:
        print(f"not whole: {len(found.survey.links)} link(s); {LINK_REMEDY}, and verify again")
    if not (config.repair and found.is_repairable):
        raise SystemExit(1)


def _preview(config: InspectLatents, store: LatentStore) -> None:
    if not config.model_path:
        raise UserError("model_path is not given: preview needs the model that encoded the store")
    device = choose_devices(config.device)[0]
    folder = Path(config.output) if config.output else store.path / "reports"
    if not config.output:
        exists_inside(store.path, folder)
    model_path = resolve_model_path(config.model_path, None, ("vae",))
    for path in write_previews(store, model_path, device, config.num_clips or 4, folder):
        print(path)


def main() -> None:
    """Turn the first word into the option that it is short for."""
    if len(sys.argv) > 1 and sys.argv[1] in StoreAction.__members__:
        sys.argv[1] = f"action={sys.argv[1]}"
    run_command(InspectLatents, inspect_latents, "inspect_latents", __doc__ or "")


if __name__ == "__main__":
    main()

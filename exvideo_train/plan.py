"""``python -m exvideo_train.plan``: what an experiment will take, before any GPU is rented."""

from __future__ import annotations

from pathlib import Path

from exvideo_train.config.plan import DeviceKind, Plan
from exvideo_train.entry import run_command
from exvideo_train.files import atomic_write_json, refuse_inputs
from exvideo_train.parallel.hardware import device_by_name
from exvideo_train.planning.forecast import disk, find_model, forecast
from exvideo_train.planning.measures import measures_table
from exvideo_train.planning.suggestions import ways_to_be_faster, ways_to_fit
from exvideo_train.planning.tables import as_json, measures_json, measures_text, text

USAGE = """
python -m exvideo_train.plan +exp=129f [gpus=8] [device=a100_80gb] [options]

Memory by category, FLOPs, bytes on the wire, expected step time, days and disk of an experiment, computed from the
real model and recomputation policy without weights, network or GPU. Says whether it fits and, if not, what would.

  python -m exvideo_train.plan +exp=129f memory=keep_attention device=h100 price=2.5
  python -m exvideo_train.plan +exp=257f gpus=16
  python -m exvideo_train.plan +exp=129f measures=true
"""
# Step times are printed for these in any case.
COMPARED = (DeviceKind.a100_80gb, DeviceKind.h100, DeviceKind.h200)


def plan(config: Plan) -> None:
    """Print the plan, and write it as JSON if asked."""
    model = find_model(config)
    if config.json:
        model_files = Path(config.model.path).expanduser().rglob("*")
        refuse_inputs("json", [Path(config.json)], {"model.path": model_files})
    if config.measures:
        added, without = measures_table(config, model)
        print(measures_text(config, added, without, device_by_name(config.device.value).memory_gib))
        content = measures_json(added, without)
    else:
        here = forecast(config, model)
        kinds = dict.fromkeys((config.device, *COMPARED))
        others = [forecast(config, model, kind.value) for kind in kinds]
        suggestions = ways_to_be_faster(config, model, here) if here.fits else ways_to_fit(config, model)
        on_disk = disk(config, model, here.trained)
        print(text(config, model, here, others, on_disk, suggestions))
        content = as_json(here, others, on_disk, suggestions)
    if config.json:
        atomic_write_json(Path(config.json), content)


def main() -> None:
    run_command(Plan, plan, name="plan", usage=USAGE)


if __name__ == "__main__":
    main()

"""``python -m exvideo_train.sample``: prompts to videos, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exvideo_train.config.commands import Sample
from exvideo_train.entry import run_command
from exvideo_train.files import refuse_inputs
from exvideo_train.signals import INTERRUPTED_STATUS, sigterm_interrupts

if TYPE_CHECKING:
    from exvideo_train.extensions.extension import Trained
    from exvideo_train.sampling.work import Job

USAGE = """\
Make videos from prompts, with adapters, and from the same noise without them. Finished videos are not made again.

  python -m exvideo_train.sample +exp=129f adapter=A.safetensors prompt="..." compare=true output=DIR
  python -m exvideo_train.sample +exp=129f adapter=[A.safetensors,B.safetensors:0.7] prompts_file=P.jsonl output=DIR
  python -m exvideo_train.sample +exp=129f adapter=A.safetensors prompt_set=english seeds=4 compare=true output=DIR
  python -m exvideo_train.sample +exp=129f latents=DIR output=DIR
"""


def sample(config: Sample) -> None:
    """Check everything that can be checked, then sample."""
    from exvideo_train.devices import choose_devices

    devices = choose_devices(config.device)
    if config.latents is not None:
        from exvideo_train.sampling.kept import decode_kept

        decode_kept(config, devices[0])
        return
    job = make_job(config)
    from exvideo_train.sampling.output import prepare_folder
    from exvideo_train.sampling.work import run_job

    print(
        f"{len(job.requests)} prompts and seeds x {len(job.sampling.variants)} variants "
        f"({', '.join(variant.name for variant in job.sampling.variants)}) on {', '.join(devices)}",
        flush=True,
    )
    if config.dry_run:
        for request, variant, files, record in job.videos():
            state = "finished" if files.is_finished(record, config.overwrite) else request.geometry.name
            print(f"{files.video}: {state}, {variant.name}, seed {request.seed}: {request.prompt}")
        return
    prepare_folder(job.output)
    try:
        with sigterm_interrupts():
            run_job(job, devices)
    except KeyboardInterrupt:
        print("interrupted; the same command again continues", flush=True)
        raise SystemExit(INTERRUPTED_STATUS) from None


def make_job(config: Sample) -> Job:
    """The videos that the options ask for, checked.

    Raises:
        UserError: an option, prompt, picture, adapter or model does not do.
    """
    from exvideo_train.sampling.requests import read_requests
    from exvideo_train.sampling.variants import AdapterFile, make_variants

    requests = read_requests(config)
    variants = make_variants(config.adapter, config.compare)

    from exvideo_train.models.hub import resolve_model_path
    from exvideo_train.models.registry import check_geometries, known_family, likely_family
    from exvideo_train.models.stages import SamplerSettings, torch_dtype
    from exvideo_train.sampling.pipeline import Sampling
    from exvideo_train.sampling.work import Job

    check_geometries(list(dict.fromkeys(request.geometry for request in requests)), config.model.path)
    settings = SamplerSettings(
        scheduler=config.scheduler.value,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        timestep_spacing=config.timestep_spacing.value,
        batched_guidance=config.batched_guidance,
    )
    known, likely = known_family(config.model.path), likely_family(config.model.path)
    paths = list(dict.fromkeys(part.path for variant in variants for part in variant.adapters))
    files = {}
    # Before a download: a mistake in its name must not cost an hour.
    for path in paths:
        trained = likely.extension().read(path, known and known.name)
        print(describe(path, trained, config))
        files[path] = AdapterFile.of(path, trained)
    parts = tuple(dict.fromkeys((*likely.training_parts, *likely.encoder_parts)))
    sampling = Sampling(
        model_path=resolve_model_path(config.model.path, config.model.revision, parts),
        sampler=settings,
        dtype=torch_dtype(config.model.dtype.value),
        variants=variants,
        positions=config.positions.value,
        vae_tiling=config.vae_tiling,
        attention=config.memory.attention,
        feed_forward_chunks=config.memory.feed_forward_chunks,
        files=files,
    )
    for request in requests:
        sampling.check(request)
    output = Path(config.output)
    inputs = {
        "adapter": paths,
        "prompts_file": [Path(config.prompts_file)] if config.prompts_file else [],
        "image": list(dict.fromkeys(request.image for request in requests if request.image)),
    }
    job = Job(sampling, config.model.path, tuple(requests), output, config.keep_latents, config.overwrite)
    refuse_inputs("output", job.targets(), inputs)
    return job


def describe(path: Path, trained: Trained, config: Sample) -> str:
    """One line on an adapter, with a word of warning when it was trained at another length or other positions."""
    about, lines = trained.provenance, [f"adapter {path}: {trained.describe()}"]
    if (trained_at := about.get("num_frames", config.num_frames)) != config.num_frames:
        lines.append(f"note: trained at {trained_at} frames, sampled at num_frames={config.num_frames}")
    if about and (positions := about.get("positions", "trained")) != config.positions.value:
        lines.append(f"note: trained with positions={positions}, sampled with positions={config.positions.value}")
    return "\n".join(lines)


def main() -> None:
    run_command(Sample, sample, "sample", USAGE)


if __name__ == "__main__":
    main()

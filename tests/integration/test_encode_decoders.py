"""The data stage with decord in PyAV's place: same clips, same road, and never both in one geometry of a store."""

import json

import torch
from support.videos import clip_of

from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import write_manifest
from exvideo_train.geometry import Geometry
from exvideo_train.latents.encoders import VideoEncoder
from exvideo_train.latents.store import LatentStore

GEOMETRY = Geometry(9, 64, 96, 25)


def test_a_store_of_decord(clip_path, tiny_model_5b, run_command, tmp_path):
    records = [clip_of(clip_path, 0.4 * number, caption=f"clip {number}") for number in range(3)]
    write_manifest(tmp_path / "clips.jsonl", records)
    store = tmp_path / "store"
    command = [
        "data_prep/encode_latents.py",
        "+exp=demo",
        f"model.path={tiny_model_5b}",
        "num_frames=9",
        f"manifest={tmp_path / 'clips.jsonl'}",
        f"latents={store}",
        "device=cpu",
        "decode_workers=1",
    ]
    result = run_command([*command, "decoder=decord"], timeout_seconds=600)
    assert "encoded      3" in result.stdout
    assert json.loads((store / "store.json").read_text())["geometries"][GEOMETRY.name]["decoder"] == "decord"

    encoder = VideoEncoder(tiny_model_5b, "cpu", torch.bfloat16, False)
    for record in records:
        stored_CTHW = LatentStore.open(store).read(record.clip_id, GEOMETRY).moments_CTHW
        by_decoder = {}
        for decoder in ("decord", "pyav"):
            moments_CTHW = encoder.encode(read_frames(record, GEOMETRY, decoder=decoder))
            by_decoder[decoder] = float((moments_CTHW - stored_CTHW).abs().mean())
        # The tiny VAE's weights are random, but two roundings of a picture are still further apart than two runs.
        assert by_decoder["decord"] < 0.2 * by_decoder["pyav"], by_decoder

    assert "reused       3" in run_command([*command, "decoder=decord"]).stdout
    refused = run_command(command, status=2)
    assert "decoder: the store has decord, this run has pyav" in refused.stderr
    assert "Traceback" not in refused.stderr

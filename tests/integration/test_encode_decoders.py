"""The data stage with either decoder: same clips, same road, and never both by choice in one store."""

import json

import torch
from support.videos import clip_of, make_video

from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import write_manifest
from exvideo_train.geometry import Geometry
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.encoders import VideoEncoder

GEOMETRY = Geometry(9, 64, 96, 25)


def test_decord_encodes_and_pyav_what_decord_cannot_be_given(clip_path, tiny_model_5b, run_command, tmp_path):
    records = [clip_of(clip_path, 0.4 * number, caption=f"clip {number}") for number in range(3)]
    old = clip_of(make_video(tmp_path / "old.wmv", codec="wmv2", frames=30), caption="an old codec")
    write_manifest(tmp_path / "clips.jsonl", [*records, old])
    path = tmp_path / "store"
    command = [
        "data_prep/encode_latents.py",
        "+exp=demo",
        f"model.path={tiny_model_5b}",
        "num_frames=9",
        f"manifest={tmp_path / 'clips.jsonl'}",
        f"latents={path}",
        "device=cpu",
        "decode_workers=1",
    ]
    result = run_command(command, timeout_seconds=600)
    assert "encoded      4" in result.stdout
    assert "by PyAV      1 clips in the store that decord cannot be given (unsupported_codec 1)" in result.stdout
    report = json.loads((path / "reports" / f"encode_{GEOMETRY.name}.json").read_text())
    assert report["refused_by_decord"] == {old.clip_id: "unsupported_codec"}
    assert json.loads((path / "store.json").read_text())["geometries"][GEOMETRY.name]["decoder"] == "decord"

    store = LatentStore.open(path)
    notes = [store.read_header(record.clip_id, GEOMETRY).content.get("decord_refusal") for record in [*records, old]]
    assert notes == [None] * 3 + ["unsupported_codec"]
    assert "decord" not in store.index_path.read_text()
    encoder = VideoEncoder(tiny_model_5b, "cpu", torch.bfloat16, False)
    for record in [*records, old]:
        stored_CTHW = store.read(record.clip_id, GEOMETRY).tensors["moments"]
        of_pyav_CTHW = encoder.encode(read_frames(record, GEOMETRY, decoder="pyav"))
        off = float((of_pyav_CTHW - stored_CTHW).abs().mean())
        if record is old:
            assert off < 1e-3
            continue
        # The tiny VAE's weights are random, but two roundings of a picture are still further apart than two runs.
        of_decord_CTHW = encoder.encode(read_frames(record, GEOMETRY, decoder="decord"))
        assert float((of_decord_CTHW - stored_CTHW).abs().mean()) < 0.2 * off

    # Once in the index, a file is not opened again: what the next report says comes of this one.
    result = run_command(command)
    assert "reused       4" in result.stdout
    assert "(unsupported_codec 1)" in result.stdout
    refused = run_command([*command, "decoder=pyav"], status=2)
    assert "decoder: the store has decord, this run has pyav" in refused.stderr
    assert "Traceback" not in refused.stderr

"""Kill -9 encode_latents at random moments, again and again, and compare the store with an uninterrupted one.

    python benchmarks/kill_encoding.py --kills 20

Two decoding processes, one encoder, tiny model, CPU. Every other kill hits the coordinator alone, the rest the whole
process group; while they start, between clips, or within the writing of one. The stores must be equal byte for byte.
Exit status 1 when they are not.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of a busy machine; an idle one needs seconds.
PATIENCE_SECONDS = 300


def write_clips(folder: Path, num_clips: int) -> None:
    """A manifest of overlapping windows of the example clip; every third shares its caption with the one before."""
    from exvideo_train.clips.record import ClipRecord, make_clip_id, write_manifest

    video = str(REPOSITORY / "examples" / "clips" / "bigbuckbunny.mp4")
    starts = [round(0.05 * number, 3) for number in range(num_clips)]
    write_manifest(
        folder / "clips.jsonl",
        (
            ClipRecord(make_clip_id("test", video, s, s + 1), "test", video, s, s + 1, f"caption {i - (i % 3 == 2)}")
            for i, s in enumerate(starts)
        ),
    )


def start(folder: Path, store: str) -> subprocess.Popen[bytes]:
    """Begin encoding in a process group of its own."""
    command = [
        sys.executable,
        str(REPOSITORY / "data_prep" / "encode_latents.py"),
        "+exp=demo",
        f"model.path={folder / 'model'}",
        "num_frames=9",
        f"manifest={folder / 'clips.jsonl'}",
        f"latents={folder / store}",
        "decode_workers=2",
        "device=cpu",
    ]
    log = open(folder / f"{store}.log", "ab")  # noqa: SIM115 - the process keeps it
    process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
    atexit.register(end, process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Leave no run behind, however this script ends. An id is ours until its process has been waited for."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def files_of(store: Path) -> dict[str, bytes]:
    """Content of every file of a store's identity, temporary ones included."""
    paths = [path for path in store.rglob("*") if path.is_file()]
    names = {str(path.relative_to(store)): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("reports/")}


def num_latents(store: Path) -> int:
    return len(list(store.glob("clips/*/*/[!.]*.safetensors")))


def kill_once(folder: Path, store: str, chance: random.Random, whole_group: bool) -> bool:
    """Start, wait for a random moment, kill; False if the run was over first."""
    process = start(folder, store)
    # Moments while starting, while clips are written, and within the writing of one.
    before = num_latents(folder / store)
    wanted = before + chance.choice([0, 1, 1, 1, 2, 2, 3])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while num_latents(folder / store) < wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.15) if wanted > before else chance.uniform(0, 8))
    alive = process.poll() is None
    if whole_group:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            alive = False
    else:
        process.kill()
    process.wait()
    wait_for_children(process.pid)
    return alive


def wait_for_children(group: int, seconds: float = 120) -> None:
    """A coordinator killed alone takes its encoders and decoders with it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise SystemExit("processes of a killed run are still alive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clips", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="kept afterwards; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run_all(options, (options.folder or Path(temporary)).absolute()))


def run_all(options: argparse.Namespace, folder: Path) -> int:
    from exvideo_train.backbones.cogvideox.tiny import write_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_model(folder / "model")
    write_clips(folder, options.clips)
    assert start(folder, "whole").wait() == 0, (folder / "whole.log").read_text()
    chance = random.Random(options.seed)
    num_kills = 0
    for attempt in range(options.kills):
        killed = kill_once(folder, "killed", chance, whole_group=attempt % 2 == 0)
        num_kills += killed
        print(
            f"kill {attempt + 1}: {'hit' if killed else 'too late'}, {num_latents(folder / 'killed')} clips", flush=True
        )
    last = start(folder, "killed")
    assert last.wait() == 0, (folder / "killed.log").read_text()
    wait_for_children(last.pid)
    whole, killed_files = files_of(folder / "whole"), files_of(folder / "killed")
    different = sorted(n for n in whole.keys() | killed_files.keys() if whole.get(n) != killed_files.get(n))
    complete = num_latents(folder / "whole") == options.clips
    result = f"{len(different)} different: {different[:5]}" if different else "all equal byte for byte"
    print("\n| signal | hits | clips | files of the store | result |\n|---|---|---|---|---|")
    print(f"| SIGKILL | {num_kills} of {options.kills} | {options.clips} | {len(whole)} | {result} |")
    return 0 if complete and not different and num_kills else 1


if __name__ == "__main__":
    main()

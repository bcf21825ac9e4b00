"""Kill -9 encode_latents at random moments, again and again, and compare the stores with an uninterrupted one.

    python benchmarks/kill_encoding.py --kills 20

Two runs side by side on one machine, each into a store of its own, with two decoding processes, one encoder, tiny
model, CPU. Every other kill hits the coordinator alone, the rest the whole process group; while they start, between
clips, or within the writing of one. Half of the times two runs start at once into the one store: one of them must be
refused, the other is killed. The stores must be equal byte for byte. Exit status 1 when they are not.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of a busy machine; an idle one needs seconds.
PATIENCE_SECONDS = 300
STORES = ("first", "second")
REFUSED_STATUS = 2


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


def start_two(folder: Path, store: str) -> tuple[subprocess.Popen[bytes], bool]:
    """Start two runs into one store; returns the one that goes on, and whether the other was refused."""
    runs = [start(folder, store), start(folder, store)]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while all(run.poll() is None for run in runs) and time.monotonic() < deadline:
        time.sleep(0.01)
    over = next((run for run in runs if run.poll() is not None), None)
    if over is None or over.returncode not in (0, REFUSED_STATUS):
        raise SystemExit(f"of two runs into {store} none was refused: {[run.poll() for run in runs]}")
    return next(run for run in runs if run is not over), over.returncode == REFUSED_STATUS


def kill_once(folder: Path, store: str, chance: random.Random, whole_group: bool, two: bool) -> tuple[bool, bool]:
    """Start, wait for a random moment, kill; whether that came before the run's end, and a second run was refused."""
    # Moments while starting, while clips are written, and within the writing of one.
    process, was_refused = start_two(folder, store) if two else (start(folder, store), False)
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
    return alive, was_refused


def kill_again_and_again(folder: Path, store: str, num_kills: int, seed: int) -> tuple[int, int]:
    """Kill runs into one store, then let one end; returns the kills that hit, and the runs that were refused."""
    chance = random.Random(f"{seed} {store}")
    hits = refusals = 0
    for attempt in range(num_kills):
        hit, was_refused = kill_once(folder, store, chance, attempt % 2 == 0, attempt % 4 in (1, 2))
        hits += hit
        refusals += was_refused
        num_clips = num_latents(folder / store)
        print(f"{store}: kill {attempt + 1}: {'hit' if hit else 'too late'}, {num_clips} clips", flush=True)
    last = start(folder, store)
    assert last.wait() == 0, (folder / f"{store}.log").read_text()
    wait_for_children(last.pid)
    told = (folder / f"{store}.log").read_text(errors="replace").count("is at work in it")
    assert told == refusals, f"{refusals} runs were refused, {told} say why"
    return hits, refusals


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
    from exvideo_train.models.cogvideox.tiny import write_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_model(folder / "model")
    write_clips(folder, options.clips)
    assert start(folder, "whole").wait() == 0, (folder / "whole.log").read_text()
    with ThreadPoolExecutor(len(STORES)) as pool:
        runs = [pool.submit(kill_again_and_again, folder, name, options.kills, options.seed) for name in STORES]
        counts = [run.result() for run in runs]
    whole = files_of(folder / "whole")
    is_right = num_latents(folder / "whole") == options.clips
    print("\n| store | SIGKILL that hit | second runs refused | clips | files of the store | result |")
    print("|---|---|---|---|---|---|")
    for name, (hits, refusals) in zip(STORES, counts, strict=True):
        killed = files_of(folder / name)
        different = sorted(n for n in whole.keys() | killed.keys() if whole.get(n) != killed.get(n))
        result = f"{len(different)} different: {different[:5]}" if different else "all equal byte for byte"
        print(f"| {name} | {hits} of {options.kills} | {refusals} | {options.clips} | {len(whole)} | {result} |")
        is_right = is_right and not different and hits > 0 and refusals > 0
    return 0 if is_right else 1


if __name__ == "__main__":
    main()

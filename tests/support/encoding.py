"""encode_latents as users run it: command lines, and what is in a store afterwards."""

import subprocess
import time
from pathlib import Path

from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.config.latents import EncodeLatents
from exvideo_train.entry import compose_config, to_dataclass
from exvideo_train.geometry import Geometry
from exvideo_train.latents.encode import encode_latents
from support.processes import ended

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "data_prep/encode_latents.py"
GEOMETRY = Geometry(9, 64, 96, 25)
# A run takes 10 s on an idle machine; a busy one may need many times as long.
TIMEOUT_SECONDS = 840


def record_of(video, start, caption, end=None):
    return ClipRecord(make_clip_id("test", str(video), start, end), "test", str(video), start, end, caption)


def arguments(model, manifest, store, *more):
    return [
        SCRIPT,
        "+exp=demo",
        f"model.path={model}",
        "num_frames=9",
        f"manifest={manifest}",
        f"latents={store}",
        "device=cpu",
        "decode_workers=1",
        *more,
    ]


def run_here(command):
    """The command in this process, for runs that start no encoder."""
    encode_latents(to_dataclass(compose_config("encode_latents", command[1:], EncodeLatents), EncodeLatents))


def identity(store):
    """Every file of a store outside reports/."""
    paths = (path for path in Path(store).rglob("*") if path.is_file())
    names = {str(path.relative_to(store)): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("reports/")}


def finish(command, cwd, timeout_seconds=TIMEOUT_SECONDS):
    """Run a command to its end: (exit status, its output, what it wrote to stderr)."""
    with ended(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
    ) as process:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
        return process.returncode, stdout, stderr


def wait_until(condition, process):
    """Poll until a condition holds; the process must live meanwhile."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found

"""A soak: every command at tiny size for hours, and a table of what has grown meanwhile.

    python benchmarks/soak.py --minutes 120 --folder soak

Three things run side by side on the CPU, at low priority and with one thread each:

- a loop of short commands in the same folders: manifest, a third of the latents lost and encoded again (every other
  turn with a SIGTERM), verify, training on two ranks with a SIGTERM, resumption, validation and sample videos, export
  for two programs, sampling. A turn must leave no process, no temporary file and no shared memory behind.
- one training on two ranks and one encoding for the whole time: memory, descriptors and threads of each process.

The same command with the same folder goes on where it was ended; ``--report-only`` writes the table of what is there.
Writes FILE.json and FILE.md for ``--output FILE``. Exit status 1 when anything has grown, was left behind or failed.
Linux alone.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import soak_census as census
from soak_report import make_report, write_report

REPOSITORY = Path(__file__).resolve().parent.parent
VIDEOS = REPOSITORY / "examples" / "clips"
TRAIN = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]
GEOMETRY = ["num_frames=17", "fps=8"]
SPAN_SECONDS = 2.2
LOOP_CLIPS = 24
# More than a tiny encoder gets through in the time: five a second.
LONG_CLIPS_A_MINUTE = 300
LOOP_STEPS = 60
LONG_STEPS = 10_000_000
LOOP_NICE, LONG_NICE = 10, 19
SAMPLE_SECONDS = 5.0
COMMAND_SECONDS = 1500.0
# What a long run starts anew again and again, and how many of them are the second time: the first decoder comes with
# the start, sample videos after checkpoints and validations.
KIND_OF = {"train": "sampling", "encode": "decoder"}
RECURRING = {"sampling": 1, "decoder": 2}
# A finished command's own sample videos may still be made when it was stopped.
SETTLE_SECONDS = 180.0
# What a command says when it was stopped as it should be.
SAYS = {"train": "the same command resumes", "encode": "the same command again continues"}


class Soak:
    """The folder of a soak and what runs in it."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.minutes = minutes
        # The folder's own name, so that a soak finds what an earlier one of the same folder has left running.
        self.name = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        self.state_path, self.samples_path = folder / "state.json", folder / "samples.jsonl"
        self.state: dict[str, Any] = (
            json.loads(self.state_path.read_text())
            if self.state_path.exists()
            else {"elapsed": 0.0, "sittings": 0, "turns": [], "long": [], "shared_memory": [], "prepared": False}
        )
        self._before = self.state["elapsed"]
        self._began = time.monotonic()
        self._sampled = 0.0
        self.long: dict[str, subprocess.Popen[bytes]] = {}
        self.recurring: dict[str, set[str]] = {}

    def elapsed(self) -> float:
        """Seconds of soak, earlier sittings included."""
        return self._before + time.monotonic() - self._began

    def save(self) -> None:
        self.state["elapsed"] = self.elapsed()
        temporary = self.state_path.with_suffix(".new")
        temporary.write_text(json.dumps(self.state, indent=1))
        temporary.replace(self.state_path)

    def start(self, part: str, arguments: Sequence[str | Path], log: Path, nice: int) -> subprocess.Popen[bytes]:
        """A Python command as a process group of its own, with the soak's mark."""
        temporary, work = self.folder / "tmp" / part, self.folder / "cwd"
        for place in (temporary, work, log.parent):
            place.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            census.MARK: f"{self.name}:{part}",
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = ["nice", "-n", str(nice), sys.executable, *map(str, arguments)]
        with open(log, "ab" if part != "loop" else "wb") as output:
            return subprocess.Popen(
                command, cwd=work, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    # The loop

    def run(
        self,
        name: str,
        arguments: Sequence[str | Path],
        *,
        stop_when: Callable[[], bool] | None = None,
        part: str = "",
    ) -> dict[str, Any]:
        """One command of the loop to its end, looking at the long runs meanwhile.

        Args:
            stop_when: once it holds, the command's whole group gets a SIGTERM, as a terminal or Slurm sends it.
            part: what is stopped, train or encode: it must say that the same command goes on.
        """
        log = self.folder / "logs" / f"{name.replace(' ', '_')}.log"
        began = time.monotonic()
        process = self.start("loop", arguments, log, LOOP_NICE)
        stopped, status, peak = False, None, 0
        while status is None:
            ended, code, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                # Kilobytes of the largest process among the command and all that it has waited for.
                status = process.returncode = os.waitstatus_to_exitcode(code)
                peak = usage.ru_maxrss * 1024
            elif stop_when is not None and not stopped and stop_when():
                os.killpg(process.pid, signal.SIGTERM)
                stopped = True
            elif time.monotonic() - began > COMMAND_SECONDS:
                census.end_marked(self.name, "loop")
            self.look()
            time.sleep(0.1)
        if stopped:
            self.settle()
        # A launcher dies of the signal before its ranks have ended: how they do, their own words say.
        failed = status != 0 and not (stopped and SAYS[part] in log.read_text(errors="replace"))
        result = {"name": name, "status": status, "seconds": time.monotonic() - began, "peak": peak, "stopped": stopped}
        if failed:
            result["failure"] = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            print(f"{name}: status {status}\n{result['failure']}", flush=True)
        return result

    def turn(self) -> dict[str, Any]:
        """All commands once; the result has their figures and what they left behind."""
        number = len(self.state["turns"])
        chance = random.Random(number)
        loop = self.folder / "loop"
        for part in ("run", "videos"):
            shutil.rmtree(loop / part, ignore_errors=True)
        commands = [self.run("manifest", self.manifest_command(loop))]
        lose_a_third(loop / "latents", chance)
        commands.append(self.run("verify with loss", self.verify_command(loop)))
        encode = self.encode_command(loop)
        if number % 2:
            missing = chance.randint(2, LOOP_CLIPS // 3 - 1)
            done = lambda: num_latents(loop / "latents") >= LOOP_CLIPS - missing  # noqa: E731
            commands.append(self.run("encode, stopped", encode, stop_when=done, part="encode"))
            commands.append(self.run("encode, stopped and continued", encode))
        else:
            commands.append(self.run("encode", encode))
        commands.append(self.run("verify", self.verify_command(loop)))
        train = self.train_command(loop, *LOOP_TRAINING)
        step = chance.randint(1, LOOP_STEPS - 10)
        reached = lambda: last_step(loop / "run") >= step  # noqa: E731
        commands.append(self.run("train, stopped", train, stop_when=reached, part="train"))
        commands.append(self.run("train, resumed", train))
        for program in ("diffusers", "diffsynth"):
            adapter = loop / f"{program}.safetensors"
            export = ["-m", "exvideo_train.export", f"run_dir={loop / 'run'}", f"format={program}"]
            commands.append(self.run(f"export {program}", [*export, f"adapter={adapter}"]))
        sample = ["-m", "exvideo_train.sample", "+exp=demo", f"model.path={self.folder / 'model'}", *GEOMETRY]
        sample += [f"adapter={loop / 'diffusers.safetensors'}", "num_inference_steps=2", "compare=true"]
        commands.append(self.run("sample", [*sample, "prompt=A rabbit, yawning: slowly", f"output={loop / 'videos'}"]))
        return {"number": number, "commands": commands, "stop_step": step, **self.left_behind()}

    def settle(self) -> list[str]:
        """Wait for the loop's processes to be gone; returns those that are not, and ends them."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while left := census.wait_until_gone(self.name, "loop", 1.0):
            self.look()
            if time.monotonic() > deadline:
                break
        census.end_marked(self.name, "loop")
        return left

    def left_behind(self) -> dict[str, Any]:
        """What a turn has left: processes, shared memory, temporary files; and the sizes of its folders."""
        processes = self.settle()
        loop = census.files_below(self.folder / "loop")
        shared = census.shared_memory_left(self.state["shared_memory"])
        result = {
            "processes": processes,
            "zombies": census.num_zombies([os.getpid(), *(process.pid for process in self.long.values())]),
            "shared_memory": shared,
            "tmpdir": sorted(census.files_below(self.folder / "tmp" / "loop")),
            "working_folder": sorted(census.files_below(self.folder / "cwd")),
            "unfinished": census.temporary_files(loop),
            "elapsed": self.elapsed(),
            "folders": {},
        }
        # Sample videos are left out when the last ones are still being made: their number is the machine's doing.
        kept = {name: size for name, size in loop.items() if not name.startswith("run/samples/")}
        for part in sorted(path.name for path in (self.folder / "loop").iterdir()):
            sizes = [size for name, size in kept.items() if name.split("/")[0] == part]
            result["folders"][part] = {"files": len(sizes), "bytes": sum(sizes)}
        return result

    # The long runs

    def look(self) -> None:
        """Every few seconds: one line of figures of each process of the long runs, and these runs started again."""
        now = time.monotonic()
        if now - self._sampled < SAMPLE_SECONDS or not self.long:
            return
        self._sampled = now
        for part, process in self.long.items():
            if process.poll() is not None:
                log = (self.folder / "logs" / f"{part}.log").read_text(errors="replace").splitlines()[-30:]
                self.state["long"].append({"part": part, "status": process.returncode, "log": log, "at": "soak"})
                print(f"the long run {part} ended with {process.returncode}", *log, sep="\n", flush=True)
                census.end_marked(self.name, part)
                self.start_long(part)
        parts = self.long
        rows = [row for m in census.marked_processes(self.name) if m.part in parts and (row := census.look_at(m))]
        for row in rows:
            recurring = self.recurring[row["part"]]
            if row["kind"] in RECURRING:
                recurring.add(row["process"])
            # Once all that recurs has come once: what a first time leaves in memory is no growth.
            row["warm"] = len(recurring) >= RECURRING[KIND_OF[row["part"]]]
        places = {}
        for part in parts:
            places[f"{part}, files in TMPDIR"] = len(census.files_below(self.folder / "tmp" / part))
        run = [name for name in census.files_below(self.folder / "long" / "run") if not name.startswith("samples/")]
        places["train, files of the run folder without sample videos"] = len(run)
        reports = census.files_below(self.folder / "long" / "latents" / "reports")
        places["encode, files beside the clips"] = sum(1 for name in reports if not name.startswith("work/"))
        line = {
            "elapsed": self.elapsed(),
            "sitting": self.state["sittings"],
            "processes": rows,
            "zombies": census.num_zombies([process.pid for process in parts.values()]),
            "shared_memory": sum(census.shared_memory().values()),
            "files": places,
        }
        with open(self.samples_path, "a") as stream:
            stream.write(json.dumps(line) + "\n")

    def start_long(self, part: str) -> None:
        folder = self.folder / "long"
        store = self.folder / "train_latents"
        command = (
            self.train_command(folder, *LONG_TRAINING, f"latents={store}")
            if part == "train"
            else self.encode_command(folder)
        )
        self.long[part] = self.start(part, command, self.folder / "logs" / f"{part}.log", LONG_NICE)
        self.recurring[part] = set()

    def stop_long(self) -> None:
        """SIGTERM to both; their endings are figures of the soak."""
        for process in self.long.values():
            os.killpg(process.pid, signal.SIGTERM)
        for part, process in self.long.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(SETTLE_SECONDS)
            left = census.wait_until_gone(self.name, part, SETTLE_SECONDS)
            ending = {
                "part": part,
                "status": process.poll(),
                "at": "end",
                "said": SAYS[part] in (self.folder / "logs" / f"{part}.log").read_text(errors="replace"),
                "processes": left,
                "tmpdir": sorted(census.files_below(self.folder / "tmp" / part)),
                "unfinished": census.temporary_files(census.files_below(self.folder / "long")),
            }
            self.state["long"].append(ending)
        self.long = {}
        census.end_marked(self.name)

    # Commands

    def manifest_command(self, folder: Path) -> list[str | Path]:
        options = [f"metadata={folder / 'metadata.jsonl'}", f"videos={VIDEOS}", f"manifest={folder / 'clips.jsonl'}"]
        return [REPOSITORY / "data_prep" / "build_manifest.py", "source=internvid", *options]

    def encode_command(self, folder: Path) -> list[str | Path]:
        options = [f"manifest={folder / 'clips.jsonl'}", f"latents={folder / 'latents'}", "decode_workers=1"]
        model = f"model.path={self.folder / 'model'}"
        return [REPOSITORY / "data_prep" / "encode_latents.py", "+exp=demo", model, *GEOMETRY, *options]

    def verify_command(self, folder: Path) -> list[str | Path]:
        return ["-m", "exvideo_train.latents", "verify", f"latents={folder / 'latents'}"]

    def train_command(self, folder: Path, *options: str) -> list[str | Path]:
        experiment = ["+exp=demo", f"model.path={self.folder / 'model'}", *GEOMETRY, f"latents={folder / 'latents'}"]
        script = REPOSITORY / "launch" / "train.py"
        return [*TRAIN, str(free_port()), script, *experiment, f"run_dir={folder / 'run'}", *options]

    def prepare(self) -> None:
        """Model, metadata and the first latents; what is there already is kept."""
        if self.state["prepared"]:
            return
        self.state |= {"commit": commit(), "minutes": self.minutes}
        loop, long = self.folder / "loop", self.folder / "long"
        write_metadata(loop / "metadata.jsonl", LOOP_CLIPS)
        write_metadata(long / "metadata.jsonl", round(LONG_CLIPS_A_MINUTE * self.minutes))
        steps: dict[str, list[str | Path]] = {
            "model": ["-m", "exvideo_train.models.cogvideox.tiny", self.folder / "model"],
            "first manifest": self.manifest_command(loop),
            "long manifest": self.manifest_command(long),
            "first encoding": self.encode_command(loop),
        }
        for name, arguments in steps.items():
            result = self.run(name, arguments)
            if result["status"]:
                raise SystemExit(f"the soak could not begin: status {result['status']} of {name}")
        shutil.copytree(loop / "latents", self.folder / "train_latents", dirs_exist_ok=True)
        self.state["prepared"] = True

    def soak(self) -> None:
        """Turns until the time is over."""
        self.prepare()
        # What others have there is theirs; what an earlier sitting has left is not forgotten.
        self.state["shared_memory"] = self.state["shared_memory"] or sorted(census.shared_memory()) or ["none"]
        self.state["sittings"] += 1
        self._before, self._began = self.state["elapsed"], time.monotonic()
        for part in ("train", "encode"):
            self.start_long(part)
        while self.elapsed() < 60 * self.minutes:
            turn = self.turn()
            self.state["turns"].append(turn)
            self.save()
            seconds = sum(command["seconds"] for command in turn["commands"])
            print(f"{self.elapsed() / 60:.1f} min: turn {turn['number']}, {seconds:.0f} s", flush=True)
        self.stop_long()
        verify = self.run("verify, long store", self.verify_command(self.folder / "long"))
        self.state["turns"][-1]["commands"].append(verify)
        self.save()


LOOP_TRAINING = [
    f"max_steps={LOOP_STEPS}",
    "checkpoint.every_steps=10",
    "validation.every_steps=20",
    f"validation.sample_every_steps={LOOP_STEPS // 2}",
    "validation.timestep_quantiles=2",
    "num_inference_steps=2",
    "data.held_out_clips=2",
    "optim.ema_decay=0.9",
]
LONG_TRAINING = [
    f"max_steps={LONG_STEPS}",
    "checkpoint.every_steps=100",
    "validation.every_steps=100",
    "validation.sample_every_steps=500",
    "validation.timestep_quantiles=2",
    "num_inference_steps=2",
    "data.held_out_clips=2",
    # A reader process, so that batches travel between processes.
    "data.num_workers=1",
    "optim.ema_decay=0.9",
    "logger.log_every_steps=50",
    "logger.tensorboard=true",
]


def write_metadata(path: Path, num_clips: int) -> None:
    """InternVid's format: overlapping spans of the example clip, each with a caption of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        for number in range(num_clips):
            # 3000 starts, a millisecond apart, in as many lengths as are needed.
            start = number % 3000 / 1000
            end = start + SPAN_SECONDS + number // 3000 / 1000
            times = {"Start_timestamp": f"00:00:{start:06.3f}", "End_timestamp": f"00:00:{end:06.3f}"}
            words = {"Caption": f"A rabbit on a meadow, take {number}.", "Aesthetic_Score": 5.1, "UMT_Score": 0.4}
            stream.write(json.dumps({"YoutubeID": "bigbuckbunny", **times, **words}) + "\n")


def lose_a_third(store: Path, chance: random.Random) -> None:
    """Delete latents as a broken disk does; the next encoding makes them again."""
    files = sorted((store / "clips").rglob("*.safetensors"))
    for path in chance.sample(files, len(files) // 3):
        path.unlink()


def num_latents(store: Path) -> int:
    return sum(1 for _ in (store / "clips").rglob("[!.]*.safetensors"))


def last_step(run_dir: Path) -> int:
    """The last step that is recorded; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    # Sample videos are recorded late, under their own step.
    return max((json.loads(line)["step"] for line in lines[-20:]), default=0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "soak", help="kept afterwards; goes on when begun")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "soak")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the table of what is there")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(folder, options.minutes)
    if not options.report_only:
        lock = open(folder / "lock", "w")  # noqa: SIM115 - held until this script ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{folder}: another soak is running here")
        census.end_marked(soak.name)
        # So that this script's own end, by a signal too, leaves none of its processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            soak.soak()
        finally:
            soak.save()
            census.end_marked(soak.name)
    report = make_report(soak.state, soak.samples_path)
    write_report(report, options.output)
    sys.exit(0 if report["holds"] else 1)


if __name__ == "__main__":
    main()

"""Kill a training run at random moments, start it again each time, and compare with a run that nobody disturbed.

    python benchmarks/kill_training.py --kills 20 --signal KILL
    python benchmarks/kill_training.py --kills 20 --signal TERM
    python benchmarks/kill_training.py --kills 20 --runs 2 --rivals 0.4

Two ranks train the tiny model with a checkpoint every other step. A kill hits one rank or both, while they start or
while they train. The final adapter, its moving average and every recorded loss must equal the undisturbed run's bit
for bit. Exit status 1 when they do not.

With --runs 2, two such trainings go on side by side in run folders of their own, and each gets half of the kills. With
--rivals, a share of the starts after a kill is two starts of the same command in the same moment: one of them must get
the run folder, the other must be refused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

WORLD_SIZE = 2
RESUME_STATUS = 75


class Run:
    """One run folder, started again and again."""

    def __init__(self, folder: Path, name: str, steps: int) -> None:
        self.folder, self.run_dir = folder, folder / name
        self.steps = steps
        self.log = folder / f"{name}.log"
        self.num_refused = 0

    def start(self, log: Path | None = None) -> Any:
        from support.ranks import TRAIN, Ranks

        overrides = [
            "+exp=demo",
            f"model.path={self.folder / 'model'}",
            f"latents={self.folder / 'latents'}",
            f"run_dir={self.run_dir}",
            "num_frames=17",
            "data.held_out_clips=0",
            "validation.every_steps=0",
            "fps=8",
            f"max_steps={self.steps}",
            "checkpoint.every_steps=2",
            "checkpoint.keep_last=2",
            "optim.ema_decay=0.9",
            "lora.dropout=0.1",
            "safety.rank_timeout_seconds=60",
        ]
        return Ranks([TRAIN, *overrides], WORLD_SIZE, log or self.log)

    def start_with_rival(self) -> Any:
        """Two starts at once; returns the one that got the run folder, when the other has been refused."""
        with ExitStack() as stack:
            both = [
                stack.enter_context(self.start(log))
                for log in (self.log, self.log.with_name(f"{self.run_dir.name}_rival.log"))
            ]
            deadline = time.monotonic() + 300
            while not (ended := [ranks for ranks in both if all(p.poll() is not None for p in ranks.processes)]):
                assert time.monotonic() < deadline, f"nobody was refused\n{both[0].tail()}\n{both[1].tail()}"
                time.sleep(0.1)
            refused = ended[0]
            assert refused.wait() == [2] * WORLD_SIZE, refused.tail()
            assert "is at work in it" in refused.output(), refused.tail()
            self.num_refused += 1
            # From here on the caller ends the one that goes on.
            stack.pop_all()
        with refused:
            return both[1 - both.index(refused)]

    def records(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def last_step(self) -> int:
        records = self.records()
        return records[-1]["step"] if records else 0

    def finished(self) -> bool:
        return (self.run_dir / "adapter.safetensors").exists()


def disturb(run: Run, number: signal.Signals, moments: random.Random, start_seconds: float, share_rivals: float) -> str:
    """Start the run, signal it at a random moment, and say what was hit."""
    before = run.last_step()
    early = moments.random() < 0.2
    with run.start_with_rival() if not early and moments.random() < share_rivals else run.start() as ranks:
        if early:
            time.sleep(moments.random() * start_seconds)
        else:
            ranks.wait_for(
                lambda: run.last_step() > before or any(p.poll() is not None for p in ranks.processes), "step"
            )
            time.sleep(moments.random() * 1.0)
        targets = moments.choice([[0], [1], [0, 1]])
        alive = [rank for rank in targets if ranks.processes[rank].poll() is None]
        for rank in alive:
            os.kill(ranks.processes[rank].pid, number)
        if number == signal.SIGTERM and not early and alive:
            statuses = ranks.wait(60)
            # Both were asked, or the run was over already.
            assert set(statuses) in ({RESUME_STATUS}, {0}), f"statuses {statuses}\n{ranks.tail()}"
    hit = "both ranks" if len(targets) == 2 else f"rank {targets[0]}"
    return f"{hit}, {'starting' if early else 'training'}"


def compare(run: Run, reference: Run) -> list[str]:
    """What differs between two finished runs."""
    import torch
    from safetensors.torch import load_file

    wrong = []
    for file in ("adapter.safetensors", "adapter_ema.safetensors"):
        a, b = load_file(run.run_dir / file), load_file(reference.run_dir / file)
        different = [name for name in b if name not in a or not torch.equal(a[name], b[name])]
        if different or a.keys() != b.keys():
            wrong.append(f"{file}: {len(different)} of {len(b)} tensors")
    keys = ("step", "position", "loss", "grad_norm", "lr")
    figures, expected = ([{key: record[key] for key in keys} for record in r.records()] for r in (run, reference))
    if figures != expected:
        wrong.append("recorded steps, losses or gradient norms")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=int, default=1, help="trainings side by side; the kills are divided")
    parser.add_argument("--rivals", type=float, default=0.0, help="share of starts that a second start disputes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="kept afterwards; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run_all(options, options.folder or Path(temporary)))


def run_all(options: argparse.Namespace, folder: Path) -> int:
    from support.ranks import finished
    from support.store import SHORT, clip_ids, write_store

    from exvideo_train.models.cogvideox.tiny import write_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    write_store(folder / "latents", write_tiny_model(folder / "model"), {SHORT: clip_ids(14)})
    reference = Run(folder, "undisturbed", options.steps)
    started = time.monotonic()
    with reference.start() as ranks:
        ranks.wait_for(lambda: reference.last_step() > 0, "step")
        start_seconds = time.monotonic() - started
        finished(ranks)
    print(f"undisturbed run: {time.monotonic() - started:.0f} s, {start_seconds:.0f} s to its first step", flush=True)

    runs = [Run(folder, f"disturbed_{index}", options.steps) for index in range(options.runs)]
    with ThreadPoolExecutor(len(runs)) as side_by_side:
        tables = list(side_by_side.map(lambda run: kill_and_finish(run, options, start_seconds), runs))
    print("\n| signal | hits | where | starts refused | steps | result |\n|---|---|---|---|---|---|")
    num_wrong = 0
    for run, hits in zip(runs, tables, strict=True):
        wrong = compare(run, reference)
        num_wrong += len(wrong)
        where = "; ".join(f"{count} x {hit}" for hit, count in sorted(hits.items()))
        result = "differs: " + ", ".join(wrong) if wrong else "adapter, moving average and losses equal bit for bit"
        cells = (f"SIG{options.signal}", sum(hits.values()), where, run.num_refused, run.steps, result)
        print(f"| {' | '.join(map(str, cells))} |")
    return 1 if num_wrong else 0


def kill_and_finish(run: Run, options: argparse.Namespace, start_seconds: float) -> Counter[str]:
    """Kill the run as often as is its share, then let it end; returns what was hit."""
    from support.ranks import finished

    moments, number = random.Random(f"{options.seed} {run.run_dir.name}"), signal.Signals[f"SIG{options.signal}"]
    hits: Counter[str] = Counter()
    for kill in range(options.kills // options.runs):
        hit = disturb(run, number, moments, start_seconds, options.rivals)
        hits[hit] += 1
        said = f"{run.run_dir.name}, {kill + 1}: SIG{options.signal} to {hit}; {run.last_step()} of {run.steps} steps"
        print(f"{said} recorded", flush=True)
        if run.finished():
            print("the run is finished; choose more --steps", flush=True)
            break
    with run.start() as ranks:
        finished(ranks, 1200)
    return hits


if __name__ == "__main__":
    main()

"""Targets: files of tensors and what lies beside them, from strangers: adapters, checkpoints, latents, stores."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import deserialize
from safetensors.torch import save_file

from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import read_adapter, write_adapter
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import UnusableLatent, read_index_lines
from exvideo_train.latents.fingerprint import Fingerprint
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.normalisation import Normalisation
from exvideo_train.tensor_files import read_safetensors_header
from exvideo_train.training.checkpoint import TrainingState, load_checkpoint, write_checkpoint
from exvideo_train.training.loggers import read_metrics
from fuzz.mutations import Mutator, dumps, plain_copy
from fuzz.running import Case, Rows, Target

MODULE = "transformer_blocks.0.attn1.to_q"
GEOMETRY = Geometry(9, 32, 48, 8)
SHA256 = {"vae": "v" * 64, "text_encoder": "t" * 64, "tokenizer": "k" * 64}
FINGERPRINT = Fingerprint(SHA256, "fp32", "fp32", False, 5, 9, 32, 48, 8.0)
CLIP_IDS = ("0" * 32, "1" * 32, "2" * 32)
METRICS = [
    {"kind": "train", "step": step, "loss": 0.5, "lr": 1e-4, "time": 1700000000.0 + step, "grad_norm": 1.25}
    for step in (1, 2, 3)
]
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F4": 4}
# Bytes of tensors: zeros, ones, NaN and infinity in float32, and of no meaning.
_FILLINGS = (b"\0\0\0\0", b"\0\0\x80\x3f", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\x12\x34\x56\x78")


class TensorFile:
    """A valid safetensors file in its parts, from which changed ones are made."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]
        self.metadata: dict[str, str] = self.header.pop("__metadata__", {})

    def mutated(self, mutator: Mutator) -> bytes:
        """The file with changes of its header, names, metadata, numbers, or of any bytes."""
        chance, header, metadata, data = mutator.chance, plain_copy(self.header), dict(self.metadata), self.data
        kind = chance.randrange(7)
        if kind == 0:
            return mutator.data(_file({"__metadata__": metadata, **header}, data))
        if kind == 1:
            return _file(mutator.value({"__metadata__": metadata, **header}), data)
        if kind == 2:
            header, data = self._with_other_tensor(mutator)
        elif kind == 3 and metadata:
            name = chance.choice(list(metadata))
            try:
                metadata[name] = mutator.json(json.loads(metadata[name])).decode("utf-8", "replace")
            except ValueError:
                metadata[name] = mutator.text(metadata[name])
        elif kind == 4:
            return _file(mutator.value({"__metadata__": metadata, **header}, 1), chance.choice(_FILLINGS) * 64)
        elif kind == 5:
            data = bytearray(data)
            place = chance.randrange(0, len(data), 4)
            data[place : place + 4] = chance.choice(_FILLINGS)
        else:
            name = chance.choice(list(header))
            header = {mutator.text(key, 1) if key == name else key: entry for key, entry in header.items()}
        return _file({"__metadata__": metadata, **header}, bytes(data))

    def _with_other_tensor(self, mutator: Mutator) -> tuple[dict[str, Any], bytes]:
        """One tensor of another shape or kind, which the file agrees with."""
        chance, header, data = mutator.chance, {}, b""
        changed = chance.choice(list(self.header))
        for name, entry in self.header.items():
            dtype, shape = entry["dtype"], list(entry["shape"])
            begin, end = entry["data_offsets"]
            piece = self.data[begin:end]
            if name == changed:
                dtype = chance.choice(list(_BITS))
                for _ in range(chance.randrange(3)):
                    axis = chance.randint(0, len(shape))
                    shape[axis : axis + chance.randrange(2)] = [chance.choice([0, 1, 2, 3, 8])]
                size = math.prod(shape) * _BITS[dtype] // 8
                piece = (chance.choice(_FILLINGS) * (size // 4 + 1))[:size]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(piece)]}
            data += piece
        return header, data


def _file(header: Any, data: bytes) -> bytes:
    text = dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors_header(folder: Path) -> Case:
    path = folder / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0)}
    save_file(tensors, path, {"format": "pt", "note": '{"a": [1, 2.5, null]}'})
    whole = TensorFile(path)

    def case(mutator: Mutator) -> Rows:
        content = whole.mutated(mutator)
        path.write_bytes(content)
        header = read_safetensors_header(path)
        header.pop("__metadata__", None)
        # What is let through, the library takes too, and finds the same tensors.
        found = {name: tuple(entry["shape"]) for name, entry in deserialize(content)}
        assert found == {name: tuple(entry["shape"]) for name, entry in header.items()}
        return Rows(len(found))

    return case


def adapter(folder: Path) -> Case:
    path = folder / "adapter.safetensors"
    pair = {f"{MODULE}.lora_A.weight": torch.ones(2, 8), f"{MODULE}.lora_B.weight": torch.zeros(8, 2)}
    provenance = {"base_model": "m", "num_frames": 9, "height": 32, "width": 48, "fps": 8.0, "steps": 3}
    files = []
    for format in ("diffusers", "diffsynth", "comfyui"):
        write_adapter(path, format, pair, 2, 4.0, ["attn1.to_q"], provenance)
        files.append(TensorFile(path))

    def case(mutator: Mutator) -> Rows:
        _, whole = mutator.among(files)
        path.write_bytes(whole.mutated(mutator))
        read = read_adapter(path)
        assert 0 < read.alpha < math.inf
        assert all(torch.isfinite(tensor).all() for tensor in read.tensors.values())
        # What is read as an adapter can be written as one.
        write_adapter(path, "diffusers", read.tensors, read.rank, read.alpha, read.targets, read.provenance)
        assert read_adapter(path).alpha == read.alpha
        return Rows(1)

    return case


def checkpoint(folder: Path) -> Case:
    path = folder / "step_00000001"
    pair = {f"{MODULE}.lora_A.weight": torch.ones(2, 8), f"{MODULE}.lora_B.weight": torch.zeros(8, 2)}
    config = {"model": {"path": "tiny"}, "lora": {"rank": 2, "alpha": 2.0}, "num_frames": 17, "fps": 8.0}
    write_checkpoint(path, TrainingState(1, 4, 1, 0, config), {"lora": pair, "exp_avg": pair, "exp_avg_sq": pair})
    files = {name: (path / name).read_bytes() for name in ("state.json", "lora.safetensors", "exp_avg.safetensors")}
    tensors = {name: TensorFile(path / name) for name in files if name.endswith(".safetensors")}

    def case(mutator: Mutator) -> Rows:
        chance, state = mutator.chance, json.loads(files["state.json"])
        changed = chance.choice(list(files))
        if changed == "state.json":
            if chance.randrange(2):
                state["state"] = mutator.value({"": state["state"]}).get("")
                state["state_sha256"] = _digest_of(state["state"])
                content = dumps(state).encode()
            else:
                content = mutator.json(state)
            (path / changed).write_bytes(content)
        else:
            content = tensors[changed].mutated(mutator)
            (path / changed).write_bytes(content)
            if chance.randrange(8):
                state["sha256"][changed] = hashlib.sha256(content).hexdigest()
                (path / "state.json").write_text(dumps(state))
        try:
            found = load_checkpoint(path)
            assert all(torch.isfinite(tensor).all() for tensor in found.tensors("lora").values())
            json.dumps(asdict(found.state), allow_nan=False).encode()
        finally:
            for name in (changed, "state.json"):
                (path / name).write_bytes(files[name])
        return Rows(1)

    return case


def _digest_of(state: Any) -> str:
    """As a checkpoint writes it: whoever makes a file by hand can make a checksum too."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8", "replace")).hexdigest()


def metrics(folder: Path) -> Case:
    path = folder / "metrics.jsonl"

    def case(mutator: Mutator) -> Rows:
        lines = [dumps(record).encode() for record in METRICS]
        lines[1] = mutator.json(METRICS[1])
        path.write_bytes(b"\n".join(lines) + b"\n")
        return Rows(len(read_metrics(folder)))

    return case


def _write_store(folder: Path) -> LatentStore:
    store = LatentStore.create(folder / "store", Normalisation((0.7,)))
    store.add_geometry(FINGERPRINT)
    generator = torch.Generator().manual_seed(0)
    entries = []
    for number, clip_id in enumerate(CLIP_IDS):
        moments, text = torch.randn((4, 3, 4, 6), generator=generator), torch.randn((5, 6), generator=generator)
        entries.append(
            store.write_clip(
                clip_id, GEOMETRY, {"moments": moments, "text": text}, f"caption {number}", num_tokens_cut=number
            )
        )
    store.write_empty_prompt({"text": torch.full((5, 6), 0.5)})
    store.write_index(entries)
    return store


def latent(folder: Path) -> Case:
    store = _write_store(folder)
    clip, prompt = store.clip_path(CLIP_IDS[0], GEOMETRY), store.empty_prompt_path
    whole = {path: (path.read_bytes(), TensorFile(path)) for path in (clip, prompt)}
    # Its channels are those of the healthy files.
    assert store.channels(GEOMETRY) == {"moments": 4, "text": 6}

    def case(mutator: Mutator) -> Rows:
        path = mutator.chance.choice([clip, clip, clip, prompt])
        content, file = whole[path]
        path.write_bytes(file.mutated(mutator))
        try:
            if path == prompt:
                assert store.empty_prompt()["text"].shape == (5, 6)
            else:
                store.read_entry(CLIP_IDS[0], GEOMETRY).to_json().encode()
                read = store.read(CLIP_IDS[0], GEOMETRY)
                assert (read.tensors["moments"].shape, read.tensors["text"].shape) == ((4, 3, 4, 6), (5, 6))
        finally:
            path.write_bytes(content)
        return Rows(1)

    return case


def store_json(folder: Path) -> Case:
    path = _write_store(folder).path
    description = path / "store.json"
    example = json.loads(description.read_text())

    def case(mutator: Mutator) -> Rows:
        description.write_bytes(mutator.json(example))
        store = LatentStore.open(path)
        for geometry in store.geometries():
            assert store.fingerprints[geometry.name].digest()
            assert store.clip_path(CLIP_IDS[0], geometry).is_relative_to(path / "clips")
        return Rows(len(store.fingerprints))

    return case


def store_index(folder: Path) -> Case:
    store = _write_store(folder)
    path = store.index_path
    examples = [json.loads(line) for line in path.read_text().splitlines()]

    def case(mutator: Mutator) -> Rows:
        lines = [dumps(example).encode() for example in examples]
        number, chosen = mutator.among(examples)
        lines[number] = mutator.json({**chosen, "sampling_fps": 12.5, "decord_refusal": "corrupt"})
        content = b"\n".join(lines) + b"\n"
        if not mutator.chance.randrange(4):
            content = mutator.data(content, 6)
        path.write_bytes(content)
        entries, damage = read_index_lines(store.path, path)
        num_lines = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
        assert len(entries) + len(damage) == num_lines, "a line is silently absent"
        for entry in entries.values():
            entry.to_json().encode()
            assert json.loads(entry.to_json())["clip_id"] == entry.clip_id
        return Rows(len(entries), len(damage))

    return case


def _target(prepare: Callable[[Path], Case], cases: int, declared: type[Exception] = UserError) -> Target:
    return Target(prepare.__name__, (declared,), prepare, cases)


TARGETS = [
    _target(safetensors_header, 15_000),
    _target(adapter, 12_000),
    _target(checkpoint, 8_000),
    _target(metrics, 8_000),
    _target(latent, 8_000, UnusableLatent),
    _target(store_json, 8_000),
    _target(store_index, 10_000),
]

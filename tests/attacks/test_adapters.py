"""Malformed adapter files: each is refused by name, or read as what it says; none is half understood."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attacks import Attack, Ending, attacks, check_ending, held, refused

from exvideo_train.config.experiment import LoraConfig
from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import read_adapter, write_adapter
from exvideo_train.extensions.lora import LoraExtension
from exvideo_train.extensions.provenance import make_provenance
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import load_backbone

MODULE = "transformer_blocks.0.attn1.to_q"
A, B = f"transformer.{MODULE}.lora_A.weight", f"transformer.{MODULE}.lora_B.weight"
LORA, OURS = "lora_adapter_metadata", "exvideo_train"
# Of the tiny model, whose Linear this is: 64 channels.
CHANNELS, RANK = 64, 2
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1, "C64": 8}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}
PAIR: dict[str, Any] = {A: (RANK, CHANNELS), B: (CHANNELS, RANK)}
CONFIG = {"r": RANK, "lora_alpha": 4.0, "target_modules": ["attn1.to_q"], "peft_type": "LORA"}
FLAT = MODULE.replace(".", "_")
KOHYA: dict[str, Any] = {f"lora_unet_{FLAT}.lora_down.weight": PAIR[A], f"lora_unet_{FLAT}.lora_up.weight": PAIR[B]}
FOUR = ("F32", (), struct.pack("<f", 4.0))


def file(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of ``{name: shape}`` or ``{name: (dtype, shape)}`` or ``{name: (dtype, shape, bytes)}``."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    data = b""
    for name, tensor in tensors.items():
        if not tensor or not isinstance(tensor[0], str):
            tensor = ("F32", tensor)
        dtype, shape, *content = tensor
        piece = content[0] if content else bytes(math.prod(shape) * BYTES[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_a(*tensor: Any) -> bytes:
    return file({**PAIR, A: tensor})


def filled(value: bytes, dtype: str = "F32") -> tuple[str, tuple[int, int], bytes]:
    """A, zero but for its last value."""
    zeros = bytes(RANK * CHANNELS * BYTES[dtype] - len(value))
    return dtype, (RANK, CHANNELS), zeros + value


def lora(**fields: Any) -> bytes:
    """A whole adapter whose diffusers metadata has changed fields; one set to ... is left out."""
    config = {name: value for name, value in {**CONFIG, **fields}.items() if value is not ...}
    return file(PAIR, {LORA: json.dumps({f"transformer.{name}": value for name, value in config.items()})})


def lora_text(text: str) -> bytes:
    return file(PAIR, {LORA: text})


def ours(**fields: Any) -> bytes:
    """A whole adapter whose provenance has changed fields."""
    provenance = make_provenance("tiny", "cogvideox", Geometry(9, 64, 96, 8), steps=7) | {"rank": RANK, "alpha": 4.0}
    return file(PAIR, {OURS: json.dumps({**provenance, "adapter_format": "comfyui", **fields})})


def kohya(module: str, *alpha: Any, stem: str = "lora_unet_{}", **metadata: str) -> bytes:
    """A pair in Kohya's names, with alpha if it is given as a safetensors entry."""
    name = stem.format(module)
    tensors: dict[str, Any] = {f"{name}.lora_down.weight": PAIR[A], f"{name}.lora_up.weight": PAIR[B]}
    return file(tensors | ({f"{name}.alpha": alpha} if alpha else {}), metadata or None)


def renamed(*pairs: str) -> bytes:
    """Pairs under other names, of which {} stands for lora_A and lora_B."""
    return file(
        {
            pair.format(half): shape
            for pair in pairs
            for half, shape in zip(("lora_A", "lora_B"), PAIR.values(), strict=True)
        }
    )


TENSORS = [
    refused("no tensor", file({}), "empty"),
    refused("metadata alone", file({}, {"format": "pt"}), "empty"),
    refused("A alone", file({A: PAIR[A]}), "lora_B.weight is missing"),
    refused("B alone", file({B: PAIR[B]}), "lora_A.weight is missing"),
    refused("a module's A more", file({**PAIR, A.replace("0", "1"): PAIR[A]}), "blocks.1", "lora_B.weight is missing"),
    refused("0 axes", with_a("F32", ()), A, "two axes"),
    refused("1 axis", with_a("F32", (128,)), A, "two axes"),
    refused("3 axes", with_a("F32", (RANK, CHANNELS, 1)), A, "two axes"),
    refused("B of 0 axes", file({**PAIR, B: ("F32", ())}), B, "two axes"),
    refused("convolution", file({A: (RANK, 4, 3, 3), B: (4, RANK, 1, 1)}), A, "two axes"),
    refused("rank 0", file({A: (0, CHANNELS), B: (CHANNELS, 0)}), A, "[0, 64]"),
    refused("no input", file({A: (RANK, 0), B: PAIR[B]}), A, "[2, 0]"),
    refused("A of another rank than B", with_a("F32", (3, CHANNELS)), "lora_B", "not of rank 3"),
    refused("A and B exchanged", file({A: PAIR[B], B: PAIR[A]}), "does not fit", "(64, 2)"),
    refused("A transposed", with_a("F32", (CHANNELS, RANK)), "not of rank 64"),
    refused(
        "ranks that differ between modules",
        file({**PAIR, A.replace("0", "1"): (3, CHANNELS), B.replace("0", "1"): (CHANNELS, 3)}),
        "blocks.1",
        "not of rank 2",
    ),
    *(refused(f"stored as {dtype}", with_a(dtype, PAIR[A]), A, dtype) for dtype in ("I64", "I32", "I8", "U8", "BOOL")),
    *(refused(f"stored as {dtype}", with_a(dtype, PAIR[A]), A, dtype) for dtype in ("F8_E4M3", "F8_E5M2", "C64")),
    refused("NaN", with_a(*filled(struct.pack("<f", math.nan))), MODULE, "not finite"),
    refused("inf", with_a(*filled(struct.pack("<f", math.inf))), MODULE, "not finite"),
    refused("-inf as F16", with_a(*filled(b"\x00\xfc", "F16")), MODULE, "not finite"),
    refused("NaN as BF16", with_a(*filled(b"\xc0\x7f", "BF16")), MODULE, "not finite"),
    refused("F64 too large for F32", with_a(*filled(struct.pack("<d", 1e300), "F64")), MODULE, "not finite"),
]
NAMES = [
    refused(
        "kohya's names", renamed("lora_unet_blocks_0_attn1_to_q.{}.weight").replace(b"lora_A", b"lora_D"), "no LoRA"
    ),
    refused(
        "alpha as a tensor beside A and B", file({**PAIR, f"transformer.{MODULE}.alpha": ()}), "alpha", "no LoRA tensor"
    ),
    refused("DoRA's magnitude", file({**PAIR, f"transformer.{MODULE}.lora_magnitude_vector": (4,)}), "magnitude"),
    refused("a bias", file({**PAIR, f"transformer.{MODULE}.lora_B.bias": (4,)}), "lora_B.bias", "no LoRA tensor"),
    refused("an embedding", file({**PAIR, f"transformer.{MODULE}.lora_embedding_A": (4, 2)}), "no LoRA tensor"),
    refused("the whole Linear", file({**PAIR, f"transformer.{MODULE}.weight": (64, 64)}), "no LoRA tensor"),
    refused(
        "two prefixes for one module", renamed(f"transformer.{MODULE}.{{}}.weight", f"{MODULE}.{{}}.weight"), "two ways"
    ),
    refused(
        "PEFT's and ComfyUI's prefix",
        renamed(f"base_model.model.{MODULE}.{{}}.weight", f"diffusion_model.{MODULE}.{{}}.weight"),
        "two ways",
    ),
    refused("A of one prefix, B of another", file({A: PAIR[A], B.removeprefix("transformer."): PAIR[B]}), "two ways"),
    refused(
        "two adapters", renamed(f"{MODULE}.{{}}.default.weight", f"{MODULE}.{{}}.other.weight"), "default", "other"
    ),
    refused(
        "a published and DiffSynth's name for one module",
        renamed("blocks.0.attn1.to_q.{}.weight", f"{MODULE}.{{}}.weight"),
        "blocks.0.attn1.to_q.lora_A.weight and transformer_blocks.0",
        "one tensor",
    ),
    refused(
        "a text encoder's update too",
        renamed(f"transformer.{MODULE}.{{}}.weight", "text_encoder.q.{}.weight"),
        "two ways",
    ),
    refused("no module", renamed("{}.weight"), "no LoRA tensor"),
    refused("an empty name", file({"": (2, 2)}), "no LoRA tensor"),
    refused("an empty part", renamed("transformer_blocks..to_q.{}.weight"), "no LoRA tensor"),
    refused("a path", renamed("../../etc/passwd.{}.weight"), "no LoRA tensor"),
    refused("terminal escapes", renamed("\x1b[2Ja.{}.weight"), "'\\x1b[2Ja", "no LoRA tensor"),
    refused("terminal escapes as the adapter's name", renamed("a.{}.\x1b[2J.weight"), "no LoRA tensor"),
    refused("a newline", renamed("a\nb.{}.weight"), "no LoRA tensor"),
    refused("digits of another script", renamed("blocks.\u0663.attn1.to_q.{}.weight"), "no LoRA tensor"),
    refused("a name of a megabyte", renamed("a" * 1_000_000 + ".{}.weight"), "no LoRA tensor"),
    refused("a name of a million parts", renamed("a." * 1_000_000 + "b.{}.weight"), "no LoRA tensor"),
    refused("a module that the model has not", renamed("transformer_blocks.99.attn1.to_q.{}.weight"), "does not fit"),
    refused("a LayerNorm", renamed("norm_final.{}.weight"), "does not fit", "norm_final"),
    refused("kohya's name of an unknown Linear", kohya("blocks_0_attn7_to_q"), "attn7", "no LoRA tensors"),
    refused("kohya's text encoder", kohya("q", stem="lora_te_{}"), "does not fit", "lora_te_q"),
    refused("kohya's B missing", file({f"lora_unet_{FLAT}.lora_down.weight": PAIR[A]}), "lora_B.weight is missing"),
    refused("kohya's alpha alone", file({f"lora_unet_{FLAT}.alpha": ()}), ".alpha", "no LoRA tensor"),
    refused("kohya's DoRA", file({**KOHYA, f"lora_unet_{FLAT}.dora_scale": (64, 1)}), "dora_scale", "no LoRA tensor"),
    refused("LoHa", file({f"lora_unet_{FLAT}.hada_w1_a": (64, 2)}), "hada_w1_a", "no LoRA tensor"),
    refused("LoCon's middle", file({**KOHYA, f"lora_unet_{FLAT}.lora_mid.weight": (2, 2)}), "lora_mid"),
    refused("kohya's and diffusers' names", file({**KOHYA, **PAIR}), "two ways"),
    refused("lora_down and lora_B", file({f"transformer.{MODULE}.lora_down.weight": PAIR[A], B: PAIR[B]}), "two ways"),
    refused(
        "a module's two names with underscores",
        file({**KOHYA, "lora_unet_blocks_0_attn1_to_q.lora_down.weight": PAIR[A]}),
        "one tensor",
    ),
    refused(
        "forty unknown names, of which some are told",
        file({f"x.{number}.weight": (2,) for number in range(40)} | {"y.bias": (2,)}),
        "'x.0.weight', 'y.bias' and 39 more are no LoRA tensors",
    ),
    refused("another model's size", file({A: (RANK, 48), B: (48, RANK)}), "does not fit", "(2, 48)"),
]
ALPHAS = [
    *(
        refused(f"alpha {value}", kohya(FLAT, "F32", (), struct.pack("<f", value)), "alpha", str(value)[:3])
        for value in (math.nan, math.inf, 0.0, -4.0)
    ),
    refused("alpha of two numbers", kohya(FLAT, "F32", (2,)), ".alpha", "one number"),
    refused("alpha as bytes", kohya(FLAT, "U8", ()), ".alpha", "U8"),
    refused("alpha as I64, huge", kohya(FLAT, "I64", (), struct.pack("<q", 2**62)), ".alpha=4611"),
    refused("alpha of other modules", file({**KOHYA, "lora_unet_proj_out.alpha": FOUR}), "'proj_out'", "same modules"),
    refused(
        "alpha of a tensor and of diffusers' metadata",
        kohya(FLAT, *FOUR, **{LORA: '{"r":2,"lora_alpha":2}'}),
        "lora_alpha=2",
    ),
    refused("alpha of a tensor and of ours", kohya(FLAT, *FOUR, **{OURS: '{"alpha":2}'}), "alpha=2", "4"),
    refused("our kohya file without its alpha", kohya(FLAT, **{OURS: '{"adapter_format":"kohya"}'}), "alpha tensors"),
    refused("our peft file without its config", file(PAIR, {OURS: '{"adapter_format":"peft"}'}), "adapter_config.json"),
]
CONFIGS = [
    refused("not JSON", lora_text("{"), LORA, "not JSON"),
    refused("a list", lora_text("[]"), LORA, "not an object"),
    refused("null", lora_text("null"), LORA, "not an object"),
    refused("a text", lora_text('"LORA"'), LORA, "not an object"),
    refused("500 levels", lora_text("[" * 500 + "]" * 500), LORA, "nested deeper"),
    refused("100,000 levels", lora_text('{"a":' * 100_000), LORA, "nested deeper"),
    refused("a field twice", lora_text('{"transformer.r":2,"transformer.r":3}'), LORA, "twice"),
    refused("with and without prefix", lora_text('{"transformer.r":2,"r":3}'), LORA, "twice"),
    refused("half a character", lora_text('{"transformer.r":"\\ud800"}'), LORA, "surrogates"),
    refused("alpha NaN", lora(lora_alpha=math.nan), LORA, "NaN"),
    refused("alpha inf", lora(lora_alpha=math.inf), LORA, "Infinity"),
    refused("alpha 1e999", lora_text('{"transformer.lora_alpha":1e999}'), LORA, "1e999"),
    refused("alpha of 400 digits", lora(lora_alpha=10**400), LORA, "digits"),
    refused("alpha null", lora(lora_alpha=None), "lora_alpha=None"),
    refused("alpha left out", lora(lora_alpha=...), "lora_alpha=None"),
    refused("alpha a text", lora(lora_alpha="4"), "lora_alpha='4'"),
    refused("alpha true", lora(lora_alpha=True), "lora_alpha=True"),
    refused("alpha a list", lora(lora_alpha=[4]), "lora_alpha=[4]"),
    refused("alpha 0", lora(lora_alpha=0), "lora_alpha=0", "from 1e-06"),
    refused("alpha negative", lora(lora_alpha=-4), "lora_alpha=-4", "from 1e-06"),
    refused("alpha huge", lora(lora_alpha=1e300), "lora_alpha=1e+300"),
    refused("alpha tiny", lora(lora_alpha=1e-300), "lora_alpha=1e-300"),
    refused("rank of the header", lora(r=8), "r=8", "rank 2"),
    refused("rank null", lora(r=None), "r=None"),
    refused("rank left out", lora(r=...), "r=None"),
    refused("rank a fraction", lora(r=2.0), "r=2.0"),
    refused("rank a text", lora(r="2"), "r='2'"),
    refused("rank_pattern", lora(rank_pattern={"to_q": 4}), "rank_pattern", "not supported"),
    refused("alpha_pattern", lora(alpha_pattern={"to_q": 4}), "alpha_pattern", "not supported"),
    refused("DoRA", lora(use_dora=True), "'use_dora': True", "not supported"),
    refused("rank-stabilised", lora(use_rslora=True), "'use_rslora': True", "not supported"),
    refused("biases", lora(bias="all"), "'bias': 'all'", "not supported"),
    refused("LoRA's own bias", lora(lora_bias=True), "'lora_bias': True", "not supported"),
    refused("transposed", lora(fan_in_fan_out=True), "'fan_in_fan_out': True", "not supported"),
    refused("modules beside", lora(modules_to_save=["proj_out"]), "modules_to_save", "not supported"),
    refused("doubled layers", lora(layer_replication=[[0, 2]]), "layer_replication", "not supported"),
    refused("tokens", lora(trainable_token_indices=[1]), "trainable_token_indices", "not supported"),
    refused("PiSSA, which changes the base", lora(init_lora_weights="pissa"), "'init_lora_weights': 'pissa'"),
    refused("another method", lora(peft_type="IA3"), "'peft_type': 'IA3'", "not supported"),
    refused("a field of tomorrow", lora(use_tomorrow={"a": 1}), "use_tomorrow", "not supported"),
    refused(
        "another model's fields",
        lora_text('{"text_encoder.r":2,"transformer.r":2,"transformer.lora_alpha":2}'),
        "text_encoder.r",
    ),
    refused("targets a number", lora(target_modules=3), "target_modules=3"),
    refused("targets empty", lora(target_modules=[]), "target_modules=[]"),
    refused("a target null", lora(target_modules=[None]), "target_modules=[None]"),
    refused("a target empty", lora(target_modules=["attn1.to_q", ""]), "target_modules="),
    refused("a target unknown", lora(target_modules=["attn1.to_q", "attn9.to_q"]), "'attn9.to_q'", "no tensors"),
    refused("a target's middle", lora(target_modules=["tn1.to_q"]), "leave out", MODULE),
    refused("targets of others", lora(target_modules=["attn1.to_k"]), "leave out", MODULE),
]
PROVENANCES = [
    refused("not JSON", file(PAIR, {OURS: "{"}), OURS, "not JSON"),
    refused("a list", file(PAIR, {OURS: "[]"}), OURS, "not an object"),
    refused("10,000 levels", file(PAIR, {OURS: "[" * 10_000}), OURS, "nested deeper"),
    refused("steps a text", ours(steps="many"), "steps='many'"),
    refused("steps null", ours(steps=None), "steps=None"),
    refused("steps negative", ours(steps=-1), "steps=-1"),
    refused("frames a list", ours(num_frames=[9]), "num_frames=[9]"),
    refused("frames true", ours(num_frames=True), "num_frames=True"),
    refused("rate NaN", ours(fps=math.nan), OURS, "NaN"),
    refused("rate 0", ours(fps=0), "fps=0"),
    refused("base model a number", ours(base_model=5), "base_model=5"),
    refused("rank of other tensors", ours(rank=64), "rank=64", "rank 2"),
    refused("alpha null", ours(alpha=None), "alpha=None"),
    refused("alpha negative", ours(alpha=-1.0), "alpha=-1.0"),
    refused("format unknown", ours(adapter_format="tomorrow"), "adapter_format='tomorrow'"),
    refused("diffusers' without its metadata", ours(adapter_format="diffusers"), "adapter_format=diffusers", LORA),
    refused(
        "alpha folded and stated",
        file(PAIR, {OURS: '{"adapter_format":"comfyui"}', LORA: '{"r":2,"lora_alpha":4}'}),
        "adapter_format=comfyui",
        LORA,
    ),
    refused("two alphas", file(PAIR, {OURS: '{"alpha":8}', LORA: '{"r":2,"lora_alpha":4}'}), "alpha=8", "lora_alpha=4"),
]
HELD = [
    held("tensors alone", file(PAIR)),
    *(held(f"stored as {dtype}", file({A: (dtype, PAIR[A]), B: (dtype, PAIR[B])})) for dtype in ("F64", "F16", "BF16")),
    held("A and B in other formats", file({A: ("F16", PAIR[A]), B: ("F32", PAIR[B])})),
    held("PEFT's names", renamed(f"base_model.model.{MODULE}.{{}}.weight")),
    held("DiffSynth's names", renamed("blocks.0.attn1.to_q.{}.default.weight")),
    held("kohya's names", kohya(FLAT, *FOUR)),
    held("kohya's names without alpha", kohya(FLAT)),
    held("kohya's names of a nameless root", kohya(FLAT, *FOUR, stem="lora_unet__{}")),
    held("kohya's names of DiffSynth's modules", kohya("blocks_0_attn1_to_q", *FOUR, stem="lora_transformer_{}")),
    held("lora_down in dotted names", kohya(MODULE, *FOUR, stem="diffusion_model.{}")),
    held("alpha as an integer", kohya(FLAT, "I64", (), struct.pack("<q", 4))),
    held("alpha of one axis", kohya(FLAT, "F32", (1,), FOUR[2])),
    held(
        "alpha as a tensor and in both headers", kohya(FLAT, *FOUR, **{LORA: json.dumps(CONFIG), OURS: '{"alpha":4}'})
    ),
    held("notes of other programs", file(PAIR, {"format": "pt", "title": "\x1b[2J", "notes": "{"})),
    held("metadata empty", lora_text("")),
    held("diffusers' metadata", lora()),
    held("without prefix", lora_text('{"r":2,"lora_alpha":4,"target_modules":["to_q"]}')),
    held("an expression as target, which is not run", lora(target_modules="(a+)+b")),
    held("what PEFT states of the training", lora(init_lora_weights="gaussian", lora_dropout=0.1, inference_mode=True)),
    held("fields that are off", lora(rank_pattern={}, use_dora=False, use_tomorrow=None, bias="none")),
    held("our provenance", ours()),
    held("a field more in it", ours(store_fingerprint={"vae": "ab"})),
]


BESIDE = [
    refused("not JSON", b"{", "not JSON"),
    refused("a list", b"[]", "not an object"),
    refused("not UTF-8", b'{"r":2,"lora_alpha":4,"a":"\xff"}', "not JSON"),
    refused("10,000 levels", b"[" * 10_000, "nested deeper"),
    refused("of two megabytes", b" " * (2 << 20), "at most 1048576 are read"),
    refused("a pipe", os.mkfifo, "not a regular file"),
    refused("a folder", os.mkdir, "not a regular file"),
    refused("alpha left out", b'{"r":2}', "lora_alpha=None"),
    refused("rank of other tensors", b'{"r":8,"lora_alpha":4}', "r=8", "rank 2"),
    refused("DoRA", b'{"r":2,"lora_alpha":4,"use_dora":true}', "'use_dora': True"),
    refused("a pattern of alphas", b'{"r":2,"lora_alpha":4,"alpha_pattern":{"to_q":1}}', "alpha_pattern"),
    held("whole", json.dumps(CONFIG).encode()),
]


@attacks(BESIDE)
def test_configs_beside_pefts_weights(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(renamed(f"base_model.model.{MODULE}.{{}}.weight"))
    config = tmp_path / "adapter_config.json"
    attack.content(config) if callable(attack.content) else config.write_bytes(attack.content)

    def read() -> dict[str, str]:
        assert read_adapter(tmp_path).alpha == 4.0
        return {}

    check_ending(attack, read)


@pytest.mark.parametrize("table", ["tensors", "names", "alphas", "configs", "provenances", "held"])
def test_names_of_cases_are_unique(table: str) -> None:
    cases = {"tensors": TENSORS, "names": NAMES, "alphas": ALPHAS, "configs": CONFIGS, "held": HELD}.get(
        table, PROVENANCES
    )
    assert len({case.name for case in cases}) == len(cases)


@attacks([*TENSORS, *NAMES, *ALPHAS, *CONFIGS, *PROVENANCES, *HELD])
def test_adapter_files(attack: Attack, tmp_path: Path, tiny_model_5b: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(attack.content)

    def read() -> dict[str, str]:
        adapter = read_adapter(path)
        backbone = load_backbone(tiny_model_5b, torch.bfloat16)
        trained = LoraExtension.read(path)
        trained.extension.place(backbone, "placed", trained, torch.bfloat16, source=str(path))
        assert (adapter.rank, adapter.alpha) in ((2, 2.0), (2, 4.0))
        return {}

    check_ending(attack, read)
    if attack.ending is Ending.REFUSED:
        with pytest.raises(UserError) as refusal:
            read()
        message = str(refusal.value)
        assert str(path) in message
        assert message.isprintable()
        assert len(message) < 1000


def pair(value: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    a, b = torch.ones(RANK, CHANNELS, dtype=dtype), torch.full((CHANNELS, RANK), value).to(dtype)
    return {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b}


def with_b(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**pair(), f"{MODULE}.lora_B.weight": tensor}


WRITTEN = [
    *(
        refused(f"alpha {alpha}", {"alpha": alpha}, f"alpha={alpha}")
        for alpha in (math.inf, math.nan, 0.0, -2.0, 1e300, 1e-300)
    ),
    refused("alpha a text", {"alpha": "4"}, "alpha='4'"),
    refused("alpha null", {"alpha": None}, "alpha=None"),
    refused("NaN", {"tensors": pair(math.nan)}, "lora_B", "not finite"),
    refused("inf", {"tensors": pair(math.inf)}, "lora_B", "not finite"),
    refused(
        "float64 too large",
        {"tensors": with_b(torch.full((64, 2), 1e300, dtype=torch.float64))},
        "lora_B",
        "not finite",
    ),
    refused("folding that overflows", {"tensors": pair(3e38), "format": "comfyui"}, "lora_B", "not finite"),
    refused("integers", {"tensors": pair(dtype=torch.int64)}, "lora_A", "torch.int64"),
    refused("complex", {"tensors": pair(dtype=torch.complex64)}, "lora_A", "torch.complex64"),
    refused("no output", {"tensors": with_b(torch.ones(0, RANK))}, "lora_B", "(0, 2)"),
    refused("a rate of NaN", {"provenance": {"fps": math.nan}}, "fps=nan"),
    held("a whole one", {}),
]


@attacks(WRITTEN)
def test_adapters_are_checked_before_they_are_written(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    arguments: dict[str, Any] = {"format": "diffusers", "tensors": pair(), "rank": RANK, "alpha": 4.0}
    arguments |= {"targets": ["to_q"], "provenance": {}, **attack.content}

    def write() -> dict[str, str]:
        write_adapter(path, **arguments)
        return {}

    check_ending(attack, write)
    assert path.exists() == (attack.name == "a whole one")


@pytest.mark.parametrize("alpha", [math.inf, math.nan, 0.0, -1.0, 1e300])
def test_an_alpha_is_refused_before_training(alpha: float) -> None:
    with pytest.raises(UserError, match=r"lora\.alpha="):
        LoraConfig(alpha=alpha)

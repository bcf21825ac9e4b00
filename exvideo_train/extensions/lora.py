"""What is trained: LoRA updates on Linears of a frozen backbone.

Tensors are named as modules are in the published checkpoint, ``transformer_blocks.0.attn1.to_q.lora_A.weight``;
PEFT's own names (``base_layer``, adapter names) stay inside this file.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from exvideo_train.config.experiment import LoraConfig
from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import Adapter, read_adapter, write_adapter
from exvideo_train.extensions.adapter_names import modules_of
from exvideo_train.extensions.extension import Trained
from exvideo_train.extensions.lora_function import LoraLinear
from exvideo_train.randomness import generator_for

# PEFT's name for the updates that are trained.
ADAPTER = "default"
# What wrappers put into parameter names.
WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class LoraExtension:
    """LoRA as an :class:`~exvideo_train.extensions.extension.Extension`.

    Args:
        rank: columns of A and rows of B.
        alpha: the update is ``alpha / rank * B @ A``.
        target_modules: names of Linears, or suffixes of names at a dot: ``attn1.to_q`` is that Linear in every block.
        dropout: probability at which inputs of A are dropped while training.
        init: adapter file that training begins from; empty begins with an update of zero.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    init: str = ""
    name: ClassVar[str] = "lora"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LoraExtension:
        lora = LoraConfig(**options["lora"])
        return cls(lora.rank, lora.alpha, tuple(lora.targets), lora.dropout, lora.init or "")

    @classmethod
    def read(cls, path: Path, family: str | None = None) -> Trained:
        return _as_trained(read_adapter(path, family))

    @property
    def shape_options(self) -> tuple[str, ...]:
        return "lora.rank", "lora.alpha", "lora.targets"

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0

    def describe(self) -> str:
        return f"LoRA rank {self.rank}, alpha {self.alpha:g}"

    def attach(self, network: nn.Module, seed: int) -> None:
        apply_lora(network, self, seed)
        compute_as_one(network)

    def initial(self, family: str) -> Trained | None:
        if not self.init:
            return None
        path = Path(self.init)
        adapter = read_adapter(path, family)
        for name, theirs, ours in (("rank", adapter.rank, self.rank), ("alpha", adapter.alpha, self.alpha)):
            if theirs != ours:
                resize = f", or resize the file to rank={ours}" if name == "rank" else ""
                raise UserError(
                    f"lora.init={path} has {name} {theirs:g}, the run has lora.{name}={ours:g}: "
                    f"set lora.{name}={theirs:g}{resize}"
                )
        modules = adapter.modules
        matched = {target: {m for m in modules if f".{m}".endswith(f".{target}")} for target in self.target_modules}
        if not all(matched.values()) or set(modules).difference(*matched.values()):
            theirs_targets = dict.fromkeys(_without_block_number(module) for module in sorted(modules))
            raise UserError(
                f"lora.init={path} updates {', '.join(theirs_targets)}; the run has lora.targets="
                f"{', '.join(self.target_modules)}: they must be the same"
            )
        return _as_trained(adapter)

    def trained(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return lora_parameters(network)

    def load(self, network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        load_lora_state(network, tensors, source)

    def place(self, network: nn.Module, name: str, trained: Trained, dtype: torch.dtype, source: str) -> None:
        place_lora(network, name, trained, dtype, source)

    def choose(self, network: nn.Module, strengths: Mapping[str, float]) -> None:
        choose_lora(network, strengths)

    def write(self, path: Path, format: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
        write_adapter(path, format, tensors, self.rank, self.alpha, self.target_modules, provenance)


def _as_trained(adapter: Adapter) -> Trained:
    extension = LoraExtension(adapter.rank, adapter.alpha, adapter.targets)
    return Trained(extension, adapter.tensors, adapter.provenance)


def apply_lora(backbone: nn.Module, lora: LoraExtension, seed: int, name: str = ADAPTER) -> nn.Module:
    """Freeze ``backbone`` and put trainable float32 updates on its target Linears, in place.

    The class, the attributes and the hooks of the backbone stay. A is uniform in +-1/sqrt(in_features), a function
    of ``seed`` and the module's name alone, hence equal on all ranks; B is zero, so the output does not change yet.
    Inputs are not cast to float32 (550 MB for each Linear at 129 frames of 480x720): outside of autocast a backbone
    in half precision needs its updates in that precision too.

    Args:
        name: PEFT's for these updates; a backbone may carry several.

    Returns:
        ``backbone`` itself.

    Raises:
        UserError: a target matches no Linear; the message names the nearest ones.
    """
    _check_targets(backbone, lora.target_modules)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it as a number, an int is not needed
        target_modules=list(lora.target_modules),
        lora_dropout=lora.dropout,
        bias="none",
    )
    # On the meta device first: PEFT would draw from the global generator, in the backbone's dtype.
    peft.inject_adapter_in_model(config, backbone, adapter_name=name, low_cpu_mem_usage=True)
    backbone.requires_grad_(False)
    for module_name, layer in lora_layers(backbone, name).items():
        _initialise(module_name, layer, seed, name)
        layer.cast_input_dtype_enabled = False
    return backbone


def compute_as_one(backbone: nn.Module) -> None:
    """Let each Linear and its update be computed by one function where that is the same: see `lora_function`."""
    for layer in lora_layers(backbone).values():
        layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[attr-defined]


def _forward(layer: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """PEFT's own ``plain`` where the update is dropped out, switched off or one of several, or gathered by ZeRO-3."""
    a, b, base = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.get_base_layer()
    has_dropout = layer.training and not isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
    is_alone = layer.active_adapters == [ADAPTER] and not layer.disable_adapters and not layer.merged
    # Of ZeRO-3 the modules' own calls gather the parameters.
    if has_dropout or not is_alone or hasattr(a, "ds_id"):
        return plain(x)
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if base.weight.dtype != x.dtype:
        return plain(x)
    output: Tensor = LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[ADAPTER])
    return output


def _initialise(module_name: str, layer: LoraLayer, seed: int, name: str) -> None:
    base = cast(nn.Linear, layer.get_base_layer())
    shape_a, shape_b = (layer.r[name], base.in_features), (base.out_features, layer.r[name])
    weight_a = torch.empty(shape_a, device=base.weight.device, dtype=torch.float32)
    if not weight_a.is_meta:
        bound = 1.0 / math.sqrt(base.in_features)
        # Drawn on the CPU, so that every device gets the same numbers.
        generator = generator_for(seed, f"lora/{module_name}", 0)
        weight_a.copy_(
            torch.empty(shape_a, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        )
    layer.lora_A[name].weight = nn.Parameter(weight_a)
    layer.lora_B[name].weight = nn.Parameter(torch.zeros(shape_b, device=base.weight.device, dtype=torch.float32))


def _check_targets(backbone: nn.Module, targets: tuple[str, ...]) -> None:
    names = linear_names(backbone)
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        suffixes = dict.fromkeys(_without_block_number(name) for name in names)
        near = difflib.get_close_matches(target, suffixes, n=4, cutoff=0.3) or list(suffixes)
        raise UserError(
            f"lora.targets: {target!r} matches no Linear of {type(backbone).__name__}; nearest: {', '.join(near)}"
        )


def _without_block_number(name: str) -> str:
    """``transformer_blocks.7.attn1.to_q`` -> ``attn1.to_q``; names outside of blocks stay."""
    head, _, rest = name.partition(".")
    number, _, suffix = rest.partition(".")
    return suffix if head and number.isdigit() and suffix else name


def linear_names(backbone: nn.Module) -> list[str]:
    """Names of the Linears as in the published checkpoint: an adapted one has its own name, its parts have none."""
    adapted = tuple(f"{name}." for name, module in backbone.named_modules() if isinstance(module, LoraLayer))
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | LoraLayer) and not (adapted and name.startswith(adapted))
    ]


def lora_layers(model: nn.Module, name: str = ADAPTER) -> dict[str, LoraLayer]:
    """The Linears that carry the updates of a name, by published module name, in the model's order."""
    return {
        _published(module_name): module
        for module_name, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def _published(name: str) -> str:
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return name


def lora_parameters(model: nn.Module, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """The parameters of the updates of a name by published name, in the model's order."""
    return {
        f"{module_name}.{half}.weight": getattr(layer, half)[name].weight
        for module_name, layer in lora_layers(model, name).items()
        for half in ("lora_A", "lora_B")
    }


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by published name, detached; they share memory with the model."""
    return {name: parameter.detach() for name, parameter in lora_parameters(model).items()}


def load_lora_state(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str = "adapter", name: str = ADAPTER
) -> None:
    """Copy tensors with published names into the model's updates.

    Args:
        source: file or checkpoint that the tensors come from, for the message.

    Raises:
        UserError: names or shapes do not fit the model; nothing has been copied then.
    """
    parameters = lora_parameters(model, name)
    missing, unknown = parameters.keys() - tensors.keys(), tensors.keys() - parameters.keys()
    if missing or unknown:
        raise UserError(
            f"{source} does not fit the model: {len(missing)} tensors missing{_example(missing)}, {len(unknown)} "
            f"unknown{_example(unknown)}; use the model and the lora.targets that it was trained with"
        )
    for key, parameter in parameters.items():
        if tensors[key].shape != parameter.shape:
            raise UserError(
                f"{source} does not fit the model: {key} is {tuple(tensors[key].shape)}, the model needs "
                f"{tuple(parameter.shape)}; use the model and the lora.rank that it was trained with"
            )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])


def _example(names: set[str]) -> str:
    return f" ({min(names)})" if names else ""


def place_lora(backbone: nn.Module, name: str, trained: Trained, dtype: torch.dtype, source: str) -> None:
    """Put a finished adapter on a backbone for sampling, in ``dtype``, unmerged and not trainable.

    Which Linears it updates, its tensors say. It does nothing before :func:`choose_lora` names it.

    Args:
        name: under which it is chosen; a word without dots, that no other adapter of the backbone has.
        source: the adapter's file, for the message.

    Raises:
        UserError: the adapter is of another model.
    """
    lora = trained.extension
    assert isinstance(lora, LoraExtension)
    modules = tuple(modules_of(trained.tensors))
    if unknown := sorted(set(modules).difference(linear_names(backbone))):
        raise UserError(
            f"adapter={source} does not fit the model: it updates {unknown[0]} (and {len(unknown) - 1} more) that "
            f"{type(backbone).__name__} has not; its base model is {trained.provenance.get('base_model', 'not stated')}"
        )
    apply_lora(backbone, LoraExtension(lora.rank, lora.alpha, modules), seed=0, name=name)
    load_lora_state(backbone, trained.tensors, f"adapter={source}", name)
    for layer in lora_layers(backbone, name).values():
        layer.lora_A[name].to(dtype)
        layer.lora_B[name].to(dtype)
    backbone.requires_grad_(False)


def choose_lora(backbone: nn.Module, strengths: Mapping[str, float]) -> None:
    """Let the backbone compute with these adapters added up, each times its strength, and with no other.

    Args:
        strengths: name -> strength, which multiplies the adapter's ``alpha / rank``; empty: as without adapters.
    """
    # PEFT's own switches would toggle requires_grad too, which a training engine's gradient hooks hang on.
    for layer in (module for module in backbone.modules() if isinstance(module, LoraLayer)):
        layer._active_adapter = [name for name in strengths if name in layer.lora_A]
        layer._disable_adapters = not strengths
        for name in layer._active_adapter:
            layer.set_scale(name, strengths[name])

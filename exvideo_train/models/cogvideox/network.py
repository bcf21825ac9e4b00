"""The CogVideoX diffusion transformer (arXiv 2408.06072): one joint sequence of text and video tokens, start to end.

A plain single-device network. What makes it parallel, recomputed or compiled is hung from outside on four hooks:
each attention's `attend`, and the model's `own_tokens`, `join_sequence` and `run_block`. Parameter names are
the published checkpoint's.

Axis letters: B batch, C channels, T latent frames, H and W latent rows and columns, h and w patch rows and columns,
L text tokens, S joint sequence (text first), N heads, D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from exvideo_train.models.cogvideox.modulation import Modulation, add_gated, modulate
from exvideo_train.models.cogvideox.positions import (
    TRAINED,
    TimeAxis,
    rotary_tables,
    rotate,
    sincos_embedding,
    timestep_sinusoid,
)

QK_NORM_EPS = 1e-6
FEED_FORWARD_EXPANSION = 4


@dataclass(frozen=True)
class CogVideoXConfig:
    """The fields of ``transformer/config.json`` that shape the network, under their published names."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    flip_sin_to_cos: bool
    freq_shift: int
    time_embed_dim: int
    text_embed_dim: int
    num_layers: int
    attention_bias: bool
    sample_width: int
    """Latent columns of the base size (sample_height: rows): where rotary positions are fitted in."""
    sample_height: int
    sample_frames: int
    """Video frames (not latents) that the base model was trained on."""
    patch_size: int
    temporal_compression_ratio: int
    max_text_seq_length: int
    norm_elementwise_affine: bool
    norm_eps: float
    spatial_interpolation_scale: float
    temporal_interpolation_scale: float
    use_rotary_positional_embeddings: bool

    @property
    def inner_dim(self) -> int:
        """Channels of the joint sequence."""
        return self.num_attention_heads * self.attention_head_dim


RotaryTables = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class JoinSequence(Protocol):
    def __call__(self, tensor: Tensor, dim: int) -> Tensor: ...


def attend_whole(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """Attention of every token to every token, without a mask: text padding takes part, as published."""
    return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD)


def all_tokens(length: int) -> slice:
    """Every token of the joint sequence is here."""
    return slice(0, length)


def whole_already(tensor: Tensor, dim: int) -> Tensor:
    """Nothing to join."""
    return tensor


def call_block(block: nn.Module, *args: Any) -> Tensor:
    """Run a block and keep its activations."""
    output: Tensor = block(*args)
    return output


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose output has its input's dtype under autocast too.

    Autocast would copy the input to fp32 and return fp32, twice the size of everything that follows. The kernels
    sum in fp32 in any case, so that turning it off here loses nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is not None and self.weight.dtype != input.dtype:
            return super().forward(input).to(input.dtype)
        device_type = input.device.type
        plain: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if torch.amp.is_autocast_available(device_type):
            plain = torch.autocast(device_type, enabled=False)
        with plain:
            return super().forward(input)


class ModulatedNorm(nn.Module):
    """Adaptive LayerNorm: shift, scale and gate from the timestep, one set for video tokens and one for text."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.inner_dim)
        self.norm = LayerNorm(config.inner_dim, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine)

    def forward(self, joint_BSC: Tensor, time_BC: Tensor, num_text: int) -> tuple[Tensor, Modulation]:
        """The modulated sequence (B, S, C), and the gate of what is computed from it."""
        modulation = self.linear(F.silu(time_BC)).to(joint_BSC.dtype)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation[:, None].chunk(6, dim=-1)
        normed_BSC = modulate(
            self.norm(joint_BSC), Modulation(text_shift, shift, num_text), Modulation(text_scale, scale, num_text)
        )
        return normed_BSC, Modulation(text_gate, gate, num_text)


class JointAttention(nn.Module):
    """Full attention over the joint sequence, queries and keys normalised per head and rotated.

    `attend` takes rotated queries, keys and values of the tokens that are here and returns the same tokens' outputs,
    all (B, N, S, D). Setting it from outside chooses the kernel, or exchanges heads for sequence between ranks.
    """

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.attention_head_dim
        self.attend: Attend = attend_whole
        dim = config.inner_dim
        self.norm_q = LayerNorm(config.attention_head_dim, eps=QK_NORM_EPS)
        self.norm_k = LayerNorm(config.attention_head_dim, eps=QK_NORM_EPS)
        self.to_q = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_k = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_v = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, joint_BSC: Tensor, rotary: RotaryTables | None) -> Tensor:
        # Token-major as far as the kernel: a norm of transposed memory would copy it first.
        q_BSND, k_BSND, v_BSND = (
            rearrange(project(joint_BSC), "B S (N D) -> B S N D", N=self.num_heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q_BSND, k_BSND = self.norm_q(q_BSND), self.norm_k(k_BSND)
        if rotary is not None:
            q_BSND, k_BSND = rotate(q_BSND, *rotary), rotate(k_BSND, *rotary)
        q_BNSD, k_BNSD, v_BNSD = (x.transpose(1, 2) for x in (q_BSND, k_BSND, v_BSND))
        out_BNSD = self.attend(q_BNSD, k_BNSD, v_BNSD)
        # No copy where the kernel has left tokens before heads in memory, as the fused ones do.
        output: Tensor = self.to_out[0](rearrange(out_BNSD, "B N S D -> B S (N D)"))
        return output


class GeluProjection(nn.Module):
    """The feed-forward's first half."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim)

    def forward(self, joint_BSC: Tensor) -> Tensor:
        return F.gelu(self.proj(joint_BSC), approximate="tanh")


class FeedForward(nn.Module):
    """Two Linears with a GELU; the empty middle holds the place of the published dropout, which is 0.

    ``run_by_token(net, joint_BSC)`` runs them; tokens do not see each other in it, so that it may be done in pieces.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden_dim = FEED_FORWARD_EXPANSION * dim
        self.net = nn.Sequential(GeluProjection(dim, hidden_dim), nn.Identity(), nn.Linear(hidden_dim, dim))
        self.run_by_token: Callable[..., Tensor] = call_block

    def forward(self, joint_BSC: Tensor) -> Tensor:
        return self.run_by_token(self.net, joint_BSC)


class CogVideoXBlock(nn.Module):
    """Attention, then feed-forward, each on a modulated copy of the joint sequence and gated into it."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(config)
        self.attn1 = JointAttention(config)
        self.norm2 = ModulatedNorm(config)
        self.ff = FeedForward(config.inner_dim)

    def forward(self, joint_BSC: Tensor, time_BC: Tensor, num_text: int, rotary: RotaryTables | None) -> Tensor:
        normed_BSC, gate = self.norm1(joint_BSC, time_BC, num_text)
        joint_BSC = add_gated(joint_BSC, self.attn1(normed_BSC, rotary), gate)
        normed_BSC, gate = self.norm2(joint_BSC, time_BC, num_text)
        return add_gated(joint_BSC, self.ff(normed_BSC), gate)


class PatchEmbed(nn.Module):
    """Text embeddings and latent patches into one sequence, text first."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_channels, config.inner_dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_proj = nn.Linear(config.text_embed_dim, config.inner_dim)

    def forward(self, latents_BTCHW: Tensor, text_BLC: Tensor) -> Tensor:
        patches = self.proj(rearrange(latents_BTCHW, "B T C H W -> (B T) C H W"))
        video_BSC = rearrange(patches, "(B T) C h w -> B (T h w) C", B=latents_BTCHW.shape[0])
        return torch.cat([self.text_proj(text_BLC), video_BSC], dim=1)


class TimeEmbedding(nn.Module):
    """The timestep's sinusoid through two Linears."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.inner_dim, config.time_embed_dim)
        self.linear_2 = nn.Linear(config.time_embed_dim, config.time_embed_dim)

    def forward(self, sinusoid_BC: Tensor) -> Tensor:
        output: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid_BC)))
        return output


class ModulatedOutputNorm(nn.Module):
    """The last adaptive LayerNorm: shift and scale only, the same for every token."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.inner_dim)
        self.norm = LayerNorm(config.inner_dim, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine)

    def forward(self, joint_BSC: Tensor, time_BC: Tensor) -> Tensor:
        modulation = self.linear(F.silu(time_BC)).to(joint_BSC.dtype)
        shift, scale = modulation[:, None].chunk(2, dim=-1)
        output: Tensor = self.norm(joint_BSC) * (1 + scale) + shift
        return output


class CogVideoXDiT(nn.Module):
    """Predicts the velocity of noisy latents at a timestep, given a text embedding.

    Hooks, each doing nothing special until set from outside:

    - ``own_tokens(length)`` says which tokens of the joint sequence this process holds, one slice of it.
    - ``join_sequence(tensor, dim)`` makes the whole sequence of every process's slice, on the output of `proj_out`
      (dim 1).
    - ``run_block(block, *args)`` calls a block: activation checkpointing goes here.
    - ``attn1.attend`` of every block: see `JointAttention`; ``ff.run_by_token``: see `FeedForward`.
    """

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.config = config
        self.own_tokens: Callable[[int], slice] = all_tokens
        self.join_sequence: JoinSequence = whole_already
        self.run_block: Callable[..., Tensor] = call_block
        self.time_axis = TRAINED
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimeEmbedding(config)
        self.transformer_blocks = nn.ModuleList(CogVideoXBlock(config) for _ in range(config.num_layers))
        self.norm_final = LayerNorm(
            config.inner_dim, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine
        )
        self.norm_out = ModulatedOutputNorm(config)
        self.proj_out = nn.Linear(config.inner_dim, config.patch_size**2 * config.out_channels)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        return self.transformer_blocks

    def lay_out_time(self, kind: str) -> None:
        """Choose the positions in time of videos longer than the base model's, a `TimeAxis.kind`.

        Raises:
            ValueError: it is nothing for this model.
        """
        if kind == "riflex" and not self.config.use_rotary_positional_embeddings:
            raise ValueError("slows down a rotary frequency, and this model has fixed sin-cos positions")
        num_base = 1 + (self.config.sample_frames - 1) // self.config.temporal_compression_ratio
        self.time_axis = TimeAxis(kind, num_base)

    def forward(self, latents_BTCHW: Tensor, told_B: Tensor, text_BLC: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            latents_BTCHW: noisy latents, already scaled by the VAE's factor; H and W are multiples of the patch size.
            told_B: training timesteps, 0 (clean) to 999.
            text_BLC: T5 embeddings of the padded prompt.

        Returns:
            velocity_BTCHW in the compute dtype: autocast's where it is on, else that of the weights.
        """
        config = self.config
        dtype = self.patch_embed.proj.weight.dtype
        device = latents_BTCHW.device
        num_text_tokens, patch = text_BLC.shape[1], config.patch_size
        grid_THW = (latents_BTCHW.shape[1], latents_BTCHW.shape[3] // patch, latents_BTCHW.shape[4] // patch)

        sinusoid_BC = timestep_sinusoid(told_B, config.inner_dim, config.flip_sin_to_cos, config.freq_shift)
        time_BC = self.time_embedding(sinusoid_BC.to(dtype))
        joint_BSC = self.patch_embed(latents_BTCHW.to(dtype), text_BLC.to(dtype))
        own = self.own_tokens(joint_BSC.shape[1])
        own_text = len(range(num_text_tokens)[own])
        rotary: RotaryTables | None = None
        if config.use_rotary_positional_embeddings:
            rotary = self._rotary_tables(num_text_tokens, grid_THW, device)
            rotary = (rotary[0][own], rotary[1][own])
        else:
            joint_BSC = joint_BSC + self._sincos_embedding(num_text_tokens, grid_THW, device).to(joint_BSC.dtype)
        joint_BSC = joint_BSC[:, own]

        for block in self.transformer_blocks:
            joint_BSC = self.run_block(block, joint_BSC, time_BC, own_text, rotary)

        patches_BSC = self.proj_out(self.norm_out(self.norm_final(joint_BSC), time_BC))
        video_BSC = self.join_sequence(patches_BSC, dim=1)[:, num_text_tokens:]
        T, h, w = grid_THW
        return rearrange(video_BSC, "B (T h w) (C p q) -> B T C (h p) (w q)", T=T, h=h, w=w, p=patch, q=patch)

    def _rotary_tables(
        self, num_text_tokens: int, grid_THW: tuple[int, int, int], device: torch.device
    ) -> RotaryTables:
        config = self.config
        return rotary_tables(
            num_text_tokens=num_text_tokens,
            grid_THW=grid_THW,
            base_HW=(config.sample_height // config.patch_size, config.sample_width // config.patch_size),
            head_dim=config.attention_head_dim,
            device=device,
            time_axis=self.time_axis,
        )

    def _sincos_embedding(self, num_text_tokens: int, grid_THW: tuple[int, int, int], device: torch.device) -> Tensor:
        config = self.config
        return sincos_embedding(
            num_text_tokens=num_text_tokens,
            grid_THW=grid_THW,
            num_channels=config.inner_dim,
            spatial_scale=config.spatial_interpolation_scale,
            temporal_scale=config.temporal_interpolation_scale,
            device=device,
            time_axis=self.time_axis,
        )

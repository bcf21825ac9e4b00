"""The tiny models' text side: a tokenizer that knows whole words, and a T5 of two layers with random weights.

It is never trained: random embeddings tell words apart as well as learned ones, and the captions' grammar asks for no
more, as each word of a caption means the same wherever it stands.

Axis letters: L text tokens, C channel.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import torch
from clips import CAMERAS, COLOURS, GROUNDS, MOTIONS, SHAPES, caption_of
from torch import Tensor

from exvideo_train.files import atomic_write_bytes
from exvideo_train.models.cogvideox.tiny import randomize
from exvideo_train.models.cogvideox.tiny_tokenizer import NUM_SENTINELS, write_tokenizer

TEXT_LENGTH = 16
TEXT_CHANNELS = 64
# Specials, every printable character and the captions' words; T5's embedding is the largest of its matrices.
NUM_PIECES = 160


def all_captions() -> list[str]:
    """Every caption that `clips.draw_scene` can give."""
    return [caption_of(*properties) for properties in itertools.product(COLOURS, SHAPES, MOTIONS, GROUNDS, CAMERAS)]


def write_text_encoder(folder: Path) -> None:
    """Write ``tokenizer/`` and ``text_encoder/`` in the published layout; the same bytes at every call."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(  # type: ignore[call-arg]
        vocab_size=_write_word_tokenizer(folder / "tokenizer"),
        d_model=TEXT_CHANNELS,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5EncoderModel(config)
        randomize(model)
    torch.nn.Module.to(model, torch.bfloat16).save_pretrained(folder / "text_encoder")
    # The library closes its files to other users.
    (folder / "text_encoder" / "model.safetensors").chmod(0o644)


def _write_word_tokenizer(folder: Path) -> int:
    """A token for each word of the captions, pieces and letters for all others; returns the vocabulary's size."""
    import sentencepiece

    # For the tables beside the pieces; the pieces themselves are replaced.
    write_tokenizer(folder)
    captions = all_captions()
    words = sorted({word.strip(",") for caption in captions for word in caption.split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, "".join(map(chr, range(33, 127)))]),
        model_writer=model,
        model_type="unigram",
        vocab_size=NUM_PIECES,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=[f"▁{word}" for word in words],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    atomic_write_bytes(folder / "spiece.model", model.getvalue())
    num_pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return int(num_pieces) + NUM_SENTINELS


def embed(folder: Path, captions: list[str]) -> dict[str, Tensor]:
    """text_LC of each caption, as encode_latents stores it, in float32."""
    from exvideo_train.models.cogvideox.encoders import TextEncoder

    encoder = TextEncoder(folder, "cpu", torch.float32, TEXT_LENGTH)
    assert not any(encoder.num_tokens_cut(caption) for caption in captions)
    return {caption: encoder.encode([caption])[0] for caption in captions}

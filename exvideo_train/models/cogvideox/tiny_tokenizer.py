"""A real sentencepiece tokenizer for the tiny model, trained on a page of captions."""

from __future__ import annotations

import io
from pathlib import Path

from exvideo_train.files import atomic_write_bytes, atomic_write_json

# Pieces learned from the text below; few, because T5's embedding is the largest of the tiny matrices.
NUM_PIECES = 180
# T5's sentinels <extra_id_0..99> follow the pieces.
NUM_SENTINELS = 100

_SUBJECTS = (
    "a large grey rabbit", "a brown fox", "two children", "an old fisherman", "a red butterfly",
    "a small white dog", "the camera", "a woman in a yellow coat", "a train", "a flock of birds",
)  # fmt: skip
_ACTIONS = (
    "walks slowly through", "runs across", "looks up at", "moves over", "jumps into", "turns around in",
    "stands quietly in", "flies above", "travels along", "waits beside",
)  # fmt: skip
_PLACES = (
    "a sunny green meadow", "the snow covered mountain", "a busy street at night", "the deep blue ocean",
    "a quiet forest in autumn", "an empty room with open windows", "the river under a stone bridge",
    "a field of purple flowers", "the city seen from far away", "a dusty desert road",
)  # fmt: skip


def _captions() -> list[str]:
    sentences = [f"{subject} {action} {place}." for subject in _SUBJECTS for action in _ACTIONS for place in _PLACES]
    # Every printable character once, so that no prompt in Latin script falls apart into unknown pieces.
    return [*sentences, *(sentence.capitalize() for sentence in sentences), "".join(map(chr, range(33, 127)))]


def write_tokenizer(folder: Path) -> int:
    """Train and write ``tokenizer/`` in T5's published layout; return its vocabulary's size with sentinels.

    Deterministic: the same text and one thread give the same pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_captions()),
        model_writer=model,
        model_type="unigram",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        # T5's order: <pad> </s> <unk>, no beginning of sentence.
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
    sentinels = [f"<extra_id_{index}>" for index in range(NUM_SENTINELS)]
    atomic_write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": sentinels,
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    )
    atomic_write_json(
        folder / "tokenizer_config.json",
        {
            "additional_special_tokens": sentinels,
            "clean_up_tokenization_spaces": True,
            "eos_token": "</s>",
            "extra_ids": NUM_SENTINELS,
            "legacy": True,
            "model_max_length": 226,
            "pad_token": "<pad>",
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
            "unk_token": "<unk>",
        },
    )
    return NUM_PIECES + NUM_SENTINELS

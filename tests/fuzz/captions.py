"""Target: captions on their way from a manifest into a text encoder's tokenizer."""

from __future__ import annotations

from pathlib import Path

from exvideo_train.clips.bounds import MAX_CAPTION_LETTERS, clean_caption
from exvideo_train.clips.record import parse_record
from exvideo_train.errors import UserError
from exvideo_train.models.cogvideox.encoder_weights import load_tokenizer
from exvideo_train.models.cogvideox.tiny_tokenizer import write_tokenizer
from fuzz.datasets import CAPTION, RECORDS
from fuzz.mutations import NASTY, Mutator, dumps
from fuzz.running import Case, Rows, Target

MAX_TOKENS = 226


def captions(folder: Path) -> Case:
    tokenizer = load_tokenizer(folder, write_tokenizer(folder))
    fields = {"clip_id": RECORDS[0].clip_id, "source": "t", "video": "/a.mp4", "start_seconds": 0}

    def case(mutator: Mutator) -> Rows:
        line = dumps({**fields, "caption": _caption(mutator)})
        caption = parse_record(line, folder / "clips.jsonl", 1).caption
        assert len(caption) <= MAX_CAPTION_LETTERS
        assert clean_caption(caption).text == caption, "a cleaned caption is not clean"
        caption.encode()
        tokens = tokenizer([caption], padding="max_length", max_length=MAX_TOKENS, truncation=True)
        assert len(tokens.input_ids[0]) == MAX_TOKENS
        return Rows(1)

    return case


def _caption(mutator: Mutator) -> str:
    chance = mutator.chance
    kind = chance.randrange(8)
    if kind == 0:
        # Any characters, many of them halves or not assigned.
        return "".join(chr(chance.choice([chance.randrange(0x300), chance.randrange(0x110000)])) for _ in range(40))
    if kind == 1:
        return "".join(str(entry) for entry in chance.choices(NASTY, k=5))
    if kind == 2 and not chance.randrange(8):
        # Without a space, and longer than what is kept.
        return mutator.text(CAPTION) + chance.choice("aé\u4e2d\U0001f600\u0301") * (MAX_CAPTION_LETTERS + 5)
    return mutator.text(CAPTION, 12)


TARGETS = [Target("captions", (UserError,), captions, 8_000)]

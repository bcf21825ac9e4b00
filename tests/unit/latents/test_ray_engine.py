"""Captions that several encoders need: who encodes them, and what happens when that one dies."""

import threading

import pytest
import torch

from exvideo_train.latents.ray_engine import SharedCaptions


def test_each_caption_is_encoded_once_however_many_ask(tmp_path):
    encoded, read = [], []

    def encode(caption):
        encoded.append(caption)
        return {"text": torch.full((3, 2), float(len(caption)), dtype=torch.bfloat16).T}

    def ask():
        captions = SharedCaptions(tmp_path / "captions")
        read.extend((caption, captions.tensors(caption, encode)) for caption in ("a cat", "no dog", "a cat"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(encoded) == ["a cat", "no dog"]
    assert len(read) == 24
    for caption, tensors in read:
        assert torch.equal(tensors["text"], torch.full((2, 3), float(len(caption)), dtype=torch.bfloat16))


def test_an_encoder_that_dies_with_its_claim_costs_only_time(tmp_path):
    captions = SharedCaptions(tmp_path, patience_seconds=0.2)

    def die(caption):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captions.tensors("a cat", die)
    assert torch.equal(captions.tensors("a cat", lambda caption: {"text": torch.ones(2, 2)})["text"], torch.ones(2, 2))
    assert torch.equal(captions.tensors("a cat", die)["text"], torch.ones(2, 2))

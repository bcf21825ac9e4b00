"""The command that turns clips into T5 embeddings and VAE latents."""

from __future__ import annotations

USAGE = """
Encode the clips of a manifest into a latent store: every GPU, resumable.

python data_prep/encode_latents.py +exp=129f manifest=clips.jsonl latents=DIR
accelerate launch data_prep/encode_latents.py +exp=129f manifest=clips.jsonl latents=DIR
"""


def main() -> None:
    # Decoding and encoding processes import this file again and need none of this.
    from exvideo_train.config.latents import EncodeLatents
    from exvideo_train.entry import run_command
    from exvideo_train.latents.encode import encode_latents

    run_command(EncodeLatents, encode_latents, "encode_latents", USAGE)


if __name__ == "__main__":
    main()

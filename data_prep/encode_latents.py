"""Encode the clips of a manifest into a latent store: every GPU, resumable.

python data_prep/encode_latents.py +exp=129f manifest=clips.jsonl latents=DIR
"""

from exvideo_train.encode_latents import main

if __name__ == "__main__":
    main()

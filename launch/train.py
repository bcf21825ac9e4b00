"""Train a LoRA that extends a video diffusion model to longer videos.

deepspeed launch/train.py +exp=129f latents=DIR run_dir=RUN
"""

from exvideo_train.train import main

if __name__ == "__main__":
    main()

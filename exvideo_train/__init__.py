"""Post-training of video diffusion models to longer videos."""

__version__ = "0.1.0"

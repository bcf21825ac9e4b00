from tests.unit.latents.conftest import store

__all__ = ["store"]

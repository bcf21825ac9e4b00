"""``launch/train.py`` on a store whose file system answers rank 1 no more once the file $STORE_HANGS_WHEN is there.

A pipe in a latent's place would be refused, and nothing else that hangs can be made of files alone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from exvideo_train.latents.store import LatentStore
from exvideo_train.train import main

read = LatentStore.read


def read_or_hang(*args: Any, **kwargs: Any) -> Any:
    while os.environ["RANK"] == "1" and Path(os.environ["STORE_HANGS_WHEN"]).exists():
        time.sleep(0.1)
    return read(*args, **kwargs)


LatentStore.read = read_or_hang  # type: ignore[method-assign]

if __name__ == "__main__":
    main()

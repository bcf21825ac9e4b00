"""Run a command with one more line in the registry: ``python with_flipbook.py exvideo_train.train OPTIONS``.

Processes that the command spawns read this file too, and so know the family.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from exvideo_train.models.registry import FAMILIES
from support.flipbook import FLIPBOOK

FAMILIES.append(FLIPBOOK)

if __name__ == "__main__":
    module = sys.argv.pop(1)
    import_module(module).main()

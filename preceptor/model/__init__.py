"""A model on disk: find it, load it, make its tokens, generate.

No library that this room imports may call home, so the hub's telemetry is off before any of them loads.
"""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

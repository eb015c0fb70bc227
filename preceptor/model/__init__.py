"""A model on disk: find it, load it, make its tokens, generate.

No library that this room imports may call home, so the hub's telemetry is off before any of them loads. What
libraries deprecate of each other is no news to a user.
"""

import os
import warnings

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)

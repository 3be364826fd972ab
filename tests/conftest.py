"""No test may reach for a hub; this must be said before the first import of huggingface_hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

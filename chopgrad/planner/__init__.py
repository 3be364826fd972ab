"""What a strategy will cost, before anything is run: peak memory predicted with tensors that have shapes but no data.

The architecture is built without weights and the library's own sweep runs on it (``chopgrad.shapes``), so a prediction
is about the code that will run: ``chopgrad.frame_loss``, whose loss sees one frame group at a time, or
``chopgrad.decode`` and a loss on the whole video; ``plan_encoder`` predicts ``chopgrad.encode``. Left out: cuDNN's
workspaces, the allocator's fragmentation, the CUDA context, and the backbone that produces the latents. PyTorch rounds
pinned host memory up, to 6 % more than the host bytes.
"""

from chopgrad.planner.architectures import ARCHITECTURES
from chopgrad.planner.compute import relative_compute
from chopgrad.planner.encoder import EncoderGradient, plan_encoder
from chopgrad.planner.peaks import FramesLoss
from chopgrad.planner.prediction import Prediction, default_strategies, plan
from chopgrad.planner.recommendation import MARGIN, recommend

__all__ = [
    "ARCHITECTURES",
    "MARGIN",
    "EncoderGradient",
    "FramesLoss",
    "Prediction",
    "default_strategies",
    "plan",
    "plan_encoder",
    "recommend",
    "relative_compute",
]

"""What a strategy will cost, before anything is run: peak memory predicted with tensors that have shapes but no data.

The architecture is built without weights and the library's own sweep runs on it (``chopgrad.shapes``), so a prediction
of ``plan`` is about the code that will run; ``estimator`` works the same out by formulas from one group (``profile``),
and times with it. What is predicted is ``chopgrad.frame_loss``, whose loss sees one frame group at a time, or
``chopgrad.decode`` and a loss on the whole video; ``plan_encoder`` predicts ``chopgrad.encode``. Left out: cuDNN's
workspaces, the allocator's fragmentation, the CUDA context, and the backbone that produces the latents. PyTorch rounds
pinned host memory up, to 6 % more than the host bytes.
"""

from chopgrad.planner.architectures import ARCHITECTURES
from chopgrad.planner.compute import relative_compute
from chopgrad.planner.encoder import EncoderGradient, plan_encoder
from chopgrad.planner.estimate import Estimator, encoder_estimator, estimator
from chopgrad.planner.formulas import Need, Surroundings, need
from chopgrad.planner.peaks import FramesLoss
from chopgrad.planner.prediction import Prediction, default_strategies, plan
from chopgrad.planner.profile import GroupProfile, PieceProfile, Profile, profile
from chopgrad.planner.recommendation import MARGIN, fits, frontier, recommend
from chopgrad.planner.seconds import H200, Card, relative_seconds, seconds

__all__ = [
    "ARCHITECTURES",
    "H200",
    "MARGIN",
    "Card",
    "EncoderGradient",
    "Estimator",
    "FramesLoss",
    "GroupProfile",
    "Need",
    "PieceProfile",
    "Prediction",
    "Profile",
    "Surroundings",
    "default_strategies",
    "encoder_estimator",
    "estimator",
    "fits",
    "frontier",
    "need",
    "plan",
    "plan_encoder",
    "profile",
    "recommend",
    "relative_compute",
    "relative_seconds",
    "seconds",
]

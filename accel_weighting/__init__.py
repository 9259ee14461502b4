"""Loss weighting for multi-task and multi-loss training on Hugging Face Accelerate."""

from .methods.cov import CoVWeighting
from .methods.gradnorm import GradNorm
from .methods.rotograd import RotoGrad, RotoGradNorm
from .methods.static import EqualWeighting, StaticWeighting
from .methods.wrappers import Clamp, Every, Smooth, Warmup
from .plot import plot_history
from .statistics import Method, State, Statistics
from .weighter import Weighter

__version__ = "0.1.0.dev0"

__all__ = [
    "Clamp",
    "CoVWeighting",
    "EqualWeighting",
    "Every",
    "GradNorm",
    "Method",
    "RotoGrad",
    "RotoGradNorm",
    "Smooth",
    "State",
    "StaticWeighting",
    "Statistics",
    "Warmup",
    "Weighter",
    "plot_history",
]

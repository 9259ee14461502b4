"""Loss weighting for multi-task and multi-loss training on Hugging Face Accelerate."""

from .methods.aligned_mtl import AlignedMTL
from .methods.balancer import GradientBalancer
from .methods.cagrad import CAGrad
from .methods.config import ConFIG
from .methods.cov import CoVWeighting
from .methods.dwa import DynamicWeightAverage
from .methods.famo import FAMO
from .methods.gradnorm import GradNorm
from .methods.imtl_g import IMTLG
from .methods.loss_scale import GeometricLoss, ScaleInvariant
from .methods.mgda import MGDA
from .methods.nash_mtl import NashMTL
from .methods.pcgrad import PCGrad
from .methods.random_weights import RandomLossWeighting
from .methods.rotograd import RotoGrad, RotoGradNorm
from .methods.softadapt import ReLoBRaLo, SoftAdapt
from .methods.static import EqualWeighting, StaticWeighting
from .methods.tchebycheff import SmoothTchebycheff
from .methods.torchjd import TorchJDWeighting
from .methods.uncertainty import IMTLL, UncertaintyWeighting
from .methods.wrappers import Clamp, Every, Smooth, Warmup
from .plot import plot_history
from .statistics import Method, State, Statistics
from .weighter import Weighter

__version__ = "0.1.0.dev0"

__all__ = [
    "FAMO",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "Clamp",
    "CoVWeighting",
    "ConFIG",
    "DynamicWeightAverage",
    "EqualWeighting",
    "Every",
    "GeometricLoss",
    "GradNorm",
    "GradientBalancer",
    "Method",
    "NashMTL",
    "PCGrad",
    "RandomLossWeighting",
    "ReLoBRaLo",
    "RotoGrad",
    "RotoGradNorm",
    "ScaleInvariant",
    "Smooth",
    "SmoothTchebycheff",
    "SoftAdapt",
    "State",
    "StaticWeighting",
    "Statistics",
    "TorchJDWeighting",
    "UncertaintyWeighting",
    "Warmup",
    "Weighter",
    "plot_history",
]

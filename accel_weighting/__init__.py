"""Loss weighting for multi-task and multi-loss training on Hugging Face Accelerate."""

from typing import TYPE_CHECKING

from .methods.aligned_mtl import AlignedMTL
from .methods.balancer import GradientBalancer
from .methods.cagrad import CAGrad
from .methods.carry import CarryForward
from .methods.coba import CoBa
from .methods.config import ConFIG
from .methods.cov import CoVWeighting
from .methods.db_mtl import DBMTL
from .methods.dwa import DynamicWeightAverage
from .methods.fairgrad import FairGrad
from .methods.famo import FAMO
from .methods.gate import CosineGate
from .methods.gradnorm import GradNorm
from .methods.gradvac import GradVac
from .methods.imtl_g import IMTLG
from .methods.loss_scale import GeometricLoss, ScaleInvariant
from .methods.mgda import MGDA
from .methods.nash_mtl import NashMTL
from .methods.ntk import NTKWeighting
from .methods.pcgrad import PCGrad
from .methods.random_weights import RandomLossWeighting
from .methods.reference_norm import ReferenceNorm
from .methods.rotograd import RotoGrad, RotoGradNorm
from .methods.slaw import SLAW
from .methods.softadapt import ReLoBRaLo, SoftAdapt
from .methods.static import EqualWeighting, StaticWeighting
from .methods.tchebycheff import SmoothTchebycheff
from .methods.torchjd import TorchJDWeighting
from .methods.uncertainty import IMTLL, UncertaintyWeighting
from .methods.upgrad import DualProj, UPGrad
from .methods.uwso import UWSO
from .methods.wrappers import Clamp, Every, Smooth, Warmup
from .statistics import Method, State, Statistics
from .weighter import Weighter

if TYPE_CHECKING:
    from .plot import plot_history

__version__ = "0.1.0"

__all__ = [
    "DBMTL",
    "FAMO",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "SLAW",
    "UWSO",
    "AlignedMTL",
    "CAGrad",
    "CarryForward",
    "Clamp",
    "CoBa",
    "CoVWeighting",
    "ConFIG",
    "CosineGate",
    "DualProj",
    "DynamicWeightAverage",
    "EqualWeighting",
    "Every",
    "FairGrad",
    "GeometricLoss",
    "GradNorm",
    "GradVac",
    "GradientBalancer",
    "Method",
    "NTKWeighting",
    "NashMTL",
    "PCGrad",
    "RandomLossWeighting",
    "ReLoBRaLo",
    "ReferenceNorm",
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
    "UPGrad",
    "UncertaintyWeighting",
    "Warmup",
    "Weighter",
    "plot_history",
]


def __getattr__(name: str) -> object:
    """Imports ``plot_history`` when it is asked for: ``python -m accel_weighting.plot`` would else import it twice."""
    if name == "plot_history":
        from .plot import plot_history

        return plot_history
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

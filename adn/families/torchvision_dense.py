"""torchvision's detectors and segmentation nets, and others built of their classes: stages are those of the backbone.

What is on top of it (pyramid, extra levels, heads) is shared by all depths, as in the reference (RetinaNet-ADN): its
norms do not switch, be they after the last stage or before the next level.
"""

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3

from ..core.errors import ConversionError
from ..core.plan import Plan
from . import family, find_plan

DETECTORS = (GeneralizedRCNN, RetinaNet, FCOS, SSD)
WITH_BACKBONE = (*DETECTORS, FCN, DeepLabV3, LRASPP)


@family(whole=True)
def torchvision_dense(model: nn.Module) -> Plan:
    name = _body(model)
    if not name:
        return Plan()
    try:
        plan = find_plan(model.get_submodule(name))
    except ConversionError as error:
        raise ConversionError(f"{type(model).__name__}, of which {name!r} would be converted: {error}") from error
    return Plan(plan.renamed(f"{name}.{{}}".format), torchvision_dense.__name__)


def _body(model: nn.Module) -> str:
    """The name of the module that holds the stages, "" in other models."""
    if isinstance(model, WITH_BACKBONE):
        return ".".join(filter(None, ("backbone", _body(model.backbone))))
    if isinstance(model, BackboneWithFPN):
        return "body"
    return "features" if isinstance(model, SSDLiteFeatureExtractorMobileNet) else ""

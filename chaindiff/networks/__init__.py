"""Networks with one signature: forward(x, noise, condition), keyed by variable names."""

from __future__ import annotations

from torch import nn

from chaindiff.io.code import create
from chaindiff.io.errors import UserError
from chaindiff.networks.edm2 import MPUNet
from chaindiff.networks.interface import Condition, Interface, Network
from chaindiff.networks.joint import Joint
from chaindiff.networks.prior import Prior
from chaindiff.networks.transformer import Transformer
from chaindiff.networks.unet import UNet
from chaindiff.specs.code import CodeSpec
from chaindiff.specs.network import JointNetworkSpec, PriorSpec, TransformerSpec, UNetSpec

__all__ = ["Condition", "Interface", "Joint", "MPUNet", "Network", "Prior", "Transformer", "UNet", "build"]


def build(
    spec: UNetSpec | PriorSpec | TransformerSpec | JointNetworkSpec | CodeSpec, interface: Interface
) -> nn.Module:
    """The network of a spec with this interface. Raises UserError if it does not fit the variables' shapes."""
    if isinstance(spec, CodeSpec):
        return create(spec, interface, made=nn.Module)
    shapes = [*interface.variables.values()]
    if isinstance(spec, TransformerSpec):
        if wrong := [problem for _, problem in spec.misfits(interface.variables, bool(interface.image_channels))]:
            raise UserError(f"the transformer does not fit what it generates: {'; '.join(wrong)}")
        return Transformer(interface, **spec.model_dump(exclude={"kind"}))
    if isinstance(spec, JointNetworkSpec):
        if sorted(map(len, shapes))[-2:] != [1, 3] or {len(s) for s in shapes} != {1, 3}:
            raise UserError(
                f"a joint network generates one image or map and vectors, not shapes {[*map(list, shapes)]}"
            )
        image, vector = (part.model_dump(exclude={"kind"}) for part in (spec.image, spec.vector))
        return Joint(interface, image=image, vector=vector, seen=spec.seen)
    if len(shapes) > 1:
        raise UserError(
            f"a {spec.kind} generates one variable, not {len(shapes)}; use a transformer or a joint network"
        )
    shape, settings = interface.shape, spec.model_dump(exclude={"kind"})
    length, width = interface.context or (0, 0)
    told = {"label_dim": interface.label_dim, "augment_dim": interface.augment_dim, "context_dim": width}
    if isinstance(spec, UNetSpec):
        if len(shape) != 3 or shape[1] != shape[2]:
            raise UserError(f"a unet generates square images and maps, not a shape of {list(shape)}")
        if spec.arch != "edm2":
            return UNet(shape[1], shape[0] + interface.image_channels, shape[0], **told, **settings)
        if width or interface.augment_dim:
            raise UserError("EDM2's unet takes no tokens and no augmentation label")
        del settings["arch"], settings["label_init"]
        inputs = shape[0] + interface.image_channels
        return MPUNet(shape[1], inputs, shape[0], label_dim=interface.label_dim, **settings)
    if len(shape) != 1 or interface.image_channels:
        raise UserError(
            f"a prior generates vectors and takes no images as conditioning; its variable has shape {list(shape)}"
        )
    return Prior(shape[0], context_length=length, label_span=interface.label_span, **told, **settings)

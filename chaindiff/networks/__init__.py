"""Networks with one signature: forward(x, noise_labels, class_labels, augment_labels, context).

A joint network takes and gives a tuple where the others have one tensor: x, noise_labels, and what it returns.
"""

from __future__ import annotations

from torch import nn

from chaindiff.code import create
from chaindiff.networks.interface import Interface
from chaindiff.networks.joint import Joint
from chaindiff.networks.prior import Prior
from chaindiff.networks.unet import UNet
from chaindiff.specs.code import CodeSpec
from chaindiff.specs.errors import UserError
from chaindiff.specs.stage import JointNetworkSpec, Network, UNetSpec

__all__ = ["Interface", "Joint", "Prior", "UNet", "build"]


def build(spec: Network, interface: Interface) -> nn.Module:
    """The network of a spec, for one variable unless it is a joint one or code of one's own.

    Raises UserError if the network does not fit the variables' shapes.
    """
    if isinstance(spec, CodeSpec):
        return create(spec, interface, made=nn.Module)
    shapes, label_dim, augment_dim = [*interface.variables.values()], interface.label_dim, interface.augment_dim
    image_channels, label_span = interface.image_channels, interface.label_span
    length, width = interface.context or (0, 0)
    if isinstance(spec, JointNetworkSpec):
        if sorted(map(len, shapes))[-2:] != [1, 3] or {len(s) for s in shapes} != {1, 3}:
            raise UserError(f"a joint network generates one image and vectors, not shapes of {[*map(list, shapes)]}")
        return Joint(
            shapes,
            image=spec.image.model_dump(exclude={"kind"}),
            vector=spec.vector.model_dump(exclude={"kind"}),
            seen=spec.seen,
            label_dim=label_dim,
            image_channels=image_channels,
            label_span=label_span,
            context_dim=width,
            context_length=length,
            augment_dim=augment_dim,
        )
    shape, *others = shapes
    if others:
        raise UserError(f"a {spec.kind} generates one variable, not {len(shapes)}; several need a joint network")
    settings = spec.model_dump(exclude={"kind"})
    if isinstance(spec, UNetSpec):
        if len(shape) != 3 or shape[1] != shape[2]:
            raise UserError(f"a unet generates square images, not a shape of {list(shape)}")
        return UNet(
            shape[1],
            shape[0] + image_channels,
            shape[0],
            label_dim=label_dim,
            augment_dim=augment_dim,
            context_dim=width,
            **settings,
        )
    if len(shape) != 1 or image_channels:
        raise UserError(
            f"a prior generates vectors and takes no images as conditions; its variable has shape {list(shape)}"
        )
    return Prior(
        shape[0],
        label_dim=label_dim,
        augment_dim=augment_dim,
        context_dim=width,
        context_length=length,
        label_span=label_span,
        **settings,
    )

"""What an encoder by name is made of, whichever package it is from: its layers, and the pictures that it expects."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROBE = 64  # a picture so wide and high shows of what size each layer's map is


class Pixels(NamedTuple):
    """The pictures that an encoder was trained with; a checkpoint's `preprocessing`."""

    image_size: int = 256                                       # as wide and high
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)             # of red, green and blue, from 0 to 1; ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def described(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def of(described: dict[str, Any]) -> Pixels:
        """From what a checkpoint holds: what an older file lacks is ImageNet's, and one number is of all three colours.

        Raises:
            ValueError: that makes no sense.
        """
        try:
            size, mean, std = (described.get(name, usual) for name, usual in IMAGENET.described().items())
            mean, std = (tuple(map(float, each)) * (3 if len(each) == 1 else 1) for each in (mean, std))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"its preprocessing cannot be read: {error}") from error
        return Pixels(size, mean, std).checked()

    def checked(self) -> Pixels:
        """Itself. Raises ValueError where it makes no sense."""
        size, mean, std = self
        if type(size) is not int or not 32 <= size <= 2048:
            raise ValueError(f"its pictures are of {size!r} pixels; 32 to 2048 are possible")
        if not len(mean) == len(std) == 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError(f"its pixels have the mean {mean} and the deviation {std}, and not three numbers each")
        return self


IMAGENET = Pixels()  # of torchvision's convolutional encoders


class Trunk(NamedTuple):
    """A classifier up to a feature map, without pooling and classifier."""

    layers: Sequence[nn.Module]     # one after another: pictures (N, 3, H, W) to features (N, C, h, w)
    channels: int                   # C
    first_tuned: int                # of the layers the first that stage 2 tunes
    pixels: Pixels = IMAGENET


class UnitFeatures(nn.Module):
    """Each region's features (N, C, h, w) shifted and scaled to mean 0 and deviation 1.

    A classifier's last map is what its own head reads, numbers of about that size. One from its middle is not:
    EfficientNet-lite0's of stride 16 has a deviation of 4.5, from which attention is slow to learn where to look.
    """

    def forward(self, features: Tensor) -> Tensor:
        regions = features.permute(0, 2, 3, 1)
        return F.layer_norm(regions, regions.shape[3:]).permute(0, 3, 1, 2)


def chained(name: str, layers: Sequence[nn.Module], stride: int, channels_last: bool = False) -> Trunk:
    """A chain of layers up to its last map of that stride; VGG, whose last is of 16, gives that for 32 too.

    Stage 2 tunes from the first map on that is an eighth of the picture or smaller.

    Args:
        channels_last: the maps are (N, h, w, C).
    """
    sizes, channels = measure(name, layers, channels_last)
    strides = [2 ** round(math.log2(PROBE / size)) for size in sizes]  # a map without padding is somewhat smaller
    if strides[-1] > stride and stride not in strides and any(type(each) is nn.Sequential for each in layers):
        return chained(name, [part for each in layers  # RegNet is a stem, and all the rest in one
                              for part in (each if type(each) is nn.Sequential else [each])], stride, channels_last)
    last = max((i for i, each in enumerate(strides) if each == min(stride, strides[-1])), default=-1)
    tuned = next((i for i, size in enumerate(sizes) if size <= PROBE / 8), len(sizes))
    if tuned > last:
        raise no_map(name, stride, strides[-1])
    return Trunk([*layers[:last + 1], *[ChannelsFirst()] * channels_last], channels[last], tuned)


def no_map(name: str, stride: int, last: int) -> ValueError:
    return ValueError(f"{name} has no map with a stride of {stride} (its last has {last}); name another encoder"
                      f"{', or take --encoder_stride 32' * (stride < last <= 32)}")


@torch.no_grad()
def measure(name: str, layers: Sequence[nn.Module], channels_last: bool = False) -> tuple[list[int], list[int]]:
    """How high each layer's map of a small picture is, and how many channels it has."""
    features, shapes = torch.zeros(1, 3, PROBE, PROBE), []
    try:
        for layer in nn.Sequential(*layers).eval():  # BatchNorm must not learn from this picture
            features = layer(features)
            shapes.append((features.movedim(-1, 1) if channels_last else features).shape)
    except (RuntimeError, TypeError, ValueError, AssertionError):  # layers that are no chain
        shapes.append(())
    if len(shapes) < 2 or any(len(shape) != 4 for shape in shapes) or not 1 < shapes[-1][2] == shapes[-1][3]:
        raise ValueError(f"{name} has no trunk that attention could look at; resnet101, vgg16, efficientnet_b0, "
                         "mobilenet_v3_large, convnext_tiny, swin_t and vit_b_16 are some that do")
    return [shape[2] for shape in shapes], [shape[1] for shape in shapes]


class ChannelsFirst(nn.Module):
    """(N, h, w, C) to (N, C, h, w)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 3, 1, 2)


def load_trunk(layers: Sequence[nn.Module], whole: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Gives a classifier's trunk its weights. The head, which is thrown away, need not fit, nor be there.

    The names are the classifier's, or its layers' numbers as in `Encoder.resnet`; the same may stand before each.

    Args:
        whole: the classifier's state_dict.
    """
    numbered = nn.Sequential(*layers).state_dict()
    places = {each.data_ptr() for each in numbered.values()}
    named = {name: each for name, each in whole.items() if each.data_ptr() in places}

    def fitting(own: dict[str, Tensor], prefix: str) -> list[str]:
        return [name for name in own if getattr(weights.get(prefix + name), "shape", None) == own[name].shape]

    readings = [(own, name.removesuffix(first)) for own in (named, numbered) for first in [next(iter(own))]
                for name in (first, *weights) if name.endswith(first)]
    own, prefix = max(readings, key=lambda reading: len(fitting(*reading)))
    found = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
    needed = [name for name in own if not name.endswith("num_batches_tracked")]  # which old files lack
    fits = set(fitting(own, prefix)).intersection(needed)
    for name in needed:
        if name not in fits:
            why = f"is {tuple(found[name].shape)}, not {tuple(own[name].shape)}" if name in found else "is missing"
            raise ValueError(f"{len(fits)} of the trunk's {len(needed)} tensors fit; the first that does not, {name}, "
                             f"{why}; name the network that they are of")
    stages = {name.split(".")[0] for name in own}
    for name in found:
        if name in own:
            own[name].copy_(found[name])
        elif name not in whole and name.split(".")[0] in stages:
            raise ValueError(f"they are of a larger network, which has {name}; name that one")

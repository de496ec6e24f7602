"""Inputs for tiny models by what they read: text, images, sound, or pairs of them.

`candidates` yields what a class may want, the likeliest first; the first that its forward takes is used. Values are
drawn with one seed, so every call gives the same inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from tiny_configs import FIRST_SPECIAL
from torch import Tensor, nn

ROWS, TOKENS = 2, 16
Inputs = dict[str, object]


def candidates(kind: str, model: nn.Module, extra: Inputs) -> Iterator[tuple[str, Inputs]]:
    """(what it is, inputs), the likeliest first.

    Args:
        kind: as in `matrix_cases.Case`.
        model: in the dtype that it is tried in.
        extra: inputs of this type alone, from `tiny_models.yaml`.
    """
    known = inspect.signature(model.forward).parameters
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name, inputs in _of(kind, model):
        inputs = {**inputs, **{key: _tensor(value) for key, value in extra.items()}}
        for labels in (True, False):
            chosen = {
                key: value
                for key, value in inputs.items()
                if value is not None
                and (key in known or (takes_anything and key != "labels"))
                and (labels or "labels" not in key)
            }
            if chosen and (not labels or any("label" in key or "positions" in key for key in chosen)):
                yield name if labels else f"{name}, without labels", chosen


def _of(kind: str, model: nn.Module) -> Iterator[tuple[str, Inputs]]:
    text = _text(model)
    if kind == "causal LM":
        yield "text", {**text, "labels": text["input_ids"], **_cross(model)}
        yield "codebooks", _codebooks(model)
    elif kind in ("masked LM",):
        yield "text", {**text, "labels": text["input_ids"]}
        yield "text with boxes", {**text, "labels": text["input_ids"], "bbox": _boxes()}
    elif kind == "sequence classification":
        yield "text", {**text, "labels": torch.tensor([0, 1]), "bbox": _boxes()}
        yield (
            "text and image",
            {**text, "labels": torch.tensor([0, 1]), "bbox": _boxes(), "pixel_values": _image(model)},
        )
    elif kind == "token classification":
        yield "text", {**text, "labels": text["input_ids"] % 2, "bbox": _boxes()}
    elif kind == "question answering":
        yield "text", {**text, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 5])}
    elif kind == "multiple choice":
        pairs = {key: value[:, None].expand(-1, 3, -1).contiguous() for key, value in text.items()}
        yield "text", {**pairs, "labels": torch.tensor([0, 2])}
    elif kind == "seq2seq LM":
        yield "text", {**text, "labels": text["input_ids"].flip(0)}
        yield "text", {**text, "decoder_input_ids": text["input_ids"].flip(0)}
    elif kind in ("image classification", "segmentation", "detection", "depth"):
        yield from _images(kind, model)
    elif kind == "image, text":
        yield from _image_and_text(model, text)
    elif kind == "video classification":
        video = _draw(ROWS, _frames(model), *_image(model).shape[1:], model=model)
        yield "video", {"pixel_values": video, "labels": torch.tensor([0, 1])}
        yield "video", {"pixel_values_videos": video, "labels": torch.tensor([0, 1])}
    else:
        yield from _sound(kind, model)


def _text(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, FIRST_SPECIAL, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # the end of the sequence, which some heads look for
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _cross(model: nn.Module) -> Inputs:
    """What the decoder of a pair attends to, so that its cross-attention is trained."""
    config = model.config
    width = getattr(config, "cross_attention_hidden_size", None) or getattr(config, "hidden_size", 32)
    crosses = any(
        "encoder_attn" in name or "cross_attn" in name or "crossattention" in name for name, _ in model.named_modules()
    )
    return {"encoder_hidden_states": _draw(ROWS, 5, width, model=model)} if crosses else {}


def _codebooks(model: nn.Module) -> Inputs:
    books = getattr(model.config, "num_codebooks", 4)
    ids = torch.randint(3, FIRST_SPECIAL, (ROWS * books, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": None, **_cross(model)}


def _boxes() -> Tensor:
    return torch.tensor([1, 2, 9, 12]).expand(ROWS, TOKENS, 4).contiguous()


def _images(kind: str, model: nn.Module) -> Iterator[tuple[str, Inputs]]:
    vision = getattr(model.config, "vision_config", model.config)
    if hasattr(vision, "num_patches") and "spatial_shapes" in inspect.signature(model.forward).parameters:
        # SigLIP 2 reads images as rows of patches
        length = vision.num_channels * vision.patch_size**2
        patches = {
            "pixel_values": _draw(ROWS, 16, length, model=model),
            "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
        }
        yield "patches", {**patches, "pixel_attention_mask": torch.ones(ROWS, 16), "labels": torch.tensor([0, 1])}
    for size in (None, 32, 64):
        pixels = _image(model, size)
        labels: object = torch.tensor([0, 1])
        if kind == "detection":
            box = {
                "class_labels": torch.tensor([0, 1]),
                "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.3, 0.4, 0.2, 0.2]]),
            }
            labels = [{**box, "boxes": box["boxes"].to(pixels.dtype)} for _ in range(ROWS)]
        elif kind in ("segmentation", "depth"):
            labels = torch.randint(0, 2, (ROWS, *pixels.shape[-2:]), generator=torch.Generator().manual_seed(2))
        text = _text(model)
        yield (
            f"images of {pixels.shape[-1]}",
            {"pixel_values": pixels, "labels": labels, **(text if kind == "detection" else {})},
        )
        yield f"images of {pixels.shape[-1]}", {"pixel_values": pixels, "labels": labels}


def _image_size(model: nn.Module) -> int:
    for config in (
        model.config,
        getattr(model.config, "vision_config", None),
        getattr(model.config, "backbone_config", None),
    ):
        size = getattr(config, "image_size", None)
        if size is not None:
            return size if isinstance(size, int) else size[0] if isinstance(size, list | tuple) else 16
    return 32


def _image(model: nn.Module, size: int | None = None) -> Tensor:
    config = getattr(model.config, "vision_config", None) or model.config
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    size = size or _image_size(model)
    return _draw(ROWS, channels if isinstance(channels, int) else 3, size, size, model=model)


def _frames(model: nn.Module) -> int:
    return next((getattr(model.config, n) for n in ("num_frames", "frames_per_clip") if hasattr(model.config, n)), 4)


def _image_and_text(model: nn.Module, text: dict[str, Tensor]) -> Iterator[tuple[str, Inputs]]:
    """An image whose tokens stand in the text where the model wants them."""
    config, pixels = model.config, _image(model)
    token = next(
        (getattr(config, n) for n in ("image_token_id", "image_token_index") if getattr(config, n, None)), None
    )
    contrastive = "labels" not in inspect.signature(model.forward).parameters
    loss = {"return_loss": True} if contrastive else {"labels": text["input_ids"]}
    yield "image, text", {**text, "pixel_values": pixels, **loss}
    if token is not None:
        for images in (_plain_images(model), _tiles(model), _patches(model)):
            images, count = _image_tokens(model, images)
            if count:
                ids = text["input_ids"].clone().repeat_interleave(1, 0)
                ids = torch.cat([ids[:, :2], torch.full((ROWS, count), token), ids[:, 2:]], dim=1)
                labels = ids.masked_fill(ids == token, -100)
                kinds = (ids == token).long()
                yield (
                    "image, text",
                    {
                        "input_ids": ids,
                        "attention_mask": torch.ones_like(ids),
                        "labels": labels,
                        "mm_token_type_ids": kinds,
                        "token_type_ids": kinds,
                        **images,
                    },
                )
    yield "text alone", {**text, "labels": text["input_ids"]}


def _plain_images(model: nn.Module) -> Inputs:
    pixels = _image(model)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[-2:]] * ROWS)}


def _tiles(model: nn.Module) -> Inputs:
    return {"pixel_values": _image(model)[:, None]}


def _patches(model: nn.Module) -> Inputs:
    """Images as rows of patches with their grids, as the Qwen family reads them."""
    vision = getattr(model.config, "vision_config", None)
    patch = getattr(vision, "patch_size", 4)
    patch = patch if isinstance(patch, int) else patch[0]
    length = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * patch**2
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    return {"pixel_values": _draw(int(grid.prod(1).sum()), length, model=model), "image_grid_thw": grid}


def _image_tokens(model: nn.Module, images: Inputs) -> tuple[Inputs, int]:
    """The inputs that the model's image tower takes, and how many tokens of the text one image stands for."""
    owner = model if hasattr(model, "get_image_features") else getattr(model, "model", None)
    get = getattr(owner, "get_image_features", None)
    if get is None:
        return images, 0
    known = inspect.signature(get).parameters
    images = {key: value for key, value in images.items() if key in known}
    try:
        with torch.no_grad():
            found = get(**images)
    except Exception:  # it wants other images
        return images, 0
    found = getattr(found, "pooler_output", found)
    if isinstance(found, Tensor):
        return images, found.shape[-2] if found.dim() == 3 else found.shape[0] // ROWS
    first = found[0] if isinstance(found, list | tuple) else None
    return images, first.reshape(-1, first.shape[-1]).shape[0] if isinstance(first, Tensor) else 0


def _sound(kind: str, model: nn.Module) -> Iterator[tuple[str, Inputs]]:
    config = model.config
    ids = _text(model)["input_ids"]
    labels = {"CTC": ids[:, :3] % 20 + 3, "audio classification": torch.tensor([0, 1])}.get(kind, ids)
    mel = next(
        (
            getattr(config, n)
            for n in ("num_mel_bins", "input_feat_per_channel", "feature_size")
            if isinstance(getattr(config, n, None), int)
        ),
        80,
    )
    length = 2 * config.max_source_positions if isinstance(getattr(config, "max_source_positions", None), int) else 64
    wave = _draw(ROWS, 6400, model=model)  # spans of ten frames are masked
    for name, inputs in (
        ("waves", {"input_values": wave}),
        ("mel spectrograms", {"input_features": _draw(ROWS, mel, length, model=model)}),
        ("mel spectrograms", {"input_features": _draw(ROWS, length, mel, model=model)}),
        ("mel spectrograms", {"input_features": _draw(ROWS, length, 2 * mel, model=model)}),
        ("mel spectrograms", {"input_values": _draw(ROWS, length, mel, model=model)}),
        ("mel spectrograms", {"input_values": _draw(ROWS, getattr(config, "max_length", length), mel, model=model)}),
    ):
        yield name, {**inputs, "labels": labels}
        yield name, {**inputs, "decoder_input_ids": ids}


def _draw(*shape: int, model: nn.Module) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return values.to(next(model.parameters()).dtype)


def _tensor(value: object) -> object:
    return torch.tensor(value) if isinstance(value, list) else value

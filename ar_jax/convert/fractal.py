"""FractalGen's releases (arXiv:2502.17437, github.com/LTH14/fractalgen).

``checkpoint-last.pth`` of FractalAR and FractalMAR on ImageNet of 64 pixels and of FractalMAR-B, -L
and -H on 256: the state_dict lies under 'model'. There is no tokenizer: pixels are the codes.

Options, beside the fields that the tensors say:

    heads, head.heads     of every level, of the pixels; where the widths are none of the releases'
    iterations    of every masked level: at most 64, 16 and 16
    conditions    that masked levels read, where the first is the only one
    attention_dropout    0.1, without masked levels 0
    dropout, label_dropout, channel_weights    0.1, 0.1, (5, 1, 1)
    guidance, temperature, filter_threshold    of sampling; see `SAMPLING`, else 1, 1 and 0.0001
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from ar_jax.backbones.patch_levels import COLOUR_HEAD, NEIGHBOURS, swiglu_width
from ar_jax.convert.llamagen import layer
from ar_jax.convert.part import Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import Place, Places, Tensors, reshaped, same
from ar_jax.convert.vit import block, count_of, linear, norm
from ar_jax.convert.vqgan import Shapes
from ar_jax.schedules import nested

CONTAINER = ("model",)
# What the channels are normalised with, which no file holds: ImageNet's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Widths of the releases, levels and pixels -> heads.
HEADS = {
    (1024, 512, 128): (16, 8, 4),
    (768, 384, 192, 64): (12, 6, 3, 4),
    (1024, 512, 256, 64): (16, 8, 4, 4),
    (1280, 640, 320, 64): (16, 8, 4, 4),
}
# Widths and whether the levels are masked -> guidance and the official temperature.
SAMPLING = {
    ((1024, 512, 128), False): (11.0, 1.03),
    ((1024, 512, 128), True): (6.5, 1.02),
    ((768, 384, 192, 64), True): (29.0, 1.1),
    ((1024, 512, 256, 64), True): (21.0, 1.1),
    ((1280, 640, 320, 64), True): (19.0, 1.1),
}
FILTER_THRESHOLD = 1e-4
ITERATIONS = (64, 16)  # of the first level, of the others
CHANNELS = "rgb"
WEIGHTS = (5.0, 1.0, 1.0)  # of channels in training; of mean colours always
NO_TOKENIZER = "FractalGen has no tokenizer, pixels are its codes: give its file as --transformer"


def unwrap_tokenizer(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ValueError."""
    raise ValueError(NO_TOKENIZER)


def tokenizer(shapes: Shapes, options: Mapping[str, Any]) -> Part:
    """The pixels of a generator's images: no tensor says anything of them."""
    if shapes:
        raise ValueError(NO_TOKENIZER)
    section = dict(name="pixels", image_size=options.get("image_size", 256), image_channels=3)
    return tokenizer_part({"tokenizer": section})


def tokenizer_part(config: Mapping[str, Any]) -> Part:
    """The part of a section 'tokenizer' of name 'pixels', without tensors."""
    section = config["tokenizer"]
    if section["name"] != "pixels":
        raise ValueError(f"tokenizer.name is {section['name']!r}; FractalGen's is 'pixels'")
    return Part(section={"tokenizer": dict(section)}, places={}, container=CONTAINER)


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state_dict inside a file."""
    return find_state_dict(container, CONTAINER, "fake_latent")


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The generator that tensors of these shapes are; options: see above."""
    count = next(i for i in itertools.count() if f"{_root(i)}generator.norm.weight" not in shapes)
    if not count:
        raise ValueError("tensor 'generator.norm.weight' is missing")
    roots, pixel = [f"{_root(i)}generator." for i in range(count)], _root(count)
    masked = [f"{root}mask_token" in shapes for root in roots]
    everyone = [*roots, pixel]
    widths = tuple(shape_of(shapes, f"{root}norm.weight")[0] for root in everyone)
    depths = tuple(_depth(shapes, root) for root in everyone)
    heads = _heads(widths, options)
    colour = any(f"{root}pix_proj.weight" in shapes for root in roots)
    sizes, conditions = _sizes(shapes, roots, masked, colour, options)
    inner = tuple(
        shape_of(shapes, f"{root}blocks.0.{'mlp.fc1' if m else 'feed_forward.w1'}.weight")[0]
        for root, m in zip(roots, masked, strict=True)
    )
    usual = tuple(4 * w if m else swiglu_width(w) for w, m in zip(widths, masked, strict=False))
    values = shape_of(shapes, f"{pixel}r_codebook.weight")[0]
    said = options.get("iterations") or [ITERATIONS[0], *[ITERATIONS[1]] * (count - 1)]
    lengths = [(a // b) ** 2 for a, b in itertools.pairwise(sizes)]
    iterations = tuple(
        min(n, length) if m else 0 for n, length, m in zip(said, lengths, masked, strict=True)
    )
    guidance, temperature = SAMPLING.get((widths, masked[0]), (1.0, 1.0))
    backbone = dict(
        name="fractal",
        num_classes=agree(
            "num_classes", shape_of(shapes, "class_emb.weight")[0], options, "class_emb.weight"
        ),
        channels=3,
        values=values,
        widths=widths[:-1],
        depths=depths[:-1],
        heads=heads[:-1],
        mlp_hidden=None if inner == usual else inner,
        conditions=conditions,
        colour=colour,
        mean=MEAN,
        std=STD,
        attention_dropout=options.get("attention_dropout", 0.1 if any(masked) else 0.0),
        dropout=options.get("dropout", 0.1),
    )
    head = dict(
        name="pixels",
        channels=3,
        values=values,
        width=widths[-1],
        depth=depths[-1],
        heads=heads[-1],
        filter_threshold=options.get("filter_threshold", FILTER_THRESHOLD),
    )
    return generator_part(
        dict(
            schedule=dict(name="nested", sizes=sizes, iterations=iterations),
            backbone=backbone,
            head=head,
            objective=dict(
                name="nested",
                label_dropout=options.get("label_dropout", 0.1),
                channel_weights=tuple(options.get("channel_weights", WEIGHTS)),
                colour_weights=WEIGHTS if colour else (),
            ),
            sampling=dict(
                temperature=options.get("temperature", 1.0 / temperature),
                guidance=dict(
                    scale=options.get("guidance", guidance),
                    kind="linear_known" if masked[0] else "linear_after",
                ),
            ),
        )
    )


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone, head = config["backbone"], config["head"]
    if (backbone["name"], head["name"]) != ("fractal", "pixels"):
        raise ValueError(
            f"backbone.name is {backbone['name']!r} and head.name {head['name']!r}; FractalGen's "
            "are 'fractal' and 'pixels'"
        )
    if backbone["channels"] != len(CHANNELS):
        raise ValueError(
            f"backbone.channels is {backbone['channels']}; FractalGen's images have "
            f"{len(CHANNELS)}, red, green and blue"
        )
    fields = config["schedule"]
    schedule = nested(sizes=fields["sizes"], iterations=fields["iterations"])
    places: Places = {
        "fake_latent": same("backbone/condition/null_embed"),
        "class_emb.weight": same("backbone/condition/class_embed/embedding"),
    }
    for index, level in enumerate(schedule.levels):
        width, heads = backbone["widths"][index], backbone["heads"][index]
        root, ours = f"{_root(index)}generator", f"backbone/levels_{index}"
        masked = level.mask is not None
        places |= {
            f"{root}.pos_embed_learned": _row(f"{ours}/position", width),
            **linear(f"{root}.patch_emb", f"{ours}/patch_embed"),
            **norm(f"{root}.patch_emb_ln", f"{ours}/embed_norm"),
            **linear(f"{root}.cond_emb", f"{ours}/condition_embed"),
            **norm(f"{root}.norm", f"{ours}/final_norm"),
        }
        if masked:
            places[f"{root}.mask_token"] = reshaped(f"{ours}/mask_token", (1, width), (1, 1, width))
        if masked and index and backbone.get("colour"):
            places |= linear(f"{root}.pix_proj", f"{ours}/colour_embed")
            places |= _pixels(f"{root}.guiding_pixel_loss.", f"{ours}/colour_head", COLOUR_HEAD)
        sizes = dict(width=width, heads=heads)
        for i in range(backbone["depths"][index]):
            key = f"{root}.blocks.{i}"
            places |= (
                block(key, f"{ours}/stack", width, heads, i)
                if masked
                else layer(sizes, i, key, f"{ours}/stack/blocks")
            )
    places |= _pixels(_root(len(schedule.levels)), "head", head)
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        container=CONTAINER,
    )


def _root(index: int) -> str:
    """Before the keys of a level, or after the last level of the pixels."""
    return "next_fractal." * index


def _row(path: str, width: int) -> Place:
    """A table with an axis of one before it."""
    return reshaped(path, (-1, width), (1, -1, width))


def _pixels(root: str, ours: str, sizes: Mapping[str, Any]) -> Places:
    """A transformer over the channels of a pixel."""
    places: Places = {
        **linear(f"{root}cond_proj", f"{ours}/condition_embed"),
        **norm(f"{root}ln", f"{ours}/embed_norm"),
        **norm(f"{root}norm", f"{ours}/final_norm"),
    }
    for i, name in enumerate(CHANNELS):
        places[f"{root}{name}_codebook.weight"] = same(f"{ours}/codebook", i)
        places[f"{root}{name}_mlm.bias"] = reshaped(f"{ours}/bias", (-1,), (1, -1), i)
    for i in range(sizes["depth"]):
        places |= block(f"{root}blocks.{i}", f"{ours}/stack", sizes["width"], sizes["heads"], i)
    return places


def _depth(shapes: Shapes, root: str) -> int:
    """Number of blocks of either kind."""
    last = "norm1" if f"{root}blocks.0.norm1.weight" in shapes else "attention_norm"
    return count_of(shapes, f"{root}blocks.{{}}.{last}.weight")


def _heads(widths: tuple[int, ...], options: Mapping[str, Any]) -> tuple[int, ...]:
    """Of every level, and of the pixels."""
    *levels, pixels = HEADS.get(widths, (None,) * len(widths))
    heads = (*options.get("heads", levels), options.get("head.heads", pixels))
    if len(heads) != len(widths) or any(not h or w % h for w, h in zip(widths, heads, strict=True)):
        raise ValueError(
            f"heads is {heads[:-1]} and head.heads {heads[-1]}, which must divide the widths "
            f"{widths[:-1]} and {widths[-1]}: give both as options where these are no official size"
        )
    return heads


def _sizes(
    shapes: Shapes,
    roots: list[str],
    masked: list[bool],
    colour: bool,
    options: Mapping[str, Any],
) -> tuple[tuple[int, ...], int]:
    """(pixels of images, patches, ... on a side, conditions that masked levels read)."""
    below = [math.isqrt(shape_of(shapes, f"{r}patch_emb.weight")[1] // 3) for r in roots]
    rows = [shape_of(shapes, f"{root}pos_embed_learned")[1] for root in roots]
    found = {
        rows[i] - colour - (below[i - 1] // below[i]) ** 2
        for i in range(1, len(roots))
        if masked[i]
    }
    if masked[0] and not found:
        fits = range(1, 1 + NEIGHBOURS)
        found = {k for k in fits if math.isqrt(rows[0] - k) ** 2 == rows[0] - k >= 4}
    if len(found) > 1:
        found &= {options.get("conditions")}
    if masked.count(True) and len(found) != 1:
        raise ValueError("the tables of positions do not say one number of conditions")
    conditions = agree("conditions", found.pop(), options, "the file") if found else 1
    side = math.isqrt(rows[0] - (conditions if masked[0] else 1))
    size = agree("image_size", side * below[0], options, "pos_embed_learned and patch_emb")
    return (size, *below), conditions

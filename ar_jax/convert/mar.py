"""MAR's releases (arXiv:2406.11838, github.com/LTH14/mar): the KL-16 autoencoder and MAR-B, L, H.

``kl16.ckpt`` keeps the autoencoder under 'model'; ``checkpoint-last.pth`` of a transformer keeps
'model' and, what generation uses, 'model_ema'. Losses and discriminators beside the autoencoder
(`LEFTOVERS`) are not read.

Options, beside the fields that the tensors say:

    image_size      256
    scale           of the latents, 0.2325; patch: cells of the latent on a side of a code, 1
    buffer          rows of class embeddings: those of the position table that are no codes
    heads, decoder_heads    where the size is none of the releases'
    iterations, sampling_steps    64 (no more than codes), '100'
    guidance, temperature         of the sampler: 1, 1
    mlp_ratio       where the widths of the feed-forward layers leave a choice
    attention_dropout, dropout, rate_min, repeats, label_dropout    0.1, 0.1, 0.7, 4, 0.1
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from ar_jax.convert.part import Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import Places, Tensors, dense, fused, fused_bias, reshaped, same
from ar_jax.convert.vqgan import LDM, Shapes, autoencoder_places, read_autoencoder

# (depth, width) of the official encoders and decoders -> heads, which the tensors do not say.
SIZES = {(12, 768): 12, (16, 1024): 16, (20, 1280): 16}
# The official code loads the trained weights before the averaged ones; ours are one of the two.
CONTAINER = ("model", "model_ema")
LEFTOVERS = ("loss.*", "discriminator.*")


def unwrap_tokenizer(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The autoencoder's state_dict inside a file."""
    return find_state_dict(container, ("model", "state_dict"), "post_quant_conv.weight")


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's averaged state_dict inside a file."""
    return find_state_dict(container, ("model_ema", "model"), "fake_latent")


def tokenizer(shapes: Shapes, options: Mapping[str, Any]) -> Part:
    """The autoencoder that tensors of these shapes are; options: see above."""
    fields = read_autoencoder(shapes, LDM, {"image_size": 256, **options})
    doubled = shape_of(shapes, "quant_conv.weight")[0]
    if doubled != 2 * fields["code_width"]:
        raise ValueError(
            f"'quant_conv.weight' makes {doubled} channels, but means and log-variances of "
            f"{fields['code_width']} channels are {2 * fields['code_width']}"
        )
    section = dict(
        name="kl",
        scale=options.get("scale", 0.2325),
        patch=options.get("patch", 1),
        autoencoder=fields,
    )
    return tokenizer_part({"tokenizer": section})


def tokenizer_part(config: Mapping[str, Any]) -> Part:
    """The part of a section 'tokenizer' of name 'kl'."""
    section = config["tokenizer"]
    if section["name"] != "kl":
        raise ValueError(f"tokenizer.name is {section['name']!r}, which is no tokenizer of MAR's")
    places = autoencoder_places(section["autoencoder"], LDM)
    trained_by = dict(name="kl_tokenizer", l1=1.0, l2=0.0, kl=1e-6)
    return Part(
        section={"tokenizer": dict(section), "objective": trained_by},
        places=places,
        leftovers=LEFTOVERS,
        container=("model",),
    )


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    length, decoder_width = shape_of(shapes, "diffusion_pos_embed_learned")[1:]
    rows = shape_of(shapes, "encoder_pos_embed_learned")[1]
    classes, width = shape_of(shapes, "class_emb.weight")
    code_width = shape_of(shapes, "z_proj.weight")[1]
    side = math.isqrt(length)
    if side**2 != length:
        raise ValueError(
            f"'diffusion_pos_embed_learned' has {length} positions, which is no square"
        )
    depth = agree(
        "depth", count_keys(shapes, "encoder_blocks.{}.norm1.weight"), options, "the file"
    )
    decoder_depth = count_keys(shapes, "decoder_blocks.{}.norm1.weight")
    backbone = dict(
        name="encoder_decoder",
        code_width=agree("code_width", code_width, options, "z_proj.weight"),
        num_classes=agree("num_classes", classes, options, "class_emb.weight"),
        width=agree("width", width, options, "class_emb.weight"),
        depth=depth,
        heads=_heads("heads", (depth, width), options),
        decoder_width=agree("decoder_width", decoder_width, options, "decoder_embed.weight"),
        decoder_depth=decoder_depth,
        decoder_heads=_heads("decoder_heads", (decoder_depth, decoder_width), options),
        buffer=agree("buffer", rows - length, options, "encoder_pos_embed_learned"),
        mlp_ratio=_mlp_ratio(shapes, (width, decoder_width), options),
        norm_epsilon=1e-6,
        activation="gelu",
        attention_dropout=options.get("attention_dropout", 0.1),
        dropout=options.get("dropout", 0.1),
    )
    head = dict(
        name="diffusion",
        code_width=code_width,
        width=shape_of(shapes, "diffloss.net.input_proj.weight")[0],
        depth=count_keys(shapes, "diffloss.net.res_blocks.{}.in_ln.weight"),
        sampling_steps=str(options.get("sampling_steps", "100")),
    )
    objective = dict(
        name="masked",
        label_dropout=options.get("label_dropout", 0.1),
        rate_min=options.get("rate_min", 0.7),
        repeats=options.get("repeats", 4),
    )
    sampling = dict(
        temperature=options.get("temperature", 1.0),
        guidance=dict(scale=options.get("guidance", 1.0), kind="linear_known"),
    )
    iterations = options.get("iterations", min(64, length))
    return generator_part(
        dict(
            schedule=dict(name="masked", grid=side, iterations=iterations),
            backbone=backbone,
            head=head,
            objective=objective,
            sampling=sampling,
        )
    )


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone, head = config["backbone"], config["head"]
    if (backbone["name"], head["name"]) != ("encoder_decoder", "diffusion"):
        raise ValueError(
            f"backbone.name is {backbone['name']!r} and head.name {head['name']!r}; MAR's are "
            "'encoder_decoder' and 'diffusion'"
        )
    width, decoder_width = backbone["width"], backbone["decoder_width"]

    def table(path: str, columns: int, *ahead: int) -> Any:
        return reshaped(f"backbone/{path}", (-1, columns), (*ahead, -1, columns))

    places: Places = {
        "fake_latent": same("backbone/condition/null_embed"),
        "encoder_pos_embed_learned": table("encoder_position", width, 1),
        "mask_token": table("mask_token", decoder_width, 1),
        "decoder_pos_embed_learned": table("decoder_position", decoder_width, 1),
        "diffusion_pos_embed_learned": table("hidden_position", decoder_width, 1),
        "class_emb.weight": same("backbone/condition/class_embed/embedding"),
        **linear("z_proj", "backbone/token_embed"),
        **norm("z_proj_ln", "backbone/encoder_input_norm"),
    }
    for i in range(backbone["depth"]):
        places |= block(f"encoder_blocks.{i}", "backbone/encoder", width, backbone["heads"], i)
    places |= norm("encoder_norm", "backbone/encoder_norm")
    places |= linear("decoder_embed", "backbone/decoder_embed")
    for i in range(backbone["decoder_depth"]):
        heads = backbone["decoder_heads"]
        places |= block(f"decoder_blocks.{i}", "backbone/decoder", decoder_width, heads, i)
    places |= norm("decoder_norm", "backbone/decoder_norm")
    places |= _head(head)
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        container=CONTAINER,
    )


def block(key: str, stack: str, width: int, heads: int, layer: int) -> Places:
    """A block of a vision transformer, the ``layer``-th of our stack at the path ``stack``."""
    head_width = width // heads
    root = f"{stack}/blocks"
    attention = f"{root}/attention"
    return {
        **norm(f"{key}.norm1", f"{root}/attention_norm", layer),
        f"{key}.attn.qkv.weight": fused(attention, (width, heads, head_width), layer),
        f"{key}.attn.qkv.bias": fused_bias(attention, (heads, head_width), layer),
        f"{key}.attn.proj.weight": dense(
            f"{attention}/out/kernel", (heads, head_width, width), 2, layer
        ),
        f"{key}.attn.proj.bias": same(f"{attention}/out/bias", layer),
        **norm(f"{key}.norm2", f"{root}/mlp_norm", layer),
        **linear(f"{key}.mlp.fc1", f"{root}/mlp/up", layer),
        **linear(f"{key}.mlp.fc2", f"{root}/mlp/down", layer),
    }


def _head(head: Mapping[str, Any]) -> Places:
    width, root = head["width"], "diffloss.net"
    places: Places = {
        **linear(f"{root}.time_embed.mlp.0", "head/time_embed_0"),
        **linear(f"{root}.time_embed.mlp.2", "head/time_embed_1"),
        **linear(f"{root}.cond_embed", "head/condition_embed"),
        **linear(f"{root}.input_proj", "head/noisy_embed"),
    }
    for i in range(head["depth"]):
        key, ours = f"{root}.res_blocks.{i}", f"head/blocks_{i}"
        places |= norm(f"{key}.in_ln", f"{ours}/norm")
        places |= linear(f"{key}.mlp.0", f"{ours}/mlp/up")
        places |= linear(f"{key}.mlp.2", f"{ours}/mlp/down")
        places |= _modulation(f"{key}.adaLN_modulation.1", f"{ours}/modulation", 3, width)
    places |= linear(f"{root}.final_layer.linear", "head/output")
    final = f"{root}.final_layer.adaLN_modulation.1"
    return places | _modulation(final, "head/final_modulation", 2, width)


def _modulation(key: str, ours: str, vectors: int, width: int) -> Places:
    return {
        f"{key}.weight": dense(f"{ours}/kernel", (width, vectors, width)),
        f"{key}.bias": reshaped(f"{ours}/bias", (vectors, width), (-1,)),
    }


def linear(key: str, ours: str, layer: int | None = None) -> Places:
    """A linear layer's weight and bias."""
    return {
        f"{key}.weight": dense(f"{ours}/kernel", layer=layer),
        f"{key}.bias": same(f"{ours}/bias", layer),
    }


def norm(key: str, ours: str, layer: int | None = None) -> Places:
    """A layer norm's weight and bias."""
    return {
        f"{key}.weight": same(f"{ours}/scale", layer),
        f"{key}.bias": same(f"{ours}/bias", layer),
    }


def _mlp_ratio(shapes: Shapes, widths: tuple[int, int], options: Mapping[str, Any]) -> float:
    """The one ratio of both feed-forward widths, which officially are int(width * ratio).

    Many ratios give the same widths: the option's, or the one of fewest digits.
    """
    keys = [f"{side}_blocks.0.mlp.fc1.weight" for side in ("encoder", "decoder")]
    inner = [shape_of(shapes, key)[0] for key in keys]

    def fits(ratio: float) -> bool:
        return [int(width * ratio) for width in widths] == inner

    said = options.get("mlp_ratio")
    if said is not None:
        if not fits(said):
            raise ValueError(
                f"mlp_ratio is {said}, but for widths of {widths[0]} and {widths[1]} {keys[0]!r} "
                f"has {inner[0]} and {keys[1]!r} {inner[1]} rows"
            )
        return float(said)
    ratios = [rows / width for rows, width in zip(inner, widths, strict=True)]
    least = max(ratios)
    end = min((rows + 1) / width for rows, width in zip(inner, widths, strict=True))
    for ratio in (*(round(least, digits) for digits in range(16)), least, (least + end) / 2):
        if fits(ratio):
            return float(ratio)
    raise ValueError(
        f"the feed-forward layers are {ratios[0]:g} times as wide as the encoder but "
        f"{ratios[1]:g} times as wide as the decoder: MAR has one ratio for both"
    )


def _heads(name: str, size: tuple[int, int], options: Mapping[str, Any]) -> int:
    """The option, or the heads of an official (depth, width)."""
    if name not in options and size not in SIZES:
        flag = "--heads=N" if name == "heads" else f"--option={name}=N"
        raise ValueError(
            f"{size[0]} blocks of width {size[1]} are no official size, and the tensors do not say "
            f"{name}, the number of heads: give it with {flag}"
        )
    return options.get(name, SIZES.get(size))


def count_keys(shapes: Shapes, pattern: str) -> int:
    """For how many numbers from 0 on there is the key ``pattern``; ValueError if for none."""
    found = next(i for i in itertools.count() if pattern.format(i) not in shapes)
    if not found:
        raise ValueError(f"tensor {pattern.format(0)!r} is missing")
    return found

"""Checks that the parts of a system fit each other; every error names a field of the config."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

from ar_jax.backbones.bidirectional import Bidirectional
from ar_jax.backbones.checks import (
    check_cross_decoder,
    check_encoder_decoder,
    check_feature_width,
    check_heads,
    check_masked,
    check_patch_levels,
    check_positive,
)
from ar_jax.backbones.cross_decoder import CrossDecoder
from ar_jax.backbones.decoder import Decoder
from ar_jax.backbones.encoder_decoder import EncoderDecoder
from ar_jax.backbones.flow_checks import check_scale_decoder
from ar_jax.backbones.fractal import Fractal
from ar_jax.backbones.instructed_decoder import InstructedDecoder
from ar_jax.backbones.noisy_decoder import NoisyDecoder, check_noisy_decoder
from ar_jax.backbones.ordered import OrderedDecoder
from ar_jax.backbones.shuffled_decoder import ShuffledDecoder, check_shuffled
from ar_jax.backbones.two_pass_decoder import TwoPassDecoder
from ar_jax.heads.bitwise import BitwiseHead
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.heads.checks import MaskedHead, check_masked_head
from ar_jax.heads.flow import FlowHead, VelocityHead, check_velocity_head
from ar_jax.heads.pixels import PixelHead
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from ar_jax.tokenizers.checks import check_losses, check_pixels
from ar_jax.tokenizers.kl import KLTokenizer
from ar_jax.tokenizers.pixels import PixelTokenizer
from ar_jax.tokenizers.quantizers import MultiScaleQuantizer
from ar_jax.tokenizers.tokenizer import Tokenizer

AnyTokenizer: TypeAlias = Tokenizer | KLTokenizer | PixelTokenizer
DiscreteBackbone: TypeAlias = Decoder | CrossDecoder | OrderedDecoder | Bidirectional
ContinuousBackbone: TypeAlias = EncoderDecoder | NoisyDecoder
ContinuousHead: TypeAlias = MaskedHead | VelocityHead
AnyBackbone: TypeAlias = DiscreteBackbone | ContinuousBackbone | Fractal
AnyHead: TypeAlias = CategoricalHead | BitwiseHead | ContinuousHead | PixelHead

# Which objective goes with a backbone, by the name that configs give it.
OBJECTIVE_OF = {
    Decoder: "likelihood",
    ShuffledDecoder: "likelihood",
    CrossDecoder: "likelihood",
    Bidirectional: "masked_codes",
    InstructedDecoder: "likelihood",
    TwoPassDecoder: "likelihood",
    EncoderDecoder: "masked",
    Fractal: "nested",
}

# What goes with the codes of a tokenizer: backbones and heads, with how an error calls them.
FITTING: tuple[tuple[Any, str, Any, Any], ...] = (
    (
        Tokenizer,
        "discrete codes",
        (DiscreteBackbone, "'decoder', one of its kind or 'bidirectional'"),
        (CategoricalHead | BitwiseHead, "'categorical' or 'bitwise'"),
    ),
    (
        KLTokenizer,
        "continuous codes",
        (Decoder | ContinuousBackbone, "'encoder_decoder', 'noisy_decoder' or 'decoder'"),
        (ContinuousHead, "'diffusion', 'energy', 'mixture', 'velocity' or 'flow'"),
    ),
    (PixelTokenizer, "pixels", (Fractal, "'fractal'"), (PixelHead, "'pixels'")),
)


def check_system(tokenizer: AnyTokenizer, backbone: AnyBackbone, head: AnyHead) -> None:
    """The parts of a generator.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    check_attention(backbone)
    codes, *fits = next(row for kind, *row in FITTING if isinstance(tokenizer, kind))
    for part, module, (forms, names) in zip(
        ("backbone", "head"), (backbone, head), fits, strict=True
    ):
        if not isinstance(module, forms):
            raise ValueError(
                f"{part}.name is another than {names}, which goes with the {codes} of "
                "config.tokenizer"
            )
    if isinstance(tokenizer, PixelTokenizer):
        assert isinstance(backbone, Fractal) and isinstance(head, PixelHead)
        check_patch_levels(backbone)
        check_pixels("backbone", backbone, tokenizer)
        check_pixels("head", head, tokenizer)
        return
    if isinstance(tokenizer, Tokenizer):
        assert isinstance(backbone, DiscreteBackbone)
        check_classifier(head, tokenizer)
        if isinstance(backbone, Bidirectional):
            check_bidirectional(backbone, tokenizer)
        elif isinstance(backbone, Decoder):
            check_backbone(backbone, tokenizer)
        elif isinstance(backbone, CrossDecoder):
            check_cross_decoder(backbone, tokenizer)
        else:
            check_ordered(backbone, tokenizer)
    else:
        assert isinstance(backbone, Decoder | ContinuousBackbone)
        assert isinstance(head, ContinuousHead)
        check_continuous(tokenizer, backbone, head)


def check_classifier(head: AnyHead, tokenizer: Tokenizer) -> None:
    """config.head of a tokenizer whose codes are numbers, or bits."""
    if isinstance(head, BitwiseHead):
        if head.bits != tokenizer.bits:
            kept = f"{tokenizer.bits} bits" if tokenizer.bits else "single numbers"
            raise ValueError(
                f"head.bits is {head.bits}, but config.tokenizer makes codes of {kept}: make them "
                "equal, or use head.name 'categorical' for numbers"
            )
        return
    assert isinstance(head, CategoricalHead)
    if tokenizer.bits:
        raise ValueError(
            f"head.name is 'categorical', which gives one number a code, but config.tokenizer "
            f"makes codes of {tokenizer.bits} bits: use head.name 'bitwise', or tokenizer.name "
            "'bsq', 'lfq', 'fsq', 'vq' or 'multiscale_vq'"
        )
    check_vocabulary("head.vocab_size", head.vocab_size, tokenizer)


def check_attention(backbone: AnyBackbone) -> None:
    """config.attention can do what config.backbone asks of it."""
    if backbone.attention == "splash" and backbone.attention_dropout:
        raise ValueError(
            f"attention is 'splash', which cannot drop attention weights, and backbone."
            f"attention_dropout is {backbone.attention_dropout}: set it to 0, or attention to "
            "'auto' or 'xla'"
        )


def check_continuous(
    tokenizer: KLTokenizer, backbone: Decoder | ContinuousBackbone, head: ContinuousHead
) -> None:
    """The parts of a generator of continuous codes."""
    fits: dict[type, tuple[Any, str]] = {
        NoisyDecoder: (VelocityHead, "'noisy_decoder' goes with 'velocity'"),
        EncoderDecoder: (
            MaskedHead,
            "'encoder_decoder' goes with 'diffusion', 'energy', 'mixture'",
        ),
        Decoder: (FlowHead, "'decoder' goes, on continuous codes, with 'flow'"),
    }
    if type(backbone) not in fits:
        raise ValueError(
            "backbone.name is 'shuffled_decoder', which merges discrete codes: use 'decoder', or "
            "a tokenizer of discrete codes"
        )
    form, said = fits[type(backbone)]
    if not isinstance(head, form) or isinstance(head, FlowHead) != (form is FlowHead):
        raise ValueError(f"head.name is another one, but the backbone {said}")
    check_positive(backbone, "num_classes")
    if isinstance(backbone, Decoder):
        check_heads(backbone, "width", "heads")
        check_scale_decoder(backbone, tokenizer.code_width)
        check_condition(backbone)
    else:
        check_code_width("backbone.code_width", backbone.code_width, tokenizer)
    if isinstance(backbone, NoisyDecoder):
        check_noisy_decoder(backbone)
    elif isinstance(backbone, EncoderDecoder):
        check_encoder_decoder(backbone)
    check_code_width("head.code_width", head.code_width, tokenizer)
    if isinstance(head, VelocityHead):
        check_velocity_head(head)
    else:
        check_masked_head(head)


def check_objective(name: str, backbone: AnyBackbone, head: AnyHead) -> None:
    """config.objective fits config.backbone and config.head."""
    velocity = isinstance(head, VelocityHead)
    part, fits = (
        ("head", "flow_matching") if velocity else ("backbone", OBJECTIVE_OF[type(backbone)])
    )
    if name != fits:
        raise ValueError(f"objective.name is {name!r}; this {part} is trained by {fits!r}")


def check_label_dropout(label_dropout: float, backbone: AnyBackbone) -> None:
    """config.objective.label_dropout has something to put in a label's place."""
    nullable = not isinstance(backbone, Decoder | OrderedDecoder) or backbone.null_class
    if label_dropout and not nullable:
        raise ValueError(
            f"objective.label_dropout is {label_dropout}, but backbone.null_class is False, so "
            "that there is no null class: set one of them otherwise"
        )


def check_self_correction(self_correction: float, tokenizer: AnyTokenizer) -> None:
    """config.objective.self_correction has finer scales that can make up for wrong draws."""
    if self_correction and not isinstance(tokenizer.quantizer, MultiScaleQuantizer):
        raise ValueError(
            f"objective.self_correction is {self_correction}, but config.tokenizer codes no "
            "residuals over scales, so that no later code can correct one: set it to 0, or "
            "tokenizer.name to 'multiscale_vq'"
        )


def check_bit_flips(rate: float, scales: int | None, tokenizer: AnyTokenizer) -> None:
    """config.objective's bit_flips have bits to flip, and flipped_scales are of these."""
    if rate and not isinstance(tokenizer.quantizer, MultiScaleBitwiseQuantizer):
        raise ValueError(
            f"objective.bit_flips is {rate}, but config.tokenizer codes no residuals over scales "
            "in bits: set it to 0, or tokenizer.name to 'multiscale_bitwise'"
        )
    if scales is not None and not (rate and scales >= 1):
        raise ValueError(
            f"objective.flipped_scales is {scales}; it must be at least 1, and objective.bit_flips "
            "above 0"
        )


def check_bidirectional(backbone: Bidirectional, tokenizer: Tokenizer) -> None:
    """config.backbone of name 'bidirectional'."""
    check_heads(backbone, "width", "heads")
    check_masked(backbone, "bidirectional")
    check_positive(backbone, "num_classes")
    if tokenizer.quantizer.context != "codes":
        raise ValueError(
            "backbone.name is 'bidirectional', whose rows are fed codes of one grid, but "
            f"config.tokenizer has {len(tokenizer.grids)}: use tokenizer.name 'vq', 'fsq', 'lfq' "
            "or 'bsq'"
        )
    check_vocabulary("backbone.vocab_size", backbone.vocab_size, tokenizer)


def check_code_width(field: str, value: int, tokenizer: KLTokenizer) -> None:
    """``field`` is the width of the tokenizer's codes."""
    if value != tokenizer.code_width:
        raise ValueError(
            f"{field} is {value}, but the tokenizer's codes have {tokenizer.code_width} numbers "
            f"(autoencoder.code_width {tokenizer.autoencoder.code_width}, patch "
            f"{tokenizer.patch}): make them equal"
        )


def check_tokenizer_objective(config: Any, tokenizer: AnyTokenizer) -> None:
    """config.objective trains a tokenizer of config.tokenizer's kind."""
    fits = "tokenizer" if isinstance(tokenizer, Tokenizer) else "kl_tokenizer"
    if config["objective"]["name"] != fits:
        raise ValueError(
            f"objective.name is {config['objective']['name']!r}, but tokenizer.name="
            f"{config['tokenizer']['name']!r} is trained by {fits!r}"
        )
    if isinstance(tokenizer, Tokenizer):
        check_losses(config, tokenizer.quantizer)


def check_backbone(backbone: Decoder, tokenizer: Tokenizer) -> None:
    """config.backbone of name 'decoder' or 'shuffled_decoder', and what it is fed."""
    if isinstance(backbone, ShuffledDecoder):
        check_shuffled(backbone)
    check_heads(backbone, "width", "heads")
    head_width = backbone.width // backbone.heads
    if backbone.positions == "rope" and head_width % 4:
        raise ValueError(
            f"backbone.width {backbone.width} over backbone.heads {backbone.heads} gives heads of "
            f"width {head_width}; positions='rope' needs a multiple of 4"
        )
    if backbone.kv_heads is not None and (
        backbone.kv_heads < 1 or backbone.heads % backbone.kv_heads
    ):
        raise ValueError(
            f"backbone.kv_heads is {backbone.kv_heads}, which does not divide backbone.heads "
            f"{backbone.heads}"
        )
    wanted = tokenizer.quantizer.context
    features = wanted == "features"
    if backbone.context != wanted:
        raise ValueError(
            f"backbone.context is {backbone.context!r}, but this tokenizer gives {wanted!r}"
        )
    if features:
        check_feature_width(backbone, tokenizer)
    if not features:
        check_vocabulary("backbone.vocab_size", backbone.vocab_size, tokenizer)
    check_condition(backbone)
    if backbone.positions == "learned" and backbone.lead:
        raise ValueError(
            "backbone.positions='learned' has no place for caption rows or a start_row; use "
            "positions='rope' with condition='text' or start_row=True"
        )
    check_order(backbone)
    if backbone.shared_embedding and (backbone.condition, backbone.context) != ("class", "codes"):
        raise ValueError(
            "backbone.shared_embedding=True is one table of codes and classes: it needs "
            f"context='codes' and condition='class', not {backbone.context!r} and "
            f"{backbone.condition!r}"
        )
    if backbone.step_embedding and backbone.modulation == "none":
        raise ValueError(
            "backbone.step_embedding=True is a part of the adaptive norms' condition, but "
            "backbone.modulation is 'none': use 'own' or 'shared', or step_embedding=False"
        )
    first = backbone.row_schedule.sizes[0]
    if backbone.positions != "learned" and backbone.conditioner.rows < first:
        raise ValueError(
            f"backbone.positions is {backbone.positions!r}, but the first step predicts {first} "
            f"codes at once and the condition has {backbone.conditioner.rows} rows to tell them "
            "apart: use positions='learned', or a first scale of 1"
        )


def check_ordered(backbone: OrderedDecoder, tokenizer: Tokenizer) -> None:
    """config.backbone of a name that takes any order."""
    head_width = backbone.width // backbone.heads
    if backbone.width % backbone.heads or head_width % 4:
        raise ValueError(
            f"backbone.width {backbone.width} over backbone.heads {backbone.heads} gives heads of "
            f"width {backbone.width / backbone.heads:g}; rotary positions need a multiple of 4"
        )
    if backbone.num_classes < 1:
        raise ValueError(f"backbone.num_classes is {backbone.num_classes}; it must be positive")
    if tokenizer.quantizer.context != backbone.context:
        raise ValueError(
            f"this backbone is fed {backbone.context!r}, but this tokenizer gives "
            f"{tokenizer.quantizer.context!r}: use a tokenizer of one grid"
        )
    check_vocabulary("backbone.vocab_size", backbone.vocab_size, tokenizer)
    if isinstance(backbone, TwoPassDecoder):
        if backbone.depth % 2:
            raise ValueError(
                f"backbone.depth is {backbone.depth}; it must be even, half of it for the content "
                "and half for the queries"
            )
        kinds = ("bidirectional", "causal")
        if backbone.group_attention not in kinds:
            raise ValueError(
                f"backbone.group_attention is {backbone.group_attention!r}; it must be one of "
                f"{kinds}"
            )


def check_condition(backbone: Decoder) -> None:
    """What a 'class' or a 'text' condition needs."""
    if backbone.condition == "class" and backbone.num_classes < 1:
        raise ValueError(f"backbone.num_classes is {backbone.num_classes}; it must be positive")
    if not backbone.null_class and (backbone.condition != "class" or backbone.shared_embedding):
        raise ValueError(
            "backbone.null_class=False leaves the null row out of a table of classes alone: it "
            f"does not go with condition={backbone.condition!r} and shared_embedding="
            f"{backbone.shared_embedding}"
        )
    if backbone.caption_null_rows is not None and backbone.caption_null_rows < 1:
        raise ValueError(
            f"backbone.caption_null_rows is {backbone.caption_null_rows}; it must be positive, or "
            "None for caption_length"
        )


def check_order(backbone: Decoder) -> None:
    """Random orders and positions that can tell them."""
    schedule = backbone.schedule
    if schedule.random and backbone.positions != "target_aware":
        raise ValueError(
            f"backbone.positions is {backbone.positions!r}, but schedule.name={schedule.name!r} "
            "draws random orders: only positions='target_aware' say which cell comes next"
        )
    sizes = schedule.sizes
    if backbone.context == "codes" and any(a > b for a, b in itertools.pairwise(sizes)):
        raise ValueError(
            f"schedule.name={schedule.name!r} has a step of fewer codes than the one before "
            f"({sizes}), each of which this backbone feeds to a row: use another schedule"
        )
    if backbone.positions == "target_aware" and (len(schedule.grids) > 1 or sizes[0] > 1):
        raise ValueError(
            "backbone.positions='target_aware' takes codes of one grid, of which one is the first; "
            f"schedule.name={schedule.name!r} has the steps {sizes}: use 'learned'"
        )


def check_vocabulary(field: str, value: int, tokenizer: Tokenizer) -> None:
    """``field`` is the tokenizer's codebook size."""
    if value != tokenizer.codebook_size:
        raise ValueError(
            f"{field} is {value}, but the tokenizer's codebook_size is "
            f"{tokenizer.codebook_size}: make them equal"
        )

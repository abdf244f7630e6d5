"""Configurations of real systems so small that they train in seconds on synthetic images."""

from __future__ import annotations

from typing import Any

import ml_collections

SCALES = (1, 2, 4)


def _sections(**overrides: Any) -> dict[str, Any]:
    return {
        "seed": 0,
        "dtype": "float32",
        "precision": "default",
        "data": {"source": "synthetic", "image_size": 8, "channels": 1, "num_classes": 4},
        "tokenizer": {
            "name": "multiscale_vq",
            "scales": SCALES,
            "codebook_size": 16,
            "phis": 1,
            "autoencoder": {
                "image_size": 8,
                "image_channels": 1,
                "latent": 8,
                "code_width": 4,
                "channels": 8,
                "multipliers": (1, 1),
                "encoder_blocks": 1,
                "decoder_blocks": 1,
                "attention": False,
                "middle": False,
                "groups": 4,
            },
        },
        "train": {
            "steps": 3,
            "batch_size": 16,
            "log_every": 1,
            "eval_every": 3,
            "eval_batches": 2,
            "preview_every": 3,
            "checkpoint_every": 2,
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_steps": 1,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
        },
        "ema": {"decay": 0.99},
        "mesh": {"data": -1},
        **overrides,
    }


def tiny_tokenizer() -> ml_collections.ConfigDict:
    """A multi-scale tokenizer."""
    objective = {"name": "tokenizer", "restart_below": 0.1}
    return ml_collections.ConfigDict(_sections(objective=objective))


def tiny_generator(checkpoint: str) -> ml_collections.ConfigDict:
    """A next-scale generator over the codes of `tiny_tokenizer`."""
    return ml_collections.ConfigDict(
        _sections(
            tokenizer_checkpoint=checkpoint,
            schedule={"name": "next_scale", "scales": SCALES},
            backbone={
                "name": "decoder",
                "width": 16,
                "depth": 2,
                "heads": 2,
                "num_classes": 4,
                "context": "features",
                "feature_width": 4,
                "positions": "learned",
                "norm": "layernorm",
                "norm_epsilon": 1e-6,
                "modulation": "own",
                "qk_norm": "cosine",
                "attention_bias": "qv",
                "activation": "relu",
                "mlp_bias": True,
            },
            head={"name": "categorical", "vocab_size": 16, "bias": True, "init_std": 0.02},
            objective={"name": "likelihood", "label_dropout": 0.1},
            sampling={"temperature": 1.0, "guidance": {"scale": 1.5}},
        )
    )

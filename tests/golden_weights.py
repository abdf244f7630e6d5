"""Golden cases: recorded arrays, regenerated official weights, and their place in our trees.

A case is a folder of tests/golden: spec.json says how every official tensor is regenerated, io.npz
holds what the official code computed with them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden"

Arrays = dict[str, np.ndarray]
Function = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder of tests/golden."""

    spec: dict[str, Any]
    io: Arrays

    @classmethod
    def load(cls, name: str) -> Case:
        """For example ``Case.load('var/tiny_a')``."""
        spec = json.loads((GOLDEN / name / "spec.json").read_text())
        with np.load(GOLDEN / name / "io.npz") as stored:
            return cls(spec, {key: stored[key] for key in stored.files})

    def state_dict(self, part: str) -> Arrays:
        """The official parameters of a sub-model, without its buffers."""
        tensors = self.spec[part]["tensors"]
        return {t["key"]: regenerate(t) for t in tensors if t["kind"] == "param"}


def regenerate(tensor: dict[str, Any]) -> np.ndarray:
    """The rule of the cases' README."""
    draw = np.random.RandomState(tensor["seed"])
    normal = draw.standard_normal(tensor["shape"])
    return (tensor["mean"] + tensor["std"] * normal).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an official tensor lives in our parameters.

    Attributes:
        paths: our leaves; with several, the official tensor is their concatenation on axis 0.
        ours, official: the change of layout (of each piece), and its inverse.
        layer: index into the stacked leaf of a scanned stack, None for leaves of their own.
    """

    paths: tuple[str, ...]
    ours: Function
    official: Function
    layer: int | None = None


Places = dict[str, Place]


def same(path: str, layer: int | None = None) -> Place:
    """The same layout."""
    return Place((path,), lambda a: a, lambda a: a, layer)


def reshaped(path: str, ours: tuple[int, ...], official: tuple[int, ...], layer=None) -> Place:
    """The same order of numbers in another shape."""
    return Place((path,), lambda a: a.reshape(ours), lambda a: a.reshape(official), layer)


def dense(path: str, shape: tuple[int, ...] | None = None, inputs: int = 1, layer=None) -> Place:
    """A linear weight [out, in] -> our kernel of ``shape``, whose first ``inputs`` axes are in."""

    def ours(a: np.ndarray) -> np.ndarray:
        return a.T.reshape(a.T.shape if shape is None else shape)

    def official(a: np.ndarray) -> np.ndarray:
        return a.reshape(int(np.prod(a.shape[:inputs])), -1).T

    return Place((path,), ours, official, layer)


def fused(path: str, shape: tuple[int, ...], layer: int) -> Place:
    """A weight [3 D, D] of queries, keys and values -> our three kernels [D, H, K]."""
    kernel = dense("", shape, 1)
    paths = tuple(f"{path}/{name}/kernel" for name in ("query", "key", "value"))
    return Place(paths, kernel.ours, kernel.official, layer)


def convolution(*paths: str) -> Place:
    """A convolution's weight, OIHW -> HWIO."""
    return Place(paths, lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


def split(*paths: str) -> Place:
    """One official vector in several of our leaves."""
    return Place(paths, lambda a: a, lambda a: a)


def to_ours(places: Places, tensors: Arrays) -> dict[str, Any]:
    """Our nested parameters of official tensors; every official tensor must have a place."""
    flat: Arrays = {}
    layers: dict[str, dict[int, np.ndarray]] = {}
    for key, tensor in tensors.items():
        place = places[key]
        for path, piece in zip(place.paths, np.split(tensor, len(place.paths)), strict=True):
            if place.layer is None:
                assert path not in flat, path
                flat[path] = place.ours(piece)
            else:
                layers.setdefault(path, {})[place.layer] = place.ours(piece)
    flat |= {path: np.stack([v[i] for i in range(len(v))]) for path, v in layers.items()}
    nested: dict[str, Any] = {}
    for path, array in flat.items():
        *folders, name = path.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = array
    return nested


def to_official(places: Places, params: dict[str, Any], key: str) -> np.ndarray:
    """The part of ``params`` (or of gradients alike) that is the official tensor ``key``."""
    place, pieces = places[key], []
    for path in place.paths:
        leaf: Any = params
        for name in path.split("/"):
            leaf = leaf[name]
        leaf = np.asarray(leaf if place.layer is None else leaf[place.layer])
        pieces.append(place.official(leaf))
    return np.concatenate(pieces)


# Convolutional tokenizers: (official pattern, our module); groups are level, then index.
_VAR_MODULES = (
    (r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)", r"\1/level\2_block\3"),
    (r"(encoder|decoder)\.(?:down|up)\.(\d+)\.attn\.(\d+)", r"\1/level\2_attention\3"),
    (r"encoder\.down\.(\d+)\.downsample\.conv", r"encoder/level\1_down"),
    (r"decoder\.up\.(\d+)\.upsample\.conv", r"decoder/level\1_up"),
    (r"(encoder|decoder)\.mid\.block_1", r"\1/middle_block0"),
    (r"(encoder|decoder)\.mid\.block_2", r"\1/middle_block1"),
    (r"(encoder|decoder)\.mid\.attn_1", r"\1/middle_attention"),
)
_LLAMAGEN_MODULES = (
    (r"(encoder|decoder)\.conv_blocks\.(\d+)\.res\.(\d+)", r"\1/level\2_block\3"),
    (r"(encoder|decoder)\.conv_blocks\.(\d+)\.attn\.(\d+)", r"\1/level\2_attention\3"),
    (r"encoder\.conv_blocks\.(\d+)\.downsample\.conv", r"encoder/level\1_down"),
    (r"decoder\.conv_blocks\.(\d+)\.upsample\.conv", r"decoder/level\1_up"),
    (r"(encoder|decoder)\.mid\.0", r"\1/middle_block0"),
    (r"(encoder|decoder)\.mid\.1", r"\1/middle_attention"),
    (r"(encoder|decoder)\.mid\.2", r"\1/middle_block1"),
    (r"\.q$", ".query"),
    (r"\.k$", ".key"),
    (r"\.v$", ".value"),
)
_COMMON_MODULES = (
    (r"^quant_conv", "to_code"),
    (r"^post_quant_conv", "from_code"),
    (r"nin_shortcut", "shortcut"),
    (r"proj_out", "out"),
)


def tokenizer_places(tensors: Arrays, *, family: str, levels: int) -> Places:
    """Places of a 'var' or 'llamagen' tokenizer with ``levels`` resolutions."""
    modules = _VAR_MODULES if family == "var" else _LLAMAGEN_MODULES
    return {key: _tokenizer_place(key, modules, family, levels) for key in tensors}


def _tokenizer_place(key: str, modules: tuple, family: str, levels: int) -> Place:
    module, kind = key.rsplit(".", 1)
    if module == "quantize.embedding":
        return same("quantizer/codebook")
    if found := re.fullmatch(r"quantize\.quant_resi\.(?:qresi|(?:qresi_ls\.)?(\d+))", module):
        module = f"quantizer/phi_{found[1] or 0}"
    else:
        if family == "llamagen":  # its decoder levels count from the coarsest

            def turned(match: re.Match) -> str:
                return f"decoder.conv_blocks.{levels - 1 - int(match[1])}"

            module = re.sub(r"decoder\.conv_blocks\.(\d+)", turned, module)
        for pattern, name in (*modules, *_COMMON_MODULES):
            module = re.sub(pattern, name, module)
        module = "autoencoder/" + module.replace(".", "/")
    if module.endswith("/qkv"):
        leaf = "kernel" if kind == "weight" else "bias"
        paths = [f"{module[:-4]}/{name}/{leaf}" for name in ("query", "key", "value")]
        return convolution(*paths) if kind == "weight" else split(*paths)
    if re.search(r"norm\w*$", module):
        return same(f"{module}/scale" if kind == "weight" else f"{module}/bias")
    return convolution(f"{module}/kernel") if kind == "weight" else same(f"{module}/bias")


def var_places(tensors: Arrays, *, width: int, heads: int) -> Places:
    """Places of a VAR transformer under 'backbone' and 'head'."""
    head_width = width // heads
    whole = {
        "pos_start": reshaped("backbone/position_start", (-1, width), (1, -1, width)),
        "pos_1LC": reshaped("backbone/position", (-1, width), (1, -1, width)),
        "lvl_embed.weight": same("backbone/scale_embed"),
        "word_embed.weight": dense("backbone/token_embed/kernel"),
        "word_embed.bias": same("backbone/token_embed/bias"),
        "class_emb.weight": same("backbone/condition/class_embed/embedding"),
        "shared_ada_lin.1.weight": dense("backbone/shared_modulation/kernel", (width, 6, width), 1),
        "shared_ada_lin.1.bias": reshaped("backbone/shared_modulation/bias", (6, width), (-1,)),
        "head_nm.ada_lin.1.weight": dense("backbone/final_modulation/kernel", (width, 2, width), 1),
        "head_nm.ada_lin.1.bias": reshaped("backbone/final_modulation/bias", (2, width), (-1,)),
        "head.weight": dense("head/kernel"),
        "head.bias": same("head/bias"),
    }

    def block(name: str, i: int) -> Place:
        root = "backbone/stack/blocks"
        places = {
            "attn.scale_mul_1H11": reshaped(
                f"{root}/attention/log_scale", (heads,), (1, heads, 1, 1), i
            ),
            "attn.mat_qkv.weight": fused(f"{root}/attention", (width, heads, head_width), i),
            "attn.proj.weight": dense(
                f"{root}/attention/out/kernel", (heads, head_width, width), 2, i
            ),
            "attn.proj.bias": same(f"{root}/attention/out/bias", i),
            "ffn.fc1.weight": dense(f"{root}/mlp/up/kernel", layer=i),
            "ffn.fc1.bias": same(f"{root}/mlp/up/bias", i),
            "ffn.fc2.weight": dense(f"{root}/mlp/down/kernel", layer=i),
            "ffn.fc2.bias": same(f"{root}/mlp/down/bias", i),
            "ada_lin.1.weight": dense(f"{root}/modulation/kernel", (width, 6, width), 1, i),
            "ada_lin.1.bias": reshaped(f"{root}/modulation/bias", (6, width), (-1,), i),
            "ada_gss": reshaped(f"{root}/modulation_table", (6, width), (1, 1, 6, width), i),
        }
        for bias, ours in (("q_bias", "query"), ("v_bias", "value")):
            places[f"attn.{bias}"] = reshaped(
                f"{root}/attention/{ours}/bias", (heads, head_width), (-1,), i
            )
        return places[name]

    return _transformer_places(tensors, whole, r"blocks\.(\d+)\.(.*)", block)


def gpt_places(tensors: Arrays, *, width: int, heads: int) -> Places:
    """Places of a LlamaGen transformer, class or text, under 'backbone' and 'head'."""
    head_width = width // heads
    whole = {
        "cls_embedding.embedding_table.weight": same("backbone/condition/class_embed/embedding"),
        "cls_embedding.uncond_embedding": same("backbone/condition/null_caption"),
        "cls_embedding.cap_proj.fc1.weight": dense("backbone/condition/caption_up/kernel"),
        "cls_embedding.cap_proj.fc2.weight": dense("backbone/condition/caption_down/kernel"),
        "tok_embeddings.weight": same("backbone/token_embed/embedding"),
        "norm.weight": same("backbone/final_norm/scale"),
        "output.weight": dense("head/kernel"),
    }

    def block(name: str, i: int) -> Place:
        root = "backbone/stack/blocks"
        return {
            "attention.wqkv.weight": fused(f"{root}/attention", (width, heads, head_width), i),
            "attention.wo.weight": dense(
                f"{root}/attention/out/kernel", (heads, head_width, width), 2, i
            ),
            "feed_forward.w1.weight": dense(f"{root}/mlp/gate/kernel", layer=i),
            "feed_forward.w3.weight": dense(f"{root}/mlp/up/kernel", layer=i),
            "feed_forward.w2.weight": dense(f"{root}/mlp/down/kernel", layer=i),
            "attention_norm.weight": same(f"{root}/attention_norm/scale", i),
            "ffn_norm.weight": same(f"{root}/mlp_norm/scale", i),
        }[name]

    return _transformer_places(tensors, whole, r"layers\.(\d+)\.(.*)", block)


def _transformer_places(
    tensors: Arrays, whole: Places, pattern: str, block: Callable[[str, int], Place]
) -> Places:
    places = {}
    for key in tensors:
        found = re.fullmatch(pattern, key)
        places[key] = block(found[2], int(found[1])) if found else whole[key]
    return places

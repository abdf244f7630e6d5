"""The candidates of a search for one system and topology, and what their compilation gives."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import metadata
from typing import Any

import jax
import ml_collections

from ar_jax.build import trains_tokenizer
from ar_jax.compilation import search
from ar_jax.compilation.ahead import (
    check_inputs,
    compile_decoder,
    compile_sampler,
    compile_train_step,
)
from ar_jax.compilation.overflow import DoesNotFit
from ar_jax.compilation.target import check_program, topology_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trials:
    """What all compilations of a search share.

    Attributes:
        config: whose mesh (but for slices), backbone.remat and train.batch_size are searched; of a
            tokenizer, which has neither blocks nor heads, the mesh's data and fsdp.
        topology: of one slice.
        slices: None: config.mesh.slices, or 1.
        program: 'train', or 'sample' or 'decode', which know no rematerialisation: the config's is
            kept. Nor has 'decode' heads.
        inputs: of a train step, see `ar_jax.compilation.ahead.compile_train_step`.
    """

    config: ml_collections.ConfigDict
    topology: str
    slices: int | None = None
    program: str = "train"
    inputs: str | None = None

    def candidates(self, batch_sizes: list[int]) -> list[search.Candidate]:
        """What is compiled, in this order.

        Raises:
            ValueError: a system of another kind, a bad topology or batch sizes that none can take.
        """
        check_program(self.config, self.program)
        heads = 1
        remats: tuple[str, ...] = ("none",)
        if not trains_tokenizer(self.config):
            backbone = self.config.backbone
            remats = search.REMATS if self.program == "train" else (backbone.get("remat", "none"),)
            if self.program != "decode":
                counts = (backbone.get(name) or 0 for name in ("kv_heads", "decoder_heads"))
                heads = math.gcd(backbone.heads, *counts)
        slices = self._slices()
        return search.make_candidates(
            search.mesh_sizes(len(topology_devices(self.topology, slices)) // slices, heads),
            remats,
            batch_sizes,
            slices=slices,
            accumulation=self.config.train.get("accumulation", 1),
        )

    def settings(self) -> dict[str, Any]:
        """What a row depends on besides its candidate; plain values."""
        fields = self.config.to_dict()
        for section, name in (("backbone", "remat"), ("train", "batch_size")):
            fields.get(section, {}).pop(name, None)
        for name in ("mesh", "data"):  # the one is searched, the other not read
            fields.pop(name, None)
        settings = {"config": json.loads(json.dumps(fields, default=str))}
        settings |= {"jax": jax.__version__, "libtpu": metadata.version("libtpu")}
        settings["seconds"] = "with exposed collectives"  # unlike those of files from before
        settings |= {"topology": self.topology, "slices": self._slices(), "program": self.program}
        if self.program == "train":
            settings["inputs"] = check_inputs(self.config, self.inputs)
        return settings

    def attempt(self, candidate: search.Candidate) -> search.Row:
        """The figures of one candidate: compiled, or why it cannot be."""
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.mesh.update(candidate.mesh)
        if not trains_tokenizer(config):
            config.backbone.remat = candidate.remat
        sizes = {"batch_size": candidate.batch_size, "slices": self._slices()}
        try:
            if self.program == "train":
                report = compile_train_step(config, self.topology, inputs=self.inputs, **sizes)
            else:
                compiles = compile_sampler if self.program == "sample" else compile_decoder
                report = compiles(config, self.topology, **sizes)
            return search.fitting_row(report)
        except DoesNotFit as error:
            return search.too_large_row(error.verdict)
        except ValueError as error:
            return search.refused_row(error)
        finally:
            jax.clear_caches()  # traces of programs that are not met again

    def _slices(self) -> int:
        return self.config.mesh.get("slices", 1) if self.slices is None else self.slices

"""The released sizes, as the official classes count them, and the page's table of them.

python -m tests.released_sizes      prints the table
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

# Of each family: whether every key and shape of a size is recorded ('each') or how many there are,
# and the golden cases whose arrays are held against the official code and whose files come back.
KEYS = {
    "var": "counts",
    "llamagen": "each",
    "rar": "each",
    "randar": "each",
    "arpg": "each",
    "par": "each",
    "mar": "counts",
    "ear": "counts",
    "infinity": "counts",
    "xar": "counts",
    "fractal": "counts",
}
CASES = {
    "var": ("var/tiny_a", "var/tiny_b"),
    "llamagen": ("llamagen/tiny",),
    "rar": ("rar/tiny",),
    "randar": ("randar/tiny",),
    "arpg": ("arpg/tiny",),
    "par": ("par/tiny",),
    "mar": ("mar/tiny",),
    "ear": ("ear/tiny",),
    "infinity": ("infinity/tiny",),
    "xar": ("xar/tiny",),
    "fractal": ("fractal/fractalar_tiny", "fractal/fractalmar_tiny"),
}
HEADER = (
    *("family", "released size", "parameters", "tensors"),
    *("keys and shapes", "arrays and exact way back"),
)


@dataclasses.dataclass(frozen=True)
class Release:
    """One size; ARCHITECTURE.md of the golden cases has the numbers.

    Attributes:
        tensors: of the official state_dict, buffers included.
    """

    family: str
    size: str
    parameters: int
    tensors: int

    @property
    def counts(self) -> tuple[int, int]:
        """(parameters, tensors)."""
        return self.parameters, self.tensors


RELEASES = (
    Release("var", "tokenizer", 108_948_355, 324),
    Release("var", "d16", 310_283_520, 220),
    Release("var", "d20", 600_917_136, 272),
    Release("var", "d24", 1_033_399_360, 324),
    Release("var", "d30", 2_010_020_356, 402),
    Release("var", "d36-s", 2_353_893_904, 446),
    Release("llamagen", "VQ-16", 71_883_403, 344),
    Release("llamagen", "VQ-8", 70_109_835, 300),
    Release("llamagen", "c2i B", 110_888_448, 88),
    Release("llamagen", "c2i L", 342_910_976, 172),
    Release("llamagen", "c2i XL", 774_699_520, 256),
    Release("llamagen", "c2i XXL", 1_410_972_672, 340),
    Release("llamagen", "c2i 3B", 3_096_659_200, 172),
    # With the 245,760 numbers of the null caption, a buffer there and a parameter here.
    Release("llamagen", "t2i XL", 777_923_840, 258),
    Release("rar", "MaskGIT-VQGAN", 54_515_587, 168),
    Release("rar", "RAR-B", 260_923_648, 441),
    Release("rar", "RAR-L", 461_668_352, 441),
    Release("rar", "RAR-XL", 955_425_024, 585),
    Release("rar", "RAR-XXL", 1_498_520_704, 729),
    Release("randar", "L llamagen", 342_912_000, 173),
    Release("randar", "L maskgit", 311_454_720, 173),
    Release("randar", "XL llamagen", 774_700_800, 257),
    Release("arpg", "ARPG-L", 319_845_376, 198),
    Release("arpg", "ARPG-XL", 718_997_760, 294),
    Release("arpg", "ARPG-XXL", 1_302_449_664, 390),
    Release("par", "PAR-XL-4x", 774_703_360, 257),
    Release("par", "PAR-XXL-4x", 1_410_977_280, 341),
    Release("par", "PAR-3B-4x", 3_096_668_800, 173),
    Release("par", "PAR-3B-16x", 3_096_707_200, 173),
    Release("mar", "KL-16", 66_456_019, 312),
    Release("mar", "base", 207_924_768, 364),
    Release("mar", "large", 478_326_304, 476),
    Release("mar", "huge", 942_403_104, 604),
    Release("ear", "base", 205_608_720, 352),
    Release("ear", "large", 474_755_088, 464),
    Release("ear", "huge", 937_314_576, 592),
    Release("infinity", "tokenizer d16", 109_970_579, 270),
    Release("infinity", "tokenizer d24", 110_044_315, 270),
    Release("infinity", "tokenizer d32", 110_118_051, 270),
    Release("infinity", "tokenizer d64", 110_412_995, 270),
    Release("infinity", "tokenizer d14, f8", 81_624_209, 226),
    Release("infinity", "layer12", 125_185_696, 274),
    Release("infinity", "layer16", 361_633_792, 358),
    Release("infinity", "layer24", 940_944_832, 526),
    Release("infinity", "2b", 2_204_564_032, 694),
    Release("infinity", "layer32", 2_256_694_912, 694),
    Release("infinity", "layer40", 4_716_421_888, 862),
    Release("infinity", "8b", 8_375_791_824, 862),
    Release("infinity", "layer48", 8_767_198_528, 1030),
    Release("xar", "base", 172_638_224, 257),
    Release("xar", "large", 608_397_968, 497),
    Release("xar", "huge", 1_186_024_096, 617),
    Release("fractal", "FractalAR, 64", 442_068_224, 348),
    Release("fractal", "FractalMAR, 64", 431_995_648, 550),
    Release("fractal", "FractalMAR-B, 256", 186_300_224, 552),
    Release("fractal", "FractalMAR-L, 256", 437_000_064, 684),
    Release("fractal", "FractalMAR-H, 256", 849_586_240, 816),
)


def sizes_of(family: str) -> dict[str, Release]:
    """Size -> release of a family."""
    return {release.size: release for release in RELEASES if release.family == family}


def released_shapes(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Size -> official key -> shape, of a family whose every key is recorded."""
    path = Path(__file__).parent / "golden" / family / "release_keys.json"
    return {
        name: {key: tuple(shape) for key, shape in tensors.items()}
        for name, tensors in json.loads(path.read_text()).items()
    }


def table() -> str:
    """Markdown, a row a size."""
    rows = [
        (
            f"`{r.family}`",
            r.size,
            f"{r.parameters:,}",
            str(r.tensors),
            KEYS[r.family],
            ", ".join(f"`{name}`" for name in CASES[r.family]),
        )
        for r in RELEASES
    ]
    rule = "|---|---|---:|---:|---|---|"
    header, *lines = [f"| {' | '.join(line)} |" for line in (HEADER, *rows)]
    return "\n".join((header, rule, *lines))


if __name__ == "__main__":
    print(table())  # noqa: T201

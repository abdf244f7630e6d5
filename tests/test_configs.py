"""Every file of configs/ with every argument: it builds, counts right and holds no idle field."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import config_flags

from ar_jax.build import build_objective, check_trained_tokenizer, trains_tokenizer
from ar_jax.parallel.mesh import make_mesh
from ar_jax.parallel.rules import RULES, check_coverage, find_rule, shardings
from ar_jax.train.fields import EmaFields, TrainFields, read_settings
from tests.config_files import (
    CASES,
    FILES,
    ROOT,
    Case,
    arguments,
    load,
    named,
    parameters,
    unread_fields,
)

IMAGENET = "configs/imagenet256/"
FASHION = "configs/fashion_mnist/"

# From the official classes, built without storage; those of MaskGIT, GIVT and FlowAR are ours, and
# so are Infinity's: four rows for each of 1,001 classes in place of 512 null ones.
COUNTS = {
    ("var.py", "d16"): 310_283_520,
    ("var.py", "d20"): 600_917_136,
    ("var.py", "d24"): 1_033_399_360,
    ("var.py", "d30"): 2_010_020_356,
    ("llamagen.py", "B"): 110_888_448,
    ("llamagen.py", "L"): 342_910_976,
    ("llamagen.py", "XL"): 774_699_520,
    ("llamagen.py", "XXL"): 1_410_972_672,
    ("llamagen.py", "3B"): 3_096_659_200,
    ("rar.py", "b"): 260_923_648,
    ("rar.py", "l"): 461_668_352,
    ("rar.py", "xl"): 955_425_024,
    ("rar.py", "xxl"): 1_498_520_704,
    ("randar.py", "L"): 342_912_000,
    ("randar.py", "L_maskgit"): 311_454_720,
    ("randar.py", "XL"): 774_700_800,
    ("arpg.py", "L"): 319_845_376,
    ("arpg.py", "XL"): 718_997_760,
    ("arpg.py", "XXL"): 1_302_449_664,
    ("par.py", "XL"): 774_703_360,
    ("par.py", "XXL"): 1_410_977_280,
    ("par.py", "3B"): 3_096_668_800,
    ("par.py", "3B_16x"): 3_096_707_200,
    ("tokenizer_maskgit.py", ""): 54_515_587,
    ("maskgit.py", ""): 173_243_392,
    ("infinity.py", "layer12"): 125_185_696 + 3_492 * 2048,
    ("infinity.py", "layer16"): 361_633_792 + 3_492 * 2048,
    ("infinity.py", "layer24"): 940_944_832 + 3_492 * 2048,
    ("infinity.py", "2b"): 2_204_564_032 + 3_492 * 2048,
    ("infinity.py", "8b"): 8_375_791_824 + 3_492 * 2048,
    ("tokenizer_bitwise.py", "d16"): 109_970_579,
    ("tokenizer_bitwise.py", "d24"): 110_044_315,
    ("tokenizer_bitwise.py", "d32"): 110_118_051,
    ("tokenizer_bitwise.py", "d64"): 110_412_995,
    ("tokenizer_bitwise.py", "d14_f8"): 81_624_209,
    ("mar.py", "base"): 207_924_768,
    ("mar.py", "large"): 478_326_304,
    ("mar.py", "huge"): 942_403_104,
    ("ear.py", "base"): 205_608_720,
    ("ear.py", "large"): 474_755_088,
    ("ear.py", "huge"): 937_314_576,
    ("givt.py", "default"): 304_159_248,
    ("givt.py", "base"): 86_442_000,
    ("givt.py", "large"): 1_664_775_696,
    ("xar.py", "base"): 172_638_224,
    ("xar.py", "large"): 608_397_968,
    ("xar.py", "huge"): 1_186_024_096,
    ("fractal.py", "ar_64"): 442_068_224,
    ("fractal.py", "mar_64"): 431_995_648,
    ("fractal.py", "base"): 186_300_224,
    ("fractal.py", "large"): 437_000_064,
    ("fractal.py", "huge"): 849_586_240,
    ("flowar.py", "S"): 174_868_240,
    ("flowar.py", "B"): 310_227_984,
    ("flowar.py", "L"): 602_164_496,
    ("flowar.py", "H"): 1_950_443_536,
    ("tokenizer_kl.py", ""): 66_456_019,
    ("tokenizer_multiscale.py", ""): 108_948_355,
    ("tokenizer_vq.py", ""): 71_883_403,
    ("tokenizer_vq.py", "vq8"): 70_109_835,
}
# Of parts of them: a pattern in the parameters' paths.
PARTS = {
    ("var.py", "d16", "modulation/"): 102_860_800,
    ("var.py", "d20", "modulation/"): 200_040_960,
    ("var.py", "d24", "modulation/"): 344_681_472,
    ("var.py", "d30", "modulation/"): 671_274_240,
    ("tokenizer_maskgit.py", "", "/encoder/"): 23_775_104,
    ("tokenizer_maskgit.py", "", "/decoder/"): 30_478_339,
    ("mar.py", "base", "^head/"): 35_749_920,
    ("mar.py", "large", "^head/"): 72_230_432,
    ("mar.py", "huge", "^head/"): 151_206_944,
    ("ear.py", "base", "^head/"): 34_469_904,
    ("ear.py", "large", "^head/"): 70_302_736,
    ("ear.py", "huge", "^head/"): 148_500_496,
    ("tokenizer_kl.py", "", "/encoder/"): 28_265_760,
    ("tokenizer_kl.py", "", "/decoder/"): 38_188_931,
    ("tokenizer_multiscale.py", "", "/encoder/"): 44_107_872,
    ("tokenizer_multiscale.py", "", "/decoder/"): 64_653_923,
    ("tokenizer_multiscale.py", "", "^quantizer/"): 168_064,
    ("tokenizer_vq.py", "", "/encoder/"): 29_298_176,
    ("tokenizer_vq.py", "", "/decoder/"): 42_449_795,
    ("tokenizer_vq.py", "vq8", "/encoder/"): 28_559_232,
    ("tokenizer_vq.py", "vq8", "/decoder/"): 41_415_171,
}
TOKENS = {
    "var.py": 680,
    "tokenizer_multiscale.py": 680,
    "tokenizer_vq.py:vq8": 1024,
    "infinity.py": 521,
    "tokenizer_bitwise.py": 521,
    "flowar.py": 341,
    "fractal.py": 256**2,
    "fractal.py:ar_64": 64**2,
    "fractal.py:mar_64": 64**2,
}

every_case = pytest.mark.parametrize("case", CASES, ids=str)
# Sizes of a published model differ in numbers, not in what reads their fields: one of each file,
# and the others in the slow run.
FIRST_SIZES = (
    *("var:d16", "llamagen:B", "rar:b", "randar:L", "arpg:L", "par:XL", "mar:base", "ear:base"),
    *("givt:default", "infinity:layer12", "xar:base", "flowar:S", "fractal:base"),
)
every_file = pytest.mark.parametrize("file", FILES)


def is_another_size(case: Case) -> bool:
    """Whether another size of the same published generator stands for this one."""
    name = str(case).removeprefix("imagenet256/")
    families = {size.split(":")[0] for size in FIRST_SIZES}
    return name != str(case) and name.split(":")[0] in families and name not in FIRST_SIZES


def count(tree: Any, pattern: str = "") -> int:
    return sum(leaf.size for name, leaf in named(tree).items() if re.search(pattern, name))


def test_all_files_are_here():
    names = {"tokenizer_multiscale.py", "tokenizer_vq.py", "var.py", "llamagen.py", "rar.py"}
    names |= {"tokenizer_kl.py", "mar.py", "maskgit.py", "randar.py", "arpg.py", "par.py"}
    names |= {"ear.py", "givt.py", "infinity.py", "tokenizer_bitwise.py", "xar.py", "fractal.py"}
    names |= {"flowar.py"}
    assert {IMAGENET + name for name in names} | {FASHION + name for name in names} <= set(FILES)
    names |= {f"tokenizer_{quantiser}.py" for quantiser in ("fsq", "lfq", "bsq", "vq_fine")}
    names |= {"token_shuffle.py"}
    assert all(arguments(load(FASHION + name)) == ("", "demo", "smoke") for name in names)
    official = {(IMAGENET + file, argument) for file, argument in COUNTS}
    assert official == {(c.file, c.argument) for c in CASES if c.file.startswith(IMAGENET)}


@pytest.mark.parametrize(("file", "argument"), COUNTS)
def test_parameter_count_is_the_official_one(file, argument):
    case = Case(IMAGENET + file, argument)
    expected = COUNTS[file, argument]
    assert count(parameters(case)) == expected
    assert f"{expected:,}" in (load(case.file).__doc__ or "")
    parts = {key[2]: n for key, n in PARTS.items() if key[:2] == (file, argument)}
    assert {part: count(parameters(case), part) for part in parts} == parts
    tokens = TOKENS.get(f"{file}:{argument}", TOKENS.get(file, 256))
    objective: Any = build_objective(case.config)
    assert objective.tokens_per_image == tokens


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if is_another_size(case) else case
        for case in CASES
    ],
    ids=str,
)
def test_every_field_is_read(case, tmp_path):
    assert unread_fields(case.config, tmp_path) == set()


GENERATOR, TOKENIZER = Case(FASHION + "var.py", "smoke"), Case(FASHION + "tokenizer_vq.py", "smoke")


@pytest.mark.parametrize("case", [GENERATOR, TOKENIZER], ids=str)
def test_a_surplus_field_is_caught(case, tmp_path):
    sections = [name for name, value in case.config.items() if hasattr(value, "items")]
    places = ["", *(f"{name}." for name in sections), "tokenizer.autoencoder."]
    places += ["sampling.guidance."] if case is GENERATOR else []
    for place in places:
        config = case.config
        config.update_from_flattened_dict({f"{place}surplus": 1})
        with pytest.raises(ValueError, match="surplus"):
            unread_fields(config, tmp_path)


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        (GENERATOR, "backbone.rope_base", 100.0),  # of rotary positions
        (GENERATOR, "backbone.vocab_size", 32),  # of contexts that are codes
        (GENERATOR, "backbone.caption_length", 7),  # of captions
        (GENERATOR, "sampling.guidance.power", 2.0),  # of another kind of guidance
        (GENERATOR, "data.min_crop", 0.5),  # of random crops
        (Case(FASHION + "llamagen.py", "smoke"), "backbone.gate_init", 0.5),  # of adaptive norms
        (TOKENIZER, "objective.ema_decay", 0.5),  # of codebooks without gradient
    ],
)
def test_a_field_without_effect_is_caught(case, field, value, tmp_path):
    config = case.config
    config.update_from_flattened_dict({field: value})
    assert unread_fields(config, tmp_path) == {field}


def test_a_field_that_is_not_taken_out_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.config_files.check_sections", lambda config: None)
    config = TOKENIZER.config
    config.surplus = 1
    assert unread_fields(config, tmp_path) == {"surplus"}


@pytest.mark.parametrize(("section", "fields"), [("train", TrainFields), ("ema", EmaFields)])
def test_the_loop_reads_every_field(section, fields):
    sources = [path for path in (ROOT / "ar_jax/train").glob("*.py") if path.name != "fields.py"]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    reads = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("fields", "settings.train", f"settings.{section}")
    }
    assert {field.name for field in dataclasses.fields(fields)} <= reads


@every_file
def test_unknown_argument_is_an_error(file):
    module = load(file)
    for wrong in ("xxs", arguments(module)[-1] + "x"):
        with pytest.raises(ValueError, match=rf"'{wrong}' of {Path(file).name} is none of \("):
            module.get_config(wrong)
    assert module.get_config() == module.get_config(arguments(module)[0])


def launch_command(file: str) -> list[str]:
    """The first indented paragraph of the docstring, in words."""
    document = load(file).__doc__ or ""
    found = re.search(r"^ {4}\S(?:\\\n|[^\n])*", document, re.MULTILINE)
    return shlex.split(found[0].replace("\\\n", " ")) if found else []


@every_file
def test_docstring_is_the_launch_command(file, monkeypatch):
    python, script, *options = launch_command(file)
    assert (python, script) == ("python", "experiments/train.py")
    assert options[0].split(":")[0] == f"--config={file}"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [script, *options])  # overrides are looked for there
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert values([script, *options]) == [script]  # misspelt fields are errors
    assert workdir.value
    read_settings(config.value)
    assert ("tokenizer_checkpoint" in config.value) != trains_tokenizer(config.value)
    if "tokenizer_checkpoint" in config.value:
        trained = config.value.tokenizer.name != "pixels"
        assert bool(config.value.tokenizer_checkpoint) == trained
    # Fields that the text tells the reader to set.
    for field in re.findall(r"--config\.([\w.]+)=", load(file).__doc__ or ""):
        *sections, name = field.split(".")
        section = load(file).get_config()
        for part in sections:
            section = section[part]
        assert name in section, field


@every_file
def test_docstring_names_every_argument(file):
    document = load(file).__doc__ or ""
    for argument in filter(None, arguments(load(file))):
        assert re.search(rf"(``|^ {{4}}){argument}\b", document, re.MULTILINE), argument


@every_case
def test_generators_name_the_tokenizers_that_are_here(case):
    config = case.config
    if trains_tokenizer(config) or config.tokenizer.name == "pixels":  # which nobody trains
        return
    files = {"multiscale_vq": "tokenizer_multiscale.py", "vq": "tokenizer_vq.py"}
    files |= {"kl": "tokenizer_kl.py", "multiscale_bitwise": "tokenizer_bitwise.py"}
    name = files[config.tokenizer.name]
    if config.tokenizer.autoencoder.get("name") == "pooled":
        name = "tokenizer_maskgit.py"
    elif config.tokenizer.autoencoder.get("patch") == 2:
        name = "tokenizer_vq_fine.py"
    file = str(Path(case.file).with_name(name))
    argument = case.argument if case.argument in arguments(load(file)) else ""
    if case.file == IMAGENET + "infinity.py":
        argument = "d14_f8" if case.argument == "8b" else "d32"
    trained = Case(file, argument).config
    check_trained_tokenizer(config, trained.tokenizer)
    for field in ("image_size", "channels", "num_classes"):
        assert config.data[field] == trained.data[field], field
    other = config.copy_and_resolve_references()
    other.tokenizer.autoencoder.channels += 1
    with pytest.raises(ValueError, match=r"tokenizer\.autoencoder\.channels"):
        check_trained_tokenizer(other, trained.tokenizer)


def without_own_rule(tree: Any, rules: Any = RULES) -> set[str]:
    """Parameters of at least 64 KiB that only the last rule places, or none."""
    return {
        name
        for name, leaf in named(tree).items()
        if leaf.ndim >= 2
        and leaf.size * leaf.dtype.itemsize >= 2**16
        and find_rule(name, rules) in (None, RULES[-1])
    }


# What the last rule is for: convolutions, and the linear layer of next-scale's input.
PLAIN = re.compile(r"(autoencoder|quantizer)/\w+(/\w+)*/kernel|autoencoder/\w+/kernel")


@every_case
def test_large_parameters_have_their_own_rule(case):
    tree = parameters(case)
    check_coverage(tree)
    rest = without_own_rule(tree) - {"backbone/token_embed/kernel"}
    assert {name for name in rest if not PLAIN.fullmatch(name)} == set()
    assert all(named(tree)[name].ndim == 4 for name in rest)
    if not trains_tokenizer(case.config) and case.argument != "smoke":
        unplaced = without_own_rule(tree, RULES[1:])
        assert any(name.endswith("/blocks/attention/query/kernel") for name in unplaced)


THREE_HEADS = ("imagenet256/fractal:base",)


@every_case
def test_parameters_divide_among_eight_devices(case):
    mesh = case.config.mesh
    for sizes in (mesh.to_dict(), {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}):
        if str(case) == "imagenet256/xar:huge" and sizes.get("tensor", 1) == 2:
            with pytest.raises(ValueError, match="is 3413, which config.mesh.tensor=2 does not"):
                shardings(parameters(case), make_mesh(**sizes))
            continue  # the official width
        if sizes.get("tensor", 1) > 1 and str(case) in THREE_HEADS:
            with pytest.raises(ValueError, match=r"heads\) is 3, which config.mesh.tensor=2"):
                shardings(parameters(case), make_mesh(**sizes))
            continue
        placed = named(shardings(parameters(case), make_mesh(**sizes)))
        split = [name for name, sharding in placed.items() if not sharding.is_fully_replicated]
        assert bool(split) == (sizes.get("fsdp", 1) != 1)

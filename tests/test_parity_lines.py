"""How golden cases are read and compared: one line an array, whatever fails beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from ar_jax.convert.parity import var
from ar_jax.convert.parity.case import Case, read_measured, read_roles, read_selected
from ar_jax.convert.parity.compare import Section, check_case, tolerances
from ar_jax.convert.parity.readings import corner, find_key, named_gradients, said
from ar_jax.convert.places import same
from experiments import check_parity
from tests.converted_cases import GOLDEN


def test_tables_of_a_readme():
    readme = "\n".join(
        [
            "| name | max abs diff | relative norm |",
            "| `a` | 1.00e-06 | 2.00e-07 |",
            "| `ids` | equal | |",
            "| `b_*` | 2x3 | words, `[::4, :8]` | 3.0e-06 / 4.0e-07 |",
            "| `e` | 2x3 | words, `[1, :, 2:]` | 3.0e-06 / 4.0e-07 |",
            "| c | out | [2] | float32 | 5.0e-06 / 6.0e-07 | words |",
            "| d | in | [2] | float32 | | words |",
        ]
    )
    assert read_measured(readme) == {
        "a": (1e-6, 2e-7),
        "b_*": (3e-6, 4e-7),
        "c": (5e-6, 6e-7),
        "e": (3e-6, 4e-7),
    }
    assert read_selected(readme) == {
        "b_*": (slice(None, None, 4), slice(None, 8)),
        "e": (1, slice(None, None), slice(2, None)),
    }
    assert read_roles(readme) == {"c": "out", "d": "in"}


class Fake:
    """A family whose outputs are given, in a section of each."""

    NOT_APPLICABLE: ClassVar[dict[str, str]] = {"old": "no longer a thing"}

    def __init__(self, *sections: dict[str, Any], **more: Any):
        self.given = sections
        for name, value in more.items():
            setattr(self, name, value)

    def inputs(self, case: Case) -> tuple[str, ...]:
        return ("in*",)

    def sections(self, case: Case) -> Iterator[Section]:
        for given in self.given:
            yield Section(tuple(given), lambda given=given: self.arrays(given))  # type: ignore[misc]

    @staticmethod
    def arrays(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, array in given.items():
            if isinstance(array, Exception):
                raise array
            yield name, array


def write_case(folder: Path, arrays: dict[str, Any], readme: str = "") -> Case:
    (folder / "spec.json").write_text(json.dumps({"family": "fake"}))
    (folder / "README.md").write_text(readme)
    np.savez(folder / "io.npz", allow_pickle=False, **arrays)
    return Case.load(folder)


def test_comparison(tmp_path):
    """A wrong and an unchecked array fail; a reason excuses; what was not recorded is passed by."""
    recorded: dict[str, Any] = dict(
        near=np.ones(3, np.float32),
        far=np.ones(3, np.float32),
        ids=np.arange(3),
        wrong_ids=np.arange(3),
        float_ids=np.arange(3),
        infinite=np.array([-np.inf, 1], np.float32),
        moved=np.array([-np.inf, 1], np.float32),
        shape=np.zeros(3, np.float32),
        part=np.array([0, 2, 4], np.float32),
        names=np.array(["a", "b"]),
        unchecked=np.zeros(1),
        old=np.zeros(1),
        input=np.zeros(1),
    )
    readme = "| `near` | 1e-6 | 1e-5 |\n| `far` | 1e-6 | 1e-5 |\n| `part` | 3 | `[::2]` |\n"
    case = write_case(tmp_path, recorded, readme)
    ours = recorded | dict(
        near=recorded["near"] * (1 + 9e-5),
        far=recorded["far"] * (1 + 2e-4),
        wrong_ids=np.array([0, 1, 3]),
        float_ids=np.arange(3.0),
        moved=np.array([1, -np.inf]),
        shape=np.zeros((3, 1)),
        part=np.arange(6.0),
        invented=np.zeros(2),
    )
    given = {name: a for name, a in ours.items() if name not in ("unchecked", "old", "input")}
    lines = {line.name: line for line in check_case(Fake(given), case)}
    assert {name for name, line in lines.items() if line.ok} == {
        *("near", "ids", "infinite", "part", "names", "old", "input")
    }
    assert lines.keys() == recorded.keys()
    assert lines["near"].tolerance == pytest.approx(1e-4)
    assert "10 x 1.0e-05 measured" in str(lines["near"]) and str(lines["far"]).endswith("FAIL")
    assert "not checked" in str(lines["unchecked"]) and "no longer a thing" in str(lines["old"])
    assert str(lines["input"]).split() == ["input", "float", "input", "ok"]
    assert str(lines["wrong_ids"]).split()[1] == "integer"


def test_an_error_loses_no_line_of_other_sections(tmp_path):
    names = ("before", "broken", "after", "other")
    case = write_case(tmp_path, {name: np.zeros(2, np.float32) for name in names})
    first = dict(before=np.zeros(2), broken=ValueError("no\nluck"), after=np.zeros(2))
    lines = {line.name: line for line in check_case(Fake(first, dict(other=np.zeros(2))), case)}
    assert {name: line.ok for name, line in lines.items()} == dict(
        before=True, broken=False, after=False, other=True
    )
    assert str(lines["after"]).endswith("not computed: ValueError: no luck  FAIL")
    # Nothing is computed of which nothing was recorded.
    assert all(
        line.ok
        for line in check_case(Fake({"x": KeyError()}, {n: 0 * case[n] for n in names}), case)
    )


def test_a_specification_without_sense_fails_every_output(tmp_path):
    case = write_case(tmp_path, dict(a=np.zeros(1), input=np.zeros(1)))

    class Lost(Fake):
        def sections(self, case: Case) -> Any:
            raise KeyError("config")

    lines = {line.name: line for line in check_case(Lost(), case)}
    assert not lines["a"].ok and "KeyError: 'config'" in lines["a"].origin and lines["input"].ok


def test_the_readme_says_what_is_an_input(tmp_path):
    readme = "| `input` | out | x |\n| `given` | in | x |\n"
    case = write_case(tmp_path, dict(input=np.zeros(1), given=np.zeros(1)), readme)
    lines = {line.name: line for line in check_case(Fake(), case)}
    assert not lines["input"].ok and lines["given"].origin == "input"


def test_where_tolerances_come_from(tmp_path):
    rows = "".join(f"| `{n}` | 1e-6 | {r} |\n" for n, r in dict(a=1e-6, mean=1e-9, z=0).items())
    arrays: dict[str, Any] = dict.fromkeys(("a", "mean", "z", "unknown"), np.ones(2, np.float32))
    case = write_case(tmp_path, arrays | dict(table=np.ones(2)), rows)
    summed = Fake(summarised={"mean": "a"}.get)
    assert tolerances(summed, case, "mean") == [(pytest.approx(1e-5), "10 x 1.0e-06 measured of a")]
    assert tolerances(Fake(), case, "z")[0][0] == 10 * np.finfo(np.float32).eps
    assert tolerances(Fake(), case, "unknown")[0][0] == 5e-5
    added = Fake(ADDED=1e-5)
    assert tolerances(added, case, "a") == [
        (pytest.approx(2e-5), "10 x 1.0e-06 measured + 1e-05 of the README")
    ]
    assert tolerances(added, case, "table")[0][0] == 10 * np.finfo(np.float64).eps

    def limits(case: Case) -> dict[str, float]:
        return {"a": 5e-5, "z": 1e-6}

    limited = Fake(limits=limits)
    assert tolerances(limited, case, "a") == [
        (pytest.approx(1e-5), "10 x 1.0e-06 measured"),
        (5e-5, "the README's limit"),
    ]
    ours = Fake({"a": arrays["a"] * (1 + 3e-5)}, limits=limits)
    line = next(check_case(ours, case))
    assert line.ok and "the README's limit" in str(line)


def test_limits_of_smooth_runs_are_by_their_settings():
    case = Case.load(GOLDEN / "var" / "tiny_a")
    runs = {"soft": {"more_smooth": True}, "smooth": {"more_smooth": False}}
    case.spec["config"]["sampling"] = runs
    limits = var.limits(case)
    assert limits["soft.*"] == 1e-3 and "smooth.*" not in limits
    assert {"soft.gumbel_soft", "smooth.gumbel"} <= set(var.inputs(case))


def test_names_of_gradients():
    keys = ["layers.10.attention.wqkv.weight", "quant_conv.weight", "quant_conv.bias", "table"]
    for name, key in {
        "layer10_attention_wqkv_head": keys[0],
        "quant_conv_w": keys[1],
        "quant_conv_b": keys[2],
        "rows_slice": "table",
    }.items():
        assert find_key(keys, name, {"rows": "table"}) == key
    with pytest.raises(ValueError, match="no tensor is known by the name of the gradient 'x'"):
        find_key(keys, "x", {})
    assert corner(np.zeros((3, 4, 1, 1)), np.zeros((2, 4))).shape == (2, 4)
    assert corner(np.zeros((1, 9, 8)), np.zeros((5, 2))).shape == (5, 2)
    assert said({"dim": 3, "n": None}, width="dim", kv="n", other="x") == {"width": 3}


def test_parameters_that_nothing_flows_into_may_be_missing(tmp_path):
    """torch keeps no gradient of them, as of a phi that no scale uses."""
    places = {"used": same("a"), "unused": same("b"), "forgotten": same("c")}
    gradient = {"a": np.ones(3), "b": np.zeros(2), "c": np.ones(1)}
    names = np.array(["used", "forgotten"])
    case = write_case(tmp_path, {"g.names": names, "g.used": np.ones(3)})
    found = dict(named_gradients(case, "g", places, gradient, "."))
    np.testing.assert_array_equal(found["g.names"], names)
    np.testing.assert_allclose(found["g.norms"], [3**0.5, 1])
    assert found["g.total_norm"] == pytest.approx(2)
    np.testing.assert_array_equal(found["g.used"], np.ones(3))
    case = write_case(tmp_path, {"g.names": names[:1]})  # one that has a gradient is missing
    assert list(dict(named_gradients(case, "g", places, gradient, "."))["g.names"]) == [*names]


@pytest.fixture
def filters(tmp_path) -> Path:
    """A case of LlamaGen's filter alone, which is quickly computed."""
    whole = Case.load(GOLDEN / "llamagen" / "tiny")
    spec = {"family": "llamagen", "sampling": whole.spec["sampling"]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    arrays: Any = {name: whole[name] for name in ("filter_in", "filter_out")}
    np.savez(tmp_path / "io.npz", **arrays)
    return tmp_path


def test_the_command(filters, tmp_path, capsys):
    """Exits 0 if all is right, 1 on a wrong or an unchecked array; a bad folder stops nothing."""
    with np.load(filters / "io.npz") as stored:
        arrays: dict[str, Any] = dict(stored)
    assert check_parity.main(["", str(filters)]) == 0
    out = capsys.readouterr().out
    assert "2 arrays, 0 FAIL" in out and "filter_in" in out
    missing = str(tmp_path / "missing")
    assert check_parity.main(["", missing, str(filters)]) == 1
    out = capsys.readouterr().out
    assert "does not exist" in out and "2 arrays, 0 FAIL" in out
    changed = {
        "wrong": arrays | {"filter_out": arrays["filter_out"] * np.float32(1 + 1e-4)},
        "unchecked": arrays | {"filter_more": arrays["filter_out"]},
    }
    for io in changed.values():
        np.savez(filters / "io.npz", **io)
        assert check_parity.main(["", str(filters)]) == 1
        assert "1 FAIL" in capsys.readouterr().out
    (filters / "spec.json").write_text('{"family": "other"}')
    assert check_parity.main(["", str(filters)]) == 1
    assert "family 'other' is none of var" in capsys.readouterr().out

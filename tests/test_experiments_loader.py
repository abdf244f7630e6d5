"""The loader's benchmark and the packing of images, at their smallest."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from ar_jax.data import open_source
from tests.smoke_runs import ROOT, script

CONFIG = f"--config={ROOT / 'configs' / 'fashion_mnist' / 'var.py'}:smoke"
REPORT = {
    "program": "train",
    "inputs": "codes",
    "topology": "v5e:4x4",
    "devices": 16,
    "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
    "batch_size": 256,
    "seconds": {"total": 0.5},
}


def write_report(folder, **changes):
    path = folder / "report.json"
    path.write_text(json.dumps(REPORT | changes))
    return str(path)


def test_all_kinds_of_data_against_a_step(tmp_path, capsys):
    """One config reads its own crop and flip; codes are in the order of its schedule."""
    out = tmp_path / "new" / "loader.json"
    arguments = ("--images=12", "--sides=30,40", "--codes=64", "--batch_size=4", "--seconds=0.1")
    data = ("--config.data.crop=random", "--config.data.flip=True")
    report = f"--report={write_report(tmp_path)}"
    with script("benchmarks/loader", CONFIG, *arguments, *data, report, f"--out={out}") as loader:
        loader.main(["loader"])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    rows = {row["data"]: row for row in result["rows"]}
    assert list(rows) == ["folder", "arrayrecord", "codes"]
    for name, row in rows.items():
        assert row["workers"] == 0 and row["items"] == (64 if name == "codes" else 12)
        assert row["images_per_core_second"] == row["images"] / row["cpu_seconds"] > 0
        assert row["images_per_second"] == row["images"] / row["seconds"]
        assert name in printed
    assert "codes_per_core_second" not in rows["folder"]
    rate = rows["codes"]["images_per_core_second"]
    codes = rows["codes"]["codes_per_core_second"] / rate
    assert codes == pytest.approx(1 + 4 + 16 + 49)
    # 256 images in half a second over four hosts of four chips; the step reads no images.
    assert result["demands"][0]["hosts"] == 4
    assert result["demands"][0]["images_per_host_second"] == 128
    assert rows["codes"]["cores_per_host"] == {"report.json": pytest.approx(128 / rate)}
    assert rows["folder"]["cores_per_host"] == {}
    assert result["mean_jpeg_bytes"] > 100


def test_data_of_ones_own_in_worker_processes(tmp_path):
    """What the workers read and what it costs them is counted, not this process's share alone."""
    with script("benchmarks/loader", CONFIG, "--codes=64") as loader:
        loader.write_codes(tmp_path / "codes", loader.CONFIG.value, 64)
    source, out = f"--source=codes:{tmp_path / 'codes'}", tmp_path / "loader.json"
    arguments = ("--workers=1", "--batch_size=4", "--seconds=0.3", f"--out={out}")
    with script("benchmarks/loader", CONFIG, source, *arguments) as loader:
        loader.main(["loader"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["data"] == "codes" and row["workers"] == 1
    assert row["images"] > 0 and row["cpu_seconds"] > 0


def test_several_sources_take_turns(tmp_path):
    with script("benchmarks/loader", CONFIG) as loader:
        for name in ("a", "b"):
            loader.write_codes(tmp_path / name, loader.CONFIG.value, 16)
    specs, out = [f"codes:{tmp_path / name}" for name in ("a", "b")], tmp_path / "loader.json"
    arguments = (f"--source={','.join(specs)}", "--repeats=2", "--batch_size=4", "--seconds=0.05")
    with script("benchmarks/loader", CONFIG, *arguments, f"--out={out}") as loader:
        loader.main(["loader"])
    assert [row["data"] for row in json.loads(out.read_text())["rows"]] == specs * 2


@pytest.mark.parametrize(
    ("topology", "devices", "slices", "chips_per_host", "hosts"),
    [
        ("v5e:4x4", 16, 1, None, 4),
        ("v5e:4x4", 16, 1, 8, 2),
        ("v5e:2x4", 8, 1, None, 1),
        ("v6e:2x4", 8, 1, None, 1),
        ("v5p:2x2x2", 8, 1, None, 2),
        ("v5e:2x2", 8, 2, None, 2),
        ("v5e:1x1", 1, 1, None, 1),
    ],
)
def test_hosts(tmp_path, topology, devices, slices, chips_per_host, hosts):
    mesh = {"slice": slices, "data": devices // slices}
    path = write_report(tmp_path, topology=topology, devices=devices, mesh=mesh)
    with script("benchmarks/loader", CONFIG) as loader:
        demand = loader.read_demand(path, chips_per_host)
    assert demand["hosts"] == hosts
    assert demand["images_per_host_second"] == pytest.approx(512 / hosts)


@pytest.mark.parametrize(
    ("changes", "chips_per_host", "message"),
    [
        ({"program": "sample"}, None, "no report of a train step that fits"),
        ({"fits": False, "seconds": None}, None, "no report of a train step that fits"),
        ({}, 5, "--chips_per_host=5 does not divide the 16 chips of v5e:4x4"),
        ({}, 0, "--chips_per_host=0 does not divide"),
    ],
)
def test_bad_reports(tmp_path, changes, chips_per_host, message):
    path = write_report(tmp_path, **changes)
    with (
        script("benchmarks/loader", CONFIG) as loader,
        pytest.raises(ValueError, match=message),
    ):
        loader.read_demand(path, chips_per_host)


def test_records_hold_what_the_folder_holds(tmp_path, capsys):
    with script("benchmarks/loader", CONFIG) as loader:
        loader.write_photos(tmp_path / "photos", 12, (8, 12))
    (tmp_path / "photos" / "val" / "synthetic_01").mkdir(parents=True)
    for name in ("000001.jpg", "000011.jpg"):
        path = tmp_path / "photos" / "train" / "synthetic_01" / name
        path.rename(tmp_path / "photos" / "val" / "synthetic_01" / name)
    shutil.copy(tmp_path / "photos" / "train" / "synthetic_00" / "000000.jpg", path)
    source, out = f"folder:{tmp_path / 'photos'}", tmp_path / "records"
    with script("write_records", f"--source={source}", f"--out={out}") as write_records:
        write_records.main(["write_records"])
        write_records.main(["write_records"])
    assert capsys.readouterr().out.count("there already") == 2
    for split in ("train", "test"):
        folder = open_source(source, split)
        records = open_source(f"arrayrecord:{out}", split)
        assert len(folder) == len(records) > 0
        assert records.class_names == folder.class_names
        for index in range(len(folder)):
            np.testing.assert_array_equal(folder[index]["image"], records[index]["image"])
            assert folder[index]["label"] == records[index]["label"]


def test_an_unreadable_image_leaves_nothing(tmp_path):
    with script("benchmarks/loader", CONFIG) as loader:
        loader.write_photos(tmp_path, 10, (8, 12))
    damaged = tmp_path / "train" / "synthetic_03" / "000003.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    source, out = f"folder:{tmp_path}", tmp_path / "records"
    with (
        script("write_records", f"--source={source}", f"--out={out}") as write_records,
        pytest.raises(ValueError, match="000003"),
    ):
        write_records.main(["write_records"])
    assert list(out.iterdir()) == []

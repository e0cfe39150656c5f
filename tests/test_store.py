"""The store of tuned choices: keys, tables, the journal, and what damaged files and several writers do. CPU only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import tritonconv
from tritonconv.autotune import choose, sources, store
from tritonconv.autotune.ceilings import from_json, nominal
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.store import Entry, Table
from tritonconv.autotune.tuning.journal import FAILED, Journal, Timing
from tritonconv.errors import ArgumentError, StoreError, StoreWarning
from tritonconv.explain import explain_problem
from tritonconv.kernels.registry import RENAMED, have_triton, variant, variants
from tritonconv.problem import PASSES, Problem

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
UP = Problem(1, 64, 32, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16), bias=True)
HALO = Problem(2, 16, 8, (8, 8, 8), (3, 3, 3), (2, 2, 2), (1, 1, 1), (16, 16, 16))


def entry(name: str = "forward_torch_phases", **changes) -> Entry:
    made = Entry(name, {}, 1.0, 2.0, sources.revision(variant(name)), str(UP), "forward", "2026-01-01T00:00:00", {})
    return replace(made, **changes)


def timing(variant_name: str = "forward_torch_conv", **changes) -> Timing:
    made = Timing(str(UP), "forward", variant_name, {}, "0", "screen", {"torch": "2"}, "ok", "", 1.0, 0.9, 1.1, 5, 1.5)
    return replace(made, **changes)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The user's store, empty, and forgotten afterwards."""
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "store"))
    choose.forget()
    yield tmp_path / "store"
    choose.forget()


# ------------------------------------------------------------------ keys


def test_a_key_has_no_sizes_but_their_power_of_two():
    key = Key.of(UP, "forward")
    assert str(key) == "forward float32 ncdhw k2x2x2 s2x2x2 r1x1x1 crop-000 64->32 g1 bias 2^9"
    assert Key.of(replace(UP, size=(8, 9, 10), out_size=(16, 18, 20)), "forward") == key
    assert [each.bucket for each in key.neighbours()] == [8, 10]
    assert Key.of(replace(UP, n=2), "forward").bucket == 10
    assert Key.of(replace(UP, n=0), "forward").bucket == -1


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "ndhwc"}, {"dtype": torch.float16}, {"bias": False}, {"c_in": 32}, {"c_out": 16},
        {"stride": (2, 2, 1), "out_size": (16, 16, 9)}, {"groups": 2}, {"crop": (0, 0, 1), "out_size": (16, 16, 15)},
        {"kernel": (2, 2, 3), "out_size": (16, 16, 17)}, {"dilation": (1, 1, 2), "out_size": (16, 16, 17)},
        {"out_size": (16, 16, 17)},
    ],
    ids=str,
)  # fmt: skip
def test_what_decides_the_speed_is_in_the_key(change):
    changed = Key.of(replace(UP, **change), "forward")
    assert changed != Key.of(UP, "forward")
    assert str(changed) != str(Key.of(UP, "forward"))


def test_the_passes_have_keys_of_their_own_and_others_are_refused():
    assert len({str(Key.of(UP, name)) for name in PASSES}) == 3
    with pytest.raises(ArgumentError, match="'sideways'"):
        Key.of(UP, "sideways")


# ------------------------------------------------------------------ tables


def test_entries_come_back_and_merge_one_by_one(folder):
    store.merge(Table("a box", {"k1": entry(), "k2": entry()}))
    store.merge(Table("a box", {"k2": entry(ms=0.5)}, {"memory": 1.0}))
    found = store.read("a box")
    assert {key: each.ms for key, each in found.entries.items()} == {"k1": 1.0, "k2": 0.5}
    assert found.ceilings == {"memory": 1.0}
    assert found.entries["k1"] == entry()
    assert store.read("another box").entries == {}
    assert [path.name for path in folder.glob("*.json")] == ["a_box.v2.json"]


def test_the_users_entries_stand_before_the_shipped_ones(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHIPPED", tmp_path)
    (tmp_path / "a_box.v2.json").write_text(Table("a box", {"k1": entry(), "k2": entry()}, {"memory": 1}).text())
    store.merge(Table("a box", {"k2": entry(ms=9.0)}))
    found = store.read("a box")
    assert {key: each.ms for key, each in found.entries.items()} == {"k1": 1.0, "k2": 9.0}
    assert found.ceilings == {"memory": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"), ('{"format": 2, "device": "a b', "not JSON"), ("[]", "expected format 2"),
        ('{"format": 3, "device": "a box", "entries": {}}', "'format': 3"),
        ('{"format": 2, "device": "a BOX", "entries": {}}', "a BOX"),
        ('{"format": 2, "device": "a box"}', "no entries"), ("\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"), ('{"format": 2' + "0" * 10_000 + "}", "not JSON"),
    ],
    ids=["empty", "cut off", "a list", "newer", "foreign", "no entries", "binary", "brackets", "digits"],
)  # fmt: skip
def test_a_reader_leaves_a_damaged_or_foreign_file_and_a_writer_sets_it_aside(folder, text, words):
    folder.mkdir()
    path = folder / "a_box.v2.json"
    path.write_bytes(text.encode("latin-1"))
    for _ in range(2):
        with pytest.warns(StoreWarning, match=words):
            assert store.read("a box") == Table("a box")
    assert path.read_bytes() == text.encode("latin-1")
    with pytest.warns(StoreWarning) as told:
        store.merge(Table("a box", {"k1": entry()}))
    assert "set aside" in str(told[-1].message)
    (kept,) = folder.glob("a_box.v2.damaged-*")
    assert kept.read_bytes() == text.encode("latin-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(store.read("a box").entries) == ["k1"]


def test_another_format_and_another_device_have_files_of_their_own(folder):
    """Two versions of tritonconv on one home, or two devices whose letters are the same, share no file."""
    folder.mkdir()
    before = folder / "a_box.v1.json"
    before.write_text('{"format": 1, "device": "a box", "entries": {}}')
    devices = ("a box", "a-box", "a.box", "A(R) box", "日本")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in devices:
            store.merge(Table(device, {"k1": entry(problem=device)}))
        assert [store.read(device).entries["k1"].problem for device in devices] == list(devices)
    assert before.read_text().startswith('{"format": 1')
    assert len(list(folder.glob("*.v2.json"))) == len(devices)


def test_one_bad_entry_does_not_lose_the_others(folder):
    data = json.loads(Table("a box", {"good": entry(), "bad": entry()}).text())
    data["entries"]["bad"]["ms"] = "fast"
    folder.mkdir()
    (folder / "a_box.v2.json").write_text(json.dumps(data))
    with pytest.warns(StoreWarning, match="'bad'"):
        assert list(store.read("a box").entries) == ["good"]
    with pytest.warns(StoreWarning) as told:
        store.merge(Table("a box", {"another": entry()}))
    assert ["'bad'" in str(each.message) for each in told] == [True, False]
    assert sorted(store.read("a box").entries) == ["another", "good"]


def test_a_renamed_variant_takes_its_entries_and_timings_along(folder, monkeypatch):
    store.merge(Table("a box", {"k1": entry("forward_torch_conv", config={"A": 1})}))
    Journal("a box").add(timing("forward_torch_conv", config={"A": 1}))
    monkeypatch.setitem(RENAMED, "forward_torch_conv", ("forward_torch_phases", {"COPY": 1}))
    found = store.read("a box").entries["k1"]
    assert (found.variant, found.config) == ("forward_torch_phases", {"A": 1, "COPY": 1})
    assert Journal.open("a box").find(timing("forward_torch_phases", config={"A": 1, "COPY": 1})) is not None


def test_what_became_of_a_renamed_variant_is_there():
    names = {record.name for record in variants()}
    for old, (new, _) in RENAMED.items():
        assert new in names or not have_triton()
        if old not in names:
            with pytest.raises(ArgumentError, match=f"{old}' is '{new}' with COPY=1"), tritonconv.use(old):
                pass


def test_entries_and_factors_from_before_the_copies_were_a_key_are_read(folder):
    old = {"A": 1}
    entries = {
        "k1": entry(variant="forward_phases", config=old),
        "k2": entry(variant="forward_phases_last", config=old),
    }
    factors = {"forward_phases_last": 2.0, "forward_phases_last unpipelined": 3.0, "forward_phases unpipelined": 4.0}
    store.merge(Table("a box", entries), ceilings=lambda known: {**nominal(CPU).to_json(), "factors": factors})
    found = store.read("a box")
    assert {key: (each.variant, each.config) for key, each in found.entries.items()} == {
        "k1": ("forward_phases", {"A": 1, "COPY": 0}), "k2": ("forward_phases", {"A": 1, "COPY": 1}),
    }  # fmt: skip
    assert from_json(found.ceilings).factors == {
        "forward_phases copied": 2.0, "forward_phases copied unpipelined": 3.0, "forward_phases unpipelined": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"ms": 0}, {"ms": float("nan")}, {"config": [1]}, {"config": {"A": 1.5}}, {"variant": None}, {"more": 1}]
)
def test_an_entry_checks_what_it_reads(change):
    assert Entry.from_json(asdict(entry())) == entry()
    with pytest.raises(ValueError, match=r"entry|argument"):
        Entry.from_json({**asdict(entry()), **change})


WRITER = """
import sys
from tritonconv.autotune import store
from tritonconv.autotune.store import Entry, Table
for index in range(25):
    made = Entry("forward_torch_conv", {}, 1.0, 2.0, "0", "p", "forward", "now", {})
    store.merge(Table("a box", {f"{sys.argv[1]} {index}": made}))
"""


def test_two_processes_that_write_at_once_lose_nothing(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", WRITER, name], env=environment) for name in ("one", "two")]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert set(store.read("a box").entries) == {f"{name} {index}" for name in ("one", "two") for index in range(25)}
    assert not list(folder.glob(".*.json.*"))


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_changes(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        store.merge(Table("a box", {"k1": entry()}), tmp_path / "file" / "store")


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.user_folder() == tmp_path / "own"
    monkeypatch.delenv("TRITONCONV_CACHE")
    assert store.user_folder() == tmp_path / "xdg" / "tritonconv"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert store.user_folder() == Path.home() / ".cache" / "tritonconv"


def test_a_user_without_a_home_is_one_who_has_tuned_nothing(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("TRITONCONV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(Path, "home", lambda: no_home(None))
    choose.forget()
    with pytest.warns(StoreWarning, match="TRITONCONV_CACHE"):
        assert choose.choose(UP, CPU, "forward").entry is None
    with pytest.raises(StoreError, match="home"):
        store.merge(Table("a box", {"k1": entry()}))
    monkeypatch.setenv("TRITONCONV_CACHE", "~nobody of this name/store")
    with pytest.warns(StoreWarning, match="TRITONCONV_CACHE"):
        assert store.own("a box").entries == {}
    monkeypatch.undo()
    choose.forget()


# ------------------------------------------------------------------ the journal


def test_a_timing_is_found_again_only_for_exactly_what_it_is_of(folder):
    Journal("a box").add(timing())
    journal = Journal.open("a box")
    assert journal.find(timing(median_ms=7.0)) == timing()
    for change in (
        {"problem": "other"}, {"pass_name": "backward_data"}, {"variant": "v"}, {"config": {"A": 1}}, {"source": "1"},
        {"stage": "final"}, {"versions": {"torch": "3"}},
    ):  # fmt: skip
        assert journal.find(replace(timing(), **change)) is None


def test_a_line_that_was_cut_short_is_left_out_and_the_next_is_whole(folder):
    journal = Journal("a box")
    journal.add(timing())
    whole = journal.path.read_text()
    journal.path.write_text(whole + whole[: len(whole) // 2])
    with pytest.warns(StoreWarning, match="1 damaged line"):
        again = Journal.open("a box")
    assert list(again.timings.values()) == [timing()]
    again.add(timing("forward_torch_phases", status=FAILED, message="no", median_ms=None, p20_ms=None, p80_ms=None))
    with pytest.warns(StoreWarning, match="1 damaged line"):
        assert [each.status for each in Journal.open("a box").timings.values()] == ["ok", "failed"]


# ------------------------------------------------------------------ the choice


def stored(problem: Problem, pass_name: str, made: Entry) -> None:
    name = device_name(CPU)
    store.merge(Table(name, {str(Key.of(problem, pass_name)): made}))
    choose.forget()


def test_a_stored_choice_is_taken_for_its_bucket_and_said(folder):
    assert choose.choose(UP, CPU, "forward") == choose.untuned(UP, CPU, "forward")
    stored(UP, "forward", entry())
    for same in (UP, replace(UP, size=(8, 9, 10), out_size=(16, 18, 20))):
        found = choose.choose(same, CPU, "forward")
        assert found.variant.name == "forward_torch_phases"
        assert "tuned on this size" in found.reason and "2026-01-01" in found.reason
    assert choose.choose(replace(UP, bias=False), CPU, "forward").reason == choose.untuned(UP, CPU, "forward").reason
    assert choose.choose(UP, CPU, "backward_data") == choose.untuned(UP, CPU, "backward_data")


def test_an_entry_of_an_earlier_revision_stays_in_use_and_is_marked(folder):
    stored(UP, "forward", entry())
    assert not choose.choose(UP, CPU, "forward").outdated
    stored(UP, "forward", entry(source="0" * 16))
    found = choose.choose(UP, CPU, "forward")
    assert found.variant.name == "forward_torch_phases" and found.outdated
    said = explain_problem(UP, CPU).text
    assert "forward_torch_phases has changed since" in said and "tritonconv tune" in said


@pytest.mark.parametrize(
    "made", [entry(variant="forward_gone"), entry("forward_torch_shuffle")], ids=["unknown variant", "does not serve"]
)
def test_what_cannot_be_used_is_passed_over(folder, made):
    stored(HALO, "forward", made)
    assert choose.choose(HALO, CPU, "forward") == choose.untuned(HALO, CPU, "forward")


def test_what_another_process_measured_is_adopted(folder, monkeypatch):
    monkeypatch.setattr(choose, "_adopted", {})
    choose.adopt(device_name(CPU), {str(Key.of(UP, "forward")): entry()})
    assert choose.choose(UP, CPU, "forward").variant.name == "forward_torch_phases"
    assert not folder.exists()


def test_a_device_that_is_not_there_has_an_empty_table():
    (source,) = choose.sources_of(torch.device("cuda", 99))
    assert source.table.entries == {}

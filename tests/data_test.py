"""Records on disk -> batches: each example once an epoch, the same for any number of processes, from any position."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_run import PROPERTY

from unimat_jax import data
from unimat_jax.crystal import CrystalError
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import Table

NO_AUGMENTATION = {"shuffle_atoms": False, "random_shift": False, "random_axes": False}
AUGMENTATION = {"shuffle_atoms": True, "random_shift": True, "random_axes": True}
SIZE = 8


@pytest.fixture(scope="module")
def directory(tiny_data):
    return data.dataset_directory("starter", tiny_data)


@pytest.fixture(scope="module")
def statistics(directory):
    return data.read_statistics(directory)


@pytest.fixture(scope="module")
def source(directory):
    return data.RecordSource(directory, "train")


@pytest.fixture(scope="module")
def spec(statistics):
    return data.make_spec(statistics, table="data")


@pytest.fixture(scope="module")
def maker(source, spec, statistics):
    schema = data.condition_schema(statistics, [PROPERTY])

    def make(seed=0, augmentation=AUGMENTATION, spec=spec, source=source, **process):
        return data.BatchMaker(source, spec, schema, batch_size=SIZE, seed=seed, augmentation=augmentation, **process)

    return make


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


def test_records_are_those_that_tfds_reads(directory, source):
    expected = list(tfds.builder_from_directory(str(directory)).as_data_source("train"))
    found = source.read(range(len(source)))
    assert len(found) == len(source) == len(expected) == 36
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["material_id"] == theirs["material_id"].decode()
        for name in ("slots", "frac_coords", "lattice"):
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
        assert ours["properties"] == pytest.approx(theirs["properties"])


def test_records_as_tfds_serialises_them(directory, source):
    """What TFDS wrote itself, on Beam or in earlier versions, has its fields in another order."""
    features = tfds.builder_from_directory(str(directory)).info.features
    records = source.read(range(5))
    messages = [features.serialize_example(features.encode_example(record)) for record in records]
    for found, expected in zip(data.parse_records(messages), records, strict=True):
        assert (found["material_id"], found["properties"]) == (expected["material_id"], expected["properties"])
        for name in ("slots", "frac_coords", "lattice"):
            np.testing.assert_array_equal(found[name], expected[name])


def test_many_threads_read_the_records_that_they_ask_for(source):
    asked = [np.random.default_rng(i).permutation(36) for i in range(8)]
    expected = [record["material_id"] for record in source.read(range(36))]
    with ThreadPoolExecutor(8) as pool:
        for order, records in zip(asked, pool.map(source.read, asked), strict=True):
            assert [record["material_id"] for record in records] == [expected[i] for i in order]


def test_a_damaged_shard_is_named(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("*-train.array_record*")
    content = bytearray(shard.read_bytes())
    content[2000:3000] = bytes(1000)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged \(.*\): make the data set again"):
        data.RecordSource(tmp_path / "copy", "train").read(range(36))
    shutil.copy(next(directory.glob("*-validation.array_record*")), shard)
    with pytest.raises(UserError, match=rf"{shard.name} holds 10 records, dataset_info.json says 36"):
        data.RecordSource(tmp_path / "copy", "train").read([0])


def test_every_example_comes_once_an_epoch_also_where_epochs_end_inside_a_batch(maker):
    batches = maker()
    order = np.concatenate([batches.indices(i) for i in range(18)])  # 36 examples, batches of 8: 4 epochs
    for epoch in range(4):
        assert sorted(order[36 * epoch : 36 * (epoch + 1)]) == list(range(36))
    assert (order[:36] != order[36:72]).any()  # each epoch in an order of its own


def test_a_data_set_smaller_than_a_batch(source, spec, maker):
    class Few:
        def __len__(self):
            return 3

        def read(self, indices):
            return source.read(indices)

    batches = maker(source=Few())
    order = np.concatenate([batches.indices(i) for i in range(3)])
    assert all(sorted(order[3 * e : 3 * e + 3]) == [0, 1, 2] for e in range(8))
    assert batches(0)["slot"].shape == (SIZE, spec.max_atoms)


def test_another_seed_is_another_order_and_other_augmentation(maker):
    assert same(maker(0)(3), maker(0)(3))
    assert (maker(0).indices(3) != maker(1).indices(3)).any()
    one, other = maker(0).batch_of(np.arange(SIZE), np.random.default_rng(0)), maker(0)(0)
    assert (one["coords"] != other["coords"]).any()


def test_each_batch_draws_its_own_augmentation(maker):
    only_shift = {**NO_AUGMENTATION, "random_shift": True}
    moved = [
        (maker(augmentation=only_shift)(i)["coords"][:, 0] - maker(augmentation=NO_AUGMENTATION)(i)["coords"][:, 0]) % 2
        for i in range(3)
    ]
    assert len({tuple(row) for batch in moved for row in batch.round(4)}) == 3 * SIZE


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, AUGMENTATION], ids=["plain", "augmented"])
def test_the_processes_parts_are_the_global_batch(maker, process_count, augmentation):
    for number in (0, 4, 1000):
        whole = maker(augmentation=augmentation)(number)
        parts = [
            maker(augmentation=augmentation, process_index=i, process_count=process_count)(number)
            for i in range(process_count)
        ]
        assert {len(part["slot"]) for part in parts} == {SIZE // process_count}
        assert same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_cartesian_parts_are_the_global_batch_too(statistics, maker):
    spec = data.make_spec(statistics, table="data", coordinates="cartesian", lattice_form="matrix")
    whole = maker(spec=spec)(2)
    parts = [maker(spec=spec, process_index=i, process_count=2)(2) for i in range(2)]
    assert whole["lattice"].shape == (SIZE, 9)
    assert same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)
    assert not np.allclose(
        whole["lattice"], maker(spec=spec).batch_of(maker().indices(2), np.random.default_rng(7))["lattice"]
    )


def test_windows_share_out_their_crystals_by_size(maker, source):
    """Every example once an epoch, those of a batch of like sizes, each batch as large as its largest for all."""
    by_size, plain = maker(size_window=3), maker()
    count = source.num_atoms
    assert count.tolist() == [len(record["slots"]) for record in source.read(range(len(source)))]
    together = [np.concatenate([m.indices(i) for i in range(9)]) for m in (by_size, plain)]  # two epochs
    assert sorted(together[0]) == sorted(together[1]) == sorted([*range(36)] * 2)
    for window in range(3):
        batches = [count[by_size.indices(3 * window + i)] for i in range(3)]
        batches.sort(key=lambda sizes: (sizes.max(), sizes.min()))
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(batches))
    parts = [maker(size_window=3, process_index=p, process_count=2) for p in range(2)]
    for number in range(4):
        whole = by_size(number)
        largest = int(count[by_size.indices(number)].max())
        assert whole["slot"].shape[1] == data.padded_atoms(largest, plain(0)["slot"].shape[1])
        halves = [part(number) for part in parts]
        assert same(whole, {name: np.concatenate([half[name] for half in halves]) for name in whole})


def test_evaluation_by_size_holds_the_same_examples(source, spec, maker):
    (by_size, _), (plain, _) = (
        data.evaluation_batches(m, source, spec, num_examples=20, batch_size=SIZE)
        for m in (maker(size_window=2), maker())
    )
    kept = [np.concatenate([b["index"][b["weight"] > 0] for b in batches]) for batches in (by_size, plain)]
    assert sorted(kept[0]) == sorted(kept[1])
    assert [b["slot"].shape[1] for b in by_size] == sorted(b["slot"].shape[1] for b in by_size)


@pytest.mark.parametrize("num_atoms", [1, 4, 5, 17, 32, 33, 64, 65, 500, 513])
def test_padding_wastes_less_than_a_quarter_and_no_more_than_the_largest(num_atoms):
    padded = data.padded_atoms(num_atoms, 10_000)
    assert num_atoms <= padded < 1.25 * num_atoms or padded == -(-num_atoms // 4) * 4
    assert data.padded_atoms(num_atoms, num_atoms) == num_atoms


def test_a_batch_size_that_the_processes_do_not_divide(maker):
    with pytest.raises(UserError, match=r"train.batch_size = 8 .* 3 processes"):
        maker(process_index=0, process_count=3)


def test_the_iterator_gives_the_batches_in_order_and_goes_on_from_its_state(maker):
    batches = maker()
    iterator = data.training_iterator(batches)
    for number in range(3):
        assert same(next(iterator), batches(number))
    state = iterator.get_state()
    again = data.training_iterator(batches)
    again.set_state(state)
    for number in range(3, 6):
        assert same(next(again), batches(number)) and same(next(iterator), batches(number))
    again.set_state(state)  # also backwards
    assert same(next(again), batches(3))


def test_properties_are_standardised_by_the_training_set(source, spec, statistics, maker):
    batch = maker(augmentation=NO_AUGMENTATION).batch_of(np.arange(36)[:SIZE], np.random.default_rng(0))
    about = statistics["properties"][PROPERTY]
    raw = np.array([record["properties"][PROPERTY] for record in source.read(range(SIZE))])
    np.testing.assert_allclose(batch["properties"][:, 0], (raw - about["mean"]) / about["std"], rtol=1e-5)
    everything = np.concatenate([maker(augmentation=NO_AUGMENTATION)(i)["properties"] for i in range(9)])  # 2 epochs
    assert everything.mean() == pytest.approx(0.0, abs=1e-5) and everything.std() == pytest.approx(1.0, abs=1e-5)


def test_a_missing_property_stays_missing(source, maker):
    class Missing:
        def __len__(self):
            return len(source)

        def read(self, indices):
            records = source.read(indices)
            return [{**r, "properties": {PROPERTY: np.nan}} if i == 1 else r for i, r in enumerate(records)]

    batch = maker(source=Missing())(0)
    assert np.isnan(batch["properties"][1, 0]) and np.isfinite(np.delete(batch["properties"], 1)).all()


def test_condition_schema(statistics):
    (about,) = data.condition_schema(statistics, [PROPERTY])
    assert about["name"] == PROPERTY and about["unit"] == "eV/atom" and about["std"] > 0
    assert about["min"] < about["mean"] < about["max"]
    with pytest.raises(UserError, match=rf"'gap'.*e_above_hull.*{PROPERTY}"):
        data.condition_schema(statistics, ["gap"])
    constant = {"properties": {"flat": {"count": 5, "mean": 1.0, "std": 0.0}, "empty": {"count": 0}}}
    assert data.condition_schema(constant, ["flat"])[0]["std"] > 0
    with pytest.raises(UserError, match="'empty'"):
        data.condition_schema(constant, ["empty"])


def test_evaluation_batches_hold_each_example_once_and_are_always_the_same(directory, spec, maker):
    source = data.RecordSource(directory, "validation")
    settings = {"num_examples": 100, "batch_size": SIZE}
    batches, left_out = data.evaluation_batches(maker(3, source=source), source, spec, **settings)
    again, _ = data.evaluation_batches(maker(4, source=source), source, spec, **settings)
    assert len(batches) == 2 and left_out == 0 and len(source) == 10
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    weight = np.concatenate([batch["weight"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    assert sorted(index[weight > 0]) == list(range(10)) and set(weight) == {0.0, 1.0} and len(weight) == 16


def test_evaluation_of_fewer_examples_takes_them_from_everywhere(source, spec, maker):
    batches, _ = data.evaluation_batches(maker(), source, spec, num_examples=12, batch_size=SIZE)
    index = np.concatenate([batch["index"][batch["weight"] > 0] for batch in batches])
    assert len(set(index)) == 12 and index.max() > 20 and (np.diff(index) > 0).all()


def test_evaluation_leaves_out_what_the_model_cannot_hold_and_counts_it(source, statistics, spec, maker):
    lighter = [symbol for symbol in statistics["elements"] if symbol not in ("Cs", "Ba")]
    for small in (replace(spec, table=Table.of_elements(lighter)), replace(spec, max_atoms_per_element=1)):
        batches, left_out = data.evaluation_batches(maker(spec=small), source, small, num_examples=36, batch_size=SIZE)
        index = np.concatenate([batch["index"][batch["weight"] > 0] for batch in batches])
        assert left_out > 0 and len(index) + left_out == 36
        for record, kept in zip(source.read(range(36)), np.isin(np.arange(36), index), strict=True):
            numbers = small.table.place_of[Table().atomic_numbers[record["slots"][:, 1], record["slots"][:, 2]]]
            fits = (numbers >= 0).all() and record["slots"][:, 0].max() < small.max_atoms_per_element
            assert fits == kept


def test_elements_outside_the_table_are_named(source, statistics, spec, maker):
    with pytest.raises(UserError, match=r"config.data.table = 'O,F,Li,K,Na' has no place for .*Cs"):
        data.make_spec(statistics, table="O,F,Li,K,Na")
    small = replace(spec, table=Table.of_elements(["O", "Li"]))
    record = next(i for i, r in enumerate(source.read(range(36))) if (r["slots"][:, 1] == 5).any())
    with pytest.raises(CrystalError, match=r"'(Cs|Ba)'.*data.table") as caught:
        maker(spec=small).batch_of(np.full(SIZE, record), np.random.default_rng(0))
    assert caught.value.reason == "element_outside_table"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "Li,Xx"}, r"config.data.table = 'Li,Xx'.*'Xx'"),
        ({"lattice_form": "vectors"}, r"config.data.lattice_form = 'vectors'.*parameters"),
        ({"coordinates": "cartesian"}, r"config.data: .*'matrix'"),
        ({"coordinates": "polar"}, r"config.data: coordinates = 'polar'"),
        ({"max_atoms_per_element": 2}, r"config.data.max_atoms_per_element = 2.* 3 atoms"),
    ],
)
def test_a_spec_that_cannot_be(statistics, settings, message):
    with pytest.raises(UserError, match=message):
        data.make_spec(statistics, **settings)


def test_tables(statistics):
    assert data.make_spec(statistics).grid == (3, 9, 18)
    assert data.make_spec(statistics, max_atoms_per_element=7).grid == (7, 9, 18)
    spec = data.make_spec(statistics, table="data")
    assert set(data.element_symbols(spec)) >= set(statistics["elements"]) and spec.grid[1:] < (9, 18)
    assert spec.lattice_mean == tuple(statistics["lattice"]["parameters"]["mean"])
    assert data.make_spec(statistics, lattice_form="log_metric").lattice_std == tuple(
        statistics["lattice"]["log_metric"]["std"]
    )


def test_a_data_set_that_is_not_there(tmp_path, directory):
    with pytest.raises(UserError, match=r"no data set 'mine' in data_dir .*unimat prepare --dataset=mine"):
        data.dataset_directory("mine", tmp_path)
    with pytest.raises(UserError, match=r"no split 'test'.*train.*validation"):
        data.RecordSource(directory, "test")


def test_a_part_of_the_training_set(directory, source):
    part = data.RecordSource(directory, "train", 10)
    ids = [record["material_id"] for record in part.read(range(10))]
    assert len(part) == 10 and ids == [record["material_id"] for record in source.read(range(10))]
    for limit in (-1, 37):
        with pytest.raises(UserError, match=f"max_train_examples = {limit}: .* 36 in 'train'"):
            data.RecordSource(directory, "train", limit)

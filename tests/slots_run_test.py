"""A run of the slots model from end to end: training, crystals, export."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_run import PROPERTY, slots_config

from unimat_jax import sharding
from unimat_jax.assembly import sampler_program
from unimat_jax.errors import UserError
from unimat_jax.generator import Generator
from unimat_jax.requests import Request
from unimat_jax.train import train


@pytest.fixture(scope="module")
def slots_run(tiny_data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("slots") / "run"
    train(slots_config(tiny_data, train__sample_every=6, train__sample_examples=3), workdir)
    return workdir


def rows_of(workdir):
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update(row)
    return found


def test_training_logs_what_the_u_net_logs(slots_run):
    rows = rows_of(slots_run)
    assert {"eval/loss", "eval/x_loss_t0.06", "train/loss", "sample/decoded"} <= set(rows[6])
    assert all(np.isfinite(row["train/loss"]) for step, row in rows.items() if step)
    assert json.loads((slots_run / "model.json").read_text())["model"]["name"] == "slots"


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_goes_on_bit_for_bit_and_on_another_mesh_to_rounding(
    slots_run, tiny_data, tmp_path, monkeypatch, optimizer
):
    def gone_on(name, **changes):
        workdir = shutil.copytree(run, tmp_path / name)
        shutil.rmtree(workdir / "checkpoints" / "6")
        train(slots_config(tiny_data, optimizer__name=optimizer, **changes), workdir)
        return Generator(workdir)

    run = slots_run
    if optimizer == "muon":
        run = tmp_path / "run"
        train(slots_config(tiny_data, optimizer__name="muon"), run)
    before = Generator(run)
    assert gone_on("again").params_hash == before.params_hash
    monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 32)
    other = gone_on("sharded", train__fsdp=2)
    for a, b in zip(*map(jax.tree.leaves, (other.params, before.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_crystals_of_a_formula(slots_run, tmp_path):
    generator = Generator(slots_run)
    samples = generator.generate(5, formula="NaCl,Li2O", num_formula_units="1", seed=3)
    made = [sample.crystal for sample in samples if sample.crystal is not None]
    assert made and all(sample.status in ("ok", "cell_degenerate", "atoms_overlap") for sample in samples)
    assert {crystal.formula for crystal in made} <= {"NaCl", "Li2O"}
    with pytest.raises(UserError, match="exact composition"):
        generator.generate(2, elements="Na,Cl")
    with pytest.raises(UserError, match=r"guidance_weight = 1|guidance_weight\) = 1"):
        generator.generate(2, formula="NaCl", guidance_weight=1.0)
    with pytest.raises(UserError, match=r"method.* = 'euler'.*'heun'"):
        generator.generate(2, formula="NaCl", method="euler")


def test_requests_of_all_sizes_come_in_their_order_whatever_is_sampled_together(slots_run):
    generator = Generator(slots_run)
    requests = [Request("formula", f"Li{n}", {3: n}) for n in (3, 1, 2, 2, 1, 3, 1, 2, 3, 3)]
    settings = generator.settings(batch_size=4)
    batches = list(generator.sample(requests, settings, {}, seed=0))
    assert [[s.index for s in batch] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    samples = [sample for batch in batches for sample in batch]
    assert [sample.request for sample in samples] == requests
    (rest,) = generator.sample(requests, settings, {}, seed=0, start=9)
    assert [sample.index for sample in rest] == [9] and rest[0].status == samples[9].status
    if rest[0].crystal is not None:
        np.testing.assert_array_equal(rest[0].crystal.frac_coords, samples[9].crystal.frac_coords)


def test_crystals_of_like_sizes_are_trained_on_together(tiny_data, tmp_path):
    train(slots_config(tiny_data, data__size_window=2, train__num_steps=4), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert all(np.isfinite(rows[step]["train/loss"]) for step in range(1, 5)) and np.isfinite(rows[3]["eval/loss"])
    with pytest.raises(UserError, match=r"data.size_window \(2 there, 0 now\)"):
        train(slots_config(tiny_data, train__num_steps=4), tmp_path / "run")
    with pytest.raises(UserError, match=r"config.data.size_window = -1"):
        train(slots_config(tiny_data, data__size_window=-1), tmp_path / "other")


def test_a_run_with_neighbours(tiny_data, tmp_path):
    train(slots_config(tiny_data, model__neighbours=2, model__remat=True, train__num_steps=3), tmp_path)
    assert all(np.isfinite(row["train/loss"]) for step, row in rows_of(tmp_path).items() if step)
    generator = Generator(tmp_path)
    assert generator.spec.max_atoms > 2
    samples = generator.generate(2, formula="Li2O", seed=3)
    assert {sample.crystal.formula for sample in samples if sample.crystal is not None} <= {"Li2O"}


def test_a_run_with_a_property(tiny_data, tmp_path):
    changes = {
        "data__properties": (PROPERTY,),
        "composition__width": 8,
        "train__num_steps": 3,
    }
    train(slots_config(tiny_data, **changes), tmp_path)
    assert all(np.isfinite(row["train/composition_loss"]) for step, row in rows_of(tmp_path).items() if step)
    generator = Generator(tmp_path)
    assert [p["name"] for p in generator.condition_schema] == [PROPERTY]
    free, low, again = (
        generator.generate(4, seed=3, condition=c, guidance_weight=1.0)
        for c in ({}, {PROPERTY: -9.0}, {PROPERTY: -9.0})
    )
    assert [s.request for s in low] == [s.request for s in again] and len(free) == 4
    of_one = (generator.generate(2, formula="Li2O", condition=c) for c in ({}, {PROPERTY: -9.0}))
    for a, b in zip(*of_one, strict=True):
        assert a.crystal is None or b.crystal is None or not np.array_equal(a.crystal.lengths, b.crystal.lengths)
    with pytest.raises(UserError, match="condition=density"):
        generator.generate(2, condition={"density": 1.0})


def test_an_export_gives_the_same_crystals(slots_run, tmp_path):
    from unimat_jax.export import export

    folder = export(slots_run, tmp_path / "model", licence="cc-by-4.0")
    card = (folder / "README.md").read_text()
    assert "slots" in card and "exact composition" in card
    ours, theirs = (Generator(path).generate(3, formula="NaCl", seed=1) for path in (slots_run, folder))
    for a, b in zip(ours, theirs, strict=True):
        assert a.status == b.status
        if a.crystal is not None:
            np.testing.assert_array_equal(a.crystal.frac_coords, b.crystal.frac_coords)


def test_compile_mode_has_its_shapes(slots_run):
    generator = Generator(slots_run)
    objective = generator._objective
    told = objective.abstract_conditions(0, 4)
    largest = Request("formula", "Li3O2", {3: 3, 8: 2})
    real = objective.conditions([largest] * 4, np.zeros(0), np.zeros(0)) | {"indices": np.arange(4, dtype=np.int32)}
    assert {k: (v.shape, v.dtype) for k, v in told.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
    program = sampler_program(objective, sharding.make_mesh(), **generator.config["sample"])
    x, lattice = jax.eval_shape(program, generator.params, jax.random.key(0), told)
    assert x.shape == (4, *generator.spec.grid, 3) and lattice.shape == (4, 6)

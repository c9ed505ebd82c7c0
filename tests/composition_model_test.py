"""The model of compositions: what it learns, what it draws with and without conditions, and a run from end to end."""

import dataclasses
import functools
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import TINY_MODEL, slots_config

from unimat_jax import default_config, models
from unimat_jax.assembly import create_composition, create_objective
from unimat_jax.composition_model import CompositionModel
from unimat_jax.errors import UserError
from unimat_jax.generator import Generator
from unimat_jax.periodic_table import SYMBOLS, Table, atomic_number
from unimat_jax.representation import UniMatSpec
from unimat_jax.requests import Request
from unimat_jax.run_directory import last_metrics
from unimat_jax.train import train

SPEC = UniMatSpec(max_atoms_per_element=3, max_atoms=5, table=Table.of_elements(["Li", "Na", "O", "S"]))
PLACES = SPEC.table.atomic_numbers.size
SETTINGS = {"width": 16, "depth": 1, "dropout_rate": 0.0}
DATA = {"LiO": 0.2, "Li2O": 0.3, "Na2O3": 0.1, "LiNaO": 0.1, "LiNaOS": 0.1, "Li2S": 0.1, "S": 0.05, "Na3S2": 0.05}


def table_of(formula):
    """Counts [P] of "Li2O"."""
    counts = np.zeros(PLACES, int)
    symbols = [s for s in ("Li", "Na", "O", "S") if s in formula]
    for symbol in symbols:
        after = formula[formula.index(symbol) + len(symbol) :][:1]
        counts[SPEC.table.place_of[atomic_number(symbol)]] = int(after) if after.isdigit() else 1
    return counts


def formula_of(counts):
    numbers = SPEC.table.atomic_numbers.ravel()
    parts = sorted((SYMBOLS[numbers[p]], int(n)) for p, n in enumerate(counts) if n)
    return "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in parts)


def slots_of(tables):
    """Flat slots [B, A] of counts [B, P]."""
    rows = [[level * PLACES + p for p in range(PLACES) for level in range(counts[p])] for counts in tables]
    return np.array([row + [SPEC.num_slots] * (SPEC.max_atoms - len(row)) for row in rows], np.int32)


@functools.cache
def learned():
    """(model, parameters) after some seconds of training on DATA."""
    model = CompositionModel(models.create_composition(3, 5, **SETTINGS), SPEC)
    params = model.network.init(jax.random.key(0), *model.init_arguments())["params"]
    slots = jnp.asarray(slots_of([table_of(f) for f in DATA]))
    shares = jnp.log(jnp.array(list(DATA.values())))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 500))

    def step(carry, key):
        params, state = carry
        data_key, loss_key = jax.random.split(key)
        batch = {"slot": slots[jax.random.categorical(data_key, shares, shape=(128,))]}
        loss, gradients = jax.value_and_grad(lambda p: model.losses(p, batch, loss_key, train=True).mean())(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), 500)))
    (params, _), _ = run((params, optimizer.init(params)))
    return model, params


@functools.cache
def wild():
    """(model, parameters) of a network that gives every composition another probability, in no order alike."""
    model = CompositionModel(models.create_composition(3, 5, **SETTINGS), SPEC)
    shapes = jax.eval_shape(lambda: model.network.init(jax.random.key(0), *model.init_arguments())["params"])
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, s.dtype), shapes)


def likely(probabilities, min_p):
    """[B, N] without what is less than min_p of a row's largest."""
    kept = np.where(probabilities < min_p * probabilities.max(1, keepdims=True), 0, probabilities)
    return kept / kept.sum(1, keepdims=True)


def probabilities(model, params, min_p=0.0):
    """{composition: probability} of all that can be, through every order of their elements."""
    sizes = np.exp(model.size_logits(params))[0]
    elements = np.flatnonzero(SPEC.table.atomic_numbers.ravel())
    subsets = [s for k in range(len(elements) + 1) for s in itertools.combinations(elements.tolist(), k)]
    next_of, count_of = jax.jit(model.element_logits), jax.jit(model.count_logits)
    found = {}
    for number in range(1, SPEC.max_atoms + 1):
        chosen = np.array([[p in s for p in range(PLACES)] for s in subsets])
        steps = likely(np.exp(next_of(params, chosen, jnp.full(len(subsets), number))), min_p)
        reached = {(): 1.0}
        for s in subsets[1:]:
            before = [(tuple(q for q in s if q != p), p) for p in s]
            reached[s] = sum(reached[b] * steps[subsets.index(b), p] for b, p in before)
        for s in subsets[1:]:
            whole = reached[s] * steps[subsets.index(s), PLACES] * sizes[number - 1]
            for counts in itertools.product(range(1, 4), repeat=len(s)):
                if sum(counts) == number:
                    table, probability = np.zeros((1, PLACES), int), whole
                    for p, n in zip(s, counts, strict=True):
                        one = jnp.asarray(np.isin(np.arange(PLACES), s)[None])
                        logits = count_of(params, one, jnp.asarray(table), jnp.array([number]), jnp.array([p]))
                        probability *= likely(np.exp(logits), min_p)[0, n - 1]
                        table[0, p] = n
                    found[formula_of(table[0])] = probability
    return found


SAMPLE = jax.jit(lambda params, key, arrays: wild()[0].sample(params, key, arrays))
SAMPLE_FREELY = jax.jit(lambda params, key, arrays: wild()[0].sample(params, key, arrays, proposals=1))


def drawn(model, params, request, number=4000, run=SAMPLE):
    arrays = model.conditions([request] * number) | {"indices": np.arange(number, dtype=np.int32)}
    tables = np.asarray(run(params, jax.random.key(2), arrays)).reshape(number, -1)
    return [formula_of(table) for table in tables]


def distance(samples, expected):
    """Total variation between samples and probabilities, which are made to add up to 1."""
    total, names = sum(expected.values()), set(samples) | set(expected)
    shares = {name: samples.count(name) / len(samples) for name in names}
    return sum(abs(shares[name] - expected.get(name, 0) / total) for name in names) / 2


@pytest.mark.parametrize("which", [wild, learned])
def test_probabilities_add_up_to_one(which):
    assert sum(probabilities(*which()).values()) == pytest.approx(1, abs=1e-4)


def test_the_benchmarks_likelihoods_are_these(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.compositions import log_likelihoods

    model, params = wild()
    exact = {name: p for name, p in probabilities(model, params).items() if content(name)[1] > 3}
    found = log_likelihoods(model, params, np.stack([table_of(name) for name in exact]))
    np.testing.assert_allclose(found, np.log(list(exact.values())), rtol=1e-4)


def test_it_learns_a_distribution():
    model, params = learned()
    samples = drawn(model, params, Request("none"), run=SAMPLE_FREELY)
    names = {formula_of(table_of(f)): share for f, share in DATA.items()}
    assert distance(samples, names) < 0.05
    assert distance(samples, probabilities(model, params)) < 0.04


def test_what_is_too_unlikely_is_never_drawn():
    model, params = wild()
    run = jax.jit(lambda params, key, arrays: model.sample(params, key, arrays, proposals=1, min_p=0.6))
    exact, cut = probabilities(model, params), probabilities(model, params, min_p=0.6)
    left = {formula for formula, probability in cut.items() if probability}
    assert len(left) < len(exact) / 2
    samples = drawn(model, params, Request("none"), run=run)
    assert set(samples) <= left and distance(samples, cut) < 0.06 < 0.3 < distance(samples, exact)


def test_the_unlikely_is_drawn_where_it_is_asked_for():
    model, params = learned()
    run = jax.jit(lambda params, key, arrays: model.sample(params, key, arrays, min_p=0.5))
    rare, _ = min(probabilities(model, params).items(), key=lambda item: item[1])
    elements, number = content(rare)
    numbers = tuple(sorted(SYMBOLS.index(symbol) for symbol in elements))
    asked = Request("chemical_system", "-".join(elements), elements=numbers, num_atoms=range(number, number + 1))
    assert all(content(name) == (elements, number) for name in drawn(model, params, asked, number=20, run=run))


def test_the_loss_is_the_negative_log_likelihood():
    model, params = learned()
    batch = {"slot": jnp.asarray(slots_of([table_of(f) for f in DATA]))}
    keys = jax.random.split(jax.random.key(3), 4000)
    losses = jax.jit(jax.vmap(lambda key: model.losses(params, batch, key, train=False)))(keys).mean(0)
    exact = probabilities(model, params)
    for formula, loss in zip(DATA, losses, strict=True):
        assert loss == pytest.approx(-math.log(exact[formula_of(table_of(formula))]), abs=0.15), formula
    average = sum(share * loss for share, loss in zip(DATA.values(), losses, strict=True))
    entropy = -sum(share * math.log(share) for share in DATA.values())
    assert entropy - 0.03 < average < entropy + 0.1


CONDITIONS = [
    (Request("elements", "Li,O", elements=(3, 8)), lambda e, n: e <= {"Li", "O"}),
    (Request("chemical_system", "Li-O", elements=(3, 8)), lambda e, n: e == {"Li", "O"}),
    (Request("contains", "Na", elements=(11,)), lambda e, n: "Na" in e),
    (Request("contains", "Na,S", elements=(11, 16)), lambda e, n: {"Na", "S"} <= e),
    (Request("none", num_atoms=range(2, 4)), lambda e, n: n in (2, 3)),
    (Request("contains", "O", elements=(8,), num_atoms=range(3, 4)), lambda e, n: "O" in e and n == 3),
]


def content(name):
    """({"Li", "O"}, 3) of "Li2O"."""
    counts = table_of(name)
    return {SYMBOLS[z] for z in SPEC.table.atomic_numbers.ravel()[counts > 0]}, counts.sum()


@pytest.mark.parametrize("which", [wild, learned])
@pytest.mark.parametrize(("request_", "holds"), CONDITIONS, ids=[r.asked for r, _ in CONDITIONS])
def test_conditions_hold_always_and_leave_the_rest_as_learned(which, request_, holds):
    """Of the wild network, whose orders are not alike, only that they hold."""
    model, params = which()
    samples = drawn(model, params, request_)
    assert all(holds(*content(name)) for name in samples)
    if which is learned:
        expected = {f: p for f, p in probabilities(model, params).items() if holds(*content(f))}
        assert distance(samples, expected) < 0.06


def test_it_learns_what_a_property_tells():
    """Lithium compounds have one value, the others another; half of the values are missing."""
    model = CompositionModel(models.create_composition(3, 5, **SETTINGS), SPEC, 1, property_drop_rate=0.3)
    params = model.network.init(jax.random.key(0), *model.init_arguments())["params"]
    slots = jnp.asarray(slots_of([table_of(f) for f in DATA]))
    values = jnp.array([[1.0 if "Li" in f else -1.0] for f in DATA])
    shares = jnp.log(jnp.array(list(DATA.values())))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))

    def step(carry, key):
        params, state = carry
        data_key, loss_key, missing_key = jax.random.split(key, 3)
        chosen = jax.random.categorical(data_key, shares, shape=(128,))
        missing = jax.random.bernoulli(missing_key, 0.5, (128, 1))
        batch = {"slot": slots[chosen], "properties": jnp.where(missing, jnp.nan, values[chosen])}
        gradients = jax.grad(lambda p: model.losses(p, batch, loss_key, train=True).mean())(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), 400)))
    (params, _), _ = run((params, optimizer.init(params)))
    sample = jax.jit(model.sample, static_argnames="proposals")

    def lithium(request, *condition):
        arrays = model.conditions([request] * 1000, *condition) | {"indices": np.arange(1000, dtype=np.int32)}
        tables = np.asarray(sample(params, jax.random.key(2), arrays)).reshape(1000, -1)
        return np.mean(["Li" in formula_of(table) for table in tables])

    free, given = Request("none"), np.ones(1)
    assert lithium(free, np.array([1.0]), given) > 0.95 and lithium(free, np.array([-1.0]), given) < 0.05
    assert lithium(free) == pytest.approx(0.8, abs=0.06) == lithium(free, np.array([-1.0]), np.zeros(1))
    with_oxygen = Request("contains", "O", elements=(8,))
    assert lithium(with_oxygen, np.array([1.0]), given) > 0.95


def test_a_draw_depends_on_its_index_alone():
    model, params = wild()
    requests = [Request("none"), Request("contains", "Na", elements=(11,)), Request("none")] * 20
    arrays = model.conditions(requests) | {"indices": np.arange(60, dtype=np.int32)}
    key = jax.random.key(0)
    together = np.asarray(SAMPLE(params, key, arrays))
    for i, sample in ((1, SAMPLE), (2, SAMPLE), (2, SAMPLE_FREELY), (57, SAMPLE_FREELY)):
        alone = {name: a[i : i + 1] for name, a in arrays.items()}
        np.testing.assert_array_equal(sample(params, key, alone)[0], together[i])
    assert len({table.tobytes() for table in together}) > 10


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("none", num_atoms=range(6, 9)), "--num_atoms=6-8: .*5 in all"),
        (Request("chemical_system", "Li", elements=(3,), num_atoms=range(4, 5)), "--chemical_system=Li --num_atoms=4"),
        (Request("contains", "Li,O", elements=(3, 8), num_atoms=range(1, 2)), "2 elements at least"),
    ],
)
def test_numbers_of_atoms_that_cannot_be(request_, said):
    model, _ = wild()
    with pytest.raises(UserError, match=said):
        model.conditions([request_])


def test_settings_that_cannot_be():
    assert create_composition({}, SPEC) is None and create_composition(SETTINGS | {"width": 0}, SPEC) is None
    for changes, said in (({"depth": 0}, "depth = 0"), ({"dropout_rate": 1.0}, "dropout_rate"), ({"x": 1}, "x")):
        with pytest.raises(UserError, match=f"config.composition.*{said}"):
            create_composition(SETTINGS | changes, SPEC)


# A run


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("what") / "run"
    train(slots_config(tiny_data, composition__width=16), workdir)
    return workdir


def test_what_then_where(run):
    samples = Generator(run).generate(6, seed=1)
    assert all(sample.status in ("ok", "cell_degenerate", "atoms_overlap") for sample in samples)
    assert all(sample.request.kind == "none" and sample.request.to_json() == {} for sample in samples)
    made = [sample for sample in samples if sample.crystal is not None]
    assert made
    for sample in made:
        assert Counter(sample.crystal.atomic_numbers.tolist()) == sample.request.counts
    again = Generator(run).generate(6, seed=1, batch_size=2)
    assert [s.request.counts for s in again] == [s.request.counts for s in samples]
    assert [s.request.counts for s in Generator(run).generate(6, seed=2)] != [s.request.counts for s in samples]
    likeliest = Generator(run).generate(6, seed=1, num_atoms="2", composition_min_p=0.999)
    assert len({tuple(sorted(s.request.counts.items())) for s in likeliest}) == 1
    with pytest.raises(UserError, match=r"composition_min_p = 1\.5"):
        Generator(run).generate(6, composition_min_p=1.5)


def test_conditions_reach_the_crystals(run):
    generator = Generator(run)
    for sample in generator.generate(4, contains="Na", num_atoms="2-4"):
        assert 11 in sample.request.counts and 2 <= sum(sample.request.counts.values()) <= 4
        assert sample.request.to_json() == {"contains": "Na", "num_atoms": "2-4"}
    assert all(set(s.request.counts) == {11, 17} for s in generator.generate(4, chemical_system="Na-Cl"))
    assert {s.request.label for s in generator.generate(2, formula="NaCl")} == {"NaCl"}
    with pytest.raises(UserError, match="--formula and --num_atoms=3 together"):
        generator.generate(1, formula="NaCl", num_atoms="3")
    with pytest.raises(UserError, match="--elements and --contains together"):
        generator.generate(1, elements="Na", contains="Na")
    with pytest.raises(UserError, match=r"--num_atoms=90: no such number"):
        generator.generate(1, num_atoms="90")


def test_the_other_network_learns_what_it_learns_without(run, tiny_data, tmp_path):
    train(slots_config(tiny_data), tmp_path / "alone")
    both, alone = Generator(run, ema=False), Generator(tmp_path / "alone", ema=False)
    assert set(both.params) - set(alone.params) == {"composition"}
    rest = {name: tree for name, tree in both.params.items() if name != "composition"}
    # No loss depends on these: a shift of all of an atom's attention logits, or of all atoms. Adam makes steps of the
    # rounding that is their gradient (a third of qkv's bias is the keys').
    idle = ("['block_0']['pair_bias']['bias']", "['block_0']['qkv']['bias']", "['coords_out']['bias']")
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), rest, alone.params)
    found = {jax.tree_util.keystr(path): largest for path, largest in jax.tree_util.tree_leaves_with_path(apart)}
    assert all(largest < (1e-3 if name in idle else 1e-6) for name, largest in found.items()), found
    metrics, before = last_metrics(run), last_metrics(tmp_path / "alone")
    assert metrics["train/loss"] == pytest.approx(before["train/loss"], rel=1e-4)
    assert metrics["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-4)
    assert metrics["eval/composition_loss"] > 1 and "eval/composition_loss" not in before
    with pytest.raises(UserError, match=r"no composition.*config.composition.width"):
        alone.generate(2)
    with pytest.raises(UserError, match=r"--num_atoms=2-3.*config.composition.width"):
        alone.generate(2, num_atoms="2-3")


def test_what_was_composed_is_to_a_u_net_as_a_formula():
    objective = create_objective({"name": "unet3d", **TINY_MODEL}, default_config.get_config().diffusion, SPEC)
    composed = Request("contains", "Na", {11: 2, 8: 1}, (11,), num_atoms=range(3, 4))
    asked = Request("formula", "Na2O", {11: 2, 8: 1})
    both = objective.conditions([composed, asked], np.zeros(0), np.zeros(0))
    assert both["counts_given"][0] == 1 and both["counts"][0].sum() == 3
    assert all((array[0] == array[1]).all() for array in both.values())
    with pytest.raises(UserError, match=r"--contains=Na --num_atoms=3.*config.composition.width"):
        objective.conditions([dataclasses.replace(composed, counts={})], np.zeros(0), np.zeros(0))


def test_a_run_goes_on_and_an_export_gives_the_same(run, tiny_data, tmp_path):
    from unimat_jax.export import export

    workdir = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(workdir / "checkpoints" / "6")
    train(slots_config(tiny_data, composition__width=16), workdir)
    assert Generator(workdir).params_hash == Generator(run).params_hash
    folder = export(run, tmp_path / "model", licence="cc-by-4.0")
    assert "exact composition, or what its model of compositions draws" in (folder / "README.md").read_text()
    assert json.loads((folder / "model.json").read_text())["composition"]["width"] == 16
    ours, theirs = (Generator(path).generate(3, seed=1) for path in (run, folder))
    assert [s.request.counts for s in ours] == [s.request.counts for s in theirs]

"""Configs and the training program's flags."""

from pathlib import Path

import jax
import numpy as np
import pytest

from unimat_jax import data, main, models
from unimat_jax.assembly import create_objective, init_arguments
from unimat_jax.cli import run_program
from unimat_jax.default_config import get_config
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import SYMBOLS
from unimat_jax.train_state import SCHEDULES

CONFIGS = sorted(path.stem for path in main.config_directory().glob("*.py") if path.stem != "__init__")
NEEDED = {"quickstart", "perov_5", "perov_5_slots", "carbon_24", "carbon_24_slots", "mp_20", "mp_20_slots", "unimat"}


def load(*arguments):
    return main.load_config(list(arguments))


def test_the_configs_that_are_promised():
    assert set(CONFIGS) >= NEEDED


def test_a_config_by_name_and_by_path_is_the_same(tmp_path):
    by_name, workdir, help_asked = load("--config=perov_5", "--workdir=runs/a")
    by_path, _, _ = load(f"--config={main.config_directory() / 'perov_5.py'}", "--workdir=runs/a")
    assert by_name.to_dict() == by_path.to_dict() and workdir == "runs/a" and not help_asked
    two_words, _, _ = load("--config", "perov_5", "--workdir", "runs/a")
    assert two_words.to_dict() == by_name.to_dict()
    copy = tmp_path / "perov_5.py"  # a file wins over a name
    copy.write_text(
        "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({'a': {'b': 1}})\n"
    )
    assert load(f"--config={copy}", "--workdir=w")[0].to_dict() == {"a": {"b": 1}}


def test_fields_change_from_the_command_line():
    """From the arguments given, whatever those of the process are."""
    config, _, _ = load(
        "--config=perov_5", "--workdir=w", "--config.train.num_steps=7", "--config.optimizer.learning_rate=1",
        "--config.data.table=full", "--config.model.channel_multipliers=(1,2,3)", "--config.data.random_axes=true",
        "--config.data.properties=('e_form',)",
    )  # fmt: skip
    assert config.train.num_steps == 7 and config.optimizer.learning_rate == 1.0 and config.data.table == "full"
    assert config.model.channel_multipliers == (1, 2, 3) and config.data.random_axes is True
    assert config.data.properties == ("e_form",)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config=perov_5", "--workdir=w", "--config.train.num_step=7"], ["num_step"]),
        (["--config=perov_5", "--workdir=w", "--config.trian.num_steps=7"], ["trian"]),
        (["--config=perov_5", "--workdir=w", "--config.train.num_steps=seven"], ["num_steps", "seven"]),
        (["--config=perov_5", "--workdir=w", "--config.train.num_steps=1.5"], ["num_steps", "1.5"]),
        (["--config=perov_5", "--workdir=w", "--config.optimizer.learning_rate=fast"], ["learning_rate", "fast"]),
        (["--config=perov_5"], ["--workdir is missing"]),
        (["--workdir=w"], ["--config is missing"]),
        ([], ["--config is missing"]),
        (["--config=perov5", "--workdir=w"], ["--config=perov5", "perov_5", "quickstart"]),
        (["--config=not/there.py", "--workdir=w"], ["--config=not/there.py"]),
        (["--config=perov_5", "--workdir=w", "--steps=3"], ["steps"]),
        (["--config=perov_5", "--workdir=w", "extra"], ["'extra' is no flag"]),
        (["--config"], ["config"]),
    ],
)
def test_what_is_wrong_is_one_line(arguments, named, capsys):
    assert run_program(main.main, arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and said.err.startswith("error: ")
    assert all(word in said.err for word in named)


def test_a_config_file_with_a_mistake(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def get_config(:\n")
    assert run_program(main.main, [f"--config={tmp_path / 'bad.py'}", "--workdir=w"]) == 2
    assert "bad.py" in capsys.readouterr().err


def test_help(capsys):
    assert main.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in CONFIGS) and "--workdir=DIR" in told


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_the_defaults_fields_and_is_locked(name):
    config, _, _ = load(f"--config={name}", "--workdir=w")
    with pytest.raises((AttributeError, KeyError)):
        config.train.num_stepz = 1
    known, found = get_config(config.model.name), config
    for section in known:
        if section != "data":
            assert set(found[section]) == set(known[section]), section
    assert set(found) == set(known) and set(found.data) == set(known.data)
    assert found.optimizer.schedule in SCHEDULES


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_its_command_cost_and_result(name):
    text = (main.config_directory() / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert f"configs/{name}.py" in docstring or f"unimat {name}" in docstring or f"--config={name}" in docstring
    assert "result" in docstring.lower() and "MEASURED" not in docstring


def statistics(elements, largest):
    """As prepare would write them for a data set of these elements."""
    moments = {form: {"mean": [0.1] * size, "std": [0.5] * size} for form, size in data.LATTICE_FORMS.items()}
    return {"elements": dict.fromkeys(elements, 1), "lattice": moments, "max_atoms": 20, "coordinate_radius": 9.0,
            "max_atoms_per_element": largest, "properties": {}}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_its_network(name):
    config, _, _ = load(f"--config={name}", "--workdir=w")
    elements = ["C"] if config.data.dataset == "carbon_24" else SYMBOLS[1:95]
    found = statistics(elements, 24 if config.data.dataset == "carbon_24" else 3)
    spec = data.make_spec(
        found, max_atoms_per_element=config.data.max_atoms_per_element or None, table=config.data.table,
        coordinates=config.data.coordinates, lattice_form=config.data.lattice_form,
    )  # fmt: skip
    network = models.create(**config.model)
    arguments = init_arguments(spec, len(config.data.properties), config.model.name)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments)["params"])
    predictions = jax.eval_shape(lambda p: network.apply({"params": p}, *arguments), shapes)
    expected = [arguments[0].shape, (1, spec.lattice_size)] * (2 if config.model.get("draft_after") else 1)
    assert [prediction.shape for prediction in predictions] == expected
    number = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert number > 3e8 if name == "unimat" else number > 1e4
    assert create_objective(config.model, config.diffusion, spec).lattice_weight > 0


def test_the_papers_values():
    """Appendix 6, table 4, and section 2.2."""
    config, _, _ = load("--config=unimat", "--workdir=w")
    assert (config.model.base_channels, config.model.channel_multipliers, config.model.num_res_blocks) == (
        256,
        (1, 2, 4),
        3,
    )
    assert (config.model.attention_resolutions, config.model.head_dim, config.model.dropout_rate) == (
        (1, 3, 9),
        64,
        0.1,
    )
    assert (config.optimizer.learning_rate, config.optimizer.b1, config.optimizer.b2) == (1e-4, 0.9, 0.99)
    assert (config.optimizer.ema_decay, config.train.batch_size, config.train.num_steps) == (0.9999, 512, 200_000)
    assert (config.diffusion.logsnr_min, config.diffusion.logsnr_max, config.diffusion.prediction_type) == (
        -20,
        20,
        "eps",
    )
    assert (config.sample.num_steps, config.sample.log_variance_interpolation) == (256, 0.1)


def test_configs_are_found_in_a_wheel_and_in_a_clone():
    assert main.config_directory() == Path(main.__file__).parents[1] / "configs"  # here: a clone
    assert main.config_path("unimat") == str(main.config_directory() / "unimat.py")
    with pytest.raises(UserError, match="the names are carbon_24, carbon_24_slots, mp_20"):
        main.config_path("nothing")

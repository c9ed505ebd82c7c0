"""Minutes on a laptop CPU: Materials Project crystals with at most 5 atoms, of those that come with the package.

unimat quickstart            (prepares the data, trains this config, generates)

Cost and result: README, "Quickstart".
"""

from unimat_jax import default_config
from unimat_jax.periodic_table import ROW, SYMBOLS


def get_config():
    config = default_config.get_config()
    config.data.dataset = "starter"
    config.data.prepare.max_atoms = 5
    config.data.prepare.max_atoms_per_element = 3
    # Li to Rn without the f block: 5 rows of the table in place of 9, in half of the time a step.
    config.data.prepare.elements = [s for s, row in zip(SYMBOLS, ROW, strict=True) if 2 <= row + 1 <= 6]
    config.data.table = "data"
    config.data.random_shift = False  # the crystals come with an atom at the origin: one thing less to learn
    config.data.origin_shift = 0.25
    config.model.base_channels = 16
    config.model.channel_multipliers = (1, 4, 8)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (3, 9)
    config.model.attention = "full"
    config.model.attended_sites = 8  # a crystal has at most 5 atoms
    config.model.coordinate_frequencies = 3
    config.model.head_dim = 32
    config.model.dropout_rate = 0.0
    config.model.convolution = "plane"
    config.diffusion.prediction_type = "v"
    config.diffusion.null_weight = 0.1
    config.diffusion.counts_share = 0.8
    config.diffusion.elements_share = 0.1
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.995
    config.train.num_steps = 1_200
    config.train.batch_size = 64
    config.train.log_every = 50
    config.train.checkpoint_every = 200
    config.train.eval_every = 600
    config.train.eval_examples = 64
    config.sample.num_steps = 100
    return config

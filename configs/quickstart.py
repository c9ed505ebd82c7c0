"""Minutes on a laptop CPU: Materials Project crystals with at most 5 atoms, of those that come with the package.

unimat quickstart            (prepares the data, trains this config, generates)

Cost and result: README, "Quickstart".
"""

from unimat_jax import default_config


def get_config():
    config = default_config.get_config("slots")
    config.data.dataset = "starter"
    config.data.prepare.max_atoms = 5
    config.data.prepare.max_atoms_per_element = 3
    config.data.table = "data"
    config.data.random_shift = False  # the network sees differences of coordinates alone
    config.data.shuffle_atoms = False  # and does not know one atom of an element from another
    config.model.width = 96
    config.model.depth = 4
    config.model.heads = 6
    config.model.pair_width = 32
    config.composition.width = 32  # for samples without a formula
    config.diffusion.sigma_min = 0.005
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.995
    config.train.num_steps = 2_000
    config.train.batch_size = 128
    config.train.log_every = 50
    config.train.checkpoint_every = 250
    config.train.eval_every = 1_000
    config.train.eval_examples = 64
    config.sample.method = "mean"
    config.sample.num_steps = 50
    config.sample.mean_below = 0.4  # the likeliest structure in place of any
    config.sample.corrector_steps = 1
    config.sample.time_power = 0.5
    return config

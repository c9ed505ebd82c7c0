"""Carbon-24 on a laptop, without the null sites: a transformer over 6 to 24 atoms of carbon.

unimat prepare --dataset=carbon_24 --source=DIR_WITH_CDVAE_CSV_FILES --data_dir=data
unimat train --config=carbon_24_slots --workdir=runs/carbon_24_slots

Cost: two hours of an Intel Xeon, 36 minutes on one core and 85 on two. Result (2.1 M weights): 20 samples for each of
400 validation crystals, seed 0: match rate 86.3 %, RMSE 0.211 (benchmarks/README.md, "Carbon-24 by slots").
"""

from unimat_jax import default_config


def get_config():
    config = default_config.get_config("slots")
    config.data.dataset = "carbon_24"
    config.data.table = "C"
    config.data.random_shift = False  # the network sees differences of coordinates alone
    config.data.shuffle_atoms = False  # and does not know one atom from another
    config.data.size_window = 16  # 9 atoms on average, 24 at most
    config.model.directions = True
    config.model.draft_after = 3
    config.model.dropout_rate = 0.05
    config.composition.width = 16  # how many atoms, for samples without a formula
    config.diffusion.sigma_min = 0.005
    config.diffusion.focus_share = 0.4  # most of the times where it is decided which crystal comes out
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 22_000
    config.train.batch_size = 128
    config.train.checkpoint_every = 500
    config.train.eval_every = 1_000
    config.train.eval_examples = 512
    config.sample.method = "mean"
    config.sample.num_steps = 150
    config.sample.mean_below = 0.06  # the densities of the data; above it more are exact, and too many are diamond
    config.sample.noise_below = 0.3
    config.sample.corrector_steps = 12
    config.sample.corrector_below = 0.05  # they settle what is there; above it they would turn it into diamond
    config.sample.time_power = 0.5
    config.sample.batch_size = 128
    return config

"""MP-20 without the null sites: a transformer over 1 to 20 atoms of 89 elements, compositions learned beside it.

unimat prepare --dataset=mp_20 --source=DIR_WITH_CDVAE_CSV_FILES --data_dir=data
unimat train --config=mp_20_slots --workdir=runs/mp_20_slots

Cost and result (on a part of the training split): 127 minutes on one of two cores, match rate 36.8 %, RMSE 0.110 for
1,000 validation compositions (benchmarks/README.md, "MP-20 by slots").
"""

from unimat_jax import default_config


def get_config():
    config = default_config.get_config("slots")
    config.data.dataset = "mp_20"
    config.data.random_shift = False  # the network sees differences of coordinates alone
    config.data.shuffle_atoms = False  # and does not know one atom of an element from another
    config.data.size_window = 16  # 11 atoms on average, 20 at most
    config.model.directions = True
    config.model.draft_after = 3
    config.model.dropout_rate = 0.1
    config.composition.width = 128
    config.composition.dropout_rate = 0.3  # with 0.1 it learns the training split's compositions by heart
    config.diffusion.sigma_min = 0.005
    config.diffusion.focus_share = 0.4  # most of the times where it is decided which crystal comes out
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 24_000
    config.train.batch_size = 128
    config.train.checkpoint_every = 500
    config.train.eval_every = 500
    config.train.eval_examples = 1_024
    config.sample.method = "mean"
    config.sample.num_steps = 50
    config.sample.mean_below = 0.4
    config.sample.noise_below = 0.3  # without any, atoms of an element that meet stay together
    config.sample.corrector_steps = 3
    config.sample.time_power = 0.5
    config.sample.batch_size = 128
    return config

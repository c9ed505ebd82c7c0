"""Perov-5 on a laptop, without the null sites: a transformer over the atoms turns compositions into perovskites.

unimat prepare --dataset=perov_5 --source=DIR_WITH_CDVAE_CSV_FILES --data_dir=data
unimat train --config=perov_5_slots --workdir=runs/perov_5_slots

Cost: 56 minutes on one of two cores, the other at work too. Result (2.1 M weights), one sample for each of the 3,787
validation compositions, seed 0: match rate 51.5 %, RMSE 0.0602, no failure (README, "Measured").
Compositions are learned beside it, in 3,000 steps as well as can be told (benchmarks/README.md, "compositions").
"""

from unimat_jax import default_config


def get_config():
    config = default_config.get_config("slots")
    config.data.dataset = "perov_5"
    config.data.table = "data"  # 6 x 17 of 9 x 18
    config.data.random_shift = False  # the network sees differences of coordinates alone
    config.data.shuffle_atoms = False  # and does not know one atom of an element from another
    config.data.half_turned = True  # displaced atoms are on one side, which makes one structure likeliest, not two
    config.model.dropout_rate = 0.1
    config.diffusion.sigma_min = 0.005
    config.composition.width = 64  # for samples without a formula
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.1
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 9_500
    config.train.batch_size = 256
    config.train.checkpoint_every = 500
    config.train.eval_every = 1_000
    config.train.eval_examples = 1_024
    config.sample.method = "mean"
    config.sample.num_steps = 50
    config.sample.mean_below = 0.5  # the likeliest structure in place of any: without noise from the start
    config.sample.corrector_steps = 3
    config.sample.time_power = 0.5  # which atom sits where is settled at noise of 0.1 to 0.3 of the cell
    config.sample.batch_size = 256
    config.sample.composition_min_p = 0.01  # else 25 in 10,000 compositions are no perovskites', by their nonmetals
    return config

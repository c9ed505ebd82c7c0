"""Carbon-24: one element, so the table is 1 x 1 and L is 24.

unimat prepare --dataset=carbon_24 --source=DIR_WITH_CDVAE_CSV_FILES --data_dir=data
python -m unimat_jax.main --config=configs/carbon_24.py --workdir=runs/carbon_24

Cost and result: not run.
"""

from unimat_jax import default_config


def get_config():
    config = default_config.get_config()
    config.data.dataset = "carbon_24"
    config.data.table = "C"
    config.model.base_channels = 128
    config.model.channel_multipliers = (1,)  # nothing to shrink
    config.model.num_res_blocks = 4
    config.model.attention_resolutions = (1,)
    config.model.head_dim = 32
    config.model.place_embedding = False  # there is one place
    config.model.coordinate_frequencies = 4
    config.diffusion.prediction_type = "v"
    config.diffusion.null_weight = 0.3
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.999
    config.train.num_steps = 50_000
    config.train.batch_size = 128
    return config

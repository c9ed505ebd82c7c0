"""MP-20 on one GPU: the full table at a width that fits.

unimat prepare --dataset=mp_20 --source=DIR_WITH_CDVAE_CSV_FILES --data_dir=data
python -m unimat_jax.main --config=configs/mp_20.py --workdir=runs/mp_20

Cost and result: not run. The paper's size is configs/unimat.py.
"""

from unimat_jax import default_config


def get_config():
    config = default_config.get_config()
    config.data.dataset = "mp_20"
    config.model.base_channels = 64  # the paper's "small"
    config.model.attention_resolutions = (3, 9)
    config.diffusion.null_weight = 0.1
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.9999
    config.train.batch_size = 256
    config.train.num_steps = 200_000
    return config

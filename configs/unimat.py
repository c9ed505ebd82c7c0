"""The paper's model and training (appendix 6, table 4; section 2.2), value by value.

python -m unimat_jax.main --config=configs/unimat.py --workdir=runs/unimat

--config=configs/unimat.py:small or :medium is the same with 64 or 128 base channels, the paper's ablation of the size.
Cost in the paper: 200,000 steps of 512 crystals on 32 TPU v4 chips. Result: not run.
"""

from unimat_jax import default_config
from unimat_jax.errors import UserError

BASE_CHANNELS = {"small": 64, "medium": 128, "large": 256}
"""Sizes of the paper's ablation on MP-20 ("Figure 4"); large is its model."""


def get_config(size: str = "large"):
    if size not in BASE_CHANNELS:
        raise UserError(f"--config=unimat:{size}: choose from {', '.join(BASE_CHANNELS)}")
    config = default_config.get_config()
    config.data.dataset = "mp_20"
    config.data.max_atoms_per_element = 20  # MP-20's crystals have at most 20 atoms, some of one element
    config.model.base_channels = BASE_CHANNELS[size]
    config.model.channel_multipliers = (1, 2, 4)
    config.model.num_res_blocks = 3  # "blocks per resolution"
    config.model.attention_resolutions = (1, 3, 9)
    config.model.head_dim = 64
    config.model.dropout_rate = 0.1
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.99
    config.optimizer.weight_decay = 0.0
    config.optimizer.ema_decay = 0.9999
    config.diffusion.prediction_type = "eps"
    config.diffusion.logsnr_min, config.diffusion.logsnr_max = -20.0, 20.0
    config.diffusion.null_weight = 1.0  # a plain mean over all sites
    config.train.num_steps = 200_000
    config.train.batch_size = 512
    config.sample.num_steps = 256
    config.sample.log_variance_interpolation = 0.1
    return config

"""Every config field once, with its unit and meaning. Files in configs/ start from here and set what differs.

Values marked (paper) are those of the paper's appendix 6; the others are ours (docs/deviations.md).
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def get_config(model: str = "unet3d") -> Any:  # a ConfigDict; its fields are unknown to type checkers
    """The fields of a kind of model, which has its own sections `model` and `diffusion`."""
    config: Any = ConfigDict()

    config.data = ConfigDict()
    config.data.dataset = "crystals"  # a name that `unimat prepare --dataset` takes
    config.data.data_dir = "data"  # where `unimat prepare --data_dir` put it
    config.data.table = "full"  # "full" (9 x 18, paper), "data" (rows and columns with elements), or "C", "Li,O"
    config.data.max_atoms_per_element = 0  # L; 0 takes the training set's largest count
    config.data.coordinates = "fractional"  # or "cartesian"
    config.data.lattice_form = "parameters"  # "log_metric"; "matrix" goes with Cartesian coordinates
    config.data.properties = ()  # columns to condition on, as ("band_gap",)
    config.data.shuffle_atoms = True  # augmentation: order of the atoms of an element (paper)
    config.data.random_shift = True  # augmentation: origin, uniform in the cell
    config.data.origin_shift = 0.0  # fraction of each axis added to all coordinates: keeps sites off the wrap-around
    config.data.random_axes = False  # augmentation: order of the axes; breaks a <= b <= c of a Niggli cell
    config.data.half_turned = False  # each crystal turned so that its polarity points one way, where its cell allows it
    config.data.max_train_examples = 0  # train on so many crystals of the training split (learning curves); 0: all
    config.data.size_window = 0  # K: each K batches share out their crystals by size, with less padding; slots only
    config.data.num_threads = 2  # that read and augment
    config.data.prefetch = 8  # batches made ahead
    config.data.prepare = ConfigDict()  # options of data_prep.prepare.prepare for the quickstart, as max_atoms

    config.model, config.diffusion = MODELS[model]()

    config.composition = ConfigDict()  # a model of compositions beside it: unconditional samples are what, then where
    config.composition.width = 0  # of its layers; 0: none
    config.composition.depth = 2  # residual layers
    config.composition.dropout_rate = 0.1

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # (paper); "muon": for slots, the matrices of its blocks by Muon, the rest by Adam
    config.optimizer.learning_rate = 1e-4  # (paper)
    config.optimizer.schedule = "constant"  # "cosine", "linear"
    config.optimizer.warmup_steps = 1000
    config.optimizer.final_factor = 0.02  # of the learning rate, where the schedule ends
    config.optimizer.b1 = 0.9  # (paper)
    config.optimizer.b2 = 0.99  # (paper)
    config.optimizer.weight_decay = 0.0  # (paper)
    config.optimizer.grad_clip = 1.0  # global norm; 0 is off
    config.optimizer.ema_decay = 0.9999  # (paper), warmed up

    config.train = ConfigDict()
    config.train.num_steps = 200_000  # (paper)
    config.train.batch_size = 512  # global (paper)
    config.train.microbatches = 1  # parts of a batch that run one after another, their gradients added: saves memory
    config.train.compilation_cache = "auto"  # compiled programs are kept there; "auto": ~/.cache/unimat_jax, "": off
    config.train.seed = 0
    config.train.fsdp = 1  # devices that share one copy of the parameters
    config.train.log_every = 50
    config.train.checkpoint_every = 1000
    config.train.eval_every = 1000  # validation loss
    config.train.eval_examples = 512
    config.train.sample_every = 0  # sampled validity check; 0 is off
    config.train.sample_examples = 32
    config.train.keep_checkpoints = 2  # latest ones kept, besides the best
    config.train.max_loss_ratio = 10.0  # a loss over so many times the median of the last 64 is a bad step; 0: never
    config.train.max_rollbacks = 3  # times that a run goes back to the same checkpoint after a bad step
    config.train.log_batches = False  # write the examples of every step into batches_PROCESS.jsonl

    config.sample = ConfigDict()
    config.sample.method = "ancestral"  # (paper); "ddim"; slots: also "mean", "heun"
    config.sample.num_steps = 256  # (paper)
    config.sample.log_variance_interpolation = 0.1  # (paper)
    config.sample.guidance_weight = 0.0  # the paper's w, on properties
    config.sample.batch_size = 64
    config.sample.time_power = 1.0  # times are even, to this power: above 1 closer near the data
    config.sample.mean_below = 0.2  # slots, "mean": little noise is added where it is below this share of the cell:
    config.sample.noise_below = 0.0  # this share of it
    config.sample.corrector_steps = 0  # slots: Langevin steps after each step, an evaluation each,
    config.sample.corrector_below = 1.0  # where the noise is below this share of the cell
    config.sample.closest_ratio = 0.65  # slots: of the sum of their covalent radii two atoms are kept apart; 0: not
    config.sample.composition_min_p = 0.0  # elements less likely than this share of the likeliest are not drawn
    return config


def _unet3d() -> tuple[Any, Any]:
    model, diffusion = ConfigDict(), ConfigDict()
    model.name = "unet3d"
    model.base_channels = 256  # (paper)
    model.channel_multipliers = (1, 2, 4)  # (paper)
    model.num_res_blocks = 3  # per level (paper)
    model.attention_resolutions = (1, 3, 9)  # down-sampling factors of H x W with attention (paper)
    model.head_dim = 64  # (paper)
    model.dropout_rate = 0.1  # (paper)
    model.place_embedding = True  # a learned vector for each place of the table
    model.convolution = "axial"  # 1 x 3 x 3 plus 3 x 1 x 1; "full": 3 x 3 x 3; "plane": 1 x 3 x 3
    model.attention = "factorised"  # H W, then L; "full": all sites at once
    model.attention_kernel = "xla"  # "cudnn": fused, NVIDIA GPUs in bfloat16 (not measured yet)
    model.coordinate_frequencies = 0  # K > 0: sin and cos of coordinates, 1, 2, ... 2^(K-1) waves, as input
    model.attended_sites = 0  # K > 0: attention among the K likeliest sites, told of coordinate differences
    model.site_width = 128  # of its tokens
    model.dtype = "float32"  # of activations and products; "bfloat16": parameters, norms, softmax, loss stay float32
    model.scan_blocks = False  # equal blocks in a loop: less to compile, slow on CPU; parameters stay the same
    model.remat = False  # compute each block again for its gradient: much less memory, a third more work

    diffusion.prediction_type = "eps"  # (paper); "x0", "v"
    diffusion.logsnr_min = -20.0  # (paper)
    diffusion.logsnr_max = 20.0  # (paper)
    diffusion.null_weight = 1.0  # loss weight of a null site against an occupied one; 1: plain mean (paper)
    diffusion.lattice_weight = 1.0  # loss weight of the six lattice numbers' mean against the sites' mean
    diffusion.counts_share = 0.5  # share of training examples conditioned on exact counts
    diffusion.elements_share = 0.25  # ... on their elements only; the rest on nothing
    diffusion.property_drop_rate = 0.2  # each property is dropped at this rate
    return model, diffusion


def _slots() -> tuple[Any, Any]:
    model, diffusion = ConfigDict(), ConfigDict()
    model.name = "slots"
    model.width = 128  # of a token
    model.depth = 6  # blocks
    model.heads = 8
    model.pair_width = 64  # of what a pair's geometry becomes
    model.mlp_factor = 2  # width of the hidden layer of a token, in widths
    model.dropout_rate = 0.0
    model.distances = True  # pair geometry: distances in the noisy cell (Angstrom), beside fractional differences
    model.neighbours = 0  # K > 0: each atom attends to its K nearest and the mean of all; 0: to all (dear in big cells)
    model.directions = False  # ... and where the other atom lies along each axis, in Angstrom; for larger cells
    model.draft_after = 0  # D > 0: after D blocks it predicts the crystal, and the others see that one's geometry too
    model.dtype = "float32"  # as the U-Net's
    model.remat = False  # as the U-Net's

    diffusion.sigma_min = 0.002  # noise of fractional coordinates at t = 0
    diffusion.sigma_max = 0.5  # ... at t = 1: as good as uniform in the cell
    diffusion.logsnr_min = -12.0  # of the lattice
    diffusion.logsnr_max = 12.0
    diffusion.lattice_weight = 1.0  # loss weight of the six lattice numbers' mean against the coordinates' mean
    diffusion.focus_share = 0.0  # of the times that it is trained at lie between focus_from and focus_to
    diffusion.focus_from = 0.5
    diffusion.focus_to = 0.9
    diffusion.property_drop_rate = 0.2  # as the U-Net's; the model of compositions has it too
    return model, diffusion


MODELS = {"unet3d": _unet3d, "slots": _slots}

"""The peer's half of benchmarks/peer_unet3d.py: imagen-pytorch's Unet3D, run by the interpreter that has it.

Started by that benchmark, not by hand: it answers requests on its standard input, and is idle between them. At module
level it needs the standard library alone, since it runs where this package is not installed.
"""
# Torch lives in the peer's environment, not in ours.
# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

SETTINGS = {
    "dim": 64, "dim_mults": (1, 2, 4), "num_resnet_blocks": 3, "layer_attns": (False, True, True),
    "layer_cross_attns": (False, True, True), "channels": 3, "cond_on_text": False,
}  # fmt: skip
"""As in the public PyTorch UniMat of Dismai-Bench, whose `Imagen(condition_on_text=False)` switches text off."""
GROUPS = ("down 0", "down 1", "down 2", "middle", "up 2", "up 1", "up 0", "other")
"""Parts of a U-Net by which parameters and operations are told; level 0 is the finest."""
LOGSNR = 20.0
"""The schedule runs from this to its negative, as ours (paper, appendix 6)."""


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answers each line {"do": name, "with": {...}} of standard input by a line {"value", "waiting_cpu_share"}, until
    the input ends. What handlers print goes to standard error. `waiting_cpu_share`: processor time of this process over
    time since its last answer, which tells whether it was idle while the other side ran."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cpu, clock = time.process_time(), time.perf_counter()
    for line in sys.stdin:
        share = (time.process_time() - cpu) / (time.perf_counter() - clock)
        request = json.loads(line)
        value = handlers[request["do"]](**request.get("with", {}))
        cpu, clock = time.process_time(), time.perf_counter()
        print(json.dumps({"value": value, "waiting_cpu_share": share}), file=answers, flush=True)


def timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def grouped(amounts: Iterable[tuple[str, float]], group: Callable[[str], str]) -> dict[str, float]:
    """Sums of (name, amount) by the group that each name belongs to; all of GROUPS, in their order."""
    sums: dict[str, float] = dict.fromkeys(GROUPS, 0)
    for name, amount in amounts:
        sums[group(name)] += amount
    return sums


def group_of(name: str) -> str:
    """The group of a module or parameter of the peer; its `ups` start at the coarsest level."""
    match = re.match(r"(downs|ups)\.(\d+)", name)
    if match:
        level = int(match[2])
        return f"down {level}" if match[1] == "downs" else f"up {len(SETTINGS['dim_mults']) - 1 - level}"
    return "middle" if name.startswith("mid_") else "other"


def convolution_flops(
    x_shape: Sequence[int], w_shape: Sequence[int], bias: Any, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, *rest: Any, out_shape: Sequence[int] = (), **others: Any,
) -> int:  # fmt: skip
    """2 operations a multiply-add without those that meet padding, the rule of `unimat_jax.flops`; torch's own formula
    counts them. For `FlopCounterMode(custom_mapping=)`."""
    if transposed:
        raise ValueError("convolution_flops: the peer's network has no transposed convolution")
    pairs = 1
    for axis, (size, taps, out) in enumerate(zip(x_shape[2:], w_shape[2:], out_shape[2:], strict=True)):
        places = (i * stride[axis] + k * dilation[axis] - padding[axis] for i in range(out) for k in range(taps))
        pairs *= sum(0 <= place < size for place in places)
    return 2 * x_shape[0] * w_shape[0] * w_shape[1] * pairs


def convolution_backward_flops(
    gradient_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], bias: Any, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Any, groups: int,
    output_mask: Sequence[bool], out_shape: Any = (), **others: Any,
) -> int:  # fmt: skip
    """The gradients of input and kernel each cost what the forward pass does."""
    once = convolution_flops(x_shape, w_shape, bias, stride, padding, dilation, transposed, out_shape=gradient_shape)
    return once * sum(map(bool, output_mask[:2]))


def make_network() -> Any:
    """Unet3D. Its module asks for a T5 text encoder's width at import, and would download its config."""
    import transformers

    def config(*names: str, **settings: Any) -> Any:
        return transformers.T5Config(d_model=64)

    transformers.T5Config.from_pretrained = config
    from imagen_pytorch import Unet3D

    return Unet3D(**SETTINGS)


class Peer:
    """What the benchmark asks of the peer. `x_0` [B, L, H, W, 3] is padded with `null` to `plane` (H, W)."""

    def __init__(self):
        self.network: Any = None

    def setup(self, x_0: list[Any], null: float, plane: Sequence[int], threads: int, seed: int) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        x = torch.tensor(x_0, dtype=torch.float32).permute(0, 4, 1, 2, 3)
        h, w = x.shape[-2:]
        self.x_0 = torch.nn.functional.pad(x, (0, plane[1] - w, 0, plane[0] - h), value=null).contiguous()
        self.network = make_network()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4, betas=(0.9, 0.99))
        sizes = [(name, p.numel()) for name, p in self.network.named_parameters()]
        kinds = [(name, type(module).__name__) for name, module in self.network.named_modules()]
        gradient = self._loss_gradient()
        return {
            "settings": {**SETTINGS, "input": list(self.x_0.shape), "dtype": str(self.x_0.dtype)},
            "num_params": sum(number for _, number in sizes),
            "num_params_without_gradient": sum(
                p.numel() for p, given in zip(self.network.parameters(), gradient, strict=True) if not given
            ),
            "params": grouped(sizes, group_of),
            "res_blocks": grouped([(name, kind == "ResnetBlock") for name, kind in kinds], group_of),
            "attentions": grouped([(name, kind == "Attention") for name, kind in kinds], group_of),
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("imagen-pytorch", "torch", "transformers")},
            },
        }

    def _loss(self) -> Any:
        """Mean square error of the predicted noise at uniform times."""
        import torch

        logsnr = cosine_logsnr(torch.rand(len(self.x_0)))
        alpha, sigma = alpha_sigma(logsnr[:, None, None, None, None])
        eps = torch.randn_like(self.x_0)
        return torch.nn.functional.mse_loss(self.network(alpha * self.x_0 + sigma * eps, logsnr), eps)

    def _loss_gradient(self) -> list[bool]:
        """Which parameters the loss reaches; runs the first, slower, pass."""
        self._loss().backward()
        return [p.grad is not None for p in self.network.parameters()]

    def flops(self) -> dict[str, Any]:
        """Operations of one forward pass by GROUPS, and of one with its gradient; `..._with_padding`: torch's rule.

        The gradient is told in one sum, since torch's counter mixes up whose modules it runs in.
        """
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        aten = torch.ops.aten
        formulas = {aten.convolution: convolution_flops, aten.convolution_backward: convolution_backward_flops}
        found: dict[str, Any] = {}
        for ending, mapping in (("", formulas), ("_with_padding", None)):
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
                self._loss()
            found["forward" + ending] = by_group(counter.get_flop_counts())
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                self._loss().backward()
            found["train_step" + ending] = counter.get_total_flops()
        return found

    def matmul(self, size: int, repeats: int) -> float:
        """The best FLOP/s of `repeats` float32 products of [size, size] matrices."""
        import torch

        a, b = torch.randn(size, size), torch.randn(size, size)
        out = torch.empty(size, size)
        return 2 * size**3 / min(timed(lambda: torch.mm(a, b, out=out)) for _ in range(repeats))

    def train(self) -> float:
        """Seconds of one step."""

        def step():
            self.optimizer.zero_grad()
            loss = self._loss()
            loss.backward()
            self.optimizer.step()
            loss.item()

        self.network.train()
        return timed(step)

    def sample(self, num_steps: int) -> float:
        """Seconds of ancestral sampling (the posterior's variance) over `num_steps` evenly spaced times."""
        import torch

        def run():
            x = torch.randn_like(self.x_0)
            logsnrs = cosine_logsnr(torch.linspace(1.0, 0.0, num_steps + 1))
            for logsnr_t, logsnr_s in itertools.pairwise(logsnrs):
                (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
                eps = self.network(x, logsnr_t.expand(len(x)))
                x_0 = ((x - sigma_t * eps) / alpha_t).clamp(-3.2, 1.2)
                kept = torch.exp(logsnr_t - logsnr_s)
                mean = alpha_s * (kept * x / alpha_t + (1 - kept) * x_0)
                x = mean + sigma_s * torch.sqrt(1 - kept) * torch.randn_like(x)
            return x_0

        self.network.eval()
        with torch.no_grad():
            return timed(run)


def cosine_logsnr(t: Any) -> Any:
    """logsnr of times t: -2 log tan(a t + b), from LOGSNR at t = 0 to -LOGSNR at 1."""
    import torch

    b = math.atan(math.exp(-0.5 * LOGSNR))
    a = math.atan(math.exp(0.5 * LOGSNR)) - b
    return -2.0 * torch.log(torch.tan(a * t + b))


def alpha_sigma(logsnr: Any) -> tuple[Any, Any]:
    import torch

    return torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr))


def by_group(counts: Mapping[str, Mapping[Any, int]]) -> dict[str, float]:
    """The result of `FlopCounterMode.get_flop_counts` by GROUPS. A module's count holds its children's: only those that
    no other module but the root has called are summed, and "other" is what is left of the whole."""
    totals = {name.partition(".")[2]: sum(kinds.values()) for name, kinds in counts.items() if "." in name}
    top = [name for name in totals if not any(name.startswith(other + ".") for other in totals)]
    groups = grouped([(name, totals[name]) for name in top if group_of(name) != "other"], group_of)
    return {**groups, "other": sum(counts["Global"].values()) - sum(groups.values())}


if __name__ == "__main__":
    peer = Peer()
    names = ("setup", "flops", "matmul", "train", "sample")
    serve({name: getattr(peer, name) for name in names})

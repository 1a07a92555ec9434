"""The released RPG code, fed the same shapes: `--reference DIR`, a checkout of it.

Its core needs mamba_ssm. Where that is missing, its denoiser and diffusion, in plain torch, are compared by themselves:
they are nearly all of a step on a CPU. Nothing of it is copied here: it is imported from where it lies.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.diffusion import Diffusion
from rpgcli.recipe import load
from rpgcli.samplers import DdimConfig
from tests.bench.learning import COMPOSITIONS, composition, small_store, training
from tests.bench.measuring import BenchError, Row, Setting, Side, in_turn, timed

PACKAGE = "released_rpg"
"""What its folder `model` is called here."""
BETA, T, STEPS_MEASURED = (1e-4, 0.02), 1000, 10
CHANNELS = [1, 32, 64, 128, 64, 32, 1]
"""Of their convolutions, as released."""
D_MODEL = 256


def released(setting: Setting) -> list[Row]:
    """Training step and generation, theirs over ours."""
    assert setting.reference is not None, "only measured with a checkout"
    folder = setting.reference / "model"
    if not (folder / "diffusion.py").is_file():
        raise BenchError(f"{setting.reference} is no checkout of the released code: it has no model/diffusion.py")
    shapes = [(128, 8)] if setting.quick else [(128, 8), (1024, 32)]
    rows = []
    for token_dim, width in shapes:
        rows += alone(setting, folder, token_dim, width)
    return rows + whole(setting, folder)


def imported(folder: Path, *, whole: bool) -> ModuleType:
    """Their package: all of it, or as an empty one whose modules can be imported by themselves."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    if not whole:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        return importlib.import_module(f"{PACKAGE}.diffusion")
    spec = spec_from_file_location(PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None, "it is a file of Python"
    package = sys.modules[PACKAGE] = module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


# --- the denoiser alone -----------------------------------------------------------------------------------------------


def alone(setting: Setting, folder: Path, token_dim: int, width: int) -> list[Row]:
    """Denoiser and diffusion, given prototypes."""
    store = small_store(setting.scratch / f"{token_dim}", width, token_dim)
    x_0 = store.network(0)  # (L, D)
    c = torch.randn(len(x_0), D_MODEL, generator=rng.stream(0, "bench", "c"))  # (L, M)
    sides = theirs_alone(imported(folder, whole=False), x_0, c) | ours_alone(x_0, c)
    found = in_turn(sides, setting.repeats(7))
    sampled = found["theirs, sampling"].times(T / STEPS_MEASURED)
    what = f"{len(x_0)} x {token_dim}"
    note = (
        f"released: its denoiser and diffusion without its core, against ours without our core. A step: forward, "
        f"backward, AdamW. {T} DDPM steps: {STEPS_MEASURED}, multiplied; ours: 20 DDIM steps."
    )
    return [
        Row(f"released / default: a step of {what}", found["theirs, step"].over(found["ours, step"]), "x",
            {"released": found["theirs, step"], "default": found["ours, step"]}, note=note),
        Row(f"released / default: generate {what}", sampled.over(found["ours, sampling"]), "x",
            {"released": sampled, "default": found["ours, sampling"]}, note=note),
    ]  # fmt: skip


def theirs_alone(code: ModuleType, x_0: Tensor, c: Tensor) -> dict[str, Side]:
    net = code.ConditionalUNet(layer_channels=CHANNELS, model_dim=x_0.shape[1], condition_dim=c.shape[1], kernel_size=7)
    trainer, sampler = (kind(model=net, beta=BETA, T=T) for kind in (code.GaussianDiffusionTrainer, code.DDPMSampler))

    def sample() -> None:
        net.eval()
        x_t = torch.randn_like(x_0)
        for step in reversed(range(T - STEPS_MEASURED, T)):
            x_t = sampler.sample_one_step(x_t, step, c)

    return {
        "theirs, step": timed(stepping(net, lambda: trainer(x_0, c))),
        "theirs, sampling": timed(sample),
    }  # fmt: skip


def ours_alone(x_0: Tensor, c: Tensor) -> dict[str, Side]:
    config = load(COMPOSITIONS["default"]).rpg
    denoiser, diffusion = config.denoiser.build(x_0.shape[1], c.shape[1]), Diffusion(config.diffusion)
    mask, generator = torch.ones_like(x_0, dtype=torch.bool), rng.stream(0, "bench")

    @torch.no_grad()
    def sample() -> None:
        e = denoiser.embed(c)
        DdimConfig().sample(diffusion, lambda x_t, t: denoiser(x_t, t, e), torch.randn_like(x_0), 20)

    return {
        "ours, step": timed(stepping(denoiser, lambda: diffusion.loss(denoiser, x_0, c, mask, generator))),
        "ours, sampling": timed(sample),
    }  # fmt: skip


def stepping(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Takes an optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


# --- the whole model --------------------------------------------------------------------------------------------------


def whole(setting: Setting, folder: Path) -> list[Row]:
    """A training step of the whole model, where its core can be imported."""
    name = "released / default: a step of the whole model"
    try:
        code = imported(folder, whole=True)
    except ImportError as error:
        note = f"released, whole model: it cannot be imported here ({type(error).__name__}: {error})."
        return [Row(name, None, note=note)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 2 if setting.quick else 8
    store = small_store(setting.scratch / "whole", 8, 128)
    x_0 = torch.stack([store.network(i) for i in range(batch)]).to(device)  # (B, L, D)
    code.MambaDiffusion.config = {
        "num_permutation": 1, "d_condition": 1, "d_model": D_MODEL, "d_state": 32, "d_conv": 4, "expand": 2,
        "num_layers": 2, "diffusion_batch": None, "layer_channels": CHANNELS, "model_dim": x_0.shape[2],
        "condition_dim": D_MODEL, "kernel_size": 7, "sample_mode": code.DDPMSampler, "beta": BETA, "T": T,
        "forward_once": True,
    }  # fmt: skip
    model = code.MambaDiffusion(sequence_length=x_0.shape[1], positional_embedding=torch.zeros(x_0.shape[1], D_MODEL))
    states = torch.zeros(batch, dtype=torch.long, device=device)
    theirs = stepping(model.to(device), lambda: model(output_shape=x_0.shape, x_0=x_0, permutation_state=states))
    ours = training(store, composition("default", batch_size=batch), device)

    def finished(step: Callable[[], None]) -> Side:
        def run() -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return timed(run)

    found = in_turn({"released": finished(theirs), "default": finished(ours)}, setting.repeats(7))
    note = f"released, whole model: {batch} networks of {x_0.shape[1]} tokens of 128 on {device.type}."
    return [Row(name, found["released"].over(found["default"]), "x", found, note=note)]

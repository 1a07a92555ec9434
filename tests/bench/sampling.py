"""Generation: our default against 1000-step DDPM with the paper's denoiser, growth with parameters, the full sizes."""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import torch

from rpgcli import artifact, rng
from rpgcli.conditions import Asked
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.generation import Generator, Sample, Sampling
from rpgcli.methods.rpg import build
from rpgcli.models import assemble, read_model
from rpgcli.recipe import load
from rpgcli.samplers import DdimConfig, DdpmConfig
from rpgcli.tokens import TokenStore
from tests.bench.learning import BITS, COMPOSITIONS, small_store
from tests.bench.measuring import Figure, Row, Setting, Watched, at_least, at_most, in_turn, peak_of, timed, watch
from tests.bench.untrained import CPU, of_size, random_model

DDPM_STEPS = 1000
FEW, MANY = 5, 25
"""DDPM steps that are measured; a step costs the same whichever it is, so the time of 1000 lies on their line."""


# --- against the paper's composition ----------------------------------------------------------------------------------


def generation(setting: Setting) -> list[Row]:
    """Small CNNs one by one on the CPU: 20 and 5 DDIM steps of our default, 1000 DDPM steps of the paper's."""
    shapes = [(128, 8, None)] if setting.quick else [(128, 8, 200), (1024, 8, None), (1024, 32, 800)]
    rows = []
    for token_dim, width, wanted in shapes:
        folder = setting.scratch / f"{token_dim}-{width}"
        store = small_store(folder, width, token_dim)
        samplings = {
            "default, 20 steps": ("default", ddim(20)), "default, 5 steps": ("default", ddim(5)),
            f"paper, {MANY} steps": ("paper", ddpm(MANY)), f"paper, {FEW} steps": ("paper", ddpm(FEW)),
        }  # fmt: skip
        makers = {name: network_after(store, name) for name in COMPOSITIONS}
        sides = {what: timed(partial(makers[name], sampling)) for what, (name, sampling) in samplings.items()}
        found = in_turn(sides, setting.repeats(7))
        few, many = found[f"paper, {FEW} steps"], found[f"paper, {MANY} steps"]
        slow = extrapolated(few, many)
        what = f"{store.layout.num_tokens} x {token_dim}"
        note = (
            f"DDPM: the time of {DDPM_STEPS} steps on the line through those of {FEW} and {MANY}, since all cost the "
            "same. Each network has a task of its own, so the core runs for each. Random weights: nothing is said of "
            "accuracy here. On digits-tasks validation tasks choose 2 steps; 5, 10 and more are no more accurate."
        )
        for steps, goal in ((20, None), (5, wanted and at_least(wanted))):
            fast = found[f"default, {steps} steps"]
            rows.append(Row(
                f"generate {what}: DDPM {DDPM_STEPS} conv / DDIM {steps} mlp", slow.over(fast), "x",
                {"paper": slow, "default": fast}, goal=goal or None, note=note,
            ))  # fmt: skip
        peaks = {name: Figure((peak_of(generate_one, folder, name),)) for name in COMPOSITIONS}
        rows.append(Row(
            "  peak anonymous memory, paper / default", peaks["paper"].over(peaks["default"]), "x",
            {"paper": peaks["paper"], "default": peaks["default"]}, "MiB",
        ))  # fmt: skip
    return rows


def extrapolated(few: Figure, many: Figure) -> Figure:
    """The time of all DDPM steps, from those of `FEW` and `MANY`."""
    each = many.plus(few.times(-1)).times(1 / (MANY - FEW))
    return few.plus(each.times(DDPM_STEPS - FEW))


def ddim(num_steps: int) -> Sampling:
    return Sampling(sampler=DdimConfig(), num_steps=num_steps)


def ddpm(num_steps: int) -> Sampling:
    return Sampling(sampler=DdpmConfig(), num_steps=num_steps)


def network_after(store: TokenStore, name: str) -> Callable[[Sampling], None]:
    """Generates one network after another, each of another task, with fresh weights of a composition."""
    config = load(COMPOSITIONS[name]).rpg.model_copy(update={"state": "none"})
    model = build(config, store, BITS)
    generator = Generator(assemble(model, None, BITS, 1, store.layout, store.statistics, store.constants(0)))
    tasks = count(1)

    def generate(sampling: Sampling) -> None:
        asked = Asked("unseen", f"{next(tasks) % 1022 + 1:010b}")
        generator.tokens(Sample(asked, 0), sampling, seed=0, state="none")

    return generate


def generate_one(folder: Path, name: str) -> None:
    """A few steps, in a process whose memory is watched."""
    generate = network_after(TokenStore(artifact.read(folder, "tokenize")), name)
    generate(ddim(FEW) if name == "default" else ddpm(FEW))


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiling(setting: Setting) -> list[Row]:
    """One step of the denoisers, run as they are and compiled; random weights."""
    rows = []
    ours, papers = (load(COMPOSITIONS[name]).rpg.denoiser for name in ("default", "paper"))
    shapes = [(ours, 46, 128), (papers, 46, 128), (DENOISER, 256, 8192)]
    for config, num_tokens, token_dim in shapes[:1] if setting.quick else shapes:
        with rng.initialising(0, "bench"):
            denoiser = config.build(token_dim, 256).eval()
        x_t = torch.randn(num_tokens, token_dim, generator=rng.stream(0, "bench", "x"))  # (K, D)
        c = torch.randn(num_tokens, 256, generator=rng.stream(0, "bench", "c"))  # (K, M)
        t = torch.full((num_tokens,), 500)  # (K,)
        with torch.no_grad():
            arguments = (x_t, t, denoiser.embed(c))
            compiled = torch.compile(denoiser, fullgraph=True)  # Fails where it would fall back.
            first = Figure((timed(partial(compiled, *arguments))(),))
            sides = {"as it is": timed(partial(denoiser, *arguments)), "compiled": timed(partial(compiled, *arguments))}
            found = in_turn(sides, setting.repeats(31))
        rows.append(Row(
            f"a step of denoiser {config.kind}, {num_tokens} x {token_dim}: as it is / compiled",
            found["as it is"].over(found["compiled"]), "x", {**found, "compiling": first},
            note="torch.compile without falling back, and the seconds that its first call takes.",
        ))  # fmt: skip
    return rows


# --- growth -----------------------------------------------------------------------------------------------------------

SIZES = (100_000, 1_000_000, 10_000_000, 200_000_000)
"""Generated parameters, about."""
BASE = 1_000_000
"""What the others are compared with."""
GROWTH_STEPS = 5


def growth(setting: Setting) -> list[Row]:
    """Time and memory of generating one network, 0.1 M to 200 M parameters at fixed token_dim and widths."""
    numbers = SIZES[:2] if setting.quick else SIZES
    folders = {num: setting.scratch / str(num) for num in numbers}
    sizes = {num: random_model(folder, of_size(num)).facts["num_parameters"] for num, folder in folders.items()}
    watched = {num: rpg_generate(folder, GROWTH_STEPS) for num, folder in folders.items()}
    times = {num: max(1, 3 * BASE // num) for num in numbers}
    sides = {str(num): timed(sampling(folder, times[num])) for num, folder in folders.items()}
    found = in_turn(sides, setting.repeats(3), warm_up=False)
    each = {num: found[str(num)].times(1e9 / (sizes[num] * times[num])) for num in numbers}
    millions = {num: f"{size / 1e6:.1f} M" for num, size in sizes.items()}
    note = (
        f"token_dim 8192, d_model 256, denoiser mlp of width 256, {GROWTH_STEPS} steps; the model is loaded before. "
        "The goal holds from 1 M on: below, tensors of a few values fill whole tokens."
    )
    time_rows = [
        Row(f"generate: time a parameter, {millions[num]} over {millions[BASE]}", each[num].over(each[BASE]), "x",
            {str(num): each[num], str(BASE): each[BASE]}, "ns", note=note, goal=at_most(1.5) if num > BASE else None)
        for num in numbers if num != BASE
    ]  # fmt: skip
    return time_rows + [
        Row(f"  peak anonymous memory of `rpg generate`, {millions[num]}", Figure((watched[num].anonymous,)), "MiB",
            {"whole command": Figure((watched[num].seconds,))},
            note="Beside the memory: seconds of the whole command, start included.")
        for num in numbers
    ]  # fmt: skip


def sampling(folder: Path, times: int) -> Callable[[], None]:
    """Samples so many networks from a model that is loaded now; the core runs for each."""
    model = read_model("rpg", artifact.read(folder / "rpg", "train-rpg"), CPU)

    def sample() -> None:
        for index in range(times):
            Generator(model).tokens(Sample(Asked(), index), ddim(GROWTH_STEPS), seed=0, state="none")

    return sample


def rpg_generate(run: Path, num_steps: int, device: str = "cpu") -> Watched:
    """`rpg generate` of one network in a process of its own."""
    return watch(
        "generate", "--run", run, "--count", 1, "--steps", num_steps, "--sampler", "ddim", "--state", "none",
        "--device", device,
    )  # fmt: skip


# --- full size --------------------------------------------------------------------------------------------------------

STEPS = 20
FULL = {"vit-base": 5, "convnext-large": 10}
"""Networks of the paper -> seconds wanted on a data-centre GPU."""
DENOISER = MlpDenoiserConfig(width=1024)


def full_size(setting: Setting) -> list[Row]:
    """ViT-Base and ConvNeXt-L from a model of the paper's width with the mlp denoiser, 20 steps, random weights."""
    rows = []
    for name, wanted in {"convnext-atto": 5}.items() if setting.quick else FULL.items():
        recipe = load(f"paper/imagenet-{name}")
        rpg_config = recipe.rpg.model_copy(update={"denoiser": DENOISER, "state": "none"})
        if setting.quick:
            rpg_config = rpg_config.model_copy(update={"core": Mamba2Config(d_model=256)})
        folder = setting.scratch / name
        found = random_model(folder, recipe.model_copy(update={"rpg": rpg_config}))
        weights, parameters = found.facts["num_weights"] / 1e9, found.facts["num_parameters"] / 1e6
        what = (
            f"{name}: a model of {weights:.2f} G weights generates {parameters:.1f} M parameters in {STEPS} DDIM steps"
        )
        watched, stage = rpg_generate(folder, STEPS), taken(folder)
        rows += [
            Row(f"generate {name} on cpu", stage["whole"], "s", stage,
                note=what + "; the whole stage, model read and hashed, and of it core, denoising and writing alone."),
            Row("  peak resident memory", Figure((watched.resident,)), "MiB",
                {"anonymous": Figure((watched.anonymous,))}, "MiB anonymous", goal=at_most(12 * 1024)),
        ]  # fmt: skip
        if torch.cuda.is_available():
            rpg_generate(folder, STEPS, "cuda")
            stage = taken(folder)
            rows.append(
                Row(f"generate {name} on cuda", stage["network"], "s", stage, goal=at_most(wanted),
                    note=what + "; core, denoising and writing, and the whole stage.")
            )  # fmt: skip
        shutil.rmtree(folder)
    return rows


def taken(run: Path) -> dict[str, Figure]:
    """Seconds of the one request of a run, which is deleted: of the whole stage, and of its network."""
    (written,) = (run / "generated").glob("[!.]*")
    volatile = artifact.read(written, "generate").manifest.volatile
    shutil.rmtree(run / "generated")
    return {"whole": Figure((volatile["seconds"],)), "network": Figure(tuple(volatile["seconds_per_network"]))}

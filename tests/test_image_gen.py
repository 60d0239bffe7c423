"""image_gen.py: mathematics against oracles, every family on every dataset, whole runs on real digits, and accidents.

Runs of the command line happen inside this process (`call`), in a folder of their own and with the script's default
folders moved there as well; a process is started only where a process is what is tested. The model is tiny, the digits
are scikit-learn's. Bit-for-bit comparisons are made in one arithmetic and with one number of threads.
"""
import ast
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "image_gen" / "image_gen.py"
README = ROOT / "README.md"
CPU = torch.device("cpu")
torch.set_num_threads(1)  # models as small as these gain nothing from more, and lose much on a busy machine


def load_script():
    spec = importlib.util.spec_from_file_location("image_gen_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ig = load_script()
DRAW_CURVES = ig.draw_curves  # most tests do without

# --- helpers

COMMON = ("--device", "cpu", "--precision", "float32", "--checkpoint", "model.pt", "--results_dir", "results")
SMALL = ("--channels", "16", "--blocks", "1", "--warmup_steps", "5", "--steps", "3", "--num_samples", "4")
TRAIN = (*COMMON, "--dataset", "digits", *SMALL)
RUN = (*TRAIN, "--epochs", "2", "--save_every", "5")  # 22 steps an epoch, 44 in all
INFER = ("--mode", "infer", *COMMON)
EVALUATE = ("--mode", "evaluate", *COMMON)
STEPS = 44


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(*arguments) -> Result:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("always")  # a user sees warnings on stderr, all but those meant for developers
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *w: err.write(warnings.formatwarning(*w[:4]))
        try:
            code = ig.main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code
    return Result(code, out.getvalue(), err.getvalue())


def ok(*arguments) -> Result:
    result = call(*arguments)
    assert result.code == 0, result.err
    return result


def assert_error(result: Result, code: int, *words: str, bars: bool = False) -> None:
    """Exactly one line on stderr, `error: ...` with these words, and this exit status. (With `bars`, progress bars
    may stand before it.)"""
    assert "Traceback" not in result.err, result.err
    lines = [line for line in re.split(r"[\r\n]", result.err) if line.strip()]
    shown = [line for line in lines if line.startswith("error: ")]
    assert len(shown) == 1 and (bars or len(lines) == 1), result.err
    assert lines[-1] == shown[0]
    for word in words:
        assert word in shown[0]
    assert result.code == code, result.err


def read(path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


UNEQUAL = {"seconds", "images_per_second", "made"}  # of two runs that are otherwise the same


def differences(a, b, path="") -> list[str]:
    """Paths at which two checkpoints differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}/{key}" for key in a.keys() ^ b.keys()]
        return missing + [d for k in a.keys() & b.keys() - UNEQUAL for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    if torch.is_tensor(a) and torch.is_tensor(b):
        return [] if torch.equal(a, b) else [path]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} != {b!r}"]


def finite(state) -> bool:
    return all(torch.isfinite(value).all() for key in ("model", "ema") for value in state[key].values())


@contextlib.contextmanager
def signal_after(step: int, number: int = signal.SIGTERM):
    """This process gets a signal when training has done this step."""
    original = ig.Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ig.Trainer, "train_step", train_step)
        yield


def stopped(code: int, *arguments, at: int, number: int = signal.SIGTERM) -> Result:
    with signal_after(at, number):
        result = call(*arguments)
    assert result.code == code, result.err
    return result


class Drawing(NamedTuple):
    images: torch.Tensor
    title: str
    names: list


@contextlib.contextmanager
def recorded_grids():
    """What was drawn into which picture: {file name: Drawing}."""
    grids, original = {}, ig.grid_image

    def grid_image(images, path, title, names=None):
        grids[path.name] = Drawing(images.clone(), title, names)
        original(images, path, title, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ig, "grid_image", grid_image)
        yield grids


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def python():
    """Starts a process with as many threads as this one has, so that sums are added in the same order."""
    threads, started = str(torch.get_num_threads()), []

    def start(*arguments, cwd, env=None) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | (env or {})
        started.append(subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        start_new_session=True))
        return started[-1]

    yield start
    for process in started:  # a test that failed leaves none behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def driver(folder: Path, body: str) -> Path:
    """A program that runs the script's `main` after the changes of `body`; it has no plots, which take long."""
    path = folder / "driver.py"
    path.write_text(
        "import importlib.util, os, signal, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('image_gen_script', {str(SCRIPT)!r})\n"
        "ig = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ig)\n"
        "ig.draw_curves = lambda trainer: None\n"
        "ig.HERE = ig.Path('script').resolve()\n"
        "step = ig.Trainer.train_step\n"
        f"{body}\n"
        "sys.exit(ig.main(sys.argv[1:]))\n")
    return path


# In a driver: stand still after step 30 until the signal arrives that this program asks for on stdout.
WAIT_AFTER_30 = """
def train_step(self):
    step(self)
    if self.step == 30:
        os.write(1, ("pid %d" % os.getpid() + os.linesep).encode())  # in one piece: two processes share the pipe
        deadline = time.monotonic() + 120
        while not self.stop.number and time.monotonic() < deadline:
            time.sleep(0.01)
ig.Trainer.train_step = train_step
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test works in a folder of its own; the script's default folders lie there, too. No plots (slow)."""
    monkeypatch.setattr(ig, "HERE", tmp_path / "script")
    monkeypatch.setattr(ig, "draw_curves", lambda trainer: None)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MNIST_MIRROR", "MNIST_MIRROR_ONLY"):
        monkeypatch.delenv(name, raising=False)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    timeout = socket.getdefaulttimeout()
    yield tmp_path
    socket.setdefaulttimeout(timeout)
    for number, handler in handlers:
        signal.signal(number, handler)


@contextlib.contextmanager
def session_place(path: Path):
    """The same for what several tests share."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ig, "HERE", path / "script")
        patch.chdir(path)
        yield patch
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A classifier of the digits, the feature net of all measurements here (32 features)."""
    path = tmp_path_factory.mktemp("classifier")
    with session_place(path) as patch:
        patch.setattr(ig, "draw_curves", lambda trainer: None)
        ok("--model", "classifier", "--dataset", "digits", "--epochs", 8, "--batch_size", 32, "--width", 16,
           "--features", 32, "--warmup_steps", 20, *COMMON)
    return path / "model.pt"


class Trained(NamedTuple):
    folder: Path
    grids: dict
    result: Result


@pytest.fixture(scope="session")
def trained(tmp_path_factory, classifier) -> Trained:
    """A whole run of six epochs with everything it writes."""
    path = tmp_path_factory.mktemp("trained")
    with session_place(path), recorded_grids() as grids:
        result = ok(*TRAIN, "--epochs", 6, "--classifier", classifier, "--eval_samples", 40)
    return Trained(path, grids, result)


@pytest.fixture
def model_file(trained, place) -> Path:
    """A trained checkpoint, model.pt in the current folder."""
    return Path(shutil.copy(trained.folder / "model.pt", place / "model.pt"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """The uninterrupted run RUN, for comparison with stopped, killed and distributed ones."""
    path = tmp_path_factory.mktemp("reference")
    with session_place(path) as patch, recorded_grids() as grids:
        patch.setattr(ig, "draw_curves", lambda trainer: None)
        ok(*RUN)
    torch.save({name: drawing.images for name, drawing in grids.items()}, path / "grids.pt")
    return path


def assert_same_run(folder, reference) -> None:
    """The run in `folder` ended exactly as the reference did."""
    assert differences(read(Path(folder) / "model.pt"), read(reference / "model.pt")) == []
    assert differences(records(Path(folder) / "results"), records(reference / "results")) == []
    for name in ("final_samples.png", "epoch_comparisons/samples_epoch_002.png"):
        assert np.array_equal(pixels(Path(folder) / "results" / name), pixels(reference / "results" / name))
    assert not list(Path(folder).rglob("*.part"))


def write_folder(root: Path, colour: bool, count: int = 12) -> Path:
    """A folder of small drawings in two sub-folders, bars and discs, grey or red-and-green, of several sizes."""
    rng = np.random.default_rng(0)
    for kind, number in itertools.product(("bar", "disc"), range(count)):
        height, width = 10 + number % 3, 12 - number % 2
        y, x = np.mgrid[:height, :width] / 10 - 0.5
        shape = abs(x) < 0.2 if kind == "bar" else x ** 2 + y ** 2 < 0.15
        grey = np.clip(shape * 200 + rng.integers(0, 40, shape.shape), 0, 255).astype(np.uint8)
        (root / kind).mkdir(parents=True, exist_ok=True)
        image = np.stack([grey, 255 - grey, np.full_like(grey, 30)], -1) if colour else grey
        Image.fromarray(image).save(root / kind / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("folders")
    return {"grey": write_folder(base / "grey", False), "colour": write_folder(base / "colour", True)}


DATA = ["digits", "grey", "colour", pytest.param("mnist", marks=pytest.mark.real_data)]


@pytest.fixture(scope="session", params=DATA)
def images(request):
    """Each dataset in turn."""
    if request.param in ("grey", "colour"):
        return ig.DATASETS["folder"](request.getfixturevalue("folders")[request.param], 8)
    root = request.getfixturevalue("mnist_root") if request.param == "mnist" else None
    return ig.DATASETS[request.param](root, None)


TINY = {"diffusion": {"channels": 16, "blocks": 1, "steps": 3}, "classifier": {"width": 8, "features": 16},
        "vae": {"width": 8}, "vae_mlp": {"width": 8, "network": "mlp"}, "gan": {"width": 8}}


def build(family: str, info: dict, seed: int = 0, **config):
    torch.manual_seed(seed)
    kind = ig.FAMILIES[family.split("_")[0]]
    return kind(kind.config_class(**TINY[family] | config), info)


def noisy_weights(model, scale: float = 0.1):
    """Move all weights off their start, where the last layer is zero and nothing could be told apart."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def make_batch(images, count: int = 8, step: int = 0) -> "ig.Batch":
    rows = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(step))[:count]
    return ig.Batch(ig.to_float(images.train[rows]), images.train_labels[rows],
                    ig.Draw(0, step, len(rows), slice(None), CPU))


INFO = {"dataset": "digits", "title": "digits", "channels": 1, "image_size": 8, "classes": list("0123456789"),
        "class_counts": [10] * 10, "train_images": 100}

# === oracles: schedules, objectives, samplers ===

SCHEDULES = ig.CONFIG_FIELDS["diffusion"]["schedule"].metadata["choices"]
OBJECTIVES = ig.CONFIG_FIELDS["diffusion"]["objective"].metadata["choices"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_goes_from_image_to_noise(name):
    schedule = ig.NoiseSchedule(name)
    alphas, sigmas = schedule.alphas, schedule.sigmas
    assert len(alphas) == len(sigmas) == ig.TIMESTEPS + 1 == 1001
    assert alphas[0] == 1 and sigmas[0] == 0
    assert (alphas.diff() < 0).all() and (sigmas.diff() > 0).all()
    assert 0 < alphas[-1] < 0.01 and 0.99 < sigmas[-1] <= 1
    total = alphas + sigmas if name == "straight" else alphas.square() + sigmas.square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_linear_schedule_has_the_betas_of_the_paper():
    power = ig.NoiseSchedule("linear").alphas.square()
    betas = 1 - power[1:] / power[:-1]
    expected = torch.tensor([1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(betas, expected, rtol=1e-6, atol=1e-12)


def test_cosine_schedule_has_the_formula_of_the_paper():
    power = ig.NoiseSchedule("cosine").alphas.square()
    for t in (1, 10, 250, 500, 900, 990):
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, 0)]
        assert power[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    assert (1 - power[1:] / power[:-1]).max().item() == pytest.approx(0.999)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 200, 1000])
def test_sampling_times_decrease_within_the_grid(name, steps):
    times = ig.NoiseSchedule(name).times(steps)
    assert 1 <= len(times) <= steps and (len(times) == steps or steps > 20)
    assert all(a > b for a, b in itertools.pairwise(times)) and 1 <= times[-1] <= times[0] <= 1000


def gaussian_denoiser(schedule, mean: float, deviation: float):
    """E[image | x_t] when images are N(mean, deviation^2): the perfect model of that distribution."""
    def denoise(x, t):
        alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
        gain = alpha * deviation ** 2 / (alpha ** 2 * deviation ** 2 + sigma ** 2)
        return mean + gain * (x - alpha * mean)
    return denoise


MEAN, DEVIATION = 0.3, 0.5


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++"])
def test_sampler_follows_the_exact_flow_of_a_gaussian(sampler, schedule_name):
    """For a Gaussian the probability flow is known: x keeps its distance to the mean in standard deviations. A sampler
    of order p has an error that falls by 2^p when the steps double."""
    schedule = ig.NoiseSchedule(schedule_name)
    denoise = gaussian_denoiser(schedule, MEAN, DEVIATION)
    start = torch.randn(4000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def spread(t):
        return (schedule.alphas[t] ** 2 * DEVIATION ** 2 + schedule.sigmas[t] ** 2).sqrt()

    errors = []
    for steps in (20, 40):
        times = schedule.times(steps)
        first, last = times[0], times[-1]
        units = (start - schedule.alphas[first] * MEAN) / spread(first)
        exact = denoise(schedule.alphas[last] * MEAN + units * spread(last), last)  # all samplers end in this step
        drawn = ig.SAMPLERS[sampler](denoise, start.clone(), times, schedule, None)
        errors.append((drawn - exact).abs().mean().item())
    ratio = errors[0] / errors[1]
    if sampler == "ddim":
        assert errors[1] < 0.03 and 1.8 < ratio < 2.2
    else:
        assert errors[1] < 0.005 and 3.6 < ratio < 5
        assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.025)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", sorted(ig.SAMPLERS))
def test_sampling_starts_with_as_much_noise_as_its_first_time_has(sampler, schedule):
    model = build("diffusion", INFO, sampler=sampler, schedule=schedule, steps=20)
    seen, expected = [], ig.ImageNoise(0, range(3), CPU).normal(1, 8, 8)
    model.denoiser = lambda labels, count: lambda x, t: seen.append((x, t)) or torch.zeros_like(x)
    model.sample(None, ig.ImageNoise(0, range(3), CPU))
    x, t = seen[0]
    assert t == model.sampling_times()[0] > 900
    torch.testing.assert_close(x, expected * model.noise_schedule.sigmas[t].item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++"])
def test_drawn_images_of_a_perfect_model_have_the_deviation_of_its_data(sampler, schedule):
    """These samplers stretch their noise alike everywhere, so that the deviation they end with can be told to a
    thousandth, however few the images: noise of deviation 1 at a time that has 0.988 is seen."""
    model = build("diffusion", INFO, sampler=sampler, schedule=schedule, steps=200)
    model.denoiser = lambda labels, count: gaussian_denoiser(model.noise_schedule, MEAN, DEVIATION)
    drawn, noise = model.sample(None, ig.ImageNoise(0, range(9), CPU)), ig.ImageNoise(0, range(9), CPU).normal(1, 8, 8)
    assert (drawn.std() / noise.std()).item() == pytest.approx(DEVIATION, rel=0.02 if sampler == "ddim" else 0.004)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_ancestral_sampling_recovers_a_gaussian(schedule_name):
    schedule = ig.NoiseSchedule(schedule_name)
    noise = ig.ImageNoise(0, range(16), CPU)
    drawn = ig.sample_ddpm(gaussian_denoiser(schedule, MEAN, DEVIATION), noise.normal(1, 40, 40),
                           list(range(1000, 0, -1)), schedule, noise)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.02)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_ancestral_sampling_has_the_exact_noise_at_every_step(schedule_name):
    """When all images are one image, q(x_s | x_t, image) is exact in strides of any length: at each time x is
    alpha * image + sigma * noise."""
    schedule, seen = ig.NoiseSchedule(schedule_name), {}
    noise = ig.ImageNoise(0, range(4), CPU)

    def denoise(x, t):
        seen[t] = (x.mean().item(), x.std().item())
        return torch.full_like(x, 0.8)

    ig.sample_ddpm(denoise, noise.normal(1, 100, 100), [1000, 700, 500, 300, 100, 10], schedule, noise)
    for t, (mean, deviation) in seen.items():
        assert mean == pytest.approx(0.8 * schedule.alphas[t].item(), abs=0.02)
        assert deviation == pytest.approx(schedule.sigmas[t].item(), rel=0.02)


@pytest.mark.parametrize("steps", [1, 5, 1000])
@pytest.mark.parametrize("sampler", sorted(ig.SAMPLERS))
def test_any_number_of_steps_ends_at_the_image_that_the_model_knows(sampler, steps):
    """A model that always answers with one image must yield that image, whatever the path."""
    model = build("diffusion", INFO, sampler=sampler, steps=steps)
    image = torch.rand(2, 1, 8, 8) * 2 - 1
    times = model.sampling_times()
    drawn = ig.SAMPLERS[sampler](lambda x, t: image, torch.randn(2, 1, 8, 8), times, model.noise_schedule,
                                 ig.ImageNoise(0, range(2), CPU))
    torch.testing.assert_close(drawn, image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_prediction_gives_the_image_back(objective, schedule):
    model = build("diffusion", INFO, objective=objective, schedule=schedule)
    batch = make_batch(ig.load_digits(None, None))
    for t in (1, 100, 500, 900, 980):
        x, target = model._noisy(batch, torch.full((8,), t))
        torch.testing.assert_close(model._image(x, target, t), batch.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_objectives_are_what_their_names_say(schedule):
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    times = torch.tensor([1, 300, 700, 1000])
    noises = []
    for objective in OBJECTIVES:
        model = build("diffusion", INFO, objective=objective, schedule=schedule)
        x, target = model._noisy(ig.Batch(images, torch.zeros(4), ig.Draw(0, 0, 4, slice(None), CPU)), times)
        alpha, sigma = (s[times].float().view(-1, 1, 1, 1)
                        for s in (model.noise_schedule.alphas, model.noise_schedule.sigmas))
        noise = (x - alpha * images) / sigma
        noises.append(noise[1:])
        expected = {"noise": noise, "velocity": alpha * noise - sigma * images, "flow": noise - images}[objective]
        torch.testing.assert_close(target[1:], expected[1:], rtol=1e-4, atol=1e-4)
    for other in noises[1:]:  # the objective does not change what is drawn
        torch.testing.assert_close(other, noises[0], rtol=0, atol=1e-4)


def test_loss_is_the_mean_squared_error_of_the_prediction():
    """A network that answers 0 has the mean square of the target as its loss: for noise that is 1."""
    model = build("diffusion", INFO, objective="noise")
    losses = [loss.item() for step in range(20) for _, loss, _ in
              model.losses(make_batch(ig.load_digits(None, None), 64, step))]
    assert np.mean(losses) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_are_shown_and_hidden_as_often_as_asked(share):
    model, images = build("diffusion", INFO, label_dropout=share), ig.load_digits(None, None)
    shown = []
    model.label.register_forward_pre_hook(lambda module, arguments: shown.append(arguments[0]))
    batches = [make_batch(images, 400, step) for step in range(3)]
    for batch in batches:
        next(model.losses(batch))
    shown, labels = torch.cat(shown), torch.cat([batch.labels for batch in batches])
    hidden = shown == 10  # the row that stands for "no label"
    assert torch.equal(shown[~hidden], labels[~hidden])
    assert hidden.float().mean().item() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("kind, middle", [("uniform", 0.5), ("logit_normal", 0.728)])
def test_training_visits_all_times_as_often_as_asked(kind, middle):
    """`middle` of the times lie in the middle half: P(|z| < log 3) for the logistic function of a normal z."""
    model, images, times = build("diffusion", INFO, time_sampling=kind), ig.load_digits(None, None), []
    model.time.register_forward_pre_hook(lambda module, arguments: times.append(arguments[0]))
    for step in range(5):
        next(model.losses(make_batch(images, 1400, step)))
    times = torch.cat(times)
    assert 1 <= times.min() < 40 and 960 < times.max() <= 1000
    assert times.float().mean().item() == pytest.approx(500.5, abs=12)
    assert ((times > 250) & (times <= 750)).float().mean().item() == pytest.approx(middle, abs=0.02)


def test_positional_encoding_is_the_direct_formula():
    encoding = ig.PositionalEncoding(16)(torch.tensor([1, 17, 1000]))
    assert encoding.shape == (3, 16)
    for row, t in enumerate((1, 17, 1000)):
        for i in range(8):
            angle = t / 10_000 ** (i / 8)
            assert encoding[row, i].item() == pytest.approx(math.sin(angle), abs=2e-4)
            assert encoding[row, 8 + i].item() == pytest.approx(math.cos(angle), abs=2e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_guidance_goes_from_unconditional_through_conditional_and_beyond(objective):
    labels, x = torch.tensor([3, 7]), torch.rand(2, 1, 8, 8) * 0.2

    def denoised(scale, given):
        model = noisy_weights(build("diffusion", INFO, guidance=scale, objective=objective), 0.02)
        with torch.no_grad():
            return model.denoiser(given, 2)(x, 300)

    with_label, without = denoised(1.0, labels), denoised(1.0, None)
    assert (with_label - without).abs().max() > 1e-3 and with_label.abs().max() < 0.9
    torch.testing.assert_close(denoised(0.0, labels), without, rtol=0, atol=1e-5)
    torch.testing.assert_close(denoised(3.0, labels), without + 3 * (with_label - without), rtol=0, atol=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", sorted(ig.SAMPLERS))
def test_number_of_network_evaluations_is_what_is_reported(sampler, guidance, labelled):
    info = INFO if labelled else INFO | {"classes": ["all"], "class_counts": [100]}
    model = build("diffusion", info, sampler=sampler, guidance=guidance, steps=6)
    calls, forward = [], model.forward
    model.forward = lambda x, *rest: calls.append(len(x)) or forward(x, *rest)
    model.sample(torch.tensor([1, 2]) if labelled else None, ig.ImageNoise(0, range(2), CPU))
    assert model.describe_sampling()["network_evaluations"] == sum(calls) / 2


def test_samples_follow_their_labels():
    """Drawn with label k, and with labels in another order, image i changes with its own label only."""
    model = noisy_weights(build("diffusion", INFO))
    one, two = (model.sample(torch.tensor(labels), ig.ImageNoise(0, range(3), CPU))
                for labels in ([1, 2, 3], [1, 5, 3]))
    torch.testing.assert_close(one[[0, 2]], two[[0, 2]], rtol=0, atol=1e-5)
    assert (one[1] - two[1]).abs().max() > 0.01


# === oracles: data and metrics ===


def test_pixel_values_survive_the_way_through_the_model_range():
    levels = torch.arange(256, dtype=torch.uint8)
    values = ig.to_float(levels)
    assert values.min() == -1 and values.max() == 1
    assert torch.equal(ig.to_uint8(values), levels)
    assert ig.to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


@pytest.mark.parametrize("counts", [[5, 3, 2], [1, 0, 9], [7, 7, 7]])
def test_labels_are_proportional_to_the_training_set(counts):
    labels = ig.proportional_labels({"class_counts": counts}, 1000)
    found = torch.bincount(labels, minlength=3)
    assert (found - torch.tensor(counts) * 1000 / sum(counts)).abs().max() <= 1
    assert found[torch.tensor(counts) == 0].sum() == 0
    assert not torch.equal(labels, labels.sort().values)  # shuffled
    assert torch.equal(labels, ig.proportional_labels({"class_counts": counts}, 1000))
    assert ig.proportional_labels({"class_counts": [10]}, 4) is None


def sample_with_moments(mean, deviations, count=400, seed=0):
    """Vectors whose sample mean and (unbiased) covariance are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return (x * torch.tensor(deviations, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)).float()


def test_frechet_distance_of_two_known_gaussians():
    one = sample_with_moments([0, 0, 1], [1, 2, 1])
    two = sample_with_moments([3, 0, 1], [1, 5, 1.5], seed=1)
    assert ig.frechet_distance(one, two) == pytest.approx(9 + 9 + 0.25, rel=1e-4)
    assert ig.frechet_distance(two, one) == pytest.approx(9 + 9 + 0.25, rel=1e-4)
    assert ig.frechet_distance(one, sample_with_moments([0, 0, 1], [1, 2, 1], seed=2)) == pytest.approx(0, abs=1e-3)


def test_frechet_distance_sees_correlation():
    one = sample_with_moments([0, 0], [1, 1])
    r = 0.6
    two = torch.stack([one[:, 0], r * one[:, 0] + math.sqrt(1 - r * r) * one[:, 1]], 1)
    eigen = torch.linalg.eigvalsh(torch.tensor([[1, r], [r, 1]], dtype=torch.float64))
    assert ig.frechet_distance(two, one) == pytest.approx((2 + 2 - 2 * eigen.sqrt().sum()).item(), rel=1e-3)


def test_inception_score_of_sure_and_unsure_predictions():
    classes = torch.arange(5000) % 10
    sure, deviation = ig.inception_score(nn.functional.one_hot(classes, 10).float() * 100)
    assert sure == pytest.approx(10, abs=0.15) and 0 <= deviation < 0.1
    assert ig.inception_score(torch.zeros(500, 10)) == (pytest.approx(1, abs=1e-5), pytest.approx(0, abs=1e-5))
    same = torch.zeros(500, 10)
    same[:, 4] = 100  # sure, but always of one class
    assert ig.inception_score(same)[0] == pytest.approx(1, abs=1e-5)


def test_metrics_leave_the_random_numbers_of_training_alone():
    before = torch.get_rng_state()
    logits = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    assert ig.inception_score(logits) == ig.inception_score(logits)
    assert ig.kernel_distance(logits, logits[:50]) == ig.kernel_distance(logits, logits[:50])
    assert torch.equal(torch.get_rng_state(), before)


def test_kernel_distance_tells_a_shift_from_chance():
    one, two = (torch.randn(800, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    near, far = ig.kernel_distance(one, two)[0], ig.kernel_distance(one + 1, two)[0]
    assert abs(near) < 0.02 < 1 < far
    # the unbiased estimate of the squared distance under k(a, b) = (a.b / D + 1)^3, written out
    x, y = (one + 1).double(), two.double()
    kernel = lambda a, b: (a @ b.T / 8 + 1) ** 3  # noqa: E731
    within = sum((k.sum() - k.diagonal().sum()) / (800 * 799) for k in (kernel(x, x), kernel(y, y)))
    assert far == pytest.approx((within - 2 * kernel(x, y).mean()).item(), rel=0.05)


@pytest.mark.parametrize("count", [40, 400, 1200, 3000])
def test_deviation_of_the_kernel_distance_is_that_between_subsets(count):
    """About that of new vectors in the number that a subset has: half of few ones, a thousand of many."""
    def draw(seed, rows):
        return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))

    size = min(1000, count // 2)
    kernel = lambda a, b: (a @ b.T / 8 + 1) ** 3  # noqa: E731
    fresh = []
    for seed in range(2, 42, 2):
        x, y = draw(seed, size), draw(seed + 1, size)
        within = sum((k.sum() - k.diagonal().sum()) / (size * (size - 1)) for k in (kernel(x, x), kernel(y, y)))
        fresh.append((within - 2 * kernel(x, y).mean()).item())
    deviation = ig.kernel_distance(draw(0, count), draw(1, count + 7))[1]
    assert np.std(fresh) / 2 < deviation < 2 * np.std(fresh)


def test_precision_and_recall_of_same_disjoint_and_missing_modes():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, 4, generator=generator), torch.randn(300, 4, generator=generator) + 100
    real = torch.cat([left, right])
    assert ig.precision_recall(real, real) == (1, 1)
    assert ig.precision_recall(real + 1000, real) == (0, 0)
    precision, recall = ig.precision_recall(left, real)  # one of two modes is missing
    assert precision == 1 and recall == pytest.approx(0.5, abs=0.01)
    precision, recall = ig.precision_recall(torch.cat([real, torch.randn(600, 4, generator=generator) - 100]), real)
    assert precision == pytest.approx(0.5, abs=0.01) and recall == 1


def test_nearest_distance_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    images, train = (torch.randint(0, 256, (n, 3, 5, 5), dtype=torch.uint8, generator=generator) for n in (520, 30))
    images[3] = train[7]
    found = ig.nearest_distance(images, train)
    expected = (images[:, None].double() - train[None].double()).flatten(2).square().sum(2).sqrt().min(1).values
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0.5)
    assert found[3] == 0


def test_noise_of_an_image_depends_on_its_number_and_the_seed_alone():
    alone, among = ig.ImageNoise(5, [3], CPU), ig.ImageNoise(5, [0, 3, 9], CPU)
    for _ in range(2):
        a, b = alone.normal(1, 4, 4), among.normal(1, 4, 4)
        assert torch.equal(a[0], b[1])
        assert not torch.equal(b[0], b[1])
    assert not torch.equal(ig.ImageNoise(6, [3], CPU).normal(4), ig.ImageNoise(5, [3], CPU).normal(4))
    draws = torch.cat([ig.ImageNoise(seed, range(100), CPU).normal(100) for seed in range(5)])
    assert len(draws[:, 0].unique()) == 500  # no two streams are the same
    assert draws.mean().item() == pytest.approx(0, abs=0.02) and draws.std().item() == pytest.approx(1, abs=0.02)


def test_processes_share_the_noise_of_a_step():
    whole = ig.Draw(1, 9, 6, slice(None), CPU)
    halves = [ig.Draw(1, 9, 6, slice(i * 3, i * 3 + 3), CPU) for i in range(2)]
    for draw in ("uniform", "normal"):
        expected = getattr(whole, draw)(2)
        assert torch.equal(torch.cat([getattr(h, draw)(2) for h in halves]), expected)
    assert not torch.equal(ig.Draw(1, 8, 6, slice(None), CPU).normal(2), ig.Draw(1, 9, 6, slice(None), CPU).normal(2))


# === contract: every family on every dataset ===


@pytest.mark.parametrize("family", sorted(TINY))
def test_loss_is_finite_and_every_parameter_learns(family, images):
    """Branches that start at zero pass nothing on, so a gradient may first appear after a few steps."""
    model = build(family, images.info())
    optimizers = {name: torch.optim.SGD(player.parameters(), 0.05) for name, player in model.players().items()}
    learned = set()
    for step in range(5):
        for player, loss, stats in model.losses(make_batch(images, step=step)):
            assert loss.ndim == 0 and all(math.isfinite(value.item()) for value in (loss, *stats.values()))
            model.zero_grad()
            loss.backward()
            learned |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
            optimizers[player].step()
    assert learned == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", ["classifier", "diffusion"])  # those whose loss may fall to zero
def test_one_batch_can_be_learned_by_heart(family, images):
    """The same images, times and noise again and again: a network that is wired up right fits them."""
    model = build(family, images.info()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(80):
        ((_, loss, _),) = model.losses(make_batch(images, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-10:]) < 0.2 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("family", sorted(TINY))
def test_held_out_figures_are_finite_and_repeatable(family, images):
    model = noisy_weights(build(family, images.info())).eval()
    figures = ig.held_out(model, images, 600, CPU)
    assert figures and all(math.isfinite(value) for value in figures.values())
    assert figures == ig.held_out(model, images, 600, CPU)


@pytest.mark.parametrize("family", sorted(TINY))
def test_family_draws_images_or_says_that_it_does_not(family, images):
    """Same seed, same images; image i is the same in a batch of any size; the mode of the model is as it was."""
    model, world = noisy_weights(build(family, images.info())), ig.World("cpu")
    labels = torch.arange(5) % len(images.classes)
    for training in (True, False):
        model.train(training)
        if not model.can_sample:
            with pytest.raises(ig.UserError, match="--model diffusion"):
                ig.generate_all(model, labels, 5, 0, 5, world)
        else:
            drawn = [ig.generate_all(model, labels, 5, 0, batch, world) for batch in (5, 5, 2, 1)]
            assert drawn[0].shape == (5, *images.train.shape[1:]) and drawn[0].dtype == torch.uint8
            assert torch.equal(drawn[0], drawn[1])
            for other in drawn[2:]:  # float32 sums may be ordered otherwise in another batch: one level at most
                assert (drawn[0].int() - other.int()).abs().max() <= 1
            assert not torch.equal(drawn[0], ig.generate_all(model, labels, 5, 1, 5, world))
            assert torch.equal(drawn[0][:3], ig.generate_all(model, labels, 3, 0, 5, world)) or \
                (drawn[0][:3].int() - ig.generate_all(model, labels, 3, 0, 5, world).int()).abs().max() <= 1
            assert len({image.numpy().tobytes() for image in drawn[0]}) == 5
        assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("family", sorted(ig.FAMILIES))
def test_command_line_trains_each_family_on_a_folder_of_colour_pictures(family, folders):
    size = SMALL if family == "diffusion" else ("--width", 8)
    ok("--model", family, "--dataset", "folder", "--data_root", folders["colour"], "--image_size", 8, "--epochs", 1,
       *COMMON, *size)
    state = read("model.pt")
    assert state["family"] == family and state["data"]["channels"] == 3 and state["data"]["classes"] == ["bar", "disc"]
    if family == "diffusion":
        ok(*INFER, "--output_dir", "out", "--num_samples", 3)
        assert sorted(p.name for p in Path("out").iterdir()) == [
            "00000_labelbar.png", "00001_labeldisc.png", "00002_labelbar.png"]
        assert pixels("out/00000_labelbar.png").shape == (8, 8, 3)


def test_unlabelled_pictures_work_from_training_to_sampling(folders):
    Path("plain").mkdir()
    for path in (folders["grey"] / "disc").iterdir():
        shutil.copy(path, "plain")
    ok("--dataset", "folder", "--data_root", "plain", "--image_size", 8, "--epochs", 1, *COMMON, *SMALL)
    ok(*INFER, "--output_dir", "out", "--num_samples", 2, "--guidance", 2)
    assert sorted(p.name for p in Path("out").iterdir()) == ["00000.png", "00001.png"]
    assert_error(call(*INFER, "--label", 1), 2, "--label", "without labels")
    result = call("--model", "classifier", "--dataset", "folder", "--data_root", "plain", *COMMON)
    assert_error(result, 1, "classes", "sub-folder")


# === a whole training run ===


def test_training_writes_everything_it_promises(trained):
    results = trained.folder / "results"
    pictures = {path.relative_to(results).as_posix() for path in results.rglob("*.png")}
    assert pictures == {"training_loss.png", "final_samples.png", "epoch_comparisons/metrics_comparison.png",
                        *(f"epoch_comparisons/samples_epoch_{e:03d}.png" for e in (1, 5, 6))}
    for name in pictures:
        with Image.open(results / name) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 100
            assert len(np.unique(np.asarray(image.convert("L")))) > 20, f"{name} is nearly blank"
    assert not list(trained.folder.rglob("*.part")) and not list(trained.folder.rglob(".write_test*"))
    assert {path.name for path in trained.folder.iterdir()} == {"model.pt", "results"}


def test_epoch_panels_show_how_the_model_was_then(trained):
    names = [f"samples_epoch_{epoch:03d}.png" for epoch in (1, 5, 6)]
    first, fifth, last = (trained.grids[name].images for name in names)
    assert not torch.equal(first, fifth) and not torch.equal(fifth, last)
    assert torch.equal(last, trained.grids["final_samples.png"].images)
    assert len({trained.grids[name].names[0] for name in names}) == 1
    for name, epoch in zip(names, (1, 5, 6)):
        assert "digits" in trained.grids[name].title and str(epoch) in trained.grids[name].title


def test_epoch_panel_is_what_a_run_stopped_there_would_draw(trained):
    stopped(143, *TRAIN, "--epochs", 6, at=5 * 22)
    with recorded_grids() as grids:
        ok(*INFER, "--num_samples", 4)
    assert torch.equal(grids["final_samples.png"].images, trained.grids["samples_epoch_005.png"].images)


def test_records_of_a_run_are_whole_and_in_order(trained):
    lines = records(trained.folder / "results")
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 6 * 22
    epochs = [line for line in lines if "epoch" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4, 5, 6]
    for line in epochs:
        assert line["step"] == 22 * line["epoch"] and line["images_per_second"] > 0
        assert all(isinstance(line[key], float) for key in ("loss", "val_loss", "fid_digits_cnn", "is_digits_cnn"))
        assert line["eval_samples"] == 40
        logged = [(r["step"], r["loss"]) for r in lines if "epoch" not in r
                  and 22 * (line["epoch"] - 1) < r["step"] <= line["step"]]
        widths = np.diff([22 * (line["epoch"] - 1), *(step for step, _ in logged)])
        assert np.average([loss for _, loss in logged], weights=widths) == pytest.approx(line["loss"], rel=1e-4)
    assert epochs[-1]["loss"] < 0.85 * epochs[0]["loss"] and epochs[-1]["val_loss"] < 0.85 * epochs[0]["val_loss"]
    assert epochs[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)


def test_checkpoint_describes_itself(trained):
    state = read(trained.folder / "model.pt")  # plain tensors and values: weights_only=True reads it
    assert state["history"] == records(trained.folder / "results")
    assert state["data"]["dataset"] == "digits" and state["data"]["image_size"] == 8
    assert state["config"]["epochs"] == 6 and state["config"]["channels"] == 16
    assert state["made"]["torch"] == str(torch.__version__)
    assert state["step"] == 6 * 22 and finite(state)


def test_samples_come_from_the_averaged_weights(model_file):
    state = read(model_file)
    assert differences(state["ema"], state["model"])
    ok(*INFER, "--num_samples", 3, "--label", 4, "--output_dir", "out")
    shown = np.stack([pixels(path) for path in sorted(Path("out").iterdir())])
    drawn = {}
    for kind in ("ema", "model"):
        model = ig.DiffusionModel(ig.DiffusionConfig(**state["config"]), state["data"])
        model.load_state_dict(state[kind])
        model.to(memory_format=torch.channels_last).eval()
        with torch.no_grad():
            x = model.sample(torch.full((3,), 4), ig.ImageNoise(0, range(3), CPU))
        drawn[kind] = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()[:, 0].numpy()
    assert np.array_equal(shown, drawn["ema"])
    assert not np.array_equal(shown, drawn["model"])


def test_average_of_the_weights_is_the_formula(place):
    """A run of three steps against the average written out: decay min(ema_decay, (1 + n) / (10 + n))."""
    seen, original = [], ig.Trainer.train_step

    def train_step(self):
        original(self)
        seen.append([p.detach().clone() for p in self.model.parameters()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ig.Trainer, "train_step", train_step)
        ok(*TRAIN, "--epochs", 3, "--batch_size", 1400, "--ema_decay", 0.2)
    average = seen[0]
    for n, weights in list(enumerate(seen))[1:]:
        decay = min(0.2, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights)]
    for found, expected in zip(read("model.pt")["ema"].values(), average):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_rate_warms_up_and_falls_to_zero():
    rates, original = [], ig.Trainer.train_step

    def train_step(self):
        rates.append(self.optimizers["model"].param_groups[0]["lr"])
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ig.Trainer, "train_step", train_step)
        ok(*TRAIN, "--epochs", 2, "--learning_rate", 0.002, "--warmup_steps", 10, "--decay_fraction", 0.5)
    expected = [0.002 * min((n + 1) / 10, 1, (STEPS - n) / (STEPS / 2)) for n in range(STEPS)]
    assert rates == pytest.approx(expected)


def test_measurements_between_epochs_may_be_rare(classifier, monkeypatch):
    """Where measuring each epoch would cost too much it is done now and then: the epochs between have no figure."""
    monkeypatch.setattr(ig, "draw_curves", DRAW_CURVES)
    ok(*TRAIN, "--epochs", 6, "--batch_size", 256, "--classifier", classifier, "--eval_samples", 360)
    measured = [line["epoch"] for line in records("results") if "fid_digits_cnn" in line]
    assert len(measured) < 6 and measured[-1] == 6
    assert Path("results/epoch_comparisons/metrics_comparison.png").exists()


def test_training_with_bfloat16_and_more_samples_than_one_picture_holds():
    result = ok(*[a if a != "float32" else "bfloat16" for a in TRAIN], "--epochs", 1, "--label", "3,8")
    assert "bfloat16" in result.out and math.isfinite(records("results")[-1]["loss"])
    with recorded_grids() as grids:
        ok(*INFER, "--num_samples", 401, "--steps", 1)
    assert len(grids["final_samples.png"].images) == 400


def test_new_runs_keep_the_models_of_all_earlier_ones(model_file):
    models = [model_file.read_bytes()]
    for seed in range(3):
        result = ok(*TRAIN, "--epochs", 1, "--batch_size", 500, "--seed", seed)
        assert read(model_file)["config"]["seed"] == seed and f"kept as model.previous{seed + 1}.pt" in result.out
        models.append(model_file.read_bytes())
    kept = [Path(f"model.previous{n}.pt").read_bytes() for n in (1, 2, 3)]
    assert kept == models[:3] and len(set(models)) == 4


@pytest.mark.parametrize("flags", [("--classifier", "missing.pt"), ("--fid_features", "cnn"),
                                   ("--label", "12"), ("--data_root", "nowhere", "--dataset", "folder")])
def test_run_that_can_not_start_leaves_the_last_model_in_its_place(model_file, flags):
    before = model_file.read_bytes()
    result = call(*TRAIN, *flags)
    assert_error(result, result.code)
    assert result.code in (1, 2) and model_file.read_bytes() == before

# === stopping, killing, resuming ===


@pytest.mark.parametrize("at", [9, 22, 31])  # in the first epoch, between the two, in the second
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(reference, at):
    result = stopped(143, *RUN, at=at)
    assert "--resume" in result.err
    assert read("model.pt")["step"] == at
    ok(*RUN, "--resume")
    assert_same_run(".", reference)


def test_signal_in_the_last_step_loses_nothing(reference, place):
    """Whether the run still ends as usual or is left to --resume: all of its outputs come to be."""
    with signal_after(STEPS):
        result = call(*RUN)
    assert result.code in (0, 143)
    if result.code:
        ok(*RUN, "--resume")
    assert_same_run(place, reference)


def test_second_signal_stops_at_once(reference, place, monkeypatch):
    original = ig.Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == 13:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ig.Trainer, "train_step", train_step)
        assert_error(call(*RUN), 130, "stopped", bars=True)
    assert read("model.pt")["step"] == 10
    ok(*RUN, "--resume")
    assert_same_run(place, reference)


def test_run_may_be_stopped_again_and_again_in_bfloat16_too():
    run = [a if a != "float32" else "bfloat16" for a in RUN]
    ok(*run)
    Path("model.pt").rename("whole.pt")
    whole = records("results")
    stopped(130, *run, at=3, number=signal.SIGINT)
    stopped(143, *run, "--resume", at=26)
    stopped(130, *run, "--resume", at=40, number=signal.SIGINT)
    ok(*run, "--resume")
    assert differences(read("model.pt"), read("whole.pt")) == []
    assert differences(records("results"), whole) == []


def test_classifier_resumes_exactly():
    run = ("--model", "classifier", "--dataset", "digits", "--epochs", 2, "--width", 8, "--features", 8, *COMMON)
    ok(*run)
    Path("model.pt").rename("whole.pt")
    stopped(143, *run, at=31)
    ok(*run, "--resume")
    assert differences(read("model.pt"), read("whole.pt")) == []


def test_resume_needs_no_flags_but_the_checkpoint(reference):
    stopped(143, *RUN, at=12)
    ok("--resume", *COMMON, "--num_samples", 4)
    assert_same_run(".", reference)


def test_resume_after_the_end_takes_more_epochs(reference, place):
    shutil.copy(reference / "model.pt", place)
    before = read("model.pt")
    assert_error(call(*RUN, "--resume"), 2, "complete", "--epochs")
    assert differences(read("model.pt"), before) == []
    ok("--resume", "--epochs", 3, *COMMON)
    assert read("model.pt")["step"] == 66 and [r["epoch"] for r in records("results") if "epoch" in r] == [1, 2, 3]


@pytest.mark.parametrize("flags", [("--learning_rate", "0.01"), ("--channels", "32"), ("--batch_size", "32"),
                                   ("--seed", "1"), ("--objective", "noise")])
def test_resume_with_other_options_is_refused(reference, place, flags):
    shutil.copy(reference / "model.pt", place)
    assert_error(call("--resume", "--epochs", 3, *COMMON, *flags), 2, flags[0], "new run")
    assert Path("model.pt").read_bytes() == (reference / "model.pt").read_bytes()


def test_resume_on_other_data_or_family_is_refused(reference, place, folders):
    shutil.copy(reference / "model.pt", place)
    result = call("--resume", "--epochs", 3, "--dataset", "folder", "--data_root", folders["grey"], *COMMON)
    assert_error(result, 1, "digits", "--data_root")
    assert_error(call("--resume", "--epochs", 3, "--model", "classifier", *COMMON), 2, "diffusion", "--model")


def test_resume_of_exported_weights_is_refused(model_file):
    ok(*INFER, "--export", "slim.pt")
    assert Path("slim.pt").stat().st_size < model_file.stat().st_size / 5
    result = call("--resume", "--epochs", 9, *COMMON, "--checkpoint", "slim.pt")
    assert_error(result, 1, "averaged weights", "--mode train")
    with recorded_grids() as slim:
        ok(*INFER, "--checkpoint", "slim.pt")
    with recorded_grids() as full:
        ok(*INFER)
    a, b = (g["final_samples.png"].images.int() for g in (slim, full))
    assert (a - b).abs().float().mean() < 2  # half precision: hardly another picture


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_process_saves_and_stops(reference, place, python, number, code):
    process = python(driver(place, WAIT_AFTER_30), *RUN, cwd=place)
    for line in process.stdout:
        if line.startswith("pid"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in err and "--resume" in err
    assert read("model.pt")["step"] == 30
    ok(*RUN, "--resume")
    assert_same_run(place, reference)


KILLED_IN_A_STEP = """
forward = ig.DiffusionModel.forward
def die(self, *arguments):
    die.calls = getattr(die, "calls", 0) + 1
    if die.calls == 34:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *arguments)
ig.DiffusionModel.forward = die
"""
KILLED_WHILE_WRITING = """
replace = os.replace
def die(source, target):
    if str(target).endswith("model.pt"):
        die.calls = getattr(die, "calls", 0) + 1
        if die.calls == 4:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = die
"""


@pytest.mark.parametrize("body, step", [(KILLED_IN_A_STEP, None), (KILLED_WHILE_WRITING, 15)],
                         ids=["in a step", "while writing"])
def test_killed_run_resumes_from_its_last_checkpoint(reference, place, python, body, step):
    process = python(driver(place, body), *RUN, cwd=place)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    state = read("model.pt")
    assert step in (None, state["step"]) and 0 < state["step"] < STEPS
    if step:
        assert list(place.glob(".*.part")), "this test should have left half a file behind"
    ok(*INFER)
    ok(*RUN, "--resume")
    assert_same_run(place, reference)


# === more than one process ===


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def losses(folder) -> list[tuple]:
    return [(r["step"], r["loss"]) for r in records(folder)]


def assert_nearly_same_run(folder, reference) -> None:
    """Equal up to the order of float additions."""
    for (step, loss), (expected_step, expected) in zip(losses(folder / "results"), losses(reference / "results")):
        assert step == expected_step and loss == pytest.approx(expected, rel=2e-3)
    found, expected = (read(path / "model.pt") for path in (folder, reference))
    assert found["step"] == expected["step"] and len(found["history"]) == len(expected["history"])
    for key, weights in expected["ema"].items():
        torch.testing.assert_close(found["ema"][key], weights, rtol=0.02, atol=2e-3)


def test_two_processes_train_the_same_model_and_the_first_alone_writes(reference, place, python, classifier):
    port, processes = str(free_port()), []
    for rank in range(2):
        home = place / f"rank{rank}"
        home.mkdir()
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port}
        processes.append(python(driver(home, ""), *RUN, "--classifier", classifier, "--eval_samples", 41, cwd=home,
                                env=environment))
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert_nearly_same_run(place / "rank0", reference)
    assert [path.name for path in (place / "rank1").iterdir()] == ["driver.py"]
    drawn = pixels("rank0/results/final_samples.png").astype(int)
    assert np.abs(drawn - pixels(reference / "results/final_samples.png")).mean() < 1
    # what two processes drew and measured is what one draws and measures
    Path("single").mkdir()
    os.chdir("single")
    ok(*RUN, "--classifier", classifier, "--eval_samples", 41)
    os.chdir("..")
    two, one = ([r["fid_digits_cnn"] for r in records(f"{name}/results") if "fid_digits_cnn" in r]
                for name in ("rank0", "single"))
    assert two and two == pytest.approx(one, rel=0.02)


def test_run_of_two_processes_stops_with_torchrun_and_resumes_alone(reference, place, python):
    arguments = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, driver(place, WAIT_AFTER_30))
    process = python(*arguments, *RUN, cwd=place)
    pids = []
    for line in process.stdout:
        pids += map(int, re.findall(r"pid (\d+)", line))
        if len(pids) == 2:
            break
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and len(pids) == 2, err
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert 30 <= read("model.pt")["step"] <= 32, err
    ok(*RUN, "--resume")
    assert_nearly_same_run(place, reference)


def test_batch_that_can_not_be_shared_is_a_usage_error():
    world = ig.World("cpu")
    world.size = 3
    images = ig.load_digits(None, None)
    with pytest.raises(ig.UserError, match="--batch_size 64.*3 processes") as caught:
        ig.Trainer(build("diffusion", images.info()), images, world, torch.float32, False, Path("m.pt"), Path("r"))
    assert caught.value.code == 2


# === divergence ===


def poison(monkeypatch, factor: float, after: int = 32) -> None:
    original, calls = ig.DiffusionModel.losses, itertools.count(1)

    def losses(self, batch):
        for player, loss, stats in original(self, batch):
            yield player, loss * (factor if next(calls) > after else 1), stats

    monkeypatch.setattr(ig.DiffusionModel, "losses", losses)


@pytest.mark.parametrize("save_every, after, kept", [(5, 32, 30), (500, 23, 22)])  # noticed when saving; when logging
def test_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(
        save_every, after, kept, monkeypatch):
    poison(monkeypatch, math.nan, after)
    result = call(*TRAIN, "--epochs", 2, "--save_every", save_every)
    assert_error(result, 1, "model.pt", "--learning_rate", bars=True)
    state = read("model.pt")
    assert state["step"] == kept and finite(state)
    assert all(math.isfinite(line["loss"]) for line in records("results"))
    assert not list(Path().rglob("*.part"))


def test_resume_after_divergence_starts_from_the_last_good_checkpoint(reference, place):
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, math.nan)
        call(*RUN)
    ok(*RUN, "--resume")
    assert_same_run(place, reference)


def test_exploding_loss_stops_the_run(monkeypatch):
    poison(monkeypatch, 1e6)
    assert_error(call(*RUN), 1, "loss", "--learning_rate", bars=True)
    assert finite(read("model.pt"))


@pytest.mark.parametrize("batch", [64, 1437])  # with 1437 the first epoch is one step, whose own loss is still fine
def test_gigantic_rate_is_one_error_and_no_useless_checkpoint(batch, model_file):
    before = model_file.read_bytes()
    result = call(*TRAIN, "--learning_rate", 1e30, "--warmup_steps", 0, "--batch_size", batch, "--epochs", 3)
    assert_error(result, 1, "diverged", "--learning_rate", bars=True)
    assert any(path.read_bytes() == before for path in Path().glob("*.pt"))
    for line in records("results"):
        assert all(not isinstance(value, float) or math.isfinite(value) for value in line.values())


# === hostile checkpoints ===


class Payload:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return (open, (str(Path("pwned").absolute()), "w"))


def write_hostile(kind: str, whole: Path) -> None:
    path, state = Path("model.pt"), read(whole)
    if kind == "missing":
        path.unlink(missing_ok=True)
    elif kind == "truncated":
        path.write_bytes(whole.read_bytes()[:-5000])
    elif kind == "cut early":
        path.write_bytes(whole.read_bytes()[:1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are not the weights\n" * 50)
    elif kind == "zip":
        shutil.make_archive("model", "zip", root_dir=whole.parent / "results")
        os.replace("model.zip", path)
    elif kind == "foreign":
        torch.save({}, path)
    elif kind == "weights only":
        torch.save(state["ema"], path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "pickled object":
        torch.save({"format": state["format"], "payload": Payload()}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "old pickle":
        torch.save({"payload": Payload()}, path, _use_new_zipfile_serialization=False)
    elif kind == "directory":
        path.unlink(missing_ok=True)
        path.mkdir()
    elif kind == "other version":
        torch.save(state | {"format": "image_gen/0"}, path)
    elif kind == "no version":
        torch.save({"format": 7}, path)
    elif kind == "unknown family":
        torch.save(state | {"family": "flow"}, path)


HOSTILE = {"missing": "--mode train", "truncated": "train again", "cut early": "model.pt", "empty": "train again",
           "text": "model.pt", "zip": "model.pt", "foreign": "--checkpoint", "weights only": "--checkpoint",
           "list": "--checkpoint", "pickled object": "--checkpoint", "plain pickle": "--checkpoint",
           "old pickle": "--checkpoint", "directory": "Is a", "other version": "image_gen/0", "no version": "format",
           "unknown family": "flow"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoint_is_one_error_line_and_never_run(kind, trained):
    write_hostile(kind, trained.folder / "model.pt")
    for command in (INFER, EVALUATE, ("--resume", *COMMON)):
        result = call(*command)
        assert_error(result, 1, HOSTILE[kind])
    assert not Path("pwned").exists()


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "pickled object", "directory"])
def test_hostile_classifier_is_one_error_line(kind, trained, model_file):
    write_hostile(kind, trained.folder / "model.pt")
    Path("model.pt").rename("classifier.pt") if kind != "missing" else None
    shutil.copy(trained.folder / "model.pt", "model.pt")
    assert_error(call(*EVALUATE, "--classifier", "classifier.pt"), 1, "classifier.pt")
    assert not Path("pwned").exists()


def test_classifier_of_the_wrong_family_or_data_is_refused(trained, model_file, folders, classifier):
    assert_error(call(*EVALUATE, "--classifier", "model.pt"), 1, "diffusion", "--classifier")
    ok("--dataset", "folder", "--data_root", folders["colour"], "--image_size", 8, "--epochs", 1, *SMALL, *COMMON,
       "--checkpoint", "colour.pt")
    result = call(*EVALUATE, "--checkpoint", "colour.pt", "--data_root", folders["colour"], "--classifier", classifier)
    assert_error(result, 1, "digits", "--classifier")


def mutilated(state: dict):
    """Checkpoints in the right format that lack or garble one of their parts."""
    for key in state:
        if key != "format":
            yield f"no {key}", {k: v for k, v in state.items() if k != key}
    for key, value in {"data": {}, "config": {"channels": 7}, "family": ["diffusion"], "ema": {}}.items():
        yield f"{key} {value}", state | {key: value}
    yield "config unknown", state | {"config": state["config"] | {"nonsense": 1}}
    yield "config type", state | {"config": state["config"] | {"channels": "many"}}
    yield "data type", state | {"data": state["data"] | {"classes": None}}
    yield "other shape", state | {"config": state["config"] | {"channels": 32}}


def test_checkpoint_that_lacks_a_part_never_ends_in_a_traceback(trained):
    state = read(trained.folder / "model.pt")
    for what, broken in mutilated(state):
        torch.save(broken, "model.pt")
        for command in (INFER, ("--resume", "--epochs", 7, *COMMON)):
            try:
                with signal_after(6 * 22 + 1):
                    result = call(*command)
            except Exception as error:
                raise AssertionError(f"{what}: {command} ended in {error!r}") from error
            if result.code not in (0, 143):
                assert result.code in (1, 2), what
                assert_error(result, result.code)


def test_random_damage_is_found_or_harmless():
    """A small file cut at many places and with many a byte changed: read, or refused in one sentence."""
    torch.save({"format": ig.FORMAT, "family": "diffusion", "x": torch.arange(6.0), "y": [1, "a", None]}, "whole.pt")
    torch.save({"format": ig.FORMAT, "z": torch.arange(3)}, "old.pt", _use_new_zipfile_serialization=False)
    rng = np.random.default_rng(0)
    for name in ("whole.pt", "old.pt"):
        content = Path(name).read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            if rng.random() < 0.4:
                del damaged[rng.integers(len(damaged)):]
            else:
                for place in rng.integers(len(damaged), size=rng.integers(1, 20)):
                    damaged[place] = rng.integers(256)
            Path("damaged.pt").write_bytes(damaged)
            with contextlib.suppress(ig.UserError):
                ig.load_checkpoint(Path("damaged.pt"), ig.FORMAT)


# === wrong use of the command line ===

USAGE = [
    (("--epochs", "0"), "--epochs"), (("--epochs", "-3"), "--epochs"), (("--epochs", "1.5"), "--epochs"),
    (("--epochs", "many"), "--epochs"), (("--batch_size", "0"), "--batch_size"),
    (("--learning_rate", "-0.001"), "--learning_rate"), (("--learning_rate", "0"), "--learning_rate"),
    (("--learning_rate", "nan"), "--learning_rate"), (("--learning_rate", "inf"), "--learning_rate"),
    (("--num_samples", "0"), "--num_samples"), (("--num_samples", "-1"), "--num_samples"),
    (("--steps", "0"), "--steps"), (("--steps", "1001"), "--steps"), (("--sample_batch", "0"), "--sample_batch"),
    (("--seed", "-1"), "--seed"), (("--seed", "99999999999999999999999"), "--seed"), (("--channels", "20"), "16"),
    (("--guidance", "-1"), "--guidance"), (("--sampler", "euler"), "dpm++"), (("--mode", "draw"), "infer"),
    (("--model", "flow"), "diffusion"), (("--dataset", "cifar"), "digits"), (("--device", "gpu"), "cuda:N"),
    (("--device", "cuda:x"), "cuda:N"), (("--device", "cuda:\u00b2"), "cuda:N"),
    (("--precision", "float16"), "bfloat16"),
    (("--epoch", "3"), "--epoch"), (("--num", "3"), "--num"), (("--learning-rate", "1"), "--learning-rate"),
    (("--nonsense",), "--nonsense"), (("stray",), "stray"), (("--epochs",), "--epochs"),
    (("--label", "10"), "0, 1, 2"), (("--label", "-1"), "0, 1, 2"), (("--label", "seven"), "0, 1, 2"),
    (("--label", ""), "--label"), (("--label", "1,,2"), "--label"), (("--label", "1.0"), "--label"),
    (("--dataset", "folder"), "--data_root"), (("--width", "8"), "classifier"), (("--levels", "5"), "--levels"),
    (("--output_dir", "x"), "infer"), (("--export", "x"), "infer"), (("--image_size", "16"), "--image_size"),
    (("--model", "classifier", "--guidance", "2"), "diffusion"), (("--inception_weights", "x"), "inception"),
    (("--data_root", "."), "scikit-learn"), (("--prepare_data", "--data_root", "."), "scikit-learn"),
    *((("--model", "classifier", flag, "2"), f"{flag} ") for flag in (
        "--num_samples", "--label", "--sample_batch", "--eval_samples", "--classifier")),
]


@pytest.mark.parametrize("flags, word", USAGE, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_wrong_flag_is_a_usage_error(flags, word, monkeypatch):
    monkeypatch.setattr(ig.Trainer, "train_step", lambda self: pytest.fail("training started"))
    assert_error(call("--dataset", "digits", *COMMON, *flags), 2, word)
    assert not Path("model.pt").exists()


@pytest.mark.parametrize("flags, word", [
    (("--label", "10"), "0, 1, 2"), (("--label", "x"), "0, 1, 2"), (("--num_samples", "0"), "--num_samples"),
    (("--steps", "0"), "--steps"), (("--channels", "16"), "--mode train"), (("--objective", "noise"), "--mode train"),
    (("--epochs", "3"), "--mode train"), (("--resume",), "--mode train"), (("--width", "8"), "--width"),
    (("--eval_samples", "20"), "--mode"), (("--model", "classifier"), "diffusion"), (("--dataset", "mnist"), "digits"),
    (("--image_size", "16"), "8"), (("--sampl", "ddim"), "--sampl"), (("--compile",), "--mode train"),
    (("--data_root", "."), "--task"), (("--input", "a.png"), "--task"), (("--frames", "3"), "--task"),
    (("--ood_root", "."), "--task ood"), (("--compare", "a.pt"), "--mode evaluate"), (("--task", "dream"), "traverse"),
])
def test_flag_that_inference_can_not_honour_is_a_usage_error(model_file, flags, word):
    assert_error(call(*INFER, *flags), 2, word)
    assert not Path("results/final_samples.png").exists()


@pytest.mark.parametrize("flags", [("--num_samples", "3"), ("--sample_batch", "3"), ("--eval_samples", "20"),
                                   ("--output_dir", "out"), ("--fid_features", "cnn")])
def test_flag_about_drawing_is_a_usage_error_for_a_model_that_draws_nothing(classifier, flags):
    for mode in ("infer", "evaluate"):
        result = call("--mode", mode, *COMMON, "--checkpoint", classifier, *flags)
        assert_error(result, 2, flags[0], "no effect")
    assert_error(call("--resume", *COMMON, "--checkpoint", classifier, "--num_samples", 3), 2, "--model classifier")


def test_data_folder_is_a_usage_error_where_the_model_has_seen_digits(model_file):
    for command in (EVALUATE, ("--resume", *COMMON)):
        assert_error(call(*command, "--data_root", "."), 2, "--data_root", "scikit-learn")


@pytest.mark.parametrize("flags", [("--checkpoint", "a\nb.pt"), ("--label", "7\r\n8"), ("--no\nsuch", "1"),
                                   ("--results_dir", "file\n\n/below"), ("--seed", "1\u2028x")])
def test_line_break_in_an_argument_does_not_break_the_error(model_file, flags):
    Path("file\n\n").touch()
    result = call(*INFER, *flags)
    assert_error(result, result.code)
    assert len(result.err.splitlines()) == 1


def test_line_break_in_the_name_of_a_lost_file_does_not_break_the_error(model_file, monkeypatch):
    def vanish(*arguments, **options):
        raise FileNotFoundError(errno.ENOENT, "gone", "a\nb")

    monkeypatch.setattr(ig, "grid_image", vanish)
    assert_error(call(*INFER), 1, "a b: gone", bars=True)


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "x"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "0"}, {"RANK": "1"}, {"RANK": "1.5"},
    {"LOCAL_RANK": "-1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "2"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}],
    ids=lambda given: " ".join(f"{name}={value}" for name, value in given.items()))
def test_environment_that_torchrun_would_not_make_is_one_error(environment, model_file, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_error(call(*TRAIN), 2, "torchrun", "WORLD_SIZE")


def test_environment_that_torchrun_would_not_make_is_one_error_of_the_program_too(place, python):
    process = python(SCRIPT, *TRAIN, cwd=place, env={"WORLD_SIZE": "x"})
    out, err = process.communicate(timeout=120)
    assert_error(Result(process.returncode, out, err), 2, "torchrun", "'x'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99"])
def test_absent_gpu_is_an_error_and_never_replaced(device, model_file):
    for command in (INFER, TRAIN):
        assert_error(call(*command, "--device", device), 1, device, "--device cpu")


def test_index_beyond_the_gpus_is_an_error(model_file):
    assert_error(call(*INFER, "--device", "cuda:99"), 1, "cuda:99", "--device")


@pytest.mark.parametrize("flag", ["--results_dir", "--checkpoint"])
def test_folder_that_can_not_be_written_is_found_before_training(flag, monkeypatch):
    Path("file").write_text("in the way")
    monkeypatch.setattr(ig.Trainer, "train_step", lambda self: pytest.fail("training started"))
    assert_error(call(*TRAIN, flag, "file/below/x"), 1, "can't write", "file/below", "folder")


@pytest.mark.parametrize("flag", ["--results_dir", "--output_dir", "--export"])
def test_folder_that_can_not_be_written_is_one_error_when_drawing(flag, model_file):
    Path("file").write_text("in the way")
    assert_error(call(*INFER, flag, "file/below/x"), 1, "can't write", "file/below")


def test_folder_in_the_place_of_the_new_checkpoint_is_an_error_and_stays(monkeypatch):
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear diary")
    monkeypatch.setattr(ig.Trainer, "train_step", lambda self: pytest.fail("training started"))
    assert_error(call(*TRAIN, "--checkpoint", "mine"), 1, "mine", "folder")
    assert Path("mine/diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize("kind", ["itself", "absolute", "another way", "link", "read through a link"])
def test_export_never_replaces_the_checkpoint_that_it_reads(kind, model_file):
    before, flags = model_file.read_bytes(), ("--checkpoint", "model.pt")
    Path("folder").mkdir()
    Path("link.pt").symlink_to("model.pt")
    target = {"itself": "model.pt", "absolute": model_file, "another way": "folder/../model.pt", "link": "link.pt",
              "read through a link": "model.pt"}[kind]
    if kind == "read through a link":
        flags = ("--checkpoint", "link.pt")
    assert_error(call(*INFER, *flags, "--export", target), 2, "--export", "another file")
    assert model_file.read_bytes() == before and Path("link.pt").is_symlink()
    ok(*INFER, *flags, "--export", "new.pt")
    ok(*INFER, *flags, "--export", "new.pt")  # any other file may be written again
    assert "optimizers" not in read("new.pt") and model_file.read_bytes() == before


@contextlib.contextmanager
def disk_of(size: int):
    """No file may grow beyond this many bytes: what a full disk looks like to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_last_checkpoint(reference):
    """The disk is full from step 20 on; space comes back, and the run goes on as if nothing had been."""
    original, limits = ig.Trainer.train_step, contextlib.ExitStack()

    def train_step(self):
        original(self)
        if self.step == 18:
            limits.enter_context(disk_of(1_000_000))

    with pytest.MonkeyPatch.context() as patch, limits:
        patch.setattr(ig.Trainer, "train_step", train_step)
        result = call(*RUN)
    assert_error(result, 1, "can't write", "model.pt", "space", bars=True)
    assert read("model.pt")["step"] == 15 and not list(Path().rglob("*.part"))
    ok(*RUN, "--resume")
    assert_same_run(".", reference)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples_epoch_001.png", "final_samples.png"])
def test_full_disk_at_any_other_file_is_one_error_line(name, monkeypatch):
    real_open, real_replace = open, os.replace

    def full(path):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(file, mode="r", *rest, **more):
        if "a" in mode or "w" in mode:
            full(file)
        return real_open(file, mode, *rest, **more)

    monkeypatch.setattr("builtins.open", open_)
    monkeypatch.setattr(os, "replace", lambda source, target: (full(target), real_replace(source, target)))
    result = call(*TRAIN, "--epochs", 1)
    monkeypatch.undo()
    assert_error(result, 1, "can't write", name, bars=True)
    assert not list(Path().rglob("*.part"))


# === hostile data ===


def mnist_error(root) -> Result:
    return call("--dataset", "mnist", "--data_root", root, *COMMON, *SMALL)


def mini_idx(count: int, seed: int) -> tuple[bytes, bytes]:
    """Images and labels in MNIST's format."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return (struct.pack(">iiii", 2051, count, 28, 28) + images.tobytes(),
            struct.pack(">ii", 2049, count) + (np.arange(count) % 10).astype(np.uint8).tobytes())


@pytest.fixture
def mini_mnist(monkeypatch) -> dict[str, bytes]:
    """Four small files that both torchvision and the script take for MNIST: {name: content}."""
    from torchvision.datasets import MNIST
    files = dict(zip(("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
                      "t10k-labels-idx1-ubyte"), (*mini_idx(40, 0), *mini_idx(20, 1))))
    monkeypatch.setattr(ig, "MNIST_MD5", {name: hashlib.md5(content).hexdigest() for name, content in files.items()})
    monkeypatch.setattr(MNIST, "resources", [
        (f"{name}.gz", hashlib.md5(gzip.compress(content, mtime=0)).hexdigest()) for name, content in files.items()])
    monkeypatch.setattr(ig.time, "sleep", lambda seconds: None)
    return files


def write_mnist(root: Path, files: dict[str, bytes]) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


class Mirror:
    """A web server of this machine with MNIST's files. `faults[name]` is what goes wrong, one fault for each time that
    the body is fetched: an HTTP status, "half" (the connection breaks), "wrong" (another content) or "garbage" (an
    answer that is not HTTP)."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.faults: dict[str, list] = {}
        self.fetched: list[str] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rsplit("/", 1)[-1].removesuffix(".gz")
                if self.headers.get("Method") == "HEAD":  # torchvision's look for redirections
                    self.send_response(200)
                    self.end_headers()
                    return
                mirror.fetched.append(name)
                fault = mirror.faults[name].pop(0) if mirror.faults.get(name) else None
                body = gzip.compress(files[name], mtime=0)
                if fault == "wrong":
                    body = gzip.compress(b"<html>Please log in to this network</html>", mtime=0)
                if fault == "garbage":
                    self.wfile.write(b"\x00\x01\x02 what?\r\n\r\n")
                    return
                self.send_response(fault if isinstance(fault, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if fault == "half" else body)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/mnist"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mirror(mini_mnist, monkeypatch):
    server = Mirror(mini_mnist)
    monkeypatch.setenv("MNIST_MIRROR", server.url)
    monkeypatch.setenv("MNIST_MIRROR_ONLY", "1")
    yield server
    server.close()


PREPARE = ("--mode", "train", "--prepare_data", "--dataset", "mnist")


def test_mnist_is_downloaded_once_into_the_scripts_own_folder(mirror, mini_mnist, place):
    assert "40 training" in ok(*PREPARE).out
    raw = place / "script" / "data" / "MNIST" / "raw"
    assert all((raw / name).read_bytes() == content for name, content in mini_mnist.items())
    assert sorted(mirror.fetched) == sorted(mini_mnist)
    ok(*PREPARE)
    images = ig.load_mnist(None, None)
    assert len(mirror.fetched) == 4  # nothing was fetched again
    assert images.train.shape == (40, 1, 28, 28) and images.test.shape == (20, 1, 28, 28)
    assert images.train.numpy().tobytes() == mini_mnist["train-images-idx3-ubyte"][16:]
    assert images.train_labels.tolist() == [i % 10 for i in range(40)] and images.classes == list("0123456789")


@pytest.mark.parametrize("fault", [500, 404, "half", "wrong", "garbage"])
def test_fault_of_the_mirror_is_noticed_and_the_file_fetched_again(mirror, mini_mnist, place, fault):
    mirror.faults["t10k-images-idx3-ubyte"] = [fault]
    ok(*PREPARE)
    assert mirror.fetched.count("t10k-images-idx3-ubyte") == 2
    raw = place / "script" / "data" / "MNIST" / "raw"
    assert all((raw / name).read_bytes() == content for name, content in mini_mnist.items())


@pytest.mark.parametrize("fault", [503, "half", "wrong", "garbage"])
def test_mirror_that_never_delivers_is_given_up_with_status_3(mirror, fault):
    mirror.faults["train-labels-idx1-ubyte"] = [fault] * 100
    assert_error(call(*PREPARE), 3, "MNIST", "--data_root", "--dataset digits")
    assert 2 <= mirror.fetched.count("train-labels-idx1-ubyte") < 20
    mirror.faults.clear()
    ok(*PREPARE)


def test_machine_without_a_network_is_told_what_to_do(mini_mnist, monkeypatch):
    monkeypatch.setenv("MNIST_MIRROR", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MNIST_MIRROR_ONLY", "1")
    for command in (PREPARE, ("--dataset", "mnist", *COMMON, *SMALL)):
        assert_error(call(*command), 3, "MNIST can't be downloaded", "refused", "--data_root", "--dataset digits")
    assert not Path("model.pt").exists()


def test_next_mirror_is_tried(mirror, mini_mnist, monkeypatch):
    from torchvision.datasets import MNIST
    monkeypatch.delenv("MNIST_MIRROR_ONLY")
    monkeypatch.setattr(MNIST, "mirrors", [mirror.url + "/"])
    monkeypatch.setenv("MNIST_MIRROR", f"http://127.0.0.1:{free_port()}/closed")
    ok(*PREPARE)


def test_half_extracted_file_of_an_earlier_run_is_repaired(mirror, mini_mnist, place):
    raw = write_mnist(place / "script" / "data", mini_mnist)
    (raw / "train-images-idx3-ubyte").write_bytes(mini_mnist["train-images-idx3-ubyte"][:500])
    ok(*PREPARE)
    assert (raw / "train-images-idx3-ubyte").read_bytes() == mini_mnist["train-images-idx3-ubyte"]
    assert "train-images-idx3-ubyte" in mirror.fetched


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_file_of_the_user_is_an_error_and_stays(mirror, mini_mnist, place, damage):
    raw = write_mnist(place / "own", mini_mnist)
    name = "t10k-images-idx3-ubyte"
    content = {"truncated": mini_mnist[name][:-100], "altered": b"\x01" + mini_mnist[name][1:], "empty": b""}[damage]
    (raw / name).write_bytes(content)
    assert_error(mnist_error("own"), 1, name, "delete it")
    assert (raw / name).read_bytes() == content and not mirror.fetched


def test_whole_files_of_the_user_are_read_without_a_network(mini_mnist, place, monkeypatch):
    monkeypatch.setenv("MNIST_MIRROR", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MNIST_MIRROR_ONLY", "1")
    raw = write_mnist(place / "own", mini_mnist)
    before = sorted(raw.iterdir())
    ok(*PREPARE, "--data_root", "own")
    assert sorted(raw.iterdir()) == before
    (raw / "t10k-labels-idx1-ubyte").unlink()
    assert_error(mnist_error("own"), 3, "--data_root")  # a missing one would have to be fetched
    assert sorted(raw.glob("*ubyte")) == before[:1] + before[2:]


def test_download_to_a_full_disk_is_not_called_a_network_fault(mirror, monkeypatch):
    real_open = open

    def full(file, mode="r", *rest, **more):
        if str(file).endswith(".gz") and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_open(file, mode, *rest, **more)

    monkeypatch.setattr("builtins.open", full)
    assert_error(call(*PREPARE), 1, "can't write", "--data_root")


@pytest.mark.real_data
def test_real_mnist_is_what_everyone_knows(mnist_root):
    images = ig.load_mnist(mnist_root, None)
    assert images.train.shape == (60_000, 1, 28, 28) and images.test.shape == (10_000, 1, 28, 28)
    assert images.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.train.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert images.info()["class_counts"][1] == 6742


@pytest.mark.real_data
def test_truncated_file_of_the_real_mnist_is_found(mnist_root, place):
    raw = place / "own" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ig.MNIST_MD5:
        (raw / name).symlink_to(mnist_root / "MNIST" / "raw" / name)
    name = "train-images-idx3-ubyte"
    (raw / name).unlink()
    (raw / name).write_bytes((mnist_root / "MNIST" / "raw" / name).read_bytes()[:-1])
    assert_error(mnist_error("own"), 1, name, "delete it")


def folder_error(root, *flags) -> Result:
    return call("--dataset", "folder", "--data_root", root, "--image_size", 8, *COMMON, *SMALL, *flags)


@pytest.mark.parametrize("kind, code, words", [
    ("empty", 1, ("0 image", "two")), ("one image", 1, ("1 image", "two")), ("missing", 1, ("not a folder",)),
    ("a file", 1, ("not a folder",)), ("text", 1, ("note.png", "repair or remove")),
    ("nothing", 1, ("hollow.png", "repair or remove")), ("truncated png", 1, ("cut.png", "repair or remove")),
    ("truncated jpeg", 1, ("cut.jpg", "repair or remove")), ("truncated tiff", 1, ("cut.tif", "repair or remove")),
    ("empty split", 1, ("train", "two")),
])
def test_folder_that_holds_no_usable_pictures_is_one_error(kind, code, words, folders, place):
    root = place / "pictures"
    if kind not in ("missing", "a file"):
        shutil.copytree(folders["grey"], root)
    if kind in ("empty", "one image"):
        for path in sorted(root.rglob("*.png"))[kind == "one image":]:
            path.unlink()
    elif kind == "a file":
        root.write_text("not a folder")
    elif kind == "text":
        (root / "note.png").write_text("I am a text.\n")
    elif kind == "nothing":
        (root / "hollow.png").touch()
    elif kind == "truncated png":
        content = next(root.rglob("*.png")).read_bytes()
        (root / "cut.png").write_bytes(content[:len(content) // 2])
    elif kind in ("truncated jpeg", "truncated tiff"):
        path = root / ("cut." + kind.split()[1][:3].replace("jpe", "jpg"))
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
        content = path.read_bytes()
        path.write_bytes(content[:1500] if path.suffix == ".jpg" else content[:50])
    elif kind == "empty split":
        root = place / "split"
        (root / "train").mkdir(parents=True)
        (root / "test").mkdir()
    assert_error(folder_error(root), code, *words)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_picture_cut_anywhere_is_read_or_refused(suffix, place):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    image.save(f"whole.{suffix}")
    content = Path(f"whole.{suffix}").read_bytes()
    assert ig.open_image(Path(f"whole.{suffix}")).size == (24, 24)
    cut = Path(f"cut.{suffix}")
    for length in np.linspace(0, len(content) - 1, 40).astype(int):
        cut.write_bytes(content[:length])
        with contextlib.suppress(ig.UserError):
            ig.open_image(cut)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(min(len(damaged), 200), size=4):
            damaged[position] = rng.integers(256)
        cut.write_bytes(damaged)
        with contextlib.suppress(ig.UserError):
            ig.open_image(cut)


def picture(name: str) -> np.ndarray:
    image = ig.open_image(Path(name))
    assert image.mode in ("L", "RGB")
    return np.asarray(image)


LEVELS = np.array([[0, 50], [200, 255]], dtype=np.uint8)
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], dtype=np.uint8)


def test_alpha_is_laid_on_white():
    alpha = np.array([[255, 0], [128, 255]], dtype=np.uint8)
    Image.fromarray(np.dstack([COLOURS, alpha])).save("a.png")
    found = picture("a.png").astype(int)
    assert found[0, 0].tolist() == [255, 0, 0] and found[0, 1].tolist() == [255, 255, 255]
    assert np.abs(found[1, 0] - [127, 127, 255]).max() <= 1
    Image.fromarray(np.dstack([LEVELS, alpha])).save("la.png")
    assert np.abs(picture("la.png").astype(int) - [[0, 255], [227, 255]]).max() <= 1


def test_palette_is_expanded_and_its_transparent_colour_is_white():
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1, 1, 0])
    image.save("p.png")
    assert picture("p.png").tolist() == [[[10, 20, 30], [200, 100, 0]], [[200, 100, 0], [10, 20, 30]]]
    image.save("t.png", transparency=0)
    assert picture("t.png").tolist() == [[[255] * 3, [200, 100, 0]], [[200, 100, 0], [255] * 3]]
    image.putpalette([7, 7, 7, 200, 200, 200])
    image.save("g.gif")
    assert picture("g.gif").tolist() == [[7, 200], [200, 7]]  # without colour: grey


@pytest.mark.parametrize("levels, expected", [
    ([[0, 257 * 50], [257 * 200, 65535]], LEVELS.tolist()),
    ([[0, 100], [150, 200]], [[0, 0], [1, 1]]),  # nearly black, however few of the 16 bits are in use
])
def test_sixteen_bits_are_scaled_to_eight(levels, expected):
    Image.fromarray(np.array(levels, dtype=np.uint16)).save("deep.png")
    with Image.open("deep.png") as image:
        assert image.mode.startswith("I")
    assert picture("deep.png").tolist() == expected


def test_one_bit_is_black_and_white():
    Image.fromarray(np.array([[True, False], [False, True]])).save("bit.png")
    with Image.open("bit.png") as image:
        assert image.mode == "1"
    assert picture("bit.png").tolist() == [[255, 0], [0, 255]]


def test_print_colours_become_screen_colours():
    image = Image.fromarray(np.full((16, 16, 3), (250, 20, 20), dtype=np.uint8)).convert("CMYK")
    image.save("cmyk.jpg", quality=95)
    assert np.abs(picture("cmyk.jpg").astype(int) - [250, 20, 20]).max() < 12


def test_other_colour_spaces_are_read_or_refused():
    Image.new("LAB", (4, 4)).save("lab.tif")
    Image.new("YCbCr", (4, 4)).save("y.jpg")
    assert picture("y.jpg").shape == (4, 4, 3)
    with contextlib.suppress(ig.UserError):
        picture("lab.tif")


def test_animation_is_its_first_frame():
    frames = [Image.new("L", (4, 4), level) for level in (40, 90, 250)]
    frames[0].save("move.gif", save_all=True, append_images=frames[1:])
    assert picture("move.gif").tolist() == [[40] * 4] * 4


def test_photograph_is_turned_upright():
    image = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], dtype=np.uint8), 16, 0), 16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left half comes to the top
    image.save("turned.jpg", exif=exif, quality=95)
    found = picture("turned.jpg")
    assert found.shape == (32, 16) and found[:12].mean() < 20 and found[20:].mean() > 235


def test_folder_is_cropped_resized_labelled_and_split(folders):
    images = ig.load_folder(folders["colour"], 8)
    assert images.train.shape[1:] == (3, 8, 8) and images.train.dtype == torch.uint8
    assert len(images.train) == 22 and len(images.test) == 2
    assert images.classes == ["bar", "disc"] and images.title == "colour"
    assert torch.bincount(torch.cat([images.train_labels, images.test_labels])).tolist() == [12, 12]
    again = ig.load_folder(folders["colour"], 8)
    assert torch.equal(images.train, again.train) and torch.equal(images.test_labels, again.test_labels)
    assert ig.load_folder(folders["grey"], 8).train.shape[1:] == (1, 8, 8)
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 200  # a centred square is kept
    Path("mixed").mkdir()
    Image.fromarray(wide).save("mixed/a.png")
    Image.fromarray(np.full((9, 9, 3), (1, 2, 3), dtype=np.uint8)).save("mixed/b.PNG")
    Path("mixed/readme.txt").write_text("not a picture")
    mixed = ig.load_folder(Path("mixed"), 4)
    both = torch.cat([mixed.train, mixed.test])
    assert both.shape == (2, 3, 4, 4) and mixed.classes == [""]
    assert sorted(both.flatten(1).float().mean(1).tolist()) == pytest.approx([2, 200], abs=10)  # smoothed a little


def test_folder_with_a_split_keeps_it(folders, place):
    for part, count in (("train", 6), ("test", 2)):
        for kind in ("bar", "disc"):
            (place / "s" / part / kind).mkdir(parents=True)
            for path in sorted((folders["grey"] / kind).iterdir())[:count]:
                shutil.copy(path, place / "s" / part / kind)
    images = ig.load_folder(place / "s", 8)
    assert (len(images.train), len(images.test), images.classes) == (12, 4, ["bar", "disc"])
    (place / "s" / "test" / "cat").mkdir()
    shutil.copy(next((folders["grey"] / "bar").iterdir()), place / "s" / "test" / "cat")
    assert_error(folder_error("s"), 1, "'cat'", "train")


# === drawing ===


def test_each_image_is_a_file_with_the_pixels_of_the_picture(model_file):
    with recorded_grids() as grids:
        result = ok(*INFER, "--label", "7,0", "--num_samples", 5, "--output_dir", "out", "--sample_batch", 2)
    assert "results/final_samples.png" in result.out and "images/s" in result.out
    names = [f"{i:05d}_label{label}.png" for i, label in enumerate("70707")]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    grid = grids["final_samples.png"]
    assert grid.names == list("70") and grid.images.shape == (5, 1, 8, 8)
    canvas = Image.open("results/final_samples.png").convert("L")
    for name, image in zip(names, grid.images):
        own = pixels(f"out/{name}")
        assert own.shape == (8, 8) and np.array_equal(own, image[0].numpy())
        # the picture shows it enlarged: somewhere on the canvas is the same block, 12 times as large
        block = np.kron(own, np.ones((12, 12), dtype=np.uint8))
        assert contains(np.asarray(canvas), block), name


def contains(canvas: np.ndarray, block: np.ndarray) -> bool:
    height, width = block.shape
    ys, xs = np.nonzero(canvas[:canvas.shape[0] - height + 1, :canvas.shape[1] - width + 1] == block[0, 0])
    return any(np.array_equal(canvas[y:y + height, x:x + width], block) for y, x in zip(ys, xs))


def test_number_batch_and_seed_of_samples(model_file):
    def drawn(*flags):
        with recorded_grids() as grids:
            ok(*INFER, *flags)
        return grids["final_samples.png"].images.int()

    whole = drawn("--num_samples", 7)
    assert (drawn("--num_samples", 7, "--sample_batch", 3) - whole).abs().max() <= 1
    assert (drawn("--num_samples", 1) - whole[:1]).abs().max() <= 1
    assert not torch.equal(drawn("--num_samples", 7, "--seed", 1), whole)
    assert not torch.equal(drawn("--num_samples", 7, "--sampler", "ddim"), whole)
    assert len(drawn()) == 16


@pytest.mark.parametrize("sampler", sorted(ig.SAMPLERS))
@pytest.mark.parametrize("guidance", ["1", "0", "2.5"])
def test_every_sampler_draws_from_the_command_line(model_file, sampler, guidance):
    with recorded_grids() as grids:
        ok(*INFER, "--sampler", sampler, "--guidance", guidance, "--steps", 5, "--num_samples", 3)
    drawing = grids["final_samples.png"]
    assert len(drawing.images) == 3 and drawing.images.float().std() > 10 and sampler in drawing.title


def test_default_label_order_goes_through_all_classes(model_file):
    with recorded_grids() as grids:
        ok(*INFER, "--num_samples", 12, "--output_dir", "out", "--sample_batch", 5)
    assert grids["final_samples.png"].names == list("0123456789")
    assert [path.stem[-1] for path in sorted(Path("out").iterdir())] == list("012345678901")


def test_names_stand_below_the_images_in_turn():
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for path, names in (("turn.png", ["a", "b"]), ("each.png", list("ababa")), ("other.png", list("abaab"))):
        ig.grid_image(images, Path(path), "title", names)
    assert np.array_equal(pixels("turn.png"), pixels("each.png"))
    assert not np.array_equal(pixels("turn.png"), pixels("other.png"))


def test_memory_for_drawing_does_not_grow_with_the_number_of_images(model_file, monkeypatch):
    """Stopped after a few of very many: until then no list of all of them may have been made."""
    seen = []

    def sample(self, labels, noise):
        seen.append(labels.tolist())
        if len(seen) == 150:
            raise KeyboardInterrupt
        return torch.zeros(len(labels), 1, 8, 8)

    monkeypatch.setattr(ig.DiffusionModel, "sample", sample)
    tracemalloc.start()
    try:
        flags = ("--num_samples", 20_000_000, "--sample_batch", 3, "--label", "5,6,7,8")
        assert_error(call(*INFER, *flags), 130, "stopped", bars=True)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(seen) == 150 and list(itertools.chain(*seen)) == [5 + i % 4 for i in range(450)]
    seen.clear()
    assert_error(call(*INFER, "--num_samples", sys.maxsize, "--sample_batch", 1), 130, "stopped", bars=True)
    assert_error(call(*INFER, "--num_samples", sys.maxsize + 1), 2, "--num_samples")


def test_training_draws_no_more_images_than_its_pictures_show(monkeypatch):
    numbers, original = [], ig.generate_all
    monkeypatch.setattr(ig, "generate_all", lambda *a, **k: numbers.append(a[2]) or original(*a, **k))
    with recorded_grids() as grids:
        ok(*TRAIN, "--epochs", 1, "--steps", 1, "--num_samples", 10 ** 9, "--batch_size", 700)
    assert set(numbers) == {400} and len(grids["final_samples.png"].images) == 400


def test_missing_checkpoint_falls_back_on_shipped_weights_only_when_none_was_named(trained, place):
    assert_error(call("--mode", "infer", "--dataset", "digits"), 1, "--mode train", "--checkpoint")
    ok(*INFER[:-4], "--checkpoint", trained.folder / "model.pt", "--export",
       place / "script" / "pretrained" / "diffusion_mnist.pt")
    shutil.rmtree(place / "results", ignore_errors=True)
    result = ok("--mode", "infer")
    assert "shipped" in result.out and str(place / "script" / "pretrained") in result.out
    assert (place / "script" / "results" / "final_samples.png").exists()
    assert_error(call("--mode", "infer", "--checkpoint", "other.pt"), 1, "other.pt")
    (place / "script" / "models").mkdir()
    shutil.copy(trained.folder / "model.pt", place / "script" / "models" / "diffusion_model.pt")
    result = ok("--mode", "infer")
    assert "shipped" not in result.out and "diffusion_model.pt" in result.out


def test_classifier_says_that_it_draws_nothing(classifier):
    assert_error(call(*INFER, "--checkpoint", classifier), 1, "--model diffusion")


# === measuring ===


def test_classifier_learns_the_digits(classifier):
    ok(*EVALUATE, "--checkpoint", classifier)
    report = json.loads(Path("results/evaluation.json").read_text())
    assert report["metrics"]["val_accuracy"]["value"] > 0.95
    assert report["metrics"]["val_accuracy"]["n"] == 360 and report["metrics"]["val_accuracy"]["reference"] == "test"
    # the same figure by hand
    images, model = ig.load_digits(None, None), ig.restore_model(read(classifier)).eval()
    with torch.no_grad():
        right = (model(ig.to_float(images.test))[1].argmax(1) == images.test_labels).float().mean().item()
    assert report["metrics"]["val_accuracy"]["value"] == pytest.approx(right, abs=1e-6)


def evaluation(*flags) -> dict:
    ok(*EVALUATE, *flags)
    return json.loads(Path("results/evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_every_metric_stands_beside_its_floor(classifier):
    """A model that has learned nothing, against real images in its place."""
    ok(*TRAIN, "--epochs", 1, "--learning_rate", 1e-9)
    report = evaluation("--classifier", classifier)
    assert report["dataset"].startswith("digits") and report["num_samples"] == 360
    assert {"sampler", "steps", "guidance", "seed", "network_evaluations", "sampling_seconds",
            "checkpoint_sha256"} <= report.keys()
    assert report["checkpoint_sha256"] == hashlib.sha256(Path("model.pt").read_bytes()).hexdigest()
    metrics = report["metrics"]
    named = {f"{name}_digits_cnn" for name in ("fid", "is", "kid", "precision", "recall")}
    assert named | {"class_share_min", "class_share_max", "label_agreement", "near_copies"} <= metrics.keys()
    for key, entry in metrics.items():
        kind = int if key == "classes_covered" else float
        assert isinstance(entry["value"], kind) and isinstance(entry["floor"], kind), key
        assert entry["n"] == 360 and entry["reference"] == "test" and entry["n_reference"] == 360
        if key != "near_copies":
            assert entry["feature_net"] == "digits_cnn"
            assert entry["feature_net_sha256"] == hashlib.sha256(classifier.read_bytes()).hexdigest()
    value, floor = ({key: entry[kind] for key, entry in metrics.items()} for kind in ("value", "floor"))
    assert 0 <= floor["fid_digits_cnn"] * 4 < value["fid_digits_cnn"]
    assert abs(floor["kid_digits_cnn"]) * 4 < value["kid_digits_cnn"]
    assert value["is_digits_cnn"] < floor["is_digits_cnn"] and floor["is_digits_cnn"] > 6
    assert floor["precision_digits_cnn"] > 0.85 and floor["recall_digits_cnn"] > 0.8
    assert value["precision_digits_cnn"] < floor["precision_digits_cnn"]
    assert floor["label_agreement"] > 0.95 > 0.3 > value["label_agreement"]
    assert 0.06 < floor["class_share_min"] < 0.1 < floor["class_share_max"] < 0.15
    assert floor["classes_covered"] == 10 and 0.98 < floor["class_balance"] <= 1


@pytest.mark.parametrize("source", ["train", "test"])
def test_model_that_copies_its_data_is_found_out(model_file, classifier, monkeypatch, source):
    """Copies of training images have the FID of real ones and are near copies, all of them. New real images are not."""
    images = ig.load_digits(None, None)
    pool, labels_of_pool = getattr(images, source), getattr(images, f"{source}_labels")

    def sample(self, labels, noise):
        picks = []
        for label, generator in zip(labels.tolist(), noise.generators):
            own = (labels_of_pool == label).nonzero()[:, 0]
            picks.append(own[torch.randint(len(own), (1,), generator=generator)])
        return ig.to_float(pool[torch.cat(picks)])

    monkeypatch.setattr(ig.DiffusionModel, "sample", sample)
    metrics = evaluation("--classifier", classifier)["metrics"]
    assert metrics["near_copies"]["value"] == (1 if source == "train" else pytest.approx(0.01, abs=0.02))
    assert metrics["near_copies"]["floor"] <= 0.02
    fid, floor = (metrics["fid_digits_cnn"][kind] for kind in ("value", "floor"))
    assert fid < 3 * floor + 1
    assert metrics["label_agreement"]["value"] > 0.95 and metrics["precision_digits_cnn"]["value"] > 0.9


def test_metric_that_can_not_be_computed_is_null_with_its_reason(model_file, classifier):
    metrics = evaluation("--classifier", classifier, "--eval_samples", 20)["metrics"]
    assert metrics["fid_digits_cnn"]["value"] is None
    assert "20" in metrics["fid_digits_cnn"]["reason"] and "32" in metrics["fid_digits_cnn"]["reason"]
    assert isinstance(metrics["kid_digits_cnn"]["value"], float)
    metrics = evaluation("--classifier", classifier, "--eval_samples", 3)["metrics"]
    assert all(entry["value"] is not None or entry["reason"] for entry in metrics.values())
    for key in ("kid_digits_cnn", "kid_digits_cnn_std", "precision_digits_cnn", "recall_digits_cnn"):
        assert metrics[key]["value"] is None and "3 images" in metrics[key]["reason"]
    metrics = evaluation("--classifier", classifier, "--eval_samples", 4)["metrics"]
    assert all(isinstance(metrics[key]["value"], float) for key in ("kid_digits_cnn_std", "recall_digits_cnn"))


def test_evaluation_without_a_classifier_says_so(model_file):
    metrics = evaluation("--eval_samples", 50)["metrics"]
    assert metrics["fid"]["value"] is None and "--model classifier" in metrics["fid"]["reason"]
    assert isinstance(metrics["near_copies"]["value"], float)
    assert_error(call(*EVALUATE, "--fid_features", "cnn"), 1, "--model classifier")


def test_evaluation_is_repeatable_and_takes_sampling_flags(model_file, classifier):
    first, second, other = (evaluation("--classifier", classifier, "--eval_samples", 60, "--sampler", sampler)
                            for sampler in ("ddim", "ddim", "heun"))
    assert first["metrics"] == second["metrics"] != other["metrics"]
    assert (first["sampler"], other["sampler"]) == ("ddim", "heun")


def test_evaluation_on_other_data_is_refused(folders, place):
    shutil.copytree(folders["grey"], "pictures")
    ok("--dataset", "folder", "--data_root", "pictures", "--image_size", 8, "--epochs", 1, *COMMON, *SMALL)
    assert_error(call(*EVALUATE), 2, "--data_root")
    next(Path("pictures").rglob("*.png")).unlink()
    assert_error(call(*EVALUATE, "--data_root", "pictures"), 1, "--data_root")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file with random weights in the shapes of the Inception network."""
    from torch_fidelity import feature_extractor_inceptionv3 as module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = module.FeatureExtractorInceptionV3("x", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()},
               path)
    return path


def test_inception_metrics_from_a_file_of_weights(model_file, inception_weights):
    report = evaluation("--fid_features", "inception", "--inception_weights", inception_weights, "--eval_samples", 4)
    metrics = report["metrics"]
    assert metrics["fid_inception"]["value"] is None and "2048" in metrics["fid_inception"]["reason"]
    for key in ("is_inception", "kid_inception"):
        assert math.isfinite(metrics[key]["value"]) and math.isfinite(metrics[key]["floor"])
        assert metrics[key]["feature_net"] == "inception" and metrics[key]["n"] == 4
        assert metrics[key]["feature_net_sha256"] == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert metrics["is_inception"]["value"] >= 1
    assert metrics["label_agreement"]["value"] is None and metrics["label_agreement"]["reason"]


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "truncated", "foreign", "pickle", "directory"])
def test_file_that_is_not_the_inception_weights_is_one_error(kind, model_file, request):
    path = Path("weights.pth")
    if kind == "text":
        path.write_text("not weights")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(request.getfixturevalue("inception_weights").read_bytes()[:100_000])
    elif kind == "foreign":
        torch.save({"some": torch.ones(3)}, path)
    elif kind == "pickle":
        torch.save(Payload(), path)
    elif kind == "directory":
        path.mkdir()
    result = call(*EVALUATE, "--fid_features", "inception", "--inception_weights", path, "--eval_samples", 4)
    assert_error(result, 1, "weights.pth", "--inception_weights")
    assert not Path("pwned").exists()


def test_inception_weights_that_can_not_be_fetched_are_one_error(model_file, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(Path("hub").absolute()))
    assert_error(call(*EVALUATE, "--fid_features", "inception"), 1, "--inception_weights", "https://")


# === the script as a text, and as a program ===


def test_help_names_every_flag():
    text = ok("--help").out
    flags = [s for action in ig.build_parser()._actions for s in action.option_strings if s.startswith("--")]
    assert len(flags) > 35 and all(flag in text for flag in flags)
    assert "%(" not in text and "None)" not in text


def test_defaults_are_those_that_are_promised():
    config = ig.DiffusionConfig()
    assert (config.epochs, config.batch_size, config.learning_rate) == (20, 64, 1e-3)
    assert {"ddpm", "ddim", "heun", "dpm++"} == set(ig.SAMPLERS) and {"noise", "velocity", "flow"} <= set(OBJECTIVES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3


def test_functions_fit_a_screen():
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_shared_plumbing_stays_small_and_speaks_of_neither_images_nor_sound():
    block = SCRIPT.read_text().split("# >>> shared plumbing")[1].split("# <<< shared plumbing")[0]
    assert len(block.splitlines()) <= 200  # one of them is the rest of the opening line
    assert not re.search(r"image|picture|pixel|audio|sound|wave", block, re.IGNORECASE)


def test_table_of_contents_is_that_of_the_banners():
    banners = re.findall(r"^# === (.+) ===$", SCRIPT.read_text(), re.MULTILINE)
    listed = re.search(r"table of contents:\n\s+(.+)\n", ig.__doc__)[1].split(", ")
    assert banners == listed


LEAN = """
import sys
before = set(sys.modules)
import image_gen
assert "main" in dir(image_gen)
code = image_gen.main(sys.argv[1:])
heavy = {"matplotlib", "torchmetrics", "torch_fidelity", "sklearn", "scipy", "torchvision", "pandas"}
heavy &= sys.modules.keys()
print("heavy:", *sorted(heavy))
sys.exit(code)
"""


def test_script_alone_in_a_folder_draws_without_what_drawing_does_not_need(model_file, place):
    home = place / "alone here"
    home.mkdir()
    shutil.copy(SCRIPT, home)
    done = subprocess.run([sys.executable, "-c", LEAN, "--mode", "infer", "--checkpoint", str(model_file),
                           "--num_samples", "2"], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"
    assert {path.name for path in home.iterdir()} - {"__pycache__"} == {"image_gen.py", "results"}
    assert (home / "results" / "final_samples.png").exists()


def test_importing_the_script_runs_nothing():
    for node in ast.parse(SCRIPT.read_text()).body:
        allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        assert isinstance(node, allowed) or docstring or guard, f"line {node.lineno} does something when imported"


@pytest.fixture
def readme() -> str:
    if not README.exists():
        pytest.skip("README.md is not written yet")
    return README.read_text()


def test_readme_lists_every_flag_in_a_table(readme):
    rows = "\n".join(line for line in readme.splitlines() if line.startswith("|"))
    listed = set(re.findall(r"--[a-z0-9_]+(?:-[a-z0-9_]+)*", rows))
    flags = {s for action in ig.build_parser()._actions for s in action.option_strings if s.startswith("--")}
    assert flags - {"--help"} <= listed, f"missing: {sorted(flags - {'--help'} - listed)}"


def readme_commands(text: str) -> list[str]:
    """Command lines of image_gen.py in the README's code blocks and in `code` with flags."""
    blocks = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = blocks.splitlines() + re.findall(r"`([^`\n]*image_gen\.py --[^`\n]*)`", text)
    return [line for line in lines if re.search(r"\bimage_gen\.py\b", line) and not line.lstrip().startswith("#")]


def test_commands_of_the_readme_are_understood(readme):
    commands = readme_commands(readme)
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)
        start = next((i for i, word in enumerate(words) if word.endswith("image_gen.py")), None)
        if start is None or words[0] in ("cp", "grep", "cat", "less", "wc", "ls"):
            continue
        arguments = list(itertools.takewhile(lambda word: word not in ("&&", "||", ";", "|", ">", "2>", "&"),
                                             words[start + 1:]))
        if "--help" in arguments or any("…" in word or word == "..." for word in arguments):
            continue
        try:
            given = {"mode": "train"} | vars(ig.build_parser().parse_args(arguments))
            ig.check_flags(given, given.get("model", "diffusion"))
        except ig.UserError as error:
            raise AssertionError(f"{line}\n{error}") from None

"""image_gen.py: mathematics against oracles, every family on every dataset, whole runs on real digits, hostile data.

What both scripts share (trainer, checkpoints, command line ...) is tested in test_machine_room.py. The model is tiny,
the digits are scikit-learn's.
"""
import ast
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.server
import itertools
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import NamedTuple

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, Result, assert_error, differences, free_port, read, records
from PIL import Image
from torch import nn

SCRIPT = ROOT / "image_gen" / "image_gen.py"
CPU = torch.device("cpu")
ig = conftest.load_script("image_gen")
DRAW_CURVES = ig.draw_curves  # most tests do without

# --- helpers

COMMON = ("--device", "cpu", "--precision", "float32", "--checkpoint", "model.pt", "--results_dir", "results")
SMALL = ("--batch_size", "64", "--channels", "16", "--blocks", "1", "--warmup_steps", "5", "--steps", "3",
         "--num_samples", "4")
INFO = ig.DataInfo("digits", "digits", 1, 8, list("0123456789"), [10] * 10, 100)


def call(*arguments) -> Result:
    return conftest.call(ig, *arguments)


def ok(*arguments) -> Result:
    result = call(*arguments)
    assert result.code == 0, result.err
    return result


def stopped(*arguments, at: int) -> Result:
    with conftest.signal_after(ig, at):
        result = call(*arguments)
    assert result.code == 128 + signal.SIGTERM, result.err
    return result


class Payload:
    """Pickled Python that would leave a file behind where it is run."""

    def __reduce__(self):
        return open, ("pwned", "w")



TRAIN = (*COMMON, "--dataset", "digits", *SMALL)


INFER = ("--mode", "infer", *COMMON)


EVALUATE = ("--mode", "evaluate", *COMMON)


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


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test works in a folder of its own; the script's default folders lie there, too. No plots (slow)."""
    monkeypatch.setattr(ig, "HERE", tmp_path / "script")
    monkeypatch.setattr(ig, "draw_curves", lambda trainer: None)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MNIST_MIRROR"):
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
        return ig.load_folder(request.getfixturevalue("folders")[request.param], 8)
    root = request.getfixturevalue("mnist_root") if request.param == "mnist" else None
    return ig.load_images(ig.DataOptions(request.param, root))


TINY = {"diffusion": {"channels": 16, "blocks": 1, "steps": 3}, "classifier": {"width": 8, "features": 16},
        "vae": {"width": 8}, "gan": {"width": 8}}


def build(family: str, info: dict, seed: int = 0, **config):
    torch.manual_seed(seed)
    kind = ig.FAMILIES[family]
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


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 200, 1000])
def test_sampling_times_decrease_within_the_grid(steps):
    times = ig.NoiseSchedule().times(steps)
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


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_sampler_follows_the_exact_flow_of_a_gaussian(sampler):
    """For a Gaussian the probability flow is known: x keeps its distance to the mean in standard deviations. A sampler
    of order p has an error that falls by 2^p when the steps double."""
    schedule = ig.NoiseSchedule()
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
        drawn = ig.SAMPLERS[sampler](denoise, start.clone(), times, schedule)
        errors.append((drawn - exact).abs().mean().item())
    ratio = errors[0] / errors[1]
    if sampler == "ddim":
        assert errors[1] < 0.03 and 1.8 < ratio < 2.2
    else:
        assert errors[1] < 0.005 and 3 < ratio < 5  # its first and last steps are of first order
        assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.025)


@pytest.mark.parametrize("sampler, temperature", [("ddim", 1.0), ("dpm++", 1.0), ("dpm++", 0.5)])
def test_sampling_starts_with_as_much_noise_as_its_first_time_has(sampler, temperature):
    model = build("diffusion", INFO, sampler=sampler, steps=20, temperature=temperature)
    seen, expected = [], ig.Noise(0, range(3), CPU).normal(1, 8, 8)
    model.denoiser = lambda labels, count: lambda x, t: seen.append((x, t)) or torch.zeros_like(x)
    model.sample(None, ig.Noise(0, range(3), CPU))
    x, t = seen[0]
    assert t == model.noise_schedule.times(model.config.steps)[0] > 900
    torch.testing.assert_close(x, expected * temperature * model.noise_schedule.sigmas[t].item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_drawn_images_of_a_perfect_model_have_the_deviation_of_its_data(sampler):
    """These samplers stretch their noise alike everywhere, so that the deviation they end with can be told to a
    thousandth, however few the images: noise of deviation 1 at a time that has 0.988 is seen. (In colour, as what is
    nearly black or white is left as it was drawn.)"""
    model = build("diffusion", dataclasses.replace(INFO, channels=3), sampler=sampler, steps=200, temperature=1.0)
    model.denoiser = lambda labels, count: gaussian_denoiser(model.noise_schedule, MEAN, DEVIATION)
    drawn, noise = model.sample(None, ig.Noise(0, range(9), CPU)), ig.Noise(0, range(9), CPU).normal(3, 8, 8)
    expected = DEVIATION / math.hypot(1, 0.1 / DEVIATION)
    assert (drawn.std() / noise.std()).item() == pytest.approx(expected, rel=0.02 if sampler == "ddim" else 0.004)


@pytest.mark.parametrize("steps", [1, 5, 1000])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_any_number_of_steps_ends_at_the_image_that_the_model_knows(sampler, steps):
    """A model that always answers with one image must yield that image, whatever the path."""
    model = build("diffusion", INFO, sampler=sampler, steps=steps)
    image = torch.rand(2, 1, 8, 8) * 2 - 1
    times = model.noise_schedule.times(model.config.steps)
    drawn = ig.SAMPLERS[sampler](lambda x, t: image, torch.randn(2, 1, 8, 8), times, model.noise_schedule)
    torch.testing.assert_close(drawn, image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_are_shown_and_hidden_as_often_as_asked(share):
    model, images = build("diffusion", INFO, label_dropout=share), ig.load_digits()
    shown = []
    model.label.register_forward_pre_hook(lambda module, arguments: shown.append(arguments[0]))
    batches = [make_batch(images, 400, step) for step in range(3)]
    for batch in batches:
        next(model.losses(batch))
    shown, labels = torch.cat(shown), torch.cat([batch.labels for batch in batches])
    hidden = shown == 10  # the row that stands for "no label"
    assert torch.equal(shown[~hidden], labels[~hidden])
    assert hidden.float().mean().item() == pytest.approx(share, abs=0.03)


def test_positional_encoding_is_the_direct_formula():
    encoding = ig.PositionalEncoding(16)(torch.tensor([1, 17, 1000]))
    assert encoding.shape == (3, 16)
    for row, t in enumerate((1, 17, 1000)):
        for i in range(8):
            angle = t / 10_000 ** (i / 8)
            assert encoding[row, i].item() == pytest.approx(math.sin(angle), abs=2e-4)
            assert encoding[row, 8 + i].item() == pytest.approx(math.cos(angle), abs=2e-4)


def test_guidance_goes_from_unconditional_through_conditional_and_beyond():
    labels, x = torch.tensor([3, 7]), torch.rand(2, 1, 8, 8) * 0.2

    def denoised(scale, given):
        model = noisy_weights(build("diffusion", INFO, guidance=scale), 0.02)
        with torch.no_grad():
            return model.denoiser(given, 2)(x, 300)

    with_label, without = denoised(1.0, labels), denoised(1.0, None)
    assert (with_label - without).abs().max() > 1e-3 and with_label.abs().max() < 0.9
    torch.testing.assert_close(denoised(0.0, labels), without, rtol=0, atol=1e-5)
    torch.testing.assert_close(denoised(3.0, labels), without + 3 * (with_label - without), rtol=0, atol=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_number_of_network_evaluations_is_what_is_reported(sampler, guidance, labelled):
    info = INFO if labelled else dataclasses.replace(INFO, classes=["all"], class_counts=[100])
    model = build("diffusion", info, sampler=sampler, guidance=guidance, steps=6)
    calls, forward = [], model.forward
    model.forward = lambda x, *rest: calls.append(len(x)) or forward(x, *rest)
    model.sample(torch.tensor([1, 2]) if labelled else None, ig.Noise(0, range(2), CPU))
    assert model.describe_sampling()["network_evaluations"] == sum(calls) / 2


def test_samples_follow_their_labels():
    """Drawn with label k, and with labels in another order, image i changes with its own label only."""
    model = noisy_weights(build("diffusion", INFO))
    one, two = (model.sample(torch.tensor(labels), ig.Noise(0, range(3), CPU))
                for labels in ([1, 2, 3], [1, 5, 3]))
    torch.testing.assert_close(one[[0, 2]], two[[0, 2]], rtol=0, atol=1e-5)
    assert (one[1] - two[1]).abs().max() > 0.01


def test_pixel_values_survive_the_way_through_the_model_range():
    levels = torch.arange(256, dtype=torch.uint8)
    values = ig.to_float(levels)
    assert values.min() == -1 and values.max() == 1
    assert torch.equal(ig.to_uint8(values), levels)
    assert ig.to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


@pytest.mark.parametrize("counts", [[5, 3, 2], [1, 0, 9], [7, 7, 7]])
def test_labels_are_proportional_to_the_training_set(counts):
    labels = ig.proportional_labels(types.SimpleNamespace(class_counts=counts), 1000)
    found = torch.bincount(labels, minlength=3)
    assert (found - torch.tensor(counts) * 1000 / sum(counts)).abs().max() <= 1
    assert found[torch.tensor(counts) == 0].sum() == 0
    assert not torch.equal(labels, labels.sort().values)  # shuffled
    assert torch.equal(labels, ig.proportional_labels(types.SimpleNamespace(class_counts=counts), 1000))
    assert ig.proportional_labels(types.SimpleNamespace(class_counts=[10]), 4) is None


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
    alone, among = ig.Noise(5, [3], CPU), ig.Noise(5, [0, 3, 9], CPU)
    for _ in range(2):
        a, b = alone.normal(1, 4, 4), among.normal(1, 4, 4)
        assert torch.equal(a[0], b[1])
        assert not torch.equal(b[0], b[1])
    assert not torch.equal(ig.Noise(6, [3], CPU).normal(4), ig.Noise(5, [3], CPU).normal(4))
    draws = torch.cat([ig.Noise(seed, range(100), CPU).normal(100) for seed in range(5)])
    assert len(draws[:, 0].unique()) == 500  # no two streams are the same
    assert draws.mean().item() == pytest.approx(0, abs=0.02) and draws.std().item() == pytest.approx(1, abs=0.02)


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
    figures = ig.held_out(model, images, CPU, 600)
    assert figures and all(math.isfinite(value) for value in figures.values())
    assert figures == ig.held_out(model, images, CPU, 600)


@pytest.mark.parametrize("family", sorted(TINY))
def test_family_draws_images_or_says_that_it_does_not(family, images):
    """Same seed, same images; image i is the same in a batch of any size; the mode of the model is as it was."""
    model = noisy_weights(build(family, images.info()))
    labels = torch.arange(5) % len(images.classes)
    for training in (True, False):
        model.train(training)
        if not model.can_sample:
            with pytest.raises(ig.UserError, match="--model diffusion"):
                ig.generate_all(model, labels, 5, 5)
        else:
            drawn = [ig.generate_all(model, labels, 5, batch) for batch in (5, 5, 2, 1)]
            assert drawn[0].shape == (5, *images.train.shape[1:]) and drawn[0].dtype == torch.uint8
            assert torch.equal(drawn[0], drawn[1])
            for other in drawn[2:]:  # float32 sums may be ordered otherwise in another batch: one level at most
                assert (drawn[0].int() - other.int()).abs().max() <= 1
            assert torch.equal(drawn[0][:3], ig.generate_all(model, labels, 3, 5)) or \
                (drawn[0][:3].int() - ig.generate_all(model, labels, 3, 5).int()).abs().max() <= 1
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
        assert sorted(p.name for p in Path("out").glob("*.png")) == [
            "00000_labelbar.png", "00001_labeldisc.png", "00002_labelbar.png"]
        assert pixels("out/00000_labelbar.png").shape == (8, 8, 3)


def test_unlabelled_pictures_work_from_training_to_sampling(folders):
    Path("plain").mkdir()
    for path in (folders["grey"] / "disc").iterdir():
        shutil.copy(path, "plain")
    ok("--dataset", "folder", "--data_root", "plain", "--image_size", 8, "--epochs", 1, *COMMON, *SMALL)
    ok(*INFER, "--output_dir", "out", "--num_samples", 2, "--guidance", 2)
    assert sorted(p.name for p in Path("out").glob("*.png")) == ["00000.png", "00001.png"]
    assert_error(call(*INFER, "--label", 1), 2, "--label", "without labels")
    result = call("--model", "classifier", "--dataset", "folder", "--data_root", "plain", *COMMON)
    assert_error(result, 1, "classes", "sub-folder")


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
    assert {path.name for path in trained.folder.iterdir() if path.name[0] != "."} == {"model.pt", "results"}


def test_epoch_panels_show_how_the_model_was_then(trained):
    names = [f"samples_epoch_{epoch:03d}.png" for epoch in (1, 5, 6)]
    first, fifth, last = (trained.grids[name].images for name in names)
    assert not torch.equal(first, fifth) and not torch.equal(fifth, last)
    assert torch.equal(last, trained.grids["final_samples.png"].images)
    assert len({trained.grids[name].names[0] for name in names}) == 1
    for name, epoch in zip(names, (1, 5, 6)):
        assert "digits" in trained.grids[name].title and str(epoch) in trained.grids[name].title


def test_epoch_panel_is_what_a_run_stopped_there_would_draw(trained):
    stopped(*TRAIN, "--epochs", 6, at=5 * 22)
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
    assert epochs[-1]["learning_rate"] < 0.02 * epochs[0]["learning_rate"]


def test_samples_come_from_the_averaged_weights(model_file):
    state = read(model_file)
    assert differences(state["ema"], state["model"])
    ok(*INFER, "--num_samples", 3, "--label", 4, "--output_dir", "out")
    shown = np.stack([pixels(path) for path in sorted(Path("out").glob("*.png"))])
    drawn = {}
    for kind in ("ema", "model"):
        model = ig.DiffusionModel(ig.DiffusionConfig(**state["config"]), ig.DataInfo(**state["data"]))
        model.load_state_dict(state[kind])
        model.to(memory_format=torch.channels_last).eval()
        with torch.no_grad():
            x = model.sample(torch.full((3,), 4), ig.Noise(0, range(3), CPU))
        drawn[kind] = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()[:, 0].numpy()
    assert np.array_equal(shown, drawn["ema"])
    assert not np.array_equal(shown, drawn["model"])


def test_training_with_bfloat16_and_more_samples_than_one_picture_holds():
    result = ok(*[a if a != "float32" else "bfloat16" for a in TRAIN], "--epochs", 1, "--label", "3,8")
    assert "bfloat16" in result.out and math.isfinite(records("results")[-1]["loss"])
    with recorded_grids() as grids:
        ok(*INFER, "--num_samples", 401, "--steps", 1)
    assert len(grids["final_samples.png"].images) == 400


@pytest.mark.parametrize("flags", [
    ("--label", "12"), ("--batch_size", "0"), ("--data_root", "nowhere", "--dataset", "folder")])
def test_run_that_can_not_start_leaves_the_last_model_in_its_place(model_file, flags):
    before = model_file.read_bytes()
    result = call(*TRAIN, *flags)
    assert_error(result, result.code)
    assert result.code in (1, 2) and model_file.read_bytes() == before


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
    from torchvision.datasets import MNIST
    monkeypatch.setattr(MNIST, "mirrors", [])
    yield server
    server.close()


PREPARE = ("--mode", "train", "--prepare_data", "--dataset", "mnist")


def test_mnist_is_downloaded_once_into_the_scripts_own_folder(mirror, mini_mnist, place):
    assert "40 training" in ok(*PREPARE).out
    raw = place / "script" / "data" / "MNIST" / "raw"
    assert all((raw / name).read_bytes() == content for name, content in mini_mnist.items())
    assert sorted(mirror.fetched) == sorted(mini_mnist)
    ok(*PREPARE)
    images = ig.load_mnist(None)
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


def test_next_mirror_is_tried(mirror, mini_mnist, monkeypatch):
    from torchvision.datasets import MNIST
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
    images = ig.load_mnist(mnist_root)
    assert images.train.shape == (60_000, 1, 28, 28) and images.test.shape == (10_000, 1, 28, 28)
    assert images.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.train.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert images.info().class_counts[1] == 6742


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


def test_each_image_is_a_file_with_the_pixels_of_the_picture(model_file):
    with recorded_grids() as grids:
        result = ok(*INFER, "--label", "7,0", "--num_samples", 5, "--output_dir", "out", "--sample_batch", 2)
    assert "results/final_samples.png" in result.out and "images/s" in result.out
    names = [f"{i:05d}_label{label}.png" for i, label in enumerate("70707")]
    assert sorted(path.name for path in Path("out").glob("*.png")) == names
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


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
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
    assert [path.stem[-1] for path in sorted(Path("out").glob("*.png"))] == list("012345678901")


def test_names_stand_below_the_images_in_turn():
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for path, names in (("turn.png", ["a", "b"]), ("each.png", list("ababa")), ("other.png", list("abaab"))):
        ig.grid_image(images, Path(path), "title", names)
    assert np.array_equal(pixels("turn.png"), pixels("each.png"))
    assert not np.array_equal(pixels("turn.png"), pixels("other.png"))


def test_classifier_learns_the_digits(classifier):
    ok(*EVALUATE, "--checkpoint", classifier)
    report = json.loads(Path("results/evaluation.json").read_text())
    assert report["metrics"]["val_accuracy"]["value"] > 0.95
    assert report["metrics"]["val_accuracy"]["n"] == 360 and report["metrics"]["val_accuracy"]["reference"] == "test"
    # the same figure by hand
    images, model = ig.load_digits(), ig.restore_model(read(classifier)).eval()
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
    images = ig.load_digits()
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
                            for sampler in ("ddim", "ddim", "dpm++"))
    assert first["metrics"] == second["metrics"] != other["metrics"]
    assert (first["sampler"], other["sampler"]) == ("ddim", "dpm++")


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


# === what runs and figures remember ===


def test_schedule_is_a_straight_line_from_image_to_noise():
    schedule = ig.NoiseSchedule()
    assert len(schedule.alphas) == len(schedule.sigmas) == ig.TIMESTEPS + 1 == 1001
    assert schedule.alphas[0] == 1 and schedule.sigmas[0] == 0
    assert schedule.alphas[-1].item() == pytest.approx(0.001) and schedule.sigmas[-1].item() == pytest.approx(0.999)
    torch.testing.assert_close(schedule.alphas + schedule.sigmas, torch.ones(1001, dtype=torch.float64))
    torch.testing.assert_close(schedule.sigmas.diff(), torch.full((1000,), 0.000999, dtype=torch.float64))


def test_flow_is_noise_minus_image_and_gives_the_image_back():
    model, batch = build("diffusion", INFO, guidance=1), make_batch(ig.load_digits())
    for t in (1, 100, 500, 900, 980):
        x, flow = model.noisy(batch.images, torch.full((8,), t), batch.draw)
        alpha, sigma = model.noise_schedule.alphas[t].item(), model.noise_schedule.sigmas[t].item()
        noise = (x - alpha * batch.images) / sigma
        torch.testing.assert_close(flow, noise - batch.images, rtol=1e-3, atol=2e-3 / sigma)
        model.forward = lambda *_, flow=flow: flow
        torch.testing.assert_close(model.denoiser(batch.labels, 8)(x, t), batch.images, rtol=0, atol=1e-4)
        del model.forward


def test_training_visits_times_by_the_logit_normal_distribution():
    """For the logistic function of a normal z of mean 0.3 and deviation 1.2, 0.625 of the times lie in the middle half
    (|z| < log 3) and 0.253 above it; and a batch has one time of each of its equal parts."""
    model, images, times = build("diffusion", INFO), ig.load_digits(), []
    model.time.register_forward_pre_hook(lambda module, arguments: times.append(arguments[0]))
    for step in range(5):
        next(model.losses(make_batch(images, 1400, step)))
    times = torch.cat(times)
    assert 1 <= times.min() < 40 and 960 < times.max() <= 1000
    share_of_the_middle, share_above = (((times > 250) & (times <= 750)).float().mean(), (times > 750).float().mean())
    assert (share_of_the_middle.item(), share_above.item()) == pytest.approx((0.625, 0.253), abs=0.002)


def test_checkpoint_of_an_objective_that_is_gone_is_refused_and_old_fields_are_not(model_file):
    state = read(model_file)
    old = {"objective": "flow", "schedule": "straight", "time_sampling": None, "steps": None, "sampler": "ddpm",
           "adam_beta1": 0.9}
    torch.save(state | {"config": state["config"] | old}, "old.pt")
    with recorded_grids() as grids:
        ok(*INFER, "--checkpoint", "old.pt", "--num_samples", 1)
    assert "dpm++, 8 steps" in grids["final_samples.png"].title
    for change in ({"objective": "velocity"}, {"objective": "noise"}, {"schedule": "cosine"}):
        torch.save(state | {"config": state["config"] | change}, "old.pt")
        assert_error(call(*INFER, "--checkpoint", "old.pt"), 1, *next(iter(change.items())))


def test_every_record_says_which_net_measured_at_which_floor(trained, classifier):
    digest = hashlib.sha256(classifier.read_bytes()).hexdigest()
    for line in records(trained.folder / "results"):
        if "epoch" in line:
            assert line["feature_net"] == "digits_cnn" and line["feature_net_sha256"] == digest
            assert line["real_fid_digits_cnn"] > 0
    assert f"digits_cnn ({digest[:12]})" in trained.result.out and " (real " in trained.result.out
    assert read(trained.folder / "model.pt")["run"]["feature_net_sha256"] == digest


@pytest.mark.parametrize("epochs, batch, words", [(2, 256, "after the last epoch: 360"),
                                                  (6, 64, "after each epoch: 20"),
                                                  (9, 256, " epochs and after the last: 360")])
def test_how_often_is_measured_is_said_sensibly_and_done(classifier, monkeypatch, epochs, batch, words):
    monkeypatch.setattr(ig, "draw_curves", lambda trainer: None)
    count = words.rsplit(" ", 1)[1]
    result = ok(*TRAIN, "--epochs", epochs, "--batch_size", batch, "--classifier", classifier, "--eval_samples", count)
    assert words in result.out
    measured = [line["epoch"] for line in records("results") if "fid_digits_cnn" in line or "is_digits_cnn" in line]
    assert measured[-1] == epochs and (len(measured) == epochs) == ("each" in words)


def test_classifier_that_does_not_fit_never_blocks_training_but_an_evaluation(classifier, model_file, folders):
    for flags, word in ((("--classifier", classifier), "image_size"), (("--classifier", "none.pt"), "none.pt"),
                        (("--classifier", model_file), "diffusion"), ((), "no classifier")):
        result = ok("--dataset", "folder", "--data_root", folders["grey"], "--image_size", 16, "--epochs", 1,
                    *COMMON[:4], *SMALL, *flags, "--checkpoint", "own.pt", "--results_dir", "own")
        line = next(line for line in result.out.splitlines() if line.startswith("no FID while training"))
        assert word in line and not any("fid" in key for key in records("own")[-1])
    assert_error(call(*EVALUATE, "--classifier", model_file, "--eval_samples", 5), 1, "--classifier", "diffusion")


def test_classifiers_of_folders_are_told_apart_by_what_they_know():
    names = [ig.Classifier.file_name(dataclasses.replace(INFO, **change)) for change in (
        {}, {"dataset": "folder"}, {"dataset": "folder", "classes": ["a", "b"]},
        {"dataset": "folder", "image_size": 16},
        {"dataset": "folder", "title": "../My: pets"})]
    assert names[0] == "classifier_digits.pt" and len(set(names)) == 5 and names[4].startswith("classifier_my-pets_")
    assert ig.Classifier.file_name(None) == "classifier_*.pt"


def test_shipped_classifier_measures_whatever_lies_in_models(classifier, place):
    for folder in ("pretrained", "models"):
        (place / "script" / folder).mkdir(parents=True)
    shutil.copy(ROOT / "image_gen" / "pretrained" / "classifier_digits.pt", place / "script" / "pretrained")
    shutil.copy(classifier, place / "script" / "models" / "classifier_digits.pt")
    net, _ = ig.find_feature_net(ig.MeasureOptions(), ig.load_digits().info(), CPU)
    assert net.digest == hashlib.sha256(Path("script/pretrained/classifier_digits.pt").read_bytes()).hexdigest()
    (place / "script" / "pretrained" / "classifier_digits.pt").unlink()
    net, _ = ig.find_feature_net(ig.MeasureOptions(), ig.load_digits().info(), CPU)
    assert net.digest == hashlib.sha256(classifier.read_bytes()).hexdigest()


def test_resume_with_another_classifier_goes_on_without_fid(classifier):
    shutil.copy(classifier, "judge.pt")
    stopped(*TRAIN, "--epochs", 2, "--classifier", "judge.pt", "--eval_samples", 40, at=30)
    state = read("judge.pt")
    state["ema"] = {key: value * 1.01 for key, value in state["ema"].items()}
    torch.save(state, "judge.pt")
    result = ok("--resume", "--checkpoint", "model.pt", "--device", "cpu")
    assert "no FID while training: digits_cnn is another file" in result.out
    measured = [line["epoch"] for line in records("results") if "fid_digits_cnn" in line]
    assert measured == [1] and read("model.pt")["epoch_done"] == 2


def test_evaluation_needs_nothing_but_the_checkpoint_that_knows_its_data(folders, monkeypatch):
    shutil.copytree(folders["grey"], "pictures")
    ok("--dataset", "folder", "--data_root", "pictures", "--image_size", 8, "--epochs", 1, *COMMON, *SMALL)
    monkeypatch.setattr(ig, "drawing_speed", lambda model: {})
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    ok("--mode", "evaluate", "--checkpoint", "../model.pt", "--eval_samples", 2, "--results_dir", "r")
    assert json.loads(Path("r/evaluation.json").read_text())["num_samples"] == 2
    next(Path("../pictures").rglob("*.png")).unlink()
    assert_error(call("--mode", "evaluate", "--checkpoint", "../model.pt"), 2, "--data_root")


def test_axes_have_readable_ticks(monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "close", lambda figure: None)
    for last, low, high in ((1, 3.0, 3.4), (2, 1, 500), (40, 20, 90)):
        ig.plot(Path("plot.png"), "t", [("fid", {"a": [(1, low), (last, high)]}, "log")])
        axis = plt.gcf().axes[0]
        plt.gcf().canvas.draw()
        xs = [t for t in axis.get_xticks() if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
        ys = [t for t in axis.get_yticks() if axis.get_ylim()[0] <= t <= axis.get_ylim()[1]]
        assert len(xs) >= 2 and all(x == int(x) for x in xs) and len(ys) >= 3
        assert not any("^" in text.get_text() for text in axis.get_yticklabels())
        plt.cla()


# === folders of pictures ===


def spoil(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)


def cut(root: Path, name: str, length: int) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(root / name)
    (root / name).write_bytes((root / name).read_bytes()[:length])


def only(root: Path, count: int) -> None:
    for path in sorted(root.rglob("*.png"))[count:]:
        path.unlink()


FOLDERS = {  # kind -> what is done to a good folder, what the error says
    "empty": (lambda root: only(root, 0), ("0 image", "two")),
    "one image": (lambda root: only(root, 1), ("1 image", "two")),
    "missing": (shutil.rmtree, ("not a folder",)),
    "a file": (lambda root: (shutil.rmtree(root), root.write_text("x")), ("not a folder",)),
    "text": (lambda root: spoil(root, "note.png", b"I am a text."), ("note.png", "--skip_bad")),
    "nothing": (lambda root: spoil(root, "hollow.png", b""), ("hollow.png", "--skip_bad")),
    "cut png": (lambda root: cut(root, "cut.png", 500), ("cut.png", "--skip_bad")),
    "cut jpeg": (lambda root: cut(root, "cut.jpg", 1500), ("cut.jpg", "--skip_bad")),
    "cut tiff": (lambda root: cut(root, "cut.tif", 50), ("cut.tif", "--skip_bad")),
    "NaN": (lambda root: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(root / "n.tif"), ("n.tif", "NaN")),
    "many": (lambda root: [spoil(root, f"{i}.png", b"?") for i in range(7)], ("7 picture", "0.png", "4.png", "2 more")),
    "empty split": (lambda root: [(root / name).mkdir() for name in ("train", "test")], ("two",)),
    "results": (lambda root: ig.results_folder(root), ("results", ".results")),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_that_holds_no_usable_pictures_is_one_error(kind, folders, place):
    shutil.copytree(folders["grey"], place / "pictures")
    FOLDERS[kind][0](place / "pictures")
    assert_error(folder_error("pictures"), 1, *FOLDERS[kind][1])


def test_bad_pictures_are_skipped_where_asked_and_everything_left_out_is_said(folders, place):
    root = shutil.copytree(folders["grey"], place / "pictures")
    spoil(root, "note.png", b"I am a text.")
    spoil(root, "phone.heic", b"?")
    spoil(root, ".hidden", b"?")
    (root / "gone.png").symlink_to("nowhere.png")
    shutil.copytree(ig.results_folder(root / "results") and folders["colour"], root / "results", dirs_exist_ok=True)
    result = ok("--prepare_data", "--dataset", "folder", "--data_root", root, "--image_size", 8, "--skip_bad")
    assert "22 training and 2 test" in result.out  # 24: nothing of the results
    assert "1 .heic" in result.err and "1 broken link" in result.err and "1 picture(s)" in result.err
    assert "note.png" in result.err and "hidden" not in result.err


def test_data_folder_is_not_the_results_folder(folders, place):
    shutil.copytree(folders["grey"], place / "pictures")
    assert_error(folder_error("pictures", "--results_dir", "pictures"), 2, "--results_dir")
    assert not (place / "pictures" / ".results").exists()


def test_float_pictures_from_0_to_1_and_to_255():
    levels = np.array([[0, 51], [204, 255]], dtype=np.float32)
    for name, values in (("one.tif", levels / 255), ("all.tif", levels)):
        Image.fromarray(values).save(name)
        assert picture(name).tolist() == levels.astype(int).tolist()


@pytest.mark.parametrize("text, chosen", [
    ("a", ["a"]), ("a, b", ["a", "b"]), ("b,a,b", ["b", "a", "b"]), ("x, y", ["x, y"])])
def test_class_name_may_hold_commas(text, chosen):
    assert ig.named_classes(text, ["a", "b", "x, y"]) == chosen


def test_unknown_class_is_a_usage_error(model_file):
    assert_error(call(*INFER, "--label", "7,x"), 2, "--label x", "0, 1, 2")


def test_number_of_samples_is_bounded(model_file):
    assert_error(call(*INFER, "--num_samples", 99_999_999_999), 2, "--num_samples", "at most 1,000,000")


def test_memory_for_drawing_does_not_grow_with_the_number_of_images(monkeypatch):
    model = build("diffusion", INFO)
    monkeypatch.setattr(model, "sample", lambda labels, noise: torch.zeros(len(noise), 1, 8, 8))
    drawing = ig.generate(model, torch.tensor([5, 6]), 10 ** 15, 3)
    assert [list(numbers) for numbers, _ in itertools.islice(drawing, 2)] == [[0, 1, 2], [3, 4, 5]]

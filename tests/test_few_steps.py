"""What makes the image models near and fast: Muon, consistency tuning, a learned prior of codes, and what came with
them. Mathematics against oracles, then the command line with wrong and with older files.

The helpers are those of test_image_gen.py; models of which only the shape matters are written untrained.
"""
# ruff: noqa: F811 (fixtures are taken from there by name)
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_error
from PIL import Image
from test_image_gen import (  # noqa: F401 (fixtures are taken by name)
    COMMON,
    CPU,
    DEVIATION,
    INFER,
    INFO,
    MEAN,
    SMALL,
    build,
    call,
    classifier,
    folders,
    gaussian_denoiser,
    ig,
    noisy_weights,
    ok,
    pixels,
    place,
)
from torch import nn

CONSISTENT = {"objective": "consistency", "init": "flow.pt"}
DIGITS = ig.load_digits()


def batch_of(images, labels=None, step=0, progress=1.0):
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    return ig.Batch(images, labels, ig.Draw(0, step, len(images), slice(None), CPU), progress)


def write_model(path: str, model, **config) -> Path:
    """A checkpoint of an untrained model; a field of its config that is `...` is left out, as in an older file."""
    told = dataclasses.asdict(model.config) | config
    family = next(name for name, kind in ig.FAMILIES.items() if kind is type(model))
    ig.save_checkpoint(Path(path), {
        "format": ig.SUBJECT.format, "family": family, "made": {}, "history": [], "ema": model.state_dict(),
        "config": {name: value for name, value in told.items() if value is not ...},
        "data": dataclasses.asdict(model.data)})
    return Path(path)


# === temperature and contrast ===


@pytest.mark.parametrize("channels, objective, given, expected", [
    (1, "flow", {}, (0.96, 0.3)), (3, "flow", {}, (1.0, 0.3)), (1, "consistency", {}, (1.1, 0.0)),
    (3, "consistency", {}, (1.0, 0.0)), (1, "flow", {"temperature": 0.0}, (0.0, 0.3)),
    (1, "flow", {"contrast": 0.0}, (0.96, 0.0)), (1, "consistency", {"temperature": 1.2, "contrast": 1.0}, (1.2, 1.0))])
def test_temperature_and_contrast_are_as_asked_else_what_suits(channels, objective, given, expected):
    info = dataclasses.replace(INFO, channels=channels)
    config = build("diffusion", info, objective=objective, **given).config
    assert (config.temperature, config.contrast) == expected


def prepared(images, **options):
    torch.manual_seed(0)
    model = build("diffusion", images.info(), **options)
    model.prepare(images, CPU)
    return model


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("t", [100, 500, 990])
def test_contrast_leads_away_from_the_best_linear_guess_of_the_flow(t, labelled):
    """The best linear guess is the one whose errors have no mean, in any class, and nothing to do with what is seen."""
    images = ig.load_digits()
    model = prepared(images, contrast=1.0)  # its network says 0 as yet, so that guided() is minus the guess
    pictures, labels = ig.to_float(images.train).repeat(20, 1, 1, 1), images.train_labels.repeat(20)
    shown = labels if labelled else torch.full_like(labels, 10)
    means = model.means[shown]
    if not labelled:  # as far as the covariance within the classes tells
        pictures = pictures - (model.means[labels] - means).view_as(pictures)
    times = torch.full_like(labels, t)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    alpha, sigma = model.alphas[t], model.sigmas[t]
    x = alpha * pictures + sigma * noise
    seen, flow = x.flatten(1) - alpha * means, (noise - pictures).flatten(1)
    with torch.no_grad():
        error = flow + model.guided(x, times, shown, 1.0).flatten(1)
    together, before = (seen.T @ some / len(seen) for some in (error, flow))
    assert together.abs().max() < 0.03 and before.abs().max() > 0.2
    for k in range(10):
        assert error[labels == k].mean(0).abs().max() < 0.1
    assert error.square().mean() < flow.square().mean()


def test_without_contrast_or_statistics_the_flow_is_the_networks():
    images, x = ig.load_digits(), torch.randn(3, 1, 8, 8)
    times, labels = torch.tensor([1, 400, 1000]), torch.tensor([2, 5, 10])
    models = prepared(images, contrast=0.0), build("diffusion", images.info(), contrast=1.0), prepared(images)
    flows = [noisy_weights(model).guided(x, times, labels, 1.0) for model in models]
    assert torch.equal(flows[0], flows[1]) and not torch.allclose(flows[0], flows[2], atol=0.01)


def test_statistics_are_those_of_the_training_images_and_leave_the_random_numbers_alone():
    images = ig.load_digits()
    pictures, labels = ig.to_float(images.train).flatten(1), images.train_labels
    model = build("diffusion", images.info())
    state = torch.get_rng_state()
    model.prepare(images, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    means = torch.stack([pictures[labels == k].mean(0) for k in range(10)])
    torch.testing.assert_close(model.means, torch.cat([means, pictures.mean(0, keepdim=True)]), rtol=0, atol=0.02)
    covariance = torch.cov((pictures - means[labels]).T, correction=0)
    torch.testing.assert_close(model.axes * model.variances @ model.axes.T, covariance, rtol=0, atol=0.01)
    torch.testing.assert_close(model.axes.T @ model.axes, torch.eye(64), rtol=0, atol=1e-4)


def test_statistics_of_large_pictures_stay_small():
    pixels = torch.randint(0, 256, (6, 3, 256, 256), dtype=torch.uint8)
    labels = torch.zeros(6, dtype=torch.long)
    images = ig.Images("folder", pixels, labels, pixels[:1], labels[:1], ["a"], "a")
    model = prepared(images)
    assert model.axes.numel() <= 1_000_000 and model.means.shape == (1, 3 * 256 * 256) and model.variances.all()


def test_statistics_of_fewer_images_than_axes_are_finite():
    images = ig.load_digits()
    few = dataclasses.replace(images, train=images.train[:5], train_labels=images.train_labels[:5])
    model = prepared(few)
    assert (model.variances > 0).sum() <= 5 and model.variances.any()
    with torch.no_grad():
        drawn = model.sample(torch.tensor([0, 9]), ig.Noise(0, range(2), CPU))  # of one of them it saw no picture
    assert torch.isfinite(drawn).all()


def test_file_from_before_contrast_is_drawn_from_and_resumed_without_it():
    args = ("--model", "diffusion", "--dataset", "digits", *SMALL[2:6], *COMMON)
    ok(*args, "--batch_size", 280, "--num_samples", 2)
    state = ig.load_checkpoint(Path("model.pt"))
    del state["config"]["contrast"]
    for name in ("means", "axes", "variances"):
        del state["ema"][name], state["model"][name]
    ig.save_checkpoint(Path("model.pt"), state)
    assert ig.restore_model(state).config.contrast == 0
    ok(*INFER, "--num_samples", 2)
    assert_error(call(*INFER, "--num_samples", 2, "--contrast", 0.3), 2, "--contrast", "older", "leave it out")
    ok("--mode", "train", "--resume", "--epochs", state["config"]["epochs"] + 1, "--checkpoint", "model.pt")
    assert ig.load_checkpoint(Path("model.pt"))["config"]["contrast"] == 0


# === attention ===


@pytest.mark.parametrize("channels, heads, height", [(32, 1, 5), (128, 2, 5), (32, 1, 160)])
def test_attention_is_that_of_pytorch(channels, heads, height):
    torch.manual_seed(0)
    layer, x = noisy_weights(ig.SelfAttention(channels)), torch.randn(3, channels, height, 7)
    qkv = layer.qkv(layer.norm(x)).reshape(3, 3, heads, channels // heads, 7 * height)
    mixed = nn.functional.scaled_dot_product_attention(*qkv.mT.unbind(1)).mT.reshape(x.shape)
    assert layer.heads == heads
    torch.testing.assert_close(layer(x), x + layer.out(mixed), rtol=1e-5, atol=1e-5)


# === Muon ===


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonal_matrix_has_singular_values_near_one(shape):
    """Where those of the matrix are not tiny, which stay small: they are noise. The directions stay."""
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -4, values.shape[-1]).expand_as(values)
    norm = values.square().sum(-1, keepdim=True).sqrt()
    found = ig.orthogonal(left * values[:, None] @ right).float()
    assert found.shape == shape
    aligned = torch.linalg.diagonal(left.mT @ found @ right.mT)
    large, tiny = values > norm / 200, values < norm / 2000
    assert (aligned[large] > 0.45).all() and torch.linalg.svdvals(found).max() < 1.55
    assert tiny.any() and aligned[tiny].abs().max() < 0.15
    assert ig.orthogonal(torch.zeros(shape)).isfinite().all()


def optimizer_of(matrices, others):
    return ig.Muon(matrices, others, 0.02, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)


def newton_schulz_of_torch(x):
    """Five steps with the same factors, where the script takes three with others."""
    x = x.bfloat16() / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_step_is_that_of_muon_and_adamw_in_torch(monkeypatch):
    """But for the way to an orthogonal matrix. Also of a convolution, flattened to two dimensions; in the rounding of
    bfloat16."""
    monkeypatch.setattr(ig, "orthogonal", newton_schulz_of_torch)
    torch.manual_seed(0)
    shapes = [(30, 12), (12, 30), (30, 12), (8, 4, 3, 3)]
    ours = [torch.randn(s) for s in shapes]
    ours[3] = ours[3].to(memory_format=torch.channels_last)
    bias = torch.randn(5)
    flat = [p.permute(0, 2, 3, 1).flatten(1) if p.ndim == 4 else p for p in ours]
    theirs, their_bias, start = [p.clone() for p in flat], bias.clone(), [p.clone() for p in flat]
    optimizer = optimizer_of(ours, [bias])
    muon = torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=0.95)
    adamw = torch.optim.AdamW([their_bias], 1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        for p, q in zip([*ours, bias], [*theirs, their_bias]):
            p.grad = torch.randn_like(p)
            q.grad = (p.grad.permute(0, 2, 3, 1).flatten(1) if p.ndim == 4 else p.grad).clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for p, q, first in zip(ours, theirs, start):
        p = p.permute(0, 2, 3, 1).flatten(1) if p.ndim == 4 else p
        assert (q - first).norm() > 0.05
        assert (p - q).norm() / (q - first).norm() < 0.02
    assert torch.equal(bias, their_bias)


def test_state_of_the_optimizer_resumes_bit_for_bit(tmp_path):
    def parts():
        torch.manual_seed(0)
        matrix = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
        return [matrix, torch.randn(6, 9)], [torch.randn(5)]

    def steps(optimizer, matrices, others, numbers):
        for number in numbers:
            for i, p in enumerate([*matrices, *others]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + i))
            optimizer.step()

    whole, halves = parts(), parts()
    steps(optimizer_of(*whole), *whole, range(6))
    first = optimizer_of(*halves)
    steps(first, *halves, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = optimizer_of(*halves)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(second, *halves, range(3, 6))
    for a, b in zip([*whole[0], *whole[1]], [*halves[0], *halves[1]]):
        assert torch.equal(a, b)


def test_every_weight_between_the_first_and_the_last_layer_is_muons():
    model = build("diffusion", INFO).to(memory_format=torch.channels_last)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = model.optimizer(model)
    others, matrices = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert len(others) + len(matrices) == len(names)
    assert not [name for name in matrices if name.endswith("bias") or name.startswith(("enter", "leave", "label"))]
    assert any(name.startswith("down_blocks") for name in matrices) and "enter.weight" in others
    assert [group["lr"] for group in optimizer.param_groups] == [model.config.learning_rate, model.config.muon_rate]


# === consistency ===


def gaussian_map(schedule):
    """Where the exact flow of N(MEAN, DEVIATION^2) takes x_t: it keeps its distance in standard deviations."""
    def jump(x, t):
        alpha, sigma = schedule.alphas[t].item(), schedule.sigmas[t].item()
        return MEAN + DEVIATION * (x - alpha * MEAN) / math.hypot(alpha * DEVIATION, sigma)
    return jump


@pytest.mark.parametrize("times", [[1000], [1000, 700], [1000, 767, 533, 300]])
def test_consistency_sampler_with_the_exact_map_recovers_mean_and_deviation(times):
    schedule, noise = ig.NoiseSchedule(), ig.Noise(0, range(100), CPU)
    start = noise.normal(1, 16, 16) * schedule.sigmas[1000].item()
    drawn = ig.sample_consistency(gaussian_map(schedule), start, times, schedule, noise)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.015)
    wrong = ig.sample_consistency(gaussian_denoiser(schedule, MEAN, DEVIATION), start, times, schedule, noise)
    assert wrong.std() < 0.8 * DEVIATION  # means of what is possible are too much alike


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 1000])
def test_times_of_consistency_begin_with_noise_and_fall(steps):
    times = build("diffusion", INFO, **CONSISTENT | {"steps": steps}).times()
    assert times[0] == 1000 and times[-1] >= 100 and len(times) <= steps and (len(times) == steps or steps > 8)
    assert times == sorted(set(times), reverse=True)
    assert ig.DiffusionConfig(**CONSISTENT).steps == 2  # by default


def loss_of(monkeypatch, network, teacher, progress: float) -> tuple[float, torch.Tensor]:
    """The loss and the times that it was taken at."""
    model = build("diffusion", INFO, **CONSISTENT)
    monkeypatch.setattr(model, "forward", lambda x, times, labels: network(x, model.sigmas[times][:, None, None, None]))
    frozen = build("diffusion", INFO)
    monkeypatch.setattr(frozen, "forward", lambda x, times, labels: teacher(
        x, model.sigmas[times][:, None, None, None]))
    monkeypatch.setattr(model, "teacher", lambda: frozen)
    images, noisy, seen = torch.full((256, 1, 8, 8), 0.3), model.noisy, []
    monkeypatch.setattr(model, "noisy", lambda x, times, draw: seen.append(times) or noisy(x, times, draw))
    (player, loss, _), = model.losses(batch_of(images, progress=progress))
    assert player == "model"
    return loss.item(), seen[0]


@pytest.mark.parametrize("progress, gap", [(0.0, 0.5), (1 / 3, 0.25), (1.0, 0.0625)])
def test_consistency_loss_of_a_point_mass_is_known(progress, gap, monkeypatch):
    """All images alike: the flow (x - image) / sigma is straight, and leaves nothing to learn. A network that is wrong
    by 1 everywhere misses its own target by the share of the way that the teacher goes: all of it near the picture."""
    def exact(x, sigma):
        return (x - 0.3) / sigma

    def wrong(x, sigma):
        return exact(x, sigma) + 1

    assert loss_of(monkeypatch, exact, exact, progress)[0] == pytest.approx(0, abs=1e-6)
    loss, times = loss_of(monkeypatch, wrong, exact, progress)
    shares = [gap if (t * (1 - gap)).round() > 200 else 1 for t in times]
    assert {1, gap} == set(shares) and times.max() == 1000
    assert loss == pytest.approx(np.mean([math.hypot(share, ig.HUBER) - ig.HUBER for share in shares]), rel=0.01)


def flow_model(info=None, **config):
    return noisy_weights(build("diffusion", info or DIGITS.info(), **config))


TUNING = ("--model", "diffusion", "--dataset", "digits", *SMALL[2:6], "--objective", "consistency", *COMMON)


def test_tuning_starts_from_the_averaged_weights_and_never_moves_them():
    write_model("flow.pt", flow_model())
    before = Path("flow.pt").read_bytes()
    model = build("diffusion", DIGITS.info(), **CONSISTENT)
    model.prepare(DIGITS, CPU)
    state = ig.load_checkpoint(Path("flow.pt"))["ema"]
    assert all(torch.equal(value, state[name]) for name, value in model.named_parameters())
    assert not any(name.startswith("frozen") for name in model.state_dict())
    ok(*TUNING, "--init", "flow.pt", "--batch_size", 280, "--num_samples", 2)
    saved = ig.load_checkpoint(Path("model.pt"))
    assert (saved["config"]["objective"], saved["config"]["sampler"], saved["config"]["steps"]) == (
        "consistency", "consistency", 2)
    assert differs(saved["ema"], state) and Path("flow.pt").read_bytes() == before
    ok(*INFER, "--num_samples", 2, "--steps", 4)
    assert_error(call(*INFER, "--sampler", "ddim"), 2, "--sampler ddim", "consistency")


def test_file_without_hidden_labels_is_drawn_from_but_not_guided():
    write_model("sure.pt", flow_model(label_dropout=0.0, guidance=2.0))
    asked = ("--mode", "infer", "--checkpoint", "sure.pt", "--results_dir", "results", "--num_samples", 2)
    assert_error(call(*asked), 2, "guidance of 2.0", "--guidance 1")
    ok(*asked, "--guidance", 1)


@pytest.mark.parametrize("asked, learned", [(None, 1.4), (0.5, 0.5)])
def test_what_is_learned_is_the_teachers_own_drawing_or_with_other_guidance(asked, learned, monkeypatch):
    write_model("flow.pt", flow_model(guidance=1.4, contrast=0.2))
    model = build("diffusion", DIGITS.info(), **CONSISTENT | {"teacher_guidance": asked})
    teacher, scales = model.teacher(), []
    assert teacher.config.contrast == 0.2
    whole = teacher.guided
    monkeypatch.setattr(teacher, "guided", lambda *given: scales.append(given[-1]) or whole(*given))
    next(model.losses(batch_of(ig.to_float(DIGITS.train[:8]))))
    assert scales == [learned]


def differs(a: dict, b: dict) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("flags, code, expected", [
    ((), 2, ("--objective consistency", "--init")), (("--init", "missing.pt"), 1, ("missing.pt",)),
    (("--init", "text.pt"), 1, ("text.pt",)), (("--init", "vae.pt"), 2, ("vae.pt", "vae", "diffusion")),
    (("--init", "tuned.pt"), 2, ("tuned.pt", "consistency", "flow")),
    (("--init", "other.pt"), 2, ("other.pt", "letters", "digits")),
    (("--init", "wide.pt"), 2, ("wide.pt", "channels", "32", "16")),
    (("--init", "sure.pt", "--teacher_guidance", 1.25), 2, ("guidance of 1.25", "--label_dropout")),
    (("--init", "flow.pt", "--sampler", "dpm++"), 2, ("--sampler dpm++", "--objective consistency")),
    (("--init", "flow.pt", "--objective", "flow", "--sampler", "consistency"), 2, ("--sampler consistency",)),
])
def test_model_that_can_not_be_tuned_is_one_error(flags, code, expected):
    info = DIGITS.info()
    write_model("flow.pt", flow_model())
    write_model("tuned.pt", flow_model(**CONSISTENT))
    write_model("vae.pt", build("vae", info))
    write_model("other.pt", flow_model(dataclasses.replace(info, title="letters")))
    write_model("wide.pt", flow_model(channels=32))
    write_model("sure.pt", flow_model(label_dropout=0.0))
    Path("text.pt").write_text("no model")
    assert_error(call(*TUNING, *flags), code, *expected)
    assert not Path("model.pt").exists()


# === prior of codes ===


def test_prior_that_has_learned_nothing_draws_from_the_normal_distribution():
    for prior in (ig.CodePrior(3, 4), ig.CodePrior(3, 4, width=2)):
        z = torch.randn(50, 3)
        assert torch.equal(prior.draw(z, torch.arange(50) % 4), z)


def test_prior_recovers_each_class_of_a_mixture():
    torch.manual_seed(0)
    means, deviation = torch.tensor([[1.5, -1.0], [-1.0, 2.0]]), 0.3
    prior = ig.CodePrior(2, 2, width=48, blocks=2)
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for step in range(400):
        labels = torch.arange(256) % 2
        loss = prior.loss(means[labels] + deviation * torch.randn(256, 2), labels,
                          ig.Draw(0, step, 256, slice(None), CPU))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.arange(2000) % 2
    with torch.no_grad():
        codes = prior.draw(torch.randn(2000, 2), labels)
    for label, mean in enumerate(means):
        torch.testing.assert_close(codes[labels == label].mean(0), mean, rtol=0, atol=0.15)
        assert (codes[labels == label].std(0) - deviation).abs().max() < 0.15


def test_prior_of_more_numbers_than_it_is_wide_learns_how_far_each_spreads():
    torch.manual_seed(0)
    deviations = torch.stack([torch.linspace(0.3, 1.8, 24), torch.linspace(1.8, 0.3, 24)])
    prior = ig.CodePrior(24, 2, width=16, blocks=1)
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for step in range(800):
        labels = torch.arange(256) % 2
        loss = prior.loss(deviations[labels] * torch.randn(256, 24), labels, ig.Draw(0, step, 256, slice(None), CPU))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for label in range(2):
        with torch.no_grad():
            codes = prior.draw(torch.randn(2000, 24), torch.full((2000,), label))
        assert (codes.std(0) - deviations[label]).abs().max() < 0.25


def test_prior_learns_beside_the_model_and_does_not_pull_at_it():
    model = noisy_weights(build("vae", INFO)).train()
    losses = model.losses(batch_of(torch.rand(16, 1, 8, 8) * 2 - 1))
    assert next(losses)[0] == "model"
    player, loss, _ = next(losses)
    loss.backward()
    assert player == "prior" and {*model.players()} == {"model", "prior"}
    assert all(p.grad is None for p in model.players()["model"].parameters())
    assert all(p.grad is not None for p in model.players()["prior"].parameters())


def test_vae_with_a_prior_draws_what_is_asked():
    model = noisy_weights(build("vae", DIGITS.info(), prior="flow")).eval()
    assert model.labelled
    drawn = [model.sample(torch.full((3,), label), ig.Noise(0, range(3), CPU)) for label in (2, 7)]
    assert drawn[0].shape == (3, 1, 8, 8) and (drawn[0] - drawn[1]).abs().max() > 1e-3
    write_model("model.pt", model)
    ok(*INFER, "--label", 7, "--num_samples", 3, "--output_dir", "out")
    for i, image in enumerate(ig.to_uint8(drawn[1])):
        found = pixels(f"out/{i:05d}_label7.png").astype(int)
        assert abs(found - image[0].numpy().astype(int)).max() <= 1
    write_model("model.pt", build("vae", DIGITS.info(), prior="normal"))
    assert_error(call(*INFER, "--label", 7), 2, "--label 7", "without labels")


def test_codes_of_one_number_have_no_learned_prior():
    assert_error(call("--model", "vae", "--dataset", "digits", "--latent_dim", 1, *COMMON), 2, "--prior normal")
    assert build("vae", INFO, latent_dim=1, prior="normal").prior is None


# === likelihood of a VAE ===


@pytest.fixture
def toy(monkeypatch):
    """One number z ~ N(0, 1), 12 pixels that are white with the probability sigmoid(w z + b); q(z|x) is off a little.
    -> model, batch, exact -log p(x) by quadrature"""
    model = build("vae", dataclasses.replace(INFO, image_size=4), latent_dim=1, prior="normal").eval()
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(16, generator=generator) for _ in range(2))
    x = (torch.rand(20, 16, generator=generator) < 0.5).float()
    monkeypatch.setattr(model, "pixels_given", lambda z: (z * weight + bias).view(-1, 1, 4, 4))
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    logits = grid[:, None] * weight.double() + bias.double()
    log_joint = x.double() @ logits.T - nn.functional.softplus(logits).sum(1) - grid.square() / 2
    exact = -(torch.logsumexp(log_joint, 1) + math.log(0.004) - 0.5 * math.log(2 * math.pi))
    posterior = log_joint.softmax(1)
    mean = posterior @ grid
    spread = (posterior @ grid.square() - mean.square()).sqrt()
    monkeypatch.setattr(model, "encode", lambda images: (
        (mean + 0.5 * spread).float()[:, None], (2 * (1.3 * spread).log()).float()[:, None]))
    return model, x.view(-1, 1, 4, 4) * 2 - 1, exact.float()


def test_importance_weighted_likelihood_comes_down_to_the_exact_one(toy):
    model, images, exact = toy
    few, many = (model.nll(batch_of(images, step=step), codes).mean().item() for step, codes in ((0, 50), (1, 5000)))
    with torch.no_grad():
        elbos = [sum(model.bound(batch_of(images, step=step))[:2]).mean().item() for step in range(30)]
    assert many == pytest.approx(exact.mean().item(), abs=0.02)
    assert exact.mean() - 0.03 < few < np.mean(elbos) - 0.05  # a bound from above, and a better one


def test_evaluation_says_of_how_many_codes_its_likelihood_is():
    model = noisy_weights(build("vae", DIGITS.info()), 0.02).eval()
    few = dataclasses.replace(DIGITS, test=DIGITS.test[:6], test_labels=DIGITS.test_labels[:6])
    entry = model.more_figures(few, CPU)["iw_nll_nats"]
    assert entry["n"] == 6 and entry["codes"] == 1000 and math.isfinite(entry["value"])
    assert build("vae", INFO, likelihood="gaussian").more_figures(few, CPU) == {}


def test_code_that_carries_nothing_is_said(monkeypatch):
    model = build("vae", INFO)
    assert model.warnings({"val_kl": 20.0}) == [] and "--beta" in model.warnings({"val_kl": 0.1})[0]
    monkeypatch.setattr(ig.VaeModel, "validate", lambda self, batch: {"val_kl": 0.5})
    result = ok("--model", "vae", "--dataset", "digits", "--width", 8, "--epochs", 2, "--batch_size", 700,
                "--num_samples", 2, *COMMON)
    assert result.err.count("warning: ") == 1 and "KL 0.5 nats" in result.err


# === pixels ===


@pytest.mark.parametrize("name, flip, share", [
    ("cifar10", "auto", 0.5), ("cifar100", "auto", 0.5), ("digits", "auto", 0), ("mnist", "auto", 0),
    ("folder", "auto", 0), ("digits", "on", 0.5), ("cifar10", "off", 0)])
def test_images_are_mirrored_by_half_where_their_classes_allow_it(name, flip, share):
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4) + torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.arange(200) % 10
    images = ig.Images(name, pixels, labels, pixels, labels, list("0123456789"), name)
    config = ig.DiffusionConfig(flip=flip, batch_size=200)
    batch = images.training_batch(config, 0, ig.Draw(0, 0, 200, slice(None), CPU))
    plain = ig.to_float(pixels[images.order])
    same, mirrored = ((batch.images == x).flatten(1).all(1) for x in (plain, plain.flip(-1)))
    assert (same ^ mirrored).all() and mirrored.float().mean().item() == pytest.approx(share, abs=0.12 * (share > 0))
    assert torch.equal(batch.labels, labels[images.order])


@pytest.mark.parametrize("channels, value, expected", [
    (1, 0.95, 1.0), (1, -0.97, -1.0), (1, 0.85, 0.85), (1, -0.5, -0.5), (3, 0.95, 0.95), (3, -0.97, -0.97)])
def test_trace_on_black_or_white_is_taken_off_grey_images(channels, value, expected):
    model = build("diffusion", dataclasses.replace(INFO, channels=channels), steps=3)
    model.denoiser = lambda labels, count: lambda x, t: torch.full_like(x, value)
    drawn = model.sample(None, ig.Noise(0, range(2), CPU))
    torch.testing.assert_close(drawn, torch.full_like(drawn, expected))


# === names of classes ===


def test_classifier_names_what_is_in_pictures(classifier):
    paths, labels = [], DIGITS.test_labels[:10].tolist()
    for i, image in enumerate(DIGITS.test[:10]):
        Image.fromarray(image[0].numpy()).save(f"digit{i}.png")
        paths.append(f"digit{i}.png")
    result = ok("--mode", "infer", "--model", "classifier", "--checkpoint", classifier, "--device", "cpu", "--input",
                *paths)
    lines = [line for line in result.out.splitlines() if line.startswith("digit")]
    assert [line.split(":")[0] for line in lines] == paths
    named = [line.split(": ")[1].split(", ") for line in lines]
    net = ig.restore_model(ig.load_checkpoint(classifier)).eval()
    with torch.no_grad():
        shares = net(ig.to_float(DIGITS.test[:10]))[1].softmax(1)
    assert [words[0].split()[0] for words in named] == [str(k) for k in shares.argmax(1).tolist()]
    assert sum(words[0].split()[0] == str(label) for words, label in zip(named, labels)) >= 8
    for words, share in zip(named, shares.max(1).values.tolist()):
        assert float(words[0].split()[1].rstrip("%")) == pytest.approx(100 * share, abs=0.06)


@pytest.mark.parametrize("flags, code, expected", [
    ((), 2, ("--input",)), (("--input", "missing.png"), 1, ("missing.png", "not a file")),
    (("--input", "text.png"), 1, ("text.png", "can't be read")),
    (("--label", "3", "--input", "text.png"), 2, ("--label",)),
])
def test_classifier_without_a_picture_is_one_error(flags, code, expected, classifier):
    Path("text.png").write_text("no picture")
    assert_error(call("--mode", "infer", "--checkpoint", classifier, "--model", "classifier", *flags), code, *expected)


# === older files ===


def test_vae_of_an_older_script_draws_from_the_normal_prior():
    model = build("vae", DIGITS.info(), prior="normal")
    state = ig.load_checkpoint(write_model("model.pt", model, prior=..., flip=...))
    restored = ig.restore_model(state)
    assert restored.config.prior == "normal" and restored.prior is None and not restored.labelled
    assert not differs(restored.state_dict(), model.state_dict())
    ok(*INFER, "--num_samples", 2)


def test_diffusion_model_of_an_older_script_was_trained_by_adamw_and_drawn_from_unscaled_noise():
    model = flow_model()
    state = ig.load_checkpoint(write_model("model.pt", model, muon_rate=..., flip=..., init=..., temperature=...))
    restored = ig.restore_model(state)
    assert (restored.config.muon_rate, restored.config.temperature, restored.config.init) == (0, 1, None)
    ok(*INFER, "--num_samples", 2)

"""The VAE, the GAN and CIFAR-10 of image_gen.py: oracles, whole runs on real digits, accidents.

The contract that holds for every family (finite losses, all parameters learn, equal seeds draw equal images ...) stands
in test_image_gen.py, which also has the helpers.
"""
# ruff: noqa: F811 (fixtures are taken from there by name)
import dataclasses
import hashlib
import http.server
import io
import itertools
import math
import pickle
import re
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_error, read, records
from test_image_gen import (  # noqa: F401 (fixtures are taken by name)
    COMMON,
    EVALUATE,
    INFER,
    INFO,
    build,
    call,
    classifier,
    folders,
    ig,
    make_batch,
    noisy_weights,
    ok,
    place,
    recorded_grids,
    session_place,
)
from torch import distributions, nn

CPU = torch.device("cpu")


DIGITS = (*COMMON, "--dataset", "digits", "--num_samples", "4", "--epochs", "2", "--save_every", "5", "--width", "8")


RUNS = {"vae": ("--model", "vae", "--likelihood", "gaussian"),
        "gan": ("--model", "gan"), "plain": ("--model", "gan", "--no-conditional")}


FAKE_INFO = dataclasses.replace(INFO, image_size=4, classes=["one"], class_counts=[100])


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """(flags, folder) of a finished run of two epochs, 44 steps, of each kind."""
    path = tmp_path_factory.mktemp(request.param)
    with session_place(path) as patch, recorded_grids():
        patch.setattr(ig, "draw_curves", lambda trainer: None)
        ok(*RUNS[request.param], *DIGITS)
    return RUNS[request.param], path


def vae(**config):
    return build("vae", FAKE_INFO, **config)


def batch_of(images, step=0):
    return ig.Batch(images, torch.zeros(len(images), dtype=torch.long), ig.Draw(0, step, len(images), slice(None), CPU))


def test_divergence_from_the_prior_is_that_of_torch_distributions(monkeypatch):
    model = vae(latent_dim=5)
    mean, log_variance = torch.randn(6, 5), torch.randn(6, 5)
    monkeypatch.setattr(model, "encode", lambda x: (mean, log_variance))
    _, kl, _ = model.bound(batch_of(torch.zeros(6, 1, 4, 4)))
    exact = distributions.kl_divergence(distributions.Normal(mean, (log_variance / 2).exp()),
                                        distributions.Normal(torch.zeros(5), torch.ones(5))).sum(1)
    torch.testing.assert_close(kl, exact)


@pytest.mark.parametrize("channels, bernoulli", [(1, True), (3, False)])
def test_likelihood_suits_the_images_where_none_is_asked_for(channels, bernoulli):
    assert build("vae", dataclasses.replace(FAKE_INFO, channels=channels)).bernoulli is bernoulli
    assert not build("vae", FAKE_INFO, likelihood="gaussian").bernoulli


def test_undecided_bernoulli_costs_one_bit_per_pixel():
    model = vae(likelihood="bernoulli").eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # the code says nothing and costs nothing, each pixel is as likely black as white
    figures = model.validate(batch_of(torch.rand(8, 1, 4, 4) * 2 - 1))
    assert figures == pytest.approx({"val_loss": 1, "val_bits_per_dim": 1, "val_elbo": -16 * math.log(2), "val_kl": 0})


def test_bernoulli_is_binarised_as_brightly_as_the_image(monkeypatch):
    model, seen = vae(likelihood="bernoulli"), []
    monkeypatch.setattr(model, "encode", lambda x: seen.append(x) or (torch.zeros(len(x), 32),) * 2)
    model.bound(batch_of(torch.full((4000, 1, 4, 4), -0.5)))
    assert set(seen[0].unique().tolist()) == {-1, 1} and (seen[0] > 0).float().mean() == pytest.approx(0.25, abs=0.01)


def test_bound_of_a_linear_gaussian_model_with_its_exact_posterior_is_the_evidence(monkeypatch):
    """z ~ N(0, 1), x = Wz + noise, columns of W orthogonal: q(z|x) is diagonal, and the ELBO is log p(x) itself."""
    torch.manual_seed(0)
    model = vae(latent_dim=3, likelihood="gaussian").eval()
    weights = torch.linalg.qr(torch.randn(16, 3))[0] * torch.tensor([0.9, 0.5, 0.3])
    variance = 0.04
    model.variance.fill_(variance)
    precision = 1 + weights.square().sum(0) / variance
    monkeypatch.setattr(model, "pixels_given", lambda z: (z @ weights.T).view(-1, 1, 4, 4))
    monkeypatch.setattr(model, "encode", lambda x: (x.flatten(1) @ weights / variance / precision,
                                                    -precision.log().expand(len(x), 3)))
    x = torch.randn(1, 16) * 0.2
    figures = model.validate(batch_of(x.view(1, 1, 4, 4).expand(20_000, 1, 4, 4)))
    exact = distributions.MultivariateNormal(torch.zeros(16), weights @ weights.T + variance * torch.eye(16))
    expected = exact.log_prob(x).item() - 16 * math.log(127.5)  # of the pixel levels, which are 1/127.5 apart
    assert figures["val_elbo"] == pytest.approx(expected, abs=0.1)
    assert figures["val_bits_per_dim"] == pytest.approx(-expected / 16 / math.log(2), abs=0.01)


def reconstruction(model, x, noise):
    mean, log_variance = model.encode(x)
    return model.pixels_given(mean + noise * (log_variance / 2).exp())


def test_gradient_is_that_of_the_best_variance():
    """[Rybkin21]: with the variance at its optimum the Gaussian's cost is pixels/2 times the log of the mean error."""
    model = vae(likelihood="gaussian", beta=0).train()
    images = torch.rand(8, 1, 4, 4) * 2 - 1
    _, loss, _ = next(model.losses(batch_of(images)))
    found = torch.autograd.grad(loss * 16 * math.log(2), model.decoder[0].weight)[0]
    batch = batch_of(images)
    x = images + (batch.draw.uniform(1, 4, 4) - 0.5) / 127.5
    error = (reconstruction(model, x, batch.draw.normal(32)) - x).square().mean()
    expected = torch.autograd.grad(8 * error.log(), model.decoder[0].weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_vae_finds_its_images_again():
    images = ig.load_digits()
    model = build("vae", images.info(), beta=0.1, likelihood="gaussian", width=32).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    batch = make_batch(images, 8)
    for step in range(150):
        _, loss, _ = next(model.losses(batch._replace(draw=ig.Draw(0, step, 8, slice(None), CPU))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = batch.images
    assert (model.eval().reconstruct(x) - x).square().mean() < 0.1 * x.var()
    mean, log_variance = model.encode(x)
    assert mean.shape == log_variance.shape == (8, 32) and torch.equal(model.decode(mean), model.reconstruct(x))


class Linear(nn.Module):
    """D(x) = slope * mean(x); a generator that always draws its one number."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, labels):
        return self.value * x.mean((1, 2, 3)) if x.ndim == 4 else self.value.expand(len(x), 1, 4, 4)


def players_at(real: float, fake: float, **config):
    model = build("gan", FAKE_INFO, **config)
    model.discriminator, model.generator = Linear(1.0), Linear(fake)
    return model, batch_of(torch.full((4, 1, 4, 4), real))


def softplus(x):
    return math.log1p(math.exp(x))


def test_relativistic_losses_and_penalties_at_known_logits():
    model, batch = players_at(0.7, -0.4, penalty=3.0)
    (_, d_loss, stats), (_, g_loss, _) = model.losses(batch)
    penalty = 2 * 0.5 / 16  # the gradient of the mean of 16 pixels is 1/16 everywhere: squared norm 1/16, R1 and R2
    assert stats["penalty"].item() == pytest.approx(penalty)
    assert d_loss.item() == pytest.approx(softplus(-1.1) + 3 * penalty)
    assert g_loss.item() == pytest.approx(softplus(1.1))
    assert stats["d_real"].item() + stats["d_fake"].item() == pytest.approx(1)


def test_gradient_penalty_is_the_formula_and_has_a_gradient():
    """D(x) = x'Ax/2 + b'x has the gradient Ax + b."""
    torch.manual_seed(0)
    a, b, x = torch.randn(16, 16), torch.randn(16), torch.randn(5, 1, 4, 4)
    a = (a + a.T).requires_grad_()

    def penalty(a, x):
        flat = x.flatten(1)
        return ig.gradient_penalty(0.5 * (flat @ a * flat).sum(1) + flat @ b, x)

    found = penalty(a, x.requires_grad_())
    by_hand = 0.5 * (x.detach().flatten(1) @ a + b).square().sum(1).mean()
    torch.testing.assert_close(found, by_hand)
    symmetric = [g + g.T for g in (torch.autograd.grad(value, a)[0] for value in (found, by_hand))]
    torch.testing.assert_close(*symmetric)


def test_generator_sees_the_discriminator_after_its_step():
    model, batch = players_at(0.7, -0.4)
    steps = model.losses(batch)
    assert next(steps)[0] == "discriminator"
    with torch.no_grad():
        model.discriminator.value.fill_(5.0)
    player, value, _ = next(steps)
    assert player == "generator"
    assert value.item() == pytest.approx(softplus(2.0 + 3.5), rel=1e-5)
    value.backward()
    assert model.generator.value.grad is not None and model.discriminator.value.grad is None
    list(steps)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_discriminator_starts_without_an_opinion_on_classes():
    model = build("gan", INFO).train()
    x = torch.rand(6, 1, 8, 8)
    one, two = (model.discriminator(x, torch.full((6,), k)) for k in (0, 7))
    assert torch.equal(one, two)
    noisy_weights(model)
    assert not torch.equal(*(model.discriminator(x, torch.full((6,), k)) for k in (0, 7)))


@pytest.mark.parametrize("family", ["vae", "gan"])
def test_convs_are_added_at_each_resolution(family):
    def count(convs):
        model = build(family, dataclasses.replace(FAKE_INFO, image_size=16), convs=convs)
        assert model.sample(None, ig.Noise(0, range(2), CPU)).shape == (2, 1, 16, 16)
        return sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules())

    assert [count(convs) for convs in (0, 1, 2)] == [0, 4, 8]  # two resolutions on the way down and two on the way up


@pytest.mark.parametrize("size, side, widths", [(28, 7, [16, 8, 1]), (32, 4, [32, 16, 8, 1]), (8, 4, [8, 1]),
                                                (4, 4, [1]), (15, 15, [1])])
def test_pyramid_ends_at_a_small_square_and_networks_fit_it(size, side, widths):
    info = dataclasses.replace(FAKE_INFO, image_size=size)
    assert ig.pyramid(info, 8) == (side, widths)
    for family in ("vae", "gan"):
        model = build(family, info).eval()
        assert model.sample(None, ig.Noise(0, range(2), CPU)).shape == (2, 1, size, size)
        assert all(math.isfinite(v) for v in model.validate(batch_of(torch.zeros(3, 1, size, size))).values())


def test_image_size_that_can_not_be_halved_is_a_usage_error(folders):
    result = call("--model", "gan", "--dataset", "folder", "--data_root", folders["grey"], "--image_size", 34, *COMMON)
    assert_error(result, 2, "34 pixels", "--image_size")


def test_evaluation_has_the_likelihood_of_families_that_know_it(run, place, classifier):
    flags, folder = run
    shutil.copy(folder / "model.pt", place)
    ok(*EVALUATE, "--classifier", classifier, "--eval_samples", 40)
    metrics = ig.json.loads(Path("results/evaluation.json").read_text())["metrics"]
    assert ("val_elbo" in metrics) == (flags[1] == "vae")
    assert {"fid_digits_cnn", "class_share_min", "near_copies"} <= metrics.keys()
    assert (metrics["label_agreement"]["value"] is None) == (flags == RUNS["plain"])


@pytest.mark.parametrize("flags, code, word", [
    (("--model", "gan", "--beta", "2"), 2, "vae"), (("--model", "vae", "--penalty", "1"), 2, "gan"),
    (("--model", "gan", "--no-conditional", "--label", "7"), 2, "without labels"),
    (("--model", "vae", "--conditional"), 2, "gan"),
    (("--model", "diffusion", "--label_dropout", "0", "--guidance", "2"), 2, "--label_dropout"),
    (("--model", "diffusion", "--convs", "2"), 2, "vae or gan"), (("--model", "gan", "--convs", "-1"), 2, "--convs"),
    (("--model", "vae", "--prior", "normal", "--label", "7"), 2, "without labels"),
    (("--model", "vae", "--latent_dim", "0"), 2, "--latent_dim"), (("--model", "vae", "--beta", "-1"), 2, "--beta"),
    (("--model", "gan", "--adam_beta1", "1"), 2, "unknown"), (("--model", "gan", "--penalty", "nan"), 2, ""),
    (("--model", "gan", "--sampler", "ddim"), 2, "diffusion"), (("--model", "vae", "--likelihood", "x"), 2, "gaussian"),
])
def test_wrong_flag_is_a_usage_error(flags, code, word, monkeypatch):
    monkeypatch.setattr(ig.Trainer, "train_step", lambda self: pytest.fail("training started"))
    assert_error(call("--dataset", "digits", *COMMON, *flags), code, word)


def test_nearly_black_is_black_in_grey_pictures_alone():
    levels = torch.tensor([-1, -0.9, -0.87, 0.0, 0.87, 0.9, 1]).view(1, 1, 1, 7)
    assert ig.settled(levels).flatten().tolist() == pytest.approx([-1, -1, -0.87, 0, 0.87, 1, 1])
    assert torch.equal(ig.settled(levels.expand(1, 3, 1, 7)), levels.expand(1, 3, 1, 7))


@pytest.mark.parametrize("family", ["diffusion", "vae", "gan"])
def test_pictures_of_every_family_are_settled(family, monkeypatch):
    monkeypatch.setattr(ig, "settled", lambda x: torch.full_like(x, 0.25))
    drawn = build(family, INFO).eval().sample(torch.arange(2), ig.Noise(0, range(2), CPU))
    assert drawn.shape == (2, 1, 8, 8) and (drawn == 0.25).all()


def test_labelled_family_draws_the_labels_that_are_asked(run, place):
    flags, folder = run
    shutil.copy(folder / "model.pt", place)
    if flags == RUNS["plain"]:
        return assert_error(call(*INFER, "--label", 3), 2, "without labels")
    ok(*INFER, "--label", 3, "--output_dir", "out", "--num_samples", 2)
    assert sorted(p.name for p in Path("out").glob("*.png")) == ["00000_label3.png", "00001_label3.png"]
    assert_error(call(*INFER, "--conditional"), 2, "--mode train")


@pytest.mark.parametrize("family, code", [("gan", 0), ("vae", 1)])
def test_loss_that_grows_is_divergence_for_families_alone_whose_loss_is_to_fall(family, code, monkeypatch):
    kind, original, calls = ig.FAMILIES[family], ig.FAMILIES[family].losses, itertools.count(1)

    def losses(self, batch):
        factor = 1000 if next(calls) > 30 else 1
        for player, loss, stats in original(self, batch):
            yield player, loss * factor, stats

    monkeypatch.setattr(kind, "losses", losses)
    assert call(*RUNS[family], *DIGITS).code == code


@pytest.mark.parametrize("stats, word", [({"d_real": 0.99, "d_fake": 0.01}, "discriminator wins"),
                                         ({"class_share_min": 0.005}, "classes vanish")])
def test_run_that_goes_wrong_is_said_once(stats, word, monkeypatch):
    original = ig.GanModel.warnings
    monkeypatch.setattr(ig.GanModel, "warnings", lambda self, figures: original(self, {
        "d_real": 0.8, "d_fake": 0.1, "class_share_min": 0.05} | stats))
    lines = [line for line in re.split(r"[\r\n]", ok(*RUNS["gan"], *DIGITS).err) if line.startswith("warning: ")]
    assert len(lines) == 1 and word in lines[0]
    monkeypatch.setattr(ig.GanModel, "warnings", lambda self, figures: original(self, {
        "d_real": 0.8, "d_fake": 0.1, "class_share_min": 0.05}))
    assert "warning" not in ok(*RUNS["gan"], *DIGITS).err


def test_classes_are_counted_between_epochs(classifier):
    ok(*RUNS["gan"], *DIGITS, "--classifier", classifier, "--eval_samples", 40)
    last = records("results")[-1]
    assert 0 <= last["class_share_min"] <= 0.1 <= last["class_share_max"] <= 1
    assert 0 < last["real_class_share_min"] <= 0.1


@pytest.mark.parametrize("path", sorted((ROOT / "image_gen" / "pretrained").glob("*.pt")), ids=lambda path: path.name)
def test_shipped_weights_load(path):
    assert ig.load_checkpoint(path)["family"] in ig.FAMILIES


@pytest.fixture
def tiny_cifar(monkeypatch):
    """An archive of torchvision's layout with six files of twenty pictures, which it takes for CIFAR-10: its bytes."""
    from torchvision.datasets import CIFAR10
    rng = np.random.default_rng(0)
    names = [f"class{i}" for i in range(10)]
    files = {name: pickle.dumps({"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
                                 "labels": [i % 10 for i in range(20)]}) for name, _ in
             (*CIFAR10.train_list, *CIFAR10.test_list)} | {"batches.meta": pickle.dumps({"label_names": names})}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, part, [[name, sums[name]] for name, _ in getattr(CIFAR10, part)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(ig.time, "sleep", lambda seconds: None)
    return buffer.getvalue()


@pytest.fixture
def tiny_cifar100(monkeypatch, place):
    """A folder with cifar-100-python/, whose files torchvision takes for the real ones, and what they hold."""
    from torchvision.datasets import CIFAR100
    rng = np.random.default_rng(1)
    content = {name: {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
                      "fine_labels": [7 * i % 100 for i in range(count)], "coarse_labels": [0] * count}
               for name, count in (("train", 30), ("test", 20))}
    content["meta"] = {"fine_label_names": [f"kind{i}" for i in range(100)]}
    folder = place / "pictures" / CIFAR100.base_folder
    folder.mkdir(parents=True)
    sums = {}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
        sums[name] = hashlib.md5(pickle.dumps(value)).hexdigest()
    for part in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{part}_list", [[part, sums[part]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    monkeypatch.setattr(ig.time, "sleep", lambda seconds: None)
    return folder.parent, content


@pytest.fixture
def cifar_server(tiny_cifar, monkeypatch):
    """A web server of this machine; `answers` are bodies for the next requests, then the whole archive."""
    from torchvision.datasets import CIFAR10
    answers, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            head = self.headers.get("Method") == "HEAD"  # torchvision's look for redirections
            body = b"" if head else answers.pop(0) if answers else tiny_cifar
            asked.extend([self.path] * (not head))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    yield answers, asked
    server.shutdown()
    server.server_close()
    thread.join()


def unpack(tiny_cifar, place) -> Path:
    with tarfile.open(fileobj=io.BytesIO(tiny_cifar)) as archive:
        archive.extractall(place / "data", filter="data")
    return place / "data" / "cifar-10-batches-py"


def test_cifar10_is_downloaded_once(cifar_server, place):
    answers, asked = cifar_server
    answers.append(b"<html>Please log in to this network</html>")  # the first attempt fails
    assert "100 training and 20 test images" in ok("--prepare_data", "--dataset", "cifar10").out
    assert len(asked) == 2 and not (place / "script" / "data" / "cifar-10-python.tar.gz").exists()
    images = ig.load_cifar("cifar10", None)
    assert len(asked) == 2 and images.train.shape == (100, 3, 32, 32) and images.train.dtype == torch.uint8
    assert images.classes[3] == "class3" and images.test_labels.tolist() == [i % 10 for i in range(20)]
    content = pickle.loads((place / "script/data/cifar-10-batches-py/test_batch").read_bytes())
    assert np.array_equal(images.test.flatten(1).numpy(), content["data"])


def test_cifar100_is_read_from_its_own_files(tiny_cifar100, place):
    folder, content = tiny_cifar100
    images = ig.load_cifar("cifar100", folder)
    assert (images.info().dataset, images.title, len(images.classes)) == ("cifar100", "CIFAR-100", 100)
    assert images.train.shape == (30, 3, 32, 32) and images.test.shape == (20, 3, 32, 32)
    assert np.array_equal(images.test.flatten(1).numpy(), content["test"]["data"])
    assert images.train_labels.tolist() == content["train"]["fine_labels"]  # a hundred kinds, not the twenty groups
    assert "30 training and 20 test images" in ok("--prepare_data", "--dataset", "cifar100", "--data_root", folder).out
    (folder / "cifar-100-python" / "train").write_bytes(b"damaged")
    assert_error(call("--prepare_data", "--dataset", "cifar100", "--data_root", folder), 1, "train", "md5")
    assert_error(call("--prepare_data", "--dataset", "cifar100"), 3, "CIFAR-100", "--data_root")


def test_cifar10_that_can_not_be_reached_is_status_3(tiny_cifar):
    assert_error(call("--prepare_data", "--dataset", "cifar10"), 3, "CIFAR-10", "--data_root")


def test_damaged_file_of_the_user_is_an_error_and_stays(tiny_cifar, place):
    folder = unpack(tiny_cifar, place)
    (folder / "data_batch_3").write_bytes(b"damaged")
    result = call("--prepare_data", "--dataset", "cifar10", "--data_root", "data")
    assert_error(result, 1, "data_batch_3", "md5")
    assert (folder / "data_batch_3").read_bytes() == b"damaged"


@pytest.mark.parametrize("family, size", [("diffusion", ("--channels", 16, "--blocks", 1, "--steps", 2)),
                                          ("vae", ("--width", 8)), ("gan", ("--width", 8)),
                                          ("classifier", ("--width", 8))])
def test_every_family_learns_from_cifar10(family, size, tiny_cifar, place):
    unpack(tiny_cifar, place)
    more = () if family == "classifier" else ("--num_samples", 2)
    ok("--model", family, "--dataset", "cifar10", "--data_root", "data", "--epochs", 1, *COMMON, *size, *more)
    state = read("model.pt")
    assert (state["data"]["channels"], state["data"]["image_size"]) == (3, 32)
    assert (state["data"]["dataset"], state["data"]["classes"][9]) == ("cifar10", "class9")
    if family != "classifier":
        ok(*INFER, "--num_samples", 2)


@pytest.mark.parametrize("family, option, held", [("gan", "gan_loss", "relativistic"), ("vae", "network", "conv")])
def test_file_made_with_an_option_that_is_gone_is_read_only_where_it_means_what_is_left(family, option, held):
    model = build(family, FAKE_INFO)
    state = {"family": family, "config": dataclasses.asdict(model.config) | {option: held},
             "data": dataclasses.asdict(FAKE_INFO), "ema": model.state_dict()}
    assert ig.restore_model(state).config == model.config
    state["config"][option] = "other"
    with pytest.raises(ig.UserError, match=f"--{option} other, which is no more"):
        ig.restore_model(state)


def test_gan_is_trained_as_its_paper_says():
    model = build("gan", INFO)
    for player in model.players().values():
        group = model.optimizer(player).param_groups[0]
        assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (5e-4, (0.0, 0.99), 0)

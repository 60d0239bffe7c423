"""explore.py, which looks at trained image models: oracles, every task on every family, comparisons, accidents.

The helpers are those of test_image_gen.py; the models are tiny ones of scikit-learn's digits.
"""
# ruff: noqa: F811 (fixtures are taken from there by name)
import dataclasses
import gzip
import itertools
import json
import math
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_error
from PIL import Image
from test_image_gen import (  # noqa: F401 (fixtures are taken by name)
    COMMON,
    EVALUATE,
    INFER,
    INFO,
    SCRIPT,
    SMALL,
    build,
    classifier,
    folders,
    ig,
    inception_weights,
    noisy_weights,
    ok,
    pixels,
    place,
    session_place,
    write_folder,
)
from torch import distributions

EXPLORE = ROOT / "image_gen" / "explore.py"
CPU = torch.device("cpu")
ex = conftest.load_explore("image_gen")
SPEED = ig.drawing_speed
CAN = {"interpolate": ("diffusion", "vae", "gan"), "denoise": ("diffusion",), "reconstruct": ("vae",),
       "traverse": ("vae",), "ood": ("vae",), "latent": ("vae",)}
VAE_TASKS = [task for task in CAN if "vae" in CAN[task]]
LOOK = ("--device", "cpu", "--precision", "float32", "--results_dir", "results")


@pytest.fixture(autouse=True)
def beside(place, monkeypatch):
    """Speed is measured by the one test that is about it."""
    (place / "script").mkdir(exist_ok=True)
    monkeypatch.setattr(ig, "drawing_speed", lambda model: {
        "ms_per_image_at_batch_1": 2.0, "ms_per_image_at_best_batch": 0.5, "best_batch": 64})


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list]:
    """What tasks put into their pictures: {"NAME.png": rows, "NAME.gif": frames}."""
    seen, sheet, animation = {}, ex.sheet, ex.animation
    monkeypatch.setattr(ex, "sheet", lambda rows, path, *more: seen.update({path.name: rows}) or sheet(
        rows, path, *more))
    monkeypatch.setattr(ex, "animation", lambda frames, path, *more, **how: seen.update(
        {path.name: frames}) or animation(frames, path, *more, **how))
    return seen


def explore(name: str, checkpoint, *flags):
    return conftest.call(ex, name, "--checkpoint", checkpoint, *LOOK, *flags)


def task(name: str, checkpoint: Path, *flags):
    result = explore(name, checkpoint, *flags)
    assert result.code == 0, result.err
    return result


def compared(*arguments):
    result = conftest.call(ex, "compare", *arguments, *LOOK)
    assert result.code == 0, result.err
    return result


def scene(checkpoint: Path, kind=ex.ReconstructOptions, **given):
    state = ig.load_checkpoint(checkpoint)
    given = {"dataset": state["data"]["dataset"], **given}
    command = ig.Command("infer", state["family"], given, checkpoint, state)
    return ex.Scene("test", command, command.options(kind), ig.restore_model(state).eval(), Path("results"))


FLAGS = {"diffusion": ("--model", "diffusion", *SMALL), "gan": ("--model", "gan", "--width", 8),
         "vae": ("--model", "vae", "--width", 16, "--latent_dim", 8),
         "plain": ("--model", "vae", "--width", 8, "--prior", "normal", "--likelihood", "gaussian"),
         "one": ("--model", "vae", "--width", 8, "--prior", "normal", "--latent_dim", 1)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A trained checkpoint of each kind."""
    base, found = tmp_path_factory.mktemp("models"), {}
    for name, flags in FLAGS.items():
        with session_place(base) as patch:
            patch.setattr(ig, "draw_curves", lambda trainer: None)
            ok(*flags, "--dataset", "digits", "--epochs", 12 if name == "vae" else 2, "--num_samples", 2, *COMMON,
               "--checkpoint", f"{name}.pt")
        found[name] = base / f"{name}.pt"
    return found


def report(name: str, folder: str = "results") -> dict:
    return json.loads((Path(folder) / f"{name}.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def foreign(count: int = 20) -> Path:
    """A folder of pictures that are no digits."""
    return write_folder(Path("foreign"), True, count)


def save(name: str, image) -> str:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(name)
    return name


def own_digits(count: int) -> list[str]:
    images = ig.load_digits().test
    return [save(f"digit{i}.png", images[i, 0].numpy()) for i in range(count)]


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_spherical_way_has_its_ends_its_lengths_and_an_even_pace(share):
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 5.0, 0])  # a quarter of a circle
    angle, length = share * math.pi / 2, 3 + 2 * share
    expected = torch.tensor([math.cos(angle), math.sin(angle), 0]) * length
    torch.testing.assert_close(ex.spherical(a, b, share), expected, rtol=1e-6, atol=1e-6)


def test_spherical_way_between_long_noises_keeps_their_length():
    a, b = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 0.5, 0.9, 1.0):
        point = ex.spherical(a, b, share)
        assert point.shape == a.shape and point.dtype == a.dtype
        assert point.norm().item() == pytest.approx((1 - share) * a.norm().item() + share * b.norm().item(), rel=1e-5)
    torch.testing.assert_close(ex.spherical(a, b, 0.0), a)
    torch.testing.assert_close(ex.spherical(a, b, 1.0), b)
    assert (a.lerp(b, 0.5)).norm() < 0.8 * a.norm()  # the straight line, which it is there to avoid


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_spherical_way_between_ends_without_an_angle(share):
    a = torch.randn(100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ex.spherical(a, a.clone(), share), a)
    torch.testing.assert_close(ex.spherical(a, 2 * a, share), a * (1 + share))
    assert torch.isfinite(ex.spherical(a, -a, share)).all()
    assert torch.isfinite(ex.spherical(a, torch.zeros(100), share)).all()
    assert not ex.spherical(torch.zeros(100), torch.zeros(100), share).any()


def test_divergence_of_a_dimension_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    exact = distributions.kl_divergence(distributions.Normal(mean, (log_variance / 2).exp()),
                                        distributions.Normal(torch.zeros(4), torch.ones(4))).mean(0)
    torch.testing.assert_close(ex.kl_by_dimension(mean, log_variance), exact)
    assert not ex.kl_by_dimension(torch.zeros(3, 2), torch.zeros(3, 2)).any()


def test_separation_is_the_count_of_pairs_and_of_images_below_the_threshold():
    own = torch.arange(100).float()  # 95 % of them lie at or below 94.05
    others = torch.tensor([-5.0, 50.5, 94.0, 94.5, 200.0])
    pairs = [(f > o) + 0.5 * (f == o) for f in others.tolist() for o in own.tolist()]
    found = ex.separation(own, others)
    assert found["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["fpr_at_95_tpr"] == pytest.approx(3 / 5)
    assert ex.separation(own, own + 1000) == {"auroc": 1, "fpr_at_95_tpr": 0}
    assert ex.separation(own, own - 1000) == {"auroc": 0, "fpr_at_95_tpr": 1}  # never turned round
    assert ex.separation(torch.ones(9), torch.ones(4)) == {"auroc": 0.5, "fpr_at_95_tpr": 1}


def test_distance_of_images_is_the_root_of_their_mean_square():
    a = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    b = torch.tensor([[[[0, 0], [0, 200]]], [[[255] * 2] * 2]], dtype=torch.uint8)
    assert ex.levels_apart(a, b).tolist() == ex.levels_apart(b, a).tolist() == [100, 255]


def test_decibels_of_a_known_error():
    found = ex.decibels(torch.tensor([1.0, 0.01, 0.0]))
    assert found[:2].tolist() == pytest.approx([0, 20]) and math.isfinite(found[2])


def test_noise_on_the_way_is_that_of_the_images_at_its_ends():
    path = ex.NoisePath(5, (2, 7), [0.0, 0.5, 1.0], CPU)
    ends, middle = ig.Noise(5, [2, 7], CPU), path.normal(4, 3)
    first = ends.normal(4, 3)
    torch.testing.assert_close(middle[[0, 2]], first)
    assert len(path) == 3 and not torch.equal(middle[1], first[0])
    later = path.normal(2)  # what a sampler draws on its way is the same for all
    assert torch.equal(later, ends.normal(2)[:1].expand(3, 2))


def feature_net():
    return types.SimpleNamespace(name="test_cnn", width=2, names_classes=True)


def features_of(labels: list[int], classes: int = 4):
    logits = torch.nn.functional.one_hot(torch.tensor(labels), classes).float() * 50
    return ig.Features(torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(0)), logits)


@pytest.mark.parametrize("labels, covered, balance", [
    ([0, 1, 2, 3] * 5, 4, 1.0), ([2] * 20, 1, 0.0), ([0, 1] * 10, 2, 0.5),
    ([0] * 97 + [1, 2, 3], 1, None), ([0] * 91 + [1] * 3 + [2] * 3 + [3] * 3, 4, None),
])
def test_coverage_and_balance_of_known_shares(labels, covered, balance):
    """Covered is a class with a tenth of an equal share, here 2.5 %."""
    for quick in (True, False):
        values, _ = ig.measure(features_of(labels), features_of([0, 1, 2, 3] * 5), feature_net(), quick=quick)
        shares = np.bincount(labels, minlength=4) / len(labels)
        entropy = -sum(p * math.log(p) for p in shares if p) / math.log(4)
        assert values["classes_covered"] == covered
        assert values["class_balance"] == pytest.approx(entropy if balance is None else balance, abs=1e-6)


@pytest.mark.parametrize("fixed, each, best, expected", [
    (4, 1, 256, 1 + 4 / 256), (0, 3, None, 3), (100, 0, 256, None)])
def test_speed_is_that_of_the_batch_that_does_best(fixed, each, best, expected, monkeypatch):
    """A clock that only drawing moves: so many milliseconds a batch and so many an image."""
    clock = [0.0]

    class Model:
        data, labelled, training = types.SimpleNamespace(class_counts=[5, 5], classes=["a", "b"]), True, False
        config = types.SimpleNamespace(seed=0)

        def parameters(self):
            return iter([torch.zeros(1)])

        def eval(self):
            pass

        def train(self, mode):
            pass

        def sample(self, labels, noise):
            assert len(labels) == len(noise)
            clock[0] += (fixed + each * len(noise)) / 1000
            return torch.zeros(len(noise), 1, 2, 2)

    monkeypatch.setattr(ig, "drawing_speed", SPEED)  # not the stand-in of the fixture
    monkeypatch.setattr(ig.time, "perf_counter", lambda: clock[0])
    found = ig.drawing_speed(Model())
    assert found["ms_per_image_at_batch_1"] == pytest.approx(fixed + each)
    assert found["best_batch"] == best or (best is None and found["best_batch"] in (1, 8, 64, 256))
    assert found["ms_per_image_at_best_batch"] == pytest.approx(expected or fixed / 256, abs=1e-4)


def places(canvas: np.ndarray, image: torch.Tensor) -> list[tuple[int, int]]:
    """Where in a picture [H W 3] an image stands, enlarged by the factor that fits a cell of 72 pixels: (y, x)"""
    tile = image.permute(1, 2, 0).numpy().repeat(72 // image.shape[-1], 0).repeat(72 // image.shape[-1], 1)
    tile = np.broadcast_to(tile, (*tile.shape[:2], 3))
    starts = np.argwhere((canvas == tile[0, 0]).all(-1)).tolist()
    return [(y, x) for y, x in starts if np.array_equal(canvas[y:y + 72, x:x + 72], tile)]


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_has_the_given_pixels_in_rows_and_columns(channels):
    rows = list(torch.randint(256, (2, 3, channels, 8, 8), dtype=torch.uint8,
                              generator=torch.Generator().manual_seed(0)))
    ex.sheet([rows[0], rows[1][:2]], Path("sheet.png"), "a title", ["one", "two"], ["a", "b", "c"])
    canvas = pixels("sheet.png")
    assert canvas.ndim == 3 and Image.open("sheet.png").format == "PNG"
    found = [[places(canvas, image) for image in row] for row in (rows[0], rows[1][:2])]
    assert all(len(spots) == 1 for row in found for spots in row)  # each once, and whole
    assert not places(canvas, rows[1][2])
    ys, xs = ([[spots[0][axis] for spots in row] for row in found] for axis in (0, 1))
    assert len(set(ys[0])) == len(set(ys[1])) == 1 and ys[0][0] + 72 <= ys[1][0]
    assert xs[0][:2] == xs[1] and all(b - a >= 72 for a, b in itertools.pairwise(xs[0]))
    assert (canvas[:ys[0][0]] < 100).any()  # a title above ...
    assert (canvas[ys[1][0]:ys[1][0] + 72, :xs[1][0]] < 200).any()  # ... and the row's name beside


def gif(path) -> list[np.ndarray]:
    with Image.open(path) as file:
        assert file.format == "GIF" and file.info["loop"] == 0
        return [np.asarray((file.seek(i), file.convert("RGB"))[1]) for i in range(file.n_frames)]


@pytest.mark.parametrize("back", [True, False])
def test_animation_shows_the_frames_there_and_back(back):
    levels = torch.arange(5, dtype=torch.uint8)[:, None, None, None, None] * 50
    ex.animation(levels.expand(5, 2, 1, 8, 8), Path("way.gif"), 6, back)
    frames = gif("way.gif")
    assert [round(frame[frame.shape[0] // 2, 30].mean() / 50) for frame in frames] == (
        [0, 1, 2, 3, 4, 3, 2, 1] if back else [0, 1, 2, 3, 4])
    with Image.open("way.gif") as file:
        times = [(file.seek(i), file.info["duration"])[1] for i in range(file.n_frames)]
    assert times[4] == 6 * times[1] and times[0] == (times[4] if back else times[1])


COUNTS = {"interpolate": ("--num_samples", 3, "--frames", 5), "reconstruct": ("--num_samples", 11),
          "traverse": ("--frames", 5), "denoise": ("--num_samples", 4), "ood": ("--num_samples", 60),
          "latent": ("--num_samples", 60)}


FIELDS = {"interpolate": {"between", "shares", "pairs", "units"}, "reconstruct": {"images", "mean", "floor"},
          "traverse": {"image", "values", "dead", "dimensions", "kl_images"},
          "denoise": {"images", "looks", "sampler", "steps"},
          "ood": {"own", "best_score", "floor_score", "foreign", "worse_than_chance", "means", "definitions"},
          "latent": {"knn_accuracy", "neighbours", "floors", "tsne_images"}}


CELLS = {"interpolate": (3, 5), "reconstruct": (4, 8), "denoise": (8, 4)}  # rows and columns of the sheet


@pytest.mark.parametrize("name, kind", [(name, kind) for name in CAN for kind in FLAGS if (
    kind if kind not in ("plain", "one") else "vae") in CAN[name]])
def test_task_writes_a_picture_and_its_figures_and_nothing_else(name, kind, models):
    """Also of a VAE with one number in its code, and of one without a learned prior."""
    more = ("--ood_root", foreign()) if name == "ood" else ()
    before = set(Path().rglob("*"))
    result = task(name, models[kind], *COUNTS[name], *more)
    animated = name in ("interpolate", "denoise")
    written = {path for path in set(Path().rglob("*")) - before
               if path.is_file() and path.suffix != ".pyc" and path.name != ".results"}
    assert written == {Path("results", f"{name}.{end}") for end in ("png", "json", *["gif"] * animated)}
    assert result.out.splitlines()[-1].startswith("-> ") and not result.err
    found = report(name)
    assert FIELDS[name] <= found.keys() and found["task"] == name
    assert (found["model"], found["dataset"]) == (FLAGS[kind][1], "digits (scikit-learn)")
    assert found["checkpoint_sha256"] == ig.file_digest(models[kind])
    shape = pixels(f"results/{name}.png").shape
    if name in ("ood", "latent"):
        assert shape[0] > 400 and shape[1] > 400
    else:
        dimensions = ig.load_checkpoint(models[kind])["config"].get("latent_dim", 0)
        rows, columns = CELLS.get(name, (min(12, dimensions), 7))
        assert 0 <= shape[0] - rows * 76 < 80 and 0 <= shape[1] - columns * 76 < 400
    if animated:
        assert len(gif(f"results/{name}.gif")) == (8 if name == "interpolate" else len(found["looks"]) + 1)


@pytest.mark.parametrize("kind", ["diffusion", "gan"])
def test_ends_of_an_interpolation_are_what_sampling_draws(kind, models, drawn):
    flags = ("--seed", 4) + (("--sampler", "ddim") if kind == "diffusion" else ())
    task("interpolate", models[kind], "--num_samples", 2, "--frames", 3, "--label", "3,5", *flags)
    for pair, label in enumerate((3, 5)):
        ok(*INFER, "--checkpoint", models[kind], "--output_dir", label, "--num_samples", 4, "--label", label, *flags)
        strip = drawn["interpolate.png"][pair]
        for end, number in ((strip[0], 2 * pair), (strip[-1], 2 * pair + 1)):
            sample = torch.from_numpy(pixels(f"{label}/{number:05d}_label{label}.png").copy())
            assert (end[0].int() - sample.int()).abs().max() <= 1  # sums are ordered otherwise in another batch
    assert not torch.equal(*(strip[0] for strip in drawn["interpolate.png"]))
    found = report("interpolate")
    names = ["class 3, samples 0 to 1", "class 5, samples 2 to 3"]
    assert found["seed"] == 4 and [row["pair"] for row in found["pairs"]] == names
    assert len(found["pairs"][0]["step_levels"]) == 2


def test_ends_of_a_vae_strip_are_the_reconstructions_of_its_images(models, drawn):
    task("interpolate", models["vae"], "--label", "3,8", "--num_samples", 2, "--frames", 4)
    strips = drawn["interpolate.png"]
    task("reconstruct", models["vae"], "--label", "3,8", "--num_samples", 4)
    originals, copies = drawn["reconstruct.png"]
    for pair, strip in enumerate(strips):
        torch.testing.assert_close(strip[[0, -1]].int(), copies[2 * pair:2 * pair + 2].int(), rtol=0, atol=1)
    images = ig.load_digits()
    for image, label in zip(originals, (3, 8, 3, 8)):
        own = images.test[images.test_labels == label]
        assert (own == image).flatten(1).all(1).any()  # a held-out image of that class
    assert [row["pair"] for row in report("interpolate")["pairs"]] == ["3 to 8"] * 2
    steps = report("interpolate")["pairs"][0]
    found = ex.levels_apart(strips[0][1:], strips[0][:-1])
    assert steps["step_levels"] == pytest.approx(found.tolist())
    assert steps["largest_step_share"] == pytest.approx((found.max() / found.sum()).item())


def test_way_from_noise_ends_in_what_sampling_draws(models, drawn):
    ok(*INFER, "--checkpoint", models["diffusion"], "--output_dir", "out", "--num_samples", 3, "--steps", 6,
       "--guidance", 1)
    samples = [torch.from_numpy(pixels(path).copy()) for path in sorted(Path("out").glob("*.png"))]
    task("denoise", models["diffusion"], "--steps", 6, "--frames", 4, "--guidance", 1)
    rows = drawn["denoise.png"]
    assert len(rows) == 6 and all(len(row) == 5 for row in rows)
    for i, image in enumerate(samples):
        assert torch.equal(rows[2 * i][-1][0], image) and torch.equal(rows[2 * i + 1][-1][0], image)
    looks = report("denoise")["looks"]
    assert len(looks) == report("denoise")["network_evaluations"] and len(drawn["denoise.gif"]) == len(looks) + 1
    schedule = ig.restore_model(ig.load_checkpoint(models["diffusion"])).noise_schedule
    for look in looks:
        assert look["alpha"] == pytest.approx(schedule.alphas[look["t"]].item())
        assert look["sigma"] == pytest.approx(schedule.sigmas[look["t"]].item())
    assert [look["t"] for look in looks] == sorted((look["t"] for look in looks), reverse=True)
    assert looks[-1]["x_to_image_levels"] < looks[0]["x_to_image_levels"]


@pytest.mark.parametrize("sampler", sorted(ig.SAMPLERS))
def test_watching_changes_nothing_and_sees_every_look(sampler):
    info, seen = dataclasses.replace(INFO, classes=list("ab"), class_counts=[1, 1]), []
    objective = {"objective": "consistency", "init": "model.pt"} if sampler == "consistency" else {}
    model = noisy_weights(build("diffusion", info, sampler=sampler, steps=4, **objective)).eval()
    labels = torch.tensor([0, 1])
    alone = model.sample(labels, ig.Noise(0, range(2), CPU))
    watched = model.sample(labels, ig.Noise(0, range(2), CPU), watch=lambda t, x, e: seen.append((t, x, e)))
    assert torch.equal(alone, watched)
    assert [t for t, _, _ in seen] == model.times() and len(seen) == 4
    denoise = model.denoiser(labels, 2)
    with model.cast(), torch.no_grad():
        torch.testing.assert_close(denoise(seen[1][1], seen[1][0]), seen[1][2])
    last = seen[-1][2]  # the estimate that is the image, but for traces on its black and white
    torch.testing.assert_close(ig.settled(last), alone)


def test_reconstruction_figures_are_those_by_hand(models, drawn):
    task("reconstruct", models["vae"], "--num_samples", 9)
    originals, copies = (torch.cat(drawn["reconstruct.png"][part::2]) for part in (0, 1))
    model, images = scene(models["vae"]).model, ig.load_digits()
    assert torch.equal(originals, images.test[torch.randperm(360, generator=torch.Generator().manual_seed(0))[:9]])
    x = ig.to_float(originals)
    with torch.no_grad():
        back = model.decode(model.encode(x)[0])
    assert torch.equal(copies, ig.to_uint8(back))
    mse = ((back - x) / 2).square().flatten(1).mean(1)
    found = report("reconstruct")
    assert [row["mse"] for row in found["images"]] == pytest.approx(mse.tolist(), rel=1e-4)
    assert [row["psnr_db"] for row in found["images"]] == pytest.approx((-10 * mse.log10()).tolist(), rel=1e-4)
    assert found["mean"]["mse"] == pytest.approx(mse.mean().item(), rel=1e-4)
    assert found["mean"]["n"] == 9 and {"kl_nats", "reconstruction_nats"} <= found["mean"].keys()
    grey = images.train.float().mean(0)
    assert found["floor"]["mse"] == pytest.approx(((originals - grey) / 255).square().mean().item(), rel=1e-4)
    assert found["mean"]["mse"] < found["floor"]["mse"]  # the model has learned something


def test_traversal_moves_one_number_and_orders_them_by_their_divergence(models, drawn):
    task("traverse", models["vae"], "--frames", 3, "--label", 7)
    made, found, rows = scene(models["vae"]), report("traverse"), drawn["traverse.png"]
    images = made.images
    expected = ex.kl_by_dimension(*made.codes(images.test))
    order = [entry["dimension"] for entry in found["dimensions"]]
    assert order == expected.argsort(descending=True).tolist() and found["kl_images"] == 360
    assert [entry["kl_nats"] for entry in found["dimensions"]] == pytest.approx(expected[order].tolist(), rel=1e-3)
    assert found["dead"] == (expected < ex.DEAD).nonzero().flatten().tolist() and found["values"] == [-3, 0, 3]
    code = made.codes(rows[0][:1])[0][0]
    assert found["image"] == "7" and len(rows) == 8
    with torch.no_grad():
        for dimension, row in zip(order, rows):
            for value, shown in zip((-3, 0, 3), row[2:]):
                moved = code.clone()
                moved[dimension] = value
                assert (made.decode(moved[None])[0].int() - shown.int()).abs().max() <= 1
    assert all(torch.equal(row[0], rows[0][0]) for row in rows)


def test_foreign_images_are_told_from_own_ones(models):
    result = task("ood", models["vae"], "--ood_root", foreign(60))
    found = report("ood")
    assert found["own"] == {"title": "digits (scikit-learn)", "split": "test", "n": 360}
    assert list(found["foreign"]) == ["foreign", "one colour each", "uniform noise"]
    assert found["foreign"]["foreign"]["n"] == 120
    scores = found["foreign"]["foreign"]["scores"]
    assert {"reconstruction_error", "negative_elbo", "atypicality", "kl", found["floor_score"]} <= scores.keys()
    best = scores[found["best_score"]]["auroc"]
    assert best == max(v["auroc"] for k, v in scores.items() if k != found["floor_score"]) > 0.9
    noise = found["foreign"]["uniform noise"]["scores"]["reconstruction_error"]
    assert noise["auroc"] > 0.95 and noise["fpr_at_95_tpr"] < 0.2
    for name, entry in found["foreign"].items():
        for score, value in entry["scores"].items():
            assert 0 <= value["auroc"] <= 1 and 0 <= value["fpr_at_95_tpr"] <= 1
            assert (f"{ex.PLAIN[score]} on {name}" in found["worse_than_chance"]) == (value["auroc"] < 0.5)
    for score, value in scores.items():
        assert f"{value['auroc']:.4f}" in next(
            line for line in result.out.splitlines() if line.strip().startswith(ex.PLAIN[score]))


def test_own_images_under_another_name_are_not_told_from_own_ones(models):
    """The scores of test digits against training digits: chance, whatever the score."""
    images = ig.load_digits().train[:300]
    Path("more").mkdir()
    for i, image in enumerate(images):
        save(f"more/{i}.png", image[0].numpy())
    task("ood", models["vae"], "--ood_root", "more")
    scores = report("ood")["foreign"]["more"]["scores"]
    assert all(0.4 < value["auroc"] < 0.6 for value in scores.values())
    assert all(0.9 < value["fpr_at_95_tpr"] < 1 for value in scores.values())


def test_elbo_of_the_scores_is_that_of_the_evaluation(models):
    """Two ways to the same figure, with other draws of noise."""
    made = scene(models["vae"])
    parts = ex.bits_and_errors(made, made.images.test)
    elbo = -(parts["reconstruction_nats"] + parts["kl_nats"]).mean().item()
    with torch.no_grad():
        expected = ig.held_out(made.model, made.images, CPU, 360)
    assert elbo == pytest.approx(expected["val_elbo"], rel=0.02)
    assert parts["kl_nats"].mean().item() == pytest.approx(expected["val_kl"], rel=0.05)


def test_neighbours_vote_in_the_space_of_codes(models):
    task("latent", models["vae"], "--num_samples", 100)
    found, made = report("latent"), scene(models["vae"])
    train, test = (made.codes(part)[0] for part in (made.images.train, made.images.test))
    votes = made.images.train_labels[torch.cdist(test, train).topk(10, largest=False).indices]
    right = (votes.mode(1).values == made.images.test_labels).float().mean().item()  # ties: the smallest, both
    assert found["knn_accuracy"] == pytest.approx(right, abs=0.01) and found["knn_accuracy"] > 0.8
    assert (found["neighbours"], found["n_train"], found["n_test"], found["tsne_images"]) == (10, 1437, 360, 100)
    assert found["floors"]["knn_accuracy_of_pixels"] > 0.95
    assert found["floors"]["most_common_class"] == pytest.approx(made.images.test_labels.bincount().max().item() / 360)


def test_own_files_are_cropped_turned_grey_and_scaled():
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 200  # the middle square alone remains
    paths = [save("wide.png", wide), save("clear.png", np.zeros((8, 8, 4), np.uint8)),
             save("deep.png", np.full((8, 8), 65535, np.uint16)), save("dot.png", np.full((1, 1), 77, np.uint8)),
             save("red.png", np.full((9, 9, 3), (255, 0, 0), np.uint8))]
    grey = ig.own_images([Path(path) for path in paths], INFO)
    assert grey.shape == (5, 1, 8, 8) and grey.dtype == torch.uint8
    assert [sorted(set(image.flatten().tolist())) for image in grey] == [[200], [255], [255], [77], [76]]
    colour = ig.own_images([Path("red.png"), Path("dot.png")], dataclasses.replace(INFO, image_size=4, channels=3))
    assert colour[:, :, 0, 0].tolist() == [[255, 0, 0], [77, 77, 77]] and colour.shape == (2, 3, 4, 4)


def test_own_images_go_through_the_tasks_that_take_them(models, drawn):
    paths = own_digits(3)
    test = ig.load_digits().test[:3]
    task("reconstruct", models["vae"], "--input", *paths)
    assert torch.equal(drawn["reconstruct.png"][0], test)
    found = report("reconstruct")
    assert [row["name"] for row in found["images"]] == paths and "floor" not in found
    task("interpolate", models["vae"], "--input", *paths[1:], "--frames", 2)
    (strip,) = drawn["interpolate.png"]
    model = scene(models["vae"]).model
    with torch.no_grad():
        assert torch.equal(strip, ig.to_uint8(model.reconstruct(ig.to_float(test[1:]))))
    task("traverse", models["vae"], "--input", paths[2], "--frames", 2)
    assert torch.equal(drawn["traverse.png"][0][0], test[2]) and report("traverse")["image"] == paths[2]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16", "CMYK", "1x1", "animated", "huge", "flat"])
def test_picture_of_any_kind_can_be_reconstructed(mode, models):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (30, 20, 3), dtype=np.uint8))
    name = "own.tif" if mode == "CMYK" else "own.gif" if mode == "animated" else "own.png"
    if mode == "I;16":
        save(name, rng.integers(0, 65535, (30, 20), dtype=np.uint16))
    elif mode == "animated":
        image.save(name, save_all=True, append_images=[Image.new("RGB", image.size)] * 3)
    elif mode in ("1x1", "huge", "flat"):
        image.resize({"1x1": (1, 1), "huge": (1300, 900), "flat": (400, 1)}[mode]).save(name)
    else:
        image.convert(mode).save(name)
    task("reconstruct", models["vae"], "--input", name)
    assert 0 < report("reconstruct")["images"][0]["mse"] <= 1


@pytest.mark.parametrize("name", ["missing.png", "text.png", "half.png", "empty.png", "folder", "line\nbreak.png"])
@pytest.mark.parametrize("doing", ["reconstruct", "traverse"])
def test_file_that_is_no_picture_is_one_error(name, doing, models):
    Path("text.png").write_text("not a picture")
    Path("empty.png").touch()
    Path("folder").mkdir()
    save("half.png", np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8))
    Path("half.png").write_bytes(Path("half.png").read_bytes()[:900])
    assert_error(explore(doing, models["vae"], "--input", name), 1, name.split("\n")[0])
    assert not list(Path("results").glob("*.*"))[1:]


@pytest.mark.parametrize("doing, count", [("interpolate", 1), ("interpolate", 3), ("traverse", 2)])
def test_wrong_number_of_files_is_a_usage_error(doing, count, models):
    result = explore(doing, models["vae"], "--input", *own_digits(count))
    assert_error(result, 2, "--input", doing, f"not {count}")


def write_idx(path: Path, images: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    return path


def test_foreign_images_may_come_in_the_format_of_mnist(models):
    images = np.random.default_rng(0).integers(0, 255, (30, 28, 28), dtype=np.uint8)
    write_idx(Path("letters/raw/train-images-idx3-ubyte"), images[:7])
    write_idx(Path("letters/raw/t10k-images-idx3-ubyte"), images)
    title, found = ex.foreign_images(scene(models["vae"], ex.OodOptions, ood_root=Path("letters")))
    assert title == "letters" and found.shape == (30, 1, 8, 8) and found.dtype == torch.uint8
    assert found.float().mean().item() == pytest.approx(images.mean(), rel=0.02)
    task("ood", models["vae"], "--ood_root", "letters")
    assert report("ood")["foreign"]["letters"]["n"] == 30


@pytest.mark.parametrize("root, place_to_stand", [("letters", "."), ("raw", "letters"), (".", "letters/raw")])
def test_foreign_title_is_the_folder_however_it_is_named(root, place_to_stand, models, monkeypatch):
    write_idx(Path("letters/raw/t10k-images-idx3-ubyte"), np.zeros((3, 28, 28), np.uint8))
    monkeypatch.chdir(place_to_stand)
    assert ex.foreign_images(scene(models["vae"], ex.OodOptions, ood_root=Path(root)))[0] == "letters"


def test_foreign_folder_of_the_same_name_is_told_apart():
    rng = np.random.default_rng(0)
    model = picture_model("pictures", list(rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)))
    Path("other/pictures").mkdir(parents=True)
    for i in range(9):
        save(f"other/pictures/{i}.png", np.full((8, 8), 20 * i, np.uint8))
    task("ood", model, "--data_root", "pictures", "--ood_root", "other/pictures")
    found = report("ood")
    assert len(found["means"]) == 4 and len(found["foreign"]) == 3
    title = next(iter(found["foreign"]))
    assert "pictures" in title != "pictures"


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder", "no picture", "truncated", "header", "text",
                                  "compressed", "no images"])
def test_foreign_images_that_can_not_be_read_are_one_error(kind, models):
    root, path = Path("other"), Path("other/t10k-images-idx3-ubyte")
    if kind != "missing":
        whole = write_idx(path, np.zeros((0 if kind == "no images" else 9, 28, 28), np.uint8)).read_bytes()
        path.write_bytes({"truncated": whole[:1000], "header": whole[:6], "text": b"not images",
                          "compressed": gzip.compress(whole)}.get(kind, whole))
    if kind in ("empty folder", "no picture"):
        path.rename("other/notes.txt") if kind == "no picture" else path.unlink()
    if kind == "file":
        root = path
    result = explore("ood", models["vae"], "--ood_root", root)
    assert_error(result, 1, str(root), bars=kind == "no picture")  # which also says what it left out
    assert not list(Path("results").glob("*.*"))[1:]


def picture_model(name: str, images: list[np.ndarray], *flags) -> Path:
    """A VAE trained on these pictures, which lie in the folder `name` without classes."""
    Path(name).mkdir()
    for i, image in enumerate(images):
        save(f"{name}/{i:02d}.png", image)
    ok("--model", "vae", "--dataset", "folder", "--data_root", name, "--image_size", 8, "--epochs", 2, "--num_samples",
       2, "--width", 8, *COMMON, *flags)
    return Path("model.pt")


@pytest.mark.parametrize("flags", [("--likelihood", "gaussian"), ("--latent_dim", 1, "--prior", "normal")])
def test_black_pictures_without_classes_go_through_every_task(flags):
    """Nothing differs from anything: no code, no error, no score, no class."""
    model = picture_model("black", [np.zeros((8, 8), np.uint8)] * 60, *flags)
    for name in VAE_TASKS:
        result = task(name, model, "--data_root", "black", *(("--ood_root", foreign()) if name == "ood" else ()))
        assert not result.err, name
        assert report(name)["dataset"] == "black"
    assert "knn_accuracy" not in report("latent")
    assert report("reconstruct")["floor"]["mse"] == 0


def test_classifier_says_what_it_sees_on_the_way(models, classifier, drawn):
    Path("script/models").mkdir()
    shutil.copy(classifier, "script/models/classifier_digits.pt")
    task("interpolate", models["vae"], "--label", "3,8")
    (row,), (strip,) = report("interpolate")["pairs"], drawn["interpolate.png"]
    net = ig.restore_model(ig.load_checkpoint(classifier)).eval()
    with torch.no_grad():
        share, best = net(ig.to_float(strip))[1].softmax(1).max(1)
    assert row["seen_as"] == [str(k) for k in best.tolist()] and row["confidence"] == pytest.approx(share.tolist())
    task("denoise", models["diffusion"])
    found = report("denoise")
    assert len(found["final_classes"]) == 3 and "estimate_has_final_class" not in found["looks"][0]


def test_pictures_without_classes_have_no_label(folders):
    shapes = [pixels(path) for path in sorted(folders["grey"].rglob("*.png"))]
    model = picture_model("plain", shapes)
    for name in ("reconstruct", "interpolate"):
        result = explore(name, model, "--data_root", "plain", "--label", "a,b")
        assert_error(result, 2, "--label", "plain")
        assert not result.err.strip().endswith("has")  # a list of nothing
    assert_error(explore("latent", model, "--data_root", "plain"), 2, "at least 5")  # two are held out
    task("reconstruct", model, "--data_root", "plain", "--num_samples", 50)
    assert report("reconstruct")["mean"]["n"] == 2
    assert_error(explore("reconstruct", model, "--data_root", folders["colour"]), 2, "--data_root")


def test_colour_pictures_go_through_every_task(folders, place, monkeypatch):
    monkeypatch.setattr(ig.time, "sleep", lambda seconds: None)  # between attempts to download
    shutil.copytree(write_folder(place / "many", True, 30), "pictures")
    ok("--model", "vae", "--dataset", "folder", "--data_root", "pictures", "--image_size", 8, "--epochs", 1,
       "--num_samples", 2, "--width", 8, *COMMON)
    for name in VAE_TASKS:
        more = ("--ood_dataset", "folder", "--ood_root", folders["grey"]) if name == "ood" else ()
        task(name, Path("model.pt"), "--data_root", "pictures", *more)
    assert report("latent")["n_test"] == 6 and "knn_accuracy" in report("latent")
    assert report("ood")["foreign"]["grey"]["n"] == 24
    assert_error(explore("ood", "model.pt", "--data_root", "pictures"), 3, "CIFAR-100")  # what is usual for colour


def test_comparison_has_the_figures_of_each_evaluation(models, classifier):
    more = ("--classifier", classifier, "--eval_samples", 40)
    paths = [models[name] for name in ("diffusion", "vae", "gan")]
    result = compared(*paths, *more)
    assert {path.name for path in Path("results").glob("c*")} == {"compare.png", "compare.json"}
    found = report("compare")["models"]
    assert list(found) == ["diffusion", "vae", "gan"]
    apart = {"seconds", "sampling_seconds", "images_per_second", "machine"}  # timings
    for (name, entry), path in zip(found.items(), paths):
        ok(*EVALUATE, "--checkpoint", path, *more)
        alone = report("evaluation")
        assert {k: v for k, v in entry.items() if k not in apart} == {k: v for k, v in alone.items() if k not in apart}
        assert entry["training_seconds"] > 0 and entry["num_samples"] == 40 and entry["model"] == name
    shape = pixels("results/compare.png").shape
    assert shape[0] > 500 and shape[1] > 800
    lines = {line.split()[0]: line.split() for line in result.out.splitlines() if line.strip()}
    for key in ("is_digits_cnn", "near_copies", "class_balance"):
        values = [entry["metrics"][key]["value"] for entry in found.values()]
        assert lines[key][1:4] == [f"{value:.4f}" for value in values]
    assert lines["parameters"][1:4] == [f"{entry['parameters']:,}" for entry in found.values()]
    assert "val_elbo" in lines and lines["val_elbo"][1] == "-"  # what a family does not have


def test_comparison_of_one_family_names_the_files(models):
    shutil.copy(models["vae"], "again.pt")
    flags = ("--eval_samples", 5)
    compared(models["vae"], "again.pt", models["gan"], *flags)
    assert list(report("compare")["models"]) == ["vae vae", "vae again", "gan gan"]
    compared(models["gan"], models["gan"], *flags)
    found = report("compare")["models"]
    assert list(found) == ["1 gan gan", "2 gan gan"]
    assert found["1 gan gan"]["metrics"] == found["2 gan gan"]["metrics"]
    compared(models["plain"], *flags)
    assert list(report("compare")["models"]) == ["vae"]


def test_comparison_hands_each_family_its_own_flags(models):
    compared(models["diffusion"], models["gan"], "--eval_samples", 4, "--sampler", "ddim", "--seed", 9)
    found = report("compare")["models"]
    assert found["diffusion"]["sampler"] == "ddim" and "sampler" not in found["gan"]
    assert [entry["seed"] for entry in found.values()] == [9, 9]


def shipped(name: str) -> Path:
    path = ROOT / "image_gen" / "pretrained" / name
    if not path.exists():
        pytest.skip(f"{name} is not shipped yet")
    return path


@pytest.fixture
def as_shipped(mnist_root, monkeypatch):
    monkeypatch.setattr(ig, "HERE", SCRIPT.parent)  # where the weights and the classifier are
    return "--data_root", mnist_root


@pytest.mark.real_data
def test_shipped_vae_tells_letters_from_digits(as_shipped, mnist_root):
    letters = mnist_root.parent / "notmnist"
    if not letters.is_dir():
        pytest.skip(f"{letters} is not there")
    task("ood", shipped("vae_mnist.pt"), *as_shipped, "--ood_root", letters, "--num_samples", 300)
    found = report("ood")
    scores = found["foreign"]["notmnist"]["scores"]
    assert found["own"]["n"] == found["foreign"]["notmnist"]["n"] == 300
    assert scores[found["best_score"]]["auroc"] > 0.95
    assert found["foreign"]["uniform noise"]["scores"]["reconstruction_error"]["auroc"] > 0.99


@pytest.mark.real_data
def test_shipped_vae_keeps_the_digits_and_their_classes(as_shipped, mnist_root):
    made = scene(shipped("vae_mnist.pt"), data_root=mnist_root)
    images = made.images
    rows = ig.some_rows(images.train, 5000)
    train, test = made.codes(images.train[rows])[0], made.codes(images.test[:500])[0]
    votes = images.train_labels[rows][torch.cdist(test, train).topk(10, largest=False).indices].mode(1).values
    assert (votes == images.test_labels[:500]).float().mean() > 0.85  # with a twelfth of the training images
    parts = ex.bits_and_errors(made, images.test[:500])
    floor = ((images.test[:500] - images.train.float().mean(0)) / 255).square().mean().item()
    assert parts["mse"].mean().item() < 0.3 * floor
    assert 60 < (parts["reconstruction_nats"] + parts["kl_nats"]).mean().item() < 110


@pytest.mark.real_data
def test_shipped_gan_draws_all_digits(as_shipped):
    ok(*EVALUATE, "--checkpoint", shipped("gan_mnist.pt"), *as_shipped, "--eval_samples", 300)
    metrics = {key: entry["value"] for key, entry in report("evaluation")["metrics"].items()}
    assert metrics["classes_covered"] == 10 and metrics["class_balance"] > 0.95
    assert metrics["is_mnist_cnn"] > 8 and metrics["precision_mnist_cnn"] > 0.5 and metrics["near_copies"] < 0.2


# === wrong use ===


@pytest.mark.parametrize("name, kind", [(name, kind) for name, able in CAN.items() for kind in (
    "diffusion", "vae", "gan", "classifier") if kind not in able])
def test_task_that_a_family_can_not_do_names_those_that_can(name, kind, models, classifier):
    path = classifier if kind == "classifier" else models[kind]
    assert_error(explore(name, path), 2, kind, " or ".join(CAN[name]))
    assert_error(explore(name, path, "--model", kind), 2, kind, " or ".join(CAN[name]))
    assert not Path("results").exists()


@pytest.mark.parametrize("words, code, expected", [
    (("dream",), 2, ("dream", "interpolate", "compare")),
    (("reconstruct", "--frames", 3), 2, ("--frames",)), (("reconstruct", "--output_dir", "out"), 2, ("--output_dir",)),
    (("traverse", "--num_samples", 3), 2, ("--num_samples",)), (("latent", "--label", 3), 2, ("--label",)),
    (("ood", "--input", "a.png"), 2, ("--input",)), (("ood",), 2, ("--ood_root", "--ood_dataset")),
    (("ood", "--ood_root", "nowhere"), 1, ("nowhere", "not a folder")),
    (("ood", "--ood_dataset", "digits"), 2, ("--ood_dataset digits", "trained on it")),
    (("reconstruct", "--label", "x"), 2, ("--label x", "0, 1, 2")), (("reconstruct", "--label", ""), 2, ("--label",)),
    (("interpolate", "--label", "3"), 2, ("--label 3", "two classes")),
    (("interpolate", "--label", "3,4,5"), 2, ("--label 3,4,5", "two classes")),
    (("interpolate", "--frames", 1), 2, ("--frames",)),
    (("reconstruct", "--input", "a.png", "--label", 3), 2, ("--label", "--input")),
    (("reconstruct", "--input", "a.png", "--num_samples", 3), 2, ("--num_samples", "--input")),
    (("reconstruct", "--data_root", "."), 2, ("--data_root", "digits")),
    (("reconstruct", "--sampler", "ddim"), 2, ("--sampler", "diffusion")),
    (("reconstruct", "--results_dir", "a.png"), 1, ("a.png", "file")),
    (("reconstruct", "--checkpoint", "nowhere.pt"), 1, ("nowhere.pt",)),
])
def test_wrong_use_is_one_error(words, code, expected, models):
    for name in ("a.png", "b.png"):
        save(name, np.zeros((8, 8), np.uint8))
    assert_error(explore(words[0], models["vae"], *words[1:]), code, *expected)
    assert not list(Path("results").glob("*.png"))


@pytest.fixture
def measured_by(classifier):
    """Puts the small classifier of digits (32 features) where the shipped ones lie."""
    Path("script/pretrained").mkdir()
    return shutil.copy(classifier, "script/pretrained/classifier_digits.pt")


def pictures(folder: str, count: int = 3, size: tuple = (8, 8), start: int = 0) -> str:
    """A folder of noise, grey [H W] or colour [H W 3]; `start` tells apart those of one size."""
    Path(folder).mkdir(exist_ok=True)
    for i in range(count):
        save(f"{folder}/{i:03d}.png", np.random.default_rng(start + i).integers(0, 256, size, np.uint8))
    return folder


def fid(*words):
    return conftest.call(ex, "fid", *words, "--results_dir", "results", "--device", "cpu")


def fid_report(*words) -> dict:
    result = fid(*words)
    assert result.code == 0, result.err
    found = report("fid")
    for key, entry in found["metrics"].items():  # the table says the same
        line, = (line for line in result.out.splitlines() if line.split()[0] == key)
        assert line.split()[1] == ("-" if entry["value"] is None else f"{entry['value']:.4f}")
        assert ("reason" in entry) == (entry["value"] is None)
    return found


def test_fid_of_folders_is_that_of_the_metrics(measured_by):
    images = ig.load_digits()
    for folder, split in (("drawn", images.train[:60]), ("real", images.test[:50])):
        Path(folder).mkdir()
        for i, image in enumerate(split):
            save(f"{folder}/{i:03d}.png", image[0].numpy())
    Path("drawn/.results").touch()  # a script has drawn them: what is not to be trained on may be measured
    found = fid_report("drawn", "real")
    net = ig.classifier_net(Path(measured_by), CPU, images.info())
    values, _ = ig.measure(net(images.train[:60]), net(images.test[:50]), net)
    for key in ("fid", "kid", "is", "precision", "recall"):
        assert found["metrics"][f"{key}_digits_cnn"]["value"] == pytest.approx(values[f"{key}_digits_cnn"], rel=1e-6)
    assert (found["n"], found["n_reference"], found["a"], found["b"]) == (60, 50, "drawn", "real")
    assert found["feature_net"] == "digits_cnn" and found["feature_net_sha256"] == ig.file_digest(Path(measured_by))


def test_fid_between_the_splits_of_a_dataset_is_the_floor(measured_by):
    found = fid_report("digits:train", "digits")
    assert (found["n"], found["n_reference"]) == (1437, 360)
    for key in ("fid_digits_cnn", "precision_digits_cnn", "recall_digits_cnn"):  # what no subset is drawn for
        assert found["metrics"][key]["value"] == pytest.approx(found["metrics"][key]["floor"], rel=1e-3), key
    same = fid_report("digits", "digits:test")["metrics"]
    assert same["fid_digits_cnn"]["value"] == pytest.approx(0, abs=1e-3) and same["fid_digits_cnn"]["floor"] > 0.1
    assert same["precision_digits_cnn"]["value"] == same["recall_digits_cnn"]["value"] == 1
    assert same["near_copies"]["value"] == 1


def test_near_copies_are_those_nearer_than_the_set_is_to_itself():
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(0, 256, (300, 1, 8, 8), generator=generator, dtype=torch.uint8)
    new = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    copies = own[:10].clone()
    copies[:, 0, 0, 0] ^= 1
    found = ex.near_copies(torch.cat([new, copies]), own)
    distances = torch.cdist(own.flatten(1).double(), own.flatten(1).double()).fill_diagonal_(math.inf).min(1).values
    assert found["threshold"] == pytest.approx(distances.quantile(0.01).item(), rel=1e-4)
    assert found["floor"] == pytest.approx(0.01, abs=0.005) and 0.2 <= found["value"] < 0.25
    assert ex.near_copies(new, own[:1])["value"] is None


def test_fid_by_inception_of_grey_beside_colour_that_are_not_square(inception_weights):
    grey, colour = pictures("grey", 5, (7, 9)), pictures("colour", 6, (7, 9, 3))
    found = fid_report(grey, colour, "--fid_features", "inception", "--inception_weights", inception_weights)
    metrics = found["metrics"]
    assert metrics["fid_inception"]["value"] is None and "2048" in metrics["fid_inception"]["reason"]
    assert math.isfinite(metrics["kid_inception"]["value"]) and metrics["near_copies"]["value"] == 0
    assert found["feature_net"] == "inception"


def test_few_pictures_have_null_for_what_needs_more(measured_by):
    metrics = fid_report(pictures("one", 1), pictures("two", 2))["metrics"]
    for key in ("fid", "kid", "precision", "recall"):
        assert metrics[f"{key}_digits_cnn"]["value"] is None
    assert fid_report("two", "one")["metrics"]["near_copies"]["value"] is None


def hostile_sets() -> None:
    for name, count, size in (("a", 3, (8, 8)), ("wide", 3, (8, 9)), ("colour", 3, (8, 8, 3)), ("mixed", 3, (8, 8)),
                              ("broken", 3, (8, 8)), ("big", 2, (28, 28, 3))):
        pictures(name, count, size)
    save("mixed/002.png", np.zeros((9, 8), np.uint8))
    Path("broken/001.png").write_bytes(b"no picture")
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/readme.txt").write_text("nothing to see")


@pytest.mark.parametrize("words, code, expected", [
    ((), 2, ("A, B",)), (("a",), 2, ("B",)), (("a", "a", "a"), 2, ("a",)),
    (("a", "nowhere"), 2, ("nowhere", "neither a folder", "cifar10")), (("a/000.png", "a"), 2, ("000.png", "neither")),
    (("a", "empty"), 1, ("empty", "no picture", ".png")), (("texts", "a"), 1, ("texts", "no picture")),
    (("a", "mixed"), 1, ("mixed/002.png", "8 x 9", "mixed/000.png", "8 x 8")),
    (("a", "wide"), 1, ("wide/000.png", "9 x 8", "a/000.png", "8 x 8")),
    (("wide", "wide"), 1, ("no classifier", "9 x 8", "inception")),
    (("wide", "wide", "--classifier", "script/pretrained/classifier_digits.pt"), 1, ("square", "inception")),
    (("a", "broken"), 1, ("broken/001.png", "can't be read")),
    (("a", "colour"), 1, ("no classifier", "colour pictures of 8 x 8", "--classifier")),
    (("colour", "digits"), 1, ("no classifier of digits", "colour")),
    (("a", "big"), 1, ("big/000.png", "28 x 28", "a/000.png")),
    (("digits", "big"), 1, ("big/000.png", "digits")), (("big", "big", "--dataset", "mnist"), 1, ("of mnist", "28")),
    (("a", "a", "--classifier", "missing.pt"), 1, ("missing.pt",)),
    (("colour", "a", "--classifier", "script/pretrained/classifier_digits.pt"), 1, ("channels", "--classifier")),
    (("digits:valid", "a"), 2, ("digits:valid", "digits:train")),
    (("a", "a", "--data_root", "a"), 2, ("--data_root",)), (("digits", "a", "--data_root", "a"), 2, ("--data_root",)),
    (("a", "a", "--inception_weights", "w.pth"), 2, ("--inception_weights", "--fid_features inception")),
    (("a", "a", "--fid_features", "inception", "--inception_weights", "w.pth"), 1, ("w.pth",)),
    (("a", "a", "--dataset", "folder"), 2, ("--dataset",)), (("a", "a", "--num_samples", 3), 2, ("--num_samples",)),
])
def test_fid_of_what_can_not_be_measured_is_one_error(words, code, expected, measured_by):
    hostile_sets()
    assert_error(fid(*words), code, *expected)
    assert not Path("results/fid.json").exists()


def test_input_is_never_overwritten(models):
    task("reconstruct", models["vae"])
    before = Path("results/reconstruct.png").read_bytes()
    result = explore("reconstruct", models["vae"], "--input", "results/../results/reconstruct.png")
    assert_error(result, 2, "overwritten")
    assert Path("results/reconstruct.png").read_bytes() == before
    task("reconstruct", models["vae"], "--input", "results/reconstruct.png", "--results_dir", "other")


def test_comparison_that_makes_no_sense_is_one_error(models, classifier, folders, monkeypatch):
    ok("--model", "vae", "--dataset", "folder", "--data_root", folders["grey"], "--image_size", 8, "--epochs", 1,
       "--width", 8, *COMMON[:4], "--checkpoint", "shapes.pt", "--results_dir", "aside", "--num_samples", 2)
    monkeypatch.setattr(ig, "generate_all", lambda *given: pytest.fail("measured before it was sure that all fit"))
    vae, gan = models["vae"], models["gan"]
    Path("text.pt").write_text("not a model")
    for words, code, expected in (
            ((vae, "missing.pt"), 1, ("missing.pt",)), ((vae, "text.pt"), 1, ("text.pt",)),
            ((vae, "shapes.pt"), 2, ("shapes.pt", "digits")), ((vae, classifier), 2, ("draws no images", "classifier")),
            ((), 2, ("compare needs",)), ((vae, gan, "--beta", 2), 2, ("--beta",)),
            ((vae, gan, "--sampler", "ddim"), 2, ("--sampler",)), ((vae, gan, "--dataset", "mnist"), 2, ("mnist",)),
            ((vae, gan, "--num_samples", 3), 2, ("--num_samples",))):
        assert_error(conftest.call(ex, "compare", *words, *LOOK), code, *expected)
    assert not list(Path("results").glob("*.*"))[1:]


def test_both_files_alone_in_a_folder_are_a_program(models, place):
    home = place / "alone here"
    home.mkdir()
    for file in (SCRIPT, EXPLORE):
        shutil.copy(file, home)
    done = subprocess.run([sys.executable, home / "explore.py", "interpolate", "--checkpoint", models["vae"]],
                          cwd=place, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (home / "results" / "vae" / "interpolate.gif").exists()  # results lie beside the script
    done = subprocess.run([sys.executable, home / "explore.py", "--help"], text=True, capture_output=True)
    assert done.returncode == 0 and all(name in done.stdout for name in (*CAN, "compare", "fid"))

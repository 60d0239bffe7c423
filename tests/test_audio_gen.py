"""audio_gen.py: every family through the same contract, regeneration of files of any length, the command line of
regenerating and measuring, and explore.py. (test_codec.py has the codec and its files, test_audio_data.py the data,
test_audio_signal.py the signal path and the metrics, test_machine_room.py what both scripts do alike.)
"""
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import conftest
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import (
    SCRIPTS,
    assert_error,
    differences,
    home,
    load_explore,
    load_script,
    quiet,
    read,
    read_json,
    records,
    reference_folder,
)
from PIL import Image

ag, ex = load_script("audio_gen"), load_explore("audio_gen")
SCRIPT = SCRIPTS[1]
HOP, CLIP, FRAMES, RATE, CPU = ag.HOP, ag.CLIP, ag.FRAMES, ag.SAMPLE_RATE, torch.device("cpu")
FAMILIES = ("autoencoder", "vae", "codec")
MEL_FAMILIES = FAMILIES[:2]
ag.SyntheticMUSDBDataset.clip = staticmethod(functools.lru_cache(ag.SyntheticMUSDBDataset.clip))  # made only once

# --- helpers

TINY = {"autoencoder": {"latent_dim": 8, "width": 16}, "vae": {"latent_dim": 8, "width": 16},
        "codec": {"hidden": 8}}
INFER = SCRIPT.infer()[:-2]
EVALUATE = SCRIPT.evaluate()


@pytest.fixture(autouse=True)
def place(tmp_path):
    """Every test works in a folder of its own, with the script's default folders in it."""
    with home(tmp_path) as patch:
        patch.setattr(ag, "HERE", tmp_path / "script")
        yield tmp_path


@pytest.fixture
def model_file(tmp_path, tmp_path_factory):
    """Puts a family's trained checkpoint into the current folder, as model.pt."""
    return lambda family="autoencoder": Path(shutil.copy(
        reference_folder(SCRIPT, family, tmp_path_factory) / "model.pt", tmp_path / "model.pt"))


@pytest.fixture
def no_pictures(monkeypatch):
    """What would have been drawn"""
    drawn = []
    for module, name in ((ag, "comparison_figure"), (ex, "strip_figure")):
        monkeypatch.setattr(module, name, lambda *rest: drawn.append(rest))
    return drawn


def ok(*arguments):
    return SCRIPT.ok(*arguments)


def call(*arguments):
    return SCRIPT.call(*arguments)


@functools.cache
def synthetic():
    return ag.SyntheticMUSDBDataset(ag.TrainDataOptions(num_samples=10))


def clips(count: int = 8):
    """Batches of training clips, as `prepare` gets them."""
    chosen = ag.fixed_clips(synthetic().train, count)
    for first in range(0, len(chosen), 4):
        yield ag.clip_batch(chosen[first:first + 4], CPU)


class Few:
    """Data whose statistics are soon taken: these batches"""

    def __init__(self, batches=None) -> None:
        self.batches = batches or list(clips())

    def training_clips(self, _device):
        return iter(self.batches)

    def training_crops(self, _config, _device):
        return iter(self.batches)


def song(clips_long: float, seed: int = 0) -> torch.Tensor:
    """Made-up music of any length: [L]"""
    parts = [torch.from_numpy(ag.SyntheticMUSDBDataset.clip(90 + seed + n, "mixture")).float()
             for n in range(math.ceil(clips_long))]
    return torch.cat(parts)[:int(clips_long * CLIP)]


def sine(length: int, frequency: float = 440.0, amplitude: float = 0.3) -> torch.Tensor:
    return (amplitude * (2 * math.pi * frequency / RATE * torch.arange(length, dtype=torch.float64)).sin()).float()


def make_batch(count: int = 4, step: int = 0):
    return ag.random_crops(synthetic().train, ag.Draw(0, step, count, slice(None), CPU))


def build(family: str, **options):
    torch.manual_seed(0)
    cls = ag.FAMILIES[family]
    return cls(cls.config_class(**TINY[family] | options), synthetic().info())


@functools.cache
def _prepared(family: str, options: tuple):
    model = build(family, **dict(options))
    model.prepare(Few(), CPU)
    return model


def prepared(family: str, **options):
    """A model before its first step, with the statistics of the made-up stems."""
    return copy.deepcopy(_prepared(family, tuple(options.items())))


def learned(family: str, steps: int = 8):
    """A few steps later, so that no branch is zero."""
    model = prepared(family)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        loss = sum(loss for _, loss, _ in model.losses(make_batch(2, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def models():
    return {family: learned(family).eval() for family in FAMILIES}


def snr(estimate, reference) -> float:
    return 10 * math.log10((reference.square().sum() / (estimate - reference).square().sum().clamp(min=1e-30)).item())


def given_back(model, audio, frames=None):
    """Clips [B CLIP] as the model gives them back: log-mel or waveform"""
    row = next(iter(model.rows(audio, torch.full((len(audio),), FRAMES) if frames is None else frames)))
    return row.sound if row.mel is None else row.mel


def level_db(audio) -> float:
    return 10 * math.log10(audio.double().square().mean().item() + 1e-30)


# === counting numbers ===


@pytest.mark.parametrize("family, options", [("autoencoder", {}), ("vae", {}),
                                             ("vae", {"latent_frames": 64}), ("vae", {"latent_frames": 256})])
def test_latent_has_as_many_numbers_as_is_said(family, options):
    model = build(family, latent_dim=24, **options)
    audio = song(1)[None]
    latent = model.encode(audio)
    assert latent.numel() == model.chosen_count
    assert model.decode(latent).shape == (1, 128, FRAMES)
    other = latent.clone()
    other[(0,) + (-1,) * (latent.ndim - 1)] += 1  # and none of them is idle
    assert not torch.equal(model.decode(other), model.decode(latent))


# === oracles: variational terms ===


def test_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(4, 3, 5, generator=generator) * 2 for _ in range(2))
    normal, divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    expected = divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(ag.gaussian_kl(mean, log_variance), expected, rtol=1e-4, atol=1e-5)


def vae_loss(model, batch, progress=1.0):
    player, loss, stats = next(model.losses(batch._replace(progress=progress)))
    assert player == "model" and all(math.isfinite(value.item()) for value in (loss, *stats.values()))
    return loss.item(), {name: value.item() for name, value in stats.items()}


def test_likelihood_is_that_of_a_gaussian_with_the_best_variance(monkeypatch):
    model, batch = prepared("vae", beta=0.0), make_batch()
    batch = batch._replace(frames=torch.tensor([256, 256, 90, 17]))
    seen = []
    monkeypatch.setattr(model, "decode", lambda latent: seen.append(type(model).decode(model, latent)) or seen[-1])
    loss, stats = vae_loss(model, batch)
    target, valid = model.log_mel(batch.audio), torch.arange(FRAMES) < batch.frames[:, None]
    errors = (seen[0] - target).mT[valid].double()
    deviation = errors.square().mean().sqrt()
    assert stats["mse"] == pytest.approx(deviation.item() ** 2, rel=1e-4)
    surprise = -torch.distributions.Normal(0.0, deviation).log_prob(errors).mean()
    assert loss == pytest.approx(surprise.item(), abs=1e-3)
    for other in (0.7, 1.4):  # it is the best
        assert -torch.distributions.Normal(0.0, other * deviation).log_prob(errors).mean() > surprise


def test_divergence_is_warmed_up():
    model = prepared("vae", beta=2.0, kl_warmup=0.4)
    (start, stats), (half, _), (full, _), (end, _) = (vae_loss(model, make_batch(), p) for p in (0, 0.2, 0.4, 1))
    per_bin = stats["kl"] / (FRAMES * 128)
    assert full - start == pytest.approx(2 * per_bin, rel=1e-3) and half - start == pytest.approx(per_bin, rel=1e-3)
    assert end == full
    assert vae_loss(prepared("vae", beta=2.0, kl_warmup=0.0), make_batch(), 0)[0] == pytest.approx(full, rel=1e-5)


def test_samples_depend_on_their_number_and_the_seed_alone(models):
    model, bass = models["vae"], torch.tensor([2, 2, 2])
    alone, among = ag.Noise(5, [3], CPU), ag.Noise(5, [0, 3, 9], CPU)
    one, three = model.sample(bass[:1], alone), model.sample(bass, among)
    assert three.shape == (3, 128, FRAMES) and not torch.equal(three[0], three[1])
    torch.testing.assert_close(one[0], three[1], rtol=0, atol=1e-4)
    assert not torch.equal(model.sample(bass[:1], ag.Noise(6, [3], CPU)), one)
    assert not torch.equal(model.sample(bass[:1] + 1, ag.Noise(5, [3], CPU)), one)  # another stem
    draws = torch.cat([ag.Noise(seed, range(100), CPU).normal(100) for seed in range(5)])
    assert len(draws[:, 0].unique()) == 500  # no two streams are the same
    assert draws.mean().item() == pytest.approx(0, abs=0.02) and draws.std().item() == pytest.approx(1, abs=0.02)


# === contract: every family ===


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_finite_and_every_parameter_learns(family):
    """Branches that start at zero pass nothing on, so a gradient may first appear after a few steps."""
    model = prepared(family)
    optimizers = {name: torch.optim.SGD(player.parameters(), 0.01) for name, player in model.players().items()}
    moved = set()
    for step in range(4):
        for player, loss, stats in model.losses(make_batch(2, step)):
            assert loss.ndim == 0 and all(math.isfinite(value.item()) for value in (loss, *stats.values()))
            model.zero_grad()
            loss.backward()
            moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
            optimizers[player].step()
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def fit_one_batch(model, steps=30, rate=5e-3):
    optimizer, losses, batch = torch.optim.Adam(model.parameters(), rate), [], make_batch(2)
    for _ in range(steps):
        _, loss, _ = next(model.losses(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_can_be_learned_by_heart(family):
    """The same clips and noise again and again: a network that is wired up right fits them. Principal components stay
    what they are, and have to hold the clips."""
    model = build(family)
    model.preprocessor.fit(clips())
    if family in MEL_FAMILIES:
        model.prepare(Few([make_batch(2)]), CPU)
    losses = fit_one_batch(model)
    if family == "autoencoder":
        assert min(losses[-5:]) < 0.5 * losses[0], losses
    else:  # nats per mel bin; bits per line, of which the codec's first tables need few as they are
        assert min(losses[-5:]) < losses[0] - {"vae": 0.5, "codec": 0.1}[family], losses


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_model_same_loss(family):
    one, two = (_prepared.__wrapped__(family, ()) for _ in range(2))
    assert differences(one.state_dict(), two.state_dict()) == []
    a, b = (fit_one_batch(model, 3) for model in (one, two))
    assert a == b


@pytest.mark.parametrize("family", FAMILIES)
def test_mode_of_the_model_is_as_it_was(family, models):
    model, audio = copy.deepcopy(models[family]), song(1.2)
    for training in (True, False):
        model.train(training)
        before = copy.deepcopy(model.state_dict())
        model.regenerate(audio)
        figures = ag.held_out(model, synthetic(), CPU)
        assert figures and all(math.isfinite(value) for value in figures.values())
        assert figures == ag.held_out(model, synthetic(), CPU)
        assert all(module.training is training for module in model.modules())
        assert differences(model.state_dict(), before) == []


def test_mean_is_taken_over_sound_only():
    values, frames = torch.randn(3, 5, 7), torch.tensor([7, 4, 1])
    kept = torch.cat([values[i, :, :n].flatten() for i, n in enumerate(frames)])
    assert ag.masked_mean(values, frames).item() == pytest.approx(kept.mean().item(), abs=1e-6)
    for i, n in enumerate(frames):
        values[i, :, n:] = 1e6
    assert ag.masked_mean(values, frames).item() == pytest.approx(kept.mean().item(), abs=1e-6)
    assert ag.masked_mean(values[:, 0], frames).ndim == 0


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_what_is_made_of_padding_does_not_count(family, models, monkeypatch):
    """Nonsense of the decoder in the padded frames changes neither the loss nor the held-out figures."""
    model, frames = copy.deepcopy(models[family]), torch.tensor([256, 120])
    padding = torch.arange(FRAMES) >= frames[:, None]
    original = model.decode

    def loss_and_figures():
        batch = make_batch(2)
        batch = batch._replace(audio=batch.audio * ~padding.repeat_interleave(HOP, 1), frames=frames)
        _, loss, _ = next(model.losses(batch))
        return loss.item(), *model.validate(batch).values()

    expected = loss_and_figures()
    monkeypatch.setattr(model, "decode", lambda x: original(x) + padding[:, None] * torch.randn(1).item() * 100)
    assert loss_and_figures() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_do_not_know_how_clips_were_padded(family):
    """Twice the same sound, the second time with a clip of nothing behind it."""
    def batches(extra):
        for batch in clips():
            yield batch._replace(audio=batch.audio * (torch.arange(CLIP) < 200 * HOP),
                                 frames=torch.full((len(batch.audio),), 200))
        if extra:
            yield ag.Batch(torch.zeros(2, CLIP), *torch.zeros(2, 2, dtype=torch.int64), None)

    one, two = (build(family) for _ in range(2))
    one.preprocessor.fit(batches(False))
    two.preprocessor.fit(batches(True))
    assert differences(one.preprocessor.state_dict(), two.preprocessor.state_dict()) == []
    assert one.preprocessor.mean.abs().max() > 1 and one.preprocessor.std > 0.5


@pytest.mark.parametrize("family, frames", [(f, n) for f in MEL_FAMILIES for n in (1, 10, 100)] + [
    ("codec", 1)])
def test_training_set_of_short_sounds_has_statistics(family, frames):
    """No file as long as a clip, or a batch with none: a folder of single drum hits."""
    short = [b._replace(audio=b.audio * (torch.arange(CLIP) < frames * HOP),
                        frames=torch.full((len(b.audio),), frames)) for b in clips()]
    for batches in (short, [*clips(), short[0]]):
        model = build(family)
        model.prepare(Few(batches), CPU)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert fit_one_batch(model, 2)[-1] < 1e3


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_start_is_the_linear_codec(family):
    """Before its first step the network gives what the principal components give: already much more than the mean."""
    model, batch = prepared(family, latent_dim=64), next(clips())
    mel = model.log_mel(batch.audio)
    figures = ag.mel_metrics(model.decode(model.encode(batch.audio)), mel, batch.frames)
    assert figures["mel_mse"].mean() < 0.35 * mel.square().mean()
    assert model.encode(batch.audio).square().mean(0).median() < 30  # and of the size of the prior
    mels = {row.name: row.mel for row in model.rows(batch.audio, batch.frames)}
    plain = mels["without_network_pca"]
    if family == "vae":
        torch.testing.assert_close(mels["model_mel"], plain, rtol=0, atol=0)
    else:  # which has sets to choose from
        assert figures["mel_mse"].mean() < 0.97 * ag.mel_metrics(plain, mel, batch.frames)["mel_mse"].mean()


def test_baseline_stays_when_the_networks_learn(models):
    """It is what the model would be without them, with as many numbers: it moves with no step of the training."""
    batch = next(clips())
    for family in MEL_FAMILIES:
        both = prepared(family), models[family]
        before, after = ([*model.rows(batch.audio, batch.frames)][-1].mel for model in both)
        torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
        assert not torch.equal(models[family].decode(models[family].encode(batch.audio)), after)


@pytest.mark.parametrize("patch", [1, 2, 4, 16])
def test_lapped_patches_turn_back_and_keep_energy(patch):
    mel, matrix = torch.randn(2, 3, FRAMES, generator=torch.Generator().manual_seed(0)), ag.lapping(patch)
    turned = ag.lap(mel, matrix)
    torch.testing.assert_close(ag.lap(turned, matrix.T), mel, rtol=0, atol=1e-5)
    assert turned.square().sum() == pytest.approx(mel.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(ag.lap(torch.ones(1, 1, FRAMES), matrix), torch.ones(1, 1, FRAMES))  # what is steady


def test_cosines_are_those_of_scipy():
    from scipy.fft import dct
    for kind, shift in ((2, 0.0), (4, 0.5)):
        expected = torch.from_numpy(dct(np.eye(8), type=kind, norm="ortho", axis=0))
        torch.testing.assert_close(ag.cosines(8, shift), expected, rtol=0, atol=1e-12)


def test_linear_code_with_all_numbers_is_exact():
    model = prepared("vae", latent_dim=128 * 16, n_mels=128)
    mel = model.log_mel(next(clips()).audio)
    again = model.from_spectrum(model.to_spectrum(mel, network=False), network=False)
    torch.testing.assert_close(again, mel, rtol=0, atol=2e-2)
    assert len(model.chosen.unique()) == model.spread.numel()


def test_each_clip_takes_the_set_that_keeps_most():
    model = prepared("autoencoder")
    spectrum = model.to_spectrum(model.log_mel(next(clips()).audio))
    codes = model.pick(spectrum)
    energy = (spectrum * model.spread.flatten()).square()
    kept = torch.stack([energy[:, chosen].sum(1) for chosen in model.sets], 1)
    assert torch.equal(codes[:, -1].long(), kept.argmax(1)) and len(codes[0]) == 8
    torch.testing.assert_close((model.place(codes) * model.spread.flatten()).square().sum(1), kept.amax(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_holds_the_statistics(family, models):
    state = models[family].state_dict()
    assert {"preprocessor.mean", "preprocessor.std"} <= state.keys()
    fresh = build(family).eval()
    fresh.load_state_dict(state)
    audio = song(1)
    assert torch.equal(given_back(fresh, audio[None]), given_back(models[family], audio[None]))


@pytest.mark.parametrize("family", FAMILIES)
def test_clips_of_a_batch_do_not_know_of_each_other(family, models):
    model, frames = models[family], torch.tensor([FRAMES, 100, FRAMES])
    audio = torch.stack([song(1), 0.01 * song(1, 3) * (torch.arange(CLIP) < 100 * HOP), song(1, 5)])
    together = given_back(model, audio, frames)
    for n in range(3):
        assert snr(together[n], given_back(model, audio[n:n + 1], frames[n:n + 1])[0]) > 60


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(family, models):
    model, audio = copy.deepcopy(models[family]), song(1)
    expected = given_back(model, audio[None])
    model.precision = torch.bfloat16
    found = given_back(model, audio[None])
    assert found.dtype == torch.float32 and snr(found, expected) > 20


# === regeneration: files of any length ===

LENGTHS = (1, 319, 320, 321, CLIP - 1, CLIP, CLIP + 1, 3 * CLIP + 777)


class Identity(torch.nn.Module):
    """A model that gives back what it gets, a frame's samples [HOP] in the place of its mel bins, and notes how much it
    is given at a time."""

    def __init__(self, margin: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.margin, self.encoded, self.rendered = margin, [], []

    def through(self, audio):
        """What becomes of a file [L] before it is made audible"""
        parts = []
        for clips in ag.clips_of(self, audio):
            self.encoded.append(len(clips))
            parts.append(self.decode(clips))
        return ag.joined(self, parts, len(audio))

    def decode(self, clips):
        return clips.unflatten(1, (-1, HOP)).mT.clone()

    def render(self, decoded):
        self.rendered.append(decoded.shape[-1])
        return decoded.mT.flatten(1)


@pytest.mark.parametrize("margin", [0, 16, 40])
@pytest.mark.parametrize("length", [*LENGTHS, (FRAMES - 1) * HOP, 480 * HOP, 480 * HOP + 1, 65 * RATE])
def test_chunks_of_a_perfect_model_add_up_to_the_file(length, margin):
    """Fades that do not add up to one, a lost chunk or a shift by one sample would show."""
    model = Identity(margin)
    audio = torch.randn(length, generator=torch.Generator().manual_seed(0))
    decoded = model.through(audio)
    assert decoded.shape == (1, HOP, -(-length // HOP))
    result = ag.render_long(model, decoded)
    torch.testing.assert_close(result[:length], audio, rtol=0, atol=1e-5)
    assert not result[length:].any() and sum(model.encoded) == ag.clip_count(model, length)
    starts = [ag.clip_start(model, length, n) for n in range(sum(model.encoded))]
    assert starts[0] == 0 and length <= (starts[-1] + FRAMES) * HOP
    assert len(starts) == 1 or starts[-1] + FRAMES == -(-length // HOP)  # no silence takes its share of the last code
    assert all(0 < b - a <= FRAMES - ag.FADE - 2 * margin for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("length", [CLIP + 1, 2 * CLIP, 3 * CLIP + 777, 20 * RATE])
@pytest.mark.parametrize("margin", [1, 16, 40])
def test_margins_of_chunks_are_left_out(length, margin, monkeypatch):
    """A model that spoils the ends of every clip spoils the two ends of the file, and nothing at the seams."""
    model, audio = Identity(margin), torch.randn(length, generator=torch.Generator().manual_seed(0))
    edge, perfect = margin * HOP, model.decode

    def decode(clips):
        clips = clips.clone()
        clips[..., :edge] += 9
        clips[..., -edge:] -= 9
        return perfect(clips)

    monkeypatch.setattr(model, "decode", decode)
    decoded = model.through(audio)[0].mT.flatten()
    end = len(decoded) - edge
    torch.testing.assert_close(decoded[edge:end], F.pad(audio, (0, len(decoded) - length))[edge:end], rtol=0, atol=2e-6)
    assert decoded[:edge].mean() > 8 and decoded[end:].mean() < -8


def test_memory_for_an_hour_is_bounded():
    """Ten minutes in the same pieces as ten seconds."""
    model, audio = Identity(), torch.zeros(600 * RATE)
    ag.render_long(model, model.through(audio))
    assert max(model.encoded) <= 8 and sum(model.encoded) == math.ceil((30_000 - ag.FADE) / (FRAMES - ag.FADE))
    assert max(model.rendered) <= ag.PIECE and len(model.rendered) == math.ceil(30_000 / (ag.PIECE - ag.FADE))


@pytest.mark.parametrize("family", FAMILIES)
def test_result_is_as_long_as_the_file(family, models):
    for length in LENGTHS if family == "codec" else (1, 321, CLIP + 1):
        result = models[family].regenerate(song(length / CLIP + 0.1)[:length])
        assert result.shape == (length,) and torch.isfinite(result).all()


def roughness(audio):
    """How far each sample is from the line between its neighbours: a click sticks out."""
    return (audio[2:] - 2 * audio[1:-1] + audio[:-2]).abs()


def assert_no_clicks(audio, seams):
    """Nothing near a seam is rougher than what is found elsewhere."""
    rough = roughness(audio)
    place = torch.arange(len(rough))
    near = torch.zeros(len(rough), dtype=torch.bool)
    for seam in seams:
        near |= (place - seam).abs() < 64
    inner = (place > 4 * HOP) & (place < len(rough) - 4 * HOP)
    assert near.any() and rough[near & inner].max() <= 1.2 * rough[~near & inner].max()


def seams_of(frames: int, stride: int) -> list[int]:
    """First and last sample of each fade"""
    starts = range(stride, max(1, frames - ag.FADE), stride)
    return [place * HOP for start in starts for place in (start, start + ag.FADE)]


def test_mel_phases_have_no_seams(monkeypatch):
    """Pieces that are made audible one after the other have phases of their own: where they meet there is neither a
    click nor a hole. Frames are exact, so that nothing but the phase is at fault."""
    monkeypatch.setattr(ag, "PIECE", 120)
    model, audio = prepared("autoencoder"), sine(280 * HOP, 470.0)
    decoded = model.log_mel(audio[None])
    result = ag.render_long(model, decoded)
    seams = seams_of(280, 120 - ag.FADE)
    assert len(seams) == 4
    assert_no_clicks(result, seams)
    levels = result.view(-1, HOP).square().mean(1).sqrt()[4:-4] / (0.3 / math.sqrt(2))
    assert levels.min() > 0.5 and levels.max() < 1.5


@pytest.mark.parametrize("alike", [0.0, 1.0, -1.0])
def test_power_stays_even_where_pieces_meet(alike, monkeypatch):
    """Two pieces whose waveforms agree, have nothing in common, or are opposite there."""
    monkeypatch.setattr(ag, "PIECE", 200)
    audio = torch.randn(300 * HOP, generator=torch.Generator().manual_seed(0))
    other = torch.randn(300 * HOP, generator=torch.Generator().manual_seed(1)) if alike == 0 else alike * audio
    model, pieces = Identity(), iter([audio[:200 * HOP], other[168 * HOP:]])
    monkeypatch.setattr(model, "render", lambda _: next(pieces)[None].clone())
    result = ag.render_long(model, torch.zeros(1, 1, 300))
    fade = result[168 * HOP:200 * HOP].view(8, -1).square().mean(1).sqrt()
    if alike >= 0:
        assert (fade - 1).abs().max() < 0.06
    assert torch.equal(result[:168 * HOP], audio[:168 * HOP]) and torch.equal(result[200 * HOP:], other[200 * HOP:])


def test_silence_stays_silent_in_progress_sounds_of_the_codec(models):
    audio = torch.cat([torch.zeros(CLIP + 7), song(1.5), torch.zeros(2 * CLIP)])
    result = models["codec"].regenerate(audio)
    margin = 2 * ag.frame_size(RATE)  # two frames overlap
    assert level_db(result[:CLIP + 7 - margin]) < -80
    assert level_db(result[len(audio) - 2 * CLIP + margin:]) < -80
    assert level_db(result[CLIP + 7:-2 * CLIP]) > -40
    assert not models["codec"].regenerate(torch.zeros(CLIP + 7)).any()


@pytest.mark.parametrize("level, peak", [(0.2, 0.5), (0.05, 0.9), (0.0, 0.3), (0.9, 0.4), (1e-5, 0.0)])
def test_sound_is_as_loud_as_it_is_to_be_and_nothing_clips(level, peak):
    sound = sine(CLIP, amplitude=peak)
    found = ag.as_loud(sound, level)
    assert found.abs().max() < 1 and found.shape == sound.shape
    expected = min(level, 0.999 / math.sqrt(2)) if peak else 0
    assert found.square().mean().sqrt().item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_wav_has_16_bits_and_the_samples(place):
    audio = sine(12_345, amplitude=0.999)
    ag.write_wav(place / "new" / "a.wav", audio)
    info = soundfile.info("new/a.wav")
    assert (info.subtype, info.samplerate, info.channels, info.frames) == ("PCM_16", RATE, 1, 12_345)
    found = torch.from_numpy(soundfile.read("new/a.wav", dtype="float32")[0])
    assert (found - audio).abs().max() <= 1.01 / 32768
    assert os.listdir("new") == ["a.wav"]


# === measuring ===

QUICK = {ag.snr_db: 1, ag.si_sdr_db: 1, ag.lsd_db: 1}
CEILINGS = [f"ceiling_true_mel_{phase}" for phase in ag.PHASES]
FLOORS = ["floor_mean_spectrum", "floor_mean_spectrum_griffinlim"]
ROWS = {"autoencoder": ["model_mel", *(f"model_{phase}" for phase in ag.PHASES), "without_network_pca",
                        *CEILINGS, *FLOORS],
        "codec": ["model", *CEILINGS, *FLOORS]}


@pytest.fixture
def quick(monkeypatch):
    """Three metrics"""
    monkeypatch.setattr(ag, "WAVE_METRICS", QUICK)


def test_rows_counts_and_stems(models, quick):
    tracks = [t for t in synthetic().train if t.stem in ("drums", "bass")][:3]
    measured = ag.fixed_clips([*tracks, ag.Track("silence", "bass", np.zeros(CLIP // 2, np.float16))])
    count = {stem: sum(t.stem == stem for t, _ in measured) for stem in ("drums", "bass")}
    rows = ag.measure_rows(models["autoencoder"], measured)
    assert list(rows) == ROWS["autoencoder"]
    for name, row in rows.items():
        assert set(row) == {"all", "drums", "bass"}
        for stem, metrics in row.items():
            clips_of = len(measured) if stem == "all" else count[stem]
            for metric, entry in metrics.items():
                assert entry["n"] + entry["failed"] == clips_of, (name, metric)
        if name not in ("model_mel", "without_network_pca", "floor_mean_spectrum"):  # which have no sound
            assert row["all"]["snr_db"]["failed"] == row["bass"]["snr_db"]["failed"] == 1  # no ratio to silence
            assert "silent" in row["bass"]["snr_db"]["reason"] and row["drums"]["snr_db"]["failed"] == 0
            assert set(row["all"]) == {"mel_mse", "mel_mae", "mel_cosine", "mel_spectral_convergence", "snr_db",
                                       "si_sdr_db", "lsd_db"}
        else:
            rate = {"kbit_per_second"} if name != "floor_mean_spectrum" else set()
            assert set(row["all"]) == {"mel_mse", "mel_mae", "mel_cosine", "mel_spectral_convergence"} | rate
    json.dumps(rows, allow_nan=False)


def test_ceilings_are_above_the_model_and_the_floor(models, quick):
    measured = [clip for clip in ag.fixed_clips(synthetic().train) if clip[0].stem in ("other", "vocals")][:3]
    rows = {name: row["all"] for name, row in ag.measure_rows(models["codec"], measured).items()}
    assert list(rows) == ROWS["codec"]

    def median(row, metric):
        return rows[row][metric]["median"]

    for name in CEILINGS:
        assert median(name, "mel_mse") < 0.3 * median(FLOORS[1], "mel_mse")
        assert median(name, "lsd_db") < median(FLOORS[1], "lsd_db")
        assert median(name, "mel_cosine") > 0.9 > 0.1 > median("floor_mean_spectrum", "mel_cosine")
    assert median(CEILINGS[-1], "snr_db") > 20 > 0 > median(CEILINGS[0], "snr_db")
    assert median("model", "snr_db") > 10  # no input phase, no vocoder
    assert median("floor_mean_spectrum", "mel_cosine") == 0


def test_perfect_model_has_no_infinite_ratio(quick, monkeypatch):
    model = prepared("codec")
    monkeypatch.setattr(model, "regenerate", lambda audio: audio)
    row = ag.measure_rows(model, ag.fixed_clips(synthetic().test))["model"]["all"]
    assert row["mel_mse"]["mean"] == 0 and row["mel_cosine"]["mean"] == pytest.approx(1, abs=1e-4)
    assert row["lsd_db"]["mean"] == 0
    assert row["snr_db"]["mean"] is None or row["snr_db"]["mean"] > 80  # torchmetrics adds a little to both energies
    json.dumps(row, allow_nan=False)


def test_table_shows_medians_and_counts_each_column(capsys):
    entry = {"mean": 3.0, "median": 1.25, "n": 2, "failed": 1, "reason": "why not"}
    more = {"mel_mse": entry | {"n": 49}, "snr_db": entry | {"n": 36}}
    rows = {"model": {"all": {"snr_db": entry}}, "floor": {"all": more}}
    ag.print_rows(rows, "all")
    out = capsys.readouterr().out
    assert "1.250" in out and "3.000" not in out and "snr_db: why not" in out
    assert out.splitlines()[3].split() == ["n", "49", "2-36"]  # no column for what no row has
    for nothing in ({"model": {"all": {}}}, {}):
        ag.print_rows(nothing, "vocals")
    assert capsys.readouterr().out == ""


# === regenerating files ===


def write(path, audio, **more) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(audio), RATE, **more)
    return Path(path)


def wav(path) -> torch.Tensor:
    """A mono 16-bit file at 16 kHz: [L]"""
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def assert_picture(path, least_width: int = 500) -> None:
    """A picture with something on it"""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] >= least_width and pixels.shape[0] >= 200
    assert pixels.std() > 15 and (np.bincount(pixels.flatten()) > 0).sum() > 50


def test_examples_are_regenerated_measured_and_drawn(model_file, place):
    """Without --input: the shipped examples, with everything that comes of them."""
    model_file("autoencoder")
    for n, name in enumerate(("one", "two")):
        write(f"script/examples/{name}.flac", song(0.8, n))
    out = ok(*INFER).out
    assert sorted(os.listdir("results")) == [".results", "inference.json", "inference_comparison.png", "one.iag",
                                             "one_reconstructed.wav", "two.iag", "two_reconstructed.wav"]
    report = read_json("results/inference.json")
    for n, (name, record) in enumerate(zip(("one", "two"), report["files"], strict=True)):
        ours, true, size = wav(f"results/{name}_reconstructed.wav"), song(0.8, n), os.path.getsize(record["file"])
        assert len(ours) == len(true) == int(0.8 * CLIP) and ours.abs().max() < 1
        assert level_db(ours) == pytest.approx(level_db(true), abs=0.3)  # loudness is kept in steps of half a dB
        assert record["snr_db"] == pytest.approx(snr(ours, true), abs=0.05)  # of exactly what was written
        assert (record["bytes"], record["rate"], record["channels"]) == (size, RATE, 1)
        assert record["kbit_per_second"] == pytest.approx(size / (0.8 * 5.12) / 125)
        assert f"one.iag: {size:,} bytes, {record['kbit_per_second']:.3f} kbit/s" in out or n
        assert f"SNR {record['snr_db']:.2f} dB, mel error {record['mel_mse']:.2f}" in out
    assert_picture("results/inference_comparison.png")
    assert "x real time" in out and "phase by Griffin-Lim" in out
    assert set(report["metrics"]) == {"kbit_per_second", "snr_db", "mel_mse"}


def test_wav_is_written_before_anything_is_measured(model_file, monkeypatch):
    model_file("autoencoder")
    write("a.wav", song(0.1))
    monkeypatch.setattr(ag, "whole_mels", lambda *_: (_ for _ in ()).throw(ag.UserError("measuring failed")))
    assert_error(call(*INFER, "--input", "a.wav"), 1, "measuring failed")
    assert len(wav("results/a_reconstructed.wav")) == int(0.1 * CLIP)


def test_own_files_keep_name_and_length_and_have_a_line_each(model_file, no_pictures):
    model_file("autoencoder")
    sounds = {"one.wav": (1, RATE, 1), "slow.wav": (8001, 8000, 1), "fast.flac": (96_000, 192_000, 2),
              "deep/six.wav": (22_050, 44_100, 6), "$x$_{$.wav": (5000, RATE, 1), "loud.wav": (20_000, RATE, 1)}
    Path("deep").mkdir()
    for name, (length, rate, channels) in sounds.items():
        data = np.random.default_rng(0).normal(0, 0.1 if name != "loud.wav" else 3, (length, channels))
        soundfile.write(name, data, rate, subtype="FLOAT" if name == "loud.wav" else None)
    out = ok(*INFER, "--input", *sounds, "--output_dir", "out").out
    names = [Path(name).stem + end for name in sounds for end in (".iag", "_reconstructed.wav")]
    assert sorted(os.listdir("out")) == sorted([".results", *names])
    for name, (length, rate, _) in sounds.items():
        found = wav(f"out/{Path(name).stem}_reconstructed.wav")
        assert len(found) == math.ceil(length * RATE / rate), name
        assert torch.isfinite(found).all() and found.abs().max() < 1
    assert out.count("mel error") == len(sounds) == len(read_json("results/inference.json")["files"])


def test_silent_file_gives_a_silent_file_and_no_ratio(model_file, no_pictures):
    model_file("autoencoder")
    write("silence.wav", np.zeros(2 * RATE))
    assert "SNR - dB" in ok(*INFER, "--input", "silence.wav").out
    assert len(wav("results/silence_reconstructed.wav")) == 2 * RATE
    assert level_db(wav("results/silence_reconstructed.wav")) < -80
    assert read_json("results/inference.json")["files"][0]["snr_db"] is None


def test_bad_input_is_one_error_line(model_file):  # test_audio_data.py has all kinds
    model_file("autoencoder")
    write("good.wav", song(0.1))
    Path("bad.wav").write_text("this is not a sound")
    for second in ("bad.wav", "missing.wav"):
        assert_error(call(*INFER, "--input", "good.wav", second), 1, second)


def test_no_file_that_is_read_is_ever_overwritten(model_file, no_pictures):
    model_file("autoencoder")
    for name in ("a.wav", "b/a.wav", "a.flac", "a_reconstructed.wav"):
        write(name, song(0.05))
    before = Path("a_reconstructed.wav").read_bytes()
    for second in ("b/a.wav", "a.flac", "a.wav"):
        assert_error(call(*INFER, "--input", "a.wav", second), 2, "a.iag", "--output_dir")
    result = call(*INFER, "--input", "a.wav", "a_reconstructed.wav", "--output_dir", ".")
    assert_error(result, 2, "both an input and an output")
    assert Path("a_reconstructed.wav").read_bytes() == before
    ok(*INFER, "--input", "b/a.wav", "--output_dir", "b")  # beside one's own recordings, which stay data
    assert sorted(os.listdir("b")) == ["a.iag", "a.wav", "a_reconstructed.wav"]


def test_wrong_network_output_is_one_error(model_file, monkeypatch):
    model_file("autoencoder")
    write("a.wav", song(0.1))
    for name in ("from_spectrum", "encode"):
        with monkeypatch.context() as patch:
            true = getattr(ag.MelFamily, name)
            patch.setattr(ag.MelFamily, name, lambda *args, true=true: math.nan * true(*args))
            assert_error(call(*INFER, "--input", "a.wav"), 1, "a.", "not finite", "--precision")
        assert not Path("results/a_reconstructed.wav").exists()


@pytest.mark.parametrize("family, least", [("autoencoder", -6), ("vae", -6), ("codec", 20)])
def test_shipped_weights_regenerate_the_shipped_examples(family, least):
    """As they are loaded, in half precision."""
    state = ag.load_checkpoint(SCRIPT.path.parent / "pretrained" / f"audio_{family}.pt")
    model = ag.restore_model(state).eval()
    audio = ag.read_audio(SCRIPT.path.parent / "examples" / "groove.flac")[:3 * RATE]
    with torch.no_grad():
        found = model.regenerate(audio)
    assert snr(found, audio) > least
    assert family == "codec" or ag.whole_mels(model.preprocessor, found, audio)["mel_mse"].item() < 0.6


def test_shipped_weights_are_those_of_the_best_family(place, tmp_path_factory, no_pictures):
    common = ("--mode", "infer", "--device", "cpu", "--input", "a.wav")
    write("a.wav", song(0.1))
    for family in FAMILIES:
        (place / "script" / "pretrained").mkdir(parents=True, exist_ok=True)
        shutil.copy(reference_folder(SCRIPT, family, tmp_path_factory) / "model.pt",
                    place / "script" / "pretrained" / f"audio_{family}.pt")
    out = ok(*common).out
    assert "codec ·" in out and "shipped weights" in out
    assert "vae ·" in ok(*common, "--model", "vae").out
    assert sorted(os.listdir("script/results")) == [".results", "a.iag", "a_reconstructed.wav", "inference.json"]


# === measuring a test set ===


def test_evaluation_is_whole_repeatable_and_takes_the_data_of_the_run(model_file, monkeypatch):
    path = model_file("autoencoder")
    monkeypatch.setattr(ag, "WAVE_METRICS", QUICK)
    reports = []
    for flags in ((), (), ("--dataset", "synthetic", "--num_samples", 20, "--eval_clips", 1)):
        result = ok(*EVALUATE, *flags)
        reports.append(read_json("results/evaluation.json"))
    first, again, other = reports
    assert first["rows"] == again["rows"] and list(first["rows"]) == ROWS["autoencoder"]
    assert first["checkpoint_sha256"] == ag.file_digest(path) and first["dataset"] == "synthetic stems"
    assert first["clips"] == 1 and other["clips"] == 1  # of 5 made-up clips a tenth is one, of 20 two
    assert set(first["metrics"]) == set(ag.METRICS) and "medians over n clips" in result.out
    assert first["original_phase"] == ag.UPPER_BOUND in result.out


def test_evaluation_of_own_files_and_without_its_data(model_file, monkeypatch, place):
    model_file("autoencoder")
    monkeypatch.setattr(ag, "WAVE_METRICS", QUICK)
    assert_error(call(*EVALUATE, "--dataset", "folder"), 2, "--data_root")
    assert_error(call(*EVALUATE, "--dataset", "musdb"), 1, "--musdb_root", "test/")
    write("mine/test/a.wav", song(0.3))
    ok(*EVALUATE, "--dataset", "folder", "--data_root", "mine")  # nothing to train on is needed
    assert read_json("results/evaluation.json")["rows"]["model_griffinlim"]["all"]["snr_db"]["n"] == 1


@pytest.mark.parametrize("flags, word", [
    (("--num_samples", 10, "--dataset", "musdb"), "--num_samples belongs to --dataset synthetic"),
    (("--data_root", "x"), "--data_root belongs to --dataset folder"),
    (("--musdb_root", "x", "--dataset", "folder"), "--musdb_root belongs to --dataset musdb"),
    (("--stem", "bass", "--dataset", "folder", "--data_root", "x"), "--stem belongs to"),
    (("--musdb", "full"), "--prepare_data"), (("--dataset", "folder"), "--data_root"), (("--width", 7), "--width"),
    (("--model", "vae", "--latent_frames", 7), "choice"), (("--model", "codec", "--hidden", 7), "7"),
    (("--model", "codec", "--latent_dim", 8), "--latent_dim"), (("--bitrate", 64), "--bitrate"),
    (("--compile",), "--compile"), (("--n_mels", 7), "7")])
def test_flag_that_can_not_be_honoured_is_a_usage_error(flags, word):
    assert_error(call(*flags), 2, word)
    assert not Path("script/models").exists()


# === training: what comes of it ===


def test_training_writes_everything_it_promises(place, monkeypatch):
    """A run with everything it writes, in the default places."""
    crops = ag.AudioData.training_crops
    monkeypatch.setattr(ag.AudioData, "training_crops", lambda *rest: itertools.islice(crops(*rest), 4))
    result = ok("--dataset", "synthetic", "--num_samples", 20, "--epochs", 1, "--crops", 8, "--batch_size", 4,
                "--width", 16, "--latent_dim", 64, "--n_mels", 400, "--model", "vae", "--device", "cpu")
    results = place / "script" / "results" / "vae"
    assert (place / "script" / "models" / "audio_vae.pt").is_file()
    for name in ("training_curves.png", "spectrogram_comparison.png", "progress/spectrogram_epoch_001.png"):
        assert_picture(results / name)
    originals = [wav(results / f"audio_original_{i}.wav") for i in range(2)]
    for i, true in enumerate(originals):
        ours = wav(results / f"audio_reconstructed_{i}.wav")
        assert len(ours) == len(true) == CLIP and level_db(ours) == pytest.approx(level_db(true), abs=0.1)
        assert torch.equal(wav(results / "progress" / f"epoch_001_{i}.wav"), ours)
    for track in ag.SyntheticMUSDBDataset(ag.TrainDataOptions(num_samples=20)).test:  # each of them once
        clip = ag.cut(track, 0)
        assert sum(torch.allclose(clip / clip.norm(), other / other.norm(), atol=1e-3) for other in originals) == 1
    assert {"mse", "kl", "val_kl_nats", "val_mel_mse", "clips_per_second"} <= records(results)[-1].keys()
    assert "21 of 400 mel bands" in result.out
    assert not {path.name for path in results.rglob("*") if path.is_file() and path.parent == results} - {
        *ag.SUBJECT.outputs, ".results", ".lock"}


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_trains(family, place, monkeypatch):
    quiet(ag, place / "script", monkeypatch)
    flags = [flag if flag != "float32" else "bfloat16" for flag in SCRIPT.run(family)]
    ok(*flags, "--epochs", 1)
    assert all(torch.isfinite(value).all() for value in read("model.pt")["model"].values())


def test_labels_stand_at_their_frequencies():
    """Ticks of a mel spectrogram: a tone lies where its label is."""
    prep = ag.AudioPreprocessor(128)
    for hertz in (250, 1000, 4000):
        figure, axes = ag.new_figure(1, 1, "$ a title with _ $ and 漢字")
        mel = prep.log_mel(sine(64 * HOP, hertz)[None])[0]
        ag.show_mel(figure, axes[0, 0], mel, "$", -80, 0, "magma")
        labels = {text.get_text(): tick for text, tick in zip(axes[0, 0].get_yticklabels(), axes[0, 0].get_yticks())}
        assert labels[f"{hertz:,}"] == pytest.approx(int(mel[:, 30].argmax()) + 0.5, abs=1)
        ag.save_figure(figure, Path("a.png"))


# === explore.py ===


def explore(*arguments):
    return conftest.call(ex, *arguments)


def explored(*arguments):
    result = explore(*arguments, *EVALUATE[2:])
    assert result.code == 0, result.err
    return result


def test_samples_from_the_prior(model_file, no_pictures):
    model_file("vae")
    sounds = []
    for flags in ((), (), ("--seed", 5)):
        explored("sample", "--num_samples", 2, *flags)
        sounds.append([wav(f"results/sample_{n}.wav") for n in range(2)])
    assert all(len(sound) == CLIP and sound.any() and sound.abs().max() < 1 for pair in sounds for sound in pair)
    assert torch.equal(sounds[0][0], sounds[1][0]) and torch.equal(sounds[0][1], sounds[1][1])
    assert not torch.equal(sounds[0][0], sounds[0][1]) and not torch.equal(sounds[0][0], sounds[2][0])
    path, _, columns = no_pictures[0]
    assert path.name == "samples.png" and [name for name, _ in columns] == ["sample 0: mixture", "sample 1: drums"]
    explored("sample", "--num_samples", 2, "--label", "drums,mixture")
    assert [name for name, _ in no_pictures[-1][2]] == ["sample 0: drums", "sample 1: mixture"]
    assert not torch.equal(wav("results/sample_0.wav"), sounds[0][0])


def test_prior_is_learned_beside_the_vae_of_its_codes_and_stems():
    """It does not pull at the other networks; a mixture of two tracks is one, whatever they are."""
    model, batch = prepared("vae"), make_batch(16)
    assert len(set(batch.labels.tolist())) > 2 and 0 in batch.labels and batch.labels.max() < len(ag.STEMS)
    losses = model.losses(batch)
    assert next(losses)[0] == "model"
    player, loss, _ = next(losses)
    loss.backward()
    assert player == "prior" and {*model.players()} == {"model", "prior"} and model.labelled
    assert all(p.grad is None for p in model.players()["model"].parameters())
    assert sum(p.numel() for player in model.players().values() for p in player.parameters()) == \
        sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = build("vae", prior="normal")
    assert plain.prior is None and not plain.labelled and {*plain.players()} == {"model"}
    vocals = dataclasses.replace(synthetic().info(), stems=["vocals"])
    assert not ag.AudioVAE(ag.VaeConfig(**TINY["vae"]), vocals).labelled


def test_rare_stems_are_drawn_as_often_as_common_ones():
    labels = torch.tensor([0] * 60 + [2] * 3 + [4])
    rows = torch.cat([ag.balanced(labels, ag.Draw(0, step, 64, slice(None), CPU)) for step in range(200)])
    shares = torch.bincount(labels[rows], minlength=5) / len(rows)
    torch.testing.assert_close(shares, torch.tensor([1, 0, 1, 0, 1]) / 3, rtol=0, atol=0.02)
    assert (torch.bincount(rows, minlength=64)[60:63] / len(rows) - 1 / 9).abs().max() < 0.02


def test_labels_are_the_stems_of_single_tracks():
    draw = ag.Draw(0, 3, 64, slice(None), CPU)
    bass = [track._replace(stem="bass") for track in synthetic().train[:4]]
    labels = ag.random_crops(bass, draw).labels
    assert set(labels.tolist()) == {0, ag.STEMS.index("bass")} and 16 < (labels == 0).sum() < 48
    assert ag.clip_batch([(bass[0], 0)], CPU).labels.tolist() == [ag.STEMS.index("bass")]


def test_clips_of_the_prior_are_measured_beside_real_stems(model_file):
    model_file("vae")
    assert_error(explore("stems", "--dataset", "synthetic", *EVALUATE[2:]), 1, "no classifier of stems")
    ok("--model", "classifier", "--dataset", "synthetic", "--epochs", 2, "--width", 8, "--features", 4, "--checkpoint",
       "judge.pt", "--results_dir", "judge")
    explored("stems", "--dataset", "synthetic", "--classifier", "judge.pt", "--num_samples", 12)
    content = read_json("results/stems.json")
    assert list(content["rows"]) == ["drawn", "drawn from N(0, 1)", "real training stems", "the same through the VAE"]
    drawn, normal, real, again = content["rows"].values()
    assert drawn["fd_synthetic_cnn"] != normal["fd_synthetic_cnn"] and real["fd_synthetic_cnn"] >= 0
    assert all(row["n"] == 12 and 0 <= row["silent"] < 12 for row in content["rows"].values())
    assert drawn["label_agreement"] is not None and normal["label_agreement"] is None and normal["near_copies"] < 0.5
    assert "near_copies" not in real and again["label_agreement"] is not None


def test_samples_show_no_borders_of_patches():
    """From frame to frame a sample changes across a border of two patches about as much as within one: 1.2 times, of
    the VAE whose patches did not lap 41 times."""
    state = ag.load_checkpoint(SCRIPT.path.parent / "pretrained" / "audio_vae.pt")
    mel = ag.restore_model(state).eval().sample(torch.arange(16) % 5, ag.Noise(0, range(16), CPU))
    steps = mel.diff(dim=2).square().mean((0, 1))
    borders = torch.arange(1, FRAMES) % 16 == 0
    assert 0.7 < steps[borders].mean() / steps[~borders].mean() < 1.4


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_interpolation_goes_from_a_to_b(family, model_file, no_pictures):
    model = ag.restore_model(read(model_file(family))).eval()
    sounds = {"a.wav": song(1), "b.wav": song(0.6, 3)}
    for name, audio in sounds.items():
        write(name, audio, subtype="FLOAT")
    explored("interpolate", "a.wav", "b.wav")
    assert len(wav("results/interpolation.wav")) == 5 * CLIP
    _, _, columns = no_pictures[0]
    assert len(columns) == 5
    for (_, mel), audio in zip((columns[0], columns[-1]), sounds.values()):
        expected = model.decode(model.encode(F.pad(audio, (0, CLIP - len(audio)))[None]))
        torch.testing.assert_close(mel, model.preprocessor.unstandardise(expected)[0], rtol=1e-3, atol=1e-3)
    loudness = wav("results/interpolation.wav").view(5, -1).square().mean(1).sqrt().log()  # goes evenly, with no dip
    torch.testing.assert_close(loudness, torch.linspace(*loudness[[0, -1]].tolist(), 5), rtol=0, atol=0.05)
    steps = [(after - before).square().mean().item() for (_, before), (_, after) in itertools.pairwise(columns)]
    assert all(0 < step < (columns[-1][1] - columns[0][1]).square().mean().item() for step in steps)


def test_table_has_the_rows_of_an_evaluation_for_each_file(model_file, monkeypatch):
    model_file("codec")
    monkeypatch.setattr(ag, "WAVE_METRICS", QUICK)
    for n in range(2):
        write(f"{n}.wav", song(1.3, n))
    out = explored("table", "0.wav", "1.wav").out
    report = read_json("results/table.json")
    assert list(report["files"]) == ["0.wav", "1.wav"] and list(report["files"]["0.wav"]) == ROWS["codec"]
    assert report["files"]["1.wav"]["model"]["1.wav"]["snr_db"]["n"] == 2 and "0.wav: medians" in out


def test_exploring_overwrites_nothing_of_others(model_file, no_pictures):
    model_file("vae")
    for name in ("results/interpolation.wav", "a.wav", "own/sample_0.wav"):
        write(name, song(0.1))
    before = Path("results/interpolation.wav").read_bytes(), Path("own/sample_0.wav").read_bytes()
    result = explore("interpolate", "a.wav", "results/interpolation.wav", *EVALUATE[2:])
    assert_error(result, 2, "both an input and an output")
    assert_error(explore("interpolate", "a.wav", "a.wav", *EVALUATE[2:]), 2, "was not written by this script")
    assert_error(explore("sample", *EVALUATE[2:-1], "own"), 2, "sample_0.wav", "was not written")
    assert before == (Path("results/interpolation.wav").read_bytes(), Path("own/sample_0.wav").read_bytes())


@pytest.mark.parametrize("family, flags, words", [
    ("autoencoder", ("sample",), ("autoencoder", "vae")), ("codec", ("sample",), ("codec",)),
    ("codec", ("interpolate", "a.wav", "a.wav"), ("autoencoder or vae",)),
    ("vae", ("sample", "--phase", "original"), ("--phase",)), ("vae", ("interpolate", "a.wav"), ("--input",)),
    ("vae", ("interpolate",), ("two audio files",)), ("vae", ("sample", "--num_samples", 0), ("--num_samples",)),
    ("vae", ("sample", "--input", "a.wav"), ("--input",)), ("vae", ("sample", "--label", "piano"), ("piano", "drums")),
    ("vae", ("dance",), ("interpolate, sample, stems, table",))])
def test_task_that_can_not_be_done_is_a_usage_error(family, flags, words, model_file):
    model_file(family)
    write("a.wav", song(0.1))
    assert_error(explore(*flags, *EVALUATE[2:]), 2, *words)
    assert not list(Path().glob("results/*.wav"))


def test_references_are_listed_and_used():
    text = SCRIPT.path.read_text()
    listed = set(re.findall(r"^    \[(\w+)\]", text.split('"""')[1], re.M))
    assert listed and listed == set(re.findall(r"\[([A-Z]\w+\d\d)\]", text.split('"""', 2)[2]))

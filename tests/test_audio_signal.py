"""audio_gen.py's signal path and metrics: against closed forms, against theory, and on sounds that break things."""
import importlib.util
import math
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import load_script

ag = load_script("audio_gen")
RATE, HOP, WINDOW, CLIP = ag.SAMPLE_RATE, ag.HOP, ag.WINDOW, ag.CLIP
FLOOR = math.log(ag.MEL_FLOOR)

# --- helpers


class Clips(NamedTuple):
    """What `fit` reads of a batch."""
    audio: torch.Tensor
    frames: torch.Tensor


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def voice(length=CLIP, seed=0):
    """[1 length]: sung syllables: a gliding tone with vibrato, formants and breath, and pauses of digital silence."""
    draw = np.random.default_rng(seed)
    time = np.arange(length) / RATE
    pitch = 180 * 2 ** (0.4 * np.sin(2 * np.pi * 0.31 * time + seed)) * (1 + 0.01 * np.sin(2 * np.pi * 5.5 * time))
    turn = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = 0.003 * draw.standard_normal(length)
    for harmonic in range(1, 30):
        frequency = harmonic * pitch
        formants = sum(np.exp(-((frequency - centre) / width) ** 2) for centre, width in
                       ((500, 250), (1400 + 300 * np.sin(2 * time), 350), (2600, 500)))
        sound += 0.12 * (formants + 0.02) * np.sin(harmonic * turn + draw.uniform(0, 6)) * (frequency < 7000)
    syllables = np.clip(1.6 * np.sin(2 * np.pi * 1.3 * time) + 0.6, 0, 1)
    return torch.from_numpy((sound * syllables).astype(np.float32))[None]


def sine(frequency, amplitude=1.0):
    """[1 CLIP]"""
    turn = 2 * math.pi * frequency * torch.arange(CLIP, dtype=torch.float64) / RATE
    return (amplitude * turn.sin()).float()[None]


def decibels(ratio):
    return 10 * math.log10(ratio)


def snr(estimate, reference):
    return decibels((reference.square().sum() / (reference - estimate).square().sum()).item())


def convergence(estimate, magnitude, prep):
    """How far the spectrogram of a sound is from the magnitude that it was made for."""
    return ((ag.stft(prep, estimate).abs() - magnitude).norm() / magnitude.norm()).item()


def level(audio):
    """RMS in dB of full scale"""
    return decibels(audio.square().mean().item() + 1e-30)


def wave(estimate, reference, samples=None):
    if samples is None:
        samples = torch.full((len(reference),), reference.shape[1])
    reasons: dict[str, str] = {}
    return ag.wave_metrics(estimate, reference, samples, reasons), reasons


@pytest.fixture(scope="module")
def prep():
    return ag.AudioPreprocessor()


@pytest.fixture
def fresh():
    return ag.AudioPreprocessor()


# --- the transform


@pytest.mark.parametrize("frames", [1, 2, 5, 256, 300])
def test_round_trip_and_frame_count(prep, frames):
    audio = noise(2, frames * HOP)
    spectrum = ag.stft(prep, audio)
    assert spectrum.shape == (2, WINDOW // 2 + 1, frames)
    assert prep.log_mel(audio).shape == (2, 128, frames)
    torch.testing.assert_close(ag.istft(prep, spectrum), audio, rtol=0, atol=1e-6)


def test_transform_is_that_of_torch_with_a_sine_of_power_one(prep):
    audio = noise(2, 300 * HOP)  # longer than one block
    window = torch.hann_window(WINDOW)
    padded = torch.nn.functional.pad(audio, (352, 352))
    expected = torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True) * 2 / window.sum()
    torch.testing.assert_close(ag.stft(prep, audio), expected, rtol=0, atol=1e-6)
    power = ag.stft(prep, sine(64 * RATE / WINDOW)).abs().square()[0, 64, 10:-10]
    torch.testing.assert_close(power, torch.ones(236), rtol=0, atol=1e-4)


def test_istft_is_the_least_squares_inverse(prep):
    """The sound whose spectrogram is nearest to an inconsistent one: any other is farther away."""
    wanted = torch.randn(1, 513, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    wanted[:, [0, -1]] = wanted[:, [0, -1]].real.to(wanted.dtype)  # of real frames
    twice = torch.full((513, 1), 2.0)
    twice[[0, -1]] = 1  # frequencies that have no mirror image

    def distance(audio):
        return ((ag.stft(prep, audio) - wanted).abs().square() * twice).sum().item()

    best = ag.istft(prep, wanted)
    for seed in range(3):
        assert distance(best) < distance(best + 0.1 * best.std() * noise(*best.shape, seed=seed))


def test_frame_times(prep):
    for frame in (0, 7, 255):
        impulse = torch.zeros(1, CLIP)
        impulse[0, frame * HOP + HOP // 2] = 1
        assert ag.stft(prep, impulse).abs().square().sum(1).argmax().item() == frame


# --- log-mel


def test_mel_of_a_sine_has_the_right_bin_and_level(prep):
    """HTK's scale in closed form; a Hann window puts 1/4, 1, 1/4 of the power into three neighbouring frequencies."""

    def mel(frequency):
        return 2595 * math.log10(1 + frequency / 700)

    edges = [700 * (10 ** (mel(8000) * i / 129 / 2595) - 1) for i in range(130)]

    def triangle(band, frequency):
        low, centre, high = edges[band:band + 3]
        return max(0, min((frequency - low) / (centre - low), (high - frequency) / (high - centre)))

    for line in (20, 64, 150, 400):
        spectrum = {line - 1: 0.25, line: 1, line + 1: 0.25}
        expected = [sum(power * triangle(band, k * RATE / WINDOW) for k, power in spectrum.items())
                    for band in range(128)]
        for amplitude in (1, 0.1):
            got = prep.log_mel(sine(line * RATE / WINDOW, amplitude))[0, :, 128]
            assert got.argmax().item() == int(np.argmax(expected))
            assert got.exp().numpy() == pytest.approx(amplitude**2 * np.array(expected), abs=1e-4 * amplitude**2 + 2e-8)
        assert int(np.argmax(expected)) == round(mel(line * RATE / WINDOW) / (mel(8000) / 129)) - 1


def test_low_frequencies_are_heard(prep):
    """Down to 0 Hz: what a mel band ignores would be lost from the sound, and count in SDR."""
    for frequency in (0, 8, 20, 40):
        tone = 0.3 * torch.cos(2 * math.pi * frequency * torch.arange(CLIP) / RATE)[None]
        assert prep.log_mel(tone)[0, :3, 100:150].amax() > math.log(1e-3)


def test_silence_is_the_floor_and_standardising_is_undone(fresh):
    assert fresh.log_mel(torch.zeros(1, CLIP)).numpy() == pytest.approx(FLOOR, abs=1e-4)
    fresh.fit(iter([Clips(voice(), torch.tensor([256]))]))
    log_mel = fresh.log_mel(voice(seed=1))
    torch.testing.assert_close(fresh.unstandardise(fresh.standardise(log_mel)), log_mel, rtol=0, atol=1e-4)


def test_log_mel_can_be_learned_through(prep):
    audio = voice()[:, :20 * HOP].requires_grad_()
    prep.log_mel(audio).sum().backward()
    assert audio.grad.isfinite().all() and audio.grad.abs().max() > 0


def test_statistics_are_those_of_valid_frames(fresh):
    audio, frames = torch.cat([voice(seed=i) for i in range(3)]), torch.tensor([256, 100, 1])
    valid = torch.cat([clip[:, :n] for clip, n in zip(fresh.log_mel(audio), frames.tolist())], 1).double()
    fresh.fit(iter([Clips(audio, frames)]))
    mean = valid.mean(1)
    torch.testing.assert_close(fresh.mean.double(), mean, rtol=0, atol=1e-4)
    assert fresh.std.item() == pytest.approx((valid - mean[:, None]).square().mean().sqrt().item(), rel=1e-4)
    z = fresh.standardise(valid.float())
    assert z.mean().item() == pytest.approx(0, abs=1e-3) and z.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_padding_does_not_enter_statistics(fresh):
    """Whatever stands behind the valid frames, and however the clips are batched."""
    audio, frames = torch.cat([voice(seed=i) for i in range(4)]), torch.tensor([256, 50, 200, 10])
    fresh.fit(iter([Clips(audio, frames)]))
    mean, std = fresh.mean.clone(), fresh.std.clone()
    for clip, n in zip(audio, frames.tolist()):
        clip[(n + 2) * HOP:] = 0.7  # two hops on, where no window of a valid frame reaches
    fresh.fit(Clips(audio[i:i + 1], frames[i:i + 1]) for i in range(4))
    torch.testing.assert_close((fresh.mean, fresh.std), (mean, std), rtol=1e-5, atol=1e-5)


def test_statistics_live_in_the_checkpoint_and_silence_alone_is_harmless(fresh):
    assert set(fresh.state_dict()) == {"mean", "std"}
    fresh.fit(iter([Clips(torch.zeros(2, CLIP), torch.tensor([256, 256]))]))
    assert fresh.std == 1 and fresh.standardise(fresh.log_mel(torch.zeros(1, CLIP))).abs().max() < 1e-3


# --- from mel to magnitude


def test_magnitude_has_the_given_mel_and_is_recovered_within_the_span(prep):
    weights = torch.rand(1, 50, 128, generator=torch.Generator().manual_seed(0)) ** 4
    power = weights @ prep.filters.T  # a spectrum that the filters' own shapes make up
    mel = power @ prep.filters
    magnitude = ag.to_magnitude(prep, (mel + ag.MEL_FLOOR).log().mT)
    assert magnitude.shape == (1, 513, 50) and magnitude.min() >= 0
    again = magnitude.mT.square() @ prep.filters
    assert ((again - mel).norm() / mel.norm()).item() < 0.02
    assert ((magnitude.mT.square() - power).norm() / power.norm()).item() < 0.12


def test_magnitude_of_a_voice_keeps_its_mel(prep):
    log_mel = prep.log_mel(voice())
    mel, again = log_mel.exp(), ag.to_magnitude(prep, log_mel).mT.square() @ prep.filters
    assert ((again.mT - mel).norm() / mel.norm()).item() < 0.02


def test_empty_bands_are_left_out():
    fine = ag.AudioPreprocessor(400)
    audio = voice()
    log_mel = fine.log_mel(audio)
    empty = fine.filters.sum(0) == 0
    assert empty.sum() == 21 and (log_mel[:, empty] - FLOOR).abs().max() < 1e-4
    log_mel[:, empty] = 3.0  # a network may say anything there
    for phase in ag.PHASES:
        assert ag.to_audio(fine, log_mel, CLIP, phase, audio).isfinite().all()
    assert snr(ag.to_audio(fine, log_mel, CLIP, "original", audio), audio) > 25
    fine.fit(iter([Clips(audio, torch.tensor([256]))]))
    used = fine.standardise(fine.log_mel(audio))[:, ~empty]
    assert used.square().mean().item() == pytest.approx(1, abs=1e-2)


def test_a_wild_network_makes_no_nan(prep):
    wild = 100 * noise(1, 128, 256) * 10
    for phase in ag.PHASES:
        assert ag.to_audio(prep, wild, CLIP, phase, noise(1, CLIP)).isfinite().all()


# --- phase


def test_ceilings_are_ordered_as_theory_says(prep, capsys):
    """Exact mel: the original phase beats every invented one in SDR; more mel bins keep more; and more
    steps of Griffin-Lim come nearer to the spectrogram that was asked for."""
    audio = torch.cat([voice(seed=i) for i in range(2)])
    by_bins = [snr(ag.to_audio(other, other.log_mel(audio), CLIP, "original", audio), audio)
               for other in map(ag.AudioPreprocessor, (40, 80, 128, 256))]
    assert by_bins == sorted(by_bins) and by_bins[2] > 15
    log_mel = prep.log_mel(audio)
    magnitude = ag.to_magnitude(prep, log_mel)
    griffin = ag.to_audio(prep, log_mel, CLIP)
    assert snr(griffin, audio) < by_bins[2] - 15 and convergence(griffin, magnitude, prep) < 0.25
    steps = [convergence(ag.griffin_lim(prep, magnitude, n), magnitude, prep) for n in (1, 4, 16, 64)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("phase", ag.PHASES)
def test_phases_are_deterministic_and_clips_alone(prep, phase):
    audio = torch.cat([voice(seed=i)[:, :64 * HOP] for i in range(2)])
    log_mel = prep.log_mel(audio)
    both = ag.to_audio(prep, log_mel, 64 * HOP - 7, phase, audio)
    assert both.shape == (2, 64 * HOP - 7)
    alone = ag.to_audio(prep, log_mel[1:], 64 * HOP - 7, phase, audio[1:])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-6)
    assert torch.equal(alone, ag.to_audio(prep, log_mel[1:], 64 * HOP - 7, phase, audio[1:]))


@pytest.mark.parametrize("phase", ag.PHASES)
def test_silence_stays_silent(prep, phase):
    silence = torch.zeros(1, CLIP)
    assert level(ag.to_audio(prep, prep.log_mel(silence), CLIP, phase, silence)) < -120
    halved = voice()
    halved[:, CLIP // 2:] = 0
    rebuilt = ag.to_audio(prep, prep.log_mel(halved), CLIP, phase, halved)
    assert level(rebuilt[:, CLIP // 2 + 4 * WINDOW:]) < -80 < -40 < level(rebuilt[:, :CLIP // 2])


def test_loudness_is_kept_also_when_quiet(prep):
    for gain in (1, 0.01):  # -20 and -60 dB: the floor lies at -80 dB
        audio = gain * voice()
        rebuilt = ag.to_audio(prep, prep.log_mel(audio), CLIP)
        assert level(rebuilt) == pytest.approx(level(audio), abs=1)


# --- metrics on mel


def test_mel_metrics_closed_forms():
    reference = noise(2, 16, 10) * 10
    frames = torch.tensor([10, 10])
    same = ag.mel_metrics(reference, reference, frames)
    assert same["mel_mse"].tolist() == [0, 0] and same["mel_cosine"].tolist() == pytest.approx([1, 1])
    moved = ag.mel_metrics(reference + 0.5, reference, frames)
    assert moved["mel_mse"].tolist() == pytest.approx([0.25] * 2)
    assert moved["mel_mae"].tolist() == pytest.approx([0.5] * 2)
    assert ag.mel_metrics(-reference, reference, frames)["mel_cosine"].tolist() == pytest.approx([-1, -1])
    mean_spectrum = ag.mel_metrics(torch.zeros_like(reference), reference, frames)
    assert mean_spectrum["mel_cosine"].tolist() == [0, 0]


def test_only_valid_frames_count_in_mel_metrics(prep):
    reference, estimate = noise(2, 128, 256) * 10, noise(2, 128, 256, seed=1) * 10
    frames = torch.tensor([256, 100])
    good = ag.mel_metrics(estimate, reference, frames, prep)
    cut = ag.mel_metrics(estimate[1:, :, :100], reference[1:, :, :100], torch.tensor([100]), prep)
    estimate[1, :, 100:], reference[1, :, 100:] = math.nan, math.inf
    hurt = ag.mel_metrics(estimate, reference, frames, prep)
    for name in good:
        assert hurt[name].tolist() == pytest.approx(good[name].tolist())
        assert hurt[name][1].item() == pytest.approx(cut[name].item())


def test_mel_spectral_convergence_of_a_gain_and_of_silence(fresh):
    audio = torch.cat([noise(1, CLIP), torch.zeros(1, CLIP)])
    fresh.fit(iter([Clips(audio[:1], torch.tensor([256]))]))
    estimate, reference = (fresh.standardise(fresh.log_mel(gain * audio)) for gain in (1.5, 1))
    value = ag.mel_metrics(estimate, reference, torch.tensor([256, 256]), fresh)["mel_spectral_convergence"].tolist()
    assert value[0] == pytest.approx(0.5, abs=1e-3) and math.isnan(value[1])
    summary = ag.summarise([{"mel_spectral_convergence": v} for v in value])["mel_spectral_convergence"]
    assert (summary["n"], summary["failed"], summary["reason"]) == (1, 1, "the reference is silent")


# --- metrics on waveforms

# optional (it needs a C compiler): the tests say the same with and without it
NOT_INSTALLED = set() if importlib.util.find_spec("pesq") else {"pesq_wb"}


@pytest.mark.parametrize("wanted", [-5, 0, 12.5, 30])
def test_injected_noise_is_measured(wanted):
    """Noise that has nothing in common with the voice, at a known level: SNR and SI-SDR must say that level."""
    reference, hiss = voice(), noise(1, CLIP)
    hiss = hiss - reference * (hiss * reference).sum() / reference.square().sum()
    hiss = hiss * (reference.norm() / hiss.norm() * 10 ** (-wanted / 20))
    values, reasons = wave(reference + hiss, reference)
    assert values["snr_db"] == pytest.approx([wanted], abs=0.01)
    assert values["si_sdr_db"] == pytest.approx([wanted], abs=0.01)
    assert values["sdr_db"] == pytest.approx([wanted], abs=0.5) and not reasons.keys() - NOT_INSTALLED


def test_what_each_ratio_forgives():
    """A gain: SI-SDR; a filter: SDR of BSS Eval; a polarity: SI-SDR and SDR; none of them: SNR."""
    reference = voice()
    near = reference + 0.1 * noise(1, CLIP)
    plain, louder = wave(near, reference)[0], wave(0.25 * near, reference)[0]
    assert louder["si_sdr_db"] == pytest.approx(plain["si_sdr_db"], abs=1e-3)
    assert louder["sdr_db"] == pytest.approx(plain["sdr_db"], abs=1e-2)
    assert plain["snr_db"][0] > 10 > 4 > louder["snr_db"][0]
    delayed = wave(torch.nn.functional.pad(reference, (40, 0))[:, :CLIP], reference)[0]
    assert delayed["sdr_db"][0] > 25 and delayed["snr_db"][0] < 5 and delayed["si_sdr_db"][0] < 5
    turned = wave(-near, reference)[0]
    assert turned["snr_db"][0] == pytest.approx(-6, abs=0.5)
    assert turned["si_sdr_db"] == pytest.approx(plain["si_sdr_db"], abs=1e-3)


@pytest.mark.parametrize("gain", [2.0, 0.5])
def test_spectral_distances_of_a_gain_in_closed_form(gain):
    """6 dB louder everywhere: 6.02 dB of log-spectral distance, and |g - 1| + |ln g|; whatever the polarity."""
    reference = noise(1, CLIP)
    for estimate in (gain * reference, -gain * reference):
        values, _ = wave(estimate, reference)
        assert values["lsd_db"][0] == pytest.approx(abs(20 * math.log10(gain)), abs=0.02)
        assert values["mr_stft"][0] == pytest.approx(abs(gain - 1) + abs(math.log(gain)), abs=0.005)


def test_distances_vanish_for_the_reference_itself():
    values, reasons = wave(voice(), voice())
    assert values["lsd_db"] == values["mr_stft"] == [0] and values["snr_db"][0] > 80
    assert values["sdr_db"][0] is None or values["sdr_db"][0] > 80
    assert all(math.isfinite(v) for column in values.values() for v in column if v is not None), reasons


def test_a_silent_clip_fails_alone():
    pesq, pystoi = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
    reference = torch.cat([voice(), torch.zeros(1, CLIP), voice(seed=1)])
    near = reference + 0.02 * noise(3, CLIP)
    values, reasons = wave(near, reference)
    for name, column in values.items():
        assert column[1] is None and reasons[name] == "the reference is silent"
        assert column[0] is not None and column[2] is not None
    true, ours = reference[2].numpy(), near[2].numpy()  # these packages take the reference first
    assert values["pesq_wb"][2] == pesq.pesq(RATE, true, ours, "wb") != pesq.pesq(RATE, ours, true, "wb")
    assert values["stoi"][2] == pystoi.stoi(true, ours, RATE) != pystoi.stoi(ours, true, RATE)
    best, _ = wave(reference[:1], reference[:1])
    assert best["pesq_wb"][0] == pytest.approx(4.64, abs=0.01) and best["stoi"][0] == pytest.approx(1)


@pytest.mark.parametrize("package, name", [("pesq", "pesq_wb"), ("pystoi", "stoi"),
                                           ("torchmetrics.functional.audio", "sdr_db")])
def test_missing_packages_are_told(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    values, reasons = wave(torch.cat([voice(), voice()]), torch.cat([voice(), torch.zeros(1, CLIP)]))
    assert values[name] == [None, None] and "pip install" in reasons[name] and package in reasons[name]
    assert values["mr_stft"][0] == 0
    entry = ag.summarise([{key: column[i] for key, column in values.items()} for i in range(2)], reasons)[name]
    assert entry == {"mean": None, "median": None, "n": 0, "failed": 2, "reason": reasons[name]}


def test_only_valid_samples_count():
    reference = torch.cat([voice(), voice(seed=1)])
    near = reference + 0.02 * noise(2, CLIP)
    length = 30_001
    alone, _ = wave(near[1:, :length], reference[1:, :length])
    near[1, length:], reference[1, length:] = math.nan, 9.0
    values, _ = wave(near, reference, torch.tensor([CLIP, length]))
    for name in values.keys() - NOT_INSTALLED:
        assert values[name][1] == alone[name][0] and values[name][0] is not None


@pytest.mark.parametrize("length", [0, 1, 100, 700, 4000])
def test_short_clips_break_nothing(length):
    values, reasons = wave(1.1 * voice()[:, 2000:2000 + length], voice()[:, 2000:2000 + length])
    for name, (value,) in values.items():
        assert (value is None and reasons[name]) or math.isfinite(value)
    assert values["stoi"] == [None]  # pystoi alone would say 0.00001
    if length and "stoi" not in NOT_INSTALLED:
        assert reasons["stoi"].startswith("the clip is too short") and "0.41 s" in reasons["stoi"]
    if length and length < 4000 and "pesq_wb" not in NOT_INSTALLED:
        assert reasons["pesq_wb"].startswith("the clip is too short") and "0.25 s" in reasons["pesq_wb"]
    if 0 < length < 512:
        assert values["sdr_db"] == [None] and "too short" in reasons["sdr_db"]


def test_pauses_do_not_count_for_stoi():
    """A clip that is long enough, of which too little sounds: in plain words as well."""
    pytest.importorskip("pystoi")
    reference = torch.cat([voice()[:, 2000:6000], torch.zeros(1, 40_000)], 1)
    values, reasons = wave(1.1 * reference, reference)
    assert values["stoi"] == [None] and "pauses" in reasons["stoi"] and "0.41 s" in reasons["stoi"]
    enough = noise(1, ag.STOI_LEAST)  # the limit refuses nothing that could be measured
    assert wave(enough, enough)[0]["stoi"] == [pytest.approx(1)]
    assert wave(enough[:, 20:], enough[:, 20:])[0]["stoi"] == [None]


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0])
def test_a_broken_estimate_is_none_not_nan(broken):
    reference = torch.cat([voice(), voice(seed=1)])
    near = reference + 0.02 * noise(2, CLIP)
    near[0] = broken
    values, reasons = wave(near, reference)
    for name, column in values.items():
        assert column[1] is not None or name in NOT_INSTALLED
        assert math.isfinite(column[0]) if broken == 0 and column[0] is not None else reasons[name]
    for name in ("si_sdr_db", "sdr_db"):
        assert values[name][0] is None
    assert values["snr_db"][0] == (0 if broken == 0 else None)


# --- summaries


def test_summaries_count_failures():
    clips = [{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}, {"a": 8.0, "b": math.nan}, {"a": math.inf}]
    summary = ag.summarise(clips, {"b": "too short"})
    assert summary["a"] == {"mean": 4, "median": 3, "n": 3, "failed": 1, "reason": "the reference is silent"}
    assert summary["b"] == {"mean": 2, "median": 2, "n": 1, "failed": 3, "reason": "too short"}
    assert "reason" not in ag.summarise([{"a": 1.0}])["a"] and ag.summarise([]) == {}


def test_every_metric_is_defined(prep):
    mel = noise(1, 128, 10)
    names = [*ag.mel_metrics(mel, mel, torch.tensor([10]), prep), *wave(voice(), voice())[0]]
    assert {*names, "kbit_per_second"} == ag.METRICS.keys()
    assert all(better in ("lower", "higher") and unit and text for unit, better, text in ag.METRICS.values())

"""audio_gen.py's codec: its transform against the textbook, its probabilities as arithmetic of whole numbers, its coder
against the model's code length, and its files: real ones, odd ones, damaged ones.

The model is made of whole numbers by a formula (`formula_model`), so that it is the same on every machine and with
every version of torch: no shipped weights are needed, and the golden file stays what it is when those change. Chunks
are made short where a file needs several.
"""
import functools
import hashlib
import itertools
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, SCRIPTS, assert_error, disk_of, home, load_script, read, read_json

ag = load_script("audio_gen")
SCRIPT = SCRIPTS[1]
GOLDEN = ROOT / "tests" / "data" / "golden.iag"
GOLDEN_SHA256 = "7950c1d7e3c4b8ab1920510940bffbc54bf26c66f0a5b860c3c2034e84842aba"
INFER = ("--mode", "infer", "--device", "cpu", "--checkpoint", "model.pt", "--results_dir", "results")
INFO = ag.DataInfo("synthetic", "a formula", 16_000, ["mixture"], {"train": 1}, {"train": 1.0}, "0")

# --- helpers


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with the script's default folders in it; nothing is drawn."""
    with home(tmp_path) as patch:
        patch.setattr(ag, "HERE", tmp_path / "script")
        patch.setattr(ag, "comparison_figure", lambda *_: None)
        yield tmp_path


def balanced(rows: int, columns: int, most: int, heavy: int = 0) -> torch.Tensor:
    """[rows columns] of whole numbers below `most` that add up to 64 in each column, the rest of it at row `heavy`"""
    weights = (7 * torch.arange(rows)[:, None] + 5 * torch.arange(columns)) % most
    weights[heavy] += 64 - weights.sum(0)
    return weights


def geometric_counts(table: int) -> list[int]:
    """Of 2^16, in arithmetic of whole numbers: what a geometric distribution of this table's scale expects"""
    scale = 60 * (1000, 1189, 1414, 1682)[table % 4] << table // 4 >> max(0, table - ag.PLAIN_SCALES) // 4
    whole, most = scale + 10 ** 6, ag.LARGEST
    counts = [max(1, 2 ** 16 * 10 ** 6 * scale ** k // whole ** (k + 1)) for k in range(most)]
    counts.append(max(1, 2 ** 16 * scale ** most // whole ** most))
    counts[0] += 2 ** 16 - sum(counts)
    return counts


@functools.cache
def formula_model(hidden: int = 8):
    """The average of what stands around a line, on a scale of tables, a little different in each band"""
    model = ag.Codec(ag.CodecConfig(hidden=hidden), INFO)
    parts, narrow = model.context, hidden // 2
    with torch.no_grad():
        parts.enter[:] = balanced(39, hidden, 3, heavy=9) / 64  # row 9: the line below
        parts.band[:] = ((5 * torch.arange(ag.BANDS)[:, None] + 3 * torch.arange(hidden)) % 9 - 4) * 32 / 2048
        parts.channel[:] = ((4 * torch.arange(3)[:, None] + torch.arange(hidden)) % 5 - 2) * 32 / 2048
        parts.inner[:] = balanced(hidden, narrow, 15) / 64
        parts.inner_bias[:] = (torch.arange(narrow) - 1) * 16 / 2048
        parts.leave[:] = 4 * 96 / 64 / narrow
        parts.leave_bias[:] = 6
        parts.tables[:] = torch.tensor([geometric_counts(table) for table in range(ag.SCALES)]).double().log()
    return model.eval()


def random_model(hidden: int, gain: float = 1.0):
    torch.manual_seed(hidden)
    model = ag.Codec(ag.CodecConfig(hidden=hidden), INFO)
    with torch.no_grad():
        for weights in model.context.parameters():
            weights += gain * torch.randn_like(weights)
    return model.eval()


@functools.cache
def coder():
    return ag.Coder(formula_model())


@pytest.fixture
def model_file():
    """The model as a checkpoint in the current folder, as --export would write it"""
    model = formula_model()
    ag.save_checkpoint(Path("model.pt"), {
        "format": ag.SUBJECT.format, "family": "codec", "data": vars(INFO), "made": {}, "history": [],
        "config": vars(model.config), "ema": model.state_dict()})


def config(**options):
    return ag.CodecConfig(hidden=8, **options)


def song(seconds: float, rate: int = 16_000, channels: int = 1, level: float = 0.25) -> np.ndarray:
    """[L C]: decaying tones with harmonics, each channel with tones and a level of its own, and a little noise"""
    time, draw = np.arange(round(seconds * rate)) / rate, np.random.default_rng(7)
    sound = 0.002 * draw.standard_normal((len(time), channels))
    for n, start in enumerate(np.arange(0, seconds, 0.19)):
        since, pitch = time - start, 110 * 2 ** (n * 7 % 24 / 12)
        tone = sum(np.sin(2 * np.pi * pitch * k * since + k) / k for k in range(1, 9) if pitch * k < 0.45 * rate)
        tone *= np.exp(-6 * since.clip(0)) * (since >= 0) * (1 - np.exp(-400 * since.clip(0)))
        sound += level * tone[:, None] * (1, (0.9, 0.2)[n % 2])[:channels]
    return sound.clip(-1, 1 - 2 ** -15)


def write(path, sound, rate: int = 16_000, **more) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, rate, **more)
    return Path(path)


def load(path) -> np.ndarray:
    return soundfile.read(path, dtype="float64", always_2d=True)[0]


def encode(source, target="a.iag", bits: int = 16, **options) -> Path:
    ag.encode_file(coder(), config(**options), Path(source), Path(target), bits)
    return Path(target)


def decode(source="a.iag", target="a_out.wav", **more) -> np.ndarray:
    ag.decode_file(coder(), Path(source), Path(target), **more)
    return load(target)


def there_and_back(sound: np.ndarray, rate: int, bits: int = 32, **options) -> np.ndarray:
    encode(write("a.wav", sound, rate, subtype="FLOAT"), bits=bits, **options)
    return decode()


def snr(estimate, reference) -> float:
    return 10 * math.log10(np.square(reference).sum() / max(np.square(estimate - reference).sum(), 1e-30))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_quantised(values: np.ndarray, rate: int):
    magnitudes = np.abs(values).astype(np.int64)
    top = ag.top_line(magnitudes)
    tables = coder().tables(magnitudes, rate, top)
    return ag.Quantised(values, tables, float(coder().code_lengths(tables, magnitudes[:, :, :top]).sum()))


# === transform ===


@pytest.mark.parametrize("size", [2, 8, 512, 1024])
def test_dct4_is_that_of_the_textbook_and_its_own_inverse(size):
    n, x = torch.arange(size, dtype=torch.float64) + 0.5, noise(3, size)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi / size * n[:, None] * n)
    torch.testing.assert_close(ag.dct4(x), x @ matrix, rtol=0, atol=1e-11)
    torch.testing.assert_close(ag.dct4(ag.dct4(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_mdct_is_orthonormal_and_undone_exactly(blocks):
    size = 16
    lines = ag.dct4(ag.rotate(torch.eye(blocks * size, dtype=torch.float64).unflatten(1, (blocks, size)), 1)).flatten(1)
    torch.testing.assert_close(lines @ lines.T, torch.eye(blocks * size, dtype=torch.float64), rtol=0, atol=1e-12)
    x = noise(2, blocks, size)
    torch.testing.assert_close(ag.rotate(ag.dct4(ag.dct4(ag.rotate(x, 1))), -1), x, rtol=0, atol=1e-12)


def test_mdct_is_that_of_the_textbook():
    """Inside, a block is sqrt(2/N) sum_n w(n) x(n) cos(pi/N (n + 1/2 - N/2) (k + 1/2)): the usual formula (which has
    + N/2) for time that runs backwards."""
    size, audio = 64, noise(5 * 64)
    n, k = torch.arange(2 * size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
    kernel = torch.cos(math.pi / size * (n + 0.5 - size / 2)[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    window = torch.sin(math.pi / (2 * size) * (n + 0.5))
    lines = ag.dct4(ag.rotate(audio.view(5, size), 1))
    for block in range(1, 4):
        start = block * size - size // 2
        torch.testing.assert_close(lines[block], (audio[start:start + 2 * size] * window) @ kernel, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rate, frequency", [(16_000, 100), (16_000, 7800), (44_100, 3333), (48_000, 15_000)])
def test_steady_tone_lands_on_its_lines(rate, frequency):
    """A transform that is folded wrongly is still orthogonal, but smears a tone."""
    size = ag.frame_size(rate)
    tone = torch.sin(2 * math.pi * frequency / rate * torch.arange(20 * size, dtype=torch.float64))
    power = ag.dct4(ag.rotate(tone.view(20, size), 1)).square()[1:-1]
    near = (torch.arange(size) + 0.5 - frequency / (rate / 2 / size)).abs() <= 3
    assert power[:, near].sum() > 0.995 * power.sum()


@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 1, 1), (5, 1, 3), (1, 7, 2, 1), (200, 3)])
@pytest.mark.parametrize("sign", [1, -1])
def test_transform_of_a_stream_is_that_of_the_whole(sizes, sign):
    whole = noise(2, sum(sizes), 32)
    parts = [part.numpy() for part in whole.split(sizes, 1)]
    found = np.concatenate(list(ag.folded(iter(parts), sign)), 1)
    torch.testing.assert_close(torch.from_numpy(found), ag.rotate(whole, sign), rtol=0, atol=1e-12)
    grouped = list(ag.regrouped(iter(parts), 4))
    assert np.array_equal(np.concatenate(grouped, 1), whole) and {part.shape[1] for part in grouped[:-1]} <= {4}


def test_stereo_is_turned_so_that_the_first_channel_holds_what_it_can_and_back():
    one, other = noise(2, 30, 1024).numpy()
    for angle in (0, 0.3, math.pi / 4, 1.9, math.pi - 0.2):
        lines = np.stack([math.cos(angle) * one - 0.02 * math.sin(angle) * other,
                          math.sin(angle) * one + 0.02 * math.cos(angle) * other])
        angles = ag.principal_angles(lines, 44_100)
        assert angles.dtype == np.uint8 and angles.max() < ag.ANGLES
        away = (angles * math.pi / ag.ANGLES - angle) % math.pi
        assert np.minimum(away, math.pi - away).max() < math.pi / ag.ANGLES
        turned = ag.turned(lines, 44_100, angles, 1)
        assert np.square(turned[1]).sum() < 0.004 * np.square(turned).sum()
        np.testing.assert_allclose(ag.turned(turned, 44_100, angles, -1), lines, rtol=0, atol=1e-12)


# === probabilities: whole numbers ===


def levels(rows: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and places as `choose` gets them, from all zero to all 127"""
    draw = np.random.default_rng(seed)
    features = draw.integers(0, draw.integers(1, 129, (rows, 1)), (rows, 39)).clip(0, 127).astype(np.float32)
    features[0], features[1] = 0, 127
    return torch.from_numpy(features), torch.from_numpy(draw.integers(0, 3 * ag.BANDS, rows))


def by_integers(coder, features, places) -> np.ndarray:
    """`choose` in integers, which have no rounding but the one that is meant: to the nearest, halves to even"""
    enter, bias, inner, inner_bias, leave, last = (weights.numpy().astype(np.int64) for weights in coder.weights)

    def activation(x):
        x = x.clip(0, 255 * 64)
        return x // 64 + ((x % 64 > 32) | ((x % 64 == 32) & (x // 64 % 2 == 1)))

    h = activation(features.numpy().astype(np.int64) @ enter + bias[places.numpy()])
    h = activation(h @ inner + inner_bias)
    return ((h @ leave)[:, 0] + last + 512 >> 10).clip(0, ag.SCALES - 1)


MODELS = {"formula": formula_model, "random 8": lambda: random_model(8), "random 64": lambda: random_model(64),
          "extreme 256": lambda: random_model(256, 1e4)}


@pytest.mark.parametrize("name", MODELS)
def test_every_sum_is_a_whole_number_that_float32_holds(name):
    """The largest that weights and inputs of this size can make, whatever order they are added in."""
    worker = ag.Coder(MODELS[name]())
    enter, bias, inner, inner_bias, leave, last = (weights.double().abs() for weights in worker.weights)
    assert all(torch.equal(weights, weights.round()) for weights in worker.weights)
    sums = (127 * enter.sum(0) + bias.amax(0), 255 * inner.sum(0) + inner_bias, 255 * leave.sum(0) + last + 512)
    assert max(part.max() for part in sums) < 2 ** 24
    if name == "extreme 256":  # of all models the largest there can be
        most = ag.Coder(random_model(256, 1e9))
        assert all(ours.abs().max() == limit.abs().max() for ours, limit in zip(worker.weights, most.weights))


@pytest.mark.parametrize("name", MODELS)
def test_choice_of_a_table_is_that_of_integers_however_it_is_computed(name):
    model = MODELS[name]()
    worker, (features, places) = ag.Coder(model), levels()
    expected = by_integers(worker, features, places)
    assert len(set(expected.tolist())) > 5 or name.startswith("extreme")
    enter, bias, inner, inner_bias, leave, last = worker.weights
    order, hidden = torch.randperm(39), torch.randperm(len(inner))
    shuffled = enter[order][:, hidden], bias[:, hidden], inner[hidden], inner_bias, leave, last
    for weights, inputs in ((worker.weights, features), (shuffled, features[:, order]),
                            (tuple(part.double() for part in worker.weights), features.double())):
        worker.weights = weights
        for _ in every_arithmetic():
            assert np.array_equal(worker.choose(inputs, places), expected)
            assert np.array_equal(worker.choose(inputs[5:8], places[5:8]), expected[5:8])  # another kernel


def every_arithmetic():
    """One and two threads, with and without oneDNN"""
    threads = torch.get_num_threads()
    try:
        for count, fast in itertools.product((1, 2), (True, False)):
            torch.set_num_threads(count)
            with torch.backends.mkldnn.flags(enabled=fast):
                yield
    finally:
        torch.set_num_threads(threads)


def torch_choice(context, features, places):
    """The choice as training sees it, all lines of a channel at once"""
    found = np.zeros(len(places), np.int64)
    with torch.no_grad():
        for channel in range(3):
            rows = (places // ag.BANDS == channel).nonzero()[:, 0]
            index = context(features[rows].T[:, None], places[rows] % ag.BANDS, channel)
            found[rows] = torch.floor(index[0] + 0.5).long().clamp(max=ag.SCALES - 1).numpy()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_training_and_files_choose_alike(name):
    model = MODELS[name]()
    features, places = levels(seed=3)
    expected = ag.Coder(model).choose(features, places)
    for _ in every_arithmetic():
        assert np.array_equal(torch_choice(model.context, features, places), expected)


def test_tables_are_probabilities_and_their_lengths_those_of_training():
    for model in (formula_model(), random_model(8)):
        worker = ag.Coder(model)
        assert worker.probabilities.dtype == np.float32 and worker.probabilities.min() >= 2 ** -16
        np.testing.assert_allclose(worker.probabilities.sum(1), 1, atol=1e-3)
        assert np.array_equal(worker.probabilities * 2 ** 16, np.rint(worker.probabilities * 2 ** 16))
        tables = np.arange(ag.SCALES).repeat(200)
        magnitudes = np.tile(np.arange(200), ag.SCALES)
        likely = worker.lengths[tables, (magnitudes >> worker.low[tables]).clip(max=ag.LARGEST)] < 10
        with torch.no_grad():
            ours = model.context.bits(torch.from_numpy(tables).float(), torch.from_numpy(magnitudes)).numpy()
        np.testing.assert_allclose(worker.code_lengths(tables, magnitudes)[likely], ours[likely], rtol=0, atol=0.02)


def test_levels_and_memories_are_whole_numbers_that_see_only_the_past():
    magnitudes = torch.arange(300)
    assert torch.equal(ag.level(magnitudes), ag.level(magnitudes).round()) and ag.level(magnitudes).max() == 127
    assert (ag.level(magnitudes).diff() >= 0).all() and ag.level(torch.tensor([10 ** 6])) == 127
    first = ag.level(torch.randint(0, 300, (1, 9, 5), generator=torch.Generator().manual_seed(0)))
    second = first.clone()
    second[:, 6:] = 0
    assert torch.equal(ag.memories(first)[:, :7], ag.memories(second)[:, :7])
    assert torch.equal(ag.memories(first), ag.memories(first).round()) and ag.memories(first).max() <= 127
    constant = torch.full((1, 30, 1), 100.0)
    assert (ag.memories(constant)[0, 1:] == 100).all()


def test_bands_cover_all_lines_and_widen():
    for lines, rate in ((512, 16_000), (1024, 44_100), (1024, 48_000)):
        bands = ag.bands_of(lines, rate, ag.BANDS)
        counts = torch.bincount(bands)
        assert (bands.diff() >= 0).all() and bands[0] == 0 and bands.max() < ag.BANDS
        assert counts[5] < counts[-2]


def test_rounding_to_steps_is_undone_up_to_half_a_step_and_centres_bring_it_nearer():
    exact = np.random.default_rng(0).laplace(0, 2, (2, 50, 64))
    values = np.rint(exact).astype(np.int32)
    none, best = np.zeros((2, 3), np.int8), ag.centres_of(values, exact)
    assert np.array_equal(ag.restored(values, none), values)
    assert np.square(ag.restored(values, best) - exact).sum() < np.square(values - exact).sum()
    assert not ag.restored(np.zeros_like(values), best).any()


# === coder: what is packed is unpacked, in as many bits as the model says ===


def laplace_values(channels: int, frames: int, size: int, scale: float, seed: int = 0) -> np.ndarray:
    """Large at the bottom, nothing at the top, a little louder from frame to frame"""
    draw = np.random.default_rng(seed)
    envelope = scale * np.exp(-np.arange(size) / size * 8) * (1 + 0.3 * np.sin(np.arange(frames)))[:, None]
    return np.rint(draw.laplace(0, 1, (channels, frames, size)) * envelope).astype(np.int32)


@pytest.mark.parametrize("channels, size, rate, frames, scale", [
    (1, 512, 16_000, (1, 199, 200), 4), (2, 512, 16_000, (2, 1, 60), 30), (1, 1024, 44_100, (201,), 1.5),
    (2, 1024, 48_000, (30, 3), 3), (1, 512, 16_000, (450,), 0.5), (2, 1024, 44_100, (20,), 3000),
    (1, 512, 16_000, (12,), 2e5), (2, 512, 16_000, (5, 7), 0)])
def test_values_come_back_exactly_in_as_many_bits_as_the_model_says(channels, size, rate, frames, scale):
    """Chunks of unequal length together: of few frames and many, silent (0), with low bits and escapes (from 3000)."""
    packed, sent = [], []
    for n, count in enumerate(frames):
        values = laplace_values(channels, count, size, scale, n).clip(-2 ** 20, 2 ** 20)
        quantised = as_quantised(values, rate)
        data = coder().pack(quantised, b"")
        headers = 8 * (14 + 3 * 4 + 1)  # lengths; the last word of each stream and the last signs are not full
        assert quantised.bits - 8 <= 8 * len(data) <= 1.005 * quantised.bits + headers
        packed.append((data, count))
        sent.append(values)
    for found, values in zip(coder().unpack(packed, channels, size, rate), sent, strict=True):
        assert found.dtype == np.int32 and np.array_equal(found, values)


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 511), (0, 5, 100), (1, 0, 7)])
@pytest.mark.parametrize("value", [1, -40, 41, -1234, 2 ** 20])
def test_single_value_amid_silence_comes_back(place, value):
    values = np.zeros((2, 6, 512), np.int32)
    values[place] = value
    data = coder().pack(as_quantised(values, 16_000), b"")
    assert np.array_equal(coder().unpack([(data, 6)], 2, 512, 16_000)[0], values)


def test_rounding_saves_bits_and_costs_less_than_it_saves():
    """Against rounding to the nearest at the same step: fewer bits, and where the steps are finer again, less error"""
    lines = next(ag.lines_of(soundfile.SoundFile(write("a.wav", song(1.5))), Path("a.wav")))

    def spent(values):
        return as_quantised(values, 16_000).bits

    def error(values, step):
        return np.square(ag.restored(values, ag.centres_of(values, lines / step)) * step - lines).sum()

    nearest, step = np.rint(lines / 0.01).astype(np.int32), 0.01
    clever = coder().quantise(lines, 16_000, step)
    assert clever.bits == pytest.approx(spent(clever.values)) and clever.bits < 0.97 * spent(nearest)
    while coder().quantise(lines, 16_000, step).bits < spent(nearest):
        step *= 0.98
    assert error(coder().quantise(lines, 16_000, step).values, step) < error(nearest, 0.01)


@pytest.mark.parametrize("broken", [
    b"", b"\0" * 13, struct.pack("<H3I", 2000, 0, 0, 0), struct.pack("<H3I", 8, 3, 0, 0) + b"abc",
    struct.pack("<H3I", 8, 400, 0, 0), struct.pack("<H3I", 8, 8, 0, 0) + b"\xff" * 8,
    struct.pack("<H3I", 512, 400, 40, 40) + bytes(range(256)) * 2, struct.pack("<H3I", 512, 40, 0, 0) + b"\x7f" * 40])
def test_content_that_no_coder_wrote_ends_in_an_error_or_in_values_and_never_in_a_crash(broken):
    """Checksums keep such content away but for files that somebody made up."""
    try:
        values, = coder().unpack([(broken, 10)], 1, 512, 16_000)
        assert values.shape == (1, 10, 512)
    except (ValueError, struct.error, AssertionError, IndexError):
        pass


# === rates ===


@pytest.mark.parametrize("seconds, rate, channels, rates", [
    (3, 16_000, 1, (12, 24, 64)), (2, 44_100, 2, (64, 192)), (8, 16_000, 1, (16,)), (0.3, 48_000, 2, (96,))])
def test_bitrate_is_not_exceeded_and_used(seconds, rate, channels, rates):
    write("a.wav", song(seconds, rate, channels), rate)
    for kbits in rates:
        size = encode("a.wav", bitrate=kbits).stat().st_size
        assert 0.9 < size / (125 * kbits * seconds) <= 1.03, kbits


def test_quality_is_the_step_and_more_bits_sound_better():
    sound = song(1.0)
    sizes, errors = [], []
    for quality in (20, 40, 60, 80):
        found = there_and_back(sound, 16_000, quality=quality)
        sizes.append(Path("a.iag").stat().st_size)
        errors.append(-10 * math.log10(np.square(found - sound).mean()))
    assert sizes == sorted(sizes) and errors == sorted(errors)
    for quality, error in zip((40, 60, 80), errors[1:]):
        assert quality + 5 < error < quality + 14  # 10.8 dB less than a step where it is fine


@pytest.mark.parametrize("options, least, most", [
    ({"bitrate": 1}, 0, 1500), ({"bitrate": 10_000}, 3000, 200_000), ({"quality": 0}, 0, 400),
    ({"quality": 90}, 8000, 100_000)])
def test_extreme_rates_make_a_file_that_can_be_read(options, least, most):
    sound = song(0.5)
    found = there_and_back(sound, 16_000, **options)
    assert found.shape == sound.shape and np.isfinite(found).all()
    assert least <= Path("a.iag").stat().st_size <= most
    assert snr(found, sound) > (70 if least >= 3000 else -1)


# === files ===


@pytest.mark.parametrize("change", [lambda data: data, lambda data: data[:len(data) * 3 // 5], lambda data: 2 * data])
def test_mp3_is_as_long_as_what_can_be_read_of_it(change):
    """Its header only estimates the length: too long where it was cut, too short where another was added."""
    soundfile.write("whole.mp3", song(2, 44_100, 2), 44_100)
    Path("a.mp3").write_bytes(change(Path("whole.mp3").read_bytes()))
    encode("a.mp3")
    found = decode("a.iag")
    with soundfile.SoundFile("a.mp3") as file:
        true = file.read(10 ** 6, always_2d=True)
    assert found.shape == true.shape and snr(found, true) > 25


@pytest.mark.parametrize("rate", ag.RATES)
@pytest.mark.parametrize("channels", [1, 2])
def test_file_keeps_rate_channels_their_order_and_length(rate, channels):
    for length in (1, ag.frame_size(rate) + 1, rate // 5):
        sound = song(1, rate, channels)[:length] * (1, 0.3)[:channels]
        write("a.wav", sound, rate)
        header = ag.encode_file(coder(), config(quality=60), Path("a.wav"), Path("a.iag"))
        found = decode()
        assert (header.rate, header.channels, header.samples) == (rate, channels, length)
        assert soundfile.info("a_out.wav").samplerate == rate and found.shape == (length, channels)
        assert length == 1 or min(snr(found[:, c], sound[:, c]) for c in range(channels)) > 25
    assert ag.file_snr(Path("a_out.wav"), Path("a.wav")) == pytest.approx(snr(found, load("a.wav")), abs=1e-6)


@pytest.mark.parametrize("rate, coded, length", [
    (8_000, 16_000, 2000), (22_050, 44_100, 5000), (32_000, 44_100, 4000), (96_000, 48_000, 9600),
    (192_000, 48_000, 19_201), (11_025, 16_000, 1000), (40_001, 44_100, 30_000)])
def test_other_rates_are_resampled_and_it_is_said(rate, coded, length, capsys):
    time = np.arange(length) / rate
    write("a.wav", 0.3 * np.sin(2 * np.pi * 1000 * time), rate)
    encode("a.wav", quality=60)
    assert f"a.wav has {rate} Hz: it is coded at {coded} Hz" in capsys.readouterr().out
    found = decode()
    assert soundfile.info("a_out.wav").samplerate == coded and abs(len(found) - length * coded / rate) <= 1
    middle = slice(len(found) // 4, -len(found) // 4)  # of a filter's edges nothing is asked
    expected = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(len(found)) / coded)
    assert snr(found[middle, 0], expected[middle]) > 30


@pytest.mark.parametrize("bits, subtype, least", [(16, "PCM_16", 75), (24, "PCM_24", 82), (32, "FLOAT", 82)])
def test_output_has_the_bits_that_were_asked_for(bits, subtype, least):
    sound = song(0.2, level=0.5)
    encode(write("a.wav", sound, subtype="DOUBLE"), bits=bits, quality=90)
    found = decode()
    assert soundfile.info("a_out.wav").subtype == subtype and least < snr(found, sound) < least + 20
    ag.decode_file(coder(), Path("a.iag"), Path("b_out.wav"), bits=24)  # the listener's choice
    assert soundfile.info("b_out.wav").subtype == "PCM_24" and np.abs(load("b_out.wav") - found).max() < 2 ** -15


def test_flac_and_wav_of_one_sound_make_one_file():
    sound = np.rint(song(0.4, 44_100, 2) * 32768) / 32768
    one = encode(write("a.wav", sound, 44_100), "one.iag").read_bytes()
    assert encode(write("a.flac", sound, 44_100), "two.iag").read_bytes() == one


def test_file_is_the_same_however_many_threads_write_and_read_it():
    write("a.wav", song(0.2, 44_100, 2), 44_100)
    seen = set()
    for _ in every_arithmetic():
        encode("a.wav")
        decode()
        seen.add((Path("a.iag").read_bytes(), Path("a_out.wav").read_bytes()))
    assert len(seen) == 1


@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2)])
def test_chunks_have_no_seams(rate, channels, monkeypatch):
    """The error of a file in short chunks is nowhere larger than elsewhere, and no larger than that of one chunk."""
    sound, size = song(0.6, rate, channels), ag.frame_size(rate)
    whole = there_and_back(sound, rate, quality=50)
    monkeypatch.setattr(ag, "CHUNK_FRAMES", 4)
    found = there_and_back(sound, rate, quality=50)
    assert snr(found, sound) > snr(whole, sound) - 1
    power = np.square(found - sound)[:len(sound) // size * size].reshape(-1, size * channels).mean(1)
    assert power.max() < 5 * np.median(power)


ODD_SOUNDS = {  # of a time in seconds
    "silence": lambda time: 0 * time, "constant": lambda time: 0 * time + 0.5,
    "nearly nothing": lambda time: 1e-7 * np.sin(time * 3000),
    "full-scale square wave": lambda time: np.where(np.sin(time * 1400) < 0, -1, 1 - 2 ** -15),
    "impulse": lambda time: (time == time[len(time) // 2]) * 0.9, "one sample": lambda time: time[:1] + 0.7,
    "too loud": lambda time: 4 * np.sin(time * 2000),
    "white noise": lambda time: np.random.default_rng(0).uniform(-1, 1, len(time))}


@pytest.mark.parametrize("channels, rate", [(1, 16_000), (2, 44_100)])
@pytest.mark.parametrize("kind", ODD_SOUNDS)
def test_odd_sounds_come_back(kind, channels, rate):
    sound = np.stack([ODD_SOUNDS[kind](np.arange(rate // 3) / rate)] * channels, 1)
    bitrate = {1: 200, 2: 64}[channels]
    found = there_and_back(sound, rate, bitrate=bitrate)
    assert found.shape == sound.shape and np.isfinite(found).all()
    # Of a third of a second, of which one frame holds nearly all, the rate can't be met: no step is above full scale.
    assert Path("a.iag").stat().st_size <= 2.1 * 125 * bitrate * max(len(sound), ag.frame_size(rate)) / rate + 150
    if kind == "silence":
        assert not found.any()
    elif kind not in ("white noise", "nearly nothing", "one sample"):  # of which hardly a bit is asked for
        assert snr(found, sound) > 15
    assert np.abs(decode("a.iag", "a_pcm.wav")).max() <= max(1.0, np.abs(found).max())


def test_loud_sound_is_clipped_at_full_scale_and_does_not_wrap():
    sound = 1.6 * np.sin(np.arange(4000) / 9)[:, None]
    found = there_and_back(sound, 16_000, bits=16)
    assert found.max() == 1 - 2 ** -15 and found.min() == -1
    assert snr(found, sound.clip(-1, 1)) > 25
    for bits in (16, 24):
        full = 2 ** (bits - 1)
        values = ag.pcm(np.array([-9, -1, -0.5 / full, 0, 0.5, 1 - 1 / full, 1, 9]), bits)
        assert (values >> (32 - bits)).tolist() == [-full, -full, 0, 0, full // 2, full - 1, full - 1, full - 1]


def bad_inputs() -> dict[str, tuple[str, ...]]:
    """Names of files in the current folder -> what is said of them"""
    write("six.wav", np.zeros((99, 6)))
    write("nan.wav", np.full(99, math.nan), subtype="FLOAT")
    write("infinite.wav", np.r_[np.zeros(9999), math.inf], subtype="FLOAT")
    write("no samples.wav", np.zeros(0))
    write("slow.wav", np.zeros(99), 100)
    write("cut.wav", np.zeros(5000))
    os.truncate("cut.wav", 3000)
    Path("empty.wav").write_bytes(b"")
    Path("text.wav").write_text("this is not a sound")
    Path("folder.wav").mkdir()
    return {"six.wav": ("6 channels", "ffmpeg", "-ac 2"), "nan.wav": ("NaN",), "infinite.wav": ("infinite",),
            "no samples.wav": ("no samples",), "slow.wav": ("100 Hz",), "cut.wav": ("truncated",), "empty.wav": (),
            "text.wav": (), "folder.wav": ("folder",), "missing.wav": ("no file",)}


def test_input_that_can_not_be_encoded_is_one_error_and_leaves_nothing(model_file):
    for name, words in bad_inputs().items():
        assert_error(SCRIPT.call(*INFER, "--encode", "--input", name, "--output_dir", "out"), 1, name, *words)
        assert os.listdir("out") == [".results"], name


# === damaged files ===


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(ag, "CHUNK_FRAMES", 8)


@pytest.fixture
def short_file(short_chunks):
    """Bytes of a file of four chunks, and where each of them begins"""
    encode(write("sound.wav", song(0.9)), "whole.iag", bitrate=24)
    data, starts = Path("whole.iag").read_bytes(), [ag.HEADER.size + 4]
    while starts[-1] < len(data):
        starts.append(starts[-1] + 8 + int.from_bytes(data[starts[-1]:starts[-1] + 4], "little"))
    assert len(starts) == 5 and starts[-1] == len(data)
    return data, starts


def refused(data: bytes, *words: str) -> None:
    Path("bad.iag").write_bytes(data)
    with pytest.raises(ag.UserError) as error:
        decode("bad.iag", "bad.wav")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in ("bad.iag", *words)), error.value
    assert not list(Path().glob("*bad.wav*"))


def test_every_truncation_is_detected(short_file):
    data, starts = short_file
    for length in {*range(0, len(data), 13), *range(45), *starts[:-1], *(s + 2 for s in starts[:-1]), len(data) - 1}:
        refused(data[:length], *(("--salvage",) if length >= starts[0] else ()))


def test_every_flipped_byte_is_detected(short_file):
    data, starts = short_file
    for offset in {*range(0, len(data), 11), *range(starts[0]), *(s + n for s in starts[:-1] for n in range(30))}:
        refused(data[:offset] + bytes([data[offset] ^ (1 << offset % 8)]) + data[offset + 1:])


def with_header(data: bytes, **changes) -> bytes:
    """A header that lies, with a checksum that agrees with it"""
    header = ag.Header(*ag.HEADER.unpack(data[:ag.HEADER.size])[2:])._replace(**changes)
    return header.pack() + data[ag.HEADER.size + 4:]


def record(content: bytes) -> bytes:
    data = struct.pack("<I", len(content)) + content
    return data + struct.pack("<I", zlib.crc32(data))


def test_what_is_no_file_of_this_model_is_refused_for_its_reason(short_file):
    data, starts = short_file
    first, second = data[starts[0]:starts[1]], data[starts[1]:starts[2]]
    version = data[:4] + bytes([ag.VERSION + 1]) + data[5:]
    for broken, *words in (
            (b"", "no file of this script"), (Path("sound.wav").read_bytes(), "no file of this script"),
            (b"IAGC", "version"), (version, "version", "newer"), (data[:ag.HEADER.size], "header"),
            (with_header(data, digest=b"8 bytes."), "another model", "--checkpoint"),
            (with_header(data, samples=10 ** 15), "damaged"), (with_header(data, samples=0), "damaged"),
            (with_header(data, channels=3), "header"), (with_header(data, channels=0), "header"),
            (with_header(data, rate=96_000), "header"), (with_header(data, bits=17), "header"),
            (with_header(data, samples=512), "damaged"), (data + b"more", "damaged"), (data + first, "damaged"),
            (data[:starts[0]] + second + data[starts[1]:starts[3]], "damaged"),  # its last chunk is gone
            (data[:starts[0]] + second + first + data[starts[2]:], "damaged"),  # two of one length, in the wrong order
            (data[:starts[0]] + record(b""), "damaged"), (data[:starts[0]] + record(b"\0" * 40), "damaged"),
            (data[:starts[0]] + struct.pack("<I", 2 ** 32 - 1) + data[starts[0] + 4:], "damaged")):
        refused(broken, *words)
    with pytest.raises(ag.UserError, match="name that model"):
        ag.decode_file(ag.Coder(random_model(8)), Path("whole.iag"), Path("x.wav"))
    with pytest.raises(ag.UserError, match="missing.iag"):
        decode("missing.iag")
    for lie in ({"channels": 2}, {"rate": 44_100}, {"step": 65_535}, {"step": 0}):  # no checksum can tell
        Path("lie.iag").write_bytes(with_header(data, **lie))
        try:
            found = decode("lie.iag")
            assert np.isfinite(found).all() and len(found) == 14_400
        except ag.UserError as error:
            assert "lie.iag" in str(error)


@pytest.mark.parametrize("channels", [1, 2])
def test_salvage_gives_what_is_before_the_damage(channels, model_file, short_chunks):
    write("sound.wav", song(0.9, channels=channels))
    encode("sound.wav", "whole.iag")
    intact, data = decode("whole.iag"), Path("whole.iag").read_bytes()
    start = ag.HEADER.size + 4
    for chunk in range(4):
        length = int.from_bytes(data[start:start + 4], "little")
        flipped = data[:start + 20] + bytes([data[start + 20] ^ 4]) + data[start + 21:]
        Path("bad.iag").write_bytes(flipped if chunk % 2 else data[:start + length])  # or cut off
        command = (*INFER, "--decode", "bad.iag", "--output_dir", "out")
        assert_error(SCRIPT.call(*command), 1, "bad.iag", "damaged", "--salvage")
        assert os.listdir("out") == [".results"]
        result = SCRIPT.call(*command, "--salvage")
        assert result.code == 1 and result.err.startswith("warning: bad.iag is damaged after")
        assert result.err.count("\n") == 1
        found = load("out/bad_decoded.wav")
        sure = max(0, 8 * chunk - 1) * 512  # the frame at the edge lacks its neighbour
        assert sure <= len(found) <= 8 * chunk * 512 and np.array_equal(found[:sure], intact[:sure])
        Path("out/bad_decoded.wav").unlink()
        start += length + 8
    result = SCRIPT.ok(*INFER, "--decode", "whole.iag", "--salvage")
    assert np.array_equal(load("results/whole_decoded.wav"), intact) and not result.err


# === places ===


def test_second_writer_of_a_file_is_refused_and_the_first_one_goes_on():
    write("a.wav", song(0.1))
    with ag.writer_lock(Path("a.iag")), ag.replacing(Path("a.iag")) as part:
        part.write_bytes(b"half of it")
        with pytest.raises(ag.UserError, match=r"a\.iag"):
            encode("a.wav")
        part.write_bytes(part.read_bytes() + b" and the rest")
    assert Path("a.iag").read_bytes() == b"half of it and the rest"
    encode("a.wav")
    assert sorted(os.listdir()) == ["a.iag", "a.wav"]  # no lock or part stays behind


def test_full_disk_is_one_error_and_leaves_what_was_there(model_file):
    write("a.wav", song(1.0))
    SCRIPT.ok(*INFER, "--input", "a.wav")
    before = {path: path.read_bytes() for path in sorted(Path("results").iterdir())}
    for flags, size in ((("--input", "a.wav", "--bitrate", 100), 4000), (("--decode", "results/a.iag"), 9000),
                        (("--decode", "results/a.iag"), 43)):
        with disk_of(size):
            assert_error(SCRIPT.call(*INFER, *flags), 1, "can't write", "space")
        assert {path: path.read_bytes() for path in sorted(Path("results").iterdir())} == before
    with disk_of(20_000):  # room for the codec file, none for the sound
        assert_error(SCRIPT.call(*INFER, "--input", "a.wav"), 1, "can't write", "a_reconstructed.wav")


@pytest.mark.parametrize("flags", [("--input", "a.wav"), ("--decode", "a.iag")])
def test_place_that_can_not_be_written_is_one_error(flags, model_file):
    encode(write("a.wav", song(0.1)))
    Path("file").write_text("in the way")
    for place in ("file", "file/below", "/proc/nothing"):
        assert_error(SCRIPT.call(*INFER, *flags, "--output_dir", place), 1, place)


def test_no_file_that_is_read_is_ever_overwritten(model_file):
    for name in ("a.wav", "b/a.wav", "a_reconstructed.wav"):
        write(name, song(0.05))
    encode("a.wav", "c.iag")
    Path("c_decoded.wav").write_bytes(Path("c.iag").read_bytes())  # a codec file whose name says otherwise
    before = {path: path.read_bytes() for path in sorted(Path().glob("*.*"))}
    for flags, word in ((("--input", "a.wav", "b/a.wav"), "a.iag"), (("--decode", "c_decoded.wav", "c.iag"), "both"),
                        (("--input", "a.wav", "a_reconstructed.wav"), "both an input and an output")):
        assert_error(SCRIPT.call(*INFER, *flags, "--output_dir", "."), 2, word)
    assert before == {path: path.read_bytes() for path in before}


def test_memory_does_not_grow_with_the_file(monkeypatch):
    """What is held at a time is some chunks, however many there are; the choice of the step looks at a few of them."""
    monkeypatch.setattr(ag, "CHUNK_FRAMES", 4)
    write("a.wav", np.zeros(512 * 4 * 300))
    seen, looked = [], []
    monkeypatch.setattr(ag.Coder, "index_for", lambda self, lines, *rest: looked.append(lines.shape[1]) or 100)
    monkeypatch.setattr(ag.Coder, "quantise", lambda self, lines, rate, step: seen.append(lines.shape[1]) or (
        ag.Quantised(np.zeros(lines.shape, np.int32), np.zeros((*lines.shape[:2], 0), np.int64), 0.0)))
    encode("a.wav", quality=60)
    assert seen == [4] * 300 and len(looked) == 1 and looked[0] <= ag.SAMPLED
    groups, unpack = [], ag.Coder.unpack
    monkeypatch.setattr(ag.Coder, "unpack", lambda self, chunks, *rest: groups.append(len(chunks)) or unpack(
        self, chunks, *rest))
    assert not decode().any() and max(groups) <= ag.GROUP and sum(groups) == 300


# === command line ===


def test_files_become_codec_files_and_sound_again_and_it_is_said(model_file):
    sounds = {"one.wav": (16_000, 1), "deep/two.flac": (44_100, 2)}
    for name, (rate, channels) in sounds.items():
        write(name, song(0.6, rate, channels), rate)
    out = SCRIPT.ok(*INFER, "--input", *sounds, "--bitrate", 96, "--output_dir", "out").out
    assert sorted(os.listdir("out")) == [".results", "one.iag", "one_reconstructed.wav", "two.iag",
                                         "two_reconstructed.wav"]
    for record, (name, (rate, channels)) in zip(read_json("results/inference.json")["files"], sounds.items()):
        size, (small, sound) = Path(record["file"]).stat().st_size, (Path(record["file"]), Path(record["output"]))
        assert (record["input"], record["bytes"], record["rate"], record["channels"]) == (name, size, rate, channels)
        assert record["kbit_per_second"] == pytest.approx(size / 0.6 / 125, rel=1e-3) and 85 < size / 0.6 / 125 < 98.9
        kind = "stereo" if channels == 2 else "mono"
        assert f"{rate} Hz, {kind}) -> {small}: {size:,} bytes, {size / 0.6 / 125:.1f} kbit/s" in out
        assert record["snr_db"] == pytest.approx(snr(load(sound), load(name)), abs=1e-6)
        assert f"{sound}: SNR {record['snr_db']:.2f} dB" in out
        SCRIPT.ok(*INFER, "--decode", small, "--output_dir", "again")
        assert Path(f"again/{small.stem}_decoded.wav").read_bytes() == sound.read_bytes()
    one = Path("out/one.iag").read_bytes()
    SCRIPT.ok(*INFER, "--input", "one.wav", "--encode", "--bitrate", 96, "--bits", 24)
    assert sorted(os.listdir("results")) == [".results", "inference.json", "one.iag"]
    assert Path("results/one.iag").read_bytes()[ag.HEADER.size + 4:] == one[ag.HEADER.size + 4:]  # bits: of the header


def test_sound_of_any_rate_is_said_once_and_silence_has_no_ratio(model_file):
    write("slow.wav", song(0.2, 8000), 8000)
    write("odd.wav", song(1.0, 40_001, 2), 40_001)
    write("silence.wav", np.zeros(800))
    write("one.wav", np.full(1, 0.5))
    out = SCRIPT.ok(*INFER, "--input", "slow.wav", "odd.wav", "silence.wav", "one.wav").out
    assert out.count("slow.wav has 8000 Hz: it is coded at 16000 Hz") == 1
    assert "silence_reconstructed.wav: SNR - dB" in out
    assert read_json("results/inference.json")["files"][2]["snr_db"] is None


@pytest.mark.parametrize("flags, words", [
    (("--salvage", "--input", "a.wav"), ("--salvage", "--decode")), (("--decode", "a.iag", "--input", "a.wav"), (
        "--decode",)), (("--decode", "a.iag", "--encode"), ("--decode",)), (("--bitrate", 0.5), ("--bitrate",)),
    (("--bitrate", 100_000), ("--bitrate",)), (("--quality", 91), ("--quality",)), (("--quality", -1), ("--quality",)),
    (("--bits", 8), ("--bits", "16")), (("--bitrate", 64, "--quality", 60), ("--bitrate",)),
    (("--decode", "a.iag", "--bitrate", 64), ("--bitrate",)), (("--phase", "original"), ("--phase",)),
    (("--decode",), ("--decode",))])
def test_flag_that_can_not_be_honoured_is_a_usage_error(flags, words, model_file):
    encode(write("a.wav", song(0.05)))
    assert_error(SCRIPT.call(*INFER, *flags), 2, *words)
    assert not Path("results").exists()


def test_no_example_is_an_error(model_file):
    assert_error(SCRIPT.call(*INFER), 1, "--input")


def test_export_in_half_precision_writes_and_reads_its_own_files(model_file):
    write("a.wav", song(0.3))
    SCRIPT.ok(*INFER, "--input", "a.wav", "--export", "small.pt")
    assert read("small.pt")["ema"]["context.enter"].dtype == torch.float16
    flags = (*INFER[:5], "small.pt", *INFER[6:], "--output_dir", "out")
    SCRIPT.ok(*flags, "--input", "a.wav")
    assert snr(load("out/a_reconstructed.wav"), load("a.wav")) > 10


# === evaluation ===


def test_evaluation_counts_bytes_of_files_beside_the_plain_coder(model_file, monkeypatch):
    monkeypatch.setattr(ag, "MONO_RATES", (24, 64))
    monkeypatch.setattr(ag, "STEREO_RATES", (96,))
    monkeypatch.setattr(ag, "WAVE_METRICS", {ag.snr_db: 1, ag.lsd_db: 1})
    write("mine/test/a.wav", song(1.2, 44_100, 2), 44_100)
    out = SCRIPT.ok("--mode", "evaluate", *INFER[2:], "--dataset", "folder", "--data_root", "mine").out
    rows = {name: row["all"] for name, row in read_json("results/evaluation.json")["rows"].items()}
    assert list(rows) == ["codec_mono_024", "plain_mdct_mono_024", "codec_mono_064", "plain_mdct_mono_064",
                          "codec_stereo_096"]
    for name, row in rows.items():
        wanted = int(name[-3:])
        assert 0.9 * wanted < row["kbit_per_second"]["mean"] <= 1.03 * wanted and row["snr_db"]["n"] == 1
        assert row["kbit_per_second"] == rows[name.replace("plain_mdct", "codec")]["kbit_per_second"]
    assert rows["codec_mono_064"]["snr_db"]["mean"] > rows["codec_mono_024"]["snr_db"]["mean"] + 3 and "snr_db" in out


def test_plain_coder_keeps_to_its_bits():
    audio = torch.from_numpy(song(1.0)[:, 0]).float()
    last = -math.inf
    for bits in (8000, 16_000, 64_000):
        found = ag.plain_codec(audio, bits)
        lines = ag.dct4(ag.rotate(torch.nn.functional.pad(audio.double(), (0, -len(audio) % 512)).view(-1, 512), 1))
        assert found.shape == audio.shape and snr(found.numpy(), audio.numpy()) > last + 3
        last = snr(found.numpy(), audio.numpy())
    assert ag.plain_bits(np.zeros((40, 512))) < 200  # adaptive tables learn that there is nothing
    assert ag.plain_bits(np.rint(lines.numpy() * 400)) > ag.plain_bits(np.rint(lines.numpy() * 200))


# === files of the mel models: the same container, other contents ===


@functools.cache
def latent_model(family: str):
    """Weights and statistics at random, so that each number has a width of its own"""
    draw = torch.Generator().manual_seed(5)
    cls = ag.FAMILIES[family]
    small = {"latent_dim": 20, "width": 16, "n_mels": 32}
    model = cls(cls.config_class(**small), INFO).eval()
    with torch.no_grad():
        model.basis.copy_(torch.linalg.qr(torch.randn(model.basis.shape, generator=draw))[0])
        model.spread.copy_(40 * torch.rand(model.spread.shape, generator=draw) ** 4 + 0.01)
        model.chosen.copy_(model.spread.flatten().topk(len(model.chosen)).indices)
        if family == "autoencoder":
            odds = torch.rand(model.sets.shape[0], model.spread.numel(), generator=draw)
            model.sets.copy_((odds * model.spread.flatten()).topk(model.sets.shape[1]).indices)
        model.preprocessor.mean.fill_(-8)
        model.preprocessor.std.fill_(3)
    return model


def latents(family: str, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the linear code [n D] like those of music, heavy-tailed, with the sets they belong to"""
    model, draw = latent_model(family), np.random.default_rng(seed)
    numbers = torch.from_numpy(draw.laplace(0, 0.7, (count, model.spread.numel()))).float()
    return numbers, torch.from_numpy(draw.integers(0, len(model.places()), count))


MEL_FAMILIES = ("autoencoder", "vae")


@pytest.fixture
def latent_file():
    """Writes a family's checkpoint into the current folder"""
    def save(family: str) -> None:
        model = latent_model(family)
        ag.save_checkpoint(Path("model.pt"), {
            "format": ag.SUBJECT.format, "family": family, "data": vars(INFO), "made": {}, "history": [],
            "config": vars(model.config), "ema": model.state_dict()})
    return save


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_tables_of_latents_are_those_of_laplace_on_any_machine(family):
    """Counts of 2^16 that no other library's exp, however it rounds, could round to another whole number; the same of
    the widths, which are compared with irrational numbers."""
    worker = latent_model(family).coder()
    scale, low = 0.06 * 2 ** (np.arange(ag.SCALES) / 4), ag.low_bits(np.arange(ag.SCALES))
    edges = ((np.arange(ag.LARGEST + 1) << low[:, None]) - 0.5).clip(min=0)
    beyond = np.concatenate([np.exp(-edges / scale[:, None]), np.zeros((ag.SCALES, 1))], 1)
    counts = -np.diff(beyond) * 2 ** 16
    assert np.abs(counts % 1 - 0.5).min() > 1e-7
    assert np.array_equal(worker.probabilities * 2 ** 16, np.rint(counts).clip(1))
    borders = 2 ** (np.arange(-79.5, 80) / 4)
    nearest = borders.astype(np.float32).astype(np.float64)
    assert np.abs(nearest / borders - 1).min() > 1e-12
    expected = np.floor(4 * np.log2(worker.spread.numpy()) + 0.5)
    assert np.array_equal(worker.wide, expected)


@pytest.mark.parametrize("family", MEL_FAMILIES)
@pytest.mark.parametrize("count, factor", [(1, 1), (8, 1), (3, 0), (5, 1e4), (2, 1e9)])
def test_latents_come_back_within_half_a_step_in_as_many_bits_as_the_tables_say(family, count, factor):
    """Also silence, and numbers far beyond what the training set has."""
    worker, (numbers, sets) = latent_model(family).coder(), latents(family, count)
    values = worker.rounded(factor * numbers, sets)
    data = worker.pack(values, sets)
    found = worker.unpack(data, count, worker.step)
    assert torch.equal(found, worker.spectrum(values, sets, worker.step))
    if factor <= 1e4:
        kept, exact = (x.gather(1, worker.places[sets]) for x in (found, factor * numbers))
        assert ((kept - exact).abs() <= 0.5001 * worker.unit(sets, worker.step) + 1e-5 * exact.abs()).all()
        assert (found != 0).sum() <= kept.numel()
    bits = worker.code_lengths(worker.tables(sets, worker.step), np.abs(values)).sum() + count * math.log2(worker.sets)
    assert 0 <= 8 * len(data) - bits + 8 <= 0.005 * bits + 3 * 32  # the last word is not full


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_rounding_is_as_fine_as_was_meant_and_steps_are_worth_their_bits(family):
    """White noise of a step's width over all numbers is 2 % of what the linear code leaves out, within the grid."""
    model = latent_model(family)
    worker = model.coder()
    step = 2.0 ** (8 - worker.step / 4)
    assert 0.8 < step ** 2 / 12 * worker.places.shape[1] / (model.ROUNDING * model.missed().item()) < 1.2
    numbers, sets = latents(family, 40)
    found, _ = worker.through(numbers, sets, torch.full((40,), ag.FRAMES))
    error = ((found - numbers) * model.spread.flatten()).gather(1, worker.places[sets])
    assert error.square().mean().item() < 1.05 * step ** 2 / 12  # of numbers narrower than a step it is less


@pytest.mark.parametrize("family", MEL_FAMILIES)
@pytest.mark.parametrize("seconds", [0.001, 2, 38])
def test_sound_of_a_mel_file_is_the_decoded_quantised_latents(family, seconds):
    """A file of one chunk or more, against decoding what was rounded without any file."""
    model, audio = latent_model(family), song(seconds)
    worker = model.coder()
    header = worker.write(write("a.wav", audio, subtype="FLOAT"), Path("a.iag"), 32)
    ag.decode_file(worker, Path("a.iag"), Path("a_out.wav"))
    found, true = load("a_out.wav")[:, 0], ag.read_audio(Path("a.wav"))
    assert (header.rate, header.channels, header.samples) == (16_000, 1, len(audio)) and len(found) == len(audio)
    with torch.no_grad():
        rounded = []
        for clips in ag.clips_of(model, true):
            codes = model.encode(clips)
            values = worker.rounded(model.place(codes), model.set_of(codes))
            rounded.append(model.from_spectrum(worker.spectrum(values, model.set_of(codes), worker.step)))
        direct = ag.render_long(model, ag.joined(model, rounded, len(true)))[:len(true)]
    expected = (direct * (np.abs(found).max() / direct.abs().max())).numpy()  # the file has a loudness of its own
    assert snr(found, expected) > 60
    loud = 20 * math.log10(np.sqrt(np.square(found).mean()) / true.square().mean().sqrt().item())
    assert abs(loud) < 0.3 or np.abs(found).max() > 0.99
    clips = ag.clip_count(model, len(true))
    chunks = -(-clips // ag.CLIPS_OF_A_CHUNK)
    bits = sum(worker.code_lengths(worker.tables(model.set_of(codes), worker.step), np.abs(values)).sum()
               for codes, values in [(codes, worker.rounded(model.place(codes), model.set_of(codes)))
                                     for codes in map(model.encode, ag.clips_of(model, true))])
    size = Path("a.iag").stat().st_size - ag.HEADER.size - 4 - 9 * chunks
    assert -1 <= size - (bits + clips * math.log2(worker.sets)) / 8 <= 0.005 * bits / 8 + 8 * chunks


def mel_file(family: str, monkeypatch) -> tuple[bytes, list[int], np.ndarray]:
    """A file of four chunks, where each begins, and its sound"""
    monkeypatch.setattr(ag, "CLIPS_OF_A_CHUNK", 1)
    worker = latent_model(family).coder()
    worker.write(write("sound.wav", song(16)), Path("whole.iag"), 16)
    ag.decode_file(worker, Path("whole.iag"), Path("whole.wav"))
    data, starts = Path("whole.iag").read_bytes(), [ag.HEADER.size + 4]
    while starts[-1] < len(data):
        starts.append(starts[-1] + 8 + int.from_bytes(data[starts[-1]:starts[-1] + 4], "little"))
    assert len(starts) >= 5 and starts[-1] == len(data)
    return data, starts, load("whole.wav")


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_damaged_and_foreign_mel_files_are_refused_as_the_codecs_are(family, monkeypatch):
    data, starts, _ = mel_file(family, monkeypatch)
    worker, other = latent_model(family).coder(), {"vae": "autoencoder", "autoencoder": "vae"}[family]
    encode("sound.wav", "codec.iag", bitrate=24)
    latent_model(other).coder().write(Path("sound.wav"), Path("other.iag"), 16)
    made_up = ag.Header(worker.digest, 16_000, 1, 16, worker.step, 100)
    wrong = [(data[:n], "" if n < starts[0] else "--salvage") for n in (0, 3, 20, 36, starts[1], starts[2] + 5,
                                                                        len(data) - 1)]
    wrong += [(data[:n] + bytes([data[n] ^ 4]) + data[n + 1:], "") for n in (0, 4, 9, 30, *(s + 9 for s in starts[:-1]),
                                                                              *(s + 1 for s in starts[:-1]))]
    wrong += [(data[:4] + bytes([ag.VERSION + 1]) + data[5:], "newer"), (Path("sound.wav").read_bytes(), "no file of"),
              (Path("codec.iag").read_bytes(), "another model"), (Path("other.iag").read_bytes(), "another model"),
              (data + b"more", "damaged"), (with_header(data, channels=2), "header"),
              (with_header(data, rate=44_100), "header"), (with_header(data, samples=10 ** 15), "damaged"),
              (with_header(data, samples=0), "damaged"), (made_up.pack() + record(b""), "damaged"),
              (made_up.pack() + record(b"\x30" + b"\xff" * 3), "damaged"),
              (data[:starts[0]] + data[starts[1]:starts[2]] + data[starts[0]:starts[1]] + data[starts[2]:], "damaged")]
    for broken, word in wrong:
        Path("bad.iag").write_bytes(broken)
        with pytest.raises(ag.UserError) as error:
            ag.decode_file(worker, Path("bad.iag"), Path("bad.wav"))
        assert "\n" not in str(error.value) and "bad.iag" in str(error.value) and word in str(error.value)
        assert not list(Path().glob("*bad.wav*"))
    for reader in (coder(), latent_model(other).coder()):
        with pytest.raises(ag.UserError, match="another model"):
            ag.decode_file(reader, Path("whole.iag"), Path("bad.wav"))
    for content in (b"\0" * 41, b"\x30" + b"\xff" * 40, bytes(range(41))):  # what no coder wrote: anything but a crash
        Path("bad.iag").write_bytes(made_up.pack() + record(content))
        try:
            ag.decode_file(worker, Path("bad.iag"), Path("made_up.wav"))
            assert np.isfinite(load("made_up.wav")).all()
        except ag.UserError as error:
            assert "bad.iag" in str(error)


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_salvage_of_a_mel_file_gives_what_is_before_the_damage(family, monkeypatch, latent_file):
    data, starts, whole = mel_file(family, monkeypatch)
    latent_file(family)
    for chunk, start in enumerate(starts[:-1]):
        flipped = data[:start + 9] + bytes([data[start + 9] ^ 4]) + data[start + 10:]
        Path("bad.iag").write_bytes(flipped if chunk % 2 else data[:start + 5])
        command = (*INFER, "--decode", "bad.iag", "--output_dir", "out")
        assert_error(SCRIPT.call(*command), 1, "bad.iag", "damaged", "--salvage")
        result = SCRIPT.call(*command, "--salvage")
        assert result.code == 1 and result.err.startswith("warning: bad.iag is damaged after")
        sound = load("out/bad_decoded.wav")
        model = latent_model(family)
        ends = [ag.clip_start(model, len(whole), n - 1) + ag.FRAMES if n else 0 for n in (chunk, chunk + 1)]
        assert len(sound) == min(len(whole), ends[0] * ag.HOP)
        if chunk:
            assert soundfile.info("out/bad_decoded.wav").channels == 1 and np.abs(sound).max() > 0.01


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_mel_files_by_the_command_line_state_the_size_they_have(family, latent_file):
    latent_file(family)
    write("deep/a.flac", song(7, 44_100, 2), 44_100)
    out = SCRIPT.ok(*INFER, "--input", "deep/a.flac").out
    report, size = read_json("results/inference.json")["files"][0], Path("results/a.iag").stat().st_size
    assert (report["bytes"], report["rate"], report["channels"], report["seconds"]) == (size, 16_000, 1, 7)
    assert report["kbit_per_second"] == pytest.approx(size / 7 / 125)
    assert f"{size:,} bytes, {size / 7 / 125:.{3 if size < 8750 else 1}f} kbit/s" in out
    sound = load("results/a_reconstructed.wav")
    figures = latent_model(family).coder().figures(Path("results/a_reconstructed.wav"), Path("deep/a.flac"))
    assert {name: report[name] for name in figures} == figures and {"snr_db", "mel_mse"} == figures.keys()
    SCRIPT.ok(*INFER, "--decode", "results/a.iag", "--output_dir", "out", "--bits", 24)
    assert soundfile.info("out/a_decoded.wav").subtype == "PCM_24"
    assert np.abs(load("out/a_decoded.wav") - sound).max() <= 2 ** -16
    SCRIPT.ok(*INFER, "--input", "deep/a.flac", "--encode", "--output_dir", "again")
    assert Path("again/a.iag").read_bytes() == Path("results/a.iag").read_bytes()
    assert sorted(os.listdir("again")) == [".results", "a.iag"]
    assert_error(SCRIPT.call(*INFER, "--salvage", "--input", "deep/a.flac"), 2, "--salvage", "--decode")
    SCRIPT.ok(*INFER, "--input", "deep/a.flac", "--export", "small.pt")  # half precision reads the same files
    flags = (*INFER[:5], "small.pt", *INFER[6:])
    SCRIPT.ok(*flags, "--decode", "results/a.iag", "--output_dir", "half")


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_latents_are_the_same_however_they_are_read(family):
    worker, (numbers, sets) = latent_model(family).coder(), latents(family, 8)
    data = worker.pack(worker.rounded(numbers, sets), sets)
    found = []
    for _ in every_arithmetic():
        found.append(latent_model(family).coder().unpack(data, 8, worker.step))
    assert all(torch.equal(found[0], other) for other in found)


# === a golden file: it must decode to the same samples for ever ===


def write_golden() -> str:
    """How the golden file was made (only a new version of the format is a reason to make it again): 1.5 s of stereo"""
    write("golden.wav", song(1.5, 44_100, 2), 44_100)
    GOLDEN.write_bytes(encode("golden.wav", bitrate=48).read_bytes())
    return samples_sha256(GOLDEN)


def samples_sha256(path: Path) -> str:
    ag.decode_file(coder(), path, Path("golden_out.wav"))
    samples, _ = soundfile.read("golden_out.wav", dtype="int16", always_2d=True)
    return hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()


def test_golden_file_decodes_to_its_samples():
    assert GOLDEN.stat().st_size <= 10_000
    assert samples_sha256(GOLDEN) == GOLDEN_SHA256
    assert load("golden_out.wav").shape == (66_150, 2)
    assert snr(load("golden_out.wav"), song(1.5, 44_100, 2)) > 10

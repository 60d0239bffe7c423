"""audio_gen.py's data: real .stem.mp4 files made here and read back, resampling and crops against oracles, splits,
caches, every damaged file a user may have, and the download from a server of this process that cuts, lies and breaks.
"""
import contextlib
import dataclasses
import errno
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import stat
import subprocess
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import load_script

CPU = torch.device("cpu")
ag = load_script("audio_gen")
RATE, CLIP = ag.SAMPLE_RATE, ag.CLIP
SCRIPT = Path(ag.__file__)
needs_ffmpeg = pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")),
                                  reason="needs ffmpeg and ffprobe on the PATH")


# --- helpers


def options(given):
    return ag.TrainDataOptions(**given)


def tone(seconds, hertz=440.0, rate=RATE, level=0.25, channels=1):
    wave = level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1).astype(np.float32)


def save(path, samples, rate=RATE, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **{"subtype": "FLOAT", **more} if path.suffix == ".wav" else more)
    return path


def loudest(audio, rate=RATE) -> float:
    """The frequency with the most power, in Hz."""
    audio = np.asarray(audio, dtype=np.float64)
    return float(np.abs(np.fft.rfft(audio * np.hanning(len(audio)))).argmax() * rate / len(audio))


def track(samples, name="t", stem="mixture"):
    return ag.Track(name, stem, np.asarray(samples, dtype=np.float16))


def draw(step=0, total=8, rows=slice(None), seed=3):
    return ag.Draw(seed, step, total, rows, CPU)


@contextlib.contextmanager
def error(*words, code=1):
    """A UserError of one line that holds these words."""
    with pytest.raises(ag.UserError) as caught:
        yield caught
    text = str(caught.value)
    assert "\n" not in text and caught.value.code == code, text
    for word in words:
        assert str(word) in text, text


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own for each test, and the script's default folders in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ag, "HERE", tmp_path)
    monkeypatch.setattr(ag.time, "sleep", lambda _seconds: None)
    monkeypatch.delenv("MUSDB_MIRROR", raising=False)
    return tmp_path


@pytest.fixture
def no_ffmpeg(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def decoded(monkeypatch):
    """The (file name, stem) of everything that is decoded."""
    calls, read_audio = [], ag.read_audio
    monkeypatch.setattr(ag, "read_audio", lambda path, flag, stem: (calls.append((path.name, stem)), read_audio(
        path, flag, stem))[1])
    return calls


@pytest.fixture(scope="session")
def stem_file(tmp_path_factory):
    """A file as MUSDB18 has them: five stereo AAC streams of 2 s at 44.1 kHz; stream n is a tone of 300 + 200 n Hz."""
    import stempeg
    path = tmp_path_factory.mktemp("stems") / "song.stem.mp4"
    stems = np.stack([tone(2, 300 + 200 * n, 44_100, channels=2) for n in range(5)])
    stempeg.write_stems(str(path), stems, sample_rate=44_100, writer=stempeg.StreamsWriter(codec="aac", bitrate="96k"))
    return path


def moved_index(path, target, streams=5) -> Path:
    """The same streams with their index before the samples, as in the published files."""
    maps = [word for n in range(streams) for word in ("-map", f"0:a:{n}")]
    subprocess.run(["ffmpeg", "-nostdin", "-loglevel", "error", "-y", "-i", path, *maps, "-c", "copy", "-movflags",
                    "+faststart", target], check=True)
    return target


@pytest.fixture
def musdb_root(stem_file, tmp_path):
    """Two songs to train and to validate on, and one to test with."""
    root = tmp_path / "data" / "musdb18"
    for name in ("train/A - one", "train/B - two", "test/E - five"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stem_file, root / f"{name}.stem.mp4")
    return root


def hq_root(root, train=("A", "B", "C"), test=("D",), seconds=1.0) -> Path:
    """MUSDB18-HQ's layout; stem n is a tone of 300 + 200 n Hz."""
    for split, names in (("train", train), ("test", test)):
        for name in names:
            for n, stem in enumerate(ag.STEMS):
                save(root / split / name / f"{stem}.wav", tone(seconds, 300 + 200 * n, 44_100, channels=2), 44_100)
    return root


# --- reading files


def test_file_that_ends_early_is_refused_and_streams_of_unknown_length_are_not():
    path = save(Path("a.wav"), tone(2, 440))
    whole = path.read_bytes()
    path.write_bytes(whole[:-RATE * 4])
    with error("a.wav", "truncated", "64000 bytes"):
        ag.read_audio(path)
    place = whole.index(b"data") + 4
    path.write_bytes(whole[:place] + b"\xff\xff\xff\xff" + whole[place + 4:-RATE * 4])  # what ffmpeg writes into a pipe
    assert len(ag.read_audio(path)) == RATE


def test_channels_that_cancel_each_other_are_told(capsys):
    one = tone(1)
    for gain, told in ((-1, True), (1, False), (-0.5, False), (0, False), (-0.9, True)):
        ag.read_audio(save(Path("a.wav"), np.concatenate([one, gain * one], 1)))
        assert ("a.wav: its channels cancel" in capsys.readouterr().err) is told
    ag.read_audio(save(Path("a.wav"), np.zeros((100, 2))))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("rate", [8_000, 44_100, 192_000, 44_101, 12_347])
def test_a_tone_keeps_its_pitch_length_and_level_at_any_rate(rate):
    audio = ag.read_audio(save(Path("a.wav"), tone(2, 1_000, rate), rate))
    assert len(audio) == pytest.approx(2 * RATE, abs=1)
    time = torch.arange(len(audio)) / RATE
    inner = slice(1_000, -1_000)
    expected = 0.25 * torch.sin(2 * np.pi * 1_000 * time)
    assert (audio - expected)[inner].abs().max() < (2e-3 if rate % 1_000 in (0, 100) else 0.01)  # 3e-6 of the time


def test_what_16_khz_can_not_hold_is_removed_not_folded_back():
    loud = ag.read_audio(save(Path("a.wav"), tone(1, 9_000, 44_100), 44_100))
    assert loud[800:-800].abs().max() < 0.25 * 10 ** (-60 / 20)
    kept = ag.read_audio(save(Path("b.wav"), tone(1, 7_500, 44_100), 44_100))
    assert kept[800:-800].abs().max() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".aiff"])
@pytest.mark.parametrize("channels", [1, 2])
def test_formats(suffix, channels):
    path = Path(f"a{suffix}")
    soundfile.write(path, tone(1, 440, 44_100, channels=channels), 44_100)
    audio = ag.read_audio(path)
    assert audio.dtype == torch.float32 and audio.ndim == 1
    assert len(audio) == pytest.approx(RATE, abs=1_200)  # MP3 has frames
    assert loudest(audio) == pytest.approx(440, abs=2)
    assert audio.abs().max() == pytest.approx(0.25, rel=0.1)


def test_one_sample_is_a_sound():
    assert len(ag.read_audio(save(Path("a.wav"), np.array([[0.5]], np.float32)))) == 1
    assert len(ag.read_audio(save(Path("b.wav"), np.array([[0.5]], np.float32), 192_000))) == 1
    assert len(ag.read_audio(save(Path("c.wav"), np.array([[0.5]], np.float32), 8_000))) == 2


BAD_FILES = {
    "text named .wav": (lambda p: p.write_text("dear diary"), "can't be read as audio"),
    "nothing at all": (lambda p: p.write_bytes(b""), "can't be read as audio"),
    "no samples": (lambda p: save(p, np.zeros((0, 1), np.float32)), "no samples"),
    "no samples at 44.1 kHz": (lambda p: save(p, np.zeros((0, 2), np.float32), 44_100), "no samples"),
    "NaN": (lambda p: save(p, np.array([0.1, np.nan, 0.1], np.float32)), "NaN or infinite"),
    "infinity": (lambda p: save(p, np.array([0.1, np.inf, 0.1], np.float32)), "NaN or infinite"),
    "a channel of NaN": (lambda p: save(p, np.array([[0.1, np.nan]] * 9, np.float32)), "NaN or infinite"),
    "a header only": (lambda p: p.write_bytes(save(p, tone(1)).read_bytes()[:20]), "can't be read as audio"),
    "a rate of 10 Hz": (lambda p: save(p, tone(1), 10), "10 Hz"),
    "a folder": (lambda p: p.mkdir(), "is a folder, not an audio file: give audio files with --input"),
    "missing": (lambda p: None, "there is no file bad.wav: give audio files with --input"),
    "an .m4a": (lambda p: p.write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(2000)),
                "convert it to WAV or FLAC"),  # which soundfile does not read, but is not broken
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_named(what):
    make, words = BAD_FILES[what]
    make(Path("bad.wav"))
    with error("bad.wav", words):
        ag.read_audio(Path("bad.wav"))


@needs_ffmpeg
def test_what_soundfile_does_not_read_ffmpeg_does(stem_file, monkeypatch):
    save(Path("a.wav"), tone(1, 440))
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-i", "a.wav", "a.m4a"], check=True)
    audio = ag.read_audio(Path("a.m4a"))
    assert len(audio) == pytest.approx(RATE, abs=2500) and loudest(audio[1600:-3200]) == pytest.approx(440, abs=2)
    assert audio[1600:-3200].square().mean().sqrt() == pytest.approx(0.25 / 2 ** 0.5, rel=0.02)  # and its level
    audio = ag.read_audio(stem_file)  # its first stream is the mixture
    assert loudest(audio[1600:-3200]) == pytest.approx(300, abs=2)
    monkeypatch.setenv("PATH", "")
    with error("a.m4a", "install ffmpeg", code=ag.NO_FFMPEG):
        ag.read_audio(Path("a.m4a"))


def test_results_are_no_data(place):
    for n in range(4):
        save(place / "mine" / f"{n}.wav", tone(0.1, 300 + n))
    save(ag.results_folder(place / "mine" / "results") / "deep" / "x.wav", tone(0.1))
    assert len(ag.audio_files(place / "mine", "--data_root")) == 4
    ag.results_folder(place / "mine")
    with error("mine", "results of a script", "--data_root", ag.RESULTS_MARK):
        ag.audio_files(place / "mine", "--data_root")
    with error("results of a script", "--musdb_root"):
        ag.MUSDBDataset(options({"musdb_root": place / "mine"}))


@pytest.mark.parametrize("kind", ["musdb", "folder"])
def test_evaluation_needs_the_test_split_alone(place, kind):
    if kind == "musdb":
        data = ag.MUSDBDataset(options({"musdb_root": hq_root(place / "hq", train=())}), ("test",))
    else:
        save(place / "own" / "test" / "a.wav", tone(0.1))
        data = ag.FolderDataset(options({"data_root": place / "own"}), ("test",))
    assert data.test and not data.train and not data.valid


# --- MUSDB18


@needs_ffmpeg
def test_each_stream_is_its_stem(stem_file):
    for n, stem in enumerate(ag.STEMS):
        audio = ag.read_audio(stem_file, stem=stem)
        assert len(audio) == pytest.approx(2 * RATE, abs=800)
        assert loudest(audio[1_600:-3_200]) == pytest.approx(300 + 200 * n, abs=2)
        assert audio[1_600:-3_200].square().mean().sqrt() == pytest.approx(0.25 / 2 ** 0.5, rel=0.02)


@needs_ffmpeg
def test_musdb_files_are_read_split_and_cached(musdb_root, decoded):
    data = ag.MUSDBDataset(options({"musdb_root": musdb_root}))
    assert len(decoded) == 15 and {stem for _, stem in decoded} == set(ag.STEMS)
    names = [{t.name for t in part} for part in (data.train, data.valid, data.test)]
    assert [len(n) for n in names] == [1, 1, 1] and len(set.union(*names)) == 3 and names[2] == {"E - five"}
    assert [t.stem for t in data.test] == list(ag.STEMS)
    assert all(t.audio.dtype == np.float16 for t in data.train)
    for t in data.valid:
        assert loudest(t.audio[1_600:-3_200]) == pytest.approx(300 + 200 * ag.STEMS.index(t.stem), abs=2)

    again = ag.MUSDBDataset(options({"musdb_root": musdb_root}))
    assert len(decoded) == 15 and again.info() == data.info()
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(again.train, data.train))
    one = ag.MUSDBDataset(options({"musdb_root": musdb_root, "stem": "vocals"}))
    assert len(decoded) == 15 and {t.stem for t in one.train + one.valid + one.test} == {"vocals"}
    assert one.info().tracks == {"train": 1, "valid": 1, "test": 1} and one.info().digest != data.info().digest
    json.dumps(dataclasses.asdict(data.info()), allow_nan=False)


def test_without_ffmpeg_one_line_names_the_remedy_and_the_ways_around(place, no_ffmpeg):
    for name in ("train/a", "train/b", "test/c"):
        (place / "data" / "musdb18" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "data" / "musdb18" / f"{name}.stem.mp4").write_bytes(b"never read")
    with error("apt-get install ffmpeg", "HQ", "--dataset folder", "--dataset synthetic", code=ag.NO_FFMPEG):
        ag.MUSDBDataset(options({}))
    with error("apt-get install ffmpeg", code=ag.NO_FFMPEG):  # asked before anything is downloaded
        ag.download_musdb("sample", place / "elsewhere")
    assert ag.NO_FFMPEG not in (0, 1, 2, ag.NO_NETWORK)


def test_without_ffmpeg_hq_folder_and_synthetic_work(place, no_ffmpeg):
    data = ag.MUSDBDataset(options({"musdb_root": hq_root(place / "hq")}))
    assert data.info().tracks == {"train": 10, "valid": 5, "test": 5}
    for t in data.test:
        assert len(t.audio) == RATE
        assert loudest(t.audio) == pytest.approx(300 + 200 * ag.STEMS.index(t.stem), abs=2)
    ag.FolderDataset(options({"data_root": place / "hq"}))
    ag.SyntheticMUSDBDataset(options({"num_samples": 3}))


def test_package_s_validation_songs_are_taken_where_they_are_there(place):
    listed = "ANiMAL - Rockshow", "Meaxic - Take A Step"
    root = hq_root(place / "hq", ("A", "B", *listed), ("D",), 0.1)
    data = ag.MUSDBDataset(options({"musdb_root": root, "stem": "bass"}))
    assert {t.name for t in data.valid} == set(listed) and {t.name for t in data.train} == {"A", "B"}


def test_remedy_for_missing_songs_is_one_that_helps(place, monkeypatch):
    """The flags that the message names start the download into the folder that the user has named; one that holds
    anything is never added to, so that no download is named then."""
    asked = []
    monkeypatch.setattr(ag, "download_musdb", lambda kind, root: asked.append((kind, root)))
    (place / "empty").mkdir()
    for root in (place / "empty", place / "not yet"):
        with error(f"{root} holds 0 song(s)", "get them with --prepare_data") as caught:
            ag.MUSDBDataset(options({"musdb_root": root}))
        flags = re.search(r"get them with (--\S+(?: [\w-]+)*)", str(caught.value))[1].split()
        assert ag.main([*flags, "--musdb_root", str(root), "--device", "cpu"]) == 1  # nothing came of it here
        assert asked.pop() == ("sample", root)
    hq_root(place / "hq", test=(), seconds=0.1)
    (place / "other" / "train").mkdir(parents=True)
    for name, count in (("hq", 3), ("other", 0)):
        with error(f"{count} song(s)", "add some", "--musdb_root") as caught:
            ag.MUSDBDataset(options({"musdb_root": place / name}))
        assert "--prepare_data" not in str(caught.value)


def test_missing_musdb_is_named(place):
    with error(place / "data" / "musdb18", "0 song(s) in train/", "--musdb_root", "--dataset synthetic"):
        ag.MUSDBDataset(options({}))
    hq_root(place / "hq", test=(), seconds=0.1)
    with error("3 song(s) in train/ and 0 in test/"):
        ag.MUSDBDataset(options({"musdb_root": place / "hq"}))
    hq_root(place / "hq", (), ("A",), 0.1)
    with error("'A' is in train/ and in test/"):
        ag.MUSDBDataset(options({"musdb_root": place / "hq"}))
    shutil.rmtree(place / "hq" / "test" / "A")
    hq_root(place / "hq", (), ("E",), 0.1)
    (place / "hq" / "test" / "E" / "bass.wav").unlink()
    with error("no file", "E/bass.wav"):
        ag.MUSDBDataset(options({"musdb_root": place / "hq"}))


@needs_ffmpeg
@pytest.mark.parametrize("index_first", [False, True])
def test_truncated_stem_file_is_named(musdb_root, stem_file, index_first):
    """With its index at the end such a file has none; with it in front, as published, ffmpeg decodes what is there."""
    path = musdb_root / "train" / "B - two.stem.mp4"
    whole = (moved_index(stem_file, path) if index_first else path).read_bytes()
    for part in (0, 0.3, 0.9):
        path.write_bytes(whole[:int(part * len(whole))])
        with error("B - two.stem.mp4", "can't be read"):
            ag.read_audio(path, stem="vocals")
    with error("B - two.stem.mp4", "can't be read"):
        ag.MUSDBDataset(options({"musdb_root": musdb_root, "stem": "vocals"}))


# --- cache


def test_cache_never_mixes_files_of_one_name_size_and_date(place):
    hq_root(place / "one", seconds=0.2)
    hq_root(place / "two", seconds=0.2)
    for n, path in enumerate(sorted(place.glob("t*/t*/*/vocals.wav"))):
        save(path, tone(0.2, 700 + 100 * n, 44_100, channels=2), 44_100)
    for path in place.glob("*/t*/*/*.wav"):
        os.utime(path, (1, 1))
    ag.MUSDBDataset(options({"musdb_root": place / "one", "stem": "vocals"}))
    two = ag.MUSDBDataset(options({"musdb_root": place / "two", "stem": "vocals"}))
    assert sorted(round(loudest(t.audio), -1) for t in two.train + two.valid + two.test) == [700, 800, 900, 1000]


def test_recording_beyond_full_scale_is_scaled_not_broken(place):
    for n, level in enumerate((30_000.0, 1e30, 0.5)):
        save(place / "in" / f"{n}.wav", tone(1, level=level))
    data = ag.FolderDataset(options({"data_root": place / "in"}))
    peaks = [float(np.abs(t.audio).max()) for t in data.train + data.valid + data.test]
    assert sorted(peaks) == pytest.approx([0.5, 1, 1], rel=1e-3)


# --- folder and synthetic data


def test_folder_is_split_by_file_and_hardly_changes_when_files_are_added(place):
    for n in range(30):
        save(place / "in" / f"{n % 3}" / f"{n}.wav", tone(0.1))
    data = ag.FolderDataset(options({"data_root": place / "in"}))
    parts = [{t.name for t in part} for part in (data.train, data.valid, data.test)]
    assert [len(p) for p in parts] == [24, 3, 3] and len(set.union(*parts)) == 30
    assert data.name == "folder" and data.title == "in"
    again = ag.FolderDataset(options({"data_root": place / "in"}))
    assert again.info() == data.info()
    save(place / "in" / "new.wav", tone(0.1))
    more = ag.FolderDataset(options({"data_root": place / "in"}))
    assert len(parts[2] & {t.name for t in more.test}) >= 2 and more.info().digest != data.info().digest


def test_folder_s_own_split_is_kept(place):
    for name in ("train/a", "train/b", "train/deep/c", "test/d", "test/e", "outside"):
        save(place / "in" / f"{name}.flac", tone(0.1))
    data = ag.FolderDataset(options({"data_root": place / "in"}))
    assert {t.name for t in data.test} == {"test/d.flac", "test/e.flac"}
    assert {t.name for t in data.train + data.valid} == {"train/a.flac", "train/b.flac", "train/deep/c.flac"}


def test_folder_that_will_not_do_is_named(place):
    with error("--data_root", code=2):
        ag.FolderDataset(options({}))
    with error("nowhere is not a folder"):
        ag.FolderDataset(options({"data_root": Path("nowhere")}))
    (place / "in").mkdir()
    with error("holds no audio files", ".wav"):
        ag.FolderDataset(options({"data_root": place / "in"}))
    for name in ("a", "b"):
        save(place / "in" / f"{name}.wav", tone(0.1))
    with error("needed are 2 and 1"):
        ag.FolderDataset(options({"data_root": place / "in"}))
    save(place / "in" / "b.flac", tone(0.1))  # the same song once more
    with error("needed are 2 and 1"):
        ag.FolderDataset(options({"data_root": place / "in"}))
    (place / "in" / "b.flac").unlink()
    save(place / "in" / "c.wav", tone(0.1))
    assert ag.FolderDataset(options({"data_root": place / "in"})).info().tracks == {"train": 1, "valid": 1, "test": 1}
    (place / "in" / "d.wav").write_text("dear diary")
    with error("d.wav", "can't be read"):
        ag.FolderDataset(options({"data_root": place / "in"}))


def test_folder_of_silence_is_named(place):
    for name in "abc":
        save(place / "in" / f"{name}.wav", np.zeros(100, np.float32))
    with error("silent"):
        ag.FolderDataset(options({"data_root": place / "in"}))


def test_extra_files_are_for_training_only_and_never_held_out_ones(place):
    save(place / "more" / "deep" / "x.wav", tone(0.3))
    hq = hq_root(place / "hq", seconds=0.2)
    for data in (ag.MUSDBDataset(options({"musdb_root": hq, "stem": "drums"})),
                 ag.SyntheticMUSDBDataset(options({"num_samples": 3})),
                 ag.FolderDataset(options({"data_root": hq}))):
        data.add(place / "more")
        assert data.train[-1].name == "extra/deep/x.wav" and len(data.train[-1].audio) == 4_800
        assert not [t for t in data.valid + data.test if t.name.startswith("extra")]
        assert data.title.endswith(f" and 1 files of {Path(place.name) / 'more'}")
    for inside in (hq, hq / "test", hq / "train" / "A"):
        with error("--extra_root", "belongs to the dataset"):
            ag.MUSDBDataset(options({"musdb_root": hq})).add(inside)
    with error("--extra_root"):
        data.add(place / "nowhere")


def test_synthetic_clips_are_fixed_different_and_balanced():
    data, again = (ag.SyntheticMUSDBDataset(options({"num_samples": 20})) for _ in range(2))
    assert data.info() == again.info() and data.info().tracks == {"train": 16, "valid": 2, "test": 2}
    tracks = data.train + data.valid + data.test
    for a, b in zip(tracks, again.train + again.valid + again.test):
        assert np.array_equal(a.audio, b.audio) and len(a.audio) == CLIP
        assert 0.01 < np.abs(a.audio).max() <= 0.5
    assert len({t.audio.tobytes() for t in tracks}) == 20
    assert {s: [t.stem for t in tracks].count(s) for s in ag.STEMS} == dict.fromkeys(ag.STEMS, 4)
    more = ag.SyntheticMUSDBDataset(options({"num_samples": 30}))
    assert {t.name: t.audio.tobytes() for t in tracks}.items() <= {
        t.name: t.audio.tobytes() for t in more.train + more.valid + more.test}.items()
    assert {t.stem for t in ag.SyntheticMUSDBDataset(options({"num_samples": 4, "stem": "bass"})).train} == {"bass"}
    assert ag.SyntheticMUSDBDataset(options({"num_samples": 3})).info().tracks == {"train": 1, "valid": 1, "test": 1}


def test_synthetic_notes_are_harmonic():
    """Each beat of `other` is one of three notes from 440 Hz up, with partials at whole multiples."""
    audio = ag.SyntheticMUSDBDataset.clip(4, "other").astype(np.float64)
    notes = 440 * 2 ** (np.array([0, 4, 7]) / 12)
    heard = [loudest(beat) for beat in audio.reshape(4, -1) if np.abs(beat).max() > 0.01]
    assert len(heard) >= 2 and all(np.abs(notes - hertz).min() < 3 for hertz in heard)


# --- clips


def noise(seconds, seed=0, level=0.1):
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)) * level


def same(a, b) -> bool:
    return torch.equal(a.audio, b.audio) and torch.equal(a.frames, b.frames)


def test_crops_depend_on_the_draw_alone():
    tracks = [track(noise(9, n), f"{n}") for n in range(3)]
    a, b, other = (ag.random_crops(tracks, draw(step)) for step in (5, 5, 6))
    assert same(a, b) and not torch.equal(a.audio, other.audio)
    assert a.audio.shape == (8, CLIP) and a.audio.dtype == torch.float32
    assert a.frames.tolist() == [256] * 8 and a.frames.dtype == torch.int64
    assert torch.equal(a.draw.normal(2), b.draw.normal(2))  # what the model draws next is the same, too


@pytest.mark.parametrize("size", [2, 3, 8])
def test_processes_share_the_rows_of_one_batch(size):
    tracks = [track(noise(9, n) * (np.arange(9 * RATE) > 7 * RATE), f"{n}") for n in range(3)]  # much is silent
    whole = ag.random_crops(tracks, draw(2))
    parts = [ag.random_crops(tracks, draw(2, rows=slice(rank, None, size))) for rank in range(size)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.audio, whole.audio[rank::size])
        assert torch.equal(part.draw.normal(3), draw_after(whole, rank, size))


def draw_after(whole, rank, size):
    again = ag.random_crops([track(noise(6))], draw(2))  # draws as many numbers, whatever the tracks
    assert again.draw.total == whole.draw.total
    return again.draw.normal(3)[rank::size]


def test_every_crop_is_a_piece_of_a_track_with_gain_and_polarity():
    ramp = np.geomspace(0.05, 0.8, 8 * RATE)  # its slope is the same everywhere, its level tells the place
    pieces = ag.random_crops([track(ramp)], draw(total=400)).audio.numpy()
    slope = pieces[:, -1] / pieces[:, 0]
    assert np.allclose(slope, ramp[CLIP - 1] / ramp[0], rtol=3e-3)  # float16
    line = np.arange(8 * RATE) % 20_011 / 20_011 - 0.5  # the first jump of a saw tells the place in its period
    line16 = line.astype(np.float16).astype(np.float32)
    starts, gains = [], []
    for row in ag.random_crops([track(line)], draw(total=200)).audio.numpy():
        jumps = np.flatnonzero(np.abs(np.diff(row)) > 0.2 * np.abs(row).max())
        candidates = range((20_010 - jumps[0]) % 20_011, 8 * RATE - CLIP + 1, 20_011)
        assert candidates
        piece = line16[candidates[0]:candidates[0] + CLIP]
        gains.append(float(row @ piece / (piece @ piece)))
        assert np.allclose(row, gains[-1] * piece, atol=1e-6)
        starts.append(candidates[0])
    assert 70 < sum(gain > 0 for gain in gains) < 130
    assert all(10 ** (-12 / 20) - 1e-4 < abs(gain) < 10 ** (3 / 20) + 1e-4 for gain in gains)
    assert np.std(starts) > 4_000 and len(set(starts)) > 190


def test_gain_is_uniform_in_decibels():
    batch = ag.random_crops([track(np.full(CLIP, 0.25))], draw(total=1_500))
    decibels = 20 * torch.log10(batch.audio[:, 0].abs() / 0.25)
    assert -12 <= decibels.min() < -11.8 and 2.8 < decibels.max() <= 3.001
    counts = torch.histc(decibels, 5, -12, 3)
    assert (counts > 240).all() and (counts < 360).all()


def test_crops_never_clip():
    loud = [track(np.sign(noise(6, n)), f"{n}") for n in range(2)]
    batch = ag.random_crops(loud, draw(total=64))
    assert batch.audio.abs().max() <= 1 and batch.audio.abs().amax(1).min() > 0.2


def test_long_tracks_are_drawn_more_often():
    tracks = [track(np.full(CLIP * 3, 0.1)), track(np.full(CLIP // 2, 0.1))]
    batch = ag.random_crops(tracks, draw(total=800))
    short_alone = float((batch.audio[:, -1] == 0).float().mean())
    assert short_alone == pytest.approx(1 / 4 * 1 / 2, abs=0.03)  # a quarter of the length; half are not mixed


def test_silent_places_are_avoided():
    wave = np.zeros(40 * RATE)
    wave[30 * RATE:] = noise(10)
    batch = ag.random_crops([track(wave)], draw(total=500))
    rms = batch.audio.square().mean(1).sqrt()
    silent = float((rms < ag.SILENCE * 10 ** (-12 / 20)).float().mean())
    # a start leaves silence with probability (30 - 5.12) / (40 - 5.12) = 0.713; nine tries in a row: 0.048
    assert 0.02 < silent < 0.08
    half = np.zeros(20 * RATE)
    half[10 * RATE:] = noise(10)
    batch = ag.random_crops([track(half), track(noise(20, 1))], draw(total=500))
    assert (batch.audio.square().mean(1).sqrt() > ag.SILENCE * 10 ** (-12 / 20)).all()


def test_half_of_the_crops_are_mixtures_of_two_tracks():
    low, high = track(tone(8, 400)[:, 0], "low"), track(tone(8, 3_000)[:, 0], "high")
    batch = ag.random_crops([low, high], draw(total=400))
    power = torch.fft.rfft(batch.audio).abs().square()
    parts = torch.stack([power[:, :2 * CLIP // 16].sum(1), power[:, 2 * CLIP // 16:].sum(1)], 1)  # below, above 2 kHz
    both = (parts / parts.sum(1, keepdim=True)).amin(1) > 1e-3
    assert 160 < int(both.sum()) < 240
    alone = ag.random_crops([low], draw(total=50)).audio  # nothing to mix with
    assert all(loudest(row) == pytest.approx(400, abs=1) for row in alone)


def test_padding_is_zero_and_counted():
    for samples, frames in ((1, 1), (320, 1), (321, 2), (16_000, 50), (CLIP - 1, 256), (CLIP, 256), (CLIP + 1, 256)):
        short = track(np.full(samples, 0.25))
        for batch in (ag.random_crops([short], draw(total=2)), ag.clip_batch([(short, 0)], CPU)):
            assert set(batch.frames.tolist()) == {frames}
            assert (batch.audio[:, :min(samples, CLIP)] != 0).all() and (batch.audio[:, samples:] == 0).all()


def test_mixture_of_a_short_and_a_long_track_counts_the_longer():
    tracks = [track(np.full(CLIP, 0.25)), track(np.full(3_200, 0.25))]
    batch = ag.random_crops(tracks, draw(total=200))
    sounding = (batch.audio[:, -1] != 0)
    assert torch.equal(batch.frames, torch.where(sounding, 256, 10))
    assert 0 < int(sounding.sum()) < 200


def test_fixed_clips_follow_each_other_without_overlap():
    lengths = (CLIP * 2 + RATE, CLIP * 2 + RATE - 1, CLIP, 5, CLIP * 3)
    tracks = [track(np.arange(length) % 1_000, f"{n}") for n, length in enumerate(lengths)]
    clips = ag.fixed_clips(tracks)
    starts = {t.name: [s for u, s in clips if u is t] for t in tracks}
    assert starts == {"0": [0, CLIP, 2 * CLIP], "1": [0, CLIP], "2": [0], "3": [0], "4": [0, CLIP, 2 * CLIP]}
    batch = ag.clip_batch(clips, CPU)
    assert batch.draw is None and batch.frames.tolist() == [256, 256, 50, 256, 256, 256, 1, 256, 256, 256]
    for row, (t, start) in zip(batch.audio, clips):
        piece = t.audio[start:start + CLIP].astype(np.float32)
        assert np.array_equal(row[:len(piece)], piece) and (row[len(piece):] == 0).all()
    assert ag.fixed_clips(tracks, 99) == clips
    few = ag.fixed_clips(tracks, 3)
    assert len(few) == 3 and len({t.name for t, _ in few}) == 3 and few == ag.fixed_clips(tracks, 3)


# --- download


def archive(members, path="made.zip", links=()) -> bytes:
    """A zip of name -> bytes; the names in `links` are symbolic links to what their bytes say."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            kind = stat.S_IFLNK if name in links else stat.S_IFREG
            info.create_system, info.external_attr = 3, (kind | 0o644) << 16
            file.writestr(info, content)
    return Path(path).read_bytes()


SONGS = {f"{split}/{name}.stem.mp4": bytes(np.random.default_rng(n).integers(0, 256, 40_000, np.uint8))
         for n, (split, name) in enumerate([("train", "A"), ("train", "B"), ("test", "C")])}


@dataclasses.dataclass
class Served:
    """What the server of a test holds and how it behaves; `asked` records the Range of each request."""
    content: bytes = b""
    cut: list = dataclasses.field(default_factory=list)  # after how many bytes to hang up, one for each request
    ranges: bool = True
    status: list = dataclasses.field(default_factory=list)  # error statuses to answer with, one for each request
    asked: list = dataclasses.field(default_factory=list)


@pytest.fixture
def served(monkeypatch):
    state = Served()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append(self.headers.get("Range"))
            if not self.path.startswith("/mirror/") or state.status:
                self.send_error(state.status.pop(0) if state.status else 404)
                return
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state.ranges else 0
            if start and start >= len(state.content):
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(206 if state.ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            if state.ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            self.end_headers()
            self.wfile.write(body[:state.cut.pop(0)] if state.cut else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("MUSDB_MIRROR", f"http://127.0.0.1:{server.server_port}/mirror")
    monkeypatch.setattr(ag, "need_ffmpeg", lambda _what: None)
    yield state
    server.shutdown()
    server.server_close()


def publish(served, monkeypatch, members=SONGS, **more) -> bytes:
    """Serve this archive and let the script know its size and md5."""
    served.content = archive(members, **more)
    url, _, what = ag.MUSDB_FILES["full"]
    monkeypatch.setitem(ag.MUSDB_FILES, "full", (url, hashlib.md5(served.content).hexdigest(), what))
    return served.content


def assert_songs(root, members=SONGS) -> None:
    found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.stem.mp4")}
    assert found == members
    rest = {p.name for p in root.parent.iterdir()} - {"made.zip"}
    assert rest == {root.name}, "something was left beside the data"


@pytest.mark.parametrize("kind", ["full", "sample"])
def test_download(served, place, monkeypatch, kind, capsys):
    publish(served, monkeypatch, {"README.md": b"hello", "train/._A.stem.mp4": b"rubbish", **SONGS})
    ag.download_musdb(kind, place / "musdb18")
    assert_songs(place / "musdb18")
    assert served.asked == ["bytes=0-"]
    assert not (place / "musdb18" / "README.md").exists()
    ag.download_musdb(kind, place / "musdb18")  # what is there is not fetched again
    assert len(served.asked) == 1
    assert "using what is in" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["full", "sample"])
def test_cut_download_goes_on_where_it_was(served, place, monkeypatch, kind):
    publish(served, monkeypatch)
    served.cut = [50_000, 0, 30_000]
    ag.download_musdb(kind, place / "musdb18")
    assert_songs(place / "musdb18")
    assert served.asked == ["bytes=0-", "bytes=50000-", "bytes=50000-", "bytes=80000-"]


@pytest.mark.parametrize("kind", ["full", "sample"])
def test_next_run_goes_on_where_a_killed_one_was(served, place, monkeypatch, kind):
    content = publish(served, monkeypatch)
    (place / f".musdb18.{kind}.zip.part").write_bytes(content[:70_000])
    ag.download_musdb(kind, place / "musdb18")
    assert_songs(place / "musdb18")
    assert served.asked == ["bytes=70000-"]
    shutil.rmtree(place / "musdb18")
    served.asked.clear()
    (place / f".musdb18.{kind}.zip.part").write_bytes(content)  # killed while it unpacked
    (place / ".musdb18.fresh" / "train").mkdir(parents=True)
    (place / ".musdb18.fresh" / "train" / "half.stem.mp4").write_bytes(b"half")
    ag.download_musdb(kind, place / "musdb18")
    assert_songs(place / "musdb18")
    assert served.asked == [f"bytes={len(content)}-"]


def test_server_without_ranges(served, place, monkeypatch):
    publish(served, monkeypatch)
    served.ranges, served.cut = False, [50_000, 60_000]
    ag.download_musdb("full", place / "musdb18")
    assert_songs(place / "musdb18")
    assert len(served.asked) == 3


def test_server_in_trouble_is_asked_again(served, place, monkeypatch):
    publish(served, monkeypatch)
    served.status = [503, 500, 429]
    ag.download_musdb("full", place / "musdb18")
    assert_songs(place / "musdb18")
    assert len(served.asked) == 4


@pytest.mark.parametrize("kind", ["full", "sample"])
def test_corrupted_download_is_deleted_and_told(served, place, monkeypatch, kind):
    content = publish(served, monkeypatch)
    for wrong in (content[:60_000] + b"!" + content[60_001:], b"<html>no such thing</html>", content[:-1] + b"?"):
        served.content = wrong
        if kind == "sample" and wrong[:-1] == content[:-1]:
            continue  # the last byte of a zip's comment length: no checksum is published that would tell
        with error("damaged", "deleted", "run this again", code=ag.NO_NETWORK):
            ag.download_musdb(kind, place / "musdb18")
        assert {p.name for p in place.iterdir()} == {"made.zip"}
    served.content = content
    ag.download_musdb(kind, place / "musdb18")
    assert_songs(place / "musdb18")


def test_unreachable_server(served, place, monkeypatch):
    publish(served, monkeypatch)
    monkeypatch.setenv("MUSDB_MIRROR", os.environ["MUSDB_MIRROR"].replace("mirror", "elsewhere"))
    with error("can't be downloaded", "404", "--dataset synthetic", "--musdb_root", code=ag.NO_NETWORK):
        ag.download_musdb("sample", place / "musdb18")
    assert len(served.asked) == 1  # asking again is of no use
    monkeypatch.setenv("MUSDB_MIRROR", "http://127.0.0.1:9")
    with error("can't be downloaded", "refused", code=ag.NO_NETWORK):
        ag.download_musdb("sample", place / "musdb18")
    monkeypatch.setenv("MUSDB_MIRROR", "no address")
    with error("can't be downloaded", code=ag.NO_NETWORK):
        ag.download_musdb("sample", place / "musdb18")
    assert not (place / "musdb18").exists()


def test_archive_that_leads_out_of_its_folder_is_kept_inside(served, place, monkeypatch):
    """Whatever its names say, only songs are written, as plain files, into train/ and test/."""
    evil = dict.fromkeys(("../evil.stem.mp4", "/tmp/evil.stem.mp4", "train\\..\\..\\evil", "../../train/link.stem.mp4"),
                         b"../../target")
    publish(served, monkeypatch, {**SONGS, **evil}, links=("../../train/link.stem.mp4",))
    ag.download_musdb("full", place / "deep" / "er" / "musdb18")
    assert_songs(place / "deep" / "er" / "musdb18", {**SONGS, "train/link.stem.mp4": b"../../target"})
    assert not [p for p in place.rglob("*") if "evil" in p.name or p.is_symlink()]


def test_cache_notices_what_is_stale_or_torn(place, decoded):
    given = {"musdb_root": hq_root(place / "hq", seconds=0.5), "stem": "vocals"}
    first = [np.array(t.audio) for t in ag.MUSDBDataset(options(given)).train]
    files = sorted((place / "data" / "cache").iterdir())
    assert len(decoded) == len(files) == 4
    whole = files[1].read_bytes()
    for damaged in (whole[:-2], whole[:100], b"", b"x" * len(whole)):
        files[1].write_bytes(damaged)
        decoded.clear()
        again = ag.MUSDBDataset(options(given))
        assert len(decoded) == 1 and all(np.array_equal(a.audio, b) for a, b in zip(again.train, first))
        assert sorted((place / "data" / "cache").iterdir()) == files and files[1].read_bytes() == whole
    save(place / "hq" / "test" / "D" / "vocals.wav", tone(0.25, 2_000), RATE)
    decoded.clear()
    newer = ag.MUSDBDataset(options(given))
    assert len(decoded) == 1 and loudest(newer.test[0].audio) == pytest.approx(2_000, abs=5)


def test_cache_that_can_not_be_written_costs_one_line(place, capsys):
    (place / "data").mkdir()
    (place / "data" / "cache").write_text("")
    data = ag.MUSDBDataset(options({"musdb_root": hq_root(place / "hq", seconds=0.2)}))
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "cache" in line]
    assert len(lines) == 1 and lines[0].startswith("going on without a cache: ")
    assert data.info().seconds == {"train": 2.0, "valid": 1.0, "test": 1.0}


def test_download_never_stays_cut_for_ever(served, place, monkeypatch):
    publish(served, monkeypatch)
    served.cut = [10_000] + [0] * 50
    with error("cut", "goes on where this one ended", code=ag.NO_NETWORK):
        ag.download_musdb("full", place / "musdb18")
    assert len(served.asked) == 6
    served.cut = []
    ag.download_musdb("full", place / "musdb18")
    assert served.asked[-1] == "bytes=10000-"
    assert_songs(place / "musdb18")


def test_full_set_takes_the_place_of_a_sample_and_of_nothing_else(served, place, monkeypatch):
    root = place / "musdb18"
    publish(served, monkeypatch)
    ag.download_musdb("sample", root)
    other = {name.replace("A", "Z"): content for name, content in SONGS.items()}
    publish(served, monkeypatch, other)
    ag.download_musdb("sample", root)
    assert_songs(root)
    ag.download_musdb("full", root)
    assert_songs(root, other)
    publish(served, monkeypatch)
    for kind in ("sample", "full"):
        ag.download_musdb(kind, root)
        assert_songs(root, other)
    (root / ".downloaded").unlink()  # somebody's own copy
    ag.download_musdb("full", root)
    assert_songs(root, other)


def test_sample_survives_a_full_download_that_fails(served, place, monkeypatch):
    publish(served, monkeypatch)
    ag.download_musdb("sample", place / "musdb18")
    served.content = b"<html>" * 9
    with error("damaged", code=ag.NO_NETWORK):
        ag.download_musdb("full", place / "musdb18")
    assert_songs(place / "musdb18")


def test_download_touches_nobody_s_files(served, place, monkeypatch):
    publish(served, monkeypatch)
    (place / "musdb18").mkdir()
    (place / "musdb18" / "thesis.tex").write_text("ten years")
    with error("other things", "--musdb_root"):
        ag.download_musdb("full", place / "musdb18")
    (place / "file").write_text("")
    with error("other things"):
        ag.download_musdb("full", place / "file")
    assert (place / "musdb18" / "thesis.tex").read_text() == "ten years" and not served.asked


@pytest.mark.parametrize("when", ["while downloading", "while unpacking"])
def test_full_disk(served, place, monkeypatch, when):
    publish(served, monkeypatch)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if when == "while downloading":
            class Full(io.FileIO):
                def write(self, data):
                    raise full
            patch.setattr(ag, "open", Full, raising=False)
        else:
            def copy(_source, _target):
                raise full
            patch.setattr(ag.shutil, "copyfileobj", copy)
        with error("free some space", "--musdb_root"):
            ag.download_musdb("full", place / "musdb18")
    assert not (place / "musdb18").exists() and not (place / ".musdb18.fresh").exists()
    ag.download_musdb("full", place / "musdb18")
    assert_songs(place / "musdb18")


# --- the real data


@pytest.fixture(scope="session")
def real_root():
    if not os.environ.get("MUSDB_ROOT"):
        pytest.skip("needs real MUSDB18 songs: set MUSDB_ROOT to the folder that holds train/ and test/")
    return Path(os.environ["MUSDB_ROOT"]).resolve()


@pytest.mark.real_data
@needs_ffmpeg
def test_real_stems_add_up_to_their_mixture(real_root):
    path = sorted((real_root / "test").glob("*.stem.mp4"))[0]
    stems = [ag.read_audio(path, stem=stem) for stem in ag.STEMS]
    assert len({len(s) for s in stems}) == 1
    mixture, total = stems[0], sum(stems[1:])
    assert 10 * torch.log10(mixture.square().sum() / (mixture - total).square().sum()) > 10  # AAC and mastering


@pytest.mark.real_data
@needs_ffmpeg
def test_real_data_gives_clips_that_sound(real_root):
    data = ag.MUSDBDataset(options({"musdb_root": real_root, "stem": "mixture"}))
    assert not {t.name for t in data.train} & {t.name for t in data.valid + data.test}
    batch = ag.random_crops(data.train, draw(total=16))
    assert torch.isfinite(batch.audio).all() and batch.audio.abs().amax(1).min() > 0.01

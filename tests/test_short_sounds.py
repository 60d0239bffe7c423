"""Sound from noise in audio_gen.py: the short sounds it learns from, the classifier that listens, the diffusion model
that draws, and what is measured of it. Digits here are tones, one pitch each, said by two "speakers" of two timbres."""
import hashlib
import http.server
import io
import json
import math
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import COMMON, SCRIPTS, Script, assert_error, load_explore, load_script, read_json

ag = load_script("audio_gen")
explore = load_explore("audio_gen")
CPU = torch.device("cpu")
AUDIO: Script = next(script for script in SCRIPTS if script.name == "audio_gen")
LENGTH = 6144  # samples of 0.768 s at 8 kHz
TINY = ("--channels", "16", "--levels", "1", "--blocks", "1", "--steps", "2", "--n_mels", "16")


def spoken(digit: int, speaker: int, count: int, rate: int = 8000) -> np.ndarray:
    rng = np.random.default_rng([digit, speaker, count])
    t = np.arange(int(rate * rng.uniform(0.2, 0.4))) / rate
    wave = sum(np.sin(2 * np.pi * 150 * 1.35 ** digit * k * t) / k for k in range(1, 2 + speaker))
    return (0.3 * wave * np.hanning(len(t)) ** 0.3 + 1e-3 * rng.standard_normal(len(t))).astype(np.float32)


def digits_folder(folder: Path, digits=range(10), counts=range(3, 8)) -> Path:
    folder.mkdir(parents=True)
    for digit in digits:
        for speaker, name in enumerate(("anna", "zoe")):
            for count in counts:
                soundfile.write(folder / f"{digit}_{name}_{count}.wav", spoken(digit, speaker, count), 8000)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return digits_folder(tmp_path_factory.mktemp("digits") / "spoken")


@pytest.fixture(scope="module")
def data(digits):
    return ag.load_short(ag.ShortSoundOptions(data_root=digits))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ag, "HERE", tmp_path / "script")
    return tmp_path


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    """A folder with classifier.pt, second.pt (cepstra) and diffusion.pt, each trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ag, "HERE", folder / "script")
        flags = ("--device", "cpu", "--data_root", digits, "--batch_size", "10", "--warmup_steps", "5")
        for name, more in {
                "classifier": ("--model", "classifier", "--width", "16", "--features", "16", "--learning_rate", "4e-3",
                               "--epochs", "24"),
                "second": ("--model", "classifier", "--view", "cepstrum", "--width", "16", "--features", "16",
                           "--learning_rate", "4e-3", "--epochs", "24"),
                "diffusion": ("--model", "diffusion", *TINY, "--epochs", "2", "--classifier", "classifier.pt")}.items():
            AUDIO.ok(*flags, *more, "--checkpoint", f"{name}.pt", "--results_dir", f"{name}_results")
    return folder


# === data ===


def test_own_split_holds_out_recordings_0_to_4(data):
    assert data.classes == list(ag.DIGITS)
    assert len(data.train) == 10 * 2 * 3 and len(data.test) == 10 * 2 * 2
    assert torch.bincount(data.train_labels).tolist() == [6] * 10
    assert data.train.shape[1] == data.test.shape[1] == LENGTH and data.frames == 48 and data.rate == 8000


def test_speaker_split_holds_out_one_speaker(digits, data):
    other = ag.load_short(ag.ShortSoundOptions(data_root=digits, split="speaker"))
    assert "without zoe" in other.title and len(other.train) == len(other.test) == 50
    assert other.info() != data.info()


def test_silence_is_cut_off_loudness_is_one_and_what_is_too_long_fades():
    rate, tone = 8000, torch.sin(torch.arange(2000) * 0.5) * 0.01
    sound, cut_off = ag.short_sound(torch.cat([torch.zeros(3000), tone, torch.zeros(999)]), rate, LENGTH)
    assert not cut_off and sound.dtype == torch.float16 and sound.shape == (LENGTH,)
    heard = sound.float().abs() > 1e-3
    assert heard.nonzero().min() < 128 and heard.nonzero().max() < 2000 + 256
    whole, cut_off = ag.short_sound(0.01 * torch.sin(torch.arange(9000) * 0.5), rate, LENGTH)
    assert cut_off and whole.float().square().mean().sqrt() == pytest.approx(0.1, rel=0.01)
    assert whole[-1].abs() < 1e-3 and whole[-200:-128].float().abs().max() > 0.1
    click = torch.zeros(4000)
    click[::500] = 1.0  # at an RMS of 0.1 it would clip
    assert ag.short_sound(click, rate, LENGTH)[0].float().abs().max() <= 0.9995
    with pytest.raises(ValueError, match="silent"):
        ag.short_sound(torch.zeros(4000), rate, LENGTH)


def test_folder_of_mixed_rates_becomes_one_rate_with_its_split(tmp_path):
    for label, hertz in (("kick", 60), ("hat", 3000)):
        for number, rate in enumerate((8000, 16_000, 22_050, 44_100)):
            (tmp_path / label).mkdir(exist_ok=True)
            soundfile.write(tmp_path / label / f"{number}.wav",
                            0.3 * np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate), rate)
    data = ag.load_short(ag.ShortSoundOptions("folder", tmp_path, seconds=0.5))
    assert data.classes == ["hat", "kick"] and data.rate == 16_000 and data.frames == 32
    assert len(data.train) == 6 and len(data.test) == 2
    for sounds, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        for sound, label in zip(sounds.float(), labels):
            peak = torch.fft.rfft(sound).abs().argmax() * 16_000 / len(sound)
            assert peak.item() == pytest.approx((3000, 60)[label], rel=0.05)
    for split, numbers in (("train", (0, 1)), ("test", (2, 3))):
        for label in ("kick", "hat"):
            target = tmp_path / "own" / split / label
            target.mkdir(parents=True)
            for number in numbers:
                (tmp_path / label / f"{number}.wav").rename(target / f"{number}.wav")
    own = ag.load_short(ag.ShortSoundOptions("folder", tmp_path / "own", seconds=0.5))
    assert len(own.train) == len(own.test) == 4


def test_stems_are_classes():
    data = ag.load_short(ag.ShortSoundOptions("synthetic"))
    assert data.classes == ["bass", "drums", "other", "vocals"] and data.frames == 64
    assert torch.bincount(data.train_labels).min() > 10 and len(data.test) > 10


def test_speech_commands_layout(tmp_path):
    root = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    names = [f"{word}/{speaker}_nohash_0.wav" for word in ("seven", "two", "bed")
             for speaker in ("0a", "0b", "0c", "0d", "0e", "0f")]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, spoken(number % 10, 0, 1, 16_000), 16_000)
    (root / "validation_list.txt").write_text("\n".join(n for n in names if "0a" in n) + "\n")
    (root / "testing_list.txt").write_text("\n".join(n for n in names if "0b" in n or "0c" in n) + "\n")
    data = ag.load_short(ag.ShortSoundOptions("speech_commands", tmp_path))
    assert data.classes == ["two", "seven"] and len(data.train) == 6 and len(data.test) == 4  # no "bed", no validation
    assert data.rate == 16_000 and data.frames == 64


def silent(folder):
    soundfile.write(folder / "a" / "zero.wav", np.zeros(4000), 8000)


def broken(folder):
    (folder / "a" / "broken.wav").write_bytes(b"RIFF....")


def poisoned(folder):
    soundfile.write(folder / "a" / "nan.wav", np.full(4000, np.nan), 8000, subtype="FLOAT")


def lonely(folder):
    (folder / "c").mkdir()
    soundfile.write(folder / "c" / "only.wav", spoken(1, 0, 0), 8000)


@pytest.mark.parametrize("harm, flags, words", [
    (silent, (), ("zero.wav", "silent")),
    (broken, (), ("broken.wav", "can't be read")),
    (poisoned, (), ("nan.wav", "NaN")),
    (lonely, (), ("c has one sound",)),
    (None, ("--sample_rate", "8500"), ("8500", "multiple of 1,000")),
    (None, ("--split", "speaker"), ("spoken_digits",)),
    (None, ("--seconds", "0"), ("out of range",)),
    (None, ("--levels", "5", "--seconds", "0.25"), ("frames can't be halved",)),
    (None, ("--channels", "20"), ("multiple of 16",)),
    (None, ("--crops", "3"), ("belongs to --model",)),
])
def test_bad_data_and_flags_are_one_line(place, harm, flags, words):
    for label in "ab":
        for count in range(4):
            (place / "own" / label).mkdir(parents=True, exist_ok=True)
            soundfile.write(place / "own" / label / f"{count}.wav", spoken(ord(label) % 10, 0, count), 8000)
    if harm:
        harm(place / "own")
    result = AUDIO.call(*COMMON, "--model", "diffusion", "--dataset", "folder", "--data_root", "own", *flags)
    assert_error(result, (1, 2), *words)
    assert not (place / "model.pt").exists()


def test_no_digits_and_one_class_are_told(place):
    assert_error(AUDIO.call(*COMMON, "--model", "diffusion"), 1, "spoken digits", "--prepare_data", "--data_root")
    for count in range(4):
        (place / "own" / "a").mkdir(parents=True, exist_ok=True)
        soundfile.write(place / "own" / "a" / f"{count}.wav", spoken(3, 0, count), 8000)
    flags = ("--dataset", "folder", "--data_root", "own")
    assert_error(AUDIO.call(*COMMON, "--model", "classifier", *flags), 1, "two or more classes")
    AUDIO.ok(*COMMON, "--model", "diffusion", *flags, *TINY, "--epochs", "1")  # without labels it can be drawn
    infer = ("--mode", "infer", *COMMON)
    assert_error(AUDIO.call(*infer, "--label", "a"), 2, "without labels")
    assert_error(AUDIO.call(*infer, "--guidance", "2"), 2, "without labels")
    AUDIO.ok(*infer, "--num_samples", "2")
    assert len(list(Path("results").glob("drawn_0*_sound.wav"))) == 2


# === download ===


@pytest.fixture
def mirror(monkeypatch, digits):
    """A server that hands out an archive of the digits, as GitHub lays it out."""
    def archive(change=lambda name, content: (name, content)) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr("free-spoken-digit-dataset-1.0.10/README.md", "hello")
            for path in sorted(digits.iterdir()):
                name, content = change(f"free-spoken-digit-dataset-1.0.10/recordings/{path.name}", path.read_bytes())
                out.writestr(name, content)
        return buffer.getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append((self.path, self.headers["Range"]))
            body = self.server.content[int(self.headers["Range"][6:-1]):]
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.asked, server.archive = archive(), [], archive
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("SPOKEN_DIGITS_MIRROR", f"http://127.0.0.1:{server.server_port}")
    rows = "".join(f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in sorted(digits.iterdir()))
    monkeypatch.setattr(ag, "SPOKEN_DIGITS", (ag.SPOKEN_DIGITS[0], hashlib.sha256(rows.encode()).hexdigest()))
    yield server
    server.shutdown()
    server.server_close()


def test_digits_are_downloaded_once_and_go_on_where_they_were_cut(place, mirror, digits):
    root = place / "script" / "data" / "spoken_digits"
    root.parent.mkdir(parents=True)
    root.with_name(".spoken_digits.zip.part").write_bytes(mirror.content[:1000])
    AUDIO.ok(*COMMON, "--model", "diffusion", "--prepare_data")
    assert mirror.asked == [("/v1.0.10.zip", "bytes=1000-")]
    assert {p.name: p.read_bytes() for p in root.iterdir()} == {p.name: p.read_bytes() for p in digits.iterdir()}
    assert [p.name for p in root.parent.iterdir()] == ["spoken_digits"]
    AUDIO.ok(*COMMON, "--model", "classifier", "--prepare_data")
    assert len(mirror.asked) == 1


@pytest.mark.parametrize("change", [
    lambda name, content: (name, content[:-1] + b"?"),
    lambda name, content: (name.replace("0_anna_5", "0_anna_9"), content),
    lambda name, content: (name.replace("recordings/", "recordings/../../../evil/"), content),
])
def test_digits_of_other_contents_are_refused(place, mirror, change):
    mirror.content = mirror.archive(change)
    result = AUDIO.call(*COMMON, "--model", "diffusion", "--prepare_data")
    assert_error(result, ag.NO_NETWORK, "damaged", "deleted", "run this again")
    assert not (place / "script" / "data" / "spoken_digits").exists() and not list(place.rglob("evil*"))
    mirror.content = b"<html>"
    assert_error(AUDIO.call(*COMMON, "--model", "diffusion", "--prepare_data"), ag.NO_NETWORK, "damaged")


def test_no_network_says_so(place, monkeypatch):
    monkeypatch.setenv("SPOKEN_DIGITS_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setattr(ag.time, "sleep", lambda _: None)
    result = AUDIO.call(*COMMON, "--model", "diffusion", "--prepare_data")
    assert_error(result, ag.NO_NETWORK, "spoken digits can't be downloaded", "--data_root")
    result = AUDIO.call(*COMMON, "--model", "diffusion", "--dataset", "speech_commands", "--prepare_data")
    assert_error(result, ag.NO_NETWORK, "Speech Commands can't be downloaded", bars=True)


# === models ===


def build(family, data, **options):
    torch.manual_seed(0)
    model = ag.FAMILIES[family](ag.FAMILIES[family].config_class(**options), data.info())
    model.prepare(data, CPU)
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("family, options", [
    ("diffusion", {"channels": 16, "levels": 2, "blocks": 1, "n_mels": 32}), ("classifier", {"width": 8}),
    ("classifier", {"width": 8, "view": "cepstrum"})])
def test_every_parameter_learns_and_one_batch_is_overfitted(data, family, options):
    model = build(family, data, **options)
    optimizer = model.optimizer(model)
    losses, moved = [], set()
    for step in range(60):
        draw = ag.Draw(0, 0 if family == "classifier" else step, 16, slice(None), CPU)
        batch = ag.ShortBatch(data.train[:16].float(), data.train_labels[:16], draw)
        (_, loss, _), = model.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        losses.append(loss.item())
    assert moved == {name for name, _ in model.named_parameters()}
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_picture_has_its_range_and_the_way_back_sounds_alike(data):
    model = build("diffusion", data)
    sounds = data.test[:8].float()
    picture = model.picture(sounds)
    assert picture.shape == (8, 1, 64, 48) and picture.min() == -1 and 0.5 < picture.max() <= 1
    louder = model.picture(sounds * 10 ** (-6 / 20))
    inside = (picture > -0.7) & (picture < 1)
    assert (picture - louder)[inside].mean().item() == pytest.approx(6 / 30, abs=4e-3)  # 60 dB are 2
    again = model.picture(ag.way_back(model, sounds))
    assert (again - picture).square().mean() < 0.02 * (picture - picture.mean()).square().mean()
    quiet = model.sound(torch.full((1, 1, 64, 48), -1.0))
    assert quiet.abs().max() < 1e-3


def test_guidance_of_a_model_that_never_did_without_labels_is_an_error(data):
    model = build("diffusion", data, label_dropout=0.0, steps=1)
    for call in (lambda: model.optimizer(model), lambda: model.sample(torch.arange(1), ag.Noise(0, range(1), CPU))):
        with pytest.raises(ag.UserError, match="guidance of 1.2 needs .* use --guidance 1"):
            call()
    build("diffusion", data, label_dropout=0.0, guidance=1.0).optimizer(model)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sound_i_of_a_seed_is_the_same_in_any_batch(data, guidance):
    model = build("diffusion", data, channels=16, levels=1, blocks=1, steps=3, guidance=guidance).eval()
    torch.nn.init.normal_(model.leave.weight, std=0.1)  # untrained, it would draw noise alone
    labels = torch.arange(10)
    whole, parts = (ag.generate_all(model, labels, 7, batch) for batch in (7, 2))
    torch.testing.assert_close(whole, parts, rtol=0, atol=0.02)  # Griffin-Lim makes much of the last bits
    pictures = [model.sample(labels[:n], ag.Noise(0, range(n), CPU)) for n in (2, 1)]
    torch.testing.assert_close(pictures[0][:1], pictures[1], rtol=0, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1])


def test_cepstra_are_those_of_the_cosine_transform(data):
    from torchaudio.functional import create_dct
    model = build("classifier", data, view="cepstrum", width=8)
    picture = model.picture(data.test[:4].float())
    wanted = create_dct(ag.CEPSTRA, 64, "ortho").T @ picture
    torch.testing.assert_close(model.look(picture), (wanted - model.mean) / model.deviation, rtol=1e-4, atol=1e-4)


# === the command line ===


def wav(path):
    return soundfile.read(path, dtype="int16")


def test_draws_a_file_for_each_label_and_one_in_a_row(place, trained):
    infer = ("--mode", "infer", "--checkpoint", trained / "diffusion.pt", "--results_dir", "results")
    result = AUDIO.ok(*infer, "--label", "1,9,8,4", "--output_dir", "out")
    assert sorted(p.name for p in Path("out").glob("*.wav")) == [
        "drawn_00000_one.wav", "drawn_00001_nine.wav", "drawn_00002_eight.wav", "drawn_00003_four.wav",
        "drawn_in_a_row.wav"]
    sound, rate = wav("out/drawn_00002_eight.wav")
    assert rate == 8000 and len(sound) == LENGTH and "s for a second of sound" in result.out
    assert Path("results/drawn_sounds.png").stat().st_size > 3000
    AUDIO.ok(*infer, "--label", "one,nine,8,four", "--output_dir", "again", "--sample_batch", "1")
    assert np.abs(wav("again/drawn_00002_eight.wav")[0].astype(int) - sound).max() < 100
    AUDIO.ok(*infer, "--seed", "5", "--output_dir", "other")
    assert len(list(Path("other").glob("drawn_0*.wav"))) == 10
    for label in ("11", "one,,two", "Zero"):
        assert_error(AUDIO.call(*infer, "--label", label), 2, "--label", "the classes are zero, one")
    assert_error(AUDIO.call(*infer, "--num_samples", "0"), 2, "out of range")
    assert_error(AUDIO.call(*infer, "--input", "x.wav"), 2, "belongs to")


def test_classifier_names_what_it_hears(place, trained, digits):
    infer = ("--mode", "infer", "--checkpoint", trained / "classifier.pt")
    result = AUDIO.ok(*infer, "--input", digits / "7_anna_5.wav", digits / "2_zoe_6.wav")
    assert [line.split(": ")[1].split()[0] for line in result.out.splitlines()] == ["seven", "two"]
    soundfile.write("quiet.wav", np.zeros(999), 8000)
    assert_error(AUDIO.call(*infer, "--input", "quiet.wav"), 1, "silent")
    assert_error(AUDIO.call(*infer), 2, "--input")


def test_evaluation_stands_between_floor_and_way_back(place, trained, digits):
    flags = ("--mode", "evaluate", "--results_dir", "results", "--checkpoint", trained / "diffusion.pt")
    judges = ("--classifier", trained / "classifier.pt", "--second_classifier", trained / "second.pt")
    AUDIO.ok(*flags, *judges, "--eval_samples", "40")
    report = read_json("results/evaluation.json")
    metrics = report["metrics"]
    for name in ("fd_spoken_digits_cnn", "kernel_distance_spoken_digits_cnn", "is_spoken_digits_cnn",
                 "precision_spoken_digits_cnn", "recall_spoken_digits_cnn", "label_agreement", "class_share_min"):
        assert {"value", "floor", "way_back", "n", "feature_net_sha256"} <= metrics[name].keys(), name
        assert metrics[name]["n"] == 40
    assert metrics["label_agreement"]["floor"] > 0.8 and metrics["label_agreement_second"]["floor"] > 0.5  # chance: 0.1
    assert metrics["fd_spoken_digits_cnn"]["value"] > 2 * metrics["fd_spoken_digits_cnn"]["floor"]  # hardly trained
    assert metrics["near_copies"]["floor"] == pytest.approx(0.025, abs=0.026)
    assert report["network_evaluations"] == 4 and report["seconds_per_second_of_sound"] > 0
    assert_error(AUDIO.call(*flags, *judges, "--split", "speaker"), 2, "was made with --split own")
    assert_error(AUDIO.call(*flags, "--classifier", trained / "diffusion.pt"), 1, "classifier is needed")
    AUDIO.ok("--mode", "evaluate", "--checkpoint", trained / "classifier.pt", "--results_dir", "heard")
    assert read_json("heard/evaluation.json")["metrics"]["val_accuracy"]["value"] > 0.8


def test_checkpoint_of_another_dataset_and_classifier_of_other_sounds_are_refused(place, trained, tmp_path):
    other = digits_folder(tmp_path / "other", range(3))
    flags = ("--mode", "evaluate", "--results_dir", "results", "--checkpoint", trained / "diffusion.pt")
    assert_error(AUDIO.call(*flags, "--data_root", other), 2, "was trained on", "--data_root")
    AUDIO.ok("--model", "classifier", "--data_root", other, "--width", "16", "--features", "16", "--epochs", "1",
             "--checkpoint", "three.pt", "--results_dir", "three")
    assert_error(AUDIO.call(*flags, "--classifier", "three.pt"), 1, "trained with classes", "--classifier")


def test_training_measures_draws_and_says_by_what(trained):
    results = trained / "diffusion_results"
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "epoch" in row][-1]
    assert {"fd_spoken_digits_cnn", "real_fd_spoken_digits_cnn", "label_agreement", "feature_net_sha256"} <= last.keys()
    assert (results / "progress" / "epoch_001.wav").exists() and (results / "drawn_sounds.png").exists()
    rate = soundfile.info(results / "progress" / "epoch_002.wav").samplerate
    assert rate == 8000 and (results / "training_curves.png").exists()


@pytest.mark.parametrize("words, outputs", [
    (("morph", "--label", "3,7", "--num_samples", "3"), ("morph.wav", "morph.png")),
    (("morph", "--label", "3", "--other_seed", "4", "--num_samples", "2"), ("morph.wav", "morph.png")),
    (("denoise", "--label", "7"), ("denoise.wav", "denoise.png"))])
def test_explore_walks_between_sounds_and_from_noise(place, trained, words, outputs):
    flags = ("--checkpoint", str(trained / "diffusion.pt"), "--results_dir", "results")
    assert explore.main([*words, *flags]) == 0
    for name in outputs:
        assert (place / "results" / name).stat().st_size > 1000
    assert soundfile.info(place / "results" / outputs[0]).samplerate == 8000


def test_morph_ends_where_drawing_would(trained, monkeypatch):
    """Its ends are the two classes as they are drawn, and the table of classes is what it was."""
    model = ag.restore_model(ag.load_checkpoint(trained / "diffusion.pt")).eval()
    first = explore.MixedNoise((3, 3), 0.0, CPU).normal(2, 3)
    torch.testing.assert_close(first, ag.Noise(3, [0], CPU).normal(2, 3))
    last = explore.MixedNoise((3, 8), 1.0, CPU).normal(2, 3)
    torch.testing.assert_close(last, ag.Noise(8, [0], CPU).normal(2, 3), rtol=0, atol=1e-6)
    half = explore.MixedNoise((3, 8), 0.5, CPU).normal(100, 100)
    assert half.std().item() == pytest.approx(1, abs=0.03)
    assert math.isfinite(model.top.item())


def test_shipped_weights_say_the_digits_that_are_asked_for(place, monkeypatch):
    """By both shipped classifiers, of 30 sounds."""
    pretrained = Path(ag.__file__).parent / "pretrained"
    if not (pretrained / "audio_diffusion_spoken_digits.pt").exists():
        pytest.skip("no weights are shipped for spoken digits")
    monkeypatch.setattr(ag, "HERE", pretrained.parent)
    model = ag.restore_model(ag.load_checkpoint(ag.SUBJECT.shipped("diffusion"))).eval()
    labels = torch.arange(10)
    sounds = ag.generate_all(model, labels, 30, 30)
    for name in ("spoken_digits", "spoken_digits_cepstrum"):
        net = ag.classifier_net(ag.SUBJECT.shipped("classifier", name), CPU, model.data)
        assert (net(sounds).logits.argmax(1) == labels.repeat(3)).float().mean() > 0.85

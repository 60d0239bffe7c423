"""The machine room, the same in both scripts: trainer, runs, checkpoints, command line; each test runs for both."""
import contextlib
import datetime
import io
import itertools
import math
import os
import pickle
import re
import shutil
import signal
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    COMMON,
    PER_EPOCH,
    SCRIPTS,
    Quiet,
    assert_error,
    assert_same_run,
    differences,
    disk_of,
    files,
    finite,
    forked,
    free_port,
    nearly,
    read,
    records,
    signal_after,
)

EVERY_FAMILY = pytest.mark.parametrize("script, family", [
    pytest.param(script, family, id=f"{script}-{family}") for script in SCRIPTS for family in script.tiny],
    indirect=["script"])
RESUME = ("--resume", "--checkpoint", "model.pt", "--device", "cpu")
STEPS = 2 * PER_EPOCH


@contextlib.contextmanager
def each_step(script, then):
    """Call `then(trainer)` after each step of a training."""
    original = script.module.Trainer.train_step

    def train_step(self):
        original(self)
        then(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.module.Trainer, "train_step", train_step)
        yield


def no_training(script, monkeypatch):
    monkeypatch.setattr(script.module.Trainer, "train_step", lambda self: pytest.fail("training started"))


# === trainer: averages, rates, gradients, records ===


def test_ema_is_the_formula_with_a_growing_memory_for_buffers_too(script):
    seen = []
    with each_step(script, lambda trainer: seen.append(
            {k: v.detach().clone() for k, v in trainer.model.state_dict().items()})):
        script.ok(*script.run(), "--ema_decay", 0.25)
    average = seen[0]
    for n, weights in list(enumerate(seen))[1:]:
        decay = min(0.25, (1 + n) / (10 + n))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in weights.items() if v.is_floating_point()}
    state = read("model.pt")
    for key, expected in average.items():
        torch.testing.assert_close(state["ema"][key], expected, rtol=1e-4, atol=1e-6)
    assert len(seen) == STEPS and differences(state["ema"], state["model"])


def test_learning_rate_warms_up_falls_to_nothing_and_is_what_the_optimizer_gets(script):
    rates = []
    with each_step(script, lambda t: rates.append([g["lr"] for o in t.optimizers.values() for g in o.param_groups])):
        script.ok(*script.run(), "--learning_rate", 0.002, "--warmup_steps", 4)
    config = script.module.FAMILIES[script.family].config_class(learning_rate=0.002, warmup_steps=4, epochs=2)
    factors = [config.rate(step, STEPS) for step in range(STEPS)]
    for found, factor in zip(rates, factors, strict=True):
        assert found == pytest.approx([0.002 * factor] * len(found))
    assert 0 < factors[0] < factors[1] < factors[2] <= 1 and factors[-1] < max(factors) <= 1
    long = [config.rate(step, 1000) for step in range(1000)]
    assert max(long) > 0.99 and 0 <= long[-1] < 0.01 and min(long) >= 0


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_gradients_are_clipped_to_the_norm_that_was_asked_for(script, clip):
    norms = []
    with each_step(script, lambda t: norms.extend(torch.stack(
            [p.grad.norm() for p in player.parameters() if p.grad is not None]).norm().item()
            for player in t.model.players().values())):
        script.ok(*script.run(), "--grad_clip", clip, "--epochs", 1)
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for norm in norms) if clip < 1 else max(norms) > 2e-3


def test_recorded_losses_are_means_over_their_steps(script, monkeypatch):
    family, losses = script.module.FAMILIES[script.family], []
    original = family.losses

    def remembered(self, batch):
        losses.append(0.0)
        for player, loss, stats in original(self, batch):
            losses[-1] += loss.item()  # of all players
            yield player, loss, stats

    monkeypatch.setattr(family, "losses", remembered)
    monkeypatch.setattr(script.module.SUBJECT, "log_every", 2)
    script.ok(*script.run())
    looks = [r for r in records("results") if "epoch" not in r]
    assert [r["step"] for r in looks] == [2, 4, 5, 6, 8, 10]
    for first, line in zip([0, *(r["step"] for r in looks)], looks):
        assert line["loss"] == pytest.approx(np.mean(losses[first:line["step"]]), rel=1e-4)
    for line in records("results"):
        if "epoch" in line:
            span = losses[(line["epoch"] - 1) * PER_EPOCH:line["epoch"] * PER_EPOCH]
            assert line["loss"] == pytest.approx(np.mean(span), rel=1e-4)


@EVERY_FAMILY
def test_checkpoint_and_records_describe_the_run(script, family, reference):
    state = read(reference(family) / "model.pt")  # plain tensors and values: weights_only=True reads it
    assert state["format"] == f"{script}/1" and state["family"] == family and finite(state)
    assert state["history"] == records(reference(family) / "results")
    assert state["step"] == STEPS and state["epoch_done"] == 2 and state["made"]["torch"] == str(torch.__version__)
    assert [r["epoch"] for r in state["history"] if "epoch" in r] == [1, 2]
    assert [r["step"] for r in state["history"]] == sorted(r["step"] for r in state["history"])
    run = state["config"] | state["run"]
    module = script.module
    known = module.flags("train", family).keys() - {"mode", "model", "checkpoint", "device", "resume", "prepare_data"}
    assert known <= run.keys() and run["precision"] == "float32"


def test_training_says_what_it_does_and_where_the_results_are(script, monkeypatch):
    monkeypatch.setattr(script.module.SUBJECT, "log_every", 1)
    result = script.ok(*script.run())
    assert not result.err  # no line for every look
    for word in (script.family, "parameters", "cpu, float32", "epoch 1: loss", "epoch 2: loss", "model.pt", "results"):
        assert word in result.out


def test_progress_in_a_log_file_is_a_line_a_minute(script):
    clock, log = [1000.0], io.StringIO()
    with contextlib.redirect_stderr(log):
        bar = script.module.progress(6000, "epoch 1/1")
        bar._time = lambda: clock[0]
        bar.start_t = bar.last_print_t = clock[0]
        with bar:
            for step in range(6000):
                clock[0] += 0.1
                bar.update(1)
                bar.set_postfix(loss=f"{step}", refresh=False)
        with script.module.progress(100, "short") as short:
            short.update(100)
    lines = [line for line in re.split(r"[\r\n]", log.getvalue()) if line.strip()]
    assert 8 <= len(lines) <= 12 and "loss=" in lines[-1]


# === stopping, killing, resuming ===


@pytest.mark.parametrize("at, number", [(1, signal.SIGINT), (5, signal.SIGTERM), (8, signal.SIGINT)])
def test_stop_signal_saves_at_any_step_and_gives_its_exit_status(script, reference, at, number):
    result = script.stopped(*script.run(), at=at, number=number)
    assert read("model.pt")["step"] == at and "--resume --checkpoint model.pt" in result.out
    script.ok(*RESUME)
    assert_same_run(".", reference())


def test_signal_in_the_last_step_loses_nothing(script, reference):
    """Whether the run still ends as usual or is left to --resume: all of its outputs come to be."""
    with signal_after(script.module, STEPS):
        result = script.call(*script.run())
    assert result.code in (0, 143)
    if result.code:
        script.ok(*RESUME)
    assert_same_run(".", reference())


def test_second_signal_stops_at_once(script, reference):
    with signal_after(script.module, 7, signal.SIGINT, signal.SIGINT):
        assert_error(script.call(*script.run()), 130, "stopped", bars=True)
    assert read("model.pt")["step"] == 6
    script.ok(*RESUME)
    assert_same_run(".", reference())


def test_run_may_be_stopped_again_and_again_in_bfloat16_too(script):
    run = [a if a != "float32" else "bfloat16" for a in script.run()]
    script.ok(*run, "--checkpoint", "whole/model.pt", "--results_dir", "whole/results")
    script.stopped(*run, at=2, number=signal.SIGINT)
    script.stopped(*RESUME, at=6)
    script.stopped(*RESUME, at=9, number=signal.SIGINT)
    script.ok(*RESUME)
    assert read("model.pt")["run"]["precision"] == "bfloat16"
    assert_same_run(".", Path("whole"))


UNUSUAL = {  # where a family has such a flag
    "seed": 7, "ema_decay": 0.5, "grad_clip": 0.3, "weight_decay": 0.2, "learning_rate": 0.003, "warmup_steps": 1,
    "decay_fraction": 0.9, "objective": "noise", "schedule": "cosine", "time_sampling": "uniform", "label_dropout": 0.4,
    "beta": 0.5, "latent_dim": 12, "network": "mlp", "gan_loss": "classic", "speed": 0.2,
    "latent_frames": 32, "kl_warmup": 0.8, "spectral_weight": 0.5, "stem": "bass", "view": "cepstrum"}


@EVERY_FAMILY
def test_resume_is_exact_with_all_options_that_change_numbers(script, family, monkeypatch):
    monkeypatch.setattr(script.module.SUBJECT, "log_every", 4)
    known = script.module.flags("train", family)
    flags = [str(word) for name, value in UNUSUAL.items() if name in known and value in (
        known[name].metadata["choices"] or [value]) for word in (f"--{name}", value)]
    flags += [f"--no-{name}" for name, f in known.items() if f.default is True]
    assert len(flags) > 12
    run = *script.run(family), *flags
    script.ok(*run, "--checkpoint", "whole/model.pt", "--results_dir", "whole/results")
    script.stopped(*run, at=3)
    script.stopped(*RESUME, at=7)
    script.ok(*RESUME)
    assert_same_run(".", Path("whole"))


def die_in_step(script, step: int) -> None:
    original = script.module.Trainer.train_step

    def train_step(self):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self)

    script.module.Trainer.train_step = train_step


def die_in_writing(_script, count: int) -> None:
    replace, writes = os.replace, itertools.count(1)

    def half(source, target):
        if str(target).endswith("model.pt") and next(writes) == count:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = half


@pytest.mark.parametrize("die, at, step", [(die_in_step, 7, 6), (die_in_writing, 2, 2)], ids=["in a step", "writing"])
def test_killed_run_resumes_from_its_last_checkpoint(script, reference, die, at, step):
    """kill -9 when more is recorded than saved, and in the middle of writing; nothing stays locked."""
    def run():
        die(script, at)
        return script.call(*script.run()).code

    script.ok(*script.run(), "--checkpoint", "other.pt", "--epochs", 1)  # `forked` starts with all that is made once
    assert forked(run) == -signal.SIGKILL
    assert read("model.pt")["step"] == step
    if die is die_in_writing:
        assert list(Path().glob(".*.part")), "this test should have left half a file behind"
    script.ok(*script.infer(), "--results_dir", "drawn")
    script.ok(*RESUME)
    shutil.rmtree("results.previous1")
    Path(".other.pt.part").unlink(missing_ok=True)
    assert_same_run(".", reference())


def test_resume_needs_nothing_but_the_checkpoint_from_any_folder(script, monkeypatch):
    """Not even the data folder, where the results are, or what measured."""
    monkeypatch.setattr(Quiet, "remembered", {"feature_net": "toy", "feature_net_sha256": "12ab"})
    run = script.run(data=script.write_data(Path("mine")))
    script.ok(*run, "--checkpoint", "whole/model.pt", "--results_dir", "whole/results")
    script.stopped(*run, at=3)
    checkpoint = Path("model.pt").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    script.ok("--resume", "--checkpoint", checkpoint)
    assert not list(Path().iterdir())
    assert_same_run(checkpoint.parent, checkpoint.parent / "whole")
    assert read(checkpoint)["run"]["feature_net_sha256"] == "12ab"


def test_resume_on_other_data_is_refused(script):
    run = script.run(data=script.write_data(Path("mine")))
    script.stopped(*run, at=3)
    before = Path("model.pt").read_bytes()
    script.write_data(Path("others"))
    for path in list(Path("others").rglob("*.*"))[:2]:
        path.write_bytes(max(Path("others").rglob("*.*")).read_bytes())
    assert_error(script.call(*RESUME, "--data_root", "others"), 1, "other data")
    Path("moved").mkdir()
    shutil.move("mine", "moved/mine")
    assert_error(script.call(*RESUME), (1, 2), "mine")
    assert Path("model.pt").read_bytes() == before
    script.ok(*RESUME, "--data_root", "moved/mine")


def test_resume_after_the_end_takes_more_epochs(script, model_file):
    path = model_file()
    before = path.read_bytes()
    assert_error(script.call(*RESUME), 2, "complete", "--epochs")
    assert path.read_bytes() == before
    script.ok(*RESUME, "--epochs", 3, "--results_dir", "results")
    assert read(path)["step"] == 3 * PER_EPOCH and [r["epoch"] for r in records("results") if "epoch" in r] == [1, 2, 3]


def other_value(field, value):
    """A valid value that is not this one, None where there is none."""
    kind, choices = field.metadata["type"], field.metadata["choices"]
    candidates = choices or ("2", "1", "3", "16", "24", "32", "64", "0.5", "0.25", "0.7", "100", "other")
    for text in candidates:
        with contextlib.suppress(Exception):
            if (kind(text) if kind else text) != value:
                return text
    return None


@EVERY_FAMILY
def test_resume_with_other_options_is_refused_before_loading(script, family, model_file, monkeypatch):
    """Every flag of the family that decides numbers: those of the model, of the data, of what is measured."""
    path = model_file(family)
    before, state, tried = path.read_bytes(), read(path), 0
    monkeypatch.setattr(script.module.SUBJECT, "load", lambda *_: pytest.fail("data were loaded"))
    for name, field in script.module.flags("train", family).items():
        run = state["config"] | state["run"]
        if name in ("epochs", "save_every", "device", "mode", "model", "checkpoint", "resume", "prepare_data") or \
                field.metadata["type"] is Path:
            continue
        assert name in run, f"the checkpoint does not remember {name}"
        if isinstance(field.default, bool):
            flag = [f"--{'no-' * (run[name] and field.default)}{name}"]
        elif (value := other_value(field, run[name])) is None:
            continue
        else:
            flag = [f"--{name}", value]
        result = script.call(*RESUME, "--epochs", 3, *flag)
        assert_error(result, 2, name, "new run")
        tried += 1
    other = next(key for key in script.tiny if key != family)
    assert_error(script.call(*RESUME, "--epochs", 3, "--model", other), 2, family, other)
    assert tried > 10 and path.read_bytes() == before


# === a run is a checkpoint and its results ===


def test_new_runs_set_checkpoint_and_results_of_all_earlier_ones_aside_together(script):
    models, results = [], []
    for seed in range(3):
        result = script.ok(*script.run(), "--seed", seed, "--epochs", 1)
        models.append(Path("model.pt").read_bytes())
        results.append({name: content for name, content in files("results").items() if name != "mine.txt"})
        assert read("model.pt")["config"]["seed"] == seed
        assert not seed or all(f"{name}.previous{seed}" in result.out for name in ("model", "results"))
        Path("results/mine.txt").write_text("mine")  # stays where it is
    assert len(set(models)) == 3 and results[0]["metrics.jsonl"] != results[1]["metrics.jsonl"]
    for n in (1, 2):
        assert Path(f"model.previous{n}.pt").read_bytes() == models[n - 1]
        assert files(f"results.previous{n}") == results[n - 1]
    assert script.module.load_checkpoint(Path("model.previous1.pt"))["config"]["seed"] == 0


def test_results_may_go_into_the_folder_where_one_stands(script):
    for _ in range(2):
        script.ok(*script.run(), "--epochs", 1, "--results_dir", ".")
    aside = Path(f"{Path().resolve()}.previous1")
    assert len([path for folder in (Path(), aside) for path in folder.rglob("metrics.jsonl")]) == 2


@pytest.mark.parametrize("how", ["diverges", "stopped twice", "killed"])
def test_run_that_ends_before_its_first_checkpoint_leaves_the_last_one_untouched(script, model_file, monkeypatch, how):
    path = model_file()
    before = path.read_bytes(), files("results")
    run = *script.run(), "--seed", 5, "--save_every", 100
    if how == "diverges":
        poison(script, monkeypatch, math.nan, 1)
        assert_error(script.call(*run), 1, "diverged", "an earlier one is untouched", bars=True)
    elif how == "stopped twice":
        with signal_after(script.module, 2, signal.SIGTERM, signal.SIGTERM):
            assert script.call(*run).code == 130
    else:
        def killed():
            die_in_step(script, 2)
            return script.call(*run).code
        assert forked(killed) == -signal.SIGKILL
    assert (path.read_bytes(), files("results")) == before and not list(Path().glob("*.previous*"))


def test_resume_moves_nothing_aside(script, model_file):
    model_file()
    script.ok(*RESUME, "--epochs", 3, "--results_dir", "results")
    assert not list(Path().glob("*.previous*"))
    script.stopped(*script.run(), "--seed", 1, at=1)
    assert Path("model.previous1.pt").exists()
    script.ok(*RESUME)
    assert not Path("model.previous2.pt").exists() and not Path("results.previous2").exists()


@pytest.mark.parametrize("flags", [("--checkpoint", "other.pt"), ("--results_dir", "other"), ()],
                         ids=["same results", "same checkpoint", "both"])
def test_second_training_on_the_same_run_is_refused_and_the_first_goes_on(script, reference, flags):
    second = []

    def start(trainer):
        if trainer.step == 3:
            second.append(script.call(*script.run(), *flags))

    with each_step(script, start):
        script.ok(*script.run())
    assert_error(second[0], 1, "another training")
    assert not Path("other.pt").exists()
    assert_same_run(".", reference())


def test_stand_in_model_gives_way_to_the_shipped_one_and_this_is_said(script, reference):
    module, state = script.module, read(reference() / "model.pt")
    subject, models = module.SUBJECT, module.HERE / "models"
    trained = models / module.FAMILIES[script.family].file_name(module.restore_model(state).data)
    trained.parent.mkdir(parents=True)
    shutil.copy(reference() / "model.pt", trained)
    infer = "--mode", "infer", "--device", "cpu", "--model", script.family, *script.drawing
    assert f"this takes {trained}" in script.ok(*infer).out  # nothing is shipped
    shipped = subject.shipped(script.family, subject.dataset)
    shipped.parent.mkdir(parents=True)
    real = state | {"data": state["data"] | {"dataset": subject.dataset}}
    torch.save(real, shipped)
    result = script.ok(*infer)
    assert "stand-in" in result.out and f"--checkpoint {trained}" in result.out
    torch.save(real, trained)
    result = script.ok(*infer)
    assert f"this takes {trained}; --checkpoint {shipped} takes the shipped weights" in result.out
    trained.unlink()
    assert "this takes" not in script.ok(*infer).out


def test_without_any_model_inference_says_how_to_get_one(script):
    for mode in ("infer", "evaluate"):
        assert_error(script.call("--mode", mode), 1, "--mode train", "--checkpoint")
    assert_error(script.call("--resume"), 1, "--mode train", "--checkpoint")


# === divergence, full disks, memory, streams ===


def poison(script, monkeypatch, factor: float, after: int) -> None:
    family, calls = script.module.FAMILIES[script.family], itertools.count(1)
    original = family.losses

    def losses(self, batch):
        bad = next(calls) > after
        for player, loss, stats in original(self, batch):
            yield player, loss * factor if bad else loss, stats

    monkeypatch.setattr(family, "losses", losses)


@pytest.mark.parametrize("log_every, after, factor, kept, words", [
    (100, 7, math.nan, 6, "weights are no longer finite"), (1, 6, math.nan, 6, "the loss is nan"),
    (100, 1, math.inf, None, "diverged"), (1, 6, 1e6, 6, "the loss rose")])
def test_divergence_is_one_error_and_the_last_good_checkpoint_stays(
        script, monkeypatch, reference, log_every, after, factor, kept, words):
    with monkeypatch.context() as patch:
        patch.setattr(script.module.SUBJECT, "log_every", log_every)
        poison(script, patch, factor, after)
        assert_error(script.call(*script.run()), 1, "diverged at step", words, "--learning_rate", bars=True)
    assert not list(Path().rglob("*.part")) and Path("model.pt").exists() == (kept is not None)
    if kept:
        assert read("model.pt")["step"] == kept and finite(read("model.pt")) and records("results")
    if kept and log_every == 100:
        script.ok(*RESUME)
        assert_same_run(".", reference())


def test_gigantic_rate_never_leaves_a_useless_checkpoint(script, model_file):
    before = model_file().read_bytes()
    result = script.call(*script.run(), "--learning_rate", 1e30, "--warmup_steps", 0, "--seed", 1)
    if result.code:
        assert_error(result, 1, "diverged", "--learning_rate", bars=True)
    assert any(path.read_bytes() == before for path in Path().glob("*.pt")) and finite(read("model.pt"))
    records("results")  # strict JSON: no NaN


def test_full_disk_keeps_the_last_checkpoint(script, reference):
    """The disk is full from step 5 on; space comes back, and the run goes on as if nothing had been."""
    with contextlib.ExitStack() as limits, each_step(
            script, lambda trainer: trainer.step == 5 and limits.enter_context(disk_of(20_000))):
        result = script.call(*script.run())
    assert_error(result, 1, "can't write", "model.pt", "space", bars=True)
    assert read("model.pt")["step"] == 4 and not list(Path().rglob("*.part"))
    script.ok(*RESUME)
    assert_same_run(".", reference())


def test_full_disk_while_recording_loses_nothing(script, reference, monkeypatch):
    """A line of metrics.jsonl that is cut in the middle is written again."""
    original = script.module.Trainer.record

    def record(self, **values):
        size = Path("results/metrics.jsonl").stat().st_size if self.step == 10 else 1e9
        with disk_of(int(size) + 20):
            original(self, **values)

    with monkeypatch.context() as patch:
        patch.setattr(script.module.Trainer, "record", record)
        assert_error(script.call(*script.run()), 1, "File too large", bars=True)
    assert read("model.pt")["step"] == 8 and not Path("results/metrics.jsonl").read_text().endswith("\n")
    script.ok(*RESUME)
    assert_same_run(".", reference())


@pytest.mark.parametrize("take", [lambda *_: torch.empty(1 << 58), lambda *_: np.empty(1 << 58)], ids=["torch", "np"])
def test_memory_that_is_not_enough_is_one_error_with_a_remedy(script, take, model_file, monkeypatch):
    """What torch and numpy really say when there is none: neither is torch.OutOfMemoryError."""
    model_file()
    monkeypatch.setattr(script.module.Command, "model", take)
    assert_error(script.call(*script.infer()), 1, "out of memory", "less data")
    monkeypatch.setattr(script.module.Trainer, "train_step", take)
    assert_error(script.call(*script.run()), 1, "out of memory", "--batch_size", bars=True)


def test_memory_of_the_gpu_names_the_cpu_and_other_errors_stay_what_they_are(script, monkeypatch):
    def fail(kind, text):
        def losses(self, batch):
            raise kind(text)
        return losses

    family = script.module.FAMILIES[script.family]
    monkeypatch.setattr(family, "losses", fail(torch.OutOfMemoryError, "CUDA out of memory"))
    assert_error(script.call(*script.run()), 1, "out of memory", "--batch_size", "--device cpu", bars=True)
    monkeypatch.setattr(family, "losses", fail(RuntimeError, "shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        script.call(*script.run())


@pytest.mark.parametrize("numbers", [(1,), (1, 2)], ids=["stdout", "stdout and stderr"])
def test_reader_that_goes_away_does_not_end_a_training(script, reference, numbers):
    """`./train.sh | head -1`, `./train.sh 2>&1 | head -1`"""
    def run():
        gone, pipe = os.pipe()
        os.close(gone)
        for number, name in zip(numbers, ("stdout", "stderr")):
            os.dup2(pipe, number)
            setattr(sys, name, open(number, "w"))  # noqa: SIM115
        return script.module.main(script.run())

    whole = reference()  # made before the copy of this process, which is faster for it
    assert forked(run) == 0
    assert_same_run(".", whole)


@pytest.mark.parametrize("arguments", ["infer", "help"])
def test_reader_that_has_gone_ends_the_program_quietly(script, model_file, python, tmp_path, arguments):
    """`... | head -1`"""
    model_file()
    gone, pipe = os.pipe()
    os.close(gone)
    process = python(script.driver(tmp_path), *(script.infer() if arguments == "infer" else ["--help"]), cwd=tmp_path,
                     stdout=pipe)
    os.close(pipe)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == ""


def test_terminal_that_knows_ascii_only_is_enough(script, model_file, monkeypatch):
    shutil.copy(model_file(), "m\u00fc\u2192.pt")
    for flags, code in ((script.infer(), 0), (("--mode", "infer", "--checkpoint", "gone\u2192.pt"), 1)):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert script.module.main([*flags, *(("--checkpoint", "m\u00fc\u2192.pt") if code == 0 else ())]) == code
    assert b"gone\\u2192.pt" in err.buffer.getvalue()


# === hostile checkpoints ===


class Payload:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return (open, (str(Path("pwned").absolute()), "w"))


def resaved(change, **how):
    return lambda path, state: torch.save(change(state), path, **how)


def foreign_zip(path, state):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metrics.jsonl", "{}")


def folder(path, state):
    path.unlink()
    path.mkdir()


def not_finite(state):
    name = next(name for name, value in state["ema"].items() if value.is_floating_point())
    return state | {"ema": state["ema"] | {name: state["ema"][name] * math.nan}}


HOSTILE = {  # what is done to a whole checkpoint, and a word of the error message
    "missing": (lambda path, state: path.unlink(), "--mode train"),
    "truncated": (lambda path, state: os.truncate(path, path.stat().st_size - 5000), "train again"),
    "cut early": (lambda path, state: os.truncate(path, 1000), "train again"),
    "empty": (lambda path, state: os.truncate(path, 0), "train again"),
    "text": (lambda path, state: path.write_text("these are not the weights\n" * 50), "no checkpoint"),
    "folder": (folder, "Is a directory"),
    "foreign zip": (foreign_zip, "--checkpoint"),
    "empty dict": (resaved(lambda state: {}), "not written by this script"),
    "weights only": (resaved(lambda state: state["ema"]), "not written by this script"),
    "list": (resaved(lambda state: [1, 2]), "not written by this script"),
    "pickled object": (resaved(lambda state: state | {"payload": Payload()}), "could run code"),
    "plain pickle": (lambda path, state: path.write_bytes(pickle.dumps(Payload())), "--checkpoint"),
    "old pickle": (resaved(lambda state: {"p": Payload()}, _use_new_zipfile_serialization=False), "--checkpoint"),
    "other version": (resaved(lambda state: state | {"format": "audio_gen/0"}), "audio_gen/0"),
    "other script": (resaved(lambda state: state | {"format": "image_gen/1audio_gen/1".replace(state["format"], "")}),
                     "this script reads"),
    "odd version": (resaved(lambda state: state | {"format": [7]}), "format"),
    "unknown family": (resaved(lambda state: state | {"family": "flow"}), "flow"),
    "odd family": (resaved(lambda state: state | {"family": ["vae"]}), "lacks its family"),
    "not a number": (resaved(not_finite), "not finite"),
    "no data": (resaved(lambda state: state | {"data": {}}), "description"),
    "data of another kind": (resaved(lambda state: state | {"data": [1]}), "lacks its data"),
    "no weights": (resaved(lambda state: state | {"ema": {}}), "description"),
    "words as weights": (resaved(lambda state: state | {"ema": dict.fromkeys(state["ema"], "x")}), "description"),
    "config of another kind": (resaved(lambda state: state | {"config": 5}), "lacks its config"),
    "run of another kind": (resaved(lambda state: state | {"run": None}), "lacks its run"),
    "other size": (resaved(lambda state: state | {"config": dict.fromkeys(state["config"], 8)}), "description"),
    **{f"no {key}": (resaved(lambda state, key=key: {k: v for k, v in state.items() if k != key}), f"lacks its {key}")
       for key in ("family", "config", "data", "ema", "history", "made")},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoint_is_one_error_and_never_run(script, model_file, kind):
    path, (spoil, word) = model_file(), HOSTILE[kind]
    spoil(path, read(path))
    for command in (script.infer(), script.evaluate(), RESUME):
        assert_error(script.call(*command), 1, "model.pt", word)
    assert not Path("pwned").exists()


def test_checkpoint_that_lacks_or_garbles_a_part_never_ends_in_a_traceback(script, model_file):
    state = read(model_file())
    broken = [(f"no {key}", {k: v for k, v in state.items() if k != key}) for key in state
              if f"no {key}" not in HOSTILE]
    broken += [(f"{key} {value}", state | {key: value}) for key in state.keys() - {"format"}
               for value in (None, {"model": 5})]
    for what, wrong in broken:
        torch.save(wrong, "model.pt")
        for command in (script.infer(), (*RESUME, "--epochs", 3, "--results_dir", "results")):
            if "--resume" not in command and not {"ema", "config", "data", "history"} & set(what.split()[:2]):
                continue  # inference takes nothing else
            try:
                with signal_after(script.module, STEPS + 1):
                    result = script.call(*command)
            except Exception as error:
                raise AssertionError(f"{what}: {command} ended in {error!r}") from error
            if result.code not in (0, 143):
                assert_error(result, (1, 2, 3))  # 3: without its own the data set would be the default one


def test_flipped_byte_is_found_by_the_checksums(script, model_file):
    """Anywhere in what is stored; elsewhere (names, padding) it is found, or changes nothing."""
    path, module = model_file(), script.module
    content, state = path.read_bytes(), read(path)
    with zipfile.ZipFile(path) as archive:
        largest = sorted(archive.infolist(), key=lambda entry: -entry.file_size)[:4]
    stored = []  # first, middle and last byte of these, which stand behind a header, its name and some padding
    for entry in largest:
        lengths = np.frombuffer(content, "<u2", 2, entry.header_offset + 26)
        start = entry.header_offset + 30 + int(lengths.sum())
        stored += [start, start + entry.file_size // 2, start + entry.file_size - 1]
    rng = np.random.default_rng(0)
    for position in [*stored, *rng.integers(len(content), size=40)]:
        damaged = bytearray(content)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        try:
            found = module.load_checkpoint(path)
        except module.UserError as error:
            assert "model.pt" in str(error)
        else:
            assert position not in stored and differences(found, state) == []
    for length in rng.integers(len(content), size=20):  # cut anywhere, with an end that is noise
        path.write_bytes(content[:length] + rng.bytes(30))
        with pytest.raises(module.UserError, match="model.pt"):
            module.load_checkpoint(path)
    path.write_bytes(content[:stored[0]] + bytes([content[stored[0]] ^ 1]) + content[stored[0] + 1:])
    assert_error(script.call(*script.infer()), 1, "checksum", "train again")


def test_field_that_a_newer_script_dropped_does_not_stop_an_old_file(script, model_file):
    path = model_file()
    state = read(path)
    torch.save(state | {"config": state["config"] | {"dropped": 1}, "data": state["data"] | {"dropped": 1},
                        "dropped": 3, "run": state["run"] | {"dropped": 2}}, path)
    script.ok(*script.infer())
    script.ok(*RESUME, "--epochs", 3, "--results_dir", "results")


# === exports ===


def test_export_is_small_and_can_be_used_but_not_continued(script, model_file):
    whole = model_file()
    script.ok(*script.infer(), "--export", "slim.pt")
    slim, state = read("slim.pt"), read(whole)
    assert Path("slim.pt").stat().st_size < whole.stat().st_size / 3
    assert not {"optimizers", "model", "run"} & slim.keys() and slim["made"] == state["made"]
    weights = dict(script.module.restore_model(state).named_parameters())
    assert {value.dtype for name, value in slim["ema"].items() if name in weights} == {torch.float16}
    assert [r["epoch"] for r in slim["history"]] == [2]
    script.ok(*script.infer(), "--checkpoint", "slim.pt", "--export", "slim.pt")  # an export may be replaced
    assert_error(script.call(*script.infer(), "--export", "model.pt"), (1, 2), "--export", "another file")
    assert_error(script.call("--resume", "--epochs", 9, "--checkpoint", "slim.pt"), (1, 2), "shipped weights")


@pytest.mark.parametrize("kind", ["itself", "absolute", "another way", "link", "link to nothing", "text", "folder"])
def test_export_replaces_nothing_but_an_earlier_export(script, model_file, kind):
    path = model_file()
    before = path.read_bytes()
    Path("folder").mkdir()
    Path("link.pt").symlink_to("model.pt")
    Path("lost.pt").symlink_to("nothing.pt")
    Path("notes.txt").write_text("mine")
    target = {"itself": "model.pt", "absolute": path, "another way": "folder/../model.pt", "link": "link.pt",
              "link to nothing": "lost.pt", "text": "notes.txt", "folder": "folder"}[kind]
    state, module = script.module.load_checkpoint(path), script.module
    with pytest.raises(module.UserError, match="--export.*another file"):
        module.export_model(module.restore_model(state), state, Path(target))
    assert path.read_bytes() == before and Path("link.pt").is_symlink() and Path("notes.txt").read_text() == "mine"


def test_full_disk_keeps_the_earlier_export(script, model_file):
    module, state = script.module, script.module.load_checkpoint(model_file())
    module.export_model(module.restore_model(state), state, Path("new.pt"))
    before = Path("new.pt").read_bytes()
    with disk_of(2000), pytest.raises(module.UserError, match="can't write"):
        module.export_model(module.restore_model(state), state, Path("new.pt"))
    assert Path("new.pt").read_bytes() == before


# === places that can't be written ===


@pytest.mark.parametrize("flag", ["--results_dir", "--checkpoint"])
@pytest.mark.parametrize("place", ["file/below/x", "/proc/nothing/x", "file"])
def test_place_that_can_not_be_written_is_found_before_training(script, model_file, monkeypatch, flag, place):
    path = model_file()
    before = path.read_bytes()
    Path("file").write_text("in the way")
    no_training(script, monkeypatch)
    commands = [script.run()] + [script.infer(), (*RESUME, "--epochs", 3)] * (flag == "--results_dir")
    for command in commands if (flag, place) != ("--checkpoint", "file") else ():
        assert_error(script.call(*command, flag, place), 1, place.removesuffix("/x"))
    assert Path("file").read_text() == "in the way" and path.read_bytes() == before


def test_folder_in_the_place_of_the_new_checkpoint_is_an_error_and_stays(script, monkeypatch):
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear diary")
    no_training(script, monkeypatch)
    assert_error(script.call(*script.run(), "--checkpoint", "mine"), 1, "mine", "folder")
    assert Path("mine/diary.txt").read_text() == "dear diary"


# === wrong use of the command line ===

USAGE = [  # of both scripts; those of one alone are in its own tests
    (("--epochs", "0"), "--epochs"), (("--epochs", "-3"), "--epochs"), (("--epochs", "1.5"), "--epochs"),
    (("--epochs", "many"), "--epochs"), (("--epochs", ""), "--epochs"), (("--epochs",), "--epochs"),
    (("--epochs", "9" * 400), "--epochs"), (("--batch_size", "0"), "--batch_size"),
    (("--learning_rate", "-0.001"), "--learning_rate"), (("--learning_rate", "0"), "above 0"),
    (("--learning_rate", "nan"), "--learning_rate"), (("--learning_rate", "inf"), "--learning_rate"),
    (("--ema_decay", "1.5"), "--ema_decay"), (("--seed", "-1"), "--seed"), (("--seed", "9" * 23), "--seed"),
    (("--mode", "draw"), "infer"), (("--model", "flow"), "vae"), (("--dataset", "imagenet"), "folder"),
    (("--device", "gpu"), "cuda:N"), (("--device", "cuda:x"), "cuda:N"), (("--device", "cuda:\u00b2"), "cuda:N"),
    (("--device", ""), "cuda:N"), (("--precision", "float16"), "bfloat16"),
    (("--epoch", "3"), "did you mean --epochs"), (("--learning-rate", "1"), "did you mean --learning_rate"),
    (("--nonsense",), "--nonsense"), (("--nonsense=3",), "--nonsense"), (("stray",), "stray"), (("-x",), "-x"),
    (("--export", "x.pt"), "--mode infer"), (("--output_dir", "x"), "--mode infer"), (("--resume=1",), "--resume"),
    (("--no\nsuch", "1"), "--no such"), (("--seed", "1\u2028x"), "--seed"),
]


@pytest.mark.parametrize("flags, word", USAGE, ids=lambda value: " ".join(value)[:30] if type(value) is tuple else "")
def test_wrong_flag_is_a_usage_error(script, flags, word, monkeypatch):
    no_training(script, monkeypatch)
    result = script.call(*COMMON, *script.data, *flags)
    assert_error(result, 2, word)
    assert len(result.err.splitlines()) == 1 and not Path("model.pt").exists()


@EVERY_FAMILY
def test_each_mode_and_family_has_its_own_flags_alone(script, family, model_file, monkeypatch):
    """A flag of another is an unknown one, and the message names whose it is."""
    state = read(model_file(family))
    monkeypatch.setattr(script.module, "load_checkpoint", lambda path: state)
    no_training(script, monkeypatch)
    flags, modes = script.module.flags, script.module.MODES
    for mode in modes:
        own, start = flags(mode, family), ("--mode", mode, "--device", "cpu", *(
            ("--model", family) if mode == "train" else ("--checkpoint", "model.pt")))
        foreign = {name: (m, key) for m in modes for key in script.module.FAMILIES for name in flags(m, key)
                   if name not in own}
        for name in foreign:
            owners = {key for key in script.module.FAMILIES if name in flags(mode, key)}
            m, key = foreign[name]
            result = script.call(*start, f"--{name}" + "=1" * (not isinstance(flags(m, key)[name].default, bool)))
            assert_error(result, 2, f"--{name}", *owners or {m for m in modes for key in script.module.FAMILIES
                                                             if name in flags(m, key)})
    trained = {f.name for f in script.module.dataclasses.fields(script.module.FAMILIES[family].config_class)
               if f.metadata["group"] in ("optimisation", "model")}
    for mode in ("infer", "evaluate"):
        assert not trained & flags(mode, family).keys()


@EVERY_FAMILY
def test_help_shows_every_flag_with_its_default_for_each_mode(script, family):
    for mode, fields in ((mode, script.module.flags(mode, family)) for mode in script.module.MODES):
        result = script.ok("--mode", mode, "--model", family, "--help")
        text = " ".join(result.out.split())
        assert "%(" not in text and "None)" not in text and not result.err
        for name, field in fields.items():
            assert re.search(rf"--{name}\b", text) and field.metadata["help"].strip(), name
            if field.default is not None and not isinstance(field.default, bool):
                assert f"(default: {field.default})" in text, name
    assert script.ok("-h").out.startswith("usage:")


def test_option_starts_with_its_script_alone_in_a_second(script, python, tmp_path):
    """What is slow to import is imported where it is used: not for --help and usage errors."""
    code = f"import sys; sys.path.insert(0, {str(script.path.parent)!r}); import {script}; " \
        "print([m for m in ('matplotlib', 'sklearn', 'torchmetrics', 'scipy', 'pandas') if m in sys.modules])"
    out, err = python("-c", code, cwd=tmp_path).communicate(timeout=120)
    assert out.strip() == "[]", err


# === variables of the wrappers ===


@EVERY_FAMILY
def test_every_flag_has_its_variable(script, family, monkeypatch):
    monkeypatch.setenv("FLAGS_FROM_ENVIRONMENT", "1")
    for mode in script.module.MODES:
        known = script.module.flags(mode, family)
        for name, field in known.items():
            if name == "mode":
                continue
            value = ("0" if field.default is True else "1") if isinstance(field.default, bool) else "value"
            with monkeypatch.context() as patch:
                patch.setenv(name.upper(), value)
                words = script.module.environment({name: field})
                parser = script.module.Parser([field])
            assert words and words[0].split("=")[0] == f"--{'no-' * (value == '0')}{name}"
            if field.metadata["type"] in (str, Path, None) and not field.metadata["choices"]:
                parser.parse_args(words)


def test_variables_count_only_for_the_wrappers_and_flags_win_over_them(script, monkeypatch):
    monkeypatch.delenv("MUSDB_ROOT", raising=False)  # which .ci/run sets, and which is a flag's name as well
    monkeypatch.setenv("SEED", "3")
    script.ok(*script.run(), "--epochs", 1)
    assert read("model.pt")["config"]["seed"] == 0
    monkeypatch.setenv("FLAGS_FROM_ENVIRONMENT", "1")
    monkeypatch.setenv("MODEL", script.family)
    monkeypatch.setenv("EPOCHS", "")  # as good as not set
    script.ok(*script.run(), "--epochs", 1)
    assert read("model.pt")["config"]["seed"] == 3
    script.ok(*script.run(), "--epochs", 1, "--seed", 4)
    assert read("model.pt")["config"]["seed"] == 4
    monkeypatch.setenv("BATCH_SIZE", "none")
    assert_error(script.call("--dataset", script.data[1]), 2, "--batch_size")


@pytest.mark.parametrize("value, on", [("1", True), ("yes", True), ("true", True), ("0", False), ("no", False),
                                       ("False", False), ("", False)])
def test_variable_of_a_switch_may_say_no(script, model_file, monkeypatch, value, on):
    model_file()
    monkeypatch.setenv("FLAGS_FROM_ENVIRONMENT", "1")
    monkeypatch.setenv("RESUME", value)
    command = script.module.read_command(["--checkpoint", "model.pt", "--model", script.family])
    assert command.given.get("resume", False) is on and (command.state is not None) is on
    switches = {n: f for key in script.module.FAMILIES for n, f in script.module.flags("train", key).items()
                if isinstance(f.default, bool)}
    for name, field in switches.items():
        with monkeypatch.context() as patch:
            patch.setenv(name.upper(), value)
            given = vars(script.module.Parser([field]).parse_args(script.module.environment({name: field})))
        assert given.get(name, field.default) is (on if value else field.default), name


def test_variable_may_hold_several_files(script, monkeypatch):
    module = script.module
    several = {"inputs": module.dataclasses.field(metadata={"nargs": "+"}, default=None)}
    Path("my song.wav").touch()
    monkeypatch.setenv("FLAGS_FROM_ENVIRONMENT", "1")
    for value, words in {"my song.wav": ["--inputs=my song.wav"], "a.wav b.wav": ["--inputs", "a.wav", "b.wav"],
                         "'my song.wav' b.wav": ["--inputs", "my song.wav", "b.wav"], "don't": ["--inputs", "don't"],
                         " ".join(["x" * 90] * 9): ["--inputs", *["x" * 90] * 9]}.items():
        monkeypatch.setenv("INPUTS", value)
        assert module.environment(several) == words


def test_misspelt_variable_is_said_and_others_are_not(script, monkeypatch):
    monkeypatch.setenv("FLAGS_FROM_ENVIRONMENT", "1")
    for name in ("LEARNIG_RATE", "EPOCH", "BATCHSIZE", "RESULT_DIR", "MODE", "HOMES", "PATHS"):
        monkeypatch.setenv(name, "1")
    assert_error(script.call("--nonsense"), 2, bars=True)
    err = script.call("--nonsense").err
    for name, right in {"LEARNIG_RATE": "LEARNING_RATE", "EPOCH": "EPOCHS", "BATCHSIZE": "BATCH_SIZE",
                        "RESULT_DIR": "RESULTS_DIR"}.items():
        assert re.search(rf"\b{name}\b.*did you mean {right}\?", err), err
    assert err.count("warning:") == 4
    monkeypatch.delenv("FLAGS_FROM_ENVIRONMENT")
    assert "warning" not in script.call("--nonsense").err


# === devices and precision ===


@pytest.mark.parametrize("cuda, mps, name, local, device", [
    (0, False, "auto", 0, "cpu"), (2, False, "auto", 0, "cuda:0"), (2, False, "auto", 1, "cuda:1"),
    (2, False, "cuda:1", 0, "cuda:1"), (0, True, "auto", 0, "mps"), (0, True, "cpu", 0, "cpu"),
    (2, True, "mps", 0, "mps"), (2, False, "cuda", 2, None), (2, False, "cuda:2", 0, None),
    (0, False, "cuda", 0, None), (0, False, "mps", 0, None)])
def test_device_is_the_one_that_was_asked_for_or_an_error(script, monkeypatch, cuda, mps, name, local, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if device is None:
        with pytest.raises(script.module.UserError, match=f"--device {name}.*--device cpu") as caught:
            script.module.pick_device(name, local)
        assert caught.value.code == 1
    else:
        assert str(script.module.pick_device(name, local)) == device


@pytest.mark.parametrize("avx, amx, precision", [(False, False, "float32"), (True, False, "bfloat16"),
                                                 (False, True, "bfloat16")])
def test_precision_is_what_the_hardware_multiplies_natively(script, monkeypatch, avx, amx, precision):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    pick = script.module.pick_precision
    assert str(pick("auto", torch.device("cpu"))) == f"torch.{precision}"
    assert [pick(name, torch.device("cpu")) for name in ("float32", "bfloat16")] == [torch.float32, torch.bfloat16]
    assert pick("auto", torch.device("mps")) is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: avx)
    assert str(pick("auto", torch.device("cuda"))) == f"torch.{'bfloat16' if avx else 'float32'}"


# === more than one process ===


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "x"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "0"}, {"RANK": "1"}, {"RANK": "1.5"}, {"LOCAL_RANK": "-1"},
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "2"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999999"}],
    ids=lambda given: " ".join(f"{name}={value}" for name, value in given.items()))
def test_environment_that_torchrun_would_not_make_is_one_error(script, variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_error(script.call(*script.run()), 2, "torchrun", "WORLD_SIZE")


@pytest.mark.parametrize("rank", [0, 1])
def test_master_or_worker_that_can_not_be_reached_is_waited_for_less_than_a_minute(script, rank, monkeypatch):
    waits = []

    def timedelta(**how):
        waits.append(datetime.timedelta(**how))
        return datetime.timedelta(seconds=1)

    monkeypatch.setattr(script.module, "datetime", types.SimpleNamespace(timedelta=timedelta))
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    result = script.call(*script.run())
    assert result.code == 2 and result.err.strip().splitlines()[-1].startswith("error: RANK"), result.err
    assert waits and max(waits) < datetime.timedelta(minutes=1)


def world_of(script, monkeypatch, size: int):
    world = script.module.World("cpu")
    world.size = size
    monkeypatch.setattr(script.module, "World", lambda name: world)
    monkeypatch.setattr(type(world), "wait", lambda self: None)
    monkeypatch.setattr(type(world), "average", lambda self, tensors: None)


def test_batch_that_can_not_be_shared_is_a_usage_error(script, monkeypatch):
    world_of(script, monkeypatch, 9)
    assert_error(script.call(*script.run()), 2, "--batch_size", "9 processes", "multiple of 9")


def test_other_modes_run_in_one_process(script, monkeypatch, model_file):
    model_file()
    world_of(script, monkeypatch, 2)
    for command in (script.infer(), script.evaluate()):
        assert_error(script.call(*command), 2, "one process", "torchrun")


def test_reason_of_a_failure_is_left_for_the_wrapper_that_starts_torchrun(script, monkeypatch):
    monkeypatch.setenv("ERROR_FILE", "reason")
    assert_error(script.call(*script.run(), "--epochs", "0"), 2)
    assert re.match(r"2 .*--epochs", Path("reason").read_text())


def test_processes_share_the_noise_of_a_step(script):
    draws = [script.module.Draw(3, 7, 4, rows, torch.device("cpu")).normal(5)
             for rows in (slice(None), slice(0, 2), slice(2, 4))]
    assert torch.equal(draws[0], torch.cat(draws[1:]))
    assert not torch.equal(draws[0], script.module.Draw(3, 8, 4, slice(None), torch.device("cpu")).normal(5))


@pytest.mark.slow
def test_two_processes_train_the_same_model_stop_together_and_the_first_alone_writes(script, python, tmp_path):
    """Sound at its own speed: padded clips count by their length, and less in a batch than in one alone."""
    port, processes = free_port(), []
    run = *script.run(), *(("--speed", 0) if "speed" in script.module.flags("train", script.family) else ())
    body = "script.Trainer.train_step = lambda self: (step(self), self.step == 7 and self.world.rank == 1 and " \
        "signal.raise_signal(signal.SIGTERM))[0]"  # one process alone is asked to stop
    for rank in range(2):
        (home := tmp_path / f"rank{rank}").mkdir()
        processes.append(python(script.driver(home, body), *run, cwd=home, env={
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}))
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 143, err
    assert [path.name for path in (tmp_path / "rank1").iterdir()] == ["driver.py"]
    os.chdir(tmp_path / "rank0")
    assert read("model.pt")["step"] == 8
    script.ok(*RESUME)
    script.ok(*run, "--checkpoint", "one/model.pt", "--results_dir", "one/results")
    found, expected = read("model.pt"), read("one/model.pt")
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours["step"] == theirs["step"] and nearly(ours["loss"], theirs["loss"]), (ours, theirs)
    for key, weights in expected["ema"].items():
        ours, theirs = found["ema"][key].float(), weights.float()  # some are indices, which are to be the same
        assert (ours - theirs).norm() <= (0.02 + 0.02 * theirs.norm()) * weights.is_floating_point(), key

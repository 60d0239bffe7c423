#!/usr/bin/env python3
"""Draw quality against latent numbers per second from several evaluations of the audio script, and print the table.

    python audio_gen/audio_gen.py --mode evaluate --checkpoint A.pt --results_dir a      (and so on for each size)
    python benchmarks/audio_gen_rates.py a/evaluation.json b/evaluation.json ... --output docs/audio_rate_quality.png

Nothing is measured here: every figure is a median that an evaluation.json holds.
"""
import argparse
import json
from pathlib import Path

PANELS = (("snr_db", "SNR, dB (higher is better)"), ("mel_mse", "MSE of the standardised log-mel (lower is better)"),
          ("pesq_wb", "PESQ wide-band (higher is better)"))
STEMS = ("vocals", "mixture")
BASELINES = {"without_network_largest_lines": "largest lines + index",
             "without_network_largest_runs": "largest runs + index"}


def row_of(report: dict) -> str:
    """The model's own sound."""
    return next(name for name in ("model", "model_griffinlim") if name in report["rows"])


def value(report: dict, row: str, stem: str, metric: str) -> float | None:
    return report["rows"].get(row, {}).get(stem, {}).get(metric, {}).get("median")


def table(reports: list[dict]) -> None:
    columns = ["model", "numbers/s", "row", *(f"{stem} {metric}" for stem in STEMS for metric, _ in PANELS)]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for report in reports:
        for row in (name for name in report["rows"] if name.startswith(("model", "without"))):
            cells = [value(report, row, stem, metric) for stem in STEMS for metric, _ in PANELS]
            shown = " | ".join("" if cell is None else f"{cell:.3g}" for cell in cells)
            print(f"| {report['model']} | {report['latent_numbers_per_second']:g} | {row} | {shown} |")


def draw(reports: list[dict], output: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(len(STEMS), len(PANELS), figsize=(15, 8), layout="constrained")
    for axis_row, stem in zip(axes, STEMS):
        for axis, (metric, label) in zip(axis_row, PANELS):
            curves: dict[str, list[tuple[float, float]]] = {}
            for report in reports:
                rate = report["latent_numbers_per_second"]
                own = "model_mel" if metric == "mel_mse" and "model_mel" in report["rows"] else row_of(report)
                names = {own: report["model"]} | (BASELINES if metric != "mel_mse" else {})
                for row, name in names.items():
                    if (y := value(report, row, stem, metric)) is not None:
                        curves.setdefault(name, []).append((rate, y))
            for name, points in curves.items():
                plain = name in BASELINES.values()
                axis.plot(*zip(*sorted(points)), marker="o", label=name, linestyle=":" if plain else "-",
                          alpha=0.6 if plain else 1)
            axis.set(xscale="log", xlabel="latent numbers per second", ylabel=label, title=stem)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{reports[0]['dataset']}, test split: medians over the clips of each stem")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("reports", type=Path, nargs="+", help="evaluation.json files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "audio_rate_quality.png")
    args = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in args.reports]
    reports.sort(key=lambda report: (report["model"], report["latent_numbers_per_second"]))
    table(reports)
    draw(reports, args.output)
    print("->", args.output)


if __name__ == "__main__":
    main()

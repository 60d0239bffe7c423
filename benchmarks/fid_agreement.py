#!/usr/bin/env python3
"""Whether FID by Inception is the same number here, in pytorch-fid and in torch-fidelity: made-up pictures, one file of
random Inception weights for all three (the published ones need a download, and agreement does not depend on them).

    pip install pytorch-fid==0.3.0
    python benchmarks/fid_agreement.py                      2,100 pictures a set: minutes on a GPU, an hour on a CPU
    python benchmarks/fid_agreement.py --count 100          fewer than features: the same formulas of singular matrices

Ours is what `explore.py fid A B --fid_features inception` computes; the libraries are given the same folders, and their
own readers, networks and formulas work on them. Pictures have 299 pixels, so that the libraries' different ways of
resizing play no part. What remains is the scale of pixels: torch-fidelity, and with it ours, takes (x - 128) / 128 as
the original did in TensorFlow, pytorch-fid x / 127.5 - 1. It is therefore also measured with the scale of the others,
which is what has to agree; as it comes it is shown beside.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "image_gen"))
import explore  # noqa: E402

import image_gen as ig  # noqa: E402

SIZE = 299
AGREES = 1e-3


def pictures(folder: Path, count: int, seed: int, softness: int) -> None:
    """Blurred noise with a tint and an edge: sets of another softness differ."""
    from PIL import Image
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = rng.integers(0, 256, (softness + i % 5, softness, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).copy()
        image[:, :rng.integers(1, SIZE)] //= 2
        Image.fromarray(image).save(folder / f"{i:05d}.png")


def random_weights(path: Path, sample: torch.Tensor) -> None:
    """The shapes of the published file; statistics of batch norm such that features vary from picture to picture."""
    from torch_fidelity import feature_extractor_inceptionv3 as module
    fetch, load = module.load_state_dict_from_url, module.FeatureExtractorInceptionV3.load_state_dict
    module.load_state_dict_from_url = lambda *_a, **_k: {}
    module.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    try:
        torch.manual_seed(0)
        net = module.FeatureExtractorInceptionV3("random", ["2048"])
    finally:
        module.load_state_dict_from_url, module.FeatureExtractorInceptionV3.load_state_dict = fetch, load
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.train().momentum = 1.0
    with torch.no_grad():
        net(sample)
    torch.save(net.state_dict(), path)


def by_pytorch_fid(folders: list[Path], weights: Path, args: argparse.Namespace, rescaled: bool) -> float:
    from pytorch_fid import fid_score, inception
    inception.load_state_dict_from_url = lambda *_a, **_k: torch.load(weights, weights_only=True)
    device = ig.pick_device(args.device)
    net = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]], normalize_input=not rescaled)
    net = net.to(device).eval()
    if rescaled:  # its reader yields x / 255
        net.register_forward_pre_hook(lambda _net, given: ((given[0] * 255 - 128) / 128, *given[1:]))
    both = [fid_score.calculate_activation_statistics(sorted(folder.iterdir()), net, args.batch, 2048, device, 0)
            for folder in folders]
    return float(fid_score.calculate_frechet_distance(*both[0], *both[1]))


def by_torch_fidelity(folders: list[Path], weights: Path, args: argparse.Namespace) -> float:
    from torch_fidelity import calculate_metrics
    return calculate_metrics(input1=str(folders[0]), input2=str(folders[1]), fid=True, batch_size=args.batch,
                             cuda=ig.pick_device(args.device).type == "cuda", verbose=False, cache=False,
                             feature_extractor_weights_path=str(weights))["frechet_inception_distance"]


def by_ours(folders: list[Path], weights: Path, args: argparse.Namespace) -> float:
    """What `explore.py fid` does, which gives no FID of fewer pictures than features."""
    net = ig.inception_net(weights, ig.pick_device(args.device))
    a, b = (net(explore.read_pictures(str(folder), None).images, args.batch).vectors for folder in folders)
    return ig.frechet_distance(a, b)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=ig.number(int, 4), default=2100, help="pictures of each set")
    parser.add_argument("--batch", type=ig.number(int, 1), default=50, help="pictures at once")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fid_agreement.json")
    args = parser.parse_args(argv)
    try:
        import pytorch_fid  # noqa: F401
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")
    ig.results_folder(args.out.parent)
    with tempfile.TemporaryDirectory() as place:
        folders, weights = [Path(place, "a"), Path(place, "b")], Path(place, "weights.pth")
        for number, folder in enumerate(folders):
            pictures(folder, args.count, number, (9, 14)[number])
        some = torch.cat([explore.read_pictures(str(folder), None).images[:16] for folder in folders])
        random_weights(weights, some)
        ways = {"image_gen.py": lambda: by_ours(folders, weights, args),
                "torch-fidelity": lambda: by_torch_fidelity(folders, weights, args),
                "pytorch-fid, pixels scaled alike": lambda: by_pytorch_fid(folders, weights, args, True),
                "pytorch-fid": lambda: by_pytorch_fid(folders, weights, args, False)}
        rows = {}
        for name, way in ways.items():
            started = time.perf_counter()
            value = way()
            ours = rows["image_gen.py"]["fid"] if rows else value
            rows[name] = {"fid": value, "relative_difference": abs(value - ours) / abs(ours),
                          "seconds": time.perf_counter() - started}
            print(f"{name:36}{value:14.6f}   differs by {rows[name]['relative_difference']:.2e}   "
                  f"({rows[name]['seconds']:.0f} s)", flush=True)
    agrees = all(row["relative_difference"] <= AGREES for name, row in rows.items() if name != "pytorch-fid")
    ig.write_json(args.out, {"benchmark": "fid_agreement", "pictures": args.count, "size": SIZE, "rows": rows,
                             "agrees_to": AGREES, "agrees": agrees, "machine": ig.provenance()})
    print(f"{'agree' if agrees else 'DO NOT agree'} to {AGREES:g} -> {args.out}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())

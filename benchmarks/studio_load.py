#!/usr/bin/env python3
"""How the studio bears many clients at once: starts one and asks it for a while, on this machine only.

    python benchmarks/studio_load.py                          20 clients for a minute -> results/studio_load.json
    python benchmarks/studio_load.py --clients 5 --seconds 10

Each client asks for one thing after another: images of the GAN and of the fast diffusion model, a small file of a sound
of one second, that file's sound, the list of models. Reported: answers and failures, seconds until an answer (median,
90th percentile, longest), whether answers came in the order of the requests, the studio's memory.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def request(url: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
    with OPENER.open(urllib.request.Request(url, body, {"Content-Type": kind}), timeout=600) as answer:
        return answer.read()


def ask(api: str, name: str, inputs: dict) -> tuple[list, float, float]:
    """(answer, when it was queued, when it came)"""
    event = json.loads(request(f"{api}/call/v2/{name}", json.dumps(inputs).encode()))["event_id"]
    queued = time.monotonic()
    text = request(f"{api}/call/{name}/{event}").decode()
    kind, data = re.findall(r"^event: (\w+)\ndata: (.*)$", text, re.MULTILINE)[-1]
    if kind != "complete":
        raise RuntimeError(f"{name}: {data}")
    return json.loads(data), queued, time.monotonic()


def upload(api: str, name: str, content: bytes) -> dict:
    body = f'--XX\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body += content + b"\r\n--XX--\r\n"
    (path,) = json.loads(request(f"{api}/upload", body, "multipart/form-data; boundary=XX"))
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def client(api: str, number: int, until: float, rows: list, failures: list) -> None:
    sound = io.BytesIO()
    soundfile.write(sound, 0.1 * np.sin(np.arange(16_000) * (0.05 + 0.01 * number)), 16_000, format="WAV")
    turn = number
    try:
        while time.monotonic() < until:
            name = ("draw", "encode", "draw", "models")[turn % 4]
            inputs = {"draw": {"model": ("gan_mnist", "diffusion_mnist_fast")[turn // 2 % 2], "num_samples": 4,
                               "seed": number}, "models": {}}.get(name) or {}
            if name == "encode":
                inputs = {"sound": upload(api, f"{number}.wav", sound.getvalue()), "bitrate": 48}
            answer, queued, came = ask(api, name, inputs)
            rows.append((name, queued, came))
            if name == "encode":
                small = request(answer[1]["url"])
                assert small[:4] == b"IAGC"
                _, queued, came = ask(api, "decode", {"file": upload(api, f"{number}.iag", small)})
                rows.append(("decode", queued, came))
            turn += 1
    except Exception as error:  # every way to fail counts
        failures.append(f"client {number}: {type(error).__name__}: {error}"[:300])


def memory(pid: int, field: str = "VmRSS") -> float:
    """MiB"""
    (kib,) = re.findall(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(kib) / 1024


def out_of_order(rows: list) -> int:
    """Answers that came before that of a request which had been queued a quarter of a second earlier or more."""
    rows = sorted(rows, key=lambda row: row[2])
    return sum(any(later[1] < row[1] - 0.25 for later in rows[i + 1:]) for i, row in enumerate(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    studio = subprocess.Popen([sys.executable, ROOT / "studio" / "studio.py", "--no-browser", "--port", str(port)],
                              stdout=subprocess.PIPE, text=True)
    try:
        studio.stdout.readline()
        opened, idle = time.monotonic() - started, memory(studio.pid)
        api, rows, failures = f"http://127.0.0.1:{port}/gradio_api", [], []
        until = time.monotonic() + args.seconds
        threads = [threading.Thread(target=client, args=(api, i, until, rows, failures)) for i in range(args.clients)]
        for thread in threads:
            thread.start()
        time.sleep(args.seconds / 2)
        halfway = memory(studio.pid)
        for thread in threads:
            thread.join()
        waits = sorted(came - queued for _, queued, came in rows)
        report = {"clients": args.clients, "seconds": args.seconds, "start_seconds": round(opened, 1),
                  "answers": len(rows), "failures": failures, "out_of_order": out_of_order(rows),
                  "seconds_to_answer": {"median": statistics.median(waits), "p90": waits[int(0.9 * len(waits))],
                                        "longest": waits[-1]} if waits else None,
                  "mib": {"idle": idle, "halfway": halfway, "after": memory(studio.pid),
                          "peak": memory(studio.pid, "VmHWM")},
                  "load_average": os.getloadavg(), "cores": len(os.sched_getaffinity(0))}
    finally:
        studio.send_signal(signal.SIGTERM)
        report_code = studio.wait(60)
    report["exit_status"] = report_code
    target = ROOT / "benchmarks" / "results" / "studio_load.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    for key, value in report.items():
        print(f"{key:20}{value}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

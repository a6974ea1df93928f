# SPDX-License-Identifier: Apache-2.0
"""The published scripts with and without `pkt_ext.compat`: seconds, memory, results.

    python benchmarks/drop_in.py [--script PATH/extract_lora_with_sensitivity.py] [--json FILE]

Extraction: makes a random teacher, seed rows and a driver that gives the script's size table the
case's sizes, then runs the driver by itself and under `python -m pkt_ext.compat`, in turn. Without
`--script` it takes the tests' stand-in, whose functions cost what the published ones do.

Attribution: one prompt through the stand-in of `KnowledgeNeurons`, on a float16 model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pkt_ext.bench import machine
from pkt_ext.compat import patched
from pkt_ext.heap import give_back_freed_memory
from pkt_ext.streaming.meter import PeakMemory, resident_bytes

TESTS = Path(__file__).parents[1] / "tests"
STAND_IN = TESTS / "compat" / "scripts" / "seeking_script.py"
SMALL = {"dim": 384, "ffn": 1032, "n_layer": 4}
LARGE = {"dim": 512, "ffn": 1376, "n_layer": 8}
VOCABULARY, ROWS, RANK = 32000, 8, 16
ATTRIBUTED = {"layers": 6, "hidden": 256, "ffn": 688, "heads": 8, "kv_heads": 8}

# Functions are timed from outside, whoever's they are: `patched` has put ours in place by then.
DRIVER = """
import argparse, importlib, json, resource, sys, time
sys.path.insert(0, {folder!r})
script = importlib.import_module({module!r})
script.LORA_PARA.update({{"13b": {large!r}, "7b": {small!r}}})
seconds = {{}}

def timed(name):
    inner = getattr(script, name)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    setattr(script, name, call)

for name in ("calculate_sensitivity", "select_top_k_layers", "resize_params", "svd"):
    timed(name)
start = time.perf_counter()
script.main(argparse.Namespace(
    model_size="13b", lora_size="7b", task="gsm", r={rank}, include_emb={embeddings},
    include_ffn=True, include_self_attention=True))
seconds["main"] = time.perf_counter() - start
json.dump({{"seconds": seconds}}, open("measured.json", "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, default=STAND_IN)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document = {
        **machine.describe(torch.device("cpu")),
        "script": "stand-in" if options.script == STAND_IN else options.script.name,
        "sizes": {"teacher": LARGE, "student": SMALL, "vocabulary": VOCABULARY, "rows": ROWS},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_inputs(place)
        for embeddings in (False, True):
            case = measure(place, options.script.resolve(), embeddings, options.repeats)
            document["cases"].append(case)
            show(case)
    document["attribution"] = attribution(options.repeats)
    show_attribution(document["attribution"])
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def make_inputs(place: Path) -> None:
    """What the script reads: a checkpoint, seed rows, an adapter's configuration."""
    sys.path.insert(0, str(TESTS))
    import model_zoo

    sizes = dict(hidden=LARGE["dim"], ffn=LARGE["ffn"], layers=LARGE["n_layer"])
    model = model_zoo.build("llama", heads=8, vocab=VOCABULARY, **sizes)
    model_zoo.save(model, place / "meta-llama" / "Llama-2-13b-hf")
    (place / "data" / "gsm").mkdir(parents=True)
    (place / "configs" / "Llama-2").mkdir(parents=True)
    (place / "configs" / "Llama-2" / "adapter_7b.json").write_text("{}\n")
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"{n}: " + "how many in all, and how many more? " * 9},
                {"role": "assistant", "content": f"first {n}, then {2 * n}; in all {3 * n}. " * 5},
            ]
        }
        for n in range(ROWS)
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "data" / "gsm" / "sample_gsm.jsonl").write_text(text)


def measure(place: Path, script: Path, embeddings: bool, repeats: int) -> dict:
    """Both ways in turn, medians."""
    driver = place / "driver.py"
    driver.write_text(
        DRIVER.format(
            folder=str(script.parent),
            module=script.stem,
            large=LARGE,
            small=SMALL,
            rank=RANK,
            embeddings=embeddings,
        )
    )
    ways = {"as published": [], "compat": ["-m", "pkt_ext.compat"]}
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    adapters = {}
    for _ in range(repeats):
        for way, options in ways.items():
            runs[way].append(run([sys.executable, *options, str(driver)], place))
            written = next((place / "extracted_lora").rglob("adapter_model.bin"))
            adapters[way] = torch.load(written)
            shutil.rmtree(place / "extracted_lora")
    return {
        "embeddings": embeddings,
        "product_error": largest_error(*adapters.values()),
        **{way: summary(found) for way, found in runs.items()},
    }


def run(command: list[str], place: Path) -> dict:
    """One process's seconds by function, in all, and its largest resident memory."""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    start = time.perf_counter()
    with open(place / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit((place / "log").read_text())
    measured = json.loads((place / "measured.json").read_text())["seconds"]
    return measured | {"process": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * 1024}


def summary(runs: list[dict]) -> dict:
    """Medians over the runs."""
    return {key: statistics.median(one[key] for one in runs) for key in runs[0]}


def largest_error(one: dict, other: dict) -> float:
    """Over all modules, |B A - B' A'| / |B A|."""
    errors = []
    for name in one:
        if "_A" in name:
            partner = name.replace("_A", "_B")
            b, a, d, c = (found[key].double() for found in (one, other) for key in (partner, name))
            # products too large to hold: |P - Q|^2 = <P, P> - 2 <P, Q> + <Q, Q>, all of r x r
            own, mixed, others = (
                ((x.T @ y) * (u @ v.T)).sum()
                for x, y, u, v in ((b, b, a, a), (b, d, a, c), (d, d, c, c))
            )
            errors.append(float(((own - 2 * mixed + others).clamp(min=0) / own).sqrt()))
    return max(errors)


def attribution(repeats: int) -> dict:
    """Seconds of each method, the model's forward apart, and the largest memory, of both ways."""
    sys.path.insert(0, str(STAND_IN.parent))
    import knowledge_neurons
    import model_zoo
    from modified_llama import ModifiedLlama

    config = model_zoo.config("llama", vocab=VOCABULARY, attn_implementation="eager", **ATTRIBUTED)
    model = model_zoo.randomize(ModifiedLlama(config)).half().eval()
    counts = int(ATTRIBUTED["ffn"] * 0.1), int(ATTRIBUTED["hidden"] * 0.1)
    prompt, blocks = ["how many in all? " * 8], list(range(ATTRIBUTED["layers"]))
    calls = {
        "get_top_attribute_layers": (prompt, [" 42"], len(blocks)),
        "get_top_attribute_neurons_ffn": (prompt, [" 42"], blocks, counts[0]),
        "get_top_attribute_neurons_attn": (prompt, [" 42"], blocks, counts[1]),
    }
    tokens = model_zoo.tokenizer()

    def once(way, name: str) -> dict[str, float]:
        """One call: seconds without the model's forward, those of the forward, memory on top."""
        owner = knowledge_neurons.KnowledgeNeurons(model, tokens, device="cpu")
        forward = 0.0

        def before(*_):
            nonlocal forward
            forward -= time.perf_counter()

        def after(*_):
            nonlocal forward
            forward += time.perf_counter()

        hooks = model.register_forward_pre_hook(before), model.register_forward_hook(after)
        held = resident_bytes()
        with (
            way(knowledge_neurons),
            contextlib.redirect_stdout(None),
            PeakMemory(torch.device("cpu")) as memory,
        ):
            start = time.perf_counter()
            getattr(owner, name)(*calls[name])
            seconds = time.perf_counter() - start
        for hook in hooks:
            hook.remove()
        return {
            "seconds": seconds - forward,
            "forward": forward,
            "added_bytes": memory.bytes - held,
        }

    give_back_freed_memory()
    ways = {"as published": contextlib.nullcontext, "compat": patched}
    runs = {name: {way: [] for way in ways} for name in calls}
    for _ in range(repeats):
        for way, context in ways.items():
            with torch.no_grad():  # what compat remembers of a prompt holds no longer
                model.lm_head.weight.mul_(1)
            for name in calls:  # one after the other, as the scripts call them
                runs[name][way].append(once(context, name))
    methods = {name: {way: summary(some[way]) for way in ways} for name, some in runs.items()}
    return {"sizes": ATTRIBUTED, "vocabulary": VOCABULARY, "methods": methods}


def show_attribution(found: dict) -> None:
    """A line a method."""
    for name, ways in found["methods"].items():
        slow, fast = ways["as published"], ways["compat"]
        print(
            f"  {name:32}{slow['seconds']:8.2f} s{fast['seconds']:8.2f} s"
            f"{slow['seconds'] / fast['seconds']:7.1f}x   forward {slow['forward']:.2f} s"
            f"{fast['forward']:6.2f} s   {slow['added_bytes'] / 2**20:.0f} MiB"
            f"{fast['added_bytes'] / 2**20:6.0f} MiB",
            flush=True,
        )


def show(case: dict) -> None:
    """One case as lines."""
    slow, fast = case["as published"], case["compat"]
    print(f"{'with' if case['embeddings'] else 'without'} embeddings")
    for key in slow:
        unit, scale = ("MiB", 2**20) if key == "peak_bytes" else ("s", 1)
        print(
            f"  {key:24}{slow[key] / scale:10.2f} {unit:4}{fast[key] / scale:10.2f} {unit:4}"
            f"{slow[key] / fast[key]:8.1f}x"
        )
    print(f"  largest error of a product {case['product_error']:.1e}", flush=True)


if __name__ == "__main__":
    main()

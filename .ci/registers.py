# SPDX-License-Identifier: Apache-2.0
"""Compile every .cu file for every architecture, compare registers and spills with the record
(csrc/registers.json), and look in the machine code for what each kernel was written to use
(csrc/instructions.json: kernels, as a pattern, to instructions that each of them must have, or with
"!" in front must not).

A kernel that needs more registers than recorded, spills, or lacks an instruction fails, and so does
one whose wgmma ptxas serialises (its remarks C75xx); `--record` signs the registers. Without nvcc
the step is skipped, visibly. `make cuda-check` fetches cuobjdump.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from setup import DEFAULT_ARCHS, find_nvcc, job_count, select_archs  # noqa: E402

RECORD = ROOT / "csrc" / "registers.json"
INSTRUCTIONS = ROOT / "csrc" / "instructions.json"


def find_cuobjdump() -> str:
    """In the virtual environment first, then on PATH."""
    fetched = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin/cuobjdump"))
    found = str(fetched[-1]) if fetched else shutil.which("cuobjdump")
    if found is None:
        sys.exit("no cuobjdump to read the machine code with: `make cuda-check` fetches it")
    return found


def plain(name: str, stem: str, arch: str) -> str:
    """What both records call a kernel; nvcc puts a hash of the file into unnamed namespaces."""
    name = re.sub(r"\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}(?=\d)", "", name)
    return f"{stem}/{name} sm_{arch}"


def compile_report(nvcc: str, cuobjdump: str, source: Path, arch: str, host: bool) -> dict:
    """kernel -> registers, spilled bytes and the instructions of its machine code. `host` compiles
    the host's half too, which one architecture is enough for."""
    with tempfile.TemporaryDirectory() as scratch:
        target = f"{scratch}/out.{'o' if host else 'cubin'}"
        command = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v",
                   "-c" if host else "-cubin", "-I", str(ROOT / "csrc"), str(source), "-o", target,
                   f"-gencode=arch=compute_{arch},code=sm_{arch}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{source.relative_to(ROOT)} does not compile for sm_{arch}:\n{done.stderr}")
        # cuobjdump runs the nvdisasm that PATH finds
        environment = os.environ | {"PATH": f"{Path(cuobjdump).parent}:{os.environ['PATH']}"}
        dump = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True,
                              env=environment)  # fmt: skip
    serialised = re.findall(r"^.*\(C75\d\d\).*$", done.stderr, re.M)
    if serialised:
        sys.exit(f"{source.relative_to(ROOT)} for sm_{arch}:\n" + "\n".join(serialised))
    pattern = (
        r"Compiling entry function '(\S+)' for.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    report = {}
    for name, stores, loads, registers in re.findall(pattern, done.stderr, re.S):
        use = {"registers": int(registers), "spilled": int(stores) + int(loads)}
        report[plain(name, source.parent.name, arch)] = use
    if report and dump.returncode:
        sys.exit(f"cuobjdump cannot read {source.relative_to(ROOT)}:\n{dump.stderr}")
    for part in dump.stdout.split("Function : ")[1:]:
        name, code = part.split(maxsplit=1)
        found = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", code, re.M))
        report[plain(name, source.parent.name, arch)]["instructions"] = found
    return report


def check_registers(found: dict, archs: list[str], release: str) -> list[str]:
    record = json.loads(RECORD.read_text())
    if record["nvcc"] != release:  # another ptxas allocates otherwise: compiling is all it can say
        print(f"cuda-check: the record is of nvcc {record['nvcc']}, this is {release}, "
              "so registers are not compared")  # fmt: skip
        return []
    known = record["kernels"]
    problems = [f"{kernel}: not in the record" for kernel in found if kernel not in known]
    problems += [f"{kernel}: recorded but gone" for kernel in known
                 if kernel not in found and kernel.rsplit("sm_", 1)[1] in archs]  # fmt: skip
    for kernel in found.keys() & known.keys():
        for what in ("registers", "spilled"):
            if found[kernel][what] > known[kernel][what]:
                problems.append(
                    f"{kernel}: {what} grew from {known[kernel][what]} to {found[kernel][what]}"
                )
    return [*problems, "sign with: python .ci/registers.py --record"] if problems else []


def check_instructions(found: dict) -> list[str]:
    problems = []
    for pattern, wanted in json.loads(INSTRUCTIONS.read_text()).items():
        kernels = [kernel for kernel in found if re.search(pattern, kernel)]
        if not kernels:
            problems.append(f"{INSTRUCTIONS.relative_to(ROOT)}: no kernel is called {pattern!r}")
        for kernel in kernels:
            for want in wanted:
                names = {name for name in found[kernel]["instructions"]
                         if re.fullmatch(want.removeprefix("!"), name)}  # fmt: skip
                if want.startswith("!") and names:
                    problems.append(f"{kernel}: has {', '.join(sorted(names))}")
                elif not want.startswith("!") and not names:
                    problems.append(f"{kernel}: no instruction {want!r}")
    return problems


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        print("SKIPPED cuda-check: no nvcc on this machine; no .cu file was compiled")
        return
    cuobjdump = find_cuobjdump()
    archs = select_archs(nvcc).split(";")
    missing = [a for a in DEFAULT_ARCHS.split(";") if a not in archs]
    if missing:
        print(f"cuda-check: this nvcc cannot compile {', '.join(missing)}; those are skipped")
    sources = sorted((ROOT / "csrc").glob("**/*.cu"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(job_count()) as pool:
        reports = [pool.submit(compile_report, nvcc, cuobjdump, source, arch, arch == archs[0])
                   for source in sources for arch in archs]  # fmt: skip
        found = {kernel: use for report in reports for kernel, use in report.result().items()}
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", release)[1]
    if "--record" in sys.argv:
        kernels = {kernel: {what: found[kernel][what] for what in ("registers", "spilled")}
                   for kernel in sorted(found)}  # fmt: skip
        RECORD.write_text(json.dumps({"nvcc": release, "kernels": kernels}, indent=1) + "\n")
        print(f"recorded {len(found)} kernels in {RECORD.relative_to(ROOT)}")
    problems = check_registers(found, archs, release) + check_instructions(found)
    if problems:
        sys.exit("\n".join(problems))
    spills = sum(use["spilled"] > 0 for use in found.values())
    print(f"cuda-check: {len(sources)} files, {len(found)} kernels for {len(archs)} architectures "
          f"within the record, their instructions where meant; {spills} spill")  # fmt: skip


if __name__ == "__main__":
    main()

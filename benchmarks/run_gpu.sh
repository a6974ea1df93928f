#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a machine with an NVIDIA GPU can tell, in one go: build with CUDA, run the
# tests of the kernels and of the streamed pass on the card, compute-sanitizer on small ragged
# shapes, then `pkt bench`.
#
#   benchmarks/run_gpu.sh [--venv DIR] [--size small|default|full] [--results DIR] [--ncu]
#
#   --venv     a virtual environment to use, whose torch sees the GPU and stays as it is; without it
#              a fresh one is made in build/gpu-venv. The package goes into it, with its dev extra
#   --size     of `pkt bench` (default: full)
#   --results  folder for what comes out (default: benchmarks/results)
#   --ncu      also profile the kernels with Nsight Compute, if it is there: the first launch of
#              each in the benchmark's default cases
#
# Leaves RESULTS/<card>/<date>-<commit>.json from the benchmark and <date>-<commit>-sanitizer.json:
# what the tests and each sanitizer tool said: "passed", "failed", or "not available" for a tool
# that is missing or cannot run there. A sanitizer's errors fail; its warnings (racecheck's, where
# threads write the same value) are only counted. Kernels that fail their tests are not timed; those
# that only a sanitizer objects to are. Exit status: 0 all passed or not available, 1 something
# failed, 2 no GPU (nothing was done).
set -euo pipefail
cd "$(dirname "$0")/.."

venv="" size=full results=benchmarks/results profile=""
while (($#)); do
  case $1 in
    --venv) venv=$2 && shift 2 ;;
    --size) size=$2 && shift 2 ;;
    --results) results=$2 && shift 2 ;;
    --ncu) profile=yes && shift ;;
    *) echo "run_gpu.sh: unknown option $1" >&2 && exit 1 ;;
  esac
done

card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || true
if [[ -z $card ]]; then
  echo "run_gpu.sh: no NVIDIA GPU on this machine (nvidia-smi names none); nothing was run" >&2
  exit 2
fi

if [[ -z $venv ]]; then
  venv=build/gpu-venv
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet -c constraints.txt torch
fi
python=$venv/bin/python
if ! "$python" -c 'import torch; exit(not torch.cuda.is_available())'; then
  echo "run_gpu.sh: the torch in $venv sees no GPU; nothing was run" >&2
  exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log pins=$scratch/constraints.txt
torch=$("$python" -c 'import torch; print(torch.__version__)')
sed "s/^torch==.*/torch==$torch/" constraints.txt >"$pins"
"$python" -m pip install --quiet -c "$pins" setuptools cmake ninja pybind11
PKT_EXT_CUDA=1 PKT_EXT_FETCH_NVCC=1 \
  "$python" -m pip install --quiet -c "$pins" --no-build-isolation -e '.[dev]'

folder=$results/$(tr -cs '[:alnum:]\n' - <<<"${card,,}")
run=$folder/$(date -u +%Y-%m-%d)-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
mkdir -p "$folder"
names=() outcomes=() details=() errors=() warnings=()

record() { # name, outcome, detail, and of a sanitizer that came to its summary: errors, warnings
  names+=("$1") outcomes+=("$2") details+=("$3") errors+=("${4-}") warnings+=("${5-}")
  echo "run_gpu.sh: $1 $2${3:+ ($3)}"
}

most() { # what, output: the largest "N what" of a sanitizer's summaries, empty where there is none
  grep -E '^=+ (ERROR|RACECHECK) SUMMARY: ' "$2" | grep -oE "[0-9]+ $1" | sort -n | tail -n 1 |
    grep -oE '^[0-9]+'
}

# What pytest's last line and the sanitizer's summaries say. Tests that were all skipped, or that
# never came to run, have shown nothing: not passed. Whether exit status 99, the sanitizer's, stands
# for errors or for warnings is told by its summary.
judge() { # name, output, exit status
  local tests bad doubtful
  tests=$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error|deselected)' "$2" | tail -n 1) || true
  bad=$(most error "$2") || bad=$(most hazard "$2") || true
  doubtful=$(most warning "$2") || doubtful=${bad:+0}
  local said=$tests${bad:+; $bad errors, $doubtful warnings}
  if [[ $tests =~ [0-9]+\ (failed|error) || ${bad:-0} -gt 0 ]]; then
    record "$1" failed "$said" "$bad" "$doubtful"
  elif [[ $1 == tests && $3 -eq 0 && $tests =~ [0-9]+\ passed ]]; then
    record "$1" passed "$tests"
  elif [[ $1 == tests ]]; then
    record "$1" failed "${tests:-$(tail -n 1 "$2")}, exit status $3"
  elif [[ $3 =~ ^(0|99)$ && $tests =~ [0-9]+\ passed && -n $bad ]]; then
    record "$1" passed "$said" "$bad" "$doubtful"
  else
    record "$1" "not available" "exit status $3: $(grep -v '^ *$' "$2" | tail -n 1)"
  fi
}

status=0
"$python" -m pytest -q -p no:cacheprovider tests/ops tests/streaming/test_on_cuda.py -k cuda \
  >"$log" 2>&1 || status=$?
judge tests "$log" "$status"
[[ ${outcomes[0]} == passed ]] || cat "$log" >&2

sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
  2>/dev/null || true)
for tool in memcheck racecheck initcheck synccheck; do
  if [[ -z $sanitizer ]]; then
    record "$tool" "not available" "no compute-sanitizer on this machine"
    continue
  fi
  status=0 # torch's cache would hide the borders between tensors
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 \
    "$python" -m pytest -q -p no:cacheprovider tests/ops/test_ragged.py -k cuda \
    >"$log" 2>&1 || status=$?
  judge "$tool" "$log" "$status"
  [[ ${outcomes[-1]} != failed ]] || cat "$log" >&2
done

"$python" - "$run-sanitizer.json" "$card" "${sanitizer:-compute-sanitizer}" "${#names[@]}" \
  "${names[@]}" "${outcomes[@]}" "${details[@]}" "${errors[@]}" "${warnings[@]}" <<'PYTHON'
import json, subprocess, sys

path, card, sanitizer, count, *words = sys.argv[1:]
columns = [words[i : i + int(count)] for i in range(0, len(words), int(count))]
try:
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
except OSError:
    version = ""
document = {
    "card": card,
    "compute-sanitizer": (version.strip().splitlines() or [None])[-1],
    "outcomes": {name: {"outcome": outcome, "detail": detail}
                 | ({"errors": int(errors), "warnings": int(warnings)} if errors else {})
                 for name, outcome, detail, errors, warnings in zip(*columns, strict=True)},
}
with open(path, "w", encoding="utf-8") as file:
    json.dump(document, file, indent=1)
    file.write("\n")
PYTHON

if [[ ${outcomes[0]} != passed ]]; then
  echo "run_gpu.sh: see $run-sanitizer.json; kernels that fail are not timed" >&2
  exit 1
fi

"$python" -m pkt_ext bench --device cuda --size "$size" --json "$run.json" --plot "$run.png"

if [[ -n $profile ]]; then
  if ncu=$(command -v ncu); then # kernels by our namespace in their mangled names, once each
    "$ncu" --set full --force-overwrite --export "$run" --kernel-name-base mangled \
      --kernel-id '::regex:3pkt:1' "$python" -m pkt_ext bench --device cuda --size default ||
      echo "run_gpu.sh: ncu could not profile here" >&2
  else
    echo "run_gpu.sh: no ncu on this machine; nothing was profiled" >&2
  fi
fi
echo "run_gpu.sh: figures in $run.json; the rest in $run-sanitizer.json"
[[ " ${outcomes[*]} " != *" failed "* ]]

#!/usr/bin/env bash
# Trains the three shipped models anew: from Debian's LibreOffice help packages to condgen_fast/models/weights.
#   condgen_fast/recipes/shipped_models.sh [folder]     # in a source checkout; models-run by default
# Stopped, it goes on where it was when it is run again. It takes hours on 2 cores.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
runs=${1:-models-run}
text=$runs/corpus/libreoffice-en-de
shape=(--width 192 --feed-forward 768 --heads 4 --max-tokens 2500 --precision bf16 --save-every 500)
valid=(--valid-source "$text/valid.en" --valid-target "$text/valid.de")

# train KIND RUN OPTIONS: does nothing for a finished run and resumes a stopped one
train() {
  local kind=$1 run=$runs/$2
  shift 2
  [ -e "$run/model.safetensors" ] || condgen-fast train "$kind" --source "$text/train.en" "${valid[@]}" \
    "${shape[@]}" --output "$run" --resume "$@"
}

[ -e "$runs/corpus/stats.json" ] ||
  condgen-fast corpus --tasks libreoffice-en-de --output "$runs/corpus" --work "$runs/packages"

train transformer teacher --target "$text/train.de" --vocabulary-size 4000 --dropout 0.15 \
  --updates 7000 --warmup 1000 --learning-rate 2e-3
[ -e "$runs/distilled.de" ] || condgen-fast distill --model "$runs/teacher" --source "$text/train.en" \
  --output "$runs/distilled.de" --strategy beam --beam-size 5

# Both students start from the teacher's weights and learn its translations; the second stage warms up once more, to a
# higher rate than the first.
student=(--target "$runs/distilled.de" --vocabulary "$runs/teacher/vocab.model" --dropout 0.1 --warmup 500)
levenshtein=(--full-mask 0.2)
train cmlm cmlm-1 "${student[@]}" --initialize-from "$runs/teacher" --updates 3000 --average 1 --learning-rate 1e-3
train cmlm cmlm-2 "${student[@]}" --initialize-from "$runs/cmlm-1" --updates 6500 --learning-rate 2e-3
train levenshtein levenshtein-1 "${student[@]}" "${levenshtein[@]}" --initialize-from "$runs/teacher" \
  --updates 2000 --average 1 --learning-rate 1e-3
train levenshtein levenshtein-2 "${student[@]}" "${levenshtein[@]}" --initialize-from "$runs/levenshtein-1" \
  --updates 5000 --learning-rate 2e-3

python - "$checkout/condgen_fast/models/weights" "$runs" <<'PYTHON'
import sys
from pathlib import Path

import torch

from condgen_fast.models.checkpoint import load_model, save_model

weights, runs = map(Path, sys.argv[1:])
for name, run in {"transformer": "teacher", "cmlm": "cmlm-2", "levenshtein": "levenshtein-2"}.items():
    save_model(weights / f"{name}-en-de", *load_model(runs / run), dtype=torch.float16)
PYTHON

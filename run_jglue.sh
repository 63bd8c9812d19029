#!/usr/bin/env bash
# Searches the weights of target + w * (tuned - base) that score best on JGLUE-style tasks, and saves the best model.
# Edit the variables; `python -m tvmerge jglue --help` explains each. The same command again goes on where it stopped.
# Flags given to this script win over its variables; paths are relative to the folder it lies in.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"

# Models: a local folder, a Hub id, or id@revision. These are toys of 0.7 M parameters that come with the code.
TARGET_MODEL=(demo/models/target)
BASE_MODEL=demo/models/base
TUNED_MODEL=(demo/models/tuned) # several: (a b:base_of_b); LoRA adapters too

OUTPUT_DIR=output # folder of this run
GATE_MODE= GATE_PROMPTS= MOE_BASE= EXPERTS_PER_TOKEN= SHARE_WEIGHTS= SEARCH_GATE= SAVE_EXPERTS=
# Experts: 2 to 8 targets become one mixture, each plus its own weights times the task vector. Two toys, for instance:
# TARGET_MODEL=(demo/models/target demo/models/expert)
# GATE_MODE=hidden GATE_PROMPTS=demo/moe.yaml # or random, cheap_embed, uniform
# MOE_BASE=first EXPERTS_PER_TOKEN=2            # or average: attention, norms, embeddings of all
# SHARE_WEIGHTS=false SEARCH_GATE=false SAVE_EXPERTS=true OUTPUT_DIR=output_moe

# Tasks: those of TASK_DIR, those that come with tvmerge, or lm-eval's own. For real models, for instance:
# JGLUE_TASKS=jcommonsenseqa-1.1-0.3,jnli-1.3-0.2,jsquad-1.1-0.2
JGLUE_TASKS=toy_jcommonsenseqa,toy_jnli,toy_marc_ja,toy_jsquad
JGLUE_LIMIT=100    # questions per task in a trial; empty: about 300 in all
JGLUE_DATA=        # folder with JGLUE's files; empty: they are downloaded
NUM_FEWSHOT=       # examples in a prompt; empty: what the task says, 3 for JGLUE
TASK_DIR=demo/tasks

# Search
OPTIMIZE_MODE=layer # uniform, layer, block:4, parameter, all
OPTUNA_SAMPLER=RSM  # CMA-ES, TPE, NSGA-II and others, see README.md
WEIGHT_MIN=0
WEIGHT_MAX=2
N_TRIALS=30
OPTUNA_SEED=42

BATCH_SIZE=auto                                         # requests that the model answers at a time
CACHE_DIR="${HF_HUB_CACHE:-$HOME/.cache/huggingface/hub}" # models of the Hub

target=(--target_model "${TARGET_MODEL[@]}")
if [[ " $*" == *" --target_model"* ]]; then target=(); fi # also where they are numbered
tuned=(--tuned_model "${TUNED_MODEL[@]}")
if [[ " $*" == *" --tuned_model"* ]]; then tuned=(); fi # a second one would be added to the first

python -m tvmerge jglue \
  ${target[@]+"${target[@]}"} \
  --base_model "$BASE_MODEL" \
  ${tuned[@]+"${tuned[@]}"} \
  ${GATE_MODE:+--gate_mode "$GATE_MODE"} \
  ${GATE_PROMPTS:+--gate_prompts "$GATE_PROMPTS"} \
  ${MOE_BASE:+--moe_base "$MOE_BASE"} \
  ${EXPERTS_PER_TOKEN:+--experts_per_token "$EXPERTS_PER_TOKEN"} \
  ${SHARE_WEIGHTS:+--share_weights "$SHARE_WEIGHTS"} \
  ${SEARCH_GATE:+--search_gate "$SEARCH_GATE"} \
  ${SAVE_EXPERTS:+--save_experts "$SAVE_EXPERTS"} \
  --jglue_tasks "$JGLUE_TASKS" \
  ${JGLUE_LIMIT:+--jglue_limit "$JGLUE_LIMIT"} \
  --task_dir "$TASK_DIR" \
  ${JGLUE_DATA:+--jglue_data "$JGLUE_DATA"} \
  ${NUM_FEWSHOT:+--num_fewshot "$NUM_FEWSHOT"} \
  --optimize_mode "$OPTIMIZE_MODE" \
  --optuna_sampler "$OPTUNA_SAMPLER" \
  --weight_min "$WEIGHT_MIN" \
  --weight_max "$WEIGHT_MAX" \
  --n_trials "$N_TRIALS" \
  --optuna_seed "$OPTUNA_SEED" \
  --batch_size "$BATCH_SIZE" \
  --cache_dir "$CACHE_DIR" \
  --output_dir "$OUTPUT_DIR" \
  "$@"

#!/usr/bin/env bash
# Searches the weights of target + w * (tuned - base) whose answers a judge likes best, and saves the best model.
# Edit the variables; `python -m tvmerge mt_bench --help` explains each. The same command again goes on where it stopped.
# Flags given to this script win over its variables; paths are relative to the folder it lies in.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"

# Models: a local folder, a Hub id, or id@revision. These are toys of 0.7 M parameters that come with the code.
TARGET_MODEL=(demo/models/target)
BASE_MODEL=demo/models/base
TUNED_MODEL=(demo/models/tuned) # several: (a b:base_of_b); LoRA adapters too

OUTPUT_DIR=output_mt_bench # folder of this run
GATE_MODE= GATE_PROMPTS= MOE_BASE= EXPERTS_PER_TOKEN= SHARE_WEIGHTS= SEARCH_GATE= SAVE_EXPERTS=
# Experts: 2 to 8 targets become one mixture, each plus its own weights times the task vector. Two toys, for instance:
# TARGET_MODEL=(demo/models/target demo/models/expert)
# GATE_MODE=hidden GATE_PROMPTS=demo/moe.yaml # or random, cheap_embed, uniform
# MOE_BASE=first EXPERTS_PER_TOKEN=2            # or average: attention, norms, embeddings of all
# SHARE_WEIGHTS=false SEARCH_GATE=false SAVE_EXPERTS=true OUTPUT_DIR=output_mt_bench_moe

# Questions: a folder of benchmarks/ with a question.jsonl, yours for instance.
BENCH_NAME=toy
CHAT_TEMPLATE=none # the toys know no chat; empty: the template of the target's tokenizer
MAX_NEW_TOKEN=512
NUM_CHOICES=1
QUESTION_LIMIT= # questions in a trial; empty: 300; all: all that are not held out
# For real models, for instance:
# BENCH_NAME=japanese_chat CHAT_TEMPLATE= # or japanese_roleplay, english_chat

# Judge. rouge_l compares with the bench's reference answers: no key, no network, no cost.
JUDGE_MODEL_NAME=rouge_l
JUDGE_BASE_URL=
JUDGE_FILE=     # judge prompts: ja, en or a file in FastChat's format; empty: by the language of the questions
MAX_JUDGE_COST= # US dollars in all; empty: no limit. `python -m tvmerge plan` with these flags estimates it
PARALLEL=8      # requests to the judge at a time
# Real ones, for instance:
# export OPENAI_API_KEY=...; JUDGE_MODEL_NAME=gpt-4o-mini MAX_JUDGE_COST=5
# export ANTHROPIC_API_KEY=...; JUDGE_MODEL_NAME=claude-haiku-4-5 MAX_JUDGE_COST=5
# JUDGE_MODEL_NAME=openai:qwen3-32b JUDGE_BASE_URL=http://127.0.0.1:8000/v1 # vLLM, llama.cpp, a gateway
# JUDGE_MODEL_NAME=transformers:Qwen/Qwen3-8B                               # on this machine, beside the candidate

# Search
OPTIMIZE_MODE=layer # uniform, layer, block:4, parameter, all
OPTUNA_SAMPLER=RSM  # CMA-ES, TPE, NSGA-II and others, see README.md
WEIGHT_MIN=0
WEIGHT_MAX=2
N_TRIALS=30
OPTUNA_SEED=42

BATCH_SIZE=auto # answers that the model writes at a time
CACHE_DIR=      # models of the Hub and judgments; empty: the Hub's own cache, and ~/.cache/tvmerge

target=(--target_model "${TARGET_MODEL[@]}")
if [[ " $*" == *" --target_model"* ]]; then target=(); fi # also where they are numbered
tuned=(--tuned_model "${TUNED_MODEL[@]}")
if [[ " $*" == *" --tuned_model"* ]]; then tuned=(); fi # a second one would be added to the first

python -m tvmerge mt_bench \
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
  --bench_name "$BENCH_NAME" \
  ${CHAT_TEMPLATE:+--chat_template "$CHAT_TEMPLATE"} \
  --max_new_token "$MAX_NEW_TOKEN" \
  --num_choices "$NUM_CHOICES" \
  ${QUESTION_LIMIT:+--question_limit "$QUESTION_LIMIT"} \
  --judge_model_name "$JUDGE_MODEL_NAME" \
  ${JUDGE_BASE_URL:+--judge_base_url "$JUDGE_BASE_URL"} \
  ${JUDGE_FILE:+--judge_file "$JUDGE_FILE"} \
  ${MAX_JUDGE_COST:+--max_judge_cost "$MAX_JUDGE_COST"} \
  --parallel "$PARALLEL" \
  --optimize_mode "$OPTIMIZE_MODE" \
  --optuna_sampler "$OPTUNA_SAMPLER" \
  --weight_min "$WEIGHT_MIN" \
  --weight_max "$WEIGHT_MAX" \
  --n_trials "$N_TRIALS" \
  --optuna_seed "$OPTUNA_SEED" \
  --batch_size "$BATCH_SIZE" \
  ${CACHE_DIR:+--cache_dir "$CACHE_DIR"} \
  --output_dir "$OUTPUT_DIR" \
  "$@"

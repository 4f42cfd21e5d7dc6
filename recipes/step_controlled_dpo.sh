#!/usr/bin/env bash
# Step-controlled DPO (Lu et al. 2024): pairs that part at a known step, beside ordinary pairs, with equal data.
# Usage: bash recipes/step_controlled_dpo.sh [--fresh]     results in $RUN; finished steps are kept unless --fresh
#
# The toy by default, 3 seeds, two at a time; FORM=code has its solver compute with Python. Your own model, fine-tuned to write a step a paragraph, and problems by
# variables, here with GSM8K:
#   SOLVER=ckpt/sft TRAIN=dataset/GSM8K/train.json TEST=dataset/GSM8K/test.json TASK=GSM8K NPROC=8 JOBS=1 SEEDS=1 \
#       STEPS= RUN=runs/gsm8k TEMPERATURE=1.0 BRANCH_FLAGS="--attempts 100" \
#       DPO_FLAGS="--max_batch_size 4 --accumulation_steps 2 --lr 1e-7 --epochs 2" \
#       DECODE_FLAGS="--max_batch_size 128 --max_new_tokens 512" \
#       bash recipes/step_controlled_dpo.sh
source "$(dirname "$0")/environment.sh" requirements.txt
source recipes/stages.sh

FORM=${FORM:-text} # what a step is: a paragraph, or a block of code and what it printed
case $FORM in
    # STEPS: solutions with the truth of every step, to see whether credit finds it
    text) : "${SFT_FLAGS=--epochs 4}" "${STEPS=dataset/toy/steps.json}" ;;
    code) # fewer solutions, for each runs its code in a process of its own; credit knows no blocks
        : "${SFT_FLAGS=--epochs 10}" "${STEPS=}" "${PROBLEMS=500}" "${SAMPLES=4}" "${SHARE=0.3}" "${TEMPERATURE=0.3}" \
            "${BRANCH_FLAGS=--attempts 20 --temperature 0.3 --temperature_rise 0.1 --temperature_cap 0.5}" \
            "${DECODE_FLAGS=--max_batch_size 512 --max_new_tokens 160}" "${RUN=runs/step_controlled_dpo_code}" ;;
    *) echo "error: FORM=$FORM; expected text or code" >&2; exit 1 ;;
esac
RUN=${RUN:-runs/step_controlled_dpo} SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-2} NPROC=${NPROC:-1}
TASK=${TASK:-toy} TRAIN=${TRAIN:-dataset/toy/train.json} TEST=${TEST:-dataset/toy/test.json}
SOLVER=${SOLVER:-} # without one the toy's base is fine-tuned
PROBLEMS=${PROBLEMS:-1500} SAMPLES=${SAMPLES:-8} SHARE=${SHARE:-0.5} # of ordinary pairs in the mix
# The paper samples at 1.0 and branches at 1.1 to 1.4; there this small solver writes gibberish, and learns to shun that alone
TEMPERATURE=${TEMPERATURE:-0.6}
BRANCH_FLAGS=${BRANCH_FLAGS:---attempts 20 --temperature 0.6 --temperature_rise 0.1 --temperature_cap 0.8}
# without the chosen solution's own likelihood DPO lowers that of both sides, and the toy's accuracy with it
DPO_FLAGS=${DPO_FLAGS:---max_batch_size 16 --lr 2e-4 --nll_weight 10}
DECODE_FLAGS=${DECODE_FLAGS:---max_batch_size 512 --max_new_tokens 96}

answer() { many solver_evaluate.py --task "$TASK" --seed "$seed" $DECODE_FLAGS "$@"; }
# test_on NAME CHECKPOINT: greedy accuracy on the test problems
test_on() {
    stage "seed $seed: $1: test" "$run/$1-test/results.json" \
        answer --ckpt_dir "$2" --label_file "$TEST" --log_dir "$run/$1-test"
}
# prefer NAME FILE: preferences from a file of pairs, their test, and where their credit sees mistakes
prefer() {
    stage "seed $seed: $1: preferences" "$run/$1/manifest.json" \
        many preference_train.py --ckpt_dir "$solver" --save_dir "$run/$1" --train_file "$2" --seed "$seed" --resume auto $DPO_FLAGS
    test_on "$1" "$run/$1"
    if [ -n "$STEPS" ]; then
        stage "seed $seed: $1: credit" "$run/$1-credit/results.json" \
            many preference_evaluate.py --ckpt_dir "$run/$1" --reference_ckpt_dir "$solver" --steps_file "$STEPS" \
            --log_dir "$run/$1-credit"
    fi
}

# All stages of one seed.
run_seed() {
    local seed=$1 run=$RUN/seed-$1 solver=$SOLVER demonstrations=dataset/toy/demonstrations.json
    [ "$FORM" = text ] || demonstrations=$RUN/demonstrations.json
    mkdir -p "$run"
    if [ -z "$SOLVER" ]; then
        solver=$run/sft
        stage "seed $seed: sft: fine-tune" "$run/sft/manifest.json" \
            python solver_train.py --ckpt_dir "$RUN/base" --save_dir "$run/sft" --seed "$seed" \
            --train_file "$demonstrations" --max_batch_size 16 --lr 1e-3 $SFT_FLAGS --resume auto
    fi
    test_on sft "$solver"
    stage "seed $seed: samples" "$run/samples/results.json" \
        answer --ckpt_dir "$solver" --label_file "$TRAIN" --log_dir "$run/samples" --limit "$PROBLEMS" \
        --num_samples "$SAMPLES" --temperature "$TEMPERATURE"
    stage "seed $seed: ordinary pairs" "$run/ordinary.json" \
        python data_build.py pairs --samples_file "$run/samples/samples.jsonl" --save_file "$run/ordinary.json" \
        --pairs_a_problem 4 --seed "$seed"
    stage "seed $seed: step-controlled pairs" "$run/branches.json" \
        many data_build.py branch --ckpt_dir "$solver" --task "$TASK" --samples_file "$run/samples/samples.jsonl" \
        --log_dir "$run/branches" --save_file "$run/branches.json" --pairs_a_problem 1 --seed "$seed" \
        $BRANCH_FLAGS $DECODE_FLAGS
    stage "seed $seed: a mix of both, and as many ordinary ones" "$run/control.json" \
        python data_build.py mix --pairs_file "$run/ordinary.json" --branch_file "$run/branches.json" \
        --save_file "$run/mix.json" --control_file "$run/control.json" --share "$SHARE" --overwrite --seed "$seed"
    prefer dpo "$run/control.json"
    prefer scdpo "$run/mix.json"
}

started_as_job "$@"
begin "$RUN" "$@"
if [ -z "$SOLVER" ]; then
    [ "$FORM" = text ] || stage "demonstrations with code" "$RUN/demonstrations.json" \
        python dataset/toy/with_code.py --in_file dataset/toy/demonstrations.json --out_file "$RUN/demonstrations.json"
    stage "the toy's base" "$RUN/base/manifest.json" \
        python checkpoint_split.py --ckpt_file dataset/toy/base --save_path "$RUN/base" --n 1 \
        --code_tokens "$([ "$FORM" = code ] && echo true || echo false)"
fi
for_each_seed run_seed
python recipes/seeds_table.py --run_dir "$RUN" --claim scdpo --baseline sft --rows sft dpo scdpo \
    --names "fine-tuned solver" "DPO on ordinary pairs" "DPO with step-controlled pairs"
[ -z "$STEPS" ] || python recipes/credit_table.py --run_dir "$RUN" --rows dpo scdpo \
    --names "DPO on ordinary pairs" "DPO with step-controlled pairs"

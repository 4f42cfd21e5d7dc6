#!/usr/bin/env bash
# Weak-to-strong reasoning (Yang et al. 2024): what a strong model learns from the answers of a weak one.
# Usage: bash recipes/weak_to_strong.sh [--fresh]     results in $RUN; finished steps are kept unless --fresh
#
# The toy by default, 3 seeds, two at a time. Your own models and problems by variables, here with GSM8K:
#   WEAK=ckpt/gemma-2b STRONG=ckpt/llama-2-70b TRAIN=dataset/GSM8K/train.json TEST=dataset/GSM8K/test.json TASK=GSM8K \
#       SHOTS=4 NPROC=8 JOBS=1 SEEDS=1 RUN=runs/gsm8k DECODE_FLAGS="--max_batch_size 128 --max_new_tokens 512" \
#       SOLVER_FLAGS="--max_batch_size 4 --lr 1e-5" WEAK_FLAGS="--max_batch_size 4 --lr 1e-5" \
#       bash recipes/weak_to_strong.sh
# The rates of this example were not tried; the toy's are a hundred times as high.
source "$(dirname "$0")/environment.sh" requirements.txt
source recipes/stages.sh

RUN=${RUN:-runs/weak_to_strong} SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-2} NPROC=${NPROC:-1}
TASK=${TASK:-toy} TRAIN=${TRAIN:-dataset/toy/train.json} TEST=${TEST:-dataset/toy/test.json}
WEAK=${WEAK:-$RUN/weak-base} STRONG=${STRONG:-$RUN/strong-base}
# SHOTS: weak demonstrations in the strong model's prompt. 0: a model as small as the toy's learns nothing from its prompt;
# it is trained on GLANCE steps of the weak answers instead
SHOTS=${SHOTS:-0} GLANCE=${GLANCE:-20} ITERATIONS=${ITERATIONS:-2} SAMPLES=${SAMPLES:-8} PAIRS=${PAIRS:-2}
TEMPERATURE=${TEMPERATURE:-0.7} # of the samples that vote; the paper's is 1.0, at which the toy's solver writes gibberish
SHARE=${SHARE:-0.6} # of the problems to teach the weak model; it labels the others
SOLVER_FLAGS=${SOLVER_FLAGS:---max_batch_size 16 --lr 1e-3} WEAK_FLAGS=${WEAK_FLAGS:---max_batch_size 16 --lr 2e-3}
DPO_FLAGS=${DPO_FLAGS:---max_batch_size 16 --lr 3e-5 --beta 0.1}
DECODE_FLAGS=${DECODE_FLAGS:---max_batch_size 512 --max_new_tokens 96}

train() { many solver_train.py --seed "$seed" --resume auto "$@"; }
answer() { many solver_evaluate.py --task "$TASK" --seed "$seed" $DECODE_FLAGS "$@"; }
# fit NAME CHECKPOINT FILE FLAGS: fine-tune a checkpoint on a file into $run/NAME
fit() {
    local name=$1 start=$2 file=$3
    shift 3
    stage "seed $seed: $name: fine-tune" "$run/$name/manifest.json" \
        train --ckpt_dir "$start" --save_dir "$run/$name" --train_file "$file" "$@"
}
# label NAME CHECKPOINT FLAGS: greedy answers to the weak model's problems into $run/NAME
label() {
    local name=$1 checkpoint=$2
    shift 2
    stage "seed $seed: $name" "$run/$name/results.json" \
        answer --ckpt_dir "$checkpoint" --label_file "$run/unlabelled.json" --log_dir "$run/$name" "$@"
}
# test_on NAME CHECKPOINT: greedy accuracy on the test problems
test_on() {
    stage "seed $seed: $1: test" "$run/$1-test/results.json" \
        answer --ckpt_dir "$2" --label_file "$TEST" --log_dir "$run/$1-test"
}
# agree NAME WEAK_ANSWERS WEAK_MODEL STRONG_ANSWERS STRONG_MODEL: stage I's files, and a report on them
agree() {
    stage "seed $seed: $1: answers on which both agree" "$run/$1/hybrid.json" \
        python data_build.py weak_icl --weak_file "$run/$2/samples.jsonl" --weak_model "$3" \
        --icl_file "$run/$4/samples.jsonl" --strong_model "$5" --save_dir "$run/$1" --overwrite $shown
    stage "seed $seed: $1: how pure they are, by labels that nothing else reads" "$run/$1/report.json" \
        python data_build.py report --rows_file "$run/$1/weak.json" --samples_file "$run/$2/samples.jsonl" \
        --save_file "$run/$1/report.json"
}

# All stages of one seed.
run_seed() {
    local seed=$1 run=$RUN/seed-$1 shown= icl_model plus=plus before kind iteration
    mkdir -p "$run"
    stage "seed $seed: split the problems" "$run/unlabelled.json" \
        python data_build.py split --train_file "$TRAIN" --first_file "$run/taught.json" \
        --second_file "$run/unlabelled.json" --share "$SHARE" --overwrite --seed "$seed"
    fit weak "$WEAK" "$run/taught.json" $WEAK_FLAGS
    test_on weak "$run/weak"
    label weak-answers "$run/weak"

    stage "seed $seed: all weak answers" "$run/full.json" \
        python data_build.py full_weak --samples_file "$run/weak-answers/samples.jsonl" --weak_model "$run/weak" \
        --save_file "$run/full.json"
    fit full-weak "$STRONG" "$run/full.json" $SOLVER_FLAGS
    test_on full-weak "$run/full-weak"

    if [ "$SHOTS" -gt 0 ]; then
        stage "seed $seed: weak demonstrations" "$run/demonstrations.json" \
            python data_build.py demonstrations --samples_file "$run/weak-answers/samples.jsonl" --shots "$SHOTS" \
            --weak_model "$run/weak" --save_file "$run/demonstrations.json" --seed "$seed"
        label icl-answers "$STRONG" --few_shot "$run/demonstrations.json"
        shown="--demonstrations_file $run/demonstrations.json" icl_model=$STRONG
    else
        fit glance "$STRONG" "$run/full.json" $SOLVER_FLAGS --max_steps "$GLANCE"
        label icl-answers "$run/glance"
        icl_model=$run/glance
    fi

    agree stage-1 weak-answers "$run/weak" icl-answers "$icl_model"
    fit plus "$STRONG" "$run/stage-1/hybrid.json" $SOLVER_FLAGS
    for iteration in $(seq 2 "$ITERATIONS"); do
        before=$run/stage-$((iteration - 1))
        for kind in weak icl; do
            fit "$kind-$iteration" "$STRONG" "$before/$kind.json" $SOLVER_FLAGS
            label "$kind-answers-$iteration" "$run/$kind-$iteration"
        done
        agree "stage-$iteration" "weak-answers-$iteration" "$run/weak-$iteration" \
            "icl-answers-$iteration" "$run/icl-$iteration"
        fit "plus-$iteration" "$STRONG" "$run/stage-$iteration/hybrid.json" $SOLVER_FLAGS
    done
    [ "$ITERATIONS" -gt 1 ] && plus=plus-$ITERATIONS
    test_on plus "$run/$plus"

    stage "seed $seed: samples to vote" "$run/samples/results.json" \
        answer --ckpt_dir "$run/$plus" --label_file "$run/unlabelled.json" --log_dir "$run/samples" \
        --num_samples "$SAMPLES" --temperature "$TEMPERATURE"
    stage "seed $seed: votes" "$run/votes.jsonl" \
        python data_build.py vote --samples_file "$run/samples/samples.jsonl" --strong_model "$run/$plus" \
        --save_file "$run/votes.jsonl"
    stage "seed $seed: pairs" "$run/pairs.json" \
        python data_build.py contrast --vote_file "$run/votes.jsonl" --weak_file "$run/weak-answers/samples.jsonl" \
        --weak_model "$run/weak" --strong_model "$run/$plus" --save_file "$run/pairs.json" \
        --pairs_a_problem "$PAIRS" --seed "$seed"
    stage "seed $seed: pro: preferences" "$run/pro/manifest.json" \
        many preference_train.py --ckpt_dir "$run/$plus" --save_dir "$run/pro" --train_file "$run/pairs.json" \
        --seed "$seed" --resume auto $DPO_FLAGS
    test_on pro "$run/pro"

    fit ceiling "$STRONG" "$run/unlabelled.json" $SOLVER_FLAGS
    test_on ceiling "$run/ceiling"
}

started_as_job "$@"
begin "$RUN" "$@"
if [ "$TASK" = toy ]; then
    stage "a small model: the toy's base without its last layer" "$RUN/weak-base/manifest.json" \
        python dataset/toy/make_layers.py --base_dir dataset/toy/base --save_dir "$RUN/weak-base" --layers 3
    stage "the toy's base" "$RUN/base/manifest.json" \
        python checkpoint_split.py --ckpt_file dataset/toy/base --save_path "$RUN/base" --n 1
    stage "right sums, for the strong model alone" "$RUN/sums.json" \
        python dataset/toy/make_sums.py --save_file "$RUN/sums.json"
    stage "a strong model: the base when it has read them" "$RUN/strong-base/manifest.json" \
        python solver_train.py --ckpt_dir "$RUN/base" --save_dir "$RUN/strong-base" --train_file "$RUN/sums.json" \
        --max_batch_size 16 --lr 1e-3 --resume auto
fi
for_each_seed run_seed
python recipes/seeds_table.py --run_dir "$RUN" --floor weak --ceiling ceiling --claim pro --baseline full-weak \
    --rows weak full-weak plus pro ceiling --names "weak model" "full weak fine-tuning" "stage I: agreement" \
    "stage II: preferences" "strong ceiling: gold"

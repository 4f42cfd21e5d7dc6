#!/usr/bin/env bash
# Easy-to-Hard (Sun et al. 2024): a solver and verifiers that learn from easy problems alone, tested on hard ones.
# Usage: bash recipes/easy_to_hard.sh [--fresh | --improve dpo|rest_em|ppo]   results in runs/easy_to_hard; finished stages
# are kept unless --fresh. --improve goes on with two rounds that make the solver better on easy problems (improve.sh).
#
# Toy by default, 3 seeds, two at a time. Steps are labelled by rollouts, as a user has to who knows answers alone; the
# toy's exact truth serves the last table only. Every variable below may be set; MATH on 8 GPUs, files from prepare.py:
#   TASK=MATH BASE=llemma_7b TRAIN=dataset/MATH/train.json DEMONSTRATIONS=dataset/MATH/train.json \
#   TEST=dataset/MATH/math500.json SAMPLES=1024 NPROC=8 JOBS=1 SEEDS=1 \
#   SFT_FLAGS="--max_batch_size 16 --accumulation_steps 8 --lr 2e-5 --epochs 3 --max_seq_len 768" \
#   VERIFIER_FLAGS="--max_batch_size 16 --accumulation_steps 8 --lr 2e-5 --epochs 2 --max_seq_len 2048" \
#   SAMPLE_FLAGS="--max_batch_size 256 --max_new_tokens 768" bash recipes/easy_to_hard.sh
source "$(dirname "$0")/environment.sh" requirements.txt
source recipes/stages.sh
source recipes/verifier_base.sh
source recipes/improve.sh

export TASK=${TASK:-toy} BASE=${BASE:-dataset/toy/base} TRAIN=${TRAIN:-dataset/toy/train.json}
export DEMONSTRATIONS=${DEMONSTRATIONS:-dataset/toy/demonstrations.json} TEST=${TEST:-dataset/toy/test.json}
export EASY=${EASY:-level=1-3} HARD=${HARD:-level=4-5} RUN=${RUN:-runs/easy_to_hard} SEEDS=${SEEDS:-1 2 3}
is_toy=$([ "$TASK" = toy ] && echo true || echo false)
export VERIFIER_BASE=${VERIFIER_BASE:-$RUN/$([ "$is_toy" = true ] && echo verifier-base || echo base)}
export SAMPLES=${SAMPLES:-64} NPROC=${NPROC:-1} JOBS=${JOBS:-2}
export SFT_FLAGS=${SFT_FLAGS:---max_batch_size 16 --lr 1e-3 --epochs 4}
export JOIN_FLAGS=${JOIN_FLAGS:---share 0.6 --wrong_share 0.3}
export VERIFIER_FLAGS=${VERIFIER_FLAGS:---max_batch_size 24 --packing --balance --lr 6e-4 --warmup_ratio 0.1 --epochs 2}
export SAMPLE_FLAGS=${SAMPLE_FLAGS:---max_batch_size 512 --max_new_tokens 96}

sample() { many solver_evaluate.py --task "$TASK" $SAMPLE_FLAGS --seed "$seed" "$@"; }

# solver SEED: a solver of its own, its samples, and their labels
solver() {
    local seed=$1 dir=$RUN/seed-$1 kind
    stage "seed $seed: fine-tune a solver on easy demonstrations" $dir/solver/manifest.json \
        many solver_train.py --ckpt_dir "$RUN/base" --save_dir $dir/solver --train_file "$RUN/demonstrations.json" \
        $SFT_FLAGS --resume auto --seed "$seed"
    stage "seed $seed: eight samples of each easy problem" $dir/easy/results.json \
        sample --ckpt_dir $dir/solver --label_file "$TRAIN" --split "$EASY" --log_dir $dir/easy \
        --num_samples 8 --temperature 1.0 --top_k 20
    stage "seed $seed: outcomes, balanced for each problem" $dir/outcome.json \
        python data_build.py outcome --samples_file $dir/easy/samples.jsonl --save_file $dir/outcome.json
    stage "seed $seed: judge steps by eight rollouts each" $dir/steps.json \
        many data_build.py process --ckpt_dir $dir/solver --task "$TASK" --samples_file $dir/easy/samples.jsonl \
        --log_dir $dir/rollouts --save_file $dir/steps.json --solutions_a_problem 8 --rollouts 8 --temperature 0.85 \
        $SAMPLE_FLAGS --seed "$seed"
    # problems to test a verifier on are kept apart before two problems become one
    stage "seed $seed: hold some problems' steps back" $dir/steps-held.json \
        python data_build.py split --train_file $dir/steps.json --first_file $dir/steps-learnt.json \
        --second_file $dir/steps-held.json --overwrite --share 0.9 --seed "$seed"
    stage "seed $seed: and some problems' outcomes" $dir/outcome-held.json \
        python data_build.py split --train_file $dir/outcome.json --first_file $dir/outcome-learnt.json \
        --second_file $dir/outcome-held.json --overwrite --share 0.9 --test_file $dir/steps-held.json --allow_overlap \
        --seed "$seed"
    for kind in steps outcome; do
        stage "seed $seed: two problems as one, for solutions as long as hard ones, $kind" $dir/$kind-joined.json \
            python data_build.py join --train_file $dir/$kind-learnt.json --save_file $dir/$kind-joined.json \
            $JOIN_FLAGS --seed "$seed"
    done
    stage "seed $seed: greedy answers to hard problems" $dir/greedy/results.json \
        sample --ckpt_dir $dir/solver --label_file "$TEST" --split "$HARD" --log_dir $dir/greedy
    stage "seed $seed: $SAMPLES samples of each hard problem" $dir/hard/results.json \
        sample --ckpt_dir $dir/solver --label_file "$TEST" --split "$HARD" --log_dir $dir/hard \
        --num_samples "$SAMPLES" --temperature 0.7 --top_k 20
}

# verifier SEED process|outcome|mixed: learns from the labels, and scores what it will be asked to choose among
verifier() {
    local seed=$1 name=$2 dir=$RUN/seed-$1 files
    case $name in
        process) files="--objective process --train_file $dir/steps-joined.json --label_file $dir/steps-held.json" ;;
        outcome) files="--objective outcome --train_file $dir/outcome-joined.json --label_file $dir/outcome-held.json" ;;
        mixed) files="--objective process --train_file $dir/steps-joined.json $dir/outcome-joined.json \
            --label_file $dir/steps-held.json" ;;
    esac
    stage "seed $seed: train the $name verifier" $dir/$name/manifest.json \
        many verifier_train.py --ckpt_dir "$VERIFIER_BASE" --save_dir $dir/$name $files $VERIFIER_FLAGS \
        --resume auto --seed "$seed"
    stage "seed $seed: score the samples of hard problems, $name" $dir/$name-hard/results.json \
        many verifier_evaluate.py --task "$TASK" --ckpt_dir $dir/$name --samples_file $dir/hard/samples.jsonl \
        --label_file "$TEST" --split "$HARD" --log_dir $dir/$name-hard --max_batch_size 256
}

started_as_job "$@"
if [ "${1:-}" = "--improve" ]; then
    choose_method "${2:-}"
    shift 2
fi
begin "$RUN" "$@"
stage "the base checkpoint" $RUN/base/manifest.json \
    python checkpoint_split.py --ckpt_file "$BASE" --save_path "$RUN/base" --n "$NPROC"
stage "easy demonstrations" $RUN/demonstrations.json \
    python data_build.py select --train_file "$DEMONSTRATIONS" --split "$EASY" --save_file "$RUN/demonstrations.json"
solvers=() verifiers=()
for seed in $SEEDS; do
    solvers+=("solver $seed")
    for name in mixed process outcome; do verifiers+=("verifier $seed $name"); done
done
[ "$VERIFIER_BASE" = "$RUN/verifier-base" ] && solvers=(verifier_base "${solvers[@]}")
at_once "${solvers[@]}"
at_once "${verifiers[@]}"
[ -z "$IMPROVE" ] || for_each_seed improve
python recipes/easy_to_hard_table.py --run_dir "$RUN" --seeds "${SEEDS// /,}" --toy "$is_toy"
[ -z "$IMPROVE" ] || improved_table

#!/usr/bin/env bash
# What reinforcement learning is worth on the bundled toy: SFT, then PPO against the grader, an outcome verifier and a
# process verifier, and GRPO; and what a deliberately bad verifier does, which the health panel must notice.
# Usage: bash recipes/ppo_toy.sh [--fresh]     results in runs/ppo_toy; finished stages are kept unless --fresh,
# and a run that was stopped goes on from its last checkpoint. SEEDS="1 2 3" and JOBS=2 runs at once by default.
source "$(dirname "$0")/environment.sh" requirements.txt
source recipes/stages.sh
source recipes/verifier_base.sh

export VERIFIER_FLAGS=${VERIFIER_FLAGS:---max_batch_size 32 --packing --balance --lr 6e-4 --warmup_ratio 0.1 --epochs 2}
export TOY=dataset/toy RUN=${RUN:-runs/ppo_toy} SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-2}
export VERIFIER_BASE=${VERIFIER_BASE:-$RUN/verifier-base}
sample() { python solver_evaluate.py --task toy --max_batch_size 512 --max_new_tokens 96 "$@"; }

# learn SEED NAME FLAG...: a policy from this seed's solver, and its accuracy
learn() {
    local seed=$1 name=$2 dir=$RUN/seed-$1
    shift 2
    stage "seed $seed: $name" "$dir/$name/actor/manifest.json" \
        python ppo_train.py --config recipes/presets/ppo_toy.yaml --actor_ckpt_dir "$dir/sft" \
        --actor_save_dir "$dir/$name/actor" --train_file "$RUN/train.json" --eval_file "$RUN/held.json" \
        --eval_every 4 --resume auto --seed "$seed" "$@"
    stage "seed $seed: evaluate $name" "$dir/$name-test/results.json" \
        sample --ckpt_dir "$dir/$name/actor" --label_file $TOY/test.json --log_dir "$dir/$name-test"
}

# critic SEED NAME: the flags of PPO with a critic that starts from the solver
critic() {
    echo "--critic_ckpt_dir $RUN/seed-$1/sft --critic_save_dir $RUN/seed-$1/$2/critic --critic_lr 1e-3 --critic_warmup 2" \
        "--gae_lambda 0.95"
}

# judged SEED NAME VERIFIER: the flags of PPO against a verifier; the grader only looks on
judged() {
    echo "$(critic "$1" "$2") --reward verifier,rule --reward_weights 1,0 --reward_model_ckpt_dir $3 --format_penalty 1" \
        "--kl_coef 0.03"
}

# judge SEED NAME OBJECTIVE FILE BASE: a verifier, and what it makes of samples of problems held back
judge() {
    local seed=$1 name=$2 objective=$3 file=$4 base=$5 dir=$RUN/seed-$1
    stage "seed $seed: train the $name verifier" "$dir/$name/manifest.json" \
        python verifier_train.py --objective "$objective" --ckpt_dir "$base" --save_dir "$dir/$name" \
        --train_file "$file" $VERIFIER_FLAGS --resume auto --seed "$seed"
    stage "seed $seed: test the $name verifier" "$dir/$name-held/results.json" \
        python verifier_evaluate.py --task toy --ckpt_dir "$dir/$name" --samples_file "$dir/held/samples.jsonl" \
        --label_file "$RUN/held.json" --log_dir "$dir/$name-held" --max_batch_size 256
}

# solver SEED: the policy that all arms of a seed start from, and what its verifiers learn from
solver() {
    local seed=$1 dir=$RUN/seed-$1
    stage "seed $seed: fine-tune a solver on 200 demonstrations" "$dir/sft/manifest.json" \
        python solver_train.py --ckpt_dir "$RUN/base" --save_dir "$dir/sft" --train_file $TOY/demonstrations.json \
        --max_batch_size 16 --lr 1e-3 --epochs 4 --resume auto --seed "$seed"
    stage "seed $seed: evaluate it" "$dir/sft-test/results.json" \
        sample --ckpt_dir "$dir/sft" --label_file $TOY/test.json --log_dir "$dir/sft-test"
    stage "seed $seed: six samples of each training problem" "$dir/samples/results.json" \
        sample --ckpt_dir "$dir/sft" --label_file "$RUN/train.json" --log_dir "$dir/samples" \
        --num_samples 6 --temperature 1.0 --top_k 20 --seed "$seed"
    stage "seed $seed: eight samples of each problem held back" "$dir/held/results.json" \
        sample --ckpt_dir "$dir/sft" --label_file "$RUN/held.json" --log_dir "$dir/held" \
        --num_samples 8 --temperature 1.0 --top_k 20 --seed "$seed"
    stage "seed $seed: judge the samples by their answers and by their steps" "$dir/steps.json" \
        python recipes/judge_toy_samples.py --samples_file "$dir/samples/samples.jsonl" \
        --outcome_file "$dir/outcome.json" --steps_file "$dir/steps.json" --seed "$seed"
}

# arm NAME SEED: one way to reinforce it
arm() {
    local name=$1 seed=$2 dir=$RUN/seed-$2
    case $name in
        ppo-rule) learn "$seed" ppo-rule --reward rule --kl_coef 0.01 $(critic "$seed" ppo-rule) ;;
        grpo) learn "$seed" grpo --reward rule --kl_coef 0.01 --advantage grpo --group_size 8 ;;
        ppo-outcome)
            judge "$seed" outcome outcome "$dir/outcome.json" "$VERIFIER_BASE"
            learn "$seed" ppo-outcome $(judged "$seed" ppo-outcome "$dir/outcome") ;;
        ppo-process)
            judge "$seed" process process "$dir/steps.json" "$VERIFIER_BASE"
            learn "$seed" ppo-process $(judged "$seed" ppo-process "$dir/process") ;;
        ppo-bad)
            stage "the same outcomes with right and wrong exchanged" "$dir/inverted.json" \
                python recipes/invert_outcomes.py --train_file "$dir/outcome.json" --save_file "$dir/inverted.json"
            judge "$seed" inverted outcome "$dir/inverted.json" "$RUN/base"
            learn "$seed" ppo-bad $(critic "$seed" ppo-bad) --reward verifier,rule --reward_weights 1,0 --kl_coef 0 \
                --reward_model_ckpt_dir "$dir/inverted" ;;
    esac
}

started_as_job "$@"
begin "$RUN" "$@"
stage "the base checkpoint" "$RUN/base/manifest.json" \
    python checkpoint_split.py --ckpt_file $TOY/base --save_path "$RUN/base" --n 1
stage "hold problems back" "$RUN/held.json" \
    python data_build.py split --train_file $TOY/train.json --first_file "$RUN/train.json" --second_file "$RUN/held.json" \
    --share 0.95 --overwrite
solvers=(verifier_base) arms=() first=($SEEDS)
for seed in $SEEDS; do solvers+=("solver $seed"); done
for name in ppo-outcome ppo-process ppo-rule grpo; do # the longest first
    for seed in $SEEDS; do arms+=("arm $name $seed"); done
done
at_once "${solvers[@]}"
at_once "${arms[@]}" "arm ppo-bad ${first[0]}"
python recipes/ppo_toy_table.py --run_dir "$RUN" --seeds "${SEEDS// /,}"

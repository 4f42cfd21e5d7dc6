#!/usr/bin/env bash
# Revision: attempt, verdict, second attempt. A reviser learns from attempts, the word whether they are right, and right
# solutions; a verifier gives the word where no answer is known. Beside it the same solutions, learnt without attempts.
# Usage: bash recipes/revision.sh [--fresh]     results in $RUN; finished stages are kept unless --fresh
# The toy by default, 3 seeds; your own model and problems by variables: SOLVER TRAIN TEST TASK NPROC JOBS SEEDS
# RUN, and TRAIN_FLAGS and DECODE_FLAGS, which are made for the toy
source "$(dirname "$0")/environment.sh" requirements.txt
source recipes/stages.sh

RUN=${RUN:-runs/revision} SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-2} NPROC=${NPROC:-1}
TASK=${TASK:-toy} TRAIN=${TRAIN:-dataset/toy/train.json} TEST=${TEST:-dataset/toy/test.json} SOLVER=${SOLVER:-}
PROBLEMS=${PROBLEMS:-1000} SAMPLE_FLAGS=${SAMPLE_FLAGS:---num_samples 4 --temperature 0.7}
TRAIN_FLAGS=${TRAIN_FLAGS:---max_batch_size 16 --lr 1e-3} DECODE_FLAGS=${DECODE_FLAGS:---max_batch_size 512 --max_new_tokens 96}
VERIFIER_FLAGS=${VERIFIER_FLAGS:---objective outcome --max_batch_size 32 --lr 1e-3 --epochs 8} THRESHOLD=${THRESHOLD:-0.5}

train() { many solver_train.py --seed "$seed" --resume auto $TRAIN_FLAGS "$@"; }
answer() { many solver_evaluate.py --task "$TASK" --seed "$seed" $DECODE_FLAGS "$@"; }

run_seed() {
    local seed=$1 run=$RUN/seed-$1 solver=$SOLVER
    mkdir -p "$run"
    if [ -z "$SOLVER" ]; then
        solver=$run/sft
        stage "seed $seed: fine-tune" $run/sft/manifest.json \
            train --ckpt_dir $RUN/base --save_dir $run/sft --train_file dataset/toy/demonstrations.json --epochs 4
    fi
    stage "seed $seed: first attempts at the test" $run/sft-test/results.json \
        answer --ckpt_dir $solver --label_file $TEST --log_dir $run/sft-test
    stage "seed $seed: attempts to learn from" $run/samples/results.json \
        answer --ckpt_dir $solver --label_file $TRAIN --limit $PROBLEMS --log_dir $run/samples $SAMPLE_FLAGS

    stage "seed $seed: attempts, verdicts and right solutions" $run/revisions.json \
        python data_build.py revise --samples_file $run/samples/samples.jsonl --save_file $run/revisions.json --seed $seed
    stage "seed $seed: train a reviser" $run/reviser/manifest.json \
        train --ckpt_dir $solver --save_dir $run/reviser --train_file $run/revisions.json --epochs 2
    stage "seed $seed: right and wrong attempts" $run/outcomes.json \
        python data_build.py outcome --samples_file $run/samples/samples.jsonl --save_file $run/outcomes.json --seed $seed
    stage "seed $seed: train the verifier" $run/verifier/manifest.json \
        many verifier_train.py --ckpt_dir $solver --save_dir $run/verifier --train_file $run/outcomes.json \
        --seed $seed --resume auto $VERIFIER_FLAGS

    stage "seed $seed: verdicts on the test" $run/verdicts/results.json \
        many verifier_evaluate.py --task $TASK --ckpt_dir $run/verifier --samples_file $run/sft-test/samples.jsonl \
        --label_file $TEST --log_dir $run/verdicts --max_batch_size 256
    stage "seed $seed: what is attempted again" $run/again.json \
        python data_build.py revise --samples_file $run/verdicts/samples.jsonl --save_file $run/again.json \
        --threshold $THRESHOLD --keep_unsolved
    stage "seed $seed: second attempts" $run/revised-test/results.json \
        answer --ckpt_dir $run/reviser --label_file $run/again.json --log_dir $run/revised-test

    stage "seed $seed: the right solutions alone" $run/right.json \
        python data_build.py reject --samples_file $run/samples/samples.jsonl --save_file $run/right.json --seed $seed
    stage "seed $seed: train on them" $run/right/manifest.json \
        train --ckpt_dir $solver --save_dir $run/right --train_file $run/right.json --epochs 2
    stage "seed $seed: its attempts at the test" $run/right-test/results.json \
        answer --ckpt_dir $run/right --label_file $TEST --log_dir $run/right-test
}

started_as_job "$@"
begin "$RUN" "$@"
[ -n "$SOLVER" ] || stage "the toy's base" $RUN/base/manifest.json \
    python checkpoint_split.py --ckpt_file dataset/toy/base --save_path $RUN/base --n 1
for_each_seed run_seed
python recipes/seeds_table.py --run_dir $RUN --claim revised --baseline sft right --rows sft right revised \
    --names "first attempts" "right solutions learnt alone" "second attempts"

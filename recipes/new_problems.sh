#!/usr/bin/env bash
# Question generation: a questioner writes new problems after old ones, the solver answers each several times, and where
# most answers agree the solver learns from its own solutions. Beside it the same, with the old problems alone.
# Usage: bash recipes/new_problems.sh [--fresh]     results in $RUN; finished stages are kept unless --fresh
# The toy by default, 3 seeds; your own models and problems by variables: BASE SEED_FILE TEST TASK NPROC JOBS
# SEEDS RUN, and TRAIN_FLAGS and DECODE_FLAGS, which are made for the toy
source "$(dirname "$0")/environment.sh" requirements.txt
source recipes/stages.sh

RUN=${RUN:-runs/new_problems} SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-2} NPROC=${NPROC:-1} BASE=${BASE:-}
TASK=${TASK:-toy} SEED_FILE=${SEED_FILE:-dataset/toy/demonstrations.json} TEST=${TEST:-dataset/toy/test.json}
QUESTIONS=${QUESTIONS:-2} INVENT_FLAGS=${INVENT_FLAGS:-} # new problems after each prompt of the questioner; its prompts
SFT_FLAGS=${SFT_FLAGS:---epochs 4}
TRAIN_FLAGS=${TRAIN_FLAGS:---max_batch_size 16 --lr 1e-3} DECODE_FLAGS=${DECODE_FLAGS:---max_batch_size 512 --max_new_tokens 96}
SAMPLE_FLAGS=${SAMPLE_FLAGS:---num_samples 8 --temperature 0.7} AGREE_FLAGS=${AGREE_FLAGS:---share 0.6}

train() { many solver_train.py --seed "$seed" --resume auto $TRAIN_FLAGS "$@"; }
answer() { many solver_evaluate.py --seed "$seed" $DECODE_FLAGS "$@"; }

# agreement NAME FILE: answers to a file's problems, and those on which the solver agrees with itself
agreement() {
    answer --task none --ckpt_dir $run/sft --label_file $2 --log_dir $run/$1-answers $SAMPLE_FLAGS
    python data_build.py agree --task $TASK --samples_file $run/$1-answers/samples.jsonl --save_file $run/$1.json $AGREE_FLAGS
}
# learn NAME FILE: learn from that, and the test
learn() {
    stage "seed $seed: $1 problems: answers and agreement" $run/$1.json agreement $1 $2
    stage "seed $seed: $1 problems: learn from it" $run/$1/manifest.json \
        train --ckpt_dir $run/sft --save_dir $run/$1 --train_file $run/$1.json --epochs 2
    stage "seed $seed: $1 problems: test" $run/$1-test/results.json \
        answer --task $TASK --ckpt_dir $run/$1 --label_file $TEST --log_dir $run/$1-test
}
# questions: what the questioner writes, and what is new of it
questions() {
    answer --task none --ckpt_dir $run/questioner --label_file $run/invent.json --log_dir $run/questions \
        --num_samples $QUESTIONS --temperature 1
    python data_build.py problems --samples_file $run/questions/samples.jsonl --save_file $run/questions.json \
        --known_files $SEED_FILE,$TEST
}

run_seed() {
    local seed=$1 run=$RUN/seed-$1
    mkdir -p "$run"
    stage "seed $seed: a solver" $run/sft/manifest.json \
        train --ckpt_dir $BASE --save_dir $run/sft --train_file $SEED_FILE $SFT_FLAGS
    stage "seed $seed: its test" $run/sft-test/results.json \
        answer --task $TASK --ckpt_dir $run/sft --label_file $TEST --log_dir $run/sft-test
    stage "seed $seed: problems after problems" $run/invent.json \
        python data_build.py invent --train_file $SEED_FILE --save_file $run/invent.json --seed $seed $INVENT_FLAGS
    stage "seed $seed: a questioner" $run/questioner/manifest.json \
        train --ckpt_dir $BASE --save_dir $run/questioner --train_file $run/invent.json --epochs 2
    stage "seed $seed: new problems of its own" $run/questions.json questions
    learn new $run/questions.json
    learn old $SEED_FILE
}

export BASE=${BASE:-$RUN/base}
started_as_job "$@"
begin "$RUN" "$@"
[ "$BASE" != "$RUN/base" ] || stage "the toy's base" $RUN/base/manifest.json \
    python checkpoint_split.py --ckpt_file dataset/toy/base --save_path $RUN/base --n 1
for_each_seed run_seed
python recipes/seeds_table.py --run_dir $RUN --claim new --baseline sft old --rows sft old new \
    --names "solver" "own answers to old problems" "own answers to new problems"

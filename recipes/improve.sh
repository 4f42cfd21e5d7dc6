# Sourced by easy_to_hard.sh: --improve dpo|rest_em|ppo teaches each seed's solver further on easy problems alone, by what it
# writes to them, their answers and its process verifier (Sun et al. 2024, "Easy-to-hard generalization of generators").
export IMPROVE=${IMPROVE:-} ITERATIONS=${ITERATIONS:-2}
export IMPROVE_SAMPLE_FLAGS=${IMPROVE_SAMPLE_FLAGS:---num_samples 8 --temperature 0.7}
export DPO_FLAGS=${DPO_FLAGS:---max_batch_size 16 --lr 1e-4 --nll_weight 5}
export REST_EM_FLAGS=${REST_EM_FLAGS:---max_batch_size 16 --lr 1e-3 --epochs 2}
# the answer counts most: where the verifier had the same say, the toy's solver left steps out
export PPO_FLAGS=${PPO_FLAGS:---max_batch_size 64 --max_buffer_size 256 --max_steps 10 --lr 3e-4 --critic_lr 1e-3 \
--critic_warmup 2 --gae_lambda 0.95 --kl_coef 0.03 --reward_weights 1,0.2 --rollout_batch_size 256 --max_new_tokens 96}

# choose_method METHOD: what --improve names
choose_method() {
    case $1 in
        dpo | rest_em | ppo) IMPROVE=$1 ;;
        *) echo "error: --improve ${1:-(nothing)}; expected dpo, rest_em or ppo" >&2; exit 1 ;;
    esac
}

# easy_samples: what the solver $before writes to easy problems
easy_samples() {
    stage "$what: samples of easy problems" $now-samples/results.json \
        sample --ckpt_dir $before --label_file "$TRAIN" --split "$EASY" --log_dir $now-samples $IMPROVE_SAMPLE_FLAGS
}

# The three methods make $now, the solver of a round, from that of the round before, $before.
improve_by_dpo() {
    easy_samples
    stage "$what: what the process verifier thinks of them" $now-scores/results.json \
        many verifier_evaluate.py --task "$TASK" --ckpt_dir $dir/process --samples_file $now-samples/samples.jsonl \
        --label_file "$TRAIN" --split "$EASY" --log_dir $now-scores --max_batch_size 256
    stage "$what: pairs of better and worse ones" $now-pairs.json \
        python data_build.py prefer --samples_file $now-scores/samples.jsonl --save_file $now-pairs.json --seed "$seed"
    stage "$what: preferences" $now/manifest.json \
        many preference_train.py --ckpt_dir $before --save_dir $now --train_file $now-pairs.json $DPO_FLAGS \
        --resume auto --seed "$seed"
}
improve_by_rest_em() {
    easy_samples
    stage "$what: the right ones" $now-right.json \
        python data_build.py reject --samples_file $now-samples/samples.jsonl --save_file $now-right.json \
        --solutions_a_problem 4 --seed "$seed"
    # each round from the base again, as Singh et al. 2023 do: the solver's mistakes are not built upon
    stage "$what: fine-tune the base on them" $now/manifest.json \
        many solver_train.py --ckpt_dir "$RUN/base" --save_dir $now --train_file $now-right.json $REST_EM_FLAGS \
        --resume auto --seed "$seed"
}
improve_by_ppo() {
    local critic=$before-critic
    [ -e $critic ] || critic=$before # a verifier's scores lie far from the returns
    stage "$what: easy problems" $dir/easy.json \
        python data_build.py select --train_file "$TRAIN" --split "$EASY" --save_file $dir/easy.json
    stage "$what: reinforcement by answers and steps" $now/manifest.json \
        many ppo_train.py --actor_ckpt_dir $before --actor_save_dir $now --critic_ckpt_dir $critic \
        --critic_save_dir $now-critic --reward_model_ckpt_dir $dir/process --reward rule,verifier --task "$TASK" \
        --train_file $dir/easy.json $PPO_FLAGS --resume auto --seed "$seed"
}

# improve SEED: the rounds of one seed, each tested on hard problems
improve() {
    local seed=$1 dir=$RUN/seed-$1 before=$RUN/seed-$1/solver now round what
    ln -sfn greedy $dir/solver-test # the row of the table from which the rounds set out
    for round in $(seq "$ITERATIONS"); do
        now=$dir/$IMPROVE-$round what="seed $seed: $IMPROVE $round"
        improve_by_$IMPROVE
        stage "$what: greedy answers to hard problems" $now-test/results.json \
            sample --ckpt_dir $now --label_file "$TEST" --split "$HARD" --log_dir $now-test
        before=$now
    done
}

# improved_table: hard problems right after each round, over all seeds
improved_table() {
    local round rows=(solver) names=("fine-tuned solver")
    for round in $(seq "$ITERATIONS"); do
        rows+=("$IMPROVE-$round") names+=("$IMPROVE round $round")
    done
    python recipes/seeds_table.py --run_dir "$RUN" --claim "$IMPROVE-$ITERATIONS" --baseline solver --rows "${rows[@]}" \
        --names "${names[@]}"
}

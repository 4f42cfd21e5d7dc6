# Sourced by the recipes whose verifiers have to check sums: what these start from on the toy.

# verifier_base: in VERIFIER_BASE, a model that knows sums, as Llemma, which the paper's verifiers start from, does. The base, when it has
# read right sums, gets two more layers and judges sums, of which half are wrong. It sees no problem, and the numbers of hard
# problems are no larger than those of easy ones.
verifier_base() {
    local dir=$VERIFIER_BASE
    stage "right sums" $dir-sums.json python dataset/toy/make_sums.py --save_file $dir-sums.json
    stage "the base, when it has read them" $dir-read/manifest.json \
        python solver_train.py --ckpt_dir "$RUN/base" --save_dir $dir-read --train_file $dir-sums.json \
        --max_batch_size 16 --lr 1e-3 --resume auto
    stage "two layers more" $dir-deep/manifest.json \
        python dataset/toy/make_layers.py --base_dir $dir-read --save_dir $dir-deep --layers 6
    stage "sums to judge" $dir-judged.json \
        python dataset/toy/make_sums.py --save_file $dir-judged.json --judged --rows 45000
    stage "the verifiers' base, when it has judged them" $dir/manifest.json \
        python verifier_train.py --ckpt_dir $dir-deep --save_dir $dir --train_file $dir-judged.json \
        --objective process --held_out 0.01 --max_batch_size 32 --lr 1e-3 --resume auto
}

#!/usr/bin/env bash
# The stages from a folder of songs to recommendations, each one command; see --help. Paths are the caller's.
set -euo pipefail

repo=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
self=$0
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $repo/.venv/bin/python ]] && PYTHON=$repo/.venv/bin/python
fi
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

usage() {
    cat <<EOF
usage: $self STAGE [options]

  shards MUSIC_DIR   pack a folder of songs into shards/            tools/make_shards.py
  encoder            train an encoder on shards/ into runs/         simsiam_dali.train
  classifier         embed the songs with the newest encoder and    simsiam_dali.embed, simsiam_dali.evaluate
                     evaluate that: runs/NAME/evaluation/report.html
  recommend          songs like others, or that you may like        simsiam_dali.recommend
  hpo                search for better settings, train the best     simsiam_dali.hpo
  compare            the best runs of each encoder type             simsiam_dali.compare
  demo               all of it on 192 synthesised songs             make demo
  all MUSIC_DIR      shards, encoder, classifier, recommend --top; --ratings FILE is given to shards, the
                     other options to encoder

A stage passes its options on; STAGE --help shows them. --encoder-type simsiam|joint|contrastive|byol|simple, or
ENCODER_TYPE in the environment, says which encoder to train, tune, evaluate or recommend with. classifier also takes
--checkpoint RUN, and gives --shards, --embedding, --view-seconds, --batch-size, --threads, --device and --precision to
embed, --replace to both, and the rest to evaluate. Python is .venv/bin/python of the repository, else python3, or what PYTHON says.
EOF
}

fail() {
    echo "error: $*" >&2
    exit 1
}

python() {
    "$PYTHON" "$@"
}

# Prints the last value of an option, given as "--option value" or "--option=value"; nothing where it is not given.
value_of() {
    local option=$1 found="" word
    shift
    while (($#)); do
        word=$1
        shift
        case $word in
            "$option") found=${1:-} ;;
            "$option="*) found=${word#*=} ;;
        esac
    done
    echo "$found"
}

given() {
    local option=$1 word
    shift
    for word; do
        [[ $word == "$option" || $word == "$option="* ]] && return 0
    done
    return 1
}

# A stage's own help, without a look at its input.
wants_help() {
    given --help "$@" || given -h "$@"
}

# Prints the newest folder runs/NAME with a given file, of the wanted encoder type if there is one.
newest_run() {
    local file=$1 type=$2 path newest=""
    for path in runs/*/"$file"; do
        [[ -e $path ]] || continue
        if [[ -n $type ]] && ! grep -qx "  encoder_type: $type" "${path%/*}/config.yaml" 2>/dev/null; then
            continue
        fi
        [[ -z $newest || $path -nt $newest ]] && newest=$path
    done
    echo "${newest%/*}"
}

of_type() {
    [[ -z $1 ]] || echo " of type $1"
}

need_shards() {
    local folder
    # A file of settings, or a resumed run, may name the shards; the command itself looks there.
    if given --resume "$@" || given --config "$@" || [[ "$*" == *data.shards=* ]]; then
        return
    fi
    folder=$(value_of --shards "$@")
    folder=${folder:-shards}
    [[ $folder == s3://* || -e $folder/manifest.json ]] || fail "no shards in $folder/: run $self shards MUSIC_DIR first"
}

shards() {
    (($#)) || fail "name the folder of your songs: $self shards MUSIC_DIR"
    python "$repo/tools/make_shards.py" "$@"
}

encoder() {
    wants_help "$@" || need_shards "$@"
    python -m simsiam_dali.train "$@"
}

hpo() {
    wants_help "$@" || need_shards "$@"
    python -m simsiam_dali.hpo "$@"
}

classifier() {
    local type=${ENCODER_TYPE:-} run="" out word embed=() evaluate=()
    if wants_help "$@"; then
        python -m simsiam_dali.embed --help
        python -m simsiam_dali.evaluate --help
        return
    fi
    while (($#)); do
        word=$1
        shift
        if [[ $word == --*=* ]]; then # as two words
            set -- "${word#*=}" "$@"
            word=${word%%=*}
        fi
        case $word in
            --encoder-type | --checkpoint | --shards | --embedding | --view-seconds | --batch-size | --threads | \
                --device | --precision)
                (($#)) || fail "$word needs a value"
                case $word in
                    --encoder-type) type=$1 ;;
                    --checkpoint) run=$1 ;;
                    *) embed+=("$word" "$1") ;;
                esac
                shift
                ;;
            --replace)
                embed+=("$word")
                evaluate+=("$word")
                ;;
            *) evaluate+=("$word") ;;
        esac
    done
    if [[ -z $run ]]; then
        run=$(newest_run checkpoint.pt "$type")
        [[ -n $run ]] || fail "no trained encoder$(of_type "$type") in runs/: run $self encoder first"
    else
        [[ -e $run ]] || run=runs/$run
        [[ $run == *.pt ]] && run=$(dirname "$run")
        [[ -e $run/checkpoint.pt ]] || fail "no checkpoint in $run: run $self encoder first"
    fi
    python -m simsiam_dali.embed --checkpoint "$run" --out "$run/embeddings.parquet" --baselines "$run/baselines" \
        ${embed[@]+"${embed[@]}"}
    # Only now: before, --replace would also write over embeddings that embed refuses to.
    out=$(value_of --out ${evaluate[@]+"${evaluate[@]}"})
    out=${out:-$run/evaluation}
    if [[ -e $out/report.html ]] && ! given --replace ${evaluate[@]+"${evaluate[@]}"}; then
        fail "$out holds an evaluation already, and the embeddings are up to date: add --replace to write over the" \
            "evaluation, or --out DIR to keep it, as in $self classifier --checkpoint $(printf %q "$run") --replace"
    fi
    python -m simsiam_dali.evaluate --embeddings "$run/embeddings.parquet" --out "$run/evaluation" \
        ${evaluate[@]+"${evaluate[@]}"}
}

recommend() {
    local type=${ENCODER_TYPE:-} run word passed=()
    while (($#)); do
        word=$1
        shift
        case $word in
            --encoder-type)
                (($#)) || fail "$word needs a value"
                type=$1
                shift
                ;;
            --encoder-type=*) type=${word#*=} ;;
            *) passed+=("$word") ;;
        esac
    done
    set -- ${passed[@]+"${passed[@]}"}
    if ! wants_help "$@" && ! given --embeddings "$@"; then
        run=$(newest_run embeddings.parquet "$type")
        [[ -n $run ]] || fail "no embedded songs$(of_type "$type") in runs/: run $self classifier first"
        set -- --embeddings "$run/embeddings.parquet" "$@"
    fi
    python -m simsiam_dali.recommend "$@"
}

compare() {
    if ! wants_help "$@" && ! given --tracking-uri "$@" && ! given --config "$@" && [[ -z ${MLFLOW_TRACKING_URI:-} ]] &&
        [[ "$*" != *mlflow.tracking_uri=* && ! -e mlflow.db ]]; then
        fail "no runs in mlflow.db: run $self encoder first, once with --encoder-type simsiam and once with simple"
    fi
    python -m simsiam_dali.compare "$@"
}

demo() {
    (($# == 0)) || fail "demo takes no options; afterwards: $self encoder --config configs/demo.yaml --shards demo/shards"
    make -C "$repo" demo
}

all() {
    local music=${1:-} folder type ratings="" word passed=()
    [[ -n $music && $music != -* ]] || fail "name the folder of your songs first: $self all MUSIC_DIR [options]"
    shift
    folder=$(value_of --shards "$@")
    type=$(value_of --encoder-type "$@")
    type=${type:-${ENCODER_TYPE:-}}
    while (($#)); do
        word=$1
        shift
        case $word in
            --ratings)
                (($#)) || fail "$word needs a value"
                ratings=$1
                shift
                ;;
            --ratings=*) ratings=${word#*=} ;;
            *) passed+=("$word") ;;
        esac
    done
    shards "$music" ${folder:+--out "$folder"} ${ratings:+--ratings "$ratings"}
    encoder ${passed[@]+"${passed[@]}"}
    classifier ${type:+--encoder-type "$type"}
    (recommend ${type:+--encoder-type "$type"} --top) ||
        echo "no songs recommended by rating; by likeness: $self recommend --like SONG"
}

main() {
    local stage=${1:-}
    (($#)) && shift
    case $stage in
        all | shards | encoder | classifier | recommend | hpo | compare | demo) "$stage" "$@" ;;
        -h | --help | help) usage ;;
        "")
            usage >&2
            exit 2
            ;;
        *)
            echo "error: there is no stage $stage: all, shards, encoder, classifier, recommend, hpo, compare or demo" >&2
            exit 2
            ;;
    esac
}

# On one line: bash reads a script as it runs it, and would go on in a file that was updated during a stage of hours.
main "$@"; exit

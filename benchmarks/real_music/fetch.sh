#!/usr/bin/env bash
# Real music under free licences: the soundtracks of games that Debian ships. Needs apt-get and dpkg-deb, no root, no install.
#
#   benchmarks/real_music/fetch.sh DIR             makes DIR/<package>/*.{ogg,opus,mp3}; about 700 MB come over the network
#   benchmarks/real_music/fetch.sh DIR --report    the same of other games, on which nothing was chosen; about 2.8 GB
#
# A package that is there already is left as it is; one that cannot be had is named, and the script ends with 1.
# The licences are in each DIR/<package>/copyright.
set -euo pipefail

[ $# -eq 1 ] || [ "${2:-}" = --report ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }

packages=(wesnoth-1.16-music warzone2100-music supertux-data adonthell-data lincity-ng-data asc-music singularity-music
    hyperrogue-music frozen-bubble-data drascula-music btanks-data)
# Listed before the first training on them: recipes are compared on the soundtracks above, and reported on these.
report=(supertuxkart-data naev-data widelands-data hedgewars-data unknown-horizons berusky2-data megaglest-data
    colobot-common-sounds ardentryst freedroidrpg-data fillets-ng-data warmux-data planetblupi-music-ogg
    fretsonfire-songs-sectoid fretsonfire-songs-muldjord extremetuxracer-data openclonk-data)
[ $# -eq 1 ] || packages=("${report[@]}")

mkdir -p "$1"
cd "$1"
missing=()
for package in "${packages[@]}"; do
    [ -d "$package" ] && { echo "$package: already here"; continue; }
    work=$(mktemp -d "$PWD/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    if ! (cd "$work" && apt-get download --quiet "$package" >log 2>&1 && dpkg-deb -x ./*.deb tree); then
        echo "$package: $(tail -n 1 "$work/log")" >&2
        missing+=("$package")
    else
        mkdir "$work/songs"
        # One folder a soundtrack. Files of one name in several folders keep their folder's name.
        find "$work/tree" -type f \( -iname '*.ogg' -o -iname '*.opus' -o -iname '*.mp3' \) -print0 |
            while IFS= read -r -d '' file; do
                name=${file##*/}
                [ -e "$work/songs/$name" ] && { folder=${file%/*}; name=${folder##*/}-$name; }
                mv "$file" "$work/songs/$name"
            done
        cp "$work/tree/usr/share/doc/$package/copyright" "$work/songs/"
        mv "$work/songs" "$package"
        echo "$package: $(find "$package" -type f ! -name copyright | wc -l) files"
    fi
    rm -rf "$work"
done
[ ${#missing[@]} -eq 0 ] || { echo "not there: ${missing[*]} (apt-get update may help)" >&2; exit 1; }

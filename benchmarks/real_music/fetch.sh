#!/usr/bin/env bash
# Real music under free licences: the soundtracks of games that Debian ships. Needs apt-get and dpkg-deb, no root, no install.
#
#   benchmarks/real_music/fetch.sh DIR             makes DIR/<package>/*.{ogg,opus,mp3}; about 700 MB come over the network
#   benchmarks/real_music/fetch.sh DIR --report    the same of other games; about 2.8 GB
#   benchmarks/real_music/fetch.sh DIR --held-out  of a third set; about 1.3 GB
#
# A package that is there already is left as it is; one that cannot be fetched is named, and the script ends with 1.
# The licences are in each DIR/<package>/copyright.
set -euo pipefail

case ${2:-} in '' | --report | --held-out) [ $# -gt 0 ] ;; *) false ;; esac || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }

packages=(wesnoth-1.16-music warzone2100-music supertux-data adonthell-data lincity-ng-data asc-music singularity-music
    hyperrogue-music frozen-bubble-data drascula-music btanks-data)
# Listed before the first training on them: recipes are compared on the soundtracks above, and reported on these.
report=(supertuxkart-data naev-data widelands-data hedgewars-data unknown-horizons berusky2-data megaglest-data
    colobot-common-sounds ardentryst freedroidrpg-data fillets-ng-data warmux-data planetblupi-music-ogg
    fretsonfire-songs-sectoid fretsonfire-songs-muldjord extremetuxracer-data openclonk-data)
# Listed after the recipes were fixed and before anything was scored on them: what has music of what the
# other two lists do not have, up to 400 MB.
held_out=(ufoai-music freeorion-data nexuiz-music boswars-data marsshooter-data starfighter-data lugaru-data
    trackballs-data pushover-data zaz-data amoebax-data caveexpress-data cavepacker-data endless-sky-data freedink-data
    enigma-data wizznic-data parsec47-data rrootage-data noiz2sa-data torus-trooper-data titanion-data gunroar-data
    mu-cade-data tumiki-fighters-data powermanga-data manaplus-data torcs-data)
if [ "${2:-}" = --report ]; then packages=("${report[@]}"); fi
if [ "${2:-}" = --held-out ]; then packages=("${held_out[@]}"); fi

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
        # Quake's descendants keep theirs in ZIP archives.
        find "$work/tree" -type f -name '*.pk3' -print0 |
            while IFS= read -r -d '' archive; do python3 -m zipfile -e "$archive" "$archive.d"; done
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

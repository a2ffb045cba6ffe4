#!/bin/sh
# Installs what of packages.txt is missing, where that may be done; says so in one line, and never fails: what is
# missing is skipped, and named at the end of the tests. `packages.sh STAMP` remembers a try that did not help there.
set -u
command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || exit 0
list=$(dirname "$0")/packages.txt stamp=${1:-/dev/null}

missing() {
    wanted=$(sed 's/#.*//; s/^\([^ ]*\).*/\1/; /^$/d' "$list")
    # shellcheck disable=SC2086  # a word for each package
    present=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' $wanted 2>/dev/null) "
    for package in $wanted; do
        case $present in *" $package:installed "*) ;; *) echo "$package" ;; esac
    done
}

lacking=$(missing)
[ -n "$lacking" ] || exit 0
# Not again today, when the same could not be had in the last try.
[ -z "$(find "$stamp" -type f -mtime -1 -newer "$list" 2>/dev/null)" ] || [ "$(cat "$stamp")" != "$lacking" ] || exit 0
names=$(echo "$lacking" | tr '\n' ' ')
root=
if [ "$(id -u)" != 0 ]; then
    root="sudo -n"
    $root true 2>/dev/null || { echo "not installed, for that needs root: $names"; exit 0; }
fi
echo "apt-get installs what the tests use: $names"
log=$(mktemp)
apt() {
    # shellcheck disable=SC2086  # sudo and its option, or nothing
    $root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Acquire::Retries=1 -o Acquire::http::Timeout=20 \
        -o DPkg::Lock::Timeout=60 "$@" </dev/null >>"$log" 2>&1
}
apt update
# shellcheck disable=SC2086  # a word for each package
apt install --no-install-recommends $lacking || for package in $lacking; do apt install --no-install-recommends "$package"; done
lacking=$(missing)
if [ -n "$lacking" ]; then
    echo "could not be installed: $(echo "$lacking" | tr '\n' ' ')($(grep -m1 '^E: ' "$log" || echo 'no reason given'))"
    [ "$stamp" = /dev/null ] || { mkdir -p "$(dirname "$stamp")" && echo "$lacking" >"$stamp"; }
fi
rm -f "$log"

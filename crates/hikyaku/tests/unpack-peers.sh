#!/usr/bin/env bash
# Mail servers that cannot be installed beside Postfix: their files are only unpacked, into
# target/test-peers, and the tests start them in a mount namespace of their own. What is there
# already is kept.
set -euo pipefail
cd "$(dirname "$0")/../../.."

# Package and a file that it brings.
peers=(
  "exim4-daemon-light usr/sbin/exim4"
  "opensmtpd usr/sbin/smtpd"
)
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo -n)

unpack() {
  local name=$1 into=$PWD/target/test-peers/$1 fresh libraries
  fresh=$into.$$
  mkdir -p "$fresh"
  [ -n "$(apt-cache madison "$name")" ] || "${sudo[@]}" apt-get update -qq
  (cd "$fresh" && apt-get download -qq "$name" 2>/dev/null)
  # Only the libraries that it needs are installed; nothing of them is in anybody's way.
  mapfile -t libraries < <(dpkg-deb -f "$fresh/$name"_*.deb Depends | tr ',|' '\n\n' | sed -n 's/^ *\(lib[^ ]*\).*/\1/p')
  dpkg-query -W "${libraries[@]}" >/dev/null 2>&1 ||
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${libraries[@]}"
  dpkg-deb -x "$fresh/$name"_*.deb "$fresh"
  rm -f "$fresh/$name"_*.deb
  rm -rf "$into"
  mv "$fresh" "$into"
}

for peer in "${peers[@]}"; do
  [ -e "target/test-peers/${peer/ //}" ] || unpack "${peer%% *}"
done

#!/usr/bin/env bash
# Servers that are not installed: mail servers that cannot stand beside Postfix, and Valkey, which a
# release may have only among its backports. Their files are unpacked into target/test-peers; the
# tests start mail servers in a mount namespace of their own. What is there already is kept.
set -euo pipefail
cd "$(dirname "$0")/../../.."

# Package and a file that it brings.
peers=(
  "exim4-daemon-light usr/sbin/exim4"
  "opensmtpd usr/sbin/smtpd"
)
# May be missing, with a word: not every system has it.
valkey="valkey-tools usr/bin/valkey-check-rdb"
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo -n)
# Where packages come from: as the system says, or with lists of our own.
from=()

known() { [ -n "$(apt-cache "${from[@]}" madison "$1")" ]; }

# Looks among the backports of this release, which the system's own lists go on without.
look_in_backports() {
  local own=$PWD/target/test-peers/apt uri release
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $release" | sort -u | head -n 1)
  mkdir -p "$own/lists/partial" "$own/cache/archives/partial"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $release-backports main" >"$own/list"
  from=(-o "Dir::Etc::sourcelist=$own/list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$own/lists" -o "Dir::Cache=$own/cache")
  apt-get "${from[@]}" update -qq
}

unpack() {
  local name=$1 into=$PWD/target/test-peers/$1 fresh libraries
  fresh=$into.$$
  mkdir -p "$fresh"
  known "$name" || "${sudo[@]}" apt-get update -qq
  known "$name" || look_in_backports
  (cd "$fresh" && apt-get "${from[@]}" download -qq "$name" 2>/dev/null)
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

if [ ! -e "target/test-peers/${valkey/ //}" ]; then
  # Aside, where any failure ends it and not us.
  unpack "${valkey%% *}" &
  wait $! || echo "Valkey is not to be had from this system's repositories: what would run on it is left out" >&2
fi
# It is the server by the name that it is called by.
[ ! -d target/test-peers/valkey-tools ] || ln -sf valkey-check-rdb target/test-peers/valkey-tools/usr/bin/valkey-server

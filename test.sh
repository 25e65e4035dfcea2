#!/usr/bin/env bash
# Installs what the tests need, when it may, and runs everything. The same on a laptop and in CI.
#
#   ./test.sh           all checks and tests, storms and simulations at a bounded size
#   ./test.sh --full    the same at full size
#   ./test.sh --check   only what needs no peer: format, lints, documentation
set -euo pipefail
cd "$(dirname "$0")"

full=0 check_only=0
for argument in "$@"; do
  case "$argument" in
    --full) full=1 ;;
    --check) check_only=1 ;;
    *) sed -n '2,6p' "$0"; exit 2 ;;
  esac
done
[ "$full" = 1 ] && export HIKYAKU_TEST_FULL=1

step() { printf '\n== %s\n' "$*"; }

# Debian package and a file that it brings. The tests start these themselves, as ordinary
# processes on loopback ports of their own; no system service is used or left running.
needs=(
  "postfix /usr/sbin/postfix"
  "libsasl2-modules /usr/share/doc/libsasl2-modules"
  "sasl2-bin /usr/sbin/saslpasswd2"
  "opendkim /usr/sbin/opendkim"
  "python3-dkim /usr/lib/python3/dist-packages/dkim/__init__.py"
  "python3-nacl /usr/lib/python3/dist-packages/nacl/__init__.py"
  "strace /usr/bin/strace"
  "curl /usr/bin/curl"
  "prometheus /usr/bin/promtool"
  "knot /usr/sbin/knotd"
  "openssl /usr/bin/openssl"
  "redis-server /usr/bin/redis-server"
  "unbound /usr/sbin/unbound"
  "systemd /usr/bin/systemd-analyze"
  "pebble /usr/bin/pebble"
  "chromium /usr/bin/chromium"
  "python3-yaml /usr/lib/python3/dist-packages/yaml/__init__.py"
)
# For the build of jemalloc; wherever this machine has it from.
command -v make >/dev/null || needs+=("make /usr/bin/make")
# Clients of registries, wherever this machine has them from.
command -v node >/dev/null || needs+=("nodejs /usr/bin/node")
command -v npm >/dev/null || needs+=("npm /usr/bin/npm")
python3 -m pip --version >/dev/null 2>&1 || needs+=("python3-pip /usr/lib/python3/dist-packages/pip/__init__.py")

install_missing() {
  local missing=() need
  for need in "${needs[@]}"; do
    [ -e "${need#* }" ] || missing+=("${need%% *}")
  done
  [ ${#missing[@]} = 0 ] && return
  local sudo=()
  [ "$(id -u)" = 0 ] || sudo=(sudo -n)
  if command -v apt-get >/dev/null && "${sudo[@]}" true 2>/dev/null; then
    step "installing ${missing[*]}"
    "${sudo[@]}" apt-get update -qq
    # A package's own service must not start: the tests bring their own configuration.
    local policy=/usr/sbin/policy-rc.d made_policy=0
    if [ ! -e "$policy" ]; then
      made_policy=1
      printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
      "${sudo[@]}" chmod +x "$policy"
    fi
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
    [ "$made_policy" = 0 ] || "${sudo[@]}" rm -f "$policy"
  else
    printf 'missing, and this user may not install them:\n' >&2
    printf '  %s\n' "${missing[@]}" >&2
    printf 'on Debian or Ubuntu: sudo apt-get install %s\n' "${missing[*]}" >&2
    exit 1
  fi
}

command -v cargo >/dev/null || { echo "missing: cargo, the Rust toolchain (rust-version in Cargo.toml)" >&2; exit 1; }
# Schemathesis, pinned by digest, where the test of the specification looks for it.
install_schemathesis() {
  local pinned=crates/hikyaku/tests/schemathesis.txt into=target/schemathesis
  cmp -s "$pinned" "$into/pinned" && return
  step "installing Schemathesis"
  rm -rf "$into"
  python3 -m pip install --quiet --no-warn-script-location --root-user-action=ignore --target "$into" --require-hashes -r "$pinned"
  cp "$pinned" "$into/pinned"
}

[ "$check_only" = 1 ] || { install_missing; install_schemathesis; crates/hikyaku/tests/unpack-peers.sh; crates/content/tests/corpora/fetch.sh; }

step "format"
cargo fmt --all --check

step "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

[ "$check_only" = 1 ] && exit 0

step "tests"
# A failed assertion says where it stands; a hundred frames of a runtime would hide it.
export RUST_BACKTRACE=0
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --workspace --locked
else
  cargo test --workspace --locked --quiet
fi

# Unpacked where the system's repositories have it.
valkey=$PWD/target/test-peers/valkey-tools/usr/bin/valkey-server
if [ -e "$valkey" ]; then
  step "the store on Valkey"
  if cargo nextest --version >/dev/null 2>&1; then
    HIKYAKU_TEST_REDIS_SERVER=$valkey cargo nextest run -p store --locked redis
  else
    HIKYAKU_TEST_REDIS_SERVER=$valkey cargo test -p store --test it --locked --quiet redis
  fi
fi

step "sample configuration"
# The executable that the tests above ran.
target/debug/hikyaku check-config config/hikyaku.toml
target/debug/hikyaku check-config config/redis.toml

step "documentation tests"
cargo test --workspace --doc --locked --quiet

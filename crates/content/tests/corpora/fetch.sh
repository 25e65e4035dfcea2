#!/usr/bin/env bash
# Newsletters that others wrote, for the tests of rewriting: packages of the npm and Python
# registries, pinned by version and digest, unpacked into target/corpora. Nothing of them is run
# but the MJML compiler, over the MJML documents among them. What is there already is kept.
set -euo pipefail
cd "$(dirname "$0")/../../../.."
here=$PWD/crates/content/tests/corpora
into=$PWD/target/corpora
mkdir -p "$into"
fresh=
trap '[ -z "$fresh" ] || rm -rf "$fresh"' EXIT

# npm: package, version, SHA-512 in base64.
npm_packages=(
  "foundation-emails 2.5.1 1Yp9MbN8qJZrLUXMyQ5clLm+Ea663J7cSc//Y8EfCM21IkD7N2xYB7vRlSnnQy3fIB3TnI25IpW2VJHqXm9UkA=="
  "bootstrap-email 1.2.9 fxpfaMrHmG8SNz/zjN34PBNyeu7pARzuDvWLWR28eeJwXtON5qNE+DuuL4JXKIxuk6pfSVtUAzFM/xzdJggNPw=="
  "mosaico 0.18.10 EjsSbCmKGs7LkjN5AZkit1iEFtMw/Nx2ziy+qZFNVt8BbgQECEbqqMgonZ/0IC3eB4oQCfOOSqq5oEhsWaJAMA=="
  "mailgen 2.0.36 SyGJx3c8muDa8xtPIQnYlM8o+GC7aGs7yz3VzuvjXgz16JxW/ihdvp6N3XNUFlJaefJ7LNquvAsxJNNIpDZG9g=="
  "email-editor 1.0.0 FnaA2M0OTULlFVpqzsSjsYTrA6+sV0tvgERzQ5f4VJRYWQ97yXIayZR1nxbaOyqmiW48+F2V5fWnjxriRjeFqw=="
  "mails-default 0.0.1 G/4U++Z5GtJhD8Q9/SI2a9c2JVFkdLloeb8o63i52O78PwI2lnDyLdtkRzkWREUGwOB/EeICG5/JAixHbxSI4A=="
  "html-email-template 1.0.0 NcVSOufgtVdRNED/DMJ53G8Drt/O0dsEbxIybxjQFlgciayKcMoLTwIUr/jyMSJIzAlL/crYOaF8Txms1/62Mg=="
  "responsive-html-email-template 1.0.0 b2MOCx+1BtZmxDiYSej5dWBtV8tWnMAv4dg/xvsln6EXVVqI3R23+kBzxOTdYHIN2Nk0/5mBoViyyoiVLuIXQg=="
  "swig-email-templates 7.0.0 TX2vloRPREiw0J+EVr/UR3WQJOt0q80I15PTfPQLQE/ae0/mMAmsaJRVqz/7dBTIXAar2ecig1TttgLP4oipqg=="
  "mjml-browser 4.15.3 HS3YFo6mfle+TLnaRzUbDa9COwkm860lAuHXD5e7qxi90AVhGdAnG1KAVrriEfQSuYcAZbhZjZtp6GhvXi6XcA=="
)
# Python source packages: package, version, SHA-256.
python_packages=(
  "mjml 0.12.0 614397e624b115d78f9064d0f8aabceda3b522785eca8c2818ee03ffa8fdbf37"
  "django-newsletter 1.2.1 4a9294e5e29a27413b871955aa1ec91683072c09107afbf9093be09e8bdee32d"
  "html2text 2025.4.15 948a645f8f0bc3abe7fd587019a2197a12436cd73d0d4908af95bfc8da337588"
)

# Unpacks the one archive in directory $1 as $2, whole or not at all.
unpack() {
  mkdir "$1/out"
  tar xzf "$1"/*gz -C "$1/out"
  mv "$1/out" "$into/$2"
  rm -rf "$1"
}

for package in "${npm_packages[@]}"; do
  read -r name version digest <<<"$package"
  [ -e "$into/$name-$version" ] && continue
  fresh=$(mktemp -d -p "$into" .fresh.XXXXXX)
  (cd "$fresh" && npm pack --silent "$name@$version" >/dev/null)
  found=$(openssl dgst -sha512 -binary "$fresh"/*.tgz | base64 -w0)
  [ "$found" = "$digest" ] || { echo "$name $version is not the package that was pinned" >&2; exit 1; }
  unpack "$fresh" "$name-$version"
done

for package in "${python_packages[@]}"; do
  read -r name version digest <<<"$package"
  [ -e "$into/$name-$version" ] && continue
  fresh=$(mktemp -d -p "$into" .fresh.XXXXXX)
  echo "$name==$version --hash=sha256:$digest" >"$fresh/pinned"
  python3 -m pip download --quiet --no-deps --no-binary "$name" --require-hashes -r "$fresh/pinned" -d "$fresh" >/dev/null
  unpack "$fresh" "$name-$version"
done

if [ ! -e "$into/compiled" ]; then
  fresh=$(mktemp -d -p "$into" .fresh.XXXXXX)
  node "$here/compile-mjml.js" "$into/mjml-browser-4.15.3/package/lib/index.js" "$into/mjml-0.12.0" "$fresh"
  mv "$fresh" "$into/compiled"
fi

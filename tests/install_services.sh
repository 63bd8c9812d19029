#!/usr/bin/env bash
# Installs what some tests need that no Python package has: a database server, a browser, a Japanese font. Only on
# Debian and Ubuntu, and only as root, as in continuous integration; elsewhere those tests are skipped with a reason.
set -euo pipefail

missing=()
compgen -G "/usr/lib/postgresql/*/bin/initdb" > /dev/null || missing+=(postgresql)
command -v chromium > /dev/null || missing+=(chromium)
compgen -G "/usr/share/fonts/opentype/noto/*CJK*" > /dev/null || missing+=(fonts-noto-cjk)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q > /dev/null && apt-get install -q -y --no-install-recommends "${missing[@]}" > /dev/null ||
    echo "could not install ${missing[*]}: some tests will be skipped" >&2
fi

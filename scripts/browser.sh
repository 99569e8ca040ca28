#!/usr/bin/env bash
# The tests of the report's page need chromium. Install it if this is possible without asking; otherwise print how.
set -u
command -v chromium > /dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    { apt-get update && apt-get install --yes --no-install-recommends chromium; } > /dev/null 2>&1
    command -v chromium > /dev/null && exit 0
fi
echo "chromium is not installed and cannot be installed here: the tests of the report's page will be skipped."
echo "To run them: apt-get install chromium (as root), then make test."

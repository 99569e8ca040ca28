#!/usr/bin/env bash
# The tests of the report's page drive a chromium. Install it where that needs no question; say so where it cannot be.
set -u
command -v chromium > /dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    { apt-get update && apt-get install --yes --no-install-recommends chromium; } > /dev/null 2>&1
    command -v chromium > /dev/null && exit 0
fi
echo "There is no chromium and it could not be installed here: the tests of the report's page will be skipped."
echo "To run them: apt-get install chromium (as root), then make test."

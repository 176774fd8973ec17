#!/bin/sh
# In: a report.html (`make demo` writes outputs/demo/ropo/report.html). Out: report.png, its estimate and first suspect.
# Usage: docs/images/report.sh outputs/demo/ropo/report.html
set -eu
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
hidden='<style>.trust,nav,#knowledge{display:none!important}</style>'
sed "s|</head>|$hidden</head>|" "$1" > "$work/excerpt.html"
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking \
    --user-data-dir="$work/profile" --window-size=1100,805 --screenshot="$here/report.png" "file://$work/excerpt.html"
rm -rf "$work"

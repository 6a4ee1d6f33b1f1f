#!/bin/sh
# Headless rendering needs EGL or OSMesa. As root on a Debian-like system this installs them; otherwise it names the
# command. Nothing fails here: tests that render say themselves what is missing.
set -u
missing=""
have() { ldconfig -p 2>/dev/null | grep -q "$1"; }
have libEGL.so.1 || missing="$missing libegl1 libgl1-mesa-dri"
have libOSMesa.so || missing="$missing libosmesa6"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing$missing"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >/dev/null || echo "could not install$missing; rendering will not work until you do"
else
    echo "for headless rendering run: sudo apt-get install$missing"
fi

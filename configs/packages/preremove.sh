#!/bin/sh
# Debian says remove or upgrade, RPM says how many versions stay.
set -e
case ${1:-remove} in remove | 0) ;; *) exit 0 ;; esac
[ -d /run/systemd/system ] || exit 0
systemctl disable --now p2pgz-snapshotter.service p2pgz.service || true

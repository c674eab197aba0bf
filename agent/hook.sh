#!/bin/sh
# Installed by Switchback. Refuses the start of a VM that is active at another
# site. Only "prepare begin" may be refused: a refusal of "reconnect" would
# make libvirtd kill running guests.
[ "$2 $3" = "prepare begin" ] || exit 0
uuid=$(sed -n 's|.*<uuid>\([0-9a-fA-F-]*\)</uuid>.*|\1|p' | head -n 1 | tr 'A-F' 'a-f')
[ -n "$uuid" ] || exit 0
[ -f "@FENCE_DIR@/$uuid" ] || exit 0
printf 'fenced by Switchback: %s\n' "$(cat "@FENCE_DIR@/$uuid")" >&2
exit 1
